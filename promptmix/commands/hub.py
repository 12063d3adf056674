"""``promptmix hub pack|list|check``: trained prompts as folders that people exchange."""

from __future__ import annotations

import argparse
import sys

from promptmix.errors import UserError
from promptmix.files.text import harmless


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    add = parser.add_argument
    add("action", choices=("pack", "list", "check"), help="make a folder of a run, list those there are, or check one")
    add("what", nargs="?", default="", metavar="RUN|FOLDER", help="pack: output folder of a run; check: hub:NAME or a folder")
    add("--as", dest="name", default="", metavar="NAME", help="pack: NAME or OWNER/NAME")
    add("--hub", default="", metavar="DIR", help="default: PROMPTMIX_HUB, or promptmix/hub among the user's data")
    add("--license", default="", metavar="ID", help="pack: of the learned numbers, such as mit")
    add("--load-epoch", type=int, metavar="N", help="pack: the checkpoint of this epoch; default: the one that was tested")


def run(args: argparse.Namespace) -> int:
    """Do it.

    Returns:
        0; 1 where ``list`` finds a damaged folder.

    Raises:
        UserError: something that can't be done.
    """
    if (args.action == "list") == bool(args.what):
        need = "takes no folder" if args.action == "list" else "needs the output folder of a run"
        raise UserError(f"hub {args.action} {need}")
    if args.action == "pack" and not args.name:
        raise UserError("hub pack needs --as NAME, by which the prompts are loaded")
    for flag, given in {"--as": args.name, "--license": args.license, "--load-epoch": args.load_epoch}.items():
        if args.action != "pack" and given not in ("", None):
            raise UserError(f"{flag} {given} is for hub pack; leave it out")
    from promptmix.runs import hub

    folder = hub.hub_folder(args.hub)
    if args.action == "pack":
        made = hub.pack(args.what, args.name, folder, args.load_epoch, args.license)
        sys.stdout.write(harmless(f"{made}\nuse it as: promptmix predict --model-dir {made} PICTURES\n"))
        return 0
    if args.action == "check":
        place = hub.place_of(args.what)
        note = hub.check(place)
        sys.stdout.write(harmless(f"{place}: {note['trainer']} for {note['backbone']}, {len(note['files'])} files as packed\n"))
        return 0
    damaged = 0
    for name, found in hub.entries(folder):
        damaged += found is None
        told = "damaged; `promptmix hub check` says why" if found is None else f"{found['trainer']} for {found['backbone']}"
        sys.stdout.write(harmless(f"{name}: {told}\n"))
    return 1 if damaged else 0
