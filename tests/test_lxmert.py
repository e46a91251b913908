"""LXMERT against oracles that nobody here wrote: torch's own layers, transformers' LxmertForPreTraining with fresh
weights, the official parameter names and counts, closed forms. Equality with the official code is in test_golden.py."""

import json
import math
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from helpers import dropout_places
from PIL import Image
from torch import nn

import checkpoints
import lxmert
import train
from common import attention_bias
from support import formats
from support.records import normalize_lxmert_answer

REFERENCE = Path(os.environ.get("GOLDEN") or Path(__file__).parents[2] / "shared" / "reference")
SMALL = {
    "vocab_size": 50,
    "hidden": 32,
    "language_layers": 2,
    "relation_layers": 1,
    "cross_layers": 2,
    "attention_heads": 4,
    "intermediate": 64,
    "max_positions": 20,
    "feature_size": 12,
    "classes": 9,
    "attributes": 6,
    "answers": 7,
    "dropout": 0.0,
}


def make(dtype=torch.float64, **changes):
    torch.manual_seed(0)
    return lxmert.LXMERT(lxmert.Config(**{**SMALL, **changes})).to(dtype).eval()


def make_batch(dtype=torch.float64, rows=4, words=6, regions=5):
    """Random rows with ragged text and regions; rows 0 and 2 match and have an answer, one word and two regions a row
    are masked."""
    g = torch.Generator().manual_seed(1)
    features = torch.randn(rows, regions, 12, generator=g, dtype=dtype)
    first = torch.arange(rows)
    region_index = torch.cat([first * regions, first * regions + 1])
    visible = features.clone()
    visible.view(-1, 12)[region_index] = 0.0
    text = torch.randint(5, 50, (rows, words), generator=g)
    return SimpleNamespace(
        text=text,
        text_mask=torch.arange(words) < torch.tensor([words, 4, 5, 3] * rows)[:rows, None],
        segments=torch.zeros(rows, words, dtype=torch.long),
        features=visible,
        boxes=torch.rand(rows, regions, 4, generator=g, dtype=dtype),
        region_mask=torch.arange(regions) < torch.tensor([regions, 3, 4, 2] * rows)[:rows, None],
        masked_regions=None,
        predict_rows=None,
        word_index=first * words + 1,
        word_labels=torch.randint(5, 50, (rows,), generator=g),
        region_index=region_index,
        clean_features=features,
        object_probs=torch.randn(rows, regions, 9, generator=g, dtype=dtype).softmax(-1),
        objects=torch.randint(0, 8, (rows, regions), generator=g),
        object_conf=torch.rand(rows, regions, generator=g, dtype=dtype) * 0.5 + 0.5,
        attributes=torch.randint(0, 6, (rows, regions), generator=g),
        attribute_conf=torch.rand(rows, regions, generator=g, dtype=dtype) * 0.5 + 0.5,
        matched=torch.tensor([1, 0] * rows)[:rows],
        answer_labels=torch.tensor([3, 2, 6, -1] * rows)[:rows],
        answers=torch.rand(rows, 7, generator=g, dtype=dtype),
        target=torch.zeros(rows, dtype=torch.long),
    )


# ---- sizes and names -------------------------------------------------------------------------------------------


def test_base_has_the_released_number_of_parameters_and_tensors():
    with torch.device("meta"):
        model = lxmert.LXMERT(lxmert.Config())
    assert sum(p.numel() for p in model.parameters()) == 228_051_752
    assert len(formats.lxmert_to_official(model.state_dict())) == 473


@pytest.mark.parametrize("kind", ["official", "hf"])
def test_base_has_the_released_names(kind):
    path = REFERENCE / f"names_lxmert_{kind}_base.json"
    if not path.exists():
        pytest.skip(f"no {path}")
    with torch.device("meta"):
        state = lxmert.LXMERT(lxmert.Config()).state_dict()
    there = (formats.lxmert_to_official if kind == "official" else formats.lxmert_to_hugging_face)(state)
    assert {name: list(tensor.shape) for name, tensor in there.items()} == dict(json.loads(path.read_text()))
    back, unexpected = formats.lxmert_from_official({f"module.{name}": tensor for name, tensor in there.items()}, state)
    assert set(back) == set(state) and not unexpected


