"""Connections of one piece of work: to checked addresses, or through the operator's proxy; ended from another thread.

A host chooses the addresses of its name and the speed of its answers: here, around urllib3, addresses are checked and
times are bounded. Of the environment only SSL_CERT_FILE is read, and no netrc.
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
from urllib3.util import connection

# For one download: enough where a host slows each connection down, too few to be taken for an attack.
CONNECTIONS = 12
# Azure's metadata host, which gives secrets to its machines, has an address that looks public.
METADATA = {ipaddress.ip_address("168.63.129.16")}
# Whether blocks of addresses are reachable from everywhere: the column "Globally Reachable" of IANA's special-purpose
# address registries for IPv4 and IPv6, within the space for unicast. The narrowest block with an address counts.
# Python's ipaddress has the registries as they were at its own release.
REACHABLE = {
    ipaddress.ip_network(block): reachable
    for reachable, blocks in (
        (True, "0.0.0.0/0"),
        (False, "0.0.0.0/8 127.0.0.0/8 169.254.0.0/16"),  # this network, loopback, link-local
        (False, "10.0.0.0/8 172.16.0.0/12 192.168.0.0/16 100.64.0.0/10"),  # private, shared by a carrier's customers
        (False, "192.0.0.0/24 192.88.99.0/24 198.18.0.0/15"),  # protocol assignments, 6to4 relays, benchmarking
        (True, "192.0.0.9/32 192.0.0.10/32"),  # anycast: port control, TURN
        (False, "192.0.2.0/24 198.51.100.0/24 203.0.113.0/24"),  # documentation
        (False, "224.0.0.0/4 240.0.0.0/4"),  # multicast; reserved, and broadcast
        (False, "::/0"),  # all but 2000::/3: unspecified, loopback, IPv4-compatible, private, link- and site-local ...
        (True, "2000::/3"),  # global unicast
        (True, "::ffff:0:0/96 64:ff9b::/96 2002::/16"),  # IPv4-mapped, NAT64, 6to4: see `_embedded`
        (False, "2001::/23"),  # protocol assignments, with Teredo, benchmarking and the first ORCHIDs
        (True, "2001:1::1/128 2001:1::2/128 2001:1::3/128"),  # anycast: port control, TURN, DNS service registration
        (True, "2001:3::/32 2001:4:112::/48"),  # multicast tunnels' relays, AS112's name servers
        (True, "2001:20::/28 2001:30::/28"),  # ORCHIDv2, drones' identities
        (False, "2001:db8::/32 3fff::/20"),  # documentation
    )
    for block in blocks.split()
}
NAT64 = ipaddress.ip_network("64:ff9b::/96")
# The four bytes before the IPv4 address at the end of an ISATAP address, under any prefix.
ISATAP = (0x0000_5EFE, 0x0200_5EFE)


class StoppedError(Exception):
    """The caller has given up."""


class PrivateAddressError(OSError):
    """A stranger's host has an address that is not public."""


