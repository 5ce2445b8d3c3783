"""The playground's server on loopback: it serves the page, and passes the page's requests on to a predictor.

The page cannot ask a Cog server itself, which answers no page of another origin, and has no address for a prediction's
progress. This module speaks HTTP with the page; `playground.target` speaks with the predictor.
"""

import argparse
import contextlib
import http.client
import json
import re
import secrets
import socket
import socketserver
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

from local_cog.server import LOOPBACK, PREDICTION_ID, check_address, exit_on_signals, read_port, url
from playground.events import Events, TooManyListenersError
from playground.own import OwnServer
from playground.target import NoAnswerError, Target, has_gone
from service import strict_json
from service.guard import find_fault
from settings import MIB, VERSION

PAGE = Path(__file__).parent / "page"
HEADERS = json.loads(Path(__file__).with_name("headers.json").read_text(encoding="utf-8"))
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
# Cog's limit; this server adds a little to a body.
MOST_BYTES = 100 * MIB
MOST_CONNECTIONS = 100
# For a whole request to arrive; for each piece of an answer to be received.
SECONDS_FOR_REQUEST = 120
SECONDS_FOR_PIECE = 60
SECONDS_BETWEEN_SIGNS = 15
# The headers that are passed on: no cookie, and nothing about the page.
ASKED = ("Authorization", "Prefer", "Content-Type", "Accept", "User-Agent")


def page_files() -> dict[str, Path]:
    """The page's files by their paths in URLs."""
    files = {path.relative_to(PAGE): path for path in PAGE.rglob("*") if path.is_file()}
    return {str(name): path for name, path in files.items() if not any(part.startswith(".") for part in name.parts)}


