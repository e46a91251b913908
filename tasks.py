"""tasks.py: batches for every objective and task, evaluation, retrieval, metrics."""

import dataclasses
import itertools
import json
import math
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.distributed as dist

import common
import data
from common import UserError
from prepare import scenes

# ---- batches ----------------------------------------------------------------------------------------------------------


OBJECTIVE = {"retrieval": "rank"}  # of the tasks whose objective has another name


DOWNSTREAM = {"ve", "nlvr2", "vcr", "rank", "refer", "caption"}


def task_objectives(args, task):
    """The objectives of a downstream task: its own, and for retrieval in two stages also that of the first."""
    return [OBJECTIVE.get(task, task)] + ["itc"] * (task == "retrieval" and args.rerank is not None)


def make_batch(run, dataset, index, names, rng, false=None, **words):
    """Examples `index` as the objectives `names` need them: pairs mismatched, words masked, regions masked.
    false: the share of false pairs, by default as the paper's file has it; `words`: arguments of data.mask_words in
    place of the run's."""
    if names[0] in DOWNSTREAM:
        return remove_modality(task_batch(run, dataset, index, names[0], rng), run.args.ablate)
    images, matched = None, None
    objectives = [run.paper.OBJECTIVES[name] for name in names]
    masks = {objective.masks for objective in objectives}
    if any(objective.mismatch for objective in objectives):
        false = run.paper.PRETRAINING["false_pairs"] if false is None else false
        index, images, matched = data.sample_mismatches(dataset, index, rng, false, run.paper.PRETRAINING["mismatch"])
    batch = data.collate(dataset, index, images, answers=run.columns() if run.answers else None)
    if matched is not None:
        batch.matched = matched
    if any(objective.mean_over == "answers" for objective in objectives):
        batch = data.sample_answers(batch, rng)
    if "words" in masks:
        batch = data.mask_words(batch, run.tokenizer, rng, **(words or {"p": run.args.mask}))
    if "regions" in masks:
        batch = data.mask_regions(batch, rng, **run.paper.PRETRAINING["region_masking"])
    if matched is not None and not run.paper.PRETRAINING.get("mask_false_pairs", True):
        batch = data.drop_mismatched_labels(batch)
    return remove_modality(batch, run.args.ablate)


def task_batch(run, dataset, index, name, rng):
    """Examples `index` as the objective of a downstream task needs them."""
    if name == "rank":
        index, images = sample_negatives(run, dataset, index, rng)
        batch = data.collate(dataset, index.ravel(), images.ravel())  # (B, 1 + negatives) -> rows
        return dataclasses.replace(batch, ids=[dataset.ids[i] for i in index[:, 0]])  # of the examples, not of the rows
    batch = data.collate(dataset, index, answers=run.columns("ve") if name == "ve" else None)
    if name == "nlvr2":
        batch.target = torch.from_numpy(dataset.target[index])
        side = torch.arange(len(batch.text))[:, None] % 2  # 0 the left picture, 1 the right one
        batch.region_types = side.expand(batch.region_mask.shape).contiguous()  # or it could not be pinned
        if getattr(run.model.config, "nlvr2", "") == "triplet":
            batch = data.join_pictures(batch)
    elif name == "vcr":
        batch.segments = text_types(run.paper, batch.segments)
        right = torch.from_numpy(dataset.target[index])
        batch.target = torch.nn.functional.one_hot(right, dataset.group).flatten()  # (B, choices) -> (rows,)
    elif name == "refer":
        batch.target = target_overlaps(dataset, index, batch)
    elif name == "caption":
        batch = data.next_word_labels(batch)
    return batch


def text_types(paper, segments):
    """The paper's text types of question, answer and reason, which depend on how many segments a row has: (B, T)."""
    table = torch.tensor([[*types, 0, 0][:3] for types in ((0,), *paper.VCR_TYPES)])  # (segments - 1, segment)
    return table[segments.amax(1, keepdim=True), segments]  # (B, 1), (B, T) -> (B, T)


def target_overlaps(dataset, index, batch):
    """(B, N) overlap (IoU) of each region with the box that is meant; -1 for padding."""
    meant = torch.from_numpy(dataset.target[index]).float()[:, None]  # (B, 4) -> (B, 1, 4)
    return common.iou(batch.boxes, meant).masked_fill(~batch.region_mask, -1.0)


