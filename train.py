"""train.py: one plain loop that pretrains, fine-tunes, evaluates and compares the three models.

    python train.py --model uniter                                    pretrain on the built-in scenes
    python train.py --model uniter --task vqa --init out/uniter-pretrain/checkpoint.pt
    python train.py --model uniter --task vqa --data my.jsonl         your own pictures and questions
    python train.py --model all --task vqa --seeds 3                  compare the models, with the spread over seeds
    torchrun --nproc_per_node=2 train.py --model uniter               several processes, the same gradients
    python train.py --model uniter --objectives mlm,mrfr,mrc_kl,itm,itc --rerank 20    retrieval in two stages
    python train.py --model uniter --config layers=1 --teacher out/uniter-pretrain/best.pt    a smaller student

Read top to bottom: options, device and processes, data, model, optimizer, distillation, evaluation, loop, files, main.
Every mean in a loss is a mean over the whole step, whatever its split: `--accumulate 2` in one process and
`--accumulate 1` in two give the same gradients, because each part is weighted by its share of the masked words,
masked regions or rows. One exception: the objective itc contrasts each pair with those of the same forward pass, in
all processes. Two processes equal one with the double batch, but `--accumulate 2` has half as many negatives.
"""

import argparse
import itertools
import json
import math
import os
import pickle
import signal
import sys
import time
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

import common
import data
import lxmert
import uniter
import vilbert

PAPERS = {
    "uniter": (uniter, "UNITER"),
    "vilbert": (vilbert, "ViLBERT"),
    "lxmert": (lxmert, "LXMERT"),
}
TASKS = ("pretrain", "vqa")
MASKED_WORDS, MASKED_REGIONS, PAIRS = {"mlm"}, {"mrfr", "mrc", "mrc_kl", "attr", "nce"}, {"itm", "wra"}
DISTILL = {"logits": (), "attention": ("attention_kl", "attention_mse"), "hidden": ("hidden",)}  # and their losses

# ---- options ---------------------------------------------------------------------------------------------------


class Stop(Exception):
    """Ends the program with one line on stderr and exit code 2."""


class Parser(argparse.ArgumentParser):
    """argparse, but a mistake is one line: what is wrong, without the whole usage."""

    def error(self, message):
        raise Stop(f"{message}; see --help")


def parse(argv=None):
    """The command line. Where a default depends on the task or the size, it is None here and set by `settle`."""
    parser = Parser(description="Pretrain, fine-tune and compare UNITER, ViLBERT and LXMERT.", allow_abbrev=False)

    def add(name, **settings):
        settings["help"] += " (default: %(default)s)" if settings.get("default") is not None else ""
        parser.add_argument(name, **settings)

    add("--model", default="uniter", choices=[*PAPERS, "all"], help="which paper; all: one after the other, compared")
    add("--task", default="pretrain", choices=TASKS, help="what to train for")
    add("--data", default="scenes", help="scenes (built in) or a .jsonl file of your own")
    add("--size", default="tiny", choices=["tiny", "base", "large"], help="preset of layer sizes")
    add("--init", metavar="CKPT", help="start from this checkpoint; {model} and {seed} in the name are filled in")
    add("--resume", action="store_true", help="go on from DIR/checkpoint.pt, exactly where it stopped")
    add("--out", metavar="DIR", help="folder for checkpoint, log and result (default: out/MODEL-TASK)")
    add("--steps", type=int, help="optimizer steps (default: about five minutes on two CPU cores)")
    add("--batch-size", type=int, help="examples in one forward pass of one process (default: 64 over all processes)")
    add("--accumulate", type=int, default=1, help="forward passes of one process in an optimizer step")
    add("--lr", type=float, help="peak learning rate (default: by size and task)")
    add("--warmup", type=float, default=0.1, help="part of the steps in which the rate rises")
    add("--weight-decay", type=float, default=0.01, help="AdamW's, on weight matrices only")
    add("--clip", type=float, default=5.0, help="largest gradient norm")
    add("--dropout", type=float, help="dropout of the trunk (default: by size)")
    add("--objectives", help="pretraining objectives, a,b,c (default: the paper's own)")
    add(
        "--contrast",
        default="infonce",
        choices=["infonce", "hinge", "sigmoid", "dcl"],
        help="the loss of objective itc",
    )
    add("--temperature", default="learned", help="of itc: learned, a number, or FIRST:LAST, half a cosine over the run")
    add("--teacher", metavar="CKPT", help="a trained model to learn from; {model} and {seed} are filled in")
    add("--distill", default="logits", help="what of the teacher, a,b,c: logits, attention, hidden")
    add("--rerank", type=int, metavar="K", help="retrieval in two stages after the test: itc's best K, ranked by itm")
    add("--pool", type=int, default=500, help="pictures, with a caption each, that --rerank searches")
    add("--config", nargs="+", default=[], metavar="NAME=JSON", help="sizes in place of the preset's, as layers=1")
    add("--mask", type=float, help="share of the words that pretraining masks (default: 0.15; on scenes 0.3)")
    add("--ablate", choices=["text", "image"], help="take the words or the picture away, to see what the rest is worth")
    add("--limit", type=int, help="use only the first N training examples")
    add("--patch", type=int, default=12, help="side of the square that a region of your own pictures is resized to")
    add("--grid", type=int, default=6, help="cells a side where your own pictures come without boxes")
    add("--vocab", metavar="FILE", help="a BERT vocab.txt or tokenizer.json (default: trained on the training texts)")
    add("--seed", type=int, default=0, help="seed of weights, order and masks")
    add("--seeds", type=int, default=1, help="repeat with seeds SEED, SEED+1, ... and report mean and spread")
    add("--eval-every", type=int, help="steps between evaluations (default: a fifth of the steps)")
    add("--log-every", type=int, default=50, help="steps between progress lines")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--dtype", default="auto", choices=["auto", "f32", "bf16"], help="arithmetic of the trunk")
    options = parser.parse_args(argv)
    for name, value in vars(options).items():
        if type(value) is int and value < (0 if name in ("steps", "seed") else 1):
            raise Stop(f"--{name.replace('_', '-')} is {value}; it must be positive")
    for part in options.distill.split(","):
        if part not in DISTILL:
            raise Stop(f"--distill: {part!r} is none of {', '.join(DISTILL)}")
    temperatures(options.temperature)
    return options


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


