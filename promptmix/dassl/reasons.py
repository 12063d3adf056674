"""What stops a checkout, in one line: which of its lines, and whose fault it is."""

from __future__ import annotations

import platform
import re
import sys
import traceback
from bdb import BdbQuit
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from urllib.error import URLError

import torch

from promptmix.dassl.foreign import is_foreign, led_to
from promptmix.engine import TrainerBase
from promptmix.errors import ConfigError, PluginError, UserError

__all__ = ["explained", "here", "where"]

#: Packages of a checkout; ones of the same names that pip would install are others.
_PARTS = ("datasets", "trainers")
#: What forks of Dassl change, and checkouts that need them call.
_OURS = (
    "Classification",
    "DataManager",
    "DatasetBase",
    "DatasetWrapper",
    "Datum",
    "SimpleTrainer",
    "TrainerBase",
    "TrainerX",
    "TrainerXU",
)
_FORK = "it may need a fork of Dassl: give its folder with --dassl, or take promptmix's own trainer (`promptmix list trainers`)"
_PAGE = "see the checkout's own page for it"
_WEIGHTS = re.compile(r"(RN\d+(x\d+)?|ViT-[BL]-\d+(-336px)?)\.pt")
_NO_GPU = (
    "no kernel image|not compiled with cuda|found no nvidia driver|no cuda gpus|cuda driver|cuda error|requires? cuda|cuda device"
    r"|torch\.cuda\.is_available\(\)"
)


@contextmanager
def explained(root: Path, data: str = "") -> Iterator[None]:
    """Turn whatever the checkout at ``root`` raises inside the context into one line; ``data`` is where its data sets lie.

    Raises:
        UserError: what stopped it; ``--debug`` shows the traceback.
    """
    try:
        yield
    except Exception as error:
        raise _reason(_first_cause(error), root, data) from error
    except SystemExit as error:
        if error.code in (None, 0):
            return
        raise UserError(f"{where(error, root) or 'train.py'} stops the program ({error.code})") from error


def where(error: BaseException, root: Path) -> str:
    """Return ``file:line`` of the checkout where ``error`` came from, or an empty string."""
    return _innermost(traceback.extract_tb(error.__traceback__), root)


def here(root: Path) -> str:
    """Return ``file:line`` of the checkout that called what runs now, or an empty string."""
    return _innermost(traceback.extract_stack(), root)


def _innermost(frames: traceback.StackSummary, root: Path) -> str:
    own = [frame for frame in frames if Path(frame.filename).is_relative_to(root)]
    return f"{Path(own[-1].filename).relative_to(root)}:{own[-1].lineno}" if own else ""


def _first_cause(error: BaseException) -> BaseException:
    """Return a user error among the causes of ``error``, or else the innermost error of a bare ``except: raise Exception``."""
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    users = [one for one in chain if isinstance(one, UserError)]
    if users:
        return users[-1]
    return chain[-1] if type(error) is Exception else error


