"""The file of results: a line of JSON for each row, written and synced before the next row is measured.

Each line holds the device, versions and commit, so that lines of several runs can be read together, and a run that is
cut keeps all that it measured.
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
    """The file of results.

    Args:
        path: lines are appended to it.
        device: its clocks are added to each line.
        common: values of the run, added to each line.
    """

    path: Path
    device: torch.device
    common: dict[str, object]

    def __post_init__(self) -> None:
        """Begin a new line: a run that was killed may have left half of one."""
        with self.path.open("a+b") as file:
            file.seek(0)
            before = file.read()
            if before and not before.endswith(b"\n"):
                file.write(b"\n")

    def add(self, stage: str, name: str, values: dict[str, object]) -> None:
        """Append a line and sync it to the disk."""
        now = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "clocks": clocks(self.device)}
        line = {"stage": stage, "name": name} | values | now | self.common
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())


def describe(device: torch.device, commit: str | None, command: str) -> dict[str, object]:
    """Device, versions, commit and command, for every line."""
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
    """MHz, watts and degrees of the GPU now; nothing without NVIDIA's Python library (nvidia-ml-py)."""
    if device.type != "cuda":
        return {}
    try:
        return {
            "sm_mhz": torch.cuda.clock_rate(device),
            "watts": torch.cuda.power_draw(device) / 1000,
            "celsius": torch.cuda.temperature(device),
        }
    except Exception:  # the library fails in many ways; measure all the same
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
    """The commit, with a plus if files differ from it."""
    commit = _output(["git", "-C", str(ROOT), "rev-parse", "HEAD"]).strip()
    changed = _output(["git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no"]).strip()
    return f"{commit}{'+' if changed else ''}" or None


def _output(command: list[str]) -> str:
    """The output of a command; nothing if it is missing or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
