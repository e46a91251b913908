"""prepare/scenes.py: the drawn scenes, their detector, texts and tasks."""

import itertools
import math
import random
import textwrap
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

import common
import data

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


SCENES = {"train": 10_000, "val": 500, "test": 1_000, "compose": 500}  # pictures a split


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


def phrase(expression, plural=False, article=False):
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
            full = f"{phrase(e, article=True)} is {DIRECTIONS[where]} {phrase(f, article=True)}"
            relations.append(((f"{phrase(e)} {DIRECTIONS[where]} {phrase(f)}", full), (e, f)))
    for thing, e in names.items():
        others.append(((phrase(e), f"there is {phrase(e, article=True)}"), (e,)))
        for off, words in ((thing.x - SIDE / 2, ("left of", "right of")), (thing.y - SIDE / 2, ("above", "below"))):
            if abs(off) >= 12:
                halves.append(((f"{phrase(e)} {words[off > 0]} the middle",), (e,)))
    for e in scene.fits:
        same = [(None, e[1], s) for s in SHAPES if s != e[2]]
        same += [(None, c, e[2]) for c in COLORS if e[1] and c != e[1]]
        if e[0] is None and e[2] and all(scene.count(rival) != scene.count(e) for rival in same):
            number = scene.count(e)
            words = f"{NUMBERS[number]} {phrase(e, plural=number > 1)}"
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
            words = {"a": phrase(e, article=True), "one": phrase(e), "many": phrase(e, plural=True)}
            other = phrase(f, plural=kind == "compare")
            text = rng.choice(phrases).format(**words, other=other, word=word)
            found.setdefault(text, (kind, text, answer))
    return list(found.values())


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
        text = f"the {phrase(e)} is {phrase((None, None, value), article=True) if kind == 'shape' else value}"
        rivals, strangers = single[e, len(scene.things)], alike[len(scene.things)]
        other = draw(rng, rivals, lambda i, e=e, kind=kind, value=value: getattr(graphs[i].fits[e][0], kind) != value)
        absent = draw(rng, strangers, lambda i, e=e: not graphs[i].count(e))
        if other is not None and absent is not None:
            for answer, picture in zip(data.ENTAILMENT, (other, number, absent)):
                yield data.Example(f"{scene.split}/{k}/{answer}", kind, [(text, picture)], {answer: 1.0})


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
            text = f"exactly one picture shows {phrase(e, article=True)}"
            fits = [lambda i, e=e: graphs[i].count(e), lambda i, e=e: not graphs[i].count(e)]
            left, right = ([draw(rng, range(len(graphs)), fit, 200) for fit in fits] for _ in range(2))
            four = [(text, a, b, int(i != j)) for i, a in enumerate(left) for j, b in enumerate(right)]
            kind = "one"
        else:
            n = rng.choice((0, 1, 2))
            pools = range(len(graphs)) if n == 0 else counts.get((e, n), ()), counts.get((e, n + 1), ())
            a, b = (draw(rng, pool, lambda i, e=e, m=m: graphs[i].count(e) == m) for pool, m in zip(pools, (n, n + 1)))
            text = f"{{}} {phrase(e, plural=True)} on the left than on the right"
            four = [(text.format(w), *p, int((w == "more") == (p == (b, a)))) for w in ("more", "fewer")
                    for p in ((a, b), (b, a))]  # fmt: skip
            kind = "more"
        if all(a is not None and b is not None and a != b for _, a, b, _ in four):
            for number, (text, a, b, true) in enumerate(four):
                yield data.Example(f"{graphs[0].split}/{k}/{number}", kind, [(text, a), (text, b)], target=true)


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
        question, where = f"what {kind} is the {phrase(e)}?", f"{scene.split}/{number}"
        orders = rng.sample(range(4), 4), rng.sample(range(4), 4)
        rows = [((question, answers[i]), number) for i in orders[0]]
        yield data.Example(where, "answer", rows, target=orders[0].index(0))
        rows = [((question, right, f"it is with {phrase(reasons[i], article=True)}"), number) for i in orders[1]]
        yield data.Example(where, "reason", rows, target=orders[1].index(0))


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
                found[things[0]].setdefault("words" if all(shared) else "spare", []).append(phrase(e))
            for axis, (low, high) in (("x", ("left of", "right of")), ("y", ("above", "below"))):
                offs = sorted((getattr(t, axis) - SIDE / 2, t) for t in things)
                if len(offs) > 1 and offs[0][0] <= -12 and offs[1][0] >= 12:
                    found[offs[0][1]].setdefault("side", []).append(f"{phrase(e)} {low} the middle")
                if len(offs) > 1 and offs[-1][0] >= 12 and offs[-2][0] <= -12:
                    found[offs[-1][1]].setdefault("side", []).append(f"{phrase(e)} {high} the middle")
        if scene.split != "compose" and not all(found.values()):
            continue
        for k, (t, texts) in enumerate(found.items()):
            if kind := next((kind for kind in ("words", "side", "spare") if kind in texts), None):
                box = [v / SIDE for v in (t.x - t.half, t.y - t.half, t.x + t.half, t.y + t.half)]
                yield data.Example(f"{scene.split}/{number}/{k}", kind, [(rng.choice(texts[kind]), number)], target=box)


SCENE_TASKS = {
    "ve": entailments,
    "nlvr2": statements_of_two,
    "vcr": choices_with_reasons,
    "refer": referring_expressions,
}


def scene_chunk(job):
    """Regions and texts of scenes start..stop-1. Every scene's extra: a list of (kind, text, answer or None)."""
    seed, split, start, stop = job
    pictures, texts = [], []
    for scene in (make_scene(seed, split, index) for index in range(start, stop)):
        regions = detect(scene)
        features = data.region_features(draw_scene(scene), regions["boxes"])
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
        pictures.append({"features": data.region_features(draw_scene(scene), boxes), "boxes": boxes / SIDE})
    return pictures, []


def scenes(split, task, count=None, seed=0, cache=data.CACHE):
    """The first `count` drawn scenes of a split (default SCENES[split]) with the texts that the task needs: captions and
    some questions for "pretrain", questions for "vqa", captions for "caption" and "retrieval", those of SCENE_TASKS
    for the others.
    Task "refer" has the things' true boxes for regions; its split "detected" is "test" with the detector's. UserError
    for anything else."""
    true = task == "refer" and split != "detected"
    split, shown = "test" if split == "detected" and task == "refer" else split, split
    if split not in data.SPLITS:
        raise common.UserError(f"scenes have no split {split!r}; choose from {', '.join(data.SPLITS)}")
    if task not in data.TASKS:
        raise common.UserError(f"scenes have no task {task!r}; choose from {', '.join(data.TASKS)}")
    count = SCENES[split] if count is None else count
    jobs = [(seed, split, start, min(start + 50, count)) for start in range(0, count, 50)]
    label = f"drawing {count} {split} scenes"
    name, chunk, key = ("boxes-", true_chunk, ["true boxes"]) if true else ("scenes-", scene_chunk, [])
    store = data.cached_store(
        cache, name + split, [split, count, seed, *key], lambda: data.parallel(chunk, jobs, label)
    )
    if task in SCENE_TASKS:
        graphs = [make_scene(seed, split, index) for index in range(count)]
        return data.make_dataset("scenes", shown, store, SCENE_TASKS[task](graphs))
    dataset = data.Dataset("scenes", split, store, None, [], [], [], [])
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
