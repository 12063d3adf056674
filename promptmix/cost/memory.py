"""Peak memory of this process, for results and benchmarks."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
from pathlib import Path

import torch


def reset_peak() -> None:
    """Give freed memory back and start counting the peak anew (resident memory on Linux; elsewhere it can't be reset)."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # glibc keeps freed memory, which would hide what the next work needs
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak_mb() -> dict[str, float | None]:
    """Return the peak since ``reset_peak`` in MiB: ``rss`` (resident) and ``cuda`` (allocated), None where unknown."""
    cuda = torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else None
    rss = _status_mb("VmHWM")
    if rss is None:
        with contextlib.suppress(ImportError):  # no such module on Windows
            import resource

            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            rss = peak / 2**20 if sys.platform == "darwin" else peak / 1024
    return {"rss": rss and round(rss, 1), "cuda": cuda and round(cuda, 1)}


def resident_mb() -> float | None:
    """Return the resident memory now in MiB, None where unknown."""
    return _status_mb("VmRSS")


def available_mb() -> float | None:
    """Return the memory in MiB that new work can have without swapping, None where unknown."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return float(next(line for line in lines if line.startswith("MemAvailable:")).split()[1]) / 1024
    return None


def _status_mb(field: str) -> float | None:
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return float(next(line for line in lines if line.startswith(field + ":")).split()[1]) / 1024
    return None
