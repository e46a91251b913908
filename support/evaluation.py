"""evaluation.py: how well a model does: accuracies, retrieval, captions, and tables of them.

1. Accuracy of the best choice, by kind of question.
2. Pretraining: losses and hits added up over batches and processes.
3. Retrieval: recall; the full matrix of texts and pictures; dot products of vectors; two stages.
4. Captions: beam search, BLEU and CIDEr-D.
5. Answers as predict.py shows them.
6. Metrics as text: metrics beside chance, and models beside each other with the spread over seeds.

Which metrics a task has, and on which examples, is in tasks.py. Accuracies, recalls and BLEU are in 0..1, CIDEr-D in
0..10. `run` is train.Run, as in tasks.py. Every process computes its share; the sums are then added over all processes.
Letters: B rows of a batch, T text positions, N regions, C width, V vocabulary, E width of the unit vectors of itc.
"""

import json
import math
import re
import time
import unicodedata
from collections import Counter
from dataclasses import dataclass, field, replace

import numpy as np
import torch
import torch.distributed as dist

import common
import data

BATCH = 256  # examples of a forward pass of evaluation, whatever --batch-size

# ---- accuracy --------------------------------------------------------------------------------------------------------


def accuracy_by_kind(hits, guess, kinds):
    """({"accuracy": mean of hits, "accuracy_KIND": ...}, the same of guess): means over all examples, and over each
    kind if there are several. hits, guess (examples,): scores of the model and of guessing. kinds: a word each."""
    kinds = np.array(kinds)
    groups = {"accuracy": np.ones(len(kinds), bool)}
    if len(set(kinds)) > 1:
        for kind in sorted(set(kinds)):
            groups[f"accuracy_{kind}"] = kinds == kind
    metrics = {name: hits[group].mean() for name, group in groups.items()}
    chance = {name: guess[group].mean() for name, group in groups.items()}
    return metrics, chance


def top_choice_accuracy(logits, right):
    """Whether the choice with the highest logit is right: logits (B, K), right (B, K) bool -> (B,) in 0..1.

    If several choices tie for the highest logit, as they do without picture or words: the share of these that is right.
    """
    best = logits == logits.amax(1, keepdim=True)  # (B, K)
    return (best & right).sum(1) / best.sum(1).clamp(min=1)


def iou(a, b):
    """Intersection over union of boxes x1, y1, x2, y2: |a and b| / (|a| + |b| - |a and b|).

    a, b (..., 4), broadcast; returns (...), 0 for two empty boxes. A prediction counts as right above 0.5.
    """
    overlap = torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])  # (..., 2): width, height
    intersection = overlap.clamp(min=0).prod(-1)
    area_a = (a[..., 2:] - a[..., :2]).prod(-1)  # (..., 2) -> (...)
    area_b = (b[..., 2:] - b[..., :2]).prod(-1)
    union = area_a + area_b - intersection
    return torch.where(union > 0, intersection / union, 0.0)


def gather_objects(run, value):
    """[value of process 0, value of process 1, ...]"""
    if not dist.is_initialized():
        return [value]
    values = [None] * run.world
    dist.all_gather_object(values, value)
    return values


# ---- pretraining ----------------------------------------------------------------------------------------------------


@dataclass
class ObjectiveSums:
    """What an objective's mean loss and accuracy are computed from, added up over batches and processes."""

    loss: float = 0.0  # sum over items
    items: int = 0
    hits: int = 0  # items whose label has the highest logit
    labels: Counter = field(default_factory=Counter)  # label -> items that have it

    def add(self, loss, items, hits, labels):
        self.loss += loss
        self.items += items
        self.hits += hits
        self.labels.update(labels)


def add_batch(sums, objective, batch, loss, logits):
    """Adds a batch, its mean loss and its logits to ObjectiveSums."""
    items = common.count_items(objective.mean_over, batch)
    hits = 0
    labels = []
    if objective.labels:
        labels = objective.labels(batch, logits)  # (M,) int64, -1 = no label
        known = labels >= 0
        labels = labels[known]
        hits = int((logits[known].argmax(-1) == labels).sum())
        labels = labels.tolist()
    sums.add(loss * items, items, hits, labels)


def pretraining_score(metrics):
    """`tasks.best_score` of pretraining: the mean accuracy, or minus the sum of the losses where there is none."""
    accuracies = [float(value) for name, value in metrics.items() if name.endswith("_accuracy")]
    losses = [float(value) for name, value in metrics.items() if name.endswith("_loss")]
    if accuracies:
        return float(np.mean(accuracies)), f"mean of {len(accuracies)} accuracies"
    if losses:
        return -sum(losses), "minus the sum of the losses"
    return -math.inf, "nothing"  # the last weights then count as the best


