"""Regions of pictures through a pretrained network, into a feature store.

    python prepare/features.py --data my.jsonl --network efficientnet-lite0 --out FOLDER

writes FOLDER/regions (the store: float16, memory-mapped), a copy of each JSONL file with "features": "regions#N" in
place of `image`, and FOLDER/dataset.json, which says how the regions were made. --data may also be a data set's folder
or a folder of pictures; the lines of the latter have an `id` (the file's name) and still need a `text`. An interrupted
run goes on where it was. prepare/networks.py lists the networks.

Regions: the boxes of a line where it has any (RoI align, He et al. 2017, averaged to one vector); a detector's own,
most certain first; else the whole picture (the mean of the feature map) and each cell of the map, row by row.
A classifier's last layer, applied to each region, gives `object_probs`: average pooling and that layer are both linear,
so the picture's logits are the mean of its cells' logits. Class 0 is the background, as in the papers' detectors.

Letters: F feature width, H and W sides of the feature map, S side of the network's input, N regions, I pictures,
K classes with background.
"""

import json
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for `python prepare/features.py`

import data
from common import UserError
from prepare import networks, published

SHARD = 256  # pictures whose regions are written at once: what an interruption may lose
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")


# ---- regions ----------------------------------------------------------------------------------------------------------


def interpolation_weights(low, high, cells, points=14):
    """(N, cells): how much each cell of a row of cells counts in the mean over a span of that row.

    low, high: (N,) ends of the spans, the row being 0..1. The mean is over `points` evenly spaced points, each
    linearly interpolated between the centres of the two cells beside it; beyond the outer centres nothing changes.
    """
    steps = (torch.arange(points, device=low.device) + 0.5) / points
    positions = low[:, None] + steps * (high - low)[:, None]  # (N, points), in 0..1
    positions = (positions * cells - 0.5).clamp(0, cells - 1)  # cell j has its centre at j
    distances = (positions[:, :, None] - torch.arange(cells, device=low.device)).abs()  # (N, points, cells)
    return (1 - distances).clamp(min=0).mean(1)


def roi_align(feature_map, boxes):
    """(N,F) means of a feature map (F,H,W) over boxes (N,4) in 0..1: RoI align (He et al. 2017) with 7 x 7 bins of
    2 x 2 points each, averaged over the bins. Bilinear interpolation on a grid of points is a product of rows and
    columns, so that the mean over all points needs no loop over them."""
    height, width = feature_map.shape[1:]
    rows = interpolation_weights(boxes[:, 1], boxes[:, 3], height)  # (N,H)
    columns = interpolation_weights(boxes[:, 0], boxes[:, 2], width)  # (N,W)
    return torch.einsum("fhw,nh,nw->nf", feature_map, rows, columns)


def map_regions(network, feature_map, boxes=None, grid=None):
    """Regions of a picture as a dict of tensors. feature_map: (F,H,W). boxes: (N,4) in 0..1; None: the whole picture and
    the cells of the map, averaged to grid x grid cells unless grid is None."""
    if boxes is None:
        whole = feature_map.mean((1, 2))  # (F,)
        if grid is not None:
            feature_map = F.adaptive_avg_pool2d(feature_map, grid)
        cells = feature_map.flatten(1).T  # (F,H,W) -> (H*W,F), row by row
        features = torch.cat([whole[None], cells])  # (1+H*W,F)
        boxes = torch.from_numpy(data.grid_boxes(1, 1, feature_map.shape[2]))
    else:
        features = roi_align(feature_map, boxes.to(feature_map.device))
    probs = None
    if network.class_logits is not None:
        probs = network.class_logits(features).softmax(1)  # (N,K-1)
        probs = F.pad(probs, (1, 0))  # a classifier knows no background: its probability is 0
    return region_fields(features, boxes, probs)


def region_fields(features, boxes, probs):
    """The fields of a feature store as a dict of tensors, on the CPU."""
    fields = {"features": features, "boxes": boxes}
    if probs is not None:
        confidence, objects = probs[:, 1:].max(1)  # class 0 is the background
        fields.update(object_probs=probs, objects=objects, object_conf=confidence)
    return {name: values.cpu() for name, values in fields.items()}


@torch.inference_mode()
def batch_regions(network, images, boxes, grid=None, device="cpu"):
    """Regions of B pictures as a list of dicts. images: RGB pictures for a detector, else (3,S,S) tensors.
    boxes: for each picture (N,4) in 0..1, or None."""
    if network.detect is not None:
        return [region_fields(*network.detect(image)) for image in images]
    maps = network.feature_map(torch.stack(images).to(device))  # (B,F,H,W)
    regions = []
    for feature_map, own_boxes in zip(maps, boxes):
        regions.append(map_regions(network, feature_map, own_boxes, grid))
    return regions


