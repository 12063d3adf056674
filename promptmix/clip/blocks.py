"""Layers of the frozen towers, computing no more than what is read.

Both towers are stacks of open_clip's residual attention blocks, and each is read at one token: the text tower at EOT, a vision
transformer at its class token. In the last layer, therefore, only that token asks; the others give their keys and values.
The layers here are those blocks with less memory traffic, and open_clip's own wherever something else was put in a block.
A layer takes what a method changes in it (``LayerChanges``); None is the frozen one, to the bit. ``Layers`` are a stack of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from open_clip.transformer import QuickGELU, ResidualAttentionBlock, VisionTransformer
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call
from typing_extensions import override

from promptmix.clip.memory import Recalled, recall
from promptmix.clip.places import Branch, LayerChanges, PromptStep, beside, merged, run_changed
from promptmix.errors import ConfigError

#: The factor in quick-GELU.
_QUICK = 1.702

#: Names of what gives queries, keys and values in a block of open_clip's.
_IN_PROJ = ("attn.in_proj_", "attn.q_proj.", "attn.k_proj.", "attn.v_proj.")


def is_standard(block: nn.Module) -> TypeGuard[ResidualAttentionBlock]:
    """Tell whether ``block`` is open_clip's, with nobody's adapters or hooks in it."""
    if type(block) is not ResidualAttentionBlock:
        return False
    attention, mlp = block.attn, block.mlp
    if type(attention) is not nn.MultiheadAttention or type(mlp) is not nn.Sequential:
        return False
    if tuple(mlp._modules) != ("c_fc", "gelu", "c_proj"):
        return False
    watched: tuple[nn.Module, ...] = (block, attention, attention.out_proj, mlp, *mlp.children())
    linear = type(mlp.c_fc) is nn.Linear and type(mlp.c_proj) is nn.Linear
    return linear and not any(part._forward_hooks or part._forward_pre_hooks for part in watched)


def by_hand(x: Tensor) -> bool:
    """Tell whether gradients with respect to ``x`` go through what is differentiated by hand.

    A compiler does that by itself, and under autocast PyTorch chooses the types of what is kept.
    """
    wanted = torch.is_grad_enabled() and x.requires_grad and not torch.compiler.is_compiling()
    return wanted and (x.is_meta or not torch.is_autocast_enabled(x.device.type))


def fits_caches(x: Tensor) -> bool:
    """Tell whether work on ``x`` gains by being done in portions: without a graph, on a CPU, and not by a compiler."""
    return x.device.type == "cpu" and not torch.is_grad_enabled() and not torch.compiler.is_compiling()


def layer(
    block: nn.Module,
    x: Tensor,
    own: LayerChanges | None = None,
    mask: Tensor | None = None,
    given: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """One layer on tokens (..., L, W); a block that is not open_clip's runs as it is.

    Args:
        block: the frozen block.
        x: (..., L, W).
        own: what is changed in it.
        mask: (L, L), added to the attention's logits; None where every token sees all others.
        given: further arguments that a block of another make wants.

    Raises:
        ConfigError: the change has no place in a block that is not open_clip's.
    """
    if not is_standard(block):
        return _foreign_layer(block, x, own, {**(given or {}), **({} if mask is None else {"attn_mask": mask})})
    if own is None and mask is None:
        return frozen_layer(block, x.flatten(0, -2), x.shape[-2]).view(x.shape)
    x, normed = enter(block, x, own)
    if own is not None and own.action is not None and own.action.attention is not None:
        return finish(block, x, own.action.attention(lambda extra: _attend(block, normed, extra, own, mask)), own)
    return finish(block, x, _attend(block, normed, None, own, mask), own)


def first_token_layer(block: nn.Module, x: Tensor, own: LayerChanges | None = None) -> Tensor:
    """``layer`` where only the first token's state (B, 1, W) is read."""
    if own is not None and own.action is not None:
        action = own.action.for_first
        if action is None or not is_standard(block):
            return layer(block, x, own)[:, :1]
        own = replace(own, action=action)
    if not is_standard(block):
        return layer(block, x, own)[:, :1]
    if own is None:
        return _frozen_first(block, x)
    x, normed = enter(block, x, own)
    parts = project_some(block, normed[:, :1], normed, own)
    return finish(block, x[:, :1], attention(*parts, block.attn.num_heads, memory=recalled(block, own)), own)


