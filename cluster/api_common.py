"""What Cog's HTTP and Replicate's have in common: validation, bodies, who may ask, and answers to what goes wrong.

This module knows HTTP and inputs; it knows nothing of either API's endpoints.
"""

import asyncio
import hmac
import ipaddress
import logging
import os
import re
import uuid
from base64 import b32encode
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import Any

import jsonschema_rs
from sqlalchemy.exc import DataError, DBAPIError, StatementError
from starlette.convertors import Convertor, register_url_convertor
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from cluster.addresses import BadHost
from cluster.bodies import Unread
from cluster.database import describe
from cluster.failures import Failure, places
from cluster.files import Inlined
from cluster.playground_page import OPEN
from cluster.predictions import Prediction, QueueFull, now
from cluster.privacy import SHOWN_CHARACTERS, redact_log, secrets_of, show_input
from cluster.unknown import notice
from service import strict_json
from service.guard import find_fault

logger = logging.getLogger("ray.serve")

# A prediction has some thirty inputs.
MAX_VALUES = 10_000
RETRY_AFTER_SECONDS = 5
PROBLEM = {"content-type": "application/problem+json"}
# Load balancers ask by whatever Host they like.
PROBE = "/-/healthz"
# Where a form is sent; all other bodies are JSON.
UPLOADS = "/v1/files"
# Open to whoever knows the address: probes; files and streams, whose addresses nobody can guess; and the pages, which a
# browser asks for without a token, and which say no more than how to ask.
OPEN_PATHS = re.compile(
    r"/-/healthz|/health-check|/docs|/files/[^/]+/[^/]+|/v1/files/[^/]+/stream/[^/]+|" + "|".join(map(re.escape, OPEN))
)

# What else than a prediction has a name in a path; those of files begin with any of these.
PATH_NAME = r"[A-Za-z0-9_~-][A-Za-z0-9_.~-]{0,127}"


class Name(Convertor[str]):
    """A part of a path that names something which is known here, or nothing: no other is looked up."""

    # Without the last part, the end of the pattern would also match before a line end.
    regex = PATH_NAME + r"(?!\n)"

    def convert(self, value: str) -> str:
        """As it stands; uvicorn has decoded it."""
        return value


register_url_convertor("name", Name())


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
    """JSON as coglet writes it."""
    text = strict_json.compact(body, sort=sort)
    return Response(text, status, {"content-type": "application/json", **(headers or {})})


class Streamed(StreamingResponse):
    """An answer in pieces; where one cannot be made, the connection ends before the answer does."""

    async def stream_response(self, send: Send) -> None:
        """Send all of it."""
        try:
            await super().stream_response(send)
        except Exception as error:
            logger.warning("An answer is cut off: %s", places(error))


def answer_inlined(shown: Inlined, status: int) -> Streamed:
    """JSON with files inside, which are read while the client receives it."""
    headers = {"content-type": "application/json", "content-length": str(shown.length)}
    return Streamed(shown.pieces(), status, headers)


def problem(status: int, title: str, detail: str, **more: object) -> Refused:
    """An answer in Replicate's form for what went wrong."""
    return Refused(status, {"title": title, "detail": detail, "status": status, **more}, PROBLEM)


def exception_handlers() -> Mapping[Any, Callable[[Request, Any], Response]]:
    """What is answered where an endpoint raises: Replicate's form under /v1, else Cog's, which says little."""

    def refused(_: Request, error: Refused) -> Response:
        return error.response()

    def unread(request: Request, error: Unread) -> Response:
        cogs = "Failed to buffer the request body: length limit exceeded" if error.status == 413 else error.detail
        refused = _refuse(request, error.status, error.title, error.detail, cogs)
        if error.status == 408:
            refused.headers["connection"] = "close"
        return refused.response()

    def bad_host(request: Request, error: BadHost) -> Response:
        return _refuse(request, 400, "Bad host", str(error), str(error)).response()

    def full(request: Request, error: QueueFull) -> Response:
        return _unavailable(request, str(error))

    def failed(request: Request, error: DBAPIError) -> Response:
        return _unavailable(request, f"The {describe(error)}; try again.")

    def unstorable(request: Request, _: StatementError) -> Response:
        detail = "The request has text or a number in it that the database cannot store."
        return _refuse(request, 422, "Bad request", detail, detail).response()

    def store_failed(request: Request, error: Failure) -> Response:
        return _unavailable(request, error.sentence)

    def left(_: Request, __: ClientDisconnect) -> Response:
        return Response(status_code=400)  # nobody hears it

    def unknown(request: Request, error: HTTPException) -> Response:
        if _is_replicates(request):
            title = {404: "Not found", 405: "Method not allowed"}.get(error.status_code, "Bad request")
            return problem(error.status_code, title, "The requested resource could not be found.").response()
        allow = ",".join(sorted((error.headers or {}).get("Allow", "").split(", ")))
        return Response(status_code=error.status_code, headers={"allow": allow} if allow else None)

    return {
        Refused: refused,
        Unread: unread,
        BadHost: bad_host,
        QueueFull: full,
        Failure: store_failed,
        DBAPIError: failed,
        DataError: unstorable,
        StatementError: unstorable,
        ClientDisconnect: left,
        HTTPException: unknown,
    }


def _unavailable(request: Request, detail: str) -> Response:
    """Not now, but soon."""
    refused = _refuse(request, 503, "Unavailable", detail, {"error": detail, "status": "failed"})
    refused.headers["retry-after"] = str(RETRY_AFTER_SECONDS)
    return refused.response()


def _refuse(request: Request, status: int, title: str, detail: str, cogs: object) -> Refused:
    """An answer in Replicate's form under /v1, else what Cog would answer."""
    return problem(status, title, detail) if _is_replicates(request) else Refused(status, cogs)


