"""What stands between a command and the terminal: streams that may be closed or full, and errors as one line each."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import sys
import threading
import traceback
from pathlib import Path

from promptmix.errors import REMEDIES, UserError, is_out_of_memory, words_of
from promptmix.files.text import harmless, one_line

__all__ = ["FAULT", "describe", "finish", "ready", "silence"]

#: Exit code of an error that nobody foresaw (``EX_SOFTWARE`` of sysexits.h).
FAULT = 70

_FRAME = re.compile(r'File "([^"]+)", line (\d+)')


def ready() -> None:
    """Make standard streams fit to write to: closed ones go nowhere, and what they can't encode is written as escapes.

    A closed descriptor would otherwise be given to the next file that is opened, which would then get what is printed.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            # It takes the lowest free number, which is this one; processes that are started from here need it too.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
        if getattr(sys, name) is None:
            ours = getattr(sys, f"__{name}__")  # a plugin may have taken the other away
            setattr(sys, name, ours or open(os.devnull, "r+" if name == "stdin" else "w", encoding="utf-8"))  # noqa: SIM115
        stream = getattr(sys, name)
        if name != "stdin" and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    if sys.unraisablehook is sys.__unraisablehook__:  # nobody else listens
        sys.unraisablehook = lambda failed: _say_failed(failed.exc_value, failed.object)
    if threading.excepthook is threading.__excepthook__:
        threading.excepthook = lambda failed: _say_failed(failed.exc_value, failed.thread)


def _say_failed(error: BaseException | None, where: object) -> None:
    """Say in one line what failed where no command waits for it: while something was thrown away, or in a thread beside."""
    with contextlib.suppress(Exception):  # the interpreter may be closing
        if error is not None and not isinstance(error, SystemExit):
            file, line = _origin(error)
            sys.stderr.write(f"promptmix: note: {harmless(_words(error))} in {one_line(where)[:200]} ({file}, line {line})\n")


def finish() -> None:
    """Write out what standard output still holds.

    Raises:
        OSError: it can't be written; nobody reads it any more (``BrokenPipeError``), or the disk is full.
    """
    sys.stdout.flush()


def silence() -> None:
    """Send standard output nowhere, so that the interpreter does not complain once more while it closes it."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def describe(error: BaseException) -> tuple[str, int]:
    """Return one line for an error, and the exit code: 2 for what the user can fix, ``FAULT`` for what only we can.

    The line names the value or file, or for what nobody foresaw the exception's words and where it came from.
    """
    if isinstance(error, UserError):
        return _one_line(words_of(error)), 2
    if is_out_of_memory(error):
        return f"memory does not suffice; {REMEDIES[errno.ENOMEM]}", 2
    if isinstance(error, ImportError) and "failed to map segment" in words_of(
        error
    ):  # the system's words, in front of them the file
        return _one_line(f"memory does not suffice to load {error}; raise its limit (ulimit -v), or close other programs"), 2
    if isinstance(error, RuntimeError) and "does not have a deterministic implementation" in words_of(error):
        what = words_of(error).split(" does not have")[0]
        return _one_line(f"TRAIN.DETERMINISTIC is True, but {what} has no kernel that repeats to the bit; set it to False"), 2
    if isinstance(error, FileNotFoundError) and "No usable temporary directory" in words_of(error):
        return _one_line(f"{error.strerror}; make room there, or set TMPDIR to a folder that can be written"), 2
    file, line = _origin(error)
    words = _words(error)
    from promptmix.plugin_manager import plugin_at, strangers

    plugin = plugin_at(file)
    if plugin:
        return f"plugin {plugin!r} ({file}, line {line}) failed: {words}; fix it, or leave it out with --no-plugin {plugin}", 2
    if isinstance(error, RuntimeError) and words_of(error).startswith("Symlink loop"):  # pathlib's, up to Python 3.12
        return _one_line(f"{error}; {REMEDIES[errno.ELOOP]}"), 2
    if isinstance(error, OSError) and error.errno is not None:
        paths = [_short(str(path)) for path in (error.filename, error.filename2) if path is not None]
        remedy = REMEDIES.get(error.errno, "check the path")
        if paths or error.errno in REMEDIES:
            return _one_line(f"{' -> '.join(paths) or 'output'}: {error.strerror}; {remedy}"), 2
    others = strangers()
    if others and isinstance(error, Exception):
        where = f"{words} ({file}, line {line}), with {', '.join(others)} loaded"
        return f"{where}; fix that plugin, or report it where it stays without (--debug shows the traceback)", 2
    return (
        f"unexpected {words} ({file}, line {line}); this is a fault of promptmix or of a library: "
        "please report it with the command and what it prints with --debug (CONTRIBUTING.md)"
    ), FAULT


def _words(error: BaseException) -> str:
    """Return an exception's kind and words on one line."""
    if isinstance(error, SystemExit):
        return f"SystemExit({error.code!r}): it ended the process"
    text = words_of(error)
    if "Original Traceback" in text:  # of a worker that reads pictures: its last line is the error
        return _one_line(text.strip().splitlines()[-1])
    return _one_line(f"{type(error).__name__}: {text}" if text else type(error).__name__)


def _short(path: str) -> str:
    return path if len(path) <= 300 else f"{path[:140]}...{path[-140:]}"


def _one_line(text: str) -> str:
    """Return the text on one line, cut in the middle where it is long: a message begins with the key and ends with the remedy."""
    text = " ".join(map(_short, text.split()))
    return text if len(text) <= 2000 else f"{text[:1000]}...{text[-1000:]}"


def _origin(error: BaseException) -> tuple[str, int]:
    """Return the innermost place of an error that lies in promptmix or in a plugin, else the innermost of all."""
    from promptmix.plugin_manager import plugin_at

    places = [(frame.filename, frame.lineno or 0) for frame in traceback.extract_tb(error.__traceback__)]
    if "Original Traceback" in words_of(error):
        places += [(file, int(line)) for file, line in _FRAME.findall(words_of(error))]
    above = Path(__file__).parent
    ours = [above, *(above.parent / name for name in ("trainers", "plugins"))]
    for file, line in reversed(places):
        if plugin_at(file) or any(folder in Path(file).parents for folder in ours):
            return file, line
    return places[-1] if places else ("unknown", 0)
