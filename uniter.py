"""UNITER: universal image-text representation learning (Chen et al., ECCV 2020, arXiv 1909.11740).

What the model does, in five lines:
1. words become vectors (word + position + type), regions too (feature + box + type, from the same table of types);
2. both sequences are concatenated and pass through one BERT: words and regions attend to each other in every layer;
3. pretraining masks words OR regions, never both (conditional masking), and draws one objective a step;
4. a matching objective tells true pairs from mismatched ones, and optimal transport aligns words with regions;
5. a small head on the pooled first position solves a downstream task; some heads read the states of words or regions.

Known deviations from the official code:
- Regions follow the padded words. Official code puts them behind the last word. Real positions get the same states.
- The mask embedding is one vector. The official table has a row 0 too, which is zeroed at each use.
- Widths and heights are computed from the corners of a box. Official files hold them in float16.
- Initial weights: boxes and narrow models have larger ones. In NLVR2's paired attention queries, keys and values
  have N(0, 0.02^2) like all of BERT; officially they are Xavier-uniform.
docs/details.md lists the errors of the official code.
Letters: B batch, T text positions, N regions, S = T + N positions of both. C width, F region-feature width,
V vocabulary, K classes, A answers, M masked words or regions.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

import common
from support import contrast

# ---- configuration ---------------------------------------------------------------------------------------------


@dataclass
class Config:
    """Sizes of a UNITER. The defaults are the paper's UNITER-base (section 4); PRESETS has the others."""

    vocab_size: int = 28996  # BERT's cased word pieces
    hidden: int = 768  # C
    layers: int = 12
    attention_heads: int = 12  # C / 12 = 64 dimensions each
    intermediate: int = 3072  # 4 C, the feed-forward's inner width
    max_positions: int = 512  # longest text
    types: int = 2  # 0 text, 1 picture; `text_types` says what the tasks need
    feature_size: int = 2048  # F, of the published detector; 3 x patch x patch for regions cut from pixels
    classes: int = 1601  # K, the detector's classes with 0 = background
    attributes: int = 0  # train.py sets it for all models; only LXMERT has an objective for it
    answers: int = 3129  # A, length of the answer list
    dropout: float = 0.1  # everywhere in the trunk; of the heads only NLVR2's paired attention has it
    heads: tuple = ("mlm", "mrfr", "mrc", "itm")  # which of HEADS this model has
    contrast: str = "infonce"  # loss of the objective itc; or "hinge", "sigmoid", "dcl"
    text_vector: str = "cls"  # the text's vector in itc: the state of [CLS]; or "mean", over all words
    teacher_widths: tuple = ()  # the teacher's (text, region) widths, to which the head "hidden" projects
    nlvr2: str = "paired-attention"  # or "paired", "triplet": how two pictures meet (section 4.3, appendix A.2)
    refer_layers: int = 1  # 1: a linear logit for each region; 2: with a hidden layer (RefCOCO+)


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

# ---- embeddings: of regions; words have BERT's, `common.TextEmbedding` ------------------------------------------


class RegionEmbedding(nn.Module):
    """norm( norm(W_f f) + norm(W_b b) + type ), then dropout, with b = [x1, y1, x2, y2, w, h, w h] (section 3.1).

    Section 3.1 has the outer norm only; the inner ones are the official code's.
    features f (B, N, F); boxes (B, N, 4) as x1,y1,x2,y2 in 0..1; type_emb (B, N, C), rows of the text's table of types.
    masked (B, N) bool, True = to be predicted. data.mask_regions has set these features to zero; a learned vector is
    added to them before W_f.
    Returns (B, N, C).
    """

    def __init__(self, config):
        super().__init__()
        width = config.hidden
        self.features = nn.Linear(config.feature_size, width)
        self.features_norm = common.LayerNorm(width)
        self.boxes = nn.Linear(7, width)
        self.boxes_norm = common.LayerNorm(width)
        self.mask = nn.Parameter(torch.randn(config.feature_size) * 0.02)
        self.norm = common.LayerNorm(width)
        self.dropout = common.Dropout(config.dropout)

    def forward(self, features, boxes, type_emb, masked=None):
        if masked is not None:
            features = features + masked[:, :, None] * self.mask  # (B, N, 1) * (F,) -> (B, N, F)
        size = boxes[..., 2:] - boxes[..., :2]  # (B, N, 2): width, height
        area = size.prod(-1, keepdim=True)  # (B, N, 1)
        feature_emb = self.features_norm(self.features(features))  # (B, N, F) -> (B, N, C)
        box_emb = self.boxes_norm(self.boxes(torch.cat([boxes, size, area], -1)))  # (B, N, 7) -> (B, N, C)
        return self.dropout(self.norm(feature_emb + box_emb + type_emb))


