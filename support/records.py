"""Records: from lines of JSONL to columns on disk.

    lines of JSONL -> records            read_records: every mistake with its line number
    the pictures that records name       Pictures
    records -> columns                   read_columns, make_columns

Knows no task by name. `task` is a row of tasks.TASKS, whose name, needs, truth, prompt and so on are read.
"""

import codecs
import difflib
import hashlib
import itertools
import json
import os
import re
import shutil
import time
import unicodedata
from array import array
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from common import UserError
from support.regions import (
    STORED,
    FeatureStore,
    PictureJob,
    cache_key,
    check_boxes,
    file_stamp,
    make_once,
    odd_boxes,
    open_picture,
    parallel,
    picture_regions,
    picture_size,
    print_notes,
    show_progress,
    warn,
    write_store,
)

# ---- lines of JSONL ---------------------------------------------------------------------------------------------------


def is_text(value):
    """Whether a value is a string with a visible character: a tokenizer drops blanks and invisible ones. A string with
    NUL is no text, because Strings separates segments by it."""
    if not isinstance(value, str) or "\0" in value:
        return False
    # categories C: control, format, unassigned; Z: separators
    return any(unicodedata.category(letter)[0] not in "CZ" for letter in value)


def is_texts(value, least=1):
    """A list of at least `least` such strings."""
    return isinstance(value, list) and len(value) >= least and all(map(is_text, value))


def is_names(value):
    """A list of names that can be names of folders."""
    return isinstance(value, list) and all(isinstance(name, str) and re.fullmatch(r"[\w-]+", name) for name in value)


def is_number(value):
    """A finite number of a sensible size."""
    return type(value) in (int, float) and abs(value) <= 1e9  # False for NaN


def is_box(value):
    """Four numbers; their order is checked where the picture is known."""
    return isinstance(value, list) and len(value) == 4 and all(map(is_number, value))


def is_boxes(value):
    """At least one box."""
    return isinstance(value, list) and len(value) > 0 and all(map(is_box, value))


def is_answer(value):
    """One answer, or soft scores {answer: 0..1}."""
    if not isinstance(value, dict):
        return is_text(value)
    scores = all(is_number(score) and 0 <= score <= 1 for score in value.values())
    return len(value) > 0 and all(map(is_text, value)) and scores


def is_file_or_two(value):
    """A file name, or a list of two."""
    return is_text(value) or (is_texts(value) and len(value) == 2)


KEYS = {  # key: test of its value, what to write
    "image": (is_text, "a file name"),
    "images": (lambda value: is_texts(value) and len(value) == 2, "a list of two file names"),
    "features": (is_file_or_two, "an .npz file or a row of a store, as regions#17 (nlvr2: a list of two)"),
    "boxes": (is_boxes, "[[x1,y1,x2,y2],...] in pixels"),
    "text": (is_text, "a string that is not empty"),
    "answer": (is_answer, "a string, or {string: score in 0..1}"),
    "label": (
        lambda value: type(value) in (bool, int),
        "true or false (nlvr2), or the index of the right choice (vcr)",
    ),
    "choices": (lambda value: is_texts(value, 2), "a list of at least two strings"),
    "reasons": (lambda value: is_texts(value, 2), "a list of at least two strings"),
    "reason": (lambda value: type(value) is int, "the index of the right one of 'reasons'"),
    "target": (is_box, "[x1,y1,x2,y2] in pixels"),
    "split": (is_text, "train, val or test"),
    "kind": (is_text, "a word for the sort of question; accuracy is given for each sort"),
    "id": (lambda value: is_text(value) or type(value) is int, "a string or a whole number"),
}
# read as `id`, in any case and with or without _: question_id, questionId, ID
ID_KEYS = ("questionid", "captionid", "sentid", "sentenceid", "annotid", "annotationid", "pairid", "qid", "uid", "id")
KEY_ALIASES = {  # what other data sets call our keys
    "text": ("question", "caption", "sentence", "statement", "expression", "hypothesis", "prompt"),
    "image": ("img", "image_path", "file_name", "filename", "picture", "path"),
    "answer": ("answers", "gold_label"),
    "boxes": ("bboxes",),
    "target": ("box", "bbox"),
    "choices": ("options", "answer_choices"),
    "reasons": ("rationales", "rationale_choices"),
    "kind": ("type", "question_type", "answer_type"),
}
LINE_BYTES = 2**20  # of a line; longer ones are no examples, and would fill the memory
PROMPT_COLUMN = re.compile(r"\{([^{}]+)\}")
STORE_ROW = re.compile(r"(.+)#(\d{1,12})")  # regions#17: row 17 of the store in folder regions


