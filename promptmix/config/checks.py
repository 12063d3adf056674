"""Values of the core tree that must fit each other, beyond what each key takes by itself (``promptmix.config.core``)."""

from __future__ import annotations

import string
from collections.abc import Container, Iterable

from yacs.config import CfgNode

from promptmix.config.declare import shown
from promptmix.errors import ConfigError

__all__ = ["check_pairs", "check_templates"]


def check_pairs(cfg: CfgNode, given: Container[str]) -> None:
    """Refuse values that contradict each other.

    Args:
        cfg: the whole config tree.
        given: keys that somebody set; what a program sets for all its trainers may go unread, as in Dassl.

    Raises:
        ConfigError: two values, or the items of one, can't be together; the message names both and the remedy.
    """
    _check_pictures(cfg.INPUT)
    _check_optimizer(cfg.OPTIM)
    layers = tuple(cfg.OPTIM.NEW_LAYERS)
    if layers and not cfg.OPTIM.STAGED_LR and "OPTIM.NEW_LAYERS" in given:
        raise ConfigError(f"OPTIM.NEW_LAYERS is {layers}, which OPTIM.STAGED_LR False ignores; set it to True")
    for number, group in enumerate(cfg.DATASET.TEMPLATE_GROUPS):
        check_templates(f"DATASET.TEMPLATE_GROUPS, group {number}", group)


def _check_pictures(node: CfgNode) -> None:
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
        ConfigError: there are none, or one is no text with exactly one ``{}``.
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
