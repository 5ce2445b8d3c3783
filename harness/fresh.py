"""A loaded predictor that has never predicted, for processes that are forked from it.

`multiprocessing`'s fork server imports this module once; each forked process is like a newly started one.
"""

import contextlib
import os
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from typing import Any

from local_cog import schema
from predict import Predictor
from service.device_thread import DeviceThread
from settings import ROOT

with contextlib.redirect_stdout(open(os.devnull, "w")):  # noqa: PTH123 (for as long as this process lives)
    PREDICTOR = Predictor()
    PREDICTOR.setup()
INPUTS = schema.derive((ROOT / "predict.py").read_text())["components"]["schemas"]["Input"]["properties"]


def draw(inputs: dict[str, Any]) -> list[str]:
    """The SHA-256 of each file of a prediction that is made without Cog's server."""
    # A forked process has none of its parent's threads.
    PREDICTOR.device_thread, PREDICTOR.encoders = DeviceThread(), ThreadPoolExecutor(1)
    given = {name: inputs.get(name, described.get("default")) for name, described in INPUTS.items()}
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):  # noqa: PTH123
        return [sha256(path.read_bytes()).hexdigest() for path in PREDICTOR.predict(**given)]
