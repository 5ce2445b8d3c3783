"""A LoRA's changes of a parameter, stored as the file's factors, and multiplied out row by row.

A delta changes some rows of one parameter (elements, where that has one dimension). Its tensors stay in host memory in
the file's own dtype, packed into slabs with all others of their LoRA; `bind` copies them to the parameter's device, and
the bound delta adds `scale` times itself, in float32, to any run of rows. Stored tensors are never changed, and
products are taken in one order: the same deltas added in the same runs of rows always give the same bits. This module
knows neither files nor FLUX.

    LowRank        up @ down                                   LoRA
    LowRanks       several of these at once
    Hadamard       (a @ b) * (c @ d)                           LoHa
    Kronecker      kron(left, right)                           LoKr
    Full           a difference of the parameter's own shape   diff, diff_b
    Replacement    value - base                                norms and biases that are given whole
    Decomposed     magnitude * (base + D) / |base + D| - base  DoRA, around any of the others
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import cached_property, reduce
from typing import NamedTuple, Self

import torch
from torch import Tensor

from service import slabs

# Elements of a base that a DoRA's norms are taken over at a time: the float32 copy stays small beside the parameter.
NORM_ELEMENTS = 2**22

AddRows = Callable[[Tensor, int, float], None]
# A tensor of a delta → an equal one on the parameter's device; `service.slabs.Uploads` does it a whole slab at a time.
Bring = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class BoundDelta:
    """A delta whose tensors lie on the parameter's device."""

    start: int
    height: int
    # (buffer [n, in], first, scale): add the delta's own rows [first, first + n), times scale, to the buffer.
    add_rows: AddRows

    def add_to(self, buffer: Tensor, start: int, scale: float) -> None:
        """Add scale times this delta, in place, to a buffer of the parameter's rows from start on, float32."""
        first = max(start, self.start)
        last = min(start + len(buffer), self.start + self.height)
        if first < last:
            self.add_rows(buffer[first - start : last - start], first - self.start, scale)


@dataclass(frozen=True)
class Delta(ABC):
    """A change of the rows [start, start + height) of a parameter."""

    start: int
    height: int

    def tensors(self) -> Iterator[Tensor]:
        """Its tensors, which may belong to other deltas too."""
        for field in fields(self):
            yield from _tensors_in(getattr(self, field.name))

    def with_tensors(self, equal: Callable[[Tensor], Tensor]) -> Self:
        """The same delta, holding an equal tensor for each of its own."""
        return replace(self, **{field.name: _exchanged(getattr(self, field.name), equal) for field in fields(self)})

    def bind(self, base: Tensor, pristine: Mapping[str, Tensor], bring: Bring) -> BoundDelta:
        """This delta with its tensors on the parameter's device.

        Args:
            base: the whole pristine parameter, on the device where it will be summed.
            pristine: all parameters by name, on any device: a DoRA on a fused layer measures its other parts too.
            bring: copies a tensor of a delta to that device.
        """
        rows = base[self.start : self.start + self.height]
        return BoundDelta(self.start, self.height, self._bind(rows, pristine, bring))

    @abstractmethod
    def _bind(self, base: Tensor, pristine: Mapping[str, Tensor], bring: Bring) -> AddRows:
        """The function that adds rows of this delta; `base` is only the rows of the parameter that it changes."""


class Layout(NamedTuple):
    """Where the factors of a low-rank delta lie in one block of memory, both contiguous."""

    block: torch.UntypedStorage
    up: int  # byte where [height, rank] begins
    down: int  # byte where [rank, in] begins
    end: int  # byte where the later of them ends
    rank: int
    dtype: torch.dtype


@dataclass(frozen=True)
class LowRank(Delta):
    """strength * up @ down."""

    up: Tensor  # [height, rank]
    down: Tensor  # [rank, in]
    strength: float  # alpha / rank; kept apart, so that alpha costs no rounding of the tensors

    @cached_property
    def shape(self) -> tuple[int, int]:
        """The product's, [height, in]; kept, since each swap asks for it."""
        return len(self.up), self.down.shape[1]

    @cached_property
    def layout(self) -> Layout | None:
        """Where its factors lie, if in one block and of one dtype, as in a packed LoRA; kept as above."""
        up, down = self.up, self.down
        block = up.untyped_storage()
        contiguous = up.is_contiguous() and down.is_contiguous()
        if block is not down.untyped_storage() or up.dtype != down.dtype or not contiguous:
            return None
        starts = [it.storage_offset() * it.itemsize for it in (up, down)]
        return Layout(block, *starts, max(starts[0] + up.nbytes, starts[1] + down.nbytes), up.shape[1], up.dtype)

    def _bind(self, base: Tensor, pristine: Mapping[str, Tensor], bring: Bring) -> AddRows:
        up, down = bring(self.up).float(), bring(self.down).float()

        def add_rows(buffer: Tensor, first: int, scale: float) -> None:
            buffer.addmm_(up[first : first + len(buffer)], down, alpha=scale * self.strength)

        return add_rows


