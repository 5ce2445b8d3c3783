"""The live weights are a function of the mix alone, whatever happened before."""

import ctypes
import functools
import hashlib
import random
import resource
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from types import FrameType

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from torch import Tensor, nn
from torch._ops import OpOverload

from engine import fp8, live
from engine.live import Live, Term
from lora import deltas
from lora.deltas import pack
from lora_loader import Lora, LoraCache, read_lora
from request import LoraFile
from tests.support import lora_files, models
from tests.support.lora_files import Tensors
from tests.support.lora_reader import same
from tests.support.operations import Operations, OutOfMemoryAt
from tests.support.processes import finished

SMALL = {"num_layers": 1, "num_single_layers": 1}


def bases(dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensors]:
    """Pristine weights of two models; one has no guidance embedder."""
    made = {"dev": models.transformer(seed=1, **SMALL), "schnell": models.transformer(seed=2, guidance=False, **SMALL)}
    return {
        name: {key: parameter.detach().to(dtype) for key, parameter in model.named_parameters()}
        for name, model in made.items()
    }


def is_block_linear(name: str) -> bool:
    return "transformer_blocks." in name and not name.endswith(("norm.linear", "norm1.linear", "norm1_context.linear"))


class Lives:
    """A live transformer in both precisions, over both bases; fp8 in memory of its own, or in turn with the other."""

    def __init__(self, bases: dict[str, Tensors], *, in_turn: bool = False) -> None:
        module = models.transformer(seed=3, **SMALL).requires_grad_(False).to(next(iter(bases["dev"].values())).dtype)
        self.plain = Live(module, bases)
        self.fp8 = self.plain.quantized(is_block_linear, in_turn=in_turn)

    def of(self, quantized: bool) -> Live:
        return self.fp8 if quantized else self.plain


