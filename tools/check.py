"""Draw with plain diffusers and PEFT, then with the product, from the same weights and noise; compare: script/check.

Both do not fit on one GPU together. So all references are drawn first and kept as latents on the CPU; then everything
is freed, and the product is loaded as in service. Each comparison is a row of the table: one that fails says why, and
the others go on. This module knows diffusers' pipelines and the product's doors; it knows no Cog.
"""

import argparse
import gc
import hashlib
import os
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # read when the library is imported

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxImg2ImgPipeline,
    FluxInpaintPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
)
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from diffusers.utils.logging import disable_progress_bar
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPImageProcessorPil, ViTForImageClassification, ViTImageProcessorPil

from engine.architecture import is_block_linear
from engine.placement import GB
from flux import FP8_LORA_FACTOR, TEXT_TOKENS, Flux, decode, denoise
from request import LoraChoice, LoraFile, Request
from safety import SafetyChecker, Verdict
from service import faults
from service.machine import drawing_device
from service.measure import PeakMemory, Stopwatch
from settings import Models, Settings
from tools import command
from weights import WeightsCache, fetch, outlines

PROMPT = "a red fox"
SEED = 7
STEPS = 4
# Width and height of 21:9 at 0.25 megapixels, and of the image: all sides differ, so that no mix-up goes unseen. Small:
# on a CPU without AVX-512 the plain VAE encodes a larger image for seconds.
SIZE, IMAGE_SIZE = (768, 320), (320, 256)
# Pixels that the mask keeps along each edge: whole cells of latents, of which plain diffusers looks at one pixel.
MARGIN = 32
# prompt_strength: two of the four steps are drawn.
STRENGTH = 0.5

# Bounds on |ours - reference| / |reference| of the latents. Measured with the miniature on a CPU: 0 for dev and
# schnell, 0.012 from an image (the product convolves in float32 there), 0.055 in fp8; 0.19 or more when one of four
# weights in its blocks was zero. The rest is room for the other order of sums in a real model's compiled code.
BF16_ERROR, FP8_ERROR = 0.05, 0.15
# Bounds on |ours - reference| / |reference - reference without the LoRA|, for a LoRA that changes EFFECT of the latents
# or more. Measured with the miniature: 0.02 in bf16, and 0.08 to 0.14 in fp8; with the LoRA at 1.5 times its strength
# 0.7 and more, at 1/1.5 of it 0.5 and more, without it 1.
BF16_LORA_ERROR, FP8_LORA_ERROR = 0.1, 0.3
# SCALES are tried until a LoRA changes that much: a weaker change would drown in fp8's rounding.
EFFECT, SCALES = 0.45, tuple(1.5**power for power in range(6))
# The rank of the made-up LoRA, and the size of its factors, by which it has this effect at scale 1 in the miniature.
RANK, UP = 16, 0.08
# Bounds on the classifier's probability and the checker's cosines against the models called directly: batches of other
# sizes are rounded differently, and the checker's model rounds cosines to three places.
PROBABILITY_ERROR, COSINE_ERROR = 0.01, 0.005


@dataclass(frozen=True)
class Row:
    """The result of one comparison."""

    name: str
    right: bool | None  # None: skipped
    measured: str
    bound: str = ""
    known: bool = True  # whether there was a reference

    def __str__(self) -> str:
        """A line of the table."""
        verdict = {True: "right", False: "WRONG", None: "skipped"}[self.right] if self.known else "unknown"
        return f"{self.name:<24}{verdict:<9}{self.measured}" + (f" [{self.bound}]" if self.bound else "")


class NoReferenceError(Exception):
    """Nothing to compare with, so that the product may be right or wrong: why, as a part of a sentence."""


@dataclass(frozen=True)
class Reference:
    """A request, and the latents that plain diffusers draws for it, or why there are none."""

    request: Request
    latents: Tensor | None  # float32 [1, tokens, channels], on the CPU
    trouble: str = ""

    def known(self) -> Tensor:
        """The latents; a NoReferenceError is raised where there are none."""
        if self.latents is None:
            raise NoReferenceError(self.trouble)
        return self.latents


def check(settings: Settings, device: torch.device, lora: str | None) -> list[Row]:
    """Compare everything, with a LoRA by its reference or path; one is made up where there is none."""
    placement = Flux.plan(outlines(settings), device) if device.type == "cuda" else None
    models = fetch(settings)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        opened = (
            WeightsCache(settings).open_local(lora)
            if lora
            else nullcontext(make_lora(folder / "made_up.safetensors", Path(models.dev) / "transformer"))
        )
        with opened as file:
            references = draw_references(models, device, requests(folder), file)
            memory = PeakMemory(device)
            flux = Flux.load(replace(settings, models=models), device, placement)
            return Comparison(flux, models, references, file, memory).rows()


