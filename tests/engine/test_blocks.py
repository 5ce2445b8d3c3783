"""Fused blocks compute what diffusers' do, on the same live weights; their kernels compute what torch does."""

import copy
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor
from torch._dynamo.utils import counters

from engine import block_operators, fp8
from engine.acceleration import COMPILE, compiler_settings
from engine.architecture import is_block_linear
from engine.blocks import DoubleBlock, SingleBlock, fuse
from engine.live import Live, Term
from lora_loader import Lora, read_lora
from tests.support import kernels, lora_files, models
from tests.support.kernels import needs_triton

pytestmark = pytest.mark.usefixtures("forgetful")

# Tokens of text, tokens of the picture, pictures.
SIZES = ((5, 9, 1), (16, 64, 1), (3, 12, 2))
# Precision and dtype, and how far apart two ways to compute the same may be: a number that is computed a little
# otherwise may round to its other neighbour, which in fp8 is a sixteenth away.
KINDS = (
    ("plain", torch.float32, 1e-6),
    ("plain", torch.bfloat16, 0.01),
    ("fp8", torch.float32, 1e-6),
    ("fp8", torch.bfloat16, 0.03),
)


def make(precision: str, dtype: torch.dtype, **changes: object) -> FluxTransformer2DModel:
    """A random transformer, its biases and norms too."""
    made = models.transformer(**changes).requires_grad_(False)
    for name, parameter in made.named_parameters():
        if "attn.norm" in name or name.endswith("bias"):
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    weights = {name: parameter.clone() for name, parameter in made.named_parameters()}
    # Each parameter by itself: diffusers warns of `to`.
    for parameter in made.parameters():
        parameter.data = parameter.data.to(dtype)
    if precision == "fp8":
        for name, layer in fp8.replace_linears(made, is_block_linear).items():
            layer.write_rows(0, weights[f"{name}.weight"])
    return made


def inputs(size: tuple[int, int, int], dtype: torch.dtype) -> dict[str, Tensor]:
    """The transformer's arguments."""
    text, image, batch = size
    generator = torch.Generator().manual_seed(sum(size))

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    positions = torch.randint(0, 9, (image, 3), generator=generator).float()
    return {
        "hidden_states": random(batch, image, 16),
        "encoder_hidden_states": random(batch, text, models.TEXT),
        "pooled_projections": random(batch, models.POOLED),
        "timestep": torch.full((batch,), 0.7, dtype=dtype),
        "guidance": torch.full((batch,), 3.5, dtype=dtype),
        "img_ids": positions,
        "txt_ids": torch.zeros(text, 3),
    }


@torch.no_grad()
def distance(a: FluxTransformer2DModel, b: FluxTransformer2DModel, size: tuple[int, int, int]) -> float:
    """How far apart the results of two transformers are, relative to the second's."""
    given = inputs(size, b.x_embedder.weight.dtype)
    first, second = (it(**given).sample.float() for it in (a, b))
    return ((first - second).norm() / second.norm()).item()


def is_view(weights: list[Tensor], joined: Tensor) -> bool:
    """Whether the weights lie below each other in the joined one."""
    starts = [joined[row].data_ptr() for row in (0, len(weights[0]), len(weights[0]) + len(weights[1]))]
    return [weight.data_ptr() for weight in weights[:3]] == starts


@pytest.mark.parametrize(
    ("precision", "dtype", "apart", "compiled"),
    [
        *((*kind, False) for kind in KINDS),
        # The compiler's knowledge of dtypes is tested below.
        *((*kind, True) for kind in KINDS if kind[1] is torch.float32),
    ],
)
def test_fused_blocks_compute_what_diffusers_do(
    precision: str, dtype: torch.dtype, apart: float, compiled: bool
) -> None:
    plain, fused = make(precision, dtype), make(precision, dtype)
    names = list(fused.state_dict())
    fuse(fused)
    assert list(fused.state_dict()) == names
    assert [type(block) for block in fused.transformer_blocks] == [DoubleBlock] * 2
    assert [type(block) for block in fused.single_transformer_blocks] == [SingleBlock] * 3
    if compiled:
        fused.compile_repeated_blocks(backend="eager", **COMPILE)
    with compiler_settings(1):
        assert all(distance(fused, plain, size) < apart for size in SIZES)
    assert bool(counters["stats"]["unique_graphs"]) == compiled


