"""How fast a pretraining step is: examples and positions a second, share of the machine's peak, memory, where the time
goes; and the ratio to a peer, measured in the same run. No test: nothing here asserts a time.

    python tests/benchmark.py                                   the three models, base size, both number formats
    python tests/benchmark.py --models uniter --sizes large --dtypes bf16 --compile
    python tests/benchmark.py --peer transformers               LXMERT against transformers', A B A B: same weights,
                                                                batches, losses and optimizer
    python tests/benchmark.py --sweep                           cost against batch, words, regions and layers
    python tests/benchmark.py --busy 2                          train.py's default job beside two busy processes
    python tests/benchmark.py --serve out/uniter-vqa/best.pt    predict.py's server under 64 clients

Examples are drawn: words with the lengths of VQA v2 questions (mean 9 with [CLS] and [SEP]) or `--words`, `--regions`
with random features of width 2048, 1,600 classes and 400 attributes, from a memory-mapped store as in training. Peak is
the best of square matrix products in the same format, before and after. Counted are the products of forward and
backward; "useful" leaves out those on padding: each example counted alone, at its own length. "Products alone" is the share of
a step that its matrix products would take if each was timed by itself: on a CPU no step can be shorter than that. (On a GPU
it leaves out the fused attention and counts the wait for each product.)
"""

import argparse
import base64
import copy
import http.client
import io
import json
import math
import multiprocessing
import os
import re
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent.parent))
import checkpoints
import common
import data
import tasks
import train
from support import formats, machine, options
from support.optimizer import AdamW

CLASSES = 1601
ATTRIBUTES = 400
WIDTH = 2048
STAGES = ("data", "forward", "backward", "optimizer")
WARM_UP = 2  # turns that do not count: memory and, if asked for, compilation settle in them

# ---- what is measured ------------------------------------------------------------------------------------------


def question_lengths(rng, count):
    """Word pieces with [CLS] and [SEP], as in VQA v2: 5 to 20, mean 9."""
    return np.clip(5 + rng.poisson(4.0, count), 5, 20)


def make_dataset(folder, rng, words, regions, vocabulary, answers, count=512, pictures=64):
    """A Dataset of random pieces beside a store of random regions. words: None for the lengths of questions, or a
    number; regions: (fewest, most) of a picture."""
    store = []
    for _ in range(pictures):
        n = int(rng.integers(regions[0], regions[1] + 1))
        corner = rng.random((n, 2), dtype=np.float32) * 0.5
        boxes = np.concatenate([corner, corner + 0.05 + 0.4 * rng.random((n, 2), dtype=np.float32)], 1)
        probs = rng.dirichlet(np.full(CLASSES, 0.02), n)
        picture = {"features": rng.standard_normal((n, WIDTH)), "boxes": boxes, "object_probs": probs}
        picture |= {"objects": probs[:, 1:].argmax(1), "object_conf": probs[:, 1:].max(1)}
        picture |= {"attributes": rng.integers(ATTRIBUTES, size=n), "attribute_conf": rng.random(n)}
        store.append(picture)
    data.write_store(folder, store)
    lengths = question_lengths(rng, count) if words is None else np.full(count, words)
    first = data.SPECIALS.index("[CLS]")
    last = data.SPECIALS.index("[SEP]")
    rows = [[first, *rng.integers(len(data.SPECIALS), vocabulary, n - 2), last] for n in lengths]
    dataset = data.Dataset("drawn", "train", data.FeatureStore(folder), rng.integers(pictures, size=count),
                           [f"text {i}" for i in range(count)], [{str(a): 1.0} for a in rng.integers(answers, size=count)],
                           [""] * count, [str(i) for i in range(count)])  # fmt: skip
    dataset.tokens = np.concatenate(rows).astype(np.int64)
    dataset.offsets = np.cumsum([0, *lengths])
    dataset.segment = np.zeros_like(dataset.tokens)
    return dataset


