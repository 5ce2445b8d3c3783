"""Replicate's HTTP API, as far as its official clients use it for predictions, and the files that outputs point to.

One predictor answers under every model, version and deployment name, so that code written for Replicate changes only
its base URL. All tokens are one account's: each gives access to every prediction.
"""

import asyncio
import base64
import hashlib
import hmac
import json
import re
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cached_property
from importlib.metadata import version
from typing import Any, Literal

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from cluster.addresses import Addresses
from cluster.api_common import (
    PATH_NAME,
    InputSchema,
    Streamed,
    Turns,
    answer_inlined,
    new_prediction,
    problem,
    read_json,
)
from cluster.bodies import Bodies, read_form
from cluster.dispatcher import Dispatcher
from cluster.files import Files, read_pieces
from cluster.forms import Forms
from cluster.predictions import PREDICTION_LIFETIME, File, Prediction, Predictions, now
from cluster.streams import Streams
from cluster.webhooks import EVENTS, check_url
from local_cog.server import MAX_FILE_BYTES
from service.data_uri import OCTETS, media_type_of
from service.lines import printable

# The model's name, where the client gave none.
OWNER, NAME = "flux-sprites", "flux-sprites"
ACCOUNT = {"type": "organization", "username": OWNER, "name": OWNER, "github_url": None}
# The User-Agent of Replicate's clients, such as replicate-python/1.0.7. They make files of outputs that begin with
# https: or data:, but write the address itself into the file where it begins with http:. Before 1.0, their users fetch
# outputs themselves.
CLIENT = re.compile(r"(?:^|\s)replicate-(?:python|javascript)/(?!0\.)", re.ASCII)
# As at Replicate.
MAX_WAIT_SECONDS = 60
VERSION_FORM = re.compile(rf"(?P<model>{PATH_NAME}/{PATH_NAME})(?::(?P<of>{PATH_NAME}))?|(?P<id>{PATH_NAME})")
# Cancel-After, as at Replicate: a bare number means seconds.
DURATION = re.compile(r"(?:(\d{1,6})h)?(?:(\d{1,6})m)?(?:(\d{1,6})s?)?", re.ASCII)
SHORTEST = timedelta(seconds=5)
MEDIA_TYPE = re.compile(r"[\w!#$&^.+-]{1,64}/[\w!#$&^.+-]{1,64}", re.ASCII)
METADATA_BYTES = 64 * 1024
NO_FILE = "There is no such file; files are kept for an hour."


