"""VCR (Zellers et al. 2019): a question about a film still, four answers and four reasons, to JSONL.

    python prepare/vcr.py FOLDER OUT        writes OUT/vcr.jsonl

FOLDER has {train,val}.jsonl and vcr1images/, in which each picture's metadata file gives the detected boxes. The test
labels are not public. Texts are lists of words in which a list of numbers, [0, 2], stands for objects of the picture.
A person becomes a name by its number, so that "Casey" is the same person in question, answers and reasons; another object
becomes its class. The regions are the detected boxes, in their order.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for `python prepare/vcr.py`

from prepare import published

NAMES = (
    "Casey",
    "Riley",
    "Jessie",
    "Jackie",
    "Avery",
    "Jaime",
    "Peyton",
    "Kerry",
    "Jody",
    "Kendall",
    "Skyler",
    "Frankie",
)
NEEDED = ("objects", "img_fn", "metadata_fn", "question", "answer_choices", "rationale_choices", "annot_id")


def plain_text(words, objects, where):
    """The words as one string, with names or classes for the numbers of objects."""
    out = []
    for word in words:
        if isinstance(word, str):
            out.append(word)
            continue
        names = []
        for number in word:
            inside = isinstance(number, int) and 0 <= number < len(objects)
            published.require(inside, where, f"a text names object {number} of {len(objects)}")
            names.append(NAMES[number % len(NAMES)] if objects[number] == "person" else objects[number])
        out.append(" and ".join(names))
    return " ".join(out)


def read_boxes(path):
    """[[x1,y1,x2,y2]] of a metadata file, cut to the picture. Its boxes have their confidence as a fifth number."""
    content = published.read_json(path)
    published.check_keys(path, content, ("boxes", "width", "height"))
    boxes = []
    for x1, y1, x2, y2, _ in content["boxes"]:
        boxes.append([max(0, x1), max(0, y1), min(x2, content["width"]), min(y2, content["height"])])
    return boxes


def records(folder, out):
    """A record for each question."""
    for split in ("train", "val"):
        needed = (*NEEDED, "answer_label", "rationale_label")
        for where, row in published.read_json_lines(folder / f"{split}.jsonl", needed):
            objects = row["objects"]
            yield {
                "image": published.picture(folder / "vcr1images" / row["img_fn"], out),
                "boxes": read_boxes(folder / "vcr1images" / row["metadata_fn"]),
                "text": plain_text(row["question"], objects, where),
                "choices": [plain_text(words, objects, where) for words in row["answer_choices"]],
                "label": row["answer_label"],
                "reasons": [plain_text(words, objects, where) for words in row["rationale_choices"]],
                "reason": row["rationale_label"],
                "split": split,
                "id": row["annot_id"],
            }


def convert(folder, out):
    """Writes OUT/vcr.jsonl."""
    published.write_jsonl(out / "vcr.jsonl", records(folder, out))


if __name__ == "__main__":
    sys.exit(published.main(convert, __doc__))
