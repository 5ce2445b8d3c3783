"""Tensors packed into slabs, which are blocks of host memory of at most 1 GiB, pinned so that the GPU can read them.

torch rounds each pinned block up to a power of two, so a tensor with a block of its own takes up to twice its bytes,
and each block costs a call of the driver. The tensors of one slab also go to the device in one copy. This module knows
bytes, blocks and devices; it knows neither files nor what the tensors are.
"""

import functools
import weakref
from collections.abc import Callable, Hashable, Iterable, Mapping
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from service.device_thread import check_cancelled

SLAB = 2**30
# Bytes of a slab that go to the device at a time: a millisecond over PCIe.
PIECE = 2**26
# Tensors begin at multiples of this in a slab, for the widest loads of CPUs and GPUs.
ALIGNMENT = 256

Key = TypeVar("Key", bound=Hashable)


def pinned_bytes(sizes: Iterable[int]) -> int:
    """The bytes of pinned memory that tensors of these sizes take when they are packed."""
    return sum(_rounded(_end(slab)) for slab in _lay_out(dict(enumerate(sizes))))


def block(nbytes: int) -> Tensor:
    """An uninitialised block of host memory, uint8; pinned where there is CUDA."""
    return torch.empty(nbytes, dtype=torch.uint8, pin_memory=torch.cuda.is_available())


def pack(tensors: Mapping[Key, Tensor], allocate: Callable[[int], Tensor] = block) -> dict[Key, Tensor]:
    """Equal contiguous tensors, packed into as few slabs as they need, in which they keep their order.

    The tensors may be on any device; `allocate` makes a slab of so many bytes, uint8.
    """
    return {key: tensor for job in packing(tensors, allocate=allocate) for key, tensor in job().items()}


def packing(
    tensors: Mapping[Key, Tensor], dtype: torch.dtype | None = None, allocate: Callable[[int], Tensor] = block
) -> list[Callable[[], dict[Key, Tensor]]]:
    """The same as jobs, each of which makes one slab and returns its tensors, for several threads at once.

    With a `dtype`, the tensors are converted to it.
    """

    def fill(slab: Mapping[Key, range]) -> dict[Key, Tensor]:
        memory = allocate(_end(slab))
        packed = {}
        for key, place in slab.items():
            check_cancelled()
            tensor = tensors[key]
            packed[key] = memory[place.start : place.stop].view(dtype or tensor.dtype).view(tensor.shape).copy_(tensor)
        return packed

    sizes = {key: tensor.numel() * (dtype or tensor.dtype).itemsize for key, tensor in tensors.items()}
    return [partial(fill, slab) for slab in _lay_out(sizes)]


def _lay_out(sizes: Mapping[Key, int]) -> list[dict[Key, range]]:
    """The bytes of each tensor in its slab, in the order of `sizes`; one larger than SLAB has a slab of its own."""
    # First fit decreasing: the largest tensor goes first, each into the first slab with room.
    chosen: dict[Key, int] = {}  # slabs by number
    room: list[int] = []  # bytes left in each
    for key in sorted(sizes, key=sizes.__getitem__, reverse=True):
        size = _aligned(sizes[key])
        number = next((number for number, left in enumerate(room) if size <= left), len(room))
        if number == len(room):
            room.append(SLAB)
        room[number] -= size
        chosen[key] = number
    slabs: list[dict[Key, range]] = [{} for _ in room]
    for key, size in sizes.items():
        slab = slabs[chosen[key]]
        start = _aligned(_end(slab))
        slab[key] = range(start, start + size)
    return slabs


def _end(slab: Mapping[Key, range]) -> int:
    """Bytes of a slab: where its last tensor ends."""
    return next(reversed(slab.values())).stop if slab else 0


def taken(tensors: Iterable[Tensor]) -> int:
    """The bytes of the host blocks that hold these tensors: each counted once, whole, and as torch rounded it."""
    blocks = {tensor.untyped_storage().data_ptr(): tensor for tensor in tensors}.values()
    sizes = ((tensor.untyped_storage().nbytes(), tensor.is_pinned()) for tensor in blocks)
    return sum(_rounded(nbytes) if pinned else nbytes for nbytes, pinned in sizes)