def region_maker(regions, device="cpu"):
    """What makes the same regions for a new picture. regions: of a dataset.json or a checkpoint, as this file wrote it.

    Returns a function (picture, boxes (N,4) in pixels or None) -> dict of arrays: features (N,F) float32, boxes (N,4)
    in 0..1, and object_probs (N,K), objects (N,), object_conf (N,) where the network has classes.
    """
    network = networks.load_network(regions["network"], regions.get("weights"), device)

    def make(image, boxes=None):
        image = image.convert("RGB")
        if boxes is not None:
            boxes = torch.as_tensor(boxes, dtype=torch.float32) / torch.tensor([*image.size, *image.size])
        pixels = image if network.detect is not None else networks.to_pixels(image, network)
        fields = batch_regions(network, [pixels], [boxes], regions.get("grid"), device)[0]
        return {name: values.numpy() for name, values in fields.items()}

    return make


# ---- extraction -------------------------------------------------------------------------------------------------------


def picture_keys(file, record):
    """[(path, boxes as JSON)] of the one or two pictures of a record of a JSONL file. A picture with other boxes has
    other regions."""
    names = record["images"] if "images" in record else [record["image"]]
    return [(str(file.parent / name), json.dumps(record.get("boxes"))) for name in names]


def decode(where, key, network):
    """(the network's input, boxes in 0..1 or None, (width, height)) of a picture, or a message if it cannot be read."""
    path = Path(key[0])
    boxes = json.loads(key[1])
    if not path.is_file():
        return f"{where}: no file {path}; paths are relative to the .jsonl file"
    try:
        image = data.open_picture(where, path)
        if boxes is not None:
            boxes = data.check_boxes(boxes, *image.size, where, "boxes")
            boxes = torch.from_numpy(boxes) / torch.tensor([*image.size, *image.size])
    except UserError as error:
        return str(error)
    pixels = image if network.detect is not None else networks.to_pixels(image, network)
    return pixels, boxes, image.size


def shard_regions(jobs, network, args, pool):
    """[(fields, (width, height)), or a message] for each job (where, key). Threads of `pool` decode the next batch while
    the network works on the one before."""
    batches = [jobs[start : start + args.batch_size] for start in range(0, len(jobs), args.batch_size)]
    results = []
    upcoming = []
    for batch in [*batches, []]:
        decoded = [future.result() for future in upcoming]
        upcoming = [pool.submit(decode, where, key, network) for where, key in batch]
        readable = [item for item in decoded if not isinstance(item, str)]
        if readable:
            pixels, boxes, _ = zip(*readable)
            regions = batch_regions(network, pixels, boxes, args.grid, args.device)
        for item in decoded:
            if isinstance(item, str):
                results.append(item)
            else:
                fields = regions.pop(0)
                for name in ("features", "object_probs"):
                    if name in fields:
                        fields[name] = fields[name].half()
                results.append((fields, item[2]))
    return results


def extract(jobs, network, args, parts):
    """Writes the results of all jobs to files in folder `parts`, SHARD pictures each; files that exist are kept.
    Returns the messages of unreadable pictures; UserError if there are more than args.skip_bad."""
    errors = []
    done = 0
    start = time.monotonic()
    with ThreadPoolExecutor(args.workers) as pool:
        for first in range(0, len(jobs), SHARD):
            file = parts / f"{first:09d}.pt"
            if file.exists():
                results = torch.load(file, weights_only=True)
            else:
                results = shard_regions(jobs[first : first + SHARD], network, args, pool)
            errors.extend(result for result in results if isinstance(result, str))
            if len(errors) > args.skip_bad:
                raise UserError(f"{errors[0]} ({len(errors)} such so far); --skip-bad N leaves out up to N pictures")
            if not file.exists():
                aside = file.with_suffix(".tmp")
                torch.save(results, aside)
                aside.rename(file)  # a file is whole or absent
                done += len(results)
                rate = done / (time.monotonic() - start)
                finished = first + len(results)
                minutes = (len(jobs) - finished) / rate / 60
                print(
                    f"{finished} of {len(jobs)} pictures, {rate:.1f} a second, {minutes:.1f} minutes left", flush=True
                )
    return errors


def write_store(folder, parts):
    """Puts the results in `parts` into the store `folder`. Returns {number of the picture: row of the store}."""
    rows = {}
    sizes = []

    def pictures():
        number = 0
        for file in sorted(parts.glob("*.pt")):
            for result in torch.load(file, weights_only=True):
                if not isinstance(result, str):
                    fields, size = result
                    rows[number] = len(sizes)
                    sizes.append(size)
                    yield [{name: values.numpy() for name, values in fields.items()}], []
                number += 1

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    data.write_store(folder, pictures())
    np.save(folder / "sizes.npy", np.array(sizes, np.int64))  # (I,2) width and height in pixels: for `target`
    return rows


