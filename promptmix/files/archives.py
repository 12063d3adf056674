"""Tensors from files that ``torch.save`` or TorchScript wrote, without PyTorch's own readers.

An archive is a zip of stored members: ``<root>/data.pkl``, and the storages that it names, ``<root>/data/0`` and so on.
``torch.jit.load`` runs what an archive holds, and ``torch.load`` hands some files on to it. Here the pickle goes through
``promptmix.files.pickles``, each storage is checked against its checksum and its size, and a tensor can't claim more numbers
than its storage holds, so that no file needs more memory than its own length.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn

from promptmix.files.pickles import Maker, Refused, plain_makers, read_pickle

__all__ = ["Archive", "is_torchscript", "read_saved", "refusing_damage", "tensor_names"]

#: Largest pickle; what is large in a checkpoint lies in its storages.
MOST_PICKLE = 64 << 20
_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # of files that torch.save wrote before PyTorch 1.6
_DTYPES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
    "UntypedStorage": torch.uint8,
}


@dataclass(frozen=True)
class _Kind:
    """The type of a storage; a value that nothing in a pickle can change."""

    dtype: torch.dtype


@dataclass(frozen=True, eq=False)
class _Storage:
    """A storage: its numbers as a flat tensor, and how many there are."""

    numbers: Tensor


class Archive:
    """The zip that ``torch.save`` and TorchScript write.

    Args:
        path: the file.

    Raises:
        Refused: it is not such an archive.
    """

    def __init__(self, path: Path) -> None:
        self._zip = zipfile.ZipFile(path)
        self._left = path.stat().st_size
        names = self._zip.namelist()
        roots = [name.removesuffix("/data.pkl") for name in names if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(roots) != 1 or len(set(names)) < len(names):
            raise Refused("it is a zip, but not one of PyTorch's (no data.pkl, several, or two members of one name)")
        self.root, self._names = roots[0], set(names)
        order = self.read("byteorder", 16).decode("ascii", "replace") if self.has("byteorder") else "little"
        if order != sys.byteorder:
            raise Refused(f"its numbers are in {order[:10]!r} byte order; save it again on a machine like this one")
        self._storages: dict[str, _Storage] = {}

    def __enter__(self) -> Archive:
        return self

    def __exit__(self, *_: object) -> None:
        self._zip.close()

    def has(self, name: str) -> bool:
        """Tell whether there is such a member below the root."""
        return f"{self.root}/{name}" in self._names

    def read(self, name: str, most: int | None = None) -> bytes:
        """Return a member's bytes, checked against its checksum.

        Raises:
            Refused: it is missing, packed (so that its true size is unknown), larger than ``most``, or the members overlap.
        """
        if not self.has(name):
            raise Refused(f"its member {name[:60]} is missing")
        member = self._zip.getinfo(f"{self.root}/{name}")
        if member.compress_type != zipfile.ZIP_STORED or member.file_size != member.compress_size:
            raise Refused(f"its member {name[:60]} is packed, which PyTorch never does")
        self._left -= member.file_size
        if self._left < 0 or most is not None and member.file_size > most:
            raise Refused(f"its member {name[:60]} claims {member.file_size} bytes, more than there can be")
        return self._zip.read(member)

    def text(self, name: str, most: int) -> str:
        """Return the first ``most`` bytes of a member that may be packed, as text; "" where it is missing."""
        if not self.has(name):
            return ""
        with self._zip.open(f"{self.root}/{name}") as file:
            return file.read(most).decode("utf-8", "replace")

    def value(self, find: Callable[[str], Any], deepest: int = 100) -> Any:
        """Return what the archive holds; arguments as for ``read_pickle``."""
        return read_pickle(io.BytesIO(self.read("data.pkl", MOST_PICKLE)), find, self.storage, deepest)

    def storage(self, pid: Any) -> _Storage:
        """Return the storage that a persistent id names."""
        kind, key, count = _storage_id(pid, 5)
        if key not in self._storages:
            self._storages[key] = _storage(self.read(f"data/{key}"), kind, count)
        found = self._storages[key]
        if found.numbers.dtype != kind.dtype or len(found.numbers) != count:
            raise Refused(f"it gives storage {key[:20]} two types")
        return found


def is_torchscript(path: Path) -> bool:
    """Tell whether a file is an archive of TorchScript's, which holds a program beside its tensors."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def read_saved(path: Path, find: Callable[[str], Any], deepest: int = 100) -> Any:
    """Read what ``torch.save`` wrote, in the zip format or the one before it, onto the CPU.

    Args:
        path: the file.
        find: what a name stands for, as ``read_pickle`` takes it; ``tensor_names`` are those of tensors.
        deepest: levels of containers within containers that are allowed.

    Raises:
        Refused: it holds something else than tensors, containers and what ``find`` knows, or it is damaged.
    """
    with refusing_damage():
        if not zipfile.is_zipfile(path):
            with path.open("rb") as file:
                return _read_old(file, os.fstat(file.fileno()).st_size, find, deepest)
        with Archive(path) as archive:
            if archive.has("constants.pkl"):
                raise Refused("it is a program of TorchScript's (GLOBAL torch.jit)")
            return archive.value(find, deepest)


