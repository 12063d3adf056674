"""A machine for pickles that can build fresh containers and what its caller makes, and nothing else.

Python's own unpickler imports what a file names, calls it, and sets attributes on it. Here a name in a file never becomes
an object of this process: it stays a ``Maker`` that the caller gave for it, and the opcodes that change something
(``BUILD``, ``SETITEM``, ``APPEND``, ...) take only what this very reading has made.
"""

from __future__ import annotations

import pickle
import pickletools
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import IO, Any

import torch

__all__ = ["Maker", "Refused", "Shell", "plain_makers", "read_pickle"]

#: Largest number of opcodes, of bytes of a whole number, and of values as they would be written out without sharing.
MOST_OPCODES, MOST_INT_BYTES, MOST_VALUES = 5_000_000, 1024, 20_000_000
_MARK = object()
_SCALARS = (str, int, float, bool, type(None), bytes)


class Refused(pickle.UnpicklingError):
    """A pickle asks for something that is not built here, or is damaged; the message is one line."""

    def __init__(self, why: str) -> None:
        super().__init__(" ".join(why.split()))  # it may hold a name of the file's, and that a line end


class Shell:
    """Stands for an object whose class is not built: its name and its state, and no behaviour.

    Attributes:
        wanted: dotted name of the class.
        state: what the file would have set on it.
    """

    def __init__(self, wanted: str) -> None:
        self.wanted = wanted
        self.state: dict[str, Any] = {}

    def take(self, state: Any) -> None:
        """Keep the state that a file sets.

        Raises:
            Refused: it is not a dict of names.
        """
        if type(state) is tuple and len(state) == 2 and type(state[0]) in (dict, type(None)):
            state = state[0] or {}  # the second holds slots
        if type(state) is not dict or not all(type(key) is str for key in state):
            raise Refused(f"it sets a state that is not a dict on {self.wanted[:200]}")
        self.state = dict(state)

    def __repr__(self) -> str:
        return f"<not built: {self.wanted}>"


@dataclass(frozen=True)
class Maker:
    """What a name in a pickle stands for.

    Attributes:
        name: dotted name, as the file has it.
        make: gets the file's positional arguments and returns something new.
    """

    name: str
    make: Callable[..., Any]


def read_pickle(
    file: IO[bytes],
    find: Callable[[str], Any],
    persistent: Callable[[Any], Any] | None = None,
    deepest: int = 100,
    most_opcodes: int = MOST_OPCODES,
) -> Any:
    """Read one pickle, up to its STOP.

    Args:
        file: open at the pickle's start.
        find: returns a ``Maker``, or a value that can't be changed, for the dotted name of a class or function.
        persistent: returns what stands for a persistent id (PyTorch's storages); None refuses them.
        deepest: levels of containers within containers that are allowed.
        most_opcodes: longest pickle that is read.

    Raises:
        Refused: it wants another class or function, is too long or too deep, holds itself, or is damaged.
    """
    machine = _Machine(find, persistent)
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(file)):
            if count > most_opcodes:
                raise Refused(f"it has more than {most_opcodes} opcodes")
            if opcode.name == "STOP":
                break
            step = _STEPS.get(opcode.name)
            if step is None:
                raise Refused(f"its opcode {opcode.name} has no place among tensors and numbers")
            step(machine, argument)
        found = machine.pop()
        _measure(found, deepest)
    except Refused:
        raise
    except (MemoryError, RecursionError) as error:
        raise Refused(f"it is too large ({type(error).__name__})") from error
    except Exception as error:  # a damaged pickle can raise anything
        first = (str(error).splitlines() or [""])[0][:200]
        raise Refused(f"it is damaged ({type(error).__name__}: {first})") from error
    return found


