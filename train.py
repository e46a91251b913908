"""train.py: one plain loop that pretrains, fine-tunes and tests UNITER, ViLBERT and LXMERT.

    python train.py --model uniter                                    pretrain on the built-in scenes
    python train.py --model uniter --task vqa --init out/uniter-pretrain/checkpoint.pt
    python train.py --model uniter --task vqa --data my.jsonl         your own pictures and questions
    python train.py --model uniter --task vqa,refer,nlvr2             several tasks at once: one trunk, a head each
    python train.py --model all --task vqa --seeds 3                  compare the models, with the spread over seeds
    torchrun --nproc_per_node=2 train.py --model uniter               several processes, the same gradients
docs/usage.md has more commands. Read top to bottom: the run and its loop, then what they call: data, batches, model,
optimizer, evaluation and saving. In support/, options.py has the command line, machine.py devices and processes, and
log.py the log.

Every mean in a loss is a mean over the whole step, however the step is split (see `backward`). So `--accumulate 2` in
one process and `--accumulate 1` in two processes give the same gradients. There are two exceptions. The objective itc
contrasts each pair with the other pairs of one forward pass in all processes, so `--accumulate 2` has half as many
negatives. Dropout and the negatives of `nce` are drawn by torch, differently in each process.
"""

from support import interrupt  # noqa: F401, I001 (before torch, for Ctrl-C)
import argparse
import itertools
import json
import math
import os
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

import checkpoints
import common
import data
import distill
import tasks
from common import UserError
from support import contrast, distillation, evaluation, formats, machine, options, resume
from support.log import Log, describe_result, lock_folder, print_next_command, print_run, safe_output, warn_at_chance
from support.optimizer import AdamW

# ---- the run and its loop --------------------------------------------------------------------------------------


@dataclass
class Run:
    """State of one training run. `train` fills it in from top to bottom."""

    args: argparse.Namespace
    paper: object  # the model's module, see the table of models in checkpoints.py
    device: torch.device
    dtype: torch.dtype
    rank: int  # of this process
    world: int  # number of processes
    objectives: dict = None  # name -> ratio in which pretraining draws it, 0 if only joined; 1 in fine-tuning
    sets: dict = None  # task -> its splits, {name: data.Dataset}
    tokenizer: object = None
    content_words: list = field(default_factory=list)  # words that only the picture reveals, such as colours
    answers: list = None  # column -> answer, most frequent first
    usual_answers: dict = field(default_factory=dict)  # vqa: {kind of question: its most frequent answer}, for chance
    regions: dict = field(default_factory=dict)  # how the regions are made: see options.choose_regions
    model: torch.nn.Module = None
    optimizer: AdamW = None
    teacher: torch.nn.Module = None
    teacher_paper: object = None
    teacher_tasks: list = field(default_factory=list)
    fingerprint: dict = None  # what must not change on --resume
    distilled: tuple = ()  # objectives whose logits are distilled
    progress: dict = field(default_factory=lambda: {"step": 0, "seconds": 0.0, "examples": 0, "best": -math.inf})

    @property
    def splits(self):
        """The splits of the first task; in pretraining it is the only task."""
        return next(iter(self.sets.values()))

    def autocast(self):
        """Matrix products in self.dtype; the weights stay float32."""
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def answer_columns(self):
        """{answer: column} of the answers."""
        return {answer: column for column, answer in enumerate(self.answers)}


