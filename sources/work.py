"""Work that waits for hosts and disks, in a thread that ends when its caller is interrupted.

A cancellation is a flag, which the caller's thread checks: a blocking call would delay that as long as the host likes.
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
    """The result, or error, of work with a client of its own, which an interruption of the caller stops.

    Raises:
        ValueError: a sentence with `name`, of the thing that is fetched, once `time.monotonic` has passed `until`.
    """
    seconds = until - time.monotonic()
    client = Client(settings, patience)
    # A context variable tells Cog to which prediction's log a line belongs.
    context, outcome = contextvars.copy_context(), Future()

    def run() -> None:
        try:
            outcome.set_result(context.run(work, client))
        except BaseException as error:  # raised in the waiting thread
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
            # It ends at once, unless it waits for a name server: then it ends later, and does nothing more.
            thread.join(0.5)