class _Machine:
    """The stack and the memo of one reading."""

    def __init__(self, find: Callable[[str], Any], persistent: Callable[[Any], Any] | None) -> None:
        self.find, self.persistent = find, persistent
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def push(self, value: Any) -> None:
        """Put a value on the stack."""
        self.stack.append(value)

    def pop(self) -> Any:
        """Take the value on top."""
        if not self.stack or self.stack[-1] is _MARK:
            raise Refused("it is damaged (nothing on its stack)")
        return self.stack.pop()

    def top(self) -> Any:
        """Return the value on top and leave it there."""
        value = self.pop()
        self.stack.append(value)
        return value

    def since_mark(self) -> list[Any]:
        """Take everything above the last mark, and the mark."""
        for place in range(len(self.stack) - 1, -1, -1):
            if self.stack[place] is _MARK:
                found = self.stack[place + 1 :]
                del self.stack[place:]
                return found
        raise Refused("it is damaged (no mark on its stack)")

    def remember(self, number: int) -> None:
        """Keep the value on top under a number."""
        self.memo[number] = self.top()

    def recall(self, number: int) -> None:
        """Put a kept value on the stack."""
        if number not in self.memo:
            raise Refused(f"it is damaged (no value {number} in its memo)")
        self.push(self.memo[number])

    def name(self, dotted: str) -> None:
        """Push what a name stands for."""
        self.push(self.find(dotted))

    def stack_name(self) -> None:
        """Push what the two strings on the stack name."""
        name, module = self.pop(), self.pop()
        if type(name) is not str or type(module) is not str:
            raise Refused("it is damaged (a class or function without a name)")
        self.name(f"{module}.{name}")

    def call(self) -> None:
        """Have a maker make something."""
        arguments, maker = self.pop(), self.pop()
        if type(maker) is not Maker:
            raise Refused(f"it calls a {type(maker).__name__}")
        if type(arguments) is not tuple:
            raise Refused("it is damaged (a call without arguments)")
        self.push(maker.make(*arguments))

    def call_with_keywords(self) -> None:
        """As ``call``; keyword arguments must be none."""
        if self.pop() != {}:
            raise Refused("it calls a class with keyword arguments")
        self.call()

    def set_state(self) -> None:
        """Give a shell its state. An ``OrderedDict`` may come with attributes of PyTorch's, which are passed over."""
        state, target = self.pop(), self.top()
        if isinstance(target, Shell):
            target.take(state)
        elif type(target) is not OrderedDict:
            raise Refused(f"it sets a state on a {_kind(target)}")

    def set_items(self, pairs: list[Any]) -> None:
        """Add keys and values to the dict on top."""
        target = self.top()
        if type(target) not in (dict, OrderedDict, Counter) or len(pairs) % 2:
            raise Refused(f"it sets items on a {_kind(target)}")
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            target[_key(key)] = value

    def append(self, values: list[Any]) -> None:
        """Add values to the list on top."""
        target = self.top()
        if type(target) is not list:
            raise Refused(f"it appends to a {_kind(target)}")
        target.extend(values)

    def add(self, values: list[Any]) -> None:
        """Add values to the set on top."""
        target = self.top()
        if type(target) is not set:
            raise Refused(f"it adds to a {_kind(target)}")
        target.update(map(_key, values))

    def outside(self, pid: Any) -> None:
        """Push what a persistent id stands for."""
        if self.persistent is None:
            raise Refused("it asks for an object outside of the file")
        self.push(self.persistent(pid))


def _kind(value: Any) -> str:
    return f"class or function ({value.name})" if isinstance(value, Maker) else type(value).__name__


def _key(value: Any) -> Any:
    """Return a key of a dict or set; hashing anything deeper could overflow the stack."""
    if type(value) not in _SCALARS and not isinstance(value, (torch.Tensor, Shell)):
        raise Refused(f"it has a {_kind(value)} as a key")
    return value


def _int(value: int) -> int:
    if value.bit_length() > 8 * MOST_INT_BYTES:
        raise Refused(f"it has a whole number of more than {MOST_INT_BYTES} bytes")
    return value