@torch.no_grad()
def test_every_size_is_computed_by_the_same_graphs() -> None:
    transformers = [make(precision, torch.float32, num_layers=3) for precision in ("plain", "fp8")]
    for transformer in transformers:
        fuse(transformer)
        transformer.compile_repeated_blocks(backend="aot_eager", **COMPILE)
    graphs = []
    with compiler_settings(2):
        for size in ((5, 9, 1), (16, 64, 1), (7, 30, 1), (64, 16, 1), (12, 12, 1)):
            for transformer in transformers:
                transformer(**inputs(size, torch.float32))
            graphs.append(counters["stats"]["unique_graphs"])
    # Two kinds of blocks in two precisions; of tensors, and of views.
    assert 4 <= graphs[0] <= 8
    assert graphs[1:] == graphs[:1] * 4
    assert not counters["graph_break"]


def test_a_block_that_is_fp8_in_part_stays_as_it_is() -> None:
    made = make("plain", torch.float32)
    fuse(made)
    copied = copy.deepcopy(made)
    fp8.replace_linears(copied, "transformer_blocks.0.attn.to_q".__eq__)
    fuse(copied)
    assert [isinstance(block, DoubleBlock) for block in copied.transformer_blocks] == [False, True]


def test_what_fused_blocks_do_not_compute_is_refused() -> None:
    made = make("plain", torch.float32)
    fuse(made)
    with pytest.raises(ValueError, match="no IP adapter"):
        made(**inputs(SIZES[0], torch.float32), joint_attention_kwargs={"ip_hidden_states": []})


# ---------------------------------------------------------------------------------------------------------------------
# Live weights


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Lora:
    """A LoRA on every layer."""
    transformer, text_encoder = models.transformer(), models.text_encoder()
    tensors = lora_files.EXACT["kohya"](lora_files.changes(transformer, seed=1))
    file = lora_files.write(tmp_path_factory.mktemp("lora") / "lora.safetensors", tensors)
    return read_lora(file, transformer, text_encoder)


def bits(live: Live) -> dict[str, Tensor]:
    return {name: it.contiguous().view(torch.uint8).clone() for name, it in live.module.state_dict().items()}


@pytest.mark.parametrize("in_turn", [False, True])
def test_live_weights_land_in_fused_blocks(lora: Lora, in_turn: bool) -> None:
    base = {"dev": dict(make("plain", torch.bfloat16).state_dict())}
    modules = [make("plain", torch.bfloat16, seed=9) for _ in range(2)]
    fuse(modules[1])
    plain, fused = (Live(module, base) for module in modules)
    plain_fp8, fused_fp8 = (live.quantized(is_block_linear, in_turn=in_turn) for live in (plain, fused))
    fuse(fused_fp8.module)
    mix = [Term("a LoRA", 0.8, lora.transformer)]
    for terms in ([], mix, []):
        for one, other, apart in ((plain, fused, 0.01), (plain_fp8, fused_fp8, 0.03)):
            assert one.hold("dev", terms) == other.hold("dev", terms) > 0
            one_bits, other_bits = bits(one), bits(other)
            assert one_bits.keys() == other_bits.keys()
            assert all(torch.equal(one_bits[name], other_bits[name]) for name in one_bits)
            assert all(other.intact(name) for name in other.names)
            assert distance(other.module, one.module, SIZES[0]) < apart
    for module, is_joined in ((fused.module, True), (fused_fp8.module, not in_turn)):
        for block in module.single_transformer_blocks:
            attn = block.attn
            assert (block.joined is not None) == is_joined
            if is_joined:
                assert is_view([attn.to_q.weight, attn.to_k.weight, attn.to_v.weight], block.joined.weight)


def test_a_copy_of_a_fused_transformer_computes_by_itself() -> None:
    made = make("plain", torch.float32)
    fuse(made)
    copied = copy.deepcopy(made)
    assert distance(copied, made, SIZES[0]) < 1e-6
    before = made(**inputs(SIZES[0], torch.float32)).sample
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    assert torch.equal(made(**inputs(SIZES[0], torch.float32)).sample, before)
    assert copied(**inputs(SIZES[0], torch.float32)).sample.eq(0).all()


# ---------------------------------------------------------------------------------------------------------------------
# Kernels


