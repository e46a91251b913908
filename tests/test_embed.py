"""Tests of embed.py: vectors of texts and pictures, and search, against the model asked one by one."""

import numpy as np
import pytest
import torch
from helpers import use
from PIL import Image

import data
import predict
import tasks
from support import embed

OBJECTIVES = ("--objectives", "itc,mlm")


def loaded(checkpoint, *options):
    """(run, its Datasets of captions) of a checkpoint."""
    args = predict.parse([checkpoint, "--embed", "x.npz", "--device", "cpu", "--dtype", "f32", *options])
    run, task = predict.load_run(args)
    return run, predict.load_lines(run, task, args, tasks.CAPTION)


@torch.inference_mode()
def vectors_one_by_one(run, dataset):
    """The unit vectors of itc, every text and every example's picture alone in a batch: no padding."""
    head = run.model.heads["itc"]
    texts = []
    pictures = []
    for i in range(len(dataset)):
        batch = data.collate(dataset, np.array([i]))
        texts.append(head.text(run.model.encode(batch, regions=False).text, batch.text_mask)[0])
        pictures.append(head.image(run.model.encode(batch, text=False).regions, batch.region_mask)[0])
    return torch.stack(texts), torch.stack(pictures)


@pytest.mark.parametrize("model", ["uniter", "vilbert", "lxmert"])
def test_the_vectors_are_those_of_the_model_asked_one_by_one(model, trained, folder):
    checkpoint = trained(model, "pretrain", *OBJECTIVES)
    run, datasets = loaded(checkpoint, "--split", "val")
    dataset = datasets[0]
    assert use(checkpoint, "--embed", "out.npz", "--split", "val") == 0
    found = np.load(folder / "out.npz")
    texts, pictures = vectors_one_by_one(run, dataset)
    assert found["text_ids"].tolist() == list(dataset.ids)
    torch.testing.assert_close(torch.from_numpy(found["text_vectors"]), texts, atol=1e-5, rtol=0)
    beside = found["picture_vectors"][found["picture_of_text"]]
    torch.testing.assert_close(torch.from_numpy(beside), pictures, atol=1e-5, rtol=0)
    assert len(found["picture_vectors"]) == len(found["picture_ids"]) == len(set(dataset.image.tolist()))
    for row, name in enumerate(found["picture_ids"]):  # the first of the texts that point at it
        assert found["text_ids"][found["picture_of_text"] == row][0] == name
    with torch.inference_mode():
        pooled = run.model.encode(data.collate(dataset, np.arange(3))).pooled
    torch.testing.assert_close(torch.from_numpy(found["pair_vectors"][:3]), pooled, atol=1e-5, rtol=0)
    assert not list(folder.glob("tmp*"))


def test_several_splits_are_one_file_of_vectors_and_are_searched_together(trained, folder, capsys, monkeypatch):
    """Two texts of a picture in one split, another two in the other: against the model asked one by one."""
    checkpoint = trained("uniter", "pretrain", *OBJECTIVES)
    lines = ""
    for i, (picture, split) in enumerate([(2, "val"), (0, "train"), (1, "val"), (0, "train"), (2, "val")]):
        lines += f'{{"image": "{picture}.png", "text": "a star of kind {i}", "split": "{split}"}}\n'
    (folder / "splits.jsonl").write_text(lines)
    run, datasets = loaded(checkpoint, "--data", "splits.jsonl")
    assert [len(dataset) for dataset in datasets] == [2, 3]
    assert use(checkpoint, "--embed", "splits.npz", "--data", "splits.jsonl") == 0
    found = np.load(folder / "splits.npz")
    assert found["text_ids"].tolist() == [f"splits.jsonl:{number}" for number in (2, 4, 1, 3, 5)]
    vectors = [vectors_one_by_one(run, dataset) for dataset in datasets]
    texts = torch.cat([part for part, _ in vectors])
    pictures = torch.cat([part for _, part in vectors])
    torch.testing.assert_close(torch.from_numpy(found["text_vectors"]), texts, atol=1e-5, rtol=0)
    beside = found["picture_vectors"][found["picture_of_text"]]
    torch.testing.assert_close(torch.from_numpy(beside), pictures, atol=1e-5, rtol=0)
    assert (pictures[0] - pictures[2]).abs().max() > 1e-3  # or a wrong picture would do
    pooled = []
    for dataset in datasets:
        for i in range(len(dataset)):
            with torch.inference_mode():
                pooled.append(run.model.encode(data.collate(dataset, np.array([i]))).pooled[0])
    torch.testing.assert_close(torch.from_numpy(found["pair_vectors"]), torch.stack(pooled), atol=1e-5, rtol=0)
    first = {name: pictures[list(found["text_ids"]).index(name)] for name in found["picture_ids"]}
    assert set(first) == {"splits.jsonl:2", "splits.jsonl:1", "splits.jsonl:3"}
    capsys.readouterr()
    assert use(checkpoint, "--search", "a star of kind 3", "--data", "splits.jsonl", "--out", "found.png") == 0
    printed = [line.split()[2] for line in capsys.readouterr().out.splitlines()[:3]]
    assert printed == sorted(first, key=lambda name: -float(first[name] @ texts[1]))
    for name, vector in zip(found["picture_ids"], torch.from_numpy(found["picture_vectors"]), strict=True):
        monkeypatch.setattr(embed, "query_vector", lambda run, text, vector=vector: vector)
        ((_, dataset, example),) = embed.top_pictures(run, datasets, "", 1)
        assert dataset.ids[example] == name  # also of the second split


