"""The Triton kernel that writes many weights at once: live = round(base + Σ strength · up @ down).

Each program writes a few rows of one weight, tile by tile. Factors of 16 bits are multiplied on tensor cores, where
their products are exact, and summed in float32; the strength multiplies that sum. In fp8 a row's scale has to be known
before its first value is written, so the tiles are computed twice; the second time they come from the L2 cache. Tiles
are fixed, nothing is tuned at run time: the bits of a weight depend on its base and its factors alone, not on what is
written beside it, in which process or when. This module is imported where there is a GPU, or Triton's interpreter.
"""

from collections.abc import Iterable, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.fp8 import LARGEST, SMALLEST

# Rows and columns of a tile, stages of the loop's pipeline, warps of a program: the best of twenty on an H200.
TILE = {"BLOCK_N": 32, "BLOCK_K": 128, "STAGES": 3, "num_warps": 4}
# Ranks that are multiplied at once: the least of these that holds all ranks of a sum; larger ones are taken in parts.
RANKS = (16, 32, 64)
# Bytes of ranks up to which the loop over parts is unrolled: the loads of all of them are under way at once, in shared
# memory, of which Ada's processors have 99 KB.
UNROLLED = 256
TYPES = {
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float8_e4m3fn: tl.float8e4nv,
}
# Words of the table: those of each weight, and those of each part of its sum.
WEIGHT_WORDS = tl.constexpr(5)
PART_WORDS = tl.constexpr(5)


@triton.jit
def _with_part(
    total: tl.tensor,
    part: tl.tensor,
    n: tl.tensor,
    k: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    FACTOR: tl.constexpr,
    RANK: tl.constexpr,
    ALIGN: tl.constexpr,
) -> tl.tensor:
    """total + strength · up[n] @ down[:, k], of one part: [n, k]."""
    up = tl.multiple_of(tl.load(part).to(tl.pointer_type(FACTOR)), 16)
    down = tl.multiple_of(tl.load(part + 1).to(tl.pointer_type(FACTOR)), 16)
    stride = tl.load(part + 2).to(tl.int32) * ALIGN
    width = tl.load(part + 3).to(tl.int32) * ALIGN
    strength = tl.load(part + 4).to(tl.int32).to(tl.float32, bitcast=True)
    r = tl.arange(0, RANK)
    up_at = up + n[:, None] * stride + r[None, :]
    down_at = down + r[:, None] * columns + k[None, :]
    if ALIGN == RANK:  # every part has the whole rank
        a = tl.load(up_at, mask=(n < rows)[:, None], other=0.0)
        b = tl.load(down_at, mask=(k < columns)[None, :], other=0.0)
    else:
        a = tl.load(up_at, mask=(n < rows)[:, None] & (r < width)[None, :], other=0.0)
        b = tl.load(down_at, mask=(r < width)[:, None] & (k < columns)[None, :], other=0.0)
    return total + strength * tl.dot(a, b, input_precision="ieee")


@triton.jit
def _summed(
    base: tl.tensor,
    parts: tl.tensor,
    n: tl.tensor,
    k: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    FACTOR: tl.constexpr,
    RANK: tl.constexpr,
    ALIGN: tl.constexpr,
    PARTS: tl.constexpr,
    UNROLL: tl.constexpr,
) -> tl.tensor:
    """base + Σ strength · up @ down of one tile, in float32: [n, k]."""
    at = n[:, None] * columns + k[None, :]
    total = tl.load(base + at, mask=(n < rows)[:, None] & (k < columns)[None, :], other=0.0).to(tl.float32)
    if UNROLL:
        for part in tl.static_range(PARTS):
            total = _with_part(total, parts + part * PART_WORDS, n, k, rows, columns, FACTOR, RANK, ALIGN)
    else:
        for part in range(PARTS):
            total = _with_part(total, parts + part * PART_WORDS, n, k, rows, columns, FACTOR, RANK, ALIGN)
    return total


