"""train.py: the pieces against closed forms, the command line as a user runs it, resume and two processes to the bit."""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import common
import data
import train
import uniter

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """Own data made from drawn scenes: 24 pictures with boxes, a question of two answers each, all three splits."""
    folder = tmp_path_factory.mktemp("own")
    lines = []
    for i in range(24):
        scene = data.make_scene(0, "train", i)
        data.draw_scene(scene).save(folder / f"{i}.png")
        boxes = [[t.x - t.half, t.y - t.half, t.x + t.half, t.y + t.half] for t in scene.things]
        answer = "yes" if any(thing.color == "red" for thing in scene.things) else "no"
        split = "train" if i < 16 else "val" if i < 20 else "test"
        line = {"image": f"{i}.png", "boxes": boxes, "text": f"is there a red thing {i % 3}?", "answer": answer}
        lines.append(json.dumps({**line, "split": split}))
    (folder / "own.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "own.jsonl"


SMALL = ["--batch-size", "4", "--log-every", "1", "--dtype", "f32", "--device", "cpu", "--patch", "4"]


def run(*arguments, cwd, processes=1, check=True):
    """train.py as a user starts it. Returns the finished process."""
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [*start, str(ROOT / "train.py"), *map(str, arguments), *SMALL]
    done = subprocess.run(command, check=False, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)
    assert not check or done.returncode == 0, done.stderr
    return done


def weights(folder):
    return train.load_checkpoint(Path(folder) / "checkpoint.pt")["state"]


# ---- pieces ----------------------------------------------------------------------------------------------------


def test_learning_rate_is_two_straight_lines():
    rates = [train.learning_rate(step, 1.0, 10, 110) for step in range(1, 111)]
    assert rates[:10] == pytest.approx(np.linspace(0.1, 1.0, 10))
    assert rates[9:109] == pytest.approx(np.linspace(1.0, 0.01, 100))
    assert rates[-1] == 1e-8


def test_only_matrices_decay_and_heads_may_learn_faster():
    model = uniter.UNITER(uniter.Config(**uniter.PRESETS["tiny"], vocab_size=30, feature_size=8, classes=5))
    optimizer = train.make_optimizer(model, 0.01, head_scale=10.0)
    train.set_rate(optimizer, step=3, rate=0.05)
    place = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        group = place.pop(id(parameter))
        assert (group["weight_decay"] > 0) == (parameter.ndim > 1), name
        assert group["lr"] == pytest.approx(0.5 if name.startswith("heads.") else 0.05, rel=1e-2)
    assert not place


def test_steps_draw_one_objective_by_ratio_with_what_is_joined_to_it():
    ratio = {**uniter.PRETRAINING["objectives"], "wra": 0}
    rng = np.random.default_rng(0)
    drawn = [tuple(train.step_objectives(uniter, ratio, rng)) for _ in range(3000)]
    share = {names: drawn.count(names) / 3000 for names in set(drawn)}
    assert set(share) == {("mlm",), ("mrfr",), ("mrc_kl",), ("itm", "wra")}
    for names, expected in {("mlm",): 1 / 2, ("mrfr",): 1 / 8, ("mrc_kl",): 1 / 8, ("itm", "wra"): 1 / 4}.items():
        assert abs(share[names] - expected) < 4 * math.sqrt(expected / 3000)


def masked_batch(rows, seed):
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
        ids=[str(i) for i in range(rows)],
    )


def joined(a, b):
    """Two batches of the same widths as one, index lists moved along."""
    fields = {}
    for name, x in vars(a).items():
        y = getattr(b, name)
        shift = {"word_index": a.text.numel(), "region_index": a.region_mask.numel()}.get(name, 0)
        fields[name] = (
            x + y if isinstance(x, list) else None if x is None else torch.cat([x, y + shift if shift else y])
        )
    return data.Batch(**fields)


