"""A sign that the predictor has a prediction, for the process that supervises Cog's server.

Cog 0.23.1 can lose its only slot without asking the predictor, as with an id that cannot name a folder: it is busy for
ever, and `GET /health-check` tells that from a long prediction by nothing. So the predictor holds a lock on a file for
as long as it has a prediction, and touches the file whenever one comes. The kernel releases the lock when the process
ends, however it ends. The file is temporary: it lies in TMPDIR, which is the server's own where somebody supervises it.
This module knows locks, and nothing of Cog or of what a prediction does.
"""

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

PREFIX = "flux-sprites-occupancy-"


class Occupancy:
    """Shows, from now on, whether this process has a prediction."""

    def __init__(self) -> None:
        self._file = tempfile.NamedTemporaryFile(prefix=PREFIX)  # noqa: SIM115 (deleted when this process ends)

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Show it while the block runs; blocks of several threads add up.

        Each block locks an open file of its own: whatever interrupts it, and between whichever two bytecodes, the file
        is closed once nothing refers to it, and the lock is gone.
        """
        with ExitStack() as stack:
            with suppress(OSError):  # out of memory or descriptors: the prediction matters more than its sign
                file = stack.enter_context(Path(self._file.name).open("rb"))
                fcntl.flock(file, fcntl.LOCK_SH)
                os.utime(file.fileno())
            yield


class Look:
    """Looks from another process whether a predictor has a prediction.

    Args:
        folder: the predictor's TMPDIR.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._touched: dict[Path, int] = {}

    def idle(self) -> bool:
        """Whether the predictor has no prediction and got none since the last look; False if it does not show that."""
        before, self._touched = self._touched, {}
        with suppress(OSError):  # it ends just now
            for path in self._folder.glob(f"{PREFIX}*"):
                with path.open("rb") as file:
                    self._touched[path] = os.fstat(file.fileno()).st_mtime_ns
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises while anybody holds the other lock
            return bool(before) and self._touched == before
        return False
