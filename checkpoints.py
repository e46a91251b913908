"""checkpoints.py: weights in and out.

    save_checkpoint, load_checkpoint    our own checkpoints, with all that a run needs to go on
    load_weights                        the file of --init: our own, BERT's, an official one, or one of Hugging Face
    fit_state_dict                      weights into a model: rename, resize, compare shapes, report

In support/, weights.py reads files, formats.py knows the names and sizes of published checkpoints, and resume.py finds
what a run goes on from.

A state dict is {parameter name: tensor}. "Official" names are those of the authors' released checkpoints.
"""

import os
import warnings
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist

import data
import lxmert
import uniter
import vilbert
from common import UserError
from support import formats, weights
from support.records import normalize_lxmert_answer
from tasks import TASKS

# ---- the table of models -----------------------------------------------------------------------------------------

# The contract: what the file of a model must define. A fourth model is one such file and one line in MODELS.
#   Config            dataclass of sizes. train.py sets these fields: vocab_size, feature_size, classes, attributes,
#                     types, answers, heads, teacher_widths. It also reads hidden (the text's width), max_positions.
#                     Optional: visual_hidden (the regions' width, if another), task_tokens (how many tasks have one),
#                     nlvr2 ("triplet": both pictures of NLVR2 are one row)
#   PRESETS           {"tiny": {field: value}, "base": ...}: what --size changes in Config
#   MODEL             the class, MODEL(config); ValueError for sizes that do not fit together. Its attributes: `config`,
#                     `text_embedding` (a common.TextEmbedding), `heads` (a ModuleDict of config.heads). Its methods:
#     encode(batch, text=True, regions=True, record=False, given=None)   common.Encoding. With record, a map's name ends
#                                       in "text", "regions", "text_to_regions" or "regions_to_text", and a state's
#                                       name contains "text" or "regions". Any other name means words and regions in
#                                       one sequence. Order: that of computation. Heads read the last layer's states
#     unimodal(batch)                   what encode(given=) takes: each modality encoded alone, (text, regions)
#     decode(batch, cache=None)         states of a text that is read from left to right, (B, T, C)
#     word_logits(states)               logits of the vocabulary, (..., C) -> (..., V)
#     forward(batch, objectives)        {objective: (loss, logits)}
#   HEADS             {head: config -> Module}. Read by name: mlm, itm (2 logits, 1 = match), rank (1), itc, hidden
#   OBJECTIVES        {objective: common.Objective}
#   PRETRAINING       dict: the paper's objectives with their ratios, masking and mismatched pairs
#   CHOICES           {field of Config that is a string: its allowed values}
#   VCR_TYPES         text types of question and answer, and of question, answer and reason
#   NEGATIVES         which side of a true pair is replaced in each mismatched pair of a retrieval group: "image" or "text"
#   text_types(tasks) the table of text types for these tasks: for each row, the row of pretraining's that initialises it
# Keys of PRETRAINING, the last two optional:
#   objectives        {objective: ratio}, those of the paper
#   conditional       True: a step trains one of them, drawn by ratio; False: all of them
#   joined            {objective: others that are trained in the same step}; read only if conditional
#   loss_weights      {objective: factor of its loss}, 1 where none is named
#   rate              learning rate relative to fine-tuning
#   region_masking    arguments of data.mask_regions
#   mismatched_share  share of mismatched pairs
#   mismatch          which side of a mismatched pair is replaced: "image" or "text"
#   predict_mismatched  False: mismatched pairs have no masked-prediction losses
#   second_half       objectives that are trained in the second half of the steps only
# Official names and sizes are optional: they stand in formats.FORMATS, not in the model's file.
MODELS = {
    "uniter": uniter,
    "vilbert": vilbert,
    "lxmert": lxmert,
}

for task in TASKS.values():
    if task.own_objective:  # the task defines its objective, for all models
        for paper in MODELS.values():
            paper.OBJECTIVES[task.objective] = task.own_objective


# ---- our own checkpoints -----------------------------------------------------------------------------------------

