"""Tests of attention.py and attention_sheet.py: the methods against torch's own attention, block matrices multiplied by
hand, finite differences and the rules written out; the measurement on made-up maps; the commands as a user runs them."""

import dataclasses
import re

import numpy as np
import pytest
import tables
import torch
from helpers import narrow, use, with_pool
from PIL import Image

import common
import data
import predict
import tasks
import train
from prepare import scene_texts, scenes
from support import attention, attention_sheet, drawing, examples, questions, regions

MODELS = ("uniter", "vilbert", "lxmert")
TASKS = "vqa,ve,nlvr2,vcr,retrieval,refer"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a picture; the runs are made in it."""
    folder = tmp_path_factory.mktemp("attention")
    scenes.draw_scene(scenes.make_scene(0, "test", 0)).save(folder / "a.png")
    return folder


@pytest.fixture
def trained(folder, small_scenes, monkeypatch, capsys):
    """trained(model): checkpoint of a run of a few steps of six tasks, made on first use; of pretraining by task="pretrain"."""
    monkeypatch.chdir(folder)

    def run(model, task=TASKS):
        out = f"{model}-{task[:3]}"
        if not (folder / out / "result.json").exists():
            command = ["--model", model, "--task", task, "--data", str(small_scenes(10)), "--out", out]
            command += ["--steps", "6", "--batch-size", "8", "--device", "cpu", "--dtype", "f32", "--limit", "16"]
            command += ["--eval-every", "6"]
            assert train.main(narrow(with_pool(command, 5))) == 0
        capsys.readouterr()
        return f"{out}/checkpoint.pt"

    return run


def load(checkpoint, task="vqa", count=3):
    """(run, task, dataset) of a checkpoint and held-out examples."""
    args = predict.parse([checkpoint, "--scenes", "--task", task, "--device", "cpu", "--dtype", "f32"])
    run, row = predict.load_run(args)
    dataset, _ = predict.held_out(run, row, None, count)
    return run, row, dataset


# ---- made-up records -------------------------------------------------------------------------------------------------

T, N, H = 4, 3, 2  # word pieces, regions, heads
SINGLE = {"layer.0": (7, 7), "layer.1": (7, 7)}
DOUBLE = {  # as LXMERT names them, and with the whole image of ViLBERT as first region
    "text.0": (4, 4),
    "regions.0": (4, 4),
    "cross.0.text_to_regions": (4, 4),
    "cross.0.regions_to_text": (4, 4),
    "cross.0.text": (4, 4),
    "cross.0.regions": (4, 4),
    "cross.1.text_to_regions": (4, 4),
    "cross.1.regions_to_text": (4, 4),
}


def made_up(shapes, S):
    """An AttentionRecord with random maps and gradients, T words before N regions at the end of S positions."""
    torch.manual_seed(0)
    split = T if S == T + N else S // 2
    maps = {name: torch.rand(H, *shape).softmax(-1) for name, shape in shapes.items()}
    gradients = {name: torch.randn(H, *shape) for name, shape in shapes.items()}
    spans = {"text": slice(0, split), "regions": slice(split, S), "both": slice(0, S)}
    pieces = ["[CLS]", "a", "b", "[SEP]"]
    row = torch.eye(S)[0]
    return attention.AttentionRecord(pieces, 0, maps, gradients, spans, torch.randn(T, 8), torch.randn(N, 8), row)


def block(size, rows, columns, matrix):
    """`matrix` at these rows and columns of a zero matrix."""
    result = np.zeros((size, size))
    result[np.ix_(rows, columns)] = matrix
    return result


def test_rollout_is_the_product_of_the_layers_matrices():
    record = made_up(SINGLE, 7)
    first, second = (record.maps[name].mean(0).double().numpy() for name in SINGLE)
    expected = (0.5 * second + 0.5 * np.eye(7)) @ (0.5 * first + 0.5 * np.eye(7))
    np.testing.assert_allclose(attention.rollout(record).numpy(), expected, atol=1e-6)


def test_rollout_of_two_sequences_is_the_product_of_block_matrices():
    record = made_up(DOUBLE, 8)
    t = np.arange(4)  # words
    r = np.arange(4, 8)  # regions
    mean = {name: probs.mean(0).double().numpy() for name, probs in record.maps.items()}
    steps = []
    for text, image in (("text.0", "regions.0"), ("cross.0.text", "cross.0.regions")):
        inner = block(8, t, t, mean[text]) + block(8, r, r, mean[image])
        steps.append(0.5 * inner + 0.5 * np.eye(8))
    for i in (0, 1):
        across = block(8, t, r, mean[f"cross.{i}.text_to_regions"]) + block(8, r, t, mean[f"cross.{i}.regions_to_text"])
        steps.append(0.5 * across + 0.5 * np.eye(8))
    own, own_again, cross, cross_again = steps
    expected = cross_again @ own_again @ cross @ own
    found = attention.rollout(record).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-6)
    np.testing.assert_allclose(found.sum(1), 1, atol=1e-6)


def weighted(record, name):
    """Equation 5 of Chefer et al. in a loop over heads."""
    total = 0
    for h in range(H):
        total = total + np.maximum((record.gradients[name][h] * record.maps[name][h]).double().numpy(), 0)
    return total / H


def norm(matrix):
    """Equations 8 and 9 of Chefer et al., row by row; a row without anything read stays that of I."""
    result = np.eye(len(matrix))
    for row, own in zip(matrix, np.eye(len(matrix)), strict=True):
        i = int(own.argmax())
        if (row - own).sum() > 0:
            result[i] = (row - own) / (row - own).sum() + own
    return result


def test_gradient_weighted_attention_of_one_sequence_follows_the_rule():
    record = made_up(SINGLE, 7)
    expected = np.eye(7)
    for name in SINGLE:
        expected = expected + weighted(record, name) @ expected
    np.testing.assert_allclose(attention.gradient(record).numpy(), expected, atol=1e-5)


def test_gradient_weighted_attention_of_two_sequences_follows_the_rules():
    """The four blocks apart, as in the paper."""
    record = made_up(DOUBLE, 8)
    tt, ii = np.eye(4), np.eye(4)
    ti, it = np.zeros((2, 4, 4))

    def own(text, image):
        nonlocal tt, ii, ti, it
        a = weighted(record, text)
        tt, ti = tt + a @ tt, ti + a @ ti
        a = weighted(record, image)
        ii, it = ii + a @ ii, it + a @ it

    def across(i):
        nonlocal tt, ii, ti, it
        a = weighted(record, f"cross.{i}.text_to_regions")
        b = weighted(record, f"cross.{i}.regions_to_text")
        new_ti, new_tt = ti + norm(tt).T @ a @ norm(ii), tt + a @ it
        new_it, new_ii = it + norm(ii).T @ b @ norm(tt), ii + b @ ti
        tt, ii, ti, it = new_tt, new_ii, new_ti, new_it

    own("text.0", "regions.0")
    across(0)
    own("cross.0.text", "cross.0.regions")
    across(1)
    expected = np.block([[tt, ti], [it, ii]])
    np.testing.assert_allclose(attention.gradient(record).numpy(), expected, rtol=1e-4, atol=1e-4)


def test_before_any_self_attention_a_cross_attention_is_taken_as_it_is():
    shapes = {name: shape for name, shape in DOUBLE.items() if name.startswith("cross.1")}
    record = made_up(shapes, 8)
    found = attention.gradient(record).numpy()
    np.testing.assert_allclose(found[:4, 4:], weighted(record, "cross.1.text_to_regions"), atol=1e-6)
    np.testing.assert_allclose(found[4:, :4], weighted(record, "cross.1.regions_to_text"), atol=1e-6)


def test_a_word_of_several_pieces_is_their_mean_and_its_part_their_sum():
    record = made_up(SINGLE, 7)
    record.pieces = ["[CLS]", "tri", "##angle", "[SEP]"]
    matrix = torch.rand(7, 7)
    assert attention.join_pieces(record.pieces)[0] == ["[CLS]", "triangle", "[SEP]"]
    rows = torch.stack([matrix[0, 4:], matrix[1:3, 4:].mean(0), matrix[3, 4:]])
    torch.testing.assert_close(attention.words_to_regions(record, matrix), rows / rows.sum(1, keepdim=True))
    columns = torch.stack([matrix[4:, 0], matrix[4:, 1] + matrix[4:, 2], matrix[4:, 3]], 1)
    torch.testing.assert_close(attention.regions_to_words(record, matrix), columns / columns.sum(1, keepdim=True))


def test_one_layer_and_one_head_of_raw_attention_are_the_maps_as_recorded():
    record = made_up(SINGLE, 7)
    for number, name in enumerate(SINGLE):
        for head in range(H):
            torch.testing.assert_close(attention.raw(record, number, head), record.maps[name][head])
    both = (record.maps["layer.0"][1] + record.maps["layer.1"][1]) / 2
    torch.testing.assert_close(attention.raw(record, head=1), both)
    record = made_up(DOUBLE, 8)
    maps = record.maps
    second = attention.raw(record, layer=1, head=1)  # text and regions have one layer of their own before cross.0
    torch.testing.assert_close(second[:4, 4:], maps["cross.1.text_to_regions"][1])
    torch.testing.assert_close(second[4:, :4], maps["cross.1.regions_to_text"][1])
    torch.testing.assert_close(second[:4, :4], maps["cross.0.text"][1])
    mean = attention.raw(record, head=0)
    torch.testing.assert_close(mean[4:, 4:], (maps["regions.0"][0] + maps["cross.0.regions"][0]) / 2)


# ---- recorded maps -----------------------------------------------------------------------------------------------------


def torch_probs(block, x, context, mask):
    """The attention probabilities by torch's own layer, mean over heads: x (B, T, C), context (B, S, C) -> (B, T, S)."""
    width = x.shape[-1]
    layer = torch.nn.MultiheadAttention(width, block.heads, batch_first=True)
    with torch.no_grad():
        layer.in_proj_weight.copy_(torch.cat([block.query.weight, block.key.weight, block.value.weight]))
        layer.in_proj_bias.copy_(torch.cat([block.query.bias, block.key.bias, block.value.bias]))
        return layer(x, context, context, key_padding_mask=~mask)[1]


