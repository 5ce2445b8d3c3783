"""The cluster of these tests, small: its predictor, its token, its queue; and how its answers are compared."""

import re
from typing import Any

TOKEN = "t0ken-of-the-tests"
QUEUE, WORKERS = 60, 3
# A minimal predictor: it draws, fails, takes long, kills its process, or hangs.
PREDICTOR = """
import os
import signal
import time

from cog import BasePredictor, Input, Path
from tqdm import tqdm


class Predictor(BasePredictor):
    def setup(self) -> None:
        self.made = 0

    def predict(
        self,
        prompt: str = Input(description="what to do"),
        image: Path | None = Input(default=None),
        steps: int = Input(default=4, ge=1, le=50),
        strength: float = Input(default=1),
        model: str = Input(default="dev", choices=["dev", "schnell"]),
        replicate_weights: str | None = Input(default=None),
    ) -> list[Path]:
        print("Asked for", prompt)
        self.record_metric("timing.denoise", 1.5)
        if prompt == "fail":
            raise ValueError("A mask needs an image.")
        if prompt == "crash":
            os._exit(3)
        if prompt == "stall":  # longer than a predictor lets its device, which then ends itself
            time.sleep(2)
            os._exit(3)
        if prompt == "hang":
            os.kill(os.getpid(), signal.SIGSTOP)
        if prompt.startswith("sleep ") and not (slept := Path(prompt.removeprefix("sleep "))).exists():
            slept.touch()
            time.sleep(600)
        # A quick prediction prints only its first and last bar, even on a slow machine: logs are compared.
        for _ in tqdm(range(steps), mininterval=0.1 if prompt == "slow" else 60):
            time.sleep(0.5 if prompt == "slow" else 0.01)
        self.made += 1
        output = Path("/tmp") / f"flux-sprites-{os.getpid()}-{self.made % 4}.webp"
        output.write_bytes(image.read_bytes() if image else f"{prompt} {steps} {model}".encode())
        return [output]
"""


def comparable(answer: tuple[int, dict[str, str], str]) -> tuple[Any, ...]:
    """An answer without what differs from one time to the next, and without where a parser gave up on what."""
    status, headers, text = answer
    text = re.sub(r'"id":"(pred_[0-9a-f]+|[a-z2-7]{26})"', '"id":"…"', text)
    text = re.sub(r'"predict_time":[0-9.e-]+', '"predict_time":…', text)
    text = re.sub(r"\[[0-9:]+<[^]]*\]", "[…]", text)  # tqdm's times
    text = re.sub(r" at line \d+ column \d+$", "", text)
    text = re.sub(r"(the request body as JSON): .*", r"\1: …", text)
    text = re.sub(r"(into the target type): (\[0\]: )?invalid (type|length).*", r"\1: …", text)
    return status, headers.get("content-type"), headers.get("allow"), text
