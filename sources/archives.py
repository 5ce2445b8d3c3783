"""Archives with a LoRA in them: tar, zip and gzip, whose own statements of sizes and names are not trusted.

One member is written, into a file that the caller has opened; no member's name becomes a path. Tars are parsed here
because tarfile keeps every header, copies each into the next, and searches them with patterns of quadratic time.
"""

import contextlib
import gzip
import io
import os
import re
import stat
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import PurePosixPath
from typing import BinaryIO, TypeVar

from settings import MIB
from sources import configs
from sources.connections import StoppedError
from sources.contents import Check, Contents, Reserve, UnfitError, copy_checked
from sources.shown import brief, noted

T = TypeVar("T")
# Weights hardly shrink when packed. Small files may: an untrained half of a LoRA is all zeros.
MAX_RATIO, ALWAYS_ALLOWED = 100, 64 * MIB
MAX_MEMBERS = 10_000
# In a tar, a member may have a header for a long name and extended ones before its own.
MAX_HEADERS = 4 * MAX_MEMBERS
MAX_TRAINING_BYTES = 65_536
# zipfile reads the whole list of members at once, in the length that the zip states: allow 300 bytes for each.
MAX_READ = 3 * MIB
# Linux has no longer paths. A tar's extended header has one, and other metadata of the file.
MAX_NAME = 4096
MAX_EXTENDED_BYTES = 64 * 1024


class _Cautious(io.BufferedReader):
    """A file that refuses reads of more than MAX_READ bytes, and raises once the caller has given up."""

    def __init__(self, raw: io.RawIOBase, check: Check) -> None:
        super().__init__(raw)
        self._check = check

    def read(self, size: int | None = -1, /) -> bytes:
        self._check()
        whole = size is None or size < 0
        data = super().read(MAX_READ + 1 if whole else min(size, MAX_READ + 1))
        if len(data) > MAX_READ:
            raise RuntimeError("an entry of it is too long")
        return data


def unpack(file: BinaryIO, packed: Contents, target: BinaryIO, reserve: Reserve, check: Check) -> Contents:
    """The contents of an archive's LoRA, or of the file in a gzip, which is written into `target`.

    Raises:
        UnfitError: the archive is damaged, unpacks to too much, or has no LoRA or several.
    """
    limit = max(MAX_RATIO * packed.size, ALWAYS_ALLOWED)

    def bounded(size: int) -> None:
        if size > limit:
            raise UnfitError(f"{contents.name} unpacks to more than {MAX_RATIO} times its size, which no LoRA does.")
        reserve(size)

    file.seek(0)
    with _Cautious(io.FileIO(file.fileno(), closefd=False), check) as archive:
        try:
            if packed.kind == "gzip":
                contents = Contents(packed.name, kinds=("safetensors", "tar"))
                with gzip.GzipFile(fileobj=archive) as content:
                    copy_checked(content, target, contents, bounded, check)
                return contents
            members, opened = _read_tar(archive) if packed.kind == "tar" else _read_zip(archive)
            chosen = choose(members, packed.name)
            training, config = _beside(chosen, members, opened, packed.name)
            with opened(members[chosen]) as content:
                print(f"{packed.name}: {brief(chosen)} of the archive.")
                contents = Contents(f"{packed.name} ({brief(chosen)})", kinds=("safetensors",))
                copy_checked(content, target, contents, bounded, check)
            contents.trigger_words = contents.trigger_words or _trigger_words(training)
            contents.config = config
            return contents
        except (UnfitError, StoppedError):
            raise
        except Exception as error:  # tarfile, zipfile and zlib raise a dozen types each
            told = isinstance(error, tarfile.TarError | zipfile.BadZipFile | RuntimeError)
            reason = f" ({brief(str(error))})" if told and str(error) else ""
            raise UnfitError(f"{packed.name} is a damaged {packed.kind} archive{reason}.") from None


class _Part:
    """The bytes of an archive from a position on."""

    def __init__(self, archive: BinaryIO, position: int, size: int) -> None:
        self._archive, self._position, self._end = archive, position, position + size

    def read(self, size: int) -> bytes:
        self._archive.seek(self._position)
        data = self._archive.read(min(size, self._end - self._position))
        self._position += len(data)
        return data


