"""LoRAs that lie on this machine, as Flux takes them: tests and benchmarks draw with these, and fetch nothing."""

import hashlib
from pathlib import Path

from request import LoraFile, Request


def files(request: Request) -> list[LoraFile]:
    """The files of a request whose references are their paths."""
    paths = [Path(choice.reference) for choice in request.loras]
    return [LoraFile(path, hashlib.sha256(path.read_bytes()).hexdigest(), path.name) for path in paths]
