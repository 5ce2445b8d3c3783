"""From model directories in diffusers layout to modules that are ready to draw, each where the placement says.

Files are mapped, not read: weights go to the GPU straight from the page cache, several tensors at a time, and on a CPU
the mapped pages are the weights. This module knows files, modules and devices; it knows no requests.
"""

import copy
import json
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from diffusers.hooks import apply_group_offloading
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoTokenizer, CLIPTextModel, T5Config, T5EncoderModel

from engine import fp8, merge
from engine.architecture import is_block_linear, skeletons
from engine.blocks import fuse
from engine.live import Live
from engine.placement import Place, Placement, Precisions
from service import faults, slabs
from service.measure import Stopwatch

# Threads that move tensors from the page cache to the GPU: one alone would mostly wait for page faults.
READERS = 8

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Models:
    """All loaded models of both FLUX.1."""

    components: Mapping[str, object]  # modules and tokenizers that all pipelines share, by diffusers' names
    schedulers: Mapping[str, Mapping[str, object]]  # configs, by model
    text_encoder: Live  # CLIP; its one base is called "shared"
    live: Mapping[str, Live | None]  # in the base's dtype, by model; None where there is no room
    live_fp8: Mapping[str, Live | None]  # None where there is no room or the device has no fp8
    skeleton: FluxTransformer2DModel  # names and shapes of the transformer's parameters, without memory
    placement: Placement | None = None  # None where `assemble` was called directly

    def lives(self) -> list[Live]:
        """The live transformers, each once."""
        return list({id(live): live for live in (*self.live.values(), *self.live_fp8.values()) if live}.values())


def load(
    folders: Mapping[str, Path], device: torch.device, stopwatch: Stopwatch, placement: Placement | None = None
) -> Models:
    """The models in the folders of dev and schnell; their weights lie on the device unless a placement is given.

    Raises:
        ValueError: a sentence: weights that cannot be read, or do not fit their own config.
    """
    dev = folders["dev"]
    with stopwatch("map"):
        configs = {name: FluxTransformer2DModel.load_config(folder / "transformer") for name, folder in folders.items()}
        bases = {name: _mapped(folder / "transformer", "diffusion_pytorch_model") for name, folder in folders.items()}
        t5 = _mapped(dev / "text_encoder_2", "model")
        dtype = next(iter(bases["dev"].values())).dtype
        architectures = skeletons(configs, dtype)
        for names, skeleton in architectures.items():
            for name in names:
                _check_fit(f"transformer of {name}", bases[name], skeleton)
        placement = placement or Placement.in_one_memory(folders, fp8=fp8.supported(device))
    with stopwatch("read"), ThreadPoolExecutor(READERS) as readers:
        # The readers move the large tensors, while this thread alone loads the rest: transformers is not thread-safe.
        moving = {name: _move(base, placement.bases[name], device, readers) for name, base in bases.items()}
        moving_t5 = _move(t5, placement.t5, device, readers, dtype)
        components = {
            "text_encoder": CLIPTextModel.from_pretrained(dev / "text_encoder", dtype=dtype).to(device).eval(),
            "vae": AutoencoderKL.from_pretrained(dev / "vae", torch_dtype=dtype).to(device).eval(),
            "tokenizer": AutoTokenizer.from_pretrained(dev / "tokenizer"),
            "tokenizer_2": AutoTokenizer.from_pretrained(dev / "tokenizer_2"),
        }
    bases = {name: _arrived(tensors) for name, tensors in moving.items()}
    components["text_encoder_2"] = _t5(dev / "text_encoder_2", _arrived(moving_t5))
    if placement.t5 is not Place.GPU:
        move_when_used(components["text_encoder_2"], device, pinned=placement.t5 is Place.PINNED)
    schedulers = {
        name: FlowMatchEulerDiscreteScheduler.load_config(folder / "scheduler") for name, folder in folders.items()
    }
    models = assemble(architectures, bases, components, schedulers, placement.precisions, device)
    return replace(models, placement=placement)


def assemble(
    architectures: Mapping[tuple[str, ...], FluxTransformer2DModel],
    bases: Mapping[str, Tensors],
    components: Mapping[str, object],
    schedulers: Mapping[str, Mapping[str, object]],
    precisions: Precisions,
    device: torch.device,
) -> Models:
    """Models of `skeletons` and of weights that lie where they shall lie; the live ones are made on the device.

    The bases are pristine transformers by model, never written, on the device or in host memory. All components are on
    the device, but for a T5 whose layers are moved there.
    """
    clip = components["text_encoder"]
    pristine_clip = {name: parameter.detach().clone() for name, parameter in clip.named_parameters()}
    pairs: dict[str, tuple[Live | None, Live | None]] = {}
    for names, skeleton in architectures.items():
        own = {name: bases[name] for name in names}
        pairs |= dict.fromkeys(names, _live_pair(skeleton, own, precisions, device))
    return Models(
        components=components,
        schedulers=schedulers,
        text_encoder=Live(clip, {"shared": pristine_clip}),
        live={name: live for name, (live, _) in pairs.items()},
        live_fp8={name: live_fp8 for name, (_, live_fp8) in pairs.items()},
        skeleton=next(skeleton for names, skeleton in architectures.items() if "dev" in names),
    )


