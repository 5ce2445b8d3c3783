"""Draw the sheets of pictures in docs/ anew, with real predictions: python -m bench.contact_sheet [masks] ….

Each tile is a picture of `Flux.generate`, made small.
"""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from PIL import Image, ImageDraw, ImageFilter, ImageFont, ImageOps

import images
from flux import Flux
from harness.loras import choice, files
from harness.profiles import P3
from request import Request
from service.measure import Stopwatch
from settings import MINIATURE, ROOT, Settings

DOCS = ROOT / "docs"
CPU = torch.device("cpu")
TILE, GAP, LINE = 176, 8, 18  # pixels
COLUMNS = 6
SEED = 1
PROMPTS = (
    "a red fox",
    "a turquoise snail in the snow",
    "a purple robot at night",
    "a yellow house with a hat in the desert",
    "a pink ghost, sleeping, in the forest",
    "a huge green mushroom at sunset",
)
SCALES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5)
STRENGTHS = (0.0, 0.3, 0.5, 0.7, 0.85, 1.0)
Tile = tuple[str, Image.Image]
Row = tuple[str, list[Tile]]


def rows(drawn: Callable[..., Image.Image], folder: Path) -> Iterator[Row]:
    """Rows of megapixel pictures: dev, schnell, LoRAs, image to image, inpainting."""
    yield "dev, 28 steps", [(prompt, drawn(prompt)) for prompt in PROMPTS]
    yield (
        "schnell, 4 steps",
        [(prompt, drawn(prompt, model="schnell", num_inference_steps=4)) for prompt in PROMPTS],
    )
    yield from lora_rows(drawn)
    image, mask = folder / "image.png", folder / "mask.png"
    before = drawn("a grey cat in a meadow")
    before.save(image)
    yield (
        "image to image: a grey cat in a meadow, drawn over as an orange fox in the snow",
        [
            (f"strength {strength:g}", drawn("an orange fox in the snow", image=image, prompt_strength=strength))
            for strength in STRENGTHS
        ],
    )
    painted = Image.new("L", before.size)
    ImageDraw.Draw(painted).rectangle((0, 0, before.width, before.height * 0.62), 255)
    painted.save(mask)
    prompts = ("a grey cat at night", "a grey cat at sunset", "a red cat with a hat", "a purple robot in a meadow")
    yield (
        "inpainting: white is painted",
        [("image", before), ("mask", painted)]
        + [(prompt, drawn(prompt, image=image, mask=mask, prompt_strength=0.9)) for prompt in prompts],
    )


def lora_rows(drawn: Callable[..., Image.Image]) -> Iterator[Row]:
    """Each LoRA at several scales, and pairs of them."""
    for name, prompt in (
        ("bold", "a blue bird in a meadow"),
        ("dusk", "a green tree in the desert"),
        ("zorp", "an orange zorp in the snow"),
    ):
        pictures = [(f"scale {scale:g}", drawn(prompt, loras=(choice(name, scale),))) for scale in SCALES]
        yield f"LoRA {name}: {prompt}", pictures
    prompt, pairs = "a green zorp in a meadow", [("zorp", "dusk"), ("zorp", "bold"), ("bold", "dusk")]
    combined = [
        (f"{main} {a:g} + {extra} {b:g}", drawn(prompt, loras=(choice(main, a), choice(extra, b))))
        for main, extra in pairs
        for a, b in ((1.0, 0.5), (1.0, 1.0))
    ]
    yield f"two LoRAs: {prompt}", combined


