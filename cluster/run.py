"""One prediction's run by a front: drawn by a worker, told, ended once.

When a worker dies, another one is asked. Whatever else goes wrong ends the prediction as failed: what was drawn is not
drawn again because it cannot be stored, and its end is kept here until the database takes it. This module knows Ray's
handle of the workers, and the order of all steps; it knows nothing of HTTP or of how a client sees a prediction.
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
from ray.exceptions import TaskCancelledError
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

# A prediction that was adopted from more dead fronts than this is given up: it may be what ends them.
MAX_ADOPTIONS = 5
# How often a prediction's progress is written into the database; the end is written at once.
RECORD_SECONDS = 0.5
# How long a worker may take to let a cancelled prediction go, by the clock of its client: it may stand still.
SECONDS_TO_CANCEL = 5
# What Ray does not send along with a call, about; and how many calls that have more wait for workers at once.
LARGE_BYTES, LARGE_AHEAD = 100_000, 4
# Cog takes no larger body; files have a third more bytes in it than by themselves.
COG_BYTES = 100 * MIB
# What takes milliseconds to redact.
LONG_CHARACTERS = 20_000
# One at a time, and not asyncio's threads: each may wait for seconds.
_putting = ThreadPoolExecutor(1, "putting")
T = TypeVar("T")


class Lost(Exception):  # noqa: N818 (a state, not an accident)
    """A prediction is another front's, or has ended."""


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
    # Taken by those whose large inputs are in Ray's store, and with no worker yet: the store is small.
    large_ahead: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(LARGE_AHEAD))


