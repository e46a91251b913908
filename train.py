"""train.py: one plain loop that pretrains, fine-tunes, evaluates and compares the three models.

    python train.py --model uniter                                    pretrain on the built-in scenes
    python train.py --model uniter --task vqa --init out/uniter-pretrain/checkpoint.pt
    python train.py --model uniter --task vqa --data my.jsonl         your own pictures and questions
    python train.py --model uniter --task vqa,refer,nlvr2             several tasks at once: one trunk, a head each
    python train.py --model all --task vqa --seeds 3                  compare the models, with the spread over seeds
    torchrun --nproc_per_node=2 train.py --model uniter               several processes, the same gradients
    python train.py --model uniter --objectives mlm,mrfr,mrc_kl,itm,itc --rerank 20    retrieval in two stages
    python train.py --model uniter --config layers=1 --teacher out/uniter-pretrain/best.pt --out out/student    a smaller one

Read top to bottom: options, device and processes, data, batches, model, how weights fit it, optimizer, distillation,
evaluation, retrieval, loop, printing, files, main.
Every mean in a loss is a mean over the whole step, whatever its split: `--accumulate 2` in one process and
`--accumulate 1` in two give the same gradients, because each part is weighted by its share of the masked words,
masked regions or rows. One exception: the objective itc contrasts each pair with those of the same forward pass, in
all processes. Two processes equal one with the double batch, but `--accumulate 2` has half as many negatives.
"""

import argparse
import ctypes
import dataclasses
import itertools
import json
import math
import os
import shutil
import signal
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

if not shutil.which("nvidia-smi"):
    # torch's threads wait awake for the next product: those that sleep start late, a tenth to a fifth of a tiny step on
    # two cores. Read when torch is loaded, so before it; not beside a GPU, where the threads would wait in vain.
    os.environ.setdefault("OMP_WAIT_POLICY", "active")

import numpy as np
import torch
import torch.distributed as dist

import checkpoints
import common
import data
import distill
import evaluation
import tasks
from common import UserError
from prepare import scenes

WORDS = {
    "contrast": ("infonce", "hinge", "sigmoid", "dcl"),
    "nlvr2": ("paired-attention", "paired", "triplet"),
    "fusion": ("mul", "sum"),
}
BY_DATA = {"vocab_size", "feature_size", "types", "classes", "attributes", "answers", "heads", "teacher_widths"}

# ---- options ---------------------------------------------------------------------------------------------------


def parse(argv=None):
    """The command line. Where a default depends on the task or the size, it is None here and set by `resolve_options`,
    the learning rate by `default_learning_rate`. UserError for what makes no sense."""
    parser = data.Parser(description="Pretrain, fine-tune and compare UNITER, ViLBERT and LXMERT.", allow_abbrev=False)

    def add(name, **settings):
        settings["help"] += " (default: %(default)s)" if settings.get("default") is not None else ""
        parser.add_argument(name, **settings)

    add(
        "--model",
        default="uniter",
        choices=[*checkpoints.PAPERS, "all"],
        help="which paper; all: one after the other, compared",
    )
    add("--task", default="pretrain", help=f"{', '.join(data.TASKS)}; several, a,b,c, train together")
    add("--data", default="scenes", help="scenes (built in) or a .jsonl file of your own; one for each task: a,b,c")
    add("--size", default="tiny", choices=["tiny", "base", "large"], help="preset of layer sizes")
    text = "fields of the model's Config, as layers=1 dropout=0.1"
    add("--config", nargs="+", default=[], metavar="NAME=JSON", help=text)
    text = "start from a checkpoint, BERT's weights, an official file or its folder; {model}, {seed} are filled in"
    add("--init", metavar="FILE", help=text)
    add("--fresh", action="store_true", help="take sizes and tokenizer of --init, but leave the weights at random")
    add("--partial", action="store_true", help="accept an --init that lacks tensors of the trunk; they stay at random")
    add("--resume", action="store_true", help="go on from DIR/checkpoint.pt, exactly where it stopped")
    add("--out", metavar="DIR", help="folder for checkpoint, log and result (default: out/MODEL-TASK)")
    add("--export-official", metavar="FILE", help="write the final weights under the paper's official names too")
    add("--steps", type=int, help="optimizer steps (default: about five minutes on two CPU cores)")
    text = "examples in one forward pass of one process (default: 256 rows over all, 64 of own data)"
    add("--batch-size", type=int, help=text)
    add("--accumulate", type=int, default=1, help="forward passes of one process in an optimizer step")
    add("--lr", type=float, help="peak learning rate (default: by the model's width)")
    add("--warmup", type=float, default=0.1, help="part of the steps in which the rate rises")
    add("--weight-decay", type=float, default=0.01, help="AdamW's, on weight matrices only")
    add("--clip", type=float, default=5.0, help="largest gradient norm")
    add("--objectives", help="pretraining objectives, a,b,c (default: the paper's own)")
    add("--temperature", default="learned", help="of itc: learned, a number, or FIRST:LAST, half a cosine over the run")
    add("--teacher", metavar="CKPT", help="a trained model to learn from; {model} and {seed} are filled in")
    add("--distill", default="logits", help="what of the teacher, a,b,c: logits, attention, hidden")
    add("--rerank", type=int, metavar="K", help="test retrieval in two stages too: the K best by itc, ranked anew")
    add("--mask", type=float, help="share of the words that pretraining masks (default: 0.15; on scenes 0.3)")
    add("--ablate", choices=["text", "image"], help="take the words or the picture away, to see what the rest is worth")
    add("--limit", type=int, help="use N of the training examples, drawn at random")
    add("--mine", type=int, default=4, help="retrieval: false partners to choose the hardest of, in the second half")
    add("--pool", type=int, default=200, help="retrieval, captions: pictures of the test, with a caption each")
    add("--beams", type=int, default=1, help="beam width for the test's captions; 1 is greedy")
    add("--patch", type=int, default=12, help="side of the square that a region of your own pictures is resized to")
    add("--grid", type=int, default=6, help="cells a side where your own pictures come without boxes")
    add("--vocab", metavar="FILE", help="a BERT vocab.txt or tokenizer.json (default: trained on the training texts)")
    add("--seed", type=int, default=0, help="seed of weights, order and masks")
    add("--seeds", type=int, default=1, help="repeat with seeds SEED, SEED+1, ... and report mean and spread")
    add("--eval-every", type=int, help="steps between evaluations (default: a fifth of the steps)")
    add("--log-every", type=int, default=50, help="steps between progress lines")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--dtype", default="auto", choices=["auto", "f32", "bf16"], help="arithmetic of the trunk")
    add("--compile", action="store_true", help="compile the layers first; for long runs")
    options = parser.parse_args(argv)
    check_options(options)
    return options