def train(args):
    """One run, from its options to the test. Returns the content of result.json."""
    rank, world = common.rank_and_world()
    device = machine.pick_device(args.device)
    paper = checkpoints.MODELS[args.model]
    run = Run(args, paper, device, machine.pick_dtype(args.dtype, device), rank, world)
    checkpoint = read_start(args)
    teacher = read_teacher_checkpoint(args, checkpoint)
    load_data(run, checkpoint, teacher)
    if teacher:
        distill.read_teacher(run, teacher)
    run.model = build_model(run, checkpoint).to(device)
    if args.resume:
        run.progress.update(checkpoint["progress"])  # after build_model, which sets random_heads anew
        if run.progress["step"] > args.steps:
            raise UserError(
                f"--resume: {args.out} has made {run.progress['step']} steps already, --steps is {args.steps}"
            )
    if teacher:
        distill.match_teacher(run, teacher)
    if args.lr is None:
        args.lr = options.default_learning_rate(paper, run.model.config.hidden, args, world)
    options.check_decay(args)
    if args.compile:
        machine.compile_layers(run.model)
    run.optimizer = AdamW(run.model, args.weight_decay, run.progress.get("at_random", ()), args.lr_new)
    run.fingerprint = resume.fingerprint(run)
    if args.resume:
        restore(run, checkpoint)
    else:
        machine.seed_dropout(run, [])
    if args.export_official:
        formats.export_official(args.model, run.model.state_dict())  # fails now, not after training
    print_run(run)
    machine.trim_memory()
    log = Log(run)
    if rank == 0 and not args.resume:
        resume.remove_earlier_run(args.out)
    training_loop(run, log)
    result = run_test(run)
    if args.export_official and rank == 0:
        checkpoints.save(formats.export_official(args.model, run.model.state_dict()), Path(args.export_official))
    return result


def training_loop(run, log):
    """All steps: batches, gradients, clipping, update. Logs every --log-every steps, validates every --eval-every."""
    args = run.args
    model = run.model
    progress = run.progress
    if progress["step"] == 0:
        set_temperature(run, 0.0)
        validate(run, log)
    prepared = prepared_steps(run)
    with machine.interruptible() as interrupted:
        for step in range(progress["step"] + 1, args.steps + 1):
            start = time.perf_counter()
            batches, names = next(prepared)
            waited = time.perf_counter() - start

            model.train()
            set_temperature(run, (step - 1) / max(1, args.steps - 1))
            losses = backward(run, batches, names)
            grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip)
            rate = learning_rate(step, args.lr, args.warmup * args.steps, args.steps)
            run.optimizer.step(rate)
            model.zero_grad(set_to_none=True)

            progress["step"] = step
            trained = tasks.heads_for(run.paper, names)
            progress["random_heads"] = [head for head in progress["random_heads"] if head not in trained]
            save_now = step == args.steps or step % args.eval_every == 0
            log_now = save_now or step % args.log_every == 0
            if log_now and run.device.type != "cpu":
                float(grad_norm)  # waits for the GPU: its remaining work belongs to the time of these steps
            log.add(losses, grad_norm, rate, batches, waited, time.perf_counter() - start)
            if log_now:
                log.line()  # before the checkpoint is saved: a resumed run has no losses of earlier steps
            if step % 50 == 0:
                machine.trim_memory()
            if save_now:
                validate(run, log)
            # all processes stop after the same step: one that went on would wait for the others for ever
            if common.all_reduce_sum([interrupted()])[0]:
                if not log_now:
                    log.line()
                checkpoints.save_checkpoint(run, checkpoints.NEWEST)
                raise KeyboardInterrupt(f"interrupted after step {step}, which is saved; go on with --resume")
    log.data_time()


def backward(run, batches, names):
    """Gradients of one step's loss, added up over processes in `.grad`. Returns {name: loss of the step}, 0-d tensors.

        L = sum_name w_name L_name,    L_name = sum_part (n_part / n) L_part,    n = sum_part n_part

    A part is one batch of `batches`, here or in another process. L_part is a mean over n_part items: masked words,
    masked regions, pairs or rows (`distill.items_of`). So L_name is the mean over all items of the step.
    w_name: the factor in PRETRAINING["loss_weights"], else 1; so too for a teacher's losses and in fine-tuning.
    names: the step's objectives, without a teacher's losses.
    """
    names_with_teacher = names + distill.distillation_losses(run, names)
    counts = []  # of each part: {name: n_part}
    for batch in batches:
        counts.append({name: distill.items_of(run.paper, name, batch) for name in names_with_teacher})
    items_here = [sum(count[name] for count in counts) for name in names_with_teacher]
    items_of_step = dict(zip(names_with_teacher, common.all_reduce_sum(items_here).tolist(), strict=True))
    losses = {name: torch.zeros((), device=run.device) for name in names_with_teacher}
    for batch, count in zip(batches, counts, strict=True):
        batch = batch.to(run.device)
        with run.autocast():
            if run.teacher is None:
                outputs = run.model(batch, names)
            else:
                outputs = distill.forward_with_teacher(run, batch, names)
        weighted_sum = 0.0
        for name in names_with_teacher:
            share = count[name] / max(1.0, items_of_step[name])
            loss, _ = outputs[name]
            weighted_sum = weighted_sum + run.paper.PRETRAINING["loss_weights"].get(name, 1.0) * share * loss
            losses[name] += loss.detach() * share
        weighted_sum.backward()
    if dist.is_initialized():
        all_reduce_gradients(run.model, losses)
    return losses


