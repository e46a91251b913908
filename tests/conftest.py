"""Tests import the files at the top of the repository. One thread: on tensors this small two only wait for each other,
fifty times longer where another process holds the second core."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
torch.set_num_threads(1)