@triton.jit
def merge_kernel(
    table: tl.tensor,
    BASE: tl.constexpr,
    LIVE: tl.constexpr,
    FACTOR: tl.constexpr,
    RANK: tl.constexpr,
    ALIGN: tl.constexpr,
    PARTS: tl.constexpr,
    UNROLL: tl.constexpr,
    SCALED: tl.constexpr,
    COLUMNS: tl.constexpr,
    LARGEST: tl.constexpr,
    SMALLEST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    """Program (i, j) writes the i-th BLOCK_N rows of the table's j-th weight, [rows, columns], if it has so many."""
    weight = table + tl.program_id(1) * (WEIGHT_WORDS + PARTS * PART_WORDS)
    parts = weight + WEIGHT_WORDS
    base = tl.multiple_of(tl.load(weight).to(tl.pointer_type(BASE)), 16)
    live = tl.multiple_of(tl.load(weight + 1).to(tl.pointer_type(LIVE)), 16)
    rows = tl.load(weight + 3).to(tl.int32)
    columns = tl.load(weight + 4).to(tl.int32) * COLUMNS
    if tl.program_id(0) * BLOCK_N >= rows:
        return
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inverse = tl.full((BLOCK_N,), 1.0, tl.float32)
    if SCALED:
        most = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
        for start in tl.range(0, columns, BLOCK_K, num_stages=STAGES):
            k = start + tl.arange(0, BLOCK_K)
            total = _summed(base, parts, n, k, rows, columns, FACTOR, RANK, ALIGN, PARTS, UNROLL)
            most = tl.maximum(most, tl.abs(total))
        scale = tl.div_rn(tl.maximum(tl.max(most, axis=1), SMALLEST), LARGEST)
        tl.store(tl.load(weight + 2).to(tl.pointer_type(tl.float32)) + n, scale, mask=n < rows)
        inverse = tl.div_rn(inverse, scale)
    for start in tl.range(0, columns, BLOCK_K, num_stages=STAGES):
        k = start + tl.arange(0, BLOCK_K)
        total = _summed(base, parts, n, k, rows, columns, FACTOR, RANK, ALIGN, PARTS, UNROLL)
        if SCALED:
            # total / scale, to the bit (Markstein): a division would take a fifth of the whole time.
            quotient = total * inverse[:, None]
            quotient = tl.fma(tl.fma(-quotient, scale[:, None], total), inverse[:, None], quotient)
            total = tl.clamp(quotient, -LARGEST, LARGEST, propagate_nan=tl.PropagateNan.ALL)
        at = n[:, None] * columns + k[None, :]
        tl.store(live + at, total.to(LIVE), mask=(n < rows)[:, None] & (k < columns)[None, :])


def variant(
    base: torch.dtype,
    live: torch.dtype,
    factor: torch.dtype,
    ranks: Sequence[int],
    columns: Iterable[int],
    *,
    scaled: bool,
) -> dict[str, object]:
    """The constants that the kernel is compiled for.

    Three dtypes, the ranks of each weight's pairs, the weights' columns, and whether rows are divided by their scales.
    """
    choices = RANKS[:1] if factor == torch.float32 else RANKS
    whole = next((rank for rank in choices if rank >= max(ranks, default=0)), choices[-1])
    parts = sum(-(-rank // whole) for rank in ranks)
    chosen = {
        "BASE": TYPES[base],
        "LIVE": TYPES[live],
        "FACTOR": TYPES[factor],
        "RANK": whole,
        "ALIGN": next(align for align in (whole, 8, 1) if all(rank % align == 0 for rank in ranks)),
        "PARTS": parts,
        "UNROLL": parts * whole * factor.itemsize <= UNROLLED,
        "SCALED": scaled,
        "COLUMNS": next(align for align in (16, 1) if all(it % align == 0 for it in columns)),
        "LARGEST": LARGEST,
        "SMALLEST": SMALLEST,
    }
    # So few registers that three programs find room on a processor, not two, though each keeps a little in memory then.
    return chosen | TILE | ({"maxnreg": 168} if scaled and 32 < parts * whole <= 64 else {})


def launch(
    lives: Sequence[Tensor],
    scales: Sequence[Tensor],
    bases: Sequence[Tensor],
    blocks: Sequence[Tensor],
    factors: Sequence[int],
    strengths: Sequence[float],
    dtype: torch.dtype,
) -> None:
    """Write all of the weights in one launch; see `engine.merge.merge`."""
    each, shapes = len(strengths) // len(lives), [base.shape for base in bases]
    columns = {shape[1] for shape in shapes}
    chosen = variant(bases[0].dtype, lives[0].dtype, dtype, factors[4 : 5 * each : 5], columns, scaled=bool(scales))
    whole, align, piece = chosen["RANK"], chosen["ALIGN"], chosen["COLUMNS"]
    starts = [block.data_ptr() for block in blocks]
    bits = torch.tensor(strengths, dtype=torch.float32).view(torch.int32).tolist()
    words: list[int] = []
    # The longest rows first: the programs that end last have less to do.
    for number in sorted(range(len(lives)), key=lambda number: -shapes[number][1]):
        scale = scales[number].data_ptr() if scales else 0
        height, width = shapes[number]
        words += bases[number].data_ptr(), lives[number].data_ptr(), scale, height, width // piece
        for term in range(number * each, (number + 1) * each):
            up_in, up, down_in, down, rank = factors[5 * term : 5 * term + 5]
            for first in range(0, rank, whole):
                up_at = starts[up_in] + up + first * dtype.itemsize
                down_at = starts[down_in] + down + first * width * dtype.itemsize
                words += up_at, down_at, rank // align, min(whole, rank - first) // align, bits[term]
    table = torch.tensor(words, dtype=torch.int64, pin_memory=lives[0].is_cuda).to(lives[0].device, non_blocking=True)
    most = max(height for height, _ in shapes)
    merge_kernel[(triton.cdiv(most, chosen["BLOCK_N"]), len(lives))](table, **chosen)
