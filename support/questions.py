"""questions.py: what a request to serve.py asks. A body of JSON or of a form becomes a record and its pictures' regions.

Whatever is wrong with it is an HttpError: the status, and what to tell the client. A body is not trusted: it has limits
on its length, on the pixels of pictures, and on the number of values, so that no request fills the memory.
"""

import base64
import contextlib
import io
import json
import tempfile
import warnings
from concurrent.futures import Future
from email.parser import BytesHeaderParser
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

import data
import predict
from common import UserError
from support import attention, drawing, examples, records, regions

MAX_BODY = 8 * 2**20  # bytes of a request, without its headers
MAX_PIXELS = 12_500_000  # of one picture; a telephone's has 12.2 million
MAX_SIDE = 20_000  # pixels of its width and height: cutting a region takes time and memory in proportion to its sides
SMALL_PICTURE = 1_000_000  # pixels; of larger pictures only one is in memory
MAX_TEXT = 2000  # characters of a text
MAX_LIST = 100  # boxes of a picture, choices, fields of a form
MAX_VALUES = 20_000  # commas and opening brackets of a JSON body
WAIT_SECONDS = 30  # for the requests that are in memory before this one
REQUEST_KEYS = ("images", "boxes", "text", "choices", "answer", "sample", "attention")  # of a form: image
SAMPLES = 6
SAMPLE_SIDE = 480  # pixels of a sample's longer side
FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF")  # for some others Pillow starts other programs


class Job(NamedTuple):
    """A question that waits for the model."""

    record: dict  # as examples.make_dataset takes it
    pictures: list  # their regions
    attention: bool  # whether to say how much the answer attends to each region
    future: Future  # of the answer


class HttpError(Exception):
    """A status other than 200, and what to tell the client."""

    def __init__(self, status, message):
        super().__init__(message)
        self.status = status


@contextlib.contextmanager
def wait_for(slot):
    """Holds a semaphore. HttpError 503 if it is not free in time."""
    if not slot.acquire(timeout=WAIT_SECONDS):
        raise HttpError(503, "too many requests are being read; try again in a moment")
    try:
        yield
    finally:
        slot.release()


# ---- the body ----------------------------------------------------------------------------------------------------------


def body_length(headers):
    """The Content-Length of a request, in bytes. HttpError 411 if it has none, 413 if it is above MAX_BODY."""
    length = headers.get("Content-Length", "")
    if not (length.isascii() and length.isdigit()) or "Transfer-Encoding" in headers:
        raise HttpError(411, "send the header Content-Length, and the body in one piece")
    if len(length) > 12 or int(length) > MAX_BODY:
        raise HttpError(413, f"a body of {length[:12]} bytes; send at most {MAX_BODY:,}")
    return int(length)


def parse_json(body):
    """The object of a JSON body. HttpError 400 if it is no JSON object, or has more than MAX_VALUES commas and opening
    brackets, which would fill the memory."""
    if body.count(b",") + body.count(b"[") + body.count(b"{") > MAX_VALUES:
        raise HttpError(400, "too many values")
    try:
        request = json.loads(body, object_pairs_hook=records.unique_keys)
    except UserError as error:  # a key stands there twice
        raise HttpError(400, str(error)) from None
    except (ValueError, RecursionError):
        raise HttpError(400, 'not JSON; send {"images": [base64], "text": "..."}') from None
    if not isinstance(request, dict):
        raise HttpError(400, 'send an object: {"images": [base64], "text": "..."}')
    return request


def parse_form(body, boundary):
    """The same object from a body of multipart/form-data (RFC 7578). HttpError 400 if the body is no such form."""
    parts = (b"\r\n" + body).split(b"\r\n--" + boundary.encode(), MAX_LIST + 1)
    if len(parts) < 3 or not parts[-1].startswith(b"--"):
        raise HttpError(400, f"the form has no end, or more than {MAX_LIST} fields")
    request = {}
    for part in parts[1:-1]:
        head, _, content = part.partition(b"\r\n\r\n")
        headers = BytesHeaderParser().parsebytes(head[:MAX_TEXT].strip())
        name = headers.get_param("name", header="content-disposition")
        if name == "image":
            request.setdefault("images", []).append(content)
            continue
        try:
            value = content.decode()
            if name in ("boxes", "sample", "attention"):
                value = parse_json(b'{"value": %b}' % content)["value"]
        except (UnicodeDecodeError, HttpError):
            raise HttpError(400, f"the field {name!r} is no text, or no JSON") from None
        if name in ("boxes", "choices"):
            request.setdefault(name, []).append(value)
        elif name in request:
            raise HttpError(400, f"the field {name[:60]!r} stands there twice")
        elif isinstance(name, str):
            request[name] = value
    return request


