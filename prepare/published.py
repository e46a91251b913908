"""What the scripts for published data sets share: reading their files, one line about a mistake, writing JSONL."""

from support import interrupt  # noqa: F401, I001 (before torch, for Ctrl-C)
import argparse
import json
import os
import re
import sys
from collections import Counter
from pathlib import Path

import data
from common import UserError

BETWEEN = re.compile(r"[\s,:]*")  # what stands between the values of a JSON file
_place = ""  # see note_place


def note_place(where):
    """Notes where the entry stands that is read now, for the message about a mistake that no check foresaw."""
    global _place
    _place = str(where)


def require(ok, where, what):
    """UserError "where: what" unless ok."""
    if not ok:
        raise UserError(f"{where}: {what}")


def read_json(path):
    """The content of a JSON file."""
    require(path.is_file(), path, "no such file")
    note_place(path)
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); download it again") from None


def read_text_lines(path, blank=False):
    """("<file>:<line number>", line) of each line of a text file that is not blank. blank=True: of each line."""
    require(path.is_file(), path, "no such file")
    with open(path, encoding="utf-8-sig", newline="\n") as file:  # a single \r may stand in a caption
        try:
            for number, line in enumerate(file, 1):
                if blank or line.strip():
                    note_place(f"{path}:{number}")
                    yield f"{path}:{number}", line.rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: not UTF-8 ({error}); download it again") from None


def read_json_lines(path, needed=()):
    """("<file>:<line number>", dict) of each line of a file of JSON objects that have the keys `needed`."""
    for where, line in read_text_lines(path):
        try:
            row = json.loads(line, object_pairs_hook=data.unique_keys)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: not JSON ({error}); write one object a line") from None
        check_keys(where, row, needed)
        yield where, row


def stream_json(path, needed=(), inside=None, chunk=1 << 20):
    """The entries of a JSON file too large for memory, one at a time, as ("<file>: entry <key>", key, entry). The key of
    an entry of a list is its number. Entries must be objects that have the keys `needed`. inside: the key of the
    list or object that holds the entries, as in {"info": {...}, "annotations": [...]}; None: the whole file."""
    require(path.is_file(), path, "no such file")
    note_place(path)
    decoder = json.JSONDecoder()
    number = 0
    with open(path, encoding="utf-8-sig") as file:
        text = read_chunk(file, path, chunk).lstrip()
        require(text, path, "is empty; download it again")
        if inside is not None:
            text = skip_to(file, path, text, inside, chunk)
        require(text[:1] in ("[", "{"), path, "neither a JSON list nor an object; is this the published file?")
        has_keys = text[0] == "{"
        position = 1
        while True:
            start = BETWEEN.match(text, position).end()
            if text[start : start + 1] in ("]", "}"):
                return
            try:
                key = number
                if has_keys:
                    key, start = decoder.raw_decode(text, start)
                    start = BETWEEN.match(text, start).end()
                entry, end = decoder.raw_decode(text, start)
            except ValueError:  # the entry goes on in the next chunk, or the file is damaged
                more = read_chunk(file, path, chunk)
                damaged = not more or len(text) > 64 * chunk
                require(not damaged, f"{path}: entry {number}", "not JSON, or cut off; download the file again")
                text = text[position:] + more
                position = 0
                continue
            where = f"{path}: entry {key}"
            note_place(where)
            check_keys(where, entry, needed)
            yield where, key, entry
            number += 1
            position = end


def read_chunk(file, path, chunk):
    """The next `chunk` characters of a text file."""
    try:
        return file.read(chunk)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 ({error}); download it again") from None


def skip_to(file, path, text, key, chunk):
    """The text of a JSON file from the value of `key` on, at least a chunk of it. text: what was read of the file."""
    wanted = re.compile(rf'"{re.escape(key)}"\s*:\s*(?=[\[{{])')  # a key with a list or an object, no value
    while not wanted.search(text):
        more = read_chunk(file, path, chunk)
        require(more, path, f"has no {key!r}; is this the published file?")
        text = text[-len(key) - 100 :] + more  # the key may be cut by the end of a chunk
    return text[wanted.search(text).end() :] + read_chunk(file, path, chunk)


def entries(path, content, needed):
    """("<file>: entry <number>", dict) of each of a list of dicts that have the keys `needed`."""
    require(isinstance(content, list), path, "not a list of entries; is this the published file?")
    for number, row in enumerate(content):
        where = f"{path}: entry {number}"
        note_place(where)
        check_keys(where, row, needed)
        yield where, row


def check_keys(where, row, needed):
    """UserError unless row is a dict with all keys `needed`."""
    require(isinstance(row, dict), where, "not an object; is this the published file?")
    for key in needed:
        require(key in row, where, f"has no {key!r}; is this the published file?")


def picture(path, out):
    """A picture's path relative to the folder `out`, as JSONL in `out` names it."""
    return os.path.relpath(path, out)


def corner_box(x, y, width, height):
    """[x1,y1,x2,y2] of a box given by its upper left corner and its size."""
    return [x, y, x + width, y + height]


