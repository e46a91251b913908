"""Records: what a user's files hold, read and checked. data.py makes data sets of it.

    pictures -> regions                  open_picture, region_features, picture_regions
    .npz feature files -> regions        read_features
    regions -> a feature store           write_store, FeatureStore
    lines of JSONL -> records            read_records: every mistake with its line number
    the pictures that records name       Pictures

Regions stand for the Faster R-CNN detections of the papers (bottom-up attention, Anderson 2018). Without a feature
store a region is its box cut out of the picture and resized to 12 x 12 pixels.

Letters: B batch rows, N regions, F region-feature width, K object classes with background (class 0), I pictures of a
store. Boxes: x1,y1,x2,y2; pixels in files, 0..1 in a store.
"""

import codecs
import contextlib
import difflib
import hashlib
import json
import multiprocessing
import os
import re
import shutil
import sys
import time
import unicodedata
import warnings
import zipfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageCms, ImageOps

from common import UserError

VERSION = 12  # raise it whenever region features or columns change: it is part of every cache key

# ---- files ------------------------------------------------------------------------------------------------------------


def write_whole(path, write):
    """Makes a file whole or not at all: write(temporary path), sync to disk, rename. A failure leaves no .tmp."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
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
    remove_leftovers(folder.parent)
    aside = folder.parent / f".making-{folder.name}-{os.getpid()}-{time.time_ns()}"
    aside.mkdir()  # not tempfile.mkdtemp, whose folders only their owner may read
    try:
        make(aside)
        aside.rename(folder)
    except OSError:
        if not folder.exists():
            raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return folder


def remove_leftovers(folder):
    """Removes what killed runs left half made: folders of make_once in which nothing was written for a day."""
    for aside in folder.glob(".making-*"):
        with contextlib.suppress(OSError):  # another process may be faster
            newest = max(file.stat().st_mtime for file in [aside, *aside.rglob("*")])
            if time.time() - newest > 24 * 3600:
                shutil.rmtree(aside)


def warn(text):
    """One line on stderr, from one process."""
    if os.environ.get("RANK", "0") == "0":
        print(f"warning: {text}", file=sys.stderr)


def cache_key(*parts):
    """A short name for a cache folder; different parts or another VERSION give another name."""
    return hashlib.sha256(json.dumps([VERSION, *parts]).encode()).hexdigest()[:16]


def file_stamp(path):
    """What changes when a file does: [resolved path, size, time of its last change]."""
    state = path.stat()
    return [str(path.resolve()), state.st_size, state.st_mtime_ns]


def parallel(work, jobs, label):
    """Yields work(job) in order, from one process per CPU; progress on stderr once it has taken a second."""
    workers = min(os.cpu_count() or 1, len(jobs))
    if workers > 1:
        # fork on Linux: a fresh interpreter would spend longer importing torch than on the work
        context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
        with ProcessPoolExecutor(workers, context) as pool:
            yield from show_progress(pool.map(work, jobs), len(jobs), label)
    else:
        yield from show_progress(map(work, jobs), len(jobs), label)


def show_progress(results, total, label):
    """Yields `results` and prints their share of `total`, on a terminal five times a second on one line."""
    terminal = sys.stderr.isatty()
    pause = 0.2 if terminal else 10.0
    start = time.monotonic()
    shown = 0.0  # seconds after the start
    for done, result in enumerate(results, 1):
        yield result
        seconds = time.monotonic() - start
        last = done == total and shown > 0
        if seconds > 1 and (seconds - shown > pause or last):
            shown = seconds
            end = "\r" if terminal and not last else "\n"
            print(f"{label}: {100 * done // total}%, {seconds:.0f} s", end=end, file=sys.stderr, flush=True)


# ---- pictures and their regions ---------------------------------------------------------------------------------------


def open_picture(where, path):
    """The picture as RGB with 8 bits a colour, turned as its EXIF says; every other part of the code opens pictures with
    this. Of an animation the first frame; info["frames"] says how many there are. UserError if it cannot be read."""
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(path) as image:
            frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)  # MPO: a photo and its preview
            picture = to_rgb(ImageOps.exif_transpose(image))
    except Image.DecompressionBombError:
        most = 2 * Image.MAX_IMAGE_PIXELS
        raise UserError(f"{where}: picture {path} has more than {most:,} pixels; resize it") from None
    except Exception as error:  # noqa: BLE001 (damaged pictures end in nearly every kind of error)
        raise UserError(f"{where}: cannot read picture {path} ({error}); save it again as PNG or JPEG") from None
    picture.info["frames"] = frames
    return picture


def to_rgb(image):
    """An RGB picture of a Pillow picture of any mode. Pixels of 16 or 32 bits or floats are scaled from their range to
    0..255; what is transparent becomes white."""
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image).astype(np.float64)
        values = np.where(np.isfinite(values), values, 0.0)
        low = values.min()
        span = max(values.max() - low, 1e-12)
        grey = np.rint((values - low) / span * 255).astype(np.uint8)
        return Image.fromarray(grey).convert("RGB")
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
        return tuple(read_arrays(where, path, ("size",))["size"].tolist())
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(path) as image:
            width, height = image.size
            orientation = image.getexif().get(0x0112, 1)
    except Exception:  # noqa: BLE001
        width, height = open_picture(where, path).size  # which says what is wrong
        orientation = 1
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
    classes = 65504  # without probs any whole number is a class
    confidence = np.ones(count)
    if "probs" in arrays:
        probs = arrays["probs"]
        if probs.shape[1] < 2 or (probs < 0).any() or not np.allclose(probs.sum(1), 1, atol=0.02):
            raise UserError(f"{where}: rows of 'probs' must sum to 1; apply a softmax over K > 1 classes, class 0 = "
                            "background")  # fmt: skip
        regions["object_probs"] = probs
        regions["objects"] = probs[:, 1:].argmax(1)
        regions["object_conf"] = probs[:, 1:].max(1)
        classes = probs.shape[1] - 1
    if "labels" in arrays:
        labels = arrays["labels"]
        if labels.dtype.kind not in "iu" or labels.min() < 0 or labels.max() >= classes:
            raise UserError(f"{where}: 'labels' must be integers 0 to {classes - 1}: classes without background")
        if "probs" in arrays:
            confidence = arrays["probs"][np.arange(count), labels + 1]
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
            pixels = regions["features"].tobytes()
        else:
            image = open_picture(job.where, job.path)
            width, height = image.size
            boxes = job.boxes
            if boxes is None:
                boxes = grid_boxes(width, height, job.grid)
            boxes = check_boxes(boxes, width, height, job.where, "boxes")
            regions = {"features": region_features(image, boxes, job.patch), "boxes": boxes}
            pixels = image.tobytes()
            if image.info["frames"] > 1:
                notes.append(f"only the first of its {image.info['frames']} frames is used")
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
    if boxes.max() <= 1 < min(width, height):
        notes.append("boxes look normalised to 0..1; multiply them by width and height")
    regions["boxes"] = boxes / np.array([width, height, width, height], np.float32)
    regions["size"] = (width, height)
    regions["digest"] = int.from_bytes(hashlib.sha256(pixels).digest()[:7])  # equal pictures have equal digests
    return regions, [f"{job.where}: {job.path.name}: {note}" for note in notes], None


# ---- the feature store ------------------------------------------------------------------------------------------------

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


class FeatureStore:
    """Regions of I pictures in a folder, memory-mapped, so that any number of processes share one copy.

    FIELD.npy    for each field of STORED that the source has (`features` and `boxes`, 0..1, always): all regions
    offsets.npy  (I+1,): picture i has regions offsets[i]:offsets[i+1]
    sizes.npy    (I,2) width and height in pixels; needed only where lines have a `target`
    digests.npy  (I,) equal for equal pictures
    """

    def __init__(self, folder):
        self.folder = Path(folder)
        self.fields = {}
        self.sizes = None
        self.digests = None
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
            self.width = self.fields["features"].shape[1]  # F
            self.fields["boxes"].shape[1]
            lengths = {len(field) for field in self.fields.values()}
            if lengths != {int(self.offsets[-1])} or (np.diff(self.offsets) < 1).any():
                raise ValueError("its files do not fit each other")
        except (OSError, ValueError, KeyError, IndexError, EOFError) as error:
            raise UserError(f"{folder}: not a feature store, or damaged ({error}); write it again") from None
        self.classes = None  # K
        if "object_probs" in self.fields:
            self.classes = self.fields["object_probs"].shape[1]

    def __len__(self):
        return len(self.offsets) - 1

    def gather(self, images):
        """images: (B,) int64. Returns Batch's region fields as a dict of (B,N,...) tensors; float16 becomes float32,
        and where region_mask is False all is zero."""
        mask, rows = ragged(self.offsets, images)  # (B,N)
        out = {"region_mask": torch.from_numpy(mask)}
        for name, values in self.fields.items():
            dtype = np.int64 if values.dtype == np.int64 else np.float32
            padded = np.zeros(mask.shape + values.shape[1:], dtype)  # (B,N,...)
            padded[mask] = values[rows]
            out[name] = torch.from_numpy(padded)
        return out


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
        self.file.write(rows.astype(self.dtype).tobytes())
        self.rows += len(rows)

    def close(self):
        self.file.seek(0)
        self.write_header()
        self.file.close()


def write_store(folder, pictures):
    """Writes a feature store into `folder`, picture by picture, straight to disk.

    pictures: iterable of {field of STORED: (n,...) array}, boxes in 0..1, and `size`: (width, height), `digest`: an
    integer, if all have them. All pictures have the same fields. ValueError for values that are not finite.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    offsets = [0]
    sizes = []
    digests = []
    try:
        for picture in pictures:
            for name, dtype in STORED.items():
                if name not in picture:
                    continue
                rows = np.asarray(picture[name])
                if name not in files:
                    files[name] = ArrayFile(folder / f"{name}.npy", dtype, rows.shape[1:])
                if not np.isfinite(rows).all():
                    raise ValueError(f"{name!r} of picture {len(offsets) - 1} has NaN or infinity")
                files[name].append(rows)
            offsets.append(offsets[-1] + len(picture["features"]))
            if "size" in picture:
                sizes.append(picture["size"])
            if "digest" in picture:
                digests.append(picture["digest"])
    finally:
        for file in files.values():
            file.close()
    np.save(folder / "offsets.npy", np.array(offsets))
    if sizes:
        np.save(folder / "sizes.npy", np.array(sizes, np.float64))
    if digests:
        np.save(folder / "digests.npy", np.array(digests, np.int64))


