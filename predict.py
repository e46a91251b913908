"""predict.py: a checkpoint of train.py at work.

    python predict.py out/uniter-vqa/best.pt --scenes 4                   four held-out examples as a picture and as text
    python predict.py out/uniter-vqa/best.pt --image a.png --text "what color is the circle?"
    python predict.py out/uniter-vqa/best.pt --data my.jsonl --out predictions.jsonl      every line of a file
    python predict.py out/uniter-itc/best.pt --search "a dog on grass" --data my.jsonl    pictures that fit a text
    python predict.py out/uniter-vqa/best.pt --scenes 1 --attention attention.png         what the words attend to
    python predict.py out/uniter-vqa/best.pt --export vqa.bin                             weights for other programs
    python predict.py out/uniter-vqa/best.pt --serve 8000                                 a page in the browser

`--scenes`, `--image`, `--data` and `--serve` build a `data.Dataset` and compute a dict for each example: see evaluation.py.

Regions are made as in training: cut out of the picture (the checkpoint's patch and grid), or computed by the network
that the checkpoint's `regions` names. best.pt has the weights that were best on the val split, checkpoint.pt the last ones.
"""

from support import interrupt  # noqa: F401, I001 (before torch, for Ctrl-C)
import argparse
import dataclasses
import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import torch

import checkpoints
import data
import tasks
import train
from common import UserError
from support import (
    attention,
    attention_sheet,
    drawing,
    embed,
    evaluation,
    examples,
    export,
    machine,
    options,
    records,
    regions,
    resume,
)
from support.log import safe_output

CHUNK = 1024  # lines of a file that are answered together

# ---- command line ------------------------------------------------------------------------------------------------------


def build_parser():
    """All options, in the groups that --help shows."""
    usage = "predict.py CHECKPOINT WHAT [OPTION ...]"
    parser = data.Parser("predict.py", usage, "Use a checkpoint of train.py.", allow_abbrev=False)
    parser.add_argument("checkpoint", help="checkpoint.pt or best.pt of a run of train.py")
    add = parser.add_argument_group("what to do (one of these)").add_argument
    add("--scenes", type=options.COUNT, nargs="?", const=4, metavar="N",
        help="show N held-out examples of the data set that the checkpoint was trained on (default: 4)")  # fmt: skip
    add("--image", action="append", metavar="FILE", help="a picture; repeat --image for several (nlvr2: for pairs)")
    add(
        "--data",
        metavar="NAME",
        help="answer every line of a .jsonl file or data set, or each picture of a folder; measure where it has answers",
    )
    add("--search", metavar="TEXT", help="find the pictures of --data that fit a text best (the checkpoint needs itc)")
    add("--embed", metavar="FILE.npz", help="write the vectors of the texts and pictures of --data")
    add("--export", metavar="FILE", help="write the checkpoint for other programs, see --to")
    add("--serve", type=options.COUNT_OR_ZERO, nargs="?", const=8000, metavar="PORT",
        help="answer in the browser and over HTTP, on 127.0.0.1 (default: 8000)")  # fmt: skip
    add = parser.add_argument_group("options of --image").add_argument
    add("--text", help="caption, question, statement or expression")
    add("--boxes", action="append", metavar="JSON", help="[[x1,y1,x2,y2],...] in pixels, once for each --image")
    add("--choices", nargs="+", metavar="TEXT", help="vcr: what to choose from")
    add("--answer", metavar="TEXT", help="vcr: the answer, if the choices are reasons for it")
    add = parser.add_argument_group("options of --data, --scenes, --search and --embed").add_argument
    add("--split", help="which split (default: test; without a test split --scenes takes val, else train, others all)")
    add("--prompt", metavar="TEXT", help='the text of each line of --data, as "what color is the {thing}?"')
    add("--resume", action="store_true", help="with --data: go on after the last whole line of --out")
    add = parser.add_argument_group("attention, beside --image or --scenes").add_argument
    add("--attention", metavar="FILE", help="draw which regions the words attend to")
    add("--method", choices=[*attention.METHODS, "transport"], help="how it is computed (default: raw)")
    add("--word", help="one word of the text, and its regions")
    for name, what in (
        ("--region", "one region, from 0, and its words"),
        ("--layer", "with --method raw: one layer, from 0 (default: mean over layers)"),
        ("--head", "with --method raw: one head, from 0 (default: mean over heads)"),
    ):
        add(name, type=options.COUNT_OR_ZERO, metavar="N", help=what)
    add = parser.add_argument_group("options of --export").add_argument
    add("--to", choices=[*export.WEIGHTS, *export.PROGRAMS],
        help="weights under the paper's own names (the default), a folder for transformers (LXMERT), a program of "
        "torch.export, or ONNX; the last two run without this repository")  # fmt: skip
    add = parser.add_argument_group("options of several").add_argument
    add("--out", metavar="FILE", help="the picture of --scenes, --image or --search, the predictions of --data")
    add("--task", help="which task, of a checkpoint that has several (default: its first)")
    add("--top", type=options.COUNT, metavar="N", help="how many answers or pictures to show (default: 3)")
    add("--beams", type=options.COUNT, metavar="N", help="captions: beam width; 1 is greedy (default: as trained)")
    add("--device", default="auto", help="auto (the default), cpu, cuda, cuda:1 or mps")
    add("--dtype", choices=["auto", "f32", "bf16"], default="auto",
        help="number format of matrix products (default: auto)")  # fmt: skip
    add("--int8", action="store_true", help="layers with weights of 8 bits: a smaller model, on a CPU")
    return parser


