"""A base model by name → a folder in diffusers or transformers layout, in Hugging Face's own cache.

huggingface_hub downloads and keeps the files; this module chooses those that are needed, and words the errors. HF_HOME
and HF_HUB_CACHE (the cache's folder) and HF_HUB_OFFLINE (no host is asked) are the library's variables, read when it is
imported. Nothing is deleted from the cache but the unfinished files of killed downloads.
"""

import glob
import json
import math
import re
import shutil
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from uuid import uuid4

import httpx2
import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import (
    CachedRepoTreeNotFoundError,
    DryRunError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
)
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import WeakFileLock, logging, validate_repo_id
from tqdm import tqdm

from service.outline import Outline
from settings import Settings, folder_shown
from sources.client import PATIENCE, Client, Patience, UnavailableError
from sources.connections import untrusted
from sources.hosts import explain_hugging_face
from sources.references import COMMIT, HuggingFace
from sources.shown import gigabytes, host_of, redact
from sources.store import disk_errors_told
from sources.work import run_stoppable

# The library's warnings show signed addresses, and paths of this machine; its errors are raised.
logging.set_verbosity_error()
warnings.filterwarnings("ignore", "Not enough free disk space")

VARIANT = re.compile(r"\.(?:fp16|bf16|fp32|non_ema|ema)[.-]")
PICKLED = re.compile(r"(?:diffusion_)?pytorch_model(?:-\d+-of-\d+)?\.bin(?:\.index\.json)?")
SHARD = re.compile(r"(.*)-\d{5}-of-(\d{5})(\..*)")
DRAWN = 200  # how often a bar is drawn at most: in a log that is no terminal, each time is a line
DISK = "the disk of Hugging Face's cache"


def snapshot(
    model: str, settings: Settings, patience: Patience = PATIENCE, parts: tuple[str, ...] | None = None
) -> Path:
    """A model in diffusers or transformers layout, as a folder.

    Args:
        model: a folder, or a Hugging Face repo `owner/repo[@revision]`, whose missing files are downloaded.
        settings: the predictor's.
        patience: how long the host may take to say what the repo has.
        parts: the folders that are needed of a repo in diffusers layout; all unless given.

    Raises:
        ValueError: a sentence about why it cannot be had, and what to accept and to set where it is gated.
    """
    repo = _find(model)
    if isinstance(repo, Path):
        return repo
    return run_stoppable(lambda client: _Model(repo, parts, settings, client).snapshot(), settings, patience, repo.name)


def outline(
    model: str, settings: Settings, patience: Patience = PATIENCE, parts: tuple[str, ...] | None = None
) -> Outline:
    """The outline of a model, see `snapshot`, in diffusers layout; a repo's files but weights are downloaded for it."""
    repo = _find(model)
    if isinstance(repo, Path):
        return _outline_folder(repo)
    return run_stoppable(lambda client: _Model(repo, parts, settings, client).outline(), settings, patience, repo.name)


def on_disk(model: str, settings: Settings, parts: tuple[str, ...] | None = None) -> Path | None:
    """A model, see `snapshot`, that is on this machine, as a folder, or None; no host is asked."""
    repo = _find(model)
    if isinstance(repo, Path):
        return repo
    kept = _Model(repo, parts, settings, Client(settings, PATIENCE)).kept(weights=True)
    return kept and kept.folder


def _find(model: str) -> Path | HuggingFace:
    with suppress(OSError, RuntimeError):  # too long for a path; ~ of an unknown user
        if (folder := Path(model).expanduser()).is_dir():
            return folder
    found = re.fullmatch(r"(?!\.)([\w.-]+/[\w.-]+)(?:@((?!.*\.\.)[\w./-]+))?", model)
    with suppress(HFValidationError):
        if found is not None:
            validate_repo_id(found[1])
            return HuggingFace(found[1], found[2] or "main")
    shown = folder_shown(redact(model))
    raise ValueError(f"{shown!r} is no folder; it must be one, or a Hugging Face repo as owner/repo.")


@dataclass(frozen=True)
class _Files:
    """The files that are needed of a repo at one commit."""

    commit: str
    folder: Path  # the commit's folder in the cache
    sizes: Mapping[str, int]  # bytes by path
    listed: bool  # by the host; else guessed from the files in the folder

    def missing(self, *, weights: bool) -> list[str]:
        """The paths that are not in the folder; of weights only where asked for."""
        wanted = [path for path in self.sizes if weights or not _is_weights(path)]
        return [path for path in wanted if not (self.folder / path).is_file()]


