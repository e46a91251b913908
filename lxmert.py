"""LXMERT: learning cross-modality encoder representations (Tan and Bansal, EMNLP 2019, arXiv 1908.07490).

What the model does, in five lines:
1. Each word becomes a vector (word + position + segment), each region too (mean of a feature vector and a box vector).
2. A language encoder (9 layers) sees only the words; an object-relationship encoder (5 layers) sees only the regions.
3. In 5 cross-modality layers words attend to regions and regions to words; one attention block serves both directions.
4. Pretraining masks words AND regions of the same pair. Every step adds up masked words, masked objects (feature, class,
   attribute) and matching, and in the second half of the steps question answering too.
5. The last state of [CLS] is pooled. A small head on the pooled vector, or on each region, solves a downstream task.

Known deviations from the official code:
- Official pretraining has 36 regions in every picture. Here their number may vary, and means leave padding out.
- A batch without any label gives a loss of 0. The official code gives NaN.
- Initial weights are larger for boxes and in narrow models. AdamW has a bias correction, official BertAdam has none.
- In pretraining a quarter of the pairs are mismatched, officially half. Mismatched pairs have no masked-prediction
  losses, as in 12-in-1; the official code predicts words and regions there too. docs/decisions.md has the numbers.
- At least one word of every caption is masked, as in UNITER. Mismatched sentences, and features that replace a masked
  region's, come from the batch; officially from the whole data set.
Where paper and official code differ, this file follows the code: feature regression is smooth-L1, not L2; classes and
attributes are predicted for all regions and weighted by the detector's confidence. But question answering starts in the
second half of the steps, as in the paper; officially it starts at once.
Letters: B batch, T text positions, N regions, C width, H heads, F region-feature width, V vocabulary, K classes,
M masked positions, A answers.
"""

from dataclasses import dataclass, replace

import torch.nn.functional as F
from torch import nn

import common
from support import contrast

# ---- configuration ---------------------------------------------------------------------------------------------


@dataclass
class Config:
    """Sizes of an LXMERT. The defaults are the paper's (sections 3.3 and 4); `PRESETS` gives the others."""

    vocab_size: int = 30522  # BERT's uncased word pieces
    hidden: int = 768  # C
    language_layers: int = 9  # words alone
    relation_layers: int = 5  # regions alone
    cross_layers: int = 5  # both
    attention_heads: int = 12  # C / 12 = 64 dimensions each
    intermediate: int = 3072  # 4 C, the feed-forward's inner width
    max_positions: int = 512  # longest text
    types: int = 2  # segments: 0 for all words, but 1 for VCR's choices; regions have none
    feature_size: int = 2048  # F, of the published detector; 3 x patch x patch for regions cut from pixels
    classes: int = 1601  # K, the detector's classes with 0 = background; the head leaves background out
    attributes: int = 400
    answers: int = 9500  # A, length of the answer list: 9500 in pretraining, 3129 for VQA, 1842 for GQA
    dropout: float = 0.1  # everywhere in the trunk; the heads have none
    heads: tuple = ("mlm", "mrfr", "mrc", "attr", "itm", "qa")  # which of HEADS this model has
    contrast: str = "infonce"  # loss of the objective itc; or "hinge", "sigmoid", "dcl"
    text_vector: str = "cls"  # the text's vector in itc: the state of [CLS]; or "mean", over all words
    teacher_widths: tuple = ()  # the teacher's (text, region) widths, to which the head "hidden" projects
    region_factor: float = 1 / 0.15  # factor of the three region losses, as in the official code; Hugging Face: 6.67
    answer_factor: float = 1.0  # factor of the loss of pretraining's question answering
    masked_logit: float = -10000.0  # added to the attention logit of a masked key; Hugging Face: the dtype's minimum


PRESETS = {
    "tiny": {
        "hidden": 128,
        "language_layers": 2,
        "relation_layers": 1,
        "cross_layers": 2,
        "attention_heads": 4,
        "intermediate": 512,
        "max_positions": 128,
        "dropout": 0.0,
        # with factors of 1 / 0.15 and 1 the region and answer losses outweigh the masked words in a short run
        "region_factor": 0.2,
        "answer_factor": 0.2,
    },
    "base": {},
}