@pytest.mark.parametrize("head", ["vqa", "nlvr2", "ve", "rank", "vcr", "refer"])
def test_a_fine_tuned_model_goes_to_its_official_names_and_back(head):
    state = make(heads=(head,)).state_dict()
    there = formats.lxmert_to_official(state)
    assert any(n.startswith("lxrt_encoder.model.bert.") for n in there) == (head in ("vqa", "nlvr2", "ve"))
    back, unexpected = formats.lxmert_from_official(there, state)
    assert set(back) == set(state) and not unexpected
    stray = "bert.encoder.layer.99.output.dense.weight"
    assert formats.lxmert_from_official({stray: torch.zeros(1)}, state) == ({}, [stray])


def test_answers_are_normalised_as_the_official_table_is():
    probes = {
        "the man.": "man",
        "a the dog": "dog",
        "the a dog": "a dog",
        "One": "1",
        "Grey cat": "grey cat",
        "..": ".",
    }
    probes |= {"  yes": "  yes", "a .": "a", "the Grey": "gray", "a an orange": "orange", "eleven": "eleven", "": ""}
    path = REFERENCE / "lxmert_answer_map.json"
    if path.exists():
        probes |= {raw: normal for raw, normal, _ in json.loads(path.read_text())["convert"]}
    for raw, normal in probes.items():
        assert normalize_lxmert_answer(raw) == normal, raw


def test_answer_rows_move_with_their_answers_and_unknown_ones_are_zero():
    weight, bias = torch.randn(3, 4), torch.randn(3)
    places = checkpoints.match_answers(["dog", "2", "yes"], ["Yes.", "cat", "two", "a dog", "yes"])
    rows = checkpoints.move_rows(weight, places)
    offsets = checkpoints.move_rows(bias, places)
    assert torch.equal(rows, torch.stack([weight[2], torch.zeros(4), weight[1], weight[0], weight[2]]))
    assert offsets.tolist() == [bias[2].item(), 0.0, bias[1].item(), bias[0].item(), bias[2].item()]


# ---- the encoder -----------------------------------------------------------------------------------------------


def torch_attention(block, x, context, mask):
    """norm(x + attention) by torch's MultiheadAttention with the block's weights."""
    other = nn.MultiheadAttention(x.shape[-1], block.heads, batch_first=True, dtype=x.dtype)
    with torch.no_grad():
        parts = block.query, block.key, block.value
        other.in_proj_weight.copy_(torch.cat([p.weight for p in parts]))
        other.in_proj_bias.copy_(torch.cat([p.bias for p in parts]))
        other.out_proj.load_state_dict(block.output.state_dict())
    attended = other(x, context, context, key_padding_mask=~mask)[0]
    return F.layer_norm(x + attended, x.shape[-1:], block.norm.weight, block.norm.bias, 1e-12)


def torch_layer(layer, x, mask):
    """One BERT layer by torch's functions."""
    x, f = torch_attention(layer.attention, x, x, mask), layer.feed_forward
    inner = F.linear(F.gelu(F.linear(x, f.up.weight, f.up.bias)), f.down.weight, f.down.bias)
    return F.layer_norm(x + inner, x.shape[-1:], f.norm.weight, f.norm.bias, 1e-12)


def test_a_region_is_the_mean_of_its_normed_feature_and_its_normed_box():
    model, batch = make(), make_batch()
    embedding = model.region_embedding
    feature_emb = F.layer_norm(embedding.features(batch.features), (32,), eps=1e-12)
    box_emb = F.layer_norm(embedding.boxes(batch.boxes), (32,), eps=1e-12)
    torch.testing.assert_close(model.embed_regions(batch), (feature_emb + box_emb) / 2)


