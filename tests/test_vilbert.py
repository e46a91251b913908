"""ViLBERT against what nobody here wrote: the official names, sizes and schedule, closed forms and brute force."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from helpers import dropout_places
from PIL import Image

import common
import train
import uniter
import vilbert
from support import formats, twelve_in_one

REFERENCE = Path(os.environ.get("GOLDEN") or Path(__file__).parents[2] / "shared" / "reference")
TASK_HEADS = ("mlm", "mrc", "itm", "vqa", "rank", "refer", "word")
TWELVE = {"heads": (*TASK_HEADS, "gqa", "nlvr2", "ve"), "twelve_in_one": True}
OFFICIAL = {  # names file: config, tensors, parameters in millions (vilbert.md)
    "beta_base6": ({}, 533, 250.04),
    "beta_vltasks_base6": ({"heads": TASK_HEADS}, 545, 258.56),
    "mt_base6": (TWELVE, 559, 268.01),
    "mt_tasktokens_base6": (TWELVE | {"task_tokens": 20}, 560, 268.03),
}


def tiny(**changes):
    sizes = {"vocab_size": 50, "feature_size": 6, "classes": 5, "answers": 7, "gqa_answers": 4}
    torch.manual_seed(0)
    return vilbert.ViLBERT(vilbert.Config(**vilbert.PRESETS["tiny"] | sizes | changes))


def make_batch(rows=4, words=6, regions=5, seed=0):
    """Random pairs of unequal lengths, the first two words and two regions masked in each row."""
    g = torch.Generator().manual_seed(seed)
    draw, dice = lambda *s: torch.rand(*s, generator=g), lambda high, *s: torch.randint(1, high, s, generator=g)
    row = torch.arange(rows)[:, None]
    boxes, features = draw(rows, regions, 4), draw(rows, regions, 6)
    batch = SimpleNamespace(
        text=dice(50, rows, words),
        text_mask=torch.arange(words) < (words - row % 3),
        segments=torch.zeros(rows, words, dtype=torch.long),
        features=features,
        boxes=torch.cat([boxes[..., :2] / 2, 0.5 + boxes[..., 2:] / 2], -1),
        region_mask=torch.arange(regions) < (regions - row % 2),
        word_index=(row * words + torch.arange(2)).flatten(),
        region_index=(row * regions + torch.arange(2)).flatten(),
        clean_features=features.clone(),
        object_probs=draw(rows, regions, 5).softmax(-1),
        matched=torch.arange(rows) % 2,
        pictures=torch.arange(rows),
        answers=(draw(rows, 7) > 0.5).float(),
        target=torch.arange(rows) % 2,
    )
    batch.word_labels = dice(50, len(batch.word_index))
    batch.features[:, :2] = 0.0
    return batch


# ---- the official model ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", OFFICIAL)
def test_names_and_sizes_are_the_official_ones(file):
    config, tensors, millions = OFFICIAL[file]
    with torch.device("meta"):
        model = vilbert.ViLBERT(vilbert.Config(**config))
    official = formats.vilbert_to_official(model.state_dict())
    assert len(official) == tensors
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == millions
    state, unexpected = formats.vilbert_from_official(official, model.state_dict())
    assert set(state) == set(model.state_dict()) and not unexpected
    path = REFERENCE / f"names_vilbert_{file}.json"
    if not path.exists():
        pytest.skip(f"no {path}")
    names = json.loads(path.read_text())
    assert {name: list(tensor.shape) for name, tensor in official.items()} == dict(names)


def test_bert_supplies_the_text_stream():
    model = tiny()
    state = {"bert.encoder.layer.0.output.LayerNorm.gamma": torch.ones(128), "bert.pooler.dense.bias": torch.ones(128)}
    loaded, unexpected = formats.vilbert_from_official(state, model.state_dict())
    assert list(loaded) == ["text_layers.0.feed_forward.norm.weight"] and unexpected == ["bert.pooler.dense.bias"]


def test_two_heads_of_one_official_name_are_refused():
    with pytest.raises(ValueError, match="one region head"):
        formats.vilbert_to_official(tiny(heads=("mrc", "mrfr")).state_dict())


def test_the_order_of_layers_is_the_official_one():
    """The order that the official 12-in-1 code was seen to run (vilbert_dev.npz, config.execution_order), and base-6."""
    order = ["text.0", "text.1", "cross.0", "text.2", "regions.0", "cross.1", "regions.1", "regions.2", "text.3"]
    config = vilbert.Config(layers=4, visual_layers=3, connections=((0, 2), (1, 3)))
    assert [f"{kind}.{i}" for kind, i in vilbert.layer_order(config)] == order
    base = [("text", i) for i in range(6)] + [("cross", 0)]
    for k in range(1, 6):
        base += [("text", 5 + k), ("regions", k - 1), ("cross", k)]
    assert vilbert.layer_order(vilbert.Config()) == [*base, ("regions", 5), ("text", 11)]
    model = tiny(visual_layers=3)
    states = model.eval().encode(make_batch(), record=True).states
    ran = dict.fromkeys(name.removesuffix(".text").removesuffix(".regions") for name in states)
    assert list(ran) == ["text.embedding", "regions.embedding", *order]


@pytest.mark.parametrize(
    "wrong",
    [
        {"connections": ((1, 3), (0, 2))},
        {"connections": ((0, 9),)},
        {"connections": ((0, 2), (1, 5))},
    ],
)
def test_impossible_orders_are_refused(wrong):
    with pytest.raises(ValueError, match="connection"):
        vilbert.layer_order(vilbert.Config(**{"layers": 4, "visual_layers": 2} | wrong))


def test_tiny_is_comparable_with_uniter():
    sizes = {"vocab_size": 2000, "feature_size": 432}
    ours = vilbert.ViLBERT(vilbert.Config(**vilbert.PRESETS["tiny"] | sizes))
    theirs = uniter.UNITER(uniter.Config(**uniter.PRESETS["tiny"] | sizes))
    ratio = sum(p.numel() for p in ours.parameters()) / sum(p.numel() for p in theirs.parameters())
    assert 1.0 < ratio < 2.5  # of the base sizes it is 2.2


# ---- the encoder -----------------------------------------------------------------------------------------------


def test_the_order_of_regions_does_not_matter():
    model, batch = tiny().double().eval(), make_batch()
    batch.features, batch.boxes = batch.features.double(), batch.boxes.double()
    before, order = model.encode(batch), torch.tensor([3, 0, 4, 2, 1])
    for name in ("features", "boxes", "region_mask"):
        setattr(batch, name, getattr(batch, name)[:, order])
    after = model.encode(batch)
    torch.testing.assert_close(after.regions, before.regions[:, order])
    torch.testing.assert_close(after.text, before.text)
    torch.testing.assert_close(after.pooled, before.pooled)


def test_the_whole_image_is_the_mean_of_its_regions():
    model, batch, seen = tiny(), make_batch(), []
    for layer in (model.region_embedding.features, model.region_embedding.boxes):
        layer.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    model.embed_regions(batch)
    for row, mask in enumerate(batch.region_mask):
        torch.testing.assert_close(seen[0][row, 0], batch.features[row][mask].mean(0))
    assert torch.equal(seen[1][:, 0], torch.tensor([[0.0, 0, 1, 1, 1]]).expand(4, -1))
    x1, y1, x2, y2 = batch.boxes.unbind(-1)
    torch.testing.assert_close(seen[1][:, 1:, 4], (x2 - x1) * (y2 - y1))


def test_both_streams_of_a_co_attention_layer_read_the_original_inputs():
    model, batch = tiny().eval(), make_batch()
    layer = model.connections[0]
    text, regions = torch.randn(4, 6, 128), torch.randn(4, 5, 128)
    text_bias = common.attention_bias(batch.text_mask, text.dtype)
    region_bias = common.attention_bias(batch.region_mask, text.dtype)
    maps = []
    new_text, new_regions = layer(text, regions, text_bias, region_bias, maps)
    for new, block, forward, query, context, bias in (
        (new_text, layer.text_reads, layer.text_feed_forward, text, regions, region_bias),
        (new_regions, layer.regions_read, layer.region_feed_forward, regions, text, text_bias),
    ):
        heads = [
            m.unflatten(-1, (4, -1)).transpose(1, 2)
            for m in (block.query(query), block.key(context), block.value(context))
        ]
        read = F.scaled_dot_product_attention(*heads, bias).transpose(1, 2).flatten(2)
        torch.testing.assert_close(new, forward(block.norm(query + block.output(read))), atol=1e-5, rtol=1e-5)
    assert [tuple(x.shape) for x in maps] == [(4, 4, 6, 5), (4, 4, 5, 6)]  # text to regions, regions to text


@pytest.mark.parametrize("fusion", ["mul", "sum"])
def test_the_vector_of_a_pair_is_the_product_or_the_sum_of_two_pooled_vectors(fusion):
    model, batch = tiny(fusion=fusion).eval(), make_batch()
    encoding = model.encode(batch, record=True)
    states = {}
    for name, state in encoding.states.items():
        states["regions" if "regions" in name else "text"] = state  # the last of each is kept
    text = torch.relu(model.text_pooler.dense(states["text"][:, 0]))
    regions = torch.relu(model.region_pooler.dense(states["regions"][:, 0]))
    expected = text * regions if fusion == "mul" else text + regions
    torch.testing.assert_close(encoding.pooled, expected)


def test_one_stream_alone_has_no_cross_attention():
    model, batch = tiny().eval(), make_batch()
    text, regions = model.encode(batch, regions=False, record=True), model.encode(batch, text=False)
    assert text.regions is None and regions.text is None and not any("cross" in name for name in text.maps)
    torch.testing.assert_close(text.pooled, model.text_pooler(text.text))
    batch.features = batch.boxes = batch.region_mask = None
    torch.testing.assert_close(model.encode(batch, regions=False).text, text.text)
    assert regions.regions.shape == (4, 5, 128) and regions.pooled.shape == text.pooled.shape == (4, 128)


def test_the_task_token_is_a_row_of_the_table_under_the_norm_of_the_words():
    model, batch = tiny(task_tokens=20).eval(), make_batch()
    batch.task = torch.tensor([1, 1, 2, 3])
    found = model.embed_text(batch)
    embedding = model.text_embedding
    torch.testing.assert_close(found[:, 1], embedding.norm(embedding.tasks.weight[batch.task]))
    assert torch.equal(torch.cat([found[:, :1], found[:, 2:]], 1), embedding(batch.text, batch.segments))


def test_the_task_token_and_the_text_change_what_is_computed():
    model, batch = tiny(task_tokens=20, dynamic_attention=True).eval(), make_batch()
    batch.task = torch.tensor([0, 0, 0, 0])
    without = model.encode(batch)
    batch.task = torch.tensor([1, 1, 2, 3])
    encoding = model.encode(batch, record=True)
    assert encoding.text.shape == without.text.shape and encoding.states["text.0"].shape[1] == 7
    assert not torch.allclose(encoding.text, without.text)
    assert torch.equal(encoding.text[:, 1], encoding.states["text.3"][:, 2])  # aligned with batch.text
    assert model.encode(batch, text=False).regions.shape == (4, 5, 128)


def test_the_text_steers_a_visual_layer_by_the_mean_of_its_words_so_far(monkeypatch):
    """Queries and keys, not values, are multiplied by 1 + sigmoid of a linear map of that mean; padding takes no part."""
    model, batch = tiny(dynamic_attention=True).eval(), make_batch()
    layer = model.region_layers[1]
    calls = []
    forward = layer.forward
    monkeypatch.setattr(layer, "forward", lambda *arguments: calls.append(arguments) or forward(*arguments))
    encoding = model.encode(batch, record=True)
    ((x, bias, _, mean),) = calls
    before = list(encoding.states)[list(encoding.states).index("regions.1") - 1]  # the last text states before it
    text = encoding.states[before if "text" in before else before.replace("regions", "text")]
    for row in range(4):
        torch.testing.assert_close(mean[row, 0], text[row][batch.text_mask[row]].mean(0))
    block = layer.attention
    query = block.query(x) * (1 + layer.gate_query(mean).sigmoid())
    key = block.key(x) * (1 + layer.gate_key(mean).sigmoid())
    query, key, value = (y.unflatten(-1, (4, -1)).transpose(1, 2) for y in (query, key, block.value(x)))
    context = F.scaled_dot_product_attention(query, key, value, bias).transpose(1, 2).flatten(2)
    attended = block.norm(x + block.output(context))
    torch.testing.assert_close(encoding.states["regions.1"], layer.feed_forward(attended), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("connections", [((0, 2), (1, 3)), ((1, 2), (2, 3)), ((2, 4),), ()])
@pytest.mark.parametrize("dynamic", [False, True])
def test_the_unimodal_part_computed_before_changes_nothing(dynamic, connections):
    """Also where visual layers that the text steers come before the first co-attention."""
    model, batch = tiny(dynamic_attention=dynamic, connections=connections, task_tokens=2).eval(), make_batch()
    batch.task = torch.tensor([0, 1, 1, 0])
    for p in model.parameters():
        p.data += 0.05 * torch.randn_like(p)
    together = model.encode(batch)
    apart = model.encode(batch, given=model.unimodal(batch))
    for field in ("text", "regions", "pooled"):
        torch.testing.assert_close(getattr(apart, field), getattr(together, field))


OPTIONS = {
    "task_tokens": 5,
    "dynamic_attention": True,
    "twelve_in_one": True,
    "fusion": "sum",
    "connections": [[1, 2], [2, 3]],
    "gqa_answers": 9,
}


def test_every_option_of_12_in_1_trains_from_the_command_line(tmp_path, monkeypatch):
    """Two tasks at once: each learns its own task token, the first and the second row of the table; the rest get no
    gradient."""
    monkeypatch.chdir(tmp_path)
    lines = []
    for i in range(12):
        Image.new("RGB", (24, 24), (20 * i, 0, 99)).save(f"{i}.png")
        answer = ("contradiction", "entailment", "neutral")[i % 3]
        split = ("train", "train", "val", "test")[i % 4]
        lines.append(json.dumps({"image": f"{i}.png", "text": f"colour {i}", "answer": answer, "split": split}))
    Path("own.jsonl").write_text("\n".join(lines))
    settings = [f"{name}={value if name == 'fusion' else json.dumps(value)}" for name, value in OPTIONS.items()]
    arguments = ["--model", "vilbert", "--task", "vqa,ve", "--data", "own.jsonl", "--batch-size", "3", "--out", "out"]
    assert train.main([*arguments, "--steps", "8", "--eval-every", "8", "--config", *settings]) == 0
    content = torch.load("out/checkpoint.pt", weights_only=True)
    for name, value in OPTIONS.items():
        assert json.loads(json.dumps(content["config"][name])) == value, name
    moments = [state["exp_avg"] for state in content["optimizer"].values()]
    table = [moment for moment in moments if moment.shape == (5, 128)]
    assert len(table) == 1
    assert table[0].any(1).tolist() == [True, True, False, False, False]


def test_more_tasks_than_task_tokens_is_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (24, 24)).save("a.png")
    Path("own.jsonl").write_text(json.dumps({"image": "a.png", "text": "a", "answer": "neutral", "split": "train"}))
    settings = ["--config", "task_tokens=1"]
    arguments = ["--model", "vilbert", "--task", "vqa,ve", "--data", "own.jsonl", *settings]
    assert train.main([*arguments, "--steps", "1"]) == 2
    assert "task_tokens=1" in capsys.readouterr().err


# ---- dropout and recipe ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dynamic", [False, True])
def test_dropout_acts_where_the_official_code_has_it(dynamic, monkeypatch):
    """On the embeddings, the task token's too, on attention probabilities, after each output projection, and on the
    fused vector.

    2 rows of 7 words, 8 with the task token, and 5 regions, 6 with the whole image. 3 text layers (32 wide, 4 heads),
    2 visual layers (24 wide, 2 heads), 2 co-attention layers (16 wide, 8 heads).
    """
    assert vilbert.Config().dropout == 0.1
    sizes = {"hidden": 32, "layers": 3, "visual_hidden": 24, "visual_heads": 2, "shared": 16, "shared_heads": 8}
    sizes |= {"connections": ((0, 1), (1, 2)), "task_tokens": 3, "dynamic_attention": dynamic, "dropout": 0.25}
    model, batch = tiny(**sizes).train(), make_batch(rows=2, words=7)
    batch.task = torch.tensor([0, 2])
    expected = {
        (0.25, (2, 7, 32)): 1,  # text embedding
        (0.25, (2, 32)): 1,  # task token
        (0.25, (2, 8, 32)): 3 * 2 + 2 * 2,  # two in a layer of either kind
        (0.25, (2, 6, 24)): 1 + 2 * 2 + 2 * 2,  # region embedding besides
        (0.25, (2, 4, 8, 8)): 3,  # text self-attention
        (0.25, (2, 2, 6, 6)): 2,  # region self-attention
        (0.25, (2, 8, 8, 6)): 2,  # text to regions
        (0.25, (2, 8, 6, 8)): 2,  # regions to text
        (0.25, (2, 16)): 1,  # fused vector
    }
    assert dropout_places(monkeypatch, lambda: model.encode(batch)) == expected
    assert dropout_places(monkeypatch, lambda: model.eval().encode(batch)) == {}


@pytest.mark.parametrize("fusion", ["mul", "sum"])
def test_dropout_acts_on_the_vector_of_a_pair_and_of_one_modality_alone(fusion, monkeypatch):
    model, batch = tiny(dropout=0.25, fusion=fusion).train(), make_batch()
    for parts in ({}, {"text": False}, {"regions": False}):
        places = dropout_places(monkeypatch, lambda parts=parts: model.encode(batch, **parts))
        assert places[0.25, (4, 128)] == 1


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        ("vqa", {(0.5, (4, 256)): 1}),  # inside the answer head
        ("refer", {(0.25, (4, 5, 128)): 1}),  # on the regions that the head reads
        ("mlm", {}),
        ("mrc", {}),
        ("itm", {}),
        ("ve", {}),
        ("nlvr2", {}),
        ("vcr", {}),
        ("rank", {}),
    ],
)
def test_dropout_acts_in_the_heads_as_in_the_official_code(head, expected, monkeypatch):
    model, batch = tiny(dropout=0.25, heads=(head,)).train(), make_batch()
    batch.ids = ["one"]
    if head == "ve":
        batch.answers = torch.rand(4, 3)
    if head == "nlvr2":
        batch.target = torch.tensor([0, 1])
    if head == "refer":
        batch.target = torch.rand(4, 5)
    encoding = model.encode(batch)
    loss = vilbert.OBJECTIVES[head].loss
    assert dropout_places(monkeypatch, lambda: loss(model, encoding, batch)) == expected


def test_pretraining_follows_the_official_recipe():
    """Official values: all objectives in every step; 90% of the masked regions zeroed, the rest kept; half of the pairs
    get another caption. In these nothing is predicted, as in 12-in-1."""
    recipe = vilbert.PRETRAINING
    assert recipe["objectives"] == {"mlm": 1, "mrc_kl": 1, "itm": 1}
    assert recipe["region_masking"] == {"zero": 0.9, "random": 0.0, "force_one": False}
    assert (recipe["mismatch"], recipe["mismatched_share"], recipe["predict_mismatched"]) == ("text", 0.5, False)
    assert (recipe["conditional"], recipe["rate"]) == (False, 2.0)
    assert recipe["joined"] == recipe["loss_weights"] == {}
    assert vilbert.NEGATIVES == ("text", "image", "text")
    assert vilbert.VCR_TYPES == ((0, 1), (0, 0, 1))


def test_nce_draws_89_negatives_of_other_pictures_and_38_of_the_same(monkeypatch):
    """70% and 30% of 128, rounded down: the official defaults."""
    model, batch = tiny(heads=("mrfr",)).eval(), make_batch()
    drawn = []
    sample = twelve_in_one.sample_negative_regions

    def record(batch, near, far):
        drawn.append(sample(batch, near, far))
        return drawn[-1]

    monkeypatch.setattr(twelve_in_one, "sample_negative_regions", record)
    logits = model(batch, ("nce",))["nce"][1]
    assert logits.shape == (8, 1 + 89 + 38)
    same_picture = drawn[0] // 5 == batch.region_index[:, None] // 5
    assert same_picture.sum(1).tolist() == [38] * 8


# ---- objectives ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["mlm", "mrc_kl", "mrc", "mrfr", "nce", "itm"])
def test_four_examples_are_learnt(objective):
    model, batch = tiny(heads=("mlm", "mrc", "mrfr", "itm")), make_batch()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    if objective == "mrc_kl":  # kl is 0 where the scores are the target
        batch.object_probs = torch.eye(5)[torch.arange(20).view(4, 5) % 5]
    if objective == "nce":
        batch.clean_features = 3 * torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(1))
    first = None
    for _ in range(45):
        loss = model(batch, (objective,))[objective][0]
        first = loss.item() if first is None else first
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.2 * first, (first, loss.item())


def test_class_one_means_match():
    model, batch = tiny().eval(), make_batch()
    batch.matched = torch.ones(4, dtype=torch.long)
    model.heads["itm"].bias.data = torch.tensor([0.0, 20.0])
    loss, scores = model(batch, ("itm",))["itm"]
    assert loss < 1e-3 and (scores.argmax(1) == 1).all()
    official = formats.vilbert_to_official(model.state_dict())
    assert official["cls.bi_seq_relationship.bias"].tolist() == [20.0, 0.0]  # there, class 0
    back, _ = formats.vilbert_from_official(official, model.state_dict())
    assert all(torch.equal(back[name], tensor) for name, tensor in model.state_dict().items())


def test_nothing_masked_is_zero():
    model, batch = tiny(heads=("mlm", "mrc", "mrfr", "itm")), make_batch()
    batch.word_index = batch.region_index = batch.word_labels = torch.zeros(0, dtype=torch.long)
    losses = model(batch, ("mlm", "mrc_kl", "mrc", "mrfr", "nce"))
    assert all(loss.item() == 0.0 for loss, _ in losses.values()), losses
    sum(loss for loss, _ in losses.values()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_region_losses_by_loops():
    model, batch = tiny(heads=("mrc", "mrfr")).double().eval(), make_batch()
    for name in ("features", "boxes", "clean_features", "object_probs"):
        setattr(batch, name, getattr(batch, name).double())
    encoding = model.encode(batch)
    g = torch.Generator().manual_seed(3)
    negatives = torch.randint(0, 20, (8, 9), generator=g)
    kl = regression = nce = 0.0
    for m, position in enumerate(batch.region_index.tolist()):
        state, target = encoding.regions[position // 5, position % 5], batch.object_probs[position // 5, position % 5]
        log_guess = model.heads["mrc"](state).log_softmax(-1)
        kl += sum(c * (c.log() - guess) for c, guess in zip(target, log_guess, strict=True)) / 8
        predicted, every = model.heads["mrfr"](state), batch.clean_features.reshape(20, 6)
        regression += (predicted - every[position]).square().sum() / 48
        products = torch.stack([predicted @ every[j] for j in [position, *negatives[m].tolist()]])
        nce += (products.exp().sum().log() - products[0]) / 8
    torch.testing.assert_close(vilbert.masked_region_class_kl(model, encoding, batch)[0], kl)
    torch.testing.assert_close(vilbert.masked_region_features(model, encoding, batch)[0], regression)
    torch.testing.assert_close(twelve_in_one.noise_contrastive_regions(model, encoding, batch, negatives)[0], nce)


def test_negatives_are_real_regions():
    batch, position = make_batch(), torch.arange(20).view(4, 5)
    torch.manual_seed(0)
    drawn = twelve_in_one.sample_negative_regions(batch, near=200, far=300)
    assert drawn.shape == (8, 500) and batch.region_mask.flatten()[drawn].all()
    row = batch.region_index[:, None] // 5
    assert (drawn[:, :300] // 5 != row).all() and (drawn[:, 300:] // 5 == row).all()
    assert (drawn != batch.region_index[:, None]).all()
    for m, masked in enumerate(batch.region_index.tolist()):  # all that may come did come
        allowed = set(position[batch.region_mask].tolist()) - {masked}
        assert set(drawn[m].tolist()) == allowed
    batch.pictures[1] = batch.pictures[0]  # another row of the same picture has the positive once more
    drawn = twelve_in_one.sample_negative_regions(batch, near=200, far=300)
    pictures = batch.pictures[drawn // 5]
    assert (pictures[:, :300] != batch.pictures[row]).all() and (drawn[:, 300:] // 5 == row).all()
    alone = make_batch(rows=1)
    assert (twelve_in_one.sample_negative_regions(alone, near=5, far=5) < 5).all()
    alone.region_mask[:, 1:], alone.region_index = False, torch.zeros(1, dtype=torch.long)
    with pytest.raises(common.UserError, match="second region.*--batch-size"):
        twelve_in_one.sample_negative_regions(alone, near=5, far=5)


def test_task_losses_by_closed_forms():
    heads = ("vqa", "ve", "nlvr2", "vcr", "rank", "refer")
    model, batch = tiny(heads=heads, gqa_answers=7).eval(), make_batch()
    batch.target, batch.ids = torch.tensor([0, 0, 1, 0]), ["a question"]
    scores = model(batch, ("rank", "vcr"))
    for name, right in (("rank", 0), ("vcr", 2)):
        loss, score = scores[name]
        torch.testing.assert_close(loss, -score.log_softmax(0)[right])
    for name in ("vqa",):
        loss, score = model(batch, (name,))[name]
        chance = score.sigmoid()
        expected = -(batch.answers * chance.log() + (1 - batch.answers) * (1 - chance).log()).sum(1).mean()
        torch.testing.assert_close(loss, expected)
    batch.answers = F.one_hot(torch.arange(4) % 3, 3).float()
    loss, score = model(batch, ("ve",))["ve"]
    torch.testing.assert_close(loss, -(score * (2 * batch.answers - 1)).sigmoid().log().mean())
    batch.target = torch.tensor([0, 1])
    loss, score = model(batch, ("nlvr2",))["nlvr2"]
    sign = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    torch.testing.assert_close(loss, -(score * sign).sigmoid().log().mean())
    overlap = torch.rand(4, 5, generator=torch.Generator().manual_seed(5)) * batch.region_mask
    for batch.target in (overlap, overlap * 0.45):  # in the second no region overlaps by one half
        label = batch.target.where(batch.target >= 0.5, 0.0)
        loss, score = model(batch, ("refer",))["refer"]
        assert (score[~batch.region_mask] < -9000).all()
        torch.testing.assert_close(loss, F.binary_cross_entropy_with_logits(score, label, reduction="sum") / 4)


def formula(name, logits, batch):
    """Each loss from its logits in float64, by torch's own functions."""
    target = batch.clean_features.double().flatten(0, 1)[batch.region_index]  # (M, F)
    probs = batch.object_probs.double().flatten(0, 1)[batch.region_index]  # (M, K)
    if name == "mlm":
        return F.cross_entropy(logits, batch.word_labels)
    if name == "mrc":
        return F.cross_entropy(logits, 1 + probs[:, 1:].argmax(1))
    if name == "mrc_kl":
        return F.kl_div(logits.log_softmax(-1), probs, reduction="batchmean")
    if name == "mrfr":
        return F.mse_loss(logits, target)
    if name == "nce":
        return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long))
    if name == "itm":
        return F.cross_entropy(logits, batch.matched)
    if name == "ve":
        return F.binary_cross_entropy_with_logits(logits, batch.answers.double())
    if name == "nlvr2":
        return F.binary_cross_entropy_with_logits(logits, F.one_hot(batch.target, 2).double())
    if name == "vcr":
        return F.cross_entropy(logits[None], batch.target.argmax()[None])
    if name == "rank":
        return F.cross_entropy(logits[None], torch.tensor([0]))
    target = batch.target.masked_fill(batch.target < 0.5, 0).double()  # refer
    return F.binary_cross_entropy_with_logits(logits, target, reduction="sum") / 4


