"""What the page's requests go to, a Cog server or a cluster's front: over HTTP, past any proxy.

This module knows what is asked of them; it knows nothing of the page.
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
from contextlib import contextmanager, suppress
from typing import Any
from urllib.parse import urlsplit

from service.lines import printable
from settings import MIB
from sources import library
from sources.shown import redact

# How long a connection may take, then each piece of a request, then the beginning of an answer that needs no drawing.
SECONDS_TO_CONNECT = 10
SECONDS_FOR_PIECE = 60
SECONDS_FOR_ANSWER = 30
# What is read here, and not passed on, is small: the longest is the log of a setup.
LONGEST_READ = 16 * MIB
_URL = re.compile(r"https?://(?:[\w.-]+|\[[\da-f:.]+\])(?::\d{1,5})?(?:/[\w.~%/-]*)?", re.ASCII | re.IGNORECASE)


class NoAnswerError(Exception):
    """The target does not answer; the message is a sentence."""


class Target:
    """One server.

    Args:
        url: as an option has it.

    Raises:
        ValueError: a sentence about `--target`.
    """

    def __init__(self, url: str) -> None:
        wrong = (
            f"--target is {redact(url)!r}; it must be an http or https URL without a login, a query and a fragment, "
            "such as http://127.0.0.1:5000."
        )
        try:
            parts = urlsplit(url)
            if not (_URL.fullmatch(url) and parts.hostname and parts.port != 0):
                raise ValueError(wrong)
            parts.hostname.encode("idna")  # as sockets do; it finds names that cannot be
        except ValueError:
            raise ValueError(wrong) from None
        self.url, self._secure = url.rstrip("/"), parts.scheme == "https"
        self._host, self._prefix = parts.hostname, parts.path.rstrip("/")
        # Given to http.client, which else takes the end of an IPv6 address for it.
        self._port = parts.port or (443 if self._secure else 80)
        self._known: dict[str, Any] | None = None

    def about(self) -> dict[str, Any]:
        """What the page is told of the server at `about.json`, asked anew: by now it may be another one.

        Raises:
            NoAnswerError: it does not answer, or not as a Cog server or a front does.
        """
        self._known = self._ask_about()
        return self._known

    def known(self) -> dict[str, Any]:
        """The same as it was last told; asked for only where that was not, or there was a silence since.

        Raises:
            NoAnswerError: as above.
        """
        return self._known or self.about()

    def _ask_about(self) -> dict[str, Any]:
        (status, told), (status_of_health, health) = self.get("/playground/about.json"), self.get("/health-check")
        about = {"address": self.url, "log": False}
        if told.get("server") == "front":
            return {"server": "front", "progress": "poll", "tokens": bool(told.get("tokens")), **about}
        # A Cog server has no such page. A proxy in between may answer for a while that nothing is behind it.
        if status not in (401, 404) or ("status" not in health and status_of_health != 401):
            raise NoAnswerError(f"{self.url} answers as neither a Cog server nor a cluster's front does.")
        tokens = 401 in (status, status_of_health)
        # Webhooks reach this machine's loopback from there alone.
        progress = "events" if self.is_loopback() and not tokens else None
        return {"server": "cog", "progress": progress, "tokens": tokens, **about}

    def is_loopback(self) -> bool:
        """Whether it is on this machine, as far as its address tells."""
        try:
            found = socket.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM)
        except OSError as error:
            raise self._silent(error) from error
        addresses = [ipaddress.ip_address(address[0].partition("%")[0]) for *_, address in found]
        # To connect to 0.0.0.0, where servers say that they listen, leads to loopback.
        return all(address.is_loopback or address.is_unspecified for address in addresses)

    def is_at(self, port: int) -> bool:
        """Whether it is what listens at a port of this machine.

        Raises:
            NoAnswerError: its name is unknown.
        """
        return self._port == port and self.is_loopback()

    def starts(self) -> bool:
        """Whether it will answer later, if it does not now; of a server that others have started nobody knows."""
        return False

    def log(self) -> str | None:
        """What it has printed, where that is known."""
        return None

    def loras(self) -> list[str]:
        """The library's names, as this process's environment has the folder; none of a server elsewhere.

        Raises:
            NoAnswerError: it does not answer; ValueError: a sentence about a variable.
        """
        if not self.is_loopback():
            return []
        return library.names_beside(self.get("/health-check")[1])

    def get(self, path: str) -> tuple[int, dict[str, Any]]:
        """Status and JSON object; an empty one where the answer is something else.

        Raises:
            NoAnswerError: there is none.
        """
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
        """One request, and its answer to read from.

        Args:
            method: of HTTP.
            path: below the target's own.
            body: its Content-Type is among the headers.
            headers: sent as they are.
            seconds: how long the answer may take to begin, and twice as long to end; None: any time.
            client: for whom it is: when it goes, the connection is broken off, on which a Cog server cancels.

        Raises:
            NoAnswerError: there is none.
        """
        kind = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
        connection = kind(self._host, self._port, timeout=SECONDS_TO_CONNECT, blocksize=2**16)
        try:
            try:
                connection.connect()
            except OSError as error:
                raise self._silent(error) from error
            with _breaking_off(connection.sock, client, seconds and 2 * seconds) as late:
                try:
                    answer = _ask(connection, method, self._prefix + path, body, headers or {}, seconds)
                except (OSError, http.client.HTTPException) as error:
                    raise self._silent(TimeoutError() if late.is_set() else error) from error
                with answer:
                    yield answer
        finally:
            connection.close()

    def _silent(self, error: Exception) -> NoAnswerError:
        """Why there is no answer; by the next one, something else may be there."""
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


def _ask(
    connection: http.client.HTTPConnection,
    method: str,
    path: str,
    body: bytes,
    headers: Mapping[str, str],
    seconds: float | None,
) -> http.client.HTTPResponse:
    sock = connection.sock
    sock.settimeout(SECONDS_FOR_PIECE)
    length = {"Content-Length": str(len(body))} if body or method != "GET" else {}
    # A server may answer before it has read all of a body that is too large.
    with suppress(BrokenPipeError, ConnectionResetError):
        connection.request(method, path, io.BytesIO(body) if body else None, {**headers, **length})
    sock.settimeout(seconds)
    answer = connection.getresponse()
    if answer.status < 200:  # early hints, which nobody has asked for, and which http.client takes for the answer
        raise http.client.UnknownProtocol(str(answer.status))
    return answer


@contextmanager
def _breaking_off(
    sock: socket.socket, client: socket.socket | None, seconds: float | None
) -> Iterator[threading.Event]:
    """Meanwhile a connection is broken off as soon as the client has gone, if there is one, or it is late."""
    late = threading.Event()
    ended, end = socket.socketpair()
    watched = [ended, client] if client else [ended]

    def watch() -> None:
        while ended not in (found := select.select(watched, [], [], seconds)[0]):
            if not found:
                late.set()
            if not found or has_gone(client):
                # Under TLS too: its own way goes on without TLS for a moment, in which a token may be sent.
                with suppress(OSError):
                    socket.socket.shutdown(sock, socket.SHUT_RDWR)
                return

    watching = threading.Thread(target=watch, daemon=True)
    watching.start()
    try:
        yield late
    finally:
        end.close()
        watching.join()
        ended.close()


def has_gone(client: socket.socket) -> bool:
    """Whether a client that has asked all it asks has closed its connection."""
    try:
        return bool(select.select([client], [], [], 0)[0]) and not client.recv(2**16)
    except OSError:
        return True
