"""The address at which a client reaches this cluster, by headers that are trusted; URLs in answers begin with it."""

import ipaddress
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the settings, and with them the harness, are read where the cluster's packages are not installed
    from starlette.requests import Request

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
_HOST = re.compile(r"(?:[A-Za-z0-9_][A-Za-z0-9_.-]{0,252}|\[[0-9A-Fa-f:.]{2,45}\])(?::(\d{1,5}))?", re.ASCII)


class BadHost(ValueError):  # noqa: N818 (an answer, not an accident)
    """A request with an unusable Host or X-Forwarded-Proto; a sentence."""


def is_host(text: str) -> bool:
    """Whether a text is a host's name or address, with a port or without."""
    found = _HOST.fullmatch(text)
    return found is not None and 0 < int(found[1] or 80) < 2**16


@dataclass(frozen=True)
class Addresses:
    """How the address of a front is found."""

    public_url: str | None  # used for every client if it is set; without a slash at its end
    trusted_proxies: tuple[Network, ...]  # whose X-Forwarded-Host and X-Forwarded-Proto count

    def base(self, request: "Request") -> str:
        """The address at which a request's client reaches this front, such as https://example.com; BadHost without one.

        Of several values the last counts: the trusted proxy has added it to those that it received.
        """
        if self.public_url is not None:
            return self.public_url
        scheme, host = request.scope["scheme"], ",".join(request.headers.getlist("host"))
        if self._trusts(request):
            scheme = _last(request, "x-forwarded-proto") or scheme
            host = _last(request, "x-forwarded-host") or host
        if not host:  # as in HTTP/1.0
            address, port = request.scope["server"]
            host = f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
        if scheme not in ("http", "https"):
            raise BadHost(f"X-Forwarded-Proto is {scheme[:80]!r}; it must be http or https.")
        if not is_host(host):
            raise BadHost(f"Host is {host[:80]!r}; it must be a host's name or address, such as example.com:8000.")
        return f"{scheme}://{host}"

    def _trusts(self, request: "Request") -> bool:
        if request.client is None:
            return False
        address = ipaddress.ip_address(request.client.host)
        address = getattr(address, "ipv4_mapped", None) or address
        return any(address in network for network in self.trusted_proxies)


def _last(request: "Request", header: str) -> str | None:
    values = ",".join(request.headers.getlist(header)).split(",")
    return values[-1].strip() or None