def parse(argv=None):
    """The command line. UserError for a mistake in it."""
    args = build_parser().parse_args(argv)
    modes = ["scenes", "image", "search", "embed", "export", "serve"]
    if args.search is None and args.embed is None:
        modes.append("data")  # --search and --embed read --data, so there it is no mode of its own
    for name, value in vars(args).items():
        if value == "" and name not in ("checkpoint", "text"):
            raise UserError(f"--{name} is empty; give it a value, or leave it out")
    given = [name for name in modes if getattr(args, name) is not None]
    if len(given) != 1:
        raise UserError("give one of --scenes, --image, --data, --search, --embed, --export and --serve")
    if args.int8 and (args.export or args.attention or args.dtype == "bf16"):
        raise UserError("--int8 goes with none of --export, --attention and --dtype bf16; leave one out")
    if args.resume and not (args.data and args.out):
        raise UserError("--resume goes on with the --out of --data; give both")
    draws = (args.scenes or args.image or args.search) and not args.attention
    writes = draws or (args.data and not args.embed)
    for name, purpose, is_read in (
        ("text", "--image", args.image),
        ("boxes", "--image", args.image),
        ("choices", "--image", args.image),
        ("answer", "--image", args.image),
        ("split", "--data, --scenes, --search and --embed", args.data or args.scenes or args.search or args.embed),
        ("prompt", "--data", args.data),
        ("to", "--export", args.export),
        ("top", "answers and pictures", not (args.export or args.embed)),
        ("beams", "captions", not (args.export or args.embed or args.search)),
        ("task", "exports by --to program or onnx", args.to in export.PROGRAMS or not args.export),
        ("out", "--scenes, --image, --search and --data, without --attention or --embed", writes),
    ):
        if getattr(args, name) is not None and not is_read:
            raise UserError(f"--{name} is for {purpose}, and changes nothing here; leave it out")
    if args.export and args.device not in ("auto", "cpu"):
        raise UserError("--device is not for --export, which works on the CPU; leave it out")
    for name, text in (("text", (args.text or "").strip()), ("search", args.search)):
        if text and not records.is_text(text):
            raise UserError(f"--{name} {text!r}: has no visible character")
    if draws and args.out:
        drawing.picture_format(args.out, "--out")
    if args.attention:
        drawing.picture_format(args.attention, "--attention")
    attention_sheet.check_options(args)
    inputs = [args.checkpoint, *(args.image or ())]
    for option in ("out", "embed", "export", "attention"):
        path = getattr(args, option)
        if path and not (option == "export" and args.to == "transformers"):  # which is a folder
            regions.refuse_overwriting(f"--{option}", path, inputs)
    return args


