"""Asking hosts over HTTP: retries, redirects, and a sentence for each failure. Sockets are connections.py's part."""

import contextlib
import http.client
import json
import random
import re
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from http import HTTPStatus
from typing import Any, TypeVar
from urllib.parse import urljoin, urlsplit

import urllib3

from settings import MIB, Settings, names_host
from sources.connections import Connections, PrivateAddressError, StoppedError, split_login, untrusted
from sources.shown import host_of, redact

T = TypeVar("T")
# Bytes of one read. Larger buffers are mapped and unmapped each time, which costs more than the calls they save.
CHUNK = 128 * 1024
MAX_REDIRECTS = 10
# CivitAI's answer about a model with a hundred versions and their pictures has one MiB.
MAX_JSON_BYTES = 8 * MIB
SLOWEST = 1024  # bytes a second, of one connection


@dataclass(frozen=True)
class Patience:
    """How long a host may keep a prediction waiting, in seconds."""

    connect: float = 10
    stall: float = 30  # without a byte, or with fewer than SLOWEST a second
    pauses: tuple[float, ...] = (0.5, 1, 2, 4)  # before the second, third ... attempt
    longest_pause: float = 30  # the longest Retry-After that is waited for instead

    def within(self, seconds: float) -> "Patience":
        """The same with at most that many seconds for each silence."""
        seconds = max(seconds, 0.1)  # 0 would make a socket non-blocking
        return replace(self, connect=min(self.connect, seconds), stall=min(self.stall, seconds))


PATIENCE = Patience()


@dataclass(frozen=True)
class Source:
    """The place of a file, and what its host states about it."""

    name: str  # as it may be shown
    url: str = field(repr=False)
    token: str | None = field(default=None, repr=False)  # for the host and port of `url` alone
    key: str | None = None  # names this content for ever: a version, a commit, a hash
    sha256: str | None = None
    size: int | None = None
    trigger_words: tuple[str, ...] = ()
    advice: Mapping[int, str] = field(default_factory=dict)  # the ends of sentences about statuses
    web_page: str | None = None  # the end of a sentence about a web page instead of the file
    config: "Source | None" = None  # beside it, see `configs`
    form: bytes | None = field(default=None, repr=False)  # sent by POST, to the source's host alone
    # The error for a status and headers, for a host that refuses in its own way.
    explain: Callable[[int, Mapping[str, str]], ValueError] | None = None


class UnavailableError(ValueError):
    """The host is down, overloaded or broke off: the same request may succeed later."""

    def __init__(self, sentence: str, pause: float | None = None) -> None:
        super().__init__(sentence)
        self.pause = pause  # the host's Retry-After, in seconds


