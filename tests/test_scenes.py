"""prepare/scenes.py against oracles: a reader of English that knows only the scene graph, counting, brute force."""

import math
import re
import sys
from collections import Counter, defaultdict
from itertools import chain, permutations
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import common
import data
from prepare import scenes

COLORS = ["red", "green", "blue", "yellow", "purple", "orange", "cyan", "pink"]
SHAPES = ["circle", "square", "triangle", "star", "cross", "ring"]
NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight"]
THING = rf"(?:(small|large) )?(?:({'|'.join(COLORS)}) )?({'|'.join(SHAPES)}|thing)(?:e?s)?"
A_THING, WHERE = rf"an? {THING}", "(left of|right of|above|below)"


# ---------------------------------------------------------------------------------------------------------------------
# The oracle: reads a text back and evaluates it on the scene graph


def matching(things, size, color, shape):
    shape = None if shape == "thing" else shape
    words = [(size, "size"), (color, "color"), (shape, "shape")]
    return [t for t in things if all(word in (None, getattr(t, name)) for word, name in words)]


def lies(a, where, b):
    """Loose truth: on the right side at all. Strict use (no other word is right) is checked by its callers."""
    return {"left of": a.x < b.x, "right of": a.x > b.x, "above": a.y < b.y, "below": a.y > b.y}[where]


def clear(a, b):
    dx, dy = abs(a.x - b.x), abs(a.y - b.y)
    return max(dx, dy) >= 20 and max(dx, dy) >= 1.5 * min(dx, dy)


def main_direction(a, b):
    if abs(a.x - b.x) > abs(a.y - b.y):
        return "left of" if a.x < b.x else "right of"
    return "above" if a.y < b.y else "below"


def clause_holds(clause, things):
    if m := re.fullmatch(rf"(?:an? )?{THING} (?:is )?{WHERE} (?:an? )?{THING}", clause):
        g = m.groups()
        first, where, second = matching(things, *g[:3]), g[3], matching(things, *g[4:])
        return any(a is not b and clear(a, b) and main_direction(a, b) == where for a in first for b in second)
    if m := re.fullmatch(rf"{THING} {WHERE} the middle", clause):
        off = {"left of": -1, "right of": 1}.get(m[4], 0), {"above": -1, "below": 1}.get(m[4], 0)
        middle = scenes.SIDE / 2
        return any((t.x - middle) * off[0] + (t.y - middle) * off[1] >= 12 for t in matching(things, *m.groups()[:3]))
    if m := re.fullmatch(rf"(?:exactly )?({'|'.join(NUMBERS)}) {THING}", clause):
        return len(matching(things, *m.groups()[1:])) == NUMBERS.index(m[1])
    if m := re.fullmatch(rf"(?:there is an? )?{THING}", clause):
        return bool(matching(things, *m.groups()))
    raise AssertionError(f"no such clause: {clause!r}")


def holds(caption, things):
    return all(clause_holds(clause, things) for clause in caption.split(" and "))


def answer_to(question, things):
    """The one right answer; AssertionError if the question cannot be parsed or has none."""
    yes = {True: "yes", False: "no"}
    if m := re.fullmatch(rf"(?:is there|can you see) {A_THING}\?", question):
        return yes[bool(matching(things, *m.groups()))]
    if m := re.fullmatch(rf"(?:how many {THING} are there|what is the number of {THING})\?", question):
        return str(len(matching(things, *(m.groups()[:3] if m[3] else m.groups()[3:]))))
    if m := re.fullmatch(rf"what (?:is the )?(color|shape|size) (?:of|is) the {THING}\?", question):
        (thing,) = matching(things, *m.groups()[1:])
        return getattr(thing, m[1])
    if m := re.fullmatch(rf"is the {THING} small or large\?", question):
        (thing,) = matching(things, *m.groups())
        return thing.size
    if m := re.fullmatch(rf"are there (more|fewer) {THING} than {THING}\?", question):
        n, k = len(matching(things, *m.groups()[1:4])), len(matching(things, *m.groups()[4:]))
        return yes[n > k if m[1] == "more" else n < k]
    if m := re.fullmatch(rf"(?:is|does) the {THING} (?:lie )?(left or right of|above or below) the middle\?", question):
        (thing,) = matching(things, *m.groups()[:3])
        off = (thing.x if m[4].startswith("left") else thing.y) - scenes.SIDE / 2
        assert abs(off) >= 12
        return m[4].split()[0 if off < 0 else 2]
    raise AssertionError(f"no such question: {question!r}")


