"""One experiment: live = round(base + sum strength * up @ down) by fused Triton kernels, against engine.live."""

import argparse
import json
import os
import subprocess
import sys
import threading
import time
import traceback
from collections import Counter
from statistics import median

START = time.perf_counter()
SMALL = "--small" in sys.argv
if SMALL:
    os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("TRITON_CACHE_DIR", os.path.join(__import__("tempfile").gettempdir(), "swap_kernel_cache"))
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import numpy as np
import torch
import triton
import triton.language as tl

# ------------------------------------------------------------------------------------------------------------- kernels
# table: int64 [n, 6]: base, out, scale, amax, first term, last term. terms: int64 [m, 3]: up, down, rank (or rank / 8).


@triton.jit
def weigh(bits, n, k, K, PER: tl.constexpr):
    """Each element's part of the sum over 32-bit words of word * (odd weight of its position), modulo 2^32."""
    e = n[:, None] * K + k[None, :]
    weight = (e // PER).to(tl.uint32) * 2654435761 | 1
    return (bits * weight) << ((e % PER) * (32 // PER)).to(tl.uint32)


@triton.jit
def sum_deltas(terms, strengths, first, last, n, k, N, K, FT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
               RB: tl.constexpr, R8: tl.constexpr, EVEN: tl.constexpr, EXACT_R: tl.constexpr, ONE: tl.constexpr):
    r = tl.arange(0, RB)
    if ONE:  # exactly one LoRA, all of whose rank is one chunk
        up = tl.multiple_of(tl.load(terms + first * 3).to(tl.pointer_type(FT)), 16)
        down = tl.multiple_of(tl.load(terms + first * 3 + 1).to(tl.pointer_type(FT)), 16)
        rank = tl.load(terms + first * 3 + 2).to(tl.int32)
        if R8:
            rank = rank * 8
        up_at = up + (n[:, None] * rank + r[None, :])
        down_at = down + (r[:, None] * K + k[None, :])
        if EXACT_R and EVEN:
            a = tl.load(up_at)
            b = tl.load(down_at)
        else:
            a = tl.load(up_at, mask=(n < N)[:, None] & (r < rank)[None, :], other=0.0)
            b = tl.load(down_at, mask=(r < rank)[:, None] & (k < K)[None, :], other=0.0)
        return tl.load(strengths + first) * tl.dot(a, b)
    delta = tl.zeros((BN, BK), tl.float32) * -1.0  # -0.0, which adds nothing to a -0.0 either
    for t in range(first, last):
        up = tl.multiple_of(tl.load(terms + t * 3).to(tl.pointer_type(FT)), 16)
        down = tl.multiple_of(tl.load(terms + t * 3 + 1).to(tl.pointer_type(FT)), 16)
        rank = tl.load(terms + t * 3 + 2).to(tl.int32)
        if R8:
            rank = rank * 8
        strength = tl.load(strengths + t)
        product = tl.zeros((BN, BK), tl.float32)
        for r0 in range(0, rank, RB):
            rr = r0 + r
            up_at = up + (n[:, None] * rank + rr[None, :])
            down_at = down + (rr[:, None] * K + k[None, :])
            if EXACT_R and EVEN:
                a = tl.load(up_at)
                b = tl.load(down_at)
            elif EVEN:
                a = tl.load(up_at, mask=(rr < rank)[None, :], other=0.0)
                b = tl.load(down_at, mask=(rr < rank)[:, None], other=0.0)
            else:
                a = tl.load(up_at, mask=(n < N)[:, None] & (rr < rank)[None, :], other=0.0)
                b = tl.load(down_at, mask=(rr < rank)[:, None] & (k < K)[None, :], other=0.0)
            product = tl.dot(a, b, product)
        delta += strength * product
    return delta


@triton.jit(do_not_specialize=["first_tensor"])
def tile_kernel(table, terms, strengths, sums, first_tensor, N, K, MODE: tl.constexpr, BT: tl.constexpr,
                OT: tl.constexpr, FT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, RB: tl.constexpr,
                R8: tl.constexpr, EVEN: tl.constexpr, EXACT_R: tl.constexpr, ONE: tl.constexpr, CHK: tl.constexpr, DIV: tl.constexpr):
    """MODE 0: write rounded. 1: the rows' largest magnitude into amax. 2: quantise by amax."""
    row = table + (first_tensor + tl.program_id(1)) * 6
    tiles = tl.cdiv(K, BK)
    tile = tl.program_id(0)
    i = tile // tiles
    j = tile % tiles
    n = i * BN + tl.arange(0, BN)
    k = j * BK + tl.arange(0, BK)
    at = n[:, None] * K + k[None, :]
    inside = (n < N)[:, None] & (k < K)[None, :]
    base = tl.multiple_of(tl.load(row).to(tl.pointer_type(BT)), 16)
    if EVEN:
        x = tl.load(base + at)
    else:
        x = tl.load(base + at, mask=inside, other=0.0)
    first = tl.load(row + 4).to(tl.int32)
    last = tl.load(row + 5).to(tl.int32)
    delta = sum_deltas(terms, strengths, first, last, n, k, N, K, FT, BN, BK, RB, R8, EVEN, EXACT_R, ONE)
    total = x.to(tl.float32) + delta
    if MODE == 1:
        amax = tl.load(row + 3).to(tl.pointer_type(tl.int32))
        most = tl.max(tl.abs(total), axis=1)
        tl.atomic_max(amax + n, most.to(tl.int32, bitcast=True), mask=n < N, sem="relaxed")
    else:
        out = tl.multiple_of(tl.load(row + 1).to(tl.pointer_type(OT)), 16)
        if MODE == 2:
            amax = tl.load(row + 3).to(tl.pointer_type(tl.float32))
            most = tl.load(amax + n, mask=n < N, other=1.0)
            scale = tl.math.div_rn(tl.maximum(most, 5.266214691683848e-36), 448.0)
            if j == 0:
                tl.store(tl.load(row + 2).to(tl.pointer_type(tl.float32)) + n, scale, mask=n < N)
            wide = tl.broadcast_to(scale[:, None], (BN, BK))
            if DIV:
                total = tl.math.div_rn(total, wide)
            else:
                total = total * tl.broadcast_to((1.0 / scale)[:, None], (BN, BK))
            total = tl.minimum(tl.maximum(total, -448.0), 448.0)
        y = total.to(OT)
        if EVEN:
            tl.store(out + at, y)
        else:
            tl.store(out + at, y, mask=inside)
        if CHK:
            if OT.primitive_bitwidth == 16:
                bits = y.to(tl.uint16, bitcast=True).to(tl.uint32)
                part = weigh(bits, n, k, K, 2)
            else:
                bits = y.to(tl.uint8, bitcast=True).to(tl.uint32)
                part = weigh(bits, n, k, K, 4)
            if not EVEN:
                part = tl.where(inside, part, 0)
            whole = tl.sum(tl.sum(part, axis=1), axis=0)
            tl.atomic_add(sums + first_tensor + tl.program_id(1), whole.to(tl.int32, bitcast=True), sem="relaxed")


@triton.jit(do_not_specialize=["first_tensor"])
def rows_kernel(table, terms, strengths, sums, first_tensor, N, K, BT: tl.constexpr, OT: tl.constexpr,
                FT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, RB: tl.constexpr, R8: tl.constexpr,
                EVEN: tl.constexpr, EXACT_R: tl.constexpr, ONE: tl.constexpr, CHK: tl.constexpr, DIV: tl.constexpr):
    """fp8 in one launch: each program goes over its BN rows twice."""
    row = table + (first_tensor + tl.program_id(1)) * 6
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    base = tl.multiple_of(tl.load(row).to(tl.pointer_type(BT)), 16)
    first = tl.load(row + 4).to(tl.int32)
    last = tl.load(row + 5).to(tl.int32)
    most = tl.zeros((BN, BK), tl.float32)
    for k0 in range(0, K, BK):
        k = k0 + tl.arange(0, BK)
        at = n[:, None] * K + k[None, :]
        if EVEN:
            x = tl.load(base + at, eviction_policy="evict_last")
        else:
            x = tl.load(base + at, mask=(n < N)[:, None] & (k < K)[None, :], other=0.0)
        delta = sum_deltas(terms, strengths, first, last, n, k, N, K, FT, BN, BK, RB, R8, EVEN, EXACT_R, ONE)
        most = tl.maximum(most, tl.abs(x.to(tl.float32) + delta))
    scale = tl.math.div_rn(tl.maximum(tl.max(most, axis=1), 5.266214691683848e-36), 448.0)
    tl.store(tl.load(row + 2).to(tl.pointer_type(tl.float32)) + n, scale, mask=n < N)
    wide = tl.broadcast_to(scale[:, None], (BN, BK))
    inverse = tl.broadcast_to((1.0 / scale)[:, None], (BN, BK))
    out = tl.multiple_of(tl.load(row + 1).to(tl.pointer_type(OT)), 16)
    whole = tl.zeros((BN, BK), tl.uint32)
    for k0 in range(0, K, BK):
        k = k0 + tl.arange(0, BK)
        at = n[:, None] * K + k[None, :]
        inside = (n < N)[:, None] & (k < K)[None, :]
        if EVEN:
            x = tl.load(base + at, eviction_policy="evict_first")
        else:
            x = tl.load(base + at, mask=inside, other=0.0)
        delta = sum_deltas(terms, strengths, first, last, n, k, N, K, FT, BN, BK, RB, R8, EVEN, EXACT_R, ONE)
        total = x.to(tl.float32) + delta
        if DIV:
            total = tl.math.div_rn(total, wide)
        else:
            total = total * inverse
        y = tl.minimum(tl.maximum(total, -448.0), 448.0).to(OT)
        if EVEN:
            tl.store(out + at, y)
        else:
            tl.store(out + at, y, mask=inside)
        if CHK:
            if OT.primitive_bitwidth == 16:
                part = weigh(y.to(tl.uint16, bitcast=True).to(tl.uint32), n, k, K, 2)
            else:
                part = weigh(y.to(tl.uint8, bitcast=True).to(tl.uint32), n, k, K, 4)
            if not EVEN:
                part = tl.where(inside, part, 0)
            whole += part
    if CHK:
        s = tl.sum(tl.sum(whole, axis=1), axis=0)
        tl.atomic_add(sums + first_tensor + tl.program_id(1), s.to(tl.int32, bitcast=True), sem="relaxed")


@triton.jit(do_not_specialize=["first_tensor"])
def verify_kernel(table, sums, first_tensor, words, BLOCK: tl.constexpr):
    """The same sum over what lies in memory."""
    index = first_tensor + tl.program_id(1)
    out = tl.multiple_of(tl.load(table + index * 6 + 1).to(tl.pointer_type(tl.uint32)), 16)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    word = tl.load(out + at, mask=at < words, other=0)
    whole = tl.sum(word * (at.to(tl.uint32) * 2654435761 | 1), axis=0)
    tl.atomic_add(sums + index, whole.to(tl.int32, bitcast=True), sem="relaxed")


# --------------------------------------------------------------------------------------------------------- launching
H16 = torch.float16
BT_, OT16, OT8 = (tl.float16, tl.float16, tl.float16) if SMALL else (tl.bfloat16, tl.bfloat16, tl.float8e4nv)
BASE = H16 if SMALL else torch.bfloat16
TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
TILE = (64, 128, 8)
# Production tiles: rows, columns, warps.
TILES = [(64, 128, 4), (64, 128, 8), (128, 128, 8), (64, 64, 4), (32, 128, 4), (32, 256, 8)]
ROWS = [(16, 256, 4), (16, 256, 8), (32, 128, 4), (32, 128, 8), (32, 256, 8), (64, 128, 8)]
ROWS_DEFAULT = (32, 256, 8)
if SMALL:
    TILE, TILES, ROWS, ROWS_DEFAULT = (32, 64, 4), [(32, 64, 4)], [(32, 64, 4)], (32, 64, 4)
BLOCK = 256 if SMALL else 8192
MODES = {"bf16": (0,), "two": (1, 2)}


def constants(kind, tile, rb, ranks, shape, ft, chk=False, div=True, one=True):
    N, K = shape
    r8 = all(rank % 8 == 0 for rank in ranks)
    return dict(BT=BT_, OT=OT16 if kind == "bf16" else OT8, FT=TYPES[ft], BN=tile[0], BK=tile[1], RB=rb, R8=r8,
                EVEN=N % tile[0] == 0 and K % tile[1] == 0, EXACT_R=all(rank % rb == 0 for rank in ranks),
                ONE=one and len(ranks) == 1 and ranks[0] <= rb, CHK=chk,
                DIV=div, num_warps=tile[2], num_stages=1 if max(ranks, default=1) <= rb else 2)


def chunk(ranks):
    most = max(ranks, default=16)
    return 16 if most <= 16 else 32 if most <= 32 else 64


def launch(kind, args, count, first, shape, const, warm=False):
    """args: table, terms, strengths, sums."""
    N, K = shape
    made = []
    if kind == "rows":
        grid = (triton.cdiv(N, const["BN"]), count)
        calls = [(rows_kernel, const)]
    else:
        grid = (triton.cdiv(N, const["BN"]) * triton.cdiv(K, const["BK"]), count)
        calls = [(tile_kernel, const | {"MODE": mode}) for mode in MODES[kind]]
    for kernel, const_ in calls:
        if warm:
            made.append(kernel.warmup(*args, first, N, K, grid=grid, **const_))
        else:
            made.append(kernel[grid](*args, first, N, K, **const_))
    return made


CASES = [(16,), (1,), (4,), (64,), (128,), (16, 16), (4, 16, 64, 128, 1, 16, 32, 8), (128, 128), ()]
ODD, EVEN_SHAPE, BIG = (200, 328), (256, 512), (3072, 3072)
SQUARE = (3072, 3072)
KINDS = ("bf16", "rows", "two")


def default_tile(kind):
    return ROWS_DEFAULT if kind == "rows" else TILE


def plan():
    """What is compiled beforehand: (kind, constants, shape)."""
    seen = []

    def add(kind, tile, rb, ranks, shape, ft=torch.bfloat16, **more):
        it = (kind, constants(kind, tile, rb, ranks, shape, ft, **more), shape)
        if it not in seen:
            seen.append(it)

    for kind in KINDS:
        for ranks, rb in (((16,), 16), ((64,), 64)):
            add(kind, default_tile(kind), rb, ranks, SQUARE)
        add(kind, default_tile(kind), 16, (16,), SQUARE, chk=True)
        add(kind, default_tile(kind), 64, (16, 64), SQUARE)
        if kind != "bf16":
            add(kind, default_tile(kind), 16, (16,), SQUARE, div=False)
    for kind in KINDS:
        for tile in ROWS if kind == "rows" else TILES:
            for ranks, rb in (((16,), 16), ((64,), 64)):
                add(kind, tile, rb, ranks, SQUARE)
    for kind in KINDS:
        for ft in (torch.bfloat16, torch.float16):
            for shape in (EVEN_SHAPE, ODD):
                for ranks in CASES if ft is torch.bfloat16 else CASES[:1]:
                    add(kind, default_tile(kind), chunk(ranks), ranks, shape, ft, chk=True)
    for kind in KINDS:
        add(kind, default_tile(kind), 64, (64, 64), SQUARE)
        add(kind, default_tile(kind), 64, (128,), SQUARE)
        add(kind, default_tile(kind), 16, (), SQUARE)
        add(kind, default_tile(kind), 16, (16,), SQUARE, one=False)
        add(kind, default_tile(kind), 16, (16, 16), SQUARE)
    return seen


def warm(k, of):
    """Compile a share of the plan into Triton's cache on disk, for the main process."""
    for kind, const, shape in plan()[k::of]:
        try:
            launch(kind, (torch.int64, torch.int64, torch.float32, torch.int32), 2, 0, shape, const, warm=True)
        except Exception:
            traceback.print_exc()


# ------------------------------------------------------------------------------------------------------------ results
class Out:
    def __init__(self, path):
        self.file = open(path, "a")

    def __call__(self, name, **values):
        line = json.dumps({"name": name, "at_s": round(time.perf_counter() - START, 2), **values}, default=str)
        self.file.write(line + "\n")
        self.file.flush()
        print(line[:400], flush=True)


CUDA = torch.cuda.is_available() and not SMALL
DEVICE = torch.device("cuda" if CUDA else "cpu")


def sync():
    if CUDA:
        torch.cuda.synchronize()


def timed(work, n=5, before=None):
    """Milliseconds: until work returns, until the device is done, and between events around it."""
    host, wall, gpu = [], [], []
    n = 1 if SMALL else n
    for turn in range(n) if SMALL else range(n + 1):
        if before:
            before()
        sync()
        if CUDA:
            events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        start = time.perf_counter()
        if CUDA:
            events[0].record()
        work()
        if CUDA:
            events[1].record()
        called = time.perf_counter()
        sync()
        done = time.perf_counter()
        if turn or SMALL:
            host.append(1e3 * (called - start))
            wall.append(1e3 * (done - start))
            gpu.append(events[0].elapsed_time(events[1]) if CUDA else 0.0)
    return {"call_ms": round(median(host), 3), "wall_ms": round(median(wall), 3), "wall_least_ms": round(min(wall), 3),
            "wall_most_ms": round(max(wall), 3), "gpu_ms": round(median(gpu), 3), "n": n}


# --------------------------------------------------------------------------------------------------------------- data
def names_and_shapes():
    """FLUX.1's block linears, grouped by shape; checked against FluxTransformer2DModel's default config."""
    d, m = 3072, 12288
    if SMALL:
        d, m = 64, 128
    double = {f"attn.{q}": (d, d) for q in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj",
                                            "add_v_proj", "to_add_out")}
    for ff in ("ff", "ff_context"):
        double |= {f"{ff}.net.0.proj": (m, d), f"{ff}.net.2": (d, m)}
    single = {"proj_mlp": (m, d), "proj_out": (d, m + d)} | {f"attn.to_{q}": (d, d) for q in "qkv"}
    blocks = (1, 1) if SMALL else (19, 38)
    found = {f"transformer_blocks.{i}.{name}": s for i in range(blocks[0]) for name, s in double.items()}
    found |= {f"single_transformer_blocks.{i}.{name}": s for i in range(blocks[1]) for name, s in single.items()}
    return dict(sorted(found.items(), key=lambda it: it[1]))


class Factors:
    """A LoRA in one slab: on the device, and if wanted in pinned memory; laid out in the order of the tensors."""

    def __init__(self, shapes, rank, dtype=BASE, host=True):
        self.rank, self.dtype, self.shapes = rank, dtype, shapes
        self.offsets, size = [], 0
        for N, K in shapes:
            up, size = size, size + (-(-2 * N * rank // 256)) * 256
            down, size = size, size + (-(-2 * rank * K // 256)) * 256
            self.offsets.append((up, down))
        self.nbytes = size
        self.slab = torch.empty(size, dtype=torch.uint8, device=DEVICE)
        for t, (N, K) in enumerate(shapes):
            up, down = self.views(self.slab, t)
            up.normal_().mul_(0.1)
            down.normal_().mul_(K**-0.5)
        self.host = None
        if host:
            self.host = torch.empty(size, dtype=torch.uint8, pin_memory=CUDA)
            self.host.copy_(self.slab)
        self.at = np.array(self.offsets, dtype=np.int64).reshape(-1, 2)

    def views(self, slab, t):
        (N, K), (up, down), r = self.shapes[t], self.offsets[t], self.rank
        return (slab[up : up + 2 * N * r].view(self.dtype).view(N, r),
                slab[down : down + 2 * r * K].view(self.dtype).view(r, K))


class Work:
    """Tensors of one precision, in groups of one shape; and what a mix makes of them."""

    def __init__(self, kind, bases, outs, scales=None):
        self.kind, self.bases, self.outs, self.scales = kind, bases, outs, scales
        self.shapes = [tuple(base.shape) for base in bases]
        self.groups, start = [], 0
        for shape, count in Counter(self.shapes).items():
            assert all(s == shape for s in self.shapes[start : start + count]), "shapes must be sorted"
            self.groups.append((shape, start, count))
            start += count
        rows = [n for n, _ in self.shapes]
        self.amax = torch.zeros(sum(rows) + 4 * len(rows), dtype=torch.float32, device=DEVICE)
        self.sums = torch.zeros(len(bases), dtype=torch.int32, device=DEVICE)
        self.static = np.zeros((len(bases), 6), dtype=np.int64)
        place = 0
        for t, base in enumerate(bases):
            self.static[t, :4] = (base.data_ptr(), outs[t].data_ptr(), scales[t].data_ptr() if scales else 0,
                                  self.amax.data_ptr() + 4 * place)
            place += (rows[t] + 3) // 4 * 4
        self.mix([])

    def mix(self, loras):
        """[(Factors, strength), ...] on all tensors; makes the tables, as a swap has to."""
        count, many = len(self.bases), len(loras)
        self.loras = loras
        self.ranks = tuple(factors.rank for factors, _ in loras)
        divide = 8 if all(rank % 8 == 0 for rank in self.ranks) else 1
        table = self.static.copy()
        table[:, 4] = np.arange(count) * many
        table[:, 5] = table[:, 4] + many
        terms = np.zeros((count, max(many, 1), 3), dtype=np.int64)
        strengths = np.zeros((count, max(many, 1)), dtype=np.float32)
        for i, (factors, strength) in enumerate(loras):
            terms[:, i, :2] = factors.at + factors.slab.data_ptr()
            terms[:, i, 2] = factors.rank // divide
            strengths[:, i] = strength
        self.table = torch.from_numpy(table).to(DEVICE, non_blocking=True)
        self.terms = torch.from_numpy(terms.reshape(-1, 3)).to(DEVICE, non_blocking=True)
        self.strengths = torch.from_numpy(strengths.reshape(-1)).to(DEVICE, non_blocking=True)
        self.ft = loras[0][0].dtype if loras else BASE
        return self

    def const(self, shape, tile=None, rb=None, chk=False, div=True, kind=None, one=True):
        kind = kind or self.kind
        return constants(kind, tile or default_tile(kind), rb or chunk(self.ranks), self.ranks, shape, self.ft,
                         chk=chk, div=div, one=one)

    @property
    def args(self):
        return self.table, self.terms, self.strengths, self.sums

    def clear(self, kind, chk):
        if kind == "two":
            self.amax.zero_()
        if chk:
            self.sums.zero_()

    def grouped(self, kind=None, **how):
        """One launch (two for `two`) for each shape."""
        kind = kind or self.kind
        self.clear(kind, how.get("chk"))
        made = []
        for shape, start, count in self.groups:
            made += launch(kind, self.args, count, start, shape, self.const(shape, kind=kind, **how))
        return made

    def each(self, kind=None, **how):
        """One launch (two) for each tensor."""
        kind = kind or self.kind
        self.clear(kind, how.get("chk"))
        for shape, start, count in self.groups:
            const = self.const(shape, kind=kind, **how)
            for t in range(start, start + count):
                launch(kind, self.args, 1, t, shape, const)

    def verify(self, into):
        into.zero_()
        width = self.outs[0].element_size()
        for shape, start, count in self.groups:
            words = shape[0] * shape[1] * width // 4
            verify_kernel[(triton.cdiv(words, BLOCK), count)](self.table, into, start, words, BLOCK=BLOCK, num_warps=8)


def torch_sum(tensor):
    """The same checksum by torch."""
    words = tensor.contiguous().view(torch.uint8).flatten().view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    total = 0
    for start in range(0, len(words), 2**22):
        part = words[start : start + 2**22]
        at = torch.arange(start, start + len(part), device=part.device, dtype=torch.int64)
        weight = (at * 2654435761) % 2**32 | 1
        low, high = part & 0xFFFF, part >> 16  # so that no product leaves 63 bits
        total += int(((low * weight) % 2**32 + ((high * weight) % 2**16 << 16)).sum())
    total %= 2**32
    return total - 2**32 if total >= 2**31 else total


# -------------------------------------------------------------------------------------------------------- correctness
def quantize_rows(x):
    x = x.float()
    scale = x.abs().amax(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny * 448) / 448
    q = (x / scale).clamp(-448, 448)
    return (q.half() if SMALL else q.to(torch.float8_e4m3fn)), scale


def ordered(x):
    """16-bit floats as integers whose differences are ulps."""
    bits = x.view(torch.int16).int()
    return torch.where(bits < 0, -(bits & 0x7FFF), bits)


def compare16(y, ref, exact):
    ulps = (ordered(y) - ordered(ref)).abs()
    rounded = exact.to(y.dtype)
    return {"differ": (y.view(torch.int16) != ref.view(torch.int16)).float().mean().item(),
            "max_ulps": ulps.max().item(), "max_abs": (y.float() - ref.float()).abs().max().item(),
            "differ_from_float64": (ordered(y) != ordered(rounded)).float().mean().item(),
            "torch32_differs_from_float64": (ordered(ref) != ordered(rounded)).float().mean().item()}


def compare8(y, scale, ref):
    q, s = quantize_rows(ref)
    raw = (lambda x: x.view(torch.int16)) if SMALL else (lambda x: x.view(torch.uint8))
    return {"bytes_differ": (raw(y) != raw(q)).float().mean().item(),
            "scales_differ": (scale != s).float().mean().item(),
            "scale_max_rel": ((scale - s).abs() / s).max().item(),
            "max_rel_of_row": ((y.float() * scale - q.float() * s).abs().amax(1) / (448 * s[:, 0])).max().item()}


def correct(out, shape, ranks, ft, count=2):
    N, K = shape
    shapes = [shape] * count
    bases = [(torch.randn(N, K, device=DEVICE) * 0.05).to(BASE) for _ in shapes]
    bases[0][0] = 0  # a row of zeros
    bases[0][1] = -0.0
    loras = [(Factors(shapes, rank, ft, host=False), 0.37 * (-1) ** i / (1 + i)) for i, rank in enumerate(ranks)]
    refs, exacts = [], []
    for t in range(count):
        total, exact = bases[t].float(), bases[t].double()
        for factors, strength in loras:
            up, down = factors.views(factors.slab, t)
            total = total + strength * (up.float() @ down.float())
            exact = exact + float(np.float32(strength)) * (up.double() @ down.double())
        refs.append(total)
        exacts.append(exact)
    small8 = H16 if SMALL else torch.float8_e4m3fn
    for kind in KINDS:
        def fresh():
            outs = [torch.empty(N, K, dtype=BASE if kind == "bf16" else small8, device=DEVICE) for _ in shapes]
            scales = [torch.zeros(N, 1, device=DEVICE) for _ in shapes]
            work = Work(kind, bases, outs, scales).mix(loras)
            work.grouped(chk=True)
            sync()
            return work

        name = f"correct {kind} {shape} ranks {ranks} {str(ft)[6:]}"
        try:
            one, two = fresh(), fresh()
            raw = lambda x: x.view(torch.uint8)  # noqa: E731
            values = {"same_twice": all(torch.equal(raw(a), raw(b)) for a, b in zip(one.outs, two.outs, strict=True))
                      and torch.equal(one.sums, two.sums)}
            if kind == "bf16":
                values |= compare16(torch.cat(one.outs), torch.cat(refs).to(BASE), torch.cat(exacts))
            else:
                values |= compare8(torch.cat([raw(it) for it in one.outs]).view(small8), torch.cat(one.scales),
                                   torch.cat(refs))
            check = torch.zeros_like(one.sums)
            one.verify(check)
            wanted = [torch_sum(tensor) for tensor in one.outs]
            values["sums_right"] = one.sums.tolist() == wanted
            values["verify_right"] = check.tolist() == wanted
            one.each()
            values["each_same"] = all(torch.equal(raw(a), raw(b)) for a, b in zip(one.outs, two.outs, strict=True))
            out(name, **values)
        except Exception:
            out(name, error=traceback.format_exc()[-700:])


# --------------------------------------------------------------------------------------------------------------- main
def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", default="swap_kernel.jsonl")
    parser.add_argument("--seconds", type=float, default=100)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--warm", type=int, nargs=2)
    options = parser.parse_args()

    def watch():
        time.sleep(max(1, options.seconds - (time.perf_counter() - START)))
        print("watchdog: out of time", flush=True)
        os._exit(3)

    threading.Thread(target=watch, daemon=True).start()
    if options.warm:
        warm(*options.warm)
        return
    out = Out(options.out)
    helpers = []
    if CUDA:
        many = max(1, min(8, (os.cpu_count() or 2) // 2))
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        errors = open(options.out + ".warm.txt", "w")
        helpers = [subprocess.Popen([sys.executable, os.path.abspath(__file__), "--warm", str(k), str(many),
                                     "--seconds", "60"], env=environment, stdout=errors, stderr=errors)
                   for k in range(many)]
    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    out("versions", torch=torch.__version__, triton=triton.__version__, cpus=os.cpu_count(),
        device=torch.cuda.get_device_name() if CUDA else "cpu")
    try:
        run(out, helpers)
        out("done")
    except Exception:
        out("run", error=traceback.format_exc()[-1500:])
    finally:
        for helper in helpers:
            if helper.poll() is None:
                helper.terminate()


def attempt(out, name, work):
    try:
        values = work()
        out(name, **(values or {}))
    except Exception:
        out(name, error=traceback.format_exc()[-900:])
        if CUDA:
            sync()


def attempt_only(out, name, work):
    try:
        work()
    except Exception:
        out(name, error=traceback.format_exc()[-900:])


def resources(made):
    found = []
    for kernel in made:
        if kernel is not None and hasattr(kernel, "metadata"):
            found.append((kernel.name, getattr(kernel, "n_regs", None), getattr(kernel, "n_spills", None),
                          kernel.metadata.shared))
    return sorted(set(found), key=str)


def run(out, helpers):
    named = names_and_shapes()
    shapes = list(named.values())
    elements = sum(n * k for n, k in shapes)
    start = time.perf_counter()
    bases = [torch.empty(s, dtype=BASE, device=DEVICE).normal_(0, 0.02) for s in shapes]
    module = torch.nn.Module()
    for name, (N, K) in named.items():
        linear = torch.nn.utils.skip_init(torch.nn.Linear, K, N, bias=False, device=DEVICE, dtype=BASE)
        module.add_module(name.replace(".", "_"), linear.requires_grad_(False))
    lives = [linear.weight.data for linear in module.children()]
    fp8 = H16 if SMALL else torch.float8_e4m3fn
    eights = [torch.empty(s, dtype=fp8, device=DEVICE) for s in shapes]
    scales = [torch.zeros(s[0], 1, device=DEVICE) for s in shapes]
    a16, b16, a64, b64 = (Factors(shapes, rank) for rank in (16, 16, 64, 64))
    sync()
    out("data", seconds=time.perf_counter() - start, tensors=len(shapes), elements=elements,
        shapes={str(s): c for s, c in Counter(shapes).items()}, rank16_bytes=a16.nbytes, rank64_bytes=a64.nbytes)
    works = {"bf16": Work("bf16", bases, lives), "rows": Work("rows", bases, eights, scales)}
    works["two"] = works["rows"]
    least = {"bf16": 4 * elements, "rows": 3 * elements, "two": 5 * elements}
    picked = [next(t for t, s in enumerate(shapes) if s == shape) for shape in dict.fromkeys(shapes)]

    def rate(kind, values):
        gpu = values["gpu_ms"] or 1e9
        return values | {"tb_per_s": round(least[kind] / gpu / 1e9, 3)}

    start = time.perf_counter()
    while any(helper.poll() is None for helper in helpers) and time.perf_counter() - START < 45:
        time.sleep(0.05)
    out("compiled beforehand", waited_s=time.perf_counter() - start, variants=len(plan()),
        codes=[helper.poll() for helper in helpers])
    # The project's own way.
    names = [name.replace(".", "_") for name in named]
    held = {}
    baseline(out, module, names, bases, a16, b16, held, picked)

    # Full-size: one launch for each shape.
    for kind in KINDS:
        work = works[kind]

        def headline():
            turns = [a16, b16]

            def swap():
                turns.reverse()
                work.mix([(turns[0], 0.5)]).grouped(kind)

            first = time.perf_counter()
            swap()
            sync()
            first = time.perf_counter() - first
            work.mix([(a16, 0.5)])
            made = work.grouped(kind)
            return rate(kind, timed(lambda: work.grouped(kind))) | {
                "with_tables": timed(swap), "first_s": round(first, 3), "resources": resources(made)}

        attempt(out, f"{kind}, rank 16, one launch for each shape", headline)

        def swapped():
            turns = [a16, b16]

            def swap():
                turns.reverse()
                work.mix([(turns[0], 0.5)])
                turns[0].slab.copy_(turns[0].host, non_blocking=True)
                work.grouped(kind)

            return timed(swap)

        attempt(out, f"{kind}, rank 16, whole swap: tables, upload, kernels", swapped)

        def overlapped():
            if not CUDA:
                return {"skipped": "needs CUDA"}
            side = torch.cuda.Stream()
            turns = [a16, b16]
            ends = [work.groups[i + 1][1] if i + 1 < len(work.groups) else None for i in range(len(work.groups))]

            def swap():
                turns.reverse()
                lora = turns[0]
                main_ = torch.cuda.current_stream()
                work.mix([(lora, 0.5)]).clear(kind, False)
                side.wait_stream(main_)
                events = []
                with torch.cuda.stream(side):
                    for (_, first, _), end in zip(work.groups, ends, strict=True):
                        low = lora.offsets[first][0]
                        high = lora.offsets[end][0] if end else lora.nbytes
                        lora.slab[low:high].copy_(lora.host[low:high], non_blocking=True)
                        events.append(torch.cuda.Event())
                        events[-1].record()
                for event, (shape, first, count) in zip(events, work.groups, strict=True):
                    main_.wait_event(event)
                    launch(kind, work.args, count, first, shape, work.const(shape, kind=kind))

            return timed(swap)

        attempt(out, f"{kind}, rank 16, whole swap: upload beside kernels", overlapped)

    # Against what engine.live wrote.
    def agree():
        found = {}
        for kind, work in (("bf16", works["bf16"]), ("rows", works["rows"]), ("two", works["two"])):
            if kind[0] == "b" and "bf16" not in held or kind[0] != "b" and "fp8" not in held:
                continue
            work.mix([(a16, 0.5)]).grouped(kind)
            sync()
            for i, t in enumerate(picked):
                if kind == "bf16":
                    was = held["bf16"][i]
                    ulps = (ordered(lives[t]) - ordered(was)).abs()
                    found[f"{kind} {shapes[t]}"] = ((ulps != 0).float().mean().item(), ulps.max().item())
                else:
                    was, scale = held["fp8"][i]
                    found[f"{kind} {shapes[t]}"] = (
                        (eights[t].view(torch.uint8) != was.view(torch.uint8)).float().mean().item(),
                        (scales[t] != scale).float().mean().item())
        return {"differ_and_max_ulps_or_scales": found}

    attempt(out, "against engine.live, one LoRA of rank 16 at 0.5", agree)

    # Launching.
    for kind in KINDS:
        work = works[kind]

        def each():
            work.mix([(a16, 0.5)])
            return timed(lambda: work.each(kind), n=3)

        attempt(out, f"{kind}, rank 16, a launch for each tensor", each)

        def quick():
            if not CUDA:
                return {"skipped": "needs CUDA"}
            calls = []
            for shape, first, count in work.groups:
                const = work.const(shape, kind=kind)
                made = launch(kind, work.args, count, first, shape, const)
                for kernel, mode in zip(made, MODES.get(kind, (None,)), strict=True):
                    fn = rows_kernel if mode is None else tile_kernel
                    values = const if mode is None else const | {"MODE": mode}
                    rest = [values[p.name] for p in fn.params if p.is_constexpr]
                    x = triton.cdiv(shape[0], const["BN"])
                    x *= 1 if mode is None else triton.cdiv(shape[1], const["BK"])
                    calls.append((kernel, x, range(first, first + count), shape, rest))
            lefts = torch.cuda.current_stream().cuda_stream

            def go():
                work.clear(kind, False)
                for kernel, x, several, (N, K), rest in calls:
                    runner = kernel[(x, 1, 1)]
                    for t in several:
                        runner(*work.args, t, N, K, *rest, stream=lefts)

            return timed(go, n=3)

        attempt(out, f"{kind}, rank 16, a launch for each tensor by the compiled kernel itself", quick)

        def graph():
            if not CUDA:
                return {"skipped": "needs CUDA"}
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                work.each(kind)
            sync()
            begun = time.perf_counter()
            it = torch.cuda.CUDAGraph()
            with torch.cuda.graph(it):
                work.each(kind)
            sync()
            captured = time.perf_counter() - begun
            return timed(it.replay) | {"capture_s": captured}

        attempt(out, f"{kind}, rank 16, a graph of a launch for each tensor", graph)

    # Checksums.
    for kind in KINDS:
        work = works[kind]

        def summed():
            work.mix([(a16, 0.5)])
            values = rate(kind, timed(lambda: work.grouped(kind, chk=True)))
            check = torch.zeros_like(work.sums)
            verify = timed(lambda: work.verify(check))

            def health():
                work.verify(check)
                return torch.equal(check, work.sums)

            whole = timed(health)
            same = torch.equal(check, work.sums)
            by_torch = all(torch_sum(work.outs[t]) == int(work.sums[t]) for t in picked)
            flat = work.outs[picked[-1]].view(torch.uint8).view(-1)
            flat[12345] ^= 1
            work.verify(check)
            caught = int((check != work.sums).sum())
            flat[12345] ^= 1
            return values | {"verify_all": verify, "verify_and_compare": whole, "same": same, "torch_agrees": by_torch,
                             "tensors_caught_with_a_flipped_bit": caught}

        attempt(out, f"{kind}, rank 16, with a checksum", summed)

    # Pieces.
    def pieces():
        values = {}
        for name, lora in (("rank 16", a16), ("rank 64", a64)):
            values[f"upload {name}"] = timed(lambda: lora.slab.copy_(lora.host, non_blocking=True))
        values["tables, one LoRA"] = timed(lambda: works["bf16"].mix([(a16, 0.5)]))
        values["tables, eight LoRAs"] = timed(lambda: works["bf16"].mix([(a16, 0.5), (b16, 0.2)] * 4))
        values["clear amax"] = timed(lambda: works["two"].amax.zero_())
        values["copy of base to live by torch"] = timed(
            lambda: [live.copy_(base) for live, base in zip(lives, bases, strict=True)], n=3)
        if hasattr(torch, "_foreach_copy_"):
            values["foreach copy"] = timed(lambda: torch._foreach_copy_(lives, bases), n=3)
        return values

    attempt(out, "pieces", pieces)

    # Other mixes.
    mixes = {"no LoRA": [], "rank 64": [(a64, 0.5)], "two of rank 64": [(a64, 0.5), (b64, 0.3)],
             "two of rank 16": [(a16, 0.5), (b16, 0.3)], "eight of rank 16": [(a16, 0.5), (b16, 0.2)] * 4,
             "rank 16 and rank 64": [(a16, 0.5), (a64, 0.3)]}
    for title, mix in mixes.items():
        for kind in KINDS:
            work = works[kind]

            def mixed():
                work.mix(mix)
                return rate(kind, timed(lambda: work.grouped(kind), n=3))

            attempt(out, f"{kind}, {title}, one launch for each shape", mixed)
    for kind in KINDS:
        work = works[kind]

        def general():
            work.mix([(a16, 0.5)])
            made = work.grouped(kind, one=False)
            return rate(kind, timed(lambda: work.grouped(kind, one=False), n=3)) | {"resources": resources(made)}

        attempt(out, f"{kind}, rank 16, by the kernel for several LoRAs", general)
    for kind in ("rows", "two"):
        work = works[kind]

        def inverse():
            work.mix([(a16, 0.5)]).grouped(kind)
            was = [work.outs[t].clone() for t in picked]
            values = rate(kind, timed(lambda: work.grouped(kind, div=False), n=3))
            return values | {"bytes_differ": [(work.outs[t].view(torch.uint8) != w.view(torch.uint8)).float().mean()
                                              .item() for t, w in zip(picked, was, strict=True)]}

        attempt(out, f"{kind}, rank 16, by the inverse instead of a division", inverse)

    # Exactness on many cases.
    for shape in (EVEN_SHAPE, ODD) if not SMALL else ((32, 64), (20, 44)):
        for ranks in CASES if not SMALL else [(16,), (4,), (16, 8, 1), ()]:
            attempt_only(out, f"correct {shape} {ranks}", lambda: correct(out, shape, ranks, BASE))
        attempt_only(out, f"correct {shape} float16", lambda: correct(out, shape, (16,), H16))
    if CUDA:
        attempt_only(out, f"correct {BIG}", lambda: correct(out, BIG, (16,), BASE, count=1))

    # The slice that bench.gpu.swap times.
    def sliced():
        chosen = {}
        for t, name in enumerate(named):
            kind, index = name.split(".")[:2]
            if int(index) < (2 if kind == "transformer_blocks" else 5):
                chosen[t] = name
        values = {"tensors": len(chosen)}
        for kind in KINDS:
            whole = works[kind]
            work = Work(kind, [bases[t] for t in chosen], [whole.outs[t] for t in chosen], [scales[t] for t in chosen])
            lora = Factors(work.shapes, 16)
            work.mix([(lora, 0.5)])
            values[kind] = timed(lambda: work.grouped(kind))
        return values

    attempt(out, "a slice of 2 and 5 blocks", sliced)

    # Tiles.
    for kind in KINDS:
        work = works[kind]
        for tile in ROWS if kind == "rows" else TILES:
            for lora in (a16, a64):

                def tiled():
                    work.mix([(lora, 0.5)])
                    how = {"tile": tile, "rb": lora.rank if not SMALL else 16}
                    made = work.grouped(kind, **how)
                    return rate(kind, timed(lambda: work.grouped(kind, **how), n=3)) | {"resources": resources(made)}

                attempt(out, f"{kind}, tile {tile}, rank {lora.rank}", tiled)


def baseline(out, module, names, bases, a16, b16, held, picked):
    """engine.live over the same tensors; keeps what it wrote into a few of them."""
    try:
        from engine.live import Live, Term
        from lora.deltas import LowRank
    except Exception:
        out("engine.live", error=traceback.format_exc()[-900:])
        return

    def term(lora, key):
        deltas = {}
        for t, name in enumerate(names):
            up, down = lora.views(lora.host, t)
            deltas[f"{name}.weight"] = (LowRank(0, len(up), up, down, 1.0),)
        return Term(key, 0.5, deltas)

    terms = [term(a16, "a"), term(b16, "b")]
    pristine = {f"{name}.weight": base for name, base in zip(names, bases, strict=True)}
    live = Live(module, {"dev": pristine})
    lives = {"bf16": live}
    if not SMALL:
        lives["fp8"] = live.quantized(lambda name: True)
    for precision, it in lives.items():

        def hold():
            turns = [terms[0], terms[1]]

            def swap():
                turns.reverse()
                it.hold("dev", [turns[0]])

            values = timed(swap, n=3)
            it.hold("dev", [terms[0]])
            sync()
            if precision == "bf16":
                held["bf16"] = [module.get_submodule(names[t]).weight.data.clone() for t in picked]
            else:
                layers = [it.module.get_submodule(names[t]) for t in picked]
                held["fp8"] = [(layer.weight.clone(), layer.scale.clone()) for layer in layers]
            return values

        attempt(out, f"engine.live, {precision}, rank 16", hold)

        def check():
            start = time.perf_counter()
            intact = all([it.intact(name) for name in it.names if name.endswith("weight")])
            sync()
            return {"seconds": time.perf_counter() - start, "intact": intact}

        attempt(out, f"engine.live, {precision}, check of all tensors", check)
    few = torch.nn.Module()
    chosen = [n for n in names if n.startswith(("transformer_blocks_0_", "transformer_blocks_1_"))
              or n.startswith(tuple(f"single_transformer_blocks_{i}_" for i in range(5)))]
    for name in chosen:
        few.add_module(name, module.get_submodule(name))
    for precision in ("bf16", "fp8") if not SMALL else ("bf16",):

        def part():
            it = Live(few, {"dev": pristine})
            if precision == "fp8":
                it = it.quantized(lambda name: True)
            turns = [terms[0], terms[1]]

            def swap():
                turns.reverse()
                it.hold("dev", [turns[0]])

            return timed(swap, n=3) | {"tensors": len(chosen)}

        attempt(out, f"engine.live, {precision}, a slice", part)


if __name__ == "__main__":
    main()
