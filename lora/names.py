"""Every spelling of every layer of FLUX.1 and its CLIP, and the layer and role of each name in a LoRA file.

There is one table, made from the models' own modules: layers by spelling, with the rows of each parameter where a
file's layer is several of ours. A name that fits no layer is ignored for a reason, or the file is refused in one
sentence. This module knows names and shapes; it reads no tensor.
"""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import product

from torch import nn

from service.device_thread import check_cancelled
from service.lines import printable

# The largest LoRA files have some 10,000 tensors, and names of 120 characters with a dozen dots.
MAX_TENSORS = 50_000
MAX_NAME = 256
MAX_DOTS = 32
# Within a block, other spellings of a layer → ours; of a fused layer all parts, in the order of its rows. In double and
# single blocks they are Black Forest Labs', but for XLabs' (qkv, proj, ..._lora), MLX's (...layers...) and, in single
# blocks alone, DiffSynth-Studio's (to_qkv_mlp, proj_out, norm.linear, norm_q_a, norm_k_a).
QKV = "attn.to_q attn.to_k attn.to_v"
ADDED_QKV = "attn.add_q_proj attn.add_k_proj attn.add_v_proj"
DOUBLE_BLOCK = {
    "img_attn.qkv qkv_lora1": QKV,
    "txt_attn.qkv qkv_lora2": ADDED_QKV,
    "img_attn.proj proj_lora1": "attn.to_out.0",
    "txt_attn.proj proj_lora2": "attn.to_add_out",
    "img_attn.norm.query_norm": "attn.norm_q",
    "img_attn.norm.key_norm": "attn.norm_k",
    "txt_attn.norm.query_norm": "attn.norm_added_q",
    "txt_attn.norm.key_norm": "attn.norm_added_k",
    "img_mlp.0 img_mlp.layers.0": "ff.net.0.proj",
    "img_mlp.2 img_mlp.layers.2": "ff.net.2",
    "txt_mlp.0 txt_mlp.layers.0": "ff_context.net.0.proj",
    "txt_mlp.2 txt_mlp.layers.2": "ff_context.net.2",
    "img_mod.lin": "norm1.linear",
    "txt_mod.lin": "norm1_context.linear",
}
SINGLE_BLOCK = {
    "linear1 to_qkv_mlp": f"{QKV} proj_mlp",
    "linear2 proj proj_lora proj_out": "proj_out",
    "qkv qkv_lora": QKV,
    "modulation.lin norm.linear": "norm.linear",
    "norm.query_norm norm_q_a": "attn.norm_q",
    "norm.key_norm norm_k_a": "attn.norm_k",
}
DIFFSYNTH_BLOCK = {
    "attn.a_to_qkv": QKV,
    "attn.b_to_qkv": ADDED_QKV,
    "attn.a_to_out": "attn.to_out.0",
    "attn.b_to_out": "attn.to_add_out",
    "ff_a.0": "ff.net.0.proj",
    "ff_a.2": "ff.net.2",
    "ff_b.0": "ff_context.net.0.proj",
    "ff_b.2": "ff_context.net.2",
    "norm1_a.linear": "norm1.linear",
    "norm1_b.linear": "norm1_context.linear",
    "attn.norm_q_a": "attn.norm_q",
    "attn.norm_k_a": "attn.norm_k",
    "attn.norm_q_b": "attn.norm_added_q",
    "attn.norm_k_b": "attn.norm_added_k",
}
DIFFUSERS_BLOCK = {
    # Layers of `fuse_qkv_projections`, in every block that has the parts.
    "attn.to_qkv": QKV,
    "attn.to_added_qkv": ADDED_QKV,
    # Older versions kept factors in attention processors: to_out_lora.
    "attn.to_out": "attn.to_out.0",
    # mflux
    "ff.linear1": "ff.net.0.proj",
    "ff.linear2": "ff.net.2",
    "ff_context.linear1": "ff_context.net.0.proj",
    "ff_context.linear2": "ff_context.net.2",
}
# The same outside blocks: Black Forest Labs' spellings, then DiffSynth-Studio's.
OUTSIDE_BLOCKS = {
    "img_in img_in.proj": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer time_embedder.timestep_embedder.0": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer time_embedder.timestep_embedder.2": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer pooled_text_embedder.0": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer pooled_text_embedder.2": "time_text_embed.text_embedder.linear_2",
    "guidance_in.in_layer guidance_embedder.timestep_embedder.0": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer guidance_embedder.timestep_embedder.2": "time_text_embed.guidance_embedder.linear_2",
    "final_layer.linear final_proj_out": "proj_out",
}
# Black Forest Labs, MLX and DiffSynth-Studio: shift and scale, where diffusers has scale and shift.
FINAL_MODULATION = ("final_layer.adaLN_modulation.1", "final_layer.adaLN_modulation.layers.1", "final_norm_out.linear")
# Blocks by our name, by theirs, and the spellings within.
BLOCKS = (
    ("transformer_blocks", "double_blocks", DOUBLE_BLOCK),
    ("single_transformer_blocks", "single_blocks", SINGLE_BLOCK),
    ("transformer_blocks", "blocks", DIFFSYNTH_BLOCK),
    ("transformer_blocks", "transformer_blocks", DIFFUSERS_BLOCK),
    ("single_transformer_blocks", "single_transformer_blocks", DIFFUSERS_BLOCK),
)
CLIP = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}

