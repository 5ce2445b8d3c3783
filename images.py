"""Pictures as files and as pixels: sizes, reading, fitting, masks, pasting back, writing; the door of pixels/.

Knows Pillow and numpy; knows nothing of FLUX, of Cog or of torch. Sizes are (width, height), as Pillow gives them;
arrays are [H, W] or [H, W, C]. Every error is a `ValueError` whose sentence is for the person who sent the file.
"""

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import ExifTags, Image, PngImagePlugin

from pixels.colour import flatten, plain, to_srgb
from pixels.decoding import LOSSY, decoded, turn
from pixels.masks import TRACE, cover, strengths
from settings import VERSION

Format = Literal["webp", "jpg", "png"]
Size = tuple[int, int]

# Width and height at one megapixel.
SIZES: dict[str, Size] = {
    "1:1": (1024, 1024),
    "16:9": (1344, 768),
    "21:9": (1536, 640),
    "3:2": (1216, 832),
    "2:3": (832, 1216),
    "4:5": (896, 1088),
    "5:4": (1088, 896),
    "3:4": (896, 1152),
    "4:3": (1152, 896),
    "9:16": (768, 1344),
    "9:21": (640, 1536),
}
GRID = 16
LONGEST_SIDE = 1440

# How hard libwebp looks for a smaller file, 0 to 6; its default is 4. Method 2 takes a third to a half of the time, and
# its files are at most a tenth larger at qualities up to 97, a quarter to two thirds at 100.
WEBP_METHOD = 2
SOFTWARE = f"flux-sprites {VERSION}"
# A JPEG segment holds 65,533 bytes; this leaves room for EXIF's headers and SOFTWARE.
JPEG_TEXT_BYTES = 65_000