@dataclass(eq=False)
class Run:
    """A prediction while this front runs it."""

    prediction: Prediction
    means: Means
    # The database has it.
    written: asyncio.Event = field(default_factory=asyncio.Event)
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    # Not even its end could be written: adopted again, it would be drawn again.
    stuck: bool = False
    # What the attempt that is made now has asked of a worker, and whether that has begun.
    response: DeploymentResponseGenerator | None = None
    begun: bool = False
    # How long it waits for what that worker tells: for ever, until it is cancelled.
    patience: asyncio.Timeout | None = None
    # It has one of `Means.large_ahead`.
    ahead: bool = False
    # How many attempts came to nothing, but for those whose worker died; and how many of those hung.
    failures: int = 0
    hangs: int = 0
    # What has been stored of its output, by the data URI's hash.
    files: dict[str, File] = field(default_factory=dict)
    # What its log and its error may not tell of its inputs.
    secrets: Collection[str] = ()
    # When its progress was written; infinite while it is being written.
    recorded: float = 0
    task: asyncio.Task[None] | None = None

    def __post_init__(self) -> None:
        """Count how many bytes of memory its input takes, until it is forgotten."""
        self.held = _size(self.prediction.secret_input)

    def start(self, *, written: bool = True) -> None:
        """Go from the queue to the last webhook, in a task; `written` says whether the database has the prediction."""
        if written:
            self.written.set()
        self.task = spawn(self._go())

    def stop(self) -> None:
        """Cancel the prediction; its end is still written and told."""
        self.prediction.cancel_requested = True
        self._tell_worker_to_stop()
        if self.patience is not None and self.patience.when() is None:
            self.patience.reschedule(asyncio.get_running_loop().time() + SECONDS_TO_CANCEL)

    async def _go(self) -> None:
        prediction = self.prediction
        left_over = prediction.finished  # all but its last webhook has been done
        try:
            if not left_over:
                await self._draw()
                await self._finish()
            self.ended.set()
            if prediction.webhook_due:
                if left_over and prediction.adoptions > MAX_ADOPTIONS:
                    logger.warning("The last webhook of prediction %.130r is given up.", prediction.id)
                else:
                    await self.means.webhooks.deliver(prediction)
                await _lasting(lambda: self.means.predictions.delivered(prediction), prediction)
        except Lost:
            logger.info("Prediction %.130r is somebody else's now.", prediction.id)
        except Exception as error:
            self.stuck = True
            logger.error("Prediction %.130r cannot be ended by this front: %s", prediction.id, places(error))

    async def _draw(self) -> None:
        """Have a worker run it, and another one if that one dies."""
        prediction = self.prediction
        while not prediction.finished:
            try:
                _check_runnable(prediction)
                if prediction.cancel_requested:
                    _end_cancelled(prediction)
                else:
                    await self._ask_worker()
            except (BackPressureError, DeploymentUnavailableError):  # there is no worker, and may be one later
                await asyncio.sleep(1)
            except (TaskCancelledError, asyncio.CancelledError) as error:
                if asyncio.current_task().cancelling():  # not the worker's part of it: this front lets it go
                    raise
                if not prediction.cancel_requested:
                    await self._mourn(error)
            except Exception as error:
                await self._mourn(error)

    async def _ask_worker(self) -> None:
        """One attempt: wait for a free worker, and follow what it tells until the end."""
        prediction, means = self.prediction, self.means
        # Beside the event loop, for inputs may be large.
        loras = await asyncio.to_thread(_lora_key, prediction.secret_input)
        self.secrets = await asyncio.to_thread(secrets_of, prediction.secret_input)
        workers = means.workers
        if means.affinity == "router" and loras:
            workers = workers.options(multiplexed_model_id=loras)
        self.begun = False
        if (self.held > LARGE_BYTES or names_files(prediction.secret_input)) and not await self._go_ahead():
            return
        try:
            inputs = await self._inputs()
            if prediction.cancel_requested:  # meanwhile, when there was no worker to be told
                return
            self.response = workers.predict.remote(prediction.id, inputs, loras)
            async with asyncio.timeout(None) as self.patience:
                async for states in self.response:
                    for state in states:
                        await self._progress(storable(state))
                    if prediction.finished:
                        return
            raise RuntimeError("The worker has told no end.")
        finally:
            self.patience = None
            self._leave_ahead()
            if not prediction.finished:
                self._tell_worker_to_stop()

    async def _go_ahead(self) -> bool:
        """Wait until a large input may be put before the workers; False where it is cancelled meanwhile."""
        while not self.prediction.cancel_requested:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.means.large_ahead.acquire(), 0.25)
                self.ahead = True
                return True
        return False

    def _leave_ahead(self) -> None:
        if self.ahead:
            self.ahead = False
            self.means.large_ahead.release()

    async def _inputs(self) -> Any:  # noqa: ANN401 (JSON, or Ray's reference to it)
        """The inputs as a worker gets them, with the cluster's files inside."""
        prediction, means = self.prediction, self.means
        asked = (prediction.secret_input, means.predictions, prediction.base_url, COG_BYTES)
        inputs = await _lasting(lambda: means.files.inline_files(*asked), prediction)
        if _size(inputs) > LARGE_BYTES:
            # Ray would put them into its store now, and block the event loop for seconds if there is no room.
            return await asyncio.get_running_loop().run_in_executor(_putting, ray.put, inputs)
        return inputs

    def _tell_worker_to_stop(self) -> None:
        if self.response is not None:
            with contextlib.suppress(Exception):  # Serve raises here what has gone wrong before
                self.response.cancel()

    async def _mourn(self, error: BaseException) -> None:
        """An attempt has come to nothing: make another where that can help, or end the prediction as failed."""
        prediction, failure = self.prediction, judge(error)
        logger.warning("An attempt at prediction %.130r came to nothing: %s", prediction.id, places(error))
        if prediction.cancel_requested:
            return
        if self._goes_on(failure):
            self.means.metrics.retries.inc()
            await self._record(deaths=prediction.deaths)
            await asyncio.sleep(0.1 + self.failures)
        else:
            _fail(prediction, failure.sentence)

    def _goes_on(self, failure: Failure) -> bool:
        """Count an attempt that came to nothing; whether there is to be another."""
        if failure.again is Again.WORKER_ENDED:
            self.prediction.deaths += 1
            return self.prediction.deaths < ATTEMPTS
        if failure.again is Again.HUNG:
            self.hangs += 1
            return self.hangs < ATTEMPTS_THAT_HANG
        self.failures += 1
        helps = failure.again is Again.CUT_OFF or (failure.again is Again.UNDRAWN and not self.begun)
        return helps and self.failures < ATTEMPTS

    async def _record(self, **changes: object) -> None:
        """Write what is new of the prediction; what cannot be written now is written with what comes next."""
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
        """A worker tells how far it has come."""
        prediction, webhooks = self.prediction, self.means.webhooks
        await self.written.wait()
        self.begun = True
        self._leave_ahead()
        if prediction.started_at is None:
            prediction.started_at = now()
            prediction.status = "processing"
            await webhooks.notify(prediction, "start")
        news, metrics = "logs", state.get("metrics", {})
        if "output" in state:
            output = await self.means.files.store_output(state["output"], self.files)
            if output != prediction.output:
                prediction.output, news = output, "output"
        prediction.logs = await self._redact(state.get("logs", ""))
        prediction.metrics = {name: value for name, value in metrics.items() if name != "predict_time"}
        ended = state["status"] not in UNFINISHED
        # An output comes with the end, and is told before it.
        if news == "output" or (prediction.logs and not ended):
            await webhooks.notify(prediction, news)
        prediction.status, prediction.metrics = state["status"], metrics
        if error := state.get("error"):
            prediction.error = await self._redact(error)
        if not ended and time.monotonic() - self.recorded > RECORD_SECONDS:
            self.recorded = math.inf
            spawn(self._record(**_values(prediction, "started_at")))

    async def _redact(self, text: str) -> str:
        """A log or an error as it may be shown; a long one is worked on beside the event loop."""
        if len(text) < LONG_CHARACTERS:
            return redact_log(text, self.secrets)
        return await asyncio.to_thread(redact_log, text, self.secrets)

    async def _finish(self) -> None:
        """Write how it ended: the front that writes first has ended it."""
        prediction = self.prediction
        await self.written.wait()
        prediction.completed_at = now()
        prediction.webhook_due = self.means.webhooks.wanted(prediction, "completed")
        try:
            await self._write_end()
        except Lost:
            raise
        except Exception as error:
            # Something in it cannot be stored: drawn again, it would be there again.
            logger.error("The end of prediction %.130r is not written: %s", prediction.id, places(error))
            _fail(prediction, f"The database cannot store the result ({type(error).__name__}).")
            prediction.logs, prediction.metrics = "", {}
            await self._write_end()
        prediction.secret_input, self.held = None, 0
        self.means.metrics.count(prediction)

    async def _write_end(self) -> None:
        prediction, files = self.prediction, self.files.values()
        changes = _values(prediction, "started_at", "completed_at", "error", "webhook_due")
        if not await _lasting(lambda: self.means.predictions.finish(prediction, files, **changes), prediction):
            raise Lost


