"""What a file is, told by its bytes: safetensors, checked as they arrive, or an archive with one in it.

Names, suffixes and what hosts say are not believed. This module knows formats; it knows neither where files come from
nor where they are kept.
"""

import gzip
import hashlib
import io
import json
import math
import os
import re
import stat
import tarfile
import zipfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import PurePosixPath
from typing import BinaryIO, NamedTuple, TypeVar

from settings import GIB
from sources.client import CHUNK, MIB, Client, StoppedError, printable

T = TypeVar("T")
# The format allows 100 MB; a LoRA's header has some hundred kilobytes, and a parsed one takes ten times its size.
MAX_HEADER_BYTES = 25 * MIB
BITS = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}
KINDS = ("safetensors", "tar", "gzip", "zip")
# A tar's first block, which holds its mark.
HEAD_BYTES = 512
# Weights hardly shrink when packed. Small files may: an untrained half of a LoRA is all zeros.
MAX_RATIO, ALWAYS_ALLOWED = 100, 64 * MIB
MAX_MEMBERS = 10_000
MAX_CONFIG_BYTES = 65_536
# tarfile and zipfile read what they take for a header at once, however long it says that it is.
MAX_READ = 16 * MIB
WEB_PAGE = "it needs a login, the link has expired, or it leads to a page about the file instead of to the file"


class UnfitError(ValueError):
    """A sentence about a file that cannot be used, or for which there is no room."""


class Contents:
    """What a file is, told by its bytes as they arrive; what is wrong is said as soon as it shows.

    Args:
        name: of the file, as it may be shown.
        size: in bytes, where it is known beforehand.
        web_page: why there may be a web page instead.
        kinds: what it may be.
    """

    def __init__(
        self, name: str, size: int | None = None, web_page: str = WEB_PAGE, kinds: Collection[str] = KINDS
    ) -> None:
        self.name, self.size = name, 0
        self.kind: str | None = None
        self.trigger_words: tuple[str, ...] = ()
        self._stated_size, self._web_page, self._kinds = size, web_page, kinds
        self._head: bytearray | None = bytearray()  # until the header is complete
        self._hash = hashlib.sha256()
        self._end: int | None = None  # where a safetensors file ends, by its header

    @property
    def sha256(self) -> str:
        """Of what came so far, in hex."""
        return self._hash.hexdigest()

    def feed(self, data: bytes) -> None:
        """Take the next bytes.

        Raises:
            ValueError: they are not what can be used.
        """
        self._hash.update(data)
        self.size += len(data)
        if self._head is not None:
            self._head += data
            if self.kind is None and len(self._head) >= HEAD_BYTES:
                self.kind = self._tell()
            if self.kind is not None:
                self._check_header()

    def finish(self) -> None:
        """There are no more bytes.

        Raises:
            ValueError: there should be more, or fewer.
        """
        if self.kind is None:
            self.kind = self._tell()
            self._check_header()
        if self.kind == "safetensors" and self.size != self._end:
            raise self._damaged(f"it has {self.size} bytes and its header describes {self._end or 'more'}")

    def _tell(self) -> str:
        head = bytes(self._head[:HEAD_BYTES])
        kind = _sniff(head)
        if kind in self._kinds:
            return kind
        if not head:
            raise UnfitError(f"{self.name} is empty.")
        if head.lstrip(b"\xef\xbb\xbf \r\n\t").startswith(b"<"):
            raise UnfitError(f"{self.name} gave a web page instead of a file: {self._web_page}.")
        raise UnfitError(
            f"{self.name} begins with {head[:16]!r}; it must be a .safetensors file"
            + (", or a tar, tar.gz or zip archive of one." if "tar" in self._kinds else ".")
        )

    def _check_header(self) -> None:
        if self.kind != "safetensors":
            self._head = None
            return
        length = int.from_bytes(self._head[:8], "little")
        if length > MAX_HEADER_BYTES:
            raise self._damaged(f"its header claims {gigabytes(length)}")
        if self._stated_size is not None and 8 + length > self._stated_size:
            raise self._damaged("its header is longer than the file")
        if len(self._head) < 8 + length:
            return
        try:
            body, metadata = _read_header(bytes(self._head[8 : 8 + length]))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise self._damaged(f"its header is wrong ({error or type(error).__name__})") from None
        self._end, self._head = 8 + length + body, None
        if self._stated_size not in (None, self._end):
            raise self._damaged(f"it has {self._stated_size} bytes and its header describes {self._end}")
        phrase = metadata.get("modelspec.trigger_phrase")
        self.trigger_words = (printable(phrase),) if phrase else ()

    def _damaged(self, reason: str) -> ValueError:
        return UnfitError(f"{self.name} is a damaged .safetensors file: {reason}.")


