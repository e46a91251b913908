"""common.py: the formulas that ViLBERT, LXMERT and UNITER share, each written out once.

All three papers build on BERT's post-norm Transformer (Devlin 2019). Its parts come first. Losses and the objectives
that the models share follow, then helpers for several processes, messages and dropout. Where torch has a faster kernel,
the explicit formula stands beside it, and tests/test_common.py checks that the two are equal.

Letters: B batch, T text positions, N regions, S keys or positions of text, regions or both, C width, H heads of width D,
F region-feature width, V vocabulary, A answers, K classes, M masked positions.
"""

import functools
import math
import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

# ---- elementary formulas ----------------------------------------------------------------------------------------


def gelu(x):
    """Exact GELU (Hendrycks 2016): x Phi(x) = x/2 (1 + erf(x / sqrt 2)). Any shape. The kernel is `F.gelu`."""
    return x / 2 * (1.0 + torch.erf(x / math.sqrt(2.0)))


def layer_norm(x, weight, bias, eps=1e-12):
    """Layer normalisation (Ba 2016): w (x - mean) / sqrt(var + eps) + b over the last axis, with var divided by C.

    x (..., C), weight (C,), bias (C,). The kernel is `F.layer_norm`.
    """
    centred = x - x.mean(-1, keepdim=True)
    variance = centred.square().mean(-1, keepdim=True)
    return weight * centred / (variance + eps).sqrt() + bias


def attention_bias(mask, dtype, masked_logit=-10000.0):
    """BERT's additive attention mask: 0 where a key is visible, `masked_logit` where it is not.

    mask bool, True = visible: (B, S), or (B, T, S) with a mask for each query. Returns (B, 1, 1, S) or (B, 1, T, S).
    A query without a visible key attends to all keys: the same constant is added to all its logits.
    """
    if mask.ndim == 2:
        mask = mask[:, None]  # (B, S) -> (B, 1, S)
    return (1.0 - mask[:, None].to(dtype)) * masked_logit  # (B, 1 or T, S) -> (B, 1, 1 or T, S)


def attention(query, key, value, bias=None, dropout=0.0):
    """Scaled dot-product attention (Vaswani 2017, eq. 1): softmax(Q K^T / sqrt(D) + bias) V.

    query (B, H, T, D); key, value (B, H, S, D); bias from `attention_bias`.
    Returns the context (B, H, T, D) and the attention probabilities (B, H, T, S) before dropout.
    """
    logits = query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1])  # (B,H,T,D) @ (B,H,D,S) -> (B,H,T,S)
    if bias is not None:
        logits = logits + bias
    probs = logits.softmax(-1)
    context = apply_dropout(probs, dropout) @ value  # (B,H,T,S) @ (B,H,S,D) -> (B,H,T,D)
    return context, probs


# ---- parts of the Transformer -----------------------------------------------------------------------------------


class LayerNorm(nn.LayerNorm):
    """`layer_norm` by torch's kernel, with weight and bias (C,) and BERT's eps. Under autocast it computes in float32:
    on a GPU autocast ensures that, on a CPU it does not, and the states of regions would stay in bfloat16."""

    def __init__(self, width):
        super().__init__(width, eps=1e-12)

    def forward(self, x):
        return super().forward(at_least_float32(x))


class TextEmbedding(nn.Module):
    """BERT's embedding: norm(word + position + type), then dropout. ids, segments (B, T) -> (B, T, C).

    Lookups give no gradient to row 0 of the word table (padding), and with padding_idx=0 none to position 0 and type 0.
    """

    def __init__(self, config, padding_idx=None):
        super().__init__()
        self.words = nn.Embedding(config.vocab_size, config.hidden, padding_idx=0)
        self.positions = nn.Embedding(config.max_positions, config.hidden, padding_idx=padding_idx)
        self.types = nn.Embedding(config.types, config.hidden, padding_idx=padding_idx)
        self.norm = LayerNorm(config.hidden)
        self.dropout = Dropout(config.dropout)

    def forward(self, ids, segments, offset=0):
        """offset: position of the first word, for incremental decoding."""
        positions = torch.arange(offset, offset + ids.shape[1], device=ids.device)  # (T,)
        text_emb = self.words(ids) + self.positions(positions) + self.types(segments)  # (B, T, C)
        return self.dropout(self.norm(text_emb))