def all_reduce_gradients(model, losses):
    """Adds up gradients and losses over all processes, in place: one flat vector, one reduction.

    All processes train the same objectives in a step, so the same parameters have gradients everywhere.
    """
    tensors = [p.grad for p in model.parameters() if p.grad is not None]
    tensors += losses.values()
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat)
    pieces = flat.split([tensor.numel() for tensor in tensors])
    for tensor, piece in zip(tensors, pieces, strict=True):
        tensor.copy_(piece.view_as(tensor))


# ---- data ------------------------------------------------------------------------------------------------------


def load_data(run, checkpoint, teacher):
    """Fills in the run's objectives, regions, sets, content words, tokenizer and answers."""
    args = run.args
    run.objectives = options.objectives_of(args, run.paper)
    run.regions = options.choose_regions(args, checkpoint or teacher)
    run.sets = {}
    for task, (path, description) in zip(args.tasks, args.data_sets, strict=True):
        lines = options.task_of_lines(tasks.TASKS[task], run.paper, run.objectives, description)
        run.sets[task] = load_splits(run, lines, path, description)
    widths = set()
    for number, splits in enumerate(run.sets.values()):
        for split in splits.values():
            split.task_number = number  # which task token ViLBERT reads
            widths.add(split.store.width)
    if len(widths) > 1:
        found = " and ".join(map(str, sorted(widths)))
        raise UserError(f"--data: features of widths {found}; all tasks need one width")
    if tasks.is_pretraining(args.task):
        run.objectives = options.drop_unsupported(run.paper, run.objectives, run.splits, args.rerank)
    run.tokenizer = make_tokenizer(run, checkpoint or teacher)
    if options.one_source(args):
        run.content_words = words_of_one_piece(run.tokenizer, args.data_sets[0][1]["content_words"])
    if args.max_words is None:
        args.max_words = options.default_max_words(args, run.paper, checkpoint)
    for splits in run.sets.values():
        for split in splits.values():
            split.encode(run.tokenizer, max_length=args.max_words)
        common.print0(f"data     {data.describe_lost_text(list(splits.values()))}")
    run.answers = []
    for task, splits in run.sets.items():
        objectives_of_task = run.objectives
        if not tasks.is_pretraining(task):
            objectives_of_task = tasks.task_objectives(args, task)
        if options.has_open_answers(run.paper, objectives_of_task):
            run.answers = data.answer_list(splits["train"])
            if not tasks.is_pretraining(task):
                run.usual_answers = tasks.most_frequent_answers(splits["train"])
    if teacher and run.answers and distillation.teaches_answers(run, teacher):
        known = len(set(run.answers) & set(teacher["answers"]))
        if known == 0:
            raise UserError(
                f"--teacher {args.teacher}: knows none of the {len(run.answers)} answers of the training data"
            )
        if known < len(run.answers):
            common.print0(f"teacher  knows {known} of {len(run.answers)} answers; the others count as wrong")
        run.answers = teacher["answers"]


def words_of_one_piece(tokenizer, words):
    """Those of a data set's content words that are one word piece, as pieces; a line names the others."""
    pieces = []
    left_out = []
    for word in words:
        tokens = tokenizer.encode(word, add_special_tokens=False).tokens
        if len(tokens) == 1 and tokens != ["[UNK]"]:
            pieces += tokens
        else:
            left_out.append(word)
    if left_out:
        common.print0(f"data     content words that are not one word piece are left out: {', '.join(left_out)}")
    return pieces


