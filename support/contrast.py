"""contrast.py: image-text contrast, the objective `itc`. It is in a file of its own: none of the three papers has it.

Text and picture are encoded without each other. Both become unit vectors of one space, in which true pairs are pulled
together (CLIP, Radford 2021; ALBEF, Li 2021). All three models can be trained with it. In retrieval with --rerank it
ranks all pictures fast, and the objective `rank` then re-ranks the best of them.

Letters: B pairs, T text positions, N regions, C width, E width of the contrast space.
"""

import dataclasses
import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import common

# ---- losses: image, text (B, E), L2-normalised, row i of each is one pair -> a scalar --------------------------------


@common.in_float32
def pairwise_cosine(image, text, same=None):
    """Cosines (B, B), pictures x texts, and two masks (B, B) bool: which pairs are positives, which are negatives.

    Positives are the diagonal. same: (B, B) bool, symmetric, True = rows i and j show the same picture. Such pairs off
    the diagonal are neither positive nor negative. All others are negatives. ValueError if the shapes differ.
    """
    if image.shape != text.shape:
        raise ValueError(f"pictures {tuple(image.shape)} and texts {tuple(text.shape)} are not pairs: shapes differ")
    cosines = image @ text.T  # (B, E) @ (E, B) -> (B, B)
    positive = torch.eye(len(image), dtype=torch.bool, device=image.device)
    negative = ~positive
    if same is not None:
        negative = negative & ~same
    return cosines, positive, negative


def info_nce(image, text, temperature=0.07, same=None):
    """Symmetric InfoNCE (van den Oord 2018, eq. 4; CLIP 2021, fig. 3): pull each pair together, push the batch apart.

        L = 1/2 [ CE(s, I) + CE(s^T, I) ],   s_ij = <image_i, text_j> / temperature

    temperature: > 0, float or 0-d tensor.   same: as in `pairwise_cosine`. Other pairs of the same picture are left out
    of the softmax.   Returns a 0-d tensor in nats; log B is chance.   ValueError if the shapes differ.
    """
    cosines, positive, negative = pairwise_cosine(image, text, same)
    logits = (cosines / temperature).masked_fill(~(negative | positive), -torch.inf)
    labels = torch.arange(len(image), device=image.device)
    return (common.cross_entropy(logits, labels) + common.cross_entropy(logits.T, labels)) / 2


def hardest_hinge(image, text, margin=0.2, same=None):
    """Hinge on the hardest negative (VSE++, Faghri 2018, section 2.3), c the cosines:

        L = 1/B sum_i [ max_j (m + c_ij - c_ii)_+ + max_j (m + c_ji - c_ii)_+ ],   j a negative of i

    The official code sums over the batch. same, ValueError: as in `pairwise_cosine`.
    """
    cosines, _, negative = pairwise_cosine(image, text, same)
    if len(cosines) == 0:
        return cosines.sum()
    positives = cosines.diagonal()  # (B,)
    negatives = cosines.masked_fill(~negative, -torch.inf)
    hardest_image = negatives.amax(0)  # (B, B) -> (B,), for each text
    hardest_text = negatives.amax(1)  # (B, B) -> (B,), for each picture
    image_loss = F.relu(margin + hardest_image - positives).mean()
    text_loss = F.relu(margin + hardest_text - positives).mean()
    return image_loss + text_loss


def sigmoid_contrast(image, text, temperature=0.1, bias=-10.0, same=None):
    """SigLIP (Zhai 2023, section 3.2): each of the B^2 pairs is classified by itself, z = 1 if positive, else -1.

        L = -1/B sum_ij log sigmoid( z_ij (<image_i, text_j> / temperature + bias) )

    bias: float or 0-d tensor; starts at -10: nearly all pairs are negative. same, ValueError: as in `pairwise_cosine`.
    """
    cosines, positive, negative = pairwise_cosine(image, text, same)
    sign = 2.0 * positive - 1.0  # (B, B)
    log_probs = F.logsigmoid(sign * (cosines / temperature + bias))
    return -(log_probs * (negative | positive)).sum() / max(1, len(image))


def decoupled_contrast(image, text, temperature=0.07, same=None):
    """DCL (Yeh 2022, section 3): InfoNCE without the positive in the denominator, because it slows learning there.

        L = 1/2B sum_i [ -2 s_ii + log sum_j exp s_ij + log sum_j exp s_ji ],   j a negative of i,  s as in `info_nce`

    The paper also has negatives within a modality, which are not used here. A row without negatives counts as 0.
    same, ValueError: as in `pairwise_cosine`.
    """
    cosines, _, negative = pairwise_cosine(image, text, same)
    logits = cosines / temperature
    has_negative = negative.any(1)  # (B,), for rows and columns alike: `negative` is symmetric
    negatives = logits.masked_fill(~negative, -torch.inf)
    # rows without negatives become 0, because logsumexp of -inf alone has no gradient
    to_text = negatives.masked_fill(~has_negative[:, None], 0.0).logsumexp(1)  # (B, B) -> (B,)
    to_image = negatives.masked_fill(~has_negative, 0.0).logsumexp(0)
    losses = (to_text + to_image) / 2 - logits.diagonal()  # (B,)
    return (losses * has_negative).sum() / max(1, len(image))


