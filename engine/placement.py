"""Where the weights lie: a plan made from the memory of the GPU and of the host, before anything is fetched or loaded.

Live weights are written from pristine bases, so a base may lie in pinned host memory, read at the speed of PCIe, or in
the page cache, where mapped files lie and the driver copies piece by piece. The bf16 and the fp8 live weights may lie
side by side, or take turns in the same memory; the T5 text encoder may stay on the GPU, or be copied layer by layer for
each new prompt. This module knows bytes, not tensors.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import cached_property
from itertools import product

from service.slabs import pinned_bytes

GB = 1e9
# Working memory: while a mix is written, LoRAs take up to 4.3 GB (`live.UPLOADS`), and the bases and factors that are
# copied for one batch up to 1.3 (`live.BATCH`, `merge.ALONE`); afterwards decoding 1440x1440 pixels takes 3.2, beside
# up to 1.1 of LoRAs that stay (`live.KEPT`). The rest is for the transformer's activations, for those that T5's CUDA
# graphs keep (a few hundred MB), for the safety models, and the allocator's slack.
WORK = int(7 * GB)
# Most bytes of activations that CUDA graphs of steps keep, where there is room beside all else. Those of a megapixel
# take 0.5 GB in fp8, of 1440x1440 pixels in bf16 0.9, and of a size that does not fit in another's as much again.
GRAPHS = int(2 * GB)
# T5's blocks on the GPU while T5 lies in host memory: the one that computes and the one that is copied. While T5 is
# mapped, as much is pinned for the copies.
T5_BLOCKS = 2
# The share of host memory that may be pinned: the rest is for LoRAs, the page cache and the server.
PINNED_SHARE = 0.6


class Precisions(StrEnum):
    """Which live weights there are."""

    BOTH = "bf16 and fp8 live weights side by side"
    IN_TURN = "bf16 and fp8 live weights in turn, in the same memory"
    BF16 = "bf16 live weights alone, since this GPU multiplies no fp8"
    FP8 = "fp8 live weights alone, since bf16 ones do not fit: every picture is drawn in fp8"


class Place(StrEnum):
    """Where weights may lie."""

    GPU = "on the GPU"
    PINNED = "in pinned host memory"
    MAPPED = "mapped in the page cache, not pinned, and so read more slowly"


@dataclass(frozen=True)
class Sizes:
    """Bytes of everything that is loaded."""

    bases: Mapping[str, Sequence[int]]  # tensor by tensor, pristine transformers by name, the most used first
    live: int  # all live transformers
    linears: int  # those that become fp8, half as large
    t5: Sequence[int]  # tensor by tensor
    t5_block: int
    rest: int  # CLIP, its pristine copy, the VAE

    @cached_property
    def pinned(self) -> Mapping[str, int]:
        """Bytes of each base, and of "t5", where it is pinned."""
        return {name: pinned_bytes(tensors) for name, tensors in {**self.bases, "t5": self.t5}.items()}


@dataclass(frozen=True)
class Placement:
    """The place of each model's weights, and the memory that all of them take."""

    bases: Mapping[str, Place]  # by model
    t5: Place
    precisions: Precisions
    gpu: int  # bytes of the GPU, WORK included
    host: int  # bytes of pinned host memory
    left: int = 0  # bytes of the GPU that stay free

    @classmethod
    def in_one_memory(cls, names: Iterable[str], *, fp8: bool) -> "Placement":
        """Everything on the device, with no bytes counted: on a CPU there is one memory."""
        precisions = Precisions.BOTH if fp8 else Precisions.BF16
        return cls(dict.fromkeys(names, Place.GPU), Place.GPU, precisions, gpu=0, host=0)

    def lines(self) -> list[str]:
        """The choices, and the memory that they take."""
        lying = {f"the base of {name}": place for name, place in self.bases.items()}
        lying |= {"T5" if self.t5 is Place.GPU else "T5 (moved layer by layer for each new prompt)": self.t5}
        by_place = {place: [name for name, its in lying.items() if its is place] for place in Place}
        return [
            str(self.precisions),
            *(f"{place}: {', '.join(names)}" for place, names in by_place.items() if names),
            f"{self.gpu / GB:.1f} GB of the GPU, {self.host / GB:.1f} GB of pinned host memory",
        ]

    def __str__(self) -> str:
        """One line."""
        return "; ".join(self.lines())


def plan(sizes: Sizes, gpu: int, host: int, *, fp8: bool) -> Placement:
    """The best placement that fits into a GPU's free bytes and the PINNED_SHARE of a host's; a ValueError if none does.

    The GPU is for the weights whose absence costs most. Without bf16 live weights a request for bf16 is drawn in fp8.
    Keeping T5 off the GPU costs 0.2 s for each new prompt; keeping a base off it costs 0.3 s for each new LoRA of
    that model; live weights in turn cost a swap at each change of precision. Weights off the GPU are pinned in the same
    order: T5, which each new prompt needs, then dev's base, then schnell's; the rest stays mapped.
    """
    placements = list(_placements(sizes, fp8=fp8))
    pinnable = int(PINNED_SHARE * host)
    for placement in placements:
        if placement.gpu <= gpu and placement.host <= pinnable:
            return replace(placement, left=gpu - placement.gpu)
    least = min(placements, key=lambda placement: (placement.gpu, placement.host))
    raise ValueError(
        f"The machine is too small: it has {gpu / GB:.1f} GB of free GPU memory and {pinnable / GB:.1f} GB of host "
        f"memory to pin; these models need at least {least.gpu / GB:.1f} GB and then {least.host / GB:.1f} GB."
    )


def _placements(sizes: Sizes, *, fp8: bool) -> Iterator[Placement]:
    """Every placement, the best first."""
    names = list(sizes.bases)
    choices = ((Precisions.BOTH, Precisions.IN_TURN), (Precisions.FP8,)) if fp8 else ((Precisions.BF16,),)
    for choice in choices:
        for t5, count, precisions in product((True, False), range(len(names), -1, -1), choice):
            on_gpu = {*names[:count], *(["t5"] if t5 else [])}
            off = [name for name in ("t5", *names) if name not in on_gpu]
            for pinned in range(len(off), -1, -1):
                places = dict.fromkeys(on_gpu, Place.GPU)
                places |= dict.fromkeys(off[:pinned], Place.PINNED) | dict.fromkeys(off[pinned:], Place.MAPPED)
                yield _placement(sizes, {name: places[name] for name in names}, places["t5"], precisions)


def _placement(sizes: Sizes, bases: Mapping[str, Place], t5: Place, precisions: Precisions) -> Placement:
    # Beside all bf16 weights, or in place of those of linear layers.
    fp8_bytes = {Precisions.BOTH: sizes.linears // 2, Precisions.FP8: -(sizes.linears // 2)}.get(precisions, 0)
    moving = [sizes.t5_block] * T5_BLOCKS
    gpu = sum(sum(sizes.bases[name]) for name, place in bases.items() if place is Place.GPU)
    gpu += sizes.live + fp8_bytes + sum(sizes.t5 if t5 is Place.GPU else moving) + sizes.rest + WORK
    host = sum(sizes.pinned[name] for name, place in {**bases, "t5": t5}.items() if place is Place.PINNED)
    host += pinned_bytes(moving) if t5 is Place.MAPPED else 0
    return Placement(bases, t5, precisions, gpu, host)
