"""data.py and records.py against oracles: plain loops, counting, bad files."""

import dataclasses
import json
import multiprocessing
import re
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))
import common
import data
import tasks

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
    features = data.region_features(image, boxes, patch=6).reshape(3, 6, 6, 3)
    for i, box in enumerate(boxes.tolist()):
        crop = image.crop(box).resize((6, 6), Image.Resampling.BICUBIC)
        plain = (np.asarray(crop).astype(np.float32) / 255 - 0.5) / 0.25
        inner = slice(None) if i == 0 else slice(2, -2)  # at a crop's edge the filter cannot see the picture around it
        assert np.abs(features[i] - plain)[inner, inner].max() < 0.02  # one grey level
    assert data.grid_boxes(60, 30, 3)[[0, 1, 9]].tolist() == [[0, 0, 60, 30], [0, 0, 20, 10], [40, 20, 60, 30]]


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


def test_a_store_keeps_what_was_written(tmp_path):
    pictures = [{"features": np.full((n, 3), n / 4), "boxes": np.full((n, 4), 0.5)} for n in (2, 1, 4)]
    data.write_store(tmp_path / "s", iter(pictures))
    store = data.FeatureStore(tmp_path / "s")
    assert store.offsets.tolist() == [0, 2, 3, 7] and store.width == 3 and len(store) == 3
    assert np.load(tmp_path / "s/features.npy")[:, 0].tolist() == [0.5, 0.5, 0.25, 1, 1, 1, 1]
    with pytest.raises(ValueError, match="NaN"):
        data.write_store(tmp_path / "nan", [{"features": np.full((1, 3), np.nan), "boxes": np.zeros((1, 4))}])


def test_a_damaged_store_is_one_line(tmp_path, folder):
    for name, damage in (("offsets", b""), ("features", b"\x93NUMPY"), ("boxes", b"xx")):
        copy = tmp_path / name
        copy.mkdir()
        for file in (folder / "regions").iterdir():
            (copy / file.name).write_bytes(file.read_bytes())
        (copy / f"{name}.npy").write_bytes(damage)
        with pytest.raises(common.UserError, match="not a feature store"):
            data.FeatureStore(copy)


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
    assert part.text == [dataset.text[i] for i in index] and len(dataset.subset(7)) == 7
    before = part.offsets.tolist(), part.tokens.tolist()
    part.encode(tokenizer, 32)
    assert before == (part.offsets.tolist(), part.tokens.tolist())


def test_a_subset_is_drawn_at_random(dataset):
    """The first N lines of a file are often of one kind. The same N each time."""
    chosen = [int(name.rsplit(":", 1)[1]) for name in dataset.subset(100).ids]
    assert chosen == sorted(chosen) and len(set(chosen)) == 100
    assert chosen != list(range(1, 101)) and 0.35 < np.mean(np.array(chosen) > len(dataset) / 2) < 0.65
    assert len(set(np.diff(chosen).tolist())) > 5  # not evenly spaced
    assert dataset.subset(100).ids == dataset.subset(100).ids


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
    part = data.mask_words(batch, tokenizer, np.random.default_rng(0)).rows(torch.tensor([2, 0]))
    assert part.ids == [batch.ids[2], batch.ids[0]] and part.word_index is None
    assert torch.equal(part.features, batch.features[[2, 0]]) and part.to("cpu").answers.shape == (2, 3)
    short = dataset.subset(index).encode(tokenizer, 6)
    assert (np.diff(short.offsets) <= 6).all() and (short.tokens[short.offsets[1:] - 1] == 3).all()


@pytest.mark.parametrize("replace", ["image", "text"])
def test_mismatch_never_keeps_the_picture(dataset, tokenizer, replace):
    rng, index = np.random.default_rng(0), np.arange(len(dataset))
    examples, images, matched = data.sample_mismatches(dataset, index, rng, 0.5, replace)
    same = dataset.image[examples] == images
    assert np.array_equal(same, matched.numpy() == 1)
    assert abs(same.mean() - 0.5) < 4 * 0.5 / len(index) ** 0.5
    kept = examples if replace == "image" else images
    assert np.array_equal(kept, index if replace == "image" else dataset.image)
    batch = data.collate(dataset, examples, images)
    assert batch.pair_index.tolist() == matched.nonzero().flatten().tolist()  # what a contrast may take for pairs
    assert batch.pictures.tolist() == images.tolist()
    assert batch.rows(torch.arange(2)).pair_index is None
    with pytest.raises(ValueError, match="two pictures"):
        data.sample_mismatches(dataset.subset(np.array([0, 1])), np.array([0, 1]), rng, 1.0)


