"""Bottom-up features (Anderson et al. 2018) as LXMERT and UNITER published them, into a feature store.

    python prepare/bottom_up.py SOURCE OUT [--data my.jsonl my_test.jsonl ...]

SOURCE is a .tsv file or a folder of .tsv (LXMERT) or .npz files (UNITER). Writes OUT/regions (the store) and
OUT/ids.txt (line N: the name of the picture in row N). With --data also a copy of each file, with "features":
"regions#N" in place of `image`, and OUT/dataset.json, which names the first of them. A line of the data gets the row
whose name equals its picture's file name; suffix, case, prefixes like "coco_" and leading zeros do not count. Files are
read one picture at a time.

LXMERT's TSV has no header and ten columns: image id, height, width; then in base64 classes and confidence of objects (1,600)
and of attributes (400); the number of boxes; in base64 boxes in pixels and features (2,048). Classes exclude background.
UNITER's .npz: features, norm_bb (boxes in 0..1, then width and height), conf, soft_labels (1,601 class probabilities, the
background first). Of these the boxes above a confidence of 0.2 are kept, at least 10 and at most 100, as UNITER does. They
do not tell the size of the picture, which referring expressions need: take the TSV for these.
"""

import base64
import csv
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for `python prepare/bottom_up.py`

from support import interrupt  # noqa: F401, I001 (before torch, for Ctrl-C)
import data
from common import UserError
from prepare import published

PREFIXES = ("coco_", "nlvr2_", "flickr30k_", "vg_")
REGIONS = {"kind": "bottom-up", "boxes": "detected"}  # `regions` of the dataset.json that this script writes

COLUMNS = {  # LXMERT's, in their order, as fields of the store: type, shape of one region
    "objects": ("<i8", ()),
    "object_conf": ("<f4", ()),
    "attributes": ("<i8", ()),
    "attribute_conf": ("<f4", ()),
    "boxes": ("<f4", (4,)),
    "features": ("<f4", (-1,)),
}


def read_tsv(path):
    """(image id, fields of the store, (width, height)) of each line of LXMERT's TSV. boxes: (N,4) in 0..1."""
    csv.field_size_limit(1 << 30)
    with open(path, encoding="utf-8-sig", newline="") as file:
        for number, row in enumerate(csv.reader(file, delimiter="\t"), 1):
            where = f"{path}:{number}"
            published.note_place(where)
            published.require(len(row) == 10, where, f"{len(row)} columns, not ten; is this LXMERT's file?")
            name, height, width = row[:3]
            count = row[7]
            whole = height.isdigit() and width.isdigit() and count.isdigit() and int(count) > 0
            published.require(whole, where, "height, width or number of boxes is not a whole number")
            fields = {}
            for (field, (dtype, shape)), text in zip(COLUMNS.items(), row[3:7] + row[8:]):
                try:
                    values = np.frombuffer(base64.b64decode(text, validate=True), dtype)
                    fields[field] = values.reshape(int(count), *shape)
                except ValueError as error:
                    raise UserError(f"{where}: {field} are damaged ({error}); download the file again") from None
            fields["boxes"] = fields["boxes"] / np.array([width, height, width, height], np.float32)
            check_fields(where, fields)
            yield name, fields, (int(width), int(height))


def read_npz(path):
    """(name, fields of the store, None) of one of UNITER's files, which do not say how large the picture is."""
    published.note_place(path)
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in ("features", "norm_bb", "conf", "soft_labels")}
    except Exception as error:  # noqa: BLE001 (a damaged file raises zlib.error, BadZipFile, ValueError, KeyError, ...)
        raise UserError(f"{path}: not UNITER's .npz ({error}); download it again") from None
    confidence = arrays["conf"].reshape(len(arrays["features"]), -1).max(1)
    count = int((confidence > 0.2).sum())
    kept = np.argsort(-confidence, kind="stable")[: min(100, max(10, count))]
    kept = np.sort(kept)  # in the file's order
    probs = arrays["soft_labels"][kept].astype(np.float32)
    fields = {
        "features": arrays["features"][kept],
        "boxes": arrays["norm_bb"][kept, :4].astype(np.float32),
        "object_probs": probs,
        "objects": probs[:, 1:].argmax(1),  # class 0 is the background
        "object_conf": probs[:, 1:].max(1),
    }
    check_fields(str(path), fields)
    return path.stem, fields, None


