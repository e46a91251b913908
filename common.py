"""common.py: the formulas that ViLBERT, LXMERT and UNITER share, each written out once.

All three papers build on BERT's post-norm Transformer (Devlin 2019). Its parts come first: attention, feed-forward,
layer norm, the embedding of words, pooler, prediction heads. Losses follow: classification, optimal transport,
contrast, distillation. Then come the objectives that the models share and a few helpers. Where torch has a faster
kernel, the explicit formula stands first and the kernel beside it; tests/test_common.py holds the two equal.

Letters: B batch, T text positions, N regions, S keys (text, regions or both), C width, H heads, D = C / H,
F region-feature width, V vocabulary, A answers, K classes, M masked positions, E width of the contrast space.
"""

import functools
import math
import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

# ---- elementary formulas ----------------------------------------------------------------------------------------


def gelu(x):
    """Exact GELU (Hendrycks 2016): x Phi(x) = x/2 (1 + erf(x / sqrt 2)). Any shape. The kernel is `F.gelu`."""
    return x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0)))


def layer_norm(x, weight, bias, eps=1e-12):
    """Layer normalisation (Ba 2016): w (x - mean) / sqrt(var + eps) + b over the last axis, with var divided by C.

    x (..., C), weight (C,), bias (C,). eps is BERT's. The kernel is `F.layer_norm`.
    """
    centred = x - x.mean(-1, keepdim=True)
    return weight * centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() + bias


def attention_bias(mask, dtype, masked_logit=-10000.0):
    """BERT's additive attention mask: 0 where a key is visible, `masked_logit` where it is not.

    mask bool, True = visible: (B, S) for all queries alike, or (B, T, S) for each query. Returns (B, 1, 1, S) or
    (B, 1, T, S). A query without a visible key attends to all keys, because the constant shifts its logits alike.
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
    return apply_dropout(probs, dropout) @ value, probs  # (B,H,T,S) @ (B,H,S,D) -> (B,H,T,D)


def fused_attention(query, key, value, bias=None, dropout=0.0):
    """The same by torch's kernel, which returns no probabilities: (B, H, T, D).

    Used on GPUs. On a CPU the formula above is faster at these lengths (torch 2.13).
    """
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, dropout_p=dropout)


# ---- parts of the Transformer -----------------------------------------------------------------------------------


class LayerNorm(nn.Module):
    """`layer_norm` by torch's kernel, with its weight and bias (C,)."""

    def __init__(self, width, eps=1e-12):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.eps = eps

    def forward(self, x):
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