def enter(block: ResidualAttentionBlock, x: Tensor, own: LayerChanges | None) -> tuple[Tensor, Tensor]:
    """Return the tokens that enter the layer, and what its attention reads of them."""
    if own is None:
        return x, block.ln_1(x)
    if own.action is not None and own.action.before is not None:
        x = own.action.before(x)
    normed = _call(block.ln_1, x, own, "ln_1")
    if own.action is not None and own.action.normed is not None:
        normed = own.action.normed(normed)
    return x, normed


def project(block: ResidualAttentionBlock, normed: Tensor, own: LayerChanges | None) -> Tensor:
    """Queries, keys and values (..., 3W) of tokens; heads are not split."""
    if own is None:
        return F.linear(normed, block.attn.in_proj_weight, block.attn.in_proj_bias)
    out = F.linear(normed, *_in_proj(block, own))
    fused_branch, thirds = _in_proj_branches(own)
    if fused_branch is not None:
        out = out + fused_branch(normed)
    if any(thirds):
        parts = zip(out.chunk(3, dim=-1), thirds, strict=True)
        out = torch.cat([part if branch is None else part + branch(normed) for part, branch in parts], dim=-1)
    return out


def project_some(
    block: ResidualAttentionBlock, asking: Tensor, normed: Tensor, own: LayerChanges | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries of the tokens ``asking`` (..., W), keys and values of ``normed`` (..., L, W); heads are not split."""
    width = normed.shape[-1]
    weight, bias = (block.attn.in_proj_weight, block.attn.in_proj_bias) if own is None else _in_proj(block, own)
    key, value = F.linear(normed, weight[width:], bias[width:]).chunk(2, dim=-1)
    query = F.linear(asking, weight[:width], bias[:width])
    if own is None:
        return query, key, value
    fused_branch, (for_query, for_key, for_value) = _in_proj_branches(own)
    if fused_branch is not None:
        more = fused_branch(normed)[..., width:].chunk(2, dim=-1)
        query, key, value = query + fused_branch(asking)[..., :width], key + more[0], value + more[1]
    return (
        query if for_query is None else query + for_query(asking),
        key if for_key is None else key + for_key(normed),
        value if for_value is None else value + for_value(normed),
    )


def finish(block: ResidualAttentionBlock, x: Tensor, heads: Tensor, own: LayerChanges | None = None) -> Tensor:
    """The rest of a layer: attention's output projection and the MLP, added to ``x``."""
    if own is None:
        # As rows (n, W): a linear layer on more axes is one on rows with views around it, forward and backward.
        rows = x.flatten(0, -2)
        rows = rows + block.ls_1(block.attn.out_proj(heads.flatten(0, -2)))
        rows = rows + block.ls_2(_mlp(block, block.ln_2(rows)))
        return rows if x.dim() == 2 else rows.view(x.shape)
    entered = x
    x = x + _call(block.ls_1, _call(block.attn.out_proj, heads, own, "attn.out_proj"), own, "ls_1")
    hidden = _call(block.mlp.c_fc, _call(block.ln_2, x, own, "ln_2"), own, "mlp.c_fc")
    action = own.action
    if action is not None and action.hidden is not None:
        hidden = action.hidden(hidden)
    x = x + _call(block.ls_2, _call(block.mlp.c_proj, block.mlp.gelu(hidden), own, "mlp.c_proj"), own, "ls_2")
    return x if action is None or action.after is None else action.after(entered, x)


def attention(
    query: Tensor, key: Tensor, value: Tensor, heads: int, mask: Tensor | None = None, memory: Recalled | None = None
) -> Tensor:
    """Attention of (..., Q, W) over (..., L, W) and over a memory, all projected already; heads are joined again.

    Without a memory, ``mask`` is what torch's attention takes; with one it is (Q, L) or (..., 1, Q, L), added to the logits.
    """
    query, key, value = (split_heads(part, heads) for part in (query, key, value))
    if memory is None:
        return join_heads(F.scaled_dot_product_attention(query, key, value, attn_mask=mask))
    query = query * query.shape[-1] ** -0.5
    logits = query @ key.transpose(-1, -2)
    logits = logits if mask is None else logits + mask
    return join_heads(recall(query, logits, lambda weights: weights @ value, memory))


def recalled(block: ResidualAttentionBlock, own: LayerChanges | None) -> Recalled | None:
    """Return the keys and values of the memory in a layer, or None where it has none."""
    if own is None or own.action is None or own.action.memory is None:
        return None
    memory, heads = own.action.memory, block.attn.num_heads
    tokens = _call(block.ln_1, memory.tokens.to(block.attn.in_proj_weight.dtype), own, "ln_1")
    _, key, value = project(block, tokens, own).chunk(3, dim=-1)
    return Recalled(split_heads(key, heads), split_heads(value, heads), memory.sizes, memory.shares)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(..., L, W) to (..., H, L, W / H)."""
    return x.unflatten(-1, (heads, -1)).transpose(-3, -2)


def join_heads(x: Tensor) -> Tensor:
    """(..., H, L, d) to (..., L, H * d)."""
    return x.transpose(-3, -2).flatten(-2)


def frozen_layer(block: nn.Module, rows: Tensor, length: int) -> Tensor:
    """``layer`` in which nothing is changed, on rows (B * L, W) of pictures of L tokens that all see each other."""
    if not is_standard(block):
        return layer(block, rows.view(-1, length, rows.shape[-1])).flatten(0, 1)
    qkv = project(block, block.ln_1(rows), None).view(-1, length, 3, block.attn.num_heads, block.attn.head_dim)
    query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind()
    mixed = F.scaled_dot_product_attention(query, key, value)
    return finish(block, rows, mixed.transpose(1, 2).reshape(rows.shape))


def _frozen_first(block: ResidualAttentionBlock, x: Tensor) -> Tensor:
    """``first_token_layer`` in which nothing is changed."""
    attn, (batch, length, width), normed = block.attn, x.shape, block.ln_1(x)
    weights, biases = (part.split([width, 2 * width]) for part in (attn.in_proj_weight, attn.in_proj_bias))
    query = F.linear(normed[:, 0], weights[0], biases[0])
    pairs = F.linear(normed.flatten(0, 1), weights[1], biases[1]).view(batch, length, 2, attn.num_heads, attn.head_dim)
    key, value = pairs.permute(2, 0, 3, 1, 4).unbind()
    mixed = F.scaled_dot_product_attention(query.view(batch, attn.num_heads, 1, attn.head_dim), key, value)
    return finish(block, x[:, 0], mixed.reshape(batch, width))[:, None]


def _attend(
    block: ResidualAttentionBlock, normed: Tensor, extra: Tensor | None, own: LayerChanges | None, mask: Tensor | None
) -> Tensor:
    """Attention of tokens (..., L, W) over themselves and ``extra`` tokens (n, W) that all of them see; heads joined."""
    query, key, value = project(block, normed, own).chunk(3, dim=-1)
    if extra is not None:
        more = project(block, _call(block.ln_1, extra.to(normed.dtype), own, "ln_1"), own).chunk(3, dim=-1)
        key, value = (
            torch.cat([part, new.expand(*part.shape[:-2], -1, -1)], dim=-2)
            for part, new in zip((key, value), more[1:], strict=True)
        )
        mask = mask if mask is None else F.pad(mask, (0, extra.shape[-2]))
    memory = recalled(block, own)
    return attention(query, key, value, block.attn.num_heads, mask if mask is None else mask.to(normed.dtype), memory)


def _call(module: nn.Module, x: Tensor, own: LayerChanges | None, name: str) -> Tensor:
    """Run a part of a block with the deltas of its weights."""
    mine = (
        {} if own is None else {key[len(name) + 1 :]: delta for key, delta in own.weights.items() if key.startswith(f"{name}.")}
    )
    changed = merged(module, mine)
    out: Tensor = functional_call(module, changed, (x,)) if changed else module(x)
    branch = mine.get("weight")
    return out if branch is None or isinstance(branch, Tensor) else out + branch(x)


def _in_proj(block: ResidualAttentionBlock, own: LayerChanges) -> tuple[Tensor, Tensor]:
    mine = {name: delta for name, delta in own.weights.items() if name.startswith(_IN_PROJ)}
    found = merged(block, mine)
    attention = block.attn
    return found.get("attn.in_proj_weight", attention.in_proj_weight), found.get("attn.in_proj_bias", attention.in_proj_bias)


def _in_proj_branches(own: LayerChanges) -> tuple[Branch | None, list[Branch | None]]:
    names = ("attn.in_proj_weight", *(f"attn.{part}_proj.weight" for part in "qkv"))
    whole, *thirds = (None if isinstance(delta := own.weights.get(name), Tensor) else delta for name in names)
    return whole, thirds


def _foreign_layer(block: nn.Module, x: Tensor, own: LayerChanges | None, given: Mapping[str, Tensor]) -> Tensor:
    """A block of another make: changed weights, branches beside its linear layers, and functions before and after it."""
    flat = x.flatten(0, -3)
    if own is None:
        plain: Tensor = block(flat, **given)
        return plain.view_as(x)
    action = own.action
    for joint in ("normed", "attention", "memory", "hidden"):
        if getattr(action, joint, None) is not None:
            raise ConfigError(
                f"this tower's layers ({type(block).__name__}) are not CLIP's own, so {joint} can't be changed; "
                "use before and after, or choose a backbone such as ViT-B/16"
            )
    if action is not None and action.before is not None:
        x = action.before(x)
    with beside(block, own.weights):
        changed = merged(block, own.weights)
        out = run_changed(block, changed, lambda block, x: block(x, **given), x.flatten(0, -3)).view_as(x)
    return out if action is None or action.after is None else action.after(x, out)


def _mlp(block: ResidualAttentionBlock, x: Tensor) -> Tensor:
    """The block's MLP on rows (n, W).

    Quick-GELU x sigmoid(a x) is SiLU(a x) / a, which keeps one hidden tensor for the backward pass instead of two, and both
    factors are part of the products.
    """
    mlp = block.mlp
    if not isinstance(mlp.gelu, QuickGELU):
        return mlp(x)
    weights = mlp.c_fc.weight, mlp.c_fc.bias, mlp.c_proj.weight, mlp.c_proj.bias
    if by_hand(x) and not any(part.requires_grad for part in weights):
        out: Tensor = _FrozenMLP.apply(x, *weights)
        return out
    up, up_bias, down, down_bias = weights
    hidden = F.silu(torch.addmm(up_bias, x, up.t(), beta=_QUICK, alpha=_QUICK), inplace=not torch.is_grad_enabled())
    return torch.addmm(down_bias, hidden, down.t(), alpha=1 / _QUICK)


class _FrozenMLP(torch.autograd.Function):
    """A frozen MLP with quick-GELU, with the gradient of its input: three products' worth of operators in place of seven."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, up: Tensor, up_bias: Tensor, down: Tensor, down_bias: Tensor) -> Tensor:
        """Rows (n, W) to (n, W)."""
        hidden = torch.addmm(up_bias, x, up.t(), beta=_QUICK, alpha=_QUICK)
        ctx.save_for_backward(hidden, up, up_bias, down, down_bias)
        return torch.addmm(down_bias, F.silu(hidden), down.t(), alpha=1 / _QUICK)

    @staticmethod
    @once_differentiable  # PyTorch's fused attention has no second derivative either
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradient of the rows."""
        hidden, up, up_bias, down, down_bias = ctx.saved_tensors
        inner = torch.addmm(up_bias, grads[0], down, beta=0, alpha=1 / _QUICK)  # beta 0: a product and its factor in one
        inner = torch.ops.aten.silu_backward(inner, hidden)
        return torch.addmm(down_bias, inner, up, beta=0, alpha=_QUICK), None, None, None, None


class Layers(ABC):
    """A stack of layers on tokens (B, L, W): leading tokens, patches, and prompts at the end.

    Attributes:
        prefix: of the layers' names in the image tower's state dict.
        blocks: the layers, first to last.
        width: W.
        leading: tokens in front of the patches (class token, registers).
        patches: number of patches M.
        reads_first: whether the feature is the first token's.
    """

    prefix: str
    blocks: nn.ModuleList
    width: int
    leading: int
    patches: int
    reads_first: bool

    @abstractmethod
    def embed(self, images: Tensor, step: PromptStep | None) -> tuple[Tensor, Any]:
        """Return the tokens that enter the first layer, after ``step``, and what layers want to know beside them."""

    def given(self, layer: int, x: Tensor, about: Any) -> Mapping[str, Tensor]:
        """Return further arguments of a layer for tokens ``x``, from what ``embed`` returned."""
        return {}

    @abstractmethod
    def pooled(self, x: Tensor) -> Tensor:
        """Return the image features (B, D) of the tokens that leave the last layer."""

    def first_norm(self, layer: int) -> nn.Module:
        """Return the norm in front of a layer's attention."""
        norm: nn.Module = self.blocks[layer].ln_1  # type: ignore[assignment]
        return norm

    def own_name(self, name: str) -> str:
        """Return the name in the tower's state dict of what OpenAI's layout calls ``name``."""
        return name

    @abstractmethod
    def norm(self, x: Tensor) -> Tensor:
        """Apply the final norm to states (..., W)."""

    @abstractmethod
    def project(self, x: Tensor) -> Tensor:
        """Map normed states (..., W) into the joint space (..., D), each as if it alone were the picture."""


class ClipLayers(Layers):
    """CLIP's own vision transformer."""

    prefix = "visual.transformer.resblocks."
    leading = 1

    def __init__(self, visual: VisionTransformer) -> None:
        self.visual: Any = visual
        self.blocks = self.visual.transformer.resblocks
        self.width = self.visual.class_embedding.shape[0]
        self.patches = self.visual.positional_embedding.shape[0] - 1
        self.reads_first = self.visual.attn_pool is None and self.visual.pool_type == "tok"

    @override
    def embed(self, images: Tensor, step: PromptStep | None) -> tuple[Tensor, None]:
        visual = self.visual
        x = visual.conv1(images).flatten(2).transpose(1, 2)
        first = visual.class_embedding.to(x.dtype).expand(x.shape[0], 1, -1)
        x = torch.cat([first, x], dim=1) + visual.positional_embedding.to(x.dtype)
        return enter_first(visual.ln_pre, x, step), None

    @override
    def pooled(self, x: Tensor) -> Tensor:
        pooled: Tensor = self.visual._pool(x)[0]
        return pooled if self.visual.proj is None else pooled @ self.visual.proj

    @override
    def norm(self, x: Tensor) -> Tensor:
        if self.visual.attn_pool is not None:
            return x  # the pool comes first, and has a norm of its own
        normed: Tensor = self.visual.ln_post(x)
        return normed

    @override
    def project(self, x: Tensor) -> Tensor:
        pool, projection = self.visual.attn_pool, self.visual.proj
        if pool is not None:  # one key: whoever asks is answered by its value
            x = pool(x.reshape(-1, 1, x.shape[-1]))[:, 0].unflatten(0, x.shape[:-1])
            x = self.visual.ln_post(x)
        return x if projection is None else x @ projection


def enter_first(norm: Callable[[Tensor], Tensor], x: Tensor, step: PromptStep | None) -> Tensor:
    """Return tokens (B, L, W) behind the norm in front of the first layer, with those of ``step`` in front of or behind it."""
    behind = step is not None and step.behind_norm
    return apply_step(norm(x), step) if behind else norm(apply_step(x, step))


def apply_step(x: Tensor, step: PromptStep | None) -> Tensor:
    """Remove and append tokens at the end of (B, L, W)."""
    if step is None:
        return x
    end = x.shape[1] - step.remove
    new = step.tokens
    if new is not None and not isinstance(new, Tensor):
        new = new(x[:, end:])
    if new is None:
        return x[:, :end]
    new = new.to(x.dtype)
    new = new if new.dim() == 3 else new.expand(x.shape[0], -1, -1)
    if new.shape[1] == step.remove:  # what is replaced in place needs no slices put together again in the backward pass
        return x.slice_scatter(new, dim=1, start=end)
    return torch.cat([x[:, :end], new], dim=1)
