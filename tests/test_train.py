"""train.py: the pieces against closed forms, the command line as a user runs it, resume and two processes to the bit."""

import argparse
import contextlib
import dataclasses
import io
import itertools
import json
import math
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import benchmark
import numpy as np
import pytest
import torch
from helpers import ROOT, SMALL, as_double, in_a_fork, joined, masked_batch, narrow, small_model
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

import checkpoints
import common
import data
import distill
import lxmert
import predict
import tasks
import train
import uniter
from prepare import scenes
from support import evaluation, log, machine, options, records, resume
from support.optimizer import AdamW


def in_two_processes(*arguments, code=0):
    """train.py in two processes that are given what torchrun would give them. Where they can be forked, the seconds in
    which Python loads torch are saved. code: of both when they end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    processes = []
    for rank in ("0", "1"):
        environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2"}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        process = context.Process(target=start_one_process, args=(environment, narrow([*SMALL, *arguments])))
        process.start()
        processes.append(process)
    try:
        for process in processes:
            process.join(120)
            assert process.exitcode == code
    finally:
        for process in processes:
            process.kill()  # if they wait for each other, pytest would never end


def start_one_process(environment, arguments):
    os.environ.update(environment)
    sys.exit(train.main(arguments))


def state_of(folder):
    return checkpoints.load_checkpoint(Path(folder) / "checkpoint.pt")["state"]


# ---- pieces ----------------------------------------------------------------------------------------------------


def test_learning_rate_is_two_straight_lines():
    rates = [train.learning_rate(step, 1.0, 10, 110) for step in range(1, 111)]
    assert rates[:10] == pytest.approx(np.linspace(0.1, 1.0, 10))
    assert rates[9:109] == pytest.approx(np.linspace(1.0, 0.01, 100))
    assert rates[-1] == 1e-8


def test_default_rates_at_base_size_are_the_papers():
    for paper, pretraining in ((uniter, 5e-5), (checkpoints.vilbert, 1e-4), (lxmert, 1e-4)):
        for task, rate in (("pretrain", pretraining), ("vqa", 5e-5)):
            given = SimpleNamespace(task=task, tasks=[task], batch_size=8, accumulate=1)
            assert options.default_learning_rate(paper, 768, given, 1) == rate


def test_default_steps_of_pretraining(tmp_path):
    """UNITER alone takes more, as each of its steps trains one objective; side by side all take equally many."""
    scenes.make(tmp_path, {"train": 2})
    for model, choice, steps in (("uniter", "uniter", 3600), ("lxmert", "lxmert", 2400), ("uniter", "all", 2400)):
        args = options.parse(["--model", choice, "--data", str(tmp_path)])
        assert options.resolve_options(args, model, 0).steps == steps


def test_defaults_that_the_documented_results_were_measured_with():
    args = vars(options.parse([]))
    expected = {"model": "uniter", "task": "pretrain", "data": "scenes", "size": "tiny"}
    expected |= {"accumulate": 1, "lr": None, "warmup": 0.1, "weight_decay": 0.01, "clip": 5.0, "mask": None}
    expected |= {"mine": 4, "pool": 200, "beams": 1, "temperature": "learned", "distill": "logits", "seed": 0}
    for name, value in expected.items():
        assert args[name] == value, name


def test_defaults_of_one_run_in_two_processes(tmp_path, monkeypatch):
    """Two processes share the batch, and an example of several rows counts as so many. Five evaluations at most."""
    scenes.make(tmp_path, {"train": 2})
    sizes = {}
    for world in (1, 2):
        monkeypatch.setattr(common, "rank_and_world", lambda world=world: (0, world))
        for task in ("pretrain", "nlvr2", "vqa,vcr"):
            args = options.parse(["--data", str(tmp_path), "--task", task, "--steps", "12"])
            args = options.resolve_options(args, "uniter", 0)
            sizes[task, world] = args.batch_size
            assert (args.patch, args.grid, args.patch_options) == (12, 6, [])
            assert args.eval_every == 3  # after steps 3, 6, 9, 12; every second step would be six times
    assert sizes == {
        ("pretrain", 1): 256, ("nlvr2", 1): 128, ("vqa,vcr", 1): 64,
        ("pretrain", 2): 128, ("nlvr2", 2): 64, ("vqa,vcr", 2): 32,
    }  # fmt: skip


def test_objectives_and_their_ratios_are_the_papers_or_those_asked_for():
    asked = SimpleNamespace(task="pretrain", tasks=["pretrain"], objectives=None, rerank=None, model="uniter")
    assert options.objectives_of(asked, uniter) == {"mlm": 4, "mrfr": 1, "mrc_kl": 1, "itm": 2, "wra": 0}
    asked.objectives = "itc,itm,mrc"
    assert options.objectives_of(asked, uniter) == {"itc": 2, "itm": 2, "mrc": 1}
    asked.objectives = None
    assert options.objectives_of(asked, lxmert) == dict.fromkeys(("mlm", "mrfr", "mrc", "attr", "itm", "qa"), 1)


def test_default_rates_follow_the_width_and_in_narrow_models_the_rows_of_a_step():
    rates = []
    given = SimpleNamespace(task="vqa", tasks=["vqa"], batch_size=256, accumulate=1)
    for width in (128, 256, 257, 768, 1023, 1024):
        rates.append(options.default_learning_rate(uniter, width, given, 1))
    assert rates == [1e-3, 1e-3, 5e-5, 5e-5, 5e-5, 3e-5]
    for task, size, accumulate, world, rate in (
        ("vqa", 64, 1, 1, 5e-4),
        ("vqa", 16, 2, 2, 5e-4),
        ("vqa", 1024, 1, 1, 1e-3),
        ("vcr", 64, 1, 1, 1e-3),  # four choices, so four rows an example
        ("vcr", 4, 1, 1, 2.5e-4),
    ):
        given = SimpleNamespace(task=task, tasks=[task], batch_size=size, accumulate=accumulate)
        assert options.default_learning_rate(uniter, 128, given, world) == pytest.approx(rate)


def test_only_matrices_decay():
    """Without gradients worth the name (eps outweighs them) only the decay is left."""
    model = uniter.UNITER(uniter.Config(**uniter.PRESETS["tiny"], vocab_size=30, feature_size=8, classes=5))
    optimizer = AdamW(model, weight_decay=0.01)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.full_like(p, 1e-20)
    optimizer.step(rate=0.05)
    for name, p in model.named_parameters():
        wanted = before[name] * (1 - 0.05 * 0.01) if p.ndim > 1 else before[name]
        torch.testing.assert_close(p.detach(), wanted, atol=1e-9, rtol=1e-6, msg=name)


def test_new_weights_learn_at_a_rate_of_their_own():
    """Official UNITER has ten times the rate on the head."""
    model = torch.nn.ModuleDict({"old": torch.nn.Linear(3, 3), "new": torch.nn.Linear(3, 2)})
    optimizer = AdamW(model, 0.01, ["new.weight", "new.bias"], 10.0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step(1e-3)
    for name, p in model.named_parameters():
        rate = 1e-2 if name.startswith("new") else 1e-3
        decay = 0.01 if p.ndim > 1 else 0.0
        wanted = (before[name] - rate) * (1 - rate * decay)  # the first step of Adam is the sign of the gradient
        torch.testing.assert_close(p.detach(), wanted, atol=1e-7, rtol=1e-5)


def test_a_step_is_that_of_the_official_optimizer():
    """Adam with eps added before the bias of the second moment is corrected, then decay: p <- (p - r u) (1 - r d). A
    parameter without a gradient takes no step: "second", of a head that two of five steps do not train."""
    rate, decay = 0.1, 0.5
    model = torch.nn.ModuleDict({"first": torch.nn.Linear(3, 2), "second": torch.nn.Linear(2, 2)}).double()
    optimizer = AdamW(model, decay)
    expected = {name: p.detach().clone() for name, p in model.named_parameters()}
    first = dict.fromkeys(expected, 0.0)
    second = dict.fromkeys(expected, 0.0)
    own_step = dict.fromkeys(expected, 0)
    for step in (1, 2, 3, 4, 5):
        model.zero_grad()
        for name, p in model.named_parameters():
            if name.startswith("second") and step in (1, 4):
                continue
            own_step[name] += 1
            p.grad = 1e-6 * torch.randn_like(p)  # small enough for eps to count
            first[name] = 0.9 * first[name] + 0.1 * p.grad
            second[name] = 0.98 * second[name] + 0.02 * p.grad.square()
            correction = math.sqrt(1 - 0.98 ** own_step[name]) / (1 - 0.9 ** own_step[name])
            expected[name] = expected[name] - rate * correction * first[name] / (second[name].sqrt() + 1e-6)
            if p.ndim > 1:
                expected[name] = expected[name] * (1 - rate * decay)
        optimizer.step(rate)
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.detach(), expected[name], atol=1e-10, rtol=1e-8, msg=name)


def test_the_optimizer_goes_on_from_its_state_and_from_no_other():
    model = torch.nn.Linear(3, 2)
    optimizer = AdamW(model, 0.01)
    gradients = [torch.randn(2, 3), torch.randn(2, 3)]
    model.weight.grad = gradients[0]
    optimizer.step(0.1)
    copy = torch.nn.Linear(3, 2)
    copy.load_state_dict(model.state_dict())
    resumed = AdamW(copy, 0.01)
    resumed.load_state(optimizer.state)
    model.weight.grad = gradients[1]
    copy.weight.grad = gradients[1]
    optimizer.step(0.1)
    resumed.step(0.1)
    assert torch.equal(model.weight, copy.weight)
    for other in (torch.nn.Linear(4, 2), torch.nn.ModuleDict({"head": torch.nn.Linear(3, 2)})):
        with pytest.raises(ValueError):
            AdamW(other, 0.01).load_state(optimizer.state)


def test_steps_draw_one_objective_by_ratio_with_what_is_joined_to_it():
    ratio = {**uniter.PRETRAINING["objectives"], "wra": 0}
    rng = np.random.default_rng(0)
    drawn = [tuple(train.sample_objectives(uniter, ratio, rng, 1.0)) for _ in range(3000)]
    share = {names: drawn.count(names) / 3000 for names in set(drawn)}
    assert set(share) == {("mlm",), ("mrfr",), ("mrc_kl",), ("itm", "wra")}
    for names, expected in {("mlm",): 1 / 2, ("mrfr",): 1 / 8, ("mrc_kl",): 1 / 8, ("itm", "wra"): 1 / 4}.items():
        assert abs(share[names] - expected) < 4 * math.sqrt(expected / 3000)


def test_lxmert_answers_questions_in_the_second_half_only():
    names = dict.fromkeys(lxmert.PRETRAINING["objectives"], 1)
    rng = np.random.default_rng(0)
    assert train.sample_objectives(lxmert, names, rng, 0.499) == ["mlm", "mrfr", "mrc", "attr", "itm"]
    assert train.sample_objectives(lxmert, names, rng, 0.5) == [*names]
    assert train.sample_objectives(lxmert, {"qa": 1}, rng, 0.0) == ["qa"]  # alone it has no other half


@pytest.mark.parametrize("names", [["mlm"], ["mrfr"], ["itm", "wra"]])
def test_parts_of_unlike_size_give_the_gradients_of_the_whole(names):
    torch.manual_seed(0)
    model = uniter.UNITER(uniter.Config(**uniter.PRESETS["tiny"], vocab_size=30, feature_size=8, classes=5)).double()
    a = as_double(masked_batch(3, 1))
    b = as_double(masked_batch(5, 2))
    found = []
    run = SimpleNamespace(model=model, paper=uniter, device=torch.device("cpu"), autocast=train.nullcontext)
    run.teacher = None
    for parts in ([joined(a, b)], [a, b]):
        model.zero_grad()
        losses = train.backward(run, parts, names)
        found.append([losses[names[0]], *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    for whole, split in zip(*found, strict=True):
        torch.testing.assert_close(whole, split, atol=1e-12, rtol=1e-9)


def test_comparison_says_tie_where_the_spread_covers_the_lead():
    close = {"a": {"mean": 0.91, "spread": 0.02}, "b": {"mean": 0.90, "spread": 0.01}}
    clear = {"a": {"mean": 0.95, "spread": 0.01}, "b": {"mean": 0.90, "spread": 0.01}}
    both = {"a": {"mean": 0.91, "spread": 0.006}, "b": {"mean": 0.90, "spread": 0.006}}  # neither alone covers it
    assert evaluation.best_model(close) == evaluation.best_model(both) == "tie"
    assert evaluation.best_model(clear) == "a"
    assert evaluation.best_model({**clear, "b": {"mean": 0.5, "spread": None}}) == ""  # one seed shows nothing


def test_comparison_has_the_mean_and_the_standard_deviation_of_a_sample(tmp_path):
    results = []
    for model, accuracies in (("uniter", (0.5, 0.7)), ("lxmert", (0.6,))):
        for accuracy in accuracies:
            result = {"model": model, "parameters": 10, "examples_per_second": 20.0, "chance": {"accuracy": 0.25}}
            results.append(result | {"accuracy": accuracy, "accuracy_color": 0.1, "mlm_loss": 3.0})
    results[2] |= {"seed": 5, "random_heads": ["vqa"]}
    evaluation.compare_models(results, tmp_path)
    table = json.loads((tmp_path / "comparison.json").read_text())["table"]
    assert list(table) == ["parameters", "examples_per_second", "accuracy"]
    assert table["accuracy"]["uniter"] == pytest.approx({"mean": 0.6, "spread": 0.1 * math.sqrt(2)})
    assert table["accuracy"]["lxmert"] == {"mean": 0.6, "spread": None}  # one run has none
    text = (tmp_path / "comparison.md").read_text()
    assert "| accuracy | 60.0 ± 14.1 | 60.0 |  | 25.0% |" in text
    assert text.endswith("\nWARNING: lxmert, seed 5: untrained, at random: vqa\n") and text.count("WARNING") == 1


@pytest.fixture
def recompiling_fails():
    """torch.compile gives up without a word after eight compilations; in the test it shall fail."""
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):  # imports torch._dynamo, which takes a second
        yield


@pytest.mark.parametrize("model", ["uniter", "vilbert", "lxmert"])
def test_compiled_layers_compute_the_same_and_are_compiled_once(model, recompiling_fails, monkeypatch):
    """With a back end that counts graphs in place of the real one, which would take minutes."""
    torch._dynamo.reset()
    graphs = []
    model = small_model(model)[1].float()
    batches = [masked_batch(rows, 0) for rows in (5, 7, 9)]
    batches = [dataclasses.replace(b, text=b.text[:, :t], text_mask=b.text_mask[:, :t], segments=b.segments[:, :t])
               for b, t in zip(batches, (6, 5, 4), strict=True)]  # fmt: skip
    plain = [model.encode(batch).pooled for batch in batches]
    compiled = torch.nn.Module.compile

    def backend(graph, _):  # one for all modules, as the real one is: another one would count as a new compilation
        return graphs.append(graph) or graph.forward

    def counting(module, **settings):
        compiled(module, backend=backend, **settings)

    monkeypatch.setattr(torch.nn.Module, "compile", counting)
    machine.compile_layers(model)
    torch.testing.assert_close(model.encode(batches[0]).pooled, plain[0])
    seen = len(graphs)
    assert seen
    for batch, expected in zip(batches[1:], plain[1:], strict=True):
        torch.testing.assert_close(model.encode(batch).pooled, expected)
    assert len(graphs) == seen


def test_the_benchmark_counts_padding_apart(tmp_path):
    """Without padding all arithmetic is useful; with lengths that differ, less is, by about the share of padding."""
    settings = {"device": "cpu", "batch_size": 4, "batches": 1}
    same = argparse.Namespace(**settings, words=9, regions=(6, 6))
    (tmp_path / "same").mkdir(), (tmp_path / "unlike").mkdir()
    run, (index,) = benchmark.make_run(same, "lxmert", "tiny", "f32", tmp_path / "same")
    batch, names = benchmark.batch_of(run, index, 0)
    assert benchmark.useful_flops(run, index, 0, {}) == benchmark.flops(run, batch, names) > 1e6
    unlike = argparse.Namespace(**settings, words=9, regions=(2, 12))
    run, _ = benchmark.make_run(unlike, "lxmert", "tiny", "f32", tmp_path / "unlike")
    index = np.arange(4)  # in no order of length
    batch, names = benchmark.batch_of(run, index, 0)
    part = benchmark.useful_flops(run, index, 0, {}) / benchmark.flops(run, batch, names)
    real = (batch.text_mask.sum() + batch.region_mask.sum()) / (batch.text_mask.numel() + batch.region_mask.numel())
    assert part < 1 and abs(part - float(real)) < 0.25
    times = benchmark.step_ours(run, index, 0)
    assert times.shape == (4,) and (times > 0).all()


@pytest.mark.parametrize("model", checkpoints.MODELS)
def test_the_benchmark_counts_whatever_a_step_trains(model, tmp_path):
    args = argparse.Namespace(device="cpu", batch_size=4, batches=1, words=9, regions=(4, 4))
    run, (index,) = benchmark.make_run(args, model, "tiny", "f32", tmp_path)
    for names in {tuple(benchmark.batch_of(run, index, step)[1]) for step in range(20)}:
        batch = tasks.make_batch(run, run.splits["train"], index, list(names), np.random.default_rng(0))
        with FlopCounterMode(display=False) as counter:
            sum(loss for loss, _ in run.model(batch, names).values()).backward()
        assert benchmark.flops(run, batch, names) == counter.get_total_flops() > 1e6, names


def test_the_benchmark_sees_every_product():
    """The products it would time alone hold all the arithmetic that torch's own counter finds."""
    layer = common.TransformerLayer(16, 2, 32)
    x = torch.randn(3, 5, 16, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        layer(x).sum().backward()
    with benchmark.Products() as products:
        layer(x).sum().backward()
    found = 0
    for (_, layouts), count in products.seen.items():
        (*rows, inner), (*_, columns) = layouts[-2][0], layouts[-1][0]  # of addmm the bias comes first
        found += 2 * count * math.prod(rows) * inner * columns
    assert found == counter.get_total_flops()
    assert 0 < benchmark.products_alone(products.seen, torch.device("cpu")) < 1


@pytest.mark.parametrize("model", ["vilbert", "lxmert"])
def test_two_streams_predict_in_true_pairs_alone_and_mask_15_percent_of_the_regions(model, tmp_path):
    """UNITER's rule, one region a picture at least, would mask a quarter of these."""
    args = argparse.Namespace(device="cpu", batch_size=4, batches=1, words=9, regions=(4, 4))
    run, _ = benchmark.make_run(args, model, "tiny", "f32", tmp_path)
    batch, _ = benchmark.batch_of(run, np.arange(512), 0)
    for index, length in ((batch.word_index, 9), (batch.region_index, 4)):
        assert len(index) and batch.matched[index // length].all()
    false = {"vilbert": 0.5, "lxmert": 0.25}[model]
    assert abs(1 - batch.matched.double().mean() - false) < 4 * (false * (1 - false) / 512) ** 0.5
    share = batch.masked_regions.float().mean()
    sigma = (0.15 * 0.85 / (512 * 4)) ** 0.5
    assert abs(share - 0.15) < 4 * sigma


def test_recall_counts_every_right_picture_once():
    scores = torch.tensor([[3.0, 1.0, 2.0], [0.0, 1.0, 2.0], [2.0, 0.0, 1.0]])
    recalls = evaluation.recall_at(scores, torch.arange(3), ks=(1, 2))
    assert recalls["text_to_image_r1"] == pytest.approx(1 / 3)
    assert recalls["text_to_image_r2"] == pytest.approx(1.0)


def test_vqa_accuracy_is_the_soft_score_of_the_best_answer(monkeypatch):
    class Questions(SimpleNamespace):
        __len__ = lambda self: 3

    answers = [{"yes": 1.0}, {"no": 0.3, "yes": 0.6}, {"maybe": 1.0}]
    dataset = Questions(answer=answers, kind=["a", "a", "b"])
    best = torch.nn.functional.one_hot(torch.tensor([0, 1, 0]), 2).float()  # yes, no, yes
    monkeypatch.setattr(tasks, "evaluation_batches", lambda run, dataset, index: [index])
    monkeypatch.setattr(tasks, "make_batch", lambda *_, **__: None)
    monkeypatch.setattr(tasks, "loss_and_logits", lambda *_: (None, best))
    asked = [("a", "yes"), ("a", "yes"), ("a", "no"), ("b", "yes"), ("b", "maybe"), ("c", "no")]
    taught = Questions(kind=[kind for kind, _ in asked], answer=[{answer: 1.0} for _, answer in asked])
    run = SimpleNamespace(answers=["yes", "no"], usual_answers=tasks.most_frequent_answers(taught))
    metrics, chance = tasks.evaluate_vqa(run, dataset)
    expected = {"accuracy": 1.3 / 3, "accuracy_a": 0.65, "accuracy_b": 0.0, "reachable": 1.6 / 3}
    assert metrics == pytest.approx(expected)
    # to questions of kind a "yes" is taught most often; of kind b two answers are, of which "maybe" comes first
    assert chance == pytest.approx({"accuracy": 2.6 / 3, "accuracy_a": 0.8, "accuracy_b": 1.0})


def test_the_usual_answer_is_the_one_with_the_largest_sum_of_scores():
    class Questions(SimpleNamespace):
        __len__ = lambda self: len(self.kind)

    answers = [{"no": 0.3, "yes": 1.0}] * 3 + [{"no": 0.3}] * 2 + [{"red": 1.0}] * 2 + [{"blue": 0.0}] * 9
    taught = Questions(kind=["a"] * 5 + ["b"] * 11, answer=answers)
    assert tasks.most_frequent_answers(taught) == {"a": "yes", "b": "red", "": "yes"}  # "": a kind that was not taught


# ---- the command line ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", checkpoints.MODELS)
def test_pretrain_then_vqa(model, pictures, tmp_path, here, capsys):
    here("--model", model, "--data", pictures, "--steps", 3)
    assert "chance" in capsys.readouterr().out
    result = json.loads((tmp_path / f"out/{model}-pretrain/result.json").read_text())
    assert {"model", "task", "split", "data", "steps", "seed", "parameters", "seconds", "chance"} <= set(result)
    start = tmp_path / f"out/{model}-pretrain/checkpoint.pt"
    here("--model", model, "--task", "vqa", "--data", pictures, "--steps", 3, "--init", start)
    printed = capsys.readouterr().out
    assert "heads.vqa" in printed and "at random" in printed
    result = json.loads((tmp_path / f"out/{model}-vqa/result.json").read_text())
    assert 0 <= result["accuracy"] <= 1 and "accuracy" in result["chance"]
    assert checkpoints.load_checkpoint(tmp_path / f"out/{model}-vqa/checkpoint.pt")["answers"] == ["no", "yes"]
    steps = [json.loads(line) for line in (tmp_path / f"out/{model}-vqa/log.jsonl").read_text().splitlines()]
    assert [s["step"] for s in steps if "lr" in s] == [1, 2, 3]


def test_resume_after_an_interruption_changes_nothing(pictures, tmp_path, here):
    options = ["--data", pictures, "--steps", 12, "--eval-every", 6, "--config", "dropout=0.1"]
    here(*options, "--out", "whole")
    command = [sys.executable, str(ROOT / "train.py"), *map(str, options), "--out", "parts", *SMALL]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    for line in process.stdout:
        if line.startswith(b"step     4/"):
            process.send_signal(signal.SIGINT)
            break
    process.stdout.read()
    error = process.stderr.read().decode()
    assert process.wait(60) == 130
    stopped = checkpoints.load_checkpoint(tmp_path / "parts/checkpoint.pt")["progress"]["step"]
    assert error == f"train.py: interrupted after step {stopped}, which is saved; go on with --resume\n"
    assert 4 <= stopped < 12
    here(*options, "--out", "parts", "--resume")
    whole = state_of(tmp_path / "whole")
    parts = state_of(tmp_path / "parts")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    logs = [(tmp_path / out / "log.jsonl").read_text().splitlines() for out in ("whole", "parts")]
    lines = [[json.loads(line) for line in log if "grad_norm" in line] for log in logs]
    assert [x["grad_norm"] for x in lines[0]] == [x["grad_norm"] for x in lines[1]]


def test_new_tensors_of_the_trunk_learn_at_the_rate_of_new_weights(pictures, tmp_path, here, monkeypatch):
    here("--data", pictures, "--steps", 1, "--objectives", "mlm", "--out", "start")
    seen = []
    monkeypatch.setattr(AdamW, "step", lambda optimizer, rate: seen.append(optimizer.at_random))
    given = ["--data", pictures, "--objectives", "mlm", "--steps", 1, "--patch", 6, "--partial", "--out", "next"]
    here(*given, "--init", tmp_path / "start/checkpoint.pt")
    assert {"region_embedding.features.weight", "region_embedding.mask"} <= seen[0]


def test_new_weights_keep_their_own_rate_after_a_resume(pictures, tmp_path, here):
    here("--data", pictures, "--steps", 1, "--out", "start")
    options = ["--task", "vqa", "--data", pictures, "--steps", 4, "--eval-every", 2, "--lr-new", 10]
    here(*options, "--init", tmp_path / "start/checkpoint.pt", "--out", "whole")
    here(*options, "--init", tmp_path / "start/checkpoint.pt", "--out", "same", "--lr-new", 1)
    (tmp_path / "parts").mkdir()
    shutil.copy(tmp_path / "whole/checkpoint.previous.pt", tmp_path / "parts/checkpoint.pt")
    here(*options, "--out", "parts", "--resume")
    whole = state_of(tmp_path / "whole")
    parts = state_of(tmp_path / "parts")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert not torch.equal(whole["heads.vqa.0.weight"], state_of(tmp_path / "same")["heads.vqa.0.weight"])


@pytest.mark.parametrize("model", ["uniter", "lxmert"])
def test_two_processes_equal_one(model, pictures, tmp_path, here):
    options = ["--model", model, "--data", pictures, "--steps", 4]
    here(*options, "--accumulate", 2, "--out", "one")
    in_two_processes(*options, "--out", "two")
    one = state_of(tmp_path / "one")
    two = state_of(tmp_path / "two")
    for name in one:
        torch.testing.assert_close(one[name], two[name], atol=2e-6, rtol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
    results = [json.loads((tmp_path / out / "result.json").read_text()) for out in ("one", "two")]
    for name in results[0]["chance"]:
        assert results[0][name] == pytest.approx(results[1][name], abs=1e-4), name


def test_all_models_and_seeds_end_in_one_table(pictures, tmp_path, here, capsys):
    options = ["--model", "all", "--task", "vqa", "--data", pictures, "--steps", 1, "--seeds", 2, "--out", "cmp"]
    here(*options)
    table = (tmp_path / "cmp/comparison.md").read_text()
    assert table in capsys.readouterr().out and all(model in table for model in checkpoints.MODELS)
    runs = json.loads((tmp_path / "cmp/comparison.json").read_text())["runs"]
    assert len(runs) == 2 * len(checkpoints.MODELS)
    mean = json.loads((tmp_path / "cmp/comparison.json").read_text())["table"]["accuracy"]["lxmert"]["mean"]
    assert mean == pytest.approx(np.mean([r["accuracy"] for r in runs if r["model"] == "lxmert"]))


def test_ablation_removes_a_modality():
    batch = data.remove_modality(masked_batch(3, 0), "image")
    assert not batch.region_mask.any() and not batch.features.any() and not batch.boxes.any()
    batch = masked_batch(3, 0)
    batch.text_mask[0, 4:] = False
    first = batch.text[:, 0].clone()
    last = torch.stack([batch.text[0, 3], batch.text[1, 5], batch.text[2, 5]])
    batch = data.remove_modality(batch, "text")
    assert batch.text.tolist() == torch.stack([first, last], 1).tolist() and batch.text_mask.all()


def test_a_loss_that_is_not_finite_stops_the_run(pictures, here, capsys):
    diverges = ["--lr", "1e30", "--clip", "1e30", "--weight-decay", 0]
    here("--data", pictures, "--steps", 60, *diverges, code=2)
    error = capsys.readouterr().err
    assert "is not finite" in error and "own.jsonl:" in error
    assert error.count("\n") == 1, error


@pytest.mark.parametrize(
    "arguments",
    [
        ["--objectives", "mlm,itc", "--temperature", "0.5", "--captions", "first", "--mask", "0.2"],
        ["--task", "retrieval", "--rerank", "5", "--temperature", "0.5", "--captions", "first", "--mine", "9"],
        ["--task", "vqa,caption", "--beams", "3", "--consensus"],
    ],
)
def test_options_are_taken_where_something_reads_them(arguments):
    assert options.parse(arguments).task


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nonsense"], "--nonsense"),
        (["--task", "vqa", "--pool", "5"], "--pool 5: is for retrieval, captions and itc"),
        (["--model", "bert"], "bert"),
        (["--task", "sing"], "sing"),
        (["--objectives", "mlm,xyz"], "xyz"),
        (["--data", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--init", "nowhere.pt"], "nowhere.pt"),
        (["--resume"], "--resume"),
        (["--steps", "-1"], "--steps"),
        (["--device", "cuda:99"], "cuda:99"),
        (["--device", "meta"], "meta: not available"),
        (["--out", "damaged.pt"], "--out damaged.pt: is a file"),
        (["--init", "damaged.pt"], "damaged.pt"),
        (["--teacher", "nowhere.pt"], "nowhere.pt"),
        (["--init", ""], "--init is empty"),
        (["--out", ""], "--out is empty"),
        (["--objectives", ""], "--objectives is empty"),
        (["--distill", "logits,dreams"], "dreams"),
        (["--distill", "hidden,hidden"], "each part once"),
        (["--temperature", "warm"], "warm"),
        (["--temperature", "0.2:2"], "0.2:2"),
        (["--rerank", "5"], "--objectives"),
        (["--task", "vqa", "--rerank", "5"], "--task retrieval"),
        (["--temperature", "0.5"], "--temperature 0.5: is for the objective itc, and changes nothing here"),
        (
            ["--objectives", "itc", "--temperature", "0.5", "--config", "contrast=hinge"],
            "--temperature 0.5: the hinge loss has none",
        ),
        (["--task", "retrieval", "--temperature", "0.5"], "for the objective itc"),
        (["--task", "vqa", "--mask", "0.2"], "--mask 0.2: is for pretraining"),
        (["--task", "vqa,refer", "--beams", "3"], "--beams 3: is for --task caption"),
        (["--init", "x.pt", "--size", "base"], "--size base: is for a start without --init"),
        (["--objectives", "mlm", "--captions", "first"], "--captions first: is for retrieval and itc"),
        (["--task", "caption", "--mine", "9"], "--mine 9: is for --task retrieval"),
        (["--task", "vqa", "--consensus"], "--consensus: is for --task caption"),
        (
            ["--task", "caption", "--beams", "3", "--consensus", "--ablate", "image"],
            "--consensus looks at the pictures",
        ),
        (["--task", "caption", "--consensus"], "--consensus chooses among the texts of a beam search; give --beams 10"),
        (["--max-words", "500"], "128 positions"),
        (["--config", "layers=two"], "layers=two"),
        (["--config", "layers=0.5"], "layers=0.5"),
        (["--config", "layers=100000000"], "1000 layers at most"),
        (["--config", "depth=2"], "depth"),
        (["--config", "dropout=NaN"], "dropout=NaN"),
        (["--config", "dropout=1e999"], "dropout=1e999"),
        (["--config", f"hidden={2**44}"], "too little memory"),
        (["--config", "contrast=softmax"], "infonce"),
        (["--config", "answers=7"], "answers"),
        (["--config", "hidden=65"], "65 is not a multiple"),
        (["--model", "vilbert", "--config", "connections=[1]"], "connections=[1]"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, message, pictures, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "damaged.pt").write_bytes(b"PK\x03\x04 not a checkpoint")
    with_data = [] if "--data" in arguments else ["--data", str(pictures)]
    assert train.main(["--steps", "1", *with_data, *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1, error


def test_an_interrupted_write_keeps_the_old_file(tmp_path, monkeypatch):
    target = tmp_path / "result.json"
    data.write_text(target, "old")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        data.write_text(target, "new")
    assert target.read_text() == "old"


def test_the_default_data_are_drawn_scenes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(scenes, "COUNTS", {"train": 20, "val": 20, "test": 130, "compose": 5})
    narrow = ["--config", "layers=1", "hidden=32", "attention_heads=2", "intermediate=64"]
    few = ["--limit", "40", "--batch-size", "4", "--steps", "1", "--eval-every", "1"]
    few += ["--device", "cpu", "--dtype", "f32"]
    for option in ("--patch=12", "--grid=6"):  # also at its default
        assert train.main([*few, *narrow, option]) == 2
        name, _, _ = option.partition("=")
        assert f"{name} is for pictures; the regions of this data set are made already" in capsys.readouterr().err
    assert train.main([*few, *narrow]) == 0
    result = json.loads((tmp_path / "out/uniter-pretrain/result.json").read_text())
    assert result["data"] == "scenes" and result["chance"]["text_to_image_r1"] == 0.01


# ---- contrast and retrieval in two stages ----------------------------------------------------------------------


@pytest.mark.parametrize("name", checkpoints.MODELS)
def test_contrast_is_of_each_modality_alone_and_of_true_pairs_only(name):
    """By hand: row by row, each modality encoded with the other one's input destroyed."""
    paper, model = small_model(name)
    batch = as_double(
        masked_batch(6, 0), pictures=torch.tensor([0, 1, 2, 0, 3, 4]), pair_index=torch.tensor([0, 2, 3, 5])
    )
    batch.region_mask[2, 2:] = False
    batch.text_mask[3, 4:] = False
    loss, scores = model(batch, ["itc"])["itc"]
    head = model.heads["itc"]
    texts = []
    images = []
    for row in batch.pair_index.tolist():
        one = batch.select(torch.tensor([row]))
        blind = one.select(torch.tensor([0]))
        deaf = one.select(torch.tensor([0]))
        blind.features = torch.randn_like(one.features)
        blind.boxes = torch.rand_like(one.boxes)
        deaf.text = torch.randint(5, 30, one.text.shape)
        texts.append(model.encode(blind, regions=False).text[0, 0] @ head.project_text.weight.T)
        states = model.encode(deaf, text=False).regions[0][one.region_mask[0]]
        images.append(states.mean(0) @ head.project_image.weight.T)
    cosines = torch.nn.functional.cosine_similarity(torch.stack(images)[:, None], torch.stack(texts)[None], dim=-1)
    torch.testing.assert_close(scores, cosines / 0.07, atol=1e-5, rtol=1e-5)  # the temperature is a float32
    hidden = torch.zeros(4, 4).double()
    hidden[0, 2] = hidden[2, 0] = -1e9  # rows 0 and 3 show one picture
    target = torch.arange(4)
    scores = cosines / 0.07 + hidden
    want = (torch.nn.functional.cross_entropy(scores, target) + torch.nn.functional.cross_entropy(scores.T, target)) / 2
    assert loss.item() == pytest.approx(want.item(), abs=1e-5)
    assert distill.items_of(paper, "itc", batch) == 4


def test_two_stages_rank_as_a_sorted_list_does(monkeypatch):
    """Random scores: a query's candidates sorted by (among the k best by dot product, then by matching; else by dot)."""
    rng = np.random.default_rng(0)
    n = 9
    m = 7
    truth = np.array([0, 1, 2, 3, 4, 5, 6, 0, 3])
    dots = torch.from_numpy(rng.uniform(-1, 1, (n, m)))
    fine = torch.from_numpy(rng.normal(0, 5, (n, m)))
    dataset = SimpleNamespace(image=truth + 10)
    asked = []

    def matching(run, dataset, texts, pictures, head):
        asked.extend(zip(texts.tolist(), (pictures - 10).tolist(), strict=True))
        return fine[texts, pictures - 10]

    monkeypatch.setattr(evaluation, "dot_products", lambda *_: dots)
    monkeypatch.setattr(evaluation, "score_pairs", matching)
    for k in (1, 2, 4, 20):
        asked.clear()
        got = evaluation.two_stage(None, dataset, np.arange(n), np.arange(10, 10 + m), k, "itm")
        ranks = {"text_to_image": [], "image_to_text": []}
        near = set()
        for text in range(n):
            best = sorted(range(m), key=lambda i, t=text: -dots[t, i])[:k]
            near |= {(text, i) for i in best}
            order = sorted(best, key=lambda i, t=text: -fine[t, i])
            order += sorted(set(range(m)) - set(best), key=lambda i, t=text: -dots[t, i])
            ranks["text_to_image"].append(order.index(truth[text]))
        for picture in range(m):
            best = sorted(range(n), key=lambda t, i=picture: -dots[t, i])[:k]
            near |= {(t, picture) for t in best}
            order = sorted(best, key=lambda t, i=picture: -fine[t, i])
            order += sorted(set(range(n)) - set(best), key=lambda t, i=picture: -dots[t, i])
            ranks["image_to_text"].append(min(order.index(t) for t in range(n) if truth[t] == picture))
        for way, found in ranks.items():
            for at in (1, 5):
                assert got[f"{way}_r{at}"] == pytest.approx(np.mean(np.array(found) < at)), (k, way, at)
        assert len(asked) == len(set(asked)) and set(asked) == near


@pytest.fixture
def own_run(pictures, tmp_path, monkeypatch):
    """What the evaluation functions need: UNITER, at random, on the own pictures."""
    monkeypatch.chdir(tmp_path)
    dataset = data.load(pictures, tasks.TASKS["pretrain"], "train", None, 4)
    tokenizer = data.train_tokenizer(dataset.text)
    dataset.encode(tokenizer)
    _, model = small_model("uniter", vocab_size=tokenizer.get_vocab_size(), feature_size=dataset.store.width)
    args = SimpleNamespace(ablate=None)
    device = torch.device("cpu")
    model.float().eval()
    run = SimpleNamespace(model=model, args=args, device=device, rank=0, world=1, autocast=train.nullcontext)
    run.tokenizer = tokenizer
    return run, dataset


def test_dot_products_and_matching_scores_one_pair_at_a_time(own_run):
    run, dataset = own_run
    texts = np.array([3, 0, 5, 4])
    images = dataset.image[[5, 4, 1]]
    with torch.inference_mode():
        dots = evaluation.dot_products(run, dataset, texts, images)
        rows = np.repeat(texts, 3)
        columns = np.tile(images, 4)
        matching = evaluation.score_pairs(run, dataset, rows, columns, "itm").view(4, 3)
        for i, text in enumerate(texts):
            for j, image in enumerate(images):
                batch = data.collate(dataset, np.array([text]), np.array([image]))
                batch.pair_index = torch.arange(1)
                cosine = run.model(batch, ["itc"])["itc"][1].item() * 0.07
                assert dots[i, j].item() == pytest.approx(cosine, abs=1e-5)
                logits = run.model(batch, ["itm"])["itm"][1][0]
                assert matching[i, j].item() == pytest.approx((logits[1] - logits[0]).item(), abs=1e-4)


def test_two_processes_contrast_as_one_with_the_double_batch(pictures, tmp_path, here):
    # with seed 0 one weight of 16,384 has a gradient near zero, whose rounding AdamW blows up to 2.2e-6
    options = ["--objectives", "itc", "--data", pictures, "--steps", 3, "--seed", 1]
    here(*options, "--batch-size", 8, "--out", "one")
    in_two_processes(*options, "--out", "two")
    here(*options, "--accumulate", 2, "--out", "parts", "--temperature", "0.2:0.1")
    one, two, parts = (state_of(tmp_path / out) for out in ("one", "two", "parts"))
    for name in one:
        torch.testing.assert_close(one[name], two[name], atol=2e-6, rtol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
    name = "heads.itc.project_text.weight"
    assert (one[name] - parts[name]).abs().max() > 1e-4  # fewer negatives: another gradient, as the docstring says
    assert one["heads.itc.log_scale"] != -math.log(0.07)  # learned
    assert math.exp(-parts["heads.itc.log_scale"].item()) == pytest.approx(0.1)  # of the last step
    results = [json.loads((tmp_path / out / "result.json").read_text()) for out in ("one", "two")]
    for name in results[0]["chance"]:
        assert results[0][name] == pytest.approx(results[1][name], abs=1e-4), name


@pytest.mark.parametrize(("temperature", "first", "last"), [("0.05", 0.05, 0.05), ("0.2:0.1", 0.2, 0.1)])
def test_temperature_is_what_the_command_line_says(temperature, first, last):
    _, model = small_model("uniter")
    run = SimpleNamespace(args=SimpleNamespace(temperature=temperature), model=model)
    for part, want in ((0.0, first), (0.5, (first + last) / 2), (1.0, last)):
        train.set_temperature(run, part)
        assert math.exp(-model.heads["itc"].log_scale.item()) == pytest.approx(want)
    assert not model.heads["itc"].log_scale.requires_grad


def test_a_finished_run_is_tested_again_at_the_temperature_of_its_end(pictures, tmp_path, here):
    """Without a val split no best weights are kept, so --resume tests the last ones."""
    lines = [line for line in pictures.read_text().splitlines() if '"val"' not in line]
    (pictures.parent / "no_val.jsonl").write_text("\n".join(lines))
    options = ["--data", pictures.parent / "no_val.jsonl", "--out", "out"]
    options += ["--objectives", "itc", "--steps", 3, "--temperature", "0.2:0.1"]
    here(*options)
    first = json.loads((tmp_path / "out/result.json").read_text())
    here(*options, "--resume")
    again = json.loads((tmp_path / "out/result.json").read_text())
    assert first["temperature"] == pytest.approx(0.1, abs=1e-5)
    assert (again["temperature"], again["itc_loss"]) == (first["temperature"], first["itc_loss"])


def test_rerank_from_the_command_line(pictures, tmp_path, here, capsys):
    here("--data", pictures, "--objectives", "itm,itc", "--steps", 0, "--rerank", 2, "--temperature", "0.2:0.1")
    result = json.loads((tmp_path / "out/uniter-pretrain/result.json").read_text())
    assert result["pool"] == 4 and "best 2 re-ranked" in capsys.readouterr().out
    assert result["temperature"] == pytest.approx(0.2)
    assert {"full_text_to_image_r1", "two_stage_image_to_text_r1", "dot_seconds"} <= set(result)
    assert result["full_text_to_image_r1"] == result["text_to_image_r1"]  # four pictures in the test split: all of them
    assert result["dot_text_to_image_r1"] == result["itc_text_to_image_r1"]


# ---- devices and processes -------------------------------------------------------------------------------------


def test_a_gpu_named_without_its_number_is_the_first(monkeypatch):
    seen = []
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: torch.ones(1))
    monkeypatch.setattr(torch.cuda, "set_device", seen.append)  # torch's own refuses a device without number
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert machine.pick_device("cuda") == torch.device("cuda:0") and seen == [torch.device("cuda:0")]
    assert machine.pick_device("cuda:1") == torch.device("cuda:1")


def test_each_process_drops_other_values_and_goes_on_with_its_own():
    args = SimpleNamespace(seed=0)
    device = torch.device("cpu")
    draws = []
    for rank in (0, 1, 2):
        torch.manual_seed(0)
        machine.seed_dropout(SimpleNamespace(args=args, rank=rank, device=device), [])
        draws.append(torch.rand(5))
    torch.manual_seed(0)
    assert torch.equal(draws[0], torch.rand(5)) and len({tuple(d.tolist()) for d in draws}) == 3
    states = [torch.Generator().manual_seed(seed).get_state() for seed in (5, 6)]
    machine.seed_dropout(SimpleNamespace(args=args, rank=1, device=device), states)
    assert torch.equal(torch.rand(5), torch.rand(5, generator=torch.Generator().manual_seed(6)))


def test_a_checkpoint_has_the_random_numbers_of_every_process(pictures, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    in_two_processes("--data", pictures, "--steps", 1, "--config", "dropout=0.1", "--out", "two")
    states = checkpoints.load_checkpoint(tmp_path / "two/checkpoint.pt")["generators"]["cpu"]
    assert len(states) == 2 and not torch.equal(*states)


def test_resume_of_several_runs_takes_up_each_where_it_is(pictures, tmp_path, here):
    options = ["--task", "vqa", "--data", pictures, "--steps", 2, "--seeds", 2, "--out", "runs"]
    here(*options)
    second = state_of(tmp_path / "runs/seed1")
    for file in (tmp_path / "runs/seed1").iterdir():
        file.unlink()  # as if the first had just ended
    here(*options, "--resume")
    again = state_of(tmp_path / "runs/seed1")
    assert all(torch.equal(second[name], again[name]) for name in second)
    assert len(json.loads((tmp_path / "runs/comparison.json").read_text())["runs"]) == 2


def test_a_run_does_not_write_over_what_it_starts_from(pictures, here, capsys):
    options = ["--task", "vqa", "--data", pictures, "--steps", 1]
    here(*options)
    for option in ("--init", "--teacher"):
        here(*options, option, "out/uniter-vqa/best.pt", code=2)
        assert f"{option} out/uniter-vqa/best.pt: this run would write over it" in capsys.readouterr().err
    here(*options, "--init", "out/uniter-vqa/best.pt", "--ablate", "image")
    assert Path("out/uniter-vqa-without-image/best.pt").is_file()


def test_a_tie_counts_as_the_share_that_is_right():
    scores = torch.tensor([[1.0, 3.0, 3.0], [2.0, 1.0, 0.0], [1.0, 1.0, 1.0]])
    hit = torch.tensor([[True, True, False], [False, True, True], [True, False, False]])
    torch.testing.assert_close(evaluation.top_choice_accuracy(scores, hit), torch.tensor([0.5, 0.0, 1 / 3]))


FRAGMENTS = """
import resource
from pathlib import Path
import numpy as np
from support import machine

def mebibytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20

machine.keep_freed_memory()
before = mebibytes()
blocks = [np.ones(2**17) for _ in range(300)]  # 1 MiB each
blocks = blocks[::10]
print(mebibytes() - before)
machine.trim_memory()
print(mebibytes() - before)
"""


@pytest.mark.skipif(machine.c_function("malloc_trim") is None, reason="glibc gives memory back in this way")
def test_gaps_between_blocks_in_use_are_given_back():
    command = [sys.executable, "-c", FRAGMENTS]
    done = subprocess.run(command, check=True, cwd=ROOT, capture_output=True, text=True)
    kept, left = map(float, done.stdout.split())
    assert kept > 290  # freed, but the blocks between them are in use
    assert left < 60


PRODUCTS = """
import resource
from pathlib import Path
import torch
from support import machine

def mebibytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20

machine.limit_compiled_products()
torch.set_num_threads(1)
weight = torch.randn(64, 64).bfloat16()
before = mebibytes()
for rows in range(20, 620):
    torch.nn.functional.linear(torch.randn(rows, 64).bfloat16(), weight)
print(mebibytes() - before)
"""


@pytest.mark.skipif(
    machine.pick_dtype("auto", torch.device("cpu")) == torch.float32, reason="the processor does not multiply bfloat16"
)
def test_products_of_many_shapes_take_little_memory():
    limits = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")  # which other tests may have set here
    unlimited = {name: value for name, value in os.environ.items() if name not in limits}
    taken = {}
    for processes in ("1", "4"):
        environment = {**unlimited, "LOCAL_WORLD_SIZE": processes}
        command = [sys.executable, "-c", PRODUCTS]
        done = subprocess.run(command, check=True, cwd=ROOT, env=environment, capture_output=True, text=True)
        taken[processes] = float(done.stdout)
    assert taken["4"] < 0.5 * taken["1"]


def test_the_limits_of_compiled_products_are_defaults(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("LRU_CACHE_CAPACITY", "1000")
    monkeypatch.delenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", raising=False)
    machine.limit_compiled_products()
    assert os.environ["LRU_CACHE_CAPACITY"] == "1000"  # what the user has set stays
    assert int(os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"]) < 1024


def test_a_long_run_gives_memory_back_now_and_then(pictures, here, monkeypatch):
    trims = []
    monkeypatch.setattr(machine, "trim_memory", lambda: trims.append(1))
    here("--data", pictures, "--task", "vqa", "--steps", 50, "--eval-every", 50)
    assert len(trims) == 2  # before the first step and after the fiftieth


# ---- options ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        "--lr -1", "--lr inf", "--lr nan", "--clip 0", "--clip -1", "--warmup 5", "--warmup -0.1", "--weight-decay -1",
        "--mask 2", "--mask -0.1", "--steps -1", "--steps 1.5", "--batch-size 0", "--accumulate 0", "--seed -1",
        "--seeds 0", "--limit 0", "--pool 0", "--beams 0", "--mine 0", "--rerank 0", "--patch 0", "--grid 0",
        "--log-every 0", "--eval-every 0", "--max-words 2", "--temperature 0", "--seed 4294967296", "--seed 1e3",
        "--clip inf", "--mask nan", "--temperature nan", "--steps ''",
    ],
)  # fmt: skip
def test_an_impossible_number_is_refused_by_name(arguments):
    option = arguments.split()[0]
    with pytest.raises(common.UserError, match=option):
        options.parse(arguments.split())


@pytest.mark.parametrize("model", ["vilbert", "lxmert"])
def test_a_size_that_the_model_lacks_is_one_line(model, pictures):
    args = options.parse(["--model", model, "--size", "large", "--data", str(pictures)])
    with pytest.raises(common.UserError, match=f"--size large: {model} has only tiny, base"):
        options.resolve_options(args, model, 0)


def test_zero_means_zero(pictures):
    args = options.parse(
        ["--data", str(pictures), "--lr", "0", "--mask", "0", "--warmup", "0", "--weight-decay", "0", "--steps", "0"]
    )
    args = options.resolve_options(args, "uniter", 0)
    assert (args.lr, args.mask, args.warmup, args.weight_decay, args.steps) == (0, 0, 0, 0, 0)
    assert train.learning_rate(5, 0.0, 0, 5) == 0


def test_a_learning_rate_of_zero_leaves_the_weights(pictures, tmp_path, here):
    here("--data", pictures, "--lr", 0, "--weight-decay", 0, "--steps", 2, "--out", "zero")
    here("--data", pictures, "--steps", 0, "--out", "start")
    trained = state_of(tmp_path / "zero")
    start = checkpoints.load_checkpoint(tmp_path / "start/best.pt")["state"]
    for name in start:
        assert torch.equal(start[name], trained[name]), name


def test_content_words_are_word_pieces_and_the_others_are_named(capsys):
    """In lower case, where the tokenizer's pieces are."""
    tokenizer = data.train_tokenizer(["a red disc", "a disc of green"] * 20)
    assert train.words_of_one_piece(tokenizer, ["Red", "red disc", "greenish", "disc", "猫"]) == ["red", "disc"]
    assert "are left out: red disc, greenish, 猫" in capsys.readouterr().out
    assert train.words_of_one_piece(tokenizer, ["red"]) == ["red"] and capsys.readouterr().out == ""


def test_texts_are_cut_at_max_words(pictures, here, monkeypatch):
    longest = []
    real = train.training_loop

    def record(run, log):
        longest.append(int(run.splits["train"].lengths()[:, 0].max()))
        real(run, log)

    monkeypatch.setattr(train, "training_loop", record)
    here("--data", pictures, "--steps", 0)
    here("--data", pictures, "--steps", 0, "--max-words", 8)
    here("--data", pictures, "--steps", 0, "--config", "max_positions=7")  # a shorter table cuts them too
    assert longest[0] > 8 and longest[1:] == [8, 7]


@pytest.mark.parametrize(
    ("gpus", "nccl", "backend"), [(True, True, "cpu:gloo,cuda:nccl"), (True, False, "gloo"), (False, True, "gloo")]
)
def test_processes_reduce_on_gpus_and_cpus_and_wait_a_day_for_features(gpus, nccl, backend, monkeypatch):
    """Counts are summed on the CPU also where the gradients are on GPUs."""
    given = []
    monkeypatch.setattr(common.torch.cuda, "is_available", lambda: gpus)
    monkeypatch.setattr(common.dist, "is_nccl_available", lambda: nccl)
    monkeypatch.setattr(common.dist, "is_initialized", lambda: False)
    monkeypatch.setattr(common.dist, "init_process_group", lambda backend, timeout: given.append((backend, timeout)))
    monkeypatch.setattr(common.dist, "get_rank", lambda: 1)
    monkeypatch.setattr(common.dist, "get_world_size", lambda: 2)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert common.rank_and_world() == (1, 2)
    ((used, wait),) = given
    assert used == backend and wait.total_seconds() == 24 * 60 * 60


def test_a_run_compares_the_pictures_with_the_cache_once(pictures, here, monkeypatch):
    """Where a picture has changed the columns are made anew; three splits are loaded one after the other."""
    here("--data", pictures, "--steps", 0)
    compared = []
    real = records.is_current
    monkeypatch.setattr(records, "is_current", lambda folder: compared.append(folder) or real(folder))
    here("--data", pictures, "--steps", 0)
    assert len(compared) == 1
    picture = pictures.parent / "0.png"
    times = picture.stat()
    os.utime(picture, ns=(times.st_atime_ns, times.st_mtime_ns + 10**9))
    here("--data", pictures, "--steps", 0)
    assert len(compared) == 2 and real(compared[1])


def test_help_has_the_default_of_every_option_that_has_one(capsys):
    with pytest.raises(SystemExit):
        options.parse(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for rows in options.OPTIONS.values():
        for name, kind, default, words in rows:
            if kind is not bool and default is not None and default != []:
                assert f"{words} (default: {default})" in text.replace("- ", "-"), name


def test_a_run_is_not_resumed_for_fewer_steps_than_it_has_made(pictures, tmp_path, here, capsys):
    here("--data", pictures, "--steps", 3, "--out", "out")
    before = (tmp_path / "out/result.json").read_bytes()
    here("--data", pictures, "--steps", 2, "--out", "out", "--resume", code=2)
    assert "has made 3 steps already, --steps is 2" in capsys.readouterr().err
    assert (tmp_path / "out/result.json").read_bytes() == before


def test_a_run_without_a_test_split_says_so(pictures, tmp_path, here, capsys):
    lines = [line for line in pictures.read_text().splitlines() if '"test"' not in line]
    (pictures.parent / "no_test.jsonl").write_text("\n".join(lines))
    here("--data", pictures.parent / "no_test.jsonl", "--steps", 1)
    assert "nothing is tested, because the data has no split test" in capsys.readouterr().out


def test_features_are_not_given_to_lines_that_have_them(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    np.savez(tmp_path / "f.npz", features=np.eye(5), boxes=np.eye(5, 4) + [0, 0, 4, 4], size=np.array([9, 9]))
    (tmp_path / "f.jsonl").write_text('\n{"features": "f.npz", "text": "a dog"}\n' * 2)
    for given in (["--features", "patches"], ["--grid", "3"], ["--patch", "8"]):
        assert train.main(["--data", "f.jsonl", "--steps", "1", *given]) == 2
        assert f"{given[0]} is for pictures" in capsys.readouterr().err


def test_features_belong_to_the_data_set_that_has_pictures(tmp_path, pictures, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savez(tmp_path / "f.npz", features=np.eye(5, 432), boxes=np.eye(5, 4) + [0, 0, 4, 4], size=np.array([9, 9]))
    (tmp_path / "f.jsonl").write_text('{"features": "f.npz", "text": "a dog"}\n' * 2)
    options = ["--data", f"{pictures},f.jsonl", "--task", "vqa,caption", "--features", "patches", "--steps", "1"]
    assert train.main([*options, "--batch-size", "4", "--config", "layers=1"]) == 0


def test_blank_lines_do_not_hide_what_the_first_line_names(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf\n \n" + b'{"image": "a.png"}\n')
    assert records.first_record(tmp_path / "a.jsonl") == {"image": "a.png"}


def test_the_first_line_is_not_read_further_than_lines_may_be_long(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "LINE_BYTES", 100)
    (tmp_path / "a.jsonl").write_text(json.dumps({"image": "a.png", "text": "long " * 100}))
    assert records.first_record(tmp_path / "a.jsonl") == {}


def test_every_option_has_a_help_text_and_a_group():
    for title, rows in options.OPTIONS.items():
        for name, _, _, text in rows:
            assert name.startswith("--") and len(text) > 10, (title, name)


# ---- optimization ----------------------------------------------------------------------------------------------


def test_a_step_clips_warms_up_and_decays_as_the_options_say(pictures, here, monkeypatch):
    seen = []
    real = AdamW.step

    def record(optimizer, rate):
        gradients = [p.grad for p in optimizer.parameters.values() if p.grad is not None]
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients))
        seen.append((norm, rate, optimizer.weight_decay))
        real(optimizer, rate)

    monkeypatch.setattr(AdamW, "step", record)
    given = ["--data", pictures, "--objectives", "mlm", "--steps", 4, "--lr", 0.01, "--warmup", 0.5]
    here(*given, "--clip", 0.001)
    for norm, _, decay in seen:
        assert norm == pytest.approx(0.001, rel=1e-3)
        assert decay == 0.01  # the default
    assert [rate for _, rate, _ in seen] == pytest.approx([0.005, 0.01, 0.005, 1e-8])
    seen.clear()
    here(*given, "--clip", 1e6, "--weight-decay", 0.2)
    for norm, _, decay in seen:
        assert norm > 0.01
        assert decay == 0.2


def test_each_loss_counts_with_the_factor_of_its_paper():
    """UNITER gives word-region alignment a tenth."""
    torch.manual_seed(0)
    config = uniter.Config(**uniter.PRESETS["tiny"], vocab_size=30, feature_size=8, classes=5)
    model = uniter.UNITER(config).double()
    batch = as_double(masked_batch(4, 1))
    run = SimpleNamespace(model=model, paper=uniter, device=torch.device("cpu"), teacher=None)
    run.autocast = train.nullcontext
    losses = train.backward(run, [batch], ["itm", "wra"])
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    parts = model(batch, ["itm", "wra"])
    (parts["itm"][0] + 0.1 * parts["wra"][0]).backward()
    for name, (loss, _) in parts.items():
        assert float(losses[name]) == pytest.approx(float(loss.detach()))  # the log has it without the factor
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(found[name], parameter.grad, atol=1e-12, rtol=1e-9)


def test_steps_run_in_training_mode_and_begin_with_the_first_temperature(pictures, here, monkeypatch):
    seen = []
    real = train.backward

    def record(run, batches, names):
        temperature = math.exp(-run.model.heads["itc"].log_scale.item())
        seen.append((run.model.training, pytest.approx(temperature)))
        return real(run, batches, names)

    monkeypatch.setattr(train, "backward", record)
    given = ["--data", pictures, "--objectives", "itc", "--steps", 2, "--eval-every", 1, "--temperature", "0.2:0.1"]
    here(*given)
    assert seen == [(True, 0.2), (True, 0.1)]


def test_limit_is_of_the_training_split_alone(pictures, here, monkeypatch):
    counts = []
    monkeypatch.setattr(train, "training_loop", lambda run, log: counts.append([*map(len, run.splits.values())]))
    here("--data", pictures, "--task", "vqa", "--steps", 0, "--limit", 3)
    assert counts == [[3, 4, 4]]


# ---- the log --------------------------------------------------------------------------------------------------


def log_of(tmp_path, world=1):
    """A Log of a run of 10 steps of 2 examples a process."""
    args = SimpleNamespace(out=tmp_path, resume=False, steps=10, batch_size=64, accumulate=1)  # of 2 lines of data
    progress = {"step": 0, "seconds": 0.0, "examples": 0}
    return log.Log(SimpleNamespace(args=args, rank=0, world=world, progress=progress))


def test_a_line_of_the_log_has_means_and_counts_the_examples_of_all_processes(tmp_path, capsys):
    lines = log_of(tmp_path, world=3)
    progress = lines.run.progress
    for step, loss in ((1, 2.0), (2, 5.0), (3, 4.0)):
        progress["step"] = step
        losses = {"mlm": torch.tensor(loss)}
        if step == 2:
            losses = {"itm": torch.tensor(loss)}
        lines.add(losses, torch.tensor(0.5 * step), 0.1, [SimpleNamespace(ids=["a", "b"])], waited=0.0, worked=0.5)
    progress["step"] = 3
    lines.line()
    lines.add({"mlm": torch.tensor(7.0)}, torch.tensor(1.0), 0.1, [SimpleNamespace(ids=["a", "b"])], 0.0, 0.5)
    lines.line()
    first, second = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    expected = {"step": 3, "lr": 0.1, "grad_norm": 1.5, "examples_per_second": 12.0, "mlm": 3.0, "itm": 5.0}
    assert first == expected
    assert second["mlm"] == 7.0  # only since the last line
    assert "12 examples/s  0:03 left" in capsys.readouterr().out  # 7 steps of 0.5 s, whatever --batch-size says
    assert (progress["examples"], progress["seconds"]) == (4 * 2 * 3, 2.0)


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_a_loss_or_a_gradient_that_is_no_number_is_named_with_its_step(wrong, tmp_path):
    fine = torch.tensor(1.0)
    for losses, grad_norm, message in (
        ({"mlm": fine, "itm": torch.tensor(wrong)}, fine, "step 4: the loss of itm"),
        ({"mlm": fine, "itm": fine}, torch.tensor(wrong), "step 4: the gradient of mlm, itm"),
    ):
        lines = log_of(tmp_path)
        lines.run.progress["step"] = 4
        lines.add({"mlm": fine}, fine, 0.1, [SimpleNamespace(ids=["a"])], 0.0, 0.5)
        lines.check()
        lines.add(losses, grad_norm, 0.1, [SimpleNamespace(ids=["b", "c"])], 0.0, 0.5)
        with pytest.raises(common.UserError, match=f"{message} is not finite.* b, c"):
            lines.check()


# ---- the order of examples and random numbers ------------------------------------------------------------------


class Lengths:
    """A dataset of which only the lengths are known."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def lengths(self):
        return np.full((self.count, 2), 5)


def order_of(seed, epochs=2, skip=0):
    """The examples in the order in which they are trained, 8 examples in steps of 4."""
    args = SimpleNamespace(seed=seed, batch_size=4)
    stream = train.index_stream(args, Lengths(8), parts=1, skip=skip)
    return [next(stream).tolist() for _ in range(2 * epochs - skip)]


def test_an_epoch_ends_with_a_shorter_step_which_a_resumed_run_counts():
    def order(skip=0):
        args = SimpleNamespace(seed=0, batch_size=4)
        stream = train.index_stream(args, Lengths(10), parts=1, skip=skip)
        return [next(stream).tolist() for _ in range(6 - skip)]

    steps = order()
    for epoch in (steps[:3], steps[3:]):
        assert sorted(itertools.chain.from_iterable(epoch)) == list(range(10))
    for skip in range(6):
        assert order(skip) == steps[skip:]


def test_steps_draw_objectives_by_the_ratios_of_the_run():
    rng = np.random.default_rng(0)
    drawn = [train.sample_objectives(uniter, {"mlm": 1, "itc": 3}, rng, 1.0)[0] for _ in range(3000)]
    assert abs(drawn.count("itc") / 3000 - 3 / 4) < 4 * math.sqrt(3 / 16 / 3000)


def test_each_epoch_has_every_example_once_in_an_order_of_its_own():
    first, second, third, fourth = order_of(seed=0)
    assert sorted(first + second) == sorted(third + fourth) == list(range(8))
    assert first + second != third + fourth
    assert first + second != list(range(8))
    assert order_of(seed=0) == order_of(seed=0) != order_of(seed=1)
    for skip in range(4):
        assert order_of(seed=0, skip=skip) == order_of(seed=0)[skip:]


def test_each_forward_pass_of_each_step_draws_numbers_of_its_own(monkeypatch):
    draws = []

    def record(run, dataset, index, names, rng):
        draws.append((float(rng.random()), tuple(index)))

    monkeypatch.setattr(tasks, "make_batch", record)
    for seed in (0, 1):
        for rank in (0, 1):
            args = SimpleNamespace(seed=seed, task="vqa", tasks=["vqa"], accumulate=2, batch_size=2, rerank=None)
            run = SimpleNamespace(args=args, rank=rank, world=2, device=torch.device("cpu"), progress={"step": 0})
            run.sets = {"vqa": {"train": Lengths(16)}}
            streams = train.index_streams(run)
            for step in (1, 2):
                train.prepare_step(run, streams, step)
    numbers = [number for number, _ in draws]
    assert len(draws) == 16 and len(set(numbers)) == 16
    examples = [index for _, index in draws[:8]]  # seed 0: two steps of two processes of two passes
    assert sorted(sum(examples, ())) == list(range(16))


def test_after_a_resume_each_task_goes_on_after_its_own_steps():
    args = SimpleNamespace(seed=0, accumulate=1, batch_size=2)
    run = SimpleNamespace(args=args, world=1, progress={"step": 0})
    run.sets = {"vqa": {"train": Lengths(10)}, "refer": {"train": Lengths(14)}}
    whole = train.index_streams(run)
    for step in range(1, 12):
        next(whole[train.sample_task(run, step)])
    run.progress["step"] = 11
    resumed = train.index_streams(run)
    for task in run.sets:
        assert next(whole[task]).tolist() == next(resumed[task]).tolist()


def test_mask_is_the_share_of_masked_words(own_run):
    run, dataset = own_run
    run.paper = uniter
    run.answers = []
    index = np.arange(len(dataset))
    shares = []
    for run.args.mask in (0.0, 0.2, 1.0):
        batch = tasks.make_batch(run, dataset, index, ["mlm"], np.random.default_rng(0))
        words = int(batch.text_mask.sum()) - 2 * len(batch.text)  # without [CLS] and [SEP]
        shares.append(len(batch.word_index) / words)
    assert shares[0] == 0 and 0.1 < shares[1] < 0.35 and shares[2] == 1


# ---- nothing of val and test is learned ------------------------------------------------------------------------


def test_tokenizer_and_answers_come_from_the_training_split(pictures, tmp_path, here):
    lines = [json.loads(line) for line in pictures.read_text().splitlines()]
    for line in lines:
        line["image"] = str(pictures.parent / line["image"])
        if line["split"] != "train":
            line["text"] += " ζ"
            line["answer"] = f"only in {line['split']}"
    (tmp_path / "marked.jsonl").write_text("\n".join(map(json.dumps, lines)))
    here("--data", "marked.jsonl", "--task", "vqa", "--steps", 0)
    checkpoint = checkpoints.load_checkpoint(tmp_path / "out/uniter-vqa/best.pt")
    assert "ζ" not in json.dumps(json.loads(checkpoint["tokenizer"]), ensure_ascii=False)
    assert checkpoint["answers"] == ["no", "yes"]
    assert set(checkpoint["usual_answers"].values()) <= {"no", "yes"}  # by which chance is measured


def test_the_test_has_the_best_weights_not_the_last(pictures, tmp_path, here, monkeypatch, capsys):
    values = []

    def evaluate(run, split):
        value = run.model.heads["vqa"][-1].bias.sum().item()
        values.append((split, value))
        return {"accuracy": value}, {"accuracy": 0.5}

    scores = iter([1.0, 3.0, 3.0, 2.0])  # after steps 0 to 3: of equal ones the last is kept
    monkeypatch.setattr(tasks, "evaluate", evaluate)
    monkeypatch.setattr(tasks, "best_score", lambda run, metrics: (next(scores), "a number"))
    here("--data", pictures, "--task", "vqa", "--steps", 3, "--eval-every", 1)
    assert len({value for _, value in values[:4]}) == 4
    assert values[4] == ("test", values[2][1])
    assert "weights of step 2" in capsys.readouterr().out


def test_without_a_val_split_the_last_weights_are_the_best(pictures, tmp_path, here):
    """So that the commands of the README, which name best.pt, work for data that have train and test alone."""
    lines = [json.loads(line) for line in pictures.read_text().splitlines()]
    for line in lines:
        line["image"] = str(pictures.parent / line["image"])
    kept = [line for line in lines if line["split"] != "val"]
    (tmp_path / "no_val.jsonl").write_text("\n".join(map(json.dumps, kept)))
    given = ["--data", "no_val.jsonl", "--task", "vqa", "--eval-every", 1]
    for steps, more in ((2, []), (3, ["--resume"])):
        here(*given, "--steps", steps, *more)
        best, last = (checkpoints.load_checkpoint(tmp_path / f"out/uniter-vqa/{n}.pt") for n in ("best", "checkpoint"))
        assert best["progress"]["step"] == steps
        for name, value in last["state"].items():
            assert torch.equal(best["state"][name], value), name


def test_a_loss_without_accuracy_chooses_the_best_weights(pictures, tmp_path, here, capsys):
    here("--data", pictures, "--objectives", "mrfr", "--steps", 2, "--eval-every", 1)
    assert "mrfr_loss" in capsys.readouterr().out.split("best     step 2")[1]
    assert checkpoints.load_checkpoint(tmp_path / "out/uniter-pretrain/best.pt")["progress"]["step"] == 2


# ---- resume and the run's folder -------------------------------------------------------------------------------


def test_resume_keeps_the_best_of_before(pictures, tmp_path, here):
    given = ["--data", pictures, "--task", "vqa", "--eval-every", 1, "--steps", 1]
    here(*given)
    path = tmp_path / "out/uniter-vqa/checkpoint.pt"
    checkpoint = checkpoints.load_checkpoint(path)
    checkpoint["progress"]["best"] = 1e9
    torch.save(checkpoint, path)
    before = path.with_name("best.pt").read_bytes()
    here(*given, "--resume", "--steps", 3)
    assert path.with_name("best.pt").read_bytes() == before


def test_a_decay_that_takes_weights_beyond_zero_is_refused(pictures, here, capsys):
    for given in (["--lr", 1, "--weight-decay", 1], ["--weight-decay", 1e5]):
        here("--data", pictures, "--steps", 2, *given, code=2)
        assert "--lr times --lr-new times --weight-decay is 1 or more" in capsys.readouterr().err


def test_a_run_that_cannot_start_leaves_the_earlier_one(pictures, here, capsys):
    given = ["--data", pictures, "--task", "vqa", "--batch-size", 2]
    here(*given, "--steps", 1)
    before = Path("out/uniter-vqa/checkpoint.pt").read_bytes()
    here(*given, "--steps", 2, "--limit", 3, "--accumulate", 4, code=2)
    assert "3 examples are too few for 4 forward passes" in capsys.readouterr().err
    assert Path("out/uniter-vqa/checkpoint.pt").read_bytes() == before


def test_resume_drops_log_lines_after_the_checkpoint_and_a_torn_one(tmp_path):
    lines = [json.dumps({"step": step, "lr": 0.1}) for step in range(6)]
    (tmp_path / "log.jsonl").write_text("\n".join(lines) + '\n{"step": 2, "l')
    args = SimpleNamespace(out=tmp_path, resume=True)
    log.Log(SimpleNamespace(args=args, rank=0, progress={"step": 3}))
    assert (tmp_path / "log.jsonl").read_text().splitlines() == lines[:4]
    damaged = b'\xff\xfe{"step": 1}\n[]\n3\n{"lr": 1}\n{"step": "x"}\n{"step": 2}\n\n{"st'
    (tmp_path / "log.jsonl").write_bytes(damaged)
    log.Log(SimpleNamespace(args=args, rank=0, progress={"step": 3}))
    assert (tmp_path / "log.jsonl").read_text() == '{"step": 2}\n'


def test_a_run_that_dies_in_the_folder_of_an_earlier_one_is_not_mixed_with_it(pictures, here, monkeypatch, capsys):
    options = ["--data", pictures, "--task", "vqa"]
    here(*options, "--steps", 2)

    def die(*_):
        raise SystemError("killed")

    with monkeypatch.context() as patch, pytest.raises(SystemError):
        patch.setattr(train, "backward", die)
        here(*options, "--steps", 2)  # best.pt is written before the first step
    capsys.readouterr()
    here(*options, "--steps", 4, "--resume", code=2)
    assert "there is no out/uniter-vqa/checkpoint.pt" in capsys.readouterr().err


def test_a_mistake_for_a_later_model_is_named_before_the_first_is_trained(pictures, here, capsys):
    for option in (["--objectives", "mlm,itm,wra"], ["--config", "nlvr2=paired"]):
        assert train.main(["--model", "all", "--data", str(pictures), *option]) == 2
        error = capsys.readouterr().err
        assert error.startswith(("train.py: --objectives: vilbert has no", "train.py: --config nlvr2")), error
        assert not Path("out").exists()


def test_pretraining_without_questions_in_val_and_test_goes_on(tmp_path, here):
    Image.new("RGB", (20, 20), "red").save(tmp_path / "a.png")
    Image.new("RGB", (20, 20), "blue").save(tmp_path / "b.png")
    lines = []
    for name in "ab":
        lines.append({"image": f"{name}.png", "text": f"what is {name}?", "answer": name})
        for split in data.SPLITS:
            lines.append({"image": f"{name}.png", "text": f"this is {name}", "split": split})
    (tmp_path / "my.jsonl").write_text("\n".join(map(json.dumps, lines)))
    here("--model", "lxmert", "--data", "my.jsonl", "--features", "patches", "--steps", 1)
    result = json.loads(Path("out/lxmert-pretrain/result.json").read_text())
    assert "mlm_accuracy" in result and "qa_accuracy" not in result


def test_the_result_has_the_temperature_of_losses_that_have_one(pictures, tmp_path, here):
    for name, told in (("infonce", True), ("hinge", False)):
        here("--data", pictures, "--steps", 1, "--objectives", "itc", "--config", f"contrast={name}", "--out", name)
        assert ("temperature" in json.loads((tmp_path / name / "result.json").read_text())) == told


def test_patches_are_cut_as_in_the_start(pictures, tmp_path, here, capsys):
    """--patch and --grid that are not given are those of --init, --teacher and --resume; others are said."""
    given = ["--data", pictures, "--steps", 1]
    here(*given, "--patch", 4, "--grid", 3, "--out", "start")
    start = checkpoints.load_checkpoint(tmp_path / "start/checkpoint.pt")
    for option in ("--init", "--teacher"):
        here(*given, "--steps", 0, option, "start/checkpoint.pt", "--out", "next")
        here(*given, option, "start/checkpoint.pt", "--out", "next")
        found = checkpoints.load_checkpoint(tmp_path / "next/checkpoint.pt")
        assert (found["patch"], found["grid"]) == (start["patch"], start["grid"]) == (4, 3)
    capsys.readouterr()
    here(*given, "--steps", 2, "--resume", "--out", "start")
    assert capsys.readouterr().err == ""
    here(*given, "--init", "start/checkpoint.pt", "--grid", 2, "--out", "other")
    assert "warning: --grid 2: start/checkpoint.pt was trained with 3\n" in capsys.readouterr().err
    assert checkpoints.load_checkpoint(tmp_path / "other/checkpoint.pt")["grid"] == 2
    here(*given, "--init", "start/checkpoint.pt", "--fresh", "--out", "fresh")
    assert checkpoints.load_checkpoint(tmp_path / "fresh/checkpoint.pt")["grid"] == 6


def test_a_used_folder_is_said_and_a_folder_in_use_is_refused(pictures, tmp_path, here, capsys):
    here("--data", pictures, "--steps", 0)
    assert "holds an earlier run" not in capsys.readouterr().out
    here("--data", pictures, "--steps", 0)
    assert "holds an earlier run" in capsys.readouterr().out
    with log.lock_folder(tmp_path / "out/uniter-pretrain", rank=0):
        here("--data", pictures, "--steps", 0, code=2)
    error = capsys.readouterr().err
    assert "another run is writing there" in error and error.count("\n") == 1
    here("--data", pictures, "--steps", 0)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError(), "too little memory"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "too little memory"),
        (OSError(28, "No space left on device", "best.pt.tmp"), "best.pt.tmp: No space left on device"),
        (PermissionError(13, "Permission denied", "out"), "out: Permission denied"),
        (RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0"), "is the disk full?"),
    ],
)
def test_what_the_machine_refuses_is_one_line(error, message, pictures, here, monkeypatch, capsys):
    def fail(run, name):
        raise error

    monkeypatch.setattr(checkpoints, "save_checkpoint", fail)
    here("--data", pictures, "--steps", 1, code=2)
    text = capsys.readouterr().err
    assert message in text and text.count("\n") == 1


@pytest.mark.parametrize("command", ["train.py", "predict.py", "data.py", "prepare/scenes.py", "prepare/features.py",
                                     "prepare/coco.py", "prepare/refcoco.py", "prepare/bottom_up.py"])  # fmt: skip
def test_ctrl_c_is_one_line_also_while_torch_is_imported(command, tmp_path):
    """A stand-in for torch takes the place of the user who presses Ctrl-C while the real one is read."""
    (tmp_path / "torch.py").write_text("raise KeyboardInterrupt")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    call = [sys.executable, str(ROOT / command)]
    done = subprocess.run(call, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 130 and done.stderr == f"{Path(command).name}: interrupted\n", done.stderr


def test_ctrl_c_before_the_first_step_is_one_line(pictures, here, monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "build_model", interrupt)
    here("--data", pictures, "--steps", 1, code=130)
    assert capsys.readouterr().err == "train.py: interrupted; saved checkpoints are kept\n"


def test_a_full_disk_names_the_file_that_did_not_fit(tmp_path):
    """Python's own error of a write says nothing of it."""

    def fail(_):
        raise OSError(28, "No space left on device")

    for write in (lambda: data.write_whole(tmp_path / "a", fail), lambda: data.make_once(tmp_path / "a", fail)):
        with pytest.raises(OSError, match="No space left") as error:
            write()
        assert machine.explain(error.value) == f"{tmp_path}/a: No space left on device"
        assert list(tmp_path.iterdir()) == []


def test_a_head_left_at_random_is_said_on_the_result_line(pictures, tmp_path, here, capsys):
    given = ["--data", pictures, "--task", "vqa"]
    here(*given, "--steps", 0, "--out", "untrained")
    assert "4 examples, weights of step 0; WARNING: untrained, at random: vqa" in capsys.readouterr().out
    assert json.loads((tmp_path / "untrained/result.json").read_text())["random_heads"] == ["vqa"]
    here(*given, "--steps", 1, "--out", "trained")
    output = capsys.readouterr().out
    command = output.splitlines()[-1].removeprefix("to see it at work: python predict.py ").split()
    assert predict.main([*command, "--device", "cpu"]) == 0
    best = checkpoints.load_checkpoint(tmp_path / "trained/best.pt")
    tested_at_random = best["progress"]["step"] == 0  # no later step was better
    assert ("WARNING" in output) == tested_at_random
    capsys.readouterr()
    here(*given, "--steps", 0, "--init", "trained/checkpoint.pt", "--out", "again")
    assert "WARNING" not in capsys.readouterr().out


# ---- killed at any moment ----------------------------------------------------------------------------------------


def train_and_be_killed(moment, folder, arguments):
    """train.py, killed when it is about to sync or rename a file for the `moment`th time."""
    calls = []

    def or_die(function):
        def call(*given):
            calls.append(given)
            if len(calls) == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*given)

        return call

    os.chdir(folder)
    os.fsync = or_die(os.fsync)
    os.replace = or_die(os.replace)
    train.main(narrow([*SMALL, *arguments]))


def test_a_run_that_is_killed_in_its_saves_ends_as_the_undisturbed_one(pictures, tmp_path, here):
    """SIGKILL before a file is synced or renamed; weights, best weights and log are then equal to the last bit."""
    options = ["--data", pictures, "--steps", "9", "--eval-every", "2", "--log-every", "3", "--config", "dropout=0.1"]
    here(*options, "--out", "whole")
    rng = np.random.default_rng(0)
    for first, last in ((5, 12), (13, 18)):  # about the first and the second checkpoint, the third and the fourth
        out = f"killed{first}"
        moment = int(rng.integers(first, last + 1))
        assert in_a_fork(train_and_be_killed, moment, tmp_path, [*options, "--out", out]) == -signal.SIGKILL
        goes_on = ["--resume"] if resume.has_checkpoint(tmp_path / out) else []
        here(*options, "--out", out, *goes_on)
        for name in ("checkpoint.pt", "best.pt"):
            whole, killed = (checkpoints.load_checkpoint(tmp_path / folder / name) for folder in ("whole", out))
            assert all(torch.equal(whole["state"][key], killed["state"][key]) for key in whole["state"])
            for key in ("step", "best", "examples"):
                assert whole["progress"][key] == killed["progress"][key], key
        logs = []
        for folder in ("whole", out):
            lines = [json.loads(line) for line in (tmp_path / folder / "log.jsonl").read_text().splitlines()]
            logs.append([{**line, "examples_per_second": 0} for line in lines])
        assert logs[0] == logs[1]
        assert not list((tmp_path / out).glob("*.tmp"))


# ---- output ----------------------------------------------------------------------------------------------------


def test_output_that_cannot_encode_a_character_escapes_it():
    raw = io.BytesIO()
    with contextlib.redirect_stdout(io.TextIOWrapper(raw, encoding="ascii")), log.safe_output():
        print("caf\u00e9 \u7530", flush=True)
        assert raw.getvalue() == b"caf\\xe9 \\u7530\n"


@pytest.mark.parametrize("error", [BrokenPipeError, OSError(28, "No space left on device"), ValueError("closed file")])
def test_output_that_fails_is_dropped(error):
    class Broken(io.StringIO):
        def write(self, text):
            raise error

        def flush(self):
            raise error

    with contextlib.redirect_stdout(Broken()), log.safe_output():
        print("lost", flush=True)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_behind_stdout_and_stderr_ends_no_run(pictures, tmp_path):

    def train_on_a_full_disk():
        os.chdir(tmp_path)
        sys.stdout = sys.stderr = open("/dev/full", "w", encoding="ascii")  # noqa: SIM115 (until the process ends)
        sys.exit(train.main(narrow([*SMALL, "--data", pictures, "--steps", "1"])))

    assert in_a_fork(train_on_a_full_disk) == 0
    assert "seconds" in json.loads((tmp_path / "out/uniter-pretrain/result.json").read_text())


# ---- small and odd sets ----------------------------------------------------------------------------------------


ONE_EXAMPLE = [(model, task) for model in checkpoints.MODELS for task in ("pretrain", "retrieval")]
ONE_EXAMPLE += [("uniter", "ve"), ("vilbert", "vcr"), ("lxmert", "refer"), ("uniter", "nlvr2"), ("vilbert", "caption")]


@pytest.mark.parametrize("model, task", ONE_EXAMPLE)
def test_one_picture_and_one_example_a_split_work_or_are_one_line(model, task, pictures, tmp_path, here, capsys):
    line = json.loads(pictures.read_text().splitlines()[0])
    image = str(pictures.parent / line["image"])
    line["image"] = image
    if task == "ve":
        line["answer"] = "neutral"
    elif task == "vcr":
        line |= {"choices": ["a", "b"], "label": 1, "reasons": ["c", "d"], "reason": 0}
    elif task == "refer":
        line["target"] = line["boxes"][0]
    elif task == "nlvr2":
        line = {"images": [image, image], "text": "x", "label": True}
    lines = [json.dumps({**line, "split": split}) for split in ("train", "val", "test")]
    (tmp_path / "one.jsonl").write_text("\n".join(lines))
    given = [*SMALL, "--model", model, "--task", task, "--data", "one.jsonl", "--steps", "2"]
    code = train.main(narrow(given))
    output = capsys.readouterr()
    errors = [line for line in output.err.splitlines() if not line.startswith("warning: ")]
    assert code == 0 or len(errors) == 1
    assert "no better than chance" not in output.out


# ---- several processes -----------------------------------------------------------------------------------------


def test_one_process_that_dies_ends_the_others(pictures, tmp_path):
    program = tmp_path / "dies.py"
    program.write_text(
        f"import os, signal, sys\nsys.path.insert(0, {str(ROOT)!r})\nimport train\n"
        "real = train.backward\n"
        "def backward(run, batches, names):\n"
        "    if run.rank == 1 and run.progress['step'] == 2:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return real(run, batches, names)\n"
        "train.backward = backward\n"
        "code = train.main(sys.argv[1:])\n"
        "os._exit(code)\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["--monitor_interval=1", str(program)]  # else torchrun may end the other before it has said why
    command += [*SMALL, "--data", str(pictures), "--steps", "50", "--batch-size", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode != 0
    assert "train.py: another process of this run has ended" in done.stderr


def test_a_mistake_is_said_once_by_several_processes(pictures, tmp_path, monkeypatch, capfd):
    """One that all find before they know of each other, one that all find later, one that the first finds."""
    (tmp_path / "bad.jsonl").write_text('{"image": "nowhere.png", "text": "x"}\n')
    monkeypatch.chdir(tmp_path)
    for mistake, said in (
        (["--objectives", "none"], "none"),
        (["--data", pictures, "--max-words", "9999"], "the model has only"),
        (["--data", "bad.jsonl"], "bad.jsonl:1"),
    ):
        in_two_processes(*mistake, code=2)
        own_lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("train.py:")]
        assert said in own_lines[0]
        assert sum(said in line for line in own_lines) == 1


def test_the_first_row_of_a_step_is_mismatched_as_often_as_any_other(pictures):
    """The draw of the objective and that of the first batch were one stream: with one row a step, matching steps never
    had a mismatched pair."""
    args = options.resolve_options(options.parse(["--data", str(pictures), "--batch-size", "1"]), "uniter", 0)
    dataset = data.load(pictures, tasks.TASKS["caption"], "train", patch=4)
    tokenizer = data.own_tokenizer([dataset])
    dataset.encode(tokenizer)
    run = SimpleNamespace(
        args=args, paper=uniter, objectives={"mlm": 1, "itm": 1}, sets={"pretrain": {"train": dataset}}
    )
    run.tokenizer, run.answers, run.rank, run.world, run.device = tokenizer, [], 0, 1, torch.device("cpu")
    streams = {"pretrain": train.index_stream(args, dataset, 1, 0)}
    matched = []
    for step in range(1, 401):
        (batch,), names = train.prepare_step(run, streams, step)
        if names == ["itm"]:
            matched.append(int(batch.matched))
    share = 1 - np.mean(matched)
    assert len(matched) > 150 and abs(share - 0.5) < 4 * math.sqrt(0.25 / len(matched))


@pytest.mark.parametrize(
    ("widths", "probs", "given", "message"),
    [
        ({"val": 5}, {}, [], "train.py: --data: features of widths 4 and 5; all tasks need one width\n"),
        ({}, {"train"}, ["--objectives", "mrc_kl"], "the data have nothing for any of the objectives"),
        ({}, {"train"}, ["--objectives", "mlm,mrc_kl"], ""),
        ({}, {}, ["--objectives", "itm,itc", "--rerank", "2"], "--rerank needs the objectives itm and itc"),
    ],
)
def test_stores_of_the_splits_that_differ(widths, probs, given, message, tmp_path, monkeypatch, capsys):
    """Each split may have a store of its own. All need features of one width, and the labels that objectives read."""
    lines = []
    for split in ("train", "val", "test"):
        picture = {"features": np.ones((2, widths.get(split, 4))), "boxes": np.tile([0.0, 0, 1, 1], (2, 1))}
        if split in probs:
            picture["object_probs"] = np.full((2, 3), 1 / 3)
        data.write_store(tmp_path / split, [picture])
        lines += [json.dumps({"features": f"{split}#0", "text": "a dog runs", "split": split})] * 4
    (tmp_path / "my.jsonl").write_text("\n".join(lines))
    monkeypatch.chdir(tmp_path)
    code = train.main(["--data", "my.jsonl", "--steps", "1", "--batch-size", "2", "--device", "cpu", *given])
    shown = capsys.readouterr()
    assert code == (2 if message else 0) and message in shown.err
    if probs:
        first = next(split for split in ("train", "val", "test") if split not in probs)
        assert f"objective mrc_kl is left out: the regions of {first} have no object_probs" in shown.out


def test_crops_are_for_training_and_belong_to_the_fingerprint(tmp_path, monkeypatch, capsys):
    """predict.py shows the whole picture of a line of split train too; --resume notices other crops."""
    rng = np.random.default_rng(0)
    pictures = []
    for crops in (2, 0, 0) * 4:
        pictures.append({"features": rng.random((2, 4)), "boxes": np.tile([0.0, 0, 1, 1], (2, 1)), "crops": crops})
    data.write_store(tmp_path / "store", pictures)
    lines = [json.dumps({"features": f"store#{row}", "text": "a dog", "answer": "yes"}) for row in range(0, 12, 3)]
    (tmp_path / "my.jsonl").write_text("\n".join(lines))
    monkeypatch.chdir(tmp_path)
    command = ["--data", "my.jsonl", "--task", "vqa", "--batch-size", "2", "--device", "cpu", "--out", "run"]
    assert train.main([*command, "--steps", "1"]) == 0
    assert "training draws crops of the pictures" in capsys.readouterr().out
    seen = []
    original = data.FeatureStore.gather
    monkeypatch.setattr(data.FeatureStore, "gather", lambda self, *rest: seen.extend(rest[0]) or original(self, *rest))
    assert predict.main(["run/best.pt", "--data", "my.jsonl", "--device", "cpu"]) == 0
    assert sorted(seen) == [0, 3, 6, 9]
    for change in ("a crop", "no crops"):
        if change == "a crop":
            pictures[2]["features"] = rng.random((2, 4))
        else:
            pictures = [{key: value for key, value in picture.items() if key != "crops"} for picture in pictures]
        data.write_store(tmp_path / "store", pictures)
        assert data.FeatureStore(tmp_path / "store").crops is None or change == "a crop"
        assert train.main([*command, "--steps", "2", "--resume"]) == 2
        assert "pictures" in capsys.readouterr().err


def test_equal_models_tie():
    same = {"mean": 0.9, "spread": 0.0}
    assert evaluation.best_model({"a": same, "b": dict(same)}) == "tie"


def test_the_second_half_begins_with_the_step_after_the_middle(monkeypatch):
    given = []
    monkeypatch.setattr(tasks, "make_batch", lambda run, dataset, index, names, rng: given.append(names))
    args = SimpleNamespace(seed=0, task="pretrain", tasks=["pretrain"], accumulate=1, batch_size=2, steps=4)
    run = SimpleNamespace(args=args, rank=0, world=1, device=torch.device("cpu"), progress={"step": 0}, paper=lxmert)
    run.objectives = {"mlm": 1, "qa": 1}
    run.sets = {"pretrain": {"train": [0, 1]}}
    for step in (1, 2, 3, 4):
        train.prepare_step(run, {"pretrain": iter([np.arange(2)])}, step)
    assert given == [["mlm"], ["mlm"], ["mlm", "qa"], ["mlm", "qa"]]


def test_steps_that_need_the_model_are_not_prepared_ahead(monkeypatch):
    prepared = []
    monkeypatch.setattr(train, "index_streams", lambda run: None)
    monkeypatch.setattr(train, "prepare_step", lambda run, streams, step: prepared.append(step) or ([], []))
    for task, expected in (("retrieval", [1]), ("vqa", [1, 2])):
        prepared.clear()
        run = SimpleNamespace(args=SimpleNamespace(tasks=[task], steps=2), progress={"step": 0})
        steps = train.prepared_steps(run)
        next(steps)
        if task == "vqa":
            next(steps)
        assert prepared == expected


def test_an_interrupted_step_has_its_line_in_the_log(pictures, tmp_path, here, monkeypatch):
    @contextlib.contextmanager
    def interrupted():
        answers = itertools.count()
        yield lambda: next(answers) == 1  # after the second step

    monkeypatch.setattr(machine, "interruptible", interrupted)
    options = ["--data", pictures, "--task", "vqa", "--steps", 9, "--log-every", 9, "--eval-every", 9]
    here(*options, "--out", "out", code=130)
    lines = [json.loads(line) for line in (tmp_path / "out/log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "vqa" in line] == [2]


def test_heads_that_the_best_weights_have_at_random_are_said(pictures, tmp_path, here, monkeypatch, capsys):
    scores = iter([2.0, 1.0])  # after steps 0 and 1: the best weights are the untrained ones
    monkeypatch.setattr(tasks, "best_score", lambda run, metrics: (next(scores), "a number"))
    here("--data", pictures, "--task", "vqa", "--steps", 1, "--eval-every", 1, "--out", "out")
    assert json.loads((tmp_path / "out/result.json").read_text())["random_heads"] == ["vqa"]
    output = capsys.readouterr().out
    assert "WARNING: untrained, at random: vqa" in output
    assert "warning  vqa: test has only 4 examples" in output and "train has only" not in output
    assert predict.main(["out/best.pt", "--scenes", "1", "--device", "cpu"]) == 0
    assert "out/best.pt: untrained, at random: vqa" in capsys.readouterr().err
    assert predict.main(["out/checkpoint.pt", "--scenes", "1", "--device", "cpu"]) == 0
    assert "at random" not in capsys.readouterr().err
