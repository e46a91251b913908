"""tasks.py: the downstream tasks, and pretraining's own evaluation.

Each of the seven tasks is one block that ends with the task's row, a `Task`. The block says what a line of data must
hold, how its examples become a batch, what is measured, and how an answer is shown. The table TASKS at the end of the
file lists the rows; train.py and predict.py reach every task through it.

Accuracies and recalls are in 0..1. Chance is the score of guessing without the model. Processes share the examples.
`run` is train.Run, or anything with the same attributes: args, paper (the model's module), model, tokenizer, answers,
usual_answers, content_words, device, autocast(), rank, world, sets, objectives, progress, answer_columns().
Letters: B rows or examples of a batch, E examples, T text positions, N regions, C width, K choices, V vocabulary.
"""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch

import common
import data
from support import consensus, evaluation


@dataclass(frozen=True)
class Task:
    """One row of the table of tasks.

    record: a line of the data, as data.py read it.   example: data.Example.   index: (B,) numbers of examples.
    """

    name: str
    objective: str  # its row in the models' OBJECTIVES; "": pretraining, whose objectives are options
    examples: Callable  # record -> list of data.Example
    batch: Callable  # (run, dataset, index, rng) -> data.Batch
    evaluate: Callable  # (run, dataset) -> (metrics, chance)
    show: Callable  # (run, dataset, example's number, its logits, how many answers) -> dict, see support/evaluation.py
    own_objective: common.Objective | None = None  # its row in OBJECTIVES, if the models do not define it
    logits: Callable | None = None  # (run, dataset, index) -> the logits that `show` takes; None: `example_logits`
    needs: tuple = ()  # keys that a line must have besides text and a picture
    truth: str = ""  # the key of what is to be predicted; predict.py reads lines without it
    prompt: str = ""  # template of a line's text: see records.fill_prompt
    text_is_optional: bool = False  # True: a line may lack its text, which is then ""; predict.py sets it for captions
    pictures: int = 1  # pictures of a line
    rows_per_example: int = 1  # that an example typically takes, for the default batch size
    check: Callable = lambda record: None  # record -> None, or a sentence that says what is wrong with it
    best: tuple = ("accuracy",)  # metrics that choose the best weights: the first of these that was measured
    lower_is_better: bool = False  # True: that metric is better when lower
    first_stage: str = ""  # a second objective, trained for the first stage of --rerank
    ranks: str = ""  # head that scores pairs of text and picture in the second stage of --rerank
    hard_negatives: bool = False  # True: the model chooses negatives, so no batch is prepared ahead
    generates: bool = False  # True: the text is the task's output, not its input
    without_answers: str = ""  # pretraining only: the task whose lines are read if no objective predicts answers
    layout: Callable = lambda paper, config: None  # how the model arranges the rows; a teacher must agree
    most_pictures: int = 0  # > 0: it ranks the pictures of --pool, at most this many


# ---- batches -----------------------------------------------------------------------------------------------------------


def make_batch(run, dataset, index, names, rng, mismatched_share=None, word_masking=None):
    """The batch of examples `index` for objectives `names`: a downstream task's, or one of pretraining. The first name
    decides which; a task's own objective comes first.

    mismatched_share: share of mismatched pairs, by default that of the model's PRETRAINING. word_masking: arguments of
    data.mask_words, by default those of --mask. Both are for pretraining objectives only.
    """
    task = TASK_OF_OBJECTIVE.get(names[0])
    if task is None:
        batch = pretraining_batch(run, dataset, index, names, rng, mismatched_share, word_masking)
    else:
        batch = task.batch(run, dataset, index, rng)
    return data.remove_modality(batch, run.args.ablate)


def pretraining_batch(run, dataset, index, names, rng, mismatched_share, word_masking):
    """One batch for all objectives `names`: pairs are mismatched, words and regions masked, as they need it."""
    settings = run.paper.PRETRAINING
    objectives = [run.paper.OBJECTIVES[name] for name in names]
    masks = {objective.masks for objective in objectives}
    mismatch = any(objective.mismatched for objective in objectives)
    images = None
    if mismatch:
        if mismatched_share is None:
            mismatched_share = settings["mismatched_share"]
        index, images = data.sample_mismatches(dataset, index, rng, mismatched_share, settings["mismatch"])
    columns = run.answer_columns() if run.answers else None
    fields = [name for objective in objectives for name in objective.fields]
    batch = data.collate(dataset, index, images, columns, fields, rng)
    if any(objective.mean_over == "answers" for objective in objectives):
        batch = data.sample_answers(batch, rng)
    if "words" in masks:
        if word_masking is None:
            word_masking = {"p": run.args.mask, "force_one": run.args.mask > 0}
        batch = data.mask_words(batch, run.tokenizer, rng, **word_masking)
    if "regions" in masks:
        batch = data.mask_regions(batch, rng, **settings["region_masking"])
    if mismatch and not settings.get("predict_mismatched", True):
        batch = data.drop_mismatched_labels(batch)
    return batch


