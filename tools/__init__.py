"""What operators run by hand, above the predictor's level; nothing of the product imports it."""

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from settings import ROOT

# Read when the libraries are imported: what they say while loading tells an operator nothing; their errors are raised.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")


@contextmanager
def command() -> Iterator[None]:
    """Run a tool's work in the project's folder; a ValueError, which is a sentence, ends the process with 1."""
    os.chdir(ROOT)  # where the predictor runs, and relative paths of the environment begin
    warnings.simplefilter("ignore")  # of libraries, with paths of this machine
    try:
        yield
    except KeyboardInterrupt:
        print("Cancelled.", file=sys.stderr, flush=True)
        os._exit(1)  # Python would wait for the threads of a download, and they for the ends of their files
    except ValueError as error:
        sys.exit(str(error))
