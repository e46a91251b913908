"""train.py: one plain loop that pretrains, fine-tunes, evaluates and compares the three models.

    python train.py --model uniter                                    pretrain on the built-in scenes
    python train.py --model uniter --task vqa --init out/uniter-pretrain/checkpoint.pt
    python train.py --model uniter --task vqa --data my.jsonl         your own pictures and questions
    python train.py --model all --task vqa --seeds 3                  compare the models, with the spread over seeds
    torchrun --nproc_per_node=2 train.py --model uniter               several processes, the same gradients

Read top to bottom: options, device and processes, data, model, optimizer, evaluation, loop, files, main.
Every mean in a loss is a mean over the whole step, whatever its split: `--accumulate 2` in one process and
`--accumulate 1` in two give the same gradients, because each part is weighted by its share of the masked words,
masked regions or rows.
"""

import argparse
import json
import math
import os
import signal
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

import common
import data
import uniter

PAPERS = {"uniter": (uniter, uniter.UNITER)}
TASKS = ("pretrain", "vqa")
MASKED_WORDS, MASKED_REGIONS, PAIRS = {"mlm"}, {"mrfr", "mrc", "mrc_kl", "attr", "nce"}, {"itm", "wra"}

# ---- options ---------------------------------------------------------------------------------------------------


class Stop(Exception):
    """Ends the program with one line on stderr and exit code 2."""


def parse(argv=None):
    """The command line. Where a default depends on the task or the size, it is None here and set by `settle`."""
    parser = argparse.ArgumentParser(
        description="Pretrain, fine-tune and compare UNITER, ViLBERT and LXMERT.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--model", default="uniter", choices=[*PAPERS, "all"], help="which paper; all: one after the other, compared")
    add("--task", default="pretrain", choices=TASKS, help="what to train for")
    add("--data", default="scenes", help="scenes (built in) or a .jsonl file of your own")
    add("--size", default="tiny", choices=["tiny", "base", "large"], help="preset of layer sizes")
    add("--init", metavar="CKPT", help="start from this checkpoint; {model} and {seed} in the name are filled in")
    add("--resume", action="store_true", help="go on from DIR/checkpoint.pt, exactly where it stopped")
    add("--out", metavar="DIR", help="folder for checkpoint, log and result (default: out/MODEL-TASK)")
    add("--steps", type=int, help="optimizer steps (default: about five minutes on two CPU cores)")
    add("--batch-size", type=int, default=128, help="examples in one forward pass of one process")
    add("--accumulate", type=int, default=1, help="forward passes of one process in an optimizer step")
    add("--lr", type=float, help="peak learning rate (default: by size and task)")
    add("--warmup", type=float, default=0.1, help="part of the steps in which the rate rises")
    add("--weight-decay", type=float, default=0.01, help="AdamW's, on weight matrices only")
    add("--clip", type=float, default=5.0, help="largest gradient norm")
    add("--dropout", type=float, help="dropout of the trunk (default: by size)")
    add("--objectives", help="pretraining objectives, a,b,c (default: the paper's own)")
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
    for name in ("steps", "batch_size", "accumulate", "seeds", "limit", "eval_every", "log_every", "patch", "grid"):
        if getattr(options, name) is not None and getattr(options, name) < (0 if name == "steps" else 1):
            raise Stop(f"--{name.replace('_', '-')} must be positive, not {getattr(options, name)}")
    return options


def settle(options, model_name, seed):
    """One run's own options: model and seed fixed, defaults that depend on them filled in. Returns a new namespace."""
    o = argparse.Namespace(**vars(options))
    o.model, o.seed = model_name, seed
    base = Path(o.out or f"out/{model_name}-{o.task}")
    if o.out and options.model == "all":
        base = base / model_name
    o.out = base / f"seed{seed}" if options.seeds > 1 else base
    if o.steps is None:
        o.steps = {"pretrain": 3000, "vqa": 3000}[o.task] if o.data == "scenes" else 1000
    o.lr = o.lr or {"tiny": 1e-3, "base": 5e-5, "large": 3e-5}[o.size]
    o.eval_every = o.eval_every or max(1, math.ceil(o.steps / 5))
    o.init = o.init.format(model=model_name, seed=seed) if o.init else None
    return o


# ---- device and processes --------------------------------------------------------------------------------------