def make_run(args, model, size, dtype, folder, **sizes):
    """A train.Run of one model on drawn examples, ready to step, and the examples of each step. Seeded: two calls
    give the same weights and examples."""
    run_args = options.parse(["--model", model, "--mask", "0.15"])
    run_args.tasks = ["pretrain"]
    paper = checkpoints.MODELS[model]
    rng = np.random.default_rng(0)
    vocabulary = paper.Config.vocab_size
    answers = getattr(paper.Config, "answers", 1)
    answers = [str(i) for i in range(answers if model == "lxmert" else 1)]
    dataset = make_dataset(folder, rng, args.words, args.regions, vocabulary, len(answers))
    pieces = {name: i for i, name in enumerate(data.SPECIALS)}
    tokenizer = data.wordpiece(pieces | {f"piece{i}": i for i in range(len(pieces), vocabulary)}, lowercase=False)
    objectives = options.objectives_of(run_args, paper)
    device = machine.pick_device(args.device)
    dtype = {"f32": torch.float32, "bf16": torch.bfloat16}[dtype]
    run = train.Run(run_args, paper, device, dtype, rank=0, world=1)
    run.objectives = objectives
    run.sets = {"pretrain": {"train": dataset}}
    run.tokenizer = tokenizer
    run.answers = answers
    config = {**paper.PRESETS[size], "classes": CLASSES, "attributes": ATTRIBUTES, **sizes}
    config["heads"] = tasks.heads_for(paper, objectives)
    torch.manual_seed(0)
    run.model = paper.MODEL(paper.Config(**config)).to(device).train()
    run.optimizer = AdamW(run.model, 0.01)
    groups = data.batches(dataset.lengths(), np.random.default_rng(1), size=args.batch_size)
    return run, [group for group in groups if len(group) == args.batch_size][: args.batches]


def batch_of(run, index, step):
    """The batch of a step and the objectives it trains; the same for the same step."""
    rng = np.random.default_rng((2, step))
    names = train.sample_objectives(run.paper, run.objectives, np.random.default_rng((3, step)), 1.0)
    return tasks.make_batch(run, run.splits["train"], index, names, rng), names


