"""The real Cog server on this machine: start it, speak HTTP with it, stop it with everything it started.

This module knows Cog's HTTP; it does not know what the predictor does.
"""

import argparse
import contextlib
import errno
import http.client
import ipaddress
import json
import math
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, Self

from local_cog import schema
from service.data_uri import decode, suffix
from service.lines import printable
from service.occupancy import Look
from settings import ROOT

LOOPBACK = "127.0.0.1"
# A prediction's id becomes part of paths, URLs and headers; with other ids Cog's server may lose its slot.
PREDICTION_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.~-]{0,127}")
# The range from which the kernel hands out ports, and our lowest port: Ray's workers have those below.
KERNELS_PORTS = Path("/proc/sys/net/ipv4/ip_local_port_range")
LOWEST_PORT = 20_000
# Cog takes bodies up to 100 MiB, and base64 makes four bytes of three.
MAX_FILE_BYTES = 70_000_000
# Cog warns that BasePredictor has become BaseRunner, which older command-line tools do not know.
QUIET = "ignore:BasePredictor is deprecated:DeprecationWarning,ignore:Predictor.predict():DeprecationWarning"
# How often `script/serve` asks for the server's health, and how long a healthy server may take to answer.
SECONDS_BETWEEN_CHECKS = 5
SECONDS_FOR_HEALTH = 10
# How long a server may be silent while it starts, which keeps the machine busy.
SECONDS_FOR_FIRST_HEALTH = 60
# So many looks in a row at a busy server with an idle predictor mean that its slot is lost: about 50 seconds.
LOOKS_AT_A_LOST_SLOT = 9
# How long to repeat a request while the only slot is taken: Cog frees it just after it has answered, and a cancelled
# prediction at its next step.
SECONDS_FOR_SLOT = 5
# The longest line that is handed on in one piece.
LINE_BYTES = 2**20
# Longer than a cancelled prediction needs; a worker inside native code reacts to SIGKILL alone.
SECONDS_TO_STOP = 5

Show = Callable[[str, Mapping[str, Any]], None]


