"""Equality with the official implementations, number by number.

Each fixture `<model>*.npz` holds random weights under the official parameter names, inputs, and what the official code
computed from them in float64. It is read from the folder that the environment variable GOLDEN names, default
`tests/golden`. Every task of every fixture is one test case, run three times:

    float64                            every stored number to 1e-9
    float64, padding full of rubbish   the same numbers: what is hidden must not matter
    float32                            the scores to 1e-5 of the largest of them

A task or an output that this file does not know fails. Adaptors, one section a model, map official inputs to ours:
`TASKS[model][task](fixture, task, dtype, rubbish)` returns {output name: ours}, where ours is a tensor, or a pair
(tensor, bool mask of the positions that count), or SKIP for a stored number that is no property of the model.
"""

import json
import os
import re
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F

import checkpoints
import lxmert
import uniter
import vilbert
from common import (
    AttentionBlock,
    attention_bias,
    optimal_transport,
    question_answering,
    soft_answer_loss,
)
from support import formats, twelve_in_one
from support.evaluation import iou, recall_at
from support.optimizer import AdamW

# ---- frame -----------------------------------------------------------------------------------------------------

FOLDER = Path(os.environ.get("GOLDEN") or Path(__file__).parent / "golden")
SKIP = object()
TASKS = {"uniter": {}, "vilbert": {}, "lxmert": {}}  # model -> {task: adaptor}, filled by the sections below
MODELS = {}  # model -> function(fixture, name of a set of weights, dtype) that loads and checks them
COMPARED = {}  # fixture -> {task: numbers compared}
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}  # absolute; relative to the largest number
FLOAT32 = re.compile("score|logits|lang_output|visn_output|language_output|vision_output|pooled_output")  # so run


class Fixture:
    """One .npz: `config`, and the arrays under weights/<set>/, inputs/<task>/ and outputs/<task>/ as dicts of tensors."""

    def __init__(self, path):
        self.name, self.model = path.stem, path.stem.split("_")[0]
        self.file = np.load(path)
        self.config = json.loads(str(self.file["config"]))
        parts = [name.split("/") for name in self.file.files]
        self.tasks = sorted({p[1] for p in parts if p[0] in ("inputs", "outputs")})
        self.sets = sorted({p[1] for p in parts if p[0] == "weights"})
        self.weights = cache(lambda name: self.group(f"weights/{name}"))

    def group(self, prefix, dtype=None):
        """{name below the prefix: tensor}, floating-point ones as dtype; arrays of strings as they are."""
        out = {}
        for name in self.file.files:
            if name.startswith(prefix + "/"):
                array = self.file[name]
                tensor = array if array.dtype.kind in "US" else torch.from_numpy(np.array(array))
                is_float = isinstance(tensor, torch.Tensor) and tensor.is_floating_point()
                out[name[len(prefix) + 1 :]] = tensor.to(dtype) if dtype and is_float else tensor
        return out

    def inputs(self, task, dtype=None):
        return self.group(f"inputs/{task}", dtype)

    def outputs(self, task):
        return self.group(f"outputs/{task}")


@cache
def fixture_at(path):
    return Fixture(path)


def paths():
    return sorted(FOLDER.glob("*.npz"))


def empty_batch(**values):
    """Whatever data.Batch has, without the need for data.py and what it imports: every field None but the given."""
    names = (
        "text text_mask segments features boxes region_mask region_types masked_regions word_index word_labels"
        " region_index clean_features object_probs objects object_conf attributes attribute_conf matched answers"
        " target ids task predict_rows"
    )
    return SimpleNamespace(**dict.fromkeys(names.split()) | values)


def compare(task, ours, expected, dtype):
    """Every expected output against ours; returns how many numbers were compared. Float32: only what is in both."""
    if dtype == torch.float64:
        assert set(ours) == set(expected), f"{task}: not the stored outputs: {set(ours) ^ set(expected)}"
    count = 0
    for name in expected:
        if ours.get(name, SKIP) is SKIP or (dtype == torch.float32 and not FLOAT32.search(name)):
            continue
        got, want = ours[name], expected[name]
        got, mask = got if isinstance(got, tuple) else (got, None)
        got = got.detach() if isinstance(got, torch.Tensor) else torch.tensor(got, dtype=torch.float64)
        assert got.shape == want.shape, f"{task}/{name}: shape {tuple(got.shape)}, official {tuple(want.shape)}"
        if mask is not None:
            got, want = got[mask], want[mask]
        tolerance = TOLERANCE[dtype] * (1.0 if dtype == torch.float64 else want.abs().max().item())
        if "f32path" in name:  # the official code computed these in float32
            tolerance = 1e-6
        worst = (got.double() - want.double()).abs().max().item() if want.numel() else 0.0
        assert worst <= tolerance, f"{task}/{name}: off by {worst:.2e}, allowed {tolerance:.0e}"
        count += want.numel()
    return count


def pytest_generate_tests(metafunc):
    if "task" in metafunc.fixturenames:
        cases = [(path, task) for path in paths() for task in fixture_at(path).tasks]
        metafunc.parametrize("path,task", cases, ids=[f"{path.stem}-{task}" for path, task in cases])
    if "weights" in metafunc.fixturenames:
        cases = [(path, name) for path in paths() for name in fixture_at(path).sets]
        metafunc.parametrize("path,weights", cases, ids=[f"{path.stem}-{name}" for path, name in cases])


def test_every_number_of_a_task_is_the_official_one(path, task):
    fixture = fixture_at(path)
    adaptor = TASKS.get(fixture.model, {}).get(task)
    assert adaptor, f"{path.name}: no adaptor for the task {task}"
    expected, count = fixture.outputs(task), 0
    for dtype, rubbish in ((torch.float64, False), (torch.float64, True), (torch.float32, False)):
        torch.manual_seed(0)
        count += compare(task, adaptor(fixture, task, dtype, rubbish), expected, dtype)
    assert count, f"{task}: nothing was compared"
    COMPARED.setdefault(path.name, {})[task] = count


def test_official_weights_come_back_under_their_names(path, weights):
    """Official names -> ours -> official names: nothing missing, nothing left over, every number back in its place."""
    fixture = fixture_at(path)
    assert fixture.model in MODELS, f"{path.name}: no loader for {fixture.model}"
    official, back = fixture.weights(weights), MODELS[fixture.model](fixture, weights, torch.float64)[1]
    assert set(back) == set(official), set(back) ^ set(official)
    for name, tensor in official.items():
        assert torch.equal(back[name].to(tensor.dtype), tensor), name


def test_how_much_was_compared_is_said(capsys):
    """Last, so that it can say how much was compared."""
    assert paths(), f"no fixtures in {FOLDER}"
    with capsys.disabled():
        print(f"\n{sum(map(len, COMPARED.values()))} tasks compared", end="")
        for name, tasks in COMPARED.items():
            print(f"\n{name}: {len(tasks)} tasks, {sum(tasks.values())} numbers compared", end="")


# ---- UNITER ----------------------------------------------------------------------------------------------------


def uniter_model(fixture, name, dtype=torch.float64):
    """The model of one set of weights, and its state dict under the official names again."""
    c, official = fixture.config, fixture.weights(name)
    heads = {
        "mlm": "cls.predictions.bias",
        "mrfr": "feat_regress.bias",
        "mrc": "region_classifier.net.0.weight",
        "itm": "itm_output.weight",
        "rank": "rank_output.weight",
        "nlvr2": "nlvr2_output.weight",
        "ve" if name == "ve" else "vqa": "vqa_output.0.weight",
        "vcr": "vcr_output.0.weight",
        "refer": "re_output.weight" if name == "re_mlp1" else "re_output.0.weight",
    }
    config = uniter.Config(
        vocab_size=len(official["uniter.embeddings.word_embeddings.weight"]),  # VCR adds 81 words to the config's
        types=len(official["uniter.embeddings.token_type_embeddings.weight"]),  # NLVR2 has 3, VCR 4
        hidden=c["hidden_size"],
        layers=c["num_hidden_layers"],
        attention_heads=c["num_attention_heads"],
        intermediate=c["intermediate_size"],
        max_positions=c["max_position_embeddings"],
        feature_size=c["img_dim"],
        classes=c["img_label_dim"],
        answers=c["num_answer"],
        heads=tuple(head for head, parameter in heads.items() if parameter in official),
        nlvr2={"nlvr2_paired": "paired", "nlvr2_triplet": "triplet"}.get(name, "paired-attention"),
        refer_layers=2 if name == "re_mlp2" else 1,
    )
    model = uniter.UNITER(config).to(dtype).eval()
    state, unexpected = formats.uniter_from_official(official, model.state_dict())
    assert not unexpected, unexpected
    assert set(state) == set(model.state_dict()), set(model.state_dict()) - set(state)
    model.load_state_dict(state)
    back = formats.uniter_to_official(model.state_dict())
    mask = "uniter.img_embeddings.mask_embedding.weight"  # its row 0 does not exist here; official code zeroes it
    back[mask] = torch.cat([official[mask][:1].to(dtype), back[mask][1:]])
    return model, back


