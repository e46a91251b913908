"""The tables in docs/results.md, made by one command each; every cell is one or several runs of train.py. No test.

    python tests/tables.py tasks          three models x seven tasks, from the pretrained and from the untrained start,
                                          and the first model without words or without picture
    python tests/tables.py objectives     UNITER pretrained with none, mlm, itm, mlm+itm, all but wra, all; then --tasks,
                                          by default nlvr2 and vqa; itc: contrast alone
    python tests/tables.py temperature    contrast alone: recall of dot products against the temperature, with a picture
    python tests/tables.py distill        how much of the gap between teacher and student each of the losses closes
    python tests/tables.py attention --checkpoints out/uniter-vqa/best.pt ...     whether attention points at the thing asked for

A run has --steps, or as many as --minutes are enough for: a trial of 60 steps measures the speed, one for all starts and
seeds of a model's task. Runs that have ended are not repeated, so that the command can go on after an interruption. The
name of a run's folder holds a hash of all its options, so that results of other options are never shown. What follows
`--` goes to every run.
"""

import argparse
import hashlib
import json
import math
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).parent.parent))
import checkpoints
import data
import predict
import tasks
import train
from prepare import scene_texts
from support import attention, evaluation, examples, options

COLUMNS = {  # task, or contrast alone: the metrics of its cells
    "vqa": ("accuracy",),
    "ve": ("accuracy",),
    "nlvr2": ("accuracy",),
    "vcr": ("q_a_accuracy", "qa_r_accuracy", "q_ar_accuracy"),
    "retrieval": ("text_to_image_r1", "image_to_text_r1"),
    "refer": ("accuracy", "detected_accuracy"),
    "caption": ("bleu4", "perplexity"),
    "itc": ("itc_text_to_image_r1", "itc_image_to_text_r1"),
}
SEEDED = ("vqa", "nlvr2", "refer")  # tasks whose cells have several seeds
OBJECTIVES = {  # row: --objectives of the pretraining
    "none": None,
    "mlm": "mlm",
    "itm": "itm",
    "mlm+itm": "mlm,itm",
    "mlm+itm+mrm": "mlm,itm,mrfr,mrc_kl",
    "mlm+itm+mrm+wra, the default": None,
}
TEMPERATURES = ("0.01", "0.02", "0.03", "0.05", "0.07", "0.1", "0.2", "0.5", "1.0", "learned")
DISTILL = {  # row: --distill of the student
    "student alone": None,
    "logits": "logits",
    "attention": "attention",
    "hidden": "hidden",
    "all three": "logits,attention,hidden",
}

# ---- runs ------------------------------------------------------------------------------------------------------


def run(args, name, *arguments, steps=None):
    """(result.json, folder) of a run of train.py. Trains unless a run with the same options has ended there.

    The folder's name ends in a hash of all options: other options are another run.
    """
    given = [*map(str, arguments), *args.more]
    if steps is not None:
        given += ["--steps", str(steps)]
    key = hashlib.sha256(json.dumps(given).encode()).hexdigest()[:8]
    folder = args.out / f"{name}-{key}"
    if not (folder / "result.json").is_file():
        code = train.main(["--log-every", "200", *given, "--out", str(folder)])
        if code != 0:
            sys.exit(code)  # train.py has said why
    return json.loads((folder / "result.json").read_text()), folder


def steps_of(args, name, *arguments, times=1):
    """--steps, or as many as --minutes are enough for at the speed of a trial run of 60 steps; both `times` over."""
    if args.steps:
        return times * args.steps
    trial, _ = run(args, f"{name}-trial", *arguments, "--eval-every", 60, steps=60)
    steps_a_second = trial["steps"] / max(trial["seconds"], 0.1)
    return max(10, int(60 * times * args.minutes * steps_a_second))


def restore(folder):
    """(run, dataset, examples): a trained model as the functions of evaluation.py take it, on the CPU in float32, with
    one caption of each picture of the test split."""
    checkpoint = checkpoints.load_checkpoint(folder / "best.pt")
    paper = checkpoints.MODELS[checkpoint["model"]]
    model = paper.MODEL(paper.Config(**checkpoint["config"])).eval()
    model.load_state_dict(checkpoint["state"])
    tokenizer = data.tokenizer_from_json(checkpoint["tokenizer"])
    path, _ = options.open_data("scenes")
    dataset = data.load(path, tasks.TASKS["caption"], "test").encode(tokenizer, max_length=60)
    restored = SimpleNamespace(model=model, rank=0, world=1)
    restored.args = SimpleNamespace(ablate=None)
    restored.device = torch.device("cpu")
    restored.autocast = nullcontext
    return restored, dataset, evaluation.first_captions(dataset)


