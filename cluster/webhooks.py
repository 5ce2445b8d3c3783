"""Webhooks: signed requests that tell a client about its prediction, in order.

This module knows where they may go, how often and in which order; `forms.py` makes their bodies.
"""

import asyncio
import base64
import contextlib
import hmac
import ipaddress
import logging
import re
import secrets
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakValueDictionary

import aiohttp
from aiohttp.connector import Connection
from yarl import URL

from cluster.failures import places
from cluster.files import Inlined
from cluster.predictions import Prediction
from cluster.tasks import spawn
from sources.connections import PrivateAddressError, is_public, trusted_authorities, untrusted
from sources.shown import redact, redact_text

logger = logging.getLogger("ray.serve")

# A host's name, with characters beyond ASCII encoded, or an address.
_HOST = re.compile(r"[A-Za-z0-9._-]{1,253}|[0-9A-Fa-f:.]{2,45}")
EVENTS = ("start", "output", "logs", "completed")
# The last webhook is tried this often, as by coglet, the pause doubling from a fifth of a second.
TRIES = 12
TIMEOUT = aiohttp.ClientTimeout(total=30)
URL_CHARACTERS = 2048
# How much of a receiver's answer is read: only its status matters.
ANSWER_BYTES = 16 * 1024
PRIVATE = "this server connects to public addresses alone, unless whoever runs it sets WEBHOOKS_ALLOW_PRIVATE_HOSTS=1"


class _Bounded:
    """A connection's protocol while one answer is read: it closes the connection beyond ANSWER_BYTES."""

    def __init__(self, connection: Connection) -> None:
        self._protocol, self._transport, self._room = connection.protocol, connection.transport, ANSWER_BYTES

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 (whatever else a transport calls)
        return getattr(self._protocol, name)

    def data_received(self, data: bytes) -> None:
        """Pass on the answer, up to the bound."""
        if self._room > 0:
            self._protocol.data_received(data[: self._room])
        self._room -= len(data)
        if self._room < 0:
            self._transport.abort()


class _Answer(aiohttp.ClientResponse):
    """aiohttp's answer with a bound: aiohttp reads interim answers (100 Continue) for ever, and blocks meanwhile."""

    async def start(self, connection: Connection) -> aiohttp.ClientResponse:
        """Read the answer's status and headers."""
        if connection.transport is not None:
            connection.transport.set_protocol(_Bounded(connection))
        return await super().start(connection)


def open_client(*, allow_private: bool) -> aiohttp.ClientSession:
    """A client that sends webhooks, to private and loopback addresses only if that is allowed."""
    # No limit of connections: receivers that never answer must not keep others waiting.
    connector = aiohttp.TCPConnector(
        limit=0, ssl=trusted_authorities(), socket_factory=None if allow_private else _public_socket
    )
    # No cookies: one receiver's would be sent to others.
    return aiohttp.ClientSession(connector=connector, cookie_jar=aiohttp.DummyCookieJar(), response_class=_Answer)


def _public_socket(address: aiohttp.AddrInfoType) -> socket.socket:
    """A socket for one of getaddrinfo's entries; PrivateAddressError where its address is not public.

    aiohttp calls this before each connection, with the address that it then connects to: the address cannot change
    between check and use, as the answer of a second look-up of the name could.
    """
    family, kind, protocol, _, (host, *_) = address
    if not is_public(ipaddress.ip_address(host)):
        # The same text for each address: if the texts differ, aiohttp raises an OSError of its own.
        raise PrivateAddressError("the address is not public")
    return socket.socket(family, kind, protocol)