def pairs_bound(text, things, answer=None):
    """(color, shape) of everything that a text names by both words, or by one with the other as its answer."""
    bound = {(m[2], m[3]) for m in re.finditer(rf"(?<![a-z]){THING}(?![a-z])", text)}
    if m := re.fullmatch(rf"what (?:is the )?(color|shape) (?:of|is) the {THING}\?", text):
        (thing,) = matching(things, *m.groups()[1:])
        assert answer in (thing.color, thing.shape)
        bound.add((thing.color, thing.shape))
    return bound


@pytest.fixture(scope="module")
def graphs():
    return {split: [scenes.make_scene(0, split, i) for i in range(200)] for split in data.SPLITS}


def test_scenes_are_a_function_of_seed_split_and_index(graphs):
    for split in data.SPLITS:
        again = scenes.make_scene(0, split, 7)
        assert again.things == graphs[split][7].things
        assert scenes.captions(again) == scenes.captions(graphs[split][7])
        assert scenes.questions(again) == scenes.questions(graphs[split][7])
        assert scenes.draw_scene(again).tobytes() == scenes.draw_scene(graphs[split][7]).tobytes()
        assert all(np.array_equal(a, b) for a, b in zip(scenes.detect(again).values(), scenes.detect(again).values()))
    first = {tuple(scenes.make_scene(seed, split, 0).things) for seed in (0, 1) for split in data.SPLITS}
    assert len(first) == 8  # seeds and splits differ


def test_scene_graphs_are_within_their_bounds(graphs):
    for scene in chain(*graphs.values()):
        assert 3 <= len(scene.things) <= 8
        for a, b in permutations(scene.things, 2):
            w = min(a.x + a.half, b.x + b.half) - max(a.x - a.half, b.x - b.half)
            h = min(a.y + a.half, b.y + b.half) - max(a.y - a.half, b.y - b.half)
            assert max(w, 0) * max(h, 0) <= 0.2501 * (2 * a.half) ** 2
        for t in scene.things:
            assert t.half <= t.x <= scenes.SIDE - t.half and t.half <= t.y <= scenes.SIDE - t.half


def test_captions_and_answers_are_true(graphs):
    kinds = Counter()
    for scene in chain(*graphs.values()):
        for caption in scenes.captions(scene):
            assert holds(caption, scene.things), (caption, scene)
        for kind, question, answer in scenes.questions(scene):
            assert answer_to(question, scene.things) == answer, (question, scene)
            kinds[kind] += 1
    assert len(kinds) == 7 and min(kinds.values()) > 300, kinds


def test_every_content_word_of_a_caption_has_one_right_answer(graphs):
    """Put every other word of its kind in the word's place: the caption must become false."""
    plurals = [shape + ("es" if shape == "cross" else "s") for shape in SHAPES]
    groups = (("small", "large"), COLORS, SHAPES, plurals, NUMBERS[1:])
    relations = (["left", "right"], ["above", "below"])
    tried = Counter()
    for scene in chain(*graphs.values()):
        for caption in scenes.captions(scene):
            words = re.findall(r"\w+|,", caption)
            for i, word in enumerate(words):
                for group in (*groups, *relations):
                    for other in group if word in group else ():
                        changed = " ".join([*words[:i], other, *words[i + 1 :]]).replace(" ,", ",")
                        if other == word:
                            assert word in scenes.CONTENT_WORDS and changed == caption
                        else:
                            assert not holds(changed, scene.things), (caption, changed)
                            tried[word] += 1
    assert set(tried) >= {"small", "red", "ring", "rings", "three", "left", "below"}


def test_captions_tell_scenes_apart(graphs):
    drawn = graphs["val"][:100]
    extra = [sum(holds(c, other.things) for other in drawn) - 1 for scene in drawn for c in scenes.captions(scene)[:1]]
    assert len(extra) > 80 and np.mean(np.array(extra) == 0) > 0.75 and np.mean(extra) < 0.5, np.mean(extra)


def test_words_never_bind_a_held_out_pair_outside_compose(graphs):
    assert len({c for c, _ in scenes.HELD_OUT}) == len({s for _, s in scenes.HELD_OUT}) == 6
    for split, drawn in graphs.items():
        for scene in drawn:
            for text, answer in [(c, None) for c in scenes.captions(scene)] + [q[1:] for q in scenes.questions(scene)]:
                bound = pairs_bound(text, scene.things, answer) & set(scenes.HELD_OUT)
                assert bool(bound) == (split == "compose"), (split, text)
    shown = [(t.color, t.shape) in scenes.HELD_OUT for scene in graphs["train"] for t in scene.things]
    assert 0.05 < np.mean(shown) < 0.25  # but they do stand in pictures


