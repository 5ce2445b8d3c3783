"""Live weights: the module that computes, its tensors written from pristine bases and the deltas of LoRAs.

    live = round(base + Σ scale · delta)        summed in float32, rounded once

Bases are never written. The live tensors never move, so compiled graphs stay valid. Each live tensor remembers the mix
that it holds and forgets it before it is written, so the next request repairs an interrupted write. It also remembers
the recipe that it was written from, so its bits can be checked at any time. This module knows where weights lie; it
knows neither LoRA files nor pipelines.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor, nn

from engine import fp8, merge
from lora.deltas import Bring, Delta, float32_products, gather
from request import exact
from service.slabs import SLAB, Uploads

# Elements of the float32 buffer in which a mix is summed. It fills most of the last-level cache (8 MiB on a CPU, 36 MiB
# of an H100's 50), as each run of rows costs a synchronisation of threads on a CPU and a few kernel launches on a GPU,
# where the most frequent weight of FLUX is one run.
BUFFER_ELEMENTS = {"cpu": 2**21, "cuda": 3072 * 3072}
# Bytes of LoRAs that may lie on the device while a mix is written, and that stay there for the next one, as part of the
# placement's working memory. Eight LoRAs of rank 64 on the layers that fp8 multiplies fit, and eight of rank 16 stay;
# the rest comes tensor by tensor.
UPLOADS, KEPT = 4 * SLAB, SLAB
# Bytes of bases whose weights the fused kernel writes together: the first are written while the factors of the next are
# still being copied. A base in host memory counts as several, since it takes room on the device meanwhile.
BATCH, BROUGHT = 4 * SLAB, 4


@dataclass(frozen=True)
class Term:
    """One LoRA's part of a module's mix.

    Strengths are finite; a float stands for the decimal that it is written as, so that 0.1 and 0.2 add up to 0.3.
    """

    content: str  # identifies the deltas: `LoraFile.content`, a hash of the LoRA's file and of its config
    scale: float | Fraction
    deltas: Mapping[str, Sequence[Delta]]  # by parameter name
    # The strengths in parts of the module, by the first two words of their parameters' names.
    parts: Mapping[str, float | Fraction] = field(default_factory=dict)

    def scale_of(self, parameter: str) -> float | Fraction:
        """The strength at which a parameter is changed."""
        return self.parts.get(".".join(parameter.split(".")[:2]), self.scale) if self.parts else self.scale


def add_up(terms: Iterable[Term]) -> list[Term]:
    """The same sum with each content once, sorted by content, since a sum of floats depends on its order.

    Equal contents are added up exactly, then rounded: one at 0.4 and again at 0.3 has the bits of one at 0.7.
    """
    by_content: dict[str, list[Term]] = {}
    for term in terms:
        by_content.setdefault(term.content, []).append(term)
    sums = []
    for _, same in sorted(by_content.items()):
        named = {part for term in same for part in term.parts}
        parts = {part: float(sum(exact(term.parts.get(part, term.scale)) for term in same)) for part in named}
        sums.append(replace(same[0], scale=float(sum(exact(term.scale) for term in same)), parts=parts))
    return sums


class Recipe(NamedTuple):
    """The sum that is written into a live tensor: base + Σ scale · delta, in this order."""

    base: Tensor  # the pristine parameter, where it lies
    deltas: Sequence[tuple[float, Delta]]
    pristine: Mapping[str, Tensor]  # all parameters of that base, by name

    def rows(self, buffer: Tensor, bring: Bring) -> Iterator[tuple[int, Tensor]]:
        """The first row of each run, and the run, from top to bottom: always the same runs, and the same bits.

        Args:
            buffer: float32, of at least one row's elements; each run lies in it, and is overwritten by the next one.
                Without deltas it is not used: the base is the only run.
            bring: puts a tensor of a delta on the buffer's device.
        """
        base = self.base.to(buffer.device, non_blocking=True)
        if not self.deltas:
            yield 0, base
            return
        deltas = [(scale, delta.bind(base, self.pristine, bring)) for scale, delta in gather(self.deltas)]
        height = len(buffer) // base[0].numel()
        for start in range(0, len(base), height):
            rows = base[start : start + height]
            total = buffer[: rows.numel()].view(rows.shape).copy_(rows)
            for scale, delta in deltas:
                delta.add_to(total, start, scale)
            yield start, total


@dataclass(frozen=True)
class Place:
    """Where a weight lies: its values, and in fp8 the scale of each row."""

    values: Tensor  # [N, ...]
    scales: Tensor | None = None  # [N, 1]

    def another(self) -> "Place":
        """Uninitialised memory of the same shapes."""
        return Place(torch.empty_like(self.values), None if self.scales is None else torch.empty_like(self.scales))

    def equals(self, other: "Place") -> bool:
        """Whether both hold the same bits."""
        return fp8.same_bits(self.values, other.values) and (
            self.scales is None or fp8.same_bits(self.scales, other.scales)
        )


class LiveTensor:
    """One live tensor, the mix that it holds, and the recipe of that (both None while they are unknown)."""

    def __init__(self, values: Tensor, scales: Tensor | None = None) -> None:
        self.place = Place(values, scales)
        self.held: object = None
        self.recipe: Recipe | None = None
        self.rivals: list[LiveTensor] = []  # others that are written into the same memory

    def hold(self, mix: object, recipe: Recipe, batch: "Batch") -> bool:
        """Whether the recipe was added to a batch that will be written: unless this tensor holds its mix already."""
        if self.held == mix:
            self.recipe = recipe  # its deltas are equal, but may have been read anew: the old ones can go
            return False
        batch.append((self, mix, recipe))
        return True


# Tensors that are written together, each with its mix and recipe.
Batch = list[tuple[LiveTensor, object, Recipe]]


class Live:
    """A module that holds one mix at a time.

    Args:
        module: computes; its parameters are allocated and about to be overwritten.
        bases: pristine parameters by base name and parameter name, on the module's device or in host memory. A
            parameter that a base lacks is held at zero under it, and its deltas are left out: dev and schnell differ
            in their guidance embedder alone, and one whose layers are zero adds exactly nothing.
    """

    def __init__(self, module: nn.Module, bases: Mapping[str, Mapping[str, Tensor]]) -> None:
        self.module = module
        self._bases = bases
        # Zeros without memory, for parameters that a base lacks.
        self._zeros = {
            name: torch.zeros((), device=parameter.device).expand(parameter.shape)
            for name, parameter in module.named_parameters()
        }
        self._tensors = {
            name: LiveTensor(parameter.data) for name, parameter in module.named_parameters()
        } | _fp8_tensors(module)
        self._device = next(module.parameters()).device
        self._merged = merge.trusted(self._device)  # the dtypes that the fused kernel writes
        self._uploads = Uploads(self._device, UPLOADS)

    def quantized(self, chosen: Callable[[str], bool], *, in_turn: bool = False) -> "Live":
        """A second live module of the same bases whose chosen linear layers are fp8; all else is shared with this one.

        Args:
            chosen: which `nn.Linear`, by name, should become an fp8 layer if its sizes fit.
            in_turn: keep its fp8 weights in the memory of those that they replace: then only the module whose `hold`
                was called last holds its mix.
        """
        shared = {id(parameter): parameter for parameter in self.module.parameters()}
        twin = copy.copy(self)
        twin.module = copy.deepcopy(self.module, shared)
        fp8.replace_linears(twin.module, chosen, in_place=in_turn)
        own = _fp8_tensors(twin.module)
        twin._tensors = self._tensors | own
        for name, tensor in own.items() if in_turn else ():
            tensor.rivals.append(self._tensors[name])
            self._tensors[name].rivals.append(tensor)
        return twin

    def lacking(self, base: str, names: Iterable[str]) -> tuple[str, ...]:
        """Those of the named parameters that this base does not have."""
        return tuple(name for name in names if name not in self._bases[base])

    @torch.no_grad()
    @float32_products()
    def hold(self, base: str, terms: Sequence[Term]) -> int:
        """How many tensors had to be written to make the module hold base + terms, in whatever order these come.

        Anything may interrupt this (an error, a cancellation): the next call writes what is then unknown.
        """
        written, size = 0, 0
        batch: Batch = []
        try:
            for tensor, mix, recipe in self._wanted(base, add_up(terms)):
                if tensor.hold(mix, recipe, batch):
                    written += 1
                    size += recipe.base.nbytes * (1 if recipe.base.device == self._device else BROUGHT)
                if size >= BATCH or (batch and not self._merged):
                    self._write_batch(batch)
                    batch, size = [], 0
            self._write_batch(batch)
        finally:
            self._uploads.leave(KEPT)
        return written

    def _wanted(self, base: str, terms: Sequence[Term]) -> Iterator[tuple[LiveTensor, object, Recipe]]:
        """Each tensor with the mix that it shall hold, and the recipe of that."""
        pristine = self._bases[base]
        for name, tensor in self._tensors.items():
            own = pristine.get(name)
            touching = [
                (term, scale)
                for term in (() if own is None else terms)
                if name in term.deltas and (scale := term.scale_of(name)) != 0
            ]
            mix = (base, *[(term.content, scale) for term, scale in touching])
            deltas = [(scale, delta) for term, scale in touching for delta in term.deltas[name]]
            yield tensor, mix, Recipe(self._zeros[name] if own is None else own, deltas, pristine)

    def _write_batch(self, batch: Batch) -> None:
        """Write some tensors; meanwhile they are recorded to hold nothing."""
        for tensor, _, _ in batch:
            for it in (tensor, *tensor.rivals):
                it.held = it.recipe = None
        self._write([(tensor.place, recipe) for tensor, _, recipe in batch], self._uploads)
        for tensor, mix, recipe in batch:
            tensor.recipe, tensor.held = recipe, mix

    def _write(self, works: Iterable[tuple[Place, Recipe]], uploads: Uploads) -> None:
        """Write the recipes: by the fused kernel where it can, mere copies together, the rest run by run."""
        sums: list[merge.Sum] = []
        copies: list[tuple[Tensor, Tensor]] = []
        for place, recipe in works:
            merged = place.values.dtype in self._merged
            whole = merge.Sum(place.values, place.scales, recipe.base, recipe.deltas)
            if merged and whole.fits():
                sums.append(whole)
                continue
            if not recipe.deltas and place.scales is None:
                copies.append((place.values, recipe.base))
                continue
            for start, rows in recipe.rows(self._buffer, uploads):
                run = slice(start, start + len(rows))
                if place.scales is None:
                    place.values[run].copy_(rows)
                elif merged:  # quantised in one pass
                    merge.write([merge.Sum(place.values[run], place.scales[run], rows, ())], uploads)
                else:
                    fp8.write(rows, place.values[run], place.scales[run])
        merge.write(sums, uploads)
        if copies:
            torch._foreach_copy_(*map(list, zip(*copies, strict=True)), non_blocking=True)

    @property
    def names(self) -> list[str]:
        """The names of the tensors that are held."""
        return list(self._tensors)

    @torch.no_grad()
    @float32_products()
    def intact(self, name: str) -> bool:
        """Whether a tensor has the bits that it is recorded to hold; one that has not is written anew when needed.

        It is written once more, beside the first one, and compared. Its factors are copied from host memory once more,
        without the rest of their LoRA.
        """
        tensor = self._tensors[name]
        if tensor.held is None:
            return True
        again = tensor.place.another()
        self._write([(again, tensor.recipe)], Uploads(self._device, room=0))
        if again.equals(tensor.place):
            return True
        tensor.held = tensor.recipe = None
        self._uploads.leave(0)  # the factors there may be wrong
        return False

    @cached_property
    def _buffer(self) -> Tensor:
        """Float32 memory in which runs of rows are summed."""
        largest = max(zero.numel() for zero in self._zeros.values())
        return torch.empty(min(BUFFER_ELEMENTS[self._device.type], largest), device=self._device)


def _fp8_tensors(module: nn.Module) -> dict[str, LiveTensor]:
    """The weights of a module's fp8 layers, by the names that they have in the base."""
    layers = {name: layer for name, layer in module.named_modules() if isinstance(layer, fp8.Fp8Linear)}
    return {f"{name}.weight": LiveTensor(layer.weight, layer.scale) for name, layer in layers.items()}
