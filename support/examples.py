"""examples.py: examples that are in no file, from pictures and a text of the command line or of a request to the server.

picture file -> regions              make_regions, as in training
regions, text -> data.Example        make_example
examples -> Dataset                  make_dataset, use_dataset
"""

import numpy as np

import data
from common import UserError
from support import records, regions

WITHOUT_BOXES = "the model was trained on boxes of things, and is asked about a grid; give boxes"


def load_network(run):
    """The function that computes the regions of a new picture by the network that made those of training; None if they
    were cut out of the pictures. UserError if the checkpoint was trained on feature files."""
    if data.is_network(run.regions):
        from prepare.features import region_maker  # here, since few checkpoints need it

        return region_maker(run.regions, run.device)
    if run.model.config.feature_size != 3 * run.args.patch**2:
        raise UserError("the checkpoint was trained on feature files, not on pixels; it cannot look at a picture")
    return None


def make_regions(run, where, path, boxes, network=None):
    """(the regions of a picture file, as in training; what is odd in it, a list of lines). boxes: a list in pixels, or None.

    network: what `load_network` returned; it is None if regions are patches of the picture.
    """
    without_boxes = []
    if boxes is None and run.regions.get("boxes") == "given":
        without_boxes.append(WITHOUT_BOXES)
    if network:
        image = regions.open_picture(where, path)
        notes = regions.odd_picture(image)
        if boxes is not None:
            boxes = regions.check_boxes(boxes, *image.size, where, "boxes")
            notes += regions.odd_boxes(boxes, *image.size)
        return {**network(image, boxes), "size": image.size}, [f"{where}: {note}" for note in notes] + without_boxes
    found, notes, mistake = regions.picture_regions(
        regions.PictureJob(where, path, boxes, run.args.patch, run.args.grid)
    )
    if mistake:
        raise UserError(mistake)
    return found, notes + without_boxes


def make_example(task, record):
    """The data.Example of a record without its truth."""
    record = {"id": "", "text": "", **record}
    if task.truth != "text" and not records.is_text(record["text"]):
        raise UserError(f"{task.name} needs a text with a visible character")
    if "choices" in task.needs and not records.is_texts(record.get("choices"), 2):
        raise UserError(f"{task.name} needs at least two choices, none of them blank")
    for key in ("answer", "choices"):
        if record.get(key) and "choices" not in task.needs:
            raise UserError(f"{task.name} takes no {key}; leave it out")
    if task.truth == "text" and record["text"]:
        raise UserError(f"{task.name} writes the text itself; leave it out")
    record["text"] = records.normalize_text(record["text"])
    answer = record.pop("answer", None)
    if answer and not records.is_text(answer):
        raise UserError(f"the answer {answer!r} has no visible character")
    if answer:  # the choices are reasons for it
        record.update(choices=[answer], label=0, reasons=record["choices"], reason=0)
        return task.examples(record)[-1]._replace(target=-1)
    return task.examples(record)[0]


def make_dataset(run, task, questions):
    """A Dataset of examples that are in no file.

    questions: [(record, its pictures' regions)]. A record has the keys of a line of JSONL that the task needs, without
    the truth. UserError if one is missing.
    """
    examples = []
    image = []
    pictures = []
    for record, found in questions:
        example = make_example(task, record)
        for _, picture in example.rows:
            image.append(len(pictures) + picture)
        pictures += found
        examples.append(example)
    group = len(examples[0].rows)
    dataset = data.Dataset(
        name="",
        split="test",
        store=regions.MemoryStore(pictures),
        image=np.array(image),
        text=[text for example in examples for text, _ in example.rows],
        answer=[example.answer or {} for example in examples],
        kind=[example.kind for example in examples],
        ids=[example.id for example in examples],
        target=np.array([example.target for example in examples]),
        group=group,
    )
    return use_dataset(run, task, dataset)


def use_dataset(run, task, dataset):
    """Encodes a dataset's texts and checks that the model can read its regions. Returns the dataset."""
    width = run.model.config.feature_size
    if dataset.store.width != width:
        how = "they must be made like those of the training data"
        if data.is_network(run.regions):
            how = f"make them with `python prepare/features.py --network {run.regions['network']} --data ... --out ...`"
        raise UserError(f"features of {dataset.store.width} numbers, the checkpoint was trained on {width}; {how}")
    dataset.task_number = run.args.tasks.index(task.name)
    dataset.store.crops = None  # which are for training
    return dataset.encode(run.tokenizer, max_length=run.args.max_words)
