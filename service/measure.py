"""What work took: seconds by phase, and the most memory that was held at once. Knows nothing of the work itself."""

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from service.device_thread import check_cancelled


class Stopwatch:
    """Seconds by phase, added up; waits for the device, so that a phase is charged for the work that it started.

    A request that was cancelled ends where its next phase would begin.
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
        """All of it in a line."""
        phases = ", ".join(f"{phase} {seconds:.1f} s" for phase, seconds in self.seconds.items())
        return f"{sum(self.seconds.values()):.1f} s ({phases})"


class PeakMemory:
    """The most memory that was held at once since this was made.

    Args:
        device: whose memory is counted beside that of the process, where it has its own.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        with suppress(OSError):  # where Linux keeps no such record, the peak is that of the process's whole life
            Path("/proc/self/clear_refs").write_text("5")
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def bytes(self) -> dict[str, int]:
        """Of the host, resident, and of the GPU, where there is one, in tensors."""
        peak = {"host": _resident()}
        return peak | ({"gpu": torch.cuda.max_memory_allocated(self._device)} if self._device.type == "cuda" else {})


def _resident() -> int:
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
