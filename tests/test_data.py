"""data.py and records.py against oracles: plain loops, counting, bad files."""

import dataclasses
import json
import math
import multiprocessing
import os
import re
import shutil
import struct
import subprocess
import sys
import time
import tracemalloc
import zipfile
import zlib
from collections import Counter
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from damage import damage_bytes, damage_json
from helpers import run_script
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))
import common
import data
import tasks
from prepare import networks
from support import options, records, regions

COLORS = ["red", "green", "blue", "yellow", "purple", "orange", "cyan", "pink"]
SHAPES = ["circle", "square", "triangle", "star", "cross", "ring"]
WORDS = [*COLORS, *SHAPES, "small", "large", "left", "right", "above", "below", "one", "two", "three", "and", "a"]
PICTURES = 60


def write_jsonl(path, lines):
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return path


def load(path, task, split, **options):
    return data.load(str(path), tasks.TASKS[task], split, **options)


# ---- a small data set: a store of random regions, captions and questions -----------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a feature store of 60 pictures and pretrain.jsonl: six captions and two questions a picture."""
    folder = tmp_path_factory.mktemp("set")
    rng = np.random.default_rng(0)
    pictures = []
    for i in range(PICTURES):
        n = int(rng.integers(3, 9))
        corner = rng.uniform(0, 0.5, (n, 2))
        pictures.append(
            {
                "features": rng.standard_normal((n, 12)),
                "boxes": np.concatenate([corner, corner + rng.uniform(0.1, 0.5, (n, 2))], 1),
                "object_probs": rng.dirichlet(np.ones(7), n),
                "objects": rng.integers(0, 6, n),
                "object_conf": rng.random(n),
                "attributes": rng.integers(0, 8, n),
                "attribute_conf": rng.random(n),
                "size": (100 + i, 50),
            }
        )
    data.write_store(folder / "regions", pictures)
    lines = []
    for i in range(PICTURES):
        for k in range(8):
            text = " ".join(rng.choice(WORDS, rng.integers(4, 16)).tolist()) + f" {i} {k}"
            line = {"features": f"regions#{i}", "text": text}
            if k >= 6:
                line["answer"] = ["yes", "no", "red", "2"][(i + k) % 4]
            lines.append(line)
    write_jsonl(folder / "pretrain.jsonl", lines)
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def dataset(folder, cache):
    return load(folder / "pretrain.jsonl", "pretrain", "train", cache=cache)


@pytest.fixture(scope="module")
def tokenizer(dataset):
    tokenizer = data.train_tokenizer(dataset.text)
    dataset.encode(tokenizer, 32)
    return tokenizer


# ---- regions and the store ---------------------------------------------------------------------------------------------


def test_region_features_equal_cropping_first():
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (50, 70, 3), dtype=np.uint8))
    boxes = np.array([[0, 0, 70, 50], [5, 6, 65, 42], [10, 3, 46, 39]])
    features = regions.region_features(image, boxes, patch=6).reshape(3, 6, 6, 3)
    for i, box in enumerate(boxes.tolist()):
        crop = image.crop(box).resize((6, 6), Image.Resampling.BICUBIC)
        plain = (np.asarray(crop).astype(np.float32) / 255 - 0.5) / 0.25
        inner = slice(None) if i == 0 else slice(2, -2)  # at a crop's edge the filter cannot see the picture around it
        assert np.abs(features[i] - plain)[inner, inner].max() < 0.02  # one grey level
    assert regions.grid_boxes(60, 30, 3)[[0, 1, 9]].tolist() == [[0, 0, 60, 30], [0, 0, 20, 10], [40, 20, 60, 30]]


def test_a_grid_is_the_whole_picture_and_its_cells_row_by_row():
    cells = [[0, 0, 20, 15], [20, 0, 40, 15], [0, 15, 20, 30], [20, 15, 40, 30]]
    assert regions.grid_boxes(40, 30, 2).tolist() == [[0, 0, 40, 30], *cells]


def test_store_gathers_what_a_plain_loop_reads(dataset):
    store = dataset.store
    images = np.array([5, 0, 5, 59, 31])
    batch = store.gather(images)
    assert batch["region_mask"].shape[1] == max(store.offsets[i + 1] - store.offsets[i] for i in images)
    assert set(batch) == {"region_mask", *data.STORED}
    for row, image in enumerate(images):
        start, stop = store.offsets[image], store.offsets[image + 1]
        count = stop - start
        assert batch["region_mask"][row].sum() == count and batch["region_mask"][row, :count].all()
        for name, values in store.fields.items():
            dtype = batch[name].numpy().dtype
            assert np.array_equal(batch[name][row, :count].numpy(), values[start:stop].astype(dtype))
            assert not batch[name][row, count:].any()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_what_was_read_of_a_store_does_not_stay_in_memory(tmp_path):
    """The resident size of mapped files, after 64 MB of features were read in eight batches of 8 MB."""
    pictures = [{"features": np.full((64, 1024), 0.5), "boxes": np.full((64, 4), 0.5)} for _ in range(512)]
    data.write_store(tmp_path / "s", iter(pictures))
    store = data.FeatureStore(tmp_path / "s")

    def mapped_megabytes():
        status = Path("/proc/self/status").read_text()
        return int(re.search(r"RssFile:\s+(\d+) kB", status)[1]) / 1e3

    store.gather(np.arange(2))  # what the first call needs
    before = mapped_megabytes()
    for start in range(0, 512, 64):
        batch = store.gather(np.arange(start, start + 64))
    assert batch["features"].shape == (64, 64, 1024)
    assert mapped_megabytes() - before < 8


def test_a_store_keeps_what_was_written(tmp_path):
    pictures = [{"features": np.full((n, 3), n / 4), "boxes": np.full((n, 4), 0.5)} for n in (2, 1, 4)]
    data.write_store(tmp_path / "s", iter(pictures))
    store = data.FeatureStore(tmp_path / "s")
    assert store.offsets.tolist() == [0, 2, 3, 7] and store.width == 3 and len(store) == 3
    assert np.load(tmp_path / "s/features.npy")[:, 0].tolist() == [0.5, 0.5, 0.25, 1, 1, 1, 1]
    for features, boxes, message in (
        (np.nan, 0.0, "'features' of picture 0 has NaN"),
        (1e6, 0.0, "'features' of picture 0 .* too large"),  # for float16
        (1.0, 30.0, "'boxes' of picture 0 lie outside 0..1"),  # in pixels
        (1.0, -0.5, "'boxes' of picture 0 lie outside"),
        (1.0, np.nan, "'boxes' of picture 0 has NaN"),
    ):
        with pytest.raises(ValueError, match=message):
            data.write_store(tmp_path / "x", [{"features": np.full((1, 3), features), "boxes": np.full((1, 4), boxes)}])
    ragged = {"features": np.zeros((3, 3)), "boxes": np.zeros((4, 4))}
    with pytest.raises(ValueError, match="'boxes' of picture 0 has 4 rows, 'features' has 3"):
        data.write_store(tmp_path / "x", [ragged])
    with pytest.raises(ValueError, match="'objects' of picture 0 has NaN"):  # which a cast to integers would hide
        data.write_store(tmp_path / "x", [{**pictures[1], "objects": np.array([np.nan])}])


def test_a_damaged_store_is_one_line(tmp_path, folder):
    for name, damage in (("offsets", b""), ("features", b"\x93NUMPY"), ("boxes", b"xx")):
        copy = tmp_path / name
        copy.mkdir()
        for file in (folder / "regions").iterdir():
            (copy / file.name).write_bytes(file.read_bytes())
        (copy / f"{name}.npy").write_bytes(damage)
        with pytest.raises(common.UserError, match="not a feature store"):
            data.FeatureStore(copy)


def test_a_store_that_another_program_wrote(tmp_path):
    """Integers of another type are labels all the same; offsets that are no list of integers are one line."""
    pictures = [{"features": np.zeros((2, 3)), "boxes": np.full((2, 4), 0.5), "objects": np.array([4, 7])}]
    data.write_store(tmp_path / "s", iter(pictures))
    np.save(tmp_path / "s" / "objects.npy", np.array([4, 7], np.int32))
    labels = data.FeatureStore(tmp_path / "s").gather(np.array([0]))["objects"]
    assert labels.dtype == torch.int64 and labels.tolist() == [[4, 7]]
    for offsets in ([0.0, 2.0], [[0, 2]], 2):
        np.save(tmp_path / "s" / "offsets.npy", np.array(offsets))
        with pytest.raises(common.UserError, match="not a feature store, or damaged .*offsets.npy is not"):
            data.FeatureStore(tmp_path / "s")


def test_a_store_with_crops_that_it_lacks_is_one_line(tmp_path):
    pictures = [{"features": np.zeros((1, 3)), "boxes": np.full((1, 4), 0.5), "crops": n} for n in (1, 0, 0)]
    data.write_store(tmp_path / "s", iter(pictures))
    assert data.FeatureStore(tmp_path / "s").crops.tolist() == [1, 0, 0]
    for crops, message in (
        ([1, 0, 1], "crops.npy is not"),
        ([1, 0], "crops.npy is not"),
        ([-1, 0, 0], "crops.npy is not"),
        ([0.5, 0, 0], "crops.npy is not"),
        (["a", "b", "c"], "crops.npy is not"),
    ):
        np.save(tmp_path / "s" / "crops.npy", np.array(crops))
        with pytest.raises(common.UserError, match=message):
            data.FeatureStore(tmp_path / "s")


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("boxes", np.zeros((3, 5)), "boxes.npy is not"),
        ("boxes", np.zeros(3), "boxes.npy is not"),
        ("sizes", np.ones((3, 2), int), "sizes.npy is not"),
        ("sizes", np.ones(2, int), "sizes.npy is not"),
        ("digests", np.ones(3, int), "digests.npy is not"),
        ("objects", np.zeros(2, int), "do not fit"),
        ("offsets", np.array(3), "not a feature store"),
        ("offsets", np.array([-1, 1, 3]), "do not fit"),
        ("features", np.zeros((3, 2, 5)), "features.npy is not"),
        ("features", np.array([["a", "b"]] * 3), "features.npy is not"),
        ("boxes", np.array([["a"] * 4] * 3), "boxes.npy is not"),
    ],
)
def test_a_store_with_an_array_of_another_shape_is_one_line(name, values, message, tmp_path):
    pictures = [{"features": np.zeros((n, 3)), "boxes": np.full((n, 4), 0.5), "size": (9, 8)} for n in (1, 2)]
    data.write_store(tmp_path, iter(pictures))
    assert len(data.FeatureStore(tmp_path)) == 2
    np.save(tmp_path / f"{name}.npy", values)
    with pytest.raises(common.UserError, match=message):
        data.FeatureStore(tmp_path)


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("boxes", np.full((3, 4), 20.0), "boxes lie outside 0..1"),
        ("boxes", np.full((3, 4), np.nan), "boxes lie outside 0..1"),
        ("features", np.full((3, 3), np.nan), "picture 0 has NaN or infinity"),
        ("features", np.array([[0, 0, 0], [0, np.inf, 0], [0, 0, 0]]), "picture 1 has NaN or infinity"),
    ],
)
def test_a_store_of_numbers_that_train_nothing_is_one_line(name, values, message, tmp_path):
    """Of another program: `write_store` refuses them itself."""
    pictures = [{"features": np.zeros((n, 3)), "boxes": np.full((n, 4), 0.5)} for n in (1, 2)]
    data.write_store(tmp_path / "s", iter(pictures))
    path = write_jsonl(tmp_path / "my.jsonl", [{"features": "s#0", "text": "a"}])
    assert len(load(path, "caption", "train", cache=tmp_path / "c")) == 1
    np.save(tmp_path / "s" / f"{name}.npy", values.astype(np.float32))
    with pytest.raises(common.UserError, match=message):
        load(path, "caption", "train", cache=tmp_path / "c")


def load_in_a_process(path, cache):
    load(path, "vqa", "train", cache=cache)


def test_two_processes_may_read_the_same_file_first(tmp_path):
    lines = []
    for i in range(20):
        Image.new("RGB", (9, 9), (i, 0, 0)).save(tmp_path / f"{i}.png")
        lines.append({"image": f"{i}.png", "text": "what?", "answer": "red"})
    path = write_jsonl(tmp_path / "a.jsonl", lines)
    fork = multiprocessing.get_context("fork")
    runs = [fork.Process(target=load_in_a_process, args=(path, tmp_path / "cache")) for _ in range(2)]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
    assert [run.exitcode for run in runs] == [0, 0]
    assert len(load(path, "vqa", "train", cache=tmp_path / "cache")) == 20
    assert sorted(file.name.split("-")[0] for file in (tmp_path / "cache").iterdir()) == ["columns", "regions"]