def wait(device):
    """Until the GPU has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def timed(device, model, update, inputs, loss):
    """One step of training: `inputs()` makes the batch, `loss(batch)` is the forward pass, `update()` the optimizer's step.
    Seconds of each of STAGES."""
    times = [wait(device)]
    batch = inputs()
    times.append(wait(device))
    value = loss(batch)
    times.append(wait(device))
    value.backward()
    times.append(wait(device))
    torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
    update()
    model.zero_grad()
    times.append(wait(device))
    return np.diff(times)


def step_ours(run, index, step):
    """One step of `run` on examples `index`; seconds of each of STAGES."""

    def inputs():
        batch, names = batch_of(run, index, step)
        return batch.to(run.device), names

    def loss(given):
        with run.autocast():
            parts = run.model(*given)
        weights = run.paper.PRETRAINING["loss_weights"]
        return sum(weights.get(name, 1.0) * value.float() for name, (value, _) in parts.items())

    def update():
        run.optimizer.step(rate=1e-9)  # leaves the weights nearly as they are, but does the work

    return timed(run.device, run.model, update, inputs, loss)


# ---- arithmetic ------------------------------------------------------------------------------------------------


def peak(device, dtype, seconds=1.0):
    """FLOP/s of a square matrix product: the best of those that fit into `seconds`."""
    n = 8192 if device.type == "cuda" else 2048
    a = torch.randn(n, n, device=device, dtype=dtype)
    b = torch.randn(n, n, device=device, dtype=dtype)
    best = np.inf
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = wait(device)
        a @ b
        best = min(best, wait(device) - start)
    return 2 * n**3 / best


def flops(run, batch, names):
    """Products of one forward and backward pass, counted without computing them."""
    state = {name: p.detach().to("meta").requires_grad_() for name, p in run.model.named_parameters()}
    with FlopCounterMode(display=False) as counter:
        parts = torch.func.functional_call(run.model, state, (batch.to("meta"), names))
        sum(loss for loss, _ in parts.values()).backward()
    return counter.get_total_flops()


def useful_flops(run, index, step, known):
    """The same for each example alone, so without padding. known: a dict that spares equal sizes the second count."""
    batch, names = batch_of(run, index, step)
    total = 0
    for row in range(len(index)):
        t = int(batch.text_mask[row].sum())
        n = int(batch.region_mask[row].sum())
        count = {}
        for name, mask in (("word", batch.text_mask), ("region", batch.region_mask)):
            flat = getattr(batch, f"{name}_index")
            count[name] = 0 if flat is None else int((flat // mask.shape[1] == row).sum())
        key = (t, n, *count.values(), *names)
        if key not in known:
            known[key] = flops(run, alone(batch, row, t, n, count), names)
        total += known[key]
    return total


def alone(batch, row, t, n, count):
    """Row `row` of a batch by itself, cut to its t words and n regions, with so many words and regions to predict."""
    part = batch.select(torch.tensor([row]))
    text = ("text", "text_mask", "segments")
    regions = ("features", "boxes", "region_mask", "masked_regions", "clean_features", *data.STORED)
    for names, length in ((text, t), (regions, n)):
        for name in names:
            if (value := getattr(part, name)) is not None:
                setattr(part, name, value[:, :length])
    if batch.word_index is not None:
        part.word_index, part.word_labels = torch.zeros(2, count["word"], dtype=torch.long)
    if batch.region_index is not None:
        part.region_index = torch.zeros(count["region"], dtype=torch.long)
    return part


class Products(TorchDispatchMode):
    """Counts the matrix products that run inside it: `seen[function, layouts of its tensors]`."""

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm):
            layouts = tuple((tuple(x.shape), x.stride(), x.dtype) for x in args)
            self.seen[function, layouts] += 1
        return function(*args, **(kwargs or {}))


def products_alone(seen, device, tries=3):
    """Seconds of the products `seen` alone, each the best of a few tries on operands of the same layout: what is left
    of a step if nothing else took time."""
    total = 0.0
    for (function, layouts), count in seen.items():
        operands = [torch.empty_strided(*layout[:2], dtype=layout[2], device=device).normal_() for layout in layouts]
        best = math.inf
        for _ in range(tries):
            start = wait(device)
            function(*operands)
            best = min(best, wait(device) - start)
        total += count * best
    return total


# ---- the peer --------------------------------------------------------------------------------------------------


class Peer:
    """transformers' LxmertForPreTraining with the weights of ours, and its step. Words are padded to 20, as the paper's
    code has them."""

    def __init__(self, run):
        import transformers

        config = transformers.LxmertConfig(
            vocab_size=run.model.config.vocab_size, num_qa_labels=run.model.config.answers,
            num_object_labels=CLASSES - 1, num_attr_labels=ATTRIBUTES)  # fmt: skip
        self.model = transformers.LxmertForPreTraining(config).to(run.device)
        self.run = run
        self.model.load_state_dict(formats.lxmert_to_hugging_face(run.model.state_dict()), strict=False)
        self.model.train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-9, fused=True)

    def inputs(self, index, step):
        batch, _ = batch_of(self.run, index, step)
        batch = batch.to(self.run.device)
        labels = torch.full_like(batch.text, -100)
        labels.view(-1)[batch.word_index] = batch.word_labels
        more = (0, max(0, 20 - batch.text.shape[1]))  # (B, T) -> (B, 20)
        counted = common.regions_to_predict(batch)  # (B, N) bool: ours averages over these, the peer over all
        share = counted * counted.numel() / counted.sum()
        masked = torch.zeros_like(share)
        masked.view(-1)[batch.region_index] = share.view(-1)[batch.region_index]
        answers = torch.where((batch.answer_labels >= 0) & (batch.matched == 1), batch.answer_labels, -100)
        return {
            "input_ids": F.pad(batch.text, more),
            "attention_mask": F.pad(batch.text_mask, more).long(),
            "visual_feats": batch.features,
            "visual_pos": batch.boxes,
            "visual_attention_mask": batch.region_mask.long(),
            "labels": F.pad(labels, more, value=-100),
            "matched_label": batch.matched,
            "ans": answers,
            "obj_labels": {
                "obj": (batch.objects, batch.object_conf * share),
                "attr": (batch.attributes, batch.attribute_conf * share),
                "feat": (batch.clean_features, masked),
            },
        }

    def loss(self, inputs):
        with self.run.autocast():
            return self.model(**inputs).loss

    def step(self, index, step):
        return timed(self.run.device, self.model, self.optimizer.step, lambda: self.inputs(index, step), self.loss)


def side(args, dtype, name, pipe):
    """One side of the comparison, in a process of its own, as its memory is to be its own. Sends its loss without dropout
    in float32; then for every True that it gets, the seconds of each of STAGES over all examples; at last its peak memory.
    """
    hidden = torch.finfo(torch.float32).min if dtype == "f32" else torch.finfo(torch.bfloat16).min
    folder = tempfile.TemporaryDirectory()  # its features are read in every step
    run, groups = make_run(args, "lxmert", "base", dtype, Path(folder.name), masked_logit=hidden, region_factor=6.67)
    if name != "transformers":
        machine.keep_freed_memory()
    if name == "ours":
        model = run.model.eval()
        step = partial(step_ours, run)
        batch, names = batch_of(run, groups[0], 0)
        with torch.no_grad():
            pipe.send(sum(float(loss) for loss, _ in model(batch.to(run.device), names).values()))
        if args.compile:
            machine.compile_layers(model)
    else:
        peer = Peer(run)
        model = peer.model.eval()
        step = peer.step
        run.model = None
        run.optimizer = None
        with torch.no_grad():
            pipe.send(float(model(**peer.inputs(groups[0], 0)).loss))
    model.train()
    while pipe.recv():
        pipe.send(sum(step(group, i) for i, group in enumerate(groups)))
    pipe.send(memory(run.device))


def compare_peer(args, dtype):
    """Ours and the peer's in turn over the same examples: the peer as it ships, and with the memory setting of ours."""
    spawn = multiprocessing.get_context("spawn")
    sides = {}
    times = {}
    losses = []
    for name in ("ours", "transformers", "transformers, freed memory kept"):
        sides[name], end = spawn.Pipe()
        spawn.Process(target=side, args=(args, dtype, name, end), daemon=True).start()
        end.close()  # else this process would wait for ever for one that failed
        times[name] = []
        losses.append(sides[name].recv())
        print(f"{name}: loss without dropout {losses[-1]:.5f}", flush=True)
    if not math.isclose(min(losses), max(losses), rel_tol=1e-5):
        sys.exit("the losses differ, so the speeds cannot be compared")
    for turn in range(-WARM_UP, args.repeats):
        for name, pipe in sides.items():
            pipe.send(True)
            taken = pipe.recv()
            if turn >= 0:
                times[name].append(taken)
    examples = args.batch_size * args.batches
    print(
        f"| LXMERT-base, {dtype} | examples/s | ours is faster by | memory GiB | {' / '.join(STAGES)} % |\n{'|---' * 5}|"
    )
    for name, taken in times.items():
        sides[name].send(False)
        ratios = np.sum(taken, 1) / np.sum(times["ours"], 1)
        split = " / ".join(f"{100 * part:.0f}" for part in np.mean(taken, 0) / np.sum(np.mean(taken, 0)))
        print(f"| {name} | {examples / np.median(np.sum(taken, 1)):.2f} | {np.median(ratios):.2f} ({ratios.min():.2f} to "
              f"{ratios.max():.2f}) | {sides[name].recv():.2f} | {split} |", flush=True)  # fmt: skip


