"""The predictor behind the real Cog server with faults planted in it, each called by the first words of a prompt.

starve PHASE    the process gets no more memory while that phase of the request runs, and needs some at its end
corrupt         afterwards one bit of a live weight is another
hang            drawing never ends
break           drawing raises what no one foresaw
leak            each such request leaves a megabyte, a tensor, a thread, an open file and a temporary file
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
    """Lets the process have no more memory in one phase."""

    @contextmanager
    def __call__(self, phase):
        with super().__call__(phase):
            if phase != self.starved:
                yield
                return
            holes = [bytearray(3000) for _ in range(20_000)]  # fill what lies free in the heap
            with open("/proc/self/statm") as file:
                size = int(file.read().split()[0]) * resource.getpagesize()
            limits = resource.getrlimit(resource.RLIMIT_AS)
            # Far below what it has: what another thread gives back meanwhile makes no room.
            resource.setrlimit(resource.RLIMIT_AS, (size // 2, limits[1]))
            try:
                yield
                torch.ones(2**28)  # for a phase that found enough of what had been freed
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
# Of the process that is to starve: what is freed goes back to the system at once, and no thread has a heap of its own,
# so that the next allocation of some size has to ask the system.
HUNGRY = {"MALLOC_MMAP_THRESHOLD_": "4096", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_ARENA_MAX": "1"}