def _is_replicates(request: Request) -> bool:
    return request.scope["path"].startswith("/v1/")


class Authorised:
    """Lets requests through that have one of the tokens; where there are no tokens, those that come over loopback.

    Loopback is no login: without tokens, what a foreign web page may have sent is refused.
    """

    def __init__(self, app: ASGIApp, tokens: frozenset[str]) -> None:
        self.app, self.tokens = app, tokens

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        refused = self._refuse(Request(scope)) if scope["type"] == "http" else None
        await (refused.response() if refused else self.app)(scope, receive, send)

    def _refuse(self, request: Request) -> Refused | None:
        server, path = request.scope.get("server"), request.scope["path"]
        if not self.tokens and server and ipaddress.ip_address(server[0]).is_loopback:
            return _refuse_foreign(request)
        if OPEN_PATHS.fullmatch(path):
            return None
        if not self.tokens:
            return problem(401, "Unauthenticated", "This cluster has no tokens; API_TOKENS must be set to open it.")
        kind, _, token = request.headers.get("authorization", "").partition(" ")
        # Headers are read as Latin-1, whatever they are.
        known = any(hmac.compare_digest(token.encode("latin-1"), os.fsencode(known)) for known in self.tokens)
        if known and kind.lower() in ("bearer", "token"):
            return None
        return problem(401, "Unauthenticated", "You did not pass a valid authentication token")


def _refuse_foreign(request: Request) -> Refused | None:
    """What is answered where a request may be a foreign page's, before its body is read."""
    path = request.scope["path"]
    if path == PROBE or not (fault := find_fault(request.headers.items(), form=path == UPLOADS)):
        return None
    status, sentence = fault
    detail = f"API_TOKENS is not set, and {sentence}"
    return _refuse(request, status, HTTPStatus(status).phrase, detail, detail)


class Turns:
    """Lets a few at a time do what takes much, and some more wait."""

    def __init__(self, at_once: int, waiting: int) -> None:
        self.running, self.asked, self.most = asyncio.Semaphore(at_once), 0, at_once + waiting

    @asynccontextmanager
    async def take(self, request: Request) -> AsyncIterator[None]:
        """Wait for a turn.

        Raises:
            QueueFull: too many wait; ClientDisconnect: the client has not waited.
        """
        if self.asked >= self.most:
            raise QueueFull("Too many ask for this at once. Try again later.")
        self.asked += 1
        try:
            async with self.running:
                if await request.is_disconnected():
                    raise ClientDisconnect
                yield
        finally:
            self.asked -= 1


class InputSchema:
    """What Cog validates inputs by: the `Input` of its OpenAPI document, through the library that coglet has inside."""

    def __init__(self, document: dict[str, Any]) -> None:
        self.document = document
        inputs = document["components"]["schemas"]["Input"]
        self.names, self.required = inputs["properties"].keys(), inputs.get("required", [])
        root = {"$ref": "#/components/schemas/Input", "components": document["components"]}
        self.validator = jsonschema_rs.validator_for(root)

    def read(self, value: Any) -> tuple[Any, str | None]:  # noqa: ANN401 (JSON)
        """What the predictor knows of an input, and the log's line about the rest, which Cog drops; null is absence."""
        if not isinstance(value, dict):
            return value, None
        given = {name: item for name, item in value.items() if item is not None}
        known = {name: item for name, item in given.items() if name in self.names}
        return known, notice([name for name in given if name not in known], self.names)

    def problems(self, value: Any) -> list[dict[str, Any]]:  # noqa: ANN401 (JSON)
        """What is wrong with an input, in pydantic's form; empty where nothing is."""
        if self.validator.is_valid(value):
            return []
        # A message tells the value: of a long one, what may be shown. It may have been wrong for its length alone.
        errors = list(self.validator.iter_errors(_cut(value))) or [*self.validator.iter_errors(value)]
        secrets = secrets_of(value)
        problems: list[dict[str, Any]] = []
        absent = [name for name in self.required if isinstance(value, dict) and name not in value]
        for error in errors:
            if "is a required property" in error.message:
                while absent:
                    problems.append(_problem(absent.pop(0), "Field required", "value_error.missing"))
                continue
            place = "/".join(map(str, error.instance_path)) or "__root__"
            problems.append(_problem(place, redact_log(error.message[: 2 * SHOWN_CHARACTERS], secrets), "value_error"))
        return problems


def _cut(value: Any, characters: int = 10 * SHOWN_CHARACTERS) -> Any:  # noqa: ANN401 (JSON)
    """A value with the beginnings of its strings, the shorter the deeper they lie: there may be the more of them."""
    match value:
        case str():
            return value[:characters]
        case list():
            return [_cut(item, characters // 10) for item in value]
        case dict():
            return {key[:characters]: _cut(item, characters // 10) for key, item in value.items()}
    return value


def _problem(field: str, message: str, kind: str) -> dict[str, Any]:
    return {"loc": ["body", "input", field], "msg": message[:SHOWN_CHARACTERS], "type": kind}


def read_json(content: bytes) -> Any:  # noqa: ANN401 (JSON)
    """What a client's JSON says; a ValueError is a sentence that begins with "it"."""
    return strict_json.read(content, MAX_VALUES)


def new_prediction(front: str, inputs: Any, api: str, prediction_id: str | None = None, **fields: Any) -> Prediction:  # noqa: ANN401
    """A new prediction of a front; the id, if its client gave none, has 26 letters and digits that nobody can guess.

    Takes time in proportion to the inputs.
    """
    drawn = b32encode(uuid.uuid4().bytes).decode().lower().rstrip("=")
    return Prediction(prediction_id or drawn, front, now(), inputs, show_input(inputs), api, **fields)