# ---- lines of JSONL ---------------------------------------------------------------------------------------------------


def is_text(value):
    """A string that says something. NUL is no text: Strings uses it to separate segments."""
    return isinstance(value, str) and value.strip() != "" and "\0" not in value


def is_texts(value, least=1):
    """A list of at least `least` such strings."""
    return isinstance(value, list) and len(value) >= least and all(map(is_text, value))


def is_number(value):
    """A finite number of a sensible size."""
    return type(value) in (int, float) and abs(value) <= 1e9  # False for NaN


def is_box(value):
    """Four numbers; their order is checked where the picture is known."""
    return isinstance(value, list) and len(value) == 4 and all(map(is_number, value))


def is_boxes(value):
    return isinstance(value, list) and len(value) > 0 and all(map(is_box, value))


def is_answer(value):
    """One answer, or soft scores {answer: 0..1}."""
    if not isinstance(value, dict):
        return is_text(value)
    scores = all(is_number(score) and 0 <= score <= 1 for score in value.values())
    return len(value) > 0 and all(map(is_text, value)) and scores


def is_file_or_two(value):
    return is_text(value) or (is_texts(value) and len(value) == 2)


KEYS = {  # key: test of its value, what to write
    "image": (is_text, "a file name"),
    "images": (lambda value: is_texts(value) and len(value) == 2, "a list of two file names"),
    "features": (is_file_or_two, "an .npz file or a row of a store, as regions#17 (nlvr2: a list of two)"),
    "boxes": (is_boxes, "[[x1,y1,x2,y2],...] in pixels"),
    "text": (is_text, "a string that is not empty"),
    "answer": (is_answer, "a string, or {string: score in 0..1}"),
    "label": (
        lambda value: type(value) in (bool, int),
        "true or false (nlvr2), or the index of the right choice (vcr)",
    ),
    "choices": (lambda value: is_texts(value, 2), "a list of at least two strings"),
    "reasons": (lambda value: is_texts(value, 2), "a list of at least two strings"),
    "reason": (lambda value: type(value) is int, "the index of the right one of 'reasons'"),
    "target": (is_box, "[x1,y1,x2,y2] in pixels"),
    "split": (is_text, "train, val or test"),
    "kind": (is_text, "a word for the sort of question; accuracy is given for each sort"),
    "id": (lambda value: is_text(value) or type(value) is int, "a string or a number"),
}
ID_KEYS = ("question_id", "caption_id", "sent_id", "annot_id", "pair_id", "qid", "uid", "Id", "ID")  # read as `id`
MEANT = {  # what other data sets call our keys
    "text": ("question", "caption", "sentence", "statement", "expression", "hypothesis", "prompt"),
    "image": ("img", "image_path", "file_name", "filename", "picture", "path"),
    "answer": ("answers", "gold_label"),
    "boxes": ("bboxes",),
    "target": ("box", "bbox"),
    "choices": ("options", "answer_choices"),
    "reasons": ("rationales", "rationale_choices"),
    "kind": ("type", "question_type", "answer_type"),
}
STORE_ROW = re.compile(r"(.+)#(\d{1,12})")  # regions#17: row 17 of the store in folder regions


