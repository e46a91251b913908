"""Flickr8k (Hodosh et al. 2013): 8,000 photographs with five captions each, to JSONL.

    python prepare/flickr8k.py FOLDER OUT        writes OUT/flickr8k.jsonl

FOLDER has the published layout: Flicker8k_Dataset/*.jpg (spelt so) and Flickr8k_text/ with Flickr8k.token.txt (one
"NAME.jpg#number<TAB>caption" a line) and the official splits Flickr_8k.{train,dev,test}Images.txt of 6,000, 1,000 and
1,000 pictures. About a hundred pictures with captions belong to no split and are left out.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for `python prepare/flickr8k.py`

from prepare import published

SPLITS = {"trainImages": "train", "devImages": "val", "testImages": "test"}


def convert(folder, out):
    """Writes OUT/flickr8k.jsonl: a record for each caption."""
    texts = folder / "Flickr8k_text"
    captions = {}  # picture -> its captions
    for where, line in published.read_text_lines(texts / "Flickr8k.token.txt"):
        key, tab, caption = line.partition("\t")
        name, mark, _ = key.rpartition("#")
        published.require(tab and mark, where, "not 'NAME.jpg#number<TAB>caption'; take the published file")
        captions.setdefault(name, []).append(caption.strip())
    records = []
    for file, split in SPLITS.items():
        for where, name in published.read_text_lines(texts / f"Flickr_8k.{file}.txt"):
            published.require(name in captions, where, f"{name} has no caption in Flickr8k.token.txt")
            image = published.picture(folder / "Flicker8k_Dataset" / name, out)
            for caption in captions[name]:
                records.append({"image": image, "text": caption, "split": split, "id": name})
    published.write_jsonl(out / "flickr8k.jsonl", records)


if __name__ == "__main__":
    sys.exit(published.main(convert, __doc__))
