"""Tests of export.py: what other programs make of an exported checkpoint, against the model itself."""

import numpy as np
import pytest
import torch

import data
import export
import predict


def use(*arguments):
    """predict.py with these arguments, in float32."""
    return predict.main([*map(str, arguments), "--device", "cpu", "--dtype", "f32"])


def test_official_names(trained, folder):
    checkpoint = trained("uniter", "vqa")
    assert use(checkpoint, "--export", "vqa.bin") == 0
    assert "uniter.embeddings.word_embeddings.weight" in torch.load("vqa.bin")


@pytest.mark.parametrize(("model", "task"), [("vilbert", "ve"), ("lxmert", "retrieval"), ("uniter", "refer")])
def test_a_program_gives_what_the_model_gives_on_ragged_batches(model, task, trained, folder):
    checkpoint = trained(model, task)
    assert use(checkpoint, "--export", "model.pt2", "--to", "program") == 0
    program = torch.export.load(folder / "model.pt2").module()
    run, row = predict.load_run(predict.parse([checkpoint, "--scenes", "--device", "cpu", "--dtype", "f32"]))
    dataset, _ = predict.held_out(run, row, None, 60)
    rng = np.random.default_rng(0)
    for count in (1, 2, 3, 5, 8, 13):
        batch = data.collate(dataset, rng.choice(len(dataset), count, replace=False))
        found = program(*[getattr(batch, name) for name in export.Program.inputs])
        batch.task = torch.zeros(count, dtype=torch.long)
        with torch.inference_mode():
            encoding = run.model.encode(batch)
        torch.testing.assert_close(found["pooled"], encoding.pooled, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found["text"], encoding.text, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found["regions"], encoding.regions, atol=1e-5, rtol=1e-5)
        if task == "refer":
            assert "logits" not in found
        else:
            head = {"vqa": "vqa", "ve": "ve", "retrieval": "rank"}[task]
            with torch.inference_mode():
                expected = run.model.heads[head](encoding.pooled)
            torch.testing.assert_close(found["logits"], expected, atol=1e-5, rtol=1e-5)


def test_transformers_loads_what_is_exported_for_it(trained, folder, capsys):
    assert use(trained("lxmert", "vqa"), "--export", "hf", "--to", "transformers") == 0
    assert {"config.json", "pytorch_model.bin", "vocab.txt"} <= {path.name for path in (folder / "hf").iterdir()}
