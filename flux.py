"""FLUX.1 [dev] and [schnell]: load them once, draw what a request asks for.

`Flux.generate` tells the story of one request. Its pipeline is made anew from the shared components: that costs
nothing, and nothing that one request leaves in it can reach the next. This module knows diffusers; it knows neither Cog
nor the files that go out.
"""

import inspect
import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxImg2ImgPipeline,
    FluxInpaintPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
)
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm
from transformers import AutoTokenizer, CLIPTextModel, T5EncoderModel

import fp8
import images
from live import Live, Term
from lora_loader import Lora, LoraCache
from request import LoraChoice, Request
from settings import Settings
from weights import Weights, WeightsCache, snapshot

# How many text tokens each model was trained with: dev as many as diffusers' pipeline takes by itself. A tokenizer that
# ends earlier wins.
TEXT_TOKENS = {
    "dev": inspect.signature(FluxPipeline.encode_prompt).parameters["max_sequence_length"].default,
    "schnell": 256,
}
# LoRAs are made this much stronger under fp8: the model page says so, and users choose their scales by it.
FP8_LORA_FACTOR = 1.5
# The linear layers of blocks run in fp8, except modulation: it sees one token, and what it says multiplies all others.
BLOCKS = ("transformer_blocks.", "single_transformer_blocks.")
MODULATION = (".norm.linear", ".norm1.linear", ".norm1_context.linear")


@dataclass(frozen=True)
class AppliedLora:
    """A LoRA as a request applies it."""

    choice: LoraChoice
    weights: Weights  # the file: its name as it may be shown, the SHA-256 of its content, its trigger words
    lora: Lora
    scale: float  # what was asked for, times fp8's factor where fp8 runs
    left_out: tuple[str, ...]  # parameters that this request's model does not have

    def metric(self) -> dict[str, object]:
        """What is recorded of it."""
        metric = {"name": self.weights.name, "scale": self.choice.scale, **self.lora.report.metric()}
        return metric | ({"left_out": list(self.left_out)} if self.left_out else {})


@dataclass(frozen=True)
class Canvas:
    """What is drawn on: the promised size, and the input image and the mask fitted to it."""

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
    fp8: bool  # the precision that really runs
    pipeline: FluxPipeline | FluxImg2ImgPipeline | FluxInpaintPipeline
    embeddings: Mapping[str, Tensor]


@dataclass(frozen=True)
class Drawing:
    """What a request came to."""

    images: list[Image.Image]
    loras: tuple[AppliedLora, ...]
    fp8: bool
    dtype: str  # of what is not fp8, such as "bfloat16"


