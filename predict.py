"""predict.py: asks a checkpoint of train.py about pictures, one line an answer; or writes it under official names.

    python predict.py out/uniter-vqa/best.pt --image a.png --text "what color is the circle?"
    python predict.py out/uniter-ve/best.pt --image a.png --text "the circle is red"
    python predict.py out/uniter-nlvr2/best.pt --image a.png --image b.png --text "exactly one picture shows a circle"
    python predict.py out/uniter-vcr/best.pt --image a.png --text "what color is the circle?" --choices red blue green pink
    python predict.py out/uniter-retrieval/best.pt --image a.png --image b.png --text "red circle and two crosses"
    python predict.py out/uniter-refer/best.pt --image a.png --text "small red circle" --boxes "[[0,0,40,40],[50,9,80,39]]"
    python predict.py out/uniter-caption/best.pt --image a.png --beams 3
    python predict.py out/uniter-vqa/best.pt --export vqa.bin

Regions are the boxes that are given, --boxes once a picture, or else the whole picture and the cells of a grid. What was trained
on scenes has seen the boxes of things only: give it those. best.pt has the weights that were best on the val split, checkpoint.pt
the last ones.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

import checkpoints
import data
import formats
import tasks
from checkpoints import MODELS
from common import UserError
from log import safe_output


def parse(argv=None):
    """The command line."""
    parser = data.Parser(prog="predict.py", description="Ask a checkpoint about pictures.", allow_abbrev=False)
    add = parser.add_argument
    add("checkpoint", help="checkpoint.pt or best.pt of a run of train.py")
    add("--image", action="append", metavar="FILE", help="a picture; several: one answer each, or a pair")
    add("--boxes", action="append", metavar="JSON", help="[[x1,y1,x2,y2],...] in pixels, one list for each --image")
    add("--text", help="caption, question, statement or expression, as the task wants it")
    add("--choices", nargs="+", metavar="TEXT", help="vcr: what to choose from")
    add("--answer", metavar="TEXT", help="vcr: the answer, if the choices are reasons for it")
    add("--export", metavar="FILE", help="write the weights under the paper's official names, in place of an answer")
    add("--task", help="which task, of a checkpoint that has several (default: its first)")
    add("--beams", type=int, default=1, help="caption: beam width; 1 is greedy (default: 1)")
    add("--top", type=int, default=3, help="answers, boxes: how many to print (default: 3)")
    args = parser.parse_args(argv)
    if bool(args.image) == bool(args.export):
        raise UserError("give either --image, to ask about it, or --export")
    return args


def load(args):
    """(model, tokenizer, checkpoint, task), ready to be asked. UserError if the checkpoint does not fit what is asked."""
    checkpoint = checkpoints.load_checkpoint(args.checkpoint)
    tasks = checkpoint["task"].split(",")
    task = args.task or tasks[0]
    if task not in tasks:
        raise UserError(f"--task {task}: {args.checkpoint} was trained for {', '.join(tasks)}")
    paper = MODELS[checkpoint["model"]]
    model = paper.MODEL(paper.Config(**checkpoint["config"]))
    model.load_state_dict(checkpoint["state"])
    patch = checkpoint.get("patch", 12)
    if model.config.feature_size != 3 * patch * patch:
        raise UserError(f"{args.checkpoint}: trained on feature files, not on pixels; it cannot look at a picture")
    if task == "pretrain" and "itm" not in model.heads:
        raise UserError(f"{args.checkpoint}: pretrained without itm, so it has nothing to say about a pair")
    if task == "nlvr2" and len(args.image) != 2:
        raise UserError(f"nlvr2 takes two --image, not {len(args.image)}")
    if task == "vcr" and len(args.choices or ()) < 2:
        raise UserError("vcr takes --choices, at least two")
    if task != "caption" and not (args.text or "").strip():
        raise UserError(f"{task} takes a --text")
    if args.boxes and len(args.boxes) != len(args.image):
        raise UserError(
            f"{len(args.boxes)} --boxes for {len(args.image)} --image: give one list for each, or none at all"
        )
    if min(args.beams, args.top) < 1:
        raise UserError("--beams and --top must be positive")
    return model.eval(), data.tokenizer_from_json(checkpoint["tokenizer"]), checkpoint, task


def regions(file, boxes, patch, grid):
    """(features (N, F), boxes (N, 4) in pixels, (width, height)) of a picture, as in training."""
    if not Path(file).is_file():
        raise UserError(f"--image {file}: no such file")
    picture = data.open_picture("--image", file)
    if boxes is None:
        boxes = data.grid_boxes(*picture.size, grid)
    else:
        try:
            boxes = json.loads(boxes)
        except ValueError:
            boxes = None
        if not isinstance(boxes, list) or not boxes or not all(map(data.is_box, boxes)):
            raise UserError("--boxes: write [[x1,y1,x2,y2],...] in pixels")
        boxes = data.check_boxes(boxes, *picture.size, f"--image {file}", "--boxes")
    return data.region_features(picture, boxes, patch), boxes, picture.size


def make_batch(tokenizer, texts, pictures, task_number=0):
    """Batch of rows (texts[i], pictures[i]); a text may be a tuple of segments."""
    rows = len(texts)
    dataset = data.Dataset("", "", None, np.arange(rows), texts, [{}] * rows, [""] * rows, [""] * rows)
    dataset.encode(tokenizer, max_length=60)
    cuts = dataset.offsets[1:-1]
    text, segments = (
        pad_sequence([torch.from_numpy(row) for row in np.split(flat, cuts)], batch_first=True)
        for flat in (dataset.tokens, dataset.segment)
    )
    features = pad_sequence([torch.from_numpy(f) for f, _, _ in pictures], batch_first=True)  # (B, N, F)
    boxes = [torch.from_numpy(b / np.array([*size, *size])).float() for _, b, size in pictures]
    counts = torch.tensor([len(b) for b in boxes])[:, None]
    return data.Batch(
        task=torch.full((rows,), task_number),
        text=text,
        text_mask=torch.arange(text.shape[1]) < torch.from_numpy(np.diff(dataset.offsets))[:, None],
        segments=segments,
        features=features,
        boxes=pad_sequence(boxes, batch_first=True),  # (B, N, 4)
        region_mask=torch.arange(features.shape[1]) < counts,
    )


@torch.inference_mode()
def answer(args, model, tokenizer, checkpoint, task):
    """The lines to print, one for each picture, or for the pair."""
    paper = MODELS[checkpoint["model"]]
    number = checkpoint["task"].split(",").index(task)
    size = checkpoint.get("patch", 12), checkpoint.get("grid", 6)
    pictures = [regions(file, boxes, *size) for file, boxes in zip(args.image, args.boxes or [None] * len(args.image))]
    if not args.boxes and "scenes" in checkpoint.get("data", "").split(","):
        print("predict.py: trained on boxes of things, asked about a grid; give --boxes", file=sys.stderr)
    if task == "nlvr2":
        batch = make_batch(tokenizer, [args.text] * 2, pictures, number)
        batch.region_types = torch.arange(2)[:, None].expand(batch.region_mask.shape)
        batch.target = torch.zeros(1, dtype=torch.long)  # the objective wants one; the scores do not depend on it
        if getattr(model.config, "nlvr2", "") == "triplet":
            batch = data.join_pictures(batch)
        chance = model(batch, ["nlvr2"])["nlvr2"][1].softmax(-1)[0, 1].item()
        return [f"{'true' if chance > 0.5 else 'false'}  (probability of true {chance:.3f})"]
    lines = []
    for file, picture in zip(args.image, pictures):
        if task == "caption":
            batch = make_batch(tokenizer, [""], [picture])
            ends = (tokenizer.token_to_id(name) for name in ("[CLS]", "[SEP]"))
            found = tokenizer.decode(tasks.generate(model, batch, *ends, args.beams)[0])
        elif task == "vcr":
            begin = (args.text, args.answer) if args.answer else (args.text,)
            batch = make_batch(
                tokenizer, [(*begin, choice) for choice in args.choices], [picture] * len(args.choices), number
            )
            batch.segments = tasks.vcr_text_types(paper, batch.segments)
            batch.target, batch.ids = torch.eye(len(args.choices), dtype=torch.long)[0], [args.text]
            found = ranked(model(batch, ["vcr"])["vcr"][1].softmax(0), args.choices, args.top)
        else:
            batch = make_batch(tokenizer, [args.text], [picture], number)
            encoding = model.encode(batch)
            if task in ("vqa", "ve"):
                known = checkpoint["answers"] if task == "vqa" else data.ENTAILMENT
                found = ranked(model.heads[task](encoding.pooled)[0].sigmoid(), known, args.top)
            elif task == "refer":
                batch.target = (
                    batch.region_mask.float()
                )  # the objective wants overlaps; its logits do not depend on them
                scores = paper.OBJECTIVES["refer"].loss(model, encoding, batch)[1][0]
                found = ranked(scores.softmax(0), [np.round(box).astype(int).tolist() for box in picture[1]], args.top)
            elif task == "retrieval":
                found = f"match score {model.heads['rank'](encoding.pooled).sigmoid().item():.3f}"
            else:
                found = f"probability of a match {model.heads['itm'](encoding.pooled).softmax(-1)[0, 1].item():.3f}"
        lines.append(f"{file}: {found}" if len(pictures) > 1 else found)
    return lines


def ranked(chances, names, top):
    """The `top` names with their probabilities, the likeliest first."""
    best = chances.topk(min(top, len(names)))
    return "  ".join(f"{names[i]} {p:.3f}" for p, i in zip(best.values.tolist(), best.indices.tolist()))


def main(argv=None):
    """Prints the answers. Exit code 0, or 2 with one line on stderr."""
    with safe_output():
        try:
            args = parse(argv)
            if args.export:
                checkpoint = checkpoints.load_checkpoint(args.checkpoint)
                checkpoints.save(formats.export_official(checkpoint["model"], checkpoint["state"]), Path(args.export))
            else:
                print(*answer(args, *load(args)), sep="\n")
        except (UserError, OSError) as error:
            print(f"predict.py: {UserError(str(error))}", file=sys.stderr)  # on one line
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
