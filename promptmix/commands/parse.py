"""``promptmix parse DIR``: tables from the results below a folder."""

from __future__ import annotations

import argparse
import sys


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument("directory", metavar="DIR", help="folder with the output folders of runs, at any depth")
    parser.add_argument("--format", default="github", help="github, latex, csv, json, or any other format of tabulate")
    parser.add_argument("--metric", nargs="+", metavar="NAME", help="default: accuracy macro_accuracy")
    parser.add_argument("--split", default="test", help="which evaluation: test or val")
    parser.add_argument("--sort", default="name", help="name, time, base, new, h or test (best first)")
    parser.add_argument("--ci95", action="store_true", help="half a 95%% interval in place of the standard deviation")


def run(args: argparse.Namespace) -> int:
    """Read, aggregate, print; notes on what was left out go to standard error."""
    from promptmix import results, tables

    runs, unread = results.find(args.directory)
    rows, metrics, notes = tables.aggregate(runs, args.metric, args.split, args.ci95)
    sys.stdout.write(tables.render(rows, metrics, args.format, args.sort) + "\n")
    for note in [*unread, *notes]:
        sys.stderr.write(f"note: {note}\n")
    return 0
