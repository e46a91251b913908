"""What is said of a drawn scene: captions, questions, and the examples of four more tasks.

Everything is true of its scene graph, and drawn so that the words alone say little about the answer: first the kind of
text, then the answer, then the words.
Each function draws from a random stream of its own (Scene.key), so that a change of one leaves the others as they were.
"""

import itertools
import random
from typing import NamedTuple

from prepare.scene_graph import (
    COLORS,
    EXPRESSIONS,
    HELD_OUT,
    MARGIN,
    MIDDLE,
    NUMBERS,
    SHAPES,
    Expression,
    allowed,
    direction,
    halves,
    phrase,
)


def new_line(scene, number, kind, text):
    """What the lines of most tasks have in common: a line of a JSONL file about the picture of one scene."""
    return {
        "id": f"{scene.split}/{scene.index}/{number}",
        "split": scene.split,
        "kind": kind,
        "text": text,
        "features": f"regions#{scene.row}",
    }


def fitting_one(scene, form):
    """The expressions of a form that fit exactly one thing of the scene."""
    return [expression for expression in EXPRESSIONS[form] if scene.count(expression) == 1]


# ---- captions --------------------------------------------------------------------------------------------------------


class Clause(NamedTuple):
    """A part of a caption."""

    phrasings: tuple  # texts that say the same
    expressions: tuple  # the expressions in it


def captions(scene, count=8):
    """Up to `count` different true captions: clauses joined by "and".

    In a caption every content word follows from the picture and the other words, so that a masked one has one right
    answer (see the clauses below). Two captions in five place a thing, beside another one or in a half of the
    picture. A caption has a relation of two things and one more clause, or three clauses, so that it fits few pictures.
    """
    rng = random.Random(scene.key("captions"))
    names = unmistakable_names(scene)
    relations = allowed_clauses(scene, relation_clauses(names))
    in_half = allowed_clauses(scene, half_clauses(names))
    others = allowed_clauses(scene, thing_clauses(names) + count_clauses(scene))
    found = []
    for _ in range(8 * count):
        if len(found) == count:
            break
        positions = in_half
        goal = 3
        if rng.random() < 0.3:
            positions = relations
            goal = 2
        clauses = []
        if positions and rng.random() < 0.4:
            clauses = rng.sample(positions, 1)
        else:
            goal = 3
        add_clauses(scene, clauses, rng.sample(others, len(others)), goal)
        expressions = []
        for clause in clauses:
            expressions.extend(clause.expressions)
        if len(expressions) > 1 and allowed(scene, expressions):
            rng.shuffle(clauses)
            caption = " and ".join(rng.choice(clause.phrasings) for clause in clauses)
            if caption not in found:
                found.append(caption)
    return found


def add_clauses(scene, clauses, others, goal):
    """Fills `clauses` up to `goal` with those of the others that name a thing not yet named."""
    named = set()
    for clause in clauses:
        for expression in clause.expressions:
            named.update(scene.fits[expression])
    for clause in others:
        things = scene.fits[clause.expressions[0]]
        if len(clauses) < goal and not named.issuperset(things):
            clauses.append(clause)
            named.update(things)


def unmistakable_names(scene):
    """{thing: Expression} for the things that a caption may name.

    By colour and shape where no other thing has either. Else by size, colour and shape if no other thing shares two
    of the three. In both cases each word follows from the others.
    """
    names = {}
    for thing in scene.things:
        same_color = scene.count(Expression(None, thing.color, None))
        same_shape = scene.count(Expression(None, None, thing.shape))
        most_shared = 0
        for other in scene.things:
            if other is not thing:
                shared = (other.size == thing.size) + (other.color == thing.color) + (other.shape == thing.shape)
                most_shared = max(most_shared, shared)
        if same_color == 1 and same_shape == 1:
            names[thing] = Expression(None, thing.color, thing.shape)
        elif most_shared < 2:
            names[thing] = Expression(thing.size, thing.color, thing.shape)
    return names


def relation_clauses(names):
    """Clauses such as "red circle left of blue star", for named things with a clear direction from one to the other."""
    clauses = []
    for (a, name_a), (b, name_b) in itertools.permutations(names.items(), 2):
        where = direction(a, b)
        if where is not None:
            short = f"{phrase(name_a)} {where} {phrase(name_b)}"
            full = f"{phrase(name_a, article=True)} is {where} {phrase(name_b, article=True)}"
            clauses.append(Clause((short, full), (name_a, name_b)))
    return clauses


