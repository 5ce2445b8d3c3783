"""Many weights at once, each base + Σ strength · up @ down: the operator of the fused kernel, and where it is trusted.

Nearly all LoRAs are nothing but such products. On a GPU one kernel reads base and factors, sums on tensor cores and
writes the live weight, rounded once (`engine.merge_kernel`); torch's own operations would pass over each weight several
times. The kernel is an operator of torch, so that its launches can be counted on tensors without memory.
"""

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from engine import fp8
from lora.deltas import Delta, LowRank, float32_products, pack
from service import faults
from service.slabs import SLAB, Uploads

# Dtypes that the kernel writes, and dtypes of factors that it multiplies; others become float32.
DTYPES = (torch.bfloat16, fp8.E4M3)
FACTORS = {torch.bfloat16, torch.float16, torch.float32}
# Where weights and factors must begin: the kernel loads 16 bytes at a time.
ALIGNMENT = 16
# Bytes of factors that come by themselves, not in the block of their LoRA, and lie there until they are used.
ALONE = 2**28


@torch.library.custom_op("flux_sprites::merge", mutates_args=("lives", "scales"))
def merge(
    lives: Sequence[Tensor],
    scales: Sequence[Tensor],
    bases: Sequence[Tensor],
    blocks: Sequence[Tensor],
    factors: Sequence[int],
    strengths: Sequence[float],
    dtype: torch.dtype,
) -> None:
    """Write live = round(base + Σ strength · up @ down), for weights of one dtype, in one launch.

    Sums are taken in float32, in the order of the factors. A weight's bits do not depend on which others are written
    with it.

    Args:
        lives: [N, K] each, contiguous.
        scales: [N, 1] each, float32, for e4m3 alone: each row's largest magnitude over 448, as in `fp8.quantize_rows`.
        bases: [N, K] each, contiguous.
        blocks: memory in which factors lie: views of thousands of them would take longer to make than all the sums.
        factors: five numbers for each pair, weight after weight, with as many pairs of the same ranks for each: the
            block and the byte of up [N, rank], the block and the byte of down [rank, K], and the rank.
        strengths: of each pair.
        dtype: of all factors.
    """
    from engine.merge_kernel import launch  # Triton comes with torch where there is CUDA, and nowhere else

    launch(lives, scales, bases, blocks, factors, strengths, dtype)


merge.register_fake(lambda *_: None)  # on tensors without memory nothing is written


class Sum(NamedTuple):
    """A weight to be written: base + Σ scale · delta."""

    live: Tensor  # [N, K]
    scales: Tensor | None  # [N, 1], where live is e4m3
    base: Tensor  # [N, K], on the device of live or in host memory
    terms: Sequence[tuple[float, Delta]]

    def fits(self) -> bool:
        """Whether the kernel can write it: a matrix whose deltas are all low-rank and span it."""
        live = self.live
        return (
            live.ndim == 2
            and live.numel() < 2**31  # the kernel counts elements in 32 bits
            and live.is_contiguous()
            and self.base.is_contiguous()
            and all(isinstance(delta, LowRank) and delta.shape == live.shape for _, delta in self.terms)
        )


class Pair(NamedTuple):
    """Where the factors of a delta lie on the device."""

    up_in: Tensor
    up: int  # byte of that memory
    down_in: Tensor
    down: int
    rank: int
    dtype: torch.dtype


@dataclass
class Launch:
    """Weights of one kind, as the operator takes them."""

    dtype: torch.dtype  # of their factors
    lives: list[Tensor] = field(default_factory=list)
    scales: list[Tensor] = field(default_factory=list)
    bases: list[Tensor] = field(default_factory=list)
    blocks: dict[int, tuple[int, Tensor]] = field(default_factory=dict)  # by identity: its place in the list, and it
    factors: list[int] = field(default_factory=list)
    strengths: list[float] = field(default_factory=list)

    def add(self, it: Sum, base: Tensor, pairs: Iterable[Pair]) -> None:
        """Let a weight be written too."""
        self.lives.append(it.live)
        self.bases.append(base)
        if it.scales is not None:
            self.scales.append(it.scales)
        for up_in, up, down_in, down, rank, _ in pairs:
            place = self._place(up_in)
            self.factors += place, up, place if down_in is up_in else self._place(down_in), down, rank
        self.strengths += [scale * delta.strength for scale, delta in it.terms]

    def _place(self, block: Tensor) -> int:
        return self.blocks.setdefault(id(block), (len(self.blocks), block))[0]

    def run(self) -> None:
        """Write them."""
        blocks = [block for _, block in self.blocks.values()]
        merge(self.lives, self.scales, self.bases, blocks, self.factors, self.strengths, self.dtype)


