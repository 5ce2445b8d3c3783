"""A process beside this one that ends it by force when it stands still: when it is stopped, or its event loop hangs.

The kernel goes on giving connections to a process that is stopped, and Ray takes one that does not answer for one that
is slow. Only its end lets others take over. This module knows processes, and nothing of what they do.
"""

import asyncio
import contextlib
import logging
import os
import subprocess

logger = logging.getLogger("ray.serve")

# Reads a line each second: 0 is one more, 1 the end of the process that sends them, and anything else a second without
# any. Seconds are counted one by one: where the whole machine was stopped, or slept, there is nobody to blame.
WATCH = """
missed=0
while [ $missed -lt $2 ]; do
    read -r -t 1 _
    case $? in 0) missed=0 ;; 1) exit ;; *) missed=$((missed + 1)) ;; esac
done
echo "A $1 stood still for $2 seconds, and was ended." >&2
kill -s KILL "$0"
"""


async def be_watched(name: str, seconds: int) -> None:
    """Show that this event loop turns, for as long as this runs; once it does not for so long, this process is ended.

    Args:
        name: what this process is, for the log.
        seconds: more than anything takes that is done in its event loop, on a machine that has other work.
    """
    command = ["bash", "-c", WATCH, str(os.getpid()), name, str(seconds)]
    while True:
        watching = subprocess.Popen(command, stdin=subprocess.PIPE, bufsize=0, start_new_session=True)
        os.set_blocking(watching.stdin.fileno(), False)
        try:
            with contextlib.suppress(BrokenPipeError):  # somebody has ended it: another one watches from now on
                while True:
                    with contextlib.suppress(BlockingIOError):  # it is stopped itself, and has heard enough
                        watching.stdin.write(b"\n")
                    await asyncio.sleep(1)
            logger.warning("What watches this %s has ended; it is started again.", name)
        finally:
            watching.stdin.close()
            watching.kill()
            watching.wait()
