"""Work on the device: one thread, cancelled as Cog cancels, ended when it hangs."""

import contextvars
import ctypes
import gc
import random
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress

import pytest

from service import device_thread
from service.device_thread import CancelledError, DeviceThread, check_cancelled
from settings import ROOT


class Interruption(BaseException):
    """The error that Cog raises in the waiting thread, between two bytecodes."""


def interrupt(thread: threading.Thread) -> None:
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(Interruption))


def steps(finished: list[str], name: str, seconds: float = 0.01) -> None:
    """Work of many steps, of which the last says that it was done."""
    for _ in range(int(2 / seconds)):
        time.sleep(seconds)
        check_cancelled()
    finished.append(name)


def test_all_work_is_done_by_one_thread_whoever_asks() -> None:
    device, found = DeviceThread(), []
    callers = [
        threading.Thread(target=lambda: found.append((threading.get_ident(), device.run(threading.get_ident))))
        for _ in range(8)
    ]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len({thread for _, thread in found}) == 1
    assert not {thread for _, thread in found} & {caller for caller, _ in found}


def test_results_errors_and_context_travel() -> None:
    device, prediction = DeviceThread(), contextvars.ContextVar("prediction")
    prediction.set("p1")
    assert device.run(lambda a, b: (a + b, prediction.get()), 1, 2) == (3, "p1")
    with pytest.raises(KeyError, match="gone"):
        device.run({}.__getitem__, "gone")


def cancelled_after(device: DeviceThread, seconds: float, work: Callable[[], object]) -> float:
    """Interrupt a thread that waits for work; how long it took to come back."""
    raised = []

    def wait() -> None:
        try:
            device.run(work)
        except BaseException as error:
            raised.append(type(error))

    waiting = threading.Thread(target=wait)
    waiting.start()
    time.sleep(seconds)
    interrupt(waiting)
    start = time.monotonic()
    waiting.join(20)
    assert raised == [Interruption]
    return time.monotonic() - start


def test_an_interruption_ends_the_work_before_it_is_raised() -> None:
    device, finished, rng = DeviceThread(), [], random.Random(0)
    for number in range(20):
        took = cancelled_after(device, rng.uniform(0, 0.05), lambda: steps(finished, "cancelled"))
        assert took < 10
        device.run(finished.append, f"next {number}")
    assert finished == [f"next {number}" for number in range(20)]


def test_an_interruption_between_any_two_bytecodes_leaves_nothing_locked(monkeypatch: pytest.MonkeyPatch) -> None:
    device, rng = DeviceThread(), random.Random(0)
    monkeypatch.setattr(device_thread, "SECONDS_BETWEEN_LOOKS", 1e-5)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)

    def work() -> None:  # that wants to run Python as much as those who wait do
        while True:
            check_cancelled()

    try:
        for number in range(500):
            assert cancelled_after(device, rng.uniform(0, 0.002), work) < 10
            assert device.run(lambda: number) == number  # noqa: B023
    finally:
        sys.setswitchinterval(interval)


def test_the_caller_waits_for_a_step_that_is_long() -> None:
    device, stopped = DeviceThread(), []

    def work() -> None:
        try:
            while True:
                time.sleep(0.5)
                check_cancelled()
        except CancelledError:
            stopped.append(time.monotonic())
            raise

    cancelled_after(device, 0.1, work)
    assert len(stopped) == 1


def test_nothing_of_the_work_is_held_when_it_has_ended() -> None:
    class Large:
        pass

    device, held, prediction = DeviceThread(), [], contextvars.ContextVar("prediction")

    def work() -> None:
        large = Large()
        prediction.set(large)  # as Cog has variables of its own in the context
        held.append(weakref.ref(large))

    def fail() -> None:
        work()
        raise ValueError("no")

    gc.disable()  # what only it would free is not free yet
    try:
        with suppress(ValueError):
            device.run(fail)
        device.run(work)
        device.run(lambda: None)  # the thread is done with the work before
        assert [it() for it in held] == [None, None]
    finally:
        gc.enable()


def test_what_is_done_if_idle_never_waits_for_other_work() -> None:
    device, done, release = DeviceThread(), [], threading.Event()
    device.run_if_idle(lambda: done.append("first"))
    drawing = threading.Thread(target=device.run, args=(release.wait,))
    drawing.start()
    time.sleep(0.1)
    start = time.monotonic()
    device.run_if_idle(lambda: done.append("second"))
    assert time.monotonic() - start < device_thread.SECONDS_TO_ANSWER
    release.set()
    drawing.join()
    device.run_if_idle(lambda: done.append("third"))
    assert done == ["first", "third"]


def test_a_health_check_that_hangs_is_told_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_thread, "SECONDS_TO_ANSWER", 0.2)
    device, release = DeviceThread(), threading.Event()
    for _ in range(3):
        with pytest.raises(RuntimeError, match=r"The device has not answered for 0\.2 seconds\."):
            device.run_if_idle(release.wait)
    release.set()
    assert device.run(lambda: "drawn") == "drawn"
    device.run_if_idle(lambda: None)


def test_an_error_of_the_watchdog_is_the_works_and_the_thread_goes_on() -> None:
    device = DeviceThread()
    device.watch(1e300)  # no clock can be set to this
    with pytest.raises(OverflowError):
        device.run(lambda: None)
    device.watch(None)
    assert device.run(lambda: "drawn") == "drawn"


# Beside what takes too long there is what may: set-up, a download, several pieces of work, a pause.
PROGRAM = """
import ctypes, sys, time
from service import device_thread
from service.device_thread import DeviceThread

def download():
    with device.watchdog.paused():
        time.sleep(0.8)

device_thread.SECONDS_FOR_WATCHDOG = 3
device = DeviceThread()
device.run(time.sleep, 0.8)
device.watch(0.6)
device.run(download)
for _ in range(3):
    device.run(time.sleep, 0.25)
time.sleep(1.6)
print("still there", flush=True)
device.run(eval(sys.argv[1]), 60)
"""


def test_a_process_whose_work_hangs_ends() -> None:
    # The second holds Python's lock in native code, so that no thread can say anything.
    hangs = ["time.sleep", "ctypes.PyDLL(None).sleep"]
    options = {"cwd": ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    started = [subprocess.Popen([sys.executable, "-c", PROGRAM, hang], **options) for hang in hangs]
    said = [process.communicate(timeout=30) for process in started]
    sentence = "Work on the device took longer than 0.6 seconds (PREDICTION_SECONDS); this process ends.\n"
    assert said == [("still there\n", sentence), ("still there\n", "")]
    assert [process.returncode for process in started] == [1, -signal.SIGALRM]
