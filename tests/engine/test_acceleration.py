"""Compiled code computes the same, and is compiled once. Graphs are counted by torch's own counters."""

import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor, nn
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch._dynamo.utils import counters
from torch._inductor.utils import run_and_get_code

from engine.acceleration import (
    COMPILE,
    CUDNN,
    FLASH_3,
    NATIVE,
    best_attention,
    compile_models,
    compiler_settings,
    convolve_in_float32,
    convolves_bfloat16,
    keep_compiled_code,
)
from engine.fp8 import Fp8Linear
from flux import Flux
from request import Request
from service.measure import Stopwatch
from settings import Settings
from tests.support.models import write_models

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("image") / "noise.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (96, 64, 3), dtype=np.uint8)).save(path)
    return path


def random_request(rng: random.Random, folder: Path) -> Request:
    """Any mode, model, precision, size and length of prompt; one step, mostly of small pictures."""
    size: dict[str, object]
    if rng.random() < 0.02:
        size = {"aspect_ratio": rng.choice(["1:1", "16:9", "4:5", "9:21"]), "megapixels": "0.25"}
    else:
        picture = folder / "picture.png"
        Image.new("RGB", (rng.randint(1, 64), rng.randint(1, 64)), "grey").save(picture)
        size = {"image": picture, "prompt_strength": rng.random()}
        if rng.random() < 0.3:
            size |= {"mask": picture}
    return Request(
        prompt="fox " * rng.choice([0, 1, 5]),
        model=rng.choice(["dev", "schnell"]),
        go_fast=rng.random() < 0.5,
        num_inference_steps=1,
        guidance_scale=rng.uniform(0, 10),
        seed=rng.randrange(1000),
        **size,
    )


@pytest.mark.usefixtures("forgetful")
def test_after_set_up_no_request_compiles_anything(image: Path, tmp_path: Path) -> None:
    flux = Flux.load(Settings(models=write_models(tmp_path), cache_dir=tmp_path), CPU)
    fixed = Request(prompt="a red fox", image=image, num_inference_steps=2, seed=3)
    plain = flux.generate(fixed, (), Stopwatch(CPU)).images
    # Graphs, breaks and guards are the business of torch's front end; the back end that costs nothing shows them.
    tokens: list[int] = []
    for transformer in flux._transformers:
        transformer.register_forward_pre_hook(
            lambda _, __, inputs: tokens.append(inputs["hidden_states"].shape[1]), with_kwargs=True
        )
    flux.compile(backend="eager")
    graphs = counters["stats"]["unique_graphs"]
    # The usual size comes first, with each precision: 1024x1024 pixels are 64x64 patches.
    assert len(tokens) == 6
    assert (tokens[0], tokens[3]) == (4096, 4096)
    # Two kinds of blocks, two precisions, inputs that are views of another tensor and inputs that are not.
    assert 4 <= graphs <= 8
    rng = random.Random(1)
    for _ in range(100):
        flux.generate(random_request(rng, tmp_path), (), Stopwatch(CPU))
    assert counters["stats"]["unique_graphs"] == graphs
    assert not counters["graph_break"]
    # After all those mixes the compiled graphs read what the live weights hold now.
    assert np.array_equal(np.asarray(flux.generate(fixed, (), Stopwatch(CPU)).images[0]), np.asarray(plain[0]))