def text_to_image_size(aspect_ratio: str, megapixels: str, width: int | None, height: int | None) -> Size:
    """The size of a picture that is drawn from text alone; `width` and `height` count only with "custom"."""
    if aspect_ratio == "custom":
        if width is None or height is None:
            raise ValueError("aspect_ratio is custom, which needs both width and height.")
        size = _nearest(width), _nearest(height)
        if size != (width, height):
            print(f"{_by((width, height))} is drawn at {_by(size)}: custom sides go to the nearest multiple of {GRID}.")
        return size
    if aspect_ratio not in SIZES:
        raise ValueError(f"aspect_ratio is {aspect_ratio!r}; it must be custom or one of {', '.join(SIZES)}.")
    if megapixels not in ("1", "0.25"):
        raise ValueError(f"megapixels is {megapixels!r}; it must be 1 or 0.25.")
    width, height = SIZES[aspect_ratio]
    return (width, height) if megapixels == "1" else (width // 2, height // 2)


def read_image(path: Path) -> Image.Image:
    """The first frame of a picture, upright, as sRGB on white; its `info` has its EXIF "orientation" alone."""
    with decoded(path, "image") as picture:
        flat = flatten(to_srgb(picture, "image"), "white")
        # Left in, Pillow would copy the photo's comment or colour profile into the files that are drawn from it.
        flat.info = {"orientation": picture.info["orientation"]}
    return flat


def fit(image: Image.Image) -> Image.Image:
    """The picture at the size that is drawn: its own, unless a side is longer than 1440."""
    longest = max(image.size)
    if longest <= LONGEST_SIDE:
        return image
    size = tuple(max(1, int(side * LONGEST_SIDE / longest + 0.5)) for side in image.size)
    print(f"image has {_by(image.size)} pixels; it is drawn at {_by(size)}: no side is longer than {LONGEST_SIDE}.")
    return image.resize(size, Image.Resampling.LANCZOS)


def read_mask(path: Path, image: Image.Image, size: Size) -> Image.Image:
    """How much of each pixel is drawn, as L from 0 (kept to the bit) to 255, at `size`, to which the image is fitted.

    White is drawn, black is kept, greys blend; transparent parts count as black. Colour profiles are ignored. `image`
    is what the mask belongs to, as `read_image` returns it.
    """
    with decoded(path, "mask") as picture:
        grey, lossy = flatten(picture, "black").convert("L"), picture.format in LOSSY
        darkest, brightest = grey.getextrema()
        grey.info = {"orientation": picture.info["orientation"]}
        why_nothing = _why_nothing(picture) if brightest <= TRACE else None
    if why_nothing is not None:
        raise ValueError(f"mask paints nothing: {why_nothing}.")
    drawn = strengths(_laid_on(grey, image), size, lossy=lossy)
    if drawn.getbbox() is None:
        raise ValueError(f"mask paints nothing: its greys are too faint or too small to be seen at {_by(size)} pixels.")
    if brightest < 128:
        print(
            f"mask is nowhere brighter than {brightest} of 255: at most {brightest / 255:.0%} of what is drawn shows."
        )
    if darkest > TRACE:
        print("mask is black nowhere: nothing of the image is kept as it is.")
    return drawn


def cells(drawn: Image.Image, side: int) -> Image.Image:
    """A mask for latents: white in each square of `side` pixels of which any part is drawn, else black.

    The pipeline looks at one pixel of each square: a thinner line would become dashes. `drawn` has whole squares.
    """
    touched = cover(np.asarray(drawn) > 0, (drawn.width // side, drawn.height // side))  # [H/side, W/side]
    return Image.fromarray(touched.astype(np.uint8) * 255).resize(drawn.size, Image.Resampling.NEAREST)


def extend(image: Image.Image, size: Size) -> Image.Image:
    """The picture at a size no smaller than its own, with its right and bottom edges repeated."""
    (width, height), (wide, high) = image.size, size
    pixels = np.asarray(image)  # [H, W] or [H, W, C]
    margins = [(0, high - height), (0, wide - width)] + [(0, 0)] * (pixels.ndim - 2)
    return Image.fromarray(np.pad(pixels, margins, mode="edge"))


def paste_back(drawn: Image.Image, original: Image.Image, mask: Image.Image) -> Image.Image:
    """`drawn` over `original`, blended by a mask of `read_mask`; all three have one size."""
    return Image.composite(drawn, original, mask)


def save(image: Image.Image, path: Path, format: Format, quality: int, metadata: Mapping[str, Any]) -> None:
    """Write a picture with what made it, as PNG texts or in EXIF: this version, and its metadata as JSON in UTF-8.

    A JPEG has room for 64 KiB: there the longest text of the metadata is cut, and "cut" gives the name of its field.
    `quality` is 0 to 100 for webp and jpg; png has no loss and ignores it.
    """
    encoded = io.BytesIO()  # written to the file afterwards: an encoder would not tell why it could not write
    match format:
        case "png":
            text = PngImagePlugin.PngInfo()
            text.add_text("Software", SOFTWARE)
            text.add_text("Description", _json(metadata).decode())
            image.save(encoded, "PNG", pnginfo=text)
        case "jpg":
            subsampling = "4:4:4" if quality >= 90 else "4:2:0"
            exif = _exif(_json(metadata, JPEG_TEXT_BYTES))
            image.save(encoded, "JPEG", quality=quality, subsampling=subsampling, exif=exif)
        case "webp":
            image.save(encoded, "WEBP", quality=quality, method=WEBP_METHOD, exif=_exif(_json(metadata)))
        case _:
            raise ValueError(f"output_format is {format!r}; it must be webp, jpg or png.")
    path.write_bytes(encoded.getbuffer())


def read_metadata(path: Path) -> dict[str, Any]:
    """The metadata that `save` wrote; a ValueError where there is none."""
    try:
        with Image.open(path, formats=("PNG", "JPEG", "WEBP")) as image:
            if isinstance(image, PngImagePlugin.PngImageFile):
                text = image.text["Description"]
            else:  # Pillow reads EXIF text as Latin-1, which keeps every byte
                text = image.getexif()[ExifTags.Base.ImageDescription].encode("latin-1")
        made = json.loads(text)
    except Exception:  # hostile bytes make decoders, and JSON's, raise anything
        made = None
    if not isinstance(made, dict):
        raise ValueError("This file does not say how it was made.")
    return made


def _nearest(side: float) -> int:
    """The multiple of 16 nearest to a side in pixels; halves go up; never below 16."""
    return max(GRID, int(side / GRID + 0.5) * GRID)


def _by(size: Size) -> str:
    return f"{size[0]}x{size[1]}"


def _laid_on(mask: Image.Image, image: Image.Image) -> Image.Image:
    """The mask, turned like its picture where it has the size of the stored pixels; other aspects are a ValueError."""
    # The sides of either may have been rounded, or cut, by a pixel.
    (width, height), (wide, high) = mask.size, image.size
    if abs(width * high - height * wide) <= max(*mask.size, *image.size):
        return mask
    orientation = image.info["orientation"]
    if orientation >= 5 and mask.size == image.size[::-1]:
        if (turned := mask.info["orientation"]) >= 5:  # some programs turn the pixels, and keep the EXIF number
            print("mask has the size of the image only without its own EXIF rotation, which is ignored.")
            return turn(mask, {6: 8, 8: 6}.get(turned, turned))
        print("mask has the size of the image before its EXIF rotation; it is turned like the image.")
        return turn(mask, orientation)
    raise ValueError(
        f"mask has {_by(mask.size)} pixels and image {_by(image.size)}; a mask must have the size of its image, or "
        "the same aspect ratio."
    )


def _why_nothing(picture: Image.Image) -> str:
    """The likely reason why a mask is all black, as the end of a sentence."""
    colours, white = plain(picture), 255
    alpha = colours.getchannel("A").getextrema() if colours.mode in ("LA", "RGBA") else (255, 255)
    brightest = max(high for _, high in colours.convert("RGB").getextrema())
    halved = picture.info["halved"]
    if picture.mode.startswith("I;16") and (stored := int(np.asarray(picture).max())) < 2**15:  # black is 0 there
        brightest, white = stored, 65535
    if picture.mode == "F" and brightest > 0:
        return f"its brightest value is {picture.getextrema()[1]:.2g}, which is as good as black"
    if brightest == 1 and not halved:
        return f"its values are 0 and 1, both of which are black; white is {white}: multiply them by {white}"
    if alpha == (0, 1) and brightest > 0 and not halved:
        return "its transparency has the values 0 and 1, both of which are clear; opaque is 255: multiply them by 255"
    if alpha[0] < alpha[1]:
        return "its shape is in its transparency alone, which counts as black; paint white what is to be drawn"
    if halved and alpha[1] > 0:
        return "it is black or as good as black; in 16 bits white is 65535"
    if brightest == 0:
        return "it is all black; paint white what is to be drawn"
    if alpha[0] < 255:
        return "it is transparent all over, which counts as black"
    return f"its brightest value is {brightest}, which is as good as black; white is {white}"


def _json(metadata: Mapping[str, Any], limit: int | None = None) -> bytes:
    """UTF-8 JSON of at most `limit` bytes: while it is longer, the longest text is cut."""
    # UTF-8 has no lone surrogates; their backslash escapes are what JSON would write.
    text = json.dumps(dict(metadata), ensure_ascii=False).encode(errors="backslashreplace")
    if limit is None or len(text) <= limit:
        return text
    name, longest = max(((k, v) for k, v in metadata.items() if isinstance(v, str)), key=lambda item: len(item[1]))
    # JSON writes a character in one to six bytes: dropping a sixth of the excess never cuts too much.
    kept = min(limit, len(longest) - (len(text) - limit) // 6 - 1)
    return _json({**metadata, name: longest[:kept], "cut": name}, limit)


def _exif(text: bytes) -> Image.Exif:
    exif = Image.Exif()
    exif[ExifTags.Base.ImageDescription] = text
    exif[ExifTags.Base.Software] = SOFTWARE
    return exif
