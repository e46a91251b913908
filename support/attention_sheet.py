"""attention_sheet.py: what `predict.py CKPT --attention FILE` draws: what the answer, the words and the regions attend to.

    python predict.py out/uniter-vqa/best.pt --scenes 2 --attention a.png                    the answer and all words
    python predict.py out/uniter-vqa/best.pt --image a.png --text "..." --attention a.png --word circle

One sheet for each example, made of cells: pictures that `drawing.grid` puts together. All numbers are percent. The
methods are in attention.py. Letters: N regions, W words.
"""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

import data
from common import UserError
from support import attention, drawing
from support.drawing import GREEN, MARGIN, SIDE, bars_cell, font_for, resized, shorten, text_cell

SPECIALS = ("[CLS]", "[SEP]")  # words that get no picture of their own
CELL = 180  # width of a small picture in pixels
LARGE = 360
COLUMNS = 5  # small pictures side by side
MOST = 12  # regions with a number, or with a row of the table
DARK = 0.25  # brightness of a region without weight
ORANGE = (240, 120, 0)


def check_options(args):
    """UserError for options of predict.py that do not fit together. Sets the default of --method."""
    if args.attention and args.image is None and args.scenes is None:
        raise UserError("--attention needs --image or --scenes")
    for name in ("method", "word", "region", "layer", "head"):
        if getattr(args, name) is not None and not args.attention:
            raise UserError(f"--{name} says what --attention draws; give --attention FILE")
    if args.word and args.region is not None:
        raise UserError("give --word or --region, not both")
    if args.method == "transport" and (args.word is not None or args.region is not None):
        raise UserError("--method transport draws all words and regions; leave out --word and --region")
    args.method = args.method or "raw"
    if args.method != "raw" and (args.layer is not None or args.head is not None):
        raise UserError("--layer and --head choose among the maps of --method raw; give it")


# ---- a sheet for each example ------------------------------------------------------------------------------------------


def show(run, task, dataset, files, titles, args):
    """Draws the sheets, one below the other, into `--attention`. Prints the heaviest region of the answer and each word.

    files: {row of the store: picture file}.   titles: of each example its question and answer, a list of lines.
    UserError where no text has the --word, or no picture the --region.
    """
    if args.word and run.tokenizer.normalizer:  # as the text's words are written: in lower case, of most vocabularies
        args.word = run.tokenizer.normalizer.normalize_str(args.word).strip()
    sheets = []
    for i, lines in enumerate(titles):
        print("\n".join(lines))
        for number, record in enumerate(attention.record_example(run, task, dataset, i), 1):
            if task.pictures > 1:
                print(f"    picture {number}")
            image, boxes = drawing.picture_of(dataset.store, record.picture, files.get(record.picture), LARGE)
            words, _ = attention.join_pieces(record.pieces)
            if args.region is not None and args.region >= len(boxes):
                raise UserError(f"--region {args.region}: the picture has regions 0 to {len(boxes) - 1}")
            if args.word and args.word not in words:
                print(f"    no word {args.word!r}, but {' '.join(words)}")
                continue
            if args.method == "transport":
                rows = transport_rows(run, record, words, image, boxes)
            elif args.word:
                rows = word_rows(record, words, image, boxes, args)
            elif args.region is not None:
                rows = region_rows(record, words, image, boxes, args)
            else:
                rows = all_rows(record, words, image, boxes, args)
            sheets.append(draw_sheet(lines, rows))
    if not sheets:
        raise UserError(f"--word {args.word}: it is in none of the texts; choose one of the words printed above")
    drawing.save(drawing.grid(sheets, 1), Path(args.attention), "--attention")
    print(f"{args.attention}: attention, method {args.method}")


def relevance(record, args):
    """The matrix (S, S) of --method, and its name for titles."""
    if args.method != "raw":
        return attention.METHODS[args.method](record), args.method
    name = "raw"
    if args.layer is not None:
        name += f", layer {args.layer}"
    if args.head is not None:
        name += f", head {args.head}"
    return attention.raw(record, args.layer, args.head), name


