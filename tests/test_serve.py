"""Tests of serve.py: a server on a free port, asked as a browser and as a hostile client ask."""

import base64
import http.client
import io
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import predict
import questions
import serve
import train
from prepare import scenes

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory, small_scenes):
    """checkpoints(task): best.pt of a run of one step, made on first use."""
    folder = tmp_path_factory.mktemp("serve")

    def checkpoint(task):
        out = folder / task
        if not out.exists():
            command = ["--task", task, "--data", str(small_scenes(20)), "--out", str(out), "--steps", "1"]
            assert train.main([*command, "--batch-size", "8", "--device", "cpu", "--dtype", "f32"]) == 0
        return out / "best.pt"

    return checkpoint


@pytest.fixture
def start(checkpoints):
    """start(task): a running server; it is closed at the end of the test."""
    servers = []

    def run_server(task):
        args = predict.parse([str(checkpoints(task)), "--serve", "0", "--device", "cpu", "--dtype", "f32"])
        run, row = predict.load_run(args)
        server = serve.Server(0, run, row, 3, questions.make_samples(run, row))
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        servers.append(server)
        return server

    yield run_server
    for server in servers:
        server.shutdown()
        server.close()


def request(server, method, path, body=None, headers=None):
    """(status, JSON or text of the answer)"""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=30)
    if isinstance(body, dict | list):
        body = json.dumps(body)
    connection.request(method, path, body, headers or {})
    reply = connection.getresponse()
    content = reply.read()
    connection.close()
    if reply.getheader("Content-Type") == "application/json":
        content = json.loads(content)
    return reply.status, content


def png(picture):
    content = io.BytesIO()
    picture.save(content, "PNG")
    return base64.b64encode(content.getvalue()).decode()


@pytest.fixture(scope="module")
def scene():
    return png(scenes.draw_scene(scenes.make_scene(0, "test", 0)))


def test_the_page_the_samples_and_the_health(start):
    server = start("vqa")
    status, page = request(server, "GET", "/")
    assert status == 200 and b"<!doctype html>" in page and b"fetch" in page
    status, description = request(server, "GET", "/samples")
    assert status == 200 and description["task"] == "vqa" and len(description["samples"]) == questions.SAMPLES
    for sample in description["samples"]:
        content = base64.b64decode(sample["pictures"][0].partition(",")[2])
        assert Image.open(io.BytesIO(content)).width == questions.SAMPLE_SIDE and sample["text"].endswith("?")
    assert request(server, "GET", "/healthz") == (200, {"status": "ok", "requests": 0, "batches": 0})


@pytest.mark.parametrize("task", ["vqa", "ve", "nlvr2", "vcr", "retrieval", "refer", "caption", "pretrain"])
def test_a_sample_is_answered_as_predict_answers_it(task, start):
    server = start(task)
    dataset, _ = predict.held_out(server.run, server.task, None, questions.SAMPLES)
    expected = predict.predict(server.run, server.task, dataset, np.arange(len(dataset)), 3)
    _, description = request(server, "GET", "/samples")
    for number, sample in enumerate(description["samples"]):
        question = {key: sample[key] for key in ("text", "choices", "answer") if key in sample}
        status, answer = request(server, "POST", "/predict", {"sample": number, **question})
        assert status == 200
        if task == "pretrain":  # which word is masked depends on the number of the example
            assert abs(answer["match"] - expected[number]["match"]) < 1e-4
            continue
        for key in answer:
            if key == "answers":
                for (name, p), (expected_name, expected_p) in zip(answer[key], expected[number][key], strict=True):
                    assert abs(p - expected_p) < 1e-4 and (name == expected_name or task != "refer")
            elif key == "match":
                assert abs(answer[key] - expected[number][key]) < 1e-4
            elif key == "caption":
                assert answer[key] == expected[number][key]


def test_pictures_of_a_request_are_answered_as_files_are(start, scene, tmp_path, capsys, checkpoints):
    server = start("vqa")
    (tmp_path / "a.png").write_bytes(base64.b64decode(scene))
    boxes = [[0, 0, 40, 40], [30, 30, 90, 90]]
    command = [str(checkpoints("vqa")), "--image", str(tmp_path / "a.png"), "--text", "what is it?"]
    command += ["--boxes", json.dumps(boxes), "--device", "cpu", "--dtype", "f32"]
    capsys.readouterr()
    assert predict.main(command) == 0
    question = {"images": [f"data:image/png;base64,{scene}"], "boxes": [boxes], "text": "what is it?"}
    status, answer = request(server, "POST", "/predict", question)
    assert status == 200 and predict.describe(answer) + "\n" == capsys.readouterr().out


