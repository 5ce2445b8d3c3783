"""Cog's HTTP contract: what one coglet answers, the cluster answers.

It differs where a cluster must: a request waits where a busy coglet refuses it with 409, an id is remembered after its
prediction has ended, there is no `/shutdown`, and no answer shows a token. The dispatcher runs predictions.
"""

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any
from urllib.parse import unquote

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from cluster.api_common import InputSchema, Refused, answer, new_prediction, read_body
from cluster.dispatcher import Dispatcher
from cluster.forms import Forms
from cluster.predictions import Prediction, Predictions
from cluster.webhooks import EVENTS

UNREADABLE = "Failed to deserialize the JSON body into the target type: "
DISCOVERY = {
    "cog_version": version("cog"),
    "docs_url": "/docs",
    "healthcheck_url": "/health-check",
    "openapi_url": "/openapi.json",
    "predictions_cancel_url": "/predictions/{prediction_id}/cancel",
    "predictions_idempotent_url": "/predictions/{prediction_id}",
    "predictions_url": "/predictions",
}


@dataclass(frozen=True)
class CogApi:
    """Cog's endpoints."""

    dispatcher: Dispatcher
    predictions: Predictions
    forms: Forms
    schema: InputSchema
    # What `GET /health-check` says.
    health: Callable[[], Awaitable[dict[str, Any]]]

    def routes(self) -> list[BaseRoute]:
        """Which endpoint answers where."""
        return [
            Route("/", self._discover),
            Route("/health-check", self._health),
            Route("/openapi.json", self._schema),
            Route("/predictions", self._create, methods=["POST"]),
            Route("/predictions/{prediction_id}", self._create_idempotent, methods=["PUT"]),
            Route("/predictions/{prediction_id}/cancel", self._cancel, methods=["POST"]),
        ]

    async def _discover(self, _: Request) -> Response:
        return answer(DISCOVERY)

    async def _health(self, _: Request) -> Response:
        return answer(await self.health(), sort=False)

    async def _schema(self, _: Request) -> Response:
        return answer(self.schema.document)

    async def _create(self, request: Request) -> Response:
        body = await _read(request)
        return await self._run(request, body, body.get("id"))

    async def _create_idempotent(self, request: Request) -> Response:
        body = await _read(request)
        prediction_id = unquote(request.path_params["prediction_id"])
        if body.get("id") not in (None, prediction_id):
            message = "prediction ID must match the ID supplied in the URL"
            raise Refused(422, {"detail": [{"loc": ["body", "id"], "msg": message, "type": "value_error"}]})
        # A known id is answered before its input is looked at, as by coglet.
        if known := await self.predictions.get(prediction_id):
            return await self._show_known(known)
        return await self._run(request, body, prediction_id)

    async def _cancel(self, request: Request) -> Response:
        found = await self.dispatcher.cancel(unquote(request.path_params["prediction_id"]))
        return answer({}, 200 if found else 404)

    async def _run(self, request: Request, body: dict[str, Any], prediction_id: str | None) -> Response:
        if "text/event-stream" in request.headers.get("accept", ""):
            message = "This model does not support streaming responses. Add @cog.streaming to predict() to enable SSE."
            raise Refused(406, {"error": message})
        inputs = {} if body.get("input") is None else body["input"]
        if problems := self.schema.problems(inputs):
            raise Refused(422, {"detail": problems})
        hook = {"webhook": body.get("webhook"), "webhook_events": body.get("webhook_events_filter", list(EVENTS))}
        prediction = new_prediction(self.dispatcher.front, inputs, "cog", prediction_id, **hook)
        known, created = await self.dispatcher.accept(prediction)
        if not created:
            return await self._show_known(known)
        if request.headers.get("prefer") == "respond-async":
            return answer({"id": prediction.id, "status": "starting"}, 202)
        return answer(await self._final(await self._ended_or_left(prediction, request)))

    async def _ended_or_left(self, prediction: Prediction, request: Request) -> Prediction:
        """Wait for the end of a prediction; it is cancelled when the client goes, as by coglet."""

        async def watch() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass
            await self.dispatcher.cancel(prediction.id)

        watching = asyncio.create_task(watch())
        try:
            return await self.dispatcher.ended(prediction)
        finally:
            watching.cancel()

    async def _show_known(self, prediction: Prediction) -> Response:
        if prediction.finished:
            return answer(await self._final(prediction))
        return answer({**await self.forms.cog(prediction), "input": prediction.shown_input}, 202)

    async def _final(self, prediction: Prediction) -> dict[str, Any]:
        """The answer to a synchronous request; coglet leaves the logs out of it where there is no output."""
        body = await self.forms.cog(prediction)
        return body if prediction.status == "succeeded" else {**body, "logs": ""}


async def _read(request: Request) -> dict[str, Any]:
    """The body as coglet reads it; Refused where it is too large, is no JSON, or has fields of other types."""
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


def _kind(value: object) -> str:
    """A JSON value as Rust's serde names it."""
    match value:
        case None:
            return "null"
        case bool():
            return f"boolean `{json.dumps(value)}`"
        case int():
            return f"integer `{value}`"
        case float():
            return f"floating point `{value}`"
        case str():
            return f"string {json.dumps(value)}"
    return "sequence" if isinstance(value, list) else "map"
