"""Archives with a LoRA in them: tar, zip and gzip, read without believing what they say of themselves.

Of an archive's members one is written, into a file that the caller has opened; of its names none becomes a path.
"""

import gzip
import io
import os
import re
import stat
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import PurePosixPath
from typing import BinaryIO, NamedTuple, TypeVar

from settings import MIB
from sources.client import StoppedError
from sources.contents import Check, Contents, Reserve, UnfitError, copy_checked
from sources.shown import printable

T = TypeVar("T")
# Weights hardly shrink when packed. Small files may: an untrained half of a LoRA is all zeros.
MAX_RATIO, ALWAYS_ALLOWED = 100, 64 * MIB
MAX_MEMBERS = 10_000
MAX_CONFIG_BYTES = 65_536
# tarfile and zipfile read what they take for a header at once, however long it says that it is.
MAX_READ = 16 * MIB


class _Cautious(io.BufferedReader):
    """A file that is not read all at once, whatever it says of itself."""

    def read(self, size: int | None = -1, /) -> bytes:
        whole = size is None or size < 0
        data = super().read(MAX_READ + 1 if whole else min(size, MAX_READ + 1))
        if len(data) > MAX_READ:
            raise RuntimeError("an entry of it is too long")
        return data


def unpack(file: BinaryIO, packed: Contents, target: BinaryIO, reserve: Reserve, check: Check) -> Contents:
    """Write the one file of an archive that matters; of an archive's other members nothing is ever written.

    Returns:
        What was written: a safetensors file, or the tar that gzip had packed.

    Raises:
        ValueError: the archive is damaged, a bomb, or has no such file or several.
    """
    limit = max(MAX_RATIO * packed.size, ALWAYS_ALLOWED)

    def bounded(size: int) -> None:
        if size > limit:
            raise UnfitError(f"{contents.name} unpacks to more than {MAX_RATIO} times its size, which no LoRA does.")
        reserve(size)

    file.seek(0)
    # A descriptor of its own: the reader closes it.
    with _Cautious(io.FileIO(os.dup(file.fileno()))) as archive:
        try:
            if packed.kind == "gzip":
                contents = Contents(packed.name, kinds=("safetensors", "tar"))
                with gzip.GzipFile(fileobj=archive) as content:
                    copy_checked(content, target, contents, bounded, check)
                return contents
            with (_open_tar if packed.kind == "tar" else _open_zip)(archive, packed.name) as member:
                print(f"{packed.name}: {printable(member.name)} of the archive.")
                contents = Contents(f"{packed.name} ({printable(member.name)})", kinds=("safetensors",))
                copy_checked(member.content, target, contents, bounded, check)
            contents.trigger_words = contents.trigger_words or _trigger_words(member.config)
            return contents
        except (UnfitError, StoppedError):
            raise
        except Exception as error:  # whatever tarfile, zipfile and zlib come across; each raises a dozen types
            told = isinstance(error, tarfile.TarError | zipfile.BadZipFile | RuntimeError)
            reason = f" ({printable(str(error))[:200]})" if told and str(error) else ""
            raise UnfitError(f"{packed.name} is a damaged {packed.kind} archive{reason}.") from None


class _Member(NamedTuple):
    """The one file of an archive that matters, and how it was trained."""

    name: str
    content: BinaryIO
    config: bytes


@contextmanager
def _open_tar(archive: BinaryIO, name: str) -> Iterator[_Member]:
    with tarfile.open(fileobj=archive, mode="r:") as tar:
        regular = {}
        for count, member in enumerate(tar):
            if count >= MAX_MEMBERS:
                raise tarfile.TarError(f"more than {MAX_MEMBERS} members")
            if member.isreg() and not member.issparse():
                regular[member.name] = member
        with _open_member(regular, tar.extractfile, name) as opened:
            yield opened


@contextmanager
def _open_zip(archive: BinaryIO, name: str) -> Iterator[_Member]:
    with zipfile.ZipFile(archive) as zipped:
        if len(zipped.infolist()) > MAX_MEMBERS:
            raise zipfile.BadZipFile(f"more than {MAX_MEMBERS} members")
        regular = {
            member.filename: member
            for member in zipped.infolist()
            if not member.is_dir()
            and stat.S_IFMT(member.external_attr >> 16) in (0, stat.S_IFREG)
            # The others take as much memory as the archive says that they need.
            and member.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
        }
        with _open_member(regular, zipped.open, name) as opened:
            yield opened


@contextmanager
def _open_member(members: Mapping[str, T], opened: Callable[[T], BinaryIO], container: str) -> Iterator[_Member]:
    chosen, config = choose(members, container), b""
    beside = str(PurePosixPath(chosen).with_name("config.yaml"))
    if beside in members:
        with opened(members[beside]) as file:
            config = file.read(MAX_CONFIG_BYTES)
    with opened(members[chosen]) as content:
        yield _Member(chosen, content, config)


def _trigger_words(config: bytes) -> tuple[str, ...]:
    """What ai-toolkit, which Replicate trains with, was told to teach."""
    found = re.search(rb"""^[\s-]*["']?trigger_word["']?\s*:\s*["']?([^"'#\r\n]+)""", config, re.MULTILINE)
    word = printable(found[1].decode(errors="replace")).strip() if found else ""
    return (word,) if word and word != "null" else ()


def choose(names: Iterable[str], container: str) -> str:
    """The LoRA among the files of an archive or a folder: the one called lora.safetensors, else the only one.

    Raises:
        ValueError: there is none, or several.
    """
    found = [
        name
        for name in names
        if name.endswith(".safetensors")
        and not {"..", "", "__MACOSX"} & set(name.split("/"))
        and "/._" not in f"/{name}"
    ]
    named = [name for name in found if PurePosixPath(name).name == "lora.safetensors"]
    if len(named or found) == 1:
        return (named or found)[0]
    if not found:
        raise UnfitError(f"{container} has no regular .safetensors file in it.")
    raise UnfitError(
        f"{container} has {len(found)} .safetensors files in it, {printable(', '.join(sorted(found)[:8]))}; "
        "it must have one, or one called lora.safetensors."
    )
