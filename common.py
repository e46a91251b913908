"""common.py: the formulas that ViLBERT, LXMERT and UNITER share, written out once.

All three papers build on BERT's post-norm Transformer (Devlin 2019), so its parts are here: scaled dot-product
attention, multi-head attention (self and cross), feed-forward, layer norm, GELU, the embedding of words, pooler and
prediction heads; then losses and optimal transport, contrast, objectives that models share, distillation, metrics, beam
search, and what official names have in common.
Where torch has a faster kernel, the explicit formula stands first and the kernel beside it; `tests/test_common.py`
holds the two equal.

Letters: B batch, T text positions, N regions, S keys (text, regions or both), C width, H heads, D = C / H,
F region-feature width, V vocabulary, A answers, K region classes, M masked positions.
"""

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
    """Exact GELU (Hendrycks 2016): x Phi(x) = x/2 (1 + erf(x / sqrt 2)). Any shape. `F.gelu` is the fused kernel."""
    return x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0)))


def layer_norm(x, weight, bias, eps=1e-12):
    """Layer normalisation (Ba 2016): w (x - mean) / sqrt(var + eps) + b over the last axis, var biased (1/C).

    x (..., C), weight (C,), bias (C,). eps is BERT's 1e-12, inside the root. `F.layer_norm` is the fused kernel.
    """
    centred = x - x.mean(-1, keepdim=True)
    return weight * centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() + bias


def attention_bias(mask, dtype, hidden=-10000.0):
    """Additive attention mask, as BERT has it: 0 where a key is seen, `hidden` where it is not.

    mask (B, S) bool, True = key may be seen; (B, T, S) where each of T queries sees keys of its own. Returns
    (B, 1, 1, S), or (B, 1, T, S), to be added to the scores (B, H, T, S). A row without any visible key attends as if
    nothing were hidden: the constant shifts all its scores alike.
    """
    mask = mask[:, None] if mask.ndim == 2 else mask  # (B, S) -> (B, 1, S)
    return (1.0 - mask[:, None].to(dtype)) * hidden  # (B, 1 or T, S) -> (B, 1, 1 or T, S)


def attention(query, key, value, bias=None, dropout=0.0):
    """Scaled dot-product attention (Vaswani 2017, eq. 1): softmax(Q K^T / sqrt(D) + bias) V.

    query (B, H, T, D); key, value (B, H, S, D); bias broadcastable to (B, H, T, S), from `attention_bias`.
    Returns the context (B, H, T, D) and the probabilities (B, H, T, S), taken before dropout.
    """
    scores = query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1])  # (B,H,T,D) @ (B,H,D,S) -> (B,H,T,S)
    if bias is not None:
        scores = scores + bias
    probabilities = scores.softmax(-1)
    return apply_dropout(probabilities, dropout) @ value, probabilities  # (B,H,T,S) @ (B,H,S,D) -> (B,H,T,D)


def fused_attention(query, key, value, bias=None, dropout=0.0):
    """The same as `attention` by torch's own kernel, which keeps no probabilities. Returns (B, H, T, D).

    For GPUs: on a CPU the formula is the faster one at these lengths, forward and backward (torch 2.13).
    """
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, dropout_p=dropout)


# ---- the Transformer's parts ------------------------------------------------------------------------------------


@dataclass
class Encoding:
    """What an encoder returns. Padded positions hold numbers without meaning: use the batch's masks.

    text (B, T, C) and regions (B, N, C) are the last layer's states (None for a modality that was left out), pooled
    (B, C) one vector a row. With `record=True`: `states[name]` (B, S, C), a layer's output, and `maps[name]`
    (B, H, T, S), its attention probabilities, under names that each model file lists.
    """

    text: torch.Tensor | None
    regions: torch.Tensor | None
    pooled: torch.Tensor
    states: dict = field(default_factory=dict)
    maps: dict = field(default_factory=dict)


class LayerNorm(nn.Module):
    """`layer_norm` with its weight and bias (C,), by torch's kernel."""

    def __init__(self, width, eps=1e-12):
        super().__init__()
        self.weight, self.bias, self.eps = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width)), eps

    def forward(self, x):
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


def apply_dropout(x, p):
    """Dropout (Srivastava 2014): each value of x becomes 0 with probability p and else x / (1 - p).

    On a CPU torch draws a mask one value at a time, which is a tenth of a step in bfloat16. Here 64 random bits serve
    four values, so p is rounded to 1/65536.
    """
    if p == 0 or p == 1 or x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.dropout(x, p)
    bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    bits = bits.view(torch.int16)[: x.numel()].view(x.shape)  # uniform in -2**15 .. 2**15 - 1
    keep = torch.ge(bits, int(p * 2**16) - 2**15, out=torch.empty_like(x))
    return x * keep.mul_(1 / (1 - p))


class Dropout(nn.Dropout):
    """`apply_dropout` while training, nothing else."""

    def forward(self, x):
        return apply_dropout(x, self.p) if self.training else x


