"""Fixtures of several test files. Tests import the files at the top of the repository.

One thread: on tensors this small two threads only wait for each other, fifty times longer where another process holds
the second core.
"""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def small_scenes(tmp_path_factory):
    """small_scenes(count): the folder of drawn scenes with `count` pictures in each split, made on first use."""
    from prepare import scenes

    folders = {}

    def folder_of(count):
        if count not in folders:
            folders[count] = tmp_path_factory.mktemp(f"scenes{count}")
            scenes.make(folders[count], dict.fromkeys(scenes.COUNTS, count))
        return folders[count]

    return folder_of


@pytest.fixture(scope="session")
def drawn(small_scenes, tmp_path_factory):
    """drawn(split, task, count): the Dataset of a task on drawn scenes with `count` pictures in each split."""
    import data
    import tasks

    cache = tmp_path_factory.mktemp("cache")
    return lambda split, task, count: data.load(small_scenes(count), tasks.TASKS[task], split, cache=cache)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A folder with pictures; the runs of `trained` are made in it."""
    from prepare import scenes

    folder = tmp_path_factory.mktemp("predict")
    for i in range(3):
        scenes.draw_scene(scenes.make_scene(0, "test", i)).save(folder / f"{i}.png")
    return folder


@pytest.fixture
def trained(folder, small_scenes, monkeypatch, capsys):
    """trained(model, task, *options): best.pt of a run of a few steps, made on first use. The test then runs in `folder`."""
    import train

    monkeypatch.chdir(folder)

    def run(model, task, *options):
        out = f"{model}-{task}-{len(options)}"
        if not (folder / out / "result.json").exists():
            command = ["--model", model, "--task", task, "--data", str(small_scenes(20)), "--out", out]
            command += ["--steps", "6", "--batch-size", "8", "--device", "cpu", "--dtype", "f32", "--pool", "15"]
            assert train.main([*command, "--limit", "64", *options]) == 0
        capsys.readouterr()
        return f"{out}/best.pt"

    return run
