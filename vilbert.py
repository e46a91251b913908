"""ViLBERT: task-agnostic visiolinguistic representations (Lu et al., NeurIPS 2019, arXiv 1908.02265), and 12-in-1
(Lu et al., CVPR 2020, arXiv 1912.02315), the same model trained on twelve tasks.

What the model does, in five lines:
1. Each word becomes a vector (word + position + type), each region too (feature + box), in two widths of their own.
2. Two BERTs, one per modality, are joined by co-attention layers: words attend to regions, regions to words.
3. Pretraining masks words AND regions of the same pair and adds up all objectives in every step.
4. A region in front stands for the whole image, as [CLS] does for the text; the product of the two is the pair's vector.
5. A small head on that vector, or on each region, answers every downstream task.

Known deviations from the official code:
- The whole-image region is made here, from the batch's regions, and left out of what `encode` returns, so that
  batches are the same for all models.
- Class 1 of the matching head means "match", officially class 0. Its rows are swapped when official weights are read
  or written.
- In pretraining nothing is predicted in mismatched pairs, as 12-in-1 has it; ViLBERT's own code predicts there too.
docs/details.md lists the errors of the official code.
Letters: B batch, T text positions, N regions, C width, H heads, F region-feature width, V vocabulary, K classes,
M masked positions, A answers.
"""

from dataclasses import dataclass, replace

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
    max_positions: int = 512  # longest text
    types: int = 2  # VCR: 0 question, 1 choice
    feature_size: int = 2048  # F, of the published detector; 3 x patch x patch for regions cut from pixels
    classes: int = 1601  # K, the detector's classes with 0 = background
    attributes: int = 0  # for LXMERT's attribute objective; ViLBERT has none
    answers: int = 3129  # A, the answer list's length
    gqa_answers: int = 1533  # rows of the GQA head in released checkpoints of 12-in-1
    dropout: float = 0.1  # everywhere in the trunk, and on what the heads read
    heads: tuple = ("mlm", "mrc", "itm")  # which of the heads below this model has
    contrast: str = "infonce"  # loss of the objective itc; or "hinge", "sigmoid", "dcl"
    teacher_widths: tuple = ()  # widths (text, regions) of the teacher that the head "hidden" projects to
    twelve_in_one: bool = False  # the answer heads of 12-in-1 in place of the paper's
    task_tokens: int = 0  # 12-in-1: rows of the table of task vectors; batch.task's row is put behind [CLS]
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

# ---- embeddings: regions here; words are BERT's, `common.TextEmbedding` ------------------------------------------


class RegionEmbedding(nn.Module):
    """norm(W_f f + W_b box), then dropout (section 2.2). The whole image comes first, as a region of its own: its
    feature is the mean of the region features, masked (zeroed) ones included, its box is the picture's.

    features f (B, N, F); boxes (B, N, 4) as x1,y1,x2,y2 in 0..1, which become the paper's five numbers
    [x1, y1, x2, y2, area]; mask (B, N) bool, True = a region, not padding. Returns (B, 1+N, C).
    """

    def __init__(self, config):
        super().__init__()
        self.features = nn.Linear(config.feature_size, config.visual_hidden)
        self.boxes = nn.Linear(5, config.visual_hidden)
        self.norm = common.LayerNorm(config.visual_hidden)
        self.dropout = common.Dropout(config.dropout)

    def forward(self, features, boxes, mask):
        mean = common.masked_mean(features, mask)[:, None]  # (B, N, F) -> (B, 1, F)
        features = torch.cat([mean, features], 1)  # (B, 1+N, F)
        whole = (torch.arange(4, device=boxes.device) > 1).to(boxes.dtype)  # 0, 0, 1, 1
        boxes = torch.cat([whole.expand(len(boxes), 1, 4), boxes], 1)  # (B, 1+N, 4)
        area = (boxes[..., 2:] - boxes[..., :2]).prod(-1, keepdim=True)  # (B, 1+N, 1)
        feature_emb = self.features(features)  # (B, 1+N, F) -> (B, 1+N, C)
        box_emb = self.boxes(torch.cat([boxes, area], -1))  # (B, 1+N, 5) -> (B, 1+N, C)
        return self.dropout(self.norm(feature_emb + box_emb))