class Client(Connections):
    """Asks hosts for files, for one piece of work; another thread can stop it."""

    def __init__(self, settings: Settings, patience: Patience) -> None:
        super().__init__(
            allow_private=settings.allow_private_hosts,
            proxies=settings.proxies,
            connect=patience.connect,
            stall=patience.stall,
        )
        self.patience = patience

    def persist(self, attempt: Callable[[], T], hasty: bool = False) -> T:
        """The result of `attempt`, repeated while the host is unavailable, after pauses; `hasty`: tried only once."""
        pauses = iter(() if hasty else self.patience.pauses)
        while True:
            try:
                return attempt()
            except UnavailableError as error:
                self.check()
                pause = next(pauses, None)
                if pause is None or (error.pause or 0) > self.patience.longest_pause:
                    raise
                self.pause(error.pause or pause)

    def pause(self, seconds: float) -> None:
        """Wait, for up to a quarter more at random: else clients that were refused together return together."""
        if self.stopped.wait(seconds * random.uniform(1, 1.25)):
            raise StoppedError

    def open(self, source: Source, headers: Mapping[str, str] | None = None, url: str | None = None) -> "Stream":
        """The answer to a request for a file, after redirects; `url`: where an earlier request was redirected to.

        Raises:
            UnavailableError: the host cannot be reached, answers 429 or 5xx.
            ValueError: any other refusal, with what to do about it.
        """
        url, asked = url or source.url, source
        for _ in range(MAX_REDIRECTS):
            if _origin(url) != _origin(source.url):
                # Token and form are for the source's own host, not for hosts that it redirects to.
                asked = replace(source, token=None, form=None)
            response = self._request(asked, url, headers or {})
            location = response.headers.get("Location")
            if response.status not in (301, 302, 303, 307, 308) or location is None:
                break
            response.close()
            url = _follow(source, url, location)
        else:
            raise ValueError(
                f"{source.name} was redirected more than {MAX_REDIRECTS} times; the link leads in a circle."
            )
        if response.status >= 300 and response.status != HTTPStatus.NOT_MODIFIED:
            response.close()
            raise _refusal(source, url, response, self._way(url))
        stream = Stream(self, source, url, response)
        if stream.is_part and "Range" not in (headers or {}):
            stream.close()
            answered = f"{host_of(url)} answered {_said(stream.status)}"
            raise ValueError(f"{source.name} cannot be fetched: {answered}, though all of it was asked for.")
        return stream

    def _request(self, source: Source, url: str, headers: Mapping[str, str]) -> urllib3.BaseHTTPResponse:
        sent = {"User-Agent": "flux-sprites", "Accept": "*/*", "Accept-Encoding": "identity", **headers}
        address, login = split_login(url)
        if source.token is not None:
            login = f"Bearer {source.token}"
        if login is not None:
            sent["Authorization"] = login
        try:
            return self.ask(address, sent, source.form)
        except (urllib3.exceptions.HTTPError, OSError, UnicodeError) as error:
            raise self.broken(source, address, error) from error

    def broken(self, source: Source, url: str, error: Exception) -> ValueError:
        """A sentence about a connection that failed; raises `StoppedError` if it failed because of `stop`."""
        self.check()
        host, way = host_of(url), self._way(url)
        if isinstance(error, urllib3.exceptions.ProtocolError) and isinstance(error.args[-1], Exception):
            error = error.args[-1]
        if isinstance(error, urllib3.exceptions.ProxyError):
            # The proxy is named without its address, which is the operator's business.
            if answered := re.match(r"Tunnel connection failed: (\d{3})\b", str(error.original_error)):
                return _refused_by_proxy(source, host, int(answered[1]))
            return UnavailableError(f"{source.name} cannot be fetched: the server's proxy cannot be reached.")
        if isinstance(error, PrivateAddressError):
            return ValueError(
                f"{source.name} cannot be fetched: {host} is an address of the server's own network; it must be a "
                "public one, unless whoever runs the server sets WEIGHTS_ALLOW_PRIVATE_HOSTS=1."
            )
        if isinstance(error, urllib3.exceptions.LocationValueError | UnicodeError):
            return ValueError(f"{source.name} is no address that can be connected to.")
        if fault := untrusted(error):
            return ValueError(f"{source.name} cannot be fetched: the certificate of {host} is not valid: {fault}")
        if isinstance(error, socket.gaierror):
            reason = f"there is no host {host}, or it cannot be looked up"
        elif isinstance(error, urllib3.exceptions.TimeoutError | TimeoutError):
            reason = f"{host} does not answer{way}"
        else:
            reason = f"the connection to {host}{way} failed or broke off"
        return UnavailableError(f"{source.name} cannot be fetched: {reason}.")

    def _way(self, url: str) -> str:
        return "" if self.proxy(url) is None else " through the server's proxy"

    def read(self, source: Source, size: int, hasty: bool = False) -> bytes:
        """The first `size` bytes of a file, fewer where it has no more; see `persist` and `open`."""

        def attempt() -> bytes:
            with self.open(source) as stream:
                return stream.peek(size)

        return self.persist(attempt, hasty)

    def json(self, source: Source, hasty: bool = False) -> Any:  # noqa: ANN401 (JSON)
        """The JSON that a host answers; see `persist` and `open`.

        Raises:
            UnavailableError: also where the answer is too long, or no JSON.
        """
        answer = self.read(source, MAX_JSON_BYTES + 1, hasty)
        if len(answer) > MAX_JSON_BYTES:
            host, most = host_of(source.url), MAX_JSON_BYTES // MIB
            raise UnavailableError(f"{source.name} cannot be looked up: {host} answered with more than {most} MiB.")
        try:
            return json.loads(answer)
        except (ValueError, RecursionError):
            raise no_answer(source.name, source.url) from None


def no_answer(name: str, url: str) -> UnavailableError:
    """The sentence about a host that answers a question with something else than was asked for."""
    return UnavailableError(f"{name} cannot be looked up: {host_of(url)} sent something else than an answer.")


def retry_after(headers: Mapping[str, str]) -> float | None:
    """The seconds that a host asks to wait, as a number or a date; None where it does not, or not in that form."""
    with contextlib.suppress(KeyError, urllib3.exceptions.InvalidHeader, ValueError):  # ValueError: too many digits
        return urllib3.Retry().parse_retry_after(headers["Retry-After"])
    return None


def _origin(url: str) -> tuple[str, str]:
    parts = urlsplit(url)
    return parts.scheme, parts.netloc.lower()


def _follow(source: Source, url: str, location: str) -> str:
    with contextlib.suppress(UnicodeError):
        # Headers are decoded as Latin-1, but mostly UTF-8.
        location = location.encode("latin-1").decode()
    try:
        url = urljoin(url, location.strip())
    except ValueError:
        url = "http:"  # names no host either
    if (scheme := urlsplit(url).scheme) not in ("http", "https"):
        raise ValueError(f"{source.name} leads to {scheme}: instead of http(s).")
    if not names_host(url):
        raise ValueError(f"{source.name} leads to something that is no address.")
    return url


