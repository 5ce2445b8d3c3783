"""A base model by name → a folder in diffusers or transformers layout, of which what is missing is downloaded.

Knows Hugging Face's repos, and keeps them apart from LoRAs: what is there stays.
"""

import hashlib
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TextIO

from service.outline import Outline
from settings import Settings
from sources.client import Client, Patience, Source, UnavailableError
from sources.download import Download
from sources.hosts import Repo, list_repo
from sources.references import HuggingFace
from sources.shown import gigabytes
from sources.store import disk_errors_told, locked
from sources.work import run_stoppable

VARIANT = re.compile(r"\.(?:fp16|bf16|fp32|non_ema|ema)[.-]")
PICKLED = re.compile(r"(?:diffusion_)?pytorch_model(?:-\d+-of-\d+)?\.bin(?:\.index\.json)?")


@dataclass(frozen=True)
class _Wanted:
    """A repo at a revision, the parts of it that are wanted (all where that is None), and where they are kept.

    Files lie by their content in `blobs`; each commit has a folder of links to them, as in Hugging Face's cache.
    """

    reference: HuggingFace
    parts: tuple[str, ...] | None
    home: Path

    @property
    def blobs(self) -> Path:
        return self.home / "blobs"

    def folder(self, commit: str) -> Path:
        """Where a commit lies; some parts of it have a folder of their own, unless all are there."""
        whole = self.home / commit
        return whole if self.parts is None or whole.is_dir() else self.home / ".".join((commit, *self.parts))

    @contextmanager
    def latest(self, client: Client) -> Iterator[TextIO]:
        """The file with the last commit that the revision was, locked."""
        self.blobs.mkdir(parents=True, exist_ok=True)
        name = hashlib.sha256(self.reference.revision.encode()).hexdigest()[:16]
        with locked(self.home / name, client.pause) as file:
            yield file

    def files(self, repo: Repo) -> dict[str, tuple[Source, Path]]:
        """What is needed of the repo, by path: from where, and which blob it becomes."""
        needed = [path for path in _needed(repo.files) if self.parts is None or path.partition("/")[0] in self.parts]
        if not needed:
            raise ValueError(f"huggingface.co/{repo.id} has no model in diffusers layout.")
        return {path: (repo.files[path], self.blobs / _blob_name(repo.files[path])) for path in needed}


def snapshot(
    model: str,
    settings: Settings,
    patience: Patience = Patience(),  # noqa: B008 (frozen)
    parts: tuple[str, ...] | None = None,
) -> Path:
    """A model in diffusers or transformers layout, as a folder.

    Args:
        model: a folder, or a Hugging Face repo `owner/repo[@revision]`, of which what is missing is downloaded.
        settings: where it is kept, token, mirror.
        patience: how long the host may keep us waiting.
        parts: the folders that are needed of a repo in diffusers layout; all unless given.

    Raises:
        ValueError: a sentence about why it cannot be had, and what to accept and to set where it is gated.
    """
    found = _find(model, settings, parts)
    if isinstance(found, Path):
        return found
    return run_stoppable(lambda client: _snapshot(found, settings, client), settings, patience, found.reference.name)


def outline(
    model: str,
    settings: Settings,
    patience: Patience = Patience(),  # noqa: B008 (frozen)
    parts: tuple[str, ...] | None = None,
) -> Outline:
    """The outline of a model in diffusers layout: of a repo, what is not weights is downloaded, and no weights are.

    Args and Raises: see `snapshot`.
    """
    found = _find(model, settings, parts)
    if isinstance(found, Path):
        return _outline_folder(found)
    return run_stoppable(lambda client: _outline(found, settings, client), settings, patience, found.reference.name)


def _find(model: str, settings: Settings, parts: tuple[str, ...] | None) -> Path | _Wanted:
    with suppress(OSError, RuntimeError):  # too long for a path; ~ of a user that there is not
        if (folder := Path(model).expanduser()).is_dir():
            return folder
    found = re.fullmatch(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", model)
    if found is None or model.startswith("."):
        raise ValueError(f"{model!r} is no folder; it must be one, or a Hugging Face repo as owner/repo.")
    reference = HuggingFace(found[1], found[2] or "main")
    return _Wanted(reference, parts, settings.cache_dir / "models" / reference.repo.replace("/", "--"))


@disk_errors_told()
def _snapshot(wanted: _Wanted, settings: Settings, client: Client) -> Path:
    with wanted.latest(client) as latest:
        there = wanted.folder(latest.read() or "nothing")
        try:
            repo = list_repo(wanted.reference, settings, client, hasty=there.is_dir())
            folder = wanted.folder(repo.commit)
            if not folder.is_dir():
                _download_folder(wanted, repo, folder, client)
        except UnavailableError as error:
            if not there.is_dir():
                raise
            print(f"{error} The files on the disk are used.")
            return there
        latest.seek(0)
        latest.truncate()
        latest.write(repo.commit)
        return folder


@disk_errors_told()
def _outline(wanted: _Wanted, settings: Settings, client: Client) -> Outline:
    with wanted.latest(client) as latest:
        there = wanted.folder(latest.read() or "nothing")
        try:
            files = wanted.files(list_repo(wanted.reference, settings, client, hasty=there.is_dir()))
            for path, (source, blob) in files.items():
                if not (_is_weights(path) or blob.exists()):
                    _download_blob(source, blob, client)
        except UnavailableError as error:
            if not there.is_dir():
                raise
            print(f"{error} The files on the disk are used.")
            return _outline_folder(there)
        sizes = {path: source.size or 0 for path, (source, _) in files.items()}
        return _outlined(sizes, lambda path: files[path][1].read_bytes())


def _outline_folder(folder: Path) -> Outline:
    sizes = {str(file.relative_to(folder)): file.stat().st_size for file in folder.glob("*/*") if file.is_file()}
    # Drawing does without model_index.json, which tells a pipeline.
    needed = [path for path in _needed({*sizes, "model_index.json"}) if path in sizes]
    return _outlined({path: sizes[path] for path in needed}, lambda path: (folder / path).read_bytes())


def _outlined(sizes: Mapping[str, int], read: Callable[[str], bytes]) -> Outline:
    """The outline of a model by what is needed of it: bytes by path, and a way to read a file."""
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


def _download_folder(wanted: _Wanted, repo: Repo, folder: Path, client: Client) -> None:
    files = wanted.files(repo)
    missing = sum(source.size or 0 for source, blob in files.values() if not blob.exists())
    free = shutil.disk_usage(wanted.blobs).free
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


def _is_weights(path: str) -> bool:
    return path.endswith((".safetensors", ".bin"))


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
