"""The drawn scenes against independent oracles: a reader of English that knows only the scene graph, and counting."""

import json
import math
import re
from collections import Counter, defaultdict
from itertools import chain, permutations

import numpy as np
import pytest
from helpers import ROOT, run_script

import data
from prepare import scene_texts, scenes
from support.regions import region_features

SPLITS = ("train", "val", "test", "compose")
HELD_OUT = set(scene_texts.HELD_OUT)
COLORS = ["red", "green", "blue", "yellow", "purple", "orange", "cyan", "pink"]
SHAPES = ["circle", "square", "triangle", "star", "cross", "ring"]
NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight"]
THING = rf"(?:(small|large) )?(?:({'|'.join(COLORS)}) )?({'|'.join(SHAPES)}|thing)(?:e?s)?"
A_THING = rf"an? {THING}"
WHERE = "(left of|right of|above|below)"
OFFSETS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}  # x and y of the direction


# ---- the oracle: reads a text back and evaluates it on the scene graph -----------------------------------------------


def matching(things, size, color, shape):
    """The things that "[size] [color] shape" fits; a word is None where it is not said."""
    found = []
    for thing in things:
        right_size = size in (None, thing.size)
        right_color = color in (None, thing.color)
        right_shape = shape in (None, "thing", thing.shape)
        if right_size and right_color and right_shape:
            found.append(thing)
    return found


def clear_direction(a, b):
    """Where a lies as seen from b; None unless it is 20 pixels away along one axis and 1.5 times as far as along the
    other."""
    dx = abs(a.x - b.x)
    dy = abs(a.y - b.y)
    if max(dx, dy) < 20 or max(dx, dy) < 1.5 * min(dx, dy):
        return None
    if dx > dy:
        return "left of" if a.x < b.x else "right of"
    return "above" if a.y < b.y else "below"


def offset(thing, where):
    """How many pixels the thing lies left of (right of, above, below) the middle of the picture."""
    x, y = OFFSETS[where]
    return (thing.x - 56) * x + (thing.y - 56) * y


def clause_holds(clause, things):
    match = re.fullmatch(rf"(?:an? )?{THING} (?:is )?{WHERE} (?:an? )?{THING}", clause)
    if match:
        groups = match.groups()
        pairs = [(a, b) for a in matching(things, *groups[:3]) for b in matching(things, *groups[4:])]
        return any(a is not b and clear_direction(a, b) == groups[3] for a, b in pairs)
    match = re.fullmatch(rf"{THING} {WHERE} the middle", clause)
    if match:
        return any(offset(thing, match[4]) >= 12 for thing in matching(things, *match.groups()[:3]))
    match = re.fullmatch(rf"(?:exactly )?({'|'.join(NUMBERS)}) {THING}", clause)
    if match:
        return len(matching(things, *match.groups()[1:])) == NUMBERS.index(match[1])
    match = re.fullmatch(rf"(?:there is an? )?{THING}", clause)
    if match:
        return len(matching(things, *match.groups())) > 0
    raise AssertionError(f"no such clause: {clause!r}")


def holds(caption, things):
    return all(clause_holds(clause, things) for clause in caption.split(" and "))


def answer_to(question, things):
    """The one right answer; an error if the question cannot be parsed or has none."""
    yes = {True: "yes", False: "no"}
    match = re.fullmatch(rf"(?:is there|can you see) {A_THING}\?", question)
    if match:
        return yes[len(matching(things, *match.groups())) > 0]
    match = re.fullmatch(rf"(?:how many|what is the number of) {THING}(?: are there)?\?", question)
    if match:
        return str(len(matching(things, *match.groups())))
    match = re.fullmatch(rf"what (?:is the )?(color|shape|size) (?:of|is) the {THING}\?", question)
    if match:
        (thing,) = matching(things, *match.groups()[1:])
        return getattr(thing, match[1])
    match = re.fullmatch(rf"is the {THING} small or large\?", question)
    if match:
        (thing,) = matching(things, *match.groups())
        return thing.size
    match = re.fullmatch(rf"are there (more|fewer) {THING} than {THING}\?", question)
    if match:
        first = len(matching(things, *match.groups()[1:4]))
        second = len(matching(things, *match.groups()[4:]))
        return yes[first > second if match[1] == "more" else first < second]
    sides = "(left or right of|above or below)"
    match = re.fullmatch(rf"(?:is|does) the {THING} (?:lie )?{sides} the middle\?", question)
    if match:
        (thing,) = matching(things, *match.groups()[:3])
        near, far = ("left of", "right of") if match[4].startswith("left") else ("above", "below")
        assert abs(offset(thing, near)) >= 12
        return near.split()[0] if offset(thing, near) > 0 else far.split()[0]
    raise AssertionError(f"no such question: {question!r}")


