"""Pickles from strangers: nothing is imported, called or changed, whatever the opcodes say, and refusals are one line."""

from __future__ import annotations

import collections
import io
import os
import pickle
import pickletools
import struct
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from promptmix.engine.unpickle import Placeholder, read_pickled
from promptmix.files.archives import tensor_names
from promptmix.files.pickles import Maker, Refused, Shell, read_pickle

P2 = b"\x80\x02"


def read(raw):
    return read_pickle(io.BytesIO(raw), tensor_names)


def text(word):
    return b"X" + struct.pack("<I", len(word.encode())) + word.encode()


def named(module, name):
    return f"c{module}\n{name}\n".encode()


@pytest.mark.parametrize("protocol", range(6))
def test_plain_values_of_every_protocol(protocol):
    value = {"a": [1, -2, 3.5, None, True, b"x", "ü", (1, 2, 3, 4)], 2: {3, 4}, "o": collections.OrderedDict(k=(1,))}
    value |= {"c": collections.Counter("aab"), "f": frozenset({1}), "big": 1 << 70, "e": ((), (1,), (1, 2)), "again": [[], []]}
    assert read(pickle.dumps(value, protocol)) == value
    assert read(pickle.dumps(collections.defaultdict(list, {1: [2]}), protocol)) == {1: [2]}


def test_sharing_is_kept():
    one = [1]
    found = read(pickle.dumps([one, one]))
    assert found[0] is found[1]


def set_state_on(module, name):
    """A pickle that sets attributes on a class, function or module."""
    return P2 + named(module, name) + b"}(" + text("most_common") + text("gone") + b"ub."


