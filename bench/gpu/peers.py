"""diffusers compiled, and with two LoRAs through PEFT, as its documentation shows both."""

from collections.abc import Iterator
from functools import partial

import torch
from safetensors.torch import load_file

from bench.gpu.context import ATTENTION, Bench, Row, Values, relative_error
from bench.gpu.plain import draw, noise, pipeline, step_times
from engine.acceleration import choose_attention

ADAPTERS = ("first", "second")


def compiled_diffusers(bench: Bench) -> Iterator[Row]:
    """diffusers with compiled blocks and the fastest attention."""
    yield "dev", partial(compiled, bench)


def peft(bench: Bench) -> Iterator[Row]:
    """diffusers with two adapters, as it comes, then compiled."""
    yield "dev, two LoRAs, eager", partial(with_loras, bench)
    yield "dev, two LoRAs, compiled", partial(compiled, bench)


def compiled(bench: Bench) -> Values:
    """Steps of the pristine transformer with its present adapters, blocks compiled, and the fastest attention."""
    torch.compiler.reset()  # torch compiles a limited number of variants of a block, and the product's count too
    attention = choose_attention([bench.pristine], bench.device)
    bench.pristine.compile_repeated_blocks(fullgraph=True)
    first = bench.seconds(lambda: draw(bench, 1))
    return step_times(bench) | {"compile_s": first, "attention": attention}


def with_loras(bench: Bench) -> Values:
    """Load both LoRAs and draw eagerly; also the product's error after one step with the same LoRAs."""
    bench.pristine.set_attention_backend(ATTENTION)
    torch.backends.cuda.enable_cudnn_sdp(True)  # torch's default; the product may have switched it off
    drawing, loading = pipeline(bench), 0.0
    for name, file in zip(ADAPTERS, bench.loras, strict=True):
        loading += bench.seconds(partial(drawing.load_lora_weights, load_file(file.path), adapter_name=name))
    drawing.set_adapters(list(ADAPTERS), [1.0, 1.0])
    with torch.compiler.set_stance("force_eager"):
        theirs = draw(bench, 1)
        values = step_times(bench) | {"load_s": loading, "attention": ATTENTION}
    if "bf16, two LoRAs" in bench.latents:
        values["error_of_ours"] = relative_error(bench.latents["bf16, two LoRAs"], theirs, noise(bench))
    return values
