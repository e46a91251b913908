"""checkpoints.py: weights in and out: our own, BERT's, the official ones, Hugging Face's."""

import json
import math
import warnings
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist

import common
import data
import lxmert
import uniter
import vilbert
from common import UserError

# ---- tables -----------------------------------------------------------------------------------------------------------


PAPERS = {
    "uniter": (uniter, "UNITER"),
    "vilbert": (vilbert, "ViLBERT"),
    "lxmert": (lxmert, "LXMERT"),
}


# by this a state dict under official names is known; a BERT has none of these
MARKS = {"uniter": "img_embeddings.", "vilbert": "v_embeddings.", "lxmert": "visn_fc."}


ANSWER_HEADS = ("heads.vqa.", "heads.qa.")


HUGGING_FACE = {"model_type": ("bert", "lxmert"), "hidden_act": ("gelu",)}  # what a config.json may say, if it does


CHECKPOINT = {"model", "config", "state", "tokenizer", "answers"}  # what one must hold to be used


TYPES = {"nlvr2": 3, "vcr": 4}  # rows of UNITER's table of text types, where not 2


# ---- files ------------------------------------------------------------------------------------------------------------


SAFETENSORS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


SAFETENSORS |= {"I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool}


def save(content, path):
    """torch.save, whole or not at all."""
    data.write_whole(path, lambda file: torch.save(content, file))


def read_torch(path):
    """What torch.save wrote, on the CPU, without running any code that the file may hold. UserError where it cannot."""
    if not path.is_file():
        raise common.UserError(f"{path}: no such file")
    try:
        with warnings.catch_warnings(action="ignore"):  # a failure is one line
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001 (bytes that are no weights end in nearly every kind of error)
        raise common.UserError(f"{path}: no weights, damaged, or more than weights ({type(error).__name__})") from None


def read_safetensors(path):
    """{name: tensor} of a safetensors file: 8 bytes, the length n of the header, little-endian; n bytes of JSON,
    {name: {"dtype": "F32", "shape": [2, 3], "data_offsets": [begin, end]}}; the numbers, from which offsets count.

    The file is mapped, each tensor copied out of it once. UserError unless the tensors fill the file one after another,
    without gap or overlap, each as long as its shape says. dtypes: SAFETENSORS.
    """
    if not path.is_file():
        raise common.UserError(f"{path}: no such file")
    tensors, end = {}, 0
    try:
        with path.open("rb") as file:
            first, size = file.read(8), path.stat().st_size
            length = int.from_bytes(first, "little")
            if len(first) < 8 or length > size - 8:
                raise ValueError("its header does not fit into it; was it cut off?")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        numbers = torch.from_numpy(np.memmap(path, np.uint8, "c", offset=8 + length))
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            shape, (begin, stop) = entry["shape"], entry["data_offsets"]
            if entry["dtype"] not in SAFETENSORS:
                raise ValueError(f"{name} is of dtype {entry['dtype']}; known are {', '.join(SAFETENSORS)}")
            if not all(type(number) is int and number >= 0 for number in (*shape, begin, stop)):
                raise ValueError(f"{name} has a shape or offsets that are no whole numbers")
            if begin != end:
                raise ValueError(f"{name} begins at byte {begin}, but the tensor before it ends at {end}")
            dtype, end = SAFETENSORS[entry["dtype"]], stop
            if end > len(numbers):
                raise ValueError(f"{name} ends at byte {end} of {len(numbers)}; was it cut off?")
            if end - begin != math.prod(shape) * dtype.itemsize:
                raise ValueError(f"{name} has {end - begin} bytes for shape {shape}")
            tensors[name] = numbers[begin:end].clone().view(dtype).view(shape)
        if end != len(numbers):
            raise ValueError(f"{len(numbers) - end} bytes belong to no tensor")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise common.UserError(f"{path}: not a safetensors file ({error or type(error).__name__})") from None
    return tensors


def read_json(path, kind):
    """A JSON file's content, None where there is no file. UserError if it is no JSON or no `kind` (dict, list)."""
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise common.UserError(f"{path}: not JSON ({error})") from None
    if not isinstance(content, kind):
        raise common.UserError(f"{path}: holds no {kind.__name__}")
    return content


# ---- checkpoints ------------------------------------------------------------------------------------------------------


def save_checkpoint(run, name):
    """All that is needed to go on or to predict, written to a temporary name, then renamed. All processes call it."""
    own = generator_of(run.device).get_rng_state()
    states = [torch.empty_like(own) for _ in range(run.world)] if run.world > 1 else [own]
    if run.world > 1:
        dist.all_gather(states, own)
    if run.rank:
        return
    config = asdict(run.model.config)
    content = {
        "model": run.args.model,
        "task": run.args.task,
        "config": {key: list(value) if isinstance(value, tuple) else value for key, value in config.items()},
        "state": run.model.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "generators": {run.device.type: states},  # of dropout, in every process
        "progress": dict(run.progress),
        "tokenizer": run.tokenizer.to_str(),
        "answers": run.answers,
        "data": run.args.data,
        "patch": run.args.patch,
        "grid": run.args.grid,
    }
    save(content, run.args.out / name)


def generator_of(device):
    """The torch module whose get_rng_state and set_rng_state are those of a device: torch, torch.cuda or torch.mps."""
    return torch if device.type == "cpu" else torch.get_device_module(device)


def load_checkpoint(path):
    """A checkpoint of `save_checkpoint`, on the CPU. UserError if it is missing, damaged or something else."""
    content = read_torch(Path(path))
    if not isinstance(content, dict) or not CHECKPOINT <= set(content):
        raise UserError(f"{path}: not a checkpoint of train.py (it lacks model, config, state, tokenizer or answers)")
    return content


def read_state(path):
    """(content, state) of a weights file: what it holds, and the tensors in it by name. UserError if it holds none, or
    NaN."""
    content = state = (read_safetensors if path.suffix == ".safetensors" else read_torch)(path)
    for key in ("state", "model_state", "model_state_dict", "state_dict", "model"):  # some codes put it under one
        state = state[key] if isinstance(state, dict) and isinstance(state.get(key), dict) else state
    state = state if isinstance(state, dict) else {}
    state = {n: t for n, t in state.items() if isinstance(n, str) and isinstance(t, torch.Tensor)}
    if not state or any(tensor.layout != torch.strided or tensor.is_meta for tensor in state.values()):
        raise UserError(f"{path}: holds no weights; give a checkpoint, a state dict or a safetensors file")
    # a sum is finite only if all its numbers are, and costs no memory
    if wrong := [n for n, t in state.items() if t.is_floating_point() and not t.sum(dtype=torch.float32).isfinite()]:
        raise UserError(f"{path}: {len(wrong)} tensors hold NaN or infinity, the first is {wrong[0]}")
    return content, state


def load_weights(args):
    """The file or folder of --init as a checkpoint: one of `save_checkpoint`; or the weights of BERT, of an official
    code or of Hugging Face, then with `kind` (BERT, or the model's name), `state` under the names found there and
    `config` with the sizes found. tokenizer.json or vocab.txt, config.json and the answers beside the file are used.

    UserError for anything else, for another model's weights and for numbers that are not finite.
    """
    path = Path(args.init)
    if path.is_dir():
        names = [name for name in ("model.safetensors", "pytorch_model.bin") if (path / name).is_file()]
        if not names:
            raise UserError(f"{path}: a folder without model.safetensors or pytorch_model.bin; give the file")
        path = path / names[0]
    content, state = read_state(path)
    if CHECKPOINT <= set(content):
        return content
    kind = next((model for model, mark in MARKS.items() if any(mark in name for name in state)), "BERT")
    if kind not in ("BERT", args.model):
        raise UserError(f"{path}: holds weights of {kind}, which do not fit --model {args.model}")
    config = read_json(path.with_name("config.json"), dict) or {}
    for key, known in HUGGING_FACE.items():
        if config.get(key, known[0]) not in known:
            raise UserError(f"{path.with_name('config.json')}: {key} is {config[key]!r}, must be {' or '.join(known)}")
    try:
        state = bert_names(state) if kind == "BERT" else state
        sizes = FORMATS[args.model].sizes_of(state, config)
    except KeyError as error:
        raise UserError(f"{path}: no weights of BERT, UNITER, ViLBERT or LXMERT: it lacks {error.args[0]}") from None
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: {error}") from None
    pieces = [p for name in ("tokenizer.json", "vocab.txt") if (p := path.with_name(name)).is_file()]
    lists = [p for name in ("all_ans.json", "trainval_label2ans.json") if (p := path.with_name(name)).is_file()]
    answers = read_json(lists[0], list) if lists else []
    return {
        "kind": kind,
        "model": args.model,
        "config": sizes,
        "state": state,
        "tokenizer": data.read_tokenizer(pieces[0]).to_str() if pieces and not args.vocab else None,
        "answers": [a["ans"] if isinstance(a, dict) else a for a in answers],
    }


def export_official(model, state):
    """A model's weights under its paper's official names. UserError where two heads have one official name."""
    try:
        return FORMATS[model].to_official(state)
    except ValueError as error:
        raise UserError(f"no official names for these weights: {error}") from None


# ---- how weights fit a model ------------------------------------------------------------------------------------------


def fit_state_dict(args, own, checkpoint, answers):
    """A full state for a model whose initial one is `own`: the file's tensors where name and shape agree; and a report,
    five lines on what was loaded, resized, left at random and ignored.

    UserError if anything but a head would stay at random, save what BERT has nothing for (all but the paper's
    FROM_BERT) or what --partial permits. A head is loaded whole or not at all; an answer head for the same list of
    answers only, as its rows mean nothing under another one, but LXMERT's moves row by row.
    """
    state, ignored, resized = checkpoint["state"], [], []
    types, kind = "text_embedding.types.weight", checkpoint.get("kind")
    try:
        if kind:
            names = [*own, *(name.replace("heads.vqa.", "heads.qa.") for name in own)]
            if kind != "BERT":
                names += [name.replace("heads.rank.", "heads.itm.") for name in own]
            state, ignored = FORMATS[args.model].from_official(state, names)
        if args.model == "lxmert" and checkpoint["answers"]:
            before = {id(tensor) for tensor in state.values()}
            state = transfer_answer_head(state, own, checkpoint["answers"], answers)
            resized = [name for name in state if id(state[name]) not in before]
        elif checkpoint["answers"] != answers:
            ignored += [name for name in state if name.startswith(ANSWER_HEADS)]
            state = {name: tensor for name, tensor in state.items() if not name.startswith(ANSWER_HEADS)}
        if args.model == "uniter" and types in state and len(state[types]) < len(own[types]):
            table = state[types]
            if "nlvr2" in args.tasks and len(table) == 2:  # the second picture's type starts as the picture's
                table = widen_types(table, 3, copy=1)
            state = {**state, types: widen_types(table, len(own[types]), copy=0)}  # VCR's as the text's
            resized.append(types)
        if "heads.rank.weight" in own and "heads.rank.weight" not in state and "heads.itm.weight" in state:
            # the log odds of a match; official UNITER takes row 1 alone (`rank_from_itm`), which ranks a bit otherwise
            for name in ("weight", "bias"):
                match = state[f"heads.itm.{name}"]
                state = {**state, f"heads.rank.{name}": match[1:] - match[:1]}  # (2, C) -> (1, C), (2,) -> (1,)
    except (IndexError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"{args.init}: {str(error).splitlines()[0]}") from None
    loaded = {name for name in own if name in state and state[name].shape == own[name].shape}
    torn = {component_of(name) for name in set(own) - loaded if name.startswith("heads.")}
    loaded = {name for name in loaded if component_of(name) not in torn}
    fresh, ignored = sorted(set(own) - loaded), ignored + [name for name in state if name not in loaded]
    lost = [
        n
        for n in fresh
        if not n.startswith("heads.") and n.startswith(FORMATS[args.model].from_bert if kind == "BERT" else "")
    ]
    if lost and not args.partial:
        raise UserError(
            f"{args.init}: {len(lost)} tensors of the trunk are missing or of another shape, the first is {lost[0]}; "
            "--partial leaves them at random"
        )
    report = [f"init     {args.init}: {f'weights of {kind}' if kind else 'a checkpoint'}"]
    for what, names in {"loaded": loaded, "resized": resized, "at random": fresh, "ignored": ignored}.items():
        counts = Counter(map(component_of, sorted(names)))
        parts = [f"{name} ({n})" for name, n in counts.items()]
        report.append(f"         {what} {len(names)}: {', '.join(parts[:8]) or 'none'}{', ...' * (len(parts) > 8)}")
    return {name: state[name] if name in loaded else own[name] for name in own}, "\n".join(report)


def component_of(name):
    """What a parameter belongs to: "layers", "heads.vqa"; of official names "cls.predictions",
    "bert.encoder.layer.9"."""
    pieces = name.split(".")
    trunk = pieces[0].endswith(("embedding", "layers", "connections", "pooler"))
    return ".".join(pieces[: 1 if trunk else 4 if ".encoder." in name else 2])


# ---- names of BERT ----------------------------------------------------------------------------------------------------


BERT_NAMES = [  # (ours, BERT's), in this order: what all three official codes have from BERT
    ("text_embedding.words", "bert.embeddings.word_embeddings"),
    ("text_embedding.positions", "bert.embeddings.position_embeddings"),
    ("text_embedding.types", "bert.embeddings.token_type_embeddings"),
    ("text_embedding.norm", "bert.embeddings.LayerNorm"),
    ("feed_forward.up", "intermediate.dense"),
    ("feed_forward.down", "output.dense"),
    ("feed_forward.norm", "output.LayerNorm"),
    ("attention.query", "attention.self.query"),
    ("attention.key", "attention.self.key"),
    ("attention.value", "attention.self.value"),
    ("attention.output", "attention.output.dense"),
    ("attention.norm", "attention.output.LayerNorm"),
    ("heads.mlm.transform.norm", "cls.predictions.transform.LayerNorm"),
    ("heads.mlm.", "cls.predictions."),
]


# Old spellings: of a model saved from DistributedDataParallel, and of TF's norms
OLD_NAMES = [("module.", ""), ("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias")]


def rename(name, rules):
    """One parameter name under another convention: each rule (old, new) is a plain replacement, applied in order."""
    for old, new in rules:
        name = name.replace(old, new)
    return name


def official_names(state, rules, clash):
    """Our state dict under the official names, the masked-word head's matrix listed too, as the official codes save it:
    it is the word table. ValueError, saying `clash`, where two of our parameters have one official name."""
    out = {rename(name, rules): tensor for name, tensor in state.items()}
    if len(out) < len(state):
        raise ValueError(clash)
    if "cls.predictions.bias" in out:
        out["cls.predictions.decoder.weight"] = state["text_embedding.words.weight"]
    return out


def plain_names(state):
    """An official state dict without old spellings and without the masked-word head's matrix, the word table again."""
    plain = {rename(name, OLD_NAMES): tensor for name, tensor in state.items()}
    return {name: tensor for name, tensor in plain.items() if name != "cls.predictions.decoder.weight"}


def our_names(state, names, rules):
    """An official state dict, in plain names, under ours. names: those of the model that will load it,
    `model.state_dict()`. Returns (state, unexpected official names); what is missing, the caller sees from the
    difference to `names`."""
    ours = {rename(name, rules): name for name in names}
    return {ours[n]: t for n, t in state.items() if n in ours}, [n for n in state if n not in ours]


def bert_names(state):
    """BERT's own state dict under the names `bert.embeddings...`, `bert.encoder...`, `bert.pooler...`, `cls...`.

    Takes away `module.`; turns UNITER's `uniter.` for `bert.` back; puts `bert.` where a bare BertModel was saved.
    KeyError if it holds no BERT: RoBERTa, DistilBERT and others have their own prefixes or layers.
    """
    out = {}
    for name, tensor in state.items():
        name = name.removeprefix("module.").replace("uniter.", "bert.")
        out["bert." * name.startswith(("embeddings.", "encoder.", "pooler.")) + name] = tensor
    for name in ("bert.embeddings.word_embeddings.weight", "bert.encoder.layer.0.attention.self.query.weight"):
        if name not in out:
            raise KeyError(name)
    return out


def shape_of(state, ending, default=None):
    """The shape of the one parameter whose name ends in `ending`, whatever stands before it; else `default`.
    KeyError without either."""
    found = next((tuple(tensor.shape) for name, tensor in state.items() if name.endswith(ending)), default)
    if found is None:
        raise KeyError(ending)
    return found


def count_layers(state, stack):
    """How many layers a state dict has under `stack`, e.g. "encoder.layer.": the different numbers that follow it."""
    return len({name.split(stack, 1)[1].split(".")[0] for name in state if stack in name})


def text_sizes(state, config):
    """The Config fields that every one of the official state dicts, and BERT's, determines: those of the text.

    config: what the file's config.json says, {} without one. The number of heads is in no weight: it is taken from
    there, else heads are 64 wide, as in every published size but MiniLM's. ValueError if the width does not allow it.
    """
    vocab_size, hidden = shape_of(state, "embeddings.word_embeddings.weight")
    heads = config.get("num_attention_heads", hidden // 64 if hidden % 64 == 0 else 0)
    if type(heads) is not int or heads < 1 or hidden % heads:
        raise ValueError(f"{hidden} wide with {heads or 'an unknown number of'} heads; put its config.json beside it")
    return {
        "vocab_size": vocab_size,
        "hidden": hidden,
        "attention_heads": heads,
        "intermediate": shape_of(state, "encoder.layer.0.intermediate.dense.weight")[0],
        "max_positions": shape_of(state, "embeddings.position_embeddings.weight")[0],
        "types": shape_of(state, "embeddings.token_type_embeddings.weight")[0],
    }


# ---- UNITER -----------------------------------------------------------------------------------------------------------


UNITER_OFFICIAL = [  # (ours, official), in this order
    *BERT_NAMES,
    ("region_embedding.features_norm", "uniter.img_embeddings.img_layer_norm"),
    ("region_embedding.features", "uniter.img_embeddings.img_linear"),
    ("region_embedding.boxes_norm", "uniter.img_embeddings.pos_layer_norm"),
    ("region_embedding.boxes", "uniter.img_embeddings.pos_linear"),
    ("region_embedding.norm", "uniter.img_embeddings.LayerNorm"),
    ("region_embedding.mask", "uniter.img_embeddings.mask_embedding.weight"),
    ("layers.", "bert.encoder.layer."),
    ("pooler.", "bert.pooler."),
    ("bert.", "uniter."),
    ("heads.mrfr.transform.dense", "feat_regress.net.0"),
    ("heads.mrfr.transform.norm", "feat_regress.net.2"),
    ("heads.mrfr.", "feat_regress."),
    ("heads.mrc.", "region_classifier.net."),
    ("heads.nlvr2.left", "attn1"),
    ("heads.nlvr2.right", "attn2"),
    ("heads.nlvr2.join", "fc.0"),
    ("heads.nlvr2.score", "attn_pool.fc.0"),
    ("heads.nlvr2.output", "nlvr2_output"),
    ("heads.ve.", "vqa_output."),  # the official entailment model is a VQA model with three answers
    ("heads.refer.", "re_output."),
]


UNITER_OFFICIAL += [(f"heads.{head}.", f"{head}_output.") for head in ("itm", "rank", "vqa", "vcr", "nlvr2")]


def uniter_to_official(state):
    """Our state dict under the official names, tied matrices listed twice, as the official code saves them.

    ValueError for a model with heads for both VQA and entailment: officially they have one name.
    """
    clash = "heads vqa and ve share one official name: export them from two models"
    out = official_names(state, UNITER_OFFICIAL, clash)
    for side in ("attn1", "attn2"):  # torch's MultiheadAttention stacks query, key and value
        for kind in ("weight", "bias"):
            if f"{side}.query.{kind}" in out:
                parts = [out.pop(f"{side}.{part}.{kind}") for part in ("query", "key", "value")]
                out[f"{side}.in_proj_{kind}"] = torch.cat(parts)  # 3 x (C, C) -> (3C, C)
                out[f"{side}.out_proj.{kind}"] = out.pop(f"{side}.output.{kind}")
    mask = "uniter.img_embeddings.mask_embedding.weight"
    out[mask] = torch.stack([torch.zeros_like(out[mask]), out[mask]])  # (F,) -> (2, F), row 0 = not masked
    if "feat_regress.bias" in out:
        out["feat_regress.weight"] = out["uniter.img_embeddings.img_linear.weight"]
    return out


def uniter_from_official(state, names):
    """An official state dict under our names, see `common.our_names`. Accepts the prefixes `module.` and `bert.` and
    TF's gamma and beta."""
    given = {}
    for name, tensor in plain_names(state).items():
        name = "uniter." + name.removeprefix("bert.") if name.startswith("bert.") else name
        if ".in_proj_" in name:
            side, kind = name.split(".in_proj_")
            for part, piece in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                given[f"{side}.{part}.{kind}"] = piece  # (3C, C) -> 3 x (C, C)
        elif name.endswith("mask_embedding.weight"):
            given[name] = tensor[1]
        elif name != "feat_regress.weight":  # tied
            given[name.replace(".out_proj.", ".output.")] = tensor
    return our_names(given, names, UNITER_OFFICIAL)


UNITER_FROM_BERT = (
    "text_embedding.",
    "layers.",
    "pooler.",
)  # what BERT's weights must supply: all but regions and heads


def uniter_sizes_of(state, config):
    """Config fields that an official state dict, or BERT's, determines (section 3.1: the trunk starts as BERT, whole;
    the masked-word head too). config: as in `common.text_sizes`. KeyError names what is lacking, ValueError tells why.
    """
    sizes = text_sizes(state, config) | {"layers": count_layers(state, "encoder.layer.")}
    if any("img_embeddings." in name for name in state):
        sizes["feature_size"] = shape_of(state, "img_embeddings.img_linear.weight")[1]  # (C, F)
        sizes["classes"] = shape_of(state, "region_classifier.net.3.weight", (uniter.Config.classes,))[0]
    if any(name.endswith("nlvr2_output.weight") for name in state):
        wide = shape_of(state, "nlvr2_output.weight")[1] > sizes["hidden"]  # (2, 2C), of two vectors, or (2, C)
        paired = any("attn1." in name for name in state)
        sizes["nlvr2"] = "paired-attention" if paired else "paired" if wide else "triplet"
    if any("re_output.3." in name for name in state):
        sizes["refer_layers"] = 2
    return sizes


def widen_types(table, types, copy):
    """The type table (types, C) with more rows, each a copy of row `copy`: NLVR2 has 3 (copy 1), VCR 4 (copy 0)."""
    return torch.cat([table, table[copy : copy + 1].expand(types - len(table), -1)])


def rank_from_itm(weight, bias):
    """The rank head starts as the "match" row of the matching head: (2, C), (2,) -> (1, C), (1,)."""
    return weight[1:], bias[1:]


# ---- ViLBERT ----------------------------------------------------------------------------------------------------------


VILBERT_OFFICIAL = [  # (ours, official), in this order
    ("text_embedding.tasks", "bert.embeddings.task_embeddings"),
    ("region_embedding.features", "bert.v_embeddings.image_embeddings"),
    ("region_embedding.boxes", "bert.v_embeddings.image_location_embeddings"),
    ("region_embedding.norm", "bert.v_embeddings.LayerNorm"),
    *BERT_NAMES,
    ("gate_query", "attention.self.dyLinear_q"),
    ("gate_key", "attention.self.dyLinear_k"),
    ("text_reads.query", "biattention.query2"),  # 1 is the picture, 2 the text
    ("text_reads.key", "biattention.key1"),
    ("text_reads.value", "biattention.value1"),
    ("text_reads.output", "biOutput.dense2"),
    ("text_reads.norm", "biOutput.LayerNorm2"),
    ("regions_read.query", "biattention.query1"),
    ("regions_read.key", "biattention.key2"),
    ("regions_read.value", "biattention.value2"),
    ("regions_read.output", "biOutput.dense1"),
    ("regions_read.norm", "biOutput.LayerNorm1"),
    ("unused", "biOutput.q_dense"),
    (".text_", ".t_"),  # what is left in a co-attention layer: text_feed_forward and region_feed_forward
    (".region_", ".v_"),
    ("text_layers.", "bert.encoder.layer."),
    ("region_layers.", "bert.encoder.v_layer."),
    ("connections.", "bert.encoder.c_layer."),
    ("text_pooler.", "bert.t_pooler."),
    ("region_pooler.", "bert.v_pooler."),
    ("heads.mrfr.", "heads.mrc."),  # the official code has one region head, for classes or for features
    ("heads.mrc.0", "cls.imagePredictions.transform.dense"),
    ("heads.mrc.2", "cls.imagePredictions.transform.LayerNorm"),
    ("heads.mrc.3", "cls.imagePredictions.decoder"),
    ("heads.itm.", "cls.bi_seq_relationship."),
    ("heads.vqa.main.", "vil_prediction.main."),
    ("heads.vqa.", "vil_prediction.logit_fc."),
    ("heads.gqa.", "vil_prediction_gqa.logit_fc."),
    ("heads.nlvr2.", "vil_binary_prediction.logit_fc."),
    ("heads.ve.", "vil_tri_prediction."),
    ("heads.vcr.", "vil_logit."),  # one score for every task with choices
    ("heads.rank.", "vil_logit."),
    ("heads.refer.", "vision_logit."),
    ("heads.word.", "linguisic_logit."),
]


def vilbert_to_official(state):
    """Our state dict under the official names, tied matrices listed twice, as the official code saves them.

    ValueError where two of our heads have one official name: mrc and mrfr, vcr and rank."""
    clash = "the official code has one region head (mrc or mrfr) and one choice head (vcr or rank)"
    out = official_names(state, VILBERT_OFFICIAL, clash)
    for name in {"cls.bi_seq_relationship.weight", "cls.bi_seq_relationship.bias"} & set(out):
        out[name] = out[name].flip(0)  # (2, C) or (2,): the official class 0 is "match"
    return out


def vilbert_from_official(state, names):
    """An official state dict under our names, see `common.our_names`. Accepts the prefix `module.`, TF's gamma and
    beta, and BERT's own checkpoints, for the text stream."""
    given = {}
    for name, tensor in plain_names(state).items():
        given[name] = tensor.flip(0) if name.startswith("cls.bi_seq_relationship.") else tensor
    return our_names(given, names, VILBERT_OFFICIAL)


VILBERT_FROM_BERT = ("text_embedding.", "text_layers.")  # what BERT's weights must supply; its pooler has no place here


def vilbert_sizes_of(state, config):
    """Config fields that an official state dict, or BERT's, determines (section 3.1: BERT is the text stream, with the
    masked-word head; all else starts at random). BERT leaves the rest open, which then keeps the paper's proportions:
    a visual stream half as deep and 4/3 as wide, in heads of 128, co-attention below the last text layers.

    config: as in `common.text_sizes`. KeyError names what is lacking, ValueError tells why.
    """
    sizes = text_sizes(state, config) | {"layers": count_layers(state, "encoder.layer.")}
    if any("v_embeddings." in name for name in state):
        visual, features = shape_of(state, "v_embeddings.image_embeddings.weight")  # (C, F)
        shared = shape_of(state, "t_pooler.dense.weight")[0]
        depth, connected = (count_layers(state, f"encoder.{kind}_layer.") for kind in "vc")
        sizes["feature_size"] = features
        sizes["visual_intermediate"] = shape_of(state, "encoder.v_layer.0.intermediate.dense.weight")[0]
        sizes["classes"] = shape_of(state, "cls.imagePredictions.decoder.weight", (vilbert.Config.classes,))[0]
        sizes["gqa_answers"] = shape_of(state, "vil_prediction_gqa.logit_fc.3.weight", (vilbert.Config.gqa_answers,))[0]
        sizes["twelve_in_one"] = any("vil_prediction.logit_fc." in name for name in state)
        sizes["task_tokens"] = shape_of(state, "embeddings.task_embeddings.weight", (0,))[0]
        sizes["dynamic_attention"] = any("dyLinear_q." in name for name in state)
    else:
        depth = connected = max(1, sizes["layers"] // 2)
        shared = visual = sizes["visual_intermediate"] = 128 * max(1, round(sizes["hidden"] / 96))
    sizes |= {"visual_hidden": visual, "visual_layers": depth, "shared": shared}
    sizes["visual_heads"] = config.get("v_num_attention_heads", max(1, visual // 128))
    sizes["shared_heads"] = config.get("bi_num_attention_heads", max(1, shared // 128))
    text = config.get("t_biattention_id", range(sizes["layers"] - connected, sizes["layers"]))
    sizes["connections"] = tuple(zip(config.get("v_biattention_id", range(connected)), text, strict=True))
    return sizes


# ---- LXMERT -----------------------------------------------------------------------------------------------------------


LXMERT_OFFICIAL = [  # (ours, official), in this order
    ("region_embedding.features_norm", "bert.encoder.visn_fc.visn_layer_norm"),
    ("region_embedding.features", "bert.encoder.visn_fc.visn_fc"),
    ("region_embedding.boxes_norm", "bert.encoder.visn_fc.box_layer_norm"),
    ("region_embedding.boxes", "bert.encoder.visn_fc.box_fc"),
    *BERT_NAMES,
    (".text.attention.", ".lang_self_att."),  # in a cross-modality layer
    (".text.intermediate.", ".lang_inter."),
    (".text.output.", ".lang_output."),
    (".regions.attention.", ".visn_self_att."),
    (".regions.intermediate.", ".visn_inter."),
    (".regions.output.", ".visn_output."),
    (".cross.output", ".visual_attention.output.dense"),  # so called, but it serves both directions
    (".cross.norm", ".visual_attention.output.LayerNorm"),
    (".cross.", ".visual_attention.att."),
    ("language_layers.", "bert.encoder.layer."),
    ("relation_layers.", "bert.encoder.r_layers."),
    ("cross_layers.", "bert.encoder.x_layers."),
    ("pooler.", "bert.pooler."),
    ("heads.itm.", "cls.seq_relationship."),
    ("heads.regions.norm", "obj_predict_head.transform.LayerNorm"),
    ("heads.regions.", "obj_predict_head.transform."),
    ("heads.mrc.", "obj_predict_head.decoder_dict.obj."),
    ("heads.attr.", "obj_predict_head.decoder_dict.attr."),
    ("heads.mrfr.", "obj_predict_head.decoder_dict.feat."),
    ("heads.qa.", "answer_head.logit_fc."),
]


LXMERT_OFFICIAL += [
    (f"heads.{head}.", "logit_fc.") for head in ("vqa", "ve", "nlvr2")
]  # a fine-tuned model has one of them


LXMERT_HUGGING_FACE = [  # (official, Hugging Face), in this order, on top of the official names
    ("lxrt_encoder.model.", ""),
    ("bert.", "lxmert."),
    ("answer_head.", ""),
    ("logit_fc.", "answer_head.logit_fc."),
]


def lxmert_to_official(state):
    """Our state dict under the official names, tied matrices listed twice, as the official code saves them.

    ValueError for two of the heads vqa, ve and nlvr2: officially they have one name.
    """
    clash = "heads vqa, ve and nlvr2 share one official name: export them from several models"
    out = official_names(state, LXMERT_OFFICIAL, clash)
    if any(name.startswith("logit_fc.") for name in out):  # fine-tuned
        out = {n.replace("bert.", "lxrt_encoder.model.bert.", 1): tensor for n, tensor in out.items()}
    return out


def lxmert_to_hugging_face(state):
    """Our state dict under the names of transformers' LxmertModel, ...ForPreTraining or ...ForQuestionAnswering."""
    return {rename(name, LXMERT_HUGGING_FACE): tensor for name, tensor in lxmert_to_official(state).items()}


def lxmert_from_official(state, names):
    """An official or Hugging Face state dict under our names, see `common.our_names`. Accepts the prefixes `module.`
    and `lxrt_encoder.model.` and TF's gamma and beta."""
    given = {}
    for name, tensor in plain_names(state).items():
        name = name.removeprefix("lxrt_encoder.model.")
        if name.startswith(("lxmert.", "embeddings.", "encoder.", "pooler.")):  # Hugging Face, with heads or without
            name = "bert." + name.removeprefix("lxmert.")
        given[name] = tensor
    return our_names(given, names, LXMERT_OFFICIAL)


LXMERT_FROM_BERT = ("text_embedding.", "language_layers.", "pooler.")  # what BERT's weights must supply


def lxmert_sizes_of(state, config):
    """Config fields that an official or Hugging Face state dict, or BERT's, determines. BERT's first layers become the
    language layers (9 of 12), its pooler, masked-word and next-sentence heads their namesakes here; its other layers
    are not used, and the rest starts at random (official `--fromScratch` off). The paper's 9, 5 and 5 layers are
    three quarters and five twelfths of BERT-base's 12: other BERTs are divided alike.

    config: as in `common.text_sizes`. KeyError names what is lacking, ValueError tells why.
    """
    sizes, depth = text_sizes(state, config), count_layers(state, "encoder.layer.")
    if any("visn_fc." in name for name in state):
        stacks = depth, count_layers(state, "encoder.r_layers."), count_layers(state, "encoder.x_layers.")
        sizes["feature_size"] = shape_of(state, "visn_fc.visn_fc.weight")[1]  # (C, F)
        sizes["classes"] = 1 + shape_of(state, "decoder_dict.obj.weight", (lxmert.Config.classes - 1,))[0]
        sizes["attributes"] = shape_of(state, "decoder_dict.attr.weight", (lxmert.Config.attributes,))[0]
    else:
        stacks = max(1, depth * 3 // 4), max(1, depth * 5 // 12), max(1, depth * 5 // 12)
    return sizes | dict(zip(("language_layers", "relation_layers", "cross_layers"), stacks, strict=True))


SPELLING = {word: str(i) for i, word in enumerate(("one", "two", "three", "four", "five", "six", "seven"), start=1)}


SPELLING |= {"eight": "8", "nine": "9", "ten": "10", "grey": "gray"}


def normalize_lxmert_answer(answer):
    """An answer as the 9500-answer table spells it: lower case, no final full stop, no article, digits to ten."""
    answer = answer.lower()
    if answer.endswith("."):
        answer = answer[:-1].strip()
    for article in ("a ", "an ", "the "):  # each once, in this order: "a the dog" is "dog", "the a dog" is "a dog"
        answer = answer.removeprefix(article)
    return SPELLING.get(answer, answer)


def transfer_answers(weight, bias, known, wanted):
    """The QA head's last layer for another answer list: rows copied by normalised answer, unknown answers 0.

    weight (A, 2C), bias (A,) of the A answers in `known`; returns the two for the list `wanted`.
    """
    place = {normalize_lxmert_answer(answer): i for i, answer in enumerate(known)}
    rows = torch.tensor([place.get(normalize_lxmert_answer(answer), -1) for answer in wanted], device=weight.device)
    found = rows >= 0
    return weight[rows] * found[:, None], bias[rows] * found  # row -1 is read, then zeroed


def transfer_answer_head(state, names, known, wanted):
    """Our state dict with its answer head, vqa or qa, as the model has it whose names are `names` (the official code's
    `load_lxmert_qa`): pretraining's head becomes that of VQA; the rows of its last layer follow `transfer_answers`.

    known: the answers of the state's rows; wanted: the model's. Unchanged where there is nothing to do. ValueError if
    the head has another number of rows than `known`.
    """
    kind = next((head for head in ("vqa", "qa") if f"heads.{head}.3.weight" in state), None)
    head = next((head for head in ("vqa", "qa") if f"heads.{head}.3.weight" in names), None)
    if None in (kind, head) or (kind, known) == (head, wanted):
        return state
    weight, bias = state[f"heads.{kind}.3.weight"], state[f"heads.{kind}.3.bias"]
    if len(known) != len(weight):
        raise ValueError(f"its answer head has {len(weight)} rows, the list of answers {len(known)}")
    weight, bias = transfer_answers(weight, bias, known, wanted)
    state = {n.replace(f"heads.{kind}.", f"heads.{head}."): t for n, t in state.items()}
    return state | {f"heads.{head}.3.weight": weight, f"heads.{head}.3.bias": bias}


FORMATS = {  # model: its official names and sizes
    "uniter": SimpleNamespace(
        to_official=uniter_to_official,
        from_official=uniter_from_official,
        from_bert=UNITER_FROM_BERT,
        sizes_of=uniter_sizes_of,
    ),
    "vilbert": SimpleNamespace(
        to_official=vilbert_to_official,
        from_official=vilbert_from_official,
        from_bert=VILBERT_FROM_BERT,
        sizes_of=vilbert_sizes_of,
    ),
    "lxmert": SimpleNamespace(
        to_official=lxmert_to_official,
        from_official=lxmert_from_official,
        from_bert=LXMERT_FROM_BERT,
        sizes_of=lxmert_sizes_of,
    ),
}
