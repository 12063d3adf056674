"""``promptmix predict --model-dir RUN IMAGE...``: classify pictures with what a run learned."""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from promptmix.config.flags import check_count
from promptmix.errors import DataError, UserError
from promptmix.files.text import csv_cell, json_text, one_line, real

if TYPE_CHECKING:
    from promptmix.predict import Prediction


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    add = parser.add_argument
    add("images", nargs="+", metavar="IMAGE", help="pictures, folders of pictures, or tables (CSV) with a column path")
    add("--model-dir", required=True, metavar="DIR", help="output folder of the run")
    add("--load-epoch", type=int, metavar="N", help="checkpoint of this epoch; default: the one that the run was tested with")
    add("--classnames", default="", metavar="A,B,C", help="names to choose from, or a file with one a line; default: the run's")
    add("--format", choices=("table", "jsonl", "csv"), default="table", help="default: table")
    add("--top", type=int, default=1, metavar="K", help="classes per picture, the most probable first; default: 1")
    add("--threshold", type=float, default=0.0, metavar="P", help="leave out classes below this probability, from 0 to 1")
    add(
        "--temperature",
        default="auto",
        metavar="T",
        help="scores are divided by it; default: what `eval --calibrate` or fit found",
    )
    add("--embeddings", default="", metavar="FILE", help="also write image features to this .npz or .safetensors file")
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
        check_count(flag, number, most=10**6)
    if not 0 <= args.threshold <= 1:
        raise UserError(f"--threshold is {args.threshold}, but must be a probability from 0 to 1")
    names, temperature = class_names(args.classnames), _temperature(args.temperature)
    if args.embeddings and Path(args.embeddings).suffix not in (".npz", ".safetensors"):
        raise UserError(f"--embeddings {args.embeddings}: give a file name that ends with .npz or .safetensors")
    from promptmix.data.datasets.tables import SUFFIXES

    for name in args.images:
        if (Path(name).is_dir() or Path(name).suffix.lower() in SUFFIXES) and next(_pictures(name), None) is None:
            raise DataError(f"no pictures below {name}; name pictures or a folder that holds some")
    from promptmix.predict import load

    # Warnings while loading are no part of a table or of JSON lines.
    with contextlib.redirect_stdout(sys.stderr):
        options = {"plugins": args.plugin, "reading": args.reading, "weights": args.weights, "descriptions": args.descriptions}
        predictor = load(args.model_dir, epoch=args.load_epoch, device=args.device, temperature=temperature, **options)
    unreadable: list[str] = []
    images = _with_progress(path for name in args.images for path in _pictures(name))
    found = predictor.stream(
        images, names or None, batch_size=args.batch_size, unreadable=unreadable, embeddings=bool(args.embeddings)
    )
    kept: list[tuple[str, Any]] = []
    count = 0
    writer = WRITERS[args.format](args.top, args.threshold)
    for prediction in found:
        count += 1
        writer.add(prediction)
        if args.embeddings:
            kept.append((prediction.image, prediction.embedding))
    if unreadable and not count:
        raise DataError(unreadable[0] + (f" (and {len(unreadable) - 1} more)" if len(unreadable) > 1 else ""))
    writer.end()
    sys.stdout.flush()
    if args.embeddings:
        _write_embeddings(kept, Path(args.embeddings))
    sys.stderr.writelines(f"promptmix: left out: {one_line(line)}\n" for line in unreadable)
    return 1 if unreadable and not args.skip_bad else 0


def _temperature(text: str) -> float | None:
    """Return the number that ``--temperature`` gives; None = what was fitted."""
    if text == "auto":
        return None
    try:
        return real(text)
    except ValueError:
        raise UserError(f"--temperature is {text!r}; give a positive number, or auto") from None


def class_names(text: str) -> list[str]:
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