def half_clauses(names):
    """Clauses such as "red circle above the middle"."""
    clauses = []
    for thing, name in names.items():
        for where in halves(thing):
            clauses.append(Clause((f"{phrase(name)} {where} the middle",), (name,)))
    return clauses


def thing_clauses(names):
    """Clauses such as "there is a red circle"."""
    return [Clause((phrase(name), f"there is {phrase(name, article=True)}"), (name,)) for name in names.values()]


def count_clauses(scene):
    """Clauses such as "exactly two circles": where no other colour or shape, put into its place, has the same count."""
    clauses = []
    for expression in scene.fits:
        if expression.size is not None or expression.shape is None:
            continue
        number = scene.count(expression)
        rivals = [expression._replace(shape=shape) for shape in SHAPES if shape != expression.shape]
        if expression.color is not None:
            rivals += [expression._replace(color=color) for color in COLORS if color != expression.color]
        if any(scene.count(rival) == number for rival in rivals):
            continue
        words = f"{NUMBERS[number]} {phrase(expression, plural=number > 1)}"
        phrasings = (f"exactly {words}", words)
        if number == 1:
            phrasings = (f"exactly {words}",)  # "one" alone could be read as "a"
        clauses.append(Clause(phrasings, (expression,)))
    return clauses


def allowed_clauses(scene, clauses):
    """Without the clauses that the split may not have. In split "compose" a caption is judged as a whole."""
    if scene.split == "compose":
        return clauses
    return [clause for clause in clauses if allowed(scene, clause.expressions)]


def caption_lines(scene):
    """Lines of the captions."""
    return [new_line(scene, number, "caption", text) for number, text in enumerate(captions(scene))]


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
    "size": (
        ("color", "shape", "color shape"),
        ("what size is the {thing}?", "is the {thing} small or large?"),
    ),
    "compare": (
        (("color", "color"), ("shape", "shape"), ("color", "shape"), ("color shape", "color shape")),
        ("are there {word} {things} than {others}?",),
    ),
    "side": (
        ("color", "shape", "color shape", "size shape"),
        ("is the {thing} {word} the middle?", "does the {thing} lie {word} the middle?"),
    ),
}
PAIR_FORMS = ("color shape", "size color shape", ("color shape", "color shape"))  # forms that name pairs


def questions(scene, count=8):
    """Up to `count` different (kind, question, answer).

    The kind is drawn first, then the form of the expression, then the answer among those that the scene allows, and
    only then the words. So a question's words say little about its answer.
    """
    rng = random.Random(scene.key("questions"))
    found = {}  # {text: (kind, text, answer)}
    for _ in range(20 * count):
        if len(found) == count:
            break
        kind = rng.choice([*QUESTIONS, "side"])  # "side" twice as often: it is learned last
        forms, phrasings = QUESTIONS[kind]
        if scene.split == "compose":  # where the form allows, name a pair: a "no" then names one like a "yes"
            pair_forms = [form for form in forms if form in PAIR_FORMS]
            if pair_forms:
                forms = pair_forms
        form = rng.choice(forms)
        word = ""
        if kind == "compare":
            word = rng.choice(("more", "fewer"))
            candidates = compare_candidates(scene, form, word, rng)
        elif kind == "side":
            word = rng.choice(("left or right of", "above or below"))
            candidates = side_candidates(scene, form, word)
        else:
            candidates = fact_candidates(scene, form, kind)
        if len(candidates) == 0:
            continue
        if len(candidates) == 1 and kind in ("exists", "compare"):
            continue  # a yes-no question is asked only where both answers are possible
        weights = [1] * len(candidates)
        if kind == "count":  # large counts are rare in pictures, so they are taken more often where there are any
            weights = [max(1, int(answer)) for answer in candidates]
        answer = rng.choices(list(candidates), weights)[0]
        expressions = rng.choice(candidates[answer])
        text = rng.choice(phrasings).format(
            a_thing=phrase(expressions[0], article=True),
            thing=phrase(expressions[0]),
            things=phrase(expressions[0], plural=True),
            others=phrase(expressions[-1], plural=True),
            word=word,
        )
        found.setdefault(text, (kind, text, answer))
    return list(found.values())


def compare_candidates(scene, form, word, rng):
    """{answer: [two expressions]} for "are there more A than B?" (word "more" or "fewer"), from 30 random pairs."""
    candidates = {}
    for _ in range(30):
        a_form, b_form = rng.sample(form, 2)  # in random order
        a = rng.choice(EXPRESSIONS[a_form])
        b = rng.choice(EXPRESSIONS[b_form])
        difference = scene.count(a) - scene.count(b)
        if word == "fewer":
            difference = -difference
        if a != b and scene.count(a) + scene.count(b) > 0 and allowed(scene, (a, b)):
            answer = "yes" if difference > 0 else "no"
            candidates.setdefault(answer, []).append((a, b))
    return candidates


