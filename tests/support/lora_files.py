"""A known set of changes, written as a LoRA file in each format of trainers.

The names are spelled out again here, so that the loader's table is tested against another one.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import save, save_file
from torch import Tensor
from transformers import CLIPTextModel

from settings import ROOT

RANK = 4
ALPHA = 2.0  # a power of two below the rank: folding it into a factor costs no rounding
Tensors = dict[str, Tensor]

DOUBLE = {
    "img_mod.lin": ["norm1.linear"],
    "txt_mod.lin": ["norm1_context.linear"],
    "img_attn.qkv": ["attn.to_q", "attn.to_k", "attn.to_v"],
    "txt_attn.qkv": ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"],
    "img_attn.proj": ["attn.to_out.0"],
    "txt_attn.proj": ["attn.to_add_out"],
    "img_mlp.0": ["ff.net.0.proj"],
    "img_mlp.2": ["ff.net.2"],
    "txt_mlp.0": ["ff_context.net.0.proj"],
    "txt_mlp.2": ["ff_context.net.2"],
}
SINGLE = {
    "linear1": ["attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"],
    "linear2": ["proj_out"],
    "modulation.lin": ["norm.linear"],
}
EMBEDDERS = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
}
XLABS = {
    "img_attn.qkv": "processor.qkv_lora1",
    "txt_attn.qkv": "processor.qkv_lora2",
    "img_attn.proj": "processor.proj_lora1",
    "txt_attn.proj": "processor.proj_lora2",
    "linear2": "processor.proj_lora",
}


@dataclass(frozen=True)
class Change:
    """strength * up @ down on a layer as Black Forest Labs names it, with diffusers' names of its rows."""

    bfl: str
    parts: tuple[str, ...]
    sizes: tuple[int, ...]  # rows of each part
    up: Tensor  # [out, rank]
    down: Tensor  # [rank, in]

    @property
    def by_part(self) -> dict[str, Tensor]:
        """Each part's rows of `up`, by diffusers' name."""
        up = self.up
        if self.bfl.endswith("adaLN_modulation.1"):  # shift, scale there; scale, shift in diffusers
            up = torch.cat(up.chunk(2)[::-1])
        return dict(zip(self.parts, up.split(self.sizes), strict=True))


def bfl_layers(transformer: FluxTransformer2DModel) -> dict[str, tuple[str, ...]]:
    """Diffusers' names of the parts of every layer."""
    layers = {}
    for theirs, ours, table in (
        ("double_blocks", "transformer_blocks", DOUBLE),
        ("single_blocks", "single_transformer_blocks", SINGLE),
    ):
        for index in range(len(getattr(transformer, ours))):
            layers |= {
                f"{theirs}.{index}.{name}": tuple(f"{ours}.{index}.{part}" for part in parts)
                for name, parts in table.items()
            }
    layers |= {name: (part,) for name, part in EMBEDDERS.items()}
    weights = dict(transformer.named_modules())
    return {name: parts for name, parts in layers.items() if all(part in weights for part in parts)}


def changes(
    transformer: FluxTransformer2DModel,
    *,
    only: Callable[[str], bool] = lambda bfl: True,
    seed: int = 0,
    coarse: bool = False,
    rank: int = RANK,
) -> list[Change]:
    """A change of every layer whose BFL name `only` accepts.

    Args:
        transformer: gives names and shapes.
        only: accepts or rejects a BFL name.
        seed: of the numbers.
        coarse: numbers that float8_e5m2 holds exactly.
        rank: of each change.
    """
    generator = torch.Generator().manual_seed(seed)

    def numbers(*shape: int) -> Tensor:
        if coarse:
            return torch.randint(-7, 8, shape, generator=generator) / 16
        return torch.randn(shape, generator=generator) * 0.3

    modules = dict(transformer.named_modules())
    made = []
    for bfl, parts in bfl_layers(transformer).items():
        if only(bfl):
            sizes = tuple(modules[part].out_features for part in parts)
            inputs = modules[parts[0]].in_features
            made.append(Change(bfl, parts, sizes, numbers(sum(sizes), rank), numbers(rank, inputs)))
    return made


