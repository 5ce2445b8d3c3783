"""Many GPUs: a Ray Serve application of two deployments.

`CogWorker` has a GPU and the unchanged predictor in a Cog server of its own, to which it hands one prediction at a
time. `Front` speaks HTTP: Cog's contract and Replicate's API. It writes a prediction into the database before anybody
hears of it, hands it to a worker, and writes down how it ends; when a worker dies it asks another, and when a front
dies another front goes on. Fronts listen themselves: behind Serve's proxy each request would take 9 ms more, and a look
at a prediction eight times the processor time. This module knows Ray and who runs what; it knows nothing of images.
"""

import asyncio
import base64
import contextlib
import hashlib
import itertools
import json
import logging
import mimetypes
import os
import secrets
import subprocess
import time
import uuid
from base64 import b32encode
from collections import Counter
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

import aiohttp
import ray
import uvicorn
from aiohttp import web
from pydantic import BaseModel
from ray import serve
from ray.exceptions import RayActorError, TaskCancelledError
from ray.serve import metrics
from ray.serve._private import replica
from ray.serve.exceptions import BackPressureError, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator
from sqlalchemy.exc import OperationalError
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster import cog_api, replicate_api
from cluster.predictions import UNFINISHED, Files, Prediction, Predictions, now, scrub
from local_cog import schema
from local_cog.server import LOOPBACK, CogServer, listen
from settings import ROOT, ClusterSettings

logger = logging.getLogger("ray.serve")

APPLICATION = "flux-sprites"
# How often a front shows that it lives, and how many beats it may miss before others take what it has. Beats are
# counted, not timed: clocks differ, and a database that is away stops everybody's.
BEAT_SECONDS = 0.5
BEATS_MISSED = 12
# How many orphans a front takes at a beat; the rest is for the others.
ADOPTED_AT_ONCE = 20
# A prediction that takes its worker with it this often is not asked for again: each time costs a start.
MAX_DEATHS = 3
# How often the database hears of a prediction's progress; the end is written at once.
RECORD_SECONDS = 0.5
# The last webhook is tried this often, as by coglet, the pause doubling from a fifth of a second.
WEBHOOK_TRIES = 12
# Longer than the longest prediction: what is being drawn when a replica is to go is drawn to its end.
DRAIN_SECONDS = 900
WEBHOOK_TIMEOUT = aiohttp.ClientTimeout(total=30)
# A prediction that coglet 0.23 is told to cancel within its first milliseconds can block it for ever.
CANCEL_SECONDS = 0.05
# Serve would write a line for each call of a worker, which takes a millisecond.
LOGGING = {"enable_access_log": False}
# What a worker hears of Cog. Its output comes with the end, and would come twice, pictures and all.
HEARD = ["start", "logs", "completed"]
# Where Debian keeps the certificates of authorities, and all of them in one file.
AUTHORITIES = Path("/etc/ssl/certs")
AUTHORITIES_FILE = AUTHORITIES / "ca-certificates.crt"
# Longer than load balancers hold an idle connection, Google's 600 s: it must not be closed under a request.
KEEP_ALIVE_SECONDS = 620
# How many LoRAs a worker is taken to hold when requests are led to it.
LORAS_HELD = 16


class Arguments(BaseModel):
    """The application's, in `args` of a Serve configuration; what holds secrets comes from the environment."""

    # Where predict.py is.
    project: str = str(ROOT)
    workers: int = 1
    gpus_per_worker: float = 1
    fronts: int = 2
    # Where fronts listen; those of one machine share the port.
    host: str = LOOPBACK
    port: int = 8000
    # Seconds that a front which is to go says so to who probes it, and answers: load balancers hear of it late.
    linger: float = 0
    # Unfinished predictions that one front takes; further ones are answered 503.
    queue: int = 1000
    # "router" leads a request to a worker that has its LoRAs, and waits for it a little.
    affinity: Literal["none", "router"] = "none"


