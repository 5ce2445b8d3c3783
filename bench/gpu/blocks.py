"""Whether FLUX's blocks are faster fused: a fused transformer and one with diffusers' blocks on the same weights, in
turn, both launched kernel by kernel.

On a GPU the product's is the fused one, and the other shares all its tensors. On a CPU it is not fused: there the fused
one has the tensors that fusing moves of its own, so it has live weights of its own too, and both always hold the same
mix.
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
from bench.gpu.plain import draw, noise
from engine import block_operators
from engine.acceleration import COMPILE, compiler_settings
from engine.blocks import DoubleBlock, SingleBlock, fuse, joined_layers
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
    """The product's transformer of one precision, and one on the same weights that is fused where that one is not."""

    bench: Bench
    go_fast: bool

    @property
    def product(self) -> FluxTransformer2DModel:
        """The product's."""
        return (self.bench.models.live_fp8 if self.go_fast else self.bench.models.live)["dev"].module

    @property
    def is_fused(self) -> bool:
        """Whether that is the fused one."""
        return isinstance(self.product.transformer_blocks[0], DoubleBlock)

    @cached_property
    def other(self) -> FluxTransformer2DModel:
        """The other one; it will be compiled as the product's is."""
        module = unfused_copy(self.product) if self.is_fused else fused_copy(self.product)
        module.set_attention_backend(self.bench.flux.attention)
        # The compiler of --small is the one that costs nothing.
        module.compile_repeated_blocks(backend="eager" if self.bench.small else "inductor", **COMPILE)
        return module

    @cached_property
    def own(self) -> Live | None:
        """The other one's live weights, where it has its own."""
        return None if self.is_fused else Live(self.other, {"dev": dict(self.bench.pristine.state_dict())})

    def compile(self) -> Values:
        """Seconds until the fused blocks are compiled for every size; diffusers' are compiled before."""
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
        """The same request, ready to be drawn by each; both hold its mix."""
        bench = self.bench
        wanted = bench.request(go_fast=self.go_fast, loras=loras, num_inference_steps=steps, **changes)
        job = bench.flux.prepare(wanted, bench.files(wanted), Stopwatch(bench.device))
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
        """One step of each against plain diffusers (which has no LoRA), and of one against the other."""
        bench = self.bench
        jobs = self.jobs(steps=1, loras=loras)
        unfused, fused = (self.draw(jobs[name], lambda: None) for name in ("unfused", "fused"))
        start = noise(bench)
        between = {"relative_error": relative_error(fused, unfused, start), "finite": bool(fused.isfinite().all())}
        if loras:
            return between
        if "plain" not in bench.latents:
            bench.latents["plain"] = draw(bench, 1)
        plain = bench.latents["plain"]
        against = {"unfused": unfused, "fused": fused}
        return between | {f"{name}_against_plain": relative_error(it, plain, start) for name, it in against.items()}

    def steps(self, *, loras: bool = False, **changes: object) -> Values:
        """Seconds of steps of each, in turn, so that what drifts meets both."""
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
    """A fused transformer that shares all tensors with this one but those that fusing moves."""
    moved = [it for layer in joined_layers(module) for it in (layer.weight, getattr(layer, "scale", None))]
    fused = _copy(module, moved)
    fuse(fused)
    return fused


def unfused_copy(module: FluxTransformer2DModel) -> FluxTransformer2DModel:
    """A transformer with diffusers' blocks that shares all tensors with this one, which is fused."""
    unfused = _copy(module)
    for block in (*unfused.transformer_blocks, *unfused.single_transformer_blocks):
        if isinstance(block, DoubleBlock | SingleBlock):
            block.__class__ = type(block).__base__
    del unfused._repeated_blocks  # those of fused ones
    return unfused


def _copy(module: FluxTransformer2DModel, own: Iterable[Tensor | None] = ()) -> FluxTransformer2DModel:
    """A copy that has these tensors of its own and shares all others."""
    shared = {id(it): it for it in (*module.parameters(), *module.buffers())}
    for it in own:
        shared.pop(id(it), None)
    with launched(module):  # a replay is not copied
        return copy.deepcopy(module, shared)


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
