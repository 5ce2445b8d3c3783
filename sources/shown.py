"""How names, sizes and addresses are shown to people: printable, rounded, without secrets. Knows text alone."""

import re

from settings import GIB, MIB

# Where an address may begin in a text: two slashes or more, however they lean, or a web scheme without them.
_BEGINNING = r"[/\\]{2,}|https?:[/\\]*"
_ADDRESS = re.compile(
    # An address ends at a space and where the next one begins; each group ends where the next can begin, so that the
    # time is in proportion to the text.
    rf"(?P<beginning>{_BEGINNING})(?P<authority>[^\s/\\?#]*)(?P<path>(?:(?!{_BEGINNING})[^\s?#])*)(?:[?#]\S*)?",
    re.IGNORECASE,
)
# The same without a scheme: civitai.com/models/1?token=…, user:password@example.com.
_QUERY = re.compile(r"\?[\w.~%+-]+=\S*")
_CREDENTIALS = re.compile(r"(?<![^\s/\\])[^\s/\\]*@(?=[\w-]+[.:/]|localhost|\[)")
_HOST = re.compile(r"[^:@%]*|([\w.-]*|\[[0-9a-f:.]*\]):\d*|\[[0-9a-f:.]*\]", re.IGNORECASE)


def printable(text: str) -> str:
    """What others have named, fit for a log: without line ends, colours, and halves of characters."""
    return "".join(character if character.isprintable() else "?" for character in text)


def brief(text: str) -> str:
    """The same, of at most 200 characters: hosts and archives set no limit to their names."""
    return printable(text[:200] if len(text) <= 200 else f"{text[:197]}...")


def gigabytes(size: int) -> str:
    """A number of bytes as people read it."""
    return f"{size / GIB:.2f} GB" if size >= GIB / 100 else f"{size / MIB:.2f} MB"


def redact(url: str) -> str:
    """One address without what may be secret: user, password, query and fragment; spaces are part of it."""
    # A space would end it: what stands there is none while the secrets are sought.
    spaced = re.sub(r"\s", "\0", re.split(r"[?#]", url, maxsplit=1)[0])
    return printable(redact_text(spaced).replace("\0", " "))


def redact_text(text: str) -> str:
    """A text whose addresses have lost user, password, query and fragment; what is no host is not shown either."""
    return _CREDENTIALS.sub(_shown_credentials, _QUERY.sub("", _ADDRESS.sub(_shown_address, text)))


def _shown_credentials(found: re.Match[str]) -> str:
    """Without a scheme, `me@example.com` is nobody's password, and `urn:air:…@…` is a model's name."""
    return found[0] if ":" not in found[0] or re.match("urn:|air:|mailto:", found[0], re.IGNORECASE) else ""


def _shown_address(found: re.Match[str]) -> str:
    host = found["authority"].rpartition("@")[2]
    return found["beginning"] + (host if _HOST.fullmatch(host) else "***") + found["path"]
