"""Shared by all stages: the models, made when first needed, and ways to time work."""

import gc
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path
from statistics import median

import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import save_file
from torch import Tensor, nn

from bench.gpu import models
from engine import fp8
from engine.acceleration import compile_models
from engine.architecture import is_block_linear
from engine.loading import Models
from flux import FP8_LORA_FACTOR, Flux, Job
from harness.loras import random_lora
from request import LoraChoice, LoraFile, Request
from safety import SafetyChecker
from service import faults
from service.measure import Stopwatch

PROMPT = "a red fox in the snow, a photograph"
RANK = 16
PICTURES = 3
# diffusers' name of its default attention.
ATTENTION = "native"
# Exact ones: diffusers' default, FlashAttention 3, and each of torch's kernels by itself.
BACKENDS = (ATTENTION, "_flash_3", "_native_cudnn", "_native_flash", "_native_efficient")

Values = dict[str, object]
# The name of a row and the function that measures it. Stages yield rows; if one fails, the others are still measured.
Row = tuple[str, Callable[[], Values]]


class SkippedError(Exception):
    """A row cannot be measured here; says why."""


@dataclass
class Bench:
    """The device, the models, requests, and ways to time work; every stage gets it.

    Args:
        device: where everything computes.
        small: use tiny models: this tries the script, and its times mean nothing.
        folder: for files that are deleted at the end of the run.
        latents: drawn for comparison, by system.
        row: the stage and the name of the row that is being measured.
        marked: whether calling the product's models compiles them.
        compiled: whether they have been compiled.
    """

    device: torch.device
    small: bool
    folder: Path
    latents: dict[str, Tensor] = field(default_factory=dict)
    row: tuple[str, str] = ("", "")
    marked: bool = False
    compiled: bool = False

    @property
    def sizes(self) -> dict[str, dict]:
        """Configurations of all models."""
        return models.SMALL if self.small else models.FULL

    @property
    def side(self) -> int:
        """Width and height of a picture."""
        return 512 if self.small else 1024

    @property
    def steps(self) -> int:
        """How many steps are timed, after one that is not."""
        return 3 if self.small else 8

    @cached_property
    def _made(self) -> tuple[Models, FluxTransformer2DModel]:
        made, pristine = models.make_models(self.device, self.sizes, fp8=self.has_fp8)
        # Set it by name: otherwise diffusers takes the attention that any transformer was given last.
        pristine.set_attention_backend(ATTENTION)
        return made, pristine

    @property
    def models(self) -> Models:
        """The models of `flux`."""
        return self._made[0]

    @property
    def pristine(self) -> FluxTransformer2DModel:
        """dev's transformer as diffusers makes it, for diffusers' own pipeline; its parameters are the base."""
        return self._made[1]

    @cached_property
    def flux(self) -> Flux:
        """The product."""
        return Flux(self.models, self.device)

    @cached_property
    def safety(self) -> SafetyChecker:
        """Both stages of the safety check."""
        return models.make_safety(self.device, self.sizes)

    @cached_property
    def loras(self) -> list[LoraFile]:
        """The two LoRAs of requests."""
        return [self.lora(RANK, seed) for seed in (1, 2)]

    def lora(self, rank: int, seed: int) -> LoraFile:
        """A LoRA on every linear layer of the blocks, in diffusers' names; its file is written once."""
        path = self.folder / f"rank-{rank}-{seed}.safetensors"
        if not path.exists():
            tensors = random_lora(self.models.skeleton, is_block_linear, rank, seed, device=self.device)
            save_file(tensors, path)
        return LoraFile(path, path.stem, path.name)

    @cached_property
    def has_fp8(self) -> bool:
        """Whether fp8 is measured: on every GPU that has it, even if the product would not use it there."""
        ada = self.device.type == "cuda" and torch.cuda.get_device_capability(self.device) >= (8, 9)
        return ada or fp8.supported(self.device)

    @property
    def precisions(self) -> dict[str, bool]:
        """The value of `go_fast` for each precision of this device."""
        return {"bf16": False} | ({"fp8": True} if self.has_fp8 else {})

    def request(self, model: str = "dev", *, go_fast: bool = False, loras: bool = False, **changes: object) -> Request:
        """A picture of a megapixel (a quarter of one where models are small)."""
        scale = 1 / FP8_LORA_FACTOR if go_fast else 1.0  # so that both precisions hold the same mix
        inputs = {
            "prompt": PROMPT,
            "num_inference_steps": 2 if self.small else 28 if model == "dev" else 4,
            "megapixels": "0.25" if self.small else "1",
            "seed": 7,
            "loras": tuple(LoraChoice(file.name, scale) for file in self.loras) if loras else (),
        }
        return Request(model=model, go_fast=go_fast, **inputs | changes)

    def prepare(self, **changes: object) -> Job:
        """A request as `Bench.request` makes it, ready to be denoised, with the live weights that it needs."""
        request = self.request(**changes)
        return self.flux.prepare(request, self.loras if request.loras else (), Stopwatch(self.device))

    def mark_compiled(self) -> None:
        """Mark the product's models to be compiled at the next call, and T5 and steps replayed, like `Flux.compile`."""
        if not self.marked:
            self.flux.replay_t5()
            self.flux.replay_steps()
            transformers = [live.module for live in self.models.lives()]
            compile_models(transformers, self.flux.components["vae"], self.device)
            self.marked = True

    def replay_as_the_product(self) -> None:
        """Replay steps by the product's own recordings if `mark_compiled` was called; else launch them."""
        for live in self.models.lives():
            vars(live.module).pop("forward", None)
        if self.marked:
            self.flux.replay_steps()

    def needs_cuda(self) -> None:
        """Skip the row on a CPU."""
        if self.device.type != "cuda":
            raise SkippedError("needs CUDA")

    def needs_fp8(self) -> None:
        """Skip the row where there is no fp8."""
        if not self.has_fp8:
            raise SkippedError("fp8 products with a scale for each row are not supported here")

    def work(self, model: str = "dev", megapixels: str = "1") -> Values:
        """TFLOP of a step: of the blocks' linear layers, and of attention."""
        config = self.pristine.config
        width = config.num_attention_heads * config.attention_head_dim
        blocks = config.num_layers + config.num_single_layers
        tokens = 1024 if self.small or megapixels == "0.25" else 4096
        tokens += 512 if model == "dev" else 256
        linear, attention = blocks * 24 * width**2 * tokens, blocks * 4 * tokens**2 * width
        return {"tokens": tokens, "linear_tflop": linear / 1e12, "attention_tflop": attention / 1e12}

    def free(self) -> None:
        """Return unused memory to the GPU."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    # ------------------------------------------------------------------------------------------------------- timing

    def synchronize(self) -> None:
        """Wait for the GPU."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def seconds(self, work: Callable[[], object]) -> float:
        """Seconds that work takes, until the GPU has finished it."""
        self.synchronize()
        start = time.perf_counter()
        work()
        self.synchronize()
        return time.perf_counter() - start

    def times(self, work: Callable[[], object], repeats: int = 5) -> Values:
        """Median and spread of several runs; the first run is listed apart."""
        first = self.seconds(work)
        return summary([self.seconds(work) for _ in range(repeats)], first_s=first)

    def pictures(self, draw: Callable[[str, Stopwatch], object]) -> Values:
        """Median and spread of whole pictures, each of a new prompt, after an untimed one; and seconds by phase.

        Args:
            draw: (prompt, stopwatch).
        """
        draw("a blue heron", Stopwatch(self.device))
        watch = Stopwatch(self.device)
        times = [self.seconds(partial(draw, f"a blue heron, number {n}", watch)) for n in range(PICTURES)]
        return summary(times, phases_s={phase: seconds / PICTURES for phase, seconds in watch.seconds.items()})

    def peak(self, work: Callable[[], object]) -> dict[str, int]:
        """The most GPU memory that work added at any time; nothing on a CPU."""
        if self.device.type != "cuda":
            return {}
        self.synchronize()
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        work()
        self.synchronize()
        return {"peak_bytes": torch.cuda.max_memory_allocated(self.device) - before}


