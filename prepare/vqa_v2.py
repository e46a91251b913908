"""VQA v2 (Goyal et al. 2017): questions about COCO's photographs with ten annotators' answers, to JSONL.

    python prepare/vqa_v2.py FOLDER OUT        writes OUT/vqa_v2.jsonl, and OUT/vqa_v2_test.jsonl without answers
    python prepare/vqa_v2.py --predictions P.jsonl OUT.json        what predict.py wrote, as the server takes it

FOLDER has v2_OpenEnded_mscoco_{train2014,val2014,test2015}_questions.json, v2_mscoco_{train2014,val2014}_annotations.json and
the pictures in train2014/, val2014/ and test2015/.

Answers are normalised as the official evaluation does.
- train: an answer that n annotators gave has the soft score min(n/3, 1). Kept are the answers that are the most frequent one
  (multiple_choice_answer) of at least 9 questions of train and val, 3,129 of them. One is empty and not used. A question
  with none of them is left out.
- val: each answer has the official accuracy, the mean of min(n/3, 1) over the ten ways to leave one annotator out, so that
  the score of a prediction is what the server gives for it. No answer is left out.
"""

import json
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for `python prepare/vqa_v2.py`

from prepare import published
from prepare.vqa_accuracy import normalize_answer, soft_score, vqa_accuracy
from support.ranges import COUNT


def read_questions(folder, name):
    """The questions of train2014, val2014 or test2015, as published."""
    path = folder / f"v2_OpenEnded_mscoco_{name}_questions.json"
    return published.stream_json(path, ("image_id", "question", "question_id"), "questions")


def read_annotations(folder, name):
    """{question_id: (answer type, normalised most frequent answer, Counter of normalised answers)}."""
    path = folder / f"v2_mscoco_{name}_annotations.json"
    needed = ("question_id", "answer_type", "multiple_choice_answer", "answers")
    annotations = {}
    for where, _, row in published.stream_json(path, needed, "annotations"):
        published.require(len(row["answers"]) == 10, where, f"{len(row['answers'])} answers, not ten")
        counts = Counter(normalize_answer(entry["answer"]) for entry in row["answers"])
        top = normalize_answer(row["multiple_choice_answer"])
        annotations[row["question_id"]] = (row["answer_type"], top, counts)
    return annotations


def question_record(folder, name, row, out):
    """What the records of all splits have in common."""
    image = folder / name / f"COCO_{name}_{row['image_id']:012d}.jpg"
    return {"image": published.picture(image, out), "text": row["question"], "id": str(row["question_id"])}


def answered(folder, out, min_count):
    """Records of train and val."""
    annotations = {"train2014": read_annotations(folder, "train2014"), "val2014": read_annotations(folder, "val2014")}
    tops = Counter()
    for split in annotations.values():
        tops.update(top for _, top, _ in split.values())
    kept = {answer for answer, count in tops.items() if count >= min_count}
    for name, split in annotations.items():
        for where, _, row in read_questions(folder, name):
            published.require(row["question_id"] in split, where, f"question {row['question_id']} has no annotation")
            kind, _, counts = split[row["question_id"]]
            scores = {}
            for answer, count in counts.items():
                if name == "val2014" and answer:
                    scores[answer] = round(vqa_accuracy(count), 4)
                elif answer in kept and answer:
                    scores[answer] = round(soft_score(count), 4)
            if not scores:
                yield "none of its answers is kept"
                continue
            record = question_record(folder, name, row, out)
            yield {**record, "answer": scores, "kind": kind, "split": "val" if name == "val2014" else "train"}


def unanswered(folder, out):
    """Records of test, whose answers are not public."""
    for _, _, row in read_questions(folder, "test2015"):
        yield {**question_record(folder, "test2015", row, out), "split": "test"}


def predictions(lines):
    """The server's file: [{"question_id": 262148000, "answer": "red"}, ...]."""
    rows = []
    for where, line in lines:
        number = published.whole_number(where, line["id"])
        rows.append({"question_id": number, "answer": published.first_answer(where, line)})
    return json.dumps(rows)


def convert(folder, out, min_count):
    """Writes OUT/vqa_v2.jsonl, and OUT/vqa_v2_test.jsonl where the test questions are there."""
    published.write_jsonl(out / "vqa_v2.jsonl", answered(folder, out, min_count))
    if (folder / "v2_OpenEnded_mscoco_test2015_questions.json").is_file():
        published.write_jsonl(out / "vqa_v2_test.jsonl", unanswered(folder, out))


def add_options(parser):
    """This script's own options."""
    words = "keep an answer that is the most frequent one of at least N questions (default: 9)"
    parser.add_argument("--min-count", type=COUNT, metavar="N", default=9, help=words)


if __name__ == "__main__":
    sys.exit(published.main(convert, __doc__, add_options, predictions=predictions))
