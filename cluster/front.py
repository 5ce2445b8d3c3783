"""A front: one process that serves HTTP, from its start to its end.

It listens itself: behind Serve's proxy each request would take 9 ms longer, and a look at a prediction eight times the
CPU time. This module knows when a front listens, shows that it lives, and leaves; the APIs answer requests, the
dispatcher runs predictions.
"""

import asyncio
import contextlib
import logging
import uuid
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import uvicorn
from ray import serve
from ray.serve.handle import DeploymentHandle
from sqlalchemy.exc import DBAPIError
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from cluster.addresses import Addresses
from cluster.api_common import Authorised, InputSchema, exception_handlers
from cluster.bodies import Bodies
from cluster.cog_api import CogApi
from cluster.connections import UVICORN, allow_many_connections
from cluster.dispatcher import Dispatcher
from cluster.docs_page import DocsPage
from cluster.failures import places
from cluster.files import Files
from cluster.forms import Forms
from cluster.metrics import Counted, Metrics
from cluster.playground_page import PlaygroundPage
from cluster.predictions import Predictions
from cluster.replica import LOGGING, listen_on_this_node_only
from cluster.replicate_api import ReplicateApi
from cluster.run import Means
from cluster.settings import DRAIN_SECONDS, Arguments, ClusterSettings
from cluster.streams import Streams
from cluster.tasks import spawn
from cluster.watchdog import watch_event_loop
from cluster.webhooks import Webhooks, open_client
from local_cog import schema
from local_cog.server import listen

logger = logging.getLogger("ray.serve")

# How often a front shows in the database that it lives, and how many beats it may miss before others take its
# predictions. Beats are counted, not timed: clocks differ, and a database that is away stops all beats.
BEAT_SECONDS = 0.5
BEATS_MISSED = 12
# When a front that stands still is ended: until then the kernel keeps giving it connections, which hang.
SECONDS_STILL = 10
# How many predictions of dead fronts a front takes at a beat, so that all fronts share them.
ADOPTED_AT_ONCE = 20


