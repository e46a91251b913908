"""Draws bar charts of four quarters and asks questions about them: a built-in data set, and a pattern for your own.

    python train.py --model uniter --task vqa --data charts
    python prepare/charts.py OUT [--boxes none]        writes OUT/charts.jsonl, OUT/dataset.json and the pictures

4,000 charts with four questions each: which quarter is the highest, and which the lowest; whether one is higher than
another; how many are above 50, for which one must read the axis. Sizes, colours, titles and the scale of the axis vary.
The regions are the four bars. With --boxes none the lines have no boxes, and the regions are made as for any picture of
your own.
"""

import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for `python prepare/charts.py`

import data

VERSION = 1  # raise it when `make` draws something else: it is part of the name of the folder in the cache
COUNTS = {"train": 3200, "val": 200, "test": 600}
QUARTERS = ("Q1", "Q2", "Q3", "Q4")
TITLES = ("Revenue", "Sales", "Profit", "Costs", "Orders", "Turnover")
GROUNDS = ("white", "#f7f7f7", "#fffdf0", "#eef3f8")
COLOURS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#17becf", "#7f7f7f", "#333333", "#0b5394")


def draw_chart(values, rng):
    """(picture, boxes [[x1,y1,x2,y2], ...] of the bars in pixels) of four values in 10..99."""
    width = int(rng.integers(240, 420))
    height = int(rng.integers(180, 300))
    picture = Image.new("RGB", (width, height), rng.choice(GROUNDS))
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(size=int(rng.integers(10, 14)))
    left = int(rng.integers(30, 46))
    top = int(rng.integers(26, 41))
    right = width - int(rng.integers(8, 21))
    bottom = height - int(rng.integers(24, 35))
    highest = int(rng.integers(100, 131))  # value at the upper end of the axis
    pixels = (bottom - top) / highest  # of one unit
    title = f"{rng.choice(TITLES)} {rng.integers(2008, 2026)}, million"
    draw.text((width / 2, top / 2), title, fill="black", font=font, anchor="mm")
    for tick in range(0, highest + 1, 20):
        y = bottom - pixels * tick
        draw.line((left, y, right, y), fill="#cccccc")
        draw.text((left - 4, y), str(tick), fill="black", font=font, anchor="rm")
    step = (right - left) / len(values)
    half = step * rng.uniform(0.2, 0.45)  # half of a bar's width
    colours = rng.choice(COLOURS, len(values))
    if rng.random() < 0.6:
        colours[:] = colours[0]
    boxes = []
    for i, (value, colour) in enumerate(zip(values, colours, strict=True)):
        x = left + step * (i + 0.5)
        box = [round(x - half), round(bottom - pixels * value), round(x + half), bottom]
        draw.rectangle(box, fill=str(colour))
        draw.text((x, bottom + 10), QUARTERS[i], fill="black", font=font, anchor="mm")
        boxes.append(box)
    draw.line((left, top, left, bottom, right, bottom), fill="black")
    return picture, boxes


def questions(values, rng):
    """[(kind, text, answer), ...] about four values, no two of them equal."""
    first, second = rng.choice(len(values), 2, replace=False)
    return [
        ("highest", "which quarter is the highest?", QUARTERS[np.argmax(values)]),
        ("lowest", "which quarter is the lowest?", QUARTERS[np.argmin(values)]),
        (
            "compare",
            f"is {QUARTERS[first]} higher than {QUARTERS[second]}?",
            "yes" if values[first] > values[second] else "no",
        ),
        ("count", "how many quarters are above 50?", str(sum(value > 50 for value in values))),
    ]


def make(folder, counts=COUNTS, with_boxes=True, seed=0):
    """Draws the data set into `folder`."""
    folder = Path(folder)
    (folder / "charts").mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    lines = []
    for split, count in counts.items():
        for i in range(count):
            values = rng.choice(np.arange(10, 100, 3), len(QUARTERS), replace=False).tolist()
            picture, boxes = draw_chart(values, rng)
            name = f"charts/{split}-{i}.png"
            picture.save(folder / name)
            for kind, text, answer in questions(values, rng):
                line = {"image": name, "text": text, "answer": answer, "kind": kind, "split": split}
                if with_boxes:
                    line["boxes"] = boxes
                lines.append(json.dumps(line))
    data.write_text(folder / "charts.jsonl", "\n".join(lines) + "\n")
    description = {"name": "charts", "files": {"vqa": "charts.jsonl"}, "defaults": {"steps": 5000}}
    data.write_text(folder / "dataset.json", json.dumps(description, indent=1))


def main():
    """Exit code 0, or 2 with one line on stderr."""
    parser = data.Parser(prog="charts.py", description="Draw bar charts with questions.")
    parser.add_argument("out", help="folder to write")
    parser.add_argument(
        "--boxes", choices=["bars", "none"], default="bars", help="regions of the lines (default: bars)"
    )
    try:
        args = parser.parse_args()
        make(args.out, with_boxes=args.boxes == "bars")
    except (data.UserError, OSError) as error:
        print(f"charts.py: {data.UserError(str(error))}", file=sys.stderr)
        return 2
    print(f"{args.out}: {sum(COUNTS.values())} charts")
    return 0


if __name__ == "__main__":
    sys.exit(main())