def processes():
    """(rank, world) under torchrun, (0, 1) without. NCCL between GPUs, gloo between CPUs."""
    if "RANK" not in os.environ or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return 0, 1
    if not dist.is_initialized():
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    return dist.get_rank(), dist.get_world_size()


def pick_device(name, rank=0):
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


def pick_dtype(name, device, size):
    """float32 or bfloat16. `auto`: bfloat16 on a GPU that has it, and on a CPU that multiplies it natively if the
    matrices are large enough to gain: at the tiny size the casts cost more than the products save."""
    if name != "auto":
        return {"f32": torch.float32, "bf16": torch.bfloat16}[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    if (
        device.type == "cpu"
        and size != "tiny"
        and any("bf16" in k and v for k, v in torch.cpu.get_capabilities().items())
    ):
        return torch.bfloat16
    return torch.float32


def total(values, device):
    """The sum over all processes of a list of numbers, as a list."""
    if not dist.is_initialized():
        return list(values)
    tensor = torch.tensor(values, dtype=torch.float64, device=device if device.type == "cuda" else "cpu")
    dist.all_reduce(tensor)
    return tensor.tolist()


# ---- data ------------------------------------------------------------------------------------------------------


def objectives_of(o, paper):
    """The pretraining objectives of this run, {name: ratio}, with those joined to another one counted in."""
    known = {**dict.fromkeys(paper.OBJECTIVES, 1), **paper.PRETRAINING["objectives"]}
    if o.objectives is None:
        joined = [name for names in paper.PRETRAINING["joined"].values() for name in names]
        return {**paper.PRETRAINING["objectives"], **dict.fromkeys(joined, 0)}
    names = o.objectives.split(",")
    allowed = sorted((MASKED_WORDS | MASKED_REGIONS | PAIRS | {"qa"}) & set(known))
    for name in names:
        if name not in allowed:
            raise Stop(f"--objectives: {o.model} has no pretraining objective {name!r}; it has {', '.join(allowed)}")
    if "wra" in names and "itm" not in names:
        raise Stop("--objectives: wra needs the pairs of itm; write itm,wra")
    return {name: known[name] for name in names}


def read_data(o, objectives):
    """The splits of the task: {"train": Dataset, "val": ..., "test": ...}, scenes with "compose" besides."""
    task = o.task
    if task == "pretrain" and "qa" not in objectives:
        task = "caption"  # questions join pretraining only where answering them is an objective
    names = ["train", "val", "test", "compose"] if o.data == "scenes" else ["train", "val", "test"]
    splits = {
        name: data.load(o.data, task, name, o.limit if name == "train" else None, o.patch, o.grid) for name in names
    }
    if not len(splits["train"]):
        raise Stop(f"{o.data}: no example of split train for --task {o.task}")
    return {name: split for name, split in splits.items() if len(split)}


def encode_texts(o, splits, checkpoint):
    """The tokenizer (the checkpoint's, a file's, or trained on the training texts); gives every split its tokens."""
    if checkpoint:
        tokenizer = data.tokenizer_from_json(checkpoint["tokenizer"])
    else:
        tokenizer = data.read_tokenizer(o.vocab) if o.vocab else data.train_tokenizer(splits["train"].text)
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


def pretraining_batch(dataset, index, names, paper, tokenizer, rng, **masking):
    """Examples `index` as the objectives `names` need them: pairs mismatched, words masked, regions masked."""
    images, matched = None, None
    if PAIRS & set(names):
        index, images, matched = data.mismatch(dataset, index, rng, replace=paper.PRETRAINING["mismatch"])
    batch = data.collate(dataset, index, images)
    batch.matched = batch.matched if matched is None else matched
    if MASKED_WORDS & set(names):
        batch = data.mask_words(batch, tokenizer, rng, **masking)
    if MASKED_REGIONS & set(names):
        batch = data.mask_regions(batch, rng, **paper.PRETRAINING["region_masking"])
    return batch


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
    """Endless batches of example indices, in an order that depends on seed and epoch alone. `skip`: how many were
    used before a resume; whole epochs are passed over without being read."""
    for epoch in range(10**9):
        order = data.batches(dataset.lengths(), np.random.default_rng((o.seed, epoch)), size=o.batch_size)
        if not order:  # fewer examples than one batch
            order = [np.arange(len(dataset))]
        if skip >= len(order):
            skip -= len(order)
            continue
        yield from order[skip:]
        skip = 0


# ---- model -----------------------------------------------------------------------------------------------------


def heads_of(paper, objectives):
    """The heads that these objectives use: mrc_kl shares mrc's, wra needs none."""
    names = [{"mrc_kl": "mrc"}.get(name, name) for name in objectives]
    return tuple(dict.fromkeys(name for name in names if name in paper.HEADS))


def build(o, paper, heads, checkpoint, tokenizer, dataset, answers):
    """The model: from a checkpoint's config with this task's heads, or from the preset and the data's own sizes."""
    module, cls = paper
    store = dataset.store
    sizes = {
        **module.PRESETS[o.size],
        "vocab_size": tokenizer.get_vocab_size(),
        "feature_size": store.width,
        "classes": store.classes or 2,
    }
    if checkpoint:
        if checkpoint["model"] != o.model:
            raise Stop(f"--init: a {checkpoint['model']} checkpoint does not fit --model {o.model}")
        sizes = dict(checkpoint["config"])
        if sizes["feature_size"] != store.width:
            raise Stop(
                f"--init: trained on features of width {sizes['feature_size']}, {o.data} has {store.width}; "
                "use the same kind of features, or for pixels the same --patch"
            )
    sizes.update(heads=tuple(heads), answers=max(1, len(answers)))
    if o.dropout is not None:
        sizes["dropout"] = o.dropout
    torch.manual_seed(o.seed)
    model = cls(module.Config(**sizes))
    if checkpoint:
        model.load_state_dict(fitting(model, checkpoint["state"], same_answers=checkpoint["answers"] == answers))
    return model


def fitting(model, state, same_answers):
    """A full state for `model`: the checkpoint's tensors where the name and shape agree, its own initial ones for new
    heads. Says what was loaded; Stop if anything but a head would stay at random. An answer head is only kept for the
    same list of answers: its rows mean nothing under another one."""
    own, heads = model.state_dict(), ("heads.vqa", "heads.qa")
    state = {k: v for k, v in state.items() if same_answers or not k.startswith(heads)}
    loaded = [k for k in own if k in state and state[k].shape == own[k].shape]
    fresh, ignored = [k for k in own if k not in loaded], [k for k in state if k not in loaded]
    lost = [k for k in fresh if not k.startswith("heads.")]
    if lost:
        raise Stop(f"--init: {len(lost)} tensors of the trunk are missing or of another shape, first {lost[0]}")
    heads_of = lambda names: ", ".join(sorted({".".join(n.split(".")[:2]) for n in names})) or "none"
    say(f"init     {len(loaded)} tensors loaded; at random: {heads_of(fresh)}; ignored: {heads_of(ignored)}")
    return {k: state[k] if k in loaded else own[k] for k in own}


# ---- optimizer -------------------------------------------------------------------------------------------------


def make_optimizer(model, weight_decay, head_scale=1.0):
    """AdamW as the papers set it: betas .9 and .98, decay on matrices, none on biases and norms.

    Each group has a `scale` of the learning rate: fresh task heads may learn `head_scale` times faster.
    """
    groups = {}
    for name, parameter in model.named_parameters():
        scale = head_scale if name.startswith("heads.") else 1.0
        groups.setdefault((parameter.ndim > 1, scale), []).append(parameter)
    groups = [{"params": p, "weight_decay": weight_decay * decays, "scale": s} for (decays, s), p in groups.items()]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), eps=1e-6, fused=True)


