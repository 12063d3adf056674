"""The frozen vision-language model that every method prompts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from promptmix.clip.blocks import by_hand
from promptmix.clip.places import LayerAction, Weights
from promptmix.clip.text import TextTower
from promptmix.clip.tokens import Tokenizer
from promptmix.clip.vision import ImageTower, TokenKind, VisualPrompts

if TYPE_CHECKING:
    from promptmix.clip.encoder import EncoderTower


def text_tower(model: open_clip.CLIP | open_clip.CustomTextCLIP, tokenizer: Tokenizer) -> TextTower | EncoderTower:
    """Return the text tower of an open_clip model, taking prompts as embeddings."""
    source = getattr(model, "text", None)
    if type(source).__name__ == "HFTextEncoder":
        from promptmix.clip.encoder import EncoderTower

        return EncoderTower(source, tokenizer)
    return TextTower(model, tokenizer)


class CLIP(nn.Module):
    """A frozen CLIP: image tower, text tower, and the temperature between them.

    Args:
        model: an open_clip model; its parameters are frozen here and it is put into evaluation mode.
        tokenizer: its tokenizer.
        name: the backbone's name, for messages and results.
        mean: pixel mean per channel that the model expects.
        std: pixel standard deviation per channel.
        image_size: input height and width in pixels.
        interpolation: how its pictures were resized in training.

    Raises:
        ConfigError: the text tower can't be prompted (see ``TextTower``).
    """

    logit_scale: nn.Parameter
    logit_bias: nn.Parameter | None  # SigLIP's: what is added to scaled cosines before its sigmoid

    def __init__(
        self,
        model: open_clip.CLIP | open_clip.CustomTextCLIP,
        tokenizer: Tokenizer,
        name: str,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        image_size: int,
        interpolation: str = "bicubic",
    ) -> None:
        super().__init__()
        self.name = name
        self.mean, self.std = tuple(mean), tuple(std)
        self.image_size, self.interpolation = image_size, interpolation
        self.text = cast("TextTower", text_tower(model, tokenizer))  # an encoder takes the same calls
        self.image = ImageTower(model.visual)
        self.logit_scale = model.logit_scale
        self.logit_bias = getattr(model, "logit_bias", None)
        #: Whether what no learned tensor touches is computed in inference mode; otherwise it just keeps no graph.
        self.infers_frozen = True
        self.requires_grad_(False)
        self.eval()

    @property
    def tokenizer(self) -> Tokenizer:
        """The text tower's tokenizer."""
        return self.text.tokenizer

    @property
    def embed_dim(self) -> int:
        """Width D of the joint space."""
        return self.text.embed_dim

    @property
    def scale(self) -> Tensor:
        """The factor on cosines, s = exp(logit_scale)."""
        return self.logit_scale.exp()

    @property
    def bias(self) -> Tensor | None:
        """What is added to scaled cosines; the same for every class, so it matters to sigmoids, not to a softmax."""
        return self.logit_bias

    def with_bias(self, scores: Tensor) -> Tensor:
        """Add ``bias`` to scores, where the model has one."""
        return scores if self.logit_bias is None else scores + self.logit_bias

    def train(self, mode: bool = True) -> CLIP:
        """Stay in evaluation mode: batch norms and dropout of a frozen model must not move."""
        return super().train(False)

    def encode_image(
        self,
        images: Tensor,
        prompts: VisualPrompts | None = None,
        *,
        weights: Weights | None = None,
        actions: Mapping[int, LayerAction] | None = None,
    ) -> Tensor:
        """Return normalised image features (B, D) of images (B, 3, S, S); see ``ImageTower.forward``."""
        return unit(self.image(images, prompts, weights=weights, actions=actions))

    def encode_both(
        self,
        images: Tensor,
        prompts: VisualPrompts | None = None,
        *,
        weights: Weights | None = None,
        actions: Mapping[int, LayerAction] | None = None,
        tokens: TokenKind = "patches",
    ) -> tuple[Tensor, Tensor]:
        """Return normalised features of images (B, D) and of their patches (B, M, D) from one pass (``ImageTower.forward``)."""
        image, patches = self.image(images, prompts, weights=weights, actions=actions, tokens=tokens)
        return F.normalize(image, dim=-1), F.normalize(patches, dim=-1)

    def encode_tokens(
        self,
        images: Tensor,
        prompts: VisualPrompts | None = None,
        *,
        weights: Weights | None = None,
        actions: Mapping[int, LayerAction] | None = None,
        tokens: TokenKind = "patches",
    ) -> Tensor:
        """Return normalised features (B, M, D) of the patches of images (B, 3, S, S); see ``ImageTower.forward``."""
        return self.encode_both(images, prompts, weights=weights, actions=actions, tokens=tokens)[1]

    def encode_frozen(self, encode: Callable[[], Tensor]) -> Tensor:
        """Return what ``encode`` computes from frozen weights alone: in inference mode, but as a tensor that a loss may keep."""
        if torch.compiler.is_compiling():  # which knows no inference mode, and sees for itself what needs no graph
            with torch.no_grad():
                return encode()
        with torch.inference_mode() if self.infers_frozen else torch.no_grad():
            features = encode()
        return features.clone()  # small; a tensor of inference mode itself may not meet one that learns

    def hard_features(self, templates: Sequence[str], names: Sequence[str]) -> Tensor:
        """Return the normalised features (P, C, D) of P hard prompts ``template.format(name)`` for C names."""
        return self.encode_frozen(lambda: self._hard_features(templates, names))

    def ensemble(self, templates: Sequence[str], names: Sequence[str]) -> Tensor:
        """Return classifier weights (C, D): the mean of the templates' normalised features, normalised again."""
        return self.encode_frozen(lambda: F.normalize(self._hard_features(templates, names).mean(dim=0), dim=-1))

    def raw_ensemble(self, templates: Sequence[str], names: Sequence[str]) -> Tensor:
        """Return classifier weights (C, D): the mean of the templates' features as they come from the tower, then normalised."""
        return F.normalize(self.raw_features(templates, names).mean(dim=0), dim=-1)

    def raw_features(
        self, templates: Sequence[str], names: Sequence[str], *, verbatim: bool = False, weights: Weights | None = None
    ) -> Tensor:
        """Return the features (P, C, D) of P hard prompts as they come from the tower, not normalised.

        Args:
            templates: P templates.
            names: C class names.
            verbatim: keep underscores in names, where else they become spaces.
            weights: deltas of the text tower's weights.
        """
        return self.encode_frozen(lambda: self._raw_features(templates, names, verbatim, weights))

    def text_features(self, texts: Sequence[str], at_once: int = 256) -> Tensor:
        """Return the normalised features (N, D) of N whole texts, without gradient, a number of them at a time.

        Raises:
            ConfigError: a text does not fit the tower's context length.
        """

        def encode() -> Tensor:
            parts = (texts[i : i + at_once] for i in range(0, len(texts), at_once))
            return torch.cat([F.normalize(self.text(self.text.compose_texts(part, part))[0], dim=-1) for part in parts])

        return self.encode_frozen(encode)

    def _raw_features(
        self, templates: Sequence[str], names: Sequence[str], verbatim: bool = False, weights: Weights | None = None
    ) -> Tensor:
        prompts = (self.text.compose_text(template, names, verbatim) for template in templates)
        return torch.stack([self.text(each, weights=weights)[0] for each in prompts])

    def _hard_features(self, templates: Sequence[str], names: Sequence[str]) -> Tensor:
        return F.normalize(self._raw_features(templates, names), dim=-1)

    def extra_repr(self) -> str:
        """Name, width and temperature for ``print(model)``."""
        return f"name={self.name!r}, embed_dim={self.embed_dim}, scale={math.exp(self.logit_scale.item()):.1f}"


def unit(x: Tensor) -> Tensor:
    """Return vectors (..., D) at length 1, as ``F.normalize`` does; zero stays zero."""
    if not by_hand(x):
        return F.normalize(x, dim=-1)
    out: Tensor = _Unit.apply(x)
    return out


class _Unit(torch.autograd.Function):
    """``F.normalize`` with its gradient by hand, which takes a vector that is shorter than 1e-12 for one that is not."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """(..., D) to (..., D)."""
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min_(1e-12)
        out = x / length
        ctx.save_for_backward(out, length)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        """Leave of the gradient what is orthogonal to the vector."""
        out, length = ctx.saved_tensors
        along = (grads[0] * out).sum(dim=-1, keepdim=True)
        return torch.addcmul(grads[0], out, along, value=-1) / length
