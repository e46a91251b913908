"""uniter.py: published sizes, symmetries, BERT as an oracle, and what each objective learns. test_golden.py compares
numbers with the official code."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import checkpoints
import common
import data
import uniter
from support import formats

B, T, N, F_SIZE, V, K, A = 4, 6, 5, 10, 23, 7, 9
NAMED = ("mlm", "mrfr", "mrc", "itm", "vqa", "nlvr2", "vcr", "rank", "refer")  # not ve: its official name is vqa's
HEADS = (*NAMED, "ve", "itc")


def tiny(dtype=torch.float64, **changes):
    """A small model whose parameters are far from zero, so that every term of a formula shows."""
    options = {
        "hidden": 16,
        "layers": 2,
        "attention_heads": 4,
        "intermediate": 32,
        "max_positions": 20,
        "dropout": 0.0,
        "vocab_size": V,
        "types": 4,
        "feature_size": F_SIZE,
        "classes": K,
        "answers": A,
        "heads": HEADS,
    }
    options.update(changes)
    model = uniter.UNITER(uniter.Config(**options)).to(dtype)
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def batch_of(rows=B, text=(T, 4, 5, 6), regions=(N, 5, 3, 4), dtype=torch.float64, **changes):
    """A random batch: text[i] words and regions[i] regions in row i. All targets are filled in."""
    corner = torch.rand(rows, N, 2, dtype=dtype) * 0.5
    size = torch.rand(rows, N, 2, dtype=dtype) * 0.5
    features = torch.randn(rows, N, F_SIZE, dtype=dtype)
    fields = {
        "ids": ["a", "b"],  # two groups of two rows, for rank
        "text": torch.randint(1, V, (rows, T)),
        "text_mask": torch.arange(T) < torch.tensor(text)[:rows, None],
        "segments": torch.zeros(rows, T, dtype=torch.long),
        "features": features,
        "boxes": torch.cat([corner, corner + size], -1),
        "region_mask": torch.arange(N) < torch.tensor(regions)[:rows, None],
        "region_types": None,
        "masked_regions": None,
        "word_index": torch.arange(rows) * T + 1,
        "word_labels": torch.randint(1, V, (rows,)),
        "region_index": torch.arange(rows) * N + 1,
        "clean_features": features,
        "object_probs": torch.rand(rows, N, K, dtype=dtype).softmax(-1),
        "matched": torch.arange(rows) % 2,
        "answers": torch.rand(rows, A, dtype=dtype),
        "pictures": torch.arange(rows),
        "pair_index": torch.arange(rows),
        "target": torch.arange(rows) % 2,
    }
    fields.update(changes)
    return data.Batch(**fields)


def changed(batch, **changes):
    """A copy of a batch with other values in some fields."""
    return replace(batch, **changes)


def close(a, b, tolerance=1e-11):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=0)


# ---- sizes and names -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "millions", "tensors"), [("base", 112.94, 230), ("large", 340.52, 422)])
def test_sizes_are_the_published_ones(size, millions, tensors):
    """The parameters that the pretrained checkpoints have, counted without allocating them."""
    with torch.device("meta"):
        model = uniter.UNITER(uniter.Config(**uniter.PRESETS[size]))
    unused = model.config.feature_size  # row 0 of the official mask embedding, which is always zero
    total = sum(p.numel() for p in model.parameters()) + unused
    assert round(total / 1e6, 2) == millions
    official = formats.uniter_to_official(dict(model.named_parameters()))
    assert len(official) == tensors  # two of them tied
    hidden = model.config.hidden
    assert official["uniter.embeddings.word_embeddings.weight"].shape == (28996, hidden)
    assert official["uniter.img_embeddings.mask_embedding.weight"].shape == (2, 2048)
    assert official["uniter.img_embeddings.pos_linear.weight"].shape == (hidden, 7)
    assert official["region_classifier.net.3.weight"].shape == (1601, hidden)
    last = model.config.layers - 1
    assert official[f"uniter.encoder.layer.{last}.attention.output.LayerNorm.weight"].shape == (hidden,)


def test_official_names_come_back_as_ours():
    state = tiny(heads=NAMED).state_dict()
    official = formats.uniter_to_official(state)
    back, unexpected = formats.uniter_from_official(official, state)
    assert not unexpected and set(back) == set(state)
    assert all(torch.equal(back[name], state[name]) for name in state)
    assert official["attn1.in_proj_weight"].shape == (48, 16)


@pytest.mark.parametrize(
    "spell",
    [
        lambda name: "module." + name,
        lambda name: name.replace("uniter.", "bert."),
        lambda name: name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"),
        lambda name: "module." + name.replace("uniter.", "bert.").replace("LayerNorm.weight", "LayerNorm.gamma"),
    ],
    ids=["module", "bert", "gamma-beta", "all"],
)
def test_official_names_are_read_in_other_spellings(spell):
    state = tiny(heads=NAMED).state_dict()
    official = {spell(name): tensor for name, tensor in formats.uniter_to_official(state).items()}
    back, unexpected = formats.uniter_from_official(
        official | {"cls.seq_relationship.weight": torch.zeros(2, 16)}, state
    )
    assert set(back) == set(state) and unexpected == ["cls.seq_relationship.weight"]
    assert all(torch.equal(back[name], state[name]) for name in state)


def test_the_table_of_types_is_widened_as_the_official_code_does():
    name = "text_embedding.types.weight"
    table = torch.randn(2, 3)
    for task, rows in (("nlvr2", [0, 1, 1]), ("vcr", [0, 1, 0, 0])):
        wanted = {name: torch.zeros(len(rows), 3)}
        got = checkpoints.widen_text_types({name: table}, wanted, uniter.text_types([task]), checkpoints.Report(""))
        assert torch.equal(got[name], table[rows])


# ---- encoder ---------------------------------------------------------------------------------------------------


def test_text_only_is_bert():
    """The same weights in Hugging Face's BertModel, which nobody here wrote."""
    transformers = pytest.importorskip("transformers")
    model, batch = tiny(torch.float32, heads=NAMED).eval(), batch_of()
    config = transformers.BertConfig(
        vocab_size=V,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=32,
        max_position_embeddings=20,
        type_vocab_size=4,
        layer_norm_eps=1e-12,
    )
    bert = transformers.BertModel(config).eval()
    state = {n.removeprefix("uniter."): t for n, t in formats.uniter_to_official(model.state_dict()).items()}
    missing, _ = bert.load_state_dict(state, strict=False)
    assert not [name for name in missing if "position_ids" not in name]
    with torch.no_grad():
        got = model.encode(batch, regions=False)
        want = bert(batch.text, batch.text_mask.long(), batch.segments)
    close(got.text[batch.text_mask], want.last_hidden_state[batch.text_mask], 1e-5)
    close(got.pooled, want.pooler_output, 1e-5)
    assert got.regions is None


