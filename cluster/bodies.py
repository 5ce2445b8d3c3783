"""Bodies of requests: limited while they are received, each and in sum, and parsed in threads.

This module knows HTTP's bodies and multipart; it knows nothing of what a body asks for.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass, field
from io import BytesIO
from typing import TypeVar

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, MultipartState, parse_options_header
from starlette.requests import Request

from cluster.predictions import QueueFull
from settings import GIB, MIB

# The most that one front holds of bodies and of waiting inputs; the last quarter is for small bodies.
HELD_BYTES = GIB
SMALL_BYTES = MIB
# The slowest pace at which a client may send a body, which takes memory meanwhile.
PACE_BYTES, PACE_SECONDS = MIB // 4, 30
# A form has a file, a description of it, and little else.
MAX_PARTS = 8
NO_FORM = "The body must be a form, multipart/form-data, "

T = TypeVar("T")

# Errors in a form are for its client.
logging.getLogger("python_multipart").setLevel(logging.ERROR)


class Unread(Exception):  # noqa: N818 (an answer, not an accident)
    """A body that is not read to its end: a status of HTTP, a title and a sentence."""

    def __init__(self, status: int, title: str, detail: str) -> None:
        super().__init__(detail)
        self.status, self.title, self.detail = status, title, detail


@dataclass(eq=False)
class Bodies:
    """Reads the bodies of one front."""

    limit: int  # the largest body, in bytes
    waiting: Callable[[], int]  # the bytes of memory of the inputs of unfinished predictions
    held: int = field(default=0, init=False)  # the bytes of bodies that are being read
    # For large bodies: parsing one holds the GIL for tenths of a second, two at once for twice as long.
    one_at_a_time: asyncio.Lock = field(default_factory=asyncio.Lock, init=False)
    # Not asyncio's, which may all wait for slow files.
    threads: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(2, "bodies"), init=False)

    @asynccontextmanager
    async def read(self, request: Request, parse: Callable[[bytes], T]) -> AsyncIterator[T]:
        """A body as `parse`, called in a thread, returns it; within the context the body counts as held.

        Unread is raised where it is too large or comes too slowly, QueueFull where there is no room for it, and
        whatever `parse` raises.
        """
        content = BytesIO()
        try:
            await self._receive(request, content)
            async with self.one_at_a_time if content.tell() > SMALL_BYTES else nullcontext():
                parsed = await asyncio.get_running_loop().run_in_executor(self.threads, parse, content.getvalue())
            content.truncate(0)  # frees the memory; the position, which is the body's size, stays
            yield parsed
        finally:
            self.held -= content.tell()

    async def _receive(self, request: Request, content: BytesIO) -> None:
        loop, mark = asyncio.get_running_loop(), 0
        too_large = Unread(413, "Body too large", f"The body is larger than {self.limit / MIB:g} MiB, the limit here.")
        if int(request.headers.get("content-length", 0)) > self.limit:
            raise too_large
        try:
            async with asyncio.timeout(PACE_SECONDS) as patience:
                async for chunk in request.stream():
                    size = content.tell() + len(chunk)
                    if size > self.limit:
                        raise too_large
                    if size >= mark:
                        mark = size + PACE_BYTES
                        patience.reschedule(loop.time() + PACE_SECONDS)
                    room = HELD_BYTES if size <= SMALL_BYTES else HELD_BYTES * 3 // 4
                    if self.held + len(chunk) + self.waiting() > room:
                        raise QueueFull("Too many large requests wait. Try again later.")
                    self.held += content.write(chunk)
        except TimeoutError:
            detail = f"The body did not come: less than {PACE_BYTES >> 10} KiB of it in {PACE_SECONDS} seconds."
            raise Unread(408, "Body too slow", detail) from None


@dataclass
class Part:
    """A part of a form."""

    headers: dict[bytes, bytes]
    content: bytes = b""

    def option(self, name: bytes) -> str | None:
        """The name of the part or of its file, as its Content-Disposition has it."""
        _, options = parse_options_header(self.headers.get(b"content-disposition"))
        return options[name].decode(errors="replace") if name in options else None


def read_form(content: bytes, content_type: str) -> dict[str, Part]:
    """The parts of a multipart form by name; a ValueError is a sentence."""
    kind, options = parse_options_header(content_type)
    boundary = options.get(b"boundary")
    if kind != b"multipart/form-data" or not boundary:
        raise ValueError(f"{NO_FORM}with the boundary in its Content-Type, which is {content_type[:80]!r}.")
    # Each boundary takes the parser long, even a false one.
    if content.count(b"--" + boundary) > MAX_PARTS + 1:
        raise ValueError(f"{NO_FORM}of at most {MAX_PARTS} parts; it has more.")
    parts, name = [], b""

    def header_name(data: bytes, start: int, end: int) -> None:
        nonlocal name
        name = data[start:end].lower()

    def header_value(data: bytes, start: int, end: int) -> None:
        parts[-1].headers[name] = data[start:end]

    def body(data: bytes, start: int, end: int) -> None:
        parts[-1].content += data[start:end]

    callbacks = {"on_header_field": header_name, "on_header_value": header_value, "on_part_data": body}
    try:
        parser = MultipartParser(boundary, {"on_part_begin": lambda: parts.append(Part({})), **callbacks})
        parser.write(content)  # in one piece, so that header_name and header_value get whole ones
    except FormParserError as error:
        raise ValueError(f"{NO_FORM}and is none: {error}.") from None
    if parser.state is not MultipartState.END:
        raise ValueError(f"{NO_FORM}and ends before its last boundary.")
    return {part.option(b"name") or "": part for part in parts}
