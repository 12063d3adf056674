"""Image features on disk: computed once per weights, pictures and transform, and shared by every method and seed."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from PIL import __version__ as pil_version
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from yacs.config import CfgNode

from promptmix.data.base import reading_of
from promptmix.data.datum import Datum
from promptmix.data.features.reuse import tell
from promptmix.errors import DataError, OutputError, UserError
from promptmix.files.digests import digest_of
from promptmix.files.locks import held
from promptmix.parallel import group
from promptmix.utils import atomic_write, get_logger

#: Raised when a file's meaning changes, so that old files are passed over.
_VERSION = 5
_SUFFIX = ".safetensors"
#: Tensor of a file: how long its making took.
_SECONDS = "seconds"
#: Keys of INPUT that change no pixel, or only through the transform, which is told beside them.
_NO_PIXELS = (
    *("CACHED_VIEWS", "FEATURE_CACHE", "FEATURE_CACHE_DIR", "FEATURE_CACHE_GB"),
    *("PICTURE_CACHE", "PICTURE_CACHE_GB", "PIPELINE"),
)
#: What reading a file may raise. safetensors opens it twice, and the second time torch does, with an error of its own.
_UNREADABLE = (OSError, RuntimeError, SafetensorError)
_hashes: WeakKeyDictionary[nn.Module, tuple[int, str]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Entry:
    """One file of the cache.

    Attributes:
        path: the file.
        size: bytes.
        used: when it was last read or written, in seconds since 1970.
        about: what it holds, for people.
    """

    path: Path
    size: int
    used: float
    about: str


def cache_folder(chosen: str = "") -> Path:
    """Return the folder of the cache.

    Args:
        chosen: ``INPUT.FEATURE_CACHE_DIR``; "" asks ``PROMPTMIX_CACHE_DIR``, then the user's cache folder (XDG).

    Raises:
        DataError: none of these is set, and this user has no home folder.
    """
    if chosen:
        return Path(chosen)
    own = os.environ.get("PROMPTMIX_CACHE_DIR")
    home = os.path.expanduser("~")
    if not own and not os.environ.get("XDG_CACHE_HOME") and not os.path.isabs(home):
        raise DataError(
            "this user has no home folder for the feature cache; set PROMPTMIX_CACHE_DIR (or `promptmix cache --dir`)"
        )
    base = Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path(home, ".cache"), "promptmix")
    return base / "features"


class FeatureCache:
    """A folder of tensors under hashed keys. Any number of processes may read and write it at once.

    A file appears whole or not at all, and two processes that compute the same thing write the same bytes. Beyond the size
    limit, what was not used for longest is removed first; a process that has such a file open keeps its data.

    Args:
        folder: where the files lie; made when first written.
        limit_gb: size limit in 10^9 bytes; 0 keeps everything.
    """

    what = "features"
    limit_key = "INPUT.FEATURE_CACHE_GB"

    def __init__(self, folder: Path, limit_gb: float = 0.0) -> None:
        self.folder, self.limit = folder, limit_gb * 1e9

    def get(self, key: str, shapes: Mapping[str, tuple[int, ...]] | None = None) -> dict[str, Tensor] | None:
        """Return the tensors under ``key``, mapped from the file, or None where there are none that can be believed.

        A file that is damaged, was changed, belongs to another key or has not the tensors that are asked for is removed with a
        warning, so that it is made anew.

        Args:
            key: what ``feature_key`` returned.
            shapes: name of a tensor -> its first axes; these must be there.
        """
        path = self.folder / (key + _SUFFIX)
        if not os.path.isfile(path):  # False too where nobody may look, or the name is too long: `put` says so
            return None
        try:
            tensors = load_file(path)
            with safe_open(path, framework="pt") as file:
                stated = (file.metadata() or {}).get("digest")
            reason = (
                "it was changed after it was written"
                if stated != content_digest(key, tensors)
                else _misfit(tensors, shapes or {})
            )
        except FileNotFoundError:  # removed meanwhile
            return None
        except _UNREADABLE as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            if os.strerror(errno.ENOENT) in reason:  # removed meanwhile, as PyTorch says it, and perhaps there again
                return None
        if reason:
            if path.exists():
                get_logger().warning("Cached %s in %s are not used and made anew: %s", self.what, path, reason)
                _remove(path)
            return None
        with contextlib.suppress(OSError):  # removed meanwhile, or a folder that others fill
            os.utime(path)
        return tensors

    def put(self, key: str, tensors: Mapping[str, Tensor], about: str) -> None:
        """Store tensors under ``key``; a disk that takes no more only costs the saving, and says so.

        Args:
            key: what ``feature_key`` returned.
            tensors: on any device.
            about: what they are, for ``promptmix cache list``.
        """
        if not group.writes():
            return
        plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        size = sum(tensor.nbytes for tensor in plain.values())
        if self.limit and size > self.limit:
            get_logger().info("Features (%.1f GB) exceed %s and are not kept", size / 1e9, self.limit_key)
            return
        note = {"about": about, "digest": content_digest(key, plain)}
        self.write(key, lambda path: save_file(plain, path, metadata=note))

    def write(self, key: str, make: Callable[[Path], None]) -> None:
        """Have ``make`` write the file of ``key``; a disk that takes no more only costs the saving, and says so.

        Args:
            key: what tells the content from all others.
            make: gets the temporary path and writes the whole file there, with its digest.

        Raises:
            UserError: ``make`` raised it.
        """
        target = self.folder / (key + _SUFFIX)
        try:
            atomic_write(target, make)
        except (OSError, SafetensorError) as error:  # safetensors wraps what the system says
            if isinstance(error, UserError) and not isinstance(error, OutputError):
                raise
            reason = getattr(error, "strerror", None) or error
            get_logger().warning("%s can't be kept in %s (%s)", self.what.capitalize(), self.folder, reason)
            return
        self._shrink(target)

    def obtain(
        self, key: str, shapes: Mapping[str, tuple[int, ...]], make: Callable[[], Mapping[str, Tensor]], about: str, pictures: int
    ) -> Mapping[str, Tensor]:
        """Return the tensors under ``key``, made now where they are not there; one process makes them, others wait for it.

        Args:
            key: what ``feature_key`` returned.
            shapes: as ``get`` takes them.
            make: returns the tensors.
            about: what they are, for ``promptmix cache list``.
            pictures: how many ``make`` encodes, for the sum of what was saved.
        """
        shapes = {**shapes, _SECONDS: ()}
        stored = self._agreed(key, shapes)
        if stored is None:
            with self.claim(key):
                stored = self._agreed(key, shapes)  # of whom this process has waited for
                if stored is None:
                    start = time.monotonic()
                    made = make()
                    seconds = time.monotonic() - start
                    tell(encoded=pictures, seconds=seconds)
                    self.put(key, {**made, _SECONDS: torch.tensor(seconds, dtype=torch.float64)}, about)
                    return made
        tell(taken=pictures, saved=float(stored[_SECONDS]))
        return stored

    def _agreed(self, key: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor] | None:
        """Return what all processes of a training have found; another run may fill the cache between two looks."""
        found = self.get(key, shapes)
        return found if group.agree(found is not None) else None

    @contextlib.contextmanager
    def claim(self, key: str) -> Iterator[None]:
        """Be the only process that makes what belongs to ``key``; another waits, and looks again then.

        The claim goes with its process, however that ends. Where the folder or its system has no locks, two may do the same work.
        """
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(OSError):
                if group.size() == 1:  # the processes of one training make things together
                    stack.enter_context(held(self.folder / f".{key}.lock", wait=True))
            yield

    def entries(self) -> list[Entry]:
        """Return every file, the one used last first."""
        found = []
        for path in self.folder.glob("*" + _SUFFIX) if self.folder.is_dir() else ():
            with contextlib.suppress(*_UNREADABLE):
                if not path.is_file():  # a named pipe would be waited for
                    continue
                state = path.stat()
                with safe_open(path, framework="pt") as file:
                    about = (file.metadata() or {}).get("about", "")
                found.append(Entry(path, state.st_size, state.st_mtime, about))
        return sorted(found, key=lambda entry: -entry.used)

    def clear(self) -> int:
        """Remove every file and return how many bytes that freed."""
        freed = 0
        for path in [*self.folder.glob("*" + _SUFFIX), *self._unfinished()]:
            freed += _remove(path)
        return freed

    def _unfinished(self) -> list[Path]:
        return list(self.folder.glob(f".*{_SUFFIX}.*.tmp"))

    def _shrink(self, newest: Path) -> None:
        for path in self._unfinished():  # of writers that were killed
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime > 86400:
                    _remove(path)
        if not self.limit:
            return
        files = []
        for path in self.folder.glob("*" + _SUFFIX):
            with contextlib.suppress(OSError):  # another process removed it
                state = path.stat()
                files.append((path != newest, state.st_mtime, state.st_size, path))
        total = sum(size for _, _, size, _ in files)
        for old, _, size, path in sorted(files, key=lambda file: file[1]):
            if total > self.limit and old:
                _remove(path)
                total -= size


def content_digest(key: str, tensors: Mapping[str, Tensor]) -> str:
    """Return the digest of a file's tensors together with its key, so that one file can't take another's place."""
    return digest_of({"key": key, "tensors": dict(sorted(tensors.items()))})


