"""schnell: dev's paths from noise to picture, cut into four straight pieces.

dev draws with a guidance of 3, and the latents at the times of schnell's four steps are kept. schnell learns the
straight line of each piece (piecewise rectified flow), so that its steps follow the path.
"""

import random
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor

from mini.training import dev, guided, text, world
from mini.training.architecture import schedulers, transformer
from mini.training.dev import error, velocity
from mini.training.latents import GRID, QUARTER, WHOLE, Size, grid
from mini.training.loop import DEVICE, train

STEPS = 1000
PIECES = 4
STEPS_A_PIECE = 6
GUIDANCE = 3.0
TOKENS = dev.TOKENS
WHOLE_SHARE = 0.5


@dataclass(frozen=True)
class Paths:
    """Drawings of one size: their latents at each time of `ends()`."""

    size: Size
    texts: list[str]
    points: Tensor  # [N, PIECES + 1, tokens, 4 C]


@cache
def ends() -> Tensor:
    """The times at which schnell's steps begin and end, from 1 to 0: [PIECES + 1]."""
    scheduler = schedulers()["schnell"]
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / PIECES, PIECES))
    return scheduler.sigmas.to(DEVICE)


def main(work: Path) -> FluxTransformer2DModel:
    """The trained transformer, in bfloat16."""
    teacher, readers = guided.main(work), text.main(work)
    paths = all_paths(work, teacher, readers)
    torch.manual_seed(0)
    model = without_guidance(teacher)

    def loss_of(rng: np.random.Generator, _: float) -> Tensor:
        chosen = paths["1" if rng.random() < WHOLE_SHARE else "0.25"]
        shares = np.array([len(it.texts) for it in chosen])
        return piece_loss(model, readers, chosen[rng.choice(len(chosen), p=shares / shares.sum())], rng)

    with dev.plain_attention():
        train("schnell", model, STEPS, loss_of, work=work, rate=5e-4, matrices=1e-3, ema=0.99)
    return model.eval().requires_grad_(False)


def counts_by_size() -> dict[str, dict[Size, int]]:
    """The number of drawings of each size, by megapixels."""
    return {
        "0.25": dict.fromkeys(QUARTER, 32) | {QUARTER[0]: 640},
        "1": dict.fromkeys(WHOLE, 16) | {WHOLE[0]: 320},
    }


def without_guidance(teacher: FluxTransformer2DModel) -> FluxTransformer2DModel:
    """A transformer of the same weights, with the guidance of 3 folded into a bias of the time's embedder."""
    model = transformer(guidance=False).to(teacher.dtype)
    model.load_state_dict({key: value for key, value in teacher.state_dict().items() if "guidance" not in key})
    embedder = teacher.time_text_embed
    with torch.no_grad():
        constant = embedder.guidance_embedder(embedder.time_proj(torch.tensor([GUIDANCE * 1000])).to(teacher.dtype))
        model.time_text_embed.timestep_embedder.linear_2.bias += constant[0]
    return model


def all_paths(work: Path, teacher: FluxTransformer2DModel, readers: text.Readers) -> dict[str, list[Paths]]:
    """All paths by megapixels; each is drawn once."""
    return {megapixels: draw_paths(work, teacher, readers, counts) for megapixels, counts in counts_by_size().items()}


@torch.no_grad()
def draw_paths(
    work: Path, teacher: FluxTransformer2DModel, readers: text.Readers, counts: dict[Size, int]
) -> list[Paths]:
    """Paths of these sizes, drawn or read from the files of an earlier run."""
    drawn = []
    (work / "paths").mkdir(exist_ok=True)
    for size, count in counts.items():
        file = work / "paths" / f"{size[0]}x{size[1]}.pt"
        rng = random.Random(str(size))
        texts = [world.caption(dev.seen_scene(rng), rng).text for _ in range(count)]
        if not file.exists():
            torch.manual_seed(count + size[0])
            batch = max(1, TOKENS // (size[0] * size[1] // GRID**2))
            parts = [_points(teacher, readers, size, texts[i : i + batch]) for i in range(0, count, batch)]
            torch.save(torch.cat(parts), file)
            print(f"paths of {size[0]}x{size[1]}: {count}", flush=True)
        drawn.append(Paths(size, texts, torch.load(file, map_location=DEVICE)))
    return drawn


def _points(teacher: FluxTransformer2DModel, readers: text.Readers, size: Size, texts: list[str]) -> Tensor:
    """Points of Euler steps along the guided flow: [B, PIECES + 1, tokens, 4 C] in bfloat16."""
    columns, rows = grid(size)
    words = readers(texts)
    guidance = torch.full((len(texts),), GUIDANCE)
    point = torch.randn(len(texts), rows * columns, teacher.config.in_channels)
    points = [point]
    for start, end in pairwise(ends()):
        step = (start - end) / STEPS_A_PIECE
        for number in range(STEPS_A_PIECE):
            time = (start - number * step).expand(len(texts))
            point = point - step * velocity(teacher, point, time, words, (rows, columns), guidance)
        points.append(point)
    return torch.stack(points, dim=1).to(torch.bfloat16)


def piece_loss(model: FluxTransformer2DModel, readers: text.Readers, paths: Paths, rng: np.random.Generator) -> Tensor:
    """The error of the velocity against the straight line's, mostly at the beginning of a piece."""
    columns, rows = grid(paths.size)
    count = max(1, TOKENS // (rows * columns))
    chosen = rng.integers(len(paths.texts), size=count)
    piece = torch.tensor(rng.integers(PIECES, size=count))
    points = paths.points[chosen].float()
    row = torch.arange(count)
    start, end = points[row, piece], points[row, piece + 1]
    along = torch.tensor(np.where(rng.random(count) < 0.7, 0.0, rng.random(count)), dtype=torch.float32)
    here = start + along[:, None, None] * (end - start)
    times = ends()
    span = times[piece] - times[piece + 1]
    time = times[piece] - along * span
    with torch.no_grad():
        words = readers([paths.texts[i] for i in chosen])
    said = velocity(model, here, time, words, (rows, columns))
    return error(said, (start - end) / span[:, None, None], points[:, -1])
