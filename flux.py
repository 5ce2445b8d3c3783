"""FLUX.1 [dev] and [schnell]: load them once, draw what a request asks for.

`Flux.prepare` and `Flux.draw` tell the story of one request. Each request has a new pipeline of the shared components:
that costs nothing, and keeps the requests apart. This module knows diffusers, folders and files; it knows neither where
they come from, nor Cog, nor the files that go out.
"""

import tempfile
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from itertools import cycle, islice
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxImg2ImgPipeline, FluxInpaintPipeline, FluxPipeline
from PIL import Image
from torch import Tensor
from torch._dynamo.utils import counters
from tqdm import tqdm

import images
from engine import acceleration, fp8
from engine.architecture import by_block, sizes
from engine.live import Live, Term, add_up
from engine.loading import Models, load
from engine.placement import GB, GRAPHS, Place, Placement, plan
from engine.replay import Steps, replay
from lora_loader import Lora, LoraCache
from request import LoraChoice, LoraFile, Request, exact
from service.device_thread import check_cancelled
from service.machine import host_memory
from service.measure import Stopwatch
from service.outline import Outline
from settings import Settings

# How many text tokens each model was trained with.
TEXT_TOKENS = {"dev": 512, "schnell": 256}
# Turn off tqdm's monitor thread, which only watches stalled bars.
tqdm.monitor_interval = 0
# LoRAs are made this much stronger under fp8: the model page says so, and users choose their scales by it.
FP8_LORA_FACTOR = 1.5
# How long a health check takes: far less than the five seconds that Cog waits, and a request may have to wait for it.
SECONDS_TO_CHECK = 0.1
# Pixels of a picture by default: code is compiled for this size first.
USUAL_SIZE = (1024, 1024)
# Prompts whose embeddings are kept, the latest ones: 4 MB each in dev, on the device.
PROMPTS = 32


@dataclass(frozen=True)
class AppliedLora:
    """A LoRA as a request applies it."""

    choice: LoraChoice
    file: LoraFile
    lora: Lora
    left_out: tuple[str, ...]  # parameters that the request's model lacks
    by_block: Mapping[str, float]  # factors of the strength

    def term(self, factor: float) -> Term:
        """Its part of the transformer's mix; strengths are multiplied by the factor."""
        scale = exact(self.choice.scale) * exact(factor)
        parts = {block: scale * exact(own) for block, own in self.by_block.items()}
        return Term(self.file.content, scale, self.lora.transformer, parts)

    def clip_term(self, factor: float) -> Term:
        """Its part of the text encoder's mix."""
        scale = self.choice.scale if self.choice.clip is None else self.choice.clip
        return Term(self.file.content, exact(scale) * exact(factor), self.lora.text_encoder)

    def entry(self) -> dict[str, object]:
        """The object in JSON that requests it again."""
        return self.choice.entry(self.file.name)

    def metric(self) -> dict[str, object]:
        """The record of it in a prediction's metrics."""
        metric = {**self.entry(), "name": self.file.name, "trigger_words": list(self.file.trigger_words)}
        metric |= self.lora.report.metric()
        return metric | ({"left_out": list(self.left_out)} if self.left_out else {})


@dataclass(frozen=True)
class Canvas:
    """The picture's size, the input image fitted to it, and how much of each pixel a mask paints."""

    width: int
    height: int
    image: Image.Image | None = None
    mask: Image.Image | None = None


@dataclass(frozen=True)
class Job:
    """A request that is ready to be drawn: the live weights equal its mix."""

    request: Request
    canvas: Canvas
    loras: tuple[AppliedLora, ...]
    fp8: bool  # whether it runs in fp8
    pipeline: FluxPipeline | FluxImg2ImgPipeline | FluxInpaintPipeline
    embeddings: Mapping[str, Tensor]


@dataclass(frozen=True)
class Drawing:
    """A request's pictures and how they were drawn."""

    images: list[Image.Image]
    loras: tuple[AppliedLora, ...]
    fp8: bool
    dtype: str  # of everything that is not fp8, such as "bfloat16"