MODELS["uniter"] = uniter_model


def uniter_batch(x, dtype, rubbish=False, vocab_size=0, masks=True, types=True):
    """Official inputs as one of our batches: padded parts with their own masks in place of one packed sequence.

    rubbish: every padded position holds random words, features, boxes and types. `masks`, `types`: use img_masks and
    the type ids, if given.
    """
    rows = max(len(x[name]) for name in ("txt_lens", "num_bbs") if name in x)
    batch = empty_batch(places=None)
    if "input_ids" in x:
        ids = x["input_ids"].expand(rows, -1)  # hard negatives from pictures: one text for all
        batch.text_mask = torch.arange(ids.shape[1]) < x["txt_lens"].expand(rows)[:, None]
        batch.text, batch.segments = ids, torch.zeros_like(ids)
        if types and "txt_type_ids" in x:
            batch.segments = x["txt_type_ids"]
        if rubbish:
            batch.text = ids.where(batch.text_mask, torch.randint(0, vocab_size, ids.shape))
            batch.segments = batch.segments.where(batch.text_mask, torch.randint(0, 2, ids.shape))
    if "img_feat" in x:
        features, places = (x[name].to(dtype).expand(rows, -1, -1) for name in ("img_feat", "img_pos_feat"))
        batch.region_mask = torch.arange(features.shape[1]) < x["num_bbs"].expand(rows)[:, None]
        batch.masked_regions = x.get("img_masks") if masks else None
        if types and "img_type_ids" in x:
            batch.region_types = x["img_type_ids"] - 1  # official 1 and 2, ours 0 and 1
        if rubbish:
            seen = batch.region_mask[:, :, None]
            features = features.where(seen, 1e3 * torch.randn_like(features))
            places = places.where(seen, 1e3 * torch.randn_like(places))
            if batch.masked_regions is not None:
                batch.masked_regions = batch.masked_regions.where(batch.region_mask, torch.rand(seen.shape[:2]) < 0.5)
            if batch.region_types is not None:
                batch.region_types = batch.region_types.where(batch.region_mask, torch.randint(-1, 1, seen.shape[:2]))
        batch.features, batch.boxes, batch.places = features, places[..., :4], places
    return batch


def uniter_setup(fixture, task, dtype, rubbish, **options):
    """The task's model, batch and raw inputs. Official files round width and height to float16 by themselves, so that
    they are not quite x2 - x1: the model is fed the stored seven numbers in place of its own, which must be close."""
    parts = [task.removesuffix("_noimgtype").split("_")[:n] for n in (3, 2, 1)]  # nlvr2_paired_attn, re_mlp1, vcr
    names = [fixture.config["model_of_task"].get(task), *map("_".join, parts)]
    model = uniter_model(fixture, next(name for name in names if name in fixture.sets), dtype)[0]
    x = fixture.inputs(task)
    batch = uniter_batch(x, dtype, rubbish, model.config.vocab_size, **options)
    model.places = batch.places

    def stored(layer, given):
        assert rubbish or (given[0] - model.places).abs().max() < 1e-3
        return (model.places,)

    model.region_embedding.boxes.register_forward_pre_hook(stored)
    return model, batch, x


def uniter_rows(model, batch, rows):
    """The batch's rows in another order, or some of them."""
    model.places = batch.places[rows]
    return SimpleNamespace(**{name: None if value is None else value[rows] for name, value in vars(batch).items()})


