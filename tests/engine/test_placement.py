import pytest

from engine.architecture import official, sizes
from engine.placement import GB, GRAPHS, PINNED_SHARE, WORK, Place, Placement, Precisions, Sizes, plan

GIB, MIB = 2**30, 2**20
GPU, PINNED, MAPPED = Place.GPU, Place.PINNED, Place.MAPPED
BOTH, IN_TURN, BF16, FP8 = Precisions.BOTH, Precisions.IN_TURN, Precisions.BF16, Precisions.FP8
# Bytes of a GPU that CUDA takes before the first tensor.
CONTEXT = int(0.5 * GB)


@pytest.fixture(scope="module")
def flux() -> Sizes:
    return sizes(official())


@pytest.mark.parametrize(
    ("gpu", "host", "fp8", "dev", "schnell", "t5", "precisions"),
    [
        (81_559, 128, True, GPU, PINNED, GPU, BOTH),  # H100
        (143_771, 128, True, GPU, GPU, GPU, BOTH),  # H200
        (46_068, 128, True, PINNED, PINNED, GPU, IN_TURN),  # L40S
        (46_068, 96, True, PINNED, PINNED, GPU, IN_TURN),  # in a pod of 96 GiB
        (81_920, 128, False, GPU, PINNED, GPU, BF16),  # A100
        (24_564, 64, True, PINNED, MAPPED, PINNED, FP8),  # RTX 4090
        (24_564, 32, True, MAPPED, MAPPED, PINNED, FP8),
        (24_564, 8, True, MAPPED, MAPPED, MAPPED, FP8),
        (23_034, 64, True, PINNED, MAPPED, PINNED, FP8),  # L4
        (49_140, 96, False, PINNED, PINNED, GPU, BF16),  # A6000
        (38_000, 64, True, PINNED, MAPPED, PINNED, IN_TURN),
        (143_771, 4, True, GPU, GPU, GPU, BOTH),  # which needs no host memory
    ],
)
def test_what_lies_where(
    flux: Sizes, gpu: int, host: int, fp8: bool, dev: Place, schnell: Place, t5: Place, precisions: Precisions
) -> None:
    free, memory = gpu * MIB - CONTEXT, host * GIB
    placement = plan(flux, free, memory, fp8=fp8)
    assert placement.bases == {"dev": dev, "schnell": schnell}
    assert (placement.t5, placement.precisions) == (t5, precisions)
    assert placement.left == free - placement.gpu >= 0
    # Where bf16 weights fit, steps are replayed too.
    assert (placement.left >= GRAPHS) == (precisions is not FP8)
    assert placement.host <= PINNED_SHARE * memory


@pytest.mark.parametrize(("gpu", "host", "fp8"), [(23.5, 128, False), (15, 128, True), (23.5, 1, True)])
def test_a_machine_that_is_too_small_gets_a_sentence(flux: Sizes, gpu: float, host: int, fp8: bool) -> None:
    with pytest.raises(ValueError, match=rf"too small: it has {gpu * GIB / GB:.1f} GB of free GPU memory and .*\.$"):
        plan(flux, int(gpu * GIB), host * GIB, fp8=fp8)


def test_more_memory_is_never_used_worse(flux: Sizes) -> None:
    def rank(gpu: int) -> tuple[bool, bool, int, bool]:
        placement = plan(flux, gpu * GIB, 200 * GIB, fp8=True)
        on_gpu = [name for name, place in placement.bases.items() if place is GPU]
        return placement.precisions is not FP8, placement.t5 is GPU, len(on_gpu), placement.precisions is BOTH

    ranks = [rank(gpu) for gpu in range(23, 145)]
    assert ranks == sorted(ranks)
    assert len(set(ranks)) > 4


def test_what_is_needed_most_often_keeps_its_pinned_memory_longest(flux: Sizes) -> None:
    def pinned(host: int) -> list[str]:
        placement = plan(flux, 24 * GIB, host * GIB, fp8=True)
        return [name for name, place in (("t5", placement.t5), *placement.bases.items()) if place is PINNED]

    order = ["t5", "dev", "schnell"]
    found = [pinned(host) for host in range(4, 128)]
    assert all(it == order[: len(it)] for it in found)
    assert [len(it) for it in found] == sorted(len(it) for it in found)
    assert {len(it) for it in found} == {0, 1, 2, 3}


def test_every_byte_is_counted_once(flux: Sizes) -> None:
    bases = sum(sum(tensors) for tensors in flux.bases.values())
    everything = plan(flux, 200 * GIB, 0, fp8=True)
    assert everything.gpu == bases + flux.live + flux.linears // 2 + sum(flux.t5) + flux.rest + WORK
    assert everything.host == 0
    least = plan(flux, 24 * GIB, 128 * GIB, fp8=True)
    assert bases + sum(flux.t5) <= least.host < 1.05 * (bases + sum(flux.t5))


def test_a_placement_says_where_each_thing_lies_and_what_that_takes() -> None:
    placement = Placement({"dev": PINNED, "schnell": MAPPED}, PINNED, FP8, gpu=int(23.6 * GB), host=int(33.8 * GB))
    assert placement.lines() == [
        "fp8 live weights alone, since bf16 ones do not fit: every picture is drawn in fp8",
        "in pinned host memory: the base of dev, T5 (moved layer by layer for each new prompt)",
        "mapped in the page cache, not pinned, and so read more slowly: the base of schnell",
        "23.6 GB of the GPU, 33.8 GB of pinned host memory",
    ]