# ---- the checkpoint ----------------------------------------------------------------------------------------------------


def load_run(args):
    """The train.Run of a checkpoint, ready to predict, and the row of tasks.TASKS that is asked for."""
    checkpoint = checkpoints.load_checkpoint(args.checkpoint)
    names = checkpoint["task"].split(",")
    name = args.task or names[0]
    if name not in names or name not in tasks.TASKS:
        raise UserError(f"--task {name}: {args.checkpoint} was trained for {', '.join(names)}")
    paper = checkpoints.MODELS[checkpoint["model"]]
    device = machine.pick_device(args.device)
    settings = {"ablate": None, "mask": 0.15, "max_words": 60, "pool": 200, "captions": "first", "beams": 1}
    settings.update(checkpoint.get("settings", {}))  # an old checkpoint lacks some
    run_args = argparse.Namespace(model=checkpoint["model"], task=name, tasks=names, rerank=None, **settings)
    run_args.consensus = False
    run_args.data = checkpoint.get("data", "")
    run_args.patch = checkpoint.get("patch", 12)
    run_args.grid = checkpoint.get("grid", 6)
    if args.beams:
        if not tasks.TASKS[name].generates:
            raise UserError(f"--beams is for captions, and changes nothing in {name}; leave it out")
        run_args.beams = args.beams
    if args.top and tasks.TASKS[name].generates and not args.search:
        raise UserError("--top is for answers and pictures; a picture has one caption")
    args.top = args.top or 3
    dtype = machine.pick_dtype("f32" if args.int8 else args.dtype, device)
    run = train.Run(run_args, paper, device, dtype, rank=0, world=1)
    run.objectives = checkpoint.get("objectives", {})
    run.content_words = checkpoint.get("content_words", [])
    run.usual_answers = checkpoint.get("usual_answers", {})
    run.regions = checkpoint.get("regions", {})
    run.answers = checkpoint["answers"]
    run.progress.update(checkpoint.get("progress", {}))
    if run_args.ablate:
        data.warn(
            f"the checkpoint was trained with --ablate {run_args.ablate} and answers without the {run_args.ablate}"
        )
    run.tokenizer = data.tokenizer_from_json(checkpoint["tokenizer"])
    run.model = paper.MODEL(paper.Config(**checkpoint["config"]))
    run.model.load_state_dict(checkpoint["state"])
    run.model.to(device).eval()
    if args.int8:
        machine.quantize_layers(run.model, device)
    return run, tasks.TASKS[name]


def warn_of_random_heads(run, task, checkpoint):
    """Warns if a head that the task reads was never trained: it guesses."""
    asked = tasks.heads_for(run.paper, [task.objective] if task.objective else run.objectives)
    names = [head for head in run.progress.get("random_heads", []) if head in asked]
    if names:
        data.warn(f"{checkpoint}: untrained, at random: {', '.join(names)}")


def check_answers(run, checkpoint):
    """UserError for a checkpoint of pretraining whose objectives say nothing of a single pair."""
    if not evaluation.has_answers(run):
        words = "; --search and --embed read its vectors" if "itc" in run.objectives else ""
        names = ", ".join(run.objectives)
        raise UserError(f"{checkpoint}: trained with {names} only, it cannot show answers (mlm and itm can){words}")


@torch.inference_mode()
def predict(run, task, dataset, index, top):
    """The answers to examples `index`: a list of dicts, see support/evaluation.py."""
    run.model.eval()
    answers = {}
    for part in tasks.evaluation_batches(run, dataset, index):
        if task.logits:
            logits = task.logits(run, dataset, part)
        else:
            logits = tasks.example_logits(run, dataset, part, task.objective)
        for row, i in enumerate(part.tolist()):
            answers[i] = task.show(run, dataset, i, logits[row], top)
    return [answers[i] for i in index.tolist()]


# ---- --scenes: held-out examples of the data set that the checkpoint was trained on -----------------------------------