# ---- embeddings: regions here; words are BERT's, `common.TextEmbedding` ------------------------------------------


class RegionEmbedding(nn.Module):
    """( norm(W_f f) + norm(W_b box) ) / 2, then dropout (section 2.1, eq. 1). No order, no type, no learned mask.

    features f (B, N, F); boxes (B, N, 4) as x1,y1,x2,y2 in 0..1, which are the paper's four numbers.
    Returns (B, N, C).
    """

    def __init__(self, config):
        super().__init__()
        self.features = nn.Linear(config.feature_size, config.hidden)
        self.features_norm = common.LayerNorm(config.hidden)
        self.boxes = nn.Linear(4, config.hidden)
        self.boxes_norm = common.LayerNorm(config.hidden)
        self.dropout = common.Dropout(config.dropout)

    def forward(self, features, boxes):
        feature_emb = self.features_norm(self.features(features))  # (B, N, F) -> (B, N, C)
        box_emb = self.boxes_norm(self.boxes(boxes))  # (B, N, 4) -> (B, N, C)
        return self.dropout((feature_emb + box_emb) / 2)


# ---- model -----------------------------------------------------------------------------------------------------


class CrossLayer(nn.Module):
    """One cross-modality layer (section 2.2): cross-attention, then one BERT layer for each modality.

        text'    = BERT_text(    norm(text + attend(queries from text, keys and values from regions)) )
        regions' = BERT_regions( norm(regions + attend(queries from regions, keys and values from text)) )

    Both directions share one attention block, and both read the layer's original inputs, not each other's result.
    text (B, T, C), regions (B, N, C); their biases (B, 1, 1, T) and (B, 1, 1, N) hide padded keys.
    maps: a list, to which four attention maps are appended: text-to-regions (B, H, T, N), regions-to-text (B, H, N, T),
    text (B, H, T, T) and regions (B, H, N, N).
    """

    def __init__(self, width, heads, inner, dropout):
        super().__init__()
        self.cross = common.AttentionBlock(width, heads, dropout)
        self.text = common.TransformerLayer(width, heads, inner, dropout)
        self.regions = common.TransformerLayer(width, heads, inner, dropout)

    def forward(self, text, regions, text_bias, region_bias, maps=None):
        crossed_text = self.cross(text, regions, region_bias, maps)
        crossed_regions = self.cross(regions, text, text_bias, maps)
        text = self.text(crossed_text, text_bias, maps)
        regions = self.regions(crossed_regions, region_bias, maps)
        return text, regions


