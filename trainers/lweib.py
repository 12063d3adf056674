"""LwEIB: Learning with Enriched Inductive Biases for Vision-Language Models.

Lingxiao Yang, Ru-Yuan Zhang, Qi Chen, Xiaohua Xie. IJCV 2025. https://doi.org/10.1007/s11263-025-02354-1

| paper | here |
|---|---|
| handcrafted prompts with descriptions of a language model | ``Convolutions.prompts``, ``DATASET.DESCRIPTIONS`` |
| depthwise convolutions at attention and MLP, both encoders | ``Convolutions.text``, ``Convolutions.image`` |
| slow-fast optimisation: s = ``ADAPTER_SCALE``, now and then gamma s | ``Convolutions.scales``, ``SLOW_FAST_RATIO`` |
| negative sampling of classes | ``SampledCosine``, ``NEG_SAMPLING_RATIO`` |

No prompt is learned. A block gets h + s conv(h) of h = ln_1(x) in front of attention, and u + s conv(u) of the MLP's first layer
u in front of its activation: along the positions of a text, over the grid of an image's patches. In training each class has one
sentence, drawn anew each step; at test its feature is the mean over all sentences.

The convolutions of a text look one token ahead, so that a class's words reach back into what stands in front of them: nothing is
shared between classes. Two tokens a block is how far they look, so prompts, classes of similar length together, are cut that far
behind the longest of them.

Deviations from the authors' code (github.com/ZjjConan/VLM-LwEIB, trainers/lweib.py): sentences come from a JSON file instead of
Python modules; text features are never kept from one evaluation to the next; token ids are never rounded to fp16. Draws are
theirs, from torch's CPU generator and in their order. In the last image block nobody reads what the MLP's convolution makes, so
it isn't computed, and its weight stays as it was.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from promptmix import register
from promptmix.clip import LayerAction, Prompts
from promptmix.config.declare import Setting, inherits
from promptmix.engine.layout import Layout, Rule
from promptmix.errors import ConfigError, SettingError
from promptmix.prompts.deep import check_depth
from promptmix.prompts.gradients import scaled
from promptmix.prompts.learner import Learner
from promptmix.prompts.roles import Head, PromptBank, Task
from promptmix.prompts.step import Step
from promptmix.prompts.trainer import PromptTrainer


class Pair(nn.Module):
    """The convolutions of one block: depthwise, kernel 3, zero padding, no bias, with PyTorch's usual start.

    Args:
        kind: ``nn.Conv1d`` for texts, ``nn.Conv2d`` for images.
        width: W of the tower.
    """

    def __init__(self, kind: type[nn.Conv1d] | type[nn.Conv2d], width: int) -> None:
        super().__init__()
        make = partial(kind, kernel_size=3, padding=1, bias=False)
        self.att = make(width, width, groups=width)
        self.mlp = make(4 * width, 4 * width, groups=4 * width)


class Convolutions(PromptBank):
    """Convolutions inside the blocks of both towers, in front of hand-written prompts with sentences about the classes.

    Raises:
        ConfigError: blocks are not in the towers, or patches are no square grid.
        DataError: classes lack sentences, or have not all as many.
    """

    def __init__(
        self,
        task: Task,
        text_ctx_init: Annotated[str, Setting("words in front of the class name")] = "a photo of a",
        adapter_start: Annotated[int, Setting("first block with convolutions, counted from 1", low=1)] = 1,
        adapter_end: Annotated[int, Setting("last block with convolutions", low=1)] = 12,
        adapter_scale: Annotated[float, Setting("s: factor on what is added", above=0)] = 0.025,
        adapter_scale_factor: Annotated[float, Setting("gamma: factor on s in fast updates", above=0)] = 2.5,
        slow_fast_ratio: Annotated[float, Setting("probability of a slow update, of each block and step", low=0, high=1)] = 0.8,
    ) -> None:
        super().__init__(task)
        if adapter_start > adapter_end:
            raise SettingError("adapter_start", adapter_start, f"but must be adapter_end ({adapter_end}) or less")
        check_depth(task.clip, "adapter_end", adapter_end, text=True, vision=True)
        self.words = text_ctx_init
        self.scale, self.factor, self.slow = adapter_scale, adapter_scale_factor, slow_fast_ratio
        self.side = math.isqrt(task.clip.image.patches)
        if self.side**2 != task.clip.image.patches:
            raise ConfigError(
                f"MODEL.BACKBONE.NAME is {task.clip.name} with {task.clip.image.patches} patches, which are not a square grid "
                "for convolutions; choose a backbone with square pictures such as ViT-B/16"
            )
        layers = [str(layer) for layer in range(adapter_start, adapter_end + 1)]
        self.text = nn.ModuleDict({layer: Pair(nn.Conv1d, task.clip.text.width) for layer in layers})
        self.image = nn.ModuleDict({layer: Pair(nn.Conv2d, task.clip.image.width) for layer in layers})
        self.sentences(task.classnames)  # a class that lacks them is named before anything is trained

    def sentences(self, names: Sequence[str]) -> tuple[tuple[str, ...], ...]:
        """Return the S sentences of each class."""
        return self.task.descriptions.of(names, same_number=True)

    def scales(self, depth: int) -> list[float]:
        """Return the factor of each of a tower's blocks: in training, s or gamma s by chance."""
        if not self.training:
            return [self.scale] * depth
        return [self.scale * (self.factor if torch.rand(1) > self.slow else 1.0) for _ in range(depth)]

    def actions(self, pairs: nn.ModuleDict, along: Callable[..., Tensor], depth: int, **known: Any) -> Mapping[int, LayerAction]:
        """Return what is added inside each block of one tower of which ``known`` is true."""
        scales = self.scales(depth)  # as the authors do, also of blocks without convolutions
        return {
            block: LayerAction(
                normed=partial(along, pair.att, scale=scales[block]),
                hidden=partial(along, pair.mlp, scale=scales[block]),
                **known,
            )
            for block, pair in ((int(layer) - 1, pair) for layer, pair in pairs.items())
        }

    def over_positions(self, convolution: nn.Module, x: Tensor, scale: float) -> Tensor:
        """Add a convolution along the positions of texts (E, C, L, W)."""
        flat = x.flatten(0, -3).transpose(1, 2)
        return x + scaled(convolution, flat, scale).transpose(1, 2).view_as(x)

    def over_grid(self, convolution: nn.Module, x: Tensor, scale: float) -> Tensor:
        """Add a convolution over the grid of patches to image tokens (B, 1 + M, W); the class token is left alone."""
        first, patches = x.split([1, x.shape[1] - 1], dim=1)
        grid = patches.transpose(1, 2).unflatten(2, (self.side, self.side))
        return torch.cat([first, patches + scaled(convolution, grid, scale).flatten(2).transpose(1, 2)], dim=1)

    def image_changes(self) -> dict[str, Any]:
        depth = self.task.clip.image.depth
        return {"actions": self.actions(self.image, self.over_grid, depth, spares_first=True)}

    def forward(self, names: Sequence[str], image_features: Tensor | None = None, *, full_stop: bool | None = None) -> Tensor:
        """Return normalised text features (1, C, D): in training of one sentence each, else the mean over all."""
        tower, rows = self.task.clip.text, self.sentences(names)
        if self.training:
            drawn = torch.randint(0, len(rows[0]), (1, len(names)))[0].tolist()
            rows = tuple((row[i],) for row, i in zip(rows, drawn, strict=True))
        return self.mean(names, rows, self.actions(self.text, self.over_positions, len(tower.blocks), ahead=2))

    def prompts(self, names: Sequence[str], sentences: Sequence[str]) -> Prompts:
        """Return the prompts ``words name, sentence`` of C classes, cut where the tower stops to read."""
        texts = [f"{self.words} {name.replace('_', ' ')}, {text}" for name, text in zip(names, sentences, strict=True)]
        return self.task.clip.text.compose_texts(texts, names, cut=True)

    def mean(self, names: Sequence[str], rows: Sequence[Sequence[str]], actions: Mapping[int, LayerAction] | None) -> Tensor:
        """Return the mean over all sentences of the normalised features, normalised again (1, C, D)."""
        tower = self.task.clip.text
        each = [F.normalize(tower(self.prompts(names, some), actions=actions), dim=-1) for some in zip(*rows, strict=True)]
        return F.normalize(torch.stack(each).mean(dim=0), dim=-1)

    def references(self, names: Sequence[str]) -> Tensor:
        """Return the mean over all sentences through the unchanged tower (1, C, D)."""
        return self.task.clip.encode_frozen(lambda: self.mean(names, self.sentences(names), None))


