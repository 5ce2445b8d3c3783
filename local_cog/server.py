"""The real Cog server on this machine: started, spoken to over HTTP, stopped with everything it started.

`script/serve`, `script/predict` and the tests run predictions through it. This module knows Cog's HTTP and its log;
it knows nothing of what the predictor does.
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
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from local_cog import schema
from service.data_uri import decode, suffix
from service.lines import printable
from service.occupancy import Look
from settings import ROOT

LOOPBACK = "127.0.0.1"
# The range of ports that the kernel gives away, and where ours begin: Ray's workers have those below.
KERNELS_PORTS = Path("/proc/sys/net/ipv4/ip_local_port_range")
LOWEST_PORT = 20_000
# Cog takes bodies up to 100 MiB, and base64 makes four bytes of three.
MAX_FILE_BYTES = 70_000_000
# Cog asks for BaseRunner instead of BasePredictor, which older command-line tools do not know.
QUIET = "ignore:BasePredictor is deprecated:DeprecationWarning,ignore:Predictor.predict():DeprecationWarning"
# How often `script/serve` asks for the server's health, and how long a server that works may take to tell it.
SECONDS_BETWEEN_CHECKS = 5
SECONDS_FOR_HEALTH = 10
# How long a server may be silent while it starts: what it does then takes much of a machine.
SECONDS_FOR_FIRST_HEALTH = 60
# A server is given up that was busy at so many looks in a row while its predictor had nothing to do: in 50 seconds.
LOOKS_AT_A_LOST_SLOT = 9
# How long a prediction is asked for again while there is no slot: Cog answers just before it frees the only one, and a
# cancelled prediction has it until its next step.
SECONDS_FOR_SLOT = 5
# Longer than a cancelled prediction needs; a worker inside native code reacts to SIGKILL alone.
SECONDS_TO_STOP = 5


def past_proxies(environ: Mapping[str, str]) -> dict[str, str]:
    """Variables by which this machine is not asked through the operator's proxy, as Cog would send its webhooks."""
    names = environ.get("no_proxy") or environ.get("NO_PROXY") or ""
    directly = names if names.strip() == "*" else ",".join(filter(None, (names, LOOPBACK, "localhost", "::1")))
    return dict.fromkeys(("no_proxy", "NO_PROXY"), directly)


