"""What `cog predict` does, without Docker: one prediction from the command line through the real Cog server.

What is wrong with a command line is said before a server starts (`inputs.py`, `outputs.py`). What has been drawn is
kept, whatever has become of the place where it should go.
"""

import argparse
import itertools
import json
import os
import re
import shlex
import shutil
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, TextIO

from local_cog import schema
from local_cog.inputs import read_inputs
from local_cog.outputs import Place
from local_cog.server import CogServer, exit_on_signals, failure, files
from service.lines import printable, say
from settings import ROOT

# A progress bar as tqdm draws it; it is redrawn in place.
BAR = re.compile(r"\d+%\|")


class Progress:
    """Shows a person what the predictor prints: reads Cog's log, writes plain lines and one moving progress bar."""

    def __init__(self, log: TextIO) -> None:
        self.log = log
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
            say(start + message, end="" if bar else "\n")
            self.bar_shown = bar

    def close(self) -> None:
        """End the line of a bar."""
        self.show()
        if self.bar_shown:
            say("")


def predict(inputs: dict[str, Any]) -> dict[str, Any]:
    """Start a server, have it make one prediction, and stop it; what the predictor prints goes to stderr.

    Raises:
        RuntimeError: a sentence, when the server does not get ready.
    """
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(1) as pool:
        log = Path(scratch) / "log"
        with CogServer(log=log) as server, log.open(encoding="utf-8", errors="replace") as text:
            progress = Progress(text)
            try:
                say("Starting the Cog server.")
                server.wait_until_ready(seconds=float("inf"), meanwhile=progress.show)  # it may have to download FLUX
                answer = pool.submit(server.predict, inputs)
                # The request waits in another thread, so that Ctrl-C reaches this one and ends the server.
                while not wait([answer], timeout=0.1).done:
                    progress.show()
            finally:
                progress.close()
            return answer.result()


def keep(pictures: list[tuple[str, bytes]], place: Place) -> None:
    """Write pictures, and print their paths; what cannot be written where it should go is kept elsewhere.

    Raises:
        OSError: a sentence, once all pictures are kept.
    """
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
        # Python would try again when it ends, and complain in words of its own.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):  # whose reader has read enough
            problem = problem or f"The paths of the pictures could not be printed: {error.strerror}."
    if problem:
        raise OSError(problem)


def _write(path: Path, content: bytes) -> None:
    """Write a file whole or not at all: where there is no room for it, what is there stays."""
    target = Path(os.path.realpath(path))  # `resolve` refuses a link to itself, and by no OSError
    aside = target.with_name(f".flux-sprites-{os.getpid()}.part")  # no longer than any name may be
    try:
        aside.write_bytes(content)
        if target.exists():
            shutil.copymode(target, aside)
        aside.replace(target)
    finally:
        aside.unlink(missing_ok=True)


def quoted(words: list[str]) -> str:
    """What to write instead of words that belong to no option, from the whole command line."""
    first = sys.argv.index(words[0])
    words = list(itertools.takewhile(lambda word: not word.startswith("-"), sys.argv[first:]))
    option, before = sys.argv[first - 2 : first] if first > 2 else ("", "")
    if option in ("-o", "--like") and not Path(before).suffix:  # a path without its quotes has fallen apart into words
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
