"""The Cog server that is started for the page unless another one is named, and the last lines that it has printed."""

from collections import deque
from collections.abc import Mapping
from typing import Any, Self

from local_cog.server import CogServer, url
from playground.target import Target
from service.lines import printable, say

# How many lines are kept, and how much of a long one.
LINES, LINE_CHARACTERS = 1000, 2**14


class OwnServer(Target):
    """This project's predictor behind a Cog server, which runs inside a `with` block."""

    def __init__(self) -> None:
        self._server = CogServer(log=self._hear)
        self._lines: deque[str] = deque(maxlen=LINES)
        super().__init__(url(self._server.host, self._server.port))

    def __enter__(self) -> Self:
        """Start the server, which is not ready yet."""
        self._server.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop the server."""
        self._server.__exit__()

    def about(self) -> dict[str, Any]:
        """What the page is told of the server, which is known before it answers."""
        return {"server": "cog", "progress": "events", "address": self.url, "tokens": False, "log": True}

    def starts(self) -> bool:
        """Whether the server runs, and so may answer later."""
        return self._server.process.poll() is None

    def log(self) -> str:
        """The last lines that the predictor has printed, and errors of the server."""
        return "".join(self._lines.copy())

    def reason(self, error: Exception) -> str:
        """Why there is no answer, in a sentence."""
        code = self._server.process.poll()
        if code is None:
            return super().reason(error)
        return f"The predictor's server ended with code {code}; start script/playground anew."

    def _hear(self, text: str, record: Mapping[str, Any]) -> None:
        """Print a line of the server or the predictor, and keep it unless it is about coglet's routine work."""
        shown = printable(text.rpartition("\r")[2])  # the last of a progress bar's states, which come in one line
        say(shown)
        if record.get("level") != "INFO" or record.get("target") == "coglet::setup":
            self._lines.append(f"{shown[:LINE_CHARACTERS]}\n")