class Flux:
    """Both models with everything that they share, for one thread; nothing else may write their live weights."""

    def __init__(self, models: Models, device: torch.device) -> None:
        self.device = device
        self.components = models.components
        self.placement = models.placement
        self._schedulers = models.schedulers
        self._live_text_encoder = models.text_encoder
        self._live, self._live_fp8 = models.live, models.live_fp8
        self._transformers = [live.module for live in models.lives()]
        self.steps = Steps(self._transformers, GRAPHS)
        self.lora_cache = LoraCache(models.skeleton, models.text_encoder.module)
        self._embeddings: OrderedDict[bytes, dict[str, Tensor]] = OrderedDict()
        held = [(live, name) for live in (*models.lives(), models.text_encoder) for name in live.names]
        self._tensors, self._round = len(held), cycle(held)
        self.attention = acceleration.choose_attention(self._transformers, device)
        if device.type == "cuda":  # on a CPU it gains nothing
            self.components["vae"].to(memory_format=torch.channels_last)
        else:
            acceleration.convolve_in_float32(self.components["vae"])

    @staticmethod
    def plan(outlines: Mapping[str, Outline], device: torch.device) -> Placement:
        """The places for weights in this machine's memory, before they are downloaded; see `engine.placement.plan`."""
        free, _ = torch.cuda.mem_get_info(device)
        placement = plan(sizes(outlines), free, host_memory(), fp8=fp8.supported(device))
        print(f"Weights: {placement}.")
        return placement

    @classmethod
    def load(cls, settings: Settings, device: torch.device, placement: Placement | None = None) -> "Flux":
        """Load the models from their folders and compile them; the weights lie on the device unless they were planned.

        Raises:
            ValueError: a sentence about model weights that are missing or do not fit.
        """
        # Before live weights compile the kernel that writes them.
        acceleration.keep_compiled_code(settings.cache_dir / "compile")
        stopwatch = Stopwatch(device)
        folders = {"dev": Path(settings.models.dev), "schnell": Path(settings.models.schnell)}
        models = load(folders, device, stopwatch, placement)
        with stopwatch("attention"):
            flux = cls(models, device)
        if device.type == "cuda" if settings.compile is None else settings.compile:
            with stopwatch("compile"):
                flux.compile()
        print(f"Loaded in {stopwatch}.")
        return flux

    def compile(self, backend: str = "inductor") -> None:
        """Compile the models now, so that no request waits for it; the default precision is warmed up last.

        The kernel that merges LoRAs is compiled before for usual ranks; the first request with others waits a second or
        more.
        """
        acceleration.compile_models(self._transformers, self.components["vae"], self.device, backend)
        for go_fast in (True, False):
            self.warm_up(go_fast=go_fast)
        self.replay_t5()
        self.replay_steps()
        print(f"Compiled {counters['stats']['unique_graphs']} graphs.")

    def replay_t5(self) -> None:
        """Replay T5 for every prompt, if it lies on a GPU; elsewhere its layers are moved for each prompt."""
        if self.device.type == "cuda" and (self.placement is None or self.placement.t5 is Place.GPU):
            replay(self.components["text_encoder_2"], map(self.text_tokens, TEXT_TOKENS))

    def replay_steps(self) -> None:
        """Replay each step from the second one of its size on, on a GPU that has room for the graphs."""
        if self.device.type != "cuda":  # launching costs nothing on a CPU
            return
        left = GRAPHS if self.placement is None else self.placement.left
        if left >= GRAPHS:
            self.steps.start()
        else:
            takes = f"CUDA graphs of them may take {GRAPHS / GB:.1f} GB, and {left / GB:.1f} GB are left"
            print(f"Steps are launched kernel by kernel, since {takes}.")

    def warm_up(self, *, go_fast: bool) -> None:
        """Make every graph that a request of one precision may need, by drawing.

        Both models draw, from an image too, in two sizes that differ in every dimension, so that the graphs take them
        for variables. The usual size comes first: the compiler suits its kernels to the sizes that it sees first.
        """
        silent = Stopwatch(self.device)
        with tempfile.TemporaryDirectory() as folder, acceleration.compiler_settings(len(self._transformers)):
            image = Path(folder) / "grey.png"
            Image.new("RGB", USUAL_SIZE, "grey").save(image)
            usual = {"image": image, "prompt_strength": 1}
            other = {"aspect_ratio": "3:2", "megapixels": "0.25"}
            for model, size in (("dev", usual), ("schnell", other), ("dev", other)):
                request = Request(prompt="", model=model, go_fast=go_fast, num_inference_steps=1, seed=0, **size)
                self.draw(self.prepare(request, (), silent), 0, silent, lambda: None)

    def generate(self, request: Request, loras: Iterable[LoraFile], stopwatch: Stopwatch) -> Drawing:
        """The pictures of a request.

        Args:
            request: validated.
            loras: the files of `request.loras`, in the same order; each is read before the next one is asked for.
            stopwatch: measures the phases.

        Raises:
            ValueError: a sentence about an image, a mask or a LoRA that cannot be used; nothing was changed then.
        """
        job = self.prepare(request, loras, stopwatch)
        dtype = str(job.embeddings["prompt_embeds"].dtype).removeprefix("torch.")
        return Drawing(self._draw_all(job, stopwatch), job.loras, job.fp8, dtype)

    def _draw_all(self, job: Job, stopwatch: Stopwatch) -> list[Image.Image]:
        """A picture for each seed; without any strength, the input image for each."""
        request = job.request
        if request.image is not None and request.prompt_strength == 0:
            return [job.canvas.image.copy() for _ in request.seeds]
        if request.image is not None and request.prompt_strength < _strength(request):
            steps = request.num_inference_steps
            print(f"prompt_strength is {request.prompt_strength:g}: one step of {steps} is drawn, which is the least.")
        with tqdm(total=_steps(request) * request.num_outputs) as bar:

            def on_step() -> None:
                bar.update()
                check_cancelled()

            return [_picture(self.draw(job, seed, stopwatch, on_step), job.canvas) for seed in request.seeds]

    def check(self, seconds: float = SECONDS_TO_CHECK) -> None:
        """Prove that the device computes, and that the live weights have the bits that they are recorded to hold.

        Tensors are written once more beside themselves and compared, one after another, until the time is up; the next
        check goes on from there.

        Raises:
            RuntimeError: a sentence about the device or the weights.
        """
        until = time.perf_counter() + seconds
        _check_products(self.device, next(self._transformers[0].parameters()).dtype)
        for live, name in islice(self._round, self._tensors):
            if not live.intact(name):
                raise RuntimeError(f"{name} is not what was written into it; the next request writes it anew.")
            if time.perf_counter() > until:
                return

    @torch.no_grad()
    def prepare(self, request: Request, loras: Iterable[LoraFile], stopwatch: Stopwatch) -> Job:
        """Read images and LoRAs, make the live weights equal the request's mix, encode its prompt."""
        live, runs_fp8 = self._choose_live(request)
        with stopwatch("input"):
            canvas = _canvas(request)
        with stopwatch("loras"):
            pairs = zip(request.loras, loras, strict=True)
            applied = tuple(self._apply(choice, file, request.model, live) for choice, file in pairs)
        with stopwatch("swap"):
            factor = FP8_LORA_FACTOR if runs_fp8 else 1
            live.hold(request.model, [it.term(factor) for it in applied])
            clip_terms = add_up(it.clip_term(factor) for it in applied if it.lora.text_encoder)
            self._live_text_encoder.hold("shared", clip_terms)
        pipeline = self._pipeline(request, live)
        with stopwatch("prompt"):
            embeddings = self._embed(pipeline, request, clip_terms)
        return Job(request, canvas, applied, runs_fp8, pipeline, embeddings)

    def draw(self, job: Job, seed: int, stopwatch: Stopwatch, on_step: Callable[[], object]) -> Tensor:
        """One picture [3, H, W] in [0, 1], of the canvas's size, not masked yet."""
        with stopwatch("denoise"):
            latents = denoise(job, seed, on_step)
        with stopwatch("decode"):
            return decode(job, latents)

    def _choose_live(self, request: Request) -> tuple[Live, bool]:
        """The transformer that draws a request, and whether it is the fp8 one."""
        live, live_fp8 = self._live[request.model], self._live_fp8[request.model]
        runs_fp8 = live is None or (request.fp8 and live_fp8 is not None)
        return (live_fp8 if runs_fp8 else live), runs_fp8

    def _apply(self, choice: LoraChoice, file: LoraFile, model: str, live: Live) -> AppliedLora:
        lora = self.lora_cache.read(file)
        left_out = live.lacking(model, lora.transformer)
        factors, lacking = by_block(choice.blocks, live.module)
        clip = "" if choice.clip is None else f", CLIP at {choice.clip:g}"
        blocks = "".join(f", {key} times {factor:g}" for key, factor in choice.blocks.items())
        print(f"LoRA {file.name} at {choice.scale:g}{clip}{blocks}: {lora.report}")
        if left_out:
            print(f"{model} has no guidance embedder: left {len(left_out)} of its parameters out.")
        if lacking:
            print(f"{model} has not all of the blocks {', '.join(lacking)}; those that it lacks change nothing.")
        if choice.clip is not None and not lora.text_encoder:
            print("clip has no effect: this LoRA changes no text encoder.")
        if file.trigger_words:
            print(f"Trigger words: {', '.join(file.trigger_words)}")
        return AppliedLora(choice, file, lora, left_out, factors)

    def _pipeline(self, request: Request, live: Live) -> FluxPipeline | FluxImg2ImgPipeline | FluxInpaintPipeline:
        with_image = FluxImg2ImgPipeline if request.mask is None else FluxInpaintPipeline
        kind = FluxPipeline if request.image is None else with_image
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(self._schedulers[request.model])
        pipeline = kind(scheduler=scheduler, transformer=live.module, **self.components)
        # One bar spans all pictures of a request, and clients read it.
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def text_tokens(self, model: str) -> int:
        """How many tokens T5 is given for any prompt, which is padded or cut; a tokenizer may have a lower limit."""
        return min(TEXT_TOKENS[model], self.components["tokenizer_2"].model_max_length)

    def _embed(self, pipeline: FluxPipeline, request: Request, clip_terms: list[Term]) -> dict[str, Tensor]:
        """The prompt's embeddings, kept under a hash of the prompt, its length and CLIP's mix; no prompt is kept."""
        tokens = self.text_tokens(request.model)
        used = len(pipeline.tokenizer_2(request.prompt).input_ids)
        if used > tokens:
            print(f"The prompt has {used} tokens; {request.model} reads the first {tokens}.")
        clip_mix = [(term.content, term.scale) for term in clip_terms]
        key = sha256(repr((request.prompt, tokens, clip_mix)).encode(errors="surrogatepass")).digest()
        if key not in self._embeddings:
            prompt_embeds, pooled_prompt_embeds, _ = pipeline.encode_prompt(
                request.prompt, device=self.device, max_sequence_length=tokens
            )  # [1, tokens, D], [1, P]
            self._embeddings[key] = {"prompt_embeds": prompt_embeds, "pooled_prompt_embeds": pooled_prompt_embeds}
        self._embeddings.move_to_end(key)
        if len(self._embeddings) > PROMPTS:
            self._embeddings.popitem(last=False)
        return self._embeddings[key]


