"""Recognises the scene in a picture, to check the miniature's drawings; it was not trained on them.

A small convolutional network, trained on procedural pictures, finds kind, place and style. The colour is that of the
procedural picture of the same kind and place with the most similar shares of colours.
"""

import random
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from mini.training import world
from mini.training.architecture import FOLDER
from mini.training.drawing import KINDS, PLACES, STYLES, body_colours, draw
from mini.training.gallery import scene_picture, worn
from mini.training.loop import train

FILE = FOLDER / "recogniser.safetensors"
SIDE = 96
STEPS = 900
BATCH = 48
NEAR = 44.0  # up to this distance, two RGB colours count as the same
ASPECTS: dict[str, tuple[str, ...]] = {"kind": tuple(KINDS), "place": tuple(PLACES)}


@dataclass(frozen=True)
class Seen:
    """The contents of a picture."""

    kind: str
    colour: str
    place: str
    styles: frozenset[str]


class Recogniser(nn.Module):
    """Five strided convolutions and a linear layer: pictures [B, 3, SIDE, SIDE] in [-1, 1] → scores of all answers."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 16, 32, 48, 64, 96)
        layers: list[nn.Module] = []
        for here, there in pairwise(widths):
            layers += [nn.Conv2d(here, there, 3, stride=2, padding=1), nn.GroupNorm(1, there), nn.SiLU()]
        answers = sum(map(len, ASPECTS.values())) + len(STYLES)
        self.layers = nn.Sequential(*layers, nn.Flatten(), nn.Linear(widths[-1] * 9, answers))

    def forward(self, pictures: Tensor) -> Tensor:  # noqa: D102
        return self.layers(pictures.to(self.layers[-1].weight.device))

    @torch.no_grad()
    def see(self, image: Image.Image) -> Seen:
        """The contents of one picture of any size."""
        scores = self(_square(image)[None])[0]
        kind, place, styles = scores.split([len(KINDS), len(PLACES), len(STYLES)])
        seen_kind = ASPECTS["kind"][kind.argmax()]
        seen_place = ASPECTS["place"][place.argmax()]
        worn_styles = frozenset(style for style, score in zip(STYLES, styles.tolist(), strict=True) if score > 0)
        return Seen(seen_kind, _colour(image, seen_kind, seen_place), seen_place, worn_styles)


def load() -> Recogniser:
    """A recogniser with the weights of the repository."""
    model = Recogniser()
    model.load_state_dict({key: value.float() for key, value in load_file(FILE).items()})
    return model.eval()


def _square(image: Image.Image) -> Tensor:
    """An image's middle square, [3, SIDE, SIDE] in [-1, 1]."""
    side = min(image.size)
    left, top = ((extent - side) // 2 for extent in image.size)
    small = image.crop((left, top, left + side, top + side)).resize((SIDE, SIDE), Image.Resampling.BOX)
    return torch.from_numpy(np.asarray(small, dtype=np.float32) / 127.5 - 1).permute(2, 0, 1)


def _shares(image: Image.Image) -> np.ndarray:
    """Shares of both body colours of each of the twelve named colours in the middle of a picture: [24]."""
    side = min(image.size) // 2
    left, top = ((extent - side) // 2 for extent in (image.width, image.height * 1.06))
    middle = image.crop((int(left), int(top), int(left) + side, int(top) + side)).resize((64, 64), Image.Resampling.BOX)
    pixels = np.asarray(middle, dtype=np.float32).reshape(-1, 1, 3)
    palette = np.array([colour for name in world.COLOURS for colour in body_colours(name)], dtype=np.float32)
    distance = np.linalg.norm(pixels - palette, axis=-1)  # [pixels, 24]
    nearest = np.eye(len(palette))[distance.argmin(axis=1)] * (distance.min(axis=1, keepdims=True) < NEAR)
    return nearest.mean(axis=0)


@cache
def _references(kind: str, place: str) -> dict[tuple[str, str], np.ndarray]:
    """The same statistics of procedural pictures, by colour and size."""
    return {
        (colour, size): _shares(draw(world.Scene(kind, colour, place, size), 256, 256))
        for colour in world.COLOURS
        for size in world.SIZES
    }


def _colour(image: Image.Image, kind: str, place: str) -> str:
    shares = _shares(image)
    references = _references(kind, place)
    return min(references, key=lambda it: np.abs(references[it] - shares).sum())[0]


def main(work: Path) -> None:
    """Train on procedural pictures alone, and write the weights."""
    torch.manual_seed(0)
    model = Recogniser()

    def loss_of(rng: np.random.Generator, _: float) -> Tensor:
        dice = random.Random(int(rng.integers(2**32)))
        scenes = [world.random_scene(dice, tuple(KINDS)) for _ in range(BATCH)]
        pictures = [scene_picture(scene, dice) for scene in scenes]
        scores = model(torch.stack([_square(worn(image, dice)) for image, _ in pictures]))
        kind, place, styles = scores.split([len(KINDS), len(PLACES), len(STYLES)], dim=1)
        wears = torch.tensor([[float(style in worn_styles) for style in STYLES] for _, worn_styles in pictures])
        return (
            F.cross_entropy(kind, torch.tensor([ASPECTS["kind"].index(scene.kind) for scene in scenes]))
            + F.cross_entropy(place, torch.tensor([ASPECTS["place"].index(scene.place) for scene in scenes]))
            + F.binary_cross_entropy_with_logits(styles, wears)
        )

    train("recogniser", model, STEPS, loss_of, work=work, rate=2e-3, ema=0.99)
    save_file({key: value.half() for key, value in model.state_dict().items()}, FILE)
