"""Pictures as files and as pixels: sizes, reading, fitting, masks, pasting back, writing.

Knows Pillow and numpy; knows nothing of FLUX, of Cog or of torch. Sizes are (width, height), as Pillow gives them;
arrays are [H, W] or [H, W, C]. Every error is a `ValueError` whose sentence is for the person who sent the file.
"""

import io
import json
import mmap
import re
import struct
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import ExifTags, Image, ImageOps, PngImagePlugin, UnidentifiedImageError

from service.device_thread import check_cancelled
from service.faults import out_of_memory

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

# What people send. Pillow's other readers, and the holes in them, stay closed to strangers' files.
READ_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")

# A bound on what a small file can make us decode. Pillow enforces twice its number before it decodes, for tiles and
# frames too, and warns above the number itself; that warning would only frighten whoever sent a large photo.
MAX_PIXELS = 100_000_000
Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
# Readers warn of what is odd in a stranger's file.
warnings.filterwarnings("ignore", module=r"PIL\.")

# Each scan of a progressive JPEG goes over all its pixels, however few bytes it has; encoders make some ten of them.
MAX_SCANS = 50
# The same in all: a progressive JPEG of the largest size has ten scans or so.
MAX_SCANNED_PIXELS = 15 * MAX_PIXELS
# What begins a segment of a JPEG, or ends the file: no byte of pixels, no marker without a segment, no filling.
MARKER = re.compile(rb"\xff([^\x00\x01\xd0-\xd7\xff])", re.DOTALL)
SCAN, END = b"\xda", b"\xd9"

# How many numbers a TIFF may have under one tag, such as one for each of its strips: Pillow makes objects of them, and
# of the strips, in one call for all, at 20 microseconds and 360 bytes each.
MAX_NUMBERS = 100_000
# In how many entries it may say what it is.
MAX_ENTRIES = 65_535
TIFF_HEADS = (b"II*\0", b"MM\0*", b"II\0*", b"MM*\0", b"II+\0", b"MM\0+")
# The types that are bytes or text, which Pillow leaves as they are.
TIFF_BYTES = (1, 2, 6, 7)

# How often a reader may ask for more of a file: once for each part of it, such as a comment, whose object it keeps.
MAX_READS = 1_000_000

# A JPEG segment holds 65,533 bytes; this leaves room for the EXIF headers around one text.
JPEG_TEXT_BYTES = 65_000


