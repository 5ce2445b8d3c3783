"""Times of everything around the steps, the kernels of a step, and the gain of each of the product's switches."""

import copy
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
from PIL import Image
from torch import nn
from transformers import T5EncoderModel

import images
from bench.gpu.context import BACKENDS, Bench, Marks, Row, Values, can_be_used, launched, summary
from bench.gpu.models import TOKENS
from bench.gpu.plain import pipeline
from engine.loading import move_when_used
from engine.replay import OPTIONS, replaying
from flux import decode, denoise
from service.measure import Stopwatch

KERNELS = 25
# Runs of A and of B, in turn: a drifting clock affects both.
TURNS = 3


def parts(bench: Bench) -> Iterator[Row]:
    """The VAE, the text encoders, and schnell from request to file."""
    for size in (1024, 1440):
        side = size // 128 * 16 if bench.small else size
        yield f"VAE, decode {size}x{size}", partial(decode_picture, bench, side)
        yield f"VAE, encode {size}x{size}", partial(encode_picture, bench, side)
    yield "T5 and CLIP, a new prompt", partial(prompt, bench)
    yield "CLIP alone", partial(clip, bench)
    for precision in bench.precisions:
        yield f"schnell {precision}, request to webp", partial(request_to_file, bench, precision == "fp8")