@serve.deployment(
    max_ongoing_requests=1,  # as the predictor has it
    max_queued_requests=-1,  # the fronts bound what they accept, and what was accepted may wait
    graceful_shutdown_timeout_s=DRAIN_SECONDS,
    health_check_period_s=5,
    logging_config=LOGGING,
)
class CogWorker:
    """One GPU: the predictor in a Cog server of its own, reached over loopback."""

    async def __init__(self, project: str) -> None:
        _listen_on_this_node_only()
        self.server = CogServer(Path(project), environment=_authorities()).__enter__()
        self.keeper = _kill_with_this_process(self.server.process.pid)
        try:
            await asyncio.to_thread(self.server.wait_until_ready)
            await self._listen()
        except BaseException:
            self.stop()
            raise

    async def _listen(self) -> None:
        """Hear from Cog how a prediction goes: through its webhooks, to this process alone."""
        self.client = aiohttp.ClientSession(f"http://{LOOPBACK}:{self.server.port}")
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
        site = web.TCPSite(runner, LOOPBACK, 0)
        await site.start()
        self.address = f"http://{LOOPBACK}:{runner.addresses[0][1]}"

    async def _hear(self, request: web.Request) -> web.Response:
        if request.match_info["run"] == self.run:  # else a latecomer of the prediction before
            self.events.put_nowait(await request.json())
        return web.Response()

    async def health(self) -> dict[str, Any]:
        """What Cog's `GET /health-check` says here."""
        async with self.client.get("/health-check") as answered:
            return await answered.json()

    async def predict(
        self, prediction_id: str, inputs: dict[str, Any], loras: str
    ) -> AsyncIterator[list[dict[str, Any]]]:
        """Run a prediction and tell how it goes; closing the iterator cancels it.

        Args:
            prediction_id: Cog's.
            inputs: validated.
            loras: a name for the LoRAs that it needs, empty for none.

        Yields:
            Cog's descriptions of the prediction since the last time, the very last with a status that is an end.
        """
        # Serve frees the place of a call that is cancelled before its cleaning up has ended.
        async with self.one_at_a_time:
            await asyncio.wait([self.settling])
            if loras:
                (self.lora_hits if next(await self._hold(loras)) else self.lora_loads).inc()
            self.run, self.events = secrets.token_urlsafe(), asyncio.Queue()
            body = {"input": inputs, "webhook": f"{self.address}/{self.run}", "webhook_events_filter": HEARD}
            url = f"/predictions/{quote(prediction_id, safe='')}"
            ended = False
            try:
                async with self.client.put(url, json=body, headers={"Prefer": "respond-async"}) as answered:
                    if answered.status != 202:
                        raise RuntimeError(f"Cog refused the prediction: {(await answered.text())[:500]}")
                while not ended:
                    states = await self._next_states()
                    ended = states[-1]["status"] not in UNFINISHED
                    if states[-1]["status"] == "failed":
                        # It may have taken the predictor with it: then this worker ends, and another one tries.
                        await self._settle()
                    yield states
            finally:
                # Who has heard the end need not wait until the next prediction can begin.
                self.settling = asyncio.create_task(self._settle(None if ended else url))

    async def _next_states(self) -> list[dict[str, Any]]:
        """What Cog has said since the last time."""
        while True:
            try:
                states = [await asyncio.wait_for(self.events.get(), 1)]
            except TimeoutError:
                self._end_if(self.server.process.poll() is not None)
                continue
            # Cog waits for nobody to hear of a log before it tells the end: what comes after the end is not heard.
            while states[-1]["status"] in UNFINISHED and not self.events.empty():
                states.append(self.events.get_nowait())
            return states

    async def _settle(self, cancelling: str | None = None) -> None:
        """Wait until Cog can take the next prediction, which it cannot yet when it tells the end of one.

        The process ends if Cog never will: if it is defunct, or busy without having a prediction.

        Args:
            cancelling: the prediction that is to end first.
        """
        if cancelling:
            await asyncio.sleep(CANCEL_SECONDS)
        forgotten = 0
        while True:
            try:
                status = (await self.health())["status"]
                if status == "READY":
                    return
                if cancelling and status == "BUSY":
                    async with self.client.post(f"{cancelling}/cancel") as answered:
                        forgotten += answered.status == 404
            except aiohttp.ClientError:
                status = "DEFUNCT"
            self._end_if(status != "BUSY" or forgotten > 20)
            await asyncio.sleep(CANCEL_SECONDS if cancelling else 0.005)

    def _end_if(self, defunct: bool) -> None:
        """A Cog server without its predictor refuses everything for ever; Serve replaces a worker that has ended."""
        if defunct:
            logger.error("The Cog server cannot go on; its worker ends.")
            os._exit(1)

    @serve.multiplexed(max_num_models_per_replica=LORAS_HELD)
    async def _hold(self, loras: str) -> Iterator[int]:
        """Let Serve know that these LoRAs are here from now on; the predictor has its own caches.

        Returns:
            What counts how often they have been asked for since.
        """
        return itertools.count()

    def check_health(self) -> None:
        """Called by Serve.

        Raises:
            RuntimeError: the Cog server has ended.
        """
        if self.server.process.poll() is not None:
            raise RuntimeError("The Cog server has ended.")

    def stop(self) -> None:
        """End the Cog server."""
        self.server.__exit__(None, None, None)
        self.keeper.kill()
        self.keeper.wait()

    def __del__(self) -> None:
        """Called by Serve when the worker is to go."""
        if hasattr(self, "keeper"):
            self.stop()