@dataclass(frozen=True)
class ReplicateApi:
    """Replicate's endpoints."""

    dispatcher: Dispatcher
    predictions: Predictions
    files: Files
    forms: Forms
    streams: Streams
    schema: InputSchema
    bodies: Bodies
    private_webhooks: bool  # whether webhooks may go to private and loopback addresses
    addresses: Addresses
    secret: str  # the key that signs webhooks
    outputs: Literal["url", "data"] | None  # how a single prediction shows its outputs; None: as its client can read
    started_at: str = field(default_factory=now)
    # A page may have megabytes, and SQLite runs one query at a time.
    lists: Turns = field(default_factory=lambda: Turns(2, 50))

    def routes(self) -> list[BaseRoute]:
        """Which endpoint answers where."""
        return [
            Route("/v1/predictions", self._create, methods=["POST"]),
            Route("/v1/models/{owner:name}/{name:name}/predictions", self._create, methods=["POST"]),
            Route("/v1/deployments/{owner:name}/{name:name}/predictions", self._create, methods=["POST"]),
            Route("/v1/predictions", self._list),
            Route("/v1/predictions/{prediction_id:name}", self._get),
            Route("/v1/predictions/{prediction_id:name}/cancel", self._cancel, methods=["POST"]),
            Route("/v1/models/{owner:name}/{name:name}", self._model),
            Route("/v1/models/{owner:name}/{name:name}/versions", self._versions),
            Route("/v1/models/{owner:name}/{name:name}/versions/{version:name}", self._version),
            Route("/v1/deployments/{owner:name}/{name:name}", self._deployment),
            Route("/v1/account", self._account),
            Route("/v1/webhooks/default/secret", self._secret),
            Route("/v1/files", self._upload, methods=["POST"]),
            Route("/v1/files", self._uploads),
            Route("/v1/files/{file_id:name}", self._uploaded, methods=["GET", "DELETE"]),
            Route("/v1/files/{prediction_id:name}/stream/{key:name}", self._stream),
            Route("/files/{file_id:name}/{name:name}", self._download),
        ]

    async def _create(self, request: Request) -> Response:
        wait = _wait_seconds(request.headers.get("prefer", ""))
        lifetime = _lifetime(request.headers.getlist("cancel-after"))
        base = self.addresses.base(request)
        async with self.bodies.read(request, lambda content: self._prediction(request, content, base)) as prediction:
            prediction.cancel_at = lifetime and now(lifetime)
            await self.dispatcher.accept(prediction)
        if wait is not None:
            prediction = await self.dispatcher.ended(prediction, wait)
            if not prediction.finished:
                shown = self.forms.replicate(prediction, base)
                return JSONResponse({**shown, "status": "starting"}, 202)  # clients take any other status for the end
        return await self._show(request, prediction, 201)

    def _prediction(self, request: Request, content: bytes, base: str) -> Prediction:
        body = _read_body(content)
        if "owner" in request.path_params:
            model, version_id = "{owner}/{name}".format(**request.path_params), None
        else:
            model, version_id = _resolve(body.get("version"))
        inputs, notice = self.schema.read(body.get("input", {}))
        if problems := self.schema.problems(inputs):
            fields = [{"type": p["type"], "field": f"input.{p['loc'][-1]}", "description": p["msg"]} for p in problems]
            detail = "".join(f"- {item['field']}: {item['description']}\n" for item in fields)
            raise problem(422, "Input validation failed", detail, invalid_fields=fields)
        names = {"model": model, "version": version_id or self.version_id, "base_url": base}
        hook = _webhook(body, self.private_webhooks)
        return new_prediction(self.dispatcher.front, inputs, "replicate", notice=notice, **names, **hook)

    async def _show(self, request: Request, prediction: Prediction, status: int = 200) -> Response:
        """One prediction, with its files inside where its client needs that or the operator wants it."""
        base, inside = self.addresses.base(request), self.outputs == "data"
        # With PUBLIC_URL set, the operator wants URLs, even if they begin with http:.
        if self.outputs is None and self.addresses.public_url is None and base.startswith("http:"):
            inside = bool(CLIENT.search(request.headers.get("user-agent", "")))
        if inside and prediction.status == "succeeded":
            return answer_inlined(await self.forms.inlined(prediction, base), status)
        return JSONResponse(self.forms.replicate(prediction, base), status)

    async def _known(self, request: Request) -> Prediction:
        prediction = await self.predictions.get(request.path_params["prediction_id"])
        if prediction is None or prediction.api != "replicate":
            raise problem(404, "Not found", "The requested resource could not be found.")
        return prediction

    async def _get(self, request: Request) -> Response:
        return await self._show(request, await self._known(request))

    async def _list(self, request: Request) -> Response:
        base = self.addresses.base(request)
        address = f"{base}/v1/predictions?cursor="
        async with self.lists.take(request):
            try:
                page = await self.predictions.page(request.query_params.get("cursor"))
            except ValueError as error:
                raise problem(400, "Bad cursor", str(error)) from None

            def listed() -> Response:
                previous, following = page.previous and address + page.previous, page.next and address + page.next
                shown = [self.forms.replicate(prediction, base) for prediction in page.predictions]
                return JSONResponse({"previous": previous, "next": following, "results": shown})

            return await asyncio.to_thread(listed)

    async def _cancel(self, request: Request) -> Response:
        prediction = await self._known(request)
        if await self.dispatcher.cancel(prediction.id):
            # One that was waiting ends at once; one that runs ends soon.
            prediction = await self.dispatcher.ended(prediction, 1)
        return await self._show(request, prediction)

    async def _stream(self, request: Request) -> Response:
        prediction = await self._known(request)
        if not hmac.compare_digest(request.path_params["key"], self.forms.stream_key(prediction.id)):
            raise problem(404, "Not found", "There is no such stream.")
        events = self.streams.events(prediction.id, self.addresses.base(request))
        return Streamed(events, media_type="text/event-stream")

    async def _model(self, request: Request) -> Response:
        address = "/v1/models/{owner}/{name}".format(**request.path_params)
        model = {
            "url": self.addresses.base(request) + address,
            **request.path_params,
            "description": "FLUX.1 with LoRAs that change from one request to the next.",
            "visibility": "private",
            "run_count": 0,
            **dict.fromkeys(("github_url", "paper_url", "license_url", "cover_image_url", "default_example")),
            "latest_version": self._describe(self.version_id),
        }
        return JSONResponse(model)

    async def _versions(self, _: Request) -> Response:
        return JSONResponse({"previous": None, "next": None, "results": [self._describe(self.version_id)]})

    async def _version(self, request: Request) -> Response:
        return JSONResponse(self._describe(request.path_params["version"]))

    def _describe(self, version_id: str) -> dict[str, Any]:
        about = {"created_at": self.started_at, "cog_version": version("cog"), "openapi_schema": self.schema.document}
        return {"id": version_id, **about}

    @cached_property
    def version_id(self) -> str:
        """The version that runs here, a hash of the document of its inputs and outputs."""
        return hashlib.sha256(json.dumps(self.schema.document, sort_keys=True).encode()).hexdigest()

    async def _deployment(self, request: Request) -> Response:
        release = {
            "number": 1,
            "model": f"{OWNER}/{NAME}",
            "version": self.version_id,
            "created_at": self.started_at,
            "created_by": ACCOUNT,
            "configuration": {"hardware": "gpu", "min_instances": 1, "max_instances": 1},
        }
        return JSONResponse({**request.path_params, "current_release": release})

    async def _account(self, _: Request) -> Response:
        return JSONResponse(ACCOUNT)

    async def _secret(self, _: Request) -> Response:
        return JSONResponse({"key": f"whsec_{base64.b64encode(self.secret.encode()).decode()}"})

    async def _upload(self, request: Request) -> Response:
        kind, base = request.headers.get("content-type", ""), self.addresses.base(request)
        async with self.bodies.read(request, lambda content: _read_upload(content, kind)) as upload:
            file = await self.files.write(*upload)
        try:
            await self.predictions.add_file(file)
        except BaseException:
            await self.files.delete([file.id])  # a file that the database does not know would never expire
            raise
        return JSONResponse(_show_file(file, base), 201)

    async def _uploads(self, request: Request) -> Response:
        base = self.addresses.base(request)
        results = [_show_file(file, base) for file in await self.predictions.uploads()]
        return JSONResponse({"previous": None, "next": None, "results": results})

    async def _uploaded(self, request: Request) -> Response:
        file = await self.predictions.file(request.path_params["file_id"])
        if file is None or file.about is None:
            raise problem(404, "Not found", NO_FILE)
        if request.method != "DELETE":
            return JSONResponse(_show_file(file, self.addresses.base(request)))
        await self.predictions.delete_file(file.id)
        await self.files.delete([file.id])
        return Response(status_code=204)

    async def _download(self, request: Request) -> Response:
        try:
            size, file = await self.files.open(request.path_params["file_id"])
        except FileNotFoundError:
            raise problem(404, "Not found", NO_FILE) from None
        # A file must not act as a page of this host.
        headers = {"x-content-type-options": "nosniff", "content-security-policy": "sandbox"}
        headers["content-length"] = str(size)
        return Streamed(read_pieces(file, size), media_type=media_type_of(request.path_params["name"]), headers=headers)


