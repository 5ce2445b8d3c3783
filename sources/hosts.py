"""A reference → a Source: the file that it means now, by the APIs of Hugging Face, CivitAI and Replicate."""

import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import SplitResult, parse_qsl, quote, urlencode, urlsplit

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from settings import Settings, names_host
from sources import configs
from sources.client import Source, UnavailableError, no_answer, retry_after
from sources.references import COMMIT, Civitai, HuggingFace, Replicate, Url
from sources.shown import brief, hide_tokens, host_of, noted, redact

MAX_WORDS = 32
# CivitAI's exact names of the base models whose LoRAs fit, in order of preference: the model itself and those tuned
# from it with the same inputs, then the other's. LoRAs for others (Kontext and Fill take further inputs) must be named
# by their version.
BASES = {
    "dev": (("Flux.1 D", "Flux.1 Krea"), ("Flux.1 S",)),
    "schnell": (("Flux.1 S",), ("Flux.1 D", "Flux.1 Krea")),
}
IN_ADDRESS = "the token in the address"  # a user's own, not the operator's
SHA256 = re.compile(r"[0-9a-f]{64}")
# Trainers' names for intermediate results: name_000001500, name-step00002000, checkpoint-500.
CHECKPOINT = re.compile(r"[_-]0\d{4,}$|[_-](?:steps?|epoch|checkpoint)[_-]?\d+$|^checkpoint-\d+$", re.IGNORECASE)
# `Client.json`, or a function that calls it: the JSON that a host answers.
Ask = Callable[..., Any]


def resolve(reference: Replicate | HuggingFace | Civitai | Url, settings: Settings, ask: Ask) -> Source:
    """The file that a reference means now, by what `ask` learns from its host.

    Raises:
        UnavailableError: the host is down.
        ValueError: a sentence about why it names no file, or none that we may have.
    """
    match reference:
        case Replicate():
            return _resolve_replicate(reference, settings)
        case HuggingFace():
            return _resolve_hugging_face(reference, settings, ask)
        case Civitai():
            return _resolve_civitai(reference, settings, ask)
        case Url(url):
            return Source(reference.name, url)


def _resolve_replicate(reference: Replicate, settings: Settings) -> Source:
    versions = f"/versions/{reference.version}" if reference.version else ""
    needed = f"the account of {IN_ADDRESS} may not read it" if reference.token else "needs REPLICATE_API_TOKEN"
    refused = (
        f"it has no weights, or is private and {needed} "
        f"(on Hugging Face it would be huggingface.co/{reference.owner}/{reference.model})"
    )
    return Source(
        reference.name,
        f"{settings.replicate_endpoint}/{reference.owner}/{reference.model}{versions}/_weights",
        token=reference.token or settings.replicate_token,
        advice=dict.fromkeys((401, 403, 404), refused),
        web_page=refused,
    )


def _resolve_hugging_face(reference: HuggingFace, settings: Settings, ask: Ask) -> Source:
    def ask_api(asked: str, form: bytes | None = None, **options: bool) -> Any:  # noqa: ANN401 (JSON)
        url, token = f"{settings.hf_endpoint}/api/models/{asked}", reference.token or settings.hf_token
        explain = partial(explain_hugging_face, reference, settings)
        return ask(Source(reference.name, url, token, form=form, explain=explain), **options)

    repo = _list_repo(reference, settings, ask_api)
    path = reference.file if reference.file is not None else _choose_in_repo(reference, repo, ask_api)
    if path not in repo.files:
        raise ValueError(f"{reference.name} does not exist; the repo has {_some(_weights_in(repo, ''))}.")
    print(f"{reference.name}: {brief(hide_tokens(path))} of commit {repo.commit[:8]}.")
    source, beside = repo.files[path], configs.beside(path, repo.files)
    if beside is None:
        return source
    # One key for both: if either has changed, the LoRA is another one.
    config = repo.files[beside]
    return replace(source, key=f"{source.key} {config.key}", config=config)


@dataclass(frozen=True)
class _Repo:
    """A repo on Hugging Face at one commit, and its files by path."""

    id: str
    commit: str
    files: Mapping[str, Source]


def _list_repo(reference: HuggingFace, settings: Settings, ask_api: Ask) -> _Repo:
    name = reference.name
    try:
        validate_repo_id(reference.repo)
    except HFValidationError:
        raise ValueError(f"{name} names no model on Hugging Face; it must be huggingface.co/owner/repo.") from None
    answer = ask_api(f"{reference.repo}/revision/{quote(reference.revision, safe='')}?blobs=true")
    try:
        return _read_repo(answer, reference, settings)
    except (KeyError, TypeError, AttributeError, HFValidationError):
        raise no_answer(name, settings.hf_endpoint) from None


