"""The text that names one LoRA → a Reference; the text that is sent as a picture → a Url or Data.

Parsing is pure: no file is opened, and no host is asked; hosts.py does that.
"""

import hashlib
import re
import unicodedata
from dataclasses import dataclass, field, replace
from functools import cached_property
from urllib.parse import SplitResult, parse_qsl, quote, unquote, urlencode, urlsplit

from service.data_uri import decode
from settings import Settings, names_host
from sources.shown import BLANKS, QUOTES, quoted, redact

ELSEWHERE = (
    "owner/name[/version] of Replicate, huggingface.co/owner/repo, civitai.com/models/id, "
    "urn:air:flux1:lora:civitai:model@version, an http(s) URL or a data: URI"
)
ACCEPTED = f"a name or local:folder/name of LORAS_DIR, {ELSEWHERE}"
SUFFIXES = (".safetensors", ".tar", ".tar.gz", ".tgz", ".zip")
# Signed addresses have some 2,000 characters, and servers accept no more than this.
MAX_CHARACTERS = 8192
COMMIT = re.compile(r"[0-9a-f]{40}")
NUMBER = "[0-9]{1,18}"
# No address has one of these, and some break a line of a log.
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
# Characters that some systems forbid in the names of files, or that mean something else in an address.
NO_NAME = re.compile(r'[\\:*?"<>|#;%@]')
# The characters that a header may have: a token with any other was copied wrongly.
TOKEN = re.compile(r"[!-~]+")
# Pages of replicate.com, at the place of a model's owner.
NO_OWNERS = re.compile(
    "about|account|api|blog|billing|changelog|collections|create|customers|dashboard|deployments|docs|enterprise|"
    "explore|home|invoices|jobs|login|models|playground|predictions|pricing|privacy|search|settings|showcase|signin|"
    "signup|status|support|terms|trainings|webhooks"
)
# Pages of huggingface.co, at the place of an owner; and pages about a repo, at the place of a file.
NO_REPOS = re.compile(
    "api|blog|chat|collections|datasets|docs|join|kernels|learn|login|models|new|organizations|papers|posts|settings|"
    "spaces|tasks"
)
ABOUT_REPOS = re.compile("blame|colab|commits?|community|discussions|edit|settings|upload")


class _Named:
    """A reference of one form. Only its name is ever shown: the rest may hold a token, or be one."""

    token: str | None = None  # in the reference itself: some people paste links with their own

    def __repr__(self) -> str:
        """The form and the name."""
        return f"{type(self).__name__}({self.name!r})"

    @property
    def name(self) -> str:
        """The address without secrets: if it has none, this parses to the same. Forms without address override it."""
        return redact(self.address)


@dataclass(frozen=True, repr=False)
class Local(_Named):
    """A LoRA of the operator's folder LORAS_DIR, by its path there, without suffix."""

    path: str

    @property
    def address(self) -> str:
        """The text that parses to this reference."""
        return self.path if _is_word(self.path) else f"local:{self.path}"


@dataclass(frozen=True, repr=False)
class Replicate(_Named):
    """A model on Replicate, or one version of it."""

    owner: str
    model: str
    version: str | None = None
    token: str | None = None

    @property
    def address(self) -> str:
        """The text that parses to this reference, token included."""
        path = "/".join(filter(None, (self.owner, self.model, self.version)))
        return path if self.token is None else f"replicate.com/{path}?{urlencode({'token': self.token})}"

    @property
    def name(self) -> str:
        """The address without token and host."""
        return redact(replace(self, token=None).address)


@dataclass(frozen=True, repr=False)
class HuggingFace(_Named):
    """A repo on Hugging Face, or a folder or a file in it."""

    repo: str
    revision: str = "main"
    folder: str = ""
    file: str | None = None
    token: str | None = None

    @property
    def address(self) -> str:
        """The text that parses to this reference, token included."""
        place, revision = f"huggingface.co/{self.repo}", quote(self.revision, safe="")
        if self.file is not None:
            place = f"{place}/resolve/{revision}/{quote(self.file, safe='/:@')}"
        elif self.folder or self.revision != "main":
            place = f"{place}/tree/{revision}/{quote(self.folder, safe='/:@')}".rstrip("/")
        return place if self.token is None else f"{place}?{urlencode({'token': self.token})}"


