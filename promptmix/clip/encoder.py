"""Text encoders of Hugging Face as prompted towers: roberta, xlm-roberta, mt5, nllb.

They have no causal mask, so nothing is shared between classes; but they mask padding, so prompts are cut to the longest of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from open_clip.hf_model import HFTextEncoder
from torch import Tensor, nn

from promptmix.clip.compose import DeepPrompts, PromptReader, check_room, steps_of, take_padded_step
from promptmix.clip.packed import Prompts
from promptmix.clip.places import Changes, LayerAction, Weights, beside, merged, run_changed
from promptmix.clip.tokens import Tokenizer
from promptmix.errors import ConfigError

#: Tokens of a prompt where the encoder's positions have no end (mt5).
_LONGEST = 77


class EncoderTower(PromptReader):
    """A frozen text encoder of Hugging Face, taking prompts as embeddings; the same calls as ``TextTower``.

    Deep prompts may replace tokens, not add any; actions stand before and after a layer and see (E * C, L, W).

    Args:
        source: open_clip's wrapper of the encoder.
        tokenizer: the tokenizer that it was trained with.
    """

    way = "trimmed"
    sees_padding = False

    def __init__(self, source: HFTextEncoder, tokenizer: Tokenizer) -> None:
        positions = getattr(source.config, "max_position_embeddings", 0) or _LONGEST
        super().__init__(tokenizer, source.transformer.get_input_embeddings(), min(positions, _LONGEST))
        self.source = source

    @property
    def blocks(self) -> nn.ModuleList:
        """The encoder's layers, first to last."""
        return next(part for part in self.source.transformer.modules() if isinstance(part, nn.ModuleList))

    def first_norm(self, layer: int) -> nn.Module:
        """Refuse: an encoder of Hugging Face has no norm in front of its attention."""
        raise ConfigError(
            f"this text tower is an encoder of Hugging Face, so layer {layer} has no norm in front of its attention to read; "
            "choose a backbone with CLIP's own text tower such as ViT-B/16"
        )

    @property
    def embed_dim(self) -> int:
        """Width D of the joint space."""
        return int(self.source.output_dim)

    def compile_layers(self) -> None:
        """Run the encoder through ``torch.compile`` from now on; names of weights stay."""
        self.source.transformer.compile()

    def forward(
        self,
        prompts: Prompts,
        deep: DeepPrompts | None = None,
        *,
        weights: Weights | None = None,
        actions: Mapping[int, LayerAction] | None = None,
    ) -> Tensor:
        """Encode prompts; arguments and result as ``TextTower.forward``.

        Raises:
            ConfigError: a change has no place in such an encoder.
        """
        changes = Changes(steps_of(deep), weights or {}, actions or {}, blocks="source.transformer.")
        if changes:
            changes.check(self, len(self.blocks), "text")
            check_room(prompts, changes.steps, self.start)
            _check_joints(changes)
        return self.encode_parts(
            prompts, changes, lambda some, own: self.encode_chunks(some, own, self.class_chunk, self._encode)
        )

    def _encode(self, prompts: Prompts, changes: Changes) -> Tensor:
        x, ends = self.pad(prompts, trim=True)
        experts, classes, length = x.shape[:3]
        seen = (torch.arange(length, device=ends.device) <= ends[:, None]).long().repeat(experts, 1)

        def run(tower: EncoderTower, x: Tensor) -> Tensor:
            out = tower.source.transformer(inputs_embeds=x, attention_mask=seen)
            features: Tensor = tower.source.proj(tower.source.pooler(out, seen))
            return features

        with beside(self, changes.weights), self._acting(changes, (experts, classes)):
            return run_changed(self, merged(self, changes.weights), run, x.flatten(0, 1)).unflatten(0, (experts, classes))

    @contextmanager
    def _acting(self, changes: Changes, sizes: tuple[int, int]) -> Iterator[None]:
        """Have steps and actions run before and after the encoder's layers inside the context."""
        handles = []
        for i, block in enumerate(self.blocks):
            step, action = changes.steps.get(i), changes.actions.get(i)
            entered: list[Tensor] = []

            def enter(
                module: nn.Module,
                args: tuple[Any, ...],
                given: dict[str, Any],
                step: Any = step,
                action: LayerAction | None = action,
                entered: list[Tensor] = entered,
            ) -> tuple[tuple[Any, ...], dict[str, Any]]:
                x = args[0] if args else given["hidden_states"]
                if step is not None:
                    x = take_padded_step(x.unflatten(0, sizes), step, self.start).flatten(0, 1)
                if action is not None and action.before is not None:
                    x = action.before(x)
                entered[:] = [x]
                return ((x, *args[1:]), given) if args else (args, {**given, "hidden_states": x})

            def leave(
                module: nn.Module,
                args: tuple[Any, ...],
                out: Any,
                action: LayerAction | None = action,
                entered: list[Tensor] = entered,
            ) -> Any:
                if action is None or action.after is None:
                    return out
                if isinstance(out, Tensor):
                    return action.after(entered[0], out)
                return (action.after(entered[0], out[0]), *out[1:])

            if step is not None or action is not None:
                handles += [block.register_forward_pre_hook(enter, with_kwargs=True), block.register_forward_hook(leave)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _check_joints(changes: Changes) -> None:
    for layer, action in changes.actions.items():
        for joint in ("normed", "attention", "memory", "hidden"):
            if getattr(action, joint) is not None:
                raise ConfigError(
                    f"this text tower is an encoder of Hugging Face, so layer {layer} can't be changed at {joint!r}; use before "
                    "or after, or choose a backbone with CLIP's own text tower such as ViT-B/16"
                )
    for layer, step in changes.steps.items():
        if isinstance(step.tokens, Tensor) and step.tokens.shape[-2] != step.remove or step.tokens is None and step.remove:
            raise ConfigError(
                f"prompts at layer {layer} change the number of tokens, which an encoder of Hugging Face can't; replace as "
                "many as you remove, or choose a backbone with CLIP's own text tower such as ViT-B/16"
            )
