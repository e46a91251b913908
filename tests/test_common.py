"""common.py against oracles that nobody here wrote: torch's own modules, closed forms, brute force, finite differences."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import checkpoints
import common


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def randn(*shape, **options):
    return torch.randn(*shape, dtype=torch.float64, **options)


def lengths_mask(width, lengths):
    """(B, width) bool, True = within the row's length."""
    return torch.arange(width) < torch.tensor(lengths)[:, None]


def close(a, b, tolerance=1e-12):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=0)


# ---- elementary formulas ---------------------------------------------------------------------------------------


def test_gelu():
    x = randn(100) * 3
    close(common.gelu(x), F.gelu(x))
    close(common.gelu(x), torch.tensor([v * 0.5 * math.erfc(-v / math.sqrt(2)) for v in x.tolist()]).double(), 1e-6)
    assert (common.gelu(x) - F.gelu(x, approximate="tanh")).abs().max() > 1e-5  # the exact one, not the approximation


def test_layer_norm():
    x, weight, bias = randn(3, 5, 8) * 4 + 2, randn(8), randn(8)
    close(common.layer_norm(x, weight, bias), F.layer_norm(x, (8,), weight, bias, 1e-12))
    norm = common.LayerNorm(8).double()
    norm.load_state_dict({"weight": weight, "bias": bias})
    close(norm(x), common.layer_norm(x, weight, bias))
    tiny = x * 1e-5  # where another eps would show
    close(norm(tiny), F.layer_norm(tiny, (8,), weight, bias, 1e-12))
    assert (norm(tiny) - F.layer_norm(tiny, (8,), weight, bias, 1e-5)).abs().max() > 0.1


def test_attention_explicit_and_fused():
    query, key, value = randn(2, 3, 4, 5), randn(2, 3, 6, 5), randn(2, 3, 6, 5)
    bias = common.attention_bias(lengths_mask(6, [6, 2]), torch.float64)
    for mask in (None, bias):
        context, probabilities = common.attention(query, key, value, mask)
        close(context, common.fused_attention(query, key, value, mask))
        close(probabilities.sum(-1), torch.ones(2, 3, 4).double())
    assert (probabilities[1, :, :, 2:] == 0).all() and (probabilities[1, :, :, :2] > 0).all()
    one = (query[1, 2, 3] @ key[1, 2, :2].T / math.sqrt(5)).exp()  # one query by hand, over the two visible keys
    close(context[1, 2, 3], one / one.sum() @ value[1, 2, :2])


def test_attention_with_everything_hidden():
    """A row without a visible key attends as if nothing were hidden; no NaN."""
    query, key, value = randn(2, 3, 4, 5), randn(2, 3, 6, 5), randn(2, 3, 6, 5)
    bias = common.attention_bias(torch.zeros(2, 6, dtype=torch.bool), torch.float64)
    close(common.attention(query, key, value, bias)[0], common.attention(query, key, value)[0], 1e-10)
    close(common.fused_attention(query, key, value, bias), common.attention(query, key, value)[0], 1e-10)


# ---- the Transformer's parts -----------------------------------------------------------------------------------


def copy_attention(ours, theirs):
    """Our four matrices into torch's MultiheadAttention, which stacks or names them its own way."""
    parts = [ours.query, ours.key, ours.value]
    state = {"in_proj_bias": torch.cat([p.bias for p in parts])}
    if theirs.in_proj_weight is None:
        state |= {f"{n}_proj_weight": p.weight for n, p in zip("qkv", parts, strict=True)}
    else:
        state["in_proj_weight"] = torch.cat([p.weight for p in parts])
    theirs.load_state_dict(state | {"out_proj.weight": ours.output.weight, "out_proj.bias": ours.output.bias})


@pytest.mark.parametrize("context_width", [12, 20])
def test_multi_head_attention(context_width):
    ours = common.MultiHeadAttention(12, 3, context_width=context_width).double()
    theirs = nn.MultiheadAttention(12, 3, kdim=context_width, vdim=context_width, batch_first=True).double()
    copy_attention(ours, theirs)
    x, context, mask = randn(2, 4, 12), randn(2, 6, context_width), lengths_mask(6, [5, 1])
    want, weights = theirs(x, context, context, key_padding_mask=~mask, average_attn_weights=False)
    maps, bias = [], common.attention_bias(mask, torch.float64)
    close(ours(x, context, bias), want)
    close(ours(x, context, bias, maps), want)
    close(maps[0], weights)


