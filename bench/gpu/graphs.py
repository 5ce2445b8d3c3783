"""Compare launched steps with replayed CUDA graphs, of a fused transformer and of one with diffusers' blocks.

A graph saves time only where launching kernels takes longer than running them, so the CPU matters as much as the GPU.
"""

import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import product

import torch
from torch import Tensor

from bench.gpu.blocks import STEPS, TURNS, Pair
from bench.gpu.context import Bench, Marks, Row, Values, summary
from engine.placement import GRAPHS
from engine.replay import Pool, Steps
from flux import Job, denoise
from service import faults

QUARTER = {"megapixels": "0.25"}
# Sizes that are recorded one after another, in shared memory. The largest picture is always drawn in bf16.
SIZES = {"1:1": {}, "1:1, a quarter": QUARTER, "3:2": {"aspect_ratio": "3:2"}}
LARGEST = {"1440x1440": {"aspect_ratio": "custom", "width": 1440, "height": 1440}}


def graphs(bench: Bench, precision: str) -> Iterator[Row]:
    """Compiling, steps in turn without and with LoRAs, equality of bits, and the cost of recording."""
    go_fast = precision == "fp8"
    if go_fast:
        bench.needs_fp8()
    replayed = Replayed(bench, go_fast)
    yield "compile", replayed.compile
    yield "dev", replayed.steps
    yield "dev, two LoRAs", partial(replayed.steps, loras=True)
    yield "dev, a quarter of the size", partial(replayed.steps, **QUARTER)
    yield "the same bits", replayed.bits
    yield "recording", replayed.recording
    bench.replay_as_the_product()


class NotReplayedError(Exception):
    """Steps could not be recorded; holds the traceback of the last failure."""


@dataclass
class Replayed(Pair):
    """Both transformers, launched and replayed."""

    why: list[str] = field(default_factory=list)  # tracebacks of failed recordings

    def compile(self) -> Values:
        """Seconds to compile both; from then on their steps are replayed."""
        values = super().compile()
        self._start()
        return values

    def _start(self) -> None:
        transformers = [job.pipeline.transformer for job in self.jobs(steps=1).values()]
        self.why.clear()
        # Two transformers of a precision; the product has one.
        Steps(transformers, 2 * GRAPHS).start(lambda: Noted(self.bench.device.type == "cuda", self.why))

    def draw_replayed(self, job: Job, on_step: Callable[..., object]) -> Tensor:
        """Latents; from a size's second step on, by a graph."""
        before = len(self.why)
        latents = denoise(job, job.request.seed, on_step)
        if len(self.why) > before or "forward" not in vars(job.pipeline.transformer):
            raise NotReplayedError(self.why[-1])
        return latents

    @property
    def ways(self) -> dict[str, Callable[[Job, Callable[..., object]], Tensor]]:
        """The functions that draw the latents of a job, by name."""
        return {"launched": self.draw, "replayed": self.draw_replayed}

    def steps(self, *, loras: bool = False, **changes: object) -> Values:
        """Seconds of steps of both transformers, both ways in turn, and CPU seconds; the first turn only records."""
        jobs = self.jobs(steps=STEPS + 1, loras=loras, **changes)
        times: dict[str, list[float]] = {f"{name}, {way}": [] for name in jobs for way in self.ways}
        busy, failed = dict.fromkeys(times, 0.0), {}
        for turn in range(2 if self.bench.small else 1 + TURNS):
            for (name, job), (way, draw) in product(jobs.items(), self.ways.items()):
                which = f"{name}, {way}"
                marks, begun = Marks(self.bench.device), time.process_time()
                try:
                    draw(job, marks)
                except NotReplayedError as error:
                    failed[which] = faults.without_paths(str(error))[-3000:]
                if turn and which not in failed:
                    busy[which] += time.process_time() - begun
                    times[which] += marks.seconds()
        # A picture has one step more than times between steps.
        values: Values = {
            which: summary(its, processor_s=busy[which] / len(its) * STEPS / (STEPS + 1))
            for which, its in times.items()
            if its and which not in failed
        }
        return values | ({"error": f"not replayed: {', '.join(failed)}", "tracebacks": failed} if failed else {})

    def bits(self) -> Values:
        """Whether launched and replayed latents are equal: before LoRAs, with them, and after them."""
        made: dict[str, list[tuple[Tensor, Tensor]]] = {"unfused": [], "fused": []}
        for loras in (False, True, False):
            for name, job in self.jobs(steps=4, loras=loras).items():
                made[name].append(tuple(draw(job, lambda: None) for draw in self.ways.values()))
        values: Values = {}
        for name, its in made.items():
            (_, before), (_, with_loras), (_, after) = its
            values[f"{name}, replayed as launched"] = [torch.equal(*both) for both in its]
            values[f"{name}, after LoRAs as before"] = torch.equal(before, after)
            values[f"{name}, LoRAs change it"] = not torch.equal(before, with_loras)
        return values

    def recording(self) -> Values:
        """Seconds that recording adds to a step, and bytes that it keeps, for each transformer and size."""
        values: Values = {}
        for name in ("unfused", "fused"):
            self._start()  # with no recordings
            for label, size in (SIZES if self.go_fast else LARGEST | SIZES).items():
                draw = partial(self.draw_replayed, self.jobs(steps=1, **size)[name], lambda: None)
                draw()  # the first step of a size is launched
                before = self._free_bytes()
                first = self.bench.seconds(draw)
                kept = before - self._free_bytes()
                values[f"{name}, {label}"] = {"record_s": first - self.bench.seconds(draw), "kept_bytes": kept}
        return values

    def _free_bytes(self) -> int:
        """Free bytes of the GPU, after unused ones were returned."""
        self.bench.free()
        return torch.cuda.mem_get_info(self.bench.device)[0] if self.bench.device.type == "cuda" else 0


class Noted(Pool):
    """A pool that notes failed recordings.

    Args:
        cuda: record CUDA graphs; otherwise (--small on a CPU) a replay computes again, into the same memory.
        why: gets the traceback of each failed recording.
    """

    def __init__(self, cuda: bool, why: list[str]) -> None:
        self._cuda, self._why = cuda, why
        if cuda:
            super().__init__()

    def record(self, work: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
        """The replay of work, and its output."""
        if not self._cuda:
            output = work()
            return lambda: output.copy_(work()), output
        try:
            return super().record(work)
        except Exception as error:
            self._why.append("".join(traceback.format_exception(error)))
            raise

    def bytes(self) -> int:
        """The pool's size."""
        return super().bytes() if self._cuda else 0
