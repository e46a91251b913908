"""common.py against oracles that nobody here wrote: torch's own modules, closed forms, brute force, finite differences."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from helpers import close, lengths_mask, masked_batch, randn, small_model
from torch import nn

import common
from support import contrast, distillation, evaluation, formats

# ---- elementary formulas ---------------------------------------------------------------------------------------


def test_gelu_is_the_exact_one():
    x = randn(100) * 3
    close(common.gelu(x), F.gelu(x))
    assert (common.gelu(x) - F.gelu(x, approximate="tanh")).abs().max() > 1e-5


def test_layer_norm_equals_the_kernel():
    x = randn(3, 5, 8) * 4 + 2
    weight = randn(8)
    bias = randn(8)
    close(common.layer_norm(x, weight, bias), F.layer_norm(x, (8,), weight, bias, 1e-12))
    norm = common.LayerNorm(8).double()
    norm.load_state_dict({"weight": weight, "bias": bias})
    close(norm(x), common.layer_norm(x, weight, bias))
    tiny = x * 1e-5  # another eps would show here
    close(norm(tiny), F.layer_norm(tiny, (8,), weight, bias, 1e-12))
    assert (norm(tiny) - F.layer_norm(tiny, (8,), weight, bias, 1e-5)).abs().max() > 0.1


def test_explicit_attention_equals_the_kernel():
    query = randn(2, 3, 4, 5)
    key = randn(2, 3, 6, 5)
    value = randn(2, 3, 6, 5)
    bias = common.attention_bias(lengths_mask(6, [6, 2]), torch.float64)
    for mask in (None, bias):
        context, probs = common.attention(query, key, value, mask)
        close(context, F.scaled_dot_product_attention(query, key, value, mask))
        close(probs.sum(-1), torch.ones(2, 3, 4).double())
    assert (probs[1, :, :, 2:] == 0).all()
    assert (probs[1, :, :, :2] > 0).all()
    by_hand = (query[1, 2, 3] @ key[1, 2, :2].T / math.sqrt(5)).exp()  # one query, over the two visible keys
    close(context[1, 2, 3], by_hand / by_hand.sum() @ value[1, 2, :2])


def test_a_query_without_visible_keys_attends_to_all_keys():
    query = randn(2, 3, 4, 5)
    key = randn(2, 3, 6, 5)
    value = randn(2, 3, 6, 5)
    bias = common.attention_bias(torch.zeros(2, 6, dtype=torch.bool), torch.float64)
    want = common.attention(query, key, value)[0]
    close(common.attention(query, key, value, bias)[0], want, 1e-10)
    close(F.scaled_dot_product_attention(query, key, value, bias), want, 1e-10)


# ---- parts of the Transformer ----------------------------------------------------------------------------------


def copy_attention(ours, theirs):
    """Our four matrices into torch's MultiheadAttention, which stacks them if all have one width."""
    layers = [ours.query, ours.key, ours.value]
    state = {"out_proj.weight": ours.output.weight, "out_proj.bias": ours.output.bias}
    state["in_proj_bias"] = torch.cat([layer.bias for layer in layers])
    if theirs.in_proj_weight is None:
        for letter, layer in zip("qkv", layers, strict=True):
            state[f"{letter}_proj_weight"] = layer.weight
    else:
        state["in_proj_weight"] = torch.cat([layer.weight for layer in layers])
    theirs.load_state_dict(state)


@pytest.mark.parametrize("context_width", [12, 20])
def test_multi_head_attention_equals_torch(context_width):
    ours = common.MultiHeadAttention(12, 3, context_width=context_width).double()
    theirs = nn.MultiheadAttention(12, 3, kdim=context_width, vdim=context_width, batch_first=True).double()
    copy_attention(ours, theirs)
    x = randn(2, 4, 12)
    context = randn(2, 6, context_width)
    mask = lengths_mask(6, [5, 1])
    want, weights = theirs(x, context, context, key_padding_mask=~mask, average_attn_weights=False)
    maps = []
    bias = common.attention_bias(mask, torch.float64)
    close(ours(x, context, bias), want)
    close(ours(x, context, bias, maps), want)
    close(maps[0], weights)