def _sniff(head: bytes) -> str | None:
    """What a file is by its first bytes, whatever it is called."""
    if head[8:9] == b"{" and head[5:8] == bytes(3):
        return "safetensors"
    if head[257:262] == b"ustar":
        return "tar"
    if head[:2] == b"\x1f\x8b":
        return "gzip"
    return "zip" if head[:4] == b"PK\x03\x04" else None


def _read_header(header: bytes) -> tuple[int, dict[str, str]]:
    """Check that tensors lie side by side, each as long as its shape and dtype say.

    Returns:
        The bytes that they take together, and the metadata.
    """
    tensors = json.loads(header, object_pairs_hook=_unique)
    metadata = tensors.pop("__metadata__", {})
    if not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("metadata that is not text")
    position = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1]["data_offsets"]):
        start, end = tensor["data_offsets"]
        shape, dtype = tensor["shape"], tensor["dtype"]
        if dtype not in BITS:
            raise ValueError(f"unknown type {str(dtype)[:20]!r}")
        if not all(type(number) is int and number >= 0 for number in (*shape, start, end)):
            raise ValueError(f"a size of {name[:80]!r} is no whole number")
        if start != position or (end - start) * 8 != math.prod(shape) * BITS[dtype]:
            raise ValueError(f"{name[:80]!r} does not fit where it should lie")
        position = end
    return position, metadata


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("a name stands in it twice")
    return members


def copy(
    source: BinaryIO,
    target: BinaryIO | None,
    contents: Contents,
    reserve: Callable[[int], None],
    client: Client,
    limit: float = math.inf,
) -> None:
    """Move bytes on, looking at them; nobody's word is taken for how many there are."""
    while data := source.read(CHUNK):
        client.check()
        if contents.size + len(data) > limit:
            raise UnfitError(f"{contents.name} unpacks to more than {MAX_RATIO} times its size, which no LoRA does.")
        reserve(contents.size + len(data))
        contents.feed(data)
        if target is not None:
            target.write(data)
    contents.finish()


class _Cautious(io.BufferedReader):
    """A file that is not read all at once, whatever it says of itself."""

    def read(self, size: int | None = -1, /) -> bytes:
        whole = size is None or size < 0
        data = super().read(MAX_READ + 1 if whole else min(size, MAX_READ + 1))
        if len(data) > MAX_READ:
            raise RuntimeError("an entry of it is too long")
        return data


def unpack(
    file: BinaryIO, packed: Contents, target: BinaryIO, reserve: Callable[[int], None], client: Client
) -> Contents:
    """Write the one file of an archive that matters; of an archive's other members nothing is ever written.

    Raises:
        ValueError: the archive is damaged, a bomb, or has no such file or several.
    """
    limit = max(MAX_RATIO * packed.size, ALWAYS_ALLOWED)
    file.seek(0)
    # A descriptor of its own: the reader closes it.
    with _Cautious(io.FileIO(os.dup(file.fileno()))) as archive:
        try:
            if packed.kind == "gzip":
                contents = Contents(packed.name, kinds=("safetensors", "tar"))
                with gzip.GzipFile(fileobj=archive) as content:
                    copy(content, target, contents, reserve, client, limit)
                return contents
            with (_open_tar if packed.kind == "tar" else _open_zip)(archive, packed.name) as member:
                print(f"{packed.name}: {printable(member.name)} of the archive.")
                contents = Contents(f"{packed.name} ({printable(member.name)})", kinds=("safetensors",))
                copy(member.content, target, contents, reserve, client, limit)
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


def gigabytes(size: int) -> str:
    """A number of bytes as people read it."""
    return f"{size / GIB:.2f} GB" if size >= GIB / 100 else f"{size / MIB:.2f} MB"
