"""A LoRA file in any format → deltas by parameter, and a report of what was applied and what was not.

There is one table of names: every spelling of every layer, built from the models' own modules, with the rows of each
parameter where a file's layer is several of ours. And one reader of what may stand behind a name (`lora_down.weight`,
`alpha`, `lokr_w1`, `diff_b` ...). What a file says about a layer of FLUX or CLIP is applied exactly, or the file is
refused in one sentence before anything is changed. What belongs to nothing here (a T5, embeddings) is ignored and
reported.
"""

import contextlib
import json
import math
import os
import re
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lora import deltas
from lora.deltas import Decomposed, Delta, Full, Hadamard, Kronecker, LowRank, Replacement

# ---------------------------------------------------------------------------------------------------------------------
# Names of layers. Parts of a fused layer stand in the order of its rows.

DOUBLE_BLOCK = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "img_attn.proj": ("attn.to_out.0",),
    "txt_attn.proj": ("attn.to_add_out",),
    "img_attn.norm.query_norm": ("attn.norm_q",),
    "img_attn.norm.key_norm": ("attn.norm_k",),
    "txt_attn.norm.query_norm": ("attn.norm_added_q",),
    "txt_attn.norm.key_norm": ("attn.norm_added_k",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
    "img_mod.lin": ("norm1.linear",),
    "txt_mod.lin": ("norm1_context.linear",),
    # XLabs hangs its factors on the attention processors.
    "qkv_lora1": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "qkv_lora2": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "proj_lora1": ("attn.to_out.0",),
    "proj_lora2": ("attn.to_add_out",),
}
SINGLE_BLOCK = {
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
    "modulation.lin": ("norm.linear",),
    "norm.query_norm": ("attn.norm_q",),
    "norm.key_norm": ("attn.norm_k",),
    "qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "proj": ("proj_out",),
    # DiffSynth-Studio keeps diffusers' names for the rest of a single block.
    "to_qkv_mlp": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "proj_out": ("proj_out",),
    "norm.linear": ("norm.linear",),
}
DIFFSYNTH_BLOCK = {
    "attn.a_to_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "attn.b_to_qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "attn.a_to_out": ("attn.to_out.0",),
    "attn.b_to_out": ("attn.to_add_out",),
    "ff_a.0": ("ff.net.0.proj",),
    "ff_a.2": ("ff.net.2",),
    "ff_b.0": ("ff_context.net.0.proj",),
    "ff_b.2": ("ff_context.net.2",),
    "norm1_a.linear": ("norm1.linear",),
    "norm1_b.linear": ("norm1_context.linear",),
}
OUTSIDE_BLOCKS = {
    "img_in": "x_embedder",
    "img_in.proj": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "final_layer.linear": "proj_out",
}
# What diffusers' `fuse_qkv_projections` calls its layers, in every block that has the parts.
FUSED = {
    "attn.to_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "attn.to_added_qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
}
CLIP = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}

# What may stand before a layer's name, with dots as underscores, and whose way of writing it is.
PREFIXES = {
    "base_model_model": "PEFT",
    "lora_unet": "kohya",
    "lora_transformer": "OneTrainer",
    "lycoris": "LyCORIS",
    "model_diffusion_model": "ComfyUI",
    "diffusion_model": "ComfyUI",
    "transformer": "diffusers",
    "unet": "diffusers",
    "text_encoders_clip_l_transformer": "ComfyUI",
    "text_encoders_clip_l": "ComfyUI",
    "clip_l_transformer": "ComfyUI",
    "clip_l": "ComfyUI",
    "text_encoder": "diffusers",
    "lora_te1": "kohya",
    "lora_te": "kohya",
    "te1": "kohya",
    "te": "kohya",
}
# Words within names that say nothing about the layer.
NOISE = re.compile(r"(?:^|(?<=\.))(?:processor|_orig_mod)\.")

