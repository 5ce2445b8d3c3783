"""What a stranger typed → a checked local file: the cache of LoRAs, and base models.

references says what is meant, downloads fetches it, contents tells what it is; this module decides what is kept. A
file in the cache is named by the SHA-256 of its content, and was complete, checked and on the disk before it got that
name: it needs no other proof. What a reference means is looked up anew at each request.
"""

import contextlib
import contextvars
import fcntl
import hashlib
import io
import json
import math
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from http import HTTPStatus
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import BinaryIO, NamedTuple, TextIO, TypeVar
from uuid import uuid4

from settings import GIB, Settings
from sources.client import MIB, Client, Download, Patience, Source, Stream, UnavailableError
from sources.contents import WEB_PAGE, Contents, UnfitError, choose, copy, gigabytes, unpack
from sources.references import (
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

    def _download(self, source: Source, stream: Stream, client: Client) -> "tuple[BinaryIO, Contents]":
        contents = Contents(source.name, stream.size, source.advice.get(0, WEB_PAGE))
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
        contents = Contents(name)
        with self._incoming_file() as file:
            reserve = self._reserve(file, name)
            copy(content, file, contents, reserve, client)
            file, contents = self._store(file, contents, client)
        record.note(contents.sha256, contents.trigger_words)
        return file

    def _read(self, path: Path, client: Client) -> _Held:
        """The operator's file: used where it lies, unpacked into the cache where it is an archive."""
        if path.is_dir():
            path = path / choose((str(file.relative_to(path)) for file in path.rglob("*")), "The folder")
        state = path.stat()
        identity = f"path {path.resolve()} {state.st_ino} {state.st_size} {state.st_mtime_ns}"
        with self._record(identity, client) as record, contextlib.ExitStack() as stack:
            content = stack.enter_context(path.open("rb"))
            if record.key is None:
                contents = Contents(path.name, state.st_size)
                copy(content, None, contents, lambda size: self._admit(size, path.name), client)
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

    def _store(self, file: BinaryIO, contents: "Contents", client: Client) -> "tuple[BinaryIO, Contents]":
        """Unpack an archive; give a checked file its name in the cache."""
        file.truncate(contents.size)  # more may have been reserved
        if contents.kind != "safetensors":
            with self._incoming_file() as unpacked:
                inner = unpack(file, contents, unpacked, self._reserve(unpacked, contents.name), client)
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
            raise UnfitError(f"{name} has {gigabytes(size)} or more; a LoRA may have {gigabytes(limit)} (LORA_MAX_GB).")

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
                f"{name} needs {gigabytes(needed)}, but the cache may have {gigabytes(budget)} (WEIGHTS_CACHE_GB), "
                f"of which {gigabytes(used)} are in use."
            )
        free = shutil.disk_usage(self._loras).free
        if free - needed < spare:
            raise UnfitError(
                f"{name} needs {gigabytes(needed)}, but the disk of the cache has {gigabytes(free)} left, "
                f"of which {gigabytes(spare)} stay free."
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
        raise ValueError(
            f"huggingface.co/{repo.id} needs {gigabytes(missing)}, but the disk has {gigabytes(free)} left."
        )
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
