"""``promptmix parse DIR``: tables from the results below a folder, ours and CoOp's logs alike."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from promptmix.errors import UserError
from promptmix.files.text import one_line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument("directory", metavar="DIR", help="folder with the output folders of runs, at any depth")
    parser.add_argument("--format", default="github", help="github, latex, csv, json, or any other format of tabulate")
    parser.add_argument("--metric", nargs="+", metavar="NAME", help="default: accuracy macro_accuracy")
    parser.add_argument("--keyword", default="", metavar="NAME", help="of CoOp's scripts: the one metric that is shown (error)")
    parser.add_argument("--split", default="test", help="which evaluation: test or val")
    parser.add_argument("--sort", default="name", help="name, time, base, new, h or test (best first)")
    parser.add_argument("--test-log", action="store_true", help="only runs that evaluated a checkpoint without training")
    parser.add_argument(
        "--multi-exp", action="store_true", help="of CoOp's scripts: DIR holds several experiments, as it always may"
    )
    parser.add_argument("--ci95", action="store_true", help="half a 95%% t-interval in place of the population deviation")
    parser.add_argument("--published", action="store_true", help="add the papers' numbers and the difference, where they compare")
    parser.add_argument(
        "--compare",
        nargs="?",
        const="",
        metavar="METHOD",
        help="also paired tests of every pair of methods, or of METHOD against each other one (csv, json: these alone)",
    )
    parser.add_argument("--cost", action="store_true", help="add learned parameters and seconds of training")
    about = "also draw curves over shots, base against new, and bars: PNG into a folder, or by FILE's suffix (.pdf, .svg, .png)"
    parser.add_argument("--plot", default="", metavar="DIR|FILE", help=about)


def run(args: argparse.Namespace) -> int:
    """Read, aggregate, print; notes on what was left out go to standard error."""
    from promptmix.runs import results
    from promptmix.tables import tables

    if args.keyword:
        if args.metric:
            raise UserError("--keyword and --metric name the same thing; leave one of them out")
        args.metric = [results.LOG_NAMES.get(args.keyword, args.keyword)]
    runs, unread = results.find(args.directory, args.test_log)
    rows, metrics, notes = tables.aggregate(runs, args.metric, args.split, args.ci95)
    rows += tables.averages(rows, metrics, args.ci95)
    if args.published:
        if args.split != "test":
            raise UserError(f"--published: papers report the test split, not {args.split}; leave one of the two out")
        from promptmix.tables import published

        notes += published.add(rows)
    if args.plot:
        from promptmix.tables import plots

        notes += [f"plot: {path}" for path in plots.write(rows, metrics[0], Path(args.plot))]
    text = [tables.render(rows, metrics, args.format, args.sort, args.cost)]
    if args.compare is not None:
        from promptmix.tables import paired

        if args.split != "test":
            raise UserError(f"--compare: predictions are kept of the test split, not of {args.split}; leave one of the two out")
        comparisons, more = paired.compare(rows, args.compare)
        text = [*(text if args.format not in ("csv", "json") else []), paired.render(comparisons, args.format)]
        notes += more
    sys.stdout.write("\n\n".join(text) + "\n")
    for note in [*unread, *notes]:
        sys.stderr.write(f"note: {one_line(note)}\n")
    return 0
