"""What a command line says, and what a picture says of itself → the input of a prediction.

Values are checked here as Cog's server checks them, by the same schema, so that nobody waits for a server to hear what
is wrong. This module knows the words of JSON Schema that the schema of an input has.
"""

import difflib
import json
import math
import re
import shlex
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from local_cog import schema
from local_cog.server import MAX_FILE_BYTES
from service.data_uri import file_uri
from service.lines import say

# Inputs that take a LoRA by its name or address. A text in them that looks like this is a path, and where a file lies
# there, the @ was forgotten.
LORAS = ("replicate_weights", "extra_lora")
PATH = re.compile(r"[./~].*|.*\.(?:safetensors|tar|t?gz|zip)", re.IGNORECASE)
# What says how large a picture is; with an image, none of it counts.
SIZE = ("aspect_ratio", "megapixels", "width", "height")
# What a picture of ours says. More is not taken: any picture may come from a stranger, who is to have nothing fetched
# as `image`, and no check switched off.
DRAWN_BY = (
    *("prompt", "model", "seed", "num_inference_steps", "guidance_scale", "go_fast", "prompt_strength"),
    *("replicate_weights", *SIZE),
)
KINDS = {"integer": "a whole number", "number": "a number", "boolean": "true or false", "string": "text in UTF-8"}
# Halves of surrogate pairs stand for what is no UTF-8, in arguments as in JSON.
HALVES = re.compile("[\ud800-\udfff]")
# Characters of a wrong value that are shown, and compared with the right ones: it may be a whole file.
SHOWN = 80


def read_inputs(pairs: list[str], document: dict[str, Any], like: Path | None = None) -> dict[str, Any]:
    """The input of a prediction from `key=value` pairs; `key=@file` stands for the file's content.

    `key=null` leaves out what is no text; a text may be this word. Of several pairs with one key the last counts.

    Args:
        pairs: what followed each `-i`.
        document: the OpenAPI document, which types and bounds the values.
        like: a picture whose own inputs are taken where the pairs say nothing.

    Raises:
        ValueError: a sentence for each input that is wrong, which says what would be right, in lines.
    """
    allowed = schema.inputs(document)
    said = _named(pairs, allowed)
    inputs = _drawn_by(like, said, allowed) if like else {}
    problems = {key: f"{like}: {sentence}" for key, sentence in _wrong(inputs, allowed)}
    room = MAX_FILE_BYTES
    for key, text in said.items():
        field = allowed[key]
        inputs.pop(key, None)
        problems.pop(key, None)
        try:
            if text.startswith("@") and _takes_files(key, field):
                inputs[key], size = _content(key, text[1:], room)
                room -= size
            elif text != "null" or _is_text(field):  # Cog refuses null itself
                inputs[key] = _typed(_unless_file(key, text, field), field["type"])
        except ValueError as error:
            problems[key] = str(error)
    problems |= {key: sentence for key, sentence in _wrong(inputs, allowed) if key in said}
    for key in document["components"]["schemas"]["Input"].get("required", []):
        if key not in inputs and key not in problems:
            problems[key] = f'The input {key} is missing; script/predict -i {key}="a red fox" gives one.'
    if problems:
        raise ValueError("\n".join(problems.values()))
    return inputs


def _named(pairs: list[str], allowed: Mapping[str, object]) -> dict[str, str]:
    """The text for each input that is named."""
    named, problems = {}, []
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals:
            problems.append(f"-i {pair!r} must have the form key=value or key=@file.")
        elif key not in allowed:
            problems.append(f"There is no input {key!r}{_meant(key, allowed)}; the inputs are {', '.join(allowed)}.")
        named[key] = text
    if problems:
        raise ValueError("\n".join(problems))
    return named


def _meant(text: str, names: Mapping[str, object] | list[str]) -> str:
    close = difflib.get_close_matches(text[:SHOWN].lower(), names, 1)
    return f" (did you mean {close[0]}?)" if close else ""


def _is_text(field: dict[str, Any]) -> bool:
    """Whether any words may stand there: in files, choices, numbers and truth values they may not."""
    return field["type"] == "string" and not field.keys() & {"format", "enum"}


def _takes_files(key: str, field: dict[str, Any]) -> bool:
    """Whether a file may be sent there: a prompt may begin with the sign for one."""
    return field.get("format") == "uri" or key in LORAS


def _content(key: str, name: str, room: int) -> tuple[str, int]:
    """A file as it is sent, and its size."""
    if not _is_file(name):
        raise ValueError(f"{key}: there is no file {name!r}.")
    path = Path(name).expanduser()
    if (size := path.stat().st_size) > room:
        raise ValueError(
            f"{key}: a request carries at most {MAX_FILE_BYTES // 10**6} MB of files, and with {path.name} it "
            f"would be {(MAX_FILE_BYTES - room + size) / 1e6:.1f} MB; set COG_WEIGHTS=path for a large LoRA, or give "
            "its URL."
        )
    try:
        return file_uri(path), size
    except OSError as error:
        raise ValueError(f"{key}: {name!r} cannot be read: {error.strerror}.") from None