class TextEmbedding(nn.Module):
    """BERT's: norm(word + position + type), then dropout. ids, segments (B, T) -> (B, T, C).

    before: how many words were read earlier, for texts that come in parts. The word table's row 0, the padding, never
    learns; padding_idx=0: nor do position 0 and type 0.
    """

    def __init__(self, config, padding_idx=None):
        super().__init__()
        self.words = nn.Embedding(config.vocab_size, config.hidden, padding_idx=0)
        self.positions = nn.Embedding(config.max_positions, config.hidden, padding_idx=padding_idx)
        self.types = nn.Embedding(config.types, config.hidden, padding_idx=padding_idx)
        self.norm, self.dropout = LayerNorm(config.hidden), Dropout(config.dropout)

    def forward(self, ids, segments, before=0):
        positions = torch.arange(before, before + ids.shape[1], device=ids.device)
        return self.dropout(self.norm(self.words(ids) + self.positions(positions) + self.types(segments)))


class MultiHeadAttention(nn.Module):
    """Multi-head attention (Vaswani 2017, 3.2.2): concat_h(attention(x W_q^h, c W_k^h, c W_v^h)) W_o, all with biases.

    x (B, T, C) asks; the context c (B, S, C') answers: c = x is self-attention, another c is cross-attention.
    The heads share `inner` dimensions, C unless told otherwise. ValueError if `inner` is no multiple of `heads`.
    """

    def __init__(self, width, heads, dropout=0.0, context_width=None, inner=None):
        super().__init__()
        context_width, inner = context_width or width, inner or width
        if inner % heads:
            raise ValueError(f"attention width {inner} is not a multiple of {heads} heads")
        self.heads, self.dropout = heads, dropout
        self.query, self.key = nn.Linear(width, inner), nn.Linear(context_width, inner)
        self.value, self.output = nn.Linear(context_width, inner), nn.Linear(inner, width)

    def attend(self, x, context=None, bias=None, maps=None, cache=None):
        """Returns (B, T, C). bias (B, 1, 1, S) from `attention_bias`; to the list `maps`, if given, the probabilities
        (B, H, T, S) are appended.

        cache: for reading from left to right, a dict {block: (keys, values)}. In self-attention x is the newest part of
        a sequence: its keys and values are appended to those so far, (B, S, inner), and it sees them all. In
        cross-attention the context is the same at every call: it is projected once.
        """
        if context is not None and cache is not None and self in cache:
            return self.mix(self.query(x), *cache[self], bias, maps)
        source = x if context is None else context
        key, value = self.key(source), self.value(source)
        if cache is not None:
            if self in cache:
                key, value = (torch.cat(pair, 1) for pair in zip(cache[self], (key, value), strict=True))
            cache[self] = key, value
        return self.mix(self.query(x), key, value, bias, maps)

    def mix(self, query, key, value, bias=None, maps=None):
        """What `attend` does with the projections: query (B, T, inner), key and value (B, S, inner) -> (B, T, C)."""
        # (B, T, H*D) -> (B, T, H, D) -> (B, H, T, D), and the same with S for keys and values
        query, key, value = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (query, key, value))
        dropout = self.dropout if self.training else 0.0
        if maps is None and query.is_cuda:
            mixed = fused_attention(query, key, value, bias, dropout)
        else:
            mixed, probabilities = attention(query, key, value, bias, dropout)
            if maps is not None:
                maps.append(probabilities)
        return self.output(mixed.transpose(1, 2).flatten(2))  # (B,H,T,D) -> (B,T,H*D) -> (B,T,C)

    forward = attend


class AttentionBlock(MultiHeadAttention):
    """Post-norm attention (BERT): norm(x + dropout(attend(x, context))). Arguments and shapes as above."""

    def __init__(self, width, heads, dropout=0.0, context_width=None, inner=None, hidden_dropout=None):
        super().__init__(width, heads, dropout, context_width, inner)
        self.norm = LayerNorm(width)
        self.hidden_dropout = Dropout(dropout if hidden_dropout is None else hidden_dropout)

    def forward(self, x, context=None, bias=None, maps=None, cache=None):
        return self.norm(x + self.hidden_dropout(self.attend(x, context, bias, maps, cache)))


class FeedForward(nn.Module):
    """Post-norm feed-forward (BERT): norm(x + dropout(W_2 gelu(W_1 x))). x (B, T, C), the inner width is `inner`."""

    def __init__(self, width, inner, dropout=0.0):
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(width, inner), nn.Linear(inner, width), LayerNorm(width)
        self.dropout = Dropout(dropout)

    def forward(self, x):
        return self.norm(x + self.dropout(self.down(F.gelu(self.up(x)))))


