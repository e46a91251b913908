"""common.py: the formulas that ViLBERT, LXMERT and UNITER share, written out once.

All three papers build on BERT's post-norm Transformer (Devlin 2019), so its parts are here: scaled dot-product
attention, multi-head attention (self and cross), feed-forward, layer norm, GELU, pooler and prediction heads; then
the losses and the optimal transport that more than one model uses. Where torch has a faster kernel, the explicit
formula stands first and the kernel beside it; `tests/test_common.py` holds the two equal.

Letters: B batch, T text positions, N regions, S keys (text, regions or both), C width, H heads, D = C / H,
F region-feature width, V vocabulary, A answers, K region classes, M masked positions.
"""

import math
from collections import Counter
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import nn

# ---- elementary formulas ---------------------------------------------------------------------------------------


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
    (B, 1, 1, S), or (B, 1, T, S), to be added to the scores (B, H, T, S). A row without any visible key attends as if nothing were hidden: the constant shifts all its scores alike.
    """
    mask = mask[:, None] if mask.ndim == 2 else mask  # (B, S) -> (B, 1, S)
    return (1.0 - mask[:, None].to(dtype)) * hidden  # (B, 1 or T, S) -> (B, 1, 1 or T, S)


def prefix_mask(region_mask, words, before=0):
    """Who sees what when words are read from left to right beside a picture: every word sees all regions, the words
    before it and itself. region_mask (B, N) bool. Returns (B, T, N + before + T) bool, True = seen, T = `words`, for
    the keys [regions; `before` words read earlier; these words]."""
    rows = torch.ones(words, before + words, dtype=torch.bool, device=region_mask.device).tril(
        before
    )  # (T, before + T)
    return torch.cat([region_mask[:, None].expand(-1, words, -1), rows.expand(len(region_mask), -1, -1)], 2)


def attention(query, key, value, bias=None, dropout=0.0):
    """Scaled dot-product attention (Vaswani 2017, eq. 1): softmax(Q K^T / sqrt(D) + bias) V.

    query (B, H, T, D); key, value (B, H, S, D); bias broadcastable to (B, H, T, S), from `attention_bias`.
    Returns the context (B, H, T, D) and the probabilities (B, H, T, S), taken before dropout.
    """
    scores = query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1])  # (B,H,T,D) @ (B,H,D,S) -> (B,H,T,S)
    if bias is not None:
        scores = scores + bias
    probabilities = scores.softmax(-1)
    return F.dropout(probabilities, dropout) @ value, probabilities  # (B,H,T,S) @ (B,H,S,D) -> (B,H,T,D)


def fused_attention(query, key, value, bias=None, dropout=0.0):
    """The same as `attention` by torch's own kernel, which keeps no probabilities. Returns (B, H, T, D).

    On a CPU the kernel runs in float32 whatever the inputs: its bfloat16 gradient is eight times slower (torch 2.13).
    """
    if query.device.type == "cpu" and query.dtype == torch.bfloat16:
        with torch.autocast("cpu", enabled=False):
            bias = None if bias is None else bias.float()
            return fused_attention(query.float(), key.float(), value.float(), bias, dropout).to(query.dtype)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, dropout_p=dropout)


# ---- the Transformer's parts -----------------------------------------------------------------------------------


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
        (B, H, T, S) are appended: only then is the explicit formula used.

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
        if maps is None:
            mixed = fused_attention(query, key, value, bias, dropout)
        else:
            mixed, probabilities = attention(query, key, value, bias, dropout)
            maps.append(probabilities)
        return self.output(mixed.transpose(1, 2).flatten(2))  # (B,H,T,D) -> (B,T,H*D) -> (B,T,C)

    forward = attend


class AttentionBlock(MultiHeadAttention):
    """Post-norm attention (BERT): norm(x + dropout(attend(x, context))). Arguments and shapes as above."""

    def __init__(self, width, heads, dropout=0.0, context_width=None, inner=None, hidden_dropout=None):
        super().__init__(width, heads, dropout, context_width, inner)
        self.norm = LayerNorm(width)
        self.hidden_dropout = nn.Dropout(dropout if hidden_dropout is None else hidden_dropout)

    def forward(self, x, context=None, bias=None, maps=None, cache=None):
        return self.norm(x + self.hidden_dropout(self.attend(x, context, bias, maps, cache)))


class FeedForward(nn.Module):
    """Post-norm feed-forward (BERT): norm(x + dropout(W_2 gelu(W_1 x))). x (B, T, C), the inner width is `inner`."""

    def __init__(self, width, inner, dropout=0.0):
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(width, inner), nn.Linear(inner, width), LayerNorm(width)
        self.dropout = nn.Dropout(dropout)

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


def mlp(width, inner, out, activation=nn.GELU):
    """The two-layer head of the fine-tuning tasks: W_2 norm(act(W_1 x)). (..., width) -> (..., out)."""
    return nn.Sequential(nn.Linear(width, inner), activation(), LayerNorm(inner), nn.Linear(inner, out))


def initialise(model, width):
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
def centre_boxes(linear, box):
    """Starts the bias of a box projection at -W box, box (P,) a box in the middle of the picture: W b + bias is then
    W (b - box). With bias 0 all boxes, being positive numbers, start with much the same direction, which the norm that
    follows keeps. Any trained bias replaces this one; the README's decisions have what it is worth."""
    linear.bias.copy_(-linear.weight @ linear.weight.new_tensor(box))


