"""Whether fused blocks are faster: the product's transformer, and diffusers' blocks on the same weights, in turn."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from statistics import median

import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from torch import Tensor
from torch._dynamo.utils import counters

from bench.gpu.context import Bench, Marks, Row, SkippedError, Values, relative_error, summary
from bench.gpu.plain import draw, noise
from engine import block_operators
from engine.acceleration import COMPILE, compiler_settings
from engine.blocks import plain_copy, works
from flux import Job, denoise
from service.measure import Stopwatch

# Turns of each transformer, and steps that are timed in each.
TURNS, STEPS = 4, 4
# Calls of one kernel that are queued together.
CALLS = 20


def blocks(bench: Bench) -> Iterator[Row]:
    """Each kernel alone, against torch; then each precision: compile, errors, steps in turn without and with LoRAs."""
    for name in ("norm_quantize", "gelu_quantize", "rotate_heads", "linear_gelu"):
        yield f"{name} alone", partial(kernel, bench, name)
    for precision, go_fast in bench.precisions.items():
        pair = Pair(bench, go_fast)
        yield f"{precision}, compile", pair.compile
        yield f"{precision}, error of one step", pair.errors
        yield f"{precision}, dev", pair.steps
        yield f"{precision}, dev, two LoRAs", partial(pair.steps, loras=True)
        yield f"{precision}, error of one step with two LoRAs", partial(pair.errors, loras=True)
        yield f"{precision}, dev, a quarter of the size", partial(pair.steps, megapixels="0.25")


@dataclass
class Pair:
    """The product's transformer of one precision, and one of diffusers' blocks that shares all its tensors."""

    bench: Bench
    go_fast: bool

    @cached_property
    def plain(self) -> FluxTransformer2DModel:
        """The second, which will be compiled as the product's is."""
        if not works(self.bench.device):
            raise SkippedError("blocks are fused on a GPU alone")
        models = self.bench.models
        module = plain_copy((models.live_fp8 if self.go_fast else models.live)["dev"].module)
        module.compile_repeated_blocks(**COMPILE)
        return module

    def compile(self) -> Values:
        """Seconds until diffusers' blocks are compiled for every size; the product's are compiled before."""
        jobs = partial(self.jobs, steps=1)
        jobs()
        self.bench.mark_compiled()
        self.bench.flux.warm_up(go_fast=self.go_fast)
        before = counters["stats"]["unique_graphs"]

        def warm_up() -> None:
            with compiler_settings(2):  # both precisions
                for size in ({}, {"megapixels": "0.25", "aspect_ratio": "3:2"}):
                    denoise(jobs(**size)["plain"], 0, lambda: None)

        took = self.bench.seconds(warm_up)
        return {"compile_s": took, "graphs": counters["stats"]["unique_graphs"] - before}

    def jobs(self, *, steps: int, loras: bool = False, **changes: object) -> dict[str, Job]:
        """The same request, ready to be drawn by each."""
        bench, plain = self.bench, self.plain
        wanted = bench.request(go_fast=self.go_fast, loras=loras, num_inference_steps=steps, **changes)
        job = bench.flux.prepare(wanted, bench.files(wanted), Stopwatch(bench.device))
        pipeline = FluxPipeline(**job.pipeline.components | {"transformer": plain})
        pipeline.set_progress_bar_config(disable=True)
        return {"fused": job, "plain": replace(job, pipeline=pipeline)}

    def errors(self, *, loras: bool = False) -> Values:
        """One step of each against the pristine transformer (which has no LoRA), and of one against the other."""
        bench = self.bench
        jobs = self.jobs(steps=1, loras=loras)
        fused, plain = (denoise(jobs[name], jobs[name].request.seed, lambda: None) for name in ("fused", "plain"))
        start = noise(bench)
        between = {"relative_error": relative_error(fused, plain, start), "finite": bool(fused.isfinite().all())}
        if loras:
            return between
        if "plain" not in bench.latents:
            bench.latents["plain"] = draw(bench, 1)
        right = bench.latents["plain"]
        against = {"fused": fused, "plain": plain}
        return between | {f"error_of_{name}": relative_error(it, right, start) for name, it in against.items()}

    def steps(self, *, loras: bool = False, **changes: object) -> Values:
        """Seconds of steps of each, in turn, so that what drifts meets both."""
        jobs = self.jobs(steps=STEPS + 1, loras=loras, **changes)
        before = counters["stats"]["unique_graphs"]
        times: dict[str, list[float]] = {name: [] for name in jobs}
        for _ in range(1 if self.bench.small else TURNS):
            for name, job in jobs.items():
                marks = Marks(self.bench.device)
                denoise(job, job.request.seed, marks)
                times[name] += marks.seconds()
        fused, plain = (summary(times[name]) for name in ("fused", "plain"))
        return fused | {
            "plain": plain,
            "saved_s": plain["median_s"] - fused["median_s"],
            "graphs": counters["stats"]["unique_graphs"] - before,
        }


# ------------------------------------------------------------------------------------------------------------ kernels


@torch.no_grad()
def kernel(bench: Bench, name: str) -> Values:
    """Seconds of one call at FLUX's sizes, bytes that it has to move, and how far its result is from torch's."""
    if name.endswith("quantize"):
        bench.needs_fp8()
    given = arguments(bench)[name]
    operator, in_torch = getattr(block_operators, name), getattr(block_operators, f"_{name}")
    made, right = (results(call(*given)) for call in (operator, in_torch))
    errors = [relative_error(one, other) for one, other in zip(made, right, strict=True)]
    moved = sum(it.nbytes for it in tensors((*given, operator(*given))))
    times = []
    for _ in range(1 if bench.small else 5):
        marks = Marks(bench.device)
        marks()
        for _ in range(1 if bench.small else CALLS):
            operator(*given)
        marks()
        times += marks.seconds()
    each = median(times) / (1 if bench.small else CALLS)
    return {"microseconds": 1e6 * each, "gb_per_s": moved / each / 1e9, "relative_error": max(errors)}


def tensors(values: object) -> list[Tensor]:
    """All tensors within."""
    if isinstance(values, Tensor):
        return [values]
    return [it for value in values or () for it in tensors(value)]


def results(values: Tensor | tuple[Tensor, ...]) -> list[Tensor]:
    """What an operator gave, quantised values times their scales."""
    if isinstance(values, tuple) and len(values) == 2:
        return [values[0].float() * values[1]]
    return tensors(values)


def arguments(bench: Bench) -> dict[str, tuple]:
    """What each operator is given in a single block, and `linear_gelu` in a double block."""
    config, text = bench.pristine.config, 512
    tokens = text + (1024 if bench.small else 4096)
    size, heads = config.attention_head_dim, config.num_attention_heads
    width = heads * size

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.bfloat16, device=bench.device)

    joined = random(1, tokens, 7 * width)  # of which products are views
    *products, hidden = joined.split([width] * 3 + [4 * width], dim=2)
    angles = torch.randn(tokens, size, device=bench.device)
    return {
        "norm_quantize": (random(1, tokens, width), random(1, width), random(1, width)),
        "gelu_quantize": (random(1, tokens, width), hidden, random(4 * width)),
        "rotate_heads": (products, [random(width)] * 3, [random(size)] * 2, angles.cos(), angles.sin()),
        "linear_gelu": (random(1, tokens, width), random(4 * width, width), random(4 * width)),
    }