def load_splits(run, task, path, description):
    """{name of a split: Dataset} of a task: train, val, test and the data set's extra splits, if they have examples."""
    args = run.args
    names = ["train", "val", "test"]
    if not tasks.is_pretraining(args.task):
        names += description["extra_splits"]
    splits = {}
    made_by = {"network": description["regions"], "device": run.device}
    with machine.first_process_first():
        for name in names:
            limit = args.limit if name == "train" else None
            split = data.load(path, task, name, limit, args.patch, args.grid, checked=name != "train", **made_by)
            if len(split):
                splits[name] = split
    if "train" not in splits:
        raise UserError(f"{path}: no example of split train for --task {args.task}")
    parts = run.world * args.accumulate
    if len(splits["train"]) < parts:
        raise UserError(f"{path}: {len(splits['train'])} examples are too few for {parts} forward passes in a step")
    return splits


def make_tokenizer(run, start):
    """The tokenizer of the checkpoint `start`, else of --vocab, else the data set's, else trained on training texts."""
    args = run.args
    if start and start["tokenizer"]:
        tokenizer = data.tokenizer_from_json(start["tokenizer"])
        if args.vocab and data.read_tokenizer(args.vocab).get_vocab() != tokenizer.get_vocab():
            raise UserError(
                f"--vocab {args.vocab}: {args.init or args.teacher} has other word pieces; leave --vocab out"
            )
        return tokenizer
    if args.vocab:
        return data.read_tokenizer(args.vocab)
    if start:
        raise UserError(f"{args.init}: no tokenizer.json or vocab.txt beside it; give --vocab those word pieces")
    path, description = args.data_sets[0]
    if description["vocab"] and options.one_source(args):
        return data.read_tokenizer(path / description["vocab"])
    return data.own_tokenizer([splits["train"] for splits in run.sets.values()])


# ---- batches ---------------------------------------------------------------------------------------------------


def prepared_steps(run):
    """Yields (batches, names) of each step to come. A thread prepares the next step while the current one computes.

    With retrieval no step is prepared ahead, because the model itself chooses the hard negatives.
    """
    args = run.args
    first = run.progress["step"] + 1
    streams = index_streams(run)
    if any(tasks.TASKS[task].hard_negatives for task in args.tasks):
        for step in range(first, args.steps + 1):
            yield prepare_step(run, streams, step)
        return
    with ThreadPoolExecutor(1) as worker:
        coming = worker.submit(prepare_step, run, streams, first)
        for step in range(first, args.steps + 1):
            batches, names = coming.result()
            if step < args.steps:
                coming = worker.submit(prepare_step, run, streams, step + 1)
            yield batches, names


def prepare_step(run, streams, step):
    """(batches, names) of step 1, 2, ...: the batches of this process and the objectives that they train.

    To be called for each step in order, as it takes the next examples from `streams` (see `index_streams`). All else is
    a function of seed and step alone, except for retrieval's hard negatives.
    """
    args = run.args
    task = sample_task(run, step)
    if tasks.is_pretraining(task):
        rng = data.random_stream("objectives", args.seed, step)  # the same in every process
        names = sample_objectives(run.paper, run.objectives, rng, (step - 1) / args.steps)
    else:
        names = tasks.task_objectives(args, task)
    dataset = run.sets[task]["train"]
    index = next(streams[task])
    parts = run.world * args.accumulate  # forward passes of the step
    batches = []
    for i in range(args.accumulate):
        part = run.rank * args.accumulate + i
        rng = data.random_stream("batch", args.seed, step, part)
        batch = tasks.make_batch(run, dataset, index[part::parts], names, rng)
        if run.device.type == "cuda":
            batch = batch.pin()
        batches.append(batch)
    return batches, names


def sample_task(run, step):
    """The task of step 1, 2, ..., drawn in proportion to the tasks' training examples, by seed and step alone."""
    sizes = np.array([len(splits["train"]) for splits in run.sets.values()])
    rng = data.random_stream("task", run.args.seed, step)
    return str(rng.choice(list(run.sets), p=sizes / sizes.sum()))


