"""Tests of serve.py: a server on a free port, asked as a browser and as a hostile client ask."""

import base64
import http.client
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import hostile
import numpy as np
import pytest
from PIL import Image

import predict
import serve
from common import UserError
from prepare import scenes
from support import questions

ROOT = Path(__file__).parent.parent


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


def test_a_photo_on_its_side_is_answered_as_it_is_shown(start):
    """With given boxes, and with the grid, which follows the turned picture too."""
    server = start("refer")
    upright = scenes.draw_scene(scenes.make_scene(0, "test", 0)).crop((0, 0, 96, 64))
    tag = Image.Exif()
    tag[0x0112] = 6
    photo = io.BytesIO()
    upright.transpose(Image.Transpose.ROTATE_90).save(photo, "PNG", exif=tag)
    pictures = [png(upright), base64.b64encode(photo.getvalue()).decode()]
    for boxes in ([[[0, 0, 40, 40], [60, 0, 96, 30]]], None):
        replies = []
        for picture in pictures:
            question = {"images": [picture], "boxes": boxes, "text": "red circle"}
            replies.append(request(server, "POST", "/predict", question))
        assert replies[0] == replies[1] and replies[0][0] == 200, replies
        assert max(box[2] for box, _ in replies[0][1]["answers"]) <= 96


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
    assert request(server, "GET", "/healthz")[1] == {"status": "ok", "requests": 20, "batches": 2}
    for status, answer in answers:
        assert status == 200
        for (name, p), (other, q) in zip(answer["answers"], answers[0][1]["answers"], strict=True):
            assert abs(p - q) < 1e-4, (name, other)


def form(parts):
    """(body, headers) of a form. parts: [(name, content)]"""
    body = b""
    for name, content in parts:
        body += (
            f'--a b\r\nContent-Disposition: form-data; name="{name}"; filename="x.png"\r\n\r\n'.encode()
            + content
            + b"\r\n"
        )
    return body + b"--a b--\r\n", {"Content-Type": 'multipart/form-data; boundary="a b"'}


def test_a_form_is_answered_as_json_is(start, scene):
    server = start("vqa")
    boxes = [[0, 0, 40, 40], [30, 30, 90, 90]]
    question = {"images": [scene], "boxes": [boxes], "text": "what is it?", "attention": True}
    picture = base64.b64decode(scene)
    parts = [
        ("image", picture),
        ("text", b"what is it?"),
        ("boxes", json.dumps(boxes).encode()),
        ("attention", b"true"),
    ]
    expected = request(server, "POST", "/predict", question)
    assert expected[0] == 200 and request(server, "POST", "/predict", *form(parts)) == expected
    assert [region["box"] for region in expected[1]["regions"]] == boxes
    status, answer = request(server, "POST", "/predict", *form([("sample", b"0"), ("text", b"what is it?")]))
    assert status == 200 and len(answer["answers"]) == 3 and "regions" not in answer


@pytest.mark.parametrize("content", [bytes(range(256)) * 3, b"\r\n--a\r\n--a  b", b"", b"\r\n", b"--a", b"\n\r\n\r"])
def test_the_files_of_a_form_are_kept_byte_for_byte(content):
    found = questions.parse_form(
        form([("image", content), ("text", "ä".encode()), ("choices", b"x"), ("choices", b"y")])[0], "a b"
    )
    assert found == {"images": [content], "text": "ä", "choices": ["x", "y"]}


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([("text", b"\xff")], "'text' is no text"),
        ([("boxes", b"[[1,")], "'boxes'"),
        ([("sample", b"1, 2")], "no JSON"),
        ([("text", b"x"), ("attention", b"1")], "'attention'"),
        ([("text", b"x"), ("image", b"x"), ("image", b"x")], "1 picture"),
        ([("text", b"x"), ("image", b"x")], "no picture"),
        ([("text", b"x")] * 101, "100 fields"),
    ],
)  # fmt: skip
def test_a_wrong_form_gets_a_message(parts, message, start):
    status, answer = request(start("vqa"), "POST", "/predict", *form(parts))
    assert status == 400 and message in answer["error"]


def test_a_turned_photograph_is_answered_as_the_file_is(start, tmp_path, capsys, checkpoints):
    picture = Image.effect_noise((40, 90), 60).convert("RGB")
    exif = picture.getexif()
    exif[0x0112] = 8
    picture.save(tmp_path / "a.jpg", exif=exif)
    server = start("vqa")
    question = {"text": "what is it?", "images": [base64.b64encode((tmp_path / "a.jpg").read_bytes()).decode()]}
    status, answer = request(server, "POST", "/predict", {**question, "boxes": [[[0, 0, 90, 40]]]})
    assert status == 200  # 90 pixels wide
    capsys.readouterr()
    command = [str(checkpoints("vqa")), "--image", str(tmp_path / "a.jpg"), "--text", "what is it?"]
    assert predict.main([*command, "--boxes", "[[0,0,90,40]]", "--device", "cpu", "--dtype", "f32"]) == 0
    assert predict.describe(answer) + "\n" == capsys.readouterr().out
    assert "outside" in request(server, "POST", "/predict", {**question, "boxes": [[[0, 0, 40, 90]]]})[1]["error"]


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Host": "localhost:9000"}, 200),  # through a tunnel
        ({"Host": "localhost:9000", "Origin": "http://localhost:9000"}, 200),
        ({"Host": "evil.test"}, 403),
        ({"Host": "127.0.0.1.evil.test"}, 403),
        ({"Origin": "http://evil.test"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://localhost:1"}, 403),
    ],
)
def test_pages_of_other_sites_are_refused(headers, status, start):
    server = start("vqa")
    assert request(server, "POST", "/predict", {"sample": 0, "text": "what is it?"}, headers)[0] == status
    assert request(server, "GET", "/samples", None, headers)[0] == status


