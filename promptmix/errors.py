"""Errors that a user can cause and fix. The command line prints them as one line and exits with code 2."""

from __future__ import annotations

import errno

#: Errors of the operating system that have a remedy of their own.
REMEDIES = {
    errno.ENOSPC: "make room, then give the same command again",
    errno.EDQUOT: "make room in your quota, then give the same command again",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f), then give the same command again",
    errno.EROFS: "name a folder that can be written",
    errno.EACCES: "check its permissions, or name another",
    errno.EPERM: "check its permissions, or name another",
    errno.EEXIST: "a file, or a link that leads nowhere, is where a folder belongs; name another",
    errno.ENOTDIR: "a file is where a folder belongs; name another",
    errno.EMFILE: "raise the limit on open files (ulimit -n), or lower DATALOADER.NUM_WORKERS",
    errno.ENFILE: "close other programs, or lower DATALOADER.NUM_WORKERS",
    errno.ELOOP: "a link there leads back to itself; name another path",
    errno.ENOMEM: "lower DATALOADER.TRAIN_X.BATCH_SIZE, or set MODEL.CLASS_CHUNK",
}


class UserError(Exception):
    """Something the user asked for can't be done; the message says what, with which value, and how to fix it."""

    def __str__(self) -> str:
        """Return the message as written (``KeyError`` would print it in quotes)."""
        return str(self.args[0]) if self.args else ""


class ConfigError(UserError, ValueError):
    """A configuration key or value that is unknown, of the wrong type, out of range, or would be ignored."""


class SettingError(ConfigError):
    """A part's setting that doesn't fit the model or the data set. Whoever built the part from a config names the whole key.

    Args:
        setting: the constructor's argument.
        value: what it was.
        remedy: why it doesn't fit, and what to do.
    """

    def __init__(self, setting: str, value: object, remedy: str) -> None:
        super().__init__(f"{setting} is {value!r}, {remedy}")
        self.setting, self.value, self.remedy = setting, value, remedy

    def under(self, node: str) -> ConfigError:
        """Return the error with the setting's dotted key in the config."""
        return ConfigError(f"{node}.{self.setting.upper()} is {self.value!r}, {self.remedy}")


class RegistryError(UserError, KeyError):
    """A name that no registry entry has, or that is taken already."""


class DataError(UserError, OSError):
    """A data set, picture or split that is missing or unreadable."""


class WeightsError(UserError, OSError):
    """Backbone weights that can't be found, downloaded or matched to the model."""


class CheckpointError(UserError, OSError):
    """A checkpoint that is missing, unreadable or of another method."""


class PluginError(UserError, ImportError):
    """A plugin that can't be loaded or that implements an unknown hook."""


class OutputError(UserError, OSError):
    """A file that can't be written: the disk is full, the folder read-only, the file too large for a limit."""


class TrainingError(UserError, FloatingPointError):
    """A training whose loss is no number any more."""


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether ``error`` means that memory, of the GPU or of the machine, did not suffice: by PyTorch's words, without it."""
    words = words_of(error)
    return isinstance(error, MemoryError) or "can't allocate memory" in words or "out of memory" in words


def said(error: OSError, otherwise: str) -> str:
    """Return what the system says of a file or folder and what to do about it; ``otherwise`` where nothing better is known."""
    return f"{error.strerror or error}; {REMEDIES.get(error.errno or 0, otherwise)}"


def words_of(error: BaseException) -> str:
    """Return an exception's own words; none where it can't say them."""
    try:
        return str(error)
    except Exception:  # a plugin's may fail in its turn
        return ""