def _authorities() -> dict[str, str]:
    """Where Cog's server finds the certificates that it trusts, if it is to look where Debian has them.

    It reads them for each prediction that has a webhook: 0.8 ms from one file, 5 ms from the folder of the same.
    """
    usual = (
        os.environ.get("SSL_CERT_FILE", str(AUTHORITIES_FILE)) == str(AUTHORITIES_FILE)
        and os.environ.get("SSL_CERT_DIR", str(AUTHORITIES)) == str(AUTHORITIES)
        and AUTHORITIES_FILE.exists()
    )
    return {"SSL_CERT_FILE": str(AUTHORITIES_FILE), "SSL_CERT_DIR": os.devnull} if usual else {}


def _kill_with_this_process(group: int) -> subprocess.Popen[bytes]:
    """See to it that a process group does not outlive this process, however it ends: it would hold the GPU.

    The keeper reads from a pipe that nobody writes to; the end of this process closes it.
    """
    command = ["sh", "-c", 'read -r _; kill -s KILL -- "-$0"', str(group)]  # the one form that every shell knows
    return subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)


def _listen_on_this_node_only() -> None:
    """Bind the replica's inner port to the node's address: Serve 2.60 binds it to all, and asks nobody for a token."""
    add_port = replica.add_port_to_grpc_server
    address = ray.util.get_node_ip_address()
    replica.add_port_to_grpc_server = lambda server, place: add_port(server, place.replace("[::]", address))


class Lost(Exception):  # noqa: N818 (a state, not an accident)
    """A prediction is another front's, or has ended."""


