"""The Cog server that is started for the page where no other one is named, and the end of what it has printed."""

import json
import os
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from local_cog.server import CogServer, url
from playground.target import Target
from service.lines import printable, say

# What is kept of all that it prints, and how long a line may be.
LINES, LINE_BYTES = 1000, 2**14


class OwnServer(Target):
    """This project's predictor behind a Cog server, which has been started.

    Args:
        server: the Cog server.
        printed: the descriptor of a pipe, from which it is read what the server prints.
    """

    def __init__(self, server: CogServer, printed: int) -> None:
        super().__init__(url(server.host, server.port))
        self._server, self._printed = server, printed
        self._lines: deque[str] = deque(maxlen=LINES)
        threading.Thread(target=self._read, daemon=True).start()

    @classmethod
    @contextmanager
    def started(cls) -> Iterator[Self]:
        """Start one, which need not be ready yet; it is stopped in the end."""
        reading, writing = os.pipe()
        cog = CogServer(log=Path(f"/dev/fd/{writing}"))
        try:
            cog.__enter__()
        except BaseException:
            os.close(reading)
            raise
        finally:
            os.close(writing)  # the server has it open itself; when that is closed too, all has been read
        try:
            yield cls(cog, reading)
        finally:
            cog.__exit__(None, None, None)

    def about(self) -> dict[str, Any]:
        """What the page is told of it, which is known before it answers."""
        return {"server": "cog", "progress": "events", "address": self.url, "tokens": False, "log": True}

    def starts(self) -> bool:
        """Whether it will answer later, if it does not now."""
        return self._server.process.poll() is None

    def log(self) -> str:
        """The last lines that the predictor has printed, and what has gone wrong."""
        return "".join(f"{line}\n" for line in self._lines.copy())

    def reason(self, error: Exception) -> str:
        """Why there is no answer, in a sentence."""
        code = self._server.process.poll()
        if code is None:
            return super().reason(error)
        return f"The predictor's server ended with code {code}; start script/playground anew."

    def _read(self) -> None:
        """Print what it prints, and keep the end; else the pipe would be full at some time, and the server wait."""
        with open(self._printed, "rb") as printed:  # noqa: PTH123
            while line := printed.readline(LINE_BYTES):
                shown, routine = _message(line)
                say(shown)
                if not routine:
                    self._lines.append(shown)


def _message(line: bytes) -> tuple[str, bool]:
    """What a line says to people, and whether it is coglet telling of its own work while all is well.

    coglet writes JSON around each line; of a bar, whose states come in one line, the last is shown.
    """
    try:
        record = json.loads(line)
        fields = record["fields"]
        said = ": ".join(str(fields[name]) for name in ("message", "error") if name in fields)
        routine = record["level"] == "INFO" and record["target"] != "coglet::setup"
    except (ValueError, LookupError, TypeError, RecursionError):  # Python's, when it starts or ends
        said, routine = line.decode(errors="replace"), False
    return printable(said.rstrip().rpartition("\r")[2]), routine
