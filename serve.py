"""serve.py: a small server for one checkpoint, behind `predict.py CKPT --serve [PORT]`. Standard library, 127.0.0.1 only.

    GET /           one page: choose a sample or drop a picture, type, see the answers as bars
    GET /samples    what the page shows at first: the task and a few held-out examples
    GET /healthz    {"status": "ok", "requests": .., "batches": ..}
    POST /predict   {"images": [base64, ...], "text": "..."} -> the answer, a dict, see evaluation.py

Further keys of a request: `boxes` (a list of [x1,y1,x2,y2] in pixels for each picture), `choices` and `answer` as the
options of predict.py, `sample` (the number of a sample, in place of `images`).

Every request has a thread of its own, which reads the picture. One thread runs the model: requests that came while it
worked are answered together in its next forward pass. Whatever is wrong with a request is a 4xx or 5xx status and
{"error": "..."}.
"""

import base64
import binascii
import io
import json
import os
import queue
import tempfile
import threading
import time
import warnings
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
from PIL import Image

import drawing
import machine
import predict
import records
from common import UserError

MAX_BODY = 8 * 2**20  # bytes of a request
MAX_PIXELS = 20_000_000  # of one picture
MAX_TEXT = 2000  # characters of a text
MAX_LIST = 100  # boxes of a picture, choices
MAX_CONNECTIONS = 128  # open at the same time
MAX_QUEUE = 256  # requests that wait for the model
MAX_BATCH = 64  # requests in one forward pass
READ_SECONDS = 10  # for a client to send its request
ANSWER_SECONDS = 30  # for an answer
SAMPLES = 6
PAGE = Path(__file__).with_name("serve.html")


class HttpError(Exception):
    """A status other than 200, and what to tell the client."""

    def __init__(self, status, message):
        super().__init__(message)
        self.status = status


# ---- the model's thread ------------------------------------------------------------------------------------------------


class Batcher:
    """Answers questions, those that wait together in one forward pass."""

    def __init__(self, run, task, top):
        self.run = run
        self.task = task
        self.top = top
        self.waiting = queue.Queue(MAX_QUEUE)  # of (question, Future); None ends the thread
        self.batches = 0
        self.thread = threading.Thread(target=self.work, daemon=True)
        self.thread.start()

    def ask(self, record, pictures):
        """The answer to one question, see predict.make_dataset. HttpError if there is none in time."""
        future = Future()
        try:
            self.waiting.put_nowait(((record, pictures), future))
        except queue.Full:
            raise HttpError(503, "too many requests are waiting; try again in a moment") from None
        try:
            return future.result(ANSWER_SECONDS)
        except FutureTimeout:
            future.cancel()
            raise HttpError(504, f"no answer within {ANSWER_SECONDS} s; try again in a moment") from None

    def work(self):
        """The thread: takes all that wait, at most MAX_BATCH, and answers them."""
        job = self.waiting.get()
        while job is not None:
            groups = {}  # number of choices -> jobs; a batch has equally many
            taken = 0
            while job is not None:
                (record, _), future = job
                if future.set_running_or_notify_cancel():
                    groups.setdefault(len(record["choices"] or ()), []).append(job)
                taken += 1
                if taken == MAX_BATCH or self.waiting.empty():
                    break
                job = self.waiting.get()
            for group in groups.values():
                self.answer(group)
            if job is not None:
                job = self.waiting.get()

    def answer(self, jobs):
        """Answers jobs with one forward pass."""
        self.batches += 1
        try:
            dataset = predict.make_dataset(self.run, self.task, [question for question, _ in jobs])
            answers = predict.predict(self.run, self.task, dataset, np.arange(len(jobs)), self.top)
            assert len(answers) == len(jobs)
        except Exception as error:  # noqa: BLE001 (the thread must go on, whatever happened)
            for _, future in jobs:
                future.set_exception(error)
            return
        for (_, future), answer in zip(jobs, answers, strict=True):
            future.set_result(answer)

    def close(self):
        self.waiting.put(None)
        self.thread.join(ANSWER_SECONDS)


# ---- requests ----------------------------------------------------------------------------------------------------------


def check_request(request, task):
    """A request's record, as predict.make_dataset takes it. HttpError 400 where a key has a wrong value."""
    if not isinstance(request, dict):
        raise HttpError(400, 'send an object: {"images": [base64], "text": "..."}')
    for key in ("text", "answer"):
        value = request.get(key) or ""
        if not isinstance(value, str) or len(value) > MAX_TEXT or "\0" in value:
            raise HttpError(400, f"{key!r} must be a string of at most {MAX_TEXT} characters")
        try:
            value.encode()
        except UnicodeEncodeError:
            raise HttpError(400, f"{key!r} holds half a character") from None
    choices = request.get("choices")
    if choices is not None:
        right = records.is_texts(choices, 2) and len(choices) <= MAX_LIST and max(map(len, choices)) <= MAX_TEXT
        if not right:
            raise HttpError(400, f"'choices' must be 2 to {MAX_LIST} strings")
    record = {"text": request.get("text") or "", "choices": choices, "answer": request.get("answer")}
    try:
        predict.make_example(task, record)
    except UserError as error:
        raise HttpError(400, str(error)) from None
    return record