def settle(options, model_name, seed):
    """One run's own options: model and seed fixed, defaults that depend on them filled in. Returns a new namespace."""
    o = argparse.Namespace(**vars(options))
    o.model, o.seed = model_name, seed
    base = Path(o.out or f"out/{model_name}-{o.task}")
    if o.out and options.model == "all":
        base = base / model_name
    o.out = base / f"seed{seed}" if options.seeds > 1 else base
    if o.steps is None:
        o.steps = 9000 if o.data == "scenes" else 1000
    # scenes' captions have a dozen words, not thirty: with 0.15 too few are left to learn from in five minutes
    o.mask = o.mask or (0.3 if o.data == "scenes" else 0.15)
    o.lr = o.lr or {"tiny": 1e-3, "base": 5e-5, "large": 3e-5}[o.size]
    o.batch_size = o.batch_size or max(1, 64 // processes()[1])
    o.eval_every = o.eval_every or max(1, math.ceil(o.steps / 5))
    o.init = o.init.format(model=model_name, seed=seed) if o.init else None
    o.teacher = o.teacher.format(model=model_name, seed=seed) if o.teacher else None
    return o


# ---- device and processes --------------------------------------------------------------------------------------


def processes():
    """(rank, world) under torchrun, (0, 1) without. Tensors on GPUs go by NCCL, those on CPUs by gloo."""
    if "RANK" not in os.environ or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return 0, 1
    if not dist.is_initialized():
        dist.init_process_group()
    return dist.get_rank(), dist.get_world_size()


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
    """The sum over all processes of a list of numbers, as a list. On the CPU, so that no GPU is waited for."""
    if not dist.is_initialized():
        return list(values)
    tensor = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(tensor)
    return tensor.tolist()


# ---- data ------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """What one run is made of, so that functions need not take it apart."""

    o: argparse.Namespace
    paper: object  # the model's module: HEADS, OBJECTIVES, PRETRAINING
    objectives: dict  # name -> ratio, in pretraining; {task: 1} in fine-tuning
    splits: dict  # name -> data.Dataset
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

    def autocast(self):
        """Matrix products in bfloat16, if the run is; the weights stay float32."""
        return torch.autocast(self.device.type, self.dtype) if self.dtype != torch.float32 else nullcontext()

    def columns(self):
        return {answer: column for column, answer in enumerate(self.answers)}


def objectives_of(o, paper):
    """The pretraining objectives asked for, {name: ratio}; those joined to another one have ratio 0."""
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
    return {name: known[name] for name in names}


def read_data(o, objectives):
    """The splits of the task: {"train": Dataset, "val": ..., "test": ...}, scenes with "compose" besides."""
    task = "caption" if o.task == "pretrain" and "qa" not in objectives else o.task  # questions only to be answered
    names = ["train", "val", "test"] + ["compose"] * (o.data == "scenes" and o.task != "pretrain")
    limits = {"train": o.limit}
    if dist.is_initialized() and os.environ.get("LOCAL_RANK") != "0":
        dist.barrier()  # the first process of a machine draws and extracts, the others read what it cached
    splits = {name: data.load(o.data, task, name, limits.get(name), o.patch, o.grid) for name in names}
    if dist.is_initialized() and os.environ.get("LOCAL_RANK") == "0":
        dist.barrier()
    if not len(splits["train"]):
        raise Stop(f"{o.data}: no example of split train for --task {o.task}")
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


def encode_texts(o, splits, checkpoint):
    """The tokenizer (the checkpoint's, a file's, or trained on the training texts); gives every split its tokens."""
    if checkpoint:
        tokenizer = data.tokenizer_from_json(checkpoint["tokenizer"])
    else:
        # scenes: from captions and questions, whatever the task, so that a pretrained model can be asked later
        text = data.load("scenes", "pretrain", "train", o.limit).text if o.data == "scenes" else splits["train"].text
        tokenizer = data.read_tokenizer(o.vocab) if o.vocab else data.train_tokenizer(text)
    for split in splits.values():
        split.encode(tokenizer, max_length=60)
    return tokenizer


def step_objectives(paper, objectives, rng):
    """What one step trains: with conditional masking one objective, drawn by ratio, and those joined to it; else all."""
    if not paper.PRETRAINING["conditional"]:
        return list(objectives)
    drawn = [name for name, ratio in objectives.items() if ratio]
    name = rng.choice(drawn, p=np.array([objectives[n] for n in drawn]) / sum(objectives.values()))
    return [str(name), *(n for n in paper.PRETRAINING["joined"].get(name, ()) if n in objectives)]


def make_batch(run, dataset, index, names, rng, **words):
    """Examples `index` as the objectives `names` need them: pairs mismatched, words masked, regions masked.
    `words`: arguments of data.mask_words in place of the run's."""
    images, matched = None, None
    if PAIRS & set(names):
        index, images, matched = data.mismatch(dataset, index, rng, replace=run.paper.PRETRAINING["mismatch"])
    batch = data.collate(dataset, index, images, answers=run.columns() if run.answers else None)
    if matched is not None:
        batch.matched = matched
    if "qa" in names:
        batch = data.draw_answers(batch, rng)
    if MASKED_WORDS & set(names):
        batch = data.mask_words(batch, run.tokenizer, rng, **(words or {"p": run.o.mask}))
    if MASKED_REGIONS & set(names):
        batch = data.mask_regions(batch, rng, **run.paper.PRETRAINING["region_masking"])
    return ablate(batch, run.o.ablate)


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


# ---- model -----------------------------------------------------------------------------------------------------


def heads_of(paper, objectives):
    """The heads that these objectives use: mrc_kl shares mrc's, nce mrfr's, wra needs none."""
    names = [{"mrc_kl": "mrc", "nce": "mrfr"}.get(name, name) for name in objectives]
    return tuple(dict.fromkeys(name for name in names if name in paper.HEADS))


def build(run, checkpoint):
    """The model: from a checkpoint's config with this run's heads, or from the preset and the data's own sizes."""
    o, paper, store = run.o, run.paper, run.splits["train"].store
    if checkpoint is None:
        sizes = {**paper.PRESETS[o.size], "vocab_size": run.tokenizer.get_vocab_size(), "feature_size": store.width}
        sizes["classes"] = store.classes or 2
        sizes["attributes"] = 1 + int(store.fields["attributes"].max()) if "attributes" in store.fields else 1
    elif checkpoint["model"] != o.model:
        raise Stop(f"{o.init}: a checkpoint of {checkpoint['model']} does not fit --model {o.model}")
    else:
        sizes = dict(checkpoint["config"])
        if sizes["feature_size"] != store.width:
            raise Stop(
                f"{o.init}: trained on features of width {sizes['feature_size']}, {o.data} has {store.width}; "
                "use the same kind of features, for pixels the same --patch"
            )
    sizes |= {"heads": heads_of(paper, run.objectives), "answers": max(1, len(run.answers)), "contrast": o.contrast}
    if run.teacher and "hidden" in o.distill.split(","):
        theirs = run.teacher.config
        sizes["heads"] = (*sizes["heads"], "hidden")
        sizes["teacher_widths"] = (theirs.hidden, getattr(theirs, "visual_hidden", theirs.hidden))
    sizes |= read_sizes(o, paper)
    if o.dropout is not None:
        sizes["dropout"] = o.dropout
    torch.manual_seed(o.seed)
    try:
        model = getattr(paper, PAPERS[o.model][1])(paper.Config(**sizes))
    except (ValueError, TypeError) as error:  # sizes that do not fit together
        raise Stop(f"--config {' '.join(o.config)}: {error}") from None
    if checkpoint:
        model.load_state_dict(fitting(o, model.state_dict(), checkpoint, run.answers))
    return model


def read_sizes(o, paper):
    """--config as {name: value}. Stop for a name that the presets lack or a value of another type."""
    sizes, known = {}, paper.PRESETS["tiny"]
    for text in o.config:
        name, _, value = text.partition("=")
        try:
            value = json.loads(value)
        except ValueError:
            raise Stop(f"--config {text}: write NAME=JSON, as layers=1 or connections=[[0,1]]") from None
        value = tuple(value) if isinstance(value, list) else value
        if name not in known:
            raise Stop(f"--config {text}: {o.model} has no size {name!r}; it has {', '.join(known)}")
        if type(value) is not type(known[name]) or (type(value) is int and value < 1):
            raise Stop(f"--config {text}: {name} is something like {known[name]}")
        sizes[name] = value
    return sizes


def fitting(o, own, checkpoint, answers):
    """A full state for a model whose initial one is `own`: the checkpoint's tensors where name and shape agree.

    Says what was loaded; Stop if anything but a head would stay at random. An answer head is kept only for the same
    list of answers: its rows mean nothing under another one.
    """
    state = checkpoint["state"]
    if checkpoint["answers"] != answers:
        state = {name: tensor for name, tensor in state.items() if not name.startswith(("heads.vqa", "heads.qa"))}
    loaded = {name for name in own if name in state and state[name].shape == own[name].shape}
    fresh, unused = sorted(set(own) - loaded), sorted(set(checkpoint["state"]) - loaded)
    lost = [name for name in fresh if not name.startswith("heads.")]
    if lost:
        raise Stop(
            f"{o.init}: {len(lost)} tensors of the trunk are missing or of another shape, the first is {lost[0]}"
        )
    short = [", ".join(dict.fromkeys(".".join(n.split(".")[:2]) for n in names)) or "none" for names in (fresh, unused)]
    say(f"init     {len(loaded)} tensors from {o.init}; at random: {short[0]}; not used: {short[1]}")
    return {name: state[name] if name in loaded else own[name] for name in own}


# ---- optimizer -------------------------------------------------------------------------------------------------


def make_optimizer(model, weight_decay, head_scale=1.0):
    """AdamW as UNITER sets it: betas .9 and .98; decay on matrices, none on biases and norms.

    Each group has a `scale` of the learning rate: fresh task heads may learn `head_scale` times faster.
    """
    groups = {}
    for name, parameter in model.named_parameters():
        scale = head_scale if name.startswith("heads.") else 1.0
        groups.setdefault((parameter.ndim > 1, scale), []).append(parameter)
    groups = [{"params": p, "decay": weight_decay * matrix, "scale": s} for (matrix, s), p in groups.items()]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), fused=True)


