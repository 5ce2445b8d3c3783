"""Norms and inner products of LoRAs against the same ones of whole matrices in float64."""

import math
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lora import measures
from lora.deltas import Decomposed, Delta, Full, Hadamard, Kronecker, LowRank, Replacement
from lora.measures import cosine, inner_products, measure
from lora_loader import read_lora
from tests.support import lora_files, models

OUT, IN, RANK = 24, 18, 2
NAME = "weight"


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed * 1000 + sum(shape)))


BASE = numbers(OUT, IN, seed=1)
SHAPE = {NAME: torch.empty(OUT, IN, device="meta")}


def low_rank(start: int = 0, height: int = OUT, seed: int = 2, rank: int = RANK, strength: float = 0.75) -> LowRank:
    return LowRank(start, height, numbers(height, rank, seed=seed), numbers(rank, IN, seed=seed + 1), strength)


KRONECKER = Kronecker(0, OUT, (numbers(4, 6, seed=9),), (numbers(6, 2, seed=10), numbers(2, 3, seed=11)), 0, 0.5)
HADAMARD = Hadamard(
    0, OUT, numbers(OUT, 3, seed=5), numbers(3, IN, seed=6), numbers(OUT, 3, seed=7), numbers(3, IN, seed=8), 1.5
)
CHANGES: dict[str, list[Delta]] = {
    "LoRA": [low_rank()],
    "LoRA on some rows": [low_rank(5, 9)],
    "LoRA in parts": [low_rank(0, 8), low_rank(8, 10, seed=20, strength=-2.0)],
    "LoRA in parts that overlap": [low_rank(0, 14), low_rank(6, 18, seed=20), low_rank(6, 18, seed=30, rank=3)],
    "LoRA of many ranks": [low_rank(rank=IN, seed=40)],
    "LoHa": [HADAMARD],
    "LoKr": [KRONECKER],
    "part of a LoKr": [Kronecker(4, 10, KRONECKER.left, KRONECKER.right, 7, 0.5)],
    "difference": [Full(0, OUT, numbers(OUT, IN, seed=4), 0.5)],
    "value": [Replacement(0, OUT, numbers(OUT, IN, seed=4))],
    "DoRA": [Decomposed(0, OUT, low_rank(), numbers(OUT, 1, seed=12).abs())],
    "DoRA by columns": [Decomposed(0, OUT, low_rank(), numbers(1, IN, seed=13).abs(), ((NAME, low_rank()),))],
    "LoRA and difference": [low_rank(0, 14), Full(0, OUT, numbers(OUT, IN, seed=4), 0.5)],
    "nothing": [],
}


def dense(deltas: list[Delta]) -> Tensor:
    """Its formula in float64; where that depends on the base, what it adds in float32."""
    total = torch.zeros(OUT, IN, dtype=torch.float64)
    for delta in deltas:
        match delta:
            case LowRank(start, height, up, down, strength):
                total[start : start + height] += strength * (up.double() @ down.double())
            case Hadamard(_, _, a, b, c, d, strength):
                total += strength * (a.double() @ b.double()) * (c.double() @ d.double())
            case Kronecker(start, height, (left,), (a, b), source, strength):
                whole = strength * torch.kron(left.double(), a.double() @ b.double())
                total[start : start + height] += whole[source : source + height]
            case Full(_, _, difference, strength):
                total += strength * difference.double()
            case Replacement(_, _, value):
                total += value.double() - BASE.double()
            case Decomposed(_, _, inner, magnitude):
                merged = BASE.double() + dense([inner])
                axis = 1 if magnitude.shape[0] == OUT else 0
                total += magnitude.double() * merged / merged.norm(dim=axis, keepdim=True) - BASE.double()
    return total


@pytest.mark.parametrize("run", [2**20, 5 * IN])
def test_every_two_kinds_have_the_inner_product_of_their_matrices(run: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measures, "RUN_ELEMENTS", run)
    wholes = {kind: dense(deltas) for kind, deltas in CHANGES.items()}
    for first, second in product(CHANGES, repeat=2):
        found = inner_products([CHANGES[first], CHANGES[second]], BASE, {NAME: BASE})
        flat = torch.stack([wholes[first].flatten(), wholes[second].flatten()])
        tolerance = 1e-6 * flat.norm(dim=1).square().max().item()
        torch.testing.assert_close(found, flat @ flat.T, rtol=1e-6, atol=tolerance, msg=f"{first}, {second}")