# ---- retrieval: recall -----------------------------------------------------------------------------------------------


def recall_at(scores, truth, ks=(1, 5, 10)):
    """Recall at k: the expected share of queries with a true match among the first k candidates, in both directions.

    Candidates are ranked by score, ties in random order; the expectation is over that order. So equal scores for all
    get the recall of guessing. NaN scores rank last.
    scores (texts, pictures); truth (texts,), the column of each text's picture. A picture may have several texts; one
    of them among the first k is enough. Pictures without a text are candidates only.
    Returns {"text_to_image_r1": .., ..., "image_to_text_r1": .., ...}.
    """
    scores = torch.where(scores.isnan(), -math.inf, scores)
    matches = truth[:, None] == torch.arange(scores.shape[1])  # (texts, pictures) bool, True = they belong together
    has_text = matches.any(0)  # (pictures,)
    recalls = {}
    for k in ks:
        recalls[f"text_to_image_r{k}"] = expected_hits(scores, matches, k).mean().item()
    for k in ks:
        recalls[f"image_to_text_r{k}"] = expected_hits(scores.T[has_text], matches.T[has_text], k).mean().item()
    return recalls


def expected_hits(scores, matches, k):
    """Probability that a true match is among the first k candidates, ties in random order: (Q,) float64.

        1 - C(f, j) / C(f + t, j),   j = max(0, min(k - b, f + t)),   C the binomial coefficient

    b: candidates above the best true match. t true and f false candidates have its score; j of these are within k.
    scores, matches (Q, candidates), matches bool, True = a true match, at least one in a row.
    """
    best = scores.masked_fill(~matches, -math.inf).amax(1, keepdim=True)  # (Q, 1)
    tied = scores == best
    above = (scores > best).sum(1)  # (Q,)
    num_false = (tied & ~matches).sum(1)
    num_tied = tied.sum(1)
    missed = torch.ones(len(scores), dtype=torch.float64)  # probability of no true match so far
    for place in range(k):
        still_missed = missed * (num_false - place).clamp(min=0) / (num_tied - place).clamp(min=1)
        missed = torch.where(above + place < k, still_missed, missed)
    return 1 - missed


def recall_chance(recalls, pictures):
    """Recall of guessing, for each name of `recalls`: the recall when all scores are equal. With one text a picture it
    is k / candidates. pictures (texts,): the store row of each text's picture."""
    rows, truth = np.unique(pictures, return_inverse=True)
    guess = recall_at(torch.zeros(len(truth), len(rows)), torch.from_numpy(truth))
    return {name: guess[name.removeprefix("itc_")] for name in recalls}


def caption_examples(dataset):
    """Indices of the examples that are captions, which have no answer; of all examples if none is."""
    captions = np.flatnonzero([len(answer) == 0 for answer in dataset.answer])
    return captions if len(captions) else np.arange(len(dataset))


def first_captions(dataset):
    """The first caption of each picture: (pictures,) indices of examples, in the order of the pictures' store rows."""
    captions = caption_examples(dataset)
    _, first = np.unique(dataset.image[captions], return_index=True)
    return captions[first]


def retrieval_captions(run, dataset, pool):
    """Indices of the captions of the first `pool` pictures: all of them, as in published results; with --captions
    first, and on val, only the first of each picture."""
    first = first_captions(dataset)[:pool]
    if run.args.captions == "first" or dataset.split == "val":
        return first
    captions = caption_examples(dataset)
    return captions[np.isin(dataset.image[captions], dataset.image[first])]


# ---- retrieval: scores of pairs --------------------------------------------------------------------------------------


def match_logits(model, pooled, head):
    """How well pairs match: the log odds of head "itm", or the logit of head "rank". (rows, C) -> (rows,) float64

    The heads are Float32Linear: in bfloat16 most pairs would be tied.
    """
    logits = model.heads[head](pooled)  # (rows, 2) or (rows, 1)
    logits = logits.cpu().double()  # on the CPU: Apple's GPUs have no float64
    if logits.shape[1] == 2:
        return logits[:, 1] - logits[:, 0]
    return logits[:, 0]