def check_options(options):
    """UserError where an option has a value that cannot be, or does not go with another one."""
    for name, value in vars(options).items():
        if type(value) is int and value < (0 if name in ("steps", "seed") else 1):
            raise common.UserError(f"--{name.replace('_', '-')} is {value}; it must be positive")
    tasks = options.task.split(",")
    for task in tasks:
        if task not in data.TASKS:
            raise common.UserError(f"--task: there is no task {task!r}; choose from {', '.join(data.TASKS)}")
    if len(set(tasks)) < len(tasks) or "pretrain" in tasks[1:] or tasks[0] == "pretrain" != options.task:
        raise common.UserError("--task: name each task once, and pretrain alone")
    if len(options.data.split(",")) not in (1, len(tasks)):
        raise common.UserError(f"--data: give one source for all tasks or one each; --task has {len(tasks)}")
    if options.ablate == "text" and "caption" in tasks:
        raise common.UserError("--ablate text leaves captions nothing to learn; use --ablate image")
    if options.ablate and "pretrain" in tasks:
        raise common.UserError(
            "--ablate is for the tasks: pretraining has words and regions to predict from each other"
        )
    if options.patch != 12 and "scenes" in options.data.split(","):
        raise common.UserError("--patch is for your own pictures: the regions of scenes are 12 pixels wide")
    if (options.fresh or options.partial) and not options.init:
        raise common.UserError(f"--{'fresh' if options.fresh else 'partial'} says how to use --init; give --init too")
    if options.objectives and options.task != "pretrain":
        raise common.UserError("--objectives are those of pretraining; a --task has its own")
    for part in options.distill.split(","):
        if part not in distill.DISTILLATION:
            raise common.UserError(f"--distill: {part!r} is none of {', '.join(distill.DISTILLATION)}")
    if options.distill != "logits" and not options.teacher:
        raise common.UserError(f"--distill {options.distill} says what to learn from --teacher; give --teacher too")
    if options.rerank and options.task != "pretrain" and "retrieval" not in tasks:
        raise common.UserError("--rerank is for --task retrieval, or for pretraining with --objectives ...,itm,itc")
    for name, several in (("seed", options.seeds > 1), ("model", options.model == "all")):
        if options.export_official and several and f"{{{name}}}" not in options.export_official:
            raise common.UserError(
                f"--export-official: put {{{name}}} into the name, or each run writes over the one before"
            )
    parse_temperature(options.temperature)


def parse_temperature(text):
    """--temperature as (first, last), or None for "learned". UserError for anything else, or outside 0.01..1."""
    if text == "learned":
        return None
    try:
        first, last = map(float, text.split(":") if ":" in text else (text, text))
    except ValueError:
        raise common.UserError(
            f"--temperature {text}: learned, a number such as 0.07, or two such as 0.2:0.05"
        ) from None
    if not (0.01 <= min(first, last) and max(first, last) <= 1.0):
        raise common.UserError(f"--temperature {text}: it must lie between 0.01 and 1")
    return first, last


def output_folder(options, model_name):
    """Where the runs of a model go: --out, or out/ and what is trained on what."""
    without = f"-without-{options.ablate}" if options.ablate else ""
    return Path(options.out or f"out/{model_name}-{options.task.replace(',', '+')}{without}")


def resolve_options(options, model_name, seed):
    """One run's own options: model and seed fixed, defaults that depend on them filled in. Returns a new namespace."""
    args = argparse.Namespace(**vars(options))
    args.model, args.seed = model_name, seed
    args.tasks = args.task.split(",")
    base = output_folder(args, model_name)
    if args.out and options.model == "all":
        base = base / model_name
    args.out = base / f"seed{seed}" if options.seeds > 1 else base
    if args.steps is None:
        # UNITER trains one objective a step, so it takes more of them; side by side all three take equally many
        alone = (
            args.task == "pretrain"
            and checkpoints.PAPERS[model_name][0].PRETRAINING["conditional"]
            and options.model != "all"
        )
        args.steps = 1000 if args.data != "scenes" else 3600 if alone else 2400
    # scenes' captions have a dozen words, not thirty: with 0.15 too few are left to learn from in five minutes
    args.mask = args.mask or (0.3 if args.data == "scenes" else 0.15)
    rows = max({"nlvr2": 2, "vcr": 4, "retrieval": 3}.get(task, 1) for task in args.tasks)
    # small models learn by the number of examples, and two cores take 256 at once nearly twice as fast as 64
    args.batch_size = args.batch_size or max(
        1, (256 if args.data == "scenes" else 64) // rows // common.rank_and_world()[1]
    )
    args.eval_every = args.eval_every or max(1, math.ceil(args.steps / 5))
    for name in ("init", "teacher", "export_official"):
        if given := getattr(args, name):
            setattr(args, name, given.replace("{model}", model_name).replace("{seed}", str(seed)))
    for name in ("init", "teacher"):
        if (given := getattr(args, name)) and Path(given).resolve().parent == args.out.resolve() and not args.resume:
            raise common.UserError(f"--{name} {given}: this run would write over it; give another --out")
    return args


