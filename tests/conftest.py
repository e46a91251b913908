"""Fixtures of several test files. Tests import the files at the top of the repository.

One thread: on tensors this small two threads only wait for each other, fifty times longer where another process holds
the second core.
"""

import json
import sys
import threading
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
torch.set_num_threads(1)


def pytest_configure(config):
    """With -n each process takes tests that follow each other, so that few fixtures are made twice."""
    if getattr(config.option, "dist", "no") == "load":
        config.option.dist = "worksteal"


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def no_pretrained_network(monkeypatch):
    """Own pictures become patches, whatever networks are installed; a test of networks sets its own."""
    from prepare import networks

    monkeypatch.setattr(networks, "best_installed", lambda: None)


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
    from helpers import narrow, with_pool

    import train

    monkeypatch.chdir(folder)

    def run(model, task, *options):
        out = "-".join([model, task, *options])  # other options, another run
        if not (folder / out / "result.json").exists():
            command = ["--model", model, "--task", task, "--data", str(small_scenes(20)), "--out", out]
            command += ["--steps", "6", "--batch-size", "8", "--device", "cpu", "--dtype", "f32"]
            command += ["--limit", "64", "--eval-every", "6"]
            assert train.main(narrow(with_pool([*command, *options], 15))) == 0
        capsys.readouterr()
        return f"{out}/best.pt"

    return run


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """Own data made from drawn scenes: 24 pictures with boxes, a question of two answers each, all three splits."""
    from prepare import scenes

    folder = tmp_path_factory.mktemp("own")
    lines = []
    for i in range(24):
        scene = scenes.make_scene(0, "train", i)
        scenes.draw_scene(scene).save(folder / f"{i}.png")
        boxes = [[t.x - t.half, t.y - t.half, t.x + t.half, t.y + t.half] for t in scene.things]
        answer = "yes" if any(thing.color == "red" for thing in scene.things) else "no"
        split = "train" if i < 16 else "val" if i < 20 else "test"
        line = {"image": f"{i}.png", "boxes": boxes, "text": f"is there a red thing {i % 3}?", "answer": answer}
        lines.append(json.dumps({**line, "split": split}))
    (folder / "own.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "own.jsonl"


@pytest.fixture
def here(tmp_path, monkeypatch):
    """train.py's command line in this process, in a folder of its own: the seconds of a start are saved."""
    from helpers import SMALL, narrow

    import train

    monkeypatch.chdir(tmp_path)

    def start(*arguments, code=0):
        assert train.main(narrow([*SMALL, *arguments])) == code

    return start


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory, small_scenes):
    """checkpoints(task): best.pt of a run of one step on drawn scenes, made on first use."""
    from helpers import narrow

    import train

    folder = tmp_path_factory.mktemp("checkpoints")

    def checkpoint(task):
        out = folder / task
        if not out.exists():
            command = ["--task", task, "--data", str(small_scenes(20)), "--out", str(out), "--steps", "1"]
            command += ["--batch-size", "8", "--device", "cpu", "--dtype", "f32"]
            if task != "vqa":  # the small model's answers to many questions are hard to tell apart
                command = narrow(command)
            assert train.main(command) == 0
        return out / "best.pt"

    return checkpoint


def run_server(checkpoint):
    """A running server of a checkpoint."""
    import predict
    import serve

    args = predict.parse([str(checkpoint), "--serve", "0", "--device", "cpu", "--dtype", "f32"])
    run, row = predict.load_run(args)
    server = serve.Server(0, run, row, 3)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    return server


@pytest.fixture
def start(checkpoints):
    """start(task): a running server of such a checkpoint; it is closed at the end of the test."""
    servers = []

    def server_of(task):
        servers.append(run_server(checkpoints(task)))
        return servers[-1]

    yield server_of
    for server in servers:
        server.shutdown()
        server.close()


@pytest.fixture(scope="module")
def shared(checkpoints):
    """shared(task): a running server like `start`'s, one for all tests of a file: for those that only ask."""
    servers = {}

    def server_of(task):
        if task not in servers:
            servers[task] = run_server(checkpoints(task))
        return servers[task]

    yield server_of
    for server in servers.values():
        server.shutdown()
        server.close()
