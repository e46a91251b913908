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
