"""``promptmix predict --model-dir RUN IMAGE...``: classify pictures with what a run learned."""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from promptmix.errors import DataError, UserError
from promptmix.files.text import csv_cell, harmless, json_text

if TYPE_CHECKING:
    from promptmix.predict import Prediction


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    add = parser.add_argument
    add("images", nargs="+", metavar="IMAGE", help="pictures, or folders of pictures")
    add("--model-dir", required=True, metavar="DIR", help="output folder of the run")
    add("--load-epoch", type=int, metavar="N", help="checkpoint of this epoch; default: the one that the run was tested with")
    add("--classnames", default="", metavar="A,B,C", help="names to choose from, or a file with one a line; default: the run's")
    add("--format", choices=("table", "jsonl", "csv"), default="table", help="default: table")
    add("--top", type=int, default=1, metavar="K", help="classes per picture, the most probable first; default: 1")
    add("--batch-size", type=int, default=32, metavar="N", help="pictures at a time; default: 32")
    add("--device", choices=("auto", "cpu", "cuda"), default="", help="where to compute; default: as the run")
    add(
        "--reading",
        choices=("upright", "benchmark"),
        default="",
        help="how pictures are read; default: as the run says, or upright",
    )
    add("--weights", default="", metavar="FILE", help="the backbone's file, where the run had one of its own")
    add("--descriptions", default="", metavar="FILE", help="sentences about the classes, where the method reads them")
    add("--skip-bad", action="store_true", help="leave out pictures that can't be read, without exit code 1")
    add("--plugin", action="append", default=[], metavar="MODULE|FILE", help="load a plugin; may be repeated")


def run(args: argparse.Namespace) -> int:
    """Print one or more classes for each picture.

    Returns:
        0; 1 where pictures could not be read (they are named at the end), unless ``--skip-bad`` was given.

    Raises:
        UserError: none of the pictures can be read, or the run can't be loaded.
    """
    for flag, number in (("--top", args.top), ("--batch-size", args.batch_size)):
        if number < 1:
            raise UserError(f"{flag} is {number}, but must be at least 1")
    names = _names(args.classnames)
    images = [path for name in args.images for path in _pictures(name)]
    from promptmix.predict import load

    # Warnings while loading are no part of a table or of JSON lines.
    with contextlib.redirect_stdout(sys.stderr):
        options = {"plugins": args.plugin, "reading": args.reading, "weights": args.weights, "descriptions": args.descriptions}
        predictor = load(args.model_dir, epoch=args.load_epoch, device=args.device, **options)
        unreadable: list[str] = []
        predictions = predictor.predict(images, names or None, batch_size=args.batch_size, unreadable=unreadable)
    if unreadable and not predictions:
        raise DataError(unreadable[0] + (f" (and {len(unreadable) - 1} more)" if len(unreadable) > 1 else ""))
    _write(predictions, args.format, args.top)
    sys.stdout.flush()
    sys.stderr.writelines(f"promptmix: left out: {line}\n" for line in unreadable)
    return 1 if unreadable and not args.skip_bad else 0


def _names(text: str) -> list[str]:
    """Return class names from ``a,b,c`` or from the lines of a file."""
    from promptmix.utils import read_text

    is_path = bool(text) and "," not in text and (Path(text).suffix in (".txt", ".csv", ".lst") or os.sep in text)
    try:
        parts = read_text(text).splitlines() if is_path or (text and Path(text).is_file()) else text.split(",")
    except (DataError, OSError) as error:
        raise UserError(f"--classnames {error}; give names with commas between, or a file with one a line") from error
    names = [part.strip() for part in parts if part.strip()]
    if text and not names:
        raise UserError(f"--classnames {text!r} holds no name; give names with commas between, or a file with one a line")
    return names


def _pictures(name: str) -> list[str]:
    """Return ``name``, or the pictures below it if it is a folder, sorted."""
    if not Path(name).is_dir():
        return [name]
    from PIL import Image

    known = Image.registered_extensions()
    found = sorted(str(path) for path in Path(name).rglob("*") if path.suffix.lower() in known and path.is_file())
    if not found:
        raise DataError(f"no pictures below {name}; name pictures or a folder that holds some")
    return found


def _write(predictions: list[Prediction], form: str, top: int) -> None:
    best = [
        (prediction.image, list(zip(prediction.classnames[:top], prediction.probabilities[:top], strict=True)))
        for prediction in predictions
    ]
    if form == "csv":
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerow(("image", "rank", "classname", "probability"))
        for image, ranks in best:
            rows = ((image, rank, name, f"{value:.6f}") for rank, (name, value) in enumerate(ranks, start=1))
            writer.writerows(map(csv_cell, row) for row in rows)
    elif form == "jsonl":
        for image, ranks in best:
            found = [{"classname": name, "probability": round(value, 6)} for name, value in ranks]
            sys.stdout.write(json_text(json.dumps({"image": image, "predictions": found}, ensure_ascii=False)) + "\n")
    else:
        from tabulate import tabulate

        shown = [
            (harmless(image) if rank == 0 else "", harmless(name), f"{100 * value:.1f}%")
            for image, ranks in best
            for rank, (name, value) in enumerate(ranks)
        ]
        sys.stdout.write(tabulate(shown, headers=("Image", "Class", "Probability"), disable_numparse=True) + "\n")