class TextEmbedding(nn.Module):
    """BERT's embedding: norm(word + position + type), then dropout. ids, segments (B, T) -> (B, T, C).

    The padding word, row 0 of the word table, gets no gradient. padding_idx=0 does the same to position 0 and type 0.
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
        return self.dropout(self.norm(self.words(ids) + self.positions(positions) + self.types(segments)))


class MultiHeadAttention(nn.Module):
    """Multi-head attention (Vaswani 2017, section 3.2.2): concat_h(attention(x W_q^h, c W_k^h, c W_v^h)) W_o.

    Queries come from x (B, T, C), keys and values from the context c (B, S, C'). All four maps have biases. `inner`
    is the width of all heads together, by default C. ValueError if `inner` is not a multiple of `heads`.
    """

    def __init__(self, width, heads, dropout=0.0, context_width=None, inner=None):
        super().__init__()
        context_width = context_width or width
        inner = inner or width
        if inner % heads:
            raise ValueError(f"attention width {inner} is not a multiple of {heads} heads")
        self.heads = heads
        self.dropout = dropout
        self.query = nn.Linear(width, inner)
        self.key = nn.Linear(context_width, inner)
        self.value = nn.Linear(context_width, inner)
        self.output = nn.Linear(inner, width)

    def forward(self, x, context=None, bias=None, maps=None, cache=None):
        """Self-attention without a context, cross-attention with one. Returns (B, T, C).

        bias: from `attention_bias`.   maps: a list, to which the attention probabilities (B, H, T, S) are appended.
        cache: a dict {layer: (keys, values)}, for incremental decoding. In self-attention x holds the newest
        positions, which see the cached ones too. In cross-attention the context is projected in the first call only.
        """
        if context is not None and cache is not None and self in cache:
            key, value = cache[self]
            return self.attend_heads(self.query(x), key, value, bias, maps)
        source = x if context is None else context
        key = self.key(source)  # (B, S, C') -> (B, S, inner)
        value = self.value(source)
        if cache is not None:
            if self in cache:
                past_key, past_value = cache[self]
                key = torch.cat([past_key, key], 1)
                value = torch.cat([past_value, value], 1)
            cache[self] = (key, value)
        return self.attend_heads(self.query(x), key, value, bias, maps)

    def attend_heads(self, query, key, value, bias=None, maps=None):
        """Attention in each head, and the output map: query (B, T, inner), key, value (B, S, inner) -> (B, T, C)."""
        query = query.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, T, H*D) -> (B, T, H, D) -> (B, H, T, D)
        key = key.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        value = value.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        dropout = self.dropout if self.training else 0.0
        if maps is None and query.is_cuda:
            context = fused_attention(query, key, value, bias, dropout)
        else:
            context, probs = attention(query, key, value, bias, dropout)
            if maps is not None:
                maps.append(probs)
        return self.output(context.transpose(1, 2).flatten(2))  # (B, H, T, D) -> (B, T, H*D) -> (B, T, C)


class AttentionBlock(MultiHeadAttention):
    """Post-norm attention block: norm(x + dropout(attention(x, context))). Arguments and shapes as above."""

    def __init__(self, width, heads, dropout=0.0, context_width=None, inner=None):
        super().__init__(width, heads, dropout, context_width, inner)
        self.norm = LayerNorm(width)
        self.hidden_dropout = Dropout(dropout)

    def forward(self, x, context=None, bias=None, maps=None, cache=None):
        return self.norm(x + self.hidden_dropout(super().forward(x, context, bias, maps, cache)))


class FeedForward(nn.Module):
    """Post-norm feed-forward block: norm(x + dropout(W_2 gelu(W_1 x))). x (B, S, C), `inner` is the width between."""

    def __init__(self, width, inner, dropout=0.0):
        super().__init__()
        self.up = nn.Linear(width, inner)
        self.down = nn.Linear(inner, width)
        self.norm = LayerNorm(width)
        self.dropout = Dropout(dropout)

    def forward(self, x):
        return self.norm(x + self.dropout(self.down(F.gelu(self.up(x)))))


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
    """What a model's `encode` returns. Values at padded positions mean nothing: use the batch's masks.

    With `record=True`, `states[name]` (B, S, C) is the output of a layer and `maps[name]` (B, H, T, S) its attention
    probabilities. Each model lists the names.
    """

    text: torch.Tensor | None  # (B, T, C), the last layer's states; None if the text was not encoded
    regions: torch.Tensor | None  # (B, N, C), the same for regions
    pooled: torch.Tensor  # (B, C), one vector for each row
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
    """Decorator: computes a loss in float32 whatever autocast does; float64 stays float64.

    Under autocast logits arrive in bfloat16. It leaves their softmax and sigmoid in bfloat16, which loses most of the
    gradient where they are nearly right, and casts matrix products to bfloat16.
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
    """A linear map in float32 whatever autocast does, for logits that rank: in bfloat16 many of them would be equal."""

    def forward(self, x):
        with full_precision(x.device):
            return F.linear(x.to(self.weight.dtype), self.weight, self.bias)


# ---- heads and initialisation -----------------------------------------------------------------------------------


class Pooler(nn.Module):
    """BERT's pooler: tanh(W x_0 + b) of the first position. x (B, S, C) -> (B, C). ViLBERT has ReLU for tanh."""

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
    """BERT's masked-word head: logits transform(x) E^T + b. x (M, C), word table E (V, C) (tied) -> (M, V)."""

    def __init__(self, width, vocab_size):
        super().__init__()
        self.transform = HeadTransform(width)
        self.bias = nn.Parameter(torch.zeros(vocab_size))

    def forward(self, x, words):
        return F.linear(self.transform(x), words, self.bias)


def mlp_head(width, inner, out, activation=nn.GELU):
    """The two-layer head of the fine-tuning tasks: W_2 norm(act(W_1 x)). (..., width) -> (..., out)."""
    return nn.Sequential(nn.Linear(width, inner), activation(), LayerNorm(inner), Float32Linear(inner, out))


def init_weights(model, width):
    """BERT's initialisation: weights N(0, s^2), padding rows too, biases 0. Norms keep weight 1 and bias 0.

    s = 0.02 at BERT's width of 768 and above. A narrower model gets 0.02 sqrt(768 / width), so that a sum of `width`
    products starts as large as in BERT. docs/decisions.md has the gain.
    """
    std = 0.02 * max(1.0, math.sqrt(768 / width))
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=std)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)