class LXMERT(nn.Module):
    """Three Transformers: over words, over regions, and across the two.

    `model(batch, objectives)` returns {objective: (loss, logits)}. `encode` returns the hidden states alone. With
    `record=True` it also returns, for every layer i:
    states "text.embedding", "regions.embedding", "text.i", "regions.i", "cross.i.text", "cross.i.regions";
    maps "text.i", "regions.i", "cross.i.text_to_regions", "cross.i.regions_to_text", "cross.i.text", "cross.i.regions".
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        # The official code takes position 0 and segment 0 for padding: both are added to words, but get no gradient.
        self.text_embedding = common.TextEmbedding(config, padding_idx=0)
        self.region_embedding = RegionEmbedding(config)
        sizes = (config.hidden, config.attention_heads, config.intermediate, config.dropout)
        self.language_layers = nn.ModuleList(common.TransformerLayer(*sizes) for _ in range(config.language_layers))
        self.relation_layers = nn.ModuleList(common.TransformerLayer(*sizes) for _ in range(config.relation_layers))
        self.cross_layers = nn.ModuleList(CrossLayer(*sizes) for _ in range(config.cross_layers))
        self.pooler = common.Pooler(config.hidden)
        self.heads = nn.ModuleDict({name: HEADS[name](config) for name in config.heads})
        if {"mrfr", "mrc", "attr"} & set(config.heads):
            self.heads["regions"] = common.HeadTransform(config.hidden)  # shared by the heads mrfr, mrc and attr
        common.init_weights(self, config.hidden)
        common.init_box_projection(self.region_embedding.boxes)

    def embed_text(self, batch):
        """(B, T, C)"""
        return self.text_embedding(batch.text, batch.segments)

    def embed_regions(self, batch):
        """(B, N, C)"""
        return self.region_embedding(batch.features, batch.boxes)

    def encode(self, batch, text=True, regions=True, record=False, given=None):
        """Encodes words and regions together. text=False: regions alone. regions=False: words alone.

        pooled: the pooled state of [CLS]; without text, the pooled mean of the regions' states.
        given: what `unimodal` returned, from which the cross-modality layers go on.
        """
        states = {}
        maps = {}
        if given is None:
            text_states = self.embed_text(batch) if text else None
            region_states = self.embed_regions(batch) if regions else None
        else:
            text_states, region_states = given
        if text:
            text_bias = common.attention_bias(batch.text_mask, text_states.dtype, self.config.masked_logit)
        if regions:
            region_bias = common.attention_bias(batch.region_mask, region_states.dtype, self.config.masked_logit)
        if text and given is None:
            text_states = self.run_layers("text", text_states, text_bias, record, states, maps)
        if regions and given is None:
            region_states = self.run_layers("regions", region_states, region_bias, record, states, maps)
        if text and regions:
            biases = (text_bias, region_bias)  # (B, 1, 1, T), (B, 1, 1, N)
            text_states, region_states = self.run_cross_layers(text_states, region_states, biases, record, states, maps)
        if text:
            pooled = self.pooler(text_states)  # (B, T, C) -> (B, C)
        else:
            mean = common.masked_mean(region_states, batch.region_mask)  # (B, N, C) -> (B, C)
            pooled = self.pooler(mean[:, None])  # (B, 1, C) -> (B, C)
        return common.Encoding(text_states, region_states, pooled, states, maps)

    def run_layers(self, name, x, bias, record, states, maps):
        """One modality, "text" or "regions", through its own layers: x (B, S, C), bias (B, 1, 1, S) -> (B, S, C).
        With `record`, the layers' outputs and attention maps are added to the dicts `states` and `maps`."""
        layers = self.language_layers if name == "text" else self.relation_layers
        if record:
            states[f"{name}.embedding"] = x
        for i, layer in enumerate(layers):
            layer_maps = [] if record else None
            x = layer(x, bias, layer_maps)
            if record:
                states[f"{name}.{i}"] = x
                maps[f"{name}.{i}"] = layer_maps[0]
        return x

    def run_cross_layers(self, text, regions, biases, record, states, maps):
        """Both modalities through the cross-modality layers. Returns text (B, T, C) and regions (B, N, C)."""
        for i, layer in enumerate(self.cross_layers):
            layer_maps = [] if record else None
            text, regions = layer(text, regions, *biases, layer_maps)
            if record:
                states[f"cross.{i}.text"] = text
                states[f"cross.{i}.regions"] = regions
                maps[f"cross.{i}.text_to_regions"] = layer_maps[0]
                maps[f"cross.{i}.regions_to_text"] = layer_maps[1]
                maps[f"cross.{i}.text"] = layer_maps[2]
                maps[f"cross.{i}.regions"] = layer_maps[3]
        return text, regions

    def unimodal(self, batch):
        """What each modality computes alone, for `encode(given=)`: its own layers' output, (B, T, C) and (B, N, C)."""
        text = self.encode(batch, regions=False).text
        regions = self.encode(batch, text=False).regions
        return text, regions

    def decode(self, batch, cache=None):
        """The text read from left to right, for captions (see `common.decoder_inputs`). Returns (B, T, C).

        Regions must not attend to words, or earlier words would see later ones through them. So the regions' half of a
        cross-modality layer has no cross-attention here.
        """
        if cache is None:
            cache = {}
        region_bias = common.attention_bias(batch.region_mask, batch.boxes.dtype, self.config.masked_logit)
        if not cache:
            regions = self.embed_regions(batch)
            for layer in self.relation_layers:
                regions = layer(regions, region_bias)
            cache["regions"] = [regions]  # the regions that each cross-modality layer reads
            for layer in self.cross_layers[:-1]:
                regions = layer.regions(regions, region_bias)
                cache["regions"].append(regions)
        text, visible = common.decoder_inputs(self, batch, cache, batch.region_mask[:, :0])
        text_bias = common.attention_bias(visible, text.dtype, self.config.masked_logit)  # (B, 1, T, words so far)
        for layer in self.language_layers:
            text = layer(text, text_bias, cache=cache)
        for layer, regions in zip(self.cross_layers, cache["regions"], strict=True):
            text = layer.cross(text, regions, region_bias, cache=cache)
            text = layer.text(text, text_bias, cache=cache)
        return text

    def word_logits(self, states):
        """Logits over the vocabulary by the masked-word head: hidden states (..., C) -> (..., V)."""
        return self.heads["mlm"](states, self.text_embedding.words.weight)

    def forward(self, batch, objectives):
        """The losses of these objectives: {name: (loss, logits)}."""
        encoding = None
        if not all(OBJECTIVES[name].encodes_itself for name in objectives):
            encoding = self.encode(batch)
        return {name: OBJECTIVES[name].loss(self, encoding, batch) for name in objectives}


