"""Small real models of FLUX's kind, in diffusers layout, seeded; with dimensions unlike other models'."""

import json
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from settings import ROOT, Models

HEADS, HEAD_SIZE = 2, 16
HIDDEN = HEADS * HEAD_SIZE
POOLED = 24
TEXT = 20


def transformer(*, guidance: bool = True, seed: int = 0, **changes: object) -> FluxTransformer2DModel:
    """Two double and three single blocks of hidden size 32, float32."""
    torch.manual_seed(seed)
    config = {
        "in_channels": 16,
        "num_layers": 2,
        "num_single_layers": 3,
        "attention_head_dim": HEAD_SIZE,
        "num_attention_heads": HEADS,
        "joint_attention_dim": TEXT,
        "pooled_projection_dim": POOLED,
        "guidance_embeds": guidance,
        "axes_dims_rope": (4, 6, 6),
    }
    return FluxTransformer2DModel(**config | changes).eval()


def text_encoder(vocabulary: int = 64, positions: int = 16, end: int = 2) -> CLIPTextModel:
    """A CLIP of hidden size 24, float32."""
    torch.manual_seed(1)
    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=POOLED,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=positions,
        eos_token_id=end,
    )
    return CLIPTextModel(config).eval()


def write_flux(folder: Path, *, guidance: bool, seed: int, vae_factor: int = 8) -> Path:
    """A whole FLUX of random float32 weights in diffusers layout, with the miniature's tokenizers."""
    mini = ROOT / "mini" / ("dev" if guidance else "schnell")
    for name in ("tokenizer", "tokenizer_2"):
        shutil.copytree(mini / name, folder / name)
    transformer(guidance=guidance, seed=seed).save_pretrained(folder / "transformer")
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0 if guidance else 1.0, use_dynamic_shifting=guidance)
    scheduler.save_pretrained(folder / "scheduler")
    clip = CLIPTextConfig.from_pretrained(mini / "text_encoder")
    text_encoder(clip.vocab_size, clip.max_position_embeddings, clip.eos_token_id).save_pretrained(
        folder / "text_encoder"
    )
    torch.manual_seed(2)
    t5 = T5Config(
        vocab_size=T5Config.from_pretrained(mini / "text_encoder_2").vocab_size,
        d_model=TEXT,
        d_kv=8,
        d_ff=32,
        num_layers=1,
        num_heads=2,
    )
    T5EncoderModel(t5).save_pretrained(folder / "text_encoder_2")
    levels = vae_factor.bit_length()
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=(8,) * levels,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=1,
        scaling_factor=0.36,
        shift_factor=0.12,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    vae.save_pretrained(folder / "vae")
    (folder / "model_index.json").write_text(json.dumps(json.loads((mini / "model_index.json").read_text())))
    return folder


def write_models(folder: Path, *, vae_factor: int = 8) -> Models:
    """dev and schnell of random float32 weights, with the miniature's safety models."""
    mini = ROOT / "mini"
    return Models(
        dev=str(write_flux(folder / "dev", guidance=True, seed=3, vae_factor=vae_factor)),
        schnell=str(write_flux(folder / "schnell", guidance=False, seed=4, vae_factor=vae_factor)),
        safety_checker=str(mini / "safety_checker"),
        nsfw_classifier=str(mini / "nsfw_classifier"),
    )