def test_raw_maps_are_those_of_torch(trained):
    for model in MODELS:
        run, row, dataset = load(trained(model), count=6)
        i = int(np.argmin(dataset.lengths()[:, 0]))  # the shortest text
        record = attention.record_example(run, row, dataset, i)[0]
        batch = data.collate(dataset, np.array([i]))
        with torch.inference_mode():
            states = run.model.encode(batch, record=True).states
        words = batch.text_mask
        cells = batch.region_mask
        matrix = attention.raw(record)
        if model == "uniter":
            x = [states["embedding"], states["layer.0"]]
            both = torch.cat([words, cells], 1)
            probs = [torch_probs(layer.attention, y, y, both) for layer, y in zip(run.model.layers, x, strict=True)]
            torch.testing.assert_close(matrix, torch.stack(probs).mean(0)[0], atol=1e-5, rtol=1e-4)
            probs = torch_probs(run.model.layers[1].attention, x[1], x[1], both)[0]
            torch.testing.assert_close(attention.raw(record, layer=1), probs, atol=1e-5, rtol=1e-4)
            continue
        if model == "lxmert":
            inputs = [("text.0", "regions.0"), ("cross.0.text", "cross.0.regions")]
            blocks = [(layer.cross, layer.cross) for layer in run.model.cross_layers]
        else:  # before the second connection one more layer of each has run
            inputs = [("text.1", "regions.embedding"), ("text.2", "regions.0")]
            blocks = [(layer.text_reads, layer.regions_read) for layer in run.model.connections]
            cells = torch.nn.functional.pad(cells, (1, 0), value=True)  # the whole image
        text = record.spans["text"]
        image = record.spans["regions"]
        forth = []
        back = []
        for (name, other), (reads, is_read) in zip(inputs, blocks, strict=True):
            forth.append(torch_probs(reads, states[name], states[other], cells)[0])
            back.append(torch_probs(is_read, states[other], states[name], words)[0])
        torch.testing.assert_close(matrix[text, image], torch.stack(forth).mean(0), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(matrix[image, text], torch.stack(back).mean(0), atol=1e-5, rtol=1e-4)
        assert record.word_span.stop - record.word_span.start == int(words.sum())
        assert record.region_span.stop - record.region_span.start == int(batch.region_mask.sum())


@pytest.mark.parametrize("model", MODELS)
def test_gradients_are_finite_differences(model, trained, monkeypatch):
    """Of the answer's logit, when one probability of one map is moved by hand: the first map, one of each direction of the
    cross-attention where there is one, and the last map that the answer depends on."""
    run, row, dataset = load(trained(model))
    run.model.double()
    batch = tasks.make_batch(run, dataset, np.array([0]), ["vqa"], None)
    batch.features = batch.features.double()
    batch.boxes = batch.boxes.double()
    monkeypatch.setattr(tasks, "make_batch", lambda *arguments: batch)
    record = attention.record_example(run, row, dataset, 0)[0]
    names = list(record.maps)  # in the order of computation
    before = common.attention
    shapes = []  # of the maps computed so far
    moved = {}

    def move(query, key, value, bias=None, dropout=0.0):
        _, probs = before(query, key, value, bias, dropout)
        probs = probs.clone()
        if len(shapes) == names.index(moved["name"]):
            probs[(0, *moved["place"])] += moved["step"]
        shapes.append(probs.shape[1:])
        return probs @ value, probs

    monkeypatch.setattr(common, "attention", move)
    crossing = [name for name in names if name.startswith("cross.0.") and "_to_" in name]
    slopes = []
    for name in [names[0], *crossing, names[-1]]:
        for place in ((0, 0, 2), (1, 3, 4), (1, 1, 0)):  # head, query, key
            logits = []
            for step in (1e-4, -1e-4):
                shapes.clear()
                moved.update(name=name, place=place, step=step)
                with torch.no_grad():
                    logits.append(run.model.heads["vqa"](run.model.encode(batch, record=True).pooled)[0])
            assert shapes == [probs.shape for probs in record.maps.values()]
            answer = int(logits[0].argmax())
            slope = float(logits[0][answer] - logits[1][answer]) / 2e-4
            assert abs(float(record.gradients[name][place]) - slope) < 1e-4 * max(1e-2, abs(slope)), (name, place)
            slopes.append(abs(slope))
    assert min(slopes[:3]) > 0 and sum(slope > 1e-6 for slope in slopes) > len(slopes) / 2


def test_the_answers_row_is_where_its_logit_is_read(trained):
    for model in MODELS:
        run, row, dataset = load(trained(model))
        record = attention.record_example(run, row, dataset, 0)[0]
        found = record.answer_row.nonzero()[:, 0].tolist()
        words = len(record.pieces)
        assert found == ([0, words] if model == "vilbert" else [0])  # [CLS], and ViLBERT's whole image
        assert float(record.answer_row.sum()) == 1
        run, row, dataset = load(trained(model), "refer")
        record = attention.record_example(run, row, dataset, 0)[0]
        logits = tasks.example_logits(run, dataset, np.array([0]), "refer")
        assert record.answer_row.nonzero()[:, 0].tolist() == [record.region_span.start + int(logits.argmax())]


@pytest.mark.parametrize("model", MODELS)
def test_the_weights_of_the_regions_are_shares(model, trained):
    for name in TASKS.split(","):
        run, task, dataset = load(trained(model), name)
        for method in attention.METHODS:
            for i in range(2):
                with torch.inference_mode():  # as the server calls it
                    weights = attention.region_weights(run, task, dataset, i, method)
                rows = dataset.image[dataset.rows_of([i])][: task.pictures]
                assert len(weights) == sum(np.diff(dataset.store.offsets)[rows])
                assert min(weights) >= 0
                assert abs(sum(weights) - 1) < 1e-5
                assert max(weights) - min(weights) > 1e-6


def test_a_picture_that_the_answer_does_not_depend_on_has_no_weight(trained, monkeypatch):
    run, task, dataset = load(trained("uniter"), "nlvr2")
    left, right = np.diff(dataset.store.offsets)[dataset.image[:2]]
    monkeypatch.setattr(attention, "best_logit", lambda run, task, batch, encoding: encoding.pooled[0].sum())
    weights = attention.region_weights(run, task, dataset, 0)
    assert len(weights) == left + right and weights[left:] == [0] * right
    assert sum(weights) == pytest.approx(1)


def test_a_long_question_is_drawn_whole_above_the_cells():
    cell = Image.new("RGB", (800, 50), "white")
    short = attention_sheet.draw_sheet(["what?", "red"], [[cell]])
    long = attention_sheet.draw_sheet(["what is " * 200, "red"], [[cell]])
    assert long.height > short.height + 200  # 800 pixels take no 400 words in nine lines
    assert long.width == short.width


def test_layers_of_8_bits_have_no_attention_to_show(trained):
    args = predict.parse([trained("uniter"), "--serve", "--int8", "--device", "cpu"])
    run, task = predict.load_run(args)
    dataset, _ = predict.held_out(run, task, None, 1)
    pictures = [questions.stored_regions(dataset.store, dataset.image[0])]
    with torch.inference_mode():  # as the server calls it
        assert "8 bits" in questions.weigh_regions(run, task, dataset, 0, pictures)["note"]


def test_a_transport_plan_has_equal_shares_of_all_words_and_all_regions(trained):
    run, task, dataset = load(trained("uniter", "pretrain"), "pretrain")
    record = attention.record_example(run, task, dataset, 0)[0]
    plan = attention.transport_plan(run, record)
    words, cells = plan.shape
    assert words == len(record.pieces) and cells == len(record.regions)
    np.testing.assert_allclose(plan.sum(1).numpy(), 1 / words, rtol=1e-4)
    np.testing.assert_allclose(plan.sum(0).numpy(), 1 / cells, rtol=1e-2)
    # it moves the most between the positions whose last states are most alike, as a uniform plan does not
    with torch.inference_mode():
        found = run.model.encode(data.collate(dataset, np.array([0])))
    alike = torch.nn.functional.cosine_similarity(found.text[0, :, None], found.regions[0, None], dim=-1)  # (T, N)
    assert (plan * alike).sum() > alike.mean() + 0.1 * (alike.max() - alike.mean())
    half_sure = (
        50 * 2 * alike
    )  # IPOT multiplies exp(-cost / 0.5) fifty times; the rest is a factor of each row and column
    rest = plan.log() - half_sure
    rest = rest - rest.mean(0, keepdim=True) - rest.mean(1, keepdim=True) + rest.mean()
    visible = plan > 1e-20
    assert rest[visible].abs().max() < 1e-2 * half_sure.std()


# ---- the measurement -----------------------------------------------------------------------------------------------------


def test_a_region_that_overlaps_by_one_half_is_not_the_thing():
    boxes = torch.tensor([[0, 0, 0.5, 1], [0.75, 0, 1, 1]])
    assert attention.pointing(torch.tensor([0.5, 0.5]), boxes, torch.tensor([0.0, 0, 1, 1])) is None


def test_pointing_of_a_made_up_map():
    boxes = torch.tensor([[0, 0, 0.5, 0.5], [0.5, 0.5, 1, 1], [0, 0.5, 0.5, 1]])
    target = torch.tensor([0.5, 0.5, 1, 0.9])
    assert attention.pointing(torch.tensor([0.25, 0.75, 0]), boxes, target) == (0.75, 1)
    assert attention.pointing(torch.tensor([0.75, 0.25, 0]), boxes, target) == (0.25, 0)
    assert attention.pointing(torch.tensor([0.5, 0.5, 0]), boxes, target) == (0.5, 0.5)
    assert attention.pointing(torch.tensor([0.5, 0.5, 0]), boxes, torch.tensor([0, 0, 1, 1])) is None


@pytest.mark.parametrize("model", MODELS)
def test_a_region_that_is_left_out_is_as_if_it_were_not_there(model, trained):
    run, task, dataset = load(trained(model))
    found = attention.leave_out(run, task, dataset, 0)
    fields = {name: values[0].numpy() for name, values in dataset.store.gather([dataset.image[0]]).items()}
    pictures = []
    for hidden in (None, *range(len(found))):
        kept = [j for j in range(len(found)) if j != hidden]
        pictures.append({name: values[kept] for name, values in fields.items()} | {"size": (112, 112)})
    questions = [({"text": dataset.text[0]}, [picture]) for picture in pictures]
    again = examples.make_dataset(run, task, questions)
    assert isinstance(again.store, regions.MemoryStore)
    logits = []
    for i in range(len(again)):
        with torch.inference_mode():
            logits.append(tasks.example_logits(run, again, np.array([i]), "vqa")[0].log_softmax(-1))
    answer = int(logits[0].argmax())
    expected = [max(0.0, float(logits[0][answer] - row[answer])) for row in logits[1:]]
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)
    assert max(expected) > 1e-4


