"""Downloads that can be resumed and are checked, and unpacking that never leaves its folder."""

from __future__ import annotations

import hashlib
import http.client
import os
import shutil
import stat
import tarfile
import urllib.error
import urllib.request
import zipfile
import zlib
from pathlib import Path, PurePosixPath, PureWindowsPath

from tqdm import tqdm

from promptmix.errors import DataError

__all__ = ["download", "unpack"]

_CHUNK = 1 << 20
_TRIES = 5
_TIMEOUT = 60  # seconds without a byte
#: Pictures don't shrink: an archive that grows by more than this was made to fill the disk.
_MOST_GROWTH, _ALWAYS_FINE = 50, 1 << 30


def download(url: str, target: Path, md5: str = "") -> None:
    """Get ``url`` as ``target``; what an earlier, cut-off download left in ``<target>.part`` is gone on from.

    Args:
        url: a public link.
        target: the file to make.
        md5: its checksum; "" where none is known.

    Raises:
        DataError: there is no connection, the server refuses, or the file is not the right one.
    """
    if target.is_file() and (not md5 or _md5(target) == md5):
        return
    part = target.with_name(target.name + ".part")
    target.parent.mkdir(parents=True, exist_ok=True)
    by_hand = f"or get {url} by hand, put it at {target} and run the same command again"
    for _ in range(_TRIES):
        before = part.stat().st_size if part.is_file() else 0
        try:
            if _fetch(url, part):
                break
            reason = "the connection was cut"
        except DataError:
            raise
        except urllib.error.HTTPError as error:
            raise DataError(f"can't download {url}: the server says {error.code} {error.reason}; try later, {by_hand}") from error
        except (OSError, http.client.HTTPException) as error:
            reason = str(getattr(error, "reason", error)) or type(error).__name__
        if not part.is_file() or part.stat().st_size == before:
            raise DataError(f"can't download {url} ({reason}); connect to the network, {by_hand}")
    else:
        raise DataError(f"can't download {url}: the connection was cut {_TRIES} times; run the same command to go on from there")
    if md5 and _md5(part) != md5:
        size = part.stat().st_size
        part.unlink()
        raise DataError(f"{url} gave another file than expected ({size:,} bytes, MD5 is not {md5}); try later, {by_hand}")
    os.replace(part, target)


def _fetch(url: str, part: Path) -> bool:
    """Append to ``part`` what it lacks; return whether it is whole now."""
    start = part.stat().st_size if part.is_file() else 0
    request = urllib.request.Request(url, headers={"User-Agent": "promptmix", "Accept-Encoding": "identity"})
    if start:
        request.add_header("Range", f"bytes={start}-")
    try:
        answer = urllib.request.urlopen(request, timeout=_TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == 416 and start:  # nothing is left to send
            return True
        raise
    with answer:
        if answer.headers.get_content_type() == "text/html":
            raise DataError(f"{url} gives a web page instead of the file; open it in a browser, and follow what it says")
        resumed = answer.status == 206  # a server that can't resume sends everything again
        start = start if resumed else 0
        length = int(answer.headers.get("Content-Length") or 0)
        with (
            part.open("ab" if resumed else "wb") as file,
            tqdm(total=start + length or None, initial=start, unit="B", unit_scale=True, desc=part.stem, disable=None) as bar,
        ):
            while chunk := answer.read(_CHUNK):
                file.write(chunk)
                bar.update(len(chunk))
    return not length or part.stat().st_size == start + length


def _md5(path: Path) -> str:
    digest = hashlib.md5(usedforsecurity=False)  # what the authors publish; it guards against damage, not against malice
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def unpack(archive: Path, into: Path) -> None:
    """Unpack a zip or tar archive into a new folder.

    Args:
        archive: the file.
        into: must not exist; it is removed again if anything goes wrong.

    Raises:
        DataError: the archive is damaged, or a member is a link or path that leaves the folder, or a device; or what is in it is
            more than 1 GiB and 50 times its own size.
    """
    into.mkdir(parents=True)
    try:
        if zipfile.is_zipfile(archive):
            _unpack_zip(archive, into)
        else:
            _unpack_tar(archive, into)
    except (
        tarfile.TarError,
        zipfile.BadZipFile,
        zlib.error,
        EOFError,
        OSError,
        ValueError,
        RuntimeError,
    ) as error:  # RuntimeError: a password
        shutil.rmtree(into, ignore_errors=True)
        if isinstance(error, DataError):
            raise
        said = " ".join(str(error).split())
        raise DataError(f"can't unpack {archive} ({said}); remove it and run the same command again") from error


def _unpack_zip(archive: Path, into: Path) -> None:
    total = 0
    with zipfile.ZipFile(archive) as pack:
        for member in pack.infolist():
            if stat.S_ISLNK(member.external_attr >> 16):
                raise DataError(f"{archive} is refused: its member {member.filename!r} is a link; get it from another place")
            _check_inside(member.filename, archive)
            total = _grown(total, member.file_size, archive)
            pack.extract(member, into)


def _unpack_tar(archive: Path, into: Path) -> None:
    # Python before 3.10.12 and 3.11.4 knows no filter; the checks here hold there too.
    options = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
    total = 0
    with tarfile.open(archive) as pack:
        for member in pack:
            _check_inside(member.name, archive)
            if not (member.isfile() or member.isdir()):
                raise DataError(
                    f"{archive} is refused: its member {member.name!r} is a link or device; get it from another place"
                )
            total = _grown(total, member.size, archive)
            pack.extract(member, into, **options)  # type: ignore[arg-type]


def _grown(total: int, more: int, archive: Path) -> int:
    """Return how many bytes are unpacked with the next member, which are checked before they are written."""
    total += more
    if total > max(_ALWAYS_FINE, _MOST_GROWTH * archive.stat().st_size):
        raise DataError(f"{archive} is refused: unpacked it has more than {_MOST_GROWTH} times its size; get it elsewhere")
    return total


def _check_inside(name: str, archive: Path) -> None:
    parts = PurePosixPath(name.replace("\\", "/")).parts
    if name.startswith(("/", "\\")) or ".." in parts or PureWindowsPath(name).drive:
        raise DataError(f"{archive} is refused: its member {name!r} would leave the folder; get it from another place")
