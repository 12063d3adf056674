"""Features by picture: a picture is read and encoded once, and every split, number of shots and seed that has it takes its row.

A row's bits may depend on how many pictures are encoded at once, but not on which, nor on its place among them. So rows are kept
for one batch size, and only for whole batches; the smaller last batch of a split is kept as it is. That places don't matter is
tried on the first batch of each backbone and machine; where they do, a split is kept as a whole (``views.feature_loader``).
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from yacs.config import CfgNode

from promptmix.data.datum import Datum
from promptmix.data.features.cache import FeatureCache, feature_key, picture_stamps, same_randomness
from promptmix.data.features.reuse import awaited, tell
from promptmix.data.reading.loaders import TrainLoader
from promptmix.files.text import counted
from promptmix.parallel import group
from promptmix.utils import get_logger

__all__ = ["Encode", "Kept", "in_order", "shared_features"]

Encode = Callable[[Tensor], Tensor]
#: Name of a picture -> its file's tensor, its row there, and the seconds that it took (-1: just now).
Known = dict[bytes, tuple[Tensor, int, float]]

#: Seconds of encoding after which rows are written, so that a process that is killed loses no more.
_LOST_AT_MOST = 60.0


@dataclass(frozen=True)
class Kept:
    """What is kept of pictures, and what is taken of it.

    Attributes:
        encode: images (B, 3, S, S), on the CPU, to features (B, ...) of any shape, which are kept.
        kind: of the features; each kind is kept apart.
        finish: kept features (..., D) to what the method reads of them, row by row.
    """

    encode: Encode
    kind: str = ""
    finish: Encode = lambda features: features


def shared_features(
    loader: DataLoader[Any], kept: Kept, cfg: CfgNode, cache: FeatureCache, tower: torch.nn.Module
) -> Tensor | None:
    """Return the features (n, ...) of a loader's pictures in the data set's order, encoded now or taken from ``cache``.

    They are those of a pass over the loader in that order, bit for bit, before ``kept.finish``.

    Args:
        loader: its data set's pictures have no randomness.
        kept: what is kept.
        cfg: the whole config tree.
        cache: where rows are kept.
        tower: the frozen image tower.

    Returns:
        None where the transform can't be described, where a picture's features depend on its place in the batch, and where
        several processes divide the batches of one training.
    """
    if group.size() > 1:
        return None
    source: Any = loader.dataset
    items, size = list(source.data_source), loader.batch_size or 1
    device = next(tower.parameters()).device.type
    whole = len(items) // size * size
    data = [cfg.DATASET.NAME, os.path.abspath(cfg.DATASET.ROOT), str(cfg.DATASET.get(cfg.DATASET.NAME.upper(), ""))]
    # Rows of other data sets would have to be looked through for nothing.
    key = feature_key(cfg, tower, (), source.transform, rows=size, device=device, kind=kept.kind, data=data)
    rest = feature_key(cfg, tower, items[whole:], source.transform, batch=len(items) - whole, device=device, kind=kept.kind)
    if key is None or rest is None or not items:
        return None
    encoder = _Encoder(loader, kept.encode, cache, f"{cfg.DATASET.NAME}, {{}} pictures by {size}")
    with same_randomness(), torch.no_grad():
        rows = encoder.rows(key, items[:whole]) if whole else None
        if whole and rows is None:
            return None
        parts = [] if rows is None else [rows]
        parts += [encoder.rest(rest, range(whole, len(items)))] if whole < len(items) else []
    return torch.cat(parts)


@dataclass
class _Encoder:
    loader: DataLoader[Any]
    encode: Encode
    cache: FeatureCache
    about: str

    def rows(self, key: str, items: Sequence[Datum]) -> Tensor | None:
        """Return the rows of whole batches."""
        names = [hashlib.sha256(stamp).digest()[:16] for stamp in picture_stamps(items)]
        known = self._known(key)
        if not set(names) <= known.keys():
            with self.cache.claim(key):
                known = self._known(key)
                first = {name: place for place, name in reversed(list(enumerate(names)))}
                missing = sorted(first[name] for name in first.keys() - known.keys())
                if missing and not self._add(key, missing, names, known):
                    return None
        made = {name for name, (_, _, seconds) in known.items() if seconds < 0}
        taken = [known[name][2] for name in set(names) - made]
        tell(taken=len(taken), saved=sum(taken))
        return torch.stack([known[name][0][known[name][1]] for name in names])

    def _known(self, key: str) -> Known:
        """Return the file's tensor, the row and the seconds of each picture that is there."""
        found: Known = {}
        for path in sorted(self.cache.folder.glob(f"{key}-*.safetensors")):
            stored = self.cache.get(path.stem, {"features": (), "pictures": (), "seconds": ()})
            if stored is not None:
                seconds = float(stored["seconds"])
                found |= {bytes(row): (stored["features"], i, seconds) for i, row in enumerate(stored["pictures"].numpy())}
        return found

    def _add(self, key: str, missing: list[int], names: Sequence[bytes], known: Known) -> bool:
        """Encode what is missing in whole batches; tell whether rows may be kept at all."""
        size, left = self.loader.batch_size or 1, missing
        filled = missing + missing[:1] * (-len(missing) % size)
        parts: list[Tensor] = []
        tried, start = bool(known), time.monotonic()
        for batch in awaited(in_order(self.loader, Subset(self.loader.dataset, filled))):
            parts.append(self.encode(batch["img"]).cpu())
            if not tried and not torch.equal(self.encode(batch["img"].flip(0)).cpu().flip(0), parts[0]):
                return False
            tried = True
            if len(parts) * size >= len(left) or time.monotonic() - start > _LOST_AT_MOST:
                left = self._keep(key, left, torch.cat(parts), start, names, known)
                parts, start = [], time.monotonic()
        get_logger().info("Encoded %s, for all methods, shots and seeds", counted(len(missing), "picture"))
        return True

    def _keep(
        self, key: str, places: list[int], features: Tensor, start: float, names: Sequence[bytes], known: Known
    ) -> list[int]:
        """Write the features of the first of ``places``, encoded since ``start``, and return the places that are left."""
        now = places[: len(features)]
        each = (time.monotonic() - start) / len(now)
        tell(encoded=len(now), seconds=each * len(now))
        pictures = b"".join(names[place] for place in now)
        shard = f"{key}-{hashlib.sha256(pictures).hexdigest()[:16]}"
        table = torch.frombuffer(bytearray(pictures), dtype=torch.uint8).view(-1, 16)
        stored = {"features": features[: len(now)], "pictures": table, "seconds": torch.tensor(each, dtype=torch.float64)}
        self.cache.put(shard, stored, self.about.format(len(now)))
        known |= {names[place]: (features, row, -1.0) for row, place in enumerate(now)}
        return places[len(now) :]

    def rest(self, key: str, places: range) -> Tensor:
        """Return the features of the last batch, which is smaller than the others."""

        def make() -> dict[str, Tensor]:
            batches = awaited(in_order(self.loader, Subset(self.loader.dataset, list(places))))
            return {"features": torch.cat([self.encode(batch["img"]).cpu() for batch in batches])}

        n = len(places)
        return self.cache.obtain(key, {"features": (n,)}, make, self.about.format(n), n)["features"]


def in_order(loader: DataLoader[Any], dataset: Any = None) -> DataLoader[Any]:
    """Return a loader over ``dataset`` (default: that of ``loader``) from first to last, with nothing left out."""
    return TrainLoader(
        loader.dataset if dataset is None else dataset,
        batch_size=loader.batch_size,
        num_workers=loader.num_workers,
        worker_init_fn=loader.worker_init_fn,
        sample_streams=getattr(loader, "sample_streams", False),
    )