def _read_repo(answer: dict[str, Any], reference: HuggingFace, settings: Settings) -> _Repo:
    repo, commit = answer["id"], answer.get("sha") or ""
    validate_repo_id(repo)
    if not COMMIT.fullmatch(commit):
        raise UnavailableError(f"{reference.name} cannot be looked up: its host names no commit.")
    card = answer.get("cardData")  # written by users: it may be anything
    trigger_words = _words(card.get("instance_prompt") if isinstance(card, dict) else None)
    account = _account(reference, settings)
    refused = f"it is {_gate(repo, account)}" if answer.get("gated") else _needs_token(account)

    def source(path: str, file: dict[str, Any]) -> Source:
        sha256 = (file.get("lfs") or {}).get("sha256")
        sha256 = sha256 if sha256 and SHA256.fullmatch(sha256) else None
        return Source(
            brief(hide_tokens(f"huggingface.co/{repo}/resolve/{reference.revision}/{path}")),
            f"{settings.hf_endpoint}/{repo}/resolve/{commit}/{quote(path, errors='replace')}",
            token=reference.token or settings.hf_token,
            key=f"{repo}/{path} {sha256 or file.get('blobId') or commit}",
            sha256=sha256,
            size=None if file.get("size") is None else operator.index(file["size"]),
            trigger_words=trigger_words,
            advice={401: refused, 403: refused},
        )

    return _Repo(repo, commit, {file["rfilename"]: source(file["rfilename"], file) for file in answer["siblings"]})


def _account(reference: HuggingFace, settings: Settings) -> str | None:
    if reference.token:
        return f"the account of {IN_ADDRESS}"
    return "the account of HF_TOKEN" if settings.hf_token else None


def _gate(repo: str, account: str | None) -> str:
    account = account or "an account, and set HF_TOKEN to a token of it"
    return f"gated: accept its conditions at https://huggingface.co/{repo} with {account}"


def _needs_token(account: str | None) -> str:
    return f"it does not exist, or is private and {f'{account} may not read it' if account else 'needs HF_TOKEN'}"


def explain_hugging_face(
    reference: HuggingFace, settings: Settings, status: int, headers: Mapping[str, str]
) -> ValueError:
    """The error for a status and headers of Hugging Face."""
    name, host, code = reference.name, host_of(settings.hf_endpoint), headers.get("X-Error-Code")
    account = _account(reference, settings)
    if code == "GatedRepo":
        return ValueError(f"{name} is {_gate(reference.repo, account)}.")
    if code == "RevisionNotFound":
        return ValueError(
            f"{name} has no revision {redact(reference.revision)!r}; it must be a branch, a tag or a commit."
        )
    if code == "RepoNotFound" or status in (401, 403, 404):
        return ValueError(f"{name} cannot be fetched: {host} answered {status}; {_needs_token(account)}.")
    if status != 429 and status < 500:
        return ValueError(f"{name} cannot be fetched: {host} answered {status}.")
    sentence = f"{name} cannot be looked up: {host} answered {status}; try again later."
    return UnavailableError(sentence, retry_after(headers))


def _weights_in(repo: _Repo, folder: str) -> list[str]:
    """The .safetensors files in a folder, or in its folders where it has none itself."""
    prefix = f"{folder.strip('/')}/" if folder.strip("/") else ""
    paths = [path for path in repo.files if path.startswith(prefix) and path.endswith(".safetensors")]
    highest = min((path.count("/") for path in paths), default=0)
    return [path for path in paths if path.count("/") == highest]


def _choose_in_repo(reference: HuggingFace, repo: _Repo, ask_api: Ask) -> str:
    """The LoRA of a repo or of a folder in it: the one with a usual name, else the only one, else the newest."""
    paths = _weights_in(repo, reference.folder)
    for stem in ("pytorch_lora_weights", "lora", "adapter_model"):
        named = [path for path in paths if PurePosixPath(path).stem == stem]
        if len(named) == 1:
            return named[0]
    finished = [path for path in paths if not CHECKPOINT.search(PurePosixPath(path).stem)] or paths
    if len(finished) > 1:
        finished = _last_changed(finished, repo, ask_api)
    if len(finished) != 1:
        raise ValueError(
            f"{reference.name} has {_some(paths)}; "
            f"name one file, as huggingface.co/{repo.id}/resolve/{reference.revision}/file.safetensors."
        )
    return finished[0]


def _last_changed(paths: list[str], repo: _Repo, ask_api: Ask) -> list[str]:
    """The paths that changed in the newest commit; all of them where the host does not tell."""
    try:
        form = urlencode({"paths": paths, "expand": "true"}, doseq=True).encode()
        listed = ask_api(f"{repo.id}/paths-info/{repo.commit}", form, hasty=True)
        dates = {file["path"]: file["lastCommit"]["date"] for file in listed if file.get("lastCommit")}
        last = max(dates.values(), default=None)
    except (ValueError, KeyError, TypeError, AttributeError):
        return paths
    return [path for path in paths if dates.get(path) == last]


