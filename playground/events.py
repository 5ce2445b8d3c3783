"""Events of predictions, handed on to their listeners; knows predictions by their ids, and nothing of HTTP."""

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

# A page listens to one prediction at a time.
MOST_LISTENERS = 32


class TooManyListenersError(Exception):
    """`MOST_LISTENERS` listen already."""


@dataclass(eq=False)
class Listener:
    """A listener to one prediction; only the newest event is kept, because each one has the whole log."""

    prediction_id: str
    newest: bytes | None = None
    ended: bool = False


class Events:
    """The listeners, and the predictions under way; threads share it."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._listeners: list[Listener] = []
        self._drawn: Counter[str] = Counter()

    @contextmanager
    def drawing(self, prediction_id: str) -> Iterator[None]:
        """Take events of this prediction while the block runs; its end is the end for the listeners."""
        with self._changed:
            self._drawn[prediction_id] += 1
        try:
            yield
        finally:
            with self._changed:
                self._drawn -= Counter([prediction_id])  # this drops zeros
                if prediction_id not in self._drawn:
                    for listener in self._listeners:
                        listener.ended |= listener.prediction_id == prediction_id
                self._changed.notify_all()

    def tell(self, prediction_id: str, event: bytes) -> bool:
        """Hand an event to the listeners; returns whether the prediction is under way."""
        with self._changed:
            for listener in self._listeners:
                if listener.prediction_id == prediction_id:
                    listener.newest = event
            self._changed.notify_all()
            return prediction_id in self._drawn

    @contextmanager
    def listen(self, prediction_id: str) -> Iterator[Listener]:
        """Listen to a prediction, most often before it begins; TooManyListenersError where there is no room."""
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
        """The newest event that a listener has not had; waits for so long, then returns None."""
        with self._changed:
            self._changed.wait_for(lambda: listener.newest is not None or listener.ended, seconds)
            newest, listener.newest = listener.newest, None
            return newest