# DiffSynth-Studio's names of layers outside of blocks, and MLX's parts of names, by Black Forest Labs' names.
DIFFSYNTH_OUTSIDE = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_embedder.timestep_embedder.0",
    "time_in.out_layer": "time_embedder.timestep_embedder.2",
    "vector_in.in_layer": "pooled_text_embedder.0",
    "vector_in.out_layer": "pooled_text_embedder.2",
    "guidance_in.in_layer": "guidance_embedder.timestep_embedder.0",
    "guidance_in.out_layer": "guidance_embedder.timestep_embedder.2",
    "final_layer.linear": "final_proj_out",
    "final_layer.adaLN_modulation.1": "final_norm_out.linear",
}
MLX = {"img_mlp.": "img_mlp.layers.", "txt_mlp.": "txt_mlp.layers.", "adaLN_modulation.": "adaLN_modulation.layers."}


@dataclass(frozen=True)
class Spelling:
    """A trainer's name of a layer, whose rows are those of some of diffusers' layers, one under the other."""

    name: str
    parts: tuple[str, ...]
    swapped: bool = False  # shift above scale, where diffusers has scale above shift

    def stack(self, parameters: Tensors, kind: str = "weight") -> Tensor:
        """The layer's weight or bias as the trainer has it, in float64."""
        rows = torch.cat([parameters[f"{part}.{kind}"].double() for part in self.parts])
        return torch.cat(rows.chunk(2)[::-1]) if self.swapped else rows

    def split(self, rows: Tensor, parameters: Tensors, kind: str = "weight") -> Tensors:
        """Such a weight or bias by diffusers' names of parameters."""
        rows = torch.cat(rows.chunk(2)[::-1]) if self.swapped else rows
        names = [f"{part}.{kind}" for part in self.parts]
        return dict(zip(names, rows.split([len(parameters[name]) for name in names]), strict=True))


def _bfl_spellings(transformer: FluxTransformer2DModel, rename: Callable[[str], str] = str) -> list[Spelling]:
    return [
        Spelling(rename(bfl), parts, bfl.endswith("adaLN_modulation.1"))
        for bfl, parts in bfl_layers(transformer).items()
    ]


def _diffusers_spellings(transformer: FluxTransformer2DModel) -> list[Spelling]:
    return [Spelling(part, (part,)) for parts in bfl_layers(transformer).values() for part in parts]


def _fused_spellings(transformer: FluxTransformer2DModel) -> list[Spelling]:
    """Layers as after diffusers' `fuse_qkv_projections`."""
    spellings = []
    for parts in bfl_layers(transformer).values():
        if len(parts) == 1:
            spellings.append(Spelling(parts[0], parts))
            continue
        stem, _, first = parts[0].rpartition(".")
        spellings.append(Spelling(f"{stem}.{'to_qkv' if first == 'to_q' else 'to_added_qkv'}", parts[:3]))
        spellings += [Spelling(part, (part,)) for part in parts[3:]]
    return spellings


def _omi_spellings(transformer: FluxTransformer2DModel) -> list[Spelling]:
    """Black Forest Labs' names, the parts of fused layers apart and numbered."""
    spellings = []
    for whole in _bfl_spellings(transformer, lambda bfl: bfl.replace("img_in", "img_in.proj")):
        if len(whole.parts) == 1:
            spellings.append(whole)
        else:
            spellings += [Spelling(f"{whole.name}.{number}", (part,)) for number, part in enumerate(whole.parts)]
    return spellings


def _xlabs_spellings(transformer: FluxTransformer2DModel) -> list[Spelling]:
    spellings = [Spelling(xlabs_name(bfl), parts) for bfl, parts in bfl_layers(transformer).items() if is_xlabs(bfl)]
    for bfl, parts in bfl_layers(transformer).items():
        if bfl.endswith("linear1"):
            spellings.append(Spelling(bfl.replace("linear1", "processor.qkv_lora"), parts[:3]))
    return spellings


def _mlx_name(bfl: str) -> str:
    for theirs, ours in MLX.items():
        bfl = bfl.replace(theirs, ours)
    return bfl


def clip_spellings(text_encoder: CLIPTextModel, before: str = "text_model.") -> list[Spelling]:
    """CLIP's linear layers; its newer versions have no text_model."""
    return [
        Spelling(before + name.removeprefix("text_model."), (name,))
        for name, module in text_encoder.named_modules()
        if isinstance(module, torch.nn.Linear)
    ]


