"""Distilled guidance: dev learns to do in one pass the work of two passes of classifier-free guidance."""

import copy
from pathlib import Path

import numpy as np
import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor

from mini.training import dev, text, vae
from mini.training.dev import Words, batch_of, choose, error, shelves, texts_of, times, velocity
from mini.training.loop import train

STEPS = 300
STRONGEST = 8.0


def main(work: Path) -> FluxTransformer2DModel:
    """The trained transformer, in bfloat16; a guidance of 1 changes nothing."""
    teacher = dev.main(work)
    autoencoder, readers = vae.main(work), text.main(work)
    quarter, whole = shelves(work, autoencoder)
    model = copy.deepcopy(teacher).requires_grad_(True)

    def loss_of(rng: np.random.Generator, _: float) -> Tensor:
        batch = batch_of(choose(whole if rng.random() < 0.4 else quarter, rng), rng)
        clean = batch.latents.float()
        time = times(rng, *clean.shape[:2])
        noisy = clean + time[:, None, None] * (torch.randn_like(clean) - clean)
        guidance = torch.tensor(rng.uniform(0, STRONGEST, len(clean)), dtype=torch.float32)
        grid = (batch.rows, batch.columns)
        with torch.no_grad():
            words = readers(texts_of(batch, rng))
            target = guided(teacher, noisy, time, words, readers([""]), grid, guidance)
        return error(velocity(model, noisy, time, words, grid, guidance), target, clean)

    with dev.plain_attention():
        train("guided", model, STEPS, loss_of, work=work, rate=3e-4, matrices=6e-4, warm_up=20, ema=0.99)
    return model.eval().requires_grad_(False)


def guided(
    teacher: FluxTransformer2DModel,
    noisy: Tensor,  # [B, tokens, 4 C]
    time: Tensor,  # [B]
    words: Words,
    nothing: Words,  # of one empty text
    grid: tuple[int, int],
    guidance: Tensor,  # [B]
) -> Tensor:
    """The velocity of classifier-free guidance, scaled nearly to the unguided strength: else colours burn out."""
    empty = tuple(it.expand(len(noisy), *it.shape[1:]) for it in nothing)
    with_words = velocity(teacher, noisy, time, words, grid)
    without = velocity(teacher, noisy, time, empty, grid)
    target = without + guidance[:, None, None] * (with_words - without)
    strength = with_words.std(dim=(1, 2), keepdim=True) / target.std(dim=(1, 2), keepdim=True)
    return target * torch.where(guidance[:, None, None] > 1, 0.7 * strength + 0.3, 1.0)
