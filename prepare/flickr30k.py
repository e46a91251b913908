"""Flickr30k (Young et al. 2014): 31,014 photographs with five captions each, to JSONL.

    python prepare/flickr30k.py FOLDER OUT        writes OUT/flickr30k.jsonl

FOLDER has flickr30k-images/*.jpg and dataset_flickr30k.json, Karpathy and Fei-Fei's file (2015) with the split that the
papers report: 1,000 pictures each for val and test.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for `python prepare/flickr30k.py`

from prepare import published
from prepare.coco import karpathy


def convert(folder, out):
    """Writes OUT/flickr30k.jsonl."""
    path = folder / "dataset_flickr30k.json"
    published.write_jsonl(out / "flickr30k.jsonl", karpathy(path, folder / "flickr30k-images", out))


if __name__ == "__main__":
    sys.exit(published.main(convert, __doc__))