class Marks:
    """Times of the device: events in a GPU's stream, or readings of a CPU's clock.

    The GPU records an event when it reaches it, so a mark waits for nothing.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: list[torch.cuda.Event | float] = []

    def __call__(self, *_: object) -> None:
        """Mark now."""
        if self._cuda:
            self._marks.append(torch.cuda.Event(enable_timing=True))
            self._marks[-1].record()
        else:
            self._marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """From each mark to the next."""
        if self._cuda and self._marks:
            self._marks[-1].synchronize()
        return [start.elapsed_time(end) / 1e3 if self._cuda else end - start for start, end in pairwise(self._marks)]


def summary(times: list[float], **more: object) -> Values:
    """Median and spread of seconds."""
    return {"median_s": median(times), "least_s": min(times), "most_s": max(times), "n": len(times)} | more


def relative_error(a: Tensor, b: Tensor, origin: Tensor | float = 0.0) -> float:
    """|a - b| / |b - origin|."""
    return ((a.float() - b.float()).norm() / (b.float() - origin).norm()).item()


@contextmanager
def launched(module: nn.Module) -> Iterator[None]:
    """Inside, a module's kernels are launched one by one instead of replayed."""
    replayed = vars(module).pop("forward", None)
    try:
        yield
    finally:
        if replayed is not None:
            module.forward = replayed


@contextmanager
def can_be_used() -> Iterator[None]:
    """Skip the row if the call inside fails: it is not installed, or does not support this device."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise SkippedError(f"cannot be used: {faults.message(error)}"[:300]) from error


def in_new_thread(work: Callable[[], object]) -> None:
    """Run work in a new thread."""
    with ThreadPoolExecutor(1) as thread:
        thread.submit(work).result()
