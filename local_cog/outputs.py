"""`-o` → the paths and the format of a prediction's pictures; nothing is written here."""

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
    """A folder, in which the pictures' names begin alike; or a file, which is the name of the only picture."""

    folder: Path
    stem: str = "output"
    suffix: str = ""  # a file's

    @classmethod
    def read(cls, text: str) -> Self:
        """The place that a text names: a file has a suffix; a folder exists, ends in a slash or has no suffix."""
        path = Path(os.path.expanduser(text))  # noqa: PTH111 (an unknown ~user stays as it is)
        is_file = bool(path.suffix) and not text.endswith("/")
        with suppress(OSError):  # too long a name, or in a closed folder: `check` says so
            is_file = is_file and not path.is_dir()
        return cls(path.parent, path.stem, path.suffix) if is_file else cls(path)

    def path(self, number: int, count: int, suffix: str) -> Path:
        """The path of one of so many pictures; its format's suffix counts where the place has none."""
        inner = "" if self.suffix and count == 1 else f".{number}"
        return self.folder / f"{self.stem}{inner}{self.suffix or suffix}"

    def agree(self, inputs: Mapping[str, Any], document: dict[str, Any]) -> dict[str, Any]:
        """The inputs with the format of the file's suffix, if the OpenAPI document offers formats."""
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
        """Check that files can be written there, as far as that is known before; a ValueError says why not."""
        try:
            there = next(path for path in (self.folder, *self.folder.parents) if path.exists())
            file = self.path(0, 1, "")
            closed = [path for path in (there, file) if path.exists() and not os.access(path, os.W_OK)]
            if not there.is_dir():
                reason = f"{there} is no folder"
            elif closed:
                reason = f"{closed[0]} may not be written"
            elif self.suffix and file.exists() and not file.is_file():  # a pipe, a device
                reason = f"{file} is no file"
            else:
                return
        except OSError as error:
            reason = error.strerror
        raise ValueError(f"No picture can be written to the folder {self.folder.absolute()}: {reason}.")
