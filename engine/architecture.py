"""FLUX.1's modules without memory, made from configs alone, and the bytes that they will take.

By its `Sizes` the placement of a model can be planned before it is downloaded. This module knows configs and shapes; it
knows neither files nor where anything lies.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from engine.placement import Sizes
from request import named_blocks
from service.outline import Outline

# The linear layers of blocks run in fp8, except modulation: it multiplies one vector, which is cheap, and its result
# scales every token, with its rounding errors.
BLOCKS = ("transformer_blocks.", "single_transformer_blocks.")
# Their names at Black Forest Labs.
KINDS = {"double_blocks": "transformer_blocks", "single_blocks": "single_transformer_blocks"}
MODULATION = (".norm.linear", ".norm1.linear", ".norm1_context.linear")
# The official models' configs, as far as they are not the defaults of diffusers and transformers: those of the
# transformer are FLUX.1's. The repo of dev is gated, and its placement can be planned without access to it.
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
    """The outlines of the official dev and schnell, but for the bytes of their files: they are in bfloat16."""
    return {
        name: Outline(OFFICIAL | {"transformer": OFFICIAL["transformer"] | {"guidance_embeds": name == "dev"}}, {})
        for name in ("dev", "schnell")
    }


def is_block_linear(name: str) -> bool:
    """Whether a layer of the transformer is one of those that fp8 may multiply."""
    return name.startswith(BLOCKS) and not name.endswith(MODULATION)


def by_block(factors: Mapping[str, float], transformer: FluxTransformer2DModel) -> tuple[dict[str, float], list[str]]:
    """The factors of `LoraChoice.blocks` by the transformer's names of single blocks; and keys of blocks it lacks."""
    named = sorted(((*named_blocks(key), key) for key in factors), key=lambda it: len(it[1]), reverse=True)
    found, lacking = {}, []
    for kind, numbers, key in named:
        blocks = range(len(getattr(transformer, KINDS[kind])))
        found |= {f"{KINDS[kind]}.{number}": factors[key] for number in numbers if number in blocks}
        if key != kind and numbers[-1] not in blocks:
            lacking.append(key)
    return found, lacking


def skeletons(
    configs: Mapping[str, Mapping[str, object]], dtype: torch.dtype
) -> dict[tuple[str, ...], FluxTransformer2DModel]:
    """A transformer without memory for each architecture in the models' configs, by the names of its models.

    dev and schnell differ in their guidance embedder alone, and share one: see `live.Live` on parameters that a base
    lacks.
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


def outlined(outline: Outline) -> tuple[FluxTransformer2DModel, CLIPTextModel]:
    """A model's transformer and CLIP without memory, for which a LoRA is read; a ValueError as of `sizes`."""
    config, clip = (_config("dev", outline, part) for part in ("transformer", "text_encoder"))
    with _sentences():
        (transformer,) = skeletons({"dev": config}, torch.bfloat16).values()
        with torch.device("meta"):
            return transformer, CLIPTextModel(CLIPTextConfig.from_dict(clip))


def sizes(outlines: Mapping[str, Outline]) -> Sizes:
    """Bytes of memory that dev and schnell will take; dev's text encoders and VAE serve both.

    Raises:
        ValueError: a sentence about a part without a config, or with one that makes no sense.
    """
    configs = {name: _config(name, outline, "transformer") for name, outline in outlines.items()}
    parts = {part: _config("dev", outlines["dev"], part) for part in ("text_encoder", "text_encoder_2", "vae")}
    with _sentences():
        with torch.device("meta"):
            clip = CLIPTextModel(CLIPTextConfig.from_dict(parts["text_encoder"]))
            t5 = T5EncoderModel(T5Config.from_dict(parts["text_encoder_2"]))
            vae = AutoencoderKL.from_config(parts["vae"])
        bases, widths, live, linears = {}, {}, 0, 0
        for names, skeleton in skeletons(configs, torch.bfloat16).items():
            elements = _elements(skeleton)
            live += sum(elements.values())
            weights = [name for name, module in skeleton.named_modules() if isinstance(module, nn.Linear)]
            linears += sum(elements[f"{name}.weight"] for name in weights if is_block_linear(name))
            for name in names:
                guided = configs[name].get("guidance_embeds", False)
                own = [count for key, count in elements.items() if guided or "guidance_embedder" not in key]
                # Bytes of an element, as the files' size tells; files that are too small are refused when loaded.
                widths[name] = 4 if outlines[name].weights.get("transformer", 0) >= 4 * sum(own) else 2
                bases[name] = [widths[name] * count for count in own]
        width = widths["dev"]  # everything else is made in dev's dtype
        t5_bytes = [width * count for count in _elements(t5).values()]
        return Sizes(
            bases={name: bases[name] for name in configs},
            live=width * live,
            linears=width * linears,
            t5=t5_bytes,
            t5_block=sum(t5_bytes) // t5.config.num_layers,
            rest=width * (2 * sum(_elements(clip).values()) + sum(_elements(vae).values())),
        )


@contextmanager
def _sentences() -> Iterator[None]:
    """Turn any error of a library about configs into a sentence."""
    try:
        yield
    except Exception as error:
        raise ValueError(
            f"The configs of dev and schnell describe no FLUX ({type(error).__name__}); fetch or copy them again."
        ) from error


def _config(name: str, outline: Outline, part: str) -> dict[str, object]:
    if part not in outline.configs:
        raise ValueError(f"The model that shall be {name} has no {part}/config.json; it must be in diffusers layout.")
    return dict(outline.configs[part])


def _elements(module: nn.Module) -> dict[str, int]:
    return {name: parameter.numel() for name, parameter in module.named_parameters()}
