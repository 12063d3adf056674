"""``promptmix card RUN``: a model card for what a run learned."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="output folder of a run that trained, then those of its evaluations")
    add("--out", default="", metavar="FILE", help="FILE.md; default: print it")
    add("--name", default="", help="what the prompts are called; default: method and data set")
    add("--license", default="", metavar="ID", help="of the learned numbers, such as mit; default: none is stated")


def run(args: argparse.Namespace) -> int:
    """Write the card.

    Raises:
        UserError: a folder holds no run, or the file can't be written.
    """
    from promptmix.errors import DataError, UserError
    from promptmix.runs.card import card_of
    from promptmix.runs.results import RunResult, read_run
    from promptmix.utils import atomic_write

    if args.out and Path(args.out).suffix.lower() != ".md":  # it may be a record's name, which would be lost
        raise UserError(f"--out {args.out}: must name a file that ends in .md")
    found: list[RunResult] = []
    for folder in args.runs:
        one = read_run(folder)
        if one is None:
            raise DataError(f"{folder}: no finished run; name the output folder of one")
        if found and (one.checkpoint is None or one.trainer != found[0].trainer):
            raise DataError(f"{folder} is not an evaluation of {args.runs[0]}, which the card is about; leave it out")
        found.append(one)
    text = card_of(found, name=args.name, licence=args.license)
    if args.out:
        atomic_write(Path(args.out), lambda path: path.write_text(text, encoding="utf-8", errors="backslashreplace"))
    else:
        sys.stdout.write(text)
    return 0
