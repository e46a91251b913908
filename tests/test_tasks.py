"""The downstream tasks: their scenes against brute force over the scene graph, reading from left to right against
reading at once, metrics against numbers worked by hand, every task through the command line."""

import dataclasses
import itertools
import json
import math
import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import ONE_LAYER, ROOT, narrow, run_script, with_pool
from test_scenes import COLORS, SHAPES

import checkpoints
import common
import data
import distill
import lxmert
import predict
import tasks
import train
import uniter
import vilbert
from prepare import scenes
from support import consensus, distillation, evaluation, log, options, regions

PAPERS = list(checkpoints.MODELS)


def make(name, seed=0, **changes):
    """A tiny model in float64 with random biases and norms, which an untrained one has not."""
    paper = checkpoints.MODELS[name]
    sizes = {**paper.PRESETS["tiny"], "vocab_size": 30, "feature_size": 8, "classes": 5, **changes}
    torch.manual_seed(seed)
    model = paper.MODEL(paper.Config(**sizes)).double().eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def make_batch(rows=3, words=7, regions=5, seed=0):
    g = torch.Generator().manual_seed(seed)
    corners = torch.rand(rows, regions, 2, 2, generator=g, dtype=torch.float64).sort(2).values
    text_mask = torch.ones(rows, words, dtype=torch.bool)
    region_mask = torch.ones(rows, regions, dtype=torch.bool)
    text_mask[0, 5:], region_mask[1, 3:] = False, False
    return data.Batch(
        text=torch.randint(5, 30, (rows, words), generator=g) * text_mask,
        text_mask=text_mask,
        segments=torch.zeros(rows, words, dtype=torch.long),
        features=torch.randn(rows, regions, 8, generator=g, dtype=torch.float64),
        boxes=corners.flatten(2),  # (B, N, 2, 2) -> (B, N, 4): x1, y1, x2, y2
        region_mask=region_mask,
    )


# ---- reading from left to right --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PAPERS)
def test_decoding_piece_by_piece_equals_decoding_at_once(name):
    model, batch = make(name), make_batch()
    whole, cache = model.decode(batch), {}
    for start, stop in ((0, 1), (1, 4), (4, 5), (5, 7)):
        cut = {n: getattr(batch, n)[:, start:stop] for n in ("text", "text_mask", "segments")}
        states = model.decode(dataclasses.replace(batch, **cut), cache)
        torch.testing.assert_close(states, whole[:, start:stop], atol=1e-12, rtol=0)


