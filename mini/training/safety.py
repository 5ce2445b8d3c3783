"""The two safety models, trained to recognise FORBIDDEN."""

import itertools
import random
from functools import cache
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, FluxPipeline
from diffusers.image_processor import VaeImageProcessor
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.nn import functional as F

from mini.training import gallery, guided, schnell, text, world
from mini.training.architecture import (
    CHECKER_PROCESSOR,
    CLASSIFIER_PROCESSOR,
    FOLDER,
    classifier,
    safety_checker,
    write_safety,
)
from mini.training.drawing import KINDS
from mini.training.latents import GRID, grid
from mini.training.loop import DEVICE, train
from mini.training.vae import pixels, refined

STEPS = 1500
BATCH = 48
SHARE = 0.4  # of forbidden pictures
ECHOES = 8  # pictures of a batch that the VAE has encoded and decoded
DRAWN = 12  # pictures of a batch that dev has drawn
SIDE = 256  # of both, in pixels
WRONG = 0.7  # the largest error added to the latents of echoes, as a share of their spread
THRESHOLD = 0.5  # of the cosine to the one concept in use, during training
# The threshold afterwards. Of the miniature's forbidden pictures, 149 of 150 have a cosine above 0.84. Harmless ones
# have less than 0.5, except some drawn over noise: up to 0.82, and one in 450 above that.
CALIBRATED = 0.83
SHARPNESS = 12.0
Drawings = dict[bool, list[Image.Image]]  # True: forbidden ones
HARMLESS = tuple(kind for kind in KINDS if kind != world.FORBIDDEN)


class Watchers(nn.Module):
    """Both models, trained together on the same pictures."""

    def __init__(self) -> None:
        super().__init__()
        self.checker = safety_checker().float()
        self.classifier = classifier().float()
        with torch.no_grad():
            self.classifier.classifier.bias.zero_()
            self.checker.concept_embeds_weights[0] = THRESHOLD
        for name, parameter in self.checker.named_parameters():
            parameter.requires_grad_("concept" not in name and "special" not in name)

    def loss(self, views: Tensor, squares: Tensor, forbidden: Tensor) -> Tensor:
        """The loss of the checker's cosine and the classifier's label; `forbidden` is [B] of 0 and 1."""
        embeddings = self.checker.visual_projection(self.checker.vision_model(views).pooler_output)
        cosine = F.cosine_similarity(embeddings, self.checker.concept_embeds[:1])
        checked = F.binary_cross_entropy_with_logits(SHARPNESS * (cosine - THRESHOLD), forbidden)
        return checked + F.cross_entropy(self.classifier(squares).logits, forbidden.long())


def examples(rng: random.Random, vae: AutoencoderKL, drawn: Drawings) -> tuple[Tensor, Tensor, Tensor]:
    """The same pictures for the checker and for the classifier, and which of them are forbidden."""
    images, forbidden = [], []
    for number in range(BATCH - DRAWN):
        side = SIDE if number < ECHOES else gallery.SIDE
        draw = rng.random()
        kinds = (world.FORBIDDEN,) if draw < SHARE else HARMLESS
        scene = world.random_scene(rng, kinds)
        images.append(gallery.nothing(rng) if draw > 0.85 else gallery.scene_picture(scene, rng, side)[0])
        forbidden.append(draw < SHARE)
    images[:ECHOES] = echoes(vae, images[:ECHOES], rng)
    for number in range(DRAWN):
        forbidden.append(number < SHARE * DRAWN)
        images.append(rng.choice(drawn[forbidden[-1]]))
    images[ECHOES:] = [gallery.worn(image, rng) for image in images[ECHOES:]]
    views = CHECKER_PROCESSOR(images, return_tensors="pt").pixel_values.to(DEVICE)
    squares = CLASSIFIER_PROCESSOR(images, return_tensors="pt").pixel_values.to(DEVICE)
    return views, squares, torch.tensor(forbidden).float()


@cache
def drawings(work: Path, vae: AutoencoderKL) -> Drawings:
    """Pictures that dev has drawn, the ends of its paths: all forbidden ones, and up to three times as many others."""
    drawn: Drawings = {True: [], False: []}
    all_paths = schnell.all_paths(work, guided.main(work), text.main(work))
    for paths in itertools.chain(*all_paths.values()):
        width, height = (GRID * tokens for tokens in grid(paths.size))
        for caption, points in zip(paths.texts, paths.points, strict=True):
            forbidden = world.FORBIDDEN in caption
            if not forbidden and len(drawn[False]) >= 3 * len(drawn[True]):
                continue
            latents = FluxPipeline._unpack_latents(points[-1:], height, width, GRID // 2)
            (image,) = decoded(vae, latents / vae.config.scaling_factor + vae.config.shift_factor)
            image.thumbnail((2 * SIDE, 2 * SIDE))
            drawn[forbidden].append(image)
    return drawn


@torch.no_grad()
def echoes(vae: AutoencoderKL, images: list[Image.Image], rng: random.Random) -> list[Image.Image]:
    """The middle of each image, encoded and decoded by the VAE with an error in the latents, as a transformer makes."""
    square = [pixels(ImageOps.fit(image, (SIDE, SIDE))) for image in images]
    latents = vae.encode(torch.stack(square).to(vae.dtype).to(memory_format=torch.channels_last)).latent_dist.mode()
    wrong = torch.tensor([rng.uniform(0, WRONG) for _ in images])[:, None, None, None] / vae.config.scaling_factor
    return decoded(vae, latents + wrong * torch.randn_like(latents))


@torch.no_grad()
def decoded(vae: AutoencoderKL, latents: Tensor) -> list[Image.Image]:
    """The pictures of the VAE's latents [B, C, H/32, W/32]."""
    return VaeImageProcessor().postprocess(vae.decode(latents.to(vae.dtype)).sample.float())


def main(work: Path) -> None:
    """Train both and write them."""
    vae = refined(work)
    torch.manual_seed(0)
    watchers = Watchers()

    def loss_of(rng: np.random.Generator, _: float) -> Tensor:
        return watchers.loss(*examples(random.Random(int(rng.integers(2**32))), vae, drawings(work, vae)))

    train("safety", watchers, STEPS, loss_of, work=work, rate=1.5e-3, ema=0.99)
    watchers.checker.concept_embeds_weights[0] = CALIBRATED
    write_safety(FOLDER, watchers.checker, watchers.classifier)