#: What reading a damaged zip or storage raises.
_DAMAGE = (
    *(zipfile.BadZipFile, zlib.error, struct.error, NotImplementedError, RuntimeError),
    *(ValueError, OverflowError, KeyError, EOFError, OSError),
)


@contextlib.contextmanager
def refusing_damage() -> Iterator[None]:
    """Turn what a damaged zip or storage raises into a refusal of one line.

    Raises:
        Refused: the file is damaged.
    """
    try:
        yield
    except _DAMAGE as error:
        # A directory that points in front of the file is an invalid seek; other errors of the system are not the file's.
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise
        raise Refused(f"it is damaged ({(str(error).splitlines() or [type(error).__name__])[0][:200]})") from error


def _read_old(file: IO[bytes], size: int, find: Callable[[str], Any], deepest: int) -> Any:
    """Read the format before PyTorch 1.6: five pickles (magic, version, system, value, keys), then the storages' bytes."""

    def plain(name: str) -> Any:
        raise Refused(f"it is not a file of torch.save (GLOBAL {name})")

    storages: dict[str, _Storage] = {}
    total = 0

    def storage(pid: Any) -> _Storage:
        nonlocal total
        kind, key, count = _storage_id(pid, 6)
        if pid[5] is not None:
            raise Refused("it has views of storages as PyTorch 0.4 wrote them; save it again with a newer PyTorch")
        if key not in storages:
            total += count * kind.dtype.itemsize
            if total > size:
                raise Refused(f"its storage {key[:20]} claims more bytes than the file has")
            storages[key] = _Storage(torch.empty(count, dtype=kind.dtype))
        if storages[key].numbers.dtype != kind.dtype or len(storages[key].numbers) != count:
            raise Refused(f"it gives storage {key[:20]} two types")
        return storages[key]

    if read_pickle(file, plain, most_opcodes=10) != _MAGIC or read_pickle(file, plain, most_opcodes=10) != _PROTOCOL:
        raise Refused("it is damaged or no file of torch.save")
    system = read_pickle(file, plain, most_opcodes=100)
    if not isinstance(system, dict) or (system.get("little_endian") is not False) != (sys.byteorder == "little"):
        raise Refused("its numbers are in another byte order; save it again on a machine like this one")
    value = read_pickle(file, find, storage, deepest)
    keys = read_pickle(file, plain)
    if not isinstance(keys, list) or sorted(map(str, keys)) != sorted(storages):
        raise Refused("it is damaged (its list of storages is another)")
    for key in keys:
        numbers = storages[key].numbers
        wanted = len(numbers) * numbers.dtype.itemsize
        if struct.unpack("<q", file.read(8))[0] != len(numbers) or len(data := file.read(wanted)) != wanted:
            raise Refused("it is damaged (a storage is cut off)")
        numbers.copy_(_storage(data, _Kind(numbers.dtype), len(numbers)).numbers)
    return value


def _storage_id(pid: Any, parts: int) -> tuple[_Kind, str, int]:
    """Check a persistent id ``("storage", type, key, device, count)`` and return type, key and count."""
    if type(pid) is not tuple or len(pid) != parts or pid[0] != "storage" or type(pid[1]) is not _Kind:
        raise Refused("it asks for an outside object that is not a storage")
    kind, key, _, count = pid[1:5]
    if type(key) is not str or type(count) is not int or count < 0:
        raise Refused("it names a storage wrongly")
    return kind, key, count


