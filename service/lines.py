"""Lines for people: in logs, where strangers' names may stand in them, and on a terminal."""

import sys
from contextlib import suppress


def printable(text: str) -> str:
    """The text with ? for line ends, colours and halves of characters, so that it stays one line of a log."""
    return "".join(character if character.isprintable() else "?" for character in text)


def say(text: str, end: str = "\n") -> None:
    """Print to stderr, beside a command's results; where that is closed, nothing is printed."""
    if sys.stderr:  # None where it was closed from the start: print would take stdout
        with suppress(OSError):
            print(text, end=end, file=sys.stderr, flush=True)
