"""Values of the core tree that must fit each other, beyond what each key takes by itself (``promptmix.config.core``)."""

from __future__ import annotations

import string
from collections.abc import Callable, Iterable, Mapping
from functools import reduce

from yacs.config import CfgNode

from promptmix.config.declare import all_declared, shown
from promptmix.errors import ConfigError
from promptmix.registry import DATASET_REGISTRY, TRAINER_REGISTRY, Registry

__all__ = ["check_pairs", "check_templates"]


def check_pairs(cfg: CfgNode, given: Mapping[str, str]) -> None:
    """Refuse values that contradict each other.

    Args:
        cfg: the whole config tree.
        given: keys that somebody set, and who; what a program or file sets for all its trainers may go unread, as in Dassl.

    Raises:
        ConfigError: two values, or the items of one, can't be together; the message names both and the remedy.
    """
    place = cfg.OUTPUT_DIR
    if "OUTPUT_DIR" in given and (not place.strip() or place.startswith("~")):
        why = "which no shell has put a home in place of" if place.strip() else "which names no folder"
        raise ConfigError(f"OUTPUT_DIR is {place!r}, {why}; give the folder's path, such as output/one")
    _check_pictures(cfg.INPUT)
    _check_optimizer(cfg.OPTIM)
    _refuse_unread(cfg, given)
    layers = tuple(cfg.OPTIM.NEW_LAYERS)
    if layers and not cfg.OPTIM.STAGED_LR and "OPTIM.NEW_LAYERS" in given:
        raise ConfigError(f"OPTIM.NEW_LAYERS is {layers}, which OPTIM.STAGED_LR False ignores; set it to True")
    for number, group in enumerate(cfg.DATASET.TEMPLATE_GROUPS):
        check_templates(f"DATASET.TEMPLATE_GROUPS, group {number}", group)


#: Keys that data sets of Dassl read, which a plugin or a checkout brings.
_OF_DASSLS_SETS = tuple(
    f"DATASET.{key}" for key in ("NUM_LABELED", "VAL_PERCENT", "STL10_FOLD", "CIFAR_C_TYPE", "CIFAR_C_LEVEL", "ALL_AS_UNLABELED")
)


def _is_ours(registry: Registry, name: str) -> bool:
    return name in registry and registry.get(name).__module__.startswith("promptmix.")


def _reads(cfg: CfgNode, key: str) -> bool:
    """Tell whether the chosen trainer may read a core key; one that is unknown here is refused elsewhere."""
    name = cfg.TRAINER.NAME
    return name not in TRAINER_REGISTRY or key not in getattr(TRAINER_REGISTRY.get(name), "ignores", ())


def _has_role(cfg: CfgNode, role: str) -> bool:
    """Tell whether the chosen trainer may have a part of this role; one that is unknown here is refused elsewhere."""
    name = cfg.TRAINER.NAME
    return name not in TRAINER_REGISTRY or role in getattr(TRAINER_REGISTRY.get(name), "roles", (role,))


#: Keys that data sets or trainers of others read: (beginnings of keys, when they are read, what to set for that).
_READ: list[tuple[tuple[str, ...], Callable[[CfgNode], bool], str]] = [
    (_OF_DASSLS_SETS, lambda cfg: not _is_ours(DATASET_REGISTRY, cfg.DATASET.NAME), "DATASET.NAME to a plugin's that reads it"),
    (
        tuple(f"MODEL.HEAD.{key}" for key in ("HIDDEN_LAYERS", "ACTIVATION", "BN", "DROPOUT")),
        lambda cfg: _reads(cfg, "MODEL.HEAD.NAME"),
        "TRAINER.NAME to one with such a head",
    ),
    (
        ("DATALOADER.TRAIN_U.", "TRAIN.COUNT_ITER"),
        lambda cfg: _reads(cfg, "DATASET.UNLABELED"),
        "TRAINER.NAME to one that takes unlabelled pictures",
    ),
    (("MODEL.SPARSE_EXPERTS",), lambda cfg: _has_role(cfg, "ROUTER"), "TRAINER.NAME to one with a router"),
    (
        ("DATALOADER.RETURN_IMG0",),
        lambda cfg: not _is_ours(TRAINER_REGISTRY, cfg.TRAINER.NAME),
        "TRAINER.NAME to one that reads img0",
    ),
]


