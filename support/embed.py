"""embed.py: texts and pictures as vectors, and search among them, behind `predict.py CKPT --embed OUT.npz | --search TEXT`.

Text and picture are each encoded without the other. If the checkpoint was trained with the objective itc, the vectors
are unit vectors of one space, and the dot product of a text and a picture is their cosine similarity. Otherwise they
are the last state of [CLS] and the mean of the regions' last states, which cannot be compared with each other.

The vectors are computed by evaluation.py. Letters: B rows of a batch, E texts, P pictures, T text positions, C width,
W width of a vector.
"""

import tempfile
from pathlib import Path

import numpy as np
import torch

import data
from common import UserError
from support import drawing, evaluation, records

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
    store_rows = [np.unique(dataset.image) for dataset in datasets]  # of each one's store
    texts = sum(len(dataset) for dataset in datasets)
    pictures = sum(len(part) for part in store_rows)
    text_ids = []
    picture_ids = []
    picture_of_text = []
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        arrays = {}
        for dataset, own_rows in zip(datasets, store_rows, strict=True):
            first_text = len(text_ids)
            first_picture = len(picture_ids)
            for index, vectors in evaluation.all_text_vectors(run, dataset, np.arange(len(dataset))):
                write_rows(arrays, folder, "text_vectors", texts, first_text + index, vectors)
            for index, vectors in all_pair_vectors(run, dataset):
                write_rows(arrays, folder, "pair_vectors", texts, first_text + index, vectors)
            for part, vectors in evaluation.all_picture_vectors(run, dataset, own_rows):
                write_rows(arrays, folder, "picture_vectors", pictures, first_picture + part, vectors)
            text_ids += list(dataset.ids)
            picture_ids += [dataset.ids[i] for i in first_texts(dataset)]
            picture_of_text += (first_picture + np.searchsorted(own_rows, dataset.image)).tolist()
        arrays["text_ids"] = np.array(text_ids)
        arrays["picture_ids"] = np.array(picture_ids)
        arrays["picture_of_text"] = np.array(picture_of_text)
        data.write_whole(out, lambda file: write_npz(file, arrays))
    note = "" if "itc" in run.model.heads else "; texts and pictures are not of one space, since nothing trained itc"
    print(f"{out}: {texts} texts, {pictures} pictures, {names_of_splits(datasets)}{note}")


def names_of_splits(datasets):
    """ "split test", or "splits train, val"."""
    names = [dataset.split for dataset in datasets]
    return f"split{'s' if len(names) > 1 else ''} {', '.join(names)}"


@torch.inference_mode()
def all_pair_vectors(run, dataset):
    """Yields (examples, the pooled vectors (B, C) of their texts with their pictures), batches of like lengths."""
    for index in data.batches(dataset.lengths(), size=evaluation.BATCH):
        batch = evaluation.collate_pairs(run, dataset, index, dataset.image[index])
        with run.autocast():
            pooled = run.model.encode(batch).pooled
        yield index, pooled.float().cpu()


def write_rows(arrays, folder, name, length, index, vectors):
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
    found = top_pictures(run, datasets, text, top)
    cells = []
    for place, (similarity, dataset, example) in enumerate(found, 1):
        file = records.picture_file(dataset, int(dataset.image[example]))
        names = [dataset.ids[example]]
        if file and file.name not in names:
            names.insert(0, file.name)
        print("  ".join([f"{similarity:.3f}", *names, dataset.text[example]]).rstrip())
        cells.append(draw_found(dataset, example, f"{place}.  {names[0]}  similarity {similarity:.3f}"))
    sheet = drawing.grid(cells, 3)
    headline = drawing.text_cell(text, 20, "black", sheet.width)
    drawing.save(drawing.grid([drawing.blank(drawing.MARGIN), headline, sheet], 1), Path(out), "--out")
    pictures = sum(len(first_texts(dataset)) for dataset in datasets)
    print(f"{out}: the best {len(found)} of {pictures} pictures, {names_of_splits(datasets)}")


def top_pictures(run, datasets, text, top):
    """[(cosine, Dataset, example)], the `top` pictures with the largest cosine, each with its first text."""
    query = query_vector(run, text)  # (W,)
    found = []
    for dataset in datasets:
        first = first_texts(dataset)  # (P,)
        rows = dataset.image[first]
        cosines = torch.zeros(len(rows))
        for part, vectors in evaluation.all_picture_vectors(run, dataset, rows):
            cosines[part] = vectors @ query  # (B, W) @ (W,) -> (B,)
        best = cosines.topk(min(top, len(rows)))
        for cosine, place in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            found.append((cosine, dataset, int(first[place])))
    return sorted(found, key=lambda entry: -entry[0])[:top]


def query_vector(run, text):
    """The vector of a text that is in no file: (W,)"""
    tokens, segment, _, lost = data.encode_texts(run.tokenizer, [records.normalize_text(text)], run.args.max_words)
    if records.lost_text([lost]):
        data.warn(records.lost_text([lost]))
    tokens = torch.from_numpy(tokens)[None]  # (1, T)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    batch = data.Batch(tokens, mask, torch.from_numpy(segment)[None], features=None, boxes=None, region_mask=None)
    batch.task = torch.zeros(1, dtype=torch.long)
    return evaluation.text_vectors(run, batch.to(run.device))[0]


def draw_found(dataset, example, title):
    """A picture that was found, with a line in blue and its own first text."""
    row = int(dataset.image[example])
    width = drawing.SIDE - 2 * drawing.MARGIN
    picture, _ = drawing.picture_of(dataset.store, row, records.picture_file(dataset, row), width)
    top = drawing.blank(drawing.MARGIN + picture.height + 8)
    top.paste(picture, (drawing.MARGIN, drawing.MARGIN))
    texts = [drawing.text_cell(title, 17, drawing.BLUE), drawing.text_cell(dataset.text[example], 14, drawing.GREY)]
    return drawing.grid([top, *texts, drawing.blank(drawing.MARGIN)], 1)