# Prefixes of layers' names by the format that writes them, with dots as underscores.
PREFIXES = {
    "PEFT": "base_model_model base_model model",
    "kohya": "lora_unet lora_te1 lora_te te1 te",
    "OneTrainer": "lora_transformer",
    "LyCORIS": "lycoris",
    "ComfyUI": "model_diffusion_model diffusion_model clip_l_transformer clip_l"
    " text_encoders_clip_l_transformer text_encoders_clip_l",
    "DiffSynth": "pipe_dit dit",
    "diffusers": "pipe transformer unet text_encoder_1 text_encoder",
}
FORMATS = {prefix: written for written, prefixes in PREFIXES.items() for prefix in prefixes.split()}
PREFIX = re.compile(f"({'|'.join(sorted(FORMATS, key=len, reverse=True))})_+")
# Prefixes of the names that PEFT's patterns are compared with.
OUTSIDE_PEFT = re.compile(r"((transformer|unet|diffusion_model|text_encoder)\.)?(base_model\.model\.)?")
# The adapter's name within a tensor's.
ADAPTER = re.compile(r"\.(?:lora_[ABab]|lora_up|lora_down|lora_magnitude_vector)\.([^.]+)\.")
# The format of a name without prefix, by its beginning.
OWN = (
    (r"(double|single)_blocks_\d+_(qkv|proj)(_lora\d?)?$", "XLabs"),
    (r"blocks_|single_blocks_\d+_(to_|proj_|norm_)|(time|pooled_text)_embedder|final_(proj|norm)_out", "DiffSynth"),
    (r"(double|single)_blocks|(img|txt|time|vector|guidance)_in|final_layer", "BFL"),
    (r"", "diffusers"),
)
# Words of wrappers anywhere within names: of torch.compile, FSDP, checkpointing, DDP, attention processors and PEFT.
WRAPPER = re.compile(
    r"(?:(?<![._])[._]+|^)(?:orig_mod|fsdp_wrapped_module|checkpoint_wrapped_module|module|processor|base_layer)(?=[._]|$)"
)