def make_job(server, request):
    """The Job of a request. HttpError where a key is unknown or has a wrong value."""
    for key in request:
        if key not in REQUEST_KEYS:
            raise HttpError(400, f"unknown key {key[:60]!r}; a request has {', '.join(REQUEST_KEYS)}")
    record = check_question(request, server.task)
    wanted = request.get("attention", False)
    if not isinstance(wanted, bool):
        raise HttpError(400, "'attention' must be true or false")
    return Job(record, find_regions(server, request), wanted, Future())


def check_question(request, task):
    """A request's record, as examples.make_dataset takes it. HttpError 400 where a key has a wrong value."""
    for key in ("text", "answer"):
        value = request.get(key) or ""
        if not isinstance(value, str) or len(value) > MAX_TEXT or "\0" in value:
            raise HttpError(400, f"{key!r} must be a string of at most {MAX_TEXT} characters")
    choices = request.get("choices")
    if choices is not None:
        is_valid = records.is_texts(choices, 2) and len(choices) <= MAX_LIST and max(map(len, choices)) <= MAX_TEXT
        if not is_valid:
            size = f"2 to {MAX_LIST} strings of at most {MAX_TEXT} characters"
            raise HttpError(400, f"'choices' must be {size}, none of them blank")
    record = {"text": request.get("text") or "", "choices": choices, "answer": request.get("answer")}
    try:
        json.dumps(record, ensure_ascii=False).encode()
        examples.make_example(task, record)
    except UnicodeEncodeError:
        raise HttpError(400, "a text holds half a character") from None
    except UserError as error:
        raise HttpError(400, str(error)) from None
    return record


# ---- pictures ----------------------------------------------------------------------------------------------------------


def decode_base64(text):
    """The bytes of a picture in base64, with or without "data:image/png;base64,"."""
    if isinstance(text, bytes):  # of a form
        return text
    if not isinstance(text, str):
        raise HttpError(400, "'images' must be strings in base64")
    try:
        return base64.b64decode(text.rpartition(",")[2], validate=True)
    except ValueError:
        raise HttpError(400, "'images' must be in base64") from None


def count_pixels(content):
    """Pixels of a picture, doubled if it has transparency, times four with 16 or 32 bits a pixel: its need of memory.
    Reads no pixels. HttpError 400 if it is no picture, 413 if it is too large."""
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(content), formats=FORMATS) as image:
            width, height = image.size
            weight = 1
            if image.has_transparency_data:
                weight = 2  # it is laid on white
            if image.mode.startswith(("I", "F")):
                weight = 4  # 16 or 32 bits a pixel become 64
            several = has_second_page(image)
    except Image.DecompressionBombError:
        raise HttpError(413, f"too large a picture; send one of at most {MAX_PIXELS:,} pixels") from None
    except Exception:  # noqa: BLE001 (damaged pictures end in nearly every kind of error)
        raise HttpError(400, "this is no picture that can be read; send a PNG or JPEG file") from None
    if several:
        raise HttpError(400, "a TIFF of several pages; send one page")
    if max(width, height) > MAX_SIDE or width * height * weight > MAX_PIXELS:
        limits = f"at most {MAX_PIXELS // weight:,} pixels, no side longer than {MAX_SIDE:,}"
        raise HttpError(413, f"a picture of {width} x {height} pixels; send one of {limits}")
    return width * height * weight


def has_second_page(image):
    """Whether a TIFF has several pages. Pillow counts them in a time that grows with the square of their number."""
    if image.format != "TIFF":
        return False
    try:
        image.seek(1)
    except EOFError:
        return False
    return True


def regions_of_request(server, content, boxes):
    """The regions of a picture, bytes. HttpError 400 for what cannot be read and for wrong boxes."""
    if boxes is not None and (not records.is_boxes(boxes) or len(boxes) > MAX_LIST):
        raise HttpError(400, f"'boxes' must be 1 to {MAX_LIST} lists [x1,y1,x2,y2] for each picture")
    slot = server.small_pictures
    if count_pixels(content) > SMALL_PICTURE:
        slot = server.large_pictures
    with wait_for(slot), tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "picture"
        path.write_bytes(content)
        try:
            found, notes = examples.make_regions(server.run, "the request", path, boxes, server.network)
            return {**found, "notes": [note.split(": ")[-1] for note in notes]}
        except UserError as error:
            raise HttpError(400, str(error).replace(str(path), "the picture")) from None


