"""The fused kernel: in Triton's interpreter it comes to what torch comes to; it compiles for cards that are not here.

The interpreter multiplies numbers of 16 bits exactly where they are float16, not where they are bfloat16, and rounds to
bfloat16 and e4m3 in its own way. So sums are compared in float16 and float32; how a GPU rounds them is what
`merge.trusted` looks at when it starts on one.
"""

import json
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._ops import OpOverload

from engine import fp8, live, merge
from engine.live import Live, Term
from lora.deltas import LowRank, pack
from service.slabs import Uploads
from tests.support import kernels, models
from tests.support.kernels import needs_triton
from tests.support.operations import Operations

# Rows, columns, ranks, dtype of the factors, dtype of base and live weight.
SIZES = [(64, 256), (33, 80), (20, 44), (96, 513), (1, 16)]
RANKS = [(16,), (5, 16, 70), (), (4,), (1,), (64,), (100,), (16, 16), (32, 8), (8, 16, 8, 1, 2, 3, 4, 5), (64,) * 3]
CASES = [
    (*size, ranks, factor, base)
    for number, size in enumerate(SIZES)
    for ranks in (RANKS[:3] if number else RANKS)
    for factor, base in (("float16", "float16"), ("float16", "float32"), ("float32", "float32"))
]


def numbers(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    made = torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))
    return (made / shape[-1] ** 0.5).to(dtype)


def merged(case: tuple, count: int, *, scaled: bool = False, packed: bool = True) -> dict[str, object]:
    """How far so many weights, written together, are from exact sums; run where Triton interprets."""
    rows, columns, ranks, factor, dtype = case
    factor, dtype = getattr(torch, factor), getattr(torch, dtype)
    bases = [numbers(rows, columns, dtype=dtype, seed=seed) for seed in range(count)]
    ups = [numbers(rows, rank, dtype=factor, seed=seed) for seed in range(count) for rank in ranks]
    downs = [numbers(rank, columns, dtype=factor, seed=7 + seed) for seed in range(count) for rank in ranks]
    strengths = [0.75 * (-1) ** index * (1 + index) for index in range(len(ups))]
    lives = [torch.full_like(base, torch.nan) for base in bases]
    scales = [torch.full((rows, 1), torch.nan) if scaled else None for _ in bases]
    deltas = [LowRank(0, rows, up, down, 1.0) for up, down in zip(ups, downs, strict=True)]
    if packed:  # into one block
        deltas = [it for (it,) in pack({str(index): (delta,) for index, delta in enumerate(deltas)}).values()]
    terms = list(zip(strengths, deltas, strict=True))
    each = len(ranks)
    sums = [
        merge.Sum(live, scale, base, terms[index * each : (index + 1) * each])
        for index, (live, scale, base) in enumerate(zip(lives, scales, bases, strict=True))
    ]
    assert all(it.fits() for it in sums)
    merge.write(sums, Uploads(torch.device("cpu"), room=0))
    worst, other = 0.0, 0.0
    for index, (base, written) in enumerate(zip(bases, lives, strict=True)):
        exact = base.double()
        for term in range(index * len(ranks), (index + 1) * len(ranks)):
            exact += strengths[term] * (ups[term].double() @ downs[term].double())
        if scaled:
            scale = exact.abs().amax(dim=1, keepdim=True).clamp(min=fp8.SMALLEST) / fp8.LARGEST
            worst = max(worst, ((scales[index] - scale).abs() / scale).max().item())
            exact = exact / scale / fp8.LARGEST
            written = written / fp8.LARGEST
        worst = max(worst, (written.double() - exact).abs().max().item())
        other = max(other, written.ne(exact.to(written.dtype)).float().mean().item())
    return {"worst": worst, "other": other}


def in_live() -> dict[str, object]:
    """How far a live module that the kernel writes is from one that torch writes, over LoRAs of several kinds."""
    from tests.engine.test_live import Lives, bases, read_loras

    with tempfile.TemporaryDirectory() as folder:
        loras = read_loras(Path(folder))
    fused, plain = (Lives(bases(torch.float32)).plain for _ in range(2))
    fused._merged = frozenset([torch.float32])
    worst, intact = 0.0, True
    for mix in (
        (("everywhere", 0.7),),
        (("everywhere", 0.7), ("attention", -0.4), ("DoRA", 0.5)),
        (("LoKr", 1.0),),
        (),
    ):
        terms = [Term(name, scale, loras[name].transformer) for name, scale in mix]
        written = [it.hold(base, terms) for base in ("dev", "schnell") for it in (fused, plain)]
        assert written[0] == written[1]
        intact &= all(fused.intact(name) for name in fused.names)
        others = dict(plain.module.named_parameters())
        worst = max(worst, *((it - others[name]).abs().max().item() for name, it in fused.module.named_parameters()))
    name = "transformer_blocks.0.attn.to_q.weight"
    fused.module.get_parameter(name).data[3, 3] += 1
    return {"worst": worst, "intact": intact, "found": [it for it in fused.names if not fused.intact(it)], "of": name}