# ---- pretraining objectives: (model, encoding, batch) -> (loss, logits) ----------------------------------------

PRETRAINING = {
    "objectives": {"mlm": 1, "mrfr": 1, "mrc": 1, "attr": 1, "itm": 1, "qa": 1},  # all at once; see second_half
    "conditional": False,  # words and regions are masked in the same step, independently of each other
    "predict_mismatched": False,  # False: masked words and regions of mismatched pairs are not predicted
    "second_half": ("qa",),  # questions are answered in the second half of the steps only (3.3)
    "joined": {},
    "rate": 2.0,  # learning rate relative to fine-tuning: 1e-4 at base size
    "loss_weights": {},  # factors of the losses; 1 where none is named
    # of the masked regions 80% get a zero feature, 10% the feature of another region, and 10% keep theirs
    "region_masking": {"zero": 0.8, "random": 0.1, "force_one": False},  # force_one False: maybe none in a picture
    "mismatched_share": 0.25,  # of the pairs. Masked words in them have no loss; the official 0.5 would waste half of them
    "mismatch": "text",  # a mismatched pair keeps its image and gets another sentence
}


def masked_language_modelling(model, encoding, batch):
    """Masked cross-modality language modelling (section 3.1.1):

        L = -log P(w_m | w_\\m, v),  mean over masked words

    batch.word_index (M,): flat positions of the masked words; word_labels (M,): what they were. Logits (M, V).
    """
    logits = model.word_logits(common.gather_positions(encoding.text, batch.word_index))  # (M, C) -> (M, V)
    return common.cross_entropy(logits, batch.word_labels), logits


def masked_region_features(model, encoding, batch):
    """RoI-feature regression (section 3.1.2):

        L = region_factor / n  sum over masked regions of  mean_F smooth_l1(h(v_m), f_m)

    n: real regions of matched pairs, masked or not (`common.regions_to_predict`). batch.region_index (M,): flat
    positions of the masked regions; clean_features (B, N, F): f before masking. Logits: the predictions (M, F).
    """
    states = common.gather_positions(encoding.regions, batch.region_index)  # (B, N, C) -> (M, C)
    predicted = common.at_least_float32(model.heads["mrfr"](model.heads["regions"](states)))  # (M, C) -> (M, F)
    target = common.gather_positions(batch.clean_features, batch.region_index).to(predicted.dtype)  # (M, F)
    losses = F.smooth_l1_loss(predicted, target, reduction="none").mean(-1)  # (M, F) -> (M,)
    count = common.regions_to_predict(batch).sum().clamp(min=1)
    return model.config.region_factor * losses.sum() / count, predicted