@pytest.mark.usefixtures("forgetful")
def test_every_transformer_may_have_its_graphs() -> None:
    """Five architectures in two precisions, by one class of block: more than the compiler allows by itself."""

    class Block(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            return x + self.layer(x)

    linears = [nn.Linear(width, width).requires_grad_(False) for width in range(16, 96, 16)]
    blocks = [Block(layer) for linear in linears for layer in (linear, Fp8Linear(linear))]

    def call_all() -> None:
        for block in blocks:
            for rows in (7, 20):
                block(torch.randn(1, rows, block.layer.bias.numel()))

    for block in blocks:
        block.compile(backend="eager", **COMPILE)
    with torch.no_grad(), compiler_settings(len(blocks)):
        call_all()
    assert counters["stats"]["unique_graphs"] == len(blocks)

    torch.compiler.reset()
    with torch.no_grad(), pytest.raises(FailOnRecompileLimitHit):
        call_all()
    assert torch._dynamo.config.recompile_limit == 8


@pytest.mark.usefixtures("forgetful")
@torch.no_grad()
def test_a_vae_compiled_for_a_square_serves_every_size(monkeypatch: pytest.MonkeyPatch) -> None:
    # As on a GPU, where the size of a convolution's input does not decide the kernel.
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    vae = AutoencoderKL(norm_num_groups=1, block_out_channels=(8,)).eval()
    compile_models((), vae, torch.device("cuda"), backend="eager")
    with compiler_settings(1):
        for height, width in ((64, 64), (32, 96), (96, 32)):
            latents = vae.encode(torch.zeros(1, 3, height, width)).latent_dist.mode()
            assert vae.decode(latents).sample.shape == (1, 3, height, width)
    assert counters["stats"]["unique_graphs"] == 2


@pytest.mark.parametrize(
    ("milliseconds", "chosen", "reason"),
    [
        ({CUDNN: 1.0, NATIVE: 1.2}, CUDNN, "saves more than 10%"),
        ({CUDNN: 1.0, NATIVE: 1.1, FLASH_3: 1.2}, NATIVE, "saves no more than 10%"),
        ({CUDNN: 1.0, NATIVE: 1.2, FLASH_3: 1.1}, FLASH_3, "saves no more than 10%"),
        ({CUDNN: 0.91, NATIVE: 1.0}, NATIVE, "saves no more than 10%"),
        ({CUDNN: 0.89, NATIVE: 1.0}, CUDNN, "saves more than 10%"),
        ({CUDNN: 1.0, NATIVE: 1.0}, NATIVE, "saves no more than 10%"),
        ({CUDNN: 1.2, NATIVE: 1.3, FLASH_3: 1.1}, FLASH_3, "the fastest"),
        ({CUDNN: 1.3, NATIVE: 1.0}, NATIVE, "the fastest"),
        ({NATIVE: 1.0}, NATIVE, "the only one"),
        ({}, NATIVE, "no other"),
    ],
)
def test_cudnn_is_taken_where_it_is_worth_its_plans(milliseconds: dict[str, float], chosen: str, reason: str) -> None:
    name, why = best_attention({name: value / 1e3 for name, value in milliseconds.items()})
    assert name == chosen
    assert reason in why


class Attention(nn.Module):
    """The code before an fp8 product in FLUX: a norm, a modulation, three layers with the same input."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(32, elementwise_affine=False)
        self.layers = nn.ModuleList(Fp8Linear(nn.Linear(32, 48).requires_grad_(False)) for _ in range(3))

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        x = self.norm(x) * (1 + scale)
        return torch.cat([layer(x) for layer in self.layers], dim=-1)  # [1, N, 144]


@pytest.mark.usefixtures("forgetful")
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # torch's own use
@torch.no_grad()
def test_quantisation_is_fused_and_weights_are_read_where_they_lie(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(variable, "")  # given back afterwards
    keep_compiled_code(tmp_path)
    torch.manual_seed(0)
    module = Attention()
    x, scale = torch.randn(1, 7, 32), torch.randn(32)
    compiled = torch.compile(module, fullgraph=True, dynamic=True)
    _, (code,) = run_and_get_code(compiled, x, scale)
    # One kernel: norm, modulation and quantisation for all three products; another puts their outputs together.
    assert len(re.findall(r"^ +cpp_fused\w*\(", code, re.MULTILINE)) == 2
    assert len(re.findall(r"^ +extern_kernels\._scaled_mm\(", code, re.MULTILINE)) == 3
    for weights in (torch.randn(48, 32), torch.randn(48, 32)):
        for layer in module.layers:
            layer.write_rows(0, weights)
        for rows in (7, 20):
            x = torch.randn(1, rows, 32)
            eager, fast = module(x, scale), compiled(x, scale)
            # The norm is summed in another order, and a number may then round to its other neighbour in fp8.
            assert (fast - eager).norm() / eager.norm() < 1e-2
    assert counters["stats"]["unique_graphs"] == 1
    assert any(tmp_path.rglob("*.so"))

    torch.compiler.reset()
    assert torch.equal(torch.compile(module, fullgraph=True, dynamic=True)(x, scale), fast)
    assert counters["inductor"]["fxgraph_cache_hit"] == 1


def test_a_vae_keeps_its_dtype_where_its_convolutions_do_not(tmp_path: Path) -> None:
    write_models(tmp_path)
    exact = AutoencoderKL.from_pretrained(tmp_path / "dev" / "vae").eval()
    vae = AutoencoderKL.from_pretrained(tmp_path / "dev" / "vae", torch_dtype=torch.bfloat16).eval()
    convolve_in_float32(vae)
    assert vae.decoder.conv_in.weight.dtype == (torch.bfloat16 if convolves_bfloat16() else torch.float32)
    torch.manual_seed(0)
    latents, pixels = torch.randn(1, 4, 4, 6).bfloat16(), torch.randn(1, 3, 32, 48).clamp(-1, 1).bfloat16()
    with torch.no_grad():
        for given, encode in ((latents, False), (pixels, True)):
            made, right = (
                model.encode(x).latent_dist.mode() if encode else model.decode(x).sample
                for model, x in ((vae, given), (exact, given.float()))
            )
            assert made.dtype == torch.bfloat16
            assert (made - right).norm() < 0.02 * right.norm()