def decode_picture(text):
    """The bytes of a picture in base64, with or without "data:image/png;base64,". HttpError if it is none, or too large."""
    if not isinstance(text, str):
        raise HttpError(400, "'images' must be strings in base64")
    try:
        content = base64.b64decode(text.rpartition(",")[2], validate=True)
    except (binascii.Error, ValueError):
        raise HttpError(400, "'images' must be in base64") from None
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(content)) as image:
            width, height = image.size
    except Image.DecompressionBombError:
        raise HttpError(413, f"too large a picture; send one of at most {MAX_PIXELS:,} pixels") from None
    except Exception:  # noqa: BLE001 (damaged pictures end in nearly every kind of error)
        raise HttpError(400, "this is no picture that can be read; send a PNG or JPEG file") from None
    if width * height > MAX_PIXELS:
        raise HttpError(413, f"a picture of {width} x {height} pixels; send one of at most {MAX_PIXELS:,} pixels")
    return content


def picture_regions(server, content, boxes):
    """The regions of a picture, bytes. HttpError 400 for what cannot be read and for wrong boxes."""
    if boxes is not None and (not records.is_boxes(boxes) or len(boxes) > MAX_LIST):
        raise HttpError(400, f"'boxes' must be 1 to {MAX_LIST} lists [x1,y1,x2,y2] for each picture")
    with server.decoding, tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "picture"
        path.write_bytes(content)
        try:
            return predict.make_regions(server.run, "the request", path, boxes, server.network)
        except UserError as error:
            raise HttpError(400, str(error).replace(str(path), "the picture")) from None


def pictures_of(server, request):
    """The regions of a request's pictures: those of a sample, or of the pictures that it holds."""
    sample = request.get("sample")
    if sample is not None:
        if type(sample) is not int or not 0 <= sample < len(server.samples):
            raise HttpError(400, f"'sample' must be 0 to {len(server.samples) - 1}")
        return server.sample_regions[sample]
    images = request.get("images")
    wanted = server.task.pictures
    if not isinstance(images, list) or len(images) != wanted:
        raise HttpError(400, f"'images' must be a list of {wanted} picture{'s' if wanted > 1 else ''} in base64")
    boxes = request.get("boxes")
    if boxes is None:
        boxes = [None] * wanted
    if not isinstance(boxes, list) or len(boxes) != wanted:
        raise HttpError(400, "'boxes' must be a list with the boxes of each picture")
    contents = [decode_picture(text) for text in images]
    return [picture_regions(server, content, own) for content, own in zip(contents, boxes, strict=True)]


class Handler(BaseHTTPRequestHandler):
    """One request."""

    timeout = READ_SECONDS  # of every read from the socket

    def do_GET(self):
        if self.path == "/":
            self.send(200, "text/html; charset=utf-8", PAGE.read_bytes())
        elif self.path == "/samples":
            self.send_json(200, self.server.description)
        elif self.path == "/healthz":
            counts = {"requests": self.server.requests, "batches": self.server.batcher.batches}
            self.send_json(200, {"status": "ok", **counts})
        elif self.path == "/predict":
            self.send_error(405, "use POST")
        else:
            self.send_error(404, "there are /, /samples, /healthz and POST /predict")

    def do_POST(self):
        if self.path != "/predict":
            self.send_error(404, "only /predict takes POST")
            return
        try:
            request = self.read_request()
            record = check_request(request, self.server.task)
            pictures = pictures_of(self.server, request)
            answer = self.server.batcher.ask(record, pictures)
            self.server.requests += 1
            self.send_json(200, answer)
        except HttpError as error:
            self.send_error(error.status, str(error))
        except (ConnectionError, TimeoutError):
            self.close_connection = True  # the client has gone
        except Exception as error:  # noqa: BLE001 (a fault of ours must not end the server)
            self.log_error("%s", repr(error))
            self.send_error(500, "the server failed on this request")

    def read_request(self):
        """The JSON of the body. HttpError if it is too long, too slow or no JSON."""
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdigit()):
            raise HttpError(411, "the header Content-Length is missing")
        if len(length) > 12 or int(length) > MAX_BODY:
            raise HttpError(413, f"a body of {length[:12]} bytes; send at most {MAX_BODY:,}")
        deadline = time.monotonic() + READ_SECONDS
        body = bytearray()
        while len(body) < int(length):
            try:
                part = self.rfile.read1(min(65536, int(length) - len(body)))
            except TimeoutError:
                raise HttpError(408, "the body did not come in time") from None
            if not part:
                raise HttpError(400, "the body is shorter than Content-Length says")
            if time.monotonic() > deadline:
                raise HttpError(408, "the body did not come in time")
            body += part
        try:
            return json.loads(body)
        except (ValueError, RecursionError):
            raise HttpError(400, 'not JSON; send {"images": [base64], "text": "..."}') from None

    def send(self, status, kind, content):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def send_json(self, status, value):
        self.send(status, "application/json", json.dumps(value).encode())

    def send_error(self, code, message=None, explain=None):
        """http.server's own errors come here too, as 431 for headers that are too long."""
        self.close_connection = True
        try:
            self.send_json(int(code), {"error": message or explain or "bad request"})
        except (OSError, ValueError):
            pass  # the client has gone

    def log_message(self, format, *arguments):
        pass  # one line for each request would hide what matters

    def log_error(self, format, *arguments):
        if "timed out" not in format:
            print("serve:", format % arguments, flush=True)


