"""Deep prompts: learned tokens per layer of both towers, as schedules of tensors that banks put together.

Layer 0 is the input. A prompt of depth J has tokens for the layers 0 ... J-1; before each of the layers 1 ... J-1 they replace
those that came out of the layer below. W is the width of a tower, n the tokens of a layer, E the number of prompts, B images,
C classes, D joint width.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from promptmix.clip import CLIP
from promptmix.clip.model import unit
from promptmix.clip.vision import PromptStep, VisualPrompts
from promptmix.errors import ConfigError, SettingError
from promptmix.prompts.roles import ManyPrompts, Task

#: Standard deviation of tokens that start at random, in all methods.
STD = 0.02


def start_words(clip: CLIP, n_ctx: int, words: str, setting: str = "n_ctx", n_prompts: int = 1) -> tuple[Tensor, tuple[int, ...]]:
    """Return where contexts start from: the first from the first ``n_ctx`` tokens of ``words``, which then are learned.

    Args:
        clip: the frozen model.
        n_ctx: n, learned tokens.
        words: such as "a photo of a"; "" starts at random.
        setting: the setting that gives ``n_ctx``, for the message.
        n_prompts: E; prompts after the first start at random, so that they can differ.

    Returns:
        The start (n, W) of one prompt or (E, n, W) of several, and the ids of the other tokens of ``words``, which stay as they
        are between context and class name.

    Raises:
        ConfigError: ``words`` has fewer than ``n_ctx`` tokens.
    """
    tower = clip.text
    ids = tower.tokenizer.encode(words.replace("_", " ")) if words else ()
    if words and n_ctx > len(ids):
        raise SettingError(
            setting,
            n_ctx,
            f"but ctx_init {words!r} has only {len(ids)} tokens to start from; "
            f"set {setting.upper()} to {len(ids)} or less, or CTX_INIT to '' for a random start",
        )
    first = tower.embed(ids[:n_ctx]).cpu() if words else torch.empty(n_ctx, tower.width).normal_(std=STD)
    if n_prompts == 1:
        return first, tuple(ids[n_ctx:])
    others = torch.empty(n_prompts - 1, *first.shape).normal_(std=STD)
    return torch.cat([first[None], others]), tuple(ids[n_ctx:])


def check_depth(clip: CLIP, setting: str, depth: int, *, text: bool = False, vision: bool = False) -> None:
    """Refuse prompts deeper than a tower.

    Args:
        clip: the frozen model.
        setting: the setting that gives ``depth``, for the message.
        depth: J.
        text: the text tower gets prompts of this depth.
        vision: the image tower does.

    Raises:
        ConfigError: a tower has fewer layers, or the image tower is not a vision transformer; the message names the remedy.
    """
    towers = {"text": len(clip.text.blocks)} if text else {}
    if vision:
        if not clip.image.takes_prompts:
            raise ConfigError(
                f"MODEL.BACKBONE.NAME is {clip.name}, whose image tower ({type(clip.image.visual).__name__}) takes no prompts, "
                f"which {setting.upper()} asks for; choose a vision transformer such as ViT-B/16 or tiny-vit"
            )
        towers["image"] = clip.image.depth
    for tower, layers in towers.items():
        if depth > layers:
            raise SettingError(
                setting, depth, f"but the {tower} tower of {clip.name} has {layers} layers; set it to {layers} or less"
            )


class TextPrompts(nn.Module):
    """Prompts ``[SOT] [ctx] words class name . [EOT]`` whose n context tokens are learned anew for each of the first layers.

    Args:
        start: (n, W) for one prompt or (E, n, W), where the context at the input starts from; deeper ones start at random.
        words: ids of fixed tokens between context and class name.
        depth: J, layers with tokens of their own.
    """

    def __init__(self, task: Task, start: Tensor, words: Sequence[int] = (), depth: int = 1) -> None:
        super().__init__()
        self.task, self.words = task, tuple(words)
        self.ctx = nn.Parameter(start.clone())
        self.deeper = nn.ParameterList(nn.Parameter(torch.empty_like(start).normal_(std=STD)) for _ in range(depth - 1))

    @property
    def layers(self) -> list[Tensor]:
        """The context of each layer, first to last: J tensors (n, W) or (E, n, W)."""
        return [self.ctx, *self.deeper.parameters()]  # a list's own iterator can't be compiled by PyTorch 2.11

    @property
    def num_experts(self) -> int:
        """Number of prompts E."""
        return len(self.ctx) if self.ctx.dim() == 3 else 1

    def forward(self, names: Sequence[str], *, full_stop: bool | None = None, experts: Tensor | None = None) -> Tensor:
        """Return normalised text features (E, C, D) of C class names; prompts end with a full stop unless it is False."""
        return unit(self.encode(names, full_stop=full_stop, experts=experts))

    def encode(
        self,
        names: Sequence[str],
        *,
        full_stop: bool | None = None,
        experts: Tensor | None = None,
        layers: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """Return text features (E, C, D) as they come from the tower; ``layers`` stand in for the prompts' own."""
        tower, given = self.task.clip.text, self.layers if layers is None else layers
        context, *deeper = given if experts is None else (_with_experts(layer)[experts] for layer in given)
        stop = tower.tokenizer.encode("." if full_stop in (None, True) else "")
        fixed, end = (tower.embed(ids)[None] for ids in (self.words, stop))
        prompts = tower.compose(_with_experts(context), fixed, tower.tokenizer.class_tokens(names), end)
        return tower(prompts, dict(enumerate(deeper, start=1)))


