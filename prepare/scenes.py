"""Drawn scenes: the built-in data set. Every command of this project runs on it without a download.

    python prepare/scenes.py OUT [--count N] [--seed S]

A scene is a list of 3 to 8 things: coloured shapes on a dark ground. Everything else is made from that list, the scene
graph: a picture, the regions that an imitated detector finds in it, captions, questions and the examples of four more
tasks. Pictures stand in for COCO and Visual Genome, the imitation for Faster R-CNN (bottom-up attention, Anderson
2018), and crops of 12 x 12 pixels for its features.

A model must look to do well: texts are drawn so that the words alone say little about the answer.
Six pairs of colour and shape (HELD_OUT) stand in pictures of all splits, but no text for training, validation or test
names one. Every text of split "compose" does. That split measures what a model makes of known words in new pairs.

    dataset.json      names the files; default options
    regions           feature store: what the detector finds, pictures of all splits
    boxes             feature store: the true boxes of the same pictures, without classes
    pretrain.jsonl    captions, and one question for every four captions
    vqa.jsonl  captions.jsonl  ve.jsonl  nlvr2.jsonl  vcr.jsonl  refer.jsonl
    vocab.txt         word pieces of the texts of all tasks, so that one pretrained model can be fine-tuned on any

The data set depends on the seed alone. Each purpose has its own stream of random numbers (Scene.key), so that a change of the
texts leaves the pictures as they were.
"""

import json
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for `python prepare/scenes.py`

from support import interrupt  # noqa: F401, I001 (before torch, for Ctrl-C)

import numpy as np
from PIL import Image, ImageDraw

import data
from prepare import scene_texts as texts
from prepare.scene_texts import COLORS, CONTENT_WORDS, SHAPES, SIDE, make_scene
from support.ranges import in_range
from support.regions import parallel, region_features

VERSION = 14  # raise it when `make` writes something else: it is part of the name of the folder in the cache
COUNTS = {"train": 10_000, "val": 500, "test": 1_000, "compose": 500}  # pictures of each split

# ---- the picture and the imitated detector ---------------------------------------------------------------------------


def draw_scene(scene):
    """The picture, (SIDE, SIDE) RGB: dark ground, the things, a soft gradient of light, noise.

    The noise is Gaussian with a standard deviation of 8 of 255 levels.
    """
    rng = np.random.default_rng(list(scene.key("drawing").encode()))
    ground = int(rng.integers(16, 60))
    canvas = Image.new("RGB", (2 * SIDE, 2 * SIDE), (ground, ground, ground))  # twice as large: reduce smooths edges
    pen = ImageDraw.Draw(canvas)
    for thing in scene.things:
        color = np.clip(COLORS[thing.color] + rng.integers(-8, 9, 3), 0, 255)
        draw_shape(pen, thing.shape, 2 * thing.x, 2 * thing.y, 2 * thing.half, tuple(color.tolist()))
    slopes = rng.uniform(-12, 12, (2, 1)).astype(np.float32)  # (2, 1): of the light, downwards and to the right
    light = slopes * np.linspace(-1, 1, SIDE, dtype=np.float32)  # (2, SIDE)
    noise = rng.standard_normal((SIDE, SIDE, 3), dtype=np.float32) * 8
    pixels = np.asarray(canvas.reduce(2)) + noise + light[0][:, None, None] + light[1][:, None]  # (SIDE, SIDE, 3)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def draw_shape(pen, shape, x, y, half, color):
    """Draws one shape around the centre (x, y), `half` wide to each side."""
    box = (x - half, y - half, x + half, y + half)
    arm = 0.33 * half  # half the width of a cross's arm
    if shape == "circle":
        pen.ellipse(box, fill=color)
    elif shape == "ring":
        pen.ellipse(box, outline=color, width=round(0.45 * half))
    elif shape == "square":
        pen.rectangle(box, fill=color)
    elif shape == "triangle":
        pen.polygon([(x, y - half), (x + half, y + half), (x - half, y + half)], fill=color)
    elif shape == "cross":
        pen.rectangle((x - half, y - arm, x + half, y + arm), fill=color)
        pen.rectangle((x - arm, y - half, x + arm, y + half), fill=color)
    elif shape == "star":
        corners = []
        for i in range(10):  # alternately on the rim and at 0.4 of it
            angle = math.pi * i / 5
            radius = half if i % 2 == 0 else 0.4 * half
            corners.append((x + radius * math.sin(angle), y - radius * math.cos(angle)))
        pen.polygon(corners, fill=color)


