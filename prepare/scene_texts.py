"""The scene graph of a drawn scene, and what is said of it: captions, questions, and the examples of four more tasks.

Every text is true of the graph, and drawn so that the words alone say little about the answer: first the kind of text,
then the answer, then the words. Each function draws from a random stream of its own (Scene.key), so that a change of
one leaves the others as they were.
"""

import itertools
import random
from dataclasses import dataclass, field
from typing import NamedTuple

SIDE = 112  # width and height of a picture, pixels
MARGIN = 12  # pixels: nearer to the middle, a thing is neither left nor right of it
SIZES = {"small": (7.0, 9.0), "large": (17.0, 20.0)}  # least and greatest half-width, pixels; clearly apart
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
WORDS = {"size": list(SIZES), "color": list(COLORS), "shape": list(SHAPES)}
HELD_OUT_COLORS = ("cyan", "orange", "purple", "green", "yellow", "blue")
HELD_OUT = tuple(zip(HELD_OUT_COLORS, SHAPES))  # pairs that only texts of split "compose" name
PLURALS = {noun: noun + "s" for noun in (*SHAPES, "thing")}
PLURALS["cross"] = "crosses"
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight")
OPPOSITES = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
# Words that only the picture tells. Pretraining measures separately how well these are predicted.
CONTENT_WORDS = {*SIZES, *COLORS, *SHAPES, *PLURALS.values(), *NUMBERS[1:], "left", "right", "above", "below"}
CONTENT_WORDS.remove("things")

# ---- the scene graph -------------------------------------------------------------------------------------------------


class Expression(NamedTuple):
    """The words that name a thing: (None, "red", "circle") is "red circle". None: this word is left out."""

    size: str | None
    color: str | None
    shape: str | None

    @property
    def held_out(self):
        """True if it names a held-out pair of colour and shape."""
        return (self.color, self.shape) in HELD_OUT

    def without_one_word(self):
        """The expressions that lack one of its words."""
        words = [name for name in self._fields if getattr(self, name) is not None]
        return [self._replace(**{name: None}) for name in words]


class Thing(NamedTuple):
    """One thing of a scene: what it looks like and where it is."""

    size: str
    color: str
    shape: str
    x: float  # centre, pixels
    y: float
    half: float  # half of its width and height, pixels

    @property
    def box(self):
        """x1, y1, x2, y2 in pixels."""
        return (self.x - self.half, self.y - self.half, self.x + self.half, self.y + self.half)


@dataclass
class Scene:
    """The scene graph."""

    seed: int
    split: str
    index: int  # number of the picture in its split
    row: int  # its row in the feature stores
    things: list[Thing]
    fits: dict = field(default_factory=dict)  # {Expression: the things it fits}; one that fits nothing has no entry

    def count(self, expression):
        """How many things the expression fits."""
        return len(self.fits.get(expression, ()))

    def key(self, purpose):
        """The seed of one purpose: "graph", "drawing", "detector", "captions", ..."""
        return f"{self.seed}/{self.split}/{self.index}/{purpose}"


def make_scene(seed, split, index, row=None):
    """Scene number `index` of a split: 3 to 8 things, few more often than many.   row: by default `index`.

    Two boxes overlap by at most a quarter of the smaller one's area, so that nothing is hidden.
    """
    scene = Scene(seed, split, index, index if row is None else row, things=[])
    rng = random.Random(scene.key("graph"))
    goal = rng.choices(range(3, 9), (8, 6, 4, 2, 1, 1))[0]
    for _ in range(200):
        if len(scene.things) == goal:
            break
        thing = sample_thing(scene, rng)
        if not any(overlap_too_much(thing, other) for other in scene.things):
            scene.things.append(thing)
    rng.shuffle(scene.things)  # the order of drawing then says nothing about how a thing came to be
    for thing in scene.things:
        for words in itertools.product((None, thing.size), (None, thing.color), (None, thing.shape)):
            scene.fits.setdefault(Expression(*words), []).append(thing)
    return scene


def sample_thing(scene, rng):
    """A thing at a random place. Its colour, and its shape, is in one case of four that of an earlier thing, so that
    there is something to count. In split "compose" the first two things are of held-out pairs."""
    color = rng.choice(WORDS["color"])
    shape = rng.choice(SHAPES)
    size = rng.choice(WORDS["size"])
    if scene.things and rng.random() < 0.25:
        color = rng.choice(scene.things).color
    if scene.things and rng.random() < 0.25:
        shape = rng.choice(scene.things).shape
    if scene.split == "compose" and len(scene.things) < 2:
        color, shape = rng.choice(HELD_OUT)
    half = rng.uniform(*SIZES[size])
    x = rng.uniform(half, SIDE - half)
    y = rng.uniform(half, SIDE - half)
    return Thing(size, color, shape, x, y, half)


