"""``predictions.npz``: what a run's test said of each picture, written whole or not at all, and how to read it back.

Arrays by name, no pickles: see ``promptmix.engine.samples``. Paths are told from the data set's root on, or from the embedded
assets, so that runs of two machines compare.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from promptmix.assets import asset_path
from promptmix.errors import DataError
from promptmix.files.sums import file_digest
from promptmix.runs.results import RunResult

__all__ = ["FILE_NAME", "Samples", "keep", "of_run", "read"]

FILE_NAME = "predictions.npz"
_MOST_BYTES = 2**31  # unpacked; ImageNet's 50,000 test pictures take a hundredth
_REQUIRED = {"path": "U", "label": "i", "classname": "U", "top_class": "i", "top_probability": "f"}
_REQUIRED |= {"own_gap": "f", "temperature": "f", "log_norm": "f"}
_ROUTING = {"expert": "i", "expert_weight": "f", "router_logit": "f"}


@dataclass(frozen=True, eq=False)
class Samples:
    """A test, picture by picture: N pictures, C classes, k classes kept of each, T temperatures, E experts, K chosen ones.

    Attributes:
        path: (N,) names of the pictures, below the data set's root.
        label: (N,) true classes.
        classname: (C,) names by label.
        top_class: (N, k) classes, the most probable first.
        top_probability: (N, k) their probabilities.
        own_gap: (N,) score of the true class minus that of the best.
        temperature: (T,) by which scores are divided.
        log_norm: (N, T) log sum_c exp((z_c - z_best) / t).
        expert: (N, K) chosen experts; None without a router, as the next two.
        expert_weight: (N, K) their weights.
        router_logit: (N, E) scores of all experts.
    """

    path: np.ndarray
    label: np.ndarray
    classname: np.ndarray
    top_class: np.ndarray
    top_probability: np.ndarray
    own_gap: np.ndarray
    temperature: np.ndarray
    log_norm: np.ndarray
    expert: np.ndarray | None = None
    expert_weight: np.ndarray | None = None
    router_logit: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.label)

    @property
    def correct(self) -> np.ndarray:
        """Whether each picture's best class is its own (N,)."""
        return np.asarray(self.top_class[:, 0] == self.label)

    @property
    def confidence(self) -> np.ndarray:
        """Probability of the best class (N,)."""
        return self.top_probability[:, 0]

    def log_norm_at(self, temperature: float) -> np.ndarray:
        """Return ``log_norm`` (N,) at any temperature, between those kept by linear interpolation in its logarithm."""
        place = np.interp(np.log(temperature), np.log(self.temperature), np.arange(len(self.temperature)))
        low = min(int(place), len(self.temperature) - 2)
        share = place - low
        return np.asarray((1 - share) * self.log_norm[:, low] + share * self.log_norm[:, low + 1])

    def confusion(self) -> np.ndarray:
        """Return counts (C, C): true classes by predicted ones."""
        size = len(self.classname)
        flat = self.label.astype(np.int64) * size + self.top_class[:, 0]
        return np.bincount(flat, minlength=size * size).reshape(size, size)


def keep(trainer: Any, folder: Path, root: str) -> dict[str, str]:  # any trainer with Dassl's interface
    """Write what the trainer's latest test said of each picture; without any, remove what an earlier run left.

    Args:
        trainer: after its test.
        folder: output folder of the run.
        root: ``DATASET.ROOT``, below which paths are told.

    Returns:
        File name to the SHA-256 of its bytes; empty where nothing was kept.
    """
    from promptmix.utils import atomic_write

    path, arrays = folder / FILE_NAME, dict(getattr(trainer, "samples", {}))
    if not arrays:
        path.unlink(missing_ok=True)
        return {}
    arrays["path"] = np.array([_below(name, root) for name in arrays["path"].tolist()])
    atomic_write(path, lambda temporary: _write(temporary, arrays))
    return {FILE_NAME: file_digest(path)}


def _write(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    with path.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)


def _below(path: str, root: str) -> str:
    """Return a picture's path from the embedded assets or the data root on, with forward slashes; as it is elsewhere."""
    for place in (asset_path("README.md").parent, Path(os.path.expanduser(root)) if root else None):
        if place is None:
            continue
        inside = os.path.relpath(path, place) if os.path.isabs(path) == place.is_absolute() else os.pardir
        if not inside.startswith(os.pardir):
            return inside.replace(os.sep, "/")
    return path


def of_run(run: RunResult) -> Samples | None:
    """Return the predictions beside a run's ``results.json``; None where it kept none.

    Raises:
        DataError: the file is missing, damaged, or not the one that the run wrote.
    """
    return read(Path(run.source).parent / FILE_NAME, run.files[FILE_NAME]) if FILE_NAME in run.files else None


def read(path: Path, digest: str = "") -> Samples:
    """Read a file of predictions.

    Args:
        path: the file.
        digest: SHA-256 that its bytes must have; "" = any.

    Raises:
        DataError: it is missing, damaged, or another one.
    """
    remedy = "test that run again with --eval-only"
    try:
        if digest and file_digest(path) != digest:
            raise DataError(f"{path} is not the file that the run beside it wrote (another SHA-256); {remedy}")
        with zipfile.ZipFile(path) as pack:
            if sum(member.file_size for member in pack.infolist()) > _MOST_BYTES:
                raise ValueError(f"it unpacks to more than {_MOST_BYTES:,} bytes")
        with np.load(path, allow_pickle=False) as file:
            found = {name: file[name] for name in (*_REQUIRED, *_ROUTING) if name in file.files}
        _check(found)
    except DataError:
        raise
    except (OSError, ValueError, KeyError, TypeError, EOFError, MemoryError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} is not a file of predictions ({error}); {remedy}") from error
    return Samples(**found)


def _check(found: Mapping[str, np.ndarray]) -> None:
    """Refuse arrays that don't belong together.

    Raises:
        ValueError: they don't; the message names one.
    """
    for name, kind in _REQUIRED.items() | {(name, kind) for name, kind in _ROUTING.items() if "expert" in found}:
        if name not in found or getattr(found[name], "dtype", np.dtype("V")).kind != kind:  # bytes, of what is not an array
            raise ValueError(f"its array {name} is missing or of another type")
    count = found["label"].shape[:1]
    for name, array in found.items():
        flat = name in ("path", "label", "classname", "own_gap", "temperature")
        own = name in ("classname", "temperature")
        if array.ndim != (1 if flat else 2) or not own and array.shape[:1] != count or not array.size:
            raise ValueError(f"its array {name} has shape {array.shape}")
    for name, most in (("label", len(found["classname"])), ("top_class", len(found["classname"]))):
        if found[name].min() < 0 or found[name].max() >= most:
            raise ValueError(f"its array {name} has classes without a name")
    if found["log_norm"].shape[1] != len(found["temperature"]) or len(found["temperature"]) < 2:
        raise ValueError("its arrays log_norm and temperature don't fit")
    if not (found["temperature"][0] > 0 and (np.diff(found["temperature"]) > 0).all()):
        raise ValueError("its array temperature does not rise from above 0")
    for name in ("temperature", "top_probability", "own_gap", "log_norm"):
        if not np.isfinite(found[name]).all():
            raise ValueError(f"its array {name} holds what is not a number")
    if "expert" in found and not 0 <= found["expert"].min() <= found["expert"].max() < found["router_logit"].shape[1]:
        raise ValueError("its array expert names experts that do not exist")