@dataclass(frozen=True, repr=False)
class Civitai(_Named):
    """One version of a model on CivitAI; without a version, the newest for the model that draws."""

    model: int | None
    version: int | None = None
    query: str = ""  # which of a version's files, as in a download link: `type=Model&format=SafeTensor`
    host: str = "civitai.com"
    token: str | None = None
    drawn_with: str = "dev"  # or schnell

    @property
    def name(self) -> str:
        """A text that parses to the same version."""
        if self.version is None:
            return f"{self.host}/models/{self.model}"
        if self.model is None:
            return f"{self.host}/api/download/models/{self.version}"
        return f"urn:air:flux1:lora:civitai:{self.model}@{self.version}"


@dataclass(frozen=True, repr=False)
class Url(_Named):
    """A file anywhere; its query is kept, since signed URLs need it."""

    url: str
    cut: bool = field(default=False, compare=False)  # of a picture: whether a #fragment was left out of it

    @property
    def name(self) -> str:
        """The address without login, query and fragment."""
        return redact(self.url)


@dataclass(frozen=True, repr=False)
class Data(_Named):
    """A file within the request."""

    content: bytes

    @cached_property
    def name(self) -> str:
        """A short hash."""
        return f"sha256:{hashlib.sha256(self.content).hexdigest()[:12]}"


Reference = Local | Replicate | HuggingFace | Civitai | Url | Data
Picture = Url | Data


def is_pinned(reference: Reference) -> bool:
    """Whether it always means the same file."""
    if isinstance(reference, HuggingFace):
        return COMMIT.fullmatch(reference.revision) is not None
    return isinstance(reference, Data) or (isinstance(reference, Replicate) and reference.version is not None)


def identity(reference: Reference) -> str:
    """All that chooses a reference's file or gives access to it, as the name of its record; it may hold a token."""
    match reference:
        case Local(path):
            return f"local {path}"
        case Url(url):
            return f"url {url}"
        case Data(content):
            return f"data {hashlib.sha256(content).hexdigest()}"
        case Civitai(version=None):
            return f"{reference.name} {reference.host} {reference.token} {reference.drawn_with}"
        case Civitai():
            return f"{reference.name} {reference.host} {reference.query} {reference.token}"
        case HuggingFace() | Replicate():
            return reference.address


def parse(text: str, settings: Settings | None = None, model: str = "dev") -> Reference:
    """The reference in a text as somebody typed or pasted it; ValueError: a sentence that lists the accepted forms.

    Args:
        text: the reference.
        settings: an address of one of their mirrors is read as one of the host that it mirrors.
        model: the model that draws, dev or schnell.
    """
    reference = _parse(unwrapped(text), settings)
    return replace(reference, drawn_with=model) if isinstance(reference, Civitai) else reference


def _parse(text: str, settings: Settings | None) -> Reference:
    if text[:5].lower() == "data:":
        return _read_data(text)
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
    if text[:6].lower() == "local:" or _is_word(text):
        return _parse_local(text)
    if (reference := _read_replicate(text)) is not None:
        return reference
    if re.fullmatch("sha256:[0-9a-f]{12}", text):  # see `Data.name`
        raise ValueError(f"{text!r} is how a data: URI was named that came within a request; it must be sent again.")
    raise _unknown(text)


def _read_data(text: str, name: str = "The data: URI") -> Data:
    content = decode(text, name)[1]
    if not content:
        raise ValueError(f"{name} is empty: no data follows its comma.")
    return Data(content)


def unwrapped(text: str) -> str:
    """The text without the spaces, invisible characters and quotes around it that pasting brings along."""
    text = text.strip(BLANKS)
    for _ in range(8):  # more nested quotes are no mistake of pasting, and each turn copies a long text
        if len(text) > 1 and QUOTES.get(text[0]) == text[-1]:
            text = text[1:-1].strip(BLANKS)
    return text


def left_out(name: str) -> str:
    """The sentence about an address whose fragment was left out."""
    return f"{name}: what follows the # was left out; a # in the name of a file must be written %23."


def parse_picture(name: str, text: str) -> Picture:
    """The address of a picture, or the picture itself, from the text of the input called `name`.

    Raises:
        ValueError: a sentence that names the input.
    """
    text = unwrapped(text)
    if text[:5].lower() == "data:":
        return _read_data(text, f"The data: URI of {name}")
    if len(text) > MAX_CHARACTERS:
        raise ValueError(
            f"{name} has {len(text)} characters; it must be an http(s) URL of at most {MAX_CHARACTERS}, or a data URI."
        )
    if not _is_address(text):
        raise ValueError(f"{name} is {quoted(text, 80)}; it must be an http(s) URL or a data URI.")
    address, fragment, _ = text.partition("#")
    return Url(address, cut=bool(fragment))


