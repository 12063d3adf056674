"""Tensors from archives: every type and both formats as PyTorch reads them; limits, damage and lies end in one line."""

from __future__ import annotations

import collections
import functools
import pickle
import struct
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from promptmix.engine.unpickle import Placeholder, read_pickled
from promptmix.files.archives import is_torchscript
from promptmix.files.pickles import Refused


def everything():
    """A checkpoint with every kind of thing that is read."""
    layer = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(layer.parameters())
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    kinds = (torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
    whole = torch.arange(12.0)
    return {
        "state_dict": layer.state_dict(),
        "optimizer": optimizer.state_dict(),
        "parameter": layer.weight,
        "types": {str(kind): torch.arange(6).reshape(2, 3).to(kind) for kind in (*kinds, torch.bool, torch.complex64)},
        "untyped": torch.ones(3, dtype=torch.uint16),
        "view": whole.reshape(3, 4).t(),
        "shared": whole[4:],
        "empty": torch.empty(0, 3),
        "number": torch.tensor(3.0),
        "numpy": [np.float64(7), np.int64(4), np.bool_(True)],
        "plain": [collections.Counter("aab"), {1, 2}, torch.Size([2, 3]), torch.device("cpu"), torch.float16, b"x", None],
    }


def same(found, expected):
    if isinstance(expected, torch.Tensor):
        assert (found.dtype, found.shape, found.stride()) == (expected.dtype, expected.shape, expected.stride())
        assert torch.equal(found, expected) and found.requires_grad == expected.requires_grad
    elif isinstance(expected, dict) and not isinstance(expected, collections.Counter):
        assert list(found) == list(expected)
        for key in expected:
            same(found[key], expected[key])
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            same(one, other)
    else:
        assert found == expected


@pytest.mark.parametrize("new", [True, False])
def test_round_trip_of_both_formats(tmp_path, new):
    path = tmp_path / "model.pth.tar-1"
    written = everything()
    torch.save(written, path, _use_new_zipfile_serialization=new)
    found = read_pickled(path)
    same(found, written)
    assert found["view"].untyped_storage().data_ptr() == found["shared"].untyped_storage().data_ptr()


def test_schedulers_and_their_optimizers_are_stood_for(tmp_path):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5)
    schedule.itself = [schedule]  # a circle through a placeholder is no danger: nobody follows it
    torch.save({"schedule": schedule}, tmp_path / "a")
    found = read_pickled(tmp_path / "a")["schedule"]
    assert type(found) is Placeholder and found.state["itself"][0] is found and found.state["T_max"] == 5


ROOT = "archive"


