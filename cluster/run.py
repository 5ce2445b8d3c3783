"""One prediction in a front: a worker draws it, its client is told, its end is written once.

When a worker dies, another one is asked. Most other errors end the prediction as failed: a result that cannot be stored
is not drawn again, and an end is held in memory until the database takes it. This module knows Ray's handle of the
workers and the order of all steps; it knows nothing of HTTP or of how a client sees a prediction.
"""

import asyncio
import contextlib
import hashlib
import logging
import math
import sys
import time
from collections.abc import Awaitable, Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, TypeVar

import ray
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator
from sqlalchemy.exc import DBAPIError

from cluster.database import may_be_repaired, may_pass
from cluster.failures import ATTEMPTS, ATTEMPTS_THAT_HANG, Again, Failure, places
from cluster.files import Files, names_files
from cluster.metrics import Metrics
from cluster.predictions import UNFINISHED, File, Prediction, Predictions, now
from cluster.privacy import redact_log, secrets_of
from cluster.ray_failures import judge
from cluster.tasks import spawn
from cluster.webhooks import Webhooks
from local_cog.server import PREDICTION_ID
from service.strict_json import storable
from settings import MIB
from sources.choices import identities

logger = logging.getLogger("ray.serve")

# A prediction that was adopted from more dead fronts than this is given up: it may have ended them.
MAX_ADOPTIONS = 5
# How often a prediction's progress is written into the database; the end is written at once.
RECORD_SECONDS = 0.5
# How long a worker may take to stop a cancelled prediction, as it may hang; then its end is written without the worker.
SECONDS_TO_CANCEL = 5
# Ray keeps larger inputs in its store (about), which is small; and how many of these may wait for workers there.
LARGE_BYTES, LARGE_WAITING = 100_000, 4
# Cog takes no larger body; files have a third more bytes in it than by themselves.
COG_BYTES = 100 * MIB
# Redacting a longer log takes milliseconds.
LONG_CHARACTERS = 20_000
# Puts inputs into Ray's store, which may wait for seconds: in a thread of its own, since asyncio's are few.
_putting = ThreadPoolExecutor(1, "putting")
# What changes while a prediction runs.
_CHANGES = ("status", "output", "logs", "metrics", "error", "started_at", "completed_at", "webhook_due")
T = TypeVar("T")


@dataclass(frozen=True)
class Means:
    """What a front runs predictions with."""

    workers: DeploymentHandle
    predictions: Predictions
    files: Files
    webhooks: Webhooks
    metrics: Metrics
    # "router" leads a request to a worker that has its LoRAs.
    affinity: str
    # Places for large inputs that wait in Ray's store for a worker.
    large_waiting: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(LARGE_WAITING))


