"""NLVR2 (Suhr et al. 2019): a statement about two photographs, true or false, to JSONL.

    python prepare/nlvr2.py FOLDER OUT        writes OUT/nlvr2.jsonl
    python prepare/nlvr2.py --predictions P.jsonl OUT.csv        what predict.py wrote, as the official evaluation takes it

FOLDER has data/{train,dev,test1}.json, which hold one object a line, and images/. test1 (test-P, public) becomes the test
split. Pictures lie in images/train/<directory>/, images/dev/ and images/test1/. A statement's `identifier` is that of its
pair of pictures and a number: train-10171-0-0 is about train-10171-0-img0.png and train-10171-0-img1.png.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for `python prepare/nlvr2.py`

from prepare import published

SPLITS = {"train": "train", "dev": "val", "test1": "test"}


def records(folder, out):
    """A record for each statement."""
    for name, split in SPLITS.items():
        path = folder / "data" / f"{name}.json"
        for where, row in published.read_json_lines(path, ("identifier", "sentence", "label")):
            published.require(
                row["label"] in ("True", "False"), where, f"label {row['label']!r}, not 'True' or 'False'"
            )
            images = folder / "images" / name
            if name == "train":
                published.check_keys(where, row, ["directory"])
                images = images / str(row["directory"])
            pair = row["identifier"].rpartition("-")[0]
            yield {
                "images": [published.picture(images / f"{pair}-img{side}.png", out) for side in (0, 1)],
                "text": row["sentence"],
                "label": row["label"] == "True",
                "split": split,
                "id": row["identifier"],
            }


def predictions(lines):
    """The file of the official evaluation, a line for each statement: test1-0-0-0,True"""
    rows = []
    for where, line in lines:
        answer = published.first_answer(where, line)
        published.require(answer in ("true", "false"), where, f"answers {answer!r}, not true or false")
        rows.append(f"{line['id']},{answer.capitalize()}\n")
    return "".join(rows)


def convert(folder, out):
    """Writes OUT/nlvr2.jsonl."""
    published.write_jsonl(out / "nlvr2.jsonl", records(folder, out))


if __name__ == "__main__":
    sys.exit(published.main(convert, __doc__, predictions=predictions))