# Roles of the factors that LyCORIS names so.
LOKR = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
LOHA = ("hada_w1_a", "hada_w1_b", "hada_t1", "hada_w2_a", "hada_w2_b", "hada_t2")
# A layer's name and an end that tells a tensor's role for the layer, the name of its group. PEFT puts the adapter's
# name within.
TENSOR = re.compile(
    r"(?P<stem>.+?)(?:"
    r"(?P<up>\.(?:lora_[Bb]|lora_up)(?:\.[^.]+)?\.weight|\.lora_[Bb]"
    r"|(?:_lora|\.lora|\.lora_linear_layer)?\.up\.weight)|"
    r"(?P<down>\.(?:lora_[Aa]|lora_down)(?:\.[^.]+)?\.weight|\.lora_[Aa]"
    r"|(?:_lora|\.lora|\.lora_linear_layer)?\.down\.weight)|"
    r"(?P<up_bias>\.lora_B(?:\.[^.]+)?\.bias|\.lora_up\.bias)|"
    r"(?P<mid>\.lora_mid\.weight)|"
    r"(?P<alpha>(?:_lora|\.lora)?\.alpha)|"
    r"(?P<magnitude>\.dora_scale(?:\.weight)?|\.magnitude|\.lora_magnitude_vector(?:\.(?!weight$)[^.]+)?(?:\.weight)?)|"
    r"\.(?:(?:" + "|".join(f"(?P<{role}>{role})" for role in (*LOKR, *LOHA)) + r")(?:\.[^.]+)?|"
    r"(?P<diff>(?:scale\.)?diff|w_norm)|(?P<diff_b>diff_b|b_norm)|"
    r"(?P<value>(?:modules_to_save\.[^.]+\.)?weight|(?:scale\.)?set_weight|scale)|(?P<value_b>(?:modules_to_save\.[^.]+\.)?bias)"
    r"))"
)
# Names of no layer here, and why they may be ignored. Matched against names with dots as underscores.
IGNORED = (
    (r"(^|_)(te3|te2_(encoder|shared|final))_|text_encoders_t5|(^|_)[tT]5(xxl)?_", "the T5 part is ignored"),
    (r"text_encoder_([23]|two)_|(^|_)encoder_block_\d+_layer_\d+_", "the T5 part is ignored"),
    (r"(^|_)(text_projection|logit_scale)(_|$)", "FLUX.1 does not use CLIP's projection"),
    (r"bundle_emb_|emb_params", "embeddings (textual inversions) are ignored"),
    (r"(^|_)position_ids$", "positions are counted, not learned"),
)
NO_LAYER = "no layer of FLUX.1 has such a name"
NO_GUIDANCE = (r"guidance_(in|embedder)_", "this FLUX has no guidance embedder")
SVDQUANT = "packed for SVDQuant (Nunchaku), in an order that only its kernels read"
# Words in names that tell files of other kinds, the surest ones first. Matched like the above, where a name fits
# neither a layer nor those.
OTHERS = (
    (r"^(first_stage_model_|vae_)?(encoder|decoder)_(conv|down|up|mid)|^first_stage_model_|^quant_conv", "a VAE"),
    (r"^clip_[lg]$|^string_to_param|^text_encoders_[01]$", "an embedding"),
    (r"(^|_)(q|k|v|proj)_loras_\d+_", "made for EasyControl, which needs a condition image"),
    (r"ip_adapter|(^|_)(pulid|id_projection|image_proj)", "an adapter for reference images, such as an IP-Adapter"),
    (
        r"transformer_blocks_\d+_((qkv_proj|out_proj|mlp_(context_)?fc[12])|.*_lora_(down|up)$)|_(qweight|wscales)$",
        SVDQUANT,
    ),
    (r"_boft_[a-zA-Z]", "a BOFT, which turns weights and adds nothing to them"),
    (r"_oft_[a-zA-Z]", "an OFT, which turns weights and adds nothing to them"),
    (r"_[ab][12]_weight$|_bm_weight$|_glora_", "a GLoRA, which multiplies weights"),
    (r"_on_input$|_ia3_l(_|$)", "an IA3, which multiplies weights"),
    (r"distilled_guidance_layer", "made for Chroma"),
    (r"(double|single)_stream_modulation|to_qkv_mlp_proj|time_guidance_embed_", "made for FLUX.2"),
    (r"_ff(_context)?_linear_(in|out)_|single_transformer_blocks_\d+_attn_to_out_", "made for FLUX.2"),
    (r"transformer_blocks_\d+_(img|txt)_(mlp|mod)_", "made for Qwen-Image"),
    (r"individual_token_refiner|_(img|txt)_mlp_fc[12]|_mod_linear", "made for HunyuanVideo"),
    (r"single_blocks_\d+_modulation_linear", "made for HunyuanVideo"),
    (r"(double|single)_stream_blocks_", "made for HiDream"),
    (r"joint_transformer_blocks_", "made for AuraFlow"),
    (r"joint_blocks_|transformer_blocks_\d+_(attn2_|norm1_context_linear2)", "made for Stable Diffusion 3"),
    (r"(^|_)blocks_\d+_(self_attn|cross_attn|ffn)_", "made for Wan"),
    (r"(noise|context)_refiner_|(^|_)layers_\d+_(attention|feed_forward)_", "made for Lumina or Z-Image"),
    (r"attentions_\d+_transformer_blocks_[1-9]|lora_te2_text_model_", "made for SDXL"),
    (r"(input|output|middle)_blocks?(_\d+)?_1_transformer_blocks_[1-9]", "made for SDXL"),
    (r"(down|up|input|output)_blocks_\d+_|mid_block_|middle_block_", "made for Stable Diffusion 1.5, 2 or XL"),
    (r"transformer_blocks_\d+_attn[12]_", "made for LTX-Video, PixArt or Sana"),
    (r"^(base_model_model_)?model_layers_\d+_", "made for a language model"),
)
# Words in PEFT's and LyCORIS' names of tensors: a name with one of them is a change, and not ignored.
CHANGE = re.compile(
    r"(?<![a-z])(lo(ra|ha|kr)|(ada|d|g|gra|rand|tiny|uni|v|vb|x)lora|hada|lycoris|dora|adapter|delta|diff|b?oft|ia3|vera"
    r"|hi?ra|c3a|miss|bone|road|shira|waveft|fourierft|psoft|osf)(?![a-z])",
    re.IGNORECASE,
)
# Blocks of a FLUX or a CLIP, and the name of a layer from there on.
BLOCK = re.compile(
    r"(?:^|_)((?:double_|single_)?blocks|(?:single_)?transformer_blocks|(?:text_model_)?encoder_layers)_(\d+)(_.*)"
)


