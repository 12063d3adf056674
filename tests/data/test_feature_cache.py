"""The feature cache with several processes at once: whole entries or none, within its limit, whoever is killed or refused."""

from __future__ import annotations

import json
import os
import signal
import sys
import time

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from promptmix.data.features.cache import FeatureCache
from tests import forked

#: What the processes run: content follows from the key, so that a reader knows what it must find.
COMMON = """
import json, multiprocessing, random, sys
from pathlib import Path
import torch
from promptmix.data.features.cache import FeatureCache

def content(key, size):
    generator = torch.Generator().manual_seed(int(key, 16))
    return {"features": torch.randn(1 + int(key, 16), size, generator=generator), "orders": torch.arange(int(key, 16))}

folder, size, limit = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
cache = FeatureCache(folder, limit)
"""
BUSY = (
    COMMON
    + """
expected = {key: content(key, size) for key in "123456789abc"}

def work(number):
    draw = random.Random(number)
    seen = {"written": 0, "found": 0, "missed": 0, "wrong": 0}
    held = []  # mapped from files that are removed meanwhile
    for _ in range(300):
        key = draw.choice("123456789abc")
        if draw.random() < 0.4:
            cache.put(key, expected[key], f"key {key}")
            seen["written"] += 1
        elif draw.random() < 0.1:
            seen["wrong"] += sum(entry.about != f"key {entry.path.stem}" for entry in cache.entries())
        else:
            found = cache.get(key)
            seen["missed" if found is None else "found"] += 1
            if found is not None:
                held.append((key, found))
    for key, found in held:
        same = found.keys() == expected[key].keys() and all(torch.equal(found[name], expected[key][name]) for name in found)
        seen["wrong"] += not same
    sys.stdout.write(json.dumps(seen) + "\\n")  # in one piece beside the other processes'
    sys.stdout.flush()

processes = [multiprocessing.get_context("fork").Process(target=work, args=(number,)) for number in range(4)]
for process in processes:
    process.start()
for process in processes:
    process.join()
assert all(process.exitcode == 0 for process in processes)
"""
)
WRITER = (
    COMMON
    + """
large = content("2", size)
while True:
    cache.put("2", large, "key 2")
"""
)


def start(script, folder, size=1000, limit=0.0):
    def run(words):
        sys.argv = ["-c", *words]
        exec(script, {"__name__": "__main__"})
        return 0

    return forked.Forked([str(folder), str(size), str(limit)], work=run)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the processes are forked, so that torch is imported once")
def test_processes_read_whole_entries_or_none_while_files_are_removed(tmp_path):
    limit = 100_000  # bytes; the twelve entries have 8 to 52 thousand each
    process = start(BUSY, tmp_path / "cache", limit=limit / 1e9)
    shown, errors = process.communicate()
    assert process.returncode == 0 and not errors, errors
    seen = [json.loads(line) for line in shown.splitlines()]  # and no warning that something could not be kept
    assert len(seen) == 4 and all(each["wrong"] == 0 for each in seen)
    for what in ("written", "found", "missed"):
        assert all(each[what] > 10 for each in seen), seen
    assert all(path.suffix == ".safetensors" and not path.name.startswith(".") for path in (tmp_path / "cache").iterdir())
    assert 0 < sum(entry.size for entry in FeatureCache(tmp_path / "cache").entries()) <= limit


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="a process can't be stopped halfway on this system")
def test_a_writer_killed_halfway_leaves_no_entry(tmp_path):
    process = start(WRITER, tmp_path, size=2_000_000)  # 24 MB a file
    try:
        stop_halfway(process, tmp_path)
    finally:
        process.kill()
        process.communicate()
    cache = FeatureCache(tmp_path)
    left = [path for path in tmp_path.iterdir() if path.suffix != ".safetensors"]
    assert len(left) == 1 and left[0].name.startswith(".2.safetensors.") and left[0].suffix == ".tmp"
    assert all(entry.about == "key 2" for entry in cache.entries())
    found = cache.get("2")  # of an earlier round, whole, or none
    expected = torch.randn(3, 2_000_000, generator=torch.Generator().manual_seed(2))
    assert found is None or torch.equal(found["features"], expected)
    # What is left is kept for a day, since its writer might be at work, and removed by the next one then.
    cache.put("1", {"features": torch.zeros(3)}, "")
    assert left[0].exists()
    os.utime(left[0], (time.time() - 90_000,) * 2)
    cache.put("1", {"features": torch.zeros(3)}, "")
    assert not left[0].exists() and cache.get("1") is not None


def stop_halfway(process, folder):
    """Stop ``process`` while a file that it writes is there, but not yet in its place."""
    deadline = time.monotonic() + 300  # a busy machine needs a minute to import torch
    while time.monotonic() < deadline and process.poll() is None:
        if any(folder.glob(".*.tmp")):
            os.kill(process.pid, signal.SIGSTOP)
            os.waitid(os.P_PID, process.pid, os.WSTOPPED)
            if any(folder.glob(".*.tmp/.*")):
                return
            os.kill(process.pid, signal.SIGCONT)
    raise AssertionError("the writer was never halfway")


@pytest.mark.skipif(os.name == "nt", reason="no such limit on this system")
def test_a_disk_that_takes_no_more_costs_only_the_saving(tmp_path, capsys):
    import resource

    cache = FeatureCache(tmp_path)
    cache.put("small", {"features": torch.zeros(100)}, "")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, before[1]))
    try:
        cache.put("large", {"features": torch.zeros(1_000_000)}, "")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "can't be kept" in capsys.readouterr().out
    assert cache.get("large") is None and [path.name for path in tmp_path.iterdir()] == ["small.safetensors"]


