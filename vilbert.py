"""ViLBERT: task-agnostic visiolinguistic representations (Lu et al., NeurIPS 2019, arXiv 1908.02265), and 12-in-1
(Lu et al., CVPR 2020, arXiv 1912.02315), the same model trained on twelve tasks.

What the model does, in five lines:
1. words become vectors (word + position + type), regions too (feature + box), each sequence in a width of its own;
2. two BERTs, one a modality, meet in co-attention layers: words ask the regions, regions ask the words;
3. pretraining masks words AND regions at once, and adds up all objectives in each step;
4. a region in front stands for the whole image, as [CLS] does for the text: the product of the two is the pair's vector;
5. a small head on that vector, or on each region, answers every downstream task.

Known deviations: the whole-image region is made here, from the batch's regions, and left out of what is returned, so
that batches are the same for all models; class 1 of the matching head means "match" (official: class 0), its rows change
places on the way from and to official checkpoints. Errors of the official code are listed in the README's errata.
Letters: B batch, T text positions, N regions, C width, F region-feature width, V vocabulary, K classes, M masked.
"""

from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

import common

# ---- configuration ---------------------------------------------------------------------------------------------


@dataclass
class Config:
    """Sizes of a ViLBERT. The defaults are the paper's (BERT-base and six visual layers); PRESETS gives the others."""

    vocab_size: int = 30522  # BERT's uncased word pieces
    hidden: int = 768  # C of the text; the visual one follows
    layers: int = 12
    attention_heads: int = 12
    intermediate: int = 3072
    visual_hidden: int = 1024  # C of the regions
    visual_layers: int = 6
    visual_heads: int = 8
    visual_intermediate: int = 1024
    shared: int = 1024  # width of the co-attention and of the pair's vector
    shared_heads: int = 8
    connections: tuple = ((0, 6), (1, 7), (2, 8), (3, 9), (4, 10), (5, 11))  # co-attention before (visual, text) layers
    fusion: str = "mul"  # or "sum": how the two pooled vectors become one
    frozen_layers: int = 0  # the first text layers, and the embedding below them, that do not learn
    frozen_visual_layers: int = 0  # the same for the regions
    max_positions: int = 512  # longest text
    types: int = 2  # VCR: 0 question, 1 choice
    feature_size: int = 2048  # F, of the published detector; 3 x patch x patch for regions cut from pixels
    classes: int = 1601  # K, the detector's classes with 0 = background
    attributes: int = 0  # for LXMERT's attribute objective; ViLBERT has none
    answers: int = 3129  # A, the answer list's length
    gqa_answers: int = 1533  # the same for GQA
    dropout: float = 0.1  # everywhere in the trunk, and on what the heads read
    heads: tuple = ("mlm", "mrc", "itm")  # which of the heads below this model has
    contrast: str = "infonce"  # loss of the objective itc; or "hinge", "sigmoid", "dcl"
    teacher_widths: tuple = ()  # widths (text, regions) of the teacher that the head "hidden" projects to
    twelve_in_one: bool = False  # the answer heads of 12-in-1 in place of the paper's
    task_tokens: int = 0  # 12-in-1: that many task vectors; batch.task's follows [CLS]
    dynamic_attention: bool = False  # 12-in-1: the text scales the regions' queries and keys


PRESETS = {
    "tiny": {
        "hidden": 128,
        "layers": 4,
        "attention_heads": 4,
        "intermediate": 512,
        "visual_hidden": 128,
        "visual_layers": 2,
        "visual_heads": 4,
        "visual_intermediate": 256,
        "shared": 128,
        "shared_heads": 4,
        "connections": ((0, 2), (1, 3)),
        "max_positions": 128,
        "dropout": 0.0,
    },
    "base": {},
}

# ---- embeddings: the regions'; the words' is BERT's, `common.TextEmbedding` -------------------------------------


