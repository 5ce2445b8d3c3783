"""Every spelling of a layer is the same layer, and names of other things are ignored or refused."""

from collections.abc import Callable

import pytest
import torch

from lora.names import assign
from tests.support import lora_files
from tests.support.lora_files import Tensors
from tests.support.lora_reader import STRENGTH, Q, Reader, changed, of, pair, same


@pytest.mark.parametrize("form", lora_files.EXACT)
def test_every_format_gives_the_same_bits(reader: Reader, form: str) -> None:
    made = lora_files.changes(reader.transformer)
    tensors = lora_files.EXACT[form](made)
    assert same(reader.live(tensors), reader.live(lora_files.EXACT["diffusers"](made)))
    report = reader.read(tensors).report
    assert report.applied == report.total == len(tensors)
    assert not report.ignored


@pytest.mark.parametrize(
    ("form", "layers"), [(lora_files.diffsynth, lora_files.is_block), (lora_files.xlabs, lora_files.is_xlabs)]
)
def test_formats_of_some_layers_alone_give_the_same_bits(reader: Reader, form: Callable, layers: Callable) -> None:
    made = lora_files.changes(reader.transformer, only=layers)
    assert same(reader.live(form(made)), reader.live(lora_files.EXACT["diffusers"](made)))


@pytest.mark.parametrize("form", lora_files.ROUNDED)
def test_formats_that_multiply_in_another_order_differ_by_roundings_alone(reader: Reader, form: str) -> None:
    made = lora_files.changes(reader.transformer)
    tensors = lora_files.ROUNDED[form](made)
    live, reference = reader.live(tensors), reader.live(lora_files.EXACT["diffusers"](made))
    for name in live:
        # Two roundings of the product (at most about 4 here) and one of the sum, in units of float32's 2^-24.
        torch.testing.assert_close(live[name], reference[name], rtol=0, atol=4 * 3 * 2**-24)
    assert reader.read(tensors).report.applied == len(tensors)


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


def test_halves_of_the_final_modulation_change_places(reader: Reader) -> None:
    weight = reader.base["norm_out.linear.weight"]  # [scale; shift]
    shift, scale = torch.full_like(weight[:32], 1.0), torch.full_like(weight[32:], 2.0)
    stem = "lora_unet_final_layer_adaLN_modulation_1"
    live = reader.live({f"{stem}.diff": torch.cat([shift, scale]), f"{stem}.diff_b": torch.arange(64.0)})
    assert torch.equal(live["norm_out.linear.weight"] - weight > 1.5, torch.cat([scale, shift]) > 1.5)
    bias = live["norm_out.linear.bias"] - reader.base["norm_out.linear.bias"]
    torch.testing.assert_close(bias, torch.cat([torch.arange(32.0, 64.0), torch.arange(32.0)]))