NEWEST = "checkpoint.pt"  # what a run goes on from, see support/resume.py
PREVIOUS = "checkpoint.previous.pt"  # the one before, in case the newest is damaged
BEST = "best.pt"  # the weights that were best on the val split
TEST_OPTIONS = ("ablate", "mask", "max_words", "pool", "captions", "beams")  # options that change what a test measures
# what a checkpoint must hold to be used, and what else it may hold
CHECKPOINT_TYPES = {"model": str, "task": str, "config": dict, "state": dict, "tokenizer": str, "answers": list}
OTHER_TYPES = {"data": str, "patch": int, "grid": int, "optimizer": dict, "progress": dict, "generators": dict,
               "fingerprint": dict, "regions": dict, "objectives": dict, "content_words": list, "usual_answers": dict,
               "settings": dict}  # fmt: skip


def save(content, path):
    """torch.save that writes the whole file or none."""

    def write(temporary):
        temporary.touch()  # torch.save's own error of a file that cannot be made has no name
        torch.save(content, temporary)

    data.write_whole(path, write)


def save_checkpoint(run, name):
    """Writes to `name` in the run's folder all that resuming or predicting needs. All processes call it."""
    generators = gather_generators(run)
    if run.rank != 0:
        return
    config = {}
    for key, value in asdict(run.model.config).items():
        config[key] = list(value) if isinstance(value, tuple) else value
    content = {
        "model": run.args.model,
        "task": run.args.task,
        "config": config,
        "state": run.model.state_dict(),
        "optimizer": run.optimizer.state,
        "generators": {run.device.type: generators},
        "progress": dict(run.progress),
        "tokenizer": run.tokenizer.to_str(),
        "answers": run.answers,
        "data": run.args.data,
        "patch": run.args.patch,
        "grid": run.args.grid,
        "regions": run.regions,
        "objectives": dict(run.objectives),
        "content_words": list(run.content_words),
        "usual_answers": run.usual_answers,
        "settings": {name: getattr(run.args, name) for name in TEST_OPTIONS},
        "fingerprint": run.fingerprint,
    }
    path = run.args.out / name
    if name != NEWEST:
        save(content, path)
        return
    # at every moment NEWEST or PREVIOUS is a whole checkpoint
    new = path.with_name(NEWEST + ".new")
    save(content, new)
    if path.is_file():
        os.replace(path, path.with_name(PREVIOUS))
    os.replace(new, path)


def gather_generators(run):
    """The states of all processes' generators of dropout, in the order of ranks."""
    own = generator_of(run.device).get_rng_state()
    if run.world == 1:
        return [own]
    states = [torch.empty_like(own) for _ in range(run.world)]
    dist.all_gather(states, own)
    return states


def generator_of(device):
    """The module that has get_rng_state and set_rng_state for a device: torch, torch.cuda or torch.mps."""
    if device.type == "cpu":
        return torch
    return torch.get_device_module(device)


def is_checkpoint(content):
    """Whether a file's content is one of `save_checkpoint`."""
    return isinstance(content, dict) and set(CHECKPOINT_TYPES) <= set(content)


def load_checkpoint(path):
    """A checkpoint of `save_checkpoint`, on the CPU. UserError if it is missing, damaged or something else."""
    if Path(path).is_dir():
        raise UserError(f"{path}: is a folder; give its {BEST} or {NEWEST}")
    content = weights.read_torch(Path(path))
    if not is_checkpoint(content):
        raise UserError(f"{path}: not a checkpoint of train.py (it lacks {', '.join(CHECKPOINT_TYPES)})")
    check_content(path, content)
    return content


def check_content(path, content):
    """UserError unless the parts of a checkpoint fit each other: its weights are those of a model with its config. A field
    of the config that an older version named otherwise gets its name of today."""
    weights.check_sums(path)
    try:
        for key, kind in {**CHECKPOINT_TYPES, **OTHER_TYPES}.items():
            if not isinstance(content.get(key, kind()), kind):
                raise TypeError(f"{key!r} is no {kind.__name__}")
        for part, old, new in (
            ("config", "hidden_score", "masked_logit"),
            ("fingerprint", "the model's hidden_score", "the model's masked_logit"),
        ):
            if old in content.get(part, {}):
                content[part][new] = content[part].pop(old)
        paper = MODELS[content["model"]]
        with torch.device("meta"), warnings.catch_warnings(action="ignore"):  # sizes may be 0
            model = paper.MODEL(paper.Config(**content["config"]))
        for name, tensor in model.state_dict().items():
            found = content["state"][name]
            if found.shape != tensor.shape or not found.is_floating_point():
                raise ValueError(f"{name} has another shape than its config says, or holds no floats")
        answers = content["answers"]
        if len(answers) not in (0, model.config.answers) or not all(isinstance(answer, str) for answer in answers):
            raise ValueError(f"it has {len(answers)} answers, its config {model.config.answers}")
        data.tokenizer_from_json(content["tokenizer"])
    except Exception as error:  # noqa: BLE001 (parts of the wrong kind end in nearly every kind of error)
        raise UserError(f"{path}: a damaged checkpoint ({type(error).__name__}: {error})") from None
    weights.check_finite(path, weights.find_state_dict(path, content))