@pytest.mark.parametrize("replace", ["image", "text"])
def test_a_repeated_caption_is_never_a_false_pair_of_its_own_picture(replace):
    """90 pictures with five captions each, of nine different ones: by chance 45% of the false pairs would be true."""
    rng = np.random.default_rng(0)
    captions = [f"a {color} {shape}" for color in COLORS[:3] for shape in SHAPES[:3]]
    text = [captions[i] for i in rng.integers(0, 9, 450)]
    image = np.repeat(np.arange(90), 5)
    dataset = data.Dataset("", "train", None, image, text, [{}] * 450, ["caption"] * 450, [""] * 450)
    true = set(zip(text, image.tolist(), strict=True))
    false_pairs = 0
    for _ in range(10):
        index = rng.permutation(450)[:64]
        examples, images, matched = data.sample_mismatches(dataset, index, rng, 0.5, replace)
        for example, picture, match in zip(examples, images.tolist(), matched.tolist(), strict=True):
            assert ((text[example], picture) in true) == bool(match)
            false_pairs += 1 - match
    assert abs(false_pairs / 640 - 0.5) < 0.1
    assert dataset.repeated_texts() == 450
    alone = data.Dataset("", "train", None, np.arange(3), ["x", "X", "y"], [{}] * 3, [""] * 3, [""] * 3)
    assert alone.repeated_texts() == 2  # "X" is "x"


def test_pairs_that_no_draw_makes_false_stay_true():
    """Every picture has the same caption: there is no false pair, and the search for one ends."""
    dataset = data.Dataset("", "train", None, np.arange(4), ["a dog"] * 4, [{}] * 4, [""] * 4, [""] * 4)
    examples, images, matched = data.sample_mismatches(dataset, np.arange(4), np.random.default_rng(0), 1.0)
    assert matched.tolist() == [1, 1, 1, 1]
    assert images.tolist() == dataset.image[examples].tolist()


def test_false_sentences_come_from_the_batch(dataset):
    """Where they are of like length. A batch with one picture has none, and takes them from the rest."""
    index = np.flatnonzero(dataset.image < 10)
    examples, images, matched = data.sample_mismatches(dataset, index, np.random.default_rng(0), 1.0, "text")
    assert set(examples) <= set(index) and np.array_equal(images, dataset.image[index]) and not matched.any()
    alone = np.flatnonzero(dataset.image == dataset.image[0])
    examples, _, _ = data.sample_mismatches(dataset, alone, np.random.default_rng(0), 1.0, "text")
    assert (dataset.image[examples] != dataset.image[0]).all()


def test_nothing_is_predicted_in_false_pairs(dataset, tokenizer):
    rng, index = np.random.default_rng(0), np.arange(40)
    examples, images, matched = data.sample_mismatches(dataset, index, rng, 0.5, "text")
    batch = dataclasses.replace(data.collate(dataset, examples, images), matched=matched)
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
    assert len(set(seen)) == len(seen)
    if shuffled:
        assert len({len(shard) for shard in shards}) == 1 and len(seen) > 1003 - 3 * max(map(len, whole))
    else:
        assert sorted(seen) == list(range(1003))


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


def run_command(capsys, *arguments):
    """(exit code, stdout, stderr) of `python data.py arguments`."""
    code = data.main([str(argument) for argument in arguments])
    output = capsys.readouterr()
    return code, output.out, output.err


def test_command_line_in_a_process(tmp_path, own):
    command = [sys.executable, data.__file__]
    path = own({**GOOD, "boxes": [[1, 2, 21, 22]]}, {**GOOD, "split": "val"})
    for options, expected in ((["check", path, "--task", "vqa"], "2 examples"), (["preview", path], "preview.png: ")):
        done = subprocess.run([*command, *options], cwd=tmp_path, capture_output=True, text=True, check=True)
        assert expected in done.stdout, done
    assert Image.open(tmp_path / "preview.png").size > (300, 300)
    done = subprocess.run([*command, "check", "x.jsonl"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.startswith("data.py: x.jsonl: no such file")
    assert done.stderr.count("\n") == 1


def test_command_line(own, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert "(37, 432)" in run_command(capsys, "extract", "a.png", "--out", "grid.npz")[1]
    assert np.load("grid.npz")["features"].shape == (37, 432)
    grid = {"features": "grid.npz", "text": "a"}
    path = own({**grid, "answer": "b"}, {**grid, "split": "val"})
    assert "2 examples (1 train, 1 val), 1 pictures" in run_command(capsys, "check", path)[1]
    for arguments in (("frobnicate",), ("extract", "a.png"), ("check", path, "--x"), ("check", path, "--patch", "0")):
        code, _, error = run_command(capsys, *arguments)
        assert code == 2 and error.startswith("data.py: ") and error.count("\n") == 1