def bits(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, as integers: NaN equals NaN, and 0 is not -0."""
    return {name: tensor.detach().clone().view(torch.uint8) for name, tensor in module.state_dict().items()}


@pytest.fixture(scope="module")
def loras(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Lora]:
    """LoRAs of several kinds, on some layers each."""
    return read_loras(tmp_path_factory.mktemp("loras"))


def read_loras(folder: Path) -> dict[str, Lora]:
    transformer, text_encoder = models.transformer(**SMALL), models.text_encoder()

    def changes(seed: int, *only: str) -> list[lora_files.Change]:
        return lora_files.changes(
            transformer, seed=seed, only=lambda bfl: not only or any(word in bfl for word in only)
        )

    generator = torch.Generator().manual_seed(6)
    magnitudes = {
        f"{lora_files.kohya_name(change.bfl)}.dora_scale": torch.rand(len(change.up), 1, generator=generator) + 0.5
        for change in changes(3, "linear1")
    }
    columns = {name: torch.rand(1, models.HIDDEN, generator=generator) + 0.5 for name in magnitudes}
    norm = {"single_blocks.0.norm.key_norm.scale": torch.rand(models.HEAD_SIZE, generator=generator)}
    files = {
        "everywhere": lora_files.EXACT["kohya"](changes(1)),
        "attention": lora_files.EXACT["diffusers"](changes(2, "img_attn.qkv", "linear2")),
        "DoRA": lora_files.EXACT["kohya"](changes(3, "linear1")) | magnitudes,
        "DoRA by column": lora_files.EXACT["kohya"](changes(8, "linear1")) | columns,
        "LoKr": lora_files.lokr(changes(4, "linear1", "img_mlp", "guidance_in")),
        "LoHa": lora_files.loha(changes(7, "img_attn", "linear1")),
        "difference and norm": lora_files.full(changes(5, "img_mlp.0", "img_in")) | norm,
    }
    return {
        name: read_lora(lora_files.write(folder / "a.safetensors", tensors), transformer, text_encoder)
        for name, tensors in files.items()
    }


Mix = tuple[str, bool, tuple[tuple[str, float], ...]]  # base, fp8, LoRAs with scales


def hold(lives: Lives, mix: Mix, loras: dict[str, Lora]) -> int:
    base, quantized, chosen = mix
    return lives.of(quantized).hold(base, [Term(name, scale, loras[name].transformer) for name, scale in chosen])


def fresh(mix: Mix, loras: dict[str, Lora]) -> Tensors:
    lives = Lives(bases())
    hold(lives, mix, loras)
    return bits(lives.of(mix[1]).module)


# ---------------------------------------------------------------------------------------------------------------------
# Tensors that are written


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_live_is_base_plus_deltas_rounded_once(loras: dict[str, Lora], dtype: torch.dtype) -> None:
    pristine = bases(dtype)
    lives = Lives(pristine)
    lora = loras["attention"]
    lives.plain.hold("dev", [Term("a", 0.8, lora.transformer), Term("b", -0.3, lora.transformer)])
    for name, parameter in lives.plain.module.named_parameters():
        exact = pristine["dev"][name].double()
        for scale in (0.8, -0.3):
            for delta in lora.transformer.get(name, ()):
                exact += scale * delta.strength * (delta.up.double() @ delta.down.double())
        # Half a unit in the last place of dtype, and what float32 sums may be off before that one rounding.
        step = torch.finfo(dtype).eps / 2
        assert ((parameter.double() - exact).abs() <= step * exact.abs() + 8 * 2.0**-24).all()


@pytest.mark.parametrize("quantized", [False, True])
def test_the_same_mix_writes_nothing(loras: dict[str, Lora], quantized: bool) -> None:
    lives = Lives(bases())
    mix = ("dev", quantized, (("everywhere", 0.7), ("LoKr", 0.4)))
    assert hold(lives, mix, loras) > 0
    assert hold(lives, mix, loras) == 0


@pytest.mark.parametrize("quantized", [False, True])
def test_another_scale_writes_the_layers_of_that_lora_alone(loras: dict[str, Lora], quantized: bool) -> None:
    lives = Lives(bases())
    hold(lives, ("dev", quantized, (("everywhere", 0.7), ("attention", 0.4))), loras)
    before = bits(lives.of(quantized).module)
    written = hold(lives, ("dev", quantized, (("everywhere", 0.7), ("attention", 0.5))), loras)
    after = bits(lives.of(quantized).module)
    assert written == len(loras["attention"].transformer)
    changed = {name.removesuffix("scale") for name in after if not torch.equal(before[name], after[name])}
    assert {name.removesuffix("weight") for name in changed} <= {
        name.removesuffix("weight") for name in loras["attention"].transformer
    }


def test_scale_0_leaves_no_trace(loras: dict[str, Lora]) -> None:
    lives = Lives(bases())
    hold(lives, ("dev", False, ()), loras)
    assert hold(lives, ("dev", False, (("everywhere", 0.0), ("DoRA", -0.0))), loras) == 0
    assert same(bits(lives.plain.module), fresh(("dev", False, ()), loras))


class Products(Operations):
    """Notes what torch may make of float32 products whenever one is taken."""

    def __init__(self) -> None:
        super().__init__()
        self.precisions: set[tuple[str, str]] = set()

    def before(self, operation: OpOverload) -> None:
        if "mm" in str(operation):
            matmuls = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
            self.precisions.add(tuple(matmul.fp32_precision for matmul in matmuls))


def test_sums_are_taken_in_float32_whatever_is_allowed(loras: dict[str, Lora]) -> None:
    lives = Lives(bases())
    terms = [Term(name, 0.5, lora.transformer) for name, lora in loras.items()]
    name = next(iter(loras["everywhere"].transformer))
    short = deltas.LowRank(0, 32, torch.zeros(32, 2), torch.zeros(2, 1), 1.0)  # fits no row
    try:
        torch.set_float32_matmul_precision("medium")
        for work in (lambda: lives.plain.hold("dev", terms), lambda: lives.plain.intact(name)):
            with Products() as products:
                assert work()
            assert products.precisions == {("ieee", "ieee")}
            assert torch.get_float32_matmul_precision() == "medium"
        with pytest.raises(RuntimeError, match="should match"):
            lives.plain.hold("dev", [Term("short", 1.0, {name: [short]})])
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_zeros_lie_beside_the_parameters_that_hold_them() -> None:
    module = models.transformer(**SMALL).to("meta")
    zeros = Live(module, {})._zeros
    assert {name: (zero.device, zero.shape) for name, zero in zeros.items()} == {
        name: (parameter.device, parameter.shape) for name, parameter in module.named_parameters()
    }
    assert {zero.untyped_storage().nbytes() for zero in zeros.values()} == {4}


def test_without_a_lora_every_bit_is_the_base_s(loras: dict[str, Lora]) -> None:
    pristine = bases()
    lives = Lives(pristine)
    for name, lora in loras.items():
        lives.plain.hold("dev", [Term(name, 1.0, lora.transformer)])
    lives.plain.hold("dev", [])
    for name, parameter in lives.plain.module.named_parameters():
        assert torch.equal(parameter, pristine["dev"][name])


def test_a_negative_scale_is_the_mirror_image(loras: dict[str, Lora]) -> None:
    lives = Lives(bases(torch.float32))
    held = {}
    for scale in (0.0, 1.0, -1.0):
        hold(lives, ("dev", False, (("everywhere", scale),)), loras)
        held[scale] = {name: parameter.clone() for name, parameter in lives.plain.module.named_parameters()}
    for name, base in held[0.0].items():
        torch.testing.assert_close(held[1.0][name] - base, base - held[-1.0][name], rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("quantized", [False, True])
def test_a_sum_has_no_order(loras: dict[str, Lora], quantized: bool, dtype: torch.dtype) -> None:
    lives, chance = Lives(bases(dtype)), random.Random(8)
    strengths = {name: Fraction(tenths, 10) for name, tenths in zip(loras, (7, -3, 11, 4, 9, -6, 5), strict=True)}
    hold(lives, ("dev", quantized, tuple((name, float(it)) for name, it in strengths.items())), loras)
    expected = bits(lives.of(quantized).module)
    for _ in range(12):
        parts = [part for name, whole in strengths.items() for part in split(name, whole, chance)]
        chance.shuffle(parts)
        hold(lives, ("schnell", quantized, ()), loras)  # so that everything is written
        hold(lives, ("dev", quantized, tuple(parts)), loras)
        assert same(bits(lives.of(quantized).module), expected)


def split(name: str, strength: Fraction, chance: random.Random) -> list[tuple[str, float]]:
    """One to three strengths that come to the same, as people write them."""
    parts = [Fraction(chance.randrange(-99, 100), 100) for _ in range(chance.randrange(3))]
    return [(name, float(part)) for part in (*parts, strength - sum(parts))]


def test_what_adds_up_to_nothing_leaves_no_trace(loras: dict[str, Lora]) -> None:
    terms = (("everywhere", 0.1), ("LoKr", 1.0), ("everywhere", 0.2), ("everywhere", -0.3))
    assert same(fresh(("dev", False, terms), loras), fresh(("dev", False, (("LoKr", 1.0),)), loras))


def test_some_parts_of_a_module_may_have_strengths_of_their_own(loras: dict[str, Lora]) -> None:
    lives, deltas = Lives(bases()), loras["everywhere"].transformer
    double, single = "transformer_blocks.0", "single_transformer_blocks.0"
    lives.plain.hold("dev", [Term("a", 0.5, deltas, {double: 0.2, single: 0})])
    parts = bits(lives.plain.module)
    for prefix, scale in ((double, 0.2), (single, 0), ("context_embedder", 0.5)):
        lives.plain.hold("dev", [Term("a", scale, deltas)])
        assert any(name.startswith(f"{prefix}.") for name in deltas)
        for name, expected in bits(lives.plain.module).items():
            assert not name.startswith(f"{prefix}.") or torch.equal(parts[name], expected)
    # Parts are added up as the rest is, also where only one of two terms has them.
    lives.plain.hold("dev", [Term("a", 0.4, deltas), Term("a", 0.1, deltas, {double: -0.2, single: -0.4})])
    assert same(bits(lives.plain.module), parts)


def test_a_base_without_guidance_leaves_its_embedder_at_zero(loras: dict[str, Lora]) -> None:
    lives = Lives(bases())
    hold(lives, ("dev", False, (("everywhere", 1.0),)), loras)
    hold(lives, ("schnell", False, (("everywhere", 1.0), ("LoKr", 1.0))), loras)
    embedder = {name: p for name, p in lives.plain.module.named_parameters() if "guidance_embedder" in name}
    assert len(embedder) == 4
    assert all(parameter.eq(0).all() for parameter in embedder.values())
    names = loras["everywhere"].transformer
    assert set(lives.plain.lacking("schnell", names)) == {name for name in names if "guidance_embedder" in name}
    assert lives.plain.lacking("dev", names) == ()


def test_a_zero_guidance_embedder_computes_what_none_computes() -> None:
    pristine = bases(torch.float32)
    lives = Lives(pristine)
    lives.plain.hold("schnell", [])
    own = models.transformer(seed=2, guidance=False, **SMALL)
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "hidden_states": torch.randn(1, 6, 16, generator=generator),
        "encoder_hidden_states": torch.randn(1, 5, models.TEXT, generator=generator),
        "pooled_projections": torch.randn(1, models.POOLED, generator=generator),
        "timestep": torch.tensor([0.7]),
        "img_ids": torch.zeros(6, 3),
        "txt_ids": torch.zeros(5, 3),
    }
    with torch.no_grad():
        ours = lives.plain.module(**inputs, guidance=torch.tensor([3.5])).sample
        assert torch.equal(ours, own(**inputs).sample)


def test_live_tensors_never_move(loras: dict[str, Lora]) -> None:
    lives = Lives(bases())
    places = [
        tensor.data_ptr() for quantized in (False, True) for tensor in lives.of(quantized).module.state_dict().values()
    ]
    for quantized in (False, True):
        for name in loras:
            hold(lives, ("dev", quantized, ((name, 1.0),)), loras)
            hold(lives, ("schnell", quantized, ((name, 0.5),)), loras)
    assert places == [
        tensor.data_ptr() for quantized in (False, True) for tensor in lives.of(quantized).module.state_dict().values()
    ]


# ---------------------------------------------------------------------------------------------------------------------
# fp8


@pytest.mark.parametrize("scale", [1.5, -0.4])
def test_merged_fp8_weights_are_off_by_fp8_s_own_rounding_and_no_more(loras: dict[str, Lora], scale: float) -> None:
    widened = {model: {name: tensor.float() for name, tensor in base.items()} for model, base in bases().items()}
    exact, lives = Lives(widened), Lives(bases())
    for each, quantized in ((exact, False), (lives, True)):
        hold(each, ("dev", quantized, (("everywhere", scale), ("DoRA", scale))), loras)
    sums = dict(exact.plain.module.named_parameters())
    layers = {name: layer for name, layer in lives.fp8.module.named_modules() if isinstance(layer, fp8.Fp8Linear)}
    assert len(layers) == 12 + 5
    for name, layer in layers.items():
        merged = sums[f"{name}.weight"]
        values, row_scale = fp8.quantize_rows(merged)
        assert torch.equal(layer.weight.view(torch.uint8), values.view(torch.uint8))
        assert torch.equal(layer.scale, row_scale)
        error = (layer.weight.float() * layer.scale - merged).abs()
        assert (error <= torch.maximum(2.0**-4 * merged.abs(), layer.scale * 2.0**-10)).all()


@pytest.mark.parametrize("quantized", [False, True])
def test_one_flipped_bit_of_any_tensor_is_found_and_written_anew(loras: dict[str, Lora], quantized: bool) -> None:
    mix = ("dev", quantized, (("everywhere", 0.7), ("DoRA", -0.4), ("LoKr", 1.0)))
    lives = Lives(bases())
    hold(lives, mix, loras)
    live, right = lives.of(quantized), fresh(mix, loras)
    assert all(live.intact(name) for name in live.names)
    for name in live.names:
        bits_of = live.module.state_dict()[name].view(torch.uint8).view(-1)
        bits_of[len(bits_of) // 2] ^= 1
        assert [other for other in live.names if not live.intact(other)] == [name]
        assert all(live.intact(other) for other in live.names)  # nothing is claimed of it any more
    assert hold(lives, mix, loras) == len(live.names)
    assert same(bits(live.module), right)


def rows_change_places(pristine: dict[str, Tensors], live: Live, name: str) -> None:
    rows = live.module.state_dict()[name].view(torch.uint8)
    rows[[2, 3]] = rows[[3, 2]]


def base_is_corrupted(pristine: dict[str, Tensors], live: Live, name: str) -> None:
    pristine["dev"][name][3, 3] += 1


def another_mix_was_written(pristine: dict[str, Tensors], live: Live, name: str) -> None:
    tensor = live._tensors[name]
    mix, recipe = tensor.held, tensor.recipe
    live.hold("dev", [])
    tensor.held, tensor.recipe = mix, recipe


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("spoil", [rows_change_places, base_is_corrupted, another_mix_was_written])
def test_a_weight_that_is_not_what_it_is_recorded_to_be_is_found(
    loras: dict[str, Lora], quantized: bool, spoil: Callable[..., None]
) -> None:
    pristine = bases()
    lives = Lives(pristine)
    hold(lives, ("dev", quantized, (("everywhere", 0.7), ("LoKr", 1.0))), loras)
    live, name = lives.of(quantized), "transformer_blocks.0.attn.to_q.weight"
    assert live.intact(name)
    spoil(pristine, live, name)
    assert [other for other in live.names if not live.intact(other)] == [name]


def test_the_fp8_twin_shares_all_but_its_linear_layers() -> None:
    lives = Lives(bases())
    shared = {id(parameter) for parameter in lives.plain.module.parameters()}
    assert all(id(parameter) in shared for parameter in lives.fp8.module.parameters())
    bytes_own = sum(buffer.nbytes for buffer in lives.fp8.module.buffers())
    assert 0 < bytes_own < sum(parameter.nbytes for parameter in lives.plain.module.parameters())


# ---------------------------------------------------------------------------------------------------------------------
# Interruptions


class Interrupted(BaseException):
    """The error that a cancellation raises at any point of the program."""


@contextmanager
def interrupted_at(line: int) -> Iterator[None]:
    """Raise at the so-manieth line that runs in the modules which write."""
    files = {module.__file__ for module in (live, deltas, fp8)}
    left = line

    def on_line(frame: FrameType, event: str, _: object) -> Callable | None:
        nonlocal left
        if event == "line":
            left -= 1
            if left < 0:
                raise Interrupted
        return on_line

    before = sys.gettrace()
    sys.settrace(lambda frame, event, _: on_line if frame.f_code.co_filename in files else None)
    try:
        yield
    except Interrupted:
        pass
    finally:
        sys.settrace(before)


NAMES = ["everywhere", "attention", "DoRA", "LoKr", "difference and norm"]
MIXES = st.tuples(
    st.sampled_from(["dev", "schnell"]),
    st.booleans(),
    st.lists(st.tuples(st.sampled_from(NAMES), st.sampled_from([1.0, 0.5, 0.0, -1.0])), max_size=2).map(tuple),
)


def test_any_history_gives_the_bits_of_a_fresh_process(loras: dict[str, Lora]) -> None:
    pristine = bases()
    untouched = {name: {key: tensor.clone() for key, tensor in base.items()} for name, base in pristine.items()}
    expected = functools.cache(lambda mix: fresh(mix, loras))

    class History(RuleBasedStateMachine):
        @initialize(in_turn=st.booleans())
        def start(self, in_turn: bool) -> None:
            self.lives = Lives(pristine, in_turn=in_turn)
            self.mix: Mix | None = None  # what is held, unless the last request failed
            self.last: Mix = ("dev", False, ())  # what was held last

        @rule(mix=MIXES)
        def request(self, mix: Mix) -> None:
            hold(self.lives, mix, loras)
            self.mix = self.last = mix

        @rule()
        def request_the_last_again(self) -> None:
            self.request(self.last)

        @rule(mix=MIXES, line=st.integers(0, 3000))
        def cancelled(self, mix: Mix, line: int) -> None:
            self.mix = None
            with interrupted_at(line):
                self.request(mix)

        @rule(mix=MIXES, operation=st.integers(0, 400))
        def out_of_memory(self, mix: Mix, operation: int) -> None:
            self.mix = None
            try:
                with OutOfMemoryAt(operation):
                    self.request(mix)
            except torch.OutOfMemoryError:
                pass

        @rule(mix=MIXES, broken=st.sampled_from(NAMES))
        def failing_delta(self, mix: Mix, broken: str) -> None:
            """A LoRA that fails when its turn comes, as a file would that is cut off while it is read."""
            self.mix = None
            base, quantized, chosen = mix
            bad = {name: (_Failing(0, 1),) for name in loras[broken].transformer}
            terms = [Term(name, scale, loras[name].transformer) for name, scale in chosen]
            with pytest.raises(OSError, match="cut off"):
                self.lives.of(quantized).hold(base, [*terms, Term("bad", 1.0, bad)])

        @invariant()
        def bits_are_those_of_a_fresh_process(self) -> None:
            if getattr(self, "mix", None) is not None:
                assert same(bits(self.lives.of(self.mix[1]).module), expected(self.mix))

    run_state_machine_as_test(
        History,
        settings=settings(
            max_examples=60, stateful_step_count=12, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
    assert all(same(base, untouched[name]) for name, base in pristine.items())


@dataclass(frozen=True)
class _Failing(deltas.Delta):
    def _bind(self, base: Tensor, pristine: Tensors, bring: deltas.Bring) -> deltas.AddRows:
        def add_rows(buffer: Tensor, first: int, scale: float) -> None:
            buffer.fill_(float("nan"))
            raise OSError("the file is cut off")

        return add_rows


def test_an_asynchronous_exception_at_any_moment_is_repaired(loras: dict[str, Lora]) -> None:
    """Raised from another thread, as a server cancels: between any two instructions, not between lines only."""
    lives = Lives(bases())
    target = threading.get_ident()
    for quantized in (False, True):
        mix, other = (("dev", quantized, ((name, 1.0), ("LoKr", 0.5))) for name in ("everywhere", "DoRA"))
        expected = fresh(mix, loras)
        hold(lives, other, loras)
        start = time.perf_counter()
        hold(lives, mix, loras)
        seconds = time.perf_counter() - start
        for attempt in range(40):

            def cancel(delay: float = seconds * attempt / 40) -> None:
                time.sleep(delay)
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(target), ctypes.py_object(Interrupted))

            thread = threading.Thread(target=cancel)
            with pytest.raises(Interrupted):  # noqa: PT012
                thread.start()
                hold(lives, other, loras)
                thread.join()
                time.sleep(0.01)  # an exception that came late is raised here at the latest
            thread.join()
            hold(lives, mix, loras)
            assert same(bits(lives.of(quantized).module), expected)


# ---------------------------------------------------------------------------------------------------------------------
# Uploads: "meta" is a device of its own, to which all host memory has to be brought


class UploadsTo(Operations):
    """Notes the bytes of each copy from host memory to another device, and where they went."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.nbytes: list[int] = []
        self.brought: list[weakref.ref[torch.UntypedStorage]] = []
        self._device = device

    def after(self, operation: OpOverload, inputs: Sequence[object], result: object) -> None:
        sources = [it for it in inputs if isinstance(it, Tensor) and it.device.type == "cpu"]
        if sources and isinstance(result, Tensor) and result.device.type == self._device:
            self.nbytes.append(sources[0].nbytes)
            self.brought.append(weakref.ref(result.untyped_storage()))


@pytest.fixture(scope="module")
def on_all_block_linears(tmp_path_factory: pytest.TempPathFactory) -> list[Lora]:
    """LoRAs on all that fp8 may multiply."""
    transformer, folder = models.transformer(), tmp_path_factory.mktemp("all")
    made = []
    for seed in (1, 2):
        changes = lora_files.changes(transformer, seed=seed, only=lambda bfl: "_blocks." in bfl and "mod" not in bfl)
        file = lora_files.write(folder / "a.safetensors", lora_files.EXACT["kohya"](changes))
        made.append(read_lora(file, transformer, models.text_encoder()))
    return made


@pytest.fixture
def far(monkeypatch: pytest.MonkeyPatch) -> Live:
    """A live transformer on another device than its LoRAs, with its base."""
    monkeypatch.setitem(live.BUFFER_ELEMENTS, "meta", 2**21)
    module = models.transformer().requires_grad_(False).to("meta")
    return Live(module, {"dev": {name: torch.empty_like(tensor) for name, tensor in module.named_parameters()}})


@pytest.mark.parametrize("quantized", [False, True])
def test_each_lora_of_a_mix_is_brought_in_one_upload(
    far: Live, on_all_block_linears: list[Lora], quantized: bool
) -> None:
    used = far.quantized(is_block_linear) if quantized else far
    used.hold("dev", [])
    a, b = (Term(str(number), 0.5, lora.transformer) for number, lora in enumerate(on_all_block_linears))
    touched = [name for name in far.names if is_block_linear(name.removesuffix(".weight")) and name in a.deltas]
    assert len(touched) == len(a.deltas) == 2 * 12 + 3 * 5
    sizes = [lora.nbytes for lora in on_all_block_linears]
    for terms, expected in (([a], sizes[:1]), ([a, b], sizes[1:]), ([a, b], None), ([], []), ([b], []), ([a], [])):
        with UploadsTo("meta") as uploads:
            written = used.hold("dev", terms)
        assert uploads.nbytes == (expected or [])
        assert written == (0 if expected is None else len(touched))


def test_a_health_check_brings_the_factors_of_one_tensor_alone(far: Live, on_all_block_linears: list[Lora]) -> None:
    """From the host's memory, whatever lies on the device: that may be what is wrong."""
    term = Term("a", 0.5, on_all_block_linears[0].transformer)
    far.hold("dev", [term])
    name = "transformer_blocks.0.attn.to_q.weight"
    uploads = UploadsTo("meta")
    # Numbers on "meta" have no values to compare.
    with uploads, pytest.raises(RuntimeError, match="Meta tensors"):
        far.intact(name)
    assert uploads.nbytes == [tensor.nbytes for tensor in term.deltas[name][0].tensors()]


@pytest.mark.parametrize("in_turn", [False, True])
def test_of_an_interrupted_swap_what_was_written_is_known_and_nothing_more_stays(
    far: Live, on_all_block_linears: list[Lora], monkeypatch: pytest.MonkeyPatch, in_turn: bool
) -> None:
    used = far.quantized(is_block_linear, in_turn=in_turn)
    far.hold("dev", [])
    used.hold("dev", [])
    size = on_all_block_linears[0].nbytes
    monkeypatch.setattr(live, "KEPT", size)
    monkeypatch.setattr(live, "BATCH", sum(it.place.values.numel() for it in used._tensors.values()) // 2)
    terms = [Term(str(number), 0.5, lora.transformer) for number, lora in enumerate(on_all_block_linears)]
    touched = {name for name in used.names if name in terms[0].deltas}
    with pytest.raises(torch.OutOfMemoryError), OutOfMemoryAt(1, torch.ops.flux_sprites.merge.default):
        used.hold("dev", terms)
    assert used._uploads._taken() <= size
    mixes = {name: used._tensors[name].held for name in touched}
    written = {name for name, mix in mixes.items() if mix is not None and len(mix) == 3}
    assert written
    assert None in mixes.values()
    assert {mix for name, mix in mixes.items() if name not in written} <= {None, ("dev",)}  # not begun yet
    if in_turn:  # nothing is claimed of what lay in the same memory before
        assert not [name for name in touched if far._tensors[name].held is not None]
    assert used.hold("dev", terms) == len(touched - written)


@pytest.mark.parametrize("loras", [0, 1, 2])
def test_of_what_was_brought_a_bounded_share_stays(
    far: Live, on_all_block_linears: list[Lora], monkeypatch: pytest.MonkeyPatch, loras: int
) -> None:
    size = on_all_block_linears[0].nbytes
    monkeypatch.setattr(live, "KEPT", loras * size)
    terms = [Term(str(number), 0.5, lora.transformer) for number, lora in enumerate(on_all_block_linears)]
    with UploadsTo("meta") as uploads:
        far.hold("dev", terms)
    assert len(uploads.brought) == 2
    assert [storage() is not None for storage in uploads.brought].count(True) == loras


def test_a_lora_that_was_read_anew_takes_the_place_of_the_one_before(
    far: Live, on_all_block_linears: list[Lora]
) -> None:
    deltas = on_all_block_linears[0].transformer

    def again() -> tuple[Term, weakref.ref]:
        packed = pack(deltas)
        return Term("a", 0.5, packed), weakref.ref(next(iter(packed.values()))[0].up.untyped_storage())

    term, before = again()
    far.hold("dev", [term])
    term, now = again()
    assert far.hold("dev", [term]) == 0
    assert before() is None
    del term
    assert now() is not None  # what is held can be checked as long as it is


# ---------------------------------------------------------------------------------------------------------------------
# Processes and memory


def test_another_process_gives_the_same_bits(loras: dict[str, Lora], tmp_path: Path) -> None:
    mix = ("dev", True, (("everywhere", 0.7), ("DoRA", -0.5), ("LoKr", 0.3)))
    lives = Lives(bases())
    for other in (
        ("schnell", True, (("everywhere", 1.0),)),
        ("dev", True, ()),
        ("dev", False, (("attention", 1.0),)),
        mix,
    ):
        hold(lives, other, loras)
    script = f"""if True:
        import torch
        from tests.engine.test_live import digest
        torch.set_num_threads(1)
        print(digest({mix!r}, {str(tmp_path)!r}))
    """
    run = finished([sys.executable, "-c", script], check=True)
    assert run.stdout.strip() == _digest(bits(lives.fp8.module))


def digest(mix: Mix, folder: str) -> str:
    """Of the weights that a fresh process gives."""
    return _digest(fresh(mix, read_loras(Path(folder))))


def _digest(tensors: Tensors) -> str:
    sha = hashlib.sha256()
    for name in sorted(tensors):
        sha.update(name.encode() + tensors[name].numpy().tobytes())
    return sha.hexdigest()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[LoraFile]:
    """LoRAs of some 200 kB each."""
    folder = tmp_path_factory.mktemp("many")
    transformer = models.transformer(**SMALL)
    made = []
    for number in range(8):
        changes = lora_files.changes(transformer, seed=number, rank=64, only=lambda bfl: "linear" in bfl)
        path = lora_files.write(folder / f"{number}.safetensors", lora_files.EXACT["kohya"](changes))
        made.append(LoraFile(path, str(number), "lora"))
    return made


def make_cache(loras: float, files: list[LoraFile]) -> LoraCache:
    """A cache with room for so many of the files."""
    cache = LoraCache(models.transformer(**SMALL), models.text_encoder())
    size = cache.read(files[0]).nbytes
    return LoraCache(models.transformer(**SMALL), models.text_encoder(), max_bytes=int(loras * size))


def test_the_cache_keeps_what_was_used_last(files: list[LoraFile]) -> None:
    cache = make_cache(2.5, files)
    a, b = cache.read(files[0]), cache.read(files[1])
    assert cache.read(files[0]) is a
    cache.read(files[2])
    assert cache.read(files[0]) is a
    assert cache.read(files[1]) is not b


def test_the_cache_goes_by_content(files: list[LoraFile], tmp_path: Path) -> None:
    cache = make_cache(2.5, files)
    elsewhere = LoraFile(tmp_path / "gone.safetensors", files[0].sha256, "lora")
    assert cache.read(files[0]) is cache.read(elsewhere)


def test_the_same_weights_under_another_config_are_another_lora(files: list[LoraFile]) -> None:
    cache = make_cache(2.5, files)
    configured = replace(files[0], config='{"peft_type": "LORA", "r": 64, "lora_alpha": 64}')
    bare, other = cache.read(files[0]), cache.read(configured)
    assert bare is not other
    assert (cache.read(files[0]), cache.read(configured)) == (bare, other)
    assert files[0].content != configured.content


def test_what_is_larger_than_the_cache_is_read_and_drives_nothing_out(files: list[LoraFile], tmp_path: Path) -> None:
    cache = make_cache(1.5, files)
    kept = cache.read(files[0])
    large = lora_files.changes(models.transformer(**SMALL), rank=128, only=lambda bfl: "linear" in bfl)
    path = lora_files.write(tmp_path / "large.safetensors", lora_files.EXACT["kohya"](large))
    assert cache.read(LoraFile(path, "large", "lora")).report.ranks == (128,)
    assert cache.read(files[0]) is kept


def test_a_file_that_is_refused_leaves_the_cache_as_it_was(files: list[LoraFile], tmp_path: Path) -> None:
    cache = make_cache(1.5, files)
    kept = cache.read(files[0])
    (tmp_path / "bad").write_bytes(b"bad")
    for _ in range(2):
        with pytest.raises(ValueError, match="not a safetensors file"):
            cache.read(LoraFile(tmp_path / "bad", "bad", "lora"))
    assert cache.read(files[0]) is kept


def test_memory_does_not_grow_over_500_swaps(files: list[LoraFile]) -> None:
    cache, lives = make_cache(3.5, files), Lives(bases())
    seen: list[weakref.ref[Lora]] = []
    resident = []
    for swap in range(500):
        chosen = [files[swap % 8], files[(swap * 3 + 1) % 8]]
        terms = []
        for file in chosen:
            lora = cache.read(file)
            seen.append(weakref.ref(lora))
            terms.append(Term(file.sha256, 1.0, lora.transformer))
        lives.of(swap % 3 == 0).hold(("dev", "schnell")[swap % 2], terms)
        if swap in (100, 499):
            resident.append(_resident_bytes())
    del terms, lora
    assert len({id(alive) for seen_once in seen if (alive := seen_once()) is not None}) <= 3
    assert resident[1] - resident[0] < 8 * 2**20  # 400 swaps that kept what they read would hold 100 MB


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
