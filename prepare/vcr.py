"""VCR (Zellers et al. 2019): a question about a film still, four answers and four reasons, to JSONL.

    python prepare/vcr.py FOLDER OUT        writes OUT/vcr.jsonl, and OUT/vcr_test.jsonl without labels
    python prepare/vcr.py --predictions P.jsonl OUT.csv        what predict.py wrote, as the server takes it

FOLDER has {train,val,test}.jsonl and vcr1images/, in which each picture's metadata file gives the detected boxes. The test
labels are not public. Texts are lists of words in which a list of numbers, [0, 2], stands for objects of the picture.
A person becomes a name by its number, so that "Casey" is the same person in question, answers and reasons; numbers 12 apart
have one name. Another object becomes its class. The regions are the detected boxes, in their order.
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
    """[[x1,y1,x2,y2]] of a metadata file, cut to the picture; those with no area in it are left out. A box has its
    confidence as a fifth number. Texts name an object by its number in `objects`, not in this list."""
    content = published.read_json(path)
    published.check_keys(path, content, ("boxes", "width", "height"))
    boxes = []
    for x1, y1, x2, y2, _ in content["boxes"]:
        box = published.cut_box([x1, y1, x2, y2], content["width"], content["height"])
        if box is not None:
            boxes.append(box)
    return boxes


def question_record(folder, out, where, row):
    """A record without labels and split."""
    objects = row["objects"]
    record = {
        "image": published.picture(folder / "vcr1images" / row["img_fn"], out),
        "text": plain_text(row["question"], objects, where),
        "choices": [plain_text(words, objects, where) for words in row["answer_choices"]],
        "reasons": [plain_text(words, objects, where) for words in row["rationale_choices"]],
        "id": row["annot_id"],
    }
    boxes = read_boxes(folder / "vcr1images" / row["metadata_fn"])
    if boxes:  # else the picture is cut into a grid
        record["boxes"] = boxes
    return record


def records(folder, out):
    """A record for each question."""
    for split in ("train", "val"):
        needed = (*NEEDED, "answer_label", "rationale_label")
        for where, row in published.read_json_lines(folder / f"{split}.jsonl", needed):
            labels = {"label": row["answer_label"], "reason": row["rationale_label"]}
            yield {**question_record(folder, out, where, row), **labels, "split": split}


def unanswered(folder, out):
    """Records of test, whose labels are not public. predict.py answers them, and gives reasons for each of the answers."""
    for where, row in published.read_json_lines(folder / "test.jsonl", NEEDED):
        yield {**question_record(folder, out, where, row), "split": "test"}


def predictions(lines):
    """The server's file, a CSV: annot_id, then the probabilities of the four answers, and for each answer those of the
    four reasons, in the order of the published file."""
    groups = {"answer": "answer"}  # kind of a line: how the names of its four columns begin
    for i in range(4):
        groups[f"reason given answer {i}"] = f"rationale_conditioned_on_a{i}"
    questions = {}  # annot_id -> {kind of a line: its probabilities}
    for where, line in lines:
        kind = line.get("kind")
        published.require(kind in groups, where, f"kind {kind!r}; the server takes the lines of vcr_test.jsonl")
        published.require(len(line.get("probs", ())) == 4, where, "has no four probabilities")
        questions.setdefault(line["id"], {})[kind] = line["probs"]
    columns = ["annot_id"]
    for group in groups.values():
        columns += [f"{group}_{i}" for i in range(4)]
    rows = [",".join(columns)]
    for name, probs in questions.items():
        published.require(len(probs) == len(groups), name, "lacks the answer, or the reasons for one of the answers")
        cells = [name]
        for kind in groups:
            cells += map(str, probs[kind])
        rows.append(",".join(cells))
    return "\n".join(rows) + "\n"


def convert(folder, out):
    """Writes OUT/vcr.jsonl, and OUT/vcr_test.jsonl where the test questions are there."""
    published.write_jsonl(out / "vcr.jsonl", records(folder, out))
    if (folder / "test.jsonl").is_file():
        published.write_jsonl(out / "vcr_test.jsonl", unanswered(folder, out))


if __name__ == "__main__":
    sys.exit(published.main(convert, __doc__, predictions=predictions))