class MultiHeadAttention(nn.Module):
    """Multi-head attention (Vaswani 2017, section 3.2.2): concat_h(attention(x W_q^h, c W_k^h, c W_v^h)) W_o.

    Queries come from x (B, T, C), keys and values from the context c (B, S, C'). All four projections have biases.
    attention_width: of all heads together, by default C. ValueError if it is not a multiple of `heads`.
    """

    def __init__(self, width, heads, dropout=0.0, context_width=None, attention_width=None):
        super().__init__()
        context_width = context_width or width
        attention_width = attention_width or width
        if attention_width % heads:
            raise ValueError(f"attention width {attention_width} is not a multiple of {heads} heads")
        self.heads = heads
        self.dropout = dropout
        self.query = nn.Linear(width, attention_width)
        self.key = nn.Linear(context_width, attention_width)
        self.value = nn.Linear(context_width, attention_width)
        self.output = nn.Linear(attention_width, width)

    def forward(self, x, context=None, bias=None, maps=None, cache=None):
        """Self-attention without a context, cross-attention with one. Returns (B, T, C).

        bias: from `attention_bias`.   maps: a list, to which the attention probabilities (B, H, T, S) are appended.
        cache: a dict for incremental decoding. A block stores {self: (keys, values)}; beam search reorders such tuples and
        leaves the models' other entries as they are. In self-attention x holds the new positions only, and they also see
        the cached ones. In cross-attention only the first call projects the context.
        """
        cached = cache is not None and self in cache
        if cached and context is not None:
            key, value = cache[self]
        else:
            source = x if context is None else context
            key = self.key(source)  # (B, S, C') -> (B, S, H*D)
            value = self.value(source)
            if cached:
                past_key, past_value = cache[self]
                key = torch.cat([past_key, key], 1)
                value = torch.cat([past_value, value], 1)
            if cache is not None:
                cache[self] = (key, value)
        return self.attend_heads(self.query(x), key, value, bias, maps)

    def attend_heads(self, query, key, value, bias=None, maps=None):
        """Attention in each head, then the projection: query (B, T, H*D), key, value (B, S, H*D) -> (B, T, C)."""
        query = query.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, T, H*D) -> (B, T, H, D) -> (B, H, T, D)
        key = key.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        value = value.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        dropout = self.dropout if self.training else 0.0
        if maps is None and query.is_cuda:  # on a CPU torch's kernel is slower at these lengths
            context = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, dropout_p=dropout)
        else:
            context, probs = attention(query, key, value, bias, dropout)
            if maps is not None:
                maps.append(probs)
        return self.output(context.transpose(1, 2).flatten(2))  # (B, H, T, D) -> (B, T, H*D) -> (B, T, C)


class AttentionBlock(MultiHeadAttention):
    """Post-norm attention block: norm(x + dropout(attention(x, context))). Arguments and shapes as above."""

    def __init__(self, width, heads, dropout=0.0, context_width=None, attention_width=None):
        super().__init__(width, heads, dropout, context_width, attention_width)
        self.norm = LayerNorm(width)
        self.hidden_dropout = Dropout(dropout)

    def forward(self, x, context=None, bias=None, maps=None, cache=None):
        attended = super().forward(x, context, bias, maps, cache)
        return self.norm(x + self.hidden_dropout(attended))


