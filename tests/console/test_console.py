"""What commands say of errors that nobody raised on purpose, and streams that are closed."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from promptmix import console


def test_a_lack_of_memory_says_what_helps():
    line, code = console.describe(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"))
    assert code == 2 and line.startswith("memory does not suffice; lower DATALOADER.TRAIN_X.BATCH_SIZE")
    line, code = console.describe(ImportError("libtorch_cpu.so: failed to map segment from shared object"))
    assert code == 2 and "memory does not suffice to load libtorch_cpu.so" in line and "ulimit -v" in line


def test_a_lack_of_room_for_temporary_files_says_what_helps():
    line, code = console.describe(FileNotFoundError(2, "No usable temporary directory found in ['/tmp']"))
    assert code == 2 and line.endswith("found in ['/tmp']; make room there, or set TMPDIR to a folder that can be written")


@pytest.mark.skipif(os.name == "nt", reason="needs a shell")
def test_processes_that_a_command_starts_have_an_output_too():
    start = "subprocess.run([sys.executable, '-c', sys.argv[1]])"
    script = f"import subprocess, sys; from promptmix import console; console.ready(); {start}"
    inner = "import sys; sys.stdout.flush(); sys.stderr.write('there')"
    done = subprocess.run(
        ["sh", "-c", 'exec "$@" >&-', "sh", sys.executable, "-c", script, inner], capture_output=True, text=True
    )
    assert done.stderr == "there"
