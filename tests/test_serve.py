"""Tests of serve.py: a server on a free port, asked as a browser and as a hostile client ask."""

import base64
import http.client
import io
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import hostile
import numpy as np
import pytest
from PIL import Image

import predict
import serve
from common import UserError
from prepare import scenes
from support import drawing, examples, questions

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


def assert_same_answer(found, expected, tolerance=1e-4):
    """Asserts that two answers have the same keys, names and boxes in the same order, and the same numbers but for rounding."""
    assert found.keys() == expected.keys()
    for key in found:
        assert_same_values(found[key], expected[key], tolerance)


def assert_same_values(found, expected, tolerance):
    if isinstance(found, dict):
        assert_same_answer(found, expected, tolerance)
    elif isinstance(found, list | tuple):
        for value, other in zip(found, expected, strict=True):
            assert_same_values(value, other, tolerance)
    elif isinstance(found, float):
        assert abs(found - expected) < tolerance
    else:
        assert found == expected


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
def test_a_sample_is_answered_as_predict_answers_it(task, shared):
    server = shared(task)
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
        expected[number].pop("truth", None)  # a request has none
        assert_same_answer(answer, expected[number])


def test_pictures_of_a_request_are_answered_as_files_are(shared, scene, tmp_path, capsys, checkpoints):
    server = shared("vqa")
    (tmp_path / "a.png").write_bytes(base64.b64decode(scene))
    boxes = [[0, 0, 40, 40], [30, 30, 90, 90]]
    command = [str(checkpoints("vqa")), "--image", str(tmp_path / "a.png"), "--text", "what is it?"]
    command += ["--boxes", json.dumps(boxes), "--device", "cpu", "--dtype", "f32"]
    capsys.readouterr()
    assert predict.main(command) == 0
    question = {"images": [f"data:image/png;base64,{scene}"], "boxes": [boxes], "text": "what is it?"}
    status, answer = request(server, "POST", "/predict", question)
    assert status == 200 and drawing.describe(answer) + "\n" == capsys.readouterr().out


def test_an_answer_warns_of_lost_words_and_further_frames(shared, scene):
    server = shared("vqa")
    question = {"images": [scene], "text": "what color is the circle?"}
    warning = request(server, "POST", "/predict", question)[1]["warning"]
    assert warning == "picture: the model was trained on boxes of things, and is asked about a grid; give boxes"
    question["boxes"] = [[[0, 0, 30, 30]]]
    assert "warning" not in request(server, "POST", "/predict", question)[1]
    question["text"] += " ж"
    warning = request(server, "POST", "/predict", question)[1]["warning"]
    assert warning == "text: 1 of 7 word pieces are unknown"
    frames = [Image.new("RGB", (30, 30), color) for color in ("red", "blue")]
    content = io.BytesIO()
    frames[0].save(content, "GIF", save_all=True, append_images=frames[1:])
    question = {"images": [base64.b64encode(content.getvalue()).decode()], "text": "what color is the circle?"}
    warning = request(server, "POST", "/predict", question)[1]["warning"]
    assert warning.startswith("picture: only the first of its 2 frames is used"), warning


def test_a_photo_on_its_side_is_answered_as_it_is_shown(shared):
    """With given boxes, and with the grid, which follows the turned picture too."""
    server = shared("refer")
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


@pytest.fixture
def ask_together(monkeypatch):
    """ask_together(server, questions): their replies, and how many examples each batch of the model had. The model works on
    the first question until all others wait."""

    def ask(server, asked):
        before = predict.predict
        held = threading.Event()
        sizes = []

        def slow(run, task, dataset, index, top):
            sizes.append(len(index))
            held.wait(20)
            return before(run, task, dataset, index, top)

        monkeypatch.setattr(predict, "predict", slow)
        with ThreadPoolExecutor(len(asked)) as pool:
            replies = [pool.submit(request, server, "POST", "/predict", asked[0])]
            wait_until(lambda: len(sizes) == 1)
            replies += [pool.submit(request, server, "POST", "/predict", question) for question in asked[1:]]
            wait_until(lambda: server.batcher.waiting.qsize() == len(asked) - 1)
            held.set()
            replies = [reply.result() for reply in replies]
        monkeypatch.setattr(predict, "predict", before)
        return replies, sizes

    return ask