def test_questions_alone_do_not_give_the_answer():
    def drawn(split, count):
        return [q for i in range(count) for q in scenes.questions(scenes.make_scene(0, split, i))]

    by_text, by_kind = defaultdict(Counter), defaultdict(Counter)
    for kind, text, answer in drawn("train", 3000):
        by_text[text][answer] += 1
        by_kind[kind][answer] += 1
    right = [(by_text.get(t) or by_kind[k]).most_common(1)[0][0] == a for k, t, a in drawn("val", 400)]
    assert 0.30 < np.mean(right) < 0.45, np.mean(right)


def test_imitated_detector_is_mostly_right():
    right, false, seen = [], 0, 0
    for i in range(300):
        scene = scenes.make_scene(0, "test", i)
        found = scenes.detect(scene)
        assert np.allclose(found["object_probs"].sum(1), 1)
        assert np.array_equal(found["objects"], found["object_probs"][:, 1:].argmax(1))
        centres = (found["boxes"][:, :2] + found["boxes"][:, 2:]) / 2
        for thing in scene.things:
            near = [j for j in range(len(centres)) if found["object_conf"][j] > 0.7]
            j = min(near, key=lambda j: np.abs(centres[j] - (thing.x, thing.y)).sum())
            right.append(scenes.SHAPES[found["objects"][j]] == thing.shape)
        false, seen = false + len(centres) - len(scene.things), seen + 1
    assert 0.94 < np.mean(right) < 0.99 and 0.8 < false / seen < 1.2


# ---- scenes ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def task_graphs():
    return {
        split: [scenes.make_scene(0, split, i) for i in range(n)] for split, n in (("train", 500), ("compose", 150))
    }


def both(graphs, task):
    """(scenes, examples) of both splits; a task must offer something in each."""
    for split in graphs:
        examples = list(scenes.SCENE_TASKS[task](graphs[split]))
        assert len(examples) > 50
        yield graphs[split], examples


def bound(text):
    """Pairs of colour and shape that an expression of the text puts into words."""
    return {(m[2], m[3]) for m in re.finditer(rf"(?<![a-z]){THING}(?![a-z])", text)} & set(scenes.HELD_OUT)


def test_entailment_by_brute_force(task_graphs):
    for drawn, examples in both(task_graphs, "ve"):
        answers, sizes = {}, {}
        for example in examples:
            ((text, picture),), (answer,) = example.rows, example.answer
            m = re.fullmatch(rf"the {THING} is (?:an? )?(\w+)", text)
            found = matching(drawn[picture].things, *m.groups()[:3])
            assert len(found) < 2
            truth = "entailment" if found and m[4] in found[0][:3] else "contradiction" if found else "neutral"
            assert answer == truth
            answers.setdefault(text, Counter())[answer] += 1
            sizes.setdefault(len(drawn[picture].things), Counter())[answer] += 1
            full = (m[2] or m[4], m[3] if m[3] != "thing" else m[4])
            assert (full in scenes.HELD_OUT) == (drawn[0].split == "compose")
        for counts in (*answers.values(), *sizes.values()):  # neither the words nor the number of things tell
            assert len(counts) == 3 and len(set(counts.values())) == 1


def test_statements_of_two_pictures_by_brute_force(task_graphs):
    for drawn, examples in both(task_graphs, "nlvr2"):
        alone, seen = {}, Counter()
        for four in zip(*[iter(examples)] * 4, strict=True):
            assert sum(e.target for e in four) == 2
            for example in four:
                (text, left), (again, right) = example.rows
                assert text == again and left != right
                if m := re.fullmatch(rf"(exactly one picture shows) {A_THING}", text):
                    n, k = (bool(matching(drawn[p].things, *m.groups()[1:])) for p in (left, right))
                    assert example.target == (n != k)
                else:
                    m = re.fullmatch(rf"(more|fewer) {THING} on the left than on the right", text)
                    n, k = (len(matching(drawn[p].things, *m.groups()[1:])) for p in (left, right))
                    assert example.target == (n > k if m[1] == "more" else n < k)
                assert bool(bound(text)) == (drawn[0].split == "compose")
                seen[example.kind] += 1
                for side, number in (("left", n), ("right", k)):
                    alone.setdefault((example.kind, m[1], side, number), []).append(example.target)
            for side in (0, 1):  # each picture of the four stands in as many true statements as in false ones
                true = Counter((e.rows[side][1], e.target) for e in four)
                assert all(true[p, 0] == true[p, 1] for p, _ in true) or four[0].kind == "more"
        for kind, most in (("one", 0.5), ("more", 0.75)):  # the best guess from the words and one picture's count
            for side in ("left", "right"):
                lists = [v for key, v in alone.items() if key[0] == kind and key[2] == side]
                hits = sum(max(sum(v), len(v) - sum(v)) for v in lists)
                assert hits <= most * seen[kind]