class Mistakes:
    """The mistakes in a file's lines for a task. Twenty different ones are kept, and how often each occurs."""

    def __init__(self, task):
        self.task = task
        self.different = {}  # what is wrong -> [the first such mistake, how many there are]
        self.count = 0  # of all

    def add(self, text):
        """text: "WHERE: what is wrong"."""
        self.count += 1
        _, _, what = str(text).partition(": ")
        if what in self.different:
            self.different[what][1] += 1
        elif len(self.different) < 20:
            self.different[what] = [str(text), 1]

    def lines(self):
        """One line for each mistake that is kept."""
        found = []
        for first, count in self.different.values():
            if count > 1:
                first += f" (the same in {count - 1} more)"
            found.append(first)
        return found

    def stop(self, path):
        """UserError if there are any."""
        if self.count == 0:
            return
        hint = ""
        if len(self.different) > 1:
            hint = f" (mistakes in all: {self.count}"
            if not self.task.prompt:  # which the command does not know
                hint += f"; `python data.py check {path} --task {self.task.name}` lists them"
            hint += ")"
        raise UserError(self.lines()[0] + hint)


def bounded_lines(file):
    """The lines of a file opened in binary mode, in pieces of at most LINE_BYTES + 1 bytes: a longer line comes as
    several."""
    return iter(lambda: file.readline(LINE_BYTES + 1), b"")


def read_records(path, task, splits, mistakes):
    """Yields ("FILE:LINE", record) for each right line; what is wrong with the others goes to `mistakes`.

    A record is the line's object with `split` and `id` filled in, texts in Unicode's NFC, `answer` as {text: score}.
    Opens no picture. task: a row of tasks.TASKS.
    """
    with open(path, "rb") as file:
        for number, line in enumerate(bounded_lines(file), 1):
            where = f"{path}:{number}"
            if len(line) > LINE_BYTES:
                raise UserError(f"{where}: this line has more than {LINE_BYTES:,} bytes; write one object a line")
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in line:
                raise UserError(f"{where}: this is UTF-16 or no text at all; save the file as UTF-8")
            if not line.strip():
                continue
            try:
                record = parse_line(line)
                if task.prompt:
                    fill_prompt(record, task.prompt)
                check_record(record, task, splits)
                record.setdefault("text", "")
                record.setdefault("id", f"{path.name}:{number}")
                normalize_record(record)
                problem = task.check(record)
                if problem:
                    raise UserError(problem)
            except UserError as error:
                mistakes.add(f"{where}: {error}")
            else:
                yield where, record


def parse_line(line):
    """The JSON object of a line (bytes). UserError without the line's number."""
    try:
        text = line.decode("utf-8")
        record = json.loads(text, object_pairs_hook=unique_keys)
        if "\\u" in text:
            json.dumps(record, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"not UTF-8 (byte {error.start + 1} of the line); save the file as UTF-8") from None
    except UnicodeEncodeError:
        raise UserError(r"holds half a character, as \ud83d alone; write the character itself") from None
    except RecursionError:
        raise UserError("not JSON that can be read: nested too deeply") from None
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"not JSON ({error}); {hint_for(text.strip())}") from None
    if not isinstance(record, dict):
        raise UserError('not an object; write {"image": ..., "text": ...}')
    return record


def hint_for(text):
    """What to do about a line that is not JSON."""
    if text.startswith("{") and text.endswith("},"):
        return "leave out the comma at its end: a file of lines is no list"
    if text.startswith(("{", "[", "]")):
        return "write one object a line, without line breaks in it, and no list around them"
    return "write one object a line; docs/your_data.md has a command that converts CSV"