SPELLINGS: dict[str, Callable[[FluxTransformer2DModel], list[Spelling]]] = {
    "BFL": _bfl_spellings,
    "diffusers": _diffusers_spellings,
    "diffusers, fused": _fused_spellings,
    "OMI": _omi_spellings,
    "XLabs": _xlabs_spellings,
    "DiffSynth": lambda transformer: _bfl_spellings(transformer, diffsynth_name),
    "MLX": lambda transformer: _bfl_spellings(transformer, _mlx_name),
}


def is_block(bfl: str) -> bool:
    return "_blocks." in bfl


def is_xlabs(bfl: str) -> bool:
    return is_block(bfl) and bfl.split(".", 2)[2] in XLABS


# Each format's function takes changes and returns a file's tensors. Without alpha, it is folded into `up`, exactly.


def _folded(up: Tensor) -> Tensor:
    return up * (ALPHA / RANK)


def _diffusers(made: list[Change], name: str, down: str, up: str, alpha: str | None = None) -> Tensors:
    """Tensors by diffusers' names of layers, which replace {} in `name`."""
    tensors = {}
    for change in made:
        for part, rows in change.by_part.items():
            stem = name.format(part)
            tensors[stem + down] = change.down.clone()
            tensors[stem + up] = rows.clone() if alpha else _folded(rows)
            if alpha:
                tensors[stem + alpha] = torch.tensor(ALPHA)
    return tensors


def _bfl(made: list[Change], name: Callable[[str], str], down: str, up: str, alpha: str | None = ".alpha") -> Tensors:
    tensors = {}
    for change in made:
        stem = name(change.bfl)
        tensors[stem + down] = change.down.clone()
        tensors[stem + up] = change.up.clone() if alpha else _folded(change.up)
        if alpha:
            tensors[stem + alpha] = torch.tensor(ALPHA)
    return tensors


PEFT = (".lora_A.weight", ".lora_B.weight")
KOHYA = (".lora_down.weight", ".lora_up.weight")


def kohya_name(bfl: str) -> str:
    return "lora_unet_" + bfl.replace(".", "_")


def xlabs_name(bfl: str) -> str:
    block, index, layer = bfl.split(".", 2)
    return f"{block}.{index}.{XLABS[layer]}"


def one_trainer(made: list[Change]) -> Tensors:
    return {
        name.replace(".", "_", name.count(".") - (1 if name.endswith(".alpha") else 2)): tensor
        for name, tensor in _diffusers(made, "lora_transformer.{}", *KOHYA, ".alpha").items()
    }


def omi(made: list[Change]) -> Tensors:
    """OneTrainer's later format: Black Forest Labs' names, the parts of fused layers apart and numbered."""
    tensors = {}
    for change in made:
        halves = change.bfl.endswith("adaLN_modulation.1")
        for number, rows in enumerate([change.up] if halves else change.by_part.values()):
            stem = f"transformer.{change.bfl}" + (f".{number}" if len(change.parts) > 1 else "")
            stem = stem.replace("img_in", "img_in.proj")
            tensors |= {f"{stem}.lora_down.weight": change.down.clone(), f"{stem}.lora_up.weight": rows.clone()}
            tensors[f"{stem}.alpha"] = torch.tensor(ALPHA)
    return tensors


DIFFSYNTH = {
    "img_attn.qkv": "attn.a_to_qkv",
    "txt_attn.qkv": "attn.b_to_qkv",
    "img_attn.proj": "attn.a_to_out",
    "txt_attn.proj": "attn.b_to_out",
    "img_mlp.0": "ff_a.0",
    "img_mlp.2": "ff_a.2",
    "txt_mlp.0": "ff_b.0",
    "txt_mlp.2": "ff_b.2",
    "img_mod.lin": "norm1_a.linear",
    "txt_mod.lin": "norm1_b.linear",
    "linear1": "to_qkv_mlp",
    "linear2": "proj_out",
    "modulation.lin": "norm.linear",
}


