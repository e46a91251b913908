"""GQA (Hudson and Manning 2019): questions about Visual Genome's pictures, each with one answer, to JSONL.

    python prepare/gqa.py FOLDER OUT        writes OUT/gqa.jsonl, and OUT/gqa_test.jsonl without answers
    python prepare/gqa.py --predictions P.jsonl OUT.json        what predict.py wrote, as the server takes it

FOLDER has images/*.jpg and the balanced questions {train,val,testdev}_balanced_questions.json. testdev, the set that
papers report, becomes the test split. gqa_test.jsonl is made of submission_all_questions.json, if that is there.
LXMERT fine-tunes on train and val together.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for `python prepare/gqa.py`

from prepare import published

SPLITS = {"train": "train", "val": "val", "testdev": "test"}
SUBMISSION = "submission_all_questions.json"  # those of val, testdev, test and challenge; the server takes all of them


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


def unanswered(folder, out):
    """Records of the questions that the server asks, whose answers are not public."""
    for _, key, row in published.stream_json(folder / SUBMISSION, ("question", "imageId")):
        image = folder / "images" / f"{row['imageId']}.jpg"
        yield {"image": published.picture(image, out), "text": row["question"], "split": "test", "id": key}


def predictions(lines):
    """The server's file: [{"questionId": "201307251", "prediction": "red"}, ...]."""
    rows = []
    for where, line in lines:
        rows.append({"questionId": line["id"], "prediction": published.first_answer(where, line)})
    return json.dumps(rows)


def convert(folder, out):
    """Writes OUT/gqa.jsonl, and OUT/gqa_test.jsonl where the questions of the submission are there."""
    published.write_jsonl(out / "gqa.jsonl", records(folder, out))
    if (folder / SUBMISSION).is_file():
        published.write_jsonl(out / "gqa_test.jsonl", unanswered(folder, out))


if __name__ == "__main__":
    sys.exit(published.main(convert, __doc__, predictions=predictions))