def test_text_only_equals_joint_with_all_regions_hidden():
    model = tiny()
    batch = batch_of()
    alone = model.encode(batch, regions=False)
    joint = model.encode(changed(batch, region_mask=torch.zeros_like(batch.region_mask)))
    close(joint.text[batch.text_mask], alone.text[batch.text_mask])
    close(joint.pooled, alone.pooled)


def test_regions_only_equals_joint_with_all_words_hidden():
    model = tiny()
    batch = batch_of()
    alone = model.encode(batch, text=False)
    joint = model.encode(changed(batch, text_mask=torch.zeros_like(batch.text_mask)))
    close(joint.regions[batch.region_mask], alone.regions[batch.region_mask])
    assert alone.text is None


def test_given_embeddings_are_used_and_change_nothing():
    model = tiny()
    batch = batch_of()
    given = model.unimodal(batch)
    close(model.encode(batch, given=given).pooled, model.encode(batch).pooled)
    other = (given[0] + 1.0, given[1])
    assert (model.encode(batch, given=other).pooled - model.encode(batch).pooled).abs().max() > 1e-3


def test_regions_are_a_set_and_words_are_not():
    """Regions in another order: the same regions in that order, the same words. Words in another order: other words."""
    model = tiny()
    batch = batch_of(regions=[N] * B)
    order = torch.arange(N).roll(2)
    before = model.encode(batch)
    rolled = changed(batch, features=batch.features[:, order], boxes=batch.boxes[:, order])
    after = model.encode(rolled)
    close(after.regions, before.regions[:, order])
    close(after.text, before.text)
    swapped = [1, 0, *range(2, T)]
    other = model.encode(changed(batch, text=batch.text[:, swapped]))
    assert (other.text - before.text[:, swapped]).abs().max() > 1e-3


