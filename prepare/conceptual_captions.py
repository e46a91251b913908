"""Conceptual Captions (Sharma et al. 2018) and SBU (Ordonez et al. 2011): pictures of the web with their captions, to JSONL.

    python prepare/conceptual_captions.py FOLDER OUT        writes OUT/conceptual_captions.jsonl or OUT/sbu.jsonl

Conceptual Captions: FOLDER has Train_GCC-training.tsv and Validation_GCC-1.1.0-Validation.tsv ("caption<TAB>URL" a line)
and the pictures that you downloaded in training/ and validation/, named as ViLBERT's downloader does: the CRC-32 of the
URL, with or without the row's number and "_" before it, and no suffix. SBU: SBU_captioned_photo_dataset_urls.txt and
SBU_captioned_photo_dataset_captions.txt, line N of both for picture N, and images/ with the names at the URLs' ends.
Many links are dead: lines without a picture are left out and counted. The files are read line by line.
"""

import itertools
import os
import sys
import zlib
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for `python prepare/conceptual_captions.py`

from prepare import published

CONCEPTUAL = {
    "Train_GCC-training.tsv": ("training", "train"),
    "Validation_GCC-1.1.0-Validation.tsv": ("validation", "val"),
}


def conceptual_captions(folder, out):
    """Records of Conceptual Captions."""
    for name, (images, split) in CONCEPTUAL.items():
        names = {}  # checksum: name. The row's number is that of the downloader, which may have read a part of the file
        if (folder / images).is_dir():
            names = {file.rpartition("_")[2]: file for file in os.listdir(folder / images)}
        for row, (where, line) in enumerate(published.read_text_lines(folder / name)):
            caption, tab, url = line.partition("\t")
            published.require(tab and "://" in url, where, "not 'caption<TAB>URL'; is this the published file?")
            file = names.get(str(zlib.crc32(url.strip().encode())))
            if file is None:
                yield f"no picture in {images}/"
                continue
            image = published.picture(folder / images / file, out)
            yield {"image": image, "text": caption.strip(), "split": split, "id": f"{split}-{row}"}


def sbu(folder, out):
    """Records of SBU."""
    names = set()
    if (folder / "images").is_dir():
        names = set(os.listdir(folder / "images"))
    urls = published.read_text_lines(folder / "SBU_captioned_photo_dataset_urls.txt", blank=True)
    captions = published.read_text_lines(folder / "SBU_captioned_photo_dataset_captions.txt", blank=True)
    for row, (address, caption) in enumerate(itertools.zip_longest(urls, captions)):
        rest = address or caption
        if (address is None or caption is None) and not rest[1].strip():
            continue  # blank lines at the end of one file
        in_step = address is not None and caption is not None
        published.require(in_step, folder, "the two SBU files have different numbers of lines; download them again")
        file = address[1].strip().rpartition("/")[2]
        if file in names:
            image = published.picture(folder / "images" / file, out)
            yield {"image": image, "text": caption[1].strip(), "split": "train", "id": f"sbu-{row}"}
        else:
            yield "no picture in images/"


def convert(folder, out):
    """Writes OUT/sbu.jsonl or OUT/conceptual_captions.jsonl, whichever the folder holds."""
    if (folder / "SBU_captioned_photo_dataset_urls.txt").is_file():
        published.write_jsonl(out / "sbu.jsonl", sbu(folder, out))
    else:
        published.write_jsonl(out / "conceptual_captions.jsonl", conceptual_captions(folder, out))


if __name__ == "__main__":
    sys.exit(published.main(convert, __doc__))
