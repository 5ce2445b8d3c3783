"""Work that waits for hosts and disks, in a thread of its own that ends when its caller is interrupted.

A request is cancelled where its thread looks at a flag; a blocking call would delay that for as long as a host likes.
And bookkeeping on the disk is never interrupted halfway. This module knows threads; it knows nothing of the work.
"""

import contextvars
import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from service.device_thread import check_cancelled
from settings import Settings
from sources.client import Client, Patience

T = TypeVar("T")


def run_stoppable(
    work: Callable[[Client], T], settings: Settings, patience: Patience, name: str, until: float = math.inf
) -> T:
    """Do work with a client of its own; an interruption of the caller stops the client, and with it the work.

    Args:
        work: looks something up, and fetches it.
        settings: of the predictor.
        patience: how long a host may keep it waiting.
        name: of what is fetched.
        until: when all of it must be done, by `time.monotonic`.

    Raises:
        ValueError: a sentence: the time is up. What the work raises is raised here too.
    """
    seconds = until - time.monotonic()
    client = Client(settings, patience)
    # Cog tells whose log a line belongs to by a context variable.
    context, outcome = contextvars.copy_context(), Future()

    def run() -> None:
        try:
            outcome.set_result(context.run(work, client))
        except BaseException as error:  # it belongs to whoever waits
            outcome.set_exception(error)

    thread = threading.Thread(target=run, name="weights", daemon=True)
    try:
        thread.start()
        while thread.is_alive():
            thread.join(0.05)
            check_cancelled()
            if time.monotonic() > until:
                raise ValueError(
                    f"{name} could not be fetched within {max(1, seconds):.0f} seconds; try again later, or name "
                    "another place where it lies."
                )
        return outcome.result()
    finally:
        client.stop()
        if thread.is_alive():
            # It ends at once, unless it waits for a name server; then it ends later, having nothing to do any more.
            thread.join(0.5)
