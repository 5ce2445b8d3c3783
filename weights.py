"""The door of sources/: a reference → a checked local file, from the cache or downloaded into it.

A reference is looked up anew at each request; its record says what the last look-up found. Files in the store were
checked and complete before they got their names, and are not checked again.
"""

import contextlib
import io
import json
import math
import os
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import BinaryIO

from request import LoraChoice, LoraFile
from service.lines import printable
from service.outline import Outline
from settings import MODEL_VARIABLES, Models, Settings, folder_shown
from sources import configs
from sources.archives import choose, unpack
from sources.base_models import on_disk, outline, snapshot
from sources.choices import read_choices, read_own_choices
from sources.client import PATIENCE, Client, Patience, Source, Stream, UnavailableError
from sources.connections import trusted_authorities
from sources.contents import Contents, copy_checked, trigger_words_in
from sources.download import Download
from sources.hosts import resolve
from sources.library import find
from sources.pictures import fetch_pictures
from sources.references import (
    MAX_CHARACTERS,
    Data,
    Local,
    Picture,
    Reference,
    identity,
    is_pinned,
    left_out,
    parse,
    parse_picture,
)
from sources.shown import quoted
from sources.store import Store, disk_errors_told
from sources.work import run_stoppable

__all__ = [
    "Picture",
    "WeightsCache",
    "fetch",
    "fetch_one",
    "fetch_pictures",
    "on_disk",
    "outlines",
    "parse",
    "parse_picture",
    "read_choices",
]

# The folders of a repo that are read, if not all: schnell is drawn with dev's text encoders, tokenizers and VAE.
PARTS = {"schnell": ("transformer", "scheduler")}
# The folders of a model that must have a config.json; the checker and the classifier have one folder.
CONFIGURED = {"dev": ("transformer", "text_encoder", "text_encoder_2", "vae"), "schnell": ("transformer",)}
# The headers that tell a file's version, and those that ask for the file only if it has another one.
VALIDATORS = {"ETag": "If-None-Match", "Last-Modified": "If-Modified-Since"}
# A LoRA, and its file, which is not evicted as long as it is open.
Held = tuple[BinaryIO, LoraFile]


def outlines(
    settings: Settings, names: Iterable[str] = ("dev", "schnell"), patience: Patience = PATIENCE
) -> dict[str, Outline]:
    """The outlines of dev, schnell or both, for a plan before their weights are fetched; raises as `fetch` does."""
    return {name: outline(getattr(settings.models, name), settings, patience, PARTS.get(name)) for name in names}


def fetch(settings: Settings, patience: Patience = PATIENCE) -> Models:
    """All base models, as folders on this machine; missing files of repos are downloaded.

    Raises:
        ValueError: a sentence about why one cannot be had, and what to accept and to set where it is gated.
    """
    return Models(**{field.name: str(fetch_one(field.name, settings, patience)) for field in fields(Models)})


def fetch_one(name: str, settings: Settings, patience: Patience = PATIENCE) -> Path:
    """The base model of that name in `Models`, as a folder on this machine; raises as `fetch` does."""
    model = getattr(settings.models, name)
    folder = snapshot(model, settings, patience, PARTS.get(name))
    if folder == Path(model).expanduser():  # the operator's own, which may be anything
        for config in (Path(part, "config.json") for part in CONFIGURED.get(name, ("",))):
            if not (folder / config).is_file():
                named = f"{MODEL_VARIABLES[name]} is {folder_shown(model)!r}"
                raise ValueError(f"{named}, which has no {config}; it must be a model.")
    return folder


