"""What the scripts for published data sets share: reading their files, one line about a mistake, writing JSONL."""

import json
import os
import sys
from pathlib import Path

import data
from common import UserError


def require(ok, where, what):
    """UserError "where: what" unless ok."""
    if not ok:
        raise UserError(f"{where}: {what}")


def read_json(path):
    """The content of a JSON file."""
    require(path.is_file(), path, "no such file; SOURCE is the folder of the published files")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); download it again") from None


def read_text_lines(path):
    """("<file>:<line number>", line) of each line of a text file that is not blank."""
    require(path.is_file(), path, "no such file; SOURCE is the folder of the published files")
    with open(path, encoding="utf-8") as file:
        try:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield f"{path}:{number}", line.rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: not UTF-8 ({error}); download it again") from None


def read_json_lines(path, needed=()):
    """("<file>:<line number>", dict) of each line of a file of JSON objects that have the keys `needed`."""
    for where, line in read_text_lines(path):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{where}: not JSON ({error}); download it again") from None
        check_keys(where, row, needed)
        yield where, row


def rows(path, content, needed):
    """("<file>: entry <number>", dict) of each of a list of dicts that have the keys `needed`."""
    require(isinstance(content, list), path, "not a list of entries; is this the published file?")
    for number, row in enumerate(content):
        where = f"{path}: entry {number}"
        check_keys(where, row, needed)
        yield where, row


def check_keys(where, row, needed):
    """UserError unless row is a dict with all keys `needed`."""
    require(isinstance(row, dict), where, "not an object; is this the published file?")
    for key in needed:
        require(key in row, where, f"has no {key!r}; is this the published file?")


def picture(path, out, where):
    """A picture's path relative to the folder `out`, as JSONL in `out` names it. UserError if there is no such file."""
    require(path.is_file(), where, f"no picture {path}")
    return os.path.relpath(path, out)


def write_jsonl(path, records):
    """Writes records one a line, as they come, and prints how many there are of each split. The file is whole or absent.
    """
    counts = {}
    aside = path.with_name(path.name + ".tmp")
    try:
        with open(aside, "w", encoding="utf-8") as file:
            for record in records:
                file.write(json.dumps(record) + "\n")
                counts[record["split"]] = counts.get(record["split"], 0) + 1
        require(counts, path, "the published files hold no examples")
        aside.rename(path)
    finally:
        aside.unlink(missing_ok=True)
    print(f"{path}: " + ", ".join(f"{count} {split}" for split, count in counts.items()))


def main(convert, description, add_options=None, arguments=None):
    """The command line of a script: SOURCE and OUT, then what add_options(parser) adds, as keywords of convert().
    Exit code 0, or 2 with one line on stderr."""
    name = Path(sys.argv[0]).name
    parser = data.Parser(prog=name, description=description.split("\n")[0])
    parser.add_argument("source", type=Path, help="folder of the published files")
    parser.add_argument("out", type=Path, help="folder of the JSONL")
    if add_options is not None:
        add_options(parser)
    try:
        args = vars(parser.parse_args(arguments))
        source = args.pop("source").resolve()
        out = args.pop("out").resolve()
        out.mkdir(parents=True, exist_ok=True)
        convert(source, out, **args)
    except (UserError, OSError) as error:
        print(f"{name}: {UserError(str(error))}", file=sys.stderr)
        return 2
    return 0
