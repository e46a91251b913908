"""The README's tables, made by one command each; every cell is one run of train.py.

    python tests/tables.py tasks --out out/tables --minutes 2
    python tests/tables.py objectives --out out/tables --minutes 2

tasks: three models x seven tasks, from the pretrained and from the untrained start, and one model without words or
without picture. The first seed pretrains each model; vqa, nlvr2 and refer get three seeds, the others one.
objectives: UNITER pretrained with none, mlm, itm, mlm+itm, all but wra, all; then nlvr2 and vqa from each.

A run's steps are what `--minutes` buys: its speed is measured in a trial of 30 steps. Runs that are done (they have a
result.json) are not repeated, so that the command can go on after an interruption. What follows `--` goes to every run.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
import train

MODELS = tuple(train.PAPERS)
SEEDS = {"vqa": 3, "nlvr2": 3, "refer": 3}  # the others have one
COLUMNS = {  # task: the metrics of its cells
    "vqa": ("accuracy",),
    "ve": ("accuracy",),
    "nlvr2": ("accuracy",),
    "vcr": ("q_a_accuracy", "qa_r_accuracy", "q_ar_accuracy"),
    "retrieval": ("text_to_image_r1", "image_to_text_r1"),
    "refer": ("accuracy", "detected_accuracy"),
    "caption": ("bleu4", "perplexity"),
}
OBJECTIVES = {"none": None, "mlm": "mlm", "itm": "itm", "mlm+itm": "mlm,itm"}
OBJECTIVES |= {"mlm+itm+mrm": "mlm,itm,mrfr,mrc_kl", "mlm+itm+mrm+wra": "mlm,itm,mrfr,mrc_kl,wra"}


def run(folder, minutes, *arguments):
    """result.json of a run of train.py that trains for about `minutes`; trains unless it is there already."""
    if not (folder / "result.json").is_file():
        trial = folder.with_name(folder.name + "-trial")
        command = ["--log-every", "200", *map(str, arguments)]
        start([*command, "--steps", "30", "--eval-every", "30", "--out", str(trial)])
        done = json.loads((trial / "result.json").read_text())
        shutil.rmtree(trial)
        steps = max(10, int(60 * minutes * done["steps"] / max(done["seconds"], 0.1)))
        start([*command, "--steps", str(steps), "--out", str(folder)])
    return json.loads((folder / "result.json").read_text())


def start(arguments):
    """train.py; a failure ends this program too."""
    if train.main(arguments):
        sys.exit(2)


def cell(results, names):
    """ "93.1 ± 0.4 / 88.0": the mean of each metric over the runs, in percent, with its spread if there are several."""
    parts = []
    for name in names:
        values = [r[name] * (1 if name == "perplexity" else 100) for r in results if name in r]
        spread = f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
        parts.append(f"{np.mean(values):.1f}{spread}" if values else "")
    return " / ".join(parts)


def table(rows, columns):
    """A Markdown table of {row: {column: text}}."""
    lines = [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    return "\n".join(
        [*lines, *(f"| {name} | {' | '.join(row.get(c, '') for c in columns)} |" for name, row in rows.items())]
    )


def tasks(o):
    """Three models x seven tasks x two starts, then the first model without words or without picture."""
    rows = {}
    for model in o.models:
        run(o.out / f"{model}-pretrain", o.pretrain_minutes, "--model", model, *o.more)
    variants = [(m, start, ()) for m in o.models for start in ("pretrained", "untrained")]
    variants += [(o.models[0], f"pretrained, without {what}", ("--ablate", what)) for what in ("text", "image")]
    for model, name, extra in variants:
        row = rows.setdefault(f"{model}, {name}", {})
        for task in o.tasks:
            if task == "caption" and "text" in extra:
                continue
            init = () if name == "untrained" else ("--init", o.out / f"{model}-pretrain/checkpoint.pt")
            results = []
            for seed in range(SEEDS.get(task, 1) if not extra else 1):
                folder = o.out / f"{model}-{task}-{name.replace(', ', '-').replace(' ', '-')}-{seed}"
                results.append(
                    run(folder, o.minutes, "--model", model, "--task", task, "--seed", seed, *init, *extra, *o.more)
                )
            row[task] = cell(results, COLUMNS[task])
            if name == "pretrained" and model == o.models[0]:
                rows.setdefault("chance", {})[task] = cell([results[0]["chance"]], COLUMNS[task])
    return table(rows, o.tasks)


def objectives(o):
    """UNITER's table 2 in small: which objectives of pretraining help nlvr2 and vqa."""
    rows = {}
    for name, names in OBJECTIVES.items():
        before, init = o.out / f"objectives-{name}", ()
        if names:
            result = run(before, o.pretrain_minutes, "--objectives", names, *o.more)
            init = ("--init", before / "checkpoint.pt")
            print(f"{name}: pretrained for {result['steps']} steps", flush=True)
        for task in ("nlvr2", "vqa"):
            results = [
                run(
                    o.out / f"objectives-{name}-{task}-{seed}",
                    o.minutes,
                    "--task",
                    task,
                    "--seed",
                    seed,
                    *init,
                    *o.more,
                )
                for seed in range(o.seeds)
            ]
            rows.setdefault(name, {})[task] = cell(results, ("accuracy",))
    return table(rows, ("nlvr2", "vqa"))


def main():
    parser = argparse.ArgumentParser(description="Make a table of the README.")
    parser.add_argument("which", choices=["tasks", "objectives"])
    parser.add_argument("--out", type=Path, default=Path("out/tables"), help="folder of all runs and the tables")
    parser.add_argument("--minutes", type=float, default=2.0, help="training time of a cell's run")
    parser.add_argument("--pretrain-minutes", type=float, default=5.0, help="training time of a pretraining")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--tasks", nargs="+", default=list(COLUMNS), choices=COLUMNS)
    parser.add_argument("--seeds", type=int, default=1, help="objectives: runs of each cell")
    mine, more = sys.argv[1:], []
    if "--" in mine:
        mine, more = mine[: mine.index("--")], mine[mine.index("--") + 1 :]
    o = parser.parse_args(mine)
    o.more = more
    text = {"tasks": tasks, "objectives": objectives}[o.which](o)
    train.write(o.out / f"{o.which}.md", text + "\n")
    print(f"\n{text}")


if __name__ == "__main__":
    main()