def test_cross_layers_read_the_original_inputs_through_one_shared_block():
    """Both directions start from the layer's inputs: an update in sequence would give other regions."""
    model, batch = make(), make_batch()
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    layer, text, regions = model.cross_layers[0], model.embed_text(batch), model.embed_regions(batch)
    masks = batch.text_mask, batch.region_mask
    got = layer(text, regions, *(attention_bias(mask, torch.float64) for mask in masks))
    words = torch_attention(layer.cross, text, regions, batch.region_mask)
    areas = torch_attention(layer.cross, regions, text, batch.text_mask)
    torch.testing.assert_close(got[0], torch_layer(layer.text, words, batch.text_mask))
    torch.testing.assert_close(got[1], torch_layer(layer.regions, areas, batch.region_mask))
    in_sequence = torch_attention(layer.cross, regions, words, batch.text_mask)
    assert (got[1] - torch_layer(layer.regions, in_sequence, batch.region_mask)).abs().max() > 0.01


def test_the_order_of_the_regions_means_nothing():
    model, batch = make(), make_batch()
    one = model.encode(batch)
    order = torch.randperm(batch.features.shape[1])
    for name in ("features", "boxes", "region_mask"):
        setattr(batch, name, getattr(batch, name)[:, order])
    two = model.encode(batch)
    torch.testing.assert_close(two.regions, one.regions[:, order])
    torch.testing.assert_close(two.text, one.text)
    torch.testing.assert_close(two.pooled, one.pooled)


def test_one_modality_alone_ends_before_the_cross_layers():
    model, batch = make(), make_batch()
    both = model.encode(batch, record=True)
    text, regions = model.encode(batch, regions=False), model.encode(batch, text=False)
    assert text.regions is None and regions.text is None
    torch.testing.assert_close(text.text, both.states["text.1"])
    torch.testing.assert_close(regions.regions, both.states["regions.0"])
    torch.testing.assert_close(text.pooled, model.pooler(text.text))
    mean = torch.stack([x[m].mean(0) for x, m in zip(regions.regions, batch.region_mask, strict=True)])
    torch.testing.assert_close(regions.pooled, model.pooler(mean[:, None]))
    assert set(both.maps) == {"text.0", "text.1", "regions.0"} | {
        f"cross.{i}.{name}" for i in range(2) for name in ("text_to_regions", "regions_to_text", "text", "regions")
    }
    assert not text.maps and not text.states


def test_recording_changes_nothing():
    model, batch = make(), make_batch()
    torch.testing.assert_close(model.encode(batch, record=True).pooled, model.encode(batch).pooled)


def test_heads_on_the_pooled_vector_leave_the_last_visual_layer_without_gradient():
    """The last cross layer's visual self-attention and feed-forward cannot reach the first word: all else can."""
    model, batch = make(heads=("vqa",)), make_batch()
    model(batch, ["vqa"])["vqa"][0].backward()
    idle = {name for name, p in model.named_parameters() if p.grad is None}
    assert idle == {name for name, _ in model.named_parameters() if name.startswith("cross_layers.1.regions.")}


def test_row_0_of_every_text_table_learns_nothing_from_being_read():
    model, batch = make(heads=("vqa",)), make_batch()
    batch.text[0, 2] = 0
    model(batch, ["vqa"])["vqa"][0].backward()
    table = model.text_embedding
    for embedding in (table.words, table.positions, table.types):
        assert not embedding.weight.grad[0].any()
    assert table.positions.weight.grad[1].any() and table.words.weight.grad[batch.text[0, 1]].any()


# ---- dropout and recipe ------------------------------------------------------------------------------------------


def test_dropout_acts_where_the_official_code_has_it(monkeypatch):
    """On both embedding sums, on attention probabilities, and after each output projection; nowhere in the heads.

    2 rows of 6 words (T) and 5 regions (N), 4 heads, 32 wide; 2 language, 1 relation, 2 cross-modality layers.
    """
    assert lxmert.Config().dropout == 0.1
    model, batch = make(dropout=0.25, heads=lxmert.Config.heads).train(), make_batch(rows=2)
    text, regions = (2, 6, 32), (2, 5, 32)
    expected = {
        (0.25, text): 1 + 2 * 2 + 2 * 3,  # embedding; two in a BERT layer; one more in a cross-modality layer
        (0.25, regions): 1 + 1 * 2 + 2 * 3,
        (0.25, (2, 4, 6, 6)): 2 + 2,  # text self-attention
        (0.25, (2, 4, 5, 5)): 1 + 2,  # region self-attention
        (0.25, (2, 4, 6, 5)): 2,  # text to regions
        (0.25, (2, 4, 5, 6)): 2,  # regions to text
    }
    objectives = list(lxmert.PRETRAINING["objectives"])
    assert dropout_places(monkeypatch, lambda: model(batch, objectives)) == expected
    assert dropout_places(monkeypatch, lambda: model.eval()(batch, objectives)) == {}


