"""Names, sizes and addresses as people may see them: printable, rounded, without secrets.

Of an address, scheme, host and path are shown, but no login, query or fragment. Typed passwords may contain slashes:
where the text before an @ is not certainly a host, all of it is taken for a login.
"""

import hashlib
import re
from collections.abc import Iterator
from typing import NamedTuple
from urllib.parse import urlsplit

from service.lines import printable
from settings import GIB, MIB

# The end of the name of a secret, in a query or an input: HF_TOKEN, X-Amz-Signature, api-key.
SECRET_NAME = (
    r"(?:token|secret|passw(?:or)?d|pwd|passphrase|(?:api|access|secret|private)[_-]?key|authorization|credential"
    r"|signature|(?:(?<![^\W_])|(?<=%[0-9a-f]{2}))sig|sessionid)"
)
# The beginning of an address in a text: two slashes or backslashes or more, or a web scheme without them.
_HEAD = re.compile(r"https?:[/\\]*|[/\\]{2,}", re.IGNORECASE)
_SCHEME = re.compile("https?:", re.IGNORECASE)  # begins another address within one: https://a/https://b
# Schemes that are no names of users: s3://u:p@bucket has a scheme, but me://p@host may be user and password.
_STORE = re.compile(
    r"(?:^|[^\w:@])(?:s3a?|gs|gcs|az|adl|abfss?|hf|ftps?|sftp|ssh|file|git|wss?|rediss?|postgres(?:ql)?(?:\+\w{1,20})?):$",
    re.IGNORECASE,
)
_QUERY = re.compile("[?#;]")  # its beginning, though these signs may stand in a password: u:p?w@host
_AUTHORITY = re.compile(r"[^/\\?#]*")  # an address up to its path: u:p@host:80
# The end of a login, percent-encoded or not, even several times: u:p@host, u:p%40host, u:p%2540host.
_AT = re.compile("@|%(?:25)*40")
# The end of a path, percent-encoded or not: x.png?token=, x.png%3Ftoken%3D.
_END = re.compile("[?#;]|%(?:25)*(?:3f|23|3b)", re.IGNORECASE)
# A host without a scheme before it: example.com, 10.0.0.1; no number: 1.5.
_NAME = r"(?:[\w-]++\.)++(?=[^\W\d_])[\w-]++|(?:\d{1,3}\.){3}\d{1,3}"
# Certainly no login: a name with a dot but no colon after it, or the address of a machine: localhost:80.
_CERTAIN = re.compile(
    r"(?:[\w-]++\.)++[\w-]*+|(?:(?:\d{1,3}\.){3}\d{1,3}|localhost|\[[0-9a-f:.]*\])(?::\d*)?", re.IGNORECASE
)
# A host and no password: host, host:80, [::1]:80; not host:secret.
_HOST = re.compile(r"[^:@%]*|([\w.-]*|\[[0-9a-f:.]*\]):\d*|\[[0-9a-f:.]*\]", re.IGNORECASE)
# An address without a scheme: civitai.com/models/1, (example.com/a.
_BARE_ADDRESS = re.compile(rf"[^\w\s/\\@:]*+(?:{_NAME}|localhost)(?::\d*)?[/\\?#]", re.IGNORECASE)
_BARE_QUERY = re.compile(r"[?#;][\w.~%+-]++=")  # behind a text that is no address: /a.png?token=1
# A user before such an address: token@github.com/a; me@example.com is a person.
_BARE_USER = re.compile(rf"[^/\\@:?#]*@(?=(?:{_NAME})(?::\d*)?[/\\])")
_BARE_AT = re.compile(r"(?:@|%(?:25)*40)(?=[\w\[])")  # the end of a login before a host: u:p@host, u:p@[::1]
# No logins though they have a colon and an @: AIRs and models of CivitAI (civitai:1@2), weights and ratios
# (16:9@24fps), times (10:30@cafe), accounts (artist:@greg), images of Docker (x:tag@sha256:0a), and addresses of people
# (mailto:me@example.com).
_NO_LOGIN = re.compile(
    r"\W*+(?:urn:air:.*|(?:[\w-]+:)+\d+(?:\.\d+)?@\d+(?:\.\w+)?\W*|\d+:\d+@\w*\W*|\d{1,2}:\d{1,2}@[^@%:]*"
    r"|(?-i:[a-z]{1,9}):@[^@%:]*|[^@%]*@sha256:[0-9a-f]+\W*|.*\bmailto:[^:@]*@[^@]*)",
    re.IGNORECASE | re.DOTALL,
)
# Tokens of Hugging Face, Replicate, GitHub, GitLab, npm, Slack, OpenAI, CivitAI and others (hf_A…, sk-proj-1…), of
# headers (Bearer A…), of AWS (AKIA…), and JSON Web Tokens (eyJ….eyJ….…).
_TOKEN = re.compile(
    r"(?:\b|(?<=%[0-9A-Fa-f]{2}))(?:"
    r"(?:hf|r8|gh[pousr]|github_pat|glpat|npm|xox[abp]|sk|pk|api|civitai)[_-]([A-Za-z0-9_-]{16,})"
    r"|(?i:bearer)[ \t]{1,4}([\w.~+/-]{8,}=*)|A[KS]IA[0-9A-Z]{16}|eyJ[\w-]{8,}(?:\.[\w-]*)*)"
)
# A value with the name of a secret: token=1, api_key%3D1.
_NAMED = re.compile(rf"({SECRET_NAME}(?:=|%(?:25)*3d))([^\s&]+)", re.IGNORECASE)
# Signs of a random text, unlike token=of or hf_style_illustrations_retro: digits, capitals, very long words.
_RANDOM = re.compile(r"[0-9]|(?<!^)[A-Z]|[a-z]{16}")
_RANDOM_TOKEN = re.compile(r"[0-9A-Z]|[a-z]{16}")
# Copied along on both sides of an address: spaces of every kind and invisible characters, such as \ufeff; and quotes,
# here by the opening one: "https://host", <https://host>.
BLANKS = "".join(
    (
        *filter(str.isspace, map(chr, range(0x3001))),
        *map(chr, (0xAD, *range(0x200B, 0x2010), *range(0x202A, 0x202F), *range(0x2060, 0x2070), 0xFEFF)),
    )
)
QUOTES = {'"': '"', "'": "'", "“": "”", "‘": "’", "`": "`", "<": ">"}
_AROUND = rf"[{BLANKS}\x00-\x1f\x7f-\xa0{''.join(QUOTES)}]*+"
_TYPE = r"[\w.+-]{1,80}/[\w.+-]{1,80}"  # in a data URI: image/png
# A data URI, perhaps damaged: data:image/png;base64,aGk=; but no prompt: data: a table, 3 rows.
_DATA = re.compile(
    rf"{_AROUND}(data:)(?:(?=[^,]*;\s*base64)|(?:(?!\s)|(?=\s*{_TYPE}))(?![^,]*,\x20))(?:[^,]*,|\S*$)", re.IGNORECASE
)
_DATA_TYPE = re.compile(rf"\s*({_TYPE})?")
# The same within a text: see data:image/png;base64,aGk= here.
_DATA_IN_TEXT = re.compile(r"\bdata:([^,\r\n]{0,120}),(\s{0,4})\S+", re.IGNORECASE)
# A text that is a reference, which may have spaces (https://u:p w@host, example.com/a b) or not (owner/name, u:p@host).
_REFERENCE = re.compile(
    rf"{_AROUND}(?:(?:(?:[a-z][a-z0-9+.-]{{0,20}}:)?[/\\]{{2,}}|https?:|(?:{_NAME})(?::\d*)?[/\\?#])(?=\S)"
    rf"|[^\s/\\@]*+[/\\@]\S*+[{BLANKS}{''.join(QUOTES.values())}]*+$)",
    re.IGNORECASE,
)