def named_pairs(text):
    """The held-out pairs of colour and shape that an expression of the text names."""
    pairs = {(match[2], match[3]) for match in re.finditer(rf"(?<![a-z]){THING}(?![a-z])", text)}
    return pairs & HELD_OUT


def asked_pairs(question, things):
    """The held-out pair that a question of a colour or shape names together with its answer, as a set."""
    match = re.fullmatch(rf"what (?:is the )?(color|shape) (?:of|is) the {THING}\?", question)
    if not match:
        return set()
    (thing,) = matching(things, *match.groups()[1:])
    return {(thing.color, thing.shape)} & HELD_OUT


@pytest.fixture(scope="module")
def graphs():
    return {split: [scenes.make_scene(0, split, i) for i in range(200)] for split in SPLITS}


# ---- scene graphs, pictures and the imitated detector ----------------------------------------------------------------


def test_a_scene_is_a_function_of_seed_split_and_index(graphs):
    for split in SPLITS:
        scene = graphs[split][7]
        again = scenes.make_scene(0, split, 7)
        assert again.things == scene.things
        assert scene_texts.captions(again) == scene_texts.captions(scene)
        assert scene_texts.questions(again) == scene_texts.questions(scene)
        assert scenes.draw_scene(again).tobytes() == scenes.draw_scene(scene).tobytes()
        for name, values in scenes.detect(scene).items():
            assert np.array_equal(scenes.detect(again)[name], values)
    first = {tuple(scenes.make_scene(seed, split, 0).things) for seed in (0, 1) for split in SPLITS}
    assert len(first) == 8  # seeds and splits differ


def test_things_lie_in_the_picture_and_hide_no_other(graphs):
    for scene in chain(*graphs.values()):
        assert 3 <= len(scene.things) <= 8
        for thing in scene.things:
            assert min(thing.box) >= 0 and max(thing.box) <= 112
        for a, b in permutations(scene.things, 2):
            width = min(a.box[2], b.box[2]) - max(a.box[0], b.box[0])
            height = min(a.box[3], b.box[3]) - max(a.box[1], b.box[1])
            assert max(width, 0) * max(height, 0) <= 0.2501 * (2 * a.half) ** 2


def test_a_thing_has_its_colour_at_its_centre(graphs):
    """Of circles and squares that no later thing may cover, up to noise, light and the colour's own variation."""
    tried = 0
    for scene in graphs["val"][:50]:
        thing = scene.things[-1]
        if thing.shape not in ("circle", "square"):
            continue
        middle = np.asarray(scenes.draw_scene(scene), float)[int(thing.y) - 3 : int(thing.y) + 4]
        middle = middle[:, int(thing.x) - 3 : int(thing.x) + 4].mean((0, 1))
        distances = {color: np.abs(middle - rgb).sum() for color, rgb in scene_texts.COLORS.items()}
        assert min(distances, key=distances.get) == thing.color
        tried += 1
    assert tried > 5


def test_the_imitated_detector_is_mostly_right():
    right = []
    false = 0
    for i in range(300):
        scene = scenes.make_scene(0, "test", i)
        found = scenes.detect(scene)
        assert np.allclose(found["object_probs"].sum(1), 1)
        assert np.array_equal(found["objects"], found["object_probs"][:, 1:].argmax(1))
        centres = (found["boxes"][:, :2] + found["boxes"][:, 2:]) / 2
        sure = np.flatnonzero(found["object_conf"] > 0.7)
        for thing in scene.things:
            distances = np.abs(centres[sure] - (thing.x, thing.y)).sum(1)
            nearest = sure[distances.argmin()]
            right.append(scene_texts.SHAPES[found["objects"][nearest]] == thing.shape)
        false += len(centres) - len(scene.things)
    assert 0.94 < np.mean(right) < 0.99
    assert 0.8 < false / 300 < 1.2


