"""What Cog's HTTP and Replicate's have in common: validation, bodies, who may ask, and answers to what goes wrong.

This module knows HTTP and inputs; it knows nothing of either API's endpoints.
"""

import hmac
import ipaddress
import json
import re
import uuid
from base64 import b32encode
from collections.abc import Callable, Mapping
from typing import Any

import jsonschema_rs
from sqlalchemy.exc import OperationalError
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from cluster.dispatcher import QueueFull
from cluster.predictions import Prediction, now
from cluster.privacy import redact_input

MAX_BODY_BYTES = 100 * 1024**2
RETRY_AFTER_SECONDS = 5
PROBLEM = {"content-type": "application/problem+json"}
# Open to whoever knows the address: probes, and files and streams, whose addresses nobody can guess.
OPEN_PATHS = re.compile(r"/-/healthz|/health-check|/files/[^/]+/[^/]+|/v1/files/[^/]+/stream/[^/]+")


class Refused(Exception):  # noqa: N818 (an answer, not an accident)
    """A request that is answered at once, with text or JSON."""

    def __init__(self, status: int, body: object, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(body)
        self.status, self.body, self.headers = status, body, dict(headers or {})

    def response(self) -> Response:
        """As HTTP."""
        if isinstance(self.body, str):
            return PlainTextResponse(self.body, self.status, self.headers)
        return answer(self.body, self.status, self.headers)


def answer(body: object, status: int = 200, headers: Mapping[str, str] | None = None, *, sort: bool = True) -> Response:
    """JSON as coglet writes it: compact, keys in order."""
    text = json.dumps(body, ensure_ascii=False, separators=(",", ":"), sort_keys=sort)
    return Response(text, status, {"content-type": "application/json", **(headers or {})})


def problem(status: int, title: str, detail: str, **more: object) -> Refused:
    """An answer in Replicate's form for what went wrong."""
    return Refused(status, {"title": title, "detail": detail, "status": status, **more}, PROBLEM)


def exception_handlers() -> Mapping[Any, Callable[[Request, Any], Response]]:
    """What is answered where an endpoint raises: Replicate's form under /v1, else Cog's, which says little."""

    def refused(_: Request, error: Refused) -> Response:
        return error.response()

    def full(request: Request, error: QueueFull) -> Response:
        return _unavailable(request, str(error))

    def away(request: Request, _: OperationalError) -> Response:
        return _unavailable(request, "The database is away; try again.")

    def unknown(request: Request, error: HTTPException) -> Response:
        if request.url.path.startswith("/v1/"):
            title = {404: "Not found", 405: "Method not allowed"}.get(error.status_code, "Bad request")
            return problem(error.status_code, title, "The requested resource could not be found.").response()
        allow = ",".join(sorted((error.headers or {}).get("Allow", "").split(", ")))
        return Response(status_code=error.status_code, headers={"allow": allow} if allow else None)

    return {Refused: refused, QueueFull: full, OperationalError: away, HTTPException: unknown}


def _unavailable(request: Request, detail: str) -> Response:
    """Not now, but soon."""
    cogs = Refused(503, {"error": detail, "status": "failed"})
    refused = problem(503, "Unavailable", detail) if request.url.path.startswith("/v1/") else cogs
    refused.headers["retry-after"] = str(RETRY_AFTER_SECONDS)
    return refused.response()


class Authorised:
    """Lets requests through that have one of the tokens; where there are no tokens, those that come over loopback."""

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
            if scope.get("server") and ipaddress.ip_address(scope["server"][0]).is_loopback:
                return None
            return problem(401, "Unauthenticated", "This cluster has no tokens; API_TOKENS must be set to open it.")
        kind, _, token = Headers(scope=scope).get("authorization", "").partition(" ")
        known = any(hmac.compare_digest(token.encode(), known.encode()) for known in self.tokens)
        if known and kind.lower() in ("bearer", "token"):
            return None
        return problem(401, "Unauthenticated", "You did not pass a valid authentication token")


class InputSchema:
    """What Cog validates inputs by: the `Input` of its OpenAPI document, through the library that coglet has inside."""

    def __init__(self, document: dict[str, Any]) -> None:
        self.document = document
        self.required = document["components"]["schemas"]["Input"].get("required", [])
        root = {"$ref": "#/components/schemas/Input", "components": document["components"]}
        self.validator = jsonschema_rs.validator_for(root)

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


def _problem(field: str, message: str, kind: str) -> dict[str, Any]:
    return {"loc": ["body", "input", field], "msg": message, "type": kind}


async def read_body(request: Request) -> bytes:
    """The body, up to what Cog takes; Refused where it is larger."""
    content = bytearray()
    async for chunk in request.stream():
        content += chunk
        if len(content) > MAX_BODY_BYTES:
            raise Refused(413, "Failed to buffer the request body: length limit exceeded")
    return bytes(content)


def new_prediction(front: str, inputs: Any, api: str, prediction_id: str | None = None, **fields: Any) -> Prediction:  # noqa: ANN401
    """A new prediction of a front; the id, if its client gave none, has 26 letters and digits that nobody can guess."""
    drawn = b32encode(uuid.uuid4().bytes).decode().lower().rstrip("=")
    return Prediction(prediction_id or drawn, front, now(), inputs, redact_input(inputs), api, **fields)
