"""Cog's HTTP contract at the front of the cluster: what one coglet answers, the cluster answers.

It differs where a cluster must: a request waits where a busy coglet refuses it with 409, an id is remembered after its
prediction has ended, `/shutdown` is nobody's to call, and nothing shows a token. This module knows Cog's HTTP and its
validation; how a prediction comes to run, it asks of the front.
"""

import base64
import copy
import json
from collections.abc import Mapping
from importlib.metadata import version
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import jsonschema_rs
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import BaseRoute, Route

from cluster.predictions import Prediction, content_type, now, redact

if TYPE_CHECKING:
    from cluster.front import Front

EVENTS = ("start", "output", "logs", "completed")
MAX_BODY_BYTES = 100 * 1024**2
UNREADABLE = "Failed to deserialize the JSON body into the target type: "


class Refused(Exception):  # noqa: N818 (an answer, not an accident)
    """A request that is answered at once.

    Args:
        status: of HTTP.
        body: text, or what becomes JSON.
    """

    def __init__(self, status: int, body: object, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(body)
        self.status, self.body, self.headers = status, body, dict(headers or {})

    def response(self) -> Response:
        """As HTTP."""
        if isinstance(self.body, str):
            return PlainTextResponse(self.body, self.status, self.headers)
        return answer(self.body, self.status, self.headers)


class InputSchema:
    """What Cog validates inputs by: the `Input` of its OpenAPI document, through the library that coglet has inside."""

    def __init__(self, document: dict[str, Any]) -> None:
        self.document = document
        schemas = document["components"]["schemas"]
        self.required = schemas["Input"].get("required", [])
        self.validator = jsonschema_rs.validator_for(_inlined(schemas["Input"], schemas))

    def problems(self, value: Any) -> list[dict[str, Any]]:  # noqa: ANN401 (JSON)
        """What is wrong with an input, in pydantic's form; empty where nothing is."""
        problems: list[dict[str, Any]] = []
        absent = [name for name in self.required if isinstance(value, dict) and name not in value]
        for error in self.validator.iter_errors(value):
            if "is a required property" in error.message:
                while absent:
                    problems.append(_problem(absent.pop(0), "Field required", "value_error.missing"))
                continue
            place = "/".join(map(str, error.instance_path)) or "__root__"
            problems.append(_problem(place, error.message, "value_error"))
        return problems


def routes(front: "Front") -> list[BaseRoute]:
    """Cog's endpoints over a front."""

    async def discover(_: Request) -> Response:
        return answer(
            {
                "cog_version": version("cog"),
                "docs_url": "/docs",
                "healthcheck_url": "/health-check",
                "openapi_url": "/openapi.json",
                "predictions_cancel_url": "/predictions/{prediction_id}/cancel",
                "predictions_idempotent_url": "/predictions/{prediction_id}",
                "predictions_url": "/predictions",
            }
        )

    async def health(_: Request) -> Response:
        return answer(await front.health(), ordered=False)

    async def schema(_: Request) -> Response:
        return answer(front.schema.document)

    async def create(request: Request) -> Response:
        body = await _read(request)
        return await _run(front, request, body, body.get("id") or front.new_id())

    async def create_idempotent(request: Request) -> Response:
        body = await _read(request)
        prediction_id = unquote(request.path_params["prediction_id"])
        if body.get("id") not in (None, prediction_id):
            message = "prediction ID must match the ID supplied in the URL"
            raise Refused(422, {"detail": [{"loc": ["body", "id"], "msg": message, "type": "value_error"}]})
        # A known id is answered before its input is looked at, as by coglet.
        if known := await front.predictions.get(prediction_id):
            return await _show_known(front, known)
        return await _run(front, request, body, prediction_id)

    async def cancel(request: Request) -> Response:
        found = await front.cancel(unquote(request.path_params["prediction_id"]))
        return answer({}, 200 if found else 404)

    return [
        Route("/", discover),
        Route("/health-check", health),
        Route("/openapi.json", schema),
        Route("/predictions", create, methods=["POST"]),
        Route("/predictions/{prediction_id}", create_idempotent, methods=["PUT"]),
        Route("/predictions/{prediction_id}/cancel", cancel, methods=["POST"]),
    ]


def answer(
    body: object, status: int = 200, headers: Mapping[str, str] | None = None, *, ordered: bool = True
) -> Response:
    """JSON as coglet writes it: compact, keys in order."""
    text = json.dumps(body, ensure_ascii=False, separators=(",", ":"), sort_keys=ordered)
    return Response(text, status, {"content-type": "application/json", **(headers or {})})


async def show(front: "Front", prediction: Prediction) -> dict[str, Any]:
    """A prediction as Cog's webhooks and answers show it: files inside, as data URIs."""
    body = {"id": prediction.id, "logs": prediction.logs, "metrics": prediction.metrics, "status": prediction.status}
    if prediction.output is not None:
        body["output"] = await _inside(front, prediction.output)
    if prediction.error is not None:
        body["error"] = prediction.error
    return body


async def _run(front: "Front", request: Request, body: dict[str, Any], prediction_id: str) -> Response:
    if "text/event-stream" in request.headers.get("accept", ""):
        message = "This model does not support streaming responses. Add @cog.streaming to predict() to enable SSE."
        raise Refused(406, {"error": message})
    value = {} if body.get("input") is None else body["input"]
    if problems := front.schema.problems(value):
        raise Refused(422, {"detail": problems})
    prediction = Prediction(
        id=prediction_id,
        owner=front.id,
        created_at=now(),
        request=value,
        input=redact(value),
        api="cog",
        webhook=body.get("webhook"),
        webhook_events=body.get("webhook_events_filter", list(EVENTS)),
    )
    known, created = await front.accept(prediction)
    if not created:
        return await _show_known(front, known)
    if request.headers.get("prefer") == "respond-async":
        return answer({"id": prediction_id, "status": "starting"}, 202)
    ended = await front.ended_or_left(prediction, request)
    return answer(await _final(front, ended))


async def _show_known(front: "Front", prediction: Prediction) -> Response:
    if prediction.finished:
        return answer(await _final(front, prediction))
    return answer({**await show(front, prediction), "input": prediction.input}, 202)


async def _final(front: "Front", prediction: Prediction) -> dict[str, Any]:
    """The answer to a synchronous request; coglet leaves the logs out of it where there is no output."""
    body = await show(front, prediction)
    return body if prediction.status == "succeeded" else {**body, "logs": ""}


async def _inside(front: "Front", output: Any) -> Any:  # noqa: ANN401 (JSON)
    if isinstance(output, list):
        return [await _inside(front, item) for item in output]
    if isinstance(output, dict):
        return {key: await _inside(front, item) for key, item in output.items()}
    if not (isinstance(output, str) and output.startswith("/files/")):
        return output
    _, _, file_id, name = output.split("/")
    try:
        content = base64.b64encode(await front.files.read(file_id)).decode()
    except FileNotFoundError:
        return None  # it has expired
    return f"data:{content_type(name)};base64,{content}"


async def _read(request: Request) -> dict[str, Any]:
    """The body as coglet reads it.

    Raises:
        Refused: it is too large, is no JSON, or has fields of other types.
    """
    content = await read_body(request)
    kind = request.headers.get("content-type")
    if kind is None and not content:
        return {}
    if (kind or "").partition(";")[0].strip() != "application/json":
        raise Refused(415, "Expected request with `Content-Type: application/json`")
    try:
        body = json.loads(content)
    except ValueError as error:
        raise Refused(400, f"Failed to parse the request body as JSON: {error}") from None
    if not isinstance(body, dict):
        raise Refused(422, f"{UNREADABLE}invalid type: {_kind(body)}, expected struct PredictionRequest")
    for name in ("id", "webhook"):
        if not isinstance(body.get(name), str | None):
            raise Refused(422, f"{UNREADABLE}{name}: invalid type: {_kind(body[name])}, expected a string")
    events = body.get("webhook_events_filter", [])
    if not isinstance(events, list):
        raise Refused(422, f"{UNREADABLE}webhook_events_filter: invalid type: {_kind(events)}, expected a sequence")
    for index, event in enumerate(events):
        if event not in EVENTS:
            names = ", ".join(f"`{name}`" for name in EVENTS)
            place = f"webhook_events_filter[{index}]"
            raise Refused(422, f"{UNREADABLE}{place}: unknown variant `{event}`, expected one of {names}")
    return body


async def read_body(request: Request) -> bytes:
    """The body, up to what Cog takes.

    Raises:
        Refused: it is larger.
    """
    content = bytearray()
    async for chunk in request.stream():
        content += chunk
        if len(content) > MAX_BODY_BYTES:
            raise Refused(413, "Failed to buffer the request body: length limit exceeded")
    return bytes(content)


def _kind(value: object) -> str:
    """A JSON value as Rust's serde names it."""
    match value:
        case None:
            return "null"
        case bool():
            return f"boolean `{str(value).lower()}`"
        case int():
            return f"integer `{value}`"
        case float():
            return f"floating point `{value}`"
        case str():
            return f"string {json.dumps(value)}"
        case list():
            return "sequence"
    return "map"


def _problem(field: str, message: str, kind: str) -> dict[str, Any]:
    return {"loc": ["body", "input", field], "msg": message, "type": kind}


def _inlined(schema: Any, schemas: dict[str, Any]) -> Any:  # noqa: ANN401 (JSON)
    """A schema that stands alone, without references into its document."""
    if isinstance(schema, list):
        return [_inlined(item, schemas) for item in schema]
    if not isinstance(schema, dict):
        return copy.copy(schema)
    if reference := schema.get("$ref"):
        return _inlined(schemas[reference.removeprefix("#/components/schemas/")], schemas)
    return {key: _inlined(value, schemas) for key, value in schema.items()}