def learning_rate(step, peak, warmup, steps):
    """Linear warm-up, then linear decay: the rate of optimizer step 1, 2, ..., `steps`; 1e-8 where that meets 0.

    warmup: in steps. peak x step / warmup, then peak x (steps - step) / (steps - warmup).
    """
    if step < warmup:
        return peak * step / warmup
    return peak * (steps - step) / (steps - warmup) if step < steps else 1e-8


def set_rate(optimizer, step, rate):
    """The rate of step 1, 2, ... for every group, so that torch's AdamW takes the official step to the last digit.

    The official one adds eps before it corrects the second moment's bias, torch after: eps is divided by that
    correction. It decays after the step, p <- (p - r u)(1 - r d), torch before: p <- p (1 - r' d') - r' u, which is the
    same for r' = r (1 - r d), d' = d / (1 - r d).
    """
    for group in optimizer.param_groups:
        r, d = rate * group["scale"], group["decay"]
        group["lr"], group["weight_decay"] = r * (1 - r * d), d / (1 - r * d)
        group["eps"] = 1e-6 / math.sqrt(1 - group["betas"][1] ** step)


def items(paper, name, batch):
    """How many items the mean of an objective's loss runs over."""
    if name.endswith("_soft") and name.removesuffix("_soft") in MASKED_REGIONS:
        return len(batch.region_index)
    name = name.removesuffix("_soft")
    if name == "itc":
        return len(batch.pair_index)
    if name in MASKED_WORDS:
        return len(batch.word_index)
    if name in paper.PRETRAINING.get("over_all_regions", ()):
        return int(batch.region_mask.sum())
    if name == "qa":
        return int(((batch.answer_labels >= 0) & (batch.matched == 1)).sum())
    return len(batch.region_index) if name in MASKED_REGIONS else len(batch.text)