def confident_cross_entropy(model, head, encoding, batch, labels, confidence):
    """The loss of the two objectives below: L = region_factor x confidence x CE(label, logits)

    The mean is over real regions of matched pairs, masked or not (`common.regions_to_predict`).
    labels (B, N), -1 = none; confidence (B, N). Returns the loss and the logits of the masked regions (M, K).
    """
    logits = model.heads[head](model.heads["regions"](encoding.regions))  # (B, N, C) -> (B, N, K)
    logits = common.at_least_float32(logits)
    losses = F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=-1, reduction="none")  # (B, K, N) -> (B, N)
    counted = common.regions_to_predict(batch)  # (B, N) bool
    total = (losses * confidence * counted).sum()
    loss = model.config.region_factor * total / counted.sum().clamp(min=1)
    return loss, common.gather_positions(logits, batch.region_index)  # (B, N, K) -> (M, K)


def masked_region_class(model, encoding, batch):
    """Detected-label classification (3.1.2): cross-entropy with the detector's class, weighted by its confidence.

    batch.objects (B, N) without background, -1 = none; object_conf (B, N). Logits (M, K - 1) of the masked regions.
    """
    return confident_cross_entropy(model, "mrc", encoding, batch, batch.objects, batch.object_conf)


def masked_region_attribute(model, encoding, batch):
    """The same for attributes: batch.attributes (B, N), -1 = none; attribute_conf (B, N). Logits (M, attributes)."""
    return confident_cross_entropy(model, "attr", encoding, batch, batch.attributes, batch.attribute_conf)


def masked_region_class_kl(model, encoding, batch):
    """Detected-label classification with soft labels (UNITER 3.2; not in LXMERT's paper):

        L = KL(c || g(v_m)) = sum_k c_k (log c_k - log g_k),  mean over masked regions and classes

    c: the detector's distribution without background, rescaled to sum to 1. batch.object_probs (B, N, K), class 0 =
    background. Logits (M, K - 1).
    """
    states = common.gather_positions(encoding.regions, batch.region_index)  # (B, N, C) -> (M, C)
    logits = model.heads["mrc"](model.heads["regions"](states))  # (M, C) -> (M, K - 1)
    targets = common.gather_positions(batch.object_probs, batch.region_index)[:, 1:]  # (M, K - 1)
    targets = targets / targets.sum(-1, keepdim=True).clamp(min=1e-6)
    return common.kl_divergence(logits, targets) / max(1, targets.numel()), logits


def cross_modality_matching(model, encoding, batch):
    """Cross-modality matching (3.1.3): cross-entropy of "does the sentence belong to the image?".
    batch.matched (B,) int64, 1 = it does. Logits (B, 2), class 1 = match."""
    logits = model.heads["itm"](encoding.pooled)  # (B, C) -> (B, 2)
    return common.cross_entropy(logits, batch.matched), logits


def image_question_answering(model, encoding, batch):
    """Image question answering (section 3.1.3): L = answer_factor x CE(answer),  mean over the rows that have an answer

    batch.answer_labels (B,), -1 = no question; of several answers one is drawn in proportion to the scores.
    Mismatched rows (batch.matched 0) have no answer. config.answer_factor is 1 in the paper. Logits (B, A).
    """
    logits = model.heads["qa"](encoding.pooled)  # (B, C) -> (B, A)
    labels = batch.answer_labels
    if batch.matched is not None:
        labels = labels.masked_fill(batch.matched == 0, -1)
    total = model.config.answer_factor * F.cross_entropy(logits, labels, ignore_index=-1, reduction="sum")
    return total / (labels >= 0).sum().clamp(min=1), logits


# ---- task heads: (model, encoding, batch) -> (loss, logits); those of `common` serve the other tasks --------------


def natural_language_for_visual_reasoning(model, encoding, batch):
    """NLVR2: is the statement true of the two pictures? batch.target (B,) int64, 1 = true. Logits (B, 2).

    The batch has 2B rows, the statement with each picture in turn; the two pooled vectors are concatenated.
    """
    pooled = encoding.pooled.reshape(batch.target.shape[0], -1)  # (2B, C) -> (B, 2C)
    logits = model.heads["nlvr2"](pooled)  # (B, 2C) -> (B, 2)
    return common.cross_entropy(logits, batch.target), logits