class Refused(Exception):  # noqa: N818 (an answer, not an accident)
    """A refused request: the status of its answer, and a sentence."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


class Playground(socketserver.ThreadingTCPServer):
    """The page's server, which listens as soon as it is made; each connection has one request, and a thread.

    Port 0 takes a free one. The target may be set later, before the first request is answered.
    """

    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, port: int, target: Target | None = None) -> None:
        super().__init__((LOOPBACK, port), Handler)
        self.target, self.events, self.secret = target, Events(), secrets.token_urlsafe(32)
        self.port, self.files = self.socket.getsockname()[1], page_files()
        self.room = threading.Semaphore(MOST_CONNECTIONS)

    def process_request(self, request: socket.socket, client_address: tuple[str, int]) -> None:
        """Answer in a thread, or close the connection where there are too many."""
        if self.room.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            super().shutdown_request(request)

    def shutdown_request(self, request: socket.socket) -> None:
        """Close a connection, and make room for another one."""
        super().shutdown_request(request)
        self.room.release()

    def handle_error(self, request: socket.socket, client_address: tuple[str, int]) -> None:
        """Print an unforeseen error; a client that has gone is none."""
        if not isinstance(sys.exception(), OSError | http.client.HTTPException):
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    """One request."""

    server: Playground
    protocol_version = "HTTP/1.1"
    timeout = SECONDS_FOR_PIECE
    # For requests that are no HTTP.
    error_content_type, error_message_format = "text/plain; charset=utf-8", "%(message)s\n"

    def setup(self) -> None:
        """Start the timer that cuts off a request which arrives too slowly."""
        super().setup()
        self._too_late = threading.Timer(SECONDS_FOR_REQUEST, self._cut_off)
        self._too_late.daemon = True
        self._too_late.start()

    def finish(self) -> None:
        """Stop the timer; the connection is closed next."""
        self._too_late.cancel()
        super().finish()

    def _cut_off(self) -> None:
        with contextlib.suppress(OSError):  # just closed
            self.connection.shutdown(socket.SHUT_RDWR)

    def do_GET(self) -> None:
        """Answer one request, and close the connection."""
        self.close_connection = True
        try:
            self.body = self._read()
            self._too_late.cancel()
            self._route(self.path.partition("?")[0].split("/")[1:])
        except Refused as refused:
            self._send_json(refused.status, {"detail": str(refused)})
        except NoAnswerError as error:
            self._send_json(502, {"detail": str(error)})

    do_PUT = do_POST = do_GET  # noqa: N815 (as the standard library calls them)

    def _read(self) -> bytes:
        """The body; a request that another site's page may have sent is refused."""
        if fault := find_fault(self.headers.items()):
            raise Refused(*fault)
        if not self.path.startswith("/"):
            raise Refused(400, "The address must begin with a slash.")
        if "Transfer-Encoding" in self.headers:
            raise Refused(411, "The body must come with a Content-Length.")
        length = ", ".join(self.headers.get_all("Content-Length", ["0"]))
        if not re.fullmatch("[0-9]{1,15}", length):
            raise Refused(400, f"Content-Length is {length[:80]!r}; it must be a number of bytes.")
        if (missing := int(length)) > MOST_BYTES:
            # Read the body: a client that is still sending when the connection is closed does not read the answer.
            while missing > 0 and (piece := self.rfile.read1(2**16)):
                missing -= len(piece)
            raise Refused(413, f"The body has {length} bytes; it must have at most {MOST_BYTES // MIB} MiB.")
        body = self.rfile.read(missing)
        if len(body) < missing:
            raise ConnectionAbortedError
        return body

    def _route(self, parts: list[str]) -> None:
        match self.command, *parts:
            case "GET", "":
                self._send(307, headers={"Location": "playground/"})
            case "GET", "playground":
                self._send(308, headers={"Location": "playground/"})
            case "GET", "playground", "about.json":
                self._send_json(200, self.server.target.about())
            case "GET", "playground", "loras.json":
                self._send_loras()
            case "GET", "playground", "setup.log":
                self._send_log()
            case "GET", "playground", "events", prediction_id:
                self._send_events(prediction_id)
            case "POST", "playground", "webhooks", secret, prediction_id:
                self._hear(secret, prediction_id)
            case "GET", "playground", *name:
                self._send_file("/".join(name) or "index.html")
            case "GET", "health-check":
                self._send_health()
            case "GET", "openapi.json":
                self._pass_on()
            case "PUT", "predictions", prediction_id if PREDICTION_ID.fullmatch(prediction_id):
                with self.server.events.drawing(prediction_id):
                    self._pass_on(prediction_id)
            case "POST", "predictions", prediction_id, "cancel" if PREDICTION_ID.fullmatch(prediction_id):
                self._pass_on()
            case _:
                raise Refused(404, "There is no such address here.")

    def _send_file(self, name: str) -> None:
        if not (file := self.server.files.get(name)):
            raise Refused(404, "There is no such file of the page.")
        kind = TYPES.get(file.suffix, "text/plain")
        self._send(200, file.read_bytes(), {"Content-Type": f"{kind}; charset=utf-8"})

    def _send_log(self) -> None:
        if (log := self.server.target.log()) is None:
            raise Refused(404, "The predictor's log is where its server was started.")
        self._send(200, log.encode(), {"Content-Type": "text/plain; charset=utf-8"})

    def _send_loras(self) -> None:
        if self.server.target.known()["server"] == "front":
            self._pass_on()
            return
        try:
            self._send_json(200, self.server.target.loras())
        except ValueError as error:
            raise Refused(500, str(error)) from None

    def _send_health(self) -> None:
        try:
            self._pass_on()
        except NoAnswerError as error:
            # A refused connection only: a server that listens and does not answer may hang.
            if not (isinstance(error.__cause__, ConnectionRefusedError) and self.server.target.starts()):
                raise
            self._send_json(200, {"status": "STARTING"})

    def _send_events(self, prediction_id: str) -> None:
        """Send a prediction's events until it has been answered or the client has gone."""
        try:
            with self.server.events.listen(prediction_id) as listener:
                self._send(200, None, {"Content-Type": "text/event-stream"})
                quiet = time.monotonic()
                while not has_gone(self.connection):
                    event = self.server.events.wait(listener, seconds=1)
                    if event is None and listener.ended:
                        return
                    if event or time.monotonic() - quiet > SECONDS_BETWEEN_SIGNS:
                        self.wfile.write(b"data: %b\n\n" % event if event else b":\n\n")
                        quiet = time.monotonic()
        except TooManyListenersError:
            raise Refused(503, "Too many pages listen already; close some of them.") from None

    def _hear(self, secret: str, prediction_id: str) -> None:
        """Hand on the Cog server's webhook, as far as it tells a prediction's progress."""
        said = self._read_json(strict_json.MAX_VALUES)
        if not isinstance(said, dict):
            raise Refused(400, "The body must be an object.")
        event = {"status": said.get("status"), "logs": said.get("logs") or "", "metrics": said.get("metrics") or {}}
        known = secrets.compare_digest(secret.encode(), self.server.secret.encode())
        if not (known and self.server.events.tell(prediction_id, json.dumps(event).encode())):
            raise Refused(404, "There is no such prediction here.")
        self._send_json(200, {})

    def _pass_on(self, prediction_id: str | None = None) -> None:
        """Send the request to the target, and its answer to the client, piece by piece; a prediction may take long."""
        path, seconds = self.path.partition("?")[0], {"seconds": None} if prediction_id else {}
        headers = {name: _unfolded(self.headers[name]) for name in ASKED if name in self.headers}
        if prediction_id and self.body:
            self.body = self._with_own_webhook(prediction_id)
        with self.server.target.exchange(
            self.command, path, self.body, headers, client=self.connection, **seconds
        ) as answer:
            # No HTML or script: the browser would run it as this server's own.
            is_json = answer.headers.get_content_type() == "application/json"
            given = {"Content-Type": "application/json" if is_json else "text/plain; charset=utf-8"}
            if "Retry-After" in answer.headers:
                given["Retry-After"] = _unfolded(answer.headers["Retry-After"])
            # Without a length, only chunks tell an answer that was cut off from a complete one.
            in_chunks = answer.length is None and self.request_version == "HTTP/1.1"
            if in_chunks:
                given["Transfer-Encoding"] = "chunked"
            elif answer.length is not None:
                given["Content-Length"] = str(answer.length)
            self._send(answer.status, None, given)
            while piece := answer.read1(2**16):
                self.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece) if in_chunks else piece)
            self.wfile.write(b"0\r\n\r\n" if in_chunks else b"")

    def _with_own_webhook(self, prediction_id: str) -> bytes:
        """The body for a Cog server: with this server's webhook where it can be reached, and without any other one.

        A Cog server sends webhooks to any address, which pages should not choose.
        """
        about = self.server.target.known()
        if about["server"] == "front":
            return self.body
        asked = self._read_json(strict_json.REQUEST_VALUES)
        if not isinstance(asked, dict):
            return self.body  # Cog says what is wrong with it
        asked = {name: value for name, value in asked.items() if name not in ("webhook", "webhook_events_filter")}
        if about["progress"] == "events":
            address = f"{url(LOOPBACK, self.server.port)}/playground/webhooks/{self.server.secret}/{prediction_id}"
            asked |= {"webhook": address, "webhook_events_filter": ["start", "logs"]}
        return strict_json.compact(asked, sort=False).encode()

    def _read_json(self, max_values: int) -> Any:  # noqa: ANN401 (JSON)
        try:
            return strict_json.read(self.body, max_values, zeros=True)
        except ValueError as error:
            raise Refused(400, f"The body must be JSON, and {error}") from None

    def _send_json(self, status: int, value: object) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, content: bytes | None = b"", headers: dict[str, str] | None = None) -> None:
        """Send an answer; with None as content, only what comes before it."""
        self.send_response(status)
        length = {} if content is None else {"Content-Length": str(len(content))}
        for name, value in {**(headers or {}), **length, "Connection": "close"}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content or b"")

    def send_response(self, code: int, message: str | None = None) -> None:
        """Begin an answer with the status line and the headers that every answer has."""
        super().send_response(code, message)
        for name, value in HEADERS.items():
            self.send_header(name, value)

    def version_string(self) -> str:
        """The Server header."""
        return f"flux-sprites/{VERSION}"

    def log_message(self, *_: object) -> None:
        """Print nothing: the terminal shows the predictor's lines."""


def _unfolded(value: str) -> str:
    return " ".join(value.split())  # old HTTP allows several lines


def main() -> None:
    """Serve until stopped."""
    parser = argparse.ArgumentParser(prog="script/playground", description="A page to play on, in a browser.")
    parser.add_argument(
        "--target", help="the Cog server or the cluster to draw with (default: the predictor here, which is started)"
    )
    parser.add_argument("--port", type=read_port, default=7860, help="port to bind (default: %(default)s)")
    options = parser.parse_args()
    try:
        target = None if options.target is None else Target(options.target)
        check_address(LOOPBACK, options.port)
        if target and target.port == options.port and target.is_loopback():
            raise ValueError(f"--target is {target.url}; it must be another server than the page's own.")
    except (ValueError, NoAnswerError) as error:
        parser.error(str(error))
    exit_on_signals()
    with (
        contextlib.suppress(KeyboardInterrupt),
        Playground(options.port) as server,  # first: another program could take the port while a predictor starts
        contextlib.nullcontext(target) if target else OwnServer() as server.target,
    ):
        print(f"Ready: {url(LOOPBACK, server.port)}/playground/ (Ctrl-C stops it)", flush=True)
        server.serve_forever()


if __name__ == "__main__":
    main()
