"""Data: from files to batches. Knows no model, and no task by name.

    lines of JSONL + pictures or a feature store     what a user or prepare/*.py writes
      -> columns on disk                             load(): read and checked once, then memory-mapped
      -> Dataset                                     texts, answers, rows of the store; encode() adds word pieces
      -> collate -> Batch                            padded tensors
      -> sample_mismatches, mask_words, mask_regions

Pictures and stores are read in support/regions.py, lines of JSONL in support/records.py.

Letters: B batch rows, T text positions, N regions, F region-feature width, K object classes with background
(class 0), A answers, V vocabulary, E examples, R rows of a dataset, I pictures of a store.
Masks: text_mask and region_mask True = real (not padding); masked_regions True = selected for masking.
Boxes: x1,y1,x2,y2; pixels in files, 0..1 in a store and in a Batch. Random draws come from a Generator.
"""

from support import interrupt  # noqa: F401, I001 (before torch, for Ctrl-C)
import dataclasses
import functools
import importlib
import itertools
import json
import re
import sys
import unicodedata
import zlib
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from common import UserError
from support.ranges import COUNT, Parser, in_range
from support.records import (
    Answers,
    CategoricalColumn,
    Mistakes,
    Strings,
    as_json,
    files_named,
    first_record,
    is_names,
    is_text,
    is_texts,
    make_columns,
    pair_keys,
    print_shared_pictures,
    print_unknown_answers,
    print_warnings,
    read_columns,
    text_key,
    unique_keys,
)
from support.regions import (  # noqa: F401 (some are for other files too)
    STORED,
    FeatureStore,
    cache_key,
    is_network,
    make_once,
    map_array,
    ragged,
    refuse_overwriting,
    warn,
    write_store,
    write_text,
    write_whole,
)

CACHE = Path(".cache")
SPLITS = ("train", "val", "test")
ENTAILMENT = ("contradiction", "entailment", "neutral")  # in the papers' order
ENTAILMENT_COLUMNS = {answer: column for column, answer in enumerate(ENTAILMENT)}

# ---- a batch ----------------------------------------------------------------------------------------------------------