def test_attention_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="12 is not a multiple of 5"):
        common.MultiHeadAttention(12, 5)


def test_transformer_layer():
    ours = common.TransformerLayer(12, 3, 40).double().eval()
    theirs = nn.TransformerEncoderLayer(12, 3, 40, 0.0, "gelu", 1e-12, batch_first=True).double()
    for parameter in ours.parameters():
        nn.init.normal_(parameter, std=0.5)
    copy_attention(ours.attention, theirs.self_attn)
    pairs = {
        theirs.norm1: ours.attention.norm,
        theirs.norm2: ours.feed_forward.norm,
        theirs.linear1: ours.feed_forward.up,
        theirs.linear2: ours.feed_forward.down,
    }
    for to, source in pairs.items():
        to.load_state_dict(source.state_dict())
    x, mask = randn(2, 6, 12), lengths_mask(6, [6, 4])
    got = ours(x, common.attention_bias(mask, torch.float64))
    want = theirs(x, src_key_padding_mask=~mask)  # in training mode (without dropout), to avoid torch's fast path
    close(got[mask], want[mask], 1e-11)


def test_padding_changes_nothing():
    layer = common.TransformerLayer(12, 3, 40).double()
    x, longer = randn(2, 4, 12), randn(2, 9, 12) * 1e3
    longer[:, :4] = x
    bias = common.attention_bias(lengths_mask(9, [4, 4]), torch.float64)
    close(layer(longer, bias)[:, :4], layer(x), 1e-11)


@pytest.mark.parametrize("p, shape", [(0.1, (300, 333)), (0.5, (7, 11, 1301)), (0.0, (3, 5)), (1.0, (3, 5))])
def test_drop(p, shape):
    """The share of zeros, their independence of place, the scale of the rest, and a gradient that passes where x does."""
    x = torch.rand(shape).add(1).requires_grad_()
    torch.manual_seed(0)
    y = common.apply_dropout(x, p)
    gone = y == 0
    sigma = (p * (1 - p) / x.numel()) ** 0.5
    assert abs(gone.float().mean() - p) <= 5 * sigma
    pairs = (gone.flatten()[1:] & gone.flatten()[:-1]).float().mean()
    assert abs(pairs - p * p) <= 10 * sigma
    torch.testing.assert_close(y[~gone], (x / (1 - p) if p < 1 else x)[~gone])
    y.sum().backward()
    torch.testing.assert_close(x.grad, y.detach() / x.detach())
    torch.manual_seed(0)
    assert common.apply_dropout(x, p).equal(y)
    if 0 < p < 1:
        assert not common.apply_dropout(x, p).equal(y)


def test_dropout_is_for_training_only():
    layer, x = common.TransformerLayer(12, 3, 40, dropout=0.5).double(), randn(2, 4, 12)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    close(layer(x), layer(x, maps=[]))


def test_heads():
    """MaskedLMHead is tied: its scores are the transform times the word table itself."""
    head, words, x = common.MaskedLMHead(6, 11).double(), randn(11, 6), randn(4, 6)
    nn.init.normal_(head.bias)
    hidden = F.layer_norm(F.gelu(head.transform.dense(x)), (6,), eps=1e-12)
    close(head(x, words), torch.einsum("mc,vc->mv", hidden, words) + head.bias)
    pooler = common.Pooler(6).double()
    close(pooler(x[None]), torch.tanh(pooler.dense(x[:1])))


@pytest.mark.parametrize("block", [common.FeedForward(4, 6), common.AttentionBlock(4, 2), common.HeadTransform(4)])
def test_gradients(block):
    """Against finite differences, also through the mask."""
    block = block.double()
    extra = {}
    if isinstance(block, common.AttentionBlock):
        extra["bias"] = common.attention_bias(lengths_mask(3, [3, 2]), torch.float64)
    x = randn(2, 3, 4, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: block(x, **extra), x)


@pytest.mark.parametrize(("width", "std"), [(768, 0.02), (1024, 0.02), (192, 0.04)])
def test_initialise(width, std):
    model = nn.Sequential(nn.Linear(300, 300), nn.Embedding(300, 300, padding_idx=0), common.LayerNorm(300))
    common.init_weights(model, width)
    for layer in model[:2]:
        assert abs(layer.weight.std().item() - std) < 0.015 * std
        assert abs(layer.weight.mean().item()) < 0.015 * std
    assert (model[0].bias == 0).all() and model[1].weight[0].abs().max() > 0  # the padding row too, as in BERT
    assert (model[2].weight == 1).all() and (model[2].bias == 0).all()