def fill_prompt(record, prompt):
    """Makes the text of a record from a prompt, in place: {column} becomes what the line has under that key. Columns
    that are no keys of ours are then dropped, but for one that may be the id. UserError if the line has no such key."""
    columns = PROMPT_COLUMN.findall(prompt)
    for column in columns:
        if column not in record:
            raise UserError(f"--prompt: the line has no key {column!r}; it has {', '.join(record)}")
        if not isinstance(record[column], (str, int, float)):
            raise UserError(f"--prompt: {column!r} is {str(record[column])[:60]}, neither text nor a number")
    text = PROMPT_COLUMN.sub(lambda match: str(record[match[1]]), prompt)  # once: a value may hold braces itself
    for column in columns:
        if column not in KEYS and column in record:
            value = record.pop(column)
            is_valid, _ = KEYS["id"]
            if is_id(column) and is_valid(value):
                record.setdefault("id", value)
    record["text"] = text


def as_json(value):
    """A value as it stands in a file, cut to 60 characters: a number without quotes, a string with them."""
    return json.dumps(value, ensure_ascii=False)[:60]


def unique_keys(pairs):
    """A JSON object as a dict; UserError if a key stands in it twice."""
    record = dict(pairs)
    if len(record) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise UserError(f"key {twice[:60]!r} stands twice")
    return record


def is_id(key):
    """Whether a key is read as `id`."""
    return key.lower().replace("_", "") in ID_KEYS


def check_record(record, task, splits):
    """UserError, without the line's number, where a key or its value is not as KEYS has it or the task needs it."""
    for key in list(record):
        if key not in KEYS and is_id(key) and "id" not in record:
            record["id"] = record.pop(key)
    for key, value in record.items():
        if key not in KEYS:
            raise UserError(f"unknown key {key[:60]!r}; {suggestion(key)}")
        is_valid, wanted = KEYS[key]
        if not is_valid(value):
            raise UserError(f"{key!r} is {as_json(value)}; write {wanted}")
    needs = task.needs if task.text_is_optional else ("text", *task.needs)
    for key in needs:
        if key not in record:
            hint = "; predict.py takes lines without it" if key == task.truth else ""
            raise UserError(f"key {key!r} is missing; task {task.name} needs it: {KEYS[key][1]}{hint}")
    if record.get("split", "train") not in splits:
        raise UserError(f"'split' is {record['split'][:60]!r}; write {', '.join(splits[:-1])} or {splits[-1]}")
    sources = [key for key in ("image", "images", "features") if key in record]
    if len(sources) != 1:
        raise UserError("give one of 'image', 'images' and 'features', and only one")
    source = sources[0]
    if len(picture_names(record)) != task.pictures:
        wanted = "one file: 'image' or 'features'"
        if task.pictures == 2:
            wanted = "two files: 'images', or 'features' as a list"
        raise UserError(f"{source!r} does not fit; {task.name} takes {wanted}")
    if "boxes" in record and source != "image":
        raise UserError(f"'boxes' goes with 'image' only, not with {source!r}")


def suggestion(key):
    """What to write in place of an unknown key."""
    if is_id(key):
        return "the line has an id already; leave one of them out"
    for meant, names in KEY_ALIASES.items():
        if key.lower() in names:
            return f"did you mean {meant}?"
    near = difflib.get_close_matches(key, KEYS, 1, 0.5)
    if near:
        return f"did you mean {near[0]}?"
    return f"choose from {', '.join(KEYS)}"


def picture_names(record):
    """The one or two files, or rows of a store, that a record names."""
    for key in ("image", "images", "features"):
        if key in record:
            names = record[key]
    return names if isinstance(names, list) else [names]


def normalize_record(record):
    """Fills in `split`, makes `id` a string, texts NFC and `answer` {text: score}, in place."""
    record.setdefault("split", "train")
    record["id"] = str(record["id"])
    record["text"] = normalize_text(record["text"])
    for key in ("choices", "reasons"):
        if key in record:
            record[key] = [normalize_text(text) for text in record[key]]
    if "answer" in record:
        answers = record["answer"]
        if isinstance(answers, str):
            answers = {answers: 1.0}
        record["answer"] = {}
        for text, score in answers.items():
            text = normalize_answer(text)
            record["answer"][text] = min(1.0, record["answer"].get(text, 0.0) + float(score))


def normalize_text(text):
    """Composed characters (NFC), so that the same letter is always the same."""
    return unicodedata.normalize("NFC", text)


def lost_text(lost):
    """What texts lose as word pieces, in one line; "" if nothing. lost: `Dataset.lost` of one or several datasets."""
    pieces, unknown, cut = np.sum(lost, axis=0)
    parts = []
    if unknown:
        parts.append(f"{unknown} of {pieces} word pieces are unknown")
    if cut:
        parts.append(f"{cut} of {pieces} word pieces are cut off, since texts are too long")
    return "; ".join(parts)


