"""One permanent thread for all work on the device; a watchdog that ends the process when such work hangs.

Cog calls setup, predict and healthcheck from different threads, but torch keeps cuDNN's plans for each thread: a new
one plans again, 0.05 s for each length of text and picture, and an old one's plans are never freed. And Cog cancels a
prediction by raising in the thread that it called, between any two bytecodes, where a change may be half done. So that
thread only waits, and the work stops by itself between two steps. This module knows threads, and nothing of the work.
"""

import contextvars
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import SimpleQueue
from typing import TypeVar

T = TypeVar("T")

# A waiting thread wakes up this often: Cog's exception reaches it only while it runs Python.
SECONDS_BETWEEN_LOOKS = 0.05
# How long to wait for cancelled work, which stops at its next step: longer than the slowest step takes.
SECONDS_TO_STOP = 30
# How long a health check may take: Cog waits for five seconds.
SECONDS_TO_ANSWER = 4
# How much later the kernel ends the process, if the watchdog's thread cannot because native code holds Python's lock.
SECONDS_FOR_WATCHDOG = 5


class CancelledError(BaseException):
    """Ends work that was cancelled; a BaseException, so that no `except Exception` catches it."""


class _Job:
    """A piece of work for the device's thread, and what came of it.

    The waiting thread may be interrupted between any two bytecodes, so it may hold no lock that Python code has to
    release, as a `threading.Event` has inside.
    """

    def __init__(self, work: Callable[[], object]) -> None:
        # Cog's context variables say to which prediction a line of the log or a metric belongs.
        self._work, self._context = work, contextvars.copy_context()
        self._result: object = None
        self._error: BaseException | None = None
        self.cancelled = False
        self.hangs = False  # a health check that did not answer in time
        self.ended = False
        self._ending = threading.Lock()  # held until the work has ended
        self._ending.acquire()

    def do(self) -> None:
        """Do the work, unless it was done or cancelled before."""
        if self.ended:
            return
        try:
            self._result = self._context.run(self._run)
        except BaseException as error:
            self._error = None if self.cancelled else error  # `outcome` raises it
        self.ended = True
        self._ending.release()

    def _run(self) -> object:
        before = _current.set(self)
        try:
            check_cancelled()
            return self._work()
        finally:
            _current.reset(before)

    def wait(self) -> bool:
        """Wait for the end, up to SECONDS_BETWEEN_LOOKS; whether it has come."""
        if not self.ended:
            self._ending.acquire(timeout=SECONDS_BETWEEN_LOOKS)
        return self.ended

    def outcome(self) -> object:
        """What the work returned; its error is raised and forgotten: a traceback keeps all that the work held."""
        error, self._error = self._error, None
        if error is None:
            return self._result
        try:
            raise error
        finally:
            del error


_current: contextvars.ContextVar[_Job | None] = contextvars.ContextVar("current", default=None)


def check_cancelled() -> None:
    """Raise CancelledError if the work that this thread does was cancelled; called in each phase and step."""
    job = _current.get()
    if job is not None and job.cancelled:
        raise CancelledError


class DeviceThread:
    """A thread that does one piece of work after another."""

    def __init__(self) -> None:
        self.watchdog = Watchdog(None)
        self._jobs: SimpleQueue[_Job] = SimpleQueue()
        self._doing: _Job | None = None
        threading.Thread(target=self._work, name="device", daemon=True).start()

    def watch(self, seconds: float | None) -> None:
        """From the next piece of work on, end this process if one takes longer than this; None: no limit."""
        self.watchdog = Watchdog(seconds)

    def run(self, work: Callable[..., T], *arguments: object) -> T:
        """What `work(*arguments)` returns, done by the thread; what it raises is raised here.

        An exception that interrupts the waiting thread cancels the work, and goes on once the work has ended. Work that
        does not end within `SECONDS_TO_STOP` is left to the watchdog, and the next work waits for it.
        """
        job = _Job(lambda: self._watched(work, *arguments))
        try:
            self._jobs.put(job)
            while not job.wait():
                pass
        except BaseException:
            self._stop(job)
            raise
        return job.outcome()

    def run_if_idle(self, work: Callable[[], object]) -> None:
        """Let the thread do the work if it has nothing else to do; what it raises is raised here.

        A RuntimeError says that this work, or such work before, has not ended in `SECONDS_TO_ANSWER`.
        """
        job = _Job(lambda: self._watched(work))
        self._jobs.put(job)
        until = time.monotonic() + SECONDS_TO_ANSWER
        while not job.wait():
            doing = self._doing
            if doing not in (None, job) and not (doing.hangs or job.ended):
                job.cancelled = True
                return
            if time.monotonic() > until or (doing is not None and doing.hangs):
                job.hangs = job.cancelled = True
                raise RuntimeError(f"The device has not answered for {SECONDS_TO_ANSWER} seconds.")
        job.outcome()

    def _stop(self, job: _Job) -> None:
        """Cancel work and wait for its end; further interruptions are ignored, since the first one is raised."""
        until = time.monotonic() + SECONDS_TO_STOP
        while True:
            try:
                job.cancelled = True
                self._jobs.put(job)  # again: the interruption may have come before the first time
                while not job.wait() and time.monotonic() < until:
                    pass
                return
            except BaseException:
                continue

    def _work(self) -> None:
        while True:
            self._doing = self._jobs.get()
            self._doing.do()
            self._doing = None  # while the thread is idle, it keeps nothing of the work

    def _watched(self, work: Callable[..., T], *arguments: object) -> T:
        """What the work returns; inside the job, an error of the watchdog is raised like one of the work."""
        with self.watchdog:
            return work(*arguments)


class Watchdog:
    """Ends this process if a `with` block of one thread takes longer than `seconds`; None: no limit."""

    def __init__(self, seconds: float | None) -> None:
        self._seconds = seconds
        self._until: float | None = None  # of a block that runs, by `time.monotonic`
        if seconds is not None:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def __enter__(self) -> None:
        """Start the clock."""
        self._count(self._seconds)

    def __exit__(self, *_: object) -> None:
        """Stop the clock."""
        self._count(None)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stop the clock inside a block that waits for a host, and has a limit of its own."""
        left = None if self._until is None else self._until - time.monotonic()
        self._count(None)
        try:
            yield
        finally:
            self._count(left)

    def _count(self, seconds: float | None) -> None:
        if self._seconds is None:
            return
        self._until = None if seconds is None else time.monotonic() + seconds
        # The kernel sends SIGALRM, which ends the process, since nothing handles it.
        signal.setitimer(signal.ITIMER_REAL, 0 if seconds is None else max(seconds, 0) + SECONDS_FOR_WATCHDOG)

    def _watch(self) -> None:
        while True:
            time.sleep(1)
            until = self._until
            if until is not None and time.monotonic() > until:
                limit = f"{self._seconds:g} seconds (PREDICTION_SECONDS)"
                print(f"Work on the device took longer than {limit}; this process ends.", file=sys.stderr, flush=True)
                time.sleep(1)  # for Cog to pass the line on: its pipe ends with the process
                os._exit(1)
