"""The README's tables, made by one command each; every cell is one or several runs of train.py. No test.

    python tests/tables.py tasks          three models x seven tasks, from the pretrained and from the untrained start,
                                          and the first model without words or without picture
    python tests/tables.py objectives     UNITER pretrained with none, mlm, itm, mlm+itm, all but wra, all; then nlvr2, vqa
    python tests/tables.py temperature    contrast alone: recall of dot products against the temperature, with a picture
    python tests/tables.py distill        how much of the gap between teacher and student each of the losses closes

A run has --steps, or what `--minutes` buys: the speed is measured in a trial of 60 steps, one for all starts and seeds of a
model's task. Runs that are done (they have a result.json) are not repeated, so that the command can go on after an
interruption. What follows `--` goes to every run.
"""

import argparse
import json
import math
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).parent.parent))
import checkpoints
import tasks

import train  # isort: skip  before torch: it tells torch's threads how to wait

import torch

import data

COLUMNS = {  # task: the metrics of its cells
    "vqa": ("accuracy",),
    "ve": ("accuracy",),
    "nlvr2": ("accuracy",),
    "vcr": ("q_a_accuracy", "qa_r_accuracy", "q_ar_accuracy"),
    "retrieval": ("text_to_image_r1", "image_to_text_r1"),
    "refer": ("accuracy", "detected_accuracy"),
    "caption": ("bleu4", "perplexity"),
}
SEEDED = ("vqa", "nlvr2", "refer")  # tasks whose cells have several seeds
OBJECTIVES = {"none": None, "mlm": "mlm", "itm": "itm", "mlm+itm": "mlm,itm"}
OBJECTIVES |= {"mlm+itm+mrm": "mlm,itm,mrfr,mrc_kl", "mlm+itm+mrm+wra, the default": None}
TEMPERATURES = ("0.01", "0.02", "0.03", "0.05", "0.07", "0.1", "0.2", "0.5", "1.0", "learned")
TEACH = {"student alone": None, "logits": "logits", "attention": "attention", "hidden": "hidden"}
TEACH |= {"all three": "logits,attention,hidden"}

# ---- runs ------------------------------------------------------------------------------------------------------


def run(args, name, *arguments, steps=None):
    """result.json of a run of train.py in folder `name`; trains unless it is there already."""
    folder = args.out / name
    if not (folder / "result.json").is_file():
        start(folder, *arguments, *args.more, *(("--steps", steps) if steps else ()))
    return json.loads((folder / "result.json").read_text())


def bought(args, name, *arguments, times=1):
    """--steps, or those that --minutes buy: by the speed of a trial of 60 steps, made once for all runs of a kind; that
    many `times`."""
    if args.steps:
        return times * args.steps
    trial = args.out / f"{name}-trial/result.json"
    if not trial.is_file():
        start(trial.parent, *arguments, *args.more, "--steps", 60, "--eval-every", 60)
    done = json.loads(trial.read_text())
    return max(10, int(60 * times * args.minutes * done["steps"] / max(done["seconds"], 0.1)))


def start(folder, *arguments):
    """train.py; a failure ends this program too."""
    if train.main(["--log-every", "200", *map(str, arguments), "--out", str(folder)]):
        sys.exit(2)
    return json.loads((folder / "result.json").read_text())


def restore(folder):
    """A trained model as the functions of train.py want it, on the CPU in float32, with captions of the test scenes, one
    a picture: run, dataset, examples."""
    checkpoint = checkpoints.load_checkpoint(folder / "best.pt")
    paper, name = checkpoints.PAPERS[checkpoint["model"]]
    model = getattr(paper, name)(paper.Config(**checkpoint["config"])).eval()
    model.load_state_dict(checkpoint["state"])
    names = {"args": SimpleNamespace(ablate=None), "device": torch.device("cpu"), "autocast": nullcontext}
    tokenizer = data.tokenizer_from_json(checkpoint["tokenizer"])
    dataset = data.load("scenes", "caption", "test").encode(tokenizer, max_length=60)
    return SimpleNamespace(model=model, rank=0, world=1, **names), dataset, tasks.first_captions(dataset)


def spread(values, scale=100):
    """ "93.1 ± 0.4": mean, in percent, and spread if there are several."""
    beside = f" ± {scale * np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
    return f"{scale * np.mean(values):.1f}{beside}" if values else ""


def cell(results, names):
    """ "93.1 ± 0.4 / 88.0": each metric over the runs."""
    values = {name: [r[name] for r in results if name in r] for name in names}
    return " / ".join(spread(v, 1 if name == "perplexity" else 100) for name, v in values.items() if v)


