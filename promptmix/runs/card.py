"""A model card for trained prompts: what they are, what they were measured to do, and what nobody knows of them."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Sequence
from typing import Any

import yaml

from promptmix.files.text import counted, one_line
from promptmix.runs.results import RunResult

__all__ = ["card_of"]

_MOST_NAMES = 100


def card_of(runs: Sequence[RunResult], *, name: str = "", licence: str = "", epoch: int | None = None) -> str:
    """Return a card in Markdown, with the head that model hubs read.

    Args:
        runs: a run that trained, and evaluations of it.
        name: what the prompts are called; "" = by method and data set.
        licence: of the learned tensors; "" = none is stated.
        epoch: of the checkpoint, if known.
    """
    run = runs[0]
    title = name or f"{run.trainer} on {run.title or run.dataset}"
    return "\n".join(
        [
            _head(run, licence),
            f"# {_text(title)}",
            "",
            _about(run, epoch),
            "",
            "## Use",
            "",
            "```bash",
            "promptmix predict --model-dir FOLDER pictures/ --top 3",
            "```",
            "",
            "With promptmix installed. FOLDER is this folder, or `hub:NAME` below your own; `--classnames a,b,c` asks for other "
            "classes, where the method learns nothing for each class.",
            "",
            "## Measured",
            "",
            *_numbers(runs),
            "",
            "In percent, one run each: a single seed says little about the method. Other pictures, classes and domains were not "
            "measured unless a row says so; neither were fairness or safety. Probabilities were not calibrated.",
            "",
            "## Trained with",
            "",
            *_settings(run),
            "",
            *([*(f"- {_text(line)}" for line in run.approximations), ""] if run.approximations else []),
            f"Versions: {_text(', '.join(f'{k} {v}' for k, v in run.versions.items()))}"
            + (f"; commit `{_text(run.commit[:12])}`" if run.commit else "")
            + f". Finished {_text(run.finished[:10])}.",
            "",
            "## Classes",
            "",
            _classes(run),
            "",
            "## Licence",
            "",
            f"{_text(licence)}." if licence else "None is stated for the learned numbers; ask who gave them to you.",
            "The frozen model and the data have licences of their own.",
            "",
        ]
    )


def _about(run: RunResult, epoch: int | None) -> str:
    """Return what the prompts are, in a sentence."""
    shots = f"{counted(run.shots, 'picture')} per class" if run.shots > 0 else "all training pictures"
    where = f"{_text(run.title or run.dataset)} ({_text(run.subsample_classes)} classes, {shots}, seed {run.seed}"
    return (
        f"Prompts learned by {_text(run.trainer)} for the frozen model {_text(run.backbone)}, on {where}"
        + (f", {counted(epoch, 'epoch')}" if epoch else "")
        + f"): {run.learned_parameters or 0:,} learned numbers. The frozen model is not part of this."
    )


def _head(run: RunResult, licence: str) -> str:
    """Return the YAML in front."""
    head: dict[str, Any] = {
        "library_name": "promptmix",
        "pipeline_tag": "zero-shot-image-classification",
        "tags": ["prompt-learning", "clip", one_line(run.trainer)],
        "base_model": one_line(run.backbone),
        "datasets": [one_line(run.title or run.dataset)],
    }
    if licence:
        head["license"] = one_line(licence)
    return f"---\n{yaml.safe_dump(head, sort_keys=False, allow_unicode=True)}---\n"


def _numbers(runs: Sequence[RunResult]) -> list[str]:
    lines = ["| data set | classes | split | accuracy | class-balanced | macro F1 |", "| --- | --- | --- | --- | --- | --- |"]
    for run in runs:
        data = (run.title or run.dataset) + (f" ({', '.join(run.target_domains)})" if run.target_domains else "")
        for split, numbers in run.metrics.items():
            values = [numbers.get(key) for key in ("accuracy", "macro_accuracy", "macro_f1")]
            cells = [data, run.subsample_classes, split, *("-" if value is None else f"{value:.2f}" for value in values)]
            lines.append("| " + " | ".join(map(_text, cells)) + " |")
    return lines


def _settings(run: RunResult) -> list[str]:
    """Return what somebody set, other than places."""
    settings = run.settings()
    said = {key: settings[key] for key in sorted(run.config_sources) if key in settings}
    lines = ["| key | value |", "| --- | --- |"]
    return [*lines, *(f"| `{_text(key)}` | {_text(json.loads(value))} |" for key, value in said.items())]


def _classes(run: RunResult) -> str:
    names = list(run.vocabulary.get("classnames", ()))
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return f"{len(names)}: {', '.join(_text(name) for name in names[:_MOST_NAMES])}{more}."


def _text(value: object) -> str:
    """Return text that is neither markup nor a second line, nor ends the cell of a table."""
    plain = html.escape(one_line(value), quote=False).replace("`", "'")
    return re.sub(r"[\\\[|]", r"\\\g<0>", plain)