@dataclass(frozen=True)
class LowRanks(Delta):
    """Σ scale · delta over low-rank deltas of the same rows: one product with all their ranks is one pass over them."""

    terms: tuple[tuple[float, LowRank], ...]

    def _bind(self, base: Tensor, pristine: Mapping[str, Tensor], bring: Bring) -> AddRows:
        ups = [bring(delta.up).float() * (scale * delta.strength) for scale, delta in self.terms]
        downs = [bring(delta.down).float() for _, delta in self.terms]
        up, down = torch.cat(ups, dim=1), torch.cat(downs)  # [height, Σ rank], [Σ rank, in]

        def add_rows(buffer: Tensor, first: int, scale: float) -> None:
            buffer.addmm_(up[first : first + len(buffer)], down, alpha=scale)

        return add_rows


def gather(terms: Iterable[tuple[float, Delta]]) -> list[tuple[float, Delta]]:
    """The same sum with its low-rank deltas of equal rows as one `LowRanks`, before all others."""
    others: list[tuple[float, Delta]] = []
    together: dict[tuple[int, int], list[tuple[float, LowRank]]] = {}
    for scale, delta in terms:
        if isinstance(delta, LowRank):
            together.setdefault((delta.start, delta.height), []).append((scale, delta))
        else:
            others.append((scale, delta))
    return [(1.0, LowRanks(*rows, tuple(same))) for rows, same in together.items()] + others


@dataclass(frozen=True)
class Hadamard(Delta):
    """strength * (a @ b) * (c @ d)."""

    a: Tensor  # [height, rank]
    b: Tensor  # [rank, in]
    c: Tensor  # [height, rank]
    d: Tensor  # [rank, in]
    strength: float

    def _bind(self, base: Tensor, pristine: Mapping[str, Tensor], bring: Bring) -> AddRows:
        a, b, c, d = (bring(factor).float() for factor in (self.a, self.b, self.c, self.d))

        def add_rows(buffer: Tensor, first: int, scale: float) -> None:
            rows = slice(first, first + len(buffer))
            buffer.addcmul_(a[rows] @ b, c[rows] @ d, value=scale * self.strength)

        return add_rows