class FeedForward(nn.Module):
    """Post-norm feed-forward block: norm(x + dropout(W_2 gelu(W_1 x))). x (B, S, C), hidden width `inner`."""

    def __init__(self, width, inner, dropout=0.0):
        super().__init__()
        self.up = nn.Linear(width, inner)
        self.down = nn.Linear(inner, width)
        self.norm = LayerNorm(width)
        self.dropout = Dropout(dropout)

    def forward(self, x):
        x_inner = F.gelu(self.up(x))  # (B, S, C) -> (B, S, inner)
        return self.norm(x + self.dropout(self.down(x_inner)))


class TransformerLayer(nn.Module):
    """One BERT layer: self-attention block, then feed-forward block. x (B, S, C) -> (B, S, C)."""

    def __init__(self, width, heads, inner, dropout=0.0):
        super().__init__()
        self.attention = AttentionBlock(width, heads, dropout)
        self.feed_forward = FeedForward(width, inner, dropout)

    def forward(self, x, bias=None, maps=None, cache=None):
        return self.feed_forward(self.attention(x, bias=bias, maps=maps, cache=cache))


@dataclass
class Encoding:
    """What a model's `encode` returns. The states at padded positions are meaningless: apply the batch's masks.

    record=True fills in `states`, layer outputs (B, S, C), and `maps`, their attention probabilities (B, H, T, S).
    """

    text: torch.Tensor | None  # (B, T, C), the last layer's states; None if the text was not encoded
    regions: torch.Tensor | None  # (B, N, C'), the same for regions; C' = C except in ViLBERT
    pooled: torch.Tensor  # (B, C), one vector for each row; in ViLBERT as wide as `shared`
    states: dict = field(default_factory=dict)
    maps: dict = field(default_factory=dict)


# ---- precision: losses and ranking logits are float32 under autocast too -----------------------------------------


def full_precision(device):
    """A context in which autocast is off. Some devices have no autocast."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def at_least_float32(x):
    """x in float32 if it is in half precision, else as it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def in_float32(loss):
    """Decorator: computes a loss in float32 whatever autocast does; float64 stays float64. In bfloat16 the softmax would
    leave nearly right predictions almost no gradient. Pass tensors as positional arguments: keyword ones stay as they are.
    """

    @functools.wraps(loss)
    def loss_in_float32(*arguments, **options):
        arguments = list(arguments)
        for i, x in enumerate(arguments):
            if isinstance(x, torch.Tensor) and x.is_floating_point():
                arguments[i] = at_least_float32(x)
        with full_precision(arguments[0].device):
            return loss(*arguments, **options)

    return loss_in_float32


class Float32Linear(nn.Linear):
    """A linear map in float32 whatever autocast does, for logits that rank candidates: in bfloat16 many would tie."""

    def forward(self, x):
        with full_precision(x.device):
            return F.linear(x.to(self.weight.dtype), self.weight, self.bias)


# ---- heads and initialisation -----------------------------------------------------------------------------------


class Pooler(nn.Module):
    """BERT's pooler: tanh(W x_0 + b) of the first position. x (B, S, C) -> (B, out). ViLBERT uses ReLU, not tanh."""

    def __init__(self, width, out=None, activation=torch.tanh):
        super().__init__()
        self.dense = Float32Linear(width, out or width)
        self.activation = activation

    def forward(self, x):
        return self.activation(self.dense(x[:, 0]))


class HeadTransform(nn.Module):
    """BERT's transform before a prediction: norm(gelu(W x + b)). x (..., C) -> (..., C)."""

    def __init__(self, width):
        super().__init__()
        self.dense = nn.Linear(width, width)
        self.norm = LayerNorm(width)

    def forward(self, x):
        return self.norm(F.gelu(self.dense(x)))


class MaskedLMHead(nn.Module):
    """BERT's masked-word head: logits = transform(x) E^T + b, E (V, C) the word table (tied). x (M, C) -> (M, V)."""

    def __init__(self, width, vocab_size):
        super().__init__()
        self.transform = HeadTransform(width)
        self.bias = nn.Parameter(torch.zeros(vocab_size))

    def forward(self, x, words):
        return F.linear(self.transform(x), words, self.bias)


