"""The command line: ``promptmix <command>``. User errors become one line and exit code 2."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import signal
import sys
from typing import Any, NoReturn

from promptmix import console
from promptmix.commands import COMMANDS
from promptmix.console import signals
from promptmix.errors import UserError, words_of
from promptmix.files.text import harmless, real, whole
from promptmix.registry import closest
from promptmix.version import __version__


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are user errors, and which suggests the flag that was meant."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.register("type", int, whole)  # what ``type=int`` means
        self.register("type", float, real)

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage and leaving the process.

        Raises:
            UserError: always; the message says what is wrong and where the help is.
        """
        if message.endswith("expected one argument"):
            message += "; a value that begins with - is joined to its flag by ="
        raise UserError(f"{message} (see `{self.prog} --help`)")

    def flags(self) -> list[str]:
        """Return every long flag of this parser."""
        return [flag for action in self._actions for flag in action.option_strings if flag.startswith("--")]

    def take_late(self, args: argparse.Namespace, extra: list[str]) -> list[str]:
        """Add names that stand behind a flag to those before it (``predict a.png --top 2 b.png``), which argparse leaves over.

        Returns:
            What is left over still.
        """
        action = next((action for action in self._actions if not action.option_strings and action.nargs in ("+", "*")), None)
        if action is None or not extra or any(word.startswith("-") for word in extra) or not getattr(args, action.dest):
            return extra
        try:
            found = [self._get_value(action, word) for word in extra]
        except argparse.ArgumentError:
            return extra
        setattr(args, action.dest, [*getattr(args, action.dest), *found])
        return []

    def refuse_unknown(self, extra: list[str]) -> None:
        """Refuse arguments that no action took.

        Raises:
            UserError: there are some; the message suggests the nearest flag.
        """
        if not extra:
            return
        flag = extra[0].partition("=")[0]
        if flag.startswith("-"):
            self.error(f"unknown argument {flag}{closest(flag, self.flags())}")
        takes = [str(action.metavar or action.dest) for action in self._actions if not action.option_strings]
        self.error(f"{flag!r} is one too many: {self.prog} takes {' '.join(takes) or 'flags only'}; leave it out")

    def refuse_empty(self, args: argparse.Namespace, words: list[str]) -> None:
        """Refuse an empty name or path, mostly a variable of the shell that nobody set; a path of none is the current folder.

        Args:
            args: what the words were parsed to.
            words: flags and names as they were given, without ``KEY VALUE`` pairs.

        Raises:
            UserError: one is empty.
        """
        known = self.flags()
        for word, after in zip(words, [*words[1:], None], strict=False):
            flag, equals, value = word.partition("=")
            if flag in known and (after == "" or equals and not value):
                self.error(f"{flag} is empty; give it a value, or leave it out")
        for action in self._actions:
            if not action.option_strings and action.nargs in (None, argparse.ONE_OR_MORE):
                given = getattr(args, action.dest)
                if "" in (given if isinstance(given, list) else [given]):
                    self.error(f"{action.metavar or action.dest} is empty; name one")
        if "" in words:
            self.error("an empty word is among the arguments; leave it out")


def main(argv: list[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: arguments without the program's name; None = those of the process.

    Returns:
        Exit code: 0; 2 for what the user can fix; 70 for what nobody foresaw; 130 (Ctrl-C), 143 (SIGTERM) and 129 (SIGHUP) for
        "again"; 1 when the reader of our output went away, or where a command says so.
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    console.ready()
    with signals.stopping():
        try:
            code = _dispatch(arguments)
            console.finish()
            return code
        except BrokenPipeError:
            console.silence()  # `promptmix list | head`
            return 1
        except BaseException as error:  # a plugin may raise what is not an Exception
            if "--debug" in arguments[1:]:
                raise
            number = _signal(error)
            if not number:
                return _report(error)
            signals.end_workers()
            with contextlib.suppress(OSError, ValueError):
                start = "\n" if sys.stderr.isatty() else ""  # the terminal shows ^C
                sys.stderr.write(f"{start}promptmix: {_STOPPED}\n")
            return 128 + number


_STOPPED = "interrupted; the same command goes on from the last checkpoint in the output folder, if any"


def _signal(error: BaseException) -> int:
    """Return the signal that an error comes from, 0 for none.

    Workers that get a process group's signal too may end first, and then the error is theirs.
    """
    if isinstance(error, KeyboardInterrupt):
        return getattr(error, "number", signal.SIGINT)
    return signals.received(wait=0.5 if "killed by signal" in words_of(error) else 0.0)


def _report(error: BaseException) -> int:
    """Print one line about an error; return the exit code."""
    line, code = console.describe(error)
    console.ready()
    try:
        sys.stdout.flush()
    except (OSError, ValueError):  # it is full, and may be what the line is about
        console.silence()
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(f"promptmix: error: {harmless(line)}\n")
        sys.stderr.flush()
    return code


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.stdout.write(_overview())
        return 0 if arguments else 2
    nul = next((word for word in arguments if "\0" in word), None)
    if nul is not None:  # a shell hands none over, a program that calls us may
        raise UserError(f"argument {nul!r} holds a NUL character, which no name, path or value has; leave it out")
    name, *rest = arguments
    if name == "--version":
        sys.stdout.write(f"promptmix {__version__}\n")
        return 0
    if name.startswith("-"):
        raise UserError(
            f"{name} comes before the command; write the command first: promptmix train {name} ... (see `promptmix --help`)"
        )
    if name not in COMMANDS:
        raise UserError(f"unknown command {name!r}{closest(name, list(COMMANDS))} (commands: {', '.join(COMMANDS)})")
    try:
        os.getcwd()  # PyTorch would end the process with a line of its own
    except OSError as error:
        raise UserError(f"the current folder can't be read ({error.strerror}); change to another one (cd)") from error
    module = importlib.import_module(f"promptmix.commands.{name.replace('-', '_')}")
    parser = Parser(prog=f"promptmix {name}", description=COMMANDS[name], allow_abbrev=False)
    module.add_arguments(parser)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.add_argument(
        "--no-plugin", action="append", default=[], metavar="NAME", help="leave an installed plugin out; may be repeated"
    )
    split = getattr(module, "split_arguments", None)
    flags, opts = split(parser, rest) if split else (rest, [])
    try:
        args, extra = parser.parse_known_args(flags)
    except SystemExit as done:  # --help
        return int(done.code or 0)
    parser.refuse_unknown(parser.take_late(args, extra))
    parser.refuse_empty(args, flags)
    args.argv = arguments
    if args.no_plugin:
        from promptmix.plugin_manager import switch_off

        switch_off(args.no_plugin)
    if split:
        args.opts = [*args.opts, *opts]
    return module.run(args)


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {summary}" for name, summary in COMMANDS.items()]
    return "\n".join(
        ["usage: promptmix COMMAND [arguments]", "", *lines, "", "promptmix COMMAND --help tells more; --version.", ""]
    )


if __name__ == "__main__":
    sys.exit(main())
