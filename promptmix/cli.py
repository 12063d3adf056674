"""The command line: ``promptmix <command>``. User errors become one line and exit code 2."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import sys
from typing import NoReturn

from promptmix import console
from promptmix.commands import COMMANDS
from promptmix.errors import UserError
from promptmix.registry import closest
from promptmix.version import __version__


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are user errors, and which suggests the flag that was meant."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage and leaving the process.

        Raises:
            UserError: always; the message says what is wrong and where the help is.
        """
        raise UserError(f"{message} (see `{self.prog} --help`)")

    def flags(self) -> list[str]:
        """Return every long flag of this parser."""
        return [flag for action in self._actions for flag in action.option_strings if flag.startswith("--")]

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


def main(argv: list[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: arguments without the program's name; None = those of the process.

    Returns:
        Exit code: 0; 2 for what the user can mend; 70 for what nobody foresaw; 130 when interrupted; 1 when the reader of our
        output went away, or where a command says so.
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    console.ready()
    try:
        code = _dispatch(arguments)
        console.finish()
        return code
    except KeyboardInterrupt:
        if "--debug" in arguments:
            raise
        sys.stderr.write(
            "\npromptmix: interrupted; the same command goes on from the last checkpoint in the output folder, if any\n"
        )
        return 130
    except BrokenPipeError:
        console.silence()  # `promptmix list | head`
        return 1
    except (Exception, SystemExit) as error:
        if "--debug" in arguments:
            raise
        return _report(error)


def _report(error: BaseException) -> int:
    """Print one line about an error; return the exit code."""
    line, code = console.describe(error)
    try:
        sys.stdout.flush()
    except (OSError, ValueError):  # it is full, and may be what the line is about
        console.silence()
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(f"promptmix: error: {line}\n")
        sys.stderr.flush()
    return code


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.stdout.write(_overview())
        return 0 if arguments else 2
    name, *rest = arguments
    if name == "--version":
        sys.stdout.write(f"promptmix {__version__}\n")
        return 0
    if name not in COMMANDS:
        raise UserError(f"unknown command {name!r}{closest(name, list(COMMANDS))} (commands: {', '.join(COMMANDS)})")
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
    parser.refuse_unknown(extra)
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