@torch.no_grad()
def init_box_projection(linear):
    """Initialises a box projection so that boxes count as much as features do, for centre and size alike:

        W b + bias = sum over centre x, centre y, width, height of  g (value - mean) / std,   g (C,) from N(0, 1/4)

    mean and std are 0.5 and 0.25 for centres, 0.25 and 0.1 for sizes; boxes like these give outputs of variance 1.
    linear: P -> C, the first four inputs x1, y1, x2, y2; weights of the other inputs start at 0.
    BERT's initialisation gives all boxes nearly the same direction, since their numbers are positive; and where
    features and boxes are added before a norm (ViLBERT), boxes vanish. docs/decisions.md has the gain.
    """
    centre = torch.randn(len(linear.weight), 2) * 0.5 / 0.25  # (C, 2), weights of centre x and y
    size = torch.randn(len(linear.weight), 2) * 0.5 / 0.1  # (C, 2), weights of width and height
    linear.weight.zero_()
    linear.weight[:, :4] = torch.cat([centre / 2 - size, centre / 2 + size], 1)  # centre (x1 + x2) / 2, width x2 - x1
    mean_box = torch.tensor([0.375, 0.375, 0.625, 0.625])
    linear.bias.copy_(-linear.weight[:, :4] @ mean_box)


# ---- losses -----------------------------------------------------------------------------------------------------


def gather_positions(states, index):
    """States at flat positions: states (B, S, C), index (M,) into B*S -> (M, C).

    The batch brings index lists made on the CPU; a boolean mask would make a GPU wait for its count.
    """
    return states.flatten(0, 1).index_select(0, index)  # (B, S, C) -> (B*S, C) -> (M, C)


def masked_mean(states, mask):
    """Mean over a row's real positions: states (B, S, C), mask (B, S) bool, True = real -> (B, C); 0 if none is."""
    return states.masked_fill(~mask[:, :, None], 0.0).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)


@in_float32
def cross_entropy(logits, labels, reduction="mean"):
    """-log softmax(logits)[label] in nats. logits (M, K), labels (M,) int64. The mean of an empty batch is 0.

    The official codes return NaN there, which would end a run at the first batch in which nothing was masked.
    """
    if reduction == "mean" and len(labels) == 0:
        return logits.sum() * 0.0
    return F.cross_entropy(logits, labels, reduction=reduction)


@in_float32
def squared_error(predictions, targets):
    """Squared difference, mean over all elements; 0 if there are none. predictions, targets (M, F)."""
    total = F.mse_loss(predictions, targets.to(predictions.dtype), reduction="sum")
    return total / max(1, targets.numel())


@in_float32
def kl_divergence(logits, probs):
    """KL(t || softmax(logits)) = sum_k t_k (log t_k - log p_k), summed over rows. logits, probs t (M, K).

    Classes with t_k = 0 count as 0. Rows of t need not sum to 1: detectors store them rounded.
    """
    return F.kl_div(logits.log_softmax(-1), probs.to(logits.dtype), reduction="sum")


@in_float32
def margin_ranking_loss(logits, margin=0.2):
    """max(0, margin + s(negative) - s(positive)), s the sigmoid, mean over negatives. logits (groups, 1 + negatives),
    the positive first."""
    probs = logits.sigmoid()
    return F.relu(margin + probs[:, 1:] - probs[:, :1]).mean()  # (groups, negatives) -> ()


@in_float32
def soft_answer_loss(logits, targets):
    """Binary cross-entropy against soft answer scores (VQA; Teney 2018), summed over answers, mean over rows:

        L = 1/B sum_b sum_a -[ t log s(x) + (1 - t) log(1 - s(x)) ],   s the sigmoid

    logits x (B, A), targets t (B, A) in 0..1. The papers write it as the mean times A.
    """
    return F.binary_cross_entropy_with_logits(logits, targets) * logits.shape[1]