def backward(run, batches, names):
    """Gradients of one step's loss, mean over ALL its parts: micro-batches here and in the other processes.

    Each part's mean counts by its share of the items, so that the sum of the parts is the mean of the whole; the
    gradients of the processes are then added up, once. Returns {name: loss of the step}, 0-d tensors.
    """
    seen, names = names, names + distilled(run, names)
    counts = [[items(run.paper, name, batch) for name in names] for batch in batches]
    totals = total([sum(column) for column in zip(*counts, strict=True)])
    losses = {name: torch.zeros((), device=run.device) for name in names}
    for batch, count in zip(batches, counts, strict=True):
        with run.autocast():
            batch = batch.to(run.device)
            parts = with_teacher(run, batch, seen) if run.teacher else run.model(batch, seen)
        shares = {name: n / max(1.0, t) for name, n, t in zip(names, count, totals, strict=True)}
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

    Stop where it cannot teach this run: other features, or none of the heads whose scores are wanted."""
    o = run.o
    run.teacher_paper, name = PAPERS[checkpoint["model"]]
    config = run.teacher_paper.Config(**checkpoint["config"])
    width = run.splits["train"].store.width
    if config.feature_size != width:
        raise Stop(f"{o.teacher}: trained on features of width {config.feature_size}, {o.data} has {width}")
    run.teacher = getattr(run.teacher_paper, name)(config).to(run.device).eval().requires_grad_(False)
    run.teacher.load_state_dict(checkpoint["state"])
    unlike = {"wra", "nce"}  # a distance without a head; negatives that each draws for itself
    if (checkpoint["model"] == "lxmert") != (o.model == "lxmert"):
        unlike |= {"mrc", "mrc_kl"}  # LXMERT's region classes have no background
    heads = {name: heads_of(run.teacher_paper, [name]) for name in run.objectives if name not in unlike}
    run.soft = tuple(name for name, head in heads.items() if head and {*head} <= {*config.heads})
    if "logits" in o.distill.split(",") and not run.soft:
        raise Stop(f"{o.teacher}: it has no head for {', '.join(run.objectives)}; train it for --task {o.task} first")


def distilled(run, names):
    """The losses that the teacher adds to these objectives': NAME_soft for scores, and those of DISTILL."""
    if run.teacher is None:
        return []
    wanted = run.o.distill.split(",")
    soft = [f"{name}_soft" for name in names if name in run.soft and "logits" in wanted]
    return soft + [name for part in wanted for name in DISTILL[part]]