class RegionEmbedding(nn.Module):
    """norm(W_f f + W_b box), then dropout (section 2.2). The whole image comes first, as a region of its own: the mean
    of the region features, masked ones (zeroed) included, and the box of the picture.

    features f (B, N, F); boxes (B, N, 4) as x1,y1,x2,y2 in 0..1, which become the paper's five numbers
    [x1, y1, x2, y2, area]; mask (B, N) bool, True = a region, not padding. Returns (B, 1+N, C).
    """

    def __init__(self, config):
        super().__init__()
        width = config.visual_hidden
        self.features, self.boxes = nn.Linear(config.feature_size, width), nn.Linear(5, width)
        self.norm, self.dropout = common.LayerNorm(width), common.Dropout(config.dropout)

    def forward(self, features, boxes, mask):
        mean = common.masked_mean(features, mask)[:, None]  # (B, 1, F)
        whole = (torch.arange(4, device=boxes.device) > 1).to(boxes.dtype)  # 0, 0, 1, 1
        boxes = torch.cat([whole.expand(len(boxes), 1, 4), boxes], 1)  # (B, 1+N, 4)
        area = (boxes[..., 2:] - boxes[..., :2]).prod(-1, keepdim=True)  # (B, 1+N, 1)
        looks = self.features(torch.cat([mean, features], 1))  # (B, 1+N, F) -> (B, 1+N, C)
        return self.dropout(self.norm(looks + self.boxes(torch.cat([boxes, area], -1))))


# ---- model -----------------------------------------------------------------------------------------------------


class CoAttentionLayer(nn.Module):
    """Co-attention (section 2.1, figure 2b): each stream's queries meet the other's keys and values, both computed from
    the same inputs; then each stream has its feed-forward. Residual and norm as in BERT.

    text (B, T, C), regions (B, 1+N, C'); to the list `maps` go (B, H, T, 1+N), words over regions, then (B, H, 1+N, T).
    """

    def __init__(self, config):
        super().__init__()
        text, visual, inner = config.hidden, config.visual_hidden, config.shared
        heads, dropout = config.shared_heads, config.dropout
        self.text_reads = common.AttentionBlock(text, heads, dropout, context_width=visual, inner=inner)
        self.regions_read = common.AttentionBlock(visual, heads, dropout, context_width=text, inner=inner)
        self.text_feed_forward = common.FeedForward(text, config.intermediate, dropout)
        self.region_feed_forward = common.FeedForward(visual, config.visual_intermediate, dropout)
        # in every released checkpoint, and counted in the paper's size, but no output depends on them
        self.unused1, self.unused2 = nn.Linear(inner, visual), nn.Linear(inner, text)
        self.unused1.requires_grad_(False), self.unused2.requires_grad_(False)

    def forward(self, text, regions, text_bias, region_bias, maps=None):
        words = self.text_reads(text, regions, region_bias, maps)
        areas = self.regions_read(regions, text, text_bias, maps)
        return self.text_feed_forward(words), self.region_feed_forward(areas)


class DynamicLayer(common.TransformerLayer):
    """A region layer that the text steers (an option of 12-in-1's code): queries and keys times 1 + sigmoid(W t + b).

    x (B, 1+N, C); t (B, 1, C') the mean of the text's states, None for a plain layer.
    """

    def __init__(self, text_width, width, heads, inner, dropout=0.0):
        super().__init__(width, heads, inner, dropout)
        self.gate_query, self.gate_key = nn.Linear(text_width, width), nn.Linear(text_width, width)

    def forward(self, x, bias=None, maps=None, text=None):
        if text is None:
            return super().forward(x, bias, maps)
        block = self.attention
        query = block.query(x) * (1.0 + self.gate_query(text).sigmoid())  # (B, 1+N, C) * (B, 1, C)
        key = block.key(x) * (1.0 + self.gate_key(text).sigmoid())
        mixed = block.mix(query, key, block.value(x), bias, maps)
        return self.feed_forward(block.norm(x + block.hidden_dropout(mixed)))


