"""drawing.py: examples with their answers as one picture, by Pillow.

`draw` makes the sheet of `predict.py --scenes`. The other functions draw its parts: a picture with the boxes of its
regions, lines of text, bars. attention_sheet.py uses them too.
"""

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from common import UserError
from prepare import preview
from support import evaluation, regions

SIDE = 400  # width of a cell in pixels
MARGIN = 12
GREY = (80, 80, 80)
GREEN = (0, 140, 60)
RED = (200, 40, 40)
BLUE = (70, 120, 200)


def draw(run, task, dataset, answers, files, out):
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
    kind = Image.registered_extensions().get(path.suffix.lower())
    try:
        if kind not in Image.SAVE:
            raise ValueError(f"Pillow writes no files that end in {path.suffix!r}")
        regions.write_whole(path, lambda temporary: picture.save(temporary, format=kind))
    except (ValueError, OSError) as error:  # without errno: a format without colours
        if getattr(error, "errno", None) is not None:
            raise
        raise UserError(f"{option} {path}: not the name of a picture file; write one that ends in .png") from None


def draw_cell(task, dataset, i, answer, files):
    """One example: its one or two pictures with their boxes, the text, the answers as bars, the truth."""
    rows = list(dict.fromkeys(dataset.image[dataset.rows([i])].tolist()))
    cell = Image.new("RGB", (SIDE, 2 * SIDE), "white")
    pen = ImageDraw.Draw(cell)
    width = (SIDE - MARGIN * (len(rows) + 1)) // len(rows)
    bottom = 0
    for number, row in enumerate(rows):
        picture = draw_regions(dataset.store, row, files.get(row), answer, width)
        cell.paste(picture, (MARGIN + number * (width + MARGIN), MARGIN))
        bottom = max(bottom, MARGIN + picture.height)
    y = bottom + 8
    y = write_text(pen, answer.get("masked", text_of(task, dataset, i)), y, 17, "black")
    y = write_text(pen, answer.get("caption", ""), y, 17, BLUE)
    if "match" in answer:
        y = draw_bar(pen, "text and picture match", answer["match"], y, BLUE)
    for name, prob in answer.get("answers", []):
        color = BLUE
        if "truth" in answer:
            color = GREEN if is_right(name, answer["truth"]) else RED
        y = draw_bar(pen, short_name(name), prob, y, color)
    if "truth" in answer:
        text = f"truth: {short_name(answer['truth'])}"
        if isinstance(answer["truth"], list):
            text += " (green frame; blue: the likeliest)"
        y = write_text(pen, text, y + 2, 14, GREY)
    return cell.crop((0, 0, SIDE, y + MARGIN))


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
    image, boxes = preview.paste_regions(store, row, width)
    if file:
        image = regions.open_picture("the picture", file)
        image = image.resize((width, max(1, round(width * image.height / image.width))))
    return image, boxes


def write_text(pen, text, y, size, color, width=SIDE):
    """Writes a text into a cell, in lines as wide as the cell. Returns the y below it."""
    font = ImageFont.load_default(size)
    line = ""
    for word in text.split():
        longer = f"{line} {word}".strip()
        if line and font.getlength(longer) > width - 2 * MARGIN:
            pen.text((MARGIN, y), line, color, font)
            y += size + 5
            longer = word
        line = longer
    if line:
        pen.text((MARGIN, y), line, color, font)
        y += size + 5
    return y


def draw_bar(pen, name, prob, y, color):
    """An answer, a bar as long as its probability, and the number. Returns the y below it."""
    font = ImageFont.load_default(14)
    while font.getlength(name) > 190 and len(name) > 4:
        name = name[:-4] + "..."
    pen.text((MARGIN, y), name, "black", font)
    left = MARGIN + 200
    pen.rectangle((left, y + 3, left + round(130 * prob), y + 14), fill=color)
    pen.text((left + 138, y), f"{100 * prob:.1f}%", "black", font)
    return y + 20


def text_of(task, dataset, i):
    """The text of example i as a reader sees it: without the choices, and "" where the model has to write it."""
    text = dataset.text[dataset.rows([i])[0]]
    if task.truth == "text":
        return ""
    if isinstance(text, tuple):
        return " ".join(text[:-1])  # the last segment is a choice
    return text