def wait_until(condition, seconds=20):
    """Returns once condition() is true. Fails after some seconds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_requests_that_come_together_are_answered_together_each_with_its_own_answer(start, scene, ask_together):
    server = start("vqa")
    words = ("red", "blue", "green", "yellow", "small")
    asked = []
    for i in range(20):
        boxes = [[i, i, 30 + i, 30 + i], [60 - i, 40, 100 - i, 90]]
        text = f"what is the {words[i % 5]} {('circle', 'square', 'star', 'triangle')[i % 4]}?"
        asked.append({"images": [scene], "boxes": [boxes], "text": text, "attention": True})
    alone = [request(server, "POST", "/predict", question) for question in asked]
    found, sizes = ask_together(server, asked)
    assert sizes == [1, 19]
    assert request(server, "GET", "/healthz")[1] == {"status": "ok", "requests": 40, "batches": 22}
    for (status, answer), (_, expected) in zip(found, alone, strict=True):
        assert status == 200
        assert_same_answer(answer, expected, 5e-5)
    numbers = []
    for _, answer in alone:
        numbers.append([p for _, p in answer["answers"]] + [region["weight"] for region in answer["regions"]])
    for i, j in itertools.combinations(range(20), 2):  # no two alike, by far more than the tolerance
        differences = np.abs(np.subtract(numbers[i], numbers[j]))
        assert differences[:3].max() > 2e-4 and differences[3:].max() > 2e-4, (i, j)


def test_questions_with_different_numbers_of_choices_are_batches_of_their_own(start, ask_together):
    server = start("vcr")
    choices = (["red", "blue"], ["a star", "a circle"], ["left", "right", "above"], ["small", "big", "red"], ["0", "1"])
    asked = [{"sample": i, "text": "what is it?", "choices": texts} for i, texts in enumerate(choices)]
    alone = [request(server, "POST", "/predict", question) for question in asked]
    found, sizes = ask_together(server, asked)
    assert sizes == [1, 2, 2]
    for texts, (status, answer), (_, expected) in zip(choices, found, alone, strict=True):
        assert status == 200 and {name for name, _ in answer["answers"]} == set(texts)
        assert_same_answer(answer, expected)


def test_a_question_that_the_model_fails_on_does_not_spoil_its_neighbours(start, ask_together, monkeypatch, capsys):
    server = start("vqa")
    texts = ("first", "what is red?", "bad", "what is blue?")
    asked = [{"sample": 0, "text": text} for text in texts]
    before = predict.predict

    def fragile(run, task, dataset, index, top):
        if "bad" in dataset.text:
            raise ZeroDivisionError
        return before(run, task, dataset, index, top)

    alone = [request(server, "POST", "/predict", question) for question in asked]
    monkeypatch.setattr(predict, "predict", fragile)
    found, sizes = ask_together(server, asked)
    assert sizes == [1, 3, 1, 1, 1]
    assert [status for status, _ in found] == [200, 200, 500, 200]
    for i in (0, 1, 3):
        assert_same_answer(found[i][1], alone[i][1])
    printed = capsys.readouterr()
    assert printed.out.count("serve: ZeroDivisionError()") == 1 and printed.err == ""
    assert found[2][1] == {"error": "the server failed on this request"}


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


def test_a_form_is_answered_as_json_is(shared, scene):
    server = shared("vqa")
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
        ([("text", b"x"), ("text", b"y")], "'text' stands there twice"),
        ([("text", b"x"), ("image", b"x"), ("image", b"x")], "1 picture"),
        ([("text", b"x"), ("image", b"x")], "no picture"),
        ([("text", b"x")] * 101, "100 fields"),
    ],
)  # fmt: skip
def test_a_wrong_form_gets_a_message(parts, message, shared):
    status, answer = request(shared("vqa"), "POST", "/predict", *form(parts))
    assert status == 400 and message in answer["error"]


def test_a_turned_photograph_is_answered_as_the_file_is(shared, tmp_path, capsys, checkpoints):
    picture = Image.effect_noise((40, 90), 60).convert("RGB")
    exif = picture.getexif()
    exif[0x0112] = 8
    picture.save(tmp_path / "a.jpg", exif=exif)
    server = shared("vqa")
    question = {"text": "what is it?", "images": [base64.b64encode((tmp_path / "a.jpg").read_bytes()).decode()]}
    status, answer = request(server, "POST", "/predict", {**question, "boxes": [[[0, 0, 90, 40]]]})
    assert status == 200  # 90 pixels wide
    capsys.readouterr()
    command = [str(checkpoints("vqa")), "--image", str(tmp_path / "a.jpg"), "--text", "what is it?"]
    assert predict.main([*command, "--boxes", "[[0,0,90,40]]", "--device", "cpu", "--dtype", "f32"]) == 0
    assert drawing.describe(answer) + "\n" == capsys.readouterr().out
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
def test_pages_of_other_sites_are_refused(headers, status, shared):
    server = shared("vqa")
    assert request(server, "POST", "/predict", {"sample": 0, "text": "what is it?"}, headers)[0] == status
    assert request(server, "GET", "/samples", None, headers)[0] == status


def test_a_tiff_of_several_pages_and_eps_are_refused(shared):
    server = shared("vqa")
    page = Image.effect_noise((30, 20), 60)
    for kind, more, status in (("TIFF", {}, 200), ("TIFF", {"save_all": True, "append_images": [page]}, 400),
                               ("GIF", {"save_all": True, "append_images": [page]}, 200), ("EPS", {}, 400)):  # fmt: skip
        content = io.BytesIO()
        page.save(content, kind, **more)
        question = {"text": "x", "images": [base64.b64encode(content.getvalue()).decode()]}
        assert request(server, "POST", "/predict", question)[0] == status, kind


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
        ("POST", "/predict?x=1", {}, 400, "text"),
        ("POST", "/predict", {"text": "x", "atention": True}, 400, "unknown key 'atention'"),
        ("POST", "/predict", {"text": "x", "sample": 0, "images": ["PICTURE"]}, 400, "leave out 'images'"),
        ("POST", "/predict", {"text": "x", "sample": 0, "boxes": [[[1, 2, 3, 4]]]}, 400, "leave out 'images'"),
        ("POST", "/predict", {"text": 3}, 400, "'text'"),
        ("POST", "/predict", {"text": "x" * 2001}, 400, "'text'"),
        ("POST", "/predict", {"text": "x\0y"}, 400, "'text'"),
        ("POST", "/predict", '{"text": "x", "text": "y"}', 400, "twice"),
        ("POST", "/predict", '{"text": "\\ud83d"}', 400, "half a character"),
        ("POST", "/predict", {"text": "x"}, 400, "'images'"),
        ("POST", "/predict", {"text": "x", "images": ["AA", "AA"]}, 400, "1 picture"),
        ("POST", "/predict", {"text": "x", "images": [3]}, 400, "base64"),
        ("POST", "/predict", {"text": "x", "images": ["%%%"]}, 400, "base64"),
        ("POST", "/predict", {"text": "x", "images": ["AAAA"]}, 400, "no picture"),
        ("POST", "/predict", {"text": "x", "images": ["BOMB 50,000 x 50,000"]}, 413, "too large"),
        ("POST", "/predict", {"text": "x", "images": ["BOMB one row"]}, 413, "no side longer"),
        ("POST", "/predict", {"text": "x", "images": ["BOMB comment"]}, 400, "no picture"),
        ("POST", "/predict", {"text": "x", "attention": 1}, 400, "'attention'"),
        ("POST", "/predict", {"text": "x", "images": ["PICTURE"], "boxes": [[[1, 2, 3, 999]]]}, 400, "outside"),
        ("POST", "/predict", {"text": "x", "images": ["PICTURE"], "boxes": [[1]]}, 400, "'boxes'"),
        ("POST", "/predict", {"text": "x", "images": ["PICTURE"], "boxes": 3}, 400, "'boxes'"),
        ("POST", "/predict", {"text": "x", "choices": ["a"]}, 400, "'choices'"),
        ("POST", "/predict", {"text": "x", "sample": 99}, 400, "'sample'"),
        ("POST", "/predict", {"text": "x", "sample": True}, 400, "'sample'"),
    ],
)  # fmt: skip
def test_a_wrong_request_gets_a_status_and_a_message(method, path, body, status, message, shared, scene):
    server = shared("vqa")
    text = json.dumps(body) if not isinstance(body, str) else body
    text = text.replace("PICTURE", scene)
    text = re.sub('BOMB ([^"]+)', lambda name: base64.b64encode(hostile.bomb(name[1])).decode(), text)
    found, answer = request(server, method, path, text)
    assert found == status and message in answer["error"], answer
    assert request(server, "GET", "/healthz")[0] == 200


def question_with(content, **more):
    """A question about a picture, given as bytes."""
    return {"text": "what is it?", "images": [base64.b64encode(content).decode()], **more}


@pytest.mark.parametrize(
    ("width", "height", "depth", "color", "most"),
    [
        (2000, 1600, 16, 0, "3,125,000"),  # Pillow makes 4 bytes of a pixel of 16 bits, and 8 of these
        (3200, 2000, 8, 6, "6,250,000"),  # a transparent picture is laid on a white one
        (4000, 3200, 8, 2, "12,500,000"),
    ],
)
def test_the_limit_of_pixels_depends_on_what_a_pixel_takes(width, height, depth, color, most, shared):
    picture = hostile.png_of(width, height, depth, color, b"")
    status, answer = request(shared("vqa"), "POST", "/predict", question_with(picture))
    assert status == 413 and f"at most {most} pixels" in answer["error"]
    half_as_high = hostile.png_of(
        width, height // 2, depth, color, b""
    )  # no rows follow: only the limit is asked about
    assert questions.count_pixels(half_as_high) * 2 == width * height * 12_500_000 // int(most.replace(",", ""))


def test_lists_and_texts_have_limits(shared, scene):
    """One more is 400; as many are answered."""
    server = shared("vcr")
    asked = {"images": [scene], "text": "what is it?", "choices": ["red", "blue"]}
    for change, many, message in (
        ({"boxes": [[[0, 0, 9, 9]] * 101]}, {"boxes": [[[0, 0, 9, 9]] * 100]}, "'boxes' must be 1 to 100 lists"),
        ({"choices": ["red"] * 101}, {"choices": ["red"] * 100}, "'choices' must be 2 to 100 strings"),
        ({"choices": ["red", "x" * 2001]}, {"choices": ["red", "x" * 2000]}, "'choices' must be 2 to 100 strings"),
        ({"text": "x" * 2001}, {"text": "x" * 2000}, "at most 2000 characters"),
    ):
        status, answer = request(server, "POST", "/predict", asked | change)
        assert status == 400 and message in answer["error"], answer
        assert request(server, "POST", "/predict", asked | many)[0] == 200


def test_what_is_within_the_limits_of_a_body_is_read_and_one_more_is_not():
    for length, status in (("8388608", None), ("8388609", 413), ("0", None), ("-1", 411), ("1e3", 411), ("", 411)):
        assert status_of(questions.body_length, {"Content-Length": length}) == status, length
    assert status_of(questions.body_length, {"Content-Length": "5", "Transfer-Encoding": "chunked"}) == 411
    for values, status in ((20_000, None), (20_001, 400)):
        numbers = ",".join(["0"] * (values - 1))  # with the two brackets as many as `values`
        assert status_of(questions.parse_json, f'{{"x": [{numbers}]}}'.encode()) == status, values
    for fields, status in ((100, None), (101, 400)):
        body, _ = form([("choices", b"x")] * fields)
        assert status_of(questions.parse_form, body, "a b") == status, fields
    for width, height, status in (
        (20_000, 1, None),
        (20_001, 1, 413),
        (1, 20_001, 413),
        (4000, 3125, None),
        (4000, 3126, 413),
    ):
        picture = hostile.png_of(width, height, 8, 2, b"")
        assert status_of(questions.count_pixels, picture) == status, (width, height)


def status_of(function, *arguments):
    """The status of what is refused; None if it is not."""
    try:
        function(*arguments)
    except questions.HttpError as error:
        return error.status
    return None


def test_both_pictures_of_nlvr2_have_their_regions_weights(shared):
    server = shared("nlvr2")
    question = {"sample": 0, "text": "there is a red circle", "attention": True}
    status, answer = request(server, "POST", "/predict", question)
    first, second = server.samples[0]["boxes"]
    assert status == 200 and len(first) > 1 and len(second) > 1
    found = [(region["picture"], region["box"]) for region in answer["regions"]]
    assert found == [(0, box) for box in first] + [(1, box) for box in second]


def free_slots(semaphore):
    """How often a semaphore can be acquired now."""
    count = 0
    while semaphore.acquire(blocking=False):
        count += 1
    for _ in range(count):
        semaphore.release()
    return count


def test_requests_that_fail_give_their_place_in_memory_back(start):
    server = start("vqa")
    slots = (server.large_bodies, server.large_pictures, server.small_pictures)
    free = [free_slots(slot) for slot in slots]
    assert free == [2, 1, os.cpu_count()]
    large = hostile.png_bomb(1200, 900)
    small = hostile.small_picture()
    for content in (large[:-40], small[:-30], large, small):  # cut off, and with a box outside
        status, answer = request(server, "POST", "/predict", question_with(content, boxes=[[[0, 0, 1, 5000]]]))
        assert status == 400
        assert tempfile.gettempdir() not in answer["error"] and "the picture" in answer["error"], answer
    assert request(server, "POST", "/predict", "x" * 300_000)[0] == 400
    assert [free_slots(slot) for slot in slots] == free
    assert request(server, "POST", "/predict", question_with(large))[0] == 200


def test_a_request_that_finds_no_place_in_memory_is_503(start, monkeypatch):
    """Of a large body, a large picture and a small one; each waits for its own kind only."""
    monkeypatch.setattr(questions, "WAIT_SECONDS", 0.05)
    server = start("vqa")
    large = question_with(hostile.png_bomb(1200, 900))
    small = question_with(hostile.small_picture())
    body = json.dumps(small) + " " * 300_000
    slots = {"body": server.large_bodies, "large": server.large_pictures, "small": server.small_pictures}
    for held, slot in slots.items():
        count = free_slots(slot)
        for _ in range(count):
            slot.acquire()
        for name, asked in (("body", body), ("large", large), ("small", small)):
            status, answer = request(server, "POST", "/predict", asked)
            busy = name == held or (held, name) == ("small", "body")  # the large body holds a small picture
            assert status == (503 if busy else 200), (held, name)
            assert not busy or "try again" in answer["error"]
        for _ in range(count):
            slot.release()


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
    wait_until(lambda: free_slots(server.connections) == 0)
    assert b" 503 " in send_raw(server, b"GET /healthz HTTP/1.0\r\n\r\n")
    for client in idle:
        client.close()
    wait_until(lambda: free_slots(server.connections) == 3)
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
    monkeypatch.setattr(examples, "load_network", fail)
    monkeypatch.setattr(questions, "make_samples", lambda *arguments: pytest.fail("samples before the network"))
    with pytest.raises(UserError, match="not pixels"):
        serve.Server(0, server.run, server.task, 3)


def test_a_fault_of_the_model_is_500_and_the_next_request_is_answered(start, monkeypatch, capsys):
    server = start("vqa")
    before = predict.predict
    monkeypatch.setattr(predict, "predict", lambda *arguments: 1 / 0)
    status, answer = request(server, "POST", "/predict", {"sample": 0, "text": "what?"})
    assert status == 500 and answer == {"error": "the server failed on this request"}
    assert "serve: ZeroDivisionError" in capsys.readouterr().out
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


def test_null_is_an_absent_key(shared):
    question = {"sample": 0, "images": None, "boxes": None, "text": "x"}
    assert request(shared("vqa"), "POST", "/predict", question)[0] == 200


def test_a_batch_has_at_most_64_questions(monkeypatch):
    sizes = []
    monkeypatch.setattr(serve.threading, "Thread", lambda **_: SimpleNamespace(start=lambda: None))
    batcher = serve.Batcher(None, None, 1)
    batcher.answer = lambda jobs: sizes.append(len(jobs))
    for _ in range(100):
        batcher.waiting.put(questions.Job({"choices": None}, [], False, questions.Future()))
    batcher.waiting.put(None)
    batcher.work()
    assert sizes == [64, 36] or sizes == [64]


def test_names_of_this_machine_may_be_in_capital_letters(shared):
    connection = http.client.HTTPConnection("127.0.0.1", shared("vqa").server_port, timeout=30)
    connection.request("GET", "/healthz", None, {"Host": "LOCALHOST"})
    assert connection.getresponse().status == 200
    connection.close()


def test_the_page_asks_for_boxes_where_training_had_them(shared):
    assert shared("vqa").description["boxes"] is True  # drawn scenes: boxes of things


def test_every_answer_has_the_headers_that_keep_it_here(shared):
    connection = http.client.HTTPConnection("127.0.0.1", shared("vqa").server_port, timeout=30)
    connection.request("GET", "/samples")
    reply = connection.getresponse()
    assert reply.getheader("Cache-Control") == "no-store" and reply.getheader("X-Content-Type-Options") == "nosniff"
    assert reply.getheader("Cross-Origin-Resource-Policy") == "same-origin"
    assert "default-src 'none'" in reply.getheader("Content-Security-Policy")
    connection.close()


def test_a_sample_that_is_a_photograph_is_made_small(tmp_path):
    Image.new("RGB", (2000, 1000)).save(tmp_path / "a.png")
    content = questions.sample_picture(None, 0, tmp_path / "a.png").partition(",")[2]
    assert Image.open(io.BytesIO(base64.b64decode(content))).size == (480, 240)
