"""The two forms in which clients see a prediction: Cog's and Replicate's.

This module knows JSON; it knows nothing of HTTP and of how a prediction runs.
"""

import asyncio
import hmac
from dataclasses import dataclass
from typing import Any

from cluster.files import Files, Inlined
from cluster.predictions import Prediction
from service.strict_json import compact
from settings import MIB

# The largest output with its files inside: Replicate's clients hold several copies of an answer. The most that one
# prediction draws, four pictures of 1440 × 1440, is 32 MiB as PNG that cannot be compressed.
INLINE_BYTES = 48 * MIB


@dataclass(frozen=True)
class Forms:
    """Predictions as JSON, for answers and for webhooks."""

    files: Files
    # Shared by all fronts; streams have addresses derived from it, which cannot be guessed.
    secret: str

    async def show(self, prediction: Prediction) -> Inlined:
        """JSON in the form of the API that the prediction came through."""
        if prediction.api != "replicate":
            return await self.cog(prediction)
        body = await asyncio.to_thread(compact, self.replicate(prediction, prediction.base_url))
        return Inlined.of(self.files, body.encode())

    async def cog(self, prediction: Prediction, **changes: object) -> Inlined:
        """JSON as in Cog's webhooks and answers: files inside, as data URIs."""
        # The names are in order, and only the status comes after the output.
        before = {"id": prediction.id, "logs": prediction.whole_log, "metrics": prediction.metrics, **changes}
        if prediction.error is not None:
            before["error"] = prediction.error
        head = (await asyncio.to_thread(compact, before)).removesuffix("}").encode()
        tail = f',"status":{compact(prediction.status)}}}'.encode()
        if prediction.output is None:
            return Inlined.of(self.files, head, tail)
        output = await self.files.inline_output(prediction.output)
        return output.between(head + b',"output":', tail)

    def replicate(self, prediction: Prediction, base: str) -> dict[str, Any]:
        """As Replicate shows it, with URLs of files in the output; `base` is the front's address for this reader."""
        address = f"{base}/v1/predictions/{prediction.id}"
        names = ("id", "model", "version", "status", "error", "metrics", "created_at", "started_at", "completed_at")
        return {
            **{name: getattr(prediction, name) for name in names},
            "input": prediction.shown_input,
            "logs": lines(prediction.whole_log),
            "output": absolute(prediction.output, base),
            "data_removed": False,
            "source": "api",
            "urls": {
                "get": address,
                "cancel": f"{address}/cancel",
                "stream": f"{base}/v1/files/{prediction.id}/stream/{self.stream_key(prediction.id)}",
            },
        }

    async def inlined(self, prediction: Prediction, base: str) -> Inlined:
        """As Replicate shows it, with its files inside, as data URIs; where those are too large, the log says so."""
        shown = self.replicate(prediction, base)
        output = await self.files.inline_output(prediction.output, base)
        if output.length > INLINE_BYTES and len(output.parts) > 1:
            size, most = output.length / MIB, INLINE_BYTES // MIB
            notice = f"The outputs are shown as URLs: as data URIs they are {size:.0f} MiB, and may be {most}.\n"
            shown["logs"] = notice + shown["logs"]
            output = Inlined.of(self.files, (await asyncio.to_thread(compact, shown["output"])).encode())
        del shown["output"]
        head = (await asyncio.to_thread(compact, shown)).removesuffix("}").encode()
        return output.between(head + b',"output":', b"}")

    def stream_key(self, prediction_id: str) -> str:
        """The part of a stream's address that cannot be guessed."""
        return hmac.digest(self.secret.encode(), f"stream {prediction_id}".encode(), "sha256").hex()[:32]


def lines(logs: str) -> str:
    """Logs with each state of a progress bar on its own line: clients read the last line that is one."""
    return logs.replace("\r", "\n")


def absolute(output: Any, base: str) -> Any:  # noqa: ANN401 (JSON)
    """An output, one value or a list, with URLs for the front's paths of files."""
    if isinstance(output, list):
        return [absolute(item, base) for item in output]
    return base + output if isinstance(output, str) and output.startswith("/files/") else output
