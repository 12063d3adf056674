"""Tokens: CLIP's byte-pair encoding, templates and class names, and tables that follow from them alone.

Such tables are made once: no step makes one, or copies it to the device. They lie in plain dictionaries, since ``torch.compile``
looks into those and takes what it finds, where it would look through a ``functools.lru_cache`` and trace how each table is made.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import cache, wraps
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import torch
from open_clip import SimpleTokenizer

from promptmix.errors import ConfigError

if TYPE_CHECKING:
    from open_clip.tokenizer import HFTokenizer


Given = ParamSpec("Given")
Table = TypeVar("Table")

#: How many are kept; beyond, the oldest go.
_SIZE = 256


def find(tables: dict[Hashable, Table], key: Hashable, make: Callable[[], Table], size: int = _SIZE) -> Table:
    """Return ``tables[key]``, made when it is first asked for; ``size`` of them are kept."""
    if key not in tables:
        if len(tables) >= size:  # several go at once: looking for the oldest passes all that went before
            for old in list(islice(tables, 1 + size // 8)):
                del tables[old]
        tables[key] = make()
    return tables[key]


def kept(make: Callable[Given, Table]) -> Callable[Given, Table]:
    """Keep what ``make`` returns for its positional arguments, which are hashable and decide it."""
    tables: dict[Hashable, Table] = {}

    @wraps(make)
    def get(*args: Given.args, **none: Given.kwargs) -> Table:
        return find(tables, args, lambda: _outside(make, *args))

    return get


@torch.inference_mode(False)  # a table made while a teacher runs serves steps that learn too
def _outside(make: Callable[..., Table], *args: Hashable) -> Table:
    return make(*args)


@cache
def _simple(bpe: str | None) -> SimpleTokenizer:
    """Return open_clip's tokenizer, whose table of merges is read once a process: nothing changes it."""
    return SimpleTokenizer() if bpe is None else SimpleTokenizer(bpe_path=bpe)


class Tokenizer:
    """CLIP's tokenizer, giving ids without SOT, EOT and padding.

    Args:
        bpe: file of merges (``.txt.gz``); None takes the one that open_clip ships.

    Attributes:
        before: ids in front of every text: SOT.
        after: ids behind every text: EOT.
        pad: id that fills texts up to the tower's length.
    """

    before: tuple[int, ...]
    after: tuple[int, ...]
    pad: int = 0

    def __init__(self, bpe: Path | None = None) -> None:
        self._simple = _simple(None if bpe is None else str(bpe))
        self.sot: int = self._simple.sot_token_id
        self.eot: int = self._simple.eot_token_id
        self.before, self.after = (self.sot,), (self.eot,)
        self._start_tables()

    def _start_tables(self) -> None:
        self._texts: dict[Hashable, tuple[int, ...]] = {}
        self._names: dict[Hashable, ClassTokens] = {}

    def _encode_uncached(self, text: str) -> tuple[int, ...]:
        return tuple(self._simple.encode(self._simple.clean_fn(text)))

    def encode(self, text: str) -> tuple[int, ...]:
        """Return the ids of ``text``; empty for empty text."""
        return find(self._texts, text, lambda: self._encode_uncached(text), size=65536)

    def word(self, token: int) -> str:
        r"""Return what a token stands for; one that goes on into the next ends with a hyphen, half a letter is ``\xe2``."""
        raw = bytes(self._simple.byte_decoder[letter] for letter in self._simple.decoder[token])
        text = raw.decode(errors="backslashreplace").replace("</w>", " ")
        return text.rstrip() if text.endswith(" ") else f"{text}-"

    def class_tokens(self, names: Sequence[str]) -> ClassTokens:
        """Return the tokens of class names, underscores read as spaces.

        Raises:
            ConfigError: a name has no tokens; give every class a readable name.
        """
        return find(self._names, tuple(names), lambda: self._class_tokens(names))

    def _class_tokens(self, names: Sequence[str]) -> ClassTokens:
        ids = tuple(self.encode(name.replace("_", " ")) for name in names)
        for name, row in zip(names, ids, strict=True):
            if not row:
                raise ConfigError(f"class name {name!r} has no tokens; give every class a readable name")
        return ClassTokens(tuple(names), ids)


class PretrainedTokenizer(Tokenizer):
    """A tokenizer of Hugging Face, as open_clip wraps it for SigLIP, CLIPA and multilingual towers.

    Args:
        source: open_clip's ``HFTokenizer``: it has ``tokenizer``, ``clean_fn`` and ``strip_sep_token``.
    """

    def __init__(self, source: HFTokenizer) -> None:
        self._source = source
        self._start_tables()
        inner: Any = source.tokenizer
        self.pad = inner.pad_token_id or 0
        word, whole = self._ids("a", special=False), self._ids("a", special=True)
        at = next(i for i in range(len(whole)) if whole[i : i + len(word)] == word)
        self.before, self.after = whole[:at], whole[at + len(word) :]
        if source.strip_sep_token:  # what open_clip writes there looks like padding
            self.after = tuple(0 if token == inner.sep_token_id else token for token in self.after)
            self.after = () if set(self.after) == {self.pad} else self.after

    def _ids(self, text: str, *, special: bool) -> tuple[int, ...]:
        cleaned = self._source.clean_fn(text)
        return tuple(self._source.tokenizer(cleaned, add_special_tokens=special)["input_ids"]) if cleaned or special else ()

    def word(self, token: int) -> str:
        """Return what a token stands for, as its own vocabulary writes it."""
        return str(self._source.tokenizer.convert_ids_to_tokens(token))

    def _encode_uncached(self, text: str) -> tuple[int, ...]:
        if text.strip()[:1].isalnum():
            return self._ids(text, special=False)
        # What stands behind a class name, such as a full stop, has no word's beginning in front of it.
        word, both = self._ids("a", special=False), self._ids(f"a{text.strip()}", special=False)
        return both[len(word) :] if both[: len(word)] == word else self._ids(text, special=False)


@dataclass(frozen=True)
class ClassTokens:
    """The token ids of C class names, each of its own length.

    Attributes:
        names: the C names as the data set writes them.
        ids: C rows of token ids.
        lengths: tokens of each name.
        flat: all ids, class after class.
    """

    names: tuple[str, ...]
    ids: tuple[tuple[int, ...], ...]
    lengths: tuple[int, ...] = field(init=False, repr=False, compare=False)
    flat: tuple[int, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "lengths", tuple(len(row) for row in self.ids))
        object.__setattr__(self, "flat", tuple(chain.from_iterable(self.ids)))

    def __len__(self) -> int:
        return len(self.ids)


def split_template(template: str) -> tuple[str, str]:
    """Return the texts before and after the class name of a template.

    Raises:
        ConfigError: ``{}`` does not stand in the template exactly once.
    """
    if template.count("{}") != 1:
        raise ConfigError(f"template {template!r} must contain {{}} exactly once, where the class name goes")
    before, after = template.split("{}")
    return before.strip(), after.strip()
