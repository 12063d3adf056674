"""``promptmix completion``: a script by which the shell completes commands and flags."""

from __future__ import annotations

import argparse
import importlib
import sys

from promptmix.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument("shell", choices=("bash", "zsh", "tcsh"), help='bash: eval "$(promptmix completion bash)" in ~/.bashrc')


def run(args: argparse.Namespace) -> int:
    """Print the script.

    Raises:
        UserError: the extra is not installed.
    """
    try:
        import shtab
    except ImportError as error:
        raise UserError("completion needs shtab: pip install 'promptmix[completion]'") from error
    sys.stdout.write(shtab.complete(_all_commands(), args.shell) + "\n")
    return 0


def _all_commands() -> argparse.ArgumentParser:
    """Return one parser with every command below it."""
    from promptmix.commands import COMMANDS

    parser = argparse.ArgumentParser(prog="promptmix")
    commands = parser.add_subparsers()
    for name, summary in COMMANDS.items():
        module = importlib.import_module(f"promptmix.commands.{name.replace('-', '_')}")
        module.add_arguments(commands.add_parser(name, help=summary.replace("%", "%%")))
    return parser
