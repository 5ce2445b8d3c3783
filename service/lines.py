"""What others have named, as a part of one line of a log."""


def printable(text: str) -> str:
    """The text without line ends, colours, and halves of characters: nothing in it can begin a line of its own."""
    return "".join(character if character.isprintable() else "?" for character in text)