class TransformerLayer(nn.Module):
    """One BERT layer: self-attention, then feed-forward, each in a post-norm residual block. x (B, S, C)."""

    def __init__(self, width, heads, inner, dropout=0.0, attention_dropout=None):
        super().__init__()
        attention_dropout = dropout if attention_dropout is None else attention_dropout
        self.attention = AttentionBlock(width, heads, attention_dropout, hidden_dropout=dropout)
        self.feed_forward = FeedForward(width, inner, dropout)

    def forward(self, x, bias=None, maps=None, cache=None):
        return self.feed_forward(self.attention(x, bias=bias, maps=maps, cache=cache))


class Pooler(nn.Module):
    """BERT's pooler: tanh(W x_0 + b) of the first position. x (B, S, C) -> (B, C). ViLBERT has ReLU in its place."""

    def __init__(self, width, out=None, activation=torch.tanh):
        super().__init__()
        self.dense, self.activation = nn.Linear(width, out or width), activation

    def forward(self, x):
        return self.activation(self.dense(x[:, 0]))


class HeadTransform(nn.Module):
    """What BERT puts before a prediction: norm(gelu(W x + b)). x (..., C) -> (..., C)."""

    def __init__(self, width):
        super().__init__()
        self.dense, self.norm = nn.Linear(width, width), LayerNorm(width)

    def forward(self, x):
        return self.norm(F.gelu(self.dense(x)))


class MaskedLMHead(nn.Module):
    """BERT's masked-word scores: transform(x) E^T + b, E the word table itself (tied). x (M, C), E (V, C) -> (M, V)."""

    def __init__(self, width, vocab_size):
        super().__init__()
        self.transform, self.bias = HeadTransform(width), nn.Parameter(torch.zeros(vocab_size))

    def forward(self, x, words):
        return F.linear(self.transform(x), words, self.bias)


def mlp_head(width, inner, out, activation=nn.GELU):
    """The two-layer head of the fine-tuning tasks: W_2 norm(act(W_1 x)). (..., width) -> (..., out)."""
    return nn.Sequential(nn.Linear(width, inner), activation(), LayerNorm(inner), nn.Linear(inner, out))


def init_weights(model, width):
    """BERT's initialisation: weights N(0, s^2), padding rows too; biases 0. Norms start at 1 and 0.

    s = 0.02, BERT's, at its width of 768 and above; a narrower model gets 0.02 sqrt(768 / width), so that the sum of
    `width` products starts as large as BERT's; the README's decisions have the number.
    """
    std = 0.02 * max(1.0, math.sqrt(768 / width))
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=std)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)


@torch.no_grad()
def init_box_projection(linear):
    """Starts a box projection so that a box's centre and its sides tell about as much as its features do:

        W b + bias = sum over the four of  g (value - mean) / spread,   g (C,) drawn from N(0, 1/4)

    with mean 0.5 and spread 0.25 for centre x and y, 0.25 and 0.1 for width and height, so that such boxes give outputs
    of variance 1. linear: P numbers -> C, the first four of them x1, y1, x2, y2; the columns of the others start at 0.
    In BERT's initialisation all boxes, being positive numbers, start with much the same direction, sides hardly count,
    and where features and boxes are added up before a norm (ViLBERT) boxes do not. Trained weights replace these; the
    README's decisions have what it is worth.
    """
    centre = torch.randn(len(linear.weight), 2) * 0.5 / 0.25  # (C, 2), of x and y
    sides = torch.randn(len(linear.weight), 2) * 0.5 / 0.1
    linear.weight.zero_()
    linear.weight[:, :4] = torch.cat([centre / 2 - sides, centre / 2 + sides], 1)
    linear.bias.copy_(-linear.weight[:, :4] @ torch.tensor([0.375, 0.375, 0.625, 0.625]))  # the mean box


# ---- losses -----------------------------------------------------------------------------------------------------


def gather_positions(states, index):
    """The states at flat positions: states (B, S, C), index (M,) into B*S -> (M, C).

    Index lists are made on the CPU with the batch, so that a GPU never waits for a boolean mask to be counted.
    """
    return states.flatten(0, 1).index_select(0, index)  # (B,S,C) -> (B*S,C) -> (M,C)


def masked_mean(states, mask):
    """The mean over a row's real positions: states (B, S, C), mask (B, S) bool, True = real -> (B, C); 0 of none."""
    return states.masked_fill(~mask[:, :, None], 0.0).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)


def cross_entropy(scores, labels, reduction="mean"):
    """-log softmax(scores)[label], in nats. scores (M, K), labels (M,) int64. An empty mean is 0, not NaN:
    a batch in which nothing was masked must not end a run (the official codes return NaN there)."""
    if reduction == "mean" and len(labels) == 0:
        return scores.sum() * 0.0
    return F.cross_entropy(scores, labels, reduction=reduction)


def soft_answer_loss(scores, targets):
    """Binary cross-entropy against soft answer scores (VQA; Teney 2018), summed over answers, mean over rows.

        L = 1/B sum_b sum_a -[ t log s(x) + (1 - t) log(1 - s(x)) ]

    scores x (B, A) before the sigmoid s, targets t (B, A) in 0..1. The papers write it as mean times A.
    """
    return F.binary_cross_entropy_with_logits(scores, targets) * scores.shape[1]


