"""Every kind of delta against its formula, written out in float64."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from lora import deltas
from lora.deltas import (
    Bring,
    Decomposed,
    Delta,
    Full,
    Hadamard,
    Kronecker,
    LowRank,
    LowRanks,
    Replacement,
    float32_products,
)
from service.slabs import Uploads, taken

CPU = torch.device("cpu")
HERE = Uploads(CPU, room=0)
OUT, IN, RANK = 12, 18, 3
STRENGTH = 0.75


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed * 1000 + sum(shape)))


BASE = numbers(OUT, IN, seed=1)


def low_rank(start: int = 0, height: int = OUT) -> LowRank:
    up = numbers(OUT, RANK, seed=2)[start : start + height]
    return LowRank(start, height, up, numbers(RANK, IN, seed=3), STRENGTH)


def low_rank_product() -> Tensor:
    return STRENGTH * (numbers(OUT, RANK, seed=2).double() @ numbers(RANK, IN, seed=3).double())


def hadamard() -> Hadamard:
    factors = [numbers(OUT, RANK, seed=seed) if seed % 2 else numbers(RANK, IN, seed=seed) for seed in (5, 6, 7, 8)]
    return Hadamard(0, OUT, *factors, STRENGTH)


def hadamard_product() -> Tensor:
    a, b, c, d = (factor.double() for factor in hadamard().tensors())
    return STRENGTH * ((a @ b) * (c @ d))


LEFT, RIGHT = (numbers(3, 6, seed=9),), (numbers(4, 2, seed=10), numbers(2, 3, seed=11))


def kronecker(start: int = 0, height: int = OUT, source: int = 0) -> Kronecker:
    return Kronecker(start, height, LEFT, RIGHT, source, STRENGTH)


def kronecker_product() -> Tensor:
    return STRENGTH * torch.kron(LEFT[0].double(), RIGHT[0].double() @ RIGHT[1].double())


def row_magnitude() -> Tensor:
    return numbers(OUT, 1, seed=12).abs() + 0.5


def column_magnitude() -> Tensor:
    return numbers(1, IN, seed=13).abs() + 0.5


def decomposed(product: Tensor, magnitude: Tensor) -> Tensor:
    merged = BASE.double() + product
    axis = 1 if magnitude.shape[0] == OUT else 0
    return magnitude.double() * merged / merged.norm(dim=axis, keepdim=True) - BASE.double()


def by_columns(inner: Delta) -> Decomposed:
    return Decomposed(0, OUT, inner, column_magnitude(), (("weight", inner),))


KINDS: dict[str, tuple[Callable[[], Delta], Callable[[], Tensor]]] = {
    "LoRA": (low_rank, low_rank_product),
    "LoHa": (hadamard, hadamard_product),
    "LoKr": (kronecker, kronecker_product),
    "difference": (lambda: Full(0, OUT, numbers(OUT, IN, seed=4), 0.5), lambda: numbers(OUT, IN, seed=4).double() / 2),
    "value": (
        lambda: Replacement(0, OUT, numbers(OUT, IN, seed=4)),
        lambda: numbers(OUT, IN, seed=4).double() - BASE.double(),
    ),
    "DoRA by rows": (
        lambda: Decomposed(0, OUT, low_rank(), row_magnitude()),
        lambda: decomposed(low_rank_product(), row_magnitude()),
    ),
    "DoRA by columns": (
        lambda: by_columns(low_rank()),
        lambda: decomposed(low_rank_product(), column_magnitude()),
    ),
    "DoRA of a LoHa": (
        lambda: Decomposed(0, OUT, hadamard(), row_magnitude()),
        lambda: decomposed(hadamard_product(), row_magnitude()),
    ),
    "DoRA of a LoKr": (lambda: by_columns(kronecker()), lambda: decomposed(kronecker_product(), column_magnitude())),
}


def add(delta: Delta, scale: float, height: int = OUT, base: Tensor = BASE, bring: Bring = HERE) -> Tensor:
    """Base + scale * delta, summed in runs of so many rows."""
    bound = delta.bind(base, {"weight": base}, bring)
    total = base.float().clone()
    for start in range(0, len(base), height):
        bound.add_to(total[start : start + height], start, scale)
    return total


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [1.0, -1.0, 0.3, 3.0])
def test_a_delta_is_its_formula_times_the_scale(kind: str, scale: float) -> None:
    make, formula = KINDS[kind]
    expected = BASE.double() + scale * formula()
    torch.testing.assert_close(add(make(), scale), expected.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("height", [1, 5, 7])
def test_runs_of_rows_add_up_to_the_whole(kind: str, height: int) -> None:
    delta = KINDS[kind][0]()
    torch.testing.assert_close(add(delta, 0.7, height), add(delta, 0.7), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_runs_give_the_same_bits_and_change_nothing_stored(kind: str) -> None:
    delta = KINDS[kind][0]()
    stored = [tensor.clone() for tensor in delta.tensors()]
    first = add(delta, 0.7, 5)
    add(delta, -2.0, 12)
    assert torch.equal(add(delta, 0.7, 5), first)
    assert all(torch.equal(now, before) for now, before in zip(delta.tensors(), stored, strict=True))


def test_a_value_at_scale_1_is_that_value() -> None:
    value = numbers(OUT, seed=4)
    base = numbers(OUT, seed=14)
    torch.testing.assert_close(add(Replacement(0, OUT, value), 1.0, base=base), value, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("start", "height"), [(0, 5), (4, 6), (7, 5)])
def test_a_part_changes_its_own_rows_only(start: int, height: int) -> None:
    total = add(low_rank(start, height), 1.0, 5)
    expected = BASE.double()
    expected[start : start + height] += low_rank_product()[start : start + height]
    torch.testing.assert_close(total, expected.float(), rtol=1e-5, atol=1e-5)
    outside = [row for row in range(OUT) if not start <= row < start + height]
    assert torch.equal(total[outside], BASE[outside])


def test_a_part_of_a_kronecker_product_begins_where_it_should() -> None:
    total = add(kronecker(2, 6, source=5), 1.0, 4)
    expected = BASE.double()
    expected[2:8] += kronecker_product()[5:11]
    torch.testing.assert_close(total, expected.float(), rtol=1e-5, atol=1e-5)


def test_a_dora_by_columns_measures_all_parts_of_a_fused_layer() -> None:
    other = numbers(OUT, IN, seed=15)
    part = LowRank(0, OUT, numbers(OUT, RANK, seed=16), numbers(RANK, IN, seed=3), STRENGTH)
    magnitude = column_magnitude()
    delta = Decomposed(0, OUT, low_rank(), magnitude, (("weight", low_rank()), ("other", part)))
    total = BASE.clone()
    delta.bind(BASE, {"weight": BASE, "other": other}, HERE).add_to(total, 0, 1.0)
    merged = torch.cat(
        [BASE.double() + low_rank_product(), other.double() + STRENGTH * part.up.double() @ part.down.double()]
    )
    expected = (magnitude.double() * merged / merged.norm(dim=0, keepdim=True))[:OUT]
    torch.testing.assert_close(total, expected.float(), rtol=1e-5, atol=1e-5)


def test_the_norms_of_a_dora_are_taken_in_float32_of_a_bf16_base() -> None:
    base = BASE.bfloat16()
    total = add(Decomposed(0, OUT, low_rank(), row_magnitude()), 1.0, base=base)
    merged = base.double() + low_rank_product()
    expected = row_magnitude().double() * merged / merged.norm(dim=1, keepdim=True)
    torch.testing.assert_close(total, expected.float(), rtol=1e-5, atol=1e-5)


def test_a_row_of_zeros_has_no_direction_and_stays() -> None:
    base = BASE.clone()
    base[3] = 0
    up = numbers(OUT, RANK, seed=2).clone()
    up[3] = 0
    total = add(
        Decomposed(0, OUT, LowRank(0, OUT, up, numbers(RANK, IN, seed=3), 1.0), row_magnitude()), 1.0, base=base
    )
    assert total.isfinite().all()
    assert total[3].eq(0).all()


def test_gathering_keeps_the_sum() -> None:
    other = LowRank(0, OUT, numbers(OUT, 5, seed=17), numbers(5, IN, seed=18), 0.5)
    terms = [(0.3, low_rank()), (1.0, hadamard()), (-2.0, other), (1.5, low_rank(4, 6)), (0.5, low_rank())]
    gathered = deltas.gather(terms)
    assert [type(delta) for _, delta in gathered] == [LowRanks, LowRanks, Hadamard]
    totals = []
    for some in (terms, gathered):
        total = BASE.clone()
        for scale, delta in some:
            delta.bind(BASE, {}, HERE).add_to(total, 0, scale)
        totals.append(total)
    torch.testing.assert_close(*totals, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_packed_delta_gives_the_same_bits_and_comes_to_a_device_in_one_upload(kind: str) -> None:
    delta = KINDS[kind][0]()
    [packed] = deltas.pack({"weight": (delta,)})["weight"]
    assert type(packed) is type(delta)
    assert len({tensor.untyped_storage().data_ptr() for tensor in packed.tensors()}) == 1
    brought: list[Tensor] = []
    # To torch another device than "cpu", though its memory is the same: what is moved there is really copied.
    uploads = Uploads(torch.device("cpu", 0), room=taken(packed.tensors()))

    def bring(tensor: Tensor) -> Tensor:
        brought.append(uploads(tensor))
        return brought[-1]

    assert torch.equal(add(packed, 0.7, 5), add(delta, 0.7, 5))
    assert torch.equal(add(packed, 0.7, 5, bring=bring), add(delta, 0.7, 5))
    places = {tensor.untyped_storage().data_ptr() for tensor in brought}
    assert len(places) == 1
    assert places.isdisjoint(tensor.untyped_storage().data_ptr() for tensor in packed.tensors())


def test_a_shared_tensor_is_packed_once() -> None:
    down = numbers(RANK, IN)
    parts = [LowRank(0, OUT, numbers(OUT, RANK, seed=seed), down, 1.0) for seed in (1, 2)]
    whole = tuple((name, part) for name, part in zip("ab", parts, strict=True))
    packed = deltas.pack({name: (part, Decomposed(0, OUT, part, column_magnitude(), whole)) for name, part in whole})
    (a, of_a), (b, of_b) = packed["a"], packed["b"]
    assert a.down is b.down is of_a.inner.down is of_b.layer[0][1].down
    assert a.up is of_a.inner.up is of_b.layer[0][1].up
    tensors = {id(tensor): tensor for several in packed.values() for it in several for tensor in it.tensors()}
    assert len(tensors) == 1 + 2 + 2  # down, two ups, two magnitudes
    assert len({tensor.data_ptr() for tensor in tensors.values()}) == len(tensors)


# ---------------------------------------------------------------------------------------------------------------------
# Products are float32's. Whether a GPU then takes them so cannot be seen on a CPU: what torch was told can.


def allow_by_the_newer_interface() -> None:
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"


def allow_everywhere() -> None:
    torch.backends.fp32_precision = "tf32"


def allow_by_both() -> None:
    torch.set_float32_matmul_precision("high")
    torch.backends.cuda.matmul.fp32_precision = "ieee"


def matmul_precisions() -> tuple[str, ...]:
    """The setting in both interfaces; the older one cannot be read while they disagree."""
    try:
        older = torch.get_float32_matmul_precision()
    except RuntimeError:
        older = "unreadable"
    return torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision, older


def forget_precisions() -> None:
    torch.set_float32_matmul_precision("highest")
    for backend in (torch.backends, torch.backends.cuda.matmul, torch.backends.mkldnn.matmul):
        backend.fp32_precision = "none"


@pytest.fixture
def as_torch_begins() -> Iterator[None]:
    forget_precisions()
    yield
    forget_precisions()


@pytest.mark.usefixtures("as_torch_begins")
@pytest.mark.parametrize(
    ("allow", "before"),
    [
        (lambda: None, ("none", "none", "highest")),
        (lambda: torch.set_float32_matmul_precision("medium"), ("tf32", "bf16", "medium")),
        (lambda: torch.set_float32_matmul_precision("high"), ("tf32", "tf32", "high")),
        (allow_by_the_newer_interface, ("tf32", "bf16", "unreadable")),
        (allow_everywhere, ("tf32", "tf32", "unreadable")),
        (allow_by_both, ("ieee", "tf32", "high")),
    ],
)
def test_products_are_float32_s_inside_and_what_was_allowed_outside(
    allow: Callable[[], None], before: tuple[str, ...]
) -> None:
    allow()
    assert matmul_precisions() == before
    with float32_products():
        assert matmul_precisions() == ("ieee", "ieee", "highest")
        assert not torch.backends.cuda.matmul.allow_tf32
    assert matmul_precisions() == before
    with pytest.raises(ZeroDivisionError), float32_products():
        _ = 1 / 0
    assert matmul_precisions() == before
