"""``promptmix cache``: what features and decoded pictures are kept on disk, and how to be rid of them."""

from __future__ import annotations

import argparse
import sys
from datetime import datetime, timezone
from pathlib import Path

from promptmix.errors import UserError
from promptmix.files.text import counted, one_line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    add = parser.add_argument
    add("action", nargs="?", choices=("list", "clear"), default="list", help="show the files (default), or remove them all")
    add("--dir", default="", metavar="DIR", help="the folder; default: PROMPTMIX_CACHE_DIR, else the user's cache folder")


def run(args: argparse.Namespace) -> int:
    """List or clear the cache."""
    from tabulate import tabulate

    from promptmix.data.features.cache import FeatureCache, cache_folder
    from promptmix.data.features.pictures import PictureCache, picture_folder

    if args.dir and ("\0" in args.dir or Path(args.dir).exists() and not Path(args.dir).is_dir()):
        raise UserError(f"--dir {args.dir} is not a folder; name the folder of the cache, or leave the flag out")
    folder = cache_folder(args.dir)
    caches = (FeatureCache(folder), PictureCache(picture_folder(args.dir)))
    entries = [(cache.what, entry) for cache in caches for entry in cache.entries()]
    if args.action == "clear":
        freed = sum(cache.clear() for cache in caches)
        sys.stdout.write(f"removed {counted(len(entries), 'file')} ({freed / 1e6:.1f} MB) from {folder}\n")
        return 0
    rows = [
        (
            datetime.fromtimestamp(entry.used, timezone.utc).strftime("%Y-%m-%d %H:%M"),
            f"{entry.size / 1e6:.1f}",
            what,
            one_line(entry.about),
        )
        for what, entry in entries
    ]
    if rows:
        sys.stdout.write(tabulate(rows, ("last used (UTC)", "MB", "what", "of"), disable_numparse=True) + "\n")
    sys.stdout.write(f"{counted(len(rows), 'file')}, {sum(entry.size for _, entry in entries) / 1e6:.1f} MB in {folder}\n")
    return 0