def schedule(config):
    """The order of execution, [("text", 0), ..., ("cross", 0), ("regions", 0), ...]: before co-attention k the text
    and the visual layers below the two that it names have run; after the last one the rest follow.

    ValueError for connections that go backwards or past the end, or that lie below the frozen layers.
    """
    steps, visual, text = [], 0, 0
    for k, (next_visual, next_text) in enumerate(config.connections):
        if not (visual <= next_visual <= config.visual_layers and text <= next_text <= config.layers):
            raise ValueError(f"connection {k} comes before layers {next_visual}, {next_text}: out of order or of range")
        if next_visual < config.frozen_visual_layers or next_text < config.frozen_layers:
            raise ValueError(f"connection {k} lies below a frozen layer: freeze fewer")
        steps += [("text", i) for i in range(text, next_text)] + [("regions", i) for i in range(visual, next_visual)]
        steps, visual, text = steps + [("cross", k)], next_visual, next_text
    steps += [("regions", i) for i in range(visual, config.visual_layers)]
    return steps + [("text", i) for i in range(text, config.layers)]


class ViLBERT(nn.Module):
    """Two Transformers, one over words and one over regions, with co-attention between them.

    `model(batch, objectives)` returns {objective: (loss, scores)}. `encode` gives the states alone; with
    `record=True` also, in the order of execution, `states["text.embedding"]`, `states["regions.embedding"]`,
    `states["text.i"]`, `states["regions.i"]`, `states["cross.k.text"]`, `states["cross.k.regions"]`, and `maps["text.i"]`,
    `["regions.i"]`, `["cross.k.text_to_regions"]`, `["cross.k.regions_to_text"]`, the asking side first. Recorded
    regions have the whole image in front, recorded text has the task token: 1+N, and T or T+1 positions.
    """

    def __init__(self, config):
        super().__init__()
        self.config, self.schedule = config, schedule(config)
        # so many steps come before the first co-attention
        self.apart = sum(config.connections[0]) if config.connections else len(self.schedule)
        self.text_embedding = common.TextEmbedding(config)
        if config.task_tokens:
            self.text_embedding.tasks = nn.Embedding(config.task_tokens, config.hidden)
        self.region_embedding = RegionEmbedding(config)
        sizes = config.hidden, config.attention_heads, config.intermediate, config.dropout
        self.text_layers = nn.ModuleList(common.TransformerLayer(*sizes) for _ in range(config.layers))
        sizes = config.visual_hidden, config.visual_heads, config.visual_intermediate, config.dropout
        layer = partial(DynamicLayer, config.hidden) if config.dynamic_attention else common.TransformerLayer
        self.region_layers = nn.ModuleList(layer(*sizes) for _ in range(config.visual_layers))
        self.connections = nn.ModuleList(CoAttentionLayer(config) for _ in config.connections)
        self.text_pooler = common.Pooler(config.hidden, config.shared, torch.relu)
        self.region_pooler = common.Pooler(config.visual_hidden, config.shared, torch.relu)
        self.dropout = common.Dropout(config.dropout)
        self.heads = nn.ModuleDict({name: HEADS[name](config) for name in config.heads})
        common.init_weights(self, config.hidden)
        common.init_box_projection(self.region_embedding.boxes)

    def task(self, batch):
        """batch.task (B,), where the model has task tokens and the batch names tasks; else None."""
        return getattr(batch, "task", None) if self.config.task_tokens else None

    def embed_text(self, batch):
        """(B, T, C). 12-in-1 puts the task's vector, without position or type, behind [CLS]: (B, T+1, C)."""
        embedding, task = self.text_embedding, self.task(batch)
        x = embedding(batch.text, batch.segments)
        if task is None:
            return x
        token = embedding.dropout(embedding.norm(embedding.tasks(task)))[:, None]  # (B, 1, C)
        return torch.cat([x[:, :1], token, x[:, 1:]], 1)

    def embed_regions(self, batch):
        """(B, 1+N, C), the whole image first."""
        return self.region_embedding(batch.features, batch.boxes, batch.region_mask)

    def fuse(self, words, areas):
        """The pair's vector (section 2.2): product or sum of the first positions' ReLU poolers. One alone: its own."""
        if words is None or areas is None:
            return self.dropout(self.text_pooler(words) if areas is None else self.region_pooler(areas))
        words, areas = self.text_pooler(words), self.region_pooler(areas)  # (B, shared)
        return self.dropout(words + areas if self.config.fusion == "sum" else words * areas)

    def unimodal(self, batch):
        """What each modality computes alone, for `encode(given=)`: its layers before the first co-attention. (B, T, C),
        (B, 1+N, C)"""
        steps = self.schedule[: self.apart]
        words, _, _ = self.run(batch, {"text": self.embed_text(batch)}, steps)
        areas, _, _ = self.run(batch, {"regions": self.embed_regions(batch)}, steps)
        return words["text"], areas["regions"]

    def decode(self, batch, cache=None):
        """The text read from left to right, for captions (see `common.next_words`). Returns (B, T, C).
        In a co-attention layer the regions keep to themselves: theirs is the feed-forward alone. Options of 12-in-1
        (task tokens, dynamic attention) and frozen layers are not looked at."""
        cache = {} if cache is None else cache
        mask = F.pad(batch.region_mask, (1, 0), value=True)  # the whole image is always there
        area_bias = common.attention_bias(mask, batch.boxes.dtype)  # (B, 1, 1, 1+N)
        if not cache:
            areas, cache["areas"] = self.embed_regions(batch), []
            for kind, i in self.schedule:
                if kind == "regions":
                    areas = self.region_layers[i](areas, area_bias)
                elif kind == "cross":
                    cache["areas"].append(areas)
                    areas = self.connections[i].region_feed_forward(areas)
        words, seen = common.next_words(self, batch, cache, batch.region_mask[:, :0])
        bias = common.attention_bias(seen, words.dtype)  # (B, 1, T, words so far)
        for kind, i in self.schedule:
            if kind == "text":
                words = self.text_layers[i](words, bias, cache=cache)
            elif kind == "cross":
                layer = self.connections[i]
                words = layer.text_reads(words, cache["areas"][i], area_bias, cache=cache)
                words = layer.text_feed_forward(words)
        return words

    def run(self, batch, x, steps, record=False):
        """One stream or both through those steps of the schedule that concern them; co-attention concerns both.

        x {"text": (B, T, C), "regions": (B, 1+N, C)}: what stands in front, task token or whole image, is no padding.
        Returns x, and what `encode` records of the steps, states and maps.
        """
        config, masks, states, maps = self.config, {}, {}, {}
        for side in x:
            mask = batch.text_mask if side == "text" else batch.region_mask
            masks[side] = F.pad(mask, (x[side].shape[1] - mask.shape[1], 0), value=True)
        bias = {side: common.attention_bias(masks[side], x[side].dtype) for side in x}  # (B, 1, 1, T), (B, 1, 1, 1+N)
        layers = {"text": self.text_layers, "regions": self.region_layers}
        frozen = {"text": config.frozen_layers, "regions": config.frozen_visual_layers}
        for kind, i in steps:
            seen = [] if record else None
            if kind == "cross" and len(x) == 2:
                words, areas = self.connections[i](x["text"], x["regions"], bias["text"], bias["regions"], seen)
                x = {"text": words, "regions": areas}
            elif kind in x:
                steered = kind == "regions" and config.dynamic_attention and "text" in x
                mean = [common.masked_mean(x["text"], masks["text"])[:, None]] if steered else []  # (B, 1, C)
                new = layers[kind][i](x[kind], bias[kind], seen, *mean)
                x = x | {kind: new.detach() if i + 1 == frozen[kind] else new}
            if seen and kind == "cross":
                states |= {f"cross.{i}.{side}": x[side] for side in x}
                maps[f"cross.{i}.text_to_regions"], maps[f"cross.{i}.regions_to_text"] = seen
            elif seen:
                states[f"{kind}.{i}"], maps[f"{kind}.{i}"] = x[kind], seen[0]
        return x, states, maps

    def encode(self, batch, text=True, regions=True, record=False, given=None):
        """Encoding of words and regions, or of one of the two alone: its own stream without the co-attention layers.
        pooled is (B, shared) in all cases. given: what `unimodal` returned for both, not computed again."""
        x, steps = {}, self.schedule[self.apart :] if given else self.schedule
        if text:
            x["text"] = given[0] if given else self.embed_text(batch)
        if regions:
            x["regions"] = given[1] if given else self.embed_regions(batch)
        states = {f"{side}.embedding": x[side] for side in x} if record else {}
        x, later, maps = self.run(batch, x, steps, record)
        words, areas = x.get("text"), x.get("regions")
        pooled = self.fuse(words, areas)
        if text and self.task(batch) is not None:
            words = torch.cat([words[:, :1], words[:, 2:]], 1)  # (B, T+1, C) -> (B, T, C)
        return common.Encoding(words, areas[:, 1:] if regions else None, pooled, states | later, maps)

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
    "objectives": {"mlm": 1, "mrc_kl": 1, "itm": 1},
    "conditional": False,  # all in one step: words and regions are masked together
    "mask_false_pairs": False,  # 12-in-1's setting: nothing is to be predicted there; ViLBERT's own code did
    "joined": {},
    "rate": 2.0,  # of the learning rate, against fine-tuning: 1e-4 at base size
    "weights": {},  # the losses are added up as they are
    # one masked region in ten keeps its feature; a picture may have none
    "region_masking": {"zero": 0.9, "random": 0.0, "force_one": False},
    "false_pairs": 0.5,
    "mismatch": "text",  # a negative pair keeps its picture and gets another sentence
}


