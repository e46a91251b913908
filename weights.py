"""weights.py: files of weights, from --init to a state that fits the model, and back under official names.

What is read: checkpoints of train.py; BERT's weights; the official ones of the three papers, also as Hugging Face names
them; each as a file of torch.save or of safetensors, or a folder that holds one. Nothing in a file is executed.
Read top to bottom: files, what they hold, how it fits the model, official names. Whatever is wrong with a file is a
data.DataError of one line.
"""

import json
import math
import os
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import torch

import common
import data
import lxmert
import uniter
import vilbert
from data import DataError

PAPERS = {
    "uniter": (uniter, "UNITER"),
    "vilbert": (vilbert, "ViLBERT"),
    "lxmert": (lxmert, "LXMERT"),
}
# by this a state dict under official names is known; a BERT has none of these
MARKS = {"uniter": "img_embeddings.", "vilbert": "v_embeddings.", "lxmert": "visn_fc."}
ANSWER_HEADS = ("heads.vqa.", "heads.qa.")
HUGGING_FACE = {"model_type": ("bert", "lxmert"), "hidden_act": ("gelu",)}  # what a config.json may say, if it does
SAFETENSORS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
SAFETENSORS |= {"I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool}

# ---- files ------------------------------------------------------------------------------------------------------


def save(content, path):
    """torch.save, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    torch.save(content, temporary)
    os.replace(temporary, path)


def read_torch(path):
    """What torch.save wrote, on the CPU, without running any code that the file may hold. DataError where it cannot."""
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    try:
        with warnings.catch_warnings(action="ignore"):  # a failure is one line
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001 (bytes that are no weights end in nearly every kind of error)
        raise DataError(f"{path}: no weights, damaged, or more than weights ({type(error).__name__})") from None


def read_safetensors(path):
    """{name: tensor} of a safetensors file: 8 bytes, the length n of the header, little-endian; n bytes of JSON,
    {name: {"dtype": "F32", "shape": [2, 3], "data_offsets": [begin, end]}}; the numbers, from which offsets count.

    The file is mapped, each tensor copied out of it once. DataError unless the tensors fill the file one after another,
    without gap or overlap, each as long as its shape says. dtypes: SAFETENSORS.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file")
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
        raise DataError(f"{path}: not a safetensors file ({error or type(error).__name__})") from None
    return tensors


def read_json(path, kind):
    """A JSON file's content, None where there is no file. DataError if it is no JSON or no `kind` (dict, list)."""
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON ({error})") from None
    if not isinstance(content, kind):
        raise DataError(f"{path}: holds no {kind.__name__}")
    return content


# ---- what they hold ---------------------------------------------------------------------------------------------


def load_checkpoint(path):
    """A checkpoint of `save_checkpoint`, on the CPU. DataError if it is missing, damaged or something else."""
    content = read_torch(Path(path))
    if not isinstance(content, dict) or not {"model", "config", "state", "tokenizer", "answers"} <= set(content):
        raise DataError(f"{path}: not a checkpoint of train.py (it lacks model, config, state, tokenizer or answers)")
    return content


def read_state(path):
    """(content, state) of a weights file: what it holds, and the tensors in it by name. DataError if it holds none, or
    NaN."""
    content = state = (read_safetensors if path.suffix == ".safetensors" else read_torch)(path)
    for key in ("state", "model_state", "model_state_dict", "state_dict", "model"):  # some codes put it under one
        state = state[key] if isinstance(state, dict) and isinstance(state.get(key), dict) else state
    state = state if isinstance(state, dict) else {}
    state = {n: t for n, t in state.items() if isinstance(n, str) and isinstance(t, torch.Tensor)}
    if not state or any(tensor.layout != torch.strided or tensor.is_meta for tensor in state.values()):
        raise DataError(f"{path}: holds no weights; give a checkpoint, a state dict or a safetensors file")
    # a sum is finite only if all its numbers are, and costs no memory
    if wrong := [n for n, t in state.items() if t.is_floating_point() and not t.sum(dtype=torch.float32).isfinite()]:
        raise DataError(f"{path}: {len(wrong)} tensors hold NaN or infinity, the first is {wrong[0]}")
    return content, state


def load_weights(o):
    """The file or folder of --init as a checkpoint: one of `save_checkpoint`; or the weights of BERT, of an official
    code or of Hugging Face, then with `kind` (BERT, or the model's name), `state` under the names found there and
    `config` with the sizes found. tokenizer.json or vocab.txt, config.json and the answers beside the file are used.

    DataError for anything else, for another model's weights and for numbers that are not finite.
    """
    path, paper = Path(o.init), PAPERS[o.model][0]
    if path.is_dir():
        names = [name for name in ("model.safetensors", "pytorch_model.bin") if (path / name).is_file()]
        if not names:
            raise DataError(f"{path}: a folder without model.safetensors or pytorch_model.bin; give the file")
        path = path / names[0]
    content, state = read_state(path)
    if {"model", "config", "state", "tokenizer", "answers"} <= set(content):
        return content
    kind = next((model for model, mark in MARKS.items() if any(mark in name for name in state)), "BERT")
    if kind not in ("BERT", o.model):
        raise DataError(f"{path}: holds weights of {kind}, which do not fit --model {o.model}")
    config = read_json(path.with_name("config.json"), dict) or {}
    for key, known in HUGGING_FACE.items():
        if config.get(key, known[0]) not in known:
            raise DataError(f"{path.with_name('config.json')}: {key} is {config[key]!r}, must be {' or '.join(known)}")
    try:
        state = common.bert_names(state) if kind == "BERT" else state
        sizes = paper.sizes_of(state, config)
    except KeyError as error:
        raise DataError(f"{path}: no weights of BERT, UNITER, ViLBERT or LXMERT: it lacks {error.args[0]}") from None
    except (TypeError, ValueError) as error:
        raise DataError(f"{path}: {error}") from None
    pieces = [p for name in ("tokenizer.json", "vocab.txt") if (p := path.with_name(name)).is_file()]
    answers = [p for name in ("all_ans.json", "trainval_label2ans.json") if (p := path.with_name(name)).is_file()]
    return {
        "kind": kind,
        "model": o.model,
        "config": sizes,
        "state": state,
        "tokenizer": data.read_tokenizer(pieces[0]).to_str() if pieces and not o.vocab else None,
        "answers": [a["ans"] if isinstance(a, dict) else a for a in read_json(answers[0], list)] if answers else [],
    }


# ---- how it fits the model --------------------------------------------------------------------------------------


def fitting(o, own, checkpoint, answers):
    """A full state for a model whose initial one is `own`: the file's tensors where name and shape agree; and a report,
    five lines on what was loaded, resized, left at random and ignored.

    DataError if anything but a head would stay at random, save what BERT has nothing for (all but the paper's
    FROM_BERT) or what --partial permits. A head is loaded whole or not at all; an answer head for the same list of
    answers only, as its rows mean nothing under another one, but LXMERT's moves row by row.
    """
    paper, state, ignored, resized = PAPERS[o.model][0], checkpoint["state"], [], []
    types, kind = "text_embedding.types.weight", checkpoint.get("kind")
    try:
        if kind:
            names = [*own, *(name.replace("heads.vqa.", "heads.qa.") for name in own)]
            if kind != "BERT":
                names += [name.replace("heads.rank.", "heads.itm.") for name in own]
            state, ignored = paper.from_official(state, names)
        if o.model == "lxmert" and checkpoint["answers"]:
            before = {id(tensor) for tensor in state.values()}
            state = lxmert.transfer_answer_head(state, own, checkpoint["answers"], answers)
            resized = [name for name in state if id(state[name]) not in before]
        elif checkpoint["answers"] != answers:
            ignored += [name for name in state if name.startswith(ANSWER_HEADS)]
            state = {name: tensor for name, tensor in state.items() if not name.startswith(ANSWER_HEADS)}
        if o.model == "uniter" and types in state and len(state[types]) < len(own[types]):
            table = state[types]
            if "nlvr2" in o.tasks and len(table) == 2:  # the second picture's type starts as the picture's
                table = uniter.widen_types(table, 3, copy=1)
            state = {**state, types: uniter.widen_types(table, len(own[types]), copy=0)}  # VCR's as the text's
            resized.append(types)
        if "heads.rank.weight" in own and "heads.rank.weight" not in state and "heads.itm.weight" in state:
            # the log odds of a match; official UNITER takes row 1 alone (`rank_from_itm`), which ranks a bit otherwise
            for name in ("weight", "bias"):
                match = state[f"heads.itm.{name}"]
                state = {**state, f"heads.rank.{name}": match[1:] - match[:1]}  # (2, C) -> (1, C), (2,) -> (1,)
    except (IndexError, RuntimeError, TypeError, ValueError) as error:
        raise DataError(f"{o.init}: {str(error).splitlines()[0]}") from None
    loaded = {name for name in own if name in state and state[name].shape == own[name].shape}
    torn = {part(name) for name in set(own) - loaded if name.startswith("heads.")}
    loaded = {name for name in loaded if part(name) not in torn}
    fresh, ignored = sorted(set(own) - loaded), ignored + [name for name in state if name not in loaded]
    lost = [n for n in fresh if not n.startswith("heads.") and n.startswith(paper.FROM_BERT if kind == "BERT" else "")]
    if lost and not o.partial:
        raise DataError(
            f"{o.init}: {len(lost)} tensors of the trunk are missing or of another shape, the first is {lost[0]}; "
            "--partial leaves them at random"
        )
    report = [f"init     {o.init}: {f'weights of {kind}' if kind else 'a checkpoint'}"]
    for what, names in {"loaded": loaded, "resized": resized, "at random": fresh, "ignored": ignored}.items():
        counts = Counter(map(part, sorted(names)))
        parts = [f"{name} ({n})" for name, n in counts.items()]
        report.append(f"         {what} {len(names)}: {', '.join(parts[:8]) or 'none'}{', ...' * (len(parts) > 8)}")
    return {name: state[name] if name in loaded else own[name] for name in own}, "\n".join(report)


def part(name):
    """What a parameter belongs to: "layers", "heads.vqa"; of official names "cls.predictions",
    "bert.encoder.layer.9"."""
    pieces = name.split(".")
    trunk = pieces[0].endswith(("embedding", "layers", "connections", "pooler"))
    return ".".join(pieces[: 1 if trunk else 4 if ".encoder." in name else 2])


# ---- official names ---------------------------------------------------------------------------------------------


def official(checkpoint):
    """A checkpoint's weights under its paper's official names."""
    try:
        return PAPERS[checkpoint["model"]][0].to_official(checkpoint["state"])
    except ValueError as error:
        raise DataError(f"--export: {error}") from None
