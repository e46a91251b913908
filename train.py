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
from dataclasses import asdict, dataclass, field
from pathlib import Path

if not shutil.which("nvidia-smi"):
    # torch's threads wait awake for the next product: those that sleep start late, a tenth to a fifth of a tiny step on
    # two cores. Read when torch is loaded, so before it; not beside a GPU, where the threads would wait in vain.
    os.environ.setdefault("OMP_WAIT_POLICY", "active")

import numpy as np
import torch
import torch.distributed as dist

import common
import data
import lxmert
import uniter
import vilbert
from data import DataError

PAPERS = {
    "uniter": (uniter, "UNITER"),
    "vilbert": (vilbert, "ViLBERT"),
    "lxmert": (lxmert, "LXMERT"),
}
OBJECTIVE = {"retrieval": "rank"}  # of the tasks whose objective has another name
DOWNSTREAM = {OBJECTIVE.get(task, task) for task in data.TASKS} - {"pretrain", "vqa"}
MASKED_WORDS, MASKED_REGIONS, PAIRS = {"mlm"}, {"mrfr", "mrc", "mrc_kl", "attr", "nce"}, {"itm", "wra"}
# by this a state dict under official names is known; a BERT has none of these
MARKS = {"uniter": "img_embeddings.", "vilbert": "v_embeddings.", "lxmert": "visn_fc."}
ANSWER_HEADS = ("heads.vqa.", "heads.qa.")
HUGGING_FACE = {"model_type": ("bert", "lxmert"), "hidden_act": ("gelu",)}  # what a config.json may say, if it does
TYPES = {"nlvr2": 3, "vcr": 4}  # rows of UNITER's table of text types, where not 2
WORDS = {
    "contrast": ("infonce", "hinge", "sigmoid", "dcl"),
    "nlvr2": ("paired-attention", "paired", "triplet"),
    "fusion": ("mul", "sum"),
}
BY_DATA = {"vocab_size", "feature_size", "types", "classes", "attributes", "answers", "heads", "teacher_widths"}
CHECKPOINT = {"model", "config", "state", "tokenizer", "answers"}  # what one must hold to be used
DISTILL = {"logits": (), "attention": ("attention_kl", "attention_mse"), "hidden": ("hidden",)}  # and their losses

# ---- options ---------------------------------------------------------------------------------------------------


class Stop(DataError):
    """What ends the program with one line on stderr and exit code 2 where no file is to blame."""


def parse(argv=None):
    """The command line. Where a default depends on the task or the size, it is None here and set by `settle`,
    the learning rate by `default_rate`. Stop for what makes no sense."""
    parser = data.Parser(description="Pretrain, fine-tune and compare UNITER, ViLBERT and LXMERT.", allow_abbrev=False)

    def add(name, **settings):
        settings["help"] += " (default: %(default)s)" if settings.get("default") is not None else ""
        parser.add_argument(name, **settings)

    add("--model", default="uniter", choices=[*PAPERS, "all"], help="which paper; all: one after the other, compared")
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
    refuse(options)
    return options


def refuse(options):
    """Stop where an option has a value that cannot be, or does not go with another one."""
    for name, value in vars(options).items():
        if type(value) is int and value < (0 if name in ("steps", "seed") else 1):
            raise Stop(f"--{name.replace('_', '-')} is {value}; it must be positive")
    tasks = options.task.split(",")
    for task in tasks:
        if task not in data.TASKS:
            raise Stop(f"--task: there is no task {task!r}; choose from {', '.join(data.TASKS)}")
    if len(set(tasks)) < len(tasks) or "pretrain" in tasks[1:] or tasks[0] == "pretrain" != options.task:
        raise Stop("--task: name each task once, and pretrain alone")
    if len(options.data.split(",")) not in (1, len(tasks)):
        raise Stop(f"--data: give one source for all tasks or one each; --task has {len(tasks)}")
    if options.ablate == "text" and "caption" in tasks:
        raise Stop("--ablate text leaves captions nothing to learn; use --ablate image")
    if options.ablate and "pretrain" in tasks:
        raise Stop("--ablate is for the tasks: pretraining has words and regions to predict from each other")
    if options.patch != 12 and "scenes" in options.data.split(","):
        raise Stop("--patch is for your own pictures: the regions of scenes are 12 pixels wide")
    if (options.fresh or options.partial) and not options.init:
        raise Stop(f"--{'fresh' if options.fresh else 'partial'} says how to use --init; give --init too")
    if options.objectives and options.task != "pretrain":
        raise Stop("--objectives are those of pretraining; a --task has its own")
    for part in options.distill.split(","):
        if part not in DISTILL:
            raise Stop(f"--distill: {part!r} is none of {', '.join(DISTILL)}")
    if options.distill != "logits" and not options.teacher:
        raise Stop(f"--distill {options.distill} says what to learn from --teacher; give --teacher too")
    if options.rerank and options.task != "pretrain" and "retrieval" not in tasks:
        raise Stop("--rerank is for --task retrieval, or for pretraining with --objectives ...,itm,itc")
    for name, several in (("seed", options.seeds > 1), ("model", options.model == "all")):
        if options.export_official and several and f"{{{name}}}" not in options.export_official:
            raise Stop(f"--export-official: put {{{name}}} into the name, or each run writes over the one before")
    temperatures(options.temperature)


def temperatures(text):
    """--temperature as (first, last), or None for "learned". Stop for anything else, or outside 0.01..1."""
    if text == "learned":
        return None
    try:
        first, last = map(float, text.split(":") if ":" in text else (text, text))
    except ValueError:
        raise Stop(f"--temperature {text}: learned, a number such as 0.07, or two such as 0.2:0.05") from None
    if not (0.01 <= min(first, last) and max(first, last) <= 1.0):
        raise Stop(f"--temperature {text}: it must lie between 0.01 and 1")
    return first, last


def folder_of(options, model_name):
    """Where the runs of a model go: --out, or out/ and what is trained on what."""
    without = f"-without-{options.ablate}" if options.ablate else ""
    return Path(options.out or f"out/{model_name}-{options.task.replace(',', '+')}{without}")