# ---- device and processes --------------------------------------------------------------------------------------


def keep_freed_memory():
    """Has the C library keep freed memory for the next step. By default glibc gives large blocks back to the system,
    and getting them again costs a page fault every 4 KiB: an eighth of LXMERT-base's step in bfloat16, or more."""
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):
        mallopt(-4, 0)  # M_MMAP_MAX: all blocks, the large ones too, are parts of the heap
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: whose free end is never given back


def pick_device(name):
    """The torch device. `auto`: the GPU if there is one, else Apple's, else the CPU."""
    if name == "auto":
        mps = torch.backends.mps.is_available()
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise common.UserError(f"--device {name}: not available here ({str(error).splitlines()[0]})") from None
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    return device


def pick_dtype(name, device):
    """float32 or bfloat16. `auto`: bfloat16 where the processor multiplies it natively, GPU or CPU."""
    if name != "auto":
        return {"f32": torch.float32, "bf16": torch.bfloat16}[name]
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = device.type == "cpu" and any("bf16" in k and v for k, v in torch.cpu.get_capabilities().items())
    return torch.bfloat16 if native else torch.float32


# ---- data ------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """What one run is made of, so that functions need not take it apart."""

    args: argparse.Namespace
    paper: object  # the model's module: HEADS, OBJECTIVES, PRETRAINING
    objectives: dict  # name -> ratio, in pretraining; all 1 in fine-tuning
    sets: dict  # task -> its splits, {name: data.Dataset}
    tokenizer: object
    answers: list  # column -> answer, most frequent first
    device: torch.device
    dtype: torch.dtype
    rank: int
    world: int
    content_words: tuple = ()  # words that only the picture tells, of the data set
    model: torch.nn.Module = None
    optimizer: torch.optim.Optimizer = None
    teacher: torch.nn.Module = None
    teacher_paper: object = None
    soft: tuple = ()  # objectives whose scores the teacher has too
    progress: dict = field(default_factory=lambda: {"step": 0, "seconds": 0.0, "examples": 0, "best": -math.inf})

    @property
    def splits(self):
        """The splits of the first task, in pretraining the only one."""
        return next(iter(self.sets.values()))

    def autocast(self):
        """Matrix products in bfloat16, if the run is; the weights stay float32."""
        return torch.autocast(self.device.type, self.dtype) if self.dtype != torch.float32 else nullcontext()

    def columns(self, name="vqa"):
        """{answer: column} of an objective's answers; entailment has three of its own."""
        return {answer: column for column, answer in enumerate(data.ENTAILMENT if name == "ve" else self.answers)}


def objectives_of(args, paper):
    """The objectives asked for, {name: ratio}; in pretraining those joined to another one have ratio 0."""
    if args.task != "pretrain":
        return {name: 1 for task in args.tasks for name in tasks.task_objectives(args, task)}
    default, joined = paper.PRETRAINING["objectives"], [n for ns in paper.PRETRAINING["joined"].values() for n in ns]
    known = {name: 1 for name in sorted(paper.OBJECTIVES) if paper.OBJECTIVES[name].pretraining}
    known |= {"itc": 2, **default}  # itc as often as itm, the other objective that sees whole pairs
    known |= dict.fromkeys(joined, 0)
    names = args.objectives.split(",") if args.objectives else [*default, *joined]
    for name in names:
        if name not in known:
            raise common.UserError(
                f"--objectives: {args.model} has no pretraining objective {name!r}; it has {', '.join(known)}"
            )
    if "wra" in names and "itm" not in names:
        raise common.UserError("--objectives: wra needs the pairs of itm; write itm,wra")
    if args.rerank and not {"itm", "itc"} <= {*names}:
        raise common.UserError(
            "--rerank: the first stage needs objective itc, the second itm; write --objectives ...,itm,itc"
        )
    return {name: known[name] for name in names}


def load_splits(args, objectives, task, source):
    """The splits of a task: {"train": Dataset, "val": ..., "test": ...}, scenes with "compose" besides, and for
    referring expressions, which have true boxes, with "detected"."""
    names = ["train", "val", "test"] + ["compose"] * (source == "scenes" and task != "pretrain")
    names += ["detected"] * (source == "scenes" and task == "refer")
    task = "caption" if task == "pretrain" and "qa" not in objectives else task  # questions only to be answered
    if dist.is_initialized() and os.environ.get("LOCAL_RANK") != "0":
        dist.barrier()  # the first process of a machine draws and extracts, the others read what it cached
    limits = {"train": args.limit} | dict.fromkeys(names[1:])
    splits = {name: data.load(source, task, name, limit, args.patch, args.grid) for name, limit in limits.items()}
    if dist.is_initialized() and os.environ.get("LOCAL_RANK") == "0":
        dist.barrier()
    if not len(splits["train"]):
        raise common.UserError(f"{source}: no example of split train for --task {task}")
    return {name: split for name, split in splits.items() if len(split)}


def drop_unsupported(paper, objectives, dataset):
    """Without the objectives that the data have nothing for: region classes need a detector, qa needs answers."""
    why = {}
    for name in objectives:
        for field_name in paper.OBJECTIVES[name].fields:
            if field_name == "answers" and not any(dataset.answer):
                why[name] = "no text has an answer"
            elif field_name != "answers" and (field_name not in dataset.store.fields or dataset.store.classes is None):
                why[name] = "the regions have no classes"
    for name, reason in why.items():
        common.print0(f"data     objective {name} is left out: {reason}")
    if len(why) == len(objectives):
        raise common.UserError("the data have nothing for any of the objectives; see the README's table of objectives")
    return {name: ratio for name, ratio in objectives.items() if name not in why}


