"""distill.py: a student learns from a trained teacher, beside its own objectives. The losses come first.

    --distill logits       the teacher's logits as soft labels (Hinton 2015), for objectives that both models have
    --distill attention    its attention maps (MiniLM, TinyBERT), of layers that both have
    --distill hidden       its hidden states (TinyBERT), through a learned projection to the teacher's width

Student and teacher may be different models. What they have in common is read from their tables of objectives and from
the names of the maps and states that their `encode` records.
"""

import torch
from torch import nn

import checkpoints
import common
import tasks
from common import UserError

DISTILLATION = {"logits": (), "attention": ("attention_kl", "attention_mse"), "hidden": ("hidden",)}  # and their losses

# ---- losses on logits, attention maps and hidden states ---------------------------------------------------------------


@common.in_float32
def soft_label_loss(student, teacher, temperature=2.0):
    """Soft labels (Hinton 2015, section 2): T^2 KL( softmax(teacher / T) || softmax(student / T) ), mean over rows.

    student, teacher: logits (M, K). T^2 keeps the size of the gradient, which falls as 1 / T^2. No rows count as 0.
    """
    assert student.shape == teacher.shape, (student.shape, teacher.shape)
    if len(student) == 0:
        return student.sum() * 0.0
    log_p = (student / temperature).log_softmax(-1)
    log_t = (teacher / temperature).log_softmax(-1)
    return temperature**2 * (log_t.exp() * (log_t - log_p)).sum(-1).mean()  # (M, K) -> (M,) -> ()


def average_heads(maps, heads):
    """Attention maps (B, H, T, S) averaged to `heads` heads, each over H / heads neighbours -> (B, heads, T, S).
    UserError if H is not a multiple."""
    if maps.shape[1] % heads:
        raise UserError(
            f"--distill attention: {maps.shape[1]} attention heads of the teacher cannot be shared by {heads} of the "
            "student; choose others by --config"
        )
    return maps.unflatten(1, (heads, -1)).mean(2)  # (B, H, T, S) -> (B, heads, H/heads, T, S) -> (B, heads, T, S)


def mean_over_rows(values, mask):
    """Mean over a row's True positions, then over rows: values, mask (B, S) -> (). A row without any counts as 0."""
    return ((values * mask).sum(1) / mask.sum(1).clamp(min=1)).mean()


def visible_log_probs(maps, visible):
    """Log of attention maps (B, H, T, S), rescaled to sum to 1 over the visible keys (B, 1, 1, S); 0 elsewhere."""
    tiny = torch.finfo(torch.float32).tiny
    maps = maps * visible
    return (maps / maps.sum(-1, keepdim=True).clamp(min=tiny)).clamp(min=tiny).log() * visible


@common.in_float32
def attention_loss(student, teacher, queries, keys):
    """Two losses on attention maps, (kl, mse), each a mean over heads, over a row's real queries, over rows:

        kl  = sum_s t_s (log t_s - log p_s)                        maps (MiniLM, Wang 2020, section 3.1)
        mse = mean_s ( (log t_s - mean log t) - (log p_s - mean log p) )^2      logits (TinyBERT, Jiao 2020, eq. 7)

    student p (B, H, T, S), teacher t (B, H', T, S), H' a multiple of H; queries (B, T), keys (B, S) bool, True = real.
    log p is the logit up to a constant of its query, which the mean removes. Returns (2,).
    """
    visible = keys[:, None, None, :]  # (B, 1, 1, S)
    count = visible.sum(-1, keepdim=True).clamp(min=1)  # (B, 1, 1, 1)
    log_p = visible_log_probs(student, visible)
    log_t = visible_log_probs(average_heads(teacher, student.shape[1]), visible)
    kl = (log_t.exp() * (log_t - log_p) * visible).sum(-1)  # (B, H, T, S) -> (B, H, T)
    student_logits = log_p - log_p.sum(-1, keepdim=True) / count
    teacher_logits = log_t - log_t.sum(-1, keepdim=True) / count
    mse = ((teacher_logits - student_logits).square() * visible).sum(-1) / count.squeeze(-1)  # (B, H, T)
    return torch.stack([mean_over_rows(kl.mean(1), queries), mean_over_rows(mse.mean(1), queries)])


@common.in_float32
def hidden_loss(student, teacher, mask):
    """Hidden states (TinyBERT, eq. 8): squared difference, mean over C, over real positions, over rows.

    student (B, S, C), projected to the teacher's width; teacher (B, S, C); mask (B, S) bool, True = real.
    """
    return mean_over_rows((student - teacher).square().mean(-1), mask)


# ---- the teacher ------------------------------------------------------------------------------------------------------


