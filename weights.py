"""What a stranger typed → a checked local file. The cache of LoRAs, what their files contain, and base models.

References say what is meant and downloads fetches it; this module decides what is trusted and what is kept. A file in
the cache is named by the SHA-256 of its content, and was complete, checked and on the disk before it got that name: it
needs no other proof. What a reference means is looked up anew at each request.
"""

import contextlib
import contextvars
import fcntl
import gzip
import hashlib
import io
import json
import math
import os
import re
import shutil
import stat
import tarfile
import threading
import time
import zipfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from http import HTTPStatus
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import BinaryIO, NamedTuple, TextIO, TypeVar
from uuid import uuid4

from downloads import CHUNK, MIB, Client, Download, Patience, Source, StoppedError, Stream, UnavailableError, printable
from references import (
    COMMIT,
    Civitai,
    Data,
    HuggingFace,
    Reference,
    Replicate,
    Repo,
    Url,
    list_repo,
    parse,
    redact,
    resolve,
    validate_reference,
)
from settings import GIB, Settings

__all__ = ["Weights", "WeightsCache", "snapshot", "validate_reference"]

T = TypeVar("T")
# Seconds that the record of a reference is kept after its last use; signed URLs leave one each.
RECORDS_KEPT = 30 * 24 * 3600


@dataclass(frozen=True)
class Weights:
    """A LoRA's file.

    Attributes:
        path: a complete .safetensors file whose header was checked.
        sha256: of its content, in hex.
        name: what it was called, as it may be shown.
        trigger_words: what wakes it in a prompt, where the source says so.
    """

    path: Path
    sha256: str
    name: str
    trigger_words: tuple[str, ...] = ()


class UnfitError(ValueError):
    """A sentence about a file that cannot be used, or for which there is no room."""


# ---------------------------------------------------------------------------------------------------------------------
# The cache


class _Held(NamedTuple):
    """A file that is not evicted as long as it is open."""

    file: BinaryIO
    weights: Weights


@dataclass
class _Record:
    """What a reference was when it was last looked up."""

    sha256: str | None = None
    trigger_words: list[str] = field(default_factory=list)
    key: str | None = None  # what its source stated: a version, a commit, a hash
    validators: dict[str, str] = field(default_factory=dict)  # else ETag, Last-Modified
    place: str | None = None  # and where they were found
    checked: float = 0.0  # when: seconds since the epoch

    def note(
        self,
        sha256: str,
        trigger_words: Iterable[str],
        key: str | None = None,
        validators: Mapping[str, str] = MappingProxyType({}),
        place: str | None = None,
    ) -> None:
        """Forget what was, and remember this."""
        self.sha256, self.trigger_words, self.key = sha256, list(trigger_words), key
        self.validators, self.place = dict(validators), place

    def conditions(self) -> dict[str, str]:
        """The headers that ask for the file only if it has changed."""
        names = {"ETag": "If-None-Match", "Last-Modified": "If-Modified-Since"}
        return {names[name]: value for name, value in self.validators.items()}

    def describes(self, stream: Stream) -> bool:
        """Whether an answer says that nothing has changed; some hosts send the file, with the same ETag."""
        if stream.status == HTTPStatus.NOT_MODIFIED:
            return True
        etag = stream.headers.get("ETag")
        return etag is not None and etag == self.validators.get("ETag") and self.place == _place(stream)