def full_precision(device):
    """Inside it nothing is cast to half precision, whatever autocast says; some devices have no autocast."""
    known = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if known else nullcontext()


def optimal_transport(text, regions, text_mask, region_mask, beta=0.5, iterations=50):
    """Word-region alignment: the inexact proximal point method IPOT (Xie 2018; UNITER 3.2 and algorithm 1).

        min_P <P, C>  over plans P (T, N) whose rows sum to 1/#words and whose columns sum to 1/#regions,
        C_ij = 1 - cos(text_i, regions_j)

    text (B, T, C), regions (B, N, C); the masks (B, T), (B, N) bool, True = takes part.
    Returns the distances (B,), in 0..2, the plan (B, T, N) and the cost (B, T, N). The plan is a constant to the
    gradient, as in the official code; all is computed in float32 at least, since exp(-C / beta) underflows in half.
    """
    dtype = torch.promote_types(text.dtype, torch.float32)
    with full_precision(text.device):
        words = text.to(dtype) / text.to(dtype).norm(dim=-1, keepdim=True).clamp(min=1e-5)
        areas = regions.to(dtype) / regions.to(dtype).norm(dim=-1, keepdim=True).clamp(min=1e-5)
        pairs = text_mask[:, :, None] & region_mask[:, None, :]  # (B, T, N)
        cost = (1.0 - words @ areas.transpose(1, 2)).masked_fill(~pairs, 0.0)  # (B,T,C) @ (B,C,N) -> (B,T,N)
        with torch.no_grad():
            kernel = torch.exp(-cost / beta) * pairs
            rows, columns = (m.sum(1).clamp(min=1)[:, None, None] for m in (text_mask, region_mask))  # (B, 1, 1)
            sigma, plan = text_mask[:, :, None] / rows.to(dtype), pairs.to(dtype)  # (B, T, 1), (B, T, N)
            tiny = torch.finfo(dtype).tiny
            for _ in range(iterations):
                proximal = kernel * plan
                delta = region_mask[:, None, :] / (columns * (proximal * sigma).sum(1, keepdim=True)).clamp(min=tiny)
                sigma = text_mask[:, :, None] / (rows * (proximal * delta).sum(2, keepdim=True)).clamp(min=tiny)
                plan = sigma * proximal * delta
        return (plan * cost).sum((1, 2)), plan, cost


# ---- contrast: image, text (B, C), L2-normalised, row i of each is one pair -> a scalar -------------------------


def pairwise_cosine(image, text, same=None):
    """What every contrast starts from: cosines (B, B), pictures x texts, and `negative` (B, B) bool, True = a pair to
    push apart: all but the diagonal and those of `same` (B, B) bool, symmetric, True = rows i and j show one picture.

    In float32 at least, since a temperature of 0.01 magnifies every error. ValueError if the shapes differ.
    """
    if image.shape != text.shape:
        raise ValueError(f"pictures {tuple(image.shape)} and texts {tuple(text.shape)} are not pairs: shapes differ")
    dtype = torch.promote_types(image.dtype, torch.float32)
    with full_precision(image.device):
        cosines = image.to(dtype) @ text.to(dtype).T  # (B, C) @ (C, B) -> (B, B)
    negative = ~torch.eye(len(image), dtype=torch.bool, device=image.device)
    return cosines, negative if same is None else negative & ~same


def info_nce(image, text, temperature=0.07, same=None, symmetric=True):
    """Symmetric InfoNCE (van den Oord 2018, eq. 4; CLIP 2021, fig. 3): pull each pair together, push the batch apart.

        L = 1/2 [ CE(s, I) + CE(s^T, I) ],   s_ij = <image_i, text_j> / temperature

    temperature: > 0, float or 0-d tensor.   same: as in `pairwise_cosine`; such pairs are left out of the sums.
    symmetric=False: the first term alone, in which each picture looks for its text.
    Returns a 0-d tensor in nats; log B is chance.   ValueError if the shapes differ.
    """
    cosines, negative = pairwise_cosine(image, text, same)
    itself = torch.eye(len(image), dtype=torch.bool, device=image.device)
    scores = (cosines / temperature).masked_fill(~(negative | itself), -torch.inf)
    labels = torch.arange(len(image), device=image.device)
    loss = cross_entropy(scores, labels)
    return (loss + cross_entropy(scores.T, labels)) / 2 if symmetric else loss


def hardest_hinge(image, text, margin=0.2, same=None):
    """Hinge on the hardest negative (VSE++, Faghri 2018, section 2.3): c the cosines,

        L = 1/B sum_i [ max_j (m + c_ij - c_ii)_+ + max_j (m + c_ji - c_ii)_+ ],   j a negative of i

    The official code sums over the batch. same, ValueError: as in `pairwise_cosine`.
    """
    cosines, negative = pairwise_cosine(image, text, same)
    if len(cosines) == 0:
        return cosines.sum()
    others, own = cosines.masked_fill(~negative, -torch.inf), cosines.diagonal()
    return sum(F.relu(margin + others.amax(way) - own).mean() for way in (0, 1))  # (B, B) -> (B,)


