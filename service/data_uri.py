"""Data URIs, as which files travel within JSON; knows how they are written, not what the files are for."""

import base64
import binascii
import mimetypes
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote_to_bytes

from service.device_thread import check_cancelled

OCTETS = "application/octet-stream"
# The text of a file may have a hundred megabytes: cancelled work stops between two pieces, and other threads run.
PIECE = 2**18


def uri(content: bytes, media_type: str = OCTETS) -> str:
    """A data URI in base64."""
    return f"{head(media_type)}{base64.b64encode(content).decode()}"


def file_uri(path: Path) -> str:
    """A file as a data URI; its suffix says its media type."""
    return uri(path.read_bytes(), media_type_of(path.name))


def head(media_type: str) -> str:
    """The beginning of a data URI, before the content in base64."""
    return f"data:{media_type};base64,"


def decode(text: str, name: str = "The data: URI") -> tuple[str, bytes]:
    """The media type and the content, from percent-escapes or any usual base64; ValueError: a sentence about `name`."""
    header, comma, payload = text.partition(",")
    if not comma:
        raise ValueError(f"{name} has no comma; it must be data:[type][;base64],content.")
    content = b"".join(_unquoted(payload))
    media_type, in_base64 = re.subn(r"; *base64 *(?=;|$)", "", header[len("data:") :], flags=re.IGNORECASE)
    if in_base64:
        content = content.translate(bytes.maketrans(b"-_", b"+/"), b" \t\n\r\v\f").rstrip(b"=")
        try:
            content = b"".join(_decoded(content))
        except binascii.Error:
            raise ValueError(f"{name} is damaged: what follows its comma is not base64.") from None
    return media_type, content


def _unquoted(payload: str) -> Iterator[bytes]:
    """The bytes that percent-escapes stand for, piece by piece; no piece ends within an escape."""
    start = 0
    while start < len(payload):
        check_cancelled()
        end = start + PIECE
        if (escape := payload.rfind("%", end - 2, end)) != -1:
            end = escape
        yield unquote_to_bytes(payload[start:end].encode(errors="replace"))
        start = end


def _decoded(content: bytes) -> Iterator[bytes]:
    """Base64 without padding, decoded piece by piece."""
    for start in range(0, len(content), PIECE):
        check_cancelled()
        piece = content[start : start + PIECE]
        yield base64.b64decode(piece + b"=" * (-len(piece) % 4), validate=True)


def media_type_of(name: str) -> str:
    """The media type of a file, by its name."""
    # Not strict: for Python 3.11, image/webp is not a registered type, and most containers have no table of their own.
    return mimetypes.guess_type(name, strict=False)[0] or OCTETS


def suffix(media_type: str) -> str:
    """The suffix of files of a media type, such as `.webp`; empty if none is known."""
    return mimetypes.guess_extension(media_type, strict=False) or ""
