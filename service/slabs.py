"""Host memory in slabs of at most 1 GiB that the GPU reads by itself: tensors are packed into a few large blocks.

torch rounds each pinned block up to a power of two, so a tensor with a block of its own takes up to twice its bytes.
"""

from collections.abc import Iterable

SLAB = 2**30
# Where a tensor may begin in a slab: what the widest loads of CPUs and GPUs like.
ALIGNMENT = 256


def pinned_bytes(sizes: Iterable[int]) -> int:
    """What tensors of so many bytes each take of pinned memory when they are packed."""
    raise NotImplementedError