def heads_for(paper, objectives):
    """Names of the heads that these objectives use, each once."""
    heads = []
    for name in objectives:
        head = paper.OBJECTIVES[name].head
        if head and head not in heads:
            heads.append(head)
    return tuple(heads)


def is_pretraining(name):
    """Whether --task is pretraining, whose objectives are options."""
    return name == PRETRAIN.name


def task_objectives(args, name):
    """The objectives that a downstream task trains: its own, and with --rerank that of the first stage."""
    task = TASKS[name]
    objectives = [task.objective]
    if task.first_stage and args.rerank is not None:
        objectives.append(task.first_stage)
    return objectives


# ---- running the model over examples ------------------------------------------------------------------------------------


def loss_and_logits(run, batch, name):
    """(loss, logits) of one objective on a batch, in float32; the logits on the CPU."""
    with run.autocast():
        loss, logits = run.model(batch.to(run.device), [name])[name]
    return loss.float(), logits.float().cpu()


def example_logits(run, dataset, index, name):
    """Logits of a task's objective for examples `index`: (B, K), K answers, choices or regions (padding last)."""
    batch = make_batch(run, dataset, index, [name], None)
    _, logits = loss_and_logits(run, batch, name)
    return logits.view(len(index), -1)  # vcr: (B * choices,) -> (B, choices); the others are (B, K) already


def evaluation_batches(run, dataset, index):
    """Yields this process's share of the examples `index`, in batches of similar lengths."""
    for part in data.batches(dataset.lengths()[index], size=evaluation.BATCH, rank=run.rank, world=run.world):
        yield index[part]


def examples_to_evaluate(run, name, dataset):
    """The examples that a task is evaluated on. Most tasks: all. Retrieval: captions of the first --pool pictures (val:
    100). Captioning: one example of each of these pictures. Pretraining: one caption of each of MOST_PRETRAINING pictures."""
    task = TASKS[name]
    if not task.objective:
        return evaluation.first_captions(dataset)[:MOST_PRETRAINING]
    pool = 100 if dataset.split == "val" else run.args.pool
    if task.generates:
        return evaluation.first_captions(dataset)[:pool]
    if task.most_pictures:
        return evaluation.retrieval_captions(run, dataset, min(pool, task.most_pictures))
    return np.arange(len(dataset))


def targets(dataset, index):
    """The targets of examples `index`, (B,) int64; 0 where a line has no label (its loss is not used then)."""
    if dataset.target is None:
        return torch.zeros(len(index), dtype=torch.long)
    return torch.from_numpy(np.maximum(dataset.target[index], 0))


def simple_example(record, kind, answer=None, target=-1):
    """One data.Example with one row: the line's text beside its picture."""
    return data.Example(record["id"], record.get("kind", kind), [(record["text"], 0)], answer, target)


# ---- pretraining --------------------------------------------------------------------------------------------------------


def pretraining_examples(record):
    """A caption, or a question if the line has an answer."""
    answer = record.get("answer")
    kind = "question" if answer else "caption"
    return [simple_example(record, kind, answer)]


MOST_PRETRAINING = 1000  # pictures, and questions, that pretraining is evaluated on


