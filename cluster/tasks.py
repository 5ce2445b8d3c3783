"""Background tasks of asyncio."""

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any

from cluster.failures import places

logger = logging.getLogger("ray.serve")
# asyncio holds tasks weakly: without this, one may be collected before it has ended.
_running: set[asyncio.Task[None]] = set()


def spawn(work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
    """A task that is started, held until it has ended, and whose failure is logged."""
    task = asyncio.create_task(work)
    _running.add(task)
    task.add_done_callback(_forget)
    return task


def _forget(task: asyncio.Task[None]) -> None:
    _running.discard(task)
    if not task.cancelled() and task.exception():
        logger.error("A background task failed: %s", places(task.exception()))