def learning_rate(step, peak, warmup, steps):
    """Linear warm-up, then linear decay: the rate of optimizer step 1, 2, ..., `steps`; never under 1e-8.

    warmup: in steps. peak x step / warmup, then peak x (steps - step) / (steps - warmup).
    """
    if step < warmup:
        return peak * step / warmup
    return max(1e-8, peak * (steps - step) / max(1, steps - warmup))


def set_rate(optimizer, step, rate):
    """The rate of step 1, 2, ... for every group. The official AdamW adds eps before it corrects the second moment's
    bias, torch's after; dividing eps by that correction makes the two equal."""
    for group in optimizer.param_groups:
        group["lr"], group["eps"] = rate * group["scale"], 1e-6 / math.sqrt(1 - group["betas"][1] ** step)


def items(name, batch):
    """How many items the mean of an objective's loss runs over."""
    if name in MASKED_WORDS:
        return len(batch.word_index)
    return len(batch.region_index) if name in MASKED_REGIONS else len(batch.text)


def backward(model, batches, names, weights, device, autocast):
    """Gradients of one step's loss, mean over ALL its parts: micro-batches here and in the other processes.

    Each part's mean counts by its share of the items, so that the sum of the parts is the mean of the whole; the
    gradients of the processes are then added up, once. Returns {name: loss of the step}, 0-d tensors.
    """
    counts = [[items(name, batch) for name in names] for batch in batches]
    totals = total([sum(column) for column in zip(*counts, strict=True)], device)
    losses = {name: torch.zeros((), device=device) for name in names}
    for batch, count in zip(batches, counts, strict=True):
        with autocast():
            parts = model(batch.to(device), names)
        shares = {name: n / max(1.0, t) for name, n, t in zip(names, count, totals, strict=True)}
        loss = sum(weights.get(name, 1.0) * shares[name] * parts[name][0] for name in names)
        loss.backward()
        for name in names:
            losses[name] += parts[name][0].detach() * shares[name]
    if dist.is_initialized():
        # one flat vector, one reduction; a head without a gradient is unused in every process alike
        tensors = [p.grad for p in model.parameters() if p.grad is not None] + list(losses.values())
        flat = torch.cat([t.flatten() for t in tensors])
        dist.all_reduce(flat)
        for tensor, piece in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(piece.view_as(tensor))
    return losses


