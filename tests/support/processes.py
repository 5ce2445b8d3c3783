"""Commands that tests run to their end."""

import subprocess
from collections.abc import Sequence
from pathlib import Path

from settings import ROOT


def finished(
    command: Sequence[str | Path],
    *,
    cwd: Path | None = ROOT,
    timeout: float = 120,
    check: bool = False,
    **options: object,
) -> subprocess.CompletedProcess[str]:
    """What a command has printed and how it has ended; it runs in the repository unless it is told where."""
    return subprocess.run(command, cwd=cwd, timeout=timeout, check=check, capture_output=True, text=True, **options)
