"""distillation.py: the losses between a student and its teacher, and what the two models have in common.

distill.py uses them in each step. The losses take only tensors, so that they can be read beside their papers.
Letters: B rows, T queries, S keys or positions, H heads, C width, M rows of logits, K classes.
"""

import dataclasses

import torch
from torch import nn

import checkpoints
import common
from common import UserError
from tasks import TASK_OF_OBJECTIVE

# ---- losses on logits, attention maps and hidden states --------------------------------------------------------------


@common.in_float32
def soft_label_loss(student, teacher, temperature=2.0):
    """Soft labels (Hinton 2015, section 2): T^2 KL( softmax(teacher / T) || softmax(student / T) ), mean over rows.

    student, teacher: logits (M, K). T^2 undoes the shrinking of the gradient by 1 / T^2. 0 if M = 0.
    """
    assert student.shape == teacher.shape, (student.shape, teacher.shape)
    if len(student) == 0:
        return student.sum() * 0.0
    log_p = (student / temperature).log_softmax(-1)
    log_t = (teacher / temperature).log_softmax(-1)
    return temperature**2 * (log_t.exp() * (log_t - log_p)).sum(-1).mean()  # (M, K) -> (M,) -> ()


def logits_loss(objective, student, teacher, batch):
    """`soft_label_loss` on an objective's logits, (M, K) or (rows,). Pictures x texts (M, M): the mean over both
    directions, as in the contrast itself. Numbers: the squared difference."""
    if objective.learn_as == "numbers":
        return common.squared_error(student, teacher)
    if objective.learn_as == "pairs":
        return (soft_label_loss(student, teacher) + soft_label_loss(student.T, teacher.T)) / 2
    if student.ndim == 1:  # one logit a row: the rows of one example are the classes
        student = student.view(len(batch.ids), -1)  # (rows,) -> (B, choices)
        teacher = teacher.view(len(batch.ids), -1)
    return soft_label_loss(student, teacher)


def average_heads(maps, heads):
    """Attention maps (B, H, T, S) -> (B, heads, T, S): each the mean of H / heads neighbouring heads. UserError if H is
    not a multiple of `heads`."""
    if maps.shape[1] % heads:
        raise UserError(
            f"--distill attention: {maps.shape[1]} attention heads of the teacher cannot be shared by {heads} of the "
            "student; choose others by --config"
        )
    return maps.unflatten(1, (heads, -1)).mean(2)  # (B, H, T, S) -> (B, heads, H/heads, T, S) -> (B, heads, T, S)


def mean_over_rows(values, mask):
    """Mean over a row's True positions, then over rows: values, mask (B, S) -> (). A row without True counts as 0."""
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
    mse compares logits: log p is the logit minus a constant for each query, which subtracting the mean over s removes.
    Returns (2,).
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


# ---- what two models have in common ----------------------------------------------------------------------------------


def check_task_tokens(run):
    """UserError if only one of the two models has task tokens: then positions do not correspond."""
    has_token = [getattr(model.config, "task_tokens", 0) > 0 for model in (run.model, run.teacher)]
    if run.args.distill != "logits" and has_token[0] != has_token[1]:
        raise UserError("--distill: only one of the two models has task tokens, so positions differ; use logits")


def check_same_rows(run, task):
    """UserError if the teacher cannot read this task's batches, or expects their rows arranged differently."""
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


def logits_of(objective):
    """What two objectives must share for their logits to mean the same: head, what is masked, kind of logits."""
    return objective.head, objective.masks, objective.learn_as


def is_taught(objective, teacher_paper, teacher_objectives):
    """Whether one of the objectives that the teacher was trained for has logits of the same meaning.

    A trained head is not enough: captioning trains the head of masked words too, `nce` that of `mrfr`.
    """
    kinds = [logits_of(teacher_paper.OBJECTIVES[name]) for name in teacher_objectives]
    return logits_of(objective) in kinds


def teaches_answers(run, checkpoint):
    """Whether the student learns the teacher's logits of answers. Then it must have the teacher's list of answers."""
    if "logits" not in run.args.distill.split(","):
        return False
    teacher_paper = checkpoints.MODELS[checkpoint["model"]]
    for name in run.objectives:
        objective = run.paper.OBJECTIVES[name]
        if objective.open_answers and is_taught(objective, teacher_paper, checkpoint.get("objectives", {})):
            return True
    return False


def why_not_comparable(run, name, teacher_objectives):
    """Why the logits of an objective cannot be distilled; None if they can. Both models need logits over the same
    classes."""
    objective = run.paper.OBJECTIVES[name]
    head = objective.head
    if objective.learn_as == "nothing":
        return "it has no logits of classes"
    if not is_taught(objective, run.teacher_paper, teacher_objectives):
        return "the teacher was not trained for it"
    student = run.model.config.vocab_size
    teacher = run.teacher.config.vocab_size
    if head == "mlm" and student != teacher:  # a table of words may be longer than the list of word pieces
        return f"the student has {student} word pieces, the teacher {teacher}"
    if objective.masks == "regions" and objective.labels:  # classes or attributes of regions
        student = output_width(run.model.heads[head])
        teacher = output_width(run.teacher.heads[head])
        if student != teacher:  # one has a logit for background, the other does not
            return f"the student has {student} region classes, the teacher {teacher}"
    return None


def renumber_tasks(run, batch, names):
    """The batch with the number that the teacher's own list of tasks gives to this task, 0 where it lacks it. A model with
    `task_tokens` reads it."""
    task = TASK_OF_OBJECTIVE.get(names[0])
    number = 0
    if task and task.name in run.teacher_tasks:
        number = run.teacher_tasks.index(task.name)
    task_numbers = torch.full((len(batch.text),), number, device=batch.text.device)  # (B,)
    return dataclasses.replace(batch, task=task_numbers)


def output_width(head):
    """How many logits a head computes: the rows of its last linear layer."""
    return [module for module in head.modules() if isinstance(module, nn.Linear)][-1].out_features


def layer_map(student, teacher):
    """The teacher layer that each of `student` layers imitates: evenly spaced, last to last; layer_map(2, 6) = [2, 5]
    (TinyBERT, section 3.1)."""
    return [max(0, (i + 1) * teacher // student - 1) for i in range(student)]


def layer_pairs(student, teacher):
    """[(kind, student's tensor, teacher's tensor)] of the kinds of maps or states that both have, by `layer_map`."""
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
    """(B, length) bool, True = real: positions of text, of regions, or (`kind` names neither) of both.

    Positions before the first of the mask are real: ViLBERT's recorded regions begin with the whole image.
    """
    if "text" in kind:
        mask = batch.text_mask
    elif "regions" in kind:
        mask = batch.region_mask
    else:
        mask = torch.cat([batch.text_mask, batch.region_mask], 1)  # (B, T + N)
    return nn.functional.pad(mask, (length - mask.shape[1], 0), value=True)
