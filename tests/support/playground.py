"""The page's server, in this process or in its own, and its address."""

import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from harness.waiting import wait_until
from local_cog.server import LOOPBACK, free_port, url
from playground import server as pages
from playground.server import Playground
from playground.target import Target
from settings import ROOT


@contextmanager
def served(target: str) -> Iterator[Playground]:
    """The page's server before a target; at the end it checks that all connections and their threads have ended."""
    with Playground(0, Target(target)) as server:
        serving = threading.Thread(target=server.serve_forever, args=[0.02])
        serving.start()
        try:
            yield server
        finally:
            server.shutdown()
            serving.join()
            assert all(server.room.acquire(timeout=30) for _ in range(pages.MOST_CONNECTIONS))


def address_of(server: Playground) -> str:
    """The page's address."""
    return f"{url(LOOPBACK, server.port)}/playground/"


@contextmanager
def playground(*options: str, log: Path, environment: Mapping[str, str]) -> Iterator[str]:
    """The page's address while `script/playground` runs; the page answers already."""
    command = [sys.executable, "-m", "playground.server", "--port", str(free_port()), *options]
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=file
        )
    try:
        wait_until(lambda: "Ready: http" in log.read_text(errors="replace") or process.poll() is not None, 60)
        assert process.poll() is None, log.read_text(errors="replace")
        yield re.search(r"Ready: (\S+)", log.read_text(errors="replace"))[1]
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def own_address() -> str:
    """An address of this machine that is not loopback; skips the test if there is none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        try:
            asking.connect(("192.0.2.1", 9))  # sends nothing
        except OSError:
            pytest.skip("this machine has no address but loopback's")
        return asking.getsockname()[0]
