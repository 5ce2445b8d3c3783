"""What a data URI holds: percent-escapes and base64, read in pieces, between two of which others run.

It may have a hundred megabytes. This module knows how it is written; it does not know what is in it.
"""

import base64
import binascii
import re
from collections.abc import Iterator
from urllib.parse import unquote_to_bytes

from service.device_thread import check_cancelled

PIECE = 2**18


def decode(text: str, name: str = "The data: URI") -> bytes:
    """The bytes that a data URI holds.

    Args:
        text: all of it, from data: on.
        name: what it is called in a sentence.

    Raises:
        ValueError: a sentence: it has no comma, is damaged or empty.
    """
    header, comma, payload = text.partition(",")
    if not comma:
        raise ValueError(f"{name} has no comma; it must be data:[type][;base64],content.")
    content = b"".join(_unquoted(payload))
    if re.search(r"; *base64 *(;|$)", header, re.IGNORECASE):
        content = content.translate(bytes.maketrans(b"-_", b"+/"), b" \t\n\r\v\f").rstrip(b"=")
        try:
            content = b"".join(_decoded(content))
        except binascii.Error:
            raise ValueError(f"{name} is damaged: what follows its comma is not base64.") from None
    if not content:
        raise ValueError(f"{name} is empty: no data follows its comma.")
    return content


def _unquoted(payload: str) -> Iterator[bytes]:
    """The bytes that a text with percent-escapes stands for, piece by piece; no piece ends within an escape."""
    start = 0
    while start < len(payload):
        check_cancelled()
        end = start + PIECE
        if (escape := payload.rfind("%", end - 2, end)) != -1:
            end = escape
        piece = payload[start:end].encode(errors="replace")
        yield unquote_to_bytes(piece) if b"%" in piece else piece
        start = end


def _decoded(content: bytes) -> Iterator[bytes]:
    """Base64 without padding, piece by piece."""
    for start in range(0, len(content), PIECE):
        check_cancelled()
        piece = content[start : start + PIECE]
        yield base64.b64decode(piece + b"=" * (-len(piece) % 4), validate=True)