def held_out(run, task, split, count):
    """(a Dataset of `count` examples of a split, always the same ones; {row of its store: picture file or None}).
    By default the split is test; if there is no test, val; if there is neither, train."""
    source = own_source(run, task)
    description = data.read_dataset_json(data.find(source))
    options.check_split(split, source, description)
    lines = task_of_lines(run, task, description)
    names = [split] if split else ["test", "val", "train"]
    for name in names:
        dataset = data.load(source, lines, name, patch=run.args.patch, grid=run.args.grid, network=run.regions)
        if len(dataset):
            break
    else:
        raise UserError(f"{source}: has no examples of split {' or '.join(names)}")
    if name == "train" and not split:
        data.warn(f"{source} has neither test nor val; these are training examples")
    part = dataset.subset(varied_examples(dataset, count))
    files = {}  # row of the store: the picture file that it was made of
    for row in part.image.tolist():
        files[row] = records.picture_file(dataset, row)
    return examples.use_dataset(run, task, part), files


def task_of_lines(run, task, description):
    """The Task whose lines of a data set are read: see options.task_of_lines."""
    return options.task_of_lines(task, run.paper, run.objectives, description)


def own_source(run, task):
    """The --data that the checkpoint's task was trained on."""
    sources = run.args.data.split(",")
    source = sources[run.args.tasks.index(task.name)] if len(sources) > 1 else sources[0]
    try:
        data.find(source)
    except UserError as error:
        raise UserError(f"{error}. The checkpoint was trained on it; start from the same folder") from None
    return source


def varied_examples(dataset, count):
    """Numbers of `count` examples drawn at random, one of each kind before a second one of any."""
    order = np.random.default_rng(0).permutation(len(dataset))
    taken = Counter()
    turns = []  # of each example in `order`: how many of its kind come before it
    for i in order.tolist():
        kind = dataset.kind[i]
        turns.append(taken[kind])
        taken[kind] += 1
    return order[np.argsort(turns, kind="stable")[:count]]


def examples_to_show(run, task, args):
    """`held_out` for the command line. UserError if what is to be drawn would write over the data."""
    description = data.read_dataset_json(data.find(own_source(run, task)))
    refuse_lost_data(args, description, task_of_lines(run, task, description))
    return held_out(run, task, args.split, args.scenes)


def show_scenes(run, task, args):
    """Prints `--scenes` held-out examples with their answers, and draws them as one picture."""
    dataset, files = examples_to_show(run, task, args)
    answers = predict(run, task, dataset, np.arange(len(dataset)), args.top)
    for i, answer in enumerate(answers):
        print_answer(task, dataset, i, answer)
    out = Path(args.out or "predictions.png")
    drawing.draw(task, dataset, answers, files, out)
    print(f"{out}: {len(dataset)} examples of {dataset.name}, split {dataset.split}")


def print_answer(task, dataset, i, answer):
    """Three lines: the example, the answers, the truth."""
    print(f"{dataset.ids[i]}: {drawing.text_of(task, dataset, i)}")
    print(f"    {drawing.describe(answer)}")
    if "truth" in answer:
        print(f"    {drawing.truth_line(answer)}")


# ---- --image: pictures and a text from the command line ------------------------------------------------------------------


def read_images(run, task, args):
    """The Dataset of `--text` with each picture, or with each pair, and {row of its store: picture file}."""
    if len(args.image) % task.pictures:
        raise UserError(f"{task.name} takes two --image for each answer, not {len(args.image)}")
    boxes = [None] * len(args.image)
    if args.boxes:
        boxes = [options.parse_boxes(text) for text in args.boxes]
        if len(boxes) != len(args.image):
            raise UserError(f"{len(boxes)} --boxes for {len(args.image)} --image: give one for each, or none")
    network = examples.load_network(run)
    questions = []
    files = {}
    notes = []
    for i in range(0, len(args.image), task.pictures):
        found = []
        for file, own_boxes in zip(args.image[i : i + task.pictures], boxes[i : i + task.pictures], strict=True):
            if not Path(file).is_file():
                raise UserError(f"--image {file}: no such file")
            if Path(file).suffix == ".npz":
                raise UserError(f"--image {file}: is a feature file; name it in a line of --data")
            files[len(files)] = Path(file)
            picture, own_notes = examples.make_regions(run, f"--image {file}", Path(file), own_boxes, network)
            found.append(picture)
            notes += own_notes
        name = " ".join(args.image[i : i + task.pictures])
        record = {"id": name, "text": args.text or "", "choices": args.choices, "answer": args.answer}
        questions.append((record, found))
    dataset = examples.make_dataset(run, task, questions)
    lost = records.lost_text([dataset.lost])
    if lost:
        notes.append(lost)
    for note in dict.fromkeys(notes):  # one note for all pictures without boxes
        data.warn(note)
    return dataset, files


