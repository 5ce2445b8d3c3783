"""Many weights at once, each base + Σ strength · up @ down: the operator of the fused kernel, and where it is trusted.

Nearly all LoRAs are nothing but such products. On a GPU one kernel reads base and factors, sums on tensor cores and
writes what is live, rounded once (`engine.merge_kernel`); torch's own operations would pass over each weight several
times. The operator is known to torch, so that its launches can be counted on tensors without memory.
"""

import functools
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine import fp8
from lora.deltas import Bring, LowRank, float32_products
from service import faults

# What the kernel writes, and the factors that it multiplies on tensor cores; others become float32.
DTYPES = (torch.bfloat16, fp8.E4M3)
FACTORS = (torch.bfloat16, torch.float16)
# Where weights and factors must begin: the kernel loads 16 bytes at a time.
ALIGNMENT = 16


@torch.library.custom_op("flux_sprites::merge", mutates_args=("lives", "scales"))
def merge(
    lives: Sequence[Tensor],
    scales: Sequence[Tensor],
    bases: Sequence[Tensor],
    ups: Sequence[Tensor],
    downs: Sequence[Tensor],
    strengths: Sequence[float],
) -> None:
    """Write live = round(base + Σ strength · up @ down), for weights of one dtype, in one launch.

    Sums are taken in float32, in the order of the factors. A weight's bits do not depend on which others are written
    with it.

    Args:
        lives: [N, K] each, contiguous; bfloat16, float16 or e4m3.
        scales: [N, 1] each, float32, for e4m3 alone: each row's largest magnitude over 448, as in `fp8.quantize_rows`.
        bases: [N, K] each, contiguous.
        ups: [N, rank] each, contiguous, all of one dtype: each weight's own in a row, and the ranks are those of all.
        downs: [rank, K] each, likewise.
        strengths: of each pair.
    """
    from engine.merge_kernel import launch  # Triton comes with torch where there is CUDA, and nowhere else

    launch(lives, scales, bases, ups, downs, strengths)


@merge.register_fake
def _(
    lives: Sequence[Tensor],
    scales: Sequence[Tensor],
    bases: Sequence[Tensor],
    ups: Sequence[Tensor],
    downs: Sequence[Tensor],
    strengths: Sequence[float],
) -> None:
    """Tensors without memory stay what they are."""


@dataclass(frozen=True)
class Sum:
    """A weight that the kernel can write: base + Σ scale · delta."""

    live: Tensor  # [N, K], what is written
    scales: Tensor | None  # [N, 1], where live is e4m3
    base: Tensor  # [N, K], on the device of live or in host memory
    terms: Sequence[tuple[float, LowRank]]

    @property
    def fits(self) -> bool:
        """Whether the kernel can write it: a matrix whose deltas are all low-rank and span it."""
        return (
            self.live.ndim == 2
            and self.live.numel() < 2**31  # the kernel counts elements in 32 bits
            and self.live.is_contiguous()
            and self.base.is_contiguous()
            and all(isinstance(delta, LowRank) and delta.height == len(self.live) for _, delta in self.terms)
        )

    def factors(self, bring: Bring) -> list[tuple[Tensor, Tensor]]:
        """The pairs of factors on the device, all of one dtype that the kernel reads."""
        pairs = [(bring(delta.up), bring(delta.down)) for _, delta in self.terms]
        dtypes = {factor.dtype for pair in pairs for factor in pair}
        if len(dtypes) < 2 and dtypes <= {*FACTORS, torch.float32}:
            return [(_aligned(up), _aligned(down)) for up, down in pairs]
        return [(up.float(), down.float()) for up, down in pairs]


