"""What the cache of features saved: pictures encoded, pictures taken, and the seconds of both."""

from __future__ import annotations

from dataclasses import dataclass

from promptmix.files.text import counted

__all__ = ["Reuse", "reused", "tell"]


@dataclass
class Reuse:
    """What the cache of features did in a process, or in all those of a sweep.

    Attributes:
        encoded: pictures that were read and encoded.
        taken: pictures whose features were there.
        seconds: that reading and encoding took.
        saved: seconds that those which were there had taken.
    """

    encoded: int = 0
    taken: int = 0
    seconds: float = 0.0
    saved: float = 0.0

    def __add__(self, other: Reuse) -> Reuse:
        """Return the sum."""
        saved, seconds = self.saved + other.saved, self.seconds + other.seconds
        return Reuse(self.encoded + other.encoded, self.taken + other.taken, seconds, saved)

    def __sub__(self, earlier: Reuse) -> Reuse:
        """Return what was done since ``earlier``."""
        return self + Reuse(-earlier.encoded, -earlier.taken, -earlier.seconds, -earlier.saved)

    def __str__(self) -> str:
        """In words; "" where there was nothing to encode."""
        if not self.encoded + self.taken:
            return ""
        return (
            f"features: {counted(self.encoded, 'picture')} encoded in {self.seconds:.1f} s, "
            f"{self.taken:,} taken from the cache, which saved {self.saved:.1f} s"
        )


_done = Reuse()


def reused() -> Reuse:
    """Return what this process did so far."""
    return _done + Reuse()


def tell(encoded: int = 0, taken: int = 0, seconds: float = 0.0, saved: float = 0.0) -> None:
    """Count pictures that were encoded or taken."""
    global _done
    _done = _done + Reuse(encoded, taken, seconds, saved)
