"""LoRA files of every format become the same deltas, or are refused in a sentence."""

import copy
import json
import math
import random
import resource
import struct
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.loaders import FluxLoraLoaderMixin
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from engine.live import Live, Term
from lora.deltas import LowRank
from lora_loader import Lora, read_lora
from tests.support import lora_files, models
from tests.support.lora_files import ALPHA, RANK, Tensors

STRENGTH = ALPHA / RANK


@pytest.fixture(scope="module")
def transformer() -> FluxTransformer2DModel:
    return models.transformer()


@pytest.fixture(scope="module")
def text_encoder() -> CLIPTextModel:
    return models.text_encoder()


class Reader:
    """Reads tensors as a LoRA for the small models, and holds it in live copies of them."""

    def __init__(self, folder: Path, transformer: nn.Module, text_encoder: nn.Module) -> None:
        self.folder, self.transformer, self.text_encoder = folder, transformer, text_encoder
        self.base, self._live = _live_copy(transformer)
        self.clip_base, self._live_clip = _live_copy(text_encoder)

    def read(self, tensors: Tensors, header: dict[str, str] | None = None) -> Lora:
        file = lora_files.write(self.folder / "a.safetensors", tensors, header)
        return read_lora(file, self.transformer, self.text_encoder)

    def live(self, tensors: Tensors, header: dict[str, str] | None = None, scale: float = 1.0) -> Tensors:
        """The transformer's weights with this LoRA in."""
        return _held(self._live, Term("a", scale, self.read(tensors, header).transformer))

    def live_clip(self, tensors: Tensors) -> Tensors:
        return _held(self._live_clip, Term("a", 1.0, self.read(tensors).text_encoder))

    def hold(self, lora: Lora) -> Tensors:
        return _held(self._live, Term("a", 1.0, lora.transformer))

    def unchanged(self) -> Tensors:
        """The transformer's weights without a LoRA."""
        return _held(self._live, Term("a", 0.0, {}))

    def refusal(self, tensors: Tensors, header: dict[str, str] | None = None) -> str:
        with pytest.raises(ValueError, match=r"\.$") as caught:
            self.read(tensors, header)
        assert_is_one_sentence(str(caught.value), self)
        return str(caught.value)


def assert_is_one_sentence(text: str, reader: Reader) -> None:
    assert text.endswith(".")
    assert "\n" not in text
    assert str(reader.folder) not in text
    assert len(text) < 600


def _live_copy(module: nn.Module) -> tuple[Tensors, Live]:
    base = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    return base, Live(copy.deepcopy(module).requires_grad_(False), {"base": base})


def _held(live: Live, term: Term) -> Tensors:
    live.hold("base", [])
    live.hold("base", [term])
    return {name: parameter.clone() for name, parameter in live.module.named_parameters()}


@pytest.fixture(scope="module")
def reader(
    tmp_path_factory: pytest.TempPathFactory, transformer: FluxTransformer2DModel, text_encoder: CLIPTextModel
) -> Reader:
    return Reader(tmp_path_factory.mktemp("loras"), transformer, text_encoder)


def same(a: Tensors, b: Tensors) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def changed(reader: Reader, live: Tensors) -> set[str]:
    return {name for name, tensor in live.items() if not torch.equal(tensor, reader.base[name])}


def expected(reader: Reader, made: list[lora_files.Change], scale: float = 1.0) -> Tensors:
    """The weights by the definition of a LoRA, in float64."""
    weights = {name: tensor.double() for name, tensor in reader.base.items()}
    for change in made:
        for part, up in change.by_part.items():
            weights[f"{part}.weight"] += scale * STRENGTH * (up.double() @ change.down.double())
    return weights


# ---------------------------------------------------------------------------------------------------------------------
# The table of formats


@pytest.mark.parametrize("scale", [1.0, -0.7])
def test_a_lora_is_base_plus_scale_times_strength_times_up_times_down(reader: Reader, scale: float) -> None:
    made = lora_files.changes(reader.transformer)
    live = reader.live(lora_files.EXACT["diffusers"](made), scale=scale)
    for name, weight in expected(reader, made, scale).items():
        torch.testing.assert_close(live[name], weight.float(), rtol=1e-6, atol=1e-6)
    assert changed(reader, live) == {f"{part}.weight" for change in made for part in change.parts}


@pytest.mark.parametrize("form", lora_files.EXACT)
def test_every_format_gives_the_same_bits(reader: Reader, form: str) -> None:
    made = lora_files.changes(reader.transformer)
    tensors = lora_files.EXACT[form](made)
    assert same(reader.live(tensors), reader.live(lora_files.EXACT["diffusers"](made)))
    report = reader.read(tensors).report
    assert report.applied == report.total == len(tensors)
    assert not report.ignored


@pytest.mark.parametrize("form", lora_files.EXACT_IN_BLOCKS)
def test_formats_of_blocks_alone_give_the_same_bits(reader: Reader, form: str) -> None:
    made = lora_files.changes(reader.transformer, only=lora_files.is_block)
    tensors = lora_files.EXACT_IN_BLOCKS[form](made)
    assert same(reader.live(tensors), reader.live(lora_files.EXACT["diffusers"](made)))


@pytest.mark.parametrize("form", lora_files.ROUNDED)
def test_formats_that_multiply_in_another_order_differ_by_roundings_alone(reader: Reader, form: str) -> None:
    made = lora_files.changes(reader.transformer)
    tensors = lora_files.ROUNDED[form](made)
    live, reference = reader.live(tensors), reader.live(lora_files.EXACT["diffusers"](made))
    for name in live:
        # Two roundings of the product (at most about 4 here) and one of the sum, in units of float32's 2^-24.
        torch.testing.assert_close(live[name], reference[name], rtol=0, atol=4 * 3 * 2**-24)
    assert reader.read(tensors).report.applied == len(tensors)


def test_xlabs_names(reader: Reader) -> None:
    made = lora_files.changes(reader.transformer, only=lora_files.is_xlabs)
    assert same(reader.live(lora_files.xlabs(made)), reader.live(lora_files.EXACT["diffusers"](made)))