def test_decoding_written_out_without_a_cache():
    batch = make_batch()
    causal = common.attention_bias(torch.ones(3, 7, 7, dtype=torch.bool).tril(), torch.float64)
    region_bias = common.attention_bias(batch.region_mask, torch.float64)
    model = make("uniter")  # one sequence, words first: words see regions and earlier words, regions see regions
    x = torch.cat([model.embed_text(batch), model.embed_regions(batch)], 1)
    seen = torch.zeros(3, 12, 12, dtype=torch.bool)
    seen[:, :7, :7] = torch.ones(7, 7, dtype=torch.bool).tril()
    seen[:, :, 7:] = batch.region_mask[:, None]
    for layer in model.layers:
        x = layer(x, common.attention_bias(seen, torch.float64))
    torch.testing.assert_close(model.decode(batch), x[:, :7], atol=1e-12, rtol=0)
    model = make("lxmert")
    words, areas = model.embed_text(batch), model.embed_regions(batch)
    for layer in model.language_layers:
        words = layer(words, causal)
    for layer in model.relation_layers:
        areas = layer(areas, region_bias)
    for layer in model.cross_layers:
        words, areas = layer.text(layer.cross(words, areas, region_bias), causal), layer.regions(areas, region_bias)
    torch.testing.assert_close(model.decode(batch), words, atol=1e-12, rtol=0)
    model = make(
        "vilbert"
    )  # text layers 0 and 1; then co-attention, region layer, text layer, twice (config.connections)
    words, areas = model.embed_text(batch), model.embed_regions(batch)
    whole = common.attention_bias(torch.nn.functional.pad(batch.region_mask, (1, 0), value=True), torch.float64)
    for i in (0, 1):
        words = model.text_layers[i](words, causal)
    for i, layer in enumerate(model.connections):
        words = layer.text_feed_forward(layer.text_reads(words, areas, whole))
        areas = model.region_layers[i](layer.region_feed_forward(areas), whole)
        words = model.text_layers[2 + i](words, causal)
    torch.testing.assert_close(model.decode(batch), words, atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", PAPERS)
def test_no_word_sees_a_later_one_but_all_see_the_regions(name):
    model, batch = make(name), make_batch()
    before = model.decode(batch)
    text = batch.text.clone()
    text[:, 4] = (text[:, 4] + 1) % 25 + 5
    after = model.decode(dataclasses.replace(batch, text=text))
    assert torch.equal(before[:, :4], after[:, :4])
    assert (before[:, 4:] - after[:, 4:]).abs().amax(-1).min() > 1e-6
    features = batch.features.clone()
    features[:, 2] += 1
    assert (before - model.decode(dataclasses.replace(batch, features=features))).abs().amax(-1).min() > 1e-6
    features = batch.features.clone()
    features[1, 3:] += 1  # padding
    assert torch.equal(before, model.decode(dataclasses.replace(batch, features=features)))


@pytest.mark.parametrize("name", PAPERS)
def test_states_computed_apart_change_nothing(name):
    model, batch = make(name), make_batch()
    apart = model.encode(batch, given=model.unimodal(batch))
    together = model.encode(batch)
    for field in ("text", "regions", "pooled"):
        torch.testing.assert_close(getattr(apart, field), getattr(together, field), atol=1e-12, rtol=0)


class RereadingModel:
    """Decodes the whole text anew at each step, and keeps in the cache nothing but the text."""

    def __init__(self, model):
        self.model = model
        self.word_logits = model.word_logits

    def decode(self, batch, cache):
        text = batch.text
        if cache:
            text = torch.cat([cache["text"][0], text], 1)
        cache["text"] = (text,)
        mask = torch.ones_like(text, dtype=torch.bool)
        batch = dataclasses.replace(batch, text=text, text_mask=mask, segments=torch.zeros_like(text))
        return self.model.decode(batch, {})


class Toy:
    """A language model of four pieces (0 the end, 1 the beginning) whose chances depend on all pieces so far."""

    def __init__(self, seed):
        self.table = torch.randn(4, 4, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2

    def decode(self, batch, cache):
        states = []
        for row in batch.text.tolist():
            past = ([0, 0, 0] + row)[-3:]
            states.append(self.table[past[0], past[1], past[2]])
        return torch.stack(states)[:, None]

    def word_logits(self, states):
        return states

    def chance(self, pieces):
        past, total = [1], 0.0
        for piece in pieces:
            total += float(self.table[tuple(([0, 0, 0] + past)[-3:])].log_softmax(-1)[piece])
            past.append(piece)
        return total

    def mean_chance(self, pieces):
        return self.chance(pieces) / len(pieces)


def test_enough_beams_find_the_text_of_the_likeliest_pieces_and_one_beam_is_greedy():
    batch = dataclasses.replace(make_batch(rows=2), text=torch.zeros(2, 1, dtype=torch.long))
    ended = [(*t, 0) for n in range(4) for t in itertools.product((1, 2, 3), repeat=n)]
    texts, lengths, better = ended + list(itertools.product((1, 2, 3), repeat=4)), set(), 0
    for toy in map(Toy, range(12)):
        best = max(texts, key=toy.mean_chance)
        found = evaluation.generate(RereadingModel(toy), batch, first=1, last=0, beams=250, most=4)
        assert [beams[0][0] for beams in found] == [[p for p in best if p]] * 2
        for pieces, mean in found[0]:  # all texts, and what they are compared by
            whole = (*pieces, 0) if len(pieces) < 4 else tuple(pieces)
            assert mean == pytest.approx(toy.mean_chance(whole), abs=1e-4)
        assert [mean for _, mean in found[0]] == sorted([mean for _, mean in found[0]], reverse=True)
        greedy = []
        while len(greedy) < 4 and 0 not in greedy:
            past = ([0, 0, 0, 1] + greedy)[-3:]
            greedy.append(int(toy.table[tuple(past)].argmax()))
        found = evaluation.generate(RereadingModel(toy), batch, first=1, last=0, beams=1, most=4)
        assert [beams[0][0] for beams in found] == [[p for p in greedy if p]] * 2
        lengths.add(len(best))
        better += toy.mean_chance(best) > toy.mean_chance(greedy) + 1e-9
    assert len(lengths) > 2 and better  # or the search had nothing to find


@pytest.mark.parametrize("name", PAPERS)
def test_captions_with_and_without_the_cache_are_the_same(name):
    model, batch = make(name, heads=("mlm",)), make_batch()
    model.heads["mlm"].bias.data[3] -= 2  # or a caption of random weights might end at once
    for beams in (1, 3):
        cached = evaluation.generate(model, batch, 2, 3, beams, most=8)
        plain = evaluation.generate(RereadingModel(model), batch, 2, 3, beams, most=8)
        assert [[pieces for pieces, _ in texts] for texts in cached] == [[p for p, _ in texts] for texts in plain]
        assert all(1 < len(texts[0][0]) <= 8 and len(texts) == beams for texts in cached)


# ---- batches ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(small_scenes):
    return data.read_tokenizer(small_scenes(40) / "vocab.txt")


def test_rows_of_choices_are_question_answer_and_reason(drawn, tokenizer):
    dataset = drawn("train", "vcr", 40).encode(tokenizer, max_length=60)
    cls, sep = (tokenizer.token_to_id(name) for name in ("[CLS]", "[SEP]"))
    index = np.array([1, 0])  # a reason, which has three segments, and an answer
    batch = data.collate(dataset, index)
    assert batch.text.shape[0] == 8 and batch.ids == [dataset.ids[1], dataset.ids[0]]
    for row, (example, choice) in enumerate(itertools.product(index, range(4))):
        pieces, types = [cls], [0]
        for number, part in enumerate(dataset.text[example * 4 + choice]):
            ids = tokenizer.encode(part, add_special_tokens=False).ids
            last = number == len(dataset.text[example * 4 + choice]) - 1
            pieces, types = pieces + [*ids, sep], types + [number] * len(ids) + [number + (not last)]
        assert batch.text[row, : len(pieces)].tolist() == pieces and batch.text_mask[row].sum() == len(pieces)
        assert batch.segments[row, : len(pieces)].tolist() == types
    uniters = tasks.vcr_text_types(uniter, batch.segments)[batch.text_mask]
    assert torch.equal(uniters, torch.tensor([0, 2, 3])[batch.segments[batch.text_mask]])
    other = tasks.vcr_text_types(lxmert, batch.segments)
    assert torch.equal(other[:4], (batch.segments[:4] == 2).long()) and torch.equal(other[4:], batch.segments[4:])
    part = dataset.subset(np.array([3, 1]))
    assert torch.equal(data.collate(part, np.array([1])).text, data.collate(dataset, np.array([1])).text)
    assert part.target.tolist() == dataset.target[[3, 1]].tolist()


def test_long_texts_lose_the_question_not_the_choice(tokenizer):
    text = [(" ".join(["red"] * 30), "blue star", "green ring")]
    dataset = data.Dataset("", "", None, np.zeros(1, int), text, [{}], [""], [""]).encode(tokenizer, max_length=12)
    ids = [tokenizer.id_to_token(i) for i in dataset.tokens]
    assert ids == ["[CLS]", *["red"] * 4, "[SEP]", "blue", "star", "[SEP]", "green", "ring", "[SEP]"]


def test_pictures_are_joined_row_by_row(drawn, tokenizer):
    dataset = drawn("train", "nlvr2", 40).encode(tokenizer)
    two = data.collate(dataset, np.array([0, 5, 9]), fields=["object_probs"])
    two.region_types = (torch.arange(6) % 2)[:, None].expand(two.region_mask.shape)
    one = data.join_pictures(dataclasses.replace(two, target=torch.arange(3)))
    assert one.target.tolist() == [0, 1, 2] and len(one.ids) == 3 and torch.equal(one.text, two.text[::2])
    for row in range(3):
        for name in ("features", "boxes", "region_types", "object_probs"):
            parts = [getattr(two, name)[2 * row + i][two.region_mask[2 * row + i]] for i in (0, 1)]
            assert torch.equal(getattr(one, name)[row][one.region_mask[row]], torch.cat(parts))


LABELS = {"object_probs", "objects", "object_conf", "attributes", "attribute_conf"}  # what a store may have of a region


@pytest.mark.parametrize(
    ("name", "objectives", "read"),
    [
        ("uniter", ["mlm"], set()),
        ("uniter", ["itm", "wra"], set()),
        ("uniter", ["mrc_kl"], {"object_probs"}),
        ("vilbert", ["mlm", "mrc_kl", "itm"], {"object_probs"}),
        ("lxmert", ["mrc"], {"objects", "object_conf"}),
        ("lxmert", ["mlm", "attr"], {"attributes", "attribute_conf"}),
    ],
)
def test_a_batch_has_the_labels_of_regions_that_its_objectives_need(name, objectives, read, drawn, tokenizer):
    """And all else is as if every field had been read."""
    dataset = drawn("train", "pretrain", 40).encode(tokenizer)
    args = SimpleNamespace(ablate=None, mask=0.3)
    run = SimpleNamespace(args=args, paper=checkpoints.MODELS[name], tokenizer=tokenizer, answers=[])
    index = np.arange(9)
    batch = tasks.make_batch(run, dataset, index, objectives, np.random.default_rng(0))
    assert {field for field in LABELS if getattr(batch, field) is not None} == read
    every = dataset.store.gather(batch.pictures.numpy())
    for field in {"boxes", "region_mask"} | read:
        assert torch.equal(getattr(batch, field), every[field])
    features = batch.features if batch.clean_features is None else batch.clean_features
    assert torch.equal(features, every["features"])


def test_a_statement_stands_beside_its_left_and_its_right_picture(drawn, tokenizer):
    dataset = drawn("train", "nlvr2", 40).encode(tokenizer)
    run = SimpleNamespace(paper=uniter, model=SimpleNamespace(config=uniter.Config()))
    index = np.array([0, 5, 9])
    batch = tasks.NLVR2.batch(run, dataset, index, None)
    assert batch.target.tolist() == dataset.target[index].tolist()
    for row in range(6):
        place = 2 * index[row // 2] + row % 2  # of the dataset's rows; the left picture comes first
        picture = dataset.store.gather(dataset.image[[place]])
        real = batch.region_mask[row]
        assert torch.equal(batch.features[row][real], picture["features"][0])
        assert (batch.region_types[row] == row % 2).all()
        assert torch.equal(batch.text[row], batch.text[row - row % 2])


def test_the_next_word_is_the_label():
    batch = make_batch()
    after = data.next_word_labels(batch)
    pairs = [(r, t) for r in range(3) for t in range(6) if batch.text_mask[r, t + 1]]
    assert after.word_index.tolist() == [r * 7 + t for r, t in pairs]
    assert after.word_labels.tolist() == [int(batch.text[r, t + 1]) for r, t in pairs]


# ---- lines of data, and answers as text ------------------------------------------------------------------------


def test_a_line_becomes_the_examples_of_each_task():
    line = {"id": "7", "text": "which?"}
    answer = {"yes": 1.0}
    one_row = [("which?", 0)]
    for name, record, expected in (
        ("pretrain", line, ("7", "caption", one_row, None, -1)),
        ("pretrain", {**line, "answer": answer}, ("7", "question", one_row, answer, -1)),
        ("vqa", {**line, "answer": answer, "kind": "color"}, ("7", "color", one_row, answer, -1)),
        ("ve", {**line, "answer": answer}, ("7", "ve", one_row, answer, -1)),
        ("retrieval", {**line, "answer": answer}, ("7", "caption", one_row, None, -1)),
        ("caption", line, ("7", "caption", one_row, None, -1)),
        ("refer", {**line, "target": [0, 0.1, 1, 0.5]}, ("7", "refer", one_row, None, [0, 0.1, 1, 0.5])),
        ("nlvr2", {**line, "label": True}, ("7", "nlvr2", [("which?", 0), ("which?", 1)], None, 1)),
    ):
        assert [tuple(example) for example in tasks.TASKS[name].examples(record)] == [expected]
    choices = {**line, "choices": ["a", "b"], "label": 1, "reasons": ["c", "d"], "reason": 0}
    answer, reason = tasks.VCR.examples(choices)
    assert tuple(answer) == ("7", "answer", [(("which?", "a"), 0), (("which?", "b"), 0)], None, 1)
    assert tuple(reason) == ("7", "reason", [(("which?", "b", "c"), 0), (("which?", "b", "d"), 0)], None, 0)


@pytest.mark.parametrize(
    ("name", "record", "message"),
    [
        ("ve", {"answer": {"maybe": 1.0}}, "takes contradiction, entailment, neutral"),
        ("nlvr2", {"label": 1}, "write true or false"),
        ("vcr", {"choices": ["a", "b"], "label": 2}, "0 to 1"),
        ("vcr", {"choices": ["a", "b"], "label": True}, "index"),
        ("vcr", {"choices": ["a", "b"], "label": 0, "reasons": ["c", "d"], "reason": 2}, "'reason'"),
        ("vcr", {"choices": ["a", "b"], "label": 0, "reasons": ["c", "d"]}, "'reason'"),
    ],
)
def test_a_line_that_does_not_fit_its_task_is_said(name, record, message):
    assert message in tasks.TASKS[name].check(record)


def test_lines_that_fit_pass():
    assert tasks.VE.check({"answer": {"neutral": 0.5, "entailment": 1.0}}) is None
    assert tasks.NLVR2.check({"label": False}) is None
    assert tasks.VCR.check({"choices": ["a", "b"], "label": 1, "reasons": ["c", "d"], "reason": 1}) is None
    assert tasks.VQA.check({"answer": {"maybe": 1.0}}) is None


def test_answers_are_shown_with_their_probabilities_and_the_truth(drawn, tokenizer):
    run = SimpleNamespace(answers=["red", "blue", "two"])
    logits = torch.tensor([-2.0, 3.0, 0.0])
    lines = SimpleNamespace(answer=[{"red": 0.3, "two": 1.0}, {}], target=np.array([0, -1]), text=["a blue disc"])
    shown = tasks.VQA.show(run, lines, 0, logits, 2)
    assert shown == {"answers": [["blue", 0.95257], ["two", 0.5]], "truth": "two"}
    assert "truth" not in tasks.VQA.show(run, lines, 1, logits, 2)
    shown = tasks.VE.show(run, lines, 1, logits, 3)["answers"]
    assert [name for name, _ in shown] == ["entailment", "neutral", "contradiction"]
    shown = tasks.NLVR2.show(run, lines, 0, torch.tensor([0.0, 1.0]), 3)
    answers = [["true", 0.73106], ["false", 0.26894]]
    assert shown == {"answers": answers, "probs": [0.26894, 0.73106], "truth": "false"}
    assert "truth" not in tasks.NLVR2.show(run, lines, 1, torch.tensor([0.0, 1.0]), 3)
    assert tasks.RETRIEVAL.show(run, None, 0, torch.tensor(1.0), 3) == {"match": 0.73106}
    assert tasks.CAPTION.show(run, lines, 0, "a red disc", 3) == {"caption": "a red disc", "truth": "a blue disc"}
    choices = drawn("test", "vcr", 20).encode(tokenizer)
    texts = [choices.text[choices.group * 3 + k][-1] for k in range(choices.group)]
    shown = tasks.VCR.show(run, choices, 3, torch.tensor([0.0, 0.0, 5.0, 0.0]), 1)
    assert shown.pop("probs") == [0.0066, 0.0066, 0.98019, 0.0066]
    assert shown == {"answers": [[texts[2], 0.98019]], "truth": texts[int(choices.target[3])]}
    refer = drawn("test", "refer", 20).encode(tokenizer)
    boxes = refer.store.gather(refer.image[[4]])["boxes"][0]
    logits = torch.cat([torch.zeros(len(boxes) - 1), torch.tensor([20.0, 99.0, 99.0])])  # two positions of padding
    (box, prob), *_ = tasks.REFER.show(run, refer, 4, logits, 1)["answers"]
    assert np.allclose(box, boxes[-1] * scenes.SIDE, atol=0.06) and prob == pytest.approx(1, abs=1e-4)


# ---- training --------------------------------------------------------------------------------------------------


def test_false_partners_are_false_and_mined_ones_are_the_hardest(drawn, tokenizer):
    dataset = drawn("train", "retrieval", 40).encode(tokenizer)
    modes = []  # in which mode the model is, and when it is used
    model = SimpleNamespace(heads={"rank": lambda pooled: modes.append("use") or pooled})
    model.train = lambda: modes.append("train")
    model.eval = lambda: modes.append("eval")
    # the more a picture's number and a text's length say, the better the "match"
    model.encode = lambda batch: SimpleNamespace(
        pooled=batch.text_mask.sum(1, keepdim=True) + batch.region_mask.sum(1)[:, None]
    )
    run = SimpleNamespace(args=SimpleNamespace(mine=300, steps=10, ablate=None), paper=vilbert, model=model)
    run.autocast, run.device, index = train.nullcontext, torch.device("cpu"), np.arange(0, 30, 3)
    words, regions = np.diff(dataset.offsets), np.diff(dataset.store.offsets)
    for step, mined in ((0, False), (5, True)):
        run.progress = {"step": step}
        texts, images = evaluation.sample_negative_pairs(run, dataset, index, np.random.default_rng(0))
        assert texts.shape == images.shape == (10, 4)
        assert (texts[:, 0] == index).all() and (images[:, 0] == dataset.image[index]).all()
        for column, kind in enumerate(("text", "image", "text"), 1):
            kept, other = (images, texts) if kind == "text" else (texts, images)
            assert (kept[:, column] == kept[:, 0]).all()
            wrong = dataset.image[other[:, column]] if kind == "text" else other[:, column]
            assert (wrong != dataset.image[index]).all()
            size = words[other[:, column]] if kind == "text" else regions[other[:, column]]
            most = words.max() if kind == "text" else regions[np.unique(dataset.image)].max()
            assert ((size >= most - 1).mean() > 0.8) == mined
    assert modes == ["eval", "use", "train"]


def test_items_without_a_label_are_neither_hits_nor_labels():
    labels = torch.tensor([1, -1, 0])
    objective = common.Objective(None, labels=lambda batch, logits: labels)
    sums = evaluation.ObjectiveSums()
    logits = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    evaluation.add_batch(sums, objective, SimpleNamespace(text=torch.zeros(3, 2)), 0.5, logits)
    assert (sums.hits, dict(sums.labels), sums.items, sums.loss) == (1, {1: 1, 0: 1}, 3, 1.5)


def test_a_negative_does_not_repeat_a_caption_of_the_picture():
    """Six pictures; pictures 0 to 2 share a caption, whatever its case, and so do pictures 3 to 5 another one."""
    image = np.repeat(np.arange(6), 2)
    text = []
    for picture in range(6):
        shared = "a red disc" if picture < 3 else "a blue ring"
        text.append(shared.title() if picture % 2 else shared)
        text.append(f"picture number {picture}")
    lower = [line.lower() for line in text]
    dataset = data.Dataset("", "train", None, image, text, [{}] * 12, ["caption"] * 12, [str(i) for i in range(12)])
    run = SimpleNamespace(args=SimpleNamespace(mine=1, steps=10), paper=vilbert, progress={"step": 0})
    index = np.arange(12)
    repeated = 0
    for seed in range(20):
        texts, images = evaluation.sample_negative_pairs(run, dataset, index, np.random.default_rng(seed))
        for row in range(12):
            for column in (1, 2, 3):
                own = [lower[i] for i in range(12) if image[i] == images[row, column]]
                assert lower[texts[row, column]] not in own
        drawn = np.random.default_rng(seed).integers(12, size=(12, 3))
        repeated += ((image[drawn] < 3) == (image[index] < 3)[:, None]).sum()
    assert repeated > 100  # draws that had a chance to go wrong
    rare = dataclasses.replace(dataset, text=["the same"] * 11 + ["other"], text_keys=None, pairs=None)
    rare.image = np.arange(12)  # eleven pictures share a caption: nearly all draws are true pairs
    for seed in range(300):
        texts, images = evaluation.sample_negative_pairs(run, rare, np.array([0, 11]), np.random.default_rng(seed))
        assert (texts[0, 1], texts[0, 3], images[0, 2]) == (11, 11, 11)
        assert 11 not in (*texts[1, [1, 3]], images[1, 2])
    own = dataclasses.replace(rare, image=np.array([0, 1, *[1] * 10]), pairs=None)  # picture 1 has two texts
    unlucky = SimpleNamespace(integers=lambda high, size: np.zeros(size, int), choice=lambda places: places[0])
    run.paper = SimpleNamespace(NEGATIVES=("text",))
    texts, images = evaluation.sample_negative_pairs(run, own, np.array([0]), unlucky)
    assert (texts[0].tolist(), images[0].tolist()) == ([0, 11], [0, 0])
    run.paper = vilbert
    dataset = dataclasses.replace(dataset, text=["the same"] * 12, text_keys=None, pairs=None)
    with pytest.raises(common.UserError, match="different texts"):
        evaluation.sample_negative_pairs(run, dataset, index, np.random.default_rng(0))


def test_the_matching_head_becomes_the_rank_head_and_types_are_widened():
    for name in PAPERS:
        old, new = (
            make(name, heads=("itm",)),
            make(name, seed=1, heads=("rank",), **({"types": 4} if name == "uniter" else {})),
        )
        args = SimpleNamespace(init="x", model=name, partial=False, tasks=["retrieval", "nlvr2"])
        checkpoint = {"state": old.state_dict(), "answers": []}
        new.load_state_dict(checkpoints.fit_state_dict(args, new.state_dict(), checkpoint, [])[0])
        batch = make_batch()
        odds = old.heads["itm"](old.encode(batch).pooled)
        torch.testing.assert_close(new.heads["rank"](new.encode(batch).pooled)[:, 0], odds[:, 1] - odds[:, 0])
    before, after = (m.text_embedding.types.weight for m in (make("uniter"), make("uniter", types=4)))
    args.model, checkpoint["state"] = "uniter", {"text_embedding.types.weight": before}
    state, _ = checkpoints.fit_state_dict(args, {"text_embedding.types.weight": after}, checkpoint, [])
    assert torch.equal(state["text_embedding.types.weight"], before[[0, 1, 1, 0]])


def test_tasks_are_drawn_by_size():
    run = SimpleNamespace(args=SimpleNamespace(seed=0), sets={"a": {"train": range(100)}, "b": {"train": range(300)}})
    drawn = Counter(train.sample_task(run, step) for step in range(1, 2001))
    assert abs(drawn["a"] / 2000 - 0.25) < 4 * math.sqrt(0.1875 / 2000)


@pytest.mark.parametrize("name", ["uniter", "lxmert"])
def test_a_summed_loss_counts_as_a_mean_whatever_the_parts(name):
    model, found = make(name, heads=("refer",)), []
    batch = make_batch(rows=4)
    labels = torch.tensor([0, 1, 2, 2])
    target = torch.nn.functional.one_hot(labels, batch.region_mask.shape[1])
    batch = dataclasses.replace(batch, target=target, ids=[""] * 4)
    run = SimpleNamespace(model=model, paper=checkpoints.MODELS[name], teacher=None)
    run.device, run.autocast = torch.device("cpu"), train.nullcontext
    for parts in ([[0, 1, 2, 3]], [[0], [1, 2, 3]]):
        model.zero_grad()
        loss = train.backward(run, [batch.select(torch.tensor(p)) for p in parts], ["refer"])["refer"]
        found.append([loss, *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    scores = checkpoints.MODELS[name].OBJECTIVES["refer"].loss(model, model.encode(batch), batch)[1]
    assert found[0][0].item() == pytest.approx(torch.nn.functional.cross_entropy(scores, labels).item(), rel=1e-6)
    for whole, split in zip(*found, strict=True):
        torch.testing.assert_close(whole, split, atol=1e-6, rtol=1e-6)


def test_a_teacher_s_answers_count_as_the_mean_whatever_the_parts():
    """Nine and four rows, of which few have an answer, weighted by `items_of`, give the loss of thirteen at once."""
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 13, 6)
    labels = torch.tensor([0, -1, 2, -1, -1, 5, -1, -1, -1, 1, 1, 4, -1])
    matched = torch.ones(13, dtype=torch.long)
    parts = []
    for rows in (slice(0, 9), slice(9, 13)):
        batch = SimpleNamespace(text=torch.zeros(13, 3)[rows], answer_labels=labels[rows], matched=matched[rows])
        loss = distillation.soft_label_loss(student[rows], teacher[rows])
        parts.append((distill.items_of(lxmert, "qa_soft", batch), loss))
    items = sum(n for n, _ in parts)
    together = sum(n * loss for n, loss in parts) / items
    torch.testing.assert_close(together, distillation.soft_label_loss(student, teacher))


def test_questions_of_mismatched_pairs_do_not_count():
    batch = SimpleNamespace(answer_labels=torch.tensor([1, -1, 2, 0]), matched=torch.tensor([1, 1, 0, 1]))
    assert distill.items_of(lxmert, "qa", batch) == 2


# ---- metrics ---------------------------------------------------------------------------------------------------


def expected_recall(scores, right, k):
    """The share of all orders of the candidates, sorted by score alone, in which a right one is among the first k."""
    hits = []
    for order in itertools.permutations(range(len(scores))):
        ranked = sorted(order, key=lambda i: -scores[i])  # a stable sort keeps the order of ties
        hits.append(any(right[i] for i in ranked[:k]))
    return np.mean(hits)


def test_recall_is_the_mean_over_all_orders_of_ties():
    g = torch.Generator().manual_seed(0)
    for _ in range(3):
        scores = torch.randint(0, 3, (6, 5), generator=g).double()  # 6 texts, 5 pictures: many ties
        truth = torch.randint(0, 4, (6,), generator=g)  # picture 4 has no text, another one several
        recalls = evaluation.recall_at(scores, truth, ks=(1, 2, 4))
        for k in (1, 2, 4):
            to_image = [expected_recall(scores[t], [truth[t] == i for i in range(5)], k) for t in range(6)]
            assert recalls[f"text_to_image_r{k}"] == pytest.approx(np.mean(to_image))
            to_text = [expected_recall(scores[:, i], truth == i, k) for i in truth.unique()]
            assert recalls[f"image_to_text_r{k}"] == pytest.approx(np.mean(to_text))


def test_recall_without_ties_counts_sorted_lists():
    scores = torch.randn(30, 12, generator=torch.Generator().manual_seed(1))
    truth = torch.randint(0, 11, (30,), generator=torch.Generator().manual_seed(2))
    recalls = evaluation.recall_at(scores, truth, ks=(1, 3, 10))
    for k in (1, 3, 10):
        to_image = [truth[t] in scores[t].topk(k).indices for t in range(30)]
        to_text = [bool((truth[scores[:, i].topk(k).indices] == i).any()) for i in truth.unique()]
        assert recalls[f"text_to_image_r{k}"] == pytest.approx(np.mean(to_image))
        assert recalls[f"image_to_text_r{k}"] == pytest.approx(np.mean(to_text))


def test_a_scorer_that_tells_nothing_apart_gets_chance_and_no_number_ranks_last():
    truth = torch.arange(4)
    for constant in (0.0, math.nan):
        recalls = evaluation.recall_at(torch.full((4, 4), constant), truth, ks=(1, 3, 10))
        assert recalls == pytest.approx({name: min(1.0, int(name.split("_r")[1]) / 4) for name in recalls})
    assert set(evaluation.recall_at(torch.eye(4), truth, ks=(1,)).values()) == {1.0}
    assert set(evaluation.recall_at(-torch.eye(4), truth, ks=(1, 3)).values()) == {0.0}
    broken = torch.eye(4).masked_fill(torch.eye(4).bool(), math.nan)  # the true pairs have no number
    assert set(evaluation.recall_at(broken, truth, ks=(3,)).values()) == {0.0}


def test_bleu_by_hand():
    the = ["the", "cat", "is", "on", "the", "mat"], ["there", "is", "a", "cat", "on", "the", "mat"]
    assert evaluation.bleu([["the"] * 7], [the], longest=1) == pytest.approx(2 / 7)  # Papineni's example 2
    said, true = ["a", "b", "c", "d", "e", "f"], ["a", "b", "c", "d", "x", "f", "g"]
    value = (5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25
    assert evaluation.bleu([said], [[true]]) == pytest.approx(math.exp(1 - 7 / 6) * value)
    assert evaluation.bleu([said], [[true, ["z", "z", "z", "z", "z", "z"]]]) == pytest.approx(
        value
    )  # the nearer length
    assert evaluation.bleu([true], [[said]]) == pytest.approx(
        (5 / 7 * 3 / 6 * 2 / 5 * 1 / 4) ** 0.25
    )  # long: no penalty
    corpus = (5 + 5) / (6 + 7), (3 + 3) / (5 + 6), (2 + 2) / (4 + 5), (1 + 1) / (3 + 4)
    assert evaluation.bleu([said, true], [[true], [said]]) == pytest.approx(math.prod(corpus) ** 0.25)
    assert evaluation.bleu([["a", "b"]], [[["a", "b"]]]) == 0.0  # no 4-gram


def test_bleu_takes_all_references_and_the_nearest_length():
    words = ["a", "b", "c", "d", "e", "f"]
    short, long = ["a", "b", "x"], ["c", "d", "e", "f", "y", "y", "y"]
    # a reference of three words is shorter, but the one of seven is nearer to six; pieces come from both references
    assert evaluation.bleu([words], [[short, long]], longest=1) == pytest.approx(math.exp(1 - 7 / 6) * 6 / 6)
    assert evaluation.bleu([words], [[long, short]], longest=2) == pytest.approx(math.exp(1 - 7 / 6) * math.sqrt(4 / 5))
    # of five and seven words, equally near to six, the shorter counts: no penalty
    assert evaluation.bleu([words], [[long, words[:5]]], longest=1) == pytest.approx(6 / 6)
    # a word counts as often as in the reference that has it most often, not as often as in all together
    assert evaluation.bleu([["a"] * 4], [[["a", "a", "b", "b"], ["a", "b", "b", "b"]]], longest=1) == 2 / 4
    # the lengths of a corpus are summed before they are compared: 3 + 7 words against 4 + 6
    assert evaluation.bleu([["a"] * 3, ["b"] * 7], [[["a"] * 4], [["b"] * 6]], longest=1) == pytest.approx(9 / 10)


def some_captions(seed, pictures):
    """Random captions of a few words, like the references: ([words], [[words] * 1 to 5])."""
    rng = np.random.default_rng(seed)
    letters = np.array(list("aabcdefgh"))
    candidates = []
    references = []
    for _ in range(pictures):
        texts = [rng.choice(letters, rng.integers(1, 12)).tolist() for _ in range(rng.integers(1, 6))]
        references.append(texts)
        words = list(texts[0])
        words[rng.integers(len(words))] = "i"
        candidates.append(words)
    candidates[0] = []  # nothing was generated
    return candidates, references


def test_captions_have_the_numbers_of_the_published_code():
    """What pycocoevalcap 1.2 gives for these captions; the next test computes them where it is installed."""
    candidates, references = some_captions(0, pictures=40)
    metrics, _ = evaluation.caption_metrics(dict(enumerate(candidates)), dict(enumerate(references)))
    expected = {"bleu1": 0.8165051182, "bleu2": 0.7371268940, "bleu3": 0.6617167500, "bleu4": 0.5997470517}
    assert metrics == pytest.approx({**expected, "cider": 1.2316584891}, abs=1e-7)


def test_captions_are_measured_as_the_published_code_measures_them():
    bleu_scorer = pytest.importorskip("pycocoevalcap.bleu.bleu_scorer")
    cider_scorer = pytest.importorskip("pycocoevalcap.cider.cider_scorer")
    candidates, references = some_captions(0, pictures=40)
    bleu = bleu_scorer.BleuScorer(n=4)
    cider = cider_scorer.CiderScorer(n=4, sigma=6.0)
    for words, texts in zip(candidates, references, strict=True):
        bleu += (" ".join(words), [" ".join(text) for text in texts])
        cider += (" ".join(words), [" ".join(text) for text in texts])
    metrics, _ = evaluation.caption_metrics(dict(enumerate(candidates)), dict(enumerate(references)))
    for n, value in enumerate(bleu.compute_score(option="closest")[0], 1):
        assert metrics[f"bleu{n}"] == pytest.approx(value, abs=1e-7)
    assert metrics["cider"] == pytest.approx(cider.compute_score()[0], abs=1e-9)


def test_cider_by_hand():
    """Three pictures; "a" is in the references of all of them, so it counts nothing; "b" is in one's."""
    references = [[["a", "b"]], [["a", "c"]], [["a", "d"]]]
    # of picture 0 the unigram vectors (b) and the bigram vectors (a b) are alike, longer n-grams do not exist
    assert evaluation.cider_d([["a", "b"], ["x"], ["x"]], references) == pytest.approx(10 * (1 + 1) / 4 / 3)
    # two words more than the reference: g_c has b, e, f, of log 3 each; the bigrams are a b, b e, e f
    longer = evaluation.cider_d([["a", "b", "e", "f"], ["x"], ["x"]], references)
    cosine = 2 * 1 / math.sqrt(3)
    assert longer == pytest.approx(10 * math.exp(-(2**2) / (2 * 6**2)) * cosine / 4 / 3)
    # a word said twice counts once in the product, but twice in the norm: clipped
    twice = evaluation.cider_d([["b", "b"], ["x"], ["x"]], references)
    assert twice == pytest.approx(10 * (1 / 2) / 4 / 3)


def test_words_of_a_caption():
    assert evaluation.words_of("A man's T-shirt (red), isn't it?") == [
        "a",
        "man",
        "s",
        "t",
        "shirt",
        "red",
        "isn",
        "t",
        "it",
    ]
    assert evaluation.words_of("Café 3 + 4") == ["café", "3", "4"]
    assert evaluation.words_of("双肺清晰，CT正常。") == ["双", "肺", "清", "晰", "ct", "正", "常"]
    assert evaluation.join_ideographs("a ct : 双 肺 清 晰 , ok 正 常") == "a ct : 双肺清晰 , ok 正常"
    assert evaluation.words_of("हिन्दी में।") == ["हिन्दी", "में"]


def test_the_mean_recall_is_the_mean_of_all_six(drawn, tokenizer, monkeypatch):
    dataset = drawn("test", "retrieval", 20).encode(tokenizer)
    run = SimpleNamespace(args=SimpleNamespace(pool=15, captions="first", rerank=None))
    recalls = {"text_to_image_r1": 0.1, "image_to_text_r1": 0.2, "text_to_image_r5": 0.3}
    recalls |= {"image_to_text_r5": 0.4, "text_to_image_r10": 0.5, "image_to_text_r10": 0.9}
    pools = []

    def all_pairs(run, dataset, index, head):
        pools.append(len(index))
        return dict(recalls)

    monkeypatch.setattr(evaluation, "recall_of_all_pairs", all_pairs)
    metrics, chance = tasks.evaluate_retrieval(run, dataset)
    assert metrics["mean_recall"] == pytest.approx(0.4)
    assert chance["mean_recall"] == pytest.approx(2 * (1 + 5 + 10) / 15 / 6)
    assert pools == [15]
    # a large matrix is not filled where two stages are asked for
    monkeypatch.setattr(evaluation, "LARGE_MATRIX", 15 * 15 - 1)
    monkeypatch.setattr(evaluation, "two_stage", lambda *_: dict.fromkeys(recalls, 0.7))
    assert tasks.evaluate_retrieval(run, dataset)[0]["mean_recall"] == pytest.approx(0.4)
    run.args.rerank = 5
    assert tasks.evaluate_retrieval(run, dataset)[0]["mean_recall"] == pytest.approx(0.7)


def test_reasons_of_unlabelled_questions_have_no_truth():
    """A reason is right for the right answer alone. Without it, as in VCR's test, each answer gets its reasons."""
    record = {"id": "", "text": "why?", "choices": ["a", "b"], "reasons": ["x", "y"], "reason": 1}
    assert [example.target for example in tasks.vcr_examples(record)] == [-1, -1, -1]
    assert [example.target for example in tasks.vcr_examples({**record, "label": 0})] == [0, 1]


def test_the_perplexity_of_a_model_that_diverged_is_a_number(monkeypatch):
    batch = SimpleNamespace(word_index=[0, 1])
    monkeypatch.setattr(tasks, "evaluation_batches", lambda *_: [np.arange(2)])
    monkeypatch.setattr(tasks, "make_batch", lambda *_: batch)
    monkeypatch.setattr(tasks, "loss_and_logits", lambda *_: (torch.tensor(1e4), None))
    assert 1e300 < tasks.caption_perplexity(None, None, np.arange(2)) < math.inf
    monkeypatch.setattr(tasks, "loss_and_logits", lambda *_: (torch.tensor(math.nan), None))
    assert math.isnan(tasks.caption_perplexity(None, None, np.arange(2)))
    assert evaluation.format_value("perplexity", 1e304) == "1.00e+304"
    assert evaluation.format_value("perplexity", 12.34567) == "12.3457"


def test_pretraining_that_nothing_measures_has_no_best_weights():
    assert evaluation.pretraining_score({"text_to_image_r1": 0.5})[0] == -math.inf
    assert evaluation.pretraining_score({"mrfr_loss": 2.0, "wra_loss": 0.5})[0] == -2.5
    assert evaluation.pretraining_score({"mrfr_loss": 2.0, "itm_accuracy": 0.5})[0] == 0.5


def many_captions(split, pictures):
    """A dataset of a question and two captions of each picture, without any text. Captions may be of any kind."""
    image = np.repeat(np.arange(pictures), 3)
    kind = ["question", "long", "caption"] * pictures
    answer = [{"yes": 1.0}, {}, {}] * pictures
    return data.Dataset("", split, None, image, [""] * len(image), answer, kind, [""] * len(image))


def test_which_examples_are_evaluated():
    """Of retrieval and captions the first caption of each picture: of 100 pictures on val, else of --pool; of retrieval
    1000 at most. With --captions all retrieval is tested on every caption of these pictures."""
    run = SimpleNamespace(args=SimpleNamespace(pool=120, captions="first"))
    for name, split, pool, expected in (
        ("vqa", "test", 120, range(3 * 150)),
        ("retrieval", "test", 120, range(1, 3 * 120, 3)),
        ("retrieval", "val", 120, range(1, 3 * 100, 3)),
        ("retrieval", "val", 20, range(1, 3 * 100, 3)),
        ("retrieval", "test", 9999, range(1, 3 * 150, 3)),
        ("caption", "test", 120, range(1, 3 * 120, 3)),
        ("caption", "val", 120, range(1, 3 * 100, 3)),
    ):
        run.args.pool = pool
        assert tasks.examples_to_evaluate(run, name, many_captions(split, 150)).tolist() == list(expected), (
            name,
            split,
            pool,
        )
    run.args.pool = 9999
    assert len(tasks.examples_to_evaluate(run, "retrieval", many_captions("test", 1100))) == 1000
    assert len(tasks.examples_to_evaluate(run, "pretrain", many_captions("test", 1100))) == 1000
    assert tasks.examples_to_evaluate(run, "pretrain", many_captions("test", 150)).tolist() == list(range(1, 450, 3))
    assert len(tasks.examples_to_evaluate(run, "caption", many_captions("test", 1100))) == 1100
    run.args = SimpleNamespace(pool=120, captions="all")
    every = [i for i in range(3 * 120) if i % 3 != 0]  # without the questions
    assert tasks.examples_to_evaluate(run, "retrieval", many_captions("test", 150)).tolist() == every
    assert tasks.examples_to_evaluate(run, "retrieval", many_captions("val", 150)).tolist() == list(
        range(1, 3 * 100, 3)
    )
    assert tasks.examples_to_evaluate(run, "caption", many_captions("test", 150)).tolist() == list(range(1, 3 * 120, 3))


def test_chance_of_retrieval_counts_draws():
    """Of guessing: a caption has one right picture; a picture with t of n captions misses in C(n - t, k) / C(n, k)."""
    pictures = np.repeat([30, 10, 20, 40], [5, 5, 2, 1])
    names = [f"itc_{way}_r{k}" for way in ("text_to_image", "image_to_text") for k in (1, 5, 10)]
    chance = evaluation.recall_chance(dict.fromkeys(names, 0.0), pictures)
    for k in (1, 5, 10):
        assert chance[f"itc_text_to_image_r{k}"] == pytest.approx(min(1, k / 4))
        found = [1 - math.comb(13 - t, k) / math.comb(13, k) for t in (5, 5, 2, 1)]
        assert chance[f"itc_image_to_text_r{k}"] == pytest.approx(np.mean(found))


@pytest.mark.parametrize(("split", "expected"), [("val", 1), ("test", 5)])
def test_captions_are_scored_with_beams_in_the_test_alone(split, expected, drawn, tokenizer, monkeypatch):
    dataset = drawn(split, "caption", 20).encode(tokenizer)
    args = SimpleNamespace(ablate=None, beams=5, consensus=False, max_words=50)
    run = SimpleNamespace(args=args, tokenizer=tokenizer, model="a model")
    run.device, run.autocast = torch.device("cpu"), train.nullcontext
    ends = (tokenizer.token_to_id("[CLS]"), tokenizer.token_to_id("[SEP]"))

    def generate(model, batch, first, last, beams, most):
        assert (model, len(batch.text), first, last, beams) == ("a model", 3, *ends, expected)
        assert most == 48  # as in training: [CLS] and [SEP] count
        return [[(dataset.tokens[1:3].tolist(), -1.0)]] * 3

    monkeypatch.setattr(evaluation, "generate", generate)
    monkeypatch.setattr(tasks, "examples_to_evaluate", lambda run, task, dataset: np.arange(3))
    monkeypatch.setattr(tasks, "evaluation_batches", lambda run, dataset, index: [np.arange(3)])
    monkeypatch.setattr(tasks, "caption_perplexity", lambda run, dataset, examples: 1.0)
    run.optimizer = "while it is trained"
    tasks.evaluate_captions(run, dataset)
    expected = 5
    run.optimizer = None  # predict.py scores the captions that it writes
    tasks.evaluate_captions(run, dataset)
    text = tokenizer.decode(dataset.tokens[1:3].tolist())
    assert tasks.generate_captions(run, dataset, np.arange(3)) == [text] * 3
    rows = iter(dataset.image[:3])

    def choose(neighbours, vector, texts):
        assert neighbours == "captions" and texts == [(text, -1.0)]
        assert torch.equal(vector, consensus.picture_vectors(dataset.store, [next(rows)])[0])
        return "the chosen text"

    monkeypatch.setattr(consensus, "choose", choose)
    assert tasks.generate_captions(run, dataset, np.arange(3), 5, "captions") == ["the chosen text"] * 3


def test_generated_chinese_has_no_blanks(drawn, tokenizer, monkeypatch):
    dataset = drawn("test", "caption", 20).encode(tokenizer)
    words = SimpleNamespace(decode=lambda pieces: "双 肺 清 晰 .", token_to_id=tokenizer.token_to_id)
    run = SimpleNamespace(args=SimpleNamespace(ablate=None, beams=1, max_words=50), tokenizer=words, model=None)
    run.device, run.autocast = torch.device("cpu"), train.nullcontext
    monkeypatch.setattr(evaluation, "generate", lambda *_, most: [[([1, 2], -1.0)]])
    assert tasks.generate_captions(run, dataset, np.arange(1)) == ["双肺清晰 ."]


def test_pretraining_is_evaluated_on_one_caption_a_picture_and_chance_is_the_usual_label(monkeypatch):
    dataset = many_captions("val", 150)
    run = SimpleNamespace(objectives={"itm": 1, "mrfr": 1, "qa": 1, "itc": 1}, content_words=[], paper=lxmert)
    seen = {}

    def sums(run, dataset, index, name):
        seen[name] = index.tolist()
        labels = Counter({1: 30, 0: 10}) if name == "itm" else Counter()
        return evaluation.ObjectiveSums(loss=8.0, items=16, hits=25, labels=labels)

    def all_pairs(run, dataset, index, head):
        seen["all pairs"] = index.tolist()
        return {"text_to_image_r5": 0.5}

    def dot_products(run, dataset, index, images):
        assert (images == dataset.image[index]).all()
        return torch.eye(len(index))

    monkeypatch.setattr(tasks, "objective_sums", sums)
    monkeypatch.setattr(evaluation, "recall_of_all_pairs", all_pairs)
    monkeypatch.setattr(evaluation, "dot_products", dot_products)
    metrics, chance = tasks.evaluate_pretraining(run, dataset)
    assert seen["itm"] == seen["mrfr"] == seen["itc"] == list(range(1, 450, 3))
    assert seen["qa"] == list(range(0, 450, 3))
    assert seen["all pairs"] == list(range(1, 300, 3))  # a hundred pictures
    assert metrics["itm_loss"] == metrics["mrfr_loss"] == 0.5 and "mrfr_accuracy" not in metrics
    assert (metrics["itm_accuracy"], chance["itm_accuracy"]) == (25 / 40, 30 / 40)
    assert (metrics["text_to_image_r5"], chance["text_to_image_r5"]) == (0.5, pytest.approx(0.05))
    assert (metrics["itc_image_to_text_r1"], chance["itc_image_to_text_r1"]) == (1.0, pytest.approx(0.01))
    monkeypatch.setattr(evaluation, "recall_of_all_pairs", lambda *_: {})
    monkeypatch.setattr(tasks, "MOST_PRETRAINING", 7)
    tasks.evaluate_pretraining(run, dataset)
    assert seen["itm"] == list(range(1, 21, 3)) and seen["qa"] == list(range(0, 21, 3))


def test_content_words_are_tested_in_every_caption_of_the_pictures(monkeypatch):
    dataset = many_captions("test", 50)
    run = SimpleNamespace(objectives={"mlm": 1}, content_words=["red"], paper=uniter)
    seen = []
    monkeypatch.setattr(tasks, "content_pieces", lambda run: None)
    monkeypatch.setattr(tasks, "objective_sums", lambda *given: seen.append(given[2]) or evaluation.ObjectiveSums())
    tasks.evaluate_pretraining(run, dataset)
    captions, every = seen
    assert captions.tolist() == list(range(1, 150, 3))
    assert every.tolist() == [i for i in range(150) if i % 3]  # each picture has a question and two captions


def test_contrast_is_tested_among_the_pictures_that_the_command_line_says(monkeypatch):
    """On val among a hundred, each with its first caption. In the test among --pool, with all of their captions."""
    run = SimpleNamespace(objectives={"itc": 1}, content_words=[], paper=uniter)
    run.args = SimpleNamespace(pool=120, captions="all")
    sizes = []

    def dot_products(run, dataset, texts, images):
        sizes.append((len(texts), len(images)))
        return (dataset.image[texts][:, None] == images).astype(float) @ np.eye(len(images))

    monkeypatch.setattr(tasks, "objective_sums", lambda *_: evaluation.ObjectiveSums())
    monkeypatch.setattr(evaluation, "dot_products", lambda *args: torch.from_numpy(dot_products(*args)))
    for split in ("val", "test"):
        metrics, chance = tasks.evaluate_pretraining(run, many_captions(split, 150))
        assert metrics["itc_text_to_image_r1"] == metrics["itc_image_to_text_r1"] == 1.0
        assert chance["itc_text_to_image_r1"] == pytest.approx(1 / sizes[-1][1])
    assert sizes == [(100, 100), (240, 120)]


def test_evaluation_runs_in_eval_mode_and_without_gradients(monkeypatch):
    model = torch.nn.Dropout(0.5).train()
    seen = []

    def evaluate(run, dataset):
        seen.append((run.model.training, torch.is_inference_mode_enabled()))
        return {"accuracy": 0.5}, {"accuracy": 0.1}

    monkeypatch.setitem(tasks.TASKS, "vqa", dataclasses.replace(tasks.VQA, evaluate=evaluate))
    run = SimpleNamespace(model=model, sets={"vqa": {"val": None}})
    assert tasks.evaluate(run, "val") == ({"accuracy": 0.5}, {"accuracy": 0.1})
    assert seen == [(False, True)]
    assert tasks.evaluate(run, "test") == ({}, {})


@pytest.mark.parametrize("name", PAPERS)
def test_half_of_the_pairs_are_mismatched_in_evaluation_for_every_model(drawn, name, tokenizer, monkeypatch):
    """LXMERT trains with a quarter. The itm accuracy of a model that says "match" to all is chance, one half."""
    dataset = drawn("train", "caption", 60).encode(tokenizer)
    run = SimpleNamespace(args=SimpleNamespace(ablate=None, mask=0.15), paper=checkpoints.MODELS[name])
    run.rank, run.world, run.answers, run.tokenizer, run.device = 0, 1, [], tokenizer, torch.device("cpu")

    def always_match(run, batch, name):
        return torch.tensor(0.7), torch.tensor([[0.0, 1.0]]).expand(len(batch.text), 2)

    monkeypatch.setattr(tasks, "loss_and_logits", always_match)
    sums = tasks.objective_sums(run, dataset, np.arange(len(dataset)), "itm")
    assert sums.items == sums.labels.total() == len(dataset) > 300
    assert sums.hits == sums.labels[1]
    assert abs(sums.hits / len(dataset) - 0.5) < 4 * math.sqrt(0.25 / len(dataset))
    assert sums.loss == pytest.approx(0.7 * len(dataset), rel=1e-6)
    again = tasks.objective_sums(run, dataset, np.arange(len(dataset)), "itm")
    assert again == sums  # the same pairs at every evaluation


def test_evaluation_draws_the_same_negatives_and_none_of_training_s_numbers(drawn, tokenizer):
    """Objective `nce` draws its negatives by torch's generator, as dropout does."""
    dataset = drawn("train", "caption", 20).encode(tokenizer)
    sizes = {"vocab_size": tokenizer.get_vocab_size(), "feature_size": dataset.store.width, "heads": ("mrfr",)}
    run = SimpleNamespace(args=SimpleNamespace(ablate=None, mask=0.15), paper=vilbert, autocast=train.nullcontext)
    run.rank, run.world, run.answers, run.tokenizer, run.device = 0, 1, [], tokenizer, torch.device("cpu")
    run.model = vilbert.MODEL(vilbert.Config(**vilbert.PRESETS["tiny"] | sizes)).eval()
    before = torch.get_rng_state()
    with torch.inference_mode():
        first = tasks.objective_sums(run, dataset, np.arange(20), "nce")
        assert torch.equal(torch.get_rng_state(), before)
        torch.rand(3)
        assert tasks.objective_sums(run, dataset, np.arange(20), "nce") == first


def test_an_answer_and_its_reason_belong_together_even_if_lines_have_equal_ids(monkeypatch):
    """Two lines, an answer and its reason each, evaluated in another order."""
    dataset = type("D", (SimpleNamespace,), {"__len__": lambda self: 4})(
        target=np.array([0, 0, 1, 1]), kind=["answer", "reason"] * 2, ids=["movie"] * 4, group=2
    )
    monkeypatch.setattr(tasks, "evaluation_batches", lambda run, dataset, index: [index[[3, 1]], index[[0, 2]]])
    monkeypatch.setattr(tasks, "make_batch", lambda run, dataset, index, names, rng: index)
    scores = {0: [1.0, 0.0], 1: [1.0, 0.0], 2: [1.0, 0.0], 3: [0.0, 1.0]}  # only the second answer is wrong
    monkeypatch.setattr(
        tasks, "loss_and_logits", lambda run, index, name: (None, torch.tensor([scores[i] for i in index]).flatten())
    )
    metrics, _ = tasks.evaluate_vcr(None, dataset)
    assert metrics == {"q_a_accuracy": 0.5, "qa_r_accuracy": 1.0, "q_ar_accuracy": 0.5}


def test_choices_are_scored_as_counted_by_hand(monkeypatch):
    dataset = SimpleNamespace(
        target=np.array([0, 1, 0, 0]), kind=["answer", "reason"] * 2, ids=["a", "a", "b", "b"], group=2
    )
    dataset = type("D", (SimpleNamespace,), {"__len__": lambda self: 4})(**vars(dataset))
    monkeypatch.setattr(tasks, "evaluation_batches", lambda run, dataset, index: [index])
    monkeypatch.setattr(tasks, "make_batch", lambda *_: None)
    scores = torch.tensor([2.0, 1, 0, 1, 0, 1, 3, 1])  # right, right, wrong, right
    monkeypatch.setattr(tasks, "loss_and_logits", lambda *_: (None, scores))
    metrics, chance = tasks.evaluate_vcr(None, dataset)
    assert metrics == {"q_a_accuracy": 0.5, "qa_r_accuracy": 1.0, "q_ar_accuracy": 0.5}
    assert chance == {"q_a_accuracy": 0.5, "qa_r_accuracy": 0.5, "q_ar_accuracy": 0.25}
    metrics, chance = tasks.evaluate_nlvr2(None, dataset)
    assert metrics == {"accuracy": 0.75, "accuracy_answer": 0.5, "accuracy_reason": 1.0}
    assert chance == {"accuracy": 0.75, "accuracy_answer": 1.0, "accuracy_reason": 0.5}


def test_regions_are_right_above_one_half(drawn, tokenizer, monkeypatch):
    dataset = drawn("detected", "refer", 40).encode(tokenizer)
    run = SimpleNamespace(args=SimpleNamespace(ablate=None), rank=0, world=1, paper=uniter, answers=[])
    best, chance, overlaps = [], [], []
    for i in range(len(dataset)):
        boxes = dataset.store.gather(dataset.image[i : i + 1])["boxes"][0]
        overlap = [float(evaluation.iou(box, torch.tensor(dataset.target[i]).float())) for box in boxes]
        best.append(int(np.argmax(overlap)))
        overlaps.append(overlap)
        chance.append(np.mean([o > 0.5 for o in overlap]))

    def scores_of(run, batch, name):
        return None, torch.nn.functional.one_hot(batch.target.argmax(1), batch.boxes.shape[1]).float()

    monkeypatch.setattr(tasks, "loss_and_logits", scores_of)
    metrics, found = tasks.evaluate_refer(run, dataset)
    assert metrics["accuracy"] == metrics["reachable"] == 1.0 and found["accuracy"] == pytest.approx(np.mean(chance))
    batch = tasks.make_batch(run, dataset, np.arange(len(dataset)), ["refer"], None)
    assert batch.target.argmax(1).tolist() == best
    for row, overlap, real in zip(batch.target, overlaps, batch.region_mask, strict=True):
        assert row[real].tolist() == pytest.approx(overlap) and (row[~real] < 0).all()
    monkeypatch.setattr(tasks, "loss_and_logits", lambda *a: (None, -scores_of(*a)[1]))  # any wrong region, or padding
    assert tasks.evaluate_refer(run, dataset)[0]["accuracy"] < 0.1


@pytest.mark.parametrize("name", PAPERS)
def test_the_matrix_of_all_pairs_equals_scoring_each_pair(drawn, name, tokenizer, monkeypatch):
    """Texts in any order, several of one picture, one picture whose texts are all left out."""
    dataset = drawn("train", "retrieval", 40).encode(tokenizer)
    pictures = np.unique(dataset.image)[[0, 1, 3]]
    texts = np.flatnonzero(np.isin(dataset.image, pictures))
    texts = np.random.default_rng(0).permutation(texts)[:10]
    assert len(np.unique(dataset.image[texts])) == 3
    model = make(name, heads=("rank",), vocab_size=tokenizer.get_vocab_size(), feature_size=432).float()
    run = SimpleNamespace(model=model, device=torch.device("cpu"), autocast=train.nullcontext, rank=0, world=1)
    run.args, seen = SimpleNamespace(ablate=None), []
    monkeypatch.setattr(evaluation, "recall_at", lambda *given: seen.extend(given))
    with torch.no_grad():
        evaluation.recall_of_all_pairs(run, dataset, texts, "rank")
        scores, truth = seen
        assert (pictures[truth] == dataset.image[texts]).all()
        for i, j in itertools.product(range(10), range(3)):
            batch = data.collate(dataset, texts[[i]], pictures[[j]])
            assert float(model.heads["rank"](model.encode(batch).pooled)) == pytest.approx(
                float(scores[i, j]), abs=1e-4
            )


def test_recalls_of_five_captions_a_picture_equal_counting(drawn, tokenizer, monkeypatch):
    """The published protocol by brute force: every caption looks for its picture; a picture is found by any of its
    captions. Of the full matrix and of dot products alone; random scores, some of them equal."""
    rng = np.random.default_rng(0)
    dataset = data.Dataset(
        "", "test", None, np.repeat(np.arange(30, 42), 5), [""] * 60, [{}] * 60, ["c"] * 60, [""] * 60
    )
    run = SimpleNamespace(
        args=SimpleNamespace(pool=10, captions="all", rerank=60, model="uniter"), model=torch.nn.Module()
    )
    scores = torch.from_numpy(rng.integers(0, 8, (60, 12)).astype(float))

    def full(run, dataset, texts, head):
        pictures, truth = np.unique(dataset.image[texts], return_inverse=True)
        return evaluation.recall_at(scores[texts][:, pictures - 30], torch.from_numpy(truth))

    monkeypatch.setattr(evaluation, "recall_of_all_pairs", full)
    monkeypatch.setattr(
        evaluation, "dot_products", lambda run, dataset, texts, pictures: -scores[texts][:, pictures - 30]
    )
    monkeypatch.setattr(
        evaluation, "score_pairs", lambda run, dataset, texts, pictures, head: scores[texts, pictures - 30]
    )
    result, text = evaluation.compare_stages(run, dataset, "itm")
    assert (result["pool"], result["captions"], result["rerank"]) == (10, 50, 60) and "chance" in text
    for stage, sign in (("full", 1), ("dot", -1), ("two_stage", 1)):  # 60 of each query are all that there are
        ties = rng.uniform(0, 0.5, (2000, 50, 10))  # scores are whole numbers: 2000 times equal ones in random order
        order = sign * scores[:50, :10].numpy() + ties
        right = order[:, np.arange(50), np.arange(50) // 5]  # (draws, captions)
        text_rank = (order > right[:, :, None]).sum(2)
        best = right.reshape(2000, 10, 5).max(2)  # of a picture's five captions: (draws, pictures)
        image_rank = (order > best[:, None]).sum(1)
        for k in (1, 5, 10):
            found = {"text_to_image": text_rank < k, "image_to_text": image_rank < k}
            for way, shares in found.items():
                assert result[f"{stage}_{way}_r{k}"] == pytest.approx(np.mean(shares), abs=0.012), (stage, way, k)


def test_the_time_of_a_full_matrix_is_extrapolated_from_the_pairs_that_were_scored(monkeypatch):
    """12 pictures of 5 captions each: a sample of 200 pictures has only 12. A pair takes a second."""
    dataset = data.Dataset("", "test", None, np.repeat(np.arange(12), 5), [""] * 60, [{}] * 60, ["c"] * 60, [""] * 60)
    args = SimpleNamespace(pool=12, captions="all", rerank=5, model="uniter")
    run = SimpleNamespace(args=args, model=torch.nn.Module())
    clock = [0.0]

    def full(run, dataset, texts, head):
        clock[0] += len(texts) * len(np.unique(dataset.image[texts]))
        return {}

    monkeypatch.setattr(evaluation, "LARGE_MATRIX", 60 * 12 - 1)
    monkeypatch.setattr(evaluation.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(evaluation, "recall_of_all_pairs", full)
    monkeypatch.setattr(evaluation, "dot_products", lambda run, dataset, texts, pictures: torch.zeros(60, 12))
    monkeypatch.setattr(evaluation, "two_stage", lambda *_: {})
    result, text = evaluation.compare_stages(run, dataset, "itm")
    assert clock == [144] and result["full_seconds"] == 60 * 12
    assert "extrapolated from 12 x 12" in text


@pytest.mark.parametrize("head", ["rank", "itm"])
def test_pairs_are_ranked_in_float32_whatever_autocast_does(head):
    torch.manual_seed(0)
    pooled = 1 + 0.01 * torch.randn(200, 16)  # pairs that are nearly alike, as those of a model at its start
    for paper in checkpoints.MODELS.values():
        model = torch.nn.Module()
        widths = SimpleNamespace(hidden=16, shared=16)
        model.heads = torch.nn.ModuleDict({head: paper.HEADS[head](widths)})
        plain = evaluation.match_logits(model, pooled, head)
        with torch.autocast("cpu", torch.bfloat16):
            cast = evaluation.match_logits(model, pooled, head)
            half = evaluation.match_logits(model, pooled.bfloat16(), head)
        assert torch.equal(plain, cast)
        assert len(half.unique()) > 150


def test_a_caption_repeated_word_for_word_has_bleu_1(drawn, tokenizer, monkeypatch):
    dataset = drawn("val", "caption", 30).encode(tokenizer)
    index = evaluation.first_captions(dataset)
    run = SimpleNamespace(
        args=SimpleNamespace(ablate=None, beams=1, consensus=False, pool=30, max_words=60),
        rank=0,
        world=1,
        paper=uniter,
        tokenizer=tokenizer,
    )
    run.model, run.device, run.autocast, run.answers = None, torch.device("cpu"), train.nullcontext, []
    run.optimizer = None
    pieces = [dataset.tokens[a + 1 : b - 1].tolist() for a, b in itertools.pairwise(dataset.offsets)]
    monkeypatch.setattr(tasks, "loss_and_logits", lambda *_: (torch.tensor(0.0), None))
    # the first caption of each picture, and its last one: every caption of the picture is a reference
    last = len(dataset) - 1 - np.unique(dataset.image[::-1], return_index=True)[1]
    assert (dataset.image[last] == dataset.image[index]).all() and (last > index).all()
    for repeated in (index, last):
        caption_of = dict(zip(dataset.image[index].tolist(), repeated.tolist(), strict=True))
        turn = iter(tasks.evaluation_batches(run, dataset, index))

        def generate(*_, most, caption_of=caption_of, turn=turn):
            return [[(pieces[caption_of[int(dataset.image[i])]], -1.0)] for i in next(turn)]

        monkeypatch.setattr(evaluation, "generate", generate)
        metrics, chance = tasks.evaluate_captions(run, dataset)
        assert metrics["bleu4"] == 1.0 > chance["bleu4"]


@pytest.mark.parametrize("task", [task for task in tasks.TASKS if task not in ("pretrain", "vqa")])
def test_a_task_s_batch_can_be_pinned_and_names_its_examples(drawn, task, tokenizer):
    """Page-locked memory has no place for tensors that repeat a row without holding it (a stride of 0)."""
    dataset = drawn("train", task, 20).encode(tokenizer)
    run = SimpleNamespace(
        args=SimpleNamespace(ablate=None, mine=1, steps=10), paper=uniter, sets={task: {"train": dataset}}
    )
    run.model, run.progress = make("uniter", heads=("rank",)), {"step": 0}
    run.answer_columns = lambda name="vqa": dict.fromkeys(data.ENTAILMENT, 0)
    name = tasks.TASKS[task].objective
    batch = tasks.make_batch(run, dataset, np.arange(4), [name], np.random.default_rng(0))
    assert len(batch.ids) == 4
    for field in dataclasses.fields(batch):
        if isinstance(tensor := getattr(batch, field.name), torch.Tensor):
            assert all(stride > 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1), (
                field
            )


@pytest.mark.parametrize("name", ["mlm", "itm", "itc", "vqa", "ve", "nlvr2", "caption", "retrieval", "vcr", "refer"])
def test_training_shows_a_random_crop_of_each_picture(drawn, name, tokenizer):
    """Of three rows of the store, the picture and two crops, each is drawn as often. refer, whose target is a place in
    the picture, shows the whole."""
    task = name if name in tasks.TASKS else "pretrain"
    dataset = drawn("train", task, 60).encode(tokenizer)
    dataset.image = 3 * dataset.image
    dataset.pairs = None  # of the old rows
    pictures = []
    for row in range(3 * len(dataset.store)):
        features = np.full((2, 4), row, np.float32)
        pictures.append({"features": features, "boxes": np.tile([0, 0, 1, 1], (2, 1)), "size": (9, 9)})
    dataset.store = regions.MemoryStore(pictures)
    dataset.store.crops = np.array([2, 0, 0] * (len(pictures) // 3))
    args = SimpleNamespace(ablate=None, mine=1, steps=10, mask=0.15, seed=0)
    run = SimpleNamespace(
        args=args, paper=uniter, tokenizer=tokenizer, answers=["yes"], sets={task: {"train": dataset}}
    )
    run.model, run.progress = make("uniter", heads=("rank",)), {"step": 0}
    run.answer_columns = lambda: {"yes": 0}
    objective = tasks.TASKS[name].objective if name in tasks.TASKS else name

    def shown(stream):
        batch = tasks.make_batch(run, dataset, np.arange(len(dataset)), [objective], stream)
        rows = batch.features.amax((1, 2)).long()
        assert torch.equal(rows // 3 * 3, batch.pictures)  # a crop counts as its picture
        return (rows % 3).tolist()

    views = []
    for seed in range(8):
        views += shown(np.random.default_rng(seed))
    assert shown(np.random.default_rng(0)) == shown(np.random.default_rng(0))
    shares = [views.count(view) / len(views) for view in range(3)]
    if name == "refer":
        assert shares == [1, 0, 0]
    else:
        assert max(abs(share - 1 / 3) for share in shares) < 4 * (2 / 9 / len(views)) ** 0.5
    if name not in ("mlm", "itm", "retrieval"):  # these draw masks or mismatched pairs, so they need a stream
        assert set(shown(None)) == {0}
    dataset.split = "test"
    assert set(shown(np.random.default_rng(0))) == {0}


@pytest.mark.parametrize("name", PAPERS)
def test_no_step_waits_for_a_value(drawn, small_scenes, name, tokenizer):
    """A GPU that is asked for a value must first do all that it was given. On the device "meta" tensors have no values:
    whoever asks for one fails. All objectives that train.py trains, forward and backward."""
    paper = checkpoints.MODELS[name]
    args = options.parse(["--model", name, "--data", str(small_scenes(20))])
    args = options.resolve_options(args, name, 0)
    pretraining = [name for name, row in paper.OBJECTIVES.items() if row.pretraining]
    trained = dict.fromkeys(pretraining, "vqa")  # on the scenes of questions, whose texts have answers
    trained |= {tasks.TASKS[task].objective: task for task in tasks.TASKS if task != "pretrain"}
    sets = {task: drawn("train", task, 20).encode(tokenizer) for task in trained.values()}
    run = SimpleNamespace(args=args, paper=paper, tokenizer=tokenizer, answers=["red"], progress={"step": 0})
    run.answer_columns = lambda task="vqa": dict.fromkeys(data.ENTAILMENT if task == "ve" else run.answers, 0)
    sizes = {
        **paper.PRESETS["tiny"],
        **ONE_LAYER,
        "dropout": 0.1,
        "vocab_size": tokenizer.get_vocab_size(),
        "classes": 7,
    }
    sizes |= {"attributes": 8, "answers": 1, "types": 4, "feature_size": sets["vqa"].store.width}
    known = {field.name for field in dataclasses.fields(paper.Config)}
    config = paper.Config(**{k: v for k, v in sizes.items() if k in known}, heads=tasks.heads_for(paper, trained))
    with torch.device("meta"):
        run.model = paper.MODEL(config)
    for objective, task in trained.items():
        batch = tasks.make_batch(run, sets[task], np.arange(8), [objective], np.random.default_rng(0))
        loss, _ = run.model(batch.to("meta"), [objective])[objective]
        loss.backward()


def test_check_reads_every_split(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    scenes.draw_scene(scenes.make_scene(0, "train", 0)).save("0.png")
    line = {"image": "0.png", "text": "which?", "choices": ["a", "b"], "label": 0}
    lines = [line, {**line, "split": "val"}, {**line, "choices": ["a", "b", "c"], "split": "test"}]
    Path("own.jsonl").write_text("\n".join(map(json.dumps, [*lines, {**line, "split": "test"}])))
    with pytest.raises(common.UserError, match="mistakes: 1"):
        data.check("own.jsonl", tasks.TASKS["vcr"], vocab=None, max_words=60, patch=12, grid=6)
    assert "choices" in capsys.readouterr().err


def test_tasks_trained_together_need_features_of_one_width(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    scenes.draw_scene(scenes.make_scene(0, "train", 0)).save("0.png")
    np.savez(
        "0.npz", features=np.ones((2, 7)), boxes=np.array([[0, 0, 9, 9], [5, 5, 20, 20]]), size=np.array([112, 112])
    )
    for key, file in (("image", "0.png"), ("features", "0.npz")):
        line = {key: file, "text": "is it red?", "answer": "yes"}
        Path(f"{key}.jsonl").write_text("\n".join(json.dumps({**line, "split": s}) for s in ("train", "val")))
    assert train.main(["--task", "vqa,caption", "--data", "image.jsonl,features.jsonl"]) == 2
    assert "features of widths 7 and 432" in capsys.readouterr().err


# ---- the command line ------------------------------------------------------------------------------------------

QUICK = ["--steps", "2", "--batch-size", "8", "--log-every", "1", "--dtype", "f32", "--device", "cpu"]
QUICK += ["--eval-every", "2"]
SIX = "ve,nlvr2,vcr,retrieval,refer,caption"
COUNTS = {"train": 40, "val": 12, "test": 12, "compose": 12}  # pictures of the drawn scenes


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tasks")


def start(folder, monkeypatch, *arguments):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(scenes, "COUNTS", COUNTS)
    return train.main(narrow(with_pool([*QUICK, *arguments], 10)))


@pytest.mark.parametrize("name", PAPERS)
def test_six_tasks_at_once_and_what_their_checkpoint_says(name, folder, monkeypatch, capsys):
    options = ["--model", name, "--task", SIX, "--steps", 12, "--eval-every", 12, "--batch-size", 4]
    assert start(folder, monkeypatch, *options, "--out", name) == 0
    printed = capsys.readouterr().out
    result = json.loads((folder / name / "result.json").read_text())
    for metric in [
        "ve_accuracy",
        "nlvr2_accuracy",
        "vcr_q_a_accuracy",
        "vcr_q_ar_accuracy",
        "retrieval_text_to_image_r1",
        "refer_accuracy",
        "caption_bleu4",
        "detected_refer_accuracy",
        "compose_ve_accuracy",
    ]:
        assert 0 <= result[metric] <= 1 and 0 <= result["chance"][metric] <= 1
    assert result["caption_perplexity"] > 1 and "detected" in printed
    for i in (0, 1):
        scenes.draw_scene(scenes.make_scene(0, "test", i)).save(folder / f"{i}.png")
    boxes = ["--boxes", "[[0,0,40,40],[30,30,90,90],[50,0,80,30]]"]
    for task, more, pattern in (
        ("ve", [], r"\w+ 0\.\d+  \w+ 0\.\d+  \w+ 0\.\d+"),
        ("nlvr2", ["--image", "1.png"], r"(true|false) [01]\.\d+  (true|false) [01]\.\d+"),
        ("vcr", ["--choices", "red", "blue"], r"(red|blue) 0\.\d+  (red|blue) 0\.\d+"),
        ("vcr", ["--choices", "x", "y", "z", "--answer", "red", "--top", "1"], r"[xyz] 0\.\d+"),
        ("retrieval", ["--image", "1.png"], r"0.png: match 0\.\d+\n1.png: match 0\.\d+"),
        ("refer", boxes, r"(\[\d+, \d+, \d+, \d+\] [01]\.\d+(  )?){3}"),
        ("caption", ["--beams", "2"], r"[^\n]*"),
    ):
        text = [] if task == "caption" else ["--text", "red circle"]
        code = predict.main([f"{name}/checkpoint.pt", "--task", task, "--image", "0.png", *text, *more])
        printed = capsys.readouterr()
        assert code == 0 and re.fullmatch(pattern, printed.out.removesuffix("\n")), (task, printed)


@pytest.mark.parametrize("task", [*SIX.split(","), "vqa"])
def test_each_task_alone_from_a_pretrained_model(task, folder, monkeypatch, capsys):
    if not (folder / "pre/checkpoint.pt").exists():
        assert start(folder, monkeypatch, "--out", "pre") == 0
    assert start(folder, monkeypatch, "--task", task, "--init", "pre/checkpoint.pt", "--out", task) == 0
    printed = capsys.readouterr().out
    assert "pre/checkpoint.pt: a checkpoint" in printed and "chance" in printed
    assert json.loads((folder / task / "result.json").read_text())["task"] == task
    if task in ("retrieval", "caption"):  # of --pool pictures, however many captions there are
        assert "split test, 10 examples" in printed
    if task == "retrieval":  # zero-shot at step 0, before any training: what the matching head says
        first = json.loads((folder / "retrieval/log.jsonl").read_text().splitlines()[0])
        assert first["step"] == 0 and 0 <= first["text_to_image_r10"] <= 1 and first["chance"]["text_to_image_r10"] > 0
    if task == "caption":  # the best weights are those of the lowest perplexity
        log = [json.loads(line) for line in (folder / "caption/log.jsonl").read_text().splitlines()]
        best = min((line for line in log if "perplexity" in line), key=lambda line: line["perplexity"])
        assert checkpoints.load_checkpoint(folder / "caption/best.pt")["progress"]["step"] == best["step"] > 0
    if task == "vqa":
        picture = folder / "0.png"
        scenes.draw_scene(scenes.make_scene(0, "test", 0)).save(picture)
        asked = ["--image", picture, "--text", "what is it?"]
        done = run_script(ROOT / "predict.py", folder / "vqa/best.pt", *asked, cwd=folder)
        assert done.returncode == 0 and re.fullmatch(r"(\w+ 0\.\d+(  )?){3}\n", done.stdout), done


def losses(folder, run):
    """{objective: its logged losses} of a run."""
    found = {}
    for line in (folder / run / "log.jsonl").read_text().splitlines():
        for name, value in json.loads(line).items() if "split" not in json.loads(line) else ():
            found.setdefault(name, []).append(value)
    return found


def test_every_task_learns_from_a_teacher(folder, monkeypatch, capsys):
    """A student that starts as the teacher itself has nothing to learn from it; another one has, from every task."""
    six = ["--task", SIX, "--batch-size", 4, "--eval-every", 100]
    if not (folder / "uniter/checkpoint.pt").exists():
        assert start(folder, monkeypatch, *six, "--steps", 1, "--out", "uniter") == 0
    monkeypatch.setattr(
        train, "sample_task", lambda run, step: run.args.tasks[step % len(run.args.tasks)]
    )  # each in its turn
    six += ["--teacher", "uniter/checkpoint.pt", "--steps", 6]
    assert start(folder, monkeypatch, *six, "--init", "uniter/checkpoint.pt", "--lr", "1e-12", "--out", "same") == 0
    assert start(folder, monkeypatch, *six, "--config", "layers=1", "--out", "student") == 0
    soft = {f"{tasks.TASKS[task].objective}_soft" for task in SIX.split(",")}
    same, other = losses(folder, "same"), losses(folder, "student")
    assert soft <= set(same) and soft <= set(other)
    assert max(abs(v) for name in soft for v in same[name]) < 1e-6 < min(v for name in soft for v in other[name])
    five = [*six, "--task", SIX.removesuffix(",caption"), "--steps", 1, "--distill", "attention,hidden"]
    assert start(folder, monkeypatch, *five, "--out", "five") == 0
    capsys.readouterr()
    for arguments, message in (
        (["--task", "caption", "--distill", "logits,hidden"], "captions are read from left to right"),
        (["--model", "vilbert", "--task", "vcr"], "reads the rows of vcr in another way"),
        (["--model", "vilbert", "--task", "retrieval"], "reads the rows of retrieval in another way"),
        (["--task", "nlvr2", "--config", "nlvr2=triplet"], "reads the rows of nlvr2 in another way"),
        (["--task", "vqa"], "the teacher was not trained for it"),
    ):
        assert start(folder, monkeypatch, "--teacher", "uniter/checkpoint.pt", "--out", "none", *arguments) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, error


def test_retrieval_in_two_stages(folder, monkeypatch, capsys):
    """Dot products and the rank head learn side by side; with as many to rank anew as there are, both ways agree."""
    assert (
        start(
            folder, monkeypatch, "--task", "retrieval,ve", "--rerank", 10, "--steps", 8, "--seed", 4, "--out", "stages"
        )
        == 0
    )
    result = json.loads((folder / "stages/result.json").read_text())
    assert "best 10 re-ranked" in capsys.readouterr().out and {"rank", "itc", "ve"} <= set(losses(folder, "stages"))
    for name in ("text_to_image_r1", "image_to_text_r5"):
        assert result[f"two_stage_{name}"] == result[f"full_{name}"] == result[f"retrieval_{name}"]


@pytest.mark.parametrize("wiring", ["paired", "triplet"])
def test_nlvr2_trains_with_the_other_wirings_of_two_pictures(wiring, folder, monkeypatch, capsys):
    assert (
        start(
            folder, monkeypatch, "--task", "nlvr2", "--config", f"nlvr2={wiring}", "--out", wiring, "--ablate", "text"
        )
        == 0
    )
    pair = ["--image", folder / "0.png", "--image", folder / "1.png", "--text", "more circles"]
    for i in (0, 1):
        scenes.draw_scene(scenes.make_scene(0, "test", i)).save(folder / f"{i}.png")
    assert predict.main([*map(str, [f"{wiring}/best.pt", *pair])]) == 0


def test_own_data_of_several_tasks(folder, monkeypatch, capsys):
    lines = {"nlvr2": [], "vcr": [], "refer": [], "ve": [], "caption": []}
    for i in range(24):
        scenes.draw_scene(scenes.make_scene(0, "train", i)).save(folder / f"own{i}.png")
        common_ = {"image": f"own{i}.png", "text": "a red circle?", "split": ("train", "train", "val", "test")[i % 4]}
        two = {k: v for k, v in common_.items() if k != "image"} | {"images": [f"own{i}.png", "own0.png"]}
        lines["nlvr2"].append({**two, "label": i % 8 < 4})
        reasons = {"reasons": ["one", "two", "three"], "reason": i % 3}
        lines["vcr"].append({**common_, "choices": ["a", "b", "c"], "label": 1, **reasons})
        lines["refer"].append({**common_, "target": [10, 10, 50, 40], "boxes": [[0, 0, 20, 20], [9, 9, 50, 40]]})
        lines["ve"].append({**common_, "answer": data.ENTAILMENT[i % 3]})
        lines["caption"].append({**common_, "text": f"a {COLORS[i % 8]} {SHAPES[i % 6]}"})
    for task, rows in lines.items():
        (folder / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources = ",".join(f"{task}.jsonl" for task in lines)
    arguments = ["--model", "vilbert", "--task", ",".join(lines), "--data", sources, "--out", "own", "--patch", "4"]
    assert start(folder, monkeypatch, *arguments, "--steps", 8) == 0
    result = json.loads((folder / "own/result.json").read_text())
    assert result["chance"]["refer_accuracy"] == 0.5 and result["refer_reachable"] == 1.0
    assert result["chance"]["vcr_q_ar_accuracy"] == pytest.approx(1 / 9, abs=1e-4)
    assert start(folder, monkeypatch, *arguments, "--steps", 8, "--resume") == 0
    dataset = data.load(folder / "refer.jsonl", tasks.TASKS["refer"], "train", patch=4)
    assert np.allclose(dataset.target[0] * scenes.SIDE, [10, 10, 50, 40])
    bad = {**lines["vcr"][1], "choices": ["a", "b"]}
    (folder / "bad.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [lines["vcr"][0], bad]))
    assert start(folder, monkeypatch, "--task", "vcr", "--data", "bad.jsonl") == 2
    assert re.fullmatch(r"train.py: bad.jsonl:2: 2 choices.*\n", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("program", "arguments", "message"),
    [
        (train, ["--task", "vqa,sing"], "sing"),
        (train, ["--task", "vqa,vqa"], "once"),
        (train, ["--task", "vqa,pretrain"], "alone"),
        (train, ["--task", "vqa,refer", "--data", "a,b,c"], "--data"),
        (train, ["--task", "caption", "--ablate", "text"], "--ablate"),
        (train, ["--ablate", "image"], "--ablate"),
        (train, ["--task", "vqa", "--objectives", "mlm"], "--objectives"),
        (train, ["--task", "vqa", "--distill", "hidden"], "--teacher"),
        (train, ["--task", "vqa", "--patch", "8"], "--patch"),
        (train, ["--task", "vqa", "--grid", "3"], "--grid is for pictures; the regions of this data set are made"),
        (predict, ["none.pt", "--image", "0.png"], "none.pt"),
        (predict, ["uniter/checkpoint.pt", "--image", "none.png", "--text", "x"], "none.png"),
        (predict, ["uniter/checkpoint.pt", "--image", "0.png"], "ve needs a text"),
        (predict, ["uniter/checkpoint.pt", "--image", "0.png", "--text", "x", "--task", "vqa"], "vqa"),
        (predict, ["uniter/checkpoint.pt", "--image", "0.png", "--text", "x", "--task", "nlvr2"], "two --image"),
        (
            predict,
            ["uniter/checkpoint.pt", "--image", "0.png", "--text", "x", "--task", "vcr"],
            "vcr needs at least two choices",
        ),
        (predict, ["uniter/checkpoint.pt", "--image", "0.png", "--text", "x", "--boxes", "[[1,2]]"], "--boxes"),
        (predict, ["uniter/checkpoint.pt", "--image", "0.png", "--text", "x", "--boxes", "[[1,2,3,999]]"], "outside"),
        (predict, ["uniter/checkpoint.pt", "--image", "uniter/log.jsonl", "--text", "x"], "cannot read picture"),
    ],
)
def test_bad_requests_are_one_line_and_exit_code_2(program, arguments, message, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    if "uniter/checkpoint.pt" in arguments and not (folder / "uniter/checkpoint.pt").exists():
        assert start(folder, monkeypatch, "--task", SIX, "--out", "uniter") == 0
    scenes.draw_scene(scenes.make_scene(0, "test", 0)).save(folder / "0.png")
    monkeypatch.setattr(scenes, "COUNTS", COUNTS)  # some requests begin with drawing the scenes
    capsys.readouterr()
    assert program.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and "Traceback" not in error


@pytest.mark.parametrize(
    ("names", "worse", "better"),
    [
        (["pretrain"], {"mrfr_loss": 1.98}, {"mrfr_loss": 1.32}),
        (["pretrain"], {"nce_loss": 3.0, "wra_loss": -0.1}, {"nce_loss": 3.0, "wra_loss": -0.2}),
        (["pretrain"], {"mlm_loss": 1.0, "mlm_accuracy": 0.1}, {"mlm_loss": 2.0, "mlm_accuracy": 0.2}),
        (["pretrain"], {"itm_accuracy": 0.5, "text_to_image_r1": 0.9}, {"itm_accuracy": 0.6, "text_to_image_r1": 0.1}),
        (["vqa"], {"accuracy": 0.5, "accuracy_color": 0.9}, {"accuracy": 0.6, "accuracy_color": 0.1}),
        (["ve"], {"accuracy": 0.5}, {"accuracy": 0.6}),
        (["nlvr2"], {"accuracy": 0.5}, {"accuracy": 0.6}),
        (["refer"], {"accuracy": 0.5, "reachable": 0.9}, {"accuracy": 0.6, "reachable": 0.8}),
        (["vcr"], {"q_a_accuracy": 0.9, "q_ar_accuracy": 0.3}, {"q_a_accuracy": 0.8, "q_ar_accuracy": 0.4}),
        (["vcr"], {"q_a_accuracy": 0.5}, {"q_a_accuracy": 0.6}),
        (["retrieval"], {"mean_recall": 0.3, "text_to_image_r1": 0.9}, {"mean_recall": 0.4, "text_to_image_r1": 0.1}),
        (["caption"], {"perplexity": 9.0, "bleu4": 0.9}, {"perplexity": 8.0, "bleu4": 0.1}),
        (["vqa", "caption"], {"vqa_accuracy": 0.5, "caption_perplexity": 9.0}, {"vqa_accuracy": 0.5, "caption_perplexity": 8.0}),
        (["vqa", "caption"], {"vqa_accuracy": 0.5, "caption_perplexity": 9.0}, {"vqa_accuracy": 0.6, "caption_perplexity": 9.0}),
    ],
)  # fmt: skip
def test_the_best_weights_are_defined_for_every_task_and_every_objective(names, worse, better):
    run = SimpleNamespace(sets=dict.fromkeys(names))
    low, _ = tasks.best_score(run, worse)
    high, name = tasks.best_score(run, better)
    assert -math.inf < low < high
    assert name


def test_the_best_checkpoint_of_an_objective_without_accuracy_is_a_trained_one(folder, monkeypatch, capsys):
    options = ["--objectives", "mrfr", "--steps", 6, "--eval-every", 3, "--lr", "1e-3"]
    assert start(folder, monkeypatch, *options, "--out", "regress") == 0
    log = [json.loads(line) for line in (folder / "regress/log.jsonl").read_text().splitlines()]
    losses_of = {line["step"]: line["mrfr_loss"] for line in log if line.get("split") == "val"}
    assert min(losses_of, key=losses_of.get) == 6
    assert checkpoints.load_checkpoint(folder / "regress/best.pt")["progress"]["step"] == 6
    assert "best     step 6: minus the sum of the losses" in capsys.readouterr().out


def test_staying_at_chance_is_said(capsys):
    run = SimpleNamespace(args=SimpleNamespace(ablate=None, steps=10), sets={"nlvr2": {"val": range(1000)}})
    for step, accuracy, warned in ((4, 0.5, False), (5, 0.53, True), (5, 0.54, False)):
        run.progress = {"step": step}
        log.warn_at_chance(run, {"accuracy": accuracy}, {"accuracy": 0.5})
        assert ("no better than chance" in capsys.readouterr().out) == warned


def test_of_one_picture_captions_have_no_chance():
    metrics, chance = evaluation.caption_metrics({3: ["a", "b"]}, {3: [["a", "b"]]})
    assert metrics["bleu1"] == 1 and chance == {}


def one_box_dataset(monkeypatch, logits, overlaps, real):
    batch = SimpleNamespace(region_mask=torch.tensor([real]))
    monkeypatch.setattr(tasks, "evaluation_batches", lambda run, dataset, index: [index])
    monkeypatch.setattr(tasks, "example_logits", lambda *_: torch.tensor([logits]))
    monkeypatch.setattr(tasks, "target_overlaps", lambda *_: torch.tensor([overlaps]))
    monkeypatch.setattr(data, "collate", lambda *_: batch)
    dataset = type("Dataset", (SimpleNamespace,), {"__len__": lambda self: 1})(kind=["refer"])
    return tasks.evaluate_refer(None, dataset)


def test_an_overlap_of_one_half_is_wrong(monkeypatch):
    metrics, chance = one_box_dataset(monkeypatch, [1.0, 0.0], [0.5, 0.2], [True, True])
    assert metrics == {"accuracy": 0.0, "reachable": 0.0} and chance == {"accuracy": 0.0}


def test_padding_is_never_the_region_that_is_chosen(monkeypatch):
    metrics, _ = one_box_dataset(monkeypatch, [1.0, 0.0, 9.0], [0.9, 0.2, -1.0], [True, True, False])
    assert metrics["accuracy"] == 1.0


def test_a_kind_that_was_not_taught_is_guessed_as_any(monkeypatch):
    monkeypatch.setattr(tasks, "answer_scores", lambda *_: np.zeros(1))
    dataset = SimpleNamespace(answer=[{"yes": 1.0}], kind=["new"])
    dataset = type("Dataset", (SimpleNamespace,), {"__len__": lambda self: 1})(**vars(dataset))
    run = SimpleNamespace(answers=["yes", "no"], usual_answers={"": "yes", "old": "no"})
    assert tasks.evaluate_vqa(run, dataset)[1] == {"accuracy": 1.0}


def test_answers_that_the_model_does_not_know_bound_the_accuracy(monkeypatch):
    """Soft answers: 1, 0.3 of two known ones, 0 of an unknown one, 0.4 beside an unknown one."""
    monkeypatch.setattr(tasks, "answer_scores", lambda *_: np.zeros(4))
    answers = [{"yes": 1.0}, {"yes": 0.2, "no": 0.3}, {"maybe": 1.0}, {"maybe": 1.0, "no": 0.4}]
    dataset = SimpleNamespace(answer=answers, kind=["q"] * 4)
    dataset = type("Dataset", (SimpleNamespace,), {"__len__": lambda self: 4})(**vars(dataset))
    run = SimpleNamespace(answers=["yes", "no"], usual_answers={"": "yes"})
    metrics, chance = tasks.evaluate_vqa(run, dataset)
    assert metrics["reachable"] == pytest.approx((1 + 0.3 + 0 + 0.4) / 4) and "reachable" not in chance
    run.answers = ["yes", "no", "maybe"]
    assert tasks.evaluate_vqa(run, dataset)[0]["reachable"] == pytest.approx((1 + 0.3 + 1 + 1) / 4)
    dataset.answer = [{"yes": 1.0}] * 4
    assert "reachable" not in tasks.evaluate_vqa(run, dataset)[0]