def by_kind(recorded):
    """Recorded maps or states {"cross.0.text": x, ...} as {"cross.text": [x of layer 0, x of layer 1, ...], ...}."""
    kinds = {}
    for name, x in recorded.items():
        kinds.setdefault(".".join(part for part in name.split(".") if not part.isdigit()), []).append(x)
    return kinds


def layer_pairs(student, teacher):
    """(kind, student's layer, teacher's layer) of every kind that both have, by `common.layer_map`."""
    student, teacher = by_kind(student), by_kind(teacher)
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
    wanted, record = run.o.distill.split(","), "attention" in run.o.distill or "hidden" in run.o.distill
    student = run.model.encode(batch, record=record)
    parts = {name: run.paper.OBJECTIVES[name](run.model, student, batch) for name in names}
    with torch.no_grad():
        teacher = run.teacher.encode(batch, record=record)
        theirs = {n: run.teacher_paper.OBJECTIVES[n](run.teacher, teacher, batch)[1] for n in names if n in run.soft}
    if "logits" in wanted:
        for name, scores in theirs.items():
            pair = [x.flatten() if name == "mrfr" else x for x in (parts[name][1], scores)]  # features are no classes
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


# ---- evaluation ------------------------------------------------------------------------------------------------


def evaluate(run, dataset):
    """(metrics, chance) of the run's task on a split, the model in eval mode. Accuracies and recalls are in 0..1."""
    run.model.eval()
    with torch.inference_mode():
        return evaluate_vqa(run, dataset) if run.o.task == "vqa" else evaluate_pretraining(run, dataset)


def scores_of(run, batch, name):
    """(loss, scores) of one objective on a batch."""
    with run.autocast():
        loss, scores = run.model(batch.to(run.device), [name])[name]
    return loss.float(), scores.float().cpu()


def parts(run, dataset, index):
    """The examples `index` in batches of like lengths; each process takes its own batches."""
    for part in data.batches(dataset.lengths()[index], size=256, rank=run.rank, world=run.world):
        yield index[part]


def evaluate_pretraining(run, dataset, examples=1000, candidates=100):
    """Each objective on held-out captions, under a fixed seed, and zero-shot retrieval among `candidates` pictures.

    Accuracies are over masked words, masked regions or pairs. mlm_content masks one word a caption that only the
    picture tells: a colour, shape, size, number or direction. Beside each: what the most frequent label would get.
    """
    kinds, names = np.array(dataset.kind), list(run.objectives)
    captions = np.flatnonzero(kinds == "caption") if "caption" in kinds else np.arange(len(dataset))
    captions = captions[np.unique(dataset.image[captions], return_index=True)[1]][:examples]  # one a picture
    questions = np.flatnonzero(kinds != "caption")[:examples]
    content = torch.zeros(run.tokenizer.get_vocab_size(), dtype=torch.bool)
    content[[i for w in data.CONTENT_WORDS if (i := run.tokenizer.token_to_id(w)) is not None]] = True
    sums = {}
    for name in [*names, *["mlm_content"] * ("mlm" in names and run.o.data == "scenes")]:
        for index in parts(run, dataset, questions if name == "qa" else captions):
            rng = np.random.default_rng((1, int(index[0])))
            if name == "mlm_content":
                batch = make_batch(run, dataset, index, ["mlm"], rng, only=content, one=True)
            else:
                batch = make_batch(run, dataset, index, [name], rng)
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
        metrics |= recalls
        chance |= {name: min(1.0, int(name.rsplit("r", 1)[1]) / len(captions[:candidates])) for name in recalls}
    if "itc" in names:
        dots = dot_products(run, dataset, captions[:candidates], dataset.image[captions[:candidates]])
        recalls = common.recall_at(dots, torch.arange(len(dots)))
        metrics |= {f"itc_{name}": value for name, value in recalls.items()}
        chance |= {f"itc_{name}": min(1.0, int(name.rsplit("r", 1)[1]) / len(dots)) for name in recalls}
    return metrics, chance


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


