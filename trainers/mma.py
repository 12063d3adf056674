"""MMA: Multi-Modal Adapter for Vision-Language Models.

Lingxiao Yang, Ru-Yuan Zhang, Yanchen Wang, Xiaohua Xie. CVPR 2024.

| paper | here |
|---|---|
| A_k, adapters of the layers k ... L in both encoders | ``SharedAdapters``, blocks ``ADAPTER_START`` to ``ADAPTER_END`` |
| W_down, W_up of one tower, W_shared of both | ``Adapter.down``, ``Adapter.up``, ``SharedAdapters.shared`` |
| x + alpha A_k(x), alpha = 0.001 | ``SharedAdapters.actions``, ``ADAPTER_SCALE`` |

y = alpha up(relu(shared(relu(down(ln_1(x)))))) of a block's input is added to what leaves the block. Each token is changed on its
own, so that the text tower stays prefix-shared. Block 0 adds alpha up(relu(shared(relu(down(x))))) to the word embeddings, before
their positions, and to what enters the image tower's first block.

As in the authors' code (github.com/ZjjConan/Multi-Modal-Adapter, trainers/mma.py), weights are trained as if alpha were 1, but
for block 0's: their gradients are divided by it, the inputs' are true. Deviation: text features are never kept from one
evaluation to the next.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any

import torch.nn.functional as F
from torch import Tensor, nn

from promptmix import register
from promptmix.clip import ImageTower, LayerAction, TextTower
from promptmix.config.declare import Setting, inherits
from promptmix.engine.layout import Layout, linear
from promptmix.prompts.deep import check_depth
from promptmix.prompts.gradients import scaled
from promptmix.prompts.heads import Cosine
from promptmix.prompts.learner import Learner
from promptmix.prompts.roles import PromptBank, Task
from promptmix.prompts.trainer import PromptTrainer

#: The block in front of the first.
ENTRY = "0"


class Adapter(nn.Module):
    """The maps of one tower and block, in front of and behind the shared one; weights start Kaiming-normal, biases at zero.

    Args:
        width: W of the tower.
        hidden: width between.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.down, self.up = _kaiming(width, hidden), _kaiming(hidden, width)


@register
class SharedAdapters(PromptBank):
    """Adapters in the last blocks of both towers, in front of a hand-written prompt."""

    def __init__(
        self,
        task: Task,
        adapter_start: Annotated[int, Setting("first block with adapters, counted from 1; 0 = what enters it too", low=0)] = 5,
        adapter_end: Annotated[int, Setting("last block with adapters", low=1)] = 12,
        adapter_dim: Annotated[int, Setting("width between", low=1)] = 32,
        adapter_scale: Annotated[float, Setting("alpha: factor on what is added", above=0)] = 0.001,
        text_ctx_init: Annotated[str, Setting("words in front of the class name")] = "a photo of a",
    ) -> None:
        super().__init__(task)
        check_depth(task.clip, "adapter_end", adapter_end, text=True, vision=True)
        self.scale, self.template = adapter_scale, f"{text_ctx_init.replace('_', ' ')} {{}}."
        layers = [str(layer) for layer in range(adapter_start, adapter_end + 1)]
        self.text = nn.ModuleDict({layer: Adapter(task.clip.text.width, adapter_dim) for layer in layers})
        self.visual_adapters = nn.ModuleDict({layer: Adapter(task.clip.image.width, adapter_dim) for layer in layers})
        self.shared = nn.ModuleDict({layer: _kaiming(adapter_dim, adapter_dim) for layer in layers})

    def actions(self, adapters: nn.ModuleDict, tower: TextTower | ImageTower) -> Mapping[int, LayerAction]:
        """Return what is added behind each adapted block of one tower."""

        def added(layer: str) -> LayerAction:
            norm = tower.first_norm(int(layer) - 1)

            def after(x: Tensor, out: Tensor) -> Tensor:
                return out + scaled(lambda h: self.adapted(adapters, layer, h), norm(x), self.scale)

            return LayerAction(after=after, per_token=True)

        return {int(layer) - 1: added(layer) for layer in adapters if layer != ENTRY}

    def adapted(self, adapters: Any, layer: str, x: Tensor) -> Tensor:
        """Return A_k of tokens (..., W) without alpha."""
        hidden = F.relu(self.shared[layer](F.relu(adapters[layer].down(x))))
        out: Tensor = adapters[layer].up(hidden)
        return out

    def entering(self, adapters: nn.ModuleDict, x: Tensor) -> Tensor:
        """Return what enters a tower's first block in the place of ``x`` (..., W)."""
        return x + self.scale * self.adapted(adapters, ENTRY, x) if ENTRY in adapters else x

    def image_changes(self) -> dict[str, Any]:
        actions = self.actions(self.visual_adapters, self.task.clip.image)
        if ENTRY in self.visual_adapters:
            first = actions.get(0, LayerAction(per_token=True))
            actions = {**actions, 0: replace(first, before=lambda x: self.entering(self.visual_adapters, x))}
        return {"actions": actions}

    def encode(self, names: Sequence[str], *, full_stop: bool | None = None) -> Tensor:
        tower = self.task.clip.text
        prompts = tower.compose_text(self.template, names)
        prefix, tail = (self.entering(self.text, x) for x in (prompts.prefix, prompts.tail))
        return tower(replace(prompts, prefix=prefix, tail=tail), actions=self.actions(self.text, tower))

    def references(self, names: Sequence[str]) -> Tensor:
        """Return the hand-written prompt's features (1, C, D) through the unchanged tower."""
        return self.task.clip.hard_features([self.template], names)


def _kaiming(width_in: int, width_out: int) -> nn.Linear:
    layer = nn.Linear(width_in, width_out)
    nn.init.kaiming_normal_(layer.weight, mode="fan_out")
    nn.init.zeros_(layer.bias)
    return layer


@register
class MMA(PromptTrainer):
    """Adapters with a shared middle in the last blocks of both towers, trained with cross-entropy."""

    published_as = ("MultiModalAdapter",)
    published_keys = {"TRAINER.MMADAPTER.*": "*"}
    layout = Layout(
        "adapter_learner",
        tuple(
            rule
            for tower, ours in (("text", "text"), ("visual", "visual_adapters"))
            for theirs, name in (("down.0", "down"), ("up", "up"))
            for rule in linear(f"{tower}_adapter.{{i}}.{theirs}", f"bank.{ours}.{{i}}.{name}")
        )
        + linear("shared_adapter.{i}.0", "bank.shared.{i}"),
        unused=(r"token_embedding.*",),
    )

    @inherits(SharedAdapters)
    def compose(self, task: Task, **adapters: Any) -> Learner:
        bank = SharedAdapters(task, **adapters)
        return Learner(task, bank, head=Cosine(task, bank))
