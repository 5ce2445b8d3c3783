"""A layer's tensors become the deltas that they stand for, or are refused in a sentence."""

import pytest
import torch
from torch import Tensor

from lora_loader import read_lora
from tests.support import lora_files
from tests.support.lora_files import ALPHA, RANK, Tensors
from tests.support.lora_reader import (
    Q_WEIGHT,
    STRENGTH,
    Q,
    Reader,
    assert_is_one_sentence,
    changed,
    join,
    of,
    pair,
    same,
)

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


# ---------------------------------------------------------------------------------------------------------------------
# Strengths


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
        ("magnitude", (32,)),  # ai-toolkit
        ("lora_magnitude_vector", (32,)),
        ("lora_magnitude_vector.my-style.weight", (32,)),
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


@pytest.mark.parametrize(
    ("stem", "layers"),
    [
        ("double_blocks.0.img_mlp.layers.0", ["transformer_blocks.0.ff.net.0.proj"]),
        ("double_blocks.1.txt_mlp.layers.2", ["transformer_blocks.1.ff_context.net.2"]),
        ("double_blocks.0.img_attn.qkv", [f"transformer_blocks.0.attn.to_{name}" for name in "qkv"]),
        ("transformer.transformer_blocks.0.ff.linear1", ["transformer_blocks.0.ff.net.0.proj"]),
    ],
)
def test_mlx_stores_factors_transposed(reader: Reader, stem: str, layers: list[str]) -> None:
    sizes = [reader.base[f"{layer}.weight"].shape for layer in layers]
    down, up = torch.randn(sizes[0][1], RANK), torch.randn(RANK, sum(rows for rows, _ in sizes))
    live = reader.live({f"{stem}.lora_a": down, f"{stem}.lora_b": up})
    for layer, rows in zip(layers, (down @ up).T.split([rows for rows, _ in sizes]), strict=True):
        torch.testing.assert_close(live[f"{layer}.weight"], reader.base[f"{layer}.weight"] + rows)
    assert same(live, reader.live({f"{stem}.lora_A": down.T, f"{stem}.lora_B": up.T}))


def test_factors_that_may_be_transposed_or_not_are_refused(reader: Reader) -> None:
    square = {f"{Q}.lora_a": torch.ones(32, 32), f"{Q}.lora_b": torch.ones(32, 32)}
    assert "whether its rows or its columns are the rank cannot be told" in reader.refusal(square)
    named = {f"{Q}.lora_A.weight": torch.ones(32, 32), f"{Q}.lora_B.weight": torch.eye(32)}
    assert reader.read(named).report.ranks == (32,)


@pytest.mark.parametrize("stem", [Q, "transformer.proj_out", "diffusion_model.double_blocks.1.txt_attn.qkv"])
def test_a_lone_factor_of_the_layer_s_size_is_ai_toolkit_s_full_rank(reader: Reader, stem: str) -> None:
    shapes = {Q: (32, 32), "transformer.proj_out": (16, 32)}
    difference = torch.randn(shapes.get(stem, (96, 32)))
    alpha = {f"{stem}.alpha": torch.tensor(7.0)}
    live = reader.live({f"{stem}.lora_A.weight": difference} | alpha)
    assert same(live, reader.live({f"{stem}.diff": difference}))
    assert changed(reader, live)


def test_a_lone_factor_that_may_be_half_of_a_pair_is_incomplete(reader: Reader) -> None:
    """proj_out has 16 rows here, and a pair of rank 16 has a factor of its size."""
    half = {"transformer.proj_out.lora_A.weight": torch.ones(16, 32)}
    assert reader.read(half | pair(rank=4)).report.applied == 3
    assert "proj_out lacks its counterpart of up" in reader.refusal(half | pair(rank=16))


def test_a_full_rank_with_its_bias(reader: Reader) -> None:
    bias = {f"{Q}.diff_b": torch.ones(32)}
    given = {f"{Q}.lora_A.weight": torch.ones(32, 32)} | bias
    assert same(reader.live(given), reader.live({f"{Q}.diff": torch.ones(32, 32)} | bias))


@pytest.mark.parametrize("kind", ["weight", "diff"])
def test_a_magnitude_is_of_the_base_and_of_no_other_weight(reader: Reader, kind: str) -> None:
    """PEFT's DoRA saved with its base would be normed over that base."""
    given = pair() | {f"{Q}.magnitude": torch.ones(32), f"{Q}.base_layer.{kind}": torch.ones(32, 32)}
    assert "in two ways at once" in reader.refusal(given)


def test_a_bias_of_transposed_factors_has_their_strength(reader: Reader) -> None:
    given = {f"{Q}.lora_a": torch.ones(32, 4), f"{Q}.lora_b": torch.ones(4, 32), f"{Q}.alpha": torch.tensor(4.0)}
    lora = reader.read(given | {f"{Q}.lora_B.bias": torch.ones(32)})
    assert lora.report.ranks == (4,)
    assert [lora.transformer[f"transformer_blocks.0.attn.to_q.{name}"][0].strength for name in ("weight", "bias")] == [
        1.0,
        1.0,
    ]


