"""``promptmix hub pack|add|list|check``: trained prompts as folders that people exchange."""

from __future__ import annotations

import argparse
import sys

from promptmix.errors import UserError
from promptmix.files.text import harmless


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    add = parser.add_argument
    add("action", choices=("pack", "add", "list", "check"), help="make a folder of a run, take one in, list, check")
    add("what", nargs="?", default="", metavar="RUN|FOLDER", help="pack: output folder of a run; add, check: a folder")
    add("--as", dest="name", default="", metavar="NAME", help="NAME or OWNER/NAME; add takes the packed one by default")
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
        needs = {"list": "takes no folder", "pack": "needs the output folder of a run"}
        need = needs.get(args.action, "needs a folder that `promptmix hub pack` made")
        raise UserError(f"hub {args.action} {need}")
    if args.action == "pack" and not args.name:
        raise UserError("hub pack needs --as NAME, by which the prompts are loaded")
    for flag, given in {"--as": args.name, "--license": args.license, "--load-epoch": args.load_epoch}.items():
        users = ("pack", "add") if flag == "--as" else ("pack",)
        if args.action not in users and given not in ("", None):
            raise UserError(f"{flag} {given} is for hub {' and '.join(users)}; leave it out")
    from promptmix.runs import hub

    folder = hub.hub_folder(args.hub)
    if args.action == "pack":
        made = hub.pack(args.what, args.name, folder, args.load_epoch, args.license)
        sys.stdout.write(harmless(f"{made}\n{_use(made)}others take the folder by: promptmix hub add FOLDER\n"))
        return 0
    if args.action == "add":
        made, name = hub.add(args.what, args.name, folder)
        named = folder == hub.hub_folder()
        sys.stdout.write(harmless(f"{made}\n{_use(f'hub:{name}' if named else made)}"))
        return 0
    if args.action == "check":
        place = hub.place_of(args.what)
        note = hub.check(place)
        sys.stdout.write(harmless(f"{place}: {note['trainer']} for {note['backbone']}, {len(note['files'])} files as packed\n"))
        return 0
    damaged = 0
    entries = list(hub.entries(folder))
    if not entries:
        sys.stdout.write(harmless(f"{folder} holds no packed prompts; `promptmix hub pack RUN --as NAME` makes some\n"))
    for name, found in entries:
        damaged += found is None
        told = "damaged; `promptmix hub check` says why" if found is None else f"{found['trainer']} for {found['backbone']}"
        sys.stdout.write(harmless(f"{name}: {told}\n"))
    return 1 if damaged else 0


def _use(place: object) -> str:
    return f"use it as: promptmix predict --model-dir {place} PICTURES\n"