def test_words_and_regions_attend_to_each_other():
    model = tiny()
    batch = batch_of()
    before = model.encode(batch)
    other_picture = model.encode(changed(batch, features=torch.randn_like(batch.features)))
    other_text = model.encode(changed(batch, text=(batch.text + 1) % V))
    assert (other_picture.text - before.text).abs().amax((1, 2)).min() > 1e-3
    assert (other_text.regions - before.regions).abs().amax((1, 2)).min() > 1e-3


def test_second_picture_has_a_type_of_its_own():
    model = tiny()
    batch = batch_of()
    plain = model.embed_regions(batch)
    left = torch.zeros_like(batch.region_mask).long()
    close(model.embed_regions(changed(batch, region_types=left)), plain)
    assert (model.embed_regions(changed(batch, region_types=left + 1)) - plain).abs().max() > 1e-3


def test_region_embedding_by_the_formula():
    """The type is added after the two inner norms, the mask vector before the linear map."""

    def norm(x):
        return F.layer_norm(x, (16,), eps=1e-12)

    model = tiny()
    part = model.region_embedding
    masked = torch.rand(B, N) < 0.5
    batch = batch_of(masked_regions=masked)
    x1, y1, x2, y2 = batch.boxes.unbind(-1)
    box = torch.stack([x1, y1, x2, y2, x2 - x1, y2 - y1, (x2 - x1) * (y2 - y1)], -1)
    feature_emb = part.features(torch.where(masked[:, :, None], batch.features + part.mask, batch.features))
    want = norm(norm(feature_emb) + norm(part.boxes(box)) + model.text_embedding.types.weight[1])
    close(model.embed_regions(batch), want)


def test_decoding_word_by_word_equals_decoding_at_once():
    model = tiny()
    batch = batch_of()
    want = model.decode(batch)
    cache = {}
    for i in range(T):
        next_word = changed(batch, text=batch.text[:, i : i + 1], segments=batch.segments[:, i : i + 1])
        close(model.decode(next_word, cache)[:, 0], want[:, i])


def test_decoding_sees_the_regions_and_no_later_word():
    model = tiny()
    batch = batch_of()
    before = model.decode(batch)
    text = batch.text.clone()
    text[:, 3] = (text[:, 3] + 1) % V
    after = model.decode(changed(batch, text=text))
    close(after[:, :3], before[:, :3])
    assert (after[:, 3:] - before[:, 3:]).abs().amax(2).min() > 1e-3
    other_picture = model.decode(changed(batch, features=torch.randn_like(batch.features)))
    assert (other_picture - before).abs().amax(2).min() > 1e-3


def test_recording_changes_nothing_and_maps_sum_to_one():
    model = tiny()
    batch = batch_of()
    plain = model.encode(batch)
    recorded = model.encode(batch, record=True)
    close(plain.text, recorded.text)
    close(recorded.states["layer.1"], torch.cat([recorded.text, recorded.regions], 1))
    assert set(recorded.states) == {"embedding", "layer.0", "layer.1"}
    assert set(recorded.maps) == {"layer.0", "layer.1"}
    assert not plain.states
    assert not plain.maps
    maps = recorded.maps["layer.1"]
    visible = torch.cat([batch.text_mask, batch.region_mask], 1)
    close(maps.sum(-1), torch.ones(B, 4, T + N).double())
    assert (maps.transpose(1, 3)[~visible] == 0).all()
    assert (maps.transpose(1, 3)[visible] > 0).all()


# ---- dropout ---------------------------------------------------------------------------------------------------


@pytest.fixture
def dropouts(monkeypatch):
    """A list that receives (p, shape) of each call of dropout with p > 0. Nothing is dropped."""
    calls = []

    def record(x, p):
        if p > 0:
            calls.append((p, tuple(x.shape)))
        return x

    monkeypatch.setattr(common, "apply_dropout", record)
    return calls


TEXT_DROPOUT = (0.3, (B, T, 16))
REGION_DROPOUT = (0.3, (B, N, 16))
LAYER_DROPOUT = [
    (0.3, (B, 4, T + N, T + N)),  # attention probabilities
    (0.3, (B, T + N, 16)),  # output of the attention
    (0.3, (B, T + N, 16)),  # output of the feed-forward
]