@dataclass(frozen=True)
class Part:
    """Rows of a parameter, and the same rows of a file's layer."""

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


@dataclass
class Content:
    """A file's tensors for a layer."""

    format: str  # that writes names so
    names: tuple[str, ...]  # the layer's, as PEFT may have known it: without wrappers, and with them
    tensors: dict[str, str] = field(default_factory=dict)  # tensor names by role


def layers_by_name(transformer: nn.Module, text_encoder: nn.Module) -> dict[str, Layer]:
    """Every layer by every spelling, without prefix, with dots as underscores."""
    own = _own_layers("transformer", transformer)
    spelled = dict(own)
    for ours, theirs, block in BLOCKS:
        for index, (spellings, names) in product(range(len(getattr(transformer, ours))), block.items()):
            parts = [own.get(f"{ours}.{index}.{name}") for name in names.split()]
            if None in parts:
                continue
            for spelling in spellings.split():
                spelled[f"{theirs}.{index}.{spelling}"] = _fuse(parts)
                if len(parts) > 1:  # OneTrainer numbers the parts of a fused layer
                    spelled |= {f"{theirs}.{index}.{spelling}.{number}": part for number, part in enumerate(parts)}
    for spellings, name in OUTSIDE_BLOCKS.items():
        if name in own:
            spelled |= dict.fromkeys(spellings.split(), own[name])
    spelled |= dict.fromkeys(FINAL_MODULATION, _swap_halves(own["norm_out.linear"]))
    for name, layer in _own_layers("text_encoder", text_encoder).items():
        bare = name.removeprefix("text_model.")
        for spelling in (bare, f"text_model.{bare}"):
            spelled[spelling] = layer
            head, _, last = spelling.rpartition(".")
            if last in CLIP:
                spelled[f"{head}.{CLIP[last]}"] = layer
    return {name.replace(".", "_"): layer for name, layer in spelled.items()}


def _own_layers(model: str, module: nn.Module) -> dict[str, Layer]:
    layers = {}
    for name, child in module.named_modules():
        if (weight := getattr(child, "weight", None)) is not None:
            biased = getattr(child, "bias", None) is not None
            layers[name] = Layer(model, tuple(weight.shape), (Part(name, 0, 0, len(weight)),), biased)
    return layers


def _fuse(layers: list[Layer]) -> Layer:
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
    """The layer of a name with any prefixes, and the format that writes it so."""
    key = name.replace(".", "_").rstrip("_")  # some trainers leave a _ at the end of names
    formats = []
    while key not in table:
        prefix = PREFIX.match(key)
        if prefix is None:
            return None
        formats.append(FORMATS[prefix[1]])
        key = key[prefix.end() :]
    formats += [written for pattern, written in OWN if re.match(pattern, key)]
    # XLabs' layers have names of their own, whatever stands before them.
    written = "XLabs" if "XLabs" in formats else formats[0]
    return table[key], written


def assign(names: Collection[str], table: Mapping[str, Layer]) -> tuple[dict[Layer, Content], Counter[str]]:
    """A file's tensors for each layer, and how many are ignored, by reason; a ValueError refuses a name or a file."""
    if len(names) > MAX_TENSORS:
        raise ValueError(f"The file has {len(names)} tensors; a LoRA has at most {MAX_TENSORS}.")
    found: dict[Layer, Content] = {}
    adapters: dict[Layer, str] = {}
    unknown = {}
    for name in names:
        check_cancelled()
        _check_length(name)
        plain = WRAPPER.sub("", name).lstrip("._")
        match = TENSOR.fullmatch(plain)
        layer_and_format = match and _find(table, match["stem"])
        if not layer_and_format:
            unknown[name] = plain
            continue
        layer, written = layer_and_format
        if (adapter := ADAPTER.search(plain)) and adapters.setdefault(layer, adapter[1]) != adapter[1]:
            raise ValueError(
                f"The LoRA changes {layer} by two adapters, {short(adapters[layer])} and {short(adapter[1])}; it must "
                "have one."
            )
        if layer not in found:
            stems = (match["stem"], name.removesuffix(plain[match.end("stem") :]))
            known = [stem[OUTSIDE_PEFT.match(stem).end() :].rstrip("._") for stem in stems]
            found[layer] = Content(written, tuple(dict.fromkeys(known)))
        content = found[layer]
        other = content.tensors.setdefault(match.lastgroup, name)
        if other != name:
            raise ValueError(
                f"The LoRA changes {layer} twice, as {short(other)} and as {short(name)}; which one counts cannot be "
                "told."
            )
    return found, _reasons_to_ignore(unknown, table)