def test_xlabs_qkv_of_a_single_block(reader: Reader) -> None:
    up, down = torch.randn(96, RANK), torch.randn(RANK, 32)
    stem = "single_blocks.1.processor.qkv_lora"
    live = reader.live({f"{stem}.down.weight": down, f"{stem}.up.weight": up})
    parts = {f"single_transformer_blocks.1.attn.{name}.weight": rows for name, rows in _qkv(up).items()}
    assert changed(reader, live) == parts.keys()
    for name, rows in parts.items():
        torch.testing.assert_close(live[name], reader.base[name] + rows @ down)


def _qkv(up: Tensor) -> dict[str, Tensor]:
    return dict(zip(("to_q", "to_k", "to_v"), up.chunk(3), strict=True))


@pytest.mark.parametrize("form", lora_files.CLIP)
def test_the_text_encoder_in_every_format(reader: Reader, form: str) -> None:
    made = lora_files.clip_changes(reader.text_encoder)
    tensors = lora_files.CLIP[form](made)
    live = reader.live_clip(tensors)
    assert same(live, reader.live_clip(lora_files.CLIP["diffusers"](made)))
    for name, base in reader.clip_base.items():
        layer = f"text_model.{name.removeprefix('text_model.').removesuffix('.weight')}"
        up, down = made.get(layer, (torch.zeros(len(base), 1), torch.zeros(1, base[0].numel())))
        torch.testing.assert_close(live[name], base + (STRENGTH * up @ down).view_as(base))
    assert reader.read(tensors).report.applied == len(tensors)


@pytest.mark.parametrize("form", lora_files.EXACT)
def test_a_subset_of_blocks_changes_those_alone(reader: Reader, form: str) -> None:
    some = ("double_blocks.1.img_attn.qkv", "single_blocks.2.linear1", "single_blocks.0.linear2")
    made = lora_files.changes(reader.transformer, only=lambda bfl: bfl in some)
    live = reader.live(lora_files.EXACT[form](made))
    assert changed(reader, live) == {f"{part}.weight" for change in made for part in change.parts}
    assert same(live, reader.live(lora_files.EXACT["diffusers"](made)))


FLOATS = [torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("form", ["diffusers", "kohya", "LoKr", "LoHa"])
def test_any_float_type_that_holds_the_numbers_gives_the_same_bits(
    reader: Reader, form: str, dtype: torch.dtype
) -> None:
    made = lora_files.changes(reader.transformer, coarse=True)
    tensors = (lora_files.EXACT | lora_files.ROUNDED)[form](made)
    stored = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    assert all(torch.equal(stored[name].float(), tensors[name]) for name in tensors)
    assert same(reader.live(stored), reader.live(tensors))


def test_factors_stay_low_rank(reader: Reader) -> None:
    lora = reader.read(lora_files.EXACT["kohya"](lora_files.changes(reader.transformer)))
    assert all(isinstance(delta, LowRank) for deltas in lora.transformer.values() for delta in deltas)
    assert all(delta.up.shape[1] == RANK for deltas in lora.transformer.values() for delta in deltas)
    # The parts of a fused layer share one `down`.
    q, k = (lora.transformer[f"transformer_blocks.0.attn.{name}.weight"][0] for name in ("to_q", "to_k"))
    assert q.down is k.down
    assert lora.nbytes < sum(tensor.nbytes for tensor in reader.base.values())


def test_halves_of_the_final_modulation_change_places(reader: Reader) -> None:
    weight = reader.base["norm_out.linear.weight"]  # [scale; shift]
    shift, scale = torch.full_like(weight[:32], 1.0), torch.full_like(weight[32:], 2.0)
    stem = "lora_unet_final_layer_adaLN_modulation_1"
    live = reader.live({f"{stem}.diff": torch.cat([shift, scale]), f"{stem}.diff_b": torch.arange(64.0)})
    assert torch.equal(live["norm_out.linear.weight"] - weight > 1.5, torch.cat([scale, shift]) > 1.5)
    bias = live["norm_out.linear.bias"] - reader.base["norm_out.linear.bias"]
    torch.testing.assert_close(bias, torch.cat([torch.arange(32.0, 64.0), torch.arange(32.0)]))


# ---------------------------------------------------------------------------------------------------------------------
# Strengths

Q = "transformer.transformer_blocks.0.attn.to_q"
Q_WEIGHT = "transformer_blocks.0.attn.to_q.weight"


def pair(stem: str = Q, out: int = 32, columns: int = 32, rank: int = RANK, seed: int = 0) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {
        f"{stem}.lora_A.weight": torch.randn(rank, columns, generator=generator),
        f"{stem}.lora_B.weight": torch.randn(out, rank, generator=generator),
    }


def strength(reader: Reader, tensors: Tensors, header: dict[str, str] | None = None) -> float:
    [delta] = reader.read(tensors, header).transformer[Q_WEIGHT]
    return delta.strength


def test_without_alpha_the_strength_is_1(reader: Reader) -> None:
    assert strength(reader, pair()) == 1.0


@pytest.mark.parametrize("alpha", [torch.tensor(6.0), torch.tensor([6]), torch.tensor(6.0, dtype=torch.float16)])
def test_alpha_of_a_layer_is_divided_by_its_rank(reader: Reader, alpha: Tensor) -> None:
    assert strength(reader, pair() | {f"{Q}.alpha": alpha}) == 6 / RANK


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"alpha": 6.0}, 6 / RANK),
        ({"alpha": 6.0, "use_rslora": True}, 6 / RANK**0.5),
        ({"alpha": 6.0, "rank": 64}, 6 / RANK),  # the tensors know their rank better
        ({"alpha_pattern": {"attn.to_k": 1.0, "attn.to_q": 12.0}}, 12 / RANK),
        ({"alpha_pattern": {"transformer_blocks.0.attn.to_q": 12.0}}, 12 / RANK),
        ({"alpha_pattern": {"to_k": 12.0}}, ALPHA / RANK),
    ],
)
def test_alpha_in_the_header_counts(reader: Reader, config: dict, expected: float) -> None:
    assert strength(reader, pair(), lora_files.metadata(**config)) == pytest.approx(expected)


