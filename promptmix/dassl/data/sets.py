"""``dassl.data.datasets.da``, ``.dg`` and ``.ssl``: Dassl's own data sets, read from the folders that Dassl describes.

Dassl takes the files of a folder as the disk lists them; here they are sorted, so that few-shot picks follow from the seed alone.
"""

from __future__ import annotations

import math
import os
import random
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

from yacs.config import CfgNode

from promptmix.dassl.data.datum import Datum
from promptmix.dassl.importing import lacking
from promptmix.data import datum
from promptmix.data.base import DATASET_REGISTRY as DATASET_REGISTRY
from promptmix.data.base import DatasetBase
from promptmix.errors import ConfigError, DataError
from promptmix.utils import listdir_nohidden

__all__ = [
    "AVAI_C_TYPES",
    "SETS",
    "CIFAR10",
    "CIFAR100",
    "CIFAR10C",
    "CIFAR100C",
    "CIFARSTL",
    "Digit5",
    "DigitSingle",
    "DigitsDG",
    "DomainNet",
    "Office31",
    "OfficeHome",
    "OfficeHomeDG",
    "PACS",
    "STL10",
    "SVHN",
    "VLCS",
    "VisDA17",
    "miniDomainNet",
    "read_image_list",
]

Items = list[datum.Datum]

_DRIVE = "https://drive.google.com/uc?id="
_BLURS = "defocus_blur gaussian_blur glass_blur motion_blur zoom_blur"
_NOISES = "gaussian_noise impulse_noise shot_noise speckle_noise"
_OTHERS = "brightness contrast elastic_transform fog frost jpeg_compression pixelate saturate snow spatter"
#: Corruptions of CIFAR-C (Hendrycks and Dietterich, 2019).
AVAI_C_TYPES = sorted(f"{_BLURS} {_NOISES} {_OTHERS}".split())


def _listed(directory: str) -> list[str]:
    try:
        return sorted(listdir_nohidden(directory))
    except OSError as error:
        raise DataError(f"no folder {directory}; set --root (DATASET.ROOT) to the folder above the data set's") from error


def _lines(file: str) -> Iterator[tuple[str, int]]:
    """Yield path and label of each line of a list of pictures."""
    try:
        with open(file, encoding="utf-8") as lines:
            for line in lines:
                path, _, label = line.strip().rpartition(" ")
                if path:
                    yield path, int(label)
    except (OSError, ValueError) as error:
        raise DataError(f"can't read the list of pictures {file} ({error}); get it from the data set's page") from error


def _in_folders(directory: str, domain: int = 0) -> Items:
    """Return the pictures of a folder with a folder for each class."""
    return [
        Datum(os.path.join(directory, name, file), label, domain, name)
        for label, name in enumerate(_listed(directory))
        for file in _listed(os.path.join(directory, name))
    ]


def _lower(items: Items) -> Items:
    return [Datum(item.impath, item.label, item.domain, item.classname.lower()) for item in items]


class _Domains(DatasetBase):
    """Trains on ``DATASET.SOURCE_DOMAINS`` and is tested on ``DATASET.TARGET_DOMAINS``."""

    #: Where Dassl downloads it from, if it does.
    data_url: ClassVar[str] = ""
    #: Split of the domains that each part is; those of ``train_u`` and ``test`` are the target's.
    parts: ClassVar[dict[str, Any]] = {"train_x": "train", "train_u": "train", "test": "test"}

    def __init__(self, cfg: CfgNode) -> None:
        root = os.path.abspath(os.path.expanduser(cfg.DATASET.ROOT))
        name, self.dataset_dir = self.dataset_dir.lower(), os.path.join(root, self.dataset_dir)
        self.image_dir, self.split_dir = os.path.join(self.dataset_dir, "images"), os.path.join(self.dataset_dir, "splits")
        if self.data_url and not os.path.isdir(self.dataset_dir):
            self.download_data(self.data_url, os.path.join(root, f"{name}.zip"), from_gdrive=True)
        source, target = cfg.DATASET.SOURCE_DOMAINS, cfg.DATASET.TARGET_DOMAINS
        self.check_input_domains(source, target)
        super().__init__(
            **{
                part: self._read_data(target if part in ("train_u", "test") else source, split)
                for part, split in self.parts.items()
            }
        )

    def _read_data(self, input_domains: Sequence[str], split: str = "train") -> Items:
        raise NotImplementedError


class _Generalisation(_Domains):
    parts = {"train_x": "train", "val": "val", "test": "all"}


