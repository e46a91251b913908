"""AI2D (Kembhavi et al. 2016): diagrams of science textbooks, questions with four choices, to JSONL for --task vcr.

    python prepare/ai2d.py FOLDER OUT        writes OUT/ai2d.jsonl and the pictures OUT/letters/

FOLDER has images/, questions/, annotations/ and ai2d_test_ids.csv, the numbers of the test pictures. A question with
`abcLabel` speaks of letters ("What does A show?"), which the published pictures lack: a letter stands for each text of
the diagram. So letters/ has these pictures with every text covered by its letter, `replacementText`. Quirk of the files:
a choice that is empty, or "{}", is no choice; it becomes "none".
"""

import sys
from pathlib import Path

from PIL import ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for `python prepare/ai2d.py`

from prepare import published
from support.regions import open_picture

NEEDED = ("answerTexts", "correctAnswer", "abcLabel", "questionId")


def records(folder, out):
    """A record for each question."""
    test = {line.strip() for _, line in published.read_text_lines(folder / "ai2d_test_ids.csv")}
    for path in sorted((folder / "questions").glob("*.json")):
        content = published.read_json(path)
        published.check_keys(path, content, ("imageName", "questions"))
        name = content["imageName"]
        if any(question.get("abcLabel") for question in content["questions"].values()):
            draw_letters(folder, name, out)
        for text, question in content["questions"].items():
            where = f"{path}: {text!r}"
            published.check_keys(where, question, NEEDED)
            choices = question["answerTexts"]
            published.require(len(choices) == 4, where, f"{len(choices)} choices, not 4")
            images = out / "letters" if question["abcLabel"] else folder / "images"
            yield {
                "image": published.picture(images / name, out),
                "text": text,
                "choices": ["none" if choice.strip() in ("", "{}") else choice for choice in choices],
                "label": int(question["correctAnswer"]),
                "split": "test" if Path(name).stem in test else "train",
                "id": question["questionId"],
            }


def draw_letters(folder, name, out):
    """Writes the picture OUT/letters/name, in which each text is covered by its letter, as large as the text is high."""
    path = folder / "annotations" / f"{name}.json"
    content = published.read_json(path)
    published.check_keys(path, content, ["text"])
    image = open_picture(path, folder / "images" / name)
    draw = ImageDraw.Draw(image)
    for row in content["text"].values():
        published.check_keys(path, row, ("rectangle", "replacementText"))
        corners = row["rectangle"]
        published.require(
            [len(corner) for corner in corners] == [2, 2], path, f"'rectangle' {corners}, not two corners"
        )
        (x1, y1), (x2, y2) = corners
        if x1 >= x2 or y1 >= y2:
            continue  # some are lines; none of these is asked for
        draw.rectangle((x1, y1, x2, y2), fill="white")
        font = ImageFont.load_default(size=y2 - y1)
        draw.text(((x1 + x2) / 2, (y1 + y2) / 2), row["replacementText"], fill="black", font=font, anchor="mm")
    (out / "letters").mkdir(exist_ok=True)
    image.save(out / "letters" / name)


def convert(folder, out):
    """Writes OUT/ai2d.jsonl and OUT/letters/."""
    published.write_jsonl(out / "ai2d.jsonl", records(folder, out))


if __name__ == "__main__":
    sys.exit(published.main(convert, __doc__))