def _push(machine: _Machine, argument: Any) -> None:
    machine.push(_int(argument) if type(argument) is int else argument)


def _pushing(make: Callable[[_Machine], Any]) -> Callable[[_Machine, Any], None]:
    return lambda machine, _: machine.push(make(machine))


def _tuple_of(count: int) -> Callable[[_Machine], tuple[Any, ...]]:
    return lambda machine: tuple(machine.pop() for _ in range(count))[::-1]


def _pair_dict(pairs: list[Any]) -> dict[Any, Any]:
    if len(pairs) % 2:
        raise Refused("it is damaged (a key without a value)")
    return {_key(key): value for key, value in zip(pairs[::2], pairs[1::2], strict=True)}


def _pop_any(machine: _Machine, _: Any) -> None:
    if not machine.stack:
        raise Refused("it is damaged (nothing on its stack)")
    machine.stack.pop()


def _pop_mark(machine: _Machine, _: Any) -> None:
    machine.since_mark()


_Step = Callable[[_Machine, Any], None]
#: Opcode -> what it does. INST, OBJ, EXT1..4 and the out-of-band buffers are not among them.
_STEPS: dict[str, _Step] = {
    **dict.fromkeys(("PROTO", "FRAME"), lambda machine, argument: None),
    **dict.fromkeys(("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"), _push),
    **dict.fromkeys(("STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"), _push),
    **dict.fromkeys(("UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"), _push),
    "BYTEARRAY8": lambda machine, argument: machine.push(bytes(argument)),
    "NONE": _pushing(lambda machine: None),
    "NEWTRUE": _pushing(lambda machine: True),
    "NEWFALSE": _pushing(lambda machine: False),
    "MARK": _pushing(lambda machine: _MARK),
    "EMPTY_LIST": _pushing(lambda machine: []),
    "EMPTY_DICT": _pushing(lambda machine: {}),
    "EMPTY_SET": _pushing(lambda machine: set()),
    "EMPTY_TUPLE": _pushing(lambda machine: ()),
    "LIST": _pushing(lambda machine: machine.since_mark()),
    "TUPLE": _pushing(lambda machine: tuple(machine.since_mark())),
    "TUPLE1": _pushing(_tuple_of(1)),
    "TUPLE2": _pushing(_tuple_of(2)),
    "TUPLE3": _pushing(_tuple_of(3)),
    "DICT": _pushing(lambda machine: _pair_dict(machine.since_mark())),
    "FROZENSET": _pushing(lambda machine: frozenset(map(_key, machine.since_mark()))),
    "APPEND": lambda machine, _: machine.append([machine.pop()]),
    "APPENDS": lambda machine, _: machine.append(machine.since_mark()),
    "SETITEM": lambda machine, _: machine.set_items([machine.pop(), machine.pop()][::-1]),
    "SETITEMS": lambda machine, _: machine.set_items(machine.since_mark()),
    "ADDITEMS": lambda machine, _: machine.add(machine.since_mark()),
    "POP": _pop_any,
    "POP_MARK": _pop_mark,
    "DUP": _pushing(lambda machine: machine.top()),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), lambda machine, argument: machine.recall(argument)),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), lambda machine, argument: machine.remember(argument)),
    "MEMOIZE": lambda machine, _: machine.remember(len(machine.memo)),
    "GLOBAL": lambda machine, argument: machine.name(argument.replace(" ", ".", 1)),
    "STACK_GLOBAL": lambda machine, _: machine.stack_name(),
    **dict.fromkeys(("REDUCE", "NEWOBJ"), lambda machine, _: machine.call()),
    "NEWOBJ_EX": lambda machine, _: machine.call_with_keywords(),
    "BUILD": lambda machine, _: machine.set_state(),
    "PERSID": lambda machine, argument: machine.outside(argument),
    "BINPERSID": lambda machine, _: machine.outside(machine.pop()),
}