def recall_of_all_pairs(run, dataset, texts, head):
    """Recall at 1, 5 and 10 by the full matrix: `match_logits` of each of the examples `texts` with each of their
    pictures. The model's `unimodal` part is computed once for each text and picture."""
    pictures, truth = np.unique(dataset.image[texts], return_inverse=True)
    n = len(texts)
    m = len(pictures)
    scores = torch.zeros(n, m, dtype=torch.float64)
    batch = collate_pairs(run, dataset, np.full(m, texts[0]), pictures)  # the texts are replaced below
    with run.autocast():
        _, region_states = run.model.unimodal(batch)
        for part in data.batches(np.diff(dataset.offsets)[texts], size=BATCH, rank=run.rank, world=run.world):
            captions = collate_pairs(run, dataset, texts[part], np.full(len(part), pictures[0]))
            text_states, _ = run.model.unimodal(captions)
            for row, i in enumerate(part.tolist()):
                pairs = replace(
                    batch,
                    text=captions.text[row].expand(m, -1),
                    text_mask=captions.text_mask[row].expand(m, -1),
                    segments=captions.segments[row].expand(m, -1),
                )
                given = text_states[row].expand(m, -1, -1), region_states
                scores[i] = match_logits(run.model, run.model.encode(pairs, given=given).pooled, head)
    return recall_at(common.all_reduce_sum(scores), torch.from_numpy(truth))


def collate_pairs(run, dataset, texts, pictures):
    """Batch of examples `texts` beside store rows `pictures`, (B,) each, on the device, without what --ablate names."""
    batch = data.collate(dataset, texts, pictures)
    return data.remove_modality(batch, run.args.ablate).to(run.device)


def score_pairs(run, dataset, texts, pictures, head):
    """`match_logits` of text i with picture i, (P,). texts: examples, pictures: store rows, (P,) each."""
    scores = torch.zeros(len(texts), dtype=torch.float64)
    lengths = np.stack([np.diff(dataset.offsets)[texts], np.diff(dataset.store.offsets)[pictures]], 1)  # (P, 2)
    for part in data.batches(lengths, size=BATCH, rank=run.rank, world=run.world):
        batch = collate_pairs(run, dataset, texts[part], pictures[part])
        with run.autocast():
            scores[part] = match_logits(run.model, run.model.encode(batch).pooled, head)
    return common.all_reduce_sum(scores)


def sample_negative_pairs(run, dataset, index, rng):
    """Pairs for retrieval: examples of the texts and store rows of the pictures, (B, 1 + K) each. Column 0 is the true
    pair. Columns 1 to K are mismatched: by the model's K NEGATIVES they get another picture or another text.

    In the first half of the steps each mismatched pair is drawn at random. In the second half --mine candidates are
    drawn, and the one with the highest logit is kept. UNITER (appendix A.2) adds two of the best 20 of 128 to random
    ones; ViLBERT (3.2) adds one of the 100 pictures nearest by features. A text that equals one of the picture's own
    texts, ignoring case, is no mismatch. UserError if a picture or a text has none.
    """
    kinds = run.paper.NEGATIVES
    second_half = 2 * run.progress["step"] >= run.args.steps
    mine = run.args.mine if second_half else 1
    true = np.broadcast_to(index[:, None, None], (len(index), len(kinds), mine))  # (B, K, mine) examples
    other = true.copy()
    swap_picture = np.array([kind == "image" for kind in kinds])[None, :, None]  # (1, K, 1); False: the text is swapped
    again = np.ones(true.shape, bool)  # True = not mismatched yet
    for _ in range(100):
        other[again] = rng.integers(len(dataset), size=again.sum())
        texts = np.where(swap_picture, true, other)
        images = dataset.image[np.where(swap_picture, other, true)]
        again = dataset.belong_together(texts, images)
        if not again.any():
            break
    for place in map(tuple, np.argwhere(again)):  # nearly all texts fit this picture, or all pictures this text
        everything = np.arange(len(dataset))
        fixed = np.full_like(everything, true[place])
        if swap_picture[0, place[1], 0]:
            wrong = ~dataset.belong_together(fixed, dataset.image[everything])
            images[place] = dataset.image[draw_one(wrong, rng, "a text of the data fits all pictures")]
        else:
            wrong = ~dataset.belong_together(everything, dataset.image[fixed])
            texts[place] = draw_one(wrong, rng, "all texts of the data fit one picture")
    best = np.zeros((*texts.shape[:2], 1), np.int64)  # (B, K, 1)
    if mine > 1:
        best = hardest_pairs(run, dataset, texts, images)
    texts = np.take_along_axis(texts, best, 2)[:, :, 0]  # (B, K, mine) -> (B, K)
    images = np.take_along_axis(images, best, 2)[:, :, 0]
    return np.column_stack([index, texts]), np.column_stack([dataset.image[index], images])


def draw_one(wrong, rng, problem):
    """One of the examples that are True in `wrong`, (examples,) bool. UserError, which names the problem, if there is none."""
    if not wrong.any():
        raise common.UserError(f"retrieval needs pictures with different texts: {problem}")
    return rng.choice(np.flatnonzero(wrong))


