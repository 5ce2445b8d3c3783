"""A stranger's picture file → its first frame, upright, in the mode of the file.

Knows Pillow's readers, their holes, and how small files can keep them busy for minutes; it knows nothing of colours.
Every error is a `ValueError` whose sentence is for the person who sent the file.
"""

import io
import mmap
import re
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from PIL import ExifTags, Image, ImageOps, PngImagePlugin, UnidentifiedImageError

from service.device_thread import check_cancelled
from service.faults import out_of_memory
from settings import MIB

# Strangers' files reach no other reader of Pillow, since each may have holes.
READ_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
FILMS = ("GIF", "PNG", "WEBP", "AVIF")
# Formats that may add noise to pixels.
LOSSY = ("JPEG", "MPO", "WEBP", "AVIF")
ACCEPTED = f"{', '.join(READ_FORMATS[:-1])} or {READ_FORMATS[-1]}"
# Other files that people send, by their first bytes, and what to do instead.
HEAD_BYTES = 4096
OTHERS = {
    rb"\0\0..ftyp(?:(?:.{4}){0,15}?he[iv][cxmsf]|(?:mif1|msf1)(?!(?:.{4}){0,15}?avi[fs]))": (
        "a HEIC photo; save or export it as JPEG (iPhones do with Settings > Camera > Formats > Most Compatible)"
    ),
    rb"\0\0..ftyp(?:isom|iso\d|mp4|M4V|qt)": f"a video; send one picture of it, as {ACCEPTED}",
    rb"\xff\x0a|\0{3}\x0cJXL ": f"a JPEG XL picture; save it as {ACCEPTED}",
    rb"\xff\x4f\xff\x51|\0{3}\x0cjP  ": f"a JPEG 2000 picture; save it as {ACCEPTED}",
    rb"8BPS": f"a Photoshop document; export it as {ACCEPTED}",
    rb"%PDF": f"a PDF document; save its page as {ACCEPTED}",
    rb"(?:\xef\xbb\xbf)?\s*<(?!(?:.*<)?(?:!doctype )?html)(?:.*<)?svg[\s>]": f"an SVG drawing; export it as {ACCEPTED}",
    rb"(?:\xef\xbb\xbf)?\s*<": (
        "a web page: the link needs a login, has expired, or leads to a page about the picture; send the picture's own "
        f"address, or itself, as {ACCEPTED}"
    ),
}

# Bounds the decoding of a small file. Pillow refuses twice its own number before it decodes, for tiles and frames too,
# and warns above that number, which would only frighten the sender of a large photo.
MAX_PIXELS = 100_000_000
Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
# Pillow refuses a PNG whose colour profile or text unpacks to more than this; some have a few megabytes.
PngImagePlugin.MAX_TEXT_CHUNK = 16 * MIB
# Readers warn of what is odd in a stranger's file.
warnings.filterwarnings("ignore", module=r"PIL\.")

# Each scan of a progressive JPEG goes over all its pixels, however few bytes it has; encoders write about ten.
MAX_SCANS = 50
# Pixels times scans: a progressive JPEG of the largest size has about ten scans.
MAX_SCANNED_PIXELS = 15 * MAX_PIXELS
# The marker that begins a segment of a JPEG, or ends the file; not pixels, markers without a segment, or padding.
MARKER = re.compile(rb"\xff([^\x00\x01\xd0-\xd7\xff])", re.DOTALL)
SCAN, END = b"\xda", b"\xd9"

# How many numbers a TIFF may have under one tag, such as one for each of its strips: in one call, Pillow makes objects
# of all of them, and of the strips, at 20 microseconds and 360 bytes each.
MAX_NUMBERS = 100_000
# How many tags it may have.
MAX_ENTRIES = 65_535
TIFF_HEADS = (b"II*\0", b"MM\0*", b"II\0*", b"MM*\0", b"II+\0", b"MM\0+")
# The types that are bytes or text, which Pillow leaves as they are.
TIFF_BYTES = (1, 2, 6, 7)
NEW_SUBFILE_TYPE = 254

# How many reads a file may take: Pillow reads each part, such as a comment, by itself, and keeps an object of it.
MAX_READS = 1_000_000