def test_incremental_attention_equals_attention_at_once():
    """Word by word with a cache, or all words under a causal mask: the same states."""
    block = common.AttentionBlock(12, 3).double()
    cross = common.AttentionBlock(12, 3, context_width=5).double()
    x = randn(2, 4, 12)
    context = randn(2, 3, 5)
    causal = torch.ones(4, 4, dtype=torch.bool).tril().expand(2, 4, 4)
    want = cross(block(x, bias=common.attention_bias(causal, torch.float64)), context)
    cache = {}
    for i in range(4):
        got = cross(block(x[:, i : i + 1], cache=cache), context, cache=cache)
        close(got[:, 0], want[:, i])


def test_attention_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="12 is not a multiple of 5"):
        common.MultiHeadAttention(12, 5)


def test_transformer_layer_equals_torch():
    ours = common.TransformerLayer(12, 3, 40).double().eval()
    theirs = nn.TransformerEncoderLayer(12, 3, 40, 0.0, "gelu", 1e-12, batch_first=True).double()
    for parameter in ours.parameters():
        nn.init.normal_(parameter, std=0.5)
    copy_attention(ours.attention, theirs.self_attn)
    theirs.norm1.load_state_dict(ours.attention.norm.state_dict())
    theirs.norm2.load_state_dict(ours.feed_forward.norm.state_dict())
    theirs.linear1.load_state_dict(ours.feed_forward.up.state_dict())
    theirs.linear2.load_state_dict(ours.feed_forward.down.state_dict())
    x = randn(2, 6, 12)
    mask = lengths_mask(6, [6, 4])
    got = ours(x, common.attention_bias(mask, torch.float64))
    want = theirs(x, src_key_padding_mask=~mask)  # in training mode (without dropout), to avoid torch's fast path
    close(got[mask], want[mask], 1e-11)


def test_padding_changes_nothing():
    layer = common.TransformerLayer(12, 3, 40).double()
    x = randn(2, 4, 12)
    longer = randn(2, 9, 12) * 1e3
    longer[:, :4] = x
    bias = common.attention_bias(lengths_mask(9, [4, 4]), torch.float64)
    close(layer(longer, bias)[:, :4], layer(x), 1e-11)


def test_text_embedding_by_the_formula():
    config = SimpleNamespace(vocab_size=11, hidden=6, max_positions=9, types=3, dropout=0.0)
    embedding = common.TextEmbedding(config).double()
    ids = torch.randint(11, (2, 4))
    segments = torch.randint(3, (2, 4))
    for offset in (0, 5):
        positions = embedding.positions.weight[offset : offset + 4]
        x = embedding.words.weight[ids] + positions + embedding.types.weight[segments]
        close(embedding(ids, segments, offset), F.layer_norm(x, (6,), eps=1e-12))


@pytest.mark.parametrize("padding_idx", [None, 0])
def test_padding_rows_of_the_text_tables_do_not_learn(padding_idx):
    config = SimpleNamespace(vocab_size=11, hidden=6, max_positions=9, types=3, dropout=0.0)
    embedding = common.TextEmbedding(config, padding_idx)
    nothing = torch.zeros(2, 4, dtype=torch.long)
    (embedding(nothing, nothing) * torch.randn(6)).sum().backward()
    assert (embedding.words.weight.grad[0] == 0).all()
    for table in (embedding.positions, embedding.types):
        learns = table.weight.grad[0].abs().max() > 0
        assert learns == (padding_idx is None)


def test_masked_word_head_is_tied_to_the_word_table():
    head = common.MaskedLMHead(6, 11).double()
    words = randn(11, 6)
    x = randn(4, 6)
    nn.init.normal_(head.bias)
    hidden = F.layer_norm(F.gelu(head.transform.dense(x)), (6,), eps=1e-12)
    close(head(x, words), torch.einsum("mc,vc->mv", hidden, words) + head.bias)


def test_pooler_reads_the_first_position():
    pooler = common.Pooler(6).double()
    x = randn(2, 4, 6)
    close(pooler(x), torch.tanh(x[:, 0] @ pooler.dense.weight.T + pooler.dense.bias))