class _Block:
    """The copy on a device of a block of host memory, whole or in part. It does not keep the host's memory alive."""

    def __init__(self, nbytes: int, device: torch.device, *, pinned: bool) -> None:
        self.nbytes = nbytes
        self.memory = torch.empty(nbytes, dtype=torch.uint8, device=device)
        self.turn = 0  # when it was used last
        self.sent = 0  # bytes copied
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda" and pinned:
            self._stream = _copying(device)
            self._stream.wait_stream(torch.cuda.current_stream(device))  # which may still need this memory for others
            self.memory.record_stream(self._stream)

    def send(self, storage: torch.UntypedStorage, end: int) -> None:
        """Copy the first `end` bytes of the host's block; what the current stream does from now on waits for them.

        Pinned memory is copied piece by piece on a stream of its own: the first tensors can be used while the next are
        still copied.
        """
        whole = torch.empty(0, dtype=torch.uint8).set_(storage)
        while self.sent < min(end, self.nbytes):
            stop = min(self.sent + PIECE, self.nbytes) if self._stream else self.nbytes
            with torch.cuda.stream(self._stream):
                self.memory[self.sent : stop].copy_(whole[self.sent : stop], non_blocking=True)
            if self._stream:
                torch.cuda.current_stream(self.memory.device).wait_stream(self._stream)
            self.sent = stop


@functools.cache
def _copying(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


class Uploads:
    """Copies tensors to a device block by block: the others of the block are then views of that copy.

    A copy stays until its room is needed by others, or its host memory is freed. The blocks on the device take at most
    `room` bytes: a tensor whose block has no room is copied alone, and not kept.
    """

    def __init__(self, device: torch.device, room: int) -> None:
        self._device, self._room = device, room
        self._blocks: weakref.WeakKeyDictionary[torch.UntypedStorage, _Block] = weakref.WeakKeyDictionary()
        self._turn = 0

    def __call__(self, tensor: Tensor) -> Tensor:
        """An equal tensor on the device; the same one if it is there already."""
        if tensor.device == self._device:
            return tensor
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        memory = self.memory(tensor.untyped_storage(), (tensor.storage_offset() + max(last + 1, 0)) * tensor.itemsize)
        if memory is None:
            return tensor.to(self._device, non_blocking=True)
        view = torch.empty(0, dtype=tensor.dtype, device=self._device)
        return view.set_(memory.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())

    def memory(self, storage: torch.UntypedStorage, end: int) -> Tensor | None:
        """The copy of a host block on the device, uint8, up to byte `end` at least; None where it has no room."""
        if storage.device == self._device:
            return torch.empty(0, dtype=torch.uint8, device=self._device).set_(storage)
        block = self._blocks.get(storage)
        if block is None:
            size = storage.nbytes()
            self._make_room(self._room - size)
            if self._taken() + size > self._room:
                return None
            block = self._blocks[storage] = _Block(size, self._device, pinned=storage.is_pinned())
        if block.sent < end:
            block.send(storage, end)
        block.turn = self._turn
        return block.memory

    def leave(self, room: int) -> None:
        """Keep up to `room` bytes, those used last; until this is called, all blocks that were used are kept."""
        self._turn += 1
        self._make_room(room)

    def _make_room(self, room: int) -> None:
        """Drop blocks of earlier turns, the longest unused first, until the rest takes no more than `room`."""
        for storage, block in sorted(self._blocks.items(), key=lambda it: it[1].turn):
            if block.turn < self._turn and self._taken() > room:
                del self._blocks[storage]

    def _taken(self) -> int:
        return sum(block.nbytes for block in self._blocks.values())


def _aligned(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT


def _rounded(nbytes: int) -> int:
    """torch's rule for pinned blocks: up to a power of two."""
    return 1 << (nbytes - 1).bit_length() if nbytes else 0
