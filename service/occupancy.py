"""A sign that the predictor has a prediction, for the process that supervises Cog's server.

Cog 0.23.1 can lose its only slot without asking the predictor, as with an id that cannot name a folder: it is busy for
ever, and `GET /health-check` tells that from a long prediction by nothing. So the predictor holds a lock on a file for
as long as it has a prediction, and touches the file whenever one comes. The kernel releases the lock when the process
ends, however it ends. The file is temporary: it lies in TMPDIR, which is the server's own where somebody supervises it.
This module knows locks; of Cog it knows what Cog does with a prediction's inputs in the predictor's process.
"""

import fcntl
import functools
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

PREFIX = "flux-sprites-occupancy-"


class Occupancy:
    """Shows, from now on, whether this process has a prediction."""

    def __init__(self) -> None:
        self._file = tempfile.NamedTemporaryFile(prefix=PREFIX)  # noqa: SIM115 (deleted when this process ends)
        self._count_inputs()

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

    def _count_inputs(self) -> None:
        """Cog reads `image` and `mask`, and fetches them, in this process, before it asks the predictor: count that.

        Where it cannot fetch one, its error, which Cog logs, would tell the whole address.
        """
        from cog.types import Path as Sent  # the supervising process has no use for Cog
        from cog.types import URLPath

        Sent.validate = staticmethod(self._counted(Sent.validate))
        fetch = self._counted(URLPath.convert)

        def convert(url: URLPath) -> Sent:
            try:
                return fetch(url)
            except Exception as error:
                raise ValueError(f"A file that the request names cannot be fetched ({_why(error)}).") from None

        URLPath.convert = convert

    def _counted(self, work: Callable[..., T]) -> Callable[..., T]:
        @functools.wraps(work)
        def counted(*arguments: object) -> T:
            with self.shown():
                return work(*arguments)

        return counted


def _why(error: Exception) -> str:
    """An error of a download without the address."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return type(error).__name__ if status is None else f"its host answered {status}"


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
