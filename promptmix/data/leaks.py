"""Finds what makes a data set's numbers wrong: the same picture in train and test or under two labels, names that are one name.

Pictures are the same where their bytes are. That costs one look at each file's size, sixteen kilobytes of those that share a size
with another, and the whole of those that agree in these: about as much again as looking for damaged pictures.
"""

from __future__ import annotations

import hashlib
import os
import stat
import unicodedata
import zipfile
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import cast

from promptmix.data.datum import Datum
from promptmix.data.reading.images import member_size, open_member
from promptmix.files.text import counted

__all__ = ["alike", "find_copies", "find_leaks"]

_HEAD = 1 << 14  # bytes that are looked at first
_THREADS = 16  # they mostly wait for the disk or the network

_UNREADABLE = (OSError, KeyError, ValueError, zipfile.BadZipFile)


def alike(names: Iterable[str]) -> list[list[str]]:
    """Return class names that differ in case, underscores, spaces or what can't be seen only, in groups.

    A text tower, or a person, can't tell them apart: ``é`` as one letter or two, a space without width.
    """
    groups: dict[str, list[str]] = defaultdict(list)
    for name in dict.fromkeys(names):
        seen = "".join(letter for letter in unicodedata.normalize("NFKC", name) if unicodedata.category(letter) != "Cf")
        groups[" ".join(seen.replace("_", " ").casefold().split())].append(name)
    return [group for group in groups.values() if len(group) > 1]


def find_leaks(splits: Mapping[str, Sequence[Datum]]) -> list[str]:
    """Return what is wrong with the parts of a data set, one line each, with counts and an example.

    Args:
        splits: part -> items, such as ``train``, ``val`` and ``test``. A val part that is the test part counts once.
    """
    tested = [item.impath for item in splits.get("test", ())]
    parts = {name: items for name, items in splits.items() if name != "val" or [item.impath for item in items] != tested}
    places: dict[str, list[tuple[str, Datum]]] = defaultdict(list)
    for part, items in parts.items():
        for item in items:
            places[item.impath].append((part, item))
    groups = [[place for path in paths for place in places[path]] for paths in find_copies(places)]
    # A table may name one file twice.
    listed = {item.impath for group in groups for _, item in group}
    groups += [group for path, group in places.items() if len(group) > 1 and path not in listed]
    return [*_across(groups, parts), *_labels(groups), *_again(groups)]


Groups = list[list[tuple[str, Datum]]]


def _across(groups: Groups, parts: Mapping[str, Sequence[Datum]]) -> Iterator[str]:
    for one, other in (("train", "test"), ("train", "val"), ("val", "test")):
        pairs = [
            (mine[0], [item for part, item in group if part == other])
            for group in groups
            if (mine := [item for part, item in group if part == one]) and any(part == other for part, _ in group)
        ]
        if pairs:
            count = sum(len(theirs) for _, theirs in pairs)
            first, second = pairs[0][0].impath, pairs[0][1][0].impath
            same = f"{first}" if first == second else f"{second}, which is {first}"
            yield (
                f"{count:,} of {counted(len(parts[other]), 'picture')} of {other} {'is' if count == 1 else 'are'} in {one} too, "
                f"such as {same}; numbers on {other} are too good: remove them from one of the two"
            )


def _labels(groups: Groups) -> Iterator[str]:
    found = [group for group in groups if len({item.label for _, item in group}) > 1]
    if found:
        one = {item.label: item for _, item in found[0]}
        example = " and ".join(f"{item.impath} as {item.classname!r}" for item in list(one.values())[:2])
        count = counted(len(found), "picture stands", "pictures stand")
        yield f"{count} under two labels, such as {example}; leave each under one"


def _again(groups: Groups) -> Iterator[str]:
    extra: Counter[str] = Counter()
    example: dict[str, str] = {}
    for group in groups:
        for (part, _label), count in Counter((part, item.label) for part, item in group).items():
            if count > 1:
                extra[part] += count - 1
                same = [item.impath for p, item in group if p == part]
                example.setdefault(part, f"{same[1]}, which is {same[0]}" if same[0] != same[1] else same[0])
    for part, count in extra.items():
        copies = "is a copy of another" if count == 1 else "are copies of others"
        yield f"{counted(count, 'picture')} of {part} {copies} there, such as {example[part]}; remove the copies"


def find_copies(paths: Iterable[str]) -> list[list[str]]:
    """Return groups of paths whose files hold the same bytes, each group and its members in the order of ``paths``.

    Args:
        paths: files, or ``pack.zip::member``; what can't be read is passed over, since reading it is checked elsewhere.
    """
    unique = list(dict.fromkeys(paths))
    with ThreadPoolExecutor(_THREADS) as pool:

        def alike_by(groups: list[list[str]], key: Callable[[str], Hashable | None]) -> list[list[str]]:
            members = [path for group in groups for path in group]
            keys = dict(zip(members, pool.map(key, members, chunksize=64), strict=True))
            found: list[list[str]] = []
            for group in groups:
                parts: dict[Hashable, list[str]] = defaultdict(list)
                for path in group:
                    if keys[path] is not None:
                        parts[keys[path]].append(path)
                found += [part for part in parts.values() if len(part) > 1]
            return found

        groups = alike_by([unique], _size)
        groups = alike_by(groups, lambda path: _digest(path, _HEAD))
        large = [group for group in groups if cast(int, _size(group[0])) > _HEAD]
        small = [group for group in groups if cast(int, _size(group[0])) <= _HEAD]
        groups = small + alike_by(large, lambda path: _digest(path, None))
    order = {path: place for place, path in enumerate(unique)}
    return sorted(groups, key=lambda group: order[group[0]])


def _size(path: str) -> int | None:
    """Return how many bytes a picture has; None for what is empty, no regular file or not there."""
    try:
        if "::" in path:
            return member_size(path) or None
        state = os.stat(path)
    except _UNREADABLE:
        return None
    return state.st_size or None if stat.S_ISREG(state.st_mode) else None


def _digest(path: str, count: int | None) -> bytes | None:
    """Return a digest of the first ``count`` bytes, or of all."""
    digest = hashlib.sha256()
    try:
        with open_member(path) if "::" in path else open(path, "rb") as file:
            while chunk := file.read(count or 1 << 20):
                digest.update(chunk)
                if count:
                    break
    except _UNREADABLE:
        return None
    return digest.digest()