def normalize_answer(text):
    """Answers are compared in lower case, without outer blanks and the full stop: " Yes. " and "yes" are one."""
    text = " ".join(normalize_text(text).lower().split())
    return text.rstrip(".").rstrip() or text


NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
SYNONYMS = {"grey": "gray", **{word: str(number) for number, word in enumerate(NUMBERS, 1)}}


def normalize_lxmert_answer(text):
    """LXMERT's normalisation: lower case, without one final period and one of each article, in the order a, an, the.
    Then "one" to "ten" become digits and "grey" becomes "gray" (SYNONYMS)."""
    text = text.lower()
    if text.endswith("."):
        text = text[:-1].strip()
    for article in ("a ", "an ", "the "):
        text = text.removeprefix(article)
    return SYNONYMS.get(text, text)


def leaves_folder(name):
    """True if a file name leads out of the folder that it is relative to."""
    return Path(name).is_absolute() or ".." in Path(name).parts


class Pictures:
    """The pictures that the lines of a file name, each once: rows of existing feature stores, or jobs for a new store.

    network: `regions` of a dataset.json, where a network makes the regions, on `device`; None: they are cut out of the
    picture.
    """

    def __init__(self, folder, patch, grid, network=None, device=None):
        self.folder = folder
        self.patch = patch
        self.grid = grid
        self.network = network
        self.device = device
        self.jobs = []  # row i of the store to be made is that of job i
        self.uses = []  # of each job: how many lines have this picture with these boxes
        self.rows = {}  # (name, boxes as JSON) -> row of the store to be made
        self.sizes = {}  # path -> (width, height)
        self.stores = {}  # name -> FeatureStore
        self.outside = 0  # pictures and stores outside of the file's folder

    def find(self, where, record):
        """(name of the store, rows in it, one for each picture); the new store has the name "". UserError if a
        file or row does not exist."""
        found = []
        for name in picture_names(record):
            match = STORE_ROW.fullmatch(name)
            if "features" in record and match:
                found.append((match[1], self.find_row(match[1], int(match[2]))))
            else:
                found.append(("", self.find_file(where, name, record.get("boxes"))))
        names = {name for name, _ in found}
        if len(names) > 1:
            raise UserError("'features' names two stores; write both pictures into one")
        return names.pop(), [row for _, row in found]

    def find_row(self, name, row):
        if name not in self.stores:
            self.stores[name] = FeatureStore(self.folder / name)
            self.stores[name].check_values()
            self.outside += leaves_folder(name)
        if row >= len(self.stores[name]):
            raise UserError(f"'features': {name} has rows 0 to {len(self.stores[name]) - 1}, not {row}")
        return row

    def find_file(self, where, name, boxes):
        key = (name, json.dumps(boxes))
        if key not in self.rows:
            path = self.folder / name
            if not os.path.isfile(path):  # False also for a name that is too long, where Path.is_file raises
                raise UserError(f"'image' or 'features': no file {path}; paths are relative to the .jsonl file")
            self.outside += leaves_folder(name)
            self.rows[key] = len(self.jobs)
            self.jobs.append(PictureJob(where, path, boxes, self.patch, self.grid))
            self.uses.append(0)
        self.uses[self.rows[key]] += 1
        return self.rows[key]

    def scale_target(self, record, name, row):
        """The record's target cut to its picture, pixels -> 0..1. UserError if it lies outside."""
        if name:
            sizes = self.stores[name].sizes
            if sizes is None:
                raise UserError(f"'target': {name} has no sizes.npy; write the store with `size`")
            width, height = sizes[row].tolist()
        else:
            path = self.jobs[row].path
            if path not in self.sizes:
                self.sizes[path] = picture_size("'target'", path)
            width, height = self.sizes[path]
        (picture,) = picture_names(record)
        (box,) = check_boxes([record["target"]], width, height, picture, "target", np.float64)
        if odd_boxes(box[None], width, height):
            raise UserError("'target' looks normalised to 0..1; multiply it by width and height")
        return (box / [width, height, width, height]).tolist()

    def paths(self):
        """Every file that the columns depend on, except the JSONL file."""
        for job in self.jobs:
            yield job.path
        for name in self.stores:
            yield from sorted((self.folder / name).glob("*.npy"))

    def extract(self, path, cache, mistakes):
        """The store of all jobs, made unless it is in the cache. UserError where a picture is wrong."""
        key = [[*file_stamp(job.path), job.boxes, job.patch, job.grid] for job in self.jobs]
        if self.network:
            key.append(self.network)

        def make(folder):
            notes = []
            write_store(folder, self.extracted(path, mistakes, notes))
            mistakes.stop(path)
            (folder / "warnings.json").write_text(json.dumps(notes))

        return FeatureStore(make_once(Path(cache) / f"regions-{cache_key(key)}", make))

    def extracted(self, path, mistakes, notes):
        """Yields the regions of each job that is right, all with the same fields and widths."""
        first = None  # {field: shape of a row} of the first picture
        if self.network:
            from prepare import features  # here, since it imports this file

            regions_of = features.network_regions(self.jobs, self.network, self.device)
            results = show_progress(regions_of, len(self.jobs), f"{self.network['network']} of {path}")
        else:
            results = parallel(picture_regions, self.jobs, f"reading {path}")
        for job, uses, (regions, warned, mistake) in zip(self.jobs, self.uses, results, strict=True):
            notes += warned
            if mistake:
                if uses > 1:
                    mistake += f" (the same in {uses - 1} more places)"
                mistakes.add(mistake)
                continue
            shapes = {name: regions[name].shape[1:] for name in STORED if name in regions}
            if first is None:
                first = shapes
                first_path = job.path
            if shapes["features"] != first["features"]:
                mistakes.add(f"{job.where}: {job.path} has features {shapes['features'][0]} wide, {first_path} "
                             f"{first['features'][0]}; extract all alike")  # fmt: skip
            elif shapes != first:
                mistakes.add(f"{job.where}: {job.path}: 'labels' or 'probs' are not as in {first_path}; give them for all "
                             "pictures, equally wide, or for none")  # fmt: skip
            else:
                yield regions