def test_requests_that_come_together_are_answered_together(start, scene, monkeypatch):
    server = start("vqa")
    held = threading.Event()
    before = predict.predict
    sizes = []

    def slow(run, task, dataset, index, top):
        sizes.append(len(index))
        held.wait(20)
        return before(run, task, dataset, index, top)

    monkeypatch.setattr(predict, "predict", slow)
    question = {"images": [scene], "text": "what is it?"}
    with ThreadPoolExecutor(20) as pool:
        replies = [pool.submit(request, server, "POST", "/predict", question) for _ in range(20)]
        deadline = time.monotonic() + 20
        while sum(sizes) + server.batcher.waiting.qsize() < 20 and time.monotonic() < deadline:
            time.sleep(0.01)
        held.set()
        answers = [reply.result() for reply in replies]
    assert len(sizes) == 2 and sum(sizes) == 20
    for status, answer in answers:
        assert status == 200
        for (name, p), (other, q) in zip(answer["answers"], answers[0][1]["answers"], strict=True):
            assert abs(p - q) < 1e-4, (name, other)


def bomb():
    """A PNG of a few bytes that says it has 65535 x 65535 pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 65535, 65535, 1, 0, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    content += struct.pack(">I", 9) + b"IDAT" + bytes(9 + 4)
    return base64.b64encode(content).decode()


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "message"),
    [
        ("GET", "/none", None, 404, "there are"),
        ("GET", "/../../etc/passwd", None, 404, "there are"),
        ("GET", "/predict", None, 405, "POST"),
        ("POST", "/", {}, 404, "/predict"),
        ("PUT", "/predict", {}, 501, "PUT"),
        ("POST", "/predict", "no JSON", 400, "not JSON"),
        ("POST", "/predict", "[" * 15_000, 400, "not JSON"),
        ("POST", "/predict", "[" * 100_000, 400, "too many values"),
        ("POST", "/predict", [], 400, "object"),
        ("POST", "/predict", {}, 400, "text"),
        ("POST", "/predict", {"text": 3}, 400, "'text'"),
        ("POST", "/predict", {"text": "x" * 2001}, 400, "'text'"),
        ("POST", "/predict", {"text": "x\0y"}, 400, "'text'"),
        ("POST", "/predict", '{"text": "\\ud83d"}', 400, "half a character"),
        ("POST", "/predict", {"text": "x"}, 400, "'images'"),
        ("POST", "/predict", {"text": "x", "images": ["AA", "AA"]}, 400, "1 picture"),
        ("POST", "/predict", {"text": "x", "images": [3]}, 400, "base64"),
        ("POST", "/predict", {"text": "x", "images": ["%%%"]}, 400, "base64"),
        ("POST", "/predict", {"text": "x", "images": ["AAAA"]}, 400, "no picture"),
        ("POST", "/predict", {"text": "x", "images": [bomb()]}, 413, "pixels"),
        ("POST", "/predict", {"text": "x", "images": ["PICTURE"], "boxes": [[[1, 2, 3, 999]]]}, 400, "outside"),
        ("POST", "/predict", {"text": "x", "images": ["PICTURE"], "boxes": [[1]]}, 400, "'boxes'"),
        ("POST", "/predict", {"text": "x", "images": ["PICTURE"], "boxes": 3}, 400, "'boxes'"),
        ("POST", "/predict", {"text": "x", "choices": ["a"]}, 400, "'choices'"),
        ("POST", "/predict", {"text": "x", "sample": 99}, 400, "'sample'"),
        ("POST", "/predict", {"text": "x", "sample": True}, 400, "'sample'"),
    ],
)  # fmt: skip
def test_a_wrong_request_gets_a_status_and_a_message(method, path, body, status, message, start, scene):
    server = start("vqa")
    text = json.dumps(body) if not isinstance(body, str) else body
    found, answer = request(server, method, path, text.replace("PICTURE", scene))
    assert found == status and message in answer["error"], answer
    assert request(server, "GET", "/healthz")[0] == 200


def send_raw(server, content):
    """What the server answers to these bytes."""
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=10) as client:
        client.sendall(content)
        reply = b""
        while part := client.recv(65536):
            reply += part
    return reply


def test_lengths_and_headers_have_limits(start, monkeypatch):
    server = start("vqa")
    assert b" 411 " in send_raw(server, b"POST /predict HTTP/1.0\r\n\r\n")
    assert b" 413 " in send_raw(server, b"POST /predict HTTP/1.0\r\nContent-Length: 99999999\r\n\r\n")
    assert b" 413 " in send_raw(server, b"POST /predict HTTP/1.0\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\n")
    assert b" 411 " in send_raw(server, b"POST /predict HTTP/1.0\r\nContent-Length: -1\r\n\r\n")
    assert b" 431 " in send_raw(server, b"GET / HTTP/1.0\r\n" + b"A: b\r\n" * 200 + b"\r\n")
    monkeypatch.setattr(serve.Handler, "timeout", 0.3)
    reply = send_raw(server, b"POST /predict HTTP/1.0\r\nContent-Length: 100\r\n\r\n{")
    assert b" 408 " in reply and b'"error"' in reply
    assert request(server, "GET", "/healthz")[0] == 200


def test_closed_sockets_and_noise_leave_the_server_answering(start):
    server = start("vqa")
    rng = np.random.default_rng(0)
    for i in range(100):
        with socket.create_connection(("127.0.0.1", server.server_port), timeout=10) as client:
            if i % 2:
                client.sendall(b"POST /predict HTTP/1.0\r\nContent-Length: 500\r\n\r\n{")
            else:
                client.sendall(rng.bytes(200) + b"\r\n\r\n")
    status, answer = request(server, "POST", "/predict", {"sample": 0, "text": "what is it?"})
    assert status == 200 and len(answer["answers"]) == 3


def test_a_full_queue_and_a_late_answer_have_their_status(start, monkeypatch):
    server = start("vqa")
    held = threading.Event()
    monkeypatch.setattr(predict, "predict", lambda *arguments: held.wait(20) and [])
    monkeypatch.setattr(serve, "ANSWER_SECONDS", 1)
    server.batcher.waiting.maxsize = 2
    question = {"sample": 0, "text": "what is it?"}
    with ThreadPoolExecutor(12) as pool:
        replies = list(pool.map(lambda _: request(server, "POST", "/predict", question), range(12)))
    held.set()
    assert {status for status, _ in replies} == {503, 504}
    assert all("try again" in answer["error"] for _, answer in replies)


def test_too_many_connections_are_turned_away(start, monkeypatch):
    monkeypatch.setattr(serve, "MAX_CONNECTIONS", 3)
    server = start("vqa")
    idle = [socket.create_connection(("127.0.0.1", server.server_port)) for _ in range(3)]
    time.sleep(0.3)
    assert b" 503 " in send_raw(server, b"GET /healthz HTTP/1.0\r\n\r\n")
    for client in idle:
        client.close()
    time.sleep(0.3)
    assert request(server, "GET", "/healthz")[0] == 200


def test_a_fault_of_the_model_is_500_and_the_next_request_is_answered(start, monkeypatch, capsys):
    server = start("vqa")
    before = predict.predict
    monkeypatch.setattr(predict, "predict", lambda *arguments: 1 / 0)
    assert request(server, "POST", "/predict", {"sample": 0, "text": "what?"})[0] == 500
    monkeypatch.setattr(predict, "predict", before)
    assert request(server, "POST", "/predict", {"sample": 0, "text": "what?"})[0] == 200


def test_sigterm_ends_the_command_cleanly(checkpoints):
    command = [sys.executable, ROOT / "predict.py", checkpoints("vqa"), "--serve", "0", "--device", "cpu"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ})
    line = process.stdout.readline()
    assert line.startswith("serving uniter vqa on http://127.0.0.1:")
    process.send_signal(signal.SIGTERM)
    out, error = process.communicate(timeout=60)
    assert process.returncode == 0 and out == "stopped after 0 requests in 0 batches\n" and error == ""


def test_a_port_in_use_is_one_line_and_exit_code_2(checkpoints, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert predict.main([str(checkpoints("vqa")), "--serve", str(port), "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert f"--serve {port}" in error and error.count("\n") == 1
