"""promptmix: prompt learning and mixtures of prompts for CLIP-like vision-language models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

# In a checkout the rooms `trainers/`, `plugins/` and `configs/` lie beside this folder; an installed package has them inside.
_above = Path(__file__).resolve().parent.parent
if (_above / "setup.py").is_file() and (_above / "trainers").is_dir():
    __path__.append(str(_above))

from promptmix.hookspecs import hookimpl, hookspec  # noqa: E402  (needs __path__ as set above)
from promptmix.version import __version__  # noqa: E402

__all__ = ["__version__", "hookimpl", "hookspec", "load"]


def __getattr__(name: str) -> Any:  # noqa: ANN401
    """Import ``load`` when it is asked for: it brings torch, which ``promptmix --help`` does without."""
    if name == "load":
        from promptmix.predict import load

        return load
    raise AttributeError(f"module 'promptmix' has no attribute {name!r}")