def in_a_process(function, *arguments):
    """function(*arguments) in a process that ends with it: a process's peak memory never falls."""
    process = multiprocessing.get_context("spawn").Process(target=function, args=arguments)
    process.start()
    process.join()


def memory(device):
    """Peak memory of this process, or of the GPU, in GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


# ---- tables ----------------------------------------------------------------------------------------------------


def measure(args, folder, model, size, dtype):
    """A row of the table."""
    machine.keep_freed_memory()
    run, groups = make_run(args, model, size, dtype, folder)
    kind = torch.float32 if dtype == "f32" else torch.bfloat16
    best = peak(run.device, kind)
    times = []
    known = {}
    real = counted = useful = 0
    for i, group in enumerate(groups):
        batch, names = batch_of(run, group, i)
        real += int(batch.text_mask.sum() + batch.region_mask.sum())
        counted = counted + flops(run, batch, names)
        useful = useful + useful_flops(run, group, i, known)
    if args.compile:
        machine.compile_layers(run.model)
    for turn in range(-WARM_UP, args.repeats):
        taken = np.array([step_ours(run, group, i) for i, group in enumerate(groups)])
        if turn >= 0:
            times.append(taken.sum(0))
    best = max(best, peak(run.device, kind))
    seconds = np.median(np.sum(times, 1))
    with Products() as products:
        for i, group in enumerate(groups):
            step_ours(run, group, i)
    products = products_alone(products.seen, run.device)
    split = np.mean(times, 0) / np.sum(np.mean(times, 0))
    stages = " / ".join(f"{100 * part:.0f}" for part in split)
    count = args.batch_size * len(groups)
    print(f"| {model} {size} | {dtype} | {count / seconds:.2f} | {real / seconds:.0f} | {counted / seconds / best:.0%} | "
          f"{useful / seconds / best:.0%} | {products / seconds:.0%} | {best / 1e9:.0f} | {memory(run.device):.1f} | {stages} |", flush=True)  # fmt: skip


def sizes_with(model, layers):
    """Config fields of a model with so many layers; ViLBERT's upper half exchanges with as many visual layers."""
    if model == "vilbert":
        half = layers // 2
        connections = tuple((i, layers - half + i) for i in range(half))
        return {"layers": layers, "visual_layers": half, "connections": connections}
    return {"language_layers" if model == "lxmert" else "layers": layers}


