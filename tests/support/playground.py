"""The page's server in this process."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from playground.server import Playground
from playground.target import Target
from tests.support.waiting import wait_until


@contextmanager
def served(target: str) -> Iterator[Playground]:
    """The page's server before a target; in the end no thread of it is left."""
    with Playground(0, Target(target)) as server:
        serving = threading.Thread(target=server.serve_forever, args=[0.02])
        serving.start()
        try:
            yield server
        finally:
            server.shutdown()
            serving.join()
            wait_until(lambda: not any("process_request" in it.name for it in threading.enumerate()))