GADGETS = {
    "os.system": P2 + named("posix", "system") + b"(" + text("touch exploded") + b"tR.",
    "print, never called": P2 + named("builtins", "print") + b".",
    "eval": P2 + named("builtins", "eval") + b"(" + text("1") + b"tR.",
    "getattr": P2 + named("builtins", "getattr") + b"(" + named("collections", "Counter") + text("most_common") + b"tR.",
    "dotted name": b"\x80\x04" + text("collections") + text("Counter.update") + b"\x93.",
    "state of Counter": set_state_on("collections", "Counter"),
    "state of OrderedDict": set_state_on("collections", "OrderedDict"),
    "state of a function": set_state_on("torch._utils", "_rebuild_tensor_v2"),
    "state of Size": set_state_on("torch", "Size"),
    "state of a dtype": set_state_on("torch", "float32"),
    "slots of a class": P2 + named("collections", "Counter") + b"N}(" + text("x") + b"K\x01u\x86b.",
    "item on a class": P2 + named("collections", "Counter") + b"K\x01K\x02s.",
    "append to a class": P2 + named("collections", "Counter") + b"K\x01a.",
    "append to a tuple": P2 + b")K\x01a.",
    "append to a tensor": P2 + named("torch", "Size") + b")R" + b"K\x01a.",
    "items on a list": P2 + b"]K\x00K\x01s.",
    "add to a dict": b"\x80\x04}(K\x01\x90.",
    "state of a dict": P2 + b"}}b.",
    "state of a number": P2 + b"K\x01}b.",
    "call of a string": P2 + text("x") + b")R.",
    "call without a tuple": P2 + named("collections", "OrderedDict") + b"]R.",
    "call by INST": b"(S'touch exploded'\niposix\nsystem\n.",
    "call by OBJ": b"(" + named("posix", "system") + b"S'touch exploded'\no.",
    "keyword arguments": b"\x80\x04" + named("collections", "Counter") + b")}" + text("a") + b"K\x01s\x92.",
    "extension registry": P2 + b"\x82\x01.",
    "persistent id": P2 + text("x") + b"Q.",
    "persistent id as text": b"P1\n.",
    "out of band buffer": b"\x80\x05\x97.",
    "copyreg": P2 + named("copyreg", "_reconstructor") + b"(" + named("posix", "_Environ") * 2 + b"NtR.",
    "unhashable key": P2 + b"}]K\x01s.",
    "deep key": P2 + b")" + b"\x85" * 100 + b"0}" + b")" + b"\x85" * 3 + b"K\x01s.",
    "class as key": P2 + b"}" + named("collections", "Counter") + b"K\x01s.",
    "class as value": P2 + b"]" + named("collections", "Counter") + b"a.",
    "list in itself": P2 + b"]q\x00h\x00a.",
    "dict in itself": P2 + b"}q\x00K\x01h\x00s.",
    "tuple in itself through a list": P2 + b"]q\x00h\x00\x85a.",
    "nested lists": P2 + b"]" * 100_000 + b"a" * 99_999 + b".",
    "nested tuples": P2 + b")" + b"\x85" * 100_000 + b".",
    "lists doubled 60 times": P2 + b"]" + b"".join(b"q\x00]h\x00ah\x00a" for _ in range(60)) + b".",
    "huge whole number": P2 + b"\x8b" + struct.pack("<i", 5000) + b"\x7f" * 5000 + b".",
    "huge decimal": b"I" + b"9" * 5000 + b"\n.",
    "long string that is not there": P2 + b"X\xff\xff\xff\x7fabc.",
    "negative length": P2 + b"T\xff\xff\xff\xffabc.",
    "empty": b"",
    "no stop": P2 + b"K\x01",
    "stop on nothing": P2 + b".",
    "stop on a mark": P2 + b"(.",
    "no mark": P2 + b"t.",
    "unknown memo": P2 + b"h\x09.",
    "unknown opcode": P2 + b"\xff.",
    "odd pairs": P2 + b"}(K\x01u.",
    "odd dict": P2 + b"(K\x01d.",
    "name that is not text": b"\x80\x04K\x01K\x02\x93.",
    "counter of unhashable": P2 + named("collections", "Counter") + b"(]]atR.",
    "pairs that are none": P2 + named("collections", "OrderedDict") + b"(](K\x01etR.",
    "set of lists": P2 + named("builtins", "set") + b"(]]atR.",
    "encoding with a side": P2 + named("_codecs", "encode") + text("x") + text("zlib") + b"\x86R.",
    "tensor without storage": P2 + named("torch._utils", "_rebuild_tensor_v2") + b"(K\x01K\x00))\x89NtR.",
    "size of text": P2 + named("torch", "Size") + b"(](" + text("a") + b"etR.",
    "device of text": P2 + named("torch", "device") + b"(" + text("no such place") + b"tR.",
    "parameter of nothing": P2 + named("torch._utils", "_rebuild_parameter") + b"(NtR.",
}


def fingerprint():
    """What a gadget might change: classes and functions that a pickle may name, modules, the folder."""
    held = (collections.Counter, collections.OrderedDict, torch.Size, torch.Tensor, torch._utils, Shell, Maker, Placeholder)
    return [dict(vars(thing)) for thing in held], os.environ.copy(), os.listdir()