# ---- model -----------------------------------------------------------------------------------------------------


class CoAttentionLayer(nn.Module):
    """Co-attention (section 2.1, figure 2b): queries come from one stream, keys and values from the other; both
    directions are computed from the same inputs. Then each stream has its feed-forward. Residual and norm as in BERT.

    text (B, T, C), regions (B, 1+N, C'); their biases (B, 1, 1, T) and (B, 1, 1, 1+N) hide padded keys. To the list
    `maps`, if given, two attention maps are appended: text-to-regions (B, H, T, 1+N), regions-to-text (B, H, 1+N, T).
    """

    def __init__(self, config):
        super().__init__()
        text, visual, inner = config.hidden, config.visual_hidden, config.shared
        heads, dropout = config.shared_heads, config.dropout
        self.text_reads = common.AttentionBlock(text, heads, dropout, context_width=visual, inner=inner)
        self.regions_read = common.AttentionBlock(visual, heads, dropout, context_width=text, inner=inner)
        self.text_feed_forward = common.FeedForward(text, config.intermediate, dropout)
        self.region_feed_forward = common.FeedForward(visual, config.visual_intermediate, dropout)
        # Official q_dense1 and q_dense2: every released checkpoint has them and the paper's size counts them, but no
        # output depends on them. They are kept so that checkpoints can be read and written whole.
        self.unused1 = nn.Linear(inner, visual).requires_grad_(False)
        self.unused2 = nn.Linear(inner, text).requires_grad_(False)

    def forward(self, text, regions, text_bias, region_bias, maps=None):
        new_text = self.text_reads(text, regions, region_bias, maps)
        new_regions = self.regions_read(regions, text, text_bias, maps)
        return self.text_feed_forward(new_text), self.region_feed_forward(new_regions)


class DynamicLayer(common.TransformerLayer):
    """A visual layer whose queries and keys are multiplied by 1 + sigmoid(W t + b) (an option of 12-in-1's code).

    x (B, 1+N, C); t (B, 1, C') the mean of the text's hidden states, None for a plain layer.
    """

    def __init__(self, text_width, width, heads, inner, dropout=0.0):
        super().__init__(width, heads, inner, dropout)
        self.gate_query = nn.Linear(text_width, width)
        self.gate_key = nn.Linear(text_width, width)

    def forward(self, x, bias=None, maps=None, text=None):
        if text is None:
            return super().forward(x, bias, maps)
        block = self.attention
        query = block.query(x) * (1.0 + self.gate_query(text).sigmoid())  # (B, 1+N, C) * (B, 1, C)
        key = block.key(x) * (1.0 + self.gate_key(text).sigmoid())  # (B, 1+N, C) * (B, 1, C)
        context = block.attend_heads(query, key, block.value(x), bias, maps)  # (B, 1+N, C)
        return self.feed_forward(block.norm(x + block.hidden_dropout(context)))


def schedule(config):
    """The order in which layers run: a list of ("text", i), ("regions", i) and ("cross", k).

    Before co-attention k the text and the visual layers below its two connected layers have run. After the last
    co-attention the remaining visual layers run, then the remaining text layers.
    ValueError for connections that are out of order or out of range.
    """
    steps = []
    visual_done = 0
    text_done = 0
    for k, (visual_next, text_next) in enumerate(config.connections):
        if not (visual_done <= visual_next <= config.visual_layers and text_done <= text_next <= config.layers):
            raise ValueError(f"connection {k} comes before layers {visual_next}, {text_next}: out of order or of range")
        steps += [("text", i) for i in range(text_done, text_next)]
        steps += [("regions", i) for i in range(visual_done, visual_next)]
        steps += [("cross", k)]
        visual_done = visual_next
        text_done = text_next
    steps += [("regions", i) for i in range(visual_done, config.visual_layers)]
    steps += [("text", i) for i in range(text_done, config.layers)]
    return steps