def masked_region_features(model, encoding, batch):
    """Masked region feature regression (an option of the code): ||h(v_m) - f_m||^2, mean over masked regions and F.

    batch.region_index (M,), clean_features (B, N, F) the features before masking. Scores (M, F).
    """
    scores = model.heads["mrfr"](common.gather_positions(encoding.regions, batch.region_index))
    target = common.gather_positions(batch.clean_features, batch.region_index).to(scores.dtype)
    return F.mse_loss(scores, target, reduction="sum") / max(1, target.numel()), scores


def draw_regions(batch, near, far):
    """Negatives for each masked region: `far` from other pictures, then `near` from its own, of real regions only,
    with replacement. Flat positions (M, far + near). Where one kind is lacking the other takes its place."""
    row, real = batch.region_index // batch.region_mask.shape[1], batch.region_mask.flatten()  # (M,), (B*N,)
    rows = torch.arange(len(real), device=real.device) // batch.region_mask.shape[1]  # (B*N,)
    own = real & (row[:, None] == rows)  # (M, B*N)
    other = real & ~own
    own = own.scatter(1, batch.region_index[:, None], False)  # itself is the positive
    if real.is_cpu and not (own | other).any(1).all():  # a GPU would be waited for; there the draw below fails
        raise ValueError("the NCE objective needs a second region in the batch")
    other, own = torch.where(other.any(1, True), other, own), torch.where(own.any(1, True), own, other)
    draws = [torch.multinomial(pool.float(), n, replacement=True) for pool, n in ((other, far), (own, near)) if n]
    return torch.cat(draws, 1)


