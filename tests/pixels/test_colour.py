"""Modes, transparency and colour profiles become sRGB."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.TiffImagePlugin import ImageFileDirectory_v2

import images
from harness.profiles import ADOBE, LINEAR_GREY, P3, SRGB, icc, of_elements, of_inks
from tests.support.pictures import BLACK, RED, WHITE, close, noise, png, quadrants, written


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


def test_a_little_more_than_white_is_white(tmp_path: Path) -> None:
    """As filters leave it."""
    path = written(Image.fromarray(np.array([[0, 0.5, 1.02]], dtype=np.float32)), tmp_path / "scan.tiff")
    assert np.asarray(images.read_image(path))[0, :, 0].tolist() == [0, 128, 255]


def test_a_scan_whose_white_is_zero_is_no_negative(tmp_path: Path) -> None:
    scan = Image.fromarray(np.array([[0, 65535]], dtype=np.uint16))
    path = written(scan, tmp_path / "scan.tiff", tiffinfo={262: 0})
    assert np.asarray(images.read_image(path))[0, :, 0].tolist() == [255, 0]


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


def two_pixels(depth: int, kind: int, samples: bytes, transparent: bytes) -> bytes:
    """The first of them is the transparent one."""
    return png(2, 1, b"\0" + samples, depth=depth, kind=kind, transparent=transparent)


@pytest.mark.parametrize(
    ("content", "seen"),
    [
        (two_pixels(1, 0, b"\x00", b"\0\0"), (0, 0)),  # both
        (two_pixels(2, 0, b"\x60", b"\0\1"), (85, 170)),
        (two_pixels(4, 0, b"\x35", b"\0\3"), (51, 85)),
        (two_pixels(8, 0, b"\x35\x55", b"\0\x35"), (53, 85)),
        (two_pixels(16, 0, b"\x35\x35\x35\x36", b"\x35\x35"), (53, 53)),
        (two_pixels(16, 2, 3 * b"\x35\x35" + 3 * b"\x55\x55", 3 * b"\x35\x35"), (53, 85)),
    ],
    ids=["1 bit", "2 bits", "4 bits", "8 bits", "16 bits", "colour of 16 bits"],
)
def test_the_transparent_colour_of_a_png_is_transparent_at_any_depth(
    tmp_path: Path, content: bytes, seen: tuple[int, int]
) -> None:
    path = tmp_path / "scan.png"
    path.write_bytes(content)
    first, second = np.asarray(images.read_image(path))[0, :, 0].tolist()
    assert first == 255  # white paper
    assert second == (255 if seen == (0, 0) else seen[1])


def test_half_transparent_red_is_pink(tmp_path: Path) -> None:
    path = written(Image.new("RGBA", (2, 2), (255, 0, 0, 128)), tmp_path / "logo.png")
    assert images.read_image(path).getpixel((0, 0)) == (255, 127, 127)


# Profiles


@pytest.mark.parametrize(
    ("mode", "suffix", "options"),
    [
        ("RGB", "png", {}),
        ("RGBA", "png", {}),
        ("P", "png", {}),
        ("RGB", "jpg", {"quality": 100, "subsampling": 0}),
        ("RGB", "webp", {"lossless": True}),
        ("RGBA", "webp", {"lossless": True}),
        ("RGB", "avif", {"quality": 100, "subsampling": "4:4:4"}),
        ("RGB", "tiff", {}),
    ],
)
def test_display_p3_becomes_srgb_in_every_mode_and_format(
    tmp_path: Path, mode: str, suffix: str, options: dict
) -> None:
    picture = Image.new("RGB", (16, 16), (200, 60, 40))
    picture = picture.quantize(2) if mode == "P" else picture.convert(mode)
    drawn = images.read_image(written(picture, tmp_path / f"a.{suffix}", icc_profile=P3, **options))
    lossy = {"jpg": 3, "avif": 4}
    assert close(drawn, Image.new("RGB", (16, 16), (217, 42, 23)), lossy.get(suffix, 1))


def test_what_is_transparent_stays_so_under_a_profile(tmp_path: Path) -> None:
    picture = Image.new("RGBA", (4, 4), (200, 60, 40, 128))
    drawn = images.read_image(written(picture, tmp_path / "a.png", icc_profile=P3))
    assert close(drawn, Image.new("RGB", (4, 4), (236, 148, 139)), 1)  # half of (217, 42, 23), half white


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_a_grey_profile_of_linear_light_brightens_greys(tmp_path: Path, dtype: type) -> None:
    grey = Image.fromarray(np.full((4, 4), 0.2140 * np.iinfo(dtype).max).round().astype(dtype))
    drawn = images.read_image(written(grey, tmp_path / "a.png", icc_profile=LINEAR_GREY))
    assert close(drawn, Image.new("RGB", (4, 4), (127, 127, 127)), 2)  # light of 21.4 % is half as bright


def test_srgb_by_a_profile_changes_no_pixel(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = noise(64, 64)
    assert images.read_image(written(picture, tmp_path / "a.png", icc_profile=SRGB)).tobytes() == picture.tobytes()
    grey = picture.convert("L")  # many programs leave the profile of colours with what has none any more
    drawn = images.read_image(written(grey, tmp_path / "b.png", icc_profile=SRGB))
    assert drawn.tobytes() == grey.convert("RGB").tobytes()
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("mode", "profile"),
    [
        ("RGB", b"no profile"),
        ("RGB", b" "),
        ("RGB", P3[:200]),
        ("RGB", LINEAR_GREY),
        ("CMYK", P3),
        ("L", icc(b"6CLR", {})),
        ("RGB", of_elements(100_000)),
    ],
    ids=["text", "a space", "cut off", "of greys", "of RGB for CMYK", "of six inks", "that takes minutes"],
)
def test_a_profile_that_is_broken_or_of_other_pixels_is_ignored_with_a_line(
    tmp_path: Path, mode: str, profile: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = quadrants().convert(mode)
    path = written(picture, tmp_path / "a.tiff", icc_profile=profile)
    assert images.read_image(path).tobytes() == picture.convert("RGB").tobytes()
    assert capsys.readouterr().out == "image: its colour profile is damaged, or not for its pixels; it is ignored.\n"


def test_a_large_profile_of_a_png_is_read(tmp_path: Path) -> None:
    path = written(Image.new("RGB", (4, 4), (200, 60, 40)), tmp_path / "a.png", icc_profile=P3 + bytes(3_000_000))
    assert close(images.read_image(path), Image.new("RGB", (4, 4), (217, 42, 23)), 1)


@pytest.mark.parametrize("kind", [2, 3, 4, 5])
def test_a_profile_that_is_no_bytes_is_ignored(tmp_path: Path, kind: int, capsys: pytest.CaptureFixture[str]) -> None:
    tags = ImageFileDirectory_v2()
    tags[34675] = "abc" if kind == 2 else 7
    tags.tagtype[34675] = kind
    picture = images.read_image(written(quadrants(), tmp_path / "a.tiff", tiffinfo=tags))
    assert picture.tobytes() == quadrants().tobytes()
    assert "it is ignored" in capsys.readouterr().out


def test_adobe_rgb_and_inks_have_their_own_colours(tmp_path: Path) -> None:
    """By the definitions of Adobe RGB (1998), of sRGB and of Lab, worked out apart."""
    photo = written(Image.new("RGB", (8, 8), (100, 160, 80)), tmp_path / "a.png", icc_profile=ADOBE)
    assert close(images.read_image(photo), Image.new("RGB", (8, 8), (53, 161, 73)), 1)
    inks, printed = ((0, 0, 0, 0), (255, 0, 0, 0), (0, 0, 0, 255)), ((255, 255, 255), (54, 156, 197), (120, 120, 120))
    for amount, colour in zip(inks, printed, strict=True):
        scan = written(Image.new("CMYK", (8, 8), amount), tmp_path / "a.tiff", icc_profile=of_inks())
        assert close(images.read_image(scan), Image.new("RGB", (8, 8), colour), 2)