def test_where_dropout_acts_in_the_encoder(dropouts):
    """The official code: after both embeddings, and at three places in each layer, all with one rate."""
    tiny(dropout=0.3).train().encode(batch_of())
    assert dropouts == [TEXT_DROPOUT, REGION_DROPOUT, *LAYER_DROPOUT, *LAYER_DROPOUT]


def test_dropout_is_last_in_the_region_embedding(dropouts, monkeypatch):
    monkeypatch.setattr(common, "apply_dropout", lambda x, p: x * 0)
    assert (tiny(dropout=0.3).train().embed_regions(batch_of()) == 0).all()


@pytest.mark.parametrize("name", [*uniter.OBJECTIVES, "nlvr2-paired"])
def test_heads_have_no_dropout_but_the_paired_attention(dropouts, name):
    name, _, wiring = name.partition("-")
    model = tiny(dropout=0.3, nlvr2=wiring or "paired-attention").train()
    batch = batch_of()
    if name == "nlvr2":
        batch.target = batch.target[:2]
    if name == "refer":
        batch.target = F.one_hot(batch.target, N)
    if name == "ve":
        batch.answers = batch.answers[:, :3]
    encoding = model.encode(batch)
    dropouts.clear()
    uniter.OBJECTIVES[name].loss(model, encoding, batch)
    if name == "nlvr2" and not wiring:
        probs = (0.3, (2, 4, T + N, T + N))
        joined = (0.3, (2, T + N, 16))
        pooling = (0.3, (2, T + N, 1))  # the weights of the pooling, as in the official code
        assert sorted(dropouts) == sorted([probs, probs, joined, joined, pooling, pooling])  # left and right each
    elif name not in ("itc", "caption"):  # these two encode the batch themselves
        assert dropouts == []


def test_evaluation_has_no_dropout(dropouts):
    tiny(dropout=0.3).eval().encode(batch_of())
    assert dropouts == []


def test_default_rate_of_dropout_is_the_papers():
    assert uniter.Config().dropout == 0.1


# ---- objectives and heads --------------------------------------------------------------------------------------


def nlvr2_batch(wiring, **changes):
    """Two statements, each with two pictures: four rows, or two rows with the regions of both."""
    if wiring != "triplet":
        return batch_of(target=torch.tensor([0, 1]), **changes)
    region_types = torch.tensor([[0, 0, 0, 1, 1], [0, 1, 1, 1, 1]])
    return batch_of(2, target=torch.tensor([0, 1]), region_types=region_types, **changes)


def learning_batch(name, wiring):
    """Four examples that a model can learn by heart, with the targets of one objective."""
    if name == "nlvr2":
        batch = nlvr2_batch(wiring, dtype=torch.float32)
    else:
        batch = batch_of(dtype=torch.float32)
    if name == "mrc_kl":
        batch.object_probs = F.one_hot(torch.randint(K, (B, N)), K).float()  # entropy 0: the least KL is 0
    if name == "vqa":
        batch.answers = F.one_hot(torch.randint(3, (B,)), A).float()
    if name == "ve":
        batch.answers = F.one_hot(torch.randint(3, (B,)), 3).float()
    if name == "refer":
        batch.target = F.one_hot(batch.target, N)
    if name in ("mrfr", "mrc", "mrc_kl"):
        batch.masked_regions = F.one_hot(torch.full((B,), 1), N).bool()
        batch.features = batch.features.masked_fill(batch.masked_regions[:, :, None], 0.0)
    return batch


def assert_all_parts_have_gradients(model, name):
    """Both embeddings, and every parameter of the objective's head."""
    head = uniter.OBJECTIVES[name].head
    for parameter_name, parameter in model.named_parameters():
        if head is not None and parameter_name.startswith(f"heads.{head}."):
            assert parameter.grad is not None, parameter_name
    assert model.region_embedding.features.weight.grad.abs().max() > 0
    assert model.text_embedding.words.weight.grad.abs().max() > 0


