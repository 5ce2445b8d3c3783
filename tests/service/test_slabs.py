"""Tensors packed into slabs are the same tensors; what they take of pinned memory is known before; one upload each."""

import weakref
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest
import torch
from diffusers import FluxTransformer2DModel
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import T5Config, T5EncoderModel

from service import slabs
from service.slabs import ALIGNMENT, Uploads, pack, packing, pinned_bytes, taken

# To torch another device than "cpu", though its memory is the same: what is moved there is really copied.
OTHER = torch.device("cpu", 0)
SMALL_SLAB = 4096
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.uint8]
TENSORS = st.lists(st.tuples(st.lists(st.integers(0, 40), max_size=3), st.sampled_from(DTYPES)), max_size=40)


class Allocator:
    """Allocates as torch's pinned allocator does, blocks of a power of two, and counts what that takes."""

    def __init__(self, device: str = "cpu") -> None:
        self.blocks: list[Tensor] = []
        self.taken = 0
        self._device = device

    def __call__(self, nbytes: int) -> Tensor:
        self.taken += power_of_two(nbytes)
        self.blocks.append(torch.empty(nbytes, dtype=torch.uint8, device=self._device))
        return self.blocks[-1]


def power_of_two(nbytes: int) -> int:
    return next(2**bits for bits in range(64) if 2**bits >= nbytes) if nbytes else 0


@pytest.fixture(scope="module", autouse=True)
def _small_slabs() -> Iterable[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slabs, "SLAB", SMALL_SLAB)
        yield


@pytest.fixture
def full_size(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(slabs, "SLAB", 2**30)
    return slabs.SLAB


def numbers(shape: Iterable[int], dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(tuple(shape)) * 30).to(dtype)


def place(tensor: Tensor) -> range:
    start = tensor.storage_offset() * tensor.itemsize
    return range(start, start + tensor.nbytes)


@settings(max_examples=60, deadline=None)
@given(kinds=TENSORS)
def test_every_tensor_is_equal_aligned_inside_its_slab_and_alone_there(
    kinds: list[tuple[list[int], torch.dtype]],
) -> None:
    tensors = {f"{index}": numbers(*kind) for index, kind in enumerate(kinds)}
    allocator = Allocator()
    packed = pack(tensors, allocator)
    assert packed.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert packed[name].dtype == tensor.dtype
        assert torch.equal(packed[name], tensor)
        assert packed[name].is_contiguous()
    placed = 0
    for block in allocator.blocks:
        inside = [it for it in packed.values() if it.untyped_storage()._cdata == block.untyped_storage()._cdata]
        ranges = sorted((place(tensor) for tensor in inside), key=lambda it: (it.start, it.stop))
        assert all(it.start % ALIGNMENT == 0 and it.stop <= block.nbytes for it in ranges)
        assert all(a.stop <= b.start for a, b in pairwise(ranges))
        assert block.nbytes <= SMALL_SLAB or len(inside) == 1
        placed += len(inside)
    assert placed == len(tensors)
    assert allocator.taken == pinned_bytes(tensor.nbytes for tensor in tensors.values())


@settings(max_examples=40, deadline=None)
@given(sizes=st.lists(st.integers(0, SMALL_SLAB), max_size=60))
def test_no_two_slabs_would_fit_into_one(sizes: list[int]) -> None:
    allocator = Allocator()
    pack({index: numbers([size], torch.uint8) for index, size in enumerate(sizes)}, allocator)
    filled = sorted(block.nbytes for block in allocator.blocks)
    assert len(filled) < 2 or filled[0] + filled[1] > SMALL_SLAB - ALIGNMENT


def flux() -> nn.Module:
    return FluxTransformer2DModel(guidance_embeds=True)


def t5() -> nn.Module:
    sizes = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "vocab_size": 32128}
    return T5EncoderModel(T5Config(**sizes, feed_forward_proj="gated-gelu"))


@pytest.mark.parametrize(("make", "gigabytes"), [(flux, 23.80), (t5, 9.52)])
def test_flux_1_takes_two_per_cent_more_than_its_bytes(
    full_size: int, make: Callable[[], nn.Module], gigabytes: float
) -> None:
    with torch.device("meta"):
        tensors = dict(make().bfloat16().named_parameters())
    sizes = [tensor.nbytes for tensor in tensors.values()]
    assert sum(sizes) / 1e9 == pytest.approx(gigabytes, abs=0.01)
    allocator = Allocator("meta")
    with torch.no_grad():
        pack(tensors, allocator)
    assert allocator.taken == pinned_bytes(sizes) < 1.02 * sum(sizes)
    assert max(block.nbytes for block in allocator.blocks) <= full_size
    # The bytes of a block for each tensor.
    assert sum(power_of_two(size) for size in sizes) > 1.35 * sum(sizes)


def test_several_threads_fill_slabs_and_change_the_dtype_on_the_way() -> None:
    tensors = {index: numbers([index % 7 + 1, 100 + index]) for index in range(200)}
    allocator = Allocator()
    jobs = packing(tensors, torch.bfloat16, allocator)
    with ThreadPoolExecutor(8) as threads:
        parts = list(threads.map(lambda job: job(), jobs))
    packed = {index: tensor for part in parts for index, tensor in part.items()}
    assert len(jobs) == len(allocator.blocks) > 20
    assert sum(map(len, parts)) == len(tensors)
    assert all(torch.equal(packed[index], tensors[index].bfloat16()) for index in tensors)
    assert allocator.taken == pinned_bytes(2 * tensor.numel() for tensor in tensors.values())