class Server(ThreadingHTTPServer):
    """The HTTP server and what its threads share."""

    request_queue_size = 128  # connections that the system keeps until they are accepted
    daemon_threads = False  # so that server_close waits for the requests in progress

    def __init__(self, port, run, task, top, samples):
        super().__init__(("127.0.0.1", port), Handler)
        self.run = run
        self.task = task
        self.network = predict.load_network(run)
        self.samples, self.sample_regions = samples
        self.requests = 0
        self.connections = threading.BoundedSemaphore(MAX_CONNECTIONS)
        self.decoding = threading.BoundedSemaphore(os.cpu_count() or 1)  # pictures in memory at the same time
        self.batcher = Batcher(run, task, top)
        self.description = {"model": run.args.model, "task": task.name, "pictures": task.pictures,
                            "choices": "choices" in task.needs, "text": task.truth != "text",
                            "samples": self.samples}  # fmt: skip

    def process_request(self, request, client_address):
        if not self.connections.acquire(blocking=False):
            body = b'{"error": "too many connections; try again in a moment"}'
            head = f"HTTP/1.0 503 Busy\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
            try:
                request.settimeout(1)
                request.sendall(head.encode() + body)
            except OSError:
                pass
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request, client_address):
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.connections.release()

    def handle_error(self, request, client_address):
        pass  # a client that closed its connection; faults of ours are answered with 500

    def close(self):
        """Waits for the requests in progress, then ends the model's thread."""
        self.server_close()
        self.batcher.close()


# ---- samples and start -------------------------------------------------------------------------------------------------


def make_samples(run, task):
    """Held-out examples for the page, and their regions; none if the data set of the checkpoint is gone."""
    try:
        dataset, files = predict.held_out(run, task, None, SAMPLES)
    except UserError:
        return [], []
    samples = []
    found = []
    for i in range(len(dataset)):
        texts = [dataset.text[row] for row in dataset.rows([i])]
        rows = dataset.image[dataset.rows([i])].tolist()[: task.pictures]
        sample = {"text": drawing.text_of(task, dataset, i), "pictures": [], "sizes": []}
        if isinstance(texts[0], tuple):
            sample["text"] = texts[0][0]
            sample["choices"] = [text[-1] for text in texts]
            if len(texts[0]) > 2:
                sample["answer"] = texts[0][1]
        parts = []
        for row in rows:
            fields = {name: values[0].numpy() for name, values in dataset.store.gather([row]).items()}
            fields["size"] = (1.0, 1.0) if dataset.store.sizes is None else tuple(dataset.store.sizes[row].tolist())
            picture = drawing.draw_regions(dataset.store, row, files.get(row), {}, 240)
            content = io.BytesIO()
            picture.save(content, "PNG")
            sample["pictures"].append("data:image/png;base64," + base64.b64encode(content.getvalue()).decode())
            sample["sizes"].append(fields["size"])
            parts.append(fields)
        samples.append(sample)
        found.append(parts)
    return samples, found


def serve(run, task, args):
    """Serves until SIGTERM or Ctrl-C."""
    samples = make_samples(run, task)
    try:
        server = Server(args.serve, run, task, args.top, samples)
    except (OSError, OverflowError) as error:
        raise UserError(f"--serve {args.serve}: this port cannot be used ({error}); give another one") from None
    with machine.interruptible() as interrupted:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.1})
        thread.start()
        print(f"serving {run.args.model} {task.name} on http://127.0.0.1:{server.server_port}", flush=True)
        while not interrupted():
            time.sleep(0.1)
        server.shutdown()
        thread.join()
        server.close()
    print(f"stopped after {server.requests} requests in {server.batcher.batches} batches", flush=True)
