"""UNITER: universal image-text representation learning (Chen et al., ECCV 2020, arXiv 1909.11740).

What the model does, in five lines:
1. words become vectors (word + position + type), regions too (feature + box + type, from the same type table);
2. both sequences are laid end to end and pass through one BERT: words and regions attend to each other in every layer;
3. pretraining masks words OR regions, never both (conditional masking), and draws one objective a step;
4. a matching objective tells true pairs from false, and optimal transport aligns words with regions;
5. a small head on the pooled first position, or on each region, answers every downstream task.

Known deviations: sequences are padded, not packed, which changes no valid position; row 0 of the official mask
embedding, zeroed there at each use, does not exist here; widths and heights are computed, official files hold them in
float16; a model from scratch starts with boxes that count and, if narrow, wider weights (`common.init_weights`,
`spread_boxes`). Errors of the official code are listed in the README's errata.
Letters: B batch, T text positions, N regions, C width, F region-feature width, V vocabulary, K classes, M masked.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

import common

# ---- configuration ---------------------------------------------------------------------------------------------


@dataclass
class Config:
    """Sizes of a UNITER. The defaults are the paper's UNITER-base (section 3.1); `preset` gives the others."""

    vocab_size: int = 28996  # BERT's cased word pieces
    hidden: int = 768  # C
    layers: int = 12
    attention_heads: int = 12  # C / 12 = 64 dimensions each
    intermediate: int = 3072  # 4 C, the feed-forward's inner width
    max_positions: int = 512  # longest text
    types: int = 2  # 0 text, 1 picture; NLVR2 adds 2 for the second picture, VCR has 0..3
    feature_size: int = 2048  # F, of the published detector; 3 x patch x patch for regions cut from pixels
    classes: int = 1601  # K, the detector's classes with 0 = background
    attributes: int = 0  # for LXMERT's attribute objective; UNITER has none
    answers: int = 3129  # A, the answer list's length
    dropout: float = 0.1  # everywhere in the trunk; the heads have none
    heads: tuple = ("mlm", "mrfr", "mrc", "itm")  # which of the heads below this model has
    contrast: str = "infonce"  # loss of the objective itc; or "hinge", "sigmoid", "dcl"
    teacher_widths: tuple = ()  # widths (text, regions) of the teacher that the head "hidden" projects to
    nlvr2: str = "paired-attention"  # or "paired", "triplet": how two pictures meet (section 4.1)
    refer_layers: int = 1  # 1: a linear score per region; 2: with a hidden layer (RefCOCO+)


PRESETS = {
    "tiny": {
        "hidden": 128,
        "layers": 3,
        "attention_heads": 4,
        "intermediate": 512,
        "max_positions": 128,
        "dropout": 0.0,
    },
    "base": {},
    "large": {"hidden": 1024, "layers": 24, "attention_heads": 16, "intermediate": 4096},
}

# ---- embeddings: the regions'; the words' is BERT's, `common.TextEmbedding` -------------------------------------


class RegionEmbedding(nn.Module):
    """norm( norm(W_f f) + norm(W_b box) + type ), then dropout (section 3.1, figure 1).

    features f (B, N, F); boxes (B, N, 4) as x1,y1,x2,y2 in 0..1, which become the paper's seven numbers
    [x1, y1, x2, y2, w, h, w h]; types (B, N, C), rows of the text's type table; masked (B, N) bool, True = the
    feature was zeroed and is to be predicted: a learned vector is added to it before W_f. Returns (B, N, C).
    """

    def __init__(self, config):
        super().__init__()
        width = config.hidden
        self.features, self.features_norm = nn.Linear(config.feature_size, width), common.LayerNorm(width)
        self.boxes, self.boxes_norm = nn.Linear(7, width), common.LayerNorm(width)
        self.mask = nn.Parameter(torch.randn(config.feature_size) * 0.02)
        self.norm, self.dropout = common.LayerNorm(width), common.Dropout(config.dropout)

    def forward(self, features, boxes, types, masked=None):
        if masked is not None:
            features = features + masked[:, :, None] * self.mask  # (B, N, 1) * (F,) -> (B, N, F)
        size = boxes[..., 2:] - boxes[..., :2]  # (B, N, 2): width, height
        position = torch.cat([boxes, size, size.prod(-1, keepdim=True)], -1)  # (B, N, 7)
        looks, place = self.features_norm(self.features(features)), self.boxes_norm(self.boxes(position))
        return self.dropout(self.norm(looks + place + types))


# ---- model -----------------------------------------------------------------------------------------------------