@pytest.mark.parametrize("numbers", [4, 5, 7])
def test_spread_boxes_let_places_and_sides_count_alike(numbers):
    """Boxes with the means and spreads of the docstring: outputs have mean 0 and variance 1, a quarter from each."""
    torch.manual_seed(0)
    linear = nn.Linear(numbers, 4000)
    common.init_box_projection(linear)
    z = torch.randn(4000, 4)  # centre x, y, width, height, standardised
    centre, sides = 0.5 + 0.25 * z[:, :2], 0.25 + 0.1 * z[:, 2:]
    boxes = torch.cat([centre - sides / 2, centre + sides / 2, torch.rand(4000, numbers - 4)], 1)
    out = linear(boxes)  # (4000, P) -> (4000, 4000)
    assert abs(out.mean().item()) < 0.02 and abs(out.var().item() - 1) < 0.03
    for i in range(4):
        without = z.clone()
        without[:, i] = 0
        centre, sides = 0.5 + 0.25 * without[:, :2], 0.25 + 0.1 * without[:, 2:]
        alone = out - linear(torch.cat([centre - sides / 2, centre + sides / 2, boxes[:, 4:]], 1))
        assert abs(alone.var().item() - 0.25) < 0.02, i


# ---- losses ----------------------------------------------------------------------------------------------------


def test_at():
    states = randn(2, 3, 4)
    close(
        common.gather_positions(states, torch.tensor([5, 0, 3])),
        torch.stack([states[1, 2], states[0, 0], states[1, 0]]),
    )


def test_cross_entropy():
    scores, labels = randn(5, 7), torch.tensor([0, 6, 2, 2, 1])
    by_hand = [-math.log(scores[i, y].exp() / scores[i].exp().sum()) for i, y in enumerate(labels.tolist())]
    close(common.cross_entropy(scores, labels), torch.tensor(by_hand).double().mean(), 1e-6)
    close(common.cross_entropy(scores, labels, reduction="sum"), 5 * common.cross_entropy(scores, labels))
    empty = scores[:0].requires_grad_()
    loss = common.cross_entropy(empty, labels[:0])
    loss.backward()
    assert loss == 0 and empty.grad.shape == (0, 7)


def test_soft_answer_loss():
    scores, targets = randn(3, 5), torch.rand(3, 5).double()
    total = 0.0
    for row, target in zip(scores.tolist(), targets.tolist(), strict=True):
        for x, t in zip(row, target, strict=True):
            p = 1 / (1 + math.exp(-x))
            total -= t * math.log(p) + (1 - t) * math.log(1 - p)
    assert abs(common.soft_answer_loss(scores, targets).item() - total / 3) < 1e-12


def ipot(cost, beta, iterations):
    """IPOT (Xie 2018, algorithm 1) in plain Python for one pair without padding: cost n x m nested lists -> distance."""
    n, m = len(cost), len(cost[0])
    kernel = [[math.exp(-c / beta) for c in row] for row in cost]
    plan, b = [[1.0] * m for _ in range(n)], [1.0 / m] * m
    for _ in range(iterations):
        q = [[kernel[i][j] * plan[i][j] for j in range(m)] for i in range(n)]
        a = [1 / (n * sum(q[i][j] * b[j] for j in range(m))) for i in range(n)]
        b = [1 / (m * sum(q[i][j] * a[i] for i in range(n))) for j in range(m)]
        plan = [[a[i] * q[i][j] * b[j] for j in range(m)] for i in range(n)]
    return sum(plan[i][j] * cost[i][j] for i in range(n) for j in range(m))


@pytest.mark.parametrize("setting", [{}, {"beta": 0.1, "iterations": 7}, {"beta": 1.0, "iterations": 1}])
def test_optimal_transport_by_the_algorithm(setting):
    text, regions, words, areas = randn(3, 5, 8), randn(3, 6, 8), [5, 2, 1], [3, 6, 1]
    distance, _, cost = common.optimal_transport(
        text, regions, lengths_mask(5, words), lengths_mask(6, areas), **setting
    )
    for i, (n, m) in enumerate(zip(words, areas, strict=True)):
        close(cost[i, :n, :m], 1 - F.cosine_similarity(text[i, :n, None], regions[i, None, :m], dim=-1))
        # the algorithm starts with the side that the official code starts with: regions
        by_hand = ipot(cost[i, :n, :m].T.tolist(), **{"beta": 0.5, "iterations": 50} | setting)
        assert abs(distance[i].item() - by_hand) < 1e-12, i


