"""Compare a fused transformer with one of diffusers' blocks on the same weights, in turn, both launched by kernel.

On a GPU the product's transformer is fused, and the other one shares all its tensors. On a CPU the product's is not
fused: the fused one has its own copy of the tensors that fusing moves, so it needs live weights of its own, which hold
the same mix.
"""

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from statistics import median

import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from torch import Tensor
from torch._dynamo.utils import counters

from bench.gpu.context import Bench, Marks, Row, Values, launched, relative_error, summary
from bench.gpu.plain import noise, one_step
from engine import block_operators
from engine.acceleration import COMPILE, compiler_settings
from engine.blocks import DoubleBlock, SingleBlock, fuse, joined_layers
from engine.live import Live
from flux import FP8_LORA_FACTOR, Job, denoise

# Turns of each transformer, and steps that are timed in each.
TURNS, STEPS = 4, 4
# Calls of one kernel that are queued together.
CALLS = 20


def blocks(bench: Bench) -> Iterator[Row]:
    """Each kernel against torch; then for each precision compiling, errors, and steps without and with LoRAs."""
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
    """The product's transformer of one precision, and another on the same weights: one of the two is fused."""

    bench: Bench
    go_fast: bool

    @property
    def product(self) -> FluxTransformer2DModel:
        """The product's transformer."""
        return (self.bench.models.live_fp8 if self.go_fast else self.bench.models.live)["dev"].module

    @property
    def is_fused(self) -> bool:
        """Whether the product's is the fused one."""
        return isinstance(self.product.transformer_blocks[0], DoubleBlock)

    @cached_property
    def other(self) -> FluxTransformer2DModel:
        """The other transformer, compiled like the product's at its first call."""
        module = unfused_copy(self.product) if self.is_fused else fused_copy(self.product)
        module.set_attention_backend(self.bench.flux.attention)
        # With --small nothing is compiled, to save time.
        module.compile_repeated_blocks(backend="eager" if self.bench.small else "inductor", **COMPILE)
        return module

    @cached_property
    def own(self) -> Live | None:
        """The other transformer's live weights, unless it shares the product's."""
        return None if self.is_fused else Live(self.other, {"dev": dict(self.bench.pristine.state_dict())})

    def compile(self) -> Values:
        """Seconds to compile the fused blocks for every size, after diffusers'."""
        if not self.bench.small:
            self.bench.mark_compiled()

        def warm_up(name: str) -> None:
            with compiler_settings(2):  # both precisions
                for size in ({}, {"megapixels": "0.25", "aspect_ratio": "3:2"}):
                    denoise(self.jobs(steps=1, **size)[name], 0, lambda: None)

        before = self.bench.seconds(partial(warm_up, "unfused"))
        graphs = counters["stats"]["unique_graphs"]
        took = self.bench.seconds(partial(warm_up, "fused"))
        return {"compile_s": took, "unfused_s": before, "graphs": counters["stats"]["unique_graphs"] - graphs}

    def jobs(self, *, steps: int, loras: bool = False, **changes: object) -> dict[str, Job]:
        """The same request, ready to be drawn by each transformer; both hold its mix."""
        job = self.bench.prepare(go_fast=self.go_fast, loras=loras, num_inference_steps=steps, **changes)
        if self.own:
            self.own.hold("dev", [it.term(FP8_LORA_FACTOR if job.fp8 else 1) for it in job.loras])
        pipeline = FluxPipeline(**job.pipeline.components | {"transformer": self.other})
        pipeline.set_progress_bar_config(disable=True)
        unfused, fused = (job, replace(job, pipeline=pipeline))[:: -1 if self.is_fused else 1]
        return {"unfused": unfused, "fused": fused}

    def draw(self, job: Job, on_step: Callable[..., object]) -> Tensor:
        """Latents, launched kernel by kernel."""
        with launched(job.pipeline.transformer):
            return denoise(job, job.request.seed, on_step)

    def errors(self, *, loras: bool = False) -> Values:
        """Relative errors after one step: fused against unfused, and without LoRAs both against plain diffusers."""
        bench = self.bench
        jobs = self.jobs(steps=1, loras=loras)
        unfused, fused = (self.draw(jobs[name], lambda: None) for name in ("unfused", "fused"))
        start = noise(bench)
        between = {"relative_error": relative_error(fused, unfused, start), "finite": bool(fused.isfinite().all())}
        if loras:
            return between
        against = {"unfused": unfused, "fused": fused}
        plain = one_step(bench)
        return between | {f"{name}_against_plain": relative_error(it, plain, start) for name, it in against.items()}

    def steps(self, *, loras: bool = False, **changes: object) -> Values:
        """Seconds of steps of each, in turn, so that a drifting clock affects both."""
        jobs = self.jobs(steps=STEPS + 1, loras=loras, **changes)
        before = counters["stats"]["unique_graphs"]
        times: dict[str, list[float]] = {name: [] for name in jobs}
        for _ in range(1 if self.bench.small else TURNS):
            for name, job in jobs.items():
                marks = Marks(self.bench.device)
                self.draw(job, marks)
                times[name] += marks.seconds()
        unfused, fused = (summary(times[name]) for name in ("unfused", "fused"))
        return fused | {
            "unfused": unfused,
            "saved_s": unfused["median_s"] - fused["median_s"],
            "graphs": counters["stats"]["unique_graphs"] - before,
        }


