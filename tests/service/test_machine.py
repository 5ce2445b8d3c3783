import os
import sys
from pathlib import Path

import pytest

from service.machine import choose_device, host_memory
from tests.support.processes import finished

MACHINE = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
MIB = 2**20


@pytest.mark.parametrize(
    ("cgroup", "files", "memory"),
    [
        (None, {}, MACHINE),
        ("0::/", {"memory.max": 64 * MIB}, 64 * MIB),  # a container with its own view of cgroups
        ("0::/", {"memory.max": "max"}, MACHINE),
        ("0::/", {"memory.max": 2**62}, MACHINE),  # more than there is
        ("0::/a/b", {"a/b/memory.max": 32 * MIB, "a/memory.max": "max"}, 32 * MIB),
        ("0::/a/b", {"a/b/memory.max": "max", "a/memory.max": 16 * MIB}, 16 * MIB),
        ("0::/a/b", {"a/b/memory.max": 32 * MIB, "memory.max": 8 * MIB}, 8 * MIB),
        ("0::/docker/1", {"memory.max": 64 * MIB}, 64 * MIB),  # named as the host does
        ("0::/../1", {"1/memory.max": 16 * MIB, "memory.max": 64 * MIB}, 64 * MIB),  # outside of what can be seen
        (None, {"memory.max": 64 * MIB}, 64 * MIB),
        ("4:cpu:/a\n3:memory:/a", {"memory/a/memory.limit_in_bytes": 32 * MIB}, 32 * MIB),  # version 1
        ("3:memory:/a", {"memory/memory.limit_in_bytes": 64 * MIB}, 64 * MIB),
        ("3:cpu,memory:/a", {"memory/a/memory.limit_in_bytes": 2**63 - 4096}, MACHINE),  # its "no limit"
        ("3:memory:/a\n0::/b", {"memory/a/memory.limit_in_bytes": 32 * MIB, "b/cgroup.procs": 1}, 32 * MIB),  # both
        ("3:memory:/a:b", {"memory/a:b/memory.limit_in_bytes": 32 * MIB}, 32 * MIB),
        ("nonsense\n\n0::/a", {"a/memory.max": 32 * MIB}, 32 * MIB),
        ("0::/a", {"a/memory.max": 0}, MACHINE),
    ],
)
def test_host_memory_is_the_machines_or_a_smaller_limit_of_its_cgroups(
    tmp_path: Path, cgroup: str | None, files: dict[str, object], memory: int
) -> None:
    proc, cgroups = tmp_path / "proc", tmp_path / "cgroup"
    told = {} if cgroup is None else {proc / "self" / "cgroup": f"{cgroup}\n"}
    for file, content in (told | {cgroups / name: f"{value}\n" for name, value in files.items()}).items():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
    assert host_memory(proc, cgroups) == memory


def test_this_machine_has_memory() -> None:
    assert 0 < host_memory() <= MACHINE


@pytest.mark.parametrize(
    ("built_for", "nvidia", "available", "environ", "device"),
    [
        ("13.0", True, True, {}, "cuda"),
        ("13.0", True, True, {"FLUX_DEV": "somewhere"}, "cuda"),
        (None, False, True, {}, "cuda"),  # another maker's GPU by torch's name for all
        ("13.0", False, False, {}, "cpu"),
        (None, True, False, {}, "cpu"),  # torch without CUDA
        ("13.0", True, False, {"CUDA_VISIBLE_DEVICES": ""}, "cpu"),
        ("13.0", True, False, {"CUDA_VISIBLE_DEVICES": "-1"}, "cpu"),
        ("13.0", True, False, {"CUDA_VISIBLE_DEVICES": "-1,0"}, "cpu"),
        ("13.0", True, False, {"FLUX_DEV": "mini/dev"}, "cpu"),
    ],
)
def test_what_draws(built_for: str | None, nvidia: bool, available: bool, environ: dict[str, str], device: str) -> None:
    assert choose_device(built_for, nvidia=nvidia, available=available, environ=environ) == device


@pytest.mark.parametrize(
    ("built_for", "environ", "says", "silent"),
    [
        ("13.0", {}, "the driver is too old (Linux needs 580 or newer)", "CUDA_VISIBLE_DEVICES, which"),
        ("12.8", {"FLUX_DEV": " "}, "the driver is too old, does not run", "580"),
        ("14.0", {}, "the driver is too old, does not run", "Linux needs"),
        ("13.0", {"CUDA_VISIBLE_DEVICES": "7"}, "CUDA_VISIBLE_DEVICES, which is '7', names no GPU", "\n"),
    ],
)
def test_a_gpu_that_cannot_be_used_is_a_sentence(
    built_for: str, environ: dict[str, str], says: str, silent: str
) -> None:
    with pytest.raises(ValueError, match=r"\.$") as refused:
        choose_device(built_for, nvidia=True, available=False, environ=environ)
    sentence = str(refused.value)
    assert f"torch, built for CUDA {built_for}, cannot use" in sentence
    assert says in sentence
    assert silent not in sentence


# torch's own facts are stated, and where a driver's file lies; everything else is the product.
COMMAND = """
import sys
import torch
from service import machine
torch.version.cuda, torch.cuda.is_available, machine.drawing_device.__defaults__ = "13.0", bool, ([sys.argv.pop(1)],)
try:
    machine.drawing_device()
except ValueError as error:
    sys.exit(str(error))
"""


def test_a_process_on_a_machine_with_an_old_driver_gets_the_sentence(tmp_path: Path) -> None:
    (tmp_path / "nvidiactl").touch()
    done = finished(
        [sys.executable, "-c", COMMAND, tmp_path / "nvidiactl"],
        env={name: it for name, it in os.environ.items() if name not in ("FLUX_DEV", "CUDA_VISIBLE_DEVICES")},
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("This machine has an NVIDIA GPU that torch, built for CUDA 13.0, cannot use.")
    assert done.stderr.count("\n") == 1
