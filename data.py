"""Data: from files to batches. Knows no model.

    scenes (drawn, the embedded default) or JSONL -> region features on disk (FeatureStore)
      -> Dataset (texts, answers, picture rows) -> collate -> Batch -> mismatch, mask_words, mask_regions

What stands in for what: drawn scenes for COCO / Visual Genome, a jittered imitation for the Faster R-CNN
detector (bottom-up attention, Anderson 2018), raw 12x12 crops for its 2048-wide features.

Letters: B batch rows, T text positions, N regions, F region-feature width, K object classes with background
(class 0), A answers, V vocabulary, E examples, I pictures of a store, R regions of a store.
Masks: text_mask and region_mask True = real (not padding); masked_regions True = predict this.
Boxes: x1,y1,x2,y2; pixels in files, 0..1 in a Batch. Every random draw comes from a seed or a Generator handed in.
"""

import argparse
import contextlib
import dataclasses
import difflib
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
import zipfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

from common import UserError

CACHE = Path(".cache")
VERSION = 11  # raise it whenever scenes, detector or region features change: it is part of every cache key
SPLITS = ("train", "val", "test", "compose")
TASKS = ("pretrain", "vqa", "ve", "nlvr2", "vcr", "retrieval", "refer", "caption")


@dataclass
class Batch:
    """Everything a model, an objective or a task head reads, as one flat container. None: the source has none."""

    text: torch.Tensor  # (B,T) int64 word pieces, 0 = padding
    text_mask: torch.Tensor  # (B,T) bool, True = real piece
    segments: torch.Tensor  # (B,T) int64 token types
    features: torch.Tensor  # (B,N,F) float32
    boxes: torch.Tensor  # (B,N,4) float32, 0..1
    region_mask: torch.Tensor  # (B,N) bool, True = real region
    region_types: torch.Tensor | None = None  # (B,N) int64, which picture of a pair
    masked_regions: torch.Tensor | None = None  # (B,N) bool, True = predict this
    # Index lists are made on the CPU: a boolean gather would make the GPU wait for its own count of True.
    word_index: torch.Tensor | None = None  # (M,) int64 into B*T, the pieces to predict
    word_labels: torch.Tensor | None = None  # (M,) int64, their original ids
    region_index: torch.Tensor | None = None  # (M,) int64 into B*N, the regions to predict
    clean_features: torch.Tensor | None = None  # (B,N,F) float32 before masking
    object_probs: torch.Tensor | None = None  # (B,N,K) float32, class 0 = background
    objects: torch.Tensor | None = None  # (B,N) int64 in 0..K-2: hard class, background left out
    object_conf: torch.Tensor | None = None  # (B,N) float32
    attributes: torch.Tensor | None = None  # (B,N) int64
    attribute_conf: torch.Tensor | None = None  # (B,N) float32
    matched: torch.Tensor | None = None  # (B,) int64, 1 = text and picture belong together
    predict_rows: torch.Tensor | None = None  # (B,) bool, True = words and regions are to be predicted; None = all
    answers: torch.Tensor | None = None  # (B,A) float32 soft targets
    answer_labels: torch.Tensor | None = None  # (B,) int64, one answer of each row, -1 = none
    target: torch.Tensor | None = None  # (B,) int64, a truth or a choice; (B,N) float, overlap with the box meant
    task: torch.Tensor | None = None  # (B,) int64, the number of the task among the run's, for ViLBERT's task tokens
    pictures: torch.Tensor | None = None  # (B,) int64, the picture's row in its store
    pair_index: torch.Tensor | None = None  # (M,) int64 into B, rows whose text and picture belong together
    ids: list | None = None  # B example ids, for error messages

    def _map(self, function):
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return Batch(**{k: function(v) if isinstance(v, torch.Tensor) else v for k, v in values.items()})

    def to(self, device, non_blocking=True):
        """The same batch on `device`; copies overlap with computation only from pinned memory."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin(self):
        """The same batch in page-locked memory. RuntimeError on a machine without an accelerator."""
        return self._map(lambda tensor: tensor.pin_memory())

    def rows(self, index):
        """Rows `index` (LongTensor). The flat lists word_index, word_labels, region_index, pair_index become None:
        they count positions of the whole batch, so mask after selecting."""
        flat = dataclasses.replace(self, word_index=None, word_labels=None, region_index=None, pair_index=None)
        part = flat._map(lambda tensor: tensor[index])
        part.ids = None if self.ids is None else [self.ids[i] for i in index.tolist()]
        return part


# ---------------------------------------------------------------------------------------------------------------------
# Scenes: pictures and an imitated detector


# ---------------------------------------------------------------------------------------------------------------------
# Scenes: captions and questions


# ---------------------------------------------------------------------------------------------------------------------
# Scenes: the tasks of more than a caption or a question. Each function takes the scene graphs of a split and draws from
# its own seed. Statements are drawn once and then put to pictures of every answer, so that words alone tell nothing.

ENTAILMENT = ("contradiction", "entailment", "neutral")  # in the papers' order


class Example(NamedTuple):
    """One example: its rows are what a model reads, equally many in every example of a task."""

    id: str
    kind: str
    rows: list  # [(text, or a tuple of its segments; number of the picture)]
    answer: dict | None = None  # {answer: score}
    target: object = -1  # what the task asks for: see Dataset


# ---------------------------------------------------------------------------------------------------------------------
# Region features and their store on disk


def grid_boxes(width, height, cells=6):
    """(1 + cells^2, 4) float32 pixels: the whole picture, then cells x cells equal parts row by row."""
    x, y = np.linspace(0, width, cells + 1), np.linspace(0, height, cells + 1)
    parts = [(x[i], y[j], x[i + 1], y[j + 1]) for j in range(cells) for i in range(cells)]
    return np.array([(0, 0, width, height), *parts], np.float32)


def region_features(image, boxes, patch=12):
    """(N, 3*patch*patch) float32: each box resized to patch x patch by bicubic filtering, rows of RGB pixels,
    standardised as (value/255 - 0.5) / 0.25, hence in -2..2.

    image: PIL picture of any mode.   boxes: (N,4) pixels inside it (ValueError by Pillow otherwise).
    """
    image, size = image.convert("RGB"), (patch, patch)
    crops = [np.asarray(image.resize(size, Image.Resampling.BICUBIC, tuple(box))) for box in np.array(boxes).tolist()]
    pixels = np.array(crops, np.float32).reshape(len(crops), 3 * patch * patch)  # (N,patch,patch,3) -> (N,F)
    return (pixels / 255 - 0.5) / 0.25


def ragged(offsets, index, pad_to=1):
    """Rows `index` (B,) of a flat array in which row i is offsets[i]:offsets[i+1].
    Returns a mask (B,L), True = inside the row, L the longest rounded up to a multiple of pad_to, and the positions of
    its True entries in the flat array."""
    start, length = offsets[index], np.diff(offsets)[index]
    steps = np.arange(-(-length.max(initial=0) // pad_to) * pad_to)
    mask = steps < length[:, None]
    return mask, (start[:, None] + steps)[mask]


STORED = {
    "features": np.float16,
    "boxes": np.float32,
    "object_probs": np.float16,
    "objects": np.int64,
    "object_conf": np.float32,
    "attributes": np.int64,
    "attribute_conf": np.float32,
}


class FeatureStore:
    """Regions of I pictures in a folder, memory-mapped: a .npy of R rows for each field of STORED that the source has
    (`features` and `boxes`, 0..1, always); picture i has rows offsets[i]:offsets[i+1]. extra.json holds what belongs
    to the pictures and is no array: the texts of scenes, warnings."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.offsets = np.load(self.folder / "offsets.npy")
        files = {name: self.folder / f"{name}.npy" for name in STORED}
        self.fields = {name: np.load(file, mmap_mode="r") for name, file in files.items() if file.exists()}
        self.width = self.fields["features"].shape[1]  # F
        self.classes = self.fields["object_probs"].shape[1] if "object_probs" in self.fields else None  # K

    def __len__(self):
        return len(self.offsets) - 1

    def extra(self):
        return json.loads((self.folder / "extra.json").read_text())

    def gather(self, images, pad_to=1):
        """images: (B,) int64. Returns Batch's region fields as a dict of (B,N,...) tensors, N a multiple of pad_to;
        float16 becomes float32, and where region_mask is False all is zero."""
        mask, rows = ragged(self.offsets, images, pad_to)  # (B,N)
        out = {"region_mask": torch.from_numpy(mask)}
        for name, array in self.fields.items():
            padded = np.zeros(mask.shape + array.shape[1:], np.int64 if array.dtype == np.int64 else np.float32)
            padded[mask] = array[rows]
            out[name] = torch.from_numpy(padded)
        return out