def sample_negatives(run, dataset, index, rng):
    """True pairs and false ones for retrieval: texts (B, 1 + K) and pictures (B, 1 + K), the true pair first, then one
    for each of the paper's NEGATIVES, with another picture or another text.

    In the first half of the steps they are drawn at random; in the second half `--mine` are drawn for each and the one
    that the model takes for the best match is kept (UNITER 4.1; ViLBERT mines one of its two texts, from a fixed pool).
    """
    kinds, mine = run.paper.NEGATIVES, run.args.mine if 2 * run.progress["step"] >= run.args.steps else 1
    if (dataset.image == dataset.image[0]).all():
        raise UserError("retrieval needs at least two pictures")
    texts = np.broadcast_to(index[:, None, None], (len(index), len(kinds), mine)).copy()
    other = rng.integers(len(dataset), size=texts.shape)
    while (same := dataset.image[other] == dataset.image[texts]).any():
        other[same] = rng.integers(len(dataset), size=same.sum())
    images = dataset.image[texts]
    for k, kind in enumerate(kinds):
        if kind == "image":
            images[:, k] = dataset.image[other[:, k]]
        else:
            texts[:, k] = other[:, k]
    best = np.zeros(texts.shape[:2], np.int64)  # (B, K)
    if mine > 1:
        run.model.eval()
        with torch.no_grad(), run.autocast():
            batch = remove_modality(data.collate(dataset, texts.ravel(), images.ravel()), run.args.ablate).to(
                run.device
            )
            scores = run.model.heads["rank"](run.model.encode(batch).pooled)  # (B*K*mine, 1)
        run.model.train()
        best = scores.float().cpu().view(texts.shape).argmax(2).numpy()
    texts, images = (np.take_along_axis(x, best[:, :, None], 2)[:, :, 0] for x in (texts, images))
    return np.column_stack([index, texts]), np.column_stack([dataset.image[index], images])


def remove_modality(batch, what):
    """Takes a modality away: the picture's regions (hidden and zeroed), or every word but [CLS] and [SEP]."""
    if what == "image":
        batch.region_mask = torch.zeros_like(batch.region_mask)
        batch.features, batch.boxes = torch.zeros_like(batch.features), torch.zeros_like(batch.boxes)
    if what == "text":
        last = batch.text_mask.sum(1, keepdim=True) - 1  # (B, 1), where [SEP] stands
        batch.text = torch.cat([batch.text[:, :1], batch.text.gather(1, last)], 1)  # (B, T) -> (B, 2)
        batch.text_mask, batch.segments = torch.ones_like(batch.text, dtype=torch.bool), torch.zeros_like(batch.text)
    return batch


def items_of(paper, name, batch):
    """How many items the mean of an objective's loss, or of the loss NAME_soft of its teacher's logits, runs over."""
    objective = paper.OBJECTIVES.get(name.removesuffix("_soft"))
    mean_over = objective.mean_over if objective else "rows"  # a teacher's attention and states: rows
    if name.endswith("_soft") and mean_over == "all regions":
        mean_over = "regions"  # a teacher's logits are those of masked regions
    return common.count_items(mean_over, batch)


def heads_for(paper, objectives):
    """The heads that these objectives use, each once."""
    heads = [paper.OBJECTIVES[name].head for name in objectives]
    return tuple(dict.fromkeys(head for head in heads if head))


# ---- metrics ----------------------------------------------------------------------------------------------------------


def recall_at(scores, truth, ks=(1, 5, 10)):
    """Retrieval: the part of the queries with a true match among the k best-scored candidates, both ways.

    scores (texts, pictures); truth (texts,), each text's picture. A picture may have several texts: the best-ranked one
    counts; pictures without a text are candidates only. Ties, and scores that are not a number, count against us.
    Returns {"text_to_image_r1": .., "image_to_text_r1": .., ...}.
    """
    own = scores.gather(1, truth[:, None])  # (texts, 1)
    to_image = (~(scores < own)).sum(1)  # (texts,): rank of the true picture, 1 = best
    rank = torch.stack([(~(scores[:, i] < scores[text, i])).sum() for text, i in enumerate(truth)])  # among the texts
    to_text = torch.full((scores.shape[1],), len(scores) + 1).scatter_reduce(0, truth, rank, "amin")[truth.unique()]
    ways = {"text_to_image": to_image, "image_to_text": to_text}
    return {f"{way}_r{k}": (ranks <= k).double().mean().item() for k in ks for way, ranks in ways.items()}


def bleu(candidates, references, longest=4):
    """Corpus BLEU (Papineni 2002, section 2.3), in 0..1, without smoothing.

        BLEU = min(1, exp(1 - r / c)) * (p_1 p_2 ... p_longest)^(1 / longest)

    p_n: n-grams of all candidates that a reference of theirs has, each counted at most as often as in the reference
    that has it most often, divided by all n-grams of the candidates. c: the candidates' words; r: the words of the
    reference nearest in length to each, the shorter of two equally near.
    candidates: a list of word lists; references: for each a list of word lists, at least one. 0 if some p_n is 0.
    """
    hits, totals, c, r = [0] * longest, [0] * longest, 0, 0
    for words, true in zip(candidates, references, strict=True):
        c, r = c + len(words), r + min((abs(len(t) - len(words)), len(t)) for t in true)[1]
        for n in range(1, longest + 1):
            grams, *theirs = (Counter(zip(*(w[i:] for i in range(n)), strict=False)) for w in (words, *true))
            most = Counter()
            for their in theirs:
                most |= their  # the larger count of each
            hits[n - 1] += (grams & most).total()
            totals[n - 1] += grams.total()
    if not all(hits):
        return 0.0
    precision = math.exp(sum(math.log(h / t) for h, t in zip(hits, totals, strict=True)) / longest)
    return precision * min(1.0, math.exp(1 - r / c))