class ViLBERT(nn.Module):
    """Two Transformers, one over words and one over regions, with co-attention between them.

    `model(batch, objectives)` returns {objective: (loss, logits)}. `encode` returns the hidden states alone. With
    `record=True` they hold besides, in the order of execution:
    states "text.embedding", "regions.embedding", "text.i", "regions.i", "cross.k.text", "cross.k.regions";
    maps "text.i", "regions.i", "cross.k.text_to_regions", "cross.k.regions_to_text".
    Recorded regions begin with the whole image (1+N positions), recorded text has the task token (T+1), if there is one.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.schedule = schedule(config)
        self.steps_alone = 0  # how many steps come before the first one that needs both modalities
        for kind, _ in self.schedule:
            if kind == "cross" or (kind == "regions" and config.dynamic_attention):
                break
            self.steps_alone += 1
        self.text_embedding = common.TextEmbedding(config)
        if config.task_tokens > 0:
            self.text_embedding.tasks = nn.Embedding(config.task_tokens, config.hidden)
        self.region_embedding = RegionEmbedding(config)
        sizes = (config.hidden, config.attention_heads, config.intermediate, config.dropout)
        self.text_layers = nn.ModuleList(common.TransformerLayer(*sizes) for _ in range(config.layers))
        sizes = (config.visual_hidden, config.visual_heads, config.visual_intermediate, config.dropout)
        self.region_layers = nn.ModuleList()
        for _ in range(config.visual_layers):
            if config.dynamic_attention:
                self.region_layers.append(DynamicLayer(config.hidden, *sizes))
            else:
                self.region_layers.append(common.TransformerLayer(*sizes))
        self.connections = nn.ModuleList(CoAttentionLayer(config) for _ in config.connections)
        self.text_pooler = common.Pooler(config.hidden, config.shared, torch.relu)
        self.region_pooler = common.Pooler(config.visual_hidden, config.shared, torch.relu)
        self.dropout = common.Dropout(config.dropout)
        self.heads = nn.ModuleDict({name: HEADS[name](config) for name in config.heads})
        common.init_weights(self, config.hidden)
        common.init_box_projection(self.region_embedding.boxes)

    def embed_text(self, batch):
        """(B, T, C). 12-in-1 puts the task's vector, without position or type, behind [CLS]: (B, T+1, C)."""
        text_emb = self.text_embedding(batch.text, batch.segments)
        if self.config.task_tokens == 0:
            return text_emb
        task_emb = self.text_embedding.tasks(batch.task)  # (B,) -> (B, C)
        task_emb = self.text_embedding.dropout(self.text_embedding.norm(task_emb))
        return torch.cat([text_emb[:, :1], task_emb[:, None], text_emb[:, 1:]], 1)

    def embed_regions(self, batch):
        """(B, 1+N, C), the whole image first."""
        return self.region_embedding(batch.features, batch.boxes, batch.region_mask)

    def encode(self, batch, text=True, regions=True, record=False, given=None):
        """Encoding of words and regions together. text=False or regions=False: of the other modality alone, by its own
        layers, without the co-attention layers. pooled is (B, shared) in all cases. given: what `unimodal` returned for
        this batch, so that it is not computed again."""
        steps = self.schedule
        text_states = None
        region_states = None
        if given is not None:
            steps = self.schedule[self.steps_alone :]
            text_states, region_states = given
        else:
            if text:
                text_states = self.embed_text(batch)
            if regions:
                region_states = self.embed_regions(batch)
        text_states, region_states, states, maps = self.run_steps(batch, steps, text_states, region_states, record)
        pooled = self.fuse(text_states, region_states)
        if text and self.config.task_tokens > 0:
            text_states = torch.cat([text_states[:, :1], text_states[:, 2:]], 1)  # (B, T+1, C) -> (B, T, C)
        if regions:
            region_states = region_states[:, 1:]  # (B, 1+N, C) -> (B, N, C)
        return common.Encoding(text_states, region_states, pooled, states, maps)

    def run_steps(self, batch, steps, text, regions, record=False):
        """Both streams through some steps of the schedule: text (B, T, C), regions (B, 1+N, C). None for a stream that
        is left out: then the other runs through its own layers only. Returns both, and the recorded states and maps."""
        states = {}
        maps = {}
        if text is not None:
            text_mask = batch.text_mask  # (B, T)
            if self.config.task_tokens > 0:
                text_mask = F.pad(text_mask, (1, 0), value=True)  # (B, T+1)
            text_bias = common.attention_bias(text_mask, text.dtype)  # (B, 1, 1, T)
            if record:
                states["text.embedding"] = text
        if regions is not None:
            region_mask = F.pad(batch.region_mask, (1, 0), value=True)  # (B, 1+N)
            region_bias = common.attention_bias(region_mask, regions.dtype)  # (B, 1, 1, 1+N)
            if record:
                states["regions.embedding"] = regions
        for kind, i in steps:
            layer_maps = [] if record else None
            if kind == "text" and text is not None:
                text = self.text_layers[i](text, text_bias, layer_maps)
                if record:
                    states[f"text.{i}"] = text
                    maps[f"text.{i}"] = layer_maps[0]
            elif kind == "regions" and regions is not None:
                if self.config.dynamic_attention and text is not None:
                    text_mean = common.masked_mean(text, text_mask)[:, None]  # (B, T, C) -> (B, 1, C)
                    regions = self.region_layers[i](regions, region_bias, layer_maps, text_mean)
                else:
                    regions = self.region_layers[i](regions, region_bias, layer_maps)
                if record:
                    states[f"regions.{i}"] = regions
                    maps[f"regions.{i}"] = layer_maps[0]
            elif kind == "cross" and text is not None and regions is not None:
                text, regions = self.connections[i](text, regions, text_bias, region_bias, layer_maps)
                if record:
                    states[f"cross.{i}.text"] = text
                    states[f"cross.{i}.regions"] = regions
                    maps[f"cross.{i}.text_to_regions"] = layer_maps[0]
                    maps[f"cross.{i}.regions_to_text"] = layer_maps[1]
        return text, regions, states, maps

    def fuse(self, text, regions):
        """The pair's vector (section 2.2): product or sum of the pooled first positions, then dropout. Of one modality
        alone: its pooled first position. text (B, T, C), regions (B, 1+N, C), or None -> (B, shared)."""
        if regions is None:
            return self.dropout(self.text_pooler(text))
        if text is None:
            return self.dropout(self.region_pooler(regions))
        pooled_text = self.text_pooler(text)  # (B, T, C) -> (B, shared)
        pooled_regions = self.region_pooler(regions)  # (B, 1+N, C') -> (B, shared)
        if self.config.fusion == "sum":
            return self.dropout(pooled_text + pooled_regions)
        return self.dropout(pooled_text * pooled_regions)

    def unimodal(self, batch):
        """What each modality computes alone, for `encode(given=)`: its layers before the first co-attention; with
        dynamic attention the text's only, since the text steers every visual layer. (B, T, C), (B, 1+N, C)"""
        steps = self.schedule[: self.steps_alone]
        text = self.run_steps(batch, steps, self.embed_text(batch), None)[0]
        regions = self.run_steps(batch, steps, None, self.embed_regions(batch))[1]
        return text, regions

    def decode(self, batch, cache=None):
        """The text read from left to right, for captions (see `common.next_words`). Returns (B, T, C).

        Regions must not see words, or they would pass later words on to earlier ones: in a co-attention layer they
        have their feed-forward alone. So dynamic attention does not act here; nor do task tokens.
        """
        if cache is None:
            cache = {}
        region_mask = F.pad(batch.region_mask, (1, 0), value=True)  # (B, 1+N)
        region_bias = common.attention_bias(region_mask, batch.boxes.dtype)  # (B, 1, 1, 1+N)
        if not cache:
            regions = self.embed_regions(batch)
            cache["regions"] = []  # the regions that each co-attention layer reads
            for kind, i in self.schedule:
                if kind == "regions":
                    regions = self.region_layers[i](regions, region_bias)
                elif kind == "cross":
                    cache["regions"].append(regions)
                    regions = self.connections[i].region_feed_forward(regions)
        text, seen = common.next_words(self, batch, cache, batch.region_mask[:, :0])
        text_bias = common.attention_bias(seen, text.dtype)  # (B, 1, T, words so far)
        for kind, i in self.schedule:
            if kind == "text":
                text = self.text_layers[i](text, text_bias, cache=cache)
            elif kind == "cross":
                text = self.connections[i].text_reads(text, cache["regions"][i], region_bias, cache=cache)
                text = self.connections[i].text_feed_forward(text)
        return text

    def word_logits(self, states):
        """Logits over the vocabulary by the masked-word head: hidden states (..., C) -> (..., V)."""
        return self.heads["mlm"](states, self.text_embedding.words.weight)

    def forward(self, batch, objectives):
        encoding = None
        if not all(OBJECTIVES[name].encodes for name in objectives):
            encoding = self.encode(batch)
        return {name: OBJECTIVES[name].loss(self, encoding, batch) for name in objectives}