class Metrics:
    """What Prometheus hears of a front, through Ray; `cluster/deploy/grafana.json` draws it."""

    def __init__(self) -> None:
        seconds = [0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300]
        self.unfinished = metrics.Gauge("flux_unfinished", "Predictions that this front has accepted and not ended.")
        self.ended = metrics.Counter("flux_predictions", "Predictions that have ended.", ("status",))
        self.latency = metrics.Histogram(
            "flux_seconds", "Where the time goes.", boundaries=seconds, tag_keys=("phase",)
        )
        self.images = metrics.Counter("flux_images", "Pictures drawn.")
        self.dropped = metrics.Counter("flux_safety_dropped", "Pictures that the safety check kept back.")
        self.retries = metrics.Counter("flux_retries", "Attempts that came to nothing, most often with their worker.")
        self.adopted = metrics.Counter("flux_adopted", "Predictions taken over from a front that had ended.")
        self.answers = metrics.Counter("flux_http_answers", "Requests that this front has answered.", ("status_code",))

    def count(self, prediction: Prediction) -> None:
        """A prediction has ended."""
        self.ended.inc(tags={"status": prediction.status})
        created, started, completed = (
            datetime.fromisoformat(time) if time else None
            for time in (prediction.created_at, prediction.started_at, prediction.completed_at)
        )
        self.latency.observe((completed - created).total_seconds(), {"phase": "total"})
        if started:
            self.latency.observe((started - created).total_seconds(), {"phase": "queue"})
        timings = {"predict": prediction.metrics.get("predict_time"), **(prediction.metrics.get("timing") or {})}
        for phase, seconds in timings.items():
            if isinstance(seconds, int | float):
                self.latency.observe(seconds, {"phase": phase})
        if isinstance(prediction.output, list) and prediction.output:
            self.images.inc(len(prediction.output))
        if dropped := (prediction.metrics.get("safety") or {}).get("dropped"):
            self.dropped.inc(len(dropped))


