"""Lines that people read: of a log, with what others have named in them, and of a terminal."""

import sys
from contextlib import suppress


def printable(text: str) -> str:
    """The text without line ends, colours, and halves of characters: nothing in it can begin a line of its own."""
    return "".join(character if character.isprintable() else "?" for character in text)


def say(text: str, end: str = "\n") -> None:
    """Tell a person something beside a command's results; whether somebody reads it does not matter to those."""
    if sys.stderr:  # else print would take stdout
        with suppress(OSError):
            print(text, end=end, file=sys.stderr, flush=True)
