"""Waiting for what others do: for a condition, and no longer than a test may take."""

import asyncio
import time
from collections.abc import Awaitable, Callable


def wait_until(condition: Callable[[], bool], seconds: float = 30) -> None:
    give_up = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.01)


async def until(condition: Callable[[], bool | Awaitable[bool]], seconds: float = 20) -> None:
    """The same beside what else the event loop does."""
    give_up = time.monotonic() + seconds
    while True:
        held = condition()
        if held if isinstance(held, bool) else await held:
            return
        assert time.monotonic() < give_up
        await asyncio.sleep(0.02)