def sigmoid_contrast(image, text, temperature=0.1, bias=-10.0, same=None):
    """SigLIP (Zhai 2023, section 3.2): each of the B^2 pairs alone is told true (z = 1) or false (z = -1).

        L = -1/B sum_ij log sigmoid( z_ij (<image_i, text_j> / temperature + bias) )

    bias: float or 0-d tensor; starts at -10, as nearly all pairs are false. same, ValueError: as in `pairwise_cosine`.
    """
    cosines, negative = pairwise_cosine(image, text, same)
    itself = torch.eye(len(image), dtype=torch.bool, device=image.device)
    sign = 2.0 * itself - 1.0  # (B, B)
    return -(F.logsigmoid(sign * (cosines / temperature + bias)) * (negative | itself)).sum() / max(1, len(image))


def decoupled_contrast(image, text, temperature=0.07, same=None):
    """DCL (Yeh 2022, section 3): InfoNCE without the positive in the denominator, which would slow its learning down
    the more, the easier the batch.

        L = 1/2B sum_i [ -2 s_ii + log sum_j exp s_ij + log sum_j exp s_ji ],   j a negative of i

    s as in `info_nce`; the paper's negatives within one modality are left out. A row without negatives counts as 0.
    same, ValueError: as in `pairwise_cosine`.
    """
    cosines, negative = pairwise_cosine(image, text, same)
    scores, some = cosines / temperature, negative.any(1)  # `negative` is symmetric: rows serve for columns
    others = scores.masked_fill(~negative, -torch.inf)
    to_text = others.masked_fill(~some[:, None], 0.0).logsumexp(1)  # (B,); 0, as no gradient survives log of nothing
    to_image = others.masked_fill(~some, 0.0).logsumexp(0)
    return (((to_text + to_image) / 2 - scores.diagonal()) * some).sum() / max(1, len(image))


def scheduled_temperature(first, last, part):
    """Half a cosine from `first` to `last` while `part` goes from 0 to 1 (cf. Kukleva 2023, section 3.2, whose
    cosine swings): first + (last - first) (1 - cos(pi part)) / 2."""
    return first + (last - first) * (1.0 - math.cos(math.pi * part)) / 2


class GatherWithGradient(torch.autograd.Function):
    """The rows of all processes, in the order of ranks: x (n, ...) -> (sum of n, ...); n may differ between them.

    Backward: every process has a gradient for these rows from its own copy of the loss; they are added up, and each
    keeps the sum for its own rows. Losses that are each weighted by a share, the shares adding up to 1, so have the
    gradient that one process would have with all rows.
    """

    @staticmethod
    def forward(ctx, x):
        rank, counts = dist.get_rank(), torch.zeros(dist.get_world_size(), dtype=torch.long)  # CPU: nobody waits for x
        counts[rank] = len(x)
        dist.all_reduce(counts)
        start = int(counts[:rank].sum())
        ctx.own = slice(start, start + len(x))
        rows = x.new_zeros(int(counts.sum()), *x.shape[1:])
        rows[ctx.own] = x
        dist.all_reduce(rows)  # a sum with zeros everywhere else, since gathering wants equal sizes
        return rows

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)
        return gradient[ctx.own]


def gather_with_gradient(x):
    """`GatherWithGradient` under torchrun; x itself in a single process, and in evaluation (`torch.inference_mode`),
    where processes have different batches, even different numbers of them."""
    return x if torch.is_inference_mode_enabled() or not dist.is_initialized() else GatherWithGradient.apply(x)


def l2_normalize(x):
    """x / ||x|| over the last axis, in float32 at least."""
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)


class ContrastHead(nn.Module):
    """The objective itc: both modalities' states, each encoded alone, as unit vectors (E,) of one space, compared.

    The text's vector is a linear map of [CLS], the picture's of the mean over its regions. The logarithm of
    1 / temperature is a parameter, so that it can be learned (CLIP 2021, section 2.5): temperature starts at 0.07 and
    stays in 0.01..1.
    """

    def __init__(self, text_width, region_width, width, kind="infonce"):
        super().__init__()
        self.project_text = nn.Linear(text_width, width, bias=False)
        self.project_image = nn.Linear(region_width, width, bias=False)
        self.kind, self.log_scale = kind, nn.Parameter(torch.tensor(-math.log(0.07)))
        self.bias = nn.Parameter(torch.tensor(-10.0)) if kind == "sigmoid" else None

    def text(self, states):
        """(B, T, C) -> (B, E)"""
        return l2_normalize(self.project_text(states[:, 0]))

    def image(self, states, mask):
        """(B, N, C), mask (B, N) bool, True = a region -> (B, E)"""
        return l2_normalize(self.project_image(masked_mean(states, mask)))

    def forward(self, image, text, pictures):
        """The loss that `kind` names, over the rows of all processes: image, text (B, E), pictures (B,) int64, which
        picture each row shows: rows of one picture are no negatives. Returns the loss and the scores (B', B')."""
        both = gather_with_gradient(torch.cat([image, text], 1))  # (B, 2E) -> (B', 2E): one exchange for the two
        pictures, (image, text) = gather_with_gradient(pictures), both.chunk(2, 1)
        same = pictures[:, None] == pictures  # (B', B')
        if self.training:
            self.log_scale.data.clamp_(0.0, math.log(100.0))  # the parameter itself: past the bound a gradient must act
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


