"""What makes loaded models fast on this machine: attention, convolutions, compiled code.

Everything here happens once, at set-up. Graphs are made under `torch.no_grad`, as diffusers' pipelines run: a call
under `torch.inference_mode` would compile them all again. They take every size of picture and every length of text,
read the live weights where these lie, and are the same for dev and schnell. This module knows nothing of requests.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from torch import Tensor, nn

# diffusers' names of exact attention: FlashAttention 3 where it is installed, and what torch has.
ATTENTION = ("_flash_3", "_native_cudnn", "_native_flash", "native")
# Tokens of a picture of 1024x1024 pixels with dev's text: what the back ends are compared on.
TOKENS = 4096 + 512
# How blocks are compiled: whole, so that a graph cannot break unnoticed, and for every size at once.
COMPILE = {"fullgraph": True, "dynamic": True}


def keep_compiled_code(folder: Path) -> None:
    """Keep compiled code in a folder, so that the next start compiles nothing; call it before anything is compiled.

    The compiler's own keys keep versions of torch and kinds of GPU apart.
    """
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder.absolute())
    os.environ["TRITON_CACHE_DIR"] = str(folder.absolute() / "triton")


def choose_attention(transformers: Sequence[FluxTransformer2DModel], device: torch.device) -> str:
    """Give the transformers the fastest attention of this machine, measured; print which and why.

    Returns:
        its name in diffusers.
    """
    if device.type != "cuda":
        return "native"  # the only one on a CPU, and what they have already
    config = transformers[0].config
    shape = (1, TOKENS, config.num_attention_heads, config.attention_head_dim)
    seconds = {}
    for name in ATTENTION:
        try:
            seconds[name] = _attention_seconds(name, shape, transformers[0].dtype, device)
        except Exception as error:  # a back end that is not installed or does not take this GPU says so in many ways
            print(f"Attention {name} cannot be used: {type(error).__name__}.")
    fastest = min(seconds, key=seconds.__getitem__)
    for transformer in transformers:
        transformer.set_attention_backend(fastest)
    measured = ", ".join(f"{name} {1e3 * value:.2f} ms" for name, value in seconds.items())
    print(f"Attention: {fastest}, the fastest over {TOKENS} tokens ({measured}).")
    return fastest


def compile_models(
    transformers: Sequence[FluxTransformer2DModel], vae: AutoencoderKL, device: torch.device, backend: str = "inductor"
) -> None:
    """Let the repeated blocks of transformers and both halves of the VAE be compiled when they are first called.

    Args:
        transformers: those that denoise.
        vae: not compiled on a CPU, where torch picks a convolution by its size: each range of sizes would be a graph.
        device: where they compute.
        backend: of `torch.compile`.
    """
    options = COMPILE | {"backend": backend}
    for transformer in transformers:
        transformer.compile_repeated_blocks(**options)
    if device.type == "cuda":
        vae.encoder.compile(**options)
        vae.decoder.compile(**options)


def convolves_bfloat16() -> bool:
    """Whether this CPU has a fast kernel for convolutions in bfloat16: oneDNN's, which not every build of torch has."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def convolve_in_float32(vae: AutoencoderKL) -> None:
    """Let both halves of a VAE compute in float32, and take and give what they took and gave.

    A CPU without AVX-512 has no fast kernel for convolutions in bfloat16: one takes a hundred times as long as in
    float32. Nothing is changed where the CPU has one, or the VAE is float32 already.
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
    """Median of a few calls; the first ones plan and allocate."""
    query, key, value = (torch.randn(shape, dtype=dtype, device=device) for _ in range(3))  # [1, N, heads, D]
    times = []
    for _ in range(8):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        dispatch_attention_fn(query, key, value, backend=AttentionBackendName(name))
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return median(times[3:])