RAW = {
    "LoKr": (lokr_of_q(w1=(4, 8), w2=(8, 4)), ("lokr_w1", "lokr_w2"), ".default"),
    "DoRA": (pair() | {f"{Q}.dora_scale": torch.ones(32, 1)}, ("dora_scale",), ".weight"),
    "difference": ({f"{Q}.diff": torch.ones(32, 32)}, (), ""),
}


@pytest.mark.parametrize("kind", RAW)
def test_names_as_state_dicts_have_them(reader: Reader, kind: str) -> None:
    tensors, roles, behind = RAW[kind]
    raw = {name + (behind if name.endswith(roles or ("nothing",)) else ""): it for name, it in tensors.items()}
    assert same(reader.live(raw), reader.live(tensors))


TXT_KEY_NORM = "double_blocks_1_txt_attn_norm_key_norm"
Q_NORM = "transformer_blocks.0.attn.norm_q.weight"
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
        ("diffusion_model.double_blocks.0.img_attn.norm.query_norm.scale.diff", Q_NORM, "add"),
        ("base_model.model.proj_out.modules_to_save.default.weight", "proj_out.weight", "set"),
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
# Refusals

CONTROL = {
    "BFL": pair("img_in", columns=32) | of("single_blocks.0.norm.key_norm.scale", shape=(16,)),
    "diffusers": pair("transformer.x_embedder", columns=32),
    "ComfyUI": {
        "diffusion_model.img_in.lora_down.weight": torch.ones(4, 32),
        "diffusion_model.img_in.lora_up.weight": torch.ones(32, 4),
    },
}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (pair("transformer.x_embedder", columns=96), "made for FLUX.1 Fill, which is given an image and its mask"),
        ({"lora_unet_img_in.diff": torch.ones(32, 96)}, "made for FLUX.1 Fill"),
        ({"transformer.x_embedder.lora_A.weight": torch.ones(32, 96)}, "made for FLUX.1 Fill"),
        ({"img_in.lora_a": torch.ones(96, 32), "img_in.lora_b": torch.ones(32, 32)}, "made for FLUX.1 Fill"),
        ({"img_in.lora_a": torch.ones(32, 4), "img_in.lora_b": torch.ones(4, 32)}, "a control LoRA needs"),
        (pair("transformer.x_embedder", columns=48), "made for another model than FLUX.1 [dev] and [schnell]"),
    ],
)
def test_a_wider_image_input_is_another_model_s(reader: Reader, change: Tensors, sentence: str) -> None:
    said = reader.refusal(pair() | change)
    assert sentence in said
    assert "it widens the image input from 16 to " in said


@pytest.mark.parametrize("form", CONTROL)
def test_a_control_lora_needs_a_control_image(reader: Reader, form: str) -> None:
    assert "a control LoRA needs a control image" in reader.refusal(pair() | CONTROL[form])


Q_UP, Q_DOWN = f"{Q}.lora_B.weight", f"{Q}.lora_A.weight"
MISFITS: dict[str, tuple[Tensors, str]] = {
    "rows": (pair(out=48), "32x32"),
    "an image input of factors that do not fit each other": (
        {"img_in.lora_A.weight": torch.ones(4, 96), "img_in.lora_B.weight": torch.ones(32, 5)},
        "does not fit: img_in.lora_B.weight is 32x5 and img_in.lora_A.weight is 4x96",
    ),
    "columns": (pair(columns=48), "4x48"),
    "ranks": (pair() | {Q_UP: torch.ones(32, 5)}, "32x5"),
    "rank 0": ({Q_DOWN: torch.ones(0, 32), Q_UP: torch.ones(32, 0)}, "rank 0"),
    "one dimension": (pair() | {Q_DOWN: torch.ones(32)}, "32"),
    "up alone": ({Q_UP: torch.ones(32, 4)}, "incomplete"),
    "down alone": ({Q_DOWN: torch.ones(4, 32)}, "incomplete"),
    "alpha alone": ({f"{Q}.alpha": torch.tensor(1.0)}, "incomplete"),
    "magnitude alone": ({f"{Q}.dora_scale": torch.ones(32, 1)}, "incomplete"),
    "magnitude of another layer": (pair() | {f"{Q}.dora_scale": torch.ones(5, 1)}, "does not fit"),
    "magnitude of nothing": (pair() | {f"{Q}.dora_scale": torch.tensor(1.0)}, "does not fit"),
    "a rank larger than any layer": ({Q_DOWN: torch.ones(21_505, 32), Q_UP: torch.ones(32, 21_505)}, "than 21504"),
    # The product of this core would be a thousand times larger than the file.
    "a core that is no square": (
        pair(rank=1) | {Q_UP: torch.ones(32, 20_000), f"{Q}.lora_mid.weight": torch.ones(20_000, 1)},
        "lora_mid.weight is 20000x1",
    ),
    "a strength of no LoRA": (pair() | {f"{Q}.alpha": torch.tensor(1e30)}, "have the strength 2.5e+29; none is above"),
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
    file.write_bytes(join(header, bytes([0x31]) * (2 * size)))
    if (dtype.startswith("F") and BITS[dtype] >= 8) or dtype == "BF16":
        assert read_lora(file, reader.transformer, reader.text_encoder).report.applied == 2
    else:
        with pytest.raises(ValueError, match=r"must be a float type|that can be read") as caught:
            read_lora(file, reader.transformer, reader.text_encoder)
        assert_is_one_sentence(str(caught.value), reader)