# ---- model -----------------------------------------------------------------------------------------------------


class UNITER(nn.Module):
    """One Transformer over words and regions.

    `model(batch, objectives)` returns {objective: (loss, logits)}. `encode` returns the states alone; with
    `record=True` also `states["embedding"]`, `states["layer.i"]` and `maps["layer.i"]` over text and regions together.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.text_embedding = common.TextEmbedding(config)
        self.region_embedding = RegionEmbedding(config)
        self.layers = nn.ModuleList()
        for _ in range(config.layers):
            layer = common.TransformerLayer(config.hidden, config.attention_heads, config.intermediate, config.dropout)
            self.layers.append(layer)
        self.pooler = common.Pooler(config.hidden)
        self.heads = nn.ModuleDict({name: HEADS[name](config) for name in config.heads})
        common.init_weights(self, config.hidden)
        common.init_box_projection(self.region_embedding.boxes)

    def embed_text(self, batch):
        """(B, T, C)"""
        return self.text_embedding(batch.text, batch.segments)

    def embed_regions(self, batch):
        """(B, N, C). Pictures have type 1; the second picture of a pair has type 2."""
        if batch.region_types is None:
            types = torch.ones_like(batch.region_mask, dtype=torch.long)  # (B, N)
        else:
            types = batch.region_types + 1
        type_emb = self.text_embedding.types(types)  # (B, N) -> (B, N, C)
        return self.region_embedding(batch.features, batch.boxes, type_emb, batch.masked_regions)

    def unimodal(self, batch):
        """What each modality computes alone, for `encode(given=)`: the embeddings (B, T, C) and (B, N, C)."""
        return self.embed_text(batch), self.embed_regions(batch)

    def encode(self, batch, text=True, regions=True, record=False, given=None):
        """Encodes words and regions together, or one of the two alone (text=False or regions=False).

        pooled: the pooler's output at the first position: [CLS], or the first region if there is no text.
        record: also return the states and attention maps of all layers.
        given: what `unimodal` returned. It replaces the embedding of the batch; both modalities are encoded.
        """
        if given is None:
            text_emb = self.embed_text(batch) if text else None
            region_emb = self.embed_regions(batch) if regions else None
        else:
            text_emb, region_emb = given
        parts = []  # of the sequence: the embeddings (B, T, C) and (B, N, C)
        masks = []  # (B, T) and (B, N)
        if text:
            parts.append(text_emb)
            masks.append(batch.text_mask)
        if regions:
            parts.append(region_emb)
            masks.append(batch.region_mask)
        x = torch.cat(parts, 1)  # (B, S, C)
        bias = common.attention_bias(torch.cat(masks, 1), x.dtype)  # (B, S) -> (B, 1, 1, S)

        states = {}
        maps = {}
        if record:
            states["embedding"] = x
        for i, layer in enumerate(self.layers):
            layer_maps = [] if record else None
            x = layer(x, bias, layer_maps)  # (B, S, C)
            if record:
                states[f"layer.{i}"] = x
                maps[f"layer.{i}"] = layer_maps[0]  # (B, H, S, S)

        T = batch.text.shape[1] if text else 0
        text_states = x[:, :T] if text else None
        region_states = x[:, T:] if regions else None
        return common.Encoding(text_states, region_states, self.pooler(x), states, maps)

    def decode(self, batch, cache=None):
        """Reads the text from left to right, for captions (see `common.decoder_inputs`). Returns (B, T, C)."""
        if cache is None:
            cache = {}
        if not cache:  # the first call: regions alone, whose keys and values stay in the cache
            x = self.embed_regions(batch)
            bias = common.attention_bias(batch.region_mask, batch.boxes.dtype)  # (B, 1, 1, N)
            for layer in self.layers:
                x = layer(x, bias, cache=cache)
        x, visible = common.decoder_inputs(self, batch, cache, batch.region_mask)
        bias = common.attention_bias(visible, x.dtype)  # (B, 1, T, N + words so far)
        for layer in self.layers:
            x = layer(x, bias, cache=cache)
        return x

    def word_logits(self, states):
        """Logits over the vocabulary by the masked-word head: states (..., C) -> (..., V)."""
        return self.heads["mlm"](states, self.text_embedding.words.weight)

    def forward(self, batch, objectives):
        """The losses of these objectives: {name: (loss, logits)}."""
        encoding = None
        if not all(OBJECTIVES[name].encodes_itself for name in objectives):
            encoding = self.encode(batch)
        return {name: OBJECTIVES[name].loss(self, encoding, batch) for name in objectives}


# ---- pretraining objectives: (model, encoding, batch) -> (loss, logits) -----------------------------------------

PRETRAINING = {
    # ratio in which steps draw them. Official in-domain pretraining has 2 for mlm; short runs need more masked words.
    # wra is trained too, in every step of itm
    "objectives": {"mlm": 4, "mrfr": 1, "mrc_kl": 1, "itm": 2},
    "conditional": True,  # one objective a step, so a batch has masked words or masked regions, never both
    "joined": {"itm": ("wra",)},  # computed in the same step, on the same pairs
    "rate": 1.0,  # learning rate relative to fine-tuning: 5e-5 at base size
    "loss_weights": {"wra": 0.1},  # factors of the losses; 1 where none is named
    "region_masking": {"zero": 1.0, "random": 0.0},  # a masked region's feature is always zeroed (section 3.2)
    "mismatched_share": 0.5,  # share of mismatched pairs
    "mismatch": "image",  # a mismatched pair keeps its sentence and gets another picture; the paper replaces either
}


def masked_language_modelling(model, encoding, batch):
    """Masked language modelling (section 3.2, eq. 1): predict masked words from the other words and all regions.

        L = -log P(w_m | w_\\m, v),  mean over masked words

    batch.word_index (M,): flat positions of the masked words; word_labels (M,): what they were. Logits (M, V).
    """
    logits = model.word_logits(common.gather_positions(encoding.text, batch.word_index))  # (M, C) -> (M, V)
    return common.cross_entropy(logits, batch.word_labels), logits


def masked_region_features(model, encoding, batch):
    """Masked region feature regression, MRFR (section 3.2, eq. 4, variant 1):

        L = || h(v_m) - f_m ||^2,  mean over masked regions and over F

    h ends in the transpose of the region embedding's own W_f. batch.region_index (M,): flat positions of the masked
    regions; clean_features (B, N, F): the features f before masking. Logits: the predictions (M, F).
    """
    states = common.gather_positions(encoding.regions, batch.region_index)  # (M, C)
    predictions = model.heads["mrfr"](states, model.region_embedding.features.weight)  # (M, F)
    targets = common.gather_positions(batch.clean_features, batch.region_index)  # (M, F)
    return common.squared_error(predictions, targets), predictions


def masked_region_class(model, encoding, batch):
    """Masked region classification, MRC (section 3.2, eq. 4, variant 2):

        L = CE(c, g(v_m)),  mean over masked regions

    c: the detector's most likely class, never background. batch.object_probs (B, N, K): its distribution, class 0 =
    background. Logits (M, K).
    """
    logits = model.heads["mrc"](common.gather_positions(encoding.regions, batch.region_index))  # (M, C) -> (M, K)
    return common.cross_entropy(logits, common.most_likely_class(batch, logits)), logits


def masked_region_class_kl(model, encoding, batch):
    """Masked region classification with soft labels, MRC-kl (section 3.2, eq. 4, variant 3):

        L = KL(c || g(v_m)) = sum_k c_k (log c_k - log g_k),  mean over masked regions AND classes

    c: the detector's distribution batch.object_probs (B, N, K), background included. The official training takes the
    mean over classes too; its validation does not. Logits (M, K).
    """
    logits = model.heads["mrc"](common.gather_positions(encoding.regions, batch.region_index))  # (M, C) -> (M, K)
    targets = common.gather_positions(batch.object_probs, batch.region_index)  # (M, K)
    return common.kl_divergence(logits, targets) / max(1, targets.numel()), logits


def image_text_matching(model, encoding, batch):
    """Image-text matching, ITM (section 3.2, eq. 2): do words and picture belong together?

        L = -[ y log s(w, v) + (1 - y) log(1 - s(w, v)) ],  mean over rows

    s: the softmax probability of "match", as in the official code. batch.matched (B,): y, 1 = a true pair.
    Logits (B, 2), class 1 = match.
    """
    logits = model.heads["itm"](encoding.pooled)  # (B, C) -> (B, 2)
    return common.cross_entropy(logits, batch.matched), logits


def word_region_alignment(model, encoding, batch):
    """Word-region alignment, WRA (section 3.2), on the pairs of image-text matching:

        L = ( sum over true pairs of D - sum over mismatched pairs of D ) / B

    D: eq. 3, the optimal-transport distance of the words' and regions' last states; [CLS] and [SEP] count as words. The
    paper minimises D. The official code, as here, minimises D on true pairs and maximises it on mismatched ones.
    Logits: the distances (B,).
    """
    distances, _, _ = common.optimal_transport(encoding.text, encoding.regions, batch.text_mask, batch.region_mask)
    sign = 2 * batch.matched - 1  # (B,): 1 for a true pair, -1 for a mismatched one
    return (distances * sign).mean(), distances


# ---- task heads ------------------------------------------------------------------------------------------------


class FeatureRegressionHead(nn.Module):
    """transform(x) W + b with W (C, F) the region embedding's matrix. x (M, C) -> (M, F)."""

    def __init__(self, config):
        super().__init__()
        self.transform = common.HeadTransform(config.hidden)
        self.bias = nn.Parameter(torch.zeros(config.feature_size))

    def forward(self, x, weight):
        return self.transform(x) @ weight + self.bias  # (M, C) @ (C, F) -> (M, F)