def test_alpha_of_a_layer_wins_over_the_header(reader: Reader) -> None:
    assert strength(reader, pair() | {f"{Q}.alpha": torch.tensor(8.0)}, lora_files.metadata()) == 8 / RANK


@pytest.mark.parametrize("config", [{"alpha": "much"}, {"alpha": float("nan")}, {"rank": 0}, {"alpha_pattern": [1]}])
def test_a_header_that_makes_no_sense_is_refused(reader: Reader, config: dict) -> None:
    assert "lora_adapter_metadata" in reader.refusal(pair(), lora_files.metadata(**config))


def test_a_header_of_others_is_no_concern(reader: Reader) -> None:
    assert strength(reader, pair(), {"format": "pt", "ss_network_alpha": "nonsense"}) == 1.0


# ---------------------------------------------------------------------------------------------------------------------
# Kinds of change


def dora(weight: Tensor, delta: Tensor, magnitude: Tensor, axis: int) -> Tensor:
    merged = weight.double() + delta.double()
    return (magnitude.double() * merged / merged.norm(dim=axis, keepdim=True)).float()


@pytest.mark.parametrize(
    ("suffix", "shape"),
    [
        ("lora_magnitude_vector", (32,)),
        ("lora_magnitude_vector.weight", (32,)),
        ("lora_magnitude_vector.default.weight", (32,)),
        ("dora_scale", (32, 1)),
        ("dora_scale", (32,)),
        ("dora_scale", (1, 32)),
    ],
)
def test_dora(reader: Reader, suffix: str, shape: tuple[int, ...]) -> None:
    magnitude = torch.rand(shape) + 0.5
    tensors = pair() | {f"{Q}.{suffix}": magnitude, f"{Q}.alpha": torch.tensor(ALPHA)}
    delta = STRENGTH * tensors[f"{Q}.lora_B.weight"] @ tensors[f"{Q}.lora_A.weight"]
    axis = 0 if shape == (1, 32) else 1
    merged = dora(reader.base[Q_WEIGHT], delta, magnitude if axis == 0 else magnitude.view(32, 1), axis)
    torch.testing.assert_close(reader.live(tensors)[Q_WEIGHT], merged)
    half = reader.live(tensors, scale=0.5)[Q_WEIGHT]
    torch.testing.assert_close(half, (reader.base[Q_WEIGHT] + merged) / 2)
    assert reader.read(tensors).report.kinds == ("DoRA",)


@pytest.mark.parametrize("axis", [0, 1])
def test_dora_of_a_fused_layer_is_normed_over_the_layer_as_trained(reader: Reader, axis: int) -> None:
    made = lora_files.changes(reader.transformer, only=lambda bfl: bfl == "single_blocks.0.linear1")
    [change] = made
    base = torch.cat([reader.base[f"{part}.weight"] for part in change.parts])
    magnitude = torch.rand((1, base.shape[1]) if axis == 0 else (len(base), 1)) + 0.5
    tensors = lora_files.EXACT["kohya"](made) | {"lora_unet_single_blocks_0_linear1.dora_scale": magnitude}
    merged = dora(base, STRENGTH * change.up @ change.down, magnitude, axis)
    live = reader.live(tensors)
    for part, rows in zip(change.parts, merged.split(change.sizes), strict=True):
        torch.testing.assert_close(live[f"{part}.weight"], rows)


def lokr_of_q(**factors: tuple[int, int]) -> Tensors:
    generator = torch.Generator().manual_seed(5)
    return {f"{Q}.lokr_{role}": torch.randn(shape, generator=generator) for role, shape in factors.items()}


@pytest.mark.parametrize(
    "factors",
    [
        {"w1": (4, 8), "w2": (8, 4)},
        {"w1": (4, 8), "w2_a": (8, 2), "w2_b": (2, 4)},
        {"w1_a": (4, 3), "w1_b": (3, 8), "w2_a": (8, 2), "w2_b": (2, 4)},
        {"w1_a": (4, 2), "w1_b": (2, 8), "w2": (8, 4)},
    ],
)
def test_lokr_is_a_kronecker_product(reader: Reader, factors: dict) -> None:
    tensors = lokr_of_q(**factors) | {f"{Q}.alpha": torch.tensor(ALPHA)}
    left, right = (
        tensors.get(f"{Q}.lokr_{side}", torch.empty(0))
        if side in factors
        else tensors[f"{Q}.lokr_{side}_a"] @ tensors[f"{Q}.lokr_{side}_b"]
        for side in ("w1", "w2")
    )
    rank = factors["w2_b"][0] if "w2_b" in factors else factors.get("w1_b", (None,))[0]
    delta = torch.kron(left, right) * (ALPHA / rank if rank else 1)
    torch.testing.assert_close(reader.live(tensors)[Q_WEIGHT], reader.base[Q_WEIGHT] + delta)


def test_alpha_of_a_whole_lokr_means_nothing(reader: Reader) -> None:
    """Trainers write 10^10 there, which is no number any more in float16."""
    tensors = lokr_of_q(w1=(4, 8), w2=(8, 4))
    infinite = tensors | {f"{Q}.alpha": torch.tensor(float("inf"), dtype=torch.float16)}
    assert same(reader.live(infinite), reader.live(tensors))


def test_lokr_of_a_fused_layer_gives_each_part_its_rows(reader: Reader) -> None:
    stem = "diffusion_model.single_blocks.0.linear1"  # [3 * 32 + 128, 32]
    left, right = torch.randn(7, 4), torch.randn(32, 8)
    live = reader.live({f"{stem}.lokr_w1": left, f"{stem}.lokr_w2": right})
    sizes = {"attn.to_q": 32, "attn.to_k": 32, "attn.to_v": 32, "proj_mlp": 128}
    for name, rows in zip(sizes, torch.kron(left, right).split(list(sizes.values())), strict=True):
        weight = f"single_transformer_blocks.0.{name}.weight"
        torch.testing.assert_close(live[weight], reader.base[weight] + rows)