# ---- captions and questions ------------------------------------------------------------------------------------------


def test_captions_and_answers_are_true(graphs):
    kinds = Counter()
    for scene in chain(*graphs.values()):
        for caption in scene_texts.captions(scene):
            assert holds(caption, scene.things), (caption, scene)
        for kind, question, answer in scene_texts.questions(scene):
            assert answer_to(question, scene.things) == answer, (question, scene)
            kinds[kind] += 1
    assert len(kinds) == 7 and min(kinds.values()) > 300, kinds


def test_every_content_word_of_a_caption_has_one_right_answer(graphs):
    """Put every other word of its kind into the word's place: the caption must become false."""
    plurals = ["circles", "squares", "triangles", "stars", "crosses", "rings"]
    groups = (["small", "large"], COLORS, SHAPES, plurals, NUMBERS[1:], ["left", "right"], ["above", "below"])
    rivals = {word: [other for other in group if other != word] for group in groups for word in group}
    assert set(rivals) == set(scene_texts.CONTENT_WORDS)
    tried = Counter()
    for scene in chain(graphs["train"], graphs["compose"]):
        for caption in scene_texts.captions(scene):
            words = caption.split()
            for i, word in enumerate(words):
                for other in rivals.get(word, []):
                    changed = " ".join([*words[:i], other, *words[i + 1 :]])
                    assert not holds(changed, scene.things), (caption, changed)
                    tried[word] += 1
    assert set(tried) >= {"small", "red", "ring", "rings", "three", "left", "below"}


def test_captions_tell_scenes_apart(graphs):
    drawn = graphs["val"][:100]
    others = []  # how many other pictures a caption fits
    for scene in drawn:
        for caption in scene_texts.captions(scene)[:1]:
            others.append(sum(holds(caption, other.things) for other in drawn) - 1)
    assert len(others) > 80
    assert others.count(0) > 0.75 * len(others) and np.mean(others) < 0.5


def test_only_texts_of_split_compose_name_a_held_out_pair(graphs):
    assert len({color for color, _ in HELD_OUT}) == 6 and len({shape for _, shape in HELD_OUT}) == 6
    for split in SPLITS:
        for scene in graphs[split]:
            for caption in scene_texts.captions(scene):
                assert (len(named_pairs(caption)) > 0) == (split == "compose"), caption
            for _, question, _ in scene_texts.questions(scene):
                pairs = named_pairs(question) | asked_pairs(question, scene.things)
                assert (len(pairs) > 0) == (split == "compose"), question
    shown = [(thing.color, thing.shape) in HELD_OUT for scene in graphs["train"] for thing in scene.things]
    assert 0.05 < np.mean(shown) < 0.25  # but they stand in pictures of all splits


def test_questions_alone_do_not_give_the_answer():
    """The most frequent training answer to the same words, or to the same kind, is right in less than half."""
    by_text = defaultdict(Counter)
    by_kind = defaultdict(Counter)
    for i in range(3000):
        for kind, text, answer in scene_texts.questions(scenes.make_scene(0, "train", i)):
            by_text[text][answer] += 1
            by_kind[kind][answer] += 1
    right = []
    for i in range(400):
        for kind, text, answer in scene_texts.questions(scenes.make_scene(0, "val", i)):
            seen = by_text.get(text) or by_kind[kind]
            right.append(seen.most_common(1)[0][0] == answer)
    assert 0.30 < np.mean(right) < 0.45


# ---- the tasks of more than a caption or a question ------------------------------------------------------------------


@pytest.fixture(scope="module", params=["train", "compose"])
def drawn(request):
    """Scenes of one split. Row i of the store is scene i."""
    count = {"train": 500, "compose": 150}[request.param]
    return [scenes.make_scene(0, request.param, i) for i in range(count)]


def scene_of(drawn, features):
    return drawn[int(features.split("#")[1])]