def noise_contrastive_regions(model, encoding, batch, negatives=None, count=128):
    """NCE on masked regions (12-in-1's code): which of 1 + n features is the masked one's own?

        L = -log exp(h(v_m) f_m) / sum_{j in {m} and negatives} exp(h(v_m) f_j), mean over masked regions

    negatives (M, n): flat positions in the batch; None draws int(0.7 count) from other pictures, int(0.3 count) from
    the same. Head and clean features as in regression. Scores (M, 1 + n), the positive first.
    """
    predicted, index = (
        model.heads["mrfr"](common.gather_positions(encoding.regions, batch.region_index)),
        batch.region_index,
    )
    if len(index) == 0:
        return predicted.sum() * 0.0, predicted[:, :1]
    if negatives is None:
        negatives = draw_regions(batch, near=int(0.3 * count), far=int(0.7 * count))
    scores = predicted @ batch.clean_features.flatten(0, 1).to(predicted.dtype).T  # (M, F) @ (F, B*N) -> (M, B*N)
    scores = scores.gather(1, torch.cat([index[:, None], negatives], 1))  # (M, 1 + n)
    return common.cross_entropy(scores, torch.zeros_like(index)), scores


def masked_region_class_kl(model, encoding, batch):
    """The paper's, with soft labels: KL(c || g) = sum_k c_k (log c_k - log g_k), c the detector's distribution.

    batch.object_probs (B, N, K). The mean is over masked regions, the sum over classes. Scores (M, K).
    """
    scores = model.heads["mrc"](common.gather_positions(encoding.regions, batch.region_index))
    target = common.gather_positions(batch.object_probs, batch.region_index).to(scores.dtype)
    return F.kl_div(scores.log_softmax(-1), target, reduction="sum") / max(1, len(target)), scores


