"""A client's connection, with bounds where uvicorn has none: it reads headers of any size, and waits for ever.

This module knows uvicorn's protocol for httptools; it knows nothing of complete requests.
"""

import asyncio
import math
import resource
from typing import Any, ClassVar

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from cluster.settings import DRAIN_SECONDS
from settings import GIB

# For a request line with its headers, and for any other piece that the parser must have whole.
HEAD_BYTES = 64 * 1024
# How long a client may take to send a request's headers, counted from the connection's start or the request's first
# byte; to send the rest of a body that is no longer read; and to receive each PACE_BYTES of an answer.
PATIENCE_SECONDS = 30
PACE_BYTES = 64 * 1024
# How many bytes of answers may wait in memory for slow clients, all together. Beyond, the connections that have waited
# longest are closed.
UNSENT_BYTES = GIB // 4
# Each chunk of a body costs as much as a hundred bytes: beyond this number of them, they must not be small on average.
FREE_CHUNKS, CHUNK_BYTES = 1000, 64
# Requests that are sent before an earlier one is answered wait in memory.
MAX_PIPELINED = 16
# A transport's methods that raise in uvloop once it is closed, which uvicorn learns a little later.
_RAISING = ("write", "pause_reading", "resume_reading")


class _Transport:
    """A transport whose methods do nothing once it is closed."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 (the transport's)
        if name in _RAISING and self._transport.is_closing():
            return lambda *_: None
        return getattr(self._transport, name)


class Connection(HttpToolsProtocol):
    """uvicorn's connection, with bounds on memory and time."""

    # How many bytes of the present request's headers have been parsed, and how many bytes are not parsed yet.
    head_size = unparsed = 0
    # Whether the body of the latest request is still coming; how many bytes of it have come, and in how many chunks.
    in_body = False
    body_size = chunks = 0
    deadline: asyncio.TimerHandle | None = None
    sending: asyncio.TimerHandle | None = None
    # The connections whose clients must receive before more is written, the longest wait first; each with the number of
    # bytes that waited when that was last checked.
    unsent: ClassVar[dict["Connection", int]] = {}

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Wait for the first request."""
        self.received: list[bytes] = []
        super().connection_made(_Transport(transport))
        self._start_timer()

    def connection_lost(self, error: Exception | None) -> None:
        """Cancel the timers."""
        self._stop_timer()
        self._forget_unsent()
        super().connection_lost(error)

    def data_received(self, data: bytes) -> None:
        """Parse the data; refuse headers without end."""
        self.unparsed += len(data)
        super().data_received(data)
        self._pass_on()
        if self.transport.is_closing():
            return
        if self.unparsed > HEAD_BYTES:
            self.send_400_response("")
        # Any data ends uvicorn's waiting for the next request, also an empty line or the rest of a refused body.
        elif self._answered() and self.deadline is None and self.timeout_keep_alive_task is None:
            self._start_timer()

    def on_message_begin(self) -> None:
        """A request begins."""
        super().on_message_begin()
        if len(self.pipeline) >= MAX_PIPELINED:
            raise ValueError("Too many requests are sent before an answer.")
        self.head_size = 0
        self._start_timer()

    def on_url(self, url: bytes) -> None:
        """Count a part of the target."""
        self._count_head(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Count a header, or one that follows a body."""
        self.unparsed = 0
        self._count_head(len(name) + len(value) + len(": \r\n"))
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """The body begins; its reader bounds how long it may take."""
        self.unparsed, self.in_body = 0, True
        self.body_size = self.chunks = 0
        self._stop_timer()
        super().on_headers_complete()
        if self.parser.should_upgrade():
            self.cycle.keep_alive = False  # the parser takes what follows for another protocol

    def on_body(self, body: bytes) -> None:
        """Keep a part of the body until all data is parsed."""
        self.unparsed = 0
        self.body_size += len(body)
        self.received.append(body)

    def on_chunk_header(self) -> None:
        """Count a chunk of the body."""
        self.chunks += 1
        if self._has_small_chunks():
            raise ValueError("The chunks are too small.")

    def _has_small_chunks(self) -> bool:
        return self.chunks > FREE_CHUNKS and self.body_size < CHUNK_BYTES * (self.chunks - 1)

    def _pass_on(self) -> None:
        """Give the new parts of the body to its reader, joined: for each part uvicorn copies all that wait."""
        if self.received:
            body = b"".join(self.received)
            self.received.clear()
            super().on_body(body)

    def on_message_complete(self) -> None:
        """A request is complete."""
        self.unparsed, self.in_body = 0, False
        self._stop_timer()
        self._pass_on()
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """A request is answered, perhaps before its body is complete."""
        super().on_response_complete()
        if self.in_body and self._answered():
            self._start_timer()

    def send_400_response(self, msg: str) -> None:
        """Answer invalid HTTP, or a head or chunks beyond the bounds, and close."""
        status = 400
        if max(self.head_size, self.unparsed) > HEAD_BYTES:
            status, msg = 431, f"A request line and its headers may have {HEAD_BYTES} bytes together."
        elif self._has_small_chunks():
            msg = f"The {self.chunks} chunks of the body are too small: they must have {CHUNK_BYTES} bytes on average."
        answering = self.cycle is not None and self.cycle.response_started and not self.cycle.response_complete
        if not (answering or self.pipeline):
            head = f"content-type: text/plain\r\ncontent-length: {len(msg)}\r\nconnection: close\r\n\r\n"
            self.transport.write(STATUS_LINE[status] + (head + msg).encode())
        self.transport.close()

    def pause_writing(self) -> None:
        """The client must receive some of the answer before it gets more."""
        super().pause_writing()
        self._watch_unsent()
        if sum(self.unsent.values()) > UNSENT_BYTES:
            self.unsent.update({one: one.transport.get_write_buffer_size() for one in self.unsent})
        while sum(self.unsent.values()) > UNSENT_BYTES:
            next(iter(self.unsent))._give_up()

    def resume_writing(self) -> None:
        """The client has received enough."""
        super().resume_writing()
        self._forget_unsent()

    def _watch_unsent(self, before: float = math.inf) -> None:
        """Close the connection if its client has received less than PACE_BYTES since before; else check again later."""
        size = self.transport.get_write_buffer_size()
        if size > before - PACE_BYTES:
            self._give_up()
        else:
            self.unsent[self] = size
            self.sending = self.loop.call_later(PATIENCE_SECONDS, self._watch_unsent, size)

    def _give_up(self) -> None:
        self._forget_unsent()
        self.transport.abort()

    def _forget_unsent(self) -> None:
        self.unsent.pop(self, None)
        if self.sending is not None:
            self.sending.cancel()

    def _answered(self) -> bool:
        return self.cycle is not None and self.cycle.response_complete

    def _count_head(self, size: int) -> None:
        self.head_size += size
        if self.head_size > HEAD_BYTES:
            raise ValueError("The headers are too large.")

    def _start_timer(self) -> None:
        self._stop_timer()
        self.deadline = self.loop.call_later(PATIENCE_SECONDS, self.transport.abort)

    def _stop_timer(self) -> None:
        if self.deadline is not None:
            self.deadline.cancel()
            self.deadline = None


UVICORN = {
    "http": Connection,
    "lifespan": "off",
    "ws": "none",
    "proxy_headers": False,
    # Longer than load balancers keep idle connections (Google's: 600 s), which could send a request just then.
    "timeout_keep_alive": 620,
    # Otherwise uvicorn would wait for ever for a client that vanished without closing its connection.
    "timeout_graceful_shutdown": DRAIN_SECONDS // 2,
    "log_config": None,
    "log_level": "error",  # no line for each invalid request
    "access_log": False,
}


def allow_many_connections() -> None:
    """Raise this process's limit of open files, usually some thousand, to the most that the system allows."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