def evaluate_pretraining(run, dataset, candidates=100):
    """Loss and accuracy of each objective, masked under a fixed seed, and zero-shot retrieval among `candidates`
    pictures (itc in the test: among those of --pool).

    Examples: those of `examples_to_evaluate`; for question answering the first MOST_PRETRAINING questions.
    Accuracies are over masked words, masked regions, pairs or questions. mlm_content masks in every caption of these
    pictures one of the data set's `content_words`, such as colours. Chance: always the most frequent label.
    """
    is_question = np.array([len(answer) > 0 for answer in dataset.answer])
    captions = examples_to_evaluate(run, PRETRAIN.name, dataset)
    questions = np.flatnonzero(is_question)[:MOST_PRETRAINING]
    sums = {}
    for name in run.objectives:
        if run.paper.OBJECTIVES[name].mismatched and not dataset.has_several_pictures:
            continue  # there is no other picture for a mismatched pair
        index = questions if run.paper.OBJECTIVES[name].mean_over == "answers" else captions
        sums[name] = objective_sums(run, dataset, index, name)
    if "mlm" in run.objectives and run.content_words:
        every = np.flatnonzero(~is_question & np.isin(dataset.image, dataset.image[captions]))
        sums["mlm_content"] = objective_sums(run, dataset, every, "mlm", {"only": content_pieces(run), "one": True})
    metrics = {}
    chance = {}
    for name, total in sums.items():
        if total.items:
            metrics[f"{name}_loss"] = total.loss / total.items
        if total.labels:
            labelled = total.labels.total()
            metrics[f"{name}_accuracy"] = total.hits / labelled
            chance[f"{name}_accuracy"] = max(total.labels.values()) / labelled
    texts = captions[:candidates]
    if "itm" in run.objectives:
        recalls = evaluation.recall_of_all_pairs(run, dataset, texts, "itm")
        metrics |= recalls
        chance |= evaluation.recall_chance(recalls, dataset.image[texts])
    if "itc" in run.objectives:
        if dataset.split != "val":
            texts = evaluation.retrieval_captions(run, dataset, run.args.pool)
        recalls = evaluation.recall_of_dot_products(run, dataset, texts)
        recalls = {f"itc_{name}": value for name, value in recalls.items()}
        metrics |= recalls
        chance |= evaluation.recall_chance(recalls, dataset.image[texts])
    return metrics, chance


def content_pieces(run):
    """(V,) bool, True = a content word of the data set that is one word piece."""
    content = torch.zeros(run.tokenizer.get_vocab_size(), dtype=torch.bool)
    for word in run.content_words:
        piece = run.tokenizer.token_to_id(word)
        if piece is not None:
            content[piece] = True
    return content


def objective_sums(run, dataset, index, name, word_masking=None):
    """evaluation.ObjectiveSums of one objective on examples `index`, over all processes. Half of the pairs are
    mismatched, whatever the share in training, so that chance is the same for all models."""
    own = evaluation.ObjectiveSums()
    for part in evaluation_batches(run, dataset, index):
        rng = data.random_stream("evaluation", int(part[0]))
        batch = make_batch(run, dataset, part, [name], rng, 0.5, word_masking)
        with torch.random.fork_rng([run.device] if run.device.type == "cuda" else []):
            torch.manual_seed(int(part[0]))  # of the negatives of `nce`; training goes on with its own numbers
            loss, logits = loss_and_logits(run, batch, name)
        evaluation.add_batch(own, run.paper.OBJECTIVES[name], batch, float(loss), logits)
    total = evaluation.ObjectiveSums()
    for part in evaluation.gather_objects(run, own):
        total.add(part.loss, part.items, part.hits, part.labels)
    return total


def pretraining_logits(run, dataset, index):
    """A dict for each example: `match` logit; `masked` text, `word_logits` (V,) and `label`; without what the model lacks.

    One word piece of each text is masked: a content word, if the data set names any. The generator's seed is the number
    of the first example, so that the same batch has the same words masked.
    """
    found = [{} for _ in index]
    if "itm" in run.model.heads:
        for row, logit in enumerate(evaluation.score_pairs(run, dataset, index, dataset.image[index], "itm")):
            found[row]["match"] = logit
    if "mlm" in run.model.heads:
        masking = {"only": content_pieces(run) if run.content_words else None, "one": True}
        rng = data.random_stream("shown masks", int(index[0]))
        batch = make_batch(run, dataset, index, ["mlm"], rng, 0.0, masking)
        _, logits = loss_and_logits(run, batch, "mlm")  # (M, V)
        for i, position in enumerate(batch.word_index.tolist()):
            row = position // batch.text.shape[1]
            pieces = batch.text[row, : int(batch.text_mask[row].sum())].tolist()[1:-1]  # without [CLS] and [SEP]
            words = [run.tokenizer.id_to_token(piece) for piece in pieces]
            found[row]["masked"] = " ".join(words).replace(" ##", "")
            found[row]["word_logits"] = logits[i]
            found[row]["label"] = int(batch.word_labels[i])
    return found


