"""Regions of pictures through a pretrained network, into a feature store.

    python prepare/features.py --data my.jsonl --network efficientnet-lite0 --out FOLDER

writes FOLDER/regions (the store: float16, memory-mapped), a copy of each JSONL file with "features": "regions#N" in
place of `image`, and FOLDER/dataset.json, which says how the regions were made. --data may also be a data set's folder
or a folder of pictures; the lines of the latter have an `id` (the file's name) and still need a `text`. An interrupted
run goes on where it was.

The regions are the boxes of a line where it has any, a detector's own, or else the whole picture and a grid: see
prepare/networks.py, which also lists the networks.

--crops N also stores N random crops of each training picture, each as a picture of its own: against overfitting, as in
VSE++ (Faghri et al. 2018). Every time that train.py shows a picture, it draws the whole one or a crop (`data.collate`).
"""

import argparse
import functools
import json
import math
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for `python prepare/features.py`

from support import interrupt  # noqa: F401, I001 (before torch, for Ctrl-C)

import torch
from PIL import ImageOps

import data
from common import UserError
from prepare import networks, published
from support.machine import explain, keep_freed_memory, pick_device
from support import records
from support.ranges import COUNT, COUNT_OR_ZERO
from support.regions import (
    check_boxes,
    content_digest,
    file_stamp,
    odd_boxes,
    odd_picture,
    open_picture,
    print_notes,
)

UNFINISHED = ".unfinished"  # the folder in --out that holds what an interrupted run has made
SHARD = 256  # pictures and crops whose regions are written at once: what an interruption may lose
# share of the picture's area that a crop keeps, drawn uniformly; a side is never longer than the picture's
CROP_AREAS = (0.5, 1.0)
CROP_RATIOS = (0.8, 1.25)  # its aspect ratio by the picture's, log-uniform


def region_maker(regions, device="cpu"):
    """A function that computes regions of a new picture as those of a data set were computed.

    regions: `regions` of its dataset.json or of a checkpoint, as this file wrote it.
    The function: (picture, boxes (N,4) in pixels or None) -> dict of arrays: features (N,F) float32, boxes (N,4)
    in 0..1, and object_probs (N,K), objects (N,), object_conf (N,) where the network has classes.
    """
    network = networks.load_network(regions["network"], regions.get("weights"), device)

    def make(image, boxes=None):
        image = image.convert("RGB")
        if boxes is not None:
            boxes = torch.as_tensor(boxes, dtype=torch.float32) / torch.tensor([*image.size, *image.size])
        pixels = image if network.detect is not None else networks.to_pixels(image, network)
        fields = networks.batch_regions(network, [pixels], [boxes], regions.get("grid"), device)[0]
        return {name: values.numpy() for name, values in fields.items()}

    return make


# ---- extraction -------------------------------------------------------------------------------------------------------


def picture_keys(file, record):
    """[(path, boxes as JSON)] of the one or two pictures of a record of a JSONL file. A picture with other boxes has
    other regions."""
    names = record["images"] if "images" in record else [record["image"]]
    return [(str(file.parent / name), json.dumps(record.get("boxes"))) for name in names]


def random_crop(image, rng, mirror):
    """A random part of an RGB picture, mirrored in half of all cases if `mirror`."""
    area = rng.uniform(*CROP_AREAS)
    low, high = CROP_RATIOS
    ratio = math.exp(rng.uniform(math.log(low), math.log(high)))
    width = max(1, round(image.width * min(1, math.sqrt(area * ratio))))
    height = max(1, round(image.height * min(1, math.sqrt(area / ratio))))
    left = int(rng.integers(image.width - width + 1))
    top = int(rng.integers(image.height - height + 1))
    crop = image.crop((left, top, left + width, top + height))
    if mirror and rng.random() < 0.5:
        crop = ImageOps.mirror(crop)
    return crop


def decode(job, network, mirror):
    """(the network's inputs, boxes in 0..1 or None, facts) of a picture, or a message if it cannot be read.

    job: (where it is named, its key, number of crops).   inputs: the picture's and each crop's.
    facts: `size` (width, height); `digest`, a number that is equal for equal pictures; `notes`, lines of what is odd.
    """
    where, key, crops = job
    path = Path(key[0])
    boxes = json.loads(key[1])
    if not path.is_file():
        return f"{where}: no file {path}; paths are relative to the .jsonl file"
    try:
        image = open_picture(where, path)
        notes = odd_picture(image)
        if boxes is not None:
            boxes = check_boxes(boxes, *image.size, where, "boxes")
            notes += odd_boxes(boxes, *image.size)
            boxes = torch.from_numpy(boxes) / torch.tensor([*image.size, *image.size])
    except UserError as error:
        return str(error)
    notes = [f"{where}: {path.name}: {note}" for note in notes]
    digest = content_digest(image.tobytes())
    rng = data.random_stream("crops", digest)
    images = []
    for view in range(1 + crops):  # a crop at a time: a photograph may have 24 million pixels
        shown = image if view == 0 else random_crop(image, rng, mirror)
        images.append(shown if network.detect is not None else networks.to_pixels(shown, network))
    return images, boxes, {"size": image.size, "digest": digest, "notes": notes}