def test_entailment_by_brute_force(drawn):
    compose = drawn[0].split == "compose"
    by_text = defaultdict(Counter)
    by_number = defaultdict(Counter)
    lines = list(scene_texts.entailment_lines(drawn))
    assert len(lines) > 50
    for line in lines:
        things = scene_of(drawn, line["features"]).things
        size, color, shape, value = re.fullmatch(rf"the {THING} is (?:an? )?(\w+)", line["text"]).groups()
        found = matching(things, size, color, shape)
        if len(found) == 0:
            truth = "neutral"
        else:
            (thing,) = found
            truth = "entailment" if value in (thing.size, thing.color, thing.shape) else "contradiction"
        assert line["answer"] == truth
        by_text[line["text"]][truth] += 1
        by_number[len(things)][truth] += 1
        pair = (color or value, shape if shape != "thing" else value)
        assert (pair in HELD_OUT) == compose
    for counts in (*by_text.values(), *by_number.values()):  # neither the words nor the number of things tell
        assert len(counts) == 3 and len(set(counts.values())) == 1


def two_counts(drawn, line):
    """(first word of the statement, its counts in the left and in the right picture)."""
    pattern = rf"exactly one picture shows {A_THING}"
    first = "one"
    if line["kind"] == "more":
        pattern = rf"(?:more|fewer) {THING} on the left than on the right"
        first = line["text"].split()[0]
    words = re.fullmatch(pattern, line["text"]).groups()
    left, right = (len(matching(scene_of(drawn, name).things, *words)) for name in line["features"])
    return first, left, right


def test_statements_about_two_pictures_by_brute_force(drawn):
    compose = drawn[0].split == "compose"
    lines = list(scene_texts.two_picture_lines(drawn))
    assert len(lines) > 50
    for line in lines:
        first, left, right = two_counts(drawn, line)
        truth = {"one": (left > 0) != (right > 0), "more": left > right, "fewer": left < right}[first]
        assert line["label"] is truth
        assert line["features"][0] != line["features"][1]
        assert (len(named_pairs(line["text"])) > 0) == compose
    for start in range(0, len(lines), 4):
        group = lines[start : start + 4]
        assert sum(line["label"] for line in group) == 2
        for side in (0, 1):  # each picture stands in as many true statements as in false ones
            labels = defaultdict(list)
            for line in group:
                labels[line["features"][side]].append(line["label"])
            assert group[0]["kind"] == "more" or all(sum(known) == len(known) / 2 for known in labels.values())


def test_one_picture_of_two_says_little(drawn):
    """The best guess from the words and the count in one picture is right in half of the statements "exactly one", and
    in three quarters of the others at most."""
    seen = Counter()
    labels = defaultdict(list)
    for line in scene_texts.two_picture_lines(drawn):
        first, left, right = two_counts(drawn, line)
        if line["kind"] == "one":
            left, right = left > 0, right > 0
        seen[line["kind"]] += 1
        labels[line["kind"], "left", first, left].append(line["label"])
        labels[line["kind"], "right", first, right].append(line["label"])
    for kind, most in (("one", 0.5), ("more", 0.75)):
        for side in ("left", "right"):
            hits = 0
            for key, known in labels.items():
                if key[:2] == (kind, side):
                    hits += max(sum(known), len(known) - sum(known))
            assert hits <= most * seen[kind]


def test_choices_and_reasons_by_brute_force(drawn):
    compose = drawn[0].split == "compose"
    lines = [line for scene in drawn for line in scene_texts.choice_lines(scene)]
    assert len(lines) > 50
    for line in lines:
        things = scene_of(drawn, line["features"]).things
        match = re.fullmatch(rf"what (color|shape) is the {THING}\?", line["text"])
        kind, _, color, shape = match.groups()
        (thing,) = matching(things, *match.groups()[1:])
        right = [getattr(thing, kind) == choice for choice in line["choices"]]
        assert len(set(line["choices"])) == 4 and right.index(True) == line["label"] and sum(right) == 1
        assert ((thing.color, thing.shape) in HELD_OUT) == compose
        for number, choice in enumerate(line["choices"]):
            pair = (choice, shape) if kind == "color" else (color, choice)
            assert number == line["label"] or pair not in HELD_OUT
        # wrong choices are words of the picture, as far as it has some that may be named
        shown = {getattr(thing, kind) for thing in things} - {line["choices"][line["label"]]}
        allowed = {word for word in shown if ((word, shape) if kind == "color" else (color, word)) not in HELD_OUT}
        assert len(allowed & set(line["choices"])) == min(3, len(allowed))
        others = [re.fullmatch(rf"it is with {A_THING}", reason).groups() for reason in line["reasons"]]
        right = [len(matching(things, *other)) > 0 for other in others]
        assert right.index(True) == line["reason"] and sum(right) == 1
        assert len(set(others)) == 4  # two colours crossed with two shapes
        assert len({color for _, color, _ in others}) == 2 and len({shape for _, _, shape in others}) == 2
        assert not {(color, shape) for _, color, shape in others} & HELD_OUT