def test_answers_are_sorted_and_subsets_keep_their_tokens(dataset, tokenizer):
    counts = Counter(a for answer in dataset.answer for a in answer)
    answers = data.answer_list(dataset)
    assert sorted(answers) == sorted(counts)
    assert all((-counts[a], a) < (-counts[b], b) for a, b in pairwise(answers))
    index = np.array([9, 2, 40])
    part = dataset.subset(index)
    assert part.text == [dataset.text[i] for i in index]
    before = part.offsets.tolist(), part.tokens.tolist()
    part.encode(tokenizer, 32)
    assert before == (part.offsets.tolist(), part.tokens.tolist())


def test_a_limit_draws_at_random(dataset, folder):
    """The first N lines of a file are often of one kind. The same N each time."""
    few = load(folder / "pretrain.jsonl", "pretrain", "train", limit=100)
    chosen = [int(name.rsplit(":", 1)[1]) for name in few.ids]
    assert chosen == sorted(chosen) and len(set(chosen)) == 100
    assert chosen != list(range(1, 101)) and 0.35 < np.mean(np.array(chosen) > len(dataset) / 2) < 0.65
    assert len(set(np.diff(chosen).tolist())) > 5  # not evenly spaced
    assert load(folder / "pretrain.jsonl", "pretrain", "train", limit=100).ids == few.ids


# ---- word pieces -------------------------------------------------------------------------------------------------------


def greedy(word, vocab):
    """Longest match first, as in the BERT paper's code."""
    pieces, start = [], 0
    while start < len(word):
        for stop in range(len(word), start, -1):
            piece = ("##" if start else "") + word[start:stop]
            if piece in vocab:
                pieces.append(piece)
                start = stop
                break
        else:
            return ["[UNK]"]
    return pieces


