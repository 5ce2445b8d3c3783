"""Whether FLUX's blocks are faster fused: the product's transformer and a fused one on the same weights, in turn.

The fused transformer shares all tensors with the product's but those that fusing moves (4 GB in each precision): of
these it has its own, so it has live weights of its own too, and both always hold the same mix.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from statistics import median

import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from torch import Tensor
from torch._dynamo.utils import counters

from bench.gpu.context import Bench, Marks, Row, Values, relative_error, summary
from bench.gpu.plain import draw, noise
from engine import block_operators
from engine.acceleration import COMPILE, compiler_settings
from engine.blocks import fuse, joined_layers
from engine.live import Live
from flux import FP8_LORA_FACTOR, Job, denoise
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
    """The product's transformer of one precision, and a fused one on the same weights."""

    bench: Bench
    go_fast: bool

    @cached_property
    def fused(self) -> Live:
        """Live weights whose module is fused and will be compiled as the product's is."""
        product = (self.bench.models.live_fp8 if self.go_fast else self.bench.models.live)["dev"]
        module = fused_copy(product.module)
        module.set_attention_backend(self.bench.flux.attention)
        # The compiler of --small is the one that costs nothing.
        module.compile_repeated_blocks(backend="eager" if self.bench.small else "inductor", **COMPILE)
        return Live(module, {"dev": dict(self.bench.pristine.state_dict())})

    def compile(self) -> Values:
        """Seconds until the fused blocks are compiled for every size; the product's are compiled before."""
        if not self.bench.small:
            self.bench.mark_compiled()
            self.bench.flux.warm_up(go_fast=self.go_fast)
        before = counters["stats"]["unique_graphs"]

        def warm_up() -> None:
            with compiler_settings(2):  # both precisions
                for size in ({}, {"megapixels": "0.25", "aspect_ratio": "3:2"}):
                    denoise(self.jobs(steps=1, **size)["fused"], 0, lambda: None)

        took = self.bench.seconds(warm_up)
        return {"compile_s": took, "graphs": counters["stats"]["unique_graphs"] - before}

    def jobs(self, *, steps: int, loras: bool = False, **changes: object) -> dict[str, Job]:
        """The same request, ready to be drawn by each; both live weights hold its mix."""
        bench, fused = self.bench, self.fused
        wanted = bench.request(go_fast=self.go_fast, loras=loras, num_inference_steps=steps, **changes)
        job = bench.flux.prepare(wanted, bench.files(wanted), Stopwatch(bench.device))
        fused.hold("dev", [it.term(FP8_LORA_FACTOR if job.fp8 else 1) for it in job.loras])
        pipeline = FluxPipeline(**job.pipeline.components | {"transformer": fused.module})
        pipeline.set_progress_bar_config(disable=True)
        return {"product": job, "fused": replace(job, pipeline=pipeline)}

    def errors(self, *, loras: bool = False) -> Values:
        """One step of each against plain diffusers (which has no LoRA), and of one against the other."""
        bench = self.bench
        jobs = self.jobs(steps=1, loras=loras)
        product, fused = (denoise(jobs[name], jobs[name].request.seed, lambda: None) for name in ("product", "fused"))
        start = noise(bench)
        between = {"relative_error": relative_error(fused, product, start), "finite": bool(fused.isfinite().all())}
        if loras:
            return between
        if "plain" not in bench.latents:
            bench.latents["plain"] = draw(bench, 1)
        plain = bench.latents["plain"]
        against = {"product": product, "fused": fused}
        return between | {f"{name}_against_plain": relative_error(it, plain, start) for name, it in against.items()}

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
        product, fused = (summary(times[name]) for name in ("product", "fused"))
        return fused | {
            "product": product,
            "saved_s": product["median_s"] - fused["median_s"],
            "graphs": counters["stats"]["unique_graphs"] - before,
        }


def fused_copy(module: FluxTransformer2DModel) -> FluxTransformer2DModel:
    """A fused transformer that shares all tensors with this one but those that fusing moves."""
    shared = {id(it): it for it in (*module.parameters(), *module.buffers())}
    for layer in joined_layers(module):
        for it in (layer.weight, getattr(layer, "scale", None)):
            shared.pop(id(it), None)
    fused = copy.deepcopy(module, shared)
    fuse(fused)
    return fused


# ------------------------------------------------------------------------------------------------------------ kernels


@torch.no_grad()
def kernel(bench: Bench, name: str) -> Values:
    """Microseconds of one call at FLUX's sizes, the rate at which it moves bytes, and how far it is from torch's."""
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
    # RoPE turns pairs of numbers, so each angle is there twice.
    angles = torch.randn(tokens, size // 2, device=bench.device).repeat_interleave(2, dim=1)
    return {
        "norm_quantize": (random(1, tokens, width), random(1, width), random(1, width)),
        "gelu_quantize": (random(1, tokens, width), hidden, random(4 * width)),
        "rotate_heads": (products, [random(width)] * 3, [random(size)] * 2, angles.cos(), angles.sin()),
        "linear_gelu": (random(1, tokens, width), random(4 * width, width), random(4 * width)),
    }
