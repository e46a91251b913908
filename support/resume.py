"""resume.py: what a stopped run goes on from, and whether the run that goes on is the same one.

load_latest          the newest checkpoint of the run's folder that can be read, and its best weights
check_fingerprint    refuses what decides the result and has changed
remove_leftovers     what a killed run left half written
whole_lines          counts the predictions that an interrupted predict.py has written whole
"""

import hashlib
import itertools
import json
import math
from dataclasses import asdict

import numpy as np

from checkpoints import BEST, NEWEST, PREVIOUS, load_checkpoint
from common import UserError, print0, rank_and_world
from tasks import is_pretraining

# ---- the run's folder --------------------------------------------------------------------------------------------

WRITTEN = (f"{NEWEST}.new", BEST, "log.jsonl", "result.json")  # each to NAME.tmp first, which is then renamed


def remove_leftovers(folder):
    """Removes what a run that was killed while it wrote has left. No other run may be writing."""
    for name in WRITTEN:
        (folder / f"{name}.tmp").unlink(missing_ok=True)
    (folder / f"{NEWEST}.new").unlink(missing_ok=True)  # was to become the newest; its step is computed again


def remove_earlier_run(folder):
    """Removes what an earlier run has left, which --resume would mix with the new one. No other run may be writing."""
    for name in (NEWEST, PREVIOUS, BEST, "result.json"):
        (folder / name).unlink(missing_ok=True)


def has_checkpoint(folder):
    """Whether a folder holds a run that can go on."""
    return (folder / NEWEST).is_file() or (folder / PREVIOUS).is_file()


def load_latest(folder):
    """The newest checkpoint of a run's folder. Where it cannot be read, the one before, and a line that says so."""
    newest = folder / NEWEST
    if not has_checkpoint(folder):
        raise UserError(f"--resume: there is no {newest}; start without --resume, or give the --out of the stopped run")
    try:
        content = load_checkpoint(newest)
    except UserError as error:
        if not (folder / PREVIOUS).is_file():
            raise
        content = load_checkpoint(folder / PREVIOUS)
        print0(f"resume   {error}; going on from {PREVIOUS}, step {content['progress']['step']}")
        if rank_and_world()[0] == 0 and newest.is_file():
            newest.rename(folder / "checkpoint.damaged.pt")  # or the next save would take it for the one before
    check_progress(folder, content)
    check_best(folder, content)
    return content


def check_progress(folder, content):
    """UserError unless the numbers of a checkpoint's progress are numbers."""
    progress = content.get("progress", {})
    for name in ("step", "seconds", "examples", "best"):
        if type(progress.get(name)) not in (int, float) or math.isnan(progress[name]):
            raise UserError(f"--resume: {folder / NEWEST} is damaged ({name} is {progress.get(name)!r:.40})")


def check_best(folder, content):
    """If best.pt cannot be read, resets the best score and prints a line; then the best of the steps to come is kept.
    Checked at the start, because at the run's end it would be too late."""
    if content["progress"]["best"] == -math.inf:
        return  # nothing was scored so far
    try:
        best = load_checkpoint(folder / BEST)
        if best["config"] != content["config"] or best["answers"] != content["answers"]:
            raise UserError(f"{folder / BEST}: is of another run")
    except UserError as error:
        content["progress"]["best"] = -math.inf
        print0(f"resume   {error}; the best weights so far are lost, the best of the steps to come are kept")


def results_file(path):
    """The file of results beside predictions: a.result.json beside a.jsonl, a.txt.result.json beside a.txt."""
    return path.with_name(path.name.removesuffix(".jsonl") + ".result.json")


def whole_lines(path, datasets, made_by):
    """How many predictions an interrupted --out of predict.py holds. Cuts off a last line that is not whole. UserError if the
    predictions are of other data, or made in another way than `made_by`, which stands in the file of results beside."""
    if not path.is_file():
        return 0
    beside = results_file(path)
    try:
        before = dict(json.loads(beside.read_text())["made_by"])
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"--resume: {beside} does not say how {path} was made; leave out --resume to write it anew"
        ) from None
    for name, value in made_by.items():
        if before.get(name) != value:
            raise UserError(
                f"--resume: {path} was made with another {name}; give the same, or leave out --resume to write it anew"
            )
    content = path.read_bytes()
    content = content[: content.rfind(b"\n") + 1]
    lines = content.splitlines()
    ids = itertools.chain.from_iterable(dataset.ids for dataset in datasets)
    for number, line in enumerate(lines, 1):
        try:
            same = json.loads(line)["id"] == next(ids, None)
        except (ValueError, KeyError, TypeError):
            same = False
        if not same:
            raise UserError(f"{path}:{number}: not a prediction for this --data; leave out --resume to write it anew")
    with open(path, "rb+") as file:
        file.truncate(len(content))
    return len(lines)