def _read_tar(archive: BinaryIO) -> tuple[dict[str, _Part], Callable[[_Part], AbstractContextManager[_Part]]]:
    """The regular files in a tar by their names, and a function that opens one."""
    end = archive.seek(0, os.SEEK_END)
    position, extended, headers, members, regular = archive.seek(0), {}, 0, 0, {}
    while (block := archive.read(tarfile.BLOCKSIZE)).strip(b"\0"):
        try:
            header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.HeaderError:
            if position == 0:
                raise
            break  # some writers leave other bytes behind the last member
        if (headers := headers + 1) > MAX_HEADERS:
            raise tarfile.TarError(f"more than {MAX_HEADERS} headers")
        position += tarfile.BLOCKSIZE
        size = header.size
        if header.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME):
            if not 0 <= size <= MAX_EXTENDED_BYTES:
                raise tarfile.TarError("an entry of it is too long")
            text = archive.read(size)
            if header.type == tarfile.GNUTYPE_LONGNAME:
                extended["path"] = _text(text.partition(b"\0")[0])
            else:
                extended = _records(text)
        elif header.type not in (tarfile.XGLTYPE, tarfile.GNUTYPE_LONGLINK):
            path, size = extended.get("path", header.name), int(extended.get("size", size))
            if len(path) > MAX_NAME:
                raise tarfile.TarError(f"a name of more than {MAX_NAME} characters")
            if (members := members + 1) > MAX_MEMBERS:
                raise tarfile.TarError(f"more than {MAX_MEMBERS} members")
            sparse = header.type == tarfile.GNUTYPE_SPARSE or any(key.startswith("GNU.sparse.") for key in extended)
            if header.isreg() and not sparse:
                regular[path] = _Part(archive, position, size)
            if not header.isreg() and header.type in tarfile.SUPPORTED_TYPES:
                size = 0  # links and folders have no bytes, whatever they state
            extended = {}
        position += -(-max(size, 0) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
        if position > end:
            raise tarfile.TarError("unexpected end of data")
        archive.seek(position)
    return regular, contextlib.nullcontext  # nothing is to be closed


def _records(text: bytes) -> dict[str, str]:
    """The records of an extended header, each its own length in digits, a space, key=value and a line end."""
    records, position = {}, 0
    while position < len(text):
        digits = text[position : position + 20].partition(b" ")[0]
        if not digits.isdigit() or int(digits) <= len(digits):
            raise tarfile.TarError("an extended header that makes no sense")
        key, _, value = text[position + len(digits) + 1 : position + int(digits) - 1].partition(b"=")
        records[_text(key)] = _text(value)
        position += int(digits)
    return records


def _text(name: bytes) -> str:
    return name.decode(errors="surrogateescape")


def _read_zip(archive: BinaryIO) -> tuple[dict[str, zipfile.ZipInfo], Callable[[zipfile.ZipInfo], BinaryIO]]:
    """The regular files in a zip by their names, and a function that opens one."""
    zipped = zipfile.ZipFile(archive)
    if len(zipped.infolist()) > MAX_MEMBERS:
        raise zipfile.BadZipFile(f"more than {MAX_MEMBERS} members")
    regular = {
        member.filename: member
        for member in zipped.infolist()
        if not member.is_dir()
        and stat.S_IFMT(member.external_attr >> 16) in (0, stat.S_IFREG)
        # Other compressions take as much memory as the archive states.
        and member.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
    }
    return regular, zipped.open


def _beside(
    chosen: str, members: Mapping[str, T], opened: Callable[[T], AbstractContextManager[BinaryIO]], container: str
) -> tuple[bytes, str]:
    """The trainer's config.yaml beside the LoRA of an archive, and PEFT's config; empty where they are missing."""

    def read(path: str | None, size: int) -> bytes:
        if path not in members:
            return b""
        with opened(members[path]) as file:
            return file.read(size)

    training = read(chosen[: chosen.rfind("/") + 1] + "config.yaml", MAX_TRAINING_BYTES)
    found = configs.beside(chosen, members)
    return training, configs.text(read(found, configs.MAX_BYTES + 1), f"{container} ({brief(found or '')})")


def _trigger_words(training: bytes) -> tuple[str, ...]:
    """The trigger word in the config of ai-toolkit, which Replicate trains with."""
    found = re.search(rb"""^[ \t-]*["']?trigger_word["']?[ \t]*:[ \t]*["']?([^"'#\r\n]+)""", training, re.MULTILINE)
    word = noted(found[1].decode(errors="replace").strip()) if found else ""
    return (word,) if word and word != "null" else ()


def choose(names: Iterable[str], container: str) -> str:
    """The LoRA among the files of an archive or a folder: the one called lora.safetensors, else the only one.

    Raises:
        UnfitError: there is none, or several.
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
        f"{container} has {len(found)} .safetensors files in it, {', '.join(map(brief, sorted(found)[:8]))}; "
        "it must have one, or one called lora.safetensors."
    )