async def _lasting(ask: Callable[[], Awaitable[T]], prediction: Prediction) -> T:
    """What the database answers to a question about a prediction, asked again while it is away, full or read-only.

    Raises:
        DBAPIError: asked again, it would answer the same.
    """
    told = False
    while True:
        try:
            return await ask()
        except DBAPIError as error:
            if not (may_pass(error) or may_be_repaired(error)):
                raise
            if not told:
                logger.warning("Prediction %.130r waits for the database: %s", prediction.id, places(error))
            told = True
            await asyncio.sleep(1)


def _check_runnable(prediction: Prediction) -> None:
    """Raise a Failure where it cannot be run, or has been adopted from so many fronts that it may be what ends them."""
    if not PREDICTION_ID.fullmatch(prediction.id):  # an older front took it, and Cog's server would lose its slot to it
        raise Failure("The prediction's id must have 1 to 128 letters, digits and _ . ~ -.")
    if prediction.adoptions > MAX_ADOPTIONS:
        raise Failure(f"The prediction was given up: {prediction.adoptions} fronts ended while they had it.")


def _fail(prediction: Prediction, sentence: str) -> None:
    prediction.status, prediction.error, prediction.output = "failed", storable(sentence), None


def _end_cancelled(prediction: Prediction) -> None:
    """The end of a prediction whose worker was told to stop; the time until then is counted, as Cog would."""
    prediction.status = "canceled"
    if prediction.started_at:
        seconds = (datetime.fromisoformat(now()) - datetime.fromisoformat(prediction.started_at)).total_seconds()
        prediction.metrics = {"predict_time": seconds, **prediction.metrics}


def _values(prediction: Prediction, *more: str) -> dict[str, Any]:
    names = ("status", "output", "logs", "metrics", *more)
    return {name: getattr(prediction, name) for name in names}


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
