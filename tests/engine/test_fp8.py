import pytest
import torch
from torch import Tensor, nn

from engine import fp8

EPS = 2.0**-4  # half a unit in the last of e4m3's three mantissa bits, relative to the number


@pytest.mark.parametrize("rows", [1, 7, 64])
def test_rows_are_rounded_to_fp8_and_no_worse(rows: int) -> None:
    x = torch.randn(rows, 48, generator=torch.Generator().manual_seed(rows)) * 10.0 ** torch.arange(rows)[
        :, None
    ].clamp(max=6)
    values, scale = fp8.quantize_rows(x)
    error = (values.float() * scale - x).abs()
    # Below the smallest normal number (2^-6 of the row's scale) the step is absolute.
    assert (error <= torch.maximum(EPS * x.abs(), scale * 2.0**-10)).all()
    assert values.float().abs().amax(dim=1).eq(fp8.LARGEST).all()


def test_a_row_of_zeros_stays_zero() -> None:
    values, scale = fp8.quantize_rows(torch.zeros(3, 16))
    assert (values.float() * scale).eq(0).all()
    assert scale.isfinite().all()


def test_what_multiplies_rightly_is_supported(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, multiply = torch.device("cpu"), torch._scaled_mm

    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("Now _scaled_mm only supports per-tensor scaling for CPU backend.")

    def forget_a_scale(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, **options: object) -> Tensor:
        return multiply(a, b, torch.ones_like(scale_a), scale_b, **options)

    assert fp8.supported(cpu)
    for other in (refuse, forget_a_scale):
        monkeypatch.setattr(torch, "_scaled_mm", other)
        assert not fp8.supported(cpu)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_layer_multiplies_what_was_written(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(64, 48, dtype=dtype).requires_grad_(False)
    weight = torch.randn(48, 64, generator=generator)
    x = torch.randn(2, 5, 64, generator=generator).to(dtype)
    layer = fp8.Fp8Linear(linear)
    for start in range(0, 48, 20):
        layer.write_rows(start, weight[start : start + 20])
    y = layer(x)
    exact = x.float() @ weight.T + linear.bias.float()
    assert y.dtype == dtype
    assert y.shape == (2, 5, 48)
    assert (y.float() - exact).norm() / exact.norm() < 0.06
    assert not torch.equal(y.float(), exact)  # fp8 really rounded


def test_rows_written_apart_equal_rows_written_together() -> None:
    linear = nn.Linear(32, 48, bias=False)
    weight = torch.randn(48, 32)
    whole, parts = fp8.Fp8Linear(linear), fp8.Fp8Linear(linear)
    whole.write_rows(0, weight)
    for start in range(0, 48, 7):
        parts.write_rows(start, weight[start : start + 7])
    assert torch.equal(whole.weight.view(torch.uint8), parts.weight.view(torch.uint8))
    assert torch.equal(whole.scale, parts.scale)


@pytest.mark.parametrize(
    ("inputs", "outputs", "fits"), [(32, 48, True), (32, 40, False), (24, 48, False), (33, 7, False), (16, 16, True)]
)
def test_only_multiples_of_16_are_replaced(inputs: int, outputs: int, fits: bool) -> None:
    module = nn.Sequential(nn.Linear(inputs, outputs))
    replaced = fp8.replace_linears(module, lambda _: True)
    assert fp8.fits(nn.Linear(inputs, outputs)) == fits
    assert isinstance(module[0], fp8.Fp8Linear) == fits == bool(replaced)


def test_only_chosen_layers_are_replaced() -> None:
    module = nn.ModuleDict({"a": nn.Linear(16, 16), "b": nn.Linear(16, 16)})
    assert set(fp8.replace_linears(module, lambda name: name == "a")) == {"a"}
    assert isinstance(module["b"], nn.Linear)