# ---- evaluation ------------------------------------------------------------------------------------------------


class Evaluation:
    """Model, data and arithmetic for the metrics of one split; `pretrain` and `vqa` return (metrics, chance)."""

    def __init__(self, o, paper, model, tokenizer, answers, device, autocast):
        self.o, self.paper, self.model, self.tokenizer, self.answers = o, paper, model, tokenizer, answers
        self.device, self.autocast = device, autocast
        self.rank, self.world = processes()

    def run(self, batch, names):
        with torch.no_grad(), self.autocast():
            return self.model(ablate(batch, self.o.ablate).to(self.device), names)

    def parts(self, dataset, index):
        """The examples `index` in batches of like lengths; each process takes its own batches."""
        lengths = dataset.lengths()[index]
        for part in data.batches(lengths, size=256, rank=self.rank, world=self.world):
            yield index[part]

    def pretrain(self, dataset, objectives, examples=1000, candidates=100):
        """Each objective on held-out captions, under a fixed seed, and zero-shot retrieval among `candidates` pictures.

        Losses are means over parts; accuracies are over masked words, regions or pairs. Content words are those that
        only the picture tells (colour, shape, size, number, relation). Beside each: what a blind guess gets.
        """
        sums, names = {}, [n for n in objectives if n != "qa"]
        captions = np.flatnonzero(np.array(dataset.kind) == "caption")
        first = captions[np.unique(dataset.image[captions], return_index=True)[1]]  # one caption a picture
        content = torch.zeros(self.tokenizer.get_vocab_size(), dtype=torch.bool)
        content[[i for w in data.CONTENT_WORDS if (i := self.tokenizer.token_to_id(w)) is not None]] = True
        for index in self.parts(dataset, first[:examples]):
            rng = np.random.default_rng((1, int(index[0])))
            for name in names:
                batch = pretraining_batch(dataset, index, [name], self.paper, self.tokenizer, rng)
                self.count(sums, name, batch, self.run(batch, [name])[name])
            if "mlm" in names and content.any():
                batch = pretraining_batch(dataset, index, ["mlm"], self.paper, self.tokenizer, rng, only=content)
                self.count(sums, "mlm_content", batch, self.run(batch, ["mlm"])["mlm"])
        metrics, chance = self.finish(sums)
        if "itm" in names:
            recall, guess = self.retrieval(dataset, first[:candidates])
            metrics, chance = {**metrics, **recall}, {**chance, **guess}
        return metrics, chance

    def count(self, sums, name, batch, result):
        """Adds a batch's loss, hits and the labels' frequencies to `sums[name]`."""
        loss, scores = result
        objective = name.removesuffix("_content")
        n = items(objective, batch)
        entry = sums.setdefault(name, {"loss": 0.0, "n": 0, "hits": 0, "labels": np.zeros(1)})
        entry["loss"], entry["n"] = entry["loss"] + float(loss) * n, entry["n"] + n
        labels = None
        if objective == "mlm":
            labels = batch.word_labels
        elif objective in ("mrc", "mrc_kl"):
            labels = common.at(batch.object_probs, batch.region_index)[:, 1:].argmax(-1) + 1
        elif objective == "itm":
            labels = batch.matched
        if labels is not None:
            entry["hits"] += int((scores.argmax(-1).cpu() == labels).sum())
            entry["labels"] = entry["labels"] + np.bincount(labels.numpy(), minlength=scores.shape[-1])

    def finish(self, sums):
        """Sums over the processes to metrics; chance is the share of the most frequent label."""
        metrics, chance = {}, {}
        for name, entry in sums.items():
            loss, n, hits, *labels = total([entry["loss"], entry["n"], entry["hits"], *entry["labels"]], self.device)
            metrics[f"{name}_loss"] = loss / max(1, n)
            if len(labels) > 1:
                metrics[f"{name}_accuracy"], chance[f"{name}_accuracy"] = hits / max(1, n), max(labels) / max(1, n)
        return metrics, chance

    def retrieval(self, dataset, index):
        """Zero-shot: every caption with every picture through the matching head, ranked by log odds of a match."""
        n = len(index)
        scores = torch.zeros(n, n, dtype=torch.float64)
        for row in range(self.rank, n, self.world):
            batch = data.collate(dataset, np.full(n, index[row]), dataset.image[index])
            logits = self.run(batch, ["itm"])["itm"][1].float().cpu()
            scores[row] = logits[:, 1] - logits[:, 0]
        if dist.is_initialized():
            dist.all_reduce(scores)
        recalls = common.recall_at(scores, torch.arange(n))
        return recalls, {name: int(name.rsplit("r", 1)[1]) / n for name in recalls}

    def vqa(self, dataset, frequent):
        """Accuracy: the soft score of the answer with the highest logit, mean over questions, also for each kind.

        Chance: always the training split's most frequent answer, `frequent`.
        """
        hits, kinds = np.zeros(len(dataset)), np.array(dataset.kind)
        for index in self.parts(dataset, np.arange(len(dataset))):
            batch = data.collate(dataset, index, answers=self.columns())
            best = self.run(batch, ["vqa"])["vqa"][1].argmax(-1).cpu().tolist()
            hits[index] = [dataset.answer[i].get(self.answers[b], 0.0) for i, b in zip(index, best, strict=True)]
        hits = np.array(total(hits, self.device))
        guess = np.array([answer.get(frequent, 0.0) for answer in dataset.answer])
        groups = {"accuracy": np.ones(len(dataset), bool)}
        groups |= {f"accuracy_{kind}": kinds == kind for kind in sorted(set(kinds)) if len(set(kinds)) > 1}
        return {k: hits[g].mean() for k, g in groups.items()}, {k: guess[g].mean() for k, g in groups.items()}

    def columns(self):
        return {answer: column for column, answer in enumerate(self.answers)}


