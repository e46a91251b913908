"""Consensus captions: the formula against a direct computation, and the option on the command line."""

import json
import math
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from support import consensus, regions


def ngram_counts(words, n):
    return Counter(" ".join(words[i : i + n]) for i in range(len(words) - n + 1))


def brute_force_score(text, log_probability, references, all_captions):
    """The formula of consensus.py, one cosine after the other. all_captions: of each training picture its captions."""

    def weights(words, n):
        found = {}
        for ngram, count in ngram_counts(words, n).items():
            pictures = sum(any(ngram in ngram_counts(text, n) for text in texts) for texts in all_captions)
            found[ngram] = count * math.log(len(all_captions) / max(1, pictures))
        return found

    total = 0.0
    for reference in references:
        for n in (1, 2, 3, 4):
            a, b = weights(text.split(), n), weights(reference, n)
            product = sum(a[ngram] * b.get(ngram, 0.0) for ngram in a)
            if product:
                total += product / (np.linalg.norm(list(a.values())) * np.linalg.norm(list(b.values()))) / 4
    return total / len(references) + 0.05 * log_probability


def make_captions(rng, pictures):
    """A made-up training split: two captions of one to seven words for each picture; regions of another number each."""
    words = ["a", "the", "dog", "cat", "runs", "sits", "on", "grass", "snow", "red"]
    texts = [" ".join(rng.choice(words, rng.integers(1, 8))) for _ in range(2 * pictures)]
    features = [rng.normal(size=(rng.integers(1, 5), 6)).astype(np.float16) for _ in range(pictures)]
    made = [{"features": x, "boxes": np.zeros((len(x), 4)), "size": (8, 8)} for x in features]
    image = np.repeat(np.arange(pictures), 2)
    dataset = SimpleNamespace(text=texts, image=image, store=regions.MemoryStore(made), answer=[{}] * len(texts))
    return dataset, [x.astype(np.float64).mean(0) for x in features]


def test_the_text_with_the_highest_score_is_kept(monkeypatch):
    monkeypatch.setattr(consensus, "NEIGHBOURS", 3)
    rng = np.random.default_rng(0)
    dataset, means = make_captions(rng, pictures=12)
    captions = consensus.read_captions(dataset)
    all_captions = [[text.split() for text in dataset.text[2 * i : 2 * i + 2]] for i in range(12)]
    chosen = []
    for _ in range(20):
        query = rng.normal(size=6)
        cosines = [mean @ query / np.linalg.norm(mean) for mean in means]
        references = [text for i in np.argsort(cosines)[-3:] for text in all_captions[i]]
        texts = [(rng.choice(dataset.text), float(-rng.exponential(3))) for _ in range(5)]
        scores = [brute_force_score(*text, references, all_captions) for text in texts]
        vector = torch.nn.functional.normalize(torch.from_numpy(query).float(), dim=0)
        assert consensus.choose(captions, vector, texts) == texts[int(np.argmax(scores))][0]
        chosen.append(int(np.argmax(scores)) == int(np.argmax([mean for _, mean in texts])))
    assert 0 < sum(chosen) < 20  # neither always the likeliest text nor never


def test_pictures_are_compared_by_their_mean_region(monkeypatch):
    dataset, means = make_captions(np.random.default_rng(1), pictures=7)
    monkeypatch.setattr(consensus.evaluation, "BATCH", 3)
    vectors = consensus.picture_vectors(dataset.store, np.arange(7))
    for vector, mean in zip(vectors, means, strict=True):
        np.testing.assert_allclose(vector, mean / np.linalg.norm(mean), rtol=1e-5, atol=1e-6)


def test_only_the_first_pictures_are_kept(monkeypatch):
    dataset, _ = make_captions(np.random.default_rng(2), pictures=7)
    monkeypatch.setattr(consensus, "MOST_PICTURES", 4)
    captions = consensus.read_captions(dataset)
    assert captions.vectors.shape == (4, 6)
    assert captions.words == [[text.split() for text in dataset.text[2 * i : 2 * i + 2]] for i in range(4)]


def test_the_test_keeps_texts_like_those_of_training_pictures(trained, monkeypatch):
    """A short run from the command line, its test by beams alone and by consensus: `choose` decides for all pictures."""
    start = trained("uniter", "caption")
    asked = []
    choose = consensus.choose
    monkeypatch.setattr(consensus, "choose", lambda *given: asked.append(given[2]) or choose(*given))
    results = []
    for name, options in (("beams", []), ("consensus", ["--consensus"])):
        trained("uniter", "caption", "--init", start, "--steps", "0", "--beams", "4", *options)
        folder = "-".join(["uniter", "caption", "--init", start, "--steps", "0", "--beams", "4", *options])
        results.append(json.loads(Path(folder, "result.json").read_text()))
        assert len(asked) == (30 if options else 0), name  # 15 pictures of the test and 15 of unseen compositions
    assert results[0]["perplexity"] == results[1]["perplexity"]
    assert all(len(texts) == 4 for texts in asked)
