"""How large the deltas of LoRAs are, and how similar, as norms and inner products of matrices.

Low-rank deltas are measured from their factors alone: with U1 [out, r1], D1 [r1, in] and U2, D2 likewise, the inner
product of U1 @ D1 and U2 @ D2 is the sum of (U1ᵀ @ U2) * (D1 @ D2ᵀ), and no [out, in] matrix is made. All other kinds
are multiplied out by runs of rows. Sums are float64. This module knows deltas; it knows neither files nor FLUX.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lora.deltas import Decomposed, Delta, LowRank, Replacement

# The deltas of one LoRA, by parameter name.
Changes = Mapping[str, Sequence[Delta]]

# Elements of a run of rows, of each LoRA: its float32 and float64 copies take 12 MiB.
RUN_ELEMENTS = 2**20
# Kinds whose size depends on the base's weights.
FROM_BASE = (Decomposed, Replacement)


@dataclass(frozen=True)
class Size:
    """How large a LoRA's change of a model is at scale 1, in Frobenius norms over the parameters that it changes."""

    delta: float
    base: float | None = None  # None without the base's weights
    most: tuple[str, float] | None = None  # the largest ratio of a parameter's change to its base, and whose it is
    left_out: int = 0  # parameters whose change depends on the base's weights, without these

    @property
    def ratio(self) -> float | None:
        """The change as a part of the base; None without a base, or with one of zeros."""
        return self.delta / self.base if self.base else None


def measure(
    loras: Sequence[Changes], shapes: Mapping[str, Tensor], base: Mapping[str, Tensor] | None
) -> tuple[list[Size | None], Tensor]:
    """The size of each LoRA's change of one model, None where it changes nothing, and all inner products [n, n].

    Args:
        loras: n of them.
        shapes: tensors of the parameters' shapes, by name; they may be without memory.
        base: the pristine parameters; without them, deltas that depend on them are left out.
    """
    pristine = {} if base is None else base
    products = torch.zeros(len(loras), len(loras), dtype=torch.float64)
    squares: list[dict[str, tuple[float, float]]] = [{} for _ in loras]  # by parameter: of the change, of the base
    left_out = [0] * len(loras)
    for name in sorted(set().union(*loras)):
        parameter = pristine.get(name)
        changes = [lora.get(name, ()) for lora in loras]
        for index, deltas in enumerate(changes):
            if parameter is None and any(isinstance(delta, FROM_BASE) for delta in deltas):
                changes[index] = ()
                left_out[index] += 1
        if not any(changes):
            continue
        own = inner_products(changes, shapes[name] if parameter is None else parameter, pristine)
        products += own
        square = 0.0 if parameter is None else squared_norm(parameter)
        for index, deltas in enumerate(changes):
            if deltas:
                squares[index][name] = (own[index, index].item(), square)
    return [
        _size(each, lacking, known=base is not None) if each or lacking else None
        for each, lacking in zip(squares, left_out, strict=True)
    ], products


def _size(squares: Mapping[str, tuple[float, float]], left_out: int, *, known: bool) -> Size:
    delta, base = (math.sqrt(sum(pair[side] for pair in squares.values())) for side in (0, 1))
    ratios = {name: math.sqrt(change / square) for name, (change, square) in squares.items() if square > 0}
    most = max(ratios.items(), key=lambda it: it[1], default=None)
    return Size(delta, base if known else None, most, left_out)


def cosine(products: Tensor, first: int, second: int) -> float | None:
    """The cosine of two LoRAs' changes by their inner products; None where one is zero or infinite."""
    norms = math.sqrt(products[first, first].item()) * math.sqrt(products[second, second].item())
    return min(1.0, max(-1.0, products[first, second].item() / norms)) if 0 < norms < math.inf else None


def squared_norm(tensor: Tensor) -> float:
    """The sum of a tensor's squares; of a mapped one, a run of elements is read at a time."""
    return sum(run.double().square_().sum().item() for run in tensor.flatten().split(RUN_ELEMENTS))


def inner_products(changes: Sequence[Sequence[Delta]], base: Tensor, pristine: Mapping[str, Tensor]) -> Tensor:
    """The inner products [n, n] of n LoRAs' changes of one parameter, float64, on the CPU.

    Args:
        changes: the deltas of each LoRA for it, which are added up.
        base: the parameter; one without memory will do where no delta depends on its numbers.
        pristine: see `Delta.bind`.
    """
    deltas = [delta for several in changes for delta in several]
    # With more ranks than that, to multiply out the factors takes less work and memory.
    if all(isinstance(it, LowRank) for it in deltas) and 2 * sum(len(it.down) for it in deltas) <= min(base.shape):
        return _from_factors(changes, base)
    products = torch.zeros(len(changes), len(changes), dtype=torch.float64)
    for rows in _rows(changes, base, pristine):
        flat = rows.flatten(1).double()
        products += flat @ flat.T
    return products


def _from_factors(changes: Sequence[Sequence[LowRank]], base: Tensor) -> Tensor:
    """The same of low-rank deltas: side by side, all of them are one pair of factors of the whole parameter."""
    owned = [(index, delta) for index, deltas in enumerate(changes) for delta in deltas]
    owners = torch.tensor([index for index, delta in owned for _ in range(len(delta.down))], dtype=torch.long)
    up = torch.zeros(base.shape[0], len(owners), dtype=torch.float64)  # [out, Σ rank]
    down = torch.zeros(len(owners), base.shape[1], dtype=torch.float64)  # [Σ rank, in]
    at = 0
    for _, delta in owned:
        ranks = slice(at, at := at + len(delta.down))
        up[delta.start : delta.start + delta.height, ranks] = delta.up.double() * delta.strength
        down[ranks] = delta.down.double()
    each = (up.T @ up) * (down @ down.T)  # [Σ rank, Σ rank]
    owner = torch.nn.functional.one_hot(owners, len(changes)).double()  # [Σ rank, n]
    products = owner.T @ each @ owner
    products.diagonal().clamp_(min=0)  # rounding may leave a sum of zero slightly negative
    return products


def _rows(changes: Sequence[Sequence[Delta]], base: Tensor, pristine: Mapping[str, Tensor]) -> Iterator[Tensor]:
    """Runs of rows of each LoRA's change: float32 [n, rows, ...]."""
    bound = [[delta.bind(base, pristine, bring=lambda tensor: tensor) for delta in deltas] for deltas in changes]
    height = max(1, RUN_ELEMENTS // base[0].numel())
    for start in range(0, base.shape[0], height):
        rows = torch.zeros(len(changes), *base[start : start + height].shape)
        for run, deltas in zip(rows, bound, strict=True):
            for delta in deltas:
                delta.add_to(run, start, 1.0)
        yield rows