def past_proxies(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables that keep requests to this machine, such as Cog's webhooks, away from the operator's proxy."""
    names = environ.get("no_proxy") or environ.get("NO_PROXY") or ""
    directly = names if names.strip() == "*" else ",".join(filter(None, (names, LOOPBACK, "localhost", "::1")))
    return dict.fromkeys(("no_proxy", "NO_PROXY"), directly)


class CogServer:
    """Cog's server for one project, in a process group of its own; a context manager that starts and stops it.

    Its `environment` is added to this process's; None leaves a variable out. What the server and the predictor print
    goes to `log`: to a file, or to a function that a thread calls with each line's text and its record in Cog's log
    (empty for other lines); None prints it here. Without a `port`, it takes a free one.
    """

    def __init__(
        self,
        project: Path = ROOT,
        *,
        environment: Mapping[str, str | None] | None = None,
        log: Path | Show | None = None,
        host: str = LOOPBACK,
        port: int | None = None,
    ) -> None:
        self.project, self.log, self.host = project, log, host
        self.port = port or free_port()
        given = {**os.environ, **(environment or {})}
        given = {name: value for name, value in given.items() if value is not None}
        self.environment = {
            "PYTHONWARNINGS": QUIET,
            **given,
            **past_proxies(given),
            # Cog starts its worker by the bare name `python`.
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
            "COG_PREDICT_TYPE_STUB": "predict.py:Predictor",
            "PORT": str(self.port),
        }

    def __enter__(self) -> Self:
        """Write the schema that the server validates by, and start the server, which is not ready yet."""
        schema.write(self.project)
        # Temporary files of predictions would outlive a worker that is killed.
        self.scratch = tempfile.TemporaryDirectory(prefix="flux-sprites-server-", ignore_cleanup_errors=True)
        with self._open_log() as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "cog.server.http", "--host", _bracketed(self.host)],
                cwd=self.project,
                env=self.environment | {"TMPDIR": self.scratch.name},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        # If this process is killed, __exit__ does not run, and the server and its worker would keep the GPU. A shell
        # waits for the end of a pipe from this process, which the kernel closes, and then kills them.
        end = 'read -r _; kill -s KILL -- "-$0"; rm -rf -- "$1"'  # every shell knows this form of kill
        self.keeper = subprocess.Popen(
            ["sh", "-c", end, str(self.process.pid), self.scratch.name],
            env={"PATH": os.environ.get("PATH", os.defpath)},  # to find `rm`; other variables may be secrets
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        return self

    def __exit__(self, *_: object) -> None:
        """Stop the server and its worker; Cog alone would finish a prediction first."""
        self._signal(signal.SIGTERM)
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(SECONDS_TO_STOP)
        finally:
            self._signal(signal.SIGKILL)
            self.process.wait()
            with self.keeper:
                self.keeper.kill()
            self.scratch.cleanup()
            if self.reader:
                self.reader.join(SECONDS_TO_STOP)

    def _open_log(self) -> contextlib.AbstractContextManager[IO[bytes] | None]:
        self.reader = None
        match self.log:
            case None:
                return contextlib.nullcontext()
            case Path():
                return self.log.open("wb")
        reading, writing = os.pipe()
        self.reader = threading.Thread(target=_hand_on, args=[os.fdopen(reading, "rb"), self.log], daemon=True)
        self.reader.start()
        return os.fdopen(writing, "wb")

    def wait_until_ready(self, seconds: float = 600) -> None:
        """Wait for the predictor's setup; a RuntimeError says in a sentence why it did not succeed."""
        give_up, silent = time.monotonic() + seconds, 0
        while time.monotonic() < give_up:
            if self.process.poll() is not None:
                raise RuntimeError(f"The server ended with code {self.process.returncode} before it was ready.")
            try:
                health = self.health()
            except TimeoutError:  # its process is stopped or hangs
                silent += SECONDS_FOR_HEALTH
                if silent >= SECONDS_FOR_FIRST_HEALTH:
                    raise RuntimeError(f"The server has not answered for {silent} seconds.") from None
                continue
            except OSError:  # it is not there yet
                health = {"status": "STARTING"}
            silent = 0
            match health["status"]:
                case "READY" | "BUSY":
                    return
                case "SETUP_FAILED":
                    reason = re.sub(r"^.*[Ss]etup failed: (\w+Error: )?", "", health["setup"]["logs"], flags=re.DOTALL)
                    raise RuntimeError(f"The predictor's setup failed: {reason}")
            if fault := _fault(health):
                raise RuntimeError(fault)
            time.sleep(0.1)
        raise RuntimeError(f"The server was not ready within {seconds:g} seconds.")

    def health(self) -> dict[str, Any]:
        """Cog's answer, with a `status` of STARTING, READY, BUSY, SETUP_FAILED, UNHEALTHY or DEFUNCT; see `request`."""
        return self.request("GET", "/health-check", seconds=SECONDS_FOR_HEALTH)[1]

    def schema(self) -> dict[str, Any]:
        """The OpenAPI document, once the server is ready."""
        return self.request("GET", "/openapi.json")[1]

    def predict(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Cog's answer to a prediction: `status`, `output`, `logs`, `metrics`, `error`; if refused, only `detail`."""
        answer = self._ask("POST", "/predictions", inputs)
        # Cog frees its slot just after it has answered: wait, so that the next request finds it free, but not for
        # long, because another prediction may have taken it.
        settled = time.monotonic() + 0.5
        with contextlib.suppress(OSError):  # the server has just ended, and the answer is there
            while self.health()["status"] == "BUSY" and time.monotonic() < settled:
                time.sleep(0.01)
        return answer

    def start(self, inputs: Mapping[str, Any], prediction_id: str) -> dict[str, Any]:
        """Start a prediction and return at once."""
        return self._ask("PUT", f"/predictions/{prediction_id}", inputs, {"Prefer": "respond-async"})

    def cancel(self, prediction_id: str) -> int:
        """Cancel a prediction; returns the HTTP status, 404 if there is no such prediction."""
        return self.request("POST", f"/predictions/{prediction_id}/cancel")[0]

    def request(
        self,
        method: str,
        path: str,
        body: object = None,
        headers: Mapping[str, str] | None = None,
        seconds: float | None = None,
    ) -> tuple[int, dict[str, Any]]:
        """The status and the JSON of an answer, asked for past any proxy; plain text comes back as `detail`.

        An OSError means that the server does not answer; a TimeoutError, that it is silent for so many seconds.
        """
        host = {"0.0.0.0": LOOPBACK, "::": "::1"}.get(self.host, self.host)
        content = None if body is None else json.dumps(body)
        try:
            with contextlib.closing(http.client.HTTPConnection(host, self.port, timeout=seconds)) as connection:
                connection.request(method, path, content, {"Content-Type": "application/json", **(headers or {})})
                answer = connection.getresponse()
                text = answer.read().decode()
        except (http.client.HTTPException, BrokenPipeError, ConnectionResetError) as error:
            raise ConnectionError("The server broke off the connection.") from error
        try:
            return answer.status, json.loads(text)
        except ValueError:
            return answer.status, {"detail": text}

    def _ask(self, method: str, path: str, inputs: object, headers: Mapping[str, str] | None = None) -> dict[str, Any]:
        """Request a prediction, and again while the one before it has the slot."""
        body, give_up = {"input": inputs}, time.monotonic() + SECONDS_FOR_SLOT
        while (exchange := self.request(method, path, body, headers))[0] == 409 and time.monotonic() < give_up:
            time.sleep(0.01)
        return exchange[1]

    def _signal(self, number: int) -> None:
        """Signal the server and its worker: their process group exists while one of them does."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)


def _hand_on(lines: IO[bytes], show: Show) -> None:
    """Call `show` with each line, until all processes that may print have ended."""
    with lines:
        while line := lines.readline(LINE_BYTES):
            try:
                record = json.loads(line)
                fields = record["fields"]
                text = ": ".join(str(fields[name]) for name in ("message", "error") if name in fields)
            except (ValueError, LookupError, TypeError, RecursionError):  # printed past the log, as by a crash
                text, record = line.decode(errors="replace"), {}
            show(text.rstrip().lstrip("\r\n"), record)


def failure(answer: Mapping[str, Any]) -> str | None:
    """Why a prediction failed, in one sentence without Cog's prefixes; None if it succeeded."""
    if answer.get("status") == "succeeded":
        return None
    if answer.get("status") == "canceled":
        return "The prediction was cancelled."
    detail = answer.get("error") or answer.get("detail") or "The server gave no reason."
    if isinstance(detail, list):  # 422: one entry for each input
        return "; ".join(f"{problem['loc'][-1]}: {problem['msg']}" for problem in detail)
    return re.sub(r"^(Prediction failed: )*(\w+Error: )?", "", detail)


def files(answer: Mapping[str, Any]) -> list[tuple[str, bytes]]:
    """The files of a prediction's output, each with its suffix, such as `.webp`."""
    return [(suffix(kind), content) for kind, content in map(decode, answer["output"])]


def free_port() -> int:
    """A port of this machine on which nothing listens."""
    # Outgoing connections get ports of the kernel's range, one of which a slow server may then lack: stay below it.
    below = range(0)
    with contextlib.suppress(OSError):  # no /proc
        below = range(LOWEST_PORT, int(KERNELS_PORTS.read_text().split()[0]))
    for _ in range(100 if len(below) > 1000 else 0):
        port = secrets.choice(below)
        with contextlib.suppress(OSError), listen(LOOPBACK, port):
            return port
    with listen(LOOPBACK, 0) as listening:
        return listening.getsockname()[1]


def listen(host: str, port: int, *, shared: bool = False) -> socket.socket:
    """A socket that listens at an IPv4 or IPv6 address of this machine; port 0 takes a free one.

    Where it is `shared`, other sockets may listen too, and the kernel gives each connection to one of them.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, reuse_port=shared)


def check_address(host: str, port: int) -> None:
    """Check that a server can listen there now; a ValueError is a sentence about `--host` or `--port`."""
    if not 0 <= port < 2**16:
        raise ValueError(f"--port is {port}; it must be at most 65535, and not negative.")
    try:
        if "%" in str(ipaddress.ip_address(host)):
            raise ValueError  # the network interface of an IPv6 address, which Cog does not read
        listen(host, port).close()
    except PermissionError:
        raise ValueError(f"--port is {port}; ports this low are for root alone: take one above 1023.") from None
    except OSError as error:
        if error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
            raise ValueError(f"--host is {host}; this machine has no such address.") from None
        taken = f"--port is {port}; it must be one that is free at {host}: {os.strerror(error.errno)}."
        raise ValueError(taken) from None
    except ValueError:
        raise ValueError(f"--host is {host[:80]!r}; it must be an IP address of this machine.") from None


def read_port(text: str) -> int:
    """The port that an option names; `check_address` checks its range."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"it is {text[:80]!r}; it must be a whole number up to 65535.") from None


def url(host: str, port: int) -> str:
    """The URL of a server that listens there."""
    return f"http://{_bracketed(host)}:{port}"


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def exit_on_signals() -> None:
    """Make SIGTERM and SIGHUP raise SystemExit, so that `with CogServer` stops the server."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(number, lambda received, _: sys.exit(128 + received))


class Verdict:
    """Judges whether a running server can go on, from one health check to the next, `SECONDS_BETWEEN_CHECKS` apart."""

    def __init__(self, server: CogServer) -> None:
        self._look, self._busy_with_nothing = Look(Path(server.scratch.name)), 0

    def reason(self, health: Mapping[str, Any]) -> str | None:
        """Why the server cannot go on, in a sentence, by what `GET /health-check` has just answered; None if it can."""
        if fault := _fault(health):
            return fault
        idle = self._look.idle()
        self._busy_with_nothing = self._busy_with_nothing + 1 if idle and health["status"] == "BUSY" else 0
        if self._busy_with_nothing < LOOKS_AT_A_LOST_SLOT:
            return None
        seconds = LOOKS_AT_A_LOST_SLOT * SECONDS_BETWEEN_CHECKS
        return (
            f"The server cannot go on: it has been busy for {seconds:g} seconds while its predictor had nothing to do. "
            "Start it again; docs/reliability.md says which requests do that."
        )


def serve(server: CogServer) -> int:
    """Wait until a server ends, and return its exit code.

    Raises:
        SystemExit: the server would refuse every request or draw wrong pictures: its predictor has ended, its weights
            have changed, its slot is lost, or it is silent. The supervisor of this process should start it again.
    """
    verdict = Verdict(server)
    while (code := server.process.poll()) is None:
        try:
            if reason := verdict.reason(server.health()):
                sys.exit(printable(reason))  # it quotes the predictor
        except TimeoutError:
            sys.exit(f"The server cannot go on: it has not answered a health check for {SECONDS_FOR_HEALTH} seconds.")
        except OSError:  # the server is starting, or has just ended
            pass
        time.sleep(SECONDS_BETWEEN_CHECKS)
    return code


def hangs(health: Mapping[str, Any]) -> bool:
    """Whether the predictor has not answered the server's question for its health."""
    return health.get("user_healthcheck_error") == "healthcheck timed out"


def _fault(health: Mapping[str, Any]) -> str | None:
    """Why the predictor cannot go on, in a sentence; None while it can."""
    if health["status"] not in ("UNHEALTHY", "DEFUNCT"):
        return None
    said = health.get("user_healthcheck_error", "")
    if not said or said.startswith("Healthcheck error: "):  # Cog found no process to ask
        said = "its process has ended; see its log."
    return "The predictor cannot go on: " + re.sub(r"^Healthcheck failed: (\w+Error: )?", "", said)


def main() -> None:
    """Serve until stopped."""
    parser = argparse.ArgumentParser(prog="script/serve", description="The predictor behind Cog's HTTP server.")
    parser.add_argument("--host", default=LOOPBACK, help="address to bind (default: %(default)s, this machine alone)")
    parser.add_argument("--port", type=read_port, default=5000, help="port to bind (default: %(default)s)")
    arguments = parser.parse_args()
    try:
        check_address(arguments.host, arguments.port)
    except ValueError as error:
        sys.exit(str(error))
    exit_on_signals()
    with CogServer(host=arguments.host, port=arguments.port) as server, contextlib.suppress(KeyboardInterrupt):
        try:
            server.wait_until_ready(math.inf)  # it may have to download FLUX
        except RuntimeError as error:
            sys.exit(printable(str(error)))  # it quotes the predictor
        print(f"Ready: {url(server.host, server.port)} (POST /predictions draws, Ctrl-C stops it)", flush=True)
        sys.exit(serve(server))


if __name__ == "__main__":
    main()