class Mistakes:
    """The first twenty mistakes of a file, one line each, and the number of all."""

    def __init__(self):
        self.first = []
        self.count = 0

    def add(self, text):
        self.count += 1
        if len(self.first) < 20:
            self.first.append(str(text))

    def stop(self, path):
        """UserError if there are any."""
        if self.count == 1:
            raise UserError(self.first[0])
        if self.count > 1:
            raise UserError(f"{self.first[0]} (and {self.count - 1} more; `python data.py check {path}` lists them)")


def read_records(path, task, splits, mistakes):
    """Yields ("FILE:LINE", record) for each right line; what is wrong with the others goes to `mistakes`.

    A record is the line's object with `split` and `id` filled in, texts in Unicode's NFC, `answer` as {text: score}.
    Opens no picture. task: a row of tasks.TASKS.
    """
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            where = f"{path}:{number}"
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in line:
                raise UserError(f"{where}: this is UTF-16 or no text at all; save the file as UTF-8")
            if not line.strip():
                continue
            try:
                record = parse_line(line)
                check_record(record, task, splits)
                record.setdefault("id", f"{path.name}:{number}")
                normalize_record(record)
                problem = task.check(record)
                if problem:
                    raise UserError(problem)
            except UserError as error:
                mistakes.add(f"{where}: {error}")
            else:
                yield where, record


