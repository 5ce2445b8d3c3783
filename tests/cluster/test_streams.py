"""Streams of predictions: each tells all of one, and many together cost no more looks than one."""

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ray", reason="the cluster needs cluster/requirements.txt")

from sqlalchemy import event

from cluster.predictions import Prediction, Predictions, now
from cluster.streams import SECONDS_BETWEEN_LOOKS, Streams
from harness.waiting import until

LISTENERS = 300


class Listener:
    """A client of a stream, and what it has heard."""

    def __init__(self, streams: Streams) -> None:
        self.heard = ""
        self.task = asyncio.create_task(self._listen(streams))

    async def _listen(self, streams: Streams) -> None:
        async for text in streams.events("one", "http://a"):
            self.heard += text


async def test_streams_of_one_prediction_share_their_looks_at_it(tmp_path: Path) -> None:
    async with Predictions(f"sqlite:///{tmp_path / 'predictions.db'}") as known:
        prediction = Prediction("one", "front", now(), {}, {}, "replicate")
        await known.create(prediction)
        await known.record(prediction, logs="a\r")
        statements, began = [], time.monotonic()
        event.listen(known.engine, "before_cursor_execute", lambda *of: statements.append(of[2]))
        streams = Streams(known)
        first, *others = (Listener(streams) for _ in range(1 + LISTENERS))
        await until(lambda: bool(streams.watches), 60)
        first.task.cancel()  # while it waits for what the others wait for too
        await until(lambda: all("data: a" in one.heard for one in others), 60)
        await known.record(prediction, logs="a\rb")
        await until(lambda: all("data: b" in one.heard for one in others), 60)
        end = {"status": "succeeded", "output": ["/files/x/a.webp"], "completed_at": now(), "logs": "a\rb"}
        await known.finish(prediction, [], **end)
        await asyncio.gather(*(one.task for one in others))
        looks = sum(text.startswith("SELECT") for text in statements)
        assert looks <= (time.monotonic() - began) / SECONDS_BETWEEN_LOOKS + 1
        assert first.task.cancelled()
        assert {one.heard for one in others} == {
            "event: logs\nid: one-1\ndata: a\ndata: \n\n"
            "event: logs\nid: one-2\ndata: b\n\n"
            "event: output\nid: one-3\ndata: http://a/files/x/a.webp\n\n"
            "event: done\nid: one-4\ndata: {}\n\n"
        }
        assert not streams.watches


DONE = ("done", "{}")


@pytest.mark.parametrize(
    ("end", "events"),
    [
        ({"output": 0}, [("output", "0"), DONE]),
        ({"output": False}, [("output", "false"), DONE]),
        ({"output": [[1], {"a": 1e20}]}, [("output", "[1]"), ("output", '{"a":1e+20}'), DONE]),
        ({"output": []}, [DONE]),
        ({"status": "failed", "error": "no\n"}, [("error", '{"detail": "no\\n"}'), ("done", '{"reason": "failed"}')]),
        ({"status": "canceled"}, [("done", '{"reason": "canceled"}')]),
        (None, [("done", '{"reason": "error"}')]),
    ],
)
def test_a_stream_tells_how_it_ended(tmp_path: Path, end: dict[str, Any] | None, events: list[tuple[str, str]]) -> None:
    """Also of predictors that give no files; and where nothing is known."""

    async def story() -> list[str]:
        async with Predictions(f"sqlite:///{tmp_path / 'predictions.db'}") as known:
            if end is not None:
                end_of_it = {"status": "succeeded", "completed_at": now(), **end}
                await known.create(Prediction("one", "front", now(), {}, {}, "replicate", **end_of_it))
            return [text async for text in Streams(known).events("one", "http://a")]

    told = [tuple(line.partition(": ")[2] for line in text.split("\n")[::2][:2]) for text in asyncio.run(story())]
    assert told == events