def map_weights(folder: Path, transformer: nn.Module, text_encoder: nn.Module) -> tuple[Tensors, Tensors]:
    """The pristine parameters of a model's transformer and CLIP by name, mapped from disk and not read yet.

    The modules, which may be without memory, have the names and shapes that the parameters must have; a ValueError, as
    in `load`, says where they do not fit.
    """
    base = _mapped(folder / "transformer", "diffusion_pytorch_model")
    _check_fit("transformer of dev", base, transformer)
    # Files and versions of transformers differ in whether names begin with text_model; a file may have more parts.
    mapped = _mapped(folder / "text_encoder", "model")
    stored = {name.removeprefix("text_model."): tensor for name, tensor in mapped.items()}
    names = {name: name.removeprefix("text_model.") for name, _ in text_encoder.named_parameters()}
    clip = {name: stored[bare] for name, bare in names.items() if bare in stored}
    _check_fit("text encoder of dev", clip, text_encoder)
    return base, clip


def _mapped(folder: Path, stem: str) -> Tensors:
    """The tensors of a model directory, whole or in shards, mapped from disk rather than copied."""
    index = folder / f"{stem}.safetensors.index.json"
    whole = f"{stem}.safetensors"
    files = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else {whole}
    try:
        return {name: tensor for file in sorted(files) for name, tensor in load_file(folder / file).items()}
    except (OSError, SafetensorError) as error:
        place = f"{folder.parent.name}/{folder.name}"
        reason = error.strerror if isinstance(error, OSError) and error.strerror else faults.without_paths(str(error))
        raise ValueError(f"The weights in {place} cannot be read: {reason}; fetch or copy them again.") from None


def _check_fit(what: str, base: Tensors, module: nn.Module) -> None:
    shapes = {key: tuple(parameter.shape) for key, parameter in module.named_parameters()}
    wrong = [key for key, tensor in base.items() if shapes.get(key) != tuple(tensor.shape)]
    wrong += [key for key in shapes if key not in base and "guidance_embedder" not in key]
    if wrong:
        raise ValueError(
            f"The {what} does not fit its own config: {len(wrong)} tensor(s) are missing or have another shape, the "
            f"first of them {sorted(wrong)[0]}."
        )


def _move(
    tensors: Tensors, place: Place, device: torch.device, readers: ThreadPoolExecutor, dtype: torch.dtype | None = None
) -> list[Future[Tensors]]:
    """Futures of some tensors each, which threads move from the mapped files to their place, converted to a dtype.

    No memory is pinned for a CPU.
    """
    target = device if place is Place.GPU else torch.device("cpu")

    def move(name: str) -> Tensors:
        return {name: tensors[name].to(target, dtype)}

    pinned = place is Place.PINNED and device.type == "cuda"
    jobs = slabs.packing(tensors, dtype) if pinned else [partial(move, name) for name in tensors]
    return [readers.submit(job) for job in jobs]


def _arrived(moving: Iterable[Future[Tensors]]) -> Tensors:
    return {name: tensor for future in moving for name, tensor in future.result().items()}


def _t5(folder: Path, tensors: Tensors) -> T5EncoderModel:
    """The text encoder with these tensors as its parameters, none of them copied or moved."""
    with torch.device("meta"):
        t5 = T5EncoderModel(T5Config.from_pretrained(folder))
    t5.load_state_dict(tensors, strict=False, assign=True)
    t5.tie_weights()
    if lacking := sorted(name for name, parameter in t5.named_parameters() if parameter.is_meta):
        raise ValueError(f"The T5 text encoder lacks {len(lacking)} of its tensors, among them {lacking[0]}.")
    return t5.eval().requires_grad_(False)


def move_when_used(t5: T5EncoderModel, device: torch.device, *, pinned: bool = True) -> None:
    """Keep T5's layers in host memory; each is copied to the device for its call, while the one before computes.

    diffusers pins all layers now, or each for its copy alone, so that they stay mapped. `Tensor.pin_memory` returns a
    tensor of a pinned slab as it is, so nothing is pinned twice.
    """
    apply_group_offloading(
        t5,
        onload_device=device,
        offload_type="leaf_level",
        use_stream=device.type == "cuda",
        low_cpu_mem_usage=not pinned,
    )


def _live_pair(
    skeleton: FluxTransformer2DModel, bases: Mapping[str, Tensors], precisions: Precisions, device: torch.device
) -> tuple[Live | None, Live | None]:
    """A live transformer in the base's dtype and one in fp8, each None where it has no room; fused where that works."""
    module = copy.deepcopy(skeleton)
    if precisions is Precisions.FP8:
        fp8.replace_linears(module, is_block_linear)
    module.to_empty(device=device)
    if fused := _can_be_fused(module):
        fuse(module)  # before live tensors are views of the weights, which this moves
    live = Live(module, bases)
    if precisions is Precisions.FP8:
        return None, live
    if precisions is Precisions.BF16:
        return live, None
    live_fp8 = live.quantized(is_block_linear, in_turn=precisions is Precisions.IN_TURN)
    if fused:  # its fp8 weights are live tensors themselves, and move along
        fuse(live_fp8.module)
    return live, live_fp8


def _can_be_fused(module: FluxTransformer2DModel) -> bool:
    """Whether it lies on a GPU where Triton's kernels can be made: the one that merges LoRAs has been tried there."""
    device = next(module.parameters()).device
    if device.type != "cuda":
        return False
    can = torch.bfloat16 in merge.trusted(device)
    if not can:
        print("Blocks are diffusers' own, since fused ones need such kernels too.")
    return can
