"""LoRAs for tests and benchmarks: random ones, and files on this machine as Flux takes them, without fetching."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from request import LoraChoice, LoraFile, Request
from settings import ROOT


def choice(name: str, scale: float = 1.0) -> LoraChoice:
    """One of the miniature's LoRAs, as a request names it."""
    return LoraChoice(str(ROOT / "mini" / "loras" / f"{name}.safetensors"), scale)


def files(request: Request) -> list[LoraFile]:
    """The files of a request whose references are their paths."""
    paths = [Path(choice.reference) for choice in request.loras]
    return [LoraFile(path, hashlib.sha256(path.read_bytes()).hexdigest(), path.name) for path in paths]


def random_lora(
    transformer: nn.Module,
    only: Callable[[str], bool],
    rank: int,
    seed: int,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
) -> dict[str, Tensor]:
    """Random factors for the linear layers whose names `only` accepts, in diffusers' names.

    Args:
        transformer: gives names and sizes; it may be on "meta".
        only: accepts or rejects the name of a layer.
        rank: of all factors.
        seed: of the random numbers.
        device: where they are drawn.
        dtype: of the factors.
    """
    generator = torch.Generator(device).manual_seed(seed)
    tensors = {}
    for name, layer in transformer.named_modules():
        if isinstance(layer, nn.Linear) and only(name):
            up, down = (
                torch.randn(shape, generator=generator, device=device)
                for shape in ((layer.out_features, rank), (rank, layer.in_features))
            )
            tensors |= {
                f"transformer.{name}.lora_A.weight": (down / layer.in_features**0.5).to(dtype),
                f"transformer.{name}.lora_B.weight": (0.1 * up).to(dtype),
            }
    return tensors