def side_candidates(scene, form, word):
    """{answer: [one expression]} for "is the A left or right of the middle?" (word "left or right of")."""
    candidates = {}
    for expression in fitting_one(scene, form):
        if allowed(scene, [expression]):
            for where in halves(scene.fits[expression][0]):
                answer = where.split()[0]  # "left of" -> "left"
                if answer in word.split():
                    candidates.setdefault(answer, []).append((expression,))
    return candidates


def fact_candidates(scene, form, kind):
    """{answer: [one expression]} for the kinds exists, count, color, shape and size."""
    candidates = {}
    for expression in EXPRESSIONS[form]:
        number = scene.count(expression)
        asked = None
        if kind == "exists":
            answer = "yes" if number > 0 else "no"
        elif kind == "count":
            answer = str(number)
        elif number == 1:
            answer = getattr(scene.fits[expression][0], kind)
            if kind != "size":
                asked = scene.fits[expression][0]
        else:
            continue
        if allowed(scene, [expression], asked):
            candidates.setdefault(answer, []).append((expression,))
    return candidates


def question_lines(scene, first):
    """Lines of the questions. They are numbered from `first`, after the captions."""
    lines = []
    for number, (kind, text, answer) in enumerate(questions(scene), first):
        line = new_line(scene, number, kind, text)
        line["answer"] = answer
        lines.append(line)
    return lines


# ---- the tasks of more than a caption or a question ------------------------------------------------------------------
# Entailment and statements about two pictures choose among all scenes of a split. A statement is drawn once and then
# paired with pictures of every answer, so that the words alone tell nothing. The other two tasks take one scene.

STATEMENT_FORMS = {  # what a statement is about: forms of the expression that names the thing
    "color": ("shape", "size shape"),
    "shape": ("color", "size color"),
    "size": ("color", "shape", "color shape"),
}


def sample(rng, pool, fits, tries=50):
    """A random member of `pool` for which fits(member) is true; None if it is not found in so many tries."""
    if not pool:
        return None
    for _ in range(tries):
        member = rng.choice(pool)
        if fits(member):
            return member
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
        kind = rng.choice(("color", "shape", "size"))
        form = rng.choice(STATEMENT_FORMS[kind])
        candidates = fitting_one(scene, form)
        if not candidates:
            continue
        expression = rng.choice(candidates)
        value = getattr(scene.fits[expression][0], kind)
        named = expression  # with all words that the statement says of the thing
        if kind != "size":
            named = expression._replace(**{kind: value})
        if not allowed(scene, [named]) or (value == "small" and rng.random() < 0.75):
            continue
        other, absent = contrasting_scenes(scene, expression, kind, single, same_number, rng)
        if other is None or absent is None:
            continue
        text = f"the {phrase(expression)} is {value}"
        if kind == "shape":
            text = f"the {phrase(expression)} is {phrase(Expression(None, None, value), article=True)}"
        for answer, picture in (("contradiction", other), ("entailment", scene), ("neutral", absent)):
            yield {
                "id": f"{scene.split}/{k}/{answer}",
                "split": scene.split,
                "kind": kind,
                "text": text,
                "answer": answer,
                "features": f"regions#{picture.row}",
            }


def contrasting_scenes(scene, expression, kind, single, same_number, rng):
    """A scene where the only thing that the expression fits has another value of `kind`, and one where it fits nothing.

    Both have as many things as `scene`, where it fits one thing.   single, same_number: as in `entailment_lines`.
    """
    number = len(scene.things)
    value = getattr(scene.fits[expression][0], kind)

    def has_other_value(candidate):
        return getattr(candidate.fits[expression][0], kind) != value

    def has_none(candidate):
        return candidate.count(expression) == 0

    other = sample(rng, single[expression, number], has_other_value)
    absent = sample(rng, same_number[number], has_none)
    return other, absent


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
    split = scenes[0].split
    for k in range(2 * len(scenes)):
        form = rng.choice(("color", "shape", "color shape"))
        candidates = [expression for expression in EXPRESSIONS[form] if allowed(scenes[0], [expression])]
        if not candidates:  # split "compose", and a form that names no pair
            candidates = [Expression(None, *rng.choice(HELD_OUT))]
        expression = rng.choice(candidates)
        if rng.random() < 0.5:
            kind = "one"
            group = exactly_one_group(scenes, expression, rng)
        else:
            kind = "more"
            group = more_or_fewer_group(scenes, by_count, expression, rng)
        if any(left is None or right is None or left is right for _, left, right, _ in group):
            continue
        for number, (text, left, right, label) in enumerate(group):
            yield {
                "id": f"{split}/{k}/{number}",
                "split": split,
                "kind": kind,
                "text": text,
                "label": label,
                "features": [f"regions#{left.row}", f"regions#{right.row}"],
            }


