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
    """A finished command's output and exit code; it runs in the repository by default."""
    return subprocess.run(command, cwd=cwd, timeout=timeout, check=check, capture_output=True, text=True, **options)
