"""Tensors of the towers learned from where they are, in front of a hand-written prompt: layer norms, biases, or all of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Any

from torch import Tensor, nn

from promptmix import register
from promptmix.clip import ImageTower, Weights
from promptmix.config.declare import Setting
from promptmix.errors import ConfigError, SettingError
from promptmix.prompts.changed import ENCODERS, ChangedTowers
from promptmix.prompts.roles import Task

TENSORS = ("norms", "biases", "all")
#: What stands for the blocks of a ResNet.
_STAGES = ("layer1", "layer2", "layer3", "layer4", "attnpool")
#: Where a tower ends: what stands behind its blocks, by the first part of a name (CLIP's own towers, timm's).
_BEHIND = ("ln_post", "ln_final", "proj", "text_projection", "norm", "fc_norm", "head", "attn_pool")


@register
class TunedTowers(ChangedTowers):
    """Chosen tensors of the towers, with the values that training gives them, in front of a hand-written prompt.

    ``norms`` are weights and biases of the layer norms inside the blocks; ``biases`` those of every module that has one (norms,
    output projections, MLPs; not the fused one of queries, keys and values), the norms around the blocks included; ``all`` is
    every tensor but the token embeddings. Decay pulls the values themselves to zero, as in a tower that is trained itself.

    Args:
        vision_start: first block of the image tower, counted from 0; what stands in front of them counts as block 0. Those of a
            ResNet are its four stages and its attention pool.
    """

    def __init__(
        self,
        task: Task,
        tensors: Annotated[str, Setting("what is learned", choices=TENSORS)] = "norms",
        encoder: Annotated[str, Setting("which tower learns", choices=tuple(ENCODERS))] = "both",
        vision_start: Annotated[int, Setting("first block of the image tower that learns, from 0", low=0)] = 0,
        text_start: Annotated[int, Setting("first block of the text tower that learns, from 0", low=0)] = 0,
        templates: Annotated[Sequence[str], Setting("the hand-written prompt; () = the data set's first")] = (),
    ) -> None:
        super().__init__(task, encoder, templates)
        # By tower, names with slashes for dots, which a parameter's name can't have.
        self.values = nn.ModuleDict()
        starts = {"text": ("text_start", text_start), "image": ("vision_start", vision_start)}
        for name in self.towers:
            chosen = _chosen(getattr(task.clip, name), tensors, *starts[name], task)
            copies = {key.replace(".", "/"): nn.Parameter(held.detach().clone()) for key, held in chosen}
            self.values[name] = nn.ParameterDict(copies)

    def weights(self, tower: str) -> Weights:
        """Return how the learned values of ``text`` or ``image`` differ from the frozen ones, by their names in that tower."""
        held = dict(getattr(self.task.clip, tower).named_parameters())
        values = {name.replace("/", "."): value for name, value in self.values[tower].named_parameters()}
        return {name: value - held[name] for name, value in values.items()}


def _chosen(tower: Any, tensors: str, setting: str, start: int, task: Task) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters of a tower, by name, that learn."""
    image = isinstance(tower, ImageTower)
    blocks = blocks_of(tower)
    if image and (start and not blocks or tensors != "all" and not tower.takes_prompts):
        raise ConfigError(
            f"MODEL.BACKBONE.NAME is {task.clip.name}, whose image tower ({type(tower.visual).__name__}) has no blocks to choose "
            "from; set ENCODER to text, or choose a vision transformer such as ViT-B/16 or tiny-vit"
        )
    if blocks and start >= len(blocks):
        raise SettingError(setting, start, f"but the tower of {task.clip.name} has {len(blocks)} blocks; give less")
    block_of = {id(part): i for i, block in enumerate(blocks) for part in block.modules()}
    for place, module in tower.named_modules():
        block, norm = block_of.get(id(module)), isinstance(module, nn.LayerNorm)
        for name, held in module.named_parameters(place, recurse=False):
            chosen = {
                "norms": norm and block is not None,
                "biases": name.endswith(".bias") and (norm or block is not None),
                "all": not name.startswith("token_embedding"),
            }[tensors]
            if chosen and (_outside(name, len(blocks)) if block is None else block) >= start:
                yield name, held


def blocks_of(tower: Any) -> list[nn.Module]:
    """Return the blocks of a tower, or the parts that stand for them; none where it has neither."""
    if not isinstance(tower, ImageTower):
        return list(tower.blocks)
    if tower.layers is not None and tower.takes_prompts:
        return list(tower.layers.blocks)
    parts = [getattr(tower.visual, name, None) for name in _STAGES]
    return [part for part in parts if isinstance(part, nn.Module)] if all(parts) else []


def _outside(name: str, depth: int) -> int:
    """Return 0 for what stands in front of a tower's blocks, its depth for what stands behind them."""
    return depth if name.removeprefix("visual.").removeprefix("trunk.").partition(".")[0] in _BEHIND else 0