def mlp_head(width, inner, out, activation=nn.GELU):
    """Two-layer head: W_2 norm(act(W_1 x)). (..., width) -> (..., out)."""
    return nn.Sequential(nn.Linear(width, inner), activation(), LayerNorm(inner), Float32Linear(inner, out))


def teacher_projections(text_width, region_width, widths):
    """Linear maps of text and of region states to a teacher's widths, for --distill hidden (TinyBERT, section 3.1)."""
    return nn.ModuleDict({"text": nn.Linear(text_width, widths[0]), "regions": nn.Linear(region_width, widths[1])})


def init_weights(model, width):
    """BERT's initialisation: weights N(0, s^2), padding rows too, biases 0. Norms keep weight 1 and bias 0.

    s = 0.02 at BERT's width of 768 and above. A narrower model gets 0.02 sqrt(768 / width). A sum of `width` products
    then starts as large as in BERT. docs/decisions.md has the gain.
    """
    std = 0.02 * max(1.0, math.sqrt(768 / width))
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=std)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)


@torch.no_grad()
def init_box_projection(linear):
    """Initialises a box projection, after `init_weights`: boxes count as much as features, centre and size alike.

        W b + bias = sum over centre x, centre y, width, height of  g (value - mean) / std,   g (C,) from N(0, 1/4)

    mean and std are 0.5 and 0.25 for centres, 0.25 and 0.1 for sizes. Boxes like these give outputs of variance 1.
    linear: P -> C, the first four inputs x1, y1, x2, y2; weights of the other inputs start at 0.
    Box numbers are positive, so BERT's initialisation would map all boxes to nearly one direction (docs/decisions.md).
    """
    centre = torch.randn(len(linear.weight), 2) * 0.5 / 0.25  # (C, 2), weights of centre x and y
    size = torch.randn(len(linear.weight), 2) * 0.5 / 0.1  # (C, 2), weights of width and height
    linear.weight.zero_()
    linear.weight[:, :4] = torch.cat([centre / 2 - size, centre / 2 + size], 1)  # centre (x1 + x2) / 2, width x2 - x1
    mean_box = torch.tensor([0.375, 0.375, 0.625, 0.625])
    linear.bias.copy_(-linear.weight[:, :4] @ mean_box)


# ---- losses -----------------------------------------------------------------------------------------------------


def gather_positions(states, index):
    """States at flat positions: states (B, S, C), index (M,) into B*S -> (M, C). A bool mask would make a GPU wait."""
    return states.flatten(0, 1).index_select(0, index)  # (B, S, C) -> (B*S, C) -> (M, C)


def masked_mean(states, mask):
    """Mean over a row's real positions: states (B, S, C), mask (B, S) bool, True = real -> (B, C); 0 if none."""
    total = states.masked_fill(~mask[:, :, None], 0.0).sum(1)  # (B, S, C) -> (B, C)
    return total / mask.sum(1, keepdim=True).clamp(min=1)


@in_float32
def cross_entropy(logits, labels):
    """-log softmax(logits)[label] in nats, mean over rows. logits (M, K), labels (M,) int64. 0 if there are no rows."""
    if labels.shape[0] == 0:  # nothing was masked; the official codes return NaN
        return logits.sum() * 0.0
    return F.cross_entropy(logits, labels)


@in_float32
def squared_error(predictions, targets):
    """Squared difference, mean over all elements; 0 if there are none. predictions, targets (M, F)."""
    return F.mse_loss(predictions, targets.to(predictions.dtype), reduction="sum") / max(1, targets.numel())


@in_float32
def kl_divergence(logits, probs):
    """KL(t || p) = sum_k t_k (log t_k - log p_k), p = softmax(logits), summed over rows. logits, probs t (M, K).

    Classes with t_k = 0 count as 0. Rows of t need not sum to 1: detectors store them rounded.
    """
    return F.kl_div(logits.log_softmax(-1), probs.to(logits.dtype), reduction="sum")