@in_float32
def optimal_transport(text, regions, text_mask, region_mask, beta=0.5, iterations=50):
    """Word-region distance by the inexact proximal point method IPOT (Xie 2018; UNITER, section 3.2):

        min_P <P, C>  over plans P (T, N) whose rows sum to 1/#words and whose columns sum to 1/#regions,
        C_ij = 1 - cos(text_i, regions_j)

    text (B, T, C), regions (B, N, C); text_mask (B, T), region_mask (B, N) bool, True = takes part.
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
            columns = num_regions * (q * sigma).sum(1, keepdim=True)  # (B, T, N) -> (B, 1, N)
            delta = region_mask[:, None, :] / columns.clamp(min=tiny)
            rows = num_words * (q * delta).sum(2, keepdim=True)  # (B, T, N) -> (B, T, 1)
            sigma = text_mask[:, :, None] / rows.clamp(min=tiny)
            plan = sigma * q * delta
    return (plan * cost).sum((1, 2)), plan, cost


# ---- contrast: image, text (B, C), L2-normalised, row i of each is one pair -> a scalar -------------------------


@in_float32
def pairwise_cosine(image, text, same=None):
    """Cosines (B, B), pictures x texts, and two masks (B, B) bool: which pairs are positives, which are negatives.

    The diagonal is positive. All else is negative but `same` (B, B) bool, symmetric, True = rows i and j show one
    picture. ValueError if the shapes differ.
    """
    if image.shape != text.shape:
        raise ValueError(f"pictures {tuple(image.shape)} and texts {tuple(text.shape)} are not pairs: shapes differ")
    cosines = image @ text.T  # (B, C) @ (C, B) -> (B, B)
    positive = torch.eye(len(image), dtype=torch.bool, device=image.device)
    negative = ~positive
    if same is not None:
        negative = negative & ~same
    return cosines, positive, negative


def info_nce(image, text, temperature=0.07, same=None):
    """Symmetric InfoNCE (van den Oord 2018, eq. 4; CLIP 2021, fig. 3): pull each pair together, push the batch apart.

        L = 1/2 [ CE(s, I) + CE(s^T, I) ],   s_ij = <image_i, text_j> / temperature

    temperature: > 0, float or 0-d tensor.   same: as in `pairwise_cosine`; such pairs are left out of the sums.
    Returns a 0-d tensor in nats; log B is chance.   ValueError if the shapes differ.
    """
    cosines, positive, negative = pairwise_cosine(image, text, same)
    logits = (cosines / temperature).masked_fill(~(negative | positive), -torch.inf)
    labels = torch.arange(len(image), device=image.device)
    return (cross_entropy(logits, labels) + cross_entropy(logits.T, labels)) / 2


def hardest_hinge(image, text, margin=0.2, same=None):
    """Hinge on the hardest negative (VSE++, Faghri 2018, section 2.3), c the cosines:

        L = 1/B sum_i [ max_j (m + c_ij - c_ii)_+ + max_j (m + c_ji - c_ii)_+ ],   j a negative of i

    The official code sums over the batch. same, ValueError: as in `pairwise_cosine`.
    """
    cosines, _, negative = pairwise_cosine(image, text, same)
    if len(cosines) == 0:
        return cosines.sum()
    positives = cosines.diagonal()  # (B,)
    negatives = cosines.masked_fill(~negative, -torch.inf)
    hardest_image = negatives.amax(0)  # (B, B) -> (B,), for each text
    hardest_text = negatives.amax(1)  # (B, B) -> (B,), for each picture
    return F.relu(margin + hardest_image - positives).mean() + F.relu(margin + hardest_text - positives).mean()


def sigmoid_contrast(image, text, temperature=0.1, bias=-10.0, same=None):
    """SigLIP (Zhai 2023, section 3.2): each of the B^2 pairs is classified alone, z = 1 for a true one, else -1.

        L = -1/B sum_ij log sigmoid( z_ij (<image_i, text_j> / temperature + bias) )

    bias: float or 0-d tensor; starts at -10, as nearly all pairs are false. same, ValueError: as in `pairwise_cosine`.
    """
    cosines, positive, negative = pairwise_cosine(image, text, same)
    sign = 2.0 * positive - 1.0  # (B, B)
    log_probs = F.logsigmoid(sign * (cosines / temperature + bias))
    return -(log_probs * (negative | positive)).sum() / max(1, len(image))


def decoupled_contrast(image, text, temperature=0.07, same=None):
    """DCL (Yeh 2022, section 3): InfoNCE without the positive in the denominator, where it slows learning down.

        L = 1/2B sum_i [ -2 s_ii + log sum_j exp s_ij + log sum_j exp s_ji ],   j a negative of i,  s as in `info_nce`

    The paper's negatives within one modality are left out. A row without negatives counts as 0.
    same, ValueError: as in `pairwise_cosine`.
    """
    cosines, _, negative = pairwise_cosine(image, text, same)
    logits = cosines / temperature
    has_negative = negative.any(1)  # (B,), for rows and columns alike: `negative` is symmetric
    negatives = logits.masked_fill(~negative, -torch.inf)
    # rows without negatives become 0, because logsumexp of -inf alone has no gradient
    to_text = negatives.masked_fill(~has_negative[:, None], 0.0).logsumexp(1)  # (B, B) -> (B,)
    to_image = negatives.masked_fill(~has_negative, 0.0).logsumexp(0)
    return (((to_text + to_image) / 2 - logits.diagonal()) * has_negative).sum() / max(1, len(image))


def scheduled_temperature(first, last, part):
    """Half a cosine from `first` to `last` while `part` goes from 0 to 1 (cf. Kukleva 2023, section 3.2):
    first + (last - first) (1 - cos(pi part)) / 2."""
    return first + (last - first) * (1.0 - math.cos(math.pi * part)) / 2


@in_float32
def l2_normalize(x):
    """x / ||x|| over the last axis."""
    return F.normalize(x, dim=-1)


class ContrastHead(nn.Module):
    """The head of image-text contrast. Text and picture, each encoded alone, become unit vectors (E,) of one space.

    The text's vector is a linear map of [CLS], the picture's of the mean over its regions. The temperature is learned
    as log_scale = log(1 / temperature) (CLIP 2021, section 2.5). It starts at 0.07 and stays in 0.01..1.
    """

    def __init__(self, text_width, region_width, width, kind="infonce"):
        super().__init__()
        self.project_text = Float32Linear(text_width, width, bias=False)
        self.project_image = Float32Linear(region_width, width, bias=False)
        self.kind = kind
        self.log_scale = nn.Parameter(torch.tensor(-math.log(0.07)))
        self.bias = nn.Parameter(torch.tensor(-10.0)) if kind == "sigmoid" else None

    def text(self, states):
        """(B, T, C) -> (B, E)"""
        return l2_normalize(self.project_text(states[:, 0]))

    def image(self, states, mask):
        """(B, N, C), mask (B, N) bool, True = a region -> (B, E)"""
        return l2_normalize(self.project_image(masked_mean(states, mask)))

    def forward(self, image, text, pictures):
        """The loss that `kind` names, over the rows of all processes, and its logits (B', B').

        image, text (B, E); pictures (B,) int64, which picture each row shows: rows of one picture are no negatives.
        """
        vectors = gather_with_gradient(torch.cat([image, text], 1))  # (B, 2E) -> (B', 2E): one exchange for the two
        image, text = vectors.chunk(2, 1)
        pictures = gather_with_gradient(pictures)
        same = pictures[:, None] == pictures  # (B', B')
        if self.training:
            self.log_scale.data.clamp_(0.0, math.log(100.0))  # the parameter itself, so that it keeps a gradient
        temperature = (-self.log_scale).exp()
        if self.kind == "infonce":
            loss = info_nce(image, text, temperature, same)
        elif self.kind == "hinge":
            loss = hardest_hinge(image, text, same=same)
        elif self.kind == "sigmoid":
            loss = sigmoid_contrast(image, text, temperature, self.bias, same)
        else:
            loss = decoupled_contrast(image, text, temperature, same)
        return loss, pairwise_cosine(image, text)[0] / temperature


# ---- distillation: a student learns a teacher's logits, attention and states ------------------------------------


@in_float32
def soft_label_loss(student, teacher, temperature=2.0):
    """Soft labels (Hinton 2015, section 2): T^2 KL( softmax(teacher / T) || softmax(student / T) ), mean over rows.

    student, teacher: logits (M, K). T^2 keeps the size of the gradient, which falls as 1 / T^2. Values without
    classes, (M,), are compared by their squared difference. ValueError if the shapes differ.
    """
    if student.shape != teacher.shape:
        raise ValueError(f"logits {tuple(student.shape)} of the student, {tuple(teacher.shape)} of the teacher")
    if len(student) == 0:
        return student.sum() * 0.0
    if student.ndim == 1:
        return (student - teacher).square().mean()
    log_p = (student / temperature).log_softmax(-1)
    log_t = (teacher / temperature).log_softmax(-1)
    return temperature**2 * (log_t.exp() * (log_t - log_p)).sum(-1).mean()  # (M, K) -> (M,) -> ()


def teacher_projections(text_width, region_width, widths):
    """Linear maps from a student's states to a teacher's widths (text, regions), learned with the student and not used
    afterwards. One for all layers of a modality (TinyBERT)."""
    return nn.ModuleDict({"text": nn.Linear(text_width, widths[0]), "regions": nn.Linear(region_width, widths[1])})


def layer_map(student, teacher):
    """Which teacher layer each student layer imitates: uniform, last to last (TinyBERT, Jiao 2020, section 3.1).

    Two and six layers: [2, 5]."""
    return [max(0, (i + 1) * teacher // student - 1) for i in range(student)]


def average_heads(maps, heads):
    """Attention maps (B, H, T, S) averaged to `heads` heads, each over H / heads neighbours -> (B, heads, T, S).
    ValueError if H is not a multiple."""
    if maps.shape[1] % heads:
        raise ValueError(f"{maps.shape[1]} attention heads of the teacher cannot be shared by {heads} of the student")
    return maps.unflatten(1, (heads, -1)).mean(2)  # (B, H, T, S) -> (B, heads, H/heads, T, S) -> (B, heads, T, S)


def mean_over_rows(values, mask):
    """Mean over a row's True positions, then over rows: values, mask (B, S) -> (). A row without any counts as 0."""
    return ((values * mask).sum(1) / mask.sum(1).clamp(min=1)).mean()


