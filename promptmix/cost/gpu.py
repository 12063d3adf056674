"""What a GPU would need for counted work, by its maker's data sheet: a roofline, nothing that was measured.

A GPU does a call's arithmetic and its memory traffic side by side, so the longer of the two counts; the host dispatches the next
calls meanwhile. A step therefore lasts at least as long as the device or the host needs, whichever is more. No kernel reaches the
data sheet's rates, least of all small ones: real steps are slower.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from promptmix.cost.work import Work

#: Microseconds between the starts of short kernels when launches overlap, less the kernel itself (NVIDIA's developer blog,
#: "Getting Started with CUDA Graphs", 2019: 3.8 against 2.9 on a V100). What PyTorch does for an operator comes on top.
LAUNCH_US = 0.9
#: The shortest kernel there, in microseconds.
KERNEL_US = 2.9


@dataclass(frozen=True)
class Gpu:
    """A data sheet.

    Attributes:
        name: as its maker says.
        fp32: 10^12 operations a second without tensor cores, which is PyTorch's default for fp32.
        half: dense fp16 or bf16 with sums in fp32 on tensor cores, 10^12 a second.
        bandwidth: 10^9 bytes a second.
        memory_gb: 10^9 bytes.
        source: the data sheet.
    """

    name: str
    fp32: float
    half: float
    bandwidth: float
    memory_gb: float
    source: str


GPUS = {
    "t4": Gpu("NVIDIA T4", 8.1, 65, 320, 16, "NVIDIA T4 datasheet, 2019"),
    "v100": Gpu("NVIDIA V100 SXM2 32 GB", 15.7, 125, 900, 32, "NVIDIA V100 datasheet, 2020"),
    "rtx3090": Gpu("NVIDIA GeForce RTX 3090", 35.6, 71, 936, 24, "NVIDIA Ampere GA102 whitepaper, 2020"),
    "rtx4090": Gpu("NVIDIA GeForce RTX 4090", 82.6, 165.2, 1008, 24, "NVIDIA Ada whitepaper, 2022"),
    "a100": Gpu("NVIDIA A100 SXM 80 GB", 19.5, 312, 2039, 80, "NVIDIA A100 datasheet, 2021"),
    "h100": Gpu("NVIDIA H100 SXM", 67, 989.4, 3350, 80, "NVIDIA H100 datasheet, 2023"),
    "h200": Gpu("NVIDIA H200 SXM", 67, 989.4, 4800, 141, "NVIDIA H200 datasheet, 2024"),
}


@dataclass(frozen=True)
class Bound:
    """What counted work needs on a GPU at the least, in seconds.

    Attributes:
        arithmetic: all calls at the data sheet's rate.
        traffic: all bytes at the data sheet's bandwidth.
        device: the longer of the two, call by call, and no kernel shorter than the shortest.
        host: dispatching and launching.
    """

    arithmetic: float
    traffic: float
    device: float
    host: float

    @property
    def seconds(self) -> float:
        """The least time of a step that the host dispatches operator by operator."""
        return max(self.device, self.host)

    @property
    def limit(self) -> str:
        """What decides: launches, memory traffic or arithmetic."""
        if self.host > self.device:
            return "launches"
        return "memory traffic" if self.traffic > self.arithmetic else "arithmetic"


def bound(work: Work, gpu: Gpu, precision: str, dispatch_us: float) -> Bound:
    """Return the least time of ``work`` on ``gpu``.

    Args:
        work: counted in fp32.
        gpu: its data sheet.
        precision: as ``TRAINER.PREC``; in ``amp`` and ``bf16`` products run on tensor cores, and every tensor is taken to have
            half the bytes.
        dispatch_us: the host's microseconds for an operator.
    """
    rate, share = (gpu.fp32, 1.0) if precision == "fp32" else (gpu.half, 0.5)
    arithmetic = traffic = device = 0.0
    for (kind, _), part in work.sums.items():
        if kind == "view" or not part.calls:
            continue
        compute, move = part.flops / (1e12 * rate), share * part.bytes / (1e9 * gpu.bandwidth)
        arithmetic, traffic = arithmetic + compute, traffic + move
        device += max(compute, move, 1e-6 * KERNEL_US * part.calls)
    host = 1e-6 * (dispatch_us * work.operators + LAUNCH_US * work.launches)
    return Bound(arithmetic, traffic, device, host)
