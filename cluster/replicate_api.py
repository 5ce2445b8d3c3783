"""Replicate's HTTP API, as far as its official clients use it for predictions, and the files that outputs point to.

One predictor answers under every model, version and deployment name, so that code written for Replicate changes its
base URL and nothing else. Whoever has a token sees every prediction: the tokens are one account's. The dispatcher
runs predictions.
"""

import asyncio
import base64
import hashlib
import hmac
import json
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

from starlette.datastructures import UploadFile
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import BaseRoute, Route

from cluster.api_common import InputSchema, new_prediction, problem, read_body
from cluster.dispatcher import Dispatcher
from cluster.files import Files, content_type
from cluster.forms import Forms, absolute, lines
from cluster.predictions import File, Prediction, Predictions, now
from cluster.webhooks import EVENTS
from local_cog.server import MAX_FILE_BYTES

# The name of what runs here, where the client gave none.
OWNER, NAME = "flux-sprites", "flux-sprites"
ACCOUNT = {"type": "organization", "username": OWNER, "name": OWNER, "github_url": None}
# How long a client may make a request wait, as at Replicate.
MAX_WAIT_SECONDS = 60
STREAM_SECONDS = 0.5


@dataclass(frozen=True)
class ReplicateApi:
    """Replicate's endpoints."""

    dispatcher: Dispatcher
    predictions: Predictions
    files: Files
    forms: Forms
    schema: InputSchema
    # Signs webhooks; clients ask for it.
    secret: str
    started_at: str = field(default_factory=now)

    def routes(self) -> list[BaseRoute]:
        """Which endpoint answers where."""
        return [
            Route("/v1/predictions", self._create, methods=["POST"]),
            Route("/v1/models/{owner}/{name}/predictions", self._create, methods=["POST"]),
            Route("/v1/deployments/{owner}/{name}/predictions", self._create, methods=["POST"]),
            Route("/v1/predictions", self._list),
            Route("/v1/predictions/{prediction_id}", self._get),
            Route("/v1/predictions/{prediction_id}/cancel", self._cancel, methods=["POST"]),
            Route("/v1/models/{owner}/{name}", self._model),
            Route("/v1/models/{owner}/{name}/versions", self._versions),
            Route("/v1/models/{owner}/{name}/versions/{version}", self._version),
            Route("/v1/deployments/{owner}/{name}", self._deployment),
            Route("/v1/account", self._account),
            Route("/v1/webhooks/default/secret", self._secret),
            Route("/v1/files", self._upload, methods=["POST"]),
            Route("/v1/files", self._uploads),
            Route("/v1/files/{file_id}", self._uploaded, methods=["GET", "DELETE"]),
            Route("/v1/files/{prediction_id}/stream/{key}", self._stream),
            Route("/files/{file_id}/{name}", self._download),
        ]

    async def _create(self, request: Request) -> Response:
        body = await _read(request)
        if "owner" in request.path_params:
            model, number = "{owner}/{name}".format(**request.path_params), None
        else:
            model, number = _resolve(body.get("version"))
        prediction = self._prediction(request, body, model, number)
        wait = _wait_seconds(request.headers.get("prefer", ""))
        await self.dispatcher.accept(prediction)
        if wait is None:
            return JSONResponse(self.forms.replicate(prediction), 201)
        prediction = await self.dispatcher.ended(prediction, wait)
        shown = self.forms.replicate(prediction)
        # Clients take any other status for the end.
        return JSONResponse(shown, 201) if prediction.finished else JSONResponse({**shown, "status": "starting"}, 202)

    def _prediction(self, request: Request, body: dict[str, Any], model: str, number: str | None) -> Prediction:
        inputs = body.get("input", {})
        if problems := self.schema.problems(inputs):
            fields = [{"type": p["type"], "field": f"input.{p['loc'][-1]}", "description": p["msg"]} for p in problems]
            detail = "".join(f"- {item['field']}: {item['description']}\n" for item in fields)
            raise problem(422, "Input validation failed", detail, invalid_fields=fields)
        names = {"model": model, "version": number or self._number(), "base_url": _base_url(request)}
        return new_prediction(self.dispatcher.front, inputs, "replicate", **names, **_webhook(body))

    async def _known(self, request: Request) -> Prediction:
        prediction = await self.predictions.get(request.path_params["prediction_id"])
        if prediction is None or prediction.api != "replicate":
            raise problem(404, "Not found", "The requested resource could not be found.")
        return prediction

    async def _get(self, request: Request) -> Response:
        return JSONResponse(self.forms.replicate(await self._known(request)))

    async def _list(self, request: Request) -> Response:
        try:
            page = await self.predictions.page(request.query_params.get("cursor"))
        except ValueError as error:
            raise problem(400, "Bad cursor", str(error)) from None
        address = f"{_base_url(request)}/v1/predictions?cursor="
        shown = [self.forms.replicate(prediction) for prediction in page.predictions]
        previous, following = page.previous and address + page.previous, page.next and address + page.next
        return JSONResponse({"previous": previous, "next": following, "results": shown})

    async def _cancel(self, request: Request) -> Response:
        prediction = await self._known(request)
        if await self.dispatcher.cancel(prediction.id):
            # One that only waited has ended at once; one that runs ends soon.
            prediction = await self.dispatcher.ended(prediction, 1)
        return JSONResponse(self.forms.replicate(prediction))

    async def _stream(self, request: Request) -> Response:
        prediction = await self._known(request)
        if not hmac.compare_digest(request.path_params["key"], self.forms.stream_key(prediction.id)):
            raise problem(404, "Not found", "There is no such stream.")
        return StreamingResponse(_events(self.predictions, prediction.id), media_type="text/event-stream")

    async def _model(self, request: Request) -> Response:
        owner, name = request.path_params["owner"], request.path_params["name"]
        model = {
            "url": f"{_base_url(request)}/v1/models/{owner}/{name}",
            "owner": owner,
            "name": name,
            "description": "FLUX.1 with LoRAs that change from one request to the next.",
            "visibility": "private",
            **dict.fromkeys(("github_url", "paper_url", "license_url")),
            "run_count": 0,
            **dict.fromkeys(("cover_image_url", "default_example")),
            "latest_version": self._describe(self._number()),
        }
        return JSONResponse(model)

    async def _versions(self, _: Request) -> Response:
        return JSONResponse({"previous": None, "next": None, "results": [self._describe(self._number())]})

    async def _version(self, request: Request) -> Response:
        return JSONResponse(self._describe(request.path_params["version"]))

    def _describe(self, number: str) -> dict[str, Any]:
        about = {"id": number, "created_at": self.started_at, "cog_version": version("cog")}
        return {**about, "openapi_schema": self.schema.document}

    def _number(self) -> str:
        """The version that runs here: the same for the same inputs and outputs."""
        return hashlib.sha256(json.dumps(self.schema.document, sort_keys=True).encode()).hexdigest()

    async def _deployment(self, request: Request) -> Response:
        release = {
            "number": 1,
            "model": f"{OWNER}/{NAME}",
            "version": self._number(),
            "created_at": self.started_at,
            "created_by": ACCOUNT,
            "configuration": {"hardware": "gpu", "min_instances": 1, "max_instances": 1},
        }
        owner, name = request.path_params["owner"], request.path_params["name"]
        return JSONResponse({"owner": owner, "name": name, "current_release": release})

    async def _account(self, _: Request) -> Response:
        return JSONResponse(ACCOUNT)

    async def _secret(self, _: Request) -> Response:
        return JSONResponse({"key": f"whsec_{base64.b64encode(self.secret.encode()).decode()}"})

    async def _upload(self, request: Request) -> Response:
        async with request.form(max_part_size=MAX_FILE_BYTES) as form:
            content, metadata = form.get("content"), form.get("metadata")
            if not isinstance(content, UploadFile):
                raise problem(422, "No file", "content is missing; it must be the file.")
            data = await content.read(MAX_FILE_BYTES + 1)
            if len(data) > MAX_FILE_BYTES:
                limit = f"it must be at most {MAX_FILE_BYTES // 10**6} MB; give larger ones as a URL."
                raise problem(413, "File too large", f"The file is larger than that; {limit}")
            about = await metadata.read() if isinstance(metadata, UploadFile) else metadata
            try:
                about = json.loads(about or "{}")
            except ValueError:
                raise problem(422, "Bad metadata", "metadata must be JSON.") from None
            kind = content.content_type or "application/octet-stream"
            name = content.filename or "file"
            file = await self.files.write(data, name, kind, about={"metadata": about})
        await self.predictions.add_file(file)
        return JSONResponse(_file(request, file), 201)

    async def _uploads(self, request: Request) -> Response:
        results = [_file(request, file) for file in await self.predictions.uploads()]
        return JSONResponse({"previous": None, "next": None, "results": results})

    async def _uploaded(self, request: Request) -> Response:
        file = await self.predictions.file(request.path_params["file_id"])
        if file is None or file.about is None:
            raise problem(404, "Not found", "There is no such file; files are kept for an hour.")
        if request.method != "DELETE":
            return JSONResponse(_file(request, file))
        await self.predictions.delete_file(file.id)
        await self.files.delete([file.id])
        return Response(status_code=204)

    async def _download(self, request: Request) -> Response:
        try:
            content = await self.files.read(request.path_params["file_id"])
        except FileNotFoundError:
            raise problem(404, "Not found", "There is no such file; files are kept for an hour.") from None
        # A stranger's file must not act as a page of this host.
        headers = {"x-content-type-options": "nosniff", "content-security-policy": "sandbox"}
        return Response(content, media_type=content_type(request.path_params["name"]), headers=headers)


