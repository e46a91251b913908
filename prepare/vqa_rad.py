"""VQA-RAD (Lau et al. 2018, CC0): 315 radiology pictures, 2,248 questions by clinicians, to JSONL.

    python prepare/vqa_rad.py FOLDER OUT [--frames train|all]        writes OUT/vqa_rad.jsonl

FOLDER has "VQA_RAD Dataset Public.json" and the folder "VQA_RAD Image Folder". A question whose phrase_type starts with
"test" belongs to the test split (451 questions). As published, pictures of the test split also occur in the train split.
Quirks of the file: some answers are numbers, and "CLOSED " stands beside "CLOSED".

Most questions also stand there in other words, their `question_frame`: "Is/Are the spleen normal size?". --frames train
adds those of training questions to train: 1,797 + 983 questions. --frames all adds those of 284 test questions too, which
makes 3,064: as many as the usual training set of published results has. 284 test questions then stand in the training
set in other words, with their answers. So compare results of a training set only with results of the same one.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for `python prepare/vqa_rad.py`

from prepare import published

NEEDED = ("image_name", "question", "answer", "answer_type", "phrase_type", "qid")


def add_options(parser):
    """This script's own options."""
    parser.add_argument(
        "--frames",
        choices=["none", "train", "all"],
        default="none",
        help="add rewordings to train: of its own questions, or of all questions, those of test too",
    )


def convert(folder, out, frames):
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
        reworded = row.get("question_frame", "NULL")
        if reworded != "NULL" and (frames == "all" or frames == record["split"]):
            records.append({**record, "text": reworded.strip(), "split": "train", "id": f"{row['qid']}-frame"})
    published.write_jsonl(out / "vqa_rad.jsonl", records)


if __name__ == "__main__":
    sys.exit(published.main(convert, __doc__, add_options))