def _parse_url(text: str, url: str, settings: Settings | None) -> Reference:
    if not _is_address(url):
        raise _unknown(text)
    readers = dict(READERS)
    if settings is not None:
        readers[_place(settings.hf_endpoint)] = _read_hugging_face
        readers[_place(settings.civitai_endpoint)] = _read_civitai
        readers[_place(settings.replicate_endpoint)] = _read_replicate_page
    reader = readers.get(_place(url))
    return Url(url.partition("#")[0]) if reader is None else reader(text, urlsplit(url))


def _is_address(url: str) -> bool:
    """Whether a URL names a host, and has only characters that an address may have."""
    if not names_host(url) or CONTROL.search(url) or _ends_in_login(url):
        return False
    # A space or a quote in a path is part of a file's name; in a host it is a mistake.
    place = urlsplit(url).netloc
    return not re.search(r"\s", place) and not set(place.rpartition("@")[2]) & {*QUOTES, *QUOTES.values()}


def _place(url: str) -> str:
    """Host and port in one spelling: without login, without www., without the scheme's own port."""
    try:
        parts = urlsplit(url)
        host = (parts.hostname or "").removeprefix("www.")
        own = parts.port in (None, {"http": 80, "https": 443}.get(parts.scheme))
    except ValueError:  # a mirror's address may be wrong
        return ""
    return host if own else f"{host}:{parts.port}"


def _ends_in_login(url: str) -> bool:
    """Whether an apparent fragment may be the rest of a login: if it were cut, a password would become a port."""
    before, _, fragment = url.partition("#")
    return "@" in fragment and redact(url) != redact(before)


def _token_in(text: str, parts: SplitResult) -> str | None:
    """The token in an address: `token=`, else its password or its user, which such hosts do not use otherwise."""
    login = unquote(parts.password or parts.username or "")
    token = dict(parse_qsl(parts.query)).get("token") or login or None
    if token is not None and TOKEN.fullmatch(token) is None:
        raise ValueError(f"The token in {quoted(text)} must be one word of letters, digits and signs, without spaces.")
    return token


def suffix_of(name: str) -> str:
    """The longest of `SUFFIXES` that a name ends in, in whatever case; empty where it ends in none."""
    return max((it for it in SUFFIXES if name.lower().endswith(it)), key=len, default="")


def _is_word(text: str) -> bool:
    """Whether a text is one word of letters, digits and marks of any script, _, . and -."""
    inside = text.replace("_", "").replace(".", "").replace("-", "")
    return text[:1] not in ("", ".", "-") and all(unicodedata.category(sign)[0] in "LMN" for sign in inside)


def _parse_local(text: str) -> Local:
    path = unicodedata.normalize("NFC", text[6:].strip() if text[:6].lower() == "local:" else text)
    if suffix := suffix_of(path):
        raise ValueError(
            f"{quoted(text)} ends in {suffix}; a LoRA of LORAS_DIR must be named without it, as "
            f"{quoted(text[: -len(suffix)])}."
        )
    hidden = any(part.strip()[:1] in ("", ".") for part in path.split("/"))
    if hidden or not path.isprintable() or NO_NAME.search(path):
        raise ValueError(
            f"{quoted(text)} names no LoRA of LORAS_DIR; it must be local:name or local:folder/name, without suffix."
        )
    return Local(path)


def _read_replicate(path: str) -> Replicate | None:
    found = re.fullmatch(
        r"(?P<owner>[A-Za-z0-9_-]+)/(?P<model>[A-Za-z0-9_.-]*[A-Za-z0-9_-])"
        r"(?:(?:/versions/|/|:)(?P<version>[0-9a-f]{8,64}))?(?:/_weights)?/?",
        path,
    )
    if found is None or found["model"].endswith((*SUFFIXES, ".gz")) or found["model"][0] == ".":
        return None
    return Replicate(found["owner"], found["model"], found["version"])


def _read_replicate_page(text: str, parts: SplitResult) -> Replicate:
    path = unquote(parts.path).strip("/")
    first, *rest = path.split("/")
    shown = quoted(text)
    if first == "p":
        raise ValueError(
            f"{shown} is a prediction or a training of Replicate; it must be the model, as owner/name, or the "
            "address of the trained_model.tar."
        )
    if NO_OWNERS.fullmatch(first) is None:
        if (reference := _read_replicate(path)) is not None:
            return replace(reference, token=_token_in(text, parts))
        if len(rest) > 1 and (model := _read_replicate(f"{first}/{rest[0]}")) is not None:
            raise ValueError(
                f"{shown} is a page about a model of Replicate; it must be {model.name}, or a version of it."
            )
    raise ValueError(f"{shown} names no model of Replicate; it must be replicate.com/owner/name[/version].")