@dataclass(eq=False)
class Run:
    """A prediction while this front runs it: a task that begins at once and ends after the last webhook."""

    prediction: Prediction
    means: Means
    # Set by the dispatcher when the database has the prediction; until then nothing is told or written.
    written: asyncio.Event = field(default_factory=asyncio.Event)
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    # Its end cannot be written: adopted again, it would be drawn again.
    stuck: bool = False
    # The present attempt: the worker's response, and whether the worker has begun.
    response: DeploymentResponseGenerator | None = None
    begun: bool = False
    # Bounds that attempt, once the prediction is cancelled.
    deadline: asyncio.Timeout | None = None
    # Closing it gives back the place of `Means.large_waiting`, if this has one.
    place: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    # How many attempts hung, and how many failed otherwise; a worker that died while drawing is in `Prediction.deaths`.
    hangs: int = 0
    failures: int = 0
    # The stored files of its output, by the hashes of their data URIs.
    files: dict[str, File] = field(default_factory=dict)
    # Parts of its inputs that must not stand in its log and its error.
    secrets: Collection[str] = ()
    # When its progress was written; infinite while it is being written.
    recorded: float = 0

    def __post_init__(self) -> None:
        """Start the task."""
        # How many bytes of memory its input takes, until it is forgotten.
        self.held = _size(self.prediction.secret_input)
        self.task = spawn(self._go())

    def stop(self) -> None:
        """Cancel the prediction; its end is still written and told."""
        self.prediction.cancel_requested = True
        self._tell_worker_to_stop()
        if self.deadline is not None and self.deadline.when() is None:
            seconds = 0 if self.response is None else SECONDS_TO_CANCEL
            self.deadline.reschedule(asyncio.get_running_loop().time() + seconds)

    async def _go(self) -> None:
        prediction = self.prediction
        left_over = prediction.finished  # all but its last webhook has been done
        try:
            if not left_over:
                await self._draw()
                if not await self._finish():
                    return
            self.ended.set()
            if prediction.webhook_due:
                if left_over and prediction.adoptions > MAX_ADOPTIONS:
                    logger.warning("The last webhook of prediction %.130r is given up.", prediction.id)
                else:
                    await self.means.webhooks.deliver(prediction)
                await self._ask_database(lambda: self.means.predictions.delivered(prediction))
        except Exception as error:
            self.stuck = True
            logger.error("Prediction %.130r cannot be ended by this front: %s", prediction.id, places(error))

    async def _draw(self) -> None:
        """Have a worker run it, and another one if that one dies."""
        prediction = self.prediction
        while not prediction.finished:
            try:
                if prediction.cancel_requested:
                    _end_cancelled(prediction)
                else:
                    _check_runnable(prediction)
                    await self._ask_worker()
            except (BackPressureError, DeploymentUnavailableError):  # no worker now; there may be one later
                await asyncio.sleep(1)
            except (asyncio.CancelledError, Exception) as error:
                if isinstance(error, asyncio.CancelledError) and self.task.cancelling():  # by this front
                    raise
                if (
                    not prediction.cancel_requested
                ):  # else the attempt ran into `stop`'s deadline: the next turn ends it
                    await self._end_attempt(error)

    async def _ask_worker(self) -> None:
        """One attempt: wait for a free worker, and follow its states of the prediction until the end."""
        prediction, means = self.prediction, self.means
        self.response, self.begun = None, False
        try:
            async with asyncio.timeout(None) as self.deadline:
                # In threads, since inputs may be large.
                loras = await asyncio.to_thread(_lora_key, prediction.secret_input)
                self.secrets = await asyncio.to_thread(secrets_of, prediction.secret_input)
                workers = means.workers
                if means.affinity == "router" and loras:
                    workers = workers.options(multiplexed_model_id=loras)
                if self.held > LARGE_BYTES or names_files(prediction.secret_input):
                    await means.large_waiting.acquire()
                    self.place.callback(means.large_waiting.release)
                self.response = workers.predict.remote(prediction.id, await self._inputs(), loras)
                async for states in self.response:
                    for state in states:
                        await self._progress(storable(state))
                    if prediction.finished:
                        return
            raise RuntimeError("The worker has told no end.")
        finally:
            self.deadline = None
            self.place.close()
            if not prediction.finished:
                self._tell_worker_to_stop()

    async def _inputs(self) -> Any:  # noqa: ANN401 (JSON, or Ray's reference to it)
        """The inputs as a worker gets them, with the cluster's files inside."""
        prediction, means = self.prediction, self.means
        asked = (prediction.secret_input, means.predictions, prediction.base_url, COG_BYTES)
        inputs = await self._ask_database(lambda: means.files.inline_files(*asked))
        if _size(inputs) > LARGE_BYTES:
            # Passed as they are, Ray would put them into its store in this thread, and wait there for room.
            return await asyncio.get_running_loop().run_in_executor(_putting, ray.put, inputs)
        return inputs

    def _tell_worker_to_stop(self) -> None:
        if self.response is not None:
            with contextlib.suppress(Exception):  # Serve raises an earlier error of the call here
                self.response.cancel()

    async def _end_attempt(self, error: BaseException) -> None:
        """Prepare another attempt after a failed one where that can help, or end the prediction as failed."""
        prediction, failure = self.prediction, judge(error)
        logger.warning("An attempt at prediction %.130r came to nothing: %s", prediction.id, places(error))
        if self._may_try_again(failure):
            self.means.metrics.retries.inc()
            await self._record(deaths=prediction.deaths)
            await asyncio.sleep(0.1 + self.failures)
        else:
            _fail(prediction, failure.sentence)

    def _may_try_again(self, failure: Failure) -> bool:
        """Whether another attempt is to be made after this failure, which is counted."""
        if failure.again is Again.WORKER_ENDED and self.begun:  # else it has not died of the prediction
            self.prediction.deaths += 1
            return self.prediction.deaths < ATTEMPTS
        if failure.again is Again.HUNG:
            self.hangs += 1
            return self.hangs < ATTEMPTS_THAT_HANG
        self.failures += 1
        helps = failure.again is Again.CUT_OFF or (failure.again is not Again.NEVER and not self.begun)
        return helps and self.failures < ATTEMPTS

    async def _record(self, **changes: object) -> None:
        """Write how far the prediction has come; what cannot be written now comes with the next write."""
        try:
            await self.written.wait()
            ours = await self.means.predictions.record(self.prediction, **changes)
        except Exception as error:
            logger.warning("The progress of prediction %.130r is not written: %s", self.prediction.id, places(error))
        else:
            if not ours and not self.prediction.finished:
                logger.info("Prediction %.130r is somebody else's now.", self.prediction.id)
                self.task.cancel()
        self.recorded = time.monotonic()

    async def _progress(self, state: dict[str, Any]) -> None:
        """Take over, tell and write one state of the prediction, as the worker's Cog gives it."""
        prediction, webhooks = self.prediction, self.means.webhooks
        await self.written.wait()
        self.begun = True
        self.place.close()
        if prediction.started_at is None:
            prediction.started_at = now()
            prediction.status = "processing"
            await webhooks.notify(prediction, "start")
        event, metrics = "logs", state.get("metrics", {})
        if "output" in state:
            output = await self.means.files.store_output(state["output"], self.files)
            if output != prediction.output:
                prediction.output, event = output, "output"
        prediction.logs = await self._redact(state.get("logs", ""))
        prediction.metrics = {name: value for name, value in metrics.items() if name != "predict_time"}
        ended = state["status"] not in UNFINISHED
        # The worker's last state has both the output and the end; clients hear of the output first, without its time.
        if event == "output" or (prediction.logs and not ended):
            await webhooks.notify(prediction, event)
        if error := state.get("error"):
            prediction.error = await self._redact(error)
        prediction.status, prediction.metrics = state["status"], metrics
        if not ended and time.monotonic() - self.recorded > RECORD_SECONDS:
            self.recorded = math.inf
            spawn(self._record(**_values(prediction)))

    async def _redact(self, text: str) -> str:
        """A log or an error as it may be shown; a long one is redacted in a thread."""
        if len(text) < LONG_CHARACTERS:
            return redact_log(text, self.secrets)
        return await asyncio.to_thread(redact_log, text, self.secrets)

    async def _finish(self) -> bool:
        """Write how it ended; False where another front has it, or has ended it."""
        prediction = self.prediction
        await self.written.wait()
        prediction.completed_at = now()
        prediction.webhook_due = self.means.webhooks.wanted(prediction, "completed")
        try:
            ours = await self._write_end()
        except Exception as error:
            # Something in the result cannot be stored, and could not after another attempt.
            logger.error("The end of prediction %.130r is not written: %s", prediction.id, places(error))
            _fail(prediction, f"The database cannot store the result ({type(error).__name__}).")
            prediction.logs, prediction.metrics = "", {}
            ours = await self._write_end()
        prediction.secret_input, self.held = None, 0
        if ours:
            self.means.metrics.count(prediction)
        else:
            logger.info("Prediction %.130r is somebody else's now.", prediction.id)
        return ours

    async def _write_end(self) -> bool:
        prediction, files = self.prediction, self.files.values()
        return await self._ask_database(lambda: self.means.predictions.finish(prediction, files, **_values(prediction)))

    async def _ask_database(self, ask: Callable[[], Awaitable[T]]) -> T:
        """The result of a database query, which is repeated while the database is away, full or read-only."""
        warned = False
        while True:
            try:
                return await ask()
            except DBAPIError as error:
                if not (may_pass(error) or may_be_repaired(error)):
                    raise
                if not warned:
                    logger.warning("Prediction %.130r waits for the database: %s", self.prediction.id, places(error))
                warned = True
                await asyncio.sleep(1)


