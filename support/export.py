"""export.py: a checkpoint of train.py for other programs, behind `predict.py CKPT --export FILE --to FORMAT`.

- official: one file of weights under the names of the paper's own code
- transformers: a folder for `from_pretrained` (LXMERT)
- program: one file for `torch.export.load`
- onnx: one file for ONNX Runtime and others

The last two run without this repository. They take the tensors of a data.Batch, see `Program`.
Letters: B rows of a batch, T text positions, N regions, C width, F region-feature width, V vocabulary.
"""

import io
import json
import logging
import warnings
from pathlib import Path

import torch

import checkpoints
import data
from common import UserError
from support import formats

# ---- weights -----------------------------------------------------------------------------------------------------------


def export_official(checkpoint, out):
    """Writes a checkpoint under the paper's official names, one file."""
    checkpoints.save(formats.export_official(checkpoint["model"], checkpoint["state"]), Path(out))


def export_transformers(checkpoint, out):
    """Writes a checkpoint as a folder that transformers' `from_pretrained` loads: config.json, model.safetensors, the
    tokenizer, and the answers as all_ans.json. UserError for models that transformers lacks."""
    folder = Path(out)
    if folder.is_file():
        raise UserError(f"--export {out}: is a file; this format is a folder")
    state, config = formats.export_hugging_face(checkpoint["model"], checkpoint["config"], checkpoint["state"])
    try:
        from safetensors import torch as safetensors_torch  # optional: this format alone needs it
    except ImportError:
        raise UserError("--to transformers writes a safetensors file; pip install safetensors") from None
    tensors = {}
    for name, tensor in state.items():
        tensors[name] = tensor.clone().contiguous()  # a file of safetensors must not hold one tensor under two names
    tokenizer = data.tokenizer_from_json(checkpoint["tokenizer"])
    pieces = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    described = {
        "tokenizer_class": "LxmertTokenizer",
        "do_lower_case": '"lowercase":true' in checkpoint["tokenizer"],
        "model_max_length": config["max_position_embeddings"],
    }
    content = safetensors_torch.save(tensors, {"format": "pt"})
    data.write_whole(folder / "model.safetensors", lambda file: file.write_bytes(content))
    data.write_text(folder / "config.json", json.dumps(config, indent=1) + "\n")
    data.write_text(folder / "tokenizer_config.json", json.dumps(described) + "\n")
    data.write_text(folder / "tokenizer.json", checkpoint["tokenizer"])
    data.write_text(folder / "vocab.txt", "".join(f"{piece}\n" for piece, _ in pieces))
    data.write_text(folder / "all_ans.json", json.dumps(checkpoint["answers"]) + "\n")


WEIGHTS = {"official": export_official, "transformers": export_transformers}

# ---- programs ----------------------------------------------------------------------------------------------------------

INPUTS = ("text", "text_mask", "segments", "features", "boxes", "region_mask", "region_types")  # the last: nlvr2's


