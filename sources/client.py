"""HTTP connections to checked addresses: asked again where a host is busy, and stopped from another thread.

This module knows HTTP and sockets. It knows neither what is asked for nor where it is kept, and it reads no
environment: no proxy, which would connect where it likes, and no netrc.
"""

import contextlib
import functools
import ipaddress
import json
import random
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from http import HTTPStatus
from typing import TypeVar
from urllib.parse import unquote, urljoin, urlsplit

import certifi
import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection

from settings import MIB
from sources.shown import redact

T = TypeVar("T")
# As many as a host that slows each connection down deserves, and fewer than one takes for an attack.
CONNECTIONS = 12
# Read at once. Larger ones are mapped and unmapped each time, which costs more than the calls that they save.
CHUNK = 128 * 1024
MAX_REDIRECTS = 10
# A model of CivitAI with a hundred versions and their pictures has one.
MAX_JSON_BYTES = 8 * MIB
SLOWEST = 1024  # bytes a second, of one connection
# Azure's host for its machines, which hands out secrets from what looks like a public address.
METADATA = {ipaddress.ip_address("168.63.129.16")}
# Blocks of addresses, and whether they are reachable from everywhere: IANA's special-purpose address registries for
# IPv4 and IPv6 by their column "Globally Reachable", within the space for unicast. An address is in several: the
# narrowest counts. Here and not from Python's ipaddress, which has them as they were at its own release.
REACHABLE = {
    ipaddress.ip_network(block): reachable
    for block, reachable in (
        ("0.0.0.0/0", True),
        ("0.0.0.0/8", False),  # "this network"
        ("10.0.0.0/8", False),  # private
        ("100.64.0.0/10", False),  # shared by a carrier's customers
        ("127.0.0.0/8", False),  # loopback
        ("169.254.0.0/16", False),  # link-local
        ("172.16.0.0/12", False),  # private
        ("192.0.0.0/24", False),  # protocol assignments
        ("192.0.0.9/32", True),  # port control, anycast
        ("192.0.0.10/32", True),  # TURN, anycast
        ("192.0.2.0/24", False),  # documentation
        ("192.88.99.0/24", False),  # 6to4 relays, deprecated
        ("192.168.0.0/16", False),  # private
        ("198.18.0.0/15", False),  # benchmarking
        ("198.51.100.0/24", False),  # documentation
        ("203.0.113.0/24", False),  # documentation
        ("224.0.0.0/4", False),  # multicast
        ("240.0.0.0/4", False),  # reserved, and broadcast
        ("::/0", False),  # all but 2000::/3: unspecified, loopback, IPv4-compatible, private, link- and site-local ...
        ("::ffff:0:0/96", True),  # IPv4-mapped, which sockets connect to as IPv4: see `_embedded`
        ("64:ff9b::/96", True),  # NAT64: see `_embedded`
        ("2000::/3", True),  # global unicast
        ("2001::/23", False),  # protocol assignments, with Teredo, benchmarking and the first ORCHIDs
        ("2001:1::1/128", True),  # port control, anycast
        ("2001:1::2/128", True),  # TURN, anycast
        ("2001:1::3/128", True),  # DNS service registration, anycast
        ("2001:3::/32", True),  # multicast tunnels' relays
        ("2001:4:112::/48", True),  # AS112's name servers
        ("2001:20::/28", True),  # ORCHIDv2
        ("2001:30::/28", True),  # drones' identities
        ("2001:db8::/32", False),  # documentation
        ("2002::/16", True),  # 6to4: see `_embedded`
        ("3fff::/20", False),  # documentation
    )
}
MAPPED, NAT64, SIX_TO_FOUR = map(ipaddress.ip_network, ("::ffff:0:0/96", "64:ff9b::/96", "2002::/16"))
# What stands before the IPv4 address in the interface part of an ISATAP address, under any prefix.
ISATAP = (0x0000_5EFE, 0x0200_5EFE)


@dataclass(frozen=True)
class Patience:
    """How long a host may keep a prediction waiting, in seconds."""

    connect: float = 10
    # Without a byte, or with fewer than SLOWEST a second.
    stall: float = 30
    # Before the second, third ... attempt; a host's Retry-After up to the longest counts instead.
    pauses: tuple[float, ...] = (0.5, 1, 2, 4)
    longest_pause: float = 30

    def within(self, seconds: float) -> "Patience":
        """No more of it than so many seconds, for one silence."""
        seconds = max(seconds, 0.1)  # to a socket, 0 means something else
        return replace(self, connect=min(self.connect, seconds), stall=min(self.stall, seconds))


