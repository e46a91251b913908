"""ViLBERT: task-agnostic visiolinguistic representations (Lu et al., NeurIPS 2019, arXiv 1908.02265).

12-in-1 (Lu et al., CVPR 2020) is the same model trained on twelve tasks: support/twelve_in_one.py has what it adds.

What the model does, in five lines:
1. Each word becomes a vector (word + position + type), each region too (feature + box), in two widths of their own.
2. Two BERTs, one per modality, are joined by co-attention layers: words attend to regions, regions to words.
3. Pretraining masks words AND regions of the same pair and adds up all objectives in every step.
4. A first region stands for the whole image, as [CLS] does for the text. The pair's vector is the product of the two.
5. A small head on that vector, or on each region, solves a downstream task; captioning reads the words' states.

Known deviations from the official code:
- The whole-image region is made here and left out of what `encode` returns. Batches are the same for all models.
- Class 1 of the matching head means "match", officially class 0. The head's two rows are swapped when official weights
  are read or written.
- At least one word of every caption is masked, as in UNITER.
- Pretraining skips the masked-prediction losses on mismatched pairs, as 12-in-1 does. ViLBERT's code does not.
- Mismatched sentences come from the batch, officially from the whole data set.
- Task i of --task has task token i. Officially VQA has 1, VCR 5, NLVR2 12: official tokens have to be trained again.
- The whole image is no candidate of a referring expression and has no term in that loss; officially it has both.
- Initial weights are larger for boxes and in narrow models. AdamW has a bias correction, official BertAdam has none.
docs/details.md lists the errors of the official code.
Letters: B batch, T text positions, N regions, C width of the text, C' of the regions, H heads, F region-feature width,
V vocabulary, K classes, M masked positions, A answers.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

import common
from support import contrast, twelve_in_one

# ---- configuration ---------------------------------------------------------------------------------------------


@dataclass
class Config:
    """Sizes of a ViLBERT. The defaults are the paper's (BERT-base and six visual layers); PRESETS gives the others."""

    vocab_size: int = 30522  # BERT's uncased word pieces
    hidden: int = 768  # C
    layers: int = 12
    attention_heads: int = 12
    intermediate: int = 3072
    visual_hidden: int = 1024  # C'
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
    answers: int = 3129  # A, length of the answer list
    gqa_answers: int = 1533  # rows of the GQA head in released checkpoints of 12-in-1
    dropout: float = 0.1  # in the trunk, on the pooled vector, and on the regions that the head "refer" reads
    heads: tuple = ("mlm", "mrc", "itm")  # which of HEADS this model has
    contrast: str = "infonce"  # loss of the objective itc; or "hinge", "sigmoid", "dcl"
    text_vector: str = "cls"  # the text's vector in itc: the state of [CLS]; or "mean", over all words
    teacher_widths: tuple = ()  # the teacher's (text, region) widths, to which the head "hidden" projects
    twelve_in_one: bool = False  # the answer heads of 12-in-1 in place of the paper's
    task_tokens: int = 0  # 12-in-1: rows of the table of task tokens; row batch.task is inserted after [CLS]
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
    """norm(W_f f + W_b b), then dropout (section 2.2), with b = [x1, y1, x2, y2, area].

    The whole image comes first, as a region of its own. Its feature is the mean of the region features, zeroed ones
    included. Its box is (0, 0, 1, 1).
    features f (B, N, F); boxes (B, N, 4) as x1,y1,x2,y2 in 0..1; mask (B, N) bool, True = a region, not padding.
    Returns (B, 1+N, C').
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
        whole = boxes.new_tensor([0, 0, 1, 1])
        boxes = torch.cat([whole.expand(boxes.shape[0], 1, 4), boxes], 1)  # (B, 1+N, 4)
        area = (boxes[..., 2:] - boxes[..., :2]).prod(-1, keepdim=True)  # (B, 1+N, 1)
        feature_emb = self.features(features)  # (B, 1+N, F) -> (B, 1+N, C')
        box_emb = self.boxes(torch.cat([boxes, area], -1))  # (B, 1+N, 5) -> (B, 1+N, C')
        return self.dropout(self.norm(feature_emb + box_emb))


# ---- model -----------------------------------------------------------------------------------------------------


class CoAttentionLayer(nn.Module):
    """Co-attention (section 2.2, figure 2b): queries come from one stream, keys and values from the other.

    Both directions read the same inputs. A feed-forward block for each stream follows. Residuals and norms as in BERT.
    text (B, T, C), regions (B, 1+N, C'); their biases (B, 1, 1, T) and (B, 1, 1, 1+N) hide padded keys.
    maps: a list, to which the maps text-to-regions (B, H, T, 1+N) and regions-to-text (B, H, 1+N, T) are appended.
    """

    def __init__(self, config):
        super().__init__()
        text = config.hidden
        visual = config.visual_hidden
        sizes = {"heads": config.shared_heads, "dropout": config.dropout, "attention_width": config.shared}
        self.text_reads = common.AttentionBlock(text, context_width=visual, **sizes)
        self.regions_read = common.AttentionBlock(visual, context_width=text, **sizes)
        self.text_feed_forward = common.FeedForward(text, config.intermediate, config.dropout)
        self.region_feed_forward = common.FeedForward(visual, config.visual_intermediate, config.dropout)
        # Official q_dense1 and q_dense2. No output depends on them, but every released checkpoint has them.
        self.unused1 = nn.Linear(config.shared, visual).requires_grad_(False)
        self.unused2 = nn.Linear(config.shared, text).requires_grad_(False)

    def forward(self, text, regions, text_bias, region_bias, maps=None):
        new_text = self.text_reads(text, regions, region_bias, maps)
        new_regions = self.regions_read(regions, text, text_bias, maps)
        return self.text_feed_forward(new_text), self.region_feed_forward(new_regions)


def layer_order(config):
    """The order in which layers run: a list of ("text", i), ("regions", i) and ("cross", k).

    connections[k] = (i, j): co-attention k runs before visual layer i and text layer j, after all lower ones. After the
    last co-attention the remaining visual layers run, then the remaining text layers.
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
    `record=True` it also returns, in the order of execution:
    states "text.embedding", "regions.embedding", "text.i", "regions.i", "cross.k.text", "cross.k.regions";
    maps "text.i", "regions.i", "cross.k.text_to_regions", "cross.k.regions_to_text".
    Recorded regions include the whole image (1+N positions), recorded text the task token, if there is one (T+1).
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.order = layer_order(config)
        self.steps_alone = 0  # how many steps come before the first one that needs both modalities
        for kind, _ in self.order:
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
                self.region_layers.append(twelve_in_one.DynamicLayer(config.hidden, *sizes))
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
        """(B, T, C). 12-in-1 inserts a task token, which has no position or type, after [CLS]: (B, T+1, C)."""
        text_emb = self.text_embedding(batch.text, batch.segments)
        if self.config.task_tokens == 0:
            return text_emb
        task_emb = self.text_embedding.tasks(batch.task)  # (B,) -> (B, C)
        task_emb = self.text_embedding.dropout(self.text_embedding.norm(task_emb))
        return torch.cat([text_emb[:, :1], task_emb[:, None], text_emb[:, 1:]], 1)

    def embed_regions(self, batch):
        """(B, 1+N, C'), the whole image first."""
        return self.region_embedding(batch.features, batch.boxes, batch.region_mask)

    def encode(self, batch, text=True, regions=True, record=False, given=None):
        """Encodes words and regions together. text=False: regions alone. regions=False: words alone.

        pooled is (B, shared) in all cases. given: what `unimodal` returned, from which the remaining layers go on.
        """
        if given is None:
            steps = self.order
            text_states = self.embed_text(batch) if text else None
            region_states = self.embed_regions(batch) if regions else None
        else:
            steps = self.order[self.steps_alone :]
            text_states, region_states = given
        text_states, region_states, states, maps = self.run_steps(batch, steps, text_states, region_states, record)
        pooled = self.fuse(text_states, region_states)
        if text and self.config.task_tokens > 0:
            text_states = torch.cat([text_states[:, :1], text_states[:, 2:]], 1)  # (B, T+1, C) -> (B, T, C)
        if regions:
            region_states = region_states[:, 1:]  # (B, 1+N, C') -> (B, N, C')
        return common.Encoding(text_states, region_states, pooled, states, maps)

    def run_steps(self, batch, steps, text, regions, record=False):
        """Runs some steps of the order on text (B, T, C) and regions (B, 1+N, C'). If one is None, co-attention and
        the layers of that modality are skipped. Returns text, regions, and the recorded states and maps."""
        states = {}
        maps = {}
        if text is not None:
            text_mask = batch.text_mask  # (B, T)
            if self.config.task_tokens > 0:
                text_mask = F.pad(text_mask, (1, 0), value=True)  # (B, T+1)
            text_bias = common.attention_bias(text_mask, text.dtype)  # (B, 1, 1, T or T+1)
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
                    text_mean = common.masked_mean(text, text_mask)[:, None]  # (B, T or T+1, C) -> (B, 1, C)
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
        """The pair's vector (section 2.2): product or sum of the pooled first positions, then dropout. With a single
        modality its pooled first position. text (B, T, C), regions (B, 1+N, C') -> (B, shared)."""
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
        """What each modality computes alone, for `encode(given=)`: states before the first co-attention, (B, T, C) and
        (B, 1+N, C'). With dynamic attention every visual layer reads the text, so none is computed."""
        steps = self.order[: self.steps_alone]
        text, _, _, _ = self.run_steps(batch, steps, self.embed_text(batch), None)
        _, regions, _, _ = self.run_steps(batch, steps, None, self.embed_regions(batch))
        return text, regions

    def decode(self, batch, cache=None):
        """The text read from left to right, for captions (see `common.decoder_inputs`). Returns (B, T, C).

        Regions must not attend to words, or earlier words would see later ones through them. So the regions' half of a
        co-attention layer is its feed-forward alone. Dynamic attention and task tokens are not used here.
        """
        if cache is None:
            cache = {}
        region_mask = F.pad(batch.region_mask, (1, 0), value=True)  # (B, 1+N)
        region_bias = common.attention_bias(region_mask, batch.boxes.dtype)  # (B, 1, 1, 1+N)
        if not cache:
            regions = self.embed_regions(batch)
            cache["regions"] = []  # the regions that each co-attention layer reads
            for kind, i in self.order:
                if kind == "regions":
                    regions = self.region_layers[i](regions, region_bias)
                elif kind == "cross":
                    cache["regions"].append(regions)
                    regions = self.connections[i].region_feed_forward(regions)
        text, visible = common.decoder_inputs(self, batch, cache, batch.region_mask[:, :0])
        text_bias = common.attention_bias(visible, text.dtype)  # (B, 1, T, words so far)
        for kind, i in self.order:
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
        """The losses of these objectives: {name: (loss, logits)}."""
        encoding = None
        if not all(OBJECTIVES[name].encodes_itself for name in objectives):
            encoding = self.encode(batch)
        return {name: OBJECTIVES[name].loss(self, encoding, batch) for name in objectives}


# ---- pretraining objectives: (model, encoding, batch) -> (loss, logits) ----------------------------------------

PRETRAINING = {
    "objectives": {"mlm": 1, "mrc_kl": 1, "itm": 1},
    "conditional": False,  # words and regions are masked in the same step, independently of each other
    "predict_mismatched": False,  # as in 12-in-1; ViLBERT's code predicts words and regions of mismatched pairs too
    "joined": {},
    "rate": 2.0,  # learning rate relative to fine-tuning: 1e-4 at base size
    "loss_weights": {},  # factors of the losses; 1 where none is named
    # share of the masked regions whose feature becomes zero; the others keep it. A picture may have no masked region
    "region_masking": {"zero": 0.9, "random": 0.0, "force_one": False},
    "mismatched_share": 0.5,  # share of mismatched pairs
    "mismatch": "text",  # a mismatched pair keeps its picture and gets another sentence
}


def masked_language_modelling(model, encoding, batch):
    """Masked language modelling (section 2.2, "masked multi-modal modelling"):

        L = -log P(w_m | w_\\m, v),  mean over masked words

    batch.word_index (M,): flat positions of the masked words; word_labels (M,): what they were. Logits (M, V).
    """
    logits = model.word_logits(common.gather_positions(encoding.text, batch.word_index))  # (M, C) -> (M, V)
    return common.cross_entropy(logits, batch.word_labels), logits


def masked_region_class_kl(model, encoding, batch):
    """Masked region classification with soft labels (section 2.2, "masked multi-modal modelling"):

        L = KL(c || g(v_m)) = sum_k c_k (log c_k - log g_k),  mean over masked regions

    g: the head's softmax; c: the detector's distribution batch.object_probs (B, N, K). batch.region_index (M,): flat
    positions of the masked regions. Logits (M, K).
    """
    logits = model.heads["mrc"](common.gather_positions(encoding.regions, batch.region_index))  # (M, C') -> (M, K)
    targets = common.gather_positions(batch.object_probs, batch.region_index)  # (M, K)
    return common.kl_divergence(logits, targets) / max(1, len(targets)), logits


def masked_region_class(model, encoding, batch):
    """The same with hard labels (UNITER 3.2; not in ViLBERT's paper): L = CE(c, g(v_m)),  mean over masked regions

    c: the detector's most likely class, never background. batch.region_index (M,); object_probs (B, N, K), class 0 =
    background. Logits (M, K).
    """
    logits = model.heads["mrc"](common.gather_positions(encoding.regions, batch.region_index))  # (M, C') -> (M, K)
    return common.cross_entropy(logits, common.most_likely_class(batch, logits)), logits


def masked_region_features(model, encoding, batch):
    """Masked region feature regression (an option of the official code): L = || h(v_m) - f_m ||^2,  mean over M and F

    batch.region_index (M,); clean_features (B, N, F): the features f before masking. Logits: the predictions (M, F).
    """
    states = common.gather_positions(encoding.regions, batch.region_index)  # (B, N, C') -> (M, C')
    predictions = model.heads["mrfr"](states)  # (M, C') -> (M, F)
    targets = common.gather_positions(batch.clean_features, batch.region_index)  # (M, F)
    return common.squared_error(predictions, targets), predictions


def multimodal_alignment(model, encoding, batch):
    """Multi-modal alignment prediction (section 2.2): cross-entropy of "does the text describe the picture?".
    batch.matched (B,) int64, 1 = it does. Logits (B, 2), class 1 = match."""
    logits = model.heads["itm"](encoding.pooled)  # (B, C) -> (B, 2)
    return common.cross_entropy(logits, batch.matched), logits


# ---- task heads: (model, encoding, batch) -> (loss, logits); VQA's loss is `common.question_answering` -----------


class WeightNormLinear(nn.Module):
    """Linear with its matrix written as g V / ||V||, one gain g for the whole matrix. x (B, C) -> (B, out)."""

    def __init__(self, width, out):
        super().__init__()
        linear = nn.Linear(width, out)  # as officially, these weights keep torch's initialisation, not BERT's
        self.weight_v = linear.weight
        self.weight_g = nn.Parameter(linear.weight.detach().norm())
        self.bias = nn.Parameter(torch.zeros(out))

    def forward(self, x):
        with common.full_precision(x.device):  # see common.Float32Linear
            return F.linear(x.to(self.bias.dtype), self.weight_v * (self.weight_g / self.weight_v.norm()), self.bias)


def answer_head(config, answers):
    """The paper's: weight-normed linear, ReLU, dropout 0.5, weight-normed linear; 12-in-1's: linear, GELU, layer norm,
    linear. (B, shared) -> (B, answers)."""
    inner = 2 * config.shared
    if config.twelve_in_one:
        return common.mlp_head(config.shared, inner, answers)
    first = WeightNormLinear(config.shared, inner)
    last = WeightNormLinear(inner, answers)
    head = nn.Sequential()
    # "main" is its name in released checkpoints
    head.add_module("main", nn.Sequential(first, nn.ReLU(), common.Dropout(0.5), last))
    return head


def choice_among_rows(model, head, encoding, labels):
    """Cross-entropy over the rows of each example. labels (examples,): the index of the right row. Logits (rows,)."""
    logits = model.heads[head](encoding.pooled).squeeze(-1)  # (rows, 1) -> (rows,)
    return common.cross_entropy(logits.view(len(labels), -1), labels), logits


def visual_commonsense_reasoning(model, encoding, batch):
    """VCR: cross-entropy over the choices of a question, one row a choice. batch.target (rows,), 1 = the right one."""
    labels = batch.target.view(len(batch.ids), -1).argmax(1)  # (rows,) -> (questions, choices) -> (questions,)
    return choice_among_rows(model, "vcr", encoding, labels)


def retrieval_rank(model, encoding, batch):
    """Retrieval (section 3.2): cross-entropy over a true pair, the first row, and its mismatched pairs (NEGATIVES)."""
    labels = torch.zeros(len(batch.ids), dtype=torch.long, device=encoding.pooled.device)
    return choice_among_rows(model, "rank", encoding, labels)


def refer_logits(model, encoding, batch):
    """Logits of the regions (B, N). -10000 is added to those of padding."""
    logits = model.heads["refer"](model.dropout(encoding.regions))  # (B, N, C') -> (B, N, 1)
    logits = logits.squeeze(-1)  # (B, N)
    return logits + (1.0 - batch.region_mask.to(logits.dtype)) * -10000.0


def referring_expression(model, encoding, batch):
    """Referring expressions (section 3.2): binary cross-entropy, summed over the regions, mean over the batch.

    batch.target (B, N) float: each region's IoU with the true box, -1 at padding. An IoU of at least 0.5 is the soft
    label itself; any lower one becomes 0, and so do all with --ablate image, which hides the regions. Logits (B, N).
    """
    logits = refer_logits(model, encoding, batch)
    negative = (batch.target < 0.5) | ~batch.region_mask
    target = batch.target.masked_fill(negative, 0.0).to(logits.dtype)  # (B, N)
    return common.soft_answer_loss(logits, target), logits


# ---- tables ----------------------------------------------------------------------------------------------------

HEADS = {
    "mlm": lambda c: common.MaskedLMHead(c.hidden, c.vocab_size),
    "mrfr": lambda c: common.mlp_head(c.visual_hidden, c.visual_hidden, c.feature_size),
    "mrc": lambda c: common.mlp_head(c.visual_hidden, c.visual_hidden, c.classes),
    "itm": lambda c: common.Float32Linear(c.shared, 2),
    "itc": lambda c: contrast.ContrastHead(c.hidden, c.visual_hidden, c.hidden, c.contrast, c.text_vector),
    "hidden": lambda c: common.teacher_projections(c.hidden, c.visual_hidden, c.teacher_widths),
    "vqa": lambda c: answer_head(c, c.answers),
    "ve": lambda c: common.Float32Linear(c.shared, 3),
    "nlvr2": lambda c: common.mlp_head(2 * c.shared, 2 * c.shared, 2),
    "vcr": lambda c: common.Float32Linear(c.shared, 1),
    "rank": lambda c: common.Float32Linear(c.shared, 1),
    "refer": lambda c: common.Float32Linear(c.visual_hidden, 1),
    # No task uses these two heads, but released checkpoints have them: GQA's answers, and a logit for each word.
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
    masked_region_features, head="mrfr", pretraining=True, masks="regions", mean_over="regions", learn_as="numbers"
)

MATCHING = common.Objective(
    multimodal_alignment, head="itm", pretraining=True, mismatched=True, labels=lambda batch, logits: batch.matched
)

# VQA and captioning come from SHARED_OBJECTIVES.
OBJECTIVES = common.SHARED_OBJECTIVES | {
    "itc": contrast.CONTRAST,
    "mlm": MASKED_WORDS,
    "mrc_kl": REGION_CLASSES,
    "mrc": replace(REGION_CLASSES, loss=masked_region_class),
    "mrfr": REGION_FEATURES,
    "nce": replace(REGION_FEATURES, loss=twelve_in_one.noise_contrastive_regions, learn_as="nothing"),
    "itm": MATCHING,
    "ve": common.Objective(twelve_in_one.visual_entailment, head="ve"),
    "nlvr2": common.Objective(twelve_in_one.natural_language_for_visual_reasoning, head="nlvr2"),
    "vcr": common.Objective(visual_commonsense_reasoning, head="vcr"),
    "rank": common.Objective(retrieval_rank, head="rank"),
    "refer": common.Objective(referring_expression, head="refer"),
}

CHOICES = {**contrast.CHOICES, "fusion": ("mul", "sum")}  # allowed values of Config's string fields
VCR_TYPES = ((0, 1), (0, 0, 1))  # text types: a question and its answer; a question, its answer and the reason
NEGATIVES = ("text", "image", "text")  # what each mismatched row of retrieval replaces in the true pair
MODEL = ViLBERT


def text_types(tasks):
    """The table of text types: for each row, the row of pretraining's table that initialises it. All tasks have two."""
    return (0, 1)
