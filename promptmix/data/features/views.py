"""Image features in place of pictures, for methods whose image tower is frozen: test splits, and ``INPUT.CACHED_VIEWS``.

A *view* of the training pictures is what one epoch sees of them. Views are recorded by letting the training loader run for K
epochs ahead of training, from the random state that training starts with: the same order, the same augmentations, the same
batches. Afterwards epoch e replays view e, so that with as many views as epochs the inputs are bit for bit those of a run
without a cache (as long as the method itself draws no random numbers while it learns). From epoch K on, the views take turns,
in a new order each epoch: an approximation, unless the transform has no randomness. A picture that a sampler draws twice in an
epoch has one view in it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset
from yacs.config import CfgNode

from promptmix.clip.vision import are_pictures
from promptmix.data.datum import Datum
from promptmix.data.features.cache import FeatureCache, feature_key, same_randomness
from promptmix.data.features.reuse import awaited
from promptmix.data.features.rows import Encode, Kept, in_order, shared_features
from promptmix.data.reading.loaders import TrainLoader
from promptmix.data.reading.streams import get_streams, set_streams, streams_hash
from promptmix.errors import ConfigError
from promptmix.parallel import group
from promptmix.utils import get_logger

#: Transforms that do the same to a picture each time.
STEADY = frozenset({"center_crop", "normalize", "instance_norm"})


class CachedViews(Dataset[dict[str, Any]]):
    """Items whose ``img`` is the feature of one of K precomputed views; ``view`` says of which.

    Args:
        features: (K, n, ...), K views of n items; a feature has any shape but that of a picture: (D,), (M, D) ...
        items: the n items.

    Raises:
        ConfigError: a feature has the shape (3, height, width), so that nobody could tell it from a picture.
    """

    def __init__(self, features: Tensor, items: Sequence[Datum]) -> None:
        if are_pictures(features[0]):
            raise ConfigError(
                f"features of shape {tuple(features.shape[2:])} can't be told from pictures; join two of their axes"
            )
        self.features, self.items = features, items
        self.view = 0

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = self.items[index]
        feature = self.features[self.view, index]
        return {"img": feature, "label": item.label, "domain": item.domain, "impath": item.impath, "index": index}


class ReplayLoader(DataLoader[Any]):
    """A loader over views that replays the recorded epochs, and then goes on with its sampler.

    Args:
        views: the views.
        orders: (K, m), the items of each recorded epoch, batch after batch, -1 where an epoch is shorter; (0, 0) where only
            the sampler's order counts.
        after: random states at the end of each recorded epoch.
        loader: the loader that was recorded.
    """

    def __init__(self, views: CachedViews, orders: Tensor, after: Sequence[dict[str, Tensor]], loader: DataLoader[Any]) -> None:
        super().__init__(views, batch_size=loader.batch_size, sampler=loader.sampler, drop_last=loader.drop_last)
        self.views, self.orders, self.after = views, orders, after
        self.epoch = 0

    def turn_to(self, epoch: int) -> None:
        """Choose the view of ``epoch``, counted from the first recorded one."""
        self.epoch = epoch
        self.views.view = epoch % len(self.views.features)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        if self.epoch >= len(self.orders):
            yield from super().__iter__()
            return
        size = self.batch_size or 1
        order = self.orders[self.epoch]
        for indices in order[order >= 0].split(size):
            yield torch.utils.data.default_collate([self.views[int(index)] for index in indices])
        set_streams(self.after[self.epoch])


def is_steady(names: Sequence[str]) -> bool:
    """Tell whether the transforms ``names`` have no randomness, so that one view says all."""
    return set(names) <= STEADY


def cache_views(
    loader: DataLoader[Any],
    views: int,
    kept: Kept,
    cfg: CfgNode,
    cache: FeatureCache | None,
    tower: torch.nn.Module,
    draws_between: int = 0,
) -> ReplayLoader:
    """Return a loader like ``loader`` (same order, same batches) that gives features instead of pictures.

    Args:
        loader: the training loader; its data set augments pictures.
        views: K; one is enough where nothing is random.
        kept: what is kept.
        cfg: the whole config tree.
        cache: where features are kept beyond this run; None keeps them in memory only.
        tower: the frozen image tower.
        draws_between: loaders that start between two epochs (validation); each draws one number.
    """
    source: Any = loader.dataset
    steady = is_steady(cfg.INPUT.TRANSFORMS)
    shared = shared_features(loader, kept, cfg, cache, tower) if steady and cache else None
    if shared is not None:
        return ReplayLoader(
            CachedViews(kept.finish(shared)[None], source.data_source), torch.empty(0, 0, dtype=torch.int64), [], loader
        )
    views = 1 if steady else views
    more: dict[str, object] = {"split": "train", "batch": loader.batch_size, "device": _device(tower)}
    more |= {"kind": kept.kind} if kept.kind else {}
    if not steady:
        node = cfg.DATALOADER
        more |= {"views": views, "streams": streams_hash(get_streams()), "sampler": node.TRAIN_X.SAMPLER}
        own = isinstance(loader, TrainLoader) and loader.sample_streams
        more |= {"workers": "any" if own else loader.num_workers, "between": draws_between, "sizes": str(dict(node.TRAIN_X))}
    key = feature_key(cfg, tower, source.data_source, source.transform, **more) if cache else None

    def make() -> dict[str, Tensor]:
        get_logger().info("Encoding %d cached views of %d pictures", views, len(source))
        with same_randomness(), torch.no_grad():
            made = _steady(loader, kept.encode) if steady else _record(loader, views, kept.encode, draws_between)
        if isinstance(loader, TrainLoader):
            loader.close()  # the data manager keeps it, but nobody reads it again
        return made

    stored: Mapping[str, Tensor]
    if cache and key:
        shapes = {"features": (views, len(source)), "orders": (0 if steady else views,)}
        about = f"{cfg.DATASET.NAME}, {len(source)} training pictures, {views} view(s)"
        stored = cache.obtain(key, shapes, make, about, views * len(source))
    else:
        stored = make()
    names = sorted({name.partition(".")[2] for name in stored if name.startswith("after.")})
    after = [{name: stored[f"after.{name}"][k] for name in names} for k in range(len(stored["orders"]))]
    return ReplayLoader(CachedViews(kept.finish(stored["features"]), source.data_source), stored["orders"], after, loader)


def _steady(loader: DataLoader[Any], encode: Encode) -> dict[str, Tensor]:
    features = torch.cat([encode(batch["img"]).cpu() for batch in awaited(in_order(loader))])
    return {"features": features[None], "orders": torch.empty(0, 0, dtype=torch.int64)}


def _record(loader: DataLoader[Any], views: int, encode: Encode, draws_between: int) -> dict[str, Tensor]:
    """Run ``views`` epochs of ``loader``; what an epoch leaves out (a last, smaller batch) is encoded apart."""
    items = len(loader.dataset)  # type: ignore[arg-type]
    features: list[Tensor] = []
    orders, after = [], []
    for _ in range(views):
        parts, order = [], []
        for batch in awaited(loader):
            parts.append(encode(batch["img"]).cpu())
            order.append(batch["index"])
        orders.append(torch.cat(order))
        after.append(get_streams())
        seen = torch.cat(parts)
        view = seen.new_zeros(items, *seen.shape[1:])
        view[orders[-1]] = seen
        missing = sorted(set(range(items)) - set(orders[-1].tolist()))
        if missing:
            with same_randomness():
                rest = in_order(loader, torch.utils.data.Subset(loader.dataset, missing))
                view[missing] = torch.cat([encode(batch["img"]).cpu() for batch in awaited(rest)])
        features.append(view)
        for _ in range(draws_between):
            torch.empty((), dtype=torch.int64).random_()
    states = {f"after.{name}": torch.stack([state[name] for state in after]) for name in after[0]}
    return {"features": torch.stack(features), "orders": pad_sequence(orders, batch_first=True, padding_value=-1), **states}


def feature_loader(
    loader: DataLoader[Any],
    kept: Kept,
    cfg: CfgNode,
    cache: FeatureCache,
    tower: torch.nn.Module,
    split: str,
) -> DataLoader[Any] | None:
    """Return a loader like the evaluation loader ``loader`` that gives features, computed now or read from ``cache``.

    The features are those of the same batches on the same kind of device, so that scores are the same numbers.

    Returns:
        None where the order of the items is not theirs in the data set, or the transform can't be described.
    """
    source: Any = loader.dataset
    if not isinstance(loader.sampler, torch.utils.data.SequentialSampler) or not hasattr(source, "data_source"):
        return None
    features = shared_features(loader, kept, cfg, cache, tower)
    if features is None:
        more: dict[str, object] = {"split": "test", "batch": loader.batch_size, "device": _device(tower)}
        more |= {"kind": kept.kind} if kept.kind else {}
        key = feature_key(cfg, tower, source.data_source, source.transform, **more)
        if key is None:
            return None

        def make() -> dict[str, Tensor]:
            get_logger().info("Encoding %d pictures of the %s split, for all methods and seeds", len(source), split)
            with same_randomness(), torch.no_grad():
                return {"features": torch.cat([kept.encode(batch["img"]).cpu() for batch in awaited(loader)])}

        about = f"{cfg.DATASET.NAME}, {len(source)} pictures for evaluation"
        features = cache.obtain(key, {"features": (len(source),)}, make, about, len(source))["features"]
    return DataLoader(CachedViews(kept.finish(features)[None], source.data_source), batch_size=loader.batch_size)


def _device(tower: torch.nn.Module) -> str:
    """Say what computes: parts of a batch in several processes round otherwise than the whole does."""
    kind = next(tower.parameters()).device.type
    return kind if group.size() == 1 else f"{kind} in {group.size()} processes"
