"""The colours of a decoded picture, in any mode, by any profile → sRGB, transparency laid on a background."""

import io
from typing import Literal

import numpy as np
from PIL import Image, ImageCms

from service.device_thread import check_cancelled

# Which pixels a profile describes, by the name that it has for them.
MODES = {"RGB ": "RGB", "GRAY": "L", "CMYK": "CMYK"}
PHOTOMETRIC, WHITE_IS_ZERO = 262, 0
# As many as lcms reads of a profile.
MAX_TAGS = 100
# Converted in one call, in pixels: a call takes a tenth of a second.
PIECE = 2**22


def flatten(picture: Image.Image, background: Literal["white", "black"]) -> Image.Image:
    """Any mode to RGB, transparency laid on a background."""
    picture = plain(picture)
    if picture.mode in ("LA", "RGBA"):
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, background), picture)
    return picture.convert("RGB")


def plain(picture: Image.Image) -> Image.Image:
    """Any mode to one that has eight bits for each of its own colours: L, LA, RGB, RGBA, CMYK or LAB."""
    if picture.mode.startswith(("I", "F")):
        return _eight_bits(picture)
    grey = picture.mode in ("1", "L", "LA", "La")
    if picture.has_transparency_data:
        return picture.convert("LA" if grey else "RGBA")
    if grey:
        return picture.convert("L")
    return picture if picture.mode in ("CMYK", "LAB") else picture.convert("RGB")


def to_srgb(picture: Image.Image, name: str) -> Image.Image:
    """The picture with its colours converted from the profile in its file, where there is one.

    Args:
        picture: decoded; its `info` has the profile.
        name: the input that the log speaks of.
    """
    if "icc_profile" not in picture.info or picture.mode == "LAB":  # which is a colour space of its own
        return picture
    converted = plain(picture)
    try:
        # Pillow gives None for one that it could not unpack.
        content = picture.info["icc_profile"] or b""
        _check_elements(content)
        profile = ImageCms.ImageCmsProfile(io.BytesIO(content))
        colours = converted.convert({"LA": "L", "RGBA": "RGB"}.get(converted.mode, converted.mode))
        mode = MODES[profile.profile.xcolor_space]
        if (colours.mode, mode) == ("L", "RGB"):  # as programs write greys of colour pictures
            colours = colours.convert(mode)
        srgb = _converted(colours, ImageCms.buildTransform(profile, ImageCms.createProfile("sRGB"), mode, "RGB"))
    except (ImageCms.PyCMSError, OSError, KeyError, ValueError, TypeError):
        print(f"{name}: its colour profile is damaged, or not for its pixels; it is ignored.")
        return converted
    if converted.mode in ("LA", "RGBA"):
        srgb.putalpha(converted.getchannel("A"))
    return srgb


def _check_elements(profile: bytes) -> None:
    """Refuse a profile of processing elements: a kilobyte can name a hundred thousand, each a call's millisecond."""
    for entry in range(132, min(len(profile), 132 + 12 * MAX_TAGS), 12):
        start = int.from_bytes(profile[entry + 4 : entry + 8])
        if profile[start : start + 4] == b"mpet":
            raise ValueError


def _converted(colours: Image.Image, transform: ImageCms.ImageCmsTransform) -> Image.Image:
    """RGB, L or CMYK to RGB; as it is, where the profile means sRGB, so that no rounding changes a pixel."""
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
    """A grey of 16 or 32 bits or of floats as L or LA, which Pillow's own conversion would cut off at 255.

    16 bits reach from 0 to 65535. The other two have no white of their own: it is the first of the usual ones that
    pixels exceed by no more than a filter's overshoot. Of these, Pillow leaves a TIFF whose white is 0 as it is.
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