@pytest.mark.parametrize("head", ["vqa", "ve", "nlvr2", "vcr", "rank", "refer"])
def test_task_heads_have_no_dropout(head, monkeypatch):
    model, batch = make(dropout=0.25, heads=(head,)).train(), make_batch(rows=6)
    encoding = model.encode(batch)
    batch.target = torch.zeros(3 if head == "nlvr2" else 6, dtype=torch.long)
    if head == "refer":
        batch.target = torch.rand_like(batch.region_mask, dtype=torch.float64)
    batch.answers = torch.rand(6, 3 if head == "ve" else 7, dtype=torch.float64)
    batch.ids = ["a", "b"]  # rank: two groups of three rows
    loss = lxmert.OBJECTIVES[head].loss
    assert dropout_places(monkeypatch, lambda: loss(model, encoding, batch)) == {}


def test_pretraining_follows_the_official_recipe_but_for_two_choices():
    """Official values: all objectives in every step; boxes 80% zeroed, 10% another box's; sentences exchanged;
    questions in the second half. Own values: a quarter of mismatched pairs, where nothing is predicted (official: half,
    and everything is), and weaker region and answer losses in the tiny model."""
    recipe = lxmert.PRETRAINING
    assert recipe["objectives"] == dict.fromkeys(("mlm", "mrfr", "mrc", "attr", "itm", "qa"), 1)
    assert recipe["region_masking"] == {"zero": 0.8, "random": 0.1, "force_one": False}
    assert (recipe["mismatch"], recipe["mismatched_share"], recipe["predict_mismatched"]) == ("text", 0.25, False)
    assert (recipe["second_half"], recipe["conditional"], recipe["rate"]) == (("qa",), False, 2.0)
    assert recipe["joined"] == recipe["loss_weights"] == {}
    assert (lxmert.Config().region_factor, lxmert.Config().answer_factor) == (1 / 0.15, 1.0)
    tiny = lxmert.PRESETS["tiny"]
    assert (tiny["region_factor"], tiny["answer_factor"]) == (0.2, 0.2)


# ---- objectives ------------------------------------------------------------------------------------------------


def test_class_1_is_a_match():
    model, batch = make(), make_batch()
    batch.matched = torch.ones_like(batch.matched)
    with torch.no_grad():
        model.heads["itm"].bias.copy_(torch.tensor([-20.0, 20.0]))
    assert model(batch, ["itm"])["itm"][0] < 1e-6


def test_region_losses_are_the_formulas_and_padding_takes_no_part():
    """Row by row without padding, by hand, weighted by how many regions each row has."""
    model, batch = make(), make_batch()
    got = model(batch, ["mrc", "attr", "mrfr"])
    states, total = model.encode(batch).regions, {"mrc": 0.0, "attr": 0.0, "mrfr": 0.0}
    masked = torch.zeros(batch.region_mask.numel(), dtype=torch.bool)
    masked[batch.region_index] = True
    for b in range(4):
        for n in range(int(batch.region_mask[b].sum())):
            x = model.heads["regions"](states[b, n])
            for name, labels, weight in (
                ("mrc", batch.objects, batch.object_conf),
                ("attr", batch.attributes, batch.attribute_conf),
            ):
                chance = model.heads[name](x).softmax(-1)[labels[b, n]]
                total[name] -= weight[b, n] * chance.log()
            if masked[b * 5 + n]:
                d = (model.heads["mrfr"](x) - batch.clean_features[b, n]).abs()
                total["mrfr"] += torch.where(d < 1, d * d / 2, d - 0.5).mean()
    for name, value in total.items():
        torch.testing.assert_close(got[name][0], value / batch.region_mask.sum() / 0.15)
        assert len(got[name][1]) == len(batch.region_index)