def test_tokenizer_is_greedy_wordpiece_and_deterministic(tmp_path):
    words = ["unaffable", "affable", "unable", "table", "stable", "fable", "tables", "unstable"]
    texts = [" ".join(words[i:] + words[: i // 2]) for i in range(len(words))] * 3
    tokenizer = data.train_tokenizer(texts, vocab_size=60)
    vocab = tokenizer.get_vocab()
    assert [tokenizer.token_to_id(s) for s in data.SPECIALS] == [0, 1, 2, 3, 4]
    assert vocab == data.train_tokenizer(texts, vocab_size=60).get_vocab() and len(vocab) <= 60
    for text in [*words, "Stables, unfable!", "zebra", "aff-able tab"]:
        expected = [piece for w in re.findall(r"\w+|[^\w\s]", text.lower()) for piece in greedy(w, vocab)]
        assert tokenizer.encode(text, add_special_tokens=False).tokens == expected
    lines = [piece for piece, _ in sorted(vocab.items(), key=lambda item: item[1])]
    (tmp_path / "vocab.txt").write_text("\n".join(lines) + "\n")
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_str())
    for name in ("vocab.txt", "tokenizer.json"):
        read = data.read_tokenizer(tmp_path / name)
        assert (
            read.get_vocab() == vocab and read.encode("Unstable TABLES").ids == tokenizer.encode("unstable tables").ids
        )
    (tmp_path / "cased.txt").write_text("\n".join([*lines, "Table"]) + "\n")
    cased = data.read_tokenizer(tmp_path / "cased.txt")
    assert cased.encode("Table").tokens == ["Table"] and cased.encode("table").tokens == greedy("table", vocab)
    (tmp_path / "bad.txt").write_text("\n".join(lines[1:]))
    with pytest.raises(common.UserError, match="bad.txt"):
        data.read_tokenizer(tmp_path / "bad.txt")


# ---- batches -----------------------------------------------------------------------------------------------------------


def test_collate_against_plain_loops(dataset, tokenizer):
    index, answers = np.array([3, 100, 17, 250]), {"yes": 0, "red": 1, "2": 2}
    batch = data.collate(dataset, index, answers=answers)
    for row, i in enumerate(index):
        pieces = tokenizer.encode(dataset.text[i]).tokens[:30]
        ids = [2, *(tokenizer.token_to_id(p) for p in pieces), 3]
        assert batch.text[row].tolist() == ids + [0] * (batch.text.shape[1] - len(ids))
        assert batch.text_mask[row].tolist() == [k < len(ids) for k in range(batch.text.shape[1])]
        assert batch.answers[row].tolist() == [dataset.answer[i].get(a, 0.0) for a in answers]
        assert batch.ids[row] == dataset.ids[i] and batch.matched[row] == 1
    part = data.mask_words(batch, tokenizer, np.random.default_rng(0)).select(torch.tensor([2, 0]))
    assert part.ids == [batch.ids[2], batch.ids[0]] and part.word_index is None
    assert torch.equal(part.features, batch.features[[2, 0]]) and part.to("cpu").answers.shape == (2, 3)
    short = dataset.subset(index).encode(tokenizer, 6)
    assert (np.diff(short.offsets) <= 6).all() and (short.tokens[short.offsets[1:] - 1] == 3).all()


@pytest.mark.parametrize("replace", ["image", "text"])
def test_mismatch_never_keeps_the_picture(dataset, tokenizer, replace):
    rng, index = np.random.default_rng(0), np.arange(len(dataset))
    examples, images = data.sample_mismatches(dataset, index, rng, 0.5, replace)
    same = dataset.image[examples] == images
    assert abs(same.mean() - 0.5) < 4 * 0.5 / len(index) ** 0.5
    kept = examples if replace == "image" else images
    assert np.array_equal(kept, index if replace == "image" else dataset.image)
    batch = data.collate(dataset, examples, images)
    assert np.array_equal(same, batch.matched.numpy() == 1)
    assert batch.pair_index.tolist() == np.flatnonzero(same).tolist()  # what a contrast may take for pairs
    assert batch.pictures.tolist() == images.tolist()
    assert batch.select(torch.arange(2)).pair_index is None
    with pytest.raises(ValueError, match="two pictures"):
        data.sample_mismatches(dataset.subset(np.array([0, 1])), np.array([0, 1]), rng, 1.0)


@pytest.mark.parametrize("replace", ["image", "text"])
def test_a_repeated_caption_is_never_a_false_pair_of_its_own_picture(replace):
    """90 pictures with five captions each, of nine different ones: by chance 45% of the mismatched pairs would be true."""
    rng = np.random.default_rng(0)
    captions = [f"a {color} {shape}" for color in COLORS[:3] for shape in SHAPES[:3]]
    text = [captions[i] for i in rng.integers(0, 9, 450)]
    image = np.repeat(np.arange(90), 5)
    dataset = data.Dataset("", "train", None, image, text, [{}] * 450, ["caption"] * 450, [""] * 450)
    true = set(zip(text, image.tolist(), strict=True))
    mismatched_pairs = 0
    for _ in range(10):
        index = rng.permutation(450)[:64]
        examples, images = data.sample_mismatches(dataset, index, rng, 0.5, replace)
        for example, picture in zip(examples, images.tolist(), strict=True):
            match = image[example] == picture
            assert ((text[example], picture) in true) == match
            mismatched_pairs += 1 - match
    assert abs(mismatched_pairs / 640 - 0.5) < 0.1
    assert dataset.repeated_texts() == 450
    alone = data.Dataset("", "train", None, np.arange(3), ["x", "X", "y"], [{}] * 3, [""] * 3, [""] * 3)
    assert alone.repeated_texts() == 2  # "X" is "x"


def test_pairs_that_no_draw_makes_false_stay_true():
    """Every picture has the same caption: there is no false pair, and the search for one ends."""
    dataset = data.Dataset("", "train", None, np.arange(4), ["a dog"] * 4, [{}] * 4, [""] * 4, [""] * 4)
    examples, images = data.sample_mismatches(dataset, np.arange(4), np.random.default_rng(0), 1.0)
    assert images.tolist() == dataset.image[examples].tolist()


def test_false_sentences_come_from_the_batch(dataset):
    """Where they are of like length. A batch with one picture has none, and takes them from the rest."""
    index = np.flatnonzero(dataset.image < 10)
    examples, images = data.sample_mismatches(dataset, index, np.random.default_rng(0), 1.0, "text")
    assert set(examples) <= set(index) and np.array_equal(images, dataset.image[index])
    assert (dataset.image[examples] != images).all()
    alone = np.flatnonzero(dataset.image == dataset.image[0])
    examples, _ = data.sample_mismatches(dataset, alone, np.random.default_rng(0), 1.0, "text")
    assert (dataset.image[examples] != dataset.image[0]).all()


def test_nothing_is_predicted_in_mismatched_pairs(dataset, tokenizer):
    rng, index = np.random.default_rng(0), np.arange(40)
    examples, images = data.sample_mismatches(dataset, index, rng, 0.5, "text")
    batch = data.collate(dataset, examples, images)
    matched = batch.matched
    batch = data.mask_regions(data.mask_words(batch, tokenizer, rng), rng)
    true, T, N = data.drop_mismatched_labels(batch), batch.text.shape[1], batch.region_mask.shape[1]
    kept = [k for k, i in enumerate(batch.word_index.tolist()) if matched[i // T]]
    assert 0 < len(kept) < len(batch.word_index)
    assert torch.equal(true.word_index, batch.word_index[kept]) and torch.equal(
        true.word_labels, batch.word_labels[kept]
    )
    assert true.region_index.tolist() == [i for i in batch.region_index.tolist() if matched[i // N]]
    assert torch.equal(true.text, batch.text) and torch.equal(true.masked_regions, batch.masked_regions)
    assert data.drop_mismatched_labels(dataclasses.replace(batch, word_index=None)).word_index is None


def test_masked_words_have_berts_rates(dataset, tokenizer):
    batch = data.collate(dataset, np.arange(len(dataset)))
    before = batch.text.clone()
    masked = data.mask_words(batch, tokenizer, np.random.default_rng(0), force_one=False)
    again = data.mask_words(batch, tokenizer, np.random.default_rng(0), force_one=False)
    assert torch.equal(masked.text, again.text) and torch.equal(masked.word_index, again.word_index)
    assert torch.equal(batch.text, before) and batch.word_index is None
    ordinary, m = (before > 4).sum().item(), len(masked.word_index)
    assert torch.equal(masked.word_labels, before.flatten()[masked.word_index]) and (masked.word_labels > 4).all()
    untouched = torch.ones(before.numel(), dtype=torch.bool)
    untouched[masked.word_index] = False
    assert torch.equal(masked.text.flatten()[untouched], before.flatten()[untouched])
    new = masked.text.flatten()[masked.word_index]
    V = tokenizer.get_vocab_size()
    kept = 0.1 + 0.1 / (V - 5)  # a random piece may be the same one
    rates = [(m, ordinary, 0.15), ((new == 4).sum(), m, 0.8), ((new == masked.word_labels).sum(), m, kept)]
    for hits, total, p in rates:
        assert abs(hits / total - p) < 4 * (p * (1 - p) / total) ** 0.5, (hits, total, p)
    random = new[(new != 4) & (new != masked.word_labels)]
    assert (random > 4).all() and len(random.unique()) > 30
    forced = data.mask_words(batch, tokenizer, np.random.default_rng(0), p=0.0)
    T = batch.text.shape[1]
    assert forced.word_index.tolist() == [row * T + 1 for row in range(len(dataset))] and (forced.text[:, 1] == 4).all()
    only = torch.zeros(V, dtype=torch.bool)
    only[tokenizer.token_to_id("red")] = True
    reds = data.mask_words(batch, tokenizer, np.random.default_rng(0), p=1.0, mask=1.0, only=only)
    assert len(reds.word_index) == (before == tokenizer.token_to_id("red")).sum() and (reds.text[before > 4] == 4).any()


def test_masked_regions(dataset, tokenizer):
    batch = data.collate(dataset, np.arange(len(dataset)))
    before = batch.features.clone()
    for zero, random in ((1.0, 0.0), (0.8, 0.1)):
        out = data.mask_regions(batch, np.random.default_rng(0), 0.15, zero, random, force_one=False)
        assert torch.equal(batch.features, before) and torch.equal(out.clean_features, before)
        assert not (out.masked_regions & ~batch.region_mask).any()
        assert torch.equal(out.region_index, out.masked_regions.flatten().nonzero()[:, 0])
        assert torch.equal(out.features[~out.masked_regions], before[~out.masked_regions])
        new, old = out.features[out.masked_regions], before[out.masked_regions]
        m, total = len(new), batch.region_mask.sum().item()
        same = (new == old).all(1).sum()
        for hits, n, p in ((m, total, 0.15), ((new == 0).all(1).sum(), m, zero), (same, m, 1 - zero - random)):
            assert abs(hits / n - p) <= 4 * (p * (1 - p) / n) ** 0.5 + 1e-9
    one = data.mask_regions(batch, np.random.default_rng(0), p=0.0)
    assert (one.masked_regions.sum(1) == 1).all() and not (one.masked_regions & ~batch.region_mask).any()
    assert len(set(one.masked_regions.int().argmax(1).tolist())) > 4  # any region, not always the first
    assert (one.features[one.masked_regions] == 0).all()
    kept = data.mask_regions(batch, np.random.default_rng(0), p=1.0, zero=0.0)  # no row lacks one, so none is forced
    assert torch.equal(kept.masked_regions, batch.region_mask) and torch.equal(kept.features, before)


def test_a_swapped_region_gets_the_feature_of_a_region_as_it_was(dataset, tokenizer):
    """Not of one that was zeroed a line before, nor of padding."""
    batch = data.collate(dataset, np.arange(len(dataset)))
    out = data.mask_regions(batch, np.random.default_rng(0), p=1.0, zero=0.5, random=0.5)
    new = out.features[batch.region_mask]
    zeroed = (new == 0).all(1)
    assert abs(zeroed.float().mean() - 0.5) < 4 * (0.25 / len(new)) ** 0.5
    known = {tuple(row) for row in batch.features[batch.region_mask].tolist()}
    swapped = [tuple(row) for row in new[~zeroed].tolist()]
    assert set(swapped) <= known and len(set(swapped)) > 0.5 * len(known) * (1 - math.exp(-0.5))


@pytest.mark.parametrize("shuffled", [False, True])
def test_batches_cover_everything_once(shuffled):
    lengths = np.random.default_rng(1).integers(5, 60, 1003)

    def cut(**rank):
        return data.batches(lengths, np.random.default_rng(2) if shuffled else None, size=16, **rank)

    whole = cut()
    assert sorted(np.concatenate(whole).tolist()) == list(range(1003))
    for batch in whole:
        assert len(batch) <= 16
    waste = sum(len(b) * lengths[b].max() for b in whole) / lengths.sum()
    assert waste < (1.1 if shuffled else 1.05)
    shards = [cut(rank=r, world=3) for r in range(3)]
    seen = np.concatenate([example for shard in shards for example in shard]).tolist()
    assert sorted(seen) == list(range(1003))


def test_batches_are_sorted_by_the_first_length_then_by_the_next():
    lengths = np.array([[7, 1], [5, 9], [7, 0], [5, 2], [6, 4]])
    assert np.concatenate(data.batches(lengths, size=2)).tolist() == [3, 1, 4, 2, 0]


def test_shuffled_batches_hold_random_examples_and_come_in_random_order():
    alike = np.full(120, 7)
    batches = data.batches(alike, np.random.default_rng(0), size=60)
    assert sorted(batches[0].tolist()) not in (list(range(60)), list(range(60, 120)))
    unlike = np.arange(120)  # fewer than 50 batches: sorted all together
    batches = data.batches(unlike, np.random.default_rng(0), size=4)
    assert all(batch.tolist() == list(range(batch[0], batch[0] + 4)) for batch in batches)
    first = [batch[0] for batch in batches]
    assert first != sorted(first) and sorted(first) == list(range(0, 120, 4))


# ---- own data ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def own(tmp_path):
    """A folder with a picture of 40 x 30 pixels, two feature files, and a writer of my.jsonl."""
    Image.new("L", (40, 30), 9).save(tmp_path / "a.png")
    rng = np.random.default_rng(0)
    boxes = np.array([[0, 0, 20, 30], [5, 5, 39, 29.5]])
    arrays = {"boxes": boxes, "size": np.array([40, 30])}
    np.savez(tmp_path / "f.npz", features=rng.random((2, 7)), **arrays)
    np.savez(tmp_path / "wide.npz", features=rng.random((2, 8)), **arrays)
    np.savez(tmp_path / "nan.npz", features=np.full((2, 7), np.nan), **arrays)
    np.savez(tmp_path / "three.npz", features=rng.random((3, 7)), **arrays)
    np.savez(tmp_path / "unit.npz", features=rng.random((2, 7)), boxes=boxes / 40, size=arrays["size"])
    (tmp_path / "text.png").write_text("no picture")

    def write(*lines):
        path = tmp_path / "my.jsonl"
        path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
        return path

    return write


GOOD = {"image": "a.png", "text": "what?", "answer": " Red "}
F = {"features": "f.npz", "text": "what?", "answer": "red"}
BAD = [
    ("{", "vqa", "not JSON"),
    ("[1]", "vqa", "object"),
    ({**GOOD, "image": "b.png"}, "vqa", "image.*b.png"),
    ({**GOOD, "anwser": "x"}, "vqa", "anwser.*did you mean answer"),
    ({**GOOD, "text": 3}, "vqa", "'text'"),
    ({**GOOD, "text": " "}, "caption", "'text'"),
    ({"image": "a.png", "text": "x"}, "vqa", "'answer' is missing"),
    ({**GOOD, "answer": {"red": "1"}}, "vqa", "'answer'"),
    ({**GOOD, "answer": {"red": 3}}, "ve", "'answer'"),
    (GOOD, "ve", "'answer'.*entailment"),
    ({**GOOD, "label": 0, "choices": ["a", "b"], "reasons": ["a", "b"]}, "vcr", "'reason'"),
    ({**GOOD, "label": 0, "choices": ["a", "b"], "reason": 0}, "vcr", "'reasons' and 'reason' belong together"),
    ({**GOOD, "split": "dev"}, "vqa", "'split'.*dev"),
    ({**GOOD, "boxes": [[0, 0, 9]]}, "vqa", "'boxes'"),
    ({**GOOD, "boxes": [[0, 0, 9, 99]]}, "vqa", "'boxes'.*outside"),
    ({**GOOD, "boxes": [[9, 0, 9, 20]]}, "vqa", "'boxes'.*x2 <= x1"),
    ({**GOOD, "features": "f.npz"}, "vqa", "only one"),
    ({**GOOD, "images": ["a.png"]}, "nlvr2", "'images'"),
    ({**GOOD, "label": 1, "image": "a.png"}, "nlvr2", "two files"),
    ({**GOOD, "label": 2, "choices": ["a", "b"]}, "vcr", "'label'"),
    ({**GOOD, "target": [0, 0, 50, 20]}, "refer", "'target'.*outside"),
    ({**GOOD, "image": "text.png"}, "vqa", "cannot read picture"),
    ({**F, "features": "wide.npz"}, "vqa", "8 wide.*7"),
    ({**F, "features": "nan.npz"}, "vqa", "NaN"),
    ({**F, "features": "three.npz"}, "vqa", "'boxes' has shape"),
    ({**F, "features": "a.png"}, "vqa", "wide"),
]


@pytest.mark.parametrize("line, task, message", BAD, ids=[f"{i}" for i in range(len(BAD))])
def test_bad_lines_are_named_in_one_line(own, cache, line, task, message):
    first = {
        "nlvr2": {**GOOD, "label": True, "images": ["a.png", "a.png"]},
        "vcr": {**GOOD, "label": 0, "choices": ["a", "b"]},
    }
    first |= {"refer": {**GOOD, "target": [0, 0, 40, 30]}, "ve": {**GOOD, "answer": "neutral"}}
    good = dict(first.get(task, F if isinstance(line, dict) and line.get("features") else GOOD))
    if task == "nlvr2":
        del good["image"]
    path = own(good, "", line)
    with pytest.raises(common.UserError, match=message) as error:
        load(path, task, "train", cache=cache)
    assert str(error.value).startswith(f"{path}:3: ") and "\n" not in str(error.value)


def test_own_data_becomes_a_dataset(own, cache, capsys):
    box = [[1, 2, 21, 22]]
    path = own(GOOD, {**GOOD, "boxes": box, "split": "val"}, {**GOOD, "answer": {"Blue": 0.3, "red": 1}})
    train = load(path, "vqa", "train", cache=cache)
    val = load(path, "vqa", "val", cache=cache)
    assert (len(train), len(val), len(load(path, "vqa", "test", cache=cache))) == (2, 1, 0)
    assert list(train.answer) == [{"red": 1.0}, {"blue": 0.3, "red": 1.0}] and list(train.kind) == ["vqa", "vqa"]
    batch = data.collate(val.encode(data.train_tokenizer(val.text)), np.array([0]))
    assert torch.allclose(batch.boxes, torch.tensor([[[1 / 40, 2 / 30, 21 / 40, 22 / 30]]]))
    assert torch.allclose(batch.features, torch.full((1, 1, 432), (9 / 255 - 0.5) / 0.25), atol=1e-3)
    assert batch.object_probs is None and train.store is not val.store and train.store.folder == val.store.folder
    assert "all features are equal" in capsys.readouterr().err
    load(own({**F, "features": "unit.npz"}), "vqa", "train", cache=cache)
    assert "0..1" in capsys.readouterr().err
    with pytest.raises(common.UserError, match="no such file"):
        load("nowhere.jsonl", "vqa", "train", cache=cache)


def test_classes_of_feature_files_leave_background_out(own, tmp_path):
    """With probabilities alone the likeliest class but background; with labels those, and their probabilities."""
    box = [[0, 0, 20, 30], [5, 5, 39, 29]]
    given = {"features": np.eye(2), "boxes": box, "size": [40, 30]}
    probs = np.array([[0.6, 0.1, 0.3], [0.2, 0.5, 0.3]])  # background, class 0, class 1
    np.savez(tmp_path / "probs.npz", **given, probs=probs)
    np.savez(tmp_path / "both.npz", **given, probs=probs, labels=np.array([0, 1]))
    np.savez(tmp_path / "labels.npz", **given, labels=np.array([4, 7]))
    for name, objects, confidence in (
        ("probs", [1, 0], [0.3, 0.5]),
        ("both", [0, 1], [0.1, 0.3]),
        ("labels", [4, 7], [1.0, 1.0]),
    ):
        dataset = load(own({**F, "features": f"{name}.npz"}), "vqa", "train", cache=tmp_path / "c")
        fields = dataset.store.gather(np.array([0]))
        assert fields["objects"][0].tolist() == objects, name
        assert fields["object_conf"][0].tolist() == pytest.approx(confidence, abs=1e-3), name


def test_a_label_of_a_small_integer_type_is_read_as_it_is(own, tmp_path):
    """255, the largest of uint8, whose class stands in column 256 of the probabilities."""
    probs = np.full((2, 300), 0.5 / 299)
    probs[0, 256] = 0.5
    probs[1, 4] = 0.5
    given = {"features": np.eye(2), "boxes": [[0, 0, 20, 30], [5, 5, 39, 29]], "size": [40, 30]}
    np.savez(
        tmp_path / "u8.npz", **given, probs=probs / probs.sum(1, keepdims=True), labels=np.array([255, 3], np.uint8)
    )
    dataset = load(own({**F, "features": "u8.npz"}), "vqa", "train", cache=tmp_path / "c")
    fields = dataset.store.gather(np.array([0]))
    assert fields["objects"][0].tolist() == [255, 3]
    assert fields["object_conf"][0].tolist() == pytest.approx([0.5, 0.5], abs=2e-3)


@pytest.mark.parametrize("size", [None, [40, 30, 3]])
def test_a_feature_file_without_its_size_is_one_line(size, own, tmp_path):
    given = {"features": np.eye(2), "boxes": [[0, 0, 20, 30], [5, 5, 39, 29]]}
    np.savez(tmp_path / "f.npz", **given, **({} if size is None else {"size": size}))
    path = own({"features": "f.npz", "text": "the red one", "target": [0, 0, 20, 30]})
    with pytest.raises(common.UserError, match="my.jsonl:1: 'target': .*f.npz.*size"):
        load(path, "refer", "train", cache=tmp_path / "c")


def test_a_target_outside_its_picture_names_the_picture(own, tmp_path):
    with pytest.raises(common.UserError, match="my.jsonl:1: a.png: 'target': .* is outside its picture"):
        load(own({"image": "a.png", "text": "red", "target": [0, 0, 90, 9]}), "refer", "train", cache=tmp_path / "c")


def run_command(capsys, *arguments):
    """(exit code, stdout, stderr) of `python data.py arguments`."""
    code = data.main([str(argument) for argument in arguments])
    output = capsys.readouterr()
    return code, output.out, output.err


def test_command_line_in_a_process(tmp_path, own):
    path = own({**GOOD, "boxes": [[1, 2, 21, 22]]}, {**GOOD, "split": "val"})
    done = run_script(data.__file__, "preview", path, cwd=tmp_path)
    assert done.returncode == 0 and "preview.png: " in done.stdout, done
    assert Image.open(tmp_path / "preview.png").size > (300, 300)
    done = run_script(data.__file__, "check", "x.jsonl", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("data.py: x.jsonl: no such file")
    assert done.stderr.count("\n") == 1


def test_command_line(own, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path = own({**GOOD, "answer": "b"}, {**GOOD, "split": "val"})
    assert "2 examples (1 train, 1 val), 1 pictures" in run_command(capsys, "check", path)[1]
    for arguments in (("frobnicate",), ("check", path, "--x"), ("check", path, "--patch", "0")):
        code, _, error = run_command(capsys, *arguments)
        assert code == 2 and error.startswith("data.py: ") and error.count("\n") == 1


def test_names_that_the_output_cannot_encode_end_no_command(own, tmp_path):
    path = own(GOOD, GOOD).rename(tmp_path / "\u7530.jsonl")
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, data.__file__, "check", path]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, check=False)
    assert done.returncode == 0 and b"\\u7530.jsonl: 2 examples" in done.stdout, done


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_behind_the_output_ends_no_command(own, tmp_path):
    command = [sys.executable, data.__file__, "check", own(GOOD, GOOD)]
    with open("/dev/full", "w") as full:
        assert subprocess.run(command, cwd=tmp_path, stdout=full, stderr=full, check=False).returncode == 0


# ---- pictures of every kind --------------------------------------------------------------------------------------------


def open_saved(tmp_path, image, name="p.png", **options):
    image.save(tmp_path / name, **options)
    return np.asarray(regions.open_picture("here", tmp_path / name)).astype(int)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_as_their_exif_says(tmp_path, orientation):
    """The oracle turns by Pillow's transpose; a box of the red square holds the red square, and its target too."""
    upright = Image.new("RGB", (40, 24), "blue")
    upright.paste("red", (4, 2, 14, 12))
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Pillow's numbers of the transpositions that undo each
    stored = upright if orientation == 1 else upright.transpose(Image.Transpose(undo[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "photo.png", exif=exif)
    assert np.array_equal(np.asarray(regions.open_picture("here", tmp_path / "photo.png")), np.asarray(upright))
    assert regions.picture_size("here", tmp_path / "photo.png") == (40, 24)
    line = {"image": "photo.png", "text": "the square", "boxes": [[4, 2, 14, 12]], "target": [4, 2, 14, 12]}
    dataset = load(write_jsonl(tmp_path / "a.jsonl", [line]), "refer", "train", patch=2, cache=tmp_path / "c")
    batch = dataset.store.gather(np.array([0]))
    red, green, blue = batch["features"][0, 0].reshape(4, 3).T  # of 4 pixels; the filter sees some of the ground
    assert red.min() > 1.2 and green.max() == -2 and blue.max() < -1.2
    assert np.allclose(dataset.target[0], [4 / 40, 2 / 24, 14 / 40, 12 / 24])
    assert torch.allclose(batch["boxes"][0, 0].double(), torch.tensor(dataset.target[0]))


@pytest.mark.parametrize("dtype, high", [(np.uint16, 65535), (np.uint16, 4095), (np.int32, 10**6), (np.float32, 0.25)])
def test_pixels_of_many_bits_are_scaled_by_their_range(tmp_path, dtype, high):
    values = np.linspace(0, high, 48).reshape(6, 8).astype(dtype)
    pixels = open_saved(tmp_path, Image.fromarray(values), "p.tif")
    expected = np.rint(values.astype(float) / values.max() * 255)
    assert np.abs(pixels - expected[..., None]).max() <= 1 and len(np.unique(pixels)) == 48


def test_whatever_is_transparent_is_white(tmp_path):
    for mode in ("RGBA", "LA"):
        image = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
        image.paste((0, 0, 0, 255), (2, 2, 6, 6))
        pixels = open_saved(tmp_path, image.convert(mode))
        assert (pixels[0, 0] == 255).all() and (pixels[4, 4] == 0).all(), mode
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([0, 0, 0, 0, 0, 0])
    palette.paste(1, (2, 2, 6, 6))
    pixels = open_saved(tmp_path, palette, transparency=0)
    assert (pixels[0, 0] == 255).all() and (pixels[4, 4] == 0).all()
    pixels = open_saved(tmp_path, Image.new("RGB", (4, 4), (1, 2, 3)), transparency=(1, 2, 3))
    assert (pixels == 255).all()
    half = open_saved(tmp_path, Image.new("RGBA", (4, 4), (0, 0, 0, 128)))
    assert abs(half - 127).max() <= 1


def png_of_16_bits(values, transparent=None):
    """The bytes of a PNG: values (H,W) grey or (H,W,3) RGB, one of which may be transparent. Pillow cannot write it."""
    height, width = values.shape[:2]
    content = b"\x89PNG\r\n\x1a\n"
    header = struct.pack(">IIBBBBB", width, height, 16, 0 if values.ndim == 2 else 2, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    chunks = {
        b"IHDR": header,
        b"tRNS": np.array(transparent or 0, ">u2").tobytes(),
        b"IDAT": zlib.compress(rows),
        b"IEND": b"",
    }
    if transparent is None:
        del chunks[b"tRNS"]
    for name, part in chunks.items():
        content += struct.pack(">I", len(part)) + name + part + struct.pack(">I", zlib.crc32(name + part))
    return content


@pytest.mark.parametrize("transparent", [0, 900, 65535])
def test_the_transparent_grey_of_16_bits_is_white_and_no_part_of_the_range(tmp_path, transparent):
    grey = np.array([[100, 355, 610], [transparent] * 3])
    (tmp_path / "p.png").write_bytes(png_of_16_bits(grey, transparent))
    pixels = np.asarray(regions.open_picture("here", tmp_path / "p.png"))
    assert pixels[:, :, 0].tolist() == [[0, 128, 255], [255, 255, 255]]
    (tmp_path / "p.png").write_bytes(png_of_16_bits(np.full((2, 2), transparent), transparent))
    assert (np.asarray(regions.open_picture("here", tmp_path / "p.png")) == 255).all()


def test_a_transparent_colour_of_16_bits_is_refused(tmp_path):
    """Pillow keeps 8 bits of each colour, so that it cannot tell which pixels are meant."""
    colors = np.array([[(1000, 2000, 3000), (1001, 2000, 3000)]])
    for transparent in ((1000, 2000, 3000), (3, 7, 11)):
        (tmp_path / "p.png").write_bytes(png_of_16_bits(colors, transparent))
        with pytest.raises(common.UserError, match="p.png .a transparent colour of 16 bits"):
            regions.open_picture("here", tmp_path / "p.png")


def test_colours_of_16_bits_that_turn_black_are_told(tmp_path, capsys):
    """Of 12 bits in 16 Pillow's 8 keep the upper 4. Full range, and what is black anyway, are as they should be."""
    colors = np.array([[(4095, 2000, 0), (17, 300, 4095)]])
    path = write_jsonl(tmp_path / "p.jsonl", [{"image": "p.png", "text": "x"}])
    for values, dark in ((colors, True), (colors * 16, False), (colors * 0, False)):
        (tmp_path / "p.png").write_bytes(png_of_16_bits(values))
        load(path, "caption", "train", cache=tmp_path / str(values.max()))
        assert ("16 bits and are nearly black in 8" in capsys.readouterr().err) == dark
    (tmp_path / "p.png").write_bytes(png_of_16_bits(colors * 16))
    assert np.asarray(regions.open_picture("here", tmp_path / "p.png"))[0].tolist() == [[255, 125, 0], [1, 18, 255]]


def test_pixels_that_are_no_numbers_are_black_and_no_part_of_the_range(tmp_path):
    values = np.array([[1000, 1000.5, 1001], [np.nan, -np.inf, np.inf]], np.float32)
    pixels = open_saved(tmp_path, Image.fromarray(values), "p.tif")
    assert pixels[:, :, 0].tolist() == [[0, 128, 255], [0, 0, 255]]
    with pytest.raises(common.UserError, match="its pixels are no numbers"):
        open_saved(tmp_path, Image.fromarray(np.full((2, 2), np.nan, np.float32)), "p.tif")


@pytest.mark.parametrize("kind", ["palette of a PNG", "GIF", "WebP", "JPEG 2000", "TIFF"])
def test_transparent_pixels_of_every_format_are_white(tmp_path, kind):
    """Black drawn on transparent black, which without its alpha would be all black. WebP: the first of two frames."""
    image = Image.new("RGBA", (16, 16), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (4, 4, 12, 12))
    if kind == "palette of a PNG":
        palette = Image.new("P", (16, 16), 0)
        palette.putpalette([0, 0, 0, 0, 0, 0, 200, 0, 0])
        palette.paste(1, (4, 4, 12, 12))
        pixels = open_saved(tmp_path, palette, "p.png", transparency=bytes([0, 255, 100]))
    elif kind == "GIF":
        pixels = open_saved(tmp_path, image, "p.gif")
    elif kind == "WebP":
        rest = [Image.new("RGBA", (16, 16), (255, 0, 0, 0))]
        pixels = open_saved(tmp_path, image, "p.webp", lossless=True, save_all=True, append_images=rest)
    elif kind == "JPEG 2000":
        pixels = open_saved(tmp_path, image, "p.jp2")
    else:
        pixels = open_saved(tmp_path, image, "p.tif")
    assert (pixels[0, 0] > 250).all() and (pixels[8, 8] < 5).all()


def test_regions_that_would_fill_the_memory_are_refused(own, tmp_path):
    for sizes in ({"patch": 100_000}, {"grid": 10**6}, {"patch": 2000, "grid": 10}):
        with pytest.raises(common.UserError, match="my.jsonl:1: .* regions of .* fill the memory; take a smaller"):
            load(own(GOOD), "vqa", "train", cache=tmp_path / "c", **sizes)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", [3, 5, 6, 8])
def test_targets_and_boxes_are_those_of_the_picture_as_it_is_shown(tmp_path, suffix, orientation):
    """TIFF's is another matter: Pillow turns it by itself."""
    stored = Image.new("RGB", (40, 20), (0, 200, 0))
    stored.paste((255, 0, 0), (0, 0, 8, 8))
    tag = Image.Exif()
    tag[0x0112] = orientation
    options = {"tiffinfo": {0x0112: orientation}} if suffix == "tif" else {"exif": tag}
    stored.save(tmp_path / f"p.{suffix}", **options)
    width, height = (40, 20) if orientation == 3 else (20, 40)
    left = {3: 32, 5: 0, 6: 12, 8: 0}[orientation]
    top = {3: 12, 5: 0, 6: 0, 8: 32}[orientation]
    box = [left, top, left + 8, top + 8]
    line = {"image": f"p.{suffix}", "text": "red", "boxes": [[0, 0, width, height], box], "target": box}
    dataset = load(write_jsonl(tmp_path / "p.jsonl", [line]), "refer", "train", cache=tmp_path / "c")
    expected = np.array(box) / [width, height, width, height]
    found = dataset.store.gather(np.array([0]))
    assert np.allclose(dataset.target[0], expected) and np.allclose(found["boxes"][0, 1], expected)
    color = found["features"][0, 1].view(-1, 3).mean(0)
    assert color[0] > 1.5 and color[1] < -1.5 and color[2] < -1.5


def test_lab_cmyk_and_black_and_white_pictures_are_read(tmp_path):
    white = open_saved(tmp_path, Image.new("LAB", (4, 4), (255, 128, 128)), "lab.tif")
    assert (white > 250).all()
    assert (open_saved(tmp_path, Image.new("CMYK", (4, 4), (0, 0, 0, 255)), "c.jpg") < 60).all()
    assert (open_saved(tmp_path, Image.new("1", (4, 4), 1)) == 255).all()


def test_of_an_animation_the_first_frame_is_used_and_that_is_said(tmp_path, capsys):
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue", "green")]
    pixels = open_saved(tmp_path, frames[0], "a.gif", save_all=True, append_images=frames[1:])
    assert pixels[0, 0].tolist() == [255, 0, 0]
    path = write_jsonl(tmp_path / "a.jsonl", [{"image": "a.gif", "text": "x"}])
    load(path, "caption", "train", cache=tmp_path / "c")
    assert "first of its 3 frames" in capsys.readouterr().err
    path = write_jsonl(tmp_path / "b.jsonl", [{"image": "a.gif", "text": "x", "split": "test"}])
    assert data.main(["check", str(path)]) == 0  # also where nothing is to train on
    assert "first of its 3 frames" in capsys.readouterr().err


def test_a_huge_picture_is_told_to_be_resized(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(common.UserError, match="more than 20 pixels; resize it"):
        open_saved(tmp_path, Image.new("L", (9, 9)))


@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "bmp", "tif", "webp", "npz"])
def test_damaged_pictures_and_features_are_one_line(tmp_path, suffix):
    """Bytes are changed, cut away and put in at random; each file is read or named in one line."""
    rng = np.random.default_rng(0)
    good = tmp_path / f"good.{suffix}"
    if suffix == "npz":
        boxes = np.array([[0, 0, 9, 9]] * 4)
        np.savez_compressed(good, features=rng.random((4, 5)), boxes=boxes, size=np.array([9, 9]), other=np.zeros(9))
    else:
        Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8)).save(good)
    content = good.read_bytes()
    failed = 0
    for _ in range(60):
        damaged = bytearray(content)
        for _ in range(int(rng.integers(1, 6))):
            damaged[int(rng.integers(len(damaged)))] = int(rng.integers(256))
        if rng.random() < 0.3:
            damaged = damaged[: int(rng.integers(len(damaged)))]
        bad = tmp_path / f"bad.{suffix}"
        bad.write_bytes(damaged)
        found, _, mistake = regions.picture_regions(regions.PictureJob("here", bad, None, 2, 1))
        assert (found is None) == (mistake is not None)
        if found is None:
            failed += 1
            assert mistake.startswith("here: ") and "\n" not in mistake
        else:
            assert np.isfinite(found["features"]).all() and 0 <= found["boxes"].min() <= found["boxes"].max() <= 1
    assert failed > 5


def test_only_the_arrays_that_are_needed_are_read_and_no_header_is_believed(tmp_path):
    """A small file may claim to hold 8 GB, in an array that nobody needs or in its header."""
    arrays = {"features": np.ones((2, 3)), "boxes": np.array([[0, 0, 1, 1]] * 2), "size": np.array([4, 4])}
    np.savez_compressed(tmp_path / "a.npz", **arrays, huge=np.zeros(30_000_000, np.uint8))
    tracemalloc.start()
    data_of_file, _ = regions.read_features("here", tmp_path / "a.npz")
    assert tracemalloc.get_traced_memory()[1] < 5e6 and data_of_file["features"].shape == (2, 3)
    tracemalloc.stop()
    header = b"\x93NUMPY\x01\x00v\x00{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000, 1)}"
    with zipfile.ZipFile(tmp_path / "b.npz", "w") as archive:
        archive.writestr("features.npy", header.ljust(127) + b"\n")
    with pytest.raises(common.UserError, match="does not fit its content"):
        regions.read_features("here", tmp_path / "b.npz")


# ---- damaged at random -------------------------------------------------------------------------------------------------


def damaged_lines(rng, folder):
    good = {
        "image": "a.png",
        "text": "caf\u00e9?",
        "boxes": [[0, 0, 20, 30]],
        "target": [1, 1, 9, 9],
        "answer": {"a": 0.5},
    }
    line = json.dumps(good, ensure_ascii=False).encode()
    line = damage_json(rng, good) if rng.random() < 0.6 else damage_bytes(rng, line)
    (folder / "m.jsonl").write_bytes(line)


def damaged_features(rng, folder):
    arrays = {
        "features": rng.random((2, 7)),
        "boxes": np.array([[0, 0, 20, 30], [5, 5, 39, 29.5]]),
        "size": np.array([40, 30]),
    }
    values = arrays[list(arrays)[rng.integers(3)]].astype(float)
    values.flat[rng.integers(values.size)] = [np.nan, np.inf, -3, 70000, 0, 41.5, 1e300][rng.integers(7)]
    if rng.random() < 0.6:
        arrays[{14: "features", 8: "boxes", 2: "size"}[values.size]] = values
    np.savez(folder / "m.npz", **arrays)
    if rng.random() < 0.5:
        (folder / "m.npz").write_bytes(damage_bytes(rng, (folder / "m.npz").read_bytes()))
    write_jsonl(folder / "m.jsonl", [{"features": "m.npz", "text": "x", "target": [1, 1, 9, 9]}])


def damaged_picture(rng, folder):
    name = "m." + ["png", "jpg", "gif", "bmp", "tif", "webp", "ppm", "ico", "tga", "jp2"][rng.integers(10)]
    pixels = rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / name)
    (folder / name).write_bytes(damage_bytes(rng, (folder / name).read_bytes()))
    write_jsonl(folder / "m.jsonl", [{"image": name, "text": "x", "target": [0, 0, 9, 9]}])


@pytest.mark.parametrize("damaged, count", [(damaged_lines, 35), (damaged_features, 30), (damaged_picture, 40)])
def test_what_is_damaged_at_random_is_read_right_or_refused_in_one_line(own, tmp_path, damaged, count):
    """Nothing is taken silently that is no UTF-8, not finite, or outside its picture."""
    own()
    rng = np.random.default_rng(5)
    refused = 0
    for number in range(count):
        damaged(rng, tmp_path)
        try:
            dataset = load(tmp_path / "m.jsonl", "refer", "train", cache=tmp_path / f"c{number}", grid=2, patch=3)
        except common.UserError as error:
            refused += 1
            assert "m." in str(error) and "\n" not in str(error)
            continue
        if len(dataset) == 0:
            continue  # of another split
        found = dataset.store.gather(dataset.image)
        width, height = dataset.store.sizes[dataset.image[0]]
        assert torch.isfinite(found["features"]).all()
        assert ((found["boxes"] >= 0) & (found["boxes"] <= 1)).all()
        assert (found["boxes"][..., :2] < found["boxes"][..., 2:]).all()
        record = json.loads((tmp_path / "m.jsonl").read_bytes().decode("utf-8"))
        target = np.array(record["target"]).clip(0, [width, height, width, height])
        assert np.allclose(dataset.target[0], target / [width, height, width, height])
        assert list(dataset.text) == [record["text"]]
    assert 5 < refused < count


@pytest.mark.parametrize("name", ["vocab.txt", "tokenizer.json"])
def test_a_vocabulary_that_is_damaged_at_random_is_read_right_or_refused(tmp_path, name):
    rng = np.random.default_rng(1)
    pieces = [*data.SPECIALS, *"abcdef", *(f"##{letter}" for letter in "abcdef"), "caf\u00e9", "\u7530"]
    good = "\n".join(pieces).encode()
    if name == "tokenizer.json":
        good = data.tokenizer_from_vocab("\n".join(pieces)).to_str().encode()
    refused = 0
    for _ in range(20):
        content = damage_bytes(rng, good)
        if name == "tokenizer.json" and rng.random() < 0.5:
            content = damage_json(rng, json.loads(good))
        (tmp_path / name).write_bytes(content)
        try:
            tokenizer = data.read_tokenizer(tmp_path / name)
        except common.UserError as error:
            refused += 1
            assert name in str(error) and "\n" not in str(error)
            continue
        tokens, _, offsets, _ = data.encode_texts(tokenizer, ["a caf\u00e9", "\u7530 ?"], 9)
        assert tokens.max() < tokenizer.get_vocab_size() and np.diff(offsets).min() > 2
        if name == "vocab.txt":
            lines = content.decode().removesuffix("\n").split("\n")
            assert tokenizer.get_vocab_size() == len(lines)
            for number, line in enumerate(lines):
                piece = line.removesuffix("\r")
                if piece and piece not in [other.removesuffix("\r") for other in lines[number + 1 :]]:
                    assert tokenizer.token_to_id(piece) == number
    assert 3 < refused < 20


def test_a_dataset_json_that_is_damaged_at_random_is_read_right_or_refused(own, tmp_path):
    """What is taken stands in the file as it is, and the options' defaults are in their ranges."""
    own(GOOD, {**GOOD, "split": "hard"})
    good = {"name": "mine", "files": {"vqa": "my.jsonl"}, "extra_splits": ["hard"], "content_words": ["red"]}
    good |= {"regions": {"kind": "x"}, "defaults": {"steps": 2, "mask": 0.2, "batch_size": 4}}
    rng = np.random.default_rng(3)
    refused = 0
    for _ in range(20):
        content = damage_json(rng, good)
        if rng.random() < 0.4:
            content = damage_bytes(rng, json.dumps(good).encode())
        (tmp_path / "dataset.json").write_bytes(content)
        try:
            path, description = options.open_data(str(tmp_path))
            defaults = options.read_defaults(path, description)
            count = len(load(tmp_path, "vqa", "train", cache=tmp_path / "c"))
        except common.UserError as error:
            refused += 1
            assert str(tmp_path) in str(error) and "\n" not in str(error)
            continue
        written = json.loads(content)
        assert count == 1 and all(description[key] == value for key, value in written.items())
        assert set(defaults) == set(written.get("defaults", {}))
        assert defaults.get("steps", 0) >= 0 and 0 <= defaults.get("mask", 0) <= 1 and defaults.get("batch_size", 1) > 0
    assert 3 < refused < 20


# ---- lines that are wrong ----------------------------------------------------------------------------------------------

DEEP = b'{"image": "a.png", "text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
BAD_BYTES = [
    ('{"image": "a.png", "text": "caf\xe9"}'.encode("latin-1"), "not UTF-8"),
    ('{"image": "a.png", "text": "\u4f60\u597d"}'.encode("gbk"), "not UTF-8"),
    ('{"image": "a.png", "text": "x"}'.encode("utf-16"), "UTF-16"),
    ('{"image": "a.png", "text": "x"}'.encode("utf-16-le"), "UTF-16"),
    (b'{"image": "a.png", "text": "x", "text": "y"}', "'text' stands twice"),
    (b'{"image": "a.png", "text": "x", "answer": {"a": 1, "a": 0}}', "'a' stands twice"),
    (rb'{"image": "a.png", "text": "\ud83d"}', "half a character"),
    (DEEP, "nested too deeply"),
    (b'{"image": "a.png", "text": "x", "boxes": [[0, 0, 9, ' + b"9" * 400 + b"]]}", "'boxes'"),
    (b'{"image": "a.png", "text": "x", "boxes": [[0, 0, 9, ' + b"9" * 5000 + b"]]}", "not JSON"),
    (b'{"image": "a.png", "text": "x", "boxes": [[0, 0, 9, NaN]]}', "'boxes'"),
    (b'{"image": "a.png", "text": "x", "boxes": [[40, 0, 40.9, 9]]}', "no area inside"),
    (b'{"image": "a.png", "question": "x"}', "'question'; did you mean text"),
    (b'{"image": "a.png", "caption": "x"}', "'caption'; did you mean text"),
    (b'{"file_name": "a.png", "text": "x"}', "did you mean image"),
    (b'{"image": "a.png", "text": "x", "bbox": [0, 0, 9, 9]}', "did you mean target"),
    (b'{"image": "a.png", "text": "x\\u0000y"}', "'text'"),
    (b'{"features": "nowhere#3", "text": "x"}', "not a feature store"),
    ('{"image": "a.png", "text": "\u200b\ufeff \u00ad"}'.encode(), "'text'.*not empty"),
    (b'{"image": "a.png", "text": "x", "answer": "\\u00ad"}', "'answer'"),
    (b'{"image": "a.png", "text": "x", "id": 1, "question_id": 2}', "has an id already"),
    (b'{"image": "a.png", "text": "x", "boxes": [[false, false, true, true]]}', "'boxes'"),
    (b'{"image": "a.png", "text": "x", "answer": {"red": NaN}}', "'answer'"),
    (b'{"image": "a.png", "text": "x", "id": 1.5}', "'id'"),
    (b'{"image": "a.png", "text": "' + b"x" * records.LINE_BYTES + b'"}', "more than 1,048,576 bytes"),
]


@pytest.mark.parametrize("line, message", BAD_BYTES, ids=[f"{i}" for i in range(len(BAD_BYTES))])
def test_bad_bytes_are_named_with_their_line(own, tmp_path, line, message):
    path = own(GOOD, GOOD)
    path.write_bytes(path.read_bytes() + b"\n" + line + b"\n")
    with pytest.raises(common.UserError, match=message) as error:
        load(path, "pretrain", "train", cache=tmp_path / "c")
    assert str(error.value).startswith(f"{path}:3: ") and "\n" not in str(error.value)


def test_check_lists_the_first_twenty_mistakes_and_counts_all(own, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    lines = [
        GOOD,
        "{",
        {**GOOD, "image": "b.png"},
        {**GOOD, "boxes": [[0, 0, 9, 99]]},
        {"image": "text.png", "text": "x"},
    ]
    path = own(*lines)
    code, _, error = run_command(capsys, "check", path)
    assert code == 2
    for number, message in ((2, "not JSON"), (3, "no file"), (4, "outside its picture"), (5, "cannot read picture")):
        assert any(line.startswith(f"{path}:{number}: ") and message in line for line in error.splitlines()), number
    assert "mistakes: 4; listed above: 4" in error and error.count("\n") == 5
    path = own(*[{**GOOD, f"x{i}": 1} for i in range(33)])
    code, _, error = run_command(capsys, "check", path)
    assert "mistakes: 33; listed above: 20" in error and error.count("\n") == 21
    hint = r"my.jsonl:1: unknown key 'x0'.*mistakes in all: 33; `python data.py check .*my.jsonl --task vqa` lists them"
    with pytest.raises(common.UserError, match=hint):
        load(path, "vqa", "train", cache=tmp_path / "c")
    asked = dataclasses.replace(tasks.VQA, prompt="is it?")  # which that command cannot know
    with pytest.raises(common.UserError, match=r"mistakes in all: 33\)"):
        data.load(path, asked, "train", cache=tmp_path / "c")


def test_equal_mistakes_are_one_line_that_names_the_cause(own, tmp_path, monkeypatch, capsys):
    """A CSV file, a list of objects over several lines, a comma after each object, one object over several lines."""
    monkeypatch.chdir(tmp_path)
    object_lines = [json.dumps(GOOD) + "," for _ in range(3)]
    for lines, first, hint in (
        (["image,text", "a.png,x", "b.png,y"], 1, "a command that converts CSV (the same in 2 more)"),
        (object_lines, 1, "leave out the comma at its end: a file of lines is no list (the same in 2 more)"),
        (["[", *object_lines, "]"], 1, "no list around them"),
        (["{", '"image": "a.png"', "}"], 1, "without line breaks in it"),
    ):
        code, _, error = run_command(capsys, "check", own(*lines))
        assert code == 2 and error.startswith(f"{tmp_path}/my.jsonl:{first}: not JSON") and hint in error.split("\n")[0]
        assert error.splitlines()[-1].startswith(f"data.py: {tmp_path}/my.jsonl: mistakes: {len(lines)}; ")
    missing = {key: value for key, value in GOOD.items() if key != "text"}
    with pytest.raises(common.UserError, match=r"my.jsonl:2: key 'text' is missing.* \(the same in 1 more\)$"):
        load(own(GOOD, missing, missing), "pretrain", "train", cache=tmp_path / "c")


def test_check_lists_every_wrong_picture_where_the_lines_are_right(own, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    lines = []
    for i in range(23):
        Path(f"{i}.png").write_text("no picture")
        lines.append({"image": f"{i}.png", "text": "x"})
    code, _, error = run_command(capsys, "check", own({"image": "a.png", "text": "x"}, *lines))
    assert code == 2 and "mistakes: 23; listed above: 20" in error
    assert [line.split(": ")[0] for line in error.splitlines()[:20]] == [
        f"{tmp_path}/my.jsonl:{i}" for i in range(2, 22)
    ]
    boxes = {"image": "a.png", "text": "x", "boxes": [[0, 0, 99, 9]]}
    _, _, error = run_command(capsys, "check", own(boxes, boxes, boxes))
    assert "my.jsonl:1: 'boxes'" in error and "the same in 2 more places" in error


@pytest.mark.parametrize("key", ["question_id", "questionId", "ID", "sent_id", "annotation_id"])
def test_what_other_data_sets_call_an_id_is_one(own, tmp_path, key):
    assert list(load(own({**GOOD, key: 17}), "vqa", "train", cache=tmp_path / "c").ids) == ["17"]


def test_texts_of_all_scripts_and_line_ends_are_read_as_they_are(own, tmp_path, capsys):
    """A byte order mark, Windows' line ends, right to left, characters of several code points and in escapes."""
    texts = [
        "\u0645\u0627 \u0647\u0630\u0627\u061f",
        "\U0001f468\u200d\U0001f469 \u0939\u093f\u0902",
        "a\u2028b\u0085c",
        "\U0001f600",
    ]
    lines = [json.dumps({"image": "a.png", "text": text}, ensure_ascii=text == texts[-1]) for text in texts]
    path = own()
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join([lines[0], "", *lines[1:], ""]).encode())
    assert list(load(path, "caption", "train", cache=tmp_path / "c").text) == texts
    assert "U+FFFD" not in capsys.readouterr().err
    own({"image": "a.png", "text": "caf\ufffd"})
    load(path, "caption", "train", cache=tmp_path / "c")
    assert "U+FFFD stands 1 times for a character" in capsys.readouterr().err


def test_equal_answers_are_merged_and_ids_are_kept(own, tmp_path):
    soft = {"Yes.": 0.3, "yes": 0.3, " caf\u00e9": 0.5, "cafe\u0301": 0.4, "no": 1}
    path = own(
        {**GOOD, "answer": soft, "question_id": 17}, {**GOOD, "id": "b", "text": "cafe\u0301"}, {**GOOD, "answer": "."}
    )
    dataset = load(path, "vqa", "train", cache=tmp_path / "c")
    assert list(dataset.ids) == ["17", "b", "my.jsonl:3"]
    assert dataset.answer[0] == pytest.approx({"yes": 0.6, "caf\u00e9": 0.9, "no": 1.0})
    assert dataset.text[1] == "caf\u00e9" and dataset.answer[2] == {".": 1.0}


def test_two_runs_that_see_stale_columns_at_once_do_not_remove_each_others(own, tmp_path, monkeypatch):
    """The second run makes them anew between the first one's look at them and its removal."""
    path = own(GOOD)
    cache = tmp_path / "c"
    load(path, "caption", "train", cache=cache)
    os.utime(tmp_path / "a.png", ns=(0, 10**18))
    real = records.is_current
    others = []

    def slow(folder):
        current = real(folder)
        if not others:
            others.append(None)
            others[0] = load(path, "caption", "train", cache=cache)
            others.append((others[0].folder / "text.npy").stat().st_ino)
        return current

    monkeypatch.setattr(records, "is_current", slow)
    dataset = load(path, "caption", "train", cache=cache)
    assert others[0].folder == dataset.folder and (dataset.folder / "text.npy").stat().st_ino == others[1]
    assert list(dataset.text) == [GOOD["text"]] and not list(cache.glob(".making-*"))


def test_a_run_that_finds_stale_columns_half_removed_makes_them(own, tmp_path, monkeypatch):
    """Another run removes them first."""
    path = own(GOOD)
    load(path, "caption", "train", cache=tmp_path / "c")

    def removed_meanwhile(folder):
        shutil.rmtree(folder)
        return False

    monkeypatch.setattr(records, "is_current", removed_meanwhile)
    assert list(load(path, "caption", "train", cache=tmp_path / "c").text) == [GOOD["text"]]


def first_pixel(path, cache):
    dataset = load(path, "caption", "train", cache=cache)
    return dataset.store.gather(dataset.image)["features"][0, 0, :3].tolist()


def test_a_link_that_leads_to_another_picture_is_noticed(tmp_path):
    """A link to the file, and one to its folder; both targets stay as they are."""
    for version, color in (("v1", "red"), ("v2", "blue")):
        (tmp_path / version).mkdir()
        Image.new("RGB", (9, 9), color).save(tmp_path / version / "p.png")
    for name, target in (("images", "v{}"), ("p.png", "v{}/p.png")):
        link = tmp_path / name
        line = {"image": "images/p.png" if name == "images" else name, "text": "a"}
        path = write_jsonl(tmp_path / f"{name}.jsonl", [line])
        link.symlink_to(target.format(1))
        before = first_pixel(path, tmp_path / "c")
        link.unlink()
        link.symlink_to(target.format(2))
        after = first_pixel(path, tmp_path / "c")
        assert before[0] > 0 > before[2] and after[2] > 0 > after[0], name


def test_a_way_up_behind_a_linked_folder_leads_to_the_picture(tmp_path):
    """`..` of a link's target, as prepare scripts write it, beside another picture where the link itself lies."""
    for folder, color in (("disk/in", "red"), ("home/in", "blue")):
        (tmp_path / folder).mkdir(parents=True)
        Image.new("RGB", (9, 9), color).save(tmp_path / folder / "0.png")
    (tmp_path / "disk/out").mkdir()
    (tmp_path / "home/out").symlink_to("../disk/out")
    path = write_jsonl(tmp_path / "home/out/my.jsonl", [{"image": "../in/0.png", "text": "a"}])
    for _ in range(2):
        dataset = load(path, "caption", "train", cache=tmp_path / "c")
        assert Image.open(records.picture_file(dataset, 0)).getpixel((0, 0)) == (255, 0, 0)
        inode = (dataset.folder / "text.npy").stat().st_ino
        assert inode == (load(path, "caption", "train", cache=tmp_path / "c").folder / "text.npy").stat().st_ino


def test_a_picture_that_changes_while_others_are_read_is_read_again(tmp_path, monkeypatch):
    for name in "ab":
        Image.new("RGB", (9, 9), "red").save(tmp_path / f"{name}.png")
    path = write_jsonl(tmp_path / "my.jsonl", [{"image": f"{name}.png", "text": name} for name in "ab"])
    real = records.parallel

    def mended_meanwhile(work, jobs, label):
        for number, job in enumerate(jobs):
            yield work(job)
            if number == 0:
                Image.new("RGB", (9, 9), "blue").save(tmp_path / "a.png")
                os.utime(tmp_path / "a.png", ns=(0, 10**18))

    monkeypatch.setattr(records, "parallel", mended_meanwhile)
    first_pixel(path, tmp_path / "c")
    monkeypatch.setattr(records, "parallel", real)
    pixel = first_pixel(path, tmp_path / "c")
    assert pixel[2] > 0 > pixel[0]


def test_sizes_that_change_move_the_targets(tmp_path):
    pictures = [{"features": np.zeros((1, 3)), "boxes": np.array([[0, 0, 1, 1.0]]), "size": (200, 100)}]
    data.write_store(tmp_path / "s", iter(pictures))
    path = write_jsonl(tmp_path / "my.jsonl", [{"features": "s#0", "text": "a", "target": [0, 0, 100, 100]}])
    assert load(path, "refer", "train", cache=tmp_path / "c").target[0].tolist() == [0, 0, 0.5, 1]
    np.save(tmp_path / "s" / "sizes.npy", np.array([[400, 200]]))
    assert load(path, "refer", "train", cache=tmp_path / "c").target[0].tolist() == [0, 0, 0.25, 0.5]


def test_a_cache_that_is_emptied_during_a_run_heals(own, tmp_path):
    """The word pieces of the first run find no folder; a folder with them alone would count as the columns for ever."""
    path = own(GOOD)
    dataset = load(path, "caption", "train", cache=tmp_path / "c")
    shutil.rmtree(tmp_path / "c")
    dataset.encode(data.train_tokenizer(["what"]))
    assert len(dataset.tokens) > 0 and not (tmp_path / "c").exists()
    (dataset.folder / "tokens-of-before").mkdir(parents=True)
    assert list(load(path, "caption", "train", cache=tmp_path / "c").text) == [GOOD["text"]]


def test_a_killed_process_among_those_that_read_pictures_is_one_line(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    with pytest.raises(common.UserError, match="reading: one of 2 processes was killed"):
        list(regions.parallel(os._exit, [1, 1, 1], "reading"))


def test_names_of_splits_are_no_paths(own, tmp_path):
    own({**GOOD, "split": "../../evil"})
    for name in ("../../evil", "a/b", "", " "):
        (tmp_path / "dataset.json").write_text(json.dumps({"file": "my.jsonl", "extra_splits": [name]}))
        with pytest.raises(common.UserError, match="'extra_splits' is .*; write a list of further splits"):
            load(tmp_path, "caption", "train", cache=tmp_path / "c")


def test_check_repeats_its_warnings_and_compares_val_with_test(tmp_path, capsys):
    for name, color in (("a", "red"), ("b", "blue")):
        Image.new("RGB", (9, 9), color).save(tmp_path / f"{name}.png")
    lines = [{"image": "a.png", "text": "what?", "answer": "caf\ufffd", "split": "train"}]
    lines += [{"image": "b.png", "text": "what?", "answer": "red", "split": split} for split in ("val", "test")]
    path = write_jsonl(tmp_path / "my.jsonl", lines)
    for _ in range(2):  # the second time from the cache
        assert data.main(["check", str(path), "--task", "vqa"]) == 0
        captured = capsys.readouterr()
        assert captured.err.count("U+FFFD stands 1 times") == 1
        assert "warning: 1 of the 1 pictures of test are in val too" in captured.out
        assert "in train too" not in captured.out


def test_splits_with_features_of_two_widths_are_one_line(tmp_path, capsys):
    lines = []
    for split, width in (("train", 3), ("val", 5)):
        data.write_store(tmp_path / split, [{"features": np.zeros((1, width)), "boxes": np.zeros((1, 4))}])
        lines.append({"features": f"{split}#0", "text": "a", "split": split})
    assert data.main(["check", str(write_jsonl(tmp_path / "my.jsonl", lines)), "--task", "caption"]) == 2
    assert "splits have features of widths 3 and 5" in capsys.readouterr().err


def test_a_prompt_takes_texts_and_numbers_alone():
    for value in (None, ["k", 1], {"a": 1}):
        with pytest.raises(common.UserError, match="--prompt: 'animal' is .*, neither text nor a number"):
            records.fill_prompt({"animal": value}, "a {animal}")


def test_a_value_with_braces_is_filled_into_a_prompt_as_it_is():
    record = {"a": "the {b} of", "b": "x", "kind": "{a}", "Question_ID": 7}
    records.fill_prompt(record, "{a} {b} {kind} {Question_ID}")
    assert record == {"kind": "{a}", "text": "the {b} of x {a} 7", "id": 7}  # an id stays
    for line, kept in (({"id": 1, "uid": "a"}, 1), ({"qid": 2, "uid": "a"}, "a"), ({"uid": 1.5}, None)):
        records.fill_prompt(line, "{uid} {qid}" if "qid" in line else "{uid}")
        assert line.pop("text") and line == ({} if kept is None else {"id": kept})


def test_boxes_and_targets_are_cut_to_the_picture(own, tmp_path):
    """The picture is 40 x 30. A target with width and height swapped would be another box."""
    box = [-0.5, 2, 40.5, 30.25]
    dataset = load(own({**GOOD, "boxes": [box], "target": box}), "refer", "train", cache=tmp_path / "c")
    with pytest.raises(common.UserError, match="'target' looks normalised to 0..1"):
        load(own({**GOOD, "target": [0.1, 0.1, 0.5, 1]}), "refer", "train", cache=tmp_path / "c")
    expected = [0, 2 / 30, 1, 1]
    assert np.allclose(dataset.target[0], expected)
    assert np.allclose(dataset.store.gather(np.array([0]))["boxes"][0, 0], expected)


def test_targets_that_no_region_overlaps_are_not_trained_on(own, tmp_path, capsys):
    line = {"image": "a.png", "text": "x", "boxes": [[0, 0, 9, 9], [20, 20, 29, 29]]}
    lines = []
    for split in ("train", "val"):
        lines.append({**line, "target": [5, 5, 12, 12], "split": split})
        lines.append({**line, "target": [10, 10, 19, 19], "split": split})  # between the two regions
        lines.append({**line, "target": [2, 20, 7, 29], "split": split})  # below the first, to the left of the second
    path = own(*lines)
    train = load(path, "refer", "train", cache=tmp_path / "c")
    assert list(train.ids) == ["my.jsonl:1"] and "2 of 3 training examples are left out" in capsys.readouterr().err
    assert len(load(path, "refer", "val", cache=tmp_path / "c")) == 3  # counted as wrong


def test_pictures_outside_the_folder_are_read_and_said(own, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    path = write_jsonl(
        tmp_path / "in/x.jsonl", [{"image": "../a.png", "text": "x"}, {"image": str(tmp_path / "a.png"), "text": "x"}]
    )
    assert len(load(path, "caption", "train", cache=tmp_path / "c")) == 2
    assert "2 pictures or stores lie outside of its folder" in capsys.readouterr().err
    picture = {"features": np.ones((1, 3)), "boxes": np.array([[0, 0, 1, 1]])}
    data.write_store(tmp_path / "store", [picture])
    load(write_jsonl(path, [{"features": "../store#0", "text": "x"}]), "caption", "train", cache=tmp_path / "c")
    assert "1 pictures or stores lie outside of its folder" in capsys.readouterr().err
    (tmp_path / "in/a.png").write_bytes((tmp_path / "a.png").read_bytes())
    load(write_jsonl(path, [{"image": "./a.png", "text": "x"}]), "caption", "train", cache=tmp_path / "c")
    assert "lie outside" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "name", ["x" * 5000, "/dev/zero", ".", "a.png/b.png", "a.png\n", "loop", "nowhere", "pipe", "http://x.org/a.png"]
)
def test_a_name_that_is_no_file_is_said_with_its_line(own, tmp_path, name):
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "nowhere").symlink_to("missing.png")
    os.mkfifo(tmp_path / "pipe")  # whose reader would wait for ever
    path = own({**GOOD, "image": name})
    with pytest.raises(common.UserError, match=r"my.jsonl:1: .*no file"):
        load(path, "caption", "train", cache=tmp_path / "c")


def test_check_names_pictures_that_training_shares_with_the_test(own, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Image.open("a.png").save("copy.bmp")
    Image.new("L", (40, 30), 7).save("other.png")
    lines = [{"image": "a.png", "text": "x"}]
    path = own(
        *lines, {"image": "copy.bmp", "text": "y", "split": "test"}, {"image": "other.png", "text": "z", "split": "val"}
    )
    output = run_command(capsys, "check", path)[1]
    assert "1 of the 1 pictures of test are in train too" in output and "of val are" not in output
    lines += [{"image": "./a.png", "text": "y"}, {"image": "a.png", "text": "z", "boxes": [[0, 0, 9, 9]]}]
    output = run_command(capsys, "check", own(*lines))[1]
    assert "warning: the 3 pictures of train have only 1 different contents" in output


def test_check_counts_unknown_words_by_the_data_set_s_own_vocabulary(own, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    own({**GOOD, "text": "disc zebra zebra zebra"})
    (tmp_path / "v.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\ndisc")
    (tmp_path / "dataset.json").write_text(json.dumps({"file": "my.jsonl", "vocab": "v.txt"}))
    assert "75.00% of the word pieces are unknown" in run_command(capsys, "check", tmp_path)[1]
    own({**GOOD, "text": "disc zebra", "split": "test"})
    assert "50.00% of the word pieces are unknown" in run_command(capsys, "check", tmp_path)[1]


def test_check_says_which_regions_train_py_takes_instead(own, monkeypatch, capsys):
    path = own(GOOD)
    assert "train.py takes" not in run_command(capsys, "check", path)[1]
    monkeypatch.setattr(networks, "best_installed", lambda: "the best")
    assert "train.py takes features of the best" in run_command(capsys, "check", path)[1]
    assert "train.py takes" not in run_command(capsys, "check", own({**GOOD, "boxes": [[0, 0, 5, 5]]}))[1]


def test_each_kind_of_odd_picture_is_one_warning(own, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for number in (2, 3):
        frames = [Image.effect_noise((40, 30), 50 + i) for i in range(number)]
        frames[0].save(f"{number}.gif", save_all=True, append_images=frames[1:])
    lines = [{"image": f"{number}.gif", "text": "x"} for number in (2, 3)]
    error = run_command(capsys, "check", own(*lines, {**lines[0], "boxes": [[0, 0, 0.5, 1], [0, 0, 1, 1]]}))[2]
    warnings = error.strip().splitlines()
    assert len(warnings) == 2 and "only the first of its 2 frames is used (3 such" in warnings[0]
    assert "boxes look normalised to 0..1; multiply them by width and height (1 such" in warnings[1]


# ---- the cache ---------------------------------------------------------------------------------------------------------


def features_of(path, cache):
    return load(path, "caption", "train", cache=cache).store.gather(np.array([0]))["features"].numpy()


def test_a_changed_picture_file_or_version_is_read_again(own, tmp_path, monkeypatch):
    path = own({"image": "a.png", "text": "one"})
    cache = tmp_path / "c"
    before = features_of(path, cache)
    state = (tmp_path / "a.png").stat()
    Image.new("L", (40, 30), 200).save(tmp_path / "a.png")
    later = state.st_mtime_ns + 10**9
    os.utime(tmp_path / "a.png", ns=(later, later))
    assert (tmp_path / "a.png").stat().st_size == state.st_size  # only its time tells
    assert (features_of(path, cache) > before).all()
    made = set(cache.iterdir())
    features_of(path, cache)
    assert set(cache.iterdir()) == made
    monkeypatch.setattr(regions, "VERSION", regions.VERSION + 1)
    features_of(path, cache)
    assert len(set(cache.iterdir()) - made) == 2  # columns and regions
    own({"image": "a.png", "text": "two"})
    assert list(load(path, "caption", "train", cache=cache).text) == ["two"]


def test_what_is_on_disk_equals_what_was_read(own, tmp_path):
    lines = [
        {**GOOD, "text": "caf\u00e9 \u4f60", "kind": "k", "answer": {"a": 0.5, "b": 1}},
        GOOD,
        {**GOOD, "split": "val"},
    ]
    path = own(*lines)
    first = load(path, "vqa", "train", cache=tmp_path / "c")
    again = load(path, "vqa", "train", cache=tmp_path / "c")
    for dataset in (first, again):
        assert list(dataset.text) == ["caf\u00e9 \u4f60", "what?"] and dataset.text[-1] == "what?"
        assert list(dataset.kind) == ["k", "vqa"] and list(dataset.answer) == [{"a": 0.5, "b": 1.0}, {"red": 1.0}]
    tokenizer = data.train_tokenizer(first.text)
    pieces = first.encode(tokenizer, 9).tokens.tolist()
    assert (
        pieces
        == again.encode(tokenizer, 9).tokens.tolist()
        == first.subset(np.arange(2)).encode(tokenizer, 9).tokens.tolist()
    )
    assert len(first.encode(tokenizer, 3).tokens) == 6  # another length, another folder
    choices = {**GOOD, "choices": ["a b", "c"], "label": 1}
    vcr = load(own(choices), "vcr", "train", cache=tmp_path / "c")
    assert list(vcr.text) == [("what?", "a b"), ("what?", "c")] and vcr.target.tolist() == [1]


def test_a_killed_run_leaves_nothing_for_ever(tmp_path):
    old, new = tmp_path / ".making-a-1", tmp_path / ".making-b-2"
    for folder in (old, new):
        folder.mkdir()
        (folder / "x").write_text("x")
    day = time.time() - 25 * 3600
    for path in (old / "x", old):
        os.utime(path, (day, day))
    before = os.umask(0o022)
    made = regions.make_once(tmp_path / "c", lambda folder: (folder / "y").write_text("y"))
    os.umask(before)
    assert not old.exists() and new.exists() and (made / "y").read_text() == "y"
    assert made.stat().st_mode & 0o777 == 0o755  # whoever may read the data may read the cache
    with pytest.raises(ZeroDivisionError):
        regions.make_once(tmp_path / "d", lambda folder: 1 / 0)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".making-b-2", "c"]


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    data.write_text(tmp_path / "a", "old")

    def fail(file):
        file.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        data.write_whole(tmp_path / "a", fail)
    assert (tmp_path / "a").read_text() == "old" and [file.name for file in tmp_path.iterdir()] == ["a"]


# ---- text that is lost -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "one, other",
    [
        ("\u30d1\u30f3\u30c0", "\u30cf\u30f3\u30bf"),
        ("\u0915\u093f", "\u0915"),
        ("\u0e14\u0e35", "\u0e14\u0e34"),
        ("caf\u00e9", "cafe"),
        ("\u05e9\u05c1", "\u05e9\u05c2"),
        ("\u1ea1", "\u1ea3"),
        ("\u0643\u064e\u062a\u064e\u0628", "\u0643\u064f\u062a\u0650\u0628"),
    ],
)
def test_own_vocabularies_keep_accents_and_marks(tmp_path, one, other):
    """Panda and solder in Japanese, marks of Hindi, Thai, Hebrew, Vietnamese and Arabic. Composed and decomposed characters are one."""
    tokenizer = data.train_tokenizer([one, other] * 9)
    assert tokenizer.encode(one).ids != tokenizer.encode(other).ids
    decomposed = "cafe\u0301"
    if one == "caf\u00e9":
        assert tokenizer.encode(decomposed).ids == tokenizer.encode(one).ids
    ids = tokenizer.get_vocab()
    (tmp_path / "vocab.txt").write_text("\n".join(sorted(ids, key=ids.get)), encoding="utf-8")
    assert data.read_tokenizer(tmp_path / "vocab.txt").encode(one).ids == tokenizer.encode(one).ids


def test_vocabularies_with_odd_lines_keep_their_ids(tmp_path):
    lines = [*data.SPECIALS, "a", "", "b", "\u2028", "a", "\u0085", "c", ""]
    (tmp_path / "vocab.txt").write_text("\n".join(lines), encoding="utf-8", newline="")
    tokenizer = data.read_tokenizer(tmp_path / "vocab.txt")
    assert tokenizer.get_vocab_size() == max(tokenizer.get_vocab().values()) + 1 == 12
    assert [tokenizer.token_to_id(piece) for piece in ("a", "b", "\u2028", "\u0085", "c")] == [9, 7, 8, 10, 11]
    (tmp_path / "windows.txt").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    assert data.read_tokenizer(tmp_path / "windows.txt").get_vocab() == tokenizer.get_vocab()


@pytest.mark.parametrize("change", [{"unk_token": "[nothing]"}, {"unk_token": ""}, {"vocab": {}}, {"type": "Unigram"}])
def test_a_tokenizer_that_cannot_encode_is_refused_where_it_is_read(tmp_path, change):
    content = json.loads(data.train_tokenizer(["a cat"]).to_str())
    content["model"].update(change)
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(common.UserError, match="tokenizer.json") as error:
        data.read_tokenizer(tmp_path / "tokenizer.json")
    assert "\n" not in str(error.value)


def test_lost_text_is_counted(own, tmp_path):
    texts = ["red " * 20, "zebra", "red red"]
    dataset = load(own(*[{"image": "a.png", "text": text} for text in texts]), "caption", "train", cache=tmp_path / "c")
    dataset.encode(data.train_tokenizer(["red"] * 9), 12)
    assert dataset.lost.tolist() == [23, 1, 10]
    assert data.describe_lost_text([dataset]).startswith("warning: 4.35%")


# ---- draws -------------------------------------------------------------------------------------------------------------


def test_order_and_masks_depend_on_seed_and_epoch(dataset, tokenizer):
    """Both which examples are in a batch and which batch comes first."""
    lengths = dataset.lengths()
    orders = [data.batches(lengths, np.random.default_rng(seed), size=16) for seed in ((0, 0), (0, 1), (1, 0), (0, 0))]
    assert all(np.array_equal(a, b) for a, b in zip(orders[0], orders[3], strict=True))
    for other in orders[1:3]:
        together = {frozenset(batch.tolist()) for batch in orders[0]} & {frozenset(batch.tolist()) for batch in other}
        assert len(together) < 3
    longest = [lengths[batch, 0].max() for batch in orders[0]]
    assert longest != sorted(longest)
    batch = data.collate(dataset, np.arange(64))
    words = [data.mask_words(batch, tokenizer, np.random.default_rng(seed)).word_index.tolist() for seed in (0, 1)]
    regions_masked = [data.mask_regions(batch, np.random.default_rng(seed)).region_index.tolist() for seed in (0, 1)]
    assert words[0] != words[1] and regions_masked[0] != regions_masked[1]
    for share in (0.1, 0.4):
        masked = data.mask_words(batch, tokenizer, np.random.default_rng(0), p=share)
        assert abs(len(masked.word_index) / (batch.text > 4).sum() - share) < 0.06


def test_donors_of_replaced_regions_are_not_zeroed(dataset, tokenizer):
    batch = data.collate(dataset, np.arange(200))
    out = data.mask_regions(batch, np.random.default_rng(0), p=0.9, zero=0.5, random=0.5, force_one=False)
    zero = (out.features[out.masked_regions] == 0).all(1).double().mean().item()
    assert abs(zero - 0.5) < 0.05  # it would be near 0.72 if donors were taken after the masking
    real = {row.numpy().tobytes() for row in batch.features[batch.region_mask]}
    replaced = out.features[out.masked_regions]
    assert all(row.numpy().tobytes() in real for row in replaced if (row != 0).any())


# ---- data sets in a folder ---------------------------------------------------------------------------------------------


def test_a_folder_names_its_files_and_splits(own, tmp_path):
    own({**GOOD, "split": "compose"}, GOOD)
    (tmp_path / "dataset.json").write_text(json.dumps({"files": {"vqa": "my.jsonl"}, "extra_splits": ["compose"]}))
    assert len(load(tmp_path, "vqa", "compose", cache=tmp_path / "c")) == 1
    description = data.read_dataset_json(tmp_path)
    assert description["defaults"] == {} and description["content_words"] == [] and description["vocab"] == ""
    assert data.read_dataset_json(tmp_path / "my.jsonl")["name"] == "my"
    for content, message in (
        ('{"files": {"ve": "x.jsonl"}}', "nothing for task vqa; it has ve"),
        ('{"file": "x.jsonl"}', "no such file"),
        ('{"file": 3}', "'file' is 3; write"),
        ('{"fiel": "x"}', "unknown key 'fiel'"),
        ("{}", "no 'file'"),
        ('{"files": {"vqa": 3}}', "'files' is"),
        ('{"file": "my.jsonl", "extra_splits": [["a"]]}', "'extra_splits' is"),
        ('{"file": "my.jsonl", "content_words": [1]}', "'content_words' is"),
        ('{"file": "my.jsonl", "file": "my.jsonl"}', "'file' stands twice"),
        ("[" * 9999, "not JSON"),
    ):
        (tmp_path / "dataset.json").write_text(content)
        with pytest.raises(common.UserError, match=message):
            load(tmp_path, "vqa", "train", cache=tmp_path / "c")


def test_preview_draws_stores_pairs_and_targets(folder, own, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    own({"images": ["a.png", "a.png"], "text": "both", "label": True})
    assert run_command(capsys, "preview", "my.jsonl", "--task", "nlvr2")[0] == 0
    own(
        {"image": "a.png", "text": "x", "target": [1, 1, 20, 20]},
        {"features": "f.npz", "text": "y", "target": [0, 0, 9, 9]},
    )
    assert run_command(capsys, "preview", "my.jsonl", "--task", "refer", "--out", "r.png")[0] == 0
    pixels = np.asarray(Image.open("r.png").convert("RGB"))  # (H, W, 3)
    assert (pixels == (255, 0, 0)).all(-1).any()  # the red frame of the target
    assert run_command(capsys, "preview", folder / "pretrain.jsonl", "--count", "4")[0] == 0
    assert run_command(capsys, "preview", "my.jsonl", "--split", "val", "--task", "refer")[0] == 2


# ---- random streams --------------------------------------------------------------------------------------------


def test_streams_of_different_purposes_or_numbers_are_different():
    """NumPy alone gives default_rng((3, 5)) and default_rng((3, 5, 0)) one stream."""
    keys = [
        ("batch", 3, 5),
        ("batch", 3, 5, 0),
        ("batch", 3, 5, 0, 0),
        ("order", 3, 5),
        ("batch", 5, 3),
        ("batch", 0),
        ("batch",),
    ]
    first = [data.random_stream(*key).random(4).tolist() for key in keys]
    for i, numbers in enumerate(first):
        assert numbers == data.random_stream(*keys[i]).random(4).tolist()
        assert numbers not in first[:i]


def test_a_warning_begins_where_more_than_one_in_a_hundred_is_lost():
    def said(*lost):
        return data.describe_lost_text([SimpleNamespace(lost=np.array(lost))])

    assert said(1000, 10, 0).startswith("1.00% of") and said(1000, 0, 10).startswith("0.00%")
    assert said(1000, 11, 0).startswith("warning: 1.10%") and said(1000, 0, 11).startswith("warning: 0.00%")


def test_data_sets_of_one_name_have_words_of_their_own(tmp_path):
    found = []
    for number, text in enumerate(("aaa bbb", "ccc ddd")):
        folder = tmp_path / str(number)
        folder.mkdir()
        Image.new("L", (40, 30), 9).save(folder / "a.png")
        path = write_jsonl(folder / "my.jsonl", [{"image": "a.png", "text": text}])
        dataset = load(path, "caption", "train", cache=tmp_path / "c")
        found.append(data.own_tokenizer([dataset], tmp_path / "c").encode(text).tokens)
    assert found == [["aaa", "bbb"], ["ccc", "ddd"]]


def test_a_large_data_set_teaches_its_words_by_every_kth_text(own, tmp_path):
    path = own(*[{"image": "a.png", "text": "aaa" if i < 5 else "bbb"} for i in range(10)])
    dataset = load(path, "caption", "train", cache=tmp_path / "c")
    tokenizer = data.own_tokenizer([dataset], tmp_path / "c", most=5)
    assert tokenizer.encode("aaa bbb").tokens == ["aaa", "bbb"]


def test_check_names_pictures_that_training_shares_with_val(own, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path = own({"image": "a.png", "text": "x"}, {"image": "a.png", "text": "y", "split": "val"})
    assert "1 of the 1 pictures of val are in train too" in run_command(capsys, "check", path)[1]


def test_check_counts_answers_that_train_has_not(own, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    asked = {"image": "a.png", "text": "x"}
    lines = [{**asked, "answer": "red"}, {**asked, "answer": {"blue": 0.3}}]
    for answer in ("Red.", {"green": 1, "blue": 0.1}, "green", "grey"):
        lines.append({**asked, "answer": answer, "split": "test"})
    code, output, _ = run_command(capsys, "check", own(*lines), "--task", "vqa")
    assert code == 0 and "warning: 2 of the 4 examples of test have no answer that occurs in train" in output
    assert "occurs in train" not in run_command(capsys, "check", own(*lines[:3]), "--task", "vqa")[1]
    assert "occurs in train" not in run_command(capsys, "check", own(*lines[2:]), "--task", "vqa")[1]


def test_an_answer_is_drawn_in_proportion_to_its_score(dataset, tokenizer):
    batch = data.collate(dataset, np.zeros(2000, int), answers={"a": 0, "b": 1})
    scores = torch.tensor([[0.1, 0.3], [0.6, 1.0]]).repeat(1000, 1)  # sums of 0.4 and 1.6
    labels = data.sample_answers(dataclasses.replace(batch, answers=scores), np.random.default_rng(0)).answer_labels
    assert labels.max() == 1
    assert labels[::2].float().mean() == pytest.approx(3 / 4, abs=0.05)
    assert labels[1::2].float().mean() == pytest.approx(5 / 8, abs=0.05)


def test_another_grid_makes_other_regions(own, tmp_path):
    path = own({"image": "a.png", "text": "x"})
    for grid in (6, 2):
        assert len(load(path, "caption", "train", grid=grid, cache=tmp_path / "c").store.fields["boxes"]) == 1 + grid**2


def test_a_network_makes_other_regions_than_pixels(own, tmp_path, monkeypatch):
    from prepare import features

    def network_regions(jobs, network, device):
        boxes = np.array([[0, 0, 1, 1]], np.float32)
        for job in jobs:
            yield {"features": np.ones((1, 7), np.float32), "boxes": boxes, "size": (40, 30), "digest": 1}, [], None

    monkeypatch.setattr(features, "network_regions", network_regions)
    path = own({"image": "a.png", "text": "x"})
    widths = []
    for network in (None, {"kind": "network", "network": "n"}, None):
        widths.append(load(path, "caption", "train", network=network, cache=tmp_path / "c").store.width)
    assert widths == [432, 7, 432]


def test_feature_files_have_the_same_arrays(own, tmp_path):
    arrays = {"features": np.ones((2, 3)), "boxes": np.tile([0, 0, 9, 9], (2, 1)), "size": np.array([40, 30])}
    np.savez(tmp_path / "a.npz", **arrays)
    np.savez(tmp_path / "b.npz", **arrays, labels=np.array([0, 1]))
    path = own({"features": "a.npz", "text": "x"}, {"features": "b.npz", "text": "y"})
    with pytest.raises(common.UserError, match="'labels' or 'probs' are not as in"):
        load(path, "caption", "train", cache=tmp_path / "c")


def test_the_preview_of_a_telephones_photo_is_no_further_frame(tmp_path):
    image = Image.new("RGB", (8, 8), "red")
    image.save(tmp_path / "p.jpg", "MPO", save_all=True, append_images=[image])
    assert regions.open_picture("here", tmp_path / "p.jpg").info["frames"] == 1


def test_a_target_that_touches_a_region_at_its_edge_alone_is_not_trained_on():
    picture = {"features": np.ones((1, 3)), "boxes": np.array([[0, 0, 0.5, 1]]), "size": (10, 10)}
    store = regions.MemoryStore([picture])
    target = np.array([[0.5, 0, 1, 1], [0.4, 0, 1, 1]])
    of_texts = {"text": ["a", "b"], "answer": [{}] * 2, "kind": ["a"] * 2, "ids": ["0", "1"]}
    dataset = data.Dataset("", "train", store, np.zeros(2, int), target=target, **of_texts)
    assert data.drop_unreachable(dataset, "x").ids == ["1"]


def test_blanks_inside_an_answer_are_one():
    assert records.normalize_answer("light \t blue") == "light blue"


def test_boxes_up_to_one_pixel_look_normalised():
    assert regions.odd_boxes(np.array([[0, 0, 1, 1]]), 40, 30)
    assert not regions.odd_boxes(np.array([[0, 0, 1.5, 1]]), 40, 30)


def test_regions_that_tell_nothing_apart_are_told(tmp_path):
    features = np.zeros((3, 40), np.float32)
    features[0, 0] = 1
    np.savez(tmp_path / "a.npz", features=features, boxes=np.tile([0, 0, 9, 9], (3, 1)), size=np.array([40, 30]))
    notes = regions.picture_regions(regions.PictureJob("here", tmp_path / "a.npz", None, 4, 2))[1]
    assert "95% of the features are zero" in notes[0] and "all boxes are alike" in notes[1]


def test_only_the_first_process_warns(monkeypatch, capsys):
    for rank, said in (("0", "warning: x\n"), ("1", "")):
        monkeypatch.setenv("RANK", rank)
        regions.warn("x")
        assert capsys.readouterr().err == said


def test_probabilities_may_be_rounded_but_not_unscaled(tmp_path):
    arrays = {"features": np.ones((1, 3)), "boxes": np.array([[0, 0, 9, 9]]), "size": np.array([40, 30])}
    np.savez(tmp_path / "a.npz", **arrays, probs=np.array([[0.5, 0.51]]))
    regions.read_features("here", tmp_path / "a.npz")
    np.savez(tmp_path / "a.npz", **arrays, probs=np.array([[0.5, 0.6]]))
    with pytest.raises(common.UserError, match="must sum to 1"):
        regions.read_features("here", tmp_path / "a.npz")