def test_tucker_cores_are_multiplied_in(reader: Reader) -> None:
    generator = torch.Generator().manual_seed(6)
    core, a, b = (torch.randn(shape, generator=generator) for shape in ((RANK, RANK), (RANK, 32), (RANK, 32)))
    tensors = {f"{Q}.hada_t1": core, f"{Q}.hada_w1_a": a, f"{Q}.hada_w1_b": b}
    tensors |= {f"{Q}.hada_t2": core.T, f"{Q}.hada_w2_a": b.clone(), f"{Q}.hada_w2_b": a.clone()}
    delta = torch.einsum("ij,jr,ip->pr", core, b, a) * torch.einsum("ij,jr,ip->pr", core.T, a, b)
    torch.testing.assert_close(reader.live(tensors)[Q_WEIGHT], reader.base[Q_WEIGHT] + delta)
    mid = pair() | {f"{Q}.lora_mid.weight": core[:, :, None, None]}
    delta = mid[f"{Q}.lora_B.weight"] @ core @ mid[f"{Q}.lora_A.weight"]
    torch.testing.assert_close(reader.live(mid)[Q_WEIGHT], reader.base[Q_WEIGHT] + delta)


TXT_KEY_NORM = "double_blocks_1_txt_attn_norm_key_norm"
SINGLE_KEY_NORM = "single_transformer_blocks.2.attn.norm_k.weight"


@pytest.mark.parametrize(
    ("name", "parameter", "kind"),
    [
        (f"{Q}.diff", Q_WEIGHT, "add"),
        (f"{Q}.diff_b", "transformer_blocks.0.attn.to_q.bias", "add"),
        (f"{Q}.b_norm", "transformer_blocks.0.attn.to_q.bias", "add"),
        (f"lora_unet_{TXT_KEY_NORM}.diff", "transformer_blocks.1.attn.norm_added_k.weight", "add"),
        (f"lora_unet_{TXT_KEY_NORM}.w_norm", "transformer_blocks.1.attn.norm_added_k.weight", "add"),
        ("transformer.transformer_blocks.1.attn.norm_q.weight", "transformer_blocks.1.attn.norm_q.weight", "set"),
        ("double_blocks.1.img_attn.norm.query_norm.scale", "transformer_blocks.1.attn.norm_q.weight", "set"),
        ("single_blocks.2.norm.key_norm.scale", SINGLE_KEY_NORM, "set"),
        ("diffusion_model.single_blocks.2.norm.key_norm.set_weight", SINGLE_KEY_NORM, "set"),
        ("transformer.proj_out.bias", "proj_out.bias", "set"),
        ("lora_unet_final_layer_linear.diff_b", "proj_out.bias", "add"),
    ],
)
def test_whole_tensors_are_added_or_set(reader: Reader, name: str, parameter: str, kind: str) -> None:
    value = torch.randn(reader.base[parameter].shape, generator=torch.Generator().manual_seed(8))
    live = reader.live({name: value} | pair("transformer.single_transformer_blocks.0.attn.to_q"))
    expected = value if kind == "set" else reader.base[parameter] + value
    torch.testing.assert_close(live[parameter], expected)
    assert changed(reader, live) == {parameter, "single_transformer_blocks.0.attn.to_q.weight"}


def test_a_fused_bias_is_split(reader: Reader) -> None:
    bias = torch.randn(96)
    live = reader.live({"lora_unet_double_blocks_0_txt_attn_qkv.diff_b": bias})
    for name, rows in zip(("add_q_proj", "add_k_proj", "add_v_proj"), bias.chunk(3), strict=True):
        parameter = f"transformer_blocks.0.attn.{name}.bias"
        torch.testing.assert_close(live[parameter], reader.base[parameter] + rows)


def test_a_lora_s_own_bias_is_scaled_like_its_product(reader: Reader) -> None:
    bias = torch.randn(32)
    live = reader.live(pair() | {f"{Q}.lora_B.bias": bias, f"{Q}.alpha": torch.tensor(ALPHA)}, scale=0.5)
    parameter = "transformer_blocks.0.attn.to_q.bias"
    torch.testing.assert_close(live[parameter], reader.base[parameter] + 0.5 * STRENGTH * bias)


# ---------------------------------------------------------------------------------------------------------------------
# Reports


def test_the_report_says_what_was_applied_and_what_was_not(reader: Reader) -> None:
    made = lora_files.changes(reader.transformer, only=lambda bfl: bfl == "double_blocks.0.img_attn.qkv")
    tensors = lora_files.EXACT["kohya"](made) | {
        "lora_te3_encoder_block_0_layer_0_SelfAttention_q.lora_down.weight": torch.randn(4, 8),
        "lora_te3_encoder_block_0_layer_0_SelfAttention_q.lora_up.weight": torch.randn(8, 4),
        "something.else": torch.randn(2),
    }
    report = reader.read(tensors).report
    assert str(report) == (
        "kohya LoRA of rank 4, applied 3 of 6 tensors; the T5 part is ignored (2); "
        "no layer of FLUX.1 has such a name (1)."
    )
    assert report.metric() == {
        "format": "kohya",
        "kinds": ["LoRA"],
        "ranks": [4],
        "applied": 3,
        "tensors": 6,
        "ignored": {"the T5 part is ignored": 2, "no layer of FLUX.1 has such a name": 1},
    }


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("lora_te3_encoder_block_0_layer_0_SelfAttention_q.lora_down.weight", "T5"),
        ("lora_te2_encoder_block_0_layer_0_SelfAttention_q.lora_down.weight", "T5"),
        ("text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q.lora_down.weight", "T5"),
        ("text_encoder_2.encoder.block.0.layer.0.SelfAttention.q.lora_A.weight", "T5"),
        ("t5.encoder.block.0.layer.0.SelfAttention.q.lora_down.weight", "T5"),
        ("lora_te1_text_projection.lora_down.weight", "projection"),
        ("bundle_emb.cat.t5_out", "T5"),
        ("bundle_emb.cat.clip_l", "embeddings"),
    ],
)
def test_what_belongs_to_nothing_here_is_ignored_with_its_reason(reader: Reader, name: str, reason: str) -> None:
    report = reader.read(pair() | {name: torch.randn(4, 8)}).report
    [(said, count)] = report.ignored.items()
    assert reason in said
    assert (count, report.applied, report.total) == (1, 2, 3)


