"""The operator's folder of LoRAs that requests may name: a name → its file, and the list of names.

Names are paths in the folder without suffix. Nothing outside the folder can be named, not even through a link, and no
sentence tells where the folder is. No file is opened here.
"""

import difflib
import os
import stat
import unicodedata
from collections.abc import Callable
from pathlib import Path

from settings import Settings
from sources.references import ELSEWHERE, Local, parse, suffix_of
from sources.shown import brief, quoted, redact

FEW = 5  # how many names a sentence lists where none is near to the missing one


def find(name: str, folder: Path | None) -> Path:
    """The file in LORAS_DIR, if there is that folder, with a path without suffix, in NFC; see `references.Local`.

    Raises:
        ValueError: a sentence: no file or several have the name, or the folder cannot be read.
    """
    shown = quoted(Local(name).address)
    if folder is None:
        raise ValueError(
            f"{shown} would be a LoRA of LORAS_DIR, which this server does not have; it must be {ELSEWHERE}."
        )
    try:
        files = [it for it in _files_at(folder, name.split("/")) if _is_within(it, folder)]
    except OSError as error:
        raise ValueError(f"LORAS_DIR, where {shown} would be, cannot be read: {error.strerror}.") from None
    if not files:
        raise ValueError(f"There is no LoRA {shown} in LORAS_DIR; {_instead(name, _paths(folder))}.")
    if len(files) > 1:
        both = " and ".join(sorted(redact(it.name) for it in files))
        raise ValueError(f"{shown} names {len(files)} files of LORAS_DIR, {both}; it must be the name of one.")
    return files[0]


def names(folder: Path) -> list[str]:
    """The names of all LoRAs in a folder, as references write them; links to folders are not followed."""
    return [Local(path).address for path in _paths(folder)]


def names_beside(health: object) -> list[str]:
    """The names that references may use at a server with this process's environment; ValueError: a bad variable.

    The miniature, which draws where there is no GPU, has a library of its own. The server may be on another machine:
    `health`, its answer to `GET /health-check`, holds the predictor's first log lines, which name the model.
    """
    folder = Settings.from_environment(cuda="FLUX_DEV=mini/dev" not in str(health)).loras_dir
    return names(folder) if folder else []


def _paths(folder: Path) -> list[str]:
    found = set()
    for place, _, files in os.walk(folder):
        for file in (Path(place, name) for name in files):
            path = _stem(str(file.relative_to(folder)))
            if path is not None and _is_nameable(path) and _is_within(file, folder):
                found.add(path)
    return sorted(found)


def _files_at(folder: Path, parts: list[str]) -> list[Path]:
    """The files that a path without suffix may mean; names are compared in NFC, since accents have two spellings."""
    *folders, last = parts
    places = [folder]
    for part in folders:
        named = [it for place in places for it in place.iterdir() if _normal(it.name) == part]
        places = [it for it in named if _is_within(it, folder, stat.S_ISDIR)]
    return [it for place in places for it in place.iterdir() if _stem(it.name) == last]


def _stem(name: str) -> str | None:
    suffix = suffix_of(name)
    return _normal(name[: -len(suffix)]) if suffix else None


def _normal(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _is_nameable(path: str) -> bool:
    """Whether a reference can have that name: hidden files and names with signs of an address cannot be named."""
    try:
        return parse(Local(path).address) == Local(path)
    except ValueError:
        return False


def _is_within(path: Path, folder: Path, kind: Callable[[int], bool] = stat.S_ISREG) -> bool:
    """Whether a path, with its links resolved, is a regular file, or of another kind, within the folder."""
    try:
        place = path.resolve(strict=True)
        return kind(place.stat().st_mode) and place.is_relative_to(folder.resolve())
    except (OSError, RuntimeError):  # a link to nothing, or to itself
        return False


def _instead(path: str, paths: list[str]) -> str:
    """The end of a sentence: the names near to a missing one, else the first ones."""
    word = _last(path)
    near = [it for it in paths if _last(it) == word]
    if not near:
        folded = {key: it for it in reversed(paths) for key in (_last(it), it.casefold())}
        near = list(dict.fromkeys(folded[it] for it in difflib.get_close_matches(path.casefold(), folded)))
    if near:
        return f"the nearest there: {_listed(near[:3])}"
    more = f" and {len(paths) - FEW} more" if len(paths) > FEW else ""
    return f"it has {_listed(paths[:FEW]) or 'none'}{more}"


def _last(path: str) -> str:
    return path.rpartition("/")[2].casefold()


def _listed(paths: list[str]) -> str:
    return ", ".join(brief(Local(path).name) for path in paths)
