"""Folders for the files of predictions, and their deletion; knows what Cog leaves too, and nothing of pictures."""

import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from queue import SimpleQueue
from uuid import uuid4

# Cog reads the files of a prediction as soon as `predict` has returned, and does not say when it is done.
SECONDS_KEPT = 10
# Cog never deletes the three empty folders of each prediction. When they are this old, the prediction has ended.
COG_FOLDERS = Path("/tmp/coglet/predictions")
SECONDS_RUNNING = 3600
SECONDS_BETWEEN_SWEEPS = 600


class Leftovers:
    """Folders for the files of predictions, each deleted `kept` seconds after its prediction."""

    def __init__(self, kept: float = SECONDS_KEPT) -> None:
        self._kept = kept
        self._root = tempfile.TemporaryDirectory(prefix="flux-sprites-", ignore_cleanup_errors=True)
        self._left: SimpleQueue[tuple[Path, float]] = SimpleQueue()
        threading.Thread(target=self._delete, name="leftovers", daemon=True).start()

    def place(self) -> Path:
        """A path at which a folder for one prediction may be made; what is left there is deleted with this process."""
        return Path(self._root.name) / uuid4().hex

    @contextmanager
    def folder(self) -> Iterator[Path]:
        """A folder for the files of one prediction; deleted some seconds after the block, also after an error."""
        folder = self.place()
        try:
            folder.mkdir()
            yield folder
        finally:
            self._left.put((folder, time.monotonic()))

    def _delete(self) -> None:
        swept = float("-inf")
        while True:
            folder, left = self._left.get()
            time.sleep(max(0, left + self._kept - time.monotonic()))
            shutil.rmtree(folder, ignore_errors=True)
            if time.monotonic() > swept + SECONDS_BETWEEN_SWEEPS:
                sweep(COG_FOLDERS, SECONDS_RUNNING)
                swept = time.monotonic()


def sweep(predictions: Path, age: float) -> None:
    """Delete the empty folders of predictions that have not changed for so many seconds."""
    for folder in predictions.glob("*"):
        with suppress(OSError):  # not empty, or deleted by another server
            if time.time() - folder.stat().st_mtime > age:
                for empty in (folder / "inputs", folder / "outputs", folder):
                    empty.rmdir()