def tokenize(args, sets, checkpoint):
    """The tokenizer (the checkpoint's, a file's, or trained on the training texts); gives every split its tokens."""
    every = [split for splits in sets.values() for split in splits.values()]
    if checkpoint and checkpoint["tokenizer"]:
        tokenizer = data.tokenizer_from_json(checkpoint["tokenizer"])
    elif checkpoint and not args.vocab:
        raise common.UserError(f"{args.init}: no tokenizer.json or vocab.txt beside it; give --vocab those word pieces")
    else:
        # scenes: from the texts of all tasks, whatever the task, so that a pretrained model can be given any later
        text = (
            data.load("scenes", "pretrain", "train", args.limit).text + scenes.scene_texts()
            if "scenes" in args.data.split(",")
            else []
        )
        text += [part for split in every if split.split == "train" and split.name != "scenes" for part in split.parts()]
        tokenizer = data.read_tokenizer(args.vocab) if args.vocab else data.train_tokenizer(text)
    for split in every:
        split.encode(tokenizer, max_length=60)
    return tokenizer


def sample_objectives(paper, objectives, rng, done=1.0):
    """What one step trains when the share `done` (0..1) of the run is over: with conditional masking one objective,
    drawn by ratio, and those joined to it; else all, those of the paper's second half only then."""
    if not paper.PRETRAINING["conditional"]:
        late = paper.PRETRAINING.get("second_half", ())
        return [name for name in objectives if done >= 0.5 or name not in late] or list(objectives)
    drawn = [name for name, ratio in objectives.items() if ratio]
    name = rng.choice(drawn, p=np.array([objectives[n] for n in drawn]) / sum(objectives.values()))
    return [str(name), *(n for n in paper.PRETRAINING["joined"].get(name, ()) if n in objectives)]


def index_stream(args, dataset, slots, skip):
    """Endless index arrays, one a step, in an order that depends on seed and epoch alone. Each holds `slots` forward
    passes, of like lengths, so that no process waits for another's longer sentences; pass s takes every slots-th row.
    `skip`: how many were used before a resume. UserError if there are fewer examples than passes."""
    if len(dataset) < slots:
        raise common.UserError(f"{len(dataset)} examples are too few for {slots} forward passes in a step")
    for epoch in itertools.count():
        order = data.batches(dataset.lengths(), np.random.default_rng((args.seed, epoch)), size=args.batch_size * slots)
        order = [index for index in order if len(index) >= slots]
        if skip >= len(order):
            skip -= len(order)
            continue
        yield from order[skip:]
        skip = 0


# ---- batches -----------------------------------------------------------------------------------------------------


# ---- model -----------------------------------------------------------------------------------------------------


def build_model(run, checkpoint):
    """The model: from a checkpoint's config with this run's heads, or from the preset and the data's own sizes."""
    args, paper, store = run.args, run.paper, run.splits["train"].store
    known, words = {"feature_size": store.width}, run.tokenizer.get_vocab_size()
    known |= {"classes": store.classes} if store.classes else {}
    known |= {"attributes": 1 + int(store.fields["attributes"].max())} if "attributes" in store.fields else {}
    if checkpoint is None:
        sizes = {**paper.PRESETS[args.size], "vocab_size": words, "classes": 2, "attributes": 1, **known}
    elif checkpoint["model"] != args.model:
        raise common.UserError(f"{args.init}: a checkpoint of {checkpoint['model']} does not fit --model {args.model}")
    else:
        sizes = {"classes": 2, "attributes": 1, **checkpoint["config"]}
        if sizes.get("feature_size", store.width) != store.width and not (args.partial or args.fresh):
            raise common.UserError(
                f"{args.init}: trained on features of width {sizes['feature_size']}, {args.data} has {store.width}; "
                "use the same kind of features, for pixels the same --patch, or --partial for a new projection"
            )
        if words > sizes["vocab_size"]:
            raise common.UserError(
                f"{args.init}: has {sizes['vocab_size']} words, the tokenizer {words}; give --vocab its own pieces"
            )
        sizes |= known
    if args.model == "uniter":
        sizes["types"] = max(sizes.get("types", 2), *(checkpoints.TYPES.get(task, 2) for task in args.tasks))
    sizes |= {"heads": tasks.heads_for(paper, run.objectives), "answers": max(1, len(run.answers))}
    if run.teacher and "hidden" in args.distill.split(","):
        theirs = run.teacher.config
        sizes["heads"] = (*sizes["heads"], "hidden")
        sizes["teacher_widths"] = (theirs.hidden, getattr(theirs, "visual_hidden", theirs.hidden))
    sizes |= parse_config_options(args, paper)
    if 0 < sizes.get("task_tokens", 0) < len(args.tasks):
        raise common.UserError(f"--config task_tokens={sizes['task_tokens']}: --task has {len(args.tasks)}; give more")
    torch.manual_seed(args.seed)
    try:
        model = getattr(paper, checkpoints.PAPERS[args.model][1])(paper.Config(**sizes))
    except (TypeError, ValueError) as error:
        raise common.UserError(
            f"{args.init or args.model} {' '.join(args.config)}: no model of these sizes: {error}"
        ) from None
    if checkpoint and args.fresh:
        common.print0(f"init     {args.init}: its sizes and tokenizer only; all weights at random")
    elif checkpoint:
        state, report = checkpoints.fit_state_dict(args, model.state_dict(), checkpoint, run.answers)
        model.load_state_dict(state)
        common.print0(report)
    return model


