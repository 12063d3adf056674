"""Command line of the build: one stage at a time, or all of them in order."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from assets import sources

ASSETS = Path(__file__).resolve().parents[2] / "promptmix" / "assets"


def _render(args: argparse.Namespace) -> None:
    from assets import concepts, render

    render.render(args.archives, args.work, {concept.hexcode for concept in concepts.candidates(args.archives)})
    concepts.build_concepts(args.archives, args.work)


def _image(args: argparse.Namespace) -> None:
    from assets import towers

    towers.build_image_tower(args.work)


def _text(args: argparse.Namespace) -> None:
    from assets import text

    text.cut_tokenizer(args.work)
    text.train_text_tower(args.work)


def _teacher(args: argparse.Namespace) -> None:
    from assets import distill

    distill.build_teacher_set(args.work)


def _vit(args: argparse.Namespace) -> None:
    from assets import distill

    distill.train_vit(args.work)


def _pack(args: argparse.Namespace) -> None:
    from assets import pack

    pack.pack_pictures(args.work, args.out / "emoji")
    pack.pack_models(args.work, args.out / "models")
    pack.pack_licences(args.archives, args.out / "LICENSES")


def _jpegs(args: argparse.Namespace) -> None:
    from assets import jpegs

    jpegs.write_jpegs(args.archives, ASSETS / "emoji" / "families_split.json", args.work / f"jpegs-{args.size}", args.size)


def _measure(args: argparse.Namespace) -> None:
    from assets import measure

    measure.report(args.out)


STAGES: dict[str, tuple[Callable[[argparse.Namespace], None], str]] = {
    "download": (lambda args: sources.download(args.archives), "bring the pinned npm packages that are missing (network)"),
    "render": (_render, "render every style to 64 px and write the table of concepts"),
    "image": (_image, "tiny-en's image tower and the concepts' prototypes"),
    "text": (_text, "tiny-en's tokenizer and text tower"),
    "teacher": (_teacher, "augmented pictures with tiny-en's features"),
    "vit": (_vit, "tiny-vit's image tower"),
    "pack": (_pack, "write packs, weights and licences"),
    "measure": (_measure, "print the model card's zero-shot numbers"),
    "jpegs": (_jpegs, "write Fluent 3D as JPEGs of --size pixels into the folder in between; not part of all"),
}


def main() -> int:
    """Run one stage or all of them; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.epilog = "\n".join(f"{name:<9} {text}" for name, (_, text) in STAGES.items())
    parser.add_argument("stage", choices=[*STAGES, "all"], help="what to do, see below")
    parser.add_argument("--archives", type=Path, default=Path("build/archives"), help="folder of the npm packages")
    parser.add_argument("--work", type=Path, default=Path("build/assets"), help="folder for everything in between")
    parser.add_argument("--out", type=Path, default=ASSETS, help="folder of the results")
    parser.add_argument("--size", type=int, default=107, help="jpegs: pixels of an edge, 256 at most")
    parser.add_argument("--threads", type=int, default=1, help="threads; another number changes the last digits")
    args = parser.parse_args()
    if args.stage not in ("download", "render"):
        import torch

        torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    for name in [name for name in STAGES if name != "jpegs"] if args.stage == "all" else [args.stage]:
        STAGES[name][0](args)
    return 0