class Counted:
    """Counts answers.

    Args:
        app: what is behind it.
        answers: the counter.
    """

    def __init__(self, app: ASGIApp, answers: metrics.Counter) -> None:
        self.app, self.answers = app, answers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""

        async def counting(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.answers.inc(tags={"status_code": str(message["status"])})
            await send(message)

        await self.app(scope, receive, counting)


@dataclass(eq=False)
class Run:
    """A prediction while this front runs it."""

    prediction: Prediction
    # The database has it.
    written: asyncio.Event = field(default_factory=asyncio.Event)
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    response: DeploymentResponseGenerator | None = None
    # What has been stored of its output, by the data URI's hash.
    files: dict[str, Any] = field(default_factory=dict)
    recorded: float = 0
    # The webhook that is on its way.
    telling: asyncio.Task | None = None
    task: asyncio.Task | None = None


@serve.deployment(
    graceful_shutdown_timeout_s=DRAIN_SECONDS + 30,
    # Nobody asks for a front that hangs, and the kernel gives it its share of connections.
    health_check_period_s=5,
    health_check_timeout_s=10,
    max_surge_percent=100,  # an update: nothing queues for a front that has gone before the next has come
    ray_actor_options={"num_cpus": 0.5},
    logging_config=LOGGING,
)
class Front:
    """HTTP; who runs a prediction, and that it ends once."""

    async def __init__(self, workers: DeploymentHandle, arguments: Arguments) -> None:
        _listen_on_this_node_only()
        self.id = uuid.uuid4().hex[:12]
        self.workers = workers.options(stream=True)
        self.address, self.linger = (arguments.host, arguments.port), arguments.linger
        self.limit, self.affinity = arguments.queue, arguments.affinity
        self.settings = ClusterSettings.from_environment()
        self.schema = cog_api.InputSchema(schema.derive((Path(arguments.project) / "predict.py").read_text()))
        self.predictions = Predictions(self.settings.database_url)
        self.files = Files(self.settings.files_url)
        self.runs: dict[str, Run] = {}
        self.tasks: set[asyncio.Task] = set()
        self.worker_health: dict[str, Any] | None = None
        self.started_at = now()
        self.leaving = False
        self.metrics = Metrics()
        self.life = AsyncExitStack()
        await self.life.enter_async_context(self._live())

    async def __del__(self) -> None:
        """Called by Serve when the front is to go."""
        await self.life.aclose()

    # ---- Its life

    @asynccontextmanager
    async def _live(self) -> AsyncIterator[None]:
        """From the first beat to the last; what cannot be finished is left to the others."""
        # First of all, for who cannot listen must take nothing.
        with listen(*self.address, shared=True) as listening:
            async with self.predictions, aiohttp.ClientSession() as self.client:
                self.webhook_secret = await self.predictions.secret("webhooks")
                asking = self._spawn(self._ask_health())
                tidying = self._spawn(self._tidy())
                self.beating = self._spawn(self._beat())
                server = self._server()
                self.serving = self._spawn(server.serve([listening]))
                yield
                self.leaving = True
                await asyncio.sleep(self.linger)
                server.should_exit = True
                await asyncio.wait([self.serving])
                for task in (asking, tidying):
                    task.cancel()
                await self._drain()
                self.beating.cancel()
                await asyncio.wait([self.beating])
                await self.predictions.leave(self.id)

    def _server(self) -> uvicorn.Server:
        """Both APIs over HTTP; told to exit, it hears nothing new and answers what it was asked."""
        application = Starlette(
            routes=[Route("/-/healthz", self._probe), *cog_api.routes(self), *replicate_api.routes(self)],
            middleware=replicate_api.middleware(self),
            exception_handlers=replicate_api.exception_handlers(),
        )
        application.router.redirect_slashes = False
        settings = uvicorn.Config(
            Counted(application, self.metrics.answers),
            lifespan="off",
            ws="none",
            proxy_headers=False,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            # Of a client that has vanished nobody hears.
            timeout_graceful_shutdown=DRAIN_SECONDS // 2,
            log_config=None,
            access_log=False,
        )
        return uvicorn.Server(settings)

    async def _probe(self, _: Request) -> PlainTextResponse:
        """For load balancers: whether to send more."""
        return PlainTextResponse("leaving", 503) if self.leaving else PlainTextResponse("success")

    async def _beat(self) -> None:
        """Show that this front lives, and take what belongs to none."""
        seen: dict[str, int] = {}
        missed: Counter[str] = Counter()
        while True:
            try:
                self.metrics.unfinished.set(self.unfinished)
                beats, cancelled = await self.predictions.beat(self.id)
                for front, beat in beats.items():
                    missed[front] = missed[front] + 1 if seen.get(front) == beat else 0
                seen = beats
                dead = [front for front in beats if front != self.id and missed[front] >= BEATS_MISSED]
                for prediction_id in cancelled:
                    self._stop(prediction_id)
                limit = 0 if self.leaving else ADOPTED_AT_ONCE
                for orphan in await self.predictions.adopt(self.id, dead, list(self.runs), limit):
                    logger.info("Adopted prediction %s.", orphan.id)
                    self.metrics.adopted.inc()
                    if orphan.id not in self.runs:
                        self._take(orphan)
            except Exception:
                logger.exception("A beat failed; the next one may not.")
            await asyncio.sleep(BEAT_SECONDS)

    async def _ask_health(self) -> None:
        """Learn that a worker is ready, and what its Cog server says of itself."""
        while self.worker_health is None:
            try:
                self.worker_health = await self.workers.options(stream=False).health.remote()
            except (RayActorError, ReplicaUnavailableError):
                await asyncio.sleep(1)

    async def _tidy(self) -> None:
        """Forget what has been kept for its time."""
        while True:
            await asyncio.sleep(60)
            try:
                await self.files.delete(await self.predictions.expire())
            except Exception:
                logger.exception("Could not tidy up; the next time may succeed.")

    async def _drain(self) -> None:
        """Let what is being drawn come to its end; what only waits is for another front."""
        waiting = [run.task for run in self.runs.values() if run.prediction.status == "starting"]
        for task in waiting:
            task.cancel()
        if waiting:
            await asyncio.wait(waiting)
        await self.predictions.release(self.id, list(self.runs))
        while self.unfinished:
            await asyncio.sleep(0.05)

    def check_health(self) -> None:
        """Called by Serve.

        Raises:
            RuntimeError: this front shows no sign of life to the others, or does not listen.
        """
        if self.beating.done() or self.serving.done():
            raise RuntimeError("The front's heart has stopped.")

    # ---- What the APIs ask for

    @property
    def unfinished(self) -> int:
        """How many predictions are on their way here."""
        return sum(not run.ended.is_set() for run in self.runs.values())

    @staticmethod
    def new_id() -> str:
        """An id as Replicate's: 26 letters and digits that nobody can guess."""
        return b32encode(uuid.uuid4().bytes).decode().lower().rstrip("=")

    async def accept(self, prediction: Prediction) -> tuple[Prediction, bool]:
        """Take a prediction: once this returns, it will end.

        Returns:
            What is known under its id, and whether it is this very one.

        Raises:
            Refused: the queue is full.
        """
        if self.unfinished >= self.limit:
            detail = f"The queue is full: {self.limit} predictions wait. Try again later."
            raise replicate_api.unavailable(detail, cog=prediction.api == "cog")
        if running := self.runs.get(prediction.id):
            return running.prediction, False
        # A worker is sought while the database writes; nothing is told of it before it is written.
        run = self._take(prediction, written=False)
        try:
            known, created = await self.predictions.create(prediction)
        except BaseException:
            run.task.cancel()
            raise
        if created:
            run.written.set()
        else:
            run.task.cancel()
        return known, created

    async def cancel(self, prediction_id: str) -> bool:
        """End a prediction early; False where there is none that could end."""
        found = await self.predictions.cancel(prediction_id)
        self._stop(prediction_id)
        return found

    async def ended(self, prediction: Prediction, seconds: float | None = None) -> Prediction:
        """Wait for the end of a prediction, at most so long; how it stands then."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                if run := self.runs.get(prediction.id):
                    await run.ended.wait()
                while not prediction.finished:
                    prediction = await self.predictions.get(prediction.id) or prediction
                    if not prediction.finished:
                        await asyncio.sleep(0.25)
        return prediction

    async def ended_or_left(self, prediction: Prediction, request: Request) -> Prediction:
        """Wait for the end of a prediction; it is cancelled when the client goes, as by coglet."""

        async def gone() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass
            await self.cancel(prediction.id)

        watching = asyncio.create_task(gone())
        try:
            return await self.ended(prediction)
        finally:
            watching.cancel()

    async def health(self) -> dict[str, Any]:
        """Cog's: READY as soon as one worker is, BUSY when the next request would be refused."""
        if self.worker_health is None:
            return {"status": await asyncio.to_thread(_status_of_start), "version": {}}
        return {**self.worker_health, "status": "BUSY" if self.unfinished >= self.limit else "READY"}

    # ---- A prediction's way

    def _take(self, prediction: Prediction, *, written: bool = True) -> Run:
        run = self.runs[prediction.id] = Run(prediction)
        if written:
            run.written.set()
        run.task = self._spawn(self._run(run))
        return run

    def _stop(self, prediction_id: str) -> None:
        if run := self.runs.get(prediction_id):
            run.prediction.cancel_requested = True
            if run.response is not None:
                run.response.cancel()

    async def _run(self, run: Run) -> None:
        """One prediction from the queue to its last webhook."""
        prediction = run.prediction
        try:
            if not prediction.finished:  # else only its last webhook has been left over
                await self._draw(run)
                await self._finish(run)
            run.ended.set()
            if prediction.webhook_due:
                await self._deliver(run)
        except Lost:
            logger.info("Prediction %s is somebody else's now.", prediction.id)
        finally:
            if run.response is not None and not prediction.finished:
                run.response.cancel()
            run.ended.set()
            del self.runs[prediction.id]

    async def _draw(self, run: Run) -> None:
        """Have a worker run it; another one where that one dies."""
        prediction = run.prediction
        while not prediction.finished:
            if prediction.cancel_requested:
                _cancel(prediction)
                return
            try:
                loras = _lora_key(prediction.request)
                workers = self.workers
                if self.affinity == "router" and loras:
                    workers = workers.options(multiplexed_model_id=loras)
                run.response = workers.predict.remote(prediction.id, await self._brought(prediction.request), loras)
                async for states in run.response:
                    for state in states:
                        await self._progress(run, state)
                    if prediction.finished:
                        break
            except (TaskCancelledError, asyncio.CancelledError):
                if not prediction.cancel_requested:
                    raise
            except (Lost, OperationalError):
                raise
            except BackPressureError:
                await asyncio.sleep(1)
            except Exception as error:
                # Most often a worker that has died; whatever it was, another attempt may succeed.
                logger.warning("Prediction %s was interrupted: %r", prediction.id, error)
                await self._mourn(run)

    async def _mourn(self, run: Run) -> None:
        """An attempt has come to nothing: make another, or give the prediction up."""
        prediction = run.prediction
        await run.written.wait()
        prediction.deaths += 1
        self.metrics.retries.inc()
        if prediction.deaths >= MAX_DEATHS:
            prediction.status = "failed"
            prediction.error = f"The prediction was given up: {MAX_DEATHS} workers ended while they ran it."
        elif not await self.predictions.record(prediction, deaths=prediction.deaths):
            raise Lost
        await asyncio.sleep(0.1)

    async def _progress(self, run: Run, state: dict[str, Any]) -> None:
        """A worker tells how far it has come."""
        prediction = run.prediction
        await run.written.wait()
        if prediction.started_at is None:
            prediction.started_at = now()
            prediction.status = "processing"
            await self._notify(run, "start")
        news, metrics = "logs", state.get("metrics", {})
        if "output" in state and (output := await self._stored(run, state["output"])) != prediction.output:
            prediction.output, news = output, "output"
        prediction.logs = scrub(state.get("logs", ""), prediction.request)
        prediction.metrics = {name: value for name, value in metrics.items() if name != "predict_time"}
        ended = state["status"] not in UNFINISHED
        # An output comes with the end, and is told before it.
        if news == "output" or (prediction.logs and not ended):
            await self._notify(run, news)
        prediction.status, prediction.metrics = state["status"], metrics
        if error := state.get("error"):
            prediction.error = scrub(error, prediction.request)
        if not ended and time.monotonic() - run.recorded > RECORD_SECONDS:
            run.recorded = time.monotonic()
            if not await self.predictions.record(prediction, **_values(prediction, "started_at")):
                raise Lost

    async def _finish(self, run: Run) -> None:
        """Write down how it ended: whoever does that first has ended it."""
        prediction = run.prediction
        await run.written.wait()
        prediction.completed_at = now()
        prediction.webhook_due = bool(prediction.webhook) and "completed" in prediction.webhook_events
        changes = _values(prediction, "started_at", "completed_at", "error", "webhook_due")
        if not await self.predictions.finish(prediction, run.files.values(), **changes):
            raise Lost
        prediction.request = None
        self.metrics.count(prediction)

    async def _stored(self, run: Run, output: Any) -> Any:  # noqa: ANN401 (JSON)
        """An output whose data URIs have become files of the front."""
        if isinstance(output, list):
            return [await self._stored(run, item) for item in output]
        if isinstance(output, dict):
            return {key: await self._stored(run, item) for key, item in output.items()}
        if not (isinstance(output, str) and output.startswith("data:")):
            return output
        key = hashlib.sha256(output.encode()).hexdigest()
        if key not in run.files:
            head, _, content = output.partition(",")
            kind = head.removeprefix("data:").removesuffix(";base64")
            name = f"output{mimetypes.guess_extension(kind) or ''}"
            run.files[key] = await self.files.write(base64.b64decode(content), name, kind)
        file = run.files[key]
        return f"/files/{file.id}/{file.name}"

    async def _brought(self, value: Any) -> Any:  # noqa: ANN401 (JSON)
        """An input whose uploads, URLs of the front, have become data URIs: a worker need not ask for them."""
        if isinstance(value, dict):
            return {key: await self._brought(item) for key, item in value.items()}
        if isinstance(value, list):
            return [await self._brought(item) for item in value]
        if isinstance(value, str) and (file_id := replicate_api.upload_id(value)):
            file = await self.predictions.file(file_id)
            if file is not None:
                content = base64.b64encode(await self.files.read(file.id)).decode()
                return f"data:{file.content_type};base64,{content}"
        return value

    # ---- Webhooks

    async def _notify(self, run: Run, event: str) -> None:
        """Send a webhook on the way; one that does not arrive is not sent again, as by coglet."""
        prediction, before = run.prediction, run.telling
        if not prediction.webhook or event not in prediction.webhook_events:
            return
        if event == "logs" and before and not before.done():
            return  # the next one holds these logs too; who listens slowly hears fewer
        body = await self._webhook_body(prediction)

        async def tell() -> None:
            if before:
                await asyncio.wait([before])
            await self._post(prediction.webhook, f"{prediction.id}-{secrets.token_hex(6)}", body)

        run.telling = self._spawn(tell())

    async def _deliver(self, run: Run) -> None:
        """Send the last webhook until it arrives; nothing comes after it."""
        prediction = run.prediction
        if run.telling:
            await asyncio.wait([run.telling])
        body = await self._webhook_body(prediction)
        for attempt in range(WEBHOOK_TRIES):
            if await self._post(prediction.webhook, f"{prediction.id}-completed", body):
                break
            await asyncio.sleep(min(30, 0.2 * 2**attempt))
        await self.predictions.delivered(prediction)

    async def _webhook_body(self, prediction: Prediction) -> str:
        if prediction.api == "replicate":
            return json.dumps(replicate_api.show(self, prediction))
        return json.dumps(await cog_api.show(self, prediction))

    async def _post(self, url: str, delivery: str, body: str) -> bool:
        """One attempt; False where another may succeed."""
        headers = {"content-type": "application/json", **replicate_api.signed(self.webhook_secret, delivery, body)}
        try:
            async with self.client.post(url, data=body.encode(), headers=headers, timeout=WEBHOOK_TIMEOUT) as answered:
                return answered.status not in (429, 500, 502, 503, 504)
        except aiohttp.InvalidURL:
            return True
        except (aiohttp.ClientError, TimeoutError):
            return False

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task:
        """Start a task and hold it, since nothing else does."""
        task = asyncio.create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self._forget)
        return task

    def _forget(self, task: asyncio.Task) -> None:
        self.tasks.discard(task)
        if not task.cancelled() and task.exception():
            logger.error("A task of the front failed.", exc_info=task.exception())


