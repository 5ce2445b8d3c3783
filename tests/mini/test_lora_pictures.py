"""With a LoRA in, the picture is the one that diffusers and PEFT draw, wherever they read the file right."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline
from torch import Tensor

from flux import Flux
from harness.loras import files
from request import LoraChoice, Request
from service.measure import Stopwatch
from settings import Settings
from tests.support import lora_files
from tests.support.lora_files import Change, Tensors
from tests.support.models import write_models

CPU = torch.device("cpu")
SIZE = {"width": 256, "height": 256}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pictures")


@pytest.fixture(scope="module")
def flux(folder: Path) -> Flux:
    return Flux.load(Settings(models=write_models(folder), cache_dir=folder / "cache"), CPU)


@pytest.fixture
def pipeline(folder: Path) -> FluxPipeline:
    pipeline = FluxPipeline.from_pretrained(folder / "dev")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def theirs(pipeline: FluxPipeline, loras: list[tuple[Path, float]]) -> Tensor:
    """[3, H, W] in [0, 1]."""
    for number, (file, _) in enumerate(loras):
        pipeline.load_lora_weights(file, adapter_name=f"lora{number}")
    if loras:
        pipeline.set_adapters([f"lora{number}" for number in range(len(loras))], [scale for _, scale in loras])
    return pipeline(
        "a red fox",
        num_inference_steps=1,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(11),
        max_sequence_length=pipeline.tokenizer_2.model_max_length,
        output_type="pt",
        **SIZE,
    ).images[0]


def ours(flux: Flux, loras: list[tuple[Path, float]]) -> Tensor:
    choices = tuple(LoraChoice(str(file), scale) for file, scale in loras)
    request = Request(
        prompt="a red fox",
        seed=11,
        num_inference_steps=1,
        guidance_scale=3.0,
        aspect_ratio="custom",
        loras=choices,
        **SIZE,
    )
    stopwatch = Stopwatch(CPU)
    return flux.draw(flux.prepare(request, files(request), stopwatch), request.seed, stopwatch, lambda: None)


# `linear1` is left out where diffusers knows its rows at FLUX.1's own width only.
FORMS: dict[str, tuple[Callable[[list[Change]], Tensors], Callable[[str], bool]]] = {
    "diffusers": (lora_files.EXACT["diffusers"], lambda bfl: True),
    "diffusers with alpha": (lora_files.EXACT["diffusers with alpha"], lambda bfl: True),
    "old diffusers": (lora_files.EXACT["old diffusers"], lambda bfl: True),
    "kohya": (lora_files.EXACT["kohya"], lambda bfl: lora_files.is_block(bfl) and "linear1" not in bfl),
    "ComfyUI": (lora_files.EXACT["ComfyUI"], lambda bfl: lora_files.is_block(bfl) and "linear1" not in bfl),
    "XLabs": (lora_files.xlabs, lora_files.is_xlabs),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_lora_draws_what_peft_draws(flux: Flux, pipeline: FluxPipeline, tmp_path: Path, form: str) -> None:
    write, only = FORMS[form]
    file = lora_files.write(tmp_path / "a.safetensors", write(lora_files.changes(pipeline.transformer, only=only)))
    assert_same_picture(flux, pipeline, [(file, 0.7)])


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")  # two adapters are meant
def test_two_loras_draw_what_peft_draws(flux: Flux, pipeline: FluxPipeline, tmp_path: Path) -> None:
    loras = []
    for seed, scale in ((1, 0.6), (2, -0.4)):
        made = lora_files.changes(pipeline.transformer, seed=seed, rank=seed * 3)
        file = lora_files.write(tmp_path / f"{seed}.safetensors", lora_files.EXACT["diffusers"](made))
        loras.append((file, scale))
    assert_same_picture(flux, pipeline, loras)


def test_alpha_in_the_header_draws_what_peft_draws(flux: Flux, pipeline: FluxPipeline, tmp_path: Path) -> None:
    made = lora_files.changes(pipeline.transformer, only=lora_files.is_block)
    tensors = lora_files.EXACT["diffusers"](made)
    header = lora_files.metadata(
        use_rslora=True,
        target_modules=sorted({name.split(".lora_")[0].removeprefix("transformer.") for name in tensors}),
    )
    assert_same_picture(flux, pipeline, [(lora_files.write(tmp_path / "a.safetensors", tensors, header), 0.7)])


def test_dora_draws_what_peft_draws(flux: Flux, pipeline: FluxPipeline, tmp_path: Path) -> None:
    """At scale 1: ours is fixed at strength 1 and then scaled, PEFT's is not."""
    made = lora_files.changes(pipeline.transformer, only=lora_files.is_block)
    tensors = lora_files.EXACT["diffusers"](made)
    weights = dict(pipeline.transformer.named_parameters())
    generator = torch.Generator().manual_seed(3)
    for change in made:
        for part in change.parts:
            norms = weights[f"{part}.weight"].norm(dim=1)
            magnitude = norms * (0.75 + 0.5 * torch.rand(norms.shape, generator=generator))
            tensors[f"transformer.{part}.lora_magnitude_vector"] = magnitude.detach()
    assert_same_picture(flux, pipeline, [(lora_files.write(tmp_path / "a.safetensors", tensors), 1.0)])


@pytest.mark.parametrize("form", ["diffusers", "kohya"])
def test_a_lora_of_the_text_encoder_draws_what_peft_draws(
    flux: Flux, pipeline: FluxPipeline, tmp_path: Path, form: str
) -> None:
    made = lora_files.changes(pipeline.transformer, only=lambda bfl: "img_attn" in bfl)
    tensors = lora_files.EXACT[form](made) | lora_files.CLIP[form](lora_files.clip_changes(pipeline.text_encoder))
    assert_same_picture(flux, pipeline, [(lora_files.write(tmp_path / "a.safetensors", tensors), 0.5)])


def assert_same_picture(flux: Flux, pipeline: FluxPipeline, loras: list[tuple[Path, float]]) -> None:
    drawn = ours(flux, loras)
    torch.testing.assert_close(drawn, theirs(pipeline, loras), rtol=0, atol=1e-4)
    assert (drawn - ours(flux, [])).abs().max() > 1e-2  # the LoRA does something
