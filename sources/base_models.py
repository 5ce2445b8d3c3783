"""A base model by name → a folder in diffusers or transformers layout, of which what is missing is downloaded.

Knows Hugging Face's repos, and keeps them apart from LoRAs: what is there stays.
"""

import hashlib
import os
import re
import shutil
from collections.abc import Collection
from pathlib import Path, PurePosixPath

from settings import Settings
from sources.client import Client, Patience, Source, UnavailableError
from sources.download import Download
from sources.hosts import Repo, list_repo
from sources.references import HuggingFace
from sources.shown import gigabytes
from sources.store import locked
from sources.work import run_stoppable

VARIANT = re.compile(r"\.(?:fp16|bf16|fp32|non_ema|ema)[.-]")
PICKLED = re.compile(r"(?:diffusion_)?pytorch_model(?:-\d+-of-\d+)?\.bin(?:\.index\.json)?")


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
    return run_stoppable(lambda client: _snapshot(reference, settings, client), settings, patience, reference.name)


def _snapshot(reference: HuggingFace, settings: Settings, client: Client) -> Path:
    """Files by their content in `blobs`, and a folder of links to them for each commit, as in Hugging Face's cache."""
    home = settings.cache_dir / "models" / reference.repo.replace("/", "--")
    blobs = home / "blobs"
    blobs.mkdir(parents=True, exist_ok=True)
    with locked(home / hashlib.sha256(reference.revision.encode()).hexdigest()[:16], client.pause) as latest:
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
