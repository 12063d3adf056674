"""A file is written whole or not at all, and the error names the file that was wanted."""

import os

import pytest
import torch

from promptmix.errors import OutputError
from promptmix.utils import atomic_write
from tests import forked


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_only_a_file_is_replaced(tmp_path, make):
    target = tmp_path / "out"
    make(target)
    (tmp_path / "link").symlink_to(target)
    before = target.lstat()
    for path in (target, tmp_path / "link"):
        with pytest.raises(OutputError, match="name a file"):
            atomic_write(path, lambda temporary: temporary.write_text("x"))
    assert target.lstat().st_ino == before.st_ino and (tmp_path / "link").is_symlink() and len(list(tmp_path.iterdir())) == 2


def test_a_limit_on_the_size_of_files_leaves_nothing(tmp_path):
    def write(_):
        import resource

        from promptmix.errors import OutputError
        from promptmix.utils import atomic_write

        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        for write in (lambda path: torch.save(torch.zeros(9999), path), lambda path: path.write_bytes(b"x" * 9999)):
            try:
                atomic_write(tmp_path / "file", write)
            except OutputError as error:
                print(error)
        return 0

    lines = forked.run([], work=write).stdout.splitlines()
    assert len(lines) == 2
    assert all("file can't be written" in line for line in lines)
    assert "make room" in lines[0] and "ulimit -f" in lines[1]  # PyTorch tells no cause
    assert not list(tmp_path.iterdir())


def test_a_file_that_fails_names_the_target(tmp_path):
    def full(path):
        raise OSError(28, "No space left on device")

    with pytest.raises(OutputError, match="results.json can't be written: No space left on device"):
        atomic_write(tmp_path / "results.json", full)
    assert not list(tmp_path.iterdir())