def _refused_by_proxy(source: Source, host: str, status: int) -> ValueError:
    sentence = f"{source.name} cannot be fetched: the server's proxy answered {_said(status)} for {host}"
    if status == HTTPStatus.PROXY_AUTHENTICATION_REQUIRED:
        return ValueError(f"{sentence}; whoever runs the server has to give it the proxy's user and password.")
    if status >= 500:
        return UnavailableError(f"{sentence}; try again later.")
    return ValueError(f"{sentence}; whoever runs the server decides what that lets through.")


def _said(status: int) -> str:
    return f"{status} {http.client.responses.get(status, '')}".rstrip()  # 404 Not Found


def _refusal(source: Source, url: str, response: urllib3.BaseHTTPResponse, way: str) -> ValueError:
    status, host = response.status, host_of(url)
    if way and status == HTTPStatus.PROXY_AUTHENTICATION_REQUIRED:
        return _refused_by_proxy(source, host, status)
    if source.explain is not None and _origin(url) == _origin(source.url):
        return source.explain(status, response.headers)
    sentence = f"{source.name} cannot be fetched: {host} answered {_said(status)}{way}"
    if status in (408, 425, 429) or status >= 500:
        return UnavailableError(f"{sentence}; try again later.", retry_after(response.headers))
    if host == "replicate.delivery" and status in (403, 404):
        advice = "the files of a prediction are deleted after an hour: name the model as owner/name instead"
    elif status in source.advice:
        advice = source.advice[status]
    elif status in (400, 401, 403):
        advice = "it needs a login, or the link has expired"
    else:
        advice = "there is no such file"
    return ValueError(f"{sentence}; {advice}.")


class Stream(contextlib.AbstractContextManager):
    """The body of a response, as it arrives.

    Attributes:
        url: after redirects.
        place: the URL without its query: a signature is secret, and differs from one redirect to the next.
        status: 200, 206 or 304.
        position: of the next byte, within the file.
        end: the position behind the answer's last byte, where the host states it.
        size: of the whole file, where the host states it.
    """

    def __init__(self, client: Client, source: Source, url: str, response: urllib3.BaseHTTPResponse) -> None:
        self.client, self.source, self._response = client, source, response
        self.url, self.place, self.status, self.headers = url, redact(url), response.status, response.headers
        self.position, self.end, self.size = 0, response.length_remaining, response.length_remaining
        if self.status == HTTPStatus.PARTIAL_CONTENT:
            found = re.fullmatch(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})", response.headers.get("Content-Range", ""))
            self.position, last, self.size = map(int, found.groups()) if found else (-1, -1, None)
            self.end = last + 1
        self._ahead = b""
        self._since, self._counted = time.monotonic(), 0

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()

    def close(self) -> None:
        """Keep the connection for the next request if the body was read to its end, else close it."""
        if self._response.length_remaining == 0:
            self._response.release_conn()
        else:
            self._response.close()

    @property
    def is_part(self) -> bool:
        """Whether it is less than the whole file, by its header."""
        return self.status == HTTPStatus.PARTIAL_CONTENT and (self.position, self.end) != (0, self.size)

    def read(self, limit: int = CHUNK) -> bytes:
        """The next bytes, as soon as there are some; none at the end.

        Raises:
            UnavailableError: the host broke off before the end that it stated, or is too slow.
        """
        data, self._ahead = (self._ahead[:limit], self._ahead[limit:]) if self._ahead else (self._receive(limit), b"")
        self.position += len(data)
        return data

    def peek(self, count: int) -> bytes:
        """The next `count` bytes, fewer at the end; `read` gives them again."""
        parts = [self._ahead]
        missing = count - len(self._ahead)
        while missing > 0 and (data := self._receive(min(missing, CHUNK))):
            parts.append(data)
            missing -= len(data)
        self._ahead = b"".join(parts)
        return self._ahead[:count]

    def _receive(self, limit: int) -> bytes:
        self.client.check()
        try:
            data = self._response.read1(limit, decode_content=False)
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise self.client.broken(self.source, self.url, error) from error
        self._counted += len(data)
        if not data:
            self.client.check()
            if self._response.length_remaining:
                raise self.client.broken(self.source, self.url, ConnectionError())
        elapsed = time.monotonic() - self._since
        if elapsed > self.client.patience.stall:
            if self._counted < SLOWEST * elapsed:
                raise UnavailableError(
                    f"{self.source.name} cannot be fetched: {host_of(self.url)} sends less than "
                    f"{SLOWEST} bytes a second."
                )
            self._since, self._counted = time.monotonic(), 0
        return data