def _unless_file(key: str, text: str, field: dict[str, Any]) -> str:
    """The text, which is no file's name where a file's content is meant."""
    if _takes_files(key, field) and ("format" in field or PATH.fullmatch(text)) and _is_file(text):
        raise ValueError(f"{key} is {text!r}, which is a file here; -i {shlex.quote(f'{key}=@{text}')} sends it.")
    return text


def _is_file(name: str) -> bool:
    try:
        return Path(name).expanduser().is_file()
    except (OSError, RuntimeError):  # too long for a path: a data URI; ~somebody who is not known
        return False


def _typed(text: str, kind: str) -> str | int | float | bool:
    """The value that a text means; the text itself where it means none of its kind."""
    with suppress(ValueError, KeyError):
        match kind:
            case "boolean":
                return {"true": True, "false": False}[text.lower()]
            case "integer" | "number":
                with suppress(ValueError):
                    return int(text)
                number = float(text)
                if number.is_integer() or (kind == "number" and math.isfinite(number)):  # JSON has no nan
                    return number
    return text


def _wrong(inputs: Mapping[str, Any], allowed: Mapping[str, dict[str, Any]]) -> Iterator[tuple[str, str]]:
    """Each input that Cog would refuse, with a sentence."""
    for key, value in inputs.items():
        field, hint = allowed[key], ""
        choices = field.get("enum", [value])
        if not _is(value, field["type"]):
            right = KINDS[field["type"]]
        elif value not in choices:
            right, hint = f"one of {', '.join(map(str, choices))}", _meant(str(value), [*map(str, choices)])
        elif value < field.get("minimum", value):
            right = f"at least {field['minimum']}"
        elif value > field.get("maximum", value):
            right = f"at most {field['maximum']}"
        else:
            continue
        shown = repr(value[:SHOWN]) if isinstance(value, str) else json.dumps(value)[:SHOWN]
        yield key, f"{key} is {shown}{hint}; it must be {right}."


def _is(value: object, kind: str) -> bool:
    """Whether a value is of a type of JSON Schema, where 2.0 is a whole number and true is none."""
    match kind:
        case "string":
            return isinstance(value, str) and not HALVES.search(value)
        case "boolean":
            return isinstance(value, bool)
        case "integer":
            return _is(value, "number") and value % 1 == 0
    return type(value) in (int, float) and abs(value) <= sys.float_info.max  # as large as Cog reads numbers


def _drawn_by(picture: Path, said: Mapping[str, str], allowed: Mapping[str, object]) -> dict[str, Any]:
    """What draws a picture again by its own words, without what stands against what is said.

    Raises:
        ValueError: a sentence: it has none, or needs something that is not in it.
    """
    from images import read_metadata  # Pillow takes longer to load than all else here

    if not _is_file(str(picture)):
        raise ValueError(f"--like: there is no file {str(picture)!r}.")
    try:
        made = read_metadata(picture.expanduser())
    except ValueError:
        raise ValueError(f"{picture} does not say how it was drawn; --like takes what this predictor drew.") from None
    from_image = said.get("image", "null") not in ("null", "")
    if (cut := made.pop("cut", None)) in DRAWN_BY and cut not in said:
        raise ValueError(f"{picture} had room for a part of its {cut} alone; add -i {cut}=….")
    if "prompt_strength" in made and not from_image and said.get("prompt_strength") != "null":
        raise ValueError(
            f"{picture} was drawn from an image, which is not in it; add -i image=@…, and -i mask=@… if it had a mask."
        )
    loras = str(made.get("replicate_weights")) if "replicate_weights" not in said else ""
    others = " Its other LoRAs go into -i extra_lora=… with -i extra_lora_scale=…." if loras.count('"path"') > 1 else ""
    if '"COG_WEIGHTS:' in loras:
        raise ValueError(
            f"{picture} was drawn with a LoRA that COG_WEIGHTS named; add -i replicate_weights= where it still does, "
            f"or -i replicate_weights=@…, and -i lora_scale=… with its strength.{others}"
        )
    if '"sha256:' in loras:
        raise ValueError(
            f"{picture} was drawn with a LoRA that came within its request; add -i replicate_weights=@…, and "
            f"-i lora_scale=… with its strength.{others}"
        )
    if left_out := {name: None for name in made if name not in DRAWN_BY or name not in allowed}:
        names = ", ".join(map(repr, left_out))[:SHOWN]
        say(f"{picture} also says {names}, which --like does not take.")
    if from_image:
        left_out |= dict.fromkeys(SIZE)
    elif "aspect_ratio" in said:
        left_out |= dict.fromkeys(["megapixels"] if said["aspect_ratio"] == "custom" else ["width", "height"])
    return {name: value for name, value in made.items() if name not in left_out and value is not None}