@pytest.mark.parametrize("block", [common.FeedForward(4, 6), common.AttentionBlock(4, 2), common.HeadTransform(4)])
def test_gradients_equal_finite_differences(block):
    block = block.double()
    options = {}
    if isinstance(block, common.AttentionBlock):
        options["bias"] = common.attention_bias(lengths_mask(3, [3, 2]), torch.float64)
    x = randn(2, 3, 4, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: block(x, **options), x)


@pytest.mark.parametrize(("width", "std"), [(768, 0.02), (1024, 0.02), (192, 0.04)])
def test_initialisation_is_berts_and_wider_for_narrow_models(width, std):
    model = nn.Sequential(nn.Linear(300, 300), nn.Embedding(300, 300, padding_idx=0), common.LayerNorm(300))
    nn.init.ones_(model[0].bias)
    common.init_weights(model, width)
    for layer in model[:2]:
        assert abs(layer.weight.std().item() - std) < 0.015 * std
        assert abs(layer.weight.mean().item()) < 0.015 * std
    assert (model[0].bias == 0).all()
    assert model[1].weight[0].abs().max() > 0  # the padding row too, as in BERT
    assert (model[2].weight == 1).all()
    assert (model[2].bias == 0).all()


@pytest.mark.parametrize("numbers", [4, 5, 7])
def test_box_projection_starts_with_centre_and_size_alike(numbers):
    """Boxes of the docstring's mean and std: outputs have mean 0 and variance 1, a quarter from each of four numbers."""
    linear = nn.Linear(numbers, 4000)
    common.init_box_projection(linear)
    extra = torch.rand(4000, numbers - 4)

    def project(z):
        """z (4000, 4): centre x, centre y, width, height, standardised."""
        centre = 0.5 + 0.25 * z[:, :2]
        size = 0.25 + 0.1 * z[:, 2:]
        return linear(torch.cat([centre - size / 2, centre + size / 2, extra], 1))  # (4000, P) -> (4000, 4000)

    z = torch.randn(4000, 4)
    out = project(z)
    assert abs(out.mean().item()) < 0.02
    assert abs(out.var().item() - 1) < 0.03
    for i in range(4):
        without = z.clone()
        without[:, i] = 0
        share = (out - project(without)).var().item()
        assert abs(share - 0.25) < 0.02, i


# ---- dropout ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("p", "shape"), [(0.1, (300, 333)), (0.5, (7, 11, 1301)), (0.0, (3, 5)), (1.0, (3, 5))])
def test_dropout_zeroes_a_share_p_and_rescales_the_rest(p, shape):
    x = torch.rand(shape).add(1).requires_grad_()
    torch.manual_seed(0)
    y = common.apply_dropout(x, p)
    zero = y == 0
    sigma = (p * (1 - p) / x.numel()) ** 0.5
    assert abs(zero.float().mean() - p) <= 5 * sigma
    neighbours = (zero.flatten()[1:] & zero.flatten()[:-1]).float().mean()  # independent of each other
    assert abs(neighbours - p * p) <= 10 * sigma
    if p < 1:
        torch.testing.assert_close(y[~zero], (x / (1 - p))[~zero])
    y.sum().backward()
    torch.testing.assert_close(x.grad, y.detach() / x.detach())  # the gradient passes where x does
    torch.manual_seed(0)
    assert common.apply_dropout(x, p).equal(y)
    if 0 < p < 1:
        assert not common.apply_dropout(x, p).equal(y)


@pytest.fixture
def dropouts(monkeypatch):
    """Dropout that zeroes everything; the list receives (p, shape) of each call."""
    calls = []

    def record(x, p):
        if p == 0:
            return x
        calls.append((p, tuple(x.shape)))
        return x * 0

    monkeypatch.setattr(common, "apply_dropout", record)
    return calls


def test_where_dropout_acts_in_an_attention_block(dropouts):
    block = common.AttentionBlock(6, 2, dropout=0.3)
    x = torch.randn(2, 4, 6)
    torch.testing.assert_close(block(x), F.layer_norm(x, (6,), eps=1e-12))  # on the branch, before the residual sum
    assert dropouts == [(0.3, (2, 2, 4, 4)), (0.3, (2, 4, 6))]  # attention probabilities, then the output
    maps = []
    block(x, maps=maps)
    torch.testing.assert_close(maps[0].sum(-1), torch.ones(2, 2, 4))  # recorded before dropout


