"""Rows for everything that may not work on this machine: products, attention, pinned memory, compiled blocks."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from bench.gpu.context import ATTENTION, BACKENDS, Bench, Row, Values, can_be_used, in_new_thread, relative_error
from bench.gpu.models import make_transformer
from engine import fp8
from engine.acceleration import COMPILE, choose_attention
from engine.architecture import is_block_linear
from engine.live import Live
from service import slabs

# Rows of products: very few, odd numbers, 512x512 and 1024x1024 with dev's text, 1440x1440.
ROWS = (2, 17, 165, 421, 988, 4608, 8612)
# A weight of FLUX's widest linear layers, 3072 x 12288 in bfloat16.
PINNED = (3072, 12288)
# The VAE's attention over 1440x1440 pixels.
VAE_TOKENS, VAE_HEAD = 32_400, 512
TEXT = 512
CALLS = 20  # queued together


def smoke(bench: Bench) -> Iterator[Row]:
    """A row for each thing that may not work."""
    yield "imports", imports
    yield "fp8 as the product asks for it", lambda: {"supported": fp8.supported(bench.device)}
    for rows in ROWS:
        yield f"fp8 layer, eager, {rows} rows", partial(fp8_layer, bench, rows)
    for name in BACKENDS if bench.device.type == "cuda" else (ATTENTION,):
        yield f"attention {name}", partial(attention, bench, name)
    for kernel in (None, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH):
        yield f"one head of 512, {kernel.name if kernel else 'as chosen'}", partial(one_wide_head, bench, kernel)
    yield "pinned memory", partial(pinned_memory, bench)
    for precision in ("bf16", "fp8"):
        yield f"blocks, {precision}", partial(blocks, bench, precision)


def imports() -> Values:
    """The modules of fetching and serving that drawing has imported without need."""
    return {"needless": [name for name in ("cog", "predict", "weights", "sources.client") if name in sys.modules]}


def fp8_layer(bench: Bench, rows: int) -> Values:
    """A layer in fp8, which quantises its input, against the same layer in bf16."""
    bench.needs_fp8()
    width = 64 if bench.small else 3072
    linear = nn.Linear(width, width, device=bench.device, dtype=torch.bfloat16).requires_grad_(False)
    layer = fp8.Fp8Linear(linear)
    layer.write_rows(0, linear.weight.float())
    x = torch.randn(rows, width, device=bench.device, dtype=torch.bfloat16)
    times = {
        name: bench.times(lambda: [call(x) for _ in range(CALLS)])["median_s"] / CALLS  # noqa: B023
        for name, call in (("fp8_s", layer), ("bf16_s", linear))
    }
    return {"relative_error": relative_error(layer(x), linear(x))} | times


def attention(bench: Bench, name: str) -> Values:
    """Seconds of a back end's first call with a length, the second, one in another thread, and one of a new length."""
    heads, size = (4, 16) if bench.small else (24, 128)

    def call(tokens: int) -> Tensor:
        query, key, value = torch.randn(
            3, 1, tokens, heads, size, device=bench.device, dtype=torch.bfloat16
        )  # [1, N, heads, D] each
        with can_be_used():
            return dispatch_attention_fn(query, key, value, backend=AttentionBackendName(name))

    tokens = 613 if bench.small else 4613  # a length that is not used elsewhere
    return {
        "new_length_s": bench.seconds(lambda: call(tokens)),
        "same_length_s": bench.seconds(lambda: call(tokens)),
        "same_length_new_thread_s": bench.seconds(lambda: in_new_thread(lambda: call(tokens))),
        "another_length_s": bench.seconds(lambda: call(tokens + 1)),
    }


def one_wide_head(bench: Bench, kernel: SDPBackend | None) -> Values:
    """Time and memory of the VAE's attention with one of torch's kernels."""
    bench.needs_cuda()
    query = torch.randn(1, 1, VAE_TOKENS, VAE_HEAD, device=bench.device, dtype=torch.bfloat16)  # [1, heads, N, D]

    def call() -> Tensor:
        with can_be_used(), sdpa_kernel(kernel) if kernel else nullcontext():
            return scaled_dot_product_attention(query, query, query)

    return bench.peak(call) | bench.times(call, repeats=2)