@dataclass(frozen=True)
class _Model:
    """A repo at a revision, and the parts of it that are wanted; all where that is None."""

    reference: HuggingFace
    parts: tuple[str, ...] | None
    settings: Settings
    client: Client

    @property
    def home(self) -> Path:
        name = repo_folder_name(repo_id=self.reference.repo, repo_type="model")
        return Path(constants.HF_HUB_CACHE).expanduser() / name

    @disk_errors_told()
    def snapshot(self) -> Path:
        """The complete folder of the revision's current commit."""
        self._sweep()
        self._tell_of_older_cache()
        files = self._files(weights=True)
        self._note(files.commit)
        return files.folder

    @disk_errors_told()
    def outline(self) -> Outline:
        """The outline, for which all files but weights are downloaded."""
        files = self._files(weights=False)
        return _outlined(files.sizes, lambda path: (files.folder / path).read_bytes())

    def _files(self, *, weights: bool) -> _Files:
        """The files that the host lists now, downloaded; those that it listed last where they cannot be had."""
        kept = self.kept(weights=weights)
        if kept is not None and kept.listed and kept.commit == self.reference.revision:  # which never changes
            return kept
        try:
            hasty = kept is not None or constants.is_offline_mode()
            files = self.client.persist(self._ask, hasty)
            # Complete files stay; the library starts one that broke off again from its beginning.
            self.client.persist(lambda: self._download(files, files.missing(weights=weights)), hasty)
            return files
        except ValueError as error:
            if kept is None:
                raise
            # After an outline comes a snapshot, which prints it.
            if weights and not constants.is_offline_mode():
                print(f"{error} The files on the disk are used.")
            return kept

    def _ask(self) -> _Files:
        """The revision's current files, in one request."""
        with self._errors_told():
            hub = huggingface_hub.HfApi(self.settings.hf_endpoint, token=self.settings.hf_token)
            info = hub.model_info(
                self.reference.repo,
                revision=self.reference.revision,
                files_metadata=True,
                timeout=constants.HF_HUB_ETAG_TIMEOUT,
            )
            if not COMMIT.fullmatch(info.sha):
                raise LookupError
            files = self._choose(info.sha, {file.rfilename: int(file.size or 0) for file in info.siblings})
        if not files.sizes:
            raise ValueError(f"huggingface.co/{self.reference.repo} has no model in diffusers layout.")
        return files

    def kept(self, *, weights: bool) -> _Files | None:
        """The revision's files at its last download, by us or by the library's own command, if all are still there."""
        ref, commit = self.home / "refs" / self.reference.revision, self.reference.revision
        with suppress(OSError):
            commit = ref.read_text(errors="replace").strip()
        if not COMMIT.fullmatch(commit):
            return None
        folder = self.home / "snapshots" / commit
        try:
            tree = huggingface_hub.get_cached_repo_tree(self.reference.repo, revision=commit)
            files = self._choose(commit, {file.path: file.size for file in tree})
        except CachedRepoTreeNotFoundError:  # an older version of the library has written it
            files = self._choose(commit, dict.fromkeys(_promised(folder), 0) | _sizes(folder), listed=False)
        # Without a list, the size of weights is known only if they are there.
        lacking = files.missing(weights=weights or not files.listed)
        return None if lacking or not files.sizes else files

    def _choose(self, commit: str, sizes: Mapping[str, int], *, listed: bool = True) -> _Files:
        needed = [path for path in _needed(sizes) if self.parts is None or path.partition("/")[0] in self.parts]
        return _Files(commit, self.home / "snapshots" / commit, {path: sizes[path] for path in needed}, listed)

    def _download(self, files: _Files, paths: list[str]) -> None:
        """Let the library download these files, if any; `ValueError` if the disk has no room for them."""
        if not paths:
            return
        name, host = self.reference.name, host_of(self.settings.hf_endpoint)
        download = partial(
            huggingface_hub.snapshot_download,
            self.reference.repo,
            revision=files.commit,
            allow_patterns=[glob.escape(path) for path in paths],
            token=self.settings.hf_token,
            endpoint=self.settings.hf_endpoint,
        )
        with self._errors_told():
            # Some of the library's requests have no timeout of their own.
            huggingface_hub.get_session().timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
            asked = download(dry_run=True, tqdm_class=_counter(lambda size: None))
        sizes = {file.filename: files.sizes[file.filename] for file in asked if file.will_download}
        missing = sum(sizes.values())
        free = shutil.disk_usage(next(folder for folder in self.home.parents if folder.exists())).free
        if missing > free:
            raise ValueError(f"{name} needs {gigabytes(missing)}, but {DISK} has {gigabytes(free)} left.")
        if any(map(_is_weights, sizes)):
            print(f"{name}: {gigabytes(missing)} to download; {DISK} has {gigabytes(free)} left.", flush=True)
        # By bytes and not by seconds: however slow the download, a log has at most DRAWN lines of the bar. The name is
        # in front: clients take a bar without one for the progress of drawing.
        drawn = {"miniters": missing // DRAWN + 1, "mininterval": 1, "maxinterval": math.inf, "delay": 1}
        options = {"unit": "B", "unit_scale": True, "unit_divisor": 1024, "leave": False}
        with tqdm(desc=name, total=missing, **options, **drawn) as bar, self._errors_told():

            def count(size: int) -> None:
                self.client.check()  # ends the library's thread once the download is given up
                with bar.get_lock():
                    bar.update(size)

            download(tqdm_class=_counter(count))
        # The library does not fail where it cannot list a repo: it returns the folder as it is.
        if not set(paths).isdisjoint(files.missing(weights=True)):
            raise UnavailableError(f"{name} cannot be fetched: the connection to {host} failed or broke off.")

    def _sweep(self) -> None:
        """Delete the unfinished files of killed processes; the library locks those that it is writing."""
        for file in self.home.glob("blobs/*.incomplete"):
            lock = self.home.parent / ".locks" / self.home.name / f"{file.name.rsplit('.', 2)[0]}.lock"
            with suppress(OSError), WeakFileLock(lock, timeout=0.1):
                file.unlink()

    def _note(self, commit: str) -> None:
        """Note the revision's commit as the library does, once all of its files are there."""
        ref = self.home / "refs" / self.reference.revision
        with suppress(OSError):  # a cache that cannot be written to
            if commit != self.reference.revision and not (ref.is_file() and ref.read_text(errors="replace") == commit):
                ref.parent.mkdir(parents=True, exist_ok=True)
                fresh = ref.with_name(f"{ref.name}.{uuid4().hex}.tmp")
                fresh.write_text(commit)
                fresh.replace(ref)

    def _tell_of_older_cache(self) -> None:
        older = self.reference.repo.replace("/", "--")
        if (self.settings.cache_dir / "models" / older).is_dir():
            print(
                f"WEIGHTS_CACHE/models/{older} is not used any more and may be deleted: "
                "base models lie in Hugging Face's own cache."
            )

    @contextmanager
    def _errors_told(self) -> Iterator[None]:
        """Turn the library's errors, which show addresses and paths, into sentences."""
        try:
            yield
        except Exception as error:
            self.client.check()
            raise self._told(error) from None

    def _told(self, error: BaseException) -> ValueError:
        name, host = self.reference.name, host_of(self.settings.hf_endpoint)
        while isinstance(error, LocalEntryNotFoundError | DryRunError) and error.__cause__ is not None:
            error = error.__cause__
        match error:
            case HfHubHTTPError():
                answer = error.response
                return explain_hugging_face(self.reference, self.settings, answer.status_code, answer.headers)
            case OfflineModeIsEnabled():
                return UnavailableError(
                    f"{name} is not in Hugging Face's cache, or not all of it, and HF_HUB_OFFLINE forbids fetching it: "
                    "unset that, or run script/models first, where there is a network."
                )
            case httpx2.ConnectError() if fault := untrusted(error):
                return ValueError(f"{name} cannot be fetched: the certificate of {host} is not valid: {fault}")
            case httpx2.TimeoutException() | httpx2.ConnectError():
                return UnavailableError(f"{name} cannot be fetched: {host} does not answer.")
            case httpx2.HTTPError():
                return UnavailableError(f"{name} cannot be fetched: the connection to {host} failed or broke off.")
            case OSError(errno=int()):
                return ValueError(f"Hugging Face's cache cannot be used: {error.strerror or 'its disk fails'}.")
            case OSError() if type(error) is OSError:  # the library counts the bytes of a file
                return ValueError(f"{name} arrived damaged: a file has another size than its host states; try again.")
            case _:
                return UnavailableError(f"{name} cannot be fetched: {host} sent something else than an answer.")


def _counter(count: Callable[[int], object]) -> type[tqdm]:
    """A class for the library's bars, none of which is drawn: the one of bytes on the disk calls `count`.

    The others are of files and of bytes from the network. HF_HUB_DISABLE_PROGRESS_BARS has no effect.
    """

    class Counter(tqdm):
        def __init__(self, *args: object, desc: str = "", **options: object) -> None:
            super().__init__(*args, desc=desc, **options | {"disable": True})
            self._counts = desc.startswith("Reconstructing")

        def update(self, n: float | None = 1) -> None:
            if self._counts:
                count(int(n or 0))

    return Counter


def _sizes(folder: Path) -> dict[str, int]:
    files = [file for pattern in ("*", "*/*") for file in folder.glob(pattern) if file.is_file()]
    return {str(file.relative_to(folder)): file.stat().st_size for file in files}


def _promised(folder: Path) -> set[str]:
    """The paths that a folder should have, as its files imply: links' targets, other shards, weights, parts."""
    files = list(folder.glob("**/*"))
    paths = {file for file in files if file.is_symlink()}  # to nothing, too
    for file in files:
        if found := SHARD.fullmatch(file.name):
            stem, count, suffix = found.groups()
            paths.update(file.with_name(f"{stem}-{i:05}-of-{count}{suffix}") for i in range(1, int(count) + 1))
        if file.name == "config.json" and not any(_is_weights(it.name) for it in file.parent.iterdir()):
            paths.add(file.with_name("model.safetensors"))
    with suppress(OSError, ValueError, AttributeError, RecursionError):
        for part, kind in json.loads((folder / "model_index.json").read_bytes()).items():
            if isinstance(kind, list) and None not in kind and not (folder / part).is_dir():
                paths.add(folder / part / "config.json")
    return {str(path.relative_to(folder)) for path in paths}


def _outline_folder(folder: Path) -> Outline:
    sizes = {path: size for path, size in _sizes(folder).items() if path.count("/") == 1}
    # Drawing does not need model_index.json, but `_needed` recognizes a pipeline by it.
    needed = [path for path in _needed({*sizes, "model_index.json"}) if path in sizes]
    return _outlined({path: sizes[path] for path in needed}, lambda path: (folder / path).read_bytes())


def _outlined(sizes: Mapping[str, int], read: Callable[[str], bytes]) -> Outline:
    """The outline of a model by the bytes of its files and a function that reads one."""
    configs, weights = {}, Counter()
    for path, size in sizes.items():
        part, _, name = path.rpartition("/")
        if _is_weights(path):
            weights[part] += size
        elif name == "config.json":
            try:
                configs[part] = dict(json.loads(read(path)).items())
            except (ValueError, AttributeError, RecursionError):
                raise ValueError(f"A model's {path} is no JSON object; fetch or copy it again.") from None
    return Outline(configs, weights)


def _is_weights(path: str) -> bool:
    return path.endswith((".safetensors", ".bin"))


def _needed(paths: Collection[str]) -> list[str]:
    """The paths that diffusers and transformers read: no other libraries' weights, no copies in half precision."""
    # A pipeline has a folder for each part; weights beside them are the whole of it again, in one file.
    depth = 1 if "model_index.json" in paths else 0
    files = {}
    for path in paths:
        folder, _, name = path.rpartition("/")
        in_place = path.count("/") == depth or path == "model_index.json"
        if in_place and not path.startswith((".", "/")) and not VARIANT.search(name):
            files[path] = folder, name
    safe = {folder for folder, name in files.values() if name.endswith(".safetensors")}
    suffixes = (".json", ".txt", ".model", ".jinja", ".safetensors")
    return [
        path
        for path, (folder, name) in files.items()
        if (folder not in safe if PICKLED.fullmatch(name) else name.endswith(suffixes))
    ]
