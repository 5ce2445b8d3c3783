"""The server that the page's requests go to, a Cog server or a cluster's front, over HTTP and past any proxy.

This module knows nothing of the page.
"""

import http.client
import io
import ipaddress
import json
import re
import select
import socket
import ssl
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from typing import Any
from urllib.parse import urlsplit

from service.lines import printable
from settings import MIB
from sources import library
from sources.shown import redact

# To connect; to send each piece of a request; then until an answer begins that needs no drawing.
SECONDS_TO_CONNECT = 10
SECONDS_FOR_PIECE = 60
SECONDS_FOR_ANSWER = 30
# The most that is read here and not passed on: the log of a setup is the longest.
LONGEST_READ = 16 * MIB
_URL = re.compile(r"https?://(?:[\w.-]+|\[[\da-f:.]+\])(?::\d{1,5})?(?:/[\w.~%/-]*)?", re.ASCII | re.IGNORECASE)


class NoAnswerError(Exception):
    """The target does not answer, or not as a Cog server or a front does; every method that asks it may raise this."""


class Target:
    """One server, at the URL that `--target` names; a ValueError is a sentence about that."""

    def __init__(self, url: str) -> None:
        wrong = (
            f"--target is {redact(url)!r}; it must be an http or https URL without a login, a query and a fragment, "
            "such as http://127.0.0.1:5000."
        )
        try:
            parts = urlsplit(url)
            if not (_URL.fullmatch(url) and parts.hostname and parts.port != 0):
                raise ValueError(wrong)
            parts.hostname.encode("idna")  # sockets do so, and it fails for impossible names
        except ValueError:
            raise ValueError(wrong) from None
        self.url, self._secure = url.rstrip("/"), parts.scheme == "https"
        self._host, self._prefix = parts.hostname, parts.path.rstrip("/")
        # Always given to http.client, which would take the end of an IPv6 address for a port.
        self.port = parts.port or (443 if self._secure else 80)
        self._known: dict[str, Any] | None = None

    def about(self) -> dict[str, Any]:
        """What the page is told of the server in `about.json`, asked anew: another one may have taken its place."""
        (status, told), (status_of_health, health) = self.get("/playground/about.json"), self.get("/health-check")
        if told.get("server") == "front":
            server, progress, tokens = "front", "poll", bool(told.get("tokens"))
        # A Cog server has no such page. A proxy before a front may answer while the front is away.
        elif status not in (401, 404) or ("status" not in health and status_of_health != 401):
            raise NoAnswerError(f"{self.url} answers as neither a Cog server nor a cluster's front does.")
        else:
            server, tokens = "cog", 401 in (status, status_of_health)
            # Webhooks reach this machine's loopback only from this machine.
            progress = "events" if self.is_loopback() and not tokens else None
        self._known = {"server": server, "progress": progress, "tokens": tokens, "address": self.url, "log": False}
        return self._known

    def known(self) -> dict[str, Any]:
        """The last result of `about`; asked for if there is none, or the server has been silent since."""
        return self._known or self.about()

    def is_loopback(self) -> bool:
        """Whether its address is one of this machine's loopback."""
        try:
            found = socket.getaddrinfo(self._host, self.port, type=socket.SOCK_STREAM)
        except OSError as error:
            raise self._silent(error) from error
        addresses = [ipaddress.ip_address(address[0].partition("%")[0]) for *_, address in found]
        # A connection to 0.0.0.0, where servers say that they listen, leads to loopback.
        return all(address.is_loopback or address.is_unspecified for address in addresses)

    def starts(self) -> bool:
        """Whether it is known to be starting; never known of a server that others have started."""
        return False

    def log(self) -> str | None:
        """What it has printed, if that is known."""
        return None

    def loras(self) -> list[str]:
        """The library's names, by this process's environment; ValueError: a sentence about a variable that is wrong."""
        if not self.is_loopback():
            return []  # its folder is elsewhere
        return library.names_beside(self.get("/health-check")[1])

    def get(self, path: str) -> tuple[int, dict[str, Any]]:
        """The status, and the JSON object of the answer; an empty one if it is something else."""
        try:
            with self.exchange("GET", path) as answer:
                content = answer.read(LONGEST_READ)
        except (OSError, http.client.HTTPException) as error:
            raise self._silent(error) from error
        try:
            value = json.loads(content)
        except (ValueError, RecursionError):
            value = None
        return answer.status, value if isinstance(value, dict) else {}

    @contextmanager
    def exchange(
        self,
        method: str,
        path: str,
        body: bytes = b"",
        headers: Mapping[str, str] | None = None,
        *,
        seconds: float | None = SECONDS_FOR_ANSWER,
        client: socket.socket | None = None,
    ) -> Iterator[http.client.HTTPResponse]:
        """Send a request to a path below the target's own, and give its answer to read from.

        The answer may take so many seconds to begin, and twice as long to end; None: any time. When the connection of
        the `client` is closed, so is the one to the server, which then cancels.
        """
        kind = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
        connection = kind(self._host, self.port, timeout=SECONDS_TO_CONNECT, blocksize=2**16)
        late = threading.Event()
        with ExitStack() as stack:
            stack.callback(connection.close)
            try:
                connection.connect()
                sock = connection.sock
                stack.enter_context(_breaking_off(sock, client, seconds and 2 * seconds, late))
                sock.settimeout(SECONDS_FOR_PIECE)
                length = {"Content-Length": str(len(body))} if body else {}
                # A server may answer before it has read all of a body that is too large.
                with suppress(BrokenPipeError, ConnectionResetError):
                    # As a file, a body is sent in pieces, each within the timeout.
                    content = io.BytesIO(body) if body else None
                    connection.request(method, self._prefix + path, content, {**(headers or {}), **length})
                sock.settimeout(seconds)
                answer = stack.enter_context(connection.getresponse())
                if answer.status < 200:  # early hints, unasked for: http.client takes them for the answer
                    raise http.client.UnknownProtocol(str(answer.status))
            except (OSError, http.client.HTTPException) as error:
                raise self._silent(TimeoutError() if late.is_set() else error) from error
            yield answer

    def _silent(self, error: Exception) -> NoAnswerError:
        """The error to raise; `about` is asked anew, because the next answer may be another server's."""
        self._known = None
        return NoAnswerError(self.reason(error))

    def reason(self, error: Exception) -> str:
        """Why there is no answer, in a sentence."""
        match error:
            case TimeoutError():
                why = "it takes too long"
            case http.client.IncompleteRead() | ConnectionResetError() | BrokenPipeError():
                why = "it broke off the connection"
            case http.client.HTTPException():
                why = "what it sends cannot be understood"
            case ssl.SSLCertVerificationError():
                why = f"its certificate cannot be trusted: {error.verify_message.removesuffix('.')}"
            case ssl.SSLError():
                why = "no secure connection could be made"
            case OSError(strerror=str(said)):
                why = said
            case _:
                why = str(error)
        return printable(f"{self.url} does not answer: {why}.")


@contextmanager
def _breaking_off(
    sock: socket.socket, client: socket.socket | None, seconds: float | None, late: threading.Event
) -> Iterator[None]:
    """Break off a connection when the client has gone, or after so many seconds, while the block runs; `late` tells."""
    ended, end = socket.socketpair()
    watched = [ended, client] if client else [ended]

    def watch() -> None:
        while ended not in (found := select.select(watched, [], [], seconds)[0]):
            if not found:
                late.set()
            if not found or has_gone(client):
                # The plain socket's method: TLS's own goes on without TLS for a moment, in which a token may be sent.
                with suppress(OSError):
                    socket.socket.shutdown(sock, socket.SHUT_RDWR)
                return

    watching = threading.Thread(target=watch, daemon=True)
    watching.start()
    try:
        yield
    finally:
        end.close()
        watching.join()
        ended.close()


def has_gone(client: socket.socket) -> bool:
    """Whether a client that has sent its whole request has closed its connection."""
    try:
        return bool(select.select([client], [], [], 0)[0]) and not client.recv(2**16)
    except OSError:
        return True