# ---- objectives that models share: (model, encoding, batch) -> (loss, scores) ------------------------------------


def masked_lm(model, encoding, batch):
    """Masked language modelling (UNITER eq. 1; ViLBERT 2.2; LXMERT 3.1.1): -log P(w_m | other words, regions), mean over
    masked words.

    batch.word_index (M,) flat positions of the masked words, word_labels (M,) what they were. Scores (M, V).
    """
    scores = model.word_logits(gather_positions(encoding.text, batch.word_index))
    return cross_entropy(scores, batch.word_labels), scores


def masked_region_class(model, encoding, batch):
    """Masked region classification (UNITER 3.2; no objective of ViLBERT's paper, and LXMERT has its own): cross-entropy
    with the detector's most likely class, background left out.

    batch.region_index (M,) flat positions of the masked regions, object_probs (B, N, K), class 0 = background; mean
    over masked regions. Scores (M, K).
    """
    scores = model.heads["mrc"](gather_positions(encoding.regions, batch.region_index))
    labels = gather_positions(batch.object_probs, batch.region_index)[:, 1:].argmax(-1) + 1
    return cross_entropy(scores, labels), scores


def image_text_matching(model, encoding, batch):
    """Image-text matching (UNITER eq. 4; ViLBERT 2.2, alignment; LXMERT 3.1.3): cross-entropy of "do they belong
    together?". batch.matched (B,). Scores (B, 2), class 1 = match."""
    scores = model.heads["itm"](encoding.pooled)
    return cross_entropy(scores, batch.matched), scores


def question_answering(model, encoding, batch, head="vqa"):
    """VQA, GQA: binary cross-entropy over all answers against batch.answers (B, A), soft scores. Scores (B, A)."""
    scores = model.heads[head](encoding.pooled)
    return soft_answer_loss(scores, batch.answers), scores


def visual_entailment(model, encoding, batch):
    """SNLI-VE as VQA with three answers (UNITER 4): contradiction, entailment, neutral. batch.answers (B, 3). Scores
    (B, 3)."""
    return question_answering(model, encoding, batch, "ve")


def visual_commonsense_reasoning(model, encoding, batch):
    """VCR (UNITER 4): one row a choice, batch.target (rows,) 1 = the right one; cross-entropy of right against wrong.
    Scores (rows,): logit 1, to be ranked within a question."""
    scores = model.heads["vcr"](encoding.pooled)
    return cross_entropy(scores, batch.target), scores[:, 1]


def retrieval_rank(model, encoding, batch, group=3, margin=0.2):
    """Retrieval (UNITER 4.1): in each group of rows the first is the true pair; the mean over the others of

        max(0, margin + s(negative) - s(positive)),   s the sigmoid of a linear score.

    Rows B = groups x group; 3 is one true pair with one false picture and one false text. Scores (B,), raw.
    """
    scores = model.heads["rank"](encoding.pooled).squeeze(-1)  # (B, 1) -> (B,)
    chance = scores.sigmoid().view(-1, group)  # (B,) -> (groups, group)
    return F.relu(margin + chance[:, 1:] - chance[:, :1]).mean(), scores


def refer_scores(model, encoding, batch):
    """A score for every region, padding at -10000. (B, N)"""
    scores = model.heads["refer"](encoding.regions).squeeze(-1)  # (B, N, 1) -> (B, N)
    return scores.masked_fill(~batch.region_mask, -10000.0)


def referring_expression(model, encoding, batch):
    """Referring expressions (UNITER 4): cross-entropy over the regions, SUMMED over the batch, as in the official code.
    batch.target (B,) int64, the region meant, or (B, N) float, its overlaps with all: the largest counts. Scores (B, N).
    """
    scores, target = refer_scores(model, encoding, batch), batch.target
    return cross_entropy(scores, target if target.ndim == 1 else target.argmax(1), reduction="sum"), scores


# ---- objectives that no paper has, the same for the three -------------------------------------------------------


def image_text_contrast(model, encoding, batch):
    """Image-text contrast (CLIP 2021, ALBEF 2021): words alone and regions alone, each encoded without the other,
    become unit vectors, which `config.contrast` compares: see ContrastHead.

    Over the rows that are true pairs, batch.pair_index (M,), of all processes; rows that show one picture,
    batch.pictures (B,), are no negatives of each other. `encoding` is not read. Scores (M, M), pictures x texts.
    """
    head = model.heads["itc"]
    text = head.text(model.encode(batch, regions=False).text)
    image = head.image(model.encode(batch, text=False).regions, batch.region_mask)
    return head(*(x.index_select(0, batch.pair_index) for x in (image, text, batch.pictures)))


