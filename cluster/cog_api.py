"""Cog's HTTP contract: what one coglet answers, the cluster answers.

It differs where a cluster must: a request waits where a busy coglet refuses it with 409, an id is remembered after its
prediction has ended, there is no `/shutdown`, `/` leads browsers to a page, and no answer shows a token. It takes null
for absence, and names in the log the inputs that it drops. It refuses what coglet takes and cannot use: ids that are
not 1 to 128 safe characters, webhooks that cannot be sent, JSON that not every reader understands alike. The dispatcher
runs predictions.
"""

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
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
# What coglet says at `/`, without what is not here, and what it cannot know.
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
    # Whether webhooks may go to private and loopback addresses.
    private_webhooks: bool
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

    async def _discover(self, request: Request) -> Response:
        if "text/html" in request.headers.get("accept", ""):  # a person's browser, where the address was typed
            return RedirectResponse("docs", headers={"vary": "accept"})
        return answer(DISCOVERY, headers={"vary": "accept"})

    async def _health(self, _: Request) -> Response:
        return answer(await self.health(), sort=False)

    async def _schema(self, _: Request) -> Response:
        return answer(self.schema.document)

    async def _create(self, request: Request) -> Response:
        return await self._run(request)

    async def _create_idempotent(self, request: Request) -> Response:
        return await self._run(request, request.path_params["prediction_id"])

    async def _cancel(self, request: Request) -> Response:
        prediction_id = request.path_params["prediction_id"]
        found = PREDICTION_ID.fullmatch(prediction_id) and await self.dispatcher.cancel(prediction_id)
        return answer({}, 200 if found else 404)

    async def _run(self, request: Request, prediction_id: str | None = None) -> Response:
        prediction, created = await self._accept(request, prediction_id)
        if not created:
            return await self._show_known(prediction)
        if request.headers.get("prefer") == "respond-async":
            return answer({"id": prediction.id, "status": "starting"}, 202)
        return await self._final(await self._ended_or_left(prediction, request))

    async def _accept(self, request: Request, path_id: str | None) -> tuple[Prediction, bool]:
        """The prediction that a request asks for, and whether it is a new one; its body is gone when this returns."""

        def parse(content: bytes) -> tuple[str | None, Prediction | Refused]:
            body = _read(content, request.headers.get("content-type"), path_id, self.private_webhooks)
            return body.get("id"), self._prediction(body)

        async with self.bodies.read(request, parse) as (given_id, asked):
            # A known id is answered before its input is looked at, as by coglet.
            if given_id is not None and (known := await self.predictions.get(given_id)):
                return known, False
            if "text/event-stream" in request.headers.get("accept", ""):
                raise Refused(406, {"error": NO_EVENTS})
            if isinstance(asked, Refused):
                raise asked
            return await self.dispatcher.accept(asked)

    def _prediction(self, body: dict[str, Any]) -> Prediction | Refused:
        """A prediction of a body as it must be, or what is wrong with its input."""
        inputs, notice = self.schema.read({} if body.get("input") is None else body["input"])
        if problems := self.schema.problems(inputs):
            return Refused(422, {"detail": problems})
        hook = {"webhook": body.get("webhook"), "webhook_events": body.get("webhook_events_filter", list(EVENTS))}
        return new_prediction(self.dispatcher.front, inputs, "cog", body.get("id"), notice=notice, **hook)

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
            return await self._final(prediction)
        return await self._show(prediction, 202, input=prediction.shown_input)

    async def _final(self, prediction: Prediction) -> Response:
        """The answer to a synchronous request; coglet leaves its logs out of it where there is no output."""
        changes = {} if prediction.status == "succeeded" else {"logs": prediction.notice or ""}
        return await self._show(prediction, 200, **changes)

    async def _show(self, prediction: Prediction, status: int, **changes: object) -> Response:
        return answer_inlined(await self.forms.cog(prediction, **changes), status)


def _read(content: bytes, kind: str | None, path_id: str | None, private_webhooks: bool) -> dict[str, Any]:
    """The body as coglet reads it, with the id that the path has; Refused where it is not as it must be."""
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
    """The events that a client wants to hear of."""
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
        raise _wrong(
            "id",
            f"id is {prediction_id[:128]!r}; it must have 1 to 128 letters, digits and _ . ~ - of ASCII, and begin "
            "with a letter or digit.",
        )


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