@torch.no_grad()
def generate(model, batch, first, last, beams=1, most=40, cached=True):
    """Captions of a batch's pictures, word piece by word piece; beams=1 is greedy.

    Beam search: of all ways to lengthen the `beams` likeliest beginnings by one piece the `beams` likeliest are kept;
    one that ends with `last` keeps its log probability. The likeliest of the last beams is returned, by the plain sum
    of log probabilities, so that enough beams find the likeliest caption of all.

    model.decode(batch, cache) -> (B, T, C) and model.word_scores(states) -> (B, T, V); batch: its text is not read.
    first, last: piece ids that begin and end a text. cached=False reads every beginning anew, for tests. Returns a list
    of B lists of piece ids without first and last, at most `most` long.
    """
    rows = torch.arange(len(batch.features), device=batch.features.device)
    batch = replace(batch, ids=None).rows(rows.repeat_interleave(beams))
    text = torch.full((len(rows) * beams, 1), first, device=rows.device)  # (B*beams, 1)
    scores = torch.full((len(rows), beams), -math.inf, device=rows.device)
    scores[:, 0] = 0.0  # all beams begin alike: only one of them counts
    ended, cache = torch.zeros_like(text[:, 0], dtype=torch.bool), {}
    for _ in range(most):
        new = text[:, -1:] if cached else text
        batch.text, batch.text_mask = new, torch.ones_like(new, dtype=torch.bool)
        batch.segments = torch.zeros_like(new)
        states = model.decode(batch, cache if cached else None)[:, -1]  # (B*beams, T, C) -> (B*beams, C)
        chances = model.word_scores(states).float().log_softmax(-1)  # (B*beams, V)
        chances[ended] = -math.inf
        chances[ended, last] = 0.0
        V = chances.shape[-1]
        total = scores[:, :, None] + chances.view(len(rows), beams, V)  # (B, beams, V)
        scores, best = total.flatten(1).topk(beams)  # (B, beams*V) -> (B, beams)
        parent = (rows[:, None] * beams + best // V).flatten()  # (B, beams) -> (B*beams,)
        text = torch.cat([text[parent], (best % V).view(-1, 1)], 1)
        ended = ended[parent] | (text[:, -1] == last)
        cache = {k: tuple(x[parent] for x in v) if isinstance(v, tuple) else v for k, v in cache.items()}
        if ended.all():
            break
    found = text.view(len(rows), beams, -1)[:, 0, 1:].tolist()  # topk sorts: beam 0 is the likeliest
    return [pieces[: pieces.index(last)] if last in pieces else pieces for pieces in found]


# ---- evaluation -------------------------------------------------------------------------------------------------------


def evaluate(run, split):
    """(metrics, chance) of the run's tasks on a split, the model in eval mode. Accuracies and recalls are in 0..1; of
    several tasks each metric's name begins with its task's."""
    run.model.eval()
    metrics, chance = {}, {}
    for task, splits in run.sets.items():
        if split in splits:
            with torch.inference_mode():
                found = evaluate_task(run, task, splits[split])
            for all_of, some in zip((metrics, chance), found, strict=True):
                all_of |= {(f"{task}_" if len(run.sets) > 1 else "") + name: value for name, value in some.items()}
    return metrics, chance


def evaluate_task(run, task, dataset):
    """(metrics, chance) of one task on one of its splits."""
    if task == "vqa":
        return evaluate_vqa(run, dataset)
    if task == "ve":
        return evaluate_vqa(run, dataset, "ve", list(data.ENTAILMENT))
    if task in ("nlvr2", "vcr", "refer"):
        return evaluate_choice(run, task, dataset)
    if task == "pretrain":
        return evaluate_pretraining(run, dataset)
    index = test_examples(run, task, dataset)
    if task == "caption":
        return evaluate_captions(run, dataset, index)
    metrics = recall_of_all_pairs(run, dataset, index, "rank")
    chance = recall_chance(metrics, len(index))
    metrics["mean_recall"], chance["mean_recall"] = (float(np.mean([*m.values()])) for m in (metrics, chance))
    return metrics, chance


def test_examples(run, task, dataset):
    """Numbers of the examples that a task is tested on: retrieval and captions on one of each picture of --pool, on val
    of a hundred; the others on all."""
    if task not in ("retrieval", "caption"):
        return np.arange(len(dataset))
    most = 100 if dataset.split == "val" else run.args.pool
    most = min(most, 1000) if task == "retrieval" else most  # a full matrix of more takes hours
    return first_captions(dataset)[:most]


def loss_and_logits(run, batch, name):
    """(loss, scores) of one objective on a batch."""
    with run.autocast():
        loss, scores = run.model(batch.to(run.device), [name])[name]
    return loss.float(), scores.float().cpu()


def evaluation_batches(run, dataset, index):
    """The examples `index` in batches of like lengths; each process takes its own batches."""
    for part in data.batches(dataset.lengths()[index], size=256, rank=run.rank, world=run.world):
        yield index[part]


def first_captions(dataset):
    """The first caption of each picture, or text of any kind where none is a caption: numbers of examples."""
    kinds = np.array(dataset.kind)
    captions = np.flatnonzero(kinds == "caption") if "caption" in kinds else np.arange(len(dataset))
    return captions[np.unique(dataset.image[captions], return_index=True)[1]]


def evaluate_pretraining(run, dataset, examples=1000, candidates=100):
    """Each objective on held-out captions, under a fixed seed, and zero-shot retrieval among `candidates` pictures.

    Accuracies are over masked words, masked regions or pairs. mlm_content masks one word, of every caption of these
    pictures, that only the picture tells: a colour, shape, size, number or direction. Beside each: what the most
    frequent label would get.
    """
    kinds, names = np.array(dataset.kind), list(run.objectives)
    captions = first_captions(dataset)[:examples]
    every = np.flatnonzero((kinds == "caption") & np.isin(dataset.image, dataset.image[captions]))
    questions = np.flatnonzero(kinds != "caption")[:examples]
    content = torch.zeros(run.tokenizer.get_vocab_size(), dtype=torch.bool)
    content[[i for w in scenes.CONTENT_WORDS if (i := run.tokenizer.token_to_id(w)) is not None]] = True
    sums = {}
    for name in [*names, *["mlm_content"] * ("mlm" in names and run.args.data == "scenes")]:
        for index in evaluation_batches(run, dataset, {"qa": questions, "mlm_content": every}.get(name, captions)):
            rng = np.random.default_rng((1, int(index[0])))
            if name == "mlm_content":
                batch = make_batch(run, dataset, index, ["mlm"], rng, only=content, one=True)
            else:
                # half false whatever training has, so that chance is the same for all models
                batch = make_batch(run, dataset, index, [name], rng, false=0.5)
            add_counts(run.paper, sums, name, batch, *loss_and_logits(run, batch, name.removesuffix("_content")))
    metrics, chance = {}, {}
    gathered = [sums] * run.world
    if dist.is_initialized():
        dist.all_gather_object(gathered, sums)  # a process may have had no batch of a small split
    for name in dict.fromkeys(name for sums in gathered for name in sums):
        loss, n, hits, *labels = map(sum, itertools.zip_longest(*(s.get(name, []) for s in gathered), fillvalue=0))
        metrics[f"{name}_loss"] = loss / max(1, n)
        if seen := sum(labels):
            metrics[f"{name}_accuracy"], chance[f"{name}_accuracy"] = hits / seen, max(labels) / seen
    if "itm" in names:
        recalls = recall_of_all_pairs(run, dataset, captions[:candidates])
        metrics, chance = metrics | recalls, chance | recall_chance(recalls, len(captions[:candidates]))
    if "itc" in names:
        dots = dot_products(run, dataset, captions[:candidates], dataset.image[captions[:candidates]])
        recalls = recall_at(dots, torch.arange(len(dots)))
        recalls = {f"itc_{name}": value for name, value in recalls.items()}
        metrics, chance = metrics | recalls, chance | recall_chance(recalls, len(dots))
    return metrics, chance


def recall_chance(recalls, pictures):
    """What guessing among so many pictures gets of each recall; its name ends in its rank: {"..._r5": 5 / pictures}."""
    return {name: min(1.0, int(name.rsplit("r", 1)[1]) / pictures) for name in recalls}


def add_counts(paper, sums, name, batch, loss, logits):
    """Adds a batch to sums[name]: [loss x items, items, hits, frequency of each label ...]."""
    objective = paper.OBJECTIVES[name.removesuffix("_content")]
    n, labels = common.count_items(objective.mean_over, batch), None
    if objective.labels:
        labels = objective.labels(batch, logits)
        logits, labels = logits[labels >= 0], labels[labels >= 0]  # -1: no label
    values = [float(loss) * n, n, 0]
    if labels is not None:
        values[2:] = [
            int((logits.argmax(-1) == labels).sum()),
            *np.bincount(labels.numpy(), minlength=logits.shape[-1]),
        ]
    sums[name] = [a + b for a, b in itertools.zip_longest(sums.get(name, []), values, fillvalue=0)]


def evaluate_vqa(run, dataset, name="vqa", answers=None):
    """Accuracy: the soft score of the answer with the highest logit, mean over questions, also for each kind.
    Entailment is the same with its own three answers.

    Chance: to each kind of question the training split's most frequent answer; of `answers`, if given, always the most
    frequent here.
    """
    hits, kinds = np.zeros(len(dataset)), np.array(dataset.kind)
    for index in evaluation_batches(run, dataset, np.arange(len(dataset))):
        best = loss_and_logits(run, make_batch(run, dataset, index, [name], None), name)[1].argmax(-1).tolist()
        known = answers or run.answers
        hits[index] = [dataset.answer[i].get(known[b], 0.0) for i, b in zip(index, best, strict=True)]
    if answers:
        guess = max(([answer.get(a, 0.0) for answer in dataset.answer] for a in answers), key=sum)
    else:
        usual = most_frequent_answers(run.sets[name]["train"])
        guess = [answer.get(usual.get(kind), 0.0) for kind, answer in zip(dataset.kind, dataset.answer, strict=True)]
    return accuracy_by_kind(common.all_reduce_sum(hits).numpy(), np.array(guess), kinds)


def most_frequent_answers(dataset):
    """{kind of question: its most frequent answer}, equals by text."""
    counts = {}
    for kind, answers in zip(dataset.kind, dataset.answer, strict=True):
        counts.setdefault(kind, Counter()).update(answers.keys())
    return {kind: min(count, key=lambda a: (-count[a], a)) for kind, count in counts.items() if count}


def accuracy_by_kind(hits, guess, kinds, name="accuracy"):
    """Means of `hits` and of `guess`, what guessing would get, (E,) each: over all, and over each of several kinds."""
    groups = {name: np.ones(len(kinds), bool)}
    groups |= {f"{name}_{kind}": kinds == kind for kind in sorted(set(kinds)) if len(set(kinds)) > 1}
    return {k: hits[g].mean() for k, g in groups.items()}, {k: guess[g].mean() for k, g in groups.items()}


def evaluate_choice(run, task, dataset):
    """Accuracies of the tasks that choose: of true and false (nlvr2), of several texts (vcr), of regions (refer).

    vcr: the answer (Q-A), the reason given the right answer (QA-R), and both (Q-AR). refer: the best-scored region
    overlaps the box meant by more than one half; `reachable` is the share where some region does.
    Chance: the more frequent truth of each kind of statement; one choice of all; the share of the regions that would be right.
    """
    right, guess, reachable = np.zeros((3, len(dataset)))
    for index in evaluation_batches(run, dataset, np.arange(len(dataset))):
        scores = loss_and_logits(run, make_batch(run, dataset, index, [task], None), task)[1]
        if task == "refer":
            clean = data.collate(dataset, index)  # with the boxes that --ablate takes away
            hit = target_overlaps(dataset, index, clean) > 0.5  # (B, N)
            right[index] = top_choice_accuracy(scores.masked_fill(~clean.region_mask, -math.inf), hit)
            guess[index], reachable[index] = hit.sum(1) / clean.region_mask.sum(1), hit.any(1)
        else:
            scores = scores.view(len(index), -1)  # (B, 2), or (B * choices,) -> (B, choices)
            truth = torch.from_numpy(dataset.target[index]).long()
            right[index] = top_choice_accuracy(scores, torch.nn.functional.one_hot(truth, scores.shape[1]).bool())
    right, guess, reachable = (common.all_reduce_sum(x).numpy() for x in (right, guess, reachable))
    kinds = np.array(dataset.kind)
    if task == "refer":
        metrics, chance = accuracy_by_kind(right, guess, kinds)
        return metrics | {"reachable": reachable.mean()}, chance
    if task == "nlvr2":
        true = {kind: dataset.target[kinds == kind].mean() for kind in set(dataset.kind)}
        usual = {kind: max(share, 1 - share) for kind, share in true.items()}
        return accuracy_by_kind(right, np.array([usual[kind] for kind in kinds]), kinds)
    metrics, chance = {}, {}
    for kind, name in (("answer", "q_a"), ("reason", "qa_r")):
        if (kinds == kind).any():
            metrics[f"{name}_accuracy"], chance[f"{name}_accuracy"] = right[kinds == kind].mean(), 1 / dataset.group
    answered = {i: hit for i, hit, kind in zip(dataset.ids, right, kinds, strict=True) if kind == "answer"}
    both = [hit * answered[i] for i, hit, kind in zip(dataset.ids, right, kinds, strict=True) if kind == "reason"]
    if both:
        metrics["q_ar_accuracy"], chance["q_ar_accuracy"] = float(np.mean(both)), 1 / dataset.group**2
    return metrics, chance


def top_choice_accuracy(scores, hit):
    """Which part of the best-scored candidates is right: 0 or 1, but where several share the best score, as they do without
    picture or words, their mean. scores (B, K), hit (B, K) bool -> (B,)"""
    best = scores == scores.amax(1, keepdim=True)
    return (best & hit).sum(1) / best.sum(1).clamp(min=1)


def evaluate_captions(run, dataset, index):
    """Perplexity of the captions, exp of their mean loss a piece, and BLEU-4 of the generated ones, `index` naming one
    example of each picture, against all captions of it. Chance: the caption of another picture."""
    pictures, loss, pieces, own = set(dataset.image[index].tolist()), 0.0, 0, {}
    examples = np.array([i for i, image in enumerate(dataset.image.tolist()) if image in pictures])
    for part in evaluation_batches(run, dataset, examples):
        batch = make_batch(run, dataset, part, ["caption"], None)
        loss += float(loss_and_logits(run, batch, "caption")[0]) * len(batch.word_index)
        pieces += len(batch.word_index)
    loss, pieces = common.all_reduce_sum([loss, pieces]).tolist()
    first, last = (run.tokenizer.token_to_id(name) for name in ("[CLS]", "[SEP]"))
    beams = run.args.beams if dataset.split != "val" else 1
    for part in evaluation_batches(run, dataset, index):
        batch = remove_modality(data.collate(dataset, part), run.args.ablate).to(run.device)
        with run.autocast():
            found = generate(run.model, batch, first, last, beams)
        own |= {int(dataset.image[i]): run.tokenizer.decode(ids).split() for i, ids in zip(part, found, strict=True)}
    gathered = [own] * run.world
    if dist.is_initialized():
        dist.all_gather_object(gathered, own)
    own, true = {image: words for some in gathered for image, words in some.items()}, {}
    for i in examples:
        ids = dataset.tokens[dataset.offsets[i] + 1 : dataset.offsets[i + 1] - 1].tolist()  # without [CLS] and [SEP]
        true.setdefault(int(dataset.image[i]), []).append(run.tokenizer.decode(ids).split())
    order = sorted(own)
    said, references = [own[image] for image in order], [true[image] for image in order]
    strangers = [true[image][0] for image in [*order[1:], order[0]]]
    metrics = {"perplexity": math.exp(loss / max(1, pieces)), "bleu4": bleu(said, references)}
    return metrics, {"bleu4": bleu(strangers, references)} if len(order) > 1 else {}


# ---- retrieval --------------------------------------------------------------------------------------------------------


def match_logits(model, pooled, head):
    """How well pairs match: the log odds of head "itm", or the one score of "rank". (rows, C) -> (rows,) float64"""
    logits = model.heads[head](pooled).cpu().double()  # (rows, 2) or (rows, 1); Apple's GPUs have no float64
    return logits[:, 1] - logits[:, 0] if head == "itm" else logits[:, 0]


def recall_of_all_pairs(run, dataset, index, head="itm"):
    """Recall at 1, 5 and 10, both ways: every text of `index` with every picture, ranked by `match_logits`. What
    the model computes of each text and each picture alone is computed once."""
    n, batch = len(index), remove_modality(data.collate(dataset, index), run.args.ablate).to(run.device)
    scores = torch.zeros(n, n, dtype=torch.float64)
    with run.autocast():
        words, areas = run.model.unimodal(batch)
        for row in range(run.rank, n, run.world):
            text = {name: getattr(batch, name)[row].expand(n, -1) for name in ("text", "text_mask", "segments")}
            pairs = dataclasses.replace(batch, **text)
            pooled = run.model.encode(pairs, given=(words[row].expand(n, -1, -1), areas)).pooled  # (n, C)
            scores[row] = match_logits(run.model, pooled, head)
    return recall_at(common.all_reduce_sum(scores), torch.arange(n))


def dot_products(run, dataset, texts, pictures):
    """Cosines (texts, pictures) of the unimodal vectors of itc: examples `texts`, store rows `pictures`. Each text and
    each picture is encoded once."""
    head, sides = run.model.heads["itc"], []
    for index, side in ((texts, "text"), (pictures, "image")):
        lengths = np.diff(dataset.offsets if side == "text" else dataset.store.offsets)[index]
        vectors = torch.zeros(len(index), head.project_text.out_features, dtype=torch.float64)
        for part in data.batches(lengths, size=256, rank=run.rank, world=run.world):
            rows = (index[part], None) if side == "text" else (np.full(len(part), texts[0]), index[part])
            batch = remove_modality(data.collate(dataset, *rows), run.args.ablate).to(run.device)
            with run.autocast():
                if side == "text":
                    found = head.text(run.model.encode(batch, regions=False).text)
                else:
                    found = head.image(run.model.encode(batch, text=False).regions, batch.region_mask)
            vectors[part] = found.cpu().double()
        sides.append(common.all_reduce_sum(vectors))
    return sides[0] @ sides[1].T  # (texts, E) @ (E, pictures)


def score_pairs(run, dataset, texts, pictures, head="itm"):
    """`match_logits` of text i with picture i, (P,). texts: examples, pictures: store rows, (P,) each."""
    scores = torch.zeros(len(texts), dtype=torch.float64)
    lengths = np.stack([np.diff(dataset.offsets)[texts], np.diff(dataset.store.offsets)[pictures]], 1)
    for part in data.batches(lengths, size=256, rank=run.rank, world=run.world):
        batch = remove_modality(data.collate(dataset, texts[part], pictures[part]), run.args.ablate).to(run.device)
        with run.autocast():
            scores[part] = match_logits(run.model, run.model.encode(batch).pooled, head)
    return common.all_reduce_sum(scores)


def two_stage(run, dataset, texts, pictures, k, head="itm"):
    """Recalls of retrieval in two stages: dot products rank everything, then matching scores rank the best k anew.

    texts: examples (n,); pictures: store rows (m,), each text's own among them. Every text's k best pictures and every
    picture's k best texts are scored together, once where both want a pair; the others stay behind, by dot product.
    """
    dots = dot_products(run, dataset, texts, pictures)  # (n, m)
    nothing = torch.zeros_like(dots, dtype=torch.bool)
    best = [nothing.scatter(axis, dots.topk(min(k, dots.shape[axis]), axis)[1], True) for axis in (0, 1)]
    near = {"text_to_image": best[1], "image_to_text": best[0]}  # (n, m) bool, True = among the best k
    rows, columns = (near["text_to_image"] | near["image_to_text"]).numpy().nonzero()  # (P,) each
    fine = torch.zeros_like(dots)
    fine[rows, columns] = score_pairs(run, dataset, texts[rows], pictures[columns], head)
    fine = fine - fine.min() + 2.0  # above every cosine
    place = {picture: i for i, picture in enumerate(pictures.tolist())}
    truth = torch.tensor([place[picture] for picture in dataset.image[texts].tolist()])
    recalls = {}
    for way, mask in near.items():
        found = recall_at(torch.where(mask, fine, dots), truth)
        recalls |= {name: value for name, value in found.items() if name.startswith(way)}
    return recalls


def compare_stages(run, dataset, head, most=1000, measured=300):
    """--rerank: recall and seconds of the full matrix of matching scores, of dot products, and of the two stages, as
    result.json has them and as lines to print.

    Among --pool pictures with a caption each; scenes are drawn until there are enough. Beyond `most` of them the full
    matrix is not computed: its time is extrapolated from `measured` x `measured` pairs, and so called.
    """
    args = run.args
    if dataset.name == "scenes" and args.pool > len(np.unique(dataset.image)):
        dataset = scenes.scenes(dataset.split, "caption", count=args.pool * 5 // 4).encode(run.tokenizer, max_length=60)
    texts = first_captions(dataset)[: args.pool]
    pictures, n, result = dataset.image[texts], len(texts), {}
    whole = n <= most
    run.model.eval()
    with torch.inference_mode():
        dot_products(run, dataset, texts[:64], pictures[:64])  # the first pass of a process is slower
        start = time.perf_counter()
        recalls = recall_of_all_pairs(run, dataset, texts if whole else texts[:measured], head)
        seconds = (time.perf_counter() - start) * (1.0 if whole else (n / measured) ** 2)
        rows = {"full": (recalls if whole else {}, seconds)}
        start = time.perf_counter()
        recalls = recall_at(dot_products(run, dataset, texts, pictures), torch.arange(n))
        rows["dot"] = recalls, time.perf_counter() - start
        start = time.perf_counter()
        recalls = two_stage(run, dataset, texts, pictures, args.rerank, head)
        rows["two_stage"] = recalls, time.perf_counter() - start
    lines = [f"\n{args.model}, retrieval among {n} x {n}, best {args.rerank} re-ranked"]
    for name, (recalls, seconds) in rows.items():
        how = "" if whole or name != "full" else f" (extrapolated from {measured} x {measured})"
        shown = "  ".join(f"{key} {100 * value:.1f}%" for key, value in recalls.items())
        lines.append(f"  {name:10s} {seconds:9.1f} s{how}  {shown}".rstrip())
        result |= {f"{name}_{key}": round(value, 5) for key, value in recalls.items()}
        result[f"{name}_seconds"] = round(seconds, 2)
    return {"pool": n, "rerank": args.rerank, "full_extrapolated": not whole, **result}, "\n".join(lines)


# ---- tables -----------------------------------------------------------------------------------------------------------


PLAIN = ("_loss", "perplexity")  # metrics that are no share of anything


def percent(share):
    """0.123 -> 12.3%."""
    return f"{100 * share:.1f}%"


def format_metrics(title, metrics, chance):
    """Metrics in a column, chance beside each."""
    lines = [f"\n{title}", f"  {'':24s} {'':>8s} {'chance':>8s}"]
    for name, value in metrics.items():
        shown = f"{value:.4f}" if name.endswith(PLAIN) else percent(value)
        lines.append(f"  {name:24s} {shown:>8s} {percent(chance[name]) if name in chance else '':>8s}".rstrip())
    return "\n".join(lines)


def compare_models(results, out):
    """Mean and spread over seeds of each metric, a column a model; "tie" where the spread covers the difference.
    Printed, and written as comparison.json and comparison.md."""
    models = list(dict.fromkeys(r["model"] for r in results))
    shares = dict.fromkeys(n for r in results for n in r["chance"] if "accuracy_" not in n)
    rows = {}
    for name in ["parameters", "examples_per_second", *shares]:
        values = {m: [r[name] for r in results if r["model"] == m and name in r] for m in models}
        rows[name] = {
            m: {"mean": float(np.mean(v)), "spread": float(np.std(v, ddof=1)) if len(v) > 1 else 0.0}
            for m, v in values.items()
            if v
        }
    lines = [f"| | {' | '.join(models)} | best | chance |", "|---" * (len(models) + 3) + "|"]
    for name, row in rows.items():
        chance = percent(np.mean([r["chance"][name] for r in results if name in r["chance"]])) if name in shares else ""
        best = best_model(row) if name in shares else ""
        lines.append(f"| {name} | {' | '.join(format_cell(name, row.get(m)) for m in models)} | {best} | {chance} |")
    text = "\n".join(lines) + "\n"
    common.print0("\n" + text)
    if common.rank_and_world()[0] == 0:
        data.write_text(out / "comparison.json", json.dumps({"runs": results, "table": rows}, indent=1) + "\n")
        data.write_text(out / "comparison.md", text)


def format_cell(name, entry):
    """mean ± spread, shares in percent."""
    if entry is None:
        return ""
    if name in ("parameters", "examples_per_second"):
        return f"{entry['mean']:,.0f}"
    return f"{100 * entry['mean']:.1f} ± {100 * entry['spread']:.1f}"


def best_model(row):
    """The best model, or "tie" where its lead over the second is no larger than their two spreads together."""
    if len(row) < 2:
        return ""
    (first, a), (_, b) = sorted(row.items(), key=lambda item: -item[1]["mean"])[:2]
    return "tie" if a["mean"] - b["mean"] <= a["spread"] + b["spread"] else first


# ---- the table of tasks -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """One row of the table of tasks: what a line of data must hold for it, and what examples the line becomes."""

    name: str
    examples: Callable  # record -> list of data.Example
    needs: tuple = ()  # keys that a line must have besides text and a picture
    pictures: int = 1  # pictures of a line
    check: Callable = lambda record: None  # record -> None, or a sentence that says what is wrong with it


def caption_examples(record):
    return [data.Example(record["id"], record.get("kind", "caption"), [(record["text"], 0)])]


def pretraining_examples(record):
    """A caption, or a question if the line has an answer."""
    answer = record.get("answer")
    kind = record.get("kind", "question" if answer else "caption")
    return [data.Example(record["id"], kind, [(record["text"], 0)], answer)]


def vqa_examples(record):
    return [data.Example(record["id"], record.get("kind", "vqa"), [(record["text"], 0)], record["answer"])]


def ve_examples(record):
    return [data.Example(record["id"], record.get("kind", "ve"), [(record["text"], 0)], record["answer"])]


def check_ve(record):
    if not set(record["answer"]) <= set(data.ENTAILMENT):
        return f"'answer' is {str(record['answer'])[:60]}; task ve takes {', '.join(data.ENTAILMENT)}"
    return None


def nlvr2_examples(record):
    """One example of two rows: the statement beside the left picture, and beside the right one."""
    rows = [(record["text"], 0), (record["text"], 1)]
    return [data.Example(record["id"], record.get("kind", "nlvr2"), rows, target=int(record["label"]))]


def check_nlvr2(record):
    if type(record["label"]) is not bool:
        return f"'label' is {record['label']}; write true or false"
    return None


def vcr_examples(record):
    """One row a choice. The answer: (question, choice). The reason, if the line has any: (question, right answer, reason)."""
    right = record["label"]
    rows = [((record["text"], choice), 0) for choice in record["choices"]]
    examples = [data.Example(record["id"], "answer", rows, target=right)]
    if "reasons" in record:
        rows = [((record["text"], record["choices"][right], reason), 0) for reason in record["reasons"]]
        examples.append(data.Example(record["id"], "reason", rows, target=record["reason"]))
    return examples


def check_vcr(record):
    last = len(record["choices"]) - 1
    if type(record["label"]) is not int or not 0 <= record["label"] <= last:
        return f"'label' is {record['label']}; write the index of the right choice, 0 to {last}"
    if "reasons" in record and not 0 <= record.get("reason", -1) < len(record["reasons"]):
        return "'reasons' needs 'reason', the index of the right one, from 0"
    return None


def refer_examples(record):
    return [data.Example(record["id"], record.get("kind", "refer"), [(record["text"], 0)], target=record["target"])]


TASKS = {
    task.name: task
    for task in (
        Task("pretrain", pretraining_examples),
        Task("vqa", vqa_examples, needs=("answer",)),
        Task("ve", ve_examples, needs=("answer",), check=check_ve),
        Task("nlvr2", nlvr2_examples, needs=("label",), pictures=2, check=check_nlvr2),
        Task("vcr", vcr_examples, needs=("choices", "label"), check=check_vcr),
        Task("retrieval", caption_examples),
        Task("refer", refer_examples, needs=("target",)),
        Task("caption", caption_examples),
    )
}