def retrieval(run, dataset, index):
    """Zero-shot: every caption with every picture through the matching head, ranked by log odds of a match."""
    n = len(index)
    scores = torch.zeros(n, n, dtype=torch.float64)
    for row in range(run.rank, n, run.world):
        batch = ablate(data.collate(dataset, np.full(n, index[row]), dataset.image[index]), run.o.ablate)
        logits = scores_of(run, batch, "itm")[1]  # (n, 2)
        scores[row] = logits[:, 1] - logits[:, 0]
    scores = torch.tensor(total(scores.flatten().tolist())).view(n, n)
    return common.recall_at(scores, torch.arange(n))


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
            vectors[part] = found.double().cpu()
        sides.append(torch.tensor(total(vectors.flatten().tolist()), dtype=torch.float64).view(vectors.shape))
    return sides[0] @ sides[1].T  # (texts, E) @ (E, pictures)


def matching_scores(run, dataset, texts, pictures, head="itm"):
    """How well text i fits picture i, (P,): the log odds of a match, or the one score of head "rank". texts: examples,
    pictures: store rows, (P,) each."""
    scores = torch.zeros(len(texts), dtype=torch.float64)
    lengths = np.stack([np.diff(dataset.offsets)[texts], np.diff(dataset.store.offsets)[pictures]], 1)
    for part in data.batches(lengths, size=256, rank=run.rank, world=run.world):
        batch = ablate(data.collate(dataset, texts[part], pictures[part]), run.o.ablate).to(run.device)
        with run.autocast():
            logits = run.model.heads[head](run.model.encode(batch).pooled).double().cpu()  # (rows, 2) or (rows, 1)
        scores[part] = logits[:, -1] - logits[:, 0] if logits.shape[1] == 2 else logits[:, 0]
    return torch.tensor(total(scores.tolist()), dtype=torch.float64)


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


