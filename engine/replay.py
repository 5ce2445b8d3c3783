"""Forward passes recorded once and replayed, as CUDA graphs: T5's for each length of a prompt, a step's for each size.

The processor launches kernels one by one, and takes longer for that than the GPU takes for running them: in T5, in
steps of small pictures, and in larger ones where the processor is slow. A graph launches all of them at once, for the
same bits. Its kernels read weights where these lie, and none ever moves: LoRAs are written into live weights in place,
so a graph holds for every mix. This module knows neither prompts nor requests.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor
from transformers import T5EncoderModel
from transformers.modeling_outputs import BaseModelOutput

from service import faults

# Records work; returns a function that replays it, and its output, which each replay overwrites.
Record = Callable[[Callable[[], Tensor]], tuple[Callable[[], object], Tensor]]
# How diffusers' pipelines call T5, beside its ids.
OPTIONS = {"output_hidden_states": False}
# Steps whose graphs are kept, the latest ones: each is of a model, a precision and a number of pixels.
GRAPHS = 16
# How often a step may fail to be recorded, all in all, before none is recorded any more.
FAILURES = 3


def cuda_graph(work: Callable[[], Tensor], pool: tuple[int, int] | None = None) -> tuple[Callable[[], None], Tensor]:
    """A replay of the kernels that work launches on the current device, and its output, which each replay overwrites.

    Work must have run before, since a first call loads kernels, which cannot be recorded; and it must not wait for its
    kernels, which do not run while they are recorded. A graph may be replayed in any thread: it is launched on that
    thread's current stream, in order with everything else that is queued there.

    A replay returns once the one before it has ended. Else all steps of a picture would be queued at once: its bar
    would be full at the first step, and a cancellation noticed after the last.

    A recording that fails leaves torch as it was, and raises the error of the work. torch itself would go on recording,
    into the generator of random numbers, into the pool of memory, and on the stream where it recorded; and it would
    raise that the recording could not be ended, which says nothing.

    Args:
        work: launches kernels, and returns their output.
        pool: their memory, of `torch.cuda.graph_pool_handle`; of their own unless given. Graphs that share one
            overwrite each other's outputs, so each output has to be copied before the next is replayed.
    """
    device = torch.cuda.current_device()
    generator, pool = torch.cuda.default_generators[device], pool or torch.cuda.graph_pool_handle()
    own, graph = generator.graphsafe_get_state(), torch.cuda.CUDAGraph()
    generator.graphsafe_set_state(torch.Generator("cuda"))  # no random numbers are drawn, so any state serves the graph
    first: BaseException | None = None
    try:
        # The first block makes the present stream the current one again; the mode restricts this thread's calls alone.
        with (
            torch.cuda.stream(torch.cuda.current_stream()),
            torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"),
        ):
            try:
                output = work()
            except BaseException as error:
                first = error
                raise
    except BaseException:
        with suppress(RuntimeError):  # it may have ended already
            torch._C._cuda_endAllocateToPool(device, pool)
            torch._C._cuda_releasePool(device, pool)
        if first is None:
            raise
    finally:
        generator.graphsafe_set_state(own)
    if first is not None:
        try:
            raise first
        finally:
            del first  # its traceback keeps this frame
    ends = [torch.cuda.Event(blocking=True) for _ in range(2)]  # of the latest replay, and of the one before

    def again() -> None:
        graph.replay()
        ends.reverse()
        ends[0].record()
        ends[1].synchronize()  # one that never was waits for nothing

    return again, output


class Recorded:
    """Recorded work, and memory for its inputs: tensors by name, always of the same shapes and dtypes."""

    def __init__(self, work: Callable[..., Tensor], inputs: Mapping[str, Tensor], record: Record) -> None:
        self._inputs = {name: tensor.clone() for name, tensor in inputs.items()}
        self._replay, self._output = record(partial(work, **self._inputs))

    def __call__(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """The output for these inputs."""
        for name, place in self._inputs.items():
            place.copy_(inputs[name])
        self._replay()
        return self._output.clone()  # the next replay overwrites it


@torch.no_grad()
def replaying(t5: T5EncoderModel, lengths: Iterable[int], record: Record = cuda_graph) -> Callable[..., object]:
    """T5's forward pass, replayed for one text of any of these lengths in tokens, and as it was for other inputs."""
    plain = partial(T5EncoderModel.forward, t5)  # not the replay, should there be one already

    def work(input_ids: Tensor) -> Tensor:
        return plain(input_ids, **OPTIONS).last_hidden_state  # [1, N, D]

    recorded = {}
    for length in set(lengths):
        ids = torch.zeros(1, length, dtype=torch.int64, device=t5.device)
        work(ids)
        recorded[ids.shape] = Recorded(work, {"input_ids": ids}, record)

    def forward(*inputs: Tensor, **options: object) -> BaseModelOutput:
        if options != OPTIONS or len(inputs) != 1 or inputs[0].shape not in recorded:
            return plain(*inputs, **options)
        return BaseModelOutput(last_hidden_state=recorded[inputs[0].shape]({"input_ids": inputs[0]}))

    return forward