def text_to_image_size(aspect_ratio: str, megapixels: str, width: int | None, height: int | None) -> Size:
    """The size of a picture that is drawn from text alone.

    Args:
        aspect_ratio: a key of `SIZES`, or "custom", which takes `width` and `height`, each to the nearest multiple
            of 16, and ignores `megapixels`.
        megapixels: "1", or "0.25" for half of each side.
    """
    if aspect_ratio == "custom":
        if width is None or height is None:
            raise ValueError("aspect_ratio is custom, which needs both width and height.")
        return _nearest(width), _nearest(height)
    if aspect_ratio not in SIZES:
        raise ValueError(f"aspect_ratio is {aspect_ratio!r}; it must be custom or one of {', '.join(SIZES)}.")
    if megapixels not in ("1", "0.25"):
        raise ValueError(f"megapixels is {megapixels!r}; it must be 1 or 0.25.")
    width, height = SIZES[aspect_ratio]
    return (width, height) if megapixels == "1" else (width // 2, height // 2)


def read_image(path: Path) -> Image.Image:
    """The first frame of a picture, upright, as RGB on white, without the file's own metadata."""
    return _read(path, "image", background="white")


def fit(image: Image.Image) -> Image.Image:
    """The picture at the size that is drawn: at most 1440 a side, each side the nearest multiple of 16, at least 16."""
    shrink = max(1, max(image.size) / LONGEST_SIDE)
    width, height = (_nearest(side / shrink) for side in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS)


def read_mask(path: Path, size: Size) -> Image.Image:
    """What to paint, as L of 0 (keep) and 255 (paint), at `size`, the size of the fitted picture.

    White is painted, grey from 128 up. Transparency is laid on black: where a mask says nothing, the picture is kept.
    """
    mask = _read(path, "mask", background="black").convert("L").resize(size, Image.Resampling.NEAREST)
    return mask.point([0] * 128 + [255] * 128)


def extend(image: Image.Image, size: Size) -> Image.Image:
    """The picture at a size no smaller than its own, its right and bottom edges repeated."""
    (width, height), (wide, high) = image.size, size
    pixels = np.asarray(image)  # [H, W] or [H, W, C]
    margins = [(0, high - height), (0, wide - width)] + [(0, 0)] * (pixels.ndim - 2)
    return Image.fromarray(np.pad(pixels, margins, mode="edge"))


def paste_back(drawn: Image.Image, original: Image.Image, mask: Image.Image) -> Image.Image:
    """`drawn` inside the mask and `original`, to the bit, outside; all three have one size.

    A seam as wide as 1/128 of the shorter side blends the two, inside the mask. Where the mask is too thin for it, the
    seam is as deep as the mask is, so that the middle of a thin line is painted at full strength too.
    """
    seam = max(1, min(mask.size) // 128)  # pixels
    inside = (np.asarray(mask) >= 128).astype(np.uint8)  # [H, W]
    # How far each pixel lies from the nearest one that is kept, at most `seam`; beyond the picture nothing is kept.
    depth = inside.copy()
    for _ in range(seam - 1):
        inside = 1 - _spread(1 - inside)
        depth += inside
    deepest = depth
    for _ in range(seam):
        deepest = _spread(deepest)
    strength = np.rint(255 * (depth / np.maximum(deepest, 1))).astype(np.uint8)
    return Image.composite(drawn, original, Image.fromarray(strength))


def save(image: Image.Image, path: Path, format: Format, quality: int, metadata: Mapping[str, Any]) -> None:
    """Write a picture with what made it.

    Args:
        quality: 0 (smallest) to 100 (best) for webp and jpg; png has no loss and ignores it.
        metadata: anything that JSON can say. It is written as PNG text "Description" or EXIF ImageDescription, in
            UTF-8. A JPEG has room for 64 KiB: there the longest text is cut, and "cut" gives the name of its field.
    """
    # Written when it is whole: an encoder that writes by itself does not say why it could not.
    encoded = io.BytesIO()
    match format:
        case "png":
            text = PngImagePlugin.PngInfo()
            text.add_text("Description", _json(metadata).decode())
            image.save(encoded, "PNG", pnginfo=text)
        case "jpg":
            subsampling = "4:4:4" if quality >= 90 else "4:2:0"
            exif = _exif(_json(metadata, JPEG_TEXT_BYTES))
            image.save(encoded, "JPEG", quality=quality, subsampling=subsampling, exif=exif)
        case "webp":
            image.save(encoded, "WEBP", quality=quality, exif=_exif(_json(metadata)))
        case _:
            raise ValueError(f"output_format is {format!r}; it must be webp, jpg or png.")
    path.write_bytes(encoded.getbuffer())


def read_metadata(path: Path) -> dict[str, Any]:
    """What `save` wrote beside the pixels."""
    try:
        with Image.open(path, formats=("PNG", "JPEG", "WEBP")) as image:
            if isinstance(image, PngImagePlugin.PngImageFile):
                return json.loads(image.text["Description"])
            # Pillow takes EXIF text for Latin-1, which keeps every byte.
            return json.loads(image.getexif()[ExifTags.Base.ImageDescription].encode("latin-1"))
    except (OSError, KeyError, ValueError):
        raise ValueError("This file does not say how it was made.") from None


def _nearest(side: float) -> int:
    """The multiple of 16 nearest to a side in pixels; halves go up; never below 16."""
    return max(GRID, int(side / GRID + 0.5) * GRID)


class _Watched(io.BufferedReader):
    """A file that is read no longer than somebody waits for it: Pillow's readers ask for a little at a time."""

    reads = 0

    def read(self, size: int | None = -1, /) -> bytes:
        check_cancelled()
        self.reads += 1
        if self.reads > MAX_READS:
            raise _PartsError("a file of too many parts")
        return super().read(size)


class _PartsError(Exception):
    """A file that is small, and takes long: what it is."""


def _check_scans(file: io.BufferedReader, pixels: int) -> None:
    """Refuse a JPEG of too many scans, which would take minutes of a call that nothing can interrupt."""
    scans, position = 0, 2
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        while (found := MARKER.search(content, position)) and found[1] != END:
            check_cancelled()
            scans += found[1] == SCAN
            if scans > MAX_SCANS or scans * pixels > MAX_SCANNED_PIXELS:
                raise _PartsError(f"a JPEG of too many scans: more than {MAX_SCANS}, or than its size allows")
            position = found.end() + int.from_bytes(content[found.end() : found.end() + 2])


def _check_numbers(file: io.BufferedReader) -> None:
    """Refuse a TIFF of too many numbers under one tag of its first frame, whose tags are read as Pillow reads them."""
    head = file.read(16)
    if head.startswith(TIFF_HEADS):
        order, large = "<" if head.startswith(b"I") else ">", head[2:3] == b"+"
        offset, count, entry = (order + code for code in (("8xQ", "Q", "2xHQ8x") if large else ("4xI", "H", "2xHI4x")))
        file.seek(*struct.unpack_from(offset, head))
        entries = struct.unpack(count, file.read(struct.calcsize(count)))[0]
        content = file.read(min(entries, MAX_ENTRIES) * struct.calcsize(entry))
        # Of a directory that is cut off, Pillow takes the entries that are there.
        whole = content[: len(content) - len(content) % struct.calcsize(entry)]
        numbers = [number for kind, number in struct.iter_unpack(entry, whole) if kind not in TIFF_BYTES]
        if entries > MAX_ENTRIES or any(number > MAX_NUMBERS for number in numbers):
            most = f"{MAX_NUMBERS:,} strips, tiles or other numbers under one tag, or {MAX_ENTRIES:,} tags"
            raise _PartsError(f"a TIFF of too many parts: more than {most}")
    file.seek(0)


def _read(path: Path, name: str, background: str) -> Image.Image:
    """The first frame of a file, upright, as RGB on a background; `name` is the input that the errors speak of."""
    try:
        # An open file, for Pillow maps one that it opens by name into memory and then garbles TIFFs that lie on a side.
        with _Watched(io.FileIO(path)) as file:
            _check_numbers(file)
            with Image.open(file, formats=READ_FORMATS) as picture:
                if picture.format in ("JPEG", "MPO"):
                    _check_scans(file, picture.width * picture.height)
                picture.load()
                with suppress(Exception):  # broken EXIF is no reason to refuse good pixels: they stay as they lie
                    ImageOps.exif_transpose(picture, in_place=True)
                flat = _flatten(picture, background)
    except Image.DecompressionBombError as error:
        pixels = int(re.search(r"\d+", str(error)).group())
        raise ValueError(
            f"{name} is too large: it has {pixels / 1e6:,.1f} megapixels, of at most {MAX_PIXELS / 1e6:g}."
        ) from None
    except _PartsError as error:
        raise ValueError(f"{name} is {error}.") from None
    except UnidentifiedImageError:
        accepted = f"{', '.join(READ_FORMATS[:-1])} or {READ_FORMATS[-1]}"
        raise ValueError(f"{name} is not a picture in a known format; send {accepted}.") from None
    except Exception as error:  # hostile bytes bring out anything from a decoder, and its message may contain the path
        if out_of_memory(error):
            raise
        raise ValueError(f"{name} could not be decoded: the file is damaged, cut off or of a rare kind.") from None
    # Left in, Pillow would copy the photo's comment or colour profile into the files that are drawn from it.
    flat.info = {}
    return flat


def _flatten(picture: Image.Image, background: str) -> Image.Image:
    """Any mode to RGB, transparency laid on a background."""
    if picture.mode.startswith(("I", "F")):
        picture = _eight_bits(picture)
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, background), picture)
    return picture.convert("RGB")