def hardest_pairs(run, dataset, texts, images):
    """Index of the pair with the highest logit, the model in eval mode: (B, K, mine) pairs -> (B, K, 1) int64."""
    batch = collate_pairs(run, dataset, texts.ravel(), images.ravel())
    run.model.eval()
    with torch.no_grad(), run.autocast():
        pooled = run.model.encode(batch).pooled  # (B*K*mine, C)
        logits = match_logits(run.model, pooled, "rank")  # (B*K*mine,)
    run.model.train()
    return logits.view(texts.shape).argmax(2, keepdim=True).numpy()


@torch.inference_mode()
def text_vectors(run, batch):
    """A vector of each text alone: itc's unit vector (B, E). Without the head "itc": the last state of [CLS] (B, C)."""
    with run.autocast():
        states = run.model.encode(batch, regions=False).text  # (B, T, C)
    if "itc" in run.model.heads:
        return run.model.heads["itc"].text(states, batch.text_mask).cpu()
    return states[:, 0].cpu()


@torch.inference_mode()
def picture_vectors(run, batch):
    """A vector of each picture alone: itc's unit vector (B, E). Without the head "itc": the mean of the regions' last
    states (B, C)."""
    with run.autocast():
        states = run.model.encode(batch, text=False).regions  # (B, N, C)
    if "itc" in run.model.heads:
        return run.model.heads["itc"].image(states, batch.region_mask).cpu()
    return common.masked_mean(states, batch.region_mask).cpu()


def all_text_vectors(run, dataset, texts):
    """Yields (positions in `texts`, `text_vectors`) of this process's share of the examples `texts`."""
    for part in data.batches(np.diff(dataset.offsets)[texts], size=BATCH, rank=run.rank, world=run.world):
        any_picture = np.full(len(part), dataset.image[texts[0]])  # not encoded
        yield part, text_vectors(run, collate_pairs(run, dataset, texts[part], any_picture))


def all_picture_vectors(run, dataset, pictures):
    """Yields (positions in `pictures`, `picture_vectors`) of this process's share of the store rows `pictures`."""
    for part in data.batches(np.diff(dataset.store.offsets)[pictures], size=BATCH, rank=run.rank, world=run.world):
        any_text = np.zeros(len(part), np.int64)  # not encoded
        yield part, picture_vectors(run, collate_pairs(run, dataset, any_text, pictures[part]))


def dot_products(run, dataset, texts, pictures):
    """Cosines (texts, pictures) of the unit vectors of itc: examples `texts`, store rows `pictures`. Each text and each
    picture is encoded once."""
    width = run.model.heads["itc"].project_text.out_features  # E
    text_emb = torch.zeros(len(texts), width, dtype=torch.float64)
    visual_emb = torch.zeros(len(pictures), width, dtype=torch.float64)
    for part, vectors in all_text_vectors(run, dataset, texts):
        text_emb[part] = vectors.double()
    for part, vectors in all_picture_vectors(run, dataset, pictures):
        visual_emb[part] = vectors.double()
    text_emb = common.all_reduce_sum(text_emb)
    visual_emb = common.all_reduce_sum(visual_emb)
    return text_emb @ visual_emb.T  # (texts, E) @ (E, pictures)


def recall_of_dot_products(run, dataset, texts):
    """Recall at 1, 5 and 10 by dot products alone, of the examples `texts` and their pictures."""
    pictures, truth = np.unique(dataset.image[texts], return_inverse=True)
    dots = dot_products(run, dataset, texts, pictures)  # (texts, pictures)
    return recall_at(dots, torch.from_numpy(truth))


def two_stage(run, dataset, texts, pictures, k, head):
    """Recalls of retrieval in two stages: dot products rank everything, then `match_logits` rank the best k again.

    texts: examples (n,); pictures: store rows (m,), sorted, with each text's own. Each text's k best pictures and each
    picture's k best texts are scored. A pair in both lists is scored once. All other pairs rank below, by dot product.
    """
    dots = dot_products(run, dataset, texts, pictures)  # (n, m)
    no_pairs = torch.zeros_like(dots, dtype=torch.bool)
    best_pictures = dots.topk(min(k, dots.shape[1]), 1).indices  # (n, k)
    best_texts = dots.topk(min(k, dots.shape[0]), 0).indices  # (k, m)
    reranked = {  # (n, m) bool, True = among the best k
        "text_to_image": no_pairs.scatter(1, best_pictures, True),
        "image_to_text": no_pairs.scatter(0, best_texts, True),
    }
    rows, columns = (reranked["text_to_image"] | reranked["image_to_text"]).numpy().nonzero()  # (P,) each
    logits = torch.zeros_like(dots)
    logits[rows, columns] = score_pairs(run, dataset, texts[rows], pictures[columns], head)
    logits = logits - logits.min() + 2.0  # above every cosine
    truth = torch.from_numpy(np.searchsorted(pictures, dataset.image[texts]))  # (n,) columns
    recalls = {}
    for direction, mask in reranked.items():
        for name, value in recall_at(torch.where(mask, logits, dots), truth).items():
            if name.startswith(direction):
                recalls[name] = value
    return recalls