def write_store(folder, parts):
    """parts: iterable of (pictures, extra): a list of {field: (n,...) array}, all with the same fields, and a list of
    anything for extra.json. Rows go straight to disk, so a store may be larger than memory."""
    files, shapes, offsets, extras = {}, {}, [0], []
    with contextlib.ExitStack() as stack:

        def header(name):  # numpy pads a header so that it can be written again once the rows are counted
            files[name].seek(0)
            layout = {"descr": np.dtype(STORED[name]).str, "fortran_order": False}
            np.lib.format.write_array_header_1_0(files[name], layout | {"shape": (offsets[-1], *shapes[name])})

        for pictures, extra in parts:
            extras += extra
            for picture in pictures:
                for name, array in picture.items():
                    if name not in files:
                        files[name] = stack.enter_context(open(folder / f"{name}.npy", "wb"))
                        shapes[name] = array.shape[1:]
                        header(name)
                    files[name].write(array.astype(STORED[name]).tobytes())
                offsets.append(offsets[-1] + len(array))
        for name in files:
            header(name)
    np.save(folder / "offsets.npy", np.array(offsets))
    (folder / "extra.json").write_text(json.dumps(extras))


def cached_store(cache, name, key, parts):
    """The store of `key` in folder `cache`, made by write_store(parts()) if it is not there yet. It is written aside
    and renamed: a store is whole or absent, and of two processes that race both read the first one's."""
    folder = Path(cache) / f"{name}-{hashlib.sha256(json.dumps([VERSION, key]).encode()).hexdigest()[:16]}"
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=cache))
        try:
            write_store(aside, parts())
            aside.rename(folder)
        except OSError:
            if not folder.exists():
                raise
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    return FeatureStore(folder)