def fused_copy(module: FluxTransformer2DModel) -> FluxTransformer2DModel:
    """A fused copy that shares all tensors except those that fusing moves."""
    moved = [it for layer in joined_layers(module) for it in (layer.weight, getattr(layer, "scale", None))]
    fused = _copy(module, moved)
    fuse(fused)
    return fused


def unfused_copy(module: FluxTransformer2DModel) -> FluxTransformer2DModel:
    """A copy of a fused transformer with diffusers' blocks; it shares all tensors."""
    unfused = _copy(module)
    for block in (*unfused.transformer_blocks, *unfused.single_transformer_blocks):
        if isinstance(block, DoubleBlock | SingleBlock):
            block.__class__ = type(block).__base__
    del unfused._repeated_blocks  # the names of fused blocks
    return unfused


def _copy(module: FluxTransformer2DModel, own: Iterable[Tensor | None] = ()) -> FluxTransformer2DModel:
    """A copy with its own copies of these tensors; it shares all others."""
    shared = {id(it): it for it in (*module.parameters(), *module.buffers())}
    for it in own:
        shared.pop(id(it), None)
    with launched(module):  # do not copy a replay
        return copy.deepcopy(module, shared)


# ------------------------------------------------------------------------------------------------------------ kernels


@torch.no_grad()
def kernel(bench: Bench, name: str) -> Values:
    """Microseconds of one call at FLUX's sizes, GB/s that it moves, and its error against torch."""
    if name.endswith("quantize"):
        bench.needs_fp8()
    given = arguments(bench)[name]
    operator, in_torch = getattr(block_operators, name), getattr(block_operators, f"_{name}")
    made, right = (results(call(*given)) for call in (operator, in_torch))
    errors = [relative_error(one, other) for one, other in zip(made, right, strict=True)]
    moved = sum(it.nbytes for it in tensors((*given, operator(*given))))
    times, calls = [], 1 if bench.small else CALLS
    for _ in range(1 if bench.small else 5):
        marks = Marks(bench.device)
        marks()
        for _ in range(calls):
            operator(*given)
        marks()
        times += marks.seconds()
    each = median(times) / calls
    return {"microseconds": 1e6 * each, "gb_per_s": moved / each / 1e9, "relative_error": max(errors)}


def tensors(values: object) -> list[Tensor]:
    """All tensors in nested values."""
    if isinstance(values, Tensor):
        return [values]
    return [it for value in values or () for it in tensors(value)]


def results(values: Tensor | tuple[Tensor, ...]) -> list[Tensor]:
    """An operator's results; quantised values are multiplied by their scales."""
    if isinstance(values, tuple) and len(values) == 2:
        return [values[0].float() * values[1]]
    return tensors(values)


def arguments(bench: Bench) -> dict[str, tuple]:
    """Arguments of each operator as in a single block; of `linear_gelu` as in a double block."""
    config, text = bench.pristine.config, 512
    tokens = text + (1024 if bench.small else 4096)
    size, heads = config.attention_head_dim, config.num_attention_heads
    width = heads * size

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.bfloat16, device=bench.device)

    joined = random(1, tokens, 7 * width)  # products are views of it
    *products, hidden = joined.split([width] * 3 + [4 * width], dim=2)
    # RoPE rotates pairs of numbers, so each angle appears twice.
    angles = torch.randn(tokens, size // 2, device=bench.device).repeat_interleave(2, dim=1)
    return {
        "norm_quantize": (random(1, tokens, width), random(1, width), random(1, width)),
        "gelu_quantize": (random(1, tokens, width), hidden, random(4 * width)),
        "rotate_heads": (products, [random(width)] * 3, [random(size)] * 2, angles.cos(), angles.sin()),
        "linear_gelu": (random(1, tokens, width), random(4 * width, width), random(4 * width)),
    }
