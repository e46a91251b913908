"""Regions: from pictures and feature files to a feature store.

    pictures -> regions                  open_picture, region_features, picture_regions
    .npz feature files -> regions        read_features
    regions -> a feature store           write_store, FeatureStore

Regions stand for the Faster R-CNN detections of the papers (bottom-up attention, Anderson 2018). Without features of a
network (prepare/features.py) a region is its box cut out of the picture and resized to --patch x --patch pixels.

Letters: B batch rows, N regions, F region-feature width, K object classes with background (class 0), I pictures of a
store. Boxes: x1,y1,x2,y2; pixels in files, 0..1 in a store.
"""

import contextlib
import hashlib
import itertools
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import time
import warnings
import zipfile
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageCms, ImageOps

from common import UserError

VERSION = 16  # raise it whenever region features or columns change: it is part of every cache key

# ---- files ------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def naming(path):
    """Gives an OSError of the block this file name if it has none, as on a full disk."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def write_whole(path, write):
    """Makes a file whole or not at all: write(temporary path), sync to disk, rename. A failure leaves no .tmp."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with naming(path):
            write(temporary)
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text(path, text):
    """A text file, UTF-8, whole or not at all."""
    write_whole(path, lambda file: file.write_text(text, encoding="utf-8"))


def make_once(folder, make):
    """Returns `folder`, which make(folder) fills if it does not exist. It is filled under another name and renamed, so
    it is whole or absent; of two processes that race both read the first one's."""
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    remove_half_made(folder.parent)
    aside = folder.parent / f".making-{folder.name}-{os.getpid()}-{time.time_ns()}"
    aside.mkdir()  # not tempfile.mkdtemp, whose folders only their owner may read
    try:
        with naming(folder):
            make(aside)
        aside.rename(folder)
    except OSError:
        if not folder.exists():
            raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return folder


def remove_half_made(folder):
    """Removes what killed runs left half made: folders of make_once in which nothing was written for a day."""
    for aside in folder.glob(".making-*"):
        with contextlib.suppress(OSError):  # another process may be faster
            newest = max(file.stat().st_mtime for file in [aside, *aside.rglob("*")])
            if time.time() - newest > 24 * 3600:
                shutil.rmtree(aside)


def refuse_overwriting(option, out, inputs):
    """UserError if the file `out`, which is to be written, is a folder or one of those that are read."""
    if os.path.isdir(out):
        raise UserError(f"{option} {out}: is a folder; give the name of a file")
    for path in inputs:
        if os.path.exists(out) and os.path.exists(path) and os.path.samefile(out, path):
            raise UserError(f"{option} {out}: is read by this command and would be lost; give another name")


def warn(text):
    """One line on stderr, from one process."""
    if os.environ.get("RANK", "0") == "0":
        print(f"warning: {text}", file=sys.stderr)


def print_notes(notes, of_what):
    """Warns of what is odd in pictures: the first note of each kind, "WHERE: what is odd", and how many there are."""
    kinds = {}
    for note in notes:
        kind = re.sub(r"\d+", "N", note.rpartition(": ")[2])  # of 4 frames, of 7 frames
        kinds.setdefault(kind, []).append(note)
    for same in kinds.values():
        warn(f"{same[0]} ({len(same)} such {of_what})")


def cache_key(*parts):
    """A short name for a cache folder; different parts or another VERSION give another name."""
    return hashlib.sha256(json.dumps([VERSION, *parts]).encode()).hexdigest()[:16]


def file_stamp(path):
    """What changes when a file does: [path, size, time of its last change]. Of a symbolic link: the link's own path,
    because the link may be redirected, and size and time of the file that it points to."""
    state = os.stat(path)
    return [str(Path(path).absolute()), state.st_size, state.st_mtime_ns]  # with its "..", which may follow a link


def content_digest(content):
    """A number (56 bits of SHA-256) that is equal for equal bytes, and differs for others."""
    return int.from_bytes(hashlib.sha256(content).digest()[:7])


