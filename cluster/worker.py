"""A worker: the unchanged predictor in a Cog server of its own, on one GPU.

It hands Cog one prediction at a time and passes on what Cog tells of it. When its Cog server cannot go on, the worker
ends, and Serve starts another. This module knows Cog's HTTP and weaknesses; it knows nothing of clients.
"""

import asyncio
import contextlib
import itertools
import logging
import os
import secrets
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import aiohttp
from aiohttp import web
from ray import serve
from ray.serve import metrics
from ray.serve.exceptions import BackPressureError

from cluster.failures import ATTEMPTS, Again, Failure
from cluster.predictions import UNFINISHED
from cluster.privacy import redact_log, secrets_of
from cluster.replica import LOGGING, listen_on_this_node_only
from cluster.settings import DRAIN_SECONDS, ClusterSettings
from cluster.tasks import spawn
from cluster.watchdog import watch_event_loop
from cluster.withheld import withheld
from local_cog.server import LOOPBACK, SECONDS_BETWEEN_CHECKS, SECONDS_FOR_HEALTH, CogServer, Verdict, hangs
from service.faults import without_paths
from service.lines import printable

logger = logging.getLogger("ray.serve")

# coglet 0.23 can hang when a prediction is cancelled in its first milliseconds: wait before cancelling.
CANCEL_SECONDS = 0.05
# The webhooks that a worker gets from Cog. The output comes with the end: its own event would send pictures twice.
HEARD = ["start", "logs", "completed"]
# For everything else that Cog is asked: a body of 100 MiB takes it seconds.
TIMEOUT = aiohttp.ClientTimeout(total=60)
# How long Cog may take until it can take the next prediction: a predictor that was told to stop may come to the end of
# what it is doing.
SECONDS_TO_SETTLE = 60
# How often a worker looks whether there is still to come something of a prediction.
SECONDS_BETWEEN_LOOKS = 1
# How long a worker goes on that has to end, so that everybody who waits for it hears why.
SECONDS_TO_TELL = 4
# How long Cog may be ready for the next prediction without having told the end of this one.
SECONDS_FOR_END = 10
# A worker that stands still is ended after so long: its event loop also waits for a front that does not read what it is
# told, until that front has been ended.
SECONDS_STILL = 30
# How many LoRAs a worker is taken to hold when requests are led to it.
LORAS_HELD = 16


