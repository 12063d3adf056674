"""Template groups: each group of similar hard templates is an expert (MoCoOp, arXiv 2409.12011, section 3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from promptmix import register
from promptmix.clip import split_template
from promptmix.config.declare import Setting
from promptmix.prompts.roles import ManyPrompts, Task


@register
class TemplateGroups(ManyPrompts):
    """Soft prompts that start from the first template of each group, with context before and after the class name.

    Args:
        count_words: learn as many vectors as the authors' code, which counts words: of "itap of a" all tokens but the last, and
            behind the name EOT too where no comma follows it ("{} texture.").
    """

    retired = {
        "TEMPLATES": "write them group by group into DATASET.TEMPLATE_GROUPS: [[a photo of a {}., ...], [...]]",
        "GROUPS": "DATASET.TEMPLATE_GROUPS holds the templates group by group",
    }

    def __init__(
        self,
        task: Task,
        correction: Annotated[bool, Setting("learn a vector w that is added to all text features, not normalised yet")] = True,
        count_words: Annotated[bool, Setting("as many vectors as words, as the authors' code and checkpoints have")] = False,
    ) -> None:
        super().__init__(task)
        self.groups = task.template_groups
        tower = task.clip.text
        before, after = [], []
        #: Of each expert, the ids between its first vectors and the class name, and whether its last vector stands for EOT.
        self.edges: list[tuple[tuple[int, ...], bool]] = []
        for group in self.groups:
            texts = split_template(group[0].rstrip(".").rstrip())
            ids = [tuple(tower.tokenizer.encode(text)) for text in texts]
            counts = [_words(part) for part in group[0].replace(".", "").split("{}")] if count_words else list(map(len, ids))
            last = (*ids[1], *tower.tokenizer.after)[: counts[1]]
            before.append(nn.Parameter(tower.embed(ids[0][: counts[0]]).clone()))
            after.append(nn.Parameter(tower.embed(last).clone()))
            self.edges.append((ids[0][counts[0] :], len(last) > len(ids[1])))
        self.before, self.after = nn.ParameterList(before), nn.ParameterList(after)
        self.correction = nn.Parameter(torch.zeros(1, task.clip.embed_dim)) if correction else None

    @property
    def num_experts(self) -> int:
        return len(self.groups)

    @property
    def expert_names(self) -> tuple[str, ...]:
        """The template that each expert started from, behind its number."""
        return tuple(f"{i} {group[0]}" for i, group in enumerate(self.groups, start=1))

    def encode(self, names: Sequence[str], *, full_stop: bool | None = None, experts: Tensor | None = None) -> Tensor:
        """Return text features (E, C, D), corrected; prompts have no full stop unless ``full_stop`` is True."""
        tower = self.task.clip.text
        tokens = tower.tokenizer.class_tokens(names)
        chosen = range(self.num_experts) if experts is None else experts.tolist()
        features: dict[int, Tensor] = {}
        # Experts whose contexts have the same lengths go through the tower together.
        for group in self._by_length().values():
            members = [i for i in group if i in chosen]
            if not members:
                continue
            before = torch.stack([self.before[i] for i in members])
            after = torch.stack([self.after[i] for i in members])
            fixed, is_end = self.edges[members[0]]
            # A last vector that stands for EOT stands for the full stop where there is one, and EOT follows.
            stop = self.stop(bool(full_stop) and not is_end)
            is_end = is_end and not full_stop
            prompts = tower.compose(before, tower.embed(fixed)[None], tokens, after, stop, ends=not is_end)
            for i, feature in zip(members, tower(prompts), strict=True):
                features[i] = feature
        stacked = torch.stack([features[i] for i in chosen])
        idle = [p for i in range(self.num_experts) if i not in features for p in (self.before[i], self.after[i])]
        if idle and self.idle_learn:
            stacked = stacked + 0.0 * torch.stack([p.sum() for p in idle]).sum()
        return stacked if self.correction is None else stacked + self.correction

    def references(self, names: Sequence[str]) -> Tensor:
        """Return group prototypes P (E, C, D): the mean of the group's normalised hard features, normalised again."""
        groups = [[_with_stop(template) for template in group] for group in self.groups]
        return self.once("hard", names, lambda: torch.stack([self.task.clip.ensemble(group, names) for group in groups]))

    def _by_length(self) -> dict[Any, list[int]]:
        found: dict[Any, list[int]] = {}
        for i, pair in enumerate(zip(self.before, self.after, strict=True)):
            found.setdefault((len(pair[0]), len(pair[1]), self.edges[i]), []).append(i)
        return found


def _words(text: str) -> int:
    """Count words as the authors' code does: a space in front of the first makes one more, one behind the last none."""
    return len(text.removesuffix(" ").split(" ")) if text.strip() else 0


def _with_stop(template: str) -> str:
    return template if template.endswith(".") else template + "."
