"""The processes of a cluster as the kernel shows them, and what a Cog server says of itself."""

import contextlib
import http.client
import json
import re
from collections.abc import Mapping
from pathlib import Path

from harness.cluster import Cluster, Server


def state(process: int) -> str:
    """The kernel's letter for it: Z has ended and was not waited for, T is stopped; X where there is none."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "X"


def runs(process: int) -> bool:
    """Whether a process has not ended; a stopped one has not."""
    return state(process) not in "XZ"


def status(process: int) -> str | None:
    """A Cog server's answer to a health check; None if there is none."""
    try:
        port = re.search(r"\0PORT=(\d+)", Path(f"/proc/{process}/environ").read_text())[1]
        return json.loads(Server(int(port), seconds=1).request("GET", "/health-check")[2])["status"]
    except (OSError, http.client.HTTPException, TypeError):  # it has ended, or begins, or stands still
        return None


def works(process: int) -> bool:
    """Whether a Cog server has done its setup."""
    return status(process) in ("READY", "BUSY")


def accepted(cluster: Cluster, name: str, body: Mapping[str, object]) -> bool:
    """Whether a front has accepted a prediction; one that dies or stands still before it answers leaves that open."""
    with contextlib.suppress(OSError, http.client.HTTPException):
        status, _, _ = cluster.request("PUT", f"/predictions/{name}", body, {"Prefer": "respond-async"})
        return status in (200, 202)  # 200: it has ended meanwhile
    return False