def test_the_right_choice_stands_in_each_place_equally_often(drawn):
    lines = [line for scene in drawn for line in scene_texts.choice_lines(scene)]
    margin = 4 * math.sqrt(0.25 * 0.75 / len(lines))
    for name in ("label", "reason"):
        for place in range(4):
            assert abs(np.mean([line[name] == place for line in lines]) - 0.25) < margin


def test_referring_expressions_by_brute_force(drawn):
    compose = drawn[0].split == "compose"
    kinds = Counter()
    targets = defaultdict(list)
    for line in [line for scene in drawn for line in scene_texts.referring_lines(scene)]:
        scene = scene_of(drawn, line["features"])
        match = re.fullmatch(rf"{THING}(?: {WHERE} the middle)?", line["text"])
        size, color, shape, where = match.groups()
        words = [size, color, None if shape == "thing" else shape]
        found = matching(scene.things, *words)
        needed = []  # for each word: is it needed to tell the thing from another?
        for i in range(3):
            if words[i] is not None:
                needed.append(len(matching(scene.things, *words[:i], None, *words[i + 1 :])) > 1)
        assert len(needed) > 1
        if where is None:
            assert any(needed) and line["kind"] == ("words" if all(needed) else "spare")
        else:
            assert line["kind"] == "side" and len(found) > 1
            assert all(abs(offset(thing, where)) >= 12 for thing in found)
            found = [thing for thing in found if offset(thing, where) > 0]
        (thing,) = found
        assert line["target"] == [
            thing.x - thing.half,
            thing.y - thing.half,
            thing.x + thing.half,
            thing.y + thing.half,
        ]
        assert (len(named_pairs(line["text"])) > 0) == compose
        targets[scene.index].append(thing)
        kinds[line["kind"]] += 1
    assert len(kinds) == 3
    for index, found in targets.items():
        assert len(set(found)) == len(found)
        if not compose:  # a picture alone leaves all its things equally likely
            assert set(found) == set(drawn[index].things)
    if not compose:
        assert len(targets) > 0.5 * len(drawn) and min(kinds.values()) > 0.1 * sum(kinds.values())


# ---- the data set on disk --------------------------------------------------------------------------------------------

COUNTS = {"train": 60, "val": 10, "test": 20, "compose": 10}
FIRST_ROW = {"train": 0, "val": 60, "test": 70, "compose": 90, "detected": 70}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    scenes.make(folder, COUNTS)
    return folder


def read_lines(folder, file):
    return [json.loads(line) for line in (folder / file).read_text().splitlines()]


def test_a_data_set_is_a_function_of_the_seed(folder, tmp_path):
    scenes.make(tmp_path, COUNTS)
    files = [file.relative_to(folder) for file in folder.rglob("*") if file.is_file()]
    assert len(files) > 15
    for file in files:
        assert (folder / file).read_bytes() == (tmp_path / file).read_bytes(), file


def test_lines_name_their_pictures_and_splits(folder):
    described = json.loads((folder / "dataset.json").read_text())
    steps = {"steps": 2400, "steps_one_objective": 3600}
    assert described["defaults"] == {**steps, "mask": 0.3, "batch_size": 256, "captions": "first"}
    for task, file in described["files"].items():
        splits = Counter()
        for line in read_lines(folder, file):
            splits[line["split"]] += 1
            names = line["features"] if task == "nlvr2" else [line["features"]]
            for name in names:
                store, row = name.split("#")
                assert store == ("boxes" if task == "refer" and line["split"] != "detected" else "regions")
                assert 0 <= int(row) - FIRST_ROW[line["split"]] < COUNTS.get(line["split"], 20)
            if task not in ("ve", "nlvr2"):
                assert line["id"].split("/")[1] == str(int(row) - FIRST_ROW[line["split"]])
        further = {"pretrain": set(), "refer": {"compose", "detected"}}.get(task, {"compose"})
        assert set(splits) == {"train", "val", "test"} | further
        assert further <= set(described["extra_splits"])


