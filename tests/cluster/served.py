"""An application behind uvicorn and a front's connections, and a client that sends bytes as they are."""

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Iterator

import uvicorn
import uvloop
from starlette.types import ASGIApp

from cluster.connections import UVICORN
from harness.waiting import wait_until
from local_cog.server import LOOPBACK, listen


@contextlib.contextmanager
def served(application: ASGIApp) -> Iterator[int]:
    """Serve an application as a front is served; the port."""
    with listen(LOOPBACK, 0) as listening:
        server = uvicorn.Server(uvicorn.Config(application, **UVICORN))

        def run() -> None:
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:  # as Ray Serve's replicas do
                runner.run(server.serve([listening]))

        thread = threading.Thread(target=run)
        thread.start()
        wait_until(lambda: server.started)
        try:
            yield listening.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join(60)
            assert not thread.is_alive()


def exchange(port: int, *pieces: bytes, pause: float = 0, seconds: float = 30) -> bytes:
    """All that comes until the server closes, which must be soon, for pieces sent with pauses between them."""
    with socket.create_connection((LOOPBACK, port), timeout=seconds) as connection:
        with contextlib.suppress(ConnectionError):
            for piece in pieces:
                connection.sendall(piece)
                time.sleep(pause)
        return received(connection)


def received(connection: socket.socket) -> bytes:
    """All that comes until the server closes."""
    content = bytearray()
    with contextlib.suppress(ConnectionResetError):
        while piece := connection.recv(65536):
            content += piece
    return bytes(content)