def requests(folder: Path) -> dict[str, Request]:
    """The requests that are drawn both ways, by the names of the rows; their image and mask are written to `folder`."""
    photo, mask = folder / "photo.png", folder / "mask.png"
    ramp = Image.linear_gradient("L")
    colours = (ramp, ramp.transpose(Image.Transpose.ROTATE_90), Image.radial_gradient("L"))
    Image.merge("RGB", colours).resize(IMAGE_SIZE).save(photo)
    painted = Image.new("L", IMAGE_SIZE)
    # Most of it is painted: latents that are kept prove nothing.
    painted.paste(255, (MARGIN, MARGIN, IMAGE_SIZE[0] - MARGIN, IMAGE_SIZE[1] - MARGIN))
    painted.save(mask)
    dev = Request(prompt=PROMPT, seed=SEED, num_inference_steps=STEPS, aspect_ratio="21:9", megapixels="0.25")
    image = replace(dev, image=photo, prompt_strength=STRENGTH)
    return {
        "dev": dev,
        "image": image,
        "mask": replace(image, mask=mask),
        "LoRA": replace(dev, loras=(LoraChoice("the LoRA"),)),
        "schnell": replace(dev, model="schnell"),
    }


def draw_references(
    models: Models, device: torch.device, requests: Mapping[str, Request], lora: LoraFile
) -> dict[str, Reference]:
    """Draw requests with plain diffusers, those with a LoRA with PEFT; nothing stays on the device."""
    plain = PlainDiffusers(models, device, lora)
    references = {name: plain.refer(name, request) for name, request in requests.items()}
    plain.free()
    return references


class PlainDiffusers:
    """diffusers' own pipelines, of one model at a time; requests with a LoRA mean the one given here."""

    def __init__(self, models: Models, device: torch.device, lora: LoraFile) -> None:
        self._models, self._device, self._lora = models, device, lora
        self._loaded: tuple[str, FluxPipeline] | None = None

    def refer(self, name: str, request: Request) -> Reference:
        """The reference of a request; of an error, only the text is kept, so that nothing stays on the device."""
        print(f"Plain diffusers draws the reference of {name}.", flush=True)
        try:
            return self._draw_with_lora(request) if request.loras else Reference(request, self._draw(request))
        except NoReferenceError as error:
            trouble = str(error)
        except Exception as error:
            full = "its memory is full, and diffusers needs a whole model on the device"
            trouble = full if faults.out_of_memory(error) else f"diffusers failed with {_words(error)}"
        return Reference(request, None, trouble)

    def free(self) -> None:
        """Give the device's memory back."""
        self._loaded = None
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _draw_with_lora(self, request: Request) -> Reference:
        """Draw at the first scale at which the LoRA has its EFFECT; the reference's request names that scale."""
        if self._lora.config:
            raise NoReferenceError("diffusers reads no adapter_config.json")
        plain = self._draw(request)
        pipeline = self._pipeline(request.model)
        pipeline.load_lora_weights(self._lora.path, adapter_name="lora")
        try:
            for scale in SCALES:
                pipeline.set_adapters("lora", scale)
                latents = self._draw(request)
                if not latents.isfinite().all():
                    raise NoReferenceError("with this LoRA diffusers draws no numbers")
                if (latents - plain).norm() >= EFFECT * plain.norm():
                    return Reference(replace(request, loras=(replace(request.loras[0], scale=scale),)), latents)
        finally:
            pipeline.unload_lora_weights()
        raise NoReferenceError(f"even at {scale:.3g} this LoRA changes too little")

    @torch.no_grad()
    def _draw(self, request: Request) -> Tensor:
        """Latents as `Reference` has them, with the LoRA that is loaded, if any."""
        own = self._pipeline(request.model)
        kind, inputs, size = FluxPipeline, {}, SIZE
        if request.image is not None:
            image = Image.open(request.image)
            kind, inputs, size = FluxImg2ImgPipeline, {"image": image, "strength": request.prompt_strength}, image.size
        if request.mask is not None:
            kind, inputs = FluxInpaintPipeline, inputs | {"mask_image": Image.open(request.mask)}
        pipeline = kind(**{name: part for name, part in own.components.items() if part is not None})
        pipeline.set_progress_bar_config(disable=True)
        latents = pipeline(
            request.prompt,
            **inputs,
            width=size[0],
            height=size[1],
            num_inference_steps=request.num_inference_steps,
            guidance_scale=request.guidance_scale,
            max_sequence_length=min(TEXT_TOKENS[request.model], pipeline.tokenizer_2.model_max_length),
            generator=torch.Generator("cpu").manual_seed(request.seed),
            output_type="latent",
        ).images
        return latents.float().cpu()

    def _pipeline(self, model: str) -> FluxPipeline:
        """The pipeline of a model, in the dtype of dev's weights; all but transformer and scheduler are dev's."""
        if self._loaded is None or self._loaded[0] != model:
            self.free()
            folder, dtype = Path(getattr(self._models, model)), _dtype(Path(self._models.dev) / "transformer")
            pipeline = FluxPipeline.from_pretrained(
                self._models.dev,
                transformer=FluxTransformer2DModel.from_pretrained(
                    folder / "transformer", dtype=dtype, local_files_only=True
                ),
                scheduler=FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler", local_files_only=True),
                dtype=dtype,
                local_files_only=True,
            )
            self._loaded = model, pipeline.to(self._device)
        return self._loaded[1]