def test_no_region_of_a_mismatched_pair_takes_part_in_the_region_losses():
    """Losses are those of the matched rows alone, and the states of the other rows get no gradient."""
    model, batch = make(), make_batch()
    batch.predict_rows = batch.matched == 1  # rows 0 and 2
    encoding = model.encode(batch)
    encoding.regions.retain_grad()
    in_matched = batch.predict_rows[batch.region_index // 5]
    batch.region_index = batch.region_index[in_matched]
    names = ("mrfr", "mrc", "attr")
    losses = {name: lxmert.OBJECTIVES[name].loss(model, encoding, batch)[0] for name in names}
    sum(losses.values()).backward()
    assert not encoding.regions.grad[~batch.predict_rows].any()
    assert encoding.regions.grad[batch.predict_rows].any()
    alone = make_batch()
    for name, value in vars(alone).items():
        if isinstance(value, torch.Tensor) and len(value) == 4:
            setattr(alone, name, value[[0, 2]])
    alone.region_index = torch.tensor([0, 1, 5, 6])  # the first two regions of both rows
    for name in names:
        expected = lxmert.OBJECTIVES[name].loss(model, model.encode(alone), alone)[0]
        torch.testing.assert_close(losses[name], expected)


def test_a_batch_of_mismatched_pairs_alone_has_region_losses_of_zero():
    model, batch = make(), make_batch()
    batch.predict_rows = torch.zeros(4, dtype=torch.bool)
    batch.region_index = torch.zeros(0, dtype=torch.long)
    for name, (loss, _) in model(batch, ("mrfr", "mrc", "attr")).items():
        assert loss.item() == 0.0, name


def formula(name, logits, batch):
    """Each loss from its logits in float64, by torch's own functions."""
    target = batch.clean_features.flatten(0, 1)[batch.region_index]  # (M, F)
    probs = batch.object_probs.flatten(0, 1)[batch.region_index, 1:]  # (M, K - 1)
    probs = probs / probs.sum(-1, keepdim=True)
    if name == "mlm":
        return F.cross_entropy(logits, batch.word_labels)
    if name == "mrfr":
        return F.smooth_l1_loss(logits, target, reduction="sum") / 12 / batch.region_mask.sum() / 0.15
    if name == "mrc_kl":
        return F.kl_div(logits.log_softmax(-1), probs, reduction="sum") / logits.numel()
    if name == "itm":
        return F.cross_entropy(logits, batch.matched)
    if name == "nlvr2":
        return F.cross_entropy(logits, batch.target)
    return F.cross_entropy(logits, batch.answer_labels.masked_fill(batch.matched == 0, -1), ignore_index=-1)  # qa


@pytest.mark.parametrize("name", ["mlm", "mrfr", "mrc_kl", "itm", "qa", "nlvr2"])
def test_losses_are_computed_in_float32_under_autocast(name):
    """With logits as large as 30, half precision would be off in the third digit."""
    model, batch = (
        make(torch.float32, heads=("mlm", "mrfr", "mrc", "attr", "itm", "qa", "nlvr2")),
        make_batch(torch.float32),
    )
    for p in model.heads.parameters():
        p.data *= 10
    batch.target = torch.tensor([1, 0])
    with torch.autocast("cpu", torch.bfloat16):
        loss, logits = model(batch, [name])[name]
    assert loss.dtype == torch.float32
    for field in ("clean_features", "object_probs"):
        setattr(batch, field, getattr(batch, field).double())
    torch.testing.assert_close(loss.double(), formula(name, logits.double(), batch), rtol=1e-6, atol=1e-6)


def test_matching_logits_are_computed_in_float32_under_autocast():
    """They rank pairs. They differ from the float64 head on the same vectors as float32 does; bfloat16 by 1%."""
    model, batch = make(torch.float32, heads=("itm",)), make_batch(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        encoding = model.encode(batch)
        logits = lxmert.OBJECTIVES["itm"].loss(model, encoding, batch)[1]
    expected = model.heads.double()["itm"](encoding.pooled.double())
    torch.testing.assert_close(logits.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "head"), [("mrc", "objects"), ("attr", "attributes")])
def test_losses_of_all_regions_are_computed_in_float32_under_autocast(name, head):
    """Their logits of unmasked regions are not returned, so here every region is masked."""
    model, batch = make(torch.float32), make_batch(torch.float32)
    for p in model.heads.parameters():
        p.data *= 10
    batch.region_index = torch.arange(20)
    with torch.autocast("cpu", torch.bfloat16):
        loss, logits = model(batch, [name])[name]
    confidence = {"mrc": batch.object_conf, "attr": batch.attribute_conf}[name]
    each = F.cross_entropy(logits.double(), getattr(batch, head).flatten(), reduction="none").view(4, 5)
    expected = (each * confidence.double() * batch.region_mask).sum() / batch.region_mask.sum() / 0.15
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-6)


