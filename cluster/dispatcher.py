"""A prediction's way through a front: accepted, run by a worker, told, ended once, or left to another front.

It is in the database before its client hears of it. When a worker dies, another one is asked; when a front dies,
others adopt its predictions. This module knows Ray's handle of the workers, and the order of all steps; it knows
nothing of HTTP or of how a client sees a prediction.
"""

import asyncio
import contextlib
import hashlib
import json
import logging
import time
from collections.abc import Collection
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from ray.exceptions import TaskCancelledError
from ray.serve.exceptions import BackPressureError
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator
from sqlalchemy.exc import OperationalError

from cluster.files import Files
from cluster.metrics import Metrics
from cluster.predictions import UNFINISHED, File, Prediction, Predictions, now
from cluster.privacy import redact_text
from cluster.tasks import spawn
from cluster.webhooks import Webhooks

logger = logging.getLogger("ray.serve")

# A prediction during which this many workers died is given up: each death costs a start.
MAX_DEATHS = 3
# How often a prediction's progress is written into the database; the end is written at once.
RECORD_SECONDS = 0.5


class QueueFull(Exception):  # noqa: N818 (a state, not an accident)
    """There is no place for another prediction; soon there may be one."""


class Lost(Exception):  # noqa: N818 (a state, not an accident)
    """A prediction is another front's, or has ended."""


@dataclass(eq=False)
class Run:
    """A prediction while this front runs it."""

    prediction: Prediction
    # The database has it.
    written: asyncio.Event = field(default_factory=asyncio.Event)
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    response: DeploymentResponseGenerator | None = None
    # What has been stored of its output, by the data URI's hash.
    files: dict[str, File] = field(default_factory=dict)
    recorded: float = 0
    task: asyncio.Task[None] | None = None


@dataclass(eq=False)
class Dispatcher:
    """Runs the predictions of one front."""

    # The front's name in the database.
    front: str
    workers: DeploymentHandle
    predictions: Predictions
    files: Files
    webhooks: Webhooks
    metrics: Metrics
    # How many unfinished predictions it takes.
    limit: int
    # "router" leads a request to a worker that has its LoRAs.
    affinity: str
    runs: dict[str, Run] = field(default_factory=dict, init=False)

    @property
    def unfinished(self) -> int:
        """How many predictions are on their way here."""
        return sum(not run.ended.is_set() for run in self.runs.values())

    @property
    def full(self) -> bool:
        """Whether the next prediction would be refused."""
        return self.unfinished >= self.limit

    async def accept(self, prediction: Prediction) -> tuple[Prediction, bool]:
        """Take a prediction: once this returns, it will end. QueueFull where too many wait.

        Returns:
            The prediction that is known under its id, and whether it is this very one.
        """
        if self.full:
            raise QueueFull(f"The queue is full: {self.limit} predictions wait. Try again later.")
        if running := self.runs.get(prediction.id):
            return running.prediction, False
        # A worker is sought while the database writes; its progress is told and kept only when that is done.
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
        self.stop(prediction_id)
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

    def stop(self, prediction_id: str) -> None:
        """Cancel a prediction if it runs here."""
        if run := self.runs.get(prediction_id):
            run.prediction.cancel_requested = True
            if run.response is not None:
                run.response.cancel()

    async def adopt(self, dead: Collection[str], limit: int) -> None:
        """Take over at most so many predictions that no living front runs."""
        for orphan in await self.predictions.adopt(self.front, dead, list(self.runs), limit):
            logger.info("Adopted prediction %s.", orphan.id)
            self.metrics.adopted.inc()
            if orphan.id not in self.runs:
                self._take(orphan)

    async def drain(self) -> None:
        """Let predictions that are being drawn come to their end; those that only wait are for another front."""
        waiting = [run.task for run in self.runs.values() if run.prediction.status == "starting"]
        for task in waiting:
            task.cancel()
        if waiting:
            await asyncio.wait(waiting)
        await self.predictions.release(self.front, list(self.runs))
        while self.unfinished:
            await asyncio.sleep(0.05)

    def _take(self, prediction: Prediction, *, written: bool = True) -> Run:
        run = self.runs[prediction.id] = Run(prediction)
        if written:
            run.written.set()
        run.task = spawn(self._run(run))
        return run

    async def _run(self, run: Run) -> None:
        """One prediction from the queue to its last webhook."""
        prediction = run.prediction
        try:
            if not prediction.finished:  # else only its last webhook has been left over
                await self._draw(run)
                await self._finish(run)
            run.ended.set()
            if prediction.webhook_due:
                await self.webhooks.deliver(prediction)
                await self.predictions.delivered(prediction)
        except Lost:
            logger.info("Prediction %s is somebody else's now.", prediction.id)
        finally:
            if run.response is not None and not prediction.finished:
                run.response.cancel()
            run.ended.set()
            del self.runs[prediction.id]

    async def _draw(self, run: Run) -> None:
        """Have a worker run it, and another one if that one dies."""
        prediction = run.prediction
        while not prediction.finished:
            if prediction.cancel_requested:
                _end_cancelled(prediction)
                return
            try:
                await self._ask_worker(run)
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

    async def _ask_worker(self, run: Run) -> None:
        """One attempt: wait for a free worker, and follow what it tells until the end."""
        prediction = run.prediction
        loras = _lora_key(prediction.secret_input)
        workers = self.workers
        if self.affinity == "router" and loras:
            workers = workers.options(multiplexed_model_id=loras)
        inputs = await self.files.inline_uploads(prediction.secret_input, self.predictions)
        run.response = workers.predict.remote(prediction.id, inputs, loras)
        async for states in run.response:
            for state in states:
                await self._progress(run, state)
            if prediction.finished:
                break

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
            await self.webhooks.notify(prediction, "start")
        news, metrics = "logs", state.get("metrics", {})
        if "output" in state:
            output = await self.files.store_output(state["output"], run.files)
            if output != prediction.output:
                prediction.output, news = output, "output"
        prediction.logs = redact_text(state.get("logs", ""), prediction.secret_input)
        prediction.metrics = {name: value for name, value in metrics.items() if name != "predict_time"}
        ended = state["status"] not in UNFINISHED
        # An output comes with the end, and is told before it.
        if news == "output" or (prediction.logs and not ended):
            await self.webhooks.notify(prediction, news)
        prediction.status, prediction.metrics = state["status"], metrics
        if error := state.get("error"):
            prediction.error = redact_text(error, prediction.secret_input)
        if not ended and time.monotonic() - run.recorded > RECORD_SECONDS:
            run.recorded = time.monotonic()
            if not await self.predictions.record(prediction, **_values(prediction, "started_at")):
                raise Lost

    async def _finish(self, run: Run) -> None:
        """Write how it ended: the front that writes first has ended it."""
        prediction = run.prediction
        await run.written.wait()
        prediction.completed_at = now()
        prediction.webhook_due = bool(prediction.webhook) and "completed" in prediction.webhook_events
        changes = _values(prediction, "started_at", "completed_at", "error", "webhook_due")
        if not await self.predictions.finish(prediction, run.files.values(), **changes):
            raise Lost
        prediction.secret_input = None
        self.metrics.count(prediction)


def _end_cancelled(prediction: Prediction) -> None:
    """The end of a prediction whose worker was told to stop; the time until then is counted, as Cog would."""
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
