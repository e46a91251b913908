"""log.py: what a run of train.py prints and writes beside its checkpoints: progress lines, log.jsonl, result.json.

Printing cannot end a run: see `SafeOutput`. Two runs cannot write into one folder at the same time: see `lock_folder`.
"""

import json
import math
import os
import shlex
import sys
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout

import checkpoints
import common
import data
import tasks
from common import UserError
from support import evaluation, resume
from support.regions import naming

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

# ---- progress lines and log.jsonl ------------------------------------------------------------------------------


class Log:
    """Progress lines and log.jsonl. Losses stay on the device until a line is due, so that no step waits for them."""

    def __init__(self, run):
        self.run = run
        self.file = run.args.out / "log.jsonl"
        self.pending = []  # (step, losses, grad_norm, ids of examples) since the last line
        self.rate = None  # of the last step
        self.waited = 0.0  # seconds spent waiting for data
        self.worked = 0.0  # seconds of all steps
        self.examples = 0  # of this process
        self.steps = 0  # likewise
        if self.file.is_file() and not run.args.resume:
            common.print0(f"out      {run.args.out} holds an earlier run, which this one writes over")
        if run.rank == 0:
            data.write_text(self.file, self.earlier_lines())

    def earlier_lines(self):
        """After --resume the lines up to the checkpoint's step, without those that followed it; else none."""
        if not (self.run.args.resume and self.file.is_file()):
            return ""
        kept = ""
        for line in self.file.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                if json.loads(line)["step"] <= self.run.progress["step"]:
                    kept += line + "\n"
            except (ValueError, TypeError, KeyError):  # cut off when the run was killed
                continue
        return kept

    def add(self, losses, grad_norm, rate, batches, waited, worked):
        """One step: its losses and gradient norm, 0-d tensors, its learning rate and its seconds."""
        ids = []
        for batch in batches:
            ids += batch.ids
        progress = self.run.progress
        self.rate = rate
        self.pending.append((progress["step"], losses, grad_norm, ids))
        self.waited += waited
        self.worked += worked
        self.examples += len(ids)
        self.steps += 1
        progress["seconds"] += worked
        progress["examples"] += len(ids) * self.run.world

    def check(self):
        """UserError at the first loss or gradient norm that is not finite, with step, objective and examples."""
        for step, losses, grad_norm, ids in self.pending:
            what = None
            if not math.isfinite(grad_norm):
                what = f"the gradient of {', '.join(losses)}"
            for name, loss in losses.items():
                if not math.isfinite(loss):
                    what = f"the loss of {name}"
                    break
            if what:
                everywhere = []
                for part in evaluation.gather_objects(self.run, ids):  # so that all processes say the same
                    everywhere += part[: math.ceil(8 / self.run.world)]
                examples = ", ".join(everywhere)
                raise UserError(f"step {step}: {what} is not finite; try a lower --lr. Examples: {examples} ...")

    def line(self):
        """Mean loss of each objective since the last line, rate, speed and time left; the same to log.jsonl."""
        self.check()
        args = self.run.args
        step = self.run.progress["step"]
        values = {}
        for _, losses, _, _ in self.pending:
            for name, loss in losses.items():
                values.setdefault(name, []).append(float(loss))
        means = {name: sum(losses) / len(losses) for name, losses in values.items()}
        grad_norm = float(self.pending[-1][2])
        self.pending = []
        speed = self.examples * self.run.world / max(1e-9, self.worked)
        left = int((args.steps - step) * self.worked / self.steps)
        text = "  ".join(f"{name} {loss:.3f}" for name, loss in means.items())
        common.print0(
            f"step {step:5d}/{args.steps}  {text}  lr {self.rate:.1e}  {speed:.0f} examples/s  {left // 60}:{left % 60:02d} left"
        )
        self.write(
            {"step": step, "lr": self.rate, "grad_norm": grad_norm, "examples_per_second": round(speed, 1), **means}
        )

    def metrics(self, metrics, chance, seconds):
        """The val split's metrics, chance in brackets. Accuracies of single kinds go to log.jsonl only."""
        step = self.run.progress["step"]
        shown = []
        for name, value in metrics.items():
            if "accuracy_" in name:
                continue
            text = f"{name} {evaluation.format_value(name, value)}"
            if name in chance:
                text += f" ({evaluation.format_value(name, chance[name])})"
            shown.append(text)
        common.print0(
            f"step {step:5d}/{self.run.args.steps}  val (chance in brackets): {', '.join(shown)}; {seconds:.0f} s"
        )
        self.write({"step": step, "split": "val", **metrics, "chance": chance})

    def data_time(self):
        """How much of the training time was spent waiting for data."""
        share = 100 * self.waited / max(1e-9, self.worked)
        what = "waiting for batches"
        if any(tasks.TASKS[task].hard_negatives for task in self.run.sets):
            what = "making batches and choosing hard negatives"
        common.print0(f"data     {share:.1f}% of the training time was spent {what}")

    def write(self, record):
        if self.run.rank == 0:
            with naming(self.file), self.file.open("a") as file:
                file.write(json.dumps(record, default=float) + "\n")


FEW_EXAMPLES = 30  # one answer more or less is more than 3%