def _key(plain: str) -> str:
    """The layer's name within a tensor's, or the whole of one without a role, with dots as underscores."""
    match = TENSOR.fullmatch(plain)
    return (match["stem"] if match else plain).replace(".", "_")


def _check_length(name: str) -> None:
    for count, what, most in ((len(name), "characters", MAX_NAME), (name.count("."), "dots", MAX_DOTS)):
        if count > most:
            raise ValueError(f"{short(name)} has {count} {what}; the name of a tensor has at most {most}.")


def _reasons_to_ignore(names: Mapping[str, str], table: Mapping[str, Layer]) -> Counter[str]:
    """How many names that fit no layer may be ignored, by reason; each is given with its form without wrappers."""
    listed = IGNORED if "guidance_in_in_layer" in table else (*IGNORED, NO_GUIDANCE)
    reasons: Counter[str] = Counter()
    strange = {}
    for name, plain in names.items():
        check_cancelled()
        key = _key(plain)
        reason = next((reason for pattern, reason in listed if re.search(pattern, key)), None)
        if reason is None or _changed_layer(plain, table) is not None:
            strange[name] = plain.replace(".", "_")
        else:
            reasons[reason] += 1
    for pattern, what in OTHERS:
        for name, key in strange.items():
            check_cancelled()
            if re.search(pattern, key):
                raise ValueError(f"The file is {what}; it must be a LoRA for FLUX.1 (it has {short(name)}).")
    for name in strange:
        check_cancelled()
        if what := _change(names[name], table):
            raise ValueError(f"The LoRA has {short(name)}, {what}.")
        reasons[NO_LAYER] += 1
    return reasons


def _changed_layer(name: str, table: Mapping[str, Layer]) -> Layer | None:
    """The layer whose name a tensor's name begins with."""
    ends = [*(dot.start() for dot in re.finditer(r"\.", name)), len(name)]
    return next((found[0] for end in ends if (found := _find(table, name[:end]))), None)


def _change(name: str, table: Mapping[str, Layer]) -> str | None:
    """The end of a sentence about a name's change that cannot be applied; None where it does not look like a change."""
    if layer := _changed_layer(name, table):
        return (
            f"a kind of change to {layer} that cannot be applied here; it must be a LoRA, DoRA, LoHa, LoKr or a full "
            "difference"
        )
    block = BLOCK.search(_key(name).rstrip("_"))
    if block and f"{block[1]}_0{block[3]}" in table:
        count = len({m[1] for spelling in table if (m := re.match(rf"{block[1]}_(\d+)_", spelling))})
        if int(block[2]) >= count:
            return f"a layer that this FLUX lacks: of {block[1]} it has {count}, counted from 0"
    if block or TENSOR.fullmatch(name) or CHANGE.search(name):
        return "and FLUX.1 has no layer of such a name; what it would change cannot be applied"
    return None


def refuse_what_is_no_lora(found: Mapping[Layer, Content], ignored: Iterable[str], names: list[str]) -> None:
    """Refuse a file that has no tensors, none for FLUX.1, or whole weights alone."""
    if not names:
        raise ValueError("The file holds no tensors; it must be a LoRA for FLUX.1.")
    if not found:
        reasons = f" ({'; '.join(ignored)})" if ignored else ""
        raise ValueError(f"The file has nothing for FLUX.1 in it, only the like of {short(names[0])}{reasons}.")
    if all(role in ("value", "value_b") for content in found.values() for role in content.tensors):
        raise ValueError("The file holds whole weights, a checkpoint; it must be a LoRA, which holds changes.")


def claim(layer: Layer, claimed: dict[str, Layer]) -> None:
    """Record the layer that changes each parameter; refuse a file in which two layers change one."""
    for part in layer.parts:
        if claimed.setdefault(part.name, layer) is not layer:
            raise ValueError(
                f"The LoRA changes {part.name} twice, by itself and as a part of a fused layer; "
                "which one counts cannot be told."
            )


def short(name: str) -> str:
    """A name as errors show it: at most 120 characters, in one line."""
    name = printable(name)
    return name if len(name) <= 120 else f"{name[:117]}..."