class UNITER(nn.Module):
    """One Transformer over words and regions.

    `model(batch, objectives)` returns {objective: (loss, scores)}. `encode` gives the states alone; with
    `record=True` also `states["embedding"]`, `states["layer.i"]` and `maps["layer.i"]` over text and regions together.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.text_embedding = common.TextEmbedding(config)
        self.region_embedding = RegionEmbedding(config)
        sizes = config.hidden, config.attention_heads, config.intermediate, config.dropout
        self.layers = nn.ModuleList(common.TransformerLayer(*sizes) for _ in range(config.layers))
        self.pooler = common.Pooler(config.hidden)
        self.heads = nn.ModuleDict({name: HEADS[name](config) for name in config.heads})
        common.init_weights(self, config.hidden)
        common.init_box_projection(self.region_embedding.boxes)

    def embed_text(self, batch):
        """(B, T, C)"""
        return self.text_embedding(batch.text, batch.segments)

    def embed_regions(self, batch):
        """(B, N, C). Pictures have type 1; the second picture of a pair has type 2."""
        types = torch.ones_like(batch.boxes[..., 0]).long() if batch.region_types is None else batch.region_types + 1
        types = self.text_embedding.types(types)  # (B, N) -> (B, N, C)
        return self.region_embedding(batch.features, batch.boxes, types, batch.masked_regions)

    def unimodal(self, batch):
        """What each modality can compute alone, for `encode(given=)`: here the embeddings. (B, T, C), (B, N, C)"""
        return self.embed_text(batch), self.embed_regions(batch)

    def decode(self, batch, cache=None):
        """The text read from left to right, for captions (see `common.next_words`). Returns (B, T, C)."""
        cache = {} if cache is None else cache
        if not cache:
            x, bias = self.embed_regions(batch), common.attention_bias(batch.region_mask, batch.boxes.dtype)
            for layer in self.layers:
                x = layer(x, bias, cache=cache)
        x, seen = common.next_words(self, batch, cache, batch.region_mask)
        bias = common.attention_bias(seen, x.dtype)  # (B, 1, T, N + words so far)
        for layer in self.layers:
            x = layer(x, bias, cache=cache)
        return x

    def encode(self, batch, text=True, regions=True, record=False, given=None):
        """Encoding of words and regions together, or of one of the two alone (text-only, image-only). given: what
        `unimodal` returned for both, not computed again."""
        words, areas = given or (None, None)
        parts = []  # of the one sequence: states and mask
        if text:
            parts.append((words if given else self.embed_text(batch), batch.text_mask))
        if regions:
            parts.append((areas if given else self.embed_regions(batch), batch.region_mask))
        x, mask = (torch.cat(part, 1) for part in zip(*parts, strict=True))  # (B, T, C), (B, N, C) -> (B, T+N, C)
        bias = common.attention_bias(mask, x.dtype)  # (B, 1, 1, T+N)
        states, maps = {"embedding": x} if record else {}, {}
        for i, layer in enumerate(self.layers):
            probabilities = [] if record else None
            x = layer(x, bias, probabilities)
            if record:
                states[f"layer.{i}"], maps[f"layer.{i}"] = x, probabilities[0]
        T = batch.text.shape[1] if text else 0
        return common.Encoding(x[:, :T] if text else None, x[:, T:] if regions else None, self.pooler(x), states, maps)

    def word_scores(self, states):
        """Scores of the vocabulary by the masked-word head: states (..., C) -> (..., V)."""
        return self.heads["mlm"](states, self.text_embedding.words.weight)

    def forward(self, batch, objectives):
        encoding = None
        if not all(OBJECTIVES[name].encodes for name in objectives):
            encoding = self.encode(batch)
        return {name: OBJECTIVES[name].loss(self, encoding, batch) for name in objectives}


# ---- pretraining objectives: (model, encoding, batch) -> loss, scores ------------------------------------------

PRETRAINING = {
    # ratio in which steps draw them; the official in-domain runs have 2 for mlm, here the short runs need more words
    "objectives": {"mlm": 4, "mrfr": 1, "mrc_kl": 1, "itm": 2},
    "conditional": True,  # one objective a step: while words are masked no region is, and the other way round
    "joined": {"itm": ("wra",)},  # computed in the same step, on the same pairs
    "rate": 1.0,  # of the learning rate, against fine-tuning: 5e-5 at base size
    "weights": {"wra": 0.1},  # factors of the loss; 1 where none is named
    "region_masking": {"zero": 1.0, "random": 0.0},  # a masked region's feature is always zeroed (section 3.2)
    "false_pairs": 0.5,
    "mismatch": "image",  # a negative pair keeps its sentence and gets another picture
}


def masked_region_features(model, encoding, batch):
    """Masked region feature regression: the squared error ||h(v_m) - f_m||^2, mean over masked regions and F.

    Back from C to F by the transpose of the region embedding's own matrix. batch.region_index (M,), clean_features
    (B, N, F) the features before masking. Scores (M, F).
    """
    weight = model.region_embedding.features.weight  # (C, F)
    scores = model.heads["mrfr"](common.gather_positions(encoding.regions, batch.region_index), weight)
    target = common.gather_positions(batch.clean_features, batch.region_index).to(scores.dtype)
    return F.mse_loss(scores, target, reduction="sum") / max(1, target.numel()), scores


def masked_region_class_kl(model, encoding, batch):
    """Classification with soft labels: KL(c || g) = sum_k c_k (log c_k - log g_k), c the detector's distribution.

    batch.object_probs (B, N, K). The mean is over masked regions AND classes, as the official training has it (its
    validation divides by regions). Scores (M, K).
    """
    scores = model.heads["mrc"](common.gather_positions(encoding.regions, batch.region_index))
    target = common.gather_positions(batch.object_probs, batch.region_index).to(scores.dtype)
    return F.kl_div(scores.log_softmax(-1), target, reduction="sum") / max(1, target.numel()), scores


def word_region_alignment(model, encoding, batch):
    """Optimal transport between words and regions (eq. 5): pull true pairs together, push false ones apart.

    (sum of distances over matched rows - sum over mismatched rows) / B. [CLS] and [SEP] count as words.
    Scores: the distances (B,).
    """
    distance, _, _ = common.optimal_transport(encoding.text, encoding.regions, batch.text_mask, batch.region_mask)
    return (distance * (2 * batch.matched - 1)).mean(), distance


# ---- task heads: the same signature ----------------------------------------------------------------------------


class FeatureRegressionHead(nn.Module):
    """transform(x) W + b with W (C, F) the region embedding's matrix. x (M, C) -> (M, F)."""

    def __init__(self, config):
        super().__init__()
        self.transform = common.HeadTransform(config.hidden)
        self.bias = nn.Parameter(torch.zeros(config.feature_size))

    def forward(self, x, weight):
        return self.transform(x) @ weight + self.bias  # (M, C) @ (C, F) -> (M, F)