def settle(options, model_name, seed):
    """One run's own options: model and seed fixed, defaults that depend on them filled in. Returns a new namespace."""
    o = argparse.Namespace(**vars(options))
    o.model, o.seed = model_name, seed
    o.tasks = o.task.split(",")
    base = folder_of(o, model_name)
    if o.out and options.model == "all":
        base = base / model_name
    o.out = base / f"seed{seed}" if options.seeds > 1 else base
    if o.steps is None:
        # UNITER trains one objective a step, so it takes more of them; side by side all three take equally many
        alone = o.task == "pretrain" and PAPERS[model_name][0].PRETRAINING["conditional"] and options.model != "all"
        o.steps = 1000 if o.data != "scenes" else 3600 if alone else 2400
    # scenes' captions have a dozen words, not thirty: with 0.15 too few are left to learn from in five minutes
    o.mask = o.mask or (0.3 if o.data == "scenes" else 0.15)
    rows = max({"nlvr2": 2, "vcr": 4, "retrieval": 3}.get(task, 1) for task in o.tasks)
    # small models learn by the number of examples, and two cores take 256 at once nearly twice as fast as 64
    o.batch_size = o.batch_size or max(1, (256 if o.data == "scenes" else 64) // rows // processes()[1])
    o.eval_every = o.eval_every or max(1, math.ceil(o.steps / 5))
    for name in ("init", "teacher", "export_official"):
        if given := getattr(o, name):
            setattr(o, name, given.replace("{model}", model_name).replace("{seed}", str(seed)))
    for name in ("init", "teacher"):
        if (given := getattr(o, name)) and Path(given).resolve().parent == o.out.resolve() and not o.resume:
            raise Stop(f"--{name} {given}: this run would write over it; give another --out")
    return o


# ---- device and processes --------------------------------------------------------------------------------------


def processes():
    """(rank, world) under torchrun, (0, 1) without. Tensors on GPUs go by NCCL, those on CPUs by gloo."""
    if "RANK" not in os.environ or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return 0, 1
    if not dist.is_initialized():
        dist.init_process_group()
    return dist.get_rank(), dist.get_world_size()


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
        raise Stop(f"--device {name}: not available here ({str(error).splitlines()[0]})") from None
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


def total(values):
    """The sum over all processes of numbers or of a tensor, as a float64 tensor on the CPU: no GPU is waited for."""
    tensor = torch.as_tensor(values, dtype=torch.float64).clone()
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


# ---- data ------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """What one run is made of, so that functions need not take it apart."""

    o: argparse.Namespace
    paper: object  # the model's module: HEADS, OBJECTIVES, PRETRAINING
    objectives: dict  # name -> ratio, in pretraining; all 1 in fine-tuning
    sets: dict  # task -> its splits, {name: data.Dataset}
    tokenizer: object
    answers: list  # column -> answer, most frequent first
    device: torch.device
    dtype: torch.dtype
    rank: int
    world: int
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


def task_objectives(o, task):
    """The objectives of a downstream task: its own, and for retrieval in two stages also that of the first."""
    return [OBJECTIVE.get(task, task)] + ["itc"] * (task == "retrieval" and o.rerank is not None)


def objectives_of(o, paper):
    """The objectives asked for, {name: ratio}; in pretraining those joined to another one have ratio 0."""
    if o.task != "pretrain":
        return {name: 1 for task in o.tasks for name in task_objectives(o, task)}
    default, joined = paper.PRETRAINING["objectives"], [n for ns in paper.PRETRAINING["joined"].values() for n in ns]
    known = {
        **{n: 1 for n in sorted((MASKED_WORDS | MASKED_REGIONS | PAIRS | {"qa"}) & set(paper.OBJECTIVES))},
        "itc": 2,  # as often as itm, the other objective that sees whole pairs
        **default,
    }
    known |= dict.fromkeys(joined, 0)
    names = o.objectives.split(",") if o.objectives else [*default, *joined]
    for name in names:
        if name not in known:
            raise Stop(f"--objectives: {o.model} has no pretraining objective {name!r}; it has {', '.join(known)}")
    if "wra" in names and "itm" not in names:
        raise Stop("--objectives: wra needs the pairs of itm; write itm,wra")
    if o.rerank and not {"itm", "itc"} <= {*names}:
        raise Stop("--rerank: the first stage needs objective itc, the second itm; write --objectives ...,itm,itc")
    return {name: known[name] for name in names}


def read_data(o, objectives, task, source):
    """The splits of a task: {"train": Dataset, "val": ..., "test": ...}, scenes with "compose" besides, and for
    referring expressions, which have true boxes, with "detected"."""
    names = ["train", "val", "test"] + ["compose"] * (source == "scenes" and task != "pretrain")
    names += ["detected"] * (source == "scenes" and task == "refer")
    task = "caption" if task == "pretrain" and "qa" not in objectives else task  # questions only to be answered
    if dist.is_initialized() and os.environ.get("LOCAL_RANK") != "0":
        dist.barrier()  # the first process of a machine draws and extracts, the others read what it cached
    limits = {"train": o.limit} | dict.fromkeys(names[1:])
    splits = {name: data.load(source, task, name, limit, o.patch, o.grid) for name, limit in limits.items()}
    if dist.is_initialized() and os.environ.get("LOCAL_RANK") == "0":
        dist.barrier()
    if not len(splits["train"]):
        raise Stop(f"{source}: no example of split train for --task {task}")
    return {name: split for name, split in splits.items() if len(split)}


def drop_unfounded(objectives, dataset):
    """Without the objectives that the data have nothing for: region classes need a detector, qa needs answers."""
    fields, why = dataset.store.fields, {}
    lacking = {"mrc": "object_probs", "mrc_kl": "object_probs", "attr": "attributes"}
    for name in objectives:
        if name in lacking and (lacking[name] not in fields or dataset.store.classes is None):
            why[name] = "the regions have no classes"
        if name == "qa" and not any(dataset.answer):
            why[name] = "no text has an answer"
    for name, reason in why.items():
        say(f"data     objective {name} is left out: {reason}")
    if len(why) == len(objectives):
        raise Stop("the data have nothing for any of the objectives; see the README's table of objectives")
    return {name: ratio for name, ratio in objectives.items() if name not in why}


def encode_texts(o, sets, checkpoint):
    """The tokenizer (the checkpoint's, a file's, or trained on the training texts); gives every split its tokens."""
    every = [split for splits in sets.values() for split in splits.values()]
    if checkpoint and checkpoint["tokenizer"]:
        tokenizer = data.tokenizer_from_json(checkpoint["tokenizer"])
    elif checkpoint and not o.vocab:
        raise Stop(f"{o.init}: no tokenizer.json or vocab.txt beside it; give --vocab those word pieces")
    else:
        # scenes: from the texts of all tasks, whatever the task, so that a pretrained model can be given any later
        text = (
            data.load("scenes", "pretrain", "train", o.limit).text + data.scene_texts()
            if "scenes" in o.data.split(",")
            else []
        )
        text += [part for split in every if split.split == "train" and split.name != "scenes" for part in split.parts()]
        tokenizer = data.read_tokenizer(o.vocab) if o.vocab else data.train_tokenizer(text)
    for split in every:
        split.encode(tokenizer, max_length=60)
    return tokenizer


def step_objectives(paper, objectives, rng, done=1.0):
    """What one step trains when the share `done` (0..1) of the run is over: with conditional masking one objective,
    drawn by ratio, and those joined to it; else all, those of the paper's second half only then."""
    if not paper.PRETRAINING["conditional"]:
        late = paper.PRETRAINING.get("second_half", ())
        return [name for name in objectives if done >= 0.5 or name not in late] or list(objectives)
    drawn = [name for name, ratio in objectives.items() if ratio]
    name = rng.choice(drawn, p=np.array([objectives[n] for n in drawn]) / sum(objectives.values()))
    return [str(name), *(n for n in paper.PRETRAINING["joined"].get(name, ()) if n in objectives)]


def stream(o, dataset, slots, skip):
    """Endless index arrays, one a step, in an order that depends on seed and epoch alone. Each holds `slots` forward
    passes, of like lengths, so that no process waits for another's longer sentences; pass s takes every slots-th row.
    `skip`: how many were used before a resume. Stop if there are fewer examples than passes."""
    if len(dataset) < slots:
        raise Stop(f"{len(dataset)} examples are too few for {slots} forward passes in a step")
    for epoch in itertools.count():
        order = data.batches(dataset.lengths(), np.random.default_rng((o.seed, epoch)), size=o.batch_size * slots)
        order = [index for index in order if len(index) >= slots]
        if skip >= len(order):
            skip -= len(order)
            continue
        yield from order[skip:]
        skip = 0


# ---- batches -----------------------------------------------------------------------------------------------------


def make_batch(run, dataset, index, names, rng, false=None, **words):
    """Examples `index` as the objectives `names` need them: pairs mismatched, words masked, regions masked.
    false: the share of false pairs, by default as the paper's file has it; `words`: arguments of data.mask_words in
    place of the run's."""
    if names[0] in DOWNSTREAM:
        return ablate(task_batch(run, dataset, index, names[0], rng), run.o.ablate)
    images, matched = None, None
    if PAIRS & set(names):
        false = run.paper.PRETRAINING["false_pairs"] if false is None else false
        index, images, matched = data.mismatch(dataset, index, rng, false, run.paper.PRETRAINING["mismatch"])
    batch = data.collate(dataset, index, images, answers=run.columns() if run.answers else None)
    if matched is not None:
        batch.matched = matched
    if "qa" in names:
        batch = data.draw_answers(batch, rng)
    if MASKED_WORDS & set(names):
        batch = data.mask_words(batch, run.tokenizer, rng, **(words or {"p": run.o.mask}))
    if MASKED_REGIONS & set(names):
        batch = data.mask_regions(batch, rng, **run.paper.PRETRAINING["region_masking"])
    if matched is not None and not run.paper.PRETRAINING.get("mask_false_pairs", True):
        batch = data.only_true(batch)
    return ablate(batch, run.o.ablate)


def task_batch(run, dataset, index, name, rng):
    """Examples `index` as the objective of a downstream task needs them."""
    if name == "rank":
        index, images = partners(run, dataset, index, rng)
        batch = data.collate(dataset, index.ravel(), images.ravel())  # (B, 1 + negatives) -> rows
        return dataclasses.replace(batch, ids=[dataset.ids[i] for i in index[:, 0]])  # of the examples, not of the rows
    batch = data.collate(dataset, index, answers=run.columns("ve") if name == "ve" else None)
    if name == "nlvr2":
        batch.target = torch.from_numpy(dataset.target[index])
        side = torch.arange(len(batch.text))[:, None] % 2  # 0 the left picture, 1 the right one
        batch.region_types = side.expand(batch.region_mask.shape).contiguous()  # or it could not be pinned
        if getattr(run.model.config, "nlvr2", "") == "triplet":
            batch = data.join_pictures(batch)
    elif name == "vcr":
        batch.segments = text_types(run.paper, batch.segments)
        right = torch.from_numpy(dataset.target[index])
        batch.target = torch.nn.functional.one_hot(right, dataset.group).flatten()  # (B, choices) -> (rows,)
    elif name == "refer":
        batch.target = overlaps(dataset, index, batch)
    elif name == "caption":
        batch = data.next_words(batch)
    return batch


def text_types(paper, segments):
    """The paper's text types of question, answer and reason, which depend on how many segments a row has: (B, T)."""
    table = torch.tensor([[*types, 0, 0][:3] for types in ((0,), *paper.VCR_TYPES)])  # (segments - 1, segment)
    return table[segments.amax(1, keepdim=True), segments]  # (B, 1), (B, T) -> (B, T)


def overlaps(dataset, index, batch):
    """(B, N) overlap (IoU) of each region with the box that is meant; -1 for padding."""
    meant = torch.from_numpy(dataset.target[index]).float()[:, None]  # (B, 4) -> (B, 1, 4)
    return common.iou(batch.boxes, meant).masked_fill(~batch.region_mask, -1.0)


def partners(run, dataset, index, rng):
    """True pairs and false ones for retrieval: texts (B, 1 + K) and pictures (B, 1 + K), the true pair first, then one
    for each of the paper's NEGATIVES, with another picture or another text.

    In the first half of the steps they are drawn at random; in the second half `--mine` are drawn for each and the one
    that the model takes for the best match is kept (UNITER 4.1; ViLBERT mines one of its two texts, from a fixed pool).
    """
    kinds, mine = run.paper.NEGATIVES, run.o.mine if 2 * run.progress["step"] >= run.o.steps else 1
    if (dataset.image == dataset.image[0]).all():
        raise DataError("retrieval needs at least two pictures")
    texts = np.broadcast_to(index[:, None, None], (len(index), len(kinds), mine)).copy()
    other = rng.integers(len(dataset), size=texts.shape)
    while (same := dataset.image[other] == dataset.image[texts]).any():
        other[same] = rng.integers(len(dataset), size=same.sum())
    images = dataset.image[texts]
    for k, kind in enumerate(kinds):
        if kind == "image":
            images[:, k] = dataset.image[other[:, k]]
        else:
            texts[:, k] = other[:, k]
    best = np.zeros(texts.shape[:2], np.int64)  # (B, K)
    if mine > 1:
        run.model.eval()
        with torch.no_grad(), run.autocast():
            batch = ablate(data.collate(dataset, texts.ravel(), images.ravel()), run.o.ablate).to(run.device)
            scores = run.model.heads["rank"](run.model.encode(batch).pooled)  # (B*K*mine, 1)
        run.model.train()
        best = scores.float().cpu().view(texts.shape).argmax(2).numpy()
    texts, images = (np.take_along_axis(x, best[:, :, None], 2)[:, :, 0] for x in (texts, images))
    return np.column_stack([index, texts]), np.column_stack([dataset.image[index], images])


def ablate(batch, what):
    """Takes a modality away: the picture's regions (hidden and zeroed), or every word but [CLS] and [SEP]."""
    if what == "image":
        batch.region_mask = torch.zeros_like(batch.region_mask)
        batch.features, batch.boxes = torch.zeros_like(batch.features), torch.zeros_like(batch.boxes)
    if what == "text":
        last = batch.text_mask.sum(1, keepdim=True) - 1  # (B, 1), where [SEP] stands
        batch.text = torch.cat([batch.text[:, :1], batch.text.gather(1, last)], 1)  # (B, T) -> (B, 2)
        batch.text_mask, batch.segments = torch.ones_like(batch.text, dtype=torch.bool), torch.zeros_like(batch.text)
    return batch


def items(paper, name, batch):
    """How many items the mean of an objective's loss runs over."""
    if name.endswith("_soft") and name.removesuffix("_soft") in MASKED_REGIONS:
        return len(batch.region_index)
    name = name.removesuffix("_soft")
    if name == "itc":
        return len(batch.pair_index)
    if name in MASKED_WORDS or name == "caption":
        return len(batch.word_index)
    if name in paper.PRETRAINING.get("over_all_regions", ()):
        return int(batch.region_mask.sum())
    if name == "qa":
        return int(((batch.answer_labels >= 0) & (batch.matched == 1)).sum())
    return len(batch.region_index) if name in MASKED_REGIONS else len(batch.text)


# ---- model -----------------------------------------------------------------------------------------------------


def heads_of(paper, objectives):
    """The heads that these objectives use: mrc_kl shares mrc's, nce mrfr's, caption mlm's, wra needs none."""
    names = [{"mrc_kl": "mrc", "nce": "mrfr", "caption": "mlm"}.get(name, name) for name in objectives]
    return tuple(dict.fromkeys(name for name in names if name in paper.HEADS))


def build(run, checkpoint):
    """The model: from a checkpoint's config with this run's heads, or from the preset and the data's own sizes."""
    o, paper, store = run.o, run.paper, run.splits["train"].store
    known, words = {"feature_size": store.width}, run.tokenizer.get_vocab_size()
    known |= {"classes": store.classes} if store.classes else {}
    known |= {"attributes": 1 + int(store.fields["attributes"].max())} if "attributes" in store.fields else {}
    if checkpoint is None:
        sizes = {**paper.PRESETS[o.size], "vocab_size": words, "classes": 2, "attributes": 1, **known}
    elif checkpoint["model"] != o.model:
        raise Stop(f"{o.init}: a checkpoint of {checkpoint['model']} does not fit --model {o.model}")
    else:
        sizes = {"classes": 2, "attributes": 1, **checkpoint["config"]}
        if sizes.get("feature_size", store.width) != store.width and not (o.partial or o.fresh):
            raise Stop(
                f"{o.init}: trained on features of width {sizes['feature_size']}, {o.data} has {store.width}; "
                "use the same kind of features, for pixels the same --patch, or --partial for a new projection"
            )
        if words > sizes["vocab_size"]:
            raise Stop(f"{o.init}: has {sizes['vocab_size']} words, the tokenizer {words}; give --vocab its own pieces")
        sizes |= known
    if o.model == "uniter":
        sizes["types"] = max(sizes.get("types", 2), *(TYPES.get(task, 2) for task in o.tasks))
    sizes |= {"heads": heads_of(paper, run.objectives), "answers": max(1, len(run.answers))}
    if run.teacher and "hidden" in o.distill.split(","):
        theirs = run.teacher.config
        sizes["heads"] = (*sizes["heads"], "hidden")
        sizes["teacher_widths"] = (theirs.hidden, getattr(theirs, "visual_hidden", theirs.hidden))
    sizes |= read_sizes(o, paper)
    torch.manual_seed(o.seed)
    try:
        model = getattr(paper, PAPERS[o.model][1])(paper.Config(**sizes))
    except (TypeError, ValueError) as error:
        raise Stop(f"{o.init or o.model} {' '.join(o.config)}: no model of these sizes: {error}") from None
    if checkpoint and o.fresh:
        say(f"init     {o.init}: its sizes and tokenizer only; all weights at random")
    elif checkpoint:
        state, report = fitting(o, model.state_dict(), checkpoint, run.answers)
        model.load_state_dict(state)
        say(report)
    return model


def read_sizes(o, paper):
    """--config as {name: value}. Stop for a name that the model's Config lacks or that the data decide, or for a value
    of another type."""
    sizes, known = {}, {f.name: f.default for f in dataclasses.fields(paper.Config) if f.name not in BY_DATA}
    for text in o.config:
        name, _, value = text.partition("=")
        if name not in known:
            raise Stop(f"--config {text}: {o.model} has no {name!r} to choose; it has {', '.join(known)}")
        if value not in WORDS.get(name, (value,)):
            raise Stop(f"--config {text}: choose from {', '.join(WORDS[name])}")
        try:
            value = value if name in WORDS else json.loads(value)
        except ValueError:
            raise Stop(f"--config {text}: write NAME=JSON, as layers=1 or connections=[[0,1]]") from None
        if isinstance(value, list):
            value = tuple(value)
        if type(value) is int and type(known[name]) is float:
            value = float(value)
        if type(value) is not type(known[name]) or (type(value) is int and value < min(1, known[name])):
            raise Stop(f"--config {text}: {name} is something like {known[name]}")
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


def fitting(o, own, checkpoint, answers):
    """A full state for a model whose initial one is `own`: the file's tensors where name and shape agree; and a report,
    five lines on what was loaded, resized, left at random and ignored.

    DataError if anything but a head would stay at random, save what BERT has nothing for (all but the paper's
    FROM_BERT) or what --partial permits. A head is loaded whole or not at all; an answer head for the same list of
    answers only, as its rows mean nothing under another one, but LXMERT's moves row by row.
    """
    paper, state, ignored, resized = PAPERS[o.model][0], checkpoint["state"], [], []
    types, kind = "text_embedding.types.weight", checkpoint.get("kind")
    try:
        if kind:
            names = [*own, *(name.replace("heads.vqa.", "heads.qa.") for name in own)]
            if kind != "BERT":
                names += [name.replace("heads.rank.", "heads.itm.") for name in own]
            state, ignored = paper.from_official(state, names)
        if o.model == "lxmert" and checkpoint["answers"]:
            before = {id(tensor) for tensor in state.values()}
            state = lxmert.transfer_answer_head(state, own, checkpoint["answers"], answers)
            resized = [name for name in state if id(state[name]) not in before]
        elif checkpoint["answers"] != answers:
            ignored += [name for name in state if name.startswith(ANSWER_HEADS)]
            state = {name: tensor for name, tensor in state.items() if not name.startswith(ANSWER_HEADS)}
        if o.model == "uniter" and types in state and len(state[types]) < len(own[types]):
            table = state[types]
            if "nlvr2" in o.tasks and len(table) == 2:  # the second picture's type starts as the picture's
                table = uniter.widen_types(table, 3, copy=1)
            state = {**state, types: uniter.widen_types(table, len(own[types]), copy=0)}  # VCR's as the text's
            resized.append(types)
        if "heads.rank.weight" in own and "heads.rank.weight" not in state and "heads.itm.weight" in state:
            # the log odds of a match; official UNITER takes row 1 alone (`rank_from_itm`), which ranks a bit otherwise
            for name in ("weight", "bias"):
                match = state[f"heads.itm.{name}"]
                state = {**state, f"heads.rank.{name}": match[1:] - match[:1]}  # (2, C) -> (1, C), (2,) -> (1,)
    except (IndexError, RuntimeError, TypeError, ValueError) as error:
        raise DataError(f"{o.init}: {str(error).splitlines()[0]}") from None
    loaded = {name for name in own if name in state and state[name].shape == own[name].shape}
    torn = {part(name) for name in set(own) - loaded if name.startswith("heads.")}
    loaded = {name for name in loaded if part(name) not in torn}
    fresh, ignored = sorted(set(own) - loaded), ignored + [name for name in state if name not in loaded]
    lost = [n for n in fresh if not n.startswith("heads.") and n.startswith(paper.FROM_BERT if kind == "BERT" else "")]
    if lost and not o.partial:
        raise DataError(
            f"{o.init}: {len(lost)} tensors of the trunk are missing or of another shape, the first is {lost[0]}; "
            "--partial leaves them at random"
        )
    report = [f"init     {o.init}: {f'weights of {kind}' if kind else 'a checkpoint'}"]
    for what, names in {"loaded": loaded, "resized": resized, "at random": fresh, "ignored": ignored}.items():
        counts = Counter(map(part, sorted(names)))
        parts = [f"{name} ({n})" for name, n in counts.items()]
        report.append(f"         {what} {len(names)}: {', '.join(parts[:8]) or 'none'}{', ...' * (len(parts) > 8)}")
    return {name: state[name] if name in loaded else own[name] for name in own}, "\n".join(report)


def part(name):
    """What a parameter belongs to: "layers", "heads.vqa"; of official names "cls.predictions",
    "bert.encoder.layer.9"."""
    pieces = name.split(".")
    trunk = pieces[0].endswith(("embedding", "layers", "connections", "pooler"))
    return ".".join(pieces[: 1 if trunk else 4 if ".encoder." in name else 2])


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


def default_rate(paper, width, task):
    """Peak learning rate of a model so wide: the papers' for base and large, more for the narrow ones of --size tiny. By
    the width, not by --size, as --init may bring any. ViLBERT and LXMERT pretrain at 1e-4, about twice the rate at
    which they fine-tune."""
    rate = 1e-3 if width <= 256 else 5e-5 if width < 1024 else 3e-5
    return rate * (paper.PRETRAINING["rate"] if task == "pretrain" else 1.0)


def set_rate(optimizer, step, rate):
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
    seen, names = names, names + distilled(run, names)
    counts = [[items(run.paper, name, batch) for name in names] for batch in batches]
    totals = total([sum(column) for column in zip(*counts, strict=True)]).tolist()
    losses = {name: torch.zeros((), device=run.device) for name in names}
    for batch, count in zip(batches, counts, strict=True):
        with run.autocast():
            batch = batch.to(run.device)
            parts = with_teacher(run, batch, seen) if run.teacher else run.model(batch, seen)
        counted = zip(names, count, totals, strict=True)
        shares = {name: (1 if name in run.paper.SUMMED else n) / max(1.0, t) for name, n, t in counted}
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


def read_teacher(run, checkpoint):
    """Sets run.teacher, in eval mode, without gradients, from its checkpoint; it may be another of the three models.

    Stop if it has seen other features."""
    o = run.o
    run.teacher_paper, name = PAPERS[checkpoint["model"]]
    config = run.teacher_paper.Config(**checkpoint["config"])
    width = run.splits["train"].store.width
    if config.feature_size != width:
        raise Stop(f"{o.teacher}: trained on features of width {config.feature_size}, {o.data} has {width}")
    run.teacher = getattr(run.teacher_paper, name)(config).to(run.device).eval().requires_grad_(False)
    run.teacher.load_state_dict(checkpoint["state"])


def match_teacher(run, checkpoint):
    """Sets run.soft, the objectives whose scores the teacher has too: those over classes, choices or regions.

    Says which are left out. Stop where it cannot read this run's batches, or where nothing is left."""
    o, why = run.o, {}
    own, their, config = run.paper, run.teacher_paper, run.teacher.config
    triplets = {getattr(c, "nlvr2", "") == "triplet" for c in (run.model.config, config)}  # two pictures in one row
    unlike = {"vcr": own.VCR_TYPES != their.VCR_TYPES, "rank": own.NEGATIVES != their.NEGATIVES}
    unlike["nlvr2"] = len(triplets) > 1
    for name in run.objectives:
        head = heads_of(their, [name])
        if unlike.get(name):
            raise Stop(f"{o.teacher}: reads the rows of {name} in another way than {o.model}; take one that agrees")
        if checkpoint["model"] == "uniter" and config.types < TYPES.get(name, 2):
            raise Stop(f"{o.teacher}: has too few text types for {name}; train it for --task {o.task} first")
        if name in ("wra", "nce"):
            why[name] = "it has no scores of classes"
        elif not head or not {*head} <= {*config.heads} or (name == "caption" and name not in checkpoint["task"]):
            why[name] = "the teacher was not trained for it"
        elif name in ("mrc", "mrc_kl") and (checkpoint["model"] == "lxmert") != (o.model == "lxmert"):
            why[name] = "LXMERT's region classes have no background"
    run.soft = tuple(name for name in run.objectives if name not in why)
    wanted = o.distill.split(",")
    if "caption" in run.objectives and wanted != ["logits"]:
        raise Stop("--distill: captions are read from left to right, which records no attention or states; use logits")
    if "logits" in wanted and not run.soft:
        raise Stop(f"{o.teacher}: no scores to learn from: " + "; ".join(f"{n}: {reason}" for n, reason in why.items()))
    for name, reason in why.items() if "logits" in wanted else ():
        say(f"teacher  scores of {name} are not distilled: {reason}")


def distilled(run, names):
    """The losses that the teacher adds to these objectives': NAME_soft for scores, and those of DISTILL."""
    if run.teacher is None:
        return []
    wanted = run.o.distill.split(",")
    soft = [f"{name}_soft" for name in names if name in run.soft and "logits" in wanted]
    return soft + [name for part in wanted for name in DISTILL[part]]


def stacks(recorded):
    """Recorded maps or states {"cross.0.text": x, ...} as {"cross.text": [x of layer 0, x of layer 1, ...], ...}."""
    kinds = {}
    for name, x in recorded.items():
        kinds.setdefault(".".join(part for part in name.split(".") if not part.isdigit()), []).append(x)
    return kinds


def layer_pairs(student, teacher):
    """(kind, student's layer, teacher's layer) of every kind that both have, by `common.layer_map`."""
    student, teacher = stacks(student), stacks(teacher)
    for kind in student:
        if kind in teacher:
            for own, i in zip(student[kind], common.layer_map(len(student[kind]), len(teacher[kind])), strict=True):
                yield kind, own, teacher[kind][i]


def real(batch, side, length):
    """(B, length) bool, True = real, for positions of "text", of "regions", or both. ViLBERT's sequences begin with
    one more position, the whole image."""
    masks = {"text": batch.text_mask, "regions": batch.region_mask}
    mask = masks[side] if side in masks else torch.cat([batch.text_mask, batch.region_mask], 1)
    return torch.nn.functional.pad(mask, (length - mask.shape[1], 0), value=True)


def with_teacher(run, batch, names):
    """The model's {objective: (loss, scores)}, and beside them the losses of `distilled`, each with None.

    Layers that both have are matched by `common.layer_map`; two architectures without a kind of map in common share no
    attention, and where no kind of state is common, the last states of words and regions are compared.
    """
    wanted = run.o.distill.split(",")
    record = wanted != ["logits"]
    alone = not record and {*names} <= {"itc", "caption"}  # they encode for themselves
    student = None if alone else run.model.encode(batch, record=record)
    parts = {name: run.paper.OBJECTIVES[name](run.model, student, batch) for name in names}
    with torch.no_grad():
        teacher = None if alone else run.teacher.encode(batch, record=record)
        theirs = {n: run.teacher_paper.OBJECTIVES[n](run.teacher, teacher, batch)[1] for n in names if n in run.soft}
    if "logits" in wanted:
        for name, scores in theirs.items():
            pair = parts[name][1], scores
            if name == "mrfr":  # features are no classes
                pair = [x.flatten() for x in pair]
            if name in ("vcr", "rank"):  # (rows,) -> (groups, rows of one): the classes are the choices
                pair = [x.view(len(batch.ids), -1) for x in pair]
            parts[f"{name}_soft"] = common.soft_label_loss(*pair), None
    if "attention" in wanted:
        losses = []
        for kind, own, other in layer_pairs(student.maps, teacher.maps):
            asks, _, answers = kind.rsplit(".", 1)[-1].partition("_to_")
            t, s = (min(a, b) for a, b in zip(own.shape[2:], other.shape[2:], strict=True))
            own, other = own[:, :, -t:, -s:], other[:, :, -t:, -s:]  # without ViLBERT's whole image, if one lacks it
            try:
                losses.append(common.attention_loss(own, other, real(batch, asks, t), real(batch, answers or asks, s)))
            except ValueError as error:  # numbers of heads
                raise Stop(f"--distill attention: {error}; choose others by --config") from None
        if not losses:
            raise Stop(f"--distill attention: no map of {run.o.model} is one of {run.o.teacher}; use logits,hidden")
        for name, values in zip(DISTILL["attention"], zip(*losses, strict=True), strict=True):
            parts[name] = sum(values) / len(values), None
    if "hidden" in wanted:
        pairs = list(layer_pairs(student.states, teacher.states))
        pairs = pairs or [("text", student.text, teacher.text), ("regions", student.regions, teacher.regions)]
        losses = []
        for kind, own, other in pairs:
            own = run.model.heads["hidden"]["regions" if "regions" in kind else "text"](own)
            s = min(own.shape[1], other.shape[1])
            side = next((side for side in ("text", "regions") if side in kind), "both")
            losses.append(common.hidden_loss(own[:, -s:], other[:, -s:], real(batch, side, s)))
        parts["hidden"] = sum(losses) / len(losses), None
    return parts


# ---- evaluation --------------------------------------------------------------------------------------------------


def evaluate(run, split):
    """(metrics, chance) of the run's tasks on a split, the model in eval mode. Accuracies and recalls are in 0..1; of
    several tasks each metric's name begins with its task's."""
    run.model.eval()
    metrics, chance = {}, {}
    for task, splits in run.sets.items():
        if split in splits:
            with torch.inference_mode():
                found = evaluate_task(run, task, splits[split])
            for all_of, some in zip((metrics, chance), found, strict=True):
                all_of |= {(f"{task}_" if len(run.sets) > 1 else "") + name: value for name, value in some.items()}
    return metrics, chance


def evaluate_task(run, task, dataset):
    """(metrics, chance) of one task on one of its splits."""
    if task == "vqa":
        return evaluate_vqa(run, dataset)
    if task == "ve":
        return evaluate_vqa(run, dataset, "ve", list(data.ENTAILMENT))
    if task in ("nlvr2", "vcr", "refer"):
        return evaluate_choice(run, task, dataset)
    if task == "pretrain":
        return evaluate_pretraining(run, dataset)
    index = tested(run, task, dataset)
    if task == "caption":
        return evaluate_captions(run, dataset, index)
    metrics = retrieval(run, dataset, index, "rank")
    chance = recall_chance(metrics, len(index))
    metrics["mean_recall"], chance["mean_recall"] = (float(np.mean([*m.values()])) for m in (metrics, chance))
    return metrics, chance


def tested(run, task, dataset):
    """Numbers of the examples that a task is tested on: retrieval and captions on one of each picture of --pool, on val
    of a hundred; the others on all."""
    if task not in ("retrieval", "caption"):
        return np.arange(len(dataset))
    most = 100 if dataset.split == "val" else run.o.pool
    most = min(most, 1000) if task == "retrieval" else most  # a full matrix of more takes hours
    return first_captions(dataset)[:most]


def scores_of(run, batch, name):
    """(loss, scores) of one objective on a batch."""
    with run.autocast():
        loss, scores = run.model(batch.to(run.device), [name])[name]
    return loss.float(), scores.float().cpu()


def parts(run, dataset, index):
    """The examples `index` in batches of like lengths; each process takes its own batches."""
    for part in data.batches(dataset.lengths()[index], size=256, rank=run.rank, world=run.world):
        yield index[part]


def first_captions(dataset):
    """The first caption of each picture, or text of any kind where none is a caption: numbers of examples."""
    kinds = np.array(dataset.kind)
    captions = np.flatnonzero(kinds == "caption") if "caption" in kinds else np.arange(len(dataset))
    return captions[np.unique(dataset.image[captions], return_index=True)[1]]


def evaluate_pretraining(run, dataset, examples=1000, candidates=100):
    """Each objective on held-out captions, under a fixed seed, and zero-shot retrieval among `candidates` pictures.

    Accuracies are over masked words, masked regions or pairs. mlm_content masks one word, of every caption of these
    pictures, that only the picture tells: a colour, shape, size, number or direction. Beside each: what the most
    frequent label would get.
    """
    kinds, names = np.array(dataset.kind), list(run.objectives)
    captions = first_captions(dataset)[:examples]
    every = np.flatnonzero((kinds == "caption") & np.isin(dataset.image, dataset.image[captions]))
    questions = np.flatnonzero(kinds != "caption")[:examples]
    content = torch.zeros(run.tokenizer.get_vocab_size(), dtype=torch.bool)
    content[[i for w in data.CONTENT_WORDS if (i := run.tokenizer.token_to_id(w)) is not None]] = True
    sums = {}
    for name in [*names, *["mlm_content"] * ("mlm" in names and run.o.data == "scenes")]:
        for index in parts(run, dataset, {"qa": questions, "mlm_content": every}.get(name, captions)):
            rng = np.random.default_rng((1, int(index[0])))
            if name == "mlm_content":
                batch = make_batch(run, dataset, index, ["mlm"], rng, only=content, one=True)
            else:
                # half false whatever training has, so that chance is the same for all models
                batch = make_batch(run, dataset, index, [name], rng, false=0.5)
            count(run.paper, sums, name, batch, *scores_of(run, batch, name.removesuffix("_content")))
    metrics, chance = {}, {}
    gathered = [sums] * run.world
    if dist.is_initialized():
        dist.all_gather_object(gathered, sums)  # a process may have had no batch of a small split
    for name in dict.fromkeys(name for sums in gathered for name in sums):
        loss, n, hits, *labels = map(sum, itertools.zip_longest(*(s.get(name, []) for s in gathered), fillvalue=0))
        metrics[f"{name}_loss"] = loss / max(1, n)
        if seen := sum(labels):
            metrics[f"{name}_accuracy"], chance[f"{name}_accuracy"] = hits / seen, max(labels) / seen
    if "itm" in names:
        recalls = retrieval(run, dataset, captions[:candidates])
        metrics, chance = metrics | recalls, chance | recall_chance(recalls, len(captions[:candidates]))
    if "itc" in names:
        dots = dot_products(run, dataset, captions[:candidates], dataset.image[captions[:candidates]])
        recalls = common.recall_at(dots, torch.arange(len(dots)))
        recalls = {f"itc_{name}": value for name, value in recalls.items()}
        metrics, chance = metrics | recalls, chance | recall_chance(recalls, len(dots))
    return metrics, chance


def recall_chance(recalls, pictures):
    """What guessing among so many pictures gets of each recall; its name ends in its rank: {"..._r5": 5 / pictures}."""
    return {name: min(1.0, int(name.rsplit("r", 1)[1]) / pictures) for name in recalls}


def count(paper, sums, name, batch, loss, scores):
    """Adds a batch to sums[name]: [loss x items, items, hits, frequency of each label ...]."""
    objective = name.removesuffix("_content")
    labels, n = None, items(paper, objective, batch)
    if objective == "mlm":
        labels = batch.word_labels
    elif objective in ("mrc", "mrc_kl"):
        labels = common.at(batch.object_probs, batch.region_index)[:, 1:].argmax(-1)
        labels = labels + scores.shape[-1] - batch.object_probs.shape[-1] + 1  # LXMERT's head has no background class
    elif objective == "attr":
        labels = batch.attributes.flatten()[batch.region_index]
    elif objective == "itm":
        labels = batch.matched
    elif objective == "itc":
        labels = torch.arange(len(scores))  # which text of the batch is the picture's own
    elif objective == "qa":
        labels, scores = batch.answer_labels[batch.answer_labels >= 0], scores[batch.answer_labels >= 0]
    values = [float(loss) * n, n, 0]
    if labels is not None:
        values[2:] = [
            int((scores.argmax(-1) == labels).sum()),
            *np.bincount(labels.numpy(), minlength=scores.shape[-1]),
        ]
    sums[name] = [a + b for a, b in itertools.zip_longest(sums.get(name, []), values, fillvalue=0)]


def evaluate_vqa(run, dataset, name="vqa", answers=None):
    """Accuracy: the soft score of the answer with the highest logit, mean over questions, also for each kind.
    Entailment is the same with its own three answers.

    Chance: to each kind of question the training split's most frequent answer; of `answers`, if given, always the most
    frequent here.
    """
    hits, kinds = np.zeros(len(dataset)), np.array(dataset.kind)
    for index in parts(run, dataset, np.arange(len(dataset))):
        best = scores_of(run, make_batch(run, dataset, index, [name], None), name)[1].argmax(-1).tolist()
        known = answers or run.answers
        hits[index] = [dataset.answer[i].get(known[b], 0.0) for i, b in zip(index, best, strict=True)]
    if answers:
        guess = max(([answer.get(a, 0.0) for answer in dataset.answer] for a in answers), key=sum)
    else:
        usual = usual_answers(run.sets[name]["train"])
        guess = [answer.get(usual.get(kind), 0.0) for kind, answer in zip(dataset.kind, dataset.answer, strict=True)]
    return by_kind(total(hits).numpy(), np.array(guess), kinds)


def usual_answers(dataset):
    """{kind of question: its most frequent answer}, equals by text."""
    counts = {}
    for kind, answers in zip(dataset.kind, dataset.answer, strict=True):
        counts.setdefault(kind, Counter()).update(answers.keys())
    return {kind: min(count, key=lambda a: (-count[a], a)) for kind, count in counts.items() if count}


def by_kind(hits, guess, kinds, name="accuracy"):
    """Means of `hits` and of `guess`, what guessing would get, (E,) each: over all, and over each of several kinds."""
    groups = {name: np.ones(len(kinds), bool)}
    groups |= {f"{name}_{kind}": kinds == kind for kind in sorted(set(kinds)) if len(set(kinds)) > 1}
    return {k: hits[g].mean() for k, g in groups.items()}, {k: guess[g].mean() for k, g in groups.items()}


def evaluate_choice(run, task, dataset):
    """Accuracies of the tasks that choose: of true and false (nlvr2), of several texts (vcr), of regions (refer).

    vcr: the answer (Q-A), the reason given the right answer (QA-R), and both (Q-AR). refer: the best-scored region
    overlaps the box meant by more than one half; `reachable` is the share where some region does.
    Chance: the more frequent truth of each kind of statement; one choice of all; the share of the regions that would be right.
    """
    right, guess, reachable = np.zeros((3, len(dataset)))
    for index in parts(run, dataset, np.arange(len(dataset))):
        scores = scores_of(run, make_batch(run, dataset, index, [task], None), task)[1]
        if task == "refer":
            clean = data.collate(dataset, index)  # with the boxes that --ablate takes away
            hit = overlaps(dataset, index, clean) > 0.5  # (B, N)
            right[index] = share_right(scores.masked_fill(~clean.region_mask, -math.inf), hit)
            guess[index], reachable[index] = hit.sum(1) / clean.region_mask.sum(1), hit.any(1)
        else:
            scores = scores.view(len(index), -1)  # (B, 2), or (B * choices,) -> (B, choices)
            truth = torch.from_numpy(dataset.target[index]).long()
            right[index] = share_right(scores, torch.nn.functional.one_hot(truth, scores.shape[1]).bool())
    right, guess, reachable = (total(x).numpy() for x in (right, guess, reachable))
    kinds = np.array(dataset.kind)
    if task == "refer":
        metrics, chance = by_kind(right, guess, kinds)
        return metrics | {"reachable": reachable.mean()}, chance
    if task == "nlvr2":
        true = {kind: dataset.target[kinds == kind].mean() for kind in set(dataset.kind)}
        usual = {kind: max(share, 1 - share) for kind, share in true.items()}
        return by_kind(right, np.array([usual[kind] for kind in kinds]), kinds)
    metrics, chance = {}, {}
    for kind, name in (("answer", "q_a"), ("reason", "qa_r")):
        if (kinds == kind).any():
            metrics[f"{name}_accuracy"], chance[f"{name}_accuracy"] = right[kinds == kind].mean(), 1 / dataset.group
    answered = {i: hit for i, hit, kind in zip(dataset.ids, right, kinds, strict=True) if kind == "answer"}
    both = [hit * answered[i] for i, hit, kind in zip(dataset.ids, right, kinds, strict=True) if kind == "reason"]
    if both:
        metrics["q_ar_accuracy"], chance["q_ar_accuracy"] = float(np.mean(both)), 1 / dataset.group**2
    return metrics, chance


def share_right(scores, hit):
    """Which part of the best-scored candidates is right: 0 or 1, but where several share the best score, as they do without
    picture or words, their mean. scores (B, K), hit (B, K) bool -> (B,)"""
    best = scores == scores.amax(1, keepdim=True)
    return (best & hit).sum(1) / best.sum(1).clamp(min=1)


def evaluate_captions(run, dataset, index):
    """Perplexity of the captions, exp of their mean loss a piece, and BLEU-4 of the generated ones, `index` naming one
    example of each picture, against all captions of it. Chance: the caption of another picture."""
    pictures, loss, pieces, own = set(dataset.image[index].tolist()), 0.0, 0, {}
    examples = np.array([i for i, image in enumerate(dataset.image.tolist()) if image in pictures])
    for part in parts(run, dataset, examples):
        batch = make_batch(run, dataset, part, ["caption"], None)
        loss += float(scores_of(run, batch, "caption")[0]) * len(batch.word_index)
        pieces += len(batch.word_index)
    loss, pieces = total([loss, pieces]).tolist()
    first, last = (run.tokenizer.token_to_id(name) for name in ("[CLS]", "[SEP]"))
    beams = run.o.beams if dataset.split != "val" else 1
    for part in parts(run, dataset, index):
        batch = ablate(data.collate(dataset, part), run.o.ablate).to(run.device)
        with run.autocast():
            found = common.generate(run.model, batch, first, last, beams)
        own |= {int(dataset.image[i]): run.tokenizer.decode(ids).split() for i, ids in zip(part, found, strict=True)}
    gathered = [own] * run.world
    if dist.is_initialized():
        dist.all_gather_object(gathered, own)
    own, true = {image: words for some in gathered for image, words in some.items()}, {}
    for i in examples:
        ids = dataset.tokens[dataset.offsets[i] + 1 : dataset.offsets[i + 1] - 1].tolist()  # without [CLS] and [SEP]
        true.setdefault(int(dataset.image[i]), []).append(run.tokenizer.decode(ids).split())
    order = sorted(own)
    said, references = [own[image] for image in order], [true[image] for image in order]
    strangers = [true[image][0] for image in [*order[1:], order[0]]]
    metrics = {"perplexity": math.exp(loss / max(1, pieces)), "bleu4": common.bleu(said, references)}
    return metrics, {"bleu4": common.bleu(strangers, references)} if len(order) > 1 else {}


# ---- retrieval ---------------------------------------------------------------------------------------------------


def pair_scores(model, pooled, head):
    """How well pairs match: the log odds of head "itm", or the one score of "rank". (rows, C) -> (rows,) float64"""
    logits = model.heads[head](pooled).cpu().double()  # (rows, 2) or (rows, 1); Apple's GPUs have no float64
    return logits[:, 1] - logits[:, 0] if head == "itm" else logits[:, 0]


def retrieval(run, dataset, index, head="itm"):
    """Recall at 1, 5 and 10, both ways: every text of `index` with every picture, ranked by `pair_scores`. What
    the model computes of each text and each picture alone is computed once."""
    n, batch = len(index), ablate(data.collate(dataset, index), run.o.ablate).to(run.device)
    scores = torch.zeros(n, n, dtype=torch.float64)
    with run.autocast():
        words, areas = run.model.unimodal(batch)
        for row in range(run.rank, n, run.world):
            text = {name: getattr(batch, name)[row].expand(n, -1) for name in ("text", "text_mask", "segments")}
            pairs = dataclasses.replace(batch, **text)
            pooled = run.model.encode(pairs, given=(words[row].expand(n, -1, -1), areas)).pooled  # (n, C)
            scores[row] = pair_scores(run.model, pooled, head)
    return common.recall_at(total(scores), torch.arange(n))


def dot_products(run, dataset, texts, pictures):
    """Cosines (texts, pictures) of the unimodal vectors of itc: examples `texts`, store rows `pictures`. Each text and
    each picture is encoded once."""
    head, sides = run.model.heads["itc"], []
    for index, side in ((texts, "text"), (pictures, "image")):
        lengths = np.diff(dataset.offsets if side == "text" else dataset.store.offsets)[index]
        vectors = torch.zeros(len(index), head.project_text.out_features, dtype=torch.float64)
        for part in data.batches(lengths, size=256, rank=run.rank, world=run.world):
            rows = (index[part], None) if side == "text" else (np.full(len(part), texts[0]), index[part])
            batch = ablate(data.collate(dataset, *rows), run.o.ablate).to(run.device)
            with run.autocast():
                if side == "text":
                    found = head.text(run.model.encode(batch, regions=False).text)
                else:
                    found = head.image(run.model.encode(batch, text=False).regions, batch.region_mask)
            vectors[part] = found.cpu().double()
        sides.append(total(vectors))
    return sides[0] @ sides[1].T  # (texts, E) @ (E, pictures)


def matching_scores(run, dataset, texts, pictures, head="itm"):
    """`pair_scores` of text i with picture i, (P,). texts: examples, pictures: store rows, (P,) each."""
    scores = torch.zeros(len(texts), dtype=torch.float64)
    lengths = np.stack([np.diff(dataset.offsets)[texts], np.diff(dataset.store.offsets)[pictures]], 1)
    for part in data.batches(lengths, size=256, rank=run.rank, world=run.world):
        batch = ablate(data.collate(dataset, texts[part], pictures[part]), run.o.ablate).to(run.device)
        with run.autocast():
            scores[part] = pair_scores(run.model, run.model.encode(batch).pooled, head)
    return total(scores)


def two_stage(run, dataset, texts, pictures, k, head="itm"):
    """Recalls of retrieval in two stages: dot products rank everything, then matching scores rank the best k anew.

    texts: examples (n,); pictures: store rows (m,), each text's own among them. Every text's k best pictures and every
    picture's k best texts are scored together, once where both want a pair; the others stay behind, by dot product.
    """
    dots = dot_products(run, dataset, texts, pictures)  # (n, m)
    nothing = torch.zeros_like(dots, dtype=torch.bool)
    best = [nothing.scatter(axis, dots.topk(min(k, dots.shape[axis]), axis)[1], True) for axis in (0, 1)]
    near = {"text_to_image": best[1], "image_to_text": best[0]}  # (n, m) bool, True = among the best k
    rows, columns = (near["text_to_image"] | near["image_to_text"]).numpy().nonzero()  # (P,) each
    fine = torch.zeros_like(dots)
    fine[rows, columns] = matching_scores(run, dataset, texts[rows], pictures[columns], head)
    fine = fine - fine.min() + 2.0  # above every cosine
    place = {picture: i for i, picture in enumerate(pictures.tolist())}
    truth = torch.tensor([place[picture] for picture in dataset.image[texts].tolist()])
    recalls = {}
    for way, mask in near.items():
        found = common.recall_at(torch.where(mask, fine, dots), truth)
        recalls |= {name: value for name, value in found.items() if name.startswith(way)}
    return recalls


def compare_stages(run, dataset, head, most=1000, measured=300):
    """--rerank: recall and seconds of the full matrix of matching scores, of dot products, and of the two stages, as
    result.json has them and as lines to print.

    Among --pool pictures with a caption each; scenes are drawn until there are enough. Beyond `most` of them the full
    matrix is not computed: its time is extrapolated from `measured` x `measured` pairs, and so called.
    """
    o = run.o
    if dataset.name == "scenes" and o.pool > len(np.unique(dataset.image)):
        dataset = data.scenes(dataset.split, "caption", count=o.pool * 5 // 4).encode(run.tokenizer, max_length=60)
    texts = first_captions(dataset)[: o.pool]
    pictures, n, result = dataset.image[texts], len(texts), {}
    whole = n <= most
    run.model.eval()
    with torch.inference_mode():
        dot_products(run, dataset, texts[:64], pictures[:64])  # the first pass of a process is slower
        start = time.perf_counter()
        recalls = retrieval(run, dataset, texts if whole else texts[:measured], head)
        seconds = (time.perf_counter() - start) * (1.0 if whole else (n / measured) ** 2)
        rows = {"full": (recalls if whole else {}, seconds)}
        start = time.perf_counter()
        recalls = common.recall_at(dot_products(run, dataset, texts, pictures), torch.arange(n))
        rows["dot"] = recalls, time.perf_counter() - start
        start = time.perf_counter()
        recalls = two_stage(run, dataset, texts, pictures, o.rerank, head)
        rows["two_stage"] = recalls, time.perf_counter() - start
    lines = [f"\n{o.model}, retrieval among {n} x {n}, best {o.rerank} re-ranked"]
    for name, (recalls, seconds) in rows.items():
        how = "" if whole or name != "full" else f" (extrapolated from {measured} x {measured})"
        shown = "  ".join(f"{key} {100 * value:.1f}%" for key, value in recalls.items())
        lines.append(f"  {name:10s} {seconds:9.1f} s{how}  {shown}".rstrip())
        result |= {f"{name}_{key}": round(value, 5) for key, value in recalls.items()}
        result[f"{name}_seconds"] = round(seconds, 2)
    return {"pool": n, "rerank": o.rerank, "full_extrapolated": not whole, **result}, "\n".join(lines)


# ---- loop ------------------------------------------------------------------------------------------------------


def train(o):
    """One run: reads the data, builds or restores the model, trains, evaluates. Returns what goes to result.json."""
    paper, (rank, world), last = PAPERS[o.model][0], processes(), o.out / "checkpoint.pt"
    device = pick_device(o.device)
    if o.resume and not last.is_file():
        raise Stop(f"--resume: there is no {last}; start without --resume, or give the --out of the stopped run")
    o.init, o.fresh = (last, False) if o.resume else (o.init, o.fresh)
    checkpoint = load_checkpoint(last) if o.resume else load_weights(o) if o.init else None
    teacher = load_checkpoint(o.teacher) if o.teacher else None
    if checkpoint and teacher and checkpoint["tokenizer"] != teacher["tokenizer"]:
        raise Stop(f"{o.teacher}: reads other word pieces than {o.init}; start without --init, or from its own start")
    objectives = objectives_of(o, paper)
    sources = o.data.split(",") * (len(o.tasks) if "," not in o.data else 1)
    sets = {task: read_data(o, objectives, task, source) for task, source in zip(o.tasks, sources, strict=True)}
    if len(widths := {splits["train"].store.width for splits in sets.values()}) > 1:
        raise Stop(
            f"--data: features of {' and '.join(map(str, sorted(widths)))} numbers; tasks trained together need one --patch"
        )
    asked = sets.get("vqa") or sets.get("pretrain")
    objectives = drop_unfounded(objectives, asked["train"]) if o.task == "pretrain" else objectives
    tokenizer = encode_texts(o, sets, checkpoint or teacher)
    answers = data.answer_list(asked["train"]) if {"vqa", "qa"} & set(objectives) else []
    answers = teacher["answers"] if teacher and teacher["answers"] and answers else answers
    dtype = pick_dtype(o.dtype, device)
    run = Run(o, paper, objectives, sets, tokenizer, answers, device, dtype, rank, world)
    if teacher:
        read_teacher(run, teacher)
    run.model = build(run, checkpoint).to(device)
    if teacher:
        match_teacher(run, teacher)
    o.lr = o.lr or default_rate(paper, run.model.config.hidden, o.task)
    set_temperature(run, 0.0)
    if o.compile:
        compile_layers(run.model)
    run.optimizer = make_optimizer(run.model, o.weight_decay)
    if o.resume:
        try:
            run.optimizer.load_state_dict(checkpoint["optimizer"])
        except ValueError:
            raise Stop(f"--resume: {last} is of a run with other heads; give the options that it had") from None
        run.progress = checkpoint["progress"]
    seed_dropout(run, checkpoint.get("generators", {}).get(device.type, []) if o.resume else [])
    if o.export_official:
        if Path(o.export_official).is_dir():
            raise Stop(f"--export-official {o.export_official}: is a folder; give a file name")
        official(o.model, run.model.state_dict())  # refuses two heads of one name before the first step
    describe(run)
    loop(run)
    result = finish(run)
    if o.export_official and rank == 0:
        data.save(official(o.model, run.model.state_dict()), Path(o.export_official))
    return result


def seed_dropout(run, states):
    """Sets the generator that dropout draws from: to this process's of the saved `states`, if there is one; else each
    process but the first goes on with numbers of its own."""
    if run.rank < len(states):
        generator_of(run.device).set_rng_state(states[run.rank])
    elif run.rank:
        torch.manual_seed(int(np.random.SeedSequence((run.o.seed, run.rank)).generate_state(1)[0]))


def generator_of(device):
    """The torch module whose get_rng_state and set_rng_state are those of a device: torch, torch.cuda or torch.mps."""
    return torch if device.type == "cpu" else torch.get_device_module(device)


def set_temperature(run, part):
    """The temperature of itc after `part` (0..1) of the run, where it is not learned."""
    ends = temperatures(run.o.temperature)
    if ends and "itc" in run.model.heads:
        scale = run.model.heads["itc"].log_scale.requires_grad_(False)
        scale.fill_(-math.log(common.scheduled_temperature(*ends, part)))


def loop(run):
    """The steps: batches, gradients, clipping, update; a line every `log_every`, an evaluation every `eval_every`."""
    o, model, progress, log = run.o, run.model, run.progress, Log(run)
    slots = run.world * o.accumulate  # forward passes in a step; this process does `accumulate` of them
    past = Counter(draw_task(run, step) for step in range(1, progress["step"] + 1))
    order = {task: stream(o, splits["train"], slots, skip=past[task]) for task, splits in run.sets.items()}
    if progress["step"] == 0:
        validate(run, log)
    coming = None
    with interruptible() as interrupted, ThreadPoolExecutor(1) as worker:
        while progress["step"] < o.steps:
            start, step = time.perf_counter(), progress["step"] + 1
            batches, names = coming.result() if coming else draw_step(run, order, step)
            # made while this step computes; not where the model itself picks what comes
            ahead = step < o.steps and "retrieval" not in o.tasks
            coming = worker.submit(draw_step, run, order, step + 1) if ahead else None
            ready = time.perf_counter()
            model.train()
            set_temperature(run, (step - 1) / o.steps)
            losses = backward(run, batches, names)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), o.clip)
            set_rate(run.optimizer, step, learning_rate(step, o.lr, o.warmup * o.steps, o.steps))
            run.optimizer.step()
            run.optimizer.zero_grad(set_to_none=True)
            progress["step"], due = step, step % o.log_every == 0 or step == o.steps
            if due and run.device.type != "cpu":
                float(norm)  # what a GPU still has to do belongs to the time of these steps
            log.add(step, losses, norm, batches, ready - start, time.perf_counter() - start)
            if due:
                log.line()
            if step % o.eval_every == 0 or step == o.steps:
                validate(run, log)
            if total([interrupted()])[0]:  # all stop at the same step, or one would wait for another for ever
                log.check()
                save_checkpoint(run, "checkpoint.pt")
                raise Stop(f"interrupted after step {step}, which is saved; go on with --resume")
    say(f"data     {100 * log.waited / max(1e-9, log.worked):.1f}% of the training time was spent waiting for it")


