"""LoRA files of every format become the same deltas, or are refused in a sentence."""

import json
import math
import random
import resource
import struct
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.loaders import FluxLoraLoaderMixin
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from lora.deltas import Delta, LowRank
from lora_loader import read_lora
from service.slabs import ALIGNMENT
from tests.support import lora_files, models
from tests.support.lora_files import RANK, Tensors
from tests.support.lora_reader import STRENGTH, Reader, assert_is_one_sentence, changed, join, same


def expected(reader: Reader, made: list[lora_files.Change], scale: float = 1.0) -> Tensors:
    """The weights by the definition of a LoRA, in float64."""
    weights = {name: tensor.double() for name, tensor in reader.base.items()}
    for change in made:
        for part, up in change.by_part.items():
            weights[f"{part}.weight"] += scale * STRENGTH * (up.double() @ change.down.double())
    return weights


@pytest.mark.parametrize("scale", [1.0, -0.7])
def test_a_lora_is_base_plus_scale_times_strength_times_up_times_down(reader: Reader, scale: float) -> None:
    made = lora_files.changes(reader.transformer)
    live = reader.live(lora_files.EXACT["diffusers"](made), scale=scale)
    for name, weight in expected(reader, made, scale).items():
        torch.testing.assert_close(live[name], weight.float(), rtol=1e-6, atol=1e-6)
    assert changed(reader, live) == {f"{part}.weight" for change in made for part in change.parts}


def test_factors_stay_low_rank(reader: Reader) -> None:
    lora = reader.read(lora_files.EXACT["kohya"](lora_files.changes(reader.transformer)))
    assert all(isinstance(delta, LowRank) for deltas in lora.transformer.values() for delta in deltas)
    assert all(delta.up.shape[1] == RANK for deltas in lora.transformer.values() for delta in deltas)
    # The parts of a fused layer share one `down`.
    q, k = (lora.transformer[f"transformer_blocks.0.attn.{name}.weight"][0] for name in ("to_q", "to_k"))
    assert q.down is k.down
    assert lora.nbytes < sum(tensor.nbytes for tensor in reader.base.values())


def tensors_of(deltas: Mapping[str, Sequence[Delta]]) -> list[Tensor]:
    return [tensor for several in deltas.values() for delta in several for tensor in delta.tensors()]


FORMS = {**lora_files.EXACT, **lora_files.ROUNDED}


@pytest.mark.parametrize("form", ["kohya", "OneTrainer, OMI", "LoKr", "LoHa", "differences"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_all_tensors_of_a_lora_lie_in_one_slab_and_the_file_is_let_go(
    reader: Reader, form: str, dtype: torch.dtype
) -> None:
    tensors = FORMS[form](lora_files.changes(reader.transformer))
    tensors |= lora_files.CLIP["kohya"](lora_files.clip_changes(reader.text_encoder))
    lora = reader.read({name: tensor.to(dtype) for name, tensor in tensors.items()})
    slabs = []
    for tensors in (tensors_of(lora.transformer), tensors_of(lora.text_encoder)):
        assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == 1
        slabs.append(tensors[0].untyped_storage().nbytes())
        # Padding apart, it is filled by the tensors, the `down` of a fused layer counted once.
        distinct = {tensor.data_ptr(): tensor.nbytes for tensor in tensors}
        assert sum(distinct.values()) <= slabs[-1] < sum(distinct.values()) + ALIGNMENT * len(distinct)
    assert lora.nbytes == sum(slabs)
    assert str(reader.folder) not in Path("/proc/self/maps").read_text()


def test_tensors_that_the_reader_turned_or_cut_are_copied_too(reader: Reader) -> None:
    stem = lora_files.kohya_name("double_blocks.0.img_attn.qkv")
    generator = torch.Generator().manual_seed(0)
    sides = {"w1_a": (RANK, 96), "w1_b": (RANK, 32), "w2_a": (RANK, 96), "w2_b": (RANK, 32)}
    tensors = {f"{stem}.hada_{side}": torch.randn(shape, generator=generator) for side, shape in sides.items()}
    tensors |= {f"{stem}.hada_t{side}": torch.randn(RANK, RANK, 1, 1, generator=generator) for side in (1, 2)}
    lora = reader.read(tensors)
    packed = tensors_of(lora.transformer)
    assert len({tensor.untyped_storage().data_ptr() for tensor in packed}) == 1
    assert all(tensor.is_contiguous() for tensor in packed)
    assert str(reader.folder) not in Path("/proc/self/maps").read_text()
    [to_k] = lora.transformer["transformer_blocks.0.attn.to_k.weight"]
    assert torch.equal(to_k.a, tensors[f"{stem}.hada_w1_a"].T[32:64])


@pytest.mark.parametrize("form", ["kohya", "LoKr", "LoHa", "differences"])
def test_how_a_file_aligns_its_tensors_changes_no_bit(reader: Reader, form: str) -> None:
    tensors = FORMS[form](lora_files.changes(reader.transformer))
    right = reader.live(tensors)
    header, data = _split((reader.folder / "a.safetensors").read_bytes())
    file = reader.folder / "shifted.safetensors"
    for shift in range(0, 70, 6):
        file.write_bytes(join(header | {"__metadata__": {"": "x" * shift}}, data))
        assert same(reader.hold(read_lora(file, reader.transformer, reader.text_encoder)), right)


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
        "config": "",
    }


def test_a_model_without_guidance_leaves_its_embedder_out_and_says_so(reader: Reader, tmp_path: Path) -> None:
    schnell = models.transformer(guidance=False)
    tensors = lora_files.EXACT["kohya"](lora_files.changes(reader.transformer))
    lora = read_lora(lora_files.write(tmp_path / "a.safetensors", tensors), schnell, reader.text_encoder)
    assert lora.report.ignored == {"this FLUX has no guidance embedder": 6}
    assert not [name for name in lora.transformer if "guidance" in name]


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


# Tensors that trainers and tools write for one layer, with their names, and shapes of FLUX.1's dimensions.
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
    "BOOL", "U8", "I8", "I64", "F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "F6_E2M3", "C64",
]  # fmt: skip
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
    return join(header, data)


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
    return join(header, data)


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