def visible_log_probs(maps, visible):
    """Log of attention maps (B, H, T, S), rescaled to sum to 1 over the visible keys (B, 1, 1, S); 0 elsewhere."""
    tiny = torch.finfo(torch.float32).tiny
    maps = maps * visible
    return (maps / maps.sum(-1, keepdim=True).clamp(min=tiny)).clamp(min=tiny).log() * visible


@in_float32
def attention_loss(student, teacher, queries, keys):
    """Two losses on attention maps, (kl, mse), each a mean over heads, over a row's real queries, over rows:

        kl  = sum_s t_s (log t_s - log p_s)                        maps (MiniLM, Wang 2020, section 3.1)
        mse = mean_s ( (log t_s - mean log t) - (log p_s - mean log p) )^2      logits (TinyBERT, Jiao 2020, eq. 7)

    student p (B, H, T, S), teacher t (B, H', T, S), H' a multiple of H; queries (B, T), keys (B, S) bool, True = real.
    log p is the logit up to a constant of its query, which the mean removes.
    """
    visible = keys[:, None, None, :]  # (B, 1, 1, S)
    count = visible.sum(-1, keepdim=True).clamp(min=1)  # (B, 1, 1, 1)
    log_p = visible_log_probs(student, visible)
    log_t = visible_log_probs(average_heads(teacher, student.shape[1]), visible)
    kl = (log_t.exp() * (log_t - log_p) * visible).sum(-1)  # (B, H, T, S) -> (B, H, T)
    student_logits = log_p - log_p.sum(-1, keepdim=True) / count
    teacher_logits = log_t - log_t.sum(-1, keepdim=True) / count
    mse = ((teacher_logits - student_logits).square() * visible).sum(-1) / count.squeeze(-1)  # (B, H, T)
    return mean_over_rows(kl.mean(1), queries), mean_over_rows(mse.mean(1), queries)