# What may stand behind a layer's name; each group is one role that a tensor can have for its layer.
TENSOR = re.compile(
    r"(?P<stem>.+?)(?:"
    r"(?P<up>\.lora_B(?:\.\w+)?\.weight|\.lora_B|\.lora_up\.weight|(?:_lora|\.lora|\.lora_linear_layer)?\.up\.weight)|"
    r"(?P<down>\.lora_A(?:\.\w+)?\.weight|\.lora_A|\.lora_down\.weight"
    r"|(?:_lora|\.lora|\.lora_linear_layer)?\.down\.weight)|"
    r"(?P<up_bias>\.lora_B(?:\.\w+)?\.bias|\.lora_up\.bias)|"
    r"(?P<mid>\.lora_mid\.weight)|"
    r"(?P<alpha>(?:_lora|\.lora)?\.alpha)|"
    r"(?P<magnitude>\.dora_scale|\.lora_magnitude_vector(?:\.(?!weight$)\w+)?(?:\.weight)?)|"
    r"\.(?:"
    r"(?P<lokr_w1>lokr_w1)|(?P<lokr_w1_a>lokr_w1_a)|(?P<lokr_w1_b>lokr_w1_b)|"
    r"(?P<lokr_w2>lokr_w2)|(?P<lokr_w2_a>lokr_w2_a)|(?P<lokr_w2_b>lokr_w2_b)|(?P<lokr_t2>lokr_t2)|"
    r"(?P<hada_w1_a>hada_w1_a)|(?P<hada_w1_b>hada_w1_b)|(?P<hada_t1>hada_t1)|"
    r"(?P<hada_w2_a>hada_w2_a)|(?P<hada_w2_b>hada_w2_b)|(?P<hada_t2>hada_t2)|"
    r"(?P<diff>diff|w_norm)|(?P<diff_b>diff_b|b_norm)|"
    r"(?P<value>weight|scale|set_weight)|(?P<value_b>bias)"
    r"))"
)
# How numbers may be stored. Float4 is packed in pairs that torch cannot take apart.
FLOATS = {torch.float64, torch.float32, torch.float16, torch.bfloat16}
FLOATS |= {torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu}
INTEGERS = {torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}
# What no layer here is called, and why that does no harm. Matched against names with dots as underscores.
IGNORED = (
    (
        r"lora_te3_|lora_te2_(encoder|shared|final)_|text_encoders_t5|(^|_)t5(xxl)?_|text_encoder_[23]_",
        "the T5 part is ignored",
    ),
    (r"(^|_)(text_projection|logit_scale)(_|$)", "FLUX.1 does not use CLIP's projection"),
    (r"bundle_emb_|emb_params", "embeddings (textual inversions) are ignored"),
    (r"guidance_(in|embedder)_", "this FLUX has no guidance embedder"),
)
# Words by which other things are known, the telling ones first. Matched like the above, but only where a name fits
# neither FLUX nor CLIP nor what is ignored.
OTHERS = (
    (r"^(first_stage_model_|vae_)?(encoder|decoder)_(conv|down|up|mid)|^first_stage_model_|^quant_conv", "a VAE"),
    (r"^clip_[lg]$|^string_to_param|^text_encoders_[01]$|^emb_params$", "an embedding"),
    (r"distilled_guidance_layer", "made for Chroma"),
    (r"(double|single)_stream_modulation|to_qkv_mlp_proj", "made for FLUX.2"),
    (r"transformer_blocks_\d+_(img|txt)_(mlp|mod)_", "made for Qwen-Image"),
    (
        r"individual_token_refiner|_(img|txt)_mlp_fc[12]|_mod_linear|single_blocks_\d+_modulation_linear",
        "made for HunyuanVideo",
    ),
    (r"(double|single)_stream_blocks_", "made for HiDream"),
    (r"joint_transformer_blocks_", "made for AuraFlow"),
    (
        r"joint_blocks_|transformer_blocks_\d+_attn2_|transformer_blocks_\d+_norm1_context_linear2",
        "made for Stable Diffusion 3",
    ),
    (r"(^|_)blocks_\d+_(self_attn|cross_attn|ffn)_", "made for Wan"),
    (r"(noise|context)_refiner_|(^|_)layers_\d+_(attention|feed_forward)_", "made for Lumina or Z-Image"),
    (
        r"attentions_\d+_transformer_blocks_[1-9]|(input|output|middle)_blocks?(_\d+)?_1_transformer_blocks_[1-9]"
        r"|lora_te2_text_model_",
        "made for SDXL",
    ),
    (r"(down|up|input|output)_blocks_\d+_|mid_block_|middle_block_", "made for Stable Diffusion 1.5, 2 or XL"),
    (r"transformer_blocks_\d+_attn[12]_", "made for LTX-Video, PixArt or Sana"),
    (r"^(base_model_model_)?model_layers_\d+_", "made for a language model"),
)
# A name within these is a layer of a FLUX or a CLIP; one that we lack tells of another architecture.
BLOCK = re.compile(
    r"(?:^|_)(double_blocks|single_blocks|single_transformer_blocks|transformer_blocks|encoder_layers)_(\d+)_"
)


