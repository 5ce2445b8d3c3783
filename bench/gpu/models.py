"""FLUX.1 dev and schnell with random weights of the real models' sizes, made on the device.

Speed does not depend on the weights' values, so nothing is downloaded. The tokenizers are the miniature's, with the
real ones' number of tokens. schnell is dev without its guidance embedder, and shares its tensors.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from transformers import (
    AutoTokenizer,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPTextConfig,
    CLIPTextModel,
    PreTrainedTokenizerBase,
    T5Config,
    T5EncoderModel,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)

from engine.architecture import OFFICIAL, skeletons
from engine.loading import Models, assemble
from engine.placement import Precisions
from safety import SafetyChecker
from settings import ROOT

TOKENS = {"tokenizer": 77, "tokenizer_2": 512}
T5 = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
VAE = {"scaling_factor": 0.3611, "shift_factor": 0.1159, "use_quant_conv": False, "use_post_quant_conv": False}

FULL = {
    "transformer": OFFICIAL["transformer"],
    "clip": OFFICIAL["text_encoder"],
    "t5": OFFICIAL["text_encoder_2"],
    "vae": OFFICIAL["vae"],
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


@contextmanager
def bfloat16_on(device: torch.device) -> Iterator[None]:
    """Modules that are made inside are in bfloat16 on the device."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(dtype)


def make_transformer(device: torch.device, config: dict[str, object]) -> FluxTransformer2DModel:
    """A transformer of dev's kind, in bfloat16."""
    with bfloat16_on(device):
        return FluxTransformer2DModel(guidance_embeds=True, **config).eval().requires_grad_(False)


def make_models(device: torch.device, sizes: dict[str, dict], *, fp8: bool) -> tuple[Models, FluxTransformer2DModel]:
    """Both models, as if they were loaded from folders, with all weights on the device.

    Returns:
        The models, and dev's pristine transformer, whose parameters are the base of both.
    """
    torch.manual_seed(0)
    pristine = make_transformer(device, sizes["transformer"])
    base = dict(pristine.state_dict())
    config = dict(pristine.config)
    bases = {"dev": base, "schnell": {name: it for name, it in base.items() if "guidance_embedder" not in name}}
    shared = skeletons({"dev": config, "schnell": config | {"guidance_embeds": False}}, torch.bfloat16)
    schedulers = {
        "dev": dict(FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True).config),
        "schnell": dict(FlowMatchEulerDiscreteScheduler(shift=1.0).config),
    }
    precisions = Precisions.BOTH if fp8 else Precisions.BF16
    return assemble(shared, bases, _components(device, sizes), schedulers, precisions, device), pristine


def make_safety(device: torch.device, sizes: dict[str, dict]) -> SafetyChecker:
    """Both stages of the safety check, in float32."""
    vision = sizes["checker"] | {"num_attention_heads": 16, "image_size": 224}
    labels = {"id2label": {0: "normal", 1: "nsfw"}, "label2id": {"normal": 0, "nsfw": 1}}
    with device:
        checker = StableDiffusionSafetyChecker(CLIPConfig(vision_config=vision, projection_dim=768)).eval()
        classifier = ViTForImageClassification(ViTConfig(**labels, **sizes["classifier"])).eval()
    return SafetyChecker(checker, CLIPImageProcessorPil(), classifier, ViTImageProcessorPil())


def _components(device: torch.device, sizes: dict[str, dict]) -> dict[str, object]:
    """A pipeline's other components, by diffusers' names."""
    tokenizers = {name: _tokenizer(name) for name in TOKENS}
    end = tokenizers["tokenizer"].eos_token_id
    clip = CLIPTextConfig(max_position_embeddings=TOKENS["tokenizer"], eos_token_id=end, **sizes["clip"])
    t5 = T5Config(**T5 | sizes["t5"])
    levels = len(sizes["vae"]["block_out_channels"])
    blocks = {
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
    }
    with bfloat16_on(device):
        modules = {
            "text_encoder": CLIPTextModel(clip),
            "text_encoder_2": T5EncoderModel(t5),
            "vae": AutoencoderKL(**blocks | VAE | sizes["vae"]),
        }
    return tokenizers | {name: module.eval().requires_grad_(False) for name, module in modules.items()}


def _tokenizer(name: str) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(ROOT / "mini" / "dev" / name, model_max_length=TOKENS[name])