def parallel(work, jobs, label):
    """Yields work(job) in order, from one process per CPU; progress on stderr once it has taken a second."""
    workers = min(os.cpu_count() or 1, len(jobs))
    if workers > 1:
        # fork on Linux: a fresh interpreter would spend longer importing torch than on the work
        context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
        ignore = (signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that started them
        with ProcessPoolExecutor(workers, context, signal.signal, ignore) as pool:
            chunk = min(50, 1 + len(jobs) // (100 * workers))  # jobs sent at once, for fewer messages
            try:
                yield from show_progress(pool.map(work, jobs, chunksize=chunk), len(jobs), label)
            except BrokenProcessPool:
                raise UserError(
                    f"{label}: one of {workers} processes was killed; is there too little memory?"
                ) from None
    else:
        yield from show_progress(map(work, jobs), len(jobs), label)


def show_progress(results, total, label):
    """Yields `results` and prints how many of `total` are done, on a terminal five times a second on one line."""
    terminal = sys.stderr.isatty()
    pause = 0.2 if terminal else 10.0
    every = 64 if total > 1000 else 1  # a network gives that many results at once
    start = time.monotonic()
    shown = 0.0  # seconds after the start
    for done, result in enumerate(results, 1):
        yield result
        seconds = time.monotonic() - start
        last = done == total and shown > 0
        due = seconds - shown > pause and done % every == 0
        if seconds > 1 and (due or last):
            shown = seconds
            end = "\r" if terminal and not last else "\n"
            rate = done / seconds
            text = f"{label}: {done} of {total}, {rate:.1f} a second, {(total - done) / rate:.0f} s left"
            print(text, end=end, file=sys.stderr, flush=True)


# ---- pictures and their regions ---------------------------------------------------------------------------------------


def open_picture(where, path):
    """The picture as RGB with 8 bits a colour, turned as its EXIF says. All code that needs pixels calls this function.
    Of an animation the first frame; info["frames"] is their number. info["dark"]: the colours have 16 bits, but are nearly
    black in 8. UserError if it cannot be read."""
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(path) as image:
            sixteen_bits = bool(image.tile) and image.tile[0][3] in ("RGB;16B", "RGBA;16B", "LA;16B")
            if sixteen_bits and "transparency" in image.info:
                raise ValueError("a transparent colour of 16 bits, of which Pillow reads only 8")
            frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)  # MPO: a photo and its preview
            ImageOps.exif_transpose(image, in_place=True)  # a copy would be as large once more
            picture = to_rgb(image)
    except Image.DecompressionBombError:
        most = 2 * Image.MAX_IMAGE_PIXELS
        raise UserError(f"{where}: picture {path} has more than {most:,} pixels; resize it") from None
    except Exception as error:  # noqa: BLE001 (damaged pictures end in nearly every kind of error)
        raise UserError(f"{where}: cannot read picture {path} ({error}); save it again as PNG or JPEG") from None
    picture.info["frames"] = frames
    brightest = max(high for _, high in picture.getextrema()) if sixteen_bits else 255
    picture.info["dark"] = 0 < brightest < 64  # made of 10 to 14 bits, of which Pillow drops the lower 8
    return picture


def to_rgb(image):
    """An RGB picture of a Pillow picture of any mode. Pixels of 16 or 32 bits or floats are scaled from their range to
    0..255, NaN is black; what is transparent becomes white. ValueError if all pixels are NaN or infinite."""
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image).astype(np.float64)
        opaque = values != image.info.get("transparency")  # a PNG may name one grey value that is transparent
        if not opaque.any():
            return Image.new("RGB", image.size, "white")
        numbers = values[opaque & np.isfinite(values)]
        if len(numbers) == 0:
            raise ValueError("its pixels are no numbers")
        low = numbers.min()
        span = max(numbers.max() - low, 1e-12)
        grey = np.rint((np.nan_to_num(values, nan=low) - low).clip(0, span) / span * 255)
        return Image.fromarray(np.where(opaque, grey, 255).astype(np.uint8)).convert("RGB")
    if image.mode == "LAB":
        lab, srgb = (ImageCms.createProfile(name) for name in ("LAB", "sRGB"))
        return ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def picture_size(where, path):
    """(width, height) of a picture as open_picture shows it, or of a feature file, without reading all of it."""
    if path.suffix == ".npz":
        size = read_arrays(where, path, ("size",)).get("size")
        if size is None or size.shape != (2,):
            return read_features(where, path)[1]  # which says what is wrong
        return tuple(size.tolist())
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(path) as image:
            width, height = image.size
            orientation = image.getexif().get(0x0112, 1)
            is_tiff = image.format == "TIFF"
    except Exception:  # noqa: BLE001
        return open_picture(where, path).size  # which says what is wrong
    if is_tiff:  # Pillow turns these by itself, some only when they are read
        return open_picture(where, path).size
    if orientation in (5, 6, 7, 8):  # lying on its side
        return height, width
    return width, height