def test_soft_region_labels_are_torchs_kl():
    model, batch = make(), make_batch()
    loss, scores = model(batch, ["mrc_kl"])["mrc_kl"]
    target = batch.object_probs.flatten(0, 1)[batch.region_index, 1:]
    target = torch.distributions.Categorical(probs=target)  # rescales
    ours = torch.distributions.kl_divergence(target, torch.distributions.Categorical(logits=scores)).sum()
    torch.testing.assert_close(loss, ours / scores.numel())


def test_questions_count_where_there_is_an_answer_and_a_match():
    model, batch = make(), make_batch()  # labels 3, 2, 6, -1; matched 1, 0, 1, 0
    loss, scores = model(batch, ["qa"])["qa"]
    torch.testing.assert_close(loss, F.cross_entropy(scores[[0, 2]], torch.tensor([3, 6])))
    batch.matched = None
    loss, scores = model(batch, ["qa"])["qa"]
    torch.testing.assert_close(loss, F.cross_entropy(scores[:3], torch.tensor([3, 2, 6])))
    model.config.answer_factor = 0.2
    torch.testing.assert_close(model(batch, ["qa"])["qa"][0], 0.2 * loss)


def test_nothing_masked_and_nothing_answered_is_zero_not_nan():
    model, batch = make(), make_batch()
    batch.word_index = batch.word_labels = batch.region_index = torch.zeros(0, dtype=torch.long)
    batch.objects = batch.attributes = torch.full_like(batch.objects, -1)
    batch.answer_labels = torch.full_like(batch.answer_labels, -1)
    out = model(batch, ["mlm", "mrfr", "mrc", "attr", "mrc_kl", "qa"])
    assert all(loss.item() == 0.0 for loss, _ in out.values())
    sum(loss for loss, _ in out.values()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_task_heads_without_opinion_score_chance():
    """Zero scores: binary cross-entropy is log 2 an answer, cross-entropy log K, a margin loss its margin."""
    batch = make_batch(rows=6)
    expected = {"vqa": 7 * math.log(2), "ve": 3 * math.log(2)}
    expected |= {"nlvr2": math.log(2), "vcr": math.log(2), "rank": 0.2}
    expected["refer"] = batch.region_mask.sum(1).log().mean().item()
    for task, value in expected.items():
        model = make(heads=(task,))
        for p in model.heads.parameters():
            nn.init.zeros_(p)
        batch.target = torch.zeros(3 if task == "nlvr2" else 6, dtype=torch.long)
        if task == "refer":
            batch.target = batch.region_mask.double()  # the first region of each row is the label
        batch.answers = torch.rand(6, 3 if task == "ve" else 7, dtype=torch.float64)
        batch.ids = ["a", "b"]  # rank: two groups of three rows
        assert model(batch, [task])[task][0].item() == pytest.approx(value), task


@pytest.mark.parametrize("objective", lxmert.PRETRAINING["objectives"])
def test_four_examples_can_be_learned_by_heart(objective):
    torch.manual_seed(0)
    model, batch = make(torch.float32, hidden=64).train(), make_batch(torch.float32)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(40):
        loss, scores = model(batch, [objective])[objective]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0], (losses[0], losses[-1])
    if objective == "itm":
        assert scores.argmax(1).tolist() == batch.matched.tolist()


