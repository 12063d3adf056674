"""A digest of tensors and plain values, by which a damaged or exchanged file is told from the one that was written."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch

__all__ = ["digest_of"]


def digest_of(value: Any) -> str:
    """Return the SHA-256 of a tree of dicts, lists, tuples, tensors and plain values.

    Equal trees have equal digests wherever their tensors lie (device, strides, sharing), and whichever kind of mapping holds
    them; a tensor counts with its type, shape and bytes, a mapping with the order of its keys.
    """
    digest = hashlib.sha256()
    _feed(digest, value)
    return digest.hexdigest()


def _feed(digest: Any, value: Any) -> None:
    if isinstance(value, torch.Tensor):
        plain = value.detach().cpu().contiguous()
        digest.update(f"tensor {plain.dtype} {tuple(plain.shape)}\n".encode())
        if plain.numel():
            digest.update(plain.reshape(-1).view(torch.uint8).numpy().data)
    elif isinstance(value, Mapping):
        digest.update(f"dict {len(value)}\n".encode())
        for key, item in value.items():
            _feed(digest, key)
            _feed(digest, item)
    elif isinstance(value, list | tuple):
        digest.update(f"{'list' if isinstance(value, list) else 'tuple'} {len(value)}\n".encode())
        for item in value:
            _feed(digest, item)
    elif isinstance(value, str | bytes):
        raw = value.encode("utf-8", "surrogatepass") if isinstance(value, str) else value
        digest.update(f"{type(value).__name__} {len(raw)}\n".encode() + raw)
    else:
        digest.update(f"{type(value).__name__} {value!r}\n".encode())
