"""Whether steps are faster replayed: the product's transformer and a fused one, each launched and as CUDA graphs.

The processor matters here as much as the GPU: a graph saves what launching takes longer than running.
"""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product

import torch
from torch import Tensor

from bench.gpu.blocks import STEPS, TURNS, Pair
from bench.gpu.context import Bench, Marks, Row, Values, summary
from engine.replay import Steps
from flux import Job, denoise

QUARTER = {"megapixels": "0.25"}
# Recorded one after another, in memory that they share. The largest picture is always drawn in bf16.
SIZES = {"1:1": {}, "1:1, a quarter": QUARTER, "3:2": {"aspect_ratio": "3:2"}}
LARGEST = {"1440x1440": {"aspect_ratio": "custom", "width": 1440, "height": 1440}}


def graphs(bench: Bench) -> Iterator[Row]:
    """Each precision: compile, steps in turn without and with LoRAs, whether bits are equal, what recording takes."""
    for precision, go_fast in sorted(bench.precisions.items(), reverse=True):  # fp8 first
        replayed = Replayed(bench, go_fast)
        yield f"{precision}, compile", replayed.compile
        yield f"{precision}, dev", replayed.steps
        yield f"{precision}, dev, two LoRAs", partial(replayed.steps, loras=True)
        yield f"{precision}, dev, a quarter of the size", partial(replayed.steps, **QUARTER)
        yield f"{precision}, the same bits", replayed.bits
        yield f"{precision}, recording", replayed.recording


class Replayed(Pair):
    """Both transformers, launched and replayed."""

    def compile(self) -> Values:
        """Seconds until both are compiled; from now on they are replayed."""
        values = super().compile()
        self._start()
        return values

    def _start(self) -> None:
        transformers = [job.pipeline.transformer for job in self.jobs(steps=1).values()]
        Steps(transformers).start(None if self.bench.device.type == "cuda" else computed_again)

    def draw_replayed(self, job: Job, on_step: Callable[..., object]) -> Tensor:
        """Latents, from the second step of a size on by a graph."""
        latents = denoise(job, job.request.seed, on_step)
        if "forward" not in vars(job.pipeline.transformer):
            raise RuntimeError("Steps are not replayed; what was printed says why.")
        return latents

    @property
    def ways(self) -> dict[str, Callable[[Job, Callable[..., object]], Tensor]]:
        """What draws the latents of a job."""
        return {"launched": self.draw, "replayed": self.draw_replayed}

    def steps(self, *, loras: bool = False, **changes: object) -> Values:
        """Seconds of steps of both in both ways, in turn; the first turn is not counted, since it records."""
        jobs = self.jobs(steps=STEPS + 1, loras=loras, **changes)
        times: dict[str, list[float]] = {f"{name}, {way}": [] for name in jobs for way in self.ways}
        for turn in range(2 if self.bench.small else 1 + TURNS):
            for (name, job), (way, draw) in product(jobs.items(), self.ways.items()):
                marks = Marks(self.bench.device)
                draw(job, marks)
                times[f"{name}, {way}"] += marks.seconds() if turn else []
        return {which: summary(its) for which, its in times.items()}

    def bits(self) -> Values:
        """Whether latents of a few steps are the same in both ways: before LoRAs, with them and after them."""
        made: dict[str, list[tuple[Tensor, Tensor]]] = {"product": [], "fused": []}
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
        """For each transformer and size, seconds that recording adds to a step, and bytes that it keeps then."""
        self._start()  # anew, so that nothing is recorded
        values: Values = {}
        for name in ("product", "fused"):
            for label, size in (SIZES if self.go_fast else SIZES | LARGEST).items():
                draw = partial(self.draw_replayed, self.jobs(steps=1, **size)[name], lambda: None)
                draw()  # launched, since it is the first
                before = self._free_bytes()
                first = self.bench.seconds(draw)
                kept = before - self._free_bytes()
                values[f"{name}, {label}"] = {"record_s": first - self.bench.seconds(draw), "kept_bytes": kept}
        return values

    def _free_bytes(self) -> int:
        """Of the GPU's memory, once what nothing holds is given back."""
        self.bench.free()
        return torch.cuda.mem_get_info(self.bench.device)[0] if self.bench.device.type == "cuda" else 0


def computed_again(work: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
    """What --small records on a CPU: a replay computes it again, into the same memory."""
    output = work()
    return lambda: output.copy_(work()), output
