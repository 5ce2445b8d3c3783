"""Work that waits for hosts and disks, in a thread of its own that ends when its caller is interrupted.

Cog cancels a prediction by raising in the main thread; a blocking call would delay that for as long as a host likes.
And bookkeeping on the disk is never interrupted halfway. This module knows threads; it knows nothing of the work.
"""

import contextvars
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from settings import Settings
from sources.client import Client, Patience

T = TypeVar("T")


def run_stoppable(work: Callable[[Client], T], settings: Settings, patience: Patience) -> T:
    """Do work with a client of its own; an interruption of the caller stops the client, and with it the work.

    Raises:
        ValueError: the disk fails. What the work raises is raised here too.
    """
    client = Client(allow_private=settings.allow_private_hosts, patience=patience)
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
        return outcome.result()
    except OSError as error:  # of the disk: hosts' were told already
        raise ValueError(f"The cache of weights cannot be used: {error.strerror or 'its disk fails'}.") from error
    finally:
        client.stop()
        if thread.is_alive():
            # It ends at once, unless it waits for a name server; then it ends later, having nothing to do any more.
            thread.join(0.5)
