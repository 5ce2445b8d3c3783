"""The parts of hostile requests to a cluster; `harness.hostile_kinds` makes the requests from them.

A kind is a generator: given a stranger, it yields one request or several at once, and receives the answers. It opens no
connection and reads no clock, so the same seed makes the same bytes. `harness.cluster_fuzz` sends them and checks the
answers.
"""

import json
import random
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

T = TypeVar("T")
# A part of URLs and tokens in inputs; no answer, webhook or log may contain it.
MARK = "n0t-to-be-sh0wn"
# A forged Host, which must not appear in other clients' addresses.
EVIL = "evil.example"
# A receiver of webhooks at this path may not answer: last webhooks to it may be due for minutes.
DEAF = "/deaf"
# For a prompt that begins so, the predictor of `harness.cluster_fuzz` returns a file many times as large.
LARGE = "LARGE"


@dataclass(frozen=True)
class Sent:
    """The bytes that a client sends through one connection, with pauses in seconds.

    `ending` is the client's next action: "read" the answers, "leave", "reset" the connection, "half" (close its side,
    then read) or "stall" (hold the connection for its patience, and read nothing).
    """

    content: Iterable[bytes | float]
    ending: str = "read"
    # Seconds for which the client waits after the last byte.
    patience: float = 30
    # The number of answers due; 0 if the request is incomplete, since the server may wait for the rest.
    due: int = 1


@dataclass(frozen=True)
class Answer:
    """One answer of HTTP; the names of its headers are in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:  # noqa: ANN401 (JSON)
        """The body's value; an empty object if it is not JSON."""
        try:
            return json.loads(self.body)
        except ValueError:
            return {}


Script = Generator[Sent | list[Sent], list[Answer], None]


@dataclass(frozen=True)
class Kind:
    """One kind: its generator, and its time in multiples of the cheapest request's."""

    name: str
    script: Callable[["Stranger"], Script]
    cost: float


@dataclass(frozen=True)
class Scene:
    """A stranger's knowledge of the cluster."""

    host: str  # as honest clients write it
    token: str
    receivers: str  # URL of a host that takes webhooks badly
    known: Sequence[Mapping[str, Any]]  # ended predictions of somebody else, as Replicate shows them
    large: bool  # whether hundreds of megabytes are worth the time


