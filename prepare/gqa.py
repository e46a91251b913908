"""GQA (Hudson and Manning 2019): questions about Visual Genome's pictures, each with one answer, to JSONL.

    python prepare/gqa.py FOLDER OUT        writes OUT/gqa.jsonl

FOLDER has images/*.jpg and the balanced questions {train,val,testdev}_balanced_questions.json, of which testdev, the set
that papers report, becomes the test split. LXMERT fine-tunes on train and val together.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for `python prepare/gqa.py`

from prepare import published

SPLITS = {"train": "train", "val": "val", "testdev": "test"}


def records(folder, out):
    """A record for each question."""
    for name, split in SPLITS.items():
        path = folder / f"{name}_balanced_questions.json"
        for _, key, row in published.stream_json(path, ("question", "imageId", "answer", "types")):
            yield {
                "image": published.picture(folder / "images" / f"{row['imageId']}.jpg", out),
                "text": row["question"],
                "answer": row["answer"],
                "kind": row["types"]["structural"],  # verify, query, choose, logical or compare
                "split": split,
                "id": key,  # the question's number
            }


def convert(folder, out):
    """Writes OUT/gqa.jsonl."""
    published.write_jsonl(out / "gqa.jsonl", records(folder, out))


if __name__ == "__main__":
    sys.exit(published.main(convert, __doc__))