def _read_body(content: bytes) -> dict[str, Any]:
    try:
        body = read_json(content or b"{}")
    except ValueError as error:
        raise problem(400, "Bad request", f"The body is no JSON as it must be: {error}") from None
    if not isinstance(body, dict) or not isinstance(body.get("input", {}), dict):
        raise problem(422, "Bad request", "The body must be an object whose input is one.")
    return body


def _read_upload(content: bytes, kind: str) -> tuple[bytes, str, str, dict[str, Any]]:
    """The content, name, media type and description of an uploaded file, for `Files.write`."""
    try:
        form = read_form(content, kind)
    except ValueError as error:
        raise problem(400, "Bad form", str(error)) from None
    if "content" not in form or (name := form["content"].option(b"filename")) is None:
        raise problem(422, "No file", "content is missing; it must be the file.")
    file = form["content"]
    if len(file.content) > MAX_FILE_BYTES:
        limit = f"it must be at most {MAX_FILE_BYTES // 10**6} MB; give larger ones as a URL."
        raise problem(413, "File too large", f"The file is larger than that; {limit}")
    media_type = file.headers.get(b"content-type", b"").decode("latin-1").partition(";")[0].strip() or OCTETS
    if not MEDIA_TYPE.fullmatch(media_type):
        raise problem(422, "Bad type", f"The file's Content-Type is {media_type[:80]!r}; it must be like image/png.")
    name = printable(re.split(r"[/\\]", name)[-1])[:128] or "file"  # a client may send a path
    about = {"metadata": _metadata(form["metadata"].content if "metadata" in form else b"")}
    return file.content, name, media_type, about