def compare_stages(run, dataset, most=1000, measured=300):
    """--rerank: recall and seconds of the full matrix of matching scores, of dot products, and of the two stages.

    Among --pool pictures with a caption each; scenes are drawn until there are enough. Beyond `most` of them the full
    matrix is not computed: its time is extrapolated from `measured` x `measured` pairs, and so called.
    """
    o = run.o
    if o.data == "scenes" and o.pool > len(np.unique(dataset.image)):
        dataset = data.scenes(dataset.split, "caption", count=o.pool * 5 // 4).encode(run.tokenizer, max_length=60)
    captions = (
        np.flatnonzero(np.array(dataset.kind) == "caption") if "caption" in dataset.kind else np.arange(len(dataset))
    )
    texts = captions[np.unique(dataset.image[captions], return_index=True)[1]][: o.pool]  # one a picture
    pictures, n, result = dataset.image[texts], len(texts), {}
    whole = n <= most
    run.model.eval()
    with torch.inference_mode():
        dot_products(run, dataset, texts[:64], pictures[:64])  # the first pass of a process is slower
        start = time.perf_counter()
        recalls = retrieval(run, dataset, texts if whole else texts[:measured])
        seconds = (time.perf_counter() - start) * (1.0 if whole else (n / measured) ** 2)
        rows = {"full": (recalls if whole else {}, seconds)}
        start = time.perf_counter()
        recalls = common.recall_at(dot_products(run, dataset, texts, pictures), torch.arange(n))
        rows["dot"] = recalls, time.perf_counter() - start
        start = time.perf_counter()
        recalls = two_stage(run, dataset, texts, pictures, o.rerank)
        rows["two_stage"] = recalls, time.perf_counter() - start
    say(f"\n{o.model}, retrieval among {n} x {n}, best {o.rerank} re-ranked")
    for name, (recalls, seconds) in rows.items():
        how = "" if whole or name != "full" else f" (extrapolated from {measured} x {measured})"
        say(f"  {name:10s} {seconds:9.1f} s{how}  " + "  ".join(f"{key} {percent(v)}" for key, v in recalls.items()))
        result |= {f"{name}_{key}": round(value, 5) for key, value in recalls.items()}
        result[f"{name}_seconds"] = round(seconds, 2)
    return {"pool": n, "rerank": o.rerank, "full_extrapolated": not whole, **result}


def evaluate_vqa(run, dataset):
    """Accuracy: the soft score of the answer with the highest logit, mean over questions, also for each kind.

    Chance: always the training split's most frequent answer.
    """
    hits, kinds = np.zeros(len(dataset)), np.array(dataset.kind)
    for index in parts(run, dataset, np.arange(len(dataset))):
        best = scores_of(run, make_batch(run, dataset, index, ["vqa"], None), "vqa")[1].argmax(-1).tolist()
        hits[index] = [dataset.answer[i].get(run.answers[b], 0.0) for i, b in zip(index, best, strict=True)]
    hits = np.array(total(hits))
    guess = np.array([answer.get(run.answers[0], 0.0) for answer in dataset.answer])
    groups = {"accuracy": np.ones(len(dataset), bool)}
    groups |= {f"accuracy_{kind}": kinds == kind for kind in sorted(set(kinds)) if len(set(kinds)) > 1}
    return {k: hits[g].mean() for k, g in groups.items()}, {k: guess[g].mean() for k, g in groups.items()}


# ---- loop ------------------------------------------------------------------------------------------------------


def train(o):
    """One run: reads the data, builds or restores the model, trains, evaluates. Returns what goes to result.json."""
    paper, (rank, world), last = PAPERS[o.model][0], processes(), o.out / "checkpoint.pt"
    device = pick_device(o.device)
    if o.resume and not last.is_file():
        raise Stop(f"--resume: there is no {last}; start without --resume, or give the --out of the stopped run")
    o.init = last if o.resume else o.init
    checkpoint = load_checkpoint(o.init) if o.init else None
    teacher = load_checkpoint(o.teacher) if o.teacher else None
    if checkpoint and teacher and checkpoint["tokenizer"] != teacher["tokenizer"]:
        raise Stop(
            f"{o.teacher}: it reads other word pieces than {o.init}; start without --init, or from its own start"
        )
    objectives = objectives_of(o, paper) if o.task == "pretrain" else {o.task: 1}
    if o.rerank and not {"itm", "itc"} <= {*objectives}:
        raise Stop("--rerank: the first stage needs objective itc, the second itm; write --objectives ...,itm,itc")
    splits = read_data(o, objectives)
    objectives = drop_unfounded(objectives, splits["train"])
    tokenizer = encode_texts(o, splits, checkpoint or teacher)
    answers = data.answer_list(splits["train"]) if {"vqa", "qa"} & set(objectives) else []
    answers = teacher["answers"] if teacher and teacher["answers"] and answers else answers
    dtype = pick_dtype(o.dtype, device)
    run = Run(o, paper, objectives, splits, tokenizer, answers, device, dtype, rank, world)
    if teacher:
        read_teacher(run, teacher)
    run.model = build(run, checkpoint).to(device)
    set_temperature(run, 0.0)
    run.optimizer = make_optimizer(run.model, o.weight_decay)
    if o.resume:
        try:
            run.optimizer.load_state_dict(checkpoint["optimizer"])
        except ValueError:
            raise Stop(f"--resume: {last} is of a run with other heads; give the options that it had") from None
        torch.set_rng_state(checkpoint["rng"])
        run.progress = checkpoint["progress"]
    describe(run)
    loop(run)
    return finish(run)


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
    order = stream(o, run.splits["train"], slots, skip=progress["step"])
    if progress["step"] == 0:
        validate(run, log)
    with interruptible() as interrupted:
        while progress["step"] < o.steps:
            start, step = time.perf_counter(), progress["step"] + 1
            drawn = np.random.default_rng((o.seed, step))  # the same in every process
            names = step_objectives(run.paper, run.objectives, drawn) if o.task == "pretrain" else [o.task]
            index, batches = next(order), []
            for slot in range(run.rank * o.accumulate, (run.rank + 1) * o.accumulate):
                rng = np.random.default_rng((o.seed, step, slot))
                batches.append(make_batch(run, run.splits["train"], index[slot::slots], names, rng))
            ready = time.perf_counter()
            model.train()
            set_temperature(run, (step - 1) / o.steps)
            losses = backward(run, batches, names)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), o.clip)
            set_rate(run.optimizer, step, learning_rate(step, o.lr, o.warmup * o.steps, o.steps))
            run.optimizer.step()
            run.optimizer.zero_grad(set_to_none=True)
            progress["step"] = step
            log.add(step, losses, norm, batches, ready - start, time.perf_counter() - start)
            if step % o.log_every == 0 or step == o.steps:
                log.line()
            if step % o.eval_every == 0 or step == o.steps:
                validate(run, log)
            if total([interrupted()])[0]:  # all stop at the same step, or one would wait for another for ever
                log.check()
                save_checkpoint(run, "checkpoint.pt")
                raise Stop(f"interrupted after step {step}, which is saved; go on with --resume")
    say(f"data     {100 * log.waited / max(1e-9, log.worked):.1f}% of the training time was spent waiting for it")


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
    if "val" in run.splits:
        start = time.perf_counter()
        metrics, chance = evaluate(run, run.splits["val"])
        log.metrics(metrics, chance, time.perf_counter() - start)
        score = float(sum(value for name, value in metrics.items() if name.endswith("accuracy")))
        if score > run.progress["best"]:
            run.progress["best"] = score
            save_checkpoint(run, "best.pt")
    if run.progress["step"]:
        save_checkpoint(run, "checkpoint.pt")