# ---- columns on disk --------------------------------------------------------------------------------------------------
# What grows with the data is read once, checked, written column by column, and memory-mapped from then on.


def item_number(i, length):
    """i in 0..length - 1; a negative i counts from the end. IndexError if out of range, which also ends a loop."""
    if not -length <= i < length:
        raise IndexError(i)
    return i % length


class Strings(Sequence):
    """A list of texts on disk: item i is blob[offsets[i]:offsets[i+1]] in UTF-8. A text of several segments is a tuple
    of them; the blob has NUL between them."""

    def __init__(self, blob, offsets):
        self.blob = blob
        self.offsets = offsets

    def __len__(self):
        return len(self.offsets) - 1

    def __getitem__(self, i):
        i = item_number(i, len(self))
        text = self.blob[self.offsets[i] : self.offsets[i + 1]].tobytes().decode("utf-8")
        return tuple(text.split("\0")) if "\0" in text else text


class CategoricalColumn(Sequence):
    """A list of few different words on disk: item i is words[index[i]]."""

    def __init__(self, words, index):
        self.words = words
        self.index = index

    def __len__(self):
        return len(self.index)

    def __getitem__(self, i):
        return self.words[self.index[i]]


class Answers(Sequence):
    """A list of {answer: score} on disk: item i has answers words[index[k]], k = offsets[i] ... offsets[i+1] - 1."""

    def __init__(self, words, index, scores, offsets):
        self.words = words
        self.index = index
        self.scores = scores
        self.offsets = offsets

    def __len__(self):
        return len(self.offsets) - 1

    def __getitem__(self, i):
        i = item_number(i, len(self))
        answers = {}
        for k in range(self.offsets[i], self.offsets[i + 1]):
            answers[self.words[self.index[k]]] = float(self.scores[k])
        return answers

    def __iter__(self):
        if len(self.index) == 0:  # captions: millions of rows, none of them with an answer
            return itertools.repeat({}, len(self))
        return super().__iter__()

    def counts(self):
        """{answer: in how many rows it is}."""
        return dict(zip(self.words, np.bincount(self.index, minlength=len(self.words)).tolist(), strict=True))


