"""Where the weights lie: a plan made from the memory of the GPU and of the host, before anything is loaded.

Live weights are written from pristine bases, so a base need not lie on the GPU: pinned host memory serves, at the speed
of PCIe. The bf16 and the fp8 live weights may lie side by side, or take turns in the same memory; the T5 text encoder
may stay on the GPU, or come over block by block for each new prompt. This module knows bytes, not tensors.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from itertools import product

GB = 1e9
# Working memory: decoding 1440x1440 pixels holds a few layers of 256 channels, 1 GB each, at a time. The transformer's
# activations, a mix being summed, the safety models and the allocator's slack take less than that again.
WORK = int(7 * GB)
# T5's blocks on the GPU while T5 lies in host memory: the one that computes and the one that is copied.
T5_BLOCKS = 2


class Precisions(StrEnum):
    """Which live weights there are."""

    BOTH = "bf16 and fp8 live weights side by side"
    IN_TURN = "bf16 and fp8 live weights in turn, in the same memory"
    BF16 = "bf16 live weights alone, since this GPU multiplies no fp8"
    FP8 = "fp8 live weights alone, since bf16 ones do not fit: every picture is drawn in fp8"


@dataclass(frozen=True)
class Sizes:
    """Bytes of everything that is loaded."""

    bases: Mapping[str, int]  # pristine transformers by name, the most used first
    live: int  # all live transformers
    linears: int  # what of these becomes fp8, half as large
    t5: int
    t5_block: int
    rest: int  # CLIP, its pristine copy, the VAE


@dataclass(frozen=True)
class Placement:
    """What lies where."""

    on_gpu: frozenset[str]  # bases on the GPU; the others lie in pinned host memory
    t5_on_gpu: bool
    precisions: Precisions
    gpu: int  # bytes that it takes of the GPU, WORK included
    host: int  # bytes that it takes of pinned host memory

    def __str__(self) -> str:
        """What was chosen, and what it takes."""
        bases = f"bases of {' and '.join(sorted(self.on_gpu))} on the GPU" if self.on_gpu else "no base on the GPU"
        t5 = "T5 on the GPU" if self.t5_on_gpu else "T5 in host memory, moved block by block for each new prompt"
        takes = f"{self.gpu / GB:.1f} GB of the GPU, {self.host / GB:.1f} GB of pinned host memory"
        return f"{bases}; {self.precisions}; {t5}; {takes}"


def plan(sizes: Sizes, gpu: int, host: int, *, fp8: bool) -> Placement:
    """The best placement that fits.

    What costs most, most often, is kept on the GPU first. Without bf16 live weights a request for bf16 is drawn in fp8.
    Keeping T5 off the GPU costs 0.4 s for each new prompt; keeping a base off it costs up to 1 s for each new LoRA of
    that model; live weights in turn cost a swap at each change of precision.

    Args:
        sizes: what is loaded.
        gpu: free bytes of the GPU.
        host: bytes of host memory that may be pinned.
        fp8: whether this GPU multiplies fp8.

    Raises:
        ValueError: a sentence, where nothing fits.
    """
    placements = list(_placements(sizes, fp8=fp8))
    for placement in placements:
        if placement.gpu <= gpu and placement.host <= host:
            return placement
    least = min(placements, key=lambda placement: placement.gpu)
    raise ValueError(
        f"This machine is too small: it has {gpu / GB:.1f} GB of free GPU memory and {host / GB:.1f} GB of host memory "
        f"to pin; these models need at least {least.gpu / GB:.1f} GB and then {least.host / GB:.1f} GB."
    )


def _placements(sizes: Sizes, *, fp8: bool) -> Iterator[Placement]:
    """Every placement, the best first."""
    names = list(sizes.bases)
    on_gpu = [frozenset(names[:count]) for count in range(len(names), -1, -1)]
    choices = ((Precisions.BOTH, Precisions.IN_TURN), (Precisions.FP8,)) if fp8 else ((Precisions.BF16,),)
    for choice in choices:
        for t5_on_gpu, bases, precisions in product((True, False), on_gpu, choice):
            yield _placement(sizes, bases, t5_on_gpu, precisions)


def _placement(sizes: Sizes, on_gpu: frozenset[str], t5_on_gpu: bool, precisions: Precisions) -> Placement:
    live = {
        Precisions.BOTH: sizes.live + sizes.linears // 2,
        Precisions.IN_TURN: sizes.live,
        Precisions.BF16: sizes.live,
        Precisions.FP8: sizes.live - sizes.linears // 2,
    }[precisions]
    t5 = sizes.t5 if t5_on_gpu else T5_BLOCKS * sizes.t5_block
    gpu = sum(sizes.bases[name] for name in on_gpu) + live + t5 + sizes.rest + WORK
    host = sum(size for name, size in sizes.bases.items() if name not in on_gpu) + (0 if t5_on_gpu else sizes.t5)
    return Placement(on_gpu, t5_on_gpu, precisions, gpu, host)