class WeightsCache:
    """LoRA files on the disk, shared by any number of processes.

    `loras` has the files, by their SHA-256; `incoming` what is being written; `references` a record for each reference.
    Locks are the kernel's (flock), so that a killed process leaves none behind: whoever writes or uses a file holds a
    shared one, whoever looks a reference up an exclusive one on its record, and only what nobody holds is deleted.

    Args:
        settings: the directory and its budget, tokens, mirrors.
        patience: how long a host may keep a request waiting.
    """

    def __init__(self, settings: Settings, patience: Patience = Patience()) -> None:  # noqa: B008 (frozen)
        self._settings, self._patience = settings, patience
        self._loras = settings.cache_dir / "loras"
        self._incoming = settings.cache_dir / "incoming"
        self._references = settings.cache_dir / "references"

    @contextmanager
    def open(self, reference: str) -> Iterator[Weights]:
        """The file that a reference means now; it is not evicted inside.

        Raises:
            ValueError: a sentence that names the source, what it answered and what to do.
        """
        wanted = parse(reference, self._settings)
        held = self._in_thread(lambda client: self._fetch(wanted, client))
        with held.file:
            yield held.weights

    @contextmanager
    def open_local(self, reference: str) -> Iterator[Weights]:
        """The same for the operator's own reference, which may be a path: a file, an archive, or a folder with one.

        Raises:
            ValueError: likewise.
        """
        path = Path(reference.removeprefix("file://")).expanduser()
        if not path.exists():
            try:
                parse(reference, self._settings)
            except ValueError as error:
                raise ValueError(f"There is no file or folder {reference!r}; as a reference, {error}") from None
            with self.open(reference) as weights:
                yield weights
            return
        held = self._in_thread(lambda client: self._read(path, client))
        with held.file:
            yield held.weights

    def _in_thread(self, work: Callable[[Client], T]) -> T:
        def prepared(client: Client) -> T:
            for folder in (self._loras, self._incoming, self._references):
                folder.mkdir(parents=True, exist_ok=True)
            return work(client)

        return _in_thread(self._settings, self._patience, prepared)

    def _fetch(self, wanted: Reference, client: Client) -> _Held:
        """Look the reference up, download what is new, else take what is there."""
        asked = time.time()
        with self._record(_identity(wanted), client) as record, contextlib.ExitStack() as stack:
            file = held = self._use(record.sha256)
            stack.enter_context(held or contextlib.nullcontext())
            # Others may have looked it up while we waited for the record.
            if held is None or not (_is_pinned(wanted) or record.checked >= asked):
                try:
                    file = self._look_up(wanted, record, held, client)
                    record.checked = time.time()
                except UnavailableError as error:
                    if held is None:
                        raise
                    print(f"{error} The cached file is used.")
            if file is held:
                stack.pop_all()
            return self._held(file, record, wanted.name)

    def _look_up(self, wanted: Reference, record: _Record, held: BinaryIO | None, client: Client) -> BinaryIO:
        """Make the record say what the reference means now, and give the file: the one held, where it is the same."""
        if isinstance(wanted, Data):
            return self._take(io.BytesIO(wanted.content), "The data: URI", record, client)
        hasty = held is not None
        source = resolve(wanted, self._settings, client, hasty)
        if held is not None and source.key is not None and source.key == record.key:
            return held
        file = self._use(source.sha256)
        if file is not None:
            record.note(source.sha256, source.trigger_words, source.key)
            return file
        conditions = record.conditions() if held is not None else {}
        stream = client.persist(lambda: client.open(source, conditions), hasty)
        if stream.status == HTTPStatus.NOT_MODIFIED and record.place != _place(stream):
            stream = client.persist(lambda: client.open(source))
        with stream:
            if held is not None and record.describes(stream):
                return held
            file, contents = self._download(source, stream, client)
        words = source.trigger_words or contents.trigger_words
        record.note(contents.sha256, words, source.key, stream.validators, _place(stream))
        return file

    def _download(self, source: Source, stream: Stream, client: Client) -> "tuple[BinaryIO, _Contents]":
        contents = _Contents(source.name, stream.size, source.advice.get(0, WEB_PAGE))
        with self._incoming_file() as file:
            reserve = self._reserve(file, source.name)
            Download(client, source, stream, file.fileno(), reserve).run(contents.feed)
            contents.finish()
            if source.sha256 not in (None, contents.sha256):
                raise ValueError(
                    f"{source.name} arrived damaged: its SHA-256 is {contents.sha256}, but its host states "
                    f"{source.sha256}; try again."
                )
            return self._store(file, contents, client)

    def _take(self, content: BinaryIO, name: str, record: _Record, client: Client) -> BinaryIO:
        """A file that is here already, but not in the cache."""
        contents = _Contents(name)
        with self._incoming_file() as file:
            reserve = self._reserve(file, name)
            _copy(content, file, contents, reserve, client)
            file, contents = self._store(file, contents, client)
        record.note(contents.sha256, contents.trigger_words)
        return file

    def _read(self, path: Path, client: Client) -> _Held:
        """The operator's file: used where it lies, unpacked into the cache where it is an archive."""
        if path.is_dir():
            path = path / _choose((str(file.relative_to(path)) for file in path.rglob("*")), "The folder")
        state = path.stat()
        identity = f"path {path.resolve()} {state.st_ino} {state.st_size} {state.st_mtime_ns}"
        with self._record(identity, client) as record, contextlib.ExitStack() as stack:
            content = stack.enter_context(path.open("rb"))
            if record.key is None:
                contents = _Contents(path.name, state.st_size)
                _copy(content, None, contents, lambda size: self._admit(size, path.name), client)
                record.note(contents.sha256, contents.trigger_words, contents.kind)
            if record.key == "safetensors":
                stack.pop_all()
                words = tuple(record.trigger_words)
                return _Held(content, Weights(path.absolute(), record.sha256, path.name, words))
            content.seek(0)
            file = self._use(record.sha256) or self._take(content, path.name, record, client)
            return self._held(file, record, path.name)

    # -- Files

    def _held(self, file: BinaryIO, record: _Record, name: str) -> _Held:
        return _Held(
            file, Weights(self._path(record.sha256).absolute(), record.sha256, name, tuple(record.trigger_words))
        )

    def _path(self, sha256: str) -> Path:
        return self._loras / f"{sha256}.safetensors"

    def _use(self, sha256: str | None) -> BinaryIO | None:
        """A file of the cache, held against eviction; None where it is not there."""
        if sha256 is None:
            return None
        try:
            file = self._path(sha256).open("rb")
        except FileNotFoundError:
            return None
        fcntl.flock(file, fcntl.LOCK_SH)
        if not os.fstat(file.fileno()).st_nlink:  # evicted meanwhile
            file.close()
            return None
        os.utime(file.fileno())
        return file

    @contextmanager
    def _incoming_file(self) -> Iterator[BinaryIO]:
        """A new file, held, that is gone afterwards unless it was given a name in the cache."""
        with self._alone():
            self._sweep()
            file = (self._incoming / uuid4().hex).open("xb+", buffering=0)
            fcntl.flock(file, fcntl.LOCK_SH)
        try:
            with file:
                yield file
        finally:
            Path(file.name).unlink(missing_ok=True)

    def _store(self, file: BinaryIO, contents: "_Contents", client: Client) -> "tuple[BinaryIO, _Contents]":
        """Unpack an archive; give a checked file its name in the cache."""
        file.truncate(contents.size)  # more may have been reserved
        if contents.kind != "safetensors":
            with self._incoming_file() as unpacked:
                inner = _unpack(file, contents, unpacked, self._reserve(unpacked, contents.name), client)
                return self._store(unpacked, inner, client)
        held = self._use(contents.sha256)
        if held is None:
            os.fsync(file.fileno())
            Path(file.name).rename(self._path(contents.sha256))
            _sync_folder(self._loras)
            # Cannot have been evicted: `file` holds it.
            held = self._use(contents.sha256)
        return held, contents

    # -- Room

    def _admit(self, size: int, name: str) -> None:
        limit = self._settings.lora_max_bytes
        if size > limit:
            raise UnfitError(f"{name} has {_gb(size)} or more; a LoRA may have {_gb(limit)} (LORA_MAX_GB).")

    def _reserve(self, file: BinaryIO, name: str) -> Callable[[int], None]:
        """A function that takes disk space for a file before it grows to a size."""
        reserved = 0

        def reserve(size: int) -> None:
            nonlocal reserved
            self._admit(size, name)
            if size > reserved:
                with self._alone():
                    # Of a size that nobody states, a few megabytes at a time.
                    size = size if reserved == 0 else max(size, reserved + 4 * MIB)
                    self._make_room(size - reserved, name)
                    try:
                        os.posix_fallocate(file.fileno(), 0, size)
                    except OSError as error:
                        raise UnfitError(f"{name} finds no room in the cache: {error.strerror}.") from error
                    reserved = size

        return reserve

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """One process at a time creates and deletes files; only ever for a moment."""
        with (self._settings.cache_dir / "lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _sweep(self) -> None:
        """Delete what killed processes have left, and records that nobody has used for long."""
        for file in self._incoming.iterdir():
            _delete_unless_held(file)
        for record in self._references.iterdir():
            if _last_use(record) < time.time() - RECORDS_KEPT:
                _delete_unless_held(record)

    def _make_room(self, needed: int, name: str) -> None:
        """Delete the least recently used files until `needed` bytes fit."""
        budget, spare = self._settings.cache_bytes, min(GIB, shutil.disk_usage(self._loras).total // 20)
        files = sorted(self._loras.iterdir(), key=_last_use)
        used = sum(map(_size, (*files, *self._incoming.iterdir())))
        while used + needed > budget or shutil.disk_usage(self._loras).free - needed < spare:
            if not files:
                break
            size = _size(files[0])
            if _delete_unless_held(files.pop(0)):
                used -= size
        if used + needed > budget:
            raise UnfitError(
                f"{name} needs {_gb(needed)}, but the cache may have {_gb(budget)} (WEIGHTS_CACHE_GB), "
                f"of which {_gb(used)} are in use."
            )
        free = shutil.disk_usage(self._loras).free
        if free - needed < spare:
            raise UnfitError(
                f"{name} needs {_gb(needed)}, but the disk of the cache has {_gb(free)} left, "
                f"of which {_gb(spare)} stay free."
            )

    # -- Records

    @contextmanager
    def _record(self, identity: str, client: Client) -> Iterator[_Record]:
        """The record of a reference, locked; written back where it was changed without an error."""
        path = self._references / hashlib.sha256(identity.encode()).hexdigest()
        with _locked(path, client) as file:
            try:
                record = _Record(**json.loads(file.read()))
            except (ValueError, TypeError):  # new, or left half written
                record = _Record()
            before = asdict(record)
            yield record
            os.utime(path)
            if asdict(record) != before:
                file.seek(0)
                file.truncate()
                file.write(json.dumps(asdict(record)))


def _identity(wanted: Reference) -> str:
    """What has a record of its own: everything that chooses the file or says who may have it."""
    match wanted:
        case Url(url):
            return f"url {url}"
        case Data(content):
            return f"data {hashlib.sha256(content).hexdigest()}"
        case Civitai():
            return f"{wanted.name} {wanted.host} {wanted.query} {wanted.token}"
        case _:
            return wanted.name


def _is_pinned(wanted: Reference) -> bool:
    """Whether it can only ever mean the same file."""
    match wanted:
        case Replicate():
            return wanted.version is not None
        case HuggingFace():
            return COMMIT.fullmatch(wanted.revision) is not None
        case _:
            return isinstance(wanted, Data)


def _place(stream: Stream) -> str:
    """Where a file lies, without what changes from one signed address to the next, and is secret."""
    return redact(stream.url)


def _gb(size: int) -> str:
    return f"{size / GIB:.2f} GB" if size >= GIB / 100 else f"{size / MIB:.2f} MB"


def _in_thread(settings: Settings, patience: Patience, work: Callable[[Client], T]) -> T:
    """Run it in a thread of its own, where it may wait for hosts and disks.

    Cog cancels a prediction by an exception between two bytecodes of the main thread, which a blocked call would keep
    away for as long as it pleases the host; and the bookkeeping of the cache is never interrupted halfway.
    """
    client = Client(allow_private=settings.allow_private_hosts, patience=patience)
    # Cog tells whose log a line belongs to by a context variable.
    context, outcome = contextvars.copy_context(), Future()

    def run() -> None:
        try:
            outcome.set_result(context.run(work, client))
        except BaseException as error:  # it belongs to whoever waits
            outcome.set_exception(error)

    thread = threading.Thread(target=run, name="weights", daemon=True)
    try:
        with client:  # leaving it stops the thread, however it is left
            thread.start()
            while thread.is_alive():
                thread.join(0.05)
            return outcome.result()
    except OSError as error:  # of the disk: hosts' were told already
        raise ValueError(f"The cache of weights cannot be used: {error.strerror or 'its disk fails'}.") from error
    finally:
        if thread.is_alive():
            # It ends at once, unless it waits for a name server; then it ends later, having nothing to do any more.
            thread.join(0.5)


@contextmanager
def _locked(path: Path, client: Client) -> Iterator[TextIO]:
    """A file that one thread of one process has at a time, created where it is missing; others wait."""
    while True:
        with path.open("a+") as file:
            while not _lock(file):
                client.pause(0.02)
            if os.fstat(file.fileno()).st_nlink:  # else somebody deleted it while we waited
                file.seek(0)
                yield file
                return


def _lock(file: TextIO | BinaryIO) -> bool:
    """Take the exclusive lock on a file if nobody holds it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _delete_unless_held(path: Path) -> bool:
    with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
        if not _lock(file):
            return False
        path.unlink()
    return True


def _last_use(path: Path) -> float:
    """Seconds since the epoch."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:  # whoever wrote it was faster
        return math.inf


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _sync_folder(path: Path) -> None:
    """A new name is on the disk once its folder is."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


# ---------------------------------------------------------------------------------------------------------------------
# What files contain

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


class _Contents:
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
            raise self._damaged(f"its header claims {_gb(length)}")
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


def _copy(
    source: BinaryIO,
    target: BinaryIO | None,
    contents: _Contents,
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


def _unpack(
    file: BinaryIO, packed: _Contents, target: BinaryIO, reserve: Callable[[int], None], client: Client
) -> _Contents:
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
                contents = _Contents(packed.name, kinds=("safetensors", "tar"))
                with gzip.GzipFile(fileobj=archive) as content:
                    _copy(content, target, contents, reserve, client, limit)
                return contents
            with (_open_tar if packed.kind == "tar" else _open_zip)(archive, packed.name) as member:
                print(f"{packed.name}: {printable(member.name)} of the archive.")
                contents = _Contents(f"{packed.name} ({printable(member.name)})", kinds=("safetensors",))
                _copy(member.content, target, contents, reserve, client, limit)
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
    chosen, config = _choose(members, container), b""
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


def _choose(names: Iterable[str], container: str) -> str:
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


# ---------------------------------------------------------------------------------------------------------------------
# Base models


def snapshot(model: str, settings: Settings, patience: Patience = Patience()) -> Path:  # noqa: B008 (frozen)
    """A model in diffusers or transformers layout, as a folder.

    Args:
        model: a folder, or a Hugging Face repo `owner/repo[@revision]`, of which what is missing is downloaded.
        settings: where it is kept, token, mirror.
        patience: how long the host may keep us waiting.

    Raises:
        ValueError: a sentence about why it cannot be had, and what to accept and to set where it is gated.
    """
    if Path(model).expanduser().is_dir():
        return Path(model).expanduser()
    found = re.fullmatch(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", model)
    if found is None or model.startswith("."):
        raise ValueError(f"{model!r} is no folder; it must be one, or a Hugging Face repo as owner/repo.")
    reference = HuggingFace(found[1], found[2] or "main")
    return _in_thread(settings, patience, lambda client: _snapshot(reference, settings, client))


def _snapshot(reference: HuggingFace, settings: Settings, client: Client) -> Path:
    """Files by their content in `blobs`, and a folder of links to them for each commit, as in Hugging Face's cache."""
    home = settings.cache_dir / "models" / reference.repo.replace("/", "--")
    blobs = home / "blobs"
    blobs.mkdir(parents=True, exist_ok=True)
    with _locked(home / hashlib.sha256(reference.revision.encode()).hexdigest()[:16], client) as latest:
        folder = home / (latest.read() or "nothing")
        try:
            repo = list_repo(reference, settings, client, hasty=folder.is_dir())
            if not (home / repo.commit).is_dir():
                _download_repo(repo, blobs, home / repo.commit, client)
        except UnavailableError as error:
            if not folder.is_dir():
                raise
            print(f"{error} The files on the disk are used.")
            return folder
        latest.seek(0)
        latest.truncate()
        latest.write(repo.commit)
        return home / repo.commit


def _download_repo(repo: Repo, blobs: Path, folder: Path, client: Client) -> None:
    files = {path: (source, blobs / _blob_name(source)) for path, source in repo.files.items()}
    files = {path: files[path] for path in _needed(files)}
    if not files:
        raise ValueError(f"huggingface.co/{repo.id} has no model in diffusers layout.")
    missing = sum(source.size or 0 for source, blob in files.values() if not blob.exists())
    free = shutil.disk_usage(blobs).free
    if missing > free:
        raise ValueError(f"huggingface.co/{repo.id} needs {_gb(missing)}, but the disk has {_gb(free)} left.")
    growing = folder.with_name(f"{folder.name}.incomplete")
    shutil.rmtree(growing, ignore_errors=True)
    for path, (source, blob) in files.items():
        if not blob.exists():
            _download_blob(source, blob, client)
        link = growing / path
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    growing.rename(folder)


def _blob_name(source: Source) -> str:
    return source.sha256 or hashlib.sha256(source.key.encode()).hexdigest()


def _download_blob(source: Source, blob: Path, client: Client) -> None:
    """Fetch a file, going on where an earlier attempt ended: beside the bytes lies a list of the pieces among them."""
    part, list_of_pieces = blob.with_suffix(".part"), blob.with_suffix(".pieces")
    part.touch()
    with part.open("rb+", buffering=0) as file, list_of_pieces.open("a+b", buffering=0) as pieces:
        pieces.seek(0)
        # Only a hash can tell whether everything reached the disk before the power went.
        kept = set(map(int, pieces.read().split())) if source.sha256 else ()
        digest = hashlib.sha256()
        with client.persist(lambda: client.open(source)) as stream:
            size = Download(
                client,
                source,
                stream,
                file.fileno(),
                reserve=lambda size: os.posix_fallocate(file.fileno(), 0, max(size, 1)),
                kept=kept,
                keep=lambda start: pieces.write(b"%d\n" % start),
            ).run(digest.update)
        file.truncate(size)
        os.fsync(file.fileno())
    damaged = source.sha256 not in (None, digest.hexdigest()) or source.size not in (None, size)
    if not damaged:
        part.rename(blob)
    part.unlink(missing_ok=True)
    list_of_pieces.unlink()
    if damaged:
        raise ValueError(f"{source.name} arrived damaged: it is not what its host states that it is; try again.")


def _needed(paths: Collection[str]) -> list[str]:
    """What diffusers and transformers read: no other library's weights, no half precision's copies, no single file."""
    is_pipeline = "model_index.json" in paths

    def belongs(path: str) -> bool:
        depth, name = path.count("/"), PurePosixPath(path).name
        # A pipeline has a folder for each part; weights beside them are the whole of it again, in one file.
        if depth != (1 if is_pipeline and path != "model_index.json" else 0) or VARIANT.search(name):
            return False
        if path.startswith((".", "/")):
            return False
        return name.endswith((".json", ".txt", ".model", ".jinja", ".safetensors")) or bool(PICKLED.fullmatch(name))

    chosen = [path for path in paths if belongs(path)]
    safe = {str(PurePosixPath(path).parent) for path in chosen if path.endswith(".safetensors")}
    return [
        path
        for path in chosen
        if not (PICKLED.fullmatch(PurePosixPath(path).name) and str(PurePosixPath(path).parent) in safe)
    ]


VARIANT = re.compile(r"\.(?:fp16|bf16|fp32|non_ema|ema)[.-]")
PICKLED = re.compile(r"(?:diffusion_)?pytorch_model(?:-\d+-of-\d+)?\.bin(?:\.index\.json)?")
