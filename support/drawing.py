"""drawing.py: examples with their answers as one picture, by Pillow.

`draw` makes the sheet of `predict.py --scenes`. The other functions draw its parts: a picture with the boxes of its
regions, lines of text, bars. attention_sheet.py uses them too.
"""

import contextlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from common import UserError
from support import evaluation, regions

SIDE = 400  # width of a cell in pixels
MARGIN = 12
MOST_LINES = 40  # of a text in a cell
SYSTEM_FONTS = ("NotoSansCJK-Regular.ttc", "Arial Unicode.ttf", "DejaVuSans.ttf", "arial.ttf")  # the most letters first
GREY = (80, 80, 80)
GREEN = (0, 140, 60)
RED = (200, 40, 40)
BLUE = (70, 120, 200)
NO_WORDS = "(no words)"  # of a caption without any
NO_PICTURE_NAME = "not the name of a picture file; write one that ends in .png"


def draw(task, dataset, answers, files, out):
    """Draws examples with their answers as one picture, two side by side. files: {row of the store: picture file}."""
    cells = []
    for i, answer in enumerate(answers):
        cells.append(draw_cell(task, dataset, i, answer, files))
    save(grid(cells, 2), out, "--out")


def grid(cells, columns):
    """Pictures put together in rows of at most so many columns, on white."""
    rows = [cells[i : i + columns] for i in range(0, len(cells), columns)]
    heights = [max(cell.height for cell in row) for row in rows]
    widths = [sum(cell.width for cell in row) for row in rows]
    picture = Image.new("RGB", (max(widths), sum(heights)), "white")
    top = 0
    for row, height in zip(rows, heights, strict=True):
        left = 0
        for cell in row:
            picture.paste(cell, (left, top))
            left += cell.width
        top += height
    return picture


def save(picture, path, option):
    """Writes a picture file, whole or not at all. UserError, which names the option, for a name that no picture can have."""
    kind = picture_format(path, option)
    try:
        regions.write_whole(path, lambda temporary: picture.save(temporary, format=kind))
    except (ValueError, OSError) as error:  # without errno: a format without colours
        if getattr(error, "errno", None) is not None:
            raise
        raise UserError(f"{option} {path}: {NO_PICTURE_NAME}") from None


def picture_format(path, option):
    """Pillow's name of the format that a file name stands for. UserError, which names the option, if there is none."""
    kind = Image.registered_extensions().get(Path(path).suffix.lower())
    if kind not in Image.SAVE:
        raise UserError(f"{option} {path}: {NO_PICTURE_NAME}")
    return kind


def draw_cell(task, dataset, i, answer, files):
    """One example: its one or two pictures with their boxes, the text, the answers as bars, the truth."""
    rows = list(dict.fromkeys(dataset.image[dataset.rows_of([i])].tolist()))
    width = (SIDE - MARGIN * (len(rows) + 1)) // len(rows)
    pictures = [draw_regions(dataset.store, row, files.get(row), answer, width) for row in rows]
    texts = [text_cell(answer.get("masked", text_of(task, dataset, i)), 17, "black")]
    if "caption" in answer:
        texts.append(text_cell(answer["caption"] or NO_WORDS, 17, BLUE))
    bars = []  # (name, probability, colour)
    if "match" in answer:
        bars.append(("text and picture match", answer["match"], BLUE))
    for name, prob in answer.get("answers", []):
        color = BLUE
        if "truth" in answer:
            color = GREEN if is_right(name, answer["truth"]) else RED
        bars.append((short_name(name), prob, color))
    truth = truth_line(answer)
    if isinstance(answer.get("truth"), list):
        truth += " (green frame; blue: the likeliest)"
    texts_and_bars = [*texts, bars_cell(bars), text_cell(truth, 14, GREY)]

    top = blank(MARGIN + max(picture.height for picture in pictures) + 8)
    for number, picture in enumerate(pictures):
        top.paste(picture, (MARGIN + number * (width + MARGIN), MARGIN))
    return grid([top, *texts_and_bars, blank(MARGIN)], 1)


def blank(height, width=SIDE):
    """An empty cell."""
    return Image.new("RGB", (width, height), "white")


def is_right(name, truth):
    """Whether an answer is the true one; a box if it overlaps the true one by more than one half."""
    if isinstance(name, list):
        return evaluation.iou(torch.tensor([[name]]), torch.tensor([[truth]])).item() > 0.5
    return name == truth


def short_name(name):
    """An answer as text; of a box its corners in whole pixels."""
    if isinstance(name, list):
        return str([round(value) for value in name])
    return name


def truth_line(answer):
    """ "truth: red", or "" where the truth is not known."""
    if "truth" not in answer:
        return ""
    return f"truth: {short_name(answer['truth'])}"


def describe(answer, separator="  "):
    """An answer as one line of text: "red 0.981  blue 0.012"."""
    parts = []
    if "match" in answer:
        parts.append(f"match {answer['match']:.3f}")
    names = [f"{short_name(name)} {prob:.3f}" for name, prob in answer.get("answers", [])]
    if "masked" in answer:
        names[0] = f"{answer['masked']}: {names[0]}"
    parts += names
    if "caption" in answer:
        parts.append(answer["caption"] or NO_WORDS)
    return separator.join(parts)


