"""tasks.py: what each pretraining objective and each task needs of the data, and how it is measured.

`make_batch` gives the batch of an objective; `evaluate` gives a split's metrics and, beside each, what guessing would
get. `run` is train.Run: its model, tokenizer, options and number of processes. Read top to bottom: batches, evaluation,
retrieval, in one stage and in two.
"""

import dataclasses
import itertools
import math
import time

import numpy as np
import torch
import torch.distributed as dist

import common
import data
from data import DataError

OBJECTIVE = {"retrieval": "rank"}  # of the tasks whose objective has another name
DOWNSTREAM = {OBJECTIVE.get(task, task) for task in data.TASKS} - {"pretrain", "vqa"}
MASKED_WORDS, MASKED_REGIONS, PAIRS = {"mlm"}, {"mrfr", "mrc", "mrc_kl", "attr", "nce"}, {"itm", "wra"}

# ---- batches ----------------------------------------------------------------------------------------------------


def make_batch(run, dataset, index, names, rng, **words):
    """Examples `index` as the objectives `names` need them: pairs mismatched, words masked, regions masked.
    `words`: arguments of data.mask_words in place of the run's."""
    if names[0] in DOWNSTREAM:
        return ablate(task_batch(run, dataset, index, names[0], rng), run.o.ablate)
    images, matched = None, None
    if PAIRS & set(names):
        index, images, matched = data.mismatch(dataset, index, rng, replace=run.paper.PRETRAINING["mismatch"])
    batch = data.collate(dataset, index, images, answers=run.columns() if run.answers else None)
    if matched is not None:
        batch.matched = matched
    if "qa" in names:
        batch = data.draw_answers(batch, rng)
    if MASKED_WORDS & set(names):
        batch = data.mask_words(batch, run.tokenizer, rng, **(words or {"p": run.o.mask}))
    if MASKED_REGIONS & set(names):
        batch = data.mask_regions(batch, rng, **run.paper.PRETRAINING["region_masking"])
    return ablate(batch, run.o.ablate)


def task_batch(run, dataset, index, name, rng):
    """Examples `index` as the objective of a downstream task needs them."""
    if name == "rank":
        index, images = partners(run, dataset, index, rng)
        return data.collate(dataset, index.ravel(), images.ravel())  # (B, 1 + negatives) -> rows
    batch = data.collate(dataset, index, answers=run.columns("ve") if name == "ve" else None)
    if name == "nlvr2":
        batch.target = torch.from_numpy(dataset.target[index])
        side = torch.arange(len(batch.text))[:, None] % 2  # 0 the left picture, 1 the right one
        batch.region_types = side.expand(batch.region_mask.shape)
        if getattr(run.model.config, "nlvr2", "") == "triplet":
            batch = data.join_pictures(batch)
    elif name == "vcr":
        batch.segments = text_types(run.paper, batch.segments)
        right = torch.from_numpy(dataset.target[index])
        batch.target = torch.nn.functional.one_hot(right, dataset.group).flatten()  # (B, choices) -> (rows,)
    elif name == "refer":
        batch.target = overlaps(dataset, index, batch).argmax(1)
    elif name == "caption":
        batch = data.next_words(batch)
    return batch


def text_types(paper, segments):
    """The paper's text types of question, answer and reason, which depend on how many segments a row has: (B, T)."""
    table = torch.tensor([[*types, 0, 0][:3] for types in ((0,), *paper.VCR_TYPES)])  # (segments - 1, segment)
    return table[segments.amax(1, keepdim=True), segments]  # (B, 1), (B, T) -> (B, T)


def overlaps(dataset, index, batch):
    """(B, N) overlap (IoU) of each region with the box that is meant; -1 for padding."""
    meant = torch.from_numpy(dataset.target[index]).float()[:, None]  # (B, 4) -> (B, 1, 4)
    return common.iou(batch.boxes, meant).masked_fill(~batch.region_mask, -1.0)


def partners(run, dataset, index, rng):
    """True pairs and false ones for retrieval: texts (B, 1 + K) and pictures (B, 1 + K), the true pair first, then one
    for each of the paper's NEGATIVES, with another picture or another text.

    In the first half of the steps they are drawn at random; in the second half `--mine` are drawn for each and the one
    that the model takes for the best match is kept (UNITER 4.1; ViLBERT mines one of its two texts, from a fixed pool).
    """
    kinds, mine = run.paper.NEGATIVES, run.o.mine if 2 * run.progress["step"] >= run.o.steps else 1
    if (dataset.image == dataset.image[0]).all():
        raise DataError("retrieval needs at least two pictures")
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
            batch = ablate(data.collate(dataset, texts.ravel(), images.ravel()), run.o.ablate).to(run.device)
            scores = run.model.heads["rank"](run.model.encode(batch).pooled)  # (B*K*mine, 1)
        run.model.train()
        best = scores.float().cpu().view(texts.shape).argmax(2).numpy()
    texts, images = (np.take_along_axis(x, best[:, :, None], 2)[:, :, 0] for x in (texts, images))
    return np.column_stack([index, texts]), np.column_stack([dataset.image[index], images])