# ---- task heads: the same signature ----------------------------------------------------------------------------


class WeightNormLinear(nn.Module):
    """Linear with its matrix written as g V / ||V||, one gain g for the whole matrix. x (B, C) -> (B, out)."""

    def __init__(self, width, out):
        super().__init__()
        linear = nn.Linear(width, out)  # torch's own initialisation, which BERT's does not reach in the official code
        self.weight_v, self.weight_g = linear.weight, nn.Parameter(linear.weight.detach().norm())
        self.bias = nn.Parameter(torch.zeros(out))

    def forward(self, x):
        return F.linear(x, self.weight_v * (self.weight_g / self.weight_v.norm()), self.bias)


class WeightNormClassifier(nn.Module):
    """The paper's answer head: weight-normed linear, ReLU, dropout 0.5, weight-normed linear. x (B, C) -> (B, A)."""

    def __init__(self, width, inner, out):
        super().__init__()
        layers = WeightNormLinear(width, inner), nn.ReLU(), common.Dropout(0.5), WeightNormLinear(inner, out)
        self.main = nn.Sequential(*layers)

    def forward(self, x):
        return self.main(x)


def answer_head(config, answers):
    """12-in-1 changed the head: GELU and layer norm."""
    return (common.mlp_head if config.twelve_in_one else WeightNormClassifier)(
        config.shared, 2 * config.shared, answers
    )


HEADS = {
    "mlm": lambda c: common.MaskedLMHead(c.hidden, c.vocab_size),
    "mrfr": lambda c: common.mlp_head(c.visual_hidden, c.visual_hidden, c.feature_size),
    "mrc": lambda c: common.mlp_head(c.visual_hidden, c.visual_hidden, c.classes),
    "itm": lambda c: nn.Linear(c.shared, 2),
    "itc": lambda c: common.ContrastHead(c.hidden, c.visual_hidden, c.hidden, c.contrast),
    "hidden": lambda c: common.teacher_projections(c.hidden, c.visual_hidden, c.teacher_widths),
    "vqa": lambda c: answer_head(c, c.answers),
    "gqa": lambda c: answer_head(c, c.gqa_answers),
    "ve": lambda c: nn.Linear(c.shared, 3),
    "nlvr2": lambda c: common.mlp_head(2 * c.shared, 2 * c.shared, 2),
    "vcr": lambda c: nn.Linear(c.shared, 1),
    "rank": lambda c: nn.Linear(c.shared, 1),
    "refer": lambda c: nn.Linear(c.visual_hidden, 1),
    "word": lambda c: nn.Linear(c.hidden, 1),  # a score per word: in the released checkpoints, in no task
}


def visual_entailment(model, encoding, batch):
    """SNLI-VE (12-in-1): binary cross-entropy over the three answers, mean over them. batch.answers (B, 3). Scores
    (B, 3)."""
    scores = model.heads["ve"](encoding.pooled)
    return F.binary_cross_entropy_with_logits(scores, batch.answers), scores


def natural_language_for_visual_reasoning(model, encoding, batch):
    """NLVR2 (12-in-1): is the statement true of the two pictures? batch.target (B,) int64, 1 = true. Scores (B, 2).

    The batch has 2B rows, the statement with each picture in turn; binary cross-entropy, mean over both scores.
    """
    scores = model.heads["nlvr2"](encoding.pooled.reshape(len(batch.target), -1))  # (2B, C) -> (B, 2C) -> (B, 2)
    return F.binary_cross_entropy_with_logits(scores, F.one_hot(batch.target, 2).to(scores.dtype)), scores