@pytest.mark.parametrize("name", [*uniter.OBJECTIVES, "nlvr2-paired", "nlvr2-triplet"])
def test_objective_learns_four_examples(name):
    """The loss falls to near its least value, and the logits mean what the docstring says."""
    name, _, wiring = name.partition("-")
    wiring = wiring or "paired-attention"
    model = uniter.UNITER(tiny(nlvr2=wiring).config)  # with the real initialisation
    batch = learning_batch(name, wiring)
    least = -0.6 if name == "wra" else 0.0  # distances lie in 0..2
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    first = None
    for _ in range(150):
        loss, logits = uniter.OBJECTIVES[name].loss(model, model.encode(batch), batch)
        optimizer.zero_grad()
        loss.backward()
        if first is None:
            first = loss.item()
            assert_all_parts_have_gradients(model, name)
        optimizer.step()
        if loss.item() < least + 0.03 * abs(first - least):
            break
    assert loss.item() < least + 0.1 * abs(first - least), f"{first:.3f} -> {loss.item():.3f}"
    if name == "itm":
        assert logits.argmax(1).tolist() == batch.matched.tolist()
    if name == "nlvr2":
        assert logits.argmax(1).tolist() == batch.target.tolist()
    if name == "refer":
        assert logits.argmax(1).tolist() == batch.target.argmax(1).tolist()
    if name == "vcr":
        assert (logits > logits.mean()).long().tolist() == batch.target.tolist()  # the logit of "right"
    if name == "rank":
        assert (logits.view(2, 2)[:, 0] > logits.view(2, 2)[:, 1]).all()
    if name == "wra":
        assert logits[batch.matched == 1].max() < logits[batch.matched == 0].min()


class FixedHead(torch.nn.Module):
    """A head that returns the same logits whatever it is given."""

    def __init__(self, logits):
        super().__init__()
        self.logits = logits

    def forward(self, *inputs):
        return self.logits


def loss_of_logits(name, logits, **changes):
    """The loss of an objective whose head returns these logits, one row for each of the batch's items."""
    model = tiny()
    model.heads[uniter.OBJECTIVES[name].head] = FixedHead(logits)
    batch = batch_of(**changes)
    return uniter.OBJECTIVES[name].loss(model, model.encode(batch), batch)[0], batch


def test_masked_language_modelling_by_hand():
    logits = torch.randn(B, V).double()
    loss, batch = loss_of_logits("mlm", logits)
    close(loss, -logits.log_softmax(1)[range(B), batch.word_labels].mean())


def test_masked_region_features_by_hand():
    predictions = torch.randn(B, F_SIZE).double()
    loss, batch = loss_of_logits("mrfr", predictions)
    close(loss, (predictions - batch.clean_features[:, 1]).square().mean())  # over regions and F


def test_masked_region_class_leaves_background_out():
    logits = torch.randn(B, K).double()
    object_probs = torch.rand(B, N, K).double()
    object_probs[:, :, 0] = 1e3  # background above all: not a label
    loss, batch = loss_of_logits("mrc", logits, object_probs=object_probs)
    labels = batch.object_probs[:, 1, 1:].argmax(-1) + 1
    close(loss, F.cross_entropy(logits, labels))
    assert uniter.OBJECTIVES["mrc"].labels(batch, logits).equal(labels)


def test_masked_region_class_kl_is_a_mean_over_regions_and_classes():
    logits = torch.randn(B, K).double()
    loss, batch = loss_of_logits("mrc_kl", logits)
    targets = batch.object_probs[:, 1]
    close(loss, (targets * (targets.log() - logits.log_softmax(1))).mean())


def test_image_text_matching_class_one_is_a_match():
    logits = torch.tensor([[0.0, 20.0]]).double().expand(B, 2)
    assert loss_of_logits("itm", logits, matched=torch.ones(B, dtype=torch.long))[0] < 1e-6
    assert loss_of_logits("itm", logits, matched=torch.zeros(B, dtype=torch.long))[0] > 19


def test_word_region_alignment_adds_true_pairs_and_subtracts_false_ones():
    model = tiny()
    batch = batch_of(matched=torch.tensor([1, 0, 1, 1]))
    loss, distances = model(batch, ["wra"])["wra"]
    close(loss, (distances[0] - distances[1] + distances[2] + distances[3]) / 4)
    assert (distances > 0).all()