def all_rows(record, words, image, boxes, args):
    """The regions' numbers and the answer by each method; a picture for each word; a table of regions and words."""
    matrix, name = relevance(record, args)
    small = resized(image, CELL)
    first = [draw_numbers(small, boxes)]
    for method, function in attention.METHODS.items():
        whole = matrix if method == name else function(record)
        weights = attention.normalize_rows(attention.answer_regions(record, whole)).tolist()
        first.append(draw_heat(small, boxes, weights, f"the answer, {method}"))
    answer = attention.normalize_rows(attention.answer_regions(record, matrix)).tolist()
    print_heaviest("(the answer)", answer)
    pictures = []
    for word, weights in zip(words, attention.words_to_regions(record, matrix).tolist(), strict=True):
        if word not in SPECIALS:
            print_heaviest(word, weights)
            pictures.append(draw_heat(small, boxes, weights, word))
    rows = [first]
    for start in range(0, len(pictures), COLUMNS):
        rows.append(pictures[start : start + COLUMNS])
    to_words = attention.regions_to_words(record, matrix).tolist()
    shown = sorted(np.argsort(answer)[::-1][:MOST].tolist())  # the heaviest regions, by number
    thumbnails = [draw_thumbnail(small, boxes[i], i) for i in shown]
    table = draw_table(
        [to_words[i] for i in shown], thumbnails, words, f"how much each region attends to each word, {name}"
    )
    return [*rows, [table]]


def word_rows(record, words, image, boxes, args):
    """One word: its picture and its regions as bars. Raw maps also by layer (a row each) and head, where neither is chosen."""
    rows = []
    for number, word in enumerate(words):
        if word == args.word:
            rows += rows_of_word(record, number, image, boxes, args)
    return rows


def rows_of_word(record, number, image, boxes, args):
    """`word_rows` for one place of the word in the text: its number among all words."""
    matrix, name = relevance(record, args)
    weights = attention.words_to_regions(record, matrix)[number].tolist()
    print_heaviest(args.word, weights)
    heaviest = np.argsort(weights)[::-1][:MOST].tolist()
    bars = draw_bars([f"region {i}" for i in heaviest], [weights[i] for i in heaviest], f"{name}, percent")
    rows = [[draw_heat(image, boxes, weights, f'"{args.word}" attends to'), draw_numbers(image, boxes)], [bars]]
    if args.method == "raw" and args.layer is None and args.head is None:
        layers, heads = attention.count_maps(record)
        small = resized(image, CELL)
        for layer in range(layers):
            row = []
            for head in range(heads):
                weights = attention.words_to_regions(record, attention.raw(record, layer, head))[number].tolist()
                row.append(draw_heat(small, boxes, weights, f"layer {layer}, head {head}"))
            rows.append(row)
    return rows


def region_rows(record, words, image, boxes, args):
    """One region: the picture with its frame, and its words as bars."""
    matrix, name = relevance(record, args)
    weights = attention.regions_to_words(record, matrix)[args.region].tolist()
    best = int(np.argmax(weights))
    print(f"    region {args.region}: {words[best]} {weights[best]:.3f}")
    bars = draw_bars(words, weights, f"how much region {args.region} attends to each word, {name}")
    return [[draw_numbers(image, boxes, args.region), bars]]


def transport_rows(run, record, words, image, boxes):
    """UNITER's transport plan: lines from words to regions, and the plan as a table, each word's row in percent."""
    _, members = attention.join_pieces(record.pieces)
    plan = attention.normalize_rows(members @ attention.transport_plan(run, record)).tolist()  # (W, T) @ (T, N)
    if "wra" not in run.objectives:
        data.warn("the checkpoint was trained without wra, so nothing has aligned its words with its regions")
    for word, weights in zip(words, plan, strict=True):
        print_heaviest(word, weights)
    thumbnails = [draw_thumbnail(image, box, i) for i, box in enumerate(boxes)]
    table = draw_table(plan, words, thumbnails, "transport plan: where each word goes")
    return [[draw_lines(image, boxes, words, plan, "each word's largest share")], [table]]


