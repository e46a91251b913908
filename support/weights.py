"""weights.py: a file of weights, whoever wrote it, as a state dict {parameter name: tensor}.

torch.save's files, safetensors, Hugging Face's folders, also in several parts; state dicts inside other dicts and with
the prefixes that training codes leave. No code that a file may hold is run. What cannot be used is a UserError: one
line with the file's name.
"""

import json
import re
import warnings
import zipfile
from pathlib import Path

import torch

import data
from common import UserError

# keys under which training codes save the state dict, in the order of search: plain weights first, then moving averages
STATE_KEYS = ("state", "model_state", "model_state_dict", "state_dict", "model", "module", "net", "network")
STATE_KEYS += ("ema_state_dict", "state_dict_ema", "model_ema", "ema_model", "ema", "shadow")
# what DistributedDataParallel, torch.compile, Lightning and averaging put before a parameter's name
WRAPPERS = ("module.", "_orig_mod.", "model.", "ema_model.", "ema.")
WEIGHTS_FILES = ("model.safetensors", "pytorch_model.bin")  # of a Hugging Face folder


def find_weights(path):
    """The weights file of a folder, or the index file of one in several parts. A file is returned unchanged."""
    if not path.is_dir():
        return path
    for name in WEIGHTS_FILES:
        for candidate in (path / name, path / f"{name}.index.json"):
            if candidate.is_file():
                return candidate
    raise UserError(f"{path}: a folder without {' or '.join(WEIGHTS_FILES)}; give the file")


def read_weights(path):
    """The content of a weights file. Of an index file: {name: tensor} of all its parts."""
    if path.name.endswith(".index.json"):
        return read_parts(path)
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    return read_torch(path)


def read_parts(index):
    """{name: tensor} of the files that an index file names: {"weight_map": {name: file}}. UserError if one is missing."""
    content = read_json(index, dict) or {}
    files = content.get("weight_map")
    if not isinstance(files, dict) or not files:
        raise UserError(f"{index}: has no weight_map that names the files of its tensors")
    tensors = {}
    for file in sorted(set(map(str, files.values()))):
        if not file or Path(file).name != file or file.endswith(".json"):
            raise UserError(f"{index}: {file!r} is no weights file of its own folder")
        part = read_weights(index.with_name(file))
        if isinstance(part, dict):
            tensors.update(part)
    missing = [name for name in files if name not in tensors]
    if missing:
        raise UserError(f"{index}: {len(missing)} tensors are in none of its files, the first is {missing[0]}")
    return tensors


def find_state_dict(path, content):
    """The tensors of a file's content, {name: tensor}, under any chain of STATE_KEYS. UserError if there is none."""
    state = content
    for _ in range(10):  # a dict may hold itself
        for key in STATE_KEYS:
            if isinstance(state, dict) and isinstance(state.get(key), dict):
                state = state[key]
                break
    tensors = {}
    if isinstance(state, dict):
        for name, tensor in state.items():
            if isinstance(name, str) and isinstance(tensor, torch.Tensor):
                tensors[name] = tensor
    usable = all(tensor.layout == torch.strided and not tensor.is_meta for tensor in tensors.values())
    if not tensors or not usable:
        raise UserError(f"{path}: holds no weights; give a checkpoint, a state dict or a safetensors file")
    return tensors


def check_finite(path, state):
    """UserError if a tensor holds NaN or infinity."""
    wrong = []
    for name, tensor in state.items():
        # a sum is finite only if all its numbers are, and costs no memory
        if tensor.is_floating_point() and not tensor.sum(dtype=torch.float32).isfinite():
            wrong.append(name)
    if wrong:
        raise UserError(f"{path}: {len(wrong)} tensors hold NaN or infinity, the first is {wrong[0]}")


def strip_wrappers(path, state):
    """A state dict without the WRAPPERS before its names. UserError if two tensors then have one name."""
    plain = {}
    for name, tensor in state.items():
        short = name.replace("_orig_mod.", "")  # torch.compile of a part puts it inside a name
        while short.startswith(WRAPPERS):
            short = short.split(".", 1)[1]
        if short in plain:
            raise UserError(f"{path}: holds {short} twice, as plain and as averaged weights; save one of the two")
        plain[short] = tensor
    return plain


def read_torch(path):
    """What torch.save wrote, on the CPU, without running any code that the file may hold. UserError where it cannot."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        with warnings.catch_warnings(action="ignore"):  # a failure is one line
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001 (bytes that are no weights end in nearly every kind of error)
        objects = re.findall(r"GLOBAL (\S+) was not", str(error))
        if objects:
            raise UserError(
                f"{path}: holds more than weights, an object {objects[0]}; save the state dict alone with "
                "torch.save(model.state_dict(), FILE)"
            ) from None
        raise UserError(f"{path}: no weights, damaged, or more than weights ({type(error).__name__})") from None


def check_sums(path):
    """UserError if a file of torch.save does not fit its check sums (CRC-32), which torch.load does not compare."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except Exception as error:  # noqa: BLE001 (damaged archives end in nearly every kind of error)
        damaged = error
    if damaged:
        raise UserError(f"{path}: damaged ({damaged})")


def read_safetensors(path):
    """{name: tensor} of a safetensors file, by the package of that name. UserError where it cannot."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        from safetensors import torch as safetensors_torch  # optional: this kind of file alone needs it
    except ImportError:
        raise UserError(f"{path}: reading it takes a package; pip install safetensors") from None
    try:
        return safetensors_torch.load_file(path)
    except Exception as error:  # noqa: BLE001 (its own error class, and those of Python for odd headers)
        raise UserError(f"{path}: not a safetensors file, or damaged ({error})") from None


def read_json(path, kind):
    """A JSON file's content, None where there is no file. UserError if it is no JSON or no `kind` (dict, list)."""
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error})") from None
    if not isinstance(content, kind):
        raise UserError(f"{path}: holds no {kind.__name__}")
    return content


# ---- what lies beside a weights file -----------------------------------------------------------------------------

CONFIG_VALUES = {"model_type": ("bert", "lxmert"), "hidden_act": ("gelu",)}  # what a config.json may say, if it does


def read_config(path):
    """A config.json, {} where there is none. UserError if it is another architecture's."""
    config = read_json(path, dict) or {}
    for key, known in CONFIG_VALUES.items():
        if key in config and config[key] not in known:
            raise UserError(f"{path}: {key} is {config[key]!r}, must be {' or '.join(known)}")
    return config


def tokenizer_beside(path):
    """The tokenizer in tokenizer.json or vocab.txt beside a weights file, as text; None without one."""
    for name in ("tokenizer.json", "vocab.txt"):
        if path.with_name(name).is_file():
            return data.read_tokenizer(path.with_name(name)).to_str()
    return None


def answers_beside(path):
    """The answers of LXMERT's answer list beside a weights file, [] without one."""
    for name in ("all_ans.json", "trainval_label2ans.json"):
        if path.with_name(name).is_file():
            answers = []
            for entry in read_json(path.with_name(name), list):
                answers.append(entry["ans"] if isinstance(entry, dict) else entry)
            return answers
    return []
