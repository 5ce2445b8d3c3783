"""The contract: Cog's typed inputs become a Request, pictures become files. The only file that knows Cog's predictor.

Cog reads this file statically, without importing it: every default, bound and choice of `predict` is a literal, every
description is one string literal, and the position of a parameter is its x-order. `script/schema` reads it the same way.
"""
# ruff: noqa: B008, E501, UP045 (Cog's form: Input called in a default, a description in one literal, Optional[T])

import json
import math
import os
import shutil
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import fields, replace
from itertools import chain, repeat
from threading import Barrier
from typing import Any, Optional

# Read when the libraries are imported: what they say while loading tells an operator nothing; their errors are raised.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import torch
from cog import BasePredictor, Input, Path

import images
from flux import Drawing, Flux
from request import LoraChoice, LoraFile, Request, no_effect
from safety import SafetyChecker
from service import faults
from service.device_thread import DeviceThread
from service.leftovers import Leftovers
from service.machine import drawing_device
from service.measure import PeakMemory, Stopwatch
from service.occupancy import Occupancy
from settings import Settings
from sources.shown import redact_text
from sources.vocabulary import Vocabulary
from weights import Picture, WeightsCache, fetch, fetch_pictures, outlines, parse_picture

# Cog 0.23.1 would fetch `image` and `mask` before `predict`, from any address and for as long as the host likes. This
# makes it pass on what was sent, which is then fetched as LoRAs are.
Path.validate = staticmethod(lambda value: value)

# Clients see the logs of their predictions: warnings are shown without the paths of this machine.
warnings.formatwarning = lambda message, category, *_, **__: f"{category.__name__}: {message}\n"
# The most pictures that one request may have.
OUTPUTS = 4


