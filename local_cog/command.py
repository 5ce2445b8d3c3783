"""What `cog predict` does, without Docker: one prediction from the command line through the real Cog server.

This module knows how a command line becomes an input and an answer becomes files; the inputs' names and types come
from the schema that the server validates by.
"""

import argparse
import difflib
import json
import re
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, TextIO

from local_cog import schema
from local_cog.data_uri import file_uri
from local_cog.server import MAX_FILE_BYTES, CogServer, exit_on_signals, failure, files
from settings import ROOT

# Inputs that take a LoRA: a text, by their type, as a prompt is; and what no name of a LoRA looks like.
LORAS = ("replicate_weights", "extra_lora")
PATH = re.compile(r"[./~].*|.*\.(?:safetensors|tar|t?gz|zip)", re.IGNORECASE)
# A progress bar as tqdm draws it; it is redrawn in place.
BAR = re.compile(r"\d+%\|")


def read_inputs(pairs: list[str], document: dict[str, Any]) -> dict[str, Any]:
    """The input of a prediction from `key=value` pairs; `key=@file` stands for the file's content.

    `key=null` leaves out what is no text; a text may be this word.

    Args:
        pairs: what followed each `-i`.
        document: the OpenAPI document, which types the values.

    Raises:
        ValueError: a sentence that says which input is wrong and what would be right.
    """
    schemas = document["components"]["schemas"]
    properties = schemas["Input"]["properties"]
    inputs: dict[str, Any] = {}
    sent = 0
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"-i {pair!r} must have the form key=value or key=@file.")
        if key not in properties:
            close = difflib.get_close_matches(key, properties, 1)
            hint = f" (did you mean {close[0]}?)" if close else ""
            raise ValueError(f"There is no input {key!r}{hint}; the inputs are {', '.join(properties)}.")
        field = properties[key]
        kind = schemas[field["allOf"][0]["$ref"].rpartition("/")[2]]["type"] if "allOf" in field else field["type"]
        if value == "null" and not _is_text(field):
            inputs.pop(key, None)  # Cog refuses null itself
        elif kind == "string" and value.startswith("@"):
            if not _is_file(value[1:]):
                raise ValueError(f"{key}: there is no file {value[1:]!r}.")
            path = Path(value[1:]).expanduser()
            sent += path.stat().st_size
            if sent > MAX_FILE_BYTES:
                raise ValueError(
                    f"{key}: a request carries at most {MAX_FILE_BYTES // 10**6} MB of files, and with {path.name} it "
                    f"would be {sent / 1e6:.1f} MB; set COG_WEIGHTS=path for a large LoRA, or give its URL."
                )
            inputs[key] = file_uri(path)
        elif (field.get("format") == "uri" or (key in LORAS and PATH.fullmatch(value))) and _is_file(value):
            raise ValueError(f"{key} is {value!r}, which is a file here; -i {key}=@{value} sends it.")
        else:
            inputs[key] = _typed(key, value, kind)
    if missing := [key for key in schemas["Input"].get("required", []) if key not in inputs]:
        raise ValueError(f"An input is missing: -i {missing[0]}=….")
    return inputs


def _is_text(field: dict[str, Any]) -> bool:
    """Whether any words may stand there: in files, choices, numbers and truth values they may not."""
    return field.get("type") == "string" and "format" not in field


def _is_file(value: str) -> bool:
    try:
        return Path(value).expanduser().is_file()
    except (OSError, RuntimeError):  # too long for a path: a data URI; ~somebody who is not known
        return False


def _typed(key: str, value: str, kind: str) -> str | int | float | bool:
    try:
        match kind:
            case "integer":
                return int(value)
            case "number":
                number = float(value)
                json.dumps(number, allow_nan=False)  # JSON has neither infinities nor nan
                return number
            case "boolean":
                return {"true": True, "false": False}[value.lower()]
            case _:
                return value
    except (ValueError, KeyError):
        right = {"integer": "a whole number", "number": "a number", "boolean": "true or false"}[kind]
        raise ValueError(f"{key} is {value!r}; it must be {right}.") from None


class Progress:
    """Shows a person what the predictor prints: reads Cog's log, writes plain lines and one moving progress bar."""

    def __init__(self, log: TextIO, screen: TextIO) -> None:
        self.log, self.screen = log, screen
        self.partial = ""
        self.bar_shown = False

    def show(self) -> None:
        """Pass on what was printed since the last call."""
        *lines, self.partial = (self.partial + self.log.read()).split("\n")
        for line in lines:
            try:
                event = json.loads(line)
            except ValueError:  # printed past Cog's log, by a crash
                self._print(line)
                continue
            if "source" in event["fields"]:  # Stdout or Stderr of the predictor; the rest is Cog's own
                self._print(event["fields"]["message"].strip())

    def _print(self, message: str) -> None:
        bar = bool(BAR.search(message))
        start = "\r" if bar else "\n" if self.bar_shown else ""
        if message:
            print(start + message, end="" if bar else "\n", file=self.screen, flush=True)
            self.bar_shown = bar

    def close(self) -> None:
        """End the line of a bar."""
        self.show()
        if self.bar_shown:
            print(file=self.screen)


def predict(inputs: dict[str, Any]) -> dict[str, Any]:
    """Start a server, have it make one prediction, and stop it; what the predictor prints goes to stderr.

    Raises:
        RuntimeError: a sentence, when the server does not get ready.
    """
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(1) as pool:
        log = Path(scratch) / "log"
        with CogServer(log=log) as server, log.open(encoding="utf-8", errors="replace") as text:
            progress = Progress(text, sys.stderr)
            try:
                print("Starting the Cog server.", file=sys.stderr)
                server.wait_until_ready(seconds=float("inf"), meanwhile=progress.show)  # it may have to download FLUX
                answer = pool.submit(server.predict, inputs)
                # The request waits in another thread, so that Ctrl-C reaches this one and ends the server.
                while not wait([answer], timeout=0.1).done:
                    progress.show()
            finally:
                progress.close()
            return answer.result()


def main() -> None:
    """One prediction: the paths of its files on stdout, or one sentence on stderr and exit code 1."""
    parser = argparse.ArgumentParser(prog="script/predict", description="One prediction through the real Cog server.")
    parser.add_argument(
        "-i", dest="pairs", metavar="KEY=VALUE", action="append", default=[], help="an input; KEY=@FILE sends a file"
    )
    parser.add_argument(
        "-o", dest="directory", metavar="DIR", type=Path, default=Path(), help="where the files go (default: here)"
    )
    arguments = parser.parse_args()
    exit_on_signals()
    try:
        answer = predict(read_inputs(arguments.pairs, schema.write(ROOT)))
        if problem := failure(answer):
            raise RuntimeError(problem)
        arguments.directory.mkdir(parents=True, exist_ok=True)
        for i, (suffix, content) in enumerate(files(answer)):
            path = arguments.directory / f"output.{i}{suffix}"
            path.write_bytes(content)
            print(path)
    except KeyboardInterrupt:
        sys.exit("Cancelled.")
    except (ValueError, RuntimeError, OSError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
