"""twelve_in_one.py: what 12-in-1 (Lu et al., CVPR 2020, arXiv 1912.02315) adds to ViLBERT.

vilbert.py uses it: visual layers with dynamic attention, an objective on masked regions, and the losses of two tasks
that ViLBERT's paper lacks. Task tokens are in vilbert.py, in `embed_text`.
Letters: B batch, T text positions, N regions, C width of the text, C' of the regions, F region-feature width, M masked
positions.
"""

import torch
import torch.nn.functional as F
from torch import nn

import common


class DynamicLayer(common.TransformerLayer):
    """A visual layer whose queries and keys are multiplied by 1 + sigmoid(W t + b) (an option of 12-in-1's code).

    x (B, 1+N, C'). text: t (B, 1, C), the mean of the text's hidden states; None makes it a plain layer.
    """

    def __init__(self, text_width, width, heads, inner, dropout=0.0):
        super().__init__(width, heads, inner, dropout)
        self.gate_query = nn.Linear(text_width, width)
        self.gate_key = nn.Linear(text_width, width)

    def forward(self, x, bias=None, maps=None, text=None):
        if text is None:
            return super().forward(x, bias, maps)
        block = self.attention
        query = block.query(x) * (1.0 + self.gate_query(text).sigmoid())  # (B, 1+N, C') * (B, 1, C')
        key = block.key(x) * (1.0 + self.gate_key(text).sigmoid())  # (B, 1+N, C') * (B, 1, C')
        context = block.attend_heads(query, key, block.value(x), bias, maps)  # (B, 1+N, C')
        return self.feed_forward(block.norm(x + block.hidden_dropout(context)))


def sample_negative_regions(batch, near, far):
    """Negatives for each masked region, drawn with replacement: `far` regions of other pictures, then `near` other
    regions of its own row. If one kind does not exist, the other kind takes its place.

    Returns flat positions in B*N: (M, far + near). UserError if the batch has no second region. The official code may
    draw padding too, and regions of the same picture in another row, among them the masked region itself.
    """
    regions = batch.region_mask.shape[1]
    real = batch.region_mask.flatten()  # (B*N,) bool, True = a region
    row_of_region = torch.arange(len(real), device=real.device) // regions  # (B*N,)
    row_of_masked = batch.region_index // regions  # (M,)
    picture_of_region = batch.pictures[row_of_region]  # (B*N,)
    picture_of_masked = batch.pictures[row_of_masked]  # (M,)
    far_pool = real & (picture_of_masked[:, None] != picture_of_region)  # (M, B*N) bool, True = may be drawn
    same_row = row_of_masked[:, None] == row_of_region  # (M, B*N)
    near_pool = (real & same_row).scatter(1, batch.region_index[:, None], False)
    # This check would make a GPU wait; there torch.multinomial fails instead.
    if real.is_cpu and not (near_pool | far_pool).any(1).all():
        raise common.UserError("the objective nce needs a second region in each batch; give a larger --batch-size")
    far_pool = torch.where(far_pool.any(1, keepdim=True), far_pool, near_pool)
    near_pool = torch.where(near_pool.any(1, keepdim=True), near_pool, far_pool)
    far_index = torch.multinomial(far_pool.float(), far, replacement=True)  # (M, B*N) -> (M, far)
    near_index = torch.multinomial(near_pool.float(), near, replacement=True)  # (M, B*N) -> (M, near)
    return torch.cat([far_index, near_index], 1)


def noise_contrastive_regions(model, encoding, batch, negatives=None):
    """NCE on masked regions (12-in-1's code): which of 1 + n features is that of the masked region?

        L = -log [ exp(h(v_m) f_m) / sum_{j in {m} or negatives} exp(h(v_m) f_j) ],  mean over masked regions

    negatives (M, n): flat positions in B*N. None draws 89 from other pictures and 38 from the same picture: 70% and 30%
    of 128, rounded down. h is the head "mrfr", f the clean features. Logits (M, 1 + n), the positive first.
    """
    index = batch.region_index  # (M,)
    states = common.gather_positions(encoding.regions, index)  # (B, N, C) -> (M, C)
    predicted = common.at_least_float32(model.heads["mrfr"](states))  # (M, C) -> (M, F)
    if len(index) == 0:
        return predicted.sum() * 0.0, predicted[:, :1]
    if negatives is None:
        negatives = sample_negative_regions(batch, near=38, far=89)
    features = batch.clean_features.flatten(0, 1).to(predicted.dtype)  # (B, N, F) -> (B*N, F)
    with common.full_precision(predicted.device):
        products = predicted @ features.T  # (M, F) @ (F, B*N) -> (M, B*N)
    logits = products.gather(1, torch.cat([index[:, None], negatives], 1))  # (M, 1 + n)
    return common.cross_entropy(logits, torch.zeros_like(index)), logits


def visual_entailment(model, encoding, batch):
    """SNLI-VE (12-in-1): binary cross-entropy, mean over rows and three answers. batch.answers, logits (B, 3)."""
    logits = model.heads["ve"](encoding.pooled)  # (B, shared) -> (B, 3)
    return F.binary_cross_entropy_with_logits(logits, batch.answers), logits


def natural_language_for_visual_reasoning(model, encoding, batch):
    """NLVR2 (12-in-1): is the statement true of the two pictures? batch.target (B,) int64, 1 = true. Logits (B, 2).

    The batch has 2B rows, the statement with each picture in turn; binary cross-entropy, mean over both logits.
    """
    pooled = encoding.pooled.reshape(batch.target.shape[0], -1)  # (2B, shared) -> (B, 2 * shared)
    logits = model.heads["nlvr2"](pooled)  # (B, 2 * shared) -> (B, 2)
    target = F.one_hot(batch.target, 2).to(logits.dtype)  # (B,) -> (B, 2)
    return F.binary_cross_entropy_with_logits(logits, target), logits