@dataclass(frozen=True)
class Stranger:
    """The sender of one case: its number, its random numbers, and makers of the usual parts of requests."""

    scene: Scene
    number: int
    dice: random.Random = field(repr=False)

    def turn(self, options: Sequence[T]) -> T:
        """The next one of some options, from case to case."""
        return options[self.number % len(options)]

    def any(self, options: Sequence[T]) -> T:
        """A random one of some options."""
        return self.dice.choice(options)

    def size(self, low: int, high: int) -> int:
        """A number of a random order of magnitude."""
        return round(low * (high / low) ** self.dice.random())

    def name(self) -> str:
        """An unused id."""
        return f"s-{self.number}-{self.dice.randrange(10**9)}"

    def head(self, method: str | bytes, target: str | bytes, *headers: str | bytes, **options: Any) -> bytes:  # noqa: ANN401
        """The head of a request up to the empty line; `token`, `host`, `close` and `version` may be given."""
        given = {"token": f"Bearer {self.scene.token}", "host": self.scene.host, "close": True, "version": "HTTP/1.1"}
        given |= options
        lines = [octets(method) + b" " + octets(target) + b" " + octets(given["version"])]
        if given["host"] is not None:
            lines.append(b"Host: " + octets(given["host"]))
        if given["token"] is not None:
            lines.append(b"Authorization: " + octets(given["token"]))
        if given["close"]:
            lines.append(b"Connection: close")
        return b"\r\n".join([*lines, *map(octets, headers), b"", b""])

    def request(
        self,
        method: str,
        target: str,
        body: bytes = b"",
        *headers: str | bytes,
        ending: str = "read",
        **options: Any,  # noqa: ANN401
    ) -> Sent:
        """A whole request."""
        length = [f"Content-Length: {len(body)}"] if body or method not in ("GET", "HEAD", "DELETE") else []
        return Sent([self.head(method, target, *length, *headers, **options), body], ending)

    def get(self, target: str, *headers: str | bytes, **options: Any) -> Sent:  # noqa: ANN401
        """A GET request."""
        return self.request("GET", target, b"", *headers, **options)

    def door(self) -> tuple[str, str]:
        """A random endpoint that makes predictions."""
        return self.any(
            [
                ("POST", "/predictions"),
                ("PUT", f"/predictions/{self.name()}"),
                ("POST", "/v1/predictions"),
                ("POST", "/v1/models/some/model/predictions"),
                ("POST", "/v1/deployments/some/model/predictions"),
            ]
        )

    def create(
        self,
        body: Mapping[str, Any] | str | bytes,
        *headers: str | bytes,
        door: tuple[str, str] | None = None,
        kind: str | bytes | None = "application/json",
        **options: Any,  # noqa: ANN401
    ) -> Sent:
        """A request for a prediction at any endpoint, synchronous or not; the body as it is, or as JSON."""
        content = body if isinstance(body, str | bytes) else json.dumps(body)
        prefer = self.any([["Prefer: respond-async"], ["Prefer: wait=5"], []])
        typed = [] if kind is None else [b"Content-Type: " + octets(kind)]
        return self.request(*(door or self.door()), octets(content), *typed, *prefer, *headers, **options)

    def place(self, value: str, *headers: str, places: Sequence[str] = (), **options: Any) -> Sent:  # noqa: ANN401
        """A request for a prediction with the JSON of a value somewhere in it."""
        return self.create(self.turn(places or PLACES).replace("%", value), *headers, **options)


# Bodies with a place (%) for a value; a value in the first ones gets furthest.
INNER = (
    '{"version": "v", "input": {"prompt": "a", "strength": %}}',
    '{"version": "v", "input": {"prompt": "a", "unknown": %}}',
    '{"version": "v", "input": {"prompt": "a", "unknown": [{"a": %}]}}',
    '{"version": "v", "input": {"prompt": %}}',
    '{"version": "v", "input": {"prompt": "a", "replicate_weights": %}}',
)
PLACES = (
    *INNER,
    '{"version": "v", "input": {"prompt": "a"}, "context": %}',
    '{"version": "v", "input": {"prompt": "a"}, "webhook": %}',
    '{"version": "v", "input": {"prompt": "a"}, "webhook_events_filter": [%]}',
    '{"version": "v", "input": {"prompt": "a"}, "id": %}',
    '{"version": %, "input": {"prompt": "a"}}',
    '{"version": "v", "input": %}',
    "%",
)
TEXTS = (
    '{"version": "v", "input": {"prompt": %}}',
    '{"version": "v", "input": {"prompt": "a", "replicate_weights": %}}',
    '{"version": "v", "input": {"prompt": "a", %: 1}}',
    '{"version": "v", "input": {"prompt": "a", "unknown": {%: %}}}',
    '{"version": %, "input": {"prompt": "a"}}',
    '{"version": "v", "input": {"prompt": "a"}, "id": %}',
    '{"version": "v", "input": {"prompt": "a"}, "webhook": %}',
    '{"version": "v", "input": {"prompt": "a"}, "webhook_events_filter": [%]}',
    '{"version": "v", "input": {"prompt": "a"}, %: %}',
)
SMALL = {"version": "v", "input": {"prompt": "a"}}
# The endpoint whose answers show the input.
SHOWING = ("POST", "/v1/predictions")


def octets(text: str | bytes) -> bytes:
    """A text as UTF-8; bytes as they are."""
    return text if isinstance(text, bytes) else text.encode()
