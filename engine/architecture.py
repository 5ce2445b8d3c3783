"""What FLUX.1 is made of: modules without memory, made from configs alone, and the bytes that they will take.

With `Sizes` of a model that is not here yet its placement can be planned. This module knows configs and shapes; it
knows neither files nor where anything lies.
"""

import json
from collections.abc import Iterable, Mapping

import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from engine.placement import Sizes
from service.outline import Outline

# The linear layers of blocks run in fp8, except modulation: it multiplies one vector, which is cheap, and its result
# scales every token, with its rounding errors.
BLOCKS = ("transformer_blocks.", "single_transformer_blocks.")
MODULATION = (".norm.linear", ".norm1.linear", ".norm1_context.linear")
# The official models' configs, as far as they are not the defaults of diffusers and transformers: those of the
# transformer are FLUX.1's. The repo of dev is gated; whoever asks what it takes need not have it.
OFFICIAL = {
    "transformer": {},
    "text_encoder": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
    "text_encoder_2": {
        "d_model": 4096,
        "d_kv": 64,
        "d_ff": 10240,
        "num_layers": 24,
        "num_heads": 64,
        "vocab_size": 32128,
        "feed_forward_proj": "gated-gelu",
    },
    "vae": {
        "block_out_channels": (128, 256, 512, 512),
        "layers_per_block": 2,
        "latent_channels": 16,
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    },
}


def official() -> dict[str, Outline]:
    """The outlines of the official dev and schnell, whose weights are stored in bfloat16."""
    outlines = {}
    for name in ("dev", "schnell"):
        transformer = OFFICIAL["transformer"] | {"guidance_embeds": name == "dev"}
        with torch.device("meta"):
            size = _nbytes(FluxTransformer2DModel.from_config(transformer).to(torch.bfloat16).parameters())
        outlines[name] = Outline(OFFICIAL | {"transformer": transformer}, {"transformer": size})
    return outlines


def is_block_linear(name: str) -> bool:
    """Whether a layer of the transformer is one of those that fp8 may multiply."""
    return name.startswith(BLOCKS) and not name.endswith(MODULATION)


def skeletons(
    configs: Mapping[str, Mapping[str, object]], dtype: torch.dtype
) -> dict[tuple[str, ...], FluxTransformer2DModel]:
    """A transformer without memory for each architecture, by the names of its models.

    dev and schnell differ in their guidance embedder alone, and share one (see `live.Live` on what a base lacks).

    Args:
        configs: of the transformers, by model.
        dtype: of the live weights.
    """
    architectures: dict[str, list[str]] = {}
    for name, config in configs.items():
        shape = {key: value for key, value in config.items() if key != "guidance_embeds" and not key.startswith("_")}
        architectures.setdefault(json.dumps(shape, sort_keys=True), []).append(name)
    made = {}
    for names in architectures.values():
        guided = any(configs[name].get("guidance_embeds", False) for name in names)
        with torch.device("meta"):
            transformer = FluxTransformer2DModel.from_config(configs[names[0]], guidance_embeds=guided).to(dtype)
        made[tuple(names)] = transformer.eval().requires_grad_(False)
    return made


def sizes(outlines: Mapping[str, Outline]) -> Sizes:
    """What the models will take in memory.

    Args:
        outlines: of dev and schnell; dev's text encoders and VAE serve both.

    Raises:
        ValueError: a sentence about a part without a config.
    """
    configs = {name: _config(name, outline, "transformer") for name, outline in outlines.items()}
    bases = {
        name: _stored(skeletons({name: config}, torch.bfloat16)[name,], outlines[name].weights.get("transformer", 0))
        for name, config in configs.items()
    }
    # What is not a base is made in the dtype of dev's transformer.
    dtype = next(bases["dev"].parameters()).dtype
    parameters = [it for skeleton in skeletons(configs, dtype).values() for it in skeleton.named_parameters()]
    dev = outlines["dev"]
    t5_config = T5Config.from_dict(_config("dev", dev, "text_encoder_2"))
    with torch.device("meta"):
        t5 = T5EncoderModel(t5_config).to(dtype)
        clip = CLIPTextModel(CLIPTextConfig.from_dict(_config("dev", dev, "text_encoder"))).to(dtype)
        vae = AutoencoderKL.from_config(_config("dev", dev, "vae")).to(dtype)
    return Sizes(
        bases={name: [it.nbytes for it in base.parameters()] for name, base in bases.items()},
        live=_nbytes(it for _, it in parameters),
        linears=_nbytes(
            it for name, it in parameters if it.ndim == 2 and is_block_linear(name.removesuffix(".weight"))
        ),
        t5=[it.nbytes for it in t5.parameters()],
        t5_block=_nbytes(t5.parameters()) // t5_config.num_layers,
        rest=2 * _nbytes(clip.parameters()) + _nbytes(vae.parameters()),
    )


def _config(name: str, outline: Outline, part: str) -> dict[str, object]:
    if part not in outline.configs:
        raise ValueError(f"The model that shall be {name} has no {part}/config.json; it must be in diffusers layout.")
    return dict(outline.configs[part])


def _stored(transformer: nn.Module, file_bytes: int) -> nn.Module:
    """The same in the widest dtype that its files have bytes for; files of too few bytes are refused when loaded."""
    width = file_bytes // sum(it.numel() for it in transformer.parameters())
    return transformer.to(torch.float32 if width >= torch.float32.itemsize else torch.bfloat16)


def _nbytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
