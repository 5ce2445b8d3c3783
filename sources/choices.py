"""The text of an input for LoRAs → a choice for each LoRA.

The text is one reference, a sum of them, or JSON:

    fofr/pixar-cars*0.8 + huggingface.co/owner/repo*.5 + zorp
    [{"path": "fofr/pixar-cars", "scale": 0.8, "clip": 0.4, "blocks": {"double_blocks.0-6": 0.5, "single_blocks": 0}}]

No file is opened, and no host is asked. One reference is parsed by references.py.
"""

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

from request import MOST_LORAS, LoraChoice, exact, named_blocks
from service import strict_json
from sources.references import MAX_CHARACTERS, SUFFIXES, Civitai, Replicate, identity, parse, unwrapped
from sources.shown import QUOTES, quoted, redact_text

PLUS = re.compile(r"\s\+\s")
DECIMAL = re.compile(r"[+-]?(?:[0-9]{1,20}(?:\.[0-9]{0,20})?|\.[0-9]{1,20})")
# After a plus, this begins another reference: within one address it cannot follow a plus.
SCHEME = re.compile("https?://|data:", re.IGNORECASE)
# A longer text holds a file, in a data: URI, which takes long to decode.
LONGEST_SUM = MOST_LORAS * MAX_CHARACTERS
# More deforms every picture, and is mostly a slip of the pen.
LARGEST_STRENGTH = 10
NAMES = ("path", "scale", "clip", "blocks")
# `metrics.loras` has these too: a LoRA that is copied from there is accepted.
REPORTED = {"name", "trigger_words", "format", "kinds", "ranks", "applied", "tensors", "ignored", "config", "left_out"}
# Signs that no single reference has, of a sum in wrong spelling: zorp*0,8, zorp, bold, zorp 0.8, <lora:zorp:0.8>.
OTHER_SUM = re.compile(r"[*+,;×\s]|[:=@]\d*\.\d+\W*$")
SIGNS = (
    "a factor must be a decimal such as *0.8, with at most 20 digits before and after its point, and a + between two "
    "LoRAs must have a space on either side"
)
RIGHT = 'it must be a list such as [{"path": "owner/name", "scale": 0.8}]'


def read_choices(text: str, scale: float = 1) -> list[LoraChoice]:
    """The LoRAs in an input's text, each with its strength: its own factor times the input's scale.

    Raises:
        ValueError: a sentence that names the bad term and says what would be right.
    """
    return [_times(choice, scale) for choice in _read(text)]


def read_own_choices(text: str, scale: float = 1) -> list[LoraChoice]:
    """The same for the operator's own text, which may be a path; faults of a path are found when it is opened."""
    with suppress(OSError, RuntimeError):  # too long for a path; ~ of an unknown user
        if Path(text).expanduser().exists():
            return [LoraChoice(text, scale, trusted=True)]
    try:
        choices = _read(text)
    except ValueError:
        if is_json(text) or (PLUS.search(text) and text[:1] not in "/~."):
            raise
        return [LoraChoice(text, scale, trusted=True)]
    return [_times(choice, scale) for choice in choices]


def identities(text: str) -> set[str]:
    """The identities of an input's LoRAs, whatever their factors; of a wrong or long text, the text itself. Secret."""
    with suppress(ValueError):
        if len(text) <= LONGEST_SUM:
            return {identity(parse(choice.reference)) for choice in read_choices(text)}
    return {text}


def references(text: str) -> list[str]:
    """The references in a sum, before a factor or in JSON; none in any other text, or in one that is too long."""
    with suppress(ValueError):
        if len(text) <= LONGEST_SUM and ("*" in text or PLUS.search(text) or is_json(text)):
            return [choice.reference for choice in read_choices(text)]
    return []


def rewrite(text: str, renamed: Mapping[str, str]) -> str:
    """The text with each of its `references` renamed; unchanged where no name changes."""
    if all(renamed[reference] == reference for reference in renamed):
        return text  # which may be a prompt that looks like JSON
    choices = read_choices(text)
    if is_json(text):
        return json.dumps([choice.entry(renamed[choice.reference]) for choice in choices], ensure_ascii=False)
    parts = PLUS.split(text) if len(choices) > 1 else [text]
    terms = zip(parts, (choice.reference for choice in choices), strict=True)
    return " + ".join(part.replace(reference, renamed[reference], 1) for part, reference in terms)


def is_json(text: str) -> bool:
    """Whether a text is read as JSON."""
    return unwrapped(text).startswith(("[", "{"))


def _read(text: str) -> list[LoraChoice]:
    return list(_read_json(unwrapped(text))) if is_json(text) else _read_sum(_unquoted(text))


def _unquoted(text: str) -> str:
    """The text without quotes around it, unless they belong to its first and its last term."""
    inner = unwrapped(text)
    return text.strip() if any(quote in inner for quote in (*QUOTES, *QUOTES.values())) else inner


def _times(choice: LoraChoice, scale: float) -> LoraChoice:
    """A choice with its strength times the input's scale; no strength in it may be too large."""

    def strength(own: float, factor: float = 1, where: str = "") -> float:
        product = exact(own) * exact(factor) * exact(scale)
        if abs(product) > LARGEST_STRENGTH:
            raise ValueError(
                f"{quoted(choice.reference)} has strength {own * factor * scale:.15g}{where}, which is its own "
                f"{own * factor:.15g} times the input's scale {scale:.15g}; it must be from {-LARGEST_STRENGTH} to "
                f"{LARGEST_STRENGTH}."
            )
        return float(product)

    for key, factor in choice.blocks.items():
        strength(choice.scale, factor, f" in {key}")
    clip = None if choice.clip is None else strength(choice.clip, where=" in the text encoder")
    return LoraChoice(choice.reference, strength(choice.scale), clip=clip, blocks=choice.blocks)