@pytest.mark.parametrize(
    ("model", "task"), [("uniter", "vqa"), ("vilbert", "vqa"), ("lxmert", "vqa"), ("uniter", "nlvr2")]
)
def test_every_row_of_the_measurement_is_read_off_its_matrix(model, task, trained):
    """By loops: the rows of the positions that the answer is read from, and of each word."""
    run, row, dataset = load(trained(model), task)
    found, boxes = attention.all_weights(run, row, dataset, 0)
    record = attention.record_example(run, row, dataset, 0)[0]
    T = len(record.pieces)
    N = len(boxes)
    torch.testing.assert_close(boxes, dataset.store.gather(dataset.image[:1])["boxes"][0])
    expected = {"equal": np.full(N, 1 / N)}
    areas = [float((x2 - x1) * (y2 - y1)) for x1, y1, x2, y2 in boxes.tolist()]
    expected["area"] = np.array(areas) / sum(areas)
    for name, method in attention.METHODS.items():
        matrix = method(record).double().numpy()
        read_from = [0]
        if model == "vilbert":
            read_from = [0, T]  # and the whole image
        if task == "nlvr2":
            read_from = range(T + N)  # the paired attention reads every state
        answer = sum(matrix[place, -N:] for place in read_from)
        expected[f"answer, {name}"] = answer / answer.sum()
        words = []
        for first, piece in enumerate(record.pieces):
            if piece in ("[CLS]", "[SEP]") or piece.startswith("##"):
                continue
            pieces = [first]
            while record.pieces[pieces[-1] + 1].startswith("##"):
                pieces.append(pieces[-1] + 1)
            word = matrix[pieces, -N:].mean(0)
            words.append(word / word.sum())
        expected[f"words, {name}"] = np.mean(words, 0)
    if task == "vqa":
        falls = attention.leave_out(run, row, dataset, 0).numpy()
        expected["answer, left out"] = falls / falls.sum()
    if model == "uniter":
        plan = attention.transport_plan(run, record)[1:-1].mean(0).numpy()
        expected["words, transport"] = plan / plan.sum()
    assert set(found) == set(expected)
    for name, weights in expected.items():
        np.testing.assert_allclose(found[name].numpy(), weights, atol=2e-6, err_msg=name)


