"""Replicate's HTTP API at the front of the cluster, as far as its official clients use it for predictions.

One predictor answers under every model, version and deployment name, so that code written for Replicate changes its
base URL and nothing else. This module knows Replicate's forms and who may ask; how a prediction comes to run, it asks
of the front. Whoever has a token sees every prediction: the tokens are one account's.
"""

import asyncio
import base64
import hashlib
import hmac
import ipaddress
import json
import re
import time
from collections.abc import AsyncIterator, Callable, Mapping
from importlib.metadata import version as package_version
from typing import TYPE_CHECKING, Any

from sqlalchemy.exc import OperationalError
from starlette.datastructures import Headers, UploadFile
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from cluster.cog_api import EVENTS, InputSchema, Refused, read_body
from cluster.predictions import File, Prediction, content_type, now, redact
from local_cog.server import MAX_FILE_BYTES

if TYPE_CHECKING:
    from cluster.front import Front

# The name of what runs here, where the client gave none.
OWNER, NAME = "flux-sprites", "flux-sprites"
# How long a client may make a request wait, as at Replicate.
MAX_WAIT_SECONDS = 60
RETRY_AFTER_SECONDS = 5
STREAM_SECONDS = 0.5
# What is open to whoever knows the address: probes, and files and streams whose addresses nobody can guess.
OPEN_PATHS = re.compile(r"/-/healthz|/health-check|/files/[^/]+/[^/]+|/v1/files/[^/]+/stream/[^/]+")


def routes(front: "Front") -> list[BaseRoute]:
    """Replicate's endpoints over a front, and the files that its outputs point to."""

    async def create(request: Request) -> Response:
        body = await _read(request)
        if "owner" in request.path_params:
            model, version = "{owner}/{name}".format(**request.path_params), None
        else:
            model, version = _resolve(body.get("version"))
        prediction = _prediction(front, request, body, model, version)
        wait = _wait_seconds(request.headers.get("prefer", ""))
        await front.accept(prediction)
        if wait is None:
            return JSONResponse(show(front, prediction), 201)
        prediction = await front.ended(prediction, wait)
        shown = show(front, prediction)
        # Clients take any other status for the end.
        return JSONResponse(shown, 201) if prediction.finished else JSONResponse({**shown, "status": "starting"}, 202)

    async def get(request: Request) -> Response:
        return JSONResponse(show(front, await _known(front, request)))

    async def list_(request: Request) -> Response:
        try:
            page = await front.predictions.page(request.query_params.get("cursor"))
        except ValueError as error:
            raise problem(400, "Bad cursor", str(error)) from None
        address = f"{_base_url(request)}/v1/predictions?cursor="
        return JSONResponse(
            {
                "previous": page.previous and address + page.previous,
                "next": page.next and address + page.next,
                "results": [show(front, prediction) for prediction in page.predictions],
            }
        )

    async def cancel(request: Request) -> Response:
        prediction = await _known(front, request)
        if await front.cancel(prediction.id):
            # What only waited has ended at once; what runs ends soon.
            prediction = await front.ended(prediction, 1)
        return JSONResponse(show(front, prediction))

    async def stream(request: Request) -> Response:
        prediction = await _known(front, request)
        if not hmac.compare_digest(request.path_params["key"], _stream_key(front, prediction.id)):
            raise problem(404, "Not found", "There is no such stream.")
        return StreamingResponse(_events(front, prediction), media_type="text/event-stream")

    async def model(request: Request) -> Response:
        return JSONResponse(_model(front, request))

    async def versions(request: Request) -> Response:
        return JSONResponse({"previous": None, "next": None, "results": [_version(front, version_id(front.schema))]})

    async def version(request: Request) -> Response:
        return JSONResponse(_version(front, request.path_params["version"]))

    async def deployment(request: Request) -> Response:
        return JSONResponse(_deployment(front, request))

    async def account(_: Request) -> Response:
        return JSONResponse({"type": "organization", "username": OWNER, "name": OWNER, "github_url": None})

    async def secret(_: Request) -> Response:
        return JSONResponse({"key": f"whsec_{base64.b64encode(front.webhook_secret.encode()).decode()}"})

    async def upload(request: Request) -> Response:
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
            file = await front.files.write(data, content.filename or "file", kind, about={"metadata": about})
        await front.predictions.add_file(file)
        return JSONResponse(_file(request, file), 201)

    async def uploads(request: Request) -> Response:
        results = [_file(request, file) for file in await front.predictions.uploads()]
        return JSONResponse({"previous": None, "next": None, "results": results})

    async def upload_(request: Request) -> Response:
        file = await front.predictions.file(request.path_params["file_id"])
        if file is None or file.about is None:
            raise problem(404, "Not found", "There is no such file; files are kept for an hour.")
        if request.method != "DELETE":
            return JSONResponse(_file(request, file))
        await front.predictions.delete_file(file.id)
        await front.files.delete([file.id])
        return Response(status_code=204)

    async def download(request: Request) -> Response:
        try:
            content = await front.files.read(request.path_params["file_id"])
        except FileNotFoundError:
            raise problem(404, "Not found", "There is no such file; files are kept for an hour.") from None
        # A stranger's file must not act as a page of this host.
        headers = {"x-content-type-options": "nosniff", "content-security-policy": "sandbox"}
        return Response(content, media_type=content_type(request.path_params["name"]), headers=headers)

    return [
        Route("/v1/predictions", create, methods=["POST"]),
        Route("/v1/models/{owner}/{name}/predictions", create, methods=["POST"]),
        Route("/v1/deployments/{owner}/{name}/predictions", create, methods=["POST"]),
        Route("/v1/predictions", list_),
        Route("/v1/predictions/{prediction_id}", get),
        Route("/v1/predictions/{prediction_id}/cancel", cancel, methods=["POST"]),
        Route("/v1/models/{owner}/{name}", model),
        Route("/v1/models/{owner}/{name}/versions", versions),
        Route("/v1/models/{owner}/{name}/versions/{version}", version),
        Route("/v1/deployments/{owner}/{name}", deployment),
        Route("/v1/account", account),
        Route("/v1/webhooks/default/secret", secret),
        Route("/v1/files", upload, methods=["POST"]),
        Route("/v1/files", uploads),
        Route("/v1/files/{file_id}", upload_, methods=["GET", "DELETE"]),
        Route("/v1/files/{prediction_id}/stream/{key}", stream),
        Route("/files/{file_id}/{name}", download),
    ]