class _Piece(NamedTuple):
    """A part of an address, and the text that is shown instead."""

    text: str
    shown: str


def brief(text: str) -> str:
    """A stranger's name, fit for a log: in one line of at most 200 characters."""
    return printable(text if len(text) <= 200 else f"{text[:197]}...")


def noted(text: str) -> str:
    """A stranger's text, fit for a log: in one line, without secrets."""
    return brief(redact_text(text[:1000]))


def gigabytes(size: int) -> str:
    """A number of bytes in GB or MB."""
    return f"{size / GIB:.2f} GB" if size >= GIB / 100 else f"{size / MIB:.2f} MB"


def is_reference(text: str) -> bool:
    """Whether all of a text looks like one address, one model or one file, spaces included."""
    return _DATA.match(text) is not None or _REFERENCE.match(text.strip()) is not None


def redact(reference: str) -> str:
    """A reference of any form, spaces included, in one line without secrets; a data URI by its SHA-256."""
    if found := _DATA.match(reference):
        header = reference[found.end(1) : found.end(1) + 200].partition(",")[0]
        kind = _DATA_TYPE.match(header)[1] or ""
        packed = ";base64" if "base64" in header.lower() else ""
        digest = hashlib.sha256(reference.encode(errors="replace")).hexdigest()[:16]
        return f"{found[1]}{kind}{packed},sha256-{digest}"
    return printable(hide_tokens("".join(piece.shown for piece in _pieces_of(reference))).replace("\0", " "))


