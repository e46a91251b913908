"""distill.py: how a student is matched to a teacher."""

import torch

import checkpoints
import common
import tasks

DISTILLATION = {"logits": (), "attention": ("attention_kl", "attention_mse"), "hidden": ("hidden",)}  # and their losses


def read_teacher(run, checkpoint):
    """Sets run.teacher, in eval mode, without gradients, from its checkpoint; it may be another of the three models.

    UserError if it has seen other features."""
    args = run.args
    run.teacher_paper = checkpoints.MODELS[checkpoint["model"]]
    config = run.teacher_paper.Config(**checkpoint["config"])
    width = run.splits["train"].store.width
    if config.feature_size != width:
        raise common.UserError(
            f"{args.teacher}: trained on features of width {config.feature_size}, {args.data} has {width}"
        )
    run.teacher = run.teacher_paper.MODEL(config).to(run.device).eval().requires_grad_(False)
    run.teacher.load_state_dict(checkpoint["state"])


def match_teacher(run, checkpoint):
    """Sets run.soft, the objectives whose scores the teacher has too: those over classes, choices or regions.

    Says which are left out. UserError where it cannot read this run's batches, or where nothing is left."""
    args, why = run.args, {}
    own, their, config = run.paper, run.teacher_paper, run.teacher.config
    triplets = {getattr(c, "nlvr2", "") == "triplet" for c in (run.model.config, config)}  # two pictures in one row
    unlike = {"vcr": own.VCR_TYPES != their.VCR_TYPES, "rank": own.NEGATIVES != their.NEGATIVES}
    unlike["nlvr2"] = len(triplets) > 1
    for name in run.objectives:
        head = tasks.heads_for(their, [name])
        if unlike.get(name):
            raise common.UserError(
                f"{args.teacher}: reads the rows of {name} in another way than {args.model}; take one that agrees"
            )
        if config.types < their.text_types([name]):
            raise common.UserError(
                f"{args.teacher}: has too few text types for {name}; train it for --task {args.task} first"
            )
        if name in ("wra", "nce"):
            why[name] = "it has no scores of classes"
        elif not head or not {*head} <= {*config.heads} or (name == "caption" and name not in checkpoint["task"]):
            why[name] = "the teacher was not trained for it"
        elif name in ("mrc", "mrc_kl") and (checkpoint["model"] == "lxmert") != (args.model == "lxmert"):
            why[name] = "LXMERT's region classes have no background"
    run.soft = tuple(name for name in run.objectives if name not in why)
    wanted = args.distill.split(",")
    if "caption" in run.objectives and wanted != ["logits"]:
        raise common.UserError(
            "--distill: captions are read from left to right, which records no attention or states; use logits"
        )
    if "logits" in wanted and not run.soft:
        raise common.UserError(
            f"{args.teacher}: no scores to learn from: " + "; ".join(f"{n}: {reason}" for n, reason in why.items())
        )
    for name, reason in why.items() if "logits" in wanted else ():
        common.print0(f"teacher  scores of {name} are not distilled: {reason}")


def distillation_losses(run, names):
    """The losses that the teacher adds to these objectives': NAME_soft for scores, and those of DISTILL."""
    if run.teacher is None:
        return []
    wanted = run.args.distill.split(",")
    soft = [f"{name}_soft" for name in names if name in run.soft and "logits" in wanted]
    return soft + [name for part in wanted for name in DISTILLATION[part]]


def group_by_kind(recorded):
    """Recorded maps or states {"cross.0.text": x, ...} as {"cross.text": [x of layer 0, x of layer 1, ...], ...}."""
    kinds = {}
    for name, x in recorded.items():
        kinds.setdefault(".".join(part for part in name.split(".") if not part.isdigit()), []).append(x)
    return kinds


def layer_pairs(student, teacher):
    """(kind, student's layer, teacher's layer) of every kind that both have, by `common.layer_map`."""
    student, teacher = group_by_kind(student), group_by_kind(teacher)
    for kind in student:
        if kind in teacher:
            for own, i in zip(student[kind], common.layer_map(len(student[kind]), len(teacher[kind])), strict=True):
                yield kind, own, teacher[kind][i]


def real_positions(batch, side, length):
    """(B, length) bool, True = real, for positions of "text", of "regions", or both. ViLBERT's sequences begin with
    one more position, the whole image."""
    masks = {"text": batch.text_mask, "regions": batch.region_mask}
    mask = masks[side] if side in masks else torch.cat([batch.text_mask, batch.region_mask], 1)
    return torch.nn.functional.pad(mask, (length - mask.shape[1], 0), value=True)


def forward_with_teacher(run, batch, names):
    """The model's {objective: (loss, scores)}, and beside them the losses of `distillation_losses`, each with None.

    Layers that both have are matched by `common.layer_map`; two architectures without a kind of map in common share no
    attention, and where no kind of state is common, the last states of words and regions are compared.
    """
    wanted = run.args.distill.split(",")
    record = wanted != ["logits"]
    alone = not record and all(run.paper.OBJECTIVES[name].encodes for name in names)
    student = None if alone else run.model.encode(batch, record=record)
    parts = {name: run.paper.OBJECTIVES[name].loss(run.model, student, batch) for name in names}
    with torch.no_grad():
        teacher = None if alone else run.teacher.encode(batch, record=record)
        theirs = {
            n: run.teacher_paper.OBJECTIVES[n].loss(run.teacher, teacher, batch)[1] for n in names if n in run.soft
        }
    if "logits" in wanted:
        for name, scores in theirs.items():
            pair = parts[name][1], scores
            if name == "mrfr":  # features are no classes
                pair = [x.flatten() for x in pair]
            if name in ("vcr", "rank"):  # (rows,) -> (groups, rows of one): the classes are the choices
                pair = [x.view(len(batch.ids), -1) for x in pair]
            parts[f"{name}_soft"] = common.soft_label_loss(*pair), None
    if "attention" in wanted:
        losses = []
        for kind, own, other in layer_pairs(student.maps, teacher.maps):
            asks, _, answers = kind.rsplit(".", 1)[-1].partition("_to_")
            t, s = (min(a, b) for a, b in zip(own.shape[2:], other.shape[2:], strict=True))
            own, other = own[:, :, -t:, -s:], other[:, :, -t:, -s:]  # without ViLBERT's whole image, if one lacks it
            try:
                losses.append(
                    common.attention_loss(
                        own, other, real_positions(batch, asks, t), real_positions(batch, answers or asks, s)
                    )
                )
            except ValueError as error:  # numbers of heads
                raise common.UserError(f"--distill attention: {error}; choose others by --config") from None
        if not losses:
            raise common.UserError(
                f"--distill attention: no map of {run.args.model} is one of {run.args.teacher}; use logits,hidden"
            )
        for name, values in zip(DISTILLATION["attention"], zip(*losses, strict=True), strict=True):
            parts[name] = sum(values) / len(values), None
    if "hidden" in wanted:
        pairs = list(layer_pairs(student.states, teacher.states))
        pairs = pairs or [("text", student.text, teacher.text), ("regions", student.regions, teacher.regions)]
        losses = []
        for kind, own, other in pairs:
            own = run.model.heads["hidden"]["regions" if "regions" in kind else "text"](own)
            s = min(own.shape[1], other.shape[1])
            side = next((side for side in ("text", "regions") if side in kind), "both")
            losses.append(common.hidden_loss(own[:, -s:], other[:, -s:], real_positions(batch, side, s)))
        parts["hidden"] = sum(losses) / len(losses), None
    return parts