def print_heaviest(name, weights):
    best = int(np.argmax(weights))
    print(f"    {name}: region {best} {weights[best]:.3f}")


# ---- cells -------------------------------------------------------------------------------------------------------------


def corners_of(image, box):
    """A box in 0..1 as whole pixels of a picture: left, top, right, bottom, at least one pixel wide and high."""
    left, top, right, bottom = (np.array(box) * np.tile(image.size, 2)).round().astype(int).tolist()
    left = min(left, image.width - 1)
    top = min(top, image.height - 1)
    return left, top, max(right, left + 1), max(bottom, top + 1)


def titled(picture, title):
    """A cell: a title above a picture."""
    title = shorten(title, font_for(title, 14), picture.width - MARGIN)
    cell = Image.new("RGB", (picture.width + MARGIN, picture.height + 34), "white")
    cell.paste(text_cell(title, 14, "black", cell.width), (0, 6))
    cell.paste(picture, (MARGIN, 28))
    return cell


def write_number(pen, image, box, text):
    """A short text at the upper left corner of a box, white with a black rim. That of the whole picture stands at the lower
    right: the first square of a grid has the same upper left corner."""
    font = ImageFont.load_default(13)
    left, top, right, bottom = corners_of(image, box)
    if (left, top, right, bottom) == (0, 0, *image.size):
        left = right
        top = bottom
    left = min(left + 4, image.width - font.getlength(text) - 3)
    top = max(0, min(top + 1, image.height - 15))
    pen.text((left, top), text, "white", font, stroke_width=2, stroke_fill="black")


def draw_numbers(image, boxes, chosen=None):
    """A cell: the picture with the numbers of its regions; the region `chosen` in a green frame."""
    shown = image.copy()
    pen = ImageDraw.Draw(shown)
    for number, box in enumerate(boxes):
        color = GREEN if number == chosen else "white"
        pen.rectangle(corners_of(image, box), outline=color, width=4 if number == chosen else 1)
    for number, box in enumerate(boxes):
        write_number(pen, image, box, str(number))
    return titled(shown, f"equal weights: {100 / len(boxes):.1f}")


def draw_heat(image, boxes, weights, title):
    """A cell: the picture, dark outside of its regions. A region is the brighter, and its frame the thicker, the larger
    its weight. Small regions cover large ones, so a large one shows its brightness where no smaller one lies. The 12
    heaviest (MOST) have their weight in percent.

    boxes: N lists x1, y1, x2, y2 in 0..1.   weights: N numbers in 0..1.
    """
    order = np.argsort(weights).tolist()  # of frames: the heaviest last
    most = max(weights[order[-1]], 1e-9)
    areas = [(x2 - x1) * (y2 - y1) for x1, y1, x2, y2 in boxes]
    dark = image.point(lambda value: value * DARK)
    shown = dark.copy()
    for i in sorted(order, key=lambda i: -areas[i]):
        corners = corners_of(image, boxes[i])
        region = Image.blend(dark.crop(corners), image.crop(corners), weights[i] / most)
        shown.paste(region, corners[:2])
    pen = ImageDraw.Draw(shown)
    thickest = 3 if len(boxes) <= 2 * MOST else 1  # many frames would hide the picture
    for i in order:
        share = weights[i] / most
        color = tuple(round(60 + (value - 60) * share) for value in ORANGE)  # from grey to orange
        pen.rectangle(corners_of(image, boxes[i]), outline=color, width=1 + round(thickest * share))
    for i in order[-MOST:]:
        write_number(pen, image, boxes[i], f"{100 * weights[i]:.0f}")
    return titled(shown, title)


