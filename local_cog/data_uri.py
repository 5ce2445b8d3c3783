"""Data URIs, as which files travel within Cog's JSON; knows nothing of what the files are for."""

import base64
import mimetypes
from pathlib import Path

OCTETS = "application/octet-stream"


def uri(content: bytes, kind: str = OCTETS) -> str:
    """Bytes and their media type as a data URI."""
    return f"{head(kind)}{base64.b64encode(content).decode()}"


def head(kind: str) -> str:
    """What a data URI of a media type begins with, before the content in base64."""
    return f"data:{kind};base64,"


def file_uri(path: Path) -> str:
    """A file as a data URI; its media type follows from its suffix."""
    return uri(path.read_bytes(), kind_of(path.name))


def decode(text: str) -> tuple[str, bytes]:
    """The media type of a base64 data URI, and its bytes; ValueError where it is none."""
    header, _, content = text.partition(",")
    if not header.endswith(";base64"):
        raise ValueError("It is no data URI in base64.")
    return header.removeprefix("data:").removesuffix(";base64"), base64.b64decode(content, validate=True)


def kind_of(name: str) -> str:
    """What a file holds, by its name."""
    # Not the registered types alone: where the system has no table of them, as in most containers, Python 3.11 has
    # image/webp among the others.
    return mimetypes.guess_type(name, strict=False)[0] or OCTETS


def suffix(kind: str) -> str:
    """What a file of a media type ends in, such as `.webp`; empty if that is not known."""
    return mimetypes.guess_extension(kind, strict=False) or ""
