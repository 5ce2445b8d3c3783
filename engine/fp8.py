"""A linear layer whose products run in float8: rowwise fp8 weights x dynamic rowwise fp8 activations.

Each output row of the weight and each token of the input has a scale of its own, its largest magnitude over 448 (the
largest e4m3 number), so that no row pays for another's outliers. `torch._scaled_mm` multiplies the two fp8 matrices,
accumulates in float32 and applies both scales to the result. This module knows nothing of FLUX.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

E4M3 = torch.float8_e4m3fn
LARGEST = torch.finfo(E4M3).max
# CUDA's rule for `_scaled_mm`: K and N are multiples of 16. The CPU takes any size; the filter is the same on both.
MULTIPLE = 16
# An all-zero row has no magnitude to scale by; any scale gives zeros, and this one does not overflow its inverse.
SMALLEST = torch.finfo(torch.float32).tiny * LARGEST


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """e4m3 values [..., K] and float32 scales [..., 1] of x [..., K], any floating dtype.

    Their product is x up to fp8's rounding (relative error at most 2^-4 for normal numbers).
    """
    x = x.float()
    scale = x.abs().amax(dim=-1, keepdim=True).clamp(min=SMALLEST) / LARGEST
    # The clamp: a quotient can round to just above 448, which e4m3 has no number for.
    return (x / scale).clamp(-LARGEST, LARGEST).to(E4M3), scale


def write(rows: Tensor, values: Tensor, scales: Tensor) -> None:
    """Quantise float32 rows [n, K] into e4m3 values [n, K] and float32 scales [n, 1]."""
    quantized, its_scales = quantize_rows(rows)
    values.copy_(quantized)
    scales.copy_(its_scales)


def product(values: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor) -> Tensor:
    """Quantised rows [M, K] with their scales [M, 1] times a weight [N, K] with its own [N, 1]: [M, N], bfloat16."""
    # Row scales give bfloat16 only, on CUDA; `_scaled_mm` wants its second operand column-major, hence .t().
    # Fast accumulation doubles the rate on Hopper; its error is far below fp8's own rounding.
    return torch._scaled_mm(
        values, weight.t(), scale, weight_scale.t(), out_dtype=torch.bfloat16, use_fast_accum=values.is_cuda
    )


class Fp8Linear(nn.Module):
    """Stands where an `nn.Linear` stood and shares its bias; the weight is written later, row by row.

    Input [..., K] in any floating dtype → output [..., N] in the same dtype. With `in_place` the fp8 weight lies in the
    memory of the one that it replaces, which is garbage from then on.
    """

    def __init__(self, linear: nn.Linear, *, in_place: bool = False) -> None:
        super().__init__()
        if not fits(linear):
            raise ValueError(f"An fp8 layer's sizes must be multiples of {MULTIPLE}, not {tuple(linear.weight.shape)}.")
        old = linear.weight.data
        if in_place:
            weight = old.flatten().view(E4M3)[: old.numel()].view(old.shape)
        else:
            weight = torch.zeros_like(old, dtype=E4M3)
        self.register_buffer("weight", weight)  # [N, K]
        self.register_buffer("scale", torch.ones(len(old), 1, dtype=torch.float32, device=old.device))  # [N, 1]
        self.bias = linear.bias

    def write_rows(self, start: int, rows: Tensor) -> None:
        """Quantise float32 `rows` [n, K] into the weight from row `start` on."""
        stop = start + len(rows)
        write(rows, self.weight[start:stop], self.scale[start:stop])

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        y = product(*quantize_rows(x.reshape(-1, x.shape[-1])), self.weight, self.scale).to(x.dtype)
        if self.bias is not None:
            y = y + self.bias
        return y.view(*x.shape[:-1], -1)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one dtype hold the same bits; torch.equal takes no float8, and no NaN for equal."""
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


@torch.no_grad()
def supported(device: torch.device) -> bool:
    """Whether `_scaled_mm` takes a scale for each row on this device, and multiplies rightly: one product tells.

    GPUs do from compute capability 8.9 (Ada, Hopper), CPUs with torch 2.13.
    """
    generator = torch.Generator().manual_seed(0)
    # Rows of unlike magnitude, as many as no kernel's tile has; in bfloat16, as pictures are drawn.
    x, weight = (
        torch.randn(n, 64, generator=generator, dtype=torch.float32) * torch.arange(1, n + 1)[:, None] for n in (17, 32)
    )
    x, weight = x.to(device, torch.bfloat16), weight.to(device)
    layer = Fp8Linear(nn.utils.skip_init(nn.Linear, 64, 32, bias=False, device=device))
    layer.write_rows(0, weight)
    try:
        product = layer(x)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError):  # torch's ways to say that a device or a form of scales is not supported
        return False
    exact = x.float() @ weight.T
    return bool(((product.float() - exact).norm(dim=1) < 0.1 * exact.norm(dim=1)).all())


def fits(linear: nn.Linear) -> bool:
    """Whether both sizes of a layer suit an fp8 product."""
    return linear.in_features % MULTIPLE == 0 and linear.out_features % MULTIPLE == 0


def replace_linears(
    module: nn.Module, chosen: Callable[[str], bool], *, in_place: bool = False
) -> dict[str, Fp8Linear]:
    """The new layers by name, each in place of an `nn.Linear` that fits and whose name is chosen."""
    linears = [(name, child) for name, child in module.named_modules() if isinstance(child, nn.Linear)]
    replaced = {name: Fp8Linear(child, in_place=in_place) for name, child in linears if fits(child) and chosen(name)}
    for name, layer in replaced.items():
        module.set_submodule(name, layer)
    return replaced