def _storage(data: bytes, kind: _Kind, count: int) -> _Storage:
    if len(data) != count * kind.dtype.itemsize:
        raise Refused(f"a storage has {len(data)} bytes, not {count} numbers of {kind.dtype}")
    if not data:
        return _Storage(torch.empty(0, dtype=kind.dtype))
    raw = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    if kind.dtype == torch.bool and int(raw.max()) > 1:
        raise Refused("a storage of truth values holds others than 0 and 1")
    return _Storage(raw.view(kind.dtype))


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, requires_grad: Any = False, *_: Any) -> Tensor:
    """Return the view of a storage that a file describes; hooks and metadata of tensors are passed over."""
    if type(storage) is not _Storage:
        raise Refused("it makes a tensor without a storage")
    return _view(storage.numbers, offset, size, stride, requires_grad)


def _tensor_of(storage: Any, offset: Any, size: Any, stride: Any, requires_grad: Any, _: Any, dtype: Any, *_more: Any) -> Tensor:
    """As ``_tensor``, of an untyped storage."""
    if type(storage) is not _Storage or storage.numbers.dtype != torch.uint8 or not isinstance(dtype, torch.dtype):
        raise Refused("it makes a tensor without a storage")
    return _view(storage.numbers.view(dtype), offset, size, stride, requires_grad)


def _view(numbers: Tensor, offset: Any, size: Any, stride: Any, requires_grad: Any) -> Tensor:
    size, stride = tuple(size), tuple(stride)
    if any(type(number) is not int or number < 0 for number in (offset, *size, *stride)) or len(size) != len(stride):
        raise Refused("it describes a tensor with sizes that are no whole numbers")
    count = 1
    for length in size:
        count *= length
    last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True)) if count else offset
    if count > len(numbers) or count and last >= len(numbers) or len(size) > 64:
        raise Refused(f"it describes a tensor of shape {size[:8]}, which its storage of {len(numbers)} numbers can't hold")
    found = torch.empty(0, dtype=numbers.dtype).set_(numbers.untyped_storage(), offset, size, stride)
    return found.requires_grad_(requires_grad is True and (found.is_floating_point() or found.is_complex()))


def _parameter(data: Any, requires_grad: Any = True, *_: Any) -> nn.Parameter:
    if not isinstance(data, Tensor):
        raise Refused("it makes a parameter without a tensor")
    return nn.Parameter(data.detach(), requires_grad is True and (data.is_floating_point() or data.is_complex()))


def _size(values: Any = ()) -> torch.Size:
    if not all(type(value) is int and 0 <= value < 1 << 62 for value in values):
        raise Refused("it has a size that is not a whole number")
    return torch.Size(values)


def _device(kind: Any, index: Any = None) -> torch.device:
    return torch.device(kind) if index is None else torch.device(kind, index)


def _names() -> dict[str, Any]:
    makes: dict[str, Callable[..., Any]] = {
        "torch._utils._rebuild_tensor": _tensor,
        "torch._utils._rebuild_tensor_v2": _tensor,
        "torch._utils._rebuild_tensor_v3": _tensor_of,
        "torch._utils._rebuild_parameter": _parameter,
        "torch.nn.parameter.Parameter": _parameter,
        "torch.Size": _size,
        "torch.device": _device,
    }
    kinds = {
        f"{module}.{name}": _Kind(dtype) for module in ("torch", "torch.cuda", "torch.storage") for name, dtype in _DTYPES.items()
    }
    dtypes = {f"torch.{name}": value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
    return plain_makers() | {name: Maker(name, make) for name, make in makes.items()} | kinds | dtypes


_NAMES = _names()


def tensor_names(name: str) -> Any:
    """Return what a name stands for in a file of plain tensors.

    Raises:
        Refused: it is of something else; the message ends in ``GLOBAL <name>``.
    """
    if name not in _NAMES:
        raise Refused(f"GLOBAL {name[:200]}")
    return _NAMES[name]
