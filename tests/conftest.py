"""Tests run offline and on one thread: fast on a small machine, and the same numbers everywhere."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

torch.set_num_threads(1)