def test_rank_loss_compares_within_groups_of_three():
    logits = torch.tensor([2.0, -1.0, 3.0, 0.0, 0.1, -9.0]).double()
    model = tiny()
    model.heads["rank"] = FixedHead(logits[:, None])
    loss, got = uniter.OBJECTIVES["rank"].loss(model, SimpleNamespace(pooled=None), SimpleNamespace(ids=["a", "b"]))
    close(got, logits)
    probs = logits.sigmoid().tolist()
    total = 0.0
    for positive in (0, 3):
        for negative in (positive + 1, positive + 2):
            total += max(0, 0.2 + probs[negative] - probs[positive])
    assert loss.item() == pytest.approx(total / 4)


def test_refer_logits_hide_padding():
    model = tiny()
    batch = batch_of()
    label = batch.target
    batch.target = F.one_hot(label, N) * 0.4 + 0.1  # the largest overlap is the label
    loss, logits = model(batch, ["refer"])["refer"]
    assert (logits[~batch.region_mask] == -10000).all()
    assert (logits[batch.region_mask].abs() < 100).all()
    close(loss, F.cross_entropy(logits, label))


def test_nothing_masked_is_zero_and_not_nan():
    nothing = torch.zeros(0, dtype=torch.long)
    model = tiny()
    batch = batch_of(word_index=nothing, word_labels=nothing, region_index=nothing)
    total = 0.0
    for loss, _ in model(batch, ["mlm", "mrfr", "mrc", "mrc_kl"]).values():
        assert loss == 0
        total = total + loss
    total.backward()
    for parameter in model.parameters():
        assert parameter.grad is None or (parameter.grad == 0).all()


def padded(batch, more):
    """The same batch in longer rows. Whatever the masks call padding holds large random values."""

    def pad(values, mask, noise):
        """values (B, S, ...), mask (B, S), noise (B, S + more, ...)"""
        real = F.pad(mask, (0, more)).view(B, -1, *[1] * (values.ndim - 2))
        longer = noise.clone()
        longer[:, : values.shape[1]] = values
        return torch.where(real, longer, noise)

    wide = changed(batch)
    for field in ("features", "boxes", "clean_features", "object_probs"):
        values = getattr(batch, field)
        noise = 1e3 * torch.randn(B, N + more, values.shape[2], dtype=values.dtype)
        setattr(wide, field, pad(values, batch.region_mask, noise))
    wide.text = pad(batch.text, batch.text_mask, torch.randint(0, V, (B, T + more)))
    wide.segments = pad(batch.segments, batch.text_mask, torch.randint(0, 4, (B, T + more)))
    wide.text_mask = F.pad(batch.text_mask, (0, more))
    wide.region_mask = F.pad(batch.region_mask, (0, more))
    wide.word_index = torch.arange(B) * (T + more) + 1
    wide.region_index = torch.arange(B) * (N + more) + 1
    return wide


@pytest.mark.parametrize("name", uniter.OBJECTIVES)
def test_objective_ignores_padding(name):
    """Longer rows: the same loss, the same gradients."""
    model = tiny()
    batch = batch_of()
    if name == "nlvr2":
        batch.target = batch.target[:2]
    if name == "refer":
        batch.target = F.one_hot(batch.target, N)
    if name == "ve":
        batch.answers = batch.answers[:, :3]
    results = []
    for some in (batch, padded(batch, 3)):
        loss, _ = uniter.OBJECTIVES[name].loss(model, model.encode(some), some)
        model.zero_grad()
        loss.backward()
        gradients = [loss.detach()]
        for parameter in model.parameters():
            if parameter.grad is not None:
                gradients.append(parameter.grad.clone())
        results.append(gradients)
    for one, other in zip(*results, strict=True):
        close(one, other, 1e-10)


