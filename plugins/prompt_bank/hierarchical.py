"""Deep prompts of both towers that change each other (HiCroPL, arXiv 2507.14976).

The bank reads sentences about the classes and is offered by its method alone.
W and V are the widths of the two towers, n the tokens of a layer, D the joint width.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Sequence
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from open_clip.transformer import QuickGELU
from torch import Tensor, nn

from promptmix.clip.vision import VisualPrompts
from promptmix.config.declare import Setting
from promptmix.errors import ConfigError, SettingError
from promptmix.prompts.deep import DeepBank, TextPrompts, VisionPrompts, check_depth, replace_each_layer, start_words
from promptmix.prompts.roles import PromptBank, Task

HEADS = 8
MAPPINGS = ("learned", "written")


class Pooling(nn.Module):
    """ln_2(q + attention(ln_1 q, ln_1 P)): what a proxy token q (1, W) reads from the prompts P (n, W) of a layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(width, HEADS)
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, proxy: Tensor, prompts: Tensor) -> Tensor:
        """Return one vector (1, W)."""
        seen = self.ln_1(prompts)
        return self.ln_2(proxy + self.attn(self.ln_1(proxy), seen, seen, need_weights=False)[0])


class Mapper(nn.Module):
    """Prompts of one tower (N, W), changed by vectors (M, V) of the other: attention and feed-forward on linear maps of both."""

    def __init__(self, width: int, other: int) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(width, HEADS)
        self.linear_q, self.linear_k, self.linear_v = nn.Linear(width, width), nn.Linear(other, width), nn.Linear(other, width)
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        parts = (("c_fc", nn.Linear(width, 4 * width)), ("gelu", QuickGELU()), ("c_proj", nn.Linear(4 * width, width)))
        self.ffn = nn.Sequential(OrderedDict(parts))

    def forward(self, prompts: Tensor, vectors: Tensor) -> Tensor:
        """Return the changed prompts (N, W)."""
        asks, keys, values = self.linear_q(prompts), self.linear_k(vectors), self.linear_v(vectors)
        asks = asks + self.attn(self.ln_1(asks), self.ln_1(keys), self.ln_1(values), need_weights=False)[0]
        return asks + self.ffn(self.ln_2(asks))


