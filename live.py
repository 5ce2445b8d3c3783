"""Live weights: the module that computes, its tensors written from pristine bases and the deltas of LoRAs.

    live = round(base + Σ scale · delta)        summed in float32, rounded once

Bases are never written. The live tensors never move, so compiled graphs stay valid. Each live tensor remembers the mix
that it holds and forgets it before it is written: whatever interrupts a write, the next request repairs it. This module
knows where weights lie; it knows neither LoRA files nor pipelines.
"""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

import fp8
from deltas import BoundDelta, Delta, gather

# Elements of the float32 buffer in which a mix is summed: few enough to stay in the last-level cache (8 MiB on a CPU,
# 32 MiB of an H100's 50), so that only the base and the live tensor travel through memory; and no fewer, since each run
# of rows has its price: threads that wait for each other, kernels that are launched.
BUFFER_ELEMENTS = {"cpu": 2**21, "cuda": 2**23}


@dataclass(frozen=True)
class Term:
    """One LoRA of a mix, as far as one module is concerned."""

    content: str  # identifies the deltas: the SHA-256 of the LoRA's file
    scale: float
    deltas: Mapping[str, Sequence[Delta]]  # by parameter name


class LiveTensor:
    """One live tensor and the mix that it holds (None while that is unknown)."""

    def __init__(self, device: torch.device, write_rows: Callable[[int, Tensor], None]) -> None:
        self.held: object = None
        self.rivals: list[LiveTensor] = []  # others that are written into the same memory
        self._device = device
        self._write_rows = write_rows

    def hold(
        self,
        mix: object,
        base: Tensor,
        deltas: list[tuple[float, Delta]],
        pristine: Mapping[str, Tensor],
        buffer: Tensor,
    ) -> bool:
        """Write base + Σ scale · delta unless that is what this tensor holds; say whether it was written.

        Args:
            mix: what this is, to be compared with what is held.
            base: the pristine parameter.
            deltas: with their scales, in order.
            pristine: all parameters of that base, by name.
            buffer: float32, of at least one row's elements, on this tensor's device: to sum in.
        """
        if self.held == mix:
            return False
        for tensor in (self, *self.rivals):
            tensor.held = None
        base = base.to(self._device, non_blocking=True)
        if deltas:
            self._sum(base, [(scale, delta.bind(base, pristine)) for scale, delta in gather(deltas)], buffer)
        else:
            self._write_rows(0, base)
        self.held = mix
        return True

    def _sum(self, base: Tensor, deltas: list[tuple[float, BoundDelta]], buffer: Tensor) -> None:
        height = len(buffer) // base[0].numel()
        for start in range(0, len(base), height):
            rows = base[start : start + height]
            total = buffer[: rows.numel()].view(rows.shape).copy_(rows)
            for scale, delta in deltas:
                delta.add_to(total, start, scale)
            self._write_rows(start, total)


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
        # For each parameter a zero that takes no memory, held where a base lacks that parameter.
        self._zeros = {name: torch.zeros(()).expand(parameter.shape) for name, parameter in module.named_parameters()}
        self._tensors = {
            name: LiveTensor(parameter.device, partial(_write_rows, parameter.data))
            for name, parameter in module.named_parameters()
        } | _fp8_tensors(module)

    def quantized(self, chosen: Callable[[str], bool], *, in_turn: bool = False) -> "Live":
        """A second live module of the same bases whose chosen linear layers are fp8; all else is shared with this one.

        Args:
            chosen: which `nn.Linear`, by name, should become an fp8 layer if its sizes fit.
            in_turn: keep its fp8 weights in the memory of those that they replace: only one of the two modules holds
                its mix at a time, and `hold` makes it the one that is asked for.
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
    def hold(self, base: str, terms: Sequence[Term]) -> int:
        """Make the module hold base + terms, in this order; return how many tensors had to be written.

        Anything may interrupt this (an error, a cancellation): the next call writes what is then unknown.
        """
        pristine = self._bases[base]
        device = next(self.module.parameters()).device
        largest = max(zero.numel() for zero in self._zeros.values())
        buffer = torch.empty(min(BUFFER_ELEMENTS[device.type], largest), device=device)
        written = 0
        for name, tensor in self._tensors.items():
            touching = [term for term in terms if term.scale != 0 and name in term.deltas and name in pristine]
            mix = (base, *((term.content, term.scale) for term in touching))
            deltas = [(term.scale, delta) for term in touching for delta in term.deltas[name]]
            written += tensor.hold(mix, pristine.get(name, self._zeros.get(name)), deltas, pristine, buffer)
        return written


def _fp8_tensors(module: nn.Module) -> dict[str, LiveTensor]:
    """The weights of a module's fp8 layers, by the names that they have in the base."""
    layers = {name: layer for name, layer in module.named_modules() if isinstance(layer, fp8.Fp8Linear)}
    return {f"{name}.weight": LiveTensor(layer.weight.device, layer.write_rows) for name, layer in layers.items()}


def _write_rows(parameter: Tensor, start: int, rows: Tensor) -> None:
    parameter[start : start + len(rows)].copy_(rows)