class WeightsCache:
    """LoRA files on the disk, shared by any number of processes.

    Raises:
        ValueError: a sentence, where SSL_CERT_FILE is no file of certificates.
    """

    def __init__(self, settings: Settings, patience: Patience = PATIENCE) -> None:
        self._settings, self._patience = settings, patience
        trusted_authorities()  # tells the operator about a bad SSL_CERT_FILE now, not with the first request

    def choices(self, text: str, scale: float, *, own: bool = False) -> list[LoraChoice]:
        """The LoRAs that an input names, those of LORAS_DIR after a look that they are there; nothing is fetched.

        Args:
            text: see `sources.choices`.
            scale: of the input.
            own: whether the input is the operator's, which may be a path.
        """
        choices = read_own_choices(text, scale) if own else read_choices(text, scale)
        for choice in choices:
            # A longer one is a data: URI, which takes long to decode.
            if not choice.trusted and len(choice.reference) <= MAX_CHARACTERS:
                wanted = parse(choice.reference)
                if isinstance(wanted, Local):
                    find(wanted.path, self._settings.loras_dir)
        return choices

    def open(self, reference: str, until: float = math.inf, model: str = "dev") -> AbstractContextManager[LoraFile]:
        """The file that a reference means now; it is not evicted within the context.

        Args:
            reference: see `sources.references`.
            until: when it must be there, by `time.monotonic`.
            model: the model that draws, dev or schnell.

        Raises:
            ValueError: a sentence that names the source, what it answered and what to do.
        """
        wanted = parse(reference, self._settings, model)
        if "#" in reference and not isinstance(wanted, Data):
            print(left_out(wanted.name))
        return self._opened(lambda lookup: lookup.fetch(wanted), wanted.name, until)

    def open_local(
        self, reference: str, until: float = math.inf, model: str = "dev"
    ) -> AbstractContextManager[LoraFile]:
        """The same for the operator's own reference, which may be a path: a file, an archive, or a folder with one."""
        path = Path(reference.removeprefix("file://"))
        with contextlib.suppress(OSError, RuntimeError):  # too long for a path; ~ of an unknown user
            path = path.expanduser()
            if path.exists():
                name = printable(path.name)
                return self._opened(lambda lookup: lookup.read(path, name), name, until)
        try:
            return self.open(reference, until, model)
        except ValueError as error:
            if path.is_absolute():  # clients must not learn the operator's folders
                raise ValueError(f"There is no file or folder {path.name!r} at the path that was given.") from None
            raise ValueError(f"There is no file or folder {quoted(reference)}; as a reference, {error}") from None

    def open_choice(
        self, choice: LoraChoice, until: float = math.inf, model: str = "dev"
    ) -> AbstractContextManager[LoraFile]:
        """The same for a choice of an input, whose reference may be a path only if it is the operator's own."""
        return (self.open_local if choice.trusted else self.open)(choice.reference, until, model)

    @contextmanager
    def _opened(self, work: "Callable[[_Lookup], Held]", name: str, until: float) -> Iterator[LoraFile]:
        settings = self._settings
        # Give up on a silent host before the time is up: a cached file may serve.
        patience = self._patience.within((until - time.monotonic()) / 3)
        with disk_errors_told():
            file, lora = run_stoppable(lambda client: work(_Lookup(settings, client)), settings, patience, name, until)
        with file:
            yield lora


@dataclass
class _Record:
    """What the last look-up of a reference found."""

    config: str  # the text of the config beside it; older versions' records lack this field and are not read
    sha256: str | None = None
    trigger_words: list[str] = field(default_factory=list)
    key: str | None = None  # the version, commit or hash that its source stated
    validators: dict[str, str] = field(default_factory=dict)  # without a key: ETag, Last-Modified
    place: str | None = None  # the address that sent the validators
    checked: float = 0.0  # the time of the look-up, in seconds since the epoch

    def remember(
        self,
        sha256: str,
        trigger_words: Iterable[str],
        config: str,
        key: str | None = None,
        answer: Stream | None = None,
    ) -> None:
        self.sha256, self.trigger_words, self.config, self.key = sha256, list(trigger_words), config, key
        sent = answer.headers if answer else {}
        self.validators = {name: sent[name] for name in VALIDATORS if name in sent}
        self.place = answer.place if answer else None

    def describes(self, stream: Stream) -> bool:
        """Whether an answer says that nothing has changed: some hosts send the whole file, with the same ETag."""
        if stream.status == HTTPStatus.NOT_MODIFIED:
            return True
        etag = stream.headers.get("ETag")
        return etag is not None and etag == self.validators.get("ETag") and self.place == stream.place


