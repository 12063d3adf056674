"""Everything that is told of a run, as one tree of plain values."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from promptmix.interpret.mixture import Findings, look_into, mixtures_of
from promptmix.interpret.opened import Opened
from promptmix.interpret.words import Position, nearest_words
from promptmix.prompts.learner import PromptLearner
from promptmix.prompts.roles import PromptBank

__all__ = ["Insight", "Moved", "look"]


@dataclass
class Moved:
    """How far a class's text feature went from the hard prompt's, the data set's first template.

    Attributes:
        classname: the class.
        degrees: angle, mean over the experts.
        least: of the expert that stayed nearest.
        most: of the one that went furthest.
    """

    classname: str
    degrees: float
    least: float
    most: float


@dataclass
class Insight:
    """What a run learned.

    Attributes:
        run: its folder.
        trainer: its method.
        dataset: its data set, with the part of the classes.
        classnames: by label.
        experts: names of the bank's experts.
        template: the hard prompt that classes are compared with.
        words: nearest words.
        templates: for each expert the data set's hard templates by the mean cosine of their class features with its own.
        moved: by class.
        mixtures: what weighs experts in it.
        notes: what could not be told, and why.
    """

    run: str
    trainer: str
    dataset: str
    classnames: list[str]
    experts: list[str] = field(default_factory=list)
    template: str = ""
    words: list[Position] = field(default_factory=list)
    templates: list[list[tuple[str, float]]] = field(default_factory=list)
    moved: list[Moved] = field(default_factory=list)
    mixtures: list[Findings] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def tree(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return asdict(self)


def look(run: Opened, words: int = 3) -> Insight:
    """Look into a run.

    Args:
        run: opened; without its test pictures, what needs them is left out with a note.
        words: nearest words for each position.
    """
    learner, result = run.trainer.model, run.result
    dataset = f"{result.dataset}, {result.subsample_classes} classes"
    found = Insight(str(run.folder), result.trainer, dataset, list(result.vocabulary["classnames"]))
    bank = getattr(learner, "bank", None)
    if isinstance(bank, PromptBank):
        found.experts = list(bank.expert_names)
        found.words = nearest_words(bank, learner.task, words)
        if not found.words:
            found.notes.append("nothing that the text tower reads differs from plain words, so there are no others to name")
        if learner.text_per_picture and not bank.per_image:
            found.notes.append(f"{result.trainer} tunes its prompt anew for each test picture; this is what it starts from")
        elif not found.words:
            found.notes.append(_elsewhere(learner, result.trainer))
        _compare_text(found, learner)
    else:
        found.notes.append(f"{result.trainer} has no bank of prompts, so there are no words to name")
    mixtures = mixtures_of(learner)
    if not mixtures:
        found.notes.append(f"{result.trainer} weighs no experts, so there is no routing to tell")
    elif run.lacks:
        found.notes.append(f"routing and accuracies of experts need the test pictures: {run.lacks}")
    else:
        found.mixtures = [look_into(run, mixed) for mixed in mixtures]
        many = learner.expert_names or getattr(bank, "num_experts", 1) > 1
        if isinstance(bank, PromptBank) and many and not bank.per_image:
            found.mixtures[0].text_cosine = _cosines(_text(learner))
    return found


@torch.no_grad()
def _text(learner: Any) -> Tensor:  # a Learner
    """Return the bank's text features (E, C, D), normalised."""
    bank, task = learner.bank, learner.task
    if bank.per_image:  # as a feature of zeros would have them
        features: Tensor = bank(task.classnames, task.clip.scale.new_zeros(1, task.clip.embed_dim))[0]
    else:
        features = bank(task.classnames)
    return F.normalize(features.float(), dim=-1)


def _elsewhere(learner: PromptLearner, trainer: str, most: int = 4) -> str:
    """Return a line on what a method learned that no text prompt shows."""
    tensors = [(name, value) for name, value in learner.state_dict().items() if value.is_floating_point()]
    learned = [f"{name} {'×'.join(map(str, value.shape))}" for name, value in tensors if value.numel() > 1]
    if not learned:
        return f"{trainer} learned no tensor"
    rest = f" and {len(learned) - most} more" if len(learned) > most else ""
    return f"what {trainer} learned lies elsewhere: {', '.join(learned[:most])}{rest}"


def _compare_text(found: Insight, learner: Any) -> None:
    """Fill in how far classes moved, and which hard template each expert is most like."""
    task, text = learner.task, _text(learner)
    found.template = task.templates[0]
    hard = task.clip.hard_features(task.templates, task.classnames).float()  # (P, C, D)
    angles = torch.rad2deg(torch.einsum("ecd,cd->ec", text, hard[0]).clamp(-1, 1).arccos())
    for name, own in zip(task.classnames, angles.T, strict=True):
        found.moved.append(Moved(name, float(own.mean()), float(own.min()), float(own.max())))
    for likeness in torch.einsum("ecd,pcd->ep", text, hard) / len(task.classnames):
        best = likeness.topk(min(3, len(task.templates)))
        found.templates.append([(task.templates[i], v) for i, v in zip(best.indices.tolist(), best.values.tolist(), strict=True)])


def _cosines(text: Tensor) -> list[list[float]]:
    """Return the mean cosine of two experts' features of the same class (E, E)."""
    return (torch.einsum("acd,bcd->ab", text, text) / text.shape[1]).tolist()
