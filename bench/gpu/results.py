"""The file of results: a line of JSON for each, written and synced before the next one is measured.

Each line says what it was measured on, so that lines of several runs can be read together and a run that was cut loses
nothing but what it had not measured yet.
"""

import json
import os
import platform
import subprocess
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from settings import ROOT

PACKAGES = ("torch", "triton", "diffusers", "transformers", "peft", "huggingface_hub", "safetensors")


@dataclass(frozen=True)
class Results:
    """Where results go.

    Args:
        path: the file, which is appended to.
        device: what is measured.
        common: what every line says of the run.
    """

    path: Path
    device: torch.device
    common: dict[str, object]

    def __post_init__(self) -> None:
        """Begin a line of its own: a run that was killed may have left half of one."""
        with self.path.open("a+b") as file:
            file.seek(0)
            before = file.read()
            if before and not before.endswith(b"\n"):
                file.write(b"\n")

    def add(self, stage: str, name: str, values: dict[str, object]) -> None:
        """Append a line, and have it on the disk before this returns."""
        now = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "clocks": clocks(self.device)}
        line = {"stage": stage, "name": name} | values | now | self.common
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())


def describe(device: torch.device, commit: str | None, command: str) -> dict[str, object]:
    """What every line says: device, versions, commit and command."""
    properties = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    return {
        "device": properties.name if properties else "CPU",
        "memory_bytes": properties.total_memory if properties else None,
        "versions": {"python": platform.python_version(), "cuda": torch.version.cuda, "driver": _driver(device)}
        | {name: _version(name) for name in PACKAGES},
        "commit": commit or _commit(),
        "command": command,
    }


def clocks(device: torch.device) -> dict[str, float]:
    """MHz, watts and degrees of the GPU, now; nothing where NVIDIA's Python library (nvidia-ml-py) is not there."""
    if device.type != "cuda":
        return {}
    try:
        return {
            "sm_mhz": torch.cuda.clock_rate(device),
            "watts": torch.cuda.power_draw(device) / 1000,
            "celsius": torch.cuda.temperature(device),
        }
    except Exception:  # says so in many ways, and is no reason to measure nothing
        return {}


def _driver(device: torch.device) -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return next(iter(_output(command).split()), None) if device.type == "cuda" else None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit that is measured, with a plus where files differ from it."""
    commit = _output(["git", "-C", str(ROOT), "rev-parse", "HEAD"]).strip()
    changed = _output(["git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no"]).strip()
    return f"{commit}{'+' if changed else ''}" or None


def _output(command: list[str]) -> str:
    """What a command prints; nothing where it is not there or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