@dataclass(frozen=True)
class Part:
    """Where some rows of a layer as a file has it belong."""

    name: str  # the module's, such as transformer_blocks.0.attn.to_q
    start: int  # the first of the parameter's rows
    source: int  # the first of the file's rows
    height: int


@dataclass(frozen=True)
class Layer:
    """A layer as files name it: one of ours, or several in one."""

    model: str  # "transformer" or "text_encoder"
    shape: tuple[int, ...]  # of the weight: [out, in], or [size] for a norm
    parts: tuple[Part, ...]
    biased: bool

    def __str__(self) -> str:
        """As errors name it."""
        return " + ".join(dict.fromkeys(part.name for part in self.parts))


@dataclass(frozen=True)
class Report:
    """What became of a file."""

    format: str  # the way of writing names, such as "kohya"
    kinds: tuple[str, ...]
    ranks: tuple[int, ...]
    applied: int
    total: int
    ignored: Mapping[str, int]  # tensors by reason

    def __str__(self) -> str:
        """One line."""
        ranks = f" of rank {_span(self.ranks)}" if self.ranks else ""
        ignored = "".join(f"; {reason} ({count})" for reason, count in self.ignored.items())
        kinds = " + ".join(self.kinds)
        return f"{self.format} {kinds}{ranks}, applied {self.applied} of {self.total} tensors{ignored}."

    def metric(self) -> dict[str, object]:
        """The same for a machine."""
        return {
            "format": self.format,
            "kinds": list(self.kinds),
            "ranks": list(self.ranks),
            "applied": self.applied,
            "tensors": self.total,
            "ignored": dict(self.ignored),
        }


@dataclass(frozen=True)
class Lora:
    """The deltas of a file."""

    transformer: Mapping[str, tuple[Delta, ...]]  # by parameter name
    text_encoder: Mapping[str, tuple[Delta, ...]]  # CLIP's
    report: Report

    @property
    def nbytes(self) -> int:
        """Host memory that it holds."""
        return deltas.nbytes(d for model in (self.transformer, self.text_encoder) for ds in model.values() for d in ds)


def read_lora(file: Path, transformer: nn.Module, text_encoder: nn.Module) -> Lora:
    """Read a LoRA.

    Args:
        file: safetensors, by anyone.
        transformer: a FluxTransformer2DModel of any dimensions; only its names and shapes are looked at.
        text_encoder: a CLIPTextModel, likewise.

    Raises:
        ValueError: one sentence, if anything in it cannot be applied exactly or nothing at all can.
    """
    table = _layers_by_name(transformer, text_encoder)
    try:
        with safe_open(file, framework="pt") as tensors:
            names = sorted(tensors.keys())
            found, ignored = _assign(names, table)
            _refuse_what_is_no_lora(found, ignored, names)
            adapters = _adapters(tensors.metadata() or {})
            result: dict[str, dict[str, tuple[Delta, ...]]] = {"transformer": {}, "text_encoder": {}}
            claims: dict[str, Layer] = {}
            kinds: Counter[str] = Counter()
            ranks: set[int] = set()
            for layer, content in found.items():
                for part in layer.parts:
                    if claims.setdefault(part.name, layer) is not layer:
                        raise ValueError(
                            f"The LoRA changes {part.name} twice, by itself and as a part of a fused layer; "
                            "which one counts cannot be told."
                        )
                reader = _LayerReader(layer, content, tensors.get_tensor, adapters.get(layer.model, Adapter()))
                for parameter, delta in reader.deltas():
                    by_name = result[layer.model]
                    by_name[parameter] = (*by_name.get(parameter, ()), delta)
                kinds.update(reader.kinds)
                ranks |= reader.ranks
    except (SafetensorError, OSError) as error:
        reason = f" ({error})" if isinstance(error, SafetensorError) else ""
        raise ValueError(f"The LoRA is not a safetensors file that can be read{reason}.") from error
    report = Report(
        format=Counter(content.format for content in found.values()).most_common(1)[0][0],
        kinds=tuple(kind for kind, _ in kinds.most_common()),
        ranks=tuple(sorted(ranks)),
        applied=sum(len(content.tensors) for content in found.values()),
        total=len(names),
        ignored=dict(ignored),
    )
    return Lora(result["transformer"], result["text_encoder"], report)


