"""``promptmix export RUN``: what a run learned for other programs, as zero-shot weights or as an ONNX graph."""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path

from promptmix.commands.predict import class_names
from promptmix.errors import UserError
from promptmix.files.text import harmless

FORMATS = ("npz", "safetensors", "onnx")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    add = parser.add_argument
    add("run", metavar="RUN", help="output folder of the run")
    add("--classnames", default="", metavar="A,B,C", help="names to tell apart, or a file with one a line; default: the run's")
    about = "npz, safetensors: zero-shot weights, router and prompts; onnx: image tower and classifier; default: npz"
    add("--format", choices=FORMATS, default="", help=about)
    add("--output", default="", metavar="FILE", help="default: RUN/export.<format>; its suffix names the format too")
    add("--load-epoch", type=int, metavar="N", help="checkpoint of this epoch; default: the one that the run was tested with")
    add("--weights", default="", metavar="FILE", help="the backbone's file, where the run had one of its own")
    add("--descriptions", default="", metavar="FILE", help="sentences about the classes, where the method reads them")
    add("--plugin", action="append", default=[], metavar="MODULE|FILE", help="load a plugin; may be repeated")


def run(args: argparse.Namespace) -> int:
    """Write the file and say what it holds.

    Raises:
        UserError: the run can't be loaded, or is no such classifier; nothing is written then.
    """
    form = args.format or Path(args.output).suffix[1:] or "npz"
    path = Path(args.output or Path(args.run, f"export.{form}"))
    if form not in FORMATS or path.suffix != f".{form}":
        raise UserError(
            f"--output {args.output}: give a file name that ends with .{form if form in FORMATS else ', .'.join(FORMATS)}"
        )
    names = class_names(args.classnames) or None
    from promptmix.predict import load

    with contextlib.redirect_stdout(sys.stderr):
        options = {"plugins": args.plugin, "weights": args.weights, "descriptions": args.descriptions}
        predictor = load(args.run, epoch=args.load_epoch, device="cpu", **options)
        if form == "onnx":
            from promptmix.predict.onnx import write_onnx

            apart = write_onnx(predictor, path, names)
            what = f"images to logits, compared with the method in onnxruntime: scores differ by {apart:.1g} at most"
        else:
            from promptmix.predict import export

            exported = export.arrays_of(predictor, names)
            export.write(exported, path)
            shapes = (f"{name} {tuple(array.shape)}" for name, array in exported.arrays.items() if array.ndim)
            what = ", ".join(["classnames", *shapes])
    sys.stdout.write(f"{harmless(path)}: {what}\nhow to use it: docs/export.md\n")
    return 0
