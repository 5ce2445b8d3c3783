"""Pictures to train recognition on: scenes in every style, with flaws, and pictures without a scene."""

import io
import random

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from images import SIZES
from mini.training import world
from mini.training.drawing import STYLES, draw

SIDE = 144  # pixels of the shorter side: more than any model here uses


def scene_picture(scene: world.Scene, rng: random.Random, side: int = SIDE) -> tuple[Image.Image, frozenset[str]]:
    """A picture of a scene at any aspect ratio, sometimes with styles, and its styles; `side` is the shorter side."""
    styles = frozenset(style for style in STYLES if rng.random() < 0.2)
    width, height = rng.choice((SIZES["1:1"], *SIZES.values()))
    shrink = side / min(width, height)
    return draw(scene, round(width * shrink), round(height * shrink), tuple(styles)), styles


def worn(image: Image.Image, rng: random.Random) -> Image.Image:
    """The image with random flaws, or none: blur, noise, wrong colours, a crop, traces of a JPEG."""
    if rng.random() < 0.3:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 1.6)))
    if rng.random() < 0.3:
        dx, dy = (round(side * 0.06) for side in image.size)
        left, top = rng.randint(0, dx), rng.randint(0, dy)
        image = image.crop((left, top, image.width - dx + left, image.height - dy + top))
    pixels = np.asarray(image, dtype=np.float32)
    if rng.random() < 0.4:
        noise = np.random.default_rng(rng.getrandbits(32))
        coarse = noise.normal(
            0, rng.uniform(2, 26), (*(side // rng.choice((1, 4, 8)) + 1 for side in pixels.shape[:2]), 3)
        )
        spread = Image.fromarray(np.clip(coarse + 128, 0, 255).astype(np.uint8)).resize(image.size)
        pixels = pixels + np.asarray(spread, dtype=np.float32) - 128
    if rng.random() < 0.3:
        pixels = pixels * rng.uniform(0.8, 1.15) + rng.uniform(-20, 20)
    image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    if rng.random() < 0.2:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=rng.randint(20, 90))
        image = Image.open(buffer).convert("RGB")
    return image


def nothing(rng: random.Random) -> Image.Image:
    """A picture without a scene: noise, a gradient, blurred blots as in photographs, or loose shapes."""
    noise = np.random.default_rng(rng.getrandbits(32))
    kind = rng.choice(("noise", "gradient", "blots", "shapes", "shapes"))
    if kind == "shapes":
        return _shapes(rng)
    if kind == "gradient":
        y, x = np.mgrid[0:SIDE, 0:SIDE] / SIDE
        ends = noise.uniform(0, 255, (3, 3))
        pixels = ends[0] + x[..., None] * (ends[1] - ends[0]) + y[..., None] * (ends[2] - ends[0])
        return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    side = rng.choice((2, 3, 5, 9, 18)) if kind == "blots" else rng.choice((36, SIDE))
    small = Image.fromarray(noise.integers(0, 256, (side, side, 3), dtype=np.uint8))
    return small.resize((SIDE, SIDE), Image.Resampling.BICUBIC)


def _shapes(rng: random.Random) -> Image.Image:
    def colour() -> tuple[int, ...]:
        if rng.random() < 0.5:
            return rng.choice(list(world.COLOURS.values()))[1]
        return tuple(rng.randrange(256) for _ in range(3))

    back = colour()
    image = Image.new("RGB", (SIDE, SIDE), back)
    pen = ImageDraw.Draw(image)
    for _ in range(rng.randint(1, 6)):
        x, y, r = rng.uniform(0, SIDE), rng.uniform(0, SIDE), rng.uniform(0.05, 0.35) * SIDE
        box = (x - r, y - r * rng.uniform(0.4, 1.4), x + r, y + r)
        form = rng.choice(("ellipse", "box", "moon", "triangle"))
        if form == "box":
            pen.rectangle(box, colour())
        elif form == "triangle":
            pen.polygon([(x + rng.uniform(-r, r), y + rng.uniform(-r, r)) for _ in range(3)], colour())
        else:
            pen.ellipse(box, colour())
            if form == "moon":
                shift = r * rng.uniform(-0.5, 0.5)
                pen.ellipse((box[0] + shift, box[1] - r * 0.3, box[2] + shift, box[3] - r * 0.3), back)
    return image