async def _read(request: Request) -> dict[str, Any]:
    try:
        body = json.loads(await read_body(request) or b"{}")
    except ValueError:
        raise problem(400, "Bad request", "The body is no JSON.") from None
    if not isinstance(body, dict) or not isinstance(body.get("input", {}), dict):
        raise problem(422, "Bad request", "The body must be an object whose input is one.")
    return body


def _resolve(asked: object) -> tuple[str, str | None]:
    """The model and the version that `version` asks for: a version's id, owner/name, or owner/name:id."""
    if not isinstance(asked, str) or not asked:
        fields = [{"type": "required", "field": "version", "description": "version is required"}]
        raise problem(422, "Input validation failed", "- version is required\n", invalid_fields=fields)
    model, _, number = asked.rpartition(":") if ":" in asked else (asked, "", "")
    return (model, number or None) if "/" in model else (f"{OWNER}/{NAME}", asked)


def _webhook(body: dict[str, Any]) -> dict[str, Any]:
    """Where the client wants to be told of which events."""
    webhook, events = body.get("webhook"), body.get("webhook_events_filter") or list(EVENTS)
    if webhook is None and body.get("webhook_completed"):
        webhook, events = body["webhook_completed"], ["completed"]
    if webhook is not None and not (isinstance(webhook, str) and re.match(r"https?://[^/]", webhook)):
        raise problem(422, "Bad webhook", "webhook must be an http or https URL.")
    if not isinstance(events, list) or not set(map(str, events)) <= set(EVENTS):
        raise problem(422, "Bad webhook", f"webhook_events_filter must be a list of {', '.join(EVENTS)}.")
    return {"webhook": webhook, "webhook_events": events}