def find_regions(server, request):
    """The regions of a request's pictures: those of a sample, or of the pictures that it holds."""
    sample = request.get("sample")
    if sample is not None:
        if request.get("images") is not None or request.get("boxes") is not None:
            raise HttpError(400, "a sample has its own pictures and boxes; leave out 'images' and 'boxes', or 'sample'")
        if not server.samples:
            raise HttpError(400, "this server has no samples; send 'images'")
        if type(sample) is not int or not 0 <= sample < len(server.samples):
            raise HttpError(400, f"'sample' must be 0 to {len(server.samples) - 1}")
        return server.sample_regions[sample]
    images = request.get("images")
    wanted = server.task.pictures
    if not isinstance(images, list) or len(images) != wanted:
        pictures = "1 picture" if wanted == 1 else f"{wanted} pictures"
        raise HttpError(400, f"send {pictures}: in a form as 'image', in JSON as 'images', a list in base64")
    boxes = request.get("boxes")
    if boxes is None:
        boxes = [None] * wanted
    if not isinstance(boxes, list) or len(boxes) != wanted:
        raise HttpError(400, "'boxes' must be a list with the boxes of each picture")
    contents = [decode_base64(image) for image in images]
    return [regions_of_request(server, content, own) for content, own in zip(contents, boxes, strict=True)]


def pixel_boxes(picture):
    """[[x1, y1, x2, y2], ...] of a picture's regions, in pixels."""
    return (picture["boxes"] * np.tile(picture["size"], 2)).round(3).tolist()  # (N, 4)


def find_warning(run, dataset, i, pictures):
    """{"warning": what is odd in the pictures of example i, and which of its words were unknown or cut off}; {} if nothing."""
    notes = []
    for number, picture in enumerate(pictures, 1):
        name = "picture" if len(pictures) == 1 else f"picture {number}"
        notes += [f"{name}: {note}" for note in picture.get("notes", ())]  # a sample's regions have none
    if any(dataset.lost[1:]):  # of all questions that are answered together
        own = dataset.subset(np.array([i])).encode(run.tokenizer, run.args.max_words)
        lost = records.lost_text([own.lost])
        if lost:
            notes.append(f"text: {lost}")
    return {"warning": "; ".join(notes)} if notes else {}


def weigh_regions(run, task, dataset, i, pictures):
    """{"regions": [{"picture": 0, "box": [x1, y1, x2, y2], "weight": share}]}: each region's share of the attention of
    the answer to example i. {"note": reason} where it cannot be computed. pictures: the regions of its pictures."""
    try:
        weights = attention.region_weights(run, task, dataset, i)
    except UserError as error:
        return {"note": str(error)}
    found = []
    for number, picture in enumerate(pictures):
        for box in pixel_boxes(picture):
            found.append({"picture": number, "box": box})
    for region, weight in zip(found, weights, strict=True):
        region["weight"] = round(weight, 5)
    return {"regions": found}


# ---- samples -----------------------------------------------------------------------------------------------------------


def make_samples(run, task):
    """([sample for the page], [its pictures' regions]) of held-out examples. If the checkpoint's data set cannot be
    read, both lists are empty, and a warning says why."""
    try:
        dataset, files = predict.held_out(run, task, None, SAMPLES)
    except UserError as error:
        data.warn(f"the page has no samples: {error}")
        return [], []
    answers = predict.predict(run, task, dataset, np.arange(len(dataset)), 1)
    samples = []
    found = []
    for i, answer in enumerate(answers):
        sample = {"text": drawing.text_of(task, dataset, i), "truth": answer.get("truth")}
        rows = dataset.rows_of([i])
        texts = [dataset.text[row] for row in rows]
        if isinstance(texts[0], tuple):  # (question, choice) or (question, answer, reason), a row for each choice
            sample["text"] = texts[0][0]
            sample["choices"] = [text[-1] for text in texts]
            if len(texts[0]) > 2:
                sample["answer"] = texts[0][1]
        pictures = dataset.image[rows].tolist()[: task.pictures]
        parts = [stored_regions(dataset.store, row) for row in pictures]
        sample["pictures"] = [sample_picture(dataset.store, row, files.get(row)) for row in pictures]
        sample["boxes"] = [pixel_boxes(part) for part in parts]
        sample["sizes"] = [part["size"] for part in parts]
        samples.append(sample)
        found.append(parts)
    return samples, found


def stored_regions(store, row):
    """The regions of a store's row as examples.make_dataset takes them."""
    fields = {name: values[0].numpy() for name, values in store.gather([row], fields=()).items()}
    fields["size"] = (1.0, 1.0) if store.sizes is None else tuple(store.sizes[row].tolist())
    return fields


def sample_picture(store, row, file):
    """A picture as the address of an <img>. Without a file it is pasted together from its regions."""
    if file:
        picture = regions.open_picture("the sample", file)
        picture.thumbnail((SAMPLE_SIDE, SAMPLE_SIDE))
    else:
        picture, _ = drawing.paste_regions(store, row, SAMPLE_SIDE)
        if store.sizes is not None:
            size = store.sizes[row] * (SAMPLE_SIDE / store.sizes[row].max())
            picture = picture.resize(size.round().astype(int).clip(1).tolist())
    content = io.BytesIO()
    picture.save(content, "PNG")
    return "data:image/png;base64," + base64.b64encode(content.getvalue()).decode()