class Columns:
    """The examples of one split while a file is read, in compact arrays."""

    def __init__(self, store):
        self.store = store  # the name of the store that all its pictures are in
        self.group = None  # rows of an example
        self.kinds = {}  # word -> its number
        self.answers = {}  # answer -> its number
        self.text = bytearray()
        self.ids = bytearray()
        self.arrays = {
            "text_offsets": array("q", [0]),
            "text_keys": array("q"),
            "ids_offsets": array("q", [0]),
            "image": array("q"),
            "kind": array("q"),
            "answer": array("q"),
            "answer_scores": array("d"),
            "answer_offsets": array("q", [0]),
        }
        self.targets = []

    def add(self, example, rows):
        """Adds an Example; rows[k] is the store's row of the line's picture k. UserError if it has another number of
        rows than the examples before."""
        if self.group is None:
            self.group = len(example.rows)
        if len(example.rows) != self.group:
            raise UserError(f"{len(example.rows)} choices, lines before have {self.group}; give all equally many")
        arrays = self.arrays
        for text, picture in example.rows:
            self.text += ("\0".join(text) if isinstance(text, tuple) else text).encode("utf-8")
            arrays["text_offsets"].append(len(self.text))
            arrays["text_keys"].append(text_key(text))
            arrays["image"].append(rows[picture])
        self.ids += example.id.encode("utf-8")
        arrays["ids_offsets"].append(len(self.ids))
        arrays["kind"].append(self.kinds.setdefault(example.kind, len(self.kinds)))
        for answer, score in (example.answer or {}).items():
            arrays["answer"].append(self.answers.setdefault(answer, len(self.answers)))
            arrays["answer_scores"].append(score)
        arrays["answer_offsets"].append(len(arrays["answer"]))
        self.targets.append(example.target)

    def save(self, folder, store_folder):
        folder.mkdir()
        for name, values in self.arrays.items():
            np.save(folder / f"{name}.npy", np.array(values))
        np.save(folder / "pairs.npy", np.sort(pair_keys(np.array(self.arrays["text_keys"]), self.arrays["image"])))
        np.save(folder / "text.npy", np.frombuffer(bytes(self.text), np.uint8))
        np.save(folder / "ids.npy", np.frombuffer(bytes(self.ids), np.uint8))
        targets = np.array(self.targets)
        if targets.max() >= 0:  # else the task has none
            np.save(folder / "target.npy", targets)
        rest = {
            "store": str(store_folder),
            "group": self.group,
            "kinds": list(self.kinds),
            "answers": list(self.answers),
        }
        (folder / "columns.json").write_text(json.dumps(rest))


def text_key(text):
    """An int64 that is equal for equal texts, whatever their case. text: a string, or a tuple of its segments."""
    return int.from_bytes(hashlib.blake2b(str(text).lower().encode("utf-8"), digest_size=8).digest(), signed=True)


def pair_keys(text_keys, images):
    """An int64 for each pair of a text and a picture, (B,) each; equal pairs have equal ones."""
    return text_keys ^ (np.asarray(images) * 0x1E3779B97F4A7C15)  # a large odd number: the product wraps around


PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")


def list_pictures(folder):
    """The picture files in a folder and its subfolders, by their endings, in order of their names. Hidden files are no
    pictures (macOS's ._IMG.jpg). Warns of files with other endings. UserError if the folder has lines of its own."""
    for lines in folder.glob("*.jsonl"):
        if not {"image", "images", "features"}.isdisjoint(first_record(lines)):  # else they are predictions
            raise UserError(f"--data {folder}: the folder has {lines.name}; give that file")
    pictures = []
    others = Counter()
    for path in sorted(folder.rglob("*")):
        if path.name.startswith("."):
            continue
        if path.suffix.lower() in PICTURE_SUFFIXES:
            pictures.append(path)
        elif path.is_file():
            others[path.suffix.lower() or "without ending"] += 1
    if not pictures:
        endings = ", ".join(PICTURE_SUFFIXES)
        raise UserError(f"--data {folder}: give a .jsonl file, a data set or a folder of pictures ({endings})")
    if others:
        counts = ", ".join(f"{count} {suffix}" for suffix, count in others.most_common())
        warn(f"{folder}: files that are passed over: {counts}; save pictures among them as JPEG or PNG")
    return pictures


def write_picture_lines(path, folder, pictures, **keys):
    """A JSONL file with a line for each picture of a folder: `id`, its name there, `image` and further keys."""
    with open(path, "w", encoding="utf-8") as file:
        for picture in pictures:
            record = {"id": str(picture.relative_to(folder)), "image": str(picture.resolve()), **keys}
            file.write(json.dumps(record) + "\n")


