"""A client's connection, with bounds where uvicorn has none: it reads headers of any size, and waits without end.

This module knows uvicorn's protocol for httptools; it knows nothing of requests that have come whole.
"""

import asyncio
import resource
from typing import Any, ClassVar

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from cluster.settings import DRAIN_SECONDS
from settings import GIB

# A request line and its headers, and whatever else must come whole before it is passed on.
HEAD_BYTES = 64 * 1024
# How long a client may take for a request's headers, counted from the connection's start or the request's first byte;
# for the rest of a body that nobody reads any more; and for receiving each PACE_BYTES of an answer.
PATIENCE_SECONDS = 30
PACE_BYTES = 64 * 1024
# How much of their answers the clients that are waited for may leave unreceived together. Beyond that, those are given
# up that have been waited for longest.
UNSENT_BYTES = GIB // 4
# Each chunk of a body costs as much as a hundred bytes; so beyond a number of them they must not be small.
FREE_CHUNKS, CHUNK_BYTES = 1000, 64
# Requests that are sent before an earlier one is answered wait in memory.
MAX_PIPELINED = 16


class _Transport:
    """A transport that does nothing once it is closed; uvloop's raises then, until uvicorn hears of it."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 (the transport's)
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        if not self._transport.is_closing():
            self._transport.write(data)

    def pause_reading(self) -> None:
        if not self._transport.is_closing():
            self._transport.pause_reading()

    def resume_reading(self) -> None:
        if not self._transport.is_closing():
            self._transport.resume_reading()


class Connection(HttpToolsProtocol):
    """uvicorn's, which a client cannot make hold or wait for what has no end."""

    # Of the headers that have come whole, and of what has not come whole, in bytes.
    head_size = unparsed = 0
    # Whether the body of the latest request is still coming; how many bytes of it have come, and in how many chunks.
    in_body = False
    body_size = chunks = 0
    deadline: asyncio.TimerHandle | None = None
    sending: asyncio.TimerHandle | None = None
    # Those that are written no further until their clients have received, the longest wait first, each with how many
    # bytes waited at the latest look.
    unsent: ClassVar[dict["Connection", int]] = {}

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Wait for the first request."""
        self.received: list[bytes] = []
        super().connection_made(_Transport(transport))
        self._wait()

    def connection_lost(self, error: Exception | None) -> None:
        """Wait no more."""
        self._wait_no_more()
        self._forget_unsent()
        super().connection_lost(error)

    def data_received(self, data: bytes) -> None:
        """Parse what has come; refuse what has no end."""
        self.unparsed += len(data)
        super().data_received(data)
        self._pass_on()
        if self.transport.is_closing():
            return
        if self.unparsed > HEAD_BYTES:
            self.send_400_response("")
        # uvicorn has stopped waiting for the next request, and what came may not have been one: an empty line, or the
        # rest of a body that was refused.
        elif self._answered() and self.deadline is None and self.timeout_keep_alive_task is None:
            self._wait()

    def on_message_begin(self) -> None:
        """A request begins."""
        super().on_message_begin()
        if len(self.pipeline) >= MAX_PIPELINED:
            raise ValueError("Too many requests are sent before an answer.")
        self.head_size = 0
        self._wait()

    def on_url(self, url: bytes) -> None:
        """A part of the target has come."""
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header has come, or one that follows a body."""
        self.unparsed = 0
        self._count(len(name) + len(value) + len(": \r\n"))
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """From here on the reader of the body waits for it."""
        self.unparsed, self.in_body = 0, True
        self.body_size = self.chunks = 0
        self._wait_no_more()
        super().on_headers_complete()
        if self.parser.should_upgrade():
            self.cycle.keep_alive = False  # what follows is taken for another protocol, and read no more

    def on_body(self, body: bytes) -> None:
        """A part of the body has come."""
        self.unparsed = 0
        self.body_size += len(body)
        self.received.append(body)

    def on_chunk_header(self) -> None:
        """A chunk of the body begins."""
        self.chunks += 1
        if self._has_small_chunks():
            raise ValueError("The chunks are too small.")

    def _has_small_chunks(self) -> bool:
        return self.chunks > FREE_CHUNKS and self.body_size < CHUNK_BYTES * (self.chunks - 1)

    def _pass_on(self) -> None:
        """Give what has come of the body to its reader: at once, since uvicorn copies all that waits for each piece."""
        if self.received:
            body = b"".join(self.received)
            self.received.clear()
            super().on_body(body)

    def on_message_complete(self) -> None:
        """A request has come whole."""
        self.unparsed, self.in_body = 0, False
        self._wait_no_more()
        self._pass_on()
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """A request has been answered, perhaps before its body had come."""
        super().on_response_complete()
        if self.in_body and self._answered():
            self._wait()

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP, or too large, and close."""
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

    def _watch_unsent(self) -> None:
        self.unsent[self] = size = self.transport.get_write_buffer_size()
        self.sending = self.loop.call_later(PATIENCE_SECONDS, self._check_sent, size)

    def _check_sent(self, before: int) -> None:
        if self.transport.get_write_buffer_size() > before - PACE_BYTES:
            self._give_up()
        else:
            self._watch_unsent()

    def _give_up(self) -> None:
        self._forget_unsent()
        self.transport.abort()

    def _forget_unsent(self) -> None:
        self.unsent.pop(self, None)
        if self.sending is not None:
            self.sending.cancel()

    def _answered(self) -> bool:
        return self.cycle is not None and self.cycle.response_complete

    def _count(self, size: int) -> None:
        self.head_size += size
        if self.head_size > HEAD_BYTES:
            raise ValueError("The headers are too large.")

    def _wait(self) -> None:
        self._wait_no_more()
        self.deadline = self.loop.call_later(PATIENCE_SECONDS, self.transport.abort)

    def _wait_no_more(self) -> None:
        if self.deadline is not None:
            self.deadline.cancel()
            self.deadline = None


# How a front's server is configured.
UVICORN = {
    "http": Connection,
    "lifespan": "off",
    "ws": "none",
    "proxy_headers": False,
    # Longer than load balancers hold an idle connection, Google's 600 s: it must not be closed under a request.
    "timeout_keep_alive": 620,
    # A client that vanished without closing its connection would be waited for without end.
    "timeout_graceful_shutdown": DRAIN_SECONDS // 2,
    "log_config": None,
    "log_level": "error",  # not a line for each request that is none
    "access_log": False,
}


def allow_many_connections() -> None:
    """Let this process have as many connections as the system lets it: the usual limit is some thousand files."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
