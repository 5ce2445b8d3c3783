"""Triton's kernels without a GPU: interpreted in their own process, or compiled for absent GPUs."""

import importlib.util
import os
import re
import sys
from pathlib import Path

import pytest

from tests.support.processes import finished

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs Triton, which torch brings along where there is CUDA"
)


def interpreted(script: str) -> str:
    """The output of a script in a new process with Triton's interpreter, which must be set before the import."""
    run = finished(
        [sys.executable, "-c", script],
        env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        timeout=240,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout


def resources(cubin: bytes, folder: Path) -> dict[str, int]:
    """A compiled kernel's use for each thread: REG registers, and STACK and LOCAL bytes outside of registers."""
    import triton

    file = folder / "kernel.cubin"
    file.write_bytes(cubin)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    command = [tool, "--dump-resource-usage", file]
    used = finished(command, check=True, cwd=None).stdout
    return {name: int(re.search(rf"{name}:(\d+)", used)[1]) for name in ("REG", "STACK", "LOCAL")}
