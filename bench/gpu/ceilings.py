"""The rates at which this device multiplies and copies, to compare all other times with.

In a burst of a few milliseconds the clock is higher than the device can hold, so the least time of a picture is
computed from the rate that is sustained for seconds.
"""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from statistics import median

import torch

from bench.gpu.context import Bench, Marks, Row, Values, can_be_used
from bench.gpu.results import clocks
from engine import fp8
from service import slabs

BURST = 10  # products
SUSTAINED = 4.0  # seconds
BATCH = 0.25  # seconds of work that are queued together
COPIED = 2 * 10**9  # bytes


def ceilings(bench: Bench) -> Iterator[Row]:
    """Products in bf16 and fp8, copies on the device and onto it."""
    for precision in ("bf16", "fp8"):
        for sustained in (False, True):
            kind = "sustained" if sustained else "burst"
            yield f"{precision} products, {kind}", partial(products, bench, precision, sustained)
    yield "copy", partial(copy, bench)
    yield "upload from pinned memory", partial(upload, bench)


def products(bench: Bench, precision: str, sustained: bool) -> Values:
    """TFLOP/s of a product of random numbers."""
    side = 256 if bench.small else 8192
    multiply = _product(bench, precision, side)
    flops = 2 * side**3
    with can_be_used() if bench.device.type == "cpu" else nullcontext():
        multiply()
    times = bench.times(lambda: [multiply() for _ in range(BURST)])
    each = times["median_s"] / BURST
    if not sustained:
        return {"tflops": flops / each / 1e12, "side": side}
    seconds = 2 * BATCH if bench.small else SUSTAINED
    count, marks, looked = max(1, round(BATCH / each)), Marks(bench.device), None
    marks()
    start = time.perf_counter()
    with ThreadPoolExecutor(1) as looker:  # in a thread: reading clocks is so slow that the device would idle
        while (passed := time.perf_counter() - start) < seconds:
            for _ in range(count):
                multiply()
            marks()
            if looked is None and passed > seconds / 2:
                looked = looker.submit(clocks, bench.device)
            bench.synchronize()
    rates = [count * flops / batch / 1e12 for batch in marks.seconds()]
    later = rates[len(rates) // 2 :]  # the first ones are still a burst
    held = looked.result() if looked else {}
    return {"tflops": median(later), "first_tflops": rates[0], "seconds": seconds, "side": side, "clocks_within": held}


def _product(bench: Bench, precision: str, side: int) -> Callable[[], object]:
    a, b = (torch.randn(side, side, device=bench.device, dtype=torch.bfloat16) for _ in range(2))
    if precision == "bf16":
        return lambda: a @ b
    (qa, sa), (qb, sb) = fp8.quantize_rows(a), fp8.quantize_rows(b)
    options = {"out_dtype": torch.bfloat16, "use_fast_accum": bench.device.type == "cuda"}
    return lambda: torch._scaled_mm(qa, qb.t(), sa, sb.t(), **options)


def copy(bench: Bench) -> Values:
    """GB/s of a copy within the device's memory: bytes read plus bytes written."""
    source = torch.randn(COPIED // 4 // (100 if bench.small else 1), device=bench.device)
    target = torch.empty_like(source)
    times = bench.times(lambda: target.copy_(source))
    return {"gb_per_s": 2 * source.nbytes / times["median_s"] / 1e9, "bytes": source.nbytes} | times


def upload(bench: Bench) -> Values:
    """GB/s from pinned host memory to the device."""
    bench.needs_cuda()
    source = slabs.block(2**30)
    target = torch.empty_like(source, device=bench.device)
    times = bench.times(lambda: target.copy_(source, non_blocking=True))
    return {"gb_per_s": source.nbytes / times["median_s"] / 1e9, "bytes": source.nbytes} | times