def answer_images(run, task, args):
    """Prints the answers to `--text` for each picture, or for each pair."""
    dataset, files = read_images(run, task, args)
    answers = predict(run, task, dataset, np.arange(len(dataset)), args.top)
    for i, answer in enumerate(answers):
        begin = f"{dataset.ids[i]}: " if len(answers) > 1 else ""
        print(begin + drawing.describe(answer))
    if args.out:
        drawing.draw(task, dataset, answers, files, Path(args.out))


# ---- --attention ------------------------------------------------------------------------------------------------------


def show_attention(run, task, args):
    """Prints the answers to `--scenes` or `--image`, and draws what they attend to."""
    if args.scenes:
        dataset, files = examples_to_show(run, task, args)
    else:
        dataset, files = read_images(run, task, args)
    titles = []
    for i, answer in enumerate(predict(run, task, dataset, np.arange(len(dataset)), args.top)):
        titles.append([drawing.text_of(task, dataset, i), drawing.describe(answer, ", ")])
        if "truth" in answer:
            titles[-1].append(drawing.truth_line(answer))
    attention_sheet.show(run, task, dataset, files, titles, args)


# ---- --data: every line of a file ---------------------------------------------------------------------------------------


def answer_file(run, task, args):
    """Answers every line of `--data`; with truths, prints metrics beside chance."""
    datasets = load_lines(run, task, args)
    results = {}
    if args.out:
        path = Path(args.out)
        results["made_by"] = {
            "data": [{"split": dataset.split, **resume.hash_data(dataset)} for dataset in datasets],
            "checkpoint": resume.hash_file(args.checkpoint),
            "dtype": str(run.dtype).removeprefix("torch."),
            "int8": args.int8,
            "task": task.name,
            "top": args.top,
            "beams": run.args.beams,
            "prompt": args.prompt,
        }
        done = resume.whole_lines(path, datasets, results["made_by"]) if args.resume else 0
        path.parent.mkdir(parents=True, exist_ok=True)
        write_results(path, results)
        write_predictions(run, task, datasets, path, done, args.top)
    for dataset in datasets:
        known = np.flatnonzero(has_truth(task, dataset))
        if len(known) == 0:
            hint = "" if args.out else "; --out FILE writes the predictions"
            what = f"{len(dataset)} examples without {task.truth or 'text'}"
            print(f"split {dataset.split}: {what}, nothing to measure{hint}")
            continue
        part = dataset if len(known) == len(dataset) else dataset.subset(known)
        metrics, chance = measure(run, task, part)
        results[dataset.split] = {**metrics, "chance": chance}
    if args.out:
        print(f"{args.out}: {sum(map(len, datasets))} predictions")
        write_results(path, results)


def write_results(path, results):
    """Writes beside the predictions how they are made and, at the end, the metrics of each split."""
    if path.exists() and not path.is_file():
        return  # a pipe or /dev/stdout
    data.write_text(resume.results_file(path), json.dumps(results, indent=1, default=float) + "\n")