def _wait_seconds(prefer: str) -> float | None:
    """How long `Prefer: wait` or `Prefer: wait=5` waits; None where it does not."""
    found = re.search(r"\bwait(?:=(\d+))?", prefer)
    return min(int(found[1] or MAX_WAIT_SECONDS), MAX_WAIT_SECONDS) if found else None


def _base_url(request: Request) -> str:
    """This front's address as the client wrote it."""
    scheme = request.headers.get("x-forwarded-proto", request.url.scheme)
    host = request.headers.get("x-forwarded-host") or request.headers.get("host", "")
    return f"{scheme}://{host}"


async def _events(predictions: Predictions, prediction_id: str) -> AsyncIterator[str]:
    """A prediction's progress as server-sent events: logs and outputs as they come, an error, the end."""
    told, shown, count = "", 0, 0

    def event(kind: str, data: str) -> str:
        nonlocal count
        count += 1
        text = "".join(f"data: {line}\n" for line in data.split("\n"))
        return f"event: {kind}\nid: {prediction_id}-{count}\n{text}\n"

    while known := await predictions.get(prediction_id):
        if len(logs := lines(known.logs)) > len(told):
            yield event("logs", logs[len(told) :])
            told = logs
        outputs = known.output if isinstance(known.output, list) else [known.output] if known.output else []
        for output in absolute(outputs[shown:], known.base_url):
            yield event("output", output)
        shown = len(outputs)
        if known.finished:
            if known.status == "failed":
                yield event("error", json.dumps({"detail": known.error}))
            break
        await asyncio.sleep(STREAM_SECONDS)
    yield event("done", json.dumps({"reason": known.status} if known and known.status != "succeeded" else {}))


def _file(request: Request, file: File) -> dict[str, Any]:
    return {
        "id": file.id,
        "name": file.name,
        "content_type": file.content_type,
        "size": file.size,
        "etag": file.sha256,
        "checksums": {"sha256": file.sha256},
        "metadata": (file.about or {}).get("metadata", {}),
        "created_at": file.created_at,
        "expires_at": file.expires_at,
        "urls": {"get": f"{_base_url(request)}/v1/files/{file.id}"},
    }
