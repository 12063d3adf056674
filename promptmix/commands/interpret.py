"""``promptmix interpret RUN``: what a run learned, in words and numbers, and what its experts do."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from pathlib import Path

from promptmix.errors import UserError
from promptmix.files.text import harmless, json_text, one_line

PICTURE_FORMATS = ("svg", "pdf", "png")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    add = parser.add_argument
    add(
        "runs",
        nargs="+",
        metavar="RUN",
        help="output folders of finished runs; over several the accuracies of experts are averaged",
    )
    add("--words", type=int, default=3, metavar="N", help="nearest words for each position (default: 3)")
    add("--root", default="", help="folder of the data sets; the embedded ones need none")
    add("--format", default="github", help="github, json, or any other format of tabulate")
    add("--pictures", default="", metavar="DIR", help="also draw the routing, the accuracies and the distances there")
    add("--picture-format", nargs="+", default=["svg"], choices=PICTURE_FORMATS, help="default: svg")
    add("--load-epoch", type=int, metavar="N", help="the checkpoint of this epoch; default: the one that was tested")
    add("--weights", default="", metavar="FILE", help="the backbone's file, where the run had one of its own")
    add("--device", choices=("auto", "cpu", "cuda"), default="", help="where to compute")
    add("--plugin", action="append", default=[], metavar="MODULE|FILE", help="load a plugin; may be repeated")


def run(args: argparse.Namespace) -> int:
    """Open every run, tell what is in it, and draw it if asked for.

    Raises:
        UserError: a run can't be opened, or a flag has a value that can't be.
    """
    from tabulate import tabulate_formats

    from promptmix.tables.tables import check_choice

    check_choice("--format", args.format, [*tabulate_formats, "json"])
    if args.words < 1:
        raise UserError(f"--words is {args.words}, but must be at least 1")
    from promptmix.interpret import show
    from promptmix.interpret.look import look
    from promptmix.interpret.opened import open_run

    options = {
        "root": args.root,
        "weights": args.weights,
        "epoch": args.load_epoch,
        "device": args.device,
        "plugins": args.plugin,
    }
    with contextlib.redirect_stdout(sys.stderr):  # warnings while loading are no part of a table or of JSON
        found = [look(open_run(run, **options), args.words) for run in args.runs]
    if args.pictures:
        from promptmix.interpret import pictures

        for place, one in enumerate(found, start=1):
            name = f"{place}-" if len(found) > 1 else ""
            for path in pictures.write(one, Path(args.pictures), args.picture_format, name):
                sys.stderr.write(f"note: picture: {harmless(path)}\n")
    if args.format == "json":
        trees = [one.tree() for one in found]
        sys.stdout.write(json_text(json.dumps(trees[0] if len(trees) == 1 else trees, indent=2, ensure_ascii=False)) + "\n")
        return 0
    for one in found:
        sys.stdout.write(harmless(f"{one.trainer} on {one.dataset} ({one.run})\n"))
        for title, table in show.sections(one, args.format):
            sys.stdout.write(f"\n{harmless(title)}\n\n{table}\n")
        sys.stdout.write("".join(f"\nnote: {one_line(note)}\n" for note in one.notes) + "\n")
    for title, table in show.over_runs(found, args.format):
        sys.stdout.write(f"{harmless(title)}\n\n{table}\n\n")
    return 0