class Stopwatch:
    """Seconds by phase, added up; waits for the device, so that a phase is charged for the work that it started."""

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = {}
        self._device = device

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Charge what happens inside to `phase`."""
        start = time.perf_counter()
        try:
            yield
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start


class Flux:
    """Both models with everything that they share.

    Args:
        settings: where the weights come from.
        device: where the models compute.

    Raises:
        ValueError: a sentence about model weights that cannot be had or do not fit.
    """

    def __init__(self, settings: Settings, device: torch.device) -> None:
        self.device = device
        self._weights = WeightsCache(settings)
        folders = {name: snapshot(getattr(settings.models, name), settings) for name in ("dev", "schnell")}
        bases = {name: _read_tensors(folder / "transformer") for name, folder in folders.items()}
        dtype = next(iter(bases["dev"].values())).dtype
        dev = folders["dev"]
        text_encoder = CLIPTextModel.from_pretrained(dev / "text_encoder", dtype=dtype).to(device).eval()
        self.components = {
            "vae": AutoencoderKL.from_pretrained(dev / "vae", torch_dtype=dtype).to(device).eval(),
            "text_encoder": text_encoder,
            "text_encoder_2": T5EncoderModel.from_pretrained(dev / "text_encoder_2", dtype=dtype).to(device).eval(),
            "tokenizer": AutoTokenizer.from_pretrained(dev / "tokenizer"),
            "tokenizer_2": AutoTokenizer.from_pretrained(dev / "tokenizer_2"),
        }
        self._schedulers = {
            name: FlowMatchEulerDiscreteScheduler.load_config(folder / "scheduler") for name, folder in folders.items()
        }
        pristine = {name: parameter.detach().clone() for name, parameter in text_encoder.named_parameters()}
        self._live_text_encoder = Live(text_encoder, {"shared": pristine})
        self._live = _live_transformers(folders, _place(bases, device), device, dtype)
        twins = {live: live.quantized(_is_block_linear) for live in set(self._live.values()) if fp8.supported(device)}
        self._live_fp8 = {name: twins.get(live) for name, live in self._live.items()}
        self._loras = LoraCache(self._live["dev"].module, text_encoder)
        if device.type == "cuda" if settings.compile is None else settings.compile:
            for live in {*self._live.values(), *twins.values()}:
                live.module.compile_repeated_blocks(fullgraph=True, dynamic=True)

    def generate(self, request: Request, stopwatch: Stopwatch) -> Drawing:
        """Draw the pictures of a request.

        Raises:
            ValueError: a sentence about an image, a mask or a LoRA that cannot be used; nothing was changed then.
        """
        job = self.prepare(request, stopwatch)
        if request.image is not None and request.prompt_strength == 0:
            pictures = [job.canvas.image.copy() for _ in request.seeds]
        else:
            pictures = []
            with tqdm(total=_steps(request) * request.num_outputs) as bar:
                for seed in request.seeds:
                    pixels = self.draw(job, seed, stopwatch, bar.update)
                    pictures.append(_picture(pixels, job.canvas))
        return Drawing(pictures, job.loras, job.fp8, str(job.embeddings["prompt_embeds"].dtype).removeprefix("torch."))

    @torch.no_grad()
    def prepare(self, request: Request, stopwatch: Stopwatch) -> Job:
        """Read what the request names, make the live weights equal its mix, encode its prompt."""
        runs_fp8 = request.fp8 and self._live_fp8[request.model] is not None
        live = (self._live_fp8 if runs_fp8 else self._live)[request.model]
        with stopwatch("input"):
            canvas = _canvas(request)
        with stopwatch("loras"):
            factor = FP8_LORA_FACTOR if runs_fp8 else 1.0
            loras = tuple(self._apply(choice, request.model, factor) for choice in request.loras)
        with stopwatch("swap"):
            live.hold(request.model, [Term(it.weights.sha256, it.scale, it.lora.transformer) for it in loras])
            self._live_text_encoder.hold(
                "shared", [Term(it.weights.sha256, it.scale, it.lora.text_encoder) for it in loras]
            )
        pipeline = self._pipeline(request, live)
        with stopwatch("prompt"):
            embeddings = self._encode(pipeline, request)
        return Job(request, canvas, loras, runs_fp8, pipeline, embeddings)

    @torch.no_grad()
    def draw(self, job: Job, seed: int, stopwatch: Stopwatch, on_step: Callable[[], object]) -> Tensor:
        """Draw one picture.

        Returns:
            [3, H, W] in [0, 1], of the canvas's size; what a mask keeps is not pasted back yet.
        """
        with stopwatch("denoise"):
            latents = _denoise(job, seed, on_step)
        with stopwatch("decode"):
            return _decode(job, latents)

    def read_lora(self, choice: LoraChoice) -> tuple[Weights, Lora]:
        """Fetch and parse a LoRA, or take it from the caches.

        Raises:
            ValueError: a sentence about why it cannot be had or used.
        """
        opened = self._weights.open_local if choice.trusted else self._weights.open
        with opened(choice.reference) as weights:
            return weights, self._loras.read(weights)

    def _apply(self, choice: LoraChoice, model: str, factor: float) -> AppliedLora:
        weights, lora = self.read_lora(choice)
        left_out = self._live[model].lacking(model, lora.transformer)
        print(f"LoRA {weights.name} at {choice.scale:g}: {lora.report}")
        if left_out:
            print(f"{model} has no guidance embedder: left {len(left_out)} of its parameters out.")
        if weights.trigger_words:
            print(f"Trigger words: {', '.join(weights.trigger_words)}")
        return AppliedLora(choice, weights, lora, choice.scale * factor, left_out)

    def _pipeline(self, request: Request, live: Live) -> FluxPipeline | FluxImg2ImgPipeline | FluxInpaintPipeline:
        if request.image is None:
            kind = FluxPipeline
        else:
            kind = FluxImg2ImgPipeline if request.mask is None else FluxInpaintPipeline
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(self._schedulers[request.model])
        pipeline = kind(scheduler=scheduler, transformer=live.module, **self.components)
        # One bar spans all pictures of a request, and clients read it.
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def _encode(self, pipeline: FluxPipeline, request: Request) -> dict[str, Tensor]:
        tokens = min(TEXT_TOKENS[request.model], pipeline.tokenizer_2.model_max_length)
        used = len(pipeline.tokenizer_2(request.prompt).input_ids)
        if used > tokens:
            print(f"The prompt has {used} tokens; {request.model} reads the first {tokens}.")
        prompt_embeds, pooled_prompt_embeds, _ = pipeline.encode_prompt(
            request.prompt, device=self.device, max_sequence_length=tokens
        )  # [1, tokens, D], [1, P]
        return {"prompt_embeds": prompt_embeds, "pooled_prompt_embeds": pooled_prompt_embeds}


def _canvas(request: Request) -> Canvas:
    if request.image is None:
        size = images.text_to_image_size(request.aspect_ratio, request.megapixels, request.width, request.height)
        return Canvas(*size)
    image = images.fit(images.read_image(request.image))
    mask = None if request.mask is None else images.read_mask(request.mask, image.size)
    return Canvas(*image.size, image, mask)


def _strength(request: Request) -> float:
    """prompt_strength, but never so little that the pipeline finds no step to draw."""
    return max(request.prompt_strength, 1 / request.num_inference_steps)


def _steps(request: Request) -> int:
    """How many steps a pipeline will draw: with an image it skips the first ones (its `get_timesteps`)."""
    if request.image is None:
        return request.num_inference_steps
    steps = request.num_inference_steps
    return steps - int(steps - min(steps * _strength(request), steps))


def _grid_size(job: Job) -> tuple[int, int]:
    """The canvas's size, rounded up to what the VAE and the 2x2 patches can express."""
    grid = job.pipeline.vae_scale_factor * 2
    return tuple(-(-side // grid) * grid for side in (job.canvas.width, job.canvas.height))


def _denoise(job: Job, seed: int, on_step: Callable[[], object]) -> Tensor:
    """Run the pipeline for one picture; returns packed latents [1, tokens, channels]."""
    width, height = _grid_size(job)
    inputs = {}
    if job.canvas.image is not None:
        inputs |= {"image": images.extend(job.canvas.image, (width, height)), "strength": _strength(job.request)}
    if job.canvas.mask is not None:
        inputs |= {"mask_image": images.extend(job.canvas.mask, (width, height))}

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


def _decode(job: Job, latents: Tensor) -> Tensor:
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
    """[3, H, W] in [0, 1] → an image, with what the mask keeps pasted back."""
    drawn = Image.fromarray((pixels.permute(1, 2, 0).float() * 255).round().byte().cpu().numpy())
    return drawn if canvas.mask is None else images.paste_back(drawn, canvas.image, canvas.mask)


def _is_block_linear(name: str) -> bool:
    return name.startswith(BLOCKS) and not name.endswith(MODULATION)


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors of a model directory, whole or in shards, mapped from disk rather than copied."""
    name = "diffusion_pytorch_model.safetensors"
    index = folder / f"{name}.index.json"
    files = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else {name}
    return {name: tensor for file in sorted(files) for name, tensor in load_file(folder / file).items()}


def _place(bases: dict[str, dict[str, Tensor]], device: torch.device) -> dict[str, dict[str, Tensor]]:
    """Put the bases where the live weights are written from: beside them where they fit, else in pinned host memory."""
    if device.type != "cuda":
        return bases
    size = {name: sum(tensor.nbytes for tensor in tensors.values()) for name, tensors in bases.items()}
    # Beside the bases: live weights in bf16 and, half as large, in fp8, and about as much again as the fp8 ones for
    # pictures at work.
    fits = sum(size.values()) + 2 * max(size.values()) < torch.cuda.mem_get_info(device)[0]
    print(f"Base weights lie {'on the GPU' if fits else 'in pinned host memory'}.")
    return {
        name: {key: tensor.to(device) if fits else tensor.pin_memory() for key, tensor in tensors.items()}
        for name, tensors in bases.items()
    }


def _live_transformers(
    folders: Mapping[str, Path], bases: Mapping[str, Mapping[str, Tensor]], device: torch.device, dtype: torch.dtype
) -> dict[str, Live]:
    """A live transformer for each architecture, by the names of its models.

    dev and schnell differ in their guidance embedder alone, and share one (see `live.Live` on what a base lacks).
    """
    configs = {name: FluxTransformer2DModel.load_config(folder / "transformer") for name, folder in folders.items()}
    architectures: dict[str, list[str]] = {}
    for name, config in configs.items():
        shape = {key: value for key, value in config.items() if key != "guidance_embeds" and not key.startswith("_")}
        architectures.setdefault(json.dumps(shape, sort_keys=True), []).append(name)
    live = {}
    for names in architectures.values():
        guided = any(configs[name].get("guidance_embeds", False) for name in names)
        with torch.device("meta"):
            transformer = FluxTransformer2DModel.from_config(configs[names[0]], guidance_embeds=guided).to(dtype)
        for name in names:
            _check_fit(name, bases[name], transformer)
        module = transformer.to_empty(device=device).eval().requires_grad_(False)
        live |= dict.fromkeys(names, Live(module, {name: bases[name] for name in names}))
    return live


def _check_fit(name: str, base: Mapping[str, Tensor], transformer: FluxTransformer2DModel) -> None:
    shapes = {key: tuple(parameter.shape) for key, parameter in transformer.named_parameters()}
    wrong = [key for key, tensor in base.items() if shapes.get(key) != tuple(tensor.shape)]
    wrong += [key for key in shapes if key not in base and "guidance_embedder" not in key]
    if wrong:
        raise ValueError(
            f"The transformer of {name} does not fit its own config: {len(wrong)} tensor(s) are missing or have "
            f"another shape, the first of them {sorted(wrong)[0]}."
        )