def parse_line(line):
    """The JSON object of a line (bytes). UserError without the line's number."""
    try:
        text = line.decode("utf-8")
        record = json.loads(text, object_pairs_hook=unique_keys)
        if "\\u" in text:
            json.dumps(record, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"not UTF-8 (byte {error.start + 1} of the line); save the file as UTF-8") from None
    except UnicodeEncodeError:
        raise UserError(r"holds half a character, as \ud83d alone; write the character itself") from None
    except RecursionError:
        raise UserError("not JSON that can be read: nested too deeply") from None
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"not JSON ({error}); write one object a line") from None
    if not isinstance(record, dict):
        raise UserError('not an object; write {"image": ..., "text": ...}')
    return record


def unique_keys(pairs):
    """A JSON object as a dict; UserError if a key stands in it twice."""
    record = dict(pairs)
    if len(record) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise UserError(f"key {twice[:60]!r} stands twice")
    return record


def check_record(record, task, splits):
    """UserError, without the line's number, where a key or its value is not as KEYS has it or the task needs it."""
    for key in ID_KEYS:
        if key in record and "id" not in record:
            record["id"] = record.pop(key)
    for key, value in record.items():
        if key not in KEYS:
            raise UserError(f"unknown key {key[:60]!r}; {suggestion(key)}")
        is_right, wanted = KEYS[key]
        if not is_right(value):
            raise UserError(f"{key!r} is {str(value)[:60]!r}; write {wanted}")
    for key in ("text", *task.needs):
        if key not in record:
            raise UserError(f"key {key!r} is missing; task {task.name} needs it: {KEYS[key][1]}")
    if record.get("split", "train") not in splits:
        raise UserError(f"'split' is {record['split'][:60]!r}; write {', '.join(splits[:-1])} or {splits[-1]}")
    sources = [key for key in ("image", "images", "features") if key in record]
    if len(sources) != 1:
        raise UserError("give one of 'image', 'images' and 'features', and only one")
    source = sources[0]
    if len(picture_names(record)) != task.pictures:
        wanted = "one file: 'image' or 'features'"
        if task.pictures == 2:
            wanted = "two files: 'images', or 'features' as a list"
        raise UserError(f"{source!r} does not fit; {task.name} takes {wanted}")
    if "boxes" in record and source != "image":
        raise UserError(f"'boxes' goes with 'image' only, not with {source!r}")


