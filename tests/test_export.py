"""Tests of export.py: what other programs make of an exported checkpoint, against the model itself."""

import argparse
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import ONE_LAYER, use

import checkpoints
import data
import predict
import tasks
import train
from support import evaluation, export, options

# ---- weights ---------------------------------------------------------------------------------------------------------


def test_the_official_names_are_written_whole_or_in_bfloat16(trained, folder):
    checkpoint = trained("uniter", "vqa")
    assert use(checkpoint, "--export", "vqa.bin") == 0
    whole = torch.load("vqa.bin")
    assert "uniter.embeddings.word_embeddings.weight" in whole
    assert use(checkpoint, "--export", "half.bin", "--dtype", "bf16") == 0
    half = torch.load("half.bin")
    assert {name: tensor.bfloat16() for name, tensor in whole.items()}.keys() == half.keys()
    assert all(torch.equal(tensor, whole[name].bfloat16()) for name, tensor in half.items())


def test_transformers_loads_the_folder_and_computes_the_same(trained, folder):
    """As a user exports it: the three tokenizers give our pieces, and the outputs are equal in float64. test_checkpoints.py
    compares every set of heads."""
    transformers = pytest.importorskip("transformers")
    checkpoint = trained("lxmert", "vqa")
    assert use(checkpoint, "--export", "hf", "--to", "transformers") == 0
    out = folder / "hf"
    names = {"config.json", "model.safetensors", "tokenizer_config.json", "tokenizer.json", "vocab.txt", "all_ans.json"}
    assert {path.name for path in out.iterdir()} == names
    theirs = transformers.LxmertForQuestionAnswering.from_pretrained(out, dtype=torch.float64)
    run, row = predict.load_run(predict.parse([checkpoint, "--scenes", "--device", "cpu", "--dtype", "f32"]))
    dataset, _ = predict.held_out(run, row, None, 6)
    batch = data.collate(dataset, np.arange(6))
    for name in ("AutoTokenizer", "LxmertTokenizer", "LxmertTokenizerFast"):
        tokenizer = getattr(transformers, name).from_pretrained(out)
        encoded = tokenizer(list(dataset.text), padding=True, return_tensors="pt")
        assert torch.equal(encoded["input_ids"], batch.text), name
    batch.features = batch.features.double()
    batch.boxes = batch.boxes.double()
    with torch.no_grad():
        ours = run.model.double().heads["vqa"](run.model.encode(batch).pooled)
        found = theirs.eval()(
            input_ids=encoded["input_ids"],
            attention_mask=batch.text_mask.double(),
            visual_feats=batch.features,
            visual_pos=batch.boxes,
            visual_attention_mask=batch.region_mask.double(),
        )
    torch.testing.assert_close(ours, found.question_answering_score, atol=1e-6, rtol=0)


# ---- programs --------------------------------------------------------------------------------------------------------


def make_run(model, name):
    """A train.Run with a small model at random, and the row of its task."""
    paper = checkpoints.MODELS[model]
    task = tasks.TASKS[name]
    args = argparse.Namespace(model=model, task=name, tasks=[name], rerank=None, ablate=None, max_words=60)
    run = train.Run(args, paper, torch.device("cpu"), torch.float32, rank=0, world=1)
    run.answers = ["red", "blue", "yes", "no"]
    run.tokenizer = data.train_tokenizer(["is there a red circle?", "two blue stars left of it"])
    run.objectives = dict.fromkeys([task.objective] if task.objective else ["mlm", "itm"], 1)
    sizes = {"vocab_size": run.tokenizer.get_vocab_size(), "feature_size": 432, "answers": 4}
    sizes |= {"heads": tasks.heads_for(paper, run.objectives), "types": len(paper.text_types([name]))}
    known = paper.Config.__dataclass_fields__
    sizes |= {key: value for key, value in ONE_LAYER.items() if key in known}
    torch.manual_seed(0)
    run.model = paper.MODEL(paper.Config(**paper.PRESETS["tiny"] | sizes)).eval()
    return run, task


def ragged_batches(run, task, drawn, counts):
    """Yields (dataset, index, batch) of so many examples each, of drawn scenes."""
    lines = options.task_of_lines(task, run.paper, run.objectives, {"files": {}})
    dataset = drawn("test", lines.name, 20).encode(run.tokenizer, max_length=60)
    rng = np.random.default_rng(0)
    for count in counts:
        index = rng.choice(len(dataset), count, replace=False)
        if task.ranks:
            yield dataset, index, data.collate(dataset, index)
        else:
            yield dataset, index, task.batch(run, dataset, index, None)


@torch.inference_mode()
def logits_of_predict(run, task, dataset, index, batch):
    """What predict.py computes of these examples, on its own way, and where a program has it."""
    if task.ranks:
        return evaluation.score_pairs(run, dataset, index, dataset.image[index], task.ranks).float()
    if task.generates:
        return tasks.loss_and_logits(run, batch, task.objective)[1]
    return tasks.example_logits(run, dataset, index, task.objective)