# ---- loop ------------------------------------------------------------------------------------------------------


def say(text):
    """A line on stdout, from the first process only."""
    if processes()[0] == 0:
        print(text, flush=True)


def train(o):
    """One run: reads the data, builds or restores the model, trains, evaluates. Returns what goes to result.json."""
    module, _ = paper = PAPERS[o.model]
    rank, world = processes()
    device = pick_device(o.device, rank)
    dtype = pick_dtype(o.dtype, device, o.size)
    autocast = (lambda: torch.autocast(device.type, dtype)) if dtype != torch.float32 else nullcontext
    last = o.out / "checkpoint.pt"
    if o.resume and not last.is_file():
        raise Stop(f"--resume: there is no {last}; start without --resume, or give the --out of the stopped run")
    checkpoint = load_checkpoint(last if o.resume else o.init) if o.resume or o.init else None

    objectives = objectives_of(o, module) if o.task == "pretrain" else {}
    heads = heads_of(module, objectives or {o.task: 1})
    splits = read_data(o, objectives)
    tokenizer = encode_texts(o, splits, checkpoint)
    answers = checkpoint["answers"] if o.resume else data.answer_list(splits["train"]) if o.task == "vqa" else []
    frequent = answers[0] if answers else ""
    model = build(o, paper, heads, checkpoint, tokenizer, splits["train"], answers).to(device)
    optimizer = make_optimizer(model, o.weight_decay)
    evaluation = Evaluation(o, module, model, tokenizer, answers, device, autocast)
    evaluate = (
        (lambda d: evaluation.vqa(d, frequent)) if o.task == "vqa" else lambda d: evaluation.pretrain(d, objectives)
    )
    state = {"step": 0, "seconds": 0.0, "best": -math.inf}
    if o.resume:
        optimizer.load_state_dict(checkpoint["optimizer"])
        torch.set_rng_state(checkpoint["rng"])
        state = checkpoint["progress"]
    describe(o, model, splits, device, dtype, world)
    save = lambda name: save_checkpoint(o, name, model, optimizer, tokenizer, answers, state)
    loop(o, module, model, optimizer, splits, tokenizer, answers, objectives, evaluate, state, save, device, autocast)
    return finish(o, model, splits, evaluate, state, device)