@in_float32
def soft_answer_loss(logits, targets):
    """Binary cross-entropy against soft answer scores (VQA; Teney 2018), summed over answers, mean over rows:

        L = 1/B sum_b sum_a -[ t log s(x) + (1 - t) log(1 - s(x)) ],   s the sigmoid

    logits x (B, A), targets t (B, A) in 0..1. The official codes compute it as the mean over B and A, times A.
    """
    return F.binary_cross_entropy_with_logits(logits, targets.to(logits.dtype)) * logits.shape[1]


@in_float32
def optimal_transport(text, regions, text_mask, region_mask, beta=0.5, iterations=50):
    """Word-region distance by the inexact proximal point method IPOT (Xie 2018; UNITER, eq. 3):

        min_P sum_ij P_ij c_ij,   c_ij = 1 - cos(text_i, regions_j)

    The minimum is over plans P (T, N) >= 0. Each word's row sums to 1 / #words, each region's column to 1 / #regions.
    text (B, T, C), regions (B, N, C); text_mask (B, T), region_mask (B, N) bool, True = not padding.
    Returns distances (B,) in 0..2, plan (B, T, N), cost (B, T, N). The plan has no gradient, as in the official code.
    """
    text = text / text.norm(dim=-1, keepdim=True).clamp(min=1e-5)
    regions = regions / regions.norm(dim=-1, keepdim=True).clamp(min=1e-5)
    pairs = text_mask[:, :, None] & region_mask[:, None, :]  # (B, T, N), True = a real word and a real region
    cost = (1.0 - text @ regions.transpose(1, 2)).masked_fill(~pairs, 0.0)  # (B, T, C) @ (B, C, N) -> (B, T, N)
    with torch.no_grad():
        kernel = torch.exp(-cost / beta) * pairs
        num_words = text_mask.sum(1).clamp(min=1)[:, None, None]  # (B, 1, 1)
        num_regions = region_mask.sum(1).clamp(min=1)[:, None, None]  # (B, 1, 1)
        tiny = torch.finfo(cost.dtype).tiny
        plan = pairs.to(cost.dtype)  # (B, T, N)
        sigma = text_mask[:, :, None] / num_words.to(cost.dtype)  # (B, T, 1)
        for _ in range(iterations):
            q = kernel * plan
            sums = (q * sigma).sum(1, keepdim=True)  # (B, T, N) -> (B, 1, N)
            delta = region_mask[:, None, :] / (num_regions * sums).clamp(min=tiny)
            sums = (q * delta).sum(2, keepdim=True)  # (B, T, N) -> (B, T, 1)
            sigma = text_mask[:, :, None] / (num_words * sums).clamp(min=tiny)
            plan = sigma * q * delta
    return (plan * cost).sum((1, 2)), plan, cost


# ---- objectives that models share: (model, encoding, batch) -> (loss, logits); then their table ------------------


def question_answering(model, encoding, batch, head="vqa"):
    """VQA, GQA, and SNLI-VE with its three answers: `soft_answer_loss` against batch.answers (B, A). Logits (B, A)."""
    logits = model.heads[head](encoding.pooled)
    return soft_answer_loss(logits, batch.answers), logits


def visual_commonsense_reasoning(model, encoding, batch):
    """VCR (UNITER, section 4.1): cross-entropy of right against wrong for each choice, one choice a row.

    batch.target (rows,), 1 = the right choice. Logits (rows,): of "right", which rank a question's choices."""
    logits = model.heads["vcr"](encoding.pooled)  # (rows, 2)
    return cross_entropy(logits, batch.target), logits[:, 1]


