"""`script/cluster` for tests and benchmarks, which start it, send it requests, and kill parts of it."""

import contextlib
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

from cluster.local import descendants, environment
from harness.hosts import Host, _Handler
from harness.waiting import wait_until
from local_cog.server import LOOPBACK, free_port
from settings import ROOT

ENDS = ("succeeded", "failed", "canceled")
UPDATE = """
import json, sys
import ray
from ray import serve
from cluster.application import APPLICATION, Arguments, application
ray.init(sys.argv[1])
serve.run(application(Arguments(**json.loads(sys.argv[2]))), name=APPLICATION, route_prefix=None)
"""


class Server:
    """A client of one port of this machine; `seconds` is its timeout."""

    def __init__(self, port: int, headers: Mapping[str, str] | None = None, seconds: float = 60) -> None:
        self.port, self.headers, self.seconds = port, dict(headers or {}), seconds
        self.url = f"http://{LOOPBACK}:{port}"

    def request(
        self, method: str, path: str, body: object = None, headers: Mapping[str, str] | None = None
    ) -> tuple[int, dict[str, str], str]:
        """Status, headers and text of the answer; a body that is no text is sent as JSON."""
        connection = http.client.HTTPConnection(LOOPBACK, self.port, timeout=self.seconds)
        sent = {**self.headers, **(headers or {})}
        if body is not None and not isinstance(body, str | bytes):
            body, sent = json.dumps(body), {"Content-Type": "application/json", **sent}
        try:
            connection.request(method, path, body, sent)
            answer = connection.getresponse()
            return answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read().decode()
        finally:
            connection.close()

    def predict(self, inputs: Mapping[str, Any], prediction_id: str, **fields: object) -> dict[str, Any]:
        """Start a prediction without waiting for it."""
        body = {"input": inputs, **fields}
        status, _, text = self.request("PUT", f"/predictions/{prediction_id}", body, {"Prefer": "respond-async"})
        assert status == 202, text
        return json.loads(text)


class Cluster(Server):
    """`script/cluster`, with any options; a context manager.

    Args:
        options: of the command line, without the port.
        environment: variables added to those of this process; webhooks may go to this machine, where `Hooks` listens.
        token: sent with every request.
        log: the file of its output.
    """

    def __init__(
        self, *options: str, environment: Mapping[str, str], log: Path, token: str = "", port: int | None = None
    ) -> None:
        super().__init__(port or free_port(), {"Authorization": f"Bearer {token}"} if token else None)
        self.command = [sys.executable, "-P", "-m", "cluster.local", "--port", str(self.port), *options]
        always = {"PYTHONPATH": str(ROOT), "WEBHOOKS_ALLOW_PRIVATE_HOSTS": "1"}
        self.environment, self.log = {**os.environ, **always, **environment}, log

    def __enter__(self) -> Self:
        """Start it, and wait until it answers."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command, env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        try:
            self.wait_until_ready()
        except BaseException:  # also SystemExit and KeyboardInterrupt
            self.__exit__()
            raise
        return self

    def wait_until_ready(self, seconds: float = 240) -> None:
        """Wait until its log says so.

        Raises:
            RuntimeError: it has ended, or is not ready in time.
        """
        with contextlib.suppress(TimeoutError):
            wait_until(lambda: self.process.poll() is not None or self._ready(), seconds, pause=0.2)
        if not self._ready():
            raise RuntimeError(f"The cluster did not start: {self.log.read_text()[-3000:]}")

    def _ready(self) -> bool:
        return "Ready: " in self.log.read_text()

    def __exit__(self, *_: object) -> None:
        """Stop it; kill it if it does not end."""
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.kill()

    @property
    def metrics_url(self) -> str:
        """The URL of the head node's metrics for Prometheus."""
        return self.log.read_text().partition("Metrics: ")[2].partition("\n")[0]

    def processes(self, title: str, below: int | None = None) -> list[int]:
        """The ids of the cluster's processes, or of those below one of them, with this title in their command line."""
        found = []
        for process in sorted(descendants(below or self.process.pid)):
            with contextlib.suppress(OSError):
                if title in Path(f"/proc/{process}/cmdline").read_text():
                    found.append(process)
        return found

    def update(self, **arguments: object) -> None:
        """Deploy the application again, with these arguments: every worker and every front is replaced.

        The cluster's RAY_AUTH_TOKEN must be in `environment`.
        """
        raylet = Path(f"/proc/{self.wait_for('raylet/raylet')[0]}/cmdline").read_text()
        address = re.search(r"gcs-address=([\d.:]+)", raylet).group(1)
        command = [sys.executable, "-c", UPDATE, address, json.dumps({**arguments, "port": self.port})]
        joining = {**self.environment, **environment()}
        subprocess.run(command, env=joining, cwd=ROOT, check=True, timeout=240, capture_output=True)

    def wait_for(self, title: str, count: int = 1, *, below: int | None = None, seconds: float = 120) -> list[int]:
        """`processes`, once there are at least `count`.

        Raises:
            TimeoutError: there are fewer.
        """
        return wait_until(
            lambda: len(found := self.processes(title, below)) >= count and found,
            seconds,
            pause=0.1,
            state=lambda: f"{title!r} is too rare among {self.processes('', below)}",
        )

    def kill_one(self, title: str) -> None:
        """Kill the youngest process of a title, after waiting for one if there is none."""
        os.kill(self.wait_for(title)[-1], signal.SIGKILL)

    def kill(self) -> None:
        """Kill all processes at once, like a power failure."""
        for process in [self.process.pid, *descendants(self.process.pid)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        self.process.wait()


class Hooks:
    """A receiver of webhooks: every delivery with its headers, in order; a context manager.

    Args:
        seconds: until it answers a webhook that is not about an end.
    """

    def __init__(self, seconds: float = 0) -> None:
        self.seconds = seconds

    def __enter__(self) -> Self:
        """Listen."""
        self.received: list[tuple[Mapping[str, str], dict[str, Any]]] = []
        self._host = Host({"/hook": self._take}).__enter__()
        self.url = self._host.url("/hook")
        return self

    def _take(self, handler: _Handler) -> None:
        body = json.loads(handler.form)
        if body["status"] not in ENDS:
            time.sleep(self.seconds)
        self.received.append((handler.headers, body))
        handler.reply(200, headers={"Connection": "close"})

    def __exit__(self, *_: object) -> None:
        """Listen no more."""
        self._host.__exit__()

    def until_ended(self, prediction_id: str, seconds: float = 30) -> list[dict[str, Any]]:
        """The bodies about a prediction, up to its end.

        Raises:
            TimeoutError: it has not ended.
        """
        self.until(lambda body: body["id"] == prediction_id and body["status"] in ENDS, seconds)
        said = [body for _, body in list(self.received) if body["id"] == prediction_id]
        (end, *_) = (index for index, body in enumerate(said) if body["status"] in ENDS)
        return said[: end + 1]

    def until(self, awaited: Callable[[dict[str, Any]], bool], seconds: float = 30) -> None:
        """Wait until a body has come that `awaited` accepts.

        Raises:
            TimeoutError: none has come.
        """
        wait_until(lambda: any(awaited(body) for _, body in list(self.received)), seconds, state=lambda: self.received)
