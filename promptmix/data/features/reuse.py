"""What the cache of features saved: pictures encoded, pictures taken, and the seconds of both."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import astuple, dataclass
from typing import TypeVar

from promptmix.files.text import counted

__all__ = ["Reuse", "awaited", "reused", "tell"]

T = TypeVar("T")


@dataclass
class Reuse:
    """What the cache of features did in a process, or in all those of a sweep.

    Attributes:
        encoded: pictures that were read and encoded.
        taken: pictures whose features were there.
        seconds: that reading and encoding took.
        saved: seconds that those which were there had taken.
        waited: of ``seconds``, those in which nothing was encoded, since no batch had been read.
    """

    encoded: int = 0
    taken: int = 0
    seconds: float = 0.0
    saved: float = 0.0
    waited: float = 0.0

    def __add__(self, other: Reuse) -> Reuse:
        """Return the sum."""
        return Reuse(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def __sub__(self, earlier: Reuse) -> Reuse:
        """Return what was done since ``earlier``."""
        return self + Reuse(*(-number for number in astuple(earlier)))

    def __str__(self) -> str:
        """In words; "" where there was nothing to encode."""
        if not self.encoded + self.taken:
            return ""
        spent = f"{self.seconds:.1f} s ({self.waited:.1f} s waiting for them)"
        return (
            f"features: {counted(self.encoded, 'picture')} encoded in {spent}, "
            f"{self.taken:,} taken from the cache, which saved {self.saved:.1f} s"
        )


_done = Reuse()


def reused() -> Reuse:
    """Return what this process did so far."""
    return _done + Reuse()


def tell(encoded: int = 0, taken: int = 0, seconds: float = 0.0, saved: float = 0.0, waited: float = 0.0) -> None:
    """Count pictures that were encoded or taken."""
    global _done
    _done = _done + Reuse(encoded, taken, seconds, saved, waited)


def awaited(batches: Iterable[T]) -> Iterator[T]:
    """Yield the batches of a loader that are encoded, and count the seconds that each was waited for."""
    begin = time.monotonic()
    for batch in batches:
        tell(waited=time.monotonic() - begin)
        yield batch
        begin = time.monotonic()
    tell(waited=time.monotonic() - begin)