def show(front: "Front", prediction: Prediction) -> dict[str, Any]:
    """A prediction as Replicate shows it; its output points to files of the front."""
    base = prediction.base_url
    address = f"{base}/v1/predictions/{prediction.id}"
    return {
        "id": prediction.id,
        "model": prediction.model,
        "version": prediction.version,
        "input": prediction.input,
        "logs": _lines(prediction.logs),
        "output": _absolute(prediction.output, base),
        "error": prediction.error,
        "status": prediction.status,
        "created_at": prediction.created_at,
        "started_at": prediction.started_at,
        "completed_at": prediction.completed_at,
        "data_removed": False,
        "metrics": prediction.metrics,
        "source": "api",
        "urls": {
            "get": address,
            "cancel": f"{address}/cancel",
            "stream": f"{base}/v1/files/{prediction.id}/stream/{_stream_key(front, prediction.id)}",
        },
    }


def signed(secret: str, delivery: str, body: str) -> dict[str, str]:
    """The headers by which a client knows that a webhook is from here, as Replicate's.

    Args:
        secret: as in the database.
        delivery: the same for every attempt at one delivery, so that the receiver can drop what it has.
        body: as sent.
    """
    timestamp = str(int(time.time()))
    digest = hmac.digest(secret.encode(), f"{delivery}.{timestamp}.{body}".encode(), "sha256")
    signature = f"v1,{base64.b64encode(digest).decode()}"
    return {"webhook-id": delivery, "webhook-timestamp": timestamp, "webhook-signature": signature}


def upload_id(value: str) -> str | None:
    """The id of the upload that an input names; None where it names none."""
    found = re.fullmatch(r"https?://[^/]+/v1/files/([\w-]+)", value)
    return found and found[1]


def version_id(schema: InputSchema) -> str:
    """The name of what runs here: the same for the same inputs and outputs."""
    return hashlib.sha256(json.dumps(schema.document, sort_keys=True).encode()).hexdigest()


def problem(status: int, title: str, detail: str, **more: object) -> Refused:
    """An answer in Replicate's form for what went wrong."""
    return Refused(status, {"title": title, "detail": detail, "status": status, **more}, PROBLEM)


PROBLEM = {"content-type": "application/problem+json"}


# ---- Who may ask, and what is said to those who may not


