"""Visual Genome (Krishna et al. 2017): 108,077 photographs with described regions, questions and objects, to JSONL.

    python prepare/visual_genome.py FOLDER OUT [--without-coco]

writes OUT/regions.jsonl (an expression and its box: pretraining, refer), OUT/questions.jsonl (pretraining, vqa), OUT/objects.jsonl
(an object with its attributes, "tall green clock", and its box) and OUT/dataset.json. FOLDER has VG_100K/, VG_100K_2/,
image_data.json, region_descriptions.json, question_answers.json and attributes.json.

There is no official split: every fiftieth picture is val. About half of the pictures are also COCO's, some in its test
sets: --without-coco leaves those out, as LXMERT does for what it trains and tests on.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for `python prepare/visual_genome.py`

from prepare import published

NOT_NAMED = "its picture is not in image_data.json, or also COCO's"
NO_AREA = "its box has no area in the picture"


def read_images(folder, out, without_coco):
    """{image id: (path, split, width, height)}. The picture's folder is part of its URL."""
    images = {}
    path = folder / "image_data.json"
    for _, _, row in published.stream_json(path, ("image_id", "url", "width", "height")):
        if without_coco and row.get("coco_id") is not None:
            continue
        image = published.picture(folder / "/".join(row["url"].split("/")[-2:]), out)
        split = "val" if row["image_id"] % 50 == 0 else "train"
        images[row["image_id"]] = (image, split, row["width"], row["height"])
    return images


def inside(where, row, width, height):
    """The box of an entry with x, y and w, h (regions: width, height), cut to the picture; None without area."""
    published.check_keys(where, row, ("x", "y"))
    size = (row.get("w", row.get("width", 0)), row.get("h", row.get("height", 0)))
    return published.cut_box(published.corner_box(row["x"], row["y"], *size), width, height)


def regions(folder, out, images):
    """A record for each described region."""
    for where, _, entry in published.stream_json(folder / "region_descriptions.json", ["regions"]):
        for row in entry["regions"]:
            published.check_keys(where, row, ("image_id", "region_id", "phrase"))
            if row["image_id"] not in images:
                yield NOT_NAMED
                continue
            image, split, width, height = images[row["image_id"]]
            box = inside(where, row, width, height)
            if box is None:
                yield NO_AREA
                continue
            yield {
                "image": image,
                "text": row["phrase"].strip(),
                "target": box,
                "kind": "region",
                "split": split,
                "id": str(row["region_id"]),
            }


def questions(folder, out, images):
    """A record for each question."""
    for where, _, entry in published.stream_json(folder / "question_answers.json", ["qas"]):
        for row in entry["qas"]:
            published.check_keys(where, row, ("image_id", "qa_id", "question", "answer"))
            answer = row["answer"].strip().rstrip(".").lower()  # "Green."
            if row["image_id"] not in images or not answer:
                yield "blank answer" if row["image_id"] in images else NOT_NAMED
                continue
            image, split, _, _ = images[row["image_id"]]
            yield {
                "image": image,
                "text": row["question"],
                "answer": answer,
                "split": split,
                "id": str(row["qa_id"]),
            }


def objects(folder, out, images):
    """A record for each object: its attributes and its name."""
    for where, _, entry in published.stream_json(folder / "attributes.json", ("image_id", "attributes")):
        if entry["image_id"] not in images:
            yield from [NOT_NAMED] * len(entry["attributes"] or [])
            continue
        image, split, width, height = images[entry["image_id"]]
        for row in entry["attributes"] or []:
            published.check_keys(where, row, ["names"])
            text = " ".join([*(row.get("attributes") or []), *row["names"][:1]]).strip()
            box = inside(where, row, width, height)
            if box is None:
                yield NO_AREA
            else:
                yield {"image": image, "text": text, "target": box, "kind": "object", "split": split}


def convert(folder, out, without_coco):
    """Writes OUT/regions.jsonl, questions.jsonl, objects.jsonl and dataset.json."""
    images = read_images(folder, out, without_coco)
    published.write_jsonl(out / "regions.jsonl", regions(folder, out, images))
    published.write_jsonl(out / "questions.jsonl", questions(folder, out, images))
    published.write_jsonl(out / "objects.jsonl", objects(folder, out, images))
    files = {"pretrain": "regions.jsonl", "vqa": "questions.jsonl", "refer": "regions.jsonl"}
    published.write_dataset(out, name="visual_genome", files=files)


def add_options(parser):
    """This script's own options."""
    parser.add_argument("--without-coco", action="store_true", help="leave out pictures that are also COCO's")


if __name__ == "__main__":
    sys.exit(published.main(convert, __doc__, add_options))
