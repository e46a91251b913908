"""serve.py: a small server for one checkpoint, behind `predict.py CKPT --serve [PORT]`. Standard library, 127.0.0.1 only.

    GET /           one page: choose a sample or a picture, draw boxes, type, see the answers as bars
    GET /samples    what the page needs to know: the task, limits, and a few held-out examples
    GET /healthz    {"status": "ok", "requests": .., "batches": ..}
    POST /predict   a question -> the answer, a dict, see support/evaluation.py and `questions.find_warning`

A question is JSON or a form (multipart/form-data), with these keys:

    images      pictures, as many as the task has; in JSON in base64, in a form as files, each named `image`
    boxes       for each picture its regions, a list of [x1,y1,x2,y2] in pixels; without them they are cut as in training
    text, choices, answer       as the options of predict.py
    sample      the number of a sample, in place of `images`
    attention   true: the answer also has `regions`, each with its share of the attention, see support/attention.py

Every request has a thread of its own, which reads the picture. One thread runs the model: requests that came while it
worked are answered together in its next forward pass. Whatever is wrong with a request is a 4xx or 5xx status and
{"error": "..."}. Pages of other sites are refused.
"""

import contextlib
import io
import json
import os
import queue
import socket
import threading
import time
from concurrent.futures import TimeoutError as FutureTimeout
from http.client import HTTPException
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np

import predict
from common import UserError
from support import examples, machine, questions
from support.questions import HttpError

MAX_HEAD = 2**17  # bytes of the first line and the headers of a request
SMALL_BODY = 2**18  # bytes; of larger bodies only LARGE_BODIES are in memory at the same time
LARGE_BODIES = 2
MAX_CONNECTIONS = 128  # open at the same time
MAX_QUEUE = 256  # requests that wait for the model
MAX_BATCH = 64  # requests in one forward pass
READ_SECONDS = 10  # for a client to send its request
ANSWER_SECONDS = 30  # for an answer
LINGER_SECONDS = 1  # how long an answered connection stays open, so that the client can read the answer
PAGE = Path(__file__).parent / "support" / "serve.html"
LOCAL = ("127.0.0.1", "localhost")
HEADERS = {  # of every answer: the page uses nothing from elsewhere, and no other site may use anything from here
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src data: blob:; connect-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
    "Connection": "close",
}


# ---- the model's thread ------------------------------------------------------------------------------------------------


class Batcher:
    """Answers questions, those that wait together in one forward pass."""

    def __init__(self, run, task, top):
        self.run = run
        self.task = task
        self.top = top
        self.requests = 0  # answered so far; only the model's thread changes this number and the next
        self.batches = 0
        self.waiting = queue.Queue(MAX_QUEUE)  # of questions.Job; None ends the thread
        self.thread = threading.Thread(target=self.work, daemon=True)
        self.thread.start()

    def ask(self, job):
        """The answer to one question. HttpError if there is none in time."""
        try:
            self.waiting.put_nowait(job)
        except queue.Full:
            raise HttpError(503, "too many requests are waiting; try again in a moment") from None
        try:
            return job.future.result(ANSWER_SECONDS)
        except FutureTimeout:
            job.future.cancel()
            raise HttpError(504, f"no answer within {ANSWER_SECONDS} s; try again in a moment") from None

    def work(self):
        """The thread: takes all questions that wait, at most MAX_BATCH, and answers them."""
        while True:
            jobs = [self.waiting.get()]
            while len(jobs) < MAX_BATCH and not self.waiting.empty():
                jobs.append(self.waiting.get())
            groups = {}  # number of choices -> jobs; a batch has equally many
            for job in jobs:
                if job is None:
                    return
                if job.future.set_running_or_notify_cancel():
                    groups.setdefault(len(job.record["choices"] or ()), []).append(job)
            for group in groups.values():
                self.answer(group)

    def answer(self, jobs):
        """Answers jobs with one forward pass; if it fails, one by one, so that a question cannot spoil another's answer."""
        self.batches += 1
        try:
            dataset = examples.make_dataset(self.run, self.task, [(job.record, job.pictures) for job in jobs])
            answers = predict.predict(self.run, self.task, dataset, np.arange(len(jobs)), self.top)
            for i, (job, answer) in enumerate(zip(jobs, answers, strict=True)):
                answer |= questions.find_warning(self.run, dataset, i, job.pictures)
                if job.attention:
                    answer |= questions.weigh_regions(self.run, self.task, dataset, i, job.pictures)
        except Exception as error:  # noqa: BLE001 (the thread must go on, whatever happened)
            if len(jobs) == 1:
                jobs[0].future.set_exception(error)
                return
            for job in jobs:
                self.answer([job])
            return
        for job, answer in zip(jobs, answers, strict=True):
            self.requests += 1
            job.future.set_result(answer)

    def close(self):
        self.waiting.put(None)
        self.thread.join(ANSWER_SECONDS)