def draw_step(run, order, step):
    """This process's batches of step 1, 2, ... and the objectives that they train: a function of seed and step alone,
    save for retrieval's hard partners. order: {task: stream}, each at this step's turn."""
    o, task, drawn = run.o, draw_task(run, step), np.random.default_rng((run.o.seed, step))  # alike in every process
    if o.task == "pretrain":
        names = step_objectives(run.paper, run.objectives, drawn, (step - 1) / o.steps)
    else:
        names = task_objectives(o, task)
    index, batches, slots = next(order[task]), [], run.world * o.accumulate
    for slot in range(run.rank * o.accumulate, (run.rank + 1) * o.accumulate):
        rng = np.random.default_rng((o.seed, step, slot))
        batch = make_batch(run, run.sets[task]["train"], index[slot::slots], names, rng)
        batches.append(batch.pin() if run.device.type == "cuda" else batch)
    return batches, names


def draw_task(run, step):
    """The task of step 1, 2, ..., in proportion to the tasks' training examples; a function of seed and step alone."""
    sizes = np.array([len(splits["train"]) for splits in run.sets.values()])
    return str(np.random.default_rng((run.o.seed, step, 7)).choice(list(run.sets), p=sizes / sizes.sum()))


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
        metrics, chance = evaluate(run, "val")
        log.metrics(metrics, chance, time.perf_counter() - start)
        score = float(sum(value for name, value in metrics.items() if name.endswith(("accuracy", "mean_recall"))))
        score += sum(1 / value for name, value in metrics.items() if name.endswith("perplexity"))  # a share as well
        at_chance(run, metrics, chance)
        if score > run.progress["best"]:
            run.progress["best"] = score
            save_checkpoint(run, "best.pt")
    if run.progress["step"]:
        save_checkpoint(run, "checkpoint.pt")