def test_optimal_transport_reaches_the_optimum():
    """Between equal numbers the best plan is a permutation / n (Birkhoff): found by trying all of them."""
    text, regions, n = randn(2, 5, 8), randn(2, 7, 8), 5
    masks = lengths_mask(5, [5, 5]), lengths_mask(7, [5, 5])
    distance, plan, cost = common.optimal_transport(text, regions, *masks, beta=0.05, iterations=3000)
    for i in range(2):
        best = min(sum(cost[i, j, p[j]].item() for j in range(n)) / n for p in itertools.permutations(range(n)))
        assert abs(distance[i].item() - best) < 1e-6
    even = torch.full((2, 5), 0.2, dtype=torch.float64)
    close(plan.sum(2), even, 1e-9)
    close(plan.sum(1)[:, :5], even, 1e-9)
    assert (plan[:, :, 5:] == 0).all()


def test_optimal_transport_of_padding_and_half_precision():
    text, regions = randn(2, 4, 8), randn(2, 3, 8)
    masks = lengths_mask(4, [4, 2]), lengths_mask(3, [3, 2])
    distance = common.optimal_transport(text, regions, *masks)[0]
    far = common.optimal_transport(
        torch.cat([text, 1e3 * randn(2, 5, 8)], 1),
        torch.cat([regions, 1e3 * randn(2, 5, 8)], 1),
        *(torch.cat([mask, torch.zeros(2, 5, dtype=torch.bool)], 1) for mask in masks),
    )[0]
    close(far, distance)
    low = common.optimal_transport(text.bfloat16(), regions.bfloat16(), *masks)[0]
    assert low.dtype == torch.float32 and (low.double() - distance).abs().max() < 0.02
    empty = common.optimal_transport(text, regions, torch.zeros_like(masks[0]), masks[1])[0]
    assert (empty == 0).all()


def test_optimal_transport_gradient_holds_the_plan_constant():
    text, regions = randn(1, 4, 8, requires_grad=True), randn(1, 3, 8)
    masks = lengths_mask(4, [3]), lengths_mask(3, [3])
    distance, plan, _ = common.optimal_transport(text, regions, *masks)
    (got,) = torch.autograd.grad(distance.sum(), text)
    cost = 1 - F.cosine_similarity(text[:, :, None], regions[:, None], dim=-1)
    (want,) = torch.autograd.grad((plan * cost).sum(), text)
    close(got, want)
    assert (got[0, 3] == 0).all() and got[0, :3].abs().max() > 1e-3


# ---- boxes and metrics -----------------------------------------------------------------------------------------


def test_iou_by_counting_pixels():
    corners = torch.randint(0, 12, (60, 2, 2, 2))
    boxes = torch.cat([corners.amin(2), corners.amax(2) + 1], -1)  # (60, 2, 4), at least one pixel each
    got = common.iou(boxes[:, 0].double(), boxes[:, 1].double())
    for (a, b), value in zip(boxes.tolist(), got.tolist(), strict=True):
        pixels = [{(x, y) for x in range(c[0], c[2]) for y in range(c[1], c[3])} for c in (a, b)]
        assert abs(value - len(pixels[0] & pixels[1]) / len(pixels[0] | pixels[1])) < 1e-12
    assert 0 < (got > 0).sum() < 60


def test_iou_edges():
    boxes = torch.tensor([[0.0, 0, 2, 2], [2, 0, 4, 2], [1, 1, 3, 3], [5, 5, 5, 5]])
    pairs = common.iou(boxes[:, None], boxes[None])  # broadcast: (4, 4)
    want = [[1, 0, 1 / 7, 0], [0, 1, 1 / 7, 0], [1 / 7, 1 / 7, 1, 0], [0, 0, 0, 0]]
    close(pairs, torch.tensor(want), 1e-6)


# ---- names -----------------------------------------------------------------------------------------------------


def test_rename_applies_the_rules_in_order():
    assert checkpoints.rename("a.b.c", [("a.b", "x"), ("x.c", "y"), ("a", "z")]) == "y"