def ablate(batch, what):
    """Takes a modality away: the picture's regions (hidden and zeroed), or every word but [CLS] and [SEP]."""
    if what == "image":
        batch.region_mask = torch.zeros_like(batch.region_mask)
        batch.features, batch.boxes = torch.zeros_like(batch.features), torch.zeros_like(batch.boxes)
    if what == "text":
        last = batch.text_mask.sum(1, keepdim=True) - 1  # (B, 1), where [SEP] stands
        batch.text = torch.cat([batch.text[:, :1], batch.text.gather(1, last)], 1)  # (B, T) -> (B, 2)
        batch.text_mask, batch.segments = torch.ones_like(batch.text, dtype=torch.bool), torch.zeros_like(batch.text)
    return batch


def items(paper, name, batch):
    """How many items the mean of an objective's loss runs over."""
    if name.endswith("_soft") and name.removesuffix("_soft") in MASKED_REGIONS:
        return len(batch.region_index)
    name = name.removesuffix("_soft")
    if name == "itc":
        return len(batch.pair_index)
    if name in MASKED_WORDS or name == "caption":
        return len(batch.word_index)
    if name in paper.PRETRAINING.get("over_all_regions", ()):
        return int(batch.region_mask.sum())
    if name == "qa":
        return int(((batch.answer_labels >= 0) & (batch.matched == 1)).sum())
    return len(batch.region_index) if name in MASKED_REGIONS else len(batch.text)


# ---- evaluation -------------------------------------------------------------------------------------------------


def total(values):
    """The sum over all processes of a list of numbers, as a list. On the CPU, so that no GPU is waited for."""
    if not dist.is_initialized():
        return list(values)
    tensor = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(tensor)
    return tensor.tolist()


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
    most = 100 if dataset.split == "val" else min(run.o.pool, 1000)  # a full matrix of more takes hours
    index = first_captions(dataset)[:most]
    if task == "caption":
        return evaluate_captions(run, dataset, index)
    metrics = retrieval(run, dataset, index, "rank")
    chance = recall_chance(metrics, len(index))
    metrics["mean_recall"], chance["mean_recall"] = (float(np.mean([*m.values()])) for m in (metrics, chance))
    return metrics, chance


def scores_of(run, batch, name):
    """(loss, scores) of one objective on a batch."""
    with run.autocast():
        loss, scores = run.model(batch.to(run.device), [name])[name]
    return loss.float(), scores.float().cpu()


