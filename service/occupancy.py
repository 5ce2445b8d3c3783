"""A lock on a file that shows the process that supervises Cog's server whether the predictor has a prediction.

Cog 0.23.1 can lose its only slot without calling the predictor, as with an id that cannot name a folder: it is busy for
ever, and `GET /health-check` answers as during a long prediction. So the predictor holds a lock on a file during each
prediction, and touches the file when one begins. The kernel releases the lock when the process ends, however it ends.
The file lies in TMPDIR, which a supervised server has to itself. This module knows locks and files.
"""

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

PREFIX = "flux-sprites-occupancy-"


class Occupancy:
    """Shows other processes whether this one has a prediction."""

    def __init__(self) -> None:
        self._file = tempfile.NamedTemporaryFile(prefix=PREFIX)  # noqa: SIM115 (deleted when this process ends)

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Show a prediction while the block runs; several threads may be in such blocks.

        Each block opens and locks the file for itself: whatever interrupts it, between any two bytecodes, the file is
        closed once nothing refers to it, which releases the lock.
        """
        with ExitStack() as stack:
            with suppress(OSError):  # out of memory or descriptors: the prediction matters more than its lock
                file = stack.enter_context(Path(self._file.name).open("rb"))
                fcntl.flock(file, fcntl.LOCK_SH)
                os.utime(file.fileno())
            yield


class Look:
    """Looks from another process, in the predictor's TMPDIR, whether it has a prediction."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._touched: dict[Path, int] = {}

    def idle(self) -> bool:
        """Whether the predictor has no prediction and got none since the last look; False if it has no such file."""
        before, self._touched = self._touched, {}
        with suppress(OSError):  # the file is locked, or gone with its process
            for path in self._folder.glob(f"{PREFIX}*"):
                with path.open("rb") as file:
                    self._touched[path] = os.fstat(file.fileno()).st_mtime_ns
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises during a prediction
            return bool(before) and self._touched == before
        return False