def grid_boxes(width, height, cells=6):
    """(1 + cells^2, 4) float32 pixels: the whole picture, then cells x cells equal parts row by row."""
    x = np.linspace(0, width, cells + 1)
    y = np.linspace(0, height, cells + 1)
    boxes = [(0, 0, width, height)]
    for row in range(cells):
        for column in range(cells):
            boxes.append((x[column], y[row], x[column + 1], y[row + 1]))
    return np.array(boxes, np.float32)


def region_features(image, boxes, patch=12):
    """(N, 3*patch*patch) float32: each box resized to patch x patch by bicubic filtering, rows of RGB pixels,
    standardised as (value/255 - 0.5) / 0.25, hence in -2..2.

    image: RGB picture.   boxes: (N,4) pixels inside it (ValueError by Pillow otherwise).
    """
    crops = []
    for box in np.array(boxes).tolist():
        crop = image.resize((patch, patch), Image.Resampling.BICUBIC, tuple(box))
        crops.append(np.asarray(crop))
    pixels = np.array(crops, np.float32).reshape(len(crops), 3 * patch * patch)  # (N,patch,patch,3) -> (N,F)
    return (pixels / 255 - 0.5) / 0.25


def check_boxes(boxes, width, height, where, key, dtype=np.float32):
    """(N,4) pixels, cut to the picture: an overshoot of up to 1 px is a detector's rounding, not a mistake. UserError for
    a box that lies further outside, or has no area in the picture."""
    boxes = np.array(boxes, dtype)
    limit = np.array([width, height, width, height], dtype)
    inside = (boxes >= -1) & (boxes <= limit + 1)  # (N,4)
    cut = np.clip(boxes, 0, limit)
    for box, box_inside, box_cut in zip(boxes, inside, cut, strict=True):
        text = f"{key!r}: {box.tolist()}"
        if box[0] >= box[2] or box[1] >= box[3]:
            raise UserError(f"{where}: {text} has x2 <= x1 or y2 <= y1; write [x1,y1,x2,y2]")
        if not box_inside.all():
            size = f"{width:g} x {height:g} pixels"
            raise UserError(f"{where}: {text} is outside its picture of {size}; cut it to the picture")
        if box_cut[0] >= box_cut[2] or box_cut[1] >= box_cut[3]:
            raise UserError(f"{where}: {text} has no area inside its picture; leave it out")
    return cut


NPZ_BYTES = 2**28  # of one array in a feature file; 100,000 regions of width 600 in float32


def read_arrays(where, path, names):
    """{name: array} of those arrays `names` that an .npz has. Reads no other array, none that is larger than NPZ_BYTES
    or than its header says, and no pickles. UserError if the file is damaged."""
    arrays = {}
    try:
        with zipfile.ZipFile(path) as archive:
            stored = {info.filename: info for info in archive.infolist()}
            for name in names:
                info = stored.get(f"{name}.npy")
                if info is None:
                    continue
                if info.file_size > NPZ_BYTES:
                    raise ValueError(f"{name!r} has {info.file_size:,} bytes, more than {NPZ_BYTES:,}")
                with archive.open(info) as file:
                    version = np.lib.format.read_magic(file)
                    read_header = np.lib.format.read_array_header_1_0
                    if version != (1, 0):
                        read_header = np.lib.format.read_array_header_2_0
                    shape, fortran, dtype = read_header(file)
                    content = file.read()
                if dtype.hasobject or np.prod(shape, dtype=object) * dtype.itemsize != len(content):
                    raise ValueError(f"the header of {name!r} does not fit its content")
                arrays[name] = np.frombuffer(content, dtype).reshape(shape, order="F" if fortran else "C")
    except Exception as error:  # noqa: BLE001 (damaged files end in nearly every kind of error)
        problem = str(error) or type(error).__name__
        raise UserError(f"{where}: cannot read {path} ({problem}); write the file with numpy.savez") from None
    return arrays


