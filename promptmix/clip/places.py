"""Where a method may act inside the frozen towers: tokens between layers, weights inside layers, functions at a layer's joints.

The towers know no method; they are handed tensors and functions of three kinds, each keyed by where it acts:

- **steps**, ``{layer: PromptStep}``: tokens are removed, appended or inserted before a layer (deep prompts, MaPLe, TCP, MMRL);
- **weights**, ``{name: delta}``: a tensor is added to a weight or bias, or a function of a linear layer's input is added to its
  output (LoRA with its dropout, trained layer norms, a trained projection); names are those of the tower's state dict, in
  OpenAI's layout, and ``q_proj``, ``k_proj``, ``v_proj`` name the thirds of ``in_proj``;
- **actions**, ``{layer: LayerAction}``: functions at a layer's joints (adapters, convolutions, extra keys and values).
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from promptmix.errors import ConfigError

#: A low-rank branch or the like beside a linear layer: its input (..., in) to what is added to its output (..., out).
Branch = Callable[[Tensor], Tensor]

#: What a weight is changed by: a tensor added to it, or a branch beside it.
Delta = Tensor | Branch

#: {name in the tower's state dict: delta}
Weights = Mapping[str, Delta]

Result = TypeVar("Result")

_THIRDS = ("q", "k", "v")

#: Attention of a layer: with extra tokens (n, W) that only give keys and values, or None, to the joined heads (..., L, W).
Attend = Callable[[Tensor | None], Tensor]


@dataclass(frozen=True)
class PromptStep:
    """What happens to a tower's prompt tokens before a layer.

    They stand at the end of an image's tokens and right behind SOT in a text. Replacing n prompts is
    ``PromptStep(new, remove=n)``; adding is ``PromptStep(new)``; what no step touches is carried on.

    Attributes:
        tokens: for images (n, W) or (B, n, W); for texts (n, W), (E or 1, n, W), or (E or 1, C, n, W) where classes differ; or a
            function that makes them of the removed tokens (B, remove, W), (E, remove, W) or (E, C, remove, W). A function sees
            some of the classes at a time under ``MODEL.CLASS_CHUNK``. None adds nothing.
        remove: tokens taken away first.
        behind_norm: at an image's input, tokens join behind the norm in front of the first layer, so that it leaves them alone.
    """

    tokens: Tensor | Callable[[Tensor], Tensor] | None
    remove: int = 0
    behind_norm: bool = False


@dataclass(frozen=True)
class Memory:
    """Tokens that a layer's tokens see as keys and values only: they stand nowhere, ask nothing, and are gone after the layer.

    Several groups are a weighted choice: the heads' outputs with each group alone, summed by ``shares``. What the tokens
    give each other is computed once for all groups.

    Attributes:
        tokens: (J, W), group after group; they go through the layer's first norm as its tokens do.
        sizes: tokens of each of the G groups; a group of 0 is attention without any.
        shares: (G,), summing to 1; None for a single group.
    """

    tokens: Tensor
    sizes: tuple[int, ...]
    shares: Tensor | None = None


@dataclass(frozen=True)
class LayerAction:
    """Functions at the joints of one residual attention block; None leaves a joint as it is.

    Tokens are (B, L, W) in the image tower, class token first, then patches, then prompts. In the text tower they are
    (E, C, L, W), at full length and with its padding, unless ``per_token`` or ``ahead``.

    Attributes:
        before: tokens that enter the block to those that enter instead.
        normed: the output of ``ln_1`` to what attention reads instead.
        attention: given ``attend(extra)``, the joined heads (..., L, W) that go into the output projection. ``extra`` (n, W) are
            tokens that every token sees and that are gone after the layer; ``attend(None)`` is the block's own attention.
        memory: tokens that every token sees as keys and values; the text tower stays prefix-shared with them.
        hidden: what the MLP's first layer gives to what its activation reads instead.
        after: (tokens that entered, tokens that leave) to the tokens that leave instead.
        per_token: whether the functions change each token on its own, whatever stands beside it: then ``...`` in (..., W) is
            any shape, tokens that nobody reads are left out, and the text tower stays prefix-shared.
        ahead: how many tokens behind itself a token looks at through all functions of the layer together, where they take no
            account of where the text ends: then padding that can't reach the token that is read is left out. None = any number.
        spares_first: whether ``hidden`` and ``after`` leave the first token of an image as it is, so that they needn't run where
            it alone is read.
    """

    before: Callable[[Tensor], Tensor] | None = None
    normed: Callable[[Tensor], Tensor] | None = None
    attention: Callable[[Attend], Tensor] | None = None
    memory: Memory | None = None
    hidden: Callable[[Tensor], Tensor] | None = None
    after: Callable[[Tensor, Tensor], Tensor] | None = None
    per_token: bool = False
    ahead: int | None = None
    spares_first: bool = False

    @property
    def for_first(self) -> LayerAction | None:
        """What is left of the action where the first token alone is read; None where all tokens must be computed."""
        if self.alone:
            return self
        return None if self.attention is not None or not self.spares_first else replace(self, hidden=None, after=None)

    @property
    def alone(self) -> bool:
        """Whether no function looks across tokens."""
        return self.attention is None and (self.per_token or not self.has_functions)

    @property
    def has_functions(self) -> bool:
        """Whether there is any function."""
        return any((self.before, self.normed, self.attention, self.hidden, self.after))


@dataclass(frozen=True)
class LayerChanges:
    """What is changed in one block: deltas by their name within the block, and an action."""

    weights: Weights
    action: LayerAction | None = None


@dataclass(frozen=True)
class Changes:
    """Everything that a method changes in one pass of a tower.

    Attributes:
        steps: tokens between layers.
        weights: deltas by their name in the tower's state dict.
        actions: functions at the joints of layers.
        blocks: the prefix of the tower's blocks in its state dict.
    """

    steps: Mapping[int, PromptStep] = field(default_factory=dict)
    weights: Weights = field(default_factory=dict)
    actions: Mapping[int, LayerAction] = field(default_factory=dict)
    blocks: str = "transformer.resblocks."

    def at(self, layer: int) -> LayerChanges | None:
        """Return what is changed in block ``layer``, or None where nothing is."""
        prefix = f"{self.blocks}{layer}."
        own = {name.removeprefix(prefix): delta for name, delta in self.weights.items() if name.startswith(prefix)}
        action = self.actions.get(layer)
        return LayerChanges(own, action) if own or action else None

    def __bool__(self) -> bool:
        return len(self.steps) + len(self.weights) + len(self.actions) > 0  # a dict's truth can't be compiled by PyTorch 2.11

    @property
    def outside(self) -> Weights:
        """The deltas outside of the blocks."""
        return {name: delta for name, delta in self.weights.items() if not name.startswith(self.blocks)}

    @property
    def has_functions(self) -> bool:
        """Whether random numbers may be drawn inside of a layer, or experts told apart there."""
        acts = any(action.has_functions for action in self.actions.values())
        return acts or any(not isinstance(delta, Tensor) for delta in self.weights.values())

    @property
    def is_shared(self) -> bool:
        """Whether no action looks from a token at others, so that a text's shared prefix stays shared."""
        return all(action.alone for action in self.actions.values())

    @property
    def ahead(self) -> int | None:
        """How many tokens behind itself a text's token looks at through all layers together; None where that is not known."""
        each = [0 if action.alone else action.ahead for action in self.actions.values()]
        return None if None in each else sum(filter(None, each))

    def check(self, module: nn.Module, depth: int, tower: str) -> None:
        """Refuse what would be ignored.

        Args:
            module: the tower.
            depth: its number of layers.
            tower: its name, for the message.

        Raises:
            ConfigError: a delta names no weight of the tower, or an action or a step no layer.
        """
        if self.weights:
            # Embeddings are looked up when prompts are composed, before any change is known.
            known = {name for name in module.state_dict() if not name.startswith("token_embedding")}
            for name, delta in self.weights.items():
                if held_as(name, known)[0] not in known or not (isinstance(delta, Tensor) or name.endswith("weight")):
                    raise ConfigError(
                        f"weights name {name!r}, which the {tower} tower can't change so; names are those of its state dict, "
                        f"such as {max(known)}, and functions stand beside the weight of a linear layer"
                    )
        for what, layers in (("an action", self.actions), ("prompts", self.steps)):
            for layer in layers:
                if not 0 <= layer < depth:
                    raise ConfigError(f"{what} for layer {layer}, but the {tower} tower has layers 0 to {depth - 1}")