def parallel(work, jobs, label):
    """Yields work(job) in order, from a process per CPU; progress on stderr once it has taken a second."""
    workers, terminal = min(os.cpu_count() or 1, len(jobs)), sys.stderr.isatty()
    # fork on Linux: a fresh interpreter would spend longer importing torch than on the work
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
    start, shown = time.monotonic(), 0.0
    with ProcessPoolExecutor(workers, context) if workers > 1 else contextlib.nullcontext() as pool:
        for done, result in enumerate(pool.map(work, jobs) if pool else map(work, jobs), 1):
            yield result
            spent = time.monotonic() - start
            if spent > 1 and (spent - shown > (0.2 if terminal else 10) or shown and done == len(jobs)):
                shown, end = spent, "\r" if terminal and done < len(jobs) else "\n"
                print(f"{label}: {100 * done // len(jobs)}%, {spent:.0f} s", end=end, file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# Datasets


@dataclass
class Dataset:
    """Examples: texts, answers and the store's row of each one's picture. After encode() also their word pieces.

    An example has `group` rows, side by side in `image`, `text` and what encode() makes of it: two pictures with one
    statement (nlvr2), a question with each choice (vcr), else one. Everything else has one entry an example. E
    examples have R rows.
    """

    name: str
    split: str
    store: FeatureStore
    image: np.ndarray  # (R,) int64 row in store
    text: list[str]  # R; where a text has segments (vcr), a tuple of them
    answer: list[dict]  # {answer: score}, empty where there is none
    kind: list[str]  # "caption", or what is asked for
    ids: list[str]
    tokens: np.ndarray | None = None  # flat int64 pieces, row i at offsets[i]:offsets[i+1]
    offsets: np.ndarray | None = None
    target: np.ndarray | None = None  # nlvr2 (E,) 1 = true; vcr (E,) the right choice; refer (E,4) the box, 0..1
    group: int = 1  # rows of an example
    task_number: int = 0  # which of the run's tasks these examples are of
    segment: np.ndarray | None = None  # flat int64 like tokens: the number of each piece's segment, 0 for a plain text

    def __len__(self):
        return len(self.ids)

    def parts(self):
        """All texts, those of segments apart."""
        return [part for text in self.text for part in (text if isinstance(text, tuple) else (text,))]

    def rows(self, index):
        """The rows of examples `index` (B,) -> (B * group,)."""
        return (np.asarray(index)[:, None] * self.group + np.arange(self.group)).ravel()

    def encode(self, tokenizer, max_length=64):
        """Fills tokens and offsets with [CLS] pieces [SEP], at most max_length of them, [SEP] kept. Returns self.

        Segments are each followed by [SEP]. A separator counts to the segment after it, the last one to its own, as in
        UNITER's VCR. Of texts that are too long the first segment loses its end first: the choices differ in the last.
        """
        first, last = tokenizer.token_to_id("[CLS]"), tokenizer.token_to_id("[SEP]")
        texts = [text if isinstance(text, tuple) else (text,) for text in self.text]
        encoded = iter(tokenizer.encode_batch([*itertools.chain(*texts)], add_special_tokens=False))
        rows, segments = [], []
        for text in texts:
            parts = [next(encoded).ids for _ in text]
            left = max_length - 1 - len(parts)
            for i in reversed(range(len(parts))):
                parts[i] = parts[i][:left]
                left -= len(parts[i])
            rows.append([first, *itertools.chain.from_iterable([*part, last] for part in parts)])
            segments.append([0, *(min(i + (k == len(part)), len(parts) - 1) for i, part in enumerate(parts)
                                  for k in range(len(part) + 1))])  # fmt: skip
        self.tokens = np.fromiter(itertools.chain.from_iterable(rows), np.int64)
        self.segment = np.fromiter(itertools.chain.from_iterable(segments), np.int64)
        self.offsets = np.cumsum([0, *map(len, rows)])
        return self

    def lengths(self):
        """(E, 2) int64: word pieces and regions of each example, of the longest of its rows."""
        rows = np.stack([np.diff(self.offsets), np.diff(self.store.offsets)[self.image]], 1)  # (R, 2)
        return rows.reshape(-1, self.group, 2).max(1)  # (R, 2) -> (E, group, 2) -> (E, 2)

    def subset(self, index):
        """Examples `index` (integers); a single number takes that many at random, always the same ones."""
        if np.ndim(index) == 0:
            index = np.sort(np.random.default_rng(0).permutation(len(self))[:index])  # evenly spaced could hit one kind
        lists = {name: [getattr(self, name)[i] for i in index] for name in ("answer", "kind", "ids")}
        rows = self.rows(index)
        part = dataclasses.replace(self, image=self.image[rows], text=[self.text[i] for i in rows], **lists)
        part.target = None if self.target is None else self.target[index]
        if self.tokens is not None:
            mask, positions = ragged(self.offsets, rows)
            part.tokens, part.segment = self.tokens[positions], self.segment[positions]
            part.offsets = np.cumsum([0, *mask.sum(1)])
        return part


def make_dataset(name, split, store, examples, images=None):
    """Dataset of Examples. images: the store's row of each picture number; None: they are the same."""
    examples = list(examples)
    rows = [row for example in examples for row in example.rows]
    image = np.array([number if images is None else images[number] for _, number in rows], np.int64)
    lists = [[e.answer or {} for e in examples], [e.kind for e in examples], [e.id for e in examples]]
    group = len(examples[0].rows) if examples else 1
    target = np.array([example.target for example in examples])
    return Dataset(name, split, store, image, [text for text, _ in rows], *lists, target=target, group=group)


def normalize_answer(text):
    """Answers are compared without case and outer spaces."""
    return text.lower().strip()


def answer_list(dataset):
    """Every answer of the dataset, the most frequent first, equals by text."""
    counts = Counter(answer for answers in dataset.answer for answer in answers)
    return sorted(counts, key=lambda answer: (-counts[answer], answer))


def load(data, task, split, limit=None, patch=12, grid=6, cache=CACHE):
    """Dataset from data = "scenes" or the path of a .jsonl file. A split that the file lacks is an empty Dataset.
    limit: at most that many examples, drawn at random. UserError for whatever is wrong with the request or the files."""
    if data == "scenes":
        from prepare import scenes  # here, since it imports this file

        count = None if limit is None else min(limit, scenes.SCENES.get(split, 0))
        dataset = scenes.scenes(split, task, count, cache=cache)
    else:
        dataset = load_jsonl(data, task, split, patch, grid, cache)
    return dataset if limit is None else dataset.subset(limit)


# ---------------------------------------------------------------------------------------------------------------------
# Own data: JSONL


def is_text(value):
    """A string that says something."""
    return isinstance(value, str) and bool(value.strip())


def is_texts(value, least=1):
    """A list of at least `least` such strings."""
    return isinstance(value, list) and len(value) >= least and all(map(is_text, value))


def is_box(value):
    """Four finite numbers; their order is checked where the picture is known."""
    numbers = isinstance(value, list) and len(value) == 4 and all(type(v) in (int, float) for v in value)
    return numbers and all(map(math.isfinite, value))


def is_answer(value):
    """One answer, or soft scores {answer: 0..1}."""
    soft = isinstance(value, dict) and value and all(map(is_text, value))
    return is_text(value) or soft and all(type(v) in (int, float) and 0 <= v <= 1 for v in value.values())


KEYS = {  # key: test of its value, what to write
    "image": (is_text, "a file name"),
    "images": (lambda v: is_texts(v) and len(v) == 2, "a list of two file names"),
    "features": (lambda v: is_text(v) or is_texts(v) and len(v) == 2, "a file name (nlvr2: a list of two)"),
    "boxes": (lambda v: isinstance(v, list) and v and all(map(is_box, v)), "[[x1,y1,x2,y2],...] in pixels"),
    "text": (is_text, "a string that is not empty"),
    "answer": (is_answer, "a string, or {string: score in 0..1}"),
    "label": (lambda v: type(v) in (bool, int), "true or false (nlvr2), or the index of the right choice (vcr)"),
    "choices": (lambda v: is_texts(v, 2), "a list of at least two strings"),
    "reasons": (lambda v: is_texts(v, 2), "a list of at least two strings"),
    "reason": (lambda v: type(v) is int, "the index of the right one of 'reasons'"),
    "target": (is_box, "[x1,y1,x2,y2] in pixels"),
    "split": (lambda v: v in SPLITS[:3], "train, val or test"),
    "kind": (is_text, "a word for the sort of question; accuracy is given for each sort"),
}
NEEDED = {"vqa": ("answer",), "ve": ("answer",), "nlvr2": ("label",), "vcr": ("choices", "label"), "refer": ("target",)}


def require(ok, where, what):
    """UserError "where: what" unless ok."""
    if not ok:
        raise UserError(f"{where}: {what}")


def read_jsonl(path, task):
    """Checks every line of a JSONL file; opens no picture. Returns a list of dicts: the line's keys with split filled
    in and answer as {text: score}, `paths` to its one or two files, `where` = "<file>:<line number>"."""
    path, records = Path(path), []
    require(task in TASKS, path, f"unknown task {task!r}; choose from {', '.join(TASKS)}")
    require(path.is_file(), path, "no such file; give 'scenes' or the path of a .jsonl file")
    for number, line in enumerate(path.read_text(encoding="utf-8-sig", errors="replace").split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            record = json.loads(line)
        except ValueError as error:
            raise UserError(f"{where}: not JSON ({error}); write one object a line") from None
        require(isinstance(record, dict), where, 'not an object; write {"image": ..., "text": ...}')
        for key, value in record.items():
            near = difflib.get_close_matches(key, KEYS, 1, 0.5) or [", ".join(KEYS)]
            require(key in KEYS, where, f"unknown key {key!r}; did you mean {near[0]}?")
            require(KEYS[key][0](value), where, f"{key!r} is {str(value)[:60]!r}; write {KEYS[key][1]}")
        for key in ("text", *NEEDED.get(task, ())):
            require(key in record, where, f"key {key!r} is missing; task {task} needs it: {KEYS[key][1]}")
        sources = [key for key in ("image", "images", "features") if key in record]
        require(len(sources) == 1, where, "give one of 'image', 'images' and 'features', and only one")
        source = sources[0]
        names = record[source] if isinstance(record[source], list) else [record[source]]
        wanted = "two files: 'images' or 'features' as a list" if task == "nlvr2" else "one file: 'image' or 'features'"
        require(len(names) == (2 if task == "nlvr2" else 1), where, f"{source!r} does not fit; {task} takes {wanted}")
        require(source == "image" or "boxes" not in record, where, f"'boxes' goes with 'image' only, not {source!r}")
        label, most = record.get("label", 0), len(record.get("choices", ())) - 1
        require(task != "nlvr2" or type(label) is bool, where, f"'label' is {label}; write true or false")
        right = type(label) is int and 0 <= label <= most
        require(task != "vcr" or right, where, f"'label' is {label}; write the index of the right choice, 0 to {most}")
        right = "reasons" not in record or 0 <= record.get("reason", -1) < len(record["reasons"])
        require(right, where, "'reasons' needs 'reason', the index of the right one, from 0")
        record["paths"] = [path.parent / name for name in names]
        for file in record["paths"]:
            require(file.is_file(), where, f"{source!r}: no file {file}; paths are relative to the .jsonl file")
        if "answer" in record:
            answer = record["answer"] if isinstance(record["answer"], dict) else {record["answer"]: 1.0}
            record["answer"] = {normalize_answer(text): float(score) for text, score in answer.items()}
            known = task != "ve" or set(record["answer"]) <= set(ENTAILMENT)
            require(known, where, f"'answer' is {str(record['answer'])[:60]}; task ve takes {', '.join(ENTAILMENT)}")
        records.append({"split": "train", **record, "where": where})
    require(records, path, "holds no examples; write one JSON object a line")
    return records


def check_boxes(boxes, width, height, where, key):
    """(N,4) float32 pixels, cut to the picture: an overshoot of up to 1 px is a detector's rounding, not a mistake."""
    boxes, limit = np.array(boxes, np.float32), np.array([width, height, width, height], np.float32)
    size = f"{width:g} x {height:g} pixels"
    for box in boxes:
        text = f"{key!r}: {box.tolist()}"
        require(box[0] < box[2] and box[1] < box[3], where, f"{text} has x2 <= x1 or y2 <= y1; write [x1,y1,x2,y2]")
        inside = (box >= -1).all() and (box <= limit + 1).all()
        require(inside, where, f"{text} is outside its picture of {size}; cut it to the picture")
    return np.clip(boxes, 0, limit)


def picture_regions(job):
    """One picture or feature file -> ([{field: array}], [warning]); UserError if anything is wrong with it."""
    where, path, own_boxes, targets, patch, grid = job
    if path.suffix == ".npz":
        regions, (width, height) = read_features(where, path)
    else:
        image = open_picture(where, path)
        width, height = image.size
        boxes = grid_boxes(width, height, grid) if own_boxes is None else own_boxes
        boxes = check_boxes(boxes, width, height, where, "boxes")
        regions = {"features": region_features(image, boxes, patch), "boxes": boxes}
    for target_where, target in targets:
        check_boxes([target], width, height, target_where, "target")
    features, boxes = regions["features"], regions["boxes"]
    suspicions = {
        "all features are equal": np.ptp(features) == 0,
        "more than 95% of the features are zero": (features == 0).mean() > 0.95,
        "all boxes are alike": len(boxes) > 2 and (boxes == boxes[0]).all(),
        "boxes look normalised to 0..1; multiply them by width and height": boxes.max() <= 1 < min(width, height),
    }
    regions["boxes"] = boxes / np.array([width, height, width, height], np.float32)
    return [regions], [f"{where}: {path.name}: {text}" for text, true in suspicions.items() if true]


def open_picture(where, path):
    """The picture as RGB; UserError if Pillow cannot read it."""
    try:
        return Image.open(path).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{where}: cannot read picture {path} ({error}); save it again as PNG or JPEG") from None


def read_features(where, path):
    """A feature file of own data -> {field: array} with boxes in pixels, (width, height). UserError if it is wrong."""
    where = f"{where}: {path}"
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{where}: cannot read features ({error}); write the file with numpy.savez") from None
    for key in ("features", "boxes", "size"):
        require(key in arrays, where, f"has no array {key!r}; it needs features (N,F), boxes (N,4) and size (2,)")
    features, boxes, size = arrays["features"], arrays["boxes"], arrays["size"]
    n = len(features) if features.ndim else 0
    shapes = {"features": (n, features.shape[-1] if n else 1), "boxes": (n, 4), "size": (2,), "labels": (n,)}
    shapes["probs"] = (n, arrays["probs"].shape[-1]) if "probs" in arrays and arrays["probs"].ndim else None
    for key, array in arrays.items():
        right = key not in shapes or array.shape == shapes[key] and array.size
        require(right, where, f"{key!r} has shape {array.shape}; it must be {shapes.get(key) or '(N,K)'}, N > 0")
        require(array.dtype.kind in "iuf", where, f"{key!r} holds {array.dtype}; save floats or integers")
        finite = np.isfinite(array).all() and np.abs(array).max() < 65504  # float16's largest
        require(finite, where, f"{key!r} has NaN, infinity or values beyond 65504; extract this picture again")
    require((size > 0).all(), where, "'size' must be (width, height) in pixels")
    regions = {"features": features, "boxes": check_boxes(boxes, *size.tolist(), where, "boxes")}
    if "probs" in arrays:
        probs = arrays["probs"]
        soft = probs.shape[1] > 1 and (probs >= 0).all() and np.allclose(probs.sum(1), 1, atol=0.02)
        require(soft, where, "rows of 'probs' must sum to 1; apply a softmax over K > 1 classes, class 0 = background")
        regions |= {"object_probs": probs, "objects": probs[:, 1:].argmax(1), "object_conf": probs[:, 1:].max(1)}
    if "labels" in arrays:
        labels, most = arrays["labels"], arrays["probs"].shape[1] - 2 if "probs" in arrays else 65504
        whole = labels.dtype.kind in "iu" and labels.min() >= 0 and labels.max() <= most
        require(whole, where, f"'labels' must be integers 0 to {most}: classes without background")
        sure = arrays["probs"][np.arange(n), labels + 1] if "probs" in arrays else np.ones(n)
        regions |= {"objects": labels, "object_conf": sure}
    return regions, size.tolist()


def load_jsonl(path, task, split, patch=12, grid=6, cache=CACHE):
    """Dataset of a split of a JSONL file. One store serves all its splits; the key holds each file's size and time."""
    records, rows, jobs, key = read_jsonl(path, task), {}, [], []
    for record in records:
        for file in record["paths"]:
            picture = (file, json.dumps(record.get("boxes")))
            if picture not in rows:
                rows[picture] = len(rows)
                jobs.append((record["where"], file, record.get("boxes"), [], patch, grid))
            if "target" in record:
                jobs[rows[picture]][3].append((record["where"], record["target"]))
    for _, file, *options in jobs:
        state = file.stat()
        key.append([str(file.resolve()), state.st_size, state.st_mtime_ns, options])

    def parts():
        first = None
        for (where, file, *_), part in zip(jobs, parallel(picture_regions, jobs, f"reading {path}")):
            shapes = {name: array.shape[1:] for name, array in part[0][0].items()}
            first = first or (shapes, file)
            wide, wanted = shapes["features"][0], first[0]["features"][0]
            require(wide == wanted, where, f"{file} has features {wide} wide, {first[1]} {wanted}; extract all alike")
            require(shapes == first[0], where, f"{file}: 'labels' or 'probs' unlike {first[1]}; all or none have them")
            yield part

    store = cached_store(cache, "own", key, parts)
    if warnings := store.extra():
        print(f"warning: {warnings[0]} ({len(warnings)} such in {path})", file=sys.stderr)
    records = [record for record in records if record["split"] == split]
    if task in ("nlvr2", "vcr", "refer"):
        examples = [example for record in records for example in task_examples(task, record)]
        for example in examples:
            n, first = len(example.rows), len(examples[0].rows)
            require(n == first, example.id, f"{n} choices, the first line has {first}; give all equally many")
        return make_dataset(Path(path).stem, split, store, examples, rows)
    image = [rows[record["paths"][0], json.dumps(record.get("boxes"))] for record in records]
    answer = [record.get("answer", {}) if task in ("pretrain", "vqa", "ve") else {} for record in records]
    kind = ["caption" if not a else "question" if task == "pretrain" else task for a in answer]
    kind = [record.get("kind", k) for record, k in zip(records, kind)]
    text, ids = ([record[name] for record in records] for name in ("text", "where"))
    return Dataset(Path(path).stem, split, store, np.array(image, np.int64), text, answer, kind, ids)


def task_examples(task, record):
    """The Examples of a line for nlvr2, vcr (one for the answer, one for the reason if it has any) or refer. Pictures
    are numbered by their file and boxes, as load_jsonl has them."""
    pictures = [(file, json.dumps(record.get("boxes"))) for file in record["paths"]]
    where, text, kind = record["where"], record["text"], record.get("kind", task)
    if task == "nlvr2":
        return [Example(where, kind, [(text, picture) for picture in pictures], target=int(record["label"]))]
    if task == "refer":
        file = record["paths"][0]
        if file.suffix == ".npz":
            width, height = np.load(file)["size"].tolist()
        else:
            width, height = Image.open(file).size
        box = [value / side for value, side in zip(record["target"], (width, height) * 2)]
        return [Example(where, kind, [(text, pictures[0])], target=box)]
    answers, right = record["choices"], record["label"]
    out = [Example(where, "answer", [((text, a), pictures[0]) for a in answers], target=right)]
    if "reasons" in record:
        rows = [((text, answers[right], reason), pictures[0]) for reason in record["reasons"]]
        out.append(Example(where, "reason", rows, target=record["reason"]))
    return out


# ---------------------------------------------------------------------------------------------------------------------
# Word pieces

SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def wordpiece(vocab, lowercase):
    """A BERT tokenizer of vocab {piece: id}: clean, split at blanks and punctuation, greedy longest match first."""
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]", max_input_chars_per_word=100))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def train_tokenizer(texts, vocab_size=8000):
    """Lower-case WordPiece learnt from a list of texts; ids 0..4 are SPECIALS. Equal texts give equal vocabularies.

    The trainer numbers characters in the order of a randomly seeded hash map and breaks ties by number. Handing them
    over in sorted order fixes the numbers; as they would count as special tokens, the vocabulary gets a new tokenizer.
    """
    tokenizer = wordpiece({"[UNK]": 0}, lowercase=True)
    counts = Counter(itertools.chain.from_iterable(map(tokenizer.normalizer.normalize_str, texts)))
    letters = sorted(
        c for c, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:1000] if not c.isspace()
    )
    fixed = [*SPECIALS, *letters, *("##" + c for c in letters)]
    trainer = trainers.WordPieceTrainer(vocab_size=vocab_size, special_tokens=fixed, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return wordpiece(tokenizer.get_vocab(), lowercase=True)


def read_tokenizer(path):
    """Tokenizer from a BERT vocab.txt (cased if any piece has a capital letter) or a tokenizer.json. UserError if the
    file is missing, unreadable, lacks one of SPECIALS or does not give [PAD] id 0, which pads a Batch."""
    path = Path(path)
    require(path.is_file(), path, "no such file; give a BERT vocab.txt or a tokenizer.json")
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            tokenizer = tokenizer_from_json(text)
            tokenizer.no_padding()  # which some files ask for, as for truncation; lengths are a batch's affair
            tokenizer.no_truncation()
        else:
            pieces = text.rstrip("\n").split("\n")
            cased = any(piece != piece.lower() for piece in pieces if not piece.startswith("["))
            tokenizer = wordpiece({piece.strip(): i for i, piece in enumerate(pieces)}, lowercase=not cased)
            # one that stands in a text is then read as one piece
            tokenizer.add_special_tokens([piece for piece in SPECIALS if piece in pieces])
    except Exception as error:  # noqa: BLE001 (tokenizers raises plain Exception)
        raise UserError(f"{path}: not a tokenizer ({error}); give a BERT vocab.txt or a tokenizer.json") from None
    right = all(tokenizer.token_to_id(name) is not None for name in SPECIALS) and tokenizer.token_to_id("[PAD]") == 0
    require(right, path, f"needs {', '.join(SPECIALS)}, [PAD] first; is it a BERT vocabulary?")
    return tokenizer


def tokenizer_from_json(text):
    """The tokenizer of a checkpoint, as `tokenizer.to_str()` wrote it."""
    return Tokenizer.from_str(text)


# ---------------------------------------------------------------------------------------------------------------------
# Batches


def collate(dataset, index, images=None, answers=None, pad_to=1):
    """Batch of the texts of examples `index` (B,) beside the pictures in store rows `images` (B,) (None: their own).
    Where an example has several rows (`dataset.group`), so has the batch: B below is then their number.

    answers: {answer: column} for the soft targets (B,A); answers that it lacks are left out, so a row may be all zero.
    pad_to: T and N are rounded up to a multiple, fewer shapes for a compiled model. Encode the dataset first.
    """
    rows = dataset.rows(index)
    images = dataset.image[rows] if images is None else images
    true = images == dataset.image[rows]
    mask, positions = ragged(dataset.offsets, rows, pad_to)  # (B,T)
    text, segments = np.zeros((2, *mask.shape), np.int64)
    text[mask], segments[mask] = dataset.tokens[positions], dataset.segment[positions]
    targets = np.zeros((len(index), len(answers or ())), np.float32)
    for row, example in enumerate(index if answers is not None else ()):
        for answer, score in dataset.answer[example].items():
            if answer in answers:
                targets[row, answers[answer]] = score
    return Batch(
        text=torch.from_numpy(text),
        text_mask=torch.from_numpy(mask),
        segments=torch.from_numpy(segments),
        matched=torch.from_numpy(true.astype(np.int64)),
        answers=None if answers is None else torch.from_numpy(targets),
        task=torch.full((len(rows),), dataset.task_number),
        pictures=torch.from_numpy(np.array(images)),
        pair_index=torch.from_numpy(np.flatnonzero(true)),
        ids=[dataset.ids[i] for i in index],
        **dataset.store.gather(images, pad_to),
    )


def sample_mismatches(dataset, index, rng, p=0.5, replace="image"):
    """Pairs for image-text matching: with probability p the picture (replace="text": the sentence) becomes that of
    another example with another picture. Returns examples (B,) and store rows (B,), for collate, and matched (B,) int64
    tensor, 1 = they belong together. ValueError if the dataset has a single picture.

    Pictures are drawn from the whole dataset. Sentences are drawn from the batch, where they are of like length: one
    long stranger would pad all the others to its length.
    """
    if replace not in ("image", "text"):
        raise ValueError(f"replace is 'image' or 'text', not {replace!r}")
    images, other = dataset.image[index], np.array(index)
    wrong = rng.random(len(other)) < p
    if wrong.any() and (dataset.image == dataset.image[0]).all():
        raise ValueError("a mismatch needs at least two pictures")
    near = replace == "text" and (images != images[0]).any()
    while (same := wrong & (dataset.image[other] == images)).any():
        drawn = rng.integers(len(index) if near else len(dataset), size=same.sum())
        other[same] = index[drawn] if near else drawn
    matched = torch.from_numpy(1 - wrong.astype(np.int64))
    return (other, images, matched) if replace == "text" else (np.array(index), dataset.image[other], matched)


def drop_mismatched_labels(batch):
    """Without the masked words and regions of false pairs: there the other side tells nothing of them. They stay masked,
    but nothing is to be predicted. Returns a new Batch."""
    kept = {"predict_rows": batch.matched == 1}
    for name, mask in (("word", batch.text_mask), ("region", batch.region_mask)):
        index = getattr(batch, f"{name}_index")
        if index is not None:
            true = batch.matched[index // mask.shape[1]] == 1  # (M,): rows of flat positions in (B,T) or (B,N)
            kept[f"{name}_index"] = index[true]
            kept |= {"word_labels": batch.word_labels[true]} if name == "word" else {}
    return dataclasses.replace(batch, **kept)


def sample_answers(batch, rng):
    """One answer a row, drawn in proportion to the soft scores in `answers`; -1 where all are 0. Sets answer_labels."""
    rising = batch.answers.double().cumsum(1)  # (B,A)
    draw = torch.from_numpy(rng.random((len(rising), 1))) * rising[:, -1:]
    labels = (rising <= draw).sum(1).masked_fill(rising[:, -1] == 0, -1)
    return dataclasses.replace(batch, answer_labels=labels)


def mask_words(batch, tokenizer, rng, p=0.15, mask=0.8, random=0.1, only=None, force_one=True, one=False):
    """BERT's masking: each piece is selected with probability p; a selected one becomes [MASK] with probability
    `mask`, a random piece with probability `random`, and stays itself otherwise. Special pieces are never selected.

    rng: numpy Generator.   only: (V,) bool, True = may be selected.   force_one: in a row where none was drawn the
    first piece that may be becomes [MASK] (UNITER's rule: no row without a loss).   one: instead of all that, exactly
    one piece of each row, uniformly drawn, becomes [MASK] (evaluation: what the picture and all other words tell).
    Returns a new Batch with text, word_index and word_labels set; the given one keeps its tensors.
    """
    ordinary = torch.ones(tokenizer.get_vocab_size(), dtype=torch.bool)  # (V,)
    ordinary[[tokenizer.token_to_id(name) for name in SPECIALS]] = False
    may = batch.text_mask & (ordinary if only is None else ordinary & only)[batch.text]  # (B,T)
    draw, fate = torch.from_numpy(rng.random((2, *batch.text.shape)))
    selected = may & (draw < p)
    if one:
        lowest = draw.masked_fill(~may, 2.0)
        selected, fate = may & (lowest == lowest.min(1, keepdim=True).values), torch.full_like(fate, -1.0)
    elif force_one:
        first = may & (may.cumsum(1) == 1) & ~selected.any(1, keepdim=True)
        selected, fate = selected | first, fate.masked_fill(first, -1.0)
    text = batch.text.masked_fill(selected & (fate < mask), tokenizer.token_to_id("[MASK]"))
    swapped = selected & (fate >= mask) & (fate < mask + random)
    pieces = ordinary.nonzero()[:, 0]
    text[swapped] = pieces[torch.from_numpy(rng.integers(len(pieces), size=int(swapped.sum())))]
    word_index = selected.flatten().nonzero()[:, 0]  # (M,) into B*T
    word_labels = batch.text.flatten()[word_index]
    return dataclasses.replace(batch, text=text, word_index=word_index, word_labels=word_labels)


def next_word_labels(batch):
    """For captioning: word_index (M,), flat positions of the pieces that another one follows, and word_labels (M,), the
    ones that follow. Returns a new Batch."""
    followed = torch.nn.functional.pad(batch.text_mask[:, 1:], (0, 1))  # (B,T)
    word_index = followed.flatten().nonzero()[:, 0]  # (M,) into B*T
    return dataclasses.replace(batch, word_index=word_index, word_labels=batch.text.flatten()[word_index + 1])


def join_pictures(batch):
    """Rows 2i and 2i+1, the same text with two pictures, as one row with the regions of both: (2B,N,...) -> (B,2N,...).
    What belongs to pieces or rows is that of row 2i; target and ids, which are the examples', stay."""
    left, right = (
        dataclasses.replace(batch, ids=None, target=None).rows(torch.arange(i, len(batch.text), 2)) for i in (0, 1)
    )
    regions = ("features", "boxes", "region_mask", "region_types", *STORED)
    both = {n: torch.cat([getattr(left, n), getattr(right, n)], 1) for n in regions if getattr(left, n) is not None}
    return dataclasses.replace(left, **both, target=batch.target, ids=batch.ids)


def remove_modality(batch, what):
    """The batch without what --ablate names: without "image" every region is masked out and zeroed; without "text" only
    [CLS] and [SEP] are left. None: the batch as it is."""
    if what == "image":
        batch.region_mask = torch.zeros_like(batch.region_mask)
        batch.features = torch.zeros_like(batch.features)
        batch.boxes = torch.zeros_like(batch.boxes)
    if what == "text":
        last = batch.text_mask.sum(1, keepdim=True) - 1  # (B, 1), position of the last [SEP]
        batch.text = torch.cat([batch.text[:, :1], batch.text.gather(1, last)], 1)  # (B, T) -> (B, 2)
        batch.text_mask = torch.ones_like(batch.text, dtype=torch.bool)
        batch.segments = torch.zeros_like(batch.text)
    return batch


def mask_regions(batch, rng, p=0.15, zero=1.0, random=0.0, force_one=True):
    """Each real region is selected with probability p; a selected one's feature becomes 0 with probability `zero`, that
    of a random real region of the batch with probability `random`, and stays itself otherwise. Boxes stay.

    rng: numpy Generator.   force_one: in a row where none was drawn one random region is selected and set to 0.
    Returns a new Batch with features, clean_features, masked_regions and region_index set.
    """
    draw, fate = torch.from_numpy(rng.random((2, *batch.region_mask.shape)))
    selected = batch.region_mask & (draw < p)  # (B,N)
    if force_one:
        draw = draw.masked_fill(~batch.region_mask, 2.0)
        lowest = draw == draw.min(1, keepdim=True).values  # a uniform choice, as the draws are
        first = lowest & batch.region_mask & ~selected.any(1, keepdim=True)
        selected, fate = selected | first, fate.masked_fill(first, -1.0)
    features = batch.features.masked_fill((selected & (fate < zero))[..., None], 0)  # (B,N,1) -> (B,N,F)
    swapped = selected & (fate >= zero) & (fate < zero + random)
    donors = batch.features[batch.region_mask]  # (real regions, F)
    features[swapped] = donors[torch.from_numpy(rng.integers(len(donors), size=int(swapped.sum())))]
    masked = {"features": features, "clean_features": batch.features, "masked_regions": selected}
    return dataclasses.replace(batch, **masked, region_index=selected.flatten().nonzero()[:, 0])  # (M,) into B*N


def batches(lengths, rng=None, size=None, tokens=None, rank=0, world=1):
    """List of index arrays with examples of like lengths together: `size` examples each, or as many as fit in `tokens`
    padded positions (rows x longest, added up over the parts).

    lengths: (E,), or (E,P) for P parts that are padded apart, as words and regions are: sorted by the first, then by
    the next. rng: shuffles, by sorting within chunks of about 50 batches and shuffling the batches; None: all in order
    of length. rank r of `world` takes batches r::world. Training (rng) drops up to world-1 batches, so that every rank
    has the same number, and needs the same rng state on every rank; evaluation keeps every example exactly once.
    ValueError unless exactly one of size and tokens is given, or if an example alone is longer than `tokens`.
    """
    lengths = np.asarray(lengths).reshape(len(lengths), -1)  # (E,P)
    totals = lengths.sum(1)
    if (size is None) == (tokens is None):
        raise ValueError("give either size or tokens")
    if tokens is not None and totals.max(initial=0) > tokens:
        raise ValueError(f"an example of {totals.max()} positions does not fit in {tokens}")
    order, chunk = np.arange(len(lengths)), max(1, len(lengths))
    if rng is not None:
        order, chunk = rng.permutation(len(lengths)), 50 * (size or int(tokens / max(1, totals.mean())))
    groups, longest = [], lengths[:1]
    for start in range(0, len(order), chunk):
        part = order[start : start + chunk]
        for example in part[np.lexsort(lengths[part].T[::-1])].tolist():
            longest = np.maximum(longest, lengths[example])
            if not groups or (len(groups[-1]) == size if size else (len(groups[-1]) + 1) * longest.sum() > tokens):
                groups.append([])
                longest = lengths[example]
            groups[-1].append(example)
    if rng is not None:
        groups = [groups[i] for i in rng.permutation(len(groups))[: len(groups) // world * world]]
    return [np.array(group) for group in groups[rank::world]]


# ---------------------------------------------------------------------------------------------------------------------
# Files of weights


def write_text(path, text):
    """A text file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def check(file, task):
    """Reads a JSONL file with all its pictures and prints a line of statistics; UserError at the first mistake."""
    records = read_jsonl(file, task)
    for split in ("test", "val", "train"):  # each, as some mistakes show only when a split's examples are made
        store = load_jsonl(file, task, split).store
    splits = ", ".join(f"{n} {split}" for split, n in Counter(record["split"] for record in records).items())
    answers = {answer for record in records for answer in record.get("answer", ())}
    regions = f"{store.offsets[-1] / len(store):.1f} regions of width {store.width} each"
    print(f"{file}: {len(records)} examples ({splits}), {len(store)} pictures, {regions}, {len(answers)} answers")


def extract(image, out, patch, grid):
    """Writes the features of a picture's grid of regions as an .npz that own data can name."""
    picture = open_picture("extract", image)
    boxes = grid_boxes(*picture.size, grid)
    features = region_features(picture, boxes, patch)
    np.savez(out, features=features, boxes=boxes, size=np.array(picture.size))
    print(f"{out}: features {features.shape}, boxes {boxes.shape}")


class Parser(argparse.ArgumentParser):
    """argparse, but a mistake is a UserError, one line: what is wrong, without the whole usage."""

    def error(self, message):
        raise UserError(f"{message}; see --help")


def main():
    """preview, check or extract. Exit code 0, or 2 with one line on stderr."""
    parser = Parser(prog="data.py", description="Look at the drawn scenes, check own data, extract region features.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("preview", help="a sheet of six scenes with boxes, captions and questions")
    command.add_argument("--out", default="scenes.png")
    command.add_argument("--seed", type=int, default=0)
    command = commands.add_parser("check", help="check a JSONL file and count what is in it")
    command.add_argument("file")
    command.add_argument("--task", choices=TASKS, default="pretrain")
    command = commands.add_parser("extract", help="features of a picture's grid as .npz")
    command.add_argument("image")
    command.add_argument("--out", required=True)
    command.add_argument("--patch", type=int, default=12, help="a region becomes patch x patch pixels")
    command.add_argument("--grid", type=int, default=6, help="regions: the picture and grid x grid parts of it")
    try:
        from prepare import scenes  # here, since it imports this file

        options = vars(parser.parse_args())
        {"preview": scenes.preview, "check": check, "extract": extract}[options.pop("command")](**options)
    except (UserError, OSError, ValueError) as error:  # ValueError: Pillow does not know a suffix
        print(f"data.py: {UserError(str(error))}", file=sys.stderr)  # on one line
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
