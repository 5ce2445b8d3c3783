"""What machine this is: how much host memory it has, and which device draws."""

import contextlib
import os
from pathlib import Path


def host_memory() -> int:
    """Bytes of host memory: the machine's or, where it has less, the container's."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
        memory = min(memory, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return memory