def replay(t5: T5EncoderModel, lengths: Iterable[int], record: Record = cuda_graph) -> None:
    """Let T5 replay its work, see `replaying`; where it cannot be recorded, the log says so, and T5 stays as it is."""
    try:
        t5.forward = replaying(t5, lengths, record)
    except Exception as error:  # an operation that cannot be recorded, too little memory, an old driver
        print(f"T5 is launched kernel by kernel, since a CUDA graph of it failed: {_first_line(error)}.")


class Pool:
    """Memory of the current device that CUDA graphs share, each overwriting the results of the others.

    Once all of its graphs are freed it cannot be used for new ones.
    """

    def __init__(self) -> None:
        self._handle = torch.cuda.graph_pool_handle()

    def record(self, work: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
        """The same as `cuda_graph` gives, in this memory."""
        return cuda_graph(work, self._handle)

    def bytes(self) -> int:
        """Its size."""
        return sum(segment["total_size"] for segment in torch.cuda.memory_snapshot(self._handle))


class Steps:
    """Forward passes of transformers, replayed once `start` was called.

    For each kind of inputs the first call loads kernels, and cuDNN plans for this length; the second one is recorded,
    and it and all later ones are replayed. Calls of any other form are never recorded.

    Args:
        transformers: their parameters never move; the kind of its inputs alone decides which kernels one launches.
        most: bytes that all graphs may keep together.
    """

    def __init__(self, transformers: Sequence[FluxTransformer2DModel], most: int) -> None:
        self._transformers, self._most = transformers, most
        self._make_pool: Callable[[], Pool] | None = None  # None: not started
        self._called: set[Hashable] = set()  # kinds of inputs
        self._recorded: OrderedDict[Hashable, Recorded] = OrderedDict()  # by kind, the latest one last
        self._pool: Pool | None = None  # of all that was recorded
        self._failures = 0

    def start(self, make_pool: Callable[[], Pool] = Pool) -> None:
        """Replay from now on, recorded by pools that are made by `make_pool`."""
        self._recorded.clear()
        self._make_pool = make_pool
        for transformer in self._transformers:
            transformer.forward = partial(self._forward, transformer)

    def stop(self, why: str) -> None:
        """Free all graphs and launch kernels one by one, for good; if it was started, the log says since `why`."""
        if self._make_pool is None:
            return
        print(f"From now on steps are launched kernel by kernel, since {why}.")
        self._recorded.clear()
        self._make_pool = None
        for transformer in self._transformers:
            vars(transformer).pop("forward", None)

    def give_back(self, error: Exception) -> None:
        """Stop, if a request's error says that the GPU's memory was short."""
        if _gpu_is_full(error):
            self.stop("memory was short")

    def _forward(self, transformer: FluxTransformer2DModel, *inputs: Tensor, **options: object) -> object:
        """The output; replayed if called as diffusers' pipelines do: tensors by name, other options off."""
        plain = partial(type(transformer).forward, transformer)
        tensors = {name: it for name, it in options.items() if isinstance(it, Tensor)}
        off = {name: it for name, it in options.items() if name not in tensors}
        if inputs or any(off.values()) or options.get("return_dict") is not False:
            return plain(*inputs, **options)
        # Options that are off count too: code compiled for {} is compiled anew for None, which breaks a recording.
        shapes = frozenset((name, it.shape, it.dtype) for name, it in tensors.items())
        kind = id(transformer), shapes, frozenset((name, repr(it)) for name, it in off.items())
        if kind not in self._called:
            output = plain(**options)
            self._called.add(kind)  # only now: a call that is interrupted may not have loaded everything
            return output
        if kind not in self._recorded and not self._make(kind, partial(plain, **off), tensors):
            return plain(**options)
        self._recorded.move_to_end(kind)
        return (self._recorded[kind](tensors),)

    def _make(self, kind: Hashable, plain: Callable[..., tuple[Tensor]], tensors: Mapping[str, Tensor]) -> bool:
        """Record a call in place of the oldest one, and say whether that can be replayed."""
        if not self._recorded:
            self._pool = self._make_pool()
        try:
            recorded = Recorded(lambda **inputs: plain(**inputs)[0], tensors, self._pool.record)
            kept = self._pool.bytes()
        except Exception as error:  # an operation that cannot be recorded, too little memory
            self._fail(kind, error)
            return False
        if self._recorded and kept > self._most:
            # Smaller graphs can reuse the memory of a larger one, not the reverse. So forget all of them: the next step
            # records this graph as the first of a new pool.
            self._recorded.clear()
            return False
        self._recorded[kind] = recorded
        if len(self._recorded) > GRAPHS:
            self._recorded.popitem(last=False)
        return True

    def _fail(self, kind: Hashable, error: Exception) -> None:
        """Let this kind run unrecorded once more, to load missing kernels; after too many failures, record no more."""
        self._failures += 1
        if self._failures == FAILURES or _gpu_is_full(error):
            self.stop(f"a CUDA graph of one failed: {_first_line(error)}")
        else:
            print(f"A CUDA graph of a step failed, and will be tried again: {_first_line(error)}.")
            self._called.discard(kind)


def _gpu_is_full(error: Exception) -> bool:
    """Whether an error says that the GPU had no memory left; torch raises the same type when the host has none."""
    return isinstance(error, RuntimeError) and "CUDA" in str(error) and faults.out_of_memory(error)


def _first_line(error: Exception) -> str:
    return faults.message(error).splitlines()[0]
