"""Sizes, reading, fitting, masks, pasting back and writing, on real files."""

import io
import random
import struct
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image

import images

RED, GREEN, BLUE, WHITE, BLACK = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def written(picture: Image.Image, path: Path, **options: object) -> Path:
    picture.save(path, **options)
    return path


def quadrants(width: int = 64, height: int = 32) -> Image.Image:
    """Red, green / blue, white: every turn and every swap of channels shows."""
    picture = Image.new("RGB", (width, height), WHITE)
    picture.paste(RED, (0, 0, width // 2, height // 2))
    picture.paste(GREEN, (width // 2, 0, width, height // 2))
    picture.paste(BLUE, (0, height // 2, width // 2, height))
    return picture


def close(picture: Image.Image, expected: Image.Image, tolerance: int) -> bool:
    difference = np.asarray(picture).astype(int) - np.asarray(expected).astype(int)
    return bool(np.abs(difference).max() <= tolerance)


# Sizes


@pytest.mark.parametrize(
    ("aspect_ratio", "full", "quarter"),
    [
        ("1:1", (1024, 1024), (512, 512)),
        ("16:9", (1344, 768), (672, 384)),
        ("21:9", (1536, 640), (768, 320)),
        ("3:2", (1216, 832), (608, 416)),
        ("2:3", (832, 1216), (416, 608)),
        ("4:5", (896, 1088), (448, 544)),
        ("5:4", (1088, 896), (544, 448)),
        ("3:4", (896, 1152), (448, 576)),
        ("4:3", (1152, 896), (576, 448)),
        ("9:16", (768, 1344), (384, 672)),
        ("9:21", (640, 1536), (320, 768)),
    ],
)
def test_an_aspect_ratio_has_its_size(aspect_ratio: str, full: tuple[int, int], quarter: tuple[int, int]) -> None:
    assert images.text_to_image_size(aspect_ratio, "1", None, None) == full
    assert images.text_to_image_size(aspect_ratio, "0.25", 999, 999) == quarter


def test_custom_sides_go_to_the_nearest_multiple_of_16_and_ignore_megapixels() -> None:
    assert images.text_to_image_size("custom", "0.25", 256, 1440) == (256, 1440)
    assert images.text_to_image_size("custom", "1", 1000, 1007) == (1008, 1008)
    assert images.text_to_image_size("custom", "1", 263, 264) == (256, 272)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("custom", "1", None, 512), "both width and height"),
        (("custom", "1", 512, None), "both width and height"),
        (("7:5", "1", None, None), "'7:5'"),
        (("1:1", "2", None, None), "'2'"),
    ],
)
def test_a_size_that_cannot_be_says_so(arguments: tuple, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        images.text_to_image_size(*arguments)


@settings(deadline=None)
@given(st.integers(1, 5000), st.integers(1, 5000))
def test_a_fitted_picture_is_on_the_grid_within_bounds_and_nearest(width: int, height: int) -> None:
    # One pixel wide or high costs nothing to make; its other side takes the general path.
    for size in ((width, 1), (1, height), (min(width, 300), min(height, 300))):
        fitted = images.fit(Image.new("RGB", size)).size
        shrink = min(1, 1440 / max(size))
        for side, had in zip(fitted, size, strict=True):
            assert side % 16 == 0
            assert 16 <= side <= 1440
            assert abs(side - had * shrink) <= 8 or (side == 16 and had * shrink < 16)


@pytest.mark.parametrize(
    ("size", "fitted"),
    [
        ((1, 1), (16, 16)),
        ((20000, 10), (1440, 16)),
        ((10, 20000), (16, 1440)),
        ((1440, 1440), (1440, 1440)),
        ((1441, 1441), (1440, 1440)),
        ((4032, 3024), (1440, 1088)),
        ((100, 120), (96, 128)),
    ],
)
def test_fit_keeps_the_aspect_as_far_as_the_grid_allows(size: tuple[int, int], fitted: tuple[int, int]) -> None:
    picture = images.fit(Image.new("RGB", size, (12, 200, 34)))
    assert picture.size == fitted
    assert picture.getcolors() == [(fitted[0] * fitted[1], (12, 200, 34))]


def test_a_picture_already_on_the_grid_keeps_every_bit() -> None:
    picture = noise(64, 1440)
    assert images.fit(picture).tobytes() == picture.tobytes()


def test_fit_averages_where_it_shrinks() -> None:
    checks = np.indices((2880, 32)).sum(axis=0) % 2 * 255
    grey = np.asarray(images.fit(Image.fromarray(checks.astype(np.uint8)).convert("RGB")))
    assert np.abs(grey[16:-16].astype(int) - 128).max() < 8  # picking single pixels would give 0 or 255


# Reading


@pytest.mark.parametrize(
    ("suffix", "options", "tolerance"),
    [
        ("png", {}, 0),
        ("bmp", {}, 0),
        ("tiff", {"compression": "tiff_lzw"}, 0),
        ("gif", {}, 0),
        ("webp", {"lossless": True}, 0),
        ("jpg", {"quality": 95, "subsampling": 0}, 6),
        ("avif", {"quality": 95, "subsampling": "4:4:4"}, 12),
        ("mpo", {"quality": 95, "subsampling": 0, "save_all": True, "append_images": [Image.new("RGB", (64, 32))]}, 6),
    ],
)
def test_every_accepted_format_is_read(tmp_path: Path, suffix: str, options: dict, tolerance: int) -> None:
    picture = images.read_image(written(quadrants(), tmp_path / f"photo.{suffix}", **options))
    assert picture.mode == "RGB"
    assert close(picture, quadrants(), tolerance)


def test_the_format_comes_from_the_bytes_not_from_the_name(tmp_path: Path) -> None:
    path = written(quadrants(), tmp_path / "photo.jpg", format="PNG")
    assert close(images.read_image(path), quadrants(), 0)


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "LAB"])
def test_every_mode_of_colour_becomes_rgb(tmp_path: Path, mode: str) -> None:
    start = quadrants().convert("L").point([0] * 128 + [255] * 128) if mode in ("1", "L") else quadrants()
    path = written(start.convert(mode), tmp_path / "photo.tiff")
    with Image.open(path) as reopened:
        assert reopened.mode == mode
    picture = images.read_image(path)
    assert picture.mode == "RGB"
    assert close(picture, start.convert("RGB"), 24 if mode == "LAB" else 2)


def test_a_cmyk_jpeg_keeps_its_colours(tmp_path: Path) -> None:
    path = written(quadrants().convert("CMYK"), tmp_path / "print.jpg", quality=95)
    assert close(images.read_image(path).resize((2, 2), Image.Resampling.BOX), quadrants(2, 2), 16)


@pytest.mark.parametrize("suffix", ["png", "tiff"])
@pytest.mark.parametrize("brightest", [200, 6000, 65535])
def test_sixteen_bits_keep_their_greys(tmp_path: Path, suffix: str, brightest: int) -> None:
    greys = np.linspace(0, brightest, 64 * 48).reshape(48, 64).astype(np.uint16)
    picture = images.read_image(written(Image.fromarray(greys), tmp_path / f"scan.{suffix}"))
    assert close(picture, Image.fromarray(np.rint(greys / 257).astype(np.uint8)).convert("RGB"), 0)


@pytest.mark.parametrize(
    ("dtype", "white"),
    [(np.int32, 255), (np.int32, 65535), (np.int32, 2**31 - 1), (np.float32, 1), (np.float32, 255)],
)
def test_greys_of_32_bits_reach_from_black_to_white(tmp_path: Path, dtype: type, white: int) -> None:
    path = written(Image.fromarray(np.array([[0, white / 2, white]]).astype(dtype)), tmp_path / "scan.tiff")
    black, grey, brightest = np.asarray(images.read_image(path))[0, :, 0]
    assert (black, brightest) == (0, 255)
    assert abs(int(grey) - 127.5) < 1


def test_floats_that_are_not_numbers_are_black(tmp_path: Path) -> None:
    path = written(Image.fromarray(np.array([[np.nan, 1.0]], dtype=np.float32)), tmp_path / "scan.tiff")
    assert np.asarray(images.read_image(path))[0].tolist() == [list(BLACK), list(WHITE)]


def translucent(mode: str, colour: tuple[int, ...]) -> Image.Image:
    """Left half opaque, right half clear."""
    picture = Image.new(mode, (8, 4), (*colour, 0))
    picture.paste((*colour, 255), (0, 0, 4, 4))
    return picture


@pytest.mark.parametrize(
    ("start", "suffix", "options"),
    [
        (translucent("RGBA", RED), "png", {}),
        (translucent("RGBA", RED), "webp", {"lossless": True}),
        (translucent("RGBA", RED), "gif", {}),
        (translucent("RGBA", RED).convert("P"), "png", {"transparency": bytes([255] * 256)}),
        (translucent("LA", (76,)), "png", {}),
        (Image.new("RGB", (8, 4), RED), "png", {"transparency": RED}),
        (Image.new("L", (8, 4), 76), "png", {"transparency": 76}),
    ],
)
def test_transparency_is_laid_on_white(tmp_path: Path, start: Image.Image, suffix: str, options: dict) -> None:
    path = written(start, tmp_path / f"logo.{suffix}", **options)
    with Image.open(path) as reopened:
        expected = reopened.convert("RGBA")
    paper = Image.new("RGBA", expected.size, WHITE)
    paper.alpha_composite(expected)
    picture = images.read_image(path)
    assert picture.tobytes() == paper.convert("RGB").tobytes()
    if options.get("transparency") != bytes([255] * 256):
        assert picture.getpixel((7, 3)) == WHITE


def test_half_transparent_red_is_pink(tmp_path: Path) -> None:
    path = written(Image.new("RGBA", (2, 2), (255, 0, 0, 128)), tmp_path / "logo.png")
    assert images.read_image(path).getpixel((0, 0)) == (255, 127, 127)


@pytest.mark.parametrize("suffix", ["gif", "webp", "png", "tiff"])
def test_of_an_animation_the_first_frame_is_read(tmp_path: Path, suffix: str) -> None:
    frames = [Image.new("RGB", (32, 32), colour) for colour in (GREEN, RED, BLUE)]
    options = {"lossless": True} if suffix == "webp" else {}
    path = written(frames[0], tmp_path / f"film.{suffix}", save_all=True, append_images=frames[1:], **options)
    with Image.open(path) as reopened:
        assert reopened.n_frames == 3
    assert images.read_image(path).getcolors() == [(1024, GREEN)]


# What undoes each EXIF orientation: the file holds the picture as the camera's sensor lay.
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


@pytest.mark.parametrize("orientation", SENSOR)
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tiff"])
def test_pictures_and_masks_stand_upright(tmp_path: Path, suffix: str, orientation: int) -> None:
    options = {"lossless": True} if suffix == "webp" else {}
    path = oriented(quadrants(), orientation, tmp_path / f"photo.{suffix}", **options)
    assert close(images.read_image(path).resize((2, 2), Image.Resampling.BOX), quadrants(2, 2), 16)

    painted = Image.new("L", (64, 32), 0)
    painted.paste(255, (0, 0, 32, 16))
    path = oriented(painted, orientation, tmp_path / f"mask.{suffix}", **options)
    assert close(images.read_mask(path, (64, 32)), painted, 0)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_broken_exif_does_not_spoil_a_picture(tmp_path: Path, suffix: str) -> None:
    path = written(quadrants(), tmp_path / f"photo.{suffix}", exif=b"Exif\0\0not a TIFF header at all")
    assert close(images.read_image(path).resize((2, 2), Image.Resampling.BOX), quadrants(2, 2), 16)


def test_nothing_of_the_file_but_its_pixels_is_kept(tmp_path: Path) -> None:
    path = written(quadrants(), tmp_path / "photo.jpg", comment=b"taken at home", dpi=(300, 300))
    images.save(images.read_image(path), tmp_path / "out.jpg", "jpg", 80, {})
    assert b"taken at home" in path.read_bytes()
    assert b"taken at home" not in (tmp_path / "out.jpg").read_bytes()


@pytest.mark.parametrize("size", [(1, 1), (20000, 10), (10, 20000)])
def test_extreme_shapes_are_read(tmp_path: Path, size: tuple[int, int]) -> None:
    assert images.read_image(written(Image.new("RGB", size, RED), tmp_path / "line.png")).size == size


# What is refused


def png(width: int, height: int, rows: bytes = b"") -> bytes:
    """A well-formed grey PNG whose header claims any size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def bmp(width: int, height: int) -> bytes:
    return b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, *[0] * 6)


def gif(width: int, height: int) -> bytes:
    return b"GIF89a" + struct.pack("<HHBBB", width, height, 0, 0, 0) + b",\0\0\0\0\1\0\1\0\0\2\2D\1\0;"


def tiff(width: int, height: int) -> bytes:
    entries = [(256, width), (257, height), (258, 8), (259, 1), (262, 1), (273, 200), (277, 1), (278, height), (279, 9)]
    directory = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries)
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + directory + bytes(200)


@pytest.mark.parametrize(
    ("bomb", "megapixels"),
    [
        (png(60000, 60000), "3,600.0 megapixels"),
        (png(10001, 10000, rows=bytes(10002 * 10000)), "100.0 megapixels"),
        (bmp(60000, 60000), "3,600.0 megapixels"),
        (gif(65535, 65535), "4,294.8 megapixels"),
        (tiff(60000, 60000), "3,600.0 megapixels"),
    ],
    ids=["png header", "png that unpacks", "bmp", "gif", "tiff"],
)
@pytest.mark.parametrize("name", ["image", "mask"])
def test_a_bomb_is_refused_before_it_unfolds(tmp_path: Path, bomb: bytes, megapixels: str, name: str) -> None:
    path = tmp_path / "bomb"
    path.write_bytes(bomb)
    with pytest.raises(ValueError, match=f"^{name} is too large: it has {megapixels}, of at most 100.$") as refused:
        read(name, path)
    assert refused.value.__suppress_context__


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_large_photo_is_no_bomb(tmp_path: Path) -> None:
    path = tmp_path / "large.png"
    path.write_bytes(png(10000, 6000, rows=bytes(10001 * 6000)))
    assert images.read_image(path).size == (10000, 6000)


def read(name: str, path: Path) -> Image.Image:
    return images.read_image(path) if name == "image" else images.read_mask(path, (16, 16))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 100,
        b"not a picture",
        b"<!DOCTYPE html><title>404</title>",
        b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n",
        b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 3, 9, 9, 8, 3) + bytes(100),
        b"SIMPLE  =                    T" + b" " * 3000,
        b"P6 1 1 255 abc",
    ],
    ids=["empty", "zeros", "text", "html", "svg", "eps", "psd", "fits", "ppm"],
)
@pytest.mark.parametrize("name", ["image", "mask"])
def test_what_is_no_accepted_picture_is_told_what_is(tmp_path: Path, content: bytes, name: str) -> None:
    path = tmp_path / "upload.png"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"^{name} is not a picture .* send PNG, JPEG, WEBP, GIF, BMP, TIFF or AVIF"):
        read(name, path)


def test_a_closed_format_is_closed_although_pillow_reads_it(tmp_path: Path) -> None:
    path = written(quadrants(), tmp_path / "photo.pcx")
    with Image.open(path) as reopened:
        assert reopened.size == (64, 32)
    with pytest.raises(ValueError, match="is not a picture in a known format"):
        images.read_image(path)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "gif", "bmp", "tiff", "avif"])
@pytest.mark.parametrize("kept", [0.5, 0.9])
def test_a_file_that_was_cut_off_is_refused(tmp_path: Path, suffix: str, kept: float) -> None:
    path = written(noise(64, 64), tmp_path / f"photo.{suffix}")
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(ValueError, match=r"^image (could not be decoded|is not a picture)") as refused:
        images.read_image(path)
    assert str(tmp_path) not in str(refused.value)
    assert refused.value.__suppress_context__  # or the log would print Pillow's message, path and all


def test_a_path_where_no_file_is_stays_unsaid(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing.png"):
        with pytest.raises(ValueError, match=r"^image could not be decoded") as refused:
            images.read_image(path)
        assert str(tmp_path) not in str(refused.value)


def test_a_jpeg_of_more_scans_than_any_encoder_makes_is_refused(tmp_path: Path) -> None:
    file = written(Image.new("RGB", (64, 64)), tmp_path / "a.jpg", progressive=True)
    content = file.read_bytes()
    scan = content[content.rindex(b"\xff\xda") : -2]
    file.write_bytes(content[:-2] + 20 * scan + content[-2:])
    assert images.read_image(file).size == (64, 64)
    file.write_bytes(content[:-2] + 50 * scan + content[-2:])
    with pytest.raises(
        ValueError, match=r"^image is a JPEG of too many scans: more than 50, or than its size allows\.$"
    ):
        images.read_image(file)
    file.write_bytes(content[:-2] + 50 * (b"\xff\x01" + scan) + content[-2:])  # a marker that has no segment hides none
    with pytest.raises(ValueError, match="too many scans"):
        images.read_image(file)
    file.write_bytes(content + 50 * scan)  # behind the picture: what phones leave there is no part of it
    assert images.read_image(file).size == (64, 64)


@pytest.mark.parametrize("large", [False, True], ids=["TIFF", "BigTIFF"])
def test_a_tiff_in_more_strips_than_any_program_writes_is_refused(tmp_path: Path, large: bool) -> None:
    """Pillow takes minutes and gigabytes for 64 MB of them, much of it in a call that nothing can interrupt."""
    most = r"100,000 strips, tiles or other numbers under one tag, or 65,535 tags\."
    refused = f"^image is a TIFF of too many parts: more than {most}$"
    rows, path = images.MAX_NUMBERS, tmp_path / "a.tiff"
    options = {"big_tiff": large, "tiffinfo": {278: 1}}  # RowsPerStrip
    assert images.read_image(written(Image.new("L", (1, rows)), path, **options)).size == (1, rows)
    with pytest.raises(ValueError, match=refused):
        images.read_image(written(Image.new("L", (1, rows + 1)), path, **options))


@pytest.mark.parametrize(
    ("head", "entry"),
    [
        (struct.pack("<2sHIH", b"II", 42, 8, 1), struct.pack("<HHII", 324, 4, 200_000, 0)),
        (struct.pack("<2sHIH", b"II", 42, 8, 1), struct.pack("<HHII", 700, 5, 200_000, 0)),
        (struct.pack(">2sHIH", b"MM", 42, 8, 1), struct.pack(">HHII", 273, 4, 200_000, 0)),
        (struct.pack("<2sHHHQQ", b"II", 43, 8, 0, 16, 1), struct.pack("<HHQQ", 324, 16, 200_000, 0)),
        (struct.pack("<2sHHHQQ", b"II", 43, 8, 0, 16, 65_536), b""),
        # Pillow takes the offset where it stands in others.
        (struct.pack(">2sHIH", b"MM", 43, 8, 1), struct.pack(">HHII", 273, 4, 200_000, 0)),
    ],
    ids=["II", "another tag", "MM", "BigTIFF", "entries", "BigTIFF MM"],
)
def test_a_tiff_says_in_several_ways_of_how_many_parts_it_is(tmp_path: Path, head: bytes, entry: bytes) -> None:
    path = tmp_path / "a.tiff"
    path.write_bytes(head + entry + bytes(16))
    with pytest.raises(ValueError, match=r"^image is a TIFF of too many parts"):
        images.read_image(path)


@pytest.mark.filterwarnings(r"ignore:Corrupt EXIF data\.")
def test_a_tiff_whose_directory_is_cut_off_is_read_as_far_as_it_goes(tmp_path: Path) -> None:
    path = tmp_path / "a.tiff"
    directory = tiff(1, 1)[10:-200]
    path.write_bytes(b"II*\0" + struct.pack("<I", 300) + bytes(292) + struct.pack("<H", 100) + directory)
    assert images.read_image(path).size == (1, 1)


def test_bytes_in_a_tiff_are_not_counted(tmp_path: Path) -> None:
    """Such as a colour profile, or what an editor keeps there."""
    path = written(Image.new("L", (8, 8)), tmp_path / "a.tiff", tiffinfo={700: b"x" * 200_000})
    assert images.read_image(path).size == (8, 8)


def test_a_file_of_more_parts_than_any_program_writes_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pillow keeps 2 GB of 6,000,000 comments, which are a file of 29 MB."""
    monkeypatch.setattr(images, "MAX_READS", 3000)
    path = tmp_path / "a.gif"
    head, rest = gif(8, 8)[:13], gif(8, 8)[13:]
    path.write_bytes(head + b"!\xfe\x01a\0" * 100 + rest)
    assert images.read_image(path).size == (8, 8)
    path.write_bytes(head + b"!\xfe\x01a\0" * 3000 + rest)
    with pytest.raises(ValueError, match=r"^image is a file of too many parts\.$"):
        images.read_image(path)


def test_damaged_bytes_give_a_picture_or_a_sentence(tmp_path: Path) -> None:
    chance = random.Random(0)
    path = tmp_path / "photo"
    for suffix in ("png", "jpeg", "gif", "bmp", "tiff", "webp"):
        whole = io.BytesIO()
        quadrants().save(whole, suffix)
        for _ in range(25):
            content = bytearray(whole.getvalue())
            for _ in range(4):
                content[chance.randrange(len(content))] = chance.randrange(256)
            path.write_bytes(content)
            with suppress(ValueError):
                assert images.read_image(path).mode == "RGB"


# Masks


def test_grey_from_128_up_is_painted(tmp_path: Path) -> None:
    greys = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
    mask = images.read_mask(written(greys, tmp_path / "mask.png"), (16, 16))
    assert mask.mode == "L"
    assert np.asarray(mask).ravel().tolist() == [0] * 128 + [255] * 128


@pytest.mark.parametrize(
    "convert",
    [
        lambda mask: mask.convert("1"),
        lambda mask: mask,
        lambda mask: mask.convert("LA"),
        lambda mask: mask.convert("P"),
        lambda mask: mask.convert("RGB"),
        lambda mask: mask.convert("RGBA"),
        lambda mask: mask.convert("CMYK"),
        lambda mask: Image.fromarray(np.asarray(mask).astype(np.uint16) * 257),
        lambda mask: Image.fromarray(np.asarray(mask).astype(np.int32)),
        lambda mask: Image.fromarray(np.asarray(mask).astype(np.float32) / 255),
        lambda mask: Image.merge("RGBA", [Image.new("L", mask.size, 255)] * 3 + [mask]),
        lambda mask: Image.merge("LA", [mask, mask]),
    ],
    ids=["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I", "F", "white on clear", "grey on clear"],
)
def test_a_mask_means_the_same_in_every_mode(tmp_path: Path, convert: Callable[[Image.Image], Image.Image]) -> None:
    painted = Image.new("L", (40, 24), 0)
    painted.paste(255, (5, 7, 20, 21))
    path = written(convert(painted), tmp_path / "mask.tiff")
    assert images.read_mask(path, painted.size).tobytes() == painted.tobytes()


def test_a_mask_of_the_original_picture_lies_on_the_fitted_one(tmp_path: Path) -> None:
    photo = Image.new("RGB", (4000, 3000), BLUE)
    photo.paste(RED, (1000, 600, 2000, 1800))
    painted = Image.new("L", photo.size, 0)
    painted.paste(255, (1000, 600, 2000, 1800))
    image = images.fit(images.read_image(oriented(photo, 6, tmp_path / "photo.png")))
    mask = images.read_mask(oriented(painted, 6, tmp_path / "mask.png"), image.size)
    red = np.asarray(image)[..., 0] >= 128
    assert image.size == (1440, 1088)
    assert (red == (np.asarray(mask) == 255)).all()


def test_a_resized_mask_has_no_grey(tmp_path: Path) -> None:
    path = written(noise(100, 70).convert("L"), tmp_path / "mask.png")
    mask = np.asarray(images.read_mask(path, (1024, 768)))
    assert mask.shape == (768, 1024)
    assert set(np.unique(mask)) == {0, 255}


# Extending and pasting back


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_extend_repeats_the_right_and_bottom_edges(mode: str) -> None:
    picture = noise(48, 16).convert(mode)
    larger = np.asarray(images.extend(picture, (64, 32)))
    pixels = np.asarray(picture)
    assert larger.shape[:2] == (32, 64)
    assert (larger[:16, :48] == pixels).all()
    assert (larger[:16, 48:] == pixels[:, -1:]).all()
    assert (larger[16:, :48] == pixels[-1:]).all()
    assert (larger[16:, 48:] == pixels[-1, -1]).all()
    assert images.extend(picture, picture.size).tobytes() == picture.tobytes()


@settings(deadline=None)
@given(st.integers(1, 300), st.integers(1, 300), st.integers(0, 2**32 - 1), st.floats(0, 1), st.integers(1, 60))
def test_outside_the_mask_every_bit_is_the_originals(
    width: int, height: int, seed: int, share: float, grain: int
) -> None:
    drawn, original = noise(width, height, seed), noise(width, height, seed + 1)
    coarse = np.random.default_rng(seed).random((-(-height // grain), -(-width // grain))) < share
    painted = np.kron(coarse, np.ones((grain, grain), bool))[:height, :width]
    mask = Image.fromarray(painted.astype(np.uint8) * 255)
    pasted = np.asarray(images.paste_back(drawn, original, mask)).astype(int)
    assert (pasted[~painted] == np.asarray(original)[~painted]).all()
    low, high = np.minimum(drawn, original), np.maximum(drawn, original)
    assert ((low <= pasted) & (pasted <= high)).all()  # a blend of the two, nothing else


def strength(painted: np.ndarray) -> np.ndarray:
    """How strongly each pixel is painted, 0 to 255: white drawn on black."""
    height, width = painted.shape
    drawn, original = Image.new("RGB", (width, height), WHITE), Image.new("RGB", (width, height), BLACK)
    mask = Image.fromarray(painted.astype(np.uint8) * 255)
    return np.asarray(images.paste_back(drawn, original, mask))[..., 0]


def test_a_whole_mask_gives_the_drawing_and_an_empty_one_the_original() -> None:
    assert (strength(np.ones((256, 1024), bool)) == 255).all()
    assert (strength(np.zeros((256, 1024), bool)) == 0).all()


def test_the_seam_rises_inside_the_mask_over_1_128_of_the_shorter_side() -> None:
    painted = np.zeros((1024, 1024), bool)
    painted[300:700, 400:] = True
    painting = strength(painted)
    across = painting[500, 395:420].astype(int)
    assert across[:5].tolist() == [0] * 5
    assert across[5:13].tolist() == [round(255 * step / 8) for step in range(1, 9)]
    assert (painting[308:692, 408:] == 255).all()  # and no seam where the mask meets the picture's own edge


@pytest.mark.parametrize("thickness", [1, 2, 3, 4, 7, 12, 15, 16, 40])
def test_a_line_is_painted_at_full_strength_in_its_middle(thickness: int) -> None:
    painted = np.zeros((1024, 1024), bool)
    painted[500 : 500 + thickness, 200:800] = True
    assert (strength(painted)[500 + (thickness - 1) // 2, 240:760] == 255).all()


# Writing

PROMPTS = [
    "a red fox",
    'ein Füchslein, 狐狸 \U0001f98a, “quoted” and "quoted", it\'s a back\\slash\nand a new line\tand a tab\0',
    "half a pair: \ud83e",
    "long " * 2500,
    "\U0001f98a" * 10_000,
]


@pytest.mark.parametrize("prompt", PROMPTS, ids=["plain", "unicode", "surrogate", "long", "foxes"])
@pytest.mark.parametrize("format", ["webp", "jpg", "png"])
def test_files_say_how_they_were_made(tmp_path: Path, format: images.Format, prompt: str) -> None:
    made = {
        "prompt": prompt,
        "seed": 2**63 - 1,
        "guidance": 3.5,
        "go_fast": True,
        "image": None,
        "loras": [{"reference": "someone/fox", "scale": -0.1}],
    }
    path = tmp_path / f"output.{format}"
    images.save(noise(32, 32), path, format, 80, made)
    assert images.read_metadata(path) == made
    with Image.open(path) as reopened:
        assert reopened.format == {"webp": "WEBP", "jpg": "JPEG", "png": "PNG"}[format]
        assert reopened.size == (32, 32)


@pytest.mark.parametrize("character", ["x", "狐", '"', "\0", "\U0001f98a"])
def test_only_a_jpeg_cuts_a_prompt_that_has_no_room_and_says_so(tmp_path: Path, character: str) -> None:
    made = {"prompt": character * 200_000, "model": "dev", "seed": 3}
    for format in ("webp", "png"):
        images.save(noise(16, 16), tmp_path / "output", format, 80, made)
        assert images.read_metadata(tmp_path / "output") == made
    images.save(noise(16, 16), tmp_path / "output", "jpg", 80, made)
    read = images.read_metadata(tmp_path / "output")
    assert read == {**made, "prompt": read["prompt"], "cut": "prompt"}
    assert made["prompt"].startswith(read["prompt"])
    assert len(read["prompt"]) >= 10_000  # room that is there is used


def test_a_file_without_metadata_says_so(tmp_path: Path) -> None:
    for suffix in ("png", "jpg", "webp", "gif"):
        path = written(quadrants(), tmp_path / f"photo.{suffix}")
        with pytest.raises(ValueError, match="does not say how it was made") as refused:
            images.read_metadata(path)
        assert str(tmp_path) not in str(refused.value)


def test_png_keeps_every_bit_at_any_quality(tmp_path: Path) -> None:
    picture = noise(64, 48)
    for quality in (0, 100):
        images.save(picture, tmp_path / "output.png", "png", quality, {})
        assert images.read_image(tmp_path / "output.png").tobytes() == picture.tobytes()


@pytest.mark.parametrize("format", ["webp", "jpg"])
def test_more_quality_means_less_error_and_more_bytes(tmp_path: Path, format: images.Format) -> None:
    picture = noise(16, 16).resize((128, 128), Image.Resampling.BICUBIC)
    path = tmp_path / f"output.{format}"
    errors, sizes = [], []
    for quality in (0, 30, 60, 89, 90, 100):
        images.save(picture, path, format, quality, {})
        errors.append(np.abs(np.asarray(images.read_image(path)).astype(int) - np.asarray(picture)).mean())
        sizes.append(path.stat().st_size)
    assert errors == sorted(errors, reverse=True)
    assert sizes == sorted(sizes)
    assert len(set(sizes)) == len(sizes)


def test_a_good_jpeg_has_the_colour_of_every_pixel(tmp_path: Path) -> None:
    stripes = Image.fromarray(np.array([[RED, GREEN] * 32] * 64, dtype=np.uint8))
    images.save(stripes, tmp_path / "output.jpg", "jpg", 90, {})
    assert close(images.read_image(tmp_path / "output.jpg"), stripes, 40)  # at half the resolution both would be brown


def test_a_format_that_is_not_written_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="output_format is 'gif'; it must be webp, jpg or png"):
        images.save(quadrants(), tmp_path / "output.gif", "gif", 80, {})


def test_the_same_picture_gives_the_same_file(tmp_path: Path) -> None:
    for format in ("webp", "jpg", "png"):
        for name in ("one", "two"):
            images.save(noise(32, 32), tmp_path / name, format, 80, {"seed": 1})
        assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