def _read_sum(text: str) -> list[LoraChoice]:
    parts = PLUS.split(text, MOST_LORAS)  # at most one part too many
    try:
        choices = [_read_term(part, alone=len(parts) == 1) for part in parts]
    except ValueError:
        if len(parts) == 1 or not _is_one(text, parts):
            raise
        return [_read_term(text, alone=True)]
    if len(choices) > MOST_LORAS:
        raise ValueError(
            f"A sum of {len(PLUS.findall(text)) + 1} LoRAs is too long; it must have at most {MOST_LORAS}."
        )
    return choices


def _is_one(text: str, parts: list[str]) -> bool:
    """Whether an apparent sum, of which a part is no reference, is one address with a plus in it."""
    if any(split_factor(part)[1] != "1" or part.endswith(SUFFIXES) for part in parts[:-1]):
        return False
    if any(SCHEME.match(unwrapped(part)) for part in parts[1:]):
        return False
    try:
        # The parsers of Replicate and CivitAI ignore the end of an address: a LoRA in it would be ignored too.
        return not isinstance(parse(split_factor(text)[0]), Replicate | Civitai)
    except ValueError:
        return False


def _read_term(text: str, *, alone: bool) -> LoraChoice:
    source, factor = split_factor(_unquoted(text))
    if not alone and _is_plain_data(source):
        raise ValueError("A data: URI in a sum must be base64: data:;base64,content.")
    _check(source or text, SIGNS)
    return LoraChoice(source, float(factor))


def _check(reference: str, advice: str) -> None:
    """Refuse a text that is no reference; the advice is added if it looks like a sum or a factor."""
    try:
        parse(reference)
    except ValueError as error:
        if reference[:5].lower() == "data:" or OTHER_SUM.search(reference) is None:
            raise
        raise ValueError(f"{str(error).rstrip('.')}; {advice}.") from None


def split_factor(text: str) -> tuple[str, str]:
    """The source and the factor of a term of a sum; the factor is 1 where none is written."""
    source, star, factor = text.rpartition("*")
    factor = factor.strip()
    if not star or not DECIMAL.fullmatch(factor) or _is_plain_data(text):
        return text.strip(), "1"
    return source.strip(), factor


def _is_plain_data(text: str) -> bool:
    """Whether it is a data URI that is not base64, which may contain any signs."""
    text = unwrapped(text)
    return text[:5].lower() == "data:" and "base64" not in text.partition(",")[0].lower()


def _read_json(text: str) -> Iterator[LoraChoice]:
    try:
        items = strict_json.read(text.encode(errors="surrogatepass"))
        if not isinstance(items, list):
            raise ValueError("it is an object.")
    except ValueError as error:
        reason = redact_text(str(error)).rstrip(".")  # it may have a name
        raise ValueError(f"A text that begins with {text[0]} is read as JSON, and {reason}; {RIGHT}.") from None
    if len(items) > MOST_LORAS:
        raise ValueError(f"A list of {len(items)} LoRAs is too long; it must have at most {MOST_LORAS}.")
    for number, item in enumerate(items, 1):
        if not isinstance(item, dict) or not isinstance(path := item.get("path"), str) or not path.strip():
            raise ValueError(f"LoRA {number} of the list names no path; {RIGHT}.")
        _check(path.strip(), "in a list each LoRA has an object and a scale of its own")
        yield _read_object(path, item)


def _read_object(path: str, item: Mapping[str, Any]) -> LoraChoice:
    def number(name: str, value: Any) -> float:  # noqa: ANN401 (JSON)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"{name} {redact_text(json.dumps(value))[:40]}; it must be a number.")
        return float(value)

    try:
        if unknown := sorted(item.keys() - REPORTED.union(NAMES)):
            raise ValueError(f"{quoted(unknown[0], 40)}; it may have {', '.join(NAMES[:-1])} and {NAMES[-1]}.")
        blocks = {} if item.get("blocks") is None else item["blocks"]
        if not isinstance(blocks, dict):
            raise ValueError('blocks that are no object; they must be such as {"single_blocks": 0.5}.')
        _check_keys(blocks)
        return LoraChoice(
            path,
            1.0 if item.get("scale") is None else number("scale", item["scale"]),
            clip=None if item.get("clip") is None else number("clip", item["clip"]),
            blocks={key: number(f"blocks {key!r}", factor) for key, factor in blocks.items()},
        )
    except ValueError as error:
        raise ValueError(f"{quoted(path)} has {error}") from None


def _check_keys(keys: Iterable[str]) -> None:
    """Refuse names of blocks that mean none, and two that overlap and name equally many, so that neither counts."""
    ranges = []
    for key in keys:
        try:
            kind, numbers = named_blocks(key)
        except ValueError as error:
            raise ValueError(f"blocks {quoted(key, 40)}; {error}") from None
        ranges.append((kind, len(numbers), numbers.start, key))
    for (kind, count, first, key), (*others, start, other) in pairwise(sorted(ranges)):
        if [kind, count] == others and start < first + count:
            raise ValueError(
                f"blocks {key!r} and {other!r}, of which neither counts more in what both name; one of two that "
                "overlap must name fewer blocks than the other."
            )