# ---- contrast --------------------------------------------------------------------------------------------------

CONTRASTS = {
    "infonce": lambda i, t, temperature, bias, same: common.info_nce(i, t, temperature, same),
    "hinge": lambda i, t, temperature, bias, same: common.hardest_hinge(i, t, same=same),
    "sigmoid": common.sigmoid_contrast,
    "dcl": lambda i, t, temperature, bias, same: common.decoupled_contrast(i, t, temperature, same),
}


def by_loops(name, image, text, temperature, bias, same):
    """Every contrast from its definition, one pair of rows after the other, in Python floats."""
    n, total = len(image), 0.0
    cosine = [[sum(a * b for a, b in zip(image[i].tolist(), text[j].tolist(), strict=True)) for j in range(n)]
              for i in range(n)]  # fmt: skip
    for i in range(n):
        own = cosine[i][i]
        others = [j for j in range(n) if j != i and not (same is not None and same[i, j])]
        for ways, column in ((1, lambda j, i=i: cosine[i][j]), (2, lambda j, i=i: cosine[j][i])):
            negatives = [column(j) for j in others]
            part = sum(math.exp(c / temperature) for c in negatives)
            if name == "infonce":
                total += (math.log(part + math.exp(own / temperature)) - own / temperature) / 2
            elif name == "dcl" and negatives:
                total += (math.log(part) - own / temperature) / 2
            elif name == "hinge":
                total += max([0.2 + c - own for c in negatives if 0.2 + c - own > 0], default=0.0)
            elif name == "sigmoid" and ways == 1:
                total -= math.log(1 / (1 + math.exp(-(own / temperature + bias))))
                total -= sum(math.log(1 / (1 + math.exp(c / temperature + bias))) for c in negatives)
    return total / n


@pytest.mark.parametrize("name", CONTRASTS)
@pytest.mark.parametrize("pictures", [None, [0, 1, 2, 3, 4, 5], [0, 1, 0, 2, 1, 0], [3, 3, 3, 3, 3, 3]])
def test_contrasts_by_loops_and_finite_differences(name, pictures):
    image, text = F.normalize(randn(6, 4), dim=-1), F.normalize(randn(6, 4), dim=-1)
    same = None if pictures is None else torch.tensor(pictures)[:, None] == torch.tensor(pictures)
    got = CONTRASTS[name](image, text, 0.3, -1.5, same)
    assert got.item() == pytest.approx(by_loops(name, image, text, 0.3, -1.5, same), abs=1e-10)
    leaves = [x.requires_grad_() for x in (image, text, torch.tensor(0.3).double(), torch.tensor(-1.5).double())]
    assert torch.autograd.gradcheck(lambda i, t, c, b: CONTRASTS[name](i, t, c, b, same) + 0 * (c + b), leaves)


def test_contrasts_in_closed_form():
    alike, apart = torch.ones(5, 1).double(), torch.eye(5).double()
    assert common.info_nce(alike, alike, 0.07).item() == pytest.approx(math.log(5))
    assert common.info_nce(apart, apart, 0.5).item() == pytest.approx(math.log(1 + 4 * math.exp(-2)))
    assert common.decoupled_contrast(apart, apart, 0.5).item() == pytest.approx(math.log(4) - 2)
    assert common.hardest_hinge(alike, alike).item() == pytest.approx(0.4)  # the margin, both ways
    assert common.hardest_hinge(apart, apart).item() == 0
    image, text = F.normalize(randn(5, 3), dim=-1), F.normalize(randn(5, 3), dim=-1)
    scores = image @ text.T / 0.1
    target = torch.arange(5)
    close(common.info_nce(image, text, 0.1), (F.cross_entropy(scores, target) + F.cross_entropy(scores.T, target)) / 2)
    bce = F.binary_cross_entropy_with_logits(scores - 3.0, apart, reduction="sum") / 5
    close(common.sigmoid_contrast(image, text, 0.1, -3.0), bce)


@pytest.mark.parametrize("name", CONTRASTS)
@pytest.mark.parametrize("rows", [0, 1])
def test_contrasts_of_next_to_nothing(name, rows):
    """A batch without negatives, or without any pair, has a finite loss and a finite gradient."""
    image, text = (F.normalize(randn(rows, 4), dim=-1).requires_grad_() for _ in range(2))
    loss = CONTRASTS[name](image, text, 0.1, -10.0, None)
    loss.backward()
    assert loss.isfinite() and image.grad.isfinite().all() and text.grad.isfinite().all()
    assert loss.item() == pytest.approx(0.0 if rows == 0 else by_loops(name, image, text, 0.1, -10.0, None))


