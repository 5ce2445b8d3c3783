"""Loaded models made fast on this machine: attention, convolutions, compiled code.

Everything here happens once, at set-up. Graphs are made under `torch.no_grad`, as diffusers' pipelines run: a call
under `torch.inference_mode` would compile them all again. One graph serves every size of picture, every length of text,
every mix of live weights, dev and schnell. This module knows nothing of requests.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import torch
import torch.fx.experimental._config as symbols
from diffusers import AutoencoderKL, FluxTransformer2DModel
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

# Exact attention: FlashAttention 3 where it is installed, and torch's own, which chooses a kernel for each call, with
# cuDNN's among them or without it. diffusers' back end for cuDNN's alone copies its inputs: 3 ms of a step on an H200.
FLASH_3, NATIVE = "_flash_3", "native"
CUDNN = "native with cuDNN"
# torch's kernels beside cuDNN's.
KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
# The part of the others' time that cuDNN must save: it makes a plan for each new length of text and picture together
# and for each thread, 0.05 s on an H200, and never frees one.
CUDNN_SAVES = 0.1
# The back ends are compared on the tokens of a picture of 1024x1024 pixels and dev's text.
TOKENS = 4096 + 512
# How back ends are timed: so many calls queued together, so many times.
CALLS, ROUNDS = 10, 5
# How blocks are compiled: whole, so that a graph cannot break unnoticed, and for every size at once.
COMPILE = {"fullgraph": True, "dynamic": True}
# Graphs that a block's code may have for each transformer. Two are needed: the first block is given tensors, the others
# views of larger ones. Twice as many are allowed, since one above the limit would end the start.
VARIANTS = 4


def keep_compiled_code(folder: Path) -> None:
    """Keep compiled code in a folder, so that the next start compiles nothing; call it before anything is compiled.

    The compiler's own keys keep versions of torch and kinds of GPU apart.
    """
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder.absolute())
    os.environ["TRITON_CACHE_DIR"] = str(folder.absolute() / "triton")


def choose_attention(transformers: Sequence[FluxTransformer2DModel], device: torch.device) -> str:
    """diffusers' name of the fastest attention here, once the transformers have it and the log says why."""
    if device.type != "cuda":
        return NATIVE  # the only one on a CPU, and diffusers' default
    config = transformers[0].config
    shape = (1, TOKENS, config.num_attention_heads, config.attention_head_dim)
    seconds = {}
    for name in (FLASH_3, CUDNN, NATIVE):
        kernels = [*KERNELS, SDPBackend.CUDNN_ATTENTION] if name == CUDNN else KERNELS
        try:
            with sdpa_kernel(kernels):
                seconds[name] = _attention_seconds(_diffusers_name(name), shape, transformers[0].dtype, device)
        except Exception as error:  # a back end that is not installed or does not take this GPU says so in many ways
            print(f"Attention {name} cannot be used: {type(error).__name__}.")
    chosen, reason = best_attention(seconds)
    torch.backends.cuda.enable_cudnn_sdp(chosen == CUDNN)
    for transformer in transformers:
        transformer.set_attention_backend(_diffusers_name(chosen))
    measured = ", ".join(f"{name} {1e3 * value:.2f} ms" for name, value in seconds.items())
    print(f"Attention: {chosen}, {reason}; over {TOKENS} tokens: {measured or 'nothing measured'}.")
    return _diffusers_name(chosen)


def _diffusers_name(name: str) -> str:
    return NATIVE if name == CUDNN else name


def best_attention(seconds: Mapping[str, float]) -> tuple[str, str]:
    """The attention to take by seconds of a call, and why: the fastest, but cuDNN's only if it is worth its plans."""
    if not seconds:
        return NATIVE, "since no other can be used"
    fastest, *others = sorted(seconds, key=seconds.__getitem__)
    if not others:
        return fastest, "the only one that can be used"
    if fastest != CUDNN:
        return fastest, "the fastest"
    if seconds[CUDNN] < (1 - CUDNN_SAVES) * seconds[others[0]]:
        return CUDNN, f"which saves more than {CUDNN_SAVES:.0%} of the time of any other"
    return others[0], f"since cuDNN's kernel, which plans anew for each length, saves no more than {CUDNN_SAVES:.0%}"


@contextmanager
def compiler_settings(transformers: int) -> Iterator[None]:
    """The compiler's settings while graphs of so many transformers are made: enter this around their first calls.

    Sizes that happen to be equal get symbols of their own: else a graph of the VAE that is made for a square picture
    would hold for squares alone, and another would be made for all others. The number of graphs that a block's code may
    have, 8 by itself, follows from the number of transformers, since all their blocks share that code.
    """
    limit = max(torch._dynamo.config.recompile_limit, VARIANTS * transformers)
    with torch._dynamo.config.patch(recompile_limit=limit), symbols.patch(use_duck_shape=False):
        yield


def compile_models(
    transformers: Sequence[FluxTransformer2DModel], vae: AutoencoderKL, device: torch.device, backend: str = "inductor"
) -> None:
    """Let the repeated blocks of transformers and both halves of the VAE be compiled when they are first called.

    The VAE is not compiled on a CPU, where torch picks a convolution by its size: each range of sizes would be a graph.
    """
    options = COMPILE | {"backend": backend}
    for transformer in transformers:
        transformer.compile_repeated_blocks(**options)
    if device.type == "cuda":
        vae.encoder.compile(**options)
        vae.decoder.compile(**options)


def convolves_bfloat16() -> bool:
    """Whether this CPU and this build of torch have a fast kernel for convolutions in bfloat16, oneDNN's."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def convolve_in_float32(vae: AutoencoderKL) -> None:
    """Let both halves of a bfloat16 VAE compute in float32, and still return bfloat16, unless the CPU is fast in that.

    A CPU without AVX-512 has no fast kernel for convolutions in bfloat16: one takes a hundred times as long as in
    float32.
    """
    if vae.dtype != torch.bfloat16 or convolves_bfloat16():
        return

    def widen(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(tensor.float() for tensor in inputs)

    def narrow(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output.to(torch.bfloat16)

    for half in (vae.encoder, vae.decoder):
        half.float()
        half.register_forward_pre_hook(widen)
        half.register_forward_hook(narrow)


@torch.no_grad()
def _attention_seconds(name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> float:
    """Seconds of one call, the median of a few rounds.

    The calls of a round are queued together, as a step queues them: a single one would be charged for its launch.
    """
    query, key, value = (torch.randn(shape, dtype=dtype, device=device) for _ in range(3))  # [1, N, heads, D]
    times = []
    for _ in range(1 + ROUNDS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(CALLS):
            dispatch_attention_fn(query, key, value, backend=AttentionBackendName(name))
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / CALLS)
    return median(times[1:])  # the first round plans and allocates
