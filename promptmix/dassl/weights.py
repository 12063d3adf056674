"""``MODEL.BACKBONE.WEIGHTS`` in a checkout: a local file instead of each of its downloads of CLIP."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from promptmix.errors import ConfigError

__all__ = ["LocalWeights"]


class LocalWeights:
    """Hands the weights of the backbone to every copy of CLIP that a checkout loads.

    Checkouts carry one to four copies of CLIP's loader (``clip/clip.py``, ``clip_text/``, ``clip_w_local/``, ...), and some open
    ``./clip/ViT-B-16.pt`` themselves.

    Args:
        path: a weights file, or a folder of files with OpenAI's names (``ViT-B-16.pt``, ``ViT-L-14.pt``), for checkouts that
            load more than one model.
        root: folder of the checkout.

    Raises:
        ConfigError: there is no such file or folder.
    """

    def __init__(self, path: str, root: Path) -> None:
        self.path, self.root = Path(path), root
        if not self.path.exists():
            raise ConfigError(f"MODEL.BACKBONE.WEIGHTS {path}: no such file")
        self.used = False
        self._backbone = ""

    def reach(self, backbone: str) -> None:
        """Replace ``_download`` in every module of the checkout that is imported by now.

        Args:
            backbone: ``MODEL.BACKBONE.NAME``; other models are downloaded as they were, where ``path`` is a file.
        """
        self._backbone = backbone
        for module in list(sys.modules.values()):
            file = getattr(module, "__file__", None)
            download = getattr(module, "_download", None)
            if file and Path(file).is_relative_to(self.root) and callable(download) and not hasattr(download, "promptmix"):
                module._download = self._instead(download, getattr(module, "_MODELS", {}))  # type: ignore[attr-defined]

    def _instead(self, download: Callable[..., str], models: dict[str, str]) -> Callable[..., str]:
        def local(url: str, *args: Any, **kwargs: Any) -> str:
            found = self._find(url.rpartition("/")[2], url == models.get(self._backbone, url))
            return str(found) if found else download(url, *args, **kwargs)

        local.promptmix = True  # type: ignore[attr-defined]
        return local

    def _find(self, name: str, is_backbone: bool) -> Path | None:
        """Return the local file that stands for the file ``name`` of OpenAI's, or None."""
        found = self.path / name if self.path.is_dir() else self.path if is_backbone else None
        if found is None or not found.is_file():
            return None
        self.used = True
        return found

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Also stand for files of OpenAI's names that the checkout opens by a path of its own, where there is none."""
        before = torch.load, torch.jit.load

        def wrapped(original: Callable[..., Any]) -> Callable[..., Any]:
            def load(f: Any, *args: Any, **kwargs: Any) -> Any:
                if isinstance(f, str | Path) and not Path(f).exists():
                    name = Path(f).name
                    f = self._find(name, name == self._backbone.replace("/", "-") + ".pt") or f
                try:
                    return original(f, *args, **kwargs)
                except RuntimeError:
                    if hasattr(f, "seek"):  # no archive of TorchScript: CLIP's loader then reads the same file otherwise
                        f.seek(0)
                    raise

            return load

        torch.load, torch.jit.load = wrapped(before[0]), wrapped(before[1])
        try:
            yield
        finally:
            torch.load, torch.jit.load = before

    def check_used(self) -> None:
        """Refuse weights that nothing of the checkout has asked for.

        Raises:
            ConfigError: nothing has; the model that was built has other weights.
        """
        if not self.used:
            raise ConfigError(
                f"MODEL.BACKBONE.WEIGHTS {self.path} would be ignored: nothing in {self.root} asked for the weights of "
                f"{self._backbone or 'CLIP'} through _download or by OpenAI's file name; leave the key out"
            )