@pytest.mark.parametrize("name", CONTRASTS)
def test_contrasts_refuse_unequal_batches(name):
    with pytest.raises(ValueError, match=r"\(3, 4\) and texts \(2, 4\)"):
        CONTRASTS[name](randn(3, 4), randn(2, 4), 0.1, 0.0, None)


def test_contrast_head_temperature_is_learned_within_bounds():
    head, image, text = common.ContrastHead(4, 4, 4), F.normalize(randn(5, 4)), F.normalize(randn(5, 4))
    assert math.exp(-head.log_scale.item()) == pytest.approx(0.07)
    for start, bound in ((9.0, math.log(100)), (-3.0, 0.0)):
        head.log_scale.data.fill_(start)
        loss, scores = head(image, text, torch.arange(5))
        loss.backward()
        assert head.log_scale.item() == pytest.approx(bound) and head.log_scale.grad.abs() > 1e-6
        close(scores.double(), image @ text.T * math.exp(bound), 1e-4)
        head.zero_grad()


def test_contrast_head_picture_is_the_mean_of_its_regions_and_text_its_first_state():
    head, states, mask = common.ContrastHead(4, 3, 5).double(), randn(2, 4, 3), lengths_mask(4, [4, 2])
    want = torch.stack([head.project_image(states[0].mean(0)), head.project_image(states[1, :2].mean(0))])
    close(head.image(states, mask), want / want.norm(dim=1, keepdim=True))
    words = randn(2, 3, 4)
    want = words[:, 0] @ head.project_text.weight.T
    close(head.text(words), want / want.norm(dim=1, keepdim=True))


def test_scheduled_temperature():
    assert [common.scheduled_temperature(0.2, 0.05, part) for part in (0, 0.5, 1)] == pytest.approx([0.2, 0.125, 0.05])
    values = [common.scheduled_temperature(0.2, 0.05, part / 10) for part in range(11)]
    assert values == sorted(values, reverse=True)


def contrast_gradients(rows, kind, share):
    """Loss, and gradients by projections and parameters, of the share of a contrast that these rows' process has."""
    torch.manual_seed(1)
    head, projection = common.ContrastHead(3, 3, 3, kind).double(), torch.nn.Linear(4, 3).double()
    data = torch.randn(5, 8, dtype=torch.float64)[rows]
    image, text = (F.normalize(projection(x), dim=-1) for x in data.chunk(2, 1))
    loss = head(image, text, torch.tensor([0, 1, 0, 2, 3])[rows])[0] * share
    loss.backward()
    gradients = [p.grad for p in (*projection.parameters(), *head.parameters()) if p.grad is not None]
    return torch.cat([loss.detach()[None], *(g.flatten() for g in gradients)])