class DigitsDG(_Generalisation):
    """Four sets of digits; ``<domain>/<train|val>/<class>/``."""

    dataset_dir = "digits_dg"
    domains = ["mnist", "mnist_m", "svhn", "syn"]
    data_url = f"{_DRIVE}15V7EsHfCcfbKgsDmzQKj_DfXt_XYp_P7"

    def _read_data(self, input_domains: Sequence[str], split: str = "train") -> Items:
        return self.read_data(self.dataset_dir, input_domains, split)

    @staticmethod
    def read_data(dataset_dir: str, input_domains: Sequence[str], split: str) -> Items:
        """Return the pictures of ``train``, ``val`` or ``all`` of some domains."""
        items = [
            item
            for domain, name in enumerate(input_domains)
            for part in (("train", "val") if split == "all" else (split,))
            for item in _in_folders(os.path.join(dataset_dir, name, part), domain)
        ]
        return _lower([item for item in items if item.impath.endswith(".jpg")])


class OfficeHomeDG(DigitsDG):
    """Office-Home in the split for domain generalisation."""

    dataset_dir = "office_home_dg"
    domains = ["art", "clipart", "product", "real_world"]
    data_url = f"{_DRIVE}1gkbf_KaxoBws-GWT3XIPZ7BnkqbAxIFa"


class PACS(_Generalisation):
    """Photos, art, cartoons and sketches of 7 classes; ``images/`` and ``splits/<domain>_<split>_kfold.txt``."""

    dataset_dir = "pacs"
    domains = ["art_painting", "cartoon", "photo", "sketch"]
    data_url = f"{_DRIVE}1m4X4fROCCXMO0lRLrr6Zz9Vb3974NWhE"
    parts = {"train_x": "train", "val": "crossval", "test": "all"}
    _error_paths = ("sketch/dog/n02103406_4068-1.png",)

    def _read_data(self, input_domains: Sequence[str], split: str = "train") -> Items:
        return [
            Datum(path, label, domain, path.split("/")[-2])
            for domain, name in enumerate(input_domains)
            for part in (("train", "crossval") if split == "all" else (split,))
            for path, label in self._read_split_pacs(os.path.join(self.split_dir, f"{name}_{part}_kfold.txt"))
        ]

    def _read_split_pacs(self, split_file: str) -> list[tuple[str, int]]:
        lines = _lines(split_file)
        return [(os.path.join(self.image_dir, path), label - 1) for path, label in lines if path not in self._error_paths]


class VLCS(_Generalisation):
    """Caltech, LabelMe, Pascal and SUN, 5 classes; ``<DOMAIN>/<split>/<class>/``."""

    dataset_dir = "VLCS"
    domains = ["caltech", "labelme", "pascal", "sun"]
    data_url = f"{_DRIVE}1r0WL5DDqKfSPp9E3tRENwHaXNs1olLZd"
    parts = {"train_x": "train", "val": "crossval", "test": "test"}

    def _read_data(self, input_domains: Sequence[str], split: str = "train") -> Items:
        items = [
            item
            for domain, name in enumerate(input_domains)
            for item in _in_folders(os.path.join(self.dataset_dir, name.upper(), split), domain)
        ]
        return [item for item in items if item.impath.endswith(".jpg")]


class Office31(_Domains):
    """Amazon, webcam and DSLR pictures of 31 classes; ``<domain>/<class>/``."""

    dataset_dir = "office31"
    domains = ["amazon", "webcam", "dslr"]

    def _read_data(self, input_domains: Sequence[str], split: str = "") -> Items:
        folders = (os.path.join(self.dataset_dir, name) for name in input_domains)
        return [item for domain, folder in enumerate(folders) for item in _in_folders(folder, domain)]


class OfficeHome(Office31):
    """Art, clipart, products and photos of 65 classes; ``<domain>/<class>/``."""

    dataset_dir = "office_home"
    domains = ["art", "clipart", "product", "real_world"]

    def _read_data(self, input_domains: Sequence[str], split: str = "") -> Items:
        return _lower(super()._read_data(input_domains))


class DomainNet(_Domains):
    """Six domains of 345 classes; ``splits/<domain>_<split>.txt``."""

    dataset_dir = "domainnet"
    domains = ["clipart", "infograph", "painting", "quickdraw", "real", "sketch"]
    parts = {"train_x": "train", "train_u": "train", "val": "test", "test": "test"}
    _splits: ClassVar[str] = "splits"

    def _read_data(self, input_domains: Sequence[str], split: str = "train") -> Items:
        self.split_dir = os.path.join(self.dataset_dir, self._splits)
        return [
            Datum(os.path.join(self.dataset_dir, path), label, domain, path.split("/")[1])
            for domain, name in enumerate(input_domains)
            for path, label in _lines(os.path.join(self.split_dir, f"{name}_{split}.txt"))
        ]