# ---------------------------------------------------------------------------------------------------------------------
# Names


def _layers_by_name(transformer: nn.Module, text_encoder: nn.Module) -> dict[str, Layer]:
    """Every layer by every spelling, without prefix, with dots as underscores."""
    own = _own_layers("transformer", transformer)
    spelled = dict(own)
    for ours, theirs, aliases in (
        ("transformer_blocks", "double_blocks", DOUBLE_BLOCK),
        ("single_transformer_blocks", "single_blocks", SINGLE_BLOCK),
        ("transformer_blocks", "blocks", DIFFSYNTH_BLOCK),
        ("transformer_blocks", "transformer_blocks", FUSED),
        ("single_transformer_blocks", "single_transformer_blocks", FUSED),
    ):
        for index in range(len(getattr(transformer, ours))):
            for alias, names in aliases.items():
                parts = [own.get(f"{ours}.{index}.{name}") for name in names]
                if None in parts:
                    continue
                spelled[f"{theirs}.{index}.{alias}"] = _fuse(parts)
                if len(parts) > 1:  # OneTrainer numbers the parts of a fused layer
                    spelled |= {f"{theirs}.{index}.{alias}.{number}": part for number, part in enumerate(parts)}
    spelled |= {alias: own[name] for alias, name in OUTSIDE_BLOCKS.items() if name in own}
    spelled["final_layer.adaLN_modulation.1"] = _swap_halves(own["norm_out.linear"])
    for name, layer in _own_layers("text_encoder", text_encoder).items():
        short = name.removeprefix("text_model.")
        for spelling in (short, f"text_model.{short}"):
            spelled[spelling] = layer
            head, _, last = spelling.rpartition(".")
            if last in CLIP:
                spelled[f"{head}.{CLIP[last]}"] = layer
    return {name.replace(".", "_"): layer for name, layer in spelled.items()}


def _own_layers(model: str, module: nn.Module) -> dict[str, Layer]:
    return {
        name: Layer(
            model,
            tuple(child.weight.shape),
            (Part(name, 0, 0, len(child.weight)),),
            _parameter(child, "bias") is not None,
        )
        for name, child in module.named_modules()
        if _parameter(child, "weight") is not None
    }


def _parameter(module: nn.Module, name: str) -> nn.Parameter | None:
    return module._parameters.get(name)


def _fuse(layers: list[Layer]) -> Layer:
    """One layer whose rows are those of several."""
    parts, source = [], 0
    for layer in layers:
        parts += [replace(part, source=source + part.source) for part in layer.parts]
        source += layer.shape[0]
    return replace(layers[0], shape=(source, *layers[0].shape[1:]), parts=tuple(parts))


def _swap_halves(layer: Layer) -> Layer:
    """Black Forest Labs' final modulation gives shift and scale, diffusers' scale and shift."""
    [part] = layer.parts
    half = part.height // 2
    return replace(layer, parts=(Part(part.name, half, 0, half), Part(part.name, 0, half, half)))


def _find(table: Mapping[str, Layer], name: str) -> tuple[Layer, str] | None:
    """The layer of that name, prefixed in whatever way, and the way of writing it."""
    key = NOISE.sub("", name).replace(".", "_").rstrip("_")  # some trainers leave a _ at the end of names
    formats = []
    while key not in table:
        prefix = next((prefix for prefix in PREFIXES if key.startswith(f"{prefix}_")), None)
        if prefix is None:
            return None
        formats.append(PREFIXES[prefix])
        key = key[len(prefix) + 1 :]
    if re.match(r"(double|single)_blocks_\d+_(qkv|proj)(_lora\d)?$", key):
        return table[key], "XLabs"
    spelling = (
        "BFL" if re.match(r"double_|single_blocks|(img|txt|time|vector|guidance)_in|final_layer", key) else "diffusers"
    )
    return table[key], formats[0] if formats else spelling


@dataclass
class Content:
    """What a file has for a layer."""

    format: str
    stem: str  # the layer's name in the file
    tensors: dict[str, str] = field(default_factory=dict)  # tensor names by role