def exactly_one_group(scenes, expression, rng):
    """Four (text, left scene, right scene, label); a scene that was not found is None."""
    text = f"exactly one picture shows {phrase(expression, article=True)}"

    def has_one(scene):
        return scene.count(expression) > 0

    def has_none(scene):
        return scene.count(expression) == 0

    left_with = sample(rng, scenes, has_one, tries=200)
    left_without = sample(rng, scenes, has_none, tries=200)
    right_with = sample(rng, scenes, has_one, tries=200)
    right_without = sample(rng, scenes, has_none, tries=200)
    return [
        (text, left_with, right_with, False),
        (text, left_with, right_without, True),
        (text, left_without, right_with, True),
        (text, left_without, right_without, False),
    ]


def more_or_fewer_group(scenes, by_count, expression, rng):
    """Four (text, left scene, right scene, label); a scene that was not found is None."""
    n = rng.choice((0, 1, 2))
    pool = scenes if n == 0 else by_count.get((expression, n), [])
    fewer = sample(rng, pool, lambda scene: scene.count(expression) == n)
    more = sample(rng, by_count.get((expression, n + 1), []), lambda scene: True)
    end = f"{phrase(expression, plural=True)} on the left than on the right"
    return [
        (f"more {end}", fewer, more, False),
        (f"more {end}", more, fewer, True),
        (f"fewer {end}", fewer, more, True),
        (f"fewer {end}", more, fewer, False),
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
        if allowed(scene, [expression], asked=scene.fits[expression][0]):
            candidates.append(expression)
    present = []
    absent = []
    for pair in EXPRESSIONS["color shape"]:
        if (pair.color, pair.shape) in HELD_OUT:
            continue
        if scene.count(pair) > 0:
            present.append(pair)
        else:
            absent.append(pair)
    if not candidates or not present:
        return []
    expression = rng.choice(candidates)
    thing = scene.fits[expression][0]
    choices = answer_choices(scene, expression, kind, rng)
    true = rng.choice(present)
    crossed = []  # expressions that share neither word with `true` and give three false reasons
    for other in absent:
        if other._replace(shape=true.shape) in absent and other._replace(color=true.color) in absent:
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
    for word in list(COLORS) if kind == "color" else SHAPES:
        named = expression._replace(**{kind: word})
        if word != right and (named.color, named.shape) not in HELD_OUT:
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
        kinds = [kind for kind in ("words", "side", "spare") if kind in texts]
        if not kinds:
            continue
        line = new_line(scene, number, kinds[0], rng.choice(texts[kinds[0]]))
        line["target"] = list(thing.box)
        line["features"] = f"boxes#{scene.row}"
        lines.append(line)
    return lines


def referring_expressions(scene):
    """{thing: {kind: texts}}; kinds as in `referring_lines`."""
    found = {thing: {} for thing in scene.things}
    for expression, things in scene.fits.items():
        words = [name for name in expression._fields if getattr(expression, name) is not None]
        if len(words) < 2 or not allowed(scene, [expression]):
            continue
        needed = [scene.count(expression._replace(**{name: None})) > 1 for name in words]
        if len(things) == 1 and any(needed):
            kind = "words" if all(needed) else "spare"
            found[things[0]].setdefault(kind, []).append(phrase(expression))
        for axis, before, after in (("x", "left of", "right of"), ("y", "above", "below")):
            if len(things) < 2:
                continue
            ordered = sorted(things, key=lambda thing: getattr(thing, axis))
            offsets = [getattr(thing, axis) - MIDDLE for thing in ordered]
            if offsets[0] <= -MARGIN and offsets[1] >= MARGIN:
                found[ordered[0]].setdefault("side", []).append(f"{phrase(expression)} {before} the middle")
            if offsets[-1] >= MARGIN and offsets[-2] <= -MARGIN:
                found[ordered[-1]].setdefault("side", []).append(f"{phrase(expression)} {after} the middle")
    return found