class Predictor(BasePredictor):
    """FLUX.1 with LoRAs that change from one request to the next."""

    def setup(self, weights: Optional[str] = None) -> None:
        """Load the models; `weights` is COG_WEIGHTS, a path or a reference: the default main LoRA."""
        self.device_thread = DeviceThread()
        self.device_thread.run(self._load, weights)
        self.device_thread.watch(self.settings.prediction_seconds)

    def _load(self, weights: Optional[str]) -> None:
        device = drawing_device()
        self.settings = settings = Settings.from_environment(cuda=device.type == "cuda")
        print(settings)
        stopwatch = Stopwatch(device)
        with stopwatch("fetch"):
            # Before tens of gigabytes are fetched for a GPU that is too small.
            placement = Flux.plan(outlines(settings), device) if device.type == "cuda" else None
            models = fetch(settings)
        print(f"Models fetched in {stopwatch.seconds['fetch']:.1f} s.")
        self.flux = Flux.load(replace(settings, models=models), device, placement)
        self.safety = SafetyChecker.load(Path(models.safety_checker), Path(models.nsfw_classifier), device)
        self.vocabulary = Vocabulary.read(Path(models.dev), cuda=device.type == "cuda")
        self.cache, self.leftovers, self.occupancy = WeightsCache(settings), Leftovers(), Occupancy()
        self.default_lora = weights
        # Encoders release Python's lock. Start all threads now: if one failed to start during a request, that would wait
        # for it for ever.
        self.encoders = ThreadPoolExecutor(OUTPUTS)
        list(self.encoders.map(Barrier(OUTPUTS).wait, repeat(None, OUTPUTS)))
        for choice in self.cache.choices(weights, 1, own=True) if weights else ():
            with self.cache.open_choice(choice) as file:
                self.flux.lora_cache.read(file)  # a LoRA that cannot be used fails here, and not in the first request

    def predict(
        self,
        prompt: str = Input(
            description="Prompt for generated image. If you include the `trigger_word` used in the training process you are more likely to activate the trained object, style, or concept in the resulting image."
        ),
        image: Optional[Path] = Input(
            default=None,
            description="Input image for image to image or inpainting mode. If provided, aspect_ratio, width, and height inputs are ignored.",
        ),
        mask: Optional[Path] = Input(
            default=None,
            description="Image mask for image inpainting mode. If provided, aspect_ratio, width, and height inputs are ignored.",
        ),
        aspect_ratio: str = Input(
            default="1:1",
            description="Aspect ratio for the generated image. If custom is selected, uses height and width below & will run in bf16 mode",
            choices=["1:1", "16:9", "21:9", "3:2", "2:3", "4:5", "5:4", "3:4", "4:3", "9:16", "9:21", "custom"],
        ),
        height: Optional[int] = Input(
            default=None,
            description="Height of generated image. Only works if `aspect_ratio` is set to custom. Will be rounded to nearest multiple of 16. Incompatible with fast generation",
            ge=256,
            le=1440,
        ),
        width: Optional[int] = Input(
            default=None,
            description="Width of generated image. Only works if `aspect_ratio` is set to custom. Will be rounded to nearest multiple of 16. Incompatible with fast generation",
            ge=256,
            le=1440,
        ),
        prompt_strength: float = Input(
            default=0.8,
            description="Prompt strength when using img2img. 1.0 corresponds to full destruction of information in image",
            ge=0,
            le=1,
        ),
        model: str = Input(
            default="dev",
            description="Which model to run inference with. The dev model performs best with around 28 inference steps but the schnell model only needs 4 steps.",
            choices=["dev", "schnell"],
        ),
        num_outputs: int = Input(default=1, description="Number of outputs to generate", ge=1, le=4),
        num_inference_steps: int = Input(
            default=28,
            description="Number of denoising steps. More steps can give more detailed images, but take longer.",
            ge=1,
            le=50,
        ),
        guidance_scale: float = Input(
            default=3,
            description="Guidance scale for the diffusion process. Lower values can give more realistic images. Good values to try are 2, 2.5, 3 and 3.5",
            ge=0,
            le=10,
        ),
        seed: Optional[int] = Input(default=None, description="Random seed. Set for reproducible generation"),
        output_format: str = Input(
            default="webp", description="Format of the output images", choices=["webp", "jpg", "png"]
        ),
        output_quality: int = Input(
            default=80,
            description="Quality when saving the output images, from 0 to 100. 100 is best quality, 0 is lowest quality. Not relevant for .png outputs",
            ge=0,
            le=100,
        ),
        disable_safety_checker: bool = Input(default=False, description="Disable safety checker for generated images."),
        go_fast: bool = Input(
            default=False,
            description="Run faster predictions with model optimized for speed (currently fp8 quantized); disable to run in original bf16",
        ),
        megapixels: str = Input(
            default="1", description="Approximate number of megapixels for generated image", choices=["1", "0.25"]
        ),
        replicate_weights: Optional[str] = Input(
            default=None,
            description="Load LoRA weights. Supports Replicate models in the format <owner>/<username> or <owner>/<username>/<version>, HuggingFace URLs in the format huggingface.co/<owner>/<model-name>, CivitAI URLs in the format civitai.com/models/<id>[/<model-name>], or arbitrary .safetensors URLs from the Internet. For example, 'fofr/flux-pixar-cars'",
        ),
        lora_scale: float = Input(
            default=1,
            description="Determines how strongly the main LoRA should be applied. Sane results between 0 and 1 for base inference. For go_fast we apply a 1.5x multiplier to this value; we've generally seen good performance when scaling the base value by that amount. You may still need to experiment to find the best value for your particular lora.",
            ge=-1,
            le=3,
        ),
        extra_lora: Optional[str] = Input(
            default=None,
            description="Load LoRA weights. Supports Replicate models in the format <owner>/<username> or <owner>/<username>/<version>, HuggingFace URLs in the format huggingface.co/<owner>/<model-name>, CivitAI URLs in the format civitai.com/models/<id>[/<model-name>], or arbitrary .safetensors URLs from the Internet. For example, 'fofr/flux-pixar-cars'",
        ),
        extra_lora_scale: float = Input(
            default=1,
            description="Determines how strongly the extra LoRA should be applied. Sane results between 0 and 1 for base inference. For go_fast we apply a 1.5x multiplier to this value; we've generally seen good performance when scaling the base value by that amount. You may still need to experiment to find the best value for your particular lora.",
            ge=-1,
            le=3,
        ),
    ) -> list[Path]:
        """One file for each picture, in order of their seeds; errors are sentences for the sender of the request."""
        inputs = dict(locals())  # the parameters above by their names: no other variable is set yet
        with self.occupancy.shown():
            folder = self.leftovers.place()
            sent = {name: parse_picture(name, inputs[name]) for name in ("image", "mask") if inputs[name]}
            files = {name: folder / name if name in sent else None for name in ("image", "mask")}
            loras, unused = self._choose_loras(inputs)
            values = inputs | files | {"loras": loras}
            request = Request(**{field.name: values[field.name] for field in fields(Request)})
            print(f"Using seed: {request.seed}", *request.without_effect, *unused, sep="\n")
            return self.device_thread.run(self._attempt, request, sent, folder)

    def healthcheck(self) -> bool:
        """Cog calls this at each `GET /health-check`; it answers UNHEALTHY with the sentence of a RuntimeError."""
        self.device_thread.run_if_idle(self.flux.check)
        return True

    def _choose_loras(self, inputs: dict[str, Any]) -> tuple[tuple[LoraChoice, ...], list[str]]:
        """The LoRAs that the inputs name, and a sentence for each scale that is not at its default and has no LoRA."""
        loras, unused = [], []
        for name, scale_name, default in (
            ("replicate_weights", "lora_scale", self.default_lora),
            ("extra_lora", "extra_lora_scale", None),
        ):
            text, scale = inputs[name] or default, inputs[scale_name]
            named = self.cache.choices(text, scale, own=not inputs[name]) if text else []
            if not named and scale != 1:
                unused.append(no_effect(scale_name, scale, f"{name} names no LoRA"))
            loras += named
        return tuple(loras), unused

    def _attempt(self, request: Request, sent: dict[str, Picture], folder: Path) -> list[Path]:
        """Fetch and draw, on the device's thread; an unexpected error becomes a sentence, and its memory is freed."""
        stopwatch, memory = Stopwatch(self.flux.device), PeakMemory(self.flux.device)
        try:
            if sent:
                with stopwatch("fetch"), self.device_thread.watchdog.paused():
                    fetch_pictures(sent, folder, self.settings)
            return self._draw(request, stopwatch)
        except ValueError:  # a sentence about the input
            raise
        except Exception as error:
            print(redact_text(faults.places(error)))
            failure = faults.sentence(error, stopwatch.phase)
            self.flux.steps.give_back(error)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            self._record(stopwatch, memory)
        torch.cuda.empty_cache()  # only here, where the frames that failed are gone with all that they held
        raise RuntimeError(failure)

    def _draw(self, request: Request, stopwatch: Stopwatch) -> list[Path]:
        with closing(self._open(request)) as loras:
            drawing = self.flux.generate(request, loras, stopwatch)
        self._report(request, drawing)
        with stopwatch("safety"):
            kept = self._keep(request, drawing)
        with stopwatch("encode"):
            return self._write(request, drawing, kept)

    def _open(self, request: Request) -> Iterator[LoraFile]:
        """The file of each LoRA, fetched when it is asked for, and kept from eviction until the next one is."""
        until = time.monotonic() + (self.settings.prediction_seconds or math.inf)  # for hosts, not the device
        for choice in request.loras:
            with ExitStack() as stack:
                with self.device_thread.watchdog.paused():
                    file = stack.enter_context(self.cache.open_choice(choice, until, request.model))
                yield file

    def _report(self, request: Request, drawing: Drawing) -> None:
        """Record in the log and in the metrics how the pictures were drawn."""
        _tell_what_differs(request, drawing, self.vocabulary)
        self.record_metric("seed", request.seed)
        self.record_metric("seeds", list(request.seeds))
        self.record_metric("precision", "fp8" if drawing.fp8 else drawing.dtype)
        self.record_metric("loras", [applied.metric() for applied in drawing.loras])

    def _keep(self, request: Request, drawing: Drawing) -> list[int]:
        """The indices of the pictures that passed the safety check."""
        if request.disable_safety_checker:
            return list(range(request.num_outputs))
        verdicts = self.safety.check(drawing.images)
        dropped = [index for index, verdict in enumerate(verdicts) if verdict.flagged]
        self.record_metric("safety.dropped", dropped)
        self.record_metric("safety.scores", [verdict.metric() for verdict in verdicts])
        if len(dropped) == request.num_outputs:
            raise ValueError("NSFW content detected in every picture; try another prompt or another seed.")
        if dropped:
            print(f"NSFW content detected: dropped picture(s) {', '.join(map(str, dropped))} of {request.num_outputs}.")
        return [index for index in range(request.num_outputs) if index not in dropped]

    def _write(self, request: Request, drawing: Drawing, kept: list[int]) -> list[Path]:
        with self.leftovers.folder() as folder:

            def write(number: int, index: int) -> Path:
                file = Path(folder / f"output.{number}.{request.output_format}")
                metadata = _metadata(request, drawing, request.seeds[index])
                images.save(drawing.images[index], file, request.output_format, request.output_quality, metadata)
                return file

            return list(self.encoders.map(write, range(len(kept)), kept))

    def _record(self, stopwatch: Stopwatch, memory: PeakMemory) -> None:
        """Record what each phase took, in the log and in the metrics, also of a prediction that failed."""
        for phase, seconds in stopwatch.seconds.items():
            print(f"{phase}: {seconds:.2f} s")
            self.record_metric(f"timing.{phase}", round(seconds, 4))
        for place, size in memory.bytes().items():
            self.record_metric(f"peak_bytes.{place}", size)


