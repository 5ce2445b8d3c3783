"""The steps of FLUX's blocks between their large products, in one pass over memory each, as operators of torch.

The compiler does not look into an operator. On a GPU it runs a Triton kernel, which computes in float32 and rounds
once. On a CPU, for sizes that the kernel does not take, and to tell the compiler the shapes, it runs the function in
torch. Triton comes with torch for CUDA alone, so it is imported for the first CUDA tensor.
"""

from collections.abc import Callable, Sequence
from math import gcd

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.fp8 import E4M3, quantize_rows

# Of all norms in FLUX's blocks.
EPS = 1e-6
# The fastest on an H200 among 4, 8, 16 (GELU), and 2, 4, 8.
NORM_WARPS, GELU_WARPS, ROTATE_WARPS = 4, 8, 2
# Heads that a program works on at a time.
CHUNK = 8

Quantized = tuple[Tensor, Tensor]  # e4m3 values [B, N, C] and float32 scales [B, N, 1], as of `fp8.quantize_rows`


def _operator(in_torch: Callable[..., object], on_cuda: Callable[..., object], schema: str) -> Callable[..., object]:
    """An operator: the function in torch, named like it without the underscore, and another function on CUDA."""
    name = in_torch.__name__.removeprefix("_")
    torch.library.define(f"flux_sprites::{name}", schema)
    torch.library.impl(f"flux_sprites::{name}", "CompositeExplicitAutograd", in_torch)
    torch.library.impl(f"flux_sprites::{name}", "CUDA", on_cuda)
    torch.library.register_fake(f"flux_sprites::{name}", in_torch)
    return getattr(torch.ops.flux_sprites, name).default


def _is_thrice_a_power_of_two(width: int) -> bool:
    third = width // 3
    return width % 3 == 0 and third > 0 and third & (third - 1) == 0


def _rows(x: Tensor) -> Tensor:
    """[B, N, C] → [B * N, C], with contiguous rows that may lie apart."""
    x = x.flatten(0, 1)
    return x if x.stride(1) == 1 else x.contiguous()


def _empty(tokens: Tensor, width: int) -> Quantized:
    """Memory for quantised rows, one for each token of [B, N, ...]."""
    values = torch.empty(*tokens.shape[:2], width, dtype=E4M3, device=tokens.device)
    return values, torch.empty(*tokens.shape[:2], 1, dtype=torch.float32, device=tokens.device)


def _norm_quantize_on_cuda(x: Tensor, factor: Tensor, shift: Tensor) -> Quantized:
    if not _is_thrice_a_power_of_two(width := x.shape[2]) or not factor.stride(1) == shift.stride(1) == 1:
        return _norm_quantize(x, factor, shift)
    from engine import block_kernels

    rows, (values, scales) = _rows(x), _empty(x, width)
    strides = rows.stride(0), factor.stride(0), shift.stride(0)
    block_kernels.norm_quantize[(len(rows),)](
        rows, factor, shift, values, scales, x.shape[1], *strides, SIZE=width // 3, num_warps=NORM_WARPS
    )
    return values, scales


def _norm_quantize(x: Tensor, factor: Tensor, shift: Tensor) -> Quantized:
    """norm(x) * (1 + factor) + shift, quantised: x [B, N, C], factor and shift [B, C]."""
    y = F.layer_norm(x.float(), x.shape[2:], eps=EPS)
    return quantize_rows(y * (1 + factor.float()[:, None]) + shift.float()[:, None])


norm_quantize = _operator(
    _norm_quantize, _norm_quantize_on_cuda, "(Tensor x, Tensor factor, Tensor shift) -> (Tensor, Tensor)"
)