# ---- losses ----------------------------------------------------------------------------------------------------


def at(states, index):
    """The states at flat positions: states (B, S, C), index (M,) into B*S -> (M, C).

    Index lists are made on the CPU with the batch, so that a GPU never waits for a boolean mask to be counted.
    """
    return states.flatten(0, 1).index_select(0, index)  # (B,S,C) -> (B*S,C) -> (M,C)


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


def optimal_transport(text, regions, text_mask, region_mask, beta=0.5, iterations=50):
    """Word-region alignment: the inexact proximal point method IPOT (Xie 2018; UNITER 3.2 and algorithm 1).

        min_P <P, C>  over plans P (T, N) whose rows sum to 1/#words and whose columns sum to 1/#regions,
        C_ij = 1 - cos(text_i, regions_j)

    text (B, T, C), regions (B, N, C); the masks (B, T), (B, N) bool, True = takes part.
    Returns the distances (B,), in 0..2, the plan (B, T, N) and the cost (B, T, N). The plan is a constant to the
    gradient, as in the official code; all is computed in float32 at least, since exp(-C / beta) underflows in half.
    """
    dtype = torch.promote_types(text.dtype, torch.float32)
    with torch.autocast(text.device.type, enabled=False):
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


# ---- boxes and metrics -----------------------------------------------------------------------------------------


def iou(a, b, least=0.0):
    """Intersection over union of boxes x1, y1, x2, y2: |a and b| / (|a| + |b| - |a and b|).

    a, b (..., 4), broadcast; returns (...), 0 for two empty boxes. least: an overlap no wider or no higher than this
    counts as none; the official referring-expression code has 1 pixel. A prediction is right above 0.5.
    """
    overlap = torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])  # (..., 2): width, height
    shared = overlap.prod(-1) * (overlap > least).all(-1)
    union = (a[..., 2:] - a[..., :2]).prod(-1) + (b[..., 2:] - b[..., :2]).prod(-1) - shared
    return torch.where(union > 0, shared / union, 0.0)


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


# ---- generation ------------------------------------------------------------------------------------------------


@torch.no_grad()
def generate(model, batch, first, last, beams=1, most=40, cached=True):
    """Captions of a batch's pictures, word piece by word piece; beams=1 is greedy.

    Beam search: of all ways to lengthen the `beams` likeliest beginnings by one piece the `beams` likeliest are kept; one
    that ends with `last` keeps its log probability. The likeliest of the last beams is returned, by the plain sum
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


# ---- names -----------------------------------------------------------------------------------------------------


def rename(name, rules):
    """One parameter name under another convention: each rule (old, new) is a plain replacement, applied in order."""
    for old, new in rules:
        name = name.replace(old, new)
    return name


def bert_names(state):
    """BERT's own state dict under the names `bert.embeddings...`, `bert.encoder...`, `bert.pooler...`, `cls...`.

    Takes away `module.`; turns UNITER's `uniter.` for `bert.` back; puts `bert.` where a bare BertModel was saved.
    KeyError if it holds no BERT: RoBERTa, DistilBERT and others have their own prefixes or layers.
    """
    out = {}
    for name, tensor in state.items():
        name = name.removeprefix("module.").replace("uniter.", "bert.")
        out["bert." * name.startswith(("embeddings.", "encoder.", "pooler.")) + name] = tensor
    for name in ("bert.embeddings.word_embeddings.weight", "bert.encoder.layer.0.attention.self.query.weight"):
        if name not in out:
            raise KeyError(name)
    return out


def shape_of(state, ending, default=None):
    """The shape of the one parameter whose name ends in `ending`, whatever stands before it; else `default`.
    KeyError without either."""
    found = next((tuple(tensor.shape) for name, tensor in state.items() if name.endswith(ending)), default)
    if found is None:
        raise KeyError(ending)
    return found


def count_layers(state, stack):
    """How many layers a state dict has under `stack`, e.g. "encoder.layer.": the different numbers that follow it."""
    return len({name.split(stack, 1)[1].split(".")[0] for name in state if stack in name})


def text_sizes(state, config):
    """The Config fields that every one of the official state dicts, and BERT's, determines: those of the text.

    config: what the file's config.json says, {} without one. The number of heads is in no weight: it is taken from
    there, else heads are 64 wide, as in every published size but MiniLM's. ValueError if the width does not allow it.
    """
    vocab_size, hidden = shape_of(state, "embeddings.word_embeddings.weight")
    heads = config.get("num_attention_heads", hidden // 64 if hidden % 64 == 0 else 0)
    if type(heads) is not int or heads < 1 or hidden % heads:
        raise ValueError(f"{hidden} wide with {heads or 'an unknown number of'} heads; put its config.json beside it")
    return {
        "vocab_size": vocab_size,
        "hidden": hidden,
        "attention_heads": heads,
        "intermediate": shape_of(state, "encoder.layer.0.intermediate.dense.weight")[0],
        "max_positions": shape_of(state, "embeddings.position_embeddings.weight")[0],
        "types": shape_of(state, "embeddings.token_type_embeddings.weight")[0],
    }