# ---- pretraining objectives: (model, encoding, batch) -> (loss, logits) ----------------------------------------

PRETRAINING = {
    "objectives": {"mlm": 1, "mrc_kl": 1, "itm": 1},
    "conditional": False,  # words and regions are masked in the same step, independently of each other
    "mask_false_pairs": False,  # nothing is predicted in mismatched pairs (12-in-1); ViLBERT's own code predicts there
    "joined": {},
    "rate": 2.0,  # learning rate relative to fine-tuning: 1e-4 at base size
    "weights": {},  # factors of the losses; 1 where none is named
    # of the masked regions: feature zeroed, the rest keeps it; force_one False: maybe none in a picture
    "region_masking": {"zero": 0.9, "random": 0.0, "force_one": False},
    "false_pairs": 0.5,  # share of mismatched pairs
    "mismatch": "text",  # a mismatched pair keeps its picture and gets another sentence
}


def masked_language_modelling(model, encoding, batch):
    """Masked language modelling (section 2.2, masked multi-modal modelling): -log P(w_m | other words, regions), mean
    over masked words.

    batch.word_index (M,) flat positions of the masked words in B*T, word_labels (M,) their ids. Logits (M, V).
    """
    states = common.gather_positions(encoding.text, batch.word_index)  # (B, T, C) -> (M, C)
    logits = common.at_least_float32(model.word_logits(states))
    return common.cross_entropy(logits, batch.word_labels), logits