def overlap_too_much(a, b):
    """True if the boxes of two things overlap by more than a quarter of the smaller one."""
    width = a.half + b.half - abs(a.x - b.x)
    height = a.half + b.half - abs(a.y - b.y)
    if width <= 0 or height <= 0:
        return False
    side = 2 * min(a.half, b.half)  # of the smaller box: no overlap is wider
    return min(width, side) * min(height, side) > 0.25 * side**2


def offsets(thing, x, y):
    """How many pixels the centre of a thing lies left of a point, right of it, above it and below it."""
    return {"left of": x - thing.x, "right of": thing.x - x, "above": y - thing.y, "below": thing.y - y}


def halves(thing):
    """The halves of the picture that a thing is clearly in: "left of" or "right of" the middle, "above" or "below"."""
    return [where for where, pixels in offsets(thing, SIDE / 2, SIDE / 2).items() if pixels >= MARGIN]


def direction(a, b):
    """Where thing a lies as seen from thing b: "left of", "right of", "above", "below"; None if that is not clear.

    It is clear if their centres are at least 20 pixels apart along one axis, and there at least 1.5 times as far as
    along the other axis.
    """
    pixels = offsets(a, b.x, b.y)
    where, second = sorted(pixels, key=pixels.get, reverse=True)[:2]
    return where if pixels[where] >= max(20, 1.5 * pixels[second]) else None


# ---- words -----------------------------------------------------------------------------------------------------------


def expressions_of(form):
    """All expressions that have the words which `form` names, "color shape" for example."""
    choices = [WORDS[name] if name in form else [None] for name in Expression._fields]
    return [Expression(*words) for words in itertools.product(*choices)]


FORMS = ("color", "shape", "color shape", "size color", "size shape", "size color shape")
EXPRESSIONS = {form: expressions_of(form) for form in FORMS}


def phrase(expression, plural=False, article=False):
    """Expression("small", "red", None) -> "small red thing", "small red things" or "a small red thing"."""
    noun = expression.shape or "thing"
    if plural:
        noun = PLURALS[noun]
    words = [word for word in (expression.size, expression.color, noun) if word is not None]
    text = " ".join(words)
    if not article:
        return text
    return f"an {text}" if text.startswith("o") else f"a {text}"


def allowed(scene, *expressions):
    """True if a text with these expressions may belong to the scene's split: texts of split "compose" must name a
    held-out pair, those of the other splits must not. An answer counts as if it were said of the thing."""
    return any(expression.held_out for expression in expressions) == (scene.split == "compose")


def new_line(split, number, kind, text, **values):
    """A line of a JSONL file, for all tasks but vcr."""
    return {"id": f"{split}/{number}", "split": split, "kind": kind, "text": text, **values}


# ---- captions --------------------------------------------------------------------------------------------------------


def captions(scene):
    """Up to eight different true captions: clauses with three expressions together, joined by "and".

    In a caption every content word follows from the picture and the other words, so that a masked one has one right
    answer. Two captions in five place a thing, beside another one or in a half of the picture. With three expressions
    a caption fits few pictures.
    """
    rng = random.Random(scene.key("captions"))
    relations, in_half, others = caption_clauses(scene)
    found = []
    for _ in range(64):
        if len(found) == 8:
            break
        positions = relations if rng.random() < 0.3 else in_half
        candidates = []
        if positions and rng.random() < 0.4:
            candidates = rng.sample(positions, 1)
        candidates += rng.sample(others, len(others))
        clauses = []
        expressions = []
        named = set()  # a further clause must name a thing that is not named yet
        for phrasings, said in candidates:
            if len(expressions) < 3 and not named.issuperset(scene.fits[said[0]]):
                clauses.append(phrasings)
                for expression in said:
                    expressions.append(expression)
                    named.update(scene.fits[expression])
        if len(expressions) > 1 and allowed(scene, *expressions):
            rng.shuffle(clauses)
            caption = " and ".join(rng.choice(phrasings) for phrasings in clauses)
            if caption not in found:
                found.append(caption)
    return found


