"""The semantics of a request, on small real models in float32."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from cog import CancelationException
from diffusers import FluxPipeline
from PIL import Image, ImageDraw
from safetensors.torch import save_file
from torch import Tensor
from torch._ops import OpOverload

from flux import PROMPTS, Flux
from harness.loras import files
from pixels.masks import TRACE
from request import LoraChoice, Request
from service.measure import Stopwatch
from settings import Settings
from tests.support.models import POOLED, write_models
from tests.support.operations import Operations

CPU = torch.device("cpu")
SMALL = {"megapixels": "0.25", "num_inference_steps": 2, "seed": 11}
IMAGE_MODES = ("img2img", "inpaint")
MODES = ("txt2img", *IMAGE_MODES)


class Counted(Operations):
    """Counts what torch runs inside its block, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def before(self, operation: OpOverload) -> None:
        self.counts[operation.name()] += 1


def make_flux(folder: Path, **changes: object) -> Flux:
    settings = Settings(models=write_models(folder, **changes), cache_dir=folder / "cache")
    return Flux.load(settings, CPU)


@pytest.fixture(scope="session")
def small_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("small")


@pytest.fixture(scope="session")
def flux(small_folder: Path) -> Flux:
    return make_flux(small_folder)


@pytest.fixture(scope="session")
def coarse_flux(tmp_path_factory: pytest.TempPathFactory) -> Flux:
    """Its pipelines know multiples of 64 only."""
    return make_flux(tmp_path_factory.mktemp("coarse"), vae_factor=32)


@pytest.fixture(scope="session")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    ramp = np.linspace(0, 255, 144 * 112 * 3).reshape(112, 144, 3)
    Image.fromarray(ramp.astype(np.uint8)).save(path)
    return path