def sample_objectives(paper, objectives, rng, done):
    """The objectives that one step trains. objectives: {name: ratio}; done: share of the run that is over, 0..1.

    With conditional masking (UNITER 3.2) one is drawn by ratio, with those joined to it. Without, all are
    trained, those of PRETRAINING["second_half"] from done = 0.5 on (earlier only if there are no others).
    """
    if not paper.PRETRAINING["conditional"]:
        late = paper.PRETRAINING.get("second_half", ())
        names = [name for name in objectives if done >= 0.5 or name not in late]
        return names or list(objectives)
    names = [name for name, ratio in objectives.items() if ratio > 0]
    ratios = np.array([objectives[name] for name in names])
    drawn = str(rng.choice(names, p=ratios / ratios.sum()))
    joined = [name for name in paper.PRETRAINING["joined"].get(drawn, ()) if name in objectives]
    return [drawn, *joined]


def index_streams(run):
    """{task: iterator over the examples of its steps}. On --resume each iterator skips the steps already trained."""
    steps_done = Counter(sample_task(run, step) for step in range(1, run.progress["step"] + 1))
    parts = run.world * run.args.accumulate
    streams = {}
    for task, splits in run.sets.items():
        streams[task] = index_stream(run.args, splits["train"], parts, skip=steps_done[task])
    return streams


def index_stream(args, dataset, parts, skip):
    """Yields, without end, the numbers of the examples of one step: (at most parts * batch_size,) int64.

    The order depends on seed and epoch alone. Examples of a step have similar lengths. Forward pass p of `parts` takes
    index[p::parts], so that no process waits for another one's longer texts. skip: steps to leave out at the start.
    """
    for epoch in itertools.count():
        rng = data.random_stream("order", args.seed, epoch)
        order = data.batches(dataset.lengths(), rng, size=args.batch_size * parts)
        order = [index for index in order if len(index) >= parts]
        yield from order[skip:]
        skip = max(0, skip - len(order))


# ---- model -----------------------------------------------------------------------------------------------------


def read_start(args):
    """The checkpoint of --resume or --init that the run starts from; None if all weights start at random."""
    if args.resume:
        args.init = args.out / checkpoints.NEWEST
        args.fresh = False
        return resume.load_latest(args.out)
    if args.init:
        return checkpoints.load_weights(args)
    return None


def read_teacher_checkpoint(args, checkpoint):
    """The checkpoint of --teacher, or None. UserError if the run starts from a checkpoint with another tokenizer."""
    if not args.teacher:
        return None
    teacher = checkpoints.load_checkpoint(args.teacher)
    if checkpoint and checkpoint["tokenizer"] != teacher["tokenizer"]:
        raise UserError(
            f"{args.teacher}: its word pieces differ from those of {args.init}; leave out --init, or start from a "
            "checkpoint with the teacher's tokenizer"
        )
    return teacher


def build_model(run, checkpoint):
    """The model on the CPU, with random weights or those of the checkpoint."""
    args = run.args
    sizes = start_sizes(run, checkpoint)
    sizes["heads"] = tasks.heads_for(run.paper, run.objectives)
    sizes["answers"] = max(1, len(run.answers))
    sizes["types"] = max(sizes.get("types", 2), len(run.paper.text_types(args.tasks)))
    if run.teacher and "hidden" in args.distill.split(","):
        config = run.teacher.config
        sizes["heads"] = (*sizes["heads"], "hidden")
        sizes["teacher_widths"] = (config.hidden, getattr(config, "visual_hidden", config.hidden))
    sizes.update(options.parse_config_options(args, run.paper))
    torch.manual_seed(args.seed)
    try:
        model = run.paper.MODEL(run.paper.Config(**sizes))
    except (TypeError, ValueError) as error:
        start = f"{args.init or args.model} {' '.join(args.config)}"
        raise UserError(f"{start}: no model of these sizes: {error}") from None
    if 0 < sizes.get("task_tokens", 0) < len(args.tasks):
        raise UserError(f"--config task_tokens={sizes['task_tokens']}: --task has {len(args.tasks)} tasks; give more")
    if args.max_words > model.config.max_positions:
        raise UserError(f"--max-words {args.max_words}: the model has only {model.config.max_positions} positions")
    run.progress["random_heads"] = list(sizes["heads"])
    if checkpoint is None or args.resume:  # `restore` loads the weights of --resume, after it has compared the sizes
        return model
    if args.fresh:
        common.print0(f"init     {args.init}: its sizes and tokenizer only; all weights at random")
        return model
    state, report = checkpoints.fit_state_dict(args, model.state_dict(), checkpoint, run.answers)
    run.progress["random_heads"] = report.random_heads
    run.progress["at_random"] = report.at_random
    model.load_state_dict(state)
    common.print0(report)
    return model


