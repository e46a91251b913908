"""FigureQA (Kahou et al. 2018): yes-no questions about drawn bar, line and pie charts, to JSONL.

    python prepare/figureqa.py FOLDER OUT        writes OUT/figureqa.jsonl

FOLDER has the unpacked folders train1/, validation1/ and validation2/, each with png/, qa_pairs.json and annotations.json.
validation1 becomes val. validation2 becomes test: its charts have colours that train1 has only in other kinds of chart.
The answers of the published tests are not public. `answer` is 1 for yes. A question's kind is the kind of its chart,
by which papers report accuracy: vbar_categorical, hbar_categorical, line, dot_line or pie.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for `python prepare/figureqa.py`

from prepare import published

SPLITS = {"train1": "train", "validation1": "val", "validation2": "test"}
ANSWERS = {1: "yes", 0: "no"}


def records(folder, out):
    """A record for each question, in the order of the file."""
    for name, split in SPLITS.items():
        charts = {}  # number of a picture -> kind of chart
        for _, _, row in published.stream_json(folder / name / "annotations.json", ("image_index", "type")):
            charts[row["image_index"]] = row["type"]
        needed = ("question_string", "image_index", "answer")
        for where, number, row in published.stream_json(folder / name / "qa_pairs.json", needed, "qa_pairs"):
            picture = row["image_index"]
            published.require(picture in charts, where, f"annotations.json has no image_index {picture}")
            published.require(row["answer"] in ANSWERS, where, f"answer {row['answer']!r}, not 0 or 1")
            yield {
                "image": published.picture(folder / name / "png" / f"{picture}.png", out),
                "text": row["question_string"],
                "answer": ANSWERS[row["answer"]],
                "kind": charts[picture],
                "split": split,
                "id": f"{name}-{number}",  # question_id counts the templates, not the questions
            }


def convert(folder, out):
    """Writes OUT/figureqa.jsonl."""
    published.write_jsonl(out / "figureqa.jsonl", records(folder, out))


if __name__ == "__main__":
    sys.exit(published.main(convert, __doc__))