def caption_clauses(scene):
    """Clauses of three kinds: a relation of two things, a thing in a half of the picture, a thing or a number of them.

    A clause is (texts that say the same, the expressions in it).
    """
    names = unmistakable_names(scene)
    relations = []
    for (a, name_a), (b, name_b) in itertools.permutations(names.items(), 2):
        where = direction(a, b)
        if where is not None:
            short = f"{phrase(name_a)} {where} {phrase(name_b)}"
            full = f"{phrase(name_a, article=True)} is {where} {phrase(name_b, article=True)}"
            relations.append(((short, full), (name_a, name_b)))
    in_half = []
    others = []
    for thing, name in names.items():
        for where in halves(thing):
            in_half.append(((f"{phrase(name)} {where} the middle",), (name,)))
        others.append(((phrase(name), f"there is {phrase(name, article=True)}"), (name,)))
    return relations, in_half, others + count_clauses(scene)


def unmistakable_names(scene):
    """{thing: Expression} for the things that a caption may name: by colour and shape, or by size, colour and shape.

    The name fits no other thing, even without any one of its words. So each word follows from the others.
    """
    names = {}
    for thing in scene.things:
        full_name = Expression(thing.size, thing.color, thing.shape)
        if full_name.held_out and scene.split != "compose":
            continue
        for name in (full_name, full_name._replace(size=None)):  # the shorter one is taken where both will do
            if all(scene.count(shorter) == 1 for shorter in name.without_one_word()):
                names[thing] = name
    return names


def count_clauses(scene):
    """Clauses such as "exactly two circles": where no other colour or shape, put into its place, has the same count."""
    clauses = []
    for expression in scene.fits:
        if expression.size is not None or expression.shape is None:
            continue
        if expression.held_out and scene.split != "compose":
            continue
        number = scene.count(expression)
        rivals = [expression._replace(shape=shape) for shape in SHAPES]
        if expression.color is not None:
            rivals += [expression._replace(color=color) for color in COLORS]
        if any(scene.count(rival) == number for rival in rivals if rival != expression):
            continue
        words = f"{NUMBERS[number]} {phrase(expression, plural=number > 1)}"
        phrasings = (f"exactly {words}", words)
        if number == 1:
            phrasings = (f"exactly {words}",)  # "one" alone could be read as "a"
        clauses.append((phrasings, (expression,)))
    return clauses


# ---- questions -------------------------------------------------------------------------------------------------------

QUESTIONS = {  # kind: forms of its expressions, phrasings
    "exists": (
        ("size color shape", "color shape", "size shape", "size color"),
        ("is there {a_thing}?", "can you see {a_thing}?"),
    ),
    "count": (
        ("color", "shape", "color", "shape", "color shape"),
        ("how many {things} are there?", "what is the number of {things}?"),
    ),
    "color": (("shape", "size shape"), ("what color is the {thing}?", "what is the color of the {thing}?")),
    "shape": (("color", "size color"), ("what shape is the {thing}?", "what is the shape of the {thing}?")),
    "size": (("color", "shape", "color shape"), ("what size is the {thing}?", "is the {thing} small or large?")),
    "compare": (
        (("color", "color"), ("shape", "shape"), ("color", "shape"), ("color shape", "color shape")),
        ("are there {word} {things} than {others}?",),
    ),
    "side": (
        ("color", "shape", "color shape", "size shape"),
        ("is the {thing} {word} the middle?", "does the {thing} lie {word} the middle?"),
    ),
}
QUESTION_WORDS = {"compare": ("more", "fewer"), "side": ("left or right of", "above or below")}  # for {word}
PAIR_FORMS = ("color shape", "size color shape", ("color shape", "color shape"))  # forms that name pairs


