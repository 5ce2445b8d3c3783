"""Host memory in slabs of at most 1 GiB that the GPU reads by itself: tensors are packed into a few large blocks.

torch rounds each pinned block up to a power of two, so a tensor with a block of its own takes up to twice its bytes,
and each block costs a call of the driver. What lies in one slab also goes to the device in one copy. This module knows
bytes, blocks and devices; it knows neither files nor what the tensors are.
"""

from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Generic, TypeVar

import torch
from torch import Tensor

from service.device_thread import check_cancelled

SLAB = 2**30
# Where a tensor may begin in a slab: what the widest loads of CPUs and GPUs like.
ALIGNMENT = 256

Key = TypeVar("Key", bound=Hashable)


@dataclass
class _Slab(Generic[Key]):
    nbytes: int = 0
    offsets: dict[Key, int] = field(default_factory=dict)

    def fits(self, size: int) -> bool:
        return _aligned(self.nbytes) + size <= SLAB

    def add(self, key: Key, size: int) -> None:
        self.offsets[key] = _aligned(self.nbytes)
        self.nbytes = self.offsets[key] + size


def pinned_bytes(sizes: Iterable[int]) -> int:
    """What tensors of so many bytes each take of pinned memory when they are packed."""
    return sum(_rounded(slab.nbytes) for slab in _lay_out(dict(enumerate(sizes))))


def block(nbytes: int) -> Tensor:
    """So many bytes of host memory, uint8, set to nothing yet; pinned where there is CUDA."""
    return torch.empty(nbytes, dtype=torch.uint8, pin_memory=torch.cuda.is_available())


def pack(tensors: Mapping[Key, Tensor], allocate: Callable[[int], Tensor] = block) -> dict[Key, Tensor]:
    """Copy tensors into as few slabs as they need.

    Args:
        tensors: on any device, of any strides.
        allocate: makes a slab of so many bytes, uint8.

    Returns:
        equal contiguous tensors; each begins at a multiple of ALIGNMENT in its slab.
    """
    return {key: tensor for job in packing(tensors, allocate=allocate) for key, tensor in job().items()}


def packing(
    tensors: Mapping[Key, Tensor], dtype: torch.dtype | None = None, allocate: Callable[[int], Tensor] = block
) -> list[Callable[[], dict[Key, Tensor]]]:
    """The same as jobs that may run in several threads at once; each makes one slab and returns its tensors.

    Args:
        tensors: see `pack`.
        dtype: what they become on the way; None leaves each its own.
        allocate: see `pack`.
    """
    sizes = {key: tensor.numel() * (dtype or tensor.dtype).itemsize for key, tensor in tensors.items()}
    return [partial(_fill, slab, tensors, dtype, allocate) for slab in _lay_out(sizes)]


def _lay_out(sizes: Mapping[Key, int]) -> list[_Slab[Key]]:
    """First fit decreasing: the largest first, each into the first slab with room; above SLAB each has its own."""
    slabs: list[_Slab[Key]] = []
    for key in sorted(sizes, key=sizes.__getitem__, reverse=True):
        slab = next((slab for slab in slabs if slab.fits(sizes[key])), None)
        if slab is None:
            slabs.append(slab := _Slab())
        slab.add(key, sizes[key])
    return slabs


def _fill(
    slab: _Slab[Key], tensors: Mapping[Key, Tensor], dtype: torch.dtype | None, allocate: Callable[[int], Tensor]
) -> dict[Key, Tensor]:
    memory = allocate(slab.nbytes)
    packed = {}
    for key, offset in slab.offsets.items():
        check_cancelled()
        kind = dtype or tensors[key].dtype
        place = memory[offset : offset + tensors[key].numel() * kind.itemsize]
        packed[key] = place.view(kind).view(tensors[key].shape).copy_(tensors[key])
    return packed


def taken(tensors: Iterable[Tensor]) -> int:
    """Bytes of host memory that the blocks of these tensors take, each block counted once, whole, as it was rounded."""
    blocks = {tensor.untyped_storage().data_ptr(): tensor for tensor in tensors}.values()
    sizes = ((tensor.untyped_storage().nbytes(), tensor.is_pinned()) for tensor in blocks)
    return sum(_rounded(nbytes) if pinned else nbytes for nbytes, pinned in sizes)


class Uploads:
    """Brings tensors to a device; the first one of a block brings the whole block, in which the others are then views.

    It holds what it has brought, so it should live as long as that is used, and no longer.

    Args:
        device: where they go; a tensor that lies there is returned as it is.
        room: how many bytes of blocks may lie there. A tensor whose block has no room comes alone and is not held.
    """

    def __init__(self, device: torch.device, room: int) -> None:
        self._device, self._room = device, room
        self._blocks: dict[int, Tensor] = {}  # on the device, by their address in host memory

    def __call__(self, tensor: Tensor) -> Tensor:
        """An equal tensor on the device."""
        if tensor.device == self._device:
            return tensor
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._blocks:
            if storage.nbytes() > self._room:
                return tensor.to(self._device, non_blocking=True)
            whole = torch.empty(0, dtype=torch.uint8).set_(storage)
            self._blocks[storage.data_ptr()] = whole.to(self._device, non_blocking=True)
            self._room -= storage.nbytes()
        brought = self._blocks[storage.data_ptr()].untyped_storage()
        view = torch.empty(0, dtype=tensor.dtype, device=self._device)
        return view.set_(brought, tensor.storage_offset(), tensor.shape, tensor.stride())


def _aligned(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT


def _rounded(nbytes: int) -> int:
    """torch's rule for pinned blocks: up to a power of two."""
    return 1 << (nbytes - 1).bit_length() if nbytes else 0
