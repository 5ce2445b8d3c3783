"""Inputs, logs and errors without their secrets: tokens, and the logins and queries of URLs, known by their looks."""

import json
import re
import string
from collections.abc import Collection, Iterator
from itertools import chain, islice
from typing import Any
from urllib.parse import parse_qsl, quote, unquote

from request import MOST_LORAS
from service import strict_json
from service.lines import printable
from sources.choices import is_json, references, rewrite, split_factor
from sources.references import unwrapped
from sources.shown import SECRET_NAME, hidden, is_reference, looks_random, redact, redact_text

# The names of inputs that are secrets, and of such parameters in a query.
_SECRET = re.compile(rf".*{SECRET_NAME}(s?)", re.IGNORECASE | re.DOTALL)
# A login, without its @: u:p@, u:p%40.
_LOGIN = re.compile(r"(.*?)(?:@|%(?:25)*40)", re.DOTALL)
# What begins or ends the hidden parts of addresses: a short text with one of these is no word.
_DELIMITER = re.compile("[@?#;]")
_FEWEST_CHARACTERS = 6
# An escape of JSON, except for characters that not every database can store.
_ESCAPE = re.compile(r"\\(?:u(?!0000|d[89a-f])([0-9a-f]{4})|([\"\\/])|[bfnrt])", re.IGNORECASE)
# What separates the LoRAs of a sum, and the strings of JSON.
_PLUS, _QUOTE = re.compile(r"(\+\s)"), re.compile(r'((?<!\\)")')
# The most that is shown of a string: a page lists a hundred predictions, and a prompt may have 100 MB.
SHOWN_CHARACTERS = 10_000
LOG_CHARACTERS = 200_000
# The longest text in which addresses and JSON are sought, and in how many strings of an input.
_ADDRESS_CHARACTERS = 20_000
_ADDRESSES = 100
# How many secrets of an address are sought in a log: its login, its query, and values in these. Each costs a search.
_PARTS = 4


def show_input(value: Any) -> Any:  # noqa: ANN401 (JSON)
    """An input without tokens and the logins and queries of URLs, and with the SHA-256 of a data URI in its place.

    Long strings are cut, and their length is told. Takes time in proportion to the input.
    """
    if isinstance(value, dict):
        return {_show(key): "***" if _holds_secret(key, item) else show_input(item) for key, item in value.items()}
    if isinstance(value, list):
        return [show_input(item) for item in value]
    return _show(value) if isinstance(value, str) else value


def _show(text: str) -> str:
    if (value := _json_of(text)) is not None:
        shown = show_input(value)
        return _beginning(text if shown == value else json.dumps(shown, ensure_ascii=False), len(text))
    if named := references(text):
        return _beginning(rewrite(text, {reference: redact(reference) for reference in named}), len(text))
    if len(text) <= SHOWN_CHARACTERS:
        return "".join(map(_show_term, [text] if _is_address(text) else _terms(text)))
    if re.match(r"\s*data:", text, re.IGNORECASE) and is_reference(text):
        return redact(text)
    # Cut after a blank: half of a URL or of a token would not look like one. The @ hides half a login of an address.
    cut = text[: max(text.rfind(blank, 0, SHOWN_CHARACTERS) for blank in " \t\r\n") + 1]
    shown = redact(f"{cut}@") if _is_address(cut) else "".join(map(_show_term, _terms(cut)))
    return f"{shown}… ({len(text)} characters)"


def _beginning(shown: str, characters: int) -> str:
    """The beginning of a text without secrets; `characters` is the length of the whole."""
    return shown if len(shown) <= SHOWN_CHARACTERS else f"{shown[:SHOWN_CHARACTERS]}… ({characters} characters)"


def _json_of(text: str) -> Any:  # noqa: ANN401 (JSON)
    """The list or object of a JSON text of a reasonable length; None for any other text."""
    if len(text) > _ADDRESS_CHARACTERS or not is_json(text):
        return None
    try:
        return strict_json.read(unwrapped(text).encode(errors="replace"))
    except ValueError:
        return None


def _is_address(text: str) -> bool:
    return is_reference(text) and not is_json(text)


