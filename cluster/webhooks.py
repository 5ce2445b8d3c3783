"""Webhooks: a client is told how its prediction goes, in order and signed.

This module knows where they may go, how often and in which order; what a webhook says, it is given.
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

# A name as it is looked up, with what is beyond ASCII encoded, or an address.
_HOST = re.compile(r"[A-Za-z0-9._-]{1,253}|[0-9A-Fa-f:.]{2,45}")
EVENTS = ("start", "output", "logs", "completed")
# The last webhook is tried this often, as by coglet, the pause doubling from a fifth of a second.
TRIES = 12
TIMEOUT = aiohttp.ClientTimeout(total=30)
URL_CHARACTERS = 2048
# Of an answer only the status matters; what a receiver sends beyond this is not heard.
ANSWER_BYTES = 16 * 1024
PRIVATE = "this server connects to public addresses alone, unless whoever runs it sets WEBHOOKS_ALLOW_PRIVATE_HOSTS=1"


class _Bounded:
    """A connection's protocol, as its transport sees it while one answer comes: it ends the connection at a bound."""

    def __init__(self, connection: Connection) -> None:
        self._protocol, self._transport, self._room = connection.protocol, connection.transport, ANSWER_BYTES

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 (whatever else a transport calls)
        return getattr(self._protocol, name)

    def data_received(self, data: bytes) -> None:
        """Pass on some of the answer."""
        if self._room > 0:
            self._protocol.data_received(data[: self._room])
        self._room -= len(data)
        if self._room < 0:
            self._transport.abort()


class _Answer(aiohttp.ClientResponse):
    """aiohttp's, with a bound: it reads interim answers (100 Continue) without end, and nothing else meanwhile."""

    async def start(self, connection: Connection) -> aiohttp.ClientResponse:
        """Read the answer's status and headers."""
        if connection.transport is not None:
            connection.transport.set_protocol(_Bounded(connection))
        return await super().start(connection)


def open_client(*, allow_private: bool) -> aiohttp.ClientSession:
    """A client that sends webhooks: all at once, since receivers that never answer must not keep others waiting.

    Args:
        allow_private: whether it may connect to private and loopback addresses.
    """
    connector = aiohttp.TCPConnector(
        limit=0, ssl=trusted_authorities(), socket_factory=None if allow_private else _public_socket
    )
    # No cookies: one receiver's would go to others.
    return aiohttp.ClientSession(connector=connector, cookie_jar=aiohttp.DummyCookieJar(), response_class=_Answer)


def _public_socket(address: aiohttp.AddrInfoType) -> socket.socket:
    """A socket for one of getaddrinfo's entries; PrivateAddressError where its address is not public.

    aiohttp calls this before each connection, with the very address that it then connects to: what a name leads to is
    checked after it was looked up, and cannot change in between.
    """
    family, kind, protocol, _, (host, *_) = address
    if not is_public(ipaddress.ip_address(host)):
        # In the same words for each: where those of several addresses differ, aiohttp raises an OSError of its own.
        raise PrivateAddressError("the address is not public")
    return socket.socket(family, kind, protocol)