def _pictures(name: str) -> Iterator[str]:
    """Yield ``name``, or the pictures that it leads to.

    Those below a folder: its own first, then those of its folders, by name; what is hidden is left out. Or those of a table,
    whose paths are relative to it.

    Raises:
        DataError: a table has no column ``path``.
    """
    from promptmix.data.datasets.tables import SUFFIXES, picture_paths

    if Path(name).suffix.lower() in SUFFIXES:
        yield from picture_paths(Path(name))
        return
    if not Path(name).is_dir():
        yield name
        return
    from PIL import Image

    known = Image.registered_extensions()
    for folder, inside, files in os.walk(name):
        inside[:] = sorted(below for below in inside if not below.startswith("."))
        for file in sorted(files):
            path = os.path.join(folder, file)
            if not file.startswith(".") and os.path.splitext(file)[1].lower() in known:
                yield path  # also a pipe or a lost link, which is named then, not read


def _with_progress(images: Iterable[str]) -> Iterator[str]:
    """Yield pictures, counted on standard error where that is a terminal; how many there will be is not known beforehand."""
    from tqdm import tqdm

    yield from tqdm(images, unit=" pictures", disable=not sys.stderr.isatty(), leave=False)


def _write_embeddings(kept: list[tuple[str, Any]], path: Path) -> None:
    """Write features (N, D) in order, with the pictures' paths."""
    import torch

    from promptmix.predict.arrays import write_arrays

    features = torch.stack([feature for _, feature in kept]).numpy()
    write_arrays(path, {"embedding": features}, {"image": [image for image, _ in kept]})


class _Writer:
    """Writes predictions as they come.

    Args:
        top: classes per picture.
        threshold: least probability of a class that is written.
    """

    def __init__(self, top: int, threshold: float) -> None:
        self._top, self._threshold = top, threshold

    def add(self, prediction: Prediction) -> None:
        """Write or keep one picture's classes."""
        pairs = zip(prediction.classnames[: self._top], prediction.probabilities, strict=False)
        self._take(prediction.image, [pair for pair in pairs if pair[1] >= self._threshold])

    def _take(self, image: str, ranks: list[tuple[str, float]]) -> None:
        raise NotImplementedError

    def end(self) -> None:
        """Write what was kept."""


class _Csv(_Writer):
    """A line for each class; one with rank 0 for a picture of which none is probable enough."""

    def __init__(self, top: int, threshold: float) -> None:
        super().__init__(top, threshold)
        self._writer = csv.writer(sys.stdout, lineterminator="\n")
        self._begun = False

    def _take(self, image: str, ranks: list[tuple[str, float]]) -> None:
        if not self._begun:
            self._writer.writerow(("image", "rank", "classname", "probability"))
            self._begun = True
        rows: list[tuple[Any, ...]] = [(image, rank, name, f"{value:.6f}") for rank, (name, value) in enumerate(ranks, start=1)]
        self._writer.writerows(map(csv_cell, row) for row in rows or [(image, 0, "", "")])


class _Lines(_Writer):
    """A line of JSON for each picture."""

    def _take(self, image: str, ranks: list[tuple[str, float]]) -> None:
        found = [{"classname": name, "probability": round(value, 6)} for name, value in ranks]
        sys.stdout.write(json_text(json.dumps({"image": image, "predictions": found}, ensure_ascii=False)) + "\n")


class _Table(_Writer):
    """A table for people, at the end."""

    def __init__(self, top: int, threshold: float) -> None:
        super().__init__(top, threshold)
        self._rows: list[tuple[str, str, str]] = []

    def _take(self, image: str, ranks: list[tuple[str, float]]) -> None:
        shown = [(one_line(name), f"{100 * value:.1f}%") for name, value in ranks] or [("-", f"< {100 * self._threshold:g}%")]
        self._rows += [(one_line(image) if rank == 0 else "", *cells) for rank, cells in enumerate(shown)]

    def end(self) -> None:
        """Write the table."""
        from tabulate import tabulate

        sys.stdout.write(tabulate(self._rows, headers=("Image", "Class", "Probability"), disable_numparse=True) + "\n")


WRITERS: dict[str, type[_Writer]] = {"table": _Table, "jsonl": _Lines, "csv": _Csv}