def test_what_has_no_attention_to_show_is_said(trained, monkeypatch):
    run, row, dataset = load(trained("uniter"), "retrieval")
    assert len(attention.record_example(run, row, dataset, 0)) == 1
    with pytest.raises(common.UserError, match="the checkpoint has no head other"):
        attention.record_example(run, dataclasses.replace(row, ranks="other"), dataset, 0)
    with pytest.raises(common.UserError, match="attention"):
        attention.record_example(run, tasks.CAPTION, dataset, 0)
    run.args.ablate = "image"
    with pytest.raises(common.UserError, match="no regions to attend to"):
        attention.record_example(run, row, dataset, 0)
    run, row, dataset = load(trained("uniter"), "nlvr2")
    before = tasks.make_batch
    monkeypatch.setattr(tasks, "make_batch", lambda *arguments: data.join_pictures(before(*arguments)))  # as a triplet
    with pytest.raises(common.UserError, match="reads two pictures in one row"):
        attention.record_example(run, row, dataset, 0)


def test_where_the_answer_has_read_nothing_all_regions_weigh_alike(trained, monkeypatch):
    """The logit is constant: every gradient is zero."""
    run, row, dataset = load(trained("uniter"))
    monkeypatch.setattr(attention, "best_logit", lambda run, task, batch, encoding: encoding.pooled.sum() * 0.0)
    weights = attention.region_weights(run, row, dataset, 0)
    assert weights == pytest.approx([1 / len(weights)] * len(weights)) and len(weights) > 1