@dataclass(frozen=True)
class Webhooks:
    """The webhooks of one front: one at a time for each prediction, in order."""

    client: aiohttp.ClientSession
    # The key of the signatures.
    secret: str
    # Makes the body: a prediction as JSON, in the form of the API that its client used.
    show: Callable[[Prediction], Awaitable[Inlined]]
    # The task of the latest webhook by the prediction's id, until it is sent.
    sending: WeakValueDictionary[str, asyncio.Task[None]] = field(default_factory=WeakValueDictionary, init=False)

    def wanted(self, prediction: Prediction, event: str) -> bool:
        """Whether the client has asked for webhooks of an event."""
        events = prediction.webhook_events  # it may be of any type: an older front may have written it
        return bool(prediction.webhook) and isinstance(events, list) and event in events

    async def notify(self, prediction: Prediction, event: str) -> None:
        """Start to send a webhook, once, as coglet does; nothing is raised."""
        if not self.wanted(prediction, event):
            return
        before = self.sending.get(prediction.id)
        if event == "logs" and before and not before.done():
            return  # the receiver is slow: it gets these logs with the next webhook
        body = await self._body(prediction)

        async def send() -> None:
            if before:
                await asyncio.wait([before])
            await self._post(prediction, secrets.token_hex(6), body)

        self.sending[prediction.id] = spawn(send())

    async def deliver(self, prediction: Prediction) -> None:
        """Send the last webhook, again until it arrives, at most TRIES times; nothing is raised."""
        if before := self.sending.get(prediction.id):
            await asyncio.wait([before])
        for attempt in range(TRIES):
            if await self._post(prediction, "completed", await self._body(prediction)):
                break
            await asyncio.sleep(min(30, 0.2 * 2**attempt))

    async def _body(self, prediction: Prediction) -> Inlined | None:
        """The body; None where it cannot be made, for instance while the store of files is away."""
        try:
            return await self.show(prediction)
        except Exception as error:
            logger.warning("A webhook of prediction %.130r cannot be made: %s", prediction.id, places(error))
            return None

    async def _post(self, prediction: Prediction, name: str, body: Inlined | None) -> bool:
        """Make one attempt; False where another one may succeed."""
        if not prediction.webhook:  # it was given up meanwhile
            return True
        if body is None:
            return False
        delivery = f"{prediction.id}-{name}"
        try:
            # Its files are read twice, not held in memory: a receiver may take minutes.
            signature = await signed(self.secret, delivery, body.pieces())
            headers = {"content-type": "application/json", "content-length": str(body.length), **signature}
            sent = self.client.post(
                prediction.webhook, data=body.pieces(), headers=headers, timeout=TIMEOUT, allow_redirects=False
            )
            async with sent as answered:
                return answered.status < 300 or 400 <= answered.status not in (429, 500, 502, 503, 504)
        # Another attempt would fail too, at the certificate, the URL or an id in a header. aiohttp's InvalidURL and its
        # errors of certificates are ValueErrors.
        except (ValueError, TypeError, AssertionError, aiohttp.NonHttpUrlClientError) as error:
            reason = redact_text(places(error))
            if isinstance(error, aiohttp.ClientConnectorCertificateError):
                reason = f"its receiver's certificate is not valid: {untrusted(error) or error.certificate_error}"
            logger.warning("A webhook of prediction %.130r cannot be sent: %s", prediction.id, reason)
            return True
        except aiohttp.ClientConnectorError as error:
            if isinstance(error.os_error, PrivateAddressError):
                logger.warning("The webhooks of prediction %.130r are given up: %s", prediction.id, PRIVATE)
                prediction.webhook = None  # the next webhooks would fail too
                return True
            return False
        except (aiohttp.ClientError, TimeoutError):
            return False
        except Exception as error:
            logger.warning("A webhook of prediction %.130r was not sent: %s", prediction.id, redact_text(places(error)))
            return False


def check_url(text: object, *, allow_private: bool) -> None:
    """Refuse a client's webhook if requests to it would fail whatever the network's state.

    The ValueError's sentence has no user, password and query. `open_client` checks the addresses of hosts' names.
    """
    if not isinstance(text, str):
        raise ValueError("webhook must be a string.")
    wrong = f"webhook is {redact(text[: 2 * URL_CHARACTERS])[:120]!r}; it must be an http or https URL"

    def need(fulfilled: object, how: str) -> None:
        if not fulfilled:
            raise ValueError(f"{wrong} {how}")

    need(len(text) <= URL_CHARACTERS, f"of at most {URL_CHARACTERS} characters, not {len(text)}.")
    need(text.isprintable() and " " not in text, "without spaces and control characters.")
    try:
        url = URL(text)
        port = url.port
    except ValueError:
        raise ValueError(f"{wrong}, such as https://example.com/hook.") from None
    reachable = url.scheme in ("http", "https") and url.raw_host and port
    need(reachable, "with a host, and where it has a port, one from 1 to 65535.")
    need(_can_be_looked_up(url.raw_host), "with a host that can be looked up.")
    # As HTTP's basic authentication encodes them.
    need(max(f"{url.user}:{url.password}") <= "\xff", "whose user and password are in Latin-1.")
    need(":" not in (url.user or ""), "whose user has no colon.")
    need(allow_private or not _is_private(url.raw_host), f"whose host is public: {PRIVATE}.")


def _can_be_looked_up(host: str) -> bool:
    """Whether the resolver takes this host; nothing is looked up."""
    try:
        if set(host) <= set("0123456789."):
            ipaddress.IPv4Address(host)
        host.encode("idna")
    except ValueError:
        return False
    return _HOST.fullmatch(host) is not None


def _is_private(host: str) -> bool:
    """Whether a host is a private address, in any notation, or a name of this machine; nothing is looked up."""
    name = host.rstrip(".")
    with contextlib.suppress(ValueError, OSError):  # it is a name
        return not is_public(ipaddress.ip_address(name if ":" in name else socket.inet_aton(name)))
    return name == "localhost" or name.endswith(".localhost")


async def signed(secret: str, delivery: str, body: AsyncIterator[bytes]) -> dict[str, str]:
    """The headers that sign a webhook, as Replicate's do.

    `delivery` is the webhook's id, the same for each attempt, so that the receiver can drop repetitions.
    """
    timestamp = str(int(time.time()))
    digest = hmac.new(secret.encode(), f"{delivery}.{timestamp}.".encode(), "sha256")
    async for piece in body:
        digest.update(piece)
    signature = f"v1,{base64.b64encode(digest.digest()).decode()}"
    return {"webhook-id": delivery, "webhook-timestamp": timestamp, "webhook-signature": signature}