def at_chance(run, metrics, chance):
    """Warns, from the middle of the run on, of each task's accuracy that two standard errors of a guess could explain."""
    if run.o.ablate or 2 * run.progress["step"] < run.o.steps or not run.progress["step"]:
        return
    for name, p in chance.items():
        task = next((t for t in run.sets if name.startswith(f"{t}_")), next(iter(run.sets)))
        n = len(run.sets[task].get("val", ()))
        if name.endswith("accuracy") and n and metrics[name] <= p + 2 * math.sqrt(p * (1 - p) / n):
            say(f"warning  val {name} {percent(metrics[name])} is no better than chance, {percent(p)}: train longer, start "
                "from a pretrained model (--init) or try another --lr")  # fmt: skip


def finish(run):
    """Test metrics of the best weights (the last ones where there is no val split), as result.json has them."""
    o, progress, best = run.o, run.progress, run.o.out / "best.pt"
    if dist.is_initialized():
        dist.barrier()  # the first process writes best.pt, all read it
    if any("val" in splits for splits in run.sets.values()) and best.is_file():
        run.model.load_state_dict(load_checkpoint(best)["state"])
    result = {"model": o.model, "task": o.task, "split": "test", "data": o.data, "steps": o.steps, "seed": o.seed}
    result |= {"ablate": o.ablate} if o.ablate else {}
    kept = [p for name, p in run.model.named_parameters() if not name.startswith("heads.hidden.")]  # see projections
    result["parameters"] = sum(p.numel() for p in kept)
    result["seconds"] = round(progress["seconds"], 1)
    result["examples_per_second"] = round(progress["examples"] / max(1e-9, progress["seconds"]), 1)
    result["chance"] = {}
    for split in ("test", "compose", "detected"):
        metrics, chance = evaluate(run, split)
        if not metrics:
            continue
        examples = sum(len(tested(run, task, s[split])) for task, s in run.sets.items() if split in s)
        say(table(f"{o.model} {o.task}, split {split}, {examples} examples", metrics, chance))
        prefix = "" if split == "test" else f"{split}_"
        result |= {prefix + name: round(float(value), 5) for name, value in metrics.items()}
        result["chance"] |= {prefix + name: round(float(value), 5) for name, value in chance.items()}
    if "itc" in run.model.heads:
        result["temperature"] = round(math.exp(-run.model.heads["itc"].log_scale.item()), 5)
    searched, head = (run.splits, "itm") if o.task == "pretrain" else (run.sets.get("retrieval", {}), "rank")
    if o.rerank and "test" in searched:
        stages, lines = compare_stages(run, searched["test"], head)
        result |= stages
        say(lines)
    if run.rank == 0:
        write(o.out / "result.json", json.dumps(result, indent=1) + "\n")
    return result