PRETRAIN = Task(
    "pretrain",
    objective="",
    examples=pretraining_examples,
    batch=None,  # `make_batch` calls `pretraining_batch` instead
    evaluate=evaluate_pretraining,
    logits=pretraining_logits,
    show=evaluation.show_pretraining,
    best=(),  # see `best_score`
    ranks="itm",
    without_answers="caption",
)


# ---- vqa: visual question answering -------------------------------------------------------------------------------------


def answer_scores(run, dataset, name, answers):
    """The soft score of the answer with the highest logit: (E,) in 0..1, one an example. answers: column -> answer."""
    scores = np.zeros(len(dataset))
    for index in evaluation_batches(run, dataset, np.arange(len(dataset))):
        columns = example_logits(run, dataset, index, name).argmax(-1).tolist()  # (B, A) -> B
        for i, column in zip(index, columns, strict=True):
            scores[i] = dataset.answer[i].get(answers[column], 0.0)
    return common.all_reduce_sum(scores).numpy()


def evaluate_vqa(run, dataset):
    """Accuracy: the soft score of the answer with the highest logit, mean over all questions and over each kind.

    `reachable`, where it is below 1: the accuracy of a model that always chooses the best answer it knows.
    Chance: always the most frequent answer of the training split to this kind of question, or to any question.
    """
    scores = answer_scores(run, dataset, "vqa", run.answers)
    known = set(run.answers)
    guess = np.zeros(len(dataset))
    reachable = np.zeros(len(dataset))
    for i, (kind, truth) in enumerate(zip(dataset.kind, dataset.answer, strict=True)):
        usual = run.usual_answers.get(kind, run.usual_answers.get(""))
        guess[i] = truth.get(usual, 0.0)
        reachable[i] = max((score for answer, score in truth.items() if answer in known), default=0.0)
    metrics, chance = evaluation.accuracy_by_kind(scores, guess, dataset.kind)
    if reachable.mean() < 1:
        metrics["reachable"] = reachable.mean()
    return metrics, chance


def most_frequent_answers(dataset):
    """{kind of question: the answer with the largest sum of scores}, of equal ones the first in the alphabet. "" has the
    answer for all kinds together, unless it is a kind itself."""
    counts = {}
    for kind, answers in zip(dataset.kind, dataset.answer, strict=True):
        counts.setdefault(kind, Counter()).update(answers)
    counts.setdefault("", sum(counts.values(), Counter()))
    usual = {}
    for kind, count in counts.items():
        if count:
            usual[kind] = min(count, key=lambda answer: (-count[answer], answer))
    return usual


VQA = Task(
    "vqa",
    objective="vqa",
    needs=("answer",),
    truth="answer",
    examples=lambda record: [simple_example(record, "vqa", record.get("answer"))],
    batch=lambda run, dataset, index, rng: data.collate(dataset, index, answers=run.answer_columns(), rng=rng),
    evaluate=evaluate_vqa,
    show=lambda run, dataset, i, logits, top: evaluation.show_answers(run.answers, logits.sigmoid(), dataset, i, top),
)


# ---- ve: visual entailment ----------------------------------------------------------------------------------------------


def check_ve(record):
    """The answers are among the three."""
    if not set(record["answer"]) <= set(data.ENTAILMENT):
        return f"'answer' is {', '.join(record['answer'])[:60]}; task ve takes {', '.join(data.ENTAILMENT)}"
    return None


def evaluate_ve(run, dataset):
    """Accuracy as in vqa, of three answers. Chance: always the most frequent answer of this split."""
    scores = answer_scores(run, dataset, "ve", data.ENTAILMENT)
    guess = np.zeros(len(dataset))
    for answer in data.ENTAILMENT:
        always = np.array([truth.get(answer, 0.0) for truth in dataset.answer])
        if always.sum() > guess.sum():
            guess = always
    return evaluation.accuracy_by_kind(scores, guess, dataset.kind)


VE = Task(
    "ve",
    objective="ve",
    needs=("answer",),
    truth="answer",
    check=check_ve,
    examples=lambda record: [simple_example(record, "ve", record.get("answer"))],
    batch=lambda run, dataset, index, rng: data.collate(dataset, index, answers=data.ENTAILMENT_COLUMNS, rng=rng),
    evaluate=evaluate_ve,
    show=lambda run, dataset, i, logits, top: evaluation.show_answers(
        data.ENTAILMENT, logits.sigmoid(), dataset, i, top
    ),
)


# ---- nlvr2: is a statement true of two pictures? ------------------------------------------------------------------------