def _assign(names: Iterable[str], table: Mapping[str, Layer]) -> tuple[dict[Layer, Content], Counter[str]]:
    """Give each tensor its layer and its role, or the reason why it is ignored."""
    found: dict[Layer, Content] = {}
    ignored: Counter[str] = Counter()
    unknown = []
    for name in names:
        match = TENSOR.fullmatch(name)
        layer_and_format = match and _find(table, match["stem"])
        if not layer_and_format:
            unknown.append(name)
            continue
        layer, written = layer_and_format
        content = found.setdefault(layer, Content(written, match["stem"]))
        other = content.tensors.setdefault(match.lastgroup, name)
        if other != name:
            raise ValueError(
                f"The LoRA changes {layer} twice, as {other} and as {name}; which one counts cannot be told."
            )
    for name in unknown:
        ignored[_reason_to_ignore(name, table)] += 1
    return found, ignored


def _reason_to_ignore(name: str, table: Mapping[str, Layer]) -> str:
    key = name.replace(".", "_")
    for pattern, reason in IGNORED:
        if re.search(pattern, key):
            return reason
    for pattern, what in OTHERS:
        if re.search(pattern, key):
            raise ValueError(f"The file is {what}; it must be a LoRA for FLUX.1 (it has {_short(name)}).")
    for dot in re.finditer(r"\.", name):
        if layer := _find(table, name[: dot.start()]):
            raise ValueError(
                f"The LoRA has {_short(name)}, a kind of change to {layer[0]} that cannot be applied here."
            )
    if block := BLOCK.search(key):
        counts = Counter(m[1] for spelling in table if (m := re.match(rf"({block[1]}_\d+)_", spelling)))
        raise ValueError(
            f"The LoRA has {_short(name)}, a layer that this FLUX lacks: of {block[1]} it has {len(counts)}, "
            "counted from 0."
        )
    return "no layer of FLUX.1 has such a name"


def _refuse_what_is_no_lora(found: Mapping[Layer, Content], ignored: Iterable[str], names: list[str]) -> None:
    if not names:
        raise ValueError("The file holds no tensors; it must be a LoRA for FLUX.1.")
    if not found:
        raise ValueError(
            f"The file has nothing for FLUX.1 in it, only the like of {_short(names[0])} ({'; '.join(ignored)})."
        )
    if all(role in ("value", "value_b") for content in found.values() for role in content.tensors):
        raise ValueError("The file holds whole weights, a checkpoint; it must be a LoRA, which holds changes.")


# ---------------------------------------------------------------------------------------------------------------------
# Strengths that stand in the file's header


@dataclass(frozen=True)
class Adapter:
    """What PEFT calls an adapter's config, as diffusers writes it into the header."""

    alpha: float | None = None
    rank: float | None = None
    alphas: Mapping[str, float] = field(default_factory=dict)  # by layer name, or the end of one
    ranks: Mapping[str, float] = field(default_factory=dict)
    rank_stabilized: bool = False

    def strength(self, stem: str, rank: int | None, alpha: float | None) -> float:
        """What the product of a layer's factors is multiplied by.

        Args:
            stem: the layer's name in the file.
            rank: of its factors; None where they have none.
            alpha: the layer's own; wins over the header's.
        """
        if alpha is None:
            alpha = _by_ending(self.alphas, stem, self.alpha)
            rank = rank or _by_ending(self.ranks, stem, self.rank)
        if alpha is None or rank is None:
            return 1.0
        return alpha / (math.sqrt(rank) if self.rank_stabilized else rank)


def _adapters(metadata: Mapping[str, str]) -> dict[str, Adapter]:
    """By model, what the header says."""
    if "lora_adapter_metadata" not in metadata:
        return {}
    try:
        values = json.loads(metadata["lora_adapter_metadata"])
        found = {
            "transformer": {
                k.removeprefix("transformer."): v for k, v in values.items() if not k.startswith("text_encoder")
            },
            "text_encoder": {
                k.removeprefix("text_encoder."): v for k, v in values.items() if k.startswith("text_encoder.")
            },
        }
        return {model: _adapter(config) for model, config in found.items()}
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError):
        raise ValueError("The LoRA's header has a lora_adapter_metadata that makes no sense.") from None


