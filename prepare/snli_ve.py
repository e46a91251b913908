"""SNLI-VE (Xie et al. 2019): does a photograph of Flickr30k entail a sentence? To JSONL.

    python prepare/snli_ve.py FOLDER OUT        writes OUT/snli_ve.jsonl

FOLDER has snli_ve_{train,dev,test}.jsonl and flickr30k-images/. `gold_label` is the answer, `sentence2` the hypothesis;
`sentence1`, the caption that the picture stands for, is not used. Lines with the label "-" (no majority) are left out.
Quirk of the files: the picture's key is spelt in several ways, and its value may have the suffix .jpg.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for `python prepare/snli_ve.py`

import data
from prepare import published

PICTURE_KEYS = ("Flickr30K_ID", "Flikr30kID", "Flickr30kID")
SPLITS = {"train": "train", "dev": "val", "test": "test"}


def records(folder, out):
    """A record for each hypothesis with a gold label, of which "-" is none."""
    for name, split in SPLITS.items():
        path = folder / f"snli_ve_{name}.jsonl"
        for where, row in published.read_json_lines(path, ("gold_label", "sentence2", "pairID")):
            if row["gold_label"] == "-":
                yield "the label is -"
                continue
            published.require(row["gold_label"] in data.ENTAILMENT, where, f"gold_label {row['gold_label']!r}")
            keys = [key for key in PICTURE_KEYS if key in row]
            published.require(keys, where, f"has none of {', '.join(PICTURE_KEYS)}; is this the published file?")
            picture = str(row[keys[0]]).removesuffix(".jpg")
            yield {
                "image": published.picture(folder / "flickr30k-images" / f"{picture}.jpg", out),
                "text": row["sentence2"],
                "answer": row["gold_label"],
                "split": split,
                "id": row["pairID"],
            }


def convert(folder, out):
    """Writes OUT/snli_ve.jsonl."""
    published.write_jsonl(out / "snli_ve.jsonl", records(folder, out))


if __name__ == "__main__":
    sys.exit(published.main(convert, __doc__))