class PairedAttentionHead(nn.Module):
    """NLVR2 by two encodings that then look at each other (section 4.1, "pair-biattn").

        left' = relu(W [attend(left, right), left]), right' likewise with its own attention and the same W;
        each is pooled by softmax(relu(w x)) over its positions; the two vectors are joined and classified.

    x (2B, S, C) and mask (2B, S): rows 2i and 2i+1 are the two pictures of statement i. Returns (B, 2).
    """

    def __init__(self, config):
        super().__init__()
        width = config.hidden
        self.left = common.MultiHeadAttention(width, config.attention_heads, config.dropout)
        self.right = common.MultiHeadAttention(width, config.attention_heads, config.dropout)
        self.join, self.score, self.output = nn.Linear(2 * width, width), nn.Linear(width, 1), nn.Linear(2 * width, 2)
        self.dropout = common.Dropout(config.dropout)

    def pool(self, attended, own, mask):
        x = self.dropout(F.relu(self.join(torch.cat([attended, own], -1))))  # (B, S, 2C) -> (B, S, C)
        scores = F.relu(self.score(x)).masked_fill(~mask[:, :, None], -10000.0)  # (B, S, 1)
        return (scores.softmax(1) * x).sum(1)  # (B, C)

    def forward(self, x, mask):
        left, right, bias = x[0::2], x[1::2], common.attention_bias(mask, x.dtype)
        pooled_left = self.pool(self.left(left, right, bias[1::2]), left, mask[0::2])
        pooled_right = self.pool(self.right(right, left, bias[0::2]), right, mask[1::2])
        return self.output(torch.cat([pooled_left, pooled_right], -1))  # (B, 2C) -> (B, 2)


def nlvr2_head(config):
    """The head that `config.nlvr2` names: two sequences that attend to each other, two pooled vectors, or one."""
    if config.nlvr2 == "paired-attention":
        return PairedAttentionHead(config)
    return nn.Linear(config.hidden * (2 if config.nlvr2 == "paired" else 1), 2)


def refer_head(config):
    """A score per region: linear, or with one hidden layer."""
    hidden = config.hidden
    return nn.Linear(hidden, 1) if config.refer_layers == 1 else common.mlp_head(hidden, hidden, 1)