def questions(scene):
    """Up to eight different (kind, question, answer).

    The kind is drawn first, then the form of the expression, then the answer among those that the scene allows, and
    only then the words. So a question's words say little about its answer.
    """
    rng = random.Random(scene.key("questions"))
    found = {}  # {text: (kind, text, answer)}
    for _ in range(160):
        if len(found) == 8:
            break
        kind = rng.choice([*QUESTIONS, "side"])  # "side" twice as often: it is learned last
        forms, phrasings = QUESTIONS[kind]
        if scene.split == "compose":  # where the form allows, name a pair: a "no" then names one like a "yes"
            forms = [form for form in forms if form in PAIR_FORMS] or forms
        form = rng.choice(forms)
        word = rng.choice(QUESTION_WORDS[kind]) if kind in QUESTION_WORDS else ""
        candidates = question_candidates(scene, kind, form, word, rng)
        if not candidates:
            continue
        if len(candidates) == 1 and kind in ("exists", "compare"):
            continue  # a yes-no question is asked only where both answers are possible
        weights = [1] * len(candidates)
        if kind == "count":  # large counts are rare in pictures, so they are taken more often where there are any
            weights = [max(1, int(answer)) for answer in candidates]
        answer = rng.choices(list(candidates), weights)[0]
        first, second = rng.choice(candidates[answer])
        text = rng.choice(phrasings).format(
            a_thing=phrase(first, article=True),
            thing=phrase(first),
            things=phrase(first, plural=True),
            others=phrase(second, plural=True),
            word=word,
        )
        found.setdefault(text, (kind, text, answer))
    return list(found.values())


def question_candidates(scene, kind, form, word, rng):
    """{answer: [(A, B)]}: the expressions that a question of a kind can be about. Only "compare" has two: from 30 random
    pairs. For the others B is A."""
    if kind == "compare":
        pairs = []
        for _ in range(30):
            a_form, b_form = rng.sample(form, 2)  # in random order
            pairs.append((rng.choice(EXPRESSIONS[a_form]), rng.choice(EXPRESSIONS[b_form])))
    else:
        pairs = [(expression, expression) for expression in EXPRESSIONS[form]]
    candidates = {}
    for a, b in pairs:
        answer = answer_to(scene, kind, word, a, b)
        said = a._replace(**{kind: answer}) if kind in ("color", "shape") else a
        if answer is not None and allowed(scene, said, b):
            candidates.setdefault(answer, []).append((a, b))
    return candidates


def answer_to(scene, kind, word, a, b):
    """The answer to a question of a kind about expression A, and B in "are there more A than B?". None: it is not asked."""
    count = scene.count(a)
    if kind == "exists":
        return "yes" if count > 0 else "no"
    if kind == "count":
        return str(count)
    if kind == "compare":
        if a == b or count + scene.count(b) == 0:
            return None
        holds = count > scene.count(b) if word == "more" else count < scene.count(b)
        return "yes" if holds else "no"
    if count != 1:
        return None
    thing = scene.fits[a][0]
    if kind != "side":
        return getattr(thing, kind)
    for where in halves(thing):
        answer = where.split()[0]  # "left of" -> "left"
        if answer in word:
            return answer
    return None


def caption_and_question_lines(scene):
    """Lines of the captions, and lines of the questions. They are numbered together."""
    place = f"regions#{scene.row}"
    lines = []
    for text in captions(scene):
        lines.append(new_line(scene.split, f"{scene.index}/{len(lines)}", "caption", text, features=place))
    count = len(lines)
    for kind, text, answer in questions(scene):
        number = f"{scene.index}/{len(lines)}"
        lines.append(new_line(scene.split, number, kind, text, features=place, answer=answer))
    return lines[:count], lines[count:]


# ---- the tasks of more than a caption or a question ------------------------------------------------------------------
# Entailment and statements about two pictures choose among all scenes of a split. A statement is drawn once and then
# paired with pictures of every answer, so that the words alone tell nothing. The other two tasks take one scene.

STATEMENT_FORMS = {  # what a statement is about: forms of the expression that names the thing
    "color": ("shape", "size shape"),
    "shape": ("color", "size color"),
    "size": ("color", "shape", "color shape"),
}


def fitting_one(scene, form):
    """The expressions of a form that fit exactly one thing of the scene."""
    return [expression for expression in EXPRESSIONS[form] if scene.count(expression) == 1]


def sample(rng, pool, expression, counts, tries=50):
    """A random scene of `pool` in which the number of things that the expression fits is one of `counts`; None if
    `tries` draws find none."""
    if not pool:
        return None
    for _ in range(tries):
        scene = rng.choice(pool)
        if scene.count(expression) in counts:
            return scene
    return None