@dataclass
class Batch:
    """Everything a model, an objective or a task head reads, as one flat container. None: the source has none."""

    text: torch.Tensor  # (B,T) int64 word pieces, 0 = padding
    text_mask: torch.Tensor  # (B,T) bool, True = real piece
    segments: torch.Tensor  # (B,T) int64 segment numbers, which the models read as text types; vcr's: tasks.vcr_batch
    features: torch.Tensor  # (B,N,F) float32
    boxes: torch.Tensor  # (B,N,4) float32, 0..1
    region_mask: torch.Tensor  # (B,N) bool, True = real region
    region_types: torch.Tensor | None = None  # (B,N) int64, which picture of a pair
    masked_regions: torch.Tensor | None = None  # (B,N) bool, True = selected for masking
    # Index lists are made on the CPU: a boolean gather would make the GPU wait for its own count of True.
    word_index: torch.Tensor | None = None  # (M,) int64 into B*T, the pieces to predict
    word_labels: torch.Tensor | None = None  # (M,) int64, their original ids
    region_index: torch.Tensor | None = None  # (M,) int64 into B*N, the regions to predict
    clean_features: torch.Tensor | None = None  # (B,N,F) float32 before masking
    object_probs: torch.Tensor | None = None  # (B,N,K) float32, class 0 = background
    objects: torch.Tensor | None = None  # (B,N) int64 in 0..K-2: hard class, background left out; -1 = none
    object_conf: torch.Tensor | None = None  # (B,N) float32
    attributes: torch.Tensor | None = None  # (B,N) int64, -1 = none
    attribute_conf: torch.Tensor | None = None  # (B,N) float32
    matched: torch.Tensor | None = None  # (B,) int64, 1 = text and picture belong together
    answers: torch.Tensor | None = None  # (B,A) float32 soft targets
    answer_labels: torch.Tensor | None = None  # (B,) int64, one answer of each row, -1 = none
    target: torch.Tensor | None = None  # (B,) int64, 1 = true (nlvr2), right (vcr); (B,N) float, IoU (refer)
    predict_rows: torch.Tensor | None = None  # (B,) bool, True = words and regions are to be predicted; None = all
    task: torch.Tensor | None = None  # (B,) int64, the number of the task among the run's, for ViLBERT's task tokens
    pictures: torch.Tensor | None = None  # (B,) int64, the picture's row in its store
    pair_index: torch.Tensor | None = None  # (M,) int64 into B, rows whose text and picture belong together
    ids: list | None = None  # one id an example, whose rows are adjacent

    def _map(self, function):
        values = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            values[field.name] = function(value) if isinstance(value, torch.Tensor) else value
        return Batch(**values)

    def to(self, device, non_blocking=True):
        """The same batch on `device`; copies overlap with computation only from pinned memory."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin(self):
        """The same batch in page-locked memory. RuntimeError on a machine without an accelerator."""
        return self._map(lambda tensor: tensor.pin_memory())

    def select(self, index):
        """Rows `index` (LongTensor) of a batch with one row an example; else set `ids` and `target` to None first. The flat
        lists word_index, word_labels, region_index, pair_index become None, as they count positions of the whole batch."""
        flat = dataclasses.replace(self, word_index=None, word_labels=None, region_index=None, pair_index=None)
        part = flat._map(lambda tensor: tensor[index])
        if self.ids is not None:
            part.ids = [self.ids[i] for i in index.tolist()]
        return part


# ---- data sets --------------------------------------------------------------------------------------------------------


class Example(NamedTuple):
    """One example. A row is a text beside a picture; all examples of a data set have equally many rows."""

    id: str
    kind: str
    rows: list  # [(text, or a tuple of its segments; which of the line's pictures: 0 or 1)]
    answer: dict | None = None  # {answer: score}
    target: object = -1  # what the task predicts: see Dataset


@dataclass
class Dataset:
    """Examples: texts, answers and the store's row of each one's picture. After encode() also their word pieces.

    An example has `group` rows: the statement with each picture (nlvr2), the question with each choice (vcr), else one.
    `image`, `text` and the word pieces have one entry a row, R in all, the rows of an example side by side. `answer`,
    `kind`, `ids` and `target` have one entry an example, E in all. Lists may be views of columns on disk.
    """

    name: str
    split: str
    store: FeatureStore
    image: np.ndarray  # (R,) int64 row in store
    text: Sequence  # R; where a text has segments (vcr), a tuple of them
    answer: Sequence  # {answer: score}, empty where there is none
    kind: Sequence  # "caption", or what sort of question
    ids: Sequence
    tokens: np.ndarray | None = None  # flat pieces, row i at offsets[i]:offsets[i+1]
    offsets: np.ndarray | None = None
    target: np.ndarray | None = None  # nlvr2 (E,) 1 = true; vcr (E,) the right choice; refer (E,4) the box, 0..1
    group: int = 1  # rows of an example
    task_number: int = 0  # which of the run's tasks these examples are of
    segment: np.ndarray | None = None  # flat like tokens: the number of each piece's segment, 0 for a plain text
    folder: Path | None = None  # of its columns, if they are on disk
    text_keys: np.ndarray | None = None  # (R,) int64: see `text_key`
    pairs: np.ndarray | None = None  # (R,) int64, sorted: the keys of all pairs of text and picture
    lost: np.ndarray | None = None  # (3,) word pieces of all texts, how many of them are [UNK], how many were cut off

    def __len__(self):
        return len(self.ids)

    def parts(self):
        """Yields every text; of a text with segments, each segment by itself."""
        for text in self.text:
            if isinstance(text, tuple):
                yield from text
            else:
                yield text

    def rows_of(self, index):
        """The rows of examples `index` (B,) -> (B * group,)."""
        return (np.asarray(index)[:, None] * self.group + np.arange(self.group)).ravel()

    @functools.cached_property  # a step must not look at all examples
    def has_several_pictures(self):
        return bool((self.image != self.image[0]).any())

    def index_pairs(self):
        """Fills in text_keys and pairs, which columns on disk bring along."""
        if self.pairs is None:
            self.text_keys = np.array([text_key(text) for text in self.text], np.int64)
            self.pairs = np.sort(pair_keys(self.text_keys, self.image))

    def belong_together(self, examples, images):
        """True = some example pairs this text with this picture. examples, images (store rows): (...) -> (...) bool.
        Upper and lower case count as equal. A caption of several pictures belongs to each of them. For tasks with one
        row an example."""
        self.index_pairs()
        keys = pair_keys(self.text_keys[examples], images)
        found = np.searchsorted(self.pairs, keys).clip(max=len(self.pairs) - 1)
        return self.pairs[found] == keys

    def repeated_texts(self):
        """The number of examples whose text also occurs with another picture."""
        self.index_pairs()
        keys, number = np.unique(self.text_keys, return_inverse=True)
        one_picture = np.zeros(len(keys), np.int64)  # of each text
        one_picture[number] = self.image
        several = np.zeros(len(keys), bool)
        several[number[one_picture[number] != self.image]] = True
        return int(several[number].sum())

    def encode(self, tokenizer, max_length=64):
        """Fills in tokens, segment, offsets and lost by `encode_texts`. Returns self. If the columns are on disk, the
        word pieces are cached beside them, in one folder for each tokenizer and max_length."""
        if self.folder is None or not self.folder.is_dir():  # the cache was emptied meanwhile
            self.tokens, self.segment, self.offsets, self.lost = encode_texts(tokenizer, self.text, max_length)
            return self

        def make(folder):
            tokens, segment, offsets, lost = encode_texts(tokenizer, self.text, max_length)
            np.save(folder / "tokens.npy", tokens.astype(np.int32))
            np.save(folder / "segment.npy", segment.astype(np.uint8))
            np.save(folder / "offsets.npy", offsets)
            np.save(folder / "lost.npy", lost)

        folder = make_once(self.folder / f"tokens-{cache_key(tokenizer.to_str(), max_length)}", make)
        self.tokens, self.segment, self.offsets, self.lost = (
            map_array(folder / f"{name}.npy") for name in ("tokens", "segment", "offsets", "lost")
        )
        return self

    def lengths(self):
        """(E, 2) int32: numbers of word pieces and of regions of each example, each the largest among its rows."""
        rows = np.empty((len(self.image), 2), np.int32)  # (R, 2)
        rows[:, 0] = np.diff(self.offsets)
        rows[:, 1] = np.diff(self.store.offsets).astype(np.int32)[self.image]
        return rows.reshape(-1, self.group, 2).max(1)  # (R, 2) -> (E, group, 2) -> (E, 2)

    def subset(self, index):
        """Examples `index` (integers), in memory."""
        rows = self.rows_of(index)
        part = dataclasses.replace(
            self,
            image=np.array(self.image[rows]),
            text=[self.text[i] for i in rows],
            answer=[self.answer[i] for i in index],
            kind=[self.kind[i] for i in index],
            ids=[self.ids[i] for i in index],
            folder=None,
            text_keys=None,
            pairs=None,
            lost=None,
        )
        if self.target is not None:
            part.target = np.array(self.target[index])
        if self.tokens is not None:
            mask, positions = ragged(self.offsets, rows)
            part.tokens = self.tokens[positions]
            part.segment = self.segment[positions]
            part.offsets = np.concatenate([[0], np.cumsum(mask.sum(1))])
        return part


def encode_texts(tokenizer, texts, max_length, chunk=10_000):
    """Word pieces of texts: (tokens, segment, offsets, lost), as Dataset has them.

    A text becomes [CLS] pieces [SEP], at most max_length of them, [SEP] kept. Segments are each followed by [SEP]. A
    [SEP] has the number of the segment after it, the last [SEP] that of the last segment, as in UNITER's VCR. A text
    that is too long first loses the end of its first segment, because choices differ in the last one.
    """
    first = tokenizer.token_to_id("[CLS]")
    last = tokenizer.token_to_id("[SEP]")
    unknown = tokenizer.token_to_id("[UNK]")
    tokens = array("q")
    segment = array("b")
    offsets = array("q", [0])
    lost = np.zeros(3, np.int64)
    for start in range(0, len(texts), chunk):
        segmented = []  # a list of segments for each text
        for i in range(start, min(start + chunk, len(texts))):
            text = texts[i]
            segmented.append([text] if isinstance(text, str) else text)
        encoded = iter(tokenizer.encode_batch(list(itertools.chain(*segmented)), add_special_tokens=False))
        for segments in segmented:
            parts = [next(encoded).ids for _ in segments]
            pieces = sum(map(len, parts))
            left = max_length - 1 - len(parts)  # without [CLS] and the separators
            lost += (pieces, sum(part.count(unknown) for part in parts), max(0, pieces - left))
            for i in reversed(range(len(parts))):
                parts[i] = parts[i][:left]
                left -= len(parts[i])
            tokens.append(first)
            segment.append(0)
            for i, part in enumerate(parts):
                tokens.extend([*part, last])
                segment.extend([i] * len(part))
                segment.append(min(i + 1, len(parts) - 1))
            offsets.append(len(tokens))
    return np.array(tokens), np.array(segment, np.int64), np.array(offsets), lost


def describe_lost_text(datasets):
    """The shares of word pieces that are unknown and that are cut off, as one line; a warning if one is above 1%."""
    pieces, unknown, cut = np.sum([dataset.lost for dataset in datasets], axis=0)
    unknown = unknown / max(1, pieces)
    cut = cut / max(1, pieces)
    text = f"{unknown:.2%} of the word pieces are unknown ([UNK]), {cut:.2%} are cut off at the longest length"
    if max(unknown, cut) > 0.01:
        text = f"warning: {text}"
    return text


def open_columns(folder, name, split):
    """The Dataset of columns on disk. A split that the file lacks is an empty Dataset."""
    folder = folder / split
    if not folder.exists():
        return Dataset(name, split, None, np.zeros(0, np.int64), [], [], [], [])
    rest = json.loads((folder / "columns.json").read_text())
    column = {file.stem: map_array(file) for file in folder.glob("*.npy")}
    return Dataset(
        name=name,
        split=split,
        store=FeatureStore(rest["store"]),
        image=column["image"],
        text=Strings(column["text"], column["text_offsets"]),
        answer=Answers(rest["answers"], column["answer"], column["answer_scores"], column["answer_offsets"]),
        kind=CategoricalColumn(rest["kinds"], column["kind"]),
        ids=Strings(column["ids"], column["ids_offsets"]),
        target=column.get("target"),
        group=rest["group"],
        folder=folder,
        text_keys=column["text_keys"],
        pairs=column["pairs"],
    )


def find(source, cache=CACHE):
    """The path of a data set: a .jsonl file, or a folder with dataset.json. An existing path is returned unchanged. A
    script of prepare/ that needs no published files (scenes, charts) is given by its name, and run once, into the cache."""
    path = Path(source)
    if path.exists():
        return path
    scripts = Path(__file__).resolve().parent / "prepare"
    if re.fullmatch(r"[a-z0-9_]+", str(source)) and (scripts / f"{source}.py").is_file():
        script = importlib.import_module(f"prepare.{source}")
        if hasattr(script, "make"):
            return make_once(Path(cache).resolve() / f"{source}-{getattr(script, 'VERSION', 1)}", script.make)
        raise UserError(f"{source}: made from published files; run `python prepare/{source}.py --help`, then give the "
                        "folder that it writes")  # fmt: skip
    raise UserError(f"{source}: no such file or folder; give a .jsonl file, a data set's folder, scenes or charts")


def read_dataset_json(path):
    """The description of a data set: a dict with all keys of DATASET_JSON, defaults filled in, and `folder`, which its
    file names are relative to. path: a .jsonl file, or a folder with dataset.json."""
    path = Path(path)
    found = {}
    if path.is_file():
        folder = path.parent
        found = {"name": path.stem, "file": path.name}
    else:
        folder = path
        file = path / "dataset.json"
        if not file.is_file():
            raise UserError(f"{path}: has no dataset.json; predict.py and features.py take pictures alone")
        try:
            found = json.loads(file.read_bytes().decode("utf-8-sig"), object_pairs_hook=unique_keys)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{file}: not JSON in UTF-8 ({error})") from None
        if not isinstance(found, dict):
            raise UserError(f"{file}: not an object")
    for key, value in found.items():
        if key not in DATASET_JSON:
            raise UserError(f"{path}: unknown key {key!r}; dataset.json has {', '.join(DATASET_JSON)}")
        default, is_valid, wanted = DATASET_JSON[key]
        if value != default and not is_valid(value):
            raise UserError(f"{path}: {key!r} is {as_json(value)}; write {wanted}")
    if not found.get("file") and not found.get("files"):
        raise UserError(f"{path}: dataset.json names no 'file' or 'files'")
    defaults = {key: default for key, (default, _, _) in DATASET_JSON.items()}
    return {**defaults, "name": path.stem, **found, "folder": folder}


DATASET_JSON = {  # key: its default, test of its value, what to write
    "name": ("", is_text, "a string"),
    "file": ("", is_text, "the name of one .jsonl file for every task"),
    "files": (
        {},
        lambda value: isinstance(value, dict) and is_texts(list(value.values())),
        '{task: name of a .jsonl file}, as {"vqa": "vqa.jsonl"}',
    ),
    "extra_splits": ([], is_names, "a list of further splits for testing, words of letters, digits, _ and -"),
    "vocab": ("", is_text, "the name of a vocab.txt"),
    "content_words": ([], is_texts, "a list of words"),
    "regions": ({}, lambda value: isinstance(value, dict), "an object that says how the features were made"),
    "defaults": ({}, lambda value: isinstance(value, dict), "an object of options' defaults"),
}


def task_file(dataset, task_name):
    """The .jsonl file of a task, from what read_dataset_json returned."""
    name = dataset["files"].get(task_name, dataset["file"])
    if not name:
        raise UserError(f"{dataset['folder']}: has nothing for task {task_name}; it has {', '.join(dataset['files'])}")
    path = dataset["folder"] / name
    if not path.is_file():
        raise UserError(f"{path}: no such file; dataset.json names it")
    return path


def load(source, task, split, limit=None, patch=12, grid=6, cache=CACHE, network=None, device=None, checked=False):
    """Dataset of a split. A split that the file lacks is an empty Dataset.

    source: see `find`.   task: a row of tasks.TASKS.   limit: at most that many examples, drawn at random.
    patch, grid: how pictures are cut into patches.   network: the description of a feature network, as
    options.choose_network returns it, or None for patches; it runs on `device` (None: a GPU if there is one).
    checked: True skips the test whether the pictures have changed since they were cached.
    UserError for a mistake in the arguments or the files.
    """
    path, splits, description = describe(source, task, cache)
    own_network = None if description["regions"] or not is_network(network) else network
    columns = make_columns(path, task, splits, patch, grid, cache, own_network, device, checked)
    dataset = open_columns(columns, description["name"], split)
    if split == "train" and len(dataset):
        print_warnings(dataset, path)
        if "target" in task.needs:
            dataset = drop_unreachable(dataset, path)
    if limit is not None:
        index = random_stream("subset").permutation(len(dataset))[:limit]  # evenly spaced ones could be of one kind
        dataset = dataset.subset(np.sort(index))
    return dataset


def drop_unreachable(dataset, path):
    """The dataset without the examples whose target box overlaps no region: training would take region 0 as right. Such
    examples stay in val and test, where they count as wrong."""
    reachable = np.zeros(len(dataset), bool)
    for start in range(0, len(dataset), 1000):
        chunk = np.arange(start, min(start + 1000, len(dataset)))
        mask, rows = ragged(dataset.store.offsets, dataset.image[chunk])
        boxes = np.zeros((*mask.shape, 4))  # (B,N,4); padding is empty, so it overlaps nothing
        boxes[mask] = dataset.store.open_field("boxes")[rows]
        target = dataset.target[chunk][:, None]  # (B,1,4)
        low = np.maximum(boxes[..., :2], target[..., :2])
        high = np.minimum(boxes[..., 2:], target[..., 2:])
        reachable[chunk] = (high > low).all(-1).any(-1)
    dropped = len(dataset) - reachable.sum()
    if dropped == 0:
        return dataset
    warn(f"{path}: {dropped} of {len(dataset)} training examples are left out: no region overlaps their target")
    return dataset.subset(np.flatnonzero(reachable))


def answer_list(dataset):
    """Every answer of the dataset, the most frequent first; equally frequent ones in alphabetical order."""
    if isinstance(dataset.answer, Answers):
        counts = dataset.answer.counts()
    else:
        counts = Counter()
        for answers in dataset.answer:
            counts.update(answers.keys())
    return sorted(counts, key=lambda answer: (-counts[answer], answer))


# ---- word pieces ------------------------------------------------------------------------------------------------------

SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def wordpiece(vocab, lowercase, strip_accents=False):
    """A BERT tokenizer of vocab {piece: id}: clean, split at blanks and punctuation, greedy longest match first. NFC
    and strip_accents=False keep the marks of Japanese, Hindi and Thai; BERT's own uncased vocabularies strip them."""
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]", max_input_chars_per_word=100))
    bert_normalizer = normalizers.BertNormalizer(lowercase=lowercase, strip_accents=strip_accents)
    tokenizer.normalizer = bert_normalizer
    if not strip_accents:
        tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), bert_normalizer])
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def train_tokenizer(texts, vocab_size=8000):
    """Lower-case WordPiece learnt from texts; ids 0..4 are SPECIALS. Equal texts give equal vocabularies.

    The trainer numbers characters in the order of a randomly seeded hash map and breaks ties by number. Passing the
    characters as special tokens, sorted, fixes their numbers. In the tokenizer returned they are ordinary pieces.
    """
    texts = list(texts)
    tokenizer = wordpiece({"[UNK]": 0}, lowercase=True)
    counts = Counter()
    for text in texts:
        counts.update(tokenizer.normalizer.normalize_str(text))
    most_frequent = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:1000]
    letters = sorted(letter for letter, _ in most_frequent if not letter.isspace())
    fixed = [*SPECIALS, *letters, *("##" + letter for letter in letters)]
    trainer = trainers.WordPieceTrainer(vocab_size=vocab_size, special_tokens=fixed, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return wordpiece(tokenizer.get_vocab(), lowercase=True)


def own_tokenizer(datasets, cache=CACHE, most=300_000):
    """train_tokenizer on every k-th text, k = max(1, rows // most). Cached if all datasets' columns are on disk."""
    every = max(1, sum(len(dataset.text) for dataset in datasets) // most)
    texts = itertools.islice(itertools.chain.from_iterable(dataset.parts() for dataset in datasets), 0, None, every)
    if any(dataset.folder is None for dataset in datasets):
        return train_tokenizer(texts)

    def make(folder):
        (folder / "tokenizer.json").write_text(train_tokenizer(texts).to_str(), encoding="utf-8")

    key = cache_key([str(dataset.folder) for dataset in datasets])
    folder = make_once(Path(cache) / f"words-{key}", make)
    return tokenizer_from_json((folder / "tokenizer.json").read_text(encoding="utf-8"))


def read_tokenizer(path):
    """Tokenizer from a BERT vocab.txt or a tokenizer.json. UserError if the file is missing, unreadable, lacks one of
    SPECIALS, does not give [PAD] id 0, which pads a Batch, or leaves ids out."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; give a BERT vocab.txt or a tokenizer.json")
    try:
        text = path.read_bytes().decode("utf-8-sig")
        if path.suffix == ".json":
            tokenizer = tokenizer_from_json(text)
            tokenizer.no_padding()  # some files ask for padding and truncation; here encode_texts cuts, collate pads
            tokenizer.no_truncation()
        else:
            tokenizer = tokenizer_from_vocab(text)
        tokenizer.encode("\u16a0\u16b1 ?")  # fails where the piece for unknown words is not in the vocabulary
    except Exception as error:  # noqa: BLE001 (tokenizers raises plain Exception)
        raise UserError(f"{path}: not a tokenizer ({error}); give a BERT vocab.txt or a tokenizer.json") from None
    if any(tokenizer.token_to_id(name) is None for name in SPECIALS) or tokenizer.token_to_id("[PAD]") != 0:
        raise UserError(f"{path}: needs {', '.join(SPECIALS)}, [PAD] first; is it a BERT vocabulary?")
    ids = tokenizer.get_vocab().values()
    if max(ids) + 1 != tokenizer.get_vocab_size():
        raise UserError(f"{path}: its largest id is {max(ids)}, but it has {len(ids)} pieces; number them from 0")
    return tokenizer


def tokenizer_from_vocab(text):
    """Tokenizer of a vocab.txt: one piece a line, its id the line's number N from 0. A blank line becomes the piece
    [blank N], and so does a line that is repeated further down. So there are as many pieces as lines. The tokenizer
    is cased if a piece has a capital letter. It strips accents if it is uncased and no piece has an accent."""
    lines = text.removesuffix("\n").split("\n")  # not splitlines(), which also cuts at U+2028 and U+0085
    vocab = {}
    for number, line in enumerate(lines):
        piece = line.removesuffix("\r")
        if not piece:
            piece = f"[blank {number}]"
        if piece in vocab:
            vocab[f"[blank {vocab[piece]}]"] = vocab[piece]
        vocab[piece] = number
    words = [piece for piece in vocab if not piece.startswith("[")]
    cased = any(word != word.lower() for word in words)
    letters = unicodedata.normalize("NFD", "".join(words))
    accents = any(unicodedata.category(letter) == "Mn" for letter in set(letters))
    tokenizer = wordpiece(vocab, lowercase=not cased, strip_accents=not cased and not accents)
    # so that a text which holds "[MASK]" gets that one piece
    tokenizer.add_special_tokens([piece for piece in SPECIALS if piece in vocab])
    return tokenizer


def tokenizer_from_json(text):
    """The tokenizer of a tokenizer.json's text, or of what `tokenizer.to_str()` wrote into a checkpoint."""
    return Tokenizer.from_str(text)


# ---- batches ----------------------------------------------------------------------------------------------------------


def random_stream(purpose, *numbers):
    """The random numbers of one purpose, such as ("masks", seed, step, part): a NumPy Generator.

    A draw depends on these numbers alone, so that a resumed run goes on with the same ones. Initial weights, dropout and
    the negatives of `nce` are drawn by torch instead. The name and the count of the numbers are part of the seed,
    because NumPy gives default_rng((3, 5)) and default_rng((3, 5, 0)) the same numbers.
    """
    tag = zlib.crc32(purpose.encode())
    return np.random.default_rng([tag, len(numbers), *numbers])


def batches(lengths, rng=None, *, size, rank=0, world=1):
    """List of index arrays, `size` examples of like lengths each.

    lengths: (E,), or (E,P) for P sequences that are padded separately, as words and regions: sorted by the first, then
    by the next. rng: examples are shuffled, then sorted by length within chunks of 50 batches, and the batches are
    shuffled. None: all examples in order of length. rank r of `world` takes batches r::world.
    """
    lengths = np.atleast_2d(np.transpose(lengths)).T  # (E,P); (E,) becomes (E,1)
    order = np.arange(len(lengths))
    chunk = max(1, len(lengths))  # at least 1, also for no examples: range() takes no step of 0
    if rng is not None:
        order = rng.permutation(len(lengths))
        chunk = 50 * size
    for start in range(0, len(order), chunk):
        part = order[start : start + chunk]
        by_length = np.lexsort(lengths[part].T[::-1])  # of lexsort's keys the last one counts most
        order[start : start + chunk] = part[by_length]
    groups = [order[start : start + size] for start in range(0, len(order), size)]
    if rng is not None:
        groups = [groups[i] for i in rng.permutation(len(groups))]
    return groups[rank::world]


def collate(dataset, index, images=None, answers=None, fields=(), rng=None):
    """Batch of the texts of examples `index` (E,) beside the pictures in store rows `images` (B,) (None: their own).
    An example has `dataset.group` rows, so B = E * group.

    answers: {answer: column} for the soft targets (E,A); answers that it lacks are left out, so a row may be all zero.
    fields: what to read of the regions besides features and boxes.   rng: in split train each row shows its picture or
    one of the crops that the store has of it, drawn at random; None: the picture. Encode the dataset first.
    """
    rows = dataset.rows_of(index)
    own_images = dataset.image[rows]
    if images is None:
        images = own_images
    matched = images == own_images
    shown = images
    if rng is not None and dataset.split == "train":
        shown = dataset.store.draw_crops(images, rng)
    mask, positions = ragged(dataset.offsets, rows)  # (B,T)
    text = np.zeros(mask.shape, np.int64)
    text[mask] = dataset.tokens[positions]
    segments = np.zeros(mask.shape, np.int64)
    segments[mask] = dataset.segment[positions]
    targets = None
    if answers is not None:
        targets = torch.zeros(len(index), len(answers))
        for row, example in enumerate(index):
            for answer, score in dataset.answer[example].items():
                if answer in answers:
                    targets[row, answers[answer]] = score
    return Batch(
        text=torch.from_numpy(text),
        text_mask=torch.from_numpy(mask),
        segments=torch.from_numpy(segments),
        matched=torch.from_numpy(matched.astype(np.int64)),
        answers=targets,
        task=torch.full((len(rows),), dataset.task_number),
        pictures=torch.from_numpy(np.array(images)),
        pair_index=torch.from_numpy(np.flatnonzero(matched)),
        ids=[dataset.ids[i] for i in index],
        **dataset.store.gather(shown, fields),
    )


def sample_mismatches(dataset, index, rng, p=0.5, replace="image"):
    """Pairs for image-text matching: with probability p the picture (replace="text": the sentence) becomes that of
    another example. Returns examples (B,) and store rows (B,), for collate, which sees which pairs match.
    ValueError if the dataset has a single picture.

    A text and a picture that any example pairs are never a mismatch (`belong_together`). A pair stays true if 100
    draws find no mismatch. Pictures are drawn from the whole dataset, sentences from the batch: their lengths are alike
    there, and a long one from elsewhere would pad all others. (A batch of one picture takes them from the dataset.)
    """
    assert replace in ("image", "text")
    index = np.asarray(index)
    images = dataset.image[index]
    again = rng.random(len(index)) < p  # (B,) bool, True = a mismatch is still to be drawn
    if again.any() and not dataset.has_several_pictures:
        raise ValueError("a mismatch needs at least two pictures")
    from_batch = replace == "text" and (images != images[0]).any()
    other = index.copy()
    for _ in range(100):
        if not again.any():
            break
        if from_batch:
            other[again] = index[rng.integers(len(index), size=again.sum())]
        else:
            other[again] = rng.integers(len(dataset), size=again.sum())
        if replace == "text":
            again &= dataset.belong_together(other, images)
        else:
            again &= dataset.belong_together(index, dataset.image[other])
    other[again] = index[again]  # these pairs stay true
    if replace == "text":
        return other, images
    return index, dataset.image[other]


def join_pictures(batch):
    """Rows 2i and 2i+1, the same text with two pictures, as one row with the regions of both: (2B,N,...) -> (B,2N,...).
    All other fields are those of row 2i, but target and ids, which have one entry an example and stay."""
    both = dataclasses.replace(batch, ids=None, target=None)
    left = both.select(torch.arange(0, len(batch.text), 2))
    right = both.select(torch.arange(1, len(batch.text), 2))
    joined = {"target": batch.target, "ids": batch.ids}
    for name in ("features", "boxes", "region_mask", "region_types", *STORED):
        if getattr(left, name) is not None:
            joined[name] = torch.cat([getattr(left, name), getattr(right, name)], 1)  # (B,N,...) -> (B,2N,...)
    return dataclasses.replace(left, **joined)


# ---- what is to be predicted ------------------------------------------------------------------------------------------


def mask_words(batch, tokenizer, rng, p=0.15, mask=0.8, random=0.1, only=None, force_one=True, one=False):
    """BERT's masking: each piece is selected with probability p; a selected one becomes [MASK] with probability
    `mask`, a random piece with probability `random`, and stays itself otherwise. Special pieces are never selected.

    rng: numpy Generator.   only: (V,) bool, True = may be selected.   force_one: in a row with nothing selected the
    first selectable piece becomes [MASK] (UNITER's rule: no row without a loss).   one: p, mask and random are ignored;
    exactly one selectable piece of each row, uniformly drawn, becomes [MASK] (for evaluation).
    Returns a new Batch with text, word_index and word_labels set; the given one keeps its tensors.
    """
    ordinary = torch.ones(tokenizer.get_vocab_size(), dtype=torch.bool)  # (V,)
    ordinary[[tokenizer.token_to_id(name) for name in SPECIALS]] = False
    allowed = ordinary
    if only is not None:
        allowed = ordinary & only
    candidates = batch.text_mask & allowed[batch.text]  # (B,T)
    draw, fate = torch.from_numpy(rng.random((2, *batch.text.shape)))  # (B,T) each, in 0..1
    if one:
        lowest = draw.masked_fill(~candidates, 2.0)
        selected = candidates & (lowest == lowest.min(1, keepdim=True).values)
        masked = selected
        swapped = torch.zeros_like(selected)
    else:
        selected = candidates & (draw < p)
        masked = selected & (fate < mask)
        swapped = selected & (fate >= mask) & (fate < mask + random)
        if force_one:
            first = candidates & (candidates.cumsum(1) == 1) & ~selected.any(1, keepdim=True)  # (B,T)
            selected = selected | first
            masked = masked | first
    text = batch.text.masked_fill(masked, tokenizer.token_to_id("[MASK]"))
    pieces = ordinary.nonzero()[:, 0]
    text[swapped] = pieces[torch.from_numpy(rng.integers(len(pieces), size=int(swapped.sum())))]
    word_index = selected.flatten().nonzero()[:, 0]  # (M,) into B*T
    word_labels = batch.text.flatten()[word_index]
    return dataclasses.replace(batch, text=text, word_index=word_index, word_labels=word_labels)


def mask_regions(batch, rng, p=0.15, zero=1.0, random=0.0, force_one=True):
    """Each real region is selected with probability p; a selected one's feature becomes 0 with probability `zero`, that
    of a random real region of the batch with probability `random`, and stays itself otherwise. Boxes stay.

    rng: numpy Generator.   force_one: in a row where none was drawn one random region is selected and set to 0.
    Returns a new Batch with features, clean_features, masked_regions and region_index set.
    """
    draw, fate = torch.from_numpy(rng.random((2, *batch.region_mask.shape)))  # (B,N) each, in 0..1
    selected = batch.region_mask & (draw < p)
    zeroed = selected & (fate < zero)
    swapped = selected & (fate >= zero) & (fate < zero + random)
    if force_one:
        lowest = draw.masked_fill(~batch.region_mask, 2.0)
        lowest = lowest == lowest.min(1, keepdim=True).values  # a uniform choice, as the draws are
        first = lowest & batch.region_mask & ~selected.any(1, keepdim=True)  # (B,N)
        selected = selected | first
        zeroed = zeroed | first
    features = batch.features.masked_fill(zeroed[..., None], 0)  # (B,N,1) -> (B,N,F)
    real = batch.region_mask.flatten().nonzero()[:, 0]  # (real regions,) into B*N
    donors = real[torch.from_numpy(rng.integers(len(real), size=int(swapped.sum())))]  # (swapped,)
    features[swapped] = batch.features.flatten(0, 1)[donors]  # (swapped, F), not masked
    return dataclasses.replace(
        batch,
        features=features,
        clean_features=batch.features,
        masked_regions=selected,
        region_index=selected.flatten().nonzero()[:, 0],  # (M,) into B*N
    )


def remove_modality(batch, what):
    """The batch, changed in place, without what --ablate names. "image": region_mask becomes False, features and boxes
    0. "text": only [CLS] and the last [SEP] are left. None: the batch as it is."""
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


def drop_mismatched_labels(batch):
    """Mismatched pairs lose their labels: their masked words and regions stay masked but are not predicted, because the
    other modality tells nothing about them. Returns a new Batch."""
    kept = {"predict_rows": batch.matched == 1}
    if batch.word_index is not None:
        keep = batch.matched[batch.word_index // batch.text.shape[1]] == 1  # (M,): rows of flat positions in (B,T)
        kept["word_index"] = batch.word_index[keep]
        kept["word_labels"] = batch.word_labels[keep]
    if batch.region_index is not None:
        keep = batch.matched[batch.region_index // batch.region_mask.shape[1]] == 1  # (M,), of positions in (B,N)
        kept["region_index"] = batch.region_index[keep]
    return dataclasses.replace(batch, **kept)


def sample_answers(batch, rng):
    """One answer a row, drawn in proportion to the soft scores in `answers`; -1 where all are 0. Sets answer_labels."""
    rising = batch.answers.double().cumsum(1)  # (B,A)
    draw = torch.from_numpy(rng.random((len(rising), 1))) * rising[:, -1:]
    labels = (rising <= draw).sum(1).masked_fill(rising[:, -1] == 0, -1)
    return dataclasses.replace(batch, answer_labels=labels)


def next_word_labels(batch):
    """Labels of captioning: word_index (M,), flat positions of all pieces but the last of each row; word_labels (M,),
    the piece after each of them. Returns a new Batch."""
    followed = torch.nn.functional.pad(batch.text_mask[:, 1:], (0, 1))  # (B,T)
    word_index = followed.flatten().nonzero()[:, 0]  # (M,) into B*T
    return dataclasses.replace(batch, word_index=word_index, word_labels=batch.text.flatten()[word_index + 1])


# ---- command line -----------------------------------------------------------------------------------------------------


def describe(source, task, cache=CACHE):
    """The .jsonl file of a task in a data set, the splits that its lines may name, and what its dataset.json says."""
    description = read_dataset_json(find(source, cache))
    return task_file(description, task.name), [*SPLITS, *description["extra_splits"]], description


def check(source, task, vocab, max_words, patch, grid):
    """Prints what a data set holds, and returns 0. Or prints its first twenty mistakes, and raises UserError."""
    from prepare import networks  # here, since both import this file

    path, splits, description = describe(source, task)
    mistakes = Mistakes(task)
    columns, pictures = read_columns(path, task, splits, patch, grid, mistakes)
    problem = None
    try:
        if not mistakes.count:
            make_columns(path, task, splits, patch, grid, CACHE)
    except UserError as error:
        problem = error
    if problem or mistakes.count:
        for _ in pictures.extracted(path, mistakes, []):  # the pictures of the lines that are right
            pass
        if not mistakes.count:
            mistakes.add(problem)
        print(*mistakes.lines(), sep="\n", file=sys.stderr)
        raise UserError(f"{path}: mistakes: {mistakes.count}; listed above: {len(mistakes.different)}")
    sets = {split: load(source, task, split, None, patch, grid, checked=True) for split in splits if split in columns}
    if "train" not in sets:  # else `load` has printed them
        print_warnings(next(iter(sets.values())), path)
    print_contents(path, sets)
    first = first_record(path)
    if not (description["regions"] or "features" in first or "boxes" in first) and networks.best_installed():
        print(f"these are raw pixels; train.py takes features of {networks.best_installed()}, unless told otherwise")
    print_shared_pictures(sets)
    print_unknown_answers(sets)
    if "train" in sets and task.pictures == 1 and not task.needs:
        repeated = sets["train"].repeated_texts()
        if repeated:
            print(f"{repeated} examples of train have a text that another picture has too; "
                  "the two are never taken for a mismatched pair")  # fmt: skip
    if description["vocab"] and not vocab:
        vocab = description["folder"] / description["vocab"]
    if vocab or "train" in sets:
        tokenizer = read_tokenizer(vocab) if vocab else own_tokenizer([sets["train"]])
        print(describe_lost_text([dataset.encode(tokenizer, max_words) for dataset in sets.values()]))
    return 0


def print_contents(path, sets):
    """Counts of examples, pictures, regions and answers."""
    counts = ", ".join(f"{len(dataset)} {split}" for split, dataset in sets.items())
    pictures = {(str(dataset.store.folder), row) for dataset in sets.values() for row in np.unique(dataset.image)}
    answers = set()
    for dataset in sets.values():
        answers.update(answer_list(dataset))
    store = next(iter(sets.values())).store
    widths = {dataset.store.width for dataset in sets.values()}
    if len(widths) > 1:
        found = " and ".join(map(str, sorted(widths)))
        raise UserError(f"{path}: its splits have features of widths {found}; use one kind")
    regions = f"{store.offsets[-1] / len(store):.1f} regions of {store.width} numbers each"
    total = sum(map(len, sets.values()))
    of_answers = f", {len(answers)} answers" if answers else ""
    print(f"{path}: {total} examples ({counts}), {len(pictures)} pictures, {regions}{of_answers}")


def preview(source, task, out, split, count):
    """Draws a sheet of `count` examples: pictures with their regions' boxes, text and answer."""
    from prepare.preview import draw_sheet  # here, since both import this file
    from support import drawing

    path, splits, _ = describe(source, task)
    if Path(out).exists():
        refuse_overwriting("--out", out, files_named(Path(out).name, path, task, splits))
    sheet = draw_sheet(path, task, splits, split, count)
    drawing.save(sheet, Path(out), "--out")
    print(f"{out}: {sheet.width} x {sheet.height} pixels, of {path}")
    return 0


def parse(argv):
    """The command line."""
    import tasks  # here, since tasks.py imports this file

    parser = Parser(prog="data.py", description="Check a data set, or look at it. Options: data.py check --help")
    commands = parser.add_subparsers(dest="command", required=True)
    check_command = commands.add_parser("check", help="list what is wrong with a data set, else count what is in it")
    preview_command = commands.add_parser("preview", help="draw a sheet of examples: pictures with boxes, text, answer")
    for command in (check_command, preview_command):
        command.add_argument("source", help="a .jsonl file, a folder with dataset.json, scenes or charts")
        command.add_argument("--task", choices=list(tasks.TASKS), default="pretrain", help="(default: pretrain)")
    add = check_command.add_argument
    add("--patch", type=COUNT, default=12, help="as for train.py (default: 12)")
    add("--grid", type=COUNT, default=6, help="as for train.py (default: 6)")
    add("--vocab", help="a BERT vocab.txt or tokenizer.json (default: the data set's own)")
    add("--max-words", type=in_range(int, 8), default=60, help="as for train.py (default: 60)")
    preview_command.add_argument("--out", default="preview.png", help="the picture (default: preview.png)")
    preview_command.add_argument("--split", default="train", help="(default: train)")
    preview_command.add_argument("--count", type=COUNT, default=6, help="examples, one a picture (default: 6)")
    args = parser.parse_args(argv)
    args.task = tasks.TASKS[args.task]
    return vars(args)


def main(argv=None):
    """check or preview. Exit code 0, or 2 with what is wrong on stderr."""
    from support.log import safe_output  # here, since support/log.py imports this file

    with safe_output():
        try:
            options = parse(argv)
            if options.pop("command") == "check":
                return check(**options)
            return preview(**options)
        except (UserError, OSError, ValueError) as error:  # ValueError: Pillow does not know a suffix
            print(f"data.py: {UserError(str(error))}", file=sys.stderr)  # on one line
            return 2


if __name__ == "__main__":
    # tasks.py imports `data`, so this file would be loaded a second time, with other classes than those of __main__
    import data

    sys.exit(data.main())