def test_without_a_contrast_head_the_vectors_are_the_models_own_unimodal_states(trained, folder, capsys):
    """LXMERT's `unimodal` is each modality's encoder alone."""
    checkpoint = trained("lxmert", "vqa")
    assert use(checkpoint, "--embed", "states.npz") == 0
    assert "not of one space" in capsys.readouterr().out
    run, datasets = loaded(checkpoint)
    found = np.load(folder / "states.npz")
    batch = data.collate(datasets[0], np.arange(5))
    with torch.inference_mode():
        text_states, region_states = run.model.unimodal(batch)
    torch.testing.assert_close(torch.from_numpy(found["text_vectors"][:5]), text_states[:, 0], atol=1e-5, rtol=0)
    for i, row in enumerate(found["picture_of_text"][:5]):
        mean = region_states[i][batch.region_mask[i]].mean(0)
        torch.testing.assert_close(torch.from_numpy(found["picture_vectors"][row]), mean, atol=1e-5, rtol=0)


def test_search_finds_what_sorting_all_cosines_finds(trained, folder, capsys):
    checkpoint = trained("uniter", "pretrain", *OBJECTIVES)
    run, datasets = loaded(checkpoint)
    dataset = datasets[0]
    text = dataset.text[7]
    texts, pictures = vectors_one_by_one(run, dataset)
    cosines = (pictures @ texts[7]).numpy()  # of each example's picture
    first = embed.first_texts(dataset)
    expected = first[np.argsort(-cosines[first], kind="stable")[:5]]
    capsys.readouterr()
    assert use(checkpoint, "--search", text, "--top", "5", "--out", "found.png") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines[:5]] == [dataset.ids[i] for i in expected]
    shown = [float(line.split()[0]) for line in lines[:5]]
    np.testing.assert_allclose(shown, cosines[expected], atol=6e-4)
    assert Image.open(folder / "found.png").width > 1000  # three cells beside each other


def test_all_splits_of_a_file_without_a_test_split_are_searched(trained, folder, capsys):
    checkpoint = trained("uniter", "pretrain", *OBJECTIVES)
    lines = ""
    for i in range(3):
        lines += f'{{"image": "{i}.png", "text": "picture {i}", "split": "{("train", "val", "train")[i]}"}}\n'
    (folder / "three.jsonl").write_text(lines)
    assert use(checkpoint, "--search", "a star", "--data", "three.jsonl", "--top", "9", "--out", "found.png") == 0
    printed = capsys.readouterr().out
    assert all(f"picture {i}" in printed for i in range(3)) and "the best 3 of 3 pictures" in printed
    assert use(checkpoint, "--embed", "three.npz", "--data", "three.jsonl") == 0
    found = np.load(folder / "three.npz")
    assert found["text_ids"].tolist() == ["three.jsonl:1", "three.jsonl:3", "three.jsonl:2"]
    assert found["picture_of_text"].tolist() == [0, 1, 2]


def test_a_long_text_that_is_searched_is_drawn_whole(trained, folder, capsys):
    checkpoint = trained("uniter", "pretrain", *OBJECTIVES)
    heights = []
    for words in (1, 101):
        assert use(checkpoint, "--search", "star " * words, "--top", "1", "--out", "long.png") == 0
        heights.append(Image.open(folder / "long.png").height)
    assert heights[1] - heights[0] > 100  # 400 pixels take no hundred words in four lines


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--search", "a star"], "--objectives ...,itc"),
        (["--embed", "out.txt"], "ends in .npz"),
        (["--embed", "out.npz", "--search", "a star"], "give one of"),
        (["--embed", "out.npz", "--data", "none.jsonl"], "none.jsonl"),
    ],
)
def test_mistakes_are_one_line(arguments, message, trained, capsys):
    assert use(trained("uniter", "vqa"), *arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