def held_as(name: str, held: Container[str]) -> tuple[str, int | None]:
    """Return the name of the tensor that ``name`` means, and which third of it.

    Args:
        name: as a method gives it.
        held: the names of a module's tensors. Where queries, keys and values are one of them (``in_proj``, timm's ``qkv``),
            ``q_proj``, ``k_proj`` and ``v_proj`` are its thirds.
    """
    for i, part in enumerate(_THIRDS):
        for kind in ("weight", "bias"):
            end = f"attn.{part}_proj.{kind}"
            if name.endswith(end) and name not in held:
                stem = name.removesuffix(end)
                timms = f"{stem}attn.qkv.{kind}"
                return timms if timms in held else f"{stem}attn.in_proj_{kind}", i
    return name, None


def merged(module: nn.Module, weights: Weights) -> dict[str, Tensor]:
    """Return the tensors of ``module`` that ``weights`` changes, with the deltas added."""
    if not weights:
        return {}
    held = dict(module.named_parameters()) | dict(module.named_buffers())
    found: dict[str, Tensor] = {}
    for name, delta in weights.items():
        if isinstance(delta, Tensor):
            key, part = held_as(name, held)
            value = found.get(key, held[key])
            if part is None:
                found[key] = value + delta
            else:
                found[key] = torch.cat([piece + delta if i == part else piece for i, piece in enumerate(value.chunk(3))])
    return found


