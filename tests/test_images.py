"""Sizes, reading, fitting, masks, pasting back and writing, on real files."""

import contextlib
import io
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image, PngImagePlugin

import images
from harness.profiles import SRGB
from settings import VERSION
from tests.support.pictures import BLUE, GREEN, RED, SENSOR, close, noise, oriented, png, quadrants, written

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


@st.composite
def picture_sizes(draw: st.DrawFn) -> tuple[int, int]:
    """From 1 to 3000 pixels a side, in any shape, but no more than 100,000 in all: noise takes time."""
    width = draw(st.integers(1, 3000))
    return width, draw(st.integers(1, min(3000, max(1, 100_000 // width))))


MODES = {  # to each mode, and what a reader sees of it
    "RGB": lambda picture: (picture, picture),
    "RGBA": lambda picture: (picture.convert("RGBA"), picture),
    "L": lambda picture: (picture.convert("L"), picture.convert("L").convert("RGB")),
    "1": lambda picture: (picture.convert("1"), picture.convert("1").convert("RGB")),
    "P": lambda picture: (picture.quantize(16), picture.quantize(16).convert("RGB")),
}


PROFILES = {  # in a file, and what the log says of them
    "none": (None, ""),
    "sRGB": (SRGB, ""),
    "broken": (b"broken", "image: its colour profile is damaged, or not for its pixels; it is ignored.\n"),
}


@settings(deadline=None, max_examples=40)
@given(picture_sizes(), st.sampled_from(sorted(MODES)), st.integers(1, 8), st.sampled_from(sorted(PROFILES)))
def test_a_picture_keeps_its_size_and_pixels_or_the_log_says_what_became_of_it(
    size: tuple[int, int], mode: str, orientation: int, profile: str
) -> None:
    stored, seen = MODES[mode](noise(*size))
    options, said = {"icc_profile": PROFILES[profile][0], "compress_level": 1}, PROFILES[profile][1]
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()) as log:
        image = images.read_image(oriented(stored, orientation, Path(folder) / "photo.png", **options))
        fitted = images.fit(image)
    assert image.tobytes() == seen.tobytes()
    longest = max(size)
    if longest <= 1440:
        assert (fitted.size, fitted.tobytes(), log.getvalue()) == (size, seen.tobytes(), said)
        return
    assert max(fitted.size) == 1440
    assert all(
        abs(side - had * 1440 / longest) <= 0.5 or side == 1 for side, had in zip(fitted.size, size, strict=True)
    )
    (width, height), (wide, high) = size, fitted.size
    line = f"image has {width}x{height} pixels; it is drawn at {wide}x{high}: no side is longer than 1440.\n"
    assert log.getvalue() == said + line


@pytest.mark.parametrize(
    ("size", "fitted"),
    [
        ((1, 1), (1, 1)),
        ((20000, 10), (1440, 1)),
        ((10, 20000), (1, 1440)),
        ((1441, 1441), (1440, 1440)),
        ((4032, 3024), (1440, 1080)),
    ],
)
def test_fit_keeps_the_aspect(size: tuple[int, int], fitted: tuple[int, int]) -> None:
    picture = images.fit(Image.new("RGB", size, (12, 200, 34)))
    assert picture.size == fitted
    assert picture.getcolors() == [(fitted[0] * fitted[1], (12, 200, 34))]


def test_fit_averages_where_it_shrinks() -> None:
    checks = np.indices((2880, 32)).sum(axis=0) % 2 * 255
    grey = np.asarray(images.fit(Image.fromarray(checks.astype(np.uint8)).convert("RGB")))
    assert np.abs(grey[16:-16].astype(int) - 128).max() < 8  # picking single pixels would give 0 or 255


# Reading


def test_nothing_of_the_file_but_its_pixels_is_kept(tmp_path: Path) -> None:
    path = written(quadrants(), tmp_path / "photo.jpg", comment=b"taken at home", dpi=(300, 300))
    images.save(images.read_image(path), tmp_path / "out.jpg", "jpg", 80, {})
    assert b"taken at home" in path.read_bytes()
    assert b"taken at home" not in (tmp_path / "out.jpg").read_bytes()


# Masks


def read_mask(mask: Image.Image, path: Path, image: Image.Image | None = None) -> np.ndarray:
    """A mask through a file, at the size of its image as that is drawn: [H, W]."""
    image = image or Image.new("RGB", mask.size)
    image.info.setdefault("orientation", 1)
    drawn = images.read_mask(written(mask, path), image, images.fit(image).size)
    assert drawn.mode == "L"
    return np.asarray(drawn)


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
    assert (read_mask(convert(painted), tmp_path / "mask.tiff") == np.asarray(painted)).all()


@pytest.mark.parametrize("orientation", SENSOR)
@pytest.mark.parametrize("own", [True, False], ids=["turned by its own EXIF", "as the photo was stored"])
def test_a_mask_lies_on_its_photo_however_that_was_turned(
    tmp_path: Path, orientation: int, own: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    photo = Image.new("RGB", (1500, 1000), BLUE)
    photo.paste(RED, (500, 300, 1000, 800))
    painted = Image.new("L", photo.size, 0)
    painted.paste(255, (500, 300, 1000, 800))
    image = images.read_image(oriented(photo, orientation, tmp_path / "photo.png"))
    if own:
        path = oriented(painted, orientation, tmp_path / "mask.png")
    else:
        # Where the stored pixels have the size of the upright ones, people have looked at the upright ones.
        path = written(SENSOR[orientation](painted) if orientation >= 5 else painted, tmp_path / "mask.png")
    fitted = images.fit(image)
    red = np.asarray(fitted)[..., 0] >= 128
    assert fitted.size == (1440, 960)
    assert (red == (np.asarray(images.read_mask(path, image, fitted.size)) > 0)).all()
    assert ("it is turned like the image" in capsys.readouterr().out) == (not own and orientation >= 5)


@pytest.mark.parametrize(
    ("image", "mask"),
    [
        ((1000, 750), (1000, 751)),
        ((1000, 750), (500, 375)),
        ((1001, 333), (334, 111)),
        ((400, 301), (4000, 3007)),
        ((3000, 1), (3000, 1)),
    ],
)
def test_a_mask_may_be_larger_or_smaller_than_its_image(
    tmp_path: Path, image: tuple[int, int], mask: tuple[int, int]
) -> None:
    drawn = read_mask(Image.new("L", mask, 255), tmp_path / "mask.png", Image.new("RGB", image))
    assert drawn.shape == images.fit(Image.new("RGB", image)).size[::-1]
    assert (drawn == 255).all()


@pytest.mark.parametrize("size", [(1000, 752), (750, 1000), (1024, 1024)])
def test_a_mask_of_another_aspect_is_refused(tmp_path: Path, size: tuple[int, int]) -> None:
    says = (
        f"^mask has {size[0]}x{size[1]} pixels and image 1000x750; a mask must have the size of its image, or the same"
    )
    with pytest.raises(ValueError, match=says):
        read_mask(Image.new("L", size, 255), tmp_path / "mask.png", Image.new("RGB", (1000, 750)))


def clear_outside(colour: int) -> Image.Image:
    shape = Image.new("L", (64, 64))
    shape.paste(255, (8, 8, 40, 40))
    return Image.merge("LA", (Image.new("L", (64, 64), colour), shape))


def dotted(picture: Image.Image, *values: int) -> Image.Image:
    for place, value in enumerate(values):
        picture.putpixel((place, 0), value)
    return picture


@pytest.mark.parametrize(
    ("mask", "cause"),
    [
        (Image.new("L", (64, 64)), "it is all black; paint white what is to be drawn"),
        (Image.new("1", (64, 64)), "it is all black"),
        (
            dotted(Image.new("L", (64, 64)), 1),
            "its values are 0 and 1, both of which are black; white is 255: multiply",
        ),
        (Image.new("RGB", (64, 64), (1, 1, 1)), "its values are 0 and 1"),
        (Image.fromarray(np.eye(64, dtype=np.int32)), "its values are 0 and 1"),
        (Image.fromarray(np.eye(64, dtype=np.uint16)), "its values are 0 and 1, .* white is 65535"),
        (Image.fromarray(np.eye(64, dtype=np.uint16) * 255), "its brightest value is 255, .* white is 65535"),
        (dotted(Image.new("L", (64, 64)), 1, 7), "its brightest value is 7, which is as good as black; white is 255"),
        (clear_outside(0), "its shape is in its transparency alone, which counts as black; paint white"),
        (clear_outside(0).convert("RGBA"), "its shape is in its transparency alone"),
        (Image.fromarray(np.dstack([np.eye(64, dtype=np.uint8)] * 4)), "its values are 0 and 1"),
        (Image.frombytes("I;16B", (64, 64), bytes(8192)), "it is all black"),
        (Image.frombytes("I;16B", (64, 64), bytes(8191) + b"\1"), "its values are 0 and 1, .* white is 65535"),
        (Image.fromarray(np.eye(64, dtype=np.float32) / 200), "its brightest value is 0.005, which is as good"),
        (Image.merge("LA", (Image.new("L", (2, 1), 255), dotted(Image.new("L", (2, 1)), 1))), "its transparency has"),
        (Image.new("LA", (64, 64), (0, 128)), "it is all black"),
        (Image.new("RGBA", (64, 64), (255, 255, 255, 0)), "it is transparent all over"),
        (Image.new("RGB", (64, 64), (0, 0, 60)), "its brightest value is 60"),
    ],
)
def test_a_mask_that_paints_nothing_is_refused_with_the_likely_cause(
    tmp_path: Path, mask: Image.Image, cause: str
) -> None:
    with pytest.raises(ValueError, match=rf"^mask paints nothing: {cause}.*\.$"):
        read_mask(mask, tmp_path / "mask.tiff")


def test_the_log_says_of_a_mask_what_may_not_be_meant(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    read_mask(dotted(Image.new("L", (64, 64), 16), 12), tmp_path / "mask.png")
    assert capsys.readouterr().out == (
        "mask is nowhere brighter than 16 of 255: at most 6% of what is drawn shows.\n"
        "mask is black nowhere: nothing of the image is kept as it is.\n"
    )


@pytest.mark.parametrize("exif", [b"Exif\0\0not a TIFF at all", b"Exif\0\0II*\0"])
def test_a_mask_whose_exif_is_broken_turns_with_its_photo(tmp_path: Path, exif: bytes) -> None:
    image = images.read_image(oriented(Image.new("RGB", (40, 60)), 6, tmp_path / "photo.jpg"))
    path = written(Image.new("L", (60, 40), 255), tmp_path / "mask.png", exif=exif)
    assert images.read_mask(path, image, image.size).size == (40, 60)


def test_a_colour_of_sixteen_bits_may_be_as_good_as_black(tmp_path: Path) -> None:
    path = tmp_path / "mask.png"
    path.write_bytes(png(1, 1, b"\0" + bytes((0, 1)) * 3, depth=16, kind=2))
    with pytest.raises(ValueError, match="black or as good as black; in 16 bits white is 65535"):
        images.read_mask(path, images.read_image(path), (1, 1))


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_a_mask_that_stands_upright_may_keep_the_photos_exif(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], orientation: int
) -> None:
    image = images.read_image(oriented(Image.new("RGB", (40, 60)), orientation, tmp_path / "photo.png"))
    mask = Image.new("L", (40, 60))
    mask.paste(255, (0, 0, 20, 10))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    drawn = images.read_mask(written(mask, tmp_path / "mask.png", exif=exif), image, image.size)
    assert ((np.asarray(drawn) > 0) == (np.asarray(mask) > 0)).all()
    assert capsys.readouterr().out == (
        "mask has the size of the image only without its own EXIF rotation, which is ignored.\n"
    )


def test_a_mask_whose_greys_vanish_at_the_drawn_size_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="greys are too faint or too small to be seen at 1440x14 pixels"):
        read_mask(dotted(Image.new("L", (3000, 30)), 20), tmp_path / "mask.png")


def test_cells_are_painted_where_anything_in_them_is() -> None:
    drawn = np.zeros((64, 96), np.uint8)
    drawn[20:22] = 40  # a faint line, thinner than a cell
    drawn[63, 95] = 255
    white = np.zeros((64, 96), np.uint8)
    white[16:24], white[56:, 88:] = 255, 255
    assert (np.asarray(images.cells(Image.fromarray(drawn), 8)) == white).all()


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


def test_pasting_back_mixes_by_the_mask() -> None:
    drawn, original = noise(256, 4, 1), noise(256, 4, 2)
    mask = np.tile(np.arange(256, dtype=np.uint8), (4, 1))
    pasted = np.asarray(images.paste_back(drawn, original, Image.fromarray(mask))).astype(int)
    share = mask[..., None] / 255
    expected = np.asarray(drawn) * share + np.asarray(original) * (1 - share)
    assert np.abs(pasted - expected).max() <= 1
    assert (pasted[:, 0] == np.asarray(original)[:, 0]).all()
    assert (pasted[:, 255] == np.asarray(drawn)[:, 255]).all()


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
        software = reopened.text["Software"] if format == "png" else reopened.getexif()[ExifTags.Base.Software]
        assert software == f"flux-sprites {VERSION}"


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


@pytest.mark.parametrize("text", ["[1]", "3", "{", "[" * 100_000, "\0"])
def test_a_stranger_s_metadata_is_read_or_none(tmp_path: Path, text: str) -> None:
    described = PngImagePlugin.PngInfo()
    described.add_text("Description", text)
    Image.new("1", (8, 8)).save(tmp_path / "text.png", pnginfo=described)
    exif = Image.Exif()
    exif[ExifTags.Base.ImageDescription] = 3
    Image.new("L", (8, 8)).save(tmp_path / "number.jpg", exif=exif)
    (tmp_path / "cut.png").write_bytes((tmp_path / "text.png").read_bytes()[:-20])
    Image.new("1", (20_000, 10_000)).save(tmp_path / "bomb.png")
    for file in tmp_path.iterdir():
        with pytest.raises(ValueError, match="does not say how it was made"):
            images.read_metadata(file)


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