def parse_config_options(args, paper):
    """--config as {name: value}. UserError for a name that the model's Config lacks or that the data decide, or for a value
    of another type."""
    sizes, known = {}, {f.name: f.default for f in dataclasses.fields(paper.Config) if f.name not in BY_DATA}
    for text in args.config:
        name, _, value = text.partition("=")
        if name not in known:
            raise common.UserError(
                f"--config {text}: {args.model} has no {name!r} to choose; it has {', '.join(known)}"
            )
        if value not in WORDS.get(name, (value,)):
            raise common.UserError(f"--config {text}: choose from {', '.join(WORDS[name])}")
        try:
            value = value if name in WORDS else json.loads(value)
        except ValueError:
            raise common.UserError(f"--config {text}: write NAME=JSON, as layers=1 or connections=[[0,1]]") from None
        if isinstance(value, list):
            value = tuple(value)
        if type(value) is int and type(known[name]) is float:
            value = float(value)
        if type(value) is not type(known[name]) or (type(value) is int and value < min(1, known[name])):
            raise common.UserError(f"--config {text}: {name} is something like {known[name]}")
        sizes[name] = value
    return sizes


def compile_layers(model):
    """Compiles the blocks that all layers of all three models are made of, where they stand: small regions, used many
    times, for any batch and lengths (`dynamic`), so that nothing is compiled anew after the first steps."""
    torch._dynamo.config.recompile_limit = 64  # of one block: each width, number format and use of it counts
    torch.fx.experimental._config.use_duck_shape = False  # lengths that are equal at first need not stay so
    for module in model.modules():
        if isinstance(module, common.AttentionBlock | common.FeedForward):
            module.compile(dynamic=True)


# ---- how weights fit it ----------------------------------------------------------------------------------------


# ---- optimizer -------------------------------------------------------------------------------------------------