def _refuse_unread(cfg: CfgNode, given: Mapping[str, str]) -> None:
    """Refuse a key of the command line that nothing reads; files serve several methods, and may hold more than one needs.

    Raises:
        ConfigError: there is one; the message says what would read it.
    """
    known = all_declared(cfg)
    for key in [key for key, source in given.items() if source == "command line"]:
        needed = [f"set {remedy}" for starts, read, remedy in _READ if key.startswith(starts) and not read(cfg)]
        if key in known:
            needed += known[key].lacks(lambda other: reduce(CfgNode.__getitem__, other.split("."), cfg))
        if needed:
            raise ConfigError(f"{key} (set by command line) would be ignored; leave it out, or {' and '.join(needed)}")


def _check_pictures(node: CfgNode) -> None:
    twice = next((name for name in node.TRANSFORMS if node.TRANSFORMS.count(name) > 1), "")
    if twice:
        raise ConfigError(f"INPUT.TRANSFORMS names {twice!r} twice, which would be done once; leave one out")
    low, high = node.RRCROP_SCALE
    if low > high:
        raise ConfigError(f"INPUT.RRCROP_SCALE is {(low, high)}: smallest share first, such as (0.08, 1.0)")
    if node.GB_K % 2 == 0:
        raise ConfigError(f"INPUT.GB_K is {node.GB_K}, but the kernel of a blur has a middle; give an odd number")
    if "gaussian_blur" in node.TRANSFORMS and min(node.SIZE) <= node.GB_K // 2:
        raise ConfigError(f"INPUT.GB_K is {node.GB_K}, too large for pictures of INPUT.SIZE {tuple(node.SIZE)}; lower it")


def _check_optimizer(node: CfgNode) -> None:
    if node.NAME == "sgd" and node.SGD_NESTEROV and (node.MOMENTUM == 0 or node.SGD_DAMPNING != 0):
        raise ConfigError(
            f"OPTIM.SGD_NESTEROV is True with MOMENTUM {node.MOMENTUM} and SGD_DAMPNING {node.SGD_DAMPNING}; "
            "it needs momentum above 0 and no dampening"
        )
    steps = list(node.STEPSIZE)
    if node.LR_SCHEDULER != "cosine" and not steps:
        raise ConfigError(f"OPTIM.STEPSIZE is empty, but {node.LR_SCHEDULER} steps after some epochs; give such as (30,)")
    if node.LR_SCHEDULER == "multi_step" and (min(steps) < 1 or steps != sorted(set(steps))):
        raise ConfigError(f"OPTIM.STEPSIZE is {tuple(steps)}; multi_step takes epochs from 1 on that grow, such as (30, 60)")


def check_templates(key: str, templates: Iterable[object]) -> None:
    """Refuse templates that a class name can't be put into.

    Args:
        key: where they stand, for the message.
        templates: texts with one ``{}`` each.

    Raises:
        ConfigError: there are none, or one is not text with exactly one ``{}``.
    """
    given = list(templates)
    if not given:
        raise ConfigError(f"{key} is empty; give one or more templates such as 'a photo of a {{}}.'")
    for template in given:
        if not isinstance(template, str) or not _holds_one_place(template):
            raise ConfigError(f"{key}: template {shown(template)} must be text with one {{}} for the class name")


def _holds_one_place(template: str) -> bool:
    try:
        fields = [(name, spec, how) for _, name, spec, how in string.Formatter().parse(template) if name is not None]
    except ValueError:  # a lone brace
        return False
    return fields == [("", "", None)]
