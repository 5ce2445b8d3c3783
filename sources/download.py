"""A download into an open file: in parallel where the host honours ranges, and resumed where a connection breaks."""

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http import HTTPStatus

from tqdm import tqdm

from settings import MIB
from sources.client import CHUNK, Stream, UnavailableError
from sources.connections import CONNECTIONS

# tqdm's own lock is shared with forked processes: one that is killed while drawing would block all others.
tqdm.set_lock(threading.RLock())

# Large enough for a request's round trip not to matter, small enough for all connections to end together.
SMALLEST_PIECE, LARGEST_PIECE = 8 * MIB, 64 * MIB
# The range that is compared with the first answer, to see whether the host honours ranges.
PROBE = slice(1024, 2048)
OVERLAP = 1024  # bytes that are compared where a broken connection is resumed


@dataclass
class _Piece:
    """A part of the file that one connection fetches."""

    start: int
    end: int | None  # None: the end of the answer
    position: int  # of the next byte to be written
    done: bool = False


class Download:
    """The download of one file, in several threads.

    Args:
        first: the open answer to a request for the whole file.
        file: the descriptor of the file to be written.
        reserve: called with a number of bytes before the file grows to it; raises if the disk has no room for them.
    """

    def __init__(self, first: Stream, file: int, reserve: Callable[[int], None]) -> None:
        self._client, self._source, self._url = first.client, first.source, first.url
        self._first, self._file, self._reserve = first, file, reserve
        etag = first.headers.get("ETag", "W/")
        self._unless_changed = {} if etag.startswith("W/") else {"If-Range": etag}
        self._parallel = False
        self._pieces: list[_Piece] = []
        self._received = 0
        self._error: BaseException | None = None
        self._changed = threading.Condition()

    def run(self, on_bytes: Callable[[bytes], None]) -> int:
        """The size of the file, in bytes, once all of it is written.

        Args:
            on_bytes: gets the content in order while the rest arrives; an error that it raises ends the download.

        Raises:
            UnavailableError: the connection broke at each attempt.
            ValueError: the host refuses, or the file changed meanwhile.
        """
        if self._first.size is not None:
            self._reserve(self._first.size)
        self._parallel = self._honours_ranges()
        self._pieces = self._cut()
        waiting = iter(self._pieces)
        options = {"unit": "B", "unit_scale": True, "unit_divisor": 1024, "delay": 1, "mininterval": 1, "leave": False}
        with (
            tqdm(desc=self._source.name, total=self._first.size, **options) as bar,
            ThreadPoolExecutor(CONNECTIONS if self._parallel else 1, "download") as pool,
        ):
            for index in range(min(CONNECTIONS, len(self._pieces))):
                pool.submit(self._work, waiting, self._first if index == 0 else None)
            try:
                return self._follow(on_bytes, bar)
            except BaseException as error:
                self._fail(error)
                raise

    def _honours_ranges(self) -> bool:
        """Whether a range has the same bytes as the first answer: some hosts say 206 and send the file's beginning."""
        if (self._first.size or 0) < 2 * SMALLEST_PIECE or self._first.headers.get("Accept-Ranges") == "none":
            return False
        known = self._first.peek(PROBE.stop)[PROBE]
        try:
            with self._open_range(PROBE.start, PROBE.stop) as stream:
                return self._is_range(stream, PROBE.start, PROBE.stop) and stream.peek(len(known)) == known
        except ValueError:
            return False

    def _cut(self) -> list[_Piece]:
        size = self._first.size
        if size is None or not self._parallel:
            return [_Piece(0, size, 0)]
        length = min(max(SMALLEST_PIECE, size // (4 * CONNECTIONS)), LARGEST_PIECE)
        return [_Piece(start, min(start + length, size), start) for start in range(0, size, length)]

    def _work(self, waiting: Iterator[_Piece], stream: Stream | None) -> None:
        """Fetch pieces until none is waiting; a stream is kept for the next piece if that follows."""
        try:
            while self._error is None:
                with self._changed:
                    piece = next(waiting, None)
                if piece is None:
                    break
                stream = self._fetch(piece, stream)
        except Exception as error:
            self._fail(error)
        finally:
            if stream is not None:
                stream.close()

    def _fetch(self, piece: _Piece, stream: Stream | None) -> Stream:
        def attempt() -> Stream:
            nonlocal stream
            if stream is not None and stream.position != piece.position:  # another piece's, or it broke off
                stream.close()
                stream = None
            stream = stream or self._open_at(piece)
            try:
                self._copy(stream, piece)
            except UnavailableError:
                stream.close()
                stream = None
                raise
            return stream

        return self._client.persist(attempt)

    def _copy(self, stream: Stream, piece: _Piece) -> None:
        while not piece.done and self._error is None:
            data = stream.read(CHUNK if piece.end is None else min(CHUNK, piece.end - piece.position))
            if piece.end is None and data:
                self._reserve(piece.position + len(data))
            os.pwrite(self._file, data, piece.position)
            with self._changed:
                piece.position += len(data)
                piece.done = piece.position == piece.end or not data
                self._received += len(data)
                self._changed.notify_all()

    def _open_at(self, piece: _Piece) -> Stream:
        """A stream at the position where a piece broke off; the bytes before it must be those on the disk."""
        start = max(piece.start, piece.position - OVERLAP)
        stream = self._open_range(start, piece.end) if start > 0 else self._client.open(self._source)
        whole = stream.status == HTTPStatus.OK and stream.size == self._first.size and not self._parallel
        if not whole and not self._is_range(stream, start, piece.end):
            stream.close()
            raise self._different()
        while stream.position < piece.position:
            data = stream.read(min(CHUNK, piece.position - stream.position))
            if not data or data != os.pread(self._file, len(data), stream.position - len(data)):
                stream.close()
                raise self._different()
        return stream

    def _open_range(self, start: int, end: int | None) -> Stream:
        wanted = {"Range": f"bytes={start}-{'' if end is None else end - 1}", **self._unless_changed}
        try:
            return self._client.open(self._source, wanted, self._url)
        except UnavailableError:
            raise
        except ValueError:
            # The address that the host redirected to may have expired.
            stream = self._client.open(self._source, wanted)
            self._url = stream.url
            return stream

    def _is_range(self, stream: Stream, start: int, end: int | None) -> bool:
        stated = (stream.status, stream.position, stream.size)
        return stated == (206, start, self._first.size or stream.size) and end in (None, stream.end)

    def _different(self) -> ValueError:
        return ValueError(f"{self._source.name} changed while it was being downloaded; try again.")

    def _follow(self, on_bytes: Callable[[bytes], None], bar: tqdm) -> int:
        """Pass the content on in order as it arrives, draw the bar, and return the size."""
        position = 0
        for piece in self._pieces:
            while not (piece.done and position == piece.position):
                with self._changed:
                    self._changed.wait_for(lambda: self._error or piece.done or self._received > bar.n)  # noqa: B023
                    reached, received = piece.position, self._received
                if self._error is not None:
                    raise self._error
                bar.update(received - bar.n)
                while position < reached:
                    data = os.pread(self._file, min(CHUNK, reached - position), position)
                    on_bytes(data)
                    position += len(data)
        return position

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            self._error = self._error or error
            self._changed.notify_all()
        self._client.disconnect()