def diffsynth_name(bfl: str) -> str:
    if not is_block(bfl):
        return DIFFSYNTH_OUTSIDE[bfl]
    block, index, layer = bfl.split(".", 2)
    return f"{block.removeprefix('double_')}.{index}.{DIFFSYNTH[layer]}"


def kohya_split(made: list[Change]) -> Tensors:
    """Fused layers whose parts were trained apart: block-diagonal factors of as many times the rank."""
    tensors = {}
    for change in made:
        stem, count = kohya_name(change.bfl), len(change.parts)
        tensors[f"{stem}.lora_down.weight"] = change.down.repeat(count, 1)
        tensors[f"{stem}.lora_up.weight"] = torch.block_diag(*change.up.split(change.sizes))
        tensors[f"{stem}.alpha"] = torch.tensor(ALPHA * count)
    return tensors


def convolutions(made: list[Change]) -> Tensors:
    """Factors stored as kernels of 1x1 convolutions."""
    tensors = _bfl(made, kohya_name, *KOHYA)
    return {name: tensor[:, :, None, None] if tensor.ndim else tensor for name, tensor in tensors.items()}


# Formats with the arithmetic of the first: they must give the same bits.
EXACT: dict[str, Callable[[list[Change]], Tensors]] = {
    "diffusers": lambda made: _diffusers(made, "transformer.{}", *PEFT),
    "diffusers with alpha": lambda made: _diffusers(made, "transformer.{}", *PEFT, ".alpha"),
    "old diffusers": lambda made: _diffusers(made, "transformer.{}", ".lora.down.weight", ".lora.up.weight"),
    "diffusers, kohya's suffix": lambda made: _diffusers(made, "transformer.{}", *KOHYA, ".alpha"),
    "diffusers, no prefix": lambda made: _diffusers(made, "{}", *PEFT),
    "diffusers, unet": lambda made: _diffusers(made, "unet.{}", *PEFT),
    "PEFT": lambda made: _diffusers(made, "base_model.model.{}", *PEFT),
    "PEFT, named adapter": lambda made: _diffusers(
        made, "base_model.model.{}", ".lora_A.default.weight", ".lora_B.default.weight"
    ),
    "kohya": lambda made: _bfl(made, kohya_name, *KOHYA),
    "kohya, split qkv": kohya_split,
    "kohya, 1x1 convolutions": convolutions,
    "ComfyUI": lambda made: _bfl(made, "diffusion_model.{}".format, *KOHYA),
    "ComfyUI, PEFT's suffix": lambda made: _bfl(made, "diffusion_model.{}".format, *PEFT, None),
    "BFL": lambda made: _bfl(made, "{}".format, *PEFT, None),
    "fal": lambda made: _bfl(made, "base_model.model.{}".format, *PEFT, None),
    "kohya, diffusers' names": lambda made: {
        # as TheLastBen's trainer writes them, with one _ too many
        name.replace("lora_transformer", "lora_unet").replace(".", "_.", 1): tensor
        for name, tensor in one_trainer(made).items()
    },
    "OneTrainer": one_trainer,
    "OneTrainer, OMI": omi,
    "LyCORIS": lambda made: {
        name.replace("lora_transformer_", "lycoris_"): tensor for name, tensor in one_trainer(made).items()
    },
}


def lokr(made: list[Change], name: Callable[[str], str] = kohya_name) -> Tensors:
    """kron([1], up @ down) is up @ down."""
    tensors = _bfl(made, name, ".lokr_w2_b", ".lokr_w2_a")
    return tensors | {f"{name(change.bfl)}.lokr_w1": torch.ones(1, 1) for change in made}


def loha(made: list[Change], name: Callable[[str], str] = kohya_name) -> Tensors:
    """(up @ down) * (ones @ ones / rank) is up @ down."""
    tensors = _bfl(made, name, ".hada_w1_b", ".hada_w1_a")
    for change in made:
        tensors[f"{name(change.bfl)}.hada_w2_a"] = torch.ones_like(change.up)
        tensors[f"{name(change.bfl)}.hada_w2_b"] = torch.full_like(change.down, 1 / RANK)
    return tensors


def full(made: list[Change], name: Callable[[str], str] = kohya_name) -> Tensors:
    return {f"{name(change.bfl)}.diff": _folded(change.up) @ change.down for change in made}


