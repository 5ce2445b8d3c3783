"""A worker: the unchanged predictor in a Cog server of its own, on one GPU.

It gives Cog one prediction at a time and passes on Cog's webhooks about it. When its Cog server cannot go on, the
worker ends, and Serve starts another. This module knows Cog's HTTP and weaknesses; it knows nothing of clients.
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
# Not "output": the webhook "completed" has the output too, and pictures would be sent twice.
EVENTS = ["start", "logs", "completed"]
# For each request to Cog but health checks: a body of 100 MiB takes seconds.
TIMEOUT = aiohttp.ClientTimeout(total=60)
# How long Cog may need until it can take the next prediction: a cancelled predictor first ends its present step.
SECONDS_TO_SETTLE = 60
# How often a worker checks Cog while no webhook comes.
SECONDS_BETWEEN_LOOKS = 1
# How long a worker that has to end still answers its callers, so that they get the reason.
SECONDS_TO_TELL = 4
# How long Cog may be ready for the next prediction without a webhook about the end of this one.
SECONDS_FOR_END = 10
# When a worker that stands still is ended. It is longer than a front's time: a front that has stopped reading can block
# a worker's event loop until that front is ended.
SECONDS_STILL = 30
# How many sets of LoRAs a worker is taken to hold when requests are routed by them.
LORAS_HELD = 16


@serve.deployment(
    max_ongoing_requests=1,  # a predictor runs one prediction at a time
    max_queued_requests=-1,  # the fronts bound how many they accept
    graceful_shutdown_timeout_s=DRAIN_SECONDS,
    health_check_period_s=SECONDS_BETWEEN_CHECKS,
    logging_config=LOGGING,
)
class CogWorker:
    """One GPU: the predictor in a Cog server of its own, reached over loopback."""

    # When the present prediction began, by the monotonic clock.
    began: float | None = None
    # Whether this process ends within SECONDS_TO_TELL.
    ending = False

    async def __init__(self, project: str) -> None:
        listen_on_this_node_only()
        spawn(watch_event_loop("worker", SECONDS_STILL))
        environment = {"PREDICTION_SECONDS": f"{self.settings.prediction_seconds:g}"}
        environment |= dict.fromkeys(withheld(os.environ))  # with None, Cog's server gets no such variable
        self.server = CogServer(Path(project), environment=environment).__enter__()
        self.verdict = Verdict(self.server)
        try:
            await asyncio.to_thread(self.server.wait_until_ready)
            await self._listen()
        except BaseException:
            self.server.__exit__(None, None, None)
            raise

    @property
    def settings(self) -> ClusterSettings:
        """The settings of this node, which may differ from the node where the cluster was started."""
        return ClusterSettings.from_environment()

    async def _listen(self) -> None:
        """Open a client for Cog and a server for its webhooks, and let Cog settle."""
        self.client = aiohttp.ClientSession(f"http://{LOOPBACK}:{self.server.port}", timeout=TIMEOUT)
        self.events: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.run = ""  # the path of the present prediction's webhooks
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
        if request.match_info["run"] == self.run:  # else it came late, from an earlier prediction
            self.events.put_nowait(await request.json())
        return web.Response()

    async def health(self, seconds: float = SECONDS_FOR_HEALTH) -> dict[str, Any]:
        """Cog's answer to `GET /health-check`; a ClientError where nobody answers, a TimeoutError where Cog hangs."""
        async with self.client.get("/health-check", timeout=aiohttp.ClientTimeout(total=seconds)) as answered:
            return await answered.json()

    async def predict(
        self, prediction_id: str, inputs: dict[str, Any], loras: str
    ) -> AsyncIterator[list[dict[str, Any]]]:
        """Run a prediction of validated inputs: Cog's states since the last yield, the very last with an end's status.

        Closing the iterator cancels it. `loras` names its LoRAs, if any. A Failure is raised where Cog refuses it or
        does not report its end; this worker goes on, or ends if Cog cannot.
        """
        # Serve sends the next call before a cancelled one has cleaned up.
        async with self.one_at_a_time:
            await asyncio.wait([self.settling])
            if loras:
                times_before = next(await self._hold(loras))
                (self.lora_hits if times_before else self.lora_loads).inc()
            if self.ending:
                raise BackPressureError(1, 0)  # the front tries again, and does not count this attempt
            self.run, self.events = secrets.token_urlsafe(), asyncio.Queue()
            body = {"input": inputs, "webhook": f"{self.address}/{self.run}", "webhook_events_filter": EVENTS}
            url = f"/predictions/{quote(prediction_id, safe='')}"
            ended = False
            self.began = time.monotonic()
            try:
                await self._hand_over(url, body)
                while not ended:
                    states = await self._next_states()
                    ended = states[-1]["status"] not in UNFINISHED
                    if states[-1]["status"] == "failed":
                        # The predictor may have died: then this worker ends, and another one tries.
                        await self._settle()
                    yield states
            finally:
                self.began = None
                # Free Cog's slot in the background: the caller already has its result.
                self.settling = asyncio.create_task(self._settle(None if ended else url))

    async def _hand_over(self, url: str, body: dict[str, Any]) -> None:
        """Have Cog begin a prediction; a Failure where it does not."""
        for _ in range(ATTEMPTS):
            try:
                async with self.client.put(url, json=body, headers={"Prefer": "respond-async"}) as answered:
                    if answered.status == 202:
                        return
                    status, text = answered.status, await answered.text(errors="replace")
            except (aiohttp.ClientError, TimeoutError) as error:
                # Cog may have begun: the caller cancels the prediction there, and ends this worker if Cog has died.
                sentence = "Cog broke off the connection when it was given the prediction."
                raise Failure(sentence, Again.UNDRAWN) from error
            if status != 409:
                break
            await self._settle()  # its slot is not free yet
        reason = without_paths(redact_log(text[:300], secrets_of(body["input"])))
        # What one Cog calls the request's fault, any Cog would refuse.
        again = Again.NEVER if 400 <= status < 500 and status != 409 else Again.UNDRAWN
        raise Failure(f"Cog refused the prediction with {status}: {reason}", again)

    async def _next_states(self) -> list[dict[str, Any]]:
        """Cog's states of the prediction since the last call; a Failure where Cog does not report its end."""
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
            # Cog sends the end without waiting for the log's webhooks: ignore those that come after it.
            while states[-1]["status"] in UNFINISHED and not self.events.empty():
                states.append(self.events.get_nowait())
            return states

    async def _settle(self, cancelling: str | None = None) -> None:
        """Wait until Cog can take the next prediction: it reports the end of one before its slot is free.

        `cancelling` is the URL of a prediction to cancel. This process ends if Cog is defunct, busy without a
        prediction, or busy for too long.
        """
        if cancelling:
            await asyncio.sleep(CANCEL_SECONDS)
        forgotten, give_up = 0, time.monotonic() + SECONDS_TO_SETTLE
        while not self.ending and (status := await self._status()) != "READY":
            if cancelling and status == "BUSY":
                with contextlib.suppress(aiohttp.ClientError, TimeoutError):  # the next look at its status shows that
                    async with self.client.post(f"{cancelling}/cancel") as answered:
                        forgotten += answered.status == 404
            lost = status != "BUSY" or forgotten > 20 or time.monotonic() > give_up
            self._end_if(lost, hung=status == "SILENT")
            await asyncio.sleep(CANCEL_SECONDS if cancelling else 0.005)

    async def _status(self) -> str:
        """Cog's status; DEFUNCT where that cannot be read, SILENT where Cog hangs."""
        try:
            return (await self._ask())["status"]
        except TimeoutError:
            return "SILENT"
        except (aiohttp.ClientError, ValueError, KeyError):
            return "DEFUNCT"

    async def _ask(self) -> dict[str, Any]:
        """Cog's health; asked twice, since the first timeout may be due to a pause of this process, not of Cog."""
        with contextlib.suppress(TimeoutError):
            return await self.health()
        return await self.health(SECONDS_BETWEEN_LOOKS)

    def _has_taken(self, seconds: float) -> bool:
        """Whether the present prediction, if there is one, has taken so long."""
        return self.began is not None and time.monotonic() - self.began > seconds

    def _end_if(self, defunct: bool, *, hung: bool = False) -> None:
        """End this process if Cog is defunct: Cog would refuse everything for ever, and Serve replaces the worker.

        It ends at once if a prediction runs: its front learns of the end and counts it. It ends after SECONDS_TO_TELL
        if none runs, or if one hangs or hung until its predictor ended itself: so callers get the reason, which they
        could not see from the end of a process. A prediction that hangs gets a Failure.
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
        """Have Serve note that this worker holds these LoRAs; while it does, Serve returns this same counter."""
        return itertools.count()

    async def check_health(self) -> None:
        """Called by Serve, every few seconds; this process ends where the Cog server cannot go on.

        A broken connection is raised: Serve replaces the worker if that happens again and again.
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
        with contextlib.suppress(Failure):  # `predict` raises it by itself
            self._end_if(bool(reason), hung=hung)

    def __del__(self) -> None:
        """Called by Serve when the worker is to go: end the Cog server."""
        if hasattr(self, "server"):
            self.server.__exit__(None, None, None)