# ---- the fingerprint ---------------------------------------------------------------------------------------------

# Options that change what a run computes. The others, as --steps, --device and --log-every, may change on --resume.
RESULT_OPTIONS = ("seed", "batch_size", "lr", "lr_new", "warmup", "weight_decay", "clip", "mask", "temperature", "ablate",
                  "size", "limit", "mine", "patch", "grid", "max_words", "teacher", "distill")  # fmt: skip


def fingerprint(run):
    """What a run is made of, {what: text}, to be compared when it is resumed."""
    found = {
        "--model": run.args.model,
        "--task": run.args.task,
        "the objectives": ",".join(run.objectives),
        "the tokenizer": hash_text(run.tokenizer.to_str()),
        "the number of answers": f"{len(run.answers)} answers",
        "the list of answers": hash_text(json.dumps(run.answers)),
        "--dtype": str(run.dtype).removeprefix("torch."),
        "--accumulate times processes": str(run.args.accumulate * run.world),
    }
    for key, value in run.paper.PRETRAINING.items():
        if is_pretraining(run.args.task) or key == "loss_weights":
            found[f"PRETRAINING[{key!r}]"] = str(value)
    if run.args.teacher:
        found["the weights of --teacher"] = hash_file(run.args.teacher)
    for option in RESULT_OPTIONS:
        found[f"--{option.replace('_', '-')}"] = str(getattr(run.args, option))
    for task, splits in run.sets.items():
        for split in ("train", "val"):
            if split in splits:
                name = f"--data ({task}, split {split})"
                found[f"the examples of {name}"] = f"{len(splits[split])} examples"
                for part, value in hash_data(splits[split]).items():
                    found[f"the {part} behind {name}"] = value
    for field_name, value in asdict(run.model.config).items():
        found[f"the model's {field_name}"] = str(list(value) if isinstance(value, tuple) else value)
    return found


def check_fingerprint(saved, now):
    """UserError that names what differs between the run of a checkpoint and the one that would go on from it."""
    for name, value in now.items():
        was = str(saved.get(name, value))
        if was == value:
            continue
        change = f"{name} was {was:.60}, now {value:.60}"
        if value.startswith(HASH):
            change = f"{name} changed since the run stopped"
        raise UserError(
            f"--resume: {change}; give the data and options of the stopped run, or another --out for a new one"
        )


HASH = "sha256 "  # prefix of values that an error message does not print


def hash_text(text):
    """A short hash."""
    return HASH + hashlib.sha256(text.encode()).hexdigest()[:12]


def hash_file(path):
    """A short hash of a file."""
    with open(path, "rb") as file:
        return HASH + hashlib.file_digest(file, "sha256").hexdigest()[:12]


def hash_data(dataset):
    """Short hashes of a split, {"texts", "pictures", "answers and targets"}.

    texts: all word pieces.   pictures: store row, number of regions and digest of every example's picture; of a sample
    also the first region.   answers and targets: all targets; the answers of the sample.
    The sample is every step-th example, fewer than 20,000.
    """
    store = dataset.store
    step = max(1, len(dataset) // 10_000)
    regions = store.offsets[dataset.image[::step]]  # the first one of every step-th picture
    answers = [dataset.answer[i] for i in range(0, len(dataset), step)]
    columns = {
        "texts": [dataset.tokens, dataset.offsets],
        "pictures": [dataset.image, dataset.lengths()[:, 1], store.open_field("features")[regions]],
        "answers and targets": [np.frombuffer(json.dumps(answers).encode(), np.uint8), dataset.target],
    }
    columns["pictures"].append(store.open_field("boxes")[regions])
    if store.digests is not None:
        columns["pictures"].append(store.digests[dataset.image])
    if store.crops is not None:
        last = dataset.image[::step] + store.crops[dataset.image[::step]]
        columns["pictures"] += [store.crops[dataset.image], store.open_field("features")[store.offsets[last]]]
    found = {}
    for part, arrays in columns.items():
        digest = hashlib.sha256()
        for array in arrays:
            if array is not None:
                digest.update(np.ascontiguousarray(array))
        found[part] = HASH + digest.hexdigest()[:12]
    return found
