"""How far predictions are: what a Cog server's webhooks say, handed on to whoever listens.

This module knows Cog's JSON and predictions by their ids; it knows nothing of HTTP.
"""

import json
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from service import strict_json

# A page listens to one prediction at a time.
MOST_LISTENERS = 32
# A prediction has some thirty inputs.
MAX_VALUES = 10_000


class TooManyListenersError(Exception):
    """No more can listen now."""


@dataclass(eq=False)
class Listener:
    """Who listens to one prediction: each event has the whole log, so that the newest alone is kept."""

    prediction_id: str
    newest: bytes | None = None
    ended: bool = False


class Events:
    """All that is told and listened to; threads share it."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._listeners: list[Listener] = []
        self._drawn: Counter[str] = Counter()

    @contextmanager
    def drawing(self, prediction_id: str) -> Iterator[None]:
        """Meanwhile, events of this prediction are taken; at the end its listeners are told that there are no more."""
        with self._changed:
            self._drawn[prediction_id] += 1
        try:
            yield
        finally:
            with self._changed:
                self._drawn -= Counter([prediction_id])  # which drops those at zero
                for listener in self._listeners:
                    listener.ended |= listener.prediction_id == prediction_id not in self._drawn
                self._changed.notify_all()

    def tell(self, prediction_id: str, event: bytes) -> bool:
        """Hand an event to who listens; whether there is such a prediction."""
        with self._changed:
            for listener in self._listeners:
                if listener.prediction_id == prediction_id:
                    listener.newest = event
            self._changed.notify_all()
            return prediction_id in self._drawn

    @contextmanager
    def listen(self, prediction_id: str) -> Iterator[Listener]:
        """Listen to a prediction, most often before it begins.

        Raises:
            TooManyListenersError: too many do.
        """
        listener = Listener(prediction_id)
        with self._changed:
            if len(self._listeners) >= MOST_LISTENERS:
                raise TooManyListenersError
            self._listeners.append(listener)
        try:
            yield listener
        finally:
            with self._changed:
                self._listeners.remove(listener)

    def wait(self, listener: Listener, seconds: float) -> bytes | None:
        """The newest event that a listener has not had, waited for; None where there is none."""
        with self._changed:
            self._changed.wait_for(lambda: listener.newest is not None or listener.ended, seconds)
            newest, listener.newest = listener.newest, None
            return newest


def read_event(content: bytes) -> bytes:
    """What listeners are told, as JSON: that of a webhook's body which says how far the prediction is.

    Raises:
        ValueError: a sentence.
    """
    said = _read(content, strict_json.MAX_VALUES)
    if not isinstance(said, dict):
        raise ValueError("The body must be an object.")
    event = {"status": said.get("status"), "logs": said.get("logs") or "", "metrics": said.get("metrics") or {}}
    return json.dumps(event).encode()


def with_webhook(content: bytes, webhook: str | None) -> bytes:
    """The body of a request for a prediction with this webhook, or with none; one that it had does not count.

    A Cog server sends webhooks to any address, and pages should not choose which.

    Raises:
        ValueError: a sentence.
    """
    asked = _read(content, MAX_VALUES)
    if not isinstance(asked, dict):
        return content  # Cog says what is wrong with it
    asked = {name: value for name, value in asked.items() if name not in ("webhook", "webhook_events_filter")}
    if webhook:
        asked |= {"webhook": webhook, "webhook_events_filter": ["start", "logs"]}
    return strict_json.compact(asked, sort=False).encode()


def _read(content: bytes, max_values: int) -> Any:  # noqa: ANN401 (JSON)
    try:
        return strict_json.read(content, max_values, zeros=True)
    except ValueError as error:
        raise ValueError(f"The body must be JSON, and {error}") from None