def test_the_factors_alone_are_looked_at_in_float64() -> None:
    up, down = numbers(OUT, RANK, seed=2), numbers(RANK, IN, seed=3)
    # Of two deltas that nearly cancel out, float32 would keep no digit of the square.
    deltas = [LowRank(0, OUT, up, down, 1.0), LowRank(0, OUT, up, down, -1.0 + 1e-6)]
    found = inner_products([deltas], SHAPE[NAME], {})
    norm = 1e-6 * (up.double() @ down.double()).norm().item()
    assert math.sqrt(found.item()) == pytest.approx(norm, rel=1e-3)


def between(*changes: list[Delta]) -> float | None:
    """The cosine of two."""
    _, products = measure([{NAME: deltas} for deltas in changes], SHAPE, None)
    return cosine(products, 0, 1)


def scaled(factor: float) -> list[Delta]:
    return [low_rank(0, 14, strength=0.75 * factor), low_rank(6, 18, seed=20, strength=0.75 * factor)]


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        (scaled(1), 1),
        (scaled(2), 1),
        (scaled(-1), -1),
        ([Full(0, OUT, -dense(scaled(1)).float())], -1),
        ([], None),
    ],
)
def test_a_cosine_tells_directions_apart(other: list[Delta], expected: float | None) -> None:
    assert between(scaled(1), other) == (expected if expected is None else pytest.approx(expected, abs=1e-6))


def test_changes_of_other_rows_or_other_parameters_have_nothing_in_common() -> None:
    assert between([low_rank(0, 10)], [low_rank(10, 14)]) == 0
    shapes = {"a": SHAPE[NAME], "b": SHAPE[NAME]}
    _, products = measure([{"a": [low_rank()]}, {"b": [low_rank()]}], shapes, None)
    assert cosine(products, 0, 1) == 0


def test_a_size_is_beside_the_parameters_that_change() -> None:
    base = {"a": BASE, "b": 2 * BASE, "c": BASE}
    changes = {"a": [low_rank()], "b": [low_rank(seed=20)]}
    (size, none), _ = measure([changes, {}], dict.fromkeys(base, SHAPE[NAME]), base)
    a, b = dense(changes["a"]).norm().item(), dense(changes["b"]).norm().item()
    one = BASE.double().norm().item()
    assert none is None
    assert size.delta == pytest.approx(math.hypot(a, b))
    assert size.base == pytest.approx(math.hypot(one, 2 * one))
    assert size.ratio == size.delta / size.base
    name, ratio = max((("a", a / one), ("b", b / (2 * one))), key=lambda it: it[1])
    assert size.most == (name, pytest.approx(ratio))


def test_without_the_base_what_depends_on_it_is_left_out() -> None:
    bias = {"bias": torch.empty(OUT, device="meta")}
    changes = {NAME: CHANGES["DoRA"], "bias": [Replacement(0, OUT, numbers(OUT))]}
    (size, other), products = measure([changes, {NAME: [low_rank()]}], SHAPE | bias, None)
    assert (size.delta, size.base, size.ratio, size.most, size.left_out) == (0, None, None, None, 2)
    assert other.delta == pytest.approx(dense([low_rank()]).norm().item())
    assert other.left_out == 0
    assert cosine(products, 0, 1) is None


@pytest.mark.parametrize("written", ["diffusers", "kohya", "kohya, split qkv", "LoHa", "LoKr", "differences"])
def test_files_in_every_format_measure_the_same(tmp_path: Path, written: str) -> None:
    transformer, clip = models.transformer(), models.text_encoder()
    made, others = (lora_files.changes(transformer, seed=seed) for seed in (0, 1))
    formats = lora_files.EXACT | lora_files.ROUNDED
    files = [
        lora_files.write(tmp_path / "a.safetensors", formats["diffusers"](made)),
        lora_files.write(tmp_path / "b.safetensors", formats[written](made)),
        lora_files.write(tmp_path / "c.safetensors", formats[written](others)),
    ]
    loras = [read_lora(file, transformer, clip).transformer for file in files]
    base = _parameters(transformer)
    (first, second, _), products = measure(loras, base, base)
    assert second.ratio == pytest.approx(first.ratio, rel=1e-6)
    assert second.most == (first.most[0], pytest.approx(first.most[1], rel=1e-6))
    assert cosine(products, 0, 1) == pytest.approx(1, abs=1e-9)
    assert cosine(products, 0, 2) == pytest.approx(cosine(products, 1, 2), abs=1e-6)
    assert abs(cosine(products, 0, 2)) < 0.5


def _parameters(module: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in module.named_parameters()}