@dataclass(frozen=True)
class Kronecker(Delta):
    """strength * kron(left, right), its rows from `source` on; each side is a matrix or a product of two."""

    left: tuple[Tensor, ...]  # [o1, i1], or [o1, rank] and [rank, i1]
    right: tuple[Tensor, ...]  # [o2, i2], or [o2, rank] and [rank, i2]; in = i1 * i2
    source: int
    strength: float

    def _bind(self, base: Tensor, pristine: Mapping[str, Tensor], bring: Bring) -> AddRows:
        sides = ([bring(factor).float() for factor in side] for side in (self.left, self.right))
        left, right = (reduce(torch.matmul, side) for side in sides)  # each a matrix

        def add_rows(buffer: Tensor, first: int, scale: float) -> None:
            rows = torch.arange(self.source + first, self.source + first + len(buffer), device=buffer.device)
            outer = left[rows // len(right)].unsqueeze(2)  # [n, i1, 1]
            inner = right[rows % len(right)].unsqueeze(1)  # [n, 1, i2]
            buffer.view(len(buffer), left.shape[1], right.shape[1]).addcmul_(outer, inner, value=scale * self.strength)

        return add_rows


@dataclass(frozen=True)
class Full(Delta):
    """strength * difference."""

    difference: Tensor  # [height, ...]
    strength: float = 1.0

    def _bind(self, base: Tensor, pristine: Mapping[str, Tensor], bring: Bring) -> AddRows:
        difference = bring(self.difference)

        def add_rows(buffer: Tensor, first: int, scale: float) -> None:
            buffer.add_(difference[first : first + len(buffer)].float(), alpha=scale * self.strength)

        return add_rows


@dataclass(frozen=True)
class Replacement(Delta):
    """value - base: at scale 1 the parameter becomes the value."""

    value: Tensor  # [height, ...]

    def _bind(self, base: Tensor, pristine: Mapping[str, Tensor], bring: Bring) -> AddRows:
        value = bring(self.value)

        def add_rows(buffer: Tensor, first: int, scale: float) -> None:
            rows = slice(first, first + len(buffer))
            buffer.add_(value[rows].float() - base[rows].float(), alpha=scale)

        return add_rows


@dataclass(frozen=True)
class Decomposed(Delta):
    """magnitude * (base + D) / |base + D| - base, where D is another delta at strength 1.

    The norm is of each row, or of each column over all rows of the layer that the LoRA was trained on: where that is a
    fused layer, `layer` names the parameters that its other rows went to.
    """

    inner: Delta
    magnitude: Tensor  # [height, 1] for rows, [1, in] for columns
    layer: tuple[tuple[str, Delta], ...] = ()  # for columns: by parameter name, every part of the layer, this one too

    def _bind(self, base: Tensor, pristine: Mapping[str, Tensor], bring: Bring) -> AddRows:
        inner = self.inner._bind(base, pristine, bring)
        if self.layer:
            squares = torch.zeros_like(self.magnitude, dtype=torch.float32, device=base.device)
            for name, part in self.layer:
                rows = pristine[name][part.start : part.start + part.height].to(base.device, non_blocking=True)
                for merged in _merged(rows, part._bind(rows, pristine, bring)):
                    squares += merged.square_().sum(dim=0, keepdim=True)
            norm = squares.sqrt_()
        else:
            norm = torch.cat([merged.norm(dim=1, keepdim=True) for merged in _merged(base, inner)])
        # A row or column of zeros has no direction, and stays zero: its norm is not divided by.
        gain = bring(self.magnitude).float() / norm.clamp_min(torch.finfo(torch.float32).eps)

        def add_rows(buffer: Tensor, first: int, scale: float) -> None:
            rows = base[first : first + len(buffer)]
            merged = rows.to(torch.float32, copy=True)
            inner(merged, first, 1.0)
            merged *= gain if self.layer else gain[first : first + len(buffer)]
            buffer.add_(merged.sub_(rows), alpha=scale)

        return add_rows


def _merged(base: Tensor, add_rows: AddRows) -> Iterator[Tensor]:
    """Runs of rows of base + delta, float32."""
    height = max(1, NORM_ELEMENTS // base.shape[1])
    for first in range(0, len(base), height):
        merged = base[first : first + height].to(torch.float32, copy=True)
        add_rows(merged, first, 1.0)
        yield merged


@contextmanager
def float32_products() -> Iterator[None]:
    """Take products of float32 matrices in float32, even where a library or the operator has allowed TensorFloat-32.

    That would round the factors to 10 bits, and give the same deltas other bits. torch has two interfaces for this: the
    older one cannot be read while the two disagree, and setting it sets the newer one too.
    """
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    precisions = [backend.fp32_precision for backend in backends]
    for backend in backends:
        backend.fp32_precision = "ieee"
    older = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(older)
        for backend, precision in zip(backends, precisions, strict=True):
            backend.fp32_precision = precision


def _tensors_in(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Delta):
        yield from value.tensors()
    elif isinstance(value, tuple):
        for item in value:
            yield from _tensors_in(item)


def _exchanged(value: object, equal: Callable[[Tensor], Tensor]) -> object:
    if isinstance(value, Tensor):
        return equal(value)
    if isinstance(value, Delta):
        return value.with_tensors(equal)
    return tuple(_exchanged(item, equal) for item in value) if isinstance(value, tuple) else value


def pack(deltas: Mapping[str, Sequence[Delta]]) -> dict[str, tuple[Delta, ...]]:
    """The same deltas by parameter, their tensors copied into slabs: one allocation and upload for nearly every LoRA.

    A tensor that several deltas hold is stored once. Results then depend neither on how a file aligns its tensors nor
    on the file being there.
    """
    tensors = {id(tensor): tensor for several in deltas.values() for delta in several for tensor in delta.tensors()}
    packed = slabs.pack(tensors)
    return {
        name: tuple(delta.with_tensors(lambda tensor: packed[id(tensor)]) for delta in several)
        for name, several in deltas.items()
    }
