"""What may be shown, logged and kept of an input: everything but tokens and URLs' secrets, known by their looks."""

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

# The inputs of some predictors that are nothing but a secret; a parameter of a query of such a name is one too.
_SECRET = re.compile(rf".*{SECRET_NAME}(s?)", re.IGNORECASE | re.DOTALL)
# A login by itself, and what of it comes before its @: u:p@, u:p%40.
_LOGIN = re.compile(r"(.*?)(?:@|%(?:25)*40)", re.DOTALL)
# What begins or ends the hidden parts of addresses: with one of these, few characters are no word.
_DELIMITER = re.compile("[@?#;]")
_FEWEST_CHARACTERS = 6
# How JSON may write a character, but for those that not every database can keep.
_ESCAPE = re.compile(r"\\(?:u(?!0000|d[89a-f])([0-9a-f]{4})|([\"\\/])|[bfnrt])", re.IGNORECASE)
# What stands between two LoRAs of a sum, and around a string of JSON.
_PLUS, _QUOTE = re.compile(r"(\+\s)"), re.compile(r'((?<!\\)")')
# How many characters are shown of a string: a page lists a hundred predictions, and a prompt may have 100 MB.
SHOWN_CHARACTERS = 10_000
LOG_CHARACTERS = 200_000
# The longest address whose parts are looked for in logs, and JSON that is read, and in how many strings of an input.
_ADDRESS_CHARACTERS = 20_000
_ADDRESSES = 100
# How many of its parts are: a login, a query, and what stands in them. Each costs a search of the whole log.
_PARTS = 4


def show_input(value: Any) -> Any:  # noqa: ANN401 (JSON)
    """An input without what gives access: tokens, the queries and users of URLs; a data URI is named by its SHA-256.

    Of a long string its beginning is shown, and how many characters it has. Takes time in proportion to the input.
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
        return "".join(map(_redacted, [text] if _is_address(text) else _terms(text)))
    if re.match(r"\s*data:", text, re.IGNORECASE) and is_reference(text):
        return redact(text)
    # Up to the end of a word: half of a URL or of a token would not look like one. A login may end in what is left out.
    cut = text[: _last_space(text[:SHOWN_CHARACTERS])]
    shown = redact(f"{cut}@") if _is_address(cut) else "".join(map(_redacted, _terms(cut)))
    return f"{shown}… ({len(text)} characters)"


def _beginning(shown: str, characters: int) -> str:
    """What is shown of a text of so many characters, in which nothing is secret any more."""
    return shown if len(shown) <= SHOWN_CHARACTERS else f"{shown[:SHOWN_CHARACTERS]}… ({characters} characters)"


def _json_of(text: str) -> Any:  # noqa: ANN401 (JSON)
    """The list or the object that a text of a reasonable length is in JSON; None of any other."""
    if len(text) > _ADDRESS_CHARACTERS or not is_json(text):
        return None
    try:
        return strict_json.read(unwrapped(text).encode(errors="replace"))
    except ValueError:
        return None


def _is_address(text: str) -> bool:
    return is_reference(text) and not is_json(text)


def _redacted(text: str) -> str:
    if _is_address(text):
        return redact(text)
    source, _ = split_factor(text)
    return text.replace(source, redact(source), 1) if _is_address(source) else redact_text(text)


def _terms(text: str) -> list[str]:
    """A text in pieces, as it would be split if it were a sum, or JSON that does not break off."""
    if not is_json(text):
        return _PLUS.split(text)
    return [_ESCAPE.sub(_unescaped, piece) for piece in _QUOTE.split(text)]


def _unescaped(found: re.Match[str]) -> str:
    return chr(int(found[1], 16)) if found[1] else found[2] or " "


def _holds_secret(name: str, value: Any) -> bool:  # noqa: ANN401 (JSON)
    """Whether a value is a secret by its name; max_tokens and the like are numbers."""
    named = _SECRET.fullmatch(name)
    if named is None or value in (None, "", [], {}) or isinstance(value, bool):
        return False
    return not (named[1] and isinstance(value, int | float))


def secrets_of(inputs: Any) -> Collection[str]:  # noqa: ANN401 (JSON)
    """The logins and queries of the addresses among the inputs, longest first: an error may tell them alone."""
    found = set()
    for text in islice(_strings(inputs), _ADDRESSES):
        for reference in _addresses_in(text) if len(text) <= _ADDRESS_CHARACTERS else ():
            parts = [part.strip() for part in islice(hidden(reference), _PARTS)]
            found |= {*parts, *islice(chain.from_iterable(map(_secrets_within, parts)), _PARTS)}
    found |= set(chain.from_iterable(map(_as_sent, found)))
    found |= set(chain.from_iterable(map(_as_told, found)))
    return sorted(filter(_is_long_enough, found), key=len, reverse=True)


def _addresses_in(text: str) -> Iterator[str]:
    """A text that is an address, and those that it has in a sum or in JSON, also where it is neither after all."""
    named = map(unwrapped, (text, *(references(text) or _terms(text))))
    return islice(filter(_is_address, named), 1 + MOST_LORAS)


def _secrets_within(part: str) -> Iterator[str]:
    """A password, and what a query calls a secret, by themselves; a user where no password is, or it looks like one."""
    if login := _LOGIN.fullmatch(part):
        user, colon, password = login[1].partition(":")
        values = [password, user] if not colon or looks_random(user) else [password]
    else:
        values = [value for name, value in parse_qsl(part[1:]) if _SECRET.fullmatch(name)]
    yield from (value for value in values if len(value) >= _FEWEST_CHARACTERS)


def _as_sent(secret: str) -> tuple[str, ...]:
    """As libraries for HTTP write it, as they read it, and without the blanks that they drop."""
    encoded = (quote(secret, safe=safe) for safe in (string.punctuation, "/", ""))
    return *encoded, unquote(secret), re.sub(r"[\t\r\n]", "", secret)


def _as_told(secret: str) -> tuple[str, ...]:
    """As Python, JSON and our own sentences show it."""
    packed = json.dumps(secret), json.dumps(secret, ensure_ascii=False), repr(secret)
    return *(text[1:-1] for text in packed), printable(secret)


def _is_long_enough(secret: str) -> bool:
    """Whether it is no part of any word."""
    return len(secret) >= _FEWEST_CHARACTERS or (len(secret) > 1 and _DELIMITER.search(secret) is not None)


def redact_log(text: str, secrets: Collection[str]) -> str:
    """A log or an error without tokens and what `secrets_of` found; of a very long one the end."""
    if len(text) > LOG_CHARACTERS:
        end = text[-LOG_CHARACTERS:].partition("\n")[2]
        text = f"({len(text) - len(end)} characters are left out.)\n{end}"
    for secret in secrets:
        text = text.replace(secret, "")
    return redact_text(text)


def _last_space(text: str) -> int:
    return max(map(text.rfind, " \t\r\n")) + 1


def _strings(value: Any) -> Iterator[str]:  # noqa: ANN401 (JSON)
    if isinstance(value, str):
        yield value
        yield from _strings(_json_of(value))
    elif isinstance(value, dict | list):
        for item in chain(value, value.values()) if isinstance(value, dict) else value:
            yield from _strings(item)