def check_nlvr2(record):
    """The label is true or false."""
    if type(record["label"]) is not bool:
        return f"'label' is {record['label']}; write true or false"
    return None


def nlvr2_examples(record):
    """One example of two rows: the statement beside the left picture, and beside the right one."""
    rows = [(record["text"], 0), (record["text"], 1)]
    return [data.Example(record["id"], record.get("kind", "nlvr2"), rows, target=int(record.get("label", -1)))]


def nlvr2_is_joined(paper, config):
    """Whether the model reads both pictures in one row."""
    return getattr(config, "nlvr2", "") == "triplet"


def nlvr2_batch(run, dataset, index, rng):
    """Rows 2i and 2i+1 are statement i with its left and its right picture; region_types tell which. batch.target (B,):
    1 = true. For a model with nlvr2="triplet" the two rows are joined into one."""
    batch = data.collate(dataset, index, rng=rng)
    batch.target = targets(dataset, index)
    side = torch.arange(len(batch.text))[:, None] % 2  # (2B, 1): 0 the left picture, 1 the right one
    batch.region_types = side.expand(batch.region_mask.shape).contiguous()  # an expanded tensor cannot be pinned
    if nlvr2_is_joined(run.paper, run.model.config):
        batch = data.join_pictures(batch)
    return batch


def choice_hits(run, dataset, name):
    """(E,) 1 where the choice with the highest logit is dataset.target, else 0; ties as in `top_choice_accuracy`."""
    hits = np.zeros(len(dataset))
    for index in evaluation_batches(run, dataset, np.arange(len(dataset))):
        logits = example_logits(run, dataset, index, name)  # (B, K)
        truth = torch.from_numpy(dataset.target[index]).long()
        right = torch.nn.functional.one_hot(truth, logits.shape[1]).bool()  # (B,) -> (B, K)
        hits[index] = evaluation.top_choice_accuracy(logits, right)
    return common.all_reduce_sum(hits).numpy()


def evaluate_nlvr2(run, dataset):
    """Accuracy of true against false. Chance: always the more frequent label of this kind of statement."""
    hits = choice_hits(run, dataset, "nlvr2")
    kinds = np.array(dataset.kind)
    guess = np.zeros(len(dataset))
    for kind in set(dataset.kind):
        true = dataset.target[kinds == kind].mean()
        guess[kinds == kind] = max(true, 1 - true)
    return evaluation.accuracy_by_kind(hits, guess, kinds)


NLVR2 = Task(
    "nlvr2",
    objective="nlvr2",
    needs=("label",),
    truth="label",
    pictures=2,
    rows_per_example=2,
    check=check_nlvr2,
    examples=nlvr2_examples,
    batch=nlvr2_batch,
    evaluate=evaluate_nlvr2,
    show=lambda run, dataset, i, logits, top: evaluation.show_choices(
        ("false", "true"), logits.softmax(-1), dataset, i, top
    ),
    layout=nlvr2_is_joined,
)


# ---- vcr: choose the answer, then the reason for it ---------------------------------------------------------------------


def check_vcr(record):
    """The label is the index of a choice, and `reason` that of a reason."""
    most = len(record["choices"]) - 1
    label = record["label"]
    if type(label) is not int or not 0 <= label <= most:
        return f"'label' is {label}; write the index of the right choice, 0 to {most}"
    reasons = record.get("reasons", [])
    if (reasons or "reason" in record) and record.get("reason", -1) not in range(len(reasons)):
        return "'reasons' and 'reason' belong together: texts, and the index of the right one, from 0"
    return None


def vcr_examples(record):
    """An example for the answer, with rows (question, choice). If the line has reasons, one for the reason, with rows
    (question, right answer, reason); without a label, as in VCR's test, one for each answer."""
    right = record.get("label", -1)
    answers = [((record["text"], choice), 0) for choice in record["choices"]]
    examples = [data.Example(record["id"], "answer", answers, target=right)]
    for i, answer in enumerate(record["choices"]):
        if "reasons" in record and right in (i, -1):
            kind = "reason" if right == i else f"reason given answer {i}"
            reasons = [((record["text"], answer, reason), 0) for reason in record["reasons"]]
            examples.append(data.Example(record["id"], kind, reasons, target=record["reason"] if right == i else -1))
    return examples