# ---- HTTP --------------------------------------------------------------------------------------------------------------


class SocketReader(io.RawIOBase):
    """Reads from a socket until about `left` bytes have come or the deadline has passed."""

    def __init__(self, connection):
        self.connection = connection

    def expect(self, size, seconds):
        self.left = size
        self.deadline = time.monotonic() + seconds

    def readable(self):
        return True

    def readinto(self, buffer):
        if self.left <= 0:
            raise HTTPException(f"the headers have more than {MAX_HEAD:,} bytes")
        self.connection.settimeout(max(0.001, self.deadline - time.monotonic()))
        count = self.connection.recv_into(buffer)
        self.left -= count
        return count


def as_json(value):
    """(type, bytes) of a JSON answer."""
    return "application/json", json.dumps(value).encode()


class Handler(BaseHTTPRequestHandler):
    """One request; the connection is closed after it."""

    protocol_version = "HTTP/1.1"  # answers "Expect: 100-continue", which curl sends before a large body
    timeout = READ_SECONDS

    def setup(self):
        super().setup()
        self.reader = SocketReader(self.connection)
        self.reader.expect(MAX_HEAD, self.timeout)
        self.rfile = io.BufferedReader(self.reader)

    def do_GET(self):
        self.reply(self.get)

    def do_POST(self):
        self.reply(self.post)

    def reply(self, route):
        """Sends what `route` returns, or the status and message of its HttpError."""
        self.close_connection = True
        try:
            self.check_site()
            self.send(200, *route())
        except HttpError as error:
            self.send_error(error.status, str(error))
        except (ConnectionError, TimeoutError):
            pass  # the client has gone
        except Exception as error:  # noqa: BLE001 (a fault of ours must not end the server)
            print("serve:", repr(error), flush=True)
            self.send_error(500, "the server failed on this request")

    def check_site(self):
        """HttpError 403 for a request that a page of another site makes the browser send: its Origin is that site, or
        its Host is a name that the site lets point to this machine (DNS rebinding)."""
        host = self.headers.get("Host", LOCAL[0])
        origin = self.headers.get("Origin", f"http://{host}")
        if host.partition(":")[0].lower() not in LOCAL or origin != f"http://{host}":
            raise HttpError(403, "this server answers its own page and programs on this machine, under 127.0.0.1")

    def get(self):
        path = self.path.partition("?")[0]
        if path == "/":
            return "text/html; charset=utf-8", PAGE.read_bytes()
        if path == "/samples":
            return as_json(self.server.description)
        if path == "/healthz":
            batcher = self.server.batcher
            return as_json({"status": "ok", "requests": batcher.requests, "batches": batcher.batches})
        if path == "/predict":
            raise HttpError(405, "use POST")
        raise HttpError(404, "there are /, /samples, /healthz and POST /predict")

    def post(self):
        if self.path.partition("?")[0] != "/predict":
            raise HttpError(404, "only /predict takes POST")
        length = questions.body_length(self.headers)
        return as_json(self.server.batcher.ask(self.read_question(length)))

    def read_question(self, length):
        """The questions.Job of the body."""
        slot = contextlib.nullcontext()
        if length > SMALL_BODY:
            slot = questions.wait_for(self.server.large_bodies)
        with slot:
            self.reader.expect(length, self.timeout)
            return questions.make_job(self.server, self.read_request(length))

    def read_request(self, length):
        """The body as a dict. HttpError if it is too slow, cut off, or neither JSON nor a form."""
        try:
            body = self.rfile.read(length)
        except TimeoutError:
            raise HttpError(408, "the body did not come in time") from None
        if len(body) < length:
            raise HttpError(400, "the body is shorter than Content-Length says")
        if self.headers.get_content_type() == "multipart/form-data":
            return questions.parse_form(body, self.headers.get_boundary(""))
        return questions.parse_json(body)

    def send(self, status, kind, content):
        self.connection.settimeout(self.timeout)
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(content)), **HEADERS}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def send_error(self, code, message=None, explain=None):
        """http.server's own errors come here too, as 431 for headers that are too long."""
        try:
            self.send(int(code), *as_json({"error": message or explain or "bad request"}))
        except (OSError, ValueError):
            pass  # the client has gone

    def log_message(self, format, *arguments):
        pass  # one line for each request would hide what matters


