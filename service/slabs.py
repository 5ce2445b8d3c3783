"""Host memory in slabs of at most 1 GiB that the GPU reads by itself: tensors are packed into a few large blocks.

torch rounds each pinned block up to a power of two, so a tensor with a block of its own takes up to twice its bytes.
"""

from collections.abc import Iterable

SLAB = 2**30
# Where a tensor may begin in a slab: what the widest loads of CPUs and GPUs like.
ALIGNMENT = 256


def pinned_bytes(sizes: Iterable[int]) -> int:
    """What tensors of so many bytes each take of pinned memory when they are packed.

    The largest first, each into the first slab with room for it; a tensor above 1 GiB has a slab of its own.
    """
    slabs: list[int] = []
    for size in sorted((-(-size // ALIGNMENT) * ALIGNMENT for size in sizes), reverse=True):
        fitting = next((index for index, used in enumerate(slabs) if used + size <= SLAB), None)
        if fitting is None:
            slabs.append(size)
        else:
            slabs[fitting] += size
    return sum(1 << (used - 1).bit_length() for used in slabs if used)