def sweep(args, folder):
    """Seconds of a step while one thing grows; a star where twice as much costs more than 2.3 times as much."""
    machine.keep_freed_memory()
    grid = {"batch_size": (2, 4, 8, 16, 32), "words": (8, 16, 32, 64, 128), "regions": (9, 18, 36, 72, 144)}
    print("| | what | value | seconds a step | times the one before |\n|---|---|---|---|---|")
    for model in args.models:
        for what, values in {**grid, "layers": (3, 6, 12)}.items():
            before = None
            for value in values:
                changed = copy.copy(args)
                sizes = sizes_with(model, value) if what == "layers" else {}
                changed.words = args.words or 9
                if what != "layers":
                    setattr(changed, what, (value, value) if what == "regions" else value)
                run, groups = make_run(changed, model, args.sizes[0], args.dtypes[0], folder, **sizes)
                seconds = min(step_ours(run, groups[0], 0).sum() for _ in range(3))
                ratio = "" if before is None else f"{seconds / before:.2f}{' *' if seconds > 2.3 * before else ''}"
                print(f"| {model} | {what} | {value} | {seconds:.3f} | {ratio} |", flush=True)
                before = seconds
                run = None  # its memory, before the next one's


# ---- a busy machine --------------------------------------------------------------------------------------------


def busy_loop():
    while True:
        pass


def compare_wait_policies(args):
    """Examples/s of train.py's default UNITER job beside --busy other processes that never rest: as it is, and with
    OMP_WAIT_POLICY=passive, A B A B."""
    spawn = multiprocessing.get_context("spawn")
    loops = [spawn.Process(target=busy_loop, daemon=True) for _ in range(args.busy)]
    for loop in loops:
        loop.start()
    print("| other processes | OMP_WAIT_POLICY | examples/s |\n|---|---|---|")
    for policy in (None, "passive", None, "passive"):
        speed = train_for(args.seconds, policy)
        print(f"| {args.busy} | {policy or 'as train.py has it'} | {speed:.0f} |", flush=True)
    for loop in loops:
        loop.terminate()


def train_for(seconds, policy):
    """Examples/s that the last progress line says after so many seconds of training the default UNITER job."""
    environment = dict(os.environ)
    environment.pop("OMP_WAIT_POLICY", None)
    if policy:
        environment["OMP_WAIT_POLICY"] = policy
    program = Path(__file__).parent.parent / "train.py"
    speed = math.nan
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(program), "--model", "uniter", "--log-every", "1", "--out", folder]
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        end = None
        for line in process.stdout:
            found = re.search(r"(\d+) examples/s", line)
            if found:
                speed = float(found[1])
                end = end or time.perf_counter() + seconds
            if end and time.perf_counter() > end:
                break
        process.kill()
        process.wait()
    return speed


# ---- the server ------------------------------------------------------------------------------------------------