@pytest.mark.skipif(os.name == "nt", reason="files have no modes on this system")
def test_a_folder_that_nobody_may_look_into_holds_nothing(tmp_path):
    assert FeatureCache(tmp_path / ("x" * 300)).get("key") is None  # a longer name than the system takes


def test_others_may_read_what_one_wrote(tmp_path):
    old = os.umask(0o022)
    try:
        FeatureCache(tmp_path / "cache").put("key", {"features": torch.zeros(3)}, "")
    finally:
        os.umask(old)
    assert (tmp_path / "cache" / "key.safetensors").stat().st_mode & 0o777 == 0o644


def test_a_file_that_may_not_be_touched_is_read_all_the_same(tmp_path, monkeypatch):
    cache = FeatureCache(tmp_path)
    cache.put("key", {"features": torch.ones(3)}, "")

    def refused(*args, **kwargs):
        raise PermissionError

    monkeypatch.setattr(os, "utime", refused)  # a folder that another user fills
    assert torch.equal(cache.get("key")["features"], torch.ones(3))


def test_clearing_follows_no_link_and_waits_for_no_pipe(tmp_path):
    other = tmp_path / ".x.safetensors.1.tmp"
    other.mkdir()
    (other / "keep").touch()
    cache = FeatureCache(tmp_path / "cache")
    cache.folder.mkdir()
    (cache.folder / other.name).symlink_to(other)
    os.mkfifo(cache.folder / "pipe.safetensors")
    assert cache.entries() == []
    cache.clear()
    assert (other / "keep").is_file() and not list(cache.folder.iterdir())


def test_clearing_removes_what_killed_writers_left(tmp_path):
    (tmp_path / ".key.safetensors.abc.tmp").mkdir()
    (tmp_path / ".key.safetensors.abc.tmp" / ".tmpdef").write_bytes(bytes(1000))
    assert FeatureCache(tmp_path).clear() == 1000
    assert not list(tmp_path.iterdir())


# A file that is not what was written


def rewritten(path, change, keep=True):
    """Change the tensors of a file, with or without what it says about itself."""
    with safe_open(path, framework="pt") as file:
        note = file.metadata()
        tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    save_file(change(tensors), path, metadata=note if keep else None)


CHANGES = {
    "reversed rows": lambda tensors: {**tensors, "features": tensors["features"].flip(0).contiguous()},
    "a row less": lambda tensors: {**tensors, "features": tensors["features"][:-1].clone()},
    "half precision": lambda tensors: {**tensors, "features": tensors["features"].half()},
    "another name": lambda tensors: {"others": tensors["features"]},
    "a tensor more": lambda tensors: {**tensors, "more": torch.ones(1)},
}


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("change", CHANGES.values(), ids=list(CHANGES))
def test_a_changed_file_is_dropped(change, keep, tmp_path, capsys):
    cache = FeatureCache(tmp_path)
    cache.put("key", {"features": torch.arange(12.0).reshape(4, 3)}, "a")
    rewritten(tmp_path / "key.safetensors", change, keep)
    assert cache.get("key") is None and not list(tmp_path.iterdir())
    assert "are not used and made anew: it was changed after it was written" in capsys.readouterr().out
    assert cache.get("key") is None and not capsys.readouterr().out


def test_a_flipped_bit_and_a_cut_off_file_are_dropped(tmp_path, capsys):
    cache = FeatureCache(tmp_path)
    for damage in (lambda raw: raw[:-1] + bytes([raw[-1] ^ 1]), lambda raw: raw[:-5], lambda raw: b"", lambda raw: b"hello"):
        cache.put("key", {"features": torch.ones(4, 3)}, "a")
        path = tmp_path / "key.safetensors"
        path.write_bytes(damage(path.read_bytes()))
        assert cache.get("key") is None and not path.exists()
        assert "made anew" in capsys.readouterr().out


def test_the_file_of_another_key_is_dropped(tmp_path):
    cache = FeatureCache(tmp_path)
    cache.put("one", {"features": torch.ones(4, 3)}, "a")
    (tmp_path / "one.safetensors").rename(tmp_path / "two.safetensors")
    assert cache.get("two") is None and not list(tmp_path.iterdir())


@pytest.mark.parametrize("shapes", [{"features": (5,)}, {"features": (4, 2)}, {"orders": (0,)}])
def test_tensors_of_another_size_than_asked_for_are_dropped(shapes, tmp_path):
    cache = FeatureCache(tmp_path)
    cache.put("key", {"features": torch.ones(4, 3)}, "a")
    assert cache.get("key", {"features": (4, 3)}) is not None and cache.get("key", {"features": (4,)}) is not None
    assert cache.get("key", shapes) is None and not list(tmp_path.iterdir())


def test_a_file_that_another_process_replaces_while_it_is_opened_is_no_damage(tmp_path, capsys, monkeypatch):
    """PyTorch opens the file a second time by its name; between the two it may be removed and written anew."""

    def load(path):
        os.rename(path, tmp_path / "aside")
        try:
            torch.UntypedStorage.from_file(os.fspath(path), shared=False, nbytes=8)
        finally:
            os.rename(tmp_path / "aside", path)

    cache = FeatureCache(tmp_path)
    cache.put("key", {"features": torch.ones(4, 3)}, "a")
    monkeypatch.setattr("promptmix.data.features.cache.load_file", load)
    assert cache.get("key") is None and not capsys.readouterr().out
    monkeypatch.undo()
    assert cache.get("key") is not None
