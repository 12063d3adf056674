"""What commands say of errors that nobody raised on purpose, and streams that are closed."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import threading

import pytest
import torch

from promptmix import cli, console
from promptmix.engine.precision import use_repeatable_kernels


def test_a_lack_of_memory_says_what_helps():
    line, code = console.describe(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"))
    assert code == 2 and line.startswith("memory does not suffice; lower DATALOADER.TRAIN_X.BATCH_SIZE")
    line, code = console.describe(ImportError("libtorch_cpu.so: failed to map segment from shared object"))
    assert code == 2 and "memory does not suffice to load libtorch_cpu.so" in line and "ulimit -v" in line


def test_a_lack_of_room_for_temporary_files_says_what_helps():
    line, code = console.describe(FileNotFoundError(2, "No usable temporary directory found in ['/tmp']"))
    assert code == 2 and line.endswith("found in ['/tmp']; make room there, or set TMPDIR to a folder that can be written")


def test_an_operator_that_does_not_repeat_names_the_key_that_forbids_it():
    use_repeatable_kernels(True)
    try:
        with pytest.raises(RuntimeError) as caught:
            torch.zeros(2).put_(torch.tensor([0, 0]), torch.ones(2))
    finally:
        use_repeatable_kernels(False)
    line, code = console.describe(caught.value)
    assert code == 2 and line == "TRAIN.DETERMINISTIC is True, but put_ has no kernel that repeats to the bit; set it to False"


@pytest.mark.skipif(os.name == "nt", reason="needs a shell")
def test_processes_that_a_command_starts_have_an_output_too():
    start = "subprocess.run([sys.executable, '-c', sys.argv[1]])"
    script = f"import subprocess, sys; from promptmix import console; console.ready(); {start}"
    inner = "import sys; sys.stdout.flush(); sys.stderr.write('there')"
    done = subprocess.run(
        ["sh", "-c", 'exec "$@" >&-', "sh", sys.executable, "-c", script, inner], capture_output=True, text=True
    )
    assert done.stderr == "there"


def test_an_error_that_cannot_say_what_it_is(capsys):
    class Mute(Exception):
        def __str__(self) -> str:
            raise RuntimeError("in str")

    assert console.describe(Mute())[0].startswith("unexpected Mute")


def test_what_fails_beside_a_command_is_one_line(capsys, monkeypatch):
    monkeypatch.setattr(sys, "unraisablehook", sys.__unraisablehook__)
    monkeypatch.setattr(threading, "excepthook", threading.__excepthook__)
    console.ready()
    thread = threading.Thread(target=lambda: 1 / 0, name="beside")
    thread.start()
    thread.join()
    said = capsys.readouterr().err
    assert said.startswith("promptmix: note: ZeroDivisionError: division by zero in <Thread(beside") and said.count("\n") == 1


def test_streams_that_a_plugin_took_away(capsys, monkeypatch):
    def take() -> int:
        monkeypatch.setattr(sys, "stdout", None)
        monkeypatch.setattr(sys, "stderr", None)
        raise AttributeError("'NoneType' object has no attribute 'write'")

    monkeypatch.setattr(cli, "_dispatch", lambda arguments: take())
    monkeypatch.setattr(sys, "__stderr__", said := io.StringIO())
    assert cli.main(["list"]) == console.FAULT
    assert said.getvalue().startswith("promptmix: error: unexpected AttributeError")