def _eight_bits(picture: Image.Image) -> Image.Image:
    """A grey of 16 or 32 bits or of floats as L, which Pillow's own conversion would cut off at 255.

    16 bits reach from 0 to 65535. The other two have no white of their own: it is the first of the usual ones that
    no pixel exceeds.
    """
    values = np.nan_to_num(np.asarray(picture, dtype=np.float32))  # [H, W]
    usual = {"F": (1, 255, 65535), "I": (255, 65535)}.get(picture.mode, (65535,))
    white = next((top for top in usual if values.max() <= top), values.max())
    return Image.fromarray(np.rint(np.clip(values / white, 0, 1) * 255).astype(np.uint8))


def _spread(values: np.ndarray) -> np.ndarray:
    """The largest of each pixel's 3x3 neighbourhood: [H, W] to [H, W]."""
    padded = np.pad(values, 1, mode="edge")
    rows = np.maximum(np.maximum(padded[:-2], padded[1:-1]), padded[2:])
    return np.maximum(np.maximum(rows[:, :-2], rows[:, 1:-1]), rows[:, 2:])


def _json(metadata: Mapping[str, Any], limit: int | None = None) -> bytes:
    """UTF-8 JSON of at most `limit` bytes: while it is longer, the longest text is cut."""
    # A lone surrogate has no UTF-8; as a backslash escape it is what JSON would write.
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
    return exif