class PairedAttentionHead(nn.Module):
    """NLVR2: two encodings, one for each picture, attend to each other (section 4.3, "Pair-biattn").

        left' = dropout(relu(W [attention(left, right), left]))
        vector = sum over positions of dropout(softmax(relu(w left'))) left'

    The right side has its own attention weights; W and w are shared. The two vectors are concatenated and classified.
    x (2B, S, C), mask (2B, S): rows 2i and 2i+1 are the two pictures of statement i. Returns (B, 2).
    """

    def __init__(self, config):
        super().__init__()
        width = config.hidden
        self.left = common.MultiHeadAttention(width, config.attention_heads, config.dropout)
        self.right = common.MultiHeadAttention(width, config.attention_heads, config.dropout)
        self.join = nn.Linear(2 * width, width)
        self.score = common.Float32Linear(width, 1)
        self.output = common.Float32Linear(2 * width, 2)
        self.dropout = common.Dropout(config.dropout)

    def pool(self, attended, states, mask):
        """One side: attended and states (B, S, C), mask (B, S) -> (B, C)."""
        x = self.join(torch.cat([attended, states], -1))  # (B, S, 2C) -> (B, S, C)
        x = self.dropout(F.relu(x))
        logits = F.relu(self.score(x)).masked_fill(~mask[:, :, None], -10000.0)  # (B, S, 1)
        return (self.dropout(logits.softmax(1)) * x).sum(1)  # (B, S, C) -> (B, C)

    def forward(self, x, mask):
        left = x[0::2]  # (B, S, C)
        right = x[1::2]
        left_mask = mask[0::2]  # (B, S)
        right_mask = mask[1::2]
        left_attended = self.left(left, right, common.attention_bias(right_mask, x.dtype))  # (B, S, C)
        left_vector = self.pool(left_attended, left, left_mask)  # (B, S, C) -> (B, C)
        right_attended = self.right(right, left, common.attention_bias(left_mask, x.dtype))
        right_vector = self.pool(right_attended, right, right_mask)
        return self.output(torch.cat([left_vector, right_vector], -1))  # (B, 2C) -> (B, 2)