def masked_region_class_kl(model, encoding, batch):
    """Masked regions (section 2.2): KL(c || g) = sum_k c_k (log c_k - log g_k), c the detector's distribution over
    classes, g the predicted one; summed over classes, mean over masked regions.

    batch.region_index (M,) flat positions of the masked regions in B*N, object_probs (B, N, K). Logits (M, K).
    """
    states = common.gather_positions(encoding.regions, batch.region_index)  # (B, N, C) -> (M, C)
    logits = common.at_least_float32(model.heads["mrc"](states))  # (M, C) -> (M, K)
    target = common.gather_positions(batch.object_probs, batch.region_index).to(logits.dtype)  # (M, K)
    return F.kl_div(logits.log_softmax(-1), target, reduction="sum") / max(1, len(target)), logits


def masked_region_class(model, encoding, batch):
    """Hard labels in their place (UNITER 3.2; no objective of ViLBERT's paper): cross-entropy with the detector's most
    likely class, background left out, mean over masked regions.

    batch.region_index (M,), object_probs (B, N, K), class 0 = background. Logits (M, K).
    """
    states = common.gather_positions(encoding.regions, batch.region_index)  # (B, N, C) -> (M, C)
    logits = common.at_least_float32(model.heads["mrc"](states))  # (M, C) -> (M, K)
    return common.cross_entropy(logits, common.most_likely_class(batch, logits)), logits