class _Lookup:
    def __init__(self, settings: Settings, client: Client) -> None:
        self._settings, self._client = settings, client
        self._store = Store(settings.cache_dir, settings.cache_bytes, settings.lora_max_bytes)

    def fetch(self, wanted: Reference) -> Held:
        """The file that a reference means now, or the cached one where its host is down."""
        if isinstance(wanted, Local):
            return self.read(find(wanted.path, self._settings.loras_dir), wanted.name)
        asked = time.time()
        with self._record(identity(wanted)) as record, contextlib.ExitStack() as stack:
            file = cached = self._store.open(record.sha256)
            stack.enter_context(cached or contextlib.nullcontext())
            # Another request may have looked it up while we waited for the record.
            if cached is None or not (is_pinned(wanted) or record.checked >= asked):
                try:
                    file = self._look_up(wanted, record, cached)
                    record.checked = time.time()
                except UnavailableError as error:
                    if cached is None:
                        raise
                    print(f"{error} The cached file is used.")
            if file is cached:
                stack.pop_all()  # it stays open
            return _held(file, self._store.path(record.sha256), record, wanted.name, record.config)

    def _look_up(self, wanted: Reference, record: _Record, cached: BinaryIO | None) -> BinaryIO:
        """The file that the reference means now, the cached one where nothing has changed; updates the record."""
        if isinstance(wanted, Data):
            return self._take(io.BytesIO(wanted.content), "The data: URI", record)
        # With a file to fall back on, a host is asked once.
        source = resolve(wanted, self._settings, partial(self._client.json, hasty=cached is not None))
        if cached is not None and source.key is not None and source.key == record.key:
            return cached
        # Before the weights: it is short, and a fault in it shows before they have come.
        config = self._fetch_config(source.config, hasty=cached is not None)
        if (file := self._store.open_granted(source.sha256)) is not None:
            record.remember(source.sha256, source.trigger_words or trigger_words_in(file), config, source.key)
            return file
        file = self._download(source, record, cached, config)
        # A file that was fetched with the reference's own token is only for holders of the token: hashes are public.
        if wanted.token is None:
            self._store.grant(source.sha256)
        return file

    def _fetch_config(self, source: Source | None, hasty: bool) -> str:
        if source is None:
            return ""
        configs.admit(source.size or 0, source.name)
        content = self._client.read(source, configs.MAX_BYTES + 1, hasty)
        if source.size not in (None, len(content)):
            raise UnavailableError(
                f"{source.name} arrived damaged: it has {len(content)} bytes, but its host states {source.size}."
            )
        return configs.text(content, source.name)

    def _download(self, source: Source, record: _Record, cached: BinaryIO | None, config: str) -> BinaryIO:
        """The file as its host sends it; the cached one, where the host answers that nothing has changed."""
        # A source with a key comes here only if the key has changed, perhaps because of the config alone.
        conditional = cached is not None and source.key is None
        conditions = {VALIDATORS[name]: sent for name, sent in record.validators.items()} if conditional else {}
        stream = self._client.persist(lambda: self._client.open(source, conditions), hasty=cached is not None)
        if stream.status == HTTPStatus.NOT_MODIFIED and record.place != stream.place:
            stream.close()
            stream = self._client.persist(lambda: self._client.open(source))
        with stream:
            if conditional and record.describes(stream):
                return cached
            file, contents = self._receive(stream)
        if contents.config is not None:  # an archive has its own
            config = contents.config
        record.remember(contents.sha256, source.trigger_words or contents.trigger_words, config, source.key, stream)
        return file

    def _receive(self, stream: Stream) -> tuple[BinaryIO, Contents]:
        source = stream.source
        contents = Contents(source.name, stream.size, source.web_page)
        with self._store.incoming(source.name) as (file, reserve):
            Download(stream, file.fileno(), reserve).run(contents.feed)
            contents.finish()
            if source.sha256 not in (None, contents.sha256):
                raise ValueError(
                    f"{source.name} arrived damaged: its SHA-256 is {contents.sha256}, but its host states "
                    f"{source.sha256}; try again."
                )
            return self._keep(file, contents)

    def read(self, path: Path, name: str) -> Held:
        """A file of the operator's, shown as `name`: used in its place, or unpacked into the store if an archive."""
        if path.is_dir():
            path = path / choose((str(file.relative_to(path)) for file in path.rglob("*")), "The folder")
        with contextlib.ExitStack() as stack:
            content = stack.enter_context(_open_regular(path, name))
            state = os.fstat(content.fileno())
            # ctime changes with every write, and no program can set it.
            with self._record(f"path {path.resolve()} {state.st_ino} {state.st_size} {state.st_ctime_ns}") as record:
                if record.key is None:
                    contents = Contents(name, state.st_size)
                    admit = partial(self._store.admit, name=name)
                    copy_checked(content, None, contents, admit, self._client.check)
                    record.remember(contents.sha256, contents.trigger_words, "", contents.kind)
                if (kind := record.key) != "safetensors":
                    content.seek(0)
                    file = self._store.open(record.sha256) or self._take(content, name, record)
                    record.key = kind  # with the unpacked file's hash: the next request finds that file
                    return _held(file, self._store.path(record.sha256), record, name, record.config)
                held = _held(content, path, record, name, configs.read_beside(path))
            stack.pop_all()  # it stays open
            return held

    def _take(self, content: BinaryIO, name: str, record: _Record) -> BinaryIO:
        """Copy a file that is on this machine into the store."""
        contents = Contents(name, shown=False)  # the content of a request is private
        with self._store.incoming(name) as (file, reserve):
            copy_checked(content, file, contents, reserve, self._client.check)
            file, contents = self._keep(file, contents)
        record.remember(contents.sha256, contents.trigger_words, contents.config or "")
        return file

    def _keep(self, file: BinaryIO, contents: Contents) -> tuple[BinaryIO, Contents]:
        """Give a checked file its name in the store; an archive is unpacked first."""
        file.truncate(contents.size)  # more may have been reserved
        if contents.kind == "safetensors":
            return self._store.keep(file, contents.sha256), contents
        with self._store.incoming(contents.name) as (unpacked, reserve):
            return self._keep(unpacked, unpack(file, contents, unpacked, reserve, self._client.check))

    @contextmanager
    def _record(self, identity: str) -> Iterator[_Record]:
        """The record of a reference, locked; written back where it was changed without an error."""
        with self._store.note(identity, self._client.pause) as note:
            try:
                record = _Record(**json.loads(note.read()))
            except (ValueError, TypeError):  # new, or left half written
                record = _Record("")
            before = asdict(record)
            yield record
            if asdict(record) != before:
                note.seek(0)
                note.truncate()
                note.write(json.dumps(asdict(record), ensure_ascii=False))


def _open_regular(path: Path, name: str) -> BinaryIO:
    """A file of the operator's: no pipe, which would wait for a writer, and no device, which has no end."""
    try:
        file = open(path, "rb", opener=lambda place, flags: os.open(place, flags | os.O_NONBLOCK))  # noqa: SIM115
    except OSError as error:
        raise ValueError(f"{name} cannot be read: {error.strerror}.") from error
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise ValueError(f"{name} is no regular file.")
    return file


def _held(file: BinaryIO, path: Path, record: _Record, name: str, config: str) -> Held:
    return file, LoraFile(path.absolute(), record.sha256, name, tuple(record.trigger_words), config)