# ---- the server --------------------------------------------------------------------------------------------------------


class Server(ThreadingHTTPServer):
    """The HTTP server and what its threads share."""

    request_queue_size = 128  # connections that the system keeps until they are accepted
    daemon_threads = False  # so that server_close waits for the requests in progress

    def __init__(self, port, run, task, top):
        try:
            super().__init__(("127.0.0.1", port), Handler)
        except (OSError, OverflowError) as error:
            raise UserError(f"--serve {port}: this port cannot be used ({error}); give another one") from None
        self.run = run
        self.task = task
        self.network = examples.load_network(run)
        self.samples, self.sample_regions = questions.make_samples(run, task)  # last: it takes the longest
        self.connections = threading.BoundedSemaphore(MAX_CONNECTIONS)
        self.large_bodies = threading.BoundedSemaphore(LARGE_BODIES)
        self.large_pictures = threading.BoundedSemaphore(1)  # in memory at the same time
        self.small_pictures = threading.BoundedSemaphore(os.cpu_count() or 1)
        self.batcher = Batcher(run, task, top)
        self.description = {
            "model": run.args.model,
            "task": task.name,
            "pictures": task.pictures,
            "choices": "choices" in task.needs,
            "text": task.truth != "text",
            "boxes": run.regions.get("boxes") == "given",  # trained on boxes of things
            "most_bytes": questions.MAX_BODY,
            "most_pixels": questions.MAX_PIXELS,
            "samples": self.samples,
        }

    def process_request(self, request, client_address):
        if self.connections.acquire(blocking=False):
            try:
                super().process_request(request, client_address)
            except RuntimeError:  # no thread could be started, so none gives the slot back
                self.connections.release()
                raise
            return
        _, body = as_json({"error": "too many connections; try again in a moment"})
        head = f"HTTP/1.1 503 Busy\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        with contextlib.suppress(OSError):
            request.settimeout(0.1)
            request.sendall(head.encode() + body)
            request.recv(65536)  # closing with unread bytes would reset the connection before the client has the answer
        self.close_request(request)

    def process_request_thread(self, request, client_address):
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.connections.release()

    def shutdown_request(self, request):
        """Closes a connection once the client has read the answer: unread bytes would reset it before (RFC 9112, 9.6)."""
        with contextlib.suppress(OSError):
            request.shutdown(socket.SHUT_WR)
            end = time.monotonic() + LINGER_SECONDS
            while time.monotonic() < end:
                request.settimeout(LINGER_SECONDS)
                if not request.recv(65536):
                    break
        self.close_request(request)

    def handle_error(self, request, client_address):
        pass  # a client that closed its connection; faults of ours are answered with 500

    def close(self):
        """Waits for the requests in progress, then ends the model's thread."""
        self.server_close()
        self.batcher.close()


def serve(run, task, args):
    """Serves until SIGTERM or Ctrl-C."""
    machine.give_back_freed_memory()
    server = Server(args.serve, run, task, args.top)
    with machine.interruptible() as interrupted:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.1})
        thread.start()
        print(f"serving {run.args.model} {task.name} on http://127.0.0.1:{server.server_port}", flush=True)
        while not interrupted():
            time.sleep(0.1)
        server.shutdown()
        thread.join()
        server.close()
    print(f"stopped after {server.batcher.requests} requests in {server.batcher.batches} batches", flush=True)