def test_the_measurement_is_a_mean_over_examples(trained, monkeypatch):
    run, task, dataset = load(trained("uniter"))
    boxes = torch.tensor([[0, 0, 0.5, 0.5], [0.5, 0.5, 1, 1.0]])
    made_up = [torch.tensor([0.9, 0.1]), torch.tensor([0.4, 0.6])]
    monkeypatch.setattr(attention, "all_weights", lambda run, task, dataset, i: ({"row": made_up[i]}, boxes))
    targets = {0: (0, 0, 0.5, 0.5), 1: (0, 0, 0.5, 0.5)}
    found, count = attention.measure_pointing(run, task, dataset, targets)
    assert count == 2 and found == {"row": pytest.approx((0.65, 0.5))}


def test_the_thing_asked_for_has_the_asked_property(drawn):
    dataset = drawn("test", "vqa", 20)
    asked = 0
    for i in range(len(dataset)):
        box = tables.asked_thing(dataset, i)
        if box is None:
            assert dataset.kind[i] not in ("color", "shape", "size")
            continue
        scene = scene_texts.make_scene(0, "test", int(dataset.ids[i].split("/")[1]))
        things = [thing for thing in scene.things if np.allclose(np.array(thing.box), box * scene_texts.SIDE)]
        assert [getattr(thing, dataset.kind[i]) for thing in things] == list(dataset.answer[i])
        asked += 1
    assert asked > 20