# ---- printing --------------------------------------------------------------------------------------------------


def say(text):
    """A line on stdout, from the first process only."""
    if processes()[0] == 0:
        print(text, flush=True)


class Log:
    """Progress lines and log.jsonl. Losses stay on the device until a line is due, so that no step waits for them."""

    def __init__(self, run):
        self.run, self.pending, self.waited, self.worked, self.seen = run, [], 0.0, 0.0, 0
        self.file, step = run.o.out / "log.jsonl", run.progress["step"]
        if run.rank == 0:
            kept = self.file.read_text().splitlines() if run.o.resume and self.file.is_file() else []
            write(self.file, "".join(line + "\n" for line in kept if json.loads(line)["step"] <= step))

    def add(self, step, losses, norm, batches, waited, worked):
        ids = [i for batch in batches for i in batch.ids]
        self.pending.append((step, losses, norm, ids))
        self.waited, self.worked, self.seen = self.waited + waited, self.worked + worked, self.seen + len(ids)
        self.run.progress["seconds"] += worked
        self.run.progress["examples"] += len(ids) * self.run.world

    def check(self):
        """Stop at the first loss or gradient norm that is not finite, naming step, objective and examples."""
        for step, losses, norm, ids in self.pending:
            bad = [name for name, loss in losses.items() if not math.isfinite(loss)]
            if bad or not math.isfinite(norm):
                what = f"the loss of {bad[0]}" if bad else f"the gradient of {', '.join(losses)}"
                raise Stop(f"step {step}: {what} is not finite; try a lower --lr. Examples: {', '.join(ids[:8])} ...")

    def line(self):
        """Mean loss of each objective since the last line, rate, speed and time left; the same to log.jsonl."""
        self.check()
        o, step, values = self.run.o, self.run.progress["step"], {}
        for _, losses, _, _ in self.pending:
            for name, loss in losses.items():
                values.setdefault(name, []).append(float(loss))
        values = {name: sum(v) / len(v) for name, v in values.items()}
        norm, self.pending = float(self.pending[-1][2]), []
        rate = learning_rate(step, o.lr, o.warmup * o.steps, o.steps)
        speed = self.seen * self.run.world / max(1e-9, self.worked)
        left = int((o.steps - step) * self.worked * o.batch_size * o.accumulate / max(1, self.seen))
        text = "  ".join(f"{name} {value:.3f}" for name, value in values.items())
        say(
            f"step {step:5d}/{o.steps}  {text}  lr {rate:.1e}  {speed:.0f} examples/s  {left // 60}:{left % 60:02d} left"
        )
        self.write({"step": step, "lr": rate, "grad_norm": norm, "examples_per_second": round(speed, 1), **values})

    def metrics(self, metrics, chance, seconds):
        """The val split's metrics, chance in brackets."""
        step, shown = self.run.progress["step"], []
        for name, value in metrics.items():
            beside = f" ({percent(chance[name])})" if name in chance else ""
            if "accuracy_" not in name:
                shown.append(f"{name} {value:.3f}" if name.endswith(PLAIN) else f"{name} {percent(value)}{beside}")
        say(f"step {step:5d}/{self.run.o.steps}  val: {', '.join(shown)}; {seconds:.0f} s")
        self.write({"step": step, "split": "val", **metrics, "chance": chance})

    def write(self, record):
        if self.run.rank == 0:
            with self.file.open("a") as file:
                file.write(json.dumps(record, default=float) + "\n")