def _read_hugging_face(text: str, parts: SplitResult) -> HuggingFace:
    token = _token_in(text, parts)
    segments = [unquote(segment) for segment in parts.path.split("/") if segment]
    is_repo = len(segments) > 1 and all(re.fullmatch(r"[A-Za-z0-9_.-]+", part) for part in segments[:2])
    if not is_repo or NO_REPOS.fullmatch(segments[0]) or ".." in segments:
        raise ValueError(
            f"{quoted(text)} names no model on Hugging Face; it must be huggingface.co/owner/repo, "
            "with /resolve/revision/file or /tree/revision/folder where one is meant."
        )
    repo, rest = "/".join(segments[:2]), segments[2:]
    if rest and ABOUT_REPOS.fullmatch(rest[0]):
        raise ValueError(
            f"{quoted(text)} is a page about a model on Hugging Face; it must be "
            f"{HuggingFace(repo).name}, or a file of it."
        )
    if len(rest) < 2 or rest[0] not in ("blob", "resolve", "raw", "tree"):
        path, revision, is_file = "/".join(rest), "main", any("." in part for part in rest[-1:])
    else:
        length = 3 if rest[1] == "refs" and len(rest) > 3 else 1
        revision, path = "/".join(rest[1 : 1 + length]), "/".join(rest[1 + length :])
        is_file = bool(path) and rest[0] != "tree"
    return HuggingFace(repo, revision, "" if is_file else path, path if is_file else None, token)


def _read_civitai(text: str, parts: SplitResult) -> Civitai:
    host = "civitai.red" if (parts.hostname or "").endswith("civitai.red") else "civitai.com"
    query = dict(parse_qsl(parts.query))
    query.pop("token", None)
    token = _token_in(text, parts)
    # The path of a page in another language begins with it: /pt-BR, /zh-Hans, /es-419.
    path = re.sub(r"^/(?!api/)[A-Za-z]{2,3}(?:-[A-Za-z0-9]{2,4})?(?=/)", "", parts.path)
    if found := re.fullmatch(rf"(/api/download/models|(?:/api/v1)?/model-versions)/({NUMBER})/?", path):
        download = found[1] == "/api/download/models"
        return Civitai(None, int(found[2]), urlencode(query) if download else "", host, token)
    found = re.fullmatch(rf"(?:/api/v1)?/models/({NUMBER})(?:/[^/]*)?/?", path)
    version = query.get("modelVersionId", "")
    if found is None or not re.fullmatch(f"({NUMBER})?", version):
        raise ValueError(
            f"{quoted(text)} names no model on CivitAI; it must be civitai.com/models/id, "
            "with ?modelVersionId=id where one version is meant."
        )
    return Civitai(int(found[1]), int(version) if version else None, "", host, token)


def _parse_air(text: str) -> Civitai:
    found = re.fullmatch(
        r"(?:urn:)?(?:air:)?(?P<base>\w+):(?P<kind>\w+):(?P<source>\w+):"
        rf"(?P<model>{NUMBER})(?:@(?P<version>{NUMBER}))?(?:\.\w+)?",
        text,
        re.IGNORECASE,
    )
    if found is None or found["source"].lower() != "civitai":
        raise ValueError(
            f"{quoted(text)} is no AIR of CivitAI; it must be urn:air:flux1:lora:civitai:model@version, with numbers."
        )
    if found["base"].lower() != "flux1":
        raise ValueError(f"{quoted(text)} is for {found['base']}; it must be for flux1.")
    return Civitai(int(found["model"]), int(found["version"]) if found["version"] else None)


READERS = {
    "huggingface.co": _read_hugging_face,
    "hf.co": _read_hugging_face,
    "civitai.com": _read_civitai,
    "civitai.red": _read_civitai,
    "replicate.com": _read_replicate_page,
}


def _unknown(text: str) -> ValueError:
    # owner/name#1: the part that is shown would be right
    hidden = "" if redact(text) == text else ", with what is not shown of it,"
    return ValueError(f"{quoted(text)}{hidden} names no LoRA that can be fetched; it must be {ACCEPTED}.")