# ---- other people's files ----------------------------------------------------------------------------------------


def load_weights(args):
    """The file or folder of --init as a checkpoint.

    Our own checkpoint is returned as it is. For weights of BERT, of official code or of Hugging Face the result is a
    dict with `kind` ("BERT", or the model's name), `state` under the file's names and `config`, the sizes found.
    tokenizer.json or vocab.txt, config.json and the list of answers beside the file are used.

    UserError for anything else, for another model's weights and for numbers that are not finite.
    """
    path = weights.find_weights(Path(args.init))
    content = weights.read_weights(path)
    if is_checkpoint(content):
        check_content(path, content)
        return content
    state = weights.find_state_dict(path, content)
    weights.check_finite(path, state)
    state = weights.strip_wrappers(path, state)
    if "text_embedding.words.weight" in state:
        raise UserError(
            f"{path}: a checkpoint of train.py without its sizes and word pieces; give the whole checkpoint"
        )
    kind = kind_of(state)
    if kind not in ("BERT", args.model):
        raise UserError(f"{path}: holds weights of {kind}, which do not fit --model {args.model}")
    if args.model not in formats.FORMATS:
        raise UserError(f"{path}: --model {args.model} has no official names; give a checkpoint of train.py")
    config = weights.read_config(path.with_name("config.json"))
    try:
        if kind == "BERT":
            state = formats.normalize_bert_names(state)
        sizes = formats.FORMATS[args.model].sizes_of(state, config)
    except KeyError as error:
        raise UserError(f"{path}: no weights of BERT, UNITER, ViLBERT or LXMERT: it lacks {error.args[0]}") from None
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: {error}") from None
    tokenizer = None
    if not args.vocab:
        tokenizer = weights.tokenizer_beside(path)
    answers = weights.answers_beside(path)
    return {
        "kind": kind,
        "knows_heads": "num_attention_heads" in config,
        "model": args.model,
        "config": sizes,
        "state": state,
        "tokenizer": tokenizer,
        "answers": answers,
    }


def kind_of(state):
    """The model whose official names a state dict has: "uniter", "vilbert", "lxmert", else "BERT"."""
    for model, known in formats.FORMATS.items():
        if any(known.mark in name for name in state):
            return model
    return "BERT"


# ---- fit a state dict to a model ---------------------------------------------------------------------------------


@dataclass
class Report:
    """What `fit_state_dict` did. The lists hold names of parameters, `new_answers` answers."""

    source: str  # the file, and whose weights it holds
    loaded: list = field(default_factory=list)
    resized: list = field(default_factory=list)
    at_random: list = field(default_factory=list)
    ignored: list = field(default_factory=list)
    new_answers: list = field(default_factory=list)  # answers that the file lacks: their rows start at 0

    @property
    def random_heads(self):
        """The heads that stay at random, e.g. ["vqa"]."""
        heads = []
        for name in self.at_random:
            if name.startswith("heads."):
                head = name.split(".")[1]
                if head not in heads:
                    heads.append(head)
        return heads

    def __str__(self):
        lines = [f"init     {self.source}"]
        kinds = {
            "loaded": self.loaded,
            "resized": self.resized,
            "at random": self.at_random,
            "ignored": self.ignored,
        }
        for kind, names in kinds.items():
            counts = Counter(component_of(name) for name in sorted(names))
            parts = [f"{component} ({count})" for component, count in counts.items()]
            shown = ", ".join(parts[:8]) or "none"
            if len(parts) > 8:
                shown += ", ..."
            lines.append(f"         {kind} {len(names)}: {shown}")
        if self.new_answers:
            lines.append(f"         answers new to it {len(self.new_answers)}: {', '.join(self.new_answers[:8])}")
        return "\n".join(lines)