def test_choices_and_reasons_by_brute_force(task_graphs):
    for drawn, examples in both(task_graphs, "vcr"):
        places = Counter(e.target for e in examples)
        assert all(abs(places[i] / len(examples) - 0.25) < 4 * math.sqrt(0.19 / len(examples)) for i in range(4))
        for answer, reason in zip(*[iter(examples)] * 2, strict=True):
            assert answer.id == reason.id and (answer.kind, reason.kind) == ("answer", "reason")
            things = drawn[answer.rows[0][1]].things
            m = re.fullmatch(rf"what (color|shape) is the {THING}\?", answer.rows[0][0][0])
            (thing,) = matching(things, *m.groups()[1:])
            right = [getattr(thing, m[1]) == text[1] for text, _ in answer.rows]
            assert right.index(True) == answer.target and sum(right) == 1
            held = thing[1:3] in scenes.HELD_OUT
            assert held == (drawn[0].split == "compose")
            wrong = {(m[3] or t[1], m[4] if m[4] != "thing" else t[1]) for t, _ in answer.rows} - {thing[1:3]}
            assert not wrong & set(scenes.HELD_OUT) and len(wrong) == 3
            assert all(text[:2] == answer.rows[answer.target][0] for text, _ in reason.rows)
            others = [re.fullmatch(rf"it is with {A_THING}", text[2]).groups() for text, _ in reason.rows]
            right = [bool(matching(things, *other)) for other in others]
            assert right.index(True) == reason.target and sum(right) == 1
            assert len({c for _, c, _ in others}) == len({s for _, _, s in others}) == 2 and len(set(others)) == 4
            assert not {other[1:] for other in others} & set(scenes.HELD_OUT)


def test_expressions_fit_one_thing_and_each_thing_has_one(task_graphs):
    for drawn, examples in both(task_graphs, "refer"):
        compose, meant, kinds = drawn[0].split == "compose", {}, Counter()
        for example in examples:
            ((text, picture),) = example.rows
            things = drawn[picture].things
            m = re.fullmatch(rf"{THING}(?: (left of|right of|above|below) the middle)?", text)
            words = [None if w == "thing" else w for w in m.groups()[:3]]
            found, middle = matching(things, *words), scenes.SIDE / 2
            shared = [len(matching(things, *words[:i], None, *words[i + 1 :])) > 1 for i in range(3) if words[i]]
            assert len(shared) > 1
            if m[4]:
                off = {"left of": -1, "right of": 1}.get(m[4], 0), {"above": -1, "below": 1}.get(m[4], 0)
                offs = [(t.x - middle) * off[0] + (t.y - middle) * off[1] for t in found]
                assert example.kind == "side" and len(found) > 1 and all(abs(o) >= 12 for o in offs)
                found = [t for t, o in zip(found, offs, strict=True) if o > 0]
            else:
                assert any(shared) and example.kind == ("words" if all(shared) else "spare")
            (thing,) = found
            box = [thing.x - thing.half, thing.y - thing.half, thing.x + thing.half, thing.y + thing.half]
            assert np.allclose(np.array(example.target) * scenes.SIDE, box)
            assert bool(bound(text)) == compose
            meant.setdefault(picture, []).append(thing)
            kinds[example.kind] += 1
        for picture, found in meant.items():  # a picture alone leaves all its things equally likely
            assert len(set(found)) == len(found) and (compose or set(found) == set(drawn[picture].things))
        assert compose or (len(meant) > 0.5 * len(drawn) and min(kinds.values()) > 0.1 * len(examples))
        assert len(kinds) == 3


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def test_true_and_detected_boxes_of_the_same_expressions(cache):
    true, found = (scenes.scenes(split, "refer", 60, cache=cache) for split in ("test", "detected"))
    assert true.text == found.text and "object_probs" not in true.store.fields
    best = {}
    for name, dataset in (("true", true), ("detected", found)):
        for i, image in enumerate(dataset.image):
            boxes = torch.from_numpy(dataset.store.gather(dataset.image[i : i + 1])["boxes"].numpy()[0])
            best.setdefault(name, []).append(float(common.iou(boxes, torch.tensor(dataset.target[i]).float()).max()))
    assert min(best["true"]) > 0.999 and 0.6 < min(best["detected"]) and max(best["detected"]) < 0.999