@pytest.mark.parametrize("name", uniter.OBJECTIVES)
def test_losses_are_float32_under_autocast(name):
    """The loss from the logits that the head really gave is that of float64 arithmetic; ranking logits are float32."""
    model = tiny(torch.float32)
    batch = batch_of(dtype=torch.float32)
    if name == "nlvr2":
        batch.target = batch.target[:2]
    if name == "refer":
        batch.target = F.one_hot(batch.target, N)
    if name == "ve":
        batch.answers = batch.answers[:, :3]
    with torch.autocast("cpu", torch.bfloat16):
        loss, logits = uniter.OBJECTIVES[name].loss(model, model.encode(batch), batch)
    assert loss.dtype == torch.float32
    if name in ("itm", "itc", "rank", "refer", "vcr"):
        assert logits.dtype == torch.float32
    if name in ("mrfr", "mrc_kl"):
        logits = logits.double()
        if name == "mrfr":
            want = (logits - batch.clean_features[:, 1].double()).square().mean()
        else:
            targets = batch.object_probs[:, 1].double()
            want = (targets * (targets.log() - logits.log_softmax(1))).mean()
        assert loss.item() == pytest.approx(want.item(), rel=1e-5)


def test_feature_regression_is_tied_to_the_region_embedding():
    model = tiny()
    batch = batch_of()
    _, predictions = model(batch, ["mrfr"])["mrfr"]
    head = model.heads["mrfr"]
    hidden = head.transform(model.encode(batch).regions[:, 1])
    close(predictions, hidden @ model.region_embedding.features.weight + head.bias)


@pytest.mark.parametrize("wiring", ["paired", "paired-attention", "triplet"])
def test_nlvr2_reads_both_pictures_of_its_own_statement(wiring):
    model = tiny(nlvr2=wiring)
    batch = nlvr2_batch(wiring)
    logits = model(batch, ["nlvr2"])["nlvr2"][1]
    assert logits.shape == (2, 2)
    pictures = [(0, 0), (0, 4)] if wiring == "triplet" else [(0, 0), (1, 0)]  # row and region of the first statement
    for row, region in pictures:
        features = batch.features.clone()
        features[row, region] += 1.0
        moved = model(changed(batch, features=features), ["nlvr2"])["nlvr2"][1] - logits
        assert moved[0].abs().max() > 1e-4
        assert moved[1].abs().max() < 1e-12


@pytest.mark.parametrize("wiring", ["paired", "paired-attention", "triplet"])
def test_nlvr2_depends_on_which_picture_is_left(wiring):
    model = tiny(nlvr2=wiring)
    batch = nlvr2_batch(wiring)
    if wiring == "triplet":
        swapped = changed(batch, region_types=1 - batch.region_types)
    else:
        order = torch.tensor([1, 0, 3, 2])
        swapped = changed(
            batch,
            features=batch.features[order],
            boxes=batch.boxes[order],
            region_mask=batch.region_mask[order],
        )
    difference = model(swapped, ["nlvr2"])["nlvr2"][1] - model(batch, ["nlvr2"])["nlvr2"][1]
    assert difference.abs().min() > 1e-5


# ---- tables ----------------------------------------------------------------------------------------------------


def test_pretraining_is_the_official_recipe():
    recipe = uniter.PRETRAINING
    assert recipe["conditional"]
    assert recipe["joined"] == {"itm": ("wra",)}
    assert recipe["loss_weights"] == {"wra": 0.1}
    assert recipe["region_masking"] == {"zero": 1.0, "random": 0.0}  # no 80/10/10 for regions
    assert recipe["mismatched_share"] == 0.5
    assert recipe["mismatch"] == "image"  # negatives replace the picture only
    assert recipe["rate"] == 1.0
    assert set(recipe["objectives"]) | {"wra"} <= set(uniter.OBJECTIVES)


@pytest.mark.parametrize(
    ("tasks", "rows"), [(["pretrain"], 2), (["vqa", "nlvr2"], 3), (["nlvr2", "vcr"], 4), (["vcr"], 4)]
)
def test_the_table_of_types_has_a_row_for_each_type(tasks, rows):
    assert len(uniter.text_types(tasks)) == rows


def test_two_heads_with_one_official_name_are_refused():
    with pytest.raises(ValueError, match="vqa and ve"):
        formats.uniter_to_official(tiny(heads=("vqa", "ve")).state_dict())


def test_the_head_of_refer_has_one_layer_or_two():
    for layers, linears in ((1, 1), (2, 2)):
        head = uniter.refer_head(uniter.Config(hidden=8, refer_layers=layers))
        assert sum(isinstance(module, torch.nn.Linear) for module in head.modules()) == linears
    with pytest.raises(ValueError, match="refer_layers is 3; it must be 1 or 2"):
        uniter.refer_head(uniter.Config(hidden=8, refer_layers=3))