def test_pages_and_formats(start):
    server = start("vqa")
    page = Image.effect_noise((30, 20), 60)
    for kind, more, status in (("TIFF", {}, 200), ("TIFF", {"save_all": True, "append_images": [page]}, 400),
                               ("GIF", {"save_all": True, "append_images": [page]}, 200), ("EPS", {}, 400)):  # fmt: skip
        content = io.BytesIO()
        page.save(content, kind, **more)
        question = {"text": "x", "images": [base64.b64encode(content.getvalue()).decode()]}
        assert request(server, "POST", "/predict", question)[0] == status, kind


def bomb(name):
    return base64.b64encode(hostile.bomb(name)).decode()


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
        ("POST", "/predict", {"text": "x", "images": [bomb("50,000 x 50,000")]}, 413, "too large"),
        ("POST", "/predict", {"text": "x", "images": [bomb("one row")]}, 413, "no side longer"),
        ("POST", "/predict", {"text": "x", "images": [bomb("comment")]}, 400, "no picture"),
        ("POST", "/predict", {"text": "x", "attention": 1}, 400, "'attention'"),
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
    assert b" 411 " in send_raw(
        server, b"POST /predict HTTP/1.1\r\nContent-Length: 9\r\nTransfer-Encoding: chunked\r\n\r\n"
    )
    assert b" 431 " in send_raw(server, b"GET / HTTP/1.0\r\n" + b"A: b\r\n" * 200 + b"\r\n")
    assert b" 431 " in send_raw(server, b"GET / HTTP/1.0\r\n" + (b"A: " + b"b" * 50_000 + b"\r\n") * 3 + b"\r\n")
    monkeypatch.setattr(serve.Handler, "timeout", 0.3)
    reply = send_raw(server, b"POST /predict HTTP/1.0\r\nContent-Length: 100\r\n\r\n{")
    assert b" 408 " in reply and b'"error"' in reply


def test_a_client_that_sends_byte_by_byte_has_a_deadline(start, monkeypatch):
    monkeypatch.setattr(serve.Handler, "timeout", 0.5)
    server = start("vqa")
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=20) as client:
        begin = time.monotonic()
        with pytest.raises(OSError):
            while time.monotonic() < begin + 15:
                client.sendall(b"x")
                time.sleep(0.1)
        assert time.monotonic() < begin + 15
    assert request(server, "GET", "/healthz")[0] == 200


def test_an_answer_that_comes_before_the_whole_body_is_read(start):
    server = start("vqa")
    body = b"x" * 30_000_000
    status, answer = request(server, "POST", "/predict", body)
    assert status == 413 and "at most" in answer["error"]


def test_hostile_requests_leave_the_server_answering(start, monkeypatch, capsys):
    monkeypatch.setattr(serve.Handler, "timeout", 1)
    server = start("vqa")

    def attack(seed):
        _, *how = hostile.make_request(seed, pause=0.05)
        return hostile.send(server.server_port, *how)

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(attack, range(55)))
    assert 500 not in found and "no answer in time" not in found
    assert {400, 404} <= set(found)
    status, answer = request(server, "POST", "/predict", {"sample": 0, "text": "what is it?"})
    assert status == 200 and len(answer["answers"]) == 3
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err == ""


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


def test_a_thread_that_cannot_start_gives_its_connection_back(start, monkeypatch):
    monkeypatch.setattr(serve, "MAX_CONNECTIONS", 1)
    server = start("vqa")

    def fail(thread):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", fail)
        assert send_raw(server, b"GET /healthz HTTP/1.0\r\n\r\n") == b""
    assert request(server, "GET", "/healthz")[0] == 200


def test_without_the_data_set_there_are_no_samples_and_a_line_says_why(start, monkeypatch, capsys):
    def fail(*arguments):
        raise UserError("scenes: gone")

    monkeypatch.setattr(predict, "held_out", fail)
    server = start("vqa")
    assert "no samples: scenes: gone" in capsys.readouterr().err
    status, answer = request(server, "POST", "/predict", {"sample": 0, "text": "what?"})
    assert status == 400 and "has no samples" in answer["error"]


def test_a_model_that_cannot_look_at_pictures_is_refused_before_the_samples_are_made(start, monkeypatch):
    def fail(run):
        raise UserError("feature files, not pixels")

    server = start("vqa")
    monkeypatch.setattr(predict, "load_network", fail)
    monkeypatch.setattr(questions, "make_samples", lambda *arguments: pytest.fail("samples before the network"))
    with pytest.raises(UserError, match="not pixels"):
        serve.Server(0, server.run, server.task, 3)


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


def test_a_port_in_use_is_one_line_and_exit_code_2(checkpoints, monkeypatch, capsys):
    monkeypatch.setattr(questions, "make_samples", lambda *arguments: pytest.fail("samples before the port was tried"))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert predict.main([str(checkpoints("vqa")), "--serve", str(port), "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert f"--serve {port}" in error and error.count("\n") == 1
