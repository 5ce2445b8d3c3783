"""What `-o` says → where the pictures of a prediction go, and in which format; nothing is written here."""

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from local_cog import schema
from service.lines import printable


@dataclass(frozen=True)
class Place:
    """A folder, in which pictures have names that begin alike; or a file, which is the one picture's own name."""

    folder: Path
    stem: str = "output"
    suffix: str = ""  # of the file

    @classmethod
    def read(cls, text: str) -> Self:
        """A file has a suffix; a folder is there already, ends in a slash or has none."""
        path = Path(os.path.expanduser(text))  # noqa: PTH111 (~somebody who is not known stays as it is)
        is_file = bool(path.suffix) and not text.endswith("/")
        with suppress(OSError):  # too long a name, or a closed folder before it, of which `check` tells
            is_file = is_file and not path.is_dir()
        return cls(path.parent, path.stem, path.suffix) if is_file else cls(path)

    def path(self, number: int, count: int, suffix: str) -> Path:
        """The path of one of so many pictures, which would have this suffix by its format."""
        inner = "" if self.suffix and count == 1 else f".{number}"
        return self.folder / f"{self.stem}{inner}{self.suffix or suffix}"

    def agree(self, inputs: Mapping[str, Any], document: dict[str, Any]) -> dict[str, Any]:
        """The input with the format that the file's suffix says.

        Args:
            inputs: as they are without it.
            document: the OpenAPI document, which may offer formats.

        Raises:
            ValueError: a sentence: there is no such format, or the input says another one.
        """
        formats = schema.inputs(document).get("output_format", {}).get("enum")
        if not self.suffix or not formats:
            return {**inputs}
        written = self.suffix[1:].lower()
        wanted = "jpg" if written == "jpeg" else written
        if wanted not in formats:
            right = ", ".join(f".{name}" for name in formats)
            raise ValueError(
                f"-o ends in {printable(self.suffix)}; it must end in one of {right}, or in / for a folder."
            )
        if (said := inputs.get("output_format", wanted)) != wanted:
            raise ValueError(f"-o ends in {self.suffix}, and output_format is {said}; both must say the same.")
        return {**inputs, "output_format": wanted}

    def check(self) -> None:
        """Find what would stand in the way of files there, as far as that is known before; nothing is made.

        Raises:
            ValueError: a sentence.
        """
        try:
            there = next(path for path in (self.folder, *self.folder.parents) if path.exists())
            file = self.path(0, 1, "")
            closed = [path for path in (there, file) if path.exists() and not os.access(path, os.W_OK)]
            reason = f"{there} is no folder" if not there.is_dir() else closed and f"{closed[0]} may not be written"
            if self.suffix and not reason and file.exists() and not file.is_file():  # a pipe, a device
                reason = f"{file} is no file"
        except OSError as error:
            reason = error.strerror
        if reason:
            raise ValueError(f"No picture can be written to the folder {self.folder.absolute()}: {reason}.")