def test_strides_of_a_tensor_do_not_matter() -> None:
    wide = numbers([30, 20])
    views = {"transposed": wide.T, "columns": wide[:, 3:9], "expanded": wide[:1].expand(5, 20), "number": wide[3, 4]}
    packed = pack(views)
    assert all(torch.equal(packed[name], view) for name, view in views.items())
    wide.zero_()
    assert all(tensor.ne(0).all() for tensor in packed.values())


def pageable(nbytes: int) -> Tensor:
    return torch.empty(nbytes, dtype=torch.uint8)


def test_a_slab_is_counted_whole_and_once() -> None:
    packed = pack({name: numbers([100]) for name in "abc"}, allocate=pageable)
    alone = numbers([7])
    size = 2 * -(-400 // ALIGNMENT) * ALIGNMENT + 400
    assert taken(packed.values()) == taken([packed["b"]]) == size
    assert taken([*packed.values(), alone, alone[2:]]) == size + 28


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_what_is_pinned_is_counted_as_torch_rounds_it(full_size: int) -> None:
    tensors = {name: numbers([size]) for name, size in {"a": 1000, "b": 300_000}.items()}
    first = pack({"number": numbers([1])})  # before there is a pinned block, there are no statistics
    before = torch.cuda.host_memory_stats()["allocated_bytes.current"]
    packed = pack(tensors)
    grown = torch.cuda.host_memory_stats()["allocated_bytes.current"] - before
    assert grown == taken(packed.values()) == pinned_bytes(it.nbytes for it in tensors.values())
    assert all(it.pin_memory().data_ptr() == it.data_ptr() for it in (*first.values(), *packed.values()))


# ---------------------------------------------------------------------------------------------------------------------
# Uploads


def storages(tensors: Iterable[Tensor]) -> int:
    return len({tensor.untyped_storage()._cdata for tensor in tensors})


def test_the_first_tensor_of_a_slab_brings_them_all(full_size: int) -> None:
    tensors = pack({name: numbers([size, 3], torch.bfloat16) for name, size in {"a": 50, "b": 70, "c": 0}.items()})
    tensors |= {"turned": tensors["a"].T, "part": tensors["b"][9:20], "alone": numbers([4])}
    bring = Uploads(OTHER, room=10_000)
    brought = {name: bring(tensor) for name, tensor in tensors.items()}
    assert storages(brought[name] for name in tensors if name != "alone") == 1
    assert storages([*brought.values(), *tensors.values()]) == 4
    for name, tensor in tensors.items():
        assert torch.equal(brought[name], tensor)
        assert brought[name].stride() == tensor.stride()
        assert bring(tensor).untyped_storage()._cdata == brought[name].untyped_storage()._cdata


def test_slabs_beyond_the_room_come_tensor_by_tensor(full_size: int) -> None:
    several = [pack({name: numbers([100]) for name in "ab"}, allocate=pageable) for _ in range(3)]
    size = taken(several[0].values())
    bring = Uploads(OTHER, room=2 * size)
    brought = [[bring(tensor) for tensor in slab.values()] for slab in several]
    assert [storages(tensors) for tensors in brought] == [1, 1, 2]
    assert [taken(tensors) for tensors in brought] == [size, size, 800]
    for slab, tensors in zip(several, brought, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(slab.values(), tensors, strict=True))


def test_what_was_used_last_stays_and_goes_with_its_host_memory(full_size: int) -> None:
    several = [pack({name: numbers([100]) for name in "ab"}, allocate=pageable) for _ in range(3)]
    size = taken(several[0].values())
    bring = Uploads(OTHER, room=2 * size)
    first = [storage(bring(slab["a"])) for slab in several[:2]]
    assert bring(several[2]["a"]).untyped_storage().nbytes() == 400  # both others are in use
    bring.leave(2 * size)
    assert storage(bring(several[0]["b"])) == first[0]
    third = storage(bring(several[2]["a"]))  # in place of the second, which was not used again
    bring.leave(size)
    assert storage(bring(several[2]["a"])) == third
    assert bring.memory(several[0]["a"].untyped_storage(), 400) is not None  # where the second was
    assert bring(several[1]["a"]).untyped_storage().nbytes() == 400
    gone = weakref.ref(bring(several[2]["a"]).untyped_storage())
    del several[2]
    assert gone() is None


def storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


@settings(max_examples=40, deadline=None)
@given(sizes=st.lists(st.integers(0, SMALL_SLAB), max_size=60))
def test_tensors_keep_their_order_in_a_slab(sizes: list[int]) -> None:
    packed = pack({index: numbers([size], torch.uint8) for index, size in enumerate(sizes)})
    by_slab: dict[int, list[int]] = {}
    for tensor in packed.values():
        by_slab.setdefault(storage(tensor), []).append(tensor.storage_offset())
    assert all(offsets == sorted(offsets) for offsets in by_slab.values())


def test_where_a_tensor_lies_already_it_is_taken_as_it_is() -> None:
    tensor = numbers([10])
    assert Uploads(tensor.device, room=10_000)(tensor) is tensor
