"""Seconds to change LoRAs before the first step: the product writes its live weights again."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import cycle

from bench.gpu.context import Bench, Row, Values
from bench.gpu.models import make_transformer
from engine.architecture import is_block_linear
from engine.live import Live, Term
from service import slabs
from service.measure import Stopwatch

RANKS = (16, 64)
# An eighth of FLUX, at full width, for bases in pinned memory: pinning all 24 GB takes too long.
SLICE = {"num_layers": 2, "num_single_layers": 5}


def swap(bench: Bench) -> Iterator[Row]:
    """Each precision: one LoRA of each rank, two of them, another scale, another model; then health, and files."""
    one, other = ({rank: term(bench, rank, seed) for rank in RANKS} for seed in (1, 2))
    for precision in bench.precisions:
        live = (bench.models.live_fp8 if precision == "fp8" else bench.models.live)["dev"]
        hold = partial(alternate, bench, live)
        for rank in RANKS:
            yield f"{precision}, rank {rank}", partial(hold, [("dev", [one[rank]]), ("dev", [other[rank]])])
        pairs = [("dev", [at(one[64], scale), at(other[64], scale)]) for scale in (1, 0.5)]
        yield f"{precision}, two of rank 64", partial(hold, pairs)
        yield f"{precision}, another scale", partial(hold, [("dev", [at(one[16], 1)]), ("dev", [at(one[16], 0.5)])])
        yield f"{precision}, another model", partial(hold, [("schnell", []), ("dev", [])])
        yield f"{precision}, health of all tensors", partial(health, bench, live, [at(one[16], 1)])
    yield "health in one check", partial(check, bench)
    for precision in bench.precisions:
        for pinned in (False, True):
            where = "pinned memory" if pinned else "the device"
            terms = [one[16], other[16]]
            yield f"{precision}, a slice, base in {where}", partial(sliced, bench, precision, pinned, terms)
    yield "two files of rank 16, never read before", partial(cold, bench)


def term(bench: Bench, rank: int, seed: int) -> Term:
    """A LoRA at scale 1, read as the product reads it."""
    file = bench.lora(rank, seed)
    return Term(file.content, 1.0, bench.flux.lora_cache.read(file).transformer)


def at(term: Term, scale: float) -> Term:
    """The same LoRA at another scale."""
    return replace(term, scale=scale)


def alternate(bench: Bench, live: Live, mixes: Sequence[tuple[str, list[Term]]]) -> Values:
    """Seconds to hold one mix after another."""
    turns = cycle(mixes)
    written: list[int] = []
    times = bench.times(lambda: written.append(live.hold(*next(turns))), repeats=6)
    tensors = (*live.module.parameters(), *live.module.buffers())
    return times | {"tensors": written[-1], "live_bytes": sum(tensor.nbytes for tensor in tensors)}


def health(bench: Bench, live: Live, terms: list[Term]) -> Values:
    """Seconds to compare all live tensors with the base and the LoRA that they were written from."""
    live.hold("dev", terms)
    intact: list[bool] = []
    took = bench.seconds(lambda: intact.extend(live.intact(name) for name in live.names))
    return {"seconds": took, "tensors": len(intact), "intact": all(intact)}


def check(bench: Bench) -> Values:
    """Seconds of the check that `healthcheck` makes each time."""
    return bench.times(bench.flux.check)


def sliced(bench: Bench, precision: str, pinned: bool, terms: list[Term]) -> Values:
    """A swap of rank 16 in some layers, with the base in pinned memory or on the device."""
    if pinned:
        bench.needs_cuda()
    config = bench.sizes["transformer"] | ({} if bench.small else SLICE)
    base = dict(make_transformer(bench.device, config).state_dict())
    if pinned:
        base = slabs.pack(base)
    live = Live(make_transformer(bench.device, config), {"dev": base})
    if precision == "fp8":
        live = live.quantized(is_block_linear)
    return alternate(bench, live, [("dev", [term]) for term in terms])


def cold(bench: Bench) -> Values:
    """Seconds from files in the page cache to live weights."""
    wanted = bench.request(loras=True)
    unread = [replace(file, sha256=f"{file.sha256}, unread") for file in bench.loras]
    watch = Stopwatch(bench.device)
    bench.flux.prepare(wanted, unread, watch)
    return {f"{phase}_s": seconds for phase, seconds in watch.seconds.items()}