def make_optimizer(model, weight_decay):
    """AdamW as UNITER sets it: betas .9 and .98; decay on matrices, none on biases and norms."""
    matrices, vectors = ([p for p in model.parameters() if (p.ndim > 1) == wanted] for wanted in (True, False))
    groups = [{"params": matrices, "decay": weight_decay}, {"params": vectors, "decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), fused=True)


def learning_rate(step, peak, warmup, steps):
    """Linear warm-up, then linear decay: the rate of optimizer step 1, 2, ..., `steps`; 1e-8 where that meets 0.

    warmup: in steps. peak x step / warmup, then peak x (steps - step) / (steps - warmup).
    """
    if step < warmup:
        return peak * step / warmup
    return peak * (steps - step) / (steps - warmup) if step < steps else 1e-8


def default_learning_rate(paper, width, task):
    """Peak learning rate of a model so wide: the papers' for base and large, more for the narrow ones of --size tiny. By
    the width, not by --size, as --init may bring any. ViLBERT and LXMERT pretrain at 1e-4, about twice the rate at
    which they fine-tune."""
    rate = 1e-3 if width <= 256 else 5e-5 if width < 1024 else 3e-5
    return rate * (paper.PRETRAINING["rate"] if task == "pretrain" else 1.0)


def set_learning_rate(optimizer, step, rate):
    """The rate of step 1, 2, ... for every group, so that torch's AdamW takes the official step to the last digit.

    The official one adds eps before it corrects the second moment's bias, torch after: eps is divided by that
    correction. It decays after the step, p <- (p - r u)(1 - r d), torch before: p <- p (1 - r' d') - r' u, which is the
    same for r' = r (1 - r d), d' = d / (1 - r d).
    """
    for group in optimizer.param_groups:
        r, d = rate, group["decay"]
        group["lr"], group["weight_decay"] = r * (1 - r * d), d / (1 - r * d)
        group["eps"] = 1e-6 / math.sqrt(1 - group["betas"][1] ** step)


def backward(run, batches, names):
    """Gradients of one step's loss, mean over ALL its parts: micro-batches here and in the other processes.

    Each part's mean counts by its share of the items, so that the sum of the parts is the mean of the whole; the
    gradients of the processes are then added up, once. Returns {name: loss of the step}, 0-d tensors.
    """
    seen, names = names, names + distill.distillation_losses(run, names)
    counts = [[tasks.items_of(run.paper, name, batch) for name in names] for batch in batches]
    totals = common.all_reduce_sum([sum(column) for column in zip(*counts, strict=True)]).tolist()
    losses = {name: torch.zeros((), device=run.device) for name in names}
    for batch, count in zip(batches, counts, strict=True):
        with run.autocast():
            batch = batch.to(run.device)
            parts = distill.forward_with_teacher(run, batch, seen) if run.teacher else run.model(batch, seen)
        counted = zip(names, count, totals, strict=True)
        sums = {name for name, objective in run.paper.OBJECTIVES.items() if objective.is_sum}
        shares = {name: (1 if name in sums else n) / max(1.0, t) for name, n, t in counted}
        weights = run.paper.PRETRAINING["weights"]
        sum(weights.get(name, 1.0) * shares[name] * parts[name][0] for name in names).backward()
        for name in names:
            losses[name] += parts[name][0].detach() * shares[name]
    if dist.is_initialized():
        # one flat vector, one reduction; a head without a gradient is unused in every process alike
        tensors = [p.grad for p in run.model.parameters() if p.grad is not None] + list(losses.values())
        flat = torch.cat([t.flatten() for t in tensors])
        dist.all_reduce(flat)
        for tensor, piece in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(piece.view_as(tensor))
    return losses


# ---- distillation ----------------------------------------------------------------------------------------------


# ---- evaluation --------------------------------------------------------------------------------------------------


# ---- retrieval ---------------------------------------------------------------------------------------------------


# ---- loop ------------------------------------------------------------------------------------------------------


def train(args):
    """One run: reads the data, builds or restores the model, trains, evaluates. Returns what goes to result.json."""
    paper, (rank, world), last = checkpoints.PAPERS[args.model][0], common.rank_and_world(), args.out / "checkpoint.pt"
    device = pick_device(args.device)
    if args.resume and not last.is_file():
        raise common.UserError(
            f"--resume: there is no {last}; start without --resume, or give the --out of the stopped run"
        )
    args.init, args.fresh = (last, False) if args.resume else (args.init, args.fresh)
    checkpoint = (
        checkpoints.load_checkpoint(last) if args.resume else checkpoints.load_weights(args) if args.init else None
    )
    teacher = checkpoints.load_checkpoint(args.teacher) if args.teacher else None
    if checkpoint and teacher and checkpoint["tokenizer"] != teacher["tokenizer"]:
        raise common.UserError(
            f"{args.teacher}: reads other word pieces than {args.init}; start without --init, or from its own start"
        )
    objectives = objectives_of(args, paper)
    sources = args.data.split(",") * (len(args.tasks) if "," not in args.data else 1)
    sets = {task: load_splits(args, objectives, task, source) for task, source in zip(args.tasks, sources, strict=True)}
    for number, splits in enumerate(sets.values()):
        for split in splits.values():
            split.task_number = number
    if len(widths := {splits["train"].store.width for splits in sets.values()}) > 1:
        raise common.UserError(
            f"--data: features of {' and '.join(map(str, sorted(widths)))} numbers; tasks trained together need one --patch"
        )
    asked = sets.get("vqa") or sets.get("pretrain")
    objectives = drop_unsupported(paper, objectives, asked["train"]) if args.task == "pretrain" else objectives
    tokenizer = tokenize(args, sets, checkpoint or teacher)
    answers = data.answer_list(asked["train"]) if {"vqa", "qa"} & set(objectives) else []
    answers = teacher["answers"] if teacher and teacher["answers"] and answers else answers
    dtype = pick_dtype(args.dtype, device)
    run = Run(args, paper, objectives, sets, tokenizer, answers, device, dtype, rank, world)
    if args.data == "scenes":
        run.content_words = scenes.CONTENT_WORDS
    if teacher:
        distill.read_teacher(run, teacher)
    run.model = build_model(run, checkpoint).to(device)
    if teacher:
        distill.match_teacher(run, teacher)
    args.lr = args.lr or default_learning_rate(paper, run.model.config.hidden, args.task)
    set_temperature(run, 0.0)
    if args.compile:
        compile_layers(run.model)
    run.optimizer = make_optimizer(run.model, args.weight_decay)
    if args.resume:
        try:
            run.optimizer.load_state_dict(checkpoint["optimizer"])
        except ValueError:
            raise common.UserError(
                f"--resume: {last} is of a run with other heads; give the options that it had"
            ) from None
        run.progress = checkpoint["progress"]
    seed_dropout(run, checkpoint.get("generators", {}).get(device.type, []) if args.resume else [])
    if args.export_official:
        if Path(args.export_official).is_dir():
            raise common.UserError(f"--export-official {args.export_official}: is a folder; give a file name")
        checkpoints.export_official(
            args.model, run.model.state_dict()
        )  # refuses two heads of one name before the first step
    print_run(run)
    loop(run)
    result = run_test(run)
    if args.export_official and rank == 0:
        checkpoints.save(checkpoints.export_official(args.model, run.model.state_dict()), Path(args.export_official))
    return result


def seed_dropout(run, states):
    """Sets the generator that dropout draws from: to this process's of the saved `states`, if there is one; else each
    process but the first goes on with numbers of its own."""
    if run.rank < len(states):
        checkpoints.generator_of(run.device).set_rng_state(states[run.rank])
    elif run.rank:
        torch.manual_seed(int(np.random.SeedSequence((run.args.seed, run.rank)).generate_state(1)[0]))


def set_temperature(run, part):
    """The temperature of itc after `part` (0..1) of the run, where it is not learned."""
    ends = parse_temperature(run.args.temperature)
    if ends and "itc" in run.model.heads:
        scale = run.model.heads["itc"].log_scale.requires_grad_(False)
        scale.fill_(-math.log(common.scheduled_temperature(*ends, part)))


def loop(run):
    """The steps: batches, gradients, clipping, update; a line every `log_every`, an evaluation every `eval_every`."""
    args, model, progress, log = run.args, run.model, run.progress, Log(run)
    slots = run.world * args.accumulate  # forward passes in a step; this process does `accumulate` of them
    past = Counter(sample_task(run, step) for step in range(1, progress["step"] + 1))
    order = {task: index_stream(args, splits["train"], slots, skip=past[task]) for task, splits in run.sets.items()}
    if progress["step"] == 0:
        validate(run, log)
    coming = None
    with interruptible() as interrupted, ThreadPoolExecutor(1) as worker:
        while progress["step"] < args.steps:
            start, step = time.perf_counter(), progress["step"] + 1
            batches, names = coming.result() if coming else prepare_step(run, order, step)
            # made while this step computes; not where the model itself picks what comes
            ahead = step < args.steps and "retrieval" not in args.tasks
            coming = worker.submit(prepare_step, run, order, step + 1) if ahead else None
            ready = time.perf_counter()
            model.train()
            set_temperature(run, (step - 1) / args.steps)
            losses = backward(run, batches, names)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip)
            set_learning_rate(run.optimizer, step, learning_rate(step, args.lr, args.warmup * args.steps, args.steps))
            run.optimizer.step()
            run.optimizer.zero_grad(set_to_none=True)
            progress["step"], due = step, step % args.log_every == 0 or step == args.steps
            if due and run.device.type != "cpu":
                float(norm)  # what a GPU still has to do belongs to the time of these steps
            log.add(step, losses, norm, batches, ready - start, time.perf_counter() - start)
            if due:
                log.line()
            if step % args.eval_every == 0 or step == args.steps:
                validate(run, log)
            if common.all_reduce_sum([interrupted()])[
                0
            ]:  # all stop at the same step, or one would wait for another for ever
                log.check()
                checkpoints.save_checkpoint(run, "checkpoint.pt")
                raise common.UserError(f"interrupted after step {step}, which is saved; go on with --resume")
    common.print0(
        f"data     {100 * log.waited / max(1e-9, log.worked):.1f}% of the training time was spent waiting for it"
    )


def prepare_step(run, order, step):
    """This process's batches of step 1, 2, ... and the objectives that they train: a function of seed and step alone,
    save for retrieval's hard partners. order: {task: stream}, each at this step's turn."""
    args, task, drawn = (
        run.args,
        sample_task(run, step),
        np.random.default_rng((run.args.seed, step)),
    )  # alike in every process
    if args.task == "pretrain":
        names = sample_objectives(run.paper, run.objectives, drawn, (step - 1) / args.steps)
    else:
        names = tasks.task_objectives(args, task)
    index, batches, slots = next(order[task]), [], run.world * args.accumulate
    for slot in range(run.rank * args.accumulate, (run.rank + 1) * args.accumulate):
        rng = np.random.default_rng((args.seed, step, slot))
        batch = tasks.make_batch(run, run.sets[task]["train"], index[slot::slots], names, rng)
        batches.append(batch.pin() if run.device.type == "cuda" else batch)
    return batches, names


def sample_task(run, step):
    """The task of step 1, 2, ..., in proportion to the tasks' training examples; a function of seed and step alone."""
    sizes = np.array([len(splits["train"]) for splits in run.sets.values()])
    return str(np.random.default_rng((run.args.seed, step, 7)).choice(list(run.sets), p=sizes / sizes.sum()))


@contextmanager
def interruptible():
    """Inside the block Ctrl-C and SIGTERM only set a flag, so that the step in progress ends and is saved."""
    flag = []
    before = {s: signal.signal(s, lambda *_: flag.append(True)) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(flag)
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


def validate(run, log):
    """Evaluates the val split, keeps the best weights, and writes the checkpoint to go on from."""
    log.check()
    if any("val" in splits for splits in run.sets.values()):
        start = time.perf_counter()
        metrics, chance = tasks.evaluate(run, "val")
        log.metrics(metrics, chance, time.perf_counter() - start)
        score, name = tasks.best_score(run, metrics)
        warn_at_chance(run, metrics, chance)
        if score > run.progress["best"]:
            run.progress["best"] = score
            common.print0(f"best     step {run.progress['step']}: {name} {score:.4f}")
            checkpoints.save_checkpoint(run, "best.pt")
    if run.progress["step"]:
        checkpoints.save_checkpoint(run, "checkpoint.pt")


def warn_at_chance(run, metrics, chance):
    """Warns, from the middle of the run on, of each task's accuracy that two standard errors of a guess could explain."""
    if run.args.ablate or 2 * run.progress["step"] < run.args.steps or not run.progress["step"]:
        return
    for name, p in chance.items():
        task = next((t for t in run.sets if name.startswith(f"{t}_")), next(iter(run.sets)))
        n = len(run.sets[task].get("val", ()))
        if name.endswith("accuracy") and n and metrics[name] <= p + 2 * math.sqrt(p * (1 - p) / n):
            common.print0(f"warning  val {name} {evaluation.percent(metrics[name])} is no better than chance, {evaluation.percent(p)}: train longer, start "
                "from a pretrained model (--init) or try another --lr")  # fmt: skip


def run_test(run):
    """Test metrics of the best weights (the last ones where there is no val split), as result.json has them."""
    args, progress, best = run.args, run.progress, run.args.out / "best.pt"
    if dist.is_initialized():
        dist.barrier()  # the first process writes best.pt, all read it
    if any("val" in splits for splits in run.sets.values()) and best.is_file():
        run.model.load_state_dict(checkpoints.load_checkpoint(best)["state"])
    result = {
        "model": args.model,
        "task": args.task,
        "split": "test",
        "data": args.data,
        "steps": args.steps,
        "seed": args.seed,
    }
    result |= {"ablate": args.ablate} if args.ablate else {}
    kept = [p for name, p in run.model.named_parameters() if not name.startswith("heads.hidden.")]  # see projections
    result["parameters"] = sum(p.numel() for p in kept)
    result["seconds"] = round(progress["seconds"], 1)
    result["examples_per_second"] = round(progress["examples"] / max(1e-9, progress["seconds"]), 1)
    result["chance"] = {}
    for split in ("test", "compose", "detected"):
        metrics, chance = tasks.evaluate(run, split)
        if not metrics:
            continue
        examples = sum(len(tasks.test_examples(run, task, s[split])) for task, s in run.sets.items() if split in s)
        common.print0(
            evaluation.format_metrics(f"{args.model} {args.task}, split {split}, {examples} examples", metrics, chance)
        )
        prefix = "" if split == "test" else f"{split}_"
        result |= {prefix + name: round(float(value), 5) for name, value in metrics.items()}
        result["chance"] |= {prefix + name: round(float(value), 5) for name, value in chance.items()}
    if "itc" in run.model.heads:
        result["temperature"] = round(math.exp(-run.model.heads["itc"].log_scale.item()), 5)
    searched, head = (run.splits, "itm") if args.task == "pretrain" else (run.sets.get("retrieval", {}), "rank")
    if args.rerank and "test" in searched:
        stages, lines = evaluation.compare_stages(run, searched["test"], head)
        result |= stages
        common.print0(lines)
    if run.rank == 0:
        checkpoints.write_text(args.out / "result.json", json.dumps(result, indent=1) + "\n")
    return result


# ---- printing --------------------------------------------------------------------------------------------------


class Log:
    """Progress lines and log.jsonl. Losses stay on the device until a line is due, so that no step waits for them."""

    def __init__(self, run):
        self.run, self.pending, self.waited, self.worked, self.seen = run, [], 0.0, 0.0, 0
        self.file, step = run.args.out / "log.jsonl", run.progress["step"]
        if run.rank == 0:
            kept = self.file.read_text().splitlines() if run.args.resume and self.file.is_file() else []
            checkpoints.write_text(self.file, "".join(line + "\n" for line in kept if json.loads(line)["step"] <= step))

    def add(self, step, losses, norm, batches, waited, worked):
        ids = [i for batch in batches for i in batch.ids]
        self.pending.append((step, losses, norm, ids))
        self.waited, self.worked, self.seen = self.waited + waited, self.worked + worked, self.seen + len(ids)
        self.run.progress["seconds"] += worked
        self.run.progress["examples"] += len(ids) * self.run.world

    def check(self):
        """UserError at the first loss or gradient norm that is not finite, naming step, objective and examples."""
        for step, losses, norm, ids in self.pending:
            bad = [name for name, loss in losses.items() if not math.isfinite(loss)]
            if bad or not math.isfinite(norm):
                what = f"the loss of {bad[0]}" if bad else f"the gradient of {', '.join(losses)}"
                raise common.UserError(
                    f"step {step}: {what} is not finite; try a lower --lr. Examples: {', '.join(ids[:8])} ..."
                )

    def line(self):
        """Mean loss of each objective since the last line, rate, speed and time left; the same to log.jsonl."""
        self.check()
        args, step, values = self.run.args, self.run.progress["step"], {}
        for _, losses, _, _ in self.pending:
            for name, loss in losses.items():
                values.setdefault(name, []).append(float(loss))
        values = {name: sum(v) / len(v) for name, v in values.items()}
        norm, self.pending = float(self.pending[-1][2]), []
        rate = learning_rate(step, args.lr, args.warmup * args.steps, args.steps)
        speed = self.seen * self.run.world / max(1e-9, self.worked)
        left = int((args.steps - step) * self.worked * args.batch_size * args.accumulate / max(1, self.seen))
        text = "  ".join(f"{name} {value:.3f}" for name, value in values.items())
        common.print0(
            f"step {step:5d}/{args.steps}  {text}  lr {rate:.1e}  {speed:.0f} examples/s  {left // 60}:{left % 60:02d} left"
        )
        self.write({"step": step, "lr": rate, "grad_norm": norm, "examples_per_second": round(speed, 1), **values})

    def metrics(self, metrics, chance, seconds):
        """The val split's metrics, chance in brackets."""
        step, shown = self.run.progress["step"], []
        for name, value in metrics.items():
            beside = f" ({evaluation.percent(chance[name])})" if name in chance else ""
            if "accuracy_" not in name:
                shown.append(
                    f"{name} {value:.3f}"
                    if name.endswith(evaluation.NO_SHARE)
                    else f"{name} {evaluation.percent(value)}{beside}"
                )
        common.print0(f"step {step:5d}/{self.run.args.steps}  val: {', '.join(shown)}; {seconds:.0f} s")
        self.write({"step": step, "split": "val", **metrics, "chance": chance})

    def write(self, record):
        if self.run.rank == 0:
            with self.file.open("a") as file:
                file.write(json.dumps(record, default=float) + "\n")


def print_run(run):
    """The final configuration, once."""
    args, size = run.args, sum(p.numel() for p in run.model.parameters())
    common.print0(
        f"model    {args.model} {'as in --init' if args.init else args.size}, {size / 1e6:.2f} M parameters: {run.model.config}"
    )
    for task, splits in run.sets.items():
        counts = ", ".join(f"{name} {len(split)}" for name, split in splits.items())
        each = splits["train"].lengths().mean(0)
        source = f"{task}, {splits['train'].name}"
        common.print0(f"data     {source}: {counts} examples; {each[0]:.1f} words, {each[1]:.1f} regions each")
    common.print0(f"run      {args.steps} steps of {args.batch_size} x {args.accumulate} x {run.world} examples, lr {args.lr:g}, seed {args.seed}, "
        f"{', '.join(run.objectives)}; {run.device}, {str(run.dtype).removeprefix('torch.')}; to {args.out}")  # fmt: skip


# ---- files -----------------------------------------------------------------------------------------------------


# ---- main ------------------------------------------------------------------------------------------------------


def main(argv=None):
    """Runs every model and seed asked for. Exit code 0, or 2 with one line on stderr."""
    try:
        options = parse(argv)
        keep_freed_memory()
        models = list(checkpoints.PAPERS) if options.model == "all" else [options.model]
        runs = [
            resolve_options(options, m, s) for m in models for s in range(options.seed, options.seed + options.seeds)
        ]
        started = [(args.out / "checkpoint.pt").is_file() for args in runs]
        if options.resume and any(started):
            for args, resume in zip(runs, started, strict=True):
                args.resume = resume
        results = [train(args) for args in runs]
        if len(results) > 1:
            evaluation.compare_models(results, output_folder(options, options.model))
        if dist.is_initialized():
            dist.barrier()  # a process that leaves early breaks the others' last reduction
    except UserError as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    code = main()
    if "RANK" in os.environ:
        # gloo's threads may outlive the interpreter and abort it while it ends; by now all is written
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