def test_where_dropout_acts_in_a_feed_forward_block(dropouts):
    block = common.FeedForward(6, 8, dropout=0.2)
    x = torch.randn(2, 4, 6)
    torch.testing.assert_close(block(x), F.layer_norm(x, (6,), eps=1e-12))
    assert dropouts == [(0.2, (2, 4, 6))]


def test_where_dropout_acts_in_a_transformer_layer(dropouts):
    common.TransformerLayer(6, 2, 8, dropout=0.4)(torch.randn(2, 4, 6))
    assert dropouts == [(0.4, (2, 2, 4, 4)), (0.4, (2, 4, 6)), (0.4, (2, 4, 6))]


def test_where_dropout_acts_in_the_text_embedding(dropouts):
    config = SimpleNamespace(vocab_size=11, hidden=6, max_positions=9, types=3, dropout=0.1)
    embedding = common.TextEmbedding(config)
    ids = torch.randint(3, (2, 4))
    assert (embedding(ids, ids) == 0).all()  # last, after the norm
    assert dropouts == [(0.1, (2, 4, 6))]


def test_where_dropout_acts_nowhere(dropouts):
    """Not in the heads, and nowhere in evaluation."""
    x = torch.randn(2, 4, 6)
    common.Pooler(6)(x)
    common.MaskedLMHead(6, 11)(x, torch.randn(11, 6))
    common.mlp_head(6, 8, 3)(x)
    common.TransformerLayer(6, 2, 8, dropout=0.4).eval()(x)
    assert dropouts == []


# ---- losses ----------------------------------------------------------------------------------------------------


def test_positions_are_gathered_from_the_rows_laid_end_to_end():
    states = randn(2, 3, 4)
    got = common.gather_positions(states, torch.tensor([5, 0, 3]))
    close(got, torch.stack([states[1, 2], states[0, 0], states[1, 0]]))


def test_a_masked_mean_leaves_padding_out_and_is_zero_of_nothing():
    states = randn(3, 4, 2)
    states[0, 3] = torch.nan  # padding must not count, whatever it holds
    got = common.masked_mean(states, lengths_mask(4, [3, 4, 0]))
    close(got, torch.stack([states[0, :3].mean(0), states[1].mean(0), torch.zeros(2).double()]))


@pytest.mark.parametrize("model", ["uniter", "lxmert", "vilbert"])
def test_states_are_float32_under_autocast(model):
    """Both streams, in every layer: in bfloat16 the sums of a residual stream would keep 8 bits."""
    _, net = small_model(model)
    net = net.float()
    with torch.autocast("cpu", torch.bfloat16):
        encoding = net.encode(masked_batch(3, 0), record=True)
    states = [encoding.text, encoding.regions, encoding.pooled, *encoding.states.values()]
    assert len(states) > 6 and {state.dtype for state in states} == {torch.float32}


def test_cross_entropy_by_hand():
    logits = randn(5, 7)
    labels = torch.tensor([0, 6, 2, 2, 1])
    total = 0.0
    for row, label in zip(logits, labels.tolist(), strict=True):
        total -= math.log(row[label].exp() / row.exp().sum())
    assert common.cross_entropy(logits, labels).item() == pytest.approx(total / 5)
    assert common.cross_entropy(logits[:0], labels[:0]).item() == 0.0


def test_losses_of_nothing_are_zero():
    nothing = randn(0, 7, requires_grad=True)
    labels = torch.zeros(0, dtype=torch.long)
    total = common.cross_entropy(nothing, labels) + common.squared_error(nothing, nothing.detach())
    total = (
        total
        + common.kl_divergence(nothing, nothing.detach())
        + distillation.soft_label_loss(nothing, nothing.detach())
    )
    total.backward()
    assert total == 0
    assert nothing.grad.shape == (0, 7)


def test_soft_answer_loss_by_hand():
    logits = randn(3, 5)
    targets = torch.rand(3, 5).double()
    total = 0.0
    for x, t in zip(logits.flatten().tolist(), targets.flatten().tolist(), strict=True):
        p = 1 / (1 + math.exp(-x))
        total -= t * math.log(p) + (1 - t) * math.log(1 - p)
    assert common.soft_answer_loss(logits, targets).item() == pytest.approx(total / 3, abs=1e-12)


