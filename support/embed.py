"""embed.py: texts and pictures as vectors, and search among them, behind `predict.py CKPT --embed OUT.npz | --search TEXT`.

Text and picture are each encoded without the other. A checkpoint that was trained with the objective itc makes unit
vectors of one space of them, whose dot products say how well they fit. Of another checkpoint they are the state of
[CLS] and the mean of the regions' states, which cannot be compared with each other.

Letters: B rows of a batch, E texts, P pictures, T text positions, N regions, C width, W width of a vector.
"""

import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

import common
import data
from common import UserError
from support import drawing, records

# ---- vectors -----------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def text_vectors(run, batch):
    """(B, W) float32 of a batch's texts alone."""
    with run.autocast():
        states = run.model.encode(batch.to(run.device), regions=False).text.float()  # (B, T, C)
    if "itc" in run.model.heads:
        return run.model.heads["itc"].text(states).cpu()
    return states[:, 0].cpu()


@torch.inference_mode()
def picture_vectors(run, batch):
    """(B, W) float32 of a batch's pictures alone."""
    batch = batch.to(run.device)
    with run.autocast():
        states = run.model.encode(batch, text=False).regions.float()  # (B, N, C)
    if "itc" in run.model.heads:
        return run.model.heads["itc"].image(states, batch.region_mask).cpu()
    return common.masked_mean(states, batch.region_mask).cpu()


@torch.inference_mode()
def pair_vectors(run, batch):
    """(B, C) float32: the model's pooled vector of each text with its picture."""
    with run.autocast():
        return run.model.encode(batch.to(run.device)).pooled.float().cpu()


def all_texts(run, dataset):
    """Yields (examples, their vectors, the pooled vectors with their pictures), batches of like lengths."""
    for index in data.batches(dataset.lengths(), size=256):
        batch = data.collate(dataset, index)
        yield index, text_vectors(run, batch), pair_vectors(run, batch)


def all_pictures(run, dataset, rows):
    """Yields (places in `rows`, the vectors of these pictures). rows (P,): rows of the dataset's store."""
    for part in data.batches(np.diff(dataset.store.offsets)[rows], size=256):
        any_text = np.zeros(len(part), np.int64)  # it is not read
        yield part, picture_vectors(run, data.collate(dataset, any_text, rows[part]))


# ---- --embed -----------------------------------------------------------------------------------------------------------


def embed(run, datasets, out):
    """Writes the vectors of all texts and pictures of some Datasets as one .npz file:

        text_ids (E,)         ids of the lines
        text_vectors (E, W)   each text alone
        pair_vectors (E, C)   each text with its picture, pooled
        picture_of_text (E,)  the picture's row below
        picture_ids (P,)      the id of the picture's first line
        picture_vectors (P, W')   each picture alone

    The arrays grow on disk, beside `out`, until the file is written.
    """
    out = Path(out)
    if out.suffix != ".npz":
        raise UserError(f"--embed {out}: write the name of a file that ends in .npz")
    out.parent.mkdir(parents=True, exist_ok=True)
    rows = [np.unique(dataset.image) for dataset in datasets]  # of each one's store
    texts = sum(len(dataset) for dataset in datasets)
    pictures = sum(len(part) for part in rows)
    text_ids = []
    picture_ids = []
    picture_of_text = []
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        arrays = {}
        for dataset, own_rows in zip(datasets, rows, strict=True):
            first_text = len(text_ids)
            first_picture = len(picture_ids)
            for index, vectors, pooled in all_texts(run, dataset):
                put(arrays, folder, "text_vectors", texts, first_text + index, vectors)
                put(arrays, folder, "pair_vectors", texts, first_text + index, pooled)
            for part, vectors in all_pictures(run, dataset, own_rows):
                put(arrays, folder, "picture_vectors", pictures, first_picture + part, vectors)
            text_ids += list(dataset.ids)
            picture_ids += [dataset.ids[i] for i in first_texts(dataset)]
            picture_of_text += (first_picture + np.searchsorted(own_rows, dataset.image)).tolist()
        arrays["text_ids"] = np.array(text_ids)
        arrays["picture_ids"] = np.array(picture_ids)
        arrays["picture_of_text"] = np.array(picture_of_text)
        data.write_whole(out, lambda file: write_npz(file, arrays))
    shared = "" if "itc" in run.model.heads else "; texts and pictures are not of one space, since nothing trained itc"
    print(f"{out}: {texts} texts, {pictures} pictures{shared}")