def loop(o, paper, model, optimizer, splits, tokenizer, answers, objectives, evaluate, state, save, device, autocast):
    """The steps: batches, gradients, clipping, update; a line every `log_every`, an evaluation every `eval_every`."""
    rank, world = processes()
    slots, columns = world * o.accumulate, {answer: column for column, answer in enumerate(answers)}
    order = stream(o, splits["train"], slots, skip=state["step"] * slots)
    log = Log(o, state, world)
    if state["step"] == 0:
        validate(o, splits, evaluate, state, save, log)
    with interruptible() as interrupted:
        while state["step"] < o.steps:
            start, step = time.perf_counter(), state["step"] + 1
            step_rng = np.random.default_rng((o.seed, step))  # the same in every process
            names = step_objectives(paper, objectives, step_rng) if o.task == "pretrain" else [o.task]
            batches = []
            for slot, index in enumerate([next(order) for _ in range(slots)]):
                if slot // o.accumulate != rank:
                    continue
                rng = np.random.default_rng((o.seed, step, slot))
                if o.task == "pretrain":
                    batch = pretraining_batch(splits["train"], index, names, paper, tokenizer, rng)
                else:
                    batch = data.collate(splits["train"], index, answers=columns)
                batches.append(ablate(batch, o.ablate))
            ready = time.perf_counter()
            model.train()
            losses = backward(model, batches, names, paper.PRETRAINING["weights"], device, autocast)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), o.clip)
            rate = learning_rate(step, o.lr, o.warmup * o.steps, o.steps)
            set_rate(optimizer, step, rate)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            state["step"] = step
            log.add(step, losses, norm, batches, ready - start, time.perf_counter() - start)
            if step % o.log_every == 0 or step == o.steps:
                log.line(rate)
            if step % o.eval_every == 0 or step == o.steps:
                log.check()
                validate(o, splits, evaluate, state, save, log)
            if interrupted():
                log.check()
                save("checkpoint.pt")
                raise Stop(f"interrupted after step {step}; go on with --resume")
    say(f"data     {100 * log.waited / max(1e-9, log.worked):.1f}% of the training time spent waiting for it")


class interruptible:
    """Inside the block, Ctrl-C and SIGTERM only set a flag, so that the step in progress ends and is saved."""

    def __enter__(self):
        self.flag = False
        self.before = {s: signal.signal(s, self.set) for s in (signal.SIGINT, signal.SIGTERM)}
        return lambda: self.flag

    def set(self, *_):
        self.flag = True

    def __exit__(self, *_):
        for s, handler in self.before.items():
            signal.signal(s, handler)


def validate(o, splits, evaluate, state, save, log):
    """Evaluates the val split, keeps the best weights, and writes the checkpoint to go on from."""
    if "val" in splits:
        start = time.perf_counter()
        metrics, chance = evaluate(splits["val"])
        score = sum(value for name, value in metrics.items() if name.endswith("accuracy"))
        state["best"], better = max(state["best"], score), score > state["best"]
        log.metrics("val", metrics, chance, time.perf_counter() - start)
        if better:
            save("best.pt")
    if state["step"]:
        save("checkpoint.pt")