@serve.deployment(
    max_ongoing_requests=1,  # as the predictor has it
    max_queued_requests=-1,  # the fronts bound what they accept, and what was accepted may wait
    graceful_shutdown_timeout_s=DRAIN_SECONDS,
    health_check_period_s=SECONDS_BETWEEN_CHECKS,
    logging_config=LOGGING,
)
class CogWorker:
    """One GPU: the predictor in a Cog server of its own, reached over loopback."""

    # When the prediction under way was begun, by the monotonic clock; and whether this process ends in a moment.
    began: float | None = None
    ending = False

    async def __init__(self, project: str) -> None:
        listen_on_this_node_only()
        spawn(watch_event_loop("worker", SECONDS_STILL))
        environment = {"PREDICTION_SECONDS": f"{self.settings.prediction_seconds:g}"}
        environment |= dict.fromkeys(withheld(os.environ))
        self.server = CogServer(Path(project), environment=environment).__enter__()
        self.verdict = Verdict(self.server)
        try:
            await asyncio.to_thread(self.server.wait_until_ready)
            await self._listen()
        except BaseException:
            self.stop()
            raise

    @property
    def settings(self) -> ClusterSettings:
        """Those of this node: it may differ from the node where the cluster was started."""
        return ClusterSettings.from_environment()

    async def _listen(self) -> None:
        """Listen for Cog's webhooks, which tell how a prediction goes."""
        self.client = aiohttp.ClientSession(f"http://{LOOPBACK}:{self.server.port}", timeout=TIMEOUT)
        self.events: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.run = ""
        self.one_at_a_time = asyncio.Lock()
        self.settling = asyncio.create_task(self._settle())
        self.lora_hits = metrics.Counter("flux_lora_hits", "Predictions whose LoRAs their worker had.")
        self.lora_loads = metrics.Counter("flux_lora_loads", "Predictions whose LoRAs were new to their worker.")
        application = web.Application(client_max_size=2**30)
        application.router.add_post("/{run}", self._hear)
        runner = web.AppRunner(application, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, LOOPBACK, 0).start()
        self.address = f"http://{LOOPBACK}:{runner.addresses[0][1]}"

    async def _hear(self, request: web.Request) -> web.Response:
        if request.match_info["run"] == self.run:  # else it is late, and of the prediction before
            self.events.put_nowait(await request.json())
        return web.Response()

    async def health(self, seconds: float = SECONDS_FOR_HEALTH) -> dict[str, Any]:
        """What Cog's `GET /health-check` says here.

        Raises:
            aiohttp.ClientError: Cog does not answer; TimeoutError if it is there, but silent for so long.
        """
        async with self.client.get("/health-check", timeout=aiohttp.ClientTimeout(total=seconds)) as answered:
            return await answered.json()

    async def predict(
        self, prediction_id: str, inputs: dict[str, Any], loras: str
    ) -> AsyncIterator[list[dict[str, Any]]]:
        """Run a prediction of validated inputs; closing the iterator cancels it. `loras` names its LoRAs, if any.

        Yields:
            Cog's descriptions of the prediction since the last time, the very last with a status that is an end.

        Raises:
            Failure: Cog refuses it, or does not tell its end; this worker goes on, or ends if Cog cannot.
        """
        # Serve frees the place of a cancelled call before the call has cleaned up: wait for that here.
        async with self.one_at_a_time:
            await asyncio.wait([self.settling])
            if loras:
                (self.lora_hits if next(await self._hold(loras)) else self.lora_loads).inc()
            if self.ending:
                raise BackPressureError(1, 0)  # the front asks again, and does not count this
            self.run, self.events = secrets.token_urlsafe(), asyncio.Queue()
            body = {"input": inputs, "webhook": f"{self.address}/{self.run}", "webhook_events_filter": HEARD}
            url = f"/predictions/{quote(prediction_id, safe='')}"
            ended = False
            self.began = time.monotonic()
            try:
                await self._hand_over(url, body)
                while not ended:
                    states = await self._next_states()
                    ended = states[-1]["status"] not in UNFINISHED
                    if states[-1]["status"] == "failed":
                        # The predictor may have died of it: then this worker ends, and another one tries.
                        await self._settle()
                    yield states
            finally:
                self.began = None
                # Free Cog's slot in the background: the caller already has its result.
                self.settling = asyncio.create_task(self._settle(None if ended else url))

    async def _hand_over(self, url: str, body: dict[str, Any]) -> None:
        """Have Cog begin a prediction.

        Raises:
            Failure: it does not. What Cog calls the request's fault would be one for any Cog; else another may take it.
        """
        for _ in range(ATTEMPTS):
            try:
                async with self.client.put(url, json=body, headers={"Prefer": "respond-async"}) as answered:
                    if answered.status == 202:
                        return
                    status, said = answered.status, (await answered.text(errors="replace"))[:300]
            except (aiohttp.ClientError, TimeoutError) as error:
                # It may have begun: what called this cancels it there, and ends this worker if Cog has died.
                raise Failure(
                    "Cog broke off the connection when it was given the prediction.", Again.UNDRAWN
                ) from error
            if status != 409:
                break
            await self._settle()  # its slot is not free yet
        said = without_paths(redact_log(said, secrets_of(body["input"])))
        own = 400 <= status < 500 and status != 409
        raise Failure(f"Cog refused the prediction with {status}: {said}", Again.NEVER if own else Again.UNDRAWN)

    async def _next_states(self) -> list[dict[str, Any]]:
        """What Cog has said since the last time; a Failure where it does not tell the end, or there is none."""
        idle = 0
        while True:
            try:
                states = [await asyncio.wait_for(self.events.get(), SECONDS_BETWEEN_LOOKS)]
            except TimeoutError:
                self._end_if(self.ending or self._has_taken(self.settings.longest_seconds), hung=True)
                self._end_if(self.server.process.poll() is not None)
                status = ""
                with contextlib.suppress(TimeoutError):
                    status = await asyncio.wait_for(self._status(), SECONDS_BETWEEN_LOOKS)
                idle = idle + 1 if status == "READY" else 0
                if idle == SECONDS_FOR_END:
                    raise Failure("Cog has ended the prediction without saying how.") from None
                continue
            # Cog does not wait until a log has arrived before it sends the end: ignore what comes after the end.
            while states[-1]["status"] in UNFINISHED and not self.events.empty():
                states.append(self.events.get_nowait())
            return states

    async def _settle(self, cancelling: str | None = None) -> None:
        """Wait until Cog can take the next prediction: it tells the end of one before its slot is free.

        The URL of a prediction to cancel may be given. If Cog never can, being defunct, busy with nothing or busy for
        ever, this process ends.
        """
        if cancelling:
            await asyncio.sleep(CANCEL_SECONDS)
        forgotten, give_up = 0, time.monotonic() + SECONDS_TO_SETTLE
        while not self.ending and (status := await self._status()) != "READY":
            if cancelling and status == "BUSY":
                with contextlib.suppress(aiohttp.ClientError, TimeoutError):  # its status will say so too
                    async with self.client.post(f"{cancelling}/cancel") as answered:
                        forgotten += answered.status == 404
            lost = status != "BUSY" or forgotten > 20 or time.monotonic() > give_up
            self._end_if(lost, hung=status == "SILENT")
            await asyncio.sleep(CANCEL_SECONDS if cancelling else 0.005)

    async def _status(self) -> str:
        """What Cog says that it is; DEFUNCT where that cannot be read, SILENT where it hangs."""
        try:
            return (await self._ask())["status"]
        except TimeoutError:
            return "SILENT"
        except (aiohttp.ClientError, ValueError, KeyError):
            return "DEFUNCT"

    async def _ask(self) -> dict[str, Any]:
        """Its health, asked twice: a time may have run out while this process stood still, with the answer waiting."""
        with contextlib.suppress(TimeoutError):
            return await self.health()
        return await self.health(SECONDS_BETWEEN_LOOKS)

    def _has_taken(self, seconds: float) -> bool:
        """Whether there is a prediction under way that has taken so long."""
        return self.began is not None and time.monotonic() - self.began > seconds

    def _end_if(self, defunct: bool, *, hung: bool = False) -> None:
        """End this process if Cog is defunct: it would refuse everything for ever, and Serve replaces the worker.

        That is at once where a prediction is under way: whatever it is, it has not survived this worker. It is a little
        later where there is none, or where one hangs, or hung until its predictor ended itself: an end tells no reason,
        and those that ask meanwhile are to hear one.

        Raises:
            Failure: a prediction hangs.
        """
        if not defunct:
            return
        hung = hung or self.ending or self._has_taken(self.settings.prediction_seconds)
        if self.began is not None and not hung:
            logger.error("The Cog server cannot go on; its worker ends.")
            os._exit(1)
        if not self.ending:
            self.ending = True
            logger.error("The Cog server %s; its worker ends.", "hangs" if hung else "cannot go on")
            asyncio.get_running_loop().call_later(SECONDS_TO_TELL, os._exit, 1)
        if self.began is not None:
            raise Failure("The prediction was given up: two attempts at it did not end in time.", Again.HUNG)

    @serve.multiplexed(max_num_models_per_replica=LORAS_HELD)
    async def _hold(self, loras: str) -> Iterator[int]:
        """Let Serve know that these LoRAs are here from now on: how often they were asked for since, as a counter."""
        return itertools.count()

    async def check_health(self) -> None:
        """Called by Serve, every few seconds; this process ends where the Cog server cannot go on.

        Raises:
            aiohttp.ClientError: the connection broke; Serve replaces the worker if that happens again and again.
        """
        if self.ending:
            return
        try:
            health = await self._ask()
        except TimeoutError:
            reason, hung = "The Cog server does not answer.", True
        else:
            reason, hung = self.verdict.reason(health), hangs(health)
        if reason:
            logger.error("%s", printable(redact_log(reason, ())))  # it has the predictor's own words
        with contextlib.suppress(Failure):  # the prediction's; it finds that out by itself
            self._end_if(bool(reason), hung=hung)

    def stop(self) -> None:
        """End the Cog server."""
        self.server.__exit__(None, None, None)

    def __del__(self) -> None:
        """Called by Serve when the worker is to go."""
        if hasattr(self, "server"):
            self.stop()
