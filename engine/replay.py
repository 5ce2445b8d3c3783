"""T5's kernels recorded once for each length that prompts have, and replayed: a CUDA graph of its forward pass.

For a new prompt T5 waits for the processor, not for the GPU: on an H200 launching its kernels one by one takes 45 ms,
running them 21. A graph launches them all at once, 24 ms for the same bits. Its kernels read T5's weights where they
lie; nothing writes these, since a LoRA changes no text encoder but CLIP. This module knows neither prompts nor FLUX.
"""

from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial

import torch
from torch import Tensor
from transformers import T5EncoderModel
from transformers.modeling_outputs import BaseModelOutput

from service import faults

# Runs work and records it; returns what runs it again, and its output, which each run overwrites.
Record = Callable[[Callable[[], Tensor]], tuple[Callable[[], object], Tensor]]
# How diffusers' pipelines call T5, beside its ids.
OPTIONS = {"output_hidden_states": False}


def cuda_graph(work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """Record the kernels that work launches on the current device; work must not wait for them.

    A graph may be replayed in any thread: it is launched on the stream where that thread works, torch's default one
    unless it has chosen another, and so runs after all that was queued there before, and before all that comes.

    A recording that fails leaves torch as it was. torch itself would go on recording: into the generator of random
    numbers, into the pool of memory, and on the stream where it recorded.
    """
    device = torch.cuda.current_device()
    generator, pool = torch.cuda.default_generators[device], torch.cuda.graph_pool_handle()
    own, graph = generator.graphsafe_get_state(), torch.cuda.CUDAGraph()
    work()  # what is loaded or allocated at a first call cannot be recorded
    generator.graphsafe_set_state(torch.Generator("cuda"))  # T5 draws no random numbers, so any state serves the graph
    try:
        # The first block makes the present stream the current one again; the mode restricts this thread's calls alone.
        with (
            torch.cuda.stream(torch.cuda.current_stream()),
            torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"),
        ):
            output = work()
    except BaseException:
        with suppress(RuntimeError):  # it may have ended already
            torch._C._cuda_endAllocateToPool(device, pool)
            torch._C._cuda_releasePool(device, pool)
        raise
    finally:
        generator.graphsafe_set_state(own)
    return graph.replay, output


@torch.no_grad()
def replaying(t5: T5EncoderModel, lengths: Iterable[int], record: Record = cuda_graph) -> Callable[..., object]:
    """T5's forward pass, replayed for one text of any of these lengths, and as it was for all other inputs.

    Args:
        t5: on the device where it computes.
        lengths: in tokens.
        record: how its work is recorded.
    """
    plain = partial(T5EncoderModel.forward, t5)  # not the replay, should there be one already
    recorded = {}
    for length in set(lengths):
        ids = torch.zeros(1, length, dtype=torch.int64, device=t5.device)
        recorded[ids.shape] = ids, *record(lambda ids=ids: plain(ids, **OPTIONS).last_hidden_state)

    def forward(*inputs: Tensor, **options: object) -> BaseModelOutput:
        if options != OPTIONS or len(inputs) != 1 or inputs[0].shape not in recorded:
            return plain(*inputs, **options)
        ids, replay, output = recorded[inputs[0].shape]
        ids.copy_(inputs[0])
        replay()
        return BaseModelOutput(last_hidden_state=output.clone())  # [1, N, D]; the next replay overwrites the output

    return forward


def replay(t5: T5EncoderModel, lengths: Iterable[int], record: Record = cuda_graph) -> None:
    """Let T5 replay its work, as `replaying` says; where that cannot be recorded, the log says so, and T5 stays."""
    try:
        t5.forward = replaying(t5, lengths, record)
    except Exception as error:  # an operation that cannot be recorded, too little memory, an old driver
        why = faults.message(error).splitlines()[0]
        print(f"T5 is launched kernel by kernel, since a CUDA graph of it failed: {why}.")