def vcr_batch(run, dataset, index, rng):
    """Rows (B * choices,), those of an example side by side. batch.target (B * choices,): 1 = the right choice."""
    batch = data.collate(dataset, index, rng=rng)
    batch.segments = vcr_text_types(run.paper, batch.segments)
    right = targets(dataset, index)
    batch.target = torch.nn.functional.one_hot(right, dataset.group).flatten()  # (B, choices) -> (rows,)
    return batch


def vcr_text_types(paper, segments):
    """The model's text types (B, T) by its VCR_TYPES, which differ between rows with and without a reason. segments
    (B, T): 0 the question, 1 the answer, 2 the reason."""
    types = torch.zeros(3, 3, dtype=torch.long)  # (segments of the row - 1, segment)
    for number, row in enumerate(paper.VCR_TYPES, 1):
        types[number, : len(row)] = torch.tensor(row)
    last_segment = segments.amax(1, keepdim=True)  # (B, 1)
    return types[last_segment, segments]  # (B, 1), (B, T) -> (B, T)


def evaluate_vcr(run, dataset):
    """Accuracy of the answer (Q-A), of the reason given the right answer (QA-R), and of both (Q-AR). Chance:
    1 / choices, for both together its square."""
    hits = choice_hits(run, dataset, "vcr")
    kinds = np.array(dataset.kind)
    metrics = {}
    chance = {}
    for kind, name in (("answer", "q_a_accuracy"), ("reason", "qa_r_accuracy")):
        if kind in dataset.kind:
            metrics[name] = hits[kinds == kind].mean()
            chance[name] = 1 / dataset.group
    both = []
    for i, kind in enumerate(dataset.kind):
        if kind == "answer":
            answer_hit = hits[i]
        elif kind == "reason":  # stands behind its answer, see vcr_examples
            both.append(hits[i] * answer_hit)
    if both:
        metrics["q_ar_accuracy"] = float(np.mean(both))
        chance["q_ar_accuracy"] = 1 / dataset.group**2
    return metrics, chance


def show_vcr(run, dataset, i, logits, top):
    """The likeliest choices, and the right one."""
    texts = [dataset.text[row][-1] for row in dataset.rows_of([i])]  # the last segment is the choice
    return evaluation.show_choices(texts, logits.softmax(-1), dataset, i, top)


VCR = Task(
    "vcr",
    objective="vcr",
    needs=("choices", "label"),
    truth="label",
    rows_per_example=4,
    check=check_vcr,
    examples=vcr_examples,
    batch=vcr_batch,
    evaluate=evaluate_vcr,
    show=show_vcr,
    best=("q_ar_accuracy", "q_a_accuracy"),
    layout=lambda paper, config: paper.VCR_TYPES,
)


# ---- refer: the region that an expression means -------------------------------------------------------------------------


def refer_examples(record):
    """The expression, and the target box."""
    return [simple_example(record, "refer", target=record.get("target", (0.0, 0.0, 0.0, 0.0)))]


def refer_batch(run, dataset, index, rng):
    """batch.target (B, N): the overlap (IoU) of each region with the target box."""
    batch = data.collate(dataset, index)  # without rng: a crop would move the boxes
    batch.target = target_overlaps(dataset, index, batch)
    return batch


def target_overlaps(dataset, index, batch):
    """(B, N) overlap (IoU) of each region with the target box; -1 for padding."""
    target = torch.from_numpy(dataset.target[index]).float()[:, None]  # (B, 4) -> (B, 1, 4)
    return evaluation.iou(batch.boxes, target).masked_fill(~batch.region_mask, -1.0)


def evaluate_refer(run, dataset):
    """Accuracy: the share of expressions whose region with the highest logit has IoU > 0.5 with the target box.
    `reachable`: the share with any such region. Chance: the share of such regions in a picture, mean over expressions."""
    hits = np.zeros(len(dataset))
    guess = np.zeros(len(dataset))
    reachable = np.zeros(len(dataset))
    for index in evaluation_batches(run, dataset, np.arange(len(dataset))):
        logits = example_logits(run, dataset, index, "refer")  # (B, N)
        clean = data.collate(dataset, index)  # --ablate image takes the boxes away
        right = target_overlaps(dataset, index, clean) > 0.5  # (B, N)
        hits[index] = evaluation.top_choice_accuracy(logits.masked_fill(~clean.region_mask, -math.inf), right)
        guess[index] = right.sum(1) / clean.region_mask.sum(1)
        reachable[index] = right.any(1)
    hits, guess, reachable = common.all_reduce_sum(np.stack([hits, guess, reachable])).numpy()
    metrics, chance = evaluation.accuracy_by_kind(hits, guess, dataset.kind)
    metrics["reachable"] = reachable.mean()
    return metrics, chance