def logits_of_program(task, found, batch):
    """The logits of a program's outputs, shaped as those of `logits_of_predict`."""
    logits = found["logits"]
    if task.ranks == "itm":
        return logits[:, 1] - logits[:, 0]  # log odds
    if task.ranks:
        return logits[:, 0]
    if task.generates:
        return logits.flatten(0, 1)[batch.word_index]  # (B, T, V) -> (M, V)
    return logits.view(len(batch.ids), -1)


@pytest.mark.parametrize(
    ("model", "task"),
    [
        *[("uniter", name) for name in ("refer", "retrieval", "pretrain", "caption")],  # the next test has vqa
        ("vilbert", "vcr"),
        ("lxmert", "nlvr2"),
    ],
)
def test_a_program_gives_the_logits_that_predict_py_computes_on_ragged_batches(model, task, drawn, tmp_path):
    run, row = make_run(model, task)
    export.export_program(run, row, predict.made_up_batch(run, row), tmp_path / "program")
    program = torch.export.load(tmp_path / "program").module()
    for dataset, index, batch in ragged_batches(run, row, drawn, (2 if task == "nlvr2" else 1, 3, 13)):
        tensors = {name: getattr(batch, name) for name in export.INPUTS if getattr(batch, name) is not None}
        with torch.inference_mode():
            found = program(**tensors)
            encoding = run.model.encode(batch)
        expected = logits_of_predict(run, row, dataset, index, batch)
        torch.testing.assert_close(logits_of_program(row, found, batch), expected, atol=1e-5, rtol=1e-5)
        if not row.generates:
            torch.testing.assert_close(found["pooled"], encoding.pooled, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(found["text_states"], encoding.text, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(found["region_states"], encoding.regions, atol=1e-5, rtol=1e-5)


STRANGER = """
import json, sys, torch
files = {"tokenizer.json": "", "answers.json": ""}
program = torch.export.load(sys.argv[1], extra_files=files).module()
out = program(**torch.load(sys.argv[2]))
torch.save(out["logits"], sys.argv[3])
print(json.loads(files["answers.json"])[int(out["logits"][0].argmax())])
assert not {"data", "common", "uniter"} & set(sys.modules)
"""


def test_a_program_runs_in_another_folder_with_nothing_but_torch(trained, folder, tmp_path):
    checkpoint = trained("uniter", "vqa")
    assert use(checkpoint, "--export", tmp_path / "vqa.pt2", "--to", "program") == 0
    run, row = predict.load_run(predict.parse([checkpoint, "--scenes", "--device", "cpu", "--dtype", "f32"]))
    dataset, _ = predict.held_out(run, row, None, 7)
    batch = data.collate(dataset, np.arange(7))
    tensors = {name: getattr(batch, name) for name in export.INPUTS if getattr(batch, name) is not None}
    torch.save(tensors, tmp_path / "tensors.pt")
    command = [sys.executable, "-c", STRANGER, "vqa.pt2", "tensors.pt", "logits.pt"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, check=False, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with torch.inference_mode():
        expected = run.model.heads["vqa"](run.model.encode(batch).pooled)
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), expected, atol=1e-5, rtol=1e-5)
    assert done.stdout.strip() == run.answers[int(expected[0].argmax())]


def test_onnx_runtime_computes_the_same(drawn, tmp_path):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    run, row = make_run("uniter", "nlvr2")
    export.export_onnx(run, row, predict.made_up_batch(run, row), tmp_path / "nlvr2.onnx")
    session = runtime.InferenceSession(tmp_path / "nlvr2.onnx")
    texts = session.get_modelmeta().custom_metadata_map
    assert json.loads(texts["answers.json"]) == run.answers and texts["tokenizer.json"] == run.tokenizer.to_str()
    names = [output.name for output in session.get_outputs()]
    for dataset, index, batch in ragged_batches(run, row, drawn, (2, 3, 9)):
        tensors = {name: getattr(batch, name).numpy() for name in export.INPUTS}
        found = dict(zip(names, session.run(None, tensors), strict=True))
        expected = logits_of_predict(run, row, dataset, index, batch)
        torch.testing.assert_close(torch.from_numpy(found["logits"]), expected, atol=1e-5, rtol=1e-5)
        with torch.inference_mode():
            pooled = run.model.encode(batch).pooled
        torch.testing.assert_close(torch.from_numpy(found["pooled"]), pooled, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("to", "package"), [("onnx", "onnxscript"), ("transformers", "safetensors")])
def test_a_missing_package_is_one_line(to, package, trained, folder, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, package, None)
    assert use(trained("lxmert", "vqa"), "--export", "missing", "--to", to) == 2
    error = capsys.readouterr().err
    assert "pip install" in error and error.count("\n") == 1
    assert not (folder / "missing").exists()


def test_a_program_in_bfloat16_is_refused(trained, folder, capsys):
    assert use(trained("uniter", "vqa"), "--export", "x.pt2", "--to", "program", "--dtype", "bf16") == 2
    assert "float32" in capsys.readouterr().err