def quoted(reference: str, limit: int = 120) -> str:
    """A reference as a sentence names it: between quotes, without secrets, shortened."""
    return repr(redact(reference)[:limit])


def hidden(reference: str) -> list[str]:
    """The parts that `redact` leaves out: a login with its @, the rest from ?, # or ; on, a data URI's content."""
    if _DATA.match(reference):
        return [reference.partition(",")[2]]
    parts, at = [], 0
    for piece in _pieces_of(reference):
        start, at = at, at + len(piece.text)
        if piece.text not in ("", piece.shown):
            parts.append(reference[start:at])  # with the blanks that it has there
    return parts


def redact_text(text: str) -> str:
    """A text with its addresses, each up to a space, as `redact` shows them."""
    return hide_tokens(re.sub(r"\S+", _shown_word, _DATA_IN_TEXT.sub(_shown_data, text)))


def hide_tokens(text: str) -> str:
    """The text without values that look like tokens, or are named as secrets."""
    return _NAMED.sub(_without_value, _TOKEN.sub(_without_token, text))


def looks_random(text: str) -> bool:
    """Whether a text is long enough for a secret and unlike a word: with a digit, or a capital letter within."""
    return len(text) >= 6 and _RANDOM.search(text) is not None


def host_of(url: str) -> str:
    """The host of an address as it may be shown; *** where it may be a part of a login."""
    shown = redact(url)
    try:
        parts = urlsplit(shown)
        return "***" if "***" in parts.netloc else parts.hostname or "***"
    except ValueError:
        return "***"


def _without_token(found: re.Match[str]) -> str:
    return "***" if _RANDOM_TOKEN.search(found[1] or found[2] or found[0]) else found[0]


def _without_value(found: re.Match[str]) -> str:
    return f"{found[1]}***" if looks_random(found[2]) else found[0]


def _shown_data(found: re.Match[str]) -> str:
    packed = "base64" in found[1].lower()
    typed = found[1][:1] in ("", ";") or "/" in found[1]
    is_file = packed or (typed and not found[2] and not found[1][:1].isspace())
    return f"{found[0][:5]}***" if is_file else found[0]


def _shown_word(found: re.Match[str]) -> str:
    word = found[0]
    if word.isalnum():  # which most words are
        return word
    return "".join(piece.shown for piece in _pieces(word, whole=False))