def test_a_model_without_guidance_leaves_its_embedder_out_and_says_so(reader: Reader, tmp_path: Path) -> None:
    schnell = models.transformer(guidance=False)
    tensors = lora_files.EXACT["kohya"](lora_files.changes(reader.transformer))
    lora = read_lora(lora_files.write(tmp_path / "a.safetensors", tensors), schnell, reader.text_encoder)
    assert lora.report.ignored == {"this FLUX has no guidance embedder": 6}
    assert not [name for name in lora.transformer if "guidance" in name]


# ---------------------------------------------------------------------------------------------------------------------
# Refusals


def of(*names: str, shape: tuple[int, ...] = (4, 4)) -> Tensors:
    return {name: torch.ones(shape) for name in names}


SD1 = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.lora_down.weight"
OTHERS: dict[str, tuple[Tensors, str]] = {
    "SD 1.5, kohya": (of(SD1), "Stable Diffusion 1.5"),
    "SD 1.5, with a CLIP like ours": (of("lora_te_text_model_encoder_layers_0_mlp_fc1.alpha", SD1), "Diffusion 1.5"),
    "SDXL, kohya": (of("lora_unet_input_blocks_4_1_transformer_blocks_1_attn1_to_q.lora_down.weight"), "SDXL"),
    "SDXL, diffusers": (of("unet.down_blocks.1.attentions.0.transformer_blocks.1.attn1.to_q.lora_A.weight"), "SDXL"),
    "SD 3": (of("transformer.transformer_blocks.0.attn2.to_q.lora_A.weight"), "Stable Diffusion 3"),
    "SD 3, kohya": (of("lora_unet_joint_blocks_0_context_block_attn_qkv.lora_down.weight"), "Stable Diffusion 3"),
    "FLUX.2": (of("transformer.single_transformer_blocks.0.attn.to_qkv_mlp_proj.lora_A.weight"), "FLUX.2"),
    "Chroma": (of("lora_unet_distilled_guidance_layer_layers_0_in_layer.lora_down.weight"), "Chroma"),
    "Wan": (of("diffusion_model.blocks.0.self_attn.q.lora_A.weight"), "Wan"),
    "Qwen-Image": (of("transformer.transformer_blocks.0.img_mlp.net.0.proj.lora_A.weight"), "Qwen-Image"),
    "HunyuanVideo": (of("diffusion_model.double_blocks.0.img_mlp_fc1.lora_A.weight"), "Hunyuan"),
    "HiDream": (of("diffusion_model.double_stream_blocks.0.block.attn1.to_q.lora_A.weight"), "HiDream"),
    "Lumina, Z-Image": (of("diffusion_model.layers.0.attention.to_q.lora_A.weight"), "Z-Image"),
    "LTX": (of("diffusion_model.transformer_blocks.0.attn1.to_q.lora_A.weight"), "LTX"),
    "a language model": (of("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"), "language model"),
    "a VAE": (of("decoder.conv_in.weight", "encoder.conv_in.weight"), "VAE"),
    "a VAE of a checkpoint": (of("first_stage_model.decoder.conv_in.weight"), "VAE"),
    "an embedding": (of("emb_params"), "embeddings"),
    "an embedding for CLIP": (of("clip_l", "clip_g"), "embedding"),
    "a checkpoint": (of("transformer_blocks.0.attn.to_q.weight", "proj_out.bias"), "checkpoint"),
    "a checkpoint, ComfyUI": (of("model.diffusion_model.double_blocks.0.img_attn.qkv.weight"), "checkpoint"),
    "a checkpoint of SD": (of("model.diffusion_model.input_blocks.0.0.weight"), "Stable Diffusion"),
    "nothing": ({}, "no tensors"),
    "nothing that we know": (of("a.b.c"), "nothing for FLUX.1"),
    "T5 alone": (of("lora_te3_encoder_block_0_layer_0_SelfAttention_q.lora_down.weight"), "T5 part is ignored"),
    "one block too many": (of("lora_unet_double_blocks_2_img_attn_qkv.lora_down.weight"), "double_blocks it has 2"),
    "an IP-Adapter": (of("double_blocks.0.processor.ip_adapter_double_stream_k_proj.weight"), "ip_adapter"),
    "a kind of change that we lack": (pair() | of(f"{Q}.oft_blocks"), "oft_blocks"),
}


@pytest.mark.parametrize("what", OTHERS)
def test_other_files_are_refused_by_name(reader: Reader, what: str) -> None:
    tensors, word = OTHERS[what]
    assert word in reader.refusal(tensors)


CONTROL = {
    "BFL": pair("img_in", columns=32) | of("single_blocks.0.norm.key_norm.scale", shape=(16,)),
    "diffusers": pair("transformer.x_embedder", columns=32),
    "ComfyUI": {
        "diffusion_model.img_in.lora_down.weight": torch.ones(4, 32),
        "diffusion_model.img_in.lora_up.weight": torch.ones(32, 4),
    },
}


@pytest.mark.parametrize("form", CONTROL)
def test_a_control_lora_needs_a_control_image(reader: Reader, form: str) -> None:
    assert "a control LoRA needs a control image" in reader.refusal(pair() | CONTROL[form])


