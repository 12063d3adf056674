"""Commands in processes forked from this one, which has what they import of other packages; their promptmix is new.

A process that Python starts imports PyTorch first, which takes longer than what a test then asks of it. One test of each way in
starts Python itself (``tests/test_cli.py``, ``tests/test_packaging.py``).
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from importlib.machinery import SourceFileLoader
from multiprocessing import forkserver, process, util
from pathlib import Path
from types import CodeType
from typing import Any

#: What the tests' process has of ours, and a new one would not have.
_OURS = ("promptmix", "tests", "trainers", "plugins", "tools")
#: Compiled modules of ours by file: where Python keeps none (``PYTHONDONTWRITEBYTECODE``), each process would compile them all.
_compiled: dict[str, CodeType] = {}


class Forked:
    """``promptmix ARGV`` in a process and a session of its own, with what tests ask of a ``subprocess.Popen``.

    Args:
        argv: the command's words.
        cwd: folder that it starts in.
        env: its environment; None = this one's. Folders of ``PYTHONPATH`` are looked in first.
        work: what is done with the words in place of the command; returns the exit code.
    """

    def __init__(
        self,
        argv: list[str],
        cwd: str | Path | None = None,
        env: Mapping[str, str] | None = None,
        work: Callable[[list[str]], int] | None = None,
    ) -> None:
        self.returncode: int | None = None
        self._out, self._err = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        if sys.dont_write_bytecode:
            _compile()
        self.pid = os.fork()
        if not self.pid:
            code = 1
            try:
                self._begin(cwd, dict(os.environ if env is None else env))
                code = int((work or command)(argv))
            except BaseException:
                traceback.print_exc()
            finally:
                _end(code)

    def _begin(self, cwd: str | Path | None, env: Mapping[str, str]) -> None:
        os.setsid()
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGALRM):  # nohup has one ignored
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for number, file in enumerate((nothing, self._out.fileno(), self._err.fileno())):
            os.dup2(file, number)
        sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
        os.environ.clear()
        os.environ.update(env)
        os.chdir(cwd or ".")
        sys.path[:0] = [os.getcwd(), *filter(None, env.get("PYTHONPATH", "").split(os.pathsep))]
        for name in [name for name in sys.modules if name.partition(".")[0].startswith(_OURS)]:
            del sys.modules[name]
        for name in [name for name in logging.root.manager.loggerDict if name.partition(".")[0].startswith(_OURS)]:
            del logging.root.manager.loggerDict[name]
        _take_compiled()
        forget_processes()

    def poll(self) -> int | None:
        """Return the exit code, negative for a signal; None while it runs."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, timeout: float = 600) -> int:
        """Wait for the end and return the exit code."""
        end = time.monotonic() + timeout
        while self.poll() is None:
            assert time.monotonic() < end, f"no end after {timeout} seconds"
            time.sleep(0.01)
        assert self.returncode is not None
        return self.returncode

    def communicate(self, timeout: float = 600) -> tuple[str, str]:
        """Wait for the end and return what it wrote."""
        self.wait(timeout)
        return self.stdout, self.stderr

    def kill(self) -> None:
        """Kill it, if it runs."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)

    stdout = property(lambda self: _read(self._out))
    stderr = property(lambda self: _read(self._err))


def run(
    argv: list[str],
    cwd: str | Path | None = None,
    env: Mapping[str, str] | None = None,
    work: Callable[[list[str]], int] | None = None,
) -> Forked:
    """Run ``promptmix ARGV``, or ``work``, to its end."""
    done = Forked(argv, cwd, env, work)
    done.wait()
    return done


def command(argv: list[str]) -> int:
    """Run ``promptmix ARGV`` in this process; return its exit code."""
    from promptmix.cli import main

    if argv[:1] == ["train"]:
        few()
    sys.argv = ["promptmix", *argv]
    try:
        return main(argv)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)


def forget_processes() -> None:
    """Leave the processes of those whom this one was forked from to them."""
    process._children.clear()
    util._finalizer_registry.clear()
    server: Any = forkserver._forkserver
    server._forkserver_address = server._forkserver_alive_fd = server._forkserver_pid = None


def few() -> None:
    """Leave this process's embedded data sets few test pictures, as ``tests/conftest.py`` does in the tests' own."""
    import pytest

    from tests.few import few_emoji

    few_emoji(pytest.MonkeyPatch())


def _compile() -> None:
    """Compile what this process has of ours and did not compile before."""
    for name, module in list(sys.modules.items()):
        loader = getattr(module, "__loader__", None)
        if name.partition(".")[0] in _OURS and type(loader) is SourceFileLoader and loader.path not in _compiled:
            with contextlib.suppress(OSError):  # a file of a test that is over
                _compiled[loader.path] = loader.get_code(name)


def _take_compiled() -> None:
    """Import modules of ours as they were compiled before."""
    own = SourceFileLoader.get_code
    SourceFileLoader.get_code = lambda self, name: _compiled.get(self.path) or own(self, name)  # type: ignore[method-assign]


def _end(code: int) -> None:
    try:
        util._exit_function()  # ends workers that read pictures
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
    finally:
        os._exit(code)


def _read(file: Any) -> str:
    file.seek(0)
    return file.read().decode("utf-8", "replace")
