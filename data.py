"""Data: from files to batches. Knows no model.

    scenes (drawn, the embedded default) or JSONL -> region features on disk (FeatureStore)
      -> Dataset (texts, answers, picture rows) -> collate -> Batch -> mismatch, mask_words, mask_regions

What stands in for what: drawn scenes for COCO / Visual Genome, a jittered imitation for the Faster R-CNN
detector (bottom-up attention, Anderson 2018), raw 12x12 crops for its 2048-wide features.

Letters: B batch rows, T text positions, N regions, F region-feature width, K object classes with background
(class 0), A answers, V vocabulary, E examples, I pictures of a store, R regions of a store.
Masks: text_mask and region_mask True = real (not padding); masked_regions True = predict this.
Boxes: x1,y1,x2,y2; pixels in files, 0..1 in a Batch. Every random draw comes from a seed or a Generator handed in.
"""

import argparse
import contextlib
import dataclasses
import difflib
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import textwrap
import time
import warnings
import zipfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

CACHE = Path(".cache")
VERSION = 11  # raise it whenever scenes, detector or region features change: it is part of every cache key
SPLITS = ("train", "val", "test", "compose")
SCENES = {"train": 10_000, "val": 500, "test": 1_000, "compose": 500}  # pictures a split
TASKS = ("pretrain", "vqa", "ve", "nlvr2", "vcr", "retrieval", "refer", "caption")


class DataError(ValueError):
    """Something is wrong with the user's files. The message is one line: where, what is wrong, how to mend it."""

    def __init__(self, message):
        super().__init__(" ".join(message.split()))  # some messages of numpy and Pillow, quoted in ours, have more


