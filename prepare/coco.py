"""COCO captions (Lin et al. 2014; Chen et al. 2015): 123,287 photographs with about five captions each, to JSONL.

    python prepare/coco.py FOLDER OUT        writes OUT/coco.jsonl
    python prepare/coco.py --predictions P.jsonl OUT.json        captions of predict.py, as the server takes them

FOLDER has train2014/ and val2014/, and either dataset_coco.json (Karpathy and Fei-Fei 2015: 5,000 pictures each for val and
test; its split "restval" counts as train, as in the papers) or annotations/captions_{train,val}2014.json.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for `python prepare/coco.py`

from prepare import published

SPLITS = {"train": "train", "restval": "train", "val": "val", "test": "test"}


def karpathy(path, folder, out):
    """Records of Karpathy's file. A picture's entry has `filepath` (val2014), `filename`, `split` and `sentences`."""
    for where, _, row in published.stream_json(path, ("filename", "split", "sentences"), "images"):
        published.require(row["split"] in SPLITS, where, f"unknown split {row['split']!r}")
        image = published.picture(folder / row.get("filepath", "") / row["filename"], out)
        for sentence in row["sentences"]:
            published.check_keys(where, sentence, ["raw"])
            text = " ".join(sentence["raw"].split())  # some have line breaks
            yield {"image": image, "text": text, "split": SPLITS[row["split"]], "id": row["filename"]}


def official(folder, out):
    """Records of the official files, whose test captions are not public."""
    for split in ("train", "val"):
        path = folder / "annotations" / f"captions_{split}2014.json"
        content = published.read_json(path)
        published.check_keys(path, content, ("images", "annotations"))
        names = {}
        for _, row in published.entries(path, content["images"], ("id", "file_name")):
            names[row["id"]] = row["file_name"]
        for where, row in published.entries(path, content["annotations"], ("image_id", "caption")):
            published.require(row["image_id"] in names, where, f"no image has the id {row['image_id']}")
            name = names[row["image_id"]]
            image = published.picture(folder / f"{split}2014" / name, out)
            yield {"image": image, "text": " ".join(row["caption"].split()), "split": split, "id": name}


def predictions(lines):
    """The server's file, one caption a picture: [{"image_id": 391895, "caption": "a man on a bicycle"}, ...]. The ids are
    names of files, COCO_val2014_000000391895.jpg. A picture with several lines has the caption of the first."""
    captions = {}
    for where, line in lines:
        published.require("caption" in line, where, "has no caption; predict with a checkpoint of --task caption")
        number = published.whole_number(where, Path(line["id"]).stem.rpartition("_")[2])
        captions.setdefault(number, line["caption"])
    return json.dumps([{"image_id": number, "caption": caption} for number, caption in captions.items()])


def convert(folder, out):
    """Writes OUT/coco.jsonl from Karpathy's file if it is there, else from the official ones."""
    path = folder / "dataset_coco.json"
    records = karpathy(path, folder, out) if path.is_file() else official(folder, out)
    published.write_jsonl(out / "coco.jsonl", records)


if __name__ == "__main__":
    sys.exit(published.main(convert, __doc__, predictions=predictions))
