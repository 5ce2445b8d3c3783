"""Modulation that is looked up is what each step would compute."""

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torch._dynamo.utils import counters

from engine.acceleration import compile_models, compiler_settings
from engine.modulation import Modulation
from flux import Flux, Job, denoise
from harness.loras import files
from request import LoraChoice, Request
from service.measure import Stopwatch
from settings import Settings
from tests.support.models import HIDDEN, write_models

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Flux:
    folder = tmp_path_factory.mktemp("models")
    return Flux.load(Settings(models=write_models(folder), cache_dir=folder / "cache"), CPU)


def prepare(flux: Flux, **changes: object) -> Job:
    inputs = {"prompt": "a red fox", "megapixels": "0.25", "num_inference_steps": 4, "go_fast": False}
    request = Request(**inputs | changes)
    return flux.prepare(request, files(request), Stopwatch(CPU))


def latents(job: Job, *seeds: int, at_once: bool = True) -> list[Tensor]:
    transformer, scheduler = job.pipeline.transformer, job.pipeline.scheduler
    with Modulation(transformer).ahead(scheduler) if at_once else nullcontext():
        return [denoise(job, seed, lambda: None) for seed in seeds]


def error(ours: list[Tensor], theirs: list[Tensor]) -> float:
    return max(((a - b).norm() / b.norm()).item() for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("model", ["dev", "schnell"])
@pytest.mark.parametrize("mode", ["text", "image"])
def test_each_step_reads_what_it_would_compute(flux: Flux, tmp_path: Path, model: str, mode: str) -> None:
    changes: dict[str, object] = {"model": model, "go_fast": mode == "text"}
    if mode == "image":  # the first timesteps are skipped
        Image.new("RGB", (64, 48), "teal").save(tmp_path / "image.png")
        changes |= {"image": tmp_path / "image.png", "prompt_strength": 0.6}
    job = prepare(flux, **changes)
    # In fp8 a number may be rounded to its other neighbour.
    assert error(latents(job, 3, 4), latents(job, 3, 4, at_once=False)) < (1e-2 if job.fp8 else 1e-5)


def test_a_request_s_outputs_share_one_product_of_each_layer(flux: Flux) -> None:
    job = prepare(flux)
    rows: list[int] = []
    layer = job.pipeline.transformer.transformer_blocks[0].norm1.linear
    hook = layer.register_forward_hook(lambda _, inputs, __: rows.append(len(inputs[0])))
    try:
        latents(job, 3, 4)
        assert rows == [4]
    finally:
        hook.remove()


def test_after_a_swap_it_is_computed_anew_and_nothing_stays(flux: Flux, tmp_path: Path) -> None:
    layer = "transformer.transformer_blocks.0.norm1.linear"
    up, down = torch.randn(6 * HIDDEN, 2), torch.randn(2, HIDDEN)
    save_file({f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": up}, tmp_path / "norm.safetensors")
    before, names = latents(prepare(flux), 3), list(flux._transformers[0].state_dict())
    job = prepare(flux, loras=(LoraChoice(str(tmp_path / "norm.safetensors"), 1.0),))
    changed = latents(job, 3)
    assert error(changed, latents(job, 3, at_once=False)) < 1e-5
    assert error(changed, before) > 0.1
    assert torch.equal(latents(prepare(flux), 3)[0], before[0])
    assert list(flux._transformers[0].state_dict()) == names


@pytest.fixture
def compiled(tmp_path: Path) -> Iterator[Flux]:
    torch.compiler.reset()
    counters.clear()
    flux = Flux.load(Settings(models=write_models(tmp_path), cache_dir=tmp_path / "cache"), CPU)
    compile_models(flux._transformers, flux.components["vae"], CPU, backend="eager")
    yield flux
    torch.compiler.reset()
    counters.clear()


def test_compiled_blocks_stay_valid(compiled: Flux) -> None:
    modulation = Modulation(prepare(compiled).pipeline.transformer)
    made: list[int] = []
    with compiler_settings(4):
        for steps, prompt in ((2, "a fox"), (4, "a heron")):
            job = prepare(compiled, num_inference_steps=steps, prompt=prompt)
            plain = latents(job, 3, at_once=False)
            with modulation.ahead(job.pipeline.scheduler):
                assert error([denoise(job, 3, lambda: None)], plain) < 1e-5
            made.append(counters["stats"]["unique_graphs"])
    assert made[0] == made[1] > 0