def _misfit(tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Say which tensor is missing or of another size; "" where all fit."""
    for name, shape in shapes.items():
        if name not in tensors:
            return f"it has no tensor {name}"
        if tuple(tensors[name].shape[: len(shape)]) != shape:
            return f"{name} is {tuple(tensors[name].shape)}, but must begin with {shape}"
    return ""


def _remove(path: Path) -> int:
    """Remove a file, or what a writer left, and return how many bytes that freed."""
    freed = 0
    with contextlib.suppress(OSError):  # gone already, or open on a system that forbids it
        left = path.is_dir() and not path.is_symlink()  # what a link leads to is another's
        for file in list(path.iterdir()) if left else [path]:
            size = file.stat().st_size
            file.unlink()
            freed += size
        if left:
            path.rmdir()
    return freed


def weights_hash(module: nn.Module) -> str:
    """Return a hash of a module's tensors, computed again only after they were changed in place."""
    state = module.state_dict()
    changes = sum(tensor._version for tensor in state.values())
    if module not in _hashes or _hashes[module][0] != changes:
        digest = hashlib.sha256()
        for name, tensor in sorted(state.items()):
            digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        _hashes[module] = changes, digest.hexdigest()
    return _hashes[module][1]


def picture_stamps(items: Sequence[Datum]) -> Iterator[bytes]:
    """Yield for each picture a line that no other has: path, size and time of change of its file or pack, and its name there.

    Raises:
        UserError: a picture is missing.
    """
    stamps: dict[str, str] = {}
    for item in items:
        file, _, member = item.impath.partition("::")
        if file not in stamps:
            try:
                state = os.stat(file)
            except OSError as error:
                raise UserError(
                    f"no picture {item.impath} ({error.strerror}); check the path, or DATASET.ROOT where a data set names it"
                ) from error
            stamps[file] = f"{os.path.abspath(file)}|{state.st_size}|{state.st_mtime_ns}"
        yield f"{stamps[file]}|{member}\n".encode()


def items_hash(items: Sequence[Datum]) -> str:
    """Return a hash of which pictures ``items`` are, in order (see ``picture_stamps``).

    Raises:
        UserError: a picture is missing.
    """
    digest = hashlib.sha256()
    for stamp in picture_stamps(items):
        digest.update(stamp)
    return digest.hexdigest()


def feature_key(cfg: CfgNode, tower: nn.Module, items: Sequence[Datum], transform: object, **more: object) -> str | None:
    """Return the key of the features of ``items``, or None where ``transform`` can't be described.

    Args:
        cfg: the whole config tree; its INPUT node and the precision count.
        tower: the frozen image tower.
        items: the pictures, in order.
        transform: what is done to them; its ``repr`` must say all about it.
        more: whatever else the features depend on (batch size, random state).
    """
    # Our own transforms are told by the INPUT node.
    described = re.sub(r"<(promptmix\.data\.\S+) object at 0x[0-9a-fA-F]+>", r"\1", repr(transform))
    if " at 0x" in described:  # an object that does not say what it does
        return None
    parts: dict[str, Any] = {
        "version": _VERSION,
        "weights": weights_hash(tower),
        "items": items_hash(items),
        "input": {key: value for key, value in cfg.INPUT.items() if key not in _NO_PIXELS} | {"READING": reading_of(cfg)},
        "transform": described,
        "precision": cfg.TRAINER.PREC,
        "kernels": [cfg.MODEL.COMPILE, cfg.MODEL.PLAIN_TOWERS],
        "libraries": [torch.__version__, pil_version],
        **more,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:40]


def open_cache(cfg: CfgNode) -> FeatureCache | None:
    """Return the cache that ``cfg.INPUT`` asks for, or None where it is off, or has no place."""
    if not cfg.INPUT.FEATURE_CACHE:
        return None
    try:
        return FeatureCache(cache_folder(cfg.INPUT.FEATURE_CACHE_DIR), cfg.INPUT.FEATURE_CACHE_GB)
    except DataError as error:
        get_logger().info("Features are not kept: %s", error)
        return None


@contextlib.contextmanager
def same_randomness() -> Iterator[None]:
    """Leave the random states of torch, python and numpy as they were before the context."""
    from promptmix.data.reading.streams import get_streams, set_streams

    streams = get_streams()
    try:
        yield
    finally:
        set_streams(streams)
