"""What people type to name a LoRA → a Reference; what they send as a picture → a Url or Data.

Parsing is pure: no file is opened, no host is asked. What a reference is at its host now, hosts.py asks.
"""

import base64
import binascii
import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from urllib.parse import parse_qsl, quote, unquote, unquote_to_bytes, urlencode, urlsplit

from service.device_thread import check_cancelled
from settings import Settings, names_host
from sources.shown import redact

ACCEPTED = (
    "owner/name[/version] of Replicate, huggingface.co/owner/repo, civitai.com/models/id, "
    "urn:air:flux1:lora:civitai:model@version, an http(s) URL or a data: URI"
)
# Signed addresses have some 2,000 characters, and servers take no more than this.
MAX_CHARACTERS = 8192
# A data URI is decoded in pieces, between two of which others run: it may have a hundred megabytes.
PIECE = 2**18
COMMIT = re.compile(r"[0-9a-f]{40}")
NUMBER = "[0-9]{1,18}"


@dataclass(frozen=True)
class Replicate:
    """A model on Replicate, or one version of it."""

    owner: str
    model: str
    version: str | None = None

    def __repr__(self) -> str:
        """With its name alone."""
        return f"Replicate({self.name!r})"

    @property
    def address(self) -> str:
        """All of it, not to be shown; naming it again gives the same reference."""
        return "/".join(filter(None, (self.owner, self.model, self.version)))

    @property
    def name(self) -> str:
        """As it may be shown; the same as its address, unless that looks like a token."""
        return redact(self.address)


@dataclass(frozen=True)
class HuggingFace:
    """A repo on Hugging Face, or a folder or a file in it."""

    repo: str
    revision: str = "main"
    folder: str = ""
    file: str | None = None

    def __repr__(self) -> str:
        """With its name alone: a path may have a token in it, or a query that was encoded along with it."""
        return f"HuggingFace({self.name!r})"

    @property
    def address(self) -> str:
        """All of it, not to be shown; naming it again gives the same reference."""
        name, revision = f"huggingface.co/{self.repo}", quote(self.revision, safe="")
        if self.file is not None:
            return f"{name}/resolve/{revision}/{quote(self.file, safe='/:@')}"
        if self.folder or self.revision != "main":
            return f"{name}/tree/{revision}/{quote(self.folder, safe='/:@')}".rstrip("/")
        return name

    @property
    def name(self) -> str:
        """As it may be shown; the same as its address, unless that has in it what may be a secret."""
        return redact(self.address)


@dataclass(frozen=True)
class Civitai:
    """A model on CivitAI, which means its newest version for FLUX.1, or one version."""

    model: int | None
    version: int | None = None
    # Which of a version's files, as a download link says it: `type=Model&format=SafeTensor`.
    query: str = field(default="", repr=False)
    host: str = "civitai.com"
    # Some people paste links that hold their own token.
    token: str | None = field(default=None, repr=False)

    @property
    def name(self) -> str:
        """As it may be shown; naming it again gives the same version."""
        if self.version is None:
            return f"{self.host}/models/{self.model}"
        if self.model is None:
            return f"{self.host}/api/download/models/{self.version}"
        return f"urn:air:flux1:lora:civitai:{self.model}@{self.version}"


@dataclass(frozen=True)
class Url:
    """A file anywhere. The query belongs to the address (signed URLs) and is never shown."""

    url: str = field(repr=False)

    @property
    def name(self) -> str:
        """As it may be shown: without user, password, query and fragment."""
        return redact(self.url)


@dataclass(frozen=True)
class Data:
    """A file within the request."""

    content: bytes = field(repr=False)

    @cached_property
    def name(self) -> str:
        """As it may be shown: a short hash."""
        return f"sha256:{hashlib.sha256(self.content).hexdigest()[:12]}"


Reference = Replicate | HuggingFace | Civitai | Url | Data
Picture = Url | Data


