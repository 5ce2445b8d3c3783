"""Cog's HTTP contract: the cluster answers as one coglet does.

It differs where a cluster must: a request waits where a busy coglet refuses it with 409, an id is remembered after its
prediction has ended, there is no `/shutdown`, `/` leads browsers to a page, and no answer shows a token. Null means
absence, and the log names the inputs that are dropped. It refuses what coglet takes and cannot use: ids that are not 1
to 128 safe characters, webhooks that cannot be sent, JSON that readers may understand differently.
"""

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.routing import BaseRoute, Route

from cluster.api_common import InputSchema, Refused, answer, answer_inlined, new_prediction, read_json
from cluster.bodies import Bodies
from cluster.dispatcher import Dispatcher
from cluster.forms import Forms
from cluster.predictions import Prediction, Predictions
from cluster.webhooks import EVENTS, check_url
from local_cog.server import PREDICTION_ID
from settings import VERSION

UNREADABLE = "Failed to deserialize the JSON body into the target type: "
NO_EVENTS = "This model does not support streaming responses. Add @cog.streaming to predict() to enable SSE."
# coglet's answer at `/`, without endpoints that are not here, and with Replicate's API and the docs.
DISCOVERY = {
    "name": "flux-sprites",
    "version": VERSION,
    "replicate_predictions_url": "/v1/predictions",
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
    bodies: Bodies
    private_webhooks: bool  # whether webhooks may go to private and loopback addresses
    health: Callable[[], Awaitable[dict[str, Any]]]  # the answer to `GET /health-check`

    def routes(self) -> list[BaseRoute]:
        """Which endpoint answers where."""
        return [
            Route("/", self._discover),
            Route("/health-check", self._health),
            Route("/openapi.json", self._schema),
            Route("/predictions", self._create, methods=["POST"]),
            Route("/predictions/{prediction_id}", self._create, methods=["PUT"]),
            Route("/predictions/{prediction_id}/cancel", self._cancel, methods=["POST"]),
        ]

    async def _discover(self, request: Request) -> Response:
        if "text/html" in request.headers.get("accept", ""):  # a person's browser, where the address was typed
            return RedirectResponse("docs", headers={"vary": "accept"})
        return answer(DISCOVERY, headers={"vary": "accept"})

    async def _health(self, _: Request) -> Response:
        return JSONResponse(await self.health())

    async def _schema(self, _: Request) -> Response:
        return answer(self.schema.document)

    async def _cancel(self, request: Request) -> Response:
        prediction_id = request.path_params["prediction_id"]
        found = PREDICTION_ID.fullmatch(prediction_id) and await self.dispatcher.cancel(prediction_id)
        return answer({}, 200 if found else 404)

    async def _create(self, request: Request) -> Response:
        prediction, created = await self._accept(request)
        if created and request.headers.get("prefer") == "respond-async":
            return answer({"id": prediction.id, "status": "starting"}, 202)
        if created:
            prediction = await self._ended_or_left(prediction, request)
        elif not prediction.finished:
            return answer_inlined(await self.forms.cog(prediction, input=prediction.shown_input), 202)
        # coglet leaves its logs out where there is no output.
        logs = prediction.whole_log if prediction.status == "succeeded" else prediction.notice or ""
        return answer_inlined(await self.forms.cog(prediction, logs=logs), 200)

    async def _accept(self, request: Request) -> tuple[Prediction, bool]:
        """The prediction that a request asks for, and whether it is a new one; its body is freed on return."""

        def parse(content: bytes) -> tuple[str | None, Prediction | Refused]:
            kind, path_id = request.headers.get("content-type"), request.path_params.get("prediction_id")
            body = _read(content, kind, path_id, self.private_webhooks)
            return body.get("id"), self._prediction(body)

        async with self.bodies.read(request, parse) as (given_id, asked):
            # A known id is answered whatever its input, as by coglet.
            if given_id is not None and (known := await self.predictions.get(given_id)):
                return known, False
            if "text/event-stream" in request.headers.get("accept", ""):
                raise Refused(406, {"error": NO_EVENTS})
            if isinstance(asked, Refused):
                raise asked
            return await self.dispatcher.accept(asked)

    def _prediction(self, body: dict[str, Any]) -> Prediction | Refused:
        """The prediction of a body, or the answer to a wrong input."""
        inputs, notice = self.schema.read({} if body.get("input") is None else body["input"])
        if problems := self.schema.problems(inputs):
            return Refused(422, {"detail": problems})
        hook = {"webhook": body.get("webhook"), "webhook_events": body.get("webhook_events_filter", list(EVENTS))}
        return new_prediction(self.dispatcher.front, inputs, "cog", body.get("id"), notice=notice, **hook)

    async def _ended_or_left(self, prediction: Prediction, request: Request) -> Prediction:
        """The prediction when it has ended; it is cancelled if the client disconnects, as by coglet."""

        async def watch() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass
            await self.dispatcher.cancel(prediction.id)

        watching = asyncio.create_task(watch())
        try:
            return await self.dispatcher.ended(prediction)
        finally:
            watching.cancel()


def _read(content: bytes, kind: str | None, path_id: str | None, private_webhooks: bool) -> dict[str, Any]:
    """The body as coglet reads it, with the path's id; Refused where something is wrong with it."""
    if path_id is not None:
        _check_id(path_id)
    if kind is None and not content:
        return {"id": path_id}
    if (kind or "").partition(";")[0].strip() != "application/json":
        raise Refused(415, "Expected request with `Content-Type: application/json`")
    try:
        body = read_json(content)
    except ValueError as error:
        raise Refused(400, f"Failed to parse the request body as JSON: {error}") from None
    if not isinstance(body, dict):
        raise Refused(422, f"{UNREADABLE}invalid type: {_kind(body)}, expected struct PredictionRequest")
    for name in ("id", "webhook"):
        if not isinstance(body.get(name), str | None):
            raise Refused(422, f"{UNREADABLE}{name}: invalid type: {_kind(body[name])}, expected a string")
    if "webhook_events_filter" in body:
        body["webhook_events_filter"] = _events(body["webhook_events_filter"])
    if body.get("webhook") is not None:
        try:
            check_url(body["webhook"], allow_private=private_webhooks)
        except ValueError as error:
            raise _wrong("webhook", str(error)) from None
    if body.get("id") is not None:
        _check_id(body["id"])
        if path_id not in (None, body["id"]):
            raise _wrong("id", "prediction ID must match the ID supplied in the URL")
    return {**body, "id": path_id or body.get("id")}


def _events(events: object) -> list[str]:
    if not isinstance(events, list):
        raise Refused(422, f"{UNREADABLE}webhook_events_filter: invalid type: {_kind(events)}, expected a sequence")
    for index, event in enumerate(events):
        if event not in EVENTS:
            names = ", ".join(f"`{name}`" for name in EVENTS)
            place, said = f"webhook_events_filter[{index}]", str(event)[:80]
            raise Refused(422, f"{UNREADABLE}{place}: unknown variant `{said}`, expected one of {names}")
    return [event for event in EVENTS if event in events]


def _check_id(prediction_id: str) -> None:
    if not PREDICTION_ID.fullmatch(prediction_id):
        right = "it must have 1 to 128 letters, digits and _ . ~ - of ASCII, and begin with a letter or digit."
        raise _wrong("id", f"id is {prediction_id[:128]!r}; {right}")


def _wrong(field: str, message: str) -> Refused:
    return Refused(422, {"detail": [{"loc": ["body", field], "msg": message, "type": "value_error"}]})


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
            return f"string {json.dumps(value[:80])}"
    return "sequence" if isinstance(value, list) else "map"
