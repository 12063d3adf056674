"""The base of all data sets, with Dassl's attributes and methods, and the lookup by name."""

from __future__ import annotations

import os
import shutil
import urllib.request
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from yacs.config import CfgNode

from promptmix.data.datum import Datum
from promptmix.data.fewshot import generate_fewshot, split_by
from promptmix.errors import ConfigError, DataError
from promptmix.plugin_manager import get_plugin_manager
from promptmix.registry import DATASET_REGISTRY, Registry
from promptmix.utils import get_logger, read_json

__all__ = ["DATASET_REGISTRY", "DatasetBase", "build_dataset", "reading_of", "require_folder"]


class DatasetBase:
    """A data set: lists of ``Datum`` for training, validation and test, and the class names.

    Args:
        train_x: labelled training data.
        train_u: unlabelled training data, if any.
        val: validation data, if any.
        test: test data.

    Raises:
        DataError: ``train_x`` is empty.
    """

    registry: ClassVar[Registry] = DATASET_REGISTRY
    dataset_dir: str = ""  # folder of the data set below DATASET.ROOT
    domains: Sequence[str] = []  # names of all domains

    #: How its pictures are read where ``INPUT.READING`` is ``auto``, see ``promptmix.data.reading.images``.
    reading: str = "benchmark"

    # Words beyond Dassl's, which a data set may go without.
    templates: list[str]  # hard prompts such as "a photo of a {}."
    template_groups: list[list[str]]  # hard prompts in groups of similar ones
    all_classnames: list[str]  # of base and new classes
    descriptions: Mapping[str, Sequence[str]]  # sentences about each of them, where DATASET.DESCRIPTIONS names none

    def __init__(
        self,
        train_x: list[Datum] | None = None,
        train_u: list[Datum] | None = None,
        val: list[Datum] | None = None,
        test: list[Datum] | None = None,
    ) -> None:
        if not train_x:
            raise DataError(f"{type(self).__name__} has no training data; check its folder and the DATASET settings")
        self._train_x = train_x
        self._train_u = train_u
        self._val = val
        self._test = test
        self._num_classes = self.get_num_classes(train_x)
        self._lab2cname, self._classnames = self.get_lab2cname(train_x)

    @property
    def train_x(self) -> list[Datum]:
        """Return the labelled training data."""
        return self._train_x

    @property
    def train_u(self) -> list[Datum] | None:
        """Return the unlabelled training data."""
        return self._train_u

    @property
    def val(self) -> list[Datum] | None:
        """Return the validation data."""
        return self._val

    @property
    def test(self) -> list[Datum] | None:
        """Return the test data."""
        return self._test

    @property
    def lab2cname(self) -> dict[int, str]:
        """Return label -> class name."""
        return self._lab2cname

    @property
    def classnames(self) -> list[str]:
        """Return the class names by label."""
        return self._classnames

    @property
    def num_classes(self) -> int:
        """Return the number of classes."""
        return self._num_classes

    @staticmethod
    def get_num_classes(data_source: Iterable[Datum]) -> int:
        """Return the largest label plus one."""
        return max(item.label for item in data_source) + 1

    @staticmethod
    def get_lab2cname(data_source: Iterable[Datum]) -> tuple[dict[int, str], list[str]]:
        """Return label -> class name, and the class names in the order of their labels."""
        names = {item.label: item.classname for item in data_source}
        mapping = {label: names[label] for label in sorted(names)}
        return mapping, list(mapping.values())

    def check_input_domains(self, source_domains: Sequence[str], target_domains: Sequence[str]) -> None:
        """Check that there are source and target domains and that the data set has them.

        Raises:
            ConfigError: a list is empty or names an unknown domain.
        """
        for key, domains in (("SOURCE_DOMAINS", source_domains), ("TARGET_DOMAINS", target_domains)):
            if not domains:
                raise ConfigError(f"DATASET.{key} is empty, but must name some of: {', '.join(self.domains)}")
            self.is_input_domain_valid(domains)

    def is_input_domain_valid(self, input_domains: Sequence[str]) -> None:
        """Check that the data set has each of ``input_domains``.

        Raises:
            ConfigError: it lacks one.
        """
        for domain in input_domains:
            if domain not in self.domains:
                known = f"choices: {', '.join(self.domains)}" if self.domains else "it has none; leave the key out"
                raise ConfigError(f"unknown domain {domain!r} of {type(self).__name__} ({known})")

    def download_data(self, url: str, dst: str, from_gdrive: bool = True) -> None:
        """Download an archive to ``dst`` and unpack it in the same folder.

        Args:
            url: where it is.
            dst: file to write, ending in ``.zip``, ``.tar`` or ``.tar.gz``.
            from_gdrive: ``url`` is a Google Drive link, which takes the gdown package.

        Raises:
            DataError: the download failed, gdown is missing, or the archive can't be unpacked.
        """
        target = Path(dst)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(target.name + ".part")
        try:
            if from_gdrive:
                import gdown

                gdown.download(url, str(partial), quiet=False)
            else:
                urllib.request.urlretrieve(url, partial)
            os.replace(partial, target)
            get_logger().info("Extracting file ...")
            # The data filter refuses tar members that would land outside the folder; the zip module never lets them.
            options = {} if target.suffix == ".zip" else {"filter": "data"}
            shutil.unpack_archive(target, target.parent, **options)  # type: ignore[arg-type]
        except ImportError as error:
            raise DataError(f"{url} takes the package gdown; install it, or put the file at {dst}") from error
        except (OSError, ValueError, shutil.ReadError) as error:
            raise DataError(f"can't get {url} ({error}); do it by hand and unpack it in {target.parent}") from error
        finally:
            partial.unlink(missing_ok=True)
        get_logger().info("File extracted to %s", target.parent)

    def generate_fewshot_dataset(
        self, *data_sources: list[Datum], num_shots: int = -1, repeat: bool = False
    ) -> list[Datum] | list[list[Datum]] | tuple[list[Datum], ...]:
        """Draw ``num_shots`` items per class from each source (see ``promptmix.data.fewshot.generate_fewshot``).

        Args:
            data_sources: lists of items.
            num_shots: items per class; below 1 gives everything back.
            repeat: fill up classes with too few items by drawing with replacement.

        Returns:
            One list for one source, otherwise one list per source.
        """
        if num_shots < 1:
            return data_sources[0] if len(data_sources) == 1 else data_sources
        get_logger().info("Creating a %d-shot dataset", num_shots)
        output = [generate_fewshot(source, num_shots, repeat) for source in data_sources]
        return output[0] if len(output) == 1 else output

    def split_dataset_by_label(self, data_source: Sequence[Datum]) -> dict[int, list[Datum]]:
        """Group items by class."""
        return split_by(data_source, "label")

    def split_dataset_by_domain(self, data_source: Sequence[Datum]) -> dict[int, list[Datum]]:
        """Group items by domain."""
        return split_by(data_source, "domain")