def picture_folder(folder, cache):
    """The JSONL file that stands for a folder of pictures, in the cache: a line of split test, without a text, for each
    picture that can be read. Warns of the others. UserError if there is none."""
    pictures = list_pictures(folder)
    key = cache_key(*map(file_stamp, pictures))

    def make(aside):
        mistakes = list(parallel(picture_mistake, pictures, f"looking at {folder}"))
        readable = [picture for picture, mistake in zip(pictures, mistakes, strict=True) if not mistake]
        if not readable:
            raise UserError(mistakes[0])
        write_picture_lines(aside / f"{folder.resolve().name}.jsonl", folder, readable, split="test")
        (aside / "left_out.json").write_text(json.dumps([mistake for mistake in mistakes if mistake]))

    made = make_once(Path(cache).resolve() / f"pictures-{key}", make)
    left_out = json.loads((made / "left_out.json").read_text())
    for mistake in left_out[:20]:
        warn(f"left out: {mistake}")
    if len(left_out) > 20:
        warn(f"left out: {len(left_out) - 20} more pictures that cannot be read")
    return next(made.glob("*.jsonl"))


def picture_mistake(path):
    """Why a picture cannot be read, or ""."""
    try:
        open_picture(path.parent, path)
    except UserError as error:
        return str(error)
    return ""


def count_lines(path):
    """How many lines a file has; 0 if it does not exist."""
    if not path.is_file():
        return 0
    with open(path, "rb") as file:
        return sum(chunk.count(b"\n") for chunk in iter(lambda: file.read(2**20), b""))


def files_named(name, path, task, splits):
    """The JSONL file and the pictures and feature files of its lines, those of them that have this name."""
    found = [path] if path.name == name else []
    for _, record in read_records(path, task, splits, Mistakes(task)):
        for file in picture_names(record):
            if os.path.basename(file) == name:
                found.append(path.parent / file)
    return found


def first_record(path):
    """The object of the first line of a JSONL file that is not blank, unchecked; {} if that cannot be read."""
    if not path.is_file():
        return {}
    with open(path, "rb") as file:
        for line in bounded_lines(file):
            line = line.removeprefix(codecs.BOM_UTF8)
            if not line.strip():
                continue
            try:
                return parse_line(line)
            except UserError:  # it is reported where all lines are read
                return {}
    return {}


def read_columns(path, task, splits, patch, grid, mistakes, network=None, device=None):
    """Reads and checks a JSONL file. Returns {split: Columns} and the Pictures that it names."""
    pictures = Pictures(path.parent, patch, grid, network, device)
    columns = {}
    for where, record in read_records(path, task, splits, mistakes):
        try:
            store, rows = pictures.find(where, record)
            if "target" in record:
                record["target"] = pictures.scale_target(record, store, rows[0])
            if record["split"] not in columns:
                columns[record["split"]] = Columns(store)
            part = columns[record["split"]]
            if part.store != store:
                raise UserError(f"split {record['split']} has pictures of {part.store or 'files'} and of "
                                f"{store or 'files'}; write them into one store")  # fmt: skip
            for example in task.examples(record):
                part.add(example, rows)
        except UserError as error:
            mistakes.add(f"{where}: {error}")
    if not columns and not mistakes.count:
        raise UserError(f"{path}: holds no examples; write one JSON object a line")
    return columns, pictures


def make_columns(path, task, splits, patch, grid, cache, network=None, device=None, checked=False):
    """The folder with the columns of a JSONL file, a subfolder for each split. It is made unless it is in the cache and
    its pictures have not changed. device: that of the network. checked: this run has compared the pictures already."""
    key = [*file_stamp(path), task.name, task.needs, task.prompt, task.text_is_optional, splits, patch, grid]
    if network:
        key.append(network)
    folder = Path(cache).resolve() / f"columns-{cache_key(key)}"

    def make(aside):
        mistakes = Mistakes(task)
        columns, pictures = read_columns(path, task, splits, patch, grid, mistakes, network, device)
        mistakes.stop(path)
        folders = {name: store.folder.resolve() for name, store in pictures.stores.items()}
        stamps = [file_stamp(file) for file in pictures.paths()]  # before their pixels are read, which may take hours
        if pictures.jobs:
            folders[""] = pictures.extract(path, Path(cache).resolve(), mistakes).folder
            stamps.append(file_stamp(folders[""] / "offsets.npy"))
        if pictures.outside and Path(cache).resolve() not in path.resolve().parents:
            warn(
                f"{path}: {pictures.outside} pictures or stores lie outside of its folder, so the folder cannot be moved alone"
            )
        for split, part in columns.items():
            part.save(aside / split, folders[part.store])
        (aside / "warnings.json").write_text(json.dumps(odd_lines(columns)))
        (aside / "depends.jsonl").write_text("\n".join(map(json.dumps, stamps)))

    if not checked:
        remove_stale(folder)
    return make_once(folder, make)


