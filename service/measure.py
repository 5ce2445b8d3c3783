"""Seconds by phase, and the peak of memory. Knows nothing of the work that is measured."""

import re
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from service.device_thread import check_cancelled


class Stopwatch:
    """Seconds by phase, added up; waits for the device, so that each phase is charged for the work that it started.

    A cancelled request ends where its next phase would begin.
    """

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = {}
        self.phase: str | None = None  # the one that runs, or ran last
        self._device = device

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Charge what happens inside to `phase`."""
        check_cancelled()
        self.phase = phase
        start = time.perf_counter()
        try:
            yield
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start

    def __str__(self) -> str:
        """The sum, and each phase, in one line."""
        phases = ", ".join(f"{phase} {seconds:.1f} s" for phase, seconds in self.seconds.items())
        return f"{sum(self.seconds.values()):.1f} s ({phases})"


class PeakMemory:
    """The most memory held at once since this object was made: of the process, and of the device if that is a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        with suppress(OSError):  # without this file of Linux, the peak is that of the process's whole life
            Path("/proc/self/clear_refs").write_text("5")
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def bytes(self) -> dict[str, int]:
        """The process's resident memory as "host", and what tensors took of the GPU as "gpu", where there is one."""
        kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with suppress(OSError):
            if found := re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text()):
                kilobytes = int(found[1])
        gpu = {"gpu": torch.cuda.max_memory_allocated(self._device)} if self._device.type == "cuda" else {}
        return {"host": kilobytes * 1024} | gpu
