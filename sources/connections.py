"""Connections of one piece of work: to checked addresses, or through the operator's proxy; ended from another thread.

A host decides how fast it answers, and where its name leads: neither is left to it. This module knows sockets, and what
urllib3 makes of them; it knows nothing of what is asked for, and reads no environment but SSL_CERT_FILE, and no netrc.
"""

import base64
import contextlib
import functools
import http.client
import io
import ipaddress
import os
import re
import socket
import ssl
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from urllib.parse import SplitResult, unquote_to_bytes, urlsplit

import certifi
import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection

# As many as a host that slows each connection down deserves, and fewer than one takes for an attack.
CONNECTIONS = 12
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


class StoppedError(Exception):
    """The caller has given up and waits for nothing any more."""


class PrivateAddressError(OSError):
    """A host's address is not one that a stranger may have us connect to."""


def is_public(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """Whether a stranger may have us connect there; addresses that carry another one inside are judged by that too."""
    if address in METADATA or getattr(address, "scope_id", None) is not None:
        return False
    narrowest = max((block for block in REACHABLE if address in block), key=lambda block: block.prefixlen)
    inner = _embedded(address)
    return REACHABLE[narrowest] and (inner is None or is_public(inner))


def _embedded(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> ipaddress.IPv4Address | None:
    """The IPv4 address that a gateway, or this machine, would turn an IPv6 one into."""
    if address in SIX_TO_FOUR:
        return ipaddress.IPv4Address(int(address) >> 80 & 0xFFFF_FFFF)
    if address in MAPPED or address in NAT64 or (address.version == 6 and int(address) >> 32 & 0xFFFF_FFFF in ISATAP):
        return ipaddress.IPv4Address(int(address) & 0xFFFF_FFFF)
    return None


def basic_login(parts: SplitResult) -> str:
    """The header for the user and the password of an address, which may have any characters."""
    user, password = (
        unquote_to_bytes((text or "").encode(errors="replace")) for text in (parts.username, parts.password)
    )
    return f"Basic {base64.b64encode(user + b':' + password).decode()}"


def _passed(parts: SplitResult, no_proxy: str) -> bool:
    """Whether an address goes past the proxy: by its host, with or without port, its domain, or a block of addresses.

    That is more than the standard library understands: operators write what their other programs do.
    """
    host, with_port = (parts.hostname or "").rstrip("."), parts.netloc.rpartition("@")[2].lower()
    for entry in re.split(r"[\s,]+", no_proxy.lower()):
        name = entry.removeprefix("*").lstrip(".")
        if entry == "*" or (name and (name in (host, with_port) or host.endswith(f".{name}"))):
            return True
        with contextlib.suppress(ValueError):  # one of them is no address
            if ipaddress.ip_address(host) in ipaddress.ip_network(entry.strip("[]"), strict=False):
                return True
    return False


class _Bounded(io.RawIOBase):
    """What a socket receives, until a moment: the socket itself would wait as long for each byte."""

    def __init__(self, sock: socket.socket, received: io.RawIOBase) -> None:
        self._sock, self._received, self._seconds = sock, received, sock.gettimeout()
        self.begin()

    def begin(self) -> None:
        """From now on, what is read has as many seconds in all as the socket had for one byte."""
        self._until = time.monotonic() + self._seconds

    def readable(self) -> bool:
        """It is for reading alone."""
        return True

    def readinto(self, buffer: bytearray | memoryview) -> int | None:
        """The next bytes; TimeoutError where none come in time."""
        self._sock.settimeout(max(self._until - time.monotonic(), 0.001))  # to a socket, 0 means something else
        return self._received.readinto(buffer)

    def close(self) -> None:
        """Let go of the socket."""
        self._received.close()
        super().close()


class _Response(http.client.HTTPResponse):
    """An answer whose header has to come within the socket's timeout as a whole, and so has each piece of its body.

    A host that sends a byte now and then would otherwise keep us as long as it likes: in the header, or in the lines
    that stand between the chunks of a body. A proxy's answer to CONNECT is read through this too.
    """

    def __init__(self, sock: socket.socket, *arguments: object, **options: object) -> None:
        super().__init__(sock, *arguments, **options)
        self._bounded = _Bounded(sock, self.fp.detach())
        self.fp = io.BufferedReader(self._bounded)

    def read1(self, n: int = -1) -> bytes:
        """The next bytes of the body, as soon as there are some."""
        self._bounded.begin()
        return super().read1(n)


class _Checked:
    """A connection whose host is looked up once, checked, and connected to by the address that was checked."""

    response_class = _Response

    def __init__(self, *args: object, owner: "Connections", **options: object) -> None:
        super().__init__(*args, **options)
        self._owner = owner

    def _new_conn(self) -> socket.socket:
        with contextlib.ExitStack() as on_failure:
            # Here a proxy is the host. It is the operator's, and may stand in the server's own network.
            sock = self._owner.connect(self.host, self.port, self.socket_options, trusted=self.proxy is not None)
            on_failure.enter_context(sock)
            # TLS takes the socket out of its object before the handshake, and gives its own only afterwards: until
            # then, this second one is what reaches the connection.
            self._connecting.enter_context(self._owner.within_reach(sock.dup()))
            on_failure.pop_all()
        return sock

    def connect(self) -> None:
        with contextlib.ExitStack() as self._connecting:
            super().connect()
            self._owner.remember(self.sock)


class _CheckedHTTP(_Checked, HTTPConnection): ...


class _CheckedHTTPS(_Checked, HTTPSConnection): ...


class _HTTPPool(urllib3.HTTPConnectionPool):
    ConnectionCls = _CheckedHTTP


class _HTTPSPool(urllib3.HTTPSConnectionPool):
    ConnectionCls = _CheckedHTTPS


@functools.cache
def trusted_authorities() -> ssl.SSLContext:
    """TLS by the system's authorities, by certifi's, since slim images have none, and by SSL_CERT_FILE's.

    Raises:
        ValueError: a sentence, where SSL_CERT_FILE has none; OpenSSL alone would pass over that, and say later that it
            does not know who has signed a host's certificate.
    """
    context = ssl.create_default_context()
    system = ssl.get_default_verify_paths().openssl_cafile  # which OpenSSL leaves out where SSL_CERT_FILE is set
    context.load_verify_locations(certifi.where())
    with contextlib.suppress(OSError):  # there may be none
        context.load_verify_locations(system)
    if named := os.environ.get("SSL_CERT_FILE"):
        try:
            context.load_verify_locations(named)
        except OSError:  # no file, or no certificates
            raise ValueError(
                "SSL_CERT_FILE names no file of certificates in PEM that can be read; it must, or be unset."
            ) from None
    context.set_alpn_protocols(["http/1.1"])  # what uses it speaks nothing newer
    return context


def untrusted(error: Exception) -> str | None:
    """What is wrong with a host's certificate, in what follows a colon; None where an error is about something else.

    REQUESTS_CA_BUNDLE and CURL_CA_BUNDLE, which requests and curl read, are not read here.
    """
    found = re.search(r"certificate verify failed: (.*?)\.? \(_ssl\.c", str(error))
    if found is None:
        return None
    if "issuer" not in found[1] and "self-signed" not in found[1]:
        return f"{found[1]}."
    return f"{found[1]}; whoever runs the server can name a file with the right authority in SSL_CERT_FILE."


class Connections:
    """The connections of one piece of work; another thread can end them.

    Args:
        allow_private: whether private and loopback addresses may be connected to.
        proxies: the operator's, by the scheme that they are for ("all": any), and under "no" what goes past them.
        connect: how many seconds a host may take to be connected to.
        stall: how many seconds it may be silent, and may take for its header.
    """

    def __init__(self, *, allow_private: bool, proxies: Mapping[str, str], connect: float, stall: float) -> None:
        self.stopped = threading.Event()
        self._allow_private, self._proxies, self._seconds_to_connect = allow_private, proxies, connect
        self._timeout = urllib3.Timeout(connect=connect, read=stall)
        self._sockets: set[socket.socket] = set()
        used = {address for scheme, address in proxies.items() if scheme != "no"}
        self._managers = {proxy: self._manager(proxy) for proxy in (None, *used)}

    def _manager(self, proxy: str | None) -> urllib3.PoolManager:
        options = {"maxsize": CONNECTIONS, "ssl_context": trusted_authorities(), "timeout": self._timeout}
        if proxy is None:
            manager = urllib3.PoolManager(**options)
        else:
            parts = urlsplit(proxy)
            headers = {} if parts.username is None else {"Proxy-Authorization": basic_login(parts)}
            address = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
            manager = urllib3.ProxyManager(
                address, proxy_headers=headers, proxy_ssl_context=trusted_authorities(), **options
            )
        manager.pool_classes_by_scheme = {
            "http": functools.partial(_HTTPPool, owner=self),
            "https": functools.partial(_HTTPSPool, owner=self),
        }
        return manager

    def ask(self, url: str, headers: Mapping[str, str], form: bytes | None = None) -> urllib3.BaseHTTPResponse:
        """Ask for what lies at a URL, by POST where a form is sent along, without following redirects.

        Raises:
            urllib3.exceptions.HTTPError, OSError, UnicodeError: there is no answer.
            StoppedError: it was stopped, which may also show as one of the others.
        """
        self.check()
        method, typed = "GET", {}
        if form is not None:
            method, typed = "POST", {"Content-Type": "application/x-www-form-urlencoded"}
        return self._managers[self.proxy(url)].request(
            method, url, headers={**headers, **typed}, body=form, redirect=False, retries=False, preload_content=False
        )

    def proxy(self, url: str) -> str | None:
        """The proxy that a URL is asked through; None where it is asked itself.

        The name of the host is then looked up by the proxy, which decides what may be reached.
        """
        parts = urlsplit(url)
        proxy = self._proxies.get(parts.scheme) or self._proxies.get("all")
        return None if proxy is None or _passed(parts, self._proxies.get("no", "")) else proxy

    def stop(self) -> None:
        """End everything under way, and close all connections."""
        self.stopped.set()
        self.disconnect()
        for manager in self._managers.values():
            manager.clear()

    def disconnect(self) -> None:
        """Wake every thread that waits for a host; to be called from any thread."""
        for sock in list(self._sockets):
            with contextlib.suppress(OSError):
                # Past SSLSocket's own method, which is not made for another thread.
                socket.socket.shutdown(sock, socket.SHUT_RDWR)

    def check(self) -> None:
        """Raise `StoppedError` after `stop`."""
        if self.stopped.is_set():
            raise StoppedError

    def connect(
        self, host: str, port: int, options: Sequence[tuple[int, int, int]] | None, *, trusted: bool
    ) -> socket.socket:
        """Look the host up, and connect to an address of it that may be connected to: to any of a trusted one.

        Raises:
            OSError: it cannot be found or reached, or one of its addresses is not public.
        """
        found = [entry[4][0] for entry in socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)]
        for address in found:
            if not (trusted or self._allow_private or is_public(ipaddress.ip_address(address))):
                raise PrivateAddressError(host)
        for address in found:
            self.check()
            try:
                sock = urllib3.util.connection.create_connection(
                    (address, port), self._seconds_to_connect, None, options
                )
            except OSError as error:
                reason = error
            else:
                return sock
        raise reason

    @contextlib.contextmanager
    def within_reach(self, sock: socket.socket) -> Iterator[None]:
        """A connection that `disconnect` closes until the end of the context, which closes the socket."""
        with sock:
            try:
                self.remember(sock)
                yield
            finally:
                self._sockets.discard(sock)

    def remember(self, sock: socket.socket) -> None:
        """A connection that `disconnect` closes."""
        # TLS within TLS is no socket, but has one.
        self._sockets.add(getattr(sock, "socket", sock))
        self.check()