def captioning(model, encoding, batch):
    """Captioning as a prefix language model: -log P(next word | regions, words so far), mean over words.

    batch.word_index (M,) flat positions of the words that another follows, word_labels (M,) the followers. `encoding`
    is not read: in `model.decode` no word sees those after it. Scores (M, V).
    """
    scores = model.word_logits(gather_positions(model.decode(batch), batch.word_index))
    return cross_entropy(scores, batch.word_labels), scores


# ---- the table of objectives ---------------------------------------------------------------------------------------


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


def count_items(mean_over, batch):
    """How many items of a batch an objective's mean runs over."""
    if mean_over == "words":
        return len(batch.word_index)  # masked or predicted words
    if mean_over == "regions":
        return len(batch.region_index)  # masked regions
    if mean_over == "all regions":
        return int(batch.region_mask.sum())
    if mean_over == "pairs":
        return len(batch.pair_index)
    if mean_over == "answers":
        return int(((batch.answer_labels >= 0) & (batch.matched == 1)).sum())
    assert mean_over == "rows", mean_over
    return len(batch.text)


def most_likely_class(batch, logits):
    """The detector's most likely class of each masked region, background left out: (M,), counted as in the K logits."""
    classes = gather_positions(batch.object_probs, batch.region_index)[:, 1:].argmax(-1)
    return classes + logits.shape[-1] - batch.object_probs.shape[-1] + 1  # a head may have no class for background


SHARED_OBJECTIVES = {  # each model file adds its own, or puts its own in place of one of these
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
    "itc": Objective(
        image_text_contrast,
        head="itc",
        pretraining=True,
        mean_over="pairs",
        encodes=True,
        labels=lambda batch, logits: torch.arange(len(logits)),  # the text of the same row
    ),
    "vqa": Objective(question_answering, head="vqa"),
    "ve": Objective(visual_entailment, head="ve"),
    "vcr": Objective(visual_commonsense_reasoning, head="vcr"),
    "rank": Objective(retrieval_rank, head="rank"),
    "refer": Objective(referring_expression, head="refer", is_sum=True),
    "caption": Objective(captioning, head="mlm", mean_over="words", encodes=True),
}


# ---- distillation: a student learns a teacher's scores, attention and states ------------------------------------


def soft_label_loss(student, teacher, temperature=2.0):
    """Soft labels (Hinton 2015, section 2): T^2 KL( softmax(teacher / T) || softmax(student / T) ), mean over rows.

    student, teacher (M, K), scores before the softmax. T^2 keeps the gradient's size, which falls as 1 / T^2. Scores
    without classes, (M,), are compared by their squared difference. ValueError if the shapes differ.
    """
    if student.shape != teacher.shape:
        raise ValueError(f"scores {tuple(student.shape)} of the student, {tuple(teacher.shape)} of the teacher")
    if len(student) == 0:
        return student.sum() * 0.0
    if student.ndim == 1:
        return (student - teacher).square().mean()
    student, teacher = (student / temperature).log_softmax(-1), (teacher / temperature).log_softmax(-1)
    return temperature**2 * (teacher.exp() * (teacher - student)).sum(-1).mean()  # (M, K) -> (M,) -> ()


def teacher_projections(text_width, region_width, widths):
    """Linear maps from a student's states to a teacher's widths (text, regions), learned with the student and of no use
    afterwards. One for all layers of a modality (TinyBERT)."""
    return nn.ModuleDict({"text": nn.Linear(text_width, widths[0]), "regions": nn.Linear(region_width, widths[1])})