def read_features(where, path):
    """A feature file -> ({field of STORED: array} with boxes in pixels, (width, height)). UserError if it is wrong."""
    arrays = read_arrays(where, path, ("features", "boxes", "size", "probs", "labels"))
    where = f"{where}: {path}"
    for key in ("features", "boxes", "size"):
        if key not in arrays:
            raise UserError(f"{where}: has no array {key!r}; it needs features (N,F), boxes (N,4) and size (2,)")
    count = len(arrays["features"]) if arrays["features"].ndim == 2 else 0
    shapes = {"features": (count, None), "boxes": (count, 4), "size": (2,), "probs": (count, None), "labels": (count,)}
    for key, values in arrays.items():
        check_array(where, key, values, shapes[key])
    width, height = arrays["size"].tolist()
    if width <= 0 or height <= 0:
        raise UserError(f"{where}: 'size' must be (width, height) in pixels")
    boxes = check_boxes(arrays["boxes"], width, height, where, "boxes")
    regions = {"features": arrays["features"], "boxes": boxes}
    if "probs" in arrays:
        probs = arrays["probs"]
        if probs.shape[1] < 2 or (probs < 0).any() or not np.allclose(probs.sum(1), 1, atol=0.02):
            raise UserError(f"{where}: rows of 'probs' must sum to 1; apply a softmax over K > 1 classes, class 0 = "
                            "background")  # fmt: skip
        regions["object_probs"] = probs
        regions["objects"] = probs[:, 1:].argmax(1)
        regions["object_conf"] = probs[:, 1:].max(1)
    if "labels" in arrays:
        labels = arrays["labels"]
        classes = 65504  # without probs the number of classes is not known; check_array refuses larger numbers
        confidence = np.ones(count)
        if "probs" in arrays:
            classes = probs.shape[1] - 1
        if labels.dtype.kind not in "iu" or labels.min() < 0 or labels.max() >= classes:
            raise UserError(f"{where}: 'labels' must be integers 0 to {classes - 1}: classes without background")
        if "probs" in arrays:
            confidence = probs[:, 1:][np.arange(count), labels]
        regions["objects"] = labels
        regions["object_conf"] = confidence
    return regions, (width, height)


def check_array(where, key, values, shape):
    """UserError unless an array has this shape (None: any size above 0) and finite numbers that float16 can hold."""
    fits = values.ndim == len(shape) and values.size > 0
    for size, wanted in zip(values.shape, shape, strict=False):
        fits = fits and wanted in (None, size)
    if not fits:
        wanted = str(shape).replace("None", "K").replace("(0", "(N")
        raise UserError(f"{where}: {key!r} has shape {values.shape}; it must be {wanted}, N and K > 0")
    if values.dtype.kind not in "iuf":
        raise UserError(f"{where}: {key!r} holds {values.dtype}; save floats or integers")
    if not np.isfinite(values).all() or np.abs(values.astype(np.float64)).max() >= 65504:  # float16's largest
        raise UserError(f"{where}: {key!r} has NaN, infinity or values beyond 65504; extract this picture again")


class PictureJob(NamedTuple):
    """What picture_regions needs to know of one picture."""

    where: str  # the line that named it first
    path: Path
    boxes: list | None
    patch: int
    grid: int


def picture_regions(job):
    """Regions of one picture or feature file: ({field: array} as in write_store, warnings, None), or (None, [], mistake)
    where something is wrong with it."""
    notes = []
    try:
        if job.path.suffix == ".npz":
            regions, (width, height) = read_features(job.where, job.path)
            notes += odd_boxes(regions["boxes"], width, height)
            pixels = regions["features"].tobytes()
        else:
            image = open_picture(job.where, job.path)
            width, height = image.size
            boxes = job.boxes
            count = 1 + job.grid**2 if boxes is None else len(boxes)
            if count * 3 * job.patch**2 > NPZ_BYTES // 4:
                size = f"{count:,} regions of {job.patch} x {job.patch} pixels"
                raise UserError(f"{job.where}: {size} fill the memory; take a smaller --patch, --grid or fewer boxes")
            if boxes is None:
                boxes = grid_boxes(width, height, job.grid)
            boxes = check_boxes(boxes, width, height, job.where, "boxes")
            regions = {"features": region_features(image, boxes, job.patch), "boxes": boxes}
            pixels = image.tobytes()
            notes += odd_picture(image) + odd_boxes(boxes, width, height)
    except UserError as error:
        return None, [], str(error)
    features = regions["features"]
    boxes = regions["boxes"]
    if np.ptp(features) == 0:
        notes.append("all features are equal")
    if (features == 0).mean() > 0.95:
        notes.append("more than 95% of the features are zero")
    if len(boxes) > 2 and (boxes == boxes[0]).all():
        notes.append("all boxes are alike")
    regions["boxes"] = boxes / np.array([width, height, width, height], np.float32)
    regions["size"] = (width, height)
    regions["digest"] = content_digest(pixels)
    return regions, [f"{job.where}: {job.path.name}: {note}" for note in notes], None