@pytest.mark.parametrize("name", ["mlm", "mrc", "mrc_kl", "mrfr", "nce", "itm", "ve", "nlvr2", "vcr", "rank", "refer"])
def test_losses_are_computed_in_float32_under_autocast(name):
    """With logits as large as 30, half precision would be off in the third digit."""
    model = tiny(heads=("mlm", "mrc", "mrfr", "itm", "ve", "nlvr2", "vcr", "rank", "refer")).eval()
    batch = make_batch()
    for p in model.heads.parameters():
        p.data *= 10
    batch.ids = ["one"]
    batch.answers = F.one_hot(torch.arange(4) % 3, 3).float()
    if name == "nlvr2":
        batch.target = torch.tensor([0, 1])
    if name == "vcr":
        batch.target = torch.tensor([0, 0, 1, 0])
    if name == "refer":
        batch.target = torch.rand(4, 5, generator=torch.Generator().manual_seed(5)) * batch.region_mask
    with torch.autocast("cpu", torch.bfloat16):
        loss, logits = model(batch, [name])[name]
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), formula(name, logits.double(), batch), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["itm", "vcr", "rank", "refer"])
def test_logits_that_are_ranked_are_computed_in_float32_under_autocast(name):
    """They differ from the float64 head on the same states by no more than float32 does; bfloat16 by 1%."""
    model, batch = tiny(heads=(name,)).eval(), make_batch()
    batch.ids, batch.target = ["one"], torch.zeros(4, 5) if name == "refer" else torch.tensor([0, 0, 1, 0])
    with torch.autocast("cpu", torch.bfloat16):
        encoding = model.encode(batch)
        logits = vilbert.OBJECTIVES[name].loss(model, encoding, batch)[1]
    states = encoding.regions if name == "refer" else encoding.pooled
    expected = model.heads.double()[name](states.double()).view(logits.shape)
    if name == "refer":
        expected[~batch.region_mask] -= 10000.0
    torch.testing.assert_close(logits.double(), expected, rtol=1e-5, atol=1e-6)


def test_a_referring_expression_without_its_regions_has_a_finite_loss():
    """--ablate image hides all regions after their overlaps are known: nothing is left to find, and the loss is small."""
    model = tiny(heads=("refer",)).eval()
    batch = make_batch()
    batch.target = torch.full(batch.region_mask.shape, 0.9)
    batch.region_mask = torch.zeros_like(batch.region_mask)
    loss, _ = model(batch, ("refer",))["refer"]
    assert 0 <= loss.item() < 1