def draw_table(weights, rows, columns, title):
    """A cell: a table of weights in percent, from white to orange within each row.

    weights: a list of rows, numbers in 0..1.   rows, columns: their names, each a text or a small picture.
    """
    font = ImageFont.load_default(13)
    width = 54  # of a column
    height = 26  # of a row
    left = 100
    top = 56
    total = max(left + width * len(columns) + MARGIN, SIDE)  # width of the table
    cell = Image.new("RGB", (total, top + height * len(rows) + MARGIN), "white")
    pen = ImageDraw.Draw(cell)
    cell.paste(text_cell(shorten(title, font_for(title, 14), total - 2 * MARGIN), 14, "black", total), (0, 6))
    for j, name in enumerate(columns):
        draw_name(cell, name, left + j * width, 30, width)
    for i, name in enumerate(rows):
        y = top + i * height
        draw_name(cell, name, MARGIN, y, left - MARGIN)
        most = max(max(weights[i]), 1e-9)
        for j, weight in enumerate(weights[i]):
            x = left + j * width
            color = tuple(round(255 + (value - 255) * weight / most) for value in ORANGE)
            pen.rectangle((x, y, x + width - 2, y + height - 2), fill=color)
            pen.text((x + 16, y + 5), f"{100 * weight:.0f}", "black", font)
    return cell


def draw_name(cell, name, x, y, width):
    """The name of a row or column: a small picture, or a text that is cut off where it is too long."""
    if isinstance(name, Image.Image):
        cell.paste(name, (x, y))
        return
    font = font_for(name, 13)
    ImageDraw.Draw(cell).text((x, y + 5), shorten(name, font, width - 4), "black", font)


def draw_thumbnail(image, box, number, size=22):
    """A region, size x size pixels, behind its number."""
    small = Image.new("RGB", (size + 22, size), "white")
    small.paste(image.crop(corners_of(image, box)).resize((size, size)), (20, 0))
    ImageDraw.Draw(small).text((0, 4), str(number), "black", ImageFont.load_default(13))
    return small


def draw_lines(image, boxes, words, plan, title):
    """A cell: the words, the picture beside them, and a line from each word to the region of its largest share, the thicker
    the larger. plan: W rows of N numbers, each row sums to 1."""
    left = 110
    height = max(image.height, 22 * len(words))
    shown = Image.new("RGB", (left + image.width, height), "white")
    shown.paste(image, (left, 0))
    pen = ImageDraw.Draw(shown)
    for box in boxes:
        x1, y1, x2, y2 = corners_of(image, box)
        pen.rectangle((left + x1, y1, left + x2, y2), outline="white")
    for i, word in enumerate(words):
        y = (i + 0.5) * height / len(words)
        draw_name(shown, word, 0, round(y) - 12, left - 30)
        best = int(np.argmax(plan[i]))
        x1, y1, x2, y2 = corners_of(image, boxes[best])
        end = (left + (x1 + x2) / 2, (y1 + y2) / 2)
        pen.line((left - 28, y, *end), fill=ORANGE, width=1 + round(3 * plan[i][best]))
    return titled(shown, title)


def draw_bars(names, weights, title):
    """A cell: names with bars as long as their weights, numbers in 0..1."""
    bars = [(name, weight, ORANGE) for name, weight in zip(names, weights, strict=True)]
    return drawing.grid([drawing.blank(6), text_cell(title, 14, "black"), drawing.blank(6), bars_cell(bars)], 1)


def draw_sheet(lines, rows):
    """A sheet: lines of text, and rows of cells under them."""
    body = drawing.grid([drawing.grid(row, len(row)) for row in rows], 1)
    width = max(body.width + MARGIN, 2 * SIDE)
    texts = [text_cell(line, 17, "black", width) for line in lines]
    return drawing.grid([drawing.blank(MARGIN, width), *texts, body], 1)
