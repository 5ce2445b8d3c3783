"""Tasks of asyncio that nobody waits for."""

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any

from cluster.failures import places

logger = logging.getLogger("ray.serve")
# asyncio itself holds its tasks weakly: one that nobody else holds may vanish before it has ended.
_running: set[asyncio.Task[None]] = set()


def spawn(work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
    """Start a task, hold it until it has ended, and log its failure."""
    task = asyncio.create_task(work)
    _running.add(task)
    task.add_done_callback(_forget)
    return task


def _forget(task: asyncio.Task[None]) -> None:
    _running.discard(task)
    if not task.cancelled() and task.exception():
        logger.error("A background task failed: %s", places(task.exception()))