def test_kl_divergence_by_hand():
    """The sum over rows and classes; classes of probability 0 count as 0, rows need not sum to 1."""
    logits = randn(2, 3)
    targets = torch.tensor([[0.2, 0.0, 0.7], [1.0, 0.0, 0.0]]).double()
    log_probs = logits.log_softmax(1).tolist()
    want = 0.2 * (math.log(0.2) - log_probs[0][0]) + 0.7 * (math.log(0.7) - log_probs[0][2]) - log_probs[1][0]
    assert common.kl_divergence(logits, targets).item() == pytest.approx(want)


def test_squared_error_is_a_mean_over_all_elements():
    a = randn(3, 5)
    b = randn(3, 5)
    close(common.squared_error(a, b), F.mse_loss(a, b))


@pytest.mark.parametrize("rows", [3, 4])  # of a group: a true pair and its mismatched pairs
def test_retrieval_margin_by_hand(rows):
    logits = torch.tensor([[2.0, -1.0, 3.0, 1.9], [0.0, 0.1, -9.0, 0.3], [5.0, -5.0, -5.0, 4.0]])
    logits = logits[:, :rows].double()
    total = 0.0
    for positive, *negatives in logits.sigmoid().tolist():
        for negative in negatives:
            total += max(0, 0.2 + negative - positive)
    model = SimpleNamespace(heads={"rank": nn.Identity()})
    encoding = SimpleNamespace(pooled=logits.view(-1, 1))
    loss, got = common.retrieval_rank(model, encoding, SimpleNamespace(ids=["a", "b", "c"]))
    assert loss.item() == pytest.approx(total / (3 * (rows - 1)))
    assert torch.equal(got, logits.flatten())


# Every loss as a function of x (6, 5). All that a function does to x before the loss is exact in bfloat16.
LABELS = torch.tensor([0, 4, 2, 2, 1, 3])
TARGETS = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)).softmax(1).bfloat16()
KEYS = torch.ones(2, 3, dtype=torch.bool)
QUERIES = torch.ones(1, 6, dtype=torch.bool)


def targets(x, *shape):
    return TARGETS.to(x.dtype).view(*shape)


def attention_losses(x):
    return distillation.attention_loss(x.abs().view(1, 1, 6, 5), targets(x, 1, 1, 6, 5), QUERIES, QUERIES[:, :5])


def transport_distance(x):
    return common.optimal_transport(x.view(2, 3, 5), targets(x, 2, 3, 5), KEYS, KEYS)[0].sum()


