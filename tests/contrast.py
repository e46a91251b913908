"""The README's numbers on contrast and distillation, by the commands that a user would type; no test.

    python tests/contrast.py temperature [--steps 1500] [--seeds 1]     R@1 against temperature: table and picture
    python tests/contrast.py distill [--task vqa] [--steps 9000] [--seeds 3]     how much of the gap a student closes

Each run goes to a folder under --out and is not repeated where that has a result. Tables are printed in markdown.
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
import torch
from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).parent.parent))
import common
import data
import tasks
import train
import weights


def run(out, *arguments):
    """The result.json of one training run, which is made if it is not there."""
    out = Path(out)
    if not (out / "result.json").is_file() and train.main([*map(str, arguments), "--out", str(out)]):
        raise SystemExit(2)  # train.py said why
    return json.loads((out / "result.json").read_text())


def restore(folder):
    """A trained model as the evaluation functions of train.py want it, on the CPU in float32, and its tokenizer."""
    checkpoint = weights.load_checkpoint(folder / "best.pt")
    paper, name = train.PAPERS[checkpoint["model"]]
    model = getattr(paper, name)(paper.Config(**checkpoint["config"])).eval()
    model.load_state_dict(checkpoint["state"])
    names = {"o": SimpleNamespace(ablate=None), "device": torch.device("cpu"), "autocast": nullcontext}
    return SimpleNamespace(model=model, rank=0, world=1, **names), data.tokenizer_from_json(checkpoint["tokenizer"])


def scenes(tokenizer, count):
    """Test captions, one a picture, and the examples' numbers."""
    dataset = data.load("scenes", "caption", "test").encode(tokenizer, max_length=60)
    return dataset, np.unique(dataset.image, return_index=True)[1][:count]


# ---- temperature -----------------------------------------------------------------------------------------------


def temperature(o):
    """R@1 of dot products among 500 test scenes, mean of both ways and of the seeds, against the temperature of itc."""
    values, rows = ["0.01", "0.02", "0.03", "0.05", "0.07", "0.1", "0.2", "0.5", "1.0", "learned"], []
    for value in values:
        found, ends = [], []
        for seed in range(o.seeds):
            out = Path(o.out) / f"temperature-{value}-{seed}"
            options = ["--model", o.model, "--objectives", "itc", "--temperature", value]
            result = run(out, *options, "--steps", o.steps, "--seed", seed, "--eval-every", o.steps)
            restored, tokenizer = restore(out)
            dataset, texts = scenes(tokenizer, 500)
            with torch.inference_mode():
                dots = tasks.dot_products(restored, dataset, texts, dataset.image[texts])
            recalls = common.recall_at(dots, torch.arange(len(texts)))
            found.append((recalls["text_to_image_r1"] + recalls["image_to_text_r1"]) / 2)
            ends.append(result["temperature"])
        rows.append((value, float(np.mean(ends)), float(np.mean(found)), float(np.std(found))))
    print("\n| temperature | R@1 |\n|---|---|")
    for value, end, mean, spread in rows:
        name = f"learned, ends at {end:.3f}" if value == "learned" else value
        print(f"| {name} | {100 * mean:.1f}" + (f" ± {100 * spread:.1f} |" if o.seeds > 1 else " |"))
    draw([(end, mean) for _, end, mean, _ in rows[:-1]], rows[-1][1:3], Path(o.out) / "temperature.png")


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
    pen.text((x, y - 14 * scale), f"learned: {learned[0]:.3f}", fill="#c02020", font=font, anchor="mb")
    image.resize((width, height), Image.Resampling.LANCZOS).save(path)


# ---- distillation ----------------------------------------------------------------------------------------------


def examples_per_second(folder, rows=64, repeats=30):
    """Forward passes of a trained model on one batch of captions, float32; the median of the repeats."""
    restored, tokenizer = restore(folder)
    dataset, texts = scenes(tokenizer, rows)
    batch, seconds = data.collate(dataset, texts), []
    with torch.inference_mode():
        for _ in range(repeats):
            start = time.perf_counter()
            restored.model.encode(batch)
            seconds.append(time.perf_counter() - start)
    return rows / float(np.median(seconds))


def distill(o):
    """The gap between teacher and student, and how much of it each of the three losses closes, alone and together."""
    metric = o.metric or ("accuracy" if o.task == "vqa" else "mlm_content_accuracy")
    kinds = {"student alone": None, "logits": "logits", "attention": "attention", "hidden": "hidden"}
    kinds["all three"] = "logits,attention,hidden"
    scores, folders = {}, {}
    for seed in range(o.seeds):
        options = ["--model", o.model, "--task", o.task, "--steps", o.steps, "--seed", seed]
        folders["teacher"] = teacher = Path(o.out) / f"{o.task}-teacher-{seed}"
        scores.setdefault("teacher", []).append(run(teacher, *options)[metric])
        for name, kind in kinds.items():
            folders[name] = Path(o.out) / f"{o.task}-{name.replace(' ', '-')}-{seed}"
            learn = ["--teacher", teacher / "best.pt", "--distill", kind] if kind else []
            result = run(folders[name], *options, "--config", *o.student, *learn)
            scores.setdefault(name, []).append(result[metric])
    means = {name: np.mean(values) for name, values in scores.items()}
    gap = means["teacher"] - means["student alone"]
    print(f"\n| {metric} | mean ± spread of {o.seeds} | gap closed |\n|---|---|---|")
    for name, values in scores.items():
        spread = np.std(values, ddof=1) if o.seeds > 1 else 0.0
        closed = f"{100 * (means[name] - means['student alone']) / gap:.0f}%" if gap and name in list(kinds)[1:] else ""
        print(f"| {name} | {100 * means[name]:.1f} ± {100 * spread:.1f} | {closed} |")
    speeds = [examples_per_second(folders[name]) for name in ("teacher", "student alone")]
    print(f"\n{torch.get_num_threads()} CPU threads, float32, batches of 64: teacher {speeds[0]:.0f}, student {speeds[1]:.0f} "
          f"examples/s, {speeds[1] / speeds[0]:.2f} times as fast")  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["temperature", "distill"])
    parser.add_argument("--model", default="uniter", choices=list(train.PAPERS))
    parser.add_argument("--task", default="vqa")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--seeds", type=int)
    parser.add_argument("--metric", help="what of result.json is compared (default: accuracy, or mlm_content_accuracy)")
    parser.add_argument("--student", nargs="+", default=["layers=1"], help="--config of the student")
    parser.add_argument("--out", default="out/contrast")
    o = parser.parse_args()
    o.steps = o.steps or (1500 if o.what == "temperature" else 9000)
    o.seeds = o.seeds or (1 if o.what == "temperature" else 3)
    Path(o.out).mkdir(parents=True, exist_ok=True)
    {"temperature": temperature, "distill": distill}[o.what](o)


if __name__ == "__main__":
    main()
