"""Faults planted in the predictor behind the real Cog server, each triggered by the first words of a prompt.

starve PHASE    the process gets no more memory while that phase of the request runs, and needs some at its end
corrupt         drawing flips a bit of a live weight at its end
hang            drawing never ends
break           drawing raises an unforeseen error
leak            each such request leaks 8 MiB, a tensor, a thread, an open file and a temporary file
"""

PLANTED = '''

import resource
import tempfile
import threading
from contextlib import contextmanager

from service.measure import Stopwatch

_draw = Predictor._draw
_leaked = []


class _Starving(Stopwatch):
    """Denies the process more memory in one phase."""

    @contextmanager
    def __call__(self, phase):
        with super().__call__(phase):
            if phase != self.starved:
                yield
                return
            holes = [bytearray(3000) for _ in range(20_000)]  # fill the free parts of the heap
            with open("/proc/self/statm") as file:
                size = int(file.read().split()[0]) * resource.getpagesize()
            limits = resource.getrlimit(resource.RLIMIT_AS)
            # Far below the present size: memory that another thread frees meanwhile makes no room.
            resource.setrlimit(resource.RLIMIT_AS, (size // 2, limits[1]))
            try:
                yield
                torch.ones(2**28)  # if the phase could reuse freed memory
            finally:
                resource.setrlimit(resource.RLIMIT_AS, limits)
                holes.clear()


def _draw_with_faults(self, request, stopwatch):
    fault, *rest = request.prompt.split()
    if fault == "starve":
        stopwatch.__class__, stopwatch.starved = _Starving, rest[0]
    if fault == "hang":
        threading.Event().wait()
    if fault == "break":
        raise KeyError("/srv/models/secret.bin is not there, asked of http://u:a/passw0rd@host/?passw0rd")
    paths = _draw(self, request, stopwatch)
    if fault == "corrupt":
        parameter = next(self.flux._transformers[0].parameters())
        parameter.data.view(torch.uint8).view(-1)[0] ^= 1
    if fault == "leak":
        _leaked.append((bytearray(b"x" * 2**23), torch.ones(9), open("predict.py")))
        tempfile.mkstemp(dir=os.environ["TMPDIR"])
        threading.Thread(target=threading.Event().wait, daemon=True).start()
    return paths


Predictor._draw = _draw_with_faults
'''
# Environment of the starving process: freed memory returns to the system at once, and threads share one heap, so that
# every larger allocation asks the system.
HUNGRY = {"MALLOC_MMAP_THRESHOLD_": "4096", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_ARENA_MAX": "1"}