def masked_region_features(model, encoding, batch):
    """Masked region feature regression (an option of the code): ||h(v_m) - f_m||^2, mean over masked regions and F.

    batch.region_index (M,), clean_features (B, N, F) the features before masking. Logits: the predictions (M, F).
    """
    states = common.gather_positions(encoding.regions, batch.region_index)  # (B, N, C) -> (M, C)
    predicted = common.at_least_float32(model.heads["mrfr"](states))  # (M, C) -> (M, F)
    target = common.gather_positions(batch.clean_features, batch.region_index).to(predicted.dtype)  # (M, F)
    return F.mse_loss(predicted, target, reduction="sum") / max(1, target.numel()), predicted


def sample_negatives(batch, near, far):
    """Negatives for each masked region, drawn with replacement from the real regions: `far` from other pictures, then
    `near` from its own picture, itself left out. Where there are none of one kind, the other kind takes their place.

    Returns flat positions in B*N: (M, far + near). ValueError if the batch has no second region.
    """
    regions = batch.region_mask.shape[1]
    real = batch.region_mask.flatten()  # (B*N,) bool, True = a region
    picture_of_region = torch.arange(len(real), device=real.device) // regions  # (B*N,)
    picture_of_masked = batch.region_index // regions  # (M,)
    same_picture = picture_of_masked[:, None] == picture_of_region  # (M, B*N)
    far_pool = real & ~same_picture  # (M, B*N) bool, True = may be drawn
    near_pool = (real & same_picture).scatter(1, batch.region_index[:, None], False)
    # On a GPU this check would wait for the result; there torch.multinomial fails instead.
    if real.is_cpu and not (near_pool | far_pool).any(1).all():
        raise ValueError("the NCE objective needs a second region in the batch")
    far_pool = torch.where(far_pool.any(1, keepdim=True), far_pool, near_pool)
    near_pool = torch.where(near_pool.any(1, keepdim=True), near_pool, far_pool)
    far_index = torch.multinomial(far_pool.float(), far, replacement=True)  # (M, B*N) -> (M, far)
    near_index = torch.multinomial(near_pool.float(), near, replacement=True)  # (M, B*N) -> (M, near)
    return torch.cat([far_index, near_index], 1)


def noise_contrastive_regions(model, encoding, batch, negatives=None):
    """NCE on masked regions (12-in-1's code): which of 1 + n features is the masked one's own?

        L = -log exp(h(v_m) f_m) / sum_{j in {m} and negatives} exp(h(v_m) f_j), mean over masked regions

    negatives (M, n): flat positions in B*N; None draws 89 from other pictures and 38 from the same (70% and 30% of 128,
    rounded down). Head and clean features as in regression. Logits (M, 1 + n), the positive first.
    """
    index = batch.region_index  # (M,)
    states = common.gather_positions(encoding.regions, index)  # (B, N, C) -> (M, C)
    predicted = common.at_least_float32(model.heads["mrfr"](states))  # (M, C) -> (M, F)
    if len(index) == 0:
        return predicted.sum() * 0.0, predicted[:, :1]
    if negatives is None:
        negatives = sample_negatives(batch, near=38, far=89)
    features = batch.clean_features.flatten(0, 1).to(predicted.dtype)  # (B, N, F) -> (B*N, F)
    with common.full_precision(predicted.device):
        products = predicted @ features.T  # (M, F) @ (F, B*N) -> (M, B*N)
    logits = products.gather(1, torch.cat([index[:, None], negatives], 1))  # (M, 1 + n)
    return common.cross_entropy(logits, torch.zeros_like(index)), logits


def multimodal_alignment(model, encoding, batch):
    """Multi-modal alignment prediction (section 2.2): cross-entropy of "does the text describe the picture?".
    batch.matched (B,) int64, 1 = it does. Logits (B, 2), class 1 = match."""
    logits = model.heads["itm"](encoding.pooled)  # (B, C) -> (B, 2)
    return common.cross_entropy(logits, batch.matched), logits