# ---- the commands --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", MODELS)
def test_a_sheet_of_each_kind_is_drawn(model, trained, folder, capsys):
    checkpoint = trained(model)
    assert use(checkpoint, "--scenes", 2, "--attention", "a-all.png") == 0
    printed = capsys.readouterr().out
    assert printed.count("(the answer): region ") == 2 and printed.count("truth: ") == 2
    assert printed.endswith("a-all.png: attention, method raw\n")
    assert len(Image.open("a-all.png").getcolors(10**6)) > 100
    asked = ["--image", "a.png", "--text", "what color is the circle?", "--boxes", "[[0,0,50,50],[40,40,112,112]]"]
    for more, lines in (
        ([], r"    circle: region [01] 0\.\d+\n"),
        (["--word", "circle"], r"    circle: region [01] 0\.\d+\n"),
        (["--word", "circle", "--method", "raw", "--layer", "1", "--head", "0"], r"circle: region [01]"),
        (["--region", "1", "--method", "rollout"], r"    region 1: \S+ 0\.\d+\n"),
        (["--method", "gradient"], r"method gradient"),
    ):
        assert use(checkpoint, *asked, *more, "--attention", "a-one.png") == 0
        assert re.search(lines, capsys.readouterr().out), more
        assert Image.open("a-one.png").width >= 2 * 400