# ---- command line -----------------------------------------------------------------------------------------------------


def find_files(source, out):
    """(JSONL files, content of the dataset.json to be) of what --data names."""
    if source.is_file():
        return [source], {"name": source.stem, "file": source.name}
    if (source / "dataset.json").is_file():
        description = published.read_json(source / "dataset.json")
        if "file" in description:
            names = [description["file"]]
        else:
            names = sorted(set(description["files"].values()))
        return [source / name for name in names], description
    pictures = sorted(path for path in source.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not pictures:
        raise UserError(
            f"--data {source}: give a .jsonl file, a data set or a folder of pictures ({', '.join(SUFFIXES)})"
        )
    path = out / "pictures.jsonl"
    with open(path, "w", encoding="utf-8") as file:
        for picture in pictures:
            record = {"id": str(picture.relative_to(source)), "image": str(picture.resolve())}
            file.write(json.dumps(record) + "\n")
    return [path], {"name": source.name, "file": "pictures.jsonl"}


def find_pictures(files):
    """{(path, boxes as JSON): where it is first named} of all pictures that JSONL files name."""
    pictures = {}
    for path in files:
        for where, record in published.read_json_lines(path):
            if "image" not in record and "images" not in record:
                raise UserError(f"{where}: names no picture; write 'image' (nlvr2: 'images')")
            for key in picture_keys(path, record):
                pictures.setdefault(key, where)
    if not pictures:
        raise UserError(f"{files[0]}: holds no examples; write one JSON object a line")
    return pictures


def prepare(args):
    """Makes the store, the JSONL files and dataset.json in folder args.out."""
    source = Path(args.data)
    out = Path(args.out)
    if source.resolve() in (out.resolve(), *out.resolve().parents) or source.resolve().parent == out.resolve():
        raise UserError(f"--out {out}: lies in the data; give another folder")
    out.mkdir(parents=True, exist_ok=True)
    files, description = find_files(source, out)
    pictures = find_pictures(files)
    network = networks.load_network(args.network, args.weights, args.device)
    given = any(boxes != "null" for _, boxes in pictures)
    boxes = "given" if given else "grid"
    if network.detect is not None:
        if given:
            raise UserError(f"--network {args.network}: a detector finds its own boxes; take 'boxes' out of {source}")
        boxes = "detected"
    regions = {"kind": "network", "network": args.network, "weights": args.weights, "grid": args.grid, "boxes": boxes}
    description["regions"] = regions

    parts = out / "parts"
    job = json.dumps([regions, list(pictures)])
    if not (parts / "job.json").is_file() or (parts / "job.json").read_text() != job:
        shutil.rmtree(parts, ignore_errors=True)  # of another extraction
        parts.mkdir()
        (parts / "job.json").write_text(job)
    errors = extract([(where, key) for key, where in pictures.items()], network, args, parts)
    row_of_number = write_store(out / "regions", parts)
    rows = {}
    for number, key in enumerate(pictures):
        if number in row_of_number:
            rows[key] = row_of_number[number]

    def rows_of(path, record):
        return [rows.get(key) for key in picture_keys(path, record)]

    for path in files:
        published.link_lines(path, out / path.name, rows_of)
    (out / "dataset.json").write_text(json.dumps(description, indent=1))
    shutil.rmtree(parts)
    for error in errors:
        print(f"left out: {error}", file=sys.stderr)
    print(f"{out}: {len(rows)} pictures, {args.network}, {boxes} regions; {len(errors)} left out")


def main(arguments=None):
    """Exit code 0, or 2 with one line on stderr."""
    parser = data.Parser(prog="features.py", description="Regions of pictures through a pretrained network.")
    parser.add_argument("--data", required=True, help="a .jsonl file, a data set's folder or a folder of pictures")
    parser.add_argument("--out", required=True, help="folder of the store and the new JSONL")
    parser.add_argument("--network", default="efficientnet-lite0", help="efficientnet-lite0, resnet50, a folder, ...")
    parser.add_argument("--weights", help="file of a state dict, for torchvision's networks")
    parser.add_argument("--grid", type=int, help="cells in a row of the grid; default: the feature map's own")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--workers", type=int, default=2, help="threads that decode pictures")
    parser.add_argument("--threads", type=int, help="threads of the network; default: torch's")
    parser.add_argument("--skip-bad", type=int, default=0, metavar="N", help="leave out up to N unreadable pictures")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    try:
        args = parser.parse_args(arguments)
        if args.threads is not None:
            torch.set_num_threads(args.threads)
        prepare(args)
    except (UserError, OSError) as error:
        print(f"features.py: {UserError(str(error))}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
