"""Errors that are not the request's fault (no memory, no disk, a bug) as one sentence, without paths of the machine.

Knows the errors of the system and of libraries, none of which it imports.
"""

import errno
import re
import traceback
from pathlib import Path

from service.lines import printable

# A quota and a limit on file sizes stop a writer as a full disk does.
DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# torch and Pillow have no type of error for full host memory. torch's for a full GPU is a RuntimeError, of which cuBLAS
# gives the code alone. Pillow reports a configuration error when zlib cannot allocate what it starts with.
FULL = re.compile(
    r"out of memory|(can't|cannot) allocate memory|not enough memory|std::bad_alloc|new thread|codec configuration"
    r"|CUBLAS_STATUS_ALLOC_FAILED",
    re.IGNORECASE,
)


def out_of_memory(error: BaseException) -> bool:
    """Whether the GPU or the host had no memory left."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno == errno.ENOMEM
    full = isinstance(error, RuntimeError | OSError) and FULL.search(str(error))
    return isinstance(error, MemoryError) or bool(full)


def sentence(error: Exception, phase: str | None) -> str:
    """The sentence for the client about an error in a phase of its request, such as "denoise"."""
    where = f" in the phase {phase}" if phase else ""
    if out_of_memory(error):
        return f"Out of memory{where}; nothing is lost: try a smaller picture, a smaller LoRA or fewer outputs."
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        return f"The server's disk is full{where}; try again later."
    return f"The server failed{where} with {type(error).__name__}; its log says where."


def places(error: Exception) -> str:
    """The error and where it came from, innermost last, without the paths of the machine."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in frames]
    return "\n".join([*lines, printable(message(error))])


def message(error: Exception) -> str:
    """The error's type and message, without the paths of the machine."""
    return f"{type(error).__name__}: {without_paths(str(error))}"


def without_paths(text: str) -> str:
    """The text with the last part of each path alone."""
    return re.sub(r"(?:/[^\s/'\"]+)+/", "", text)
