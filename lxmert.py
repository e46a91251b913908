"""LXMERT: learning cross-modality encoder representations (Tan and Bansal, EMNLP 2019, arXiv 1908.07490).

What the model does, in five lines:
1. words become vectors (word + position + segment), regions too (the mean of a feature vector and a box vector);
2. a language encoder (9 layers) and an object-relationship encoder (5) read their own sequence only;
3. in 5 cross-modality layers words attend to regions and regions to words, through ONE attention block for both ways;
4. pretraining masks words AND regions of the same pair, and sums all objectives in every step: masked words, masked
   objects (class, attribute, feature), matching, and answering the questions that are among the captions;
5. a small head on the first word's last state, pooled, answers every downstream task.

Known deviations: the official code always has 36 regions and never masks any in pretraining; here their number may
vary, and the means over regions leave padding out. Rows without label give a loss of 0, not NaN. The official
optimizer, BertAdam, is not copied: Adam without bias correction, eps 1e-6 outside the root, decay on every parameter,
biases and norms included, and a first update with learning rate 0 (tests/test_golden.py replays it). Where paper and
code differ, the code is followed: feature regression is smooth-L1, not L2; classes and attributes are learned on all
regions, weighted by the detector's confidence, not on the masked ones alone. In false pairs, a quarter of all, no word
or region is to be predicted (as in 12-in-1); in the official code they are a half and all is; the README's decisions
have what that is worth.
Letters: B batch, T text positions, N regions, C width, F region-feature width, V vocabulary, K classes, M masked.
"""

from dataclasses import dataclass, replace

import torch.nn.functional as F
from torch import nn

import common

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
    types: int = 2  # segments; all words are in segment 0, regions have none
    feature_size: int = 2048  # F, of the published detector; 3 x patch x patch for regions cut from pixels
    classes: int = 1601  # K, the detector's classes with 0 = background; the head leaves background out
    attributes: int = 400
    answers: int = 9500  # A, the answer list's length: 9500 in pretraining, 3129 for VQA, 1842 for GQA
    dropout: float = 0.1  # everywhere in the trunk; the heads have none
    heads: tuple = ("mlm", "mrfr", "mrc", "attr", "itm", "qa")  # which of the heads below this model has
    contrast: str = "infonce"  # loss of the objective itc; or "hinge", "sigmoid", "dcl"
    teacher_widths: tuple = ()  # widths (text, regions) of the teacher that the head "hidden" projects to
    region_factor: float = 1 / 0.15  # of the three region losses, undoes the masking rate; Hugging Face has 6.67
    answer_factor: float = 1.0  # of pretraining's question answering
    hidden_score: float = -10000.0  # what hides a key; Hugging Face has the dtype's minimum


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
        "region_factor": 0.2,  # else these four losses drown the words in a short run
        "answer_factor": 0.2,
    },
    "base": {},
}

# ---- embeddings: the regions'; the words' is BERT's, `common.TextEmbedding` -------------------------------------


class RegionEmbedding(nn.Module):
    """( norm(W_f f) + norm(W_b box) ) / 2, then dropout (section 2.1). No order, no type, no learned mask.

    features f (B, N, F); boxes (B, N, 4) as x1,y1,x2,y2 in 0..1, which are the paper's four numbers.
    Returns (B, N, C).
    """

    def __init__(self, config):
        super().__init__()
        width = config.hidden
        self.features, self.features_norm = nn.Linear(config.feature_size, width), common.LayerNorm(width)
        self.boxes, self.boxes_norm = nn.Linear(4, width), common.LayerNorm(width)
        self.dropout = common.Dropout(config.dropout)

    def forward(self, features, boxes):
        looks, place = self.features_norm(self.features(features)), self.boxes_norm(self.boxes(boxes))
        return self.dropout((looks + place) / 2)


# ---- model -----------------------------------------------------------------------------------------------------


class CrossLayer(nn.Module):
    """One cross-modality layer (section 2.2): cross-attention, then one BERT layer for each modality.

        text'    = BERT_text(norm(text + attend(text, regions)))
        regions' = BERT_regions(norm(regions + attend(regions, text)))

    Both directions share one attention block and read the layer's ORIGINAL inputs, not each other's result.
    text (B, T, C), regions (B, N, C), their biases (B, 1, 1, T) and (B, 1, 1, N). To `maps`, if given, are appended
    text-to-regions (B, H, T, N), regions-to-text (B, H, N, T), text (B, H, T, T) and regions (B, H, N, N).
    """

    def __init__(self, *sizes):
        super().__init__()
        width, heads, _, dropout = sizes
        self.cross = common.AttentionBlock(width, heads, dropout)
        self.text, self.regions = common.TransformerLayer(*sizes), common.TransformerLayer(*sizes)

    def read(self, text, regions, text_bias, region_bias, cache):
        """The same for `decode`: the words' half alone, since regions that read the words would tell what comes."""
        return self.text(self.cross(text, regions, region_bias, cache=cache), text_bias, cache=cache)

    def forward(self, text, regions, text_bias, region_bias, maps=None):
        seen = self.cross(text, regions, region_bias, maps)
        read = self.cross(regions, text, text_bias, maps)
        return self.text(seen, text_bias, maps), self.regions(read, region_bias, maps)