def _check_products(device: torch.device, dtype: torch.dtype) -> None:
    """Multiply two matrices whose product every dtype has exactly: sums of 256 times -1, 0 or 1."""
    values = (torch.arange(256 * 256) * 7 % 11 % 3 - 1).view(256, 256)
    on_device = values.to(device, dtype)
    if not torch.equal((on_device @ on_device.T).cpu().double(), values.double() @ values.double().T):
        raise RuntimeError(f"The {device.type} device multiplies wrongly.")


def _canvas(request: Request) -> Canvas:
    if request.image is None:
        size = images.text_to_image_size(request.aspect_ratio, request.megapixels, request.width, request.height)
        return Canvas(*size)
    image = images.read_image(request.image)
    fitted = images.fit(image)
    mask = None if request.mask is None else images.read_mask(request.mask, image, fitted.size)
    return Canvas(*fitted.size, fitted, mask)


def _strength(request: Request) -> float:
    """prompt_strength, but never so little that the pipeline finds no step to draw."""
    return max(request.prompt_strength, 1 / request.num_inference_steps)


def _steps(request: Request) -> int:
    """How many steps a pipeline will draw: with an image it skips the first ones (its `get_timesteps`)."""
    steps = request.num_inference_steps
    return steps if request.image is None else steps - int(steps - min(steps * _strength(request), steps))