def rewritten(path, source, **changes):
    """Copy an archive, with some members other than they were; None leaves one out."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            content = changes.get(name.partition("/")[2], old.read(name))
            if content is not None:
                new.writestr(name, content)
    return path


@pytest.fixture
def saved(tmp_path):
    torch.save({"a": torch.arange(1000.0), "b": torch.tensor([True, False])}, tmp_path / "saved")
    return tmp_path / "saved"


def pickle_of(size, stride, offset=0, count=1000, key="0", kind="FloatStorage"):
    """The pickle of one tensor with these claims."""

    def number(value):
        return b"\x8a\x08" + struct.pack("<q", value)

    def row(values):
        return b"(" + b"".join(map(number, values)) + b"t"

    def text(word):
        return b"X" + struct.pack("<I", len(word)) + word.encode()

    pid = b"(" + text("storage") + f"ctorch\n{kind}\n".encode() + text(key) + text("cpu") + number(count) + b"tQ"
    body = pid + number(offset) + row(size) + row(stride) + b"\x89ccollections\nOrderedDict\n)R"
    return b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + body + b"tR."


@pytest.mark.parametrize(
    ("claims", "words"),
    [
        (dict(size=(10**12,), stride=(0,)), "can't hold"),
        (dict(size=(1001,), stride=(1,)), "can't hold"),
        (dict(size=(2,), stride=(1000,)), "can't hold"),
        (dict(size=(1,), stride=(1,), offset=1000), "can't hold"),
        (dict(size=(-1,), stride=(1,)), "no whole numbers"),
        (dict(size=(2,), stride=(-1,)), "no whole numbers"),
        (dict(size=(2, 2), stride=(1,)), "no whole numbers"),
        (dict(size=(2,), stride=(1,), offset=-1), "no whole numbers"),
        (dict(size=(1,) * 65, stride=(1,) * 65), "can't hold"),
        (dict(size=(1,), stride=(1,), count=10**15), "4000 bytes, not"),
        (dict(size=(1,), stride=(1,), count=-1), "names a storage wrongly"),
        (dict(size=(1,), stride=(1,), key="../../secret"), "is missing"),
        (dict(size=(1,), stride=(1,), kind="DoubleStorage"), "4000 bytes, not"),
        (dict(size=(1,), stride=(1,), kind="QInt8Storage"), "GLOBAL torch.QInt8Storage"),
    ],
)
def test_tensors_that_lie(saved, tmp_path, claims, words):
    with pytest.raises(Refused, match=words):
        read_pickled(rewritten(tmp_path / "lie", saved, **{"data.pkl": pickle_of(**claims)}))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data/0": None}, "data/0 is missing"),
        ({"data/0": b"abc"}, "3 bytes, not 1000"),
        ({"data/1": b"\x01\x02"}, "truth values"),
        ({"byteorder": b"big"}, "byte order"),
        ({"data.pkl": None}, "not one of PyTorch's"),
        ({"data.pkl": b"hello"}, "damaged|no place"),
    ],
)
def test_archives_that_are_other_than_they_say(saved, tmp_path, changes, words):
    with pytest.raises(Refused, match=words):
        read_pickled(rewritten(tmp_path / "other", saved, **changes))


def test_packed_members_are_refused_before_they_are_unpacked(tmp_path):
    path = tmp_path / "bomb"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(200_000_000))
    assert path.stat().st_size < 1_000_000
    with pytest.raises(Refused, match="packed"):
        read_pickled(path)


def test_two_members_of_one_name_are_refused(saved, tmp_path):
    path = rewritten(tmp_path / "twice", saved)
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr(archive.namelist()[0], b"other")
    with pytest.raises(Refused, match="two members of one name"):
        read_pickled(path)


def test_members_that_overlap_are_refused(tmp_path):
    """Many storages that are the same bytes of the file: a small file that would need much memory."""
    one, path = tmp_path / "one", tmp_path / "overlap"
    torch.save([torch.full((1000,), float(i)) for i in range(50)], one)
    with zipfile.ZipFile(one) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            if not name.endswith(tuple(f"/data/{i}" for i in range(1, 50))):
                new.writestr(name, old.read(name))
        first = next(info for info in new.filelist if info.filename.endswith("/data/0"))
        for i in range(1, 50):
            other = zipfile.ZipInfo(first.filename[:-1] + str(i))
            other.CRC, other.file_size, other.compress_size = first.CRC, first.file_size, first.compress_size
            other.header_offset, other.external_attr, other.orig_filename = first.header_offset, 0, first.orig_filename
            new.filelist.append(other)
            new.NameToInfo[other.filename] = other
    assert path.stat().st_size < 20_000
    with pytest.raises(Refused, match="more than there can be|differ"):
        read_pickled(path)


@pytest.mark.parametrize("new", [True, False])
def test_every_flipped_bit_of_a_storage_is_seen_or_only_in_the_old_format_not(tmp_path, new):
    """The zip format has a checksum of each storage; the one before it has none, and relies on the checkpoint's digest."""
    path = tmp_path / "file"
    torch.save({"a": torch.arange(100.0)}, path, _use_new_zipfile_serialization=new)
    raw = bytearray(path.read_bytes())
    start = raw.index(torch.arange(100.0).numpy().tobytes())
    for place in range(start, start + 400, 7):
        raw[place] ^= 0x10
        path.write_bytes(raw)
        if new:
            with pytest.raises(Refused, match="damaged"):
                read_pickled(path)
        else:
            assert not torch.equal(read_pickled(path)["a"], torch.arange(100.0))
        raw[place] ^= 0x10


@functools.lru_cache
def _whole(path, new):
    """The bytes of a file, the same for all examples: storages of the old format are named by addresses."""
    torch.save({"a": torch.arange(4.0), "b": [1, {"c": 2}]}, path, _use_new_zipfile_serialization=new)
    return path.read_bytes()


@pytest.mark.parametrize("new", [True, False])
@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_damage_anywhere_gives_a_value_or_one_line(tmp_path_factory, new, data):
    path = tmp_path_factory.getbasetemp() / f"damaged-{new}"
    raw = bytearray(_whole(path, new))
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(raw[: data.draw(st.sampled_from([len(raw), len(raw) // 2, len(raw) - 1]))])
    try:
        read_pickled(path)
    except Refused as error:
        assert "\n" not in str(error)


def test_old_format_whose_storages_are_larger_than_the_file(tmp_path):
    torch.save(torch.arange(10.0), tmp_path / "file", _use_new_zipfile_serialization=False)
    raw = (tmp_path / "file").read_bytes()
    small, large = b"K\x0aN", b"J\xff\xff\xff\x7fN"
    assert small in raw
    (tmp_path / "file").write_bytes(raw.replace(small, large))
    with pytest.raises(Refused, match="more bytes than the file has"):
        read_pickled(tmp_path / "file")


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04 cut off", pickle.dumps({"a": 1}), b"\x80\x02"])
def test_other_files(tmp_path, content):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(Refused):
        read_pickled(tmp_path / "file")


def test_programs_of_torchscript_are_told_and_refused(tmp_path):
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "program")
    assert is_torchscript(tmp_path / "program")
    with pytest.raises(Refused, match=r"GLOBAL torch\.jit"):
        read_pickled(tmp_path / "program")
