"""What may be shown, logged and kept of an input: everything but tokens and URLs' secrets, known by their looks."""

import hashlib
import re
import string
from collections.abc import Collection, Iterator
from itertools import islice
from typing import Any
from urllib.parse import quote

from sources.shown import redact, redact_text

# Tokens of Hugging Face, Replicate, GitHub, OpenAI, CivitAI and others.
_TOKEN = re.compile(r"\b(hf|r8|ghp|gho|sk|pk|api|civitai)[_-][A-Za-z0-9_-]{16,}")
# A value that is an address as a whole: spaces in it are part of it.
_ADDRESS = re.compile(r"\s*(?:(?:[a-z][a-z0-9+.-]{0,20}:)?[/\\]{2,}|https?:)(?=\S)([^/\\?#]*)", re.IGNORECASE)
_DATA = re.compile(r"data:[\w.+/-]*[;,]", re.IGNORECASE)
# How many characters are shown of a string: a page lists a hundred predictions, and a prompt may have 100 MB.
SHOWN_CHARACTERS = 10_000
LOG_CHARACTERS = 200_000
# The longest address whose parts are looked for in logs, and in how many strings of an input.
_ADDRESS_CHARACTERS = 20_000
_ADDRESSES = 100


def show_input(value: Any) -> Any:  # noqa: ANN401 (JSON)
    """An input without what gives access: tokens, the queries and users of URLs; a data URI is named by its SHA-256.

    Of a long string its beginning is shown, and how many characters it has. Takes time in proportion to the input.
    """
    if isinstance(value, dict):
        return {key: show_input(item) for key, item in value.items()}
    if isinstance(value, list):
        return [show_input(item) for item in value]
    if not isinstance(value, str):
        return value
    if _DATA.match(value):
        head = value[:80].partition(",")[0]
        return f"{head},sha256-{hashlib.sha256(value.encode()).hexdigest()[:16]}"
    # Up to the end of a word: half of a URL or of a token would not look like one.
    cut = value if len(value) <= SHOWN_CHARACTERS else value[: _last_space(value[:SHOWN_CHARACTERS])]
    shown = _TOKEN.sub("***", redact(cut) if _ADDRESS.match(cut) else redact_text(cut))
    return shown if cut is value else f"{shown}… ({len(value)} characters)"


def secrets_of(inputs: Any) -> Collection[str]:  # noqa: ANN401 (JSON)
    """The users, passwords and queries of the addresses among the inputs: an error may tell them without the rest."""
    found = set()
    for text in islice(_strings(inputs), _ADDRESSES):
        address = _ADDRESS.match(text)
        if len(text) > _ADDRESS_CHARACTERS or not (address or re.fullmatch(r"\S*", text)):
            continue
        query = text.partition("#")[0].partition("?")[2]
        user = address[1].rpartition("@")[0] if address else ""
        found |= {query and f"?{query}", user and f"{user}@"} - {""}
    # As they are, and as libraries for HTTP write them.
    return found | {quote(secret, safe=string.punctuation) for secret in found}


def redact_log(text: str, secrets: Collection[str]) -> str:
    """A log or an error without tokens and what `secrets_of` found; of a very long one the end."""
    if len(text) > LOG_CHARACTERS:
        end = text[-LOG_CHARACTERS:].partition("\n")[2]
        text = f"({len(text) - len(end)} characters are left out.)\n{end}"
    for secret in secrets:
        text = text.replace(secret, "")
    return _TOKEN.sub("***", redact_text(text))


def _last_space(text: str) -> int:
    return max(map(text.rfind, " \t\r\n")) + 1


def _strings(value: Any) -> Iterator[str]:  # noqa: ANN401 (JSON)
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings(item)