PLAIN = ("_loss", "perplexity")  # metrics that are no share of anything


def percent(share):
    """0.123 -> 12.3%."""
    return f"{100 * share:.1f}%"


def table(title, metrics, chance):
    """Metrics in a column, chance beside each."""
    lines = [f"\n{title}", f"  {'':24s} {'':>8s} {'chance':>8s}"]
    for name, value in metrics.items():
        shown = f"{value:.4f}" if name.endswith(PLAIN) else percent(value)
        lines.append(f"  {name:24s} {shown:>8s} {percent(chance[name]) if name in chance else '':>8s}".rstrip())
    return "\n".join(lines)


def describe(run):
    """The final configuration, once."""
    o, size = run.o, sum(p.numel() for p in run.model.parameters())
    say(f"model    {o.model} {'as in --init' if o.init else o.size}, {size / 1e6:.2f} M parameters: {run.model.config}")
    for task, splits in run.sets.items():
        counts = ", ".join(f"{name} {len(split)}" for name, split in splits.items())
        each = splits["train"].lengths().mean(0)
        source = f"{task}, {splits['train'].name}"
        say(f"data     {source}: {counts} examples; {each[0]:.1f} words, {each[1]:.1f} regions each")
    say(f"run      {o.steps} steps of {o.batch_size} x {o.accumulate} x {run.world} examples, lr {o.lr:g}, seed {o.seed}, "
        f"{', '.join(run.objectives)}; {run.device}, {str(run.dtype).removeprefix('torch.')}; to {o.out}")  # fmt: skip