def test_a_word_that_stands_twice_is_drawn_twice(trained, folder, capsys):
    asked = ["--image", "a.png", "--text", "is the circle a circle?", "--boxes", "[[0,0,50,50],[40,40,112,112]]"]
    heights = []
    for word, times in (("is", 1), ("circle", 2)):  # --word may be in capitals, as the text may
        assert use(trained("uniter"), *asked, "--word", word.upper(), "--attention", "a-word.png") == 0
        assert capsys.readouterr().out.count(f"    {word}: region ") == times
        heights.append(Image.open("a-word.png").height)
    assert heights[1] > 1.5 * heights[0]


def test_a_light_region_on_a_heavy_one_keeps_its_own_brightness():
    """By the middle pixels of a white picture: full weight is white, none is DARK."""
    white = Image.new("RGB", (200, 200), "white")
    boxes = [[0, 0, 1, 1], [0, 0, 0.4, 0.4], [0.5, 0.5, 0.9, 0.9]]
    for weights in ([0.6, 0.0, 0.3], [0.3, 0.0, 0.6]):
        cell = attention_sheet.draw_heat(white, boxes, weights, "")
        left, top = drawing.MARGIN, 28
        for weight, place in zip(weights, ((180, 20), (50, 50), (140, 140)), strict=True):
            expected = 255 * (attention_sheet.DARK + (1 - attention_sheet.DARK) * weight / 0.6)
            assert abs(cell.getpixel((left + place[0], top + place[1]))[0] - expected) < 3