@pytest.mark.parametrize("names", [["mlm"], ["mrfr"], ["itm", "wra"]])
def test_parts_of_unlike_size_give_the_gradients_of_the_whole(names):
    torch.manual_seed(0)
    model = uniter.UNITER(uniter.Config(**uniter.PRESETS["tiny"], vocab_size=30, feature_size=8, classes=5)).double()
    a, b = ({k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in vars(m).items()}
            for m in (masked_batch(3, 1), masked_batch(5, 2)))  # fmt: skip
    a, b = data.Batch(**a), data.Batch(**b)
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
    assert train.winner(close) == "tie"
    assert train.winner(clear) == "a"


def test_recall_counts_every_right_picture_once():
    scores = torch.tensor([[3.0, 1.0, 2.0], [0.0, 1.0, 2.0], [2.0, 0.0, 1.0]])
    recalls = common.recall_at(scores, torch.arange(3), ks=(1, 2))
    assert recalls["text_to_image_r1"] == pytest.approx(1 / 3)
    assert recalls["text_to_image_r2"] == pytest.approx(1.0)


def test_vqa_accuracy_is_the_soft_score_of_the_best_answer(monkeypatch):
    class Questions(SimpleNamespace):
        __len__ = lambda self: 3

    answers = [{"yes": 1.0}, {"no": 0.3, "yes": 0.6}, {"maybe": 1.0}]
    dataset = Questions(answer=answers, kind=["a", "a", "b"])
    best = torch.nn.functional.one_hot(torch.tensor([0, 1, 0]), 2).float()  # yes, no, yes
    monkeypatch.setattr(train, "parts", lambda run, dataset, index: [index])
    monkeypatch.setattr(train, "make_batch", lambda *_, **__: None)
    monkeypatch.setattr(train, "scores_of", lambda *_: (None, best))
    metrics, chance = train.evaluate_vqa(SimpleNamespace(answers=["yes", "no"]), dataset)
    assert metrics == pytest.approx({"accuracy": 1.3 / 3, "accuracy_a": 0.65, "accuracy_b": 0.0})
    assert chance == pytest.approx({"accuracy": 1.6 / 3, "accuracy_a": 0.8, "accuracy_b": 0.0})


# ---- the command line ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", train.PAPERS)
def test_pretrain_then_vqa(model, pictures, tmp_path):
    done = run("--model", model, "--data", pictures, "--steps", 3, cwd=tmp_path)
    assert "chance" in done.stdout
    result = json.loads((tmp_path / f"out/{model}-pretrain/result.json").read_text())
    assert {"model", "task", "split", "data", "steps", "seed", "parameters", "seconds", "chance"} <= set(result)
    start = tmp_path / f"out/{model}-pretrain/checkpoint.pt"
    done = run("--model", model, "--task", "vqa", "--data", pictures, "--steps", 3, "--init", start, cwd=tmp_path)
    assert "heads.vqa" in done.stdout and "at random" in done.stdout
    result = json.loads((tmp_path / f"out/{model}-vqa/result.json").read_text())
    assert 0 <= result["accuracy"] <= 1 and "accuracy" in result["chance"]
    assert train.load_checkpoint(tmp_path / f"out/{model}-vqa/checkpoint.pt")["answers"] == ["no", "yes"]
    steps = [json.loads(line) for line in (tmp_path / f"out/{model}-vqa/log.jsonl").read_text().splitlines()]
    assert [s["step"] for s in steps if "lr" in s] == [1, 2, 3]