def uniter_grads(fixture, model, loss):
    """The norm of each parameter's gradient, in the order of the official model with the same parameters."""
    loss.backward()
    official = formats.uniter_to_official(
        {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
    )
    tied = {"cls.predictions.decoder.weight", "feat_regress.weight"}
    order = next(o for o in fixture.config["named_parameters"].values() if set(o) == set(official) - tied)
    return torch.stack([official[name].norm() for name in order])


def packed(x, states):
    """(B, T+N, C) as we pad it -> as the official code packs it, row i its own text directly before its regions."""
    index = x["gather_index"][:, :, None].expand(-1, -1, states.shape[-1]) if "gather_index" in x else None
    return states if index is None else states.gather(1, index)


def uniter_encoder(fixture, task, dtype, rubbish):
    """encoder, text_only, image_only: embeddings, every layer, with and without region masks and type ids."""
    out, parts = {}, {"text": task != "image_only", "regions": task != "text_only"}
    for name in ("", "typed_last", "imgmask_last"):
        options = {"types": name == "typed_last", "masks": name == "imgmask_last"}
        model, batch, x = uniter_setup(fixture, task, dtype, rubbish, **options)
        encoding, seen = model.encode(batch, **parts, record=True), x["attn_masks"].bool()
        states = {n.replace(".", "_"): (packed(x, state), seen) for n, state in encoding.states.items()}
        if name:
            out[name] = states[f"layer_{model.config.layers - 1}"]
            continue
        out |= {"pooled": encoding.pooled, "embedding_output": states.pop("embedding")} | states
        if task == "encoder":
            out["txt_emb"] = model.embed_text(batch), batch.text_mask
            out["img_emb"] = model.embed_regions(batch), batch.region_mask
    kept = fixture.outputs(task)  # the tasks of one modality store fewer
    return {name: value for name, value in out.items() if task == "encoder" or name in kept}


def elementwise(objective, scores, batch):
    """Each loss before its mean, from the scores, by torch's own functions: the official code stores them so."""
    rows = torch.arange(len(scores))
    if objective == "mlm":
        return F.cross_entropy(scores, batch.word_labels, reduction="none")
    if objective in ("mrfr", "mrc", "mrc_kl"):
        target = batch.clean_features if objective == "mrfr" else batch.object_probs
        target = target[batch.masked_regions & batch.region_mask].to(scores.dtype)
        if objective == "mrfr":
            return F.mse_loss(scores, target, reduction="none")
        if objective == "mrc":
            return F.cross_entropy(scores, target[:, 1:].argmax(1) + 1, reduction="none")
        return F.kl_div(scores.log_softmax(1), target, reduction="none")
    if objective in ("vqa", "ve"):
        return F.binary_cross_entropy_with_logits(scores, batch.answers, reduction="none")
    if objective == "refer":
        return F.cross_entropy(scores, batch.target.argmax(1), reduction="none")
    if objective in ("itm", "nlvr2"):
        return F.cross_entropy(scores, batch.matched if objective == "itm" else batch.target, reduction="none")
    if objective == "rank":
        chance = scores.sigmoid().view(len(batch.ids), -1)
        return (0.2 + chance[:, 1:] - chance[:, :1]).clamp(min=0)
    chance = scores.sigmoid()  # refer_rank
    return (0.2 + chance[rows, batch.negative] - chance[rows, batch.target.argmax(1)]).clamp(min=0)


def uniter_objective(objective, fixture, task, dtype, rubbish):
    """Scores, losses, gradients of one objective or task head."""
    model, batch, x = uniter_setup(fixture, task, dtype, rubbish)
    stored, arguments = fixture.outputs(task), {}
    if "txt_labels" in x:
        batch.word_index = (x["txt_labels"] >= 0).flatten().nonzero().squeeze(1)  # ignored: -1 or -100
        batch.word_labels = x["txt_labels"].flatten()[batch.word_index]
    if "img_mask_tgt" in x:
        masked = x["img_masks"]
        batch.region_index = masked.flatten().nonzero().squeeze(1)
        official = x["feat_targets" if objective == "mrfr" else "label_targets"].to(dtype)
        target = torch.randn(*masked.shape, official.shape[1], dtype=dtype)  # what is not masked must not matter
        target[masked] = official
        batch.clean_features = batch.object_probs = target
    if "targets" in x:
        batch.matched = batch.target = x["targets"].flatten() if x["targets"].dtype == torch.int64 else None
        batch.answers = x["targets"].to(dtype)
    if objective in ("refer", "refer_rank"):
        batch.target = F.one_hot(batch.target, batch.region_mask.shape[1])
    if objective == "rank":
        batch.ids = ["0"] * (len(batch.text) // int(x["sample_size"]))
    if objective == "refer_rank":
        batch.negative = stored["neg_ix"]
    encoding = model.encode(batch)
    if objective == "refer_rank":  # the official ranking loss, which is not offered here: by the formula below
        scores = uniter.OBJECTIVES["refer"].loss(model, encoding, batch)[1]
        loss = elementwise(objective, scores, batch).sum()
    else:
        loss, scores = uniter.OBJECTIVES[objective].loss(model, encoding, batch, **arguments)
    if objective == "refer":  # officially the sum over the batch
        loss = loss * len(batch.text)
    column = scores[:, None] if objective in ("vcr", "rank") else scores  # stored (rows, 1)
    out = {"scores": column, "grad_l2": uniter_grads(fixture, model, loss)}
    out["pooled" if objective in ("vqa", "ve") else SKIP] = encoding.pooled
    out[{"vqa": "loss_train", "ve": "loss_train", "vcr": "loss"}.get(objective, "loss_mean")] = loss
    if objective in ("refer", "refer_rank"):
        out["loss_sum"] = out.pop("loss_mean")
        assert torch.equal(batch.region_mask, ~x["obj_masks"])
    if objective == "refer_rank":
        out["neg_ix"] = SKIP  # drawn by the official code, given to ours
    if "class_targets" in stored:
        out["class_targets"] = target[masked][:, 1:].argmax(1) + 1
    if objective != "vcr":
        out["loss"] = elementwise(objective, scores, batch)
    out.pop(SKIP, None)
    return out


def uniter_vcr_eval(fixture, task, dtype, rubbish):
    model, batch, _ = uniter_setup(fixture, task, dtype, rubbish)
    batch.target = torch.zeros(len(batch.text), dtype=torch.long)
    return {"scores": uniter.OBJECTIVES["vcr"].loss(model, model.encode(batch), batch)[1][:, None]}


def transported(encoding, batch, dtype):
    return optimal_transport(encoding.text.to(dtype), encoding.regions.to(dtype), batch.text_mask, batch.region_mask)


def uniter_itm(fixture, task, dtype, rubbish):
    """Matching and word-region alignment in one step, as in pretraining."""
    model, batch, x = uniter_setup(fixture, task, dtype, rubbish)
    assert torch.equal(batch.text_mask, ~x["ot_inputs/txt_pad"]), "text_mask"
    assert torch.equal(batch.region_mask, ~x["ot_inputs/img_pad"]), "region_mask"
    batch.matched = x["targets"]
    encoding = model.encode(batch)
    encoding.text.retain_grad(), encoding.regions.retain_grad()
    itm, scores = uniter.OBJECTIVES["itm"].loss(model, encoding, batch)
    wra, distance = uniter.word_region_alignment(model, encoding, batch)
    _, plan, cost = transported(encoding, batch, dtype)
    text_grad, region_grad = torch.autograd.grad(wra, [encoding.text, encoding.regions], retain_graph=True)
    total = itm + uniter.PRETRAINING["loss_weights"]["wra"] * wra
    positive, low = batch.matched == 1, transported(encoding, batch, torch.float32)[0]
    return {
        "pooled": encoding.pooled,
        "scores": scores,
        "itm_loss": elementwise("itm", scores, batch),
        "ot_loss": wra,
        "ot_dist": distance,
        "ot_pos_dist": distance[positive],
        "ot_neg_dist": distance[~positive],
        "ot_pos_dist_f32path": low[positive],
        "ot_neg_dist_f32path": low[~positive],
        "ot_plan": plan.transpose(1, 2),
        "ot_cost": cost,
        "ot_txt_emb": (encoding.text, batch.text_mask),
        "ot_img_emb": (encoding.regions, batch.region_mask),
        "ot_grad_txt": text_grad,
        "ot_grad_img": region_grad,
        "total_loss_lambda0p1": total,
        "grad_l2": uniter_grads(fixture, model, total),
    }


def uniter_ot(fixture, task, dtype, rubbish):
    x = fixture.inputs(task, dtype)
    words, areas = ~x["txt_pad"], ~x["img_pad"]
    text, regions = x["txt_emb"], x["img_emb"]
    if rubbish:
        text = text.where(words[:, :, None], 1e3 * torch.randn_like(text))
        regions = regions.where(areas[:, :, None], 1e3 * torch.randn_like(regions))
    distance, plan, cost = optimal_transport(text, regions, words, areas)

    def at_setting(**setting):
        return optimal_transport(text, regions, words, areas, **setting)[0]

    return {
        "cost": cost,
        "plan_default": plan.transpose(1, 2),
        "dist_default": distance,
        "dist_beta01": at_setting(beta=0.1),
        "dist_beta1": at_setting(beta=1.0),
        "dist_it5": at_setting(iterations=5),
    }


def uniter_hard_negatives(fixture, task, dtype, rubbish):
    """Score all candidates, keep the hardest, rank again with gradients. `_asis` replays the official from-picture
    gather index, which reads padded words and loses the last regions; ours is `_fixedindex`, the corrected one."""
    as_is = task.endswith("_asis")
    model, batch, x = uniter_setup(fixture, task, dtype, rubbish and not as_is)
    stored = fixture.outputs(task)
    size = len(stored["hard_indices"])

    def encode(rows):
        few = uniter_rows(model, batch, rows)
        if not as_is:
            return few, model.encode(few)
        few_x = {"gather_index": x["gather_index"][rows]}
        states = packed(few_x, torch.cat([model.embed_text(few), model.embed_regions(few)], 1))
        for layer in model.layers:
            states = layer(states, attention_bias(x["attn_masks"][rows].bool(), dtype))
        return few, SimpleNamespace(pooled=model.pooler(states))

    _, encoding = encode(torch.arange(len(batch.text)))
    scores = model.heads["rank"](encoding.pooled)
    hardest = scores[1:, 0].topk(size).indices + 1
    if set(hardest.tolist()) == set(stored["hard_indices"].tolist()):
        hardest = stored["hard_indices"]  # the official top-k is not sorted: compared as a set
    hard = torch.cat([torch.zeros(1, dtype=torch.long), hardest])
    few, encoding = encode(hard)
    few.ids = ["0"]  # one example: the true pair and the hardest of the others
    loss, hard_scores = uniter.OBJECTIVES["rank"].loss(model, encoding, few)
    each = elementwise("rank", hard_scores, few)
    return {
        "all_scores": scores,
        "hard_indices": hard[1:],
        "hard_loss": each,
        "hard_loss_sorted": each.sort().values,
        "hard_loss_mean": loss,
        "grad_l2": uniter_grads(fixture, model, loss),
    } | {name: SKIP for name in stored if name.startswith("hard_batch_")}  # how rows are packed


def uniter_re_iou(fixture, task, dtype, rubbish):
    """Official boxes are x, y, w, h in pixels, and an overlap of one pixel or less is none."""
    x = fixture.inputs(task, dtype)
    a, b = (torch.cat([box[:, :2], box[:, :2] + box[:, 2:]], 1) for box in x.values())
    overlap = torch.minimum(a[:, 2:], b[:, 2:]) - torch.maximum(a[:, :2], b[:, :2])
    return {"iou": iou(a, b).where((overlap > 1).all(1), 0.0)}


def uniter_re_eval(fixture, task, dtype, rubbish):
    """Boxes in 0..1 back to pixels. No code of ours: it holds the fixture's pictures and their sizes together."""
    out = {}
    for i, image in enumerate(fixture.config["re_raw"]["images"]):
        box = fixture.group(f"raw/img/visual_grounding_coco_gt_{image['id']:012d}.npz", torch.float64)["norm_bb"]
        size = torch.tensor([image["width"], image["height"]] * 2)
        out[f"obj_boxes_{i}"] = torch.cat([box[:, :2], box[:, 4:6]], 1) * size
    return out


def uniter_itm_eval(fixture, task, dtype, rubbish):
    """The official picture recalls count small row numbers as hits (above 1 with enough luck): only documented."""
    x, out = fixture.inputs(task, dtype), dict.fromkeys(fixture.outputs(task), SKIP)
    ours = recall_at(x["scores_txt_by_img"], x["gt_img_of_txt"])
    for k in (1, 5, 10):
        out[f"official_txt_r{k}"], out[f"corrected_img_r{k}"] = ours[f"image_to_text_r{k}"], ours[f"text_to_image_r{k}"]
    return out


def uniter_transfer(fixture, task, dtype, rubbish):
    table = fixture.weights("pretrain")["uniter.embeddings.token_type_embeddings.weight"]
    official = fixture.weights("itm")
    weight, bias = official["itm_output.weight"][1:], official["itm_output.bias"][1:]  # the "match" row: ours differs
    name = "text_embedding.types.weight"
    tables = {}
    for objective, rows in (("nlvr2", 3), ("vcr", 4)):
        wanted = {name: table.new_zeros(rows, table.shape[1])}
        starts = uniter.text_types([objective])
        tables[objective] = checkpoints.widen_text_types({name: table}, wanted, starts, checkpoints.Report(""))[name]
    return {
        "nlvr2_type_embedding": tables["nlvr2"],
        "vcr_type_embedding": tables["vcr"],
        "itm_init_output_weight": weight,
        "itm_init_output_bias": bias,
    }


def uniter_optim(fixture, task, dtype, rubbish):
    """Six steps of train.py's optimizer under its learning-rate schedule: p0, a matrix, decays, p1, a bias, does not."""
    import train  # here, because it needs more packages than the models

    x, out = fixture.inputs(task, dtype), {}
    parameters = torch.nn.ParameterDict({name: x[f"{name}_init"].clone() for name in ("p0", "p1")})
    optimizer = AdamW(parameters, weight_decay=0.01)
    for step in range(1, 7):
        rate = train.learning_rate(step, peak=0.05, warmup=3, steps=6)
        for name, parameter in parameters.items():
            parameter.grad = x[f"{name}_grad_step{step}"]
        optimizer.step(rate)
        out[f"lr_step{step}"] = rate
        out |= {f"{name}_step{step}": parameter.detach().clone() for name, parameter in parameters.items()}
    name = "sched_lr_5e-5_w10000_t200000"
    rates = [train.learning_rate(step, 5e-5, 10000, 200000) for step in x["sched_steps"].tolist()]
    return out | {name: torch.tensor(rates, dtype=torch.float64)}


TASKS["uniter"] |= dict.fromkeys(("encoder", "text_only", "image_only"), uniter_encoder)
TASKS["uniter"] |= dict.fromkeys(("vcr_eval_val", "vcr_eval_test"), uniter_vcr_eval)
TASKS["uniter"] |= {
    f"itm_hn_{name}": uniter_hard_negatives for name in ("from_text", "from_image_asis", "from_image_fixedindex")
}
TASKS["uniter"] |= {
    "itm": uniter_itm,
    "ot": uniter_ot,
    "re_iou": uniter_re_iou,
    "re_eval": uniter_re_eval,
    "itm_eval": uniter_itm_eval,
    "optim": uniter_optim,
    "transfer": uniter_transfer,
}
TASKS["uniter"] |= {
    task: partial(uniter_objective, objective)
    for objective, tasks in {
        "mlm": "mlm pretrain_vcr_mlm_qa pretrain_vcr_mlm_qar",
        "mrfr": "mrfr pretrain_vcr_mrfr_qar",
        "mrc": "mrc pretrain_vcr_mrc_qar",
        "mrc_kl": "mrckl pretrain_vcr_mrckl_qar",
        "vqa": "vqa",
        "ve": "ve",
        "nlvr2": "nlvr2_paired nlvr2_paired_attn nlvr2_triplet"
        " nlvr2_paired_noimgtype nlvr2_paired_attn_noimgtype nlvr2_triplet_noimgtype",
        "vcr": "vcr_qa vcr_qar",
        "rank": "itm_rank",
        "refer": "re_mlp1_cls re_mlp2_cls",
        "refer_rank": "re_mlp1_rank_hard re_mlp1_rank_easy re_mlp2_rank_hard re_mlp2_rank_easy",
    }.items()
    for task in tasks.split()
}


# ---- ViLBERT ---------------------------------------------------------------------------------------------------


VILBERT_HEADS = {  # ours: the official parameter that shows it is there
    "mlm": "cls.predictions.bias",
    "itm": "cls.bi_seq_relationship.bias",
    "gqa": "vil_prediction_gqa.logit_fc.3.bias",
    "nlvr2": "vil_binary_prediction.logit_fc.3.bias",
    "ve": "vil_tri_prediction.bias",
    "rank": "vil_logit.bias",
    "refer": "vision_logit.bias",
    "word": "linguisic_logit.bias",
}


def vilbert_model(fixture, name, dtype=torch.float64, overrides=None):
    """The model of one set of weights, and its state dict under the official names again."""
    built, official = fixture.config["models"][name], fixture.weights(name)
    c = fixture.config["config"] | built["built_with"] | (overrides or {})
    answers = [
        len(t) for n, t in official.items() if n in ("vil_prediction.main.3.bias", "vil_prediction.logit_fc.3.bias")
    ]
    region_head = "mrfr" if c.get("predict_feature") or c.get("visual_target") else "mrc"
    heads = [head for head, parameter in VILBERT_HEADS.items() if parameter in official]
    tasks = official.get("bert.embeddings.task_embeddings.weight", ())
    gqa = official.get("vil_prediction_gqa.logit_fc.3.bias", (0,))
    config = vilbert.Config(
        vocab_size=c["vocab_size"],
        hidden=c["hidden_size"],
        layers=c["num_hidden_layers"],
        attention_heads=c["num_attention_heads"],
        intermediate=c["intermediate_size"],
        visual_hidden=c["v_hidden_size"],
        visual_layers=c["v_num_hidden_layers"],
        visual_heads=c["v_num_attention_heads"],
        visual_intermediate=c["v_intermediate_size"],
        shared=c["bi_hidden_size"],
        shared_heads=c["bi_num_attention_heads"],
        connections=tuple(zip(c["v_biattention_id"], c["t_biattention_id"], strict=True)),
        fusion=c.get("fusion_method", "mul"),
        max_positions=c["max_position_embeddings"],
        types=c["type_vocab_size"],
        feature_size=c["v_feature_size"],
        classes=c["v_target_size"],
        answers=(answers or [0])[0],
        gqa_answers=len(gqa),
        heads=tuple(heads) + (region_head,) + (("vqa",) if answers else ()),
        twelve_in_one=built["repo"] == "mt",
        task_tokens=len(tasks),
        dynamic_attention=c.get("dynamic_attention", False),
    )
    model = vilbert.ViLBERT(config).to(dtype).eval()
    state, unexpected = formats.vilbert_from_official(official, model.state_dict())
    assert not unexpected, unexpected
    assert set(state) == set(model.state_dict()), set(model.state_dict()) - set(state)
    model.load_state_dict(state)
    return model, formats.vilbert_to_official(model.state_dict())


MODELS["vilbert"] = vilbert_model
VILBERT_NAMES = {
    "question": "input_ids",
    "features": "image_feat",
    "spatials": "image_loc",
    "image_mask": "image_attention_mask",
    "input_mask": "attention_mask",
    "segment_ids": "token_type_ids",
}


def vilbert_setup(fixture, task, dtype, rubbish):
    """The task's model, batch and raw inputs. Official files have the whole image as row 0 and round its mean feature
    and the areas to float32: the model is fed the stored numbers in place of its own, which must be close."""
    setting, x = fixture.config["tasks"][task], fixture.inputs(task)
    model = vilbert_model(fixture, setting["model"], dtype, setting["config_overrides"])[0]
    x = {VILBERT_NAMES.get(name, name): value for name, value in x.items()}
    text, features, boxes = x["input_ids"], x["image_feat"].to(dtype), x["image_loc"].to(dtype)
    word_mask = x.get("attention_mask", torch.ones_like(text)).bool()
    segments = x.get("token_type_ids", torch.zeros_like(text))
    mask = x.get("image_attention_mask", torch.ones_like(features[..., 0])).bool()
    if features.dim() == 4:  # (questions, choices, ...)
        text, word_mask, segments = text.flatten(0, 1), word_mask.flatten(0, 1), segments.flatten(0, 1)
        features, boxes, mask = features.flatten(0, 1), boxes.flatten(0, 1), mask.flatten(0, 1)
    if task == "mt_down_nlvr2":  # the rows of both pictures in one, each with its whole image
        features, boxes, mask = (v.unflatten(1, (2, -1)).flatten(0, 1) for v in (features, boxes, mask))
    if task.endswith("inbatch_pairs"):  # row i * B + j: text i, image j
        features, boxes, mask = (v.repeat(len(text), *[1] * (v.dim() - 1)) for v in (features, boxes, mask))
    if len(text) < len(features):  # fast_mode: one text for all
        times = len(features) // len(text)
        text, word_mask, segments = (v.repeat_interleave(times, 0) for v in (text, word_mask, segments))
    if rubbish:
        seen = mask[:, :, None]
        features, boxes = (v.where(seen, 1e3 * torch.randn_like(v)) for v in (features, boxes))
        text = text.where(word_mask, torch.randint(0, model.config.vocab_size, text.shape))
        segments = segments.where(word_mask, torch.randint(0, 2, text.shape))
    batch = empty_batch(text=text, text_mask=word_mask, segments=segments, region_mask=mask[:, 1:])
    batch.features, batch.boxes = features[:, 1:], boxes[:, 1:, :4]
    if "task_ids" in x or task.startswith("mt_down"):
        number = re.search(r"task token id (\d+)", setting["note"])
        batch.task = (x["task_ids"].flatten() if "task_ids" in x else torch.tensor(int(number[1]))).expand(len(text))
    else:
        model.config.task_tokens = 0  # the official switch task_specific_tokens is off for this task
    stored_mean = "attention_mask" in x  # elsewhere the stored mean is of fewer regions than are seen
    for layer, official in ((model.region_embedding.features, features), (model.region_embedding.boxes, boxes)):

        def stored(_, given, official=official):
            first = 0 if stored_mean or official is boxes else 1
            assert (given[0] - official)[:, first:][mask[:, first:]].abs().max() < 1e-6
            return (official.where(mask[:, :, None], given[0]),)

        layer.register_forward_pre_hook(stored)
    word_mask = F.pad(word_mask, (int(model.config.task_tokens > 0), 0), value=True)
    batch.count = {"t": word_mask, "v": mask}  # of all that the official code has: task token, whole image
    batch.hide = rubbish or dtype == torch.float32  # padded positions are stored too, and equal if their inputs are
    return model, batch, x


def vilbert_inner(model):
    """{name of an attention block: {"queries", "keys", "context", "out"}}, filled as the model runs."""
    seen = {}
    for name, block in model.named_modules():
        if isinstance(block, AttentionBlock):
            note = seen[name] = {}

            def mix(query, key, value, bias=None, maps=None, note=note, block=block, mix=block.attend_heads):
                note["queries"], note["keys"] = (
                    v.unflatten(-1, (block.heads, -1)).transpose(1, 2) for v in (query, key)
                )
                return mix(query, key, value, bias, maps)

            block.attend_heads = mix
            block.output.register_forward_pre_hook(lambda _, given, note=note: note.update(context=given[0]))
            block.register_forward_hook(lambda _, __, out, note=note: note.update(out=out))
    return seen


def vilbert_encoder(fixture, task, dtype, rubbish):
    """Every layer's states, and attention with its queries, keys and contexts, under the names of both repositories."""
    model, batch, _ = vilbert_setup(fixture, task, dtype, rubbish)
    inner, parts = vilbert_inner(model), ({"regions": False}, {"text": False}) if "no_coatt" in task else ({},)
    encodings = [model.encode(batch, **part, record=True) for part in parts]
    states = {name: state for encoding in encodings for name, state in encoding.states.items()}
    maps = {name: probabilities for encoding in encodings for name, probabilities in encoding.maps.items()}
    c, out = model.config, {}
    official = {"text": "layer", "regions": "v_layer", "cross": "c_layer"}  # 12-in-1 runs the text first, as ours
    assert [f"{official[k]}.{i}" for k, i in vilbert.layer_order(c)] == fixture.config["execution_order"]["mt"]
    short, size = {"text": "t", "regions": "v"}, {"text": c.layers, "regions": c.visual_layers}
    for name, state in states.items():
        kind, i, side = (name.split(".") + [None])[:3]
        side = side or kind
        stage = {"cross": f"co_{i}"}.get(kind, "emb" if i == "embedding" else f"layer_{i}")
        out[f"hidden_{short[side]}/{stage}"] = state, short[side]
        if kind == "cross":
            out[f"encoded_layers_{short[side]}/{i}"] = state, short[side]
            block = inner[f"connections.{i}.{'text_reads' if side == 'text' else 'regions_read'}"]
            out[f"co_{i}/context_for_{'text' if side == 'text' else 'image'}"] = block["context"], short[side]
            out[f"co_{i}/attn_out_{short[side]}"] = block["out"], short[side]
    for name, probabilities in maps.items():
        kind, i, pair = (name.split(".") + [""])[:3]
        asks, answers = (short[side] for side in (pair.split("_to_") if pair else (kind, kind)))
        if pair:
            block = inner[f"connections.{i}.{'text_reads' if asks == 't' else 'regions_read'}"]
            names = "text_queries_image_keys" if asks == "t" else "image_queries_text_keys", f"attn_co/{i}/"
            number = "1" if asks == "t" else "2"
            out[names[1] + names[0]] = out[f"{names[1]}attn{number}"] = probabilities, asks
            queries = "querues" if asks == "v" else "queries"  # their spelling
            out[f"{names[1]}{queries}{number}"] = block["queries"], asks
            out[f"{names[1]}keys{number}"] = block["keys"], answers
        else:
            block, prefix = inner[f"{kind.removesuffix('s')}_layers.{i}.attention"], f"attn_{asks}/{i}"
            out[prefix] = out[f"{prefix}/attn"] = probabilities, asks
            out[f"{prefix}/queries"], out[f"{prefix}/keys"] = (block["queries"], asks), (block["keys"], asks)
    pooled = {}
    for side, letter, pooler in (("text", "t", model.text_pooler), ("regions", "v", model.region_pooler)):
        last = states[f"{side}.{size[side] - 1}"]
        out[f"sequence_output_{letter}"] = last, letter
        if task.endswith("all_layers"):  # pooled from the last co-attention, not from the end
            last = states[f"cross.{len(c.connections) - 1}.{side}"]
        out[f"pooled_output_{letter}"] = pooled[letter] = pooler(last)
    fused = [e.pooled for e in encodings]
    ours = list(pooled.values()) if len(fused) == 2 else [pooled["t"] * pooled["v"]]
    assert task.endswith("all_layers") or all(torch.equal(a, b) for a, b in zip(fused, ours, strict=True))
    if not task.endswith("no_coattention"):
        same = (
            (states[f"text.{c.layers - 1}"], encodings[0].text),
            (states[f"regions.{c.visual_layers - 1}"][:, 1:], encodings[0].regions),
        )
        assert model.config.task_tokens > 0 or torch.equal(*same[0])
        assert torch.equal(*same[1])
    return {name: hide(out[name], batch) for name in fixture.outputs(task)}


def hide(value, batch):
    """(states, "t" or "v") -> the states and, if padding differs from the official one's, where they count."""
    if not isinstance(value, tuple):
        return value
    value, count = value[0], batch.count[value[1]]
    mask = count[:, :, None] if value.dim() == 3 else count[:, None, :, None]
    return (value, mask.expand(value.shape)) if batch.hide else value


def vilbert_scores(model, batch):
    """The encoding, and all scores of all heads at all positions, task token and whole image included, officially named."""
    encoding, heads, out = model.encode(batch, record=True), model.heads, {}
    text = encoding.states[f"text.{model.config.layers - 1}"]
    areas = encoding.states[f"regions.{model.config.visual_layers - 1}"]
    out["prediction_scores_t"] = heads["mlm"](text, model.text_embedding.words.weight), "t"
    out["prediction_scores_v"] = heads["mrfr" if "mrfr" in heads else "mrc"](areas), "v"
    out["seq_relationship_score"] = heads["itm"](encoding.pooled).flip(1)  # official class 0 is the match
    out["linguisic_prediction"], out["vision_prediction"] = out["prediction_scores_t"], out["prediction_scores_v"]
    for name, head in {"vil_prediction": "vqa", "vil_prediction_gqa": "gqa", "vil_tri_prediction": "ve"}.items():
        if head in heads:
            out[name] = heads[head](encoding.pooled)
    out["vil_binary_prediction"] = out["seq_relationship_score"]  # official: for an odd batch of 12-in-1, too
    if "nlvr2" in heads and len(text) % 2 == 0:
        out["vil_binary_prediction"] = heads["nlvr2"](encoding.pooled.reshape(len(text) // 2, -1))
    if "rank" in heads:
        out["vil_logit"] = heads["rank"](encoding.pooled)
        out["linguisic_logit"] = heads["word"](text), "t"
        ours = vilbert.refer_logits(model, encoding, batch)[:, :, None]
        out["vision_logit"] = torch.cat([heads["refer"](areas[:, :1]), ours], 1), "v"
    return encoding, out


def vilbert_losses(model, encoding, batch, x, negatives=None):
    """The three pretraining losses from the official labels."""
    words, regions, target = x["masked_lm_labels"].flatten(), x["image_label"].flatten(), x["image_target"]
    batch.word_index = (words >= 0).nonzero()[:, 0]  # ignored: -1 or -100
    batch.region_index = (regions == 1).nonzero()[:, 0]
    batch.word_labels, batch.matched = words[batch.word_index], 1 - x["next_sentence_label"]
    batch.clean_features = batch.object_probs = target.to(encoding.pooled.dtype)
    if "mrc" in model.heads:
        image = vilbert.masked_region_class_kl(model, encoding, batch)[0]
    elif negatives is None:
        image = vilbert.masked_region_features(model, encoding, batch)[0]
    else:
        negatives = negatives.flatten(0, 1)[batch.region_index]
        image = twelve_in_one.noise_contrastive_regions(model, encoding, batch, negatives)[0]
    mlm, itm = (vilbert.OBJECTIVES[name].loss(model, encoding, batch)[0] for name in ("mlm", "itm"))
    losses = mlm, image, itm
    names = "masked_lm_loss", "masked_img_loss", "next_sentence_loss", "total_loss"
    return {name: loss[None] for name, loss in zip(names, (*losses, sum(losses)), strict=True)}


def vilbert_pretrain(fixture, task, dtype, rubbish):
    model, batch, x = vilbert_setup(fixture, task, dtype, rubbish)
    encoding, out = vilbert_scores(model, batch)
    stored = fixture.outputs(task)
    if task.endswith("objective1"):  # mismatched pairs have no labels; the official product also drops words of id 0
        pairs = 1 - x["next_sentence_label"][:, None]
        for name in ("image_label", "masked_lm_labels"):
            x[name] = out[f"used_{name}"] = (x[name] * pairs).masked_fill(x[name] * pairs == 0, -1)
    if "masked_lm_labels" in x:
        out |= vilbert_losses(model, encoding, batch, x, stored.get("nce_flat_index"))
        out["nce_flat_index"] = SKIP  # drawn by the official code, given to ours
    for name, value in stored.items():
        if value.isnan().any():  # nothing was masked: official NaN, ours 0
            assert "edge_nomask" in task and (name == "total_loss" or out[name].item() == 0.0)
            assert out[name].isfinite().all()
            out[name] = SKIP
    return {name: hide(out[name], batch) for name in stored}


def vilbert_tasks(fixture, task, dtype, rubbish):
    model, batch, _ = vilbert_setup(fixture, task, dtype, rubbish)
    out = vilbert_scores(model, batch)[1]
    return {name: hide(out[name], batch) for name in fixture.outputs(task)}


def vilbert_down(objective, fixture, task, dtype, rubbish):
    """A task's scores, loss and number of right answers."""
    model, batch, x = vilbert_setup(fixture, task, dtype, rubbish)
    encoding, out = vilbert_scores(model, batch)
    target = x["target"]
    target = target.squeeze(-1).to(dtype) if target.is_floating_point() and objective in ("refer", "point") else target
    if objective in ("vqa", "gqa", "ve"):
        batch.answers = target.to(dtype)
    elif objective == "nlvr2":
        batch.target = target.argmax(1)
    elif objective in ("rank", "vcr"):  # a class per group; the head is called rank here
        choices = len(encoding.pooled) // len(target)
        batch.target, batch.ids = F.one_hot(target, choices).flatten(), list(range(len(target)))
        model.heads["vcr"] = model.heads["rank"]
    elif objective == "refer":  # the official candidates include the whole image
        batch.target, batch.region_mask = target, batch.count["v"]
        encoding.regions = encoding.states[f"regions.{model.config.visual_layers - 1}"]
    if objective == "point":  # Visual7W: the choices are certain regions
        scores = out["vision_logit"][0].squeeze(-1).gather(1, 101 + x["multiple_choice_ids"])
        loss = soft_answer_loss(scores, target)
    elif objective == "gqa":
        loss, scores = question_answering(model, encoding, batch, head="gqa")
    else:
        loss, scores = vilbert.OBJECTIVES[objective].loss(model, encoding, batch)
    out |= {"loss": loss, "batch_size": torch.tensor(len(target))}
    if objective in ("rank", "vcr"):
        right = scores.view(len(target), -1).argmax(1) == target
    else:
        right = target.gather(1, scores.argmax(1, keepdim=True))
        right = right > 0.5 if objective == "refer" else right
    out["batch_score"] = right.sum().double()
    return {name: hide(out[name], batch) for name in fixture.outputs(task)}


def vilbert_data(fixture, task, dtype, rubbish):
    """The official readers: their whole image and five numbers are ours. Masking and texts are data.py's: skipped."""
    x, stored = fixture.inputs(task, dtype), fixture.outputs(task)
    reader = task.startswith("data_reader")
    if reader:
        x, given = {n: v[None] for n, v in x.items()}, {n: v[None] for n, v in stored.items()}
        features, places = given["features"].to(dtype), given["image_location"].to(dtype)
        mask = torch.ones(features.shape[:2], dtype=torch.bool)
    else:
        features, places = stored["image_feat"].to(dtype), stored["image_loc"].to(dtype)
        mask = stored["image_mask"].bool()
        assert torch.equal(mask[:, 1:].sum(1), x["num_boxes"])
    embedding = vilbert.RegionEmbedding(vilbert.Config(feature_size=features.shape[2], visual_hidden=4)).to(dtype)
    seen = []
    for layer in (embedding.features, embedding.boxes):
        layer.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    boxes = torch.nan_to_num(x["boxes_px"] / x["image_wh"].to(dtype).repeat(1, 2)[:, None])  # pixels -> 0..1
    embedding(features[:, 1:], boxes, mask[:, 1:])
    if task.endswith("_mt"):  # the official mean divides by the slots whose region overlaps no masked one
        kept = (stored["masked_label"] == 0).sum(1).clamp(min=1)
        seen[0][:, 0] *= (x["num_boxes"] / kept)[:, None]
    assert (seen[0] - features)[:, 0].abs().max() < 1e-5 and (seen[1] - places)[mask].abs().max() < 1e-6
    out = dict.fromkeys(stored, SKIP)
    return out | (
        {"num_boxes": mask.sum(1)[0]} if reader else {"image_mask": F.pad(mask[:, 1:].long(), (1, 0), value=1)}
    )


TASKS["vilbert"] |= {
    task: partial(vilbert_down, objective)
    for objective, tasks in {
        "vqa": "beta_down_vqa mt_down_vqa",
        "gqa": "mt_down_gqa",
        "vcr": "beta_down_vl_logit mt_down_retrieval",
        "refer": "beta_down_refer mt_down_refer",
        "ve": "mt_down_entailment",
        "nlvr2": "mt_down_nlvr2",
        "point": "mt_down_pointing",
    }.items()
    for task in tasks.split()
}
TASKS["vilbert"] |= {
    task: adaptor
    for adaptor, tasks in (
        (
            vilbert_encoder,
            "beta_bert beta_bert_nomasks beta_bert_all_layers beta_bert_coattmask beta_bert_no_coattention",
        ),
        (vilbert_encoder, "mt_bert mt_bert_roberta mt_bert_dyn_tasktok"),
        (vilbert_pretrain, "beta_pretrain_kl_mul beta_pretrain_kl_sum beta_pretrain_feat beta_pretrain_edge_nomask"),
        (vilbert_pretrain, "beta_pretrain_feat_edge_nomask beta_pretrain_inbatch_pairs beta_pretrain_fastmode"),
        (vilbert_pretrain, "mt_pretrain_v0_mul mt_pretrain_v0_sum mt_pretrain_v0_objective1 mt_pretrain_v0_dynamic"),
        (vilbert_pretrain, "mt_pretrain_v1 mt_pretrain_v2"),
        (vilbert_tasks, "beta_vltasks_mul beta_vltasks_sum beta_vltasks_fastmode"),
        (vilbert_tasks, "mt_vltasks_mul mt_vltasks_sum mt_vltasks_parity mt_vltasks_tasktok"),
        (vilbert_data, "data_concap_beta data_concap_mt data_reader_beta"),
    )
    for task in tasks.split()
}


# ---- LXMERT ----------------------------------------------------------------------------------------------------

LXMERT_HEADS = {"pretrain": lxmert.Config.heads, "gqa": ("vqa",), "vqa": ("vqa",), "nlvr2": ("nlvr2",), "qa": ("qa",)}
LXMERT_LOSSES = {"mlm": "masked_lm", "itm": "matched", "mrc": "obj", "attr": "attr", "mrfr": "feat", "qa": "qa"}


def is_hugging_face(fixture):
    return "hf_config" in fixture.config


def lxmert_model(fixture, weights, dtype):
    """(our model, its weights back under the official names). Loading must leave nothing missing or unexpected."""
    sizes = fixture.config["config"]
    config = lxmert.Config(
        vocab_size=sizes["vocab"],
        hidden=sizes["hidden"],
        language_layers=sizes["l"],
        relation_layers=sizes["r"],
        cross_layers=sizes["x"],
        attention_heads=sizes["heads"],
        intermediate=sizes["inter"],
        max_positions=sizes["max_pos"],
        feature_size=sizes["feat"],
        classes=sizes["obj"] + 1,
        attributes=sizes["attr"],
        answers=sizes["qa"],
        heads=LXMERT_HEADS.get(weights, ()),
    )
    if is_hugging_face(fixture):
        config.region_factor = fixture.config["hf_config"]["visual_loss_normalizer"]
        config.masked_logit = torch.finfo(dtype).min
    model = lxmert.LXMERT(config).to(dtype)
    state, unexpected = formats.lxmert_from_official(fixture.weights(weights), model.state_dict())
    assert not unexpected, unexpected
    model.load_state_dict(state)  # strict: nothing missing
    back = (formats.lxmert_to_hugging_face if is_hugging_face(fixture) else formats.lxmert_to_official)(
        model.state_dict()
    )
    if weights == "model":  # a bare LxmertModel has no prefix
        back = {name.removeprefix("lxmert."): tensor for name, tensor in back.items()}
    return model.eval(), back


def lxmert_batch(fixture, task, dtype, rubbish):
    """The stored inputs as our batch. Rubbish: text behind the mask, and hidden regions where losses do not count them
    (a row without any visible region attends to all)."""
    inputs = fixture.inputs(task, dtype)
    if not {"visual_feats", "feats"} & set(inputs):  # these tasks use the batch of another
        inputs = fixture.inputs("pretrain", dtype)
    first = {"feats": "visual_feats", "boxes": "visual_pos", "segment_ids": "token_type_ids"}
    first["input_mask"] = "attention_mask"
    inputs = {first.get(name, name): value for name, value in inputs.items()}
    text, features = inputs["input_ids"].clone(), inputs["visual_feats"].flatten(0, -3).clone()  # nlvr2: (B,2,N,F)
    boxes = inputs["visual_pos"].flatten(0, -3).clone()
    text_mask = inputs.get("attention_mask", torch.ones_like(text)).bool()
    region_mask = inputs.get("visual_attention_mask", torch.ones_like(features[..., 0])).bool()
    if rubbish:
        text[~text_mask] = torch.randint(fixture.config["config"]["vocab"], text.shape)[~text_mask]
        if "obj_label" not in inputs:
            hidden = ~region_mask & region_mask.any(1, keepdim=True)
            features[hidden], boxes[hidden] = torch.randn_like(features)[hidden] * 100, torch.rand_like(boxes)[hidden]
    batch = empty_batch(
        text=text,
        text_mask=text_mask,
        segments=inputs.get("token_type_ids", torch.zeros_like(text)),
        features=features,
        boxes=boxes,
        region_mask=region_mask,
        matched=inputs.get("matched_label"),
        answers=inputs.get("target"),
        target=inputs.get("label"),
        answer_labels=ignored_as_minus_1(inputs.get("ans", inputs.get("labels"))),
    )
    if "obj_label" in inputs:
        words, regions = inputs["masked_lm_labels"].flatten(), inputs["feat_conf"].flatten()
        batch.word_index, batch.region_index = (words >= 0).nonzero()[:, 0], regions.nonzero()[:, 0]
        batch.word_labels, batch.clean_features = words[batch.word_index], inputs["feat_label"]
        batch.objects = ignored_as_minus_1(inputs["obj_label"])
        batch.attributes = ignored_as_minus_1(inputs["attr_label"])
        batch.object_conf, batch.attribute_conf = inputs["obj_conf"], inputs["attr_conf"]
    return batch


def ignored_as_minus_1(labels):
    """Labels with -1 for "ignore", as ours have it; Hugging Face's have -100. None stays None."""
    return None if labels is None else labels.clamp(min=-1)


def lxmert_losses(model, encoding, batch, objectives=tuple(LXMERT_LOSSES)):
    """The official losses by name. They count all boxes, hidden ones too, so here nothing is hidden."""
    everything = SimpleNamespace(**{**vars(batch), "region_mask": torch.ones_like(batch.region_mask)})
    losses = {}
    for name in objectives:
        # the official answer loss counts every row with a label, mismatched or not
        given = SimpleNamespace(**{**vars(everything), "matched": None}) if name == "qa" else everything
        losses[f"loss_{LXMERT_LOSSES[name]}"] = lxmert.OBJECTIVES[name].loss(model, encoding, given)[0]
    return losses | {"loss_total": sum(losses.values())}


def lxmert_encoding(model, batch):
    """The encoding, and every hidden state and attention map under its official name, with a mask of what counts.

    Hooks see the stages inside a cross-modality layer; the shared attention block runs twice, for words first.
    """
    stages = {}

    def save(part, inputs, output):
        stages.setdefault(part, []).append(output)

    parts = [(layer.cross, layer.text.attention, layer.regions.attention) for layer in model.cross_layers]
    hooks = [part.register_forward_hook(save) for layer in parts for part in layer]
    encoding = model.encode(batch, record=True)
    for hook in hooks:
        hook.remove()
    states, maps, out = encoding.states, encoding.maps, {}
    counts = lxmert_counts(batch)
    sides = ("lang", "text", "visn", "regions"), ("visn", "regions", "lang", "text")
    for number, (short, ours, other_short, other) in enumerate(sides):
        real = counts[short]  # (B, S)
        out[f"hidden/{short}_embed"] = states[f"{ours}.embedding"], real
        layers = model.relation_layers if number else model.language_layers
        for i in range(len(layers)):
            out[f"hidden/{short}.{i}"], out[f"attn/{short}.{i}"] = (states[f"{ours}.{i}"], real), maps[f"{ours}.{i}"]
        for i, layer in enumerate(model.cross_layers):
            out[f"attn/x.{i}.{short}2{other_short}"] = maps[f"cross.{i}.{ours}_to_{other}"]
            out[f"attn/x.{i}.{short}_self"] = maps[f"cross.{i}.{ours}"]
            out[f"hidden/x.{i}.cross_{short}"] = stages[layer.cross][number], real
            out[f"hidden/x.{i}.self_{short}"] = stages[getattr(layer, ours).attention][0], real
            out[f"hidden/x.{i}.{short}"] = states[f"cross.{i}.{ours}"], real
        for name, value in out.items():
            if not isinstance(value, tuple):  # maps, (B, H, T, S): padded positions do not ask
                out[name] = value, real[:, None, :, None].expand(value.shape)
    return encoding, out


def lxmert_counts(batch):
    """Which positions mean something. Where every region is hidden, all are seen."""
    return {"lang": batch.text_mask, "visn": batch.region_mask | ~batch.region_mask.any(1, keepdim=True)}


def lxmert_scores(model, encoding):
    regions = model.heads["regions"](encoding.regions)
    return {
        "lm_scores": model.heads["mlm"](encoding.text, model.text_embedding.words.weight),
        "matched_scores": model.heads["itm"](encoding.pooled),
        "qa_scores": model.heads["qa"](encoding.pooled),
        "obj_scores": model.heads["mrc"](regions),
        "attr_scores": model.heads["attr"](regions),
        "feat_scores": model.heads["mrfr"](regions),
    }


def without_masks(outputs, rubbish):
    """Padded positions are stored too and equal as long as their inputs do: only rubbish takes them out."""
    return {n: o if rubbish or not isinstance(o, tuple) else o[0] for n, o in outputs.items()}


def lxmert_encode(fixture, task, dtype, rubbish):
    weights = "model" if is_hugging_face(fixture) else "feat"
    model, batch = lxmert_model(fixture, weights, dtype)[0], lxmert_batch(fixture, task, dtype, rubbish)
    (encoding, inner), count = lxmert_encoding(model, batch), lxmert_counts(batch)
    text, regions = (encoding.text, count["lang"]), (encoding.regions, count["visn"])
    if is_hugging_face(fixture):
        out = lxmert_tuples(fixture, inner) | {f"hook/{name}": value for name, value in inner.items()}
        out |= {"language_output": text, "vision_output": regions}
    else:
        out = inner | {"lang_output": text, "visn_output": regions}
    out = without_masks(out | {"pooled_output": encoding.pooled}, rubbish)
    if dtype == torch.float32:  # -10000 on every key of a row leaves float32 three digits: not those rows
        out = {name: (value, batch.region_mask.any(1)) for name, value in out.items()}
    stored = fixture.outputs(task)  # the small fixture leaves out what is there twice
    return {name: value for name, value in out.items() if name in stored}


def lxmert_tuples(fixture, inner):
    """Hugging Face's tuples: own layers, then cross layers; maps without those inside the cross layers."""
    sizes, out = fixture.config["config"], {}
    for name, short, own in (("language", "lang", sizes["l"]), ("vision", "visn", sizes["r"])):
        for i in range(own):
            out[f"{name}_hidden_states.{i}"] = inner[f"hidden/{short}.{i}"]
            out[f"{name}_attentions.{i}"] = inner[f"attn/{short}.{i}"]
        for i in range(sizes["x"]):
            out[f"{name}_hidden_states.{own + i}"] = inner[f"hidden/x.{i}.{short}"]
            out[f"cross_encoder_attentions.{i}"] = inner[f"attn/x.{i}.lang2visn"]
    return out


def lxmert_pretrain(fixture, task, dtype, rubbish):
    model, batch = lxmert_model(fixture, "pretrain", dtype)[0], lxmert_batch(fixture, task, dtype, rubbish)
    (encoding, inner), count = lxmert_encoding(model, batch), lxmert_counts(batch)
    out = lxmert_losses(model, encoding, batch) | lxmert_scores(model, encoding)
    out["lm_scores"] = out["lm_scores"], count["lang"]
    if is_hugging_face(fixture):
        out |= lxmert_tuples(fixture, inner) | {"loss_visn": out["loss_obj"] + out["loss_attr"] + out["loss_feat"]}
    else:
        out |= {"lang_output": (encoding.text, count["lang"]), "visn_output": encoding.regions}
        out["pooled_output"] = encoding.pooled
    return without_masks(out, rubbish)


def lxmert_some(*objectives):
    def adaptor(fixture, task, dtype, rubbish):
        model, batch = lxmert_model(fixture, "pretrain", dtype)[0], lxmert_batch(fixture, task, dtype, rubbish)
        return lxmert_losses(model, model.encode(batch), batch, objectives)

    return adaptor


def lxmert_gradients(fixture, task, dtype, rubbish):
    model, batch = lxmert_model(fixture, "pretrain", dtype)[0], lxmert_batch(fixture, task, dtype, rubbish)
    lxmert_losses(model, model.encode(batch), batch)["loss_total"].backward()
    gradients = formats.lxmert_to_official({name: p.grad for name, p in model.named_parameters()})
    gradients.pop("cls.predictions.decoder.weight")  # tied
    stored = fixture.outputs(task)
    out = {f"grad/{name}": gradient for name, gradient in gradients.items() if f"grad/{name}" in stored}
    return out | {f"grad_norm/{name}": gradient.norm() for name, gradient in gradients.items()}


def lxmert_bertadam(fixture, task, dtype, rubbish):
    """The official optimizer, which is no part of this project, replayed on our model: no bias correction, epsilon
    outside the root, decay 0.01 on every parameter, the clip before, linear warm-up and decay counted from step 0."""
    model, batch = lxmert_model(fixture, "pretrain", dtype)[0], lxmert_batch(fixture, task, dtype, rubbish)
    setting = {name: float(value) for name, value in fixture.inputs(task).items()}
    out = {"loss": [], "lr": [], "grad_norm": []}
    moments = {p: (torch.zeros_like(p), torch.zeros_like(p)) for p in model.parameters()}
    for step in range(int(setting["steps"])):
        model.zero_grad()
        loss = lxmert_losses(model, model.encode(batch), batch)["loss_total"]
        loss.backward()
        out["loss"].append(loss.item())
        out["grad_norm"].append(torch.nn.utils.clip_grad_norm_(model.parameters(), setting["clip"]).item())
        done, warmup = step / setting["t_total"], setting["warmup"]
        out["lr"].append(setting["lr"] * (done / warmup if done < warmup else max((done - 1) / (warmup - 1), 0)))
        with torch.no_grad():
            for p, (mean, square) in moments.items():
                mean.lerp_(p.grad, 0.1)
                square.lerp_(p.grad**2, 0.001)
                p -= out["lr"][-1] * (mean / (square.sqrt() + 1e-6) + 0.01 * p)
    out["loss"].append(lxmert_losses(model, model.encode(batch), batch)["loss_total"].item())
    out = {name: torch.tensor(values, dtype=torch.float64) for name, values in out.items()}
    state = formats.lxmert_to_official(model.state_dict())
    stored = [name for name in fixture.outputs(task) if name.startswith("param/")]
    return out | {name: state[name.removeprefix("param/")] for name in stored}


def lxmert_task(fixture, task, dtype, rubbish):
    """vqa, gqa, nlvr2, and Hugging Face's qa: one pooled vector (or two) and a head."""
    weights = task.removesuffix("_nomask")
    model, batch = lxmert_model(fixture, weights, dtype)[0], lxmert_batch(fixture, task, dtype, rubbish)
    if weights == "nlvr2":
        assert len(batch.text) == 2 * len(batch.target)
    encoding = model.encode(batch)
    objective = "vqa" if weights == "gqa" else weights
    loss, logits = lxmert.OBJECTIVES[objective].loss(model, encoding, batch)
    out = {"logits": logits, "loss": loss}
    if not is_hugging_face(fixture):
        out["pooled_output"] = encoding.pooled
    if weights in ("vqa", "gqa"):
        out["loss_bce_mean"] = loss / logits.shape[1]
    if weights == "gqa":
        out["loss_mce"] = F.cross_entropy(logits, batch.answers.argmax(1)) * logits.shape[1]
    return out


MODELS["lxmert"] = lxmert_model
TASKS["lxmert"] = {
    **dict.fromkeys(("encoder", "encoder_nomask", "encoder_full", "encoder_allmasked"), lxmert_encode),
    **dict.fromkeys(("model", "model_nomask", "model_full", "model_allmasked"), lxmert_encode),
    **dict.fromkeys(("pretrain", "pretrain_vmask"), lxmert_pretrain),
    "pretrain_lang_only": lxmert_some("mlm", "itm"),
    "pretrain_visn_only": lxmert_some("mrc", "attr", "mrfr"),
    "pretrain_grads": lxmert_gradients,
    "bertadam_trace": lxmert_bertadam,
    **dict.fromkeys(("vqa", "gqa", "nlvr2", "qa", "qa_nomask"), lxmert_task),
}