def load_lines(run, task, args, lines_of=None):
    """The Datasets of --data, or without it of the checkpoint's own data: the split --split, by default test, or all
    splits if there is no test. lines_of: the Task whose lines are read, by default that of the checkpoint's training."""
    source = args.data or own_source(run, task)
    path = data.find(source)
    holds_pictures = path.is_dir() and not (path / "dataset.json").is_file()
    if holds_pictures:
        path = records.picture_folder(path, data.CACHE)
    description = data.read_dataset_json(path)
    options.check_network(source, description, run.regions, trains=False)
    options.check_split(args.split, source, description)
    lines_of = lines_of or task_of_lines(run, task, description)
    lines = optional_truth(lines_of, args.prompt or "")
    if holds_pictures and not (lines.prompt or lines.text_is_optional):
        raise UserError(f"--data {source}: the pictures of a folder have no text; give it with --prompt")
    refuse_lost_data(args, description, lines)
    names = list(dict.fromkeys(["test", *data.SPLITS, *description["extra_splits"]]))  # others only if there is no test
    if args.split:
        names = [args.split]
    datasets = []
    for name in names:
        dataset = data.load(path, lines, name, patch=run.args.patch, grid=run.args.grid, network=run.regions)
        if len(dataset):
            datasets.append(examples.use_dataset(run, task, dataset))
        if name == "test" and len(dataset):
            break
    if not datasets:
        raise UserError(f"{source}: has no examples of split {' or '.join(names)}")
    first = records.first_record(data.task_file(description, lines_of.name))
    if run.regions.get("boxes") == "given" and "image" in first and "boxes" not in first:
        data.warn(f"{source}: {examples.WITHOUT_BOXES}")
    lost = records.lost_text([dataset.lost for dataset in datasets])
    if lost:
        data.warn(lost)
    if datasets[0].split != "train":  # else `data.load` has printed them
        data.print_warnings(datasets[0], source)
    return datasets


def refuse_lost_data(args, description, task):
    """UserError if what this command writes would write over lines or pictures of the data set that it reads."""
    outputs = {"--out": args.out, "--embed": args.embed, "--attention": args.attention}
    if args.search:
        outputs["--out"] = args.out or "found.png"
    if args.scenes and not args.attention:
        outputs["--out"] = args.out or "predictions.png"
    path = data.task_file(description, task.name)
    splits = [*data.SPLITS, *description["extra_splits"]]
    for option, out in outputs.items():
        if not out:
            continue
        for file in (Path(out), resume.results_file(Path(out))):
            if file.exists():
                regions.refuse_overwriting(option, file, records.files_named(file.name, path, task, splits))


def optional_truth(task, prompt=""):
    """The task for prediction: its lines need not say what is to be predicted, and `prompt` may make their texts."""

    def check(record):
        return task.check(record) if task.truth in record else None

    needs = tuple(key for key in task.needs if key != task.truth)
    return dataclasses.replace(task, needs=needs, check=check, prompt=prompt, text_is_optional=task.truth == "text")


def has_truth(task, dataset):
    """(E,) bool, True = the line says what is to be predicted."""
    if task.truth == "text" or tasks.is_pretraining(task.name):
        return np.array([len(text) > 0 for text in dataset.text], bool)
    if task.truth not in task.needs:
        return np.ones(len(dataset), bool)
    if task.truth == "answer":
        return np.array([len(answers) > 0 for answers in dataset.answer], bool)
    if dataset.target is None:
        return np.zeros(len(dataset), bool)
    if dataset.target.ndim == 2:
        return (dataset.target > 0).any(1)  # (E, 4): a box
    return dataset.target >= 0


def write_predictions(run, task, datasets, path, done, top):
    """Writes one line of JSON for each example, in order; the first `done` are there already.

    A chunk that is half there is computed as a whole, so that every line is what an uninterrupted run writes.
    """
    number = 0  # of the line, from 1
    with regions.naming(path), open(path, "a" if done else "w", encoding="utf-8") as file:
        for dataset in datasets:
            for start in range(0, len(dataset), CHUNK):
                index = np.arange(start, min(start + CHUNK, len(dataset)))
                if number + len(index) <= done:
                    number += len(index)
                    continue
                for i, answer in zip(index.tolist(), predict(run, task, dataset, index, top), strict=True):
                    number += 1
                    if number > done:
                        line = {"id": dataset.ids[i], "kind": dataset.kind[i]}
                        if task.truth != "text":
                            line["text"] = drawing.text_of(task, dataset, i)
                        line.update(answer)
                        file.write(json.dumps(line, ensure_ascii=False) + "\n")
                file.flush()