def start_sizes(run, checkpoint):
    """Config fields of the checkpoint, or of the preset --size, with those that the data and the tokenizer decide."""
    args = run.args
    store = run.splits["train"].store
    vocab_size = run.tokenizer.get_vocab_size()
    of_data = {"feature_size": store.width, **store.label_counts(checkpoint["config"] if checkpoint else {})}
    if checkpoint is None:
        preset = run.paper.PRESETS[args.size]
        return {**preset, "vocab_size": vocab_size, "classes": 2, "attributes": 1, **of_data}
    if checkpoint["model"] != args.model:
        raise UserError(f"{args.init}: a checkpoint of {checkpoint['model']} does not fit --model {args.model}")
    sizes = {"classes": 2, "attributes": 1, **checkpoint["config"]}
    if sizes.get("feature_size", store.width) != store.width and not (args.partial or args.fresh or args.resume):
        raise UserError(
            f"{args.init}: trained on features of width {sizes['feature_size']}, {args.data} has {store.width}; "
            "use the same kind of features, for pixels the same --patch, or --partial for a new projection"
        )
    if vocab_size > sizes["vocab_size"]:
        raise UserError(
            f"{args.init}: has {sizes['vocab_size']} word pieces, the tokenizer {vocab_size}; give its own file as --vocab"
        )
    return {**sizes, **of_data}


# ---- optimizer -------------------------------------------------------------------------------------------------


def learning_rate(step, peak, warmup, steps):
    """Linear warm-up, then linear decay: the learning rate of optimizer step 1, 2, ..., `steps`.

        peak * step / warmup  while step < warmup,  then  peak * (steps - step) / (steps - warmup)

    warmup: in steps. The last step has min(peak, 1e-8), official UNITER's least rate, in place of 0.
    """
    if step < warmup:
        return peak * step / warmup
    if step < steps:
        return peak * (steps - step) / (steps - warmup)
    return min(peak, 1e-8)


def set_temperature(run, done):
    """Sets the temperature of itc to the one scheduled after a share `done` (0..1) of the run, unless it is learned."""
    ends = options.parse_temperature(run.args.temperature)
    if ends is None or "itc" not in run.model.heads:
        return
    first, last = ends
    log_scale = run.model.heads["itc"].log_scale.requires_grad_(False)
    log_scale.fill_(-math.log(contrast.scheduled_temperature(first, last, done)))


def restore(run, checkpoint):
    """Restores the weights, the optimizer and the generators of dropout from the checkpoint of --resume."""
    resume.check_fingerprint(checkpoint.get("fingerprint", {}), run.fingerprint)
    try:
        run.model.load_state_dict(checkpoint["state"])
        run.optimizer.load_state(checkpoint["optimizer"])
        machine.seed_dropout(run, checkpoint["generators"].get(run.device.type, []))  # the state of each process
    except ValueError as error:
        raise UserError(
            f"--resume: the optimizer's state in {run.args.init} does not fit this model ({error}); give the options "
            "that the run had. A run of an older version cannot be resumed: start a new one from it with --init"
        ) from None
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise UserError(f"--resume: {run.args.init} is damaged ({type(error).__name__}: {error})") from None


# ---- evaluate and save -----------------------------------------------------------------------------------------


def validate(run, log):
    """Scores the val split. Saves checkpoint.pt, and best.pt if no earlier score is higher or nothing was scored."""
    log.check()
    if "val" in split_names(run):
        start = time.perf_counter()
        metrics, chance = tasks.evaluate(run, "val")
        log.metrics(metrics, chance, time.perf_counter() - start)
        warn_at_chance(run, metrics, chance)
        if metrics:
            score, name = tasks.best_score(run, metrics)
            if score >= run.progress["best"]:  # of equal scores the later: it has learned more
                run.progress["best"] = score
                checkpoints.save_checkpoint(run, checkpoints.BEST)
                common.print0(f"best     step {run.progress['step']}: {name} {score:.4f}")
    if run.progress["step"] > 0:
        if run.progress["best"] == -math.inf:
            checkpoints.save_checkpoint(run, checkpoints.BEST)
        checkpoints.save_checkpoint(run, checkpoints.NEWEST)


