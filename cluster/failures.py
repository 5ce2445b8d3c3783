"""Why an attempt at a prediction failed, for its client and for the log; `ray_failures.py` knows Ray's reasons."""

import errno
import re
import traceback
from enum import Enum
from pathlib import Path

# How many workers may end while they run a prediction, and how many of its attempts may fail otherwise.
ATTEMPTS = 3
# Fewer where it hangs, since finding that out takes minutes.
ATTEMPTS_THAT_HANG = 2


class Again(Enum):
    """Whether another attempt can help."""

    NEVER = "It would come to the same."
    UNDRAWN = "It may succeed, and is worth its cost unless a worker has begun to draw."
    CUT_OFF = "The attempt was cut off from outside."
    WORKER_ENDED = "A worker ended, perhaps because of the prediction."
    HUNG = "It hung, and its worker had to end."


class Failure(Exception):  # noqa: N818 (an outcome, not an accident)
    """A failed attempt, with the sentence for its client if there is no other attempt."""

    def __init__(self, sentence: str, again: Again = Again.NEVER) -> None:
        super().__init__(sentence, again)  # the arguments with which pickle makes it anew in another process
        self.sentence, self.again = sentence, again


def places(error: BaseException) -> str:
    """One line for the log: the types of an error and of its causes, and their places in our code, innermost first.

    Of a library only the innermost function is named. Messages are left out: they may hold an input, a URL or a path.
    """
    parts, cause = [], error
    while cause is not None and len(parts) < 5:
        frames = [(frame.filename, frame.lineno, frame.name) for frame in traceback.extract_tb(cause.__traceback__)]
        name = type(cause).__name__
        if name.startswith("RayTaskError"):  # it has the frames of the worker in its text
            frames += re.findall(r'File "([^"\n]+)", line (\d+), in (\w+)', str(cause))
        if isinstance(cause, OSError) and cause.errno in errno.errorcode:
            name += f" {errno.errorcode[cause.errno]}"
        named = [frame for frame in frames if frame is frames[-1] or "/lib/python" not in frame[0]]
        where = " < ".join(f"{Path(file).name}:{line} {function}" for file, line, function in named[:-6:-1])
        parts.append(f"{name} at {where}" if where else name)
        cause = getattr(cause, "cause", None) or cause.__cause__
    return "; from ".join(parts)