def draw_regions(store, row, file, answer, width):
    """A picture, `width` pixels wide, with the boxes of its regions in white. If the answers are boxes, the likeliest one
    is drawn in blue, the true one in green."""
    image, boxes = picture_of(store, row, file, width)
    pen = ImageDraw.Draw(image)
    scale = np.tile(image.size, 2)
    for box in boxes:
        pen.rectangle((np.array(box) * scale).tolist(), outline="white")
    to_shown = scale / np.tile(store.sizes[row], 2) if store.sizes is not None else scale
    marked = []
    if isinstance(answer.get("truth"), list):
        marked.append((answer["truth"], GREEN, 6))
    for name, _ in answer.get("answers", [])[:1]:
        if isinstance(name, list):
            marked.append((name, BLUE, 3))
    for box, color, thickness in marked:
        pen.rectangle((np.array(box) * to_shown).tolist(), outline=color, width=thickness)
    return image


def picture_of(store, row, file, width):
    """(a picture, `width` pixels wide; the boxes of its regions in 0..1). Without a file it is pasted together from its
    regions."""
    image, boxes = paste_regions(store, row, width)
    if file:
        image = resized(regions.open_picture("the picture", file), width)
    return image, boxes


def resized(image, width):
    """A picture of another width, with its shape, but at least a quarter as high as wide and at most four times."""
    height = round(width * image.height / image.width)
    return image.resize((width, min(max(width // 4, height), 4 * width)))


def paste_regions(store, row, side):
    """(picture, boxes in 0..1) of a store's row: its regions pasted where they were. Dark where there is no region, and
    where the store has no pixels."""
    fields = store.gather(np.array([row]), fields=())
    boxes = fields["boxes"][0].tolist()
    image = Image.new("RGB", (side, side), (50, 50, 50))
    patch = round((fields["features"].shape[2] / 3) ** 0.5)
    if fields["features"].shape[2] == 3 * patch * patch:  # pixels: see region_features
        for values, (left, top, right, bottom) in zip(fields["features"][0].numpy(), boxes, strict=True):
            pixels = np.clip((values * 0.25 + 0.5) * 255, 0, 255).reshape(patch, patch, 3).astype(np.uint8)
            size = (max(1, round((right - left) * side)), max(1, round((bottom - top) * side)))
            image.paste(Image.fromarray(pixels).resize(size), (round(left * side), round(top * side)))
    return image, boxes


def font_for(text, size):
    """Pillow's own font, which has only ASCII's letters; for other texts one of the system, where there is one."""
    if not text.isascii():
        for name in SYSTEM_FONTS:
            with contextlib.suppress(OSError):  # it is not installed
                return ImageFont.truetype(name, size)
    return ImageFont.load_default(size)


def wrap(text, font, width):
    """A text in lines of at most so many pixels. A word that is wider is cut."""
    lines = []
    line = ""
    for word in text.split():
        longer = f"{line} {word}".strip()
        if font.getlength(longer) <= width:
            line = longer
            continue
        if line:
            lines.append(line)
        line = ""
        for letter in word:
            if line and font.getlength(line + letter) > width:
                lines.append(line)
                line = ""
            line += letter
    if line:
        lines.append(line)
    return lines


def text_cell(text, size, color, width=SIDE):
    """A cell with a text, as high as its lines are together. A text of more than MOST_LINES lines ends in "..."."""
    font = font_for(text, size)
    lines = wrap(text, font, width - 2 * MARGIN)
    if len(lines) > MOST_LINES:
        lines = [*lines[: MOST_LINES - 1], "..."]
    cell = blank(len(lines) * (size + 5), width)
    pen = ImageDraw.Draw(cell)
    for number, line in enumerate(lines):
        pen.text((MARGIN, number * (size + 5)), line, color, font)
    return cell


def shorten(text, font, width):
    """A text of at most so many pixels: its end becomes "..." where it is too long."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."


def bars_cell(bars):
    """A cell with a line for each (answer, its probability, colour): the answer, a bar as long as its probability, and the
    number."""
    cell = blank(20 * len(bars))
    pen = ImageDraw.Draw(cell)
    font = font_for(" ".join(name for name, _, _ in bars), 14)
    left = MARGIN + 200
    for number, (name, prob, color) in enumerate(bars):
        y = 20 * number
        pen.text((MARGIN, y), shorten(name, font, 190), "black", font)
        pen.rectangle((left, y + 3, left + round(124 * prob), y + 14), fill=color)
        pen.text((left + 130, y), f"{100 * prob:.1f}%", "black", font)
    return cell


def text_of(task, dataset, i):
    """The text of example i as a reader sees it: without the choices, and "" where the model has to write it."""
    text = dataset.text[dataset.rows_of([i])[0]]
    if task.truth == "text":
        return ""
    if isinstance(text, tuple):
        return " ".join(text[:-1])  # the last segment is a choice
    return text
