"""Protection of a server without a login: clients of this machine are answered, foreign pages in its browser are not.

Any web page can have the browser send forms and text to loopback, and can read the answers if its own host name is
changed to lead there (DNS rebinding). The browser's headers give such requests away: `Host` is that name, `Origin` is
the page's, and a page may not send `application/json` to another origin. This module knows headers, and no framework.
"""

import re
from collections.abc import Iterable

_OCTET = r"(?:\d|[1-9]\d|1\d\d|2[0-4]\d|25[0-5])"
# As browsers send them: they rewrite other spellings of an address, such as 127.1 or 0x7f.0.0.1.
_LOOPBACK = re.compile(
    rf"(?:localhost\.?|\[::1\]|127(?:\.{_OCTET}){{3}})(?::[1-9]\d{{0,4}})?", re.ASCII | re.IGNORECASE
)
_DEFAULT_PORTS = {"http": ":80", "https": ":443"}


def find_fault(headers: Iterable[tuple[str, str]], *, form: bool = False) -> tuple[int, str] | None:
    """Why a request may be a foreign page's: a status of HTTP and a sentence that begins with the header; None if not.

    The headers are as they came, repeated ones too; only browsers send `Origin`. With `form`, the body may be a form
    instead of JSON, which foreign pages can send too: only `Origin` shows them.
    """
    given: dict[str, list[str]] = {}
    for name, value in headers:
        given.setdefault(name.lower(), []).append(value)
    host, origin, kind = (",".join(given.get(name, [])) for name in ("host", "origin", "content-type"))
    # Not 421, after which clients may ask again over another connection.
    if not _LOOPBACK.fullmatch(host):
        return 403, f"Host is {host[:80]!r}; it must be localhost, [::1] or 127.0.0.1, with or without a port."
    if "origin" in given and not _is_same(origin, host):
        return 403, f"Origin is {origin[:80]!r}; it must be that of Host, http://{host}, or absent."
    has_body = "transfer-encoding" in given or given.get("content-length", ["0"]) != ["0"]
    if has_body and not form and kind.partition(";")[0].strip().lower() != "application/json":
        return 415, f"Content-Type is {kind[:80]!r}; it must be application/json."
    return None


def _is_same(origin: str, host: str) -> bool:
    """Whether pages of an origin come from this host and port."""
    scheme, _, place = origin.partition("://")
    port = _DEFAULT_PORTS.get(scheme)
    return port is not None and place.removesuffix(port) == host.removesuffix(port)