def scheduled_temperature(first, last, done):
    """Half a cosine from `first` to `last` as `done` goes from 0 to 1 (cf. Kukleva 2023, section 3.2):
    first + (last - first) (1 - cos(pi done)) / 2."""
    return first + (last - first) * (1.0 - math.cos(math.pi * done)) / 2


# ---- one loss over the rows of all processes -------------------------------------------------------------------------


class SumOverProcesses(torch.autograd.Function):
    """The sum of x over all processes. Backward: the sum of all processes' gradients."""

    @staticmethod
    def forward(ctx, x):
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, gradient):
        return SumOverProcesses.apply(gradient)


def gather_with_gradient(x):
    """The rows of all processes in the order of ranks: x (n, ...) -> (sum of n, ...). n may differ between processes.

    Each process must weight its copy of the loss by its share of the rows. The gradients then equal those of one
    process with all rows. Returns x itself in a single process, and in evaluation (`torch.inference_mode`), where
    processes have different numbers of batches.
    """
    if torch.is_inference_mode_enabled() or not dist.is_initialized():
        return x
    rank = dist.get_rank()
    counts = torch.zeros(dist.get_world_size(), dtype=torch.long)
    counts[rank] = len(x)
    dist.all_reduce(counts)
    rows_before = int(counts[:rank].sum())
    rows_after = int(counts[rank + 1 :].sum())
    before = x.new_zeros(rows_before, *x.shape[1:])
    after = x.new_zeros(rows_after, *x.shape[1:])
    # each process has zeros in the other processes' rows: the sum gathers, and allows unequal sizes
    return SumOverProcesses.apply(torch.cat([before, x, after]))


# ---- head and objective ----------------------------------------------------------------------------------------------


CHOICES = {"contrast": ("infonce", "hinge", "sigmoid", "dcl"), "text_vector": ("cls", "mean")}  # of a model's Config


class ContrastHead(nn.Module):
    """The head of image-text contrast. Text and picture, each encoded alone, become unit vectors (E,) of one space.

    Text: a linear map of the last state of [CLS], or with text_vector "mean" of the mean over all words, [CLS] and
    [SEP] included. Picture: a linear map of the mean over its regions. The temperature is learned as log_scale =
    log(1 / temperature) (CLIP 2021, section 2.5). It starts at 0.07, for "sigmoid" at SigLIP's 0.1, and stays in 0.01..1.
    """

    def __init__(self, text_width, region_width, width, kind="infonce", text_vector="cls"):
        super().__init__()
        self.project_text = common.Float32Linear(text_width, width, bias=False)
        self.project_image = common.Float32Linear(region_width, width, bias=False)
        self.kind = kind
        self.text_vector = text_vector
        self.log_scale = nn.Parameter(torch.tensor(-math.log(0.1 if kind == "sigmoid" else 0.07)))
        self.bias = nn.Parameter(torch.tensor(-10.0)) if kind == "sigmoid" else None

    def text(self, states, mask):
        """(B, T, C), mask (B, T) bool, True = a word -> (B, E)"""
        pooled = common.masked_mean(states, mask) if self.text_vector == "mean" else states[:, 0]  # (B, C)
        return F.normalize(self.project_text(pooled), dim=-1)

    def image(self, states, mask):
        """(B, N, C), mask (B, N) bool, True = a region -> (B, E)"""
        return F.normalize(self.project_image(common.masked_mean(states, mask)), dim=-1)

    def forward(self, image, text, pictures):
        """The loss that `kind` names, over the rows of all processes, and its logits (B', B').

        image, text (B, E); pictures (B,) int64, each row's picture. Rows of the same picture are not negatives.
        B' is the sum of B over all processes.
        """
        vectors = gather_with_gradient(torch.cat([image, text], 1))  # (B, 2E) -> (B', 2E), in one reduction
        image, text = vectors.chunk(2, 1)  # (B', 2E) -> (B', E) each
        pictures = gather_with_gradient(pictures)  # (B,) -> (B',)
        same = pictures[:, None] == pictures  # (B', B')
        if self.training:
            self.log_scale.data.clamp_(0.0, math.log(100.0))  # the parameter itself, so that it keeps a gradient
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


def image_text_contrast(model, encoding, batch):
    """Image-text contrast: the loss of ContrastHead on text and regions that are encoded without each other.

    `encoding` is not used. What other objectives of the step have masked stays masked. The pairs are rows batch.pair_index
    (M,), gathered from all processes: M' pairs. Rows with the same batch.pictures (B,) are not negatives of each other.
    Logits (M', M'), pictures x texts.
    """
    head = model.heads["itc"]
    unread = {"ids": None, "target": None, "clean_features": None, "object_probs": None, "answers": None}
    pairs = dataclasses.replace(batch, **unread).select(batch.pair_index)  # B rows -> M rows
    text = head.text(model.encode(pairs, regions=False).text, pairs.text_mask)  # (M, E)
    image = head.image(model.encode(pairs, text=False).regions, pairs.region_mask)  # (M, E)
    return head(image, text, pairs.pictures)


CONTRAST = common.Objective(
    image_text_contrast,
    head="itc",
    pretraining=True,
    mean_over="pairs",
    encodes_itself=True,
    learn_as="pairs",
    labels=lambda batch, logits: torch.arange(len(logits)),  # picture i belongs to text i
)