def arguments(dtype: torch.dtype = torch.float32) -> dict[str, tuple]:
    """Arguments of each operator: views of larger tensors, several pictures, one stream or two."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    x, modulation = random(2, 5, 48)[:, 1:4], random(2, 6 * 48).chunk(6, dim=1)
    attention, hidden = random(2, 3, 24), random(2, 3, 48 + 96)[..., 48:]
    heads, size = 6, 8
    streams = {}
    for tokens in ((5,), (4, 7)):
        products = [it for n in tokens for it in random(2, n, 3 * heads * size + 16)[..., 16:].chunk(3, dim=2)]
        biases = [random(heads * size) for _ in products]
        norms = [random(size) for _ in range(2 * len(tokens))]
        angles = torch.randn(sum(tokens), size // 2, generator=generator).repeat_interleave(2, 1)
        streams[f"rotate_heads {len(tokens)}"] = (products, biases, norms, angles.cos(), angles.sin())
    return streams | {
        "norm_quantize": (x, modulation[1], modulation[2]),
        "gelu_quantize": (attention, hidden, random(96)),
        "gelu_quantize alone": (None, hidden, random(96)),
        "linear_gelu": (x, random(32, 48), random(32)),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", arguments())
@pytest.mark.filterwarnings("ignore")  # of torch's own check
def test_the_compiler_knows_what_an_operator_gives(name: str, dtype: torch.dtype) -> None:
    operator = getattr(block_operators, name.split()[0])
    torch.library.opcheck(operator, arguments(dtype)[name], test_utils=("test_schema", "test_faketensor"))


def interpret() -> None:
    """Compare each kernel in Triton's interpreter, launched as on a GPU, with torch."""
    block_operators.E4M3 = torch.float32  # the interpreter's own rounding to fp8 is not a GPU's
    for name, given in arguments().items():
        operator = name.split()[0]
        if operator == "linear_gelu":
            continue
        made = getattr(block_operators, f"_{operator}_on_cuda")(*given)
        right = getattr(block_operators, f"_{operator}")(*given)
        if operator.endswith("quantize"):
            # Before rounding: what was rounded lies within half a step of it.
            values, scale = right
            assert torch.allclose(made[1], scale, rtol=1e-6, atol=0), name
            assert made[0].abs().amax(-1).sub(fp8.LARGEST).abs().lt(1e-3).all(), name
            step = made[0].abs().clamp(min=2.0**-6).log2().floor().exp2() / 8
            assert ((values.float() - made[0]).abs() <= 0.5001 * step).all(), name
        else:
            for one, other in zip(made, right, strict=True):
                assert torch.allclose(one, other, rtol=1e-5, atol=1e-5), name


@needs_triton
def test_kernels_compute_what_torch_does() -> None:
    script = "from tests.engine.test_blocks import interpret; interpret()"
    kernels.interpreted(script)


BF16, FP8 = "*bf16", {"values": "*fp8e4nv", "scales": "*fp32"}
# FLUX's sizes.
KERNELS = {
    "rotate_heads": ({"cos": "*fp32", "sin": "*fp32"}, {"HEADS": 24, "CHUNK": 8, "D": 128}, "ROTATE_WARPS"),
    "norm_quantize": (FP8, {"SIZE": 1024}, "NORM_WARPS"),
    "gelu_quantize": (FP8, {"FIRST": 1024, "SIZE": 4096}, "GELU_WARPS"),
    "gelu_quantize alone": (FP8, {"FIRST": 0, "SIZE": 4096}, "GELU_WARPS"),
}


@needs_triton
@pytest.mark.parametrize("capability", [80, 89, 90])
@pytest.mark.parametrize("name", KERNELS)
def test_kernels_fit_each_gpu(name: str, capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    types, constants, warps = KERNELS[name]
    if types is FP8 and capability < 89:
        pytest.skip("fp8 begins with 8.9")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from engine import block_kernels

    kernel = getattr(block_kernels, name.split()[0])
    sizes = {"tokens", "offset", "total"}
    assert all(it.do_not_specialize for it in kernel.params if it.name in sizes)  # else new sizes would compile anew
    numbers = {*sizes, *(it for it in kernel.arg_names if it.endswith("stride"))}
    signature = {
        it: "constexpr" if it in constants else "i32" if it in numbers else types.get(it, BF16)
        for it in kernel.arg_names
    }
    # Alignment as torch allocates, and strides as in FLUX.
    aligned = {
        (n,): [["tt.divisibility", 16]]
        for n, (it, type_) in enumerate(signature.items())
        if type_.startswith("*") or it.endswith("stride")
    }
    compiled = triton.compile(
        ASTSource(kernel, signature, constants, aligned),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": getattr(block_operators, warps)},
    )
    assert compiled.metadata.shared <= 48 * 1024  # more has to be asked for
    assert "v4.b32" in compiled.asm["ptx"]  # memory is read 16 bytes at a time
    used = kernels.resources(compiled.asm["cubin"], tmp_path)
    assert (used["STACK"], used["LOCAL"]) == (0, 0)
    assert used["REG"] <= 128