def suggestion(key):
    """What to write in place of an unknown key."""
    for meant, names in MEANT.items():
        if key.lower() in names:
            return f"did you mean {meant}?"
    near = difflib.get_close_matches(key, KEYS, 1, 0.5)
    if near:
        return f"did you mean {near[0]}?"
    return f"choose from {', '.join(KEYS)}"


def picture_names(record):
    """The one or two files, or rows of a store, that a record names."""
    for key in ("image", "images", "features"):
        if key in record:
            names = record[key]
    return names if isinstance(names, list) else [names]


def normalize_record(record):
    """Fills in `split`, makes `id` a string, texts NFC and `answer` {text: score}, in place."""
    record.setdefault("split", "train")
    record["id"] = str(record["id"])
    record["text"] = normalize_text(record["text"])
    for key in ("choices", "reasons"):
        if key in record:
            record[key] = [normalize_text(text) for text in record[key]]
    if "answer" in record:
        answers = record["answer"]
        if isinstance(answers, str):
            answers = {answers: 1.0}
        record["answer"] = {}
        for text, score in answers.items():
            text = normalize_answer(text)
            record["answer"][text] = min(1.0, record["answer"].get(text, 0.0) + float(score))


def normalize_text(text):
    """Composed characters (NFC), so that the same letter is always the same."""
    return unicodedata.normalize("NFC", text)


def normalize_answer(text):
    """Answers are compared in lower case, without outer blanks and the full stop: " Yes. " and "yes" are one."""
    text = " ".join(normalize_text(text).lower().split())
    return text.rstrip(".").rstrip() or text