def measure(run, task, dataset):
    """(metrics, chance) of a dataset, by the functions of train.py's own test. Prints them."""
    run.sets = {task.name: {dataset.split: dataset}}
    objectives = run.objectives
    if not task.objective:
        run.objectives = options.drop_unsupported(run.paper, objectives, {dataset.split: dataset})
    metrics, chance = tasks.evaluate(run, dataset.split)
    run.objectives = objectives
    count = len(tasks.examples_to_evaluate(run, task.name, dataset))
    title = f"{run.args.model} {task.name}, {dataset.name}, split {dataset.split}, {count} examples"
    print(evaluation.format_metrics(title, metrics, chance))
    return metrics, chance


# ---- --export -------------------------------------------------------------------------------------------------------------


def export_checkpoint(args):
    """Writes --export in the format of --to."""
    args.to = args.to or "official"
    if args.to in export.WEIGHTS:
        content = checkpoints.load_checkpoint(args.checkpoint)
        if args.dtype == "bf16":
            content["state"] = {name: tensor.bfloat16() for name, tensor in content["state"].items()}
        export.WEIGHTS[args.to](content, args.export)
        print(f"{args.export}: {args.to}")
        return
    if args.dtype == "bf16":
        raise UserError(f"--to {args.to} computes in float32; leave out --dtype bf16")
    args.device = "cpu"
    args.dtype = "f32"
    run, task = load_run(args)
    export.PROGRAMS[args.to](run, task, made_up_batch(run, task), args.export)
    print(f"{args.export}: {args.to}, {run.args.model} {task.name}")


def made_up_batch(run, task):
    """An example input for torch.export: two made-up examples."""
    features = np.zeros((7, run.model.config.feature_size), np.float32)
    boxes = np.tile(np.array([0, 0, 1, 1], np.float32), (7, 1))
    picture = {"features": features, "boxes": boxes, "size": (1, 1)}
    record = {} if task.truth == "text" else {"text": "a"}
    if "choices" in task.needs:
        record["choices"] = ["a", "b", "c"]
    dataset = examples.make_dataset(run, task, [(record, [picture] * task.pictures)] * 2)
    if task.ranks or task.generates:
        return data.collate(dataset, np.arange(2))
    return task.batch(run, dataset, np.arange(2), None)


# ---- main -----------------------------------------------------------------------------------------------------------------


def main(argv=None):
    """Exit code 0, or 2 with one line on stderr."""
    with safe_output():
        try:
            args = parse(argv)
            run_mode(args)
        except (UserError, OSError, RuntimeError, MemoryError) as error:
            message = machine.explain(error, advice="try --dtype bf16 or another --device, with more memory")
            if message is None:
                raise
            print(f"predict.py: {message}", file=sys.stderr)
            return 2
    return 0


def run_mode(args):
    """What the command line asks for."""
    if args.export:
        export_checkpoint(args)
        return
    run, task = load_run(args)
    if not (args.data or args.search or args.embed):
        check_answers(run, args.checkpoint)
    if args.attention:
        attention.check_task(run, task)
        show_attention(run, task, args)
    elif args.scenes:
        show_scenes(run, task, args)
    elif args.image:
        answer_images(run, task, args)
    elif args.search:
        embed.check_contrast(run)  # before anything is read
        embed.search(run, load_lines(run, task, args, tasks.CAPTION), args.search, args.top, args.out or "found.png")
    elif args.embed:
        embed.embed(run, load_lines(run, task, args, tasks.CAPTION), args.embed)
    elif args.data:
        answer_file(run, task, args)
    else:
        import serve  # here, since serve.py imports this file

        warn_of_random_heads(run, task, args.checkpoint)
        serve.serve(run, task, args)
        return
    if not (args.search or args.embed):  # which read vectors
        warn_of_random_heads(run, task, args.checkpoint)


if __name__ == "__main__":
    sys.exit(main())
