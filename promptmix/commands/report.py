"""``promptmix report RUN [RUN ...]``: one self-contained page about runs, to be read and sent."""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path

from promptmix.errors import UserError
from promptmix.files.text import counted, harmless, one_line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="output folders of runs, or folders with runs at any depth, such as a sweep's")
    add("--out", default="report.html", metavar="FILE", help="default: report.html")
    add("--title", default="", help="default: the methods")
    add("--compare", default="", metavar="METHOD", help="paired tests of METHOD against each other one; default: every pair")
    add("--root", default="", help="folder of the data sets, for thumbnails and routing; the embedded ones need none")
    add("--weights", default="", metavar="FILE", help="the backbone's file, where the runs had one of their own")
    add("--no-interpret", action="store_true", help="leave out what was learned, which loads a run of each method")
    add("--device", choices=("auto", "cpu", "cuda"), default="", help="where to compute what was learned")
    add("--plugin", action="append", default=[], metavar="MODULE|FILE", help="load a plugin; may be repeated")


def run(args: argparse.Namespace) -> int:
    """Read the runs and write the page.

    Raises:
        UserError: there are no runs, or the page can't be written.
    """
    out = Path(args.out)
    if out.is_dir() or out.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"--out {args.out}: must name a file that ends in .html")
    from promptmix.config.flags import check_place, load_plugins
    from promptmix.report import gather
    from promptmix.report.figures import drawing
    from promptmix.report.inside import insights
    from promptmix.report.page import Wish, page
    from promptmix.utils import atomic_write

    check_place("--root", args.root)
    check_place("--weights", args.weights, "file")
    with contextlib.redirect_stdout(sys.stderr), drawing():  # what is not installed is said before anything is computed
        load_plugins(args.plugin)
        runs, notes = gather.find(args.runs)
        options = {"root": args.root, "device": args.device, "weights": args.weights}
        found = {} if args.no_interpret else insights(runs, notes, **options)
        text = page(runs, Wish(args.title, args.root, args.compare, found), notes)
    atomic_write(out, lambda path: path.write_text(text, encoding="utf-8", errors="backslashreplace"))
    for note in dict.fromkeys(notes):
        sys.stderr.write(f"note: {one_line(note)}\n")
    sys.stdout.write(f"{harmless(out)}: {counted(len(runs), 'run')}, {len(text.encode('utf-8', 'replace')) / 1e6:.1f} MB\n")
    return 0