def require_folder(path: str | os.PathLike[str], name: str) -> Path:
    """Return ``path`` if it is a folder.

    Args:
        path: where the data set should be.
        name: the data set, for the message.

    Raises:
        DataError: there is no such folder; the message says what lies in the one above.
    """
    folder = Path(os.path.expanduser(path))
    if folder.is_dir():
        return folder
    above = folder.parent
    there = sorted(entry.name for entry in above.iterdir()) if above.is_dir() else []
    seen = f"{above} holds {', '.join(there[:8])}" if there else f"{above} is empty or missing"
    raise DataError(f"data set {name}: no folder {folder} ({seen}); set --root (DATASET.ROOT) to the folder above it")


def reading_of(cfg: CfgNode) -> str:
    """Return how pictures are read: what ``INPUT.READING`` says, and for ``auto`` what the data set says."""
    chosen: str = cfg.INPUT.get("READING", "auto")  # a real Dassl's tree lacks it
    if chosen != "auto":
        return chosen
    name = cfg.DATASET.NAME
    return getattr(DATASET_REGISTRY.get(name), "reading", "benchmark") if name in DATASET_REGISTRY else "benchmark"


def build_dataset(cfg: CfgNode) -> DatasetBase:
    """Build the data set that ``DATASET.NAME`` names.

    Raises:
        RegistryError: no such data set; the message lists those there are.
        DataError: ``DATASET.ROOT`` is not a folder.
    """
    get_plugin_manager()
    dataset_class = DATASET_REGISTRY.get(cfg.DATASET.NAME)
    if cfg.DATASET.ROOT and not Path(os.path.expanduser(cfg.DATASET.ROOT)).is_dir():
        raise DataError(f"DATASET.ROOT: no folder {cfg.DATASET.ROOT}; set --root to the folder of the data sets")
    if cfg.VERBOSE:
        get_logger().info("Loading dataset: %s", cfg.DATASET.NAME)
    dataset: DatasetBase = dataset_class(cfg)
    if cfg.DATASET.get("SUBSET", ""):  # a real Dassl's tree lacks it
        keep_subset(dataset, cfg.DATASET.SUBSET)
    return dataset


def keep_subset(dataset: DatasetBase, file: str) -> None:
    """Leave those pictures in a data set that ``file`` numbers; its classes stay, also those without a picture left.

    Args:
        dataset: whose training and test pictures are taken.
        file: JSON, ``{"train": [0, 5, ...], "test": [...]}``, places in the data set's lists; a part left out stays whole.

    Raises:
        DataError: no such file, or it numbers pictures that aren't there.
    """
    content = read_json(file)
    if isinstance(content, dict) and not content.keys() & {"train", "test"}:  # a protocol notes more there
        raise DataError(f"DATASET.SUBSET {file} names no pictures; give it train, test or both, with places of pictures")
    for part, attribute in (("train", "_train_x"), ("test", "_test")):
        places = content.get(part) if isinstance(content, dict) else 0
        items = getattr(dataset, attribute) or []
        if places is None:
            continue
        once = isinstance(places, list) and len(set(map(str, places))) == len(places)
        if (
            not isinstance(places, list)
            or not places
            or not once
            or any(type(p) is not int or not 0 <= p < len(items) for p in places)
        ):
            raise DataError(
                f"DATASET.SUBSET {file}: {part} must be a list of whole numbers from 0 to {len(items) - 1}, each once, the "
                "places of pictures; fix the file, or leave the key out"
            )
        setattr(dataset, attribute, [items[place] for place in places])