def one_of_two(rank, folder):
    """A process of two with 3 and 2 of the rows; what both have, added up, is written."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    for kind in ("infonce", "hinge", "sigmoid", "dcl"):
        rows = [[0, 2, 4], [1, 3]][rank]
        found = contrast_gradients(rows, kind, len(rows) / 5)
        torch.distributed.all_reduce(found)
        torch.save(found, f"{folder}/{kind}.{rank}.pt")
    with torch.no_grad():  # a teacher's rows are gathered too
        assert common.gather_with_gradient(torch.full((rank + 1, 2), rank)).tolist() == [[0, 0], [1, 1], [1, 1]]
    with torch.inference_mode():
        assert len(common.gather_with_gradient(torch.zeros(rank + 1, 2))) == rank + 1
    torch.distributed.destroy_process_group()


def test_two_processes_contrast_as_one(tmp_path):
    torch.multiprocessing.spawn(one_of_two, (tmp_path,), nprocs=2)
    for kind in ("infonce", "hinge", "sigmoid", "dcl"):
        want = contrast_gradients([0, 1, 2, 3, 4], kind, 1.0)
        assert want.abs().max() > 1e-3
        for rank in (0, 1):
            close(torch.load(tmp_path / f"{kind}.{rank}.pt"), want, 1e-10)


# ---- distillation ----------------------------------------------------------------------------------------------


def test_soft_labels():
    student, teacher = randn(4, 5, requires_grad=True), randn(4, 5) * 3
    for temperature in (1.0, 2.0, 7.0):
        logs, soft = F.log_softmax(student / temperature, 1), F.softmax(teacher / temperature, 1)
        want = F.kl_div(logs, soft, reduction="batchmean") * temperature**2
        close(common.soft_label_loss(student, teacher, temperature), want)
    assert torch.autograd.gradcheck(lambda s: common.soft_label_loss(s, teacher, 2.0), student)
    close(common.soft_label_loss(teacher + 5.0, teacher), torch.zeros(()).double())  # a constant says nothing
    close(common.soft_label_loss(student[0], teacher[0]), F.mse_loss(student[0], teacher[0]))
    assert common.soft_label_loss(student[:0], teacher[:0]) == 0
    with pytest.raises(ValueError, match=r"\(4, 5\) of the student, \(4, 3\)"):
        common.soft_label_loss(student, teacher[:, :3])


def test_soft_labels_keep_their_gradient_at_high_temperature():
    """Hinton's section 2.1: for T large and scores of mean 0, the gradient is (student - teacher) / K, whatever T."""
    student, teacher = randn(1, 5), randn(1, 5)
    student, teacher = (student - student.mean()).requires_grad_(), teacher - teacher.mean()
    common.soft_label_loss(student, teacher, 1e4).backward()
    close(student.grad, (student - teacher).detach() / 5, 1e-3)


def test_layer_map_and_shared_heads():
    assert common.layer_map(2, 6) == [2, 5] and common.layer_map(1, 3) == [2] and common.layer_map(4, 4) == [0, 1, 2, 3]
    assert common.layer_map(4, 2) == [0, 0, 0, 1]
    maps = randn(2, 4, 3, 3)
    close(common.average_heads(maps, 2)[:, 1], (maps[:, 2] + maps[:, 3]) / 2)
    close(common.average_heads(maps, 4), maps)
    with pytest.raises(ValueError, match="4 attention heads of the teacher cannot be shared by 3"):
        common.average_heads(maps, 3)


@pytest.mark.parametrize("heads", [2, 4])
def test_attention_losses_by_loops_from_the_scores(heads):
    """Against torch's kl_div on maps and the squared difference of the scores themselves, visible keys only."""
    queries, keys = lengths_mask(3, [3, 2]), lengths_mask(5, [5, 3])
    bias = common.attention_bias(keys, torch.float64)
    a, b = randn(2, 2, 3, 5, requires_grad=True), randn(2, heads, 3, 5)
    teacher = (b + bias).softmax(-1)
    got = common.attention_loss((a + bias).softmax(-1), teacher, queries, keys)
    shared = teacher if heads == 2 else torch.stack([teacher[:, :2].mean(1), teacher[:, 2:].mean(1)], 1)
    kl = mse = 0.0
    for row, (words, seen) in enumerate([(3, 5), (2, 3)]):
        for head in range(2):
            for query in range(words):
                own, other = a[row, head, query, :seen], shared[row, head, query, :seen]
                kl += F.kl_div(own.log_softmax(0), other, reduction="sum") / (2 * words * 2)
                scores = b[row, head, query, :seen] if heads == 2 else other.log()
                mse += F.mse_loss(own - own.mean(), scores - scores.mean()) / (2 * words * 2)
    close(got[0], kl)
    close(got[1], mse, 1e-10)
    for part in (0, 1):
        loss = lambda a, part=part: common.attention_loss((a + bias).softmax(-1), teacher, queries, keys)[part]
        assert torch.autograd.gradcheck(loss, a)
    nothing = common.attention_loss(teacher, teacher, queries, torch.zeros(2, 5, dtype=torch.bool))
    assert nothing[0] == 0 and nothing[1] == 0


def test_hidden_loss():
    student, teacher, mask = randn(2, 4, 3, requires_grad=True), randn(2, 4, 3), lengths_mask(4, [4, 1])
    want = (F.mse_loss(student[0], teacher[0]) + F.mse_loss(student[1, :1], teacher[1, :1])) / 2
    close(common.hidden_loss(student, teacher, mask), want)
    assert torch.autograd.gradcheck(lambda s: common.hidden_loss(s, teacher, mask), student)
    assert common.hidden_loss(student, teacher, torch.zeros(2, 4, dtype=torch.bool)) == 0