def retrieval_rank(model, encoding, batch):
    """Retrieval (UNITER, section 4.1): a margin between the true pair and each mismatched pair of its group.

        L = max(0, 0.2 + s(mismatched) - s(true)),  mean over mismatched pairs, s the sigmoid of a logit

    The group of each example of batch.ids: a true pair, then its mismatched pairs (NEGATIVES). Logits (rows,).
    """
    logits = model.heads["rank"](encoding.pooled).squeeze(-1)  # (rows, 1) -> (rows,)
    probs = logits.view(len(batch.ids), -1).sigmoid()  # (rows,) -> (examples, 1 + negatives)
    return F.relu(0.2 + probs[:, 1:] - probs[:, :1]).mean(), logits  # (examples, negatives) -> ()


def referring_expression(model, encoding, batch):
    """Referring expressions (UNITER, section 4.1): cross-entropy over the regions, mean over rows (officially the sum).

    batch.target (B, N) float: each region's IoU with the true box, -1 at padding. The region with the largest IoU is
    the label. Logits (B, N), -10000 at padding.
    """
    logits = model.heads["refer"](encoding.regions).squeeze(-1)  # (B, N, 1) -> (B, N)
    logits = logits.masked_fill(~batch.region_mask, -10000.0)
    return cross_entropy(logits, batch.target.argmax(1)), logits


def decoder_inputs(model, batch, cache, region_mask):
    """Embeddings and mask for `decode`: a prefix language model (UniLM, Dong 2019; in none of the three papers).

    Every word attends to the regions, to earlier words and to itself. Regions attend to regions only.
    cache: a dict, the same in all calls for one text. Its entry "words" counts the words of earlier calls. batch.text
    holds the words of this call only.   region_mask (B, N), with N = 0 if self-attention is over words only.
    Returns embeddings of batch.text (B, T, C) and a mask (B, T, N + earlier + T) bool, True = visible. Its keys are the
    regions, then the earlier words, then the words of batch.text.
    """
    earlier = cache.get("words", 0)
    B, T = batch.text.shape
    cache["words"] = earlier + T
    see_words = torch.ones(T, earlier + T, dtype=torch.bool, device=region_mask.device).tril(earlier)
    see_words = see_words.expand(B, -1, -1)  # (T, earlier + T) -> (B, T, earlier + T)
    see_regions = region_mask[:, None].expand(-1, T, -1)  # (B, N) -> (B, T, N)
    text_emb = model.text_embedding(batch.text, batch.segments, earlier)
    return text_emb, torch.cat([see_regions, see_words], 2)


def captioning(model, encoding, batch):
    """Captioning as a prefix language model: -log P(next word | regions, earlier words), mean over words.

    batch.word_index (M,): flat positions of all words but the last of each row; word_labels (M,): the word after each.
    `encoding` is not used, because its words attend to later words. Logits (M, V).
    """
    logits = model.word_logits(gather_positions(model.decode(batch), batch.word_index))
    return cross_entropy(logits, batch.word_labels), logits


@dataclass(frozen=True)
class Objective:
    """One row of a model's table OBJECTIVES: a loss, and what the rest of the code must know to train it.

    loss(model, encoding, batch) returns the loss, a 0-d tensor, and the logits that it was computed from.
    """

    loss: Callable
    head: str | None = None  # the key in the model's HEADS of the head that it uses
    pretraining: bool = False  # True: --objectives may name it
    masks: str | None = None  # what is masked in its batches: "words", "regions" or None
    mismatched: bool = False  # True: some pairs of its batches are mismatched
    mean_over: str = "rows"  # what the mean in the loss runs over: see `count_items`
    encodes_itself: bool = False  # True: it encodes the batch itself and does not read `encoding`
    fields: tuple = ()  # fields of a Batch that it reads and that not all data sets have
    labels: Callable | None = None  # (batch, logits) -> (M,) int64, -1 = none; for its accuracy. None: no accuracy
    open_answers: bool = False  # True: its logits have a column for each answer of the training split
    # what --distill logits compares: "classes" or "pairs" (by KL), "numbers" (by squared error), "nothing"
    learn_as: str = "classes"