class Comparison:
    """The product against the references: `flux` has drawn nothing yet, `memory` watches since before it was loaded."""

    def __init__(
        self, flux: Flux, models: Models, references: Mapping[str, Reference], lora: LoraFile, memory: PeakMemory
    ) -> None:
        self._flux, self._models, self._references, self._lora = flux, models, references, lora
        self._memory = memory
        self._stopwatch = Stopwatch(flux.device)

    def rows(self) -> list[Row]:
        """Every comparison, in an order that would show what is left of a LoRA."""
        comparisons: dict[str, Callable[[str], Row]] = {
            "dev": lambda name: self._against_reference(name, *self._first),
            "dev, decoded": self._decoded,
            "schnell": self._latents,
            "image": self._latents,
            "mask": self._latents,
            "what a mask keeps": self._kept_pixels,
            "LoRA": partial(self._with_lora, fp8=False),
            "LoRA in fp8": partial(self._with_lora, fp8=True),
            "without it again": self._without_lora,
            "safety checker": self._safety_checker,
            "safety classifier": self._safety_classifier,
            "a harmless picture": self._harmless,
            "plan of the machine": self._plan,
        }
        return [_row(name, compare) for name, compare in comparisons.items()]

    def _draw(self, request: Request) -> tuple[Tensor, bool]:
        """Latents as `Reference` has them, and whether fp8 drew them."""
        job = self._flux.prepare(request, [self._lora] * len(request.loras), self._stopwatch)
        return denoise(job, request.seed, lambda: None).float().cpu(), job.fp8

    @cached_property
    def _first(self) -> tuple[Tensor, bool]:
        """dev's latents, drawn before any LoRA."""
        return self._draw(self._references["dev"].request)

    @torch.no_grad()
    def _decoded(self, name: str) -> Row:
        """The reference's latents, decoded by the product and by the VAE itself in float32."""
        reference, device = self._references["dev"], self._flux.device
        latents = reference.known().to(device)
        job = self._flux.prepare(reference.request, (), self._stopwatch)
        ours = decode(job, latents.to(job.pipeline.vae.dtype)).float()  # [3, H, W] in [0, 1]
        vae = AutoencoderKL.from_pretrained(Path(self._models.dev) / "vae", dtype=torch.float32).to(device)
        width, height = SIZE
        latents = FluxPipeline._unpack_latents(latents, height, width, 2 ** (len(vae.config.block_out_channels) - 1))
        latents = latents / vae.config.scaling_factor + vae.config.shift_factor  # [1, C, H/f, W/f]
        theirs = (vae.decode(latents).sample[0] / 2 + 0.5).clamp(0, 1)
        error = _ratio(ours - theirs, theirs - theirs.mean())
        return Row(name, error <= BF16_ERROR, f"{error:.4f} of the pixels' contrast", f"at most {BF16_ERROR}")

    def _latents(self, name: str) -> Row:
        return self._against_reference(name, *self._draw(self._references[name].request))

    def _against_reference(self, name: str, latents: Tensor, fp8: bool) -> Row:
        reference = self._references[name].known()
        error, bound = _ratio(latents - reference, reference), FP8_ERROR if fp8 else BF16_ERROR
        return Row(name, error <= bound, f"{error:.4f} of the latents", f"at most {bound}")

    def _with_lora(self, name: str, *, fp8: bool) -> Row:
        """The LoRA in one precision; under fp8 the product multiplies scales by a factor, so less is asked for."""
        wanted, plain = self._references["LoRA"], self._references["dev"].known()
        reference, choice = wanted.known(), wanted.request.loras[0]
        if choice.scale != 1 and "DoRA" in self._flux.lora_cache.read(self._lora).report.kinds:
            raise NoReferenceError("at 1 this DoRA changes too little, and PEFT means other scales otherwise")
        asked = replace(choice, scale=choice.scale / FP8_LORA_FACTOR if fp8 else choice.scale)
        latents, runs_fp8 = self._draw(replace(wanted.request, loras=(asked,), go_fast=fp8))
        if runs_fp8 != fp8:
            return Row(name, None, f"here {'everything' if runs_fp8 else 'nothing'} is drawn in fp8")
        error, effect = _ratio(latents - reference, reference - plain), _ratio(reference - plain, plain)
        bound = FP8_LORA_ERROR if fp8 else BF16_LORA_ERROR
        measured = f"{error:.4f} of its effect, which is {effect:.2f} of the latents at scale {choice.scale:.3g}"
        return Row(name, error <= bound, measured, f"at most {bound}")

    def _without_lora(self, name: str) -> Row:
        """dev's latents again, compared to the bit."""
        again, first = self._draw(self._references["dev"].request)[0], self._first[0]
        return Row(name, torch.equal(again, first), f"{(again != first).sum()} of {first.numel()} numbers differ", "0")

    def _kept_pixels(self, name: str) -> Row:
        """Where the mask is black, the picture is the image to the bit; where it is white, it was drawn."""
        request = self._references["mask"].request
        (drawn,) = self._flux.generate(request, (), self._stopwatch).images
        changed = (np.asarray(drawn) != np.asarray(Image.open(request.image))).any(axis=-1)  # [H, W]
        kept = np.asarray(Image.open(request.mask)) == 0
        spoilt, painted = int(changed[kept].sum()), float(changed[~kept].mean())
        measured = f"{spoilt} of {kept.sum()} kept pixels differ, and {painted:.0%} of the painted ones"
        return Row(name, spoilt == 0 and painted > 0.5, measured, "0, and more than 50%")

    @cached_property
    def _picture(self) -> Image.Image:
        return self._flux.generate(self._references["schnell"].request, (), self._stopwatch).images[0]

    @cached_property
    def _verdict(self) -> Verdict:
        """The verdict of the product's safety check on a drawn picture of something harmless."""
        folders = Path(self._models.safety_checker), Path(self._models.nsfw_classifier)
        return SafetyChecker.load(*folders, self._flux.device).check([self._picture])[0]

    @torch.no_grad()
    def _safety_checker(self, name: str) -> Row:
        """The first stage against the model's own `forward`, which answers yes or no.

        Our score is the excess over a threshold. So the model must say yes with thresholds moved by a little less than
        the score, no with thresholds moved by a little more, and the same as we do with its own thresholds.
        """
        folder, ours = self._models.safety_checker, self._verdict.checker
        model = StableDiffusionSafetyChecker.from_pretrained(folder, dtype=torch.float32).to(self._flux.device)
        inputs = CLIPImageProcessorPil.from_pretrained(folder)(self._picture, return_tensors="pt")
        pixels, thresholds = inputs.pixel_values.to(model.device), model.concept_embeds_weights.clone()
        answers = []
        for moved in (0.0, ours.score - COSINE_ERROR, ours.score + COSINE_ERROR):
            model.concept_embeds_weights.copy_(thresholds + moved)
            answers += model(clip_input=pixels, images=[np.asarray(self._picture)])[1]
        said = " and ".join("flagged" if answer else "not flagged" for answer in answers[1:])
        measured = f"score {ours.score:.3f}; with thresholds moved by that -/+ {COSINE_ERROR} the model says {said}"
        return Row(name, answers == [ours.flagged, True, False], measured, "flagged and not flagged")

    @torch.no_grad()
    def _safety_classifier(self, name: str) -> Row:
        """The second stage against the softmax of the model's logits."""
        folder, ours = self._models.nsfw_classifier, self._verdict.classifier
        model = ViTForImageClassification.from_pretrained(folder, dtype=torch.float32).to(self._flux.device)
        inputs = ViTImageProcessorPil.from_pretrained(folder)(self._picture, return_tensors="pt")
        probabilities = model(inputs.pixel_values.to(model.device)).logits[0].float().softmax(dim=-1)  # [labels]
        (theirs,) = (probabilities[i].item() for i, label in model.config.id2label.items() if label.lower() == "nsfw")
        measured = f"probability {ours.score:.3f}; the model itself: {theirs:.3f}"
        return Row(name, abs(ours.score - theirs) <= PROBABILITY_ERROR, measured, f"{PROBABILITY_ERROR} apart")

    def _harmless(self, name: str) -> Row:
        stages = {"checker": self._verdict.checker, "classifier": self._verdict.classifier}
        flagging = [stage for stage, finding in stages.items() if finding.flagged]
        return Row(name, not self._verdict.flagged, f"flagged by {' and '.join(flagging) or 'none'}", "not by both")

    def _plan(self, name: str) -> Row:
        """Where the weights were put, and whether all of the above stayed within the planned memory."""
        placement, peak = self._flux.placement, self._memory.bytes().get("gpu")
        if peak is None:
            return Row(name, True, f"no GPU; {placement.precisions}")
        return Row(name, peak <= placement.gpu, f"{placement}; {peak / GB:.1f} GB were used", "no more than planned")


