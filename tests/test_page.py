"""Tests of serve.html in a real browser: Debian's Chromium, driven by playwright."""

import io
import json
import shutil
import threading

import pytest
from PIL import Image

import predict
import serve
import train
from support import drawing, questions

COLORS = {"red": (220, 30, 30), "green": (20, 160, 60), "blue": (40, 60, 220)}


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("no Chromium is installed: apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A model that has learned the colour of pictures with one disc, and the folder of the pictures."""
    folder = tmp_path_factory.mktemp("colors")
    lines = []
    for split in ("train", "test"):
        for name, color in COLORS.items():
            for number in range(2):
                picture = Image.new("RGB", (40, 30), (90, 90, 90))
                picture.paste(color, (5 + 8 * number, 5, 25 + 8 * number, 25))
                picture.save(folder / f"{split}{name}{number}.png")
                line = {
                    "image": f"{split}{name}{number}.png",
                    "text": "what color is it?",
                    "answer": name,
                    "split": split,
                }
                lines.append(json.dumps(line))
    (folder / "colors.jsonl").write_text("\n".join(lines) + "\n")
    command = ["--task", "vqa", "--data", str(folder / "colors.jsonl"), "--out", str(folder / "out"), "--steps", "40"]
    command += ["--grid", "2", "--patch", "4", "--batch-size", "6", "--config", "layers=1", "dropout=0.0"]
    assert train.main([*command, "--device", "cpu", "--dtype", "f32"]) == 0
    return folder / "out" / "checkpoint.pt"


@pytest.fixture(scope="module")
def server(checkpoint):
    """A server of that model."""
    run, task = predict.load_run(predict.parse([*options(checkpoint), "--serve", "0"]))
    server = serve.Server(0, run, task, 3)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield server
    server.shutdown()
    server.close()


@pytest.fixture
def page(browser, server):
    page = open_page(browser, server)
    yield page
    page.close()


def options(checkpoint):
    return [str(checkpoint), "--device", "cpu", "--dtype", "f32"]


def open_page(browser, server):
    """A new page of the server. Whatever goes wrong in the page fails the test."""
    page = browser.new_page()
    page.set_default_timeout(30_000)
    page.mistakes = []
    page.on("pageerror", lambda error: page.mistakes.append(str(error)))
    page.goto(f"http://127.0.0.1:{server.server_port}/")
    page.wait_for_selector("#samples button[aria-pressed=true]")
    return page


def ask(page):
    """Presses the button and waits for the answer: [(name, percent)]."""
    page.click("#ask")
    page.wait_for_selector("#ask:enabled")
    assert page.inner_text("#error") == "" and page.mistakes == []
    return page.eval_on_selector_all("#answer .row", "rows => rows.map(row => row.innerText.split(/\\s*\\n\\s*/))")


def said_by_predict(checkpoint, capsys, *more):
    """The answers of predict.py: [(name, percent)]."""
    capsys.readouterr()
    assert predict.main([*options(checkpoint), "--text", "what color is it?", *map(str, more)]) == 0
    words = capsys.readouterr().out.split()
    return [[name, float(prob)] for name, prob in zip(words[::2], words[1::2], strict=True)]


def assert_same(shown, said):
    """Percents with one decimal against probabilities with three."""
    assert len(shown) == len(said) == 3
    for (name, percent), (said_name, prob) in zip(shown, said, strict=True):
        assert name == said_name and abs(float(percent.rstrip("%")) - 100 * prob) < 0.11


def test_a_sample_is_chosen_and_its_right_answer_stands_there(page, checkpoint, capsys):
    folder = checkpoint.parent.parent
    seen = set()
    for number in range(1, 7):
        page.click(f"#samples button:nth-child({number})")
        page.wait_for_selector(f"#samples button:nth-child({number})[aria-pressed=true]")
        answers = ask(page)
        right = page.inner_text("#answer .right")
        assert answers[0][0] == right
        source = page.get_attribute("#pictures img", "src")
        assert_same(answers, said_by_predict(checkpoint, capsys, "--image", file_of(folder, source)))
        seen.add(right)
    assert seen == set(COLORS)


def file_of(folder, source):
    """The file in a folder whose pixels are those of a data: address."""
    picture = questions.decode_base64(source)
    for file in sorted(folder.glob("test*.png")):
        if Image.open(file).tobytes() == Image.open(io.BytesIO(picture)).tobytes():
            return file
    raise AssertionError("no such picture")


def test_a_chosen_picture_and_boxes_drawn_with_the_mouse(page, checkpoint, capsys, tmp_path):
    picture = Image.new("RGB", (60, 30), COLORS["red"])
    picture.paste(COLORS["blue"], (30, 0, 60, 30))
    exif = picture.getexif()
    exif[0x0112] = 6  # lies on its side: 30 wide and 60 high, red above blue
    picture.save(tmp_path / "a.jpg", exif=exif, quality=95)
    page.set_input_files("#pictures input", tmp_path / "a.jpg")
    page.wait_for_selector("#samples:not(:has([aria-pressed=true]))")
    page.fill("#text", "what color is it?")
    assert_same(ask(page), said_by_predict(checkpoint, capsys, "--image", tmp_path / "a.jpg"))
    page.click("#draw")
    frame = page.locator("#pictures svg").bounding_box()
    assert frame["height"] > 1.9 * frame["width"]
    page.mouse.move(frame["x"] + 0.2 * frame["width"], frame["y"] + 0.6 * frame["height"])
    page.mouse.down()
    page.mouse.move(frame["x"] + 0.8 * frame["width"], frame["y"] + 0.9 * frame["height"])
    page.mouse.up()
    with page.expect_request("**/predict") as sent:
        answers = ask(page)
    box = json.loads(sent.value.post_data)["boxes"][0][0]
    assert max(abs(a - b) for a, b in zip(box, (6, 36, 24, 54), strict=True)) < 0.5
    assert answers[0][0] == "blue"
    assert_same(
        answers, said_by_predict(checkpoint, capsys, "--image", tmp_path / "a.jpg", "--boxes", json.dumps([box]))
    )
    page.click("#clear")
    assert page.locator("#pictures rect").count() == 0
    assert_same(ask(page), said_by_predict(checkpoint, capsys, "--image", tmp_path / "a.jpg"))


@pytest.mark.parametrize("size, mode", [((2400, 60), "RGBA"), ((2100, 1600), "I;16"), ((20_500, 10), "L")])
def test_a_picture_that_the_server_would_refuse_is_sent_smaller_and_on_white(size, mode, page, tmp_path):
    """16 bits a pixel count four times, transparency twice; the server's longest side is 20,000."""
    Image.new(mode, size).save(tmp_path / "large.png")
    page.set_input_files("#pictures input", tmp_path / "large.png")
    page.wait_for_selector("#samples:not(:has([aria-pressed=true]))")
    page.fill("#text", "what color is it?")
    with page.expect_request("**/predict") as sent:
        assert len(ask(page)) == 3
    content = questions.decode_base64(json.loads(sent.value.post_data)["images"][0])
    picture = Image.open(io.BytesIO(content))
    assert picture.format == "JPEG" and max(picture.size) <= 2000
    assert picture.convert("L").getextrema() == ((255, 255) if mode == "RGBA" else (0, 0))


def test_a_broken_picture_gives_the_message(page, tmp_path):
    (tmp_path / "noise.png").write_bytes(b"no picture at all")
    page.set_input_files("#pictures input", tmp_path / "noise.png")
    page.wait_for_selector("#error:not(:empty)")
    assert page.inner_text("#error") == "noise.png is no picture that can be read; choose a PNG or JPEG file"
    content = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(content, "BMP")
    (tmp_path / "short.bmp").write_bytes(content.getvalue()[:2000])  # a browser shows what is there of it
    page.set_input_files("#pictures input", tmp_path / "short.bmp")
    page.wait_for_selector("#samples:not(:has([aria-pressed=true]))")
    page.click("#ask")
    page.wait_for_selector("#error:not(:empty)")
    assert "cannot read" in page.inner_text("#error") and page.locator("#answer .row").count() == 0
    page.click("#samples button:nth-child(1)")
    page.wait_for_selector("#samples button[aria-pressed=true]")
    assert len(ask(page)) == 3


def test_the_attention_button_colors_the_regions(page):
    assert page.is_hidden("#attention")
    with page.expect_response("**/predict") as reply:
        ask(page)
    regions = reply.value.json()["regions"]
    assert len(regions) == 5 and abs(sum(region["weight"] for region in regions) - 1) < 1e-3
    assert page.locator("#pictures .heat").count() == 0
    page.click("#attention")
    shown = page.eval_on_selector_all(
        "#pictures .heat", "rects => rects.map(rect => [+rect.getAttribute('x'), +rect.getAttribute('stroke-opacity')])"
    )
    most = max(region["weight"] for region in regions)
    for (x, opacity), region in zip(shown, regions, strict=True):
        assert abs(x - region["box"][0]) < 0.01 and abs(opacity - region["weight"] / most) < 1e-3
    page.click("#attention")
    assert page.locator("#pictures .heat").count() == 0


@pytest.mark.parametrize("fails", [False, True])
def test_a_late_answer_does_not_land_under_another_picture(fails, page, monkeypatch):
    held = threading.Event()
    before = predict.predict

    def slow(*arguments):
        held.wait(20)
        assert not fails
        return before(*arguments)

    monkeypatch.setattr(predict, "predict", slow)
    with page.expect_response("**/predict"):
        page.click("#ask")
        page.click("#samples button:nth-child(2)")
        page.wait_for_selector("#samples button:nth-child(2)[aria-pressed=true]")
        held.set()
    page.wait_for_timeout(200)
    assert page.inner_text("#answer") == page.inner_text("#error") == ""
    monkeypatch.setattr(predict, "predict", before)
    assert len(ask(page)) == 3


def test_enter_asks_no_second_question_while_one_is_on_its_way(page, monkeypatch):
    held = threading.Event()
    before = predict.predict
    monkeypatch.setattr(predict, "predict", lambda *arguments: held.wait(20) and before(*arguments))
    sent = []
    page.on("request", lambda request: sent.append(request.url))
    page.press("#text", "Enter")
    page.press("#text", "Enter")
    held.set()
    page.wait_for_selector("#ask:enabled")
    assert len(sent) == 1 and page.locator("#answer .row").count() == 3


def test_the_truth_of_a_sample_is_not_that_of_another_answer(browser, start):
    page = open_page(browser, start("vcr"))
    ask(page)
    assert page.locator("#answer .right").count() == 1
    page.fill("#reasoned", "another answer")
    ask(page)
    assert page.locator("#answer .right").count() == 0
    page.close()


def test_a_form_of_the_browser_is_read(page, checkpoint, capsys, tmp_path):
    Image.new("RGB", (31, 17), COLORS["green"]).save(tmp_path / "a.png")
    page.set_input_files("#pictures input", tmp_path / "a.png")
    page.wait_for_selector("#samples:not(:has([aria-pressed=true]))")
    answer = page.evaluate("""async () => {
        const form = new FormData();
        const content = Uint8Array.from(atob(pictures[0].source.split(",")[1]), letter => letter.charCodeAt(0));
        form.append("image", new Blob([content]), 'a "name" with\\r\\nlines.png');
        form.append("text", "what color is it?");
        return await (await fetch("/predict", {method: "POST", body: form})).json();
    }""")
    shown = [[name, f"{100 * prob}%"] for name, prob in answer["answers"]]
    assert_same(shown, said_by_predict(checkpoint, capsys, "--image", tmp_path / "a.png"))


@pytest.mark.parametrize("task", ["pretrain", "ve", "nlvr2", "vcr", "refer", "retrieval", "caption"])
def test_every_task_has_its_inputs(task, browser, start):
    server = start(task)
    page = open_page(browser, server)
    assert page.locator("#pictures img").count() == (2 if task == "nlvr2" else 1)
    assert page.is_visible("#choices") == (task == "vcr")
    assert page.is_visible("#text") == (task != "caption")
    rows = ask(page)
    expected = {"pretrain": 4, "ve": 3, "nlvr2": 2, "vcr": 3, "refer": 3, "retrieval": 1, "caption": 0}[task]
    assert len(rows) == expected
    assert page.locator("#answer .sentence").count() == (1 if task in ("pretrain", "caption") else 0)
    assert page.locator("#pictures .answer").count() == (1 if task == "refer" else 0)
    if task != "retrieval":
        assert page.inner_text("#answer .right") == right_answer(page, server)
    assert page.is_visible("#attention") == (task != "caption")
    page.close()


def right_answer(page, server):
    """What the page should show as the right answer to the first sample."""
    if server.task.name == "pretrain":
        return page.evaluate("answer.truth")
    return drawing.short_name(server.samples[0]["truth"])