def read_teacher(run, checkpoint):
    """Sets run.teacher, in eval mode and without gradients, from its checkpoint. UserError if it has seen other features."""
    run.teacher_paper = checkpoints.MODELS[checkpoint["model"]]
    config = run.teacher_paper.Config(**checkpoint["config"])
    width = run.splits["train"].store.width
    if config.feature_size != width:
        raise UserError(
            f"{run.args.teacher}: trained on features of width {config.feature_size}, {run.args.data} has {width}"
        )
    run.teacher = run.teacher_paper.MODEL(config).to(run.device).eval().requires_grad_(False)
    run.teacher.load_state_dict(checkpoint["state"])


def match_teacher(run, checkpoint):
    """Sets run.soft, the objectives whose logits the student learns, and prints which are left out and why.

    UserError where the teacher cannot read this run's batches, or where nothing is left.
    """
    left_out = {}  # objective: reason
    for name in run.objectives:
        task = tasks.TASK_OF_OBJECTIVE.get(name)  # None: of pretraining, whose rows all models read alike
        if task:
            check_same_rows(run, task)
        reason = why_not_comparable(run, name, task, checkpoint["task"].split(","))
        if reason:
            left_out[name] = reason
    run.soft = tuple(name for name in run.objectives if name not in left_out)
    if "logits" not in run.args.distill.split(","):
        return
    if not run.soft:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in left_out.items())
        raise UserError(f"{run.args.teacher}: no logits to learn from: {reasons}")
    for name, reason in left_out.items():
        common.print0(f"teacher  logits of {name} are not distilled: {reason}")


def check_same_rows(run, task):
    """UserError if the teacher cannot read the rows of this task's batches, or reads them in another way."""
    args = run.args
    if task.generates and args.distill != "logits":
        raise UserError(
            "--distill: captions are read from left to right, which records no attention or states; use logits"
        )
    if task.layout(run.paper, run.model.config) != task.layout(run.teacher_paper, run.teacher.config):
        raise UserError(
            f"{args.teacher}: reads the rows of {task.name} in another way than {args.model}; take one that agrees"
        )
    if run.teacher.config.types < len(run.teacher_paper.text_types([task.name])):
        raise UserError(
            f"{args.teacher}: has too few text types for {task.name}; train it for --task {args.task} first"
        )


def why_not_comparable(run, name, task, teacher_tasks):
    """Why the logits of an objective cannot be distilled, None if they can: both must have logits over one set of classes."""
    objective = run.paper.OBJECTIVES[name]
    head = objective.head
    if objective.logits == "nothing":
        return "it has no logits of classes"
    # captioning has the head of masked words, which pretraining trains
    if head not in run.teacher.heads or (task and task.name not in teacher_tasks):
        return "the teacher was not trained for it"
    if "object_probs" in objective.fields:
        student = output_width(run.model.heads[head])
        teacher = output_width(run.teacher.heads[head])
        if student != teacher:  # one counts background as a class and the other does not
            return f"the student has {student} region classes, the teacher {teacher}"
    return None


def output_width(head):
    """How many logits a head computes: the rows of its last linear layer."""
    return [module for module in head.modules() if isinstance(module, nn.Linear)][-1].out_features


# ---- a step -----------------------------------------------------------------------------------------------------------


def items_of(paper, name, batch):
    """How many items the mean of an objective's loss runs over; of NAME_soft, the loss of its teacher's logits."""
    objective = paper.OBJECTIVES.get(name.removesuffix("_soft"))
    mean_over = "rows"  # losses of a teacher's attention and states have no row in OBJECTIVES
    if objective:
        mean_over = objective.mean_over
    if name.endswith("_soft"):
        # the mean runs over all rows of logits, those of masked regions, or of texts with and without an answer
        mean_over = {"all regions": "regions", "answers": "rows"}.get(mean_over, mean_over)
    return common.count_items(mean_over, batch)


def distillation_losses(run, names):
    """The losses that the teacher adds to these objectives': NAME_soft for logits, and those of DISTILLATION."""
    losses = []
    if run.teacher is None:
        return losses
    for part in run.args.distill.split(","):
        if part == "logits":
            losses += [f"{name}_soft" for name in names if name in run.soft]
        losses += DISTILLATION[part]
    return losses