@dataclass
class Batch:
    """Everything a model, an objective or a task head reads, as one flat container. None: the source has none."""

    text: torch.Tensor  # (B,T) int64 word pieces, 0 = padding
    text_mask: torch.Tensor  # (B,T) bool, True = real piece
    segments: torch.Tensor  # (B,T) int64 token types
    features: torch.Tensor  # (B,N,F) float32
    boxes: torch.Tensor  # (B,N,4) float32, 0..1
    region_mask: torch.Tensor  # (B,N) bool, True = real region
    region_types: torch.Tensor | None = None  # (B,N) int64, which picture of a pair
    masked_regions: torch.Tensor | None = None  # (B,N) bool, True = predict this
    # Index lists are made on the CPU: a boolean gather would make the GPU wait for its own count of True.
    word_index: torch.Tensor | None = None  # (M,) int64 into B*T, the pieces to predict
    word_labels: torch.Tensor | None = None  # (M,) int64, their original ids
    region_index: torch.Tensor | None = None  # (M,) int64 into B*N, the regions to predict
    clean_features: torch.Tensor | None = None  # (B,N,F) float32 before masking
    object_probs: torch.Tensor | None = None  # (B,N,K) float32, class 0 = background
    objects: torch.Tensor | None = None  # (B,N) int64 in 0..K-2: hard class, background left out
    object_conf: torch.Tensor | None = None  # (B,N) float32
    attributes: torch.Tensor | None = None  # (B,N) int64
    attribute_conf: torch.Tensor | None = None  # (B,N) float32
    matched: torch.Tensor | None = None  # (B,) int64, 1 = text and picture belong together
    answers: torch.Tensor | None = None  # (B,A) float32 soft targets
    answer_labels: torch.Tensor | None = None  # (B,) int64, one answer of each row, -1 = none
    target: torch.Tensor | None = None  # (B,) int64, a truth or a choice; (B,N) float, overlap with the box meant
    pictures: torch.Tensor | None = None  # (B,) int64, the picture's row in its store
    pair_index: torch.Tensor | None = None  # (M,) int64 into B, rows whose text and picture belong together
    ids: list | None = None  # B example ids, for error messages

    def _map(self, function):
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return Batch(**{k: function(v) if isinstance(v, torch.Tensor) else v for k, v in values.items()})

    def to(self, device, non_blocking=True):
        """The same batch on `device`; copies overlap with computation only from pinned memory."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin(self):
        """The same batch in page-locked memory. RuntimeError on a machine without an accelerator."""
        return self._map(lambda tensor: tensor.pin_memory())

    def rows(self, index):
        """Rows `index` (LongTensor). The flat lists word_index, word_labels, region_index, pair_index become None:
        they count positions of the whole batch, so mask after selecting."""
        flat = dataclasses.replace(self, word_index=None, word_labels=None, region_index=None, pair_index=None)
        part = flat._map(lambda tensor: tensor[index])
        part.ids = None if self.ids is None else [self.ids[i] for i in index.tolist()]
        return part


# ---------------------------------------------------------------------------------------------------------------------
# Scenes: pictures and an imitated detector

SIDE = 112  # pixels
SIZES = {"small": (7.0, 9.0), "large": (17.0, 20.0)}  # half-widths in pixels, clearly apart
COLORS = {
    "red": (214, 38, 38),
    "green": (40, 160, 60),
    "blue": (40, 75, 220),
    "yellow": (242, 224, 50),
    "purple": (135, 45, 175),
    "orange": (250, 140, 20),
    "cyan": (45, 215, 225),
    "pink": (250, 160, 200),
}
SHAPES = ("circle", "square", "triangle", "ring", "cross", "star")  # number i looks like number i + 3 (mod 6)
# Pairs that may stand in any picture, but that only texts of split "compose" put into words, in one expression or as
# question and answer: what a model says of them it has composed from colours and shapes that it knows apart.
HELD_OUT = tuple(zip(("cyan", "orange", "purple", "green", "yellow", "blue"), SHAPES))


class Thing(NamedTuple):
    """One thing in a scene: its words, which are what an expression says of it, and its place."""

    size: str
    color: str
    shape: str
    x: float  # centre, pixels
    y: float
    half: float  # half-width, pixels


@dataclass
class Scene:
    """The scene graph. An expression is a tuple (size, color, shape) with None for what is not said."""

    seed: int
    split: str
    index: int
    things: list[Thing]
    fits: dict = field(default_factory=dict)  # expression -> the things it fits, absent if there are none

    def count(self, expression):
        return len(self.fits.get(expression, ()))

    def key(self, purpose):
        """A seed for each purpose, so that a change of the texts leaves the pictures as they were."""
        return f"{self.seed}/{self.split}/{self.index}/{purpose}"


def make_scene(seed, split, index):
    """Scene graph number `index` of a split: 3 to 8 things. A pure function of its arguments.

    Colours and shapes are uniform; one thing in four repeats an earlier one's, so that there is something to count.
    Two boxes share at most a quarter of the smaller one's area, so that nothing is hidden.
    """
    scene = Scene(seed, split, index, [])
    rng, things = random.Random(scene.key("graph")), scene.things
    goal = rng.choices(range(3, 9), (8, 6, 4, 2, 1, 1))[0]  # few things more often than many
    for _ in range(200):
        if len(things) == goal:
            break
        color, shape, size = rng.choice(list(COLORS)), rng.choice(SHAPES), rng.choice(list(SIZES))
        if things and rng.random() < 0.25:
            color = rng.choice(things).color
        if things and rng.random() < 0.25:
            shape = rng.choice(things).shape
        if split == "compose" and len(things) < 2:
            color, shape = rng.choice(HELD_OUT)
        half = rng.uniform(*SIZES[size])
        thing = Thing(size, color, shape, rng.uniform(half, SIDE - half), rng.uniform(half, SIDE - half), half)
        for other in things:
            least = 2 * min(half, other.half)
            shared = [half + other.half - abs(d) for d in (thing.x - other.x, thing.y - other.y)]
            if min(shared) > 0 and min(shared[0], least) * min(shared[1], least) > 0.25 * least**2:
                break
        else:
            things.append(thing)
    rng.shuffle(things)  # paint order says nothing about how a thing came to be
    for thing in things:
        for expression in itertools.product(*((None, word) for word in thing[:3])):
            scene.fits.setdefault(expression, []).append(thing)
    return scene


def draw_scene(scene):
    """(SIDE, SIDE) RGB picture: dark ground, things, a soft gradient of light, gaussian noise of 8 levels of 255."""
    rng = np.random.default_rng(list(scene.key("drawing").encode()))
    canvas = Image.new("RGB", (2 * SIDE, 2 * SIDE), (int(rng.integers(16, 60)),) * 3)  # reduce() then smooths edges
    pen = ImageDraw.Draw(canvas)
    for thing in scene.things:
        color = tuple(np.clip(COLORS[thing.color] + rng.integers(-8, 9, 3), 0, 255).tolist())
        x, y, h = 2 * thing.x, 2 * thing.y, 2 * thing.half
        if thing.shape == "circle":
            pen.ellipse((x - h, y - h, x + h, y + h), fill=color)
        elif thing.shape == "ring":
            pen.ellipse((x - h, y - h, x + h, y + h), outline=color, width=round(0.45 * h))
        elif thing.shape == "square":
            pen.rectangle((x - h, y - h, x + h, y + h), fill=color)
        elif thing.shape == "triangle":
            pen.polygon([(x, y - h), (x + h, y + h), (x - h, y + h)], fill=color)
        elif thing.shape == "cross":
            pen.rectangle((x - h, y - 0.33 * h, x + h, y + 0.33 * h), fill=color)
            pen.rectangle((x - 0.33 * h, y - h, x + 0.33 * h, y + h), fill=color)
        else:  # star: ten corners, alternately on the rim and at 0.4 of it
            turns = [(math.pi * i / 5, h if i % 2 == 0 else 0.4 * h) for i in range(10)]
            pen.polygon([(x + r * math.sin(a), y - r * math.cos(a)) for a, r in turns], fill=color)
    down, across = rng.uniform(-12, 12, (2, 1)).astype(np.float32) * np.linspace(-1, 1, SIDE, dtype=np.float32)
    noise = rng.standard_normal((SIDE, SIDE, 3), dtype=np.float32) * 8
    pixels = np.asarray(canvas.reduce(2)) + noise + down[:, None, None] + across[:, None]
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def detect(scene):
    """What a detector would say of the scene: jittered boxes, 0 to 2 false ones, soft classes; in random order.

    Each side of a box moves by up to 8% of its width. Look-alike shapes (circle and ring, square and cross, triangle
    and star) get most of the doubt; 3% of the things are taken for another class. False boxes are half background.
    Returns a dict: boxes (N,4) pixels, object_probs (N,7), objects, object_conf, attributes, attribute_conf (N,).
    """
    rng = np.random.default_rng(list(scene.key("detector").encode()))
    x, y, half = np.array([thing[3:] for thing in scene.things]).T
    boxes = np.stack([x - half, y - half, x + half, y + half], 1)
    boxes += rng.uniform(-0.16, 0.16, boxes.shape) * half[:, None]
    false = int(rng.integers(0, 3))
    corner = rng.uniform(0, SIDE - 40, (false, 2))
    boxes = np.concatenate([boxes, np.concatenate([corner, corner + rng.uniform(14, 40, (false, 2))], 1)])

    def soften(truth, alike, classes):
        """(n,classes): 0.75..0.97 on the class taken for true, the rest at random with a bias to the likely error."""
        rows = np.arange(len(truth))
        wrong = rng.random(len(truth)) < 0.03
        top, second = np.where(wrong, alike, truth), np.where(wrong, truth, alike)
        rest = rng.random((len(truth), classes)) * 0.3
        rest[rows, second] += 1
        rest[rows, top] = 0
        mass = rng.uniform(0.75, 0.97, len(truth))
        probs = rest * ((1 - mass) / rest.sum(1))[:, None]
        probs[rows, top] = mass
        return probs

    shape = np.array([SHAPES.index(thing.shape) for thing in scene.things])
    color = np.array([list(COLORS).index(thing.color) for thing in scene.things])
    objects = soften(1 + shape, 1 + (shape + 3) % 6, 7)
    colors = soften(color, (color + rng.integers(1, 8, len(color))) % 8, 8)
    objects = np.concatenate([objects, rng.dirichlet((7, 1, 1, 1, 1, 1, 1), false)])
    colors = np.concatenate([colors, rng.dirichlet(np.full(8, 2.0), false)])
    order = rng.permutation(len(boxes))
    return {
        "boxes": np.clip(boxes, 0, SIDE)[order],
        "object_probs": objects[order],
        "objects": objects[order, 1:].argmax(1),
        "object_conf": objects[order, 1:].max(1),
        "attributes": colors[order].argmax(1),
        "attribute_conf": colors[order].max(1),
    }


# ---------------------------------------------------------------------------------------------------------------------
# Scenes: captions and questions

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight")
DIRECTIONS = {"left": "left of", "right": "right of", "above": "above", "below": "below"}
PLURAL = {shape: shape + "s" for shape in SHAPES} | {"cross": "crosses", None: "things"}
CONTENT_WORDS = {*SIZES, *COLORS, *PLURAL.values(), *SHAPES, *NUMBERS[1:], *DIRECTIONS} - {"things"}
# Every expression of a form; a form tells which of size, colour and shape are said.
EXPRESSIONS = {
    form: list(itertools.product(*(tuple(w) if said else (None,) for w, said in zip((SIZES, COLORS, SHAPES), form))))
    for form in itertools.product((0, 1), repeat=3)
}
C, S, CS, ZC, ZS, ZCS = (0, 1, 0), (0, 0, 1), (0, 1, 1), (1, 1, 0), (1, 0, 1), (1, 1, 1)  # Z size, C colour, S shape
QUESTIONS = {  # kind: forms of expression, phrases
    "exists": ((ZCS, CS, ZS, ZC), ("is there {a}?", "can you see {a}?")),
    "count": ((C, S, C, S, CS), ("how many {many} are there?", "what is the number of {many}?")),
    "color": ((S, ZS), ("what color is the {one}?", "what is the color of the {one}?")),
    "shape": ((C, ZC), ("what shape is the {one}?", "what is the shape of the {one}?")),
    "size": ((C, S, CS), ("what size is the {one}?", "is the {one} small or large?")),
    "compare": (((C, C), (S, S), (C, S), (CS, CS)), ("are there {word} {many} than {other}?",)),
    "side": ((C, S, CS, ZS), ("is the {one} {word} the middle?", "does the {one} lie {word} the middle?")),
}


def say(expression, plural=False, article=False):
    """("small", "red", None) -> "small red thing"."""
    size, color, shape = expression
    words = " ".join(word for word in (size, color, PLURAL[shape] if plural else shape or "thing") if word)
    return ("an " if words[0] == "o" else "a ") + words if article else words


def direction(a, b):
    """Where a lies as seen from b: a key of DIRECTIONS, or None unless one axis has 20 px and 1.5 times the other."""
    dx, dy = a.x - b.x, a.y - b.y
    if max(abs(dx), abs(dy)) < max(20, 1.5 * min(abs(dx), abs(dy))):
        return None
    if abs(dx) > abs(dy):
        return "left" if dx < 0 else "right"
    return "above" if dy < 0 else "below"


def may_say(scene, *expressions, asked=None):
    """True if the split may have a text of these expressions that asks for the colour or shape of the thing `asked`:
    "compose" only if a held-out pair is put into words, by an expression or with the answer; the others only if not."""
    pairs = {e[1:] for e in expressions} | ({asked[1:3]} if asked else set())
    return (scene.split == "compose") == any(pair in HELD_OUT for pair in pairs)


def captions(scene, count=8):
    """Up to `count` true captions of which every content word can be found from the picture and the other words.

    A single thing is named by colour and shape where no other thing has either; else by size, colour and shape, if no
    other shares two of the three. Counted things are named by (colour and) shape, only where no other colour or shape
    has the same count. Two captions in five place a thing, by another thing or by a half of the picture. A caption has
    a relation of two things and another clause, or three clauses, so that it fits few pictures.
    """
    rng, found = random.Random(scene.key("captions")), {}
    names = {}  # thing -> expression
    for thing in scene.things:
        if scene.count((None, thing.color, None)) == scene.count((None, None, thing.shape)) == 1:
            names[thing] = (None, *thing[1:3])
        elif all(sum(map(str.__eq__, t[:3], thing[:3])) < 2 for t in scene.things if t is not thing):
            names[thing] = thing[:3]
    relations, halves, others = [], [], []  # (phrases, expressions) of a clause
    for (one, e), (other, f) in itertools.permutations(names.items(), 2):
        if where := direction(one, other):
            full = f"{say(e, article=True)} is {DIRECTIONS[where]} {say(f, article=True)}"
            relations.append(((f"{say(e)} {DIRECTIONS[where]} {say(f)}", full), (e, f)))
    for thing, e in names.items():
        others.append(((say(e), f"there is {say(e, article=True)}"), (e,)))
        for off, words in ((thing.x - SIDE / 2, ("left of", "right of")), (thing.y - SIDE / 2, ("above", "below"))):
            if abs(off) >= 12:
                halves.append(((f"{say(e)} {words[off > 0]} the middle",), (e,)))
    for e in scene.fits:
        same = [(None, e[1], s) for s in SHAPES if s != e[2]]
        same += [(None, c, e[2]) for c in COLORS if e[1] and c != e[1]]
        if e[0] is None and e[2] and all(scene.count(rival) != scene.count(e) for rival in same):
            number = scene.count(e)
            words = f"{NUMBERS[number]} {say(e, plural=number > 1)}"
            others.append(((f"exactly {words}", words)[: 1 + (number > 1)], (e,)))  # "one" alone might be an adjective
    if scene.split != "compose":
        lists = relations, halves, others
        relations, halves, others = ([c for c in clauses if may_say(scene, *c[1])] for clauses in lists)
    for _ in range(8 * count):
        places = relations if rng.random() < 0.3 else halves
        clauses = rng.sample(places, 1) if places and rng.random() < 0.4 else []
        goal = 2 if places is relations and clauses else 3
        for clause in rng.sample(others, len(others)):
            told = {thing for _, expressions in clauses for e in expressions for thing in scene.fits[e]}
            if len(clauses) < goal and not told.issuperset(scene.fits[clause[1][0]]):
                clauses.append(clause)
        expressions = [e for _, expressions in clauses for e in expressions]
        if len(found) < count and len(expressions) > 1 and may_say(scene, *expressions):
            rng.shuffle(clauses)
            found[" and ".join(rng.choice(phrases) for phrases, _ in clauses)] = None
    return list(found)


def questions(scene, count=8):
    """Up to `count` different (kind, question, answer).

    Drawn in this order, so that a question's words say little about its answer: the kind, the form of expression, the
    answer among those that the scene offers, and only then the words.
    """
    rng, found = random.Random(scene.key("questions")), {}
    for _ in range(20 * count):
        if len(found) == count:
            break
        kind = rng.choice([*QUESTIONS, "side"])  # twice as often, being the last to be learned
        forms, phrases = QUESTIONS[kind]
        if scene.split == "compose":  # name the pair where the form allows: a "no" then names one as a "yes" does
            forms = [form for form in forms if form in (CS, ZCS, (CS, CS))] or forms
        form, offers, word = rng.choice(forms), {}, None  # offers: answer -> [(expression, the other one)]
        if kind == "compare":
            word = rng.choice(("more", "fewer"))
            for _ in range(30):
                e, f = (rng.choice(EXPRESSIONS[part]) for part in rng.sample(form, 2))
                n, m = scene.count(e), scene.count(f)
                if e != f and n + m > 0 and may_say(scene, e, f):
                    offers.setdefault("yes" if (n > m if word == "more" else n < m) else "no", []).append((e, f))
        elif kind == "side":
            word = rng.choice(("left or right of", "above or below"))
            for e in EXPRESSIONS[form]:
                if scene.count(e) == 1 and may_say(scene, e):
                    thing = scene.fits[e][0]
                    off = (thing.x if word.startswith("left") else thing.y) - SIDE / 2
                    if abs(off) >= 12:
                        offers.setdefault(word.split()[0 if off < 0 else 2], []).append((e, e))
        else:
            for e in EXPRESSIONS[form]:
                n = scene.count(e)
                answer = {"exists": "yes" if n else "no", "count": str(n)}.get(kind)
                thing = scene.fits[e][0] if answer is None and n == 1 else None
                answer = getattr(thing, kind) if thing else answer
                if answer and may_say(scene, e, asked=thing if kind in ("color", "shape") else None):
                    offers.setdefault(answer, []).append((e, e))
        if offers and (len(offers) > 1 or kind not in ("exists", "compare")):
            # large counts are rare in pictures, so they are taken more often where they are on offer
            answer = rng.choices(list(offers), [max(1, int(a)) if kind == "count" else 1 for a in offers])[0]
            e, f = rng.choice(offers[answer])
            words = {"a": say(e, article=True), "one": say(e), "many": say(e, plural=True)}
            other = say(f, plural=kind == "compare")
            text = rng.choice(phrases).format(**words, other=other, word=word)
            found.setdefault(text, (kind, text, answer))
    return list(found.values())


# ---------------------------------------------------------------------------------------------------------------------
# Scenes: the tasks of more than a caption or a question. Each function takes the scene graphs of a split and draws from
# its own seed. Statements are drawn once and then put to pictures of every answer, so that words alone tell nothing.

ENTAILMENT = ("contradiction", "entailment", "neutral")  # in the papers' order


class Example(NamedTuple):
    """One example: its rows are what a model reads, equally many in every example of a task."""

    id: str
    kind: str
    rows: list  # [(text, or a tuple of its segments; number of the picture)]
    answer: dict | None = None  # {answer: score}
    target: object = -1  # what the task asks for: see Dataset


def entailments(graphs):
    """Visual entailment: "the circle is red" of three pictures. It follows where the only circle is red, is
    contradicted where that has another colour, and is neutral where there is no circle to speak of: such a picture
    leaves it open. Every statement comes once with each answer, in pictures with equally many things. Of sizes "large"
    is said four times as often as "small": were they said alike, word and size would have to be read at once or not
    at all, and a model does not begin."""
    rng, single, alike = random.Random(graphs[0].key("entailments")), {}, {}
    for number, scene in enumerate(graphs):
        alike.setdefault(len(scene.things), []).append(number)
        for e, things in scene.fits.items():
            if len(things) == 1:
                single.setdefault((e, len(scene.things)), []).append(number)
    for k in range(3 * len(graphs)):
        number = k % len(graphs)
        scene, kind = graphs[number], rng.choice(("color", "shape", "size"))
        forms = {"color": (S, ZS), "shape": (C, ZC), "size": (C, S, CS)}[kind]
        about = [e for e in EXPRESSIONS[rng.choice(forms)] if scene.count(e) == 1]
        if not about:
            continue
        e = rng.choice(about)
        value = getattr(scene.fits[e][0], kind)
        full = {"color": (e[0], value, e[2]), "shape": (*e[:2], value), "size": e}[kind]
        if not may_say(scene, full) or (value == "small" and rng.random() < 0.75):
            continue
        text = f"the {say(e)} is {say((None, None, value), article=True) if kind == 'shape' else value}"
        rivals, strangers = single[e, len(scene.things)], alike[len(scene.things)]
        other = draw(rng, rivals, lambda i, e=e, kind=kind, value=value: getattr(graphs[i].fits[e][0], kind) != value)
        absent = draw(rng, strangers, lambda i, e=e: not graphs[i].count(e))
        if other is not None and absent is not None:
            for answer, picture in zip(ENTAILMENT, (other, number, absent)):
                yield Example(f"{scene.split}/{k}/{answer}", kind, [(text, picture)], {answer: 1.0})


def draw(rng, pool, fits, tries=50):
    """A random member of `pool` that fits, or None if none of `tries` draws does."""
    for _ in range(tries):
        if pool and fits(member := rng.choice(pool)):
            return member
    return None


def statements_of_two(graphs):
    """NLVR2-like statements of two pictures, in fours of which two are true; target 1 = true.

    "exactly one picture shows a red circle": two left pictures, with one and without, meet two right ones, so neither
    picture alone says anything. "more circles on the left than on the right", and "fewer": of two pictures with n and
    n + 1 circles, n = 0, 1 or 2, in both orders, so one picture alone decides in a third of the pairs, by 0 or 3.
    """
    rng, counts = random.Random(graphs[0].key("statements of two")), {}
    for number, scene in enumerate(graphs):
        for e, things in scene.fits.items():
            counts.setdefault((e, len(things)), []).append(number)
    for k in range(2 * len(graphs)):
        form = rng.choice((C, S, CS))
        e = rng.choice([e for e in EXPRESSIONS[form] if may_say(graphs[0], e)] or [(None, *rng.choice(HELD_OUT))])
        if rng.random() < 0.5:
            text = f"exactly one picture shows {say(e, article=True)}"
            fits = [lambda i, e=e: graphs[i].count(e), lambda i, e=e: not graphs[i].count(e)]
            left, right = ([draw(rng, range(len(graphs)), fit, 200) for fit in fits] for _ in range(2))
            four = [(text, a, b, int(i != j)) for i, a in enumerate(left) for j, b in enumerate(right)]
            kind = "one"
        else:
            n = rng.choice((0, 1, 2))
            pools = range(len(graphs)) if n == 0 else counts.get((e, n), ()), counts.get((e, n + 1), ())
            a, b = (draw(rng, pool, lambda i, e=e, m=m: graphs[i].count(e) == m) for pool, m in zip(pools, (n, n + 1)))
            text = f"{{}} {say(e, plural=True)} on the left than on the right"
            four = [(text.format(w), *p, int((w == "more") == (p == (b, a)))) for w in ("more", "fewer")
                    for p in ((a, b), (b, a))]  # fmt: skip
            kind = "more"
        if all(a is not None and b is not None and a != b for _, a, b, _ in four):
            for number, (text, a, b, true) in enumerate(four):
                yield Example(f"{graphs[0].split}/{k}/{number}", kind, [(text, a), (text, b)], target=true)


def choices_with_reasons(graphs):
    """VCR-like: a question of a thing's colour or shape with four answers, then the right answer with four reasons:
    which thing is in the picture as well? Answers are, where they can be, colours or shapes of the picture. The
    reasons cross two colours with two shapes, of which one pair is there. target: the right choice, 0 to 3."""
    for number, scene in enumerate(graphs):
        rng = random.Random(scene.key("choices"))
        kind, form = rng.choice((("color", S), ("shape", C)))
        about = [e for e in EXPRESSIONS[form] if scene.count(e) == 1 and may_say(scene, e, asked=scene.fits[e][0])]
        pairs = [e for e in EXPRESSIONS[CS] if e[1:] not in HELD_OUT]
        there = [e for e in pairs if scene.count(e)]
        if not about or not there:
            continue
        e = rng.choice(about)
        thing = scene.fits[e][0]
        right, words = getattr(thing, kind), COLORS if kind == "color" else SHAPES
        answers = [w for w in words if w != right and ((w, e[2]) if kind == "color" else (e[1], w)) not in HELD_OUT]
        rng.shuffle(answers)
        answers = [right, *sorted(answers, key=lambda w: all(getattr(t, kind) != w for t in scene.things))[:3]]
        _, color, shape = rng.choice(there)
        away = [e[1:] for e in pairs if not scene.count(e)]
        crossed = [(c, s) for c, s in away if (c, shape) in away and (color, s) in away]
        if (color, shape) == thing[1:3] or not crossed:
            continue
        c, s = rng.choice(crossed)
        reasons = [(None, a, b) for a in (color, c) for b in (shape, s)]
        question, where = f"what {kind} is the {say(e)}?", f"{scene.split}/{number}"
        orders = rng.sample(range(4), 4), rng.sample(range(4), 4)
        rows = [((question, answers[i]), number) for i in orders[0]]
        yield Example(where, "answer", rows, target=orders[0].index(0))
        rows = [((question, right, f"it is with {say(reasons[i], article=True)}"), number) for i in orders[1]]
        yield Example(where, "reason", rows, target=orders[1].index(0))


def referring_expressions(graphs):
    """Referring expressions that fit exactly one thing, one for each thing of a picture; target: its box, 0..1.

    Kinds, the first that a thing has: "words", of which none can be left out, as every one is shared with a distractor;
    "side", where the half of the picture tells things apart that the words do not; "spare", of whose words one is
    needed and shared, another not. Pictures with a thing that has none are left out, so that a picture alone tells
    nothing; not in split "compose", where only things of held-out pairs are meant.
    """
    for number, scene in enumerate(graphs):
        rng, found = random.Random(scene.key("expressions")), {thing: {} for thing in scene.things}
        for e, things in scene.fits.items():
            if not may_say(scene, e) or sum(map(bool, e)) < 2:
                continue
            shorter = [tuple(w if i != left else None for i, w in enumerate(e)) for left in range(3) if e[left]]
            shared = [scene.count(f) > 1 for f in shorter]
            if len(things) == 1 and any(shared):
                found[things[0]].setdefault("words" if all(shared) else "spare", []).append(say(e))
            for axis, (low, high) in (("x", ("left of", "right of")), ("y", ("above", "below"))):
                offs = sorted((getattr(t, axis) - SIDE / 2, t) for t in things)
                if len(offs) > 1 and offs[0][0] <= -12 and offs[1][0] >= 12:
                    found[offs[0][1]].setdefault("side", []).append(f"{say(e)} {low} the middle")
                if len(offs) > 1 and offs[-1][0] >= 12 and offs[-2][0] <= -12:
                    found[offs[-1][1]].setdefault("side", []).append(f"{say(e)} {high} the middle")
        if scene.split != "compose" and not all(found.values()):
            continue
        for k, (t, texts) in enumerate(found.items()):
            if kind := next((kind for kind in ("words", "side", "spare") if kind in texts), None):
                box = [v / SIDE for v in (t.x - t.half, t.y - t.half, t.x + t.half, t.y + t.half)]
                yield Example(f"{scene.split}/{number}/{k}", kind, [(rng.choice(texts[kind]), number)], target=box)


SCENE_TASKS = {
    "ve": entailments,
    "nlvr2": statements_of_two,
    "vcr": choices_with_reasons,
    "refer": referring_expressions,
}


# ---------------------------------------------------------------------------------------------------------------------
# Region features and their store on disk


def grid_boxes(width, height, cells=6):
    """(1 + cells^2, 4) float32 pixels: the whole picture, then cells x cells equal parts row by row."""
    x, y = np.linspace(0, width, cells + 1), np.linspace(0, height, cells + 1)
    parts = [(x[i], y[j], x[i + 1], y[j + 1]) for j in range(cells) for i in range(cells)]
    return np.array([(0, 0, width, height), *parts], np.float32)


def region_features(image, boxes, patch=12):
    """(N, 3*patch*patch) float32: each box resized to patch x patch by bicubic filtering, rows of RGB pixels,
    standardised as (value/255 - 0.5) / 0.25, hence in -2..2.

    image: PIL picture of any mode.   boxes: (N,4) pixels inside it (ValueError by Pillow otherwise).
    """
    image, size = image.convert("RGB"), (patch, patch)
    crops = [np.asarray(image.resize(size, Image.Resampling.BICUBIC, tuple(box))) for box in np.array(boxes).tolist()]
    pixels = np.array(crops, np.float32).reshape(len(crops), 3 * patch * patch)  # (N,patch,patch,3) -> (N,F)
    return (pixels / 255 - 0.5) / 0.25


def ragged(offsets, index, pad_to=1):
    """Rows `index` (B,) of a flat array in which row i is offsets[i]:offsets[i+1].
    Returns a mask (B,L), True = inside the row, L the longest rounded up to a multiple of pad_to, and the positions of
    its True entries in the flat array."""
    start, length = offsets[index], np.diff(offsets)[index]
    steps = np.arange(-(-length.max(initial=0) // pad_to) * pad_to)
    mask = steps < length[:, None]
    return mask, (start[:, None] + steps)[mask]


STORED = {
    "features": np.float16,
    "boxes": np.float32,
    "object_probs": np.float16,
    "objects": np.int64,
    "object_conf": np.float32,
    "attributes": np.int64,
    "attribute_conf": np.float32,
}


class FeatureStore:
    """Regions of I pictures in a folder, memory-mapped: a .npy of R rows for each field of STORED that the source has
    (`features` and `boxes`, 0..1, always); picture i has rows offsets[i]:offsets[i+1]. extra.json holds what belongs
    to the pictures and is no array: the texts of scenes, warnings."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.offsets = np.load(self.folder / "offsets.npy")
        files = {name: self.folder / f"{name}.npy" for name in STORED}
        self.fields = {name: np.load(file, mmap_mode="r") for name, file in files.items() if file.exists()}
        self.width = self.fields["features"].shape[1]  # F
        self.classes = self.fields["object_probs"].shape[1] if "object_probs" in self.fields else None  # K

    def __len__(self):
        return len(self.offsets) - 1

    def extra(self):
        return json.loads((self.folder / "extra.json").read_text())

    def gather(self, images, pad_to=1):
        """images: (B,) int64. Returns Batch's region fields as a dict of (B,N,...) tensors, N a multiple of pad_to;
        float16 becomes float32, and where region_mask is False all is zero."""
        mask, rows = ragged(self.offsets, images, pad_to)  # (B,N)
        out = {"region_mask": torch.from_numpy(mask)}
        for name, array in self.fields.items():
            padded = np.zeros(mask.shape + array.shape[1:], np.int64 if array.dtype == np.int64 else np.float32)
            padded[mask] = array[rows]
            out[name] = torch.from_numpy(padded)
        return out


