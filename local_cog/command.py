"""`cog predict` without Docker: one prediction from the command line through the real Cog server.

A wrong command line is refused before a server starts (`inputs.py`, `outputs.py`). Pictures that cannot be written
where they should go are kept elsewhere.
"""

import argparse
import itertools
import math
import os
import re
import shlex
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from local_cog import schema
from local_cog.inputs import read_inputs
from local_cog.outputs import Place
from local_cog.server import CogServer, exit_on_signals, failure, files
from service.lines import printable, say
from settings import ROOT

# A progress bar of tqdm.
BAR = re.compile(r"\d+%\|")


class Progress:
    """Shows the predictor's output to a person: plain lines, and one progress bar that is redrawn in place."""

    def __init__(self) -> None:
        self.bar_shown = False

    def show(self, text: str, record: Mapping[str, Any]) -> None:
        """Show a line of the predictor, or one that was printed past Cog's log; Cog's own have no source."""
        if text and (not record or "source" in record["fields"]):
            bar = bool(BAR.search(text))
            say(("\r" if bar else "\n" if self.bar_shown else "") + text, end="" if bar else "\n")
            self.bar_shown = bar


def predict(inputs: dict[str, Any]) -> dict[str, Any]:
    """The answer of a server that is started for one prediction, which prints to stderr; RuntimeError: a sentence."""
    progress = Progress()
    try:
        say("Starting the Cog server.")
        with CogServer(log=progress.show) as server:
            server.wait_until_ready(math.inf)  # it may have to download FLUX
            return server.predict(inputs)
    finally:
        if progress.bar_shown:
            say("")


def keep(pictures: list[tuple[str, bytes]], place: Place) -> None:
    """Write pictures, elsewhere if need be, and print their paths; an OSError then says what could not be done."""
    written, problem = [], ""
    for number, (suffix, content) in enumerate(pictures):
        path = place.path(number, len(pictures), suffix)
        shown = printable(str(path))
        try:
            replaces = path.exists()
            path.parent.mkdir(parents=True, exist_ok=True)
            _write(path, content)
            if replaces:
                say(f"Replaced {shown}.")
        except OSError as error:
            place = Place(Path(tempfile.mkdtemp(prefix="flux-sprites-")))
            problem = f"{shown} could not be written: {error.strerror}. What was drawn is in {place.folder}."
            path = place.path(number, len(pictures), suffix)
            path.write_bytes(content)
        written.append(path)
    try:
        if sys.stdout:
            sys.stdout.buffer.write(b"".join(os.fsencode(path) + b"\n" for path in written))
            sys.stdout.flush()
    except OSError as error:
        # Otherwise Python flushes again at exit, and prints an error of its own.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):  # the reader has read enough
            problem = problem or f"The paths of the pictures could not be printed: {error.strerror}."
    if problem:
        raise OSError(problem)


def _write(path: Path, content: bytes) -> None:
    """Write a whole file, or leave the old one if there is no room."""
    target = Path(os.path.realpath(path))  # `resolve` raises no OSError for a link to itself
    aside = target.with_name(f".flux-sprites-{os.getpid()}.part")  # short enough for any file system
    try:
        aside.write_bytes(content)
        if target.exists():
            shutil.copymode(target, aside)
        aside.replace(target)
    finally:
        aside.unlink(missing_ok=True)


def quoted(words: list[str]) -> str:
    """What to write instead of words that belong to no option, by the whole command line."""
    first = sys.argv.index(words[0])
    words = list(itertools.takewhile(lambda word: not word.startswith("-"), sys.argv[first:]))
    option, before = sys.argv[first - 2 : first] if first > 2 else ("", "")
    if option in ("-o", "--like") and not Path(before).suffix:  # a path with spaces lacks its quotes
        return f"{option} {shlex.quote(' '.join([before, *words]))}"
    if re.match(r"\w+=", words[0]):  # -i is missing
        option, before, words = "-i", words[0], words[1:]
    elif option != "-i" or "=" not in before:
        before = "prompt="
    named = next((index for index, word in enumerate(words) if re.match(r"\w+=", word)), len(words))
    key, _, value = " ".join([before, *words[:named]]).partition("=")
    return f"-i {key}={shlex.quote(value.strip())}"


def main() -> None:
    """One prediction: the paths of its files on stdout, or sentences on stderr and exit code 1."""
    parser = argparse.ArgumentParser(prog="script/predict", description="One prediction through the real Cog server.")
    parser.add_argument(
        "-i", dest="pairs", metavar="KEY=VALUE", action="append", default=[], help="an input; KEY=@FILE sends a file"
    )
    parser.add_argument(
        "-o",
        dest="place",
        metavar="PATH",
        default="",
        help="the file, such as fox.png, which chooses the format, or the folder of the pictures (default: here)",
    )
    parser.add_argument(
        "--like", metavar="PICTURE", type=Path, help="draw this picture again, with what -i says in place of its own"
    )
    arguments, words = parser.parse_known_args()
    words = [word for word in words if word != "--"]
    if options := [word for word in words if word.startswith("-")]:
        parser.error(f"unrecognized arguments: {' '.join(options)}")
    if words:
        parser.exit(2, f"Inputs are given by name, and with quotes around spaces: {quoted(words)} is right.\n")
    try:
        exit_on_signals()
        document, place = schema.write(ROOT), Place.read(arguments.place)
        inputs = place.agree(read_inputs(arguments.pairs, document, arguments.like), document)
        place.check()
        answer = predict(inputs)
        if problem := failure(answer):
            raise RuntimeError(problem)
        keep(files(answer), place)
    except KeyboardInterrupt:
        sys.exit("Cancelled.")
    except (ValueError, RuntimeError, OSError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
