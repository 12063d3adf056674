"""Image features of augmented views, computed once, for methods whose image tower is frozen (``INPUT.CACHED_VIEWS``)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from promptmix.data.datum import Datum


class CachedViews(Dataset[dict[str, Any]]):
    """Training items whose ``img`` is the feature (D,) of one of K precomputed views; ``view`` says of which.

    Args:
        features: (K, n, D), K views of n items.
        items: the n items.
    """

    def __init__(self, features: Tensor, items: Sequence[Datum]) -> None:
        self.features, self.items = features, items
        self.view = 0

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = self.items[index]
        feature = self.features[self.view, index]
        return {"img": feature, "label": item.label, "domain": item.domain, "impath": item.impath, "index": index}


@torch.no_grad()
def cache_views(loader: DataLoader[Any], views: int, encode: Callable[[Tensor], Tensor]) -> DataLoader[Any]:
    """Return a loader like ``loader`` (same order, same batches) that gives features instead of pictures.

    Args:
        loader: the training loader; its data set augments pictures.
        views: K, how often each picture is augmented and encoded.
        encode: images (B, 3, S, S), on the CPU, to features (B, D).
    """
    source: Any = loader.dataset
    plain = DataLoader(source, batch_size=loader.batch_size, num_workers=loader.num_workers, worker_init_fn=loader.worker_init_fn)
    with torch.random.fork_rng():  # the epochs then draw the same batches as without a cache
        features = torch.stack([torch.cat([encode(batch["img"]).cpu() for batch in plain]) for _ in range(views)])
    # Features are in memory, so that worker processes would only cost.
    return DataLoader(
        CachedViews(features, source.data_source),
        batch_size=loader.batch_size,
        sampler=loader.sampler,
        drop_last=loader.drop_last,
    )
