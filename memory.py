"""The most memory that a stretch of work held at once. Knows nothing of the work."""

import resource
from contextlib import suppress
from pathlib import Path

import torch


class PeakMemory:
    """Counts from when it is made.

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