def is_pinned(reference: Reference) -> bool:
    """Whether it can only ever mean the same file."""
    if isinstance(reference, HuggingFace):
        return COMMIT.fullmatch(reference.revision) is not None
    return isinstance(reference, Data) or (isinstance(reference, Replicate) and reference.version is not None)


def parse(text: str, settings: Settings | None = None) -> Reference:
    """Read a reference.

    Args:
        text: as somebody typed it.
        settings: their mirrors' addresses count as the hosts that they mirror.

    Raises:
        ValueError: a sentence that lists the accepted forms.
    """
    text = text.strip()
    if text[:5].lower() == "data:":
        return _parse_data(text)
    if len(text) > MAX_CHARACTERS:
        raise ValueError(
            f"A reference to a LoRA of {len(text)} characters is too long; it must be of at most {MAX_CHARACTERS}, "
            "or a data: URI."
        )
    if re.match(r"(urn:)?air:", text, re.IGNORECASE):
        return _parse_air(text)
    if re.match(r"https?://", text, re.IGNORECASE):
        return _parse_url(text, text, settings)
    if text.lower().removeprefix("www.").partition("/")[0] in READERS:
        return _parse_url(text, f"https://{text}", settings)
    if (reference := _read_replicate(text)) is not None:
        return reference
    raise _unknown(text)


def parse_picture(name: str, text: str) -> Picture:
    """Read where a picture lies, or the picture itself.

    Args:
        name: of the input, such as "image".
        text: as somebody sent it.

    Raises:
        ValueError: a sentence that names the input.
    """
    text = text.strip()
    if text[:5].lower() == "data:":
        return _parse_data(text, f"The data: URI of {name}")
    if len(text) > MAX_CHARACTERS:
        raise ValueError(
            f"{name} has {len(text)} characters; it must be an http(s) URL of at most {MAX_CHARACTERS}, or a data URI."
        )
    if not names_host(text) or re.search(r"[\x00-\x1f\x7f]", text) or _ends_in_login(text):
        raise ValueError(f"{name} is {redact(text)[:80]!r}; it must be an http(s) URL or a data URI.")
    return Url(text.partition("#")[0])


def _parse_url(text: str, url: str, settings: Settings | None) -> Reference:
    try:
        parts = urlsplit(url)
        host = (parts.hostname or "").lower().removeprefix("www.")
        port = parts.port
    except ValueError:
        raise _unknown(text) from None
    if not host or re.search(r"[\s\x00-\x1f\x7f]", url) or _ends_in_login(url):
        raise _unknown(text)
    readers = dict(READERS)
    if settings is not None:
        mirrors = (settings.hf_endpoint, settings.civitai_endpoint, settings.replicate_endpoint)
        for mirror, reader in zip(mirrors, (_read_hugging_face, _read_civitai, _read_replicate_page), strict=True):
            readers[urlsplit(mirror).netloc.lower()] = reader
    reader = readers.get(host if port is None else f"{host}:{port}")
    return Url(url.partition("#")[0]) if reader is None else reader(text, url)


def _ends_in_login(url: str) -> bool:
    """Whether what looks like a fragment may be the rest of a login: without it, a password would be a port."""
    before, _, fragment = url.partition("#")
    return "@" in fragment and redact(url) != redact(before)


def _read_replicate(path: str) -> Replicate | None:
    found = re.fullmatch(
        r"(?P<owner>[A-Za-z0-9_-]+)/(?P<model>[A-Za-z0-9_.-]*[A-Za-z0-9_-])"
        r"(?:(?:/versions/|/|:)(?P<version>[0-9a-f]{8,64}))?(?:/_weights)?/?",
        path,
    )
    if found is None or found["model"].endswith((".safetensors", ".tar", ".zip", ".gz")) or found["model"][0] == ".":
        return None
    return Replicate(found["owner"], found["model"], found["version"])


def _read_replicate_page(text: str, url: str) -> Replicate:
    reference = _read_replicate(unquote(urlsplit(url).path).strip("/"))
    if reference is None:
        raise ValueError(
            f"{redact(text)[:120]!r} names no model of Replicate; it must be replicate.com/owner/name[/version]."
        )
    return reference


