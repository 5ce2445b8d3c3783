"""Small pictures for tests, as pixels and as files."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image

RED, GREEN, BLUE, WHITE, BLACK = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def written(picture: Image.Image, path: Path, **options: object) -> Path:
    picture.save(path, **options)
    return path


def quadrants(width: int = 64, height: int = 32) -> Image.Image:
    """Red, green / blue, white: every rotation and every swap of channels changes it."""
    picture = Image.new("RGB", (width, height), WHITE)
    picture.paste(RED, (0, 0, width // 2, height // 2))
    picture.paste(GREEN, (width // 2, 0, width, height // 2))
    picture.paste(BLUE, (0, height // 2, width // 2, height))
    return picture


def photo(width: int = 96, height: int = 64) -> Image.Image:
    """A ramp from black to white in which all pixels differ."""
    ramp = np.linspace(0, 255, width * height * 3).reshape(height, width, 3)
    return Image.fromarray(ramp.astype(np.uint8))


def encoded(picture: Image.Image, form: str = "png", **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, form, **options)
    return buffer.getvalue()


def close(picture: Image.Image, expected: Image.Image, tolerance: int) -> bool:
    difference = np.asarray(picture).astype(int) - np.asarray(expected).astype(int)
    return bool(np.abs(difference).max() <= tolerance)


# The inverse of each EXIF orientation: the file holds the picture as the turned camera recorded it.
SENSOR = {
    1: lambda picture: picture,
    2: lambda picture: picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    3: lambda picture: picture.transpose(Image.Transpose.ROTATE_180),
    4: lambda picture: picture.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
    5: lambda picture: picture.transpose(Image.Transpose.TRANSPOSE),
    6: lambda picture: picture.transpose(Image.Transpose.ROTATE_90),
    7: lambda picture: picture.transpose(Image.Transpose.TRANSVERSE),
    8: lambda picture: picture.transpose(Image.Transpose.ROTATE_270),
}


def oriented(picture: Image.Image, orientation: int, path: Path, **options: object) -> Path:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return written(SENSOR[orientation](picture), path, exif=exif, **options)


def png(width: int, height: int, rows: bytes, *, depth: int = 8, kind: int = 0, transparent: bytes = b"") -> bytes:
    """A well-formed PNG of any depth and colour type; its header may state more rows than it has.

    Args:
        rows: for each row a filter's byte, 0, and the samples.
        transparent: the transparent colour, as the file stores it.
    """
    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    parts = ((b"IHDR", header), (b"tRNS", transparent), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in parts
        if data or name != b"tRNS"
    )