def _metadata(content: bytes) -> dict[str, Any]:
    if len(content) > METADATA_BYTES:
        raise problem(413, "Bad metadata", f"metadata has {len(content)} bytes; it may have {METADATA_BYTES}.")
    try:
        metadata = read_json(content or b"{}")
    except ValueError as error:
        raise problem(422, "Bad metadata", f"metadata must be JSON, and {error}") from None
    if not isinstance(metadata, dict):
        raise problem(422, "Bad metadata", "metadata must be an object of JSON.")
    return metadata


def _resolve(asked: object) -> tuple[str, str | None]:
    """The model and the version that `version` asks for: a version's id, owner/name, or owner/name:id."""
    if not isinstance(asked, str) or not asked:
        fields = [{"type": "required", "field": "version", "description": "version is required"}]
        raise problem(422, "Input validation failed", "- version is required\n", invalid_fields=fields)
    if not (found := VERSION_FORM.fullmatch(asked)):
        forms = "a version's id, owner/name or owner/name:id, each part of 1 to 128 letters, digits and _ . ~ -"
        raise problem(422, "Bad version", f"version is {asked[:80]!r}; it must be {forms}.")
    return found["model"] or f"{OWNER}/{NAME}", found["of"] or found["id"]


def _webhook(body: dict[str, Any], private: bool) -> dict[str, Any]:
    webhook, events = body.get("webhook"), body.get("webhook_events_filter") or list(EVENTS)
    if webhook is None and body.get("webhook_completed"):
        webhook, events = body["webhook_completed"], ["completed"]
    if webhook is not None:
        try:
            check_url(webhook, allow_private=private)
        except ValueError as error:
            raise problem(422, "Bad webhook", str(error)) from None
    if not isinstance(events, list) or any(event not in EVENTS for event in events):
        raise problem(422, "Bad webhook", f"webhook_events_filter must be a list of {', '.join(EVENTS)}.")
    return {"webhook": webhook, "webhook_events": [event for event in EVENTS if event in events]}


def _wait_seconds(prefer: str) -> float | None:
    """The seconds of `Prefer: wait` or `Prefer: wait=5`; None for any other text."""
    found = re.search(r"\bwait(?:=(\d+))?", prefer, re.ASCII)
    return min(float(found[1] or MAX_WAIT_SECONDS), MAX_WAIT_SECONDS) if found else None  # the longest are infinite


def _lifetime(durations: list[str]) -> timedelta | None:
    """The time of Cancel-After, such as `30`, `30s`, `5m` or `1h30m`; None without one."""
    if not durations:
        return None
    text = ", ".join(durations)
    found = DURATION.fullmatch(text.strip())
    hours, minutes, seconds = map(int, found.groups("0")) if found else (0, 0, 0)
    lifetime = timedelta(hours=hours, minutes=minutes, seconds=seconds)
    if not SHORTEST <= lifetime <= PREDICTION_LIFETIME:
        wrong = f"Cancel-After is {text[:80]!r}; it must be a time from 5 seconds to 24 hours, such as 30s or 1h30m."
        raise problem(422, "Bad header", wrong)
    return lifetime


def _show_file(file: File, base: str) -> dict[str, Any]:
    names = ("id", "name", "content_type", "size", "created_at", "expires_at")
    return {
        **{name: getattr(file, name) for name in names},
        "etag": file.sha256,
        "checksums": {"sha256": file.sha256},
        "metadata": (file.about or {}).get("metadata", {}),
        "urls": {"get": f"{base}/v1/files/{file.id}"},
    }