@serve.deployment(
    graceful_shutdown_timeout_s=DRAIN_SECONDS + 30,
    health_check_period_s=5,
    health_check_timeout_s=10,
    max_surge_percent=100,  # at an update, new fronts listen before old ones stop
    ray_actor_options={"num_cpus": 0.5},
    logging_config=LOGGING,
)
class Front:
    """The life of one front."""

    async def __init__(self, workers: DeploymentHandle, arguments: Arguments) -> None:
        listen_on_this_node_only()
        allow_many_connections()
        self.id = uuid.uuid4().hex[:12]
        self.workers, self.queue, self.affinity = workers, arguments.queue, arguments.affinity
        self.address, self.linger = (arguments.host, arguments.port), arguments.linger
        self.settings = ClusterSettings.from_environment()
        self.schema = InputSchema(schema.derive((Path(arguments.project) / "predict.py").read_text()))
        self.predictions = Predictions(self.settings.database_url)
        self.files = Files(self.settings.files_url)
        self.metrics = Metrics()
        self.worker_health: dict[str, Any] | None = None
        self.leaving = False
        self.life = AsyncExitStack()
        await self.life.enter_async_context(self._live())

    async def __del__(self) -> None:
        """Called by Serve when the front is to stop."""
        await self.life.aclose()

    @asynccontextmanager
    async def _live(self) -> AsyncIterator[None]:
        """Listen, run and beat; then leave: predictions that only wait are left to the other fronts."""
        # First, since a front that cannot listen must not adopt predictions.
        with listen(*self.address, shared=True) as listening:
            async with self.predictions, open_client(allow_private=self.settings.private_webhooks) as client:
                server = await self._build(client)
                helping = [spawn(self._ask_health()), spawn(self._tidy())]
                watched = spawn(watch_event_loop("front", SECONDS_STILL))
                self.beating = spawn(self._beat())
                self.serving = spawn(server.serve([listening]))
                yield
                self.leaving = True
                await asyncio.sleep(self.linger)
                server.should_exit = True
                await asyncio.wait([self.serving])
                for task in helping:
                    task.cancel()
                await self.dispatcher.drain()
                watched.cancel()
                self.beating.cancel()
                await asyncio.wait([self.beating])
                with contextlib.suppress(DBAPIError):  # the others also see that it beats no more
                    await self.predictions.leave(self.id)

    async def _build(self, client: aiohttp.ClientSession) -> uvicorn.Server:
        """The server of both APIs and the pages, over a new dispatcher."""
        predictions, files, settings = self.predictions, self.files, self.settings
        secret = await predictions.secret("webhooks")
        forms, streams = Forms(files, secret), Streams(predictions)
        webhooks, workers = Webhooks(client, secret, forms.show), self.workers.options(stream=True)
        means = Means(workers, predictions, files, webhooks, self.metrics, self.affinity)
        self.dispatcher = dispatcher = Dispatcher(self.id, means, self.queue)
        bodies = Bodies(settings.body_max_bytes, lambda: dispatcher.held)
        addresses = Addresses(settings.public_url, settings.trusted_proxies)
        private, tokens, outputs = settings.private_webhooks, bool(settings.api_tokens), settings.outputs
        answering = [
            DocsPage(self.schema.document, tokens, addresses),
            PlaygroundPage(tokens, self._health),
            CogApi(dispatcher, predictions, forms, self.schema, bodies, private, self._health),
            ReplicateApi(
                dispatcher, predictions, files, forms, streams, self.schema, bodies, private, addresses, secret, outputs
            ),
        ]
        application = Starlette(
            routes=[Route("/-/healthz", self._probe), *(route for each in answering for route in each.routes())],
            middleware=[Middleware(Authorised, tokens=settings.api_tokens)],
            exception_handlers=exception_handlers(),
        )
        application.router.redirect_slashes = False
        return uvicorn.Server(uvicorn.Config(Counted(application, self.metrics.answers), **UVICORN))

    async def _probe(self, _: Request) -> PlainTextResponse:
        """For load balancers: whether to send more requests here."""
        return PlainTextResponse("leaving", 503) if self.leaving else PlainTextResponse("success")

    async def _beat(self) -> None:
        """Show that this front lives, and take over the predictions of fronts that do not."""
        seen: dict[str, int] = {}
        missed: dict[str, int] = {}
        failing = False
        while True:
            try:
                self.metrics.unfinished.set(self.dispatcher.unfinished)
                beats, cancelled = await self.predictions.beat(self.id)
                missed = {name: missed[name] + 1 if seen.get(name) == beat else 0 for name, beat in beats.items()}
                seen = beats
                dead = [name for name, count in missed.items() if name != self.id and count >= BEATS_MISSED]
                for prediction_id in cancelled:
                    self.dispatcher.stop(prediction_id)
                await self.dispatcher.adopt(dead, 0 if self.leaving else ADOPTED_AT_ONCE)
                failing = False
            except Exception as error:
                if not failing:  # one line, however many fail
                    logger.error("Beats fail, and are tried again: %s", places(error))
                failing = True
            await asyncio.sleep(BEAT_SECONDS)

    async def _ask_health(self) -> None:
        """Wait until a worker is ready, and keep its Cog server's health."""
        while self.worker_health is None:
            try:
                self.worker_health = await self.workers.health.remote()
            except Exception as error:  # there is no worker yet, or it has ended or is slow
                logger.info("No worker has told its health yet: %s", places(error))
                await asyncio.sleep(1)

    async def _health(self) -> dict[str, Any]:
        """Cog's health check: READY as soon as one worker is, BUSY when the next request would be refused."""
        if self.worker_health is None:
            return {"status": await asyncio.to_thread(self._starting), "version": {}}
        return {**self.worker_health, "status": "BUSY" if self.dispatcher.full else "READY"}

    def _starting(self) -> str:
        """Cog's status while no worker is ready: STARTING or SETUP_FAILED."""
        deployments = serve.status().applications[self.workers.app_name].deployments
        failed = deployments[self.workers.deployment_name].status == "DEPLOY_FAILED"
        return "SETUP_FAILED" if failed else "STARTING"

    async def _tidy(self) -> None:
        """Delete expired predictions and files, every minute."""
        while True:
            await asyncio.sleep(60)
            try:
                await self.files.delete(await self.predictions.expire())
            except Exception as error:
                logger.error("Could not tidy up; the next time may succeed: %s", places(error))

    def check_health(self) -> None:
        """Called by Serve; RuntimeError where this front does not beat or does not listen."""
        if self.beating.done() or self.serving.done():
            raise RuntimeError("The front's heart has stopped.")