class Program(torch.nn.Module):
    """What --to program and --to onnx export: a function of the tensors of a data.Batch, under the names that they have there.

    It returns a dict. For most tasks: "text_states" (B, T, C) and "region_states" (B, N, C) of the last layer; "pooled"
    (B, C); and "logits", those that the task's objective computes its loss from:
    - vqa and ve (B, answers); vcr (B,), one a choice; refer (B, N)
    - nlvr2 (B / 2, 2), false and true: rows 2i and 2i+1 are statement i with its left and its right picture; at least 4 rows
    - retrieval (B, 1), higher for a better match; pretraining with matching (B, 2), the second one is "match"
    For captions "logits" (B, T, V) alone: those of the word after each word, computed from the regions and the words up
    to it.
    """

    def __init__(self, run, task, example):
        """run: train.Run.   task: a row of tasks.TASKS.   example: a data.Batch of the task."""
        super().__init__()
        self.model = run.model
        self.task = task
        self.task_number = run.args.tasks.index(task.name)
        self.loss = run.paper.OBJECTIVES[task.objective].loss if task.objective else None
        self.answers = 0 if example.answers is None else example.answers.shape[1]
        self.regions_are_targets = example.target is not None and example.target.ndim == 2
        self.rows_per_target = 1
        if example.target is not None:
            self.rows_per_target = len(example.text) // len(example.target)

    def forward(self, text, text_mask, segments, features, boxes, region_mask, region_types=None):
        batch = data.Batch(text, text_mask, segments, features, boxes, region_mask, region_types)
        batch.task = torch.full_like(text[:, 0], self.task_number)
        if self.task.generates:
            return {"logits": self.model.word_logits(self.model.decode(batch))}
        encoding = self.model.encode(batch)
        outputs = {"text_states": encoding.text, "region_states": encoding.regions, "pooled": encoding.pooled}
        if self.task.ranks in self.model.heads:
            outputs["logits"] = self.model.heads[self.task.ranks](encoding.pooled)
        elif self.task.objective:
            self.add_targets(batch)
            outputs["logits"] = self.loss(self.model, encoding, batch)[1]
        return outputs

    def add_targets(self, batch):
        """Adds zeros as targets, because the loss function reads them. Its loss is not used; its logits do not depend
        on the targets."""
        rows = batch.text.shape[0]
        batch.ids = [""]  # all rows are choices of one example
        batch.answers = batch.features.new_zeros(rows, self.answers)
        batch.target = batch.text.new_zeros(rows // self.rows_per_target)
        if self.regions_are_targets:
            batch.target = torch.zeros_like(batch.boxes[:, :, 0])  # (B, N)


def make_program(run, task, example):
    """The ExportedProgram of a task, for any number of rows, words and regions.

    run: train.Run, on the CPU in float32.   example: a data.Batch of the task, with at least two rows.
    """
    module = Program(run, task, example).eval()
    rows = torch.export.Dim("rows", min=1, max=65536)
    if module.rows_per_target > 1:  # torch.export finds no program that is right for a single example of several rows
        rows = module.rows_per_target * torch.export.Dim("examples", min=2, max=65536)
    words = torch.export.Dim("words", min=2, max=run.model.config.max_positions)
    regions = torch.export.Dim("regions", min=1, max=65536)
    tensors = {}
    shapes = {}
    for name in INPUTS:
        if getattr(example, name) is not None:
            tensors[name] = getattr(example, name)
            shapes[name] = {0: rows, 1: words if name in ("text", "text_mask", "segments") else regions}
    with torch.no_grad(), warnings.catch_warnings(action="ignore"):
        program = torch.export.export(module, (), tensors, dynamic_shapes=shapes)
    program.graph.eliminate_dead_code()  # the loss, which a file could not hold
    return program


def texts_beside(run):
    """What a program needs besides its weights: {name of a file: its text}."""
    return {"tokenizer.json": run.tokenizer.to_str(), "answers.json": json.dumps(run.answers)}


def export_program(run, task, example, out):
    """Writes a program that `torch.export.load(FILE).module()` loads. The tokenizer and the list of answers travel in the
    file: torch.export.load(FILE, extra_files={"tokenizer.json": "", "answers.json": ""}) fills in the two texts."""
    program = make_program(run, task, example)
    content = io.BytesIO()  # a file's name would have to end in .pt2
    torch.export.save(program, content, extra_files=texts_beside(run))
    data.write_whole(out, lambda file: file.write_bytes(content.getvalue()))


def export_onnx(run, task, example, out):
    """Writes a model of ONNX, with inputs and outputs of the same names. The tokenizer and the list of answers are its
    metadata. UserError where the packages are missing."""
    try:
        import onnx  # noqa: F401 (optional: this format alone needs the two)
        import onnxscript  # noqa: F401
    except ImportError:
        raise UserError("--to onnx takes two packages; pip install onnx onnxscript") from None
    program = make_program(run, task, example)
    _, tensors = program.example_inputs
    names = list(program.module()(**tensors))
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it says which other packages are missing
    with warnings.catch_warnings(action="ignore"):
        model = torch.onnx.export(program, dynamo=True, verbose=False, output_names=names)
    model.model.metadata_props.update(texts_beside(run))
    data.write_whole(out, lambda file: model.save(file))


PROGRAMS = {"program": export_program, "onnx": export_onnx}
