"""From a folder of pictures to a trained prompt in one command: what is chosen where the caller says nothing, and said of it."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from promptmix.config.declare import all_keys
from promptmix.config.flags import make_config
from promptmix.errors import ConfigError, DataError
from promptmix.files.text import counted, harmless

if TYPE_CHECKING:
    from yacs.config import CfgNode

__all__ = ["BASELINE", "Wish", "baseline_of", "config_of", "defaults", "recipe_of"]

#: What the trained prompts are compared with.
BASELINE = "ZeroshotCLIP"
#: A method's own configs from which the recipe of a real backbone is taken, the first there is; * is the last of its kind.
_RECIPES = ("few_shot", "vit_b16", "vit_b16*", "base_to_new", "rn50", "*")
#: What a run shares with the baseline that it is compared with.
_COMMON = ("DATASET.", "DATALOADER.TEST.", "DATALOADER.NUM_WORKERS", "INPUT.", "MODEL.BACKBONE.", "TEST.", "DEVICE", "SEED")
_NOT_COMMON = ("INPUT.TRANSFORMS", "INPUT.CACHED_VIEWS", "TEST.FINAL_MODEL")


@dataclass(frozen=True)
class Wish:
    """What the caller said; "" and None stand for a default that is chosen here.

    Attributes:
        pictures: a folder with a folder for each class, or a table of paths and labels (its file, or the folder with it).
        trainer: a name of the trainer registry.
        backbone: a name of the backbone registry, or open_clip's.
        weights: file of its weights.
        templates: hard templates with {} for the class name.
        shots: training pictures per class; below 1 = all.
        seed: of the shots and the training.
        output: folder of the runs.
        device: auto, cpu or cuda.
        skip_bad: whether pictures that can't be read are left out.
        plugins: modules or files to load.
        settings: ``KEY VALUE`` pairs, which come last.
    """

    pictures: str
    trainer: str = "CoOp"
    backbone: str = ""
    weights: str = ""
    templates: tuple[str, ...] = ()
    shots: int = -1
    seed: int = 1
    output: str = ""
    device: str = ""
    skip_bad: bool | None = None
    plugins: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()

    @cached_property
    def table(self) -> Path | None:
        """The table that says the classes of the pictures, None where folders do."""
        from promptmix.data.datasets.tables import table_of

        return table_of(os.path.expanduser(self.pictures))

    @property
    def name(self) -> str:
        """What tables and folders call the pictures."""
        path = Path(os.path.abspath(os.path.expanduser(self.pictures)))
        return path.stem if path.is_file() else path.name or "pictures"

    @property
    def folder(self) -> Path:
        """Where the runs go."""
        return Path(self.output or Path("output", self.name))


def recipe_of(trainer: str, backbone: str) -> str:
    """Return the shipped config that a method trains with on a backbone, "" = the embedded one that the method takes.

    On the embedded backbones that is the method's ``tiny.yaml``, or the quick start's for a plugin's method; on others the first
    of its own configs for few shots, ViT-B/16, base-to-new and RN50, or what all methods share.
    """
    from promptmix.clip.load import EMBEDDED_NAMES

    shipped = Path(str(files("promptmix.configs")))
    own = shipped / "trainers" / trainer
    if backbone in ("", *EMBEDDED_NAMES):
        return f"configs/trainers/{trainer}/tiny.yaml" if (own / "tiny.yaml").is_file() else "configs/quickstart.yaml"
    for pattern in _RECIPES:
        found = [path for path in sorted(own.glob(f"{pattern}.yaml")) if path.stem != "tiny"]
        if found:
            return f"configs/{found[-1].relative_to(shipped).as_posix()}"
    return "configs/trainers/_vit_b16.yaml"


def config_of(wish: Wish) -> CfgNode:
    """Return the config of the training: the recipe, the pictures, and what the caller said.

    Raises:
        UserError: the pictures are not there, a name is unknown, or a setting does not fit.
    """
    if not os.path.exists(os.path.expanduser(wish.pictures)):
        raise DataError(f"no {wish.pictures}; name a folder with a folder of pictures for each class, or a table path,label")
    if wish.weights and not wish.backbone:
        raise ConfigError(f"--weights {wish.weights} needs --backbone, the model that they belong to, such as ViT-B/16")
    flags = _flags(wish, wish.trainer) | _look(wish)
    return make_config([recipe_of(wish.trainer, wish.backbone)], flags, wish.settings, wish.plugins)


def baseline_of(cfg: CfgNode, wish: Wish) -> CfgNode:
    """Return the config of the zero-shot model on the same pictures, read by the same backbone."""
    from promptmix import config
    from promptmix.config import get_key

    flags = _flags(wish, BASELINE) | {"--output-dir": ("OUTPUT_DIR", str(Path(cfg.OUTPUT_DIR, "zeroshot")))}
    found = make_config([recipe_of(BASELINE, cfg.MODEL.BACKBONE.NAME)], flags, [], wish.plugins)
    for key in all_keys(cfg):
        value = get_key(cfg, key)
        if key.startswith(_COMMON) and key not in _NOT_COMMON and value != get_key(found, key):
            config.merge_opts(found, [key, value], source="promptmix fit")
    return found


def _flags(wish: Wish, trainer: str) -> dict[str, tuple[str, Any]]:
    """Return the flags that name pictures, method and model, with the keys that they set."""
    from promptmix.data.templates import GENERAL_GROUPS

    table = wish.table
    general = tuple(template for group in GENERAL_GROUPS for template in group)
    data = "ImageFolder" if table is None else "CSV"
    return {
        "--trainer": ("TRAINER.NAME", trainer),
        "promptmix fit": ("DATASET.NAME", data),
        "PICTURES": ("DATASET.ROOT", os.path.expanduser(wish.pictures) if table is None else os.path.dirname(table) or "."),
        "the table": ("DATASET.CSV.FILE", "" if table is None else table.name),
        "--template": (f"DATASET.{data.upper()}.TEMPLATES", wish.templates or general),
        "their groups": ("DATASET.TEMPLATE_GROUPS", None if wish.templates else GENERAL_GROUPS),
        "--backbone": ("MODEL.BACKBONE.NAME", wish.backbone),
        "--weights": ("MODEL.BACKBONE.WEIGHTS", wish.weights),
        "--shots": ("DATASET.NUM_SHOTS", wish.shots),
        "--skip-bad": ("DATASET.SKIP_BAD", wish.skip_bad),
        "--seed": ("SEED", wish.seed),
        "--device": ("DEVICE", wish.device),
        "--output-dir": ("OUTPUT_DIR", str(wish.folder / trainer)),
    }


def _look(wish: Wish) -> dict[str, tuple[str, Any]]:
    """Return the keys of the pictures that a backbone takes which the caller chose; the recipe has those of its own."""
    from promptmix.config.flags import load_plugins
    from promptmix.registry import BACKBONE_REGISTRY

    load_plugins(wish.plugins)
    settings = dict(zip(wish.settings[::2], wish.settings[1::2], strict=False))
    name = settings.get("MODEL.BACKBONE.NAME", wish.backbone)
    if not name or (name in BACKBONE_REGISTRY and not BACKBONE_REGISTRY.origin(name).startswith("promptmix")):
        return {}  # a plugin's: the recipe says how its pictures are read
    from promptmix.clip.load import look_of

    look = look_of(name, settings.get("MODEL.BACKBONE.TAG", ""))
    shown = f"what {name} takes"
    return {
        f"{shown} (size)": ("INPUT.SIZE", (look.size, look.size)),
        f"{shown} (mean)": ("INPUT.PIXEL_MEAN", list(look.mean)),
        f"{shown} (deviation)": ("INPUT.PIXEL_STD", list(look.std)),
        f"{shown} (resizing)": ("INPUT.INTERPOLATION", look.interpolation),
    }


def template_is_unread(trainer: Any, wish: Wish) -> bool:  # a trainer with Dassl's interface
    """Tell whether the caller gave templates and nothing of a trained method has read one."""
    task = getattr(getattr(trainer, "model", None), "task", None)
    return bool(wish.templates) and task is not None and not (task.templates.were_read or task.template_groups.were_read)


def defaults(cfg: CfgNode, dataset: Any, wish: Wish) -> list[tuple[str, str]]:  # a DatasetBase
    """Return what was chosen, as pairs of a word and a line that also says how to choose otherwise.

    Args:
        cfg: the merged config.
        dataset: the data set that was built with it.
        wish: what the caller said.
    """
    names = list(dataset.classnames)
    parts = {"train": dataset.train_x, "val": dataset.val or [], "test": dataset.test or []}
    counts = sorted(Counter(item.label for item in dataset.train_x).values())
    range_ = f"{counts[0]} to {counts[-1]}" if counts[0] < counts[-1] else str(counts[0])
    drawn = f"at most {cfg.DATASET.NUM_SHOTS}" if cfg.DATASET.NUM_SHOTS > 0 else "all training pictures"
    sizes = ", ".join(f"{part} {len(items):,}" for part, items in parts.items() if items)
    return [
        ("pictures", f"{len(names)} classes ({_some(names)}){f', as {wish.table.name} says' if wish.table else ''}"),
        ("method", f"{cfg.TRAINER.NAME}  [--trainer NAME; `promptmix list trainers`]"),
        ("backbone", _backbone(cfg)),
        ("recipe", _recipe(cfg, wish)),
        ("split", f"{sizes}; {_split(cfg, dataset)}"),
        ("shots", f"{drawn}: {range_} a class  [--shots N]"),
        ("templates", _templates(dataset, cfg.DATASET.TEMPLATE_GROUPS)),
        ("runs", f"{wish.folder}  [--output-dir DIR]"),
    ]


def _backbone(cfg: CfgNode) -> str:
    from promptmix.clip.load import EMBEDDED_NAMES

    name = cfg.MODEL.BACKBONE.NAME
    if name in EMBEDDED_NAMES:
        return (
            f"{name}, embedded and tiny. A real CLIP needs weights: --backbone ViT-B/16 downloads OpenAI's once; "
            "with --weights FILE it reads them there"
        )
    return f"{name}, weights from {cfg.MODEL.BACKBONE.WEIGHTS}" if cfg.MODEL.BACKBONE.WEIGHTS else name


def _recipe(cfg: CfgNode, wish: Wish) -> str:
    epochs = counted(cfg.OPTIM.MAX_EPOCH, "epoch")
    numbers = f"{epochs}, learning rate {cfg.OPTIM.LR:g}, batches of {cfg.DATALOADER.TRAIN_X.BATCH_SIZE}"
    return f"{recipe_of(wish.trainer, wish.backbone)}: {numbers}  [OPTIM.MAX_EPOCH 50 at the end]"


def _split(cfg: CfgNode, dataset: Any) -> str:
    is_table = cfg.DATASET.NAME == "CSV"
    if dataset.comes_in_parts:
        return "as the table says" if is_table else "as the folders say"
    ratio = ", ".join(f"{share:g}" for share in cfg.DATASET[cfg.DATASET.NAME.upper()].SPLIT_RATIO)
    given = "a column split is taken as it is" if is_table else "folders train/ and test/ are taken as they are"
    return f"{ratio} of each class  [{given}]"


def _templates(dataset: Any, groups: Any) -> str:
    more = len(dataset.templates) - 1
    rest = (
        f" and {more} general ones in {len(groups)} groups, which mixtures and averages take" if groups else f" and {more} more"
    )
    return f'{dataset.templates[0]!r}{rest if more else ""}  [--template "a satellite photo of a {{}}."]'


def _some(names: list[str], most: int = 5) -> str:
    shown = ", ".join(harmless(name) for name in names[:most])
    return f"{shown}, ..." if len(names) > most else shown