def mask_rows(drawn: Callable[..., Image.Image], folder: Path) -> Iterator[Row]:
    """Rows of masks: soft ones, a thin stroke, odd sizes, and another colour profile."""
    image, mask = folder / "image.png", folder / "mask.png"
    before = drawn("a grey cat in a meadow", aspect_ratio="custom", width=640, height=480)
    before.save(image)

    def inpainted(painted: Image.Image, prompt: str) -> Image.Image:
        painted.save(mask)
        return drawn(prompt, image=image, mask=mask, prompt_strength=1)

    ramp = Image.linear_gradient("L").rotate(90).resize(before.size)
    disc = Image.new("L", before.size)
    ImageDraw.Draw(disc).ellipse((170, 90, 470, 390), 255)
    disc = disc.filter(ImageFilter.GaussianBlur(30))
    yield (
        "soft masks blend by their grey",
        [
            ("image, 640x480", before),
            ("a ramp", ramp),
            ("a grey cat at night", inpainted(ramp, "a grey cat at night")),
            ("a feathered disc", disc),
            ("a red cat in a meadow", inpainted(disc, "a red cat in a meadow")),
        ],
    )
    stroke = Image.new("L", (4032, 3024))
    zigzag = [(400 + 500 * step, 700 + 1500 * (step % 2)) for step in range(7)]
    ImageDraw.Draw(stroke).line(zigzag, 255, width=4)
    before.resize(stroke.size).save(image)
    stroke.save(mask)
    painted = images.read_mask(mask, images.read_image(image), (1440, 1080))
    part = (120, 200, 120 + TILE, 200 + TILE)
    yield (
        "a stroke of 4 pixels in 4032x3024, drawn at 1440x1080",
        [("mask", stroke), ("a part of it, as it is drawn", painted.crop(part))],
    )
    odd = before.resize((501, 333))
    odd.save(image)
    again = drawn("an orange fox in the snow", image=image, prompt_strength=0.85)
    assert again.size == odd.size
    wide = Image.new("RGB", (333, 250), (200, 60, 40))
    wide.save(folder / "p3.png", icc_profile=P3)
    srgb = drawn("", image=folder / "p3.png", prompt_strength=0)
    yield (
        "any size to the pixel, and Display P3",
        [
            ("image, 501x333", odd),
            ("an orange fox in the snow, 501x333", again),
            ("P3's (200, 60, 40) taken as sRGB", wide),
            (f"converted: {srgb.getpixel((0, 0))}", srgb),
        ],
    )


SHEETS = {"contact_sheet": rows, "masks": mask_rows}


def sheet(strips: Iterator[Row]) -> Image.Image:
    """One picture of all rows, on white."""
    font, small = ImageFont.load_default(14), ImageFont.load_default(9)
    pictures = []
    for heading, tiles in strips:
        small_ones = [
            (caption, ImageOps.contain(picture.convert("RGB"), (TILE, TILE), Image.Resampling.LANCZOS))
            for caption, picture in tiles
        ]
        height = max(picture.height for _, picture in small_ones)
        strip = Image.new("RGB", (COLUMNS * (TILE + GAP) + GAP, height + 2 * LINE + GAP), "white")
        pen = ImageDraw.Draw(strip)
        pen.text((GAP, 0), heading, "black", font)
        for column, (caption, picture) in enumerate(small_ones):
            left = GAP + column * (TILE + GAP)
            strip.paste(picture, (left, LINE))
            pen.text((left, LINE + height + 1), caption, "gray", small)
        pictures.append(strip)
        print(heading, flush=True)
    whole = Image.new("RGB", (pictures[0].width, sum(strip.height for strip in pictures)), "white")
    top = 0
    for strip in pictures:
        whole.paste(strip, (0, top))
        top += strip.height
    return whole


def main() -> None:
    """Draw the sheets that the command line names, or all."""
    with TemporaryDirectory() as folder:
        flux = Flux.load(Settings(models=MINIATURE, cache_dir=Path(folder) / "cache"), CPU)

        def drawn(prompt: str, **inputs: object) -> Image.Image:
            request = Request(prompt=prompt, **{"seed": SEED} | inputs)
            return flux.generate(request, files(request), Stopwatch(CPU)).images[0]

        for name in sys.argv[1:] or SHEETS:
            sheet(SHEETS[name](drawn, Path(folder))).save(DOCS / f"{name}.png", optimize=True)


if __name__ == "__main__":
    main()