def nlvr2_head(config):
    """The head that `config.nlvr2` names: on two sequences of states, on two pooled vectors, or on one ("triplet")."""
    if config.nlvr2 == "paired-attention":
        return PairedAttentionHead(config)
    if config.nlvr2 == "paired":
        return common.Float32Linear(2 * config.hidden, 2)
    return common.Float32Linear(config.hidden, 2)


def refer_head(config):
    """A logit for each region: linear, or with one hidden layer."""
    if config.refer_layers not in (1, 2):
        raise ValueError(f"refer_layers is {config.refer_layers}; it must be 1 or 2")
    if config.refer_layers == 1:
        return common.Float32Linear(config.hidden, 1)
    return common.mlp_head(config.hidden, config.hidden, 1)


def natural_language_for_visual_reasoning(model, encoding, batch):
    """NLVR2: is the statement true of the two pictures? Cross-entropy. batch.target (B,) int64, 1 = true.

    paired, paired-attention: the batch has 2B rows; rows 2i and 2i+1 are statement i with its left and right picture.
    triplet: B rows with the regions of both pictures; batch.region_types (B, N) tells which. Logits (B, 2).
    """
    if model.config.nlvr2 == "paired-attention":
        x = torch.cat([encoding.text, encoding.regions], 1)  # (2B, S, C)
        mask = torch.cat([batch.text_mask, batch.region_mask], 1)  # (2B, S)
        logits = model.heads["nlvr2"](x, mask)
    else:
        rows = batch.target.shape[0]
        logits = model.heads["nlvr2"](encoding.pooled.reshape(rows, -1))  # (2B, C) -> (B, 2C), or (B, C) as it is
    return common.cross_entropy(logits, batch.target), logits