def _pieces_of(reference: str) -> Iterator[_Piece]:
    # Spaces would end an address: they are zeros, of the same length, while secrets are sought.
    return _pieces(re.sub(r"\s", "\0", reference), whole=True)


def _pieces(word: str, *, whole: bool) -> Iterator[_Piece]:
    """The pieces of a word without spaces, in linear time; `whole`: it is one reference."""
    starts = [found.start() for found in _SCHEME.finditer(word)]
    for start, end in zip([0, *starts], [*starts, len(word)], strict=True):
        shown = 0
        for piece in _segment(word[start:end], whole):
            yield piece
            shown += len(piece.text)
        if start + shown < end:  # a query has begun, and goes on to the end of the word
            yield _Piece(word[start + shown :], "")
            return


def _segment(text: str, whole: bool) -> Iterator[_Piece]:
    """The pieces, up to a query, of a text in which a web scheme stands only at the beginning."""
    last = _last(_AT, text)
    head = _HEAD.search(text)
    bare = text if head is None else text[: head.start()]
    if head is not None and ":" in bare and last > head.end() and not _STORE.search(bare):
        # A password with two slashes in it, without a scheme: u:a//b@host.
        at = 0
    else:
        yield from (pieces := list(_bare(bare, whole)))
        if head is None or sum(len(piece.text) for piece in pieces) < len(bare):
            return
        yield _Piece(head[0], head[0])
        at = head.end()
    while True:
        authority = _AUTHORITY.match(text, at)[0]
        if at < last and not _CERTAIN.fullmatch(authority):
            if _QUERY.search(text, at, last):
                yield _Piece("", "***")
                return
            surely = last <= at + len(authority)
            yield _Piece(text[at:last], "" if surely else "***@")
            authority = _AUTHORITY.match(text, at := last)[0]
        host, parameters, _ = authority.partition(";")
        yield _Piece(host, host if _HOST.fullmatch(host) else "***")
        if parameters:
            return
        at += len(authority)
        head = _HEAD.search(text, at)
        limit = len(text) if head is None else head.start()
        end = _END.search(text, at, limit)
        yield from _without_login(text[at : end.start() if end else limit], 0)
        if end or head is None:
            return
        yield _Piece(head[0], head[0])
        at = head.end()


def _last(sought: re.Pattern[str], text: str) -> int:
    """The end of the last @ in a text, percent-encoded or not; 0 where there is none."""
    if "@" not in text and "40" not in text:
        return 0
    return max((found.end() for found in sought.finditer(text)), default=0)


def _bare(text: str, whole: bool) -> Iterator[_Piece]:
    """The pieces of a text without scheme: civitai.com/models/1?token=…, user:password@example.com, a word."""
    if not text:
        return
    address = _BARE_ADDRESS.match(text)
    end = _END.search(text) if whole or address else _BARE_QUERY.search(text)
    limit = end.start() if end else len(text)
    colon = text.find(":", 0, limit)
    certain = address is not None and ":" not in address[0]  # else an apparent port may be a password
    if end and colon != -1 and not certain and _BARE_AT.search(text, limit):
        yield _Piece("", "***")
        return
    if user := _BARE_USER.match(text, 0, limit):
        yield _Piece(user[0], "")
        text, limit = text[user.end() :], limit - user.end()
    yield from _without_login(text[:limit], 0 if certain else colon)


def _without_login(text: str, colon: int) -> Iterator[_Piece]:
    """The pieces of a path or a word, without a login; `colon`: of a login whose user may contain slashes."""
    last = _last(_BARE_AT, text)
    first = text.find(":", 0, last)
    if first == -1 or _NO_LOGIN.fullmatch(text):
        yield _Piece(text, text)
        return
    start = 0 if colon == first else max(text.rfind("/", 0, first), text.rfind("\\", 0, first)) + 1
    yield _Piece(text[:start], text[:start])
    yield _Piece(text[start:last], "")
    yield _Piece(text[last:], text[last:])
