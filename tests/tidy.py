"""The folder that holds whatever a run of the tests leaves behind, and goes with it."""

import contextlib
import os
import shutil
import tempfile
from pathlib import Path

PREFIX = "promptmix-tests-"


def own_folder() -> tempfile.TemporaryDirectory:
    """Make the folder, and have this process and those that it starts keep caches and temporary files there.

    It goes with the returned object. Those of tests that were killed go now.
    """
    above = Path(tempfile.gettempdir())
    for old in above.glob(f"{PREFIX}*"):
        owner = old.name[len(PREFIX) :].partition("-")[0]
        if owner.isdigit() and not _lives(int(owner)):
            shutil.rmtree(old, ignore_errors=True)
    folder = tempfile.TemporaryDirectory(prefix=f"{PREFIX}{os.getpid()}-", ignore_cleanup_errors=True)
    # Folders of tests that failed stay to be looked at, as pytest has it.
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(above))
    os.environ["TMPDIR"] = tempfile.tempdir = folder.name
    os.environ["PROMPTMIX_CACHE_DIR"] = str(Path(folder.name, "cache"))
    return folder


def _lives(process: int) -> bool:
    with contextlib.suppress(PermissionError):
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return False
    return True