def of_a_base_that_lacks_it() -> bool:
    """Whether an fp8 layer is held at zero where a base lacks it; run where Triton interprets."""
    module = nn.Sequential(nn.Linear(32, 48, bias=False)).requires_grad_(False)
    held = Live(module, {"a": {"0.weight": numbers(48, 32)}, "b": {}}).quantized(lambda _: True)
    held._merged = frozenset([fp8.E4M3])
    for base in ("a", "b"):
        held.hold(base, [])
    return held.module[0].weight.float().eq(0).all().item() and held.intact("0.weight")


@pytest.fixture(scope="module")
def interpreted() -> Iterator[dict[str, object]]:
    """The output of the functions above in Triton's interpreter."""
    script = """if True:
        import json
        from tests.engine import test_merge as it
        found = {str(case): it.merged(case, 2, packed=number % 2) for number, case in enumerate(it.CASES)}
        found |= {f"scaled {case}": it.merged(case, 2, scaled=True) for case in it.CASES if case[4] == "float32"}
        print(json.dumps(found | {"live": it.in_live(), "lacking": it.of_a_base_that_lacks_it()}))
    """
    return json.loads(kernels.interpreted(script).splitlines()[-1])


@needs_triton
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_kernel_comes_to_what_torch_comes_to(interpreted: dict, case: tuple) -> None:
    found = interpreted[str(case)]
    if case[4] == "float16":  # sums of float32, rounded once: nearly all are what exact sums round to
        assert found["worst"] <= 2.0**-10 * 8
        assert found["other"] <= 1e-3 * len(case[2])
    else:
        assert found["worst"] <= 2e-6 * max(1, len(case[2]))
    if not case[2]:
        assert found["other"] == 0  # a copy


@needs_triton
@pytest.mark.parametrize("case", [case for case in CASES if case[4] == "float32"], ids=str)
def test_rows_are_divided_by_their_largest_magnitude(interpreted: dict, case: tuple) -> None:
    assert interpreted[f"scaled {case}"]["worst"] <= 2e-6 * max(1, len(case[2]))


@needs_triton
def test_live_weights_are_the_same_by_the_kernel(interpreted: dict) -> None:
    found = interpreted["live"]
    assert found["worst"] <= 2e-6
    assert found["intact"]
    assert found["found"] == [found["of"]]


@needs_triton
def test_what_a_base_lacks_is_zero(interpreted: dict) -> None:
    assert interpreted["lacking"]


def test_two_multiplications_round_as_a_division_does() -> None:
    """What the kernel does with each value, which the interpreter cannot: it rounds a product before it adds to it."""

    def fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        return (a.double() * b.double() + c.double()).float()

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 300, generator=generator) * 2.0 ** torch.randint(-20, 20, (4000, 1), generator=generator)
    scale = x.abs().amax(dim=1, keepdim=True) / fp8.LARGEST
    inverse = 1 / scale
    quotient = x * inverse
    assert not torch.equal(quotient, x / scale)
    assert torch.equal(fma(fma(-quotient, scale, x), inverse, quotient), x / scale)


# ---------------------------------------------------------------------------------------------------------------------
# Compiled for cards that are not here

# Bytes of shared memory that a program may have, by compute capability.
SHARED = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024}