class LXMERT(nn.Module):
    """Three Transformers: over words, over regions, and across the two.

    `model(batch, objectives)` returns {objective: (loss, scores)}. `encode` gives the states alone; with
    `record=True` also `states["text.embedding"]`, `states["text.i"]`, `states["cross.i.text"]`, the same with
    `regions`, and `maps["text.i"]`, `["regions.i"]`, `["cross.i.text_to_regions"]`, `["cross.i.regions_to_text"]`,
    `["cross.i.text"]`, `["cross.i.regions"]`.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        # position 0 and segment 0 are "padding" too in the official code: used as they were drawn, they never learn.
        # The released weights were trained so, and the fixtures' gradients show it.
        self.text_embedding = common.TextEmbedding(config, padding_idx=0)
        self.region_embedding = RegionEmbedding(config)
        sizes = config.hidden, config.attention_heads, config.intermediate, config.dropout
        self.language_layers = nn.ModuleList(common.TransformerLayer(*sizes) for _ in range(config.language_layers))
        self.relation_layers = nn.ModuleList(common.TransformerLayer(*sizes) for _ in range(config.relation_layers))
        self.cross_layers = nn.ModuleList(CrossLayer(*sizes) for _ in range(config.cross_layers))
        self.pooler = common.Pooler(config.hidden)
        self.heads = nn.ModuleDict({name: HEADS[name](config) for name in config.heads})
        if {"mrfr", "mrc", "attr"} & set(config.heads):
            self.heads["regions"] = common.HeadTransform(config.hidden)  # the three region heads share it
        common.init_weights(self, config.hidden)
        common.init_box_projection(self.region_embedding.boxes)

    def embed_text(self, batch):
        """(B, T, C)"""
        return self.text_embedding(batch.text, batch.segments)

    def embed_regions(self, batch):
        """(B, N, C)"""
        return self.region_embedding(batch.features, batch.boxes)

    def unimodal(self, batch):
        """What each modality computes alone, for `encode(given=)`: its own layers. (B, T, C), (B, N, C)"""
        return self.encode(batch, regions=False).text, self.encode(batch, text=False).regions

    def decode(self, batch, cache=None):
        """The text read from left to right, for captions (see `common.next_words`). Returns (B, T, C).
        In a cross-modality layer the regions keep to themselves: theirs is the self-attention alone."""
        cache, hidden = {} if cache is None else cache, self.config.hidden_score
        region_bias = common.attention_bias(batch.region_mask, batch.boxes.dtype, hidden)  # (B, 1, 1, N)
        if not cache:
            areas = self.embed_regions(batch)
            for layer in self.relation_layers:
                areas = layer(areas, region_bias)
            cache["areas"] = [areas]
            for layer in self.cross_layers[:-1]:
                cache["areas"].append(layer.regions(cache["areas"][-1], region_bias))
        words, seen = common.next_words(self, batch, cache, batch.region_mask[:, :0])
        bias = common.attention_bias(seen, words.dtype, hidden)  # (B, 1, T, words so far)
        for layer in self.language_layers:
            words = layer(words, bias, cache=cache)
        for layer, areas in zip(self.cross_layers, cache["areas"], strict=True):
            words = layer.read(words, areas, bias, region_bias, cache)
        return words

    def run(self, name, layers, x, bias, record, states, maps):
        """One modality through its own layers. x (B, S, C), bias (B, 1, 1, S) -> (B, S, C)."""
        if record:
            states[f"{name}.embedding"] = x
        for i, layer in enumerate(layers):
            probabilities = [] if record else None
            x = layer(x, bias, probabilities)
            if record:
                states[f"{name}.{i}"], maps[f"{name}.{i}"] = x, probabilities[0]
        return x

    def encode(self, batch, text=True, regions=True, record=False, given=None):
        """Encoding of words and regions together, or of one of the two alone: then by its own layers, without the
        cross-modality layers. pooled is the pooler of the first word, or of the regions' mean without words.
        given: what `unimodal` returned for both, not computed again."""
        states, maps, hidden = {}, {}, self.config.hidden_score
        words, areas = given or (None, None)
        if text:
            words = words if given else self.embed_text(batch)
            text_bias = common.attention_bias(batch.text_mask, words.dtype, hidden)  # (B, 1, 1, T)
        if regions:
            areas = areas if given else self.embed_regions(batch)
            region_bias = common.attention_bias(batch.region_mask, areas.dtype, hidden)  # (B, 1, 1, N)
        if text and not given:
            words = self.run("text", self.language_layers, words, text_bias, record, states, maps)
        if regions and not given:
            areas = self.run("regions", self.relation_layers, areas, region_bias, record, states, maps)
        for i, layer in enumerate(self.cross_layers if text and regions else ()):
            probabilities = [] if record else None
            words, areas = layer(words, areas, text_bias, region_bias, probabilities)
            if record:
                states[f"cross.{i}.text"], states[f"cross.{i}.regions"] = words, areas
                names = "text_to_regions", "regions_to_text", "text", "regions"
                maps |= {f"cross.{i}.{name}": p for name, p in zip(names, probabilities, strict=True)}
        pooled = self.pooler(words if text else common.masked_mean(areas, batch.region_mask)[:, None])  # of (B, 1, C)
        return common.Encoding(words, areas, pooled, states, maps)

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
    "objectives": {"mlm": 1, "mrfr": 1, "mrc": 1, "attr": 1, "itm": 1, "qa": 1},  # all in every step
    "conditional": False,  # words and regions are masked at once, each on its own
    "mask_false_pairs": False,  # 12-in-1's setting: nothing is to be predicted there; the official code does
    "second_half": ("qa",),  # questions are answered in the second half of the steps only (3.3)
    "joined": {},
    "rate": 2.0,  # of the learning rate, against fine-tuning: 1e-4 at base size
    "weights": {},  # factors of the loss; 1 where none is named
    # of the masked features, the rest stays as it is (BERT's rule); a picture may have none
    "region_masking": {"zero": 0.8, "random": 0.1, "force_one": False},
    "false_pairs": 0.25,  # in the official code a half, all of which predict words; here they would be lost to them
    "mismatch": "text",  # a negative pair keeps its image and gets another sentence
}


def masked_region_features(model, encoding, batch):
    """RoI-feature regression (3.1.2): smooth-L1 between h(v_m) and f_m, mean over F, summed over masked regions.

    Divided by the number of ALL real regions, times 1/0.15. batch.region_index (M,), clean_features (B, N, F) the
    features before masking. Scores (M, F).
    """
    scores = model.heads["mrfr"](model.heads["regions"](common.gather_positions(encoding.regions, batch.region_index)))
    target = common.gather_positions(batch.clean_features, batch.region_index)
    losses = F.smooth_l1_loss(scores, target.to(scores.dtype), reduction="none").mean(-1)  # (M, F) -> (M,)
    return model.config.region_factor * losses.sum() / batch.region_mask.sum(), scores


def confident_cross_entropy(model, head, encoding, batch, labels, confidence):
    """1/0.15 times the mean over all real regions, masked or not, of confidence x cross-entropy.

    labels (B, N), -1 = none; confidence (B, N). Returns the loss and the scores of the masked regions (M, K).
    """
    scores = model.heads[head](model.heads["regions"](encoding.regions))  # (B, N, C) -> (B, N, K)
    losses = F.cross_entropy(scores.transpose(1, 2), labels, ignore_index=-1, reduction="none")  # (B, N)
    total = (losses * confidence * batch.region_mask).sum()
    return model.config.region_factor * total / batch.region_mask.sum(), common.gather_positions(
        scores, batch.region_index
    )


def masked_region_class(model, encoding, batch):
    """Detected-label classification (3.1.2): cross-entropy with the detector's class, weighted by its confidence.

    batch.objects (B, N) without background, -1 = none; object_conf (B, N). Scores (M, K - 1), of masked regions.
    """
    return confident_cross_entropy(model, "mrc", encoding, batch, batch.objects, batch.object_conf)


def masked_region_attribute(model, encoding, batch):
    """The same for attributes: batch.attributes (B, N), -1 = none; attribute_conf (B, N). Scores (M, attributes)."""
    return confident_cross_entropy(model, "attr", encoding, batch, batch.attributes, batch.attribute_conf)


def masked_region_class_kl(model, encoding, batch):
    """UNITER's soft labels for this head: KL(c || g), c the detector's distribution without background, rescaled.

    batch.object_probs (B, N, K), class 0 = background; mean over masked regions and classes. Scores (M, K - 1).
    """
    scores = model.heads["mrc"](model.heads["regions"](common.gather_positions(encoding.regions, batch.region_index)))
    target = common.gather_positions(batch.object_probs, batch.region_index)[:, 1:].to(scores.dtype)
    target = target / target.sum(-1, keepdim=True).clamp(min=1e-6)
    return F.kl_div(scores.log_softmax(-1), target, reduction="sum") / max(1, target.numel()), scores


def image_question_answering(model, encoding, batch):
    """Image question answering (3.1.3): cross-entropy over the answers, mean over the rows that have one, times
    config.answer_factor, in the paper 1.

    batch.answer_labels (B,), -1 = no question; where a question has several answers, one drawn in proportion to their
    scores. Mismatched rows (batch.matched 0) have no answer. Scores (B, A).
    """
    scores, labels = model.heads["qa"](encoding.pooled), batch.answer_labels
    if batch.matched is not None:
        labels = labels.masked_fill(batch.matched == 0, -1)
    total = model.config.answer_factor * F.cross_entropy(scores, labels, ignore_index=-1, reduction="sum")
    return total / (labels >= 0).sum().clamp(min=1), scores


# ---- task heads: the same signature ----------------------------------------------------------------------------


HEADS = {
    "mlm": lambda c: common.MaskedLMHead(c.hidden, c.vocab_size),
    "mrfr": lambda c: nn.Linear(c.hidden, c.feature_size),
    "mrc": lambda c: nn.Linear(c.hidden, c.classes - 1),
    "attr": lambda c: nn.Linear(c.hidden, c.attributes),
    "itm": lambda c: nn.Linear(c.hidden, 2),
    "itc": lambda c: common.ContrastHead(c.hidden, c.hidden, c.hidden, c.contrast),
    "hidden": lambda c: common.teacher_projections(c.hidden, c.hidden, c.teacher_widths),
    "qa": lambda c: common.mlp_head(c.hidden, 2 * c.hidden, c.answers),
    "vqa": lambda c: common.mlp_head(c.hidden, 2 * c.hidden, c.answers),
    "ve": lambda c: common.mlp_head(c.hidden, 2 * c.hidden, 3),
    "nlvr2": lambda c: common.mlp_head(2 * c.hidden, 2 * c.hidden, 2),
    "vcr": lambda c: common.mlp_head(c.hidden, 2 * c.hidden, 2),
    "rank": lambda c: nn.Linear(c.hidden, 1),
    "refer": lambda c: nn.Linear(c.hidden, 1),
}


def question_answering_hard(model, encoding, batch):
    """GQA's alternative (`--mceLoss`): cross-entropy with the best answer, times A, as there. Scores (B, A)."""
    scores = model.heads["vqa"](encoding.pooled)
    return common.cross_entropy(scores, batch.answers.argmax(1)) * scores.shape[1], scores