def fit_state_dict(args, own, checkpoint, answers):
    """(state dict, Report): the file's tensors where name and shape agree, else those of `own`, the initial state.

    answers: the model's list of answers. A head is loaded whole or not at all.
    UserError if a tensor of the trunk would stay at random without --partial. A file of BERT need only have the tensors
    whose names begin with the model's `formats.FORMATS[...].from_bert`.
    """
    kind = checkpoint.get("kind")
    state = checkpoint["state"]
    whose = f"weights of {kind}" if kind else "a checkpoint"
    if not checkpoint.get("knows_heads", True):
        whose += "; no config.json tells the number of attention heads, so they have the usual width; --config sets it"
    report = Report(f"{args.init}: {whose}")
    try:
        if kind:
            state = rename_state(args.model, kind, state, own, report)
        state = move_answers(state, own, checkpoint["answers"], answers, report)
        state = widen_text_types(state, own, MODELS[args.model].text_types(args.tasks), report)
        state = make_rank_head(state, own)
    except (LookupError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"{args.init}: {str(error).splitlines()[0]}") from None
    loaded = names_that_fit(state, own)
    report.loaded = sorted(loaded)
    report.at_random = sorted(set(own) - loaded)
    report.ignored += [name for name in state if name not in loaded]
    check_trunk(args, kind, report.at_random)
    if not loaded:
        raise UserError(
            f"{args.init}: no tensor fits --model {args.model}; the first in the file is {report.ignored[0]}"
        )
    full = {}
    for name, tensor in own.items():
        full[name] = state[name] if name in loaded else tensor
    return full, report


def rename_state(model, kind, state, own, report):
    """A state dict of `kind`, under our names."""
    names = list(own)
    for name in own:  # heads of the file that become heads of the model in move_answers and make_rank_head
        names.append(name.replace("heads.vqa.", "heads.qa."))
        if kind != "BERT":
            names.append(name.replace("heads.rank.", "heads.itm."))
    state, unexpected = formats.FORMATS[model].from_official(state, names)
    report.ignored += unexpected
    return state


def widen_text_types(state, own, starts, report):
    """The state dict with the text types that the model has and the file lacks.

    starts: what the model's `text_types` returned. New type i starts as the file's row starts[i], or 0 beyond its end.
    """
    name = "text_embedding.types.weight"
    if name not in state or name not in own or len(state[name]) >= len(own[name]):
        return state
    table = state[name]  # (types of the file, C)
    new = []
    for row in range(len(table), len(own[name])):
        new.append(starts[row] if row < len(starts) else 0)
    state = dict(state)
    state[name] = torch.cat([table, table[new]])  # (types of the model, C)
    report.resized.append(name)
    return state


def make_rank_head(state, own):
    """The state dict with a retrieval head. If the file has none, the matching head gives it: the log odds of a match.

    Official UNITER takes the "match" row alone, which ranks slightly differently.
    """
    if "heads.rank.weight" not in own or "heads.rank.weight" in state or "heads.itm.weight" not in state:
        return state
    state = dict(state)
    for name in ("weight", "bias"):
        match = state[f"heads.itm.{name}"]
        state[f"heads.rank.{name}"] = match[1:] - match[:1]  # (2, C) -> (1, C), (2,) -> (1,)
    return state


def names_that_fit(state, own):
    """Names of tensors that have the same shape in both and hold floats (integers are quantised weights). A head is
    left out whole if one of its tensors does not fit."""
    fitting = set()
    incomplete_heads = set()
    for name, tensor in own.items():
        if name in state and state[name].shape == tensor.shape and state[name].is_floating_point():
            fitting.add(name)
        elif name.startswith("heads."):
            incomplete_heads.add(component_of(name))
    return {name for name in fitting if component_of(name) not in incomplete_heads}