@in_float32
def hidden_loss(student, teacher, mask):
    """Hidden states (TinyBERT, Jiao 2020, eq. 8): squared difference, mean over C, over real positions, over rows.

    student (B, S, C), projected to the teacher's width; teacher (B, S, C); mask (B, S), True = real."""
    return mean_over_rows((student - teacher).square().mean(-1), mask)


# ---- objectives that models share: (model, encoding, batch) -> (loss, logits) ------------------------------------


def question_answering(model, encoding, batch, head="vqa"):
    """VQA, GQA, and SNLI-VE with its three answers: `soft_answer_loss` against batch.answers (B, A). Logits (B, A)."""
    logits = model.heads[head](encoding.pooled)
    return soft_answer_loss(logits, batch.answers), logits


def visual_commonsense_reasoning(model, encoding, batch):
    """VCR (UNITER, section 4): cross-entropy of right against wrong for each choice, one choice a row.

    batch.target (rows,), 1 = the right choice. Logits (rows,): those of "right", to be ranked within a question."""
    logits = model.heads["vcr"](encoding.pooled)  # (rows, 2)
    return cross_entropy(logits, batch.target), logits[:, 1]


def retrieval_rank(model, encoding, batch, group=3):
    """Retrieval (UNITER, section 4.1): `margin_ranking_loss` in each group of rows, of which the first is the true pair.

    Rows B = groups x group; 3 is one true pair, one with a false picture, one with a false text. Logits (B,).
    """
    logits = model.heads["rank"](encoding.pooled).squeeze(-1)  # (B, 1) -> (B,)
    return margin_ranking_loss(logits.view(-1, group)), logits  # (B,) -> (groups, group)


def referring_expression(model, encoding, batch):
    """Referring expressions (UNITER, section 4): cross-entropy over the regions, SUMMED over the batch (official code).

    batch.target: (B,) int64, the region referred to; or (B, N) float, overlaps, of which the largest counts.
    Logits (B, N).
    """
    logits = model.heads["refer"](encoding.regions).squeeze(-1)  # (B, N, 1) -> (B, N)
    logits = logits.masked_fill(~batch.region_mask, -10000.0)  # padding
    target = batch.target
    if target.ndim == 2:
        target = target.argmax(1)
    return cross_entropy(logits, target, reduction="sum"), logits


def image_text_contrast(model, encoding, batch):
    """Image-text contrast (CLIP 2021, ALBEF 2021; in none of the three papers): see ContrastHead.

    Text and regions are encoded without each other; `encoding` is not read. The pairs are the rows batch.pair_index
    (M,), of all processes. Rows of one picture, batch.pictures (B,), are no negatives of each other.
    Logits (M, M), pictures x texts.
    """
    head = model.heads["itc"]
    text = head.text(model.encode(batch, regions=False).text)  # (B, E)
    image = head.image(model.encode(batch, text=False).regions, batch.region_mask)  # (B, E)
    pairs = batch.pair_index
    return head(image.index_select(0, pairs), text.index_select(0, pairs), batch.pictures.index_select(0, pairs))


