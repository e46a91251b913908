"""Tests of predict.py: every mode as a user runs it, on small drawn scenes and own pictures.

Runs of train.py are made once and have a few steps; the numbers that predict.py measures must be those of result.json.
"""

import json
import os
import re
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import in_a_fork, use
from PIL import Image, ImageFont

import data
import predict
import tasks
import train
import uniter
from common import UserError
from prepare import scenes
from support import drawing, examples, log, options, regions

TASKS = "vqa,ve,nlvr2,vcr,retrieval,refer,caption"
EVALUATED = [("uniter", task) for task in (*TASKS.split(","), "pretrain")]
EVALUATED += [("vilbert", "nlvr2"), ("vilbert", "caption"), ("lxmert", "retrieval"), ("lxmert", "pretrain")]


def result_of(checkpoint):
    """result.json of the run of a checkpoint."""
    with open(checkpoint.replace("best.pt", "result.json")) as file:
        return json.load(file)


def rounded(values):
    return {name: round(float(value), 5) for name, value in values.items()}


# ---- --data ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("model", "task"), EVALUATED)
def test_the_test_split_gives_the_numbers_of_result_json(model, task, trained, small_scenes, capsys, tmp_path):
    checkpoint = trained(model, task)
    out = tmp_path / "p.jsonl"
    assert use(checkpoint, "--data", small_scenes(20), "--out", out) == 0
    found = json.loads((tmp_path / "p.result.json").read_text())["test"]
    chance = rounded(found.pop("chance"))
    expected = result_of(checkpoint)
    assert found and rounded(found) == {name: expected[name] for name in found}
    assert chance == {name: expected["chance"][name] for name in chance} and len(chance) > 0
    measured = {name for name in expected if re.search("accuracy|loss|_r1|perplexity|bleu", name)}
    assert set(found) >= {name for name in measured if not name.startswith(("compose_", "detected_"))}
    lines_of = (
        "caption" if task == "pretrain" and model != "lxmert" else task
    )  # only LXMERT's pretraining has questions
    dataset = data.load(small_scenes(20), tasks.TASKS[lines_of], "test")
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["id"] for line in lines] == list(dataset.ids)


def test_a_split_and_a_task_can_be_chosen(trained, small_scenes, capsys, tmp_path):
    checkpoint = trained("uniter", "vqa,refer")
    expected = result_of(checkpoint)
    out = tmp_path / "p.jsonl"
    assert use(checkpoint, "--data", small_scenes(20), "--task", "refer", "--split", "detected", "--out", out) == 0
    found = json.loads((tmp_path / "p.result.json").read_text())["detected"]
    assert round(found["accuracy"], 5) == expected["detected_refer_accuracy"]


def test_predictions_may_go_into_a_pipe(trained, folder, tmp_path, capsys):
    lines = [{"id": "q", "image": "0.png", "text": "what color is the circle?"}]
    checkpoint = trained("uniter", "vqa")
    os.mkfifo(tmp_path / "pipe")
    with ThreadPoolExecutor() as pool:
        reader = pool.submit((tmp_path / "pipe").read_text)
        assert use(checkpoint, "--data", own_file(folder, "one.jsonl", lines), "--out", tmp_path / "pipe") == 0
        assert json.loads(reader.result(60))["id"] == "q"
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]
    capsys.readouterr()
    assert use(checkpoint, "--data", "one.jsonl") == 0
    assert "nothing to measure; --out FILE writes the predictions" in capsys.readouterr().out