def finish(o, model, splits, evaluate, state, device):
    """Test metrics of the best weights (the last ones where there is no val split), as result.json has them."""
    best = o.out / "best.pt"
    if "val" in splits and best.is_file():
        model.load_state_dict(load_checkpoint(best)["state"])
    result = {"model": o.model, "task": o.task, "split": "test", "data": o.data, "steps": o.steps, "seed": o.seed}
    result["parameters"] = sum(p.numel() for p in model.parameters())
    result |= {"seconds": round(state["seconds"], 1), "examples_per_second": round(state.get("rate", 0.0), 1)}
    chance_of = {}
    for split in ("test", "compose"):
        if split not in splits or (split == "compose" and o.task == "pretrain"):
            continue
        metrics, chance = evaluate(splits[split])
        prefix = "" if split == "test" else f"{split}_"
        say(table(f"{o.model} {o.task}, split {split}, {len(splits[split])} examples", metrics, chance))
        result |= {prefix + name: round(float(value), 5) for name, value in metrics.items()}
        chance_of |= {prefix + name: round(float(value), 5) for name, value in chance.items()}
    result["chance"] = chance_of
    if processes()[0] == 0:
        write(o.out / "result.json", json.dumps(result, indent=1) + "\n")
    return result


# ---- files and printing ----------------------------------------------------------------------------------------


class Log:
    """Progress lines and log.jsonl. Losses stay on the device until a line is due, so that no step waits for them."""

    def __init__(self, o, state, world):
        self.o, self.state, self.world, self.pending = o, state, world, []
        self.waited = self.worked = 0.0
        self.first = processes()[0] == 0
        self.file = o.out / "log.jsonl"
        if self.first:
            o.out.mkdir(parents=True, exist_ok=True)
            kept = self.file.read_text().splitlines() if o.resume and self.file.is_file() else []
            kept = [line for line in kept if json.loads(line)["step"] <= state["step"]]
            write(self.file, "".join(line + "\n" for line in kept))

    def add(self, step, losses, norm, batches, waited, worked):
        ids = [i for batch in batches for i in batch.ids]
        self.pending.append((step, losses, norm, ids))
        self.waited, self.worked = self.waited + waited, self.worked + worked
        self.state["seconds"] += worked
        self.seen = getattr(self, "seen", 0) + len(ids) * self.world

    def check(self):
        """Stop at the first loss or gradient norm that is not finite, naming step, objective and examples."""
        for step, losses, norm, ids in self.pending:
            bad = [name for name, loss in losses.items() if not math.isfinite(loss)]
            if bad or not math.isfinite(norm):
                what = f"loss of {bad[0]}" if bad else f"gradient norm ({', '.join(losses)})"
                raise Stop(f"step {step}: the {what} is not finite; lower --lr? Examples: {', '.join(ids[:8])} ...")

    def line(self, rate):
        """Mean loss of each objective since the last line, rate, speed and time left; the same to log.jsonl."""
        self.check()
        o, step, values = self.o, self.state["step"], {}
        for _, losses, _, _ in self.pending:
            for name, loss in losses.items():
                values.setdefault(name, []).append(float(loss))
        values = {name: sum(v) / len(v) for name, v in values.items()}
        norm = float(self.pending[-1][2])
        self.pending = []
        self.state["rate"] = speed = self.seen / max(1e-9, self.worked)
        left = (o.steps - step) * self.worked / max(1, self.seen / (o.batch_size * o.accumulate * self.world))
        text = "  ".join(f"{name} {value:.3f}" for name, value in values.items())
        say(f"step {step:5d}/{o.steps}  {text}  lr {rate:.1e}  {speed:.0f} examples/s  {clock(left)} left")
        self.write({"step": step, "lr": rate, "grad_norm": norm, "examples_per_second": round(speed, 1), **values})

    def metrics(self, split, metrics, chance, seconds):
        step = self.state["step"]
        text = "  ".join(
            shown(n, v, chance.get(n)) for n, v in metrics.items() if "_" not in n or not n.startswith("accuracy_")
        )
        say(f"step {step:5d}/{self.o.steps}  {split}: {text}  ({seconds:.0f} s)")
        self.write(
            {"step": step, "split": split, **{n: round(float(v), 5) for n, v in metrics.items()}, "chance": chance}
        )

    def write(self, record):
        if self.first:
            with self.file.open("a") as f:
                f.write(json.dumps(record, default=float) + "\n")


def clock(seconds):
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def shown(name, value, chance=None):
    """A metric for people: shares in percent, with chance beside; losses as they are."""
    if name.endswith("_loss"):
        return f"{name} {value:.3f}"
    return f"{name} {100 * value:.1f}%" + ("" if chance is None else f" (chance {100 * chance:.1f}%)")


