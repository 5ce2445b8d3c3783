"""The config that PEFT saves beside a LoRA's weights: without it, their strength is unknown. It is not parsed here."""

from collections.abc import Container
from pathlib import Path

from settings import MIB
from sources.contents import UnfitError
from sources.shown import brief, gigabytes

# Other trainers need none: LyCORIS and kohya's scripts write each layer's alpha into the weights' file, and
# ai-toolkit's alpha is always the rank.
NAME = "adapter_config.json"
# If this file is in the same folder, the config belongs to it alone.
OWNER = "adapter_model.safetensors"
# It is longer than 64 KiB where each layer has a rank and an alpha of its own.
MAX_BYTES = MIB // 4


def beside(file: str, files: Container[str]) -> str | None:
    """The path of a file's config; None where it is not among the files."""
    folder = file[: file.rfind("/") + 1]
    if folder + NAME not in files or (folder + OWNER in files and file != folder + OWNER):
        return None
    return folder + NAME


def admit(size: int, name: str) -> None:
    """Raise `UnfitError`, a sentence with `name`, about a config that is too long."""
    if size > MAX_BYTES:
        raise UnfitError(f"{name} has more than {gigabytes(MAX_BYTES)}, which no config of a LoRA needs.")


def text(content: bytes, name: str) -> str:
    """A config as text; raises as `admit` does, for which the first MAX_BYTES + 1 bytes are enough."""
    admit(len(content), name)
    return content.decode("utf-8-sig", errors="replace")


def read_beside(file: Path) -> str:
    """The config beside a file on the disk; empty where there is none. ValueError: it is too long or unreadable."""
    try:
        # Only regular files: opening a pipe would wait for a writer.
        found = beside(file.name, [name for name in (NAME, OWNER) if file.with_name(name).is_file()])
        if found is None:
            return ""
        with file.with_name(found).open("rb") as config:
            return text(config.read(MAX_BYTES + 1), NAME)
    except OSError as error:
        raise ValueError(f"{NAME} beside {brief(file.name)} cannot be read: {error.strerror}.") from None
