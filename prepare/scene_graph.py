"""Scene graphs: what stands in a drawn scene, and the words for it. Used by scenes.py and scene_texts.py.

A scene is a list of 3 to 8 things: coloured shapes on a dark ground. Pictures, regions and texts are all made from it.
Six pairs of colour and shape are held out. They stand in pictures of all splits, but no text for training, validation
or test names one, and every text of split "compose" does. That split measures what a model makes of known words in
new pairs.
"""

import itertools
import random
from dataclasses import dataclass, field
from typing import NamedTuple

SIDE = 112  # width and height of a picture, pixels
MIDDLE = SIDE / 2
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
HELD_OUT_COLORS = ("cyan", "orange", "purple", "green", "yellow", "blue")
HELD_OUT = tuple(zip(HELD_OUT_COLORS, SHAPES))  # pairs that only texts of split "compose" name
PLURALS = {noun: noun + "s" for noun in (*SHAPES, "thing")}
PLURALS["cross"] = "crosses"
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight")
# Words that only the picture tells. Pretraining measures separately how well these are predicted.
CONTENT_WORDS = {*SIZES, *COLORS, *SHAPES, *PLURALS.values(), *NUMBERS[1:], "left", "right", "above", "below"}
CONTENT_WORDS.remove("things")

# ---- the scene graph -------------------------------------------------------------------------------------------------


class Expression(NamedTuple):
    """The words that name a thing: (None, "red", "circle") is "red circle". None: this word is left out."""

    size: str | None
    color: str | None
    shape: str | None


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


def make_scene(seed, split, index):
    """Scene number `index` of a split: 3 to 8 things, few more often than many.

    Two boxes overlap by at most a quarter of the smaller one's area, so that nothing is hidden.
    """
    scene = Scene(seed, split, index, row=index, things=[])
    rng = random.Random(scene.key("graph"))
    goal = rng.choices(range(3, 9), (8, 6, 4, 2, 1, 1))[0]
    for _ in range(200):
        if len(scene.things) == goal:
            break
        thing = sample_thing(scene, rng)
        if not any(hides(thing, other) for other in scene.things):
            scene.things.append(thing)
    rng.shuffle(scene.things)  # the order of drawing then says nothing about how a thing came to be
    for thing in scene.things:
        for words in itertools.product((None, thing.size), (None, thing.color), (None, thing.shape)):
            scene.fits.setdefault(Expression(*words), []).append(thing)
    return scene


def sample_thing(scene, rng):
    """A thing at a random place. Its colour, and its shape, is in one case of four that of an earlier thing, so that
    there is something to count. In split "compose" the first two things are of held-out pairs."""
    color = rng.choice(list(COLORS))
    shape = rng.choice(SHAPES)
    size = rng.choice(list(SIZES))
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


def hides(a, b):
    """True if the boxes of two things overlap by more than a quarter of the smaller one."""
    width = a.half + b.half - abs(a.x - b.x)
    height = a.half + b.half - abs(a.y - b.y)
    if width <= 0 or height <= 0:
        return False
    side = 2 * min(a.half, b.half)  # of the smaller box: no overlap is wider
    return min(width, side) * min(height, side) > 0.25 * side**2


# ---- words -----------------------------------------------------------------------------------------------------------


def expressions_of(form):
    """All expressions that have the words which `form` names, "color shape" for example."""
    sizes = list(SIZES) if "size" in form else [None]
    colors = list(COLORS) if "color" in form else [None]
    shapes = list(SHAPES) if "shape" in form else [None]
    return [Expression(*words) for words in itertools.product(sizes, colors, shapes)]


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


def direction(a, b):
    """Where thing a lies as seen from thing b: "left of", "right of", "above", "below"; None if that is not clear.

    It is clear if they are 20 pixels apart along one axis, and 1.5 times as far as along the other.
    """
    dx = a.x - b.x
    dy = a.y - b.y
    if max(abs(dx), abs(dy)) < max(20, 1.5 * min(abs(dx), abs(dy))):
        return None
    if abs(dx) > abs(dy):
        return "left of" if dx < 0 else "right of"
    return "above" if dy < 0 else "below"


def halves(thing):
    """The halves of the picture that a thing is clearly in: "left of" or "right of" the middle, "above" or "below"."""
    found = []
    for offset, before, after in ((thing.x - MIDDLE, "left of", "right of"), (thing.y - MIDDLE, "above", "below")):
        if offset <= -MARGIN:
            found.append(before)
        if offset >= MARGIN:
            found.append(after)
    return found


def allowed(scene, expressions, asked=None):
    """True if a text with these expressions may belong to the scene's split.

    asked: a thing whose colour or shape is the answer; the text and its answer together then name its pair.
    Texts of split "compose" must name a held-out pair, those of the other splits must not.
    """
    held_out = asked is not None and (asked.color, asked.shape) in HELD_OUT
    for expression in expressions:
        if (expression.color, expression.shape) in HELD_OUT:
            held_out = True
    return held_out == (scene.split == "compose")
