"""One labelled picture."""

from __future__ import annotations

__all__ = ["Datum"]


class Datum:
    """A picture's path with what is known about it. Its attributes can't be changed.

    Args:
        impath: path of a file, or ``pack.zip::member``.
        label: class, from 0.
        domain: domain (style, source), from 0.
        classname: name of the class.
    """

    __slots__ = ("_classname", "_domain", "_impath", "_label")

    def __init__(self, impath: str = "", label: int = 0, domain: int = 0, classname: str = "") -> None:
        # Whether the file exists is found out when it is read: a check here would cost a disk access per picture.
        self._impath = impath
        self._label = label
        self._domain = domain
        self._classname = classname

    @property
    def impath(self) -> str:
        """Return the path."""
        return self._impath

    @property
    def label(self) -> int:
        """Return the class."""
        return self._label

    @property
    def domain(self) -> int:
        """Return the domain."""
        return self._domain

    @property
    def classname(self) -> str:
        """Return the name of the class."""
        return self._classname

    def __repr__(self) -> str:
        return f"Datum({self._impath!r}, label={self._label}, domain={self._domain}, classname={self._classname!r})"