def test_resume_after_an_interruption_changes_nothing(pictures, tmp_path):
    options = ["--data", pictures, "--steps", 12, "--eval-every", 6, "--dropout", "0.1"]
    run(*options, "--out", "whole", cwd=tmp_path)
    command = [sys.executable, str(ROOT / "train.py"), *map(str, options), "--out", "parts", *SMALL]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    for line in process.stdout:
        if line.startswith(b"step     4/"):
            process.send_signal(signal.SIGINT)
            break
    process.stdout.read()
    error = process.stderr.read().decode()
    assert process.wait(60) == 2 and "--resume" in error and "Traceback" not in error
    stopped = train.load_checkpoint(tmp_path / "parts/checkpoint.pt")["progress"]["step"]
    assert 4 <= stopped < 12
    run(*options, "--out", "parts", "--resume", cwd=tmp_path)
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    logs = [(tmp_path / out / "log.jsonl").read_text().splitlines() for out in ("whole", "parts")]
    lines = [[json.loads(line) for line in log if "grad_norm" in line] for log in logs]
    assert [x["grad_norm"] for x in lines[0]] == [x["grad_norm"] for x in lines[1]]


@pytest.mark.parametrize("model", ["uniter", "lxmert"])
def test_two_processes_equal_one(model, pictures, tmp_path):
    options = ["--model", model, "--data", pictures, "--steps", 4]
    run(*options, "--accumulate", 2, "--out", "one", cwd=tmp_path)
    run(*options, "--out", "two", cwd=tmp_path, processes=2)
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name in one:
        torch.testing.assert_close(one[name], two[name], atol=2e-6, rtol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
    results = [json.loads((tmp_path / out / "result.json").read_text()) for out in ("one", "two")]
    for name in results[0]["chance"]:
        assert results[0][name] == pytest.approx(results[1][name], abs=1e-4), name


def test_all_models_and_seeds_end_in_one_table(pictures, tmp_path):
    options = ["--model", "all", "--task", "vqa", "--data", pictures, "--steps", 1, "--seeds", 2, "--out", "cmp"]
    done = run(*options, cwd=tmp_path)
    table = (tmp_path / "cmp/comparison.md").read_text()
    assert table in done.stdout and all(model in table for model in train.PAPERS)
    runs = json.loads((tmp_path / "cmp/comparison.json").read_text())["runs"]
    assert len(runs) == 2 * len(train.PAPERS)
    mean = json.loads((tmp_path / "cmp/comparison.json").read_text())["table"]["accuracy"]["lxmert"]["mean"]
    assert mean == pytest.approx(np.mean([r["accuracy"] for r in runs if r["model"] == "lxmert"]))


def test_ablation_removes_a_modality():
    batch = train.ablate(masked_batch(3, 0), "image")
    assert not batch.region_mask.any() and not batch.features.any() and not batch.boxes.any()
    batch = masked_batch(3, 0)
    batch.text_mask[0, 4:] = False
    first, last = batch.text[:, 0].clone(), torch.stack([batch.text[0, 3], batch.text[1, 5], batch.text[2, 5]])
    batch = train.ablate(batch, "text")
    assert batch.text.tolist() == torch.stack([first, last], 1).tolist() and batch.text_mask.all()


def test_a_loss_that_is_not_finite_stops_the_run(pictures, tmp_path):
    done = run("--data", pictures, "--steps", 60, "--lr", "1e30", "--clip", "1e30", cwd=tmp_path, check=False)
    assert done.returncode == 2 and "is not finite" in done.stderr and "own.jsonl:" in done.stderr
    assert done.stderr.count("\n") == 1, done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nonsense"], "--nonsense"),
        (["--model", "bert"], "bert"),
        (["--task", "sing"], "sing"),
        (["--objectives", "mlm,xyz"], "xyz"),
        (["--data", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--init", "nowhere.pt"], "nowhere.pt"),
        (["--resume"], "--resume"),
        (["--steps", "-1"], "--steps"),
        (["--device", "cuda:99"], "cuda:99"),
        (["--init", "damaged.pt"], "damaged.pt"),
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
    train.write(target, "old")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        train.write(target, "new")
    assert target.read_text() == "old"


def test_scenes_by_default(tmp_path):
    run("--limit", "40", "--steps", 1, cwd=tmp_path)
    result = json.loads((tmp_path / "out/uniter-pretrain/result.json").read_text())
    assert result["data"] == "scenes" and result["chance"]["text_to_image_r1"] == 0.01