def write_store(folder, parts):
    """parts: iterable of (pictures, extra): a list of {field: (n,...) array}, all with the same fields, and a list of
    anything for extra.json. Rows go straight to disk, so a store may be larger than memory."""
    files, shapes, offsets, extras = {}, {}, [0], []
    with contextlib.ExitStack() as stack:

        def header(name):  # numpy pads a header so that it can be written again once the rows are counted
            files[name].seek(0)
            layout = {"descr": np.dtype(STORED[name]).str, "fortran_order": False}
            np.lib.format.write_array_header_1_0(files[name], layout | {"shape": (offsets[-1], *shapes[name])})

        for pictures, extra in parts:
            extras += extra
            for picture in pictures:
                for name, array in picture.items():
                    if name not in files:
                        files[name] = stack.enter_context(open(folder / f"{name}.npy", "wb"))
                        shapes[name] = array.shape[1:]
                        header(name)
                    files[name].write(array.astype(STORED[name]).tobytes())
                offsets.append(offsets[-1] + len(array))
        for name in files:
            header(name)
    np.save(folder / "offsets.npy", np.array(offsets))
    (folder / "extra.json").write_text(json.dumps(extras))


def cached_store(cache, name, key, parts):
    """The store of `key` in folder `cache`, made by write_store(parts()) if it is not there yet. It is written aside
    and renamed: a store is whole or absent, and of two processes that race both read the first one's."""
    folder = Path(cache) / f"{name}-{hashlib.sha256(json.dumps([VERSION, key]).encode()).hexdigest()[:16]}"
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=cache))
        try:
            write_store(aside, parts())
            aside.rename(folder)
        except OSError:
            if not folder.exists():
                raise
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    return FeatureStore(folder)