class Hierarchical(DeepBank):
    """Prompts of both towers: those of the image tower follow the text's in early layers, the other way round in later ones.

    Raises:
        ConfigError: prompts are deeper than a tower, the image tower takes none, or the words have too few tokens.
        DataError: there are no sentences about a class.
    """

    needs_frozen_image = True

    def __init__(
        self,
        task: Task,
        n_ctx: Annotated[int, Setting("learned tokens of each layer, in both towers", low=1)] = 16,
        ctx_init: Annotated[str, Setting('words before the class name; "" = random tokens alone')] = "",
        prompt_depth: Annotated[int, Setting("layers with tokens of their own, from the first", low=2)] = 12,
        cross_layer: Annotated[int, Setting("layers, from the first, where text prompts change image prompts", low=1)] = 6,
        mapping: Annotated[str, Setting("written: as published, each pass overwrites prompts", choices=MAPPINGS)] = "learned",
    ) -> None:
        check_depth(task.clip, "prompt_depth", prompt_depth, text=True, vision=True)
        if cross_layer >= prompt_depth:
            remedy = f"but layers above it change text prompts; set it below PROMPT_DEPTH {prompt_depth}"
            raise SettingError("cross_layer", cross_layer, remedy)
        text, image = task.clip.text.width, task.clip.image.width
        if text % HEADS or image % HEADS:
            raise ConfigError(
                f"MODEL.BACKBONE.NAME is {task.clip.name}, whose tokens have {text} and {image} numbers; HiCroPL's attention has "
                f"{HEADS} heads, so take a backbone whose widths are multiples of {HEADS}"
            )
        start, words = start_words(task.clip, n_ctx, ctx_init)
        super().__init__(task, TextPrompts(task, start, words, prompt_depth))
        self.cross_layer, self.written = cross_layer, mapping == "written"
        self.vision = VisionPrompts(image, n_ctx, prompt_depth)
        with torch.no_grad():
            for layer in self.vision.layers[1:]:
                layer.copy_(self.vision.layers[0])
        self.to_visual, self.to_text = Mapper(image, text), Mapper(text, image)
        self.text_pooling, self.text_proxy = _pooled(text, cross_layer)
        self.visual_pooling, self.visual_proxy = _pooled(image, prompt_depth - cross_layer)
        if self.written:
            mappers = self.to_visual, self.to_text, self.text_pooling, self.visual_pooling, self.text_proxy, self.visual_proxy
            for part in mappers:
                part.requires_grad_(False)
        self.references(task.classnames)

    def mapped_visual(self) -> Tensor:
        """Return the image prompts of the early layers (CROSS_LAYER, n, W), changed by the text's."""
        early = self.text.layers[: self.cross_layer]
        return _mapped(self.to_visual, self.vision.layers[: self.cross_layer], self.text_pooling, self.text_proxy, early)

    def mapped_text(self) -> Tensor:
        """Return the text prompts of the later layers (J - CROSS_LAYER, n, W), changed by the image's."""
        late = self.vision.layers[self.cross_layer :]
        return _mapped(self.to_text, self.text.layers[self.cross_layer :], self.visual_pooling, self.visual_proxy, late)

    @torch.no_grad()
    def write(self) -> None:
        """Overwrite the prompts by what they are mapped to, as the authors' code does before each pass."""
        image, text = self.mapped_visual(), self.mapped_text()
        for prompts, mapped in ((self.vision.layers[: self.cross_layer], image), (self.text.layers[self.cross_layer :], text)):
            for old, new in zip(prompts, mapped, strict=True):
                old.copy_(new)

    def visual(self) -> Sequence[VisualPrompts]:
        early = [] if self.written else [*self.mapped_visual()]
        return replace_each_layer([*early, *list(self.vision.layers)[len(early) :]])

    def forward(
        self,
        names: Sequence[str],
        image_features: Tensor | None = None,
        *,
        full_stop: bool | None = None,
        experts: Tensor | None = None,
    ) -> Tensor:
        """Return normalised text features (1, C, D) with those of the sentences added."""
        layers = None if self.written else [*self.text.layers[: self.cross_layer], *self.mapped_text()]
        text = F.normalize(self.text.encode(names, full_stop=full_stop, experts=experts, layers=layers), dim=-1)
        return F.normalize(text + self.references(names).to(text.dtype), dim=-1)

    encode = PromptBank.encode  # type: ignore[assignment]  # the sum is all there is

    def join(self, image: Tensor, frozen: Tensor) -> Tensor:
        """Return normalised image features (B, D) with those of the frozen tower added."""
        return F.normalize(image + frozen.to(image.dtype), dim=-1)

    def references(self, names: Sequence[str]) -> Tensor:
        """Return the normalised mean (1, C, D) of the sentences' normalised features, encoded once for a set of names."""

        def described() -> Tensor:
            rows = self.task.descriptions.of(names)
            features = self.task.clip.text_features([text for row in rows for text in row]).split([len(row) for row in rows])
            return F.normalize(torch.stack([some.mean(dim=0) for some in features]), dim=-1)[None]

        return self.once("described", names, described)


def _pooled(width: int, layers: int) -> tuple[nn.ModuleList, nn.ParameterList]:
    """Return a pooling and a proxy token for each of some layers, all with one start."""
    pooling, proxy = Pooling(width), torch.randn(1, width)
    return nn.ModuleList(copy.deepcopy(pooling) for _ in range(layers)), nn.ParameterList(proxy.clone() for _ in range(layers))


def _mapped(mapper: nn.Module, prompts: Any, poolings: Any, proxies: Any, others: Any) -> Tensor:
    """Return prompts (layers, n, W) that ask one vector of each layer of the other tower; all layers are one sequence."""
    vectors = torch.cat([pool(proxy, other) for pool, proxy, other in zip(poolings, proxies, others, strict=True)])
    together = torch.stack(list(prompts))
    changed: Tensor = mapper(together.flatten(0, 1), vectors)
    return changed.view_as(together)