LARGE_MATRIX = 1_000_000  # pairs; scoring more takes too long


def retrieval_recalls(run, dataset, texts, head):
    """Recalls of the examples `texts` and their pictures: by the full matrix; with --rerank and a large matrix, in two
    stages."""
    pictures = np.unique(dataset.image[texts])
    if run.args.rerank and len(texts) * len(pictures) > LARGE_MATRIX:
        return two_stage(run, dataset, texts, pictures, run.args.rerank, head)
    return recall_of_all_pairs(run, dataset, texts, head)


def compare_stages(run, dataset, head, measured=200):
    """--rerank: recalls and seconds of the full matrix, of dot products alone, and of two stages. Returns them as
    result.json has them, and a text to print.

    The texts are `retrieval_captions` of at most --pool pictures. A full matrix of more than LARGE_MATRIX pairs
    is not computed: its time is extrapolated from at most `measured` x `measured` pairs, and the result says so.
    """
    texts = retrieval_captions(run, dataset, run.args.pool)
    pictures = np.unique(dataset.image[texts])
    pairs = len(texts) * len(pictures)
    extrapolated = pairs > LARGE_MATRIX
    sample = texts
    if extrapolated:
        sample = first_captions(dataset)[:measured]  # one a picture: the matrix is square
    run.model.eval()
    with torch.inference_mode():
        dot_products(run, dataset, texts[:64], pictures[:64])  # the first pass of a process is slower
        start = time.perf_counter()
        full = recall_of_all_pairs(run, dataset, sample, head)
        full_seconds = time.perf_counter() - start
        if extrapolated:
            full = {}
            full_seconds *= pairs / len(sample) ** 2
        start = time.perf_counter()
        dot = recall_of_dot_products(run, dataset, texts)
        dot_seconds = time.perf_counter() - start
        start = time.perf_counter()
        two = two_stage(run, dataset, texts, pictures, run.args.rerank, head)
        two_seconds = time.perf_counter() - start
    sizes = f"{len(pictures)} pictures and {len(texts)} captions"
    result = {"pool": len(pictures), "captions": len(texts), "rerank": run.args.rerank}
    result["full_extrapolated"] = extrapolated
    lines = [f"\n{run.args.model}, retrieval among {sizes}, best {run.args.rerank} re-ranked"]
    stages = {"full": (full, full_seconds), "dot": (dot, dot_seconds), "two_stage": (two, two_seconds)}
    for name, (recalls, seconds) in stages.items():
        shown = [f"  {name:10s} {seconds:9.1f} s"]
        if extrapolated and name == "full":
            shown.append(f" (extrapolated from {len(sample)} x {len(sample)})")
        for key, value in recalls.items():
            shown.append(f"  {key} {percent(value)}")
            result[f"{name}_{key}"] = round(value, 5)
        result[f"{name}_seconds"] = round(seconds, 2)
        lines.append("".join(shown))
    chance = recall_chance(dot, dataset.image[texts])
    shown = [f"{key} {percent(value)}" for key, value in chance.items()]
    lines.append(f"  {'chance':22s}  {'  '.join(shown)}")
    return result, "\n".join(lines)


# ---- captions --------------------------------------------------------------------------------------------------------

IDEOGRAPHS = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002fa1f"  # between which tokenizers split


