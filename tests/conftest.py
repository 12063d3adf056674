"""Tests run offline and on one thread: fast on a small machine, and the same numbers everywhere."""

import os
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"
# Features that tests keep go away with them, and none of the user's are read.
_CACHE = tempfile.TemporaryDirectory(prefix="promptmix-tests-")
os.environ["PROMPTMIX_CACHE_DIR"] = _CACHE.name
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402  (after the environment is set)

torch.set_num_threads(1)