def compare(results, out):
    """Mean and spread over seeds of each metric, a column a model; "tie" where the spread covers the difference.
    Printed, and written as comparison.json and comparison.md."""
    models = list(dict.fromkeys(r["model"] for r in results))
    shares = dict.fromkeys(n for r in results for n in r["chance"] if "accuracy_" not in n)
    rows = {}
    for name in ["parameters", "examples_per_second", *shares]:
        values = {m: [r[name] for r in results if r["model"] == m and name in r] for m in models}
        rows[name] = {
            m: {"mean": float(np.mean(v)), "spread": float(np.std(v, ddof=1)) if len(v) > 1 else 0.0}
            for m, v in values.items()
            if v
        }
    lines = [f"| | {' | '.join(models)} | best | chance |", "|---" * (len(models) + 3) + "|"]
    for name, row in rows.items():
        chance = percent(np.mean([r["chance"][name] for r in results if name in r["chance"]])) if name in shares else ""
        best = winner(row) if name in shares else ""
        lines.append(f"| {name} | {' | '.join(cell(name, row.get(m)) for m in models)} | {best} | {chance} |")
    text = "\n".join(lines) + "\n"
    say("\n" + text)
    if processes()[0] == 0:
        write(out / "comparison.json", json.dumps({"runs": results, "table": rows}, indent=1) + "\n")
        write(out / "comparison.md", text)