def spread(values, scale=100):
    """ "93.1 ± 0.4": the mean in percent, and the standard deviation if there are several values."""
    if not values:
        return ""
    text = f"{scale * np.mean(values):.1f}"
    if len(values) > 1:
        text += f" ± {scale * np.std(values, ddof=1):.1f}"
    return text


def cell(results, names):
    """ "93.1 ± 0.4 / 88.0": each metric over the runs that have it."""
    parts = []
    for name in names:
        values = [result[name] for result in results if name in result]
        if values:
            parts.append(spread(values, 1 if name == "perplexity" else 100))
    return " / ".join(parts)


def table(rows, columns):
    """A Markdown table of {row: {column: text}}."""
    lines = [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for name, row in rows.items():
        cells = [row.get(column, "") for column in columns]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


# ---- tables ----------------------------------------------------------------------------------------------------


def task_runs(args, model, task, name, seeds, pretraining=None, extra=(), times=1):
    """(results, steps) of the runs of a task, one a seed. extra: options of these runs, which have `times` the steps.

    pretraining: (name, options) of the run that they start from; None: they start at random.
    """
    given = ["--model", model, "--task", task]
    if task == "itc":
        given = ["--model", model, "--objectives", "itc"]
    steps = steps_of(args, f"{model}-{task}", *given, times=times)
    if pretraining:
        start_name, start_options = pretraining
        _, folder = run(args, start_name, "--model", model, *start_options, steps=args.pretrain_steps)
        given += ["--init", folder / "checkpoint.pt"]
    results = []
    for seed in range(seeds):
        result, _ = run(args, f"{model}-{task}-{name}-{seed}", *given, *extra, "--seed", seed, steps=steps)
        results.append(result)
    return results, steps


def table_of_tasks(args):
    """Three models x seven tasks x two starts; then the first model, one seed, without words or without picture, and on
    the tasks of SEEDED at once, in as many steps as the three together."""
    first = args.models[0]
    names = args.tasks or [name for name in COLUMNS if name != "itc"]
    variants = []
    for model in args.models:
        variants += [(model, "pretrained", ()), (model, "untrained", ())]
    for what in ("text", "image"):
        variants.append((first, f"pretrained, without {what}", ("--ablate", what)))
    rows = {"chance": {}}
    steps_rows = {}
    for model, name, extra in variants:
        row = rows.setdefault(f"{model}, {name}", {})
        for task in names:
            if task == "caption" and "text" in extra:
                continue
            pretraining = None if name == "untrained" else (f"{model}-pretrain", ())
            seeds = args.seeds if task in SEEDED and not extra else 1
            folder = name.replace(", ", "-").replace(" ", "-")
            results, steps = task_runs(args, model, task, folder, seeds, pretraining, extra)
            row[task] = cell(results, COLUMNS[task])
            steps_rows.setdefault(f"{model}, steps", {})[task] = f"{steps:,}"
            if name == "pretrained" and model == first:
                rows["chance"][task] = cell([results[0]["chance"]], COLUMNS[task])
    together = [task for task in SEEDED if task in names]
    if len(together) > 1:
        rows[f"{first}, pretrained, {len(together)} tasks at once"] = row_of_several_tasks(args, first, together)
    rows.update(steps_rows)
    return table(rows, names)


def row_of_several_tasks(args, model, names):
    """{task: cell} of one run that trains several tasks at once, from the pretrained start."""
    pretraining = (f"{model}-pretrain", ())
    results, _ = task_runs(args, model, ",".join(names), "pretrained", 1, pretraining, times=len(names))
    row = {}
    for task in names:
        of_task = {}
        for name, value in results[0].items():
            if f"{task}_" in name:  # "vqa_accuracy", "detected_refer_accuracy"
                of_task[name.replace(f"{task}_", "")] = value
        row[task] = cell([of_task], COLUMNS[task])
    return row


def table_of_objectives(args):
    """UNITER's table 2 in small: which objectives of pretraining help nlvr2 and vqa, or --tasks. The first and the last row
    are those of the table of tasks."""
    names = args.tasks or ["nlvr2", "vqa"]
    rows = {}
    for name, objectives in OBJECTIVES.items():
        folder = f"pretrained-{name}"
        pretraining = (f"uniter-pretrain-{name}", ("--objectives", objectives))
        if name == "none":
            folder = "untrained"
            pretraining = None
        elif objectives is None:
            folder = "pretrained"
            pretraining = ("uniter-pretrain", ())
        for task in names:
            results, _ = task_runs(args, "uniter", task, folder, args.seeds, pretraining)
            rows.setdefault(name, {})[task] = cell(results, COLUMNS[task])
    return table(rows, names)


def table_of_temperatures(args):
    """R@1 of dot products among 500 test pictures, mean of both ways, against the temperature of itc."""
    rows = {}
    points = {}  # of --temperature: (temperature at the end, R@1)
    given = ["--model", args.models[0], "--objectives", "itc"]
    steps = steps_of(args, "temperature", *given)
    for value in TEMPERATURES:
        recalls_at_1 = []
        temperatures = []
        for seed in range(args.seeds):
            extra = ["--temperature", value, "--seed", seed]
            result, folder = run(args, f"temperature-{value}-{seed}", *given, *extra, steps=steps)
            temperatures.append(result["temperature"])
            restored, dataset, texts = restore(folder)
            with torch.inference_mode():
                dots = evaluation.dot_products(restored, dataset, texts[:500], dataset.image[texts[:500]])
            recalls = evaluation.recall_at(dots, torch.arange(len(dots)))
            recalls_at_1.append((recalls["text_to_image_r1"] + recalls["image_to_text_r1"]) / 2)
        points[value] = (float(np.mean(temperatures)), float(np.mean(recalls_at_1)))
        title = value
        if value == "learned":
            title = f"learned, ends at {points[value][0]:.3f}"
        rows[title] = {"R@1": spread(recalls_at_1)}
    learned = points.pop("learned")
    draw(list(points.values()), learned, args.out / "temperature.png")
    return table(rows, ("R@1",))


def draw(points, learned, path, width=640, height=400):
    """R@1 against temperature on a logarithmic axis; the learned one is a red ring, with its line across."""
    scale = 2  # drawn at twice the size, for smooth lines
    edge = 50
    image = Image.new("RGB", (width * scale, height * scale), "white")
    pen = ImageDraw.Draw(image)
    font = ImageFont.load_default(14 * scale)
    highest = max(recall for _, recall in [*points, learned])
    top = max(0.1, math.ceil(10 * highest) / 10)

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
    task = args.tasks[0] if args.tasks else "vqa"
    metric = COLUMNS[task][0]
    given = ["--model", args.models[0], "--task", task]
    teacher_steps = steps_of(args, f"{task}-teacher", *given, "--config", *args.teacher)
    student_steps = steps_of(args, f"{task}-student", *given, "--config", *args.student)
    values = {}  # row -> the metric of each seed
    speeds = {}  # row -> examples a second, of the first seed
    for seed in range(args.seeds):
        extra = ["--seed", seed, "--config", *args.teacher]
        result, teacher = run(args, f"{task}-teacher-{seed}", *given, *extra, steps=teacher_steps)
        values.setdefault("teacher", []).append(result[metric])
        if seed == 0:
            speeds["teacher"] = examples_per_second(teacher)
        for name, losses in DISTILL.items():
            extra = ["--seed", seed, "--config", *args.student]
            if losses:
                extra += ["--teacher", teacher / "best.pt", "--distill", losses]
            folder_name = f"{task}-{name.replace(' ', '-')}-{seed}"
            result, folder = run(args, folder_name, *given, *extra, steps=student_steps)
            values.setdefault(name, []).append(result[metric])
            if seed == 0:
                speeds[name] = examples_per_second(folder)
    alone = np.mean(values["student alone"])
    gap = np.mean(values["teacher"]) - alone
    rows = {}
    for name, accuracies in values.items():
        rows[name] = {metric: spread(accuracies), "examples/s": f"{speeds[name]:.0f}"}
        if DISTILL.get(name) and gap:
            rows[name]["share of the gap closed"] = f"{100 * (np.mean(accuracies) - alone) / gap:.0f}%"
    return table(rows, (metric, "share of the gap closed", "examples/s"))


def examples_per_second(folder, rows=64, repeats=30):
    """Forward passes of a trained model on one batch of captions, float32; the median of the repeats."""
    restored, dataset, texts = restore(folder)
    batch = data.collate(dataset, texts[:rows])
    seconds = []
    with torch.inference_mode():
        for _ in range(repeats):
            start = time.perf_counter()
            restored.model.encode(batch)
            seconds.append(time.perf_counter() - start)
    return rows / float(np.median(seconds))


def table_of_attention(args):
    """The weight of the region that a question or expression is about, and how often it is the heaviest: a column for each
    of --checkpoints, of task vqa, vcr or refer on scenes; --count test examples each, those that the model answers right or
    not. vqa and vcr: of the questions for a colour, shape or size, which name one thing."""
    rows = {}
    columns = []
    for path in args.checkpoints:
        run, task = predict.load_run(predict.parse([str(path), "--scenes", "--dtype", "f32"]))
        dataset = examples.use_dataset(run, task, data.load("scenes", task, "test"))
        targets = {}
        for i in data.random_stream("table of attention").permutation(len(dataset)).tolist():
            target = asked_thing(dataset, i)
            if target is not None and len(targets) < args.count:
                targets[i] = target
        found, count = attention.measure_pointing(run, task, dataset, targets)
        column = f"{run.args.model} {task.name}, {count} examples: weight / heaviest"
        columns.append(column)
        for name, (weight, heaviest) in found.items():
            rows.setdefault(name, {})[column] = f"{100 * weight:.1f} / {100 * heaviest:.1f}"
    return table(rows, columns)


def asked_thing(dataset, i):
    """The box (4,) in 0..1 of the thing that example i of scenes is about; None where it names no single thing, and for
    reasons (vcr)."""
    if dataset.target is not None and dataset.target.ndim == 2:
        return dataset.target[i]
    question = dataset.text[dataset.rows_of([i])[0]]
    if dataset.kind[i] == "reason":
        return None
    if isinstance(question, tuple):
        question = question[0]  # vcr: the choice follows
    split, number = dataset.ids[i].split("/")[:2]
    scene = scene_texts.make_scene(0, split, int(number))
    phrasings = []
    for kind in ("color", "shape", "size"):
        phrasings += scene_texts.QUESTIONS[kind][1]
    for expression, things in scene.fits.items():
        thing = scene_texts.phrase(expression)
        if len(things) == 1 and question in [phrasing.format(thing=thing) for phrasing in phrasings]:
            return np.array(things[0].box) / scene_texts.SIDE
    return None


TABLES = {
    "tasks": table_of_tasks,
    "objectives": table_of_objectives,
    "temperature": table_of_temperatures,
    "distill": table_of_students,
    "attention": table_of_attention,
}


def main():
    parser = argparse.ArgumentParser(description="Make a table of docs/results.md.")
    parser.add_argument("which", choices=TABLES)
    parser.add_argument("--out", type=Path, default=Path("out/tables"), help="folder of all runs and the tables")
    parser.add_argument("--minutes", type=float, default=2.0, help="training time of a run")
    parser.add_argument("--steps", type=int, help="steps of each run, whatever its time")
    parser.add_argument("--pretrain-steps", type=int, help="steps of a pretraining (default: those of train.py)")
    parser.add_argument("--models", nargs="+", default=list(checkpoints.MODELS), choices=checkpoints.MODELS)
    parser.add_argument("--tasks", nargs="+", choices=COLUMNS, help="of the table; distill: the first")
    parser.add_argument("--seeds", type=int, default=1, help="runs of a cell; table tasks: of vqa, nlvr2 and refer")
    parser.add_argument("--teacher", nargs="+", default=["layers=6"], help="distill: --config of the teacher")
    parser.add_argument("--student", nargs="+", default=["layers=2"], help="distill: --config of the student")
    parser.add_argument("--checkpoints", nargs="+", type=Path, default=[], help="attention: of train.py, on scenes")
    parser.add_argument("--count", type=int, default=300, help="attention: test examples for each checkpoint")
    given = sys.argv[1:]
    more = []
    if "--" in given:
        end = given.index("--")
        more = given[end + 1 :]
        given = given[:end]
    args = parser.parse_args(given)
    args.more = more
    text = TABLES[args.which](args)
    data.write_text(args.out / f"{args.which}.md", text + "\n")
    print(f"\n{text}")


if __name__ == "__main__":
    main()