def layer_map(student, teacher):
    """Which teacher layer each student layer imitates: evenly spread, last to last (TinyBERT, Jiao 2020, section 3.1).

    (2, 6) -> [2, 5]: each stands for the three that end there."""
    return [max(0, (i + 1) * teacher // student - 1) for i in range(student)]


def average_heads(maps, heads):
    """Attention maps (B, H, T, S) with `heads` heads, each the mean of H / heads neighbours; (B, heads, T, S).
    ValueError if H is no multiple."""
    if maps.shape[1] % heads:
        raise ValueError(f"{maps.shape[1]} attention heads of the teacher cannot be shared by {heads} of the student")
    return maps.unflatten(1, (heads, -1)).mean(2)  # (B, H, T, S) -> (B, heads, H/heads, T, S) -> (B, heads, T, S)


def mean_over_rows(values, mask):
    """Mean over a row's True positions, then over rows: values (B, S), mask (B, S) bool -> (). A row of none is 0."""
    return ((values * mask).sum(1) / mask.sum(1).clamp(min=1)).mean()


def attention_loss(student, teacher, queries, keys):
    """Attention maps, two losses (kl, mse), each a mean over heads, over a row's real queries, over rows.

        kl  = sum_s t_s (log t_s - log p_s)                        maps (MiniLM, Wang 2020, section 3.1)
        mse = mean_s ( (log t_s - mean log t) - (log p_s - mean log p) )^2      scores (TinyBERT, Jiao 2020, eq. 7)

    student p (B, H, T, S), teacher t (B, H', T, S), H' a multiple of H; queries (B, T), keys (B, S) bool, True = real.
    log p is the score up to a constant of its row, to which a softmax is blind: so scores are compared without it.
    Both are rescaled to sum to 1 over the real keys.
    """
    seen, tiny = keys[:, None, None, :], torch.finfo(torch.float32).tiny  # (B, 1, 1, S)
    logs = []
    for maps in (student, average_heads(teacher, student.shape[1])):
        maps = maps.to(torch.promote_types(maps.dtype, torch.float32)) * seen
        logs.append((maps / maps.sum(-1, keepdim=True).clamp(min=tiny)).clamp(min=tiny).log() * seen)
    p, t = logs
    count = seen.sum(-1, keepdim=True).clamp(min=1)  # (B, 1, 1, 1)
    kl = (t.exp() * (t - p) * seen).sum(-1)  # (B, H, T, S) -> (B, H, T)
    p, t = (x - x.sum(-1, keepdim=True) / count for x in (p, t))
    mse = ((t - p).square() * seen).sum(-1) / count.squeeze(-1)  # (B, H, T)
    return mean_over_rows(kl.mean(1), queries), mean_over_rows(mse.mean(1), queries)


def hidden_loss(student, teacher, mask):
    """Hidden states (TinyBERT, Jiao 2020, eq. 8): squared difference, mean over C, over a row's real positions, over
    rows. student (B, S, C), already projected to the teacher's width; teacher (B, S, C); mask (B, S), True = real."""
    return mean_over_rows((student - teacher).square().mean(-1), mask)


# ---- boxes and metrics ------------------------------------------------------------------------------------------


def iou(a, b, least=0.0):
    """Intersection over union of boxes x1, y1, x2, y2: |a and b| / (|a| + |b| - |a and b|).

    a, b (..., 4), broadcast; returns (...), 0 for two empty boxes. least: an overlap no wider or no higher than this
    counts as none; the official referring-expression code has 1 pixel. A prediction is right above 0.5.
    """
    overlap = torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])  # (..., 2): width, height
    shared = overlap.prod(-1) * (overlap > least).all(-1)
    union = (a[..., 2:] - a[..., :2]).prod(-1) + (b[..., 2:] - b[..., :2]).prod(-1) - shared
    return torch.where(union > 0, shared / union, 0.0)


# ---- generation -------------------------------------------------------------------------------------------------


def next_words(model, batch, cache, region_mask):
    """What the models' `decode` have in common. `decode(batch, cache)` reads a text from left to right, as a prefix
    language model has it (UniLM, Dong 2019; in none of the papers): every word sees the regions, the words before it
    and itself; regions see regions only. It returns the words' last states (B, T, C).

    cache: a dict, empty at the first call, in which `decode` keeps what it computed of regions and of earlier words;
    batch.text then holds only the words that follow those of the calls before. None: the whole text at once.
    Returns the embedding of batch.text (B, T, C), and who is seen (B, T, N + before + T) bool, the keys being [regions;
    `before` earlier words; these words]. region_mask (B, N); N = 0 where the words' sequence has no regions in it.
    """
    before, T = cache.get("words", 0), batch.text.shape[1]
    cache["words"] = before + T
    past = torch.ones(T, before + T, dtype=torch.bool, device=region_mask.device).tril(before)
    seen = torch.cat([region_mask[:, None].expand(-1, T, -1), past.expand(len(region_mask), -1, -1)], 2)
    return model.text_embedding(batch.text, batch.segments, before), seen


# ---- names ------------------------------------------------------------------------------------------------------


class UserError(ValueError):
    """Something is wrong with the user's files. The message is one line: where, what is wrong, how to mend it."""

    def __init__(self, message):
        super().__init__(" ".join(message.split()))  # some messages of numpy and Pillow, quoted in ours, have more


# ---- several processes, messages --------------------------------------------------------------------------------------


class UserError(UserError):
    """What ends the program with one line on stderr and exit code 2 where no file is to blame."""


def rank_and_world():
    """(rank, world) under torchrun, (0, 1) without. Tensors on GPUs go by NCCL, those on CPUs by gloo."""
    if "RANK" not in os.environ or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return 0, 1
    if not dist.is_initialized():
        dist.init_process_group()
    return dist.get_rank(), dist.get_world_size()


def all_reduce_sum(values):
    """The sum over all processes of numbers or of a tensor, as a float64 tensor on the CPU: no GPU is waited for."""
    tensor = torch.as_tensor(values, dtype=torch.float64).clone()
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def print0(text):
    """A line on stdout, from the first process only."""
    if rank_and_world()[0] == 0:
        print(text, flush=True)
