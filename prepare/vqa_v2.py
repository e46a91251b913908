"""VQA v2 (Goyal et al. 2017): questions about COCO's photographs with ten annotators' answers, to JSONL.

    python prepare/vqa_v2.py FOLDER OUT        writes OUT/vqa_v2.jsonl, and OUT/vqa_v2_test.jsonl without answers

FOLDER has v2_OpenEnded_mscoco_{train2014,val2014,test2015}_questions.json, v2_mscoco_{train2014,val2014}_annotations.json and
the pictures in train2014/, val2014/ and test2015/.

Answers are normalised as the official evaluation does.
- train: an answer that n annotators gave has the soft score min(n/3, 1). Kept are the answers that are the most frequent one
  (multiple_choice_answer) of at least 9 questions of train and val, 3,129 of them; a question with none of these is left out.
- val: each answer has the official accuracy, the mean of min(n/3, 1) over the ten ways to leave one annotator out, so that
  the score of a prediction is what the server gives for it. No answer is left out.
"""

import re
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for `python prepare/vqa_v2.py`

from prepare import published

# ---- answers ----------------------------------------------------------------------------------------------------------

NUMBERS = "zero one two three four five six seven eight nine ten".split()
DIGITS = {"none": "0", **{word: str(number) for number, word in enumerate(NUMBERS)}}
ARTICLES = ("a", "an", "the")
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
PERIOD = re.compile(r"\.(?!\d)")  # a period that no digit follows
DIGIT_COMMA = re.compile(r"\d,\d")

# Contractions that the evaluation repairs: "dont" becomes "don't"; "couldnt've" and "couldn'tve" become "couldn't've".
CONTRACTIONS = """ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's
    isn't it'd it'll ma'am mightn't might've mustn't must've needn't not've o'clock oughtn't shan't should've shouldn't
    somebody'll somebody's someone'd someone'll someone's something'd something'll that's there'd there're there's they'd
    they'll they're they've 'twas wasn't we've weren't what'll what're what's what've when's where'd where's where've who'd
    who'll who's who've why'll why're why's won't would've wouldn't y'all you'd you'll you're you've""".split()
DOUBLE_CONTRACTIONS = """couldn't've hadn't've he'd've it'd've mightn't've 'ow's'at she'd've shouldn't've somebody'd've
    someone'd've something'd've there'd've they'd've we'd've who'd've wouldn't've y'all'll y'all'd've you'd've""".split()


def contraction_repairs():
    """{word with an apostrophe missing: the contraction}."""
    repairs = {"somebody'd": "somebodyd"}  # the wrong way round, as in the official table
    for word in CONTRACTIONS:
        repairs[word.replace("'", "")] = word
    for word in DOUBLE_CONTRACTIONS:
        for position, letter in enumerate(word):
            if letter == "'":
                repairs[word[:position] + word[position + 1 :]] = word
    return repairs


REPAIRS = contraction_repairs()


def normalize_answer(text):
    """The official normalisation of the VQA evaluation (Antol et al. 2015). Punctuation beside a space, and all of it in a
    text with a number like 1,000, is deleted, other punctuation becomes a space; then lower case, digits for the words
    up to ten, no articles, and apostrophes in contractions."""
    text = text.replace("\n", " ").replace("\t", " ").strip()
    cleaned = text
    has_digit_comma = DIGIT_COMMA.search(text) is not None
    for mark in PUNCTUATION:
        beside_space = mark + " " in text or " " + mark in text
        cleaned = cleaned.replace(mark, "" if beside_space or has_digit_comma else " ")
    cleaned = PERIOD.sub("", cleaned)
    words = []
    for word in cleaned.lower().split():
        word = DIGITS.get(word, word)
        if word not in ARTICLES:
            words.append(REPAIRS.get(word, word))
    return " ".join(words)


def soft_score(count):
    """min(n/3, 1): three of ten annotators make an answer right."""
    return min(count / 3, 1)


def vqa_accuracy(count, annotators=10):
    """The official accuracy of an answer that `count` annotators gave: the mean of min(n/3, 1) over all ways to leave
    one annotator out. Leaving out one of the `count` leaves count - 1."""
    left = soft_score(count - 1) if count > 0 else 0
    return (count * left + (annotators - count) * soft_score(count)) / annotators


# ---- files ------------------------------------------------------------------------------------------------------------


def read_questions(folder, name):
    path = folder / f"v2_OpenEnded_mscoco_{name}_questions.json"
    content = published.read_json(path)
    published.check_keys(path, content, ["questions"])
    return published.rows(path, content["questions"], ("image_id", "question", "question_id"))


def read_annotations(folder, name):
    """{question_id: (answer type, normalised most frequent answer, Counter of normalised answers)}."""
    path = folder / f"v2_mscoco_{name}_annotations.json"
    content = published.read_json(path)
    published.check_keys(path, content, ["annotations"])
    needed = ("question_id", "answer_type", "multiple_choice_answer", "answers")
    annotations = {}
    for where, row in published.rows(path, content["annotations"], needed):
        published.require(len(row["answers"]) == 10, where, f"{len(row['answers'])} answers, not ten")
        counts = Counter(normalize_answer(entry["answer"]) for entry in row["answers"])
        top = normalize_answer(row["multiple_choice_answer"])
        annotations[row["question_id"]] = (row["answer_type"], top, counts)
    return annotations


def question_record(folder, name, row, out):
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
        for where, row in read_questions(folder, name):
            published.require(row["question_id"] in split, where, f"question {row['question_id']} has no annotation")
            kind, _, counts = split[row["question_id"]]
            scores = {}
            for answer, count in counts.items():
                if name == "val2014" and answer:
                    scores[answer] = round(vqa_accuracy(count), 4)
                elif answer in kept and answer:
                    scores[answer] = round(soft_score(count), 4)
            if scores:
                record = question_record(folder, name, row, out)
                yield {**record, "answer": scores, "kind": kind, "split": "val" if name == "val2014" else "train"}


def unanswered(folder, out):
    """Records of test, whose answers are not public."""
    for _, row in read_questions(folder, "test2015"):
        yield {**question_record(folder, "test2015", row, out), "split": "test"}


def convert(folder, out, min_count):
    published.write_jsonl(out / "vqa_v2.jsonl", answered(folder, out, min_count))
    if (folder / "v2_OpenEnded_mscoco_test2015_questions.json").is_file():
        published.write_jsonl(out / "vqa_v2_test.jsonl", unanswered(folder, out))


def add_options(parser):
    parser.add_argument(
        "--min-count", type=int, default=9, help="questions that an answer of the list is the top answer of"
    )


if __name__ == "__main__":
    sys.exit(published.main(convert, __doc__, add_options))