def compare_batching(args):
    """The server under --clients that each ask one question after another, with up to 64 questions in a forward pass and
    with one, A B A B, for questions about a sample and about a picture that is sent."""
    content = io.BytesIO()
    Image.effect_noise((200, 150), 60).convert("RGB").save(content, "PNG")
    picture = base64.b64encode(content.getvalue()).decode()
    questions = {"sample": {"sample": 0}, "picture of 200 x 150": {"images": [picture]}}
    print(
        "| question about | questions in a pass | requests/s | p50 ms | p99 ms | errors | forward passes |\n"
        + "|---" * 7
        + "|"
    )
    spawn = multiprocessing.get_context("spawn")
    for name, keys in questions.items():
        body = json.dumps({"text": "how many things are red?", **keys})
        for most in (64, 1, 64, 1):
            pipe, theirs = spawn.Pipe()
            server = spawn.Process(target=serve_in_a_process, args=(args.serve, args.device, most, theirs))
            server.start()
            port = pipe.recv()
            load(port, body, args.clients, 1.0)
            before = pipe_count(pipe)
            seconds, failed = load(port, body, args.clients, args.seconds)
            batches = pipe_count(pipe) - before
            pipe.send("stop")
            server.join()
            p50, p99 = 1000 * np.percentile(seconds, [50, 99])
            speed = len(seconds) / args.seconds
            print(f"| {name} | {most} | {speed:.0f} | {p50:.0f} | {p99:.0f} | {failed} | {batches} |", flush=True)


def serve_in_a_process(checkpoint, device, most, pipe):
    """A server that answers at most `most` questions at once. Sends its port; its number of forward passes when asked."""
    import predict
    import serve

    serve.MAX_BATCH = most
    run, task = predict.load_run(predict.parse([checkpoint, "--serve", "0", "--device", device]))
    server = serve.Server(0, run, task, 3)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    pipe.send(server.server_port)
    while pipe.recv() == "count":
        pipe.send(server.batcher.batches)
    server.shutdown()
    server.close()


def pipe_count(pipe):
    pipe.send("count")
    return pipe.recv()


def load(port, body, clients, seconds):
    """(seconds of each answered request, how many failed): so many clients ask one after another for so many seconds."""
    end = time.perf_counter() + seconds
    taken = []
    failures = []

    def client():
        while time.perf_counter() < end:
            start = time.perf_counter()
            try:
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
                connection.request("POST", "/predict", body)
                reply = connection.getresponse()
                answer = json.loads(reply.read())
                connection.close()
                right = reply.status == 200 and len(answer["answers"]) == 3
            except (OSError, http.client.HTTPException, ValueError, KeyError):
                right = False
            if right:
                taken.append(time.perf_counter() - start)
            else:
                failures.append(start)

    threads = [threading.Thread(target=client) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return taken, len(failures)


def main():
    parser = argparse.ArgumentParser(description="Measure pretraining steps.")
    add = parser.add_argument
    add("--models", nargs="+", default=list(checkpoints.MODELS), choices=checkpoints.MODELS)
    add("--sizes", nargs="+", default=["base"], choices=["tiny", "base", "large"])
    add("--dtypes", nargs="+", default=["f32", "bf16"], choices=["f32", "bf16"])
    add("--batch-size", type=int, default=16)
    add("--words", type=int, help="word pieces of each example (default: as VQA's questions)")
    add("--regions", type=int, nargs=2, default=(36, 36), metavar=("FEWEST", "MOST"))
    add("--batches", type=int, default=4, help="batches in a turn")
    add("--repeats", type=int, default=3, help="turns that count")
    add("--compile", action="store_true", help="with compiled layers")
    add("--peer", choices=["transformers"], help="compare LXMERT with that library's")
    add("--sweep", action="store_true", help="cost against batch, words, regions and layers")
    add("--busy", type=int, metavar="N", help="train.py's default job beside N processes that never rest")
    add("--serve", metavar="CKPT", help="predict.py's server under many clients")
    add("--clients", type=int, default=64, help="of --serve")
    add("--seconds", type=float, default=20.0, help="of each of the measurements of --busy and --serve")
    add("--device", default="auto")
    args = parser.parse_args()
    if args.busy is not None:
        return compare_wait_policies(args)
    if args.serve:
        return compare_batching(args)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        if args.sweep:
            return sweep(args, folder)
        if args.peer:
            for dtype in args.dtypes:
                compare_peer(args, dtype)
            return None
        print("| model | format | examples/s | words + regions/s | share of peak | useful share | products alone | peak GFLOP/s | memory GiB | "
              f"{' / '.join(STAGES)} % |\n{'|---' * 10}|")  # fmt: skip
        for model in args.models:
            for size in args.sizes:
                if size in checkpoints.MODELS[model].PRESETS:
                    for dtype in args.dtypes:
                        in_a_process(measure, args, folder, model, size, dtype)
    return None


if __name__ == "__main__":
    main()