def parts(run, dataset, index):
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

    Accuracies are over masked words, masked regions or pairs. mlm_content masks one word a caption that only the
    picture tells: a colour, shape, size, number or direction. Beside each: what the most frequent label would get.
    """
    kinds, names = np.array(dataset.kind), list(run.objectives)
    captions = first_captions(dataset)[:examples]
    questions = np.flatnonzero(kinds != "caption")[:examples]
    content = torch.zeros(run.tokenizer.get_vocab_size(), dtype=torch.bool)
    content[[i for w in data.CONTENT_WORDS if (i := run.tokenizer.token_to_id(w)) is not None]] = True
    sums = {}
    for name in [*names, *["mlm_content"] * ("mlm" in names and run.o.data == "scenes")]:
        for index in parts(run, dataset, questions if name == "qa" else captions):
            rng = np.random.default_rng((1, int(index[0])))
            if name == "mlm_content":
                batch = make_batch(run, dataset, index, ["mlm"], rng, only=content, one=True)
            else:
                batch = make_batch(run, dataset, index, [name], rng)
            count(run.paper, sums, name, batch, *scores_of(run, batch, name.removesuffix("_content")))
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
        recalls = retrieval(run, dataset, captions[:candidates])
        metrics, chance = metrics | recalls, chance | recall_chance(recalls, len(captions[:candidates]))
    if "itc" in names:
        dots = dot_products(run, dataset, captions[:candidates], dataset.image[captions[:candidates]])
        recalls = common.recall_at(dots, torch.arange(len(dots)))
        recalls = {f"itc_{name}": value for name, value in recalls.items()}
        metrics, chance = metrics | recalls, chance | recall_chance(recalls, len(dots))
    return metrics, chance


def recall_chance(recalls, pictures):
    """What guessing among so many pictures gets of each recall; its name ends in its rank: {"..._r5": 5 / pictures}."""
    return {name: min(1.0, int(name.rsplit("r", 1)[1]) / pictures) for name in recalls}


def count(paper, sums, name, batch, loss, scores):
    """Adds a batch to sums[name]: [loss x items, items, hits, frequency of each label ...]."""
    objective = name.removesuffix("_content")
    labels, n = None, items(paper, objective, batch)
    if objective == "mlm":
        labels = batch.word_labels
    elif objective in ("mrc", "mrc_kl"):
        labels = common.at(batch.object_probs, batch.region_index)[:, 1:].argmax(-1)
        labels = labels + scores.shape[-1] - batch.object_probs.shape[-1] + 1  # LXMERT's head has no background class
    elif objective == "attr":
        labels = batch.attributes.flatten()[batch.region_index]
    elif objective == "itm":
        labels = batch.matched
    elif objective == "itc":
        labels = torch.arange(len(scores))  # which text of the batch is the picture's own
    elif objective == "qa":
        labels, scores = batch.answer_labels[batch.answer_labels >= 0], scores[batch.answer_labels >= 0]
    values = [float(loss) * n, n, 0]
    if labels is not None:
        values[2:] = [
            int((scores.argmax(-1) == labels).sum()),
            *np.bincount(labels.numpy(), minlength=scores.shape[-1]),
        ]
    sums[name] = [a + b for a, b in itertools.zip_longest(sums.get(name, []), values, fillvalue=0)]


def evaluate_vqa(run, dataset, name="vqa", answers=None):
    """Accuracy: the soft score of the answer with the highest logit, mean over questions, also for each kind.
    Entailment is the same with its own three answers.

    Chance: always the training split's most frequent answer; of `answers`, if given, the most frequent here.
    """
    hits, kinds = np.zeros(len(dataset)), np.array(dataset.kind)
    for index in parts(run, dataset, np.arange(len(dataset))):
        best = scores_of(run, make_batch(run, dataset, index, [name], None), name)[1].argmax(-1).tolist()
        known = answers or run.answers
        hits[index] = [dataset.answer[i].get(known[b], 0.0) for i, b in zip(index, best, strict=True)]
    guesses = [[answer.get(a, 0.0) for answer in dataset.answer] for a in answers or run.answers[:1]]
    return by_kind(np.array(total(hits)), np.array(max(guesses, key=sum)), kinds)


def by_kind(hits, guess, kinds, name="accuracy"):
    """Means of `hits` and of `guess`, what guessing would get, (E,) each: over all, and over each of several kinds."""
    groups = {name: np.ones(len(kinds), bool)}
    groups |= {f"{name}_{kind}": kinds == kind for kind in sorted(set(kinds)) if len(set(kinds)) > 1}
    return {k: hits[g].mean() for k, g in groups.items()}, {k: guess[g].mean() for k, g in groups.items()}


def evaluate_choice(run, task, dataset):
    """Accuracies of the tasks that choose: of true and false (nlvr2), of several texts (vcr), of regions (refer).

    vcr: the answer (Q-A), the reason given the right answer (QA-R), and both (Q-AR). refer: the best-scored region
    overlaps the box meant by more than one half; `reachable` is the share where some region does.
    Chance: the more frequent truth; one choice of all; the share of the regions that would be right.
    """
    right, guess, reachable = np.zeros((3, len(dataset)))
    for index in parts(run, dataset, np.arange(len(dataset))):
        scores = scores_of(run, make_batch(run, dataset, index, [task], None), task)[1]
        if task == "refer":
            clean = data.collate(dataset, index)  # with the boxes that --ablate takes away
            hit = overlaps(dataset, index, clean) > 0.5  # (B, N)
            right[index] = hit.gather(1, scores.argmax(1, keepdim=True))[:, 0]
            guess[index], reachable[index] = hit.sum(1) / clean.region_mask.sum(1), hit.any(1)
        else:
            scores = scores.view(len(index), -1)  # (B, 2), or (B * choices,) -> (B, choices)
            right[index] = scores.argmax(1).numpy() == dataset.target[index]
    right, guess, reachable = (np.array(total(x)) for x in (right, guess, reachable))
    kinds = np.array(dataset.kind)
    if task == "refer":
        metrics, chance = by_kind(right, guess, kinds)
        return metrics | {"reachable": reachable.mean()}, chance
    if task == "nlvr2":
        return by_kind(right, np.full(len(dataset), max(dataset.target.mean(), 1 - dataset.target.mean())), kinds)
    metrics, chance = {}, {}
    for kind, name in (("answer", "q_a"), ("reason", "qa_r")):
        if (kinds == kind).any():
            metrics[f"{name}_accuracy"], chance[f"{name}_accuracy"] = right[kinds == kind].mean(), 1 / dataset.group
    answered = {i: hit for i, hit, kind in zip(dataset.ids, right, kinds, strict=True) if kind == "answer"}
    both = [hit * answered[i] for i, hit, kind in zip(dataset.ids, right, kinds, strict=True) if kind == "reason"]
    if both:
        metrics["q_ar_accuracy"], chance["q_ar_accuracy"] = float(np.mean(both)), 1 / dataset.group**2
    return metrics, chance


def evaluate_captions(run, dataset, index):
    """Perplexity of the captions, exp of their mean loss a piece, and BLEU-4 of the generated ones, `index` naming one
    example of each picture, against all captions of it. Chance: the caption of another picture."""
    pictures, loss, pieces, own = set(dataset.image[index].tolist()), 0.0, 0, {}
    examples = np.array([i for i, image in enumerate(dataset.image.tolist()) if image in pictures])
    for part in parts(run, dataset, examples):
        batch = make_batch(run, dataset, part, ["caption"], None)
        loss += float(scores_of(run, batch, "caption")[0]) * len(batch.word_index)
        pieces += len(batch.word_index)
    loss, pieces = total([loss, pieces])
    first, last = (run.tokenizer.token_to_id(name) for name in ("[CLS]", "[SEP]"))
    beams = run.o.beams if dataset.split != "val" else 1
    for part in parts(run, dataset, index):
        batch = ablate(data.collate(dataset, part), run.o.ablate).to(run.device)
        with run.autocast():
            found = common.generate(run.model, batch, first, last, beams)
        own |= {int(dataset.image[i]): run.tokenizer.decode(ids).split() for i, ids in zip(part, found, strict=True)}
    gathered = [own] * run.world
    if dist.is_initialized():
        dist.all_gather_object(gathered, own)
    own, true = {image: words for some in gathered for image, words in some.items()}, {}
    for i in examples:
        ids = dataset.tokens[dataset.offsets[i] : dataset.offsets[i + 1]].tolist()
        true.setdefault(int(dataset.image[i]), []).append(run.tokenizer.decode(ids).split())
    order = sorted(own)
    said, references = [own[image] for image in order], [true[image] for image in order]
    strangers = [true[image][0] for image in [*order[1:], order[0]]]
    metrics = {"perplexity": math.exp(loss / max(1, pieces)), "bleu4": common.bleu(said, references)}
    chance = {"bleu4": common.bleu(strangers, references)}
    return metrics, chance


# ---- retrieval --------------------------------------------------------------------------------------------------


def pair_scores(model, pooled, head):
    """How well pairs match: the log odds of head "itm", or the one score of "rank". (rows, C) -> (rows,) float64"""
    logits = model.heads[head](pooled).double().cpu()  # (rows, 2) or (rows, 1)
    return logits[:, 1] - logits[:, 0] if head == "itm" else logits[:, 0]


def retrieval(run, dataset, index, head="itm"):
    """Recall at 1, 5 and 10, both ways: every text of `index` with every picture, ranked by `pair_scores`. What
    the model computes of each text and each picture alone is computed once."""
    n, batch = len(index), ablate(data.collate(dataset, index), run.o.ablate).to(run.device)
    scores = torch.zeros(n, n, dtype=torch.float64)
    with run.autocast():
        words, areas = run.model.unimodal(batch)
        for row in range(run.rank, n, run.world):
            text = {name: getattr(batch, name)[row].expand(n, -1) for name in ("text", "text_mask", "segments")}
            pairs = dataclasses.replace(batch, **text)
            pooled = run.model.encode(pairs, given=(words[row].expand(n, -1, -1), areas)).pooled  # (n, C)
            scores[row] = pair_scores(run.model, pooled, head)
    scores = torch.tensor(total(scores.flatten().tolist())).view(n, n)
    return common.recall_at(scores, torch.arange(n))


def dot_products(run, dataset, texts, pictures):
    """Cosines (texts, pictures) of the unimodal vectors of itc: examples `texts`, store rows `pictures`. Each text and
    each picture is encoded once."""
    head, sides = run.model.heads["itc"], []
    for index, side in ((texts, "text"), (pictures, "image")):
        lengths = np.diff(dataset.offsets if side == "text" else dataset.store.offsets)[index]
        vectors = torch.zeros(len(index), head.project_text.out_features, dtype=torch.float64)
        for part in data.batches(lengths, size=256, rank=run.rank, world=run.world):
            rows = (index[part], None) if side == "text" else (np.full(len(part), texts[0]), index[part])
            batch = ablate(data.collate(dataset, *rows), run.o.ablate).to(run.device)
            with run.autocast():
                if side == "text":
                    found = head.text(run.model.encode(batch, regions=False).text)
                else:
                    found = head.image(run.model.encode(batch, text=False).regions, batch.region_mask)
            vectors[part] = found.double().cpu()
        sides.append(torch.tensor(total(vectors.flatten().tolist()), dtype=torch.float64).view(vectors.shape))
    return sides[0] @ sides[1].T  # (texts, E) @ (E, pictures)


def matching_scores(run, dataset, texts, pictures, head="itm"):
    """`pair_scores` of text i with picture i, (P,). texts: examples, pictures: store rows, (P,) each."""
    scores = torch.zeros(len(texts), dtype=torch.float64)
    lengths = np.stack([np.diff(dataset.offsets)[texts], np.diff(dataset.store.offsets)[pictures]], 1)
    for part in data.batches(lengths, size=256, rank=run.rank, world=run.world):
        batch = ablate(data.collate(dataset, texts[part], pictures[part]), run.o.ablate).to(run.device)
        with run.autocast():
            scores[part] = pair_scores(run.model, run.model.encode(batch).pooled, head)
    return torch.tensor(total(scores.tolist()), dtype=torch.float64)


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
    fine[rows, columns] = matching_scores(run, dataset, texts[rows], pictures[columns], head)
    fine = fine - fine.min() + 2.0  # above every cosine
    place = {picture: i for i, picture in enumerate(pictures.tolist())}
    truth = torch.tensor([place[picture] for picture in dataset.image[texts].tolist()])
    recalls = {}
    for way, mask in near.items():
        found = common.recall_at(torch.where(mask, fine, dots), truth)
        recalls |= {name: value for name, value in found.items() if name.startswith(way)}
    return recalls


def compare_stages(run, dataset, head, most=1000, measured=300):
    """--rerank: recall and seconds of the full matrix of matching scores, of dot products, and of the two stages, as
    result.json has them and as lines to print.

    Among --pool pictures with a caption each; scenes are drawn until there are enough. Beyond `most` of them the full
    matrix is not computed: its time is extrapolated from `measured` x `measured` pairs, and so called.
    """
    o = run.o
    if dataset.name == "scenes" and o.pool > len(np.unique(dataset.image)):
        dataset = data.scenes(dataset.split, "caption", count=o.pool * 5 // 4).encode(run.tokenizer, max_length=60)
    texts = first_captions(dataset)[: o.pool]
    pictures, n, result = dataset.image[texts], len(texts), {}
    whole = n <= most
    run.model.eval()
    with torch.inference_mode():
        dot_products(run, dataset, texts[:64], pictures[:64])  # the first pass of a process is slower
        start = time.perf_counter()
        recalls = retrieval(run, dataset, texts if whole else texts[:measured], head)
        seconds = (time.perf_counter() - start) * (1.0 if whole else (n / measured) ** 2)
        rows = {"full": (recalls if whole else {}, seconds)}
        start = time.perf_counter()
        recalls = common.recall_at(dot_products(run, dataset, texts, pictures), torch.arange(n))
        rows["dot"] = recalls, time.perf_counter() - start
        start = time.perf_counter()
        recalls = two_stage(run, dataset, texts, pictures, o.rerank, head)
        rows["two_stage"] = recalls, time.perf_counter() - start
    lines = [f"\n{o.model}, retrieval among {n} x {n}, best {o.rerank} re-ranked"]
    for name, (recalls, seconds) in rows.items():
        how = "" if whole or name != "full" else f" (extrapolated from {measured} x {measured})"
        shown = "  ".join(f"{key} {100 * value:.1f}%" for key, value in recalls.items())
        lines.append(f"  {name:10s} {seconds:9.1f} s{how}  {shown}".rstrip())
        result |= {f"{name}_{key}": round(value, 5) for key, value in recalls.items()}
        result[f"{name}_seconds"] = round(seconds, 2)
    return {"pool": n, "rerank": o.rerank, "full_extrapolated": not whole, **result}, "\n".join(lines)
