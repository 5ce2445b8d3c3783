"""Waiting for a condition, for a bounded time; the error quotes the condition."""

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

T = TypeVar("T")


def wait_until(
    condition: Callable[[], T], seconds: float = 30, *, pause: float = 0.01, state: Callable[[], object] | None = None
) -> T:
    """The condition's value, once it is true; it is called again after each pause.

    Raises:
        TimeoutError: it was not true in time; quotes the condition and the value of `state`, or its own last value.
    """
    give_up = time.monotonic() + seconds
    while not (given := condition()):
        if time.monotonic() > give_up:
            raise _late(condition, seconds, state() if state else given)
        time.sleep(pause)
    return given


async def until(condition: Callable[[], T | Awaitable[T]], seconds: float = 20) -> T:
    """The same in an event loop; the condition may be a coroutine function."""
    give_up = time.monotonic() + seconds
    while True:
        given = condition()
        if inspect.isawaitable(given):
            given = await given
        if given:
            return given
        if time.monotonic() > give_up:
            raise _late(condition, seconds, given)
        await asyncio.sleep(0.02)


def _late(condition: Callable, seconds: float, found: object) -> TimeoutError:
    return TimeoutError(f"Not true within {seconds} s, but {found!r}:\n{inspect.getsource(condition)}")