def _adapter(config: Mapping[str, object]) -> Adapter:
    alpha, rank = config.get("lora_alpha", config.get("alpha")), config.get("r")
    return Adapter(
        None if alpha is None else _number(alpha),
        None if rank is None else _positive(rank),
        {name: _number(value) for name, value in (config.get("alpha_pattern") or {}).items()},
        {name: _positive(value) for name, value in (config.get("rank_pattern") or {}).items()},
        bool(config.get("use_rslora")),
    )


def _number(value: object) -> float:
    if not math.isfinite(float(value)):
        raise ValueError(value)
    return float(value)


def _positive(value: object) -> float:
    if _number(value) <= 0:
        raise ValueError(value)
    return float(value)


def _by_ending(values: Mapping[str, float], stem: str, otherwise: float | None) -> float | None:
    """PEFT's rule, for names: the first key that the layer's name ends with."""
    for key, value in values.items():
        if f".{stem}".endswith(f".{key.removeprefix('^')}"):
            return value
    return otherwise


# ---------------------------------------------------------------------------------------------------------------------
# Tensors


class _LayerReader:
    """Makes deltas of what a file has for one layer."""

    def __init__(self, layer: Layer, content: Content, get: Callable[[str], Tensor], adapter: Adapter) -> None:
        self.kinds: set[str] = set()
        self.ranks: set[int] = set()
        self._used: set[str] = set()
        self._layer, self._content, self._get, self._adapter = layer, content, get, adapter

    def deltas(self) -> Iterator[tuple[str, Delta]]:
        """Deltas with the names of their parameters.

        Raises:
            ValueError: a sentence about a tensor that does not fit or is no number.
        """
        roles = self._content.tensors.keys()
        products = [
            build
            for build, own in (
                (self._lora, {"up", "down", "mid"}),
                (self._loha, {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"}),
                (self._lokr, {f"lokr_{side}" for side in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")}),
            )
            if roles & own
        ]
        if len(products) > 1 or {"value", "diff"} <= roles or {"value_b", "diff_b"} <= roles:
            raise ValueError(f"The LoRA changes {self._layer} in two ways at once: {', '.join(sorted(roles))}.")
        if not products and "magnitude" in roles:
            raise self._incomplete("magnitude")
        if roles == {"alpha"}:
            raise self._incomplete("alpha")
        for build in products:
            parts = [(f"{part.name}.weight", delta) for part, delta in zip(self._layer.parts, build(), strict=True)]
            yield from self._decomposed(parts) if "magnitude" in roles else parts
        for role, kind, delta in (
            ("diff", "differences", Full),
            ("value", "values", Replacement),
            ("diff_b", "differences", Full),
            ("value_b", "values", Replacement),
            ("up_bias", None, self._up_bias),
        ):
            if role in roles:
                yield from self._whole(role, delta)
                self.kinds |= {kind} - {None}
        # An alpha means nothing beside whole tensors, and trainers write it all the same.
        if unused := roles - self._used - {"alpha"}:
            names = ", ".join(self._name(role) for role in sorted(unused))
            raise ValueError(f"The LoRA has {names}, which says nothing beside the rest that it has for {self._layer}.")

    def _lora(self) -> list[Delta]:
        up, down = self._matrix("up"), self._matrix("down")
        down = self._tucker("mid", down)
        self._check_fit(up.shape[1] == down.shape[0], (up.shape[0], down.shape[1]), "up", "down")
        self.kinds.add("DoRA" if "magnitude" in self._content.tensors else "LoRA")
        strength, down = self._strength(down.shape[0]), _own(down)
        return [LowRank(part.start, part.height, _own(_rows(up, part)), down, strength) for part in self._layer.parts]

    def _loha(self) -> list[Delta]:
        (a, b), (c, d) = self._pair("hada_w1", "hada_t1"), self._pair("hada_w2", "hada_t2")
        fits = a.shape[1] == b.shape[0] and c.shape[1] == d.shape[0] and (len(a), b.shape[1]) == (len(c), d.shape[1])
        self._check_fit(fits, (a.shape[0], b.shape[1]), "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
        self.kinds.add("LoHa")
        strength, b, d = self._strength(b.shape[0]), _own(b), _own(d)
        return [
            Hadamard(part.start, part.height, _own(_rows(a, part)), b, _own(_rows(c, part)), d, strength)
            for part in self._layer.parts
        ]

    def _lokr(self) -> list[Delta]:
        sides, shapes, ranks = [], [], []
        for side, core in (("lokr_w1", "lokr_t1"), ("lokr_w2", "lokr_t2")):
            if side in self._content.tensors:
                factors = (self._matrix(side),)
            else:
                factors = self._pair(side, core)
                ranks.append(factors[1].shape[0])
                self._check_fit(factors[0].shape[1] == ranks[-1], self._layer.shape, f"{side}_a", f"{side}_b")
            sides.append(tuple(_own(factor) for factor in factors))
            shapes.append((factors[0].shape[0], factors[-1].shape[1]))
        (o1, i1), (o2, i2) = shapes
        present = [role for role in self._content.tensors if role.startswith("lokr_")]
        self._check_fit(True, (o1 * o2, i1 * i2), *present)
        self.kinds.add("LoKr")
        # Where both sides are whole, the alpha of the file means nothing: LyCORIS writes it and does not use it.
        strength = self._strength(ranks[-1]) if ranks else self._adapter.strength(self._content.stem, None, None)
        return [Kronecker(part.start, part.height, *sides, part.source, strength) for part in self._layer.parts]

    def _decomposed(self, parts: list[tuple[str, Delta]]) -> Iterator[tuple[str, Delta]]:
        magnitude = self._read("magnitude")
        out, columns = self._layer.shape
        if magnitude.ndim > 1 and magnitude.flatten(1).shape == (1, columns):
            magnitude = _own(magnitude.flatten(1))
            for name, delta in parts:
                yield name, Decomposed(delta.start, delta.height, delta, magnitude, tuple(parts))
        else:
            self._check_fit(magnitude.numel() == len(magnitude), (len(magnitude), columns), "magnitude")
            magnitude = magnitude.reshape(out, 1)
            for part, (name, delta) in zip(self._layer.parts, parts, strict=True):
                yield name, Decomposed(delta.start, delta.height, delta, _own(_rows(magnitude, part)))

    def _whole(self, role: str, make: Callable[..., Delta]) -> Iterator[tuple[str, Delta]]:
        """A tensor of the weight's or the bias's own shape."""
        bias = role in ("diff_b", "value_b", "up_bias")
        if bias and not self._layer.biased:
            raise ValueError(f"The LoRA has {self._name(role)}, but {self._layer} has no bias.")
        tensor = self._read(role)
        if not bias and tensor.ndim > 2:
            tensor = self._matrix(role)
        expected = self._layer.shape[:1] if bias else self._layer.shape
        if tuple(tensor.shape) != expected:
            raise self._misfit(expected, role)
        for part in self._layer.parts:
            yield (
                f"{part.name}.{'bias' if bias else 'weight'}",
                make(part.start, part.height, _own(_rows(tensor, part))),
            )

    def _up_bias(self, start: int, height: int, bias: Tensor) -> Delta:
        return Full(start, height, bias, self._strength(self._matrix("down").shape[0]))

    def _pair(self, side: str, core: str) -> tuple[Tensor, Tensor]:
        """[out, rank] and [rank, in]; with a core, LyCORIS stores the first transposed."""
        a, b = self._matrix(f"{side}_a"), self._matrix(f"{side}_b")
        return (a.T, self._tucker(core, b)) if core in self._content.tensors else (a, b)

    def _tucker(self, core: str, down: Tensor) -> Tensor:
        """Multiply a core [rank, rank] into the factor behind it."""
        if core not in self._content.tensors:
            return down
        matrix = self._matrix(core)
        self._check_fit(matrix.shape[1] == down.shape[0], self._layer.shape, core)
        return matrix.float() @ down.float()

    def _strength(self, rank: int) -> float:
        if rank == 0:
            raise ValueError(f"The LoRA's factors for {self._layer} have rank 0.")
        self.ranks.add(rank)
        alpha = None
        if "alpha" in self._content.tensors:
            tensor = self._read("alpha")
            if tensor.numel() != 1:
                raise ValueError(f"{self._name('alpha')} is {_size(tensor.shape)}; it must be one number.")
            alpha = tensor.item()
        return self._adapter.strength(self._content.stem, rank, alpha)

    def _matrix(self, role: str) -> Tensor:
        """A matrix, which some tools store as the kernel of a 1x1 convolution."""
        tensor = self._read(role)
        if tensor.ndim < 2 or len(self._layer.shape) != 2:
            raise self._misfit(self._layer.shape, role)
        return tensor.flatten(1)

    def _read(self, role: str) -> Tensor:
        if role not in self._content.tensors:
            raise self._incomplete(role)
        self._used.add(role)
        name = self._content.tensors[role]
        tensor = self._get(name)
        if tensor.dtype not in FLOATS and not (role == "alpha" and tensor.dtype in INTEGERS):
            raise ValueError(
                f"{_short(name)} is stored as {str(tensor.dtype).removeprefix('torch.')}; it must be a float type."
            )
        if tensor.dtype in FLOATS and tensor.itemsize == 1:
            tensor = tensor.to(torch.bfloat16)  # exact: bfloat16 has more bits of each kind
        elif tensor.dtype == torch.float64:
            tensor = tensor.float()
        if not tensor.isfinite().all():
            raise ValueError(f"{_short(name)} has values that are not finite numbers; the file is damaged.")
        return tensor

    def _name(self, role: str) -> str:
        return _short(self._content.tensors[role])

    def _incomplete(self, role: str) -> ValueError:
        return ValueError(f"The LoRA is incomplete: {_short(self._content.stem)} lacks its counterpart of {role}.")

    def _check_fit(self, agree: bool, shape: tuple[int, ...], *roles: str) -> None:
        """Refuse factors that do not agree with each other, or whose product has another shape than the layer."""
        if not agree or tuple(shape) != self._layer.shape:
            raise self._misfit(self._layer.shape, *roles)

    def _misfit(self, expected: tuple[int, ...], *roles: str) -> ValueError:
        shapes = {role: tuple(self._get(self._content.tensors[role]).shape) for role in roles}
        columns = shapes.get("down", (0, 0))[1:]
        if any(part.name == "x_embedder" for part in self._layer.parts) and columns and columns[0] > expected[-1]:
            return ValueError(
                f"This is a control LoRA: it widens the image input from {expected[-1]} to {columns[0]} channels; "
                "a control LoRA needs a control image, which cannot be given here."
            )
        given = " and ".join(f"{self._name(role)} is {_size(shape)}" for role, shape in shapes.items())
        return ValueError(f"The LoRA does not fit: {given}, but {self._layer} is {_size(expected)}.")


def _rows(tensor: Tensor, part: Part) -> Tensor:
    return tensor[part.source : part.source + part.height]


def _own(tensor: Tensor) -> Tensor:
    """A copy of its own: results must not hang on how a file's bytes are aligned, nor memory on the file."""
    return (
        tensor.contiguous().pin_memory()
        if torch.cuda.is_available()
        else tensor.clone(memory_format=torch.contiguous_format)
    )


def _size(shape: Iterable[int]) -> str:
    return "x".join(map(str, shape)) or "a single number"


def _span(ranks: tuple[int, ...]) -> str:
    return str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"


def _short(name: str) -> str:
    return name if len(name) <= 120 else f"{name[:117]}..."


# ---------------------------------------------------------------------------------------------------------------------
# The cache


class LoraFile(Protocol):
    """What the cache needs to know of a file."""

    path: Path
    sha256: str  # of its content


class LoraCache:
    """Parsed LoRAs in host memory, by content; the least recently used go first.

    Args:
        transformer: see `read_lora`.
        text_encoder: see `read_lora`.
        max_bytes: what they may hold together; a larger one is read each time anew.
    """

    def __init__(self, transformer: nn.Module, text_encoder: nn.Module, max_bytes: int | None = None) -> None:
        self._models = (transformer, text_encoder)
        self._max_bytes = _quarter_of_memory() if max_bytes is None else max_bytes
        self._loras: OrderedDict[str, Lora] = OrderedDict()

    def read(self, file: LoraFile) -> Lora:
        """Parse a LoRA, or take it from the cache.

        Raises:
            ValueError: see `read_lora`.
        """
        lora = self._loras.get(file.sha256)
        if lora is None:
            lora = read_lora(file.path, *self._models)
            if lora.nbytes <= self._max_bytes:
                self._make_room(lora.nbytes)
                self._loras[file.sha256] = lora
        else:
            self._loras.move_to_end(file.sha256)
        return lora

    def _make_room(self, size: int) -> None:
        held = sum(lora.nbytes for lora in self._loras.values())
        while self._loras and held + size > self._max_bytes:
            held -= self._loras.popitem(last=False)[1].nbytes


def _quarter_of_memory() -> int:
    """Of the machine's or, where it has less, the container's; the rest is for base weights, page cache and server."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
        memory = min(memory, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return memory // 4
