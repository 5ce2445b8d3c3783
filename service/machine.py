"""This machine: how much host memory it has, and which device draws."""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# NVIDIA's driver makes the first of these on Linux, the second under WSL. /dev/dxg is there for a GPU of any maker.
NVIDIA_FILES = ("/dev/nvidiactl", "/usr/lib/wsl/lib/libcuda.so.1")
# The first driver for Linux that runs CUDA 13.
CUDA_13_DRIVER = 580


def host_memory(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes of host memory: the machine's or, where that is less, the limit of this process's cgroups."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([machine, *_limits(proc, cgroups)])


def _limits(proc: Path, cgroups: Path) -> Iterator[int]:
    """The limits of this process's cgroups and of all above them, of both versions; "max" is none."""
    for hierarchy, file in ((cgroups, "memory.max"), (cgroups / "memory", "memory.limit_in_bytes")):
        for folder in _cgroup(proc, hierarchy, version_2=file == "memory.max"):
            with suppress(OSError, ValueError):
                if (limit := int((folder / file).read_text())) > 0:
                    yield limit


def _cgroup(proc: Path, hierarchy: Path, *, version_2: bool) -> list[Path]:
    """The folder of this process's cgroup in a hierarchy, and those above it.

    In a container, /proc may name the cgroup as the host does, while its folder is the root: then only the root exists.
    """
    text = ""
    with suppress(OSError):
        text = (proc / "self" / "cgroup").read_text(errors="surrogateescape")
    for number, controllers, path in re.findall(r"^(\d+):([^:\n]*):(.*)$", text, re.MULTILINE):
        if (number == "0") if version_2 else ("memory" in controllers.split(",")):
            own = PurePosixPath(path.lstrip("/"))
            # "/.." leads out of the part that this process sees.
            return [hierarchy / it for it in (own, *own.parents) if ".." not in it.parts]
    return [hierarchy]


def drawing_device(nvidia_files: Sequence[str] = NVIDIA_FILES) -> "torch.device":
    """The device that draws on this machine, see `choose_device`."""
    import torch  # here, since it is slow to import and host_memory does not need it

    nvidia = any(Path(file).exists() for file in nvidia_files)
    return torch.device(choose_device(torch.version.cuda, nvidia=nvidia, available=torch.cuda.is_available()))


def choose_device(
    built_for: str | None, *, nvidia: bool, available: bool, environ: Mapping[str, str] = os.environ
) -> str:
    """The device that draws, "cuda" or "cpu"; a ValueError where a GPU cannot be used and the CPU was not asked for.

    torch is `built_for` a version of CUDA, such as "13.0"; `nvidia`: the system shows such a GPU; `available`: torch
    can use it. CUDA_VISIBLE_DEVICES, empty or beginning with -1, asks for the CPU; with FLUX_DEV, either will do.
    """
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    hidden = visible is not None and visible.partition(",")[0].strip() in ("", "-1")
    if available:
        return "cuda"
    if built_for is None or not nvidia or hidden or environ.get("FLUX_DEV", "").strip():
        return "cpu"
    needs = f" (Linux needs {CUDA_13_DRIVER} or newer)" if built_for.startswith("13.") else ""
    named = "" if visible is None else f"CUDA_VISIBLE_DEVICES, which is {visible!r}, names no GPU that is there, or "
    raise ValueError(
        f"This machine has an NVIDIA GPU that torch, built for CUDA {built_for}, cannot use. Most likely {named}the "
        f"driver is too old{needs}, does not run, or is not let into this container; nvidia-smi tells its version. "
        f"Update the driver, or set CUDA_VISIBLE_DEVICES= (empty) to draw with the miniature on the CPU."
    )
