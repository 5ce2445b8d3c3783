"""The command line's `-i key=value` and a picture's own metadata → the input of a prediction.

Values are checked by the schema that Cog's server checks them by, so that a wrong one is refused before a server
starts.
"""

import difflib
import json
import re
import shlex
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from local_cog import schema
from local_cog.server import MAX_FILE_BYTES
from service.data_uri import file_uri
from service.lines import say

# Inputs that take a LoRA by its name or address. A text in them that looks like PATH and names a file lacks its @.
LORAS = ("replicate_weights", "extra_lora")
PATH = re.compile(r"[./~].*|.*\.(?:safetensors|tar|t?gz|zip)", re.IGNORECASE)
# The inputs for a picture's size; with an image, they are ignored.
SIZE = ("aspect_ratio", "megapixels", "width", "height")
# What is taken from a picture's metadata. No more: a stranger's picture must not have an `image` fetched, or the safety
# check switched off.
DRAWN_BY = (
    *("prompt", "model", "seed", "num_inference_steps", "guidance_scale", "go_fast", "prompt_strength"),
    *("replicate_weights", *SIZE),
)
KINDS = {"integer": "a whole number", "number": "a number", "boolean": "true or false", "string": "text in UTF-8"}
# Python has halves of surrogate pairs in place of bytes that are no UTF-8, in arguments as in JSON.
HALVES = re.compile("[\ud800-\udfff]")
# So many characters of a wrong value are shown, and compared with the right ones: it may be a whole file.
SHOWN = 80


def read_inputs(pairs: list[str], document: dict[str, Any], like: Path | None = None) -> dict[str, Any]:
    """The input of a prediction from `key=value` pairs; `key=@file` stands for the file's content.

    `key=null` leaves an input out, unless it is a text, which may be this word. The last pair with a key counts. What
    the pairs lack comes from the picture `like`. The OpenAPI document types and bounds all values; a ValueError has a
    line for each wrong one, which says what would be right.
    """
    allowed = schema.inputs(document)
    said = _named(pairs, allowed)
    drawn = _drawn_by(like, said, allowed) if like else {}
    given: dict[str, Any] = {}
    problems = {key: f"{like}: {sentence}" for key, sentence in _wrong(drawn, allowed)}
    room = MAX_FILE_BYTES
    for key, text in said.items():
        field = allowed[key]
        takes_files = field.get("format") == "uri" or key in LORAS  # elsewhere @ is text, as in a prompt
        if text == "null" and (field["type"] != "string" or field.keys() & {"format", "enum"}):
            continue  # Cog refuses null itself
        if takes_files and text.startswith("@"):
            try:
                given[key], size = _content(key, text[1:], room)
                room -= size
            except ValueError as error:
                problems[key] = str(error)
        elif takes_files and ("format" in field or PATH.fullmatch(text)) and _is_file(text):
            problems[key] = f"{key} is {text!r}, which is a file here; -i {shlex.quote(f'{key}=@{text}')} sends it."
        else:
            given[key] = _typed(text, field["type"])
    problems |= dict(_wrong(given, allowed))
    inputs = drawn | given
    for key in document["components"]["schemas"]["Input"].get("required", []):
        if key not in inputs and key not in problems:
            problems[key] = f'The input {key} is missing; script/predict -i {key}="a red fox" gives one.'
    if problems:
        raise ValueError("\n".join(problems.values()))
    return inputs


def _named(pairs: list[str], allowed: Mapping[str, object]) -> dict[str, str]:
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


def _meant(text: str, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(text[:SHOWN].lower(), names, 1)
    return f" (did you mean {close[0]}?)" if close else ""


def _content(key: str, name: str, room: int) -> tuple[str, int]:
    """A file as a data URI, and its size."""
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


def _is_file(name: str) -> bool:
    try:
        return Path(name).expanduser().is_file()
    except (OSError, RuntimeError):  # a data URI is too long for a path; ~name is no user
        return False


def _typed(text: str, kind: str) -> str | int | float | bool:
    """The value that a text stands for by its type; the text itself if it stands for none."""
    if kind == "boolean":
        return {"true": True, "false": False}.get(text.lower(), text)
    if kind in ("integer", "number"):
        with suppress(ValueError):
            return int(text)
        with suppress(ValueError):
            if _is(number := float(text), kind):
                return number
    return text


def _wrong(inputs: Mapping[str, Any], allowed: Mapping[str, dict[str, Any]]) -> Iterator[tuple[str, str]]:
    """Each input that Cog would refuse, and a sentence about it."""
    for key, value in inputs.items():
        field, hint = allowed[key], ""
        choices = field.get("enum", [value])
        if not _is(value, field["type"]):
            right = KINDS[field["type"]]
        elif value not in choices:
            right, hint = f"one of {', '.join(map(str, choices))}", _meant(str(value), map(str, choices))
        elif value < field.get("minimum", value):
            right = f"at least {field['minimum']}"
        elif value > field.get("maximum", value):
            right = f"at most {field['maximum']}"
        else:
            continue
        shown = repr(value[:SHOWN]) if isinstance(value, str) else json.dumps(value)[:SHOWN]
        yield key, f"{key} is {shown}{hint}; it must be {right}."


def _is(value: object, kind: str) -> bool:
    """Whether a value has a type of JSON Schema, where 2.0 is an integer and true is not."""
    match kind:
        case "string":
            return isinstance(value, str) and not HALVES.search(value)
        case "boolean":
            return isinstance(value, bool)
        case "integer":
            return _is(value, "number") and value % 1 == 0
    return type(value) in (int, float) and abs(value) <= sys.float_info.max  # as large as Cog reads numbers


def _drawn_by(picture: Path, said: Mapping[str, str], allowed: Mapping[str, object]) -> dict[str, Any]:
    """The inputs that draw a picture again, by its metadata, without those that `said` replaces."""
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
    add = ""
    if '"COG_WEIGHTS:' in loras:
        add = "that COG_WEIGHTS named; add -i replicate_weights= where it still does, or"
    elif '"sha256:' in loras:
        add = "that came within its request; add"
    if add:
        more = " Its other LoRAs go into -i extra_lora=… with -i extra_lora_scale=…." * (loras.count('"path"') > 1)
        raise ValueError(
            f"{picture} was drawn with a LoRA {add} -i replicate_weights=@…, "
            f"and -i lora_scale=… with its strength.{more}"
        )
    taken = {name: value for name, value in made.items() if name in DRAWN_BY and name in allowed}
    if others := [name for name in made if name not in taken]:
        say(f"{picture} also says {', '.join(map(repr, others))[:SHOWN]}, which --like does not take.")
    replaced = {*said}
    if from_image:
        replaced |= {*SIZE}
    elif "aspect_ratio" in said:
        replaced |= {"megapixels"} if said["aspect_ratio"] == "custom" else {"width", "height"}
    return {name: value for name, value in taken.items() if name not in replaced and value is not None}