def pinned_memory(bench: Bench) -> Values:
    """Memory of a pinned tensor in its own slab: torch rounds sizes up to a power of two."""
    bench.needs_cuda()
    tensor = torch.zeros(PINNED, dtype=torch.bfloat16)
    before, free, start = torch.cuda.host_memory_stats(), _available(), time.perf_counter()
    pinned = slabs.pack({"weight": tensor})["weight"]
    took, after = time.perf_counter() - start, torch.cuda.host_memory_stats()
    grown = {name: after[name] - before.get(name, 0) for name in sorted(after) if name.endswith("bytes.current")}
    return {"tensor_bytes": pinned.nbytes, "pin_s": took, "less_available_bytes": free - _available()} | grown


def blocks(bench: Bench, precision: str) -> Values:
    """One double and one single block, eager, then compiled: two lengths, two threads."""
    if precision == "fp8":
        bench.needs_fp8()
    torch.manual_seed(0)
    config = bench.sizes["transformer"] | {"num_layers": 1, "num_single_layers": 1}
    pristine = make_transformer(bench.device, config)
    base = dict(pristine.state_dict())
    live = Live(make_transformer(bench.device, config), {"dev": base})
    if precision == "fp8":
        live = live.quantized(is_block_linear)
    live.hold("dev", [])
    attention = choose_attention([live.module], bench.device)
    lengths = (1536, 988) if bench.small else (4608, 988)
    calls = {tokens: partial(_forward, live.module, bench, tokens) for tokens in lengths}
    exact = {tokens: _forward(pristine, bench, tokens) for tokens in lengths}
    eager = {tokens: call() for tokens, call in calls.items()}
    eager_s = {tokens: bench.times(call, repeats=3)["median_s"] for tokens, call in calls.items()}
    before = counters["stats"]["unique_graphs"]
    live.module.compile_repeated_blocks(**COMPILE)
    values: Values = {"attention": attention}
    compiled: dict[str, Tensor] = {}
    # A fresh cache: code compiled here must not speed up or change what the product compiles later. On a CPU times mean
    # nothing, and sharing the cache saves a minute.
    with fresh_cache() if bench.device.type == "cuda" else nullcontext():
        for tokens, call in calls.items():
            values[f"first_s_{tokens}"] = bench.seconds(_kept(compiled, f"{tokens}", call))
            in_new_thread(_kept(compiled, f"{tokens}_other_thread", call))
            values[f"compiled_s_{tokens}"] = bench.times(call, repeats=3)["median_s"]
            values[f"eager_s_{tokens}"] = eager_s[tokens]
            values[f"eager_error_{tokens}"] = relative_error(eager[tokens], exact[tokens])
    torch.compiler.reset()  # torch compiles a limited number of variants of a block, and others follow
    values |= {f"error_{it}": relative_error(y, eager[int(it.split("_")[0])]) for it, y in compiled.items()}
    return values | {"graphs": counters["stats"]["unique_graphs"] - before}


def _kept(results: dict[str, Tensor], name: str, call: Callable[[], Tensor]) -> Callable[[], None]:
    """The same call; it keeps its result by name."""

    def run() -> None:
        results[name] = call()

    return run


@torch.no_grad()
def _forward(transformer: FluxTransformer2DModel, bench: Bench, tokens: int) -> Tensor:
    """The output of a transformer for one step, over so many tokens of text and image together."""
    config, generator = transformer.config, torch.Generator(bench.device).manual_seed(tokens)
    image = tokens - TEXT

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=bench.device, dtype=torch.bfloat16)

    ids = torch.zeros(tokens, 3, device=bench.device)
    ids[TEXT:, 1] = torch.arange(image, device=bench.device) // 64
    ids[TEXT:, 2] = torch.arange(image, device=bench.device) % 64
    return transformer(
        hidden_states=noise(1, image, config.in_channels),
        encoder_hidden_states=noise(1, TEXT, config.joint_attention_dim),
        pooled_projections=noise(1, config.pooled_projection_dim),
        timestep=torch.full((1,), 0.5, device=bench.device),
        guidance=torch.full((1,), 3.0, device=bench.device),
        img_ids=ids[TEXT:],
        txt_ids=ids[:TEXT],
        joint_attention_kwargs={},  # as pipelines pass it
        return_dict=False,
    )[0]


def _available() -> int:
    """Bytes of available host memory."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
