"""How names, sizes and addresses are shown to people: printable, rounded, without secrets. Knows text alone."""

import re
from urllib.parse import urlsplit

from settings import GIB, MIB


def printable(text: str) -> str:
    """What others have named, fit for a log: without line ends, colours, and halves of characters."""
    return "".join(character if character.isprintable() else "?" for character in text)


def gigabytes(size: int) -> str:
    """A number of bytes as people read it."""
    return f"{size / GIB:.2f} GB" if size >= GIB / 100 else f"{size / MIB:.2f} MB"


def redact(url: str) -> str:
    """A URL without what may be secret: user, password, query and fragment."""
    parts = urlsplit(url)
    return printable(parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl())


def redact_typed(text: str) -> str:
    """The same for what somebody typed, which need not be a URL; the beginning of it."""
    return re.sub(r"//[^/@]*@", "//", text.partition("?")[0].partition("#")[0])[:120]