def _row(name: str, compare: Callable[[str], Row]) -> Row:
    """A comparison's row; its error makes the row wrong."""
    try:
        return compare(name)
    except NoReferenceError as error:
        return Row(name, False, f"There is no reference: {error}.", known=False)
    except ValueError as error:  # a sentence
        return Row(name, False, str(error))
    except Exception as error:
        print(faults.places(error))
        return Row(name, False, f"It failed with {_words(error)}; the lines above the table say where.")


def _words(error: Exception) -> str:
    return faults.message(error).splitlines()[0].rstrip(" .:")


def _ratio(difference: Tensor, whole: Tensor) -> float:
    """|difference| / |whole|; nan if either holds one."""
    return (difference.norm() / whole.norm()).item()


def _dtype(folder: Path) -> torch.dtype:
    with safe_open(min(folder.glob("*.safetensors")), framework="pt") as tensors:
        return tensors.get_tensor(next(iter(tensors.keys()))).dtype


def make_lora(path: Path, transformer: Path) -> LoraFile:
    """Write a random LoRA on every linear layer of the blocks of a transformer, in diffusers' names and bfloat16."""
    with torch.device("meta"):
        skeleton = FluxTransformer2DModel.from_config(FluxTransformer2DModel.load_config(transformer))
    generator = torch.Generator().manual_seed(SEED)
    tensors = {}
    for name, layer in skeleton.named_modules():
        if isinstance(layer, nn.Linear) and is_block_linear(name):
            down = torch.randn(RANK, layer.in_features, generator=generator) / layer.in_features**0.5
            up = torch.randn(layer.out_features, RANK, generator=generator) * UP
            tensors |= {
                f"transformer.{name}.lora_A.weight": down.bfloat16(),
                f"transformer.{name}.lora_B.weight": up.bfloat16(),
            }
    save_file(tensors, path)
    return LoraFile(path, hashlib.sha256(path.read_bytes()).hexdigest(), "made up")


def main() -> None:
    """Print the table; exit with 1 if a row is wrong or unknown, or with a sentence if there is no table."""
    parser = argparse.ArgumentParser(
        prog="script/check", description="Compare the product with plain diffusers and PEFT on this machine's weights."
    )
    parser.add_argument(
        "lora", nargs="?", help="a reference or a path of one that diffusers reads; a LoRA is made up unless given"
    )
    lora = parser.parse_args().lora
    if lora == "":
        parser.error("the LoRA's name is empty; leave it out, and one is made up")
    with suppress(OSError):  # too long for a path: a data URI
        if lora is not None and Path(lora).exists():
            lora = str(Path(lora).absolute())
    disable_progress_bar()  # of loading
    with command():
        device = drawing_device()
        try:
            rows = check(Settings.from_environment(cuda=device.type == "cuda"), device, lora)
        except ValueError:  # a sentence
            raise
        except Exception as error:
            print(faults.places(error))
            sys.exit(f"The check failed with {_words(error)}; the lines above say where.")
    wrong = sum(row.right is False for row in rows)
    print("", *rows, f"{wrong} of {len(rows)} rows are wrong or unknown.", sep="\n")
    sys.exit(int(wrong > 0))


if __name__ == "__main__":
    main()
