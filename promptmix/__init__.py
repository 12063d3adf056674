"""promptmix: prompt learning and mixtures of prompts for CLIP-like vision-language models."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

from promptmix.hookspecs import hookimpl, hookspec
from promptmix.registry import register
from promptmix.version import __version__

__all__ = ["__version__", "hookimpl", "hookspec", "load", "register"]

_CHECKOUT = Path(__file__).resolve().parent.parent


class _Beside:
    """Finds the packages that lie beside this folder in a checkout; an installed promptmix has them inside."""

    names = ("promptmix.trainers", "promptmix.plugins", "promptmix.configs")

    @classmethod
    def find_spec(cls, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Return where the package is, for these names alone: nothing else of the checkout becomes importable."""
        if name not in cls.names:
            return None
        folder = _CHECKOUT / name.rpartition(".")[2]
        return spec_from_file_location(name, folder / "__init__.py", submodule_search_locations=[str(folder)])


if (_CHECKOUT / "setup.py").is_file() and (_CHECKOUT / "trainers").is_dir():
    sys.meta_path.append(_Beside)


def __getattr__(name: str) -> Any:
    """Import ``load`` when it is asked for: it brings torch, which ``promptmix --help`` does without."""
    if name == "load":
        from promptmix.predict import load

        return load
    raise AttributeError(f"module 'promptmix' has no attribute {name!r}")