def write(sums: Iterable[Sum], bring: Bring) -> None:
    """Write weights, in one launch for all that are of one kind.

    Args:
        sums: each fits.
        bring: puts a tensor of a delta on the device of the weights.
    """
    kinds: dict[tuple, list[tuple[Sum, Tensor, list[tuple[Tensor, Tensor]]]]] = defaultdict(list)
    for it in sums:
        base, pairs = it.base.to(it.live.device, non_blocking=True), it.factors(bring)
        ranks = tuple((up.shape[1], up.dtype) for up, _ in pairs)
        odd = base.shape[1] % ALIGNMENT != 0  # such rows are loaded in smaller pieces
        kinds[it.live.dtype, base.dtype, ranks, odd].append((it, _aligned(base), pairs))
    for several in kinds.values():
        torch.ops.flux_sprites.merge(
            [it.live for it, _, _ in several],
            [it.scales for it, _, _ in several if it.scales is not None],
            [base for _, base, _ in several],
            [up for _, _, pairs in several for up, _ in pairs],
            [down for _, _, pairs in several for _, down in pairs],
            [scale * delta.strength for it, _, _ in several for scale, delta in it.terms],
        )


def _aligned(tensor: Tensor) -> Tensor:
    """The same where the kernel can load it: contiguous, from a multiple of ALIGNMENT on."""
    return tensor.contiguous() if tensor.data_ptr() % ALIGNMENT == 0 else tensor.clone()


@functools.cache
def trusted(device: torch.device) -> frozenset[torch.dtype]:
    """The dtypes that the kernel may write on this device: those for which it agrees with torch's own operations.

    A kernel that cannot be compiled here, or comes to something else than rounding explains, is not used, and a line
    says so. On a CPU there is none; on "meta", which has no numbers, all count.
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
            wrong = faults.message(error)
        if wrong:
            print(f"LoRAs in {dtype} are written by torch's own operations, since the fused kernel cannot be: {wrong}.")
        else:
            right.add(dtype)
    return frozenset(right)


@torch.no_grad()
@float32_products()
def _disagreement(dtype: torch.dtype, device: torch.device) -> str:
    """How the kernel's results differ from torch's, on a few weights; nothing where rounding explains it."""
    generator = torch.Generator().manual_seed(0)

    def numbers(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=generator) / shape[-1] ** 0.5).to(device, torch.bfloat16)

    # The tile's own sizes and others; no LoRA, ranks of a whole part and not, several, several parts of one.
    for (rows, columns), ranks in {
        (256, 512): (16,),
        (320, 208): (),
        (96, 3072): (4, 32),
        (160, 336): (136, 8),
    }.items():
        base = numbers(rows, columns)
        ups, downs = [numbers(rows, rank) for rank in ranks], [numbers(rank, columns) for rank in ranks]
        exact = base.float()
        for up, down in zip(ups, downs, strict=True):
            exact += 0.7 * (up.float() @ down.float())
        live, scale = torch.full_like(base, torch.nan).to(dtype), torch.full_like(exact[:, :1], torch.nan)
        merge([live], [scale] if dtype is fp8.E4M3 else [], [base], ups, downs, [0.7] * len(ranks))
        expected, its_scale = fp8.quantize_rows(exact) if dtype is fp8.E4M3 else (exact.to(dtype), None)
        if its_scale is not None:
            if not torch.allclose(scale, its_scale, rtol=1e-5, atol=0):
                return f"scales of ranks {ranks} differ"
            live, expected = live.float() * scale, expected.float() * its_scale
        # What one rounding may come to the other way: a step of the dtype, beside sums that float32 has rounded.
        step = {torch.bfloat16: 2.0**-7, fp8.E4M3: 2.0**-3}[dtype]
        off = (live.float() - expected.float()).abs()
        tolerance = 1e-5 * exact.abs().amax() + (0 if its_scale is None else its_scale * 2.0**-9)
        if not (off <= step * expected.float().abs() + tolerance).all():
            return f"sums of ranks {ranks} differ by up to {off.max().item():.1e}"
        if (off > tolerance).float().mean() > 0.01:
            return f"too many of ranks {ranks} differ"
    return ""
