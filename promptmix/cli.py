"""The command line: ``promptmix <command>``. User errors become one line and exit code 2."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from typing import NoReturn

from promptmix import __version__
from promptmix.commands import COMMANDS
from promptmix.errors import UserError
from promptmix.registry import closest


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
        if extra:
            flag = extra[0].partition("=")[0]
            self.error(f"unknown argument {flag}{closest(flag, self.flags())}")


def main(argv: list[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: arguments without the program's name; None = those of the process.

    Returns:
        Exit code: 0, 2 for a user error, 130 when interrupted, 1 when the reader of our output went away.
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    try:
        return _dispatch(arguments)
    except UserError as error:
        if "--debug" in arguments:
            raise
        sys.stderr.write(f"promptmix: error: {' '.join(str(error).split())}\n")
        return 2
    except KeyboardInterrupt:
        if "--debug" in arguments:
            raise
        sys.stderr.write(
            "\npromptmix: interrupted; the same command goes on from the last checkpoint in the output folder, if any\n"
        )
        return 130
    except BrokenPipeError:
        # `promptmix list | head`: keep the interpreter from complaining once more while it closes standard output.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


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
    split = getattr(module, "split_arguments", None)
    flags, opts = split(parser, rest) if split else (rest, [])
    try:
        args, extra = parser.parse_known_args(flags)
    except SystemExit as done:  # --help
        return int(done.code or 0)
    parser.refuse_unknown(extra)
    args.argv = arguments
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