def run_test(run):
    """Tests the best weights, or the last ones if no val split was scored. Returns the content of result.json."""
    args = run.args
    if dist.is_initialized():
        dist.barrier()  # the first process writes best.pt, all read it
    step = run.progress["step"]
    if run.progress["best"] > -math.inf:
        best = checkpoints.load_checkpoint(args.out / checkpoints.BEST)
        run.model.load_state_dict(best["state"])
        run.progress["random_heads"] = best["progress"].get("random_heads", [])
        step = best["progress"]["step"]
    result = describe_result(run)
    lines = []
    for split in split_names(run):
        if split in ("train", "val"):
            continue
        metrics, chance = tasks.evaluate(run, split)
        examples = 0
        for task, splits in run.sets.items():
            if split in splits:
                examples += len(tasks.examples_to_evaluate(run, task, splits[split]))
        title = f"{args.model} {args.task}, split {split}, {examples} examples, weights of step {step}"
        if "random_heads" in result:
            title += f"; WARNING: untrained, at random: {', '.join(result['random_heads'])}"
        lines.append(evaluation.format_metrics(title, metrics, chance))
        prefix = "" if split == "test" else f"{split}_"
        for name, value in metrics.items():
            result[prefix + name] = round(float(value), 5)
        for name, value in chance.items():
            result["chance"][prefix + name] = round(float(value), 5)
    if "itc" in run.model.heads and run.model.config.contrast != "hinge":  # which has no temperature
        log_scale = run.model.heads["itc"].log_scale.item()
        result["temperature"] = round(math.exp(-log_scale), 5)
    for task, splits in run.sets.items():
        head = tasks.TASKS[task].ranks
        if args.rerank and head and "test" in splits:
            stages, text = evaluation.compare_stages(run, splits["test"], head)
            result.update(stages)
            lines.append(text)
    if not lines:
        lines.append("nothing is tested, because the data has no split test")
    if run.rank == 0:
        data.write_text(args.out / "result.json", json.dumps(result, indent=1) + "\n")
    common.print0("\n".join(lines))
    print_next_command(run)
    return result


def split_names(run):
    """The names of the splits of all tasks, each once."""
    names = {}
    for splits in run.sets.values():
        names.update(dict.fromkeys(splits))
    return list(names)


# ---- main ------------------------------------------------------------------------------------------------------


def main(argv=None):
    """Trains every model and seed asked for. Exit code 0, or 2 (130 after Ctrl-C) with one line on stderr."""
    with safe_output():
        try:
            args = options.parse(argv)
            machine.keep_freed_memory()
            machine.limit_compiled_products()
            train_all(args)
        except (UserError, OSError, RuntimeError, MemoryError, KeyboardInterrupt) as error:
            message = machine.explain(error, kept="; saved checkpoints are kept")
            if message is None:
                raise
            machine.print_once(f"train.py: {message}")
            return 130 if isinstance(error, KeyboardInterrupt) else 2
        if dist.is_initialized():
            dist.barrier()  # a process that leaves early breaks the others' last reduction
            dist.destroy_process_group()
    return 0


def train_all(args):
    """One run for each model and seed; several are compared in a table."""
    models = list(checkpoints.MODELS) if args.model == "all" else [args.model]
    runs = []
    for model in models:
        for seed in range(args.seed, args.seed + args.seeds):
            runs.append(options.resolve_options(args, model, seed))
    if args.resume:
        started = [resume.has_checkpoint(run_args.out) for run_args in runs]
        if any(started):  # a run without a checkpoint starts anew; if no run has one, the first raises the error
            for run_args, run_started in zip(runs, started, strict=True):
                run_args.resume = run_started
    results = []
    for run_args in runs:
        with lock_folder(run_args.out, common.rank_and_world()[0]):
            results.append(train(run_args))
    if len(results) > 1:
        evaluation.compare_models(results, options.output_folder(args, args.model))


if __name__ == "__main__":
    code = main()
    if "RANK" in os.environ:
        # gloo's threads may outlive the interpreter and abort it while it ends; by now all is written
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