Q_UP, Q_DOWN = f"{Q}.lora_B.weight", f"{Q}.lora_A.weight"
MISFITS: dict[str, tuple[Tensors, str]] = {
    "rows": (pair(out=48), "32x32"),
    "columns": (pair(columns=48), "4x48"),
    "ranks": (pair() | {Q_UP: torch.ones(32, 5)}, "32x5"),
    "rank 0": ({Q_DOWN: torch.ones(0, 32), Q_UP: torch.ones(32, 0)}, "rank 0"),
    "one dimension": (pair() | {Q_DOWN: torch.ones(32)}, "32"),
    "up alone": ({Q_UP: torch.ones(32, 4)}, "incomplete"),
    "down alone": ({Q_DOWN: torch.ones(4, 32)}, "incomplete"),
    "alpha alone": ({f"{Q}.alpha": torch.tensor(1.0)}, "incomplete"),
    "magnitude alone": ({f"{Q}.dora_scale": torch.ones(32, 1)}, "incomplete"),
    "magnitude of another layer": (pair() | {f"{Q}.dora_scale": torch.ones(5, 1)}, "does not fit"),
    "two alphas": (pair() | {f"{Q}.alpha": torch.ones(2)}, "one number"),
    "whole numbers": (pair() | {Q_UP: torch.ones(32, 4, dtype=torch.int32)}, "int32"),
    "complex numbers": (pair() | {Q_UP: torch.ones(32, 4, dtype=torch.complex64)}, "complex64"),
    "NaN": (pair() | {Q_UP: torch.full((32, 4), float("nan"))}, "not finite"),
    "infinity": (pair() | {f"{Q}.alpha": torch.tensor(float("inf"))}, "not finite"),
    "difference": ({f"{Q}.diff": torch.ones(32, 16)}, "32x16"),
    "bias": ({f"{Q}.diff_b": torch.ones(16)}, "16"),
    "bias where there is none": (
        {"transformer.transformer_blocks.0.attn.norm_q.diff_b": torch.ones(16)},
        "has no bias",
    ),
    "LoRA of a norm": (pair("transformer.transformer_blocks.0.attn.norm_q", 16, 16), "does not fit"),
    "LoKr": (lokr_of_q(w1=(4, 8), w2=(8, 5)), "does not fit"),
    "LoKr's half": (lokr_of_q(w1=(4, 8)), "incomplete"),
    "LoHa's half": ({f"{Q}.hada_w1_a": torch.ones(32, 4)}, "incomplete"),
    "two spellings": (pair() | pair("unet.transformer_blocks.0.attn.to_q"), "twice"),
    "fused and apart": (pair() | pair("double_blocks.0.img_attn.qkv", 96), "twice"),
    "LoKr, a side given twice": (lokr_of_q(w1=(4, 8), w2=(8, 4), w2_a=(8, 2), w2_b=(2, 4)), "lokr_w2_a"),
    "LoKr, a core beside a whole side": (lokr_of_q(w1=(4, 8), w2=(8, 4), t2=(2, 2)), "lokr_t2"),
    "LoRA and LoKr": (pair() | lokr_of_q(w1=(4, 8), w2=(8, 4)), "two ways"),
    "value and difference": (pair() | of(f"{Q}.weight", f"{Q}.diff", shape=(32, 32)), "two ways"),
}


@pytest.mark.parametrize("what", MISFITS)
def test_what_does_not_fit_is_refused(reader: Reader, what: str) -> None:
    tensors, word = MISFITS[what]
    assert word in reader.refusal(tensors)


BITS = {"F64": 64, "F32": 32, "BF16": 16, "F16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E4M3FNUZ": 8, "F8_E8M0": 8}
BITS |= {"BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I32": 32, "U64": 64, "I64": 64, "C64": 64, "F4": 4, "F6_E2M3": 6}


@pytest.mark.parametrize("dtype", BITS)
def test_every_type_of_numbers_is_a_float_type_or_refused(reader: Reader, dtype: str) -> None:
    size = RANK * 32 * BITS[dtype] // 8
    header = {
        Q_DOWN: {"dtype": dtype, "shape": [RANK, 32], "data_offsets": [0, size]},
        Q_UP: {"dtype": dtype, "shape": [32, RANK], "data_offsets": [size, 2 * size]},
    }
    file = reader.folder / "typed.safetensors"
    file.write_bytes(_join(header, bytes([0x31]) * (2 * size)))
    if (dtype.startswith("F") and BITS[dtype] >= 8) or dtype == "BF16":
        assert read_lora(file, reader.transformer, reader.text_encoder).report.applied == 2
    else:
        with pytest.raises(ValueError, match=r"must be a float type|that can be read") as caught:
            read_lora(file, reader.transformer, reader.text_encoder)
        assert_is_one_sentence(str(caught.value), reader)


def test_a_file_that_is_not_there_or_no_safetensors_is_refused(reader: Reader, tmp_path: Path) -> None:
    for content in (None, b"", b"PK\x03\x04", b"<!DOCTYPE html>" * 100):
        file = tmp_path / "a.safetensors"
        if content is not None:
            file.write_bytes(content)
        with pytest.raises(ValueError, match="not a safetensors file that can be read") as caught:
            read_lora(file, reader.transformer, reader.text_encoder)
        assert str(tmp_path) not in str(caught.value)


# ---------------------------------------------------------------------------------------------------------------------
# FLUX.1's own dimensions, and what diffusers makes of the same files


@pytest.fixture(scope="module")
def wide() -> tuple[FluxTransformer2DModel, CLIPTextModel]:
    """One block of each kind of FLUX.1 [dev], and its CLIP: names and shapes without numbers."""
    with torch.device("meta"):
        transformer = FluxTransformer2DModel(num_layers=1, num_single_layers=1, guidance_embeds=True)
        return transformer, CLIPTextModel(CLIPTextConfig(eos_token_id=2, bos_token_id=0, num_hidden_layers=1))


def in_xlabs_or_not(form: str, bfl: str) -> bool:
    return lora_files.is_xlabs(bfl) if form == "XLabs" else lora_files.is_block(bfl)


