"""FLUX.1 dev and schnell with random weights: all of the real models' sizes, and nothing to download.

Speed does not depend on what the weights are. Tokenizers are the miniature's, told that they read as many tokens as the
real ones. schnell is dev without its guidance embedder, and shares its files.
"""

import json
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPTextConfig,
    CLIPTextModel,
    T5Config,
    T5EncoderModel,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)

from engine.loading import is_block_linear
from settings import ROOT, Models

SHARD_BYTES = 5 * 10**9
RANK = 16
TOKENS = {"tokenizer": 77, "tokenizer_2": 512}

FULL = {
    "transformer": {},  # diffusers' defaults are FLUX.1's
    "clip": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
    "t5": {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "vocab_size": 32128},
    "vae": {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 16},
    "checker": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "patch_size": 14},
    "classifier": {},
}
SMALL = {
    "transformer": {
        "num_layers": 2,
        "num_single_layers": 3,
        "attention_head_dim": 16,
        "num_attention_heads": 4,
        "joint_attention_dim": 32,
        "pooled_projection_dim": 48,
        "axes_dims_rope": (4, 6, 6),
    },
    "clip": {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
    "t5": {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 512},
    "vae": {"block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "latent_channels": 16, "norm_num_groups": 1},
    "checker": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "patch_size": 32},
    "classifier": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
}


def write(folder: Path, sizes: dict[str, dict], device: torch.device) -> Models:
    """Write the models unless they are there.

    Args:
        folder: where to; 34 GB for FULL.
        sizes: FULL or SMALL.
        device: what makes the random numbers.
    """
    models = Models(*(str(folder / name) for name in ("dev", "schnell", "safety_checker", "nsfw_classifier")))
    if (folder / "complete").exists():
        return models
    torch.manual_seed(0)
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            _write_transformers(folder, FluxTransformer2DModel(guidance_embeds=True, **sizes["transformer"]))
            _write_shared(folder, sizes)
    finally:
        torch.set_default_dtype(dtype)
    with device:
        _write_safety(folder, sizes)
    (folder / "complete").touch()
    return models


def write_lora(path: Path, transformer: nn.Module, seed: int) -> Path:
    """A LoRA of rank 16 on every linear layer of the blocks, in diffusers' format."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, layer in transformer.named_modules():
        if isinstance(layer, nn.Linear) and is_block_linear(name):
            down = torch.randn(RANK, layer.in_features, generator=generator) / layer.in_features**0.5
            up = torch.randn(layer.out_features, RANK, generator=generator) * 0.02
            tensors |= {
                f"transformer.{name}.lora_A.weight": down.bfloat16(),
                f"transformer.{name}.lora_B.weight": up.bfloat16(),
            }
    save_file(tensors, path)
    return path


def _write_transformers(folder: Path, transformer: FluxTransformer2DModel) -> None:
    shards: list[dict[str, Tensor]] = [{}]
    guidance: dict[str, Tensor] = {}
    for name, tensor in transformer.state_dict().items():
        if "guidance_embedder" in name:
            guidance[name] = tensor
            continue
        if sum(held.nbytes for held in shards[-1].values()) > SHARD_BYTES:
            shards.append({})
        shards[-1][name] = tensor
    config = {key: value for key, value in transformer.config.items() if not key.startswith("_")}
    for model, guided in (("dev", True), ("schnell", False)):
        home = folder / model / "transformer"
        home.mkdir(parents=True)
        weight_map = {}
        for number, shard in enumerate([*shards, guidance] if guided else shards):
            file = f"diffusion_pytorch_model-{number}.safetensors"
            if guided:
                save_file(shard, home / file)
            else:
                (home / file).hardlink_to(folder / "dev" / "transformer" / file)
            weight_map |= dict.fromkeys(shard, file)
        index = {"metadata": {}, "weight_map": weight_map}
        (home / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
        (home / "config.json").write_text(
            json.dumps({"_class_name": "FluxTransformer2DModel", **config, "guidance_embeds": guided})
        )
        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0 if guided else 1.0, use_dynamic_shifting=guided)
        scheduler.save_pretrained(folder / model / "scheduler")
        shutil.copy(ROOT / "mini" / "dev" / "model_index.json", folder / model)


def _write_shared(folder: Path, sizes: dict[str, dict]) -> None:
    dev = folder / "dev"
    for name, tokens in TOKENS.items():
        source = ROOT / "mini" / "dev" / name
        AutoTokenizer.from_pretrained(source, model_max_length=tokens).save_pretrained(dev / name)
    tokenizer = AutoTokenizer.from_pretrained(dev / "tokenizer")
    clip = CLIPTextConfig(
        max_position_embeddings=TOKENS["tokenizer"], eos_token_id=tokenizer.eos_token_id, **sizes["clip"]
    )
    CLIPTextModel(clip).save_pretrained(dev / "text_encoder")
    t5 = T5Config(feed_forward_proj="gated-gelu", tie_word_embeddings=False, **sizes["t5"])
    T5EncoderModel(t5).save_pretrained(dev / "text_encoder_2")
    levels = len(sizes["vae"]["block_out_channels"])
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
        **sizes["vae"],
    )
    vae.save_pretrained(dev / "vae")


def _write_safety(folder: Path, sizes: dict[str, dict]) -> None:
    checker = CLIPConfig(
        vision_config=sizes["checker"] | {"num_attention_heads": 16, "image_size": 224}, projection_dim=768
    )
    StableDiffusionSafetyChecker(checker).save_pretrained(folder / "safety_checker")
    CLIPImageProcessorPil().save_pretrained(folder / "safety_checker")
    classifier = ViTConfig(id2label={0: "normal", 1: "nsfw"}, label2id={"normal": 0, "nsfw": 1}, **sizes["classifier"])
    ViTForImageClassification(classifier).save_pretrained(folder / "nsfw_classifier")
    ViTImageProcessorPil().save_pretrained(folder / "nsfw_classifier")