def cut_box(box, width, height):
    """[x1,y1,x2,y2] cut to a picture of this size, in pixels; None where nothing is left."""
    x1, y1, x2, y2 = box
    box = [max(0, x1), max(0, y1), min(x2, width), min(y2, height)]
    return box if box[0] < box[2] and box[1] < box[3] else None


def link_lines(path, out, rows_of):
    """Copies a JSONL file to `out`, with rows of the feature store "regions" beside `out` in place of its pictures.
    rows_of(path, record) -> a row for each picture, None where the store lacks it: such lines are left out.
    Returns how many lines were written and how many left out."""
    counts = {"written": 0, "left out": 0}

    def write(temporary):
        with open(temporary, "w", encoding="utf-8") as file:
            for _, record in read_json_lines(path):
                rows = rows_of(path, record)
                if None in rows:
                    counts["left out"] += 1
                    continue
                names = [f"regions#{row}" for row in rows]
                line = {"features": names if "images" in record else names[0]}
                for key, value in record.items():
                    if key not in ("image", "images", "boxes"):
                        line[key] = value
                file.write(json.dumps(line) + "\n")
                counts["written"] += 1

    data.write_whole(out, write)
    return counts["written"], counts["left out"]


def write_dataset(out, **description):
    """Writes OUT/dataset.json."""
    data.write_text(out / "dataset.json", json.dumps(description, indent=1))


def write_jsonl(path, records):
    """Writes records one a line, as they come, and prints how many there are of each split. A record may be a text instead,
    the reason why an example is left out; these are counted, as are blank texts. The file is whole or absent."""
    counts = Counter()  # split: examples
    left_out = Counter()  # reason: examples

    def write(temporary):
        with open(temporary, "w", encoding="utf-8") as file:
            for record in records:
                if isinstance(record, str):
                    left_out[record] += 1
                elif isinstance(record.get("text"), str) and not data.is_text(record["text"]):
                    left_out["blank text"] += 1
                else:
                    file.write(json.dumps(record) + "\n")
                    counts[record["split"]] += 1
        reasons = [f"{count} left out: {reason}" for reason, count in left_out.items()]
        require(counts, path, "; ".join(["the published files hold no examples", *reasons]))

    data.write_whole(path, write)
    print(f"{path}: " + ", ".join(f"{count} {split}" for split, count in counts.items()))
    for reason, count in left_out.items():
        print(f"    {count} left out: {reason}")


# ---- predictions, back to the benchmark --------------------------------------------------------------------------------


def first_answer(where, line):
    """The likeliest answer of a line that predict.py wrote."""
    answers = line.get("answers")
    pairs = isinstance(answers, list) and answers and isinstance(answers[0], list) and answers[0]
    require(bool(pairs), where, "has no answers; is this what predict.py --data ... --out wrote?")
    return answers[0][0]


def whole_number(where, text):
    """An id as the number that the benchmark counts by."""
    require(text.isdecimal(), where, f"the id {text!r} is no whole number; ids must be those of the published files")
    return int(text)


def write_predictions(source, out, predictions):
    """Writes a file that predict.py wrote in the benchmark's own format. predictions(lines) makes its text, lines:
    ("<file>:<line number>", dict)."""
    require(not out.is_dir(), out, "is a folder; name the file to write")
    data.write_text(out, predictions(read_json_lines(source, ["id"])))
    print(f"{out}: predictions of {source}")


def main(convert, description, add_options=None, arguments=None, predictions=None):
    """The command line of a script: SOURCE and OUT, then what add_options(parser) adds, as keywords of convert().
    predictions: see `write_predictions`. Exit code 0, or 2 with one line on stderr."""
    name = Path(sys.argv[0]).name
    parser = data.Parser(prog=name, description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="folder of the published files")
    parser.add_argument("out", type=Path, help="folder of the JSONL")
    if predictions is not None:
        words = "SOURCE is a file that predict.py --out wrote; write it to the file OUT, as the benchmark takes it"
        parser.add_argument("--predictions", action="store_true", help=words)
    if add_options is not None:
        add_options(parser)
    try:
        args = vars(parser.parse_args(arguments))
        source = args.pop("source").resolve()
        out = args.pop("out").resolve()
        if args.pop("predictions", False):
            write_predictions(source, out, predictions)
        else:
            require(not out.is_file(), out, "is a file; name a folder")
            out.mkdir(parents=True, exist_ok=True)
            convert_or_explain(convert, source, out, args)
    except (UserError, OSError) as error:
        print(f"{name}: {UserError(str(error))}", file=sys.stderr)
        return 2
    return 0


def convert_or_explain(convert, source, out, args):
    """convert(source, out, **args). UserError, with the place, where the files hold values of another kind than published
    and no check foresaw it."""
    note_place(source)
    try:
        convert(source, out, **args)
    except UserError:
        raise
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise UserError(f"{_place}: not as published ({type(error).__name__}: {error})") from None