def detect(scene):
    """What an object detector might find in the scene, in random order.

    Each side of a box moves by up to 8% of the box's width. Classes are soft, see `soft_classes`. Up to two further
    boxes are false; about half of what they hold is background.
    Returns a dict of N rows: boxes (N, 4) pixels; object_probs (N, 7), class 0 = background; objects (N,), the most
    likely shape, and object_conf (N,), its probability; attributes (N,), the most likely colour, and attribute_conf.
    """
    rng = np.random.default_rng(list(scene.key("detector").encode()))
    boxes = np.array([thing.box for thing in scene.things])  # (things, 4)
    half = np.array([thing.half for thing in scene.things])  # (things,)
    boxes += rng.uniform(-0.16, 0.16, boxes.shape) * half[:, None]
    false = int(rng.integers(0, 3))
    corner = rng.uniform(0, SIDE - 40, (false, 2))
    far_corner = corner + rng.uniform(14, 40, (false, 2))
    boxes = np.concatenate([boxes, np.concatenate([corner, far_corner], 1)])  # (N, 4)

    shape = np.array([SHAPES.index(thing.shape) for thing in scene.things])
    color = np.array([list(COLORS).index(thing.color) for thing in scene.things])
    objects = soft_classes(rng, 1 + shape, 1 + (shape + 3) % 6, 7)
    other_color = (color + rng.integers(1, 8, len(color))) % 8
    colors = soft_classes(rng, color, other_color, 8)
    objects = np.concatenate([objects, rng.dirichlet((7, 1, 1, 1, 1, 1, 1), false)])  # (N, 7)
    colors = np.concatenate([colors, rng.dirichlet(np.full(8, 2.0), false)])  # (N, 8)

    order = rng.permutation(len(boxes))
    objects = objects[order]
    colors = colors[order]
    return {
        "boxes": np.clip(boxes, 0, SIDE)[order],
        "object_probs": objects,
        "objects": objects[:, 1:].argmax(1),
        "object_conf": objects[:, 1:].max(1),
        "attributes": colors.argmax(1),
        "attribute_conf": colors.max(1),
    }


def soft_classes(rng, truth, alike, classes):
    """Soft classes of n things, (n, classes): rows sum to 1.

    truth: (n,) the right class.   alike: (n,) the class it is easily taken for.
    The top class is `truth`, and `alike` for 3% of the things. It gets 0.75 to 0.97. Most of the rest goes to the other
    of the two, some to each further class.
    """
    rows = np.arange(len(truth))
    wrong = rng.random(len(truth)) < 0.03
    top = np.where(wrong, alike, truth)
    second = np.where(wrong, truth, alike)
    rest = rng.random((len(truth), classes)) * 0.3
    rest[rows, second] += 1
    rest[rows, top] = 0
    confidence = rng.uniform(0.75, 0.97, len(truth))
    probs = rest * ((1 - confidence) / rest.sum(1))[:, None]  # (n, classes)
    probs[rows, top] = confidence
    return probs


# ---- the data set ----------------------------------------------------------------------------------------------------

FILES = {  # task: its file
    "pretrain": "pretrain.jsonl",
    "vqa": "vqa.jsonl",
    "ve": "ve.jsonl",
    "nlvr2": "nlvr2.jsonl",
    "vcr": "vcr.jsonl",
    "retrieval": "captions.jsonl",
    "refer": "refer.jsonl",
    "caption": "captions.jsonl",
}
DATASET_JSON = {
    "name": "scenes",
    "files": FILES,
    "extra_splits": ["compose", "detected"],
    "vocab": "vocab.txt",
    "content_words": sorted(CONTENT_WORDS),
    "regions": {"kind": "patches", "patch": 12, "boxes": "given"},
    # mask: captions have a dozen words, not thirty; masking 15% of them leaves too little to learn in five minutes.
    # captions: a scene has up to eight; with one each, the full matrix of 200 pictures takes seconds.
    "defaults": {"steps": 2400, "steps_one_objective": 3600, "mask": 0.3, "batch_size": 256, "captions": "first"},
}