@pytest.fixture(scope="session")
def mask(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mask") / "mask.png"
    image = Image.new("L", (144, 112))
    image.paste(255, (32, 32, 96, 80))
    image.save(path)
    return path


@pytest.fixture
def inputs(photo: Path, mask: Path) -> dict[str, dict]:
    return {
        "txt2img": {"aspect_ratio": "custom", "width": 256, "height": 256},
        "img2img": {"image": photo},
        "inpaint": {"image": photo, "mask": mask},
    }


def generate(flux: Flux, **changes: object) -> list[Image.Image]:
    return flux.generate(Request(**{"prompt": "a red fox"} | SMALL | changes), (), Stopwatch(CPU)).images


def pixels(flux: Flux, **changes: object) -> Tensor:
    """[3, H, W] in [0, 1], before anything is rounded to bytes."""
    request = Request(**{"prompt": "a red fox"} | SMALL | changes)
    stopwatch = Stopwatch(CPU)
    return flux.draw(flux.prepare(request, (), stopwatch), request.seed, stopwatch, lambda: None)


def same(a: list[Image.Image], b: list[Image.Image]) -> bool:
    return len(a) == len(b) and all(np.array_equal(np.asarray(x), np.asarray(y)) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("go_fast", [False, True])
def test_each_picture_is_the_single_picture_of_its_seed(flux: Flux, inputs: dict, mode: str, go_fast: bool) -> None:
    together = generate(flux, **inputs[mode], num_outputs=3, go_fast=go_fast)
    apart = [generate(flux, **inputs[mode], seed=seed, go_fast=go_fast)[0] for seed in (11, 12, 13)]
    assert same(together, apart)
    assert not same(apart[:1], apart[1:2])


@pytest.mark.parametrize(
    ("size", "promised"),
    [
        ({"aspect_ratio": "21:9"}, (768, 320)),
        ({"aspect_ratio": "4:5"}, (448, 544)),
        ({"aspect_ratio": "custom", "width": 300, "height": 280}, (304, 288)),
        ({"aspect_ratio": "1:1", "megapixels": "1"}, (1024, 1024)),
    ],
)
def test_a_coarse_grid_still_gives_the_promised_size(coarse_flux: Flux, size: dict, promised: tuple[int, int]) -> None:
    assert generate(coarse_flux, **size, num_inference_steps=1)[0].size == promised


@pytest.mark.parametrize("mode", IMAGE_MODES)
def test_a_coarse_grid_keeps_the_size_of_the_image(coarse_flux: Flux, inputs: dict, mode: str) -> None:
    (drawn,) = generate(coarse_flux, **inputs[mode])
    assert drawn.size == (144, 112)


@pytest.mark.parametrize("model", ["dev", "schnell"])
def test_without_a_lora_it_draws_what_diffusers_draws(flux: Flux, small_folder: Path, model: str) -> None:
    reference = FluxPipeline.from_pretrained(small_folder / model)
    reference.set_progress_bar_config(disable=True)
    tokens = reference.tokenizer_2.model_max_length
    image = reference(
        "a red fox",
        width=256,
        height=256,
        num_inference_steps=2,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(11),
        max_sequence_length=tokens,
        output_type="pt",
    ).images[0]
    ours = pixels(flux, model=model, aspect_ratio="custom", width=256, height=256)
    assert torch.equal(ours, image)


def test_schnell_ignores_guidance_and_dev_does_not(flux: Flux) -> None:
    for model, ignores in (("schnell", True), ("dev", False)):
        assert (
            same(generate(flux, model=model, guidance_scale=1), generate(flux, model=model, guidance_scale=8))
            == ignores
        )


def test_the_prompt_matters(flux: Flux) -> None:
    assert not same(generate(flux), generate(flux, prompt="a blue bird"))


@pytest.mark.parametrize("prompt", ["", "a fox " * 2000])
def test_any_length_of_prompt_draws(flux: Flux, prompt: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert generate(flux, prompt=prompt, num_inference_steps=1)[0].size == (512, 512)
    assert ("dev reads the first" in capfd.readouterr().out) == bool(prompt)


@pytest.mark.parametrize("mode", IMAGE_MODES)
def test_no_strength_gives_back_the_resized_image(flux: Flux, inputs: dict, photo: Path, mode: str) -> None:
    images = generate(flux, **inputs[mode], prompt_strength=0, num_outputs=2)
    assert same(images, [Image.open(photo)] * 2)


@pytest.mark.parametrize("strength", [1e-9, 0.01, 0.3])
@pytest.mark.parametrize("steps", [1, 4, 49])
def test_a_little_strength_draws_at_least_one_step(flux: Flux, photo: Path, strength: float, steps: int) -> None:
    request = Request(prompt="a", image=photo, prompt_strength=strength, num_inference_steps=steps)
    stopwatch, drawn = Stopwatch(CPU), []
    flux.draw(flux.prepare(request, (), stopwatch), 0, stopwatch, lambda: drawn.append(1))
    assert len(drawn) == max(1, steps - int(steps - steps * strength))


def test_the_bar_counts_every_step_of_every_picture(flux: Flux, photo: Path, capfd: pytest.CaptureFixture[str]) -> None:
    generate(flux, image=photo, prompt_strength=0.5, num_inference_steps=8, num_outputs=2)
    bars = capfd.readouterr().err
    assert "8/8" in bars
    assert bars.lstrip("\r").startswith("  0%|")


def test_outside_the_mask_every_pixel_is_the_image_s_own(flux: Flux, inputs: dict, photo: Path, mask: Path) -> None:
    (drawn,) = generate(flux, **inputs["inpaint"])
    kept = np.asarray(Image.open(mask)) == 0
    before, after = np.asarray(Image.open(photo)), np.asarray(drawn)
    assert (before == after)[kept].all()
    assert (before != after)[~kept].mean() > 0.5


def test_pictures_of_any_size_keep_it_and_what_their_masks_keep(flux: Flux, tmp_path: Path) -> None:
    chance = np.random.default_rng(0)
    image, mask = tmp_path / "image.png", tmp_path / "mask.png"
    for soft in [False, True] * 6:
        width, height = chance.integers(17, 200, 2).tolist()
        before = chance.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(before).save(image)
        grey = Image.new("L", (width, height))
        ImageDraw.Draw(grey).line(chance.integers(0, 200, 6).tolist(), fill=255, width=int(chance.integers(1, 9)))
        grey.putpixel((width // 2, height // 2), 255)
        if soft:
            grey.paste(Image.linear_gradient("L").resize((width, height // 2)))
        grey.save(mask)
        (drawn,) = generate(flux, image=image, mask=mask, num_inference_steps=1, prompt_strength=1)
        kept, after = np.asarray(grey) <= TRACE, np.asarray(drawn)
        assert drawn.size == (width, height)
        assert (before == after)[kept].all()
        assert (before != after)[np.asarray(grey) == 255].mean() > 0.5


def test_fp8_products_really_run(flux: Flux, inputs: dict) -> None:
    for mode in MODES:
        with Counted() as operations:
            generate(flux, **inputs[mode] | {"aspect_ratio": "1:1"}, go_fast=True, num_inference_steps=1)
        # Linear layers of 2 double blocks (12 each) and 3 single blocks (5 each), all of fitting sizes.
        assert operations.counts["aten::_scaled_mm"] == 2 * 12 + 3 * 5


def test_custom_sizes_run_in_the_base_s_precision(flux: Flux) -> None:
    custom = {"aspect_ratio": "custom", "width": 256, "height": 256}
    assert same(generate(flux, **custom, go_fast=True), generate(flux, **custom))
    assert not same(generate(flux, go_fast=True), generate(flux))


def test_a_cancelled_drawing_leaves_no_trace(flux: Flux) -> None:
    before = generate(flux)
    request = Request(prompt="a blue bird", seed=1, megapixels="0.25")
    stopwatch, steps = Stopwatch(CPU), iter(range(3))

    def cancel_at_the_third() -> None:
        if next(steps) == 2:
            raise CancelationException

    job = flux.prepare(request, (), stopwatch)
    with pytest.raises(CancelationException):
        flux.draw(job, 1, stopwatch, cancel_at_the_third)
    assert same(generate(flux), before)


def test_a_prompt_is_encoded_once_and_not_kept(flux: Flux, photo: Path) -> None:
    encoded = []
    hook = flux.components["text_encoder_2"].register_forward_hook(lambda *_: encoded.append(1))
    try:
        for prompt in ("a grey heron", "a grey heron", "a white heron", "a grey heron"):
            flux.prepare(Request(prompt=prompt, image=photo), (), Stopwatch(CPU))
        assert len(encoded) == 2
        for number in range(PROMPTS):
            flux.prepare(Request(prompt=f"heron {number}", image=photo), (), Stopwatch(CPU))
        flux.prepare(Request(prompt="a grey heron", image=photo), (), Stopwatch(CPU))
        assert len(encoded) == 2 + PROMPTS + 1
        assert len(flux._embeddings) == PROMPTS
        assert "heron" not in repr(list(flux._embeddings))
    finally:
        hook.remove()


def test_embeddings_follow_the_lora_of_the_text_encoder(flux: Flux, photo: Path, tmp_path: Path) -> None:
    layer = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    tensors = {f"{layer}.lora_A.weight": torch.randn(2, POOLED), f"{layer}.lora_B.weight": torch.randn(POOLED, 2)}
    save_file(tensors, tmp_path / "clip.safetensors")

    def pooled(*scales: float) -> Tensor:
        loras = tuple(LoraChoice(str(tmp_path / "clip.safetensors"), scale) for scale in scales)
        request = Request(prompt="a grey heron", image=photo, loras=loras)
        return flux.prepare(request, files(request), Stopwatch(CPU)).embeddings["pooled_prompt_embeds"]

    without, half, whole = pooled(), pooled(0.5), pooled(1)
    assert not torch.equal(half, without)
    assert not torch.equal(whole, half)
    assert torch.equal(pooled(), without)
    assert torch.equal(pooled(1), whole)


def test_a_strength_of_the_text_encoder_is_its_own(flux: Flux, photo: Path, tmp_path: Path) -> None:
    words, name = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj", "transformer_blocks.0.attn.to_q"
    shapes = {words: (POOLED, POOLED), name: flux.lora_cache._models[0].get_parameter(f"{name}.weight").shape}
    tensors = {f"{layer}.lora_A.weight": torch.randn(2, shape[1]) for layer, shape in shapes.items()}
    tensors |= {f"{layer}.lora_B.weight": torch.randn(shape[0], 2) for layer, shape in shapes.items()}
    save_file(tensors, tmp_path / "both.safetensors")

    def held(scale: float, clip: float | None = None) -> tuple[Tensor, Tensor]:
        choice = LoraChoice(str(tmp_path / "both.safetensors"), scale, clip=clip)
        request = Request(prompt="a grey heron", image=photo, loras=(choice,))
        job = flux.prepare(request, files(request), Stopwatch(CPU))
        return job.pipeline.transformer.get_parameter(f"{name}.weight").clone(), job.embeddings["pooled_prompt_embeds"]

    drawn, read = held(0.8, clip=0.3)
    assert torch.equal(drawn, held(0.8)[0])
    assert torch.equal(read, held(0.3)[1])
    assert not torch.equal(read, held(0.8)[1])


@pytest.mark.parametrize("go_fast", [False, True])
def test_the_text_encoder_s_sum_has_no_order(flux: Flux, tmp_path: Path, go_fast: bool) -> None:
    words = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    for name in ("first", "other"):
        tensors = {f"{words}.lora_A.weight": torch.randn(2, POOLED), f"{words}.lora_B.weight": torch.randn(POOLED, 2)}
        save_file(tensors, tmp_path / f"{name}.safetensors")

    def pooled(*named: tuple[str, float, float | None]) -> Tensor:
        loras = tuple(
            LoraChoice(str(tmp_path / f"{name}.safetensors"), scale, clip=clip) for name, scale, clip in named
        )
        flux._embeddings.clear()  # so that they are made anew
        request = Request(prompt="a grey heron", go_fast=go_fast, loras=loras)
        return flux.prepare(request, files(request), Stopwatch(CPU)).embeddings["pooled_prompt_embeds"]

    expected = pooled(("first", 0.3, None), ("other", 0.7, 0.2))
    assert torch.equal(pooled(("other", 0, 0.2), ("first", 0.1, None), ("first", 0.2, None)), expected)
    assert torch.equal(
        pooled(("first", 5, 0.1), ("other", 0.1, None), ("other", 1, 0.1), ("first", 0.2, None)), expected
    )
    assert torch.equal(
        pooled(("first", 0.3, None), ("other", 0.2, None), ("first", -0.3, None)), pooled(("other", 0.2, 0.2))
    )
