"""Seconds by phase. Knows nothing of what is timed."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Stopwatch:
    """Seconds by phase, added up; waits for the device, so that a phase is charged for the work that it started."""

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = {}
        self.phase: str | None = None  # the one that runs, or ran last
        self._device = device

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Charge what happens inside to `phase`."""
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
