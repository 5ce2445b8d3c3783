"""A second process that kills this one when it is stopped (SIGSTOP) or its event loop hangs.

The kernel keeps giving connections to a stopped process, and Ray only takes it for slow: others take over only when it
has ended. This module knows processes, and nothing of what they do.
"""

import asyncio
import logging
import os
import subprocess

from cluster.failures import places

logger = logging.getLogger("ray.serve")

# Reads the two lines a second that the watched process writes. `read` returns 0 for a line, 1 when that process has
# ended, and more after a second without a line. Such seconds are counted, not measured by a clock, which goes on while
# the whole machine is suspended. A second in which the process used CPU time counts a third: it may be busy, on a busy
# machine.
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
    """Have this process killed once its event loop has not run for so long; until this is cancelled.

    A process that uses CPU time meanwhile has three times as many seconds. `name` is its kind, for the log.
    """
    command = ["bash", "-c", WATCH, str(os.getpid()), name, str(seconds)]
    path = {"PATH": os.environ.get("PATH", os.defpath)}  # other variables may be secrets
    options = {"env": path, "stdin": subprocess.PIPE, "bufsize": 0, "start_new_session": True}
    while True:
        try:
            with subprocess.Popen(command, **options) as watching:
                try:
                    os.set_blocking(watching.stdin.fileno(), False)
                    while True:
                        watching.stdin.write(b"\n")  # nothing is written if that process is stopped and the pipe full
                        await asyncio.sleep(0.5)
                finally:
                    watching.kill()
        except OSError as error:  # it was killed, or cannot be started now
            logger.error("What watches this %s is started again: %s", name, places(error))
        await asyncio.sleep(1)