def check_fields(where, fields):
    """UserError unless features are finite and boxes lie in their picture. Boxes are then cut to 0..1."""
    finite = np.isfinite(fields["features"]).all() and np.abs(fields["features"]).max() < 65504  # float16's largest
    published.require(finite, where, "features have NaN, infinity or values beyond 65504")
    boxes = fields["boxes"]
    inside = (boxes > -1e-5).all() and (boxes < 1 + 1e-5).all()
    published.require(inside, where, "a box is outside its picture; is the size right?")
    fields["boxes"] = np.clip(boxes, 0, 1)


def files_of(source):
    """The .tsv files and the .npz files of a folder, two lists. A file counts as a .tsv. UserError if there are none."""
    tables = [source] if source.is_file() else sorted(source.glob("*.tsv"))
    arrays = sorted(source.glob("*.npz"))
    published.require(tables or arrays, source, "no .tsv or .npz files; SOURCE is one .tsv or their folder")
    return tables, arrays


def read_all(source):
    """The pictures of a file or a folder."""
    tables, arrays = files_of(source)
    for path in tables:
        yield from read_tsv(path)
    for path in arrays:
        yield read_npz(path)


def remove_old_lines(out, writes_lines):
    """Removes the lines and the dataset.json that this script wrote before: they name rows of a store that is about to be
    replaced. Other files stay; UserError if one of them is a dataset.json and lines are to be written."""
    file = out / "dataset.json"
    if not file.is_file():
        return
    description = published.read_json(file)
    is_own = description.get("regions") == REGIONS
    published.require(is_own or not writes_lines, file, "was not written by this script; give another folder")
    if is_own:
        for path in out.glob("*.jsonl"):
            if "regions#" in json.dumps(data.first_record(path).get("features")):  # of nlvr2 a list of two
                path.unlink()
                print(f"{path}: removed, since it names rows of the old store")
        file.unlink()


def picture_key(name):
    """A picture's name in the form that is compared: lower case, without PREFIXES and leading zeros."""
    name = name.lower()
    for prefix in PREFIXES:
        name = name.removeprefix(prefix)
    return name.lstrip("0")


def convert(source, out, data_files):
    """Writes OUT/regions from the files in `source`, and the lines of JSONL files linked to these regions."""
    for file in data_files:
        published.require(file.resolve().parent != out, out, f"{file} lies there; give another folder")
    if len({file.name for file in data_files}) < len(data_files):
        raise UserError("--data: two of the files have one name; rename one")
    rows = {}
    names = []

    def pictures():
        for name, fields, size in read_all(source):
            published.require(picture_key(name) not in rows, source, f"picture {name} occurs twice")
            rows[picture_key(name)] = len(names)
            names.append(name)
            if size is not None:
                fields["size"] = size
            yield fields

    description = {}
    if data_files and (data_files[0].parent / "dataset.json").is_file():  # refcoco.py names its splits there
        description = published.read_json(data_files[0].parent / "dataset.json")
    files_of(source)  # ends here if there are none
    remove_old_lines(out, len(data_files) > 0)
    store = out / "regions"
    data.write_store(store, pictures())
    published.require(names, source, "its files hold no pictures; download them again")
    (out / "ids.txt").write_text("".join(name + "\n" for name in names), encoding="utf-8")
    print(f"{store}: {len(names)} pictures")

    def rows_of(_, record):
        images = record["images"] if "images" in record else [record.get("image", "")]
        return [rows.get(picture_key(Path(image).stem)) for image in images]

    if data_files:
        kept = {key: description[key] for key in ("extra_splits", "content_words", "defaults") if key in description}
        published.write_dataset(out, name=data_files[0].stem, file=data_files[0].name, regions=REGIONS, **kept)
    for file in data_files:
        written, left_out = published.link_lines(file, out / file.name, rows_of)
        if not written:
            (out / file.name).unlink()
        published.require(written, file, f"none of its pictures is in {source}; ids look like {names[0]}")
        print(f"{out / file.name}: {written} lines, {left_out} left out: no features")


def add_options(parser):
    """This script's own options."""
    words = "JSONL files whose pictures these are, after SOURCE and OUT"
    parser.add_argument("--data", dest="data_files", type=Path, nargs="+", default=[], help=words)


if __name__ == "__main__":
    sys.exit(published.main(convert, __doc__, add_options))