def make(folder, counts=None, seed=0):
    """Writes the data set into a folder.   counts: {split: number of pictures}, "train" among them; None: COUNTS."""
    folder = Path(folder)
    jobs = []
    for split, count in (counts or COUNTS).items():
        assert count > 0
        for index in range(count):
            jobs.append((seed, split, index, len(jobs)))  # the row in the feature stores, which hold all splits

    graphs = {}  # {split: scenes}
    detected = []
    true = []
    lines = {file: [] for file in FILES.values()}
    prepared = parallel(prepare_scene, jobs, f"drawing {len(jobs)} scenes, once")
    for scene, detected_regions, true_regions, new_lines in prepared:
        graphs.setdefault(scene.split, []).append(scene)
        detected.append(detected_regions)
        true.append(true_regions)
        for file, new in new_lines.items():
            lines[file].extend(new)
    for scenes in graphs.values():
        lines["ve.jsonl"].extend(texts.entailment_lines(scenes))
        lines["nlvr2.jsonl"].extend(texts.two_picture_lines(scenes))

    data.write_store(folder / "regions", detected)
    data.write_store(folder / "boxes", true)
    for file, content in lines.items():
        (folder / file).write_text("\n".join(map(json.dumps, content)) + "\n")
    pieces = vocabulary(lines["pretrain.jsonl"], graphs["train"][:300])
    (folder / "vocab.txt").write_text("\n".join(pieces) + "\n")
    drawn = [
        word for word in DATASET_JSON["content_words"] if word in pieces
    ]  # a word such as "eight" may be in no text
    description = {**DATASET_JSON, "content_words": drawn}
    (folder / "dataset.json").write_text(json.dumps(description, indent=1) + "\n")  # last: now all is there


def prepare_scene(job):
    """One scene: the scene graph, its detected and its true regions as the feature stores keep them, and
    {file: lines} of the tasks that need one scene at a time."""
    seed, split, index, row = job
    scene = make_scene(seed, split, index, row)
    picture = draw_scene(scene)
    detected = store_row(picture, **detect(scene))
    true = store_row(picture, boxes=np.array([thing.box for thing in scene.things]))
    captions, questions = texts.caption_and_question_lines(scene)
    expressions = texts.referring_lines(scene)
    lines = {
        "captions.jsonl": captions,
        "vqa.jsonl": questions,
        "vcr.jsonl": texts.choice_lines(scene),
        "refer.jsonl": expressions,
    }
    if split != "compose":  # few questions, as most go with any picture: they would say little about a match
        lines["pretrain.jsonl"] = captions + questions[: len(captions) // 4]
    if split == "test":
        on_detected = {"split": "detected", "features": f"regions#{row}"}
        lines["refer.jsonl"] = expressions + [line | on_detected for line in expressions]
    return scene, detected, true, lines


def store_row(picture, boxes, **fields):
    """What `write_store` takes of a picture: features of the regions in `boxes` (N, 4) pixels, and the fields."""
    features = region_features(picture, boxes).astype(np.float16)  # half as much to send between processes
    return {"features": features, "boxes": boxes / SIDE, "size": (SIDE, SIDE), **fields}


def vocabulary(pretrain_lines, scenes):
    """The word pieces of the training texts: all of pretraining, and those of the other tasks on a few scenes, each as
    often as a model reads it. There is one vocabulary for all tasks, so that a pretrained model can be fine-tuned on
    any."""
    words = [line["text"] for line in texts.entailment_lines(scenes)]
    for line in texts.two_picture_lines(scenes):
        words += 2 * [line["text"]]  # once with each picture
    for scene in scenes:
        for line in texts.choice_lines(scene):  # (question, answer) four times, then (question, right answer, reason)
            words += 8 * [line["text"]]
            words += line["choices"] + line["reasons"]
            words += 4 * [line["choices"][line["label"]]]
        for line in texts.referring_lines(scene):
            words.append(line["text"])
    for line in pretrain_lines:
        if line["split"] == "train":
            words.append(line["text"])
    ids = data.train_tokenizer(words).get_vocab()
    return sorted(ids, key=ids.get)


def main():
    """Exit code 0, or 2 with one line on stderr."""
    parser = data.Parser(prog="scenes.py", description="Draw the built-in data set.")
    parser.add_argument("out", help="folder to write")
    parser.add_argument("--count", type=in_range(int, 2), metavar="N", help="at most N pictures of each split")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="(default: 0)")
    try:
        args = parser.parse_args()
        counts = dict(COUNTS)
        if args.count is not None:
            counts = {split: min(count, args.count) for split, count in COUNTS.items()}
        make(args.out, counts, args.seed)
    except (data.UserError, OSError) as error:
        print(f"scenes.py: {data.UserError(str(error))}", file=sys.stderr)
        return 2
    print(f"{args.out}: {sum(counts.values())} pictures")
    return 0


if __name__ == "__main__":
    sys.exit(main())
