"""What both APIs share: validation of inputs, authorisation, and the answers to errors.

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

from jsonschema_rs import ValidationErrorKind, validator_for
from sqlalchemy.exc import DataError, DBAPIError, StatementError
from starlette.convertors import StringConvertor, register_url_convertor
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

# What needs no token: probes; files and streams, whose addresses cannot be guessed; and the pages, which browsers load
# without one, and which only explain how to ask.
OPEN_PATHS = re.compile(
    r"/-/healthz|/health-check|/docs|/files/[^/]+/[^/]+|/v1/files/[^/]+/stream/[^/]+|" + "|".join(map(re.escape, OPEN))
)
# A name in a path; a file's may begin with any of these.
PATH_NAME = r"[A-Za-z0-9_~-][A-Za-z0-9_.~-]{0,127}"


class Name(StringConvertor):
    """A part of a path that may be a name; the path leads nowhere where it is none."""

    # Without the lookahead, the end of the route's pattern would also match before a line end.
    regex = PATH_NAME + r"(?!\n)"


register_url_convertor("name", Name())


class Refused(Exception):  # noqa: N818 (an answer, not an accident)
    """The end of a request: its answer, text or JSON."""

    def __init__(self, status: int, body: object, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(body)
        self.status, self.body, self.headers = status, body, dict(headers or {})

    def response(self) -> Response:
        """As HTTP."""
        if isinstance(self.body, str):
            return PlainTextResponse(self.body, self.status, self.headers)
        return answer(self.body, self.status, self.headers)


def answer(body: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """JSON as coglet writes it."""
    return Response(strict_json.compact(body), status, {"content-type": "application/json", **(headers or {})})


class Streamed(StreamingResponse):
    """An answer in pieces; where one cannot be made, the connection is closed early."""

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
    body = {"title": title, "detail": detail, "status": status, **more}
    return Refused(status, body, {"content-type": "application/problem+json"})


def exception_handlers() -> Mapping[Any, Callable[[Request, Any], Response]]:
    """The answers to exceptions of endpoints: in Replicate's form under /v1, else in Cog's, which says little."""

    def unread(request: Request, error: Unread) -> Response:
        cogs = "Failed to buffer the request body: length limit exceeded" if error.status == 413 else error.detail
        headers = {"connection": "close"} if error.status == 408 else {}
        return _refuse(request, error.status, error.title, error.detail, cogs, headers)

    def unstorable(request: Request, _: StatementError) -> Response:
        detail = "The request has text or a number in it that the database cannot store."
        return _refuse(request, 422, "Bad request", detail, detail)

    def unknown(request: Request, error: HTTPException) -> Response:
        if _is_replicates(request):
            title = {404: "Not found", 405: "Method not allowed"}.get(error.status_code, "Bad request")
            return problem(error.status_code, title, "The requested resource could not be found.").response()
        # Nothing but a header, as coglet answers.
        allow = ",".join(sorted((error.headers or {}).get("Allow", "").split(", ")))
        return Response(status_code=error.status_code, headers={"allow": allow} if allow else None)

    return {
        Refused: lambda _, error: error.response(),
        Unread: unread,
        BadHost: lambda request, error: _refuse(request, 400, "Bad host", str(error), str(error)),
        QueueFull: lambda request, error: _unavailable(request, str(error)),
        Failure: lambda request, error: _unavailable(request, error.sentence),
        DBAPIError: lambda request, error: _unavailable(request, f"The {describe(error)}; try again."),
        DataError: unstorable,
        StatementError: unstorable,
        ClientDisconnect: lambda _, __: Response(status_code=400),  # nobody reads it
        HTTPException: unknown,
    }


def _unavailable(request: Request, detail: str) -> Response:
    cogs, headers = {"error": detail, "status": "failed"}, {"retry-after": "5"}  # seconds
    return _refuse(request, 503, "Unavailable", detail, cogs, headers)


def _refuse(
    request: Request, status: int, title: str, detail: str, cogs: object, headers: Mapping[str, str] | None = None
) -> Response:
    """An answer in Replicate's form under /v1, else what Cog would answer."""
    refused = problem(status, title, detail) if _is_replicates(request) else Refused(status, cogs)
    refused.headers |= headers or {}
    return refused.response()


def _is_replicates(request: Request) -> bool:
    return request.scope["path"].startswith("/v1/")