def next_words(model, batch, cache, region_mask):
    """What the models' `decode` share: a prefix language model (UniLM, Dong 2019; in none of the three papers).

    Every word sees the regions, earlier words and itself; regions see regions only.
    cache: a dict, empty in the first call. `decode` keeps there what it computed of regions and earlier words;
    batch.text then holds the next words only.   region_mask (B, N), with N = 0 if the sequence holds words only.
    Returns embeddings of batch.text (B, T, C) and the mask (B, T, N + earlier + T) bool, True = visible, whose keys
    are regions, earlier words, these words.
    """
    earlier = cache.get("words", 0)
    T = batch.text.shape[1]
    cache["words"] = earlier + T
    causal = torch.ones(T, earlier + T, dtype=torch.bool, device=region_mask.device).tril(earlier)
    rows = len(region_mask)
    visible = torch.cat([region_mask[:, None].expand(-1, T, -1), causal.expand(rows, -1, -1)], 2)
    return model.text_embedding(batch.text, batch.segments, earlier), visible


def captioning(model, encoding, batch):
    """Captioning as a prefix language model: -log P(next word | regions, earlier words), mean over words.

    batch.word_index (M,): flat positions of the words that another follows; word_labels (M,): the followers.
    `encoding` is not read, because its words see later words. Logits (M, V).
    """
    logits = model.word_logits(gather_positions(model.decode(batch), batch.word_index))
    return cross_entropy(logits, batch.word_labels), logits


# ---- the table of objectives ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Objective:
    """One row of a model's table OBJECTIVES: a loss, and what the rest of the code must know to train it.

    loss(model, encoding, batch) returns the loss, a 0-d tensor, and the logits that it was computed from.
    """

    loss: Callable
    head: str | None = None  # its entry in the model's HEADS
    pretraining: bool = False  # True: --objectives may name it
    masks: str | None = None  # what its batches mask: "words" or "regions"
    mismatch: bool = False  # True: some pairs of its batches are mismatched
    mean_over: str = "rows"  # what the mean in the loss runs over: see `count_items`
    is_sum: bool = False  # True: the loss is a sum over the batch, not a mean
    encodes: bool = False  # True: it encodes the batch itself and does not read `encoding`
    fields: tuple = ()  # what the data must have for it: names of fields of a Batch
    labels: Callable | None = None  # (batch, logits) -> (M,) int64, for its accuracy; None: it has none
    open_answers: bool = False  # True: its logits have a column for each answer of the training split
    logits: str = "classes"  # what a student learns from a teacher's logits: "classes", "numbers" or "nothing"


def regions_to_predict(batch):
    """(B, N) bool, True = a real region, masked or not, of a row in which words and regions are to be predicted."""
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
    """The detector's most likely class of each masked region, never background: (M,), an index into the K logits."""
    classes = gather_positions(batch.object_probs, batch.region_index)[:, 1:].argmax(-1)  # (M, K) -> (M,)
    return classes + logits.shape[-1] - batch.object_probs.shape[-1] + 1  # LXMERT's logits have no background


SHARED_OBJECTIVES = {  # each model's table adds its own, or replaces one of these
    "itc": Objective(
        image_text_contrast,
        head="itc",
        pretraining=True,
        mean_over="pairs",
        encodes=True,
        labels=lambda batch, logits: torch.arange(len(logits)),  # picture i belongs to text i
    ),
    "vqa": Objective(question_answering, head="vqa", open_answers=True),
    "ve": Objective(functools.partial(question_answering, head="ve"), head="ve"),
    "vcr": Objective(visual_commonsense_reasoning, head="vcr"),
    "rank": Objective(retrieval_rank, head="rank"),
    "refer": Objective(referring_expression, head="refer", is_sum=True),
    "caption": Objective(captioning, head="mlm", mean_over="words", encodes=True),
}

# ---- boxes ------------------------------------------------------------------------------------------------------


def iou(a, b):
    """Intersection over union of boxes x1, y1, x2, y2: |a and b| / (|a| + |b| - |a and b|).

    a, b (..., 4), broadcast; returns (...), 0 for two empty boxes. A prediction counts as right above 0.5.
    """
    overlap = torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])  # (..., 2): width, height
    intersection = overlap.clamp(min=0).prod(-1)
    union = (a[..., 2:] - a[..., :2]).prod(-1) + (b[..., 2:] - b[..., :2]).prod(-1) - intersection
    return torch.where(union > 0, intersection / union, 0.0)


