"""Seconds of a denoising step, eager and compiled, and its error against plain diffusers.

A step is timed from the end of the step before it, by events on the device, while the product draws; whole pictures
come last, from the prompt to pixels in host memory.
"""

from collections.abc import Iterator
from functools import partial

from torch import Tensor
from torch._dynamo.utils import counters

from bench.gpu import plain
from bench.gpu.context import Bench, Marks, Row, Values, relative_error, summary
from bench.gpu.plain import noise, step_times
from flux import denoise
from service.measure import Stopwatch


def eager(bench: Bench) -> Iterator[Row]:
    """diffusers as it comes, then the product without compiled code."""
    yield "diffusers, dev", partial(plain_steps, bench)
    for precision, go_fast in bench.precisions.items():
        yield f"{precision}, dev", partial(steps, bench, go_fast)
        yield f"{precision}, error of one step", partial(error, bench, go_fast)


def compiled(bench: Bench, precision: str) -> Iterator[Row]:
    """Compile one precision, then its steps and pictures."""
    go_fast = precision == "fp8"
    if go_fast:
        bench.needs_fp8()
    yield "compile", partial(compile_precision, bench, go_fast)
    yield "dev", partial(steps, bench, go_fast)
    yield "error of one step", partial(error, bench, go_fast)
    yield "dev, two LoRAs", partial(steps, bench, go_fast, loras=True)
    yield "dev, a quarter of the size", partial(steps, bench, go_fast, megapixels="0.25")
    yield "schnell", partial(steps, bench, go_fast, model="schnell")
    yield "one step with two LoRAs", partial(with_loras, bench, go_fast)
    yield "pictures", partial(pictures, bench, go_fast)


def plain_steps(bench: Bench) -> Values:
    """Steps of diffusers' own pipeline, with its own attention."""
    plain.one_step(bench)
    return step_times(bench)


def steps(bench: Bench, go_fast: bool, *, loras: bool = False, **changes: object) -> Values:
    """Steps of a picture that the product draws."""
    job = bench.prepare(go_fast=go_fast, loras=loras, num_inference_steps=bench.steps + 1, **changes)
    marks = Marks(bench.device)
    before = counters["stats"]["unique_graphs"]
    denoise(job, job.request.seed, marks)
    more = {
        "graphs": counters["stats"]["unique_graphs"] - before,
        "replayed": "forward" in vars(job.pipeline.transformer),
    }
    return summary(marks.seconds(), **more) | bench.work(**changes)


def one_step(bench: Bench, go_fast: bool, *, loras: bool = False) -> Tensor:
    """Latents that the product draws in a single step from noise: [1, tokens, channels]."""
    job = bench.prepare(go_fast=go_fast, loras=loras, num_inference_steps=1)
    return denoise(job, job.request.seed, lambda: None)


def error(bench: Bench, go_fast: bool) -> Values:
    """Relative error of a single step from noise, against plain diffusers on the same weights."""
    return {"relative_error": relative_error(one_step(bench, go_fast), plain.one_step(bench), noise(bench))}


def with_loras(bench: Bench, go_fast: bool) -> Values:
    """Relative change of a single step by two LoRAs, and by fp8 then; keeps bf16's result to compare PEFT with."""
    start = noise(bench)
    bf16 = bench.latents["bf16, two LoRAs"] = one_step(bench, go_fast=False, loras=True)
    values: Values = {"effect": relative_error(one_step(bench, go_fast=False), bf16, start)}
    if go_fast:
        values["relative_error"] = relative_error(one_step(bench, go_fast=True, loras=True), bf16, start)
    return values


def compile_precision(bench: Bench, go_fast: bool) -> Values:
    """Seconds to compile everything that a request of this precision needs."""
    before = counters["stats"]["unique_graphs"]
    bench.mark_compiled()
    took = bench.seconds(lambda: bench.flux.warm_up(go_fast=go_fast))
    bench.compiled = True
    hits = counters["inductor"]["fxgraph_cache_hit"]  # code from --caches
    return {"seconds": took, "graphs": counters["stats"]["unique_graphs"] - before, "cache_hits": hits}


def pictures(bench: Bench, go_fast: bool) -> Values:
    """Seconds of whole pictures of dev, a new prompt each, and by phase."""

    def draw_one(prompt: str, watch: Stopwatch) -> None:
        bench.flux.generate(bench.request(go_fast=go_fast, prompt=prompt), (), watch)

    return bench.pictures(draw_one)