class CogServer:
    """Cog's server over one project, in a process group of its own; a context manager that starts and stops it.

    Args:
        project: the directory that holds `predict.py`.
        environment: variables added to those of this process; None leaves one out.
        log: the file that gets what the server and the predictor print; None prints it here.
        host: the IP address to bind.
        port: the port to bind; None takes a free one.
    """

    def __init__(
        self,
        project: Path = ROOT,
        *,
        environment: Mapping[str, str | None] | None = None,
        log: Path | None = None,
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
        """Derive the schema that the server validates by, and start it; it is not ready yet."""
        schema.write(self.project)
        # Temporary files of predictions would outlive a worker that is killed.
        self.scratch = tempfile.TemporaryDirectory(prefix="flux-sprites-server-", ignore_cleanup_errors=True)
        with open(self.log, "wb") if self.log else contextlib.nullcontext() as log:  # noqa: PTH123 (or None)
            self.process = subprocess.Popen(
                [sys.executable, "-m", "cog.server.http", "--host", _bracketed(self.host)],
                cwd=self.project,
                env=self.environment | {"TMPDIR": self.scratch.name},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        # Should this process be killed, nobody calls __exit__: the server and its worker would go on, and hold the GPU.
        # A keeper reads from a pipe that is never written to, and that the end of this process closes.
        end = 'read -r _; kill -s KILL -- "-$0"; rm -rf -- "$1"'  # the one form of kill that every shell knows
        self.keeper = subprocess.Popen(
            ["sh", "-c", end, str(self.process.pid), self.scratch.name],
            env={"PATH": os.environ.get("PATH", os.defpath)},  # to find `rm`; the others may be secrets
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop the server and its worker, in the middle of a prediction too, which Cog would otherwise finish."""
        self._signal(signal.SIGTERM)
        try:
            self.process.wait(SECONDS_TO_STOP)
        except subprocess.TimeoutExpired:
            pass
        finally:
            self._signal(signal.SIGKILL)
            self.process.wait()
            with self.keeper:
                self.keeper.kill()
            self.scratch.cleanup()

    def wait_until_ready(self, seconds: float = 600, meanwhile: Callable[[], None] = lambda: None) -> None:
        """Wait for the predictor's setup, calling `meanwhile` ten times a second.

        Raises:
            RuntimeError: a sentence with the reason why there will be no prediction.
        """
        give_up, silent = time.monotonic() + seconds, 0
        while time.monotonic() < give_up:
            meanwhile()
            if self.process.poll() is not None:
                raise RuntimeError(f"The server ended with code {self.process.returncode} before it was ready.")
            try:
                health = self.health()
            except TimeoutError:  # it is there, and stopped or hanging
                silent += SECONDS_FOR_HEALTH
                if silent >= SECONDS_FOR_FIRST_HEALTH:
                    raise RuntimeError(f"The server has not answered for {silent} seconds.") from None
                continue
            except OSError:  # it is not there yet
                health = {"status": "STARTING"}
            silent = 0
            match health["status"]:
                case "READY" | "BUSY":  # with what somebody has sent since the last look
                    return
                case "SETUP_FAILED":
                    reason = re.sub(r"^.*[Ss]etup failed: (\w+Error: )?", "", health["setup"]["logs"], flags=re.DOTALL)
                    raise RuntimeError(f"The predictor's setup failed: {reason}")
                case "UNHEALTHY" | "DEFUNCT":
                    raise RuntimeError(f"The predictor cannot go on: {_reason(health)}")
            time.sleep(0.1)
        raise RuntimeError(f"The server was not ready within {seconds:g} seconds.")

    def health(self) -> dict[str, Any]:
        """What `GET /health-check` answers: `status` is STARTING, READY, BUSY, SETUP_FAILED, UNHEALTHY or DEFUNCT.

        Raises:
            OSError: the server does not answer; TimeoutError if it is there, but stopped or hanging.
        """
        return self.request("GET", "/health-check", seconds=SECONDS_FOR_HEALTH)[1]

    def schema(self) -> dict[str, Any]:
        """The OpenAPI document, once the server is ready."""
        return self.request("GET", "/openapi.json")[1]

    def predict(self, inputs: Mapping[str, Any], prediction_id: str | None = None) -> dict[str, Any]:
        """One prediction, waited for.

        Returns:
            Cog's answer: `status`, `output`, `logs`, `metrics`, `error`; `detail` alone where it refused the request.
        """
        method, path = ("PUT", f"/predictions/{prediction_id}") if prediction_id else ("POST", "/predictions")
        answer = self._ask(method, path, {"input": inputs})
        # Cog answers just before it frees its slot: wait, so that whoever asks next finds it free, but not for long,
        # because another prediction may have taken it.
        settled = time.monotonic() + 0.5
        with contextlib.suppress(OSError):  # it has just ended, and the answer is there
            while self.health()["status"] == "BUSY" and time.monotonic() < settled:
                time.sleep(0.01)
        return answer

    def start(self, inputs: Mapping[str, Any], prediction_id: str, **fields: object) -> dict[str, Any]:
        """Start a prediction without waiting; `fields` go beside `input`, such as `webhook`."""
        body = {"input": inputs, **fields}
        return self._ask("PUT", f"/predictions/{prediction_id}", body, {"Prefer": "respond-async"})

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
        """One HTTP exchange of JSON, past any proxy; an answer in plain text comes back as its `detail`.

        Raises:
            OSError: the server does not answer; TimeoutError if it stays silent for so many seconds.
        """
        host = {"0.0.0.0": LOOPBACK, "::": "::1"}.get(self.host, self.host)
        connection = http.client.HTTPConnection(host, self.port, timeout=seconds)
        try:
            content = None if body is None else json.dumps(body)
            connection.request(method, path, content, {"Content-Type": "application/json", **(headers or {})})
            answer = connection.getresponse()
            text = answer.read().decode()
        except (http.client.HTTPException, BrokenPipeError, ConnectionResetError) as error:
            raise ConnectionError("The server broke off the connection.") from error
        finally:
            connection.close()
        try:
            return answer.status, json.loads(text)
        except ValueError:
            return answer.status, {"detail": text}

    def _ask(self, method: str, path: str, body: object, headers: Mapping[str, str] | None = None) -> dict[str, Any]:
        """Ask for a prediction, and again while the one before it has the slot."""
        give_up = time.monotonic() + SECONDS_FOR_SLOT
        while (exchange := self.request(method, path, body, headers))[0] == 409 and time.monotonic() < give_up:
            time.sleep(0.01)
        return exchange[1]

    def _signal(self, number: int) -> None:
        """Signal the server and its worker: their process group lasts as long as one of them lives."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)


def failure(answer: Mapping[str, Any]) -> str | None:
    """Why a prediction has no output, in one sentence without Cog's prefixes; None where it succeeded."""
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
    """A port of this machine on which nothing listens.

    Outgoing connections, and servers that ask for any port, get one of the kernel's own range, where a server that
    takes seconds to start would find its port taken now and then. So it is one below that range, if there are enough.
    """
    below = range(0)
    with contextlib.suppress(OSError):  # there may be no /proc
        below = range(LOWEST_PORT, int(KERNELS_PORTS.read_text().split()[0]))
    for _ in range(100 if len(below) > 1000 else 0):
        port = secrets.choice(below)
        with contextlib.suppress(OSError), listen(LOOPBACK, port):
            return port
    with listen(LOOPBACK, 0) as listening:
        return listening.getsockname()[1]


def listen(host: str, port: int, *, shared: bool = False) -> socket.socket:
    """Listen at an address of this machine.

    Args:
        host: IPv4 or IPv6.
        port: 0 to 65535.
        shared: let other sockets listen at the same address too; the kernel gives each connection to one of them.

    Raises:
        OSError: the address is not this machine's, or is taken.
        OverflowError: there is no such port.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, reuse_port=shared)


def check_address(host: str, port: int) -> None:
    """Check that a server can listen there now.

    Raises:
        ValueError: a sentence about `--host` or `--port`, which says why it cannot.
    """
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
        raise ValueError(
            f"--port is {port}; it must be one that is free at {host}: {os.strerror(error.errno)}."
        ) from None
    except ValueError:
        raise ValueError(f"--host is {host[:80]!r}; it must be an IP address of this machine.") from None


def read_port(text: str) -> int:
    """A port, as an option says it; `check_address` says which ones there are."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"it is {text[:80]!r}; it must be a whole number up to 65535.") from None


def url(host: str, port: int) -> str:
    """Where a server is reached that listens there, as far as the address is one of a single machine."""
    return f"http://{_bracketed(host)}:{port}"


def _bracketed(host: str) -> str:
    """An address as it stands before a port."""
    return f"[{host}]" if ":" in host else host


def exit_on_signals() -> None:
    """End by an exception when asked to end, so that `with CogServer` stops the server."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
            signal.signal(number, lambda received, _: sys.exit(128 + received))


class Verdict:
    """Judges, look by look, whether a server can go on; asked every `SECONDS_BETWEEN_CHECKS`.

    Args:
        server: one that runs.
    """

    def __init__(self, server: CogServer) -> None:
        self._look, self._busy_with_nothing = Look(Path(server.scratch.name)), 0

    def reason(self, health: Mapping[str, Any]) -> str | None:
        """Why the server cannot go on, in a sentence; None while it can.

        Args:
            health: what `GET /health-check` has just answered.
        """
        if health["status"] in ("UNHEALTHY", "DEFUNCT"):
            return f"The predictor cannot go on: {_reason(health)}"
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
    """Wait until a server ends, and give its exit code.

    Raises:
        SystemExit: its predictor has ended, or its weights have changed, or it has lost its slot, or it does not answer
            any more; it would refuse every request or draw wrong pictures. What supervises this process should start
            it again.
    """
    verdict = Verdict(server)
    while (code := server.process.poll()) is None:
        try:
            if reason := verdict.reason(server.health()):
                sys.exit(printable(reason))  # it has the predictor's own words
        except TimeoutError:
            sys.exit(f"The server cannot go on: it has not answered a health check for {SECONDS_FOR_HEALTH} seconds.")
        except OSError:  # it starts, or has just ended
            pass
        time.sleep(SECONDS_BETWEEN_CHECKS)
    return code


def hangs(health: Mapping[str, Any]) -> bool:
    """Whether a predictor does not answer the server that asks for its health; it may have a prediction or none."""
    return health.get("user_healthcheck_error") == "healthcheck timed out"


def _reason(health: Mapping[str, Any]) -> str:
    """Why a predictor cannot go on, in what follows a colon."""
    said = health.get("user_healthcheck_error", "")
    if not said or said.startswith("Healthcheck error: "):  # Cog has found nobody to ask
        return "its process has ended; see its log."
    return re.sub(r"^Healthcheck failed: (\w+Error: )?", "", said)


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
            sys.exit(printable(str(error)))  # it has the predictor's own words
        print(f"Ready: {url(server.host, server.port)} (POST /predictions draws, Ctrl-C stops it)", flush=True)
        sys.exit(serve(server))


if __name__ == "__main__":
    main()