# ---- several processes, messages --------------------------------------------------------------------------------


class UserError(ValueError):
    """A mistake of the user's: files, options, values. It ends the program with its one line and exit code 2.

    The message says where, what is wrong, how to mend it. Line breaks are removed: messages of other packages that
    ours quote have some.
    """

    def __init__(self, message):
        super().__init__(" ".join(message.split()))


def rank_and_world():
    """(rank, world) under torchrun, (0, 1) without it. Tensors on GPUs travel by NCCL, those on CPUs by gloo."""
    if "RANK" not in os.environ or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return 0, 1
    if not dist.is_initialized():
        dist.init_process_group()
    return dist.get_rank(), dist.get_world_size()


def all_reduce_sum(values):
    """The sum over all processes of numbers or of a tensor, as a float64 tensor on the CPU, so that no GPU waits."""
    tensor = torch.as_tensor(values, dtype=torch.float64).clone()
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def print0(text):
    """Prints a line, in the first process only."""
    if rank_and_world()[0] == 0:
        print(text, flush=True)


class SumOverProcesses(torch.autograd.Function):
    """The sum of x over all processes. Backward: the sum of all processes' gradients."""

    @staticmethod
    def forward(ctx, x):
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, gradient):
        return SumOverProcesses.apply(gradient)


def gather_with_gradient(x):
    """The rows of all processes in the order of ranks: x (n, ...) -> (sum of n, ...). n may differ between processes.

    If each process weights its copy of the loss by its share of the rows, the gradients equal those of one process
    with all rows. Returns x itself in a single process, and in evaluation (`torch.inference_mode`), where the
    processes have different numbers of batches.
    """
    if torch.is_inference_mode_enabled() or not dist.is_initialized():
        return x
    rank = dist.get_rank()
    counts = torch.zeros(dist.get_world_size(), dtype=torch.long)
    counts[rank] = len(x)
    dist.all_reduce(counts)
    before = x.new_zeros(int(counts[:rank].sum()), *x.shape[1:])
    after = x.new_zeros(int(counts[rank + 1 :].sum()), *x.shape[1:])
    # every process has zeros in the rows of the others, so that the sum is a gather that allows unequal sizes
    return SumOverProcesses.apply(torch.cat([before, x, after]))


# ---- CPU tuning: dropout ----------------------------------------------------------------------------------------


def apply_dropout(x, p):
    """Dropout (Srivastava 2014): each value of x becomes 0 with probability p, else x / (1 - p).

    On a CPU torch draws the mask one value at a time, a tenth of a step in bfloat16. Here one draw of 64 bits serves
    four values; p is rounded to a multiple of 1/65536.
    """
    if p == 0 or p == 1 or x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.dropout(x, p)
    bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    bits = bits.view(torch.int16)[: x.numel()].view(x.shape)  # uniform in -2**15 .. 2**15 - 1
    keep = torch.ge(bits, int(p * 2**16) - 2**15, out=torch.empty_like(x))
    return x * keep.mul_(1 / (1 - p))


class Dropout(nn.Dropout):
    """`apply_dropout` in training, the identity in evaluation."""

    def forward(self, x):
        return apply_dropout(x, self.p) if self.training else x


# ---- to be removed once lxmert.py and vilbert.py hold their own --------------------------------------------------


def masked_lm(model, encoding, batch):
    """Masked language modelling: -log P(w_m | other words, regions), mean over masked words. Logits (M, V)."""
    logits = model.word_logits(gather_positions(encoding.text, batch.word_index))
    return cross_entropy(logits, batch.word_labels), logits


def masked_region_class(model, encoding, batch):
    """Masked region classification: cross-entropy with the detector's most likely class. Logits (M, K)."""
    logits = model.heads["mrc"](gather_positions(encoding.regions, batch.region_index))
    labels = gather_positions(batch.object_probs, batch.region_index)[:, 1:].argmax(-1) + 1
    return cross_entropy(logits, labels), logits


def image_text_matching(model, encoding, batch):
    """Image-text matching: cross-entropy with batch.matched (B,). Logits (B, 2), class 1 = match."""
    logits = model.heads["itm"](encoding.pooled)
    return cross_entropy(logits, batch.matched), logits


SHARED_OBJECTIVES |= {
    "mlm": Objective(
        masked_lm,
        head="mlm",
        pretraining=True,
        masks="words",
        mean_over="words",
        labels=lambda batch, logits: batch.word_labels,
    ),
    "itm": Objective(
        image_text_matching,
        head="itm",
        pretraining=True,
        mismatch=True,
        labels=lambda batch, logits: batch.matched,
    ),
}