def _reason(error: BaseException, root: Path, data: str) -> UserError:
    """Return the error to show for ``error``."""
    if isinstance(error, UserError):
        return error
    place = where(error, root) or "train.py"
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, AssertionError) and not str(error):
        frames = traceback.extract_tb(error.__traceback__)
        text = f"{frames[-1].line} does not hold"
    if isinstance(error, SyntaxError) and not isinstance(error.filename, str):
        return PluginError(f"{place}: {text}")
    if isinstance(error, SyntaxError):
        file = Path(error.filename or place)
        shown = file.relative_to(root) if file.is_relative_to(root) else file
        python = f"Python {platform.python_version()}"
        return PluginError(f"{shown}:{error.lineno} is not valid in {python} ({error.msg}); fix that line")
    if isinstance(error, BdbQuit):
        return UserError(f"{place} waits in a debugger (pdb.set_trace() there or in the line before); take that line out")
    if isinstance(error, ImportError):
        return _import_reason(error, root, place)
    frames = traceback.extract_tb(error.__traceback__)
    in_yacs = any(f"yacs{sep}" in frame.filename for frame in frames for sep in "/\\")
    if in_yacs and isinstance(error, AttributeError):
        if frames[-1].name == "__getattr__":
            return ConfigError(f"{place} reads a config key {text}, which neither its program nor its YAML files set")
        return ConfigError(f"{place} changes its config, which its program froze ({text})")
    if in_yacs and isinstance(error, KeyError | ValueError | AssertionError):
        reason = error.args[0] if error.args else text
        lost = re.match(r"Non-existent config key: (\S+)", str(reason))
        if lost and not lost.group(1).startswith("TRAINER."):
            return ConfigError(f"the checkout's config can't be merged: nothing declares its key {lost.group(1)}; {_FORK}")
        return ConfigError(f"the checkout's config can't be merged: {reason}; check its YAML files and the KEY VALUE pairs")
    if isinstance(error, AttributeError) and isinstance(error.obj, TrainerBase):
        return UserError(
            f"{place} uses {type(error.obj).__name__}.{error.name}, which neither the checkout nor Dassl has; {_FORK}"
        )
    if not torch.cuda.is_available() and re.search(_NO_GPU, text, re.IGNORECASE):
        return UserError(f"{place} asks for CUDA, but there is no GPU ({text}); change it to self.device, or use a GPU")
    if isinstance(error, URLError):
        return UserError(
            f"{place} can't download what it asks for ({error.reason}); MODEL.BACKBONE.WEIGHTS stands for CLIP's weights: a "
            "file, or a folder with OpenAI's file names (RN50.pt, ViT-B-16.pt) for a checkout that loads several models"
        )
    if isinstance(error, FileNotFoundError) and error.filename:
        return _missing(str(error.filename), place, root, data)
    if isinstance(error, KeyError) and frames[-1].filename.endswith(("os.py", "<frozen os>")) and error.args:
        return UserError(f"{place} reads the environment variable {error.args[0]}, which is not set; set it as its page says")
    if isinstance(error, KeyError) and re.search(rf"batch\w*\[.{re.escape(str(error.args[:1])[2:-3])}.\]", frames[-1].line or ""):
        return UserError(f"{place} reads {error} of a batch, which Dassl's batches lack; {_FORK}")
    # torch.jit, and programs that catch the error and raise another.
    missing = re.search(r"(?:file|filename|path) '?([^\s']+)'? does not exist|No such file or directory: '([^']+)'", text)
    if missing:
        return _missing(missing.group(1) or missing.group(2), place, root, data)
    owner = re.match(r"(\w+)\.\w+\(\) (got an unexpected|takes|missing)", text)
    if isinstance(error, TypeError) and owner and owner.group(1) in _OURS:
        return UserError(f"{place} calls Dassl otherwise than Dassl itself takes it ({text}); {_FORK}")
    kind = type(error).__name__
    return UserError(f"{place} fails: {kind}{f': {text}' if text != kind else ''} (--debug shows the traceback)")


def _missing(name: str, place: str, root: Path, data: str) -> UserError:
    """Return what to say of a file that is not there: what it may be, and where there is one of its name."""
    file = Path(name)
    said = f"{place} needs the file {name}, which is not there"
    if _WEIGHTS.fullmatch(file.name):
        return UserError(
            f"{said}; MODEL.BACKBONE.WEIGHTS may be a folder with OpenAI's file names, which stands for {file.name} too"
        )
    foreign = is_foreign(file)
    whose = ": a path of its authors' machine" if foreign else ""
    found = str(led_to(file, [root, *([Path(data)] if data else [])]) or "")
    if not found and not foreign:
        others = sorted(path.relative_to(root) for path in root.rglob(file.name) if ".git" not in path.parts)
        found = (
            f"{others[0]}{f' (and {len(others) - 1} more)' if others[1:] else ''}, which a key or flag of its own may choose"
            if others
            else ""
        )
    return UserError(f"{said}{whose}; {f'there is {found}' if found else _PAGE}")


def _import_reason(error: ImportError, root: Path, place: str) -> UserError:
    """Tell a package that is not installed from a module that the checkout lacks, and both from a fork of Dassl."""
    name = error.name or ""
    top = name.partition(".")[0]
    text = " ".join(str(error).split())
    if text.startswith("No module named 'dassl"):  # ours says it otherwise
        return PluginError(f"{place} can't be imported: {text} in the checkout's own Dassl; --dassl ours runs promptmix's")
    if top == "dassl" or name.startswith("promptmix.dassl"):
        return PluginError(
            f"{place} can't be imported: {text}; if the checkout needs a Dassl of its own, give its folder with --dassl"
        )
    if not isinstance(error, ModuleNotFoundError):
        wanted = re.match(r"cannot import name '(\w+)' from '", text)
        if wanted and name and not (root / top).exists():
            return PluginError(
                f"{place} needs {wanted.group(1)} of the package {top}, which the installed {_installed(top)} has not; install "
                "the version that the checkout asks for"
            )
        return PluginError(f"{place} can't be imported: {text}")
    if top in _PARTS or (root / top).is_dir() or (root / f"{top}.py").is_file():
        if top in sys.modules and "is not a package" in text:
            return PluginError(f"{place} can't be imported: {text}")
        return PluginError(
            f"{place} imports {name}, which the checkout itself lacks ({text}); it was not published with it: add it, or remove "
            "that import"
        )
    return PluginError(
        f"{place} needs the package {name}, which is not installed ({text}); install it, or remove that import from the checkout"
    )


def _installed(package: str) -> str:
    """Return a package's version, in words."""
    try:
        return f"version {metadata.version(package)}"
    except metadata.PackageNotFoundError:
        return "one"
