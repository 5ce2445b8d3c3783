"""A prediction's progress as server-sent events, in Replicate's form.

All streams of one prediction share one query each half second, and are woken when something has changed. This module
knows what has been sent; it knows nothing of HTTP or of authorisation.
"""

import asyncio
import itertools
import json
import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from sqlalchemy.exc import DBAPIError

from cluster.failures import places
from cluster.forms import absolute, lines
from cluster.predictions import Prediction, Predictions
from cluster.tasks import spawn
from service.strict_json import compact

logger = logging.getLogger("ray.serve")

SECONDS_BETWEEN_LOOKS = 0.5


class _Watch:
    """The newest state of one prediction, while any client listens."""

    def __init__(self, predictions: Predictions, prediction_id: str) -> None:
        self.known: Prediction | None = None
        self.logs, self.outputs, self.over, self.listeners = "", [], False, 0
        self.news = asyncio.Event()  # set, and replaced by a new one, at each change
        self.task = spawn(self._look(predictions, prediction_id))

    async def _look(self, predictions: Predictions, prediction_id: str) -> None:
        try:
            while known := await predictions.get(prediction_id):
                if known != self.known:
                    output = [] if known.output is None else known.output
                    self.outputs = output if isinstance(output, list) else [output]
                    self.known, self.logs, self.over = known, lines(known.whole_log), known.finished
                    self.news.set()
                    self.news = asyncio.Event()
                if known.finished:
                    break
                await asyncio.sleep(SECONDS_BETWEEN_LOOKS)
        except DBAPIError as error:
            logger.warning("The streams of prediction %.130r end early: %s", prediction_id, places(error))
        finally:
            self.over = True
            self.news.set()


@dataclass(frozen=True)
class Streams:
    """The streams of one front."""

    predictions: Predictions
    watches: dict[str, _Watch] = field(default_factory=dict, init=False)

    async def events(self, prediction_id: str, base: str) -> AsyncIterator[str]:
        """Logs and outputs as they come, an error, the end; `base` is the front's address in URLs of files."""
        told, shown, numbers = 0, 0, itertools.count(1)

        def event(kind: str, data: str) -> str:
            text = "".join(f"data: {line}\n" for line in data.split("\n"))
            return f"event: {kind}\nid: {prediction_id}-{next(numbers)}\n{text}\n"

        with self._watch(prediction_id) as watch:
            over = False
            while not over:
                news, over, known = watch.news, watch.over, watch.known
                if logs := watch.logs[told:]:
                    told += len(logs)
                    yield event("logs", logs)
                for output in absolute(watch.outputs[shown:], base):
                    shown += 1
                    yield event("output", output if isinstance(output, str) else compact(output))
                if not over:
                    await news.wait()
        if known is not None and known.status == "failed":
            yield event("error", json.dumps({"detail": known.error}))
        reason = "error" if known is None or not known.finished else known.status
        yield event("done", json.dumps({} if reason == "succeeded" else {"reason": reason}))

    @contextmanager
    def _watch(self, prediction_id: str) -> Iterator[_Watch]:
        watch = self.watches.get(prediction_id)
        if watch is None or watch.over:
            watch = self.watches[prediction_id] = _Watch(self.predictions, prediction_id)
        watch.listeners += 1
        try:
            yield watch
        finally:
            watch.listeners -= 1
            if not watch.listeners:
                watch.task.cancel()
                if self.watches.get(prediction_id) is watch:
                    del self.watches[prediction_id]