HEADS = {
    "mlm": lambda c: common.MaskedLMHead(c.hidden, c.vocab_size),
    "mrfr": FeatureRegressionHead,
    "mrc": lambda c: common.mlp_head(c.hidden, c.hidden, c.classes),
    "itm": lambda c: nn.Linear(c.hidden, 2),
    "itc": lambda c: common.ContrastHead(c.hidden, c.hidden, c.hidden, c.contrast),
    "hidden": lambda c: common.teacher_projections(c.hidden, c.hidden, c.teacher_widths),
    "vqa": lambda c: common.mlp_head(c.hidden, 2 * c.hidden, c.answers),
    "ve": lambda c: common.mlp_head(c.hidden, 2 * c.hidden, 3),
    "nlvr2": nlvr2_head,
    "vcr": lambda c: common.mlp_head(c.hidden, 2 * c.hidden, 2, nn.ReLU),
    "rank": lambda c: nn.Linear(c.hidden, 1),
    "refer": refer_head,
}


def natural_language_for_visual_reasoning(model, encoding, batch):
    """NLVR2: is the statement true of the two pictures? batch.target (B,) int64, 1 = true. Scores (B, 2).

    Paired: the batch has 2B rows, the statement with each picture in turn. Triplet: B rows with both pictures'
    regions, told apart by batch.region_types.
    """
    if model.config.nlvr2 == "paired-attention":
        x = torch.cat([encoding.text, encoding.regions], 1)
        scores = model.heads["nlvr2"](x, torch.cat([batch.text_mask, batch.region_mask], 1))
    else:
        rows = len(batch.target)
        scores = model.heads["nlvr2"](encoding.pooled.reshape(rows, -1))  # (2B, C) -> (B, 2C), or (B, C) as it is
    return common.cross_entropy(scores, batch.target), scores


@torch.no_grad()
def hard_negatives(model, batch, k):
    """Which rows fool the model most: row 0 is the true pair, the rest are candidates. Returns the row indices (k + 1,)
    of the positive and of the k best-scored negatives, scored in eval mode (section 4.1, hard-negative mining)."""
    training = model.training
    model.eval()
    scores = model.heads["rank"](model.encode(batch).pooled).squeeze(-1)  # (B, 1) -> (B,)
    model.train(training)
    return torch.cat([scores.new_zeros(1, dtype=torch.long), scores[1:].topk(k).indices + 1])


def referring_expression_rank(model, encoding, batch, negative=None, margin=0.2, hard=0.3):
    """`common.referring_expression` by a margin: the sum over rows of

        max(0, margin + s(negative region) - s(target)),   s the sigmoid.

    negative (B,): the region to push down; None draws it, with probability `hard` the best-scored wrong region, else
    any wrong one. ValueError for a row with a single region, where there is none (the official code loops forever).
    """
    scores = common.refer_scores(model, encoding, batch)
    if negative is None:
        if (batch.region_mask.sum(1) < 2).any():
            raise ValueError("the ranking loss needs two regions in every row: use the classification loss")
        wrong = batch.region_mask.scatter(1, batch.target[:, None], False)  # (B, N) True = a wrong region
        hardest = scores.masked_fill(~wrong, -torch.inf).argmax(1)
        anyone = torch.multinomial(wrong.float(), 1).squeeze(1)  # (B, 1) -> (B,)
        negative = torch.where(torch.rand_like(scores[:, 0]) < hard, hardest, anyone)
    chance = scores.sigmoid()
    above = chance.gather(1, negative[:, None]) - chance.gather(1, batch.target[:, None])  # (B, 1)
    return F.relu(margin + above).sum(), scores


REGION_CLASSES = common.Objective(
    common.masked_region_class,
    head="mrc",
    pretraining=True,
    masks="regions",
    mean_over="regions",
    fields=("object_probs",),
    labels=common.most_likely_class,
)

# the shared ones: mlm, itm, itc, vqa, ve, vcr, rank, refer, caption; of one name, the paper's own counts
OBJECTIVES = common.SHARED_OBJECTIVES | {
    "mrfr": common.Objective(
        masked_region_features, head="mrfr", pretraining=True, masks="regions", mean_over="regions"
    ),
    "mrc": REGION_CLASSES,
    "mrc_kl": replace(REGION_CLASSES, loss=masked_region_class_kl),
    "wra": common.Objective(word_region_alignment, pretraining=True, mismatch=True),
    "nlvr2": common.Objective(natural_language_for_visual_reasoning, head="nlvr2"),
    "refer_rank": common.Objective(referring_expression_rank, head="refer", is_sum=True),
}

VCR_TYPES = ((0, 2), (0, 2, 3))  # text types: a question and its answer; a question, its answer and the reason
NEGATIVES = ("image", "text")  # false partners of a true pair in retrieval, in the order of the rows


def text_types(tasks):
    """Rows that the table of text types needs: 4 for VCR, 3 for NLVR2 (the second picture has its own), else 2."""
    if "vcr" in tasks:
        return 4
    if "nlvr2" in tasks:
        return 3
    return 2


MODEL = UNITER  # the file's model, for the table of models