def _read_hugging_face(text: str, url: str) -> HuggingFace:
    segments = [unquote(segment) for segment in urlsplit(url).path.split("/") if segment]
    name = r"[A-Za-z0-9_.-]+"
    if len(segments) < 2 or segments[0] in ("datasets", "spaces", "api", "models", "docs", "blog", "collections"):
        segments = []
    if not segments or not all(re.fullmatch(name, part) for part in segments[:2]) or ".." in segments:
        raise ValueError(
            f"{redact(text)[:120]!r} names no model on Hugging Face; it must be huggingface.co/owner/repo, "
            "with /resolve/revision/file or /tree/revision/folder where one is meant."
        )
    repo, rest = "/".join(segments[:2]), segments[2:]
    if not rest:
        return HuggingFace(repo)
    if rest[0] not in ("blob", "resolve", "raw", "tree") or len(rest) == 1:
        path = "/".join(rest)
        return HuggingFace(repo, file=path) if "." in rest[-1] else HuggingFace(repo, folder=path)
    length = 3 if rest[1] == "refs" and len(rest) > 3 else 1
    revision, path = "/".join(rest[1 : 1 + length]), "/".join(rest[1 + length :])
    return HuggingFace(repo, revision, file=path) if path and rest[0] != "tree" else HuggingFace(repo, revision, path)


def _read_civitai(text: str, url: str) -> Civitai:
    parts = urlsplit(url)
    host = "civitai.red" if (parts.hostname or "").endswith("civitai.red") else "civitai.com"
    query = dict(parse_qsl(parts.query))
    token = query.pop("token", None)
    if found := re.fullmatch(rf"/api/download/models/({NUMBER})/?", parts.path):
        return Civitai(None, int(found[1]), urlencode(query), host, token)
    if found := re.fullmatch(rf"(?:/api/v1)?/model-versions/({NUMBER})/?", parts.path):
        return Civitai(None, int(found[1]), "", host, token)
    found = re.fullmatch(rf"(?:/[a-z]{{2}})?(?:/api/v1)?/models/({NUMBER})(?:/[^/]*)?/?", parts.path)
    version = query.get("modelVersionId", "")
    if found is None or not re.fullmatch(f"({NUMBER})?", version):
        raise ValueError(
            f"{redact(text)[:120]!r} names no model on CivitAI; it must be civitai.com/models/id, "
            "with ?modelVersionId=id where one version is meant."
        )
    return Civitai(int(found[1]), int(version) if version else None, "", host, token)


def _parse_data(text: str, name: str = "The data: URI") -> Data:
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
    return Data(content)


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


def _parse_air(text: str) -> Civitai:
    found = re.fullmatch(
        r"(?:urn:)?(?:air:)?(?P<base>\w+):(?P<kind>\w+):(?P<source>\w+):"
        rf"(?P<model>{NUMBER})(?:@(?P<version>{NUMBER}))?(?:\.\w+)?",
        text,
        re.IGNORECASE,
    )
    if found is None or found["source"].lower() != "civitai":
        raise ValueError(
            f"{redact(text)[:120]!r} is no AIR of CivitAI; "
            "it must be urn:air:flux1:lora:civitai:model@version, with numbers."
        )
    if found["base"].lower() != "flux1":
        raise ValueError(f"{redact(text)[:120]!r} is for {found['base']}; it must be for flux1.")
    return Civitai(int(found["model"]), int(found["version"]) if found["version"] else None)


READERS = {
    "huggingface.co": _read_hugging_face,
    "hf.co": _read_hugging_face,
    "civitai.com": _read_civitai,
    "civitai.red": _read_civitai,
    "replicate.com": _read_replicate_page,
}


def _unknown(text: str) -> ValueError:
    return ValueError(f"{redact(text)[:120]!r} names no LoRA that can be fetched; it must be {ACCEPTED}.")