def natural_language_for_visual_reasoning(model, encoding, batch):
    """NLVR2: is the statement true of the two pictures? batch.target (B,) int64, 1 = true. Scores (B, 2).

    The batch has 2B rows, the statement with each picture in turn; the two pooled vectors are joined.
    """
    scores = model.heads["nlvr2"](encoding.pooled.reshape(len(batch.target), -1))  # (2B, C) -> (B, 2C) -> (B, 2)
    return common.cross_entropy(scores, batch.target), scores


REGION_CLASSES = common.Objective(
    masked_region_class,
    head="mrc",
    pretraining=True,
    masks="regions",
    mean_over="all regions",
    fields=("object_probs",),
    labels=common.most_likely_class,
)

# the shared ones: mlm, itm, itc, vqa, ve, vcr, rank, refer, caption; of one name, the paper's own counts
OBJECTIVES = common.SHARED_OBJECTIVES | {
    "mrfr": common.Objective(
        masked_region_features, head="mrfr", pretraining=True, masks="regions", mean_over="all regions"
    ),
    "mrc": REGION_CLASSES,
    "mrc_kl": replace(REGION_CLASSES, loss=masked_region_class_kl, mean_over="regions"),
    "attr": replace(
        REGION_CLASSES,
        loss=masked_region_attribute,
        head="attr",
        fields=("attributes",),
        labels=lambda batch, logits: batch.attributes.flatten()[batch.region_index],
    ),
    "qa": common.Objective(
        image_question_answering,
        head="qa",
        pretraining=True,
        mean_over="answers",
        fields=("answers",),
        labels=lambda batch, logits: batch.answer_labels,
    ),
    "gqa": common.Objective(common.question_answering, head="vqa"),
    "gqa_hard": common.Objective(question_answering_hard, head="vqa"),
    "nlvr2": common.Objective(natural_language_for_visual_reasoning, head="nlvr2"),
}

VCR_TYPES = ((0, 1), (0, 0, 1))  # text types: a question and its answer; a question, its answer and the reason
NEGATIVES = ("image", "text")  # false partners of a true pair in retrieval, in the order of the rows


def text_types(tasks):
    """Rows that the table of text types needs for these tasks: always 2."""
    return 2


MODEL = LXMERT  # the file's model, for the table of models
