"""A store on a disk: files by their content, within a budget, shared by any number of processes.

Locks are the kernel's (flock): a killed process leaves none behind. A file is locked shared while it is written or
used, a note exclusively while it is written, and only what is not locked is deleted.
"""

import contextlib
import fcntl
import hashlib
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, TextIO
from uuid import uuid4

from settings import GIB, MIB
from sources.contents import Reserve, UnfitError
from sources.shown import gigabytes

# Seconds that a note is kept after its last use; each signed URL leaves one.
NOTES_KEPT = 30 * 24 * 3600
# Bytes that all notes together may take. Most have a few hundred; those with a config in them may have 200 KB.
NOTES_BYTES, SHORT_NOTE = 256 * MIB, 4096


@contextmanager
def disk_errors_told() -> Iterator[None]:
    """Turn errors of the cache's disk into sentences."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"The cache of weights cannot be used: {error.strerror or 'its disk fails'}.") from error


class Store:
    """Files named by the SHA-256 of their content, complete on the disk before they get that name.

    In `folder`, `loras` holds the files, `incoming` those being written, `references` the notes, and `open` an empty
    file for each content that may be given to anybody who knows its hash. All files together may take `budget` bytes,
    one file `largest`.
    """

    def __init__(self, folder: Path, budget: int, largest: int) -> None:
        self._budget, self._largest, self._lock = budget, largest, folder / "lock"
        folders = [folder / name for name in ("loras", "incoming", "references", "open")]
        self._files, self._incoming, self._notes, self._granted = folders
        for made in folders:
            made.mkdir(parents=True, exist_ok=True)

    def path(self, sha256: str) -> Path:
        """The path of the file with that content, whether it is there or not."""
        return self._files / f"{sha256}.safetensors"

    def open(self, sha256: str | None) -> BinaryIO | None:
        """The file of that content, which is not evicted while it is open; None where it is not there."""
        if sha256 is None:
            return None
        try:
            file = self.path(sha256).open("rb")
        except FileNotFoundError:
            return None
        fcntl.flock(file, fcntl.LOCK_SH)
        if not os.fstat(file.fileno()).st_nlink:  # evicted meanwhile
            file.close()
            return None
        os.utime(file.fileno())
        return file

    def grant(self, sha256: str | None) -> None:
        """Let `open_granted` give the file of that content to anybody who knows its hash."""
        if sha256 is not None:
            (self._granted / sha256).touch()

    def open_granted(self, sha256: str | None) -> BinaryIO | None:
        """The file of that content; None where it is not there, or was not granted."""
        if sha256 is not None:
            with contextlib.suppress(FileNotFoundError):
                os.utime(self._granted / sha256)
                return self.open(sha256)
        return None

    @contextmanager
    def incoming(self, name: str) -> Iterator[tuple[BinaryIO, Reserve]]:
        """A new file, locked, that is deleted afterwards unless it was kept; and a function to reserve space for it."""
        with self._alone():
            self._sweep()
            file = (self._incoming / uuid4().hex).open("xb+", buffering=0)
            fcntl.flock(file, fcntl.LOCK_SH)
        try:
            with file:
                yield file, self._reserving(file, name)
        finally:
            Path(file.name).unlink(missing_ok=True)

    def keep(self, file: BinaryIO, sha256: str) -> BinaryIO:
        """The file of that name, locked: the incoming file, unless another of the same content is there already."""
        kept = self.open(sha256)
        if kept is None:
            os.fsync(file.fileno())
            Path(file.name).rename(self.path(sha256))
            _sync_folder(self._files)  # writes the new name to the disk
            # Cannot have been evicted: `file` is still locked.
            kept = self.open(sha256)
        return kept

    @contextmanager
    def note(self, name: str, pause: Callable[[float], None]) -> Iterator[TextIO]:
        """The note of a name, empty at first, to be read and written by one thread of one process at a time.

        While another has it, `pause` is called with seconds to wait; it raises once the caller has given up.
        """
        path = self._notes / hashlib.sha256(name.encode()).hexdigest()
        while True:
            with path.open("a+") as file:
                while not _lock(file):
                    pause(0.02)
                before = os.fstat(file.fileno())
                if before.st_nlink == 0:  # deleted while we waited
                    continue
                file.seek(0)
                yield file
                file.flush()
                os.utime(path)
                if os.fstat(file.fileno()).st_size > before.st_size + SHORT_NOTE:
                    with self._alone():
                        self._sweep()
                return

    def admit(self, size: int, name: str) -> None:
        """Raise `UnfitError`, a sentence with `name`, if a file may not be that large."""
        if size > self._largest:
            raise UnfitError(
                f"{name} has {gigabytes(size)} or more; a LoRA may have {gigabytes(self._largest)} (LORA_MAX_GB)."
            )

    def _reserving(self, file: BinaryIO, name: str) -> Reserve:
        reserved = 0

        def reserve(size: int) -> None:
            nonlocal reserved
            self.admit(size, name)
            if size > reserved:
                with self._alone():
                    # Where the host states no size, a few megabytes at a time.
                    size = size if reserved == 0 else max(size, reserved + 4 * MIB)
                    self._make_room(size - reserved, name)
                    try:
                        os.posix_fallocate(file.fileno(), 0, size)
                    except OSError as error:
                        raise UnfitError(f"{name} finds no room in the cache: {error.strerror}.") from error
                    reserved = size

        return reserve

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Only one process at a time creates and deletes files, which takes a moment."""
        with self._lock.open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _sweep(self) -> None:
        """Delete the unfinished files of killed processes, and notes that are old or too many."""
        for file in self._incoming.iterdir():
            _delete_unless_held(file)
        notes = sorted((*_last_use(note), note) for note in (*self._notes.iterdir(), *self._granted.iterdir()))
        taken = sum(size for _, size, _ in notes)
        for used, size, note in notes:
            if (used < time.time() - NOTES_KEPT or taken > NOTES_BYTES) and _delete_unless_held(note):
                taken -= size

    def _make_room(self, needed: int, name: str) -> None:
        """Delete the least recently used files until `needed` bytes fit; `UnfitError` if they cannot."""
        budget, spare = self._budget, min(GIB, shutil.disk_usage(self._files).total // 20)
        files = sorted((*_last_use(file), file) for file in self._files.iterdir())
        used = sum(size for _, size, _ in files) + sum(_last_use(file)[1] for file in self._incoming.iterdir())
        while files and (used + needed > budget or shutil.disk_usage(self._files).free - needed < spare):
            _, size, file = files.pop(0)
            if _delete_unless_held(file):
                used -= size
        free = shutil.disk_usage(self._files).free
        if used + needed > budget:
            short = f"the cache may have {gigabytes(budget)} (WEIGHTS_CACHE_GB), of which {gigabytes(used)} are in use"
        elif free - needed < spare:
            short = f"the disk of the cache has {gigabytes(free)} left, of which {gigabytes(spare)} stay free"
        else:
            return
        raise UnfitError(f"{name} needs {gigabytes(needed)}, but {short}.")


def _lock(file: TextIO | BinaryIO) -> bool:
    """Take the exclusive lock on a file, unless another process or thread has a lock on it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False


def _delete_unless_held(path: Path) -> bool:
    with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
        if not _lock(file):
            return False
        path.unlink()
    return True


def _last_use(path: Path) -> tuple[float, int]:
    """When a file was last used, in seconds since the epoch, and its size."""
    try:
        state = path.stat()
    except FileNotFoundError:  # renamed or deleted since it was listed
        return math.inf, 0
    return state.st_mtime, state.st_size


def _sync_folder(path: Path) -> None:
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