# ---- task heads: (model, encoding, batch) -> (loss, logits); VQA's loss is `common.question_answering` ------------


class WeightNormLinear(nn.Module):
    """Linear with its matrix written as g V / ||V||, one gain g for the whole matrix. x (B, C) -> (B, out)."""

    def __init__(self, width, out):
        super().__init__()
        linear = nn.Linear(width, out)  # torch's own initialisation, which BERT's does not reach in the official code
        self.weight_v = linear.weight
        self.weight_g = nn.Parameter(linear.weight.detach().norm())
        self.bias = nn.Parameter(torch.zeros(out))

    def forward(self, x):
        return F.linear(x, self.weight_v * (self.weight_g / self.weight_v.norm()), self.bias)


def answer_head(config, answers):
    """The paper's: weight-normed linear, ReLU, dropout 0.5, weight-normed linear; 12-in-1's: linear, GELU, layer norm,
    linear. (B, shared) -> (B, answers)."""
    inner = 2 * config.shared
    if config.twelve_in_one:
        return common.mlp_head(config.shared, inner, answers)
    layers = WeightNormLinear(config.shared, inner), nn.ReLU(), common.Dropout(0.5), WeightNormLinear(inner, answers)
    head = nn.Sequential()
    head.add_module("main", nn.Sequential(*layers))  # its name in released checkpoints
    return head


def visual_entailment(model, encoding, batch):
    """SNLI-VE (12-in-1): binary cross-entropy over the three answers, mean over them. batch.answers (B, 3). Logits
    (B, 3)."""
    logits = common.at_least_float32(model.heads["ve"](encoding.pooled))  # (B, C) -> (B, 3)
    return F.binary_cross_entropy_with_logits(logits, batch.answers), logits


def natural_language_for_visual_reasoning(model, encoding, batch):
    """NLVR2 (12-in-1): is the statement true of the two pictures? batch.target (B,) int64, 1 = true. Logits (B, 2).

    The batch has 2B rows, the statement with each picture in turn; binary cross-entropy, mean over both logits.
    """
    pooled = encoding.pooled.reshape(len(batch.target), -1)  # (2B, C) -> (B, 2C)
    logits = common.at_least_float32(model.heads["nlvr2"](pooled))  # (B, 2C) -> (B, 2)
    target = F.one_hot(batch.target, 2).to(logits.dtype)  # (B,) -> (B, 2)
    return F.binary_cross_entropy_with_logits(logits, target), logits


def choice_among_rows(model, head, encoding, labels):
    """Cross-entropy over the rows of each example; labels (examples,), the number of the right row. Logits (rows,)."""
    logits = model.heads[head](encoding.pooled).squeeze(-1)  # (rows, 1) -> (rows,)
    return common.cross_entropy(logits.view(len(labels), -1), labels), logits


def visual_commonsense_reasoning(model, encoding, batch):
    """VCR: one row a choice, batch.target (rows,) 1 = the right one. Text types: 0 question, 1 choice."""
    labels = batch.target.view(len(batch.ids), -1).argmax(1)  # (rows,) -> (questions, choices) -> (questions,)
    return choice_among_rows(model, "vcr", encoding, labels)


def retrieval_rank(model, encoding, batch):
    """Retrieval (section 3.2): the first row of each example is the true pair, the others are mismatched (NEGATIVES)."""
    labels = torch.zeros(len(batch.ids), dtype=torch.long, device=encoding.pooled.device)
    return choice_among_rows(model, "rank", encoding, labels)


def refer_logits(model, encoding, batch):
    """A logit for every region, padding at -10000. (B, N)"""
    logits = model.heads["refer"](model.dropout(encoding.regions))  # (B, N, C) -> (B, N, 1)
    logits = logits.squeeze(-1)  # (B, N)
    return logits + (1.0 - batch.region_mask.to(logits.dtype)) * -10000.0


