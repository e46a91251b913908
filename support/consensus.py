"""consensus.py: which of several captions of a picture to keep: the one most like the captions of similar pictures.

A beam search finds several likely texts, and their probabilities hardly tell which one people would write. The captions
of the most similar training pictures do. Devlin et al. 2015 ("Exploring Nearest Neighbor Approaches for Image
Captioning") choose among these captions themselves, Mao et al. 2015 (m-RNN) among those that a model has written:

    score(c) = mean_s ( 1/4 sum_n cos(g_n(c), g_n(s)) ) + 0.05 log p(c)

s: the captions of the NEIGHBOURS nearest training pictures, by the cosine of the pictures' mean region features.
g_n: tf-idf weights of a text's n-grams, n = 1 to 4, as in CIDEr.   log p: mean log probability of the text's pieces.
Letters: I training pictures, F region-feature width.
"""

from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch

from support import evaluation

NEIGHBOURS = 20
LOG_PROBABILITY = 0.05  # its weight; this and NEIGHBOURS were chosen on the validation photographs of Flickr8k
MOST_PICTURES = 50_000  # of the training split, the first ones: their vectors and captions are held in memory


@dataclass
class Captions:
    """The captions of the training pictures, and what finds the pictures that are like another one."""

    vectors: torch.Tensor  # (I, F) of length 1
    words: list  # of each picture a list of captions, each a list of words
    pictures_with: Counter  # n-gram -> pictures that have it in a caption


def read_captions(dataset):
    """`Captions` of a data.Dataset, the training split."""
    examples = evaluation.caption_examples(dataset)
    rows = np.unique(dataset.image[examples])[:MOST_PICTURES]
    words = {row: [] for row in rows.tolist()}
    for i in examples[np.isin(dataset.image[examples], rows)].tolist():
        words[int(dataset.image[i])].append(evaluation.words_of(dataset.text[i]))
    words = list(words.values())
    return Captions(picture_vectors(dataset.store, rows), words, evaluation.pictures_with_ngrams(words))


def picture_vectors(store, rows):
    """Mean region feature of pictures `rows` (I,) of a feature store, divided by its length: (I, F) float32."""
    vectors = []
    for start in range(0, len(rows), evaluation.BATCH):
        regions = store.gather(rows[start : start + evaluation.BATCH], fields=())
        total = regions["features"].sum(1)  # (B, N, F) -> (B, F); padding is 0
        vectors.append(torch.nn.functional.normalize(total, dim=-1))
    return torch.cat(vectors)


def choose(captions, vector, texts):
    """The text with the highest score. captions: of the training pictures. vector (F,): of the picture, of length 1.
    texts: [(text, mean log probability), ...]."""
    likeness = captions.vectors @ vector  # (I, F) @ (F,) -> (I,)
    nearest = likeness.topk(min(NEIGHBOURS, len(likeness))).indices.tolist()
    references = [words for i in nearest for words in captions.words[i]]
    total = Counter()  # sum over n and s of g_n(s) / |g_n(s)|: one product with it gives the sum of all cosines
    for words in references:
        total.update(unit_weights(captions, words))
    best = None
    for text, log_probability in texts:
        weights = unit_weights(captions, evaluation.words_of(text))
        cosines = sum(weight * total[ngram] for ngram, weight in weights.items())
        score = cosines / (4 * len(references)) + LOG_PROBABILITY * log_probability
        if best is None or score > best[0]:
            best = (score, text)
    return best[1]


def unit_weights(captions, words):
    """{n-gram: its tf-idf weight}, n = 1 to 4, where the weights of each n have length 1."""
    found = {}
    for n in (1, 2, 3, 4):
        weights, length = evaluation.tf_idf(words, n, captions.pictures_with, len(captions.words))
        if length:
            found |= {ngram: weight / length for ngram, weight in weights.items()}
    return found