def table(title, metrics, chance):
    """Metrics in a column, chance beside each."""
    lines = [f"{title}", f"  {'':28s} {'value':>8s} {'chance':>8s}"]
    for name, value in metrics.items():
        percent = not name.endswith("_loss")
        a = f"{100 * value:.1f}%" if percent else f"{value:.4f}"
        b = f"{100 * chance[name]:.1f}%" if name in chance else ""
        lines.append(f"  {name:28s} {a:>8s} {b:>8s}")
    return "\n".join(lines)


def describe(o, model, splits, device, dtype, world):
    """The final configuration, once."""
    parameters = sum(p.numel() for p in model.parameters())
    say(f"model    {o.model} {o.size}, {parameters / 1e6:.2f} M parameters: {model.config}")
    counts = ", ".join(f"{name} {len(split)}" for name, split in splits.items())
    say(f"data     {o.data}: {counts} examples; {splits['train'].lengths().mean():.1f} words and regions each")
    say(
        f"run      {o.steps} steps of {o.batch_size} x {o.accumulate} x {world} examples, seed {o.seed}, lr {o.lr:g}, {device}, {dtype}, to {o.out}"
    )


def write(path, text):
    """Writes a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def save_checkpoint(o, name, model, optimizer, tokenizer, answers, state):
    """All that is needed to go on or to predict, written to a temporary name, then renamed."""
    if processes()[0]:
        return
    o.out.mkdir(parents=True, exist_ok=True)
    config = asdict(model.config)
    content = {
        "model": o.model,
        "task": o.task,
        "config": {**config, "heads": list(config["heads"])},
        "state": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "rng": torch.get_rng_state(),
        "progress": dict(state),
        "tokenizer": tokenizer.to_str(),
        "answers": answers,
        "options": {k: v if isinstance(v, int | float | str | None) else str(v) for k, v in vars(o).items()},
    }
    temporary = o.out / (name + ".tmp")
    torch.save(content, temporary)
    os.replace(temporary, o.out / name)


def load_checkpoint(path):
    """A checkpoint of `save_checkpoint`, on the CPU. Stop if it is missing, damaged or something else."""
    path = Path(path)
    if not path.is_file():
        raise Stop(f"{path}: no such checkpoint file")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged file
        raise Stop(f"{path}: not a checkpoint of train.py ({type(error).__name__})") from None
    if not isinstance(content, dict) or not {"model", "config", "state", "tokenizer", "answers"} <= set(content):
        raise Stop(f"{path}: not a checkpoint of train.py (no model, config, state, tokenizer and answers in it)")
    return content


def compare(results, out):
    """Mean and spread over seeds of each metric, a column a model; "tie" where the spread covers the difference."""
    models = list(dict.fromkeys(r["model"] for r in results))
    names = [n for n in results[0]["chance"] if not n.startswith("accuracy_")]
    names = ["parameters", "examples_per_second", *names]
    rows = {}
    for name in names:
        values = {m: [r[name] for r in results if r["model"] == m and name in r] for m in models}
        rows[name] = {
            m: {"mean": float(np.mean(v)), "spread": float(np.std(v, ddof=1)) if len(v) > 1 else None}
            for m, v in values.items()
            if v
        }
    lines = ["| | " + " | ".join(models) + " | best |", "|---|" + "---|" * (len(models) + 1)]
    for name, row in rows.items():
        cells = [cell(name, row.get(m)) for m in models]
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {winner(name, row)} |")
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
    spread = "" if entry["spread"] is None else f" ± {100 * entry['spread']:.1f}"
    return f"{100 * entry['mean']:.1f}{spread}"


def winner(name, row):
    """The best model, or "tie" where its lead over the second is no larger than their two spreads together."""
    if len(row) < 2 or name in ("parameters", "examples_per_second"):
        return ""
    (first, a), (_, b) = sorted(row.items(), key=lambda item: -item[1]["mean"])[:2]
    return "tie" if a["mean"] - b["mean"] <= (a["spread"] or 0.0) + (b["spread"] or 0.0) else first


def main(argv=None):
    """Runs every model and seed asked for. Exit code 0, or 2 with one line on stderr."""
    try:
        options = parse(argv)
        models = list(PAPERS) if options.model == "all" else [options.model]
        runs = [settle(options, m, s) for m in models for s in range(options.seed, options.seed + options.seeds)]
        results = [train(o) for o in runs]
        if len(results) > 1:
            compare(results, Path(options.out or f"out/{options.model}-{options.task}"))
    except (Stop, data.DataError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