class Authorised:
    """Lets requests with one of the tokens through; where there are no tokens, those over loopback.

    Loopback is no login: without tokens, a request that a foreign web page may have sent is refused.
    """

    def __init__(self, app: ASGIApp, tokens: frozenset[str]) -> None:
        self.app, self.tokens = app, tokens

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        refused = self._refuse(Request(scope)) if scope["type"] == "http" else None
        await (refused or self.app)(scope, receive, send)

    def _refuse(self, request: Request) -> Response | None:
        server = request.scope.get("server")
        if not self.tokens and server and ipaddress.ip_address(server[0]).is_loopback:
            return _refuse_foreign(request)
        if OPEN_PATHS.fullmatch(request.scope["path"]):
            return None
        if not self.tokens:
            detail = "This cluster has no tokens; API_TOKENS must be set to open it."
            return problem(401, "Unauthenticated", detail).response()
        kind, _, text = request.headers.get("authorization", "").partition(" ")
        given = text.encode("latin-1")  # as Starlette has decoded it
        is_known = any(hmac.compare_digest(given, os.fsencode(token)) for token in self.tokens)
        if is_known and kind.lower() in ("bearer", "token"):
            return None
        return problem(401, "Unauthenticated", "You did not pass a valid authentication token").response()


def _refuse_foreign(request: Request) -> Response | None:
    """The answer to a request that may be a foreign page's, before its body is read; None to any other."""
    path = request.scope["path"]
    if path == "/-/healthz":  # load balancers send any Host
        return None
    if not (fault := find_fault(request.headers.items(), form=path == "/v1/files")):
        return None
    status, sentence = fault
    detail = f"API_TOKENS is not set, and {sentence}"
    return _refuse(request, status, HTTPStatus(status).phrase, detail, detail)


class Turns:
    """Lets a few requests at a time do something costly, and some more wait."""

    def __init__(self, at_once: int, waiting: int) -> None:
        self.running, self.asked, self.most = asyncio.Semaphore(at_once), 0, at_once + waiting

    @asynccontextmanager
    async def take(self, request: Request) -> AsyncIterator[None]:
        """Wait for a turn; QueueFull where too many wait, ClientDisconnect where the client has gone."""
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
    """Validation of inputs by the `Input` of Cog's OpenAPI document, with coglet's own library."""

    def __init__(self, document: dict[str, Any]) -> None:
        self.document = document
        self.names = document["components"]["schemas"]["Input"]["properties"].keys()
        root = {"$ref": "#/components/schemas/Input", "components": document["components"]}
        self.validator = validator_for(root)

    def read(self, value: Any) -> tuple[Any, str | None]:  # noqa: ANN401 (JSON)
        """The inputs that the predictor has, and the log's line about the others, which Cog drops; null is absence."""
        if not isinstance(value, dict):
            return value, None
        given = {name: item for name, item in value.items() if item is not None}
        known = {name: item for name, item in given.items() if name in self.names}
        return known, notice([name for name in given if name not in known], self.names)

    def problems(self, value: Any) -> list[dict[str, Any]]:  # noqa: ANN401 (JSON)
        """The faults of an input, in pydantic's form; empty for a valid one."""
        if self.validator.is_valid(value):
            return []
        # A message quotes the value, which takes seconds for a long one. A string may be wrong for its length alone.
        errors = list(self.validator.iter_errors(_cut(value))) or [*self.validator.iter_errors(value)]
        secrets = secrets_of(value)
        problems = []
        for error in errors:
            if isinstance(error.kind, ValidationErrorKind.Required):
                field, message, kind = error.kind.property, "Field required", "value_error.missing"
            else:
                field, kind = "/".join(map(str, error.instance_path)) or "__root__", "value_error"
                message = redact_log(error.message[: 2 * SHOWN_CHARACTERS], secrets)[:SHOWN_CHARACTERS]
            problems.append({"loc": ["body", "input", field], "msg": message, "type": kind})
        return problems


def _cut(value: Any, characters: int = 10 * SHOWN_CHARACTERS) -> Any:  # noqa: ANN401 (JSON)
    """A value with its strings cut off, the deeper ones sooner, since there may be more of them."""
    match value:
        case str():
            return value[:characters]
        case list():
            return [_cut(item, characters // 10) for item in value]
        case dict():
            return {key[:characters]: _cut(item, characters // 10) for key, item in value.items()}
    return value


def read_json(content: bytes) -> Any:  # noqa: ANN401 (JSON)
    """The value of a client's JSON; a ValueError is a sentence that begins with "it"."""
    return strict_json.read(content, strict_json.REQUEST_VALUES)


def new_prediction(front: str, inputs: Any, api: str, prediction_id: str | None = None, **fields: Any) -> Prediction:  # noqa: ANN401
    """A new prediction of a front; an id that its client has not given is drawn, 26 letters and digits.

    Takes time in proportion to the inputs.
    """
    drawn = b32encode(uuid.uuid4().bytes).decode().lower().rstrip("=")
    return Prediction(prediction_id or drawn, front, now(), inputs, show_input(inputs), api, **fields)