def put(arrays, folder, name, length, index, vectors):
    """Writes vectors (B, W) into rows `index` of an array on disk, which is made when its width is known."""
    if name not in arrays:
        shape = (length, vectors.shape[1])
        arrays[name] = np.lib.format.open_memmap(f"{folder}/{name}.npy", "w+", np.float32, shape)
    arrays[name][index] = vectors.numpy()


def write_npz(path, arrays):
    with open(path, "wb") as file:  # with a path numpy would append .npz to the name
        np.savez(file, **arrays)


def first_texts(dataset):
    """The first example of each picture, in the order of the store's rows: (P,)"""
    _, first = np.unique(dataset.image, return_index=True)
    return first


# ---- --search ----------------------------------------------------------------------------------------------------------


def check_contrast(run):
    """UserError for a checkpoint whose texts and pictures have no space in common."""
    if "itc" not in run.model.heads:
        raise UserError("--search compares vectors that the objective itc trains; train with --objectives ...,itc")


def search(run, datasets, text, top, out):
    """Prints the `top` pictures that fit a text best, the best first, and draws them as one picture."""
    found = find(run, datasets, text, top)
    cells = []
    for place, (similarity, dataset, example) in enumerate(found, 1):
        print(f"{similarity:.3f}  {dataset.ids[example]}: {dataset.text[example]}")
        cells.append(draw_found(dataset, example, f"{place}.  similarity {similarity:.3f}"))
    sheet = drawing.grid(cells, 3)
    headline = Image.new("RGB", (sheet.width, 40), "white")
    drawing.write_text(ImageDraw.Draw(headline), text, drawing.MARGIN, 20, "black", sheet.width)
    drawing.save(drawing.grid([headline, sheet], 1), Path(out), "--out")
    pictures = sum(len(first_texts(dataset)) for dataset in datasets)
    print(f"{out}: the best {len(found)} of {pictures} pictures")


def find(run, datasets, text, top):
    """[(cosine, Dataset, example)], the `top` pictures with the largest cosine, each with its first text."""
    query = query_vector(run, text)  # (W,)
    found = []
    for dataset in datasets:
        first = first_texts(dataset)  # (P,)
        rows = dataset.image[first]
        cosines = torch.zeros(len(rows))
        for part, vectors in all_pictures(run, dataset, rows):
            cosines[part] = vectors @ query  # (B, W) @ (W,) -> (B,)
        best = cosines.topk(min(top, len(rows)))
        for cosine, place in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            found.append((cosine, dataset, int(first[place])))
    return sorted(found, key=lambda entry: -entry[0])[:top]


def query_vector(run, text):
    """The vector of a text that is in no file: (W,)"""
    tokens, segment, _, _ = data.encode_texts(run.tokenizer, [records.normalize_text(text)], run.args.max_words)
    tokens = torch.from_numpy(tokens)[None]  # (1, T)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    batch = data.Batch(tokens, mask, torch.from_numpy(segment)[None], features=None, boxes=None, region_mask=None)
    batch.task = torch.zeros(1, dtype=torch.long)
    return text_vectors(run, batch)[0]


def draw_found(dataset, example, title):
    """A picture that was found, with a line in blue and its own first text."""
    row = int(dataset.image[example])
    width = drawing.SIDE - 2 * drawing.MARGIN
    picture, _ = drawing.picture_of(dataset.store, row, records.picture_file(dataset, row), width)
    cell = Image.new("RGB", (drawing.SIDE, picture.height + drawing.SIDE), "white")
    cell.paste(picture, (drawing.MARGIN, drawing.MARGIN))
    pen = ImageDraw.Draw(cell)
    y = drawing.MARGIN + picture.height + 8
    y = drawing.write_text(pen, title, y, 17, drawing.BLUE)
    y = drawing.write_text(pen, dataset.text[example], y, 14, drawing.GREY)
    return cell.crop((0, 0, drawing.SIDE, y + drawing.MARGIN))