def shard_regions(jobs, network, args, pool):
    """[(views, facts), or a message] for each job, as `decode` takes it. views: the fields of the picture and of each
    crop. Threads of `pool` decode the next batch while the network works on the one before."""
    size = max(1, args.batch_size // (1 + args.crops))
    batches = [jobs[start : start + size] for start in range(0, len(jobs), size)]
    results = []
    upcoming = []
    for batch in [*batches, []]:
        decoded = [future.result() for future in upcoming]
        upcoming = [pool.submit(decode, job, network, args.mirror) for job in batch]
        images = []
        boxes = []
        for item in decoded:
            if not isinstance(item, str):
                inputs, own_boxes, _ = item
                images += inputs
                boxes += [own_boxes] * len(inputs)
        regions = []
        for start in range(0, len(images), args.batch_size):
            part = slice(start, start + args.batch_size)
            regions += networks.batch_regions(network, images[part], boxes[part], args.grid, args.device)
        for item in decoded:
            if isinstance(item, str):
                results.append(item)
                continue
            inputs, _, facts = item
            views = [to_half(regions.pop(0)) for _ in inputs]
            if all(fields["features"].isfinite().all() for fields in views):
                results.append((views, facts))
            else:
                where, (path, _), _ = jobs[len(results)]
                results.append(f"{where}: features of {path} are NaN or too large for float16")
    return results


def to_half(fields):
    """Regions with features and probabilities in float16."""
    halves = {name: fields[name].half() for name in ("features", "object_probs") if name in fields}
    return {**fields, **halves}


def extract(jobs, network, regions, args, folder):
    """Writes the results of all jobs to files in `folder`, about SHARD pictures and crops each. A file's name depends on
    its pictures and on how their regions are made (`regions` of dataset.json); existing files are not made again.
    Returns these files, the messages of unreadable pictures and what is odd in the others; UserError if more than
    args.skip_bad are unreadable."""
    files = []
    errors = []
    notes = []
    done = 0
    start = time.monotonic()
    shard = max(1, SHARD // (1 + args.crops))
    with ThreadPoolExecutor(args.workers) as pool:
        for first in range(0, len(jobs), shard):
            part = jobs[first : first + shard]
            paths = [Path(path) for _, (path, _), _ in part]
            stamps = [file_stamp(path) if path.is_file() else None for path in paths]
            file = folder / f"{first:09d}-{data.cache_key(regions, args.mirror, part, stamps)}.pt"
            files.append(file)
            if file.exists():
                results = torch.load(file, weights_only=True)
            else:
                results = shard_regions(part, network, args, pool)
            for result in results:
                if isinstance(result, str):
                    errors.append(result)
                else:
                    notes += result[1]["notes"]
            if len(errors) > args.skip_bad:
                raise UserError(f"{errors[0]} ({len(errors)} such so far); --skip-bad N leaves out up to N pictures")
            if not file.exists():
                data.write_whole(file, functools.partial(torch.save, results))
                done += len(results)
                rate = done / (time.monotonic() - start)
                finished = first + len(results)
                minutes = (len(jobs) - finished) / rate / 60
                print(
                    f"{finished} of {len(jobs)} pictures, {rate:.1f} a second, {minutes:.1f} minutes left", flush=True
                )
    return files, errors, notes


def read_results(files, jobs, rows):
    """The readable pictures of the files that `extract` returned, each followed by its crops, as data.write_store takes
    them. Fills `rows`, {number of the picture: row of the store}, meanwhile."""
    number = 0
    row = 0
    for file in files:
        for result in torch.load(file, weights_only=True):
            if not isinstance(result, str):
                views, facts = result
                _, (path, _), _ = jobs[number]
                facts["file"] = Path(path).resolve()
                rows[number] = row
                row += len(views)
                for view, fields in enumerate(views):
                    crops = len(views) - 1 if view == 0 else 0
                    yield {**{name: values.numpy() for name, values in fields.items()}, **facts, "crops": crops}
            number += 1


# ---- own pictures of train.py and predict.py --------------------------------------------------------------------------


def network_regions(jobs, regions, device=None, batch_size=32):
    """For each regions.PictureJob what regions.picture_regions returns, (regions, warnings, mistake), but by a network.

    regions: of a dataset.json or a checkpoint, as `region_maker` takes it.   device: None = a GPU if there is one.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    network = networks.load_network(regions["network"], regions.get("weights"), device)
    args = argparse.Namespace(grid=regions.get("grid"), device=device, batch_size=batch_size, crops=0, mirror=False)
    with ThreadPoolExecutor(2) as pool:
        for first in range(0, len(jobs), 2 * batch_size):
            part = jobs[first : first + 2 * batch_size]
            keys = [(job.where, (str(job.path), json.dumps(job.boxes)), 0) for job in part]
            for job, result in zip(part, shard_regions(keys, network, args, pool), strict=True):
                if isinstance(result, str):
                    yield None, [], result
                    continue
                (fields,), facts = result
                yield {**{name: values.numpy() for name, values in fields.items()}, **facts}, facts["notes"], None


# ---- command line -----------------------------------------------------------------------------------------------------


def find_files(source, out):
    """(JSONL files, content of the dataset.json to be) of what --data names."""
    if source.is_file() or (source / "dataset.json").is_file():
        return find_named_files(source)
    pictures = records.list_pictures(source)
    old = out / "pictures.jsonl"
    if old.exists() and any("text" in record for _, record in published.read_json_lines(old)):
        raise UserError(f"{old}: has texts, which would be lost; give another --out")
    path = out / UNFINISHED / old.name  # the lines without regions
    records.write_picture_lines(path, source, pictures)
    return [path], {"name": source.name, "file": "pictures.jsonl"}


def find_named_files(source):
    """(JSONL files, content of the dataset.json to be) of a .jsonl file or a folder with dataset.json. The new files all
    lie beside the new dataset.json; the vocabulary stays where it is."""
    found = data.read_dataset_json(source)
    folder = found.pop("folder")
    names = set(found["files"].values())
    if found["file"]:
        names.add(found["file"])
        found["file"] = Path(found["file"]).name
    new_names = {Path(name).name for name in names}
    if len(new_names) < len(names):
        raise UserError(f"{source}: two of its files have the same name in different folders; rename one")
    found["files"] = {task: Path(name).name for task, name in found["files"].items()}
    if found["vocab"]:
        found["vocab"] = str((folder / found["vocab"]).resolve())
    description = {key: value for key, value in found.items() if value}
    return [folder / name for name in sorted(names)], description


def find_pictures(files, crops):
    """{(path, boxes as JSON): (where it is first named, number of its crops)} of all pictures that JSONL files name.
    A picture that a line of split train names has `crops` crops, any other has none."""
    pictures = {}
    for path in files:
        for where, record in published.read_json_lines(path):
            if ("image" in record) == ("images" in record) or "features" in record:
                raise UserError(f"{where}: names no picture, or names it twice; write 'image' (nlvr2: 'images') alone")
            for name in ("image", "images", "boxes", "target", "split"):
                is_valid, wanted = records.KEYS[name]
                if name in record and not is_valid(record[name]):
                    raise UserError(f"{where}: {name!r} is {records.as_json(record[name])}; write {wanted}")
            for name in ("boxes", "target"):
                if crops and name in record:
                    raise UserError(f"{where}: {name!r} is a place in the whole picture; leave out --crops")
            own_crops = crops if record.get("split", "train") == "train" else 0
            for key in picture_keys(path, record):
                first, most = pictures.get(key, (where, 0))
                pictures[key] = (first, max(most, own_crops))
    if not pictures:
        raise UserError(f"{files[0]}: holds no examples; write one JSON object a line")
    return pictures


def describe_regions(network, pictures, args):
    """`regions` of dataset.json: what region_maker needs to make the same ones. Paths are absolute."""
    boxes = "grid"
    if network.detect is not None:
        boxes = "detected"
        if args.grid:
            raise UserError(f"--grid {args.grid}: {args.network} finds its own regions; leave it out")
    if any(own_boxes != "null" for _, own_boxes in pictures):  # "null": JSON of a line without boxes
        if network.detect is not None:
            raise UserError(
                f"--network {args.network}: a detector finds its own boxes; take 'boxes' out of {args.data}"
            )
        boxes = "given"
    regions = {"kind": "network", "network": args.network, "weights": args.weights, "grid": args.grid, "boxes": boxes}
    for key in ("network", "weights"):
        if regions[key] is not None and Path(regions[key]).exists():
            regions[key] = str(Path(regions[key]).resolve())
    return regions


def prepare(args):
    """Makes the store, the JSONL files and dataset.json in folder args.out."""
    source = Path(args.data)
    out = Path(args.out)
    data_folder = source.parent if source.is_file() else source
    if out.resolve() == data_folder.resolve():
        raise UserError(f"--out {out}: holds the data; give another folder")
    unfinished = out / UNFINISHED
    made_here = unfinished.is_dir()
    if (out / "dataset.json").is_file():
        made_here = made_here or data.is_network(data.read_dataset_json(out)["regions"])
    if out.is_dir() and any(out.iterdir()) and not made_here:
        raise UserError(f"--out {out}: holds other files; give a new folder")
    unfinished.mkdir(parents=True, exist_ok=True)
    files, description = find_files(source, out)
    for path in files:
        if path.resolve() == (out / path.name).resolve():
            raise UserError(f"--out {out}: holds the data; give another folder")
    pictures = find_pictures(files, args.crops)
    network = networks.load_network(args.network, args.weights, args.device)
    regions = describe_regions(network, pictures, args)
    description["regions"] = regions

    jobs = [(where, key, crops) for key, (where, crops) in pictures.items()]
    results, errors, notes = extract(jobs, network, regions, args, unfinished)
    if len(errors) == len(jobs):
        raise UserError(f"{errors[0]} (no picture can be read)")
    rows = {}
    for path in [*files, out / "dataset.json"]:  # no old lines beside a new store
        (out / path.name).unlink(missing_ok=True)
    data.write_store(out / "regions", read_results(results, jobs, rows))
    numbers = {key: number for number, key in enumerate(pictures)}

    def rows_of(path, record):
        keys = picture_keys(path, record)
        if not all(key in numbers for key in keys):
            raise UserError(f"{path}: was changed while its pictures were read; run it again")
        return [rows.get(numbers[key]) for key in keys]

    lost = 0
    for path in files:
        lost += published.link_lines(path, out / path.name, rows_of)[1]
    published.write_dataset(out, **description)
    shutil.rmtree(unfinished)
    print_notes(notes, "in all")
    for error in errors:
        print(f"left out: {error}", file=sys.stderr)
    left_out = f"left out: {len(errors)} pictures, {lost} lines"
    print(f"{out}: {len(rows)} pictures, {regions['network']}, boxes: {regions['boxes']}; {left_out}")


def main(arguments=None):
    """Exit code 0, or 2 with one line on stderr."""
    parser = data.Parser(prog="features.py", description="Regions of pictures through a pretrained network.")
    parser.add_argument("--data", required=True, help="a .jsonl file, a data set's folder or a folder of pictures")
    parser.add_argument("--out", required=True, help="folder of the store and the new JSONL")
    parser.add_argument("--network", help="resnet50, a folder, ... (default: the best that is installed)")
    parser.add_argument("--weights", help="file of a state dict, for torchvision's networks")
    parser.add_argument(
        "--grid", type=COUNT, metavar="N", help="cells in a row of the grid (default: the feature map's own)"
    )
    parser.add_argument(
        "--crops",
        type=COUNT_OR_ZERO,
        default=0,
        metavar="N",
        help="random crops of each training picture, of which train.py draws (default: 0)",
    )
    parser.add_argument(
        "--mirror", action="store_true", help="mirror half of the crops; leave it out where left or right matters"
    )
    parser.add_argument("--batch-size", type=COUNT, metavar="N", default=32, help="pictures at once (default: 32)")
    parser.add_argument("--workers", type=COUNT, metavar="N", default=2, help="threads that read pictures (default: 2)")
    parser.add_argument("--threads", type=COUNT, metavar="N", help="threads of the network (default: torch's)")
    parser.add_argument(
        "--skip-bad",
        type=COUNT_OR_ZERO,
        default=0,
        metavar="N",
        help="leave out up to N unreadable pictures (default: 0)",
    )
    words = "cpu, cuda, cuda:1 or mps (default: a GPU if there is one)"
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help=words)
    try:
        args = parser.parse_args(arguments)
        args.device = pick_device(args.device)
        if args.network is None:
            args.network = networks.best_installed() or "efficientnet-lite0"
        if args.mirror and not args.crops:
            raise UserError("--mirror is for crops; give --crops too")
        if args.threads is not None:
            torch.set_num_threads(args.threads)
        keep_freed_memory()  # a step takes 40 to 45% of the time that it takes without
        prepare(args)
    except (UserError, OSError, RuntimeError, MemoryError) as error:
        message = explain(error, kept="; run it again to go on", advice="try a smaller --batch-size")
        if message is None:
            raise
        print(f"features.py: {message}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
