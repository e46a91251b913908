"""Tests of attention.py: the methods against brute force and hand-made toys, the commands as a user runs them."""

import numpy as np
import pytest
import torch

import attention
import predict
import train

MODELS = ("uniter", "vilbert", "lxmert")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder that the runs are made in."""
    return tmp_path_factory.mktemp("attention")


@pytest.fixture
def trained(folder, small_scenes, monkeypatch, capsys):
    """trained(model, task): best.pt of a run of two steps, made on first use."""
    monkeypatch.chdir(folder)

    def run(model, task):
        out = f"{model}-{task}"
        if not (folder / out / "result.json").exists():
            command = ["--model", model, "--task", task, "--data", str(small_scenes(20)), "--out", out, "--pool", "5"]
            command += ["--steps", "2", "--batch-size", "8", "--device", "cpu", "--dtype", "f32", "--limit", "16"]
            assert train.main(command) == 0
        capsys.readouterr()
        return f"{out}/best.pt"

    return run


def load(checkpoint, count=3):
    """(run, task, dataset) of a checkpoint and held-out examples."""
    args = predict.parse([checkpoint, "--scenes", "--device", "cpu", "--dtype", "f32"])
    run, task = predict.load_run(args)
    dataset, _ = predict.held_out(run, task, None, count)
    return run, task, dataset


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("task", ["vqa", "ve", "nlvr2", "vcr", "retrieval", "refer", "pretrain"])
def test_the_weights_of_the_regions_are_shares(model, task, trained):
    run, task, dataset = load(trained(model, task))
    regions = [np.diff(dataset.store.offsets)[dataset.image[dataset.rows([i])]] for i in range(3)]
    for method in attention.METHODS:
        for i in range(3):
            with torch.inference_mode():  # as the server calls it
                weights = attention.region_weights(run, task, dataset, i, method)
            pictures = 2 if task.pictures == 2 else 1
            assert len(weights) == regions[i][:pictures].sum()
            assert min(weights) >= 0
            assert abs(sum(weights) - 1) < 1e-5
            assert max(weights) - min(weights) > 1e-6