@dataclass(frozen=True)
class Source:
    """Where a file's bytes are now, and what its host states about them."""

    name: str  # as it may be shown
    url: str = field(repr=False)
    token: str | None = field(default=None, repr=False)  # for the host of `url` alone
    key: str | None = None  # what names this content for ever: a version, a commit, a hash
    sha256: str | None = None
    size: int | None = None
    trigger_words: tuple[str, ...] = ()
    # What to do about a status, and about a web page instead of the file, as the end of a sentence.
    advice: Mapping[int, str] = field(default_factory=dict)
    web_page: str | None = None
    config: "Source | None" = None  # what lies beside it, see `configs`


class UnavailableError(ValueError):
    """The host is down, overloaded or broke off: the same request may succeed later."""

    def __init__(self, sentence: str, pause: float | None = None) -> None:
        super().__init__(sentence)
        self.pause = pause  # what the host asked for, in seconds


class StoppedError(Exception):
    """The caller has given up and waits for nothing any more."""


def _is_public(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """Whether a stranger may have us connect there; addresses that carry another one inside are judged by that too."""
    if address in METADATA or getattr(address, "scope_id", None) is not None:
        return False
    narrowest = max((block for block in REACHABLE if address in block), key=lambda block: block.prefixlen)
    inner = _embedded(address)
    return REACHABLE[narrowest] and (inner is None or _is_public(inner))


def _embedded(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> ipaddress.IPv4Address | None:
    """The IPv4 address that a gateway, or this machine, would turn an IPv6 one into."""
    if address in SIX_TO_FOUR:
        return ipaddress.IPv4Address(int(address) >> 80 & 0xFFFF_FFFF)
    if address in MAPPED or address in NAT64 or (address.version == 6 and int(address) >> 32 & 0xFFFF_FFFF in ISATAP):
        return ipaddress.IPv4Address(int(address) & 0xFFFF_FFFF)
    return None


class _PrivateAddressError(OSError): ...


class _Checked:
    """A connection whose host is looked up once, checked, and connected to by the address that was checked."""

    def __init__(self, *args: object, client: "Client", **options: object) -> None:
        super().__init__(*args, **options)
        self._client = client

    def _new_conn(self) -> socket.socket:
        return self._client.connect(self.host, self.port, self.socket_options)

    def connect(self) -> None:
        super().connect()
        self._client.remember(self.sock)


class _CheckedHTTP(_Checked, HTTPConnection): ...


class _CheckedHTTPS(_Checked, HTTPSConnection): ...


class _HTTPPool(urllib3.HTTPConnectionPool):
    ConnectionCls = _CheckedHTTP


class _HTTPSPool(urllib3.HTTPSConnectionPool):
    ConnectionCls = _CheckedHTTPS


@functools.cache
def _tls() -> ssl.SSLContext:
    """The system's authorities (and SSL_CERT_FILE's), and certifi's, since slim images have none."""
    context = ssl.create_default_context()
    context.load_verify_locations(certifi.where())
    return context


class Client:
    """The connections of one piece of work; another thread can stop it.

    Args:
        allow_private: whether private and loopback addresses may be connected to.
        patience: how long a host may keep us waiting.
    """

    def __init__(self, *, allow_private: bool, patience: Patience) -> None:
        self.patience = patience
        self._allow_private = allow_private
        self._sockets: set[socket.socket] = set()
        self._stopped = threading.Event()
        self._pool = urllib3.PoolManager(
            maxsize=CONNECTIONS,
            ssl_context=_tls(),
            timeout=urllib3.Timeout(connect=patience.connect, read=patience.stall),
        )
        self._pool.pool_classes_by_scheme = {
            "http": functools.partial(_HTTPPool, client=self),
            "https": functools.partial(_HTTPSPool, client=self),
        }

    def stop(self) -> None:
        """End everything under way, and close all connections: threads that wait for a host get `StoppedError`."""
        self._stopped.set()
        self.disconnect()
        self._pool.clear()

    def disconnect(self) -> None:
        """Wake every thread that waits for a host; to be called from any thread."""
        for sock in list(self._sockets):
            with contextlib.suppress(OSError):
                # Past SSLSocket's own method, which is not made for another thread.
                socket.socket.shutdown(sock, socket.SHUT_RDWR)

    def check(self) -> None:
        """Raise `StoppedError` after `stop`."""
        if self._stopped.is_set():
            raise StoppedError

    def connect(self, host: str, port: int, options: Sequence[tuple[int, int, int]] | None) -> socket.socket:
        """Look the host up, and connect to an address of it that may be connected to.

        Raises:
            OSError: it cannot be found or reached, or one of its addresses is not public.
        """
        found = [entry[4][0] for entry in socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)]
        for address in found:
            if not self._allow_private and not _is_public(ipaddress.ip_address(address)):
                raise _PrivateAddressError(host)
        for address in found:
            self.check()
            try:
                return urllib3.util.connection.create_connection((address, port), self.patience.connect, None, options)
            except OSError as error:
                reason = error
        raise reason

    def remember(self, sock: socket.socket) -> None:
        """A connection that `disconnect` closes."""
        self._sockets.add(sock)
        self.check()

    def persist(self, attempt: Callable[[], T], hasty: bool = False) -> T:
        """Try again while the host is unavailable, after growing pauses or those that it asks for; `hasty`: do not."""
        for pause in (*(() if hasty else self.patience.pauses), None):
            try:
                return attempt()
            except UnavailableError as error:
                self.check()
                if pause is None or (error.pause or 0) > self.patience.longest_pause:
                    raise
                self.pause(error.pause or pause)
        raise AssertionError

    def pause(self, seconds: float) -> None:
        """Wait, for a little longer than that: many who were refused together should not come back together."""
        if self._stopped.wait(seconds * random.uniform(1, 1.25)):
            raise StoppedError

    def open(self, source: Source, headers: Mapping[str, str] | None = None, url: str | None = None) -> "Stream":
        """Ask for a file, following redirects.

        Args:
            source: what is asked for.
            headers: added to the request.
            url: where an earlier request was redirected to.

        Raises:
            UnavailableError: the host cannot be reached, answers 429 or 5xx.
            ValueError: any other refusal, with what to do about it.
        """
        token = source.token if url is None else None
        url = url or source.url
        for _ in range(MAX_REDIRECTS):
            response = self._request(source, url, headers or {}, token)
            location = response.headers.get("Location")
            if response.status not in (301, 302, 303, 307, 308) or location is None:
                break
            response.close()
            # The token was for the host that the source lies on, not for whatever that one trusts.
            url, token = _follow(source, url, location), None
        else:
            raise ValueError(
                f"{source.name} was redirected more than {MAX_REDIRECTS} times; the link leads in a circle."
            )
        if response.status >= 300 and response.status != HTTPStatus.NOT_MODIFIED:
            response.close()
            raise _refusal(source, url, response)
        return Stream(self, source, url, response)

    def _request(
        self, source: Source, url: str, headers: Mapping[str, str], token: str | None
    ) -> urllib3.BaseHTTPResponse:
        self.check()
        sent = {"User-Agent": "flux-sprites", "Accept": "*/*", "Accept-Encoding": "identity", **headers}
        if token is not None:
            sent["Authorization"] = f"Bearer {token}"
        parts = urlsplit(url)
        if parts.username is not None and token is None:
            login = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
            sent |= urllib3.make_headers(basic_auth=login)
        url = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
        try:
            return self._pool.request("GET", url, headers=sent, redirect=False, retries=False, preload_content=False)
        except (urllib3.exceptions.HTTPError, OSError, UnicodeError) as error:
            self.check()
            raise _broken(source, url, error) from error

    def read(self, source: Source, size: int, hasty: bool = False) -> bytes:
        """The first `size` bytes of a file, fewer where it has no more.

        Raises:
            UnavailableError: the host is down, and stays so.
            ValueError: it refuses.
        """

        def attempt() -> bytes:
            with self.open(source) as stream:
                return stream.peek(size)

        return self.persist(attempt, hasty)

    def json(self, source: Source, hasty: bool = False) -> object:
        """A host's answer about a file.

        Raises:
            UnavailableError: the host is down, and stays so.
            ValueError: it refuses, or answers something else.
        """
        answer = self.read(source, MAX_JSON_BYTES, hasty)
        try:
            return json.loads(answer)
        except (ValueError, RecursionError):
            host = urlsplit(source.url).hostname
            raise UnavailableError(
                f"{source.name} cannot be looked up: {host} sent something else than an answer."
            ) from None


def _follow(source: Source, url: str, location: str) -> str:
    """Where a redirect leads."""
    try:
        url = urljoin(url, location)
        scheme = urlsplit(url).scheme
    except ValueError:
        raise ValueError(f"{source.name} leads to something that is no address.") from None
    if scheme not in ("http", "https"):
        raise ValueError(f"{source.name} leads to {scheme}: instead of http(s).")
    return url


def _broken(source: Source, url: str, error: Exception) -> ValueError:
    """A sentence about a connection that failed."""
    host = urlsplit(url).hostname
    if isinstance(error, urllib3.exceptions.ProtocolError) and isinstance(error.args[-1], Exception):
        error = error.args[-1]
    if isinstance(error, _PrivateAddressError):
        return ValueError(
            f"{source.name} cannot be fetched: {host} is an address of the server's own network; it must be a public "
            "one, unless whoever runs the server sets WEIGHTS_ALLOW_PRIVATE_HOSTS=1."
        )
    if isinstance(error, urllib3.exceptions.LocationValueError | UnicodeError):
        return ValueError(f"{source.name} is no address that can be connected to.")
    if isinstance(error, urllib3.exceptions.SSLError) and "CERTIFICATE" in str(error):
        return ValueError(f"{source.name} cannot be fetched: the certificate of {host} is not valid.")
    if isinstance(error, socket.gaierror):
        return UnavailableError(f"{source.name} cannot be fetched: there is no host {host}, or it cannot be looked up.")
    if isinstance(error, urllib3.exceptions.TimeoutError | TimeoutError):
        return UnavailableError(f"{source.name} cannot be fetched: {host} does not answer.")
    return UnavailableError(f"{source.name} cannot be fetched: the connection to {host} failed or broke off.")


def _refusal(source: Source, url: str, response: urllib3.BaseHTTPResponse) -> ValueError:
    """A sentence about an answer that is none."""
    status, host = response.status, urlsplit(url).hostname
    phrase = HTTPStatus(status).phrase if status in HTTPStatus._value2member_map_ else ""
    sentence = f"{source.name} cannot be fetched: {host} answered {status} {phrase}".rstrip()
    if status in (408, 425, 429) or status >= 500:
        # The latter: more digits than Python makes a number of.
        with contextlib.suppress(urllib3.exceptions.InvalidHeader, ValueError):
            return UnavailableError(f"{sentence}; try again later.", urllib3.Retry().get_retry_after(response))
        return UnavailableError(f"{sentence}; try again later.")
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
    """The body of one response, as it arrives.

    Attributes:
        client, source: what asked, and for what.
        url: where the redirects led.
        place: the same without what changes from one signed address to the next, and is secret.
        status: 200, 206 or 304.
        position: of the next byte, within the file.
        end: the position behind the last byte, where the host states it.
        size: of the whole file, where the host states it.
    """

    def __init__(self, client: Client, source: Source, url: str, response: urllib3.BaseHTTPResponse) -> None:
        self.url, self.status, self.headers = url, response.status, response.headers
        self.place = redact(url)
        self.client, self.source, self._response = client, source, response
        self.position, self.end = 0, response.length_remaining
        self.size = self.end
        if self.status == HTTPStatus.PARTIAL_CONTENT:
            found = re.fullmatch(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})", response.headers.get("Content-Range", ""))
            self.position, last, self.size = map(int, found.groups()) if found else (-1, -1, None)
            self.end = last + 1
        self._ahead = b""
        self._since, self._counted = time.monotonic(), 0

    def __exit__(self, *_: object) -> None:
        """See `close`."""
        self.close()

    def close(self) -> None:
        """Keep the connection for the next request where the body was read to its end, else close it."""
        if self._response.length_remaining == 0:
            self._response.release_conn()
        else:
            self._response.close()

    @property
    def validators(self) -> dict[str, str]:
        """The headers that tell whether the file is still the same, where the host sends them."""
        return {name: self.headers[name] for name in ("ETag", "Last-Modified") if name in self.headers}

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
            self.client.check()
            raise _broken(self.source, self.url, error) from error
        self._counted += len(data)
        if not data:
            self.client.check()
            if self._response.length_remaining:
                raise _broken(self.source, self.url, ConnectionError())
        elapsed = time.monotonic() - self._since
        if elapsed > self.client.patience.stall:
            if self._counted < SLOWEST * elapsed:
                raise UnavailableError(
                    f"{self.source.name} cannot be fetched: {urlsplit(self.url).hostname} sends less than "
                    f"{SLOWEST} bytes a second."
                )
            self._since, self._counted = time.monotonic(), 0
        return data