def table(rows, columns):
    """A Markdown table of {row: {column: text}}."""
    lines = [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    lines += [f"| {name} | {' | '.join(row.get(c, '') for c in columns)} |" for name, row in rows.items()]
    return "\n".join(lines)


# ---- tables ----------------------------------------------------------------------------------------------------


def runs(args, model, task, name, seeds, pretraining=(), extra=(), times=1):
    """The results of a task's runs, and their steps. pretraining: folder and options of the run of train.py that they
    start from, () for none; extra: options of these runs, which have `times` the steps."""
    options, init = ("--model", model, "--task", task), ()
    if pretraining:
        folder, *objectives = pretraining
        run(args, folder, "--model", model, *objectives, steps=args.pretrain_steps)
        init = ("--init", args.out / folder / "checkpoint.pt")
    steps, results = bought(args, f"{model}-{task}", *options, times=times), []
    for seed in range(seeds):
        results.append(run(args, f"{model}-{task}-{name}-{seed}", *options, *init, *extra, "--seed", seed, steps=steps))
    return results, steps


def table_of_tasks(args):
    """Three models x seven tasks x two starts; then the first model, one seed, without words or without picture, and on
    the tasks of SEEDED at once, in as many steps as the three together."""
    rows, all_steps = {"chance": {}}, {}
    variants = [(m, name, ()) for m in args.models for name in ("pretrained", "untrained")]
    variants += [(args.models[0], f"pretrained, without {what}", ("--ablate", what)) for what in ("text", "image")]
    for model, name, extra in variants:
        row = rows.setdefault(f"{model}, {name}", {})
        for task in args.tasks:
            if task == "caption" and "text" in extra:
                continue
            pretraining = () if name == "untrained" else (f"{model}-pretrain",)
            folder = name.replace(", ", "-").replace(" ", "-")
            seeds = args.seeds if task in SEEDED and not extra else 1
            results, steps = runs(args, model, task, folder, seeds, pretraining, extra)
            row[task] = cell(results, COLUMNS[task])
            all_steps.setdefault(f"{model}, steps", {})[task] = f"{steps:,}"
            if name == "pretrained" and model == args.models[0]:
                rows["chance"][task] = cell([results[0]["chance"]], COLUMNS[task])
    if len(together := [task for task in SEEDED if task in args.tasks]) > 1:
        model, row = args.models[0], rows.setdefault(f"{args.models[0]}, pretrained, {len(together)} tasks at once", {})
        results, _ = runs(args, model, ",".join(together), "pretrained", 1, (f"{model}-pretrain",), times=len(together))
        for task in together:  # "vqa_accuracy", "detected_refer_accuracy"
            own = {name.replace(f"{task}_", ""): value for name, value in results[0].items() if f"{task}_" in name}
            row[task] = cell([own], COLUMNS[task])
    return table(rows | all_steps, args.tasks)


def table_of_objectives(args):
    """UNITER's table 2 in small: which objectives of pretraining help nlvr2 and vqa. The first and the last row are
    those of the table of tasks."""
    rows = {}
    for name, given in OBJECTIVES.items():
        folder, pretraining = f"pretrained-{name}", (f"uniter-pretrain-{name}", "--objectives", given)
        if given is None:
            folder, pretraining = ("untrained", ()) if name == "none" else ("pretrained", ("uniter-pretrain",))
        for task in ("nlvr2", "vqa"):
            results, _ = runs(args, "uniter", task, folder, args.seeds, pretraining)
            rows.setdefault(name, {})[task] = cell(results, COLUMNS[task])
    return table(rows, ("nlvr2", "vqa"))


def table_of_temperatures(args):
    """R@1 of dot products among 500 test scenes, mean of both ways, against the temperature of itc."""
    rows, points, options = {}, {}, ("--model", args.models[0], "--objectives", "itc")
    steps = bought(args, "temperature", *options)
    for value in TEMPERATURES:
        found, ends = [], []
        for seed in range(args.seeds):
            name, extra = f"temperature-{value}-{seed}", ("--temperature", value, "--seed", seed)
            ends.append(run(args, name, *options, *extra, steps=steps)["temperature"])
            restored, dataset, texts = restore(args.out / name)
            with torch.inference_mode():
                dots = tasks.dot_products(restored, dataset, texts[:500], dataset.image[texts[:500]])
            recalls = tasks.recall_at(dots, torch.arange(len(dots)))
            found.append((recalls["text_to_image_r1"] + recalls["image_to_text_r1"]) / 2)
        points[value] = float(np.mean(ends)), float(np.mean(found))
        rows[f"learned, ends at {points[value][0]:.3f}" if value == "learned" else value] = {"R@1": spread(found)}
    draw(
        [point for value, point in points.items() if value != "learned"],
        points["learned"],
        args.out / "temperature.png",
    )
    return table(rows, ("R@1",))


def draw(points, learned, path, width=640, height=400):
    """R@1 against temperature on a logarithmic axis; the learned one is a red ring, with its line across."""
    scale, edge = 2, 50  # drawn at twice the size, for smooth lines
    image = Image.new("RGB", (width * scale, height * scale), "white")
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(14 * scale)
    top = max(0.1, math.ceil(10 * max(r for _, r in [*points, learned])) / 10)

    def place(t, r):
        x = edge + (width - 2 * edge) * math.log(t / 0.01) / math.log(100)
        return x * scale, (height - edge - (height - 2 * edge) * r / top) * scale

    for i in range(6):
        r = top * i / 5
        pen.line([place(0.01, r), place(1.0, r)], fill="#dddddd", width=scale)
        pen.text((8 * scale, place(0.01, r)[1]), f"{100 * r:.0f}%", fill="black", font=font, anchor="lm")
    for t, _ in points:
        pen.text((place(t, 0)[0], (height - edge + 8) * scale), f"{t:g}", fill="black", font=font, anchor="mt")
    title = "R@1 among 500 scenes, against temperature"
    pen.text((width * scale / 2, 20 * scale), title, fill="black", font=font, anchor="mm")
    pen.line([place(0.01, learned[1]), place(1.0, learned[1])], fill="#e8a0a0", width=scale)
    pen.line([place(*p) for p in points], fill="#2060a0", width=2 * scale)
    for p in points:
        pen.circle(place(*p), 4 * scale, fill="#2060a0")
    x, y = place(*learned)
    pen.circle((x, y), 7 * scale, outline="#c02020", width=3 * scale)
    pen.text((x, y + 14 * scale), f"learned: {learned[0]:.3f}", fill="#c02020", font=font, anchor="mt")
    image.resize((width, height), Image.Resampling.LANCZOS).save(path)


def table_of_students(args):
    """Teacher, student alone, and the student with each of the three losses and with all, on the first of --tasks."""
    model, task, found, speed = args.models[0], args.tasks[0], {}, {}
    options = ("--model", model, "--task", task)
    steps = [bought(args, f"{task}-{who}", *options, "--config", *getattr(args, who)) for who in ("teacher", "student")]
    for seed in range(args.seeds):
        teacher, extra = f"{task}-teacher-{seed}", ("--seed", seed, "--config", *args.teacher)
        found.setdefault("teacher", []).append(run(args, teacher, *options, *extra, steps=steps[0])[COLUMNS[task][0]])
        speed.setdefault("teacher", examples_per_second(args.out / teacher))
        for name, kind in TEACH.items():
            extra = ("--seed", seed, "--config", *args.student)
            extra += ("--teacher", args.out / teacher / "best.pt", "--distill", kind) if kind else ()
            folder = f"{task}-{name.replace(' ', '-')}-{seed}"
            result = run(args, folder, *options, *extra, steps=steps[1])
            found.setdefault(name, []).append(result[COLUMNS[task][0]])
            speed.setdefault(name, examples_per_second(args.out / folder))
    alone, gap = np.mean(found["student alone"]), np.mean(found["teacher"]) - np.mean(found["student alone"])
    rows = {name: {COLUMNS[task][0]: spread(values)} for name, values in found.items()}
    for name, row in rows.items():
        row["examples/s"] = f"{speed[name]:.0f}"
        if TEACH.get(name) and gap:
            row["gap closed"] = f"{100 * (np.mean(found[name]) - alone) / gap:.0f}%"
    return table(rows, (COLUMNS[task][0], "gap closed", "examples/s"))


def examples_per_second(folder, rows=64, repeats=30):
    """Forward passes of a trained model on one batch of captions, float32; the median of the repeats."""
    restored, dataset, texts = restore(folder)
    batch, seconds = data.collate(dataset, texts[:rows]), []
    with torch.inference_mode():
        for _ in range(repeats):
            start = time.perf_counter()
            restored.model.encode(batch)
            seconds.append(time.perf_counter() - start)
    return rows / float(np.median(seconds))


TABLES = {
    "tasks": table_of_tasks,
    "objectives": table_of_objectives,
    "temperature": table_of_temperatures,
    "distill": table_of_students,
}


def main():
    parser = argparse.ArgumentParser(description="Make a table of the README.")
    parser.add_argument("which", choices=TABLES)
    parser.add_argument("--out", type=Path, default=Path("out/tables"), help="folder of all runs and the tables")
    parser.add_argument("--minutes", type=float, default=2.0, help="training time of a run")
    parser.add_argument("--steps", type=int, help="steps of each run, whatever its time")
    parser.add_argument("--pretrain-steps", type=int, help="steps of a pretraining (default: those of train.py)")
    parser.add_argument("--models", nargs="+", default=list(checkpoints.PAPERS), choices=checkpoints.PAPERS)
    parser.add_argument("--tasks", nargs="+", default=list(COLUMNS), choices=COLUMNS)
    parser.add_argument("--seeds", type=int, default=1, help="runs of a cell; table tasks: of vqa, nlvr2 and refer")
    parser.add_argument("--teacher", nargs="+", default=["layers=6"], help="distill: --config of the teacher")
    parser.add_argument("--student", nargs="+", default=["layers=2"], help="distill: --config of the student")
    mine, more = sys.argv[1:], []
    if "--" in mine:
        mine, more = mine[: mine.index("--")], mine[mine.index("--") + 1 :]
    args = parser.parse_args(mine)
    args.more = more
    text = TABLES[args.which](args)
    data.write_text(args.out / f"{args.which}.md", text + "\n")
    print(f"\n{text}")


if __name__ == "__main__":
    main()