def _tell_what_differs(request: Request, drawing: Drawing, vocabulary: Vocabulary) -> None:
    """Log what was drawn otherwise than the request says."""
    if request.prompt_strength == 0 and request.image is not None:
        return  # nothing was drawn
    if request.go_fast and not drawing.fp8:
        reason = "this device has no fp8 products" if request.fp8 else "aspect_ratio is custom"
        print(f"go_fast: drawn in {drawing.dtype}, since {reason}.")
    if drawing.fp8 and not request.fp8:
        print("Drawn in fp8, since this GPU has no room for bf16 weights.")
    if unknown := vocabulary.unknown(request.prompt, chain(*(it.file.trigger_words for it in drawing.loras))):
        print(unknown)


def _metadata(request: Request, drawing: Drawing, seed: int) -> dict[str, object]:
    """The inputs that draw one picture again, by the names that the contract has for them."""
    names = ["prompt", "model", "seed", "num_inference_steps", "guidance_scale", "go_fast"]
    if request.image is not None:
        names += ["prompt_strength"]
    elif request.aspect_ratio == "custom":
        names += ["aspect_ratio", "width", "height"]
    else:
        names += ["aspect_ratio", "megapixels"]
    # Also where there are none: the operator of the server that draws it again may have a default LoRA.
    loras = json.dumps([applied.entry() for applied in drawing.loras], ensure_ascii=False)
    drawn = {"seed": seed, "go_fast": drawing.fp8, "replicate_weights": loras}
    return {name: getattr(request, name) for name in names} | drawn