@dataclass(frozen=True)
class Webhooks:
    """The webhooks of one front: one at a time for each prediction, in order."""

    client: aiohttp.ClientSession
    # Signs what is sent.
    secret: str
    # Gives a prediction as JSON in the form that its client expects.
    show: Callable[[Prediction], Awaitable[Inlined]]
    # The latest webhook of each prediction, by its id, for as long as it is on its way.
    sending: WeakValueDictionary[str, asyncio.Task[None]] = field(default_factory=WeakValueDictionary, init=False)

    def wanted(self, prediction: Prediction, event: str) -> bool:
        """Whether a client wants to hear of an event."""
        events = prediction.webhook_events  # an older front may have left anything
        return bool(prediction.webhook) and isinstance(events, list) and event in events

    async def notify(self, prediction: Prediction, event: str) -> None:
        """Send a webhook on the way; one that does not arrive is not sent again, as by coglet. Nothing is raised."""
        if not self.wanted(prediction, event):
            return
        before = self.sending.get(prediction.id)
        if event == "logs" and before and not before.done():
            return  # the next one holds these logs too; a slow listener hears fewer
        body = await self._body(prediction)

        async def send() -> None:
            if before:
                await asyncio.wait([before])
            await self._post(prediction, secrets.token_hex(6), body)

        self.sending[prediction.id] = spawn(send())

    async def deliver(self, prediction: Prediction) -> None:
        """Send the last webhook until it arrives or has been tried often enough; nothing comes after it.

        Nothing is raised: what cannot be sent has been tried as well.
        """
        if before := self.sending.get(prediction.id):
            await asyncio.wait([before])
        for attempt in range(TRIES):
            if await self._post(prediction, "completed", await self._body(prediction)):
                break
            await asyncio.sleep(min(30, 0.2 * 2**attempt))

    async def _body(self, prediction: Prediction) -> Inlined | None:
        """What is sent; None where it cannot be made, as while the store of files is away."""
        try:
            return await self.show(prediction)
        except Exception as error:
            logger.warning("A webhook of prediction %.130r cannot be made: %s", prediction.id, places(error))
            return None

    async def _post(self, prediction: Prediction, name: str, body: Inlined | None) -> bool:
        """One attempt; False where another may succeed."""
        if not prediction.webhook:  # given up meanwhile
            return True
        if body is None:
            return False
        delivery = f"{prediction.id}-{name}"
        try:
            # Its files are read twice rather than held: a receiver may take minutes to hear of them.
            signature = await signed(self.secret, delivery, body.pieces())
            headers = {"content-type": "application/json", "content-length": str(body.length), **signature}
            sent = self.client.post(
                prediction.webhook, data=body.pieces(), headers=headers, timeout=TIMEOUT, allow_redirects=False
            )
            async with sent as answered:
                return answered.status < 300 or 400 <= answered.status not in (429, 500, 502, 503, 504)
        except aiohttp.ClientConnectorCertificateError as error:
            logger.warning(
                "A webhook of prediction %.130r cannot be sent: its receiver's certificate is not valid: %s",
                prediction.id,
                untrusted(error) or error.certificate_error,
            )
            return True
        # Such a URL, or such an id in a header, can never be sent; aiohttp's InvalidURL is a ValueError.
        except (ValueError, TypeError, AssertionError, aiohttp.NonHttpUrlClientError) as error:
            logger.warning(
                "A webhook of prediction %.130r cannot be sent: %s", prediction.id, redact_text(places(error))
            )
            return True
        except aiohttp.ClientConnectorError as error:
            if isinstance(error.os_error, PrivateAddressError):
                logger.warning("The webhooks of prediction %.130r are given up: %s", prediction.id, PRIVATE)
                prediction.webhook = None  # the next ones would come to the same
            return not prediction.webhook
        except (aiohttp.ClientError, TimeoutError):
            return False
        except Exception as error:
            logger.warning("A webhook of prediction %.130r was not sent: %s", prediction.id, redact_text(places(error)))
            return False


def check_url(text: object, *, allow_private: bool) -> None:
    """Refuse what the client library could not send to, for whatever reason but the network's.

    Args:
        text: what a client gave as its webhook.
        allow_private: whether the host may be private by its very name; what other names lead to, `open_client` checks.

    Raises:
        ValueError: a sentence without user, password and query.
    """
    if not isinstance(text, str):
        raise ValueError("webhook must be a string.")
    wrong = f"webhook is {redact(text[: 2 * URL_CHARACTERS])[:120]!r}; it must be an http or https URL"
    if len(text) > URL_CHARACTERS:
        raise ValueError(f"{wrong} of at most {URL_CHARACTERS} characters, not {len(text)}.")
    if not text.isprintable() or " " in text:
        raise ValueError(f"{wrong} without spaces and control characters.")
    try:
        url = URL(text)
        port = url.port
    except ValueError:
        raise ValueError(f"{wrong}, such as https://example.com/hook.") from None
    if url.scheme not in ("http", "https") or not url.raw_host or not port:
        raise ValueError(f"{wrong} with a host, and where it has a port, one from 1 to 65535.")
    try:
        if not _HOST.fullmatch(url.raw_host):
            raise ValueError
        if set(url.raw_host) <= set("0123456789."):
            ipaddress.IPv4Address(url.raw_host)
        url.raw_host.encode("idna")  # as the resolver does
    except ValueError:
        raise ValueError(f"{wrong} with a host that can be looked up.") from None
    try:
        f"{url.user}:{url.password}".encode("latin-1")  # as HTTP's basic authentication does
    except UnicodeError:
        raise ValueError(f"{wrong} whose user and password are in Latin-1.") from None
    if ":" in (url.user or ""):
        raise ValueError(f"{wrong} whose user has no colon.")
    if not allow_private and _is_private(url.raw_host):
        raise ValueError(f"{wrong} whose host is public: {PRIVATE}.")


def _is_private(host: str) -> bool:
    """Whether a host is known not to be public without being looked up: by its address, however it is written."""
    name = host.rstrip(".")
    with contextlib.suppress(ValueError, OSError):  # it is no address
        return not is_public(ipaddress.ip_address(name if ":" in name else socket.inet_aton(name)))
    return name == "localhost" or name.endswith(".localhost")


async def signed(secret: str, delivery: str, body: AsyncIterator[bytes]) -> dict[str, str]:
    """The headers by which a client knows that a webhook is from here, as Replicate's.

    `delivery` names it, and is the same for every attempt, so that the receiver can drop what it has.
    """
    timestamp = str(int(time.time()))
    digest = hmac.new(secret.encode(), f"{delivery}.{timestamp}.".encode(), "sha256")
    async for piece in body:
        digest.update(piece)
    signature = f"v1,{base64.b64encode(digest.digest()).decode()}"
    return {"webhook-id": delivery, "webhook-timestamp": timestamp, "webhook-signature": signature}