def finish(run):
    """Test metrics of the best weights (the last ones where there is no val split), as result.json has them."""
    o, progress, best = run.o, run.progress, run.o.out / "best.pt"
    if dist.is_initialized():
        dist.barrier()  # the first process writes best.pt, all read it
    if "val" in run.splits and best.is_file():
        run.model.load_state_dict(load_checkpoint(best)["state"])
    result = {"model": o.model, "task": o.task, "split": "test", "data": o.data, "steps": o.steps, "seed": o.seed}
    kept = [p for name, p in run.model.named_parameters() if not name.startswith("heads.hidden.")]  # see projections
    result["parameters"] = sum(p.numel() for p in kept)
    result["seconds"] = round(progress["seconds"], 1)
    result["examples_per_second"] = round(progress["examples"] / max(1e-9, progress["seconds"]), 1)
    result["chance"] = {}
    for split in sorted(set(run.splits) & {"test", "compose"}, reverse=True):
        metrics, chance = evaluate(run, run.splits[split])
        say(table(f"{o.model} {o.task}, split {split}, {len(run.splits[split])} examples", metrics, chance))
        prefix = "" if split == "test" else f"{split}_"
        result |= {prefix + name: round(float(value), 5) for name, value in metrics.items()}
        result["chance"] |= {prefix + name: round(float(value), 5) for name, value in chance.items()}
    if "itc" in run.model.heads:
        result["temperature"] = round(math.exp(-run.model.heads["itc"].log_scale.item()), 5)
    if o.rerank and "test" in run.splits:
        result |= compare_stages(run, run.splits["test"])
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
            if not name.startswith("accuracy_"):
                shown.append(f"{name} {value:.3f}" if name.endswith("_loss") else f"{name} {percent(value)}{beside}")
        say(f"step {step:5d}/{self.run.o.steps}  val: {', '.join(shown)}; {seconds:.0f} s")
        self.write({"step": step, "split": "val", **metrics, "chance": chance})

    def write(self, record):
        if self.run.rank == 0:
            with self.file.open("a") as file:
                file.write(json.dumps(record, default=float) + "\n")


def percent(share):
    """0.123 -> 12.3%."""
    return f"{100 * share:.1f}%"


def table(title, metrics, chance):
    """Metrics in a column, chance beside each."""
    lines = [f"\n{title}", f"  {'':24s} {'':>8s} {'chance':>8s}"]
    for name, value in metrics.items():
        shown = f"{value:.4f}" if name.endswith("_loss") else percent(value)
        lines.append(f"  {name:24s} {shown:>8s} {percent(chance[name]) if name in chance else '':>8s}".rstrip())
    return "\n".join(lines)


def describe(run):
    """The final configuration, once."""
    o, size = run.o, sum(p.numel() for p in run.model.parameters())
    counts = ", ".join(f"{name} {len(split)}" for name, split in run.splits.items())
    each = run.splits["train"].lengths().mean(0)
    say(f"model    {o.model} {o.size}, {size / 1e6:.2f} M parameters: {run.model.config}")
    say(f"data     {o.data}: {counts} examples; {each[0]:.1f} words and {each[1]:.1f} regions each")
    say(f"run      {o.steps} steps of {o.batch_size} x {o.accumulate} x {run.world} examples, lr {o.lr:g}, seed {o.seed}, "
        f"{', '.join(run.objectives)}; {run.device}, {str(run.dtype).removeprefix('torch.')}; to {o.out}")  # fmt: skip


def compare(results, out):
    """Mean and spread over seeds of each metric, a column a model; "tie" where the spread covers the difference.
    Printed, and written as comparison.json and comparison.md."""
    models = list(dict.fromkeys(r["model"] for r in results))
    shares = dict.fromkeys(
        n for r in results for n in r["chance"] if not n.startswith(("accuracy_", "compose_accuracy_"))
    )
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
    """Writes a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def save_checkpoint(run, name):
    """All that is needed to go on or to predict, written to a temporary name, then renamed."""
    if run.rank:
        return
    config = asdict(run.model.config)
    content = {
        "model": run.o.model,
        "task": run.o.task,
        "config": {key: list(value) if isinstance(value, tuple) else value for key, value in config.items()},
        "state": run.model.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "rng": torch.get_rng_state(),
        "progress": dict(run.progress),
        "tokenizer": run.tokenizer.to_str(),
        "answers": run.answers,
    }
    run.o.out.mkdir(parents=True, exist_ok=True)
    torch.save(content, run.o.out / (name + ".tmp"))
    os.replace(run.o.out / (name + ".tmp"), run.o.out / name)


def load_checkpoint(path):
    """A checkpoint of `save_checkpoint`, on the CPU. Stop if it is missing, damaged or something else."""
    path = Path(path)
    if not path.is_file():
        raise Stop(f"{path}: no such checkpoint file")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        raise Stop(f"{path}: not a checkpoint of train.py ({type(error).__name__})") from None
    if not isinstance(content, dict) or not {"model", "config", "state", "tokenizer", "answers"} <= set(content):
        raise Stop(f"{path}: not a checkpoint of train.py (it lacks model, config, state, tokenizer or answers)")
    return content


# ---- main ------------------------------------------------------------------------------------------------------


def main(argv=None):
    """Runs every model and seed asked for. Exit code 0, or 2 with one line on stderr."""
    try:
        options = parse(argv)
        models = list(PAPERS) if options.model == "all" else [options.model]
        runs = [settle(options, m, s) for m in models for s in range(options.seed, options.seed + options.seeds)]
        results = [train(o) for o in runs]
        if len(results) > 1:
            compare(results, Path(options.out or f"out/{options.model}-{options.task}"))
        if dist.is_initialized():
            dist.barrier()  # a process that leaves early breaks the others' last reduction
    except (Stop, data.DataError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