def regions_to_predict(batch):
    """(B, N) bool, True = a real region, masked or not, of a row for which batch.predict_rows is True or not given."""
    if batch.predict_rows is None:
        return batch.region_mask
    return batch.region_mask & batch.predict_rows[:, None]


def count_items(mean_over, batch):
    """How many items of a batch an objective's mean runs over."""
    if mean_over == "words":
        return len(batch.word_index)  # masked or predicted words
    if mean_over == "regions":
        return len(batch.region_index)  # masked regions
    if mean_over == "all regions":
        return int(regions_to_predict(batch).sum())
    if mean_over == "pairs":
        return len(batch.pair_index)
    if mean_over == "answers":
        return int(((batch.answer_labels >= 0) & (batch.matched == 1)).sum())
    assert mean_over == "rows", mean_over
    return len(batch.text)


def most_likely_class(batch, logits):
    """The detector's most likely class of each masked region, never background: (M,), a column of the logits."""
    probs = gather_positions(batch.object_probs, batch.region_index)[:, 1:]  # (M, K - 1), without the background
    return probs.argmax(-1) + logits.shape[-1] - probs.shape[-1]  # + 1 if the logits have a background, as UNITER's


SHARED_OBJECTIVES = {  # each model's table adds its own, or replaces one of these
    "vqa": Objective(question_answering, head="vqa", open_answers=True),
    "ve": Objective(functools.partial(question_answering, head="ve"), head="ve"),
    "vcr": Objective(visual_commonsense_reasoning, head="vcr"),
    "rank": Objective(retrieval_rank, head="rank"),
    "refer": Objective(referring_expression, head="refer"),
    "caption": Objective(captioning, head="mlm", mean_over="words", encodes_itself=True),
}

# ---- several processes, messages --------------------------------------------------------------------------------


class UserError(ValueError):
    """A mistake in the user's files, options or values. It ends the program with one line and exit code 2. The message
    says where, what is wrong, how to mend it. Line breaks in quoted messages become blanks."""

    def __init__(self, message):
        super().__init__(" ".join(message.split()))


def rank_and_world():
    """(rank, world). Under torchrun the first call starts the group of processes: NCCL for GPUs, gloo for CPUs."""
    if "RANK" not in os.environ or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return 0, 1
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
        dist.init_process_group(backend, timeout=timedelta(days=1))  # the first one may make features for hours
    return dist.get_rank(), dist.get_world_size()


def all_reduce_sum(values):
    """The sum over all processes of numbers or of a CPU tensor, as float64 on the CPU, so that no GPU waits."""
    tensor = torch.as_tensor(values, dtype=torch.float64).clone()
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def print0(text):
    """Prints a line, in the first process only."""
    if rank_and_world()[0] == 0:
        print(text, flush=True)


# ---- CPU tuning: dropout ----------------------------------------------------------------------------------------


def apply_dropout(x, p):
    """Dropout (Srivastava 2014): each value of x becomes 0 with probability p, else x / (1 - p).

    On a CPU torch draws the mask value by value, which takes a tenth of a step in bfloat16. Here one draw of 64 bits
    serves four values. p is rounded down to a multiple of 1/65536.
    """
    if p == 0 or p == 1 or x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.dropout(x, p)
    draws = math.ceil(x.numel() / 4)
    bits = torch.empty(draws, dtype=torch.int64).random_(-(2**63), None)
    bits = bits.view(torch.int16)[: x.numel()].view(x.shape)  # uniform in -2**15 .. 2**15 - 1
    threshold = int(p * 2**16) - 2**15
    keep = torch.ge(bits, threshold, out=torch.empty_like(x))  # 1 where kept, in the dtype of x
    return x * keep.mul_(1 / (1 - p))


class Dropout(nn.Dropout):
    """`apply_dropout` in training, the identity in evaluation."""

    def forward(self, x):
        return apply_dropout(x, self.p) if self.training else x