def check_trunk(args, kind, at_random):
    """UserError if a tensor of the trunk stays at random that the file should have supplied; --partial permits it."""
    lost = []
    for name in at_random:
        expected = kind != "BERT" or name.startswith(formats.FORMATS[args.model].from_bert)
        if expected and not name.startswith("heads."):
            lost.append(name)
    if lost and not args.partial:
        raise UserError(
            f"{args.init}: {len(lost)} tensors of the trunk are missing or of another shape or type, the first is {lost[0]}; "
            "--partial leaves them at random"
        )


def component_of(name):
    """The part of the model that a parameter belongs to: "layers", "heads.vqa"; officially "bert.encoder.layer.9"."""
    pieces = name.split(".")
    if pieces[0].endswith(("embedding", "layers", "connections", "pooler")):
        return pieces[0]
    if ".encoder." in name:
        return ".".join(pieces[:4])
    return ".".join(pieces[:2])


# ---- answers -----------------------------------------------------------------------------------------------------

ANSWER_HEADS = ("vqa", "qa")  # heads with a row for each answer; "qa" is LXMERT's in pretraining


def match_answers(known, wanted):
    """For each wanted answer its index in the list `known`, -1 if it is not there.

    Identical spelling matches first, then identical spelling after normalisation.
    """
    written = {}
    normalized = {}
    for place, answer in enumerate(known):
        written.setdefault(answer, place)
        normalized.setdefault(normalize_lxmert_answer(answer), place)
    places = []
    for answer in wanted:
        place = written.get(answer)
        if place is None:
            place = normalized.get(normalize_lxmert_answer(answer), -1)
        places.append(place)
    return places


def move_rows(tensor, places):
    """Rows of a tensor (A, ...) in another order: (A', ...). Where a place is -1, a row of zeros."""
    places = torch.tensor(places, device=tensor.device)  # (A',)
    moved = tensor[places]  # for -1 the last row is read, then zeroed
    moved[places < 0] = 0
    return moved


def answer_head_of(names):
    """The answer head among a model's parameter names, None without one."""
    for head in ANSWER_HEADS:
        if any(name.startswith(f"heads.{head}.") for name in names):
            return head
    return None


def move_answers(state, own, known, wanted, report):
    """The state dict with its answer head as the model `own` has it, for the answers `wanted` in place of `known`.

    The rows of the head's last layer move with their answers. Rows of answers that the file lacks are 0. Earlier layers
    are kept. LXMERT's pretraining head becomes that of VQA (official code: `load_lxmert_qa`). If no answer is known,
    the head is left out. ValueError if the head has another number of rows than `known`.
    """
    source = answer_head_of(state)
    target = answer_head_of(own)
    if source is None or target is None or (source == target and known == wanted):
        return state
    places = match_answers(known, wanted)
    new = [answer for answer, place in zip(wanted, places, strict=True) if place < 0]
    if len(new) == len(wanted):
        report.ignored += [name for name in state if name.startswith(f"heads.{source}.")]
        return {name: tensor for name, tensor in state.items() if not name.startswith(f"heads.{source}.")}
    moved = {name.replace(f"heads.{source}.", f"heads.{target}."): tensor for name, tensor in state.items()}
    biases = [name for name in own if name.startswith(f"heads.{target}.") and name.endswith(".bias")]
    last_layer = biases[-1].removesuffix("bias")
    if f"{last_layer}bias" not in moved:
        return moved  # a head of another kind, which will not fit
    rows = len(moved[f"{last_layer}bias"])
    if rows != len(known):
        raise ValueError(f"its answer head has {rows} rows, the list of answers {len(known)}")
    report.new_answers = new
    move_last_layer(moved, last_layer, places, report)
    return moved


def move_last_layer(state, layer, places, report):
    """Moves the rows of a linear layer inside a state dict; `layer` is the beginning of its names, with the dot."""
    gain = f"{layer}weight_g"
    direction = f"{layer}weight_v"
    if gain in state:  # weight normalisation, w = g v / |v|: g is scaled with |v|, which keeps the rows of w
        kept = move_rows(state[direction], places)
        state[gain] = state[gain] * kept.norm() / state[direction].norm()
        report.resized.append(gain)
    for name in state:
        if name.startswith(layer) and name != gain:
            state[name] = move_rows(state[name], places)
            report.resized.append(name)