def _gelu_quantize_on_cuda(attention: Tensor | None, hidden: Tensor, bias: Tensor) -> Quantized:
    first, width = 0 if attention is None else attention.shape[2], hidden.shape[2]
    if not _is_thrice_a_power_of_two(width) or (first and not _is_thrice_a_power_of_two(first)):
        return _gelu_quantize(attention, hidden, bias)
    from engine import block_kernels

    hidden, (values, scales) = _rows(hidden), _empty(hidden, first + width)
    before = hidden if attention is None else _rows(attention)
    sizes = {"FIRST": first // 3, "SIZE": width // 3}
    block_kernels.gelu_quantize[(len(hidden),)](
        before, hidden, bias, values, scales, before.stride(0), hidden.stride(0), **sizes, num_warps=GELU_WARPS
    )
    return values, scales


def _gelu_quantize(attention: Tensor | None, hidden: Tensor, bias: Tensor) -> Quantized:
    """GELU(hidden + bias), behind attention where there is one, quantised: attention [B, N, A], hidden [B, N, H]."""
    hidden = F.gelu(hidden.float() + bias.float(), approximate="tanh")
    return quantize_rows(hidden if attention is None else torch.cat([attention.float(), hidden], dim=2))


gelu_quantize = _operator(
    _gelu_quantize, _gelu_quantize_on_cuda, "(Tensor? attention, Tensor hidden, Tensor bias) -> (Tensor, Tensor)"
)


def _rotate_heads_on_cuda(
    products: Sequence[Tensor], biases: Sequence[Tensor], norms: Sequence[Tensor], cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    (batch, _, width), size = products[0].shape, len(norms[0])
    heads, total = width // size, len(cos)
    if size & (size - 1):
        return _rotate_heads(products, biases, norms, cos, sin)
    from engine import block_kernels

    made = [torch.empty(batch, total, heads, size, dtype=norms[0].dtype, device=cos.device) for _ in range(3)]
    cos, sin, offset = cos.contiguous(), sin.contiguous(), 0
    sizes = {"HEADS": heads, "CHUNK": gcd(heads, CHUNK), "D": size}
    for n in range(len(norms) // 2):
        tokens = products[3 * n].shape[1]
        rows = [_rows(it) for it in products[3 * n : 3 * n + 3]]
        if len({it.stride(0) for it in rows}) > 1:
            rows = [it.contiguous() for it in rows]
        inputs = *rows, *biases[3 * n : 3 * n + 3], *norms[2 * n : 2 * n + 2], cos, sin
        block_kernels.rotate_heads[(batch * tokens, 3)](
            *inputs, *made, rows[0].stride(0), tokens, offset, total, **sizes, num_warps=ROTATE_WARPS
        )
        offset += tokens
    return made[0], made[1], made[2]


def _rotate_heads(
    products: Sequence[Tensor], biases: Sequence[Tensor], norms: Sequence[Tensor], cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys with norms and RoPE, and values, the streams one behind the other: [B, all tokens, heads, D].

    Args:
        products: [B, n, heads * D]: query, key and value of each stream (text, image), without their biases.
        biases: of the same, [heads * D].
        norms: weights of the RMS norms of query and key, of each stream, [D]; their dtype is that of the result.
        cos: [all tokens, D], float32.
        sin: likewise.
    """
    size = len(norms[0])
    heads = [
        (product.float() + bias.float()).unflatten(2, (-1, size))
        for product, bias in zip(products, biases, strict=True)
    ]  # [B, n, heads, D]
    queries, keys = (
        torch.cat(
            [F.rms_norm(x, (size,), norm.float(), EPS) for x, norm in zip(heads[n::3], norms[n::2], strict=True)], 1
        )
        for n in (0, 1)
    )
    turned = []
    for x in (queries, keys):
        real, imaginary = x.unflatten(-1, (-1, 2)).unbind(-1)
        turned.append(x * cos[:, None] + torch.stack([-imaginary, real], -1).flatten(-2) * sin[:, None])
    query, key, value = (x.to(norms[0].dtype).contiguous() for x in (*turned, torch.cat(heads[2::3], 1)))
    return query, key, value


rotate_heads = _operator(
    _rotate_heads,
    _rotate_heads_on_cuda,
    "(Tensor[] products, Tensor[] biases, Tensor[] norms, Tensor cos, Tensor sin) -> (Tensor, Tensor, Tensor)",
)


def _linear_gelu_on_cuda(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    # cuBLASLt applies bias and GELU, in its tanh form, to the sums before it writes them.
    return torch._addmm_activation(bias, x.flatten(0, 1), weight.t(), use_gelu=True).unflatten(0, x.shape[:2])


def _linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """GELU(x @ weight.T + bias): x [B, N, K] → [B, N, M]."""
    return F.gelu(F.linear(x, weight, bias), approximate="tanh")


# An operator, since the compiler would split torch's own into a product and a GELU, on a GPU too.
linear_gelu = _operator(_linear_gelu, _linear_gelu_on_cuda, "(Tensor x, Tensor weight, Tensor bias) -> Tensor")