# ---- tables ----------------------------------------------------------------------------------------------------

HEADS = {
    "mlm": lambda c: common.MaskedLMHead(c.hidden, c.vocab_size),
    "mrfr": lambda c: nn.Linear(c.hidden, c.feature_size),
    "mrc": lambda c: nn.Linear(c.hidden, c.classes - 1),
    "attr": lambda c: nn.Linear(c.hidden, c.attributes),
    "itm": lambda c: common.Float32Linear(c.hidden, 2),
    "itc": lambda c: contrast.ContrastHead(c.hidden, c.hidden, c.hidden, c.contrast, c.text_vector),
    "hidden": lambda c: common.teacher_projections(c.hidden, c.hidden, c.teacher_widths),
    "qa": lambda c: common.mlp_head(c.hidden, 2 * c.hidden, c.answers),
    "vqa": lambda c: common.mlp_head(c.hidden, 2 * c.hidden, c.answers),
    "ve": lambda c: common.mlp_head(c.hidden, 2 * c.hidden, 3),
    "nlvr2": lambda c: common.mlp_head(2 * c.hidden, 2 * c.hidden, 2),
    "vcr": lambda c: common.mlp_head(c.hidden, 2 * c.hidden, 2),
    "rank": lambda c: common.Float32Linear(c.hidden, 1),
    "refer": lambda c: common.Float32Linear(c.hidden, 1),
}

MASKED_WORDS = common.Objective(
    masked_language_modelling,
    head="mlm",
    pretraining=True,
    masks="words",
    mean_over="words",
    labels=lambda batch, _: batch.word_labels,
)

REGION_FEATURES = common.Objective(
    masked_region_features, head="mrfr", pretraining=True, masks="regions", mean_over="all regions", learn_as="numbers"
)

REGION_CLASSES = common.Objective(
    masked_region_class,
    head="mrc",
    pretraining=True,
    masks="regions",
    mean_over="all regions",
    fields=("objects", "object_conf"),
    labels=lambda batch, logits: common.gather_positions(batch.objects, batch.region_index),
)

REGION_ATTRIBUTES = replace(
    REGION_CLASSES,
    loss=masked_region_attribute,
    head="attr",
    fields=("attributes", "attribute_conf"),
    labels=lambda batch, logits: common.gather_positions(batch.attributes, batch.region_index),
)

MATCHING = common.Objective(
    cross_modality_matching, head="itm", pretraining=True, mismatched=True, labels=lambda batch, logits: batch.matched
)

QUESTIONS = common.Objective(
    image_question_answering,
    head="qa",
    pretraining=True,
    mean_over="answers",
    fields=("answers",),
    labels=lambda batch, logits: batch.answer_labels,
    open_answers=True,
)

SOFT_CLASSES = {"fields": ("object_probs",), "labels": common.most_likely_class}

# The tasks that this file does not define (vqa, ve, vcr, rank, refer, caption) come from SHARED_OBJECTIVES.
OBJECTIVES = common.SHARED_OBJECTIVES | {
    "itc": contrast.CONTRAST,
    "mlm": MASKED_WORDS,
    "mrfr": REGION_FEATURES,
    "mrc": REGION_CLASSES,
    "mrc_kl": replace(REGION_CLASSES, loss=masked_region_class_kl, mean_over="regions", **SOFT_CLASSES),
    "attr": REGION_ATTRIBUTES,
    "itm": MATCHING,
    "qa": QUESTIONS,
    "nlvr2": common.Objective(natural_language_for_visual_reasoning, head="nlvr2"),
}

CHOICES = contrast.CHOICES  # allowed values of Config's string fields
VCR_TYPES = ((0, 1), (0, 0, 1))  # text types: a question and its answer; a question, its answer and the reason
NEGATIVES = ("image", "text")  # what each mismatched row of retrieval replaces in the true pair
MODEL = LXMERT


def text_types(tasks):
    """The table of text types: for each row, the row of pretraining's table that initialises it. All tasks have two."""
    return (0, 1)