class _Holder(nn.Module):
    """A module and a function of it, since ``functional_call`` changes the weights of what it calls."""

    def __init__(self, module: nn.Module, function: Callable[..., object]) -> None:
        super().__init__()
        self.module, self.function = module, function

    def forward(self, *args: Tensor) -> object:
        return self.function(self.module, *args)


def run_changed(module: nn.Module, changed: Mapping[str, Tensor], function: Callable[..., Result], *args: Tensor) -> Result:
    """Return ``function(module, *args)`` as it is with the tensors ``changed`` in place of the module's own."""
    if not changed:
        return function(module, *args)
    held = {f"module.{name}": value for name, value in changed.items()}
    result: Result = functional_call(_Holder(module, function), held, args)
    return result


@contextmanager
def beside(root: nn.Module, weights: Weights) -> Iterator[None]:
    """Have branches run beside the linear layers of ``root`` inside the context.

    Raises:
        ConfigError: a branch names something other than a linear layer, or one that is not run as a layer of its own.
    """
    ran: set[str] = set()
    handles = []
    branches = {name: delta for name, delta in weights.items() if not isinstance(delta, Tensor)}

    held = dict(root.named_parameters()) if branches else {}

    def watch(name: str, branch: Branch, third: int | None) -> Callable[[nn.Module, tuple[Tensor], Tensor], Tensor]:
        def add(module: nn.Module, args: tuple[Tensor], out: Tensor) -> Tensor:
            ran.add(name)
            if third is None:
                return out + branch(args[0])
            parts = enumerate(out.chunk(3, dim=-1))
            return torch.cat([part + branch(args[0]) if i == third else part for i, part in parts], dim=-1)

        return add

    try:
        for name, branch in branches.items():
            key, third = held_as(name, held)
            module = root.get_submodule(key.removesuffix(".weight")) if key in held and key.endswith(".weight") else root
            if isinstance(module, nn.Linear):  # what else there is is reported below
                handles.append(module.register_forward_hook(watch(name, branch, third)))
        yield
    finally:
        for handle in handles:
            handle.remove()
    if ignored := sorted(branches.keys() - ran):
        raise ConfigError(
            f"weights give {ignored[0]!r} a function, but it is not a linear layer that this tower runs on its own; "
            "give a tensor that is added to the weight"
        )
