"""AI2D (Kembhavi et al. 2016): diagrams of science textbooks, questions with four choices, to JSONL for --task vcr.

    python prepare/ai2d.py FOLDER OUT        writes OUT/ai2d.jsonl and the pictures OUT/letters/

FOLDER has images/, questions/, annotations/ and ai2d_test_ids.csv, the numbers of the test pictures. Questions with
`abcLabel` refer to letters ("What does A show?"). The published pictures do not have these letters; the annotations give
one for each text of a diagram, `replacementText`. So letters/ holds copies of these pictures in which each text is
covered by its letter. Quirk of the files: a choice may be empty, or "{}"; it becomes "none".
"""

import sys
from pathlib import Path

from PIL import ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for `python prepare/ai2d.py`

from common import UserError
from prepare import published
from support.regions import open_picture

NEEDED = ("answerTexts", "correctAnswer", "abcLabel", "questionId")


def records(folder, out):
    """A record for each question."""
    test = {line.strip() for _, line in published.read_text_lines(folder / "ai2d_test_ids.csv")}
    published.require((folder / "questions").is_dir(), folder / "questions", "no such folder")
    for path in sorted((folder / "questions").glob("*.json")):
        content = published.read_json(path)
        published.check_keys(path, content, ("imageName", "questions"))
        name = content["imageName"]
        questions = content["questions"]
        published.require(isinstance(questions, dict), path, "'questions' is no object; is this the published file?")
        for text, question in questions.items():
            published.check_keys(f"{path}: {text!r}", question, NEEDED)
        if any(question["abcLabel"] for question in questions.values()):
            draw_letters(folder, name, out)
        for text, question in questions.items():
            where = f"{path}: {text!r}"
            choices = question["answerTexts"]
            right = question["correctAnswer"]
            published.require(len(choices) == 4, where, f"{len(choices)} choices, not 4")
            published.require(all(isinstance(choice, str) for choice in choices), where, "a choice is no text")
            published.require(right in range(4), where, f"correctAnswer {right!r}, not 0 to 3")
            images = out / "letters" if question["abcLabel"] else folder / "images"
            yield {
                "image": published.picture(images / name, out),
                "text": text,
                "choices": ["none" if choice.strip() in ("", "{}") else choice for choice in choices],
                "label": right,
                "split": "test" if Path(name).stem in test else "train",
                "id": question["questionId"],
            }


def draw_letters(folder, name, out):
    """Writes OUT/letters/name: the picture with each text covered by its letter, as large as the text's box allows."""
    path = folder / "annotations" / f"{name}.json"
    content = published.read_json(path)
    published.check_keys(path, content, ["text"])
    image = open_picture(path, folder / "images" / name)
    draw = ImageDraw.Draw(image)
    published.require(isinstance(content["text"], dict), path, "'text' is no object; is this the published file?")
    for row in content["text"].values():
        published.check_keys(path, row, ("rectangle", "replacementText"))
        try:
            (x1, y1), (x2, y2) = row["rectangle"]
        except (TypeError, ValueError):
            raise UserError(f"{path}: 'rectangle' {row['rectangle']}, not two corners") from None
        if x1 + 1 > x2 or y1 + 1 > y2:
            continue  # no letter is smaller than a pixel
        draw.rectangle((x1, y1, x2, y2), fill="white")
        font = ImageFont.load_default(size=min(x2 - x1, y2 - y1))
        draw.text(((x1 + x2) / 2, (y1 + y2) / 2), row["replacementText"], fill="black", font=font, anchor="mm")
    (out / "letters").mkdir(exist_ok=True)
    image.save(out / "letters" / name)


def convert(folder, out):
    """Writes OUT/ai2d.jsonl and OUT/letters/."""
    published.write_jsonl(out / "ai2d.jsonl", records(folder, out))


if __name__ == "__main__":
    sys.exit(published.main(convert, __doc__))
