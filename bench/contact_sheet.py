"""docs/contact_sheet.png, from real predictions: python -m bench.contact_sheet draws it anew.

Each tile is a picture of `Flux.generate` of a megapixel, made small.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from PIL import Image, ImageDraw, ImageFont

from flux import Flux
from harness.loras import files
from request import LoraChoice, Request
from service.measure import Stopwatch
from settings import MINIATURE, ROOT, Settings

FILE = ROOT / "docs" / "contact_sheet.png"
LORAS = ROOT / "mini" / "loras"
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


def lora(name: str, scale: float = 1.0) -> LoraChoice:
    """One of the miniature's own."""
    return LoraChoice(str(LORAS / f"{name}.safetensors"), scale)


def rows(flux: Flux, folder: Path) -> Iterator[tuple[str, list[Tile]]]:
    """The rows of the sheet, each with a heading."""

    def drawn(prompt: str, **inputs: object) -> Image.Image:
        request = Request(prompt=prompt, **{"seed": SEED} | inputs)
        return flux.generate(request, files(request), Stopwatch(CPU)).images[0]

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


def lora_rows(drawn: Callable[..., Image.Image]) -> Iterator[tuple[str, list[Tile]]]:
    """Each LoRA at several scales, and pairs of them."""
    for name, prompt in (
        ("bold", "a blue bird in a meadow"),
        ("dusk", "a green tree in the desert"),
        ("zorp", "an orange zorp in the snow"),
    ):
        pictures = [(f"scale {scale:g}", drawn(prompt, loras=(lora(name, scale),))) for scale in SCALES]
        yield f"LoRA {name}: {prompt}", pictures
    prompt, pairs = "a green zorp in a meadow", [("zorp", "dusk"), ("zorp", "bold"), ("bold", "dusk")]
    combined = [
        (f"{main} {a:g} + {extra} {b:g}", drawn(prompt, loras=(lora(main, a), lora(extra, b))))
        for main, extra in pairs
        for a, b in ((1.0, 0.5), (1.0, 1.0))
    ]
    yield f"two LoRAs: {prompt}", combined


def sheet(flux: Flux, folder: Path) -> Image.Image:
    """All rows on white."""
    font, small = ImageFont.load_default(14), ImageFont.load_default(9)
    strips = []
    for heading, tiles in rows(flux, folder):
        strip = Image.new("RGB", (COLUMNS * (TILE + GAP) + GAP, TILE + 2 * LINE + GAP), "white")
        pen = ImageDraw.Draw(strip)
        pen.text((GAP, 0), heading, "black", font)
        for column, (caption, picture) in enumerate(tiles):
            left = GAP + column * (TILE + GAP)
            strip.paste(picture.convert("RGB").resize((TILE, TILE), Image.Resampling.LANCZOS), (left, LINE))
            pen.text((left, LINE + TILE + 1), caption, "gray", small)
        strips.append(strip)
        print(heading, flush=True)
    whole = Image.new("RGB", (strips[0].width, sum(strip.height for strip in strips)), "white")
    top = 0
    for strip in strips:
        whole.paste(strip, (0, top))
        top += strip.height
    return whole


def main() -> None:
    """Draw it."""
    with TemporaryDirectory() as folder:
        flux = Flux.load(Settings(models=MINIATURE, cache_dir=Path(folder) / "cache"), CPU)
        picture = sheet(flux, Path(folder))
    FILE.parent.mkdir(exist_ok=True)
    picture.quantize(256, dither=Image.Dither.NONE).save(FILE, optimize=True)


if __name__ == "__main__":
    main()
