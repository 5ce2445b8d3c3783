"""Every placement draws the same; only what is asked for is loaded, and nothing twice."""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file

from engine import loading, merge
from engine.architecture import skeletons
from engine.blocks import DoubleBlock, SingleBlock
from engine.loading import assemble, load
from engine.placement import Place, Placement, Precisions
from flux import Flux
from request import Request
from service.measure import Stopwatch
from settings import Models, Settings
from tests.support.models import write_models

CPU = torch.device("cpu")
BOTH = dict.fromkeys(("dev", "schnell"), Place.GPU)
HISTORY = (("dev", False), ("dev", True), ("dev", True), ("schnell", True), ("schnell", False), ("dev", False))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return write_models(tmp_path_factory.mktemp("models"))


def make_flux(
    models: Models,
    tmp_path: Path,
    *,
    bases: Mapping[str, Place] = BOTH,
    t5: Place = Place.GPU,
    precisions: Precisions = Precisions.BOTH,
) -> Flux:
    placement = Placement(bases, t5, precisions, gpu=0, host=0)
    return Flux.load(Settings(models=models, cache_dir=tmp_path), CPU, placement)


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("image") / "grey.png"
    Image.new("RGB", (48, 64), "grey").save(path)
    return path


def draw(flux: Flux, image: Path, model: str, go_fast: bool) -> tuple[bool, list]:
    request = Request(prompt="a red fox", image=image, model=model, go_fast=go_fast, num_inference_steps=2, seed=1)
    drawing = flux.generate(request, (), Stopwatch(CPU))
    return drawing.fp8, np.asarray(drawing.images[0]).tolist()


def test_weights_that_take_turns_in_the_same_memory_draw_as_side_by_side(
    models: Models, image: Path, tmp_path: Path
) -> None:
    both = make_flux(models, tmp_path, precisions=Precisions.BOTH)
    in_turn = make_flux(models, tmp_path, precisions=Precisions.IN_TURN, t5=Place.PINNED)
    for model, go_fast in HISTORY:
        assert draw(in_turn, image, model, go_fast) == draw(both, image, model, go_fast)


def test_bases_and_a_t5_that_stay_mapped_draw_as_on_the_device(models: Models, image: Path, tmp_path: Path) -> None:
    whole = make_flux(models, tmp_path)
    bases = {"dev": Place.PINNED, "schnell": Place.MAPPED}
    mapped = make_flux(models, tmp_path, bases=bases, t5=Place.MAPPED)
    for model, go_fast in HISTORY:
        assert draw(mapped, image, model, go_fast) == draw(whole, image, model, go_fast)
    files = mapped_files()
    t5 = mapped.components["text_encoder_2"]
    lying = [*mapped._live["schnell"]._bases["schnell"].values(), *t5.parameters()]
    assert [tensor.shape for tensor in lying if not in_file(tensor, files)] == []


def mapped_files() -> list[range]:
    """The address ranges of files of weights in this process's memory."""
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    return [range(*(int(end, 16) for end in line[0].split("-"))) for line in lines if line[-1].endswith(".safetensors")]


def in_file(tensor: torch.Tensor, files: list[range]) -> bool:
    return any(tensor.data_ptr() in file for file in files)


def test_a_precision_without_room_is_replaced_by_the_other(models: Models, image: Path, tmp_path: Path) -> None:
    both = make_flux(models, tmp_path, precisions=Precisions.BOTH)
    for precisions in (Precisions.FP8, Precisions.BF16):
        fp8 = precisions is Precisions.FP8
        alone = make_flux(models, tmp_path, precisions=precisions)
        for model, go_fast in HISTORY:
            assert draw(alone, image, model, go_fast) == draw(both, image, model, fp8)


def memory(module: torch.nn.Module) -> set[int]:
    tensors = [*module.parameters(), *module.buffers()]
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}


def test_in_turn_no_fp8_weight_has_memory_of_its_own(models: Models) -> None:
    folders = {"dev": Path(models.dev), "schnell": Path(models.schnell)}
    for precisions, shared in ((Precisions.IN_TURN, True), (Precisions.BOTH, False)):
        loaded = load(folders, CPU, Stopwatch(CPU), Placement(BOTH, Place.GPU, precisions, gpu=0, host=0))
        module, twin = loaded.live["dev"].module, loaded.live_fp8["dev"].module
        weights = [buffer for name, buffer in twin.named_buffers() if name.endswith("weight")]
        assert weights
        assert all((weight.untyped_storage().data_ptr() in memory(module)) == shared for weight in weights)


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="blocks are fused on a CUDA device")


