"""Data loaders: the data set's splits as batches, as Dassl makes them."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from tabulate import tabulate
from torch.utils.data import DataLoader, Dataset, get_worker_info
from torchvision import transforms as T
from yacs.config import CfgNode

from promptmix.data.base import DatasetBase, build_dataset, reading_of
from promptmix.data.datum import Datum
from promptmix.data.features.pictures import kept_pictures
from promptmix.data.reading.fast import FastTransform
from promptmix.data.reading.images import read_image
from promptmix.data.reading.loaders import ReadyLoader, TrainLoader, end_quietly, read_part
from promptmix.data.reading.samplers import build_sampler
from promptmix.data.reading.transforms import INTERPOLATION_MODES, InstanceNormalization, build_transform
from promptmix.errors import ConfigError, DataError
from promptmix.parallel import group
from promptmix.utils import get_logger

__all__ = ["DataManager", "DatasetWrapper", "build_data_loader"]

Transform = Callable[[Any], Any]
Transforms = Transform | Sequence[Transform] | None
Wrapper = Callable[..., "Dataset[dict[str, Any]]"]


class DatasetWrapper(Dataset[dict[str, Any]]):
    """Items as dictionaries: ``img`` (3, H, W), ``label``, ``domain``, ``impath``, ``index``.

    Args:
        cfg: the whole config tree.
        data_source: the items.
        transform: picture -> tensor. Of several, the second makes ``img2`` and so on; None leaves the picture as it is.
        is_train: ``DATALOADER.K_TRANSFORMS`` counts in training only; ``img`` is then a list of that many tensors.

    Raises:
        ConfigError: several copies are asked for without a transform.
    """

    def __init__(self, cfg: CfgNode, data_source: Sequence[Datum], transform: Transforms = None, is_train: bool = False) -> None:
        self.cfg = cfg
        self.data_source = data_source
        self.transform = transform
        self.is_train = is_train
        self.k_tfm: int = cfg.DATALOADER.K_TRANSFORMS if is_train else 1
        self.return_img0: bool = cfg.DATALOADER.RETURN_IMG0
        self.reading = reading_of(cfg)
        self.kept = kept_pictures(cfg, data_source, transform) if is_train else None
        if self.k_tfm > 1 and transform is None:
            raise ConfigError(f"DATALOADER.K_TRANSFORMS is {self.k_tfm}, but there is no transform to repeat")
        # For img0, the picture without augmentation.
        plain: list[Transform] = [
            T.Resize(list(cfg.INPUT.SIZE), interpolation=INTERPOLATION_MODES[cfg.INPUT.INTERPOLATION]),
            T.ToTensor(),
        ]
        if "normalize" in cfg.INPUT.TRANSFORMS:
            plain.append(T.Normalize(mean=cfg.INPUT.PIXEL_MEAN, std=cfg.INPUT.PIXEL_STD))
        self.to_tensor = T.Compose(plain)

    def __len__(self) -> int:
        return len(self.data_source)

    def make_ready(self) -> None:
        """Do what is done once for all workers, before they start: decode the pictures (``INPUT.PICTURE_CACHE``)."""
        if self.kept:
            self.kept.open()

    def __getitem__(self, idx: int) -> dict[str, Any]:
        item = self.data_source[idx]
        img0, todo = self._read(item.impath)
        output: dict[str, Any] = {"label": item.label, "domain": item.domain, "impath": item.impath, "index": idx}
        if todo is None:
            output["img"] = img0
        else:
            several = todo if isinstance(todo, list | tuple) else [todo]
            for number, transform in enumerate(several, start=1):
                output["img" if number == 1 else f"img{number}"] = self._transform_image(transform, img0)
        if self.return_img0:
            output["img0"] = self.to_tensor(img0)
        return output

    def blank(self, idx: int, like: dict[str, Any]) -> dict[str, Any]:
        """Return an item without its picture, which another process reads; pictures are zeros in the shapes of ``like``."""
        item = self.data_source[idx]
        zeros = {
            name: [torch.zeros_like(one) for one in value] if isinstance(value, list) else torch.zeros_like(value)
            for name, value in like.items()
            if name.startswith("img")
        }
        return {"label": item.label, "domain": item.domain, "impath": item.impath, "index": idx, **zeros}

    def _read(self, path: str) -> tuple[Any, Transforms]:
        """Return a picture and what is still to be done to it."""
        if isinstance(self.transform, FastTransform) and not self.return_img0:  # img0 is made as ever
            pixels = self.kept.pixels(path) if self.kept else None
            fast = self.transform.read(path, self.reading) if pixels is None else torch.from_numpy(pixels).permute(2, 0, 1)
            return fast, self.transform
        kept = self.kept.picture(path) if self.kept else None
        if self.kept and kept is not None:
            return kept, self.kept.rest
        return read_image(path, self.reading), self.transform

    def _transform_image(self, tfm: Transform, img0: Any) -> Any:
        """Return one transformed copy, or a list of ``K_TRANSFORMS``."""
        if self.k_tfm == 1:
            return tfm(img0)
        return [tfm(img0) for _ in range(self.k_tfm)]


class DividedWrapper(DatasetWrapper):
    """The items of an evaluation, whose transform draws no random numbers: of a batch this process's part is read."""

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        """Return a batch."""
        return read_part(self, indices)