def print_run(run):
    """The final configuration, once."""
    args = run.args
    parameters = sum(p.numel() for p in run.model.parameters())
    size = args.size
    if args.resume:
        size = "as in the stopped run"
    elif args.init:
        size = "as in --init"
    common.print0(f"model    {args.model} {size}, {parameters / 1e6:.2f} M parameters: {run.model.config}")
    for task, splits in run.sets.items():
        counts = ", ".join(f"{name} {len(split)}" for name, split in splits.items())
        words, regions = splits["train"].lengths().mean(0)
        name = splits["train"].name
        crops = ""
        if splits["train"].store.crops is not None:
            crops = "; training draws crops of the pictures"
        common.print0(
            f"data     {task}, {name}: {counts} examples; {words:.1f} words, {regions:.1f} regions each{crops}"
        )
        for name, split in splits.items():
            if name != "train" and len(split) < FEW_EXAMPLES:
                common.print0(f"warning  {task}: {name} has only {len(split)} examples, too few to tell much")
    dtype = str(run.dtype).removeprefix("torch.")
    examples = f"{args.batch_size} examples"
    if args.accumulate > 1:
        examples += f" x {args.accumulate} passes"
    if run.world > 1:
        examples += f" x {run.world} processes"
    if args.resume:
        common.print0(f"resume   after step {run.progress['step']}")
    common.print0(
        f"run      {args.steps} steps of {examples}, lr {args.lr:.3g}, "
        f"seed {args.seed}, {', '.join(run.objectives)}; {run.device}, {dtype}; to {args.out}"
    )


def print_next_command(run):
    """What to try with the weights of a finished run."""
    what = "--scenes 4"
    if not evaluation.has_answers(run):
        if "itc" not in run.objectives:
            return
        what = "--search TEXT"
    for name in (checkpoints.BEST, checkpoints.NEWEST):
        file = run.args.out / name
        if file.exists():
            common.print0(f"\nto see it at work: python predict.py {shlex.quote(str(file))} {what}")
            return


def warn_at_chance(run, metrics, chance):
    """In the second half of the run, warns of each accuracy that is less than about two standard errors above chance. The
    standard error is that of as many examples as val has; pretraining scores only some of them."""
    step = run.progress["step"]
    if run.args.ablate or step == 0 or 2 * step < run.args.steps:
        return
    for name, p in chance.items():
        if not name.endswith("accuracy"):
            continue
        task = next(iter(run.sets))
        for other in run.sets:
            if name.startswith(f"{other}_"):
                task = other
        examples = len(run.sets[task].get("val", ()))
        if examples < FEW_EXAMPLES:
            continue  # too few to tell; `print_run` warns of them
        if metrics[name] <= p + 2 * math.sqrt(p * (1 - p) / examples):
            common.print0(
                f"warning  val {name} {evaluation.percent(metrics[name])} is no better than chance, {evaluation.percent(p)}: "
                "train longer, start from a pretrained model (--init) or try another --lr"
            )


def describe_result(run):
    """The first entries of result.json: what was trained, on what, how long."""
    args = run.args
    progress = run.progress
    parameters = 0
    for name, parameter in run.model.named_parameters():
        if not name.startswith("heads.hidden."):  # projections to a teacher's width
            parameters += parameter.numel()
    result = {
        "model": args.model,
        "task": args.task,
        "split": "test",
        "data": args.data,
        "steps": args.steps,
        "seed": args.seed,
    }
    if args.ablate:
        result["ablate"] = args.ablate
    result["parameters"] = parameters
    result["seconds"] = round(progress["seconds"], 1)
    result["examples_per_second"] = round(progress["examples"] / max(1e-9, progress["seconds"]), 1)
    tested = tasks.heads_for(run.paper, run.objectives)
    random_heads = [head for head in progress.get("random_heads", []) if head in tested]
    if random_heads:
        result["random_heads"] = random_heads
    result["chance"] = {}
    return result


# ---- output ----------------------------------------------------------------------------------------------------


class SafeOutput:
    """A text stream that never raises: what it cannot encode is escaped, what it cannot write is dropped."""

    def __init__(self, stream):
        self.stream = stream

    def write(self, text):
        try:
            self.stream.write(text)
        except UnicodeEncodeError:
            encoding = self.stream.encoding
            self.write(text.encode(encoding, "backslashreplace").decode(encoding))
        except (OSError, ValueError):
            self.close()
        return len(text)

    def flush(self):
        try:
            self.stream.flush()
        except (OSError, ValueError):
            self.close()

    def close(self):
        """After a closed pipe or a full disk: the rest goes nowhere, also what Python writes when it ends."""
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
        except (OSError, ValueError):
            pass  # a stream without a file

    def __getattr__(self, name):
        return getattr(self.stream, name)


@contextmanager
def safe_output():
    """Inside the block stdout and stderr are a `SafeOutput`."""
    with ExitStack() as stack:
        for stream, redirect in ((sys.stdout, redirect_stdout), (sys.stderr, redirect_stderr)):
            if stream is not None:
                output = SafeOutput(stream)
                stack.callback(output.flush)  # what is still in a buffer would fail when Python ends
                stack.enter_context(redirect(output))
        yield


@contextmanager
def lock_folder(folder, rank):
    """Inside the block no other run can use the folder. UserError if another one does."""
    if rank > 0 or fcntl is None:
        yield
        return
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    lock = folder / ".lock"
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"--out {folder}: another run is writing there; wait for it or give another --out"
            ) from None
        except OSError:
            pass  # a file system without locks
        resume.remove_leftovers(folder)
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)
            if is_new and not any(folder.iterdir()):
                folder.rmdir()  # a run that stopped before it wrote anything leaves nothing behind
