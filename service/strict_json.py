"""JSON from strangers, read strictly: its values are limited in number and size, and mean the same to every reader.

Python's own reader takes more than JSON has (NaN, halves of characters, endless numbers), which can then be neither
stored nor sent. This module knows JSON; it does not know what a text is for.
"""

import json
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

# The header of a LoRA file with every layer has 10,000 values.
MAX_VALUES = 100_000
# The bound for a client's request: a prediction has some thirty inputs.
REQUEST_VALUES = 10_000
# Each takes as long to read as a hundred letters, with the GIL held. PHP's base64 has one in 64 characters.
MAX_ESCAPES = 4_000_000
MAX_DEPTH = 32
MAX_NUMBER_CHARACTERS = 100
_TOO_DEEP = f"it is nested more than {MAX_DEPTH} deep."


def read(content: bytes, max_values: int = MAX_VALUES, *, zeros: bool = False) -> Any:  # noqa: ANN401 (JSON)
    """The value of one JSON text, in UTF-8.

    Whole numbers beyond 64 bits with a sign become floats: databases and validators know none larger. A ValueError is a
    sentence that begins with "it". Takes time in proportion to the text's length, and holds the GIL.

    Args:
        max_values: how many values it may have. Commas and opening brackets are counted before parsing, those in
            strings too.
        zeros: whether strings may have the character U+0000.
    """
    if 1 + sum(map(content.count, (b",", b"[", b"{"))) > max_values:
        raise ValueError(f"it has more than {max_values} values, commas and brackets in strings counted.")
    if content.count(b"\\") > MAX_ESCAPES:
        raise ValueError(f"it has more than {MAX_ESCAPES} backslashes; characters need no escapes in UTF-8.")
    try:
        value = json.loads(
            content.decode(),
            parse_int=_whole,
            parse_float=_real,
            parse_constant=_no_constant,
            object_pairs_hook=_unique,
        )
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 (byte {error.start}).") from None
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    except json.JSONDecodeError as error:
        raise ValueError(f"it is no JSON: {error}.") from None
    _check([value], zeros)
    return value


def _whole(text: str) -> int | float:
    number = int(_bounded(text))
    return number if -(2**63) <= number < 2**63 else float(number)


def _real(text: str) -> float:
    number = float(_bounded(text))
    if math.isinf(number):
        raise ValueError(f"it has the number {text}; numbers must be below 1.8e308.")
    return number


def _bounded(text: str) -> str:
    if len(text) > MAX_NUMBER_CHARACTERS:
        raise ValueError(f"it has a number of {len(text)} characters; it must have at most {MAX_NUMBER_CHARACTERS}.")
    return text


def _no_constant(name: str) -> None:
    raise ValueError(f"it has {name}, which is no number in JSON.")


def _unique(members: list[tuple[str, Any]]) -> dict[str, Any]:
    named = dict(members)
    if len(named) < len(members):
        twice = next(name for name, count in Counter(name for name, _ in members).items() if count > 1)
        raise ValueError(f"it has the name {twice[:80]!a} twice in one object.")
    return named


def _check(values: Sequence[Any], zeros: bool, depth: int = 0) -> None:
    """Refuse values that are nested too deep, and strings that not every database and encoding can hold."""
    if values and depth > MAX_DEPTH:
        raise ValueError(_TOO_DEEP)
    for value in values:
        if isinstance(value, str):
            _check_text(value, zeros)
        elif isinstance(value, dict):
            _check([*value, *value.values()], zeros, depth + 1)
        elif isinstance(value, list):
            _check(value, zeros, depth + 1)


def _check_text(text: str, zeros: bool) -> None:
    if "\0" in text and not zeros:
        raise ValueError("it has the character U+0000 in a string, which databases cannot keep.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"half of a surrogate pair, U+{ord(text[error.start]):04X}"
        raise ValueError(f"it has {half}, in a string, which is no character.") from None


def compact(value: Any, *, sort: bool = True) -> str:  # noqa: ANN401 (JSON)
    """JSON as coglet writes it: without spaces, its names in order unless `sort` is off."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), sort_keys=sort)


def storable(value: Any) -> Any:  # noqa: ANN401 (JSON)
    """A predictor's value with U+FFFD for characters that `read` refuses, and null for NaN and infinities."""
    match value:
        case str():
            if value.isascii() and "\0" not in value:  # a picture, most often, as a data URI
                return value
            return value.replace("\0", "\ufffd").encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        case dict():
            return {storable(name): storable(item) for name, item in value.items()}
        case list():
            return [storable(item) for item in value]
        case float() if not math.isfinite(value):
            return None
    return value