def show_regions(run, dataset, i, logits, top):
    """The likeliest boxes, in pixels; as shares of the picture's width and height where its size is not known."""
    row = dataset.image[i]
    boxes = dataset.store.gather([row], fields=())["boxes"][0].numpy()  # (N, 4)
    scale = np.ones(4)
    digits = 3
    if dataset.store.sizes is not None:
        scale = np.tile(dataset.store.sizes[row], 2)  # width, height, width, height
        digits = 1
    names = (boxes * scale).round(digits).tolist()
    shown = {"answers": evaluation.rank_answers(names, logits[: len(names)].softmax(-1), top)}
    if (dataset.target[i] > 0).any():
        shown["truth"] = (dataset.target[i] * scale).round(digits).tolist()
    return shown


REFER = Task(
    "refer",
    objective="refer",
    needs=("target",),
    truth="target",
    examples=refer_examples,
    batch=refer_batch,
    evaluate=evaluate_refer,
    show=show_regions,
)


# ---- caption: describe a picture ----------------------------------------------------------------------------------------


def evaluate_captions(run, dataset):
    """Perplexity: exp of the mean loss of a word piece, over all captions of the pictures. BLEU-1 to BLEU-4 and CIDEr-D
    of one generated caption a picture, against all its captions. Chance: scores of a caption of another picture."""
    index = examples_to_evaluate(run, "caption", dataset)
    examples = np.flatnonzero(np.isin(dataset.image, dataset.image[index]))
    own = {}
    beams = 1 if dataset.split == "val" and run.optimizer else run.args.beams  # greedily while the model is trained
    neighbours = None
    if run.args.consensus and beams > 1:
        neighbours = consensus.read_captions(run.sets["caption"]["train"])
    for part in evaluation_batches(run, dataset, index):
        for i, text in zip(part, generate_captions(run, dataset, part, beams, neighbours), strict=True):
            own[int(dataset.image[i])] = evaluation.words_of(text)
    generated = {}
    for captions in evaluation.gather_objects(run, own):
        generated |= captions
    references = {}
    for i in examples:
        references.setdefault(int(dataset.image[i]), []).append(evaluation.words_of(dataset.text[i]))
    metrics, chance = evaluation.caption_metrics(generated, references)
    return {"perplexity": caption_perplexity(run, dataset, examples)} | metrics, chance


def caption_perplexity(run, dataset, examples):
    """exp( sum of the losses of all pieces / number of pieces )."""
    loss = 0.0
    pieces = 0
    for part in evaluation_batches(run, dataset, examples):
        batch = make_batch(run, dataset, part, ["caption"], None)
        mean, _ = loss_and_logits(run, batch, "caption")
        loss += float(mean) * len(batch.word_index)
        pieces += len(batch.word_index)
    loss, pieces = common.all_reduce_sum([loss, pieces]).tolist()
    return math.exp(min(loss / max(1, pieces), 700.0))  # exp(710) is beyond float64; in this order NaN stays NaN


def generate_captions(run, dataset, index, beams=None, neighbours=None):
    """A caption for the picture of each example: B texts. beams: of the search; None: --beams. neighbours: the
    consensus.Captions that choose among the texts of the search; None: the likeliest text is kept."""
    batch = evaluation.collate_pairs(run, dataset, index, dataset.image[index])
    first = run.tokenizer.token_to_id("[CLS]")
    last = run.tokenizer.token_to_id("[SEP]")
    beams = beams or run.args.beams
    with run.autocast():
        found = evaluation.generate(run.model, batch, first, last, beams, most=run.args.max_words - 2)
    texts = []  # of each picture, the likeliest first
    for beams_of_picture in found:
        texts.append([])
        for pieces, mean in beams_of_picture:
            texts[-1].append((evaluation.join_ideographs(run.tokenizer.decode(pieces)), mean))
    if neighbours is None:
        return [texts_of_picture[0][0] for texts_of_picture in texts]
    vectors = consensus.picture_vectors(dataset.store, dataset.image[index])
    return [consensus.choose(neighbours, *given) for given in zip(vectors, texts, strict=True)]


def show_caption(run, dataset, i, caption, top):
    """The generated caption, and the example's own."""
    shown = {"caption": caption}
    if dataset.text[i]:
        shown["truth"] = dataset.text[i]
    return shown