LOSSES = {
    "cross_entropy": lambda x: common.cross_entropy(x, LABELS),
    "soft_answer_loss": lambda x: common.soft_answer_loss(x, targets(x, 6, 5)),
    "squared_error": lambda x: common.squared_error(x, targets(x, 6, 5)),
    "kl_divergence": lambda x: common.kl_divergence(x, targets(x, 6, 5)),
    "soft_label_loss": lambda x: distillation.soft_label_loss(x, targets(x, 6, 5)),
    "attention_loss, kl": lambda x: attention_losses(x)[0],
    "attention_loss, mse": lambda x: attention_losses(x)[1],
    "hidden_loss": lambda x: distillation.hidden_loss(x.view(2, 3, 5), targets(x, 2, 3, 5), KEYS),
    "optimal_transport": transport_distance,
    "info_nce": lambda x: contrast.info_nce(x, targets(x, 6, 5), 0.07),
    "hardest_hinge": lambda x: contrast.hardest_hinge(x, targets(x, 6, 5)),
    "sigmoid_contrast": lambda x: contrast.sigmoid_contrast(x, targets(x, 6, 5), 0.1, -10.0),
    "decoupled_contrast": lambda x: contrast.decoupled_contrast(x, targets(x, 6, 5), 0.07),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses_are_float32_under_autocast(name):
    """Logits in bfloat16, as a model has them under autocast: loss and gradient equal those of float64 arithmetic."""
    low = (torch.randn(6, 5) * 2).bfloat16()
    got_logits = low.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = LOSSES[name](got_logits)
    loss.backward()
    want_logits = low.double().requires_grad_()
    want = LOSSES[name](want_logits)
    want.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(want.item(), rel=1e-4, abs=1e-7)
    error = (got_logits.grad.double() - want_logits.grad).abs().max()
    assert error < 2**-7 * want_logits.grad.abs().max()  # the gradient itself is stored in bfloat16


def test_logits_that_rank_are_float32_under_autocast():
    """Pooler, two-layer head, contrast vectors: float32 results from float32 states."""
    states = torch.randn(5, 3, 8)
    mask = torch.ones(5, 3, dtype=torch.bool)
    pooler = common.Pooler(8)
    head = common.mlp_head(8, 8, 2)
    contrast_head = contrast.ContrastHead(8, 8, 4)
    linear = common.Float32Linear(8, 2)
    results = {}
    for autocast in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            results[autocast] = [
                linear(states),
                pooler(states),
                contrast_head.text(states, mask),
                contrast_head.image(states, mask),
            ]
            assert head(states).dtype == torch.float32
    for low, full in zip(results[True], results[False], strict=True):
        assert torch.equal(low, full)
    assert linear(states.bfloat16()).dtype == torch.float32


# ---- optimal transport -----------------------------------------------------------------------------------------


def ipot(cost, beta=0.5, iterations=50):
    """IPOT (Xie 2018, algorithm 1) in plain Python for one pair without padding: cost, n x m nested lists."""
    n = len(cost)
    m = len(cost[0])
    plan = [[1.0] * m for _ in range(n)]
    q = [[1.0] * m for _ in range(n)]
    b = [1.0 / m] * m
    for _ in range(iterations):
        for i in range(n):
            for j in range(m):
                q[i][j] = math.exp(-cost[i][j] / beta) * plan[i][j]
        a = [1 / (n * sum(q[i][j] * b[j] for j in range(m))) for i in range(n)]
        b = [1 / (m * sum(q[i][j] * a[i] for i in range(n))) for j in range(m)]
        for i in range(n):
            for j in range(m):
                plan[i][j] = a[i] * q[i][j] * b[j]
    return sum(plan[i][j] * cost[i][j] for i in range(n) for j in range(m))


@pytest.mark.parametrize("setting", [{}, {"beta": 0.1, "iterations": 7}, {"beta": 1.0, "iterations": 1}])
def test_optimal_transport_equals_the_published_algorithm(setting):
    text = randn(3, 5, 8)
    regions = randn(3, 6, 8)
    words = [5, 2, 1]
    boxes = [3, 6, 1]
    distance, _, cost = common.optimal_transport(
        text, regions, lengths_mask(5, words), lengths_mask(6, boxes), **setting
    )
    for i in range(3):
        n = words[i]
        m = boxes[i]
        close(cost[i, :n, :m], 1 - F.cosine_similarity(text[i, :n, None], regions[i, None, :m], dim=-1))
        by_hand = ipot(cost[i, :n, :m].T.tolist(), **setting)  # regions first, as in the official code
        assert distance[i].item() == pytest.approx(by_hand, abs=1e-12), i


def test_optimal_transport_reaches_the_optimum():
    """Between equal numbers the best plan is a permutation / n (Birkhoff): found by trying all of them."""
    text = randn(2, 5, 8)
    regions = randn(2, 7, 8)
    masks = (lengths_mask(5, [5, 5]), lengths_mask(7, [5, 5]))
    distance, plan, cost = common.optimal_transport(text, regions, *masks, beta=0.05, iterations=3000)
    for i in range(2):
        totals = [cost[i, range(5), list(order)].sum().item() / 5 for order in itertools.permutations(range(5))]
        assert abs(distance[i].item() - min(totals)) < 1e-6
    even = torch.full((2, 5), 0.2, dtype=torch.float64)
    close(plan.sum(2), even, 1e-9)
    close(plan.sum(1)[:, :5], even, 1e-9)
    assert (plan[:, :, 5:] == 0).all()


def test_optimal_transport_ignores_padding():
    text = randn(2, 4, 8)
    regions = randn(2, 3, 8)
    text_mask = lengths_mask(4, [4, 2])
    region_mask = lengths_mask(3, [3, 2])
    want = common.optimal_transport(text, regions, text_mask, region_mask)[0]
    longer_text = torch.cat([text, 1e3 * randn(2, 5, 8)], 1)
    longer_regions = torch.cat([regions, 1e3 * randn(2, 5, 8)], 1)
    masks = (F.pad(text_mask, (0, 5)), F.pad(region_mask, (0, 5)))
    close(common.optimal_transport(longer_text, longer_regions, *masks)[0], want)
    empty = common.optimal_transport(text, regions, torch.zeros_like(text_mask), region_mask)[0]
    assert (empty == 0).all()


def test_optimal_transport_gradient_holds_the_plan_constant():
    text = randn(1, 4, 8, requires_grad=True)
    regions = randn(1, 3, 8)
    distance, plan, _ = common.optimal_transport(text, regions, lengths_mask(4, [3]), lengths_mask(3, [3]))
    (got,) = torch.autograd.grad(distance.sum(), text)
    cost = 1 - F.cosine_similarity(text[:, :, None], regions[:, None], dim=-1)
    (want,) = torch.autograd.grad((plan * cost).sum(), text)
    close(got, want)
    assert (got[0, 3] == 0).all()
    assert got[0, :3].abs().max() > 1e-3


# ---- boxes and metrics -----------------------------------------------------------------------------------------


def pixels(box):
    x1, y1, x2, y2 = box
    return set(itertools.product(range(x1, x2), range(y1, y2)))


def test_iou_by_counting_pixels():
    corners = torch.randint(0, 12, (60, 2, 2, 2))
    boxes = torch.cat([corners.amin(2), corners.amax(2) + 1], -1)  # (60, 2, 4), at least one pixel each
    got = evaluation.iou(boxes[:, 0].double(), boxes[:, 1].double())
    for (a, b), value in zip(boxes.tolist(), got.tolist(), strict=True):
        assert value == pytest.approx(len(pixels(a) & pixels(b)) / len(pixels(a) | pixels(b)), abs=1e-12)
    assert 0 < (got > 0).sum() < 60


def test_iou_of_boxes_that_touch_or_are_empty():
    boxes = torch.tensor([[0.0, 0, 2, 2], [2, 0, 4, 2], [1, 1, 3, 3], [5, 5, 5, 5]])
    want = [[1, 0, 1 / 7, 0], [0, 1, 1 / 7, 0], [1 / 7, 1 / 7, 1, 0], [0, 0, 0, 0]]
    close(evaluation.iou(boxes[:, None], boxes[None]), torch.tensor(want), 1e-6)  # broadcast: (4, 4)


def test_recall_equals_counting_in_sorted_lists():
    scores, truth = randn(30, 12), torch.randint(0, 11, (30,))  # picture 11 has no text
    got = evaluation.recall_at(scores, truth, ks=(1, 3, 10))
    for k in (1, 3, 10):
        to_image = [i in sorted(range(12), key=lambda j: -scores[t, j])[:k] for t, i in enumerate(truth.tolist())]
        assert got[f"text_to_image_r{k}"] == pytest.approx(sum(to_image) / 30)
        to_text = [
            any(truth[t] == i for t in sorted(range(30), key=lambda t: -scores[t, i])[:k])
            for i in sorted(set(truth.tolist()))
        ]
        assert got[f"image_to_text_r{k}"] == pytest.approx(sum(to_text) / len(to_text))


def test_recall_of_perfect_useless_and_reversed_scores():
    truth = torch.arange(4)
    assert set(evaluation.recall_at(torch.eye(4), truth, ks=(1,)).values()) == {1.0}
    for useless, chance in ((torch.zeros(4, 4), 0.25), (torch.full((4, 4), torch.nan), 0.25), (-torch.eye(4), 0.0)):
        assert set(evaluation.recall_at(useless, truth, ks=(1,)).values()) == {chance}


def test_rename_applies_the_rules_in_order():
    assert formats.rename("a.b.c", [("a.b", "x"), ("x.c", "y"), ("a", "z")]) == "y"


# ---- messages --------------------------------------------------------------------------------------------------


def test_user_error_is_one_line():
    assert str(common.UserError("a.jsonl:\n  line 3\tis wrong")) == "a.jsonl: line 3 is wrong"