def _cancel(prediction: Prediction) -> None:
    """How a prediction stands whose worker was told to stop; of the time until then Cog would say the same."""
    prediction.status = "canceled"
    if prediction.started_at:
        seconds = (datetime.fromisoformat(now()) - datetime.fromisoformat(prediction.started_at)).total_seconds()
        prediction.metrics = {"predict_time": seconds, **prediction.metrics}


def _values(prediction: Prediction, *more: str) -> dict[str, Any]:
    names = ("status", "output", "logs", "metrics", *more)
    return {name: getattr(prediction, name) for name in names}


def _lora_key(inputs: dict[str, Any]) -> str:
    """A name for the LoRAs that a request needs; hashed, for it becomes a label and references may hold tokens."""
    references = [inputs[name] for name in ("replicate_weights", "extra_lora") if inputs.get(name)]
    return hashlib.sha256(json.dumps(references).encode()).hexdigest()[:16] if references else ""


def _status_of_start() -> str:
    """What Cog would say of a worker that has not been heard of yet."""
    workers = serve.status().applications[APPLICATION].deployments["CogWorker"]
    return "SETUP_FAILED" if workers.status == "DEPLOY_FAILED" else "STARTING"


def application(arguments: Arguments) -> serve.Application:
    """What a Serve configuration names as `cluster.front:application`."""
    router = {}
    if arguments.affinity == "router":
        router["request_router_config"] = {"request_router_class": "cluster.affinity:AffinityRouter"}
    workers = CogWorker.options(
        num_replicas=arguments.workers,
        ray_actor_options={"num_cpus": 1, "num_gpus": arguments.gpus_per_worker},
        **router,
    ).bind(arguments.project)
    return Front.options(num_replicas=arguments.fronts).bind(workers, arguments)