def parallel(work, jobs, label):
    """Yields work(job) in order, from a process per CPU; progress on stderr once it has taken a second."""
    workers, terminal = min(os.cpu_count() or 1, len(jobs)), sys.stderr.isatty()
    # fork on Linux: a fresh interpreter would spend longer importing torch than on the work
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
    start, shown = time.monotonic(), 0.0
    with ProcessPoolExecutor(workers, context) if workers > 1 else contextlib.nullcontext() as pool:
        for done, result in enumerate(pool.map(work, jobs) if pool else map(work, jobs), 1):
            yield result
            spent = time.monotonic() - start
            if spent > 1 and (spent - shown > (0.2 if terminal else 10) or shown and done == len(jobs)):
                shown, end = spent, "\r" if terminal and done < len(jobs) else "\n"
                print(f"{label}: {100 * done // len(jobs)}%, {spent:.0f} s", end=end, file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# Datasets


@dataclass
class Dataset:
    """Examples: texts, answers and the store's row of each one's picture. After encode() also their word pieces.

    An example has `group` rows, side by side in `image`, `text` and what encode() makes of it: two pictures with one
    statement (nlvr2), a question with each choice (vcr), else one. Everything else has one entry an example. E
    examples have R rows.
    """

    name: str
    split: str
    store: FeatureStore
    image: np.ndarray  # (R,) int64 row in store
    text: list[str]  # R; where a text has segments (vcr), a tuple of them
    answer: list[dict]  # {answer: score}, empty where there is none
    kind: list[str]  # "caption", or what is asked for
    ids: list[str]
    tokens: np.ndarray | None = None  # flat int64 pieces, row i at offsets[i]:offsets[i+1]
    offsets: np.ndarray | None = None
    target: np.ndarray | None = None  # nlvr2 (E,) 1 = true; vcr (E,) the right choice; refer (E,4) the box, 0..1
    group: int = 1  # rows of an example
    segment: np.ndarray | None = None  # flat int64 like tokens: the number of each piece's segment, 0 for a plain text

    def __len__(self):
        return len(self.ids)

    def parts(self):
        """All texts, those of segments apart."""
        return [part for text in self.text for part in (text if isinstance(text, tuple) else (text,))]

    def rows(self, index):
        """The rows of examples `index` (B,) -> (B * group,)."""
        return (np.asarray(index)[:, None] * self.group + np.arange(self.group)).ravel()

    def encode(self, tokenizer, max_length=64):
        """Fills tokens and offsets with [CLS] pieces [SEP], at most max_length of them, [SEP] kept. Returns self.

        Segments are each followed by [SEP]. A separator counts to the segment after it, the last one to its own, as in
        UNITER's VCR. Of texts that are too long the first segment loses its end first: the choices differ in the last.
        """
        first, last = tokenizer.token_to_id("[CLS]"), tokenizer.token_to_id("[SEP]")
        texts = [text if isinstance(text, tuple) else (text,) for text in self.text]
        encoded = iter(tokenizer.encode_batch([*itertools.chain(*texts)], add_special_tokens=False))
        rows, segments = [], []
        for text in texts:
            parts = [next(encoded).ids for _ in text]
            left = max_length - 1 - len(parts)
            for i in reversed(range(len(parts))):
                parts[i] = parts[i][:left]
                left -= len(parts[i])
            rows.append([first, *itertools.chain.from_iterable([*part, last] for part in parts)])
            segments.append([0, *(min(i + (k == len(part)), len(parts) - 1) for i, part in enumerate(parts)
                                  for k in range(len(part) + 1))])  # fmt: skip
        self.tokens = np.fromiter(itertools.chain.from_iterable(rows), np.int64)
        self.segment = np.fromiter(itertools.chain.from_iterable(segments), np.int64)
        self.offsets = np.cumsum([0, *map(len, rows)])
        return self

    def lengths(self):
        """(E, 2) int64: word pieces and regions of each example, of the longest of its rows."""
        rows = np.stack([np.diff(self.offsets), np.diff(self.store.offsets)[self.image]], 1)  # (R, 2)
        return rows.reshape(-1, self.group, 2).max(1)  # (R, 2) -> (E, group, 2) -> (E, 2)

    def subset(self, index):
        """Examples `index` (integers); a single number takes that many at random, always the same ones."""
        if np.ndim(index) == 0:
            index = np.sort(np.random.default_rng(0).permutation(len(self))[:index])  # evenly spaced could hit one kind
        lists = {name: [getattr(self, name)[i] for i in index] for name in ("answer", "kind", "ids")}
        rows = self.rows(index)
        part = dataclasses.replace(self, image=self.image[rows], text=[self.text[i] for i in rows], **lists)
        part.target = None if self.target is None else self.target[index]
        if self.tokens is not None:
            mask, positions = ragged(self.offsets, rows)
            part.tokens, part.segment = self.tokens[positions], self.segment[positions]
            part.offsets = np.cumsum([0, *mask.sum(1)])
        return part


def make_dataset(name, split, store, examples, images=None):
    """Dataset of Examples. images: the store's row of each picture number; None: they are the same."""
    examples = list(examples)
    rows = [row for example in examples for row in example.rows]
    image = np.array([number if images is None else images[number] for _, number in rows], np.int64)
    lists = [[e.answer or {} for e in examples], [e.kind for e in examples], [e.id for e in examples]]
    group = len(examples[0].rows) if examples else 1
    target = np.array([example.target for example in examples])
    return Dataset(name, split, store, image, [text for text, _ in rows], *lists, target=target, group=group)


def normalize_answer(text):
    """Answers are compared without case and outer spaces."""
    return text.lower().strip()


def answer_list(dataset):
    """Every answer of the dataset, the most frequent first, equals by text."""
    counts = Counter(answer for answers in dataset.answer for answer in answers)
    return sorted(counts, key=lambda answer: (-counts[answer], answer))


def scene_chunk(job):
    """Regions and texts of scenes start..stop-1. Every scene's extra: a list of (kind, text, answer or None)."""
    seed, split, start, stop = job
    pictures, texts = [], []
    for scene in (make_scene(seed, split, index) for index in range(start, stop)):
        regions = detect(scene)
        features = region_features(draw_scene(scene), regions["boxes"])
        pictures.append({**regions, "features": features, "boxes": regions["boxes"] / SIDE})
        texts.append([("caption", caption, None) for caption in captions(scene)] + questions(scene))
    return pictures, texts


def true_chunk(job):
    """Regions cut along the true boxes of scenes start..stop-1, in no telling order; no classes, no texts."""
    seed, split, start, stop = job
    pictures = []
    for scene in (make_scene(seed, split, index) for index in range(start, stop)):
        x, y, half = np.array([thing[3:] for thing in scene.things]).T
        boxes = np.stack([x - half, y - half, x + half, y + half], 1)
        pictures.append({"features": region_features(draw_scene(scene), boxes), "boxes": boxes / SIDE})
    return pictures, []


def scenes(split, task, count=None, seed=0, cache=CACHE):
    """The first `count` drawn scenes of a split (default SCENES[split]) with the texts that the task needs: captions and
    some questions for "pretrain", questions for "vqa", captions for "caption" and "retrieval", those of SCENE_TASKS
    for the others.
    Task "refer" has the things' true boxes for regions; its split "detected" is "test" with the detector's. DataError
    for anything else."""
    true = task == "refer" and split != "detected"
    split, shown = "test" if split == "detected" and task == "refer" else split, split
    if split not in SPLITS:
        raise DataError(f"scenes have no split {split!r}; choose from {', '.join(SPLITS)}")
    if task not in TASKS:
        raise DataError(f"scenes have no task {task!r}; choose from {', '.join(TASKS)}")
    count = SCENES[split] if count is None else count
    jobs = [(seed, split, start, min(start + 50, count)) for start in range(0, count, 50)]
    label = f"drawing {count} {split} scenes"
    name, chunk, key = ("boxes-", true_chunk, ["true boxes"]) if true else ("scenes-", scene_chunk, [])
    store = cached_store(cache, name + split, [split, count, seed, *key], lambda: parallel(chunk, jobs, label))
    if task in SCENE_TASKS:
        graphs = [make_scene(seed, split, index) for index in range(count)]
        return make_dataset("scenes", shown, store, SCENE_TASKS[task](graphs))
    dataset = Dataset("scenes", split, store, None, [], [], [], [])
    image = []
    for index, texts in enumerate(store.extra()):
        if task == "pretrain":  # a question for every four captions: most questions go with any picture
            texts = texts[: sum(kind == "caption" for kind, *_ in texts) * 5 // 4]
        for number, (kind, text, answer) in enumerate(texts):
            if task == "pretrain" or (kind == "caption") == (task != "vqa"):
                image.append(index)
                dataset.text.append(text)
                dataset.answer.append({} if answer is None else {answer: 1.0})
                dataset.kind.append(kind)
                dataset.ids.append(f"{split}/{index}/{number}")
    dataset.image = np.array(image, np.int64)
    return dataset


def scene_texts(count=300):
    """The texts of all SCENE_TASKS on a few training scenes: enough to know their words."""
    graphs = [make_scene(0, "train", index) for index in range(count)]
    examples = (example for task in SCENE_TASKS.values() for example in task(graphs))
    texts = (text for example in examples for text, _ in example.rows)
    return [part for text in texts for part in (text if isinstance(text, tuple) else (text,))]


def load(data, task, split, limit=None, patch=12, grid=6, cache=CACHE):
    """Dataset from data = "scenes" or the path of a .jsonl file. A split that the file lacks is an empty Dataset.
    limit: at most that many examples, drawn at random. DataError for whatever is wrong with the request or the files."""
    if data == "scenes":
        count = None if limit is None else min(limit, SCENES.get(split, 0))
        dataset = scenes(split, task, count, cache=cache)
    else:
        dataset = load_jsonl(data, task, split, patch, grid, cache)
    return dataset if limit is None else dataset.subset(limit)


# ---------------------------------------------------------------------------------------------------------------------
# Own data: JSONL


def is_text(value):
    """A string that says something."""
    return isinstance(value, str) and bool(value.strip())


def is_texts(value, least=1):
    """A list of at least `least` such strings."""
    return isinstance(value, list) and len(value) >= least and all(map(is_text, value))


def is_box(value):
    """Four finite numbers; their order is checked where the picture is known."""
    numbers = isinstance(value, list) and len(value) == 4 and all(type(v) in (int, float) for v in value)
    return numbers and all(map(math.isfinite, value))


def is_answer(value):
    """One answer, or soft scores {answer: 0..1}."""
    soft = isinstance(value, dict) and value and all(map(is_text, value))
    return is_text(value) or soft and all(type(v) in (int, float) and 0 <= v <= 1 for v in value.values())


KEYS = {  # key: test of its value, what to write
    "image": (is_text, "a file name"),
    "images": (lambda v: is_texts(v) and len(v) == 2, "a list of two file names"),
    "features": (lambda v: is_text(v) or is_texts(v) and len(v) == 2, "a file name (nlvr2: a list of two)"),
    "boxes": (lambda v: isinstance(v, list) and v and all(map(is_box, v)), "[[x1,y1,x2,y2],...] in pixels"),
    "text": (is_text, "a string that is not empty"),
    "answer": (is_answer, "a string, or {string: score in 0..1}"),
    "label": (lambda v: type(v) in (bool, int), "true or false (nlvr2), or the index of the right choice (vcr)"),
    "choices": (lambda v: is_texts(v, 2), "a list of at least two strings"),
    "reasons": (lambda v: is_texts(v, 2), "a list of at least two strings"),
    "reason": (lambda v: type(v) is int, "the index of the right one of 'reasons'"),
    "target": (is_box, "[x1,y1,x2,y2] in pixels"),
    "split": (lambda v: v in SPLITS[:3], "train, val or test"),
    "kind": (is_text, "a word for the sort of question; accuracy is given for each sort"),
}
NEEDED = {"vqa": ("answer",), "ve": ("answer",), "nlvr2": ("label",), "vcr": ("choices", "label"), "refer": ("target",)}


def require(ok, where, what):
    """DataError "where: what" unless ok."""
    if not ok:
        raise DataError(f"{where}: {what}")


def read_jsonl(path, task):
    """Checks every line of a JSONL file; opens no picture. Returns a list of dicts: the line's keys with split filled
    in and answer as {text: score}, `paths` to its one or two files, `where` = "<file>:<line number>"."""
    path, records = Path(path), []
    require(task in TASKS, path, f"unknown task {task!r}; choose from {', '.join(TASKS)}")
    require(path.is_file(), path, "no such file; give 'scenes' or the path of a .jsonl file")
    for number, line in enumerate(path.read_text(encoding="utf-8-sig", errors="replace").split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            record = json.loads(line)
        except ValueError as error:
            raise DataError(f"{where}: not JSON ({error}); write one object a line") from None
        require(isinstance(record, dict), where, 'not an object; write {"image": ..., "text": ...}')
        for key, value in record.items():
            near = difflib.get_close_matches(key, KEYS, 1, 0.5) or [", ".join(KEYS)]
            require(key in KEYS, where, f"unknown key {key!r}; did you mean {near[0]}?")
            require(KEYS[key][0](value), where, f"{key!r} is {str(value)[:60]!r}; write {KEYS[key][1]}")
        for key in ("text", *NEEDED.get(task, ())):
            require(key in record, where, f"key {key!r} is missing; task {task} needs it: {KEYS[key][1]}")
        sources = [key for key in ("image", "images", "features") if key in record]
        require(len(sources) == 1, where, "give one of 'image', 'images' and 'features', and only one")
        source = sources[0]
        names = record[source] if isinstance(record[source], list) else [record[source]]
        wanted = "two files: 'images' or 'features' as a list" if task == "nlvr2" else "one file: 'image' or 'features'"
        require(len(names) == (2 if task == "nlvr2" else 1), where, f"{source!r} does not fit; {task} takes {wanted}")
        require(source == "image" or "boxes" not in record, where, f"'boxes' goes with 'image' only, not {source!r}")
        label, most = record.get("label", 0), len(record.get("choices", ())) - 1
        require(task != "nlvr2" or type(label) is bool, where, f"'label' is {label}; write true or false")
        right = type(label) is int and 0 <= label <= most
        require(task != "vcr" or right, where, f"'label' is {label}; write the index of the right choice, 0 to {most}")
        right = "reasons" not in record or 0 <= record.get("reason", -1) < len(record["reasons"])
        require(right, where, "'reasons' needs 'reason', the index of the right one, from 0")
        record["paths"] = [path.parent / name for name in names]
        for file in record["paths"]:
            require(file.is_file(), where, f"{source!r}: no file {file}; paths are relative to the .jsonl file")
        if "answer" in record:
            answer = record["answer"] if isinstance(record["answer"], dict) else {record["answer"]: 1.0}
            record["answer"] = {normalize_answer(text): float(score) for text, score in answer.items()}
            known = task != "ve" or set(record["answer"]) <= set(ENTAILMENT)
            require(known, where, f"'answer' is {str(record['answer'])[:60]}; task ve takes {', '.join(ENTAILMENT)}")
        records.append({"split": "train", **record, "where": where})
    require(records, path, "holds no examples; write one JSON object a line")
    return records


def check_boxes(boxes, width, height, where, key):
    """(N,4) float32 pixels, cut to the picture: an overshoot of up to 1 px is a detector's rounding, not a mistake."""
    boxes, limit = np.array(boxes, np.float32), np.array([width, height, width, height], np.float32)
    size = f"{width:g} x {height:g} pixels"
    for box in boxes:
        text = f"{key!r}: {box.tolist()}"
        require(box[0] < box[2] and box[1] < box[3], where, f"{text} has x2 <= x1 or y2 <= y1; write [x1,y1,x2,y2]")
        inside = (box >= -1).all() and (box <= limit + 1).all()
        require(inside, where, f"{text} is outside its picture of {size}; cut it to the picture")
    return np.clip(boxes, 0, limit)


def picture_regions(job):
    """One picture or feature file -> ([{field: array}], [warning]); DataError if anything is wrong with it."""
    where, path, own_boxes, targets, patch, grid = job
    if path.suffix == ".npz":
        regions, (width, height) = read_features(where, path)
    else:
        image = open_picture(where, path)
        width, height = image.size
        boxes = grid_boxes(width, height, grid) if own_boxes is None else own_boxes
        boxes = check_boxes(boxes, width, height, where, "boxes")
        regions = {"features": region_features(image, boxes, patch), "boxes": boxes}
    for target_where, target in targets:
        check_boxes([target], width, height, target_where, "target")
    features, boxes = regions["features"], regions["boxes"]
    suspicions = {
        "all features are equal": np.ptp(features) == 0,
        "more than 95% of the features are zero": (features == 0).mean() > 0.95,
        "all boxes are alike": len(boxes) > 2 and (boxes == boxes[0]).all(),
        "boxes look normalised to 0..1; multiply them by width and height": boxes.max() <= 1 < min(width, height),
    }
    regions["boxes"] = boxes / np.array([width, height, width, height], np.float32)
    return [regions], [f"{where}: {path.name}: {text}" for text, true in suspicions.items() if true]


def open_picture(where, path):
    """The picture as RGB; DataError if Pillow cannot read it."""
    try:
        return Image.open(path).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{where}: cannot read picture {path} ({error}); save it again as PNG or JPEG") from None


def read_features(where, path):
    """A feature file of own data -> {field: array} with boxes in pixels, (width, height). DataError if it is wrong."""
    where = f"{where}: {path}"
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{where}: cannot read features ({error}); write the file with numpy.savez") from None
    for key in ("features", "boxes", "size"):
        require(key in arrays, where, f"has no array {key!r}; it needs features (N,F), boxes (N,4) and size (2,)")
    features, boxes, size = arrays["features"], arrays["boxes"], arrays["size"]
    n = len(features) if features.ndim else 0
    shapes = {"features": (n, features.shape[-1] if n else 1), "boxes": (n, 4), "size": (2,), "labels": (n,)}
    shapes["probs"] = (n, arrays["probs"].shape[-1]) if "probs" in arrays and arrays["probs"].ndim else None
    for key, array in arrays.items():
        right = key not in shapes or array.shape == shapes[key] and array.size
        require(right, where, f"{key!r} has shape {array.shape}; it must be {shapes.get(key) or '(N,K)'}, N > 0")
        require(array.dtype.kind in "iuf", where, f"{key!r} holds {array.dtype}; save floats or integers")
        finite = np.isfinite(array).all() and np.abs(array).max() < 65504  # float16's largest
        require(finite, where, f"{key!r} has NaN, infinity or values beyond 65504; extract this picture again")
    require((size > 0).all(), where, "'size' must be (width, height) in pixels")
    regions = {"features": features, "boxes": check_boxes(boxes, *size.tolist(), where, "boxes")}
    if "probs" in arrays:
        probs = arrays["probs"]
        soft = probs.shape[1] > 1 and (probs >= 0).all() and np.allclose(probs.sum(1), 1, atol=0.02)
        require(soft, where, "rows of 'probs' must sum to 1; apply a softmax over K > 1 classes, class 0 = background")
        regions |= {"object_probs": probs, "objects": probs[:, 1:].argmax(1), "object_conf": probs[:, 1:].max(1)}
    if "labels" in arrays:
        labels, most = arrays["labels"], arrays["probs"].shape[1] - 2 if "probs" in arrays else 65504
        whole = labels.dtype.kind in "iu" and labels.min() >= 0 and labels.max() <= most
        require(whole, where, f"'labels' must be integers 0 to {most}: classes without background")
        sure = arrays["probs"][np.arange(n), labels + 1] if "probs" in arrays else np.ones(n)
        regions |= {"objects": labels, "object_conf": sure}
    return regions, size.tolist()


def load_jsonl(path, task, split, patch=12, grid=6, cache=CACHE):
    """Dataset of a split of a JSONL file. One store serves all its splits; the key holds each file's size and time."""
    records, rows, jobs, key = read_jsonl(path, task), {}, [], []
    for record in records:
        for file in record["paths"]:
            picture = (file, json.dumps(record.get("boxes")))
            if picture not in rows:
                rows[picture] = len(rows)
                jobs.append((record["where"], file, record.get("boxes"), [], patch, grid))
            if "target" in record:
                jobs[rows[picture]][3].append((record["where"], record["target"]))
    for _, file, *options in jobs:
        state = file.stat()
        key.append([str(file.resolve()), state.st_size, state.st_mtime_ns, options])

    def parts():
        first = None
        for (where, file, *_), part in zip(jobs, parallel(picture_regions, jobs, f"reading {path}")):
            shapes = {name: array.shape[1:] for name, array in part[0][0].items()}
            first = first or (shapes, file)
            wide, wanted = shapes["features"][0], first[0]["features"][0]
            require(wide == wanted, where, f"{file} has features {wide} wide, {first[1]} {wanted}; extract all alike")
            require(shapes == first[0], where, f"{file}: 'labels' or 'probs' unlike {first[1]}; all or none have them")
            yield part

    store = cached_store(cache, "own", key, parts)
    if warnings := store.extra():
        print(f"warning: {warnings[0]} ({len(warnings)} such in {path})", file=sys.stderr)
    records = [record for record in records if record["split"] == split]
    if task in ("nlvr2", "vcr", "refer"):
        examples = [example for record in records for example in task_examples(task, record)]
        for example in examples:
            n, first = len(example.rows), len(examples[0].rows)
            require(n == first, example.id, f"{n} choices, the first line has {first}; give all equally many")
        return make_dataset(Path(path).stem, split, store, examples, rows)
    image = [rows[record["paths"][0], json.dumps(record.get("boxes"))] for record in records]
    answer = [record.get("answer", {}) if task in ("pretrain", "vqa", "ve") else {} for record in records]
    kind = ["caption" if not a else "question" if task == "pretrain" else task for a in answer]
    kind = [record.get("kind", k) for record, k in zip(records, kind)]
    text, ids = ([record[name] for record in records] for name in ("text", "where"))
    return Dataset(Path(path).stem, split, store, np.array(image, np.int64), text, answer, kind, ids)


def task_examples(task, record):
    """The Examples of a line for nlvr2, vcr (one for the answer, one for the reason if it has any) or refer. Pictures
    are numbered by their file and boxes, as load_jsonl has them."""
    pictures = [(file, json.dumps(record.get("boxes"))) for file in record["paths"]]
    where, text, kind = record["where"], record["text"], record.get("kind", task)
    if task == "nlvr2":
        return [Example(where, kind, [(text, picture) for picture in pictures], target=int(record["label"]))]
    if task == "refer":
        file = record["paths"][0]
        if file.suffix == ".npz":
            width, height = np.load(file)["size"].tolist()
        else:
            width, height = Image.open(file).size
        box = [value / side for value, side in zip(record["target"], (width, height) * 2)]
        return [Example(where, kind, [(text, pictures[0])], target=box)]
    answers, right = record["choices"], record["label"]
    out = [Example(where, "answer", [((text, a), pictures[0]) for a in answers], target=right)]
    if "reasons" in record:
        rows = [((text, answers[right], reason), pictures[0]) for reason in record["reasons"]]
        out.append(Example(where, "reason", rows, target=record["reason"]))
    return out


# ---------------------------------------------------------------------------------------------------------------------
# Word pieces

SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def wordpiece(vocab, lowercase):
    """A BERT tokenizer of vocab {piece: id}: clean, split at blanks and punctuation, greedy longest match first."""
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]", max_input_chars_per_word=100))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def train_tokenizer(texts, vocab_size=8000):
    """Lower-case WordPiece learnt from a list of texts; ids 0..4 are SPECIALS. Equal texts give equal vocabularies.

    The trainer numbers characters in the order of a randomly seeded hash map and breaks ties by number. Handing them
    over in sorted order fixes the numbers; as they would count as special tokens, the vocabulary gets a new tokenizer.
    """
    tokenizer = wordpiece({"[UNK]": 0}, lowercase=True)
    counts = Counter(itertools.chain.from_iterable(map(tokenizer.normalizer.normalize_str, texts)))
    letters = sorted(
        c for c, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:1000] if not c.isspace()
    )
    fixed = [*SPECIALS, *letters, *("##" + c for c in letters)]
    trainer = trainers.WordPieceTrainer(vocab_size=vocab_size, special_tokens=fixed, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return wordpiece(tokenizer.get_vocab(), lowercase=True)


def read_tokenizer(path):
    """Tokenizer from a BERT vocab.txt (cased if any piece has a capital letter) or a tokenizer.json. DataError if the
    file is missing, unreadable, lacks one of SPECIALS or does not give [PAD] id 0, which pads a Batch."""
    path = Path(path)
    require(path.is_file(), path, "no such file; give a BERT vocab.txt or a tokenizer.json")
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            tokenizer = tokenizer_from_json(text)
            tokenizer.no_padding()  # which some files ask for, as for truncation; lengths are a batch's affair
            tokenizer.no_truncation()
        else:
            pieces = text.rstrip("\n").split("\n")
            cased = any(piece != piece.lower() for piece in pieces if not piece.startswith("["))
            tokenizer = wordpiece({piece.strip(): i for i, piece in enumerate(pieces)}, lowercase=not cased)
            # one that stands in a text is then read as one piece
            tokenizer.add_special_tokens([piece for piece in SPECIALS if piece in pieces])
    except Exception as error:  # noqa: BLE001 (tokenizers raises plain Exception)
        raise DataError(f"{path}: not a tokenizer ({error}); give a BERT vocab.txt or a tokenizer.json") from None
    right = all(tokenizer.token_to_id(name) is not None for name in SPECIALS) and tokenizer.token_to_id("[PAD]") == 0
    require(right, path, f"needs {', '.join(SPECIALS)}, [PAD] first; is it a BERT vocabulary?")
    return tokenizer


def tokenizer_from_json(text):
    """The tokenizer of a checkpoint, as `tokenizer.to_str()` wrote it."""
    return Tokenizer.from_str(text)


# ---------------------------------------------------------------------------------------------------------------------
# Batches


def collate(dataset, index, images=None, answers=None, pad_to=1):
    """Batch of the texts of examples `index` (B,) beside the pictures in store rows `images` (B,) (None: their own).
    Where an example has several rows (`dataset.group`), so has the batch: B below is then their number.

    answers: {answer: column} for the soft targets (B,A); answers that it lacks are left out, so a row may be all zero.
    pad_to: T and N are rounded up to a multiple, fewer shapes for a compiled model. Encode the dataset first.
    """
    rows = dataset.rows(index)
    images = dataset.image[rows] if images is None else images
    true = images == dataset.image[rows]
    mask, positions = ragged(dataset.offsets, rows, pad_to)  # (B,T)
    text, segments = np.zeros((2, *mask.shape), np.int64)
    text[mask], segments[mask] = dataset.tokens[positions], dataset.segment[positions]
    targets = np.zeros((len(index), len(answers or ())), np.float32)
    for row, example in enumerate(index if answers is not None else ()):
        for answer, score in dataset.answer[example].items():
            if answer in answers:
                targets[row, answers[answer]] = score
    return Batch(
        text=torch.from_numpy(text),
        text_mask=torch.from_numpy(mask),
        segments=torch.from_numpy(segments),
        matched=torch.from_numpy(true.astype(np.int64)),
        answers=None if answers is None else torch.from_numpy(targets),
        pictures=torch.from_numpy(np.array(images)),
        pair_index=torch.from_numpy(np.flatnonzero(true)),
        ids=[dataset.ids[i] for i in index],
        **dataset.store.gather(images, pad_to),
    )


def mismatch(dataset, index, rng, p=0.5, replace="image"):
    """Pairs for image-text matching: with probability p the picture (replace="text": the sentence) becomes that of
    another example with another picture. Returns examples (B,) and store rows (B,), for collate, and matched (B,) int64
    tensor, 1 = they belong together. ValueError if the dataset has a single picture.

    Pictures are drawn from the whole dataset. Sentences are drawn from the batch, where they are of like length: one
    long stranger would pad all the others to its length.
    """
    if replace not in ("image", "text"):
        raise ValueError(f"replace is 'image' or 'text', not {replace!r}")
    images, other = dataset.image[index], np.array(index)
    wrong = rng.random(len(other)) < p
    if wrong.any() and (dataset.image == dataset.image[0]).all():
        raise ValueError("a mismatch needs at least two pictures")
    near = replace == "text" and (images != images[0]).any()
    while (same := wrong & (dataset.image[other] == images)).any():
        drawn = rng.integers(len(index) if near else len(dataset), size=same.sum())
        other[same] = index[drawn] if near else drawn
    matched = torch.from_numpy(1 - wrong.astype(np.int64))
    return (other, images, matched) if replace == "text" else (np.array(index), dataset.image[other], matched)


def only_true(batch):
    """Without the masked words and regions of false pairs: there the other side tells nothing of them. They stay masked,
    but nothing is to be predicted. Returns a new Batch."""
    kept = {}
    for name, mask in (("word", batch.text_mask), ("region", batch.region_mask)):
        index = getattr(batch, f"{name}_index")
        if index is not None:
            true = batch.matched[index // mask.shape[1]] == 1  # (M,): rows of flat positions in (B,T) or (B,N)
            kept[f"{name}_index"] = index[true]
            kept |= {"word_labels": batch.word_labels[true]} if name == "word" else {}
    return dataclasses.replace(batch, **kept)


def draw_answers(batch, rng):
    """One answer a row, drawn in proportion to the soft scores in `answers`; -1 where all are 0. Sets answer_labels."""
    rising = batch.answers.double().cumsum(1)  # (B,A)
    draw = torch.from_numpy(rng.random((len(rising), 1))) * rising[:, -1:]
    labels = (rising <= draw).sum(1).masked_fill(rising[:, -1] == 0, -1)
    return dataclasses.replace(batch, answer_labels=labels)


def mask_words(batch, tokenizer, rng, p=0.15, mask=0.8, random=0.1, only=None, force_one=True, one=False):
    """BERT's masking: each piece is selected with probability p; a selected one becomes [MASK] with probability
    `mask`, a random piece with probability `random`, and stays itself otherwise. Special pieces are never selected.

    rng: numpy Generator.   only: (V,) bool, True = may be selected.   force_one: in a row where none was drawn the
    first piece that may be becomes [MASK] (UNITER's rule: no row without a loss).   one: instead of all that, exactly
    one piece of each row, uniformly drawn, becomes [MASK] (evaluation: what the picture and all other words tell).
    Returns a new Batch with text, word_index and word_labels set; the given one keeps its tensors.
    """
    ordinary = torch.ones(tokenizer.get_vocab_size(), dtype=torch.bool)  # (V,)
    ordinary[[tokenizer.token_to_id(name) for name in SPECIALS]] = False
    may = batch.text_mask & (ordinary if only is None else ordinary & only)[batch.text]  # (B,T)
    draw, fate = torch.from_numpy(rng.random((2, *batch.text.shape)))
    selected = may & (draw < p)
    if one:
        lowest = draw.masked_fill(~may, 2.0)
        selected, fate = may & (lowest == lowest.min(1, keepdim=True).values), torch.full_like(fate, -1.0)
    elif force_one:
        first = may & (may.cumsum(1) == 1) & ~selected.any(1, keepdim=True)
        selected, fate = selected | first, fate.masked_fill(first, -1.0)
    text = batch.text.masked_fill(selected & (fate < mask), tokenizer.token_to_id("[MASK]"))
    swapped = selected & (fate >= mask) & (fate < mask + random)
    pieces = ordinary.nonzero()[:, 0]
    text[swapped] = pieces[torch.from_numpy(rng.integers(len(pieces), size=int(swapped.sum())))]
    word_index = selected.flatten().nonzero()[:, 0]  # (M,) into B*T
    word_labels = batch.text.flatten()[word_index]
    return dataclasses.replace(batch, text=text, word_index=word_index, word_labels=word_labels)


def next_words(batch):
    """For captioning: word_index (M,), flat positions of the pieces that another one follows, and word_labels (M,), the
    ones that follow. Returns a new Batch."""
    followed = torch.nn.functional.pad(batch.text_mask[:, 1:], (0, 1))  # (B,T)
    word_index = followed.flatten().nonzero()[:, 0]  # (M,) into B*T
    return dataclasses.replace(batch, word_index=word_index, word_labels=batch.text.flatten()[word_index + 1])


def join_pictures(batch):
    """Rows 2i and 2i+1, the same text with two pictures, as one row with the regions of both: (2B,N,...) -> (B,2N,...).
    What belongs to pieces or rows is that of row 2i; target and ids, which are the examples', stay."""
    left, right = (
        dataclasses.replace(batch, ids=None, target=None).rows(torch.arange(i, len(batch.text), 2)) for i in (0, 1)
    )
    regions = ("features", "boxes", "region_mask", "region_types", *STORED)
    both = {n: torch.cat([getattr(left, n), getattr(right, n)], 1) for n in regions if getattr(left, n) is not None}
    return dataclasses.replace(left, **both, target=batch.target, ids=batch.ids)


def mask_regions(batch, rng, p=0.15, zero=1.0, random=0.0, force_one=True):
    """Each real region is selected with probability p; a selected one's feature becomes 0 with probability `zero`, that
    of a random real region of the batch with probability `random`, and stays itself otherwise. Boxes stay.

    rng: numpy Generator.   force_one: in a row where none was drawn one random region is selected and set to 0.
    Returns a new Batch with features, clean_features, masked_regions and region_index set.
    """
    draw, fate = torch.from_numpy(rng.random((2, *batch.region_mask.shape)))
    selected = batch.region_mask & (draw < p)  # (B,N)
    if force_one:
        draw = draw.masked_fill(~batch.region_mask, 2.0)
        lowest = draw == draw.min(1, keepdim=True).values  # a uniform choice, as the draws are
        first = lowest & batch.region_mask & ~selected.any(1, keepdim=True)
        selected, fate = selected | first, fate.masked_fill(first, -1.0)
    features = batch.features.masked_fill((selected & (fate < zero))[..., None], 0)  # (B,N,1) -> (B,N,F)
    swapped = selected & (fate >= zero) & (fate < zero + random)
    donors = batch.features[batch.region_mask]  # (real regions, F)
    features[swapped] = donors[torch.from_numpy(rng.integers(len(donors), size=int(swapped.sum())))]
    masked = {"features": features, "clean_features": batch.features, "masked_regions": selected}
    return dataclasses.replace(batch, **masked, region_index=selected.flatten().nonzero()[:, 0])  # (M,) into B*N


def batches(lengths, rng=None, size=None, tokens=None, rank=0, world=1):
    """List of index arrays with examples of like lengths together: `size` examples each, or as many as fit in `tokens`
    padded positions (rows x longest, added up over the parts).

    lengths: (E,), or (E,P) for P parts that are padded apart, as words and regions are: sorted by the first, then by
    the next. rng: shuffles, by sorting within chunks of about 50 batches and shuffling the batches; None: all in order
    of length. rank r of `world` takes batches r::world. Training (rng) drops up to world-1 batches, so that every rank
    has the same number, and needs the same rng state on every rank; evaluation keeps every example exactly once.
    ValueError unless exactly one of size and tokens is given, or if an example alone is longer than `tokens`.
    """
    lengths = np.asarray(lengths).reshape(len(lengths), -1)  # (E,P)
    totals = lengths.sum(1)
    if (size is None) == (tokens is None):
        raise ValueError("give either size or tokens")
    if tokens is not None and totals.max(initial=0) > tokens:
        raise ValueError(f"an example of {totals.max()} positions does not fit in {tokens}")
    order, chunk = np.arange(len(lengths)), max(1, len(lengths))
    if rng is not None:
        order, chunk = rng.permutation(len(lengths)), 50 * (size or int(tokens / max(1, totals.mean())))
    groups, longest = [], lengths[:1]
    for start in range(0, len(order), chunk):
        part = order[start : start + chunk]
        for example in part[np.lexsort(lengths[part].T[::-1])].tolist():
            longest = np.maximum(longest, lengths[example])
            if not groups or (len(groups[-1]) == size if size else (len(groups[-1]) + 1) * longest.sum() > tokens):
                groups.append([])
                longest = lengths[example]
            groups[-1].append(example)
    if rng is not None:
        groups = [groups[i] for i in rng.permutation(len(groups))[: len(groups) // world * world]]
    return [np.array(group) for group in groups[rank::world]]


# ---------------------------------------------------------------------------------------------------------------------
# Files of weights

SAFETENSORS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
SAFETENSORS |= {"I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool}


def write_whole(path, write):
    """Makes a file whole or not at all: `write` gets a temporary path beside it, which is then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    write(temporary)
    os.replace(temporary, path)


def save(content, path):
    """torch.save, whole or not at all."""
    write_whole(path, lambda file: torch.save(content, file))


def read_torch(path):
    """What torch.save wrote, on the CPU, without running any code that the file may hold. DataError where it cannot."""
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    try:
        with warnings.catch_warnings(action="ignore"):  # a failure is one line
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001 (bytes that are no weights end in nearly every kind of error)
        raise DataError(f"{path}: no weights, damaged, or more than weights ({type(error).__name__})") from None


def read_safetensors(path):
    """{name: tensor} of a safetensors file: 8 bytes, the length n of the header, little-endian; n bytes of JSON,
    {name: {"dtype": "F32", "shape": [2, 3], "data_offsets": [begin, end]}}; the numbers, from which offsets count.

    The file is mapped, each tensor copied out of it once. DataError unless the tensors fill the file one after another,
    without gap or overlap, each as long as its shape says. dtypes: SAFETENSORS.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    tensors, end = {}, 0
    try:
        with path.open("rb") as file:
            first, size = file.read(8), path.stat().st_size
            length = int.from_bytes(first, "little")
            if len(first) < 8 or length > size - 8:
                raise ValueError("its header does not fit into it; was it cut off?")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        numbers = torch.from_numpy(np.memmap(path, np.uint8, "c", offset=8 + length))
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            shape, (begin, stop) = entry["shape"], entry["data_offsets"]
            if entry["dtype"] not in SAFETENSORS:
                raise ValueError(f"{name} is of dtype {entry['dtype']}; known are {', '.join(SAFETENSORS)}")
            if not all(type(number) is int and number >= 0 for number in (*shape, begin, stop)):
                raise ValueError(f"{name} has a shape or offsets that are no whole numbers")
            if begin != end:
                raise ValueError(f"{name} begins at byte {begin}, but the tensor before it ends at {end}")
            dtype, end = SAFETENSORS[entry["dtype"]], stop
            if end > len(numbers):
                raise ValueError(f"{name} ends at byte {end} of {len(numbers)}; was it cut off?")
            if end - begin != math.prod(shape) * dtype.itemsize:
                raise ValueError(f"{name} has {end - begin} bytes for shape {shape}")
            tensors[name] = numbers[begin:end].clone().view(dtype).view(shape)
        if end != len(numbers):
            raise ValueError(f"{len(numbers) - end} bytes belong to no tensor")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{path}: not a safetensors file ({error or type(error).__name__})") from None
    return tensors


def read_json(path, kind):
    """A JSON file's content, None where there is no file. DataError if it is no JSON or no `kind` (dict, list)."""
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON ({error})") from None
    if not isinstance(content, kind):
        raise DataError(f"{path}: holds no {kind.__name__}")
    return content


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def preview(out, seed=0, scale=3):
    """A sheet of six scenes of split train: picture with the detector's boxes, two captions, three questions."""
    width, height = SIDE * scale, SIDE * scale + 156
    sheet = Image.new("RGB", (3 * width + 64, 2 * height + 32), "white")
    font, pen = ImageFont.load_default(13), ImageDraw.Draw(sheet)
    drawn = (make_scene(seed, "train", index) for index in itertools.count())
    told = (scene for scene in drawn if len(captions(scene)) > 1)  # a scene of look-alikes may leave nothing to tell
    for index, scene in enumerate(itertools.islice(told, 6)):
        image = draw_scene(scene).resize((width, width), Image.Resampling.LANCZOS)
        marks, found = ImageDraw.Draw(image), detect(scene)
        labels = zip(*(found[name] for name in ("boxes", "objects", "attributes", "object_conf")))
        for box, shape, color, sure in labels:
            ink = "white" if sure > 0.5 else "black"
            marks.rectangle((box * scale).tolist(), outline=ink, width=2)
            text, (x, y) = f"{list(COLORS)[color]} {SHAPES[shape]} {sure:.2f}", box[:2] * scale
            x = min(x, width - 4 - marks.textlength(text, font))
            marks.text((x + 3, max(0, y - 16)), text, "white", font, stroke_width=2, stroke_fill="black")
        left, top = 16 + index % 3 * (width + 16), 16 + index // 3 * height
        sheet.paste(image, (left, top))
        lines = captions(scene)[:2] + [f"{text}  {answer}" for _, text, answer in questions(scene)[:3]]
        lines = [textwrap.fill(line, 58, subsequent_indent="    ") for line in lines]
        pen.multiline_text((left, top + width + 6), "\n".join(lines), "black", font)
    sheet.save(out)
    print(f"{out}: 6 scenes, {sheet.width} x {sheet.height} pixels; white boxes are sure, black ones are not")


def check(file, task):
    """Reads a JSONL file with all its pictures and prints a line of statistics; DataError at the first mistake."""
    records = read_jsonl(file, task)
    for split in ("test", "val", "train"):  # each, as some mistakes show only when a split's examples are made
        store = load_jsonl(file, task, split).store
    splits = ", ".join(f"{n} {split}" for split, n in Counter(record["split"] for record in records).items())
    answers = {answer for record in records for answer in record.get("answer", ())}
    regions = f"{store.offsets[-1] / len(store):.1f} regions of width {store.width} each"
    print(f"{file}: {len(records)} examples ({splits}), {len(store)} pictures, {regions}, {len(answers)} answers")


def extract(image, out, patch, grid):
    """Writes the features of a picture's grid of regions as an .npz that own data can name."""
    picture = open_picture("extract", image)
    boxes = grid_boxes(*picture.size, grid)
    features = region_features(picture, boxes, patch)
    np.savez(out, features=features, boxes=boxes, size=np.array(picture.size))
    print(f"{out}: features {features.shape}, boxes {boxes.shape}")


class Parser(argparse.ArgumentParser):
    """argparse, but a mistake is a DataError, one line: what is wrong, without the whole usage."""

    def error(self, message):
        raise DataError(f"{message}; see --help")


def main():
    """preview, check or extract. Exit code 0, or 2 with one line on stderr."""
    parser = Parser(prog="data.py", description="Look at the drawn scenes, check own data, extract region features.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("preview", help="a sheet of six scenes with boxes, captions and questions")
    command.add_argument("--out", default="scenes.png")
    command.add_argument("--seed", type=int, default=0)
    command = commands.add_parser("check", help="check a JSONL file and count what is in it")
    command.add_argument("file")
    command.add_argument("--task", choices=TASKS, default="pretrain")
    command = commands.add_parser("extract", help="features of a picture's grid as .npz")
    command.add_argument("image")
    command.add_argument("--out", required=True)
    command.add_argument("--patch", type=int, default=12, help="a region becomes patch x patch pixels")
    command.add_argument("--grid", type=int, default=6, help="regions: the picture and grid x grid parts of it")
    try:
        options = vars(parser.parse_args())
        {"preview": preview, "check": check, "extract": extract}[options.pop("command")](**options)
    except (DataError, OSError, ValueError) as error:  # ValueError: Pillow does not know a suffix
        print(f"data.py: {DataError(str(error))}", file=sys.stderr)  # on one line
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