@pytest.mark.parametrize("gadget", GADGETS.values(), ids=list(GADGETS))
def test_gadgets(gadget, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = fingerprint()
    with pytest.raises(Refused) as error:
        read(gadget)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400
    assert fingerprint() == before


@pytest.mark.parametrize(
    "name",
    [
        *("posix.system", "builtins.eval", "builtins.getattr", "builtins.__import__", "operator.attrgetter", "shutil.rmtree"),
        *("torch.load", "torch.jit.load", "torch.hub.load", "torch.utils.cpp_extension.load", "torch.Tensor.set_"),
        *(
            "torch.storage._load_from_bytes",
            "torch._utils._rebuild_sparse_tensor",
            "numpy.load",
            "pickle.loads",
            "torch.from_file",
        ),
        *("pydoc.locate", "pathlib.Path", "promptmix.plugin_manager.load_plugin", "torch.optim.x", "torch.serialization.load"),
    ],
)
def test_names_never_become_objects(name, tmp_path):
    """Not even those that a placeholder stands for."""
    module, _, function = name.rpartition(".")
    path = tmp_path / "model.pth.tar-1"
    write_archive(path, P2 + named(module, function) + b"(" + text("exploded") + b"tR.")
    try:
        found = read_pickled(path)
    except Refused as error:
        assert f"GLOBAL {name}" in str(error)
    else:
        assert type(found) is Placeholder and found.wanted == name == "torch.optim.x" and not found.state


def write_archive(path, data, more=()):
    """A zip as torch.save makes it, around a pickle."""
    import zipfile

    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", data)
        for name, content in more:
            archive.writestr(f"archive/{name}", content)


OPCODES = [opcode.code.encode("latin1") for opcode in pickletools.opcodes]
NAMES = [
    ("collections", "OrderedDict"),
    ("collections", "Counter"),
    ("builtins", "dict"),
    ("builtins", "set"),
    ("torch", "Size"),
    ("torch", "float32"),
    ("torch", "FloatStorage"),
    ("torch._utils", "_rebuild_tensor_v2"),
    ("posix", "mkdir"),
    ("builtins", "setattr"),
]
argument = st.one_of(
    st.integers(0, 255).map(lambda number: b"K" + bytes([number])),
    st.text(max_size=5).map(text),
    st.sampled_from(NAMES).map(lambda pair: named(*pair)),
    st.sampled_from([b"}", b"]", b")", b"(", b"N", b"\x88", b"\x8f", b"}(", b"q\x00", b"h\x00", b"2", b"0", b"G" + bytes(8)]),
)
verb = st.sampled_from(
    [b"R", b"b", b"s", b"u", b"a", b"e", b"t", b"l", b"d", b"\x81", b"\x85", b"\x86", b"\x87", b"\x90", b"\x93"]
)
programs = st.lists(st.one_of(argument, argument, verb), max_size=25).map(lambda parts: P2 + b"".join(parts) + b".")
noise = st.lists(st.one_of(st.sampled_from(OPCODES), st.binary(max_size=6)), max_size=40).map(b"".join)
PLAIN = (dict, list, tuple, set, frozenset, str, bytes, int, float, bool, type(None), torch.Tensor, torch.Size, torch.dtype)


def plain(value):
    """Whether a value is made of plain containers, numbers and tensors only."""
    if type(value) in (dict, collections.OrderedDict, collections.Counter):
        return all(plain(part) for pair in value.items() for part in pair)
    if type(value) in (list, tuple, set, frozenset):
        return all(map(plain, value))
    return isinstance(value, PLAIN) or type(value).__module__ == "promptmix.files.archives"


@settings(max_examples=500, deadline=None)
@given(st.one_of(programs, noise))
def test_any_pickle_gives_plain_values_or_one_line(raw):
    """Opcodes in any order: a plain value or one line; no module is imported, no class changed."""
    modules, before = set(sys.modules), fingerprint()[0]
    try:
        assert plain(read(raw))
    except Refused as error:
        assert "\n" not in str(error)
    assert set(sys.modules) == modules and fingerprint()[0] == before


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_damaged_pickle_is_plain_or_refused(data):
    raw = bytearray(pickle.dumps({"state_dict": {"a": [1.5, "b", (None, True)], "c": {1: b"d"}}, "epoch": 3}, 2))
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    try:
        assert plain(read(bytes(raw)))
    except Refused as error:
        assert "\n" not in str(error)


def test_a_name_with_a_line_end_is_told_on_one_line():
    with pytest.raises(Refused, match="^GLOBAL _codecs. code$"):
        read(b"\x80\x02\x8c\x07_codecs\x8c\x05\ncode\x93.")


def test_a_pickle_that_is_too_long_is_cut_short():
    with pytest.raises(Refused, match="more than 1000 opcodes"):
        read_pickle(io.BytesIO(P2 + b"(" * 2000 + b"."), tensor_names, most_opcodes=1000)