def _show_term(text: str) -> str:
    if _is_address(text):
        return redact(text)
    source, _ = split_factor(text)
    return text.replace(source, redact(source), 1) if _is_address(source) else redact_text(text)


def _terms(text: str) -> list[str]:
    """The pieces of a text, split like a sum, or like JSON even if it is not valid."""
    if not is_json(text):
        return _PLUS.split(text)
    return [_ESCAPE.sub(_unescaped, piece) for piece in _QUOTE.split(text)]


def _unescaped(found: re.Match[str]) -> str:
    return chr(int(found[1], 16)) if found[1] else found[2] or " "


def _holds_secret(name: str, value: Any) -> bool:  # noqa: ANN401 (JSON)
    """Whether a value is a secret by its name; numbers such as max_tokens are none."""
    named = _SECRET.fullmatch(name)
    if named is None or value in (None, "", [], {}) or isinstance(value, bool):
        return False
    return not (named[1] and isinstance(value, int | float))


def secrets_of(inputs: Any) -> Collection[str]:  # noqa: ANN401 (JSON)
    """The logins and queries of addresses in the inputs, longest first: an error may quote them without the address."""
    found = set()
    texts = [text for text in islice(_strings(inputs), _ADDRESSES) if len(text) <= _ADDRESS_CHARACTERS]
    for reference in chain.from_iterable(map(_addresses_in, texts)):
        parts = [part.strip() for part in islice(hidden(reference), _PARTS)]
        found |= {*parts, *islice(chain.from_iterable(map(_secrets_within, parts)), _PARTS)}
    found |= {sent for secret in found for sent in _as_sent(secret)}
    found |= {told for secret in found for told in _as_told(secret)}
    return sorted(filter(_is_no_word, found), key=len, reverse=True)


def _strings(value: Any) -> Iterator[str]:  # noqa: ANN401 (JSON)
    if isinstance(value, str):
        yield value
        yield from _strings(_json_of(value))
    elif isinstance(value, dict | list):
        for item in chain(value, value.values()) if isinstance(value, dict) else value:
            yield from _strings(item)


def _addresses_in(text: str) -> Iterator[str]:
    """The text itself if it is an address, and the addresses in it if it looks like a sum or JSON."""
    texts = map(unwrapped, (text, *(references(text) or _terms(text))))
    return islice(filter(_is_address, texts), 1 + MOST_LORAS)


def _secrets_within(part: str) -> Iterator[str]:
    """The password of a login, or its user if there is none or it looks random; the values of a query's secrets."""
    if login := _LOGIN.fullmatch(part):
        user, colon, password = login[1].partition(":")
        values = [password, user] if not colon or looks_random(user) else [password]
    else:
        values = [value for name, value in parse_qsl(part[1:]) if _SECRET.fullmatch(name)]
    yield from (value for value in values if len(value) >= _FEWEST_CHARACTERS)


def _as_sent(secret: str) -> tuple[str, ...]:
    """A secret as HTTP libraries encode it, decode it, and strip blanks from it."""
    encoded = (quote(secret, safe=safe) for safe in (string.punctuation, "/", ""))
    return *encoded, unquote(secret), re.sub(r"[\t\r\n]", "", secret)


def _as_told(secret: str) -> tuple[str, ...]:
    """A secret as Python, JSON and our own sentences quote it."""
    packed = json.dumps(secret), json.dumps(secret, ensure_ascii=False), repr(secret)
    return *(text[1:-1] for text in packed), printable(secret)


def _is_no_word(secret: str) -> bool:
    return len(secret) >= _FEWEST_CHARACTERS or (len(secret) > 1 and _DELIMITER.search(secret) is not None)


def redact_log(text: str, secrets: Collection[str]) -> str:
    """A log or an error without tokens and without what `secrets_of` found; only the end of a very long one."""
    if len(text) > LOG_CHARACTERS:
        end = text[-LOG_CHARACTERS:].partition("\n")[2]
        text = f"({len(text) - len(end)} characters are left out.)\n{end}"
    for secret in secrets:
        text = text.replace(secret, "")
    return redact_text(text)
