"""Webhooks: a client is told how its prediction goes, in order and signed.

This module knows how often and in which order; what a webhook says, it is given.
"""

import asyncio
import base64
import hmac
import json
import secrets
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakValueDictionary

import aiohttp

from cluster.predictions import Prediction
from cluster.tasks import spawn

EVENTS = ("start", "output", "logs", "completed")
# The last webhook is tried this often, as by coglet, the pause doubling from a fifth of a second.
TRIES = 12
TIMEOUT = aiohttp.ClientTimeout(total=30)


@dataclass(frozen=True)
class Webhooks:
    """The webhooks of one front: one at a time for each prediction, in order."""

    client: aiohttp.ClientSession
    # Signs what is sent.
    secret: str
    # Gives a prediction in the form that its client expects.
    show: Callable[[Prediction], Awaitable[dict[str, Any]]]
    # The latest webhook of each prediction, by its id, for as long as it is on its way.
    sending: WeakValueDictionary[str, asyncio.Task[None]] = field(default_factory=WeakValueDictionary, init=False)

    async def notify(self, prediction: Prediction, event: str) -> None:
        """Send a webhook on the way; one that does not arrive is not sent again, as by coglet."""
        if not prediction.webhook or event not in prediction.webhook_events:
            return
        before = self.sending.get(prediction.id)
        if event == "logs" and before and not before.done():
            return  # the next one holds these logs too; a slow listener hears fewer
        body = json.dumps(await self.show(prediction))

        async def send() -> None:
            if before:
                await asyncio.wait([before])
            await self._post(prediction.webhook, f"{prediction.id}-{secrets.token_hex(6)}", body)

        self.sending[prediction.id] = spawn(send())

    async def deliver(self, prediction: Prediction) -> None:
        """Send the last webhook until it arrives or has been tried often enough; nothing comes after it."""
        if before := self.sending.get(prediction.id):
            await asyncio.wait([before])
        body = json.dumps(await self.show(prediction))
        for attempt in range(TRIES):
            if await self._post(prediction.webhook, f"{prediction.id}-completed", body):
                break
            await asyncio.sleep(min(30, 0.2 * 2**attempt))

    async def _post(self, url: str, delivery: str, body: str) -> bool:
        """One attempt; False where another may succeed."""
        headers = {"content-type": "application/json", **signed(self.secret, delivery, body)}
        try:
            async with self.client.post(url, data=body.encode(), headers=headers, timeout=TIMEOUT) as answered:
                return answered.status not in (429, 500, 502, 503, 504)
        except aiohttp.InvalidURL:
            return True
        except (aiohttp.ClientError, TimeoutError):
            return False


def signed(secret: str, delivery: str, body: str) -> dict[str, str]:
    """The headers by which a client knows that a webhook is from here, as Replicate's.

    `delivery` names it, and is the same for every attempt, so that the receiver can drop what it has.
    """
    timestamp = str(int(time.time()))
    digest = hmac.digest(secret.encode(), f"{delivery}.{timestamp}.{body}".encode(), "sha256")
    signature = f"v1,{base64.b64encode(digest).decode()}"
    return {"webhook-id": delivery, "webhook-timestamp": timestamp, "webhook-signature": signature}
