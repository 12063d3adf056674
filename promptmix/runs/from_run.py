"""What an evaluation takes over from the run that it evaluates, where the command does not say it."""

from __future__ import annotations

from pathlib import Path

from yacs.config import CfgNode

from promptmix import config
from promptmix.runs import results
from promptmix.utils import get_logger


def take_from_run(cfg: CfgNode, model_dir: str) -> None:
    """Set what the run in ``model_dir`` says and ``cfg`` leaves open; a folder of somebody else's code says nothing.

    - ``DATASET.TEMPLATE_GROUPS``: experts keep the groups that they were trained with on another data set.
    - ``INPUT.READING``: pictures are read as the run was told to read them.

    Args:
        cfg: a merged config tree, not frozen.
        model_dir: output folder of the run whose learned tensors are evaluated.
    """
    path = Path(model_dir, results.FILE_NAME)
    if not model_dir or not path.is_file():
        return
    old = results.load(path)
    found: dict[str, object] = {}
    groups = old.vocabulary.get("template_groups")
    if groups and old.learned_parameters and old.dataset != cfg.DATASET.NAME and not cfg.DATASET.TEMPLATE_GROUPS:
        found["DATASET.TEMPLATE_GROUPS"] = tuple(groups)
    reading = old.config.get("INPUT", {}).get("READING", "auto")
    if reading != "auto" and cfg.INPUT.READING == "auto" and config.source_of(cfg, "INPUT.READING") is None:
        found["INPUT.READING"] = reading
    for key, value in found.items():
        config.merge_opts(cfg, [key, value], source=f"--model-dir {model_dir}")
        get_logger().info("%s is that of %s", key, model_dir)