class SampledCosine(Head):
    """``s <f_b, t_c>``; in training, where there are more classes than pictures, of some classes: the others score -inf.

    Those are the classes of the batch, and for each of them ``ratio`` others drawn without replacement.

    Args:
        bank: of one expert.
        ratio: 0 takes no others, -1 all.
    """

    def __init__(self, task: Task, bank: PromptBank, ratio: int) -> None:
        super().__init__()
        self.ratio = ratio

    def forward(self, step: Step) -> Tensor:
        names = step.task.classnames
        classes = self.draw(step.labels, len(names)) if self.training and self.ratio >= 0 else None
        # Text first: its draws come first in the authors' code.
        text = step.text[0] if classes is None else step.bank([names[i] for i in classes.tolist()])[0]
        scores = step.scores(text)
        if classes is None:
            return scores
        return scores.new_full((len(scores), len(names)), -math.inf).index_copy(1, classes.to(scores.device), scores)

    def draw(self, labels: Tensor, count: int) -> Tensor | None:
        """Return the indices (C',) of the classes that are scored for labels (B,), or None for all ``count``."""
        if count <= len(labels):
            return None
        # Where nothing but shapes is known, as many as there can be.
        own = torch.arange(len(labels)) if labels.is_meta else labels.cpu().unique()
        if not self.ratio:
            return own
        others = torch.tensor([i for i in range(count) if i not in set(own.tolist())])
        taken = min(len(others), len(own) * self.ratio)
        return torch.cat([own, others[torch.multinomial(torch.ones(len(others)), taken)]])


@register
class LwEIB(PromptTrainer):
    """Convolutions in all blocks of both towers in front of described classes, trained with cross-entropy."""

    layout = Layout(
        "adapter_learner",
        tuple(
            Rule(f"{theirs}_adapter.{{i}}.{kind}_conv.conv.weight", f"bank.{ours}.{{i}}.{kind}.weight")
            for theirs, ours in (("text", "text"), ("visual", "image"))
            for kind in ("att", "mlp")
        ),
        unused=(r"tk_prompts", r"text_features_for_inference"),
    )

    @inherits(Convolutions)
    def compose(
        self,
        task: Task,
        neg_sampling_ratio: Annotated[int, Setting("other classes for each of the batch's; 0 = none, -1 = all", low=-1)] = 7,
        **convolutions: Any,
    ) -> Learner:
        bank = Convolutions(task, **convolutions)
        return Learner(task, bank, head=SampledCosine(task, bank, neg_sampling_ratio))