def own_file(folder, name, lines):
    (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / name


def test_answers_are_optional_and_the_accuracy_is_that_of_the_lines_with_one(trained, folder, capsys):
    checkpoint = trained("uniter", "vqa")
    lines = []
    for i in range(9):
        lines.append({"id": f"q{i}", "image": f"{i % 3}.png", "text": "what color is the circle?"})
        lines[-1]["boxes"] = [[0, 0, 40, 40], [30, 30, 90, 90]]
    assert use(checkpoint, "--data", own_file(folder, "without.jsonl", lines), "--out", "p.jsonl") == 0
    assert capsys.readouterr().out.startswith("split train: 9 examples without answer, nothing to measure\n")
    found = [json.loads(line) for line in (folder / "p.jsonl").read_text().splitlines()]
    assert [line["id"] for line in found] == [line["id"] for line in lines]
    assert not any("truth" in line for line in found)
    assert {line["text"] for line in found} == {"what color is the circle?"}
    for line, predicted in zip(lines, found, strict=True):
        line["answer"] = predicted["answers"][0][0]  # what the model says
    lines[0]["answer"] = "an answer that it does not know"
    del lines[1]["answer"]
    assert use(checkpoint, "--data", own_file(folder, "with.jsonl", lines), "--out", "p.jsonl") == 0
    found = json.loads((folder / "p.result.json").read_text())["train"]
    assert found["accuracy"] == found["reachable"] == 7 / 8
    # training still needs every answer, though the same file was read without
    with pytest.raises(UserError, match="'answer' is missing"):
        data.load(folder / "with.jsonl", tasks.TASKS["vqa"], "train")


@pytest.mark.parametrize(
    ("task", "line"),
    [
        ("ve", {"image": "0.png"}),
        ("nlvr2", {"images": ["0.png", "1.png"]}),
        ("vcr", {"image": "0.png", "choices": ["red", "blue"], "reasons": ["a", "b"]}),
        ("refer", {"image": "0.png"}),
        ("retrieval", {"image": "0.png"}),
        ("caption", {"image": "0.png"}),
    ],
)
def test_lines_without_truth_of_every_task(task, line, trained, folder):
    lines = [{**line, "text": "a red circle"}, {**line, "text": "two blue stars", "id": 7}]
    path = own_file(folder, f"{task}-own.jsonl", lines)
    assert use(trained("uniter", task), "--data", path, "--out", "p.jsonl") == 0
    found = [json.loads(line) for line in (folder / "p.jsonl").read_text().splitlines()]
    assert [line["id"] for line in found].index("7") == len(found) / 2
    assert all("truth" not in line for line in found) or task == "caption"
    if task == "vcr":  # the answer, and the reasons given each of the two answers
        kinds = ["answer", "reason given answer 0", "reason given answer 1"]
        assert [line["kind"] for line in found] == kinds * 2
        for predicted in found:
            assert max(predicted["probs"]) == predicted["answers"][0][1]
            assert sum(predicted["probs"]) == pytest.approx(1, abs=1e-4)
    else:
        assert len(found) == 2


def test_a_prompt_is_filled_in_with_the_columns_of_each_line(trained, folder, capsys):
    checkpoint = trained("uniter", "vqa")
    lines = [{"image": "0.png", "text": f"what color is the {shape}?"} for shape in ("circle", "star", "square")]
    assert use(checkpoint, "--data", own_file(folder, "full.jsonl", lines), "--out", "full-p.jsonl") == 0
    lines = [{"image": "0.png", "thing": shape} for shape in ("circle", "star", "square")]
    path = own_file(folder, "parts.jsonl", lines)
    prompt = ["--prompt", "what color is the {thing}?"]
    assert use(checkpoint, "--data", path, *prompt, "--out", "parts-p.jsonl") == 0
    full = (folder / "full-p.jsonl").read_text()
    assert full.replace("full.jsonl", "") == (folder / "parts-p.jsonl").read_text().replace("parts.jsonl", "")
    capsys.readouterr()
    assert use(checkpoint, "--data", path, "--prompt", "the {size}?", "--out", "parts-p.jsonl") == 2
    assert "no key 'size'" in capsys.readouterr().err


@pytest.mark.parametrize("cut", [0, 1, 40, 3000, 12_345])
def test_an_interrupted_file_goes_on_and_ends_alike(cut, trained, small_scenes, monkeypatch, tmp_path):
    monkeypatch.setattr(predict, "CHUNK", 64)
    checkpoint = trained("uniter", "vqa")
    whole = tmp_path / "whole.jsonl"
    part = tmp_path / "part.jsonl"
    assert use(checkpoint, "--data", small_scenes(20), "--out", whole) == 0
    part.write_bytes(whole.read_bytes()[:cut])
    shutil.copy(tmp_path / "whole.result.json", tmp_path / "part.result.json")
    answered = []
    before = predict.predict

    def count(run, task, dataset, index, top):
        answered.extend(index.tolist())
        return before(run, task, dataset, index, top)

    monkeypatch.setattr(predict, "predict", count)
    assert use(checkpoint, "--data", small_scenes(20), "--out", part, "--resume") == 0
    assert part.read_bytes() == whole.read_bytes()
    assert (tmp_path / "part.result.json").read_text() == (tmp_path / "whole.result.json").read_text()
    lines = whole.read_bytes()[:cut].count(b"\n")
    assert min(answered) == lines // 64 * 64  # whole chunks are not computed again


def use_and_be_killed(*arguments):
    """predict.py, killed when it is about to answer the third part of the lines."""
    answer = predict.predict
    calls = []

    def answer_or_die(*given):
        calls.append(given)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return answer(*given)

    predict.predict = answer_or_die
    use(*arguments)


def test_a_killed_process_goes_on_and_ends_alike(trained, folder, monkeypatch):
    """SIGKILL while the third part of the lines is answered, then --resume: the same bytes as without an interruption."""
    checkpoint = trained("uniter", "vqa")
    colors = ("red", "blue", "green")
    lines = [{"image": f"{i % 3}.png", "text": f"is there a {colors[i % 7 % 3]} thing?"} for i in range(150)]
    path = own_file(folder, "many.jsonl", lines)
    monkeypatch.setattr(predict, "CHUNK", 40)
    assert use(checkpoint, "--data", path, "--out", "whole.jsonl") == 0
    code = in_a_fork(use_and_be_killed, checkpoint, "--data", str(path), "--out", "part.jsonl")
    assert code == -signal.SIGKILL
    part = folder / "part.jsonl"
    assert part.read_bytes().count(b"\n") == 80
    assert use(checkpoint, "--data", path, "--out", part, "--resume") == 0
    assert part.read_bytes() == (folder / "whole.jsonl").read_bytes()


@pytest.mark.parametrize("model", ["uniter", "vilbert", "lxmert"])
def test_layers_of_8_bits_answer_nearly_as_float32_does(model, trained, small_scenes, folder):
    checkpoint = trained(model, "vqa")
    run, _ = predict.load_run(predict.parse([checkpoint, "--scenes", "--int8", "--device", "cpu"]))
    kinds = {type(module).__module__ for module in run.model.modules()}
    assert "torch.ao.nn.quantized.dynamic.modules.linear" in kinds
    assert use(checkpoint, "--data", small_scenes(20), "--out", "float.jsonl", "--top", 99) == 0
    options = ["--data", str(small_scenes(20)), "--out", "int8.jsonl", "--top", "99", "--int8", "--device", "cpu"]
    assert predict.main([checkpoint, *options]) == 0
    differences = []
    for file in ("float.jsonl", "int8.jsonl"):
        lines = [json.loads(line) for line in (folder / file).read_text().splitlines()]
        differences.append([p for line in lines for _, p in sorted(line["answers"])])
    difference = np.abs(np.subtract(*differences))
    assert 0 < difference.max() < 0.05


def test_pretraining_is_measured_in_8_bits(trained, small_scenes, capsys):
    """UNITER's masked regions multiply by the weights of a linear map, which must still be there."""
    checkpoint = trained("uniter", "pretrain")
    assert predict.main([checkpoint, "--data", str(small_scenes(20)), "--int8", "--device", "cpu"]) == 0
    assert "mrfr_loss" in capsys.readouterr().out


def test_a_file_of_other_predictions_is_not_continued(trained, small_scenes, tmp_path, capsys):
    checkpoint = trained("uniter", "vqa")
    assert use(checkpoint, "--data", small_scenes(20), "--out", tmp_path / "p.jsonl") == 0
    capsys.readouterr()
    for content in ('{"id": "other"}\n', "no JSON\n", "[]\n"):
        (tmp_path / "p.jsonl").write_text(content)
        assert use(checkpoint, "--data", small_scenes(20), "--out", tmp_path / "p.jsonl", "--resume") == 2
        assert "p.jsonl:1: not a prediction" in capsys.readouterr().err
        assert (tmp_path / "p.jsonl").read_text() == content


def test_a_file_of_another_checkpoint_or_option_is_not_continued(trained, small_scenes, tmp_path, capsys):
    checkpoint = trained("uniter", "vqa")
    out = tmp_path / "p.jsonl"
    assert use(checkpoint, "--data", small_scenes(20), "--out", out) == 0
    lines = out.read_bytes().splitlines(keepends=True)
    out.write_bytes(b"".join(lines[:7]))
    other = torch.load(checkpoint, weights_only=True)
    other["state"]["pooler.dense.bias"] += 1
    torch.save(other, tmp_path / "other.pt")
    for file, more, name in (
        (tmp_path / "other.pt", [], "checkpoint"),
        (checkpoint, ["--top", "1"], "top"),
        (checkpoint, ["--split", "val"], "data"),
    ):
        assert use(file, "--data", small_scenes(20), "--out", out, "--resume", *more) == 2
        assert f"was made with another {name}" in capsys.readouterr().err
    assert out.read_bytes() == b"".join(lines[:7])
    (tmp_path / "p.result.json").unlink()
    assert use(checkpoint, "--data", small_scenes(20), "--out", out, "--resume") == 2
    assert "does not say how" in capsys.readouterr().err


def test_a_checkpoint_that_never_saw_the_picture_says_so(trained, folder, capsys):
    content = torch.load(trained("uniter", "vqa"), weights_only=True)
    content["settings"]["ablate"] = "image"
    torch.save(content, folder / "blind.pt")
    assert use("blind.pt", "--image", "0.png", "--text", "is it red?", "--boxes", "[[1,2,30,40]]") == 0
    assert "trained with --ablate image and answers without the image" in capsys.readouterr().err


def test_what_is_read_is_never_written_over(trained, folder, capsys):
    checkpoint = trained("uniter", "vqa")
    shutil.copy(checkpoint, "c.pt")
    path = own_file(folder, "mine.jsonl", [{"image": "0.png", "text": "is it red?", "answer": "yes"}])
    asked = own_file(folder, "asked.jsonl", [{"image": "0.png", "text": "is it red?"}])  # no answers
    os.symlink("0.png", "link.png")
    (folder / "set").mkdir()
    (folder / "set/dataset.json").write_text('{"name": "set", "files": {"vqa": "vqa.jsonl"}}')
    own_file(folder / "set", "vqa.jsonl", [{"image": "../0.png", "text": "is it red?", "answer": "yes"}])
    content = torch.load(checkpoint, weights_only=True)
    torch.save({**content, "data": str(path)}, "own.pt")
    own = "own.pt"
    for arguments, file in (
        ([checkpoint, "--data", path, "--out", path], path),
        ([checkpoint, "--image", "0.png", "--text", "red", "--out", "0.png"], "0.png"),
        ([checkpoint, "--image", "0.png", "--text", "red", "--out", "link.png"], "0.png"),
        ([checkpoint, "--image", "0.png", "--text", "red", "--attention", "0.png"], "0.png"),
        (["c.pt", "--export", "c.pt"], "c.pt"),
        ([checkpoint, "--data", path, "--out", "0.png"], "0.png"),
        ([checkpoint, "--data", "set", "--out", "set/vqa.jsonl"], "set/vqa.jsonl"),
        ([checkpoint, "--data", asked, "--out", "0.png"], "0.png"),
        ([checkpoint, "--data", asked, "--prompt", "is it so: {text}", "--out", "0.png"], "0.png"),
        ([own, "--scenes", "--out", "0.png"], "0.png"),
        ([own, "--scenes", "--attention", "0.png"], "0.png"),
    ):
        before = (folder / file).read_bytes()
        assert use(*arguments) == 2, arguments
        assert "would be lost" in capsys.readouterr().err
        assert (folder / file).read_bytes() == before
    before = (folder / "0.png").read_bytes()
    for out in ("0.png", "mine.jsonl"):
        assert data.main(["preview", str(path), "--task", "vqa", "--split", "test", "--out", out]) == 2
        assert "would be lost" in capsys.readouterr().err
    assert (folder / "0.png").read_bytes() == before


def test_words_that_are_cut_or_unknown_are_told(trained, folder, capsys):
    checkpoint = trained("uniter", "vqa")
    long = "is there a red thing " * 30
    path = own_file(folder, "long.jsonl", [{"image": "0.png", "text": long}])
    for arguments in (["--image", "0.png", "--text", long], ["--data", path], ["--image", "0.png", "--text", "ж ω"]):
        assert use(checkpoint, *arguments) == 0
        error = capsys.readouterr().err
        assert (
            "2 of 2 word pieces are unknown" if "ж ω" in arguments else "are cut off, since texts are too long"
        ) in error, error
    assert use(checkpoint, "--image", "0.png", "--text", "is there a red thing?") == 0
    assert "cut off" not in capsys.readouterr().err


# ---- --image ---------------------------------------------------------------------------------------------------------


def test_a_picture_gives_what_a_line_with_it_gives(trained, folder, capsys):
    """The path over the command line and the path over a file are different code."""
    boxes = [[0, 0, 40, 40], [30, 30, 90, 90], [50, 0, 80, 30]]
    line = {"image": "0.png", "boxes": boxes, "text": "a red circle"}
    for task, record, more in (
        ("vqa", line, []),
        ("ve", line, []),
        ("refer", line, []),
        ("caption", line, []),
        ("retrieval", line, []),
        ("pretrain", line, []),
        ("vcr", {**line, "choices": ["red", "blue"]}, ["--choices", "red", "blue"]),
    ):
        checkpoint = trained("uniter", task)
        path = own_file(folder, "one.jsonl", [record])
        assert use(checkpoint, "--data", path, "--out", "one-p.jsonl") == 0
        found = json.loads((folder / "one-p.jsonl").read_text())
        capsys.readouterr()
        given = ["--image", "0.png", "--boxes", json.dumps(boxes), *more]
        given += [] if task == "caption" else ["--text", "a red circle"]
        assert use(checkpoint, *given, "--out", "one.png") == 0
        printed = capsys.readouterr()
        assert printed.out == drawing.describe(found) + "\n", task
        assert Image.open(folder / "one.png").width == drawing.SIDE
        # best.pt of so short a run may be untrained
        assert re.sub(f"warning: {checkpoint}: untrained, at random: .*\n", "", printed.err) == ""


@pytest.mark.parametrize("orientation, turn", [(3, "ROTATE_180"), (6, "ROTATE_90"), (8, "ROTATE_270")])
def test_a_photo_on_its_side_is_answered_as_it_is_shown(orientation, turn, trained, folder, capsys):
    """Boxes, given and answered, are those of the picture as its EXIF tag turns it; so is the drawing."""
    upright = Image.open(folder / "0.png").crop((0, 0, 96, 64))
    upright.save(folder / "upright.png")
    tag = Image.Exif()
    tag[0x0112] = orientation
    upright.transpose(Image.Transpose[turn]).save(folder / "photo.png", exif=tag)
    boxes = [[0, 0, 40, 40], [30, 30, 90, 64], [60, 0, 96, 30]]  # some lie outside of a picture of 64 x 96
    given = ["--boxes", json.dumps(boxes), "--text", "a red circle"]
    answers = {}
    for name in ("upright", "photo"):
        capsys.readouterr()
        assert use(trained("uniter", "refer"), "--image", f"{name}.png", *given, "--out", f"{name}-sheet.png") == 0
        answers[name] = capsys.readouterr().out, np.asarray(Image.open(folder / f"{name}-sheet.png")).tolist()
    assert answers["photo"] == answers["upright"]
    shown = [json.loads(text) for text in re.findall(r"\[.*?\]", answers["photo"][0])]
    assert sorted(shown) == sorted(boxes)


def test_two_pictures_and_one_answer(trained, folder, capsys):
    checkpoint = trained("uniter", "nlvr2")
    pair = ["--image", "0.png", "--image", "1.png"]
    assert use(checkpoint, *pair, "--text", "exactly one picture shows a circle") == 0
    printed = capsys.readouterr()
    assert re.fullmatch(r"(true|false) 0\.\d+  (true|false) 0\.\d+\n", printed.out)
    assert printed.err.count("is asked about a grid; give boxes") == 1
    assert use(checkpoint, *pair, "--image", "2.png", "--text", "x") == 2
    assert "two --image" in capsys.readouterr().err


def test_the_reason_is_chosen_given_the_answer(trained, folder, capsys):
    checkpoint = trained("uniter", "vcr")
    given = ["--image", "0.png", "--text", "what color is it?", "--choices", "x", "y", "z", "--answer", "red"]
    assert use(checkpoint, *given) == 0
    assert re.fullmatch(r"([xyz] 0\.\d+(  )?){3}\n", capsys.readouterr().out)
    example = examples.make_example(tasks.VCR, {"text": "what?", "choices": ["x", "y"], "answer": "red"})
    assert example.rows == [(("what?", "red", "x"), 0), (("what?", "red", "y"), 0)] and example.target == -1
    example = examples.make_example(tasks.VCR, {"text": "what?", "choices": ["x", "y"], "answer": None})
    assert example.rows == [(("what?", "x"), 0), (("what?", "y"), 0)] and example.target == -1


def test_regions_of_a_picture_are_those_of_the_network_of_training(trained, folder, monkeypatch, capsys):
    """A checkpoint whose regions a network made asks that network."""
    from prepare import features

    asked = []

    def region_maker(described, device):
        asked.append(described)

        def make(image, boxes=None):
            values = np.linspace(-1, 1, 2 * 432, dtype=np.float32).reshape(2, 432)
            return {"features": values, "boxes": np.array([[0, 0, 0.5, 0.5], [0, 0, 1, 1]], np.float32)}

        return make

    monkeypatch.setattr(features, "region_maker", region_maker)
    content = torch.load(trained("uniter", "refer"))
    assert content["regions"] == scenes.DATASET_JSON["regions"]
    content["regions"] = {"kind": "network", "network": "resnet50"}
    torch.save(content, folder / "network.pt")
    assert use("network.pt", "--image", "0.png", "--text", "red circle") == 0
    assert asked == [content["regions"]]
    half = scenes.SIDE / 2
    assert f"[0, 0, {half:.0f}, {half:.0f}]" in capsys.readouterr().out


def test_a_store_in_memory_gives_the_batches_of_one_on_disk(tmp_path, folder):
    pictures = []
    for i in range(3):
        job = regions.PictureJob("here", folder / f"{i}.png", None, 4, i + 1)
        pictures.append(regions.picture_regions(job)[0])
    regions.write_store(tmp_path / "store", pictures)
    on_disk = regions.FeatureStore(tmp_path / "store").gather([2, 0, 1])
    in_memory = regions.MemoryStore(pictures).gather([2, 0, 1])
    assert set(on_disk) == set(in_memory)
    for name in on_disk:
        assert torch.equal(on_disk[name], in_memory[name]), name


# ---- --scenes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", [*TASKS.split(","), "pretrain"])
def test_a_sheet_of_held_out_examples(task, trained, folder, capsys):
    assert use(trained("uniter", task), "--scenes", "--out", "sheet.png") == 0
    printed = capsys.readouterr().out
    assert printed.count("truth: ") == 4 or task == "retrieval"
    assert printed.endswith("sheet.png: 4 examples of scenes, split test\n")
    picture = Image.open(folder / "sheet.png")
    assert picture.width == 2 * drawing.SIDE and len(picture.getcolors(10**6)) > 100


def test_the_sheet_shows_the_picture_files_of_own_data(trained, folder, monkeypatch):
    """Of own data the cells show the pictures themselves, not their regions."""
    lines = []
    for i in range(3):
        split = ("train", "val", "test")[i]
        lines.append({"image": f"{i}.png", "text": f"a picture {i}?", "answer": "yes", "split": split})
    path = own_file(folder, "mine.jsonl", lines)
    command = ["--data", str(path), "--task", "vqa", "--model", "uniter", "--steps", "1", "--out", "mine"]
    assert train.main([*command, "--device", "cpu", "--dtype", "f32"]) == 0
    opened = []
    before = regions.open_picture
    monkeypatch.setattr(regions, "open_picture", lambda where, file: opened.append(file) or before(where, file))
    assert use("mine/checkpoint.pt", "--scenes", "--out", "sheet.png") == 0
    assert opened == [folder / "2.png"]


def test_the_masked_word_is_one_that_only_the_picture_tells(trained, folder, capsys):
    assert use(trained("uniter", "pretrain"), "--scenes", 8, "--out", "sheet.png") == 0
    truths = re.findall(r"truth: (\w+)", capsys.readouterr().out)
    assert len(truths) == 8 and set(truths) <= set(scenes.CONTENT_WORDS)


def test_only_the_examples_that_are_shown_become_word_pieces(trained, monkeypatch, capsys):
    checkpoint = trained("uniter", "vqa")  # before, since training encodes its texts too
    encoded = []
    before = data.Dataset.encode
    monkeypatch.setattr(
        data.Dataset, "encode", lambda self, *a, **k: encoded.append(len(self)) or before(self, *a, **k)
    )
    assert use(checkpoint, "--scenes", 3, "--out", "sheet.png") == 0
    assert encoded == [3]


def test_a_cell_is_as_high_as_its_content(drawn, tmp_path):
    """Under a picture of 60 x 300 pixels a long text, 50 answers and the truth: each bar and the truth can be seen."""
    dataset = drawn("test", "vqa", 20).subset(np.arange(1))
    dataset.text = ["x" * 300 + " and so on" * 60]
    Image.new("RGB", (60, 300)).save(tmp_path / "tall.png")
    files = {int(dataset.image[0]): tmp_path / "tall.png"}
    answer = {"answers": [[f"answer {number}", 1.0] for number in range(50)], "truth": "answer 3"}
    cell = np.asarray(drawing.draw_cell(tasks.VQA, dataset, 0, answer, files)).astype(int)
    assert cell.shape[0] > (drawing.SIDE - 2 * drawing.MARGIN) * 5 + 50 * 20
    assert (cell[:, -drawing.MARGIN + 1 :] == 255).all()  # nothing runs over the margin
    column = (cell[:, 320] == drawing.RED).all(1)  # where every bar ends
    column |= (cell[:, 320] == drawing.GREEN).all(1)
    assert (np.diff(column.astype(int)) == 1).sum() == 50
    below = cell[np.flatnonzero(column)[-1] + 1 :]
    assert (below < 200).any() and (cell[-drawing.MARGIN :] == 255).all()  # the truth, and nothing cut off


def test_letters_outside_ascii_are_drawn_and_a_long_text_is_cut():
    """Pillow's own font draws the same box for every letter that it lacks."""
    try:
        ImageFont.truetype("DejaVuSans.ttf", 14)
    except OSError:
        pytest.skip("needs the font DejaVu Sans")
    cells = [np.asarray(drawing.text_cell(letter, 14, "black")) for letter in "üéß"]
    assert (cells[0] != cells[1]).any() and (cells[1] != cells[2]).any()
    assert drawing.font_for("plain", 14).getname() == ImageFont.load_default(14).getname()
    long = drawing.text_cell("star " * 9999, 14, "black")
    assert long.height == drawing.MOST_LINES * 19


@pytest.mark.parametrize(("size", "expected"), [((4, 4000), (80, 320)), ((4000, 4), (80, 20)), ((30, 45), (80, 120))])
def test_a_picture_is_drawn_at_most_four_times_as_high_as_wide(size, expected):
    assert drawing.resized(Image.new("RGB", size), 80).size == expected


# ---- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.pt", "--scenes"], "none.pt"),
        (["CKPT"], "give one of --scenes"),
        (["CKPT", "--scenes", "--image", "0.png"], "give one of --scenes"),
        (["CKPT", "--scenes", "0"], "at least 1"),
        (["CKPT", "--scenes", "--split", "none"], "none"),
        (["CKPT", "--scenes", "--out", "sheet.nothing"], "--out sheet.nothing"),
        (["CKPT", "--scenes", "--out", "sheet.msp"], "--out sheet.msp"),
        (["CKPT", "--scenes", "--task", "ve"], "trained for vqa"),
        (["CKPT", "--image", "none.png", "--text", "x"], "no such file"),
        (["CKPT", "--image", "0.png"], "vqa needs a text"),
        ([".", "--scenes"], ".: is a folder; give its best.pt"),
        (["CKPT", "--data", "vqa.jsonl", "--out", "."], "--out .: is a folder"),
        (["CKPT", "--export", ".", "--to", "program"], "--export .: is a folder"),
        (["CKPT", "--export", "/proc/x.bin"], "/proc/x.bin"),
        (["CKPT", "--image", "0.png", "--text", " "], "vqa needs a text"),
        (["CKPT", "--image", "0.png", "--text", "x", "--answer", "red"], "vqa takes no answer"),
        (["CKPT", "--image", "0.png", "--text", "x", "--choices", "a", "b"], "vqa takes no choices"),
        (["CKPT", "--scenes", "--text", "x"], "--text is for --image, and changes nothing here"),
        (["CKPT", "--serve", "--split", "val"], "--split is for --data, --scenes, --search and --embed"),
        (["CKPT", "--scenes", "--prompt", "x"], "--prompt is for --data"),
        (["CKPT", "--scenes", "--to", "onnx"], "--to is for --export"),
        (["CKPT", "--export", "x.bin", "--out", "y.bin"], "--out is for --scenes"),
        (["CKPT", "--embed", "x.npz", "--data", "vqa.jsonl", "--out", "y.npz"], "--out is for --scenes"),
        (["CKPT", "--scenes", "--attention", "x.png", "--out", "y.png"], "--out is for --scenes"),
        (["CKPT", "--scenes", "--beams", "2"], "--beams is for captions"),
        (["CKPT", "--image", "0.png", "--text", "\u200d"], "has no visible character"),
        (["CKPT", "--image", "vqa.jsonl", "--text", "x"], "cannot read picture"),
        (["CKPT", "--image", "0.png", "--text", "x", "--boxes", "[[1,2]]"], "--boxes"),
        (["CKPT", "--image", "0.png", "--text", "x", "--boxes", "[[1,2,3,999]]"], "outside"),
        (["CKPT", "--image", "0.png", "--text", "x", "--boxes", "[[1,2,3,4]]", "--boxes", "[[1,2,3,4]]"], "2 --boxes"),
        (["CKPT", "--data", "none.jsonl"], "no such file"),
        (["CKPT", "--data", "vqa.jsonl", "--split", "val"], "no examples of split val"),
        (["CKPT", "--data", "vqa.jsonl", "--resume"], "--out"),
        (["CKPT", "--data", "bad.jsonl"], "bad.jsonl:1"),
        (["CKPT", "--data", "wide.jsonl"], "features of 5 numbers"),
        (["CKPT", "--export", "x.bin", "--to", "nothing"], "--to"),
        (["CKPT", "--export", "x.bin", "--int8"], "--int8 goes with none of"),
        (["CKPT", "--search", "a star", "--scenes"], "give one of --scenes"),
        (["CKPT", "--export", "x.bin", "--to", "transformers"], "transformers has no uniter"),
        (["CKPT", "--search", ""], "--search is empty"),
        (["CKPT", "--search", " "], "has no visible character"),
        (["CKPT", "--image", "wide.npz", "--text", "x"], "is a feature file; name it in a line"),
        (["CKPT", "--image", "0.png", "--text", "x", "--out", "x.txt"], "--out x.txt: not the name of a picture"),
        (["CKPT", "--scenes", "--attention", "x"], "--attention x: not the name of a picture"),
        (["CKPT", "--data", "vqa.jsonl", "--split", "tset"], "no split tset; there are train, val, test"),
        (["CKPT", "--export", "x.bin", "--top", "7"], "--top is for"),
        (["CKPT", "--export", "x.bin", "--beams", "2"], "--beams is for"),
        (["CKPT", "--export", "x.bin", "--task", "vqa"], "--task is for"),
        (["CKPT", "--export", "x.bin", "--device", "cuda"], "--device is not for --export"),
        (["CKPT", "--embed", "x.npz", "--data", "vqa.jsonl", "--top", "7"], "--top is for"),
        (["CKPT", "--export", "."], "--export .: is a folder"),
        (["CKPT", "--export", ""], "--export is empty"),
        (["CKPT", "--embed", ""], "--embed is empty"),
        (["CKPT", "--data", ""], "--data is empty"),
        (["CKPT", "--scenes", "--attention", ""], "--attention is empty"),
        (["CKPT", "--scenes", "--out", ""], "--out is empty"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(arguments, message, trained, folder, capsys):
    checkpoint = trained("uniter", "vqa")
    own_file(folder, "vqa.jsonl", [{"image": "0.png", "text": "is it?", "answer": "yes"}])
    own_file(folder, "bad.jsonl", [{"image": "0.png", "text": 3}])
    np.savez(folder / "wide.npz", features=np.eye(5), boxes=np.eye(5, 4) + [0, 0, 4, 4], size=np.array([9, 9]))
    own_file(folder, "wide.jsonl", [{"features": "wide.npz", "text": "is it?"}])
    assert use(*[checkpoint if argument == "CKPT" else argument for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and "Traceback" not in error, error


def test_pictures_without_texts_get_captions_and_are_found(trained, folder, capsys):
    """Of an album whose lines hold pictures alone; a line with a text is measured."""
    lines = [{"image": f"{i}.png"} for i in range(3)]
    album = own_file(folder, "album.jsonl", lines)
    caption = trained("uniter", "caption")
    assert use(caption, "--data", album, "--out", "album.out.jsonl") == 0
    assert "3 examples without text, nothing to measure" in capsys.readouterr().out
    written = [json.loads(line) for line in (folder / "album.out.jsonl").read_text().splitlines()]
    assert len(written) == 3 and all("caption" in line and "truth" not in line for line in written)
    own_file(folder, "album.jsonl", [*lines, {"image": "0.png", "text": "a red disc"}])
    assert use(caption, "--data", album, "--out", "album.out.jsonl") == 0
    assert "split train, 1 examples" in capsys.readouterr().out
    own_file(folder, "album.jsonl", lines)
    contrast = trained("uniter", "pretrain", "--objectives", "itc")
    assert use(contrast, "--search", "a red disc", "--data", album, "--top", "2") == 0
    printed = capsys.readouterr().out
    assert re.search(r"\d  [012]\.png  album\.jsonl:\d\n", printed) and "best 2 of 3 pictures, split train" in printed
    assert use(contrast, "--embed", "album.npz", "--data", album) == 0
    assert np.load(folder / "album.npz")["picture_vectors"].shape[0] == 3
    assert use(contrast, "--data", album) == 0
    assert "3 examples without text, nothing to measure" in capsys.readouterr().out
    assert use(trained("uniter", "vqa"), "--data", album) == 2
    assert "key 'text' is missing" in capsys.readouterr().err


def test_only_heads_that_the_task_reads_are_warned_of(capsys):
    run = SimpleNamespace(paper=uniter, objectives={"vqa": 1, "refer": 1}, progress={"random_heads": ["refer"]})
    predict.warn_of_random_heads(run, tasks.VQA, "c.pt")
    assert capsys.readouterr().err == ""
    predict.warn_of_random_heads(run, tasks.REFER, "c.pt")
    assert capsys.readouterr().err == "warning: c.pt: untrained, at random: refer\n"
    run = SimpleNamespace(paper=uniter, objectives={"mlm": 1, "itm": 1}, progress={"random_heads": ["itm", "nlvr2"]})
    predict.warn_of_random_heads(run, tasks.PRETRAIN, "c.pt")
    assert capsys.readouterr().err == "warning: c.pt: untrained, at random: itm\n"


def test_objectives_without_an_answer_for_a_pair_are_refused(trained, folder, capsys):
    contrast = trained("uniter", "pretrain", "--objectives", "itc")
    image = ["--image", "0.png", "--text", "a star"]
    for what in (["--scenes"], image, [*image, "--attention", "a.png"], ["--serve", "0"]):
        assert use(contrast, *what) == 2
        error = capsys.readouterr().err
        assert "trained with itc only, it cannot show answers (mlm and itm can); --search and --embed" in error
    args = SimpleNamespace(out=folder / Path(contrast).parent)
    run = SimpleNamespace(paper=uniter, args=args, objectives={"itc": 1, "mrfr": 1})
    log.print_next_command(run)
    assert f"predict.py {folder / contrast} --search TEXT" in capsys.readouterr().out
    run.objectives = {"mrfr": 1}
    log.print_next_command(run)
    assert capsys.readouterr().out == ""
    for objectives in ({"mlm": 1}, {"itc": 1, "itm": 1}, {"vqa": 1}, {"caption": 1}):
        run.objectives = objectives
        log.print_next_command(run)
        assert "--scenes 4" in capsys.readouterr().out


def test_a_caption_takes_no_number_of_answers(trained, capsys):
    assert use(trained("uniter", "caption"), "--scenes", "1", "--top", "2") == 2
    assert "--top is for answers and pictures" in capsys.readouterr().err


def test_what_is_chosen_from_is_visible():
    for choices, answer in ((["", " "], None), (["a", "\u200b"], None), (["a"], None), (["a", "b"], " ")):
        with pytest.raises(UserError, match="none of them blank|has no visible character"):
            examples.make_example(tasks.TASKS["vcr"], {"text": "what?", "choices": choices, "answer": answer})


def test_a_caption_without_words_is_told():
    assert drawing.describe({"caption": ""}) == "(no words)" and drawing.describe({"caption": "a"}) == "a"


def test_a_caption_takes_no_text():
    with pytest.raises(UserError, match="caption writes the text itself"):
        examples.make_example(tasks.CAPTION, {"text": "red circle"})


def test_lines_without_the_boxes_that_training_had_are_a_warning(trained, folder, capsys):
    checkpoint = trained("uniter", "refer")
    line = {"image": "0.png", "text": "red circle"}
    message = "the model was trained on boxes of things, and is asked about a grid; give boxes"
    for own, warns in ((line, True), ({**line, "boxes": [[0, 0, 40, 40]]}, False)):
        assert use(checkpoint, "--data", own_file(folder, "grid.jsonl", [own])) == 0
        assert (message in capsys.readouterr().err) == warns


@pytest.mark.parametrize("task", ["refer", "nlvr2", "caption", "retrieval"])
def test_only_a_task_with_choices_takes_an_answer(task):
    with pytest.raises(UserError, match=f"{task} takes no answer"):
        examples.make_example(tasks.TASKS[task], {"text": "red circle", "choices": ["x", "y"], "answer": "red"})


@pytest.mark.parametrize("mode", [["--scenes"], ["--data", "vqa.jsonl"]])
def test_data_without_any_example_is_one_line(mode, trained, folder, monkeypatch, capsys):
    own_file(folder, "vqa.jsonl", [{"image": "0.png", "text": "is it?"}])
    checkpoint = trained("uniter", "vqa")
    monkeypatch.setattr(data, "load", lambda *arguments, **options: [])
    assert use(checkpoint, *mode) == 2
    error = capsys.readouterr().err
    assert ": has no examples of split test or " in error and error.count("\n") == 1


def test_too_little_memory_advises_options_that_predict_has(trained, monkeypatch, capsys):
    def fail(args):
        raise MemoryError

    monkeypatch.setattr(predict, "run_mode", fail)
    assert use(trained("uniter", "vqa"), "--scenes") == 2
    advised = re.findall(r"--\w+", capsys.readouterr().err)
    assert advised and set(advised) <= set(predict.build_parser().format_help().replace(",", " ").split())


def test_the_data_sets_of_several_tasks_are_each_their_own(monkeypatch):
    monkeypatch.setattr(data, "find", Path)
    run = SimpleNamespace(args=SimpleNamespace(data="a.jsonl,b.jsonl", tasks=["vqa", "ve"]))
    assert [predict.own_source(run, tasks.TASKS[name]) for name in run.args.tasks] == ["a.jsonl", "b.jsonl"]


def test_a_data_set_knows_which_task_of_the_run_it_is(trained):
    run, _ = predict.load_run(predict.parse([trained("uniter", "vqa"), "--scenes", "--device", "cpu"]))
    run.args.tasks = ["ve", "vqa"]
    dataset, _ = predict.held_out(run, tasks.VQA, "train", 2)
    assert dataset.task_number == 1
    dataset.store.crops = np.zeros(len(dataset.store), int)
    assert examples.use_dataset(run, tasks.VQA, dataset).store.crops is None


def test_held_out_examples_come_from_val_before_train(trained, folder, capsys):
    checkpoint = torch.load(trained("uniter", "vqa"), weights_only=True)
    lines = [{"image": f"{i}.png", "text": "is it red?", "answer": "yes"} for i in range(2)]
    lines[1]["split"] = "val"
    torch.save({**checkpoint, "data": str(own_file(folder, "some.jsonl", lines))}, "some.pt")
    assert use("some.pt", "--scenes", "--out", "sheet.png") == 0
    printed = capsys.readouterr()
    assert printed.out.endswith("1 examples of some, split val\n") and "training examples" not in printed.err


def test_held_out_examples_are_drawn_at_random():
    dataset = type("Dataset", (SimpleNamespace,), {"__len__": lambda self: 100})(kind=["vqa"] * 100)
    taken = predict.varied_examples(dataset, 5).tolist()
    assert len(set(taken)) == 5 and taken != sorted(taken)


def test_each_option_that_changes_predictions_stops_a_resume_alone(trained, small_scenes, tmp_path, capsys):
    checkpoint = trained("uniter", "vqa")
    out = tmp_path / "p.jsonl"
    assert use(checkpoint, "--data", small_scenes(20), "--out", out) == 0
    made = json.loads((tmp_path / "p.result.json").read_text())
    for option in ("prompt", "beams", "int8", "dtype", "task"):
        assert option in made["made_by"]
        changed = {**made, "made_by": {**made["made_by"], option: "other"}}
        (tmp_path / "p.result.json").write_text(json.dumps(changed))
        assert use(checkpoint, "--data", small_scenes(20), "--out", out, "--resume") == 2
        assert f"was made with another {option}" in capsys.readouterr().err


def test_odd_pictures_of_a_file_and_of_the_command_line_are_told(trained, folder, capsys):
    frames = [Image.new("RGB", (20, 20), color) for color in ("red", "blue")]
    frames[0].save(folder / "a.gif", save_all=True, append_images=frames[1:])
    path = own_file(folder, "odd.jsonl", [{"image": "a.gif", "text": "x", "split": "test"}])
    checkpoint = trained("uniter", "vqa")
    for given in (["--data", path], ["--image", "a.gif", "--text", "x"]):
        assert use(checkpoint, *given) == 0
        assert "only the first of its 2 frames is used" in capsys.readouterr().err


def test_a_network_of_other_regions_is_told(trained, small_scenes, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(options, "check_network", lambda source, *_, trains: asked.append((source, trains)))
    assert use(trained("uniter", "vqa"), "--data", small_scenes(20)) == 0
    assert asked == [(str(small_scenes(20)), False)]


def test_a_folder_of_pictures_is_answered_and_searched(trained, folder, tmp_path, capsys):
    """One question for all of them; as lines that name them are answered."""
    photos = tmp_path / "photos"
    (photos / "sub").mkdir(parents=True)
    lines = []
    for i, name in enumerate(("b.png", "sub/a.png")):
        shutil.copy(folder / f"{i}.png", photos / name)
        lines.append({"id": name, "image": f"{i}.png", "text": "what color?", "split": "test"})
    (photos / "c.heic").write_text("not read")
    checkpoint = trained("uniter", "vqa")
    assert use(checkpoint, "--data", photos, "--prompt", "what color?", "--out", "folder.jsonl") == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("split test: 2 examples without answer")
    assert "files that are passed over: 1 .heic" in printed.err and "outside of its folder" not in printed.err
    assert use(checkpoint, "--data", own_file(folder, "same.jsonl", lines), "--out", "lines.jsonl") == 0
    assert (folder / "folder.jsonl").read_text() == (folder / "lines.jsonl").read_text() != ""
    (photos / "p.jsonl").write_text((folder / "folder.jsonl").read_text())  # predictions are no lines of data
    (photos / "broken.jpg").write_bytes((folder / "0.png").read_bytes()[:200])
    for _ in range(2):  # the second time from the cache
        capsys.readouterr()
        assert use(checkpoint, "--data", photos, "--prompt", "what color?", "--out", "folder.jsonl") == 0
        assert f"warning: left out: {photos}: cannot read picture {photos}/broken.jpg" in capsys.readouterr().err
        assert (folder / "folder.jsonl").read_text() == (folder / "lines.jsonl").read_text()
    shutil.copy(folder / "2.png", photos / "broken.jpg")
    assert use(checkpoint, "--data", photos, "--prompt", "what color?", "--out", "folder.jsonl") == 0
    assert "left out" not in capsys.readouterr().err
    (photos / "broken.jpg").unlink()
    assert use(checkpoint, "--data", photos) == 2
    assert "the pictures of a folder have no text; give it with --prompt" in capsys.readouterr().err
    (tmp_path / "bad").mkdir()
    for i in range(30):
        (tmp_path / f"bad/{i}.jpg").write_bytes(b"no picture")
    assert use(checkpoint, "--data", tmp_path / "bad", "--prompt", "what color?") == 2
    assert capsys.readouterr().err.count("cannot read picture") == 1
    shutil.copy(folder / "2.png", tmp_path / "bad")
    assert use(checkpoint, "--data", tmp_path / "bad", "--prompt", "what color?") == 0
    error = capsys.readouterr().err
    assert error.count("cannot read picture") == 20 and "left out: 10 more pictures" in error
    shutil.copy(folder / "2.png", photos / "new.png")
    search = trained("uniter", "pretrain", "--objectives", "itc,mlm")
    assert use(search, "--search", "a star", "--data", photos, "--out", tmp_path / "found.png") == 0
    found = capsys.readouterr().out.splitlines()
    names = sorted(line.split()[1:] for line in found[:3])
    assert names == [["a.png", "sub/a.png"], ["b.png"], ["new.png"]]  # the id too where it says more
    assert use(search, "--search", "a star", "--data", photos, "--out", photos / "new.png") == 2
    assert "would be lost" in capsys.readouterr().err


def test_a_box_at_the_edge_is_a_truth():
    dataset = SimpleNamespace(target=np.array([[0, 0, 0.5, 0.5], [0, 0, 0, 0]]))
    assert predict.has_truth(tasks.REFER, dataset).tolist() == [True, False]


def test_int8_and_bfloat16_exclude_each_other():
    with pytest.raises(UserError, match="--int8 goes with none of"):
        predict.parse(["c.pt", "--scenes", "--int8", "--dtype", "bf16"])


def test_the_same_batch_has_the_same_words_masked(trained):
    run, task = predict.load_run(predict.parse([trained("uniter", "pretrain"), "--scenes", "--device", "cpu"]))
    dataset, _ = predict.held_out(run, task, None, 6)
    found = [[row["masked"] for row in predict.predict(run, task, dataset, np.arange(6), 1)] for _ in range(3)]
    assert found[0] == found[1] == found[2]


def test_data_of_the_training_that_are_gone_are_said_to_be_the_checkpoint_s():
    run = SimpleNamespace(args=SimpleNamespace(data="gone.jsonl", tasks=["vqa"]))
    with pytest.raises(UserError, match="gone.jsonl: no such file.* The checkpoint was trained on it"):
        predict.own_source(run, tasks.VQA)
