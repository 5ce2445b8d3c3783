"""The config that PEFT saves beside a LoRA's weights, which by themselves do not say at which strength they count.

Knows its name and its size; what it says is for whoever reads the LoRA.
"""

from collections.abc import Container
from pathlib import Path

from settings import MIB
from sources.contents import UnfitError
from sources.shown import brief, gigabytes

# What other trainers put beside weights changes nothing of what they mean: LyCORIS and kohya's scripts write each
# layer's alpha into the file, ai-toolkit's is always the rank.
NAME = "adapter_config.json"
# Where this lies in the same folder, the config is its, and no other file's.
OWNER = "adapter_model.safetensors"
# It is longer than 64 KiB where each layer has a rank and an alpha of its own.
MAX_BYTES = MIB // 4


def beside(file: str, files: Container[str]) -> str | None:
    """The path of the config of a file, where it is among the files."""
    folder = file[: file.rfind("/") + 1]
    if folder + NAME not in files or (folder + OWNER in files and file != folder + OWNER):
        return None
    return folder + NAME


def admit(size: int, name: str) -> None:
    """Raise `UnfitError`, a sentence with `name`, about a config that is too long."""
    if size > MAX_BYTES:
        raise UnfitError(f"{name} has more than {gigabytes(MAX_BYTES)}, which no config of a LoRA needs.")


def text(content: bytes, name: str) -> str:
    """A config as text. Of one that may be too long, MAX_BYTES + 1 bytes are enough.

    Raises:
        ValueError: it is too long.
    """
    admit(len(content), name)
    return content.decode("utf-8-sig", errors="replace")


def read_beside(file: Path) -> str:
    """The config beside a file on the disk; empty where there is none.

    Raises:
        ValueError: it is too long, or cannot be read.
    """
    try:
        # Regular ones alone: a pipe would wait for somebody to write into it.
        found = beside(file.name, [name for name in (NAME, OWNER) if file.with_name(name).is_file()])
        if found is None:
            return ""
        with file.with_name(found).open("rb") as config:
            return text(config.read(MAX_BYTES + 1), NAME)
    except OSError as error:
        raise ValueError(f"{NAME} beside {brief(file.name)} cannot be read: {error.strerror}.") from None