def decode_picture(bench: Bench, side: int) -> Values:
    """Latents to pixels, as the product decodes them, and the memory that it takes."""
    job = bench.prepare(aspect_ratio="custom", width=side, height=side)
    tokens = (side // 16) ** 2
    call = partial(decode, job, torch.randn(1, tokens, 64, device=bench.device, dtype=torch.bfloat16))
    return bench.times(call, repeats=3) | bench.peak(call)


@torch.no_grad()
def encode_picture(bench: Bench, side: int) -> Values:
    """Pixels to latents, as in image to image, with the memory layout of images: compiled code depends on it."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8))
    pixels = pipeline(bench).image_processor.preprocess(noise).to(bench.device, torch.bfloat16)  # [1, 3, H, W]
    call = partial(bench.flux.components["vae"].encode, pixels)
    return bench.times(call, repeats=3) | bench.peak(call)


@torch.no_grad()
def prompt(bench: Bench) -> Values:
    """Both text encoders over a full-length text."""
    return bench.times(partial(pipeline(bench).encode_prompt, bench.request().prompt))


@torch.no_grad()
def clip(bench: Bench) -> Values:
    """The smaller text encoder by itself."""
    encode = pipeline(bench)._get_clip_prompt_embeds
    return bench.times(partial(encode, bench.request().prompt, device=bench.device))


def request_to_file(bench: Bench, go_fast: bool) -> Values:
    """A prediction without fetching: draw, check, write."""

    def draw_one(prompt: str, watch: Stopwatch) -> None:
        wanted = bench.request("schnell", go_fast=go_fast, prompt=prompt)
        drawing = bench.flux.generate(wanted, (), watch)
        with watch("safety"):
            bench.safety.check(drawing.images)
        with watch("write"):
            images.save(drawing.images[0], bench.folder / "picture.webp", "webp", wanted.output_quality, {})

    return bench.pictures(draw_one)


# ------------------------------------------------------------------------------------------------------------ profile


def profile(bench: Bench) -> Iterator[Row]:
    """The kernels of one step in each precision."""
    for precision, go_fast in bench.precisions.items():
        yield f"one step, {precision}", partial(kernels, bench, go_fast)


def kernels(bench: Bench, go_fast: bool) -> Values:
    """The kernels that take the most time; on a CPU, the operators."""
    job = bench.prepare(go_fast=go_fast, num_inference_steps=1)
    denoise(job, job.request.seed, lambda: None)
    cuda = bench.device.type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CUDA if cuda else torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as recorded:
        denoise(job, job.request.seed, lambda: None)
        bench.synchronize()
    own = "self_device_time_total" if cuda else "self_cpu_time_total"  # microseconds
    events = [(event.key, getattr(event, own), event.count) for event in recorded.key_averages()]
    events = [event for event in events if event[1] > 0]  # without calls of the driver, which are recorded too
    total = sum(time for _, time, _ in events)
    top = sorted(events, key=lambda event: event[1], reverse=True)[:KERNELS]
    table = [{"kernel": key[:120], "ms": time / 1e3, "share": time / total, "calls": n} for key, time, n in top]
    return {"seconds": total / 1e6, "launches": sum(count for _, _, count in events), "kernels": table}


# ----------------------------------------------------------------------------------------------------------- switches


def switches(bench: Bench) -> Iterator[Row]:
    """Both settings of each of the product's switches, in turn."""
    chosen = bench.flux.attention
    for name in BACKENDS if bench.device.type == "cuda" else ():
        if name != chosen:
            yield f"attention: {chosen} / {name}", partial(compare_attention, bench, chosen, name)
    yield "T5: on the device / moved when used", partial(compare_t5, bench)
    if bench.device.type == "cuda":
        yield "T5: kernel by kernel / as a CUDA graph", partial(compare_replay, bench)


def compare_attention(bench: Bench, a: str, b: str) -> Values:
    """Eager steps with each back end: compiled steps would need a graph for each."""
    live = bench.models.live["dev"]
    job = bench.prepare(num_inference_steps=TURNS + 1)

    def use(name: str) -> list[float]:
        with can_be_used():
            live.module.set_attention_backend(name)
        marks = Marks(bench.device)
        denoise(job, job.request.seed, marks)
        return marks.seconds()

    try:
        with torch.compiler.set_stance("force_eager"), launched(live.module):
            return in_turn(partial(use, a), partial(use, b))
    finally:
        live.module.set_attention_backend(a)


@torch.no_grad()
def compare_t5(bench: Bench) -> Values:
    """A prompt's encoding with T5 on the device, and with T5's layers copied there one after another."""
    there = bench.models.components["text_encoder_2"]
    moved = copy.deepcopy(there, {id(it): nn.Parameter(it.cpu(), requires_grad=False) for it in there.parameters()})
    vars(moved).pop("forward", None)  # a replay of the original
    move_when_used(moved.to("cpu"), bench.device)

    def encode(t5: T5EncoderModel) -> list[float]:
        drawing = pipeline(bench)
        drawing.text_encoder_2 = t5
        return [bench.seconds(partial(drawing.encode_prompt, bench.request().prompt, device=bench.device))]

    encode(moved)
    return in_turn(partial(encode, there), partial(encode, moved))


@torch.no_grad()
def compare_replay(bench: Bench) -> Values:
    """T5 over a full-length text, by kernel and as one graph: times, equality of bits, and memory of the graph."""
    t5 = bench.models.components["text_encoder_2"]
    ids = torch.randint(t5.config.vocab_size, (1, TOKENS["tokenizer_2"]), device=bench.device)
    plain = partial(T5EncoderModel.forward, t5)
    bench.free()
    before = torch.cuda.memory_reserved(bench.device)
    replayed = replaying(t5, (ids.shape[1],))
    bench.free()
    kept = torch.cuda.memory_reserved(bench.device) - before

    def run(forward: Callable[..., object]) -> list[float]:
        return [bench.seconds(partial(forward, ids, **OPTIONS))]

    equal = torch.equal(replayed(ids, **OPTIONS)[0], plain(ids, **OPTIONS)[0])
    return in_turn(partial(run, plain), partial(run, replayed)) | {"equal_bits": equal, "kept_bytes": kept}


def in_turn(a: Callable[[], list[float]], b: Callable[[], list[float]]) -> Values:
    """Summaries of the times of both, run in turn."""
    times: dict[str, list[float]] = {"a": [], "b": []}
    for _ in range(TURNS):
        times["a"] += a()
        times["b"] += b()
    return {name: summary(values) for name, values in times.items()}