def write(sums: Iterable[Sum], uploads: Uploads) -> None:
    """Write weights that fit, in one launch for all that are of one kind; uploads bring the factors to their device."""
    launches: dict[tuple, Launch] = {}
    alone = 0  # bytes of factors that these launches keep on the device
    for it in sums:
        base = _aligned(it.base.to(it.live.device, non_blocking=True))
        pairs = [_pair(delta, uploads) for _, delta in it.terms]
        if len({pair.dtype for pair in pairs}) > 1:
            pairs = [_brought(delta, uploads, torch.float32) for _, delta in it.terms]
        alone += sum(pair.up_in.nbytes + pair.down_in.nbytes for pair in pairs if pair.up_in is not pair.down_in)
        dtype = pairs[0].dtype if pairs else torch.bfloat16
        # Rows of other lengths cannot be loaded in pieces as large.
        kind = (it.live.dtype, base.dtype, dtype, base.shape[1] % ALIGNMENT == 0, *[pair.rank for pair in pairs])
        if kind not in launches:
            launches[kind] = Launch(dtype)
        launches[kind].add(it, base, pairs)
        if alone >= ALONE:
            for launch in launches.values():
                launch.run()
            launches, alone = {}, 0
    for launch in launches.values():
        launch.run()


def _pair(delta: LowRank, uploads: Uploads) -> Pair:
    """Where a delta's factors lie on the device, in a dtype that the kernel reads."""
    it = delta.layout
    if it is not None and it.dtype in FACTORS and it.up % ALIGNMENT == it.down % ALIGNMENT == 0:
        memory = uploads.memory(it.block, it.end)
        if memory is not None:
            return Pair(memory, it.up, memory, it.down, it.rank, it.dtype)
    same = delta.up.dtype == delta.down.dtype and delta.up.dtype in FACTORS
    return _brought(delta, uploads, delta.up.dtype if same else torch.float32)


def _brought(delta: LowRank, uploads: Uploads, dtype: torch.dtype) -> Pair:
    """A delta's factors on the device, each in memory of its own."""
    up, down = (_aligned(uploads(it).to(dtype)) for it in (delta.up, delta.down))
    return Pair(up, 0, down, 0, up.shape[1], dtype)


def _aligned(tensor: Tensor) -> Tensor:
    """An equal tensor where the kernel can load it."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % ALIGNMENT == 0 else tensor.clone()


@functools.cache
def trusted(device: torch.device) -> frozenset[torch.dtype]:
    """The dtypes that the kernel may write on this device: those for which it agrees with torch's own operations.

    A kernel that cannot be compiled here, or whose results differ by more than rounding, is not used, and a line says
    so. On a CPU there is none; on "meta", which has no numbers, all count.
    """
    if device.type != "cuda":
        return frozenset(DTYPES if device.type == "meta" else ())
    right = set()
    for dtype in DTYPES:
        if dtype is fp8.E4M3 and not fp8.supported(device):
            continue
        try:
            wrong = _disagreement(dtype, device)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a compiler that is missing or fails says so in many ways
            wrong = faults.message(error).splitlines()[0]
        if wrong:
            print(f"LoRAs in {dtype} are written by torch's own operations, since the fused kernel cannot be: {wrong}.")
        else:
            right.add(dtype)
    return frozenset(right)


@torch.no_grad()
@float32_products()
def _disagreement(dtype: torch.dtype, device: torch.device) -> str:
    """How the kernel's results differ from torch's by more than rounding, on a few weights; empty if they do not."""
    generator = torch.Generator().manual_seed(0)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) / shape[-1] ** 0.5

    # Whole tiles and others; no LoRA, one, several, and one in parts. This compiles the kernels of most requests.
    sizes = ((320, 208), (256, 512), (128, 1040), (96, 3072), (160, 336), (96, 336), (64, 720), (64, 80))
    usual = ((), (16,), (32,), (64,), (16, 16), (32, 16), (136, 4), (8,))
    for (rows, columns), ranks in zip(sizes, usual, strict=True):
        factor = torch.float32 if ranks == (8,) else torch.bfloat16
        base = numbers(rows, columns).to(device, torch.bfloat16)
        pairs = [[numbers(rows, rank).to(factor), numbers(rank, columns).to(factor)] for rank in ranks]
        factors = {str(index): (LowRank(0, rows, *pair, 1.0),) for index, pair in enumerate(pairs)}
        deltas = [delta for (delta,) in pack(factors).values()]  # in host memory, as a LoRA's are
        exact = base.float()
        for delta in deltas:
            exact += 0.7 * (delta.up.to(device).float() @ delta.down.to(device).float())
        live, scale = torch.full_like(base, torch.nan).to(dtype), torch.full_like(exact[:, :1], torch.nan)
        whole = Sum(live, scale if dtype is fp8.E4M3 else None, base, [(0.7, delta) for delta in deltas])
        write([whole], Uploads(device, room=SLAB))
        expected, its_scale = fp8.quantize_rows(exact) if dtype is fp8.E4M3 else (exact.to(dtype), None)
        if its_scale is not None:
            if not torch.allclose(scale, its_scale, rtol=1e-5, atol=0):
                return f"scales of ranks {ranks} differ"
            live, expected = live.float() * scale, expected.float() * its_scale
        # A number may be rounded the other way, which is a step of the dtype; float32 rounds the sums before.
        step = {torch.bfloat16: 2.0**-7, fp8.E4M3: 2.0**-3}[dtype]
        off = (live.float() - expected.float()).abs()
        tolerance = 1e-5 * exact.abs().amax() + (0 if its_scale is None else its_scale * 2.0**-9)
        if not (off <= step * expected.float().abs() + tolerance).all():
            return f"sums of ranks {ranks} differ by up to {off.max().item():.1e}"
        if (off > tolerance).float().mean() > 0.01:
            return f"too many of ranks {ranks} differ"
    return ""
