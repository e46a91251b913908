"""LXMERT's pretraining data (Tan and Bansal 2019): captions and questions of COCO and Visual Genome, to JSONL.

    python prepare/lxmert_json.py FOLDER OUT        writes OUT/lxmert.jsonl

FOLDER has mscoco_train.json, mscoco_nominival.json, vgnococo.json, mscoco_minival.json (val) and all_ans.json, the table of
9,500 answers. An entry is a picture: `img_id`, `sentf` {source: [sentence]} and `labelf` {source: [{answer: score}]}, the
latter for sources that are questions (vqa, gqa, visual7w). Answers that the table lacks are left out, as in the
official code; a question without any stays as a sentence. The pictures' features come from the TSV files:

    python prepare/bottom_up.py TSV_FOLDER OUT --data lxmert.jsonl
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for `python prepare/lxmert_json.py`

from prepare import published
from support.records import normalize_lxmert_answer

FILES = {"mscoco_train": "train", "mscoco_nominival": "train", "vgnococo": "train", "mscoco_minival": "val"}


def picture_path(image_id):
    """The picture of an image id, relative to the folder of the published pictures."""
    if image_id.startswith("COCO_"):
        return f"{image_id.split('_')[1]}/{image_id}.jpg"  # COCO_val2014_000000391895
    return f"VG_100K/{image_id}.jpg"


def records(folder, out, answers):
    """A record for each sentence, with the scores of the answers that are in `answers`."""
    for name, split in FILES.items():
        for where, _, entry in published.stream_json(folder / f"{name}.json", ("img_id", "sentf")):
            image = published.picture(folder / picture_path(entry["img_id"]), out)
            labels = entry.get("labelf", {})
            for source, sentences in entry["sentf"].items():
                scores = labels.get(source, [{}] * len(sentences))
                fits = len(scores) == len(sentences)
                published.require(fits, where, f"{len(sentences)} sentences of {source}, {len(scores)} labels")
                for number, (sentence, raw) in enumerate(zip(sentences, scores)):
                    record = {"image": image, "text": sentence.strip(), "kind": source, "split": split}
                    record["id"] = f"{entry['img_id']}_{source}_{number}"
                    known = {}
                    for answer, score in raw.items():
                        if normalize_lxmert_answer(answer) in answers:
                            known[normalize_lxmert_answer(answer)] = score
                    if known:
                        record["answer"] = known
                    if record["text"]:
                        yield record


def convert(folder, out):
    """Writes OUT/lxmert.jsonl."""
    path = folder / "all_ans.json"
    answers = {row["ans"] for _, row in published.entries(path, published.read_json(path), ["ans"])}
    published.write_jsonl(out / "lxmert.jsonl", records(folder, out, answers))


if __name__ == "__main__":
    sys.exit(published.main(convert, __doc__))