def entailment_lines(scenes):
    """Visual entailment (ve): a statement such as "the circle is red" with three pictures, one for each answer.

    entailment: the only circle is red.   contradiction: the only circle has another colour.   neutral: no circle.
    The three pictures have equally many things. Of sizes, "large" is stated four times as often as "small": with
    equal shares a model must read word and size together from the start, and training does not get off the ground.
    """
    rng = random.Random(scenes[0].key("entailments"))
    same_number = {}  # {number of things: scenes}
    single = {}  # {(expression, number of things): scenes with a single thing that it fits}
    for scene in scenes:
        number = len(scene.things)
        same_number.setdefault(number, []).append(scene)
        for expression, things in scene.fits.items():
            if len(things) == 1:
                single.setdefault((expression, number), []).append(scene)
    for k in range(3 * len(scenes)):
        scene = scenes[k % len(scenes)]
        number = len(scene.things)
        kind = rng.choice(("color", "shape", "size"))
        candidates = fitting_one(scene, rng.choice(STATEMENT_FORMS[kind]))
        if not candidates:
            continue
        expression = rng.choice(candidates)
        value = getattr(scene.fits[expression][0], kind)
        named = expression._replace(**{kind: value})
        if not allowed(scene, named) or (value == "small" and rng.random() < 0.75):
            continue
        contradiction = sample(rng, single[expression, number], named, [0])
        neutral = sample(rng, same_number[number], expression, [0])
        if contradiction is None or neutral is None:
            continue
        said = f"a {value}" if kind == "shape" else value
        text = f"the {phrase(expression)} is {said}"
        for answer, shown in (("contradiction", contradiction), ("entailment", scene), ("neutral", neutral)):
            yield new_line(scene.split, f"{k}/{answer}", kind, text, answer=answer, features=f"regions#{shown.row}")


def two_picture_lines(scenes):
    """Statements about two pictures (nlvr2), in groups of four of which two are true.

    kind "one": "exactly one picture shows a red circle". Two left pictures, with and without one, meet two right
    ones. Neither picture alone tells anything.
    kind "more": "more circles on the left than on the right", and "fewer", of two pictures with n and n + 1 circles
    (n = 0, 1 or 2) in both orders. One picture alone decides only if it shows none or three, in a third of the pairs.
    """
    rng = random.Random(scenes[0].key("statements of two"))
    by_count = {}  # {(expression, n): scenes with n things that it fits, n > 0}
    for scene in scenes:
        for expression, things in scene.fits.items():
            by_count.setdefault((expression, len(things)), []).append(scene)
    for k in range(2 * len(scenes)):
        form = rng.choice(("color", "shape", "color shape"))
        candidates = [expression for expression in EXPRESSIONS[form] if allowed(scenes[0], expression)]
        if not candidates:  # split "compose", and a form that names no pair
            candidates = [Expression(None, *rng.choice(HELD_OUT))]
        expression = rng.choice(candidates)
        if rng.random() < 0.5:
            kind = "one"
            group = exactly_one_group(scenes, expression, rng)
        else:
            kind = "more"
            group = more_or_fewer_group(scenes, by_count, expression, rng)
        if any(left is None or right is None or left is right for _, left, right in group):
            continue
        for number, (text, left, right) in enumerate(group):
            left_count = left.count(expression)
            right_count = right.count(expression)
            truths = {
                "exactly": (left_count > 0) != (right_count > 0),
                "more": left_count > right_count,
                "fewer": left_count < right_count,
            }
            label = truths[text.split()[0]]
            places = [f"regions#{left.row}", f"regions#{right.row}"]
            yield new_line(left.split, f"{k}/{number}", kind, text, label=label, features=places)


def exactly_one_group(scenes, expression, rng):
    """Four (text, left scene, right scene); a scene that was not found is None."""
    text = f"exactly one picture shows {phrase(expression, article=True)}"
    found = []  # left with one, left without, right with one, right without
    for counts in (range(1, 9), [0], range(1, 9), [0]):
        found.append(sample(rng, scenes, expression, counts, tries=200))
    return [(text, left, right) for left in found[:2] for right in found[2:]]


def more_or_fewer_group(scenes, by_count, expression, rng):
    """Four (text, left scene, right scene); a scene that was not found is None."""
    n = rng.choice((0, 1, 2))
    pool = scenes if n == 0 else by_count.get((expression, n), [])
    few = sample(rng, pool, expression, [n])
    many = sample(rng, by_count.get((expression, n + 1), []), expression, [n + 1])
    end = f"{phrase(expression, plural=True)} on the left than on the right"
    return [
        (f"more {end}", few, many),
        (f"more {end}", many, few),
        (f"fewer {end}", few, many),
        (f"fewer {end}", many, few),
    ]


