"""What several test files need: random tensors, small models and batches with every field that a loss reads."""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import checkpoints
import common
import data
import predict

ROOT = Path(__file__).parent.parent

# options of train.py for runs of a few steps
SMALL = ["--batch-size", "4", "--log-every", "1", "--dtype", "f32", "--device", "cpu", "--patch", "4"]
NARROW = ["hidden=32", "intermediate=64"]
SIZES = {
    "uniter": [*NARROW, "layers=2"],
    "lxmert": [*NARROW, "language_layers=1"],
    "vilbert": [*NARROW, "visual_hidden=32", "visual_intermediate=64", "shared=32"],
}

# fields of Config for one layer of each kind; a model lacks some of them
ONE_LAYER = {"layers": 1, "language_layers": 1, "visual_layers": 1, "cross_layers": 1, "connections": ((1, 1),)}


def with_pool(arguments, pictures):
    """The arguments of train.py, and --pool if one of their tasks is tested on that many pictures."""
    arguments = list(map(str, arguments))
    tasks_given = arguments[arguments.index("--task") + 1].split(",") if "--task" in arguments else []
    if "--pool" in arguments or not {"retrieval", "caption"} & set(tasks_given):
        return arguments
    return [*arguments, "--pool", str(pictures)]


def narrow(arguments):
    """The arguments of train.py for a model smaller than the tiny one, which takes half of the time. They stay
    as they are where they say sizes themselves, or start from a checkpoint that has them."""
    arguments = list(map(str, arguments))
    if {"--config", "--init", "--size"} & set(arguments):
        return arguments
    model = arguments[arguments.index("--model") + 1] if "--model" in arguments else "uniter"
    return [*arguments, "--config", *SIZES[model]] if model in SIZES else arguments


def use(*arguments):
    """predict.py with these arguments, on the CPU in float32 if they say nothing else. Returns the exit code."""
    return predict.main(["--device", "cpu", "--dtype", "f32", *map(str, arguments)])


def run_script(script, *arguments, cwd):
    """A script as a user starts it in the folder `cwd`: a subprocess.CompletedProcess with exit code, stdout and stderr.
    Where processes can be forked, the seconds in which Python loads torch are saved."""
    command = [str(script), *map(str, arguments)]
    if sys.platform != "linux":
        return subprocess.run([sys.executable, *command], check=False, cwd=cwd, capture_output=True, text=True)
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder, name) for name in ("stdout", "stderr")]
        code = in_a_fork(become, command, cwd, *outputs)
        return subprocess.CompletedProcess(command, code, *(path.read_text() for path in outputs))


def in_a_fork(function, *arguments):
    """The exit code of a process that is a copy of this one and calls function(*arguments)."""
    process = multiprocessing.get_context("fork").Process(target=function, args=arguments)
    process.start()
    process.join(240)
    process.kill()
    return process.exitcode


def become(command, folder, stdout, stderr):
    """Turns this process into `python command` in a folder. Modules of the repository are loaded anew: the script may be
    one of a copy of the repository."""
    ours = {"support", "prepare", *(path.stem for path in ROOT.glob("*.py"))}
    for name in list(sys.modules):
        if name.partition(".")[0] in ours:
            del sys.modules[name]
    sys.path[:] = [str(Path(command[0]).parent), *(path for path in sys.path if Path(path) != ROOT)]
    sys.argv = command
    os.chdir(folder)
    with open(stdout, "w") as out, open(stderr, "w") as err, redirect_stdout(out), redirect_stderr(err):
        runpy.run_path(command[0], run_name="__main__")


def randn(*shape, **options):
    """Standard normal numbers in float64."""
    return torch.randn(*shape, dtype=torch.float64, **options)


def unit_vectors(*shape):
    """Random vectors of length 1 along the last axis."""
    return F.normalize(randn(*shape), dim=-1)


def lengths_mask(width, lengths):
    """(B, width) bool, True = within the row's length."""
    return torch.arange(width) < torch.tensor(lengths)[:, None]


def close(a, b, tolerance=1e-12):
    """Asserts that two tensors differ by at most `tolerance`."""
    torch.testing.assert_close(a, b, atol=tolerance, rtol=0)


def masked_batch(rows, seed):
    """A batch of 6 words and 4 regions a row, some of each masked, for the `small_model`s."""
    rng = np.random.default_rng(seed)
    regions = torch.from_numpy(rng.random((rows, 4)) < 0.4)
    regions[:, 0] = True
    words = torch.from_numpy(rng.random((rows, 6)) < 0.4)
    words[:, 1] = True
    text = torch.from_numpy(rng.integers(5, 30, (rows, 6)))
    return data.Batch(
        text=text,
        text_mask=torch.ones(rows, 6, dtype=torch.bool),
        segments=torch.zeros(rows, 6, dtype=torch.long),
        features=torch.from_numpy(rng.standard_normal((rows, 4, 8))).float(),
        clean_features=torch.from_numpy(rng.standard_normal((rows, 4, 8))).float(),
        boxes=torch.from_numpy(np.sort(rng.random((rows, 4, 4)), -1)).float()[..., [0, 1, 2, 3]],
        region_mask=torch.ones(rows, 4, dtype=torch.bool),
        word_index=words.flatten().nonzero()[:, 0],
        word_labels=text[words],
        region_index=regions.flatten().nonzero()[:, 0],
        masked_regions=regions,
        matched=torch.from_numpy(rng.integers(0, 2, rows)),
        pictures=torch.arange(rows),
        ids=[str(i) for i in range(rows)],
    )


def joined(a, b):
    """Two batches of the same widths as one, index lists moved along."""
    shifts = {"word_index": a.text.numel(), "region_index": a.region_mask.numel()}
    fields = {}
    for name, x in vars(a).items():
        y = getattr(b, name)
        if x is None:
            fields[name] = None
        elif isinstance(x, list):
            fields[name] = x + y
        else:
            fields[name] = torch.cat([x, y + shifts[name]]) if name in shifts else torch.cat([x, y])
    return data.Batch(**fields)


def as_double(batch, **changes):
    """The batch with its float tensors in float64, and with these fields changed."""
    fields = dict(vars(batch))
    for name, value in fields.items():
        if torch.is_tensor(value) and value.is_floating_point():
            fields[name] = value.double()
    fields.update(changes)
    return data.Batch(**fields)


def small_model(name, **changes):
    """A float64 model with narrow layers and weights far from zero, so that every term shows."""
    paper = checkpoints.MODELS[name]
    sizes = {"hidden": 16, "attention_heads": 2, "intermediate": 32}
    if name == "vilbert":
        sizes |= {"visual_hidden": 8, "visual_heads": 2, "visual_intermediate": 16, "shared": 8, "shared_heads": 2}
    sizes |= {"vocab_size": 30, "feature_size": 8, "classes": 5, "heads": ("mlm", "mrfr", "itm", "itc")}
    torch.manual_seed(0)
    model = paper.MODEL(paper.Config(**paper.PRESETS["tiny"] | sizes | changes)).double()
    for key, parameter in model.named_parameters():
        if "norm" not in key and parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return paper, model


def dropout_places(monkeypatch, function):
    """How often dropout acts while `function` runs, as {(rate, shape of what it acts on): times}."""
    places = Counter()

    def record(x, p):
        if p > 0:
            places[p, tuple(x.shape)] += 1
        return x

    monkeypatch.setattr(common, "apply_dropout", record)
    function()
    return places