def compiled(
    capability: int, dtype: torch.dtype, ranks: tuple[int, ...], factor: torch.dtype, folder: Path
) -> tuple[str, int, int]:
    """The kernel's PTX, its shared memory, and the bytes that each thread keeps outside registers."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from engine import merge_kernel

    scaled = dtype is fp8.E4M3
    chosen = merge_kernel.variant(torch.bfloat16, dtype, factor, ranks, [3072, 15360], scaled=scaled)
    options = {name: chosen.pop(name) for name in ("num_warps", "maxnreg") if name in chosen}
    places = {parameter.name: index for index, parameter in enumerate(merge_kernel.merge_kernel.params)}
    source = ASTSource(
        merge_kernel.merge_kernel,
        {name: "*i64" if name == "table" else "constexpr" for name in places},
        constexprs={(places[name],): value for name, value in chosen.items()},
        attrs={(places["table"],): [["tt.divisibility", 16]]},
    )
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return made.asm["ptx"], made.metadata.shared, kernels.resources(made.asm["cubin"], folder)["STACK"]


@needs_triton
@pytest.mark.parametrize("ranks", [(), (16,), (4,), (64,), (16, 16), (32, 32), (16,) * 4, (64, 64), (128,), (64,) * 8])
@pytest.mark.parametrize(
    ("capability", "dtype"),
    [(80, torch.bfloat16), (89, torch.bfloat16), (90, torch.bfloat16), (89, fp8.E4M3), (90, fp8.E4M3)],
)
def test_it_compiles_multiplies_on_tensor_cores_and_keeps_to_registers(
    capability: int, dtype: torch.dtype, ranks: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    ptx, shared, stack = compiled(capability, dtype, ranks, torch.bfloat16, tmp_path)
    assert bool(re.search(r"\bmma\.sync|wgmma", ptx)) == bool(ranks)
    assert "cp.async" in ptx
    assert ("e4m3x2" in ptx) == (dtype is fp8.E4M3)
    assert shared <= SHARED[capability]
    # In fp8 three programs on a processor, with a few values outside registers, are faster than two without.
    assert stack <= (0 if sum(ranks) <= (32 if dtype is fp8.E4M3 else 64) else 48)


@needs_triton
@pytest.mark.parametrize("capability", [89, 90])
@pytest.mark.parametrize("dtype", [torch.bfloat16, fp8.E4M3])
@pytest.mark.parametrize("ranks", [(16,), (64,), (32, 32), (16,) * 8])
def test_factors_in_float32_are_multiplied_in_float32(
    capability: int, dtype: torch.dtype, ranks: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    ptx, shared, _ = compiled(capability, dtype, ranks, torch.float32, tmp_path)
    assert "fma.rn" in ptx
    assert not re.search(r"\bmma\.sync|wgmma|tf32", ptx)
    assert shared <= SHARED[capability]


# ---------------------------------------------------------------------------------------------------------------------
# Counted, on tensors without memory


class Launches(Operations):
    """Operations that compute something on "meta", by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def before(self, operation: OpOverload) -> None:
        if not operation.is_view:
            self.names.append(operation._schema.name)


@pytest.mark.parametrize("quantized", [False, True])
def test_a_swap_takes_fewer_launches_than_tensors(quantized: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(live.BUFFER_ELEMENTS, "meta", 2**21)
    module = models.transformer().requires_grad_(False).to("meta", torch.bfloat16)
    held = Live(module, {"dev": {name: torch.empty_like(tensor) for name, tensor in module.named_parameters()}})
    if quantized:
        held = held.quantized(lambda name: "blocks." in name and "norm" not in name)
    held.hold("dev", [])
    weights = {n: p for n, p in module.named_parameters() if p.ndim == 2 and "blocks." in n and "norm" not in n}

    def lora(rank: int, dtype: torch.dtype) -> Term:
        pairs = {n: (torch.ones(len(p), rank), torch.ones(rank, p.shape[1])) for n, p in weights.items()}
        deltas = {n: (LowRank(0, len(up), up.to(dtype), down.to(dtype), 1.0),) for n, (up, down) in pairs.items()}
        return Term(f"{rank} {dtype}", 0.5, deltas)

    mixes = [[lora(4, torch.bfloat16)], [lora(4, torch.bfloat16), lora(8, torch.bfloat16)], [lora(4, torch.float64)]]
    mixes.append([lora(4, torch.float16), lora(8, torch.bfloat16)])  # become float32
    for mix in (*mixes, []):
        with Launches() as counted:
            written = held.hold("dev", mix)
        launched = [name for name in counted.names if name not in ("aten::empty.memory_format", "aten::_to_copy")]
        assert written == len(weights)
        assert launched.count("flux_sprites::merge") == 1
        assert not [name for name in launched if "mm" in name]


def test_a_merge_says_what_it_writes() -> None:
    """So that compiled code and tracers know; the operator's own checks of torch."""
    inputs = [[numbers(8, 16).to("meta")], [], [numbers(8, 16).to("meta")], [], [], [], torch.bfloat16]
    torch.library.opcheck(merge.merge, inputs, test_utils=("test_schema", "test_faketensor"))


def test_on_a_cpu_no_kernel_is_trusted() -> None:
    assert merge.trusted(torch.device("cpu")) == frozenset()
    assert merge.trusted(torch.device("meta")) == {torch.bfloat16, fp8.E4M3}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_a_gpu_the_kernel_agrees_with_torch(capsys: pytest.CaptureFixture[str]) -> None:
    device = torch.device("cuda")
    expected = {torch.bfloat16} | ({fp8.E4M3} if fp8.supported(device) else set())
    assert merge.trusted(device) == expected
    assert capsys.readouterr().out == ""
