"""SNLI-VE (Xie et al. 2019): does a photograph of Flickr30k entail a sentence? To JSONL.

    python prepare/snli_ve.py FOLDER OUT        writes OUT/snli_ve.jsonl

FOLDER has snli_ve_{train,dev,test}.jsonl and flickr30k-images/. `gold_label` is the answer, `sentence2` the hypothesis;
`sentence1`, the caption that the picture stands for, is not used. Lines with the label "-" (no majority) are left out.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for `python prepare/snli_ve.py`

import data
from prepare import published

SPLITS = {"train": "train", "dev": "val", "test": "test"}


def records(folder, out):
    """A record for each hypothesis with a gold label, of which "-" is none."""
    for name, split in SPLITS.items():
        path = folder / f"snli_ve_{name}.jsonl"
        for where, row in published.read_json_lines(path, ("Flickr30K_ID", "gold_label", "sentence2", "pairID")):
            if row["gold_label"] == "-":
                continue
            published.require(row["gold_label"] in data.ENTAILMENT, where, f"gold_label {row['gold_label']!r}")
            yield {
                "image": published.picture(folder / "flickr30k-images" / f"{row['Flickr30K_ID']}.jpg", out),
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