def _measure(root: Any, deepest: int) -> None:
    """Refuse what a program that goes through the value would not come back from: depth, circles, sharing upon sharing.

    What hangs on a shell is measured by itself: nobody goes through it unasked, and optimizers do hold themselves.
    """
    waiting, seen = [root], set()
    while waiting:
        value = waiting.pop()
        if id(value) not in seen:
            seen.add(id(value))
            waiting += _measure_one(value.state if isinstance(value, Shell) else value, deepest)


def _measure_one(root: Any, deepest: int) -> list[Shell]:
    """As ``_measure``, up to the shells, which are returned."""
    shells: list[Shell] = []
    done: dict[int, tuple[int, int]] = {}  # height and number of values of what is measured
    way: list[tuple[Any, Iterator[Any], list[int]]] = [(None, iter([root]), [0, 0])]
    on_way: set[int] = set()
    while way:
        node, children, (height, values) = way[-1]
        for child in children:
            if isinstance(child, Maker):
                raise Refused(f"it holds a class or function itself (GLOBAL {child.name})")
            if isinstance(child, Shell):
                shells.append(child)
            if not isinstance(child, (dict, list, tuple, set, frozenset)):
                values += 1
                continue
            if id(child) in on_way:
                raise Refused("it holds itself")
            if id(child) not in done:
                way[-1][2][:] = height, values
                on_way.add(id(child))
                way.append((child, iter(_inside(child)), [0, 1]))
                break
            height, values = max(height, done[id(child)][0]), values + done[id(child)][1]
        else:
            way.pop()
            if height + 1 > deepest + 1 or values > MOST_VALUES:
                raise Refused(f"it is nested more than {deepest} levels deep, or too large")
            if way:
                on_way.discard(id(node))
                done[id(node)] = height + 1, values
                above = way[-1][2]
                above[:] = max(above[0], height + 1), above[1] + values
            continue
        if len(way) > deepest + 1:
            raise Refused(f"it is nested more than {deepest} levels deep")
    return shells


def _inside(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return [*value.keys(), *value.values()]
    return list(value)


def plain_makers() -> dict[str, Maker]:
    """Return makers of Python's own containers, by the names that pickles of every protocol have for them."""
    makes: dict[str, Callable[..., Any]] = {
        "collections.OrderedDict": lambda pairs=(): OrderedDict(_pairs(pairs)),
        "collections.Counter": lambda counts=None: Counter(dict(_pairs(counts or {}))),
        "collections.defaultdict": lambda factory=None, pairs=(): dict(_pairs(pairs)),
        "_codecs.encode": _bytes,
    }
    for module in ("builtins", "__builtin__"):
        makes[f"{module}.dict"] = lambda pairs=(): dict(_pairs(pairs))
        makes[f"{module}.list"] = lambda values=(): list(_values(values))
        makes[f"{module}.tuple"] = lambda values=(): tuple(_values(values))
        makes[f"{module}.set"] = lambda values=(): set(map(_key, _values(values)))
        makes[f"{module}.frozenset"] = lambda values=(): frozenset(map(_key, _values(values)))
    return {name: Maker(name, make) for name, make in makes.items()}


def _values(values: Any) -> Any:
    if type(values) not in (list, tuple, set, frozenset):
        raise Refused(f"it makes a container of a {_kind(values)}")
    return values


def _pairs(pairs: Any) -> list[tuple[Any, Any]]:
    if isinstance(pairs, dict):
        return list(pairs.items())
    found = [tuple(_values(pair)) for pair in _values(pairs)]
    if any(len(pair) != 2 for pair in found):
        raise Refused("it is damaged (a key without a value)")
    return [(_key(key), value) for key, value in found]


def _bytes(text: Any, encoding: Any = "latin1") -> bytes:
    """Stand for ``codecs.encode``, with which old protocols write bytes."""
    if type(text) is not str or encoding not in ("latin1", "latin-1", "utf-8"):
        raise Refused("it encodes something else than text in Latin-1")
    return text.encode(encoding)
