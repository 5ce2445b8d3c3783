"""A process beside this one that ends it by force when it stands still: when it is stopped, or its event loop hangs.

The kernel goes on giving connections to a process that is stopped, and Ray takes one that does not answer for one that
is slow. Only its end lets others take over. This module knows processes, and nothing of what they do.
"""

import asyncio
import logging
import os
import subprocess

from cluster.failures import places

logger = logging.getLogger("ray.serve")

# Reads two lines a second: 0 is one more, 1 the end of the process that sends them, and anything else a second without
# any. Seconds are counted one by one: where the whole machine was stopped, or slept, there is nobody to blame. One in
# which the process has used the processor counts a third: it may be busy, and get little of a machine that is too.
WATCH = """
missed=0 quiet=0 before=
while [ $missed -lt $((3 * $2)) ]; do
    read -r -t 1 _
    case $? in 0) missed=0 quiet=0; continue ;; 1) exit ;; esac
    read -r -d "" stat <"/proc/$0/stat"
    read -r -a used <<<"${stat##*) }"
    used=$((used[11] + used[12]))
    missed=$((missed + (used == before ? 3 : 1))) quiet=$((quiet + 1)) before=$used
done
kill -s KILL "$0"
echo "A $1 stood still for $quiet seconds, and was ended." >&2
"""


async def watch_event_loop(name: str, seconds: int) -> None:
    """Have this process ended by force once its event loop has not turned for so long; until this is cancelled.

    Args:
        name: what this process is, for the log.
        seconds: of a process that does nothing; one that is busy has three times as many.
    """
    while True:
        try:
            await _show_turns("bash", "-c", WATCH, str(os.getpid()), name, str(seconds))
        except OSError as error:  # somebody has ended it, or it cannot be started now
            logger.error("What watches this %s is started again: %s", name, places(error))
        await asyncio.sleep(1)


async def _show_turns(*command: str) -> None:
    """Start a process, and send it two lines a second; it is ended when this is.

    Raises:
        OSError: it cannot be started, or has ended.
    """
    path = {"PATH": os.environ.get("PATH", os.defpath)}  # of other variables, which may be secrets, it needs none
    with subprocess.Popen(command, env=path, stdin=subprocess.PIPE, bufsize=0, start_new_session=True) as watching:
        os.set_blocking(watching.stdin.fileno(), False)
        try:
            while True:
                watching.stdin.write(b"\n")  # nothing is written where the pipe is full: it is stopped itself
                await asyncio.sleep(0.5)
        finally:
            watching.kill()