def referring_expression(model, encoding, batch):
    """Referring expressions (section 3.2): binary cross-entropy of every region against its overlap (IoU) with the
    target, 0 where that is below one half; summed over regions, mean over the batch. Logits (B, N).

    batch.target (B, N) float, the overlaps.
    """
    logits = refer_logits(model, encoding, batch)
    target = batch.target.masked_fill(batch.target < 0.5, 0.0).to(logits.dtype)  # (B, N)
    return common.soft_answer_loss(logits, target), logits


# ---- tables ----------------------------------------------------------------------------------------------------

HEADS = {
    "mlm": lambda c: common.MaskedLMHead(c.hidden, c.vocab_size),
    "mrfr": lambda c: common.mlp_head(c.visual_hidden, c.visual_hidden, c.feature_size),
    "mrc": lambda c: common.mlp_head(c.visual_hidden, c.visual_hidden, c.classes),
    "itm": lambda c: common.Float32Linear(c.shared, 2),
    "itc": lambda c: common.ContrastHead(c.hidden, c.visual_hidden, c.hidden, c.contrast),
    "hidden": lambda c: common.teacher_projections(c.hidden, c.visual_hidden, c.teacher_widths),
    "vqa": lambda c: answer_head(c, c.answers),
    "ve": lambda c: nn.Linear(c.shared, 3),
    "nlvr2": lambda c: common.mlp_head(2 * c.shared, 2 * c.shared, 2),
    "vcr": lambda c: common.Float32Linear(c.shared, 1),
    "rank": lambda c: common.Float32Linear(c.shared, 1),
    "refer": lambda c: common.Float32Linear(c.visual_hidden, 1),
    # No task uses these two; released checkpoints have them: GQA's answers, and a logit per word.
    "gqa": lambda c: answer_head(c, c.gqa_answers),
    "word": lambda c: nn.Linear(c.hidden, 1),
}

MASKED_WORDS = common.Objective(
    masked_language_modelling,
    head="mlm",
    pretraining=True,
    masks="words",
    mean_over="words",
    labels=lambda batch, _: batch.word_labels,
)

REGION_CLASSES = common.Objective(
    masked_region_class_kl,
    head="mrc",
    pretraining=True,
    masks="regions",
    mean_over="regions",
    fields=("object_probs",),
    labels=common.most_likely_class,
)

REGION_FEATURES = common.Objective(
    masked_region_features, head="mrfr", pretraining=True, masks="regions", mean_over="regions", logits="numbers"
)

MATCHING = common.Objective(
    multimodal_alignment, head="itm", pretraining=True, mismatch=True, labels=lambda batch, logits: batch.matched
)

# What no paper has (itc, caption) and VQA come from SHARED_OBJECTIVES.
OBJECTIVES = common.SHARED_OBJECTIVES | {
    "mlm": MASKED_WORDS,
    "mrc_kl": REGION_CLASSES,
    "mrc": replace(REGION_CLASSES, loss=masked_region_class),
    "mrfr": REGION_FEATURES,
    "nce": replace(REGION_FEATURES, loss=noise_contrastive_regions, logits="nothing"),
    "itm": MATCHING,
    "ve": common.Objective(visual_entailment, head="ve"),
    "nlvr2": common.Objective(natural_language_for_visual_reasoning, head="nlvr2"),
    "vcr": common.Objective(visual_commonsense_reasoning, head="vcr"),
    "rank": common.Objective(retrieval_rank, head="rank"),
    "refer": common.Objective(referring_expression, head="refer"),
}

CHOICES = {
    "contrast": ("infonce", "hinge", "sigmoid", "dcl"),
    "fusion": ("mul", "sum"),
}  # fields of Config that are words
VCR_TYPES = ((0, 1), (0, 0, 1))  # text types: a question and its answer; a question, its answer and the reason
NEGATIVES = ("text", "image", "text")  # mismatched partners of a true pair in retrieval, in the order of the rows
MODEL = ViLBERT


def text_types(tasks):
    """The table of text types: for each row, the row of pretraining's table that it starts as. All tasks have two."""
    return (0, 1)
