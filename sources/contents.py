"""A file's kind, told by its bytes as they arrive: safetensors, whose header is checked, or an archive.

Names, suffixes and the statements of hosts are not trusted. Archives are opened elsewhere.
"""

import hashlib
import json
import math
import re
from collections.abc import Callable, Collection
from typing import Any, BinaryIO

from service import strict_json
from settings import MIB
from sources.client import CHUNK
from sources.shown import gigabytes, noted

# Called with a size before a file grows to it; raises if there is no room.
Reserve = Callable[[int], None]
# Called before each piece of work; raises once the caller has given up.
Check = Callable[[], None]
# The format allows 100 MB; a LoRA's header has some hundred kilobytes, and parsing takes ten times its size.
MAX_HEADER_BYTES = 25 * MIB
# A tensor has eight: enough for 50,000 tensors and as many tags of a trainer.
MAX_HEADER_VALUES = 1_000_000
MAX_DIMENSIONS = 8  # weights of convolutions have five at most
BITS = {
    "F4": 4,
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}
# ai-toolkit notes its one trigger word as other trainers note their counts of tags.
TAUGHT = re.compile(r'\{"1_((?:[^"\\]|\\u[0-9a-f]{4}|\\["\\]){1,500})": \{"\1": 1\}\}')
KINDS = ("safetensors", "tar", "gzip", "zip")
HEAD_BYTES = 512  # a tar's first block, with the letters that mark a tar
WEB_PAGE = "it needs a login, the link has expired, or it leads to a page about the file instead of to the file"


class UnfitError(ValueError):
    """A sentence about a file that cannot be used, or for which there is no room."""


class Contents:
    """A file's kind, hash and trigger words, from its bytes as they arrive; faults are raised as soon as they show.

    Args:
        name: of the file, as it may be shown.
        size: in bytes, where the host states it.
        web_page: the reason why a host may send a web page instead; `WEB_PAGE` if not given.
        kinds: the kinds that are accepted.
        shown: whether a sentence may quote its first bytes.
    """

    def __init__(
        self,
        name: str,
        size: int | None = None,
        web_page: str | None = None,
        kinds: Collection[str] = KINDS,
        shown: bool = True,
    ) -> None:
        self.name, self.size = name, 0
        self.kind: str | None = None
        self.trigger_words: tuple[str, ...] = ()
        self.config: str | None = None  # the config beside it in its archive; None if it came from none
        self._stated_size, self._web_page, self._kinds, self._shown = size, web_page or WEB_PAGE, kinds, shown
        self._head: bytearray | None = bytearray()  # until the header is complete
        self._hash = hashlib.sha256()
        self._end: int | None = None  # where a safetensors file ends, by its header

    @property
    def sha256(self) -> str:
        """The hash of the bytes so far, in hex."""
        return self._hash.hexdigest()

    def feed(self, data: bytes) -> None:
        """Take the next bytes; `UnfitError` if the file cannot be used."""
        self._hash.update(data)
        self.size += len(data)
        if self._head is not None:
            self._head += data
            if self.kind is None and len(self._head) >= HEAD_BYTES:
                self.kind = self._tell()
            if self.kind is not None:
                self._check_header()

    def finish(self) -> None:
        """Take the end of the file; `UnfitError` if there should be more bytes, or fewer."""
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
            f"{self.name} {f'begins with {head[:16]!r}' if self._shown else 'holds something else'}; "
            "it must be a .safetensors file"
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
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            reason = str(error).rstrip(".") or type(error).__name__
            raise self._damaged(f"its header is wrong ({reason})") from None
        self._end, self._head = 8 + length + body, None
        if self._stated_size not in (None, self._end):
            raise self._damaged(f"it has {self._stated_size} bytes and its header describes {self._end}")
        self.trigger_words = _trigger_words(metadata)

    def _damaged(self, reason: str) -> ValueError:
        return UnfitError(f"{self.name} is a damaged .safetensors file: {reason}.")


def trigger_words_in(file: BinaryIO) -> tuple[str, ...]:
    """The trigger words in the header of a file that was checked when it came."""
    file.seek(0)
    return _trigger_words(_read_header(file.read(int.from_bytes(file.read(8), "little")))[1])


def _sniff(head: bytes) -> str | None:
    if head[8:9] == b"{" and head[5:8] == bytes(3):
        return "safetensors"
    if head[257:262] == b"ustar":
        return "tar"
    if head[:2] == b"\x1f\x8b":
        return "gzip"
    return "zip" if head[:4] == b"PK\x03\x04" else None


def _read_header(header: bytes) -> tuple[int, dict[str, str]]:
    """The bytes of all tensors together, which must be adjacent and fit their shapes and dtypes; and the metadata."""
    tensors = strict_json.read(header, MAX_HEADER_VALUES, zeros=True)
    metadata = tensors.pop("__metadata__", {})
    if not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("metadata that is not text")
    position = 0
    for start, end, bits, name in sorted(_extent(name, tensor) for name, tensor in tensors.items()):
        if start != position or (end - start) * 8 != bits:
            raise ValueError(f"{name[:80]!r} does not fit where it should lie")
        position = end
    return position, metadata


def _trigger_words(metadata: dict[str, str]) -> tuple[str, ...]:
    """The trigger words, where the trainer has noted them; the counts of words in captions do not tell."""
    phrase = metadata.get("modelspec.trigger_phrase", "")
    if not phrase and "ai-toolkit" in metadata.get("software", ""):
        found = TAUGHT.fullmatch(metadata.get("ss_tag_frequency", ""))
        phrase = json.loads(f'"{found[1]}"') if found else ""
    return (noted(phrase.strip()),) if phrase.strip() else ()


def _extent(name: str, tensor: dict[str, Any]) -> tuple[int, int, int, str]:
    """A tensor's first byte, its end, its bits by shape and dtype, and its name."""
    start, end = tensor["data_offsets"]
    shape, dtype = tensor["shape"], tensor["dtype"]
    if dtype not in BITS:
        raise ValueError(f"unknown type {str(dtype)[:20]!r}")
    if len(shape) > MAX_DIMENSIONS:
        raise ValueError(f"{name[:80]!r} has {len(shape)} dimensions; a tensor of a LoRA has at most {MAX_DIMENSIONS}")
    if not all(type(number) is int and number >= 0 for number in (*shape, start, end)):
        raise ValueError(f"a size of {name[:80]!r} is no whole number")
    return start, end, math.prod(shape) * BITS[dtype], name


def copy_checked(source: BinaryIO, target: BinaryIO | None, contents: Contents, reserve: Reserve, check: Check) -> None:
    """Feed a file to `contents` and write it to the target, if there is one; its stated size is not trusted."""
    while data := source.read(CHUNK):
        check()
        reserve(contents.size + len(data))
        contents.feed(data)
        if target is not None:
            target.write(data)
    contents.finish()