def _seed_worker(worker_id: int) -> None:
    """Seed python and numpy in a worker from torch's seed, which differs for each worker and epoch."""
    if get_worker_info() is not None:
        end_quietly()
    seed = torch.initial_seed() % 2**32
    random.seed(seed)
    np.random.seed(seed)


def _draws_nothing(transform: Transforms) -> bool:
    """Tell whether a transform is known to draw no random numbers."""
    known = (T.Resize, T.CenterCrop, T.ToTensor, T.Normalize, InstanceNormalization)
    return isinstance(transform, T.Compose) and all(type(step) in known for step in transform.transforms)


def build_data_loader(
    cfg: CfgNode,
    sampler_type: str = "SequentialSampler",
    data_source: Sequence[Datum] | None = None,
    batch_size: int = 64,
    n_domain: int = 0,
    n_ins: int = 2,
    tfm: Transforms = None,
    is_train: bool = True,
    dataset_wrapper: Wrapper | None = None,
) -> DataLoader[Any]:
    """Build the loader of one split.

    Args:
        cfg: the whole config tree.
        sampler_type: order of the items, see ``promptmix.data.reading.samplers``.
        data_source: the items.
        batch_size: items per batch.
        n_domain: domains per batch (domain samplers).
        n_ins: items per class (class sampler).
        tfm: picture -> tensor.
        is_train: a last, smaller batch is left out, unless it is the only one.
        dataset_wrapper: makes the torch data set, called as ``DatasetWrapper`` is.

    Raises:
        DataError: there are no items.
        ConfigError: an unknown sampler or sizes that don't go together.
    """
    if not data_source:
        raise DataError(f"a split of data set {cfg.DATASET.NAME} is empty; check its folder and the DATASET settings")
    sampler = build_sampler(sampler_type, cfg=cfg, data_source=data_source, batch_size=batch_size, n_domain=n_domain, n_ins=n_ins)
    divided = group.size() > 1 and not is_train and _draws_nothing(tfm)
    wrapper = dataset_wrapper or (DividedWrapper if divided else DatasetWrapper)
    dataset = wrapper(cfg, data_source, transform=tfm, is_train=is_train)
    workers: int = cfg.DATALOADER.NUM_WORKERS
    # Evaluation loaders run once, and nothing in them is random.
    stays = is_train and workers > 0 and cfg.DATALOADER.PERSISTENT_WORKERS
    options: dict[str, Any] = {
        "batch_size": batch_size,
        "sampler": sampler,
        "num_workers": workers,
        "drop_last": is_train and len(data_source) >= batch_size,
        "pin_memory": torch.cuda.is_available() and cfg.USE_CUDA and cfg.DEVICE != "cpu",
        "worker_init_fn": _seed_worker,
        "persistent_workers": stays,
    }
    streams = cfg.DATALOADER.SAMPLE_STREAMS
    loader: DataLoader[Any]
    if is_train and (streams or stays):
        loader = TrainLoader(dataset, sample_streams=streams, **options)
    else:
        loader = (ReadyLoader if getattr(dataset, "kept", None) else DataLoader)(dataset, **options)
    if not len(loader):
        raise DataError(f"{sampler_type}: no whole batch of {batch_size} in {len(data_source)} items; lower BATCH_SIZE")
    return loader