class Authorised:
    """Lets those in who have a token; without tokens, those who come over loopback.

    Args:
        app: what is behind it.
        tokens: any of them will do.
    """

    def __init__(self, app: ASGIApp, tokens: frozenset[str]) -> None:
        self.app, self.tokens = app, tokens

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] == "http" and not OPEN_PATHS.fullmatch(scope["path"]) and (refused := self._refuse(scope)):
            await refused.response()(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    def _refuse(self, scope: Scope) -> Refused | None:
        if not self.tokens:
            if scope.get("server") and _is_loopback(scope["server"][0]):
                return None
            return problem(401, "Unauthenticated", "This cluster has no tokens; API_TOKENS must be set to open it.")
        kind, _, token = Headers(scope=scope).get("authorization", "").partition(" ")
        known = any(hmac.compare_digest(token.encode(), known.encode()) for known in self.tokens)
        if known and kind.lower() in ("bearer", "token"):
            return None
        return problem(401, "Unauthenticated", "You did not pass a valid authentication token")


def middleware(front: "Front") -> list[Middleware]:
    """What stands before every endpoint."""
    return [Middleware(Authorised, tokens=front.settings.api_tokens)]


def exception_handlers() -> Mapping[Any, Callable[[Request, Any], Response]]:
    """What is answered where an endpoint raises: Replicate's form under /v1, else Cog's, which says nothing."""

    def refused(_: Request, error: Refused) -> Response:
        return error.response()

    def unknown(request: Request, error: HTTPException) -> Response:
        if request.url.path.startswith("/v1/"):
            title = {404: "Not found", 405: "Method not allowed"}.get(error.status_code, "Bad request")
            return problem(error.status_code, title, "The requested resource could not be found.").response()
        allow = ",".join(sorted((error.headers or {}).get("Allow", "").split(", ")))
        return Response(status_code=error.status_code, headers={"allow": allow} if allow else None)

    def away(request: Request, _: OperationalError) -> Response:
        return unavailable("The database is away; try again.", cog=not request.url.path.startswith("/v1/")).response()

    return {Refused: refused, HTTPException: unknown, OperationalError: away}


def unavailable(detail: str, *, cog: bool) -> Refused:
    """Not now, but soon."""
    headers = {"retry-after": str(RETRY_AFTER_SECONDS)}
    if cog:
        return Refused(503, {"error": detail, "status": "failed"}, headers)
    return Refused(503, {"title": "Unavailable", "detail": detail, "status": 503}, {**PROBLEM, **headers})


def _is_loopback(host: str | None) -> bool:
    try:
        return ipaddress.ip_address(host or "").is_loopback
    except ValueError:
        return host == "localhost"


# ---- Requests


async def _read(request: Request) -> dict[str, Any]:
    try:
        body = json.loads(await read_body(request) or b"{}")
    except ValueError:
        raise problem(400, "Bad request", "The body is no JSON.") from None
    if not isinstance(body, dict) or not isinstance(body.get("input", {}), dict):
        raise problem(422, "Bad request", "The body must be an object whose input is one.")
    return body


def _resolve(version: object) -> tuple[str, str | None]:
    """What `version` asks for: a version's id, owner/name, or owner/name:id."""
    if not isinstance(version, str) or not version:
        fields = [{"type": "required", "field": "version", "description": "version is required"}]
        raise problem(422, "Input validation failed", "- version is required\n", invalid_fields=fields)
    model, _, number = version.rpartition(":") if ":" in version else (version, "", "")
    return (model, number or None) if "/" in model else (f"{OWNER}/{NAME}", version)


def _prediction(front: "Front", request: Request, body: dict[str, Any], model: str, version: str | None) -> Prediction:
    inputs = body.get("input", {})
    if problems := front.schema.problems(inputs):
        fields = [
            {"type": item["type"], "field": f"input.{item['loc'][-1]}", "description": item["msg"]} for item in problems
        ]
        detail = "".join(f"- {item['field']}: {item['description']}\n" for item in fields)
        raise problem(422, "Input validation failed", detail, invalid_fields=fields)
    webhook, events = body.get("webhook"), body.get("webhook_events_filter") or list(EVENTS)
    if webhook is None and body.get("webhook_completed"):
        webhook, events = body["webhook_completed"], ["completed"]
    if webhook is not None and not (isinstance(webhook, str) and re.match(r"https?://[^/]", webhook)):
        raise problem(422, "Bad webhook", "webhook must be an http or https URL.")
    if not isinstance(events, list) or not set(map(str, events)) <= set(EVENTS):
        raise problem(422, "Bad webhook", f"webhook_events_filter must be a list of {', '.join(EVENTS)}.")
    return Prediction(
        id=front.new_id(),
        owner=front.id,
        created_at=now(),
        request=inputs,
        input=redact(inputs),
        api="replicate",
        model=model,
        version=version or version_id(front.schema),
        base_url=_base_url(request),
        webhook=webhook,
        webhook_events=events,
    )


def _wait_seconds(prefer: str) -> float | None:
    """How long `Prefer: wait` or `Prefer: wait=5` waits; None where it does not."""
    found = re.search(r"\bwait(?:=(\d+))?", prefer)
    if not found:
        return None
    return min(int(found[1]), MAX_WAIT_SECONDS) if found[1] else MAX_WAIT_SECONDS


async def _known(front: "Front", request: Request) -> Prediction:
    prediction = await front.predictions.get(request.path_params["prediction_id"])
    if prediction is None or prediction.api != "replicate":
        raise problem(404, "Not found", "The requested resource could not be found.")
    return prediction


def _base_url(request: Request) -> str:
    """This front's address as the client wrote it."""
    scheme = request.headers.get("x-forwarded-proto", request.url.scheme)
    host = request.headers.get("x-forwarded-host") or request.headers.get("host", "")
    return f"{scheme}://{host}"


# ---- Answers


def _lines(logs: str) -> str:
    """Every state of a progress bar on a line of its own: clients look for the last line that is one."""
    return logs.replace("\r", "\n")


def _absolute(output: Any, base: str) -> Any:  # noqa: ANN401 (JSON)
    if isinstance(output, list):
        return [_absolute(item, base) for item in output]
    if isinstance(output, dict):
        return {key: _absolute(item, base) for key, item in output.items()}
    return base + output if isinstance(output, str) and output.startswith("/files/") else output


def _stream_key(front: "Front", prediction_id: str) -> str:
    return hmac.digest(front.webhook_secret.encode(), f"stream {prediction_id}".encode(), "sha256").hex()[:32]


async def _events(front: "Front", prediction: Prediction) -> AsyncIterator[str]:
    """A prediction's progress as server-sent events: logs and outputs as they come, an error, the end."""
    told, shown, count = "", 0, 0

    def event(kind: str, data: str) -> str:
        nonlocal count
        count += 1
        lines = "".join(f"data: {line}\n" for line in data.split("\n"))
        return f"event: {kind}\nid: {prediction.id}-{count}\n{lines}\n"

    while True:
        known = await front.predictions.get(prediction.id)
        if known is None:
            break
        if len(logs := _lines(known.logs)) > len(told):
            yield event("logs", logs[len(told) :])
            told = logs
        outputs = known.output if isinstance(known.output, list) else [known.output] if known.output else []
        for output in _absolute(outputs[shown:], known.base_url):
            yield event("output", output)
        shown = len(outputs)
        if known.finished:
            if known.status == "failed":
                yield event("error", json.dumps({"detail": known.error}))
            break
        await asyncio.sleep(STREAM_SECONDS)
    reason = {"reason": known.status if known and known.status != "succeeded" else ""}
    yield event("done", json.dumps({key: value for key, value in reason.items() if value}))


def _model(front: "Front", request: Request) -> dict[str, Any]:
    owner, name = request.path_params["owner"], request.path_params["name"]
    return {
        "url": f"{_base_url(request)}/v1/models/{owner}/{name}",
        "owner": owner,
        "name": name,
        "description": "FLUX.1 with LoRAs that change from one request to the next.",
        "visibility": "private",
        "github_url": None,
        "paper_url": None,
        "license_url": None,
        "run_count": 0,
        "cover_image_url": None,
        "default_example": None,
        "latest_version": _version(front, version_id(front.schema)),
    }


def _version(front: "Front", number: str) -> dict[str, Any]:
    return {
        "id": number,
        "created_at": front.started_at,
        "cog_version": package_version("cog"),
        "openapi_schema": front.schema.document,
    }


def _deployment(front: "Front", request: Request) -> dict[str, Any]:
    owner, name = request.path_params["owner"], request.path_params["name"]
    return {
        "owner": owner,
        "name": name,
        "current_release": {
            "number": 1,
            "model": f"{OWNER}/{NAME}",
            "version": version_id(front.schema),
            "created_at": front.started_at,
            "created_by": {"type": "organization", "username": OWNER, "name": OWNER, "github_url": None},
            "configuration": {"hardware": "gpu", "min_instances": 1, "max_instances": 1},
        },
    }


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