def test_factors_and_the_masking_constant_are_set_from_the_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = []
    for i in range(4):
        Image.new("RGB", (24, 24), (60 * i, 0, 99)).save(f"{i}.png")
        lines.append(json.dumps({"image": f"{i}.png", "text": f"colour {i}", "answer": "red", "split": "train"}))
    Path("own.jsonl").write_text("\n".join(lines))
    settings = ["masked_logit=-9999.0", "region_factor=6.67", "answer_factor=0.5"]
    arguments = ["--model", "lxmert", "--task", "vqa", "--data", "own.jsonl", "--batch-size", "4", "--out", "out"]
    assert train.main([*arguments, "--steps", "1", "--config", *settings]) == 0
    config = torch.load("out/checkpoint.pt", weights_only=True)["config"]
    assert (config["masked_logit"], config["region_factor"], config["answer_factor"]) == (-9999.0, 6.67, 0.5)
    older = torch.load("out/checkpoint.pt", weights_only=True)
    fingerprint = dict(older["fingerprint"])
    older["config"]["hidden_score"] = older["config"].pop("masked_logit")
    older["fingerprint"]["the model's hidden_score"] = older["fingerprint"].pop("the model's masked_logit")
    torch.save(older, "older.pt")
    older = checkpoints.load_checkpoint("older.pt")
    assert (older["config"], older["fingerprint"]) == (config, fingerprint)


# ---- transformers, live ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", ["to", "from"])
def test_transformers_computes_the_same(direction):
    """Fresh random weights through the names, one way or the other: the same states, maps and scores."""
    transformers = pytest.importorskip("transformers")
    model = make(masked_logit=torch.finfo(torch.float64).min, region_factor=6.67)
    config = transformers.LxmertConfig(
        vocab_size=50,
        hidden_size=32,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=20,
        l_layers=2,
        r_layers=1,
        x_layers=2,
        visual_feat_dim=12,
        num_object_labels=8,
        num_attr_labels=6,
        num_qa_labels=7,
    )
    torch.manual_seed(2)
    other = transformers.LxmertForPreTraining(config).double().eval()
    if direction == "to":
        missing, unexpected = other.load_state_dict(formats.lxmert_to_hugging_face(model.state_dict()), strict=False)
        assert not missing and not unexpected
    else:
        for p in other.parameters():
            nn.init.normal_(p, std=0.2)
        state, unexpected = formats.lxmert_from_official(other.state_dict(), model.state_dict())
        assert not unexpected
        model.load_state_dict(state)
    batch = make_batch()
    inputs = {
        "input_ids": batch.text,
        "attention_mask": batch.text_mask.long(),
        "visual_feats": batch.features,
        "visual_pos": batch.boxes,
        "visual_attention_mask": batch.region_mask.long(),
    }
    with torch.no_grad():
        theirs = other(**inputs, output_hidden_states=True, output_attentions=True)
        objects = other.obj_predict_head(theirs.vision_hidden_states[-1])
        ours = model.encode(batch, record=True)
        regions = model.heads["regions"](ours.regions)
        pairs = [
            (ours.text, theirs.language_hidden_states[-1]),
            (ours.regions, theirs.vision_hidden_states[-1]),
            (ours.maps["cross.1.text_to_regions"], theirs.cross_encoder_attentions[-1]),
            (model.heads["itm"](ours.pooled), theirs.cross_relationship_score),
            (model.heads["qa"](ours.pooled), theirs.question_answering_score),
            (model.heads["mlm"](ours.text, model.text_embedding.words.weight), theirs.prediction_logits),
            (model.heads["mrc"](regions), objects["obj"]),
            (model.heads["attr"](regions), objects["attr"]),
            (model.heads["mrfr"](regions), objects["feat"]),
        ]
    for mine, reference in pairs:
        torch.testing.assert_close(mine, reference, rtol=1e-9, atol=1e-9)