class DataManager:
    """The data set of a config with a loader for each split.

    Args:
        cfg: the whole config tree.
        custom_tfm_train: use this transform for training instead of the config's.
        custom_tfm_test: use this transform for evaluation.
        dataset_wrapper: makes the torch data set of a split, called as ``DatasetWrapper`` is; this is where a cache of
            pictures or features comes in.
    """

    def __init__(
        self,
        cfg: CfgNode,
        custom_tfm_train: Transforms = None,
        custom_tfm_test: Transforms = None,
        dataset_wrapper: Wrapper | None = None,
    ) -> None:
        dataset = build_dataset(cfg)
        tfm_train = self._transform(cfg, custom_tfm_train, is_train=True)
        tfm_test = self._transform(cfg, custom_tfm_test, is_train=False)

        def train_loader(items: list[Datum], node: CfgNode) -> DataLoader[Any]:
            return build_data_loader(
                cfg,
                sampler_type=node.SAMPLER,
                data_source=items,
                batch_size=node.BATCH_SIZE,
                n_domain=node.N_DOMAIN,
                n_ins=node.N_INS,
                tfm=tfm_train,
                is_train=True,
                dataset_wrapper=dataset_wrapper,
            )

        def test_loader(items: list[Datum] | None) -> DataLoader[Any]:
            return build_data_loader(
                cfg,
                sampler_type=cfg.DATALOADER.TEST.SAMPLER,
                data_source=items,
                batch_size=cfg.DATALOADER.TEST.BATCH_SIZE,
                tfm=tfm_test,
                is_train=False,
                dataset_wrapper=dataset_wrapper,
            )

        node_x, node_u = cfg.DATALOADER.TRAIN_X, cfg.DATALOADER.TRAIN_U
        # In this order: samplers may draw random numbers when they are made.
        self.train_loader_x = train_loader(dataset.train_x, node_x)
        node_u = node_x if node_u.SAME_AS_X else node_u
        self.train_loader_u = train_loader(dataset.train_u, node_u) if dataset.train_u else None
        self.val_loader = test_loader(dataset.val) if dataset.val else None
        self.test_loader = test_loader(dataset.test)
        self.dataset: DatasetBase = dataset
        self._num_classes = dataset.num_classes
        self._num_source_domains = len(cfg.DATASET.SOURCE_DOMAINS)
        self._lab2cname = dataset.lab2cname
        if cfg.VERBOSE:
            self.show_dataset_summary(cfg)

    @staticmethod
    def _transform(cfg: CfgNode, custom: Transforms, is_train: bool) -> Transforms:
        if custom is None:
            return build_transform(cfg, is_train=is_train)
        get_logger().info("* Using custom transform for %s", "training" if is_train else "testing")
        return custom

    @property
    def num_classes(self) -> int:
        """Return the number of classes."""
        return self._num_classes

    @property
    def num_source_domains(self) -> int:
        """Return the number of source domains in the config."""
        return self._num_source_domains

    @property
    def lab2cname(self) -> dict[int, str]:
        """Return label -> class name."""
        return self._lab2cname

    def show_dataset_summary(self, cfg: CfgNode) -> None:
        """Print the data set's name, domains and sizes as a table."""
        rows: list[list[Any]] = [["Dataset", cfg.DATASET.NAME]]
        if cfg.DATASET.SOURCE_DOMAINS:
            rows.append(["Source", cfg.DATASET.SOURCE_DOMAINS])
        if cfg.DATASET.TARGET_DOMAINS:
            rows.append(["Target", cfg.DATASET.TARGET_DOMAINS])
        rows.append(["# classes", f"{self.num_classes:,}"])
        for name in ("train_x", "train_u", "val", "test"):
            items = getattr(self.dataset, name)
            if items:
                rows.append([f"# {name}", f"{len(items):,}"])
        get_logger().info(tabulate(rows))