def _check_runnable(prediction: Prediction) -> None:
    """Raise a Failure where it cannot be run, or where so many fronts have died with it that it may have ended them."""
    if not PREDICTION_ID.fullmatch(prediction.id):  # from an older front; Cog's server would lose its slot to it
        raise Failure("The prediction's id must have 1 to 128 letters, digits and _ . ~ -.")
    if prediction.adoptions > MAX_ADOPTIONS:
        raise Failure(f"The prediction was given up: {prediction.adoptions} fronts ended while they had it.")


def _fail(prediction: Prediction, sentence: str) -> None:
    prediction.status, prediction.error, prediction.output = "failed", storable(sentence), None


def _end_cancelled(prediction: Prediction) -> None:
    """End a cancelled prediction, with the time that it took, as Cog would."""
    prediction.status = "canceled"
    if prediction.started_at:
        seconds = (datetime.fromisoformat(now()) - datetime.fromisoformat(prediction.started_at)).total_seconds()
        prediction.metrics = {"predict_time": seconds, **prediction.metrics}


def _values(prediction: Prediction) -> dict[str, Any]:
    return {name: getattr(prediction, name) for name in _CHANGES}


def _size(inputs: Any) -> int:  # noqa: ANN401 (JSON: an older front may have left anything)
    """How many bytes of memory an input takes, about."""
    return sum(map(sys.getsizeof, inputs.values())) if isinstance(inputs, dict) else 0


def _lora_key(inputs: dict[str, Any]) -> str:
    """A name for the LoRAs that a request needs, in any order and at any strength.

    It is hashed, for it becomes a label, and references may hold tokens.
    """
    texts = [str(inputs[name]) for name in ("replicate_weights", "extra_lora") if inputs.get(name)]
    named = sorted(set().union(*map(identities, texts)))
    return hashlib.sha256("\n".join(named).encode(errors="replace")).hexdigest()[:16] if named else ""
