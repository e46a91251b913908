"""uniter.py: sizes, symmetries, what each objective learns, and BERT itself. Equality with the official code, number by
number, is in test_golden.py."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import checkpoints
import uniter

B, T, N, F_SIZE, V, K, A = 4, 6, 5, 10, 23, 7, 9
NAMED = ("mlm", "mrfr", "mrc", "itm", "vqa", "nlvr2", "vcr", "rank", "refer")  # not ve, officially named as vqa is
HEADS = (*NAMED, "ve", "itc")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def tiny(dtype=torch.float64, **changes):
    sizes = {"hidden": 16, "layers": 2, "attention_heads": 4, "intermediate": 32, "max_positions": 20, "dropout": 0.0}
    sizes |= {"vocab_size": V, "types": 4, "feature_size": F_SIZE, "classes": K, "answers": A, "heads": HEADS}
    model = uniter.UNITER(uniter.Config(**sizes | changes)).to(dtype)
    for name, parameter in model.named_parameters():  # far from zero, so that every term shows
        if "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def batch_of(rows=B, text=None, regions=None, dtype=torch.float64, **changes):
    """A random batch: text[i] pieces and regions[i] regions in row i, everything to predict filled in."""
    text, regions = torch.tensor(text or [T, 4, 5, 6][:rows]), torch.tensor(regions or [N, 5, 3, 4][:rows])
    corner, size = torch.rand(rows, N, 2, dtype=dtype) * 0.5, torch.rand(rows, N, 2, dtype=dtype) * 0.5
    features = torch.randn(rows, N, F_SIZE, dtype=dtype)
    fields = {
        "text": torch.randint(1, V, (rows, T)),
        "text_mask": torch.arange(T) < text[:, None],
        "segments": torch.zeros(rows, T, dtype=torch.long),
        "features": features,
        "boxes": torch.cat([corner, corner + size], -1),
        "region_mask": torch.arange(N) < regions[:, None],
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
    return SimpleNamespace(**fields | changes)


def rows(batch, index):
    return SimpleNamespace(**{n: v if v is None or n.endswith("_index") else v[index] for n, v in vars(batch).items()})


def close(a, b, tolerance=1e-11):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=0)


# ---- sizes and names -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "millions", "tensors"), [("base", 112.94, 230), ("large", 340.52, 422)])
def test_published_sizes(size, millions, tensors):
    """The parameters that the pretrained checkpoints have, counted without allocating them."""
    with torch.device("meta"):
        model = uniter.UNITER(uniter.Config(**uniter.PRESETS[size]))
    unused = model.config.feature_size  # row 0 of the official mask embedding, which is always zero
    total = sum(p.numel() for p in model.parameters()) + unused
    assert round(total / 1e6, 2) == millions
    official = checkpoints.uniter_to_official(dict(model.named_parameters()))
    assert len(official) == tensors  # two of them tied
    hidden = model.config.hidden
    assert official["uniter.embeddings.word_embeddings.weight"].shape == (28996, hidden)
    assert official["uniter.img_embeddings.mask_embedding.weight"].shape == (2, 2048)
    assert official["uniter.img_embeddings.pos_linear.weight"].shape == (hidden, 7)
    assert official["region_classifier.net.3.weight"].shape == (1601, hidden)
    last = model.config.layers - 1
    assert official[f"uniter.encoder.layer.{last}.attention.output.LayerNorm.weight"].shape == (hidden,)


def test_official_names_round_trip():
    state = tiny(heads=NAMED).state_dict()
    official = checkpoints.uniter_to_official(state)
    back, unexpected = checkpoints.uniter_from_official(official, state)
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
def test_official_names_in_other_spellings(spell):
    state = tiny(heads=NAMED).state_dict()
    official = {spell(name): tensor for name, tensor in checkpoints.uniter_to_official(state).items()}
    back, unexpected = checkpoints.uniter_from_official(
        official | {"cls.seq_relationship.weight": torch.zeros(2, 16)}, state
    )
    assert set(back) == set(state) and unexpected == ["cls.seq_relationship.weight"]
    assert all(torch.equal(back[name], state[name]) for name in state)


def test_transfer():
    table = torch.randn(2, 3)
    assert torch.equal(checkpoints.widen_types(table, 3, copy=1), table[[0, 1, 1]])
    assert torch.equal(checkpoints.widen_types(table, 4, copy=0), table[[0, 1, 0, 0]])
    head = torch.nn.Linear(3, 2)
    weight, bias = checkpoints.rank_from_itm(head.weight, head.bias)
    x = torch.randn(5, 3)
    close(F.linear(x, weight, bias), head(x)[:, 1:], 1e-6)  # the score of "match"


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
    state = {n.removeprefix("uniter."): t for n, t in checkpoints.uniter_to_official(model.state_dict()).items()}
    missing, _ = bert.load_state_dict(state, strict=False)
    assert not [name for name in missing if "position_ids" not in name]
    with torch.no_grad():
        got = model.encode(batch, regions=False)
        want = bert(batch.text, batch.text_mask.long(), batch.segments)
    close(got.text[batch.text_mask], want.last_hidden_state[batch.text_mask], 1e-5)
    close(got.pooled, want.pooler_output, 1e-5)
    assert got.regions is None


def test_text_only_equals_joint_with_all_regions_hidden():
    model, batch = tiny(), batch_of()
    alone = model.encode(batch, regions=False)
    batch.region_mask = torch.zeros_like(batch.region_mask)
    joint = model.encode(batch)
    close(joint.text[batch.text_mask], alone.text[batch.text_mask])
    close(joint.pooled, alone.pooled)


def test_regions_only_equals_joint_with_all_words_hidden():
    model, batch = tiny(), batch_of()
    alone = model.encode(batch, text=False)
    batch.text_mask = torch.zeros_like(batch.text_mask)
    close(model.encode(batch).regions[batch.region_mask], alone.regions[batch.region_mask])
    assert alone.text is None


def test_regions_are_a_set():
    """Regions in another order: the same regions in that order, the same words. Words in another order: not so."""
    model, batch = tiny(), batch_of(regions=[N] * B)
    before, order = model.encode(batch), torch.arange(N).roll(2)
    batch.features, batch.boxes = batch.features[:, order], batch.boxes[:, order]
    after = model.encode(batch)
    close(after.regions, before.regions[:, order])
    close(after.text, before.text)
    swapped = [1, 0, *range(2, T)]
    batch.text = batch.text[:, swapped]
    assert (model.encode(batch).text - after.text[:, swapped]).abs().max() > 1e-3


def test_words_and_regions_see_each_other():
    model, batch = tiny(), batch_of()
    before = model.encode(batch)
    batch.features = batch.features + torch.randn_like(batch.features)
    assert (model.encode(batch).text - before.text).abs().amax((1, 2)).min() > 1e-3
    batch = batch_of(features=batch.features, boxes=batch.boxes, text=[T, 4, 5, 6])
    assert (model.encode(batch).regions - model.encode(batch, text=False).regions).abs().amax((1, 2)).min() > 1e-3


def test_pictures_of_a_pair_have_their_own_type():
    model, batch = tiny(), batch_of()
    plain = model.embed_regions(batch)
    batch.region_types = torch.zeros_like(batch.region_mask).long()
    close(model.embed_regions(batch), plain)
    batch.region_types = batch.region_types + 1
    assert (model.embed_regions(batch) - plain).abs().max() > 1e-3


def test_region_embedding_by_the_formula():
    """Type added after the two inner norms, the mask vector before the linear map."""
    model, masked = tiny(), torch.rand(B, N) < 0.5
    batch, part, norm = batch_of(masked_regions=masked), model.region_embedding, lambda x: F.layer_norm(x, (16,))
    x1, y1, x2, y2 = batch.boxes.unbind(-1)
    place = torch.stack([x1, y1, x2, y2, x2 - x1, y2 - y1, (x2 - x1) * (y2 - y1)], -1)
    looks = part.features(torch.where(masked[:, :, None], batch.features + part.mask, batch.features))
    want = norm(norm(looks) + norm(part.boxes(place)) + model.text_embedding.types.weight[1])
    close(model.embed_regions(batch), want, 1e-3)  # torch's default eps


def test_box_becomes_seven_numbers():
    model, seen = tiny(), []
    model.region_embedding.boxes.register_forward_pre_hook(lambda layer, given: seen.append(given[0]))
    boxes = torch.tensor([0.1, 0.2, 0.4, 0.8]).double().expand(B, N, 4)
    model.embed_regions(batch_of(boxes=boxes))
    close(seen[0][0, 0], torch.tensor([0.1, 0.2, 0.4, 0.8, 0.3, 0.6, 0.18]).double(), 1e-6)


def test_recorded_states_and_maps():
    model, batch = tiny(), batch_of()
    plain, recorded = model.encode(batch), model.encode(batch, record=True)
    close(plain.text, recorded.text)  # fused against explicit attention
    assert set(recorded.states) == {"embedding", "layer.0", "layer.1"} and set(recorded.maps) == {"layer.0", "layer.1"}
    assert not plain.states and not plain.maps
    maps, hidden = recorded.maps["layer.1"], ~torch.cat([batch.text_mask, batch.region_mask], 1)
    close(maps.sum(-1), torch.ones(B, 4, T + N).double())
    assert (maps.transpose(1, 3)[hidden] == 0).all() and (maps.transpose(1, 3)[~hidden] > 0).all()


# ---- objectives and heads --------------------------------------------------------------------------------------


def nlvr2_batch(wiring, **changes):
    """Two statements, each with two pictures: four rows, or two rows with the regions of both."""
    if wiring != "triplet":
        return batch_of(target=torch.tensor([0, 1]), **changes)
    return batch_of(2, target=torch.tensor([0, 1]), region_types=torch.tensor([[0, 0, 0, 1, 1], [0, 1, 1, 1, 1]]))


@pytest.mark.parametrize("name", [*uniter.OBJECTIVES, "nlvr2-paired", "nlvr2-triplet"])
def test_objective_learns_four_examples(name):
    """Loss to near its least value, for each objective alone; and no parameter of its head is left out."""
    name, _, wiring = name.partition("-")
    wiring = wiring or "paired-attention"
    model = uniter.UNITER(tiny(nlvr2=wiring).config)  # the papers' initialisation
    least, changes = 0.0, {}
    if name == "mrc_kl":
        changes["object_probs"] = F.one_hot(torch.randint(K, (B, N)), K).float()  # entropy 0: the least KL is 0
    if name in ("vqa", "ve"):
        changes["answers"] = F.one_hot(torch.randint(3, (B,)), A if name == "vqa" else 3).float()
    if name == "wra":
        least = -0.6  # pulled to -1/2 x 2 and pushed from 0: distances lie in 0..2
    batch = batch_of(dtype=torch.float32, **changes)
    if name == "nlvr2":
        batch = nlvr2_batch(wiring, dtype=torch.float32)
        batch.features, batch.boxes = batch.features.float(), batch.boxes.float()
    if name in ("mrfr", "mrc", "mrc_kl"):
        batch.masked_regions = F.one_hot(torch.full((B,), 1), N).bool()
        batch.features = batch.features.masked_fill(batch.masked_regions[:, :, None], 0.0)
    head = {"mrc_kl": "mrc", "wra": None}.get(name, name)
    options = {"group": 2} if name == "rank" else {}
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(150):
        loss, scores = uniter.OBJECTIVES[name].loss(model, model.encode(batch), batch, **options)
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            first = loss.item()
            assert all(
                p.grad is not None for n, p in model.named_parameters() if head and n.startswith(f"heads.{head}.")
            )
            assert model.region_embedding.features.weight.grad.abs().max() > 0
            assert model.text_embedding.words.weight.grad.abs().max() > 0
        optimizer.step()
        if loss.item() < least + 0.03 * abs(first - least):
            break
    assert loss.item() < least + 0.1 * abs(first - least), f"{first:.3f} -> {loss.item():.3f}"
    if name in ("itm", "nlvr2"):
        assert scores.argmax(1).tolist() == (batch.matched if name == "itm" else batch.target).tolist()
    if name == "vcr":
        assert (scores > scores.mean()).long().tolist() == batch.target.tolist()  # logit of "right"
    if name == "refer":
        assert scores.argmax(1).tolist() == batch.target.tolist()
    if name == "rank":
        assert (scores.view(2, 2)[:, 0] > scores.view(2, 2)[:, 1]).all()
    if name == "wra":
        assert scores[batch.matched == 1].max() < scores[batch.matched == 0].min()


def test_matching_class_one_is_a_match():
    model, batch = tiny(), batch_of(matched=torch.ones(B, dtype=torch.long))
    for p in model.heads["itm"].parameters():
        torch.nn.init.zeros_(p)
    with torch.no_grad():
        model.heads["itm"].bias[1] = 20.0
    assert model(batch, ["itm"])["itm"][0] < 1e-6
    batch.matched = torch.zeros_like(batch.matched)
    assert model(batch, ["itm"])["itm"][0] > 19


def test_nothing_masked_is_zero_and_not_nan():
    none = torch.zeros(0, dtype=torch.long)
    model, batch = tiny(), batch_of(word_index=none, word_labels=none, region_index=none)
    losses = model(batch, ["mlm", "mrfr", "mrc", "mrc_kl"])
    assert all(loss == 0 for loss, _ in losses.values())
    sum(loss for loss, _ in losses.values()).backward()
    assert all(p.grad is None or (p.grad == 0).all() for p in model.parameters())


@pytest.mark.parametrize("name", uniter.OBJECTIVES)
def test_objective_ignores_padding(name):
    """Longer rows, filled with large numbers where the masks say nothing is: the same loss, the same gradients."""
    model, more = tiny(), 3
    batch = batch_of(target=torch.tensor([0, 1]) if name == "nlvr2" else torch.tensor([0, 1, 0, 1]))
    if name == "ve":
        batch.answers = batch.answers[:, :3]
    wide = SimpleNamespace(**vars(batch))

    def pad(tensor, fill):
        seen = (batch.text_mask if tensor.shape[1] == T else batch.region_mask).view(B, -1, *[1] * (tensor.ndim - 2))
        filled = tensor.where(seen, fill(tensor))
        return torch.cat([filled, fill(tensor)[:, :more]], 1)

    for field in ("features", "boxes", "clean_features", "object_probs"):
        setattr(wide, field, pad(getattr(batch, field), lambda t: 1e3 * torch.randn_like(t)))
    wide.text, wide.segments = (pad(t, lambda t: torch.randint(0, 4, t.shape)) for t in (batch.text, batch.segments))
    wide.text_mask, wide.region_mask = F.pad(batch.text_mask, (0, more)), F.pad(batch.region_mask, (0, more))
    wide.word_index, wide.region_index = torch.arange(B) * (T + more) + 1, torch.arange(B) * (N + more) + 1
    options = {"rank": {"group": 2}}.get(name, {})
    grads = []
    for b in (batch, wide):
        loss, _ = uniter.OBJECTIVES[name].loss(model, model.encode(b), b, **options)
        model.zero_grad()
        loss.backward()
        grads.append(
            [loss.detach()] + [torch.zeros(1) if p.grad is None else p.grad.clone() for p in model.parameters()]
        )
    for one, other in zip(*grads, strict=True):
        close(one, other, 1e-10)


def test_region_class_leaves_background_out():
    model, batch = tiny(), batch_of()
    batch.object_probs[:, :, 0] = 1e3  # background above all: not a label
    loss, scores = model(batch, ["mrc"])["mrc"]
    labels = batch.object_probs[:, 1, 1:].argmax(-1) + 1
    close(loss, F.cross_entropy(scores, labels))


def test_feature_regression_is_tied_to_the_region_embedding():
    model, batch = tiny(), batch_of()
    _, scores = model(batch, ["mrfr"])["mrfr"]
    head = model.heads["mrfr"]
    hidden = head.transform(model.encode(batch).regions[:, 1])
    close(scores, hidden @ model.region_embedding.features.weight + head.bias)


@pytest.mark.parametrize("wiring", ["paired", "paired-attention", "triplet"])
def test_nlvr2_wirings(wiring):
    """One answer a statement; it depends on both pictures, and on which of them is left."""
    model, batch = tiny(nlvr2=wiring), nlvr2_batch(wiring)
    scores = model(batch, ["nlvr2"])["nlvr2"][1]
    assert scores.shape == (2, 2)
    for row, column in ((0, 0), (1, 0)) if wiring != "triplet" else ((0, 0), (0, 4)):
        changed = SimpleNamespace(**vars(batch) | {"features": batch.features.clone()})
        changed.features[row, column] += 1.0
        moved = (model(changed, ["nlvr2"])["nlvr2"][1] - scores).abs().amax(1)
        assert moved[0] > 1e-4 and moved[1] < 1e-12, (row, column)
    if wiring != "triplet":
        order = torch.tensor([1, 0, 3, 2])
        swapped = SimpleNamespace(**vars(batch) | {n: getattr(batch, n)[order] for n in ("features", "boxes")})
        swapped.region_mask = batch.region_mask[order]
    else:
        swapped = SimpleNamespace(**vars(batch) | {"region_types": 1 - batch.region_types})
    assert (model(swapped, ["nlvr2"])["nlvr2"][1] - scores).abs().min() > 1e-5


def test_rank_margin():
    """Three groups of three by hand: hinge over the negatives of each group only."""
    model, scores = tiny(), torch.tensor([2.0, -1.0, 3.0, 0.0, 0.1, -9.0, 5.0, -5.0, -5.0]).double()
    for p in model.heads["rank"].parameters():
        torch.nn.init.zeros_(p)
    with torch.no_grad():
        model.heads["rank"].weight[0, 0] = 1.0
    pooled = torch.zeros(9, 16).double()
    pooled[:, 0] = scores
    loss, got = uniter.OBJECTIVES["rank"].loss(model, SimpleNamespace(pooled=pooled), None)
    close(got, scores)
    s = scores.sigmoid().tolist()
    want = [max(0, 0.2 + s[3 * g + i] - s[3 * g]) for g in range(3) for i in (1, 2)]
    close(loss, torch.tensor(sum(want) / 6, dtype=torch.float64))


def test_refer_scores_hide_padding():
    model, batch = tiny(), batch_of()
    loss, scores = model(batch, ["refer"])["refer"]
    assert (scores[~batch.region_mask] == -10000).all() and (scores[batch.region_mask].abs() < 100).all()
    close(loss, F.cross_entropy(scores, batch.target, reduction="sum"))


def test_every_pretraining_objective_exists():
    paper = uniter.PRETRAINING
    joined = {name for names in paper["joined"].values() for name in names}
    assert set(paper["objectives"]) | joined | set(paper["weights"]) <= set(uniter.OBJECTIVES)
    assert set(paper["joined"]) <= set(paper["objectives"]) and paper["weights"] == {"wra": 0.1}


def test_two_heads_with_one_official_name_are_refused():
    with pytest.raises(ValueError, match="vqa and ve"):
        checkpoints.uniter_to_official(tiny(heads=("vqa", "ve")).state_dict())