def diffsynth(made: list[Change]) -> Tensors:
    """Only of layers in blocks."""
    return _bfl(made, diffsynth_name, ".lora_A.default.weight", ".lora_B.default.weight", None)


# Formats that multiply or round in another order: results may differ by a rounding or two of float32.
ROUNDED: dict[str, Callable[[list[Change]], Tensors]] = {
    "LoKr": lokr,
    "LoKr, ComfyUI's prefix": lambda made: lokr(made, "diffusion_model.{}".format),
    "LoKr, LyCORIS's prefix": lambda made: lokr(made, lambda bfl: "lycoris_" + bfl.replace(".", "_")),
    "LoHa": loha,
    "LoHa, diffusers' prefix": lambda made: loha(made, "transformer.{}".format),
    "differences": full,
    "differences, ComfyUI's prefix": lambda made: full(made, "diffusion_model.{}".format),
}


def xlabs(made: list[Change]) -> Tensors:
    """Only of layers that `is_xlabs` accepts, and single blocks' qkv."""
    return _bfl(made, xlabs_name, ".down.weight", ".up.weight", None)


def metadata(alpha: float = ALPHA, rank: int = RANK, **config: object) -> dict[str, str]:
    """The header in which diffusers stores an adapter's config."""
    values = {"r": rank, "lora_alpha": alpha, "alpha_pattern": {}, "rank_pattern": {}, "use_rslora": False} | config
    return {"lora_adapter_metadata": json.dumps({f"transformer.{key}": value for key, value in values.items()})}


def clip_changes(text_encoder: CLIPTextModel, seed: int = 1) -> dict[str, tuple[Tensor, Tensor]]:
    """(up, down) for the linear layers of CLIP, by names such as text_model.encoder.layers.0.mlp.fc1."""
    generator = torch.Generator().manual_seed(seed)
    return {
        f"text_model.{name.removeprefix('text_model.')}": (
            torch.randn(module.out_features, RANK, generator=generator) * 0.3,
            torch.randn(RANK, module.in_features, generator=generator) * 0.3,
        )
        for name, module in text_encoder.named_modules()
        if isinstance(module, torch.nn.Linear)
    }


def _clip(made: dict[str, tuple[Tensor, Tensor]], name: Callable[[str], str], down: str, up: str) -> Tensors:
    tensors = {}
    for layer, (b, a) in made.items():
        tensors |= {name(layer) + down: a.clone(), name(layer) + up: _folded(b)}
    return tensors


def _old_clip_name(name: str) -> str:
    for projection, short in (("q_proj", "to_q"), ("k_proj", "to_k"), ("v_proj", "to_v"), ("out_proj", "to_out")):
        name = name.replace(f"self_attn.{projection}", f"self_attn.{short}_lora")
    return f"text_encoder.{name}"


CLIP: dict[str, Callable[[dict[str, tuple[Tensor, Tensor]]], Tensors]] = {
    "diffusers": lambda made: _clip(made, "text_encoder.{}".format, *PEFT),
    "kohya": lambda made: _clip(made, lambda name: "lora_te1_" + name.replace(".", "_"), *KOHYA),
    "kohya, te": lambda made: _clip(made, lambda name: "lora_te_" + name.replace(".", "_"), *KOHYA),
    "ComfyUI": lambda made: _clip(made, "text_encoders.clip_l.transformer.{}".format, *KOHYA),
    "old diffusers": lambda made: _clip(
        made, "text_encoder.{}".format, ".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"
    ),
    "older diffusers": lambda made: _clip(made, _old_clip_name, ".down.weight", ".up.weight"),
}


def write(file: Path, tensors: Tensors, header: dict[str, str] | None = None) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, metadata=header)
    return file


def lora_of_the_miniature(seed: int, rank: int = RANK) -> bytes:
    """A LoRA file for all blocks of the miniature; each seed makes another one."""
    config = FluxTransformer2DModel.load_config(ROOT / "mini" / "dev" / "transformer")
    with torch.device("meta"):
        transformer = FluxTransformer2DModel.from_config(config)
    return save(EXACT["diffusers"](changes(transformer, only=is_block, seed=seed, rank=rank)))