def choice_lines(scene):
    """A question with four answers and four reasons for the right one (vcr): a list of one line or none.

    The question asks for the colour or shape of a thing. Wrong answers are, as far as possible, colours or shapes of
    the picture. A reason says what else is in the picture. The four reasons cross two colours with two shapes, and
    only one of these pairs is there. No wrong answer and no reason names a held-out pair.
    """
    rng = random.Random(scene.key("choices"))
    kind, form = rng.choice((("color", "shape"), ("shape", "color")))
    candidates = []
    for expression in fitting_one(scene, form):
        thing = scene.fits[expression][0]
        if allowed(scene, expression._replace(**{kind: getattr(thing, kind)})):
            candidates.append((expression, thing))
    pairs = [pair for pair in EXPRESSIONS["color shape"] if not pair.held_out]
    present = [pair for pair in pairs if scene.count(pair) > 0]
    if not candidates or not present:
        return []
    expression, thing = rng.choice(candidates)
    choices = answer_choices(scene, expression, kind, rng)
    true = rng.choice(present)
    crossed = []  # expressions that share neither word with `true` and give three false reasons
    for other in pairs:
        false = [other, other._replace(shape=true.shape), other._replace(color=true.color)]
        if all(pair in pairs and pair not in present for pair in false):
            crossed.append(other)
    if (true.color, true.shape) == (thing.color, thing.shape) or not crossed:
        return []
    other = rng.choice(crossed)
    reasons = [true, true._replace(shape=other.shape), true._replace(color=other.color), other]  # the first is true
    choice_order = rng.sample(range(4), 4)
    reason_order = rng.sample(range(4), 4)
    line = {
        "id": f"{scene.split}/{scene.index}",
        "split": scene.split,
        "text": f"what {kind} is the {phrase(expression)}?",
        "choices": [choices[i] for i in choice_order],
        "label": choice_order.index(0),
        "reasons": [f"it is with {phrase(reasons[i], article=True)}" for i in reason_order],
        "reason": reason_order.index(0),
        "features": f"regions#{scene.row}",
    }
    return [line]


def answer_choices(scene, expression, kind, rng):
    """The colour or shape of the thing, then three wrong ones: first of all those that the picture shows."""
    right = getattr(scene.fits[expression][0], kind)
    wrong = []
    for word in WORDS[kind]:
        if word != right and not expression._replace(**{kind: word}).held_out:
            wrong.append(word)
    rng.shuffle(wrong)
    shown = [getattr(thing, kind) for thing in scene.things]
    wrong.sort(key=lambda word: word not in shown)  # False sorts first; the order within both parts stays random
    return [right, *wrong[:3]]


def referring_lines(scene):
    """Referring expressions (refer): a list of lines, one for each thing, with an expression that fits it alone.

    kind "words": no word can be left out, as without it the expression fits another thing too.
    kind "side": the words fit several things, and the half of the picture tells which one is meant.
    kind "spare": one word is needed and another is not.
    Each thing gets the first of these kinds that it has. A scene in which a thing has none is left out, so that the
    picture alone does not tell which things are asked for. In split "compose", where only things of held-out pairs
    are named, scenes are kept.
    """
    rng = random.Random(scene.key("expressions"))
    found = referring_expressions(scene)
    if scene.split != "compose" and not all(found.values()):
        return []
    lines = []
    for number, (thing, texts) in enumerate(found.items()):
        for kind in ("words", "side", "spare"):
            if kind in texts:
                text = rng.choice(texts[kind])
                target = {"features": f"boxes#{scene.row}", "target": list(thing.box)}
                lines.append(new_line(scene.split, f"{scene.index}/{number}", kind, text, **target))
                break
    return lines


def referring_expressions(scene):
    """{thing: {kind: texts}}; kinds as in `referring_lines`."""
    found = {thing: {} for thing in scene.things}
    for expression, things in scene.fits.items():
        needed = [scene.count(shorter) > 1 for shorter in expression.without_one_word()]
        if len(needed) < 2 or not allowed(scene, expression):
            continue
        if len(things) == 1 and any(needed):
            kind = "words" if all(needed) else "spare"
            found[things[0]].setdefault(kind, []).append(phrase(expression))
        for where, opposite in OPPOSITES.items():
            there = [thing for thing in things if where in halves(thing)]
            elsewhere = [thing for thing in things if opposite in halves(thing)]
            if len(there) == 1 and len(elsewhere) == len(things) - 1 > 0:
                found[there[0]].setdefault("side", []).append(f"{phrase(expression)} {where} the middle")
    return found