def odd_picture(image):
    """What is odd in a picture that open_picture has read, a list of lines."""
    notes = []
    if image.info["frames"] > 1:
        notes.append(f"only the first of its {image.info['frames']} frames is used")
    if image.info["dark"]:
        notes.append("its colours have 16 bits and are nearly black in 8; scale them up and save 8 bits a colour")
    return notes


def odd_boxes(boxes, width, height):
    """What is odd in the boxes (N, 4) of a picture, in pixels, a list of lines."""
    if boxes.max() <= 1 < min(width, height):
        return ["boxes look normalised to 0..1; multiply them by width and height"]
    return []


# ---- the feature store ------------------------------------------------------------------------------------------------


def is_network(regions):
    """Whether a network made the regions. regions: `regions` of a dataset.json or a checkpoint, or None."""
    return bool(regions) and regions.get("kind") == "network"


STORED = {  # field of a region: its type on disk
    "features": np.float16,
    "boxes": np.float32,
    "object_probs": np.float16,
    "objects": np.int64,
    "object_conf": np.float32,
    "attributes": np.int64,
    "attribute_conf": np.float32,
}


def ragged(offsets, index):
    """Rows `index` (B,) of a flat array in which row i is offsets[i]:offsets[i+1].
    Returns a mask (B,L), True = inside the row, L the longest, and the positions of its True entries in the flat
    array."""
    index = np.asarray(index)
    start = offsets[index]
    length = offsets[index + 1] - start
    steps = np.arange(length.max(initial=0))
    mask = steps < length[:, None]  # (B,L)
    return mask, (start[:, None] + steps)[mask]


def map_array(path):
    """A .npy file, memory-mapped, as a plain array: numpy's memmap class is slow where single numbers are read. It is
    copy-on-write, because torch takes only arrays that can be written; nothing reaches the file."""
    return np.asarray(np.load(path, mmap_mode="c"))