@contextmanager
def decoded(path: Path, name: str) -> Iterator[Image.Image]:
    """The first frame of a file, upright, in the file's own mode.

    Its `info` has the file's own, "orientation" (the EXIF number by which it was turned), and "halved" (whether each
    sample is the upper half of sixteen bits: Pillow reads colours so). Errors inside the block are errors of the file
    too: some damage shows only when pixels are converted. `name` is the input that errors speak of.
    """
    try:
        # An open file: those that Pillow opens by name it maps into memory, and then garbles TIFFs that are turned.
        with _Watched(io.FileIO(path)) as file:
            _check_kind(file)
            _check_numbers(file)
            with Image.open(file, formats=READ_FORMATS) as picture:
                if picture.format in ("JPEG", "MPO"):
                    _check_scans(file, picture.width * picture.height)
                if picture.format == "TIFF" and picture.tag_v2.get(NEW_SUBFILE_TYPE, 0) & 1:
                    raise _KindError("a raw photo, or another TIFF that begins with a preview; export it as JPEG")
                if picture.format in FILMS and picture.is_animated:
                    print(f"{name} is an animation; its first frame is used.")
                if picture.format == "TIFF" and picture.tag_v2.next:  # is_animated would walk through all pages
                    print(f"{name} holds more than one picture; its first one is used.")
                deep = picture.format in ("PNG", "TIFF") and ";16" in str(picture.tile)
                picture.info["halved"] = deep and picture.mode in ("RGB", "RGBA")
                _scale_transparency(picture)
                orientation = None
                with suppress(Exception):  # broken EXIF is no reason to refuse good pixels: they stay as they lie
                    orientation = picture.getexif().get(ExifTags.Base.Orientation)
                picture.load()  # which turns a TIFF
                with suppress(Exception):
                    ImageOps.exif_transpose(picture, in_place=True)
                picture.info["orientation"] = orientation if orientation in range(1, 9) else 1
                yield picture
    except Image.DecompressionBombError as error:
        pixels = int(re.search(r"\d+", str(error)).group())
        raise ValueError(
            f"{name} is too large: it has {pixels / 1e6:,.1f} megapixels, of at most {MAX_PIXELS / 1e6:g}."
        ) from None
    except _KindError as error:
        raise ValueError(f"{name} is {error}.") from None
    except Exception as error:  # hostile bytes bring out anything from a decoder, and its message may contain the path
        if out_of_memory(error):
            raise
        if isinstance(error, UnidentifiedImageError) and not _begins_as_known(path):
            raise ValueError(f"{name} is not a picture in a known format; send {ACCEPTED}.") from None
        raise ValueError(f"{name} could not be decoded: the file is damaged, cut off or of a rare kind.") from None


def turn(picture: Image.Image, orientation: int) -> Image.Image:
    """The picture turned as EXIF prescribes for an orientation, 1 to 8."""
    picture.getexif()[ExifTags.Base.Orientation] = orientation
    return ImageOps.exif_transpose(picture)


class _Watched(io.BufferedReader):
    """A file whose reads, of which Pillow makes many small ones, are counted, and end when the work is cancelled."""

    reads = 0

    def read(self, size: int | None = -1, /) -> bytes:
        check_cancelled()
        self.reads += 1
        if self.reads > MAX_READS:
            raise _KindError("a file of too many parts")
        return super().read(size)


class _KindError(Exception):
    """A file that is refused: says what it is."""


def _begins_as_known(path: Path) -> bool:
    """Whether one of the readers accepts the first bytes of a file."""
    with path.open("rb") as file:
        head = file.read(16)
    accepts = (Image.OPEN[form][1] for form in READ_FORMATS)
    return any(accept is not None and accept(head) for accept in accepts)


def _check_kind(file: io.BufferedReader) -> None:
    """Refuse other kinds of files by their names."""
    head = file.read(HEAD_BYTES)
    file.seek(0)
    for beginning, kind in OTHERS.items():
        if re.match(beginning, head, re.DOTALL | re.IGNORECASE):
            raise _KindError(kind)


def _check_scans(file: io.BufferedReader, pixels: int) -> None:
    """Refuse a JPEG of too many scans, which would take minutes in a call that cannot be interrupted."""
    scans, position = 0, 2
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        while (found := MARKER.search(content, position)) and found[1] != END:
            check_cancelled()
            scans += found[1] == SCAN
            if scans > MAX_SCANS or scans * pixels > MAX_SCANNED_PIXELS:
                raise _KindError(f"a JPEG of too many scans: more than {MAX_SCANS}, or than its size allows")
            position = found.end() + int.from_bytes(content[found.end() : found.end() + 2])


def _check_numbers(file: io.BufferedReader) -> None:
    """Refuse a TIFF with too many numbers under one tag of its first frame, read as Pillow reads it."""
    head = file.read(16)
    if head.startswith(TIFF_HEADS):
        order, large = "<" if head.startswith(b"I") else ">", head[2:3] == b"+"
        offset, count, entry = (order + code for code in (("8xQ", "Q", "2xHQ8x") if large else ("4xI", "H", "2xHI4x")))
        file.seek(*struct.unpack_from(offset, head))
        entries = struct.unpack(count, file.read(struct.calcsize(count)))[0]
        content = file.read(min(entries, MAX_ENTRIES) * struct.calcsize(entry))
        # Where the directory is cut off, Pillow takes the entries that are there.
        whole = content[: len(content) - len(content) % struct.calcsize(entry)]
        numbers = [number for kind, number in struct.iter_unpack(entry, whole) if kind not in TIFF_BYTES]
        if entries > MAX_ENTRIES or any(number > MAX_NUMBERS for number in numbers):
            most = f"{MAX_NUMBERS:,} strips, tiles or other numbers under one tag, or {MAX_ENTRIES:,} tags"
            raise _KindError(f"a TIFF of too many parts: more than {most}")
    file.seek(0)


def _scale_transparency(picture: Image.Image) -> None:
    """Convert the transparent colour of a PNG to eight bits, as Pillow has done with the pixels."""
    stored, colour = picture.tile and picture.tile[0].args, picture.info.get("transparency")
    if stored in ("L;2", "L;4") and colour is not None:
        picture.info["transparency"] = colour * 255 // (2 ** int(stored[2]) - 1)
    elif stored == "RGB;16B" and colour is not None:
        picture.info["transparency"] = tuple(sample >> 8 for sample in colour)