# ---- tables ----------------------------------------------------------------------------------------------------

HEADS = {
    "mlm": lambda c: common.MaskedLMHead(c.hidden, c.vocab_size),
    "mrfr": FeatureRegressionHead,
    "mrc": lambda c: common.mlp_head(c.hidden, c.hidden, c.classes),
    "itm": lambda c: common.Float32Linear(c.hidden, 2),
    "itc": lambda c: contrast.ContrastHead(c.hidden, c.hidden, c.hidden, c.contrast, c.text_vector),
    "hidden": lambda c: common.teacher_projections(c.hidden, c.hidden, c.teacher_widths),
    "vqa": lambda c: common.mlp_head(c.hidden, 2 * c.hidden, c.answers),
    "ve": lambda c: common.mlp_head(c.hidden, 2 * c.hidden, 3),
    "nlvr2": nlvr2_head,
    "vcr": lambda c: common.mlp_head(c.hidden, 2 * c.hidden, 2, nn.ReLU),
    "rank": lambda c: common.Float32Linear(c.hidden, 1),
    "refer": refer_head,
}

MASKED_WORDS = common.Objective(
    masked_language_modelling,
    head="mlm",
    pretraining=True,
    masks="words",
    mean_over="words",
    labels=lambda batch, logits: batch.word_labels,
)

MATCHING = common.Objective(
    image_text_matching,
    head="itm",
    pretraining=True,
    mismatched=True,
    labels=lambda batch, logits: batch.matched,
)

REGION_FEATURES = common.Objective(
    masked_region_features, head="mrfr", pretraining=True, masks="regions", mean_over="regions", learn_as="numbers"
)

REGION_CLASSES = common.Objective(
    masked_region_class,
    head="mrc",
    pretraining=True,
    masks="regions",
    mean_over="regions",
    fields=("object_probs",),
    labels=common.most_likely_class,
)

OBJECTIVES = common.SHARED_OBJECTIVES | {
    "itc": contrast.CONTRAST,
    "mlm": MASKED_WORDS,
    "mrfr": REGION_FEATURES,
    "mrc": REGION_CLASSES,
    "mrc_kl": replace(REGION_CLASSES, loss=masked_region_class_kl),
    "itm": MATCHING,
    "wra": common.Objective(word_region_alignment, pretraining=True, mismatched=True, learn_as="nothing"),
    "nlvr2": common.Objective(natural_language_for_visual_reasoning, head="nlvr2"),
}

CHOICES = {  # allowed values of Config's string fields
    **contrast.CHOICES,
    "nlvr2": ("paired-attention", "paired", "triplet"),
}
VCR_TYPES = ((0, 2), (0, 2, 3))  # text types: a question and its answer; a question, its answer and the reason
NEGATIVES = ("image", "text")  # what each mismatched row of retrieval replaces in the true pair


def text_types(tasks):
    """The table of types for these tasks: for each row, the row of pretraining's table that initialises it.

    Pretraining has 0 text and 1 picture. NLVR2's second picture has type 2; VCR's answer has 2 and its reason 3.
    """
    if "nlvr2" in tasks and "vcr" in tasks:
        return (0, 1, 1, 0)  # row 2 is for both
    if "nlvr2" in tasks:
        return (0, 1, 1)
    if "vcr" in tasks:
        return (0, 1, 0, 0)
    return (0, 1)


MODEL = UNITER
