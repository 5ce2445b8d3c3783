"""Decoding pictures of strangers: formats, frames, orientations, and refusals."""

import io
import random
import struct
from contextlib import suppress
from pathlib import Path

import pytest
from PIL import ExifTags, Image

import images
from pixels import decoding
from tests.support.pictures import BLUE, GREEN, RED, SENSOR, close, noise, oriented, png, quadrants, written


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


@pytest.mark.parametrize("suffix", ["gif", "webp", "png", "tiff"])
def test_of_an_animation_the_first_frame_is_read(
    tmp_path: Path, suffix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    frames = [Image.new("RGB", (32, 32), colour) for colour in (GREEN, RED, BLUE)]
    options = {"lossless": True} if suffix == "webp" else {}
    path = written(frames[0], tmp_path / f"film.{suffix}", save_all=True, append_images=frames[1:], **options)
    with Image.open(path) as reopened:
        assert reopened.n_frames == 3
    assert images.read_image(path).getcolors() == [(1024, GREEN)]
    film = "is an animation; its first frame is used"
    said = f"image {'holds more than one picture; its first one is used' if suffix == 'tiff' else film}.\n"
    assert capsys.readouterr().out == said


@pytest.mark.parametrize(
    ("kind", "value"),
    [(3, b"\0\0"), (3, b"\x09\0"), (3, b"\x2c\1"), (2, b"6\0"), (1, b"\6\6")],
    ids=["0", "9", "300", "text", "bytes"],
)
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_an_orientation_that_exif_does_not_have_turns_nothing(
    tmp_path: Path, kind: int, value: bytes, suffix: str
) -> None:
    tag = struct.pack("<HHI4s", ExifTags.Base.Orientation, kind, 1 if kind == 3 else 2, value)
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 1) + tag + bytes(4)
    picture = images.read_image(written(quadrants(), tmp_path / f"photo.{suffix}", exif=exif))
    assert (picture.info, picture.size) == ({"orientation": 1}, quadrants().size)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_broken_exif_does_not_spoil_a_picture(tmp_path: Path, suffix: str) -> None:
    path = written(quadrants(), tmp_path / f"photo.{suffix}", exif=b"Exif\0\0not a TIFF header at all")
    assert close(images.read_image(path).resize((2, 2), Image.Resampling.BOX), quadrants(2, 2), 16)


@pytest.mark.parametrize("size", [(1, 1), (20000, 10), (10, 20000)])
def test_extreme_shapes_are_read(tmp_path: Path, size: tuple[int, int]) -> None:
    assert images.read_image(written(Image.new("RGB", size, RED), tmp_path / "line.png")).size == size


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
        (png(60000, 60000, b""), "3,600.0 megapixels"),
        (png(10001, 10000, bytes(10002 * 10000)), "100.0 megapixels"),
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
        opened(name, path)
    assert refused.value.__suppress_context__


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_large_photo_is_no_bomb(tmp_path: Path) -> None:
    path = tmp_path / "large.png"
    path.write_bytes(png(10000, 6000, bytes(10001 * 6000)))
    assert images.read_image(path).size == (10000, 6000)


def opened(name: str, path: Path) -> None:
    with decoding.decoded(path, name):
        pass


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", r"not a picture in a known format; send PNG, JPEG, WEBP, GIF, BMP, TIFF or AVIF\.$"),
        (b"\0" * 100, "not a picture in a known format"),
        (b"not a picture", "not a picture in a known format"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "not a picture in a known format"),
        (b"SIMPLE  =                    T" + b" " * 3000, "not a picture in a known format"),
        (b"P6 1 1 255 abc", "not a picture in a known format"),
        (
            b"\n<!DOCTYPE html><title>404</title>",
            "a web page: the link needs a login, has expired, or leads to a page about",
        ),
        (b"<!-- a page -->\n<HTML><body><svg width='9'>", "a web page"),
        (b"<?xml version='1.0'?><!-- " + 2000 * b"long " + b"--><feed>", "a web page"),
        (b"<?xml version='1.0'?><!-- " + 600 * b"long " + b"--><svg>", "an SVG drawing"),
        (
            b'\xef\xbb\xbf<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>',
            "an SVG drawing; export it as",
        ),
        (b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 3, 9, 9, 8, 3) + bytes(100), "a Photoshop document; export it"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic\0\0\1\xe7meta", r"a HEIC photo; save or export it as JPEG \(iPhones do"),
        (b"\0\0\0\x1cftypmif1\0\0\0\0mif1miafheix\0\0\1\xe7meta", "a HEIC photo"),
        (b"\0\0\0\x18ftypmif1\0\0\0\0mif1miaf\0\0\1\xe7meta", "a HEIC photo"),
        (b"\0\0\0\x18ftypheif\0\0\0\0mif1miaf\0\0\1\xe7meta", "a HEIC photo"),
        (b"\0\0\0\x18ftypisom\0\0\2\0isomiso2\0\0\0\x08free", "a video; send one picture of it"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "a JPEG XL picture; save it as PNG"),
        (b"\0\0\0\x0cjP  \r\n\x87\n", "a JPEG 2000 picture; save it as PNG"),
        (b"%PDF-1.7\n", "a PDF document; save its page as PNG"),
    ],
)
@pytest.mark.parametrize("name", ["image", "mask"])
def test_what_is_no_accepted_picture_is_told_what_is(tmp_path: Path, content: bytes, says: str, name: str) -> None:
    path = tmp_path / "upload.png"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"^{name} is {says}"):
        opened(name, path)


@pytest.mark.parametrize("orientation", SENSOR)
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tiff"])
def test_a_picture_stands_upright_and_says_how_it_was_turned(tmp_path: Path, suffix: str, orientation: int) -> None:
    picture = images.read_image(oriented(quadrants(), orientation, tmp_path / f"photo.{suffix}"))
    assert close(picture.resize((2, 2), Image.Resampling.BOX), quadrants(2, 2), 16)
    assert picture.info == {"orientation": orientation}
    assert decoding.turn(SENSOR[orientation](quadrants()), orientation).tobytes() == quadrants().tobytes()


def test_a_tiff_that_begins_with_a_preview_is_refused_as_the_raw_photo_that_it_is(tmp_path: Path) -> None:
    path = written(quadrants(), tmp_path / "photo.tiff", tiffinfo={decoding.NEW_SUBFILE_TYPE: 1})
    with pytest.raises(
        ValueError, match=r"^image is a raw photo, or another TIFF that begins with a preview; export it"
    ):
        opened("image", path)


def test_a_known_format_of_a_rare_kind_is_not_called_unknown(tmp_path: Path) -> None:
    path = written(quadrants(), tmp_path / "photo.png")
    content = path.read_bytes()
    path.write_bytes(content[:33] + struct.pack(">I", 3) + b"iCCPx\0\1" + bytes(4) + content[33:])
    with pytest.raises(
        ValueError, match=r"^image could not be decoded: the file is damaged, cut off or of a rare kind\.$"
    ):
        opened("image", path)


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
def test_a_tiff_in_more_strips_than_any_program_writes_is_refused(
    tmp_path: Path, large: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pillow takes minutes and gigabytes for 64 MB of them, much of it in a call that nothing can interrupt."""
    monkeypatch.setattr(decoding, "MAX_NUMBERS", 2000)
    most = r"2,000 strips, tiles or other numbers under one tag, or 65,535 tags\."
    refused = f"^image is a TIFF of too many parts: more than {most}$"
    rows, path = decoding.MAX_NUMBERS, tmp_path / "a.tiff"
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
    monkeypatch.setattr(decoding, "MAX_READS", 3000)
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