def _grid_size(job: Job) -> tuple[int, int]:
    """The canvas's size, rounded up to a multiple of the VAE's factor times the patches' 2."""
    grid = job.pipeline.vae_scale_factor * 2
    width, height = (-(-side // grid) * grid for side in (job.canvas.width, job.canvas.height))
    # A single token would need graphs of its own: to the compiler a size of 1 is never a variable.
    return (2 * grid, height) if width == height == grid else (width, height)


@torch.no_grad()
def denoise(job: Job, seed: int, on_step: Callable[[], object]) -> Tensor:
    """Packed latents [1, tokens, channels] of one picture; `on_step` is called after each step."""
    width, height = _grid_size(job)
    inputs = {}
    if job.canvas.image is not None:
        inputs |= {"image": images.extend(job.canvas.image, (width, height)), "strength": _strength(job.request)}
    if job.canvas.mask is not None:
        mask = images.extend(job.canvas.mask, (width, height))
        inputs |= {"mask_image": images.cells(mask, job.pipeline.vae_scale_factor)}

    def on_step_end(*_: object) -> dict[str, Tensor]:
        on_step()
        return {}

    return job.pipeline(
        **job.embeddings,
        **inputs,
        width=width,
        height=height,
        num_inference_steps=job.request.num_inference_steps,
        guidance_scale=job.request.guidance_scale,
        # On the CPU, so that a seed means the same picture on every machine.
        generator=torch.Generator("cpu").manual_seed(seed),
        output_type="latent",
        callback_on_step_end=on_step_end,
    ).images


@torch.no_grad()
def decode(job: Job, latents: Tensor) -> Tensor:
    """Packed latents [1, tokens, channels] → pixels [3, H, W] in [0, 1], cropped to the canvas."""
    pipeline, vae = job.pipeline, job.pipeline.vae
    width, height = _grid_size(job)
    latents = pipeline._unpack_latents(latents, height, width, pipeline.vae_scale_factor)  # [1, C, H/f, W/f]
    latents = latents / vae.config.scaling_factor + vae.config.shift_factor
    pixels = vae.decode(latents, return_dict=False)[0]  # [1, 3, H, W] in [-1, 1]
    if not pixels.isfinite().all():
        raise ValueError("The picture came out as no numbers at all; a LoRA is too strong: lower its scale.")
    return (pixels[0, :, : job.canvas.height, : job.canvas.width] / 2 + 0.5).clamp(0, 1)


def _picture(pixels: Tensor, canvas: Canvas) -> Image.Image:
    """[3, H, W] in [0, 1] → an image, in which the mask's black pixels are the input image's."""
    drawn = Image.fromarray((pixels.permute(1, 2, 0).float() * 255).round().byte().cpu().numpy())
    return drawn if canvas.mask is None else images.paste_back(drawn, canvas.image, canvas.mask)