@pytest.mark.parametrize(
    ("form", "write"),
    [
        ("diffusers", lora_files.EXACT["diffusers"]),
        ("old diffusers", lora_files.EXACT["old diffusers"]),
        ("kohya", lora_files.EXACT["kohya"]),
        ("kohya, split qkv", lora_files.kohya_split),
        ("ComfyUI", lora_files.EXACT["ComfyUI"]),
        ("XLabs", lora_files.xlabs),
    ],
)
def test_diffusers_makes_the_same_of_it_at_full_width(wide: tuple, tmp_path: Path, form: str, write: Callable) -> None:
    made = lora_files.changes(wide[0], only=lambda bfl: in_xlabs_or_not(form, bfl))
    file = lora_files.write(tmp_path / "a.safetensors", write(made))
    theirs = FluxLoraLoaderMixin.lora_state_dict(str(file))
    ours = read_lora(file, *wide).transformer
    layers = {name.split(".lora")[0] for name in theirs}
    assert {f"transformer.{name.removesuffix('.weight')}" for name in ours} == layers
    for name, [delta] in ours.items():
        # The products are compared by what they do to a vector: they are as large as the layers.
        x = torch.randn(delta.down.shape[1], generator=torch.Generator().manual_seed(9))
        up, down = _factors(theirs, f"transformer.{name.removesuffix('.weight')}")
        torch.testing.assert_close(
            delta.strength * (delta.up @ (delta.down @ x)), up @ (down @ x), rtol=1e-4, atol=1e-3
        )


def _factors(state: Tensors, layer: str) -> tuple[Tensor, Tensor]:
    names = (("lora_B.weight", "lora_A.weight"), ("lora.up.weight", "lora.down.weight"))
    [found] = [(state[f"{layer}.{up}"], state[f"{layer}.{down}"]) for up, down in names if f"{layer}.{up}" in state]
    return found


# What trainers and tools write for one layer, by their own names and shapes at FLUX.1's dimensions.
TRAINED: dict[str, dict[str, tuple[int, ...]]] = {
    "ai-toolkit": {
        "transformer.single_transformer_blocks.0.proj_mlp.lora_A.weight": (16, 3072),
        "transformer.single_transformer_blocks.0.proj_mlp.lora_B.weight": (12288, 16),
        "transformer.single_transformer_blocks.0.proj_out.lora_A.weight": (16, 15360),
        "transformer.single_transformer_blocks.0.proj_out.lora_B.weight": (3072, 16),
    },
    "ai-toolkit, BFL's names": {
        "diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight": (16, 3072),
        "diffusion_model.double_blocks.0.img_attn.qkv.lora_B.weight": (9216, 16),
    },
    "ai-toolkit, LoKr": {
        "diffusion_model.double_blocks.0.img_attn.qkv.lokr_w1": (96, 96),
        "diffusion_model.double_blocks.0.img_attn.qkv.lokr_w2": (96, 32),
        "diffusion_model.double_blocks.0.img_attn.qkv.alpha": (),
    },
    "SimpleTuner, LyCORIS": {
        "lycoris_single_transformer_blocks_0_attn_to_q.lokr_w1": (16, 16),
        "lycoris_single_transformer_blocks_0_attn_to_q.lokr_w2": (192, 192),
        "lycoris_single_transformer_blocks_0_attn_to_q.alpha": (),
    },
    "kohya": {
        "lora_unet_single_blocks_0_linear1.lora_down.weight": (4, 3072),
        "lora_unet_single_blocks_0_linear1.lora_up.weight": (21504, 4),
        "lora_unet_single_blocks_0_linear1.alpha": (),
        "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": (4, 512),
        "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": (2048, 4),
        "lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha": (),
    },
    "OneTrainer, DoRA": {
        "lora_te1_text_model_encoder_layers_0_self_attn_k_proj.lora_down.weight": (4, 512),
        "lora_te1_text_model_encoder_layers_0_self_attn_k_proj.lora_up.weight": (512, 4),
        "lora_te1_text_model_encoder_layers_0_self_attn_k_proj.dora_scale": (1, 512),
        "lora_te1_text_model_encoder_layers_0_self_attn_k_proj.alpha": (),
        "lora_transformer_transformer_blocks_0_ff_net_0_proj.lora_down.weight": (4, 3072),
        "lora_transformer_transformer_blocks_0_ff_net_0_proj.lora_up.weight": (12288, 4),
        "lora_transformer_transformer_blocks_0_ff_net_0_proj.dora_scale": (1, 3072),
        "lora_transformer_transformer_blocks_0_ff_net_0_proj.alpha": (),
    },
    "XLabs": {
        "double_blocks.0.processor.qkv_lora2.down.weight": (16, 3072),
        "double_blocks.0.processor.qkv_lora2.up.weight": (9216, 16),
        "single_blocks.0.processor.proj_lora.down.weight": (16, 15360),
        "single_blocks.0.processor.proj_lora.up.weight": (3072, 16),
    },
    "fal": {
        "base_model.model.final_layer.linear.lora_A.weight": (16, 3072),
        "base_model.model.final_layer.linear.lora_B.weight": (64, 16),
        "base_model.model.vector_in.in_layer.lora_A.weight": (16, 768),
        "base_model.model.vector_in.in_layer.lora_B.weight": (3072, 16),
    },
    "LyCORIS, full": {
        "lora_unet_double_blocks_0_txt_attn_norm_query_norm.w_norm": (128,),
        "lora_unet_guidance_in_in_layer.diff": (3072, 256),
        "lora_unet_guidance_in_in_layer.diff_b": (3072,),
    },
}


@pytest.mark.parametrize("trainer", TRAINED)
def test_what_trainers_write_fits_flux_1(wide: tuple, tmp_path: Path, trainer: str) -> None:
    tensors = {name: torch.ones(shape) for name, shape in TRAINED[trainer].items()}
    report = read_lora(lora_files.write(tmp_path / "a.safetensors", tensors), *wide).report
    assert report.applied == report.total == len(tensors)


