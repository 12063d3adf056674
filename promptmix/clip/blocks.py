"""Layers of the frozen towers, computing no more than what is read.

Both towers are stacks of open_clip's residual attention blocks, and each is read at one token: the text tower at EOT, a vision
transformer at its class token. In the last layer, therefore, only that token asks; the others give their keys and values.
The layers here are those blocks with less memory traffic, and open_clip's own wherever something else was put in a block.
"""

from __future__ import annotations

from typing import TypeGuard

import torch.nn.functional as F
from open_clip.transformer import QuickGELU, ResidualAttentionBlock
from torch import Tensor, nn


def is_standard(block: nn.Module) -> TypeGuard[ResidualAttentionBlock]:
    """Tell whether ``block`` is open_clip's, with nobody's adapters or hooks in it."""
    if type(block) is not ResidualAttentionBlock:
        return False
    attention, mlp = block.attn, block.mlp
    if type(attention) is not nn.MultiheadAttention or type(mlp) is not nn.Sequential:
        return False
    if tuple(mlp._modules) != ("c_fc", "gelu", "c_proj"):
        return False
    watched = (block, attention, attention.out_proj, mlp)
    linear = type(mlp.c_fc) is nn.Linear and type(mlp.c_proj) is nn.Linear
    return linear and not any(part._forward_hooks or part._forward_pre_hooks for part in watched)


def layer(block: nn.Module, x: Tensor) -> Tensor:
    """One layer without mask on tokens (B, L, W); a block that is not open_clip's runs as it is."""
    if not is_standard(block):
        out: Tensor = block(x)
        return out
    attention = block.attn
    parts = F.linear(block.ln_1(x), attention.in_proj_weight, attention.in_proj_bias).chunk(3, dim=-1)
    query, key, value = (split_heads(part, attention.num_heads) for part in parts)
    return finish(block, x, join_heads(F.scaled_dot_product_attention(query, key, value)))


def first_token_layer(block: nn.Module, x: Tensor) -> Tensor:
    """``layer`` where only the first token's state (B, 1, W) is read."""
    if not is_standard(block):
        return layer(block, x)[:, :1]
    normed = block.ln_1(x)
    query, key, value = (split_heads(part, block.attn.num_heads) for part in project_some(block, normed[:, :1], normed))
    return finish(block, x[:, :1], join_heads(F.scaled_dot_product_attention(query, key, value)))


def project_some(block: ResidualAttentionBlock, asking: Tensor, normed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries of the tokens ``asking`` (..., W), keys and values of ``normed`` (B, L, W); heads are not split."""
    weight, bias = block.attn.in_proj_weight, block.attn.in_proj_bias
    width = normed.shape[-1]
    key, value = F.linear(normed, weight[width:], bias[width:]).chunk(2, dim=-1)
    return F.linear(asking, weight[:width], bias[:width]), key, value


def finish(block: ResidualAttentionBlock, x: Tensor, heads: Tensor) -> Tensor:
    """The rest of a layer: attention's output projection and the MLP, added to ``x``."""
    x = x + block.ls_1(block.attn.out_proj(heads))
    return x + block.ls_2(_mlp(block, block.ln_2(x)))


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, L, W) to (B, H, L, W / H)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def join_heads(x: Tensor) -> Tensor:
    """(B, H, L, d) to (B, L, H * d)."""
    return x.transpose(1, 2).flatten(2)


def _mlp(block: ResidualAttentionBlock, x: Tensor) -> Tensor:
    """The block's MLP; quick-GELU goes through SiLU, which keeps one hidden tensor for the backward pass instead of two."""
    mlp = block.mlp
    if not isinstance(mlp.gelu, QuickGELU):
        return mlp(x)
    hidden = F.silu(mlp.c_fc(x).mul_(1.702)).mul_(1 / 1.702)
    return mlp.c_proj(hidden)