def odd_lines(columns):
    """What is odd in the lines of a file, a list of sentences. columns: {split: Columns}."""
    notes = []
    lost = 0
    for part in columns.values():
        lost += part.text.count("\ufffd".encode()) + "".join(part.answers).count("\ufffd")
    if lost:
        problem = f"U+FFFD stands {lost} times for a character that a program could not decode"
        notes.append(f"{problem}; make the file again from its source")
    return notes


def print_warnings(dataset, path):
    """Warns of what was odd in the lines of a file and in their pictures when they were read. The notes on the pictures may
    name another file, which has the same ones."""
    for note in json.loads((dataset.folder.parent / "warnings.json").read_text()):
        warn(f"{path}: {note}")
    file = dataset.store.folder / "warnings.json"
    if file.exists():
        print_notes(json.loads(file.read_text()), f"among all pictures of {path}")


def print_shared_pictures(sets):
    """Warns of pictures that two splits share, and of pictures of one split that count as several: equal pixels or features
    in another file, under another name or with other boxes."""
    digests = {}  # split -> the digests of its pictures
    for split, dataset in sets.items():
        rows = np.unique(dataset.image)
        digests[split] = dataset.store.digests_of(rows)
        if len(digests[split]) < len(rows):
            print(f"warning: the {len(rows)} pictures of {split} have only {len(digests[split])} different contents")
    for known, split in itertools.combinations(digests, 2):
        shared = digests[split] & digests[known]
        if known in ("train", "val") and shared:  # several splits for testing may well have the same pictures
            print(f"warning: {len(shared)} of the {len(digests[split])} pictures of {split} are in {known} too")


def print_unknown_answers(sets):
    """Warns of examples of other splits none of whose answers occurs in train: a model that chooses among the training
    answers cannot answer them."""
    if "train" not in sets:
        return
    known = set()
    for answers in sets["train"].answer:
        known.update(answers)
    for split, dataset in sets.items():
        unknown = sum(1 for answers in dataset.answer if answers and known.isdisjoint(answers))
        if unknown:
            print(f"warning: {unknown} of the {len(dataset)} examples of {split} have no answer that occurs in train")


def remove_stale(folder):
    """Removes columns whose pictures or stores have changed since, or of which only a part is left. Several runs may do so at
    the same time: one of them removes the columns, and none removes columns that another run has made anew."""
    aside = folder.with_name(f".making-stale-{folder.name}-{os.getpid()}-{time.time_ns()}")
    depends = folder / "depends.jsonl"
    try:
        if depends.exists():
            seen = file_stamp(depends)
            if is_current(folder) or file_stamp(depends) != seen:
                return
        folder.rename(aside)  # at once, which rmtree is not
    except FileNotFoundError:  # there are none, or another run was faster
        return
    shutil.rmtree(aside, ignore_errors=True)  # another run's make_once may be removing it too


def picture_file(dataset, row):
    """The picture file that row `row` of a dataset's store was made of; None if that is not known."""
    if dataset.folder is None:
        return None
    paths = []
    for line in (dataset.folder.parent / "depends.jsonl").read_text().splitlines():
        path = Path(json.loads(line)[0])
        if path.name == "features.npy" and path.parent.resolve() == dataset.store.folder:
            return dataset.store.picture_file(row)  # a store that the lines name
        paths.append(path)
    return None if paths[row].suffix == ".npz" else paths[row]


def is_current(folder):
    """True if the pictures and stores that columns were made of have not changed since."""
    with open(folder / "depends.jsonl", encoding="utf-8") as stamps:
        for line in stamps:
            path, *known = json.loads(line)
            try:
                _, *now = file_stamp(path)
            except OSError:
                return False
            if now != known:
                return False
    return True
