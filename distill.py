"""distill.py: a student learns from a trained teacher, beside its own objectives.

    --distill logits       the teacher's logits as soft labels (Hinton 2015), for objectives that both models have
    --distill attention    its attention maps (MiniLM, TinyBERT), of kinds that both models record
    --distill hidden       its hidden states (TinyBERT), through a learned projection to the teacher's width

Student and teacher may be different models. What they have in common follows from their tables of objectives and from
the names of the maps and states that their `encode` records. support/distillation.py has the losses, and checks what
the two models must agree in.
"""

import numpy as np
import torch

import checkpoints
import common
import data
import tasks
from common import UserError
from support.distillation import (
    attention_loss,
    check_same_rows,
    check_task_tokens,
    hidden_loss,
    layer_pairs,
    logits_loss,
    real_positions,
    renumber_tasks,
    why_not_comparable,
)

# part of --distill: the losses that it adds. The logits add NAME_soft for each distilled objective NAME.
DISTILLATION = {"logits": (), "attention": ("attention_kl", "attention_mse"), "hidden": ("hidden",)}

# ---- the teacher -----------------------------------------------------------------------------------------------------


def read_teacher(run, checkpoint):
    """Sets run.teacher, in eval mode and without gradients. UserError if its features have another width."""
    run.teacher_paper = checkpoints.MODELS[checkpoint["model"]]
    run.teacher_tasks = checkpoint["task"].split(",")
    config = run.teacher_paper.Config(**checkpoint["config"])
    width = run.splits["train"].store.width
    if config.feature_size != width:
        raise UserError(
            f"{run.args.teacher}: trained on features of width {config.feature_size}, {run.args.data} has {width}"
        )
    run.teacher = run.teacher_paper.MODEL(config).to(run.device).eval().requires_grad_(False)
    run.teacher.load_state_dict(checkpoint["state"])


def match_teacher(run, checkpoint):
    """Sets run.distilled, the objectives whose logits the student learns, and prints which are left out and why.

    UserError if the teacher cannot read this run's batches, or if --distill logits is given and none is left.
    """
    check_task_tokens(run)
    left_out = {}  # objective: reason
    for name in run.objectives:
        task = tasks.TASK_OF_OBJECTIVE.get(name)  # None: a pretraining objective, whose rows all models read alike
        if task:
            check_same_rows(run, task)
        reason = why_not_comparable(run, name, checkpoint.get("objectives", {}))
        if reason:
            left_out[name] = reason
    run.distilled = tuple(name for name in run.objectives if name not in left_out)
    if "attention" in run.args.distill.split(","):
        compare_maps(run)
    if "logits" not in run.args.distill.split(","):
        return
    if not run.distilled:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in left_out.items())
        raise UserError(f"{run.args.teacher}: no logits to learn from: {reasons}")
    for name, reason in left_out.items():
        common.print0(f"teacher  logits of {name} are not distilled: {reason}")


def compare_maps(run):
    """UserError, before the first step, if the two models have no attention maps in common."""
    batch = data.collate(run.splits["train"], np.arange(1)).to(run.device)
    with torch.no_grad():
        attention_losses(run, run.model.encode(batch, record=True), run.teacher.encode(batch, record=True), batch)


# ---- a step ----------------------------------------------------------------------------------------------------------


def items_of(paper, name, batch):
    """How many items of a batch the mean of a loss runs over. NAME_soft: the loss on the teacher's logits of NAME."""
    objective = paper.OBJECTIVES.get(name.removesuffix("_soft"))
    mean_over = "rows"  # losses of a teacher's attention and states have no row in OBJECTIVES
    if objective:
        mean_over = objective.mean_over
    if name.endswith("_soft"):
        # a soft loss is a mean over all rows of logits: all masked regions, or all texts, with an answer or without
        mean_over = {"all regions": "regions", "answers": "rows"}.get(mean_over, mean_over)
    return common.count_items(mean_over, batch)


def distillation_losses(run, names):
    """Names of the losses that the teacher adds: NAME_soft for logits, and those of DISTILLATION."""
    losses = []
    if run.teacher is None:
        return losses
    for part in run.args.distill.split(","):
        if part == "logits":
            losses += [f"{name}_soft" for name in names if name in run.distilled]
        losses += DISTILLATION[part]
    return losses


def forward_with_teacher(run, batch, names):
    """{objective: (loss, logits)} of the model, and {name: (loss, None)} of `distillation_losses`, in one dict."""
    wanted = run.args.distill.split(",")
    record = wanted != ["logits"]
    needs_encoding = record or not all(run.paper.OBJECTIVES[name].encodes_itself for name in names)
    student = run.model.encode(batch, record=record) if needs_encoding else None
    teacher_batch = renumber_tasks(run, batch, names)
    with torch.no_grad():
        teacher = run.teacher.encode(teacher_batch, record=record) if needs_encoding else None
    outputs = {name: run.paper.OBJECTIVES[name].loss(run.model, student, batch) for name in names}
    for name in names:
        if "logits" in wanted and name in run.distilled:
            with torch.no_grad():
                _, logits = run.teacher_paper.OBJECTIVES[name].loss(run.teacher, teacher, teacher_batch)
            _, own_logits = outputs[name]
            outputs[f"{name}_soft"] = (logits_loss(run.paper.OBJECTIVES[name], own_logits, logits, batch), None)
    if "attention" in wanted:
        kl, mse = attention_losses(run, student, teacher, batch)
        outputs["attention_kl"] = (kl, None)
        outputs["attention_mse"] = (mse, None)
    if "hidden" in wanted:
        outputs["hidden"] = (hidden_losses(run, student, teacher, batch), None)
    return outputs


def attention_losses(run, student, teacher, batch):
    """(kl, mse) of `attention_loss`, each the mean over the maps that both models have."""
    losses = []
    for kind, own, other in layer_pairs(student.maps, teacher.maps):
        # a kind ends in "text_to_regions" for cross-attention, in "text" for self-attention (queries are keys)
        queries, _, keys = kind.rsplit(".", 1)[-1].partition("_to_")
        num_queries = min(own.shape[2], other.shape[2])  # without ViLBERT's whole image, if one model lacks it
        num_keys = min(own.shape[3], other.shape[3])
        own = own[:, :, -num_queries:, -num_keys:]  # (B, H, T, S)
        other = other[:, :, -num_queries:, -num_keys:]  # (B, H', T, S)
        query_mask = real_positions(batch, queries, num_queries)
        key_mask = real_positions(batch, keys or queries, num_keys)
        losses.append(attention_loss(own, other, query_mask, key_mask))
    if not losses:
        raise UserError(
            f"--distill attention: no map of {run.args.model} is one of {run.args.teacher}; use logits,hidden"
        )
    return sum(losses) / len(losses)  # (2,)


def hidden_losses(run, student, teacher, batch):
    """`hidden_loss`, mean over the kinds of states that both models record; if there are none, over the last states."""
    pairs = layer_pairs(student.states, teacher.states)
    if not pairs:
        pairs = [("text", student.text, teacher.text), ("regions", student.regions, teacher.regions)]
    losses = []
    for kind, own, other in pairs:
        side = "regions" if "regions" in kind else "text"  # states of both together, UNITER's, count as text
        projection = run.model.heads["hidden"][side]
        length = min(own.shape[1], other.shape[1])
        mask = real_positions(batch, kind, length)
        losses.append(hidden_loss(projection(own)[:, -length:], other[:, -length:], mask))  # (B, S, C)
    return sum(losses) / len(losses)