Q_OUT = "transformer_blocks.0.attn.to_out.0"
# The same layer as its name may be wrapped, prefixed and old: each of them before, within or behind it.
SPELLINGS = {
    "DDP": f"module.{Q_OUT}",
    "DDP within": f"transformer.module.{Q_OUT}",
    "torch.compile": f"transformer._orig_mod.{Q_OUT}",
    "FSDP, compiled": "_fsdp_wrapped_module._orig_mod.transformer_blocks.0._fsdp_wrapped_module.attn.to_out.0",
    "checkpointing": "transformer.transformer_blocks.0._checkpoint_wrapped_module.attn.to_out.0",
    "wrapped itself": f"{Q_OUT}.module._orig_mod",
    "kohya, compiled": "lora_unet__orig_mod_double_blocks_0_img_attn_proj",
    "kohya, DDP": "lora_unet_module_double_blocks_0__checkpoint_wrapped_module_img_attn_proj",
    "LyCORIS, two underscores": "lycoris__transformer_blocks_0_attn_to_out_0",
    "kohya, compiled itself": "lora_unet_double_blocks_0_img_attn_proj__orig_mod",
    "PEFT, twice": f"transformer.{Q_OUT}.base_layer",
    "model.": f"model.{Q_OUT}",
    "base_model.": f"base_model.{Q_OUT}",
    "pipe.dit.": "pipe.dit.blocks.0.attn.a_to_out",
    "pipe.transformer.": f"pipe.transformer.{Q_OUT}",
    "dit.": f"dit.{Q_OUT}",
    "SimpleTuner": f"transformer.base_model.model.{Q_OUT}",
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_wrappers_and_prefixes_mean_nothing(reader: Reader, spelling: str) -> None:
    live = reader.live(pair(SPELLINGS[spelling]))
    assert changed(reader, live) == {f"{Q_OUT}.weight"}
    assert same(live, reader.live(pair(f"transformer.{Q_OUT}")))


SUFFIXES = {
    "a name with a hyphen": (".lora_A.my-style.weight", ".lora_B.my-style.weight"),
    "a name with a space": (".lora_A.my style 2.weight", ".lora_B.my style 2.weight"),
    "a wrapper within": (".lora_A.module.default.weight", ".lora_B._orig_mod.default.weight"),
    "a wrapper at the end": (".lora_A.default.module.weight", ".lora_B.default.module.weight"),
}


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_the_adapter_s_name_means_nothing(reader: Reader, suffix: str) -> None:
    down, up = SUFFIXES[suffix]
    given = pair(Q)
    live = reader.live({f"{Q}{down}": given[f"{Q}.lora_A.weight"], f"{Q}{up}": given[f"{Q}.lora_B.weight"]})
    assert same(live, reader.live(given))


def test_old_attention_processors(reader: Reader) -> None:
    old = {
        "to_q_lora": "to_q",
        "to_out_lora": "to_out.0",
        "add_k_proj_lora": "add_k_proj",
        "to_add_out_lora": "to_add_out",
    }
    tensors, given = {}, {}
    for seed, (theirs, ours) in enumerate(old.items()):
        stem = f"transformer_blocks.1.attn.{ours}"
        given |= (made := pair(stem, seed=seed))
        processor = f"transformer.transformer_blocks.1.attn.processor.{theirs}"
        tensors |= {f"{processor}.down.weight": made[f"{stem}.lora_A.weight"]}
        tensors |= {f"{processor}.up.weight": made[f"{stem}.lora_B.weight"]}
    assert same(reader.live(tensors), reader.live(given))


# ---------------------------------------------------------------------------------------------------------------------
# Names of nothing here


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
        ("lora_te1_text_model_embeddings.position_ids", "positions"),
        ("diffusion_model.num_updates", "no layer of FLUX.1 has such a name"),
        ("base_model.model.encoder.block.0.layer.0.SelfAttention.q.lora_A.weight", "T5"),
        ("something.else", "no layer of FLUX.1 has such a name"),
    ],
)
def test_what_belongs_to_nothing_here_is_ignored_with_its_reason(reader: Reader, name: str, reason: str) -> None:
    report = reader.read(pair() | {name: torch.randn(4, 8)}).report
    [(said, count)] = report.ignored.items()
    assert reason in said
    assert (count, report.applied, report.total) == (1, 2, 3)


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
    "two adapters": (
        of(f"{Q}.lora_A.a.weight", f"{Q}.lora_B.b.weight"),
        "changes transformer_blocks.0.attn.to_q by two adapters, a and b",
    ),
    "a number with a 0 before it": (
        pair() | of("transformer_blocks.01.attn.to_q.lora_A.weight"),
        "no layer of such a name",
    ),
    "a layer behind an unknown word": (pair() | of("net.double_blocks.0.img_attn.qkv.diff"), "no layer of such a name"),
    "a layer's name alone": (pair() | of("transformer.x_embedder"), "a kind of change to x_embedder"),
    "a factor of PEFT's of no layer": (pair() | of("foo.vera_lambda_b"), "no layer of such a name"),
    "one DiffSynth block too many": (pair() | of("blocks.2.attn.a_to_qkv.lora_A.weight"), "of blocks it has 2"),
    "one layer of CLIP too many": (of("lora_te1_text_model_encoder_layers_2_mlp_fc1.alpha"), "encoder_layers it has 2"),
    "a layer that no block has": (
        pair() | of("transformer_blocks.0.attn.to_z.lora_A.weight"),
        "no layer of such a name",
    ),
    "a layer outside of blocks": (pair() | of("transformer.pos_embed.lora_A.weight"), "no layer of such a name"),
    "a difference of nothing": (pair() | of("diffusion_model.img_out.diff"), "no layer of such a name"),
    "a weight of nothing": (pair() | of("adapter.proj.weight"), "no layer of such a name"),
    "a factor of an unknown kind": (pair() | of("transformer.pos_embed.lora_E"), "no layer of such a name"),
    "FLUX.2, a single block": (of("single_transformer_blocks.0.attn.to_out.lora_A.weight"), "FLUX.2"),
    "FLUX.2, a double block": (of("transformer_blocks.0.ff.linear_in.lora_A.weight"), "FLUX.2"),
    "an IP-Adapter": (of("double_blocks.0.processor.ip_adapter_double_stream_k_proj.weight"), "IP-Adapter"),
    "EasyControl": (pair() | of("transformer_blocks.0.attn.processor.q_loras.0.down.weight"), "EasyControl"),
    "EasyControl, XLabs' names": (of("double_blocks.0.processor.proj_loras.0.up.weight"), "EasyControl"),
    "SVDQuant": (of("transformer_blocks.0.qkv_proj.lora_down", "transformer_blocks.0.qkv_proj.lora_up"), "SVDQuant"),
    "SVDQuant, a layer like ours": (of("transformer_blocks.0.norm1.linear.lora_down"), "SVDQuant"),
    "OFT, kohya": (of("oft_unet_double_blocks_0_img_attn_proj.oft_blocks.0", shape=(4, 8, 8)), "an OFT"),
    "OFT, LyCORIS": (of(f"{Q}.oft_blocks", shape=(4, 8, 8)), "an OFT"),
    "OFT, PEFT and OneTrainer": (of(f"{Q}.oft_R.weight"), "an OFT"),
    "BOFT": (of(f"{Q}.boft_R", f"{Q}.boft_s"), "a BOFT"),
    "GLoRA": (of(f"{Q}.a1.weight", f"{Q}.a2.weight", f"{Q}.b1.weight", f"{Q}.b2.weight"), "a GLoRA"),
    "IA3, LyCORIS": (of(f"{Q}.weight", f"{Q}.on_input"), "an IA3"),
    "IA3, PEFT": (of(f"{Q}.ia3_l"), "an IA3"),
    "AdaLoRA": (of(f"{Q}.lora_A", f"{Q}.lora_B", f"{Q}.lora_E"), "lora_E, a kind of change"),
    "a LoRA that changes with time": (pair() | of(f"{Q}.lora_time_gamma.weight"), "lora_time_gamma.weight, a kind of"),
    "scaled fp8": (pair() | of(f"{Q}.scale_weight"), "scale_weight, a kind of change"),
    "a name of many characters": (of("a" * 257), "has 257 characters; the name of a tensor has at most 256"),
    "a name of many parts": (of("a." * 33), "has 33 dots; the name of a tensor has at most 32"),
    "a kind of change that we lack": (pair() | of(f"{Q}.hra_u"), "hra_u, a kind of change to transformer_blocks.0"),
}


@pytest.mark.parametrize("what", OTHERS)
def test_other_files_are_refused_by_name(reader: Reader, what: str) -> None:
    tensors, word = OTHERS[what]
    assert word in reader.refusal(tensors)


def test_more_tensors_than_any_lora_has_are_refused() -> None:
    with pytest.raises(ValueError, match="has 50001 tensors; a LoRA has at most 50000"):
        assign([str(number) for number in range(50_001)], {})