class miniDomainNet(DomainNet):
    """Four domains and 126 classes of DomainNet; ``splits_mini/``."""

    domains = ["clipart", "painting", "real", "sketch"]
    parts = _Domains.parts
    _splits = "splits_mini"


class VisDA17(_Domains):
    """From synthetic (``train/``) to real pictures (``validation/``), 12 classes; ``image_list.txt`` in each."""

    dataset_dir = "visda17"
    domains = ["synthetic", "real"]
    parts = {"train_x": "synthetic", "train_u": "real", "test": "real"}

    def _read_data(self, input_domains: Sequence[str] | str, split: str = "") -> Items:
        name = split or input_domains
        folder = os.path.join(self.dataset_dir, "train" if name == "synthetic" else "validation")
        lines = _lines(os.path.join(folder, "image_list.txt"))
        return [Datum(os.path.join(folder, path), label, 0, path.split("/")[0]) for path, label in lines]


class CIFARSTL(_Domains):
    """CIFAR-10 and STL-10; ``<domain>/<split>/<label>_<class>/``."""

    dataset_dir = "cifar_stl"
    domains = ["cifar", "stl"]

    def _read_data(self, input_domains: Sequence[str], split: str = "train") -> Items:
        folders = (os.path.join(self.dataset_dir, name, split) for name in input_domains)
        items = [item for domain, folder in enumerate(folders) for item in _in_folders(folder, domain)]
        names = [item.classname.partition("_") for item in items]
        return [Datum(item.impath, int(label), item.domain, name) for item, (label, _, name) in zip(items, names, strict=True)]


def read_image_list(im_dir: str, n_max: int | None = None, n_repeat: int | None = None) -> list[tuple[str, int]]:
    """Return path and label of pictures whose names end in ``_<label>``.

    Args:
        im_dir: their folder.
        n_max: so many at random.
        n_repeat: take each so often.
    """
    items = [(os.path.join(im_dir, file), int(os.path.splitext(file)[0].split("_")[1])) for file in _listed(im_dir)]
    if n_max is not None:
        items = random.sample(items, n_max)
    return items * (n_repeat or 1)


class Digit5(_Domains):
    """Five sets of digits; ``<domain>/<train|test>_images/``; 25,000 and 9,000 at random of all but USPS."""

    dataset_dir = "digit5"
    domains = ["mnist", "mnist_m", "svhn", "syn", "usps"]

    def _read_data(self, input_domains: Sequence[str], split: str = "train") -> Items:
        return [
            Datum(path, label, domain, str(label))
            for domain, name in enumerate(input_domains)
            for path, label in self._of_domain(name, os.path.join(self.dataset_dir, name, f"{split}_images"), split)
        ]

    def _of_domain(self, name: str, folder: str, split: str) -> list[tuple[str, int]]:
        if name == "usps":
            return read_image_list(folder, n_repeat=3 if split == "train" else None)
        return read_image_list(folder, n_max=25000 if split == "train" else 9000)


class DigitSingle(Digit5):
    """Train on the first 10,000 digits of one domain, test on others (Volpi et al., 2018)."""

    parts = {"train_x": "train", "val": "test", "test": "test"}

    def _of_domain(self, name: str, folder: str, split: str) -> list[tuple[str, int]]:
        return read_image_list(folder)[: 10000 if split == "train" and name != "usps" else None]


class CIFAR10C(DatasetBase):
    """Train on CIFAR-10, test on corrupted pictures of it; ``cifar10_c/<corruption>/<level>/<class>/``."""

    domains = ["cifar10", "cifar10_c"]

    def __init__(self, cfg: CfgNode) -> None:
        self.dataset_dir = os.path.abspath(os.path.expanduser(cfg.DATASET.ROOT))
        kind, level = cfg.DATASET.CIFAR_C_TYPE, str(cfg.DATASET.CIFAR_C_LEVEL)
        if kind not in AVAI_C_TYPES:
            raise ConfigError(f"DATASET.CIFAR_C_TYPE is {kind!r}, but must be one of: {', '.join(AVAI_C_TYPES)}")
        train, test = (os.path.join(self.dataset_dir, name) for name in self.domains)
        super().__init__(train_x=_in_folders(os.path.join(train, "train")), test=_in_folders(os.path.join(test, kind, level)))


