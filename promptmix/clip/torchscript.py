"""The tensors of OpenAI's archives, which are programs of TorchScript's, without TorchScript's loader.

``torch.jit.load`` runs what an archive brings along (``__setstate__``), and such a program may write files. The tensors need
none of it: the archive's pickle is a tree of modules with their attributes, which gives each its name, and the text of a class
says in two lines which attributes are parameters and buffers.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from promptmix.files.archives import Archive, refusing_damage, tensor_names
from promptmix.files.pickles import Maker, Refused, Shell

__all__ = ["read_torchscript"]

#: Largest number of modules, and of modules within modules.
_MOST_MODULES, _DEEPEST = 100_000, 100
#: Largest number of bytes of code that are looked through.
_MOST_TEXT = 1 << 25
_STATED = re.compile(r"^  __(?:parameters|buffers)__ = \[([^\]]*)\]", re.M)
#: Functions by which TorchScript writes lists and says their types; the value is their first argument.
_WRAPPERS = ("build_boollist", "build_doublelist", "build_intlist", "build_tensorlist", "restore_type_tag")
_MAKERS: dict[str, Callable[..., Any]] = {f"torch.jit._pickle.{name}": lambda value, *_: value for name in _WRAPPERS}


def read_torchscript(path: Path) -> dict[str, Tensor]:
    """Return the parameters and buffers of a module that ``torch.jit.save`` wrote, by the names of its ``state_dict``.

    Raises:
        Refused: it is damaged, holds something else than modules, tensors and plain values, or restores itself by code.
    """
    with refusing_damage(), Archive(path) as archive:
        root = archive.value(_find)
        if type(root) is not Shell:
            raise Refused("it holds no module")
        return _tensors(root, _Classes(archive))


def _tensors(root: Shell, classes: _Classes) -> dict[str, Tensor]:
    """Go through a tree of modules."""
    found: dict[str, Tensor] = {}
    waiting: list[tuple[str, Shell, int]] = [("", root, 1)]
    visits = 0
    while waiting:
        prefix, module, depth = waiting.pop()
        visits += 1  # a module that is there twice has two names, as for TorchScript
        if visits > _MOST_MODULES or depth > _DEEPEST:
            raise Refused(f"it has modules more than {_DEEPEST} levels deep, or more than {_MOST_MODULES} of them")
        stated = classes.stated(module.wanted)
        for name, value in module.state.items():
            if isinstance(value, Tensor) and (stated is None or name in stated):
                found[prefix + name] = value.detach()
            elif type(value) is Shell:
                waiting.append((f"{prefix}{name}.", value, depth + 1))
    return found


class _Classes:
    """What the text of an archive's classes says of their attributes; it is searched, never run."""

    def __init__(self, archive: Archive) -> None:
        self._archive = archive
        self._files: dict[str, dict[str, set[str]]] = {}
        self._left = _MOST_TEXT

    def stated(self, dotted: str) -> set[str] | None:
        """Return the names of a class's parameters and buffers, or None where its text is not there."""
        module, _, name = dotted.rpartition(".")
        if module not in self._files:
            text = self._archive.text(f"code/{module.replace('.', '/')}.py", self._left)
            self._left -= len(text)
            if self._left <= 0:
                raise Refused(f"it has more than {_MOST_TEXT} bytes of code")
            parts = re.split(r"^class (\w+)\(Module\):\n", text, flags=re.M)
            self._files[module] = {
                part: {name for line in _STATED.findall(body) for name in re.findall(r'"([^"]*)"', line)}
                for part, body in zip(parts[1::2], parts[2::2], strict=True)
            }
        return self._files[module].get(name)


def _find(name: str) -> Any:
    """Return what a name stands for: a module without behaviour, or what tensors are made of."""
    if name.startswith("__torch__."):
        return Maker(name, lambda: Shell(name))
    return Maker(name, _MAKERS[name]) if name in _MAKERS else tensor_names(name)