def forward_with_teacher(run, batch, names):
    """The model's {objective: (loss, logits)}, and beside them the losses of `distillation_losses`, each with None."""
    wanted = run.args.distill.split(",")
    record = wanted != ["logits"]
    # objectives that encode the batch themselves need no encoding
    encodes = record or not all(run.paper.OBJECTIVES[name].encodes for name in names)
    student = run.model.encode(batch, record=record) if encodes else None
    with torch.no_grad():
        teacher = run.teacher.encode(batch, record=record) if encodes else None
    parts = {name: run.paper.OBJECTIVES[name].loss(run.model, student, batch) for name in names}
    for name in names:
        if "logits" in wanted and name in run.soft:
            with torch.no_grad():
                _, logits = run.teacher_paper.OBJECTIVES[name].loss(run.teacher, teacher, batch)
            parts[f"{name}_soft"] = soft_loss(run.paper.OBJECTIVES[name], parts[name][1], logits, batch), None
    if "attention" in wanted:
        kl, mse = attention_losses(run, student, teacher, batch)
        parts["attention_kl"] = kl, None
        parts["attention_mse"] = mse, None
    if "hidden" in wanted:
        parts["hidden"] = hidden_losses(run, student, teacher, batch), None
    return parts


def soft_loss(objective, student, teacher, batch):
    """`soft_label_loss` of an objective's logits, (M, K) or (rows,); the squared difference where they are features."""
    if objective.logits == "numbers":
        return common.squared_error(student, teacher)
    if student.ndim == 1:  # one logit a row: the rows of one example are the classes
        student = student.view(len(batch.ids), -1)  # (rows,) -> (B, choices)
        teacher = teacher.view(len(batch.ids), -1)
    return soft_label_loss(student, teacher)


def attention_losses(run, student, teacher, batch):
    """(kl, mse) of `attention_loss`, each the mean over the maps that both models have."""
    losses = []
    for kind, own, other in layer_pairs(student.maps, teacher.maps):
        # the last part of a kind: "text_to_regions", or "text", whose queries and keys are of one sequence
        queries, _, keys = kind.rsplit(".", 1)[-1].partition("_to_")
        length = min(own.shape[2], other.shape[2])  # without ViLBERT's whole image, if one model lacks it
        context = min(own.shape[3], other.shape[3])
        own = own[:, :, -length:, -context:]  # (B, H, T, S)
        other = other[:, :, -length:, -context:]  # (B, H', T, S)
        query_mask = real_positions(batch, queries, length)
        key_mask = real_positions(batch, keys or queries, context)
        losses.append(attention_loss(own, other, query_mask, key_mask))
    if not losses:
        raise UserError(
            f"--distill attention: no map of {run.args.model} is one of {run.args.teacher}; use logits,hidden"
        )
    return sum(losses) / len(losses)  # (2,)


def hidden_losses(run, student, teacher, batch):
    """`hidden_loss`, mean over the states that both models have; where there are none, over their last states."""
    pairs = layer_pairs(student.states, teacher.states)
    if not pairs:
        pairs = [("text", student.text, teacher.text), ("regions", student.regions, teacher.regions)]
    losses = []
    for kind, own, other in pairs:
        projection = run.model.heads["hidden"]["regions" if "regions" in kind else "text"]
        length = min(own.shape[1], other.shape[1])
        mask = real_positions(batch, kind, length)
        losses.append(hidden_loss(projection(own)[:, -length:], other[:, -length:], mask))  # (B, S, C)
    return sum(losses) / len(losses)


# ---- what two models have in common -----------------------------------------------------------------------------------


def layer_map(student, teacher):
    """Which teacher layer each student layer imitates: uniform, last to last, as [2, 5] of 6 (TinyBERT, section 3.1)."""
    return [max(0, (i + 1) * teacher // student - 1) for i in range(student)]


def layer_pairs(student, teacher):
    """(kind, student's layer, teacher's layer) of each kind of recorded map or state that both have, by `layer_map`."""
    teacher = group_by_kind(teacher)
    pairs = []
    for kind, layers in group_by_kind(student).items():
        if kind in teacher:
            places = layer_map(len(layers), len(teacher[kind]))
            for layer, place in zip(layers, places, strict=True):
                pairs.append((kind, layer, teacher[kind][place]))
    return pairs


def group_by_kind(recorded):
    """Recorded maps or states {"cross.0.text": x, ...} as {"cross.text": [x of layer 0, x of layer 1, ...], ...}."""
    kinds = {}
    for name, x in recorded.items():
        kind = ".".join(part for part in name.split(".") if not part.isdigit())
        kinds.setdefault(kind, []).append(x)
    return kinds


def real_positions(batch, kind, length):
    """(B, length) bool, True = real, for the positions of text or of regions, which `kind` names, or of both.

    ViLBERT's sequences of regions begin with one more position, the whole image.
    """
    if "text" in kind:
        mask = batch.text_mask
    elif "regions" in kind:
        mask = batch.region_mask
    else:
        mask = torch.cat([batch.text_mask, batch.region_mask], 1)  # (B, T + N)
    return nn.functional.pad(mask, (length - mask.shape[1], 0), value=True)