def visual_commonsense_reasoning(model, encoding, batch, group=None):
    """VCR: one row a choice, batch.target (rows,) 1 = the right one; cross-entropy within a question's `group` rows, by
    default as many as there are for each of batch.ids. Scores (rows,). Types: 0 question, 1 choice."""
    group = group or len(batch.target) // len(batch.ids)
    scores = model.heads["vcr"](encoding.pooled).squeeze(-1)  # (rows, 1) -> (rows,)
    return common.cross_entropy(scores.view(-1, group), batch.target.view(-1, group).argmax(1)), scores


def retrieval_rank(model, encoding, batch, group=4):
    """Retrieval (section 3.2): in each group of rows the first is the true pair; cross-entropy within the group.

    Rows B = groups x group; 4 is one true pair with a false text, a false picture and a hard false text. Scores (B,).
    """
    scores = model.heads["rank"](encoding.pooled).squeeze(-1)  # (B, 1) -> (B,)
    first = torch.zeros(len(scores) // group, dtype=torch.long, device=scores.device)
    return common.cross_entropy(scores.view(-1, group), first), scores


def refer_scores(model, encoding, batch):
    """A score for every region, padding at -10000. (B, N)"""
    scores = model.heads["refer"](model.dropout(encoding.regions)).squeeze(-1)  # (B, N, 1) -> (B, N)
    return scores + (1.0 - batch.region_mask.to(scores.dtype)) * -10000.0


def referring_expression(model, encoding, batch):
    """Referring expressions (section 3.2): binary cross-entropy, summed over regions, mean over the batch, against the
    regions' overlap with what is meant, 0 where it is below one half. Scores (B, N).

    batch.target (B, N) float, the overlaps, or (B,) int64, the region meant: then the overlaps with that one.
    """
    scores, target = refer_scores(model, encoding, batch), batch.target
    if target.ndim == 1:
        meant = batch.boxes.gather(1, target[:, None, None].expand(-1, 1, 4))  # (B, N, 4) -> (B, 1, 4)
        target = common.iou(batch.boxes, meant) * batch.region_mask
    target = target.masked_fill(target < 0.5, 0.0).to(scores.dtype)
    return common.soft_answer_loss(scores, target), scores


REGION_CLASSES = common.Objective(
    common.masked_region_class,
    head="mrc",
    pretraining=True,
    masks="regions",
    mean_over="regions",
    fields=("object_probs",),
    labels=common.most_likely_class,
)

REGION_FEATURES = common.Objective(
    masked_region_features, head="mrfr", pretraining=True, masks="regions", mean_over="regions"
)

# the shared ones: mlm, itm, itc, vqa, ve, vcr, rank, refer, caption; of one name, the paper's own counts
OBJECTIVES = common.SHARED_OBJECTIVES | {
    "mrfr": REGION_FEATURES,
    "nce": replace(REGION_FEATURES, loss=noise_contrastive_regions),
    "mrc": REGION_CLASSES,
    "mrc_kl": replace(REGION_CLASSES, loss=masked_region_class_kl),
    "gqa": common.Objective(partial(common.question_answering, head="gqa"), head="gqa"),
    "ve": common.Objective(visual_entailment, head="ve"),
    "nlvr2": common.Objective(natural_language_for_visual_reasoning, head="nlvr2"),
    "vcr": common.Objective(visual_commonsense_reasoning, head="vcr"),
    "rank": common.Objective(retrieval_rank, head="rank"),
    "refer": common.Objective(referring_expression, head="refer"),
}

VCR_TYPES = ((0, 1), (0, 0, 1))  # text types: a question and its answer; a question, its answer and the reason
NEGATIVES = ("text", "image", "text")  # false partners of a true pair in retrieval, in the order of the rows


def text_types(tasks):
    """Rows that the table of text types needs for these tasks: always 2."""
    return 2


MODEL = ViLBERT  # the file's model, for the table of models
