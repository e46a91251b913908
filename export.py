"""export.py: a checkpoint of train.py for other programs, behind `predict.py CKPT --export FILE --to FORMAT`.

- official: one file of weights under the names of the paper's own code
- transformers: a folder for `from_pretrained` (LXMERT)
- program: one file for `torch.export.load`, which runs without this repository
"""

import io
from pathlib import Path

import numpy as np
import torch

import checkpoints
import data
import formats


def export_official(checkpoint, out):
    """Writes a checkpoint file under the paper's official names, one file."""
    content = checkpoints.load_checkpoint(checkpoint)
    checkpoints.save(formats.export_official(content["model"], content["state"]), Path(out))


def export_transformers(checkpoint, out):
    """Writes a checkpoint file as a folder that transformers' from_pretrained loads."""
    checkpoints.export_hugging_face(checkpoints.load_checkpoint(checkpoint), Path(out))


class Program(torch.nn.Module):
    """What --to program exports: a function of six tensors, those of a data.Batch under the same names.

    Returns the last states of words (B, T, C) and regions (B, N, C) and the pooled vector (B, C); and the logits of the
    head that reads the pooled vector, for tasks that have one.
    """

    inputs = ("text", "text_mask", "segments", "features", "boxes", "region_mask")

    def __init__(self, model, head, task_number):
        super().__init__()
        self.model = model
        self.head = head
        self.task_number = task_number

    def forward(self, *tensors):
        batch = data.Batch(*tensors)
        batch.task = torch.full_like(batch.text[:, 0], self.task_number)
        encoding = self.model.encode(batch)
        outputs = {"text": encoding.text, "regions": encoding.regions, "pooled": encoding.pooled}
        if self.head:
            outputs["logits"] = self.model.heads[self.head](encoding.pooled)
        return outputs


def export_program(run, task, dataset, out):
    """Writes a model as a program of torch.export, which runs without this repository: torch.export.load(FILE).

    It takes any number of rows, words and regions. run: train.Run, on the CPU in float32.   dataset: an example of what
    the model reads.
    """
    head = task.ranks
    if task.truth == "answer":
        head = run.paper.OBJECTIVES[task.objective].head
    module = Program(run.model, head, run.args.tasks.index(task.name)).eval()
    batch = data.collate(dataset, np.arange(len(dataset)))
    tensors = tuple(getattr(batch, name) for name in Program.inputs)
    rows = torch.export.Dim("rows", min=1, max=65536)
    words = torch.export.Dim("words", min=2, max=run.model.config.max_positions)
    cells = torch.export.Dim("regions", min=1, max=65536)
    shapes = ({0: rows, 1: words},) * 3 + ({0: rows, 1: cells},) * 3
    with torch.no_grad():
        program = torch.export.export(module, tensors, dynamic_shapes={"tensors": shapes})
    content = io.BytesIO()  # a file's name would have to end in .pt2
    torch.export.save(program, content)
    data.write_whole(out, lambda file: file.write_bytes(content.getvalue()))


EXPORTS = {"official": export_official, "transformers": export_transformers}  # from a file to a file