CAPTION = Task(
    "caption",
    objective="caption",
    examples=lambda record: [simple_example(record, "caption")],
    batch=lambda run, dataset, index, rng: data.next_word_labels(data.collate(dataset, index, rng=rng)),
    evaluate=evaluate_captions,
    truth="text",
    logits=generate_captions,  # texts in place of logits
    show=show_caption,
    best=("perplexity",),
    lower_is_better=True,
    generates=True,
)


# ---- retrieval: find the picture of a text, and the text of a picture ---------------------------------------------------


def retrieval_batch(run, dataset, index, rng):
    """Rows B * (1 + negatives): each true pair, followed by its mismatched ones. ids are those of the B examples."""
    texts, images = evaluation.sample_negative_pairs(run, dataset, index, rng)
    batch = data.collate(dataset, texts.ravel(), images.ravel(), rng=rng)  # (B, 1 + negatives) -> rows
    return replace(batch, ids=[dataset.ids[i] for i in index])


def evaluate_retrieval(run, dataset):
    """Recall at 1, 5 and 10 in both directions, and their mean, over the texts and pictures of `examples_to_evaluate`."""
    texts = examples_to_evaluate(run, "retrieval", dataset)
    metrics = evaluation.retrieval_recalls(run, dataset, texts, "rank")
    chance = evaluation.recall_chance(metrics, dataset.image[texts])
    metrics["mean_recall"] = float(np.mean(list(metrics.values())))
    chance["mean_recall"] = float(np.mean(list(chance.values())))
    return metrics, chance


RETRIEVAL = Task(
    "retrieval",
    objective="rank",
    rows_per_example=3,
    examples=lambda record: [simple_example(record, "caption")],
    batch=retrieval_batch,
    evaluate=evaluate_retrieval,
    logits=lambda run, dataset, index: evaluation.score_pairs(run, dataset, index, dataset.image[index], "rank"),
    show=evaluation.show_match,
    best=("mean_recall",),
    first_stage="itc",
    ranks="rank",
    hard_negatives=True,
    layout=lambda paper, config: paper.NEGATIVES,
    most_pictures=1000,  # a full matrix of more takes hours
)


# ---- the table of tasks -------------------------------------------------------------------------------------------------

TASKS = {task.name: task for task in (PRETRAIN, VQA, VE, NLVR2, VCR, RETRIEVAL, REFER, CAPTION)}
TASK_OF_OBJECTIVE = {task.objective: task for task in TASKS.values() if task.objective}


# ---- evaluation of a run ------------------------------------------------------------------------------------------------


def evaluate(run, split):
    """(metrics, chance) of the run's tasks on a split, the model in eval mode; empty if no task has the split. With
    several tasks, each metric's name begins with its task's."""
    run.model.eval()
    metrics = {}
    chance = {}
    for name, splits in run.sets.items():
        if split not in splits:
            continue
        with torch.inference_mode():
            task_metrics, task_chance = TASKS[name].evaluate(run, splits[split])
        prefix = f"{name}_" if len(run.sets) > 1 else ""
        metrics |= {prefix + metric: value for metric, value in task_metrics.items()}
        chance |= {prefix + metric: value for metric, value in task_chance.items()}
    return metrics, chance


def best_score(run, metrics):
    """(score, its name) from the metrics of `evaluate`: best.pt holds the weights with the highest score so far.

    A task: the first of its `best` metrics that was measured, or 1 / metric if lower is better.
    Pretraining: the mean accuracy of its objectives. If none has an accuracy: minus the sum of their losses.
    Several tasks: the mean of their scores. 1 / perplexity is in 0..1 as the other metrics are.
    """
    if PRETRAIN.name in run.sets:  # it is the only task
        return evaluation.pretraining_score(metrics)
    values = []
    names = []
    for name in run.sets:
        task = TASKS[name]
        prefix = f"{name}_" if len(run.sets) > 1 else ""
        measured = [prefix + metric for metric in task.best if prefix + metric in metrics]
        if not measured:
            continue  # the task has no val split
        metric = measured[0]
        value = float(metrics[metric])
        if task.lower_is_better:
            value = 1 / value
            metric = f"1 / {metric}"
        values.append(value)
        names.append(metric)
    name = names[0] if len(names) == 1 else f"mean of {', '.join(names)}"
    return float(np.mean(values)), name