def _some(paths: list[str]) -> str:
    if not paths:
        return "no .safetensors file"
    more = f" and {len(paths) - 8} more" if len(paths) > 8 else ""
    return f"{len(paths)} .safetensors file(s): {', '.join(map(brief, paths[:8]))}{more}"


def _resolve_civitai(reference: Civitai, settings: Settings, ask: Ask) -> Source:
    official = settings.civitai_endpoint == Settings.civitai_endpoint
    endpoint = f"https://{reference.host}" if official else settings.civitai_endpoint
    token = reference.token or settings.civitai_token
    refused = "the token is not accepted, or may not have this file" if token else "it needs CIVITAI_API_TOKEN"
    missing = f"there is no such {'model' if reference.version is None else 'version'}"
    asked = f"models/{reference.model}" if reference.version is None else f"model-versions/{reference.version}"
    advice = {401: refused, 403: refused, 404: missing}
    answer = ask(Source(reference.name, f"{endpoint}/api/v1/{asked}", token, advice=advice))
    try:
        version = _newest(answer["modelVersions"], reference) if reference.version is None else answer
        number, file = version["id"], _choose_file(version, reference)
        download = _link(file)
        path = download.path or f"/api/download/models/{number}"
        print(f"{reference.name}: {brief(file['name'])} of version {noted(str(number))}, for {_base_of(version)}.")
        sha256 = str((file.get("hashes") or {}).get("SHA256", "")).lower()
        return Source(
            reference.name,
            f"{endpoint}{path}{'?' if download.query else ''}{download.query}",
            token=token,
            key=f"civitai {number} {file.get('id')} {sha256}",
            sha256=sha256 if SHA256.fullmatch(sha256) else None,
            trigger_words=_words(version.get("trainedWords")),
            advice=advice,
            web_page=refused,
        )
    except (KeyError, TypeError, AttributeError):
        raise no_answer(reference.name, endpoint) from None


def _newest(versions: list[dict[str, Any]], reference: Civitai) -> dict[str, Any]:
    """The newest version of a model for the first of `BASES` that it has a version for."""
    usable = [version for version in versions if _weights_of(version)]
    for bases in BASES[reference.drawn_with]:
        if fitting := [version for version in usable if version.get("baseModel") in bases]:
            return max(fitting, key=lambda it: (str(it.get("publishedAt") or it.get("createdAt") or ""), it["id"]))
    if not usable:
        raise ValueError(f"{reference.name} has no version with a .safetensors file.")
    others = noted(", ".join(f"{_base_of(version)} (version {version['id']})" for version in usable))
    raise ValueError(
        f"{reference.name} has no version for FLUX.1 [dev] or [schnell]; it is for {others}. Where one of these is "
        f"meant, it must be named, as {reference.name}?modelVersionId=…."
    )


def _base_of(version: dict[str, Any]) -> str:
    return noted(str(version.get("baseModel") or "a model without a name"))


def _weights_of(version: dict[str, Any]) -> list[dict[str, Any]]:
    """The files of a version that may be its LoRA: no training data, and no pickles."""

    def is_safe(file: dict[str, Any]) -> bool:
        kind = (file.get("metadata") or {}).get("format")
        return kind == "SafeTensor" or (kind is None and str(file.get("name")).endswith(".safetensors"))

    files = version.get("files") or ()
    return [file for file in files if is_safe(file) and file.get("type", "Model") in ("Model", "Pruned Model")]


def _choose_file(version: dict[str, Any], reference: Civitai) -> dict[str, Any]:
    """The file that a download link asks for, else CivitAI's primary one, else the first."""
    fitting = _weights_of(version)
    if not fitting:
        raise ValueError(f"{reference.name} has no .safetensors file.")
    wanted = dict(parse_qsl(reference.query)).items()
    asked = [file for file in fitting if wanted <= dict(parse_qsl(_link(file).query)).items()]
    return max(asked if wanted and asked else fitting, key=lambda file: bool(file.get("primary")))


def _link(file: dict[str, Any]) -> SplitResult:
    place = file.get("downloadUrl") or ""
    if place and not names_host(place):
        raise TypeError  # becomes `no_answer`
    return urlsplit(place)


def _words(value: object) -> tuple[str, ...]:
    """The first trigger words, from JSON that may hold anything."""
    words = value[:MAX_WORDS] if isinstance(value, list) else [value]
    return tuple(noted(word.strip()) for word in words if isinstance(word, str) and word.strip())