def test_stores_hold_the_regions_of_each_picture(folder):
    detected = data.FeatureStore(folder / "regions")
    true = data.FeatureStore(folder / "boxes")
    assert len(detected) == len(true) == 100
    for split, index in (("train", 0), ("train", 59), ("val", 0), ("test", 19), ("compose", 9)):
        scene = scenes.make_scene(0, split, index)
        picture = scenes.draw_scene(scene)
        found = scenes.detect(scene)
        boxes = np.array([thing.box for thing in scene.things])
        for store, expected in ((detected, found), (true, {"boxes": boxes})):
            row = FIRST_ROW[split] + index
            start, stop = store.offsets[row : row + 2]
            assert stop - start == len(expected["boxes"])
            assert np.abs(store.fields["boxes"][start:stop] * 112 - expected["boxes"]).max() < 1e-4
            features = region_features(picture, expected["boxes"])
            assert np.abs(store.fields["features"][start:stop] - features).max() < 2e-3
    assert np.array_equal(
        detected.fields["objects"][:3], scenes.detect(scenes.make_scene(0, "train", 0))["objects"][:3]
    )
    assert "object_probs" not in true.fields
    for name in ("regions", "boxes"):
        assert (np.load(folder / name / "sizes.npy") == np.full((100, 2), 112)).all()


def test_one_question_for_four_captions_in_pretraining(folder):
    captions = Counter()
    questions = Counter()
    for line in read_lines(folder, "pretrain.jsonl"):
        picture = line["split"], line["features"]
        if line["kind"] == "caption":
            captions[picture] += 1
            assert "answer" not in line
        else:
            questions[picture] += 1
            assert line["answer"]
    assert max(captions.values()) == 8
    for picture, count in captions.items():
        assert questions[picture] == count // 4


def test_detected_regions_are_near_the_true_boxes_of_the_same_expressions(folder):
    lines = read_lines(folder, "refer.jsonl")
    test = [line for line in lines if line["split"] == "test"]
    detected = [line for line in lines if line["split"] == "detected"]
    assert [line["text"] for line in test] == [line["text"] for line in detected]
    best = {"test": [], "detected": []}
    for line in test + detected:
        store, row = line["features"].split("#")
        store = data.FeatureStore(folder / store)
        boxes = store.fields["boxes"][store.offsets[int(row)] : store.offsets[int(row) + 1]] * 112
        corner = np.maximum(boxes[:, :2], line["target"][:2])
        far_corner = np.minimum(boxes[:, 2:], line["target"][2:])
        shared = np.clip(far_corner - corner, 0, None).prod(1)
        areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
        side = line["target"][2] - line["target"][0]
        best[line["split"]].append(max(shared / (areas + side * side - shared)))
    assert min(best["test"]) > 0.999
    assert min(best["detected"]) > 0.6 and max(best["detected"]) < 0.999


def test_the_vocabulary_knows_the_words_of_all_tasks(folder):
    tokenizer = data.read_tokenizer(folder / "vocab.txt")
    described = json.loads((folder / "dataset.json").read_text())
    texts = []
    for file in set(described["files"].values()):
        for line in read_lines(folder, file):
            texts += [line["text"], *line.get("choices", []), *line.get("reasons", [])]
    for text in texts:
        pieces = tokenizer.encode(text, add_special_tokens=False).tokens
        assert pieces == re.findall(r"\w+|\?", text)  # every word is one piece
    assert all(tokenizer.token_to_id(word) is not None for word in described["content_words"])
    assert set(described["content_words"]) >= {
        *COLORS,
        *SHAPES,
        "small",
        "large",
        "circles",
        "crosses",
        "left",
        "right",
        "above",
        "below",
        "two",
    }


def test_command_line(tmp_path):
    done = run_script(ROOT / "prepare" / "scenes.py", "out", "--count", "30", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("out: 120 pictures")
    assert len(data.FeatureStore(tmp_path / "out" / "boxes")) == 120
    done = run_script(ROOT / "prepare" / "scenes.py", "out", "--count", "0", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("scenes.py: argument --count: 0 must be at least 2")
    assert done.stderr.count("\n") == 1
