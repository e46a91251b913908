"""What must be touched to add an objective, a task, a data set or a model.

Each diff in tests/places/ adds one, as somebody new to the project would. It is applied to a copy of the repository,
must touch no other places than those named, and must train and be tested from the command line.
"""

import json
import shutil
import subprocess

import numpy as np
import pytest
from helpers import ROOT, run_script
from PIL import Image

DIFFS = ROOT / "tests" / "places"


def call(command, folder):
    """Runs a command in a folder. Returns what it printed."""
    done = subprocess.run([str(part) for part in command], check=False, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def run_copy(folder, script, *arguments):
    """A script of a copy of the repository, as a user starts it. Returns what it printed."""
    done = run_script(folder / script, *arguments, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def changes(diff):
    """{file: (lines added, lines removed)} of a diff."""
    found = {}
    for line in call(["git", "apply", "--numstat", diff], ROOT).splitlines():
        added, removed, name = line.split("\t")
        found[name] = int(added), int(removed)
    return found


@pytest.fixture
def copy_with(tmp_path):
    """copy_with(name): the folder of a copy of the repository with the diff `name` applied."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")

    def make(name):
        folder = tmp_path / "copy"
        for file in call(["git", "ls-files"], ROOT).splitlines():
            if file.startswith(("tests/", "docs/")) or not (ROOT / file).is_file():
                continue
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / file, folder / file)
        call(["git", "apply", DIFFS / f"{name}.diff"], folder)
        return folder

    return make


def write_pictures(folder, keys):
    """Twelve pictures of noise with a text each, own.jsonl. keys: number -> further keys of that line."""
    rng = np.random.default_rng(0)
    lines = []
    for number in range(12):
        Image.fromarray(rng.integers(0, 255, (16, 16, 3), np.uint8)).save(folder / f"{number}.png")
        split = ["train", "val", "test"][max(0, number - 6) // 2]
        line = {"image": f"{number}.png", "text": f"picture of kind {number % 3}", "split": split}
        lines.append(json.dumps({**line, **keys(number)}) + "\n")
    (folder / "own.jsonl").write_text("".join(lines))
    return "own.jsonl"


OPTIONS = ["--steps", "2", "--batch-size", "4", "--log-every", "1", "--patch", "4", "--grid", "2"]
OPTIONS += ["--eval-every", "2", "--device", "cpu", "--dtype", "f32"]


def train(folder, *arguments):
    """Trains two steps and tests, as a user would. Returns what was printed."""
    return run_copy(folder, "train.py", *OPTIONS, *arguments)


def read_run(out):
    """(what result.json holds, the steps' lines of log.jsonl) of a run's folder."""
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    steps = [line for line in log if "lr" in line]
    assert [line["step"] for line in steps] == [1, 2]
    return json.loads((out / "result.json").read_text()), steps


def test_an_objective_touches_the_file_of_its_model(copy_with):
    assert set(changes(DIFFS / "objective.diff")) == {"uniter.py"}
    folder = copy_with("objective")
    data = write_pictures(folder, lambda number: {})
    train(folder, "--data", data, "--objectives", "mnce", "--out", "run")
    result, steps = read_run(folder / "run")
    assert all(np.isfinite(line["mnce"]) for line in steps)
    assert np.isfinite(result["mnce_loss"])


def test_a_task_touches_tasks_and_one_line_of_each_model(copy_with):
    models = ["uniter", "vilbert", "lxmert"]
    found = changes(DIFFS / "task.diff")
    assert set(found) == {"tasks.py", "uniter.py", "vilbert.py", "lxmert.py"}
    for model in models:
        assert found[f"{model}.py"] == (1, 0)
    folder = copy_with("task")
    data = write_pictures(folder, lambda number: {"label": number % 2 == 0})
    train(folder, "--model", "all", "--data", data, "--task", "memes", "--out", "run")
    for model in models:
        result, steps = read_run(folder / "run" / model)
        assert all(np.isfinite(line["memes"]) for line in steps)
        assert 0 <= result["accuracy"] <= 1
        assert result["chance"]["accuracy"] == 0.5
    answer = run_copy(folder, "predict.py", "run/uniter/best.pt", "--image", "0.png", "--text", "a joke")
    assert "hateful" in answer and "harmless" in answer


def test_a_data_set_is_one_script(copy_with):
    found = changes(DIFFS / "dataset.diff")
    assert list(found) == ["prepare/tiles.py"]
    assert 30 <= found["prepare/tiles.py"][0] <= 60
    folder = copy_with("dataset")
    train(folder, "--data", "tiles", "--task", "vqa", "--out", "run")
    result, _ = read_run(folder / "run")
    assert result["data"] == "tiles"
    assert {"accuracy", "accuracy_left", "accuracy_right"} <= set(result)
    run_copy(folder, "prepare/tiles.py", "made")  # the script by itself writes the same
    assert (folder / "made" / "tiles.jsonl").read_text().count("\n") == 2 * (64 + 16 + 16)


def test_a_model_is_one_file_and_its_line_in_the_table(copy_with):
    found = changes(DIFFS / "model.diff")
    assert set(found) == {"visualbert.py", "checkpoints.py"}
    assert found["checkpoints.py"] == (2, 0)  # its import, and its line in the table of models
    folder = copy_with("model")
    data = write_pictures(folder, lambda number: {"answer": f"answer {number % 2}"})
    train(folder, "--model", "visualbert", "--data", data, "--out", "run")
    result, steps = read_run(folder / "run")
    assert result["model"] == "visualbert"
    for name in ("mlm", "itm"):
        assert all(np.isfinite(line[name]) for line in steps)
    start = ["--init", "run/checkpoint.pt", "--out", "tuned"]
    printed = train(folder, "--model", "visualbert", "--data", data, "--task", "vqa,caption", "--beams", "2", *start)
    assert "at random 2: heads.vqa (2)" in printed  # the trunk and the head of words are those of pretraining
    result, _ = read_run(folder / "tuned")
    assert 0 <= result["vqa_accuracy"] <= 1
    assert result["caption_perplexity"] > 1
