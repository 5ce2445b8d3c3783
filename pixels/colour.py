"""A decoded picture of any mode and colour profile → sRGB, with transparency laid on a background."""

import io
from typing import Literal

import numpy as np
from PIL import Image, ImageCms

from service.device_thread import check_cancelled

# Pillow's modes by a profile's name for its pixels.
MODES = {"RGB ": "RGB", "GRAY": "L", "CMYK": "CMYK"}
PHOTOMETRIC, WHITE_IS_ZERO = 262, 0
# lcms reads no more tags of a profile.
MAX_TAGS = 100
# Pixels converted in one call, which takes a tenth of a second.
PIECE = 2**22


def flatten(picture: Image.Image, background: Literal["white", "black"]) -> Image.Image:
    """Any mode to RGB, transparency laid on a background."""
    picture = plain(picture)
    if picture.mode in ("LA", "RGBA"):
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, background), picture)
    return picture.convert("RGB")


def plain(picture: Image.Image) -> Image.Image:
    """Any mode to one of eight bits for each colour: L, LA, RGB, RGBA, CMYK or LAB."""
    if picture.mode.startswith(("I", "F")):
        return _eight_bits(picture)
    grey = picture.mode in ("1", "L", "LA", "La")
    if picture.has_transparency_data:
        return picture.convert("LA" if grey else "RGBA")
    if grey:
        return picture.convert("L")
    return picture if picture.mode in ("CMYK", "LAB") else picture.convert("RGB")


def to_srgb(picture: Image.Image, name: str) -> Image.Image:
    """The picture with its colours converted from the profile in its `info`, if any; the log calls it `name`."""
    if "icc_profile" not in picture.info or picture.mode == "LAB":  # a colour space of its own
        return picture
    converted = plain(picture)
    try:
        # None stands for a profile that Pillow could not unpack.
        content = picture.info["icc_profile"] or b""
        _check_elements(content)
        profile = ImageCms.ImageCmsProfile(io.BytesIO(content))
        colours = converted.convert({"LA": "L", "RGBA": "RGB"}.get(converted.mode, converted.mode))
        mode = MODES[profile.profile.xcolor_space]
        if (colours.mode, mode) == ("L", "RGB"):  # some programs keep the profile when they make a picture grey
            colours = colours.convert(mode)
        srgb = _converted(colours, ImageCms.buildTransform(profile, ImageCms.createProfile("sRGB"), mode, "RGB"))
    except (ImageCms.PyCMSError, OSError, KeyError, ValueError, TypeError):
        print(f"{name}: its colour profile is damaged, or not for its pixels; it is ignored.")
        return converted
    if converted.mode in ("LA", "RGBA"):
        srgb.putalpha(converted.getchannel("A"))
    return srgb


def _check_elements(profile: bytes) -> None:
    """Refuse a profile of processing elements: a kilobyte can name 100,000 of them, and each takes a millisecond."""
    for entry in range(132, min(len(profile), 132 + 12 * MAX_TAGS), 12):
        start = int.from_bytes(profile[entry + 4 : entry + 8])
        if profile[start : start + 4] == b"mpet":
            raise ValueError


def _converted(colours: Image.Image, transform: ImageCms.ImageCmsTransform) -> Image.Image:
    """RGB, L or CMYK to RGB; unchanged where the profile is sRGB, so that no rounding changes a pixel."""
    if colours.mode == "RGB":
        levels = np.linspace(0, 255, 18).astype(np.uint8)
        samples = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(18, -1, 3)
        changed = np.asarray(transform.apply(Image.fromarray(samples))).astype(int) - samples
        if np.abs(changed).max() <= 1:
            return colours
    srgb = Image.new("RGB", colours.size)
    rows = max(1, PIECE // colours.width)
    for top in range(0, colours.height, rows):
        check_cancelled()
        piece = colours.crop((0, top, colours.width, min(top + rows, colours.height)))
        srgb.paste(transform.apply(piece), (0, top))
    return srgb


def _eight_bits(picture: Image.Image) -> Image.Image:
    """A grey of 16 or 32 bits or of floats as L or LA; Pillow's own conversion would cut it off at 255.

    White is 65535 in 16 bits. The other two have no such number: it is the first of the usual ones that pixels exceed
    by no more than a filter's overshoot. A TIFF whose white is 0, which Pillow does not invert here, is inverted.
    """
    values = np.asarray(picture)  # [H, W]
    clear = values == picture.info["transparency"] if "transparency" in picture.info else None
    values = np.nan_to_num(values.astype(np.float32))
    usual = {"F": (1, 255, 65535), "I": (255, 65535)}.get(picture.mode, (65535,))
    white = next((top for top in usual if values.max() <= 1.25 * top), values.max())
    values = np.rint(np.clip(values / white, 0, 1) * 255).astype(np.uint8)
    if picture.format == "TIFF" and picture.tag_v2.get(PHOTOMETRIC) == WHITE_IS_ZERO:
        values = 255 - values
    grey = Image.fromarray(values)
    if clear is not None:
        grey.putalpha(Image.fromarray(np.where(clear, 0, 255).astype(np.uint8)))
    return grey