def test_two_pictures_have_a_sheet_each(trained, capsys):
    assert use(trained("lxmert"), "--task", "nlvr2", "--scenes", 1, "--attention", "two.png") == 0
    found = re.findall(r"picture \d|\(the answer\)", capsys.readouterr().out)
    assert found == ["picture 1", "(the answer)", "picture 2", "(the answer)"]


@pytest.mark.parametrize("model", MODELS)
def test_of_choices_with_one_logit_a_single_one_is_explained(model, trained):
    """The gradient of a maximum is divided among all that reach it."""
    run, task, dataset = load(trained(model), "vcr")
    dataset.text = [text[:-1] + ("red",) for text in dataset.text]  # all choices
    dataset.encode(run.tokenizer, max_length=60)
    assert len(attention.record_example(run, task, dataset, 0)) == 1


def test_the_printed_region_is_the_heaviest(trained, capsys):
    checkpoint = trained("vilbert")
    run, task, dataset = load(checkpoint, count=1)
    assert use(checkpoint, "--scenes", 1, "--method", "gradient", "--attention", "heavy.png") == 0
    region, weight = re.search(r"\(the answer\): region (\d+) (\S+)", capsys.readouterr().out).groups()
    weights = attention.region_weights(run, task, dataset, 0)
    assert int(region) == int(np.argmax(weights)) and abs(float(weight) - max(weights)) < 1e-3


def test_the_transport_plan_is_drawn(trained, capsys):
    assert use(trained("uniter", "pretrain"), "--scenes", 1, "--method", "transport", "--attention", "plan.png") == 0
    assert "[CLS]: region" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "x.jsonl", "--attention", "a.png"], "--attention needs --image or --scenes"),
        (["--scenes", "--word", "circle"], "give --attention"),
        (["--scenes", "--attention", "a.png", "--word", "a", "--region", "0"], "not both"),
        (["--scenes", "--attention", "a.png", "--method", "rollout", "--head", "0"], "--method raw"),
        (["--scenes", "--attention", "a.png", "--word", "zebra"], "none of the texts"),
        (["--scenes", "--attention", "a.png", "--region", "99"], "the picture has regions 0 to"),
        (["--scenes", "--attention", "a.png", "--layer", "7"], "layers 0 to 1"),
        (["--scenes", "--attention", "a.png", "--head", "7"], "heads 0 to 3"),
        (["--scenes", "--attention", "a.nothing"], "--attention a.nothing"),
        (["--scenes", "--attention", "a.png", "--method", "transport"], "no transport plan"),
        (["--scenes", "--attention", "a.png", "--method", "none"], "--method"),
        (["--scenes", "--attention", "a.png", "--method", "transport", "--word", "a"], "leave out --word and --region"),
        (["--scenes", "--attention", "a.png", "--method", "transport", "--region", "0"], "leave out --word"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(arguments, message, trained, capsys):
    assert use(trained("lxmert"), *arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and "Traceback" not in error, error
