"""Latents of pictures of the world, at the usual sizes, and batches of them."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, FluxPipeline
from torch import Tensor

from images import SIZES, extend
from mini.training import world
from mini.training.drawing import draw
from mini.training.loop import DEVICE
from mini.training.vae import pixels

GRID = 64
Size = tuple[int, int]  # width, height in pixels
QUARTER = [(width // 2, height // 2) for width, height in SIZES.values()]
WHOLE = list(SIZES.values())


def grid(size: Size) -> tuple[int, int]:
    """Columns and rows of the tokens that cover a picture."""
    columns, rows = (-(-side // GRID) for side in size)
    return columns, rows


@dataclass(frozen=True)
class Batch:
    """Latents of one size with their scenes."""

    latents: Tensor  # [B, tokens, 4 C], normalised and packed
    scenes: list[world.Scene]
    rows: int
    columns: int


@dataclass(frozen=True)
class Shelf:
    """All pictures of one size."""

    size: Size
    latents: Tensor  # [N, tokens, 4 C]
    scenes: list[world.Scene]

    def batch(self, rng: np.random.Generator, count: int) -> Batch:
        """A batch of random pictures."""
        chosen = rng.integers(len(self.scenes), size=count)
        columns, rows = grid(self.size)
        return Batch(self.latents[chosen], [self.scenes[i] for i in chosen], rows, columns)


@torch.no_grad()
def encode(vae: AutoencoderKL, scene: world.Scene, size: Size, styles: Sequence[str] = ()) -> Tensor:
    """Latents [tokens, 4 C], normalised and packed; the picture is extended to the grid as the predictor does."""
    width, height = (GRID * tokens for tokens in grid(size))
    image = pixels(extend(draw(scene, *size, styles), (width, height)))[None].to(vae.dtype)
    latents = vae.encode(image.to(memory_format=torch.channels_last)).latent_dist.mode()
    latents = (latents - vae.config.shift_factor) * vae.config.scaling_factor  # [1, C, H/32, W/32]
    return FluxPipeline._pack_latents(latents, 1, latents.shape[1], *latents.shape[2:])[0]


def shelves(
    path: Path,
    vae: AutoencoderKL,
    counts: dict[Size, int],
    scene_of: Callable[[random.Random], world.Scene],
    styles: Sequence[str] = (),
) -> list[Shelf]:
    """Shelves of `counts` pictures of each size, drawn and encoded once; later calls read them from `path`.

    Args:
        scene_of: a scene for a `random.Random`.
    """
    rng = random.Random(path.stem)
    filled = []
    path.mkdir(parents=True, exist_ok=True)
    for size, count in counts.items():
        scenes = [scene_of(rng) for _ in range(count)]
        file = path / f"{size[0]}x{size[1]}.pt"
        if not file.exists():
            torch.save(torch.stack([encode(vae, scene, size, styles) for scene in scenes]), file)
            print(f"{path.name}: {count} of {size[0]}x{size[1]}", flush=True)
        filled.append(Shelf(size, torch.load(file, map_location=DEVICE), scenes))
    return filled