class FeatureStore:
    """Regions of I pictures in a folder, memory-mapped, so that any number of processes share one copy.

    FIELD.npy    for each field of STORED that the source has (`features` and `boxes`, 0..1, always): all regions
    offsets.npy  (I+1,): picture i has regions offsets[i]:offsets[i+1]
    sizes.npy    (I,2) width and height in pixels; needed only where lines have a `target`
    digests.npy  (I,) equal for equal pictures
    crops.npy    (I,) the number of pictures after this one that are crops of it
    files.jsonl  I lines, the picture file of each as a JSON string; to show it, not to read its regions
    """

    def __init__(self, folder):
        self.folder = Path(folder)
        self.fields = {}
        self.sizes = None
        self.digests = None
        self.crops = None
        try:
            self.offsets = np.load(self.folder / "offsets.npy")
            for name in STORED:
                file = self.folder / f"{name}.npy"
                if file.exists():
                    self.fields[name] = np.load(file, mmap_mode="r")
            if (self.folder / "sizes.npy").exists():
                self.sizes = np.load(self.folder / "sizes.npy")
            if (self.folder / "digests.npy").exists():
                self.digests = np.load(self.folder / "digests.npy")
            if (self.folder / "crops.npy").exists():
                self.crops = np.load(self.folder / "crops.npy")
            if self.offsets.ndim != 1 or self.offsets.dtype.kind not in "iu":
                raise ValueError("offsets.npy is not a list of integers")
            features = self.fields["features"]
            if features.ndim != 2 or features.dtype.kind not in "fiu":
                raise ValueError("features.npy is not (regions, F) of numbers")
            self.width = features.shape[1]  # F
            if self.fields["boxes"].shape[1:] != (4,) or self.fields["boxes"].dtype.kind not in "fiu":
                raise ValueError("boxes.npy is not (regions, 4) of numbers")
            lengths = {len(field) for field in self.fields.values()}
            if lengths != {int(self.offsets[-1])} or self.offsets[0] != 0 or (np.diff(self.offsets) < 1).any():
                raise ValueError("its files do not fit each other")
            if self.sizes is not None and self.sizes.shape != (len(self), 2):
                raise ValueError("sizes.npy is not (pictures, 2)")
            if self.digests is not None and self.digests.shape != (len(self),):
                raise ValueError("digests.npy is not (pictures,)")
            if self.crops is not None:
                counts = self.crops.dtype.kind in "iu" and self.crops.shape == (len(self),)
                if not counts or (self.crops < 0).any() or (np.arange(len(self)) + self.crops >= len(self)).any():
                    raise ValueError("crops.npy is not the number of crops behind each picture")
        except (OSError, ValueError, KeyError, IndexError, TypeError, EOFError) as error:
            raise UserError(f"{folder}: not a feature store, or damaged ({error}); write it again") from None

    def __len__(self):
        return len(self.offsets) - 1

    def check_values(self, sample=1000):
        """UserError unless all boxes lie in 0..1 and features are finite, these in `sample` pictures evenly spaced."""
        boxes = self.open_field("boxes")
        features = self.open_field("features")
        for start in range(0, len(boxes), 1 << 20):
            part = boxes[start : start + (1 << 20)]
            if not (part.min() > -0.01 and part.max() < 1.01):  # False for NaN
                raise UserError(f"{self.folder / 'boxes.npy'}: boxes lie outside 0..1; divide by width and height")
        for row in range(0, len(self), 1 + len(self) // sample):
            if not np.isfinite(features[self.offsets[row] : self.offsets[row + 1]]).all():
                raise UserError(f"{self.folder / 'features.npy'}: picture {row} has NaN or infinity; write it again")

    def label_counts(self, config):
        """Sizes of the heads for the store's labels: {"classes": K with background, "attributes": A}. Where only hard
        labels exist, the size follows from the largest one, but is at least that in `config` (a checkpoint's, or {})."""
        counts = {}
        if "object_probs" in self.fields:
            counts["classes"] = self.fields["object_probs"].shape[1]
        elif "objects" in self.fields:
            counts["classes"] = max(2 + int(self.open_field("objects").max()), config.get("classes", 2))
        if "attributes" in self.fields:
            counts["attributes"] = max(1 + int(self.open_field("attributes").max()), config.get("attributes", 1))
        return counts

    def digests_of(self, rows):
        """The set of the digests of pictures `rows`: equal for equal pictures, or, where the store has none, for equal
        features."""
        if self.digests is not None:
            return set(self.digests[rows].tolist())
        features = self.fields["features"]
        return {content_digest(features[self.offsets[row] : self.offsets[row + 1]].tobytes()) for row in rows}

    def picture_file(self, row):
        """The picture file that row `row` was made of; None if the store does not say, or the file is gone."""
        if self.folder is None or not (self.folder / "files.jsonl").is_file():
            return None
        with open(self.folder / "files.jsonl", encoding="utf-8") as lines:
            line = next(itertools.islice(lines, row, None), '""')
        path = Path(json.loads(line))
        return path if path.is_file() else None

    def draw_crops(self, images, rng):
        """For each picture of `images` (B,) int64 the row of itself or of one of its crops, all equally likely: (B,)."""
        if self.crops is None:
            return images
        return images + rng.integers(0, self.crops[images] + 1)

    def gather(self, images, fields=STORED):
        """images: (B,) int64. Returns Batch's region fields as a dict of (B,N,...) tensors; float16 becomes float32,
        and where region_mask is False all is zero. fields: those to read besides features and boxes."""
        images = np.asarray(images)
        starts = self.offsets[images]  # (B,)
        lengths = self.offsets[images + 1] - starts
        mask = np.arange(lengths.max(initial=0)) < lengths[:, None]  # (B,N)
        out = {"region_mask": torch.from_numpy(mask)}
        for name in self.fields:
            if name not in ("features", "boxes", *fields):
                continue
            values = self.open_field(name)
            values = torch.from_numpy(values)  # torch turns float16 into float32 four times as fast as numpy
            dtype = torch.int64 if STORED[name] == np.int64 else torch.float32
            padded = torch.zeros(mask.shape + values.shape[1:], dtype=dtype)  # (B,N,...)
            for row, (start, length) in enumerate(zip(starts.tolist(), lengths.tolist(), strict=True)):
                padded[row, :length] = values[start : start + length]
            out[name] = padded
        return out

    def open_field(self, name):
        """All regions of a field, memory-mapped anew. What was read through a map counts as memory of this process
        until the map is closed; with one map for the whole run that would become the whole store."""
        return map_array(self.folder / f"{name}.npy")


class MemoryStore(FeatureStore):
    """A feature store of a few pictures, in memory, with numbers rounded as on disk.

    pictures: a list of {field of STORED: (n,...) array} with boxes in 0..1, and `size`: (width, height).
    """

    def __init__(self, pictures):
        self.folder = None
        self.digests = None
        self.crops = None
        self.fields = {}
        for name, dtype in STORED.items():
            if all(name in picture for picture in pictures):
                self.fields[name] = np.concatenate([picture[name] for picture in pictures]).astype(dtype)
        self.offsets = np.cumsum([0] + [len(picture["features"]) for picture in pictures])
        self.sizes = np.array([picture["size"] for picture in pictures], np.float64)
        self.width = self.fields["features"].shape[1]

    def open_field(self, name):
        return self.fields[name]


class ArrayFile:
    """A .npy file that grows by rows and may be larger than memory."""

    def __init__(self, path, dtype, row_shape):
        self.file = open(path, "wb")  # noqa: SIM115 (closed by close)
        self.dtype = np.dtype(dtype)
        self.row_shape = row_shape
        self.rows = 0
        self.write_header()

    def write_header(self):
        shape = (self.rows, *self.row_shape)
        layout = {"descr": self.dtype.str, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(self.file, layout)  # numpy leaves room for a larger number of rows

    def append(self, rows):
        if rows.shape[1:] != self.row_shape:
            raise ValueError(f"a picture has rows of shape {rows.shape[1:]}, the first one {self.row_shape}")
        self.file.write(rows.tobytes())
        self.rows += len(rows)

    def close(self):
        self.file.seek(0)
        self.write_header()
        self.file.close()


def write_store(folder, pictures):
    """Writes a feature store into `folder`, picture by picture, straight to disk.

    pictures: iterable of {field of STORED: (n,...) array}, boxes in 0..1, and, if all have them, `size`: (width, height),
    `digest` and `crops`: integers, `file`: the picture's path. All pictures have the same fields. ValueError for values
    that are not finite in their type on disk, for boxes outside 0..1, and for fields of different lengths.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name in (*STORED, "offsets", "sizes", "digests", "crops"):  # of an older store
        (folder / f"{name}.npy").unlink(missing_ok=True)
    (folder / "files.jsonl").unlink(missing_ok=True)
    files = {}
    offsets = [0]
    sizes = []
    digests = []
    crops = []
    paths = []
    try:
        for picture in pictures:
            for name, dtype in STORED.items():
                if name not in picture:
                    continue
                given = np.asarray(picture[name])
                with np.errstate(over="ignore", invalid="ignore"):  # they are reported below
                    rows = given.astype(dtype)
                if name not in files:
                    files[name] = ArrayFile(folder / f"{name}.npy", dtype, rows.shape[1:])
                where = f"{name!r} of picture {len(offsets) - 1}"
                if not (np.isfinite(given).all() and np.isfinite(rows).all()):
                    raise ValueError(f"{where} has NaN, infinity or too large numbers")
                if name == "boxes" and not (rows.min(initial=0) > -0.01 and rows.max(initial=0) < 1.01):
                    raise ValueError(f"{where} lie outside 0..1; divide by width and height")
                if len(rows) != len(picture["features"]):
                    raise ValueError(f"{where} has {len(rows)} rows, 'features' has {len(picture['features'])}")
                files[name].append(rows)
            offsets.append(offsets[-1] + len(picture["features"]))
            if "size" in picture:
                sizes.append(picture["size"])
            if "digest" in picture:
                digests.append(picture["digest"])
            crops.append(picture.get("crops", 0))
            if "file" in picture:
                paths.append(json.dumps(str(picture["file"])))
    finally:
        for file in files.values():
            file.close()
    np.save(folder / "offsets.npy", np.array(offsets))
    if sizes:
        np.save(folder / "sizes.npy", np.array(sizes, np.float64))
    if digests:
        np.save(folder / "digests.npy", np.array(digests, np.int64))
    if any(crops):
        np.save(folder / "crops.npy", np.array(crops, np.int64))
    if paths:
        (folder / "files.jsonl").write_text("\n".join(paths) + "\n", encoding="utf-8")