def cell(name, entry):
    """mean ± spread, shares in percent."""
    if entry is None:
        return ""
    if name in ("parameters", "examples_per_second"):
        return f"{entry['mean']:,.0f}"
    return f"{100 * entry['mean']:.1f} ± {100 * entry['spread']:.1f}"


def winner(row):
    """The best model, or "tie" where its lead over the second is no larger than their two spreads together."""
    if len(row) < 2:
        return ""
    (first, a), (_, b) = sorted(row.items(), key=lambda item: -item[1]["mean"])[:2]
    return "tie" if a["mean"] - b["mean"] <= a["spread"] + b["spread"] else first


# ---- files -----------------------------------------------------------------------------------------------------


def write(path, text):
    """A text file, whole or not at all."""
    data.write_whole(path, lambda file: file.write_text(text))


def save_checkpoint(run, name):
    """All that is needed to go on or to predict, written to a temporary name, then renamed. All processes call it."""
    own = generator_of(run.device).get_rng_state()
    states = [torch.empty_like(own) for _ in range(run.world)] if run.world > 1 else [own]
    if run.world > 1:
        dist.all_gather(states, own)
    if run.rank:
        return
    config = asdict(run.model.config)
    content = {
        "model": run.o.model,
        "task": run.o.task,
        "config": {key: list(value) if isinstance(value, tuple) else value for key, value in config.items()},
        "state": run.model.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "generators": {run.device.type: states},  # of dropout, in every process
        "progress": dict(run.progress),
        "tokenizer": run.tokenizer.to_str(),
        "answers": run.answers,
        "data": run.o.data,
        "patch": run.o.patch,
        "grid": run.o.grid,
    }
    data.save(content, run.o.out / name)


def load_checkpoint(path):
    """A checkpoint of `save_checkpoint`, on the CPU. DataError if it is missing, damaged or something else."""
    content = data.read_torch(Path(path))
    if not isinstance(content, dict) or not CHECKPOINT <= set(content):
        raise DataError(f"{path}: not a checkpoint of train.py (it lacks model, config, state, tokenizer or answers)")
    return content


def read_state(path):
    """(content, state) of a weights file: what it holds, and the tensors in it by name. DataError if it holds none, or
    NaN."""
    content = state = (data.read_safetensors if path.suffix == ".safetensors" else data.read_torch)(path)
    for key in ("state", "model_state", "model_state_dict", "state_dict", "model"):  # some codes put it under one
        state = state[key] if isinstance(state, dict) and isinstance(state.get(key), dict) else state
    state = state if isinstance(state, dict) else {}
    state = {n: t for n, t in state.items() if isinstance(n, str) and isinstance(t, torch.Tensor)}
    if not state or any(tensor.layout != torch.strided or tensor.is_meta for tensor in state.values()):
        raise DataError(f"{path}: holds no weights; give a checkpoint, a state dict or a safetensors file")
    # a sum is finite only if all its numbers are, and costs no memory
    if wrong := [n for n, t in state.items() if t.is_floating_point() and not t.sum(dtype=torch.float32).isfinite()]:
        raise DataError(f"{path}: {len(wrong)} tensors hold NaN or infinity, the first is {wrong[0]}")
    return content, state


def load_weights(o):
    """The file or folder of --init as a checkpoint: one of `save_checkpoint`; or the weights of BERT, of an official
    code or of Hugging Face, then with `kind` (BERT, or the model's name), `state` under the names found there and
    `config` with the sizes found. tokenizer.json or vocab.txt, config.json and the answers beside the file are used.

    DataError for anything else, for another model's weights and for numbers that are not finite.
    """
    path, paper = Path(o.init), PAPERS[o.model][0]
    if path.is_dir():
        names = [name for name in ("model.safetensors", "pytorch_model.bin") if (path / name).is_file()]
        if not names:
            raise DataError(f"{path}: a folder without model.safetensors or pytorch_model.bin; give the file")
        path = path / names[0]
    content, state = read_state(path)
    if CHECKPOINT <= set(content):
        return content
    kind = next((model for model, mark in MARKS.items() if any(mark in name for name in state)), "BERT")
    if kind not in ("BERT", o.model):
        raise DataError(f"{path}: holds weights of {kind}, which do not fit --model {o.model}")
    config = data.read_json(path.with_name("config.json"), dict) or {}
    for key, known in HUGGING_FACE.items():
        if config.get(key, known[0]) not in known:
            raise DataError(f"{path.with_name('config.json')}: {key} is {config[key]!r}, must be {' or '.join(known)}")
    try:
        state = common.bert_names(state) if kind == "BERT" else state
        sizes = paper.sizes_of(state, config)
    except KeyError as error:
        raise DataError(f"{path}: no weights of BERT, UNITER, ViLBERT or LXMERT: it lacks {error.args[0]}") from None
    except (TypeError, ValueError) as error:
        raise DataError(f"{path}: {error}") from None
    pieces = [p for name in ("tokenizer.json", "vocab.txt") if (p := path.with_name(name)).is_file()]
    lists = [p for name in ("all_ans.json", "trainval_label2ans.json") if (p := path.with_name(name)).is_file()]
    answers = data.read_json(lists[0], list) if lists else []
    return {
        "kind": kind,
        "model": o.model,
        "config": sizes,
        "state": state,
        "tokenizer": data.read_tokenizer(pieces[0]).to_str() if pieces and not o.vocab else None,
        "answers": [a["ans"] if isinstance(a, dict) else a for a in answers],
    }


def official(model, state):
    """A model's weights under its paper's official names. DataError where two heads have one official name."""
    try:
        return PAPERS[model][0].to_official(state)
    except ValueError as error:
        raise DataError(f"no official names for these weights: {error}") from None


# ---- main ------------------------------------------------------------------------------------------------------


def main(argv=None):
    """Runs every model and seed asked for. Exit code 0, or 2 with one line on stderr."""
    try:
        options = parse(argv)
        keep_freed_memory()
        models = list(PAPERS) if options.model == "all" else [options.model]
        runs = [settle(options, m, s) for m in models for s in range(options.seed, options.seed + options.seeds)]
        started = [(o.out / "checkpoint.pt").is_file() for o in runs]
        if options.resume and any(started):
            for o, resume in zip(runs, started, strict=True):
                o.resume = resume
        results = [train(o) for o in runs]
        if len(results) > 1:
            compare(results, folder_of(options, options.model))
        if dist.is_initialized():
            dist.barrier()  # a process that leaves early breaks the others' last reduction
    except DataError as error:
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
