"""RefCOCO, RefCOCO+ (Yu et al. 2016) and RefCOCOg (Mao et al. 2016): expressions for objects in COCO's photographs, to JSONL.

    python prepare/refcoco.py FOLDER OUT [--split-by umd]        writes OUT/refcoco.jsonl and OUT/dataset.json

FOLDER is one of refcoco/, refcoco+/ and refcocog/, with "refs(unc).p" (refcocog: "refs(umd).p" or "refs(google).p") and
instances.json; --images names the folder of train2014's pictures (default: FOLDER/train2014). The regions are all
annotated boxes of the picture (`boxes`), the ground-truth setting of the papers. Splits testA (people) and testB (other
things) stay apart. A ref's own file_name ends in the number of its object, so the name comes from instances.json.

The refs are a pickle, which can run code when loaded. The reader here refuses everything but plain lists, dicts,
strings and numbers.
"""

import json
import pickle
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for `python prepare/refcoco.py`

from support import interrupt  # noqa: F401, I001 (before torch, for Ctrl-C)
from common import UserError
from prepare import published


class PlainUnpickler(pickle.Unpickler):
    """Loads pickles of plain values only."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"asks for {module}.{name}")


def read_refs(path):
    """The list of refs. The pickle is Python 2's, hence the encoding."""
    published.require(path.is_file(), path, "no such file; --split-by names the one in brackets (unc, umd, google)")
    try:
        with open(path, "rb") as file:
            return PlainUnpickler(file, encoding="latin1").load()
    except Exception as error:  # noqa: BLE001 (a damaged pickle raises nearly anything)
        raise UserError(f"{path}: not a pickle of plain values ({error}); download it again") from None


def read_instances(path):
    """{image id: its entry}, {image id: [(annotation id, [x1,y1,x2,y2])]} of COCO's instances.json."""
    content = published.read_json(path)
    published.check_keys(path, content, ("images", "annotations"))
    images = {}
    for _, row in published.entries(path, content["images"], ("id", "file_name", "width", "height")):
        images[row["id"]] = row
    boxes = {}
    for where, row in published.entries(path, content["annotations"], ("id", "image_id", "bbox")):
        published.require(row["image_id"] in images, where, f"no image has the id {row['image_id']}")
        image = images[row["image_id"]]
        box = published.cut_box(published.corner_box(*row["bbox"]), image["width"], image["height"])
        if box is not None:  # a few boxes have no area
            boxes.setdefault(row["image_id"], []).append((row["id"], box))
    return images, boxes


def records(path, refs, images, boxes, image_folder, out):
    """A record for each expression."""
    for where, ref in published.entries(path, refs, ("image_id", "ann_id", "split", "sentences")):
        candidates = boxes.get(ref["image_id"], [])
        target = dict(candidates).get(ref["ann_id"])
        published.require(target is not None, where, f"instances.json has no box {ref['ann_id']}; do the files fit?")
        for sentence in ref["sentences"]:
            published.check_keys(where, sentence, ("sent", "sent_id"))
            yield {
                "image": published.picture(image_folder / images[ref["image_id"]]["file_name"], out),
                "boxes": [box for _, box in candidates],
                "text": sentence["sent"],
                "target": target,
                "split": ref["split"],
                "id": str(sentence["sent_id"]),
            }


def predictions(lines):
    """The boxes that were chosen: [{"sent_id": 17, "pred_box": [x, y, width, height]}, ...], in pixels. No server takes them,
    as all boxes are public; the keys are those of UNITER's own evaluation."""
    rows = []
    for where, line in lines:
        x1, y1, x2, y2 = published.first_answer(where, line)
        number = published.whole_number(where, line["id"])
        rows.append({"sent_id": number, "pred_box": [x1, y1, round(x2 - x1, 1), round(y2 - y1, 1)]})
    return json.dumps(rows)


def convert(folder, out, split_by, images):
    """Writes OUT/refcoco.jsonl and OUT/dataset.json."""
    path = folder / f"refs({split_by}).p"
    refs = read_refs(path)
    entries, boxes = read_instances(folder / "instances.json")
    image_folder = folder / "train2014" if images is None else images.resolve()
    published.write_jsonl(out / "refcoco.jsonl", records(path, refs, entries, boxes, image_folder, out))
    published.write_dataset(out, name=folder.name, file="refcoco.jsonl", extra_splits=["testA", "testB"])


def add_options(parser):
    """This script's own options."""
    parser.add_argument("--split-by", default="unc", help="unc (RefCOCO, RefCOCO+), umd or google (RefCOCOg)")
    parser.add_argument("--images", type=Path, help="folder of COCO's train2014 pictures")


if __name__ == "__main__":
    sys.exit(published.main(convert, __doc__, add_options, predictions=predictions))
