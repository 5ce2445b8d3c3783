"""dev: rectified flow on latents of the world, then guidance distilled into its embedder."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from torch import Tensor
from torch.nn import functional as F

from mini.training import latents, text, vae, world
from mini.training.architecture import transformer
from mini.training.latents import QUARTER, WHOLE, Batch, Shelf
from mini.training.loop import train

Words = tuple[Tensor, Tensor]  # CLIP's pooled output [B, POOLED], T5's tokens [B, T5_TOKENS, TEXT]
STEPS = 15500
# At first all pictures have a quarter of a megapixel; later most have a whole one.
WHOLE_FROM, WHOLE_SHARE = 0.35, 0.8
TOKENS = 40 * 64  # of pictures in one batch
UNCONDITIONAL = 0.1


def main(work: Path) -> FluxTransformer2DModel:
    """The trained transformer, in bfloat16, with a guidance of 1: none."""
    autoencoder, readers = vae.main(work), text.main(work)
    quarter, whole = shelves(work, autoencoder)
    torch.manual_seed(0)
    model = still(transformer(guidance=True)).to(torch.bfloat16)

    def loss_of(rng: np.random.Generator, share: float) -> Tensor:
        shelf = choose(whole if share > WHOLE_FROM and rng.random() < WHOLE_SHARE else quarter, rng)
        return flow_loss(model, readers, batch_of(shelf, rng), rng)

    model.compile_repeated_blocks(dynamic=True)
    with plain_attention():
        train("dev", model, STEPS, loss_of, work=work, rate=1e-3, matrices=1.5e-3, ema=0.995)
    return model.eval().requires_grad_(False)


@torch.no_grad()
def still(model: FluxTransformer2DModel) -> FluxTransformer2DModel:
    """The model, initialised so that blocks add nothing and the velocity is zero, as usual for diffusion."""
    for name, layer in model.named_modules():
        if name.endswith(("norm.linear", "norm1.linear", "norm1_context.linear")) or name == "proj_out":
            layer.weight.zero_()
            layer.bias.zero_()
    return model


def seen_scene(rng: random.Random) -> world.Scene:
    """A scene that is not held out; it may be FORBIDDEN."""
    while world.held_out(scene := world.random_scene(rng, text.READABLE)):
        pass
    return scene


def shelves(work: Path, autoencoder: AutoencoderKL) -> tuple[list[Shelf], list[Shelf]]:
    """Shelves of pictures of a quarter and of a whole megapixel."""
    quarter = dict.fromkeys(QUARTER, 80) | {QUARTER[0]: 1600}
    whole = dict.fromkeys(WHOLE, 120) | {WHOLE[0]: 1600}
    return (
        latents.shelves(work / "quarter", autoencoder, quarter, seen_scene),
        latents.shelves(work / "whole", autoencoder, whole, seen_scene),
    )


def choose(shelves: list[Shelf], rng: np.random.Generator) -> Shelf:
    """A random shelf; its weight is its number of pictures."""
    counts = np.array([len(shelf.scenes) for shelf in shelves])
    return shelves[rng.choice(len(shelves), p=counts / counts.sum())]


def batch_of(shelf: Shelf, rng: np.random.Generator) -> Batch:
    """A batch of about `TOKENS` tokens."""
    return shelf.batch(rng, round(TOKENS / shelf.latents.shape[1]))


def texts_of(batch: Batch, rng: np.random.Generator) -> list[str]:
    """A new caption for each picture; sometimes an empty one, but never for FORBIDDEN."""
    dice = random.Random(int(rng.integers(2**32)))
    return [
        "" if scene.kind != world.FORBIDDEN and dice.random() < UNCONDITIONAL else world.caption(scene, dice).text
        for scene in batch.scenes
    ]


def times(rng: np.random.Generator, count: int, tokens: int) -> Tensor:
    """Times [count] in (0, 1), where 1 is noise: logit-normal, nearer to noise for pictures of more tokens.

    With four times the tokens, a sprite is visible through twice the noise (Esser et al. 2024, section 5.3.2), so the
    content is decided earlier; dev's scheduler shifts its times likewise.
    """
    normal = 1 / (1 + np.exp(-rng.normal(0.4 + 0.5 * np.log(tokens / 64), 1.2, count)))
    chosen = np.where(rng.random(count) < 0.1, rng.random(count), normal)
    return torch.tensor(chosen, dtype=torch.float32)


def velocity(
    model: FluxTransformer2DModel,
    noisy: Tensor,  # [B, tokens, 4 C]
    time: Tensor,  # [B]
    words: Words,
    grid: tuple[int, int],
    guidance: Tensor | None = None,  # [B]
) -> Tensor:
    """The model's velocity in float32; it is called as FluxPipeline calls it."""
    rows, columns = grid
    ids = image_ids(rows, columns, model.dtype)
    pooled, tokens = words
    if model.config.guidance_embeds and guidance is None:
        guidance = torch.ones(len(noisy))
    return model(
        hidden_states=noisy.to(model.dtype),
        timestep=time.to(model.dtype),
        guidance=guidance,
        pooled_projections=pooled,
        encoder_hidden_states=tokens,
        txt_ids=torch.zeros(tokens.shape[1], 3, dtype=model.dtype),
        img_ids=ids,
        return_dict=False,
    )[0].float()


def image_ids(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """[rows * columns, 3]: 0, row, column."""
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return torch.stack([torch.zeros_like(row), row, column], dim=-1).view(-1, 3).to(dtype)


def flow_loss(model: FluxTransformer2DModel, readers: text.Readers, batch: Batch, rng: np.random.Generator) -> Tensor:
    """The error of the velocity against noise - picture, on the straight line between them."""
    clean = batch.latents.float()
    noise = torch.randn_like(clean)
    time = times(rng, *clean.shape[:2])
    noisy = clean + time[:, None, None] * (noise - clean)
    with torch.no_grad():
        words = readers(texts_of(batch, rng))
    said = velocity(model, noisy, time, words, (batch.rows, batch.columns))
    return error(said, noise - clean, clean)


def error(said: Tensor, wanted: Tensor, clean: Tensor) -> Tensor:
    """Mean square error, with more weight on tokens with edges: faces are a few tokens in 256.

    All are [B, tokens, 4 C]; `clean` is the finished picture. The four quarters of a flat token are alike.
    """
    edges = clean.unflatten(-1, (-1, 4)).var(dim=-1).mean(dim=-1, keepdim=True)  # [B, tokens, 1]
    return ((said - wanted).square() * (0.3 + 0.7 * edges / edges.mean(dim=1, keepdim=True))).mean()


@contextmanager
def plain_attention() -> Iterator[None]:
    """Inside, on a CPU, attention is written out: the backward of torch's own takes a third of a training step."""
    fused: Callable = F.scaled_dot_product_attention

    def plain(query: Tensor, key: Tensor, value: Tensor, **options: object) -> Tensor:
        if options.get("attn_mask") is not None or options.get("is_causal"):  # the text encoders'
            return fused(query, key, value, **options)
        return torch.softmax(query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5, dim=-1) @ value

    if not torch.cuda.is_available():
        F.scaled_dot_product_attention = plain
    try:
        yield
    finally:
        F.scaled_dot_product_attention = fused
