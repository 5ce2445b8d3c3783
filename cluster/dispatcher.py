"""The predictions of one front: accepted, waited for, cancelled, adopted from other fronts, or left to them.

A prediction is in the database before its client hears of it. When a front dies, others adopt its predictions. This
module knows which predictions run here; `run.py` knows how one runs.
"""

import asyncio
import contextlib
import logging
from collections.abc import Collection
from dataclasses import dataclass, field

from sqlalchemy.exc import DBAPIError

from cluster.predictions import Prediction, QueueFull
from cluster.run import Means, Run
from settings import GIB

logger = logging.getLogger("ray.serve")

# A front whose inputs take more memory than this adopts no more predictions.
ADOPTING_BYTES = GIB // 2


@dataclass(eq=False)
class Dispatcher:
    """Runs the predictions of one front."""

    # The front's name in the database.
    front: str
    means: Means
    # How many unfinished predictions it takes.
    limit: int
    runs: dict[str, Run] = field(default_factory=dict, init=False)
    # Ids of predictions whose end cannot be written: adopted again, they would be drawn again.
    stuck: set[str] = field(default_factory=set, init=False)

    @property
    def unfinished(self) -> int:
        """How many accepted predictions have not ended."""
        return sum(not run.ended.is_set() for run in self.runs.values())

    @property
    def held(self) -> int:
        """How many bytes of memory their inputs take."""
        return sum(run.held for run in self.runs.values())

    @property
    def full(self) -> bool:
        """Whether the next prediction would be refused."""
        return self.unfinished >= self.limit

    async def accept(self, prediction: Prediction) -> tuple[Prediction, bool]:
        """The prediction that the database has under this one's id, and whether it is this very one.

        Once this returns, the prediction will end. QueueFull where too many wait.
        """
        if self.full:
            raise QueueFull(f"The queue is full: {self.limit} predictions wait. Try again later.")
        create = self.means.predictions.create
        if running := self.runs.get(prediction.id):
            # While the other one is being written, that may still fail: the database decides between the two.
            return (running.prediction, False) if running.written.is_set() else await create(prediction)
        # The run begins to wait for a worker while the database writes.
        run = self._take(prediction)
        try:
            known, created = await create(prediction)
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
        found = await self.means.predictions.cancel(prediction_id)
        self.stop(prediction_id)
        return found

    async def ended(self, prediction: Prediction, seconds: float | None = None) -> Prediction:
        """The prediction once it has ended, or as it is after so many seconds."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                if run := self.runs.get(prediction.id):
                    await run.ended.wait()
                while not prediction.finished:
                    prediction = await self.means.predictions.get(prediction.id) or prediction
                    if not prediction.finished:
                        await asyncio.sleep(0.25)
        return prediction

    def stop(self, prediction_id: str) -> None:
        """Cancel a prediction if it runs here."""
        if run := self.runs.get(prediction_id):
            run.stop()

    async def adopt(self, dead: Collection[str], limit: int) -> None:
        """Take over at most so many predictions that no living front runs."""
        for _ in range(limit):
            if self.held > ADOPTING_BYTES:
                return
            # One at a time: its input may have a hundred megabytes.
            orphans = await self.means.predictions.adopt(self.front, dead, [*self.runs, *self.stuck], 1)
            if not orphans:
                return
            logger.info("Adopted prediction %.130r.", orphans[0].id)
            self.means.metrics.adopted.inc()
            if orphans[0].id not in self.runs:
                self._take(orphans[0]).written.set()

    async def drain(self) -> None:
        """Wait until the predictions that are being drawn have ended; leave those that only wait to other fronts."""
        waiting = [run.task for run in self.runs.values() if run.prediction.status == "starting"]
        for task in waiting:
            task.cancel()
        if waiting:
            await asyncio.wait(waiting)
        with contextlib.suppress(DBAPIError):  # the others also adopt what is left once this front beats no more
            await self.means.predictions.release(self.front, list(self.runs))
        while self.unfinished:
            await asyncio.sleep(0.05)

    def _take(self, prediction: Prediction) -> Run:
        """Run a prediction; its progress is told and written once `Run.written` is set."""
        run = self.runs[prediction.id] = Run(prediction, self.means)

        def leave(_: asyncio.Task[None]) -> None:
            run.ended.set()
            del self.runs[prediction.id]
            if run.stuck:
                self.stuck.add(prediction.id)

        run.task.add_done_callback(leave)  # a task that is cancelled before it begins runs no code
        return run
