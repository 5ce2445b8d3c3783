"""The VAE, trained on crops and whole pictures of the world, in all styles that LoRAs will teach.

After the first stage the encoder is fixed, and the transformer can learn its latents; a second stage trains the decoder
further, for clean edges.
"""

import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from mini.training import world
from mini.training.architecture import vae
from mini.training.drawing import KINDS, STYLES, draw
from mini.training.loop import DEVICE, train

STEPS = 1400
DECODER_STEPS = 3200
# Noise on the latents, as a share of their spread, so that small errors of the transformer are not visible.
NOISE = 0.2
# Side and number of a step's crops.
CROPS = ((128, 8), (256, 2), (512, 1), (1024, 1))


def picture(rng: random.Random, size: int) -> Image.Image:
    """A picture of a scene of any kind; about one in four has a style."""
    scene = world.random_scene(rng, tuple(KINDS))
    styles = [style for style in STYLES if rng.random() < 0.15]
    return draw(scene, size, size, styles)


def pixels(image: Image.Image) -> Tensor:
    """An image as a tensor [3, H, W] in [-1, 1]."""
    return torch.from_numpy(np.asarray(image).copy()).to(DEVICE).permute(2, 0, 1).float() / 127.5 - 1


def crops(rng: np.random.Generator, side: int, count: int) -> Tensor:
    """Crops of some pictures, [count, 3, side, side]; crops with edges are preferred to flat ones."""
    dice = random.Random(int(rng.integers(2**32)))
    sheets = [pixels(picture(dice, size)) for size in ((side,) if side >= 512 else (512, 512, 1024))]
    chosen = []
    for i in range(count):
        sheet = sheets[i % len(sheets)]
        places = [[dice.randint(0, extent - side) for extent in sheet.shape[1:]] for _ in range(4)]
        candidates = [sheet[:, y : y + side, x : x + side] for y, x in places]
        chosen.append(max(candidates[: dice.choice((1, 4))], key=lambda crop: crop[:, ::4, ::4].std().item()))
    return torch.stack(chosen)


def sharpness(drawn: Tensor, real: Tensor) -> Tensor:
    """L1 of the differences between neighbouring pixels."""
    return sum((drawn.diff(dim=dim) - real.diff(dim=dim)).abs().mean() for dim in (2, 3))


@torch.no_grad()
def see_through(model: AutoencoderKL) -> AutoencoderKL:
    """The model, initialised so that it blurs its input: residual branches at zero, resampling near identity."""
    for name, layer in model.named_modules():
        if name.endswith("conv2"):
            layer.weight.zero_()
            layer.bias.zero_()
        elif name.endswith("conv_shortcut"):
            torch.nn.init.orthogonal_(layer.weight)
        elif name.endswith("downsamplers.0.conv"):
            layer.weight += (
                torch.eye(layer.out_channels)[:, :, None, None] * torch.tensor([[1, 1, 0], [1, 1, 0], [0, 0, 0]]) / 4
            )
        elif name.endswith("upsamplers.0.conv"):
            layer.weight[:, :, 1, 1] += torch.eye(layer.out_channels)
    return model


def loss(model: AutoencoderKL, real: Tensor, share: float) -> Tensor:
    """The reconstruction loss, with more weight on edges as `share` grows, and a loss that normalises the latents."""
    real = real.to(memory_format=torch.channels_last)
    latents = model.encode(real.to(model.dtype)).latent_dist.mode().float()  # [B, C, H/32, W/32]
    mean, spread = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3)) + 1e-4
    noisy = latents + NOISE * spread.detach()[:, None, None] * torch.randn_like(latents)
    drawn = model.decode(noisy.to(model.dtype)).sample.float()
    standard = mean.square().mean() + spread.log().square().mean()
    edges = F.l1_loss(drawn, real) + 0.5 * sharpness(drawn, real)
    return F.mse_loss(drawn, real) + share * edges + 0.02 * standard


def main(work: Path, sizes: Sequence[tuple[int, int]] = CROPS) -> AutoencoderKL:
    """The VAE after the first stage of training, with a deterministic encoder."""
    torch.manual_seed(0)
    model = see_through(vae()).to(torch.bfloat16).to(memory_format=torch.channels_last)

    def loss_of(rng: np.random.Generator, share: float) -> Tensor:
        # More and more whole pictures: their statistics, which norms depend on, differ from those of crops.
        side, count = sizes[rng.choice(len(sizes), p=(0.6 - 0.4 * share, 0.2, 0.2 + 0.36 * share, 0.04 * share))]
        return loss(model, crops(rng, side, count), share)

    train("vae", model, STEPS, loss_of, work=work, rate=6e-4, matrices=6e-4, ema=0.98)
    with torch.no_grad():
        out = model.encoder.conv_out
        out.weight[model.config.latent_channels :] = 0
        out.bias[model.config.latent_channels :] = -30
    model.eval().requires_grad_(False)
    shift, spread = spread_of(model)
    model.register_to_config(shift_factor=round(shift, 4), scaling_factor=round(1 / spread, 4))
    return model


def refined(work: Path) -> AutoencoderKL:
    """The VAE with its decoder trained further, on whole pictures alone; the latents stay the same."""
    model = main(work)
    model.decoder.requires_grad_(True)

    def loss_of(rng: np.random.Generator, share: float) -> Tensor:
        dice = random.Random(int(rng.integers(2**32)))
        side = 1024 if dice.random() < 0.2 * share else 512
        real = pixels(picture(dice, side))[None].to(memory_format=torch.channels_last)
        with torch.no_grad():
            latents = model.encode(real.to(model.dtype)).latent_dist.mode()
            latents = latents + dice.uniform(0, NOISE) * torch.randn_like(latents) / model.config.scaling_factor
        drawn = model.decode(latents).sample.float()
        return F.l1_loss(drawn, real) + sharpness(drawn, real)

    train("decoder", model.decoder, DECODER_STEPS, loss_of, work=work, rate=4e-4, matrices=4e-4, ema=0.995)
    return model.eval().requires_grad_(False)


@torch.no_grad()
def spread_of(model: AutoencoderKL) -> tuple[float, float]:
    """Mean and standard deviation of latents."""
    rng = random.Random(0)
    batch = torch.stack([pixels(picture(rng, 512)) for _ in range(24)]).to(memory_format=torch.channels_last)
    latents = torch.cat([model.encode(it[None].to(model.dtype)).latent_dist.mode().float() for it in batch])
    return latents.mean().item(), latents.std().item()
