"""VQA-RAD (Lau et al. 2018, CC0): 315 radiology pictures, 2,248 questions by clinicians, to JSONL.

    python prepare/vqa_rad.py FOLDER OUT        writes OUT/vqa_rad.jsonl

FOLDER has "VQA_RAD Dataset Public.json" and the folder "VQA_RAD Image Folder". A question whose phrase_type starts with
"test" belongs to the test split (451 questions). As published, pictures of the test split also occur in the train split.
Quirks of the file: some answers are numbers, and "CLOSED " stands beside "CLOSED".
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for `python prepare/vqa_rad.py`

from prepare import published

NEEDED = ("image_name", "question", "answer", "answer_type", "phrase_type", "qid")


def convert(folder, out):
    """Writes OUT/vqa_rad.jsonl."""
    path = folder / "VQA_RAD Dataset Public.json"
    records = []
    for _, row in published.entries(path, published.read_json(path), NEEDED):
        record = {
            "image": published.picture(folder / "VQA_RAD Image Folder" / row["image_name"], out),
            "text": row["question"],
            "answer": str(row["answer"]).strip().lower(),
            "kind": row["answer_type"].strip().lower(),
            "split": "test" if row["phrase_type"].startswith("test") else "train",
            "id": str(row["qid"]),
        }
        records.append(record)
    published.write_jsonl(out / "vqa_rad.jsonl", records)


if __name__ == "__main__":
    sys.exit(published.main(convert, __doc__))
