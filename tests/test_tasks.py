"""The downstream tasks: their scenes against brute force over the scene graph, reading from left to right against
reading at once, metrics against numbers worked by hand, every task through the command line."""

import dataclasses
import itertools
import json
import math
import os
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

import common
import data
import train

ROOT = Path(__file__).parent.parent
PAPERS = list(train.PAPERS)


def make(name, seed=0, **changes):
    """A tiny model in float64 with random biases and norms, which an untrained one has not."""
    paper, cls = train.PAPERS[name]
    sizes = {**paper.PRESETS["tiny"], "vocab_size": 30, "feature_size": 8, "classes": 5, **changes}
    torch.manual_seed(seed)
    model = getattr(paper, cls)(paper.Config(**sizes)).double().eval()
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


class Toy:
    """A language model of four pieces (0 the end, 1 the beginning) whose chances depend on all pieces so far."""

    table = torch.randn(4, 4, 4, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * 2

    def decode(self, batch, cache):
        states = []
        for row in batch.text.tolist():
            past = ([0, 0, 0] + row)[-3:]
            states.append(self.table[past[0], past[1], past[2]])
        return torch.stack(states)[:, None]

    def word_scores(self, states):
        return states

    def chance(self, pieces):
        past, total = [1], 0.0
        for piece in pieces:
            total += float(self.table[tuple(([0, 0, 0] + past)[-3:])].log_softmax(-1)[piece])
            past.append(piece)
        return total


def test_enough_beams_find_the_likeliest_of_all_texts_and_one_beam_is_greedy():
    batch = dataclasses.replace(make_batch(rows=2), text=torch.zeros(2, 1, dtype=torch.long))
    toy = Toy()
    ended = [(*t, 0) for n in range(4) for t in itertools.product((1, 2, 3), repeat=n)]
    texts = ended + list(itertools.product((1, 2, 3), repeat=4))
    best = max(texts, key=toy.chance)
    found = common.generate(toy, batch, first=1, last=0, beams=250, most=4, cached=False)
    assert found == [[p for p in best if p]] * 2
    greedy, past = [], [1]
    for _ in range(4):
        piece = int(toy.table[tuple(([0, 0, 0] + past)[-3:])].argmax())
        past.append(piece)
        if piece == 0:
            break
        greedy.append(piece)
    assert common.generate(toy, batch, first=1, last=0, beams=1, most=4, cached=False) == [greedy] * 2
    assert toy.chance(best) > toy.chance([*greedy, 0][:4])  # else the search would have nothing to find


@pytest.mark.parametrize("name", PAPERS)
def test_captions_with_and_without_the_cache_are_the_same(name):
    model, batch = make(name, heads=("mlm",)), make_batch()
    for beams in (1, 3):
        cached, plain = (common.generate(model, batch, 2, 3, beams, most=8, cached=c) for c in (True, False))
        assert cached == plain and all(len(c) <= 8 for c in cached)
    assert len({tuple(c) for c in cached}) > 1  # pictures matter