class CIFAR100C(CIFAR10C):
    """The same for CIFAR-100."""

    domains = ["cifar100", "cifar100_c"]


class CIFAR10(DatasetBase):
    """CIFAR-10 with ``DATASET.NUM_LABELED`` labels, ``DATASET.VAL_PERCENT`` of its training part for validation."""

    dataset_dir = "cifar10"

    def __init__(self, cfg: CfgNode) -> None:
        self.dataset_dir = os.path.join(os.path.abspath(os.path.expanduser(cfg.DATASET.ROOT)), self.dataset_dir)
        node = cfg.DATASET
        if node.NUM_LABELED < 1:
            raise ConfigError(f"DATASET.NUM_LABELED is {node.NUM_LABELED}, but must be 1 or more: labelled pictures in total")
        folder = os.path.join(self.dataset_dir, "train")
        train_x, train_u, val = self._read_data_train(folder, node.NUM_LABELED, node.VAL_PERCENT)
        test = _in_folders(os.path.join(self.dataset_dir, "test"))
        super().__init__(train_x, train_u + train_x if node.ALL_AS_UNLABELED else train_u, val or None, test)

    def _read_data_train(self, data_dir: str, num_labeled: int, val_percent: float) -> tuple[Items, ...]:
        train_x: Items = []
        train_u: Items = []
        val: Items = []
        classes = list(self.split_dataset_by_label(_in_folders(data_dir)).values())
        for items in classes:
            count = math.floor(len(items) * val_percent)
            val += items[:count]
            rest = items[count:]
            random.shuffle(rest)
            labelled = math.floor(num_labeled / len(classes))
            train_x += rest[:labelled]
            train_u += rest[labelled:]
        return train_x, train_u, val


class CIFAR100(CIFAR10):
    """CIFAR-100 in the same way."""

    dataset_dir = "cifar100"


class SVHN(CIFAR10):
    """Street view house numbers in the same way."""

    dataset_dir = "svhn"


class STL10(DatasetBase):
    """STL-10; labels stand at the ends of file names (``none``: unlabelled), folds in ``stl10_binary/fold_indices.txt``."""

    dataset_dir = "stl10"

    def __init__(self, cfg: CfgNode) -> None:
        self.dataset_dir = os.path.join(os.path.abspath(os.path.expanduser(cfg.DATASET.ROOT)), self.dataset_dir)
        train_x, test, train_u = (
            self._read_data_all(os.path.join(self.dataset_dir, part)) for part in ("train", "test", "unlabeled")
        )
        if cfg.DATASET.STL10_FOLD >= 0:
            file = os.path.join(self.dataset_dir, "stl10_binary", "fold_indices.txt")
            try:
                with open(file, encoding="utf-8") as folds:
                    train_x = [train_x[int(place)] for place in folds.read().splitlines()[cfg.DATASET.STL10_FOLD].split()]
            except (OSError, IndexError, ValueError) as error:
                raise DataError(f"{file} has no fold {cfg.DATASET.STL10_FOLD} ({error}); set DATASET.STL10_FOLD to -1") from error
        super().__init__(train_x, train_u + train_x if cfg.DATASET.ALL_AS_UNLABELED else train_u, None, test)

    def _read_data_all(self, data_dir: str) -> Items:
        names = [(file, os.path.splitext(file)[0].split("_")[1]) for file in _listed(data_dir)]
        return [
            Datum(os.path.join(data_dir, file), -1 if label == "none" else int(label), 0, "" if label == "none" else label)
            for file, label in names
        ]


#: The data sets by name, as Dassl registers them.
SETS: dict[str, type[DatasetBase]] = {
    kind.__name__: kind
    for kind in (
        *(CIFAR10, CIFAR100, CIFAR10C, CIFAR100C, CIFARSTL, Digit5, DigitSingle, DigitsDG, DomainNet, Office31, OfficeHome),
        *(OfficeHomeDG, PACS, STL10, SVHN, VLCS, VisDA17, miniDomainNet),
    )
}

_WILDS = ("CATEGORIES", "Camelyon17", "FMoW", "IWildCam", "WILDSBase")
_DIGITS = ("MNIST", "MNIST_M", "SYN", "USPS", *(f"load_{name}" for name in Digit5.domains))
__getattr__ = lacking("dassl.data.datasets", (*_WILDS, *_DIGITS), "a data set of WILDS, or a helper of Digit5")