def generate(model, batch, first, last, beams, most):
    """Captions of a batch's pictures, word piece by word piece, by beam search; beams=1 is greedy search.

    Each step extends the `beams` best texts by every piece and keeps the `beams` best results. Texts are compared by
    the mean log probability of their pieces, the end included; the sum would favour short texts.

    model.decode(batch, cache): hidden states of the new pieces (B, T, C); model.word_logits(states): logits (..., V).
    batch: its text is not read. first, last: ids of the pieces that begin and end a text. Returns for each picture its
    texts, the best first: [(piece ids without first and last, at most `most`; mean log probability), ...].
    """
    B = len(batch.features)
    row = torch.arange(B, device=batch.features.device)
    batch = replace(batch, ids=None).select(row.repeat_interleave(beams))
    text = torch.full((B * beams, 1), first, device=row.device)
    totals = torch.full((B, beams), -math.inf, device=row.device)  # log probability of each text
    totals[:, 0] = 0.0  # all beams begin alike: only one of them counts
    lengths = torch.zeros_like(totals)  # pieces of each text
    ended = torch.zeros(B * beams, dtype=torch.bool, device=row.device)
    cache = {}
    for _ in range(most):
        batch.text = text[:, -1:]  # (B*beams, 1): the cache holds what came before
        batch.text_mask = torch.ones_like(batch.text, dtype=torch.bool)
        batch.segments = torch.zeros_like(batch.text)
        states = model.decode(batch, cache)[:, -1]  # (B*beams, 1, C) -> (B*beams, C)
        log_probs = model.word_logits(states).float().log_softmax(-1)  # (B*beams, V)
        log_probs[ended] = -math.inf
        log_probs[ended, last] = 0.0
        V = log_probs.shape[-1]
        longer = totals[:, :, None] + log_probs.view(B, beams, V)  # (B, beams, 1) + (B, beams, V)
        lengths = lengths + ~ended.view(B, beams)
        means = longer / lengths[:, :, None]  # (B, beams, V)
        best = means.flatten(1).topk(beams).indices  # (B, beams*V) -> (B, beams)
        totals = longer.flatten(1).gather(1, best)
        lengths = lengths.gather(1, best // V)
        parent = (row[:, None] * beams + best // V).flatten()  # (B, beams) -> (B*beams,)
        piece = (best % V).flatten()  # (B*beams,)
        text = torch.cat([text[parent], piece[:, None]], 1)  # (B*beams, T) -> (B*beams, T + 1)
        ended = ended[parent] | (piece == last)
        for name, value in cache.items():
            if isinstance(value, tuple):  # keys and values; what else models keep is equal for all beams of a picture
                cache[name] = tuple(x[parent] for x in value)
        if ended.all():
            break
    captions = []
    texts = text.view(B, beams, -1)[:, :, 1:].tolist()  # topk sorts: beam 0 is the best
    for of_picture, means in zip(texts, (totals / lengths).tolist(), strict=True):
        captions.append([])
        for pieces, mean in zip(of_picture, means, strict=True):
            if mean != -math.inf:  # there may be fewer texts than beams; NaN, of a broken model, stays
                end = pieces.index(last) if last in pieces else len(pieces)
                captions[-1].append((pieces[:end], mean))
    return captions


def ngrams(words, n):
    """Counter of the n-grams of a list of words."""
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def bleu(candidates, references, longest=4):
    """Corpus BLEU (Papineni 2002, section 2.3), in 0..1, without smoothing.

        BLEU = min(1, exp(1 - r / c)) * (p_1 p_2 ... p_longest)^(1 / longest)

    p_n: the share of the candidates' n-grams that a reference has too. An n-gram counts at most as often as in the
    reference that has it most often.   c: words of all candidates.   r: words of the references nearest in length, one
    for each candidate; of two equally near, the shorter.
    candidates: a list of lists of words; references: for each candidate a list of such lists, at least one. Returns 0
    if some p_n is 0.
    """
    matches = [0] * longest
    totals = [0] * longest
    candidate_length = 0
    reference_length = 0
    for words, texts in zip(candidates, references, strict=True):
        candidate_length += len(words)
        lengths = [len(text) for text in texts]
        reference_length += min(lengths, key=lambda length: (abs(length - len(words)), length))
        for n in range(1, longest + 1):
            allowed = Counter()
            for text in texts:
                allowed |= ngrams(text, n)  # the larger count of each n-gram
            found = ngrams(words, n)
            matches[n - 1] += (found & allowed).total()  # the smaller count of each n-gram
            totals[n - 1] += found.total()
    if min(matches) == 0:
        return 0.0
    log_precisions = [math.log(m / t) for m, t in zip(matches, totals, strict=True)]
    precision = math.exp(sum(log_precisions) / longest)
    return precision * min(1.0, math.exp(1 - reference_length / candidate_length))


def words_of(text):
    """The words of a caption as BLEU and CIDEr-D count them: lower case, punctuation and symbols become blanks. So
    "T-shirts." has the words t and shirts. Each Chinese character is a word, as it is for the tokenizer."""
    letters = []
    for letter in text.lower():
        is_mark = unicodedata.category(letter)[0] in "PS"
        letters.append(" " if is_mark else letter)
    return re.sub(f"([{IDEOGRAPHS}])", r" \1 ", "".join(letters)).split()


def join_ideographs(text):
    """A decoded text without the blanks that decoding puts between Chinese characters."""
    return re.sub(f"(?<=[{IDEOGRAPHS}]) (?=[{IDEOGRAPHS}])", "", text)


def pictures_with_ngrams(references, longest=4):
    """Counter: n-gram, n = 1 to `longest` -> pictures that have it in a reference. references: of each picture a list of
    lists of words."""
    pictures_with = Counter()
    for texts in references:
        found = set()
        for words in texts:
            for n in range(1, longest + 1):
                found.update(ngrams(words, n))
        pictures_with.update(found)
    return pictures_with


def tf_idf(words, n, pictures_with, pictures):
    """({n-gram: weight}, length of the vector of these weights) of a list of words. Weight: the n-gram's count times
    log(pictures / pictures that have it in a reference)."""
    weights = {}
    for ngram, count in ngrams(words, n).items():
        weights[ngram] = count * math.log(pictures / max(1, pictures_with[ngram]))
    return weights, math.sqrt(sum(weight**2 for weight in weights.values()))


def caption_metrics(generated, references):
    """BLEU-1 to BLEU-4 and CIDEr-D of generated captions, and of chance: another picture's first reference. Two dicts.

    generated: {picture: list of words}; references: {picture: list of such lists}.
    """
    pictures = sorted(generated)
    truth = [references[picture] for picture in pictures]
    candidates = [generated[picture] for picture in pictures]
    neighbours = [references[picture][0] for picture in [*pictures[1:], pictures[0]]]
    metrics = {}
    chance = {}
    for n in (1, 2, 3, 4):
        metrics[f"bleu{n}"] = bleu(candidates, truth, longest=n)
        chance[f"bleu{n}"] = bleu(neighbours, truth, longest=n)
    metrics["cider"] = cider_d(candidates, truth)
    chance["cider"] = cider_d(neighbours, truth)
    if len(pictures) == 1:
        chance = {}  # there is no other picture
    return metrics, chance


def cider_d(candidates, references, longest=4, sigma=6.0):
    """CIDEr-D (Vedantam 2015, section 3 and equation 4), in 0..10: cosine of the tf-idf weights of n-grams in captions
    and references. Papers print it times 100.

        CIDEr-D = mean over pictures, n and references r of
                  10 exp(-(l_c - l_r)^2 / (2 sigma^2)) min(g_c, g_r) . g_r / (|g_c| |g_r|)

    g: for each n-gram its count times log(I / pictures that have it in a reference), I pictures in all.   l: length in
    words.   candidates: a list of I lists of words; references: for each of them a list of such lists, at least one.
    """
    pictures_with = pictures_with_ngrams(references, longest)
    total = 0.0
    for words, texts in zip(candidates, references, strict=True):
        for n in range(1, longest + 1):
            candidate, candidate_norm = tf_idf(words, n, pictures_with, len(candidates))
            for text in texts:
                reference, reference_norm = tf_idf(text, n, pictures_with, len(candidates))
                product = 0.0
                for ngram, weight in candidate.items():
                    if ngram in reference:
                        product += min(weight, reference[ngram]) * reference[ngram]
                if product:
                    cosine = product / (candidate_norm * reference_norm)
                    penalty = math.exp(-((len(words) - len(text)) ** 2) / (2 * sigma**2))
                    total += 10 * penalty * cosine / len(texts)
    return total / (longest * len(candidates))


# ---- answers as a reader sees them -----------------------------------------------------------------------------------
# `Task.show` returns a dict with some of these keys:
#   answers   [[answer, probability], ...], the likeliest first; for refer an answer is a box [x1, y1, x2, y2] in pixels
#   probs     nlvr2, vcr: the probability of each choice, in their own order: false, true; as the line has them
#   match     probability that text and picture belong together; of ViLBERT's retrieval only the order means something
#   masked    the text with one word masked, which `answers` fill in
#   caption   the generated text
#   truth     the right answer, if the line has one


def rank_answers(names, probs, top):
    """[[name, probability], ...], the `top` likeliest first. probs (K,), K >= the number of names."""
    best = probs[: len(names)].topk(min(top, len(names)))
    ranked = []
    for i, p in zip(best.indices.tolist(), best.values.tolist(), strict=True):
        ranked.append([names[i], round(p, 5)])
    return ranked


def show_answers(names, probs, dataset, i, top):
    """Of vqa and ve: the likeliest answers, and the one with the highest score in the data."""
    shown = {"answers": rank_answers(names, probs, top)}
    truth = dataset.answer[i]
    if truth:
        shown["truth"] = max(truth, key=truth.get)
    return shown


def show_choices(names, probs, dataset, i, top):
    """Of nlvr2 and vcr: the likeliest choices, all probabilities, and the right choice."""
    shown = {"answers": rank_answers(names, probs, top), "probs": [round(p, 5) for p in probs.tolist()]}
    if dataset.target is not None and dataset.target[i] >= 0:
        shown["truth"] = names[int(dataset.target[i])]
    return shown


def has_answers(run):
    """Whether the run's objectives have something to show of a single pair: all but those of pretraining that
    `show_pretraining` does not read."""
    return any(name in ("itm", "mlm") or not run.paper.OBJECTIVES[name].pretraining for name in run.objectives)


def show_pretraining(run, dataset, i, logits, top):
    """The match probability, the text with its masked word, the likeliest words for it, and the true one."""
    piece_of = run.tokenizer.id_to_token
    shown = {}
    if "match" in logits:
        shown["match"] = round(logits["match"].sigmoid().item(), 5)
    if "masked" in logits:
        shown["masked"] = logits["masked"]
        best = rank_answers(range(run.tokenizer.get_vocab_size()), logits["word_logits"].softmax(-1), top)
        shown["answers"] = [[piece_of(piece), prob] for piece, prob in best]
        shown["truth"] = piece_of(logits["label"])
    return shown


def show_match(run, dataset, i, logits, top):
    """Of retrieval: the sigmoid of the rank head's logit. ViLBERT trains only differences of these logits."""
    return {"match": round(logits.sigmoid().item(), 5)}


# ---- tables ----------------------------------------------------------------------------------------------------------


NO_SHARE = ("_loss", "perplexity", "cider")  # endings of the metrics that are printed as numbers, not as percent


def percent(share):
    """0.123 -> 12.3%"""
    return f"{100 * share:.1f}%"


def format_value(name, value):
    """A metric as text: a share in percent, a loss, perplexity or CIDEr-D as it is."""
    if name.endswith(NO_SHARE):
        return f"{value:.4f}" if value < 1e6 else f"{value:.2e}"
    return percent(value)


def format_metrics(title, metrics, chance):
    """Metrics in a column, chance beside each."""
    lines = [f"\n{title}", f"  {'':24s} {'':>8s} {'chance':>8s}"]
    for name, value in metrics.items():
        beside = format_value(name, chance[name]) if name in chance else ""
        lines.append(f"  {name:24s} {format_value(name, value):>8s} {beside:>8s}".rstrip())
    return "\n".join(lines)


def compare_models(results, out):
    """Prints and writes (comparison.json, comparison.md) mean and standard deviation over seeds of each metric, one
    column a model, with the best model or "tie" (see `best_model`). results: the contents of all runs' result.json."""
    models = list(dict.fromkeys(result["model"] for result in results))
    compared = []  # names of metrics that have a chance, without those of single kinds of question
    for result in results:
        for name in result["chance"]:
            if "accuracy_" not in name and name not in compared:
                compared.append(name)
    rows = {}
    lines = [f"| | {' | '.join(models)} | best | chance |", "|---" * (len(models) + 3) + "|"]
    for name in ["parameters", "examples_per_second", *compared]:
        row = {}
        for model in models:
            values = [result[name] for result in results if result["model"] == model and name in result]
            if values:
                spread = float(np.std(values, ddof=1)) if len(values) > 1 else None
                row[model] = {"mean": float(np.mean(values)), "spread": spread}
        rows[name] = row
        best = ""
        chance = ""
        if name in compared:
            best = best_model(row)
            mean = np.mean([result["chance"][name] for result in results if name in result["chance"]])
            chance = format_value(name, mean)
        cells = [format_cell(name, row.get(model)) for model in models]
        lines.append(f"| {name} | {' | '.join(cells)} | {best} | {chance} |")
    text = "\n".join(lines) + "\n"
    if len(results) == len(models):
        text += "\nOne run a model: a lead may be chance. --seeds 3 adds the spread, and which model is best.\n"
    for result in results:
        if "random_heads" in result:
            heads = ", ".join(result["random_heads"])
            text += f"\nWARNING: {result['model']}, seed {result['seed']}: untrained, at random: {heads}\n"
    common.print0("\n" + text)
    if common.rank_and_world()[0] == 0:
        data.write_text(out / "comparison.json", json.dumps({"runs": results, "table": rows}, indent=1) + "\n")
        data.write_text(out / "comparison.md", text)


def format_cell(name, entry):
    """mean ± standard deviation, shares in percent; the mean alone where a single run has no deviation."""
    if entry is None:
        return ""
    if name in ("parameters", "examples_per_second"):
        return f"{entry['mean']:,.0f}"
    factor = 100
    digits = 1
    if name.endswith(NO_SHARE):
        factor = 1
        digits = 4
    mean = f"{factor * entry['mean']:.{digits}f}"
    if entry["spread"] is None:
        return mean
    return f"{mean} ± {factor * entry['spread']:.{digits}f}"


def best_model(row):
    """The model with the highest mean, or "tie" where the gap to the second is within the two standard deviations added
    together, or "" where a model has a single run. row: {model: {"mean": .., "spread": ..}}."""
    if len(row) < 2 or any(entry["spread"] is None for entry in row.values()):
        return ""
    first, second = sorted(row, key=lambda model: -row[model]["mean"])[:2]
    gap = row[first]["mean"] - row[second]["mean"]
    return "tie" if gap <= row[first]["spread"] + row[second]["spread"] else first