class Pictures:
    """The pictures that the lines of a file name, each once: rows of stores that exist, and jobs for one to be made."""

    def __init__(self, folder, patch, grid):
        self.folder = folder
        self.patch = patch
        self.grid = grid
        self.jobs = []  # row i of the store to be made is that of job i
        self.rows = {}  # (name, boxes as JSON) -> row of the store to be made
        self.sizes = {}  # name -> (width, height)
        self.stores = {}  # name -> FeatureStore
        self.outside = 0  # pictures outside of the file's folder

    def find(self, where, record):
        """(name of the store, rows in it, one for each picture); the store to be made has the name "". UserError if a
        file or row does not exist."""
        found = []
        for name in picture_names(record):
            match = STORE_ROW.fullmatch(name)
            if "features" in record and match:
                found.append((match[1], self.find_row(match[1], int(match[2]))))
            else:
                found.append(("", self.find_file(where, name, record.get("boxes"))))
        names = {name for name, _ in found}
        if len(names) > 1:
            raise UserError("'features' names two stores; write both pictures into one")
        return names.pop(), [row for _, row in found]

    def find_row(self, name, row):
        if name not in self.stores:
            self.stores[name] = FeatureStore(self.folder / name)
        if row >= len(self.stores[name]):
            raise UserError(f"'features': {name} has rows 0 to {len(self.stores[name]) - 1}, not {row}")
        return row

    def find_file(self, where, name, boxes):
        key = (name, json.dumps(boxes))
        if key not in self.rows:
            path = self.folder / name
            if not path.is_file():
                raise UserError(f"'image' or 'features': no file {path}; paths are relative to the .jsonl file")
            if Path(name).is_absolute() or ".." in Path(name).parts:
                self.outside += 1
            self.rows[key] = len(self.jobs)
            self.jobs.append(PictureJob(where, path, boxes, self.patch, self.grid))
        return self.rows[key]

    def scale_target(self, record, name, row):
        """The record's target cut to its picture, pixels -> 0..1. UserError if it lies outside."""
        if name:
            sizes = self.stores[name].sizes
            if sizes is None:
                raise UserError(f"'target': {name} has no sizes.npy; write the store with `size`")
            width, height = sizes[row].tolist()
        else:
            path = self.jobs[row].path
            if path not in self.sizes:
                self.sizes[path] = picture_size("'target'", path)
            width, height = self.sizes[path]
        (box,) = check_boxes([record["target"]], width, height, "its picture", "target", np.float64)
        return (box / [width, height, width, height]).tolist()

    def paths(self):
        """Every file that the columns depend on, except the JSONL file."""
        for job in self.jobs:
            yield job.path
        for name in self.stores:
            yield self.folder / name / "offsets.npy"
            yield self.folder / name / "features.npy"

    def extract(self, path, cache, mistakes):
        """The store of all jobs, made unless it is in the cache. UserError where a picture is wrong."""
        key = [[*file_stamp(job.path), job.boxes, job.patch, job.grid] for job in self.jobs]

        def make(folder):
            notes = []
            write_store(folder, self.extracted(path, mistakes, notes))
            mistakes.stop(path)
            (folder / "warnings.json").write_text(json.dumps(notes))

        return FeatureStore(make_once(Path(cache) / f"regions-{cache_key(key)}", make))

    def extracted(self, path, mistakes, notes):
        """Yields the regions of each job that is right, all with the same fields and widths."""
        first = None  # {field: shape of a row} of the first picture
        results = parallel(picture_regions, self.jobs, f"reading {path}")
        for job, (regions, warned, mistake) in zip(self.jobs, results, strict=True):
            notes += warned
            if mistake:
                mistakes.add(mistake)
                continue
            shapes = {name: regions[name].shape[1:] for name in STORED if name in regions}
            if first is None:
                first, first_path = shapes, job.path
            if shapes["features"] != first["features"]:
                mistakes.add(f"{job.where}: {job.path} has features {shapes['features'][0]} wide, {first_path} "
                             f"{first['features'][0]}; extract all alike")  # fmt: skip
            elif shapes != first:
                mistakes.add(f"{job.where}: {job.path}: 'labels' or 'probs' unlike {first_path}; all or none have them")
            else:
                yield regions