def is_public(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """Whether a stranger may make us connect there; an IPv4 address embedded in an IPv6 one must be public too."""
    if address in METADATA or getattr(address, "scope_id", None) is not None:
        return False
    narrowest = max((block for block in REACHABLE if address in block), key=lambda block: block.prefixlen)
    inner = _embedded(address)
    return REACHABLE[narrowest] and (inner is None or is_public(inner))


def _embedded(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> ipaddress.IPv4Address | None:
    """The IPv4 address that a gateway, or this machine, would turn an IPv6 one into."""
    if address.version == 4:
        return None
    at_end = address in NAT64 or int(address) >> 32 & 0xFFFF_FFFF in ISATAP
    last = ipaddress.IPv4Address(int(address) & 0xFFFF_FFFF) if at_end else None
    return address.sixtofour or address.ipv4_mapped or last


def split_login(url: str) -> tuple[str, str | None]:
    """A URL without its login, which may have any characters, and the header for it; None where there is no login."""
    parts = urlsplit(url)
    address = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
    if parts.username is None:
        return address, None
    user, password = (
        unquote_to_bytes((text or "").encode(errors="replace")) for text in (parts.username, parts.password)
    )
    return address, f"Basic {base64.b64encode(user + b':' + password).decode()}"


def _passed(parts: SplitResult, no_proxy: str) -> bool:
    """Whether NO_PROXY lists an address: its host, with or without port, its domain, or a block of addresses.

    The standard library understands no ports and no blocks, which operators write for their other programs.
    """
    host, with_port = (parts.hostname or "").rstrip("."), parts.netloc.rpartition("@")[2].lower()
    for entry in re.split(r"[\s,]+", no_proxy.lower()):
        name = entry.removeprefix("*").lstrip(".")
        if entry == "*" or (name and (name in (host, with_port) or host.endswith(f".{name}"))):
            return True
        with contextlib.suppress(ValueError):  # the host or the entry is no IP address
            if ipaddress.ip_address(host) in ipaddress.ip_network(entry.strip("[]"), strict=False):
                return True
    return False


class _Bounded(io.RawIOBase):
    """The bytes from a socket, with one timeout for several reads: the socket would wait as long for each byte."""

    def __init__(self, sock: socket.socket, received: io.RawIOBase) -> None:
        self._sock, self._received, self._seconds = sock, received, sock.gettimeout()
        self.begin()

    def begin(self) -> None:
        """Give all reads from now on, together, the seconds that the socket would give each."""
        self._until = time.monotonic() + self._seconds

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray | memoryview) -> int | None:
        """The next bytes; TimeoutError where none come in time."""
        self._sock.settimeout(max(self._until - time.monotonic(), 0.001))  # 0 would make the socket non-blocking
        return self._received.readinto(buffer)

    def close(self) -> None:
        self._received.close()
        super().close()


class _Response(http.client.HTTPResponse):
    """An answer with the socket's timeout for the whole header, and for each piece of the body.

    Otherwise a host could hold us for ever by sending a byte now and then: in the header, or in the lines between the
    chunks of a body. A proxy's answer to CONNECT is read through this too.
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
    """A connection to an address that was checked: the host's name is looked up only once."""

    response_class = _Response

    def __init__(self, *args: object, owner: "Connections", **options: object) -> None:
        super().__init__(*args, **options)
        self._owner = owner

    def _new_conn(self) -> socket.socket:
        with contextlib.ExitStack() as on_failure:
            # `self.host` is the proxy where there is one: it is the operator's, and may have a private address.
            sock = self._owner.connect(self.host, self.port, self.socket_options, trusted=self.proxy is not None)
            on_failure.enter_context(sock)
            # TLS detaches the socket before the handshake, and has its own only afterwards: until then, `disconnect`
            # needs this duplicate.
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
    """TLS with the system's authorities, certifi's, since slim images have none, and SSL_CERT_FILE's.

    Raises:
        ValueError: a sentence, where SSL_CERT_FILE has none; OpenSSL would ignore that, and refuse hosts later.
    """
    context = ssl.create_default_context()
    context.load_verify_locations(certifi.where())
    with contextlib.suppress(OSError):  # there may be none
        # OpenSSL itself ignores the system's authorities where SSL_CERT_FILE is set.
        context.load_verify_locations(ssl.get_default_verify_paths().openssl_cafile)
    if named := os.environ.get("SSL_CERT_FILE"):
        try:
            context.load_verify_locations(named)
        except OSError:  # no file, or no certificates
            raise ValueError(
                "SSL_CERT_FILE names no file of certificates in PEM that can be read; it must, or be unset."
            ) from None
    context.set_alpn_protocols(["http/1.1"])  # its users speak nothing newer
    return context


def untrusted(error: Exception) -> str | None:
    """The fault of a host's certificate, as the end of a sentence; None for an error about something else."""
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
        proxies: the operator's, by the scheme that they are for ("all": any), and NO_PROXY under "no".
        connect: the seconds for connecting to a host.
        stall: the seconds that a host may be silent, and may take for its header.
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
            address, login = split_login(proxy)
            headers = {"Proxy-Authorization": login} if login else {}
            manager = urllib3.ProxyManager(
                address, proxy_headers=headers, proxy_ssl_context=trusted_authorities(), **options
            )
        manager.pool_classes_by_scheme = {
            "http": functools.partial(_HTTPPool, owner=self),
            "https": functools.partial(_HTTPSPool, owner=self),
        }
        return manager

    def ask(self, url: str, headers: Mapping[str, str], form: bytes | None = None) -> urllib3.BaseHTTPResponse:
        """The answer to a GET, or to a POST if there is a form; redirects are not followed.

        Raises:
            urllib3.exceptions.HTTPError, OSError, UnicodeError: there is no answer, perhaps because it was stopped.
            StoppedError: it was stopped.
        """
        self.check()
        if form is not None:
            headers = {**headers, "Content-Type": "application/x-www-form-urlencoded"}
        options = {"headers": headers, "body": form, "redirect": False, "retries": False, "preload_content": False}
        return self._managers[self.proxy(url)].request("GET" if form is None else "POST", url, **options)

    def proxy(self, url: str) -> str | None:
        """The proxy for a URL, if any: it then looks up the host, and decides which hosts may be reached."""
        parts = urlsplit(url)
        proxy = self._proxies.get(parts.scheme) or self._proxies.get("all")
        return None if proxy is None or _passed(parts, self._proxies.get("no", "")) else proxy

    def stop(self) -> None:
        """Close all connections, now and later: threads that wait for a host get `StoppedError`."""
        self.stopped.set()
        self.disconnect()
        for manager in self._managers.values():
            manager.clear()

    def disconnect(self) -> None:
        """Wake every thread that waits for a host; to be called from any thread."""
        for sock in list(self._sockets):
            with contextlib.suppress(OSError):
                # SSLSocket's own method is not safe from another thread.
                socket.socket.shutdown(sock, socket.SHUT_RDWR)

    def check(self) -> None:
        """Raise `StoppedError` after `stop`."""
        if self.stopped.is_set():
            raise StoppedError

    def connect(
        self, host: str, port: int, options: Sequence[tuple[int, int, int]] | None, *, trusted: bool
    ) -> socket.socket:
        """A connection to a host; `OSError` if none can be made, or if an untrusted host has a private address."""
        found = [entry[4][0] for entry in socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)]
        for address in found:
            if not (trusted or self._allow_private or is_public(ipaddress.ip_address(address))):
                raise PrivateAddressError(host)
        for address in found:
            self.check()
            try:
                return connection.create_connection((address, port), self._seconds_to_connect, None, options)
            except OSError as error:
                reason = error
        raise reason

    @contextlib.contextmanager
    def within_reach(self, sock: socket.socket) -> Iterator[None]:
        """Let `disconnect` shut a socket down until the end of the context, which closes it."""
        with sock:
            try:
                self.remember(sock)
                yield
            finally:
                self._sockets.discard(sock)

    def remember(self, sock: socket.socket) -> None:
        """Let `disconnect` shut a socket down."""
        self._sockets.add(getattr(sock, "socket", sock))  # urllib3's TLS within TLS is no socket, but has one
        self.check()
