"""A process whose event loop does not turn is ended by another one, however that happens."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("ray", reason="the cluster needs cluster/requirements.txt")

from cluster.local import descendants
from harness.waiting import wait_until
from settings import ROOT

SECONDS = 3
# The process prints "begun" once it is watched, then runs `then`.
PROGRAM = """
import asyncio, sys, time
from cluster.watchdog import watch_event_loop

async def main():
    watched = asyncio.create_task(watch_event_loop("test", {seconds}))
    await asyncio.sleep(0.5)
    print("begun", flush=True)
    {then}

asyncio.run(main())
"""
TURN, HANG = "await asyncio.sleep(600)", "time.sleep(600)"


def start(then: str, stderr: int = subprocess.DEVNULL, environment: dict[str, str] | None = None) -> subprocess.Popen:
    """A process that is watched, and has begun to do something."""
    program = PROGRAM.format(seconds=SECONDS, then=then)
    variables = {**os.environ, "PYTHONPATH": str(ROOT), **(environment or {})}
    process = subprocess.Popen([sys.executable, "-c", program], env=variables, stdout=subprocess.PIPE, stderr=stderr)
    assert process.stdout.readline() == b"begun\n"
    return process


def end(process: subprocess.Popen) -> None:
    process.kill()
    process.communicate()


def test_a_process_whose_loop_hangs_is_ended_whether_or_not_somebody_reads_what_is_said() -> None:
    """One that is busy has longer, and is ended too."""
    reading, writing = os.pipe()
    began = time.monotonic()
    busy, unheard, heard = start("while True: pass"), start(HANG, writing), start(HANG, subprocess.PIPE)
    os.close(writing)
    os.close(reading)
    said = heard.communicate(timeout=60)[1].decode()
    assert re.fullmatch(r"A test stood still for \d+ seconds, and was ended\.\n", said)
    assert busy.wait(60) == -signal.SIGKILL
    assert time.monotonic() - began > 2 * SECONDS
    assert [unheard.wait(60), heard.returncode] == [-signal.SIGKILL] * 2
    for process in (busy, unheard):
        process.stdout.close()


def test_a_stopped_process_is_ended_and_one_that_goes_on_is_not() -> None:
    process = start(TURN)
    process.send_signal(signal.SIGSTOP)
    time.sleep(SECONDS / 4)
    process.send_signal(signal.SIGCONT)
    time.sleep(2 * SECONDS)
    assert process.poll() is None
    process.send_signal(signal.SIGSTOP)
    assert process.wait(60) == -signal.SIGKILL
    process.stdout.close()


def test_what_watches_is_started_again_and_goes_with_what_it_watches() -> None:
    process = start(TURN)
    (first,) = descendants(process.pid)
    os.kill(first, signal.SIGKILL)
    wait_until(lambda: descendants(process.pid) not in ([first], []))
    (second,) = descendants(process.pid)
    end(process)
    wait_until(lambda: not Path(f"/proc/{second}").exists())


def test_a_process_that_is_not_watched_any_more_has_nothing_left() -> None:
    process = start(f"watched.cancel(); await asyncio.wait([watched]); print('done', flush=True); {TURN}")
    assert process.stdout.readline() == b"done\n"
    assert descendants(process.pid) == []
    end(process)


def test_what_cannot_be_started_now_is_tried_again(tmp_path: Path) -> None:
    process = start(TURN, environment={"PATH": str(tmp_path)})
    assert descendants(process.pid) == []
    (tmp_path / "bash").symlink_to("/bin/bash")
    wait_until(lambda: len(descendants(process.pid)) == 1)
    end(process)
