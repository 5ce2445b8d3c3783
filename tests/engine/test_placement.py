import pytest

from engine.placement import GB, WORK, Precisions, Sizes, plan

# FLUX.1: 11.9 B parameters in bf16, 8.6 B of them in block linears; T5 XXL; CLIP twice and the VAE.
FLUX = Sizes(
    bases={"dev": int(23.8 * GB), "schnell": int(23.8 * GB)},
    live=int(23.8 * GB),
    linears=int(17.2 * GB),
    t5=int(9.5 * GB),
    t5_block=int(0.4 * GB),
    rest=int(0.7 * GB),
)
GIB = 2**30
BOTH = {"dev", "schnell"}


@pytest.mark.parametrize(
    ("gpu", "host", "fp8", "on_gpu", "precisions", "t5_on_gpu"),
    [
        (140, 128, True, BOTH, Precisions.BOTH, True),  # H200, 141 GB
        (140, 0, True, BOTH, Precisions.BOTH, True),  # which needs no host memory
        (79, 128, True, {"dev"}, Precisions.BOTH, True),  # H100, 80 GB
        (79, 128, False, {"dev"}, Precisions.BF16, True),  # A100
        (65, 128, True, {"dev"}, Precisions.IN_TURN, True),
        (44.5, 128, True, set(), Precisions.IN_TURN, True),  # L40S, 48 GB
        (44.5, 128, False, set(), Precisions.BF16, True),  # A6000
        (35, 128, True, set(), Precisions.IN_TURN, False),
        (23.5, 128, True, set(), Precisions.FP8, False),  # RTX 4090, 24 GB
    ],
)
def test_what_lies_where(
    gpu: float, host: int, fp8: bool, on_gpu: set[str], precisions: Precisions, t5_on_gpu: bool
) -> None:
    placement = plan(FLUX, gpu * GIB, host * GIB, fp8=fp8)
    assert (set(placement.on_gpu), placement.precisions, placement.t5_on_gpu) == (on_gpu, precisions, t5_on_gpu)
    assert placement.gpu <= gpu * GIB
    assert placement.host <= host * GIB
    assert str(precisions) in str(placement)


@pytest.mark.parametrize(("gpu", "host", "fp8"), [(23.5, 128, False), (15, 128, True), (23.5, 32, True)])
def test_a_machine_that_is_too_small_gets_a_sentence(gpu: float, host: int, fp8: bool) -> None:
    with pytest.raises(ValueError, match=rf"too small: it has {gpu * GIB / GB:.1f} GB of free GPU memory and .*\.$"):
        plan(FLUX, gpu * GIB, host * GIB, fp8=fp8)


def test_more_memory_is_never_used_worse() -> None:
    def rank(gpu: int) -> tuple[bool, bool, int, bool]:
        placement = plan(FLUX, gpu * GIB, 200 * GIB, fp8=True)
        precisions = placement.precisions
        return (
            precisions is not Precisions.FP8,
            placement.t5_on_gpu,
            len(placement.on_gpu),
            precisions is Precisions.BOTH,
        )

    ranks = [rank(gpu) for gpu in range(23, 145)]
    assert ranks == sorted(ranks)
    assert len(set(ranks)) > 4


def test_every_byte_is_counted_once() -> None:
    placement = plan(FLUX, 200 * GIB, 0, fp8=True)
    assert placement.gpu == sum(FLUX.bases.values()) + FLUX.live + FLUX.linears // 2 + FLUX.t5 + FLUX.rest + WORK
    assert placement.host == 0