class VisionPrompts(nn.Module):
    """Tokens of the image tower, n for each of the first J layers, replaced from layer to layer; they start at random.

    Args:
        width: W of the image tower.
        n_ctx: n.
        depth: J.
        n_prompts: E.
    """

    def __init__(self, width: int, n_ctx: int, depth: int, n_prompts: int = 1) -> None:
        super().__init__()
        size = (n_ctx, width) if n_prompts == 1 else (n_prompts, n_ctx, width)
        self.layers = nn.ParameterList(nn.Parameter(torch.empty(size).normal_(std=STD)) for _ in range(depth))

    def forward(self) -> list[VisualPrompts]:
        """Return a schedule for the image tower, for each prompt."""
        return replace_each_layer(list(self.layers))


def replace_each_layer(tokens: Sequence[Tensor]) -> list[VisualPrompts]:
    """Return the schedules that append the first of J tensors (n, W) at the input and then replace it before each layer.

    Args:
        tokens: (n, W) for one schedule, (E, n, W) for E of them.
    """
    if tokens[0].dim() == 3:
        return [schedule for rows in zip(*tokens, strict=True) for schedule in replace_each_layer(rows)]
    return [{i: PromptStep(new, remove=tokens[i - 1].shape[-2] if i else 0) for i, new in enumerate(tokens)}]


def linear_maps(widths: tuple[int, int], count: int, *, clones: bool) -> nn.ModuleList:
    """Return ``count`` linear maps.

    Args:
        widths: of input and output.
        count: how many.
        clones: all start as copies of one, as in the code of MaPLe's authors; otherwise each has a start of its own.
    """
    if not clones:
        return nn.ModuleList(nn.Linear(*widths) for _ in range(count))
    one = nn.Linear(*widths)
    return nn.ModuleList(copy.deepcopy(one) for _ in range(count))


class DeepBank(ManyPrompts):
    """What banks with deep text prompts share; ``text`` holds these, ``visual`` says what the image tower gets.

    Args:
        text: the text tower's prompts.
    """

    def __init__(self, task: Task, text: TextPrompts) -> None:
        super().__init__(task)
        self.text = text

    @property
    def num_experts(self) -> int:
        """Number of prompts E."""
        return self.text.num_experts

    def encode(self, names: Sequence[str], *, full_stop: bool | None = None, experts: Tensor | None = None) -> Tensor:
        """Return text features (E, C, D) as they come from the tower."""
        return self.text.encode(names, full_stop=full_stop, experts=experts)


def _with_experts(layer: Tensor) -> Tensor:
    """Give a context (n, W) its expert axis: (1, n, W)."""
    return layer if layer.dim() == 3 else layer[None]
