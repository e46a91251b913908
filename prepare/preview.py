"""A contact sheet of a data set, to look at before training: `python data.py preview FILE`."""

import textwrap

import numpy as np
from PIL import Image, ImageDraw, ImageOps

from common import UserError
from support import drawing
from support.records import Mistakes, Pictures, picture_names, read_records
from support.regions import open_picture, read_features


def draw_sheet(path, task, splits, split, count):
    """A sheet of `count` examples of a split, three in a row: the first of each picture. UserError if a line is wrong."""
    mistakes = Mistakes(task)
    pictures = Pictures(path.parent, patch=1, grid=1)  # which are not read here
    cells = []
    seen = set()
    for where, record in read_records(path, task, splits, mistakes):
        names = tuple(picture_names(record))
        if record["split"] == split and names not in seen:
            seen.add(names)
            cells.append(preview_cell(where, record, pictures))
        if len(cells) == count:
            break
    mistakes.stop(path)
    if not cells:
        raise UserError(f"{path}: has no examples of split {split}")
    return drawing.grid(cells, 3)


def preview_cell(where, record, pictures, side=336, gap=12):
    """One example as a picture: its one or two pictures, `side` pixels wide or high, over its text."""
    store, rows = pictures.find(where, record)
    shown = [draw_regions(where, record, pictures, store, row, side) for row in rows]
    lines = []
    for key in ("kind", "text", "choices", "answer", "label", "reasons", "reason"):
        if key in record:
            text = f"{key}: {value_as_text(record[key])}"
            lines += textwrap.wrap(text, 50 * len(shown), subsequent_indent="    ", max_lines=6)
    height = max(picture.height for picture in shown)
    cell = Image.new("RGB", (len(shown) * (side + gap) + gap, gap + height + 12 + 16 * len(lines)), "white")
    for i, picture in enumerate(shown):
        cell.paste(picture, (gap + i * (side + gap), gap))
    font = drawing.font_for("".join(lines), 12)
    ImageDraw.Draw(cell).multiline_text((gap, gap + height + 4), "\n".join(lines), "black", font)
    return cell


def value_as_text(value):
    """A value of a line for a reader: an answer, soft answers as "red 1, blue 0.3", lists with commas."""
    if isinstance(value, dict) and len(value) == 1:
        return next(iter(value))
    if isinstance(value, dict):
        return ", ".join(f"{name} {score:g}" for name, score in value.items())
    if isinstance(value, list):
        return ", ".join(str(entry) for entry in value)
    return str(value)


def draw_regions(where, record, pictures, store, row, side):
    """A picture with the boxes of its regions, the target's in red. Of a store that does not know the picture, its regions."""
    boxes = []  # 0..1
    if store:
        known = pictures.stores[store]
        image, boxes = drawing.picture_of(known, row, known.picture_file(row), side)
    else:
        job = pictures.jobs[row]
        if job.path.suffix == ".npz":
            regions, (width, height) = read_features(where, job.path)
            image = Image.new("RGB", (side, side), "grey")
            boxes = (regions["boxes"] / [width, height, width, height]).tolist()
        else:
            image = open_picture(where, job.path)
            boxes = (np.array(job.boxes or np.zeros((0, 4))) / [*image.size, *image.size]).tolist()
            image = ImageOps.contain(image, (side, side))
    pen = ImageDraw.Draw(image)
    scale = np.array([*image.size, *image.size])
    for box in boxes:
        pen.rectangle((np.array(box) * scale).tolist(), outline="white")
    if "target" in record:
        target = pictures.scale_target(record, store, row)
        pen.rectangle((np.array(target) * scale).tolist(), outline="red", width=2)
    return image