def test_bfl_s_control_lora_is_refused_by_its_own_names_and_shapes(wide: tuple, tmp_path: Path) -> None:
    shapes = {
        "double_blocks.0.img_attn.norm.key_norm.scale": (128,),
        "img_in.lora_A.weight": (128, 128),
        "img_in.lora_B.bias": (3072,),
        "img_in.lora_B.weight": (3072, 128),
    }
    file = lora_files.write(tmp_path / "a.safetensors", {name: torch.ones(shape) for name, shape in shapes.items()})
    with pytest.raises(ValueError, match="widens the image input from 64 to 128 channels"):
        read_lora(file, *wide)


# ---------------------------------------------------------------------------------------------------------------------
# Malformed files

DTYPES = [
    "BOOL",
    "U8",
    "I8",
    "I64",
    "F64",
    "F32",
    "F16",
    "BF16",
    "F8_E4M3",
    "F8_E5M2",
    "F8_E8M0",
    "F4",
    "F6_E2M3",
    "C64",
]
SIZES = [0, 1, 2, 3, 31, 32, 33, 2**31, 2**40, 2**63, 2**64, -1, 1.5, None, "32"]
NUMBERS = [float("nan"), float("inf"), -float("inf"), 3.4e38, 1e-45]


def mutate(content: bytes, chance: random.Random) -> bytes:
    """Damage a safetensors file in one or two of the ways in which files are damaged, or made to do damage."""
    for _ in range(chance.choice([1, 1, 2])):
        content = chance.choice([_flip, _cut, _claim, _edit_entry, _edit_header, _edit_number])(content, chance)
    return content


def _split(content: bytes) -> tuple[dict, bytes]:
    size = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def _join(header: object, data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def _flip(content: bytes, chance: random.Random) -> bytes:
    damaged = bytearray(content)
    for _ in range(chance.choice([1, 3, 50])):
        damaged[chance.randrange(min(len(damaged), chance.choice([8, 500, len(damaged)])))] = chance.randrange(256)
    return bytes(damaged)


def _cut(content: bytes, chance: random.Random) -> bytes:
    return content[: chance.randrange(9, len(content))] + bytes(chance.choice([0, 0, 5, 4096]))


def _claim(content: bytes, chance: random.Random) -> bytes:
    """A header of another length than there is."""
    return chance.choice([0, 1, 7, 2**20, 2**32, 2**63, 2**64 - 1]).to_bytes(8, "little") + content[8:]


def _edit_entry(content: bytes, chance: random.Random) -> bytes:
    try:
        header, data = _split(content)
        entry = header[chance.choice([name for name in header if name != "__metadata__"])]
        match chance.choice(["dtype", "shape", "reshape", "offsets", "drop"]):
            case "dtype":
                entry["dtype"] = chance.choice([*DTYPES, "F3", "", 7])
            case "shape":
                entry["shape"] = [chance.choice(SIZES) for _ in range(chance.randrange(5))]
            case "reshape":  # the same bytes under another shape: safetensors sees nothing wrong
                entry["shape"] = chance.choice(
                    [entry["shape"][::-1], [1, *entry["shape"]], [math.prod(entry["shape"])]]
                )
            case "offsets":
                entry["data_offsets"] = [chance.choice([0, -1, 2**40, 2**64, *entry["data_offsets"]]) for _ in range(2)]
            case "drop":
                del entry[chance.choice(list(entry))]
    except (ValueError, AttributeError, TypeError, KeyError, IndexError, RecursionError):
        return _flip(content, chance)  # the first damage left no header to edit
    return _join(header, data)


def _edit_header(content: bytes, chance: random.Random) -> bytes:
    try:
        header, data = _split(content)
        name = chance.choice(list(header))
        match chance.choice(["name", "clash", "metadata", "adapter", "nested", "list"]):
            case "name":
                damaged = list(name)
                damaged[chance.randrange(len(damaged))] = chance.choice(["", ".", "_", "\0", "é", "lora_", "x" * 5000])
                header["".join(damaged)] = header.pop(name)
            case "clash":
                header[name.replace("transformer.", "unet.")] = header.pop(name)
            case "metadata":
                header["__metadata__"] = chance.choice([{"a": "b"}, {"a": 1}, [], None, {"a": "b" * 10**6}])
            case "adapter":
                values = [
                    "",
                    "{",
                    "[]",
                    "1" * 9999,
                    "[" * 9999,
                    '{"transformer.lora_alpha": NaN}',
                    '{"transformer.r": 0}',
                ]
                header["__metadata__"] = {"lora_adapter_metadata": chance.choice(values)}
            case "nested":
                header[name] = chance.choice([[], {}, 1, {"dtype": {"a": [1] * 99}}])
            case "list":
                header = [header]
    except (ValueError, AttributeError, TypeError, KeyError, IndexError, RecursionError):
        return _cut(content, chance)
    return _join(header, data)


def _edit_number(content: bytes, chance: random.Random) -> bytes:
    """A float32 somewhere in the data becomes one of those that spread."""
    at = len(content) - 4 * chance.randrange(1, 1 + len(content) // 8)
    return content[:at] + struct.pack("<f", chance.choice(NUMBERS)) + content[at + 4 :]


def test_a_thousand_damaged_files_are_refused_in_a_sentence_or_applied(reader: Reader) -> None:
    made = lora_files.changes(reader.transformer, only=lambda bfl: bfl.startswith("double_blocks.0.img"))
    forms = ["diffusers with alpha", "kohya", "LoKr", "LoHa", "differences"]
    file = reader.folder / "damaged.safetensors"
    sound = []
    for form in forms:
        tensors = (lora_files.EXACT | lora_files.ROUNDED)[form](made)
        sound.append(lora_files.write(file, tensors, lora_files.metadata()).read_bytes())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outcomes = Counter()
    for seed in range(1000):
        chance = random.Random(seed)
        file.write_bytes(mutate(chance.choice(sound), chance))
        try:
            lora = read_lora(file, reader.transformer, reader.text_encoder)
        except ValueError as error:
            assert_is_one_sentence(str(error), reader)
            outcomes["refused"] += 1
        else:
            reader.hold(lora)
            outcomes["applied"] += 1
    assert same(reader.unchanged(), reader.base)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024  # KiB
    assert outcomes["refused"] > 500
    assert outcomes["applied"] > 50