@needs_cuda
@pytest.mark.parametrize("precisions", Precisions)
def test_on_a_gpu_all_blocks_are_fused(models: Models, precisions: Precisions) -> None:
    folders = {"dev": Path(models.dev), "schnell": Path(models.schnell)}
    placement = Placement(BOTH, Place.GPU, precisions, gpu=0, host=0)
    for live in load(folders, torch.device("cuda"), Stopwatch(CPU), placement).lives():
        assert {type(block) for block in live.module.transformer_blocks} == {DoubleBlock}
        assert {type(block) for block in live.module.single_transformer_blocks} == {SingleBlock}
        live.hold("dev", [])
        assert all(live.intact(name) for name in live.names)


@needs_cuda
def test_where_triton_cannot_make_kernels_no_block_is_fused(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merge, "trusted", lambda _: frozenset())
    folders = {"dev": Path(models.dev), "schnell": Path(models.schnell)}
    for live in load(folders, torch.device("cuda"), Stopwatch(CPU)).lives():
        assert not {DoubleBlock, SingleBlock} & {type(module) for module in live.module.modules()}


def test_what_lies_beside_a_gpu_lies_in_slabs_and_t5_stays_in_them_when_it_is_used(models: Models) -> None:
    dev = Path(models.dev)
    base = load_file(dev / "transformer" / "diffusion_pytorch_model.safetensors")
    words = load_file(dev / "text_encoder_2" / "model.safetensors")
    with ThreadPoolExecutor(4) as readers:
        moving = loading._move(base, Place.PINNED, torch.device("cuda"), readers)
        moving_words = loading._move(words, Place.PINNED, torch.device("cuda"), readers, torch.bfloat16)
    moved, moved_words = loading._arrived(moving), loading._arrived(moving_words)
    assert moved.keys() == base.keys()
    assert all(torch.equal(moved[name], tensor) for name, tensor in base.items())
    assert all(torch.equal(moved_words[name], tensor.bfloat16()) for name, tensor in words.items())
    for tensors in (moved, moved_words):
        assert len({tensor.untyped_storage().data_ptr() for tensor in tensors.values()}) == 1
    t5 = loading._t5(dev / "text_encoder_2", moved_words)
    loading.move_when_used(t5, CPU)
    assert t5(torch.tensor([[5, 3, 1]])).last_hidden_state.isfinite().all()
    assert memory(t5) == {tensor.untyped_storage().data_ptr() for tensor in moved_words.values()}


@pytest.mark.parametrize(
    ("part", "file", "name"),
    [
        ("transformer", "diffusion_pytorch_model", "proj_out.weight"),
        ("text_encoder_2", "model", "encoder.final_layer_norm.weight"),
    ],
)
def test_a_tensor_that_is_missing_is_named(tmp_path: Path, part: str, file: str, name: str) -> None:
    models = write_models(tmp_path)
    path = Path(models.dev) / part / f"{file}.safetensors"
    tensors = load_file(path)
    kept = {key: tensor.clone() for key, tensor in tensors.items() if key != name}
    del tensors
    save_file(kept, path)
    with pytest.raises(ValueError, match=name):
        Flux.load(Settings(models=models, cache_dir=tmp_path), CPU)


def test_models_made_in_memory_draw_like_those_read_from_folders(models: Models, image: Path, tmp_path: Path) -> None:
    parts = {name: DiffusionPipeline.from_pretrained(getattr(models, name)).components for name in ("dev", "schnell")}
    bases = {name: dict(it["transformer"].state_dict()) for name, it in parts.items()}
    configs = {name: dict(it["transformer"].config) for name, it in parts.items()}
    schedulers = {name: dict(it["scheduler"].config) for name, it in parts.items()}
    names = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    shared = {name: parts["dev"][name] for name in names}
    made = assemble(skeletons(configs, torch.float32), bases, shared, schedulers, Precisions.BOTH, CPU)
    flux, loaded = Flux(made, CPU), make_flux(models, tmp_path, precisions=Precisions.BOTH)
    for model, go_fast in HISTORY:
        assert draw(flux, image, model, go_fast) == draw(loaded, image, model, go_fast)
