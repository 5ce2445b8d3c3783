"""What hostile requests to a cluster are made of; the kinds of them are in `harness.hostile_kinds`.

A kind is a generator: given a stranger, it yields what is sent, one thing or several at once, and is given the answers.
It opens no connection and knows no clock, so that the same seed makes the same bytes. Who sends them and who judges the
answers is `harness.cluster_fuzz`.
"""

import json
import random
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

T = TypeVar("T")
MIB = 1024**2
# What no answer, webhook or log may contain: parts of URLs and tokens among the inputs.
MARK = "n0t-to-be-sh0wn"
# Who is never shown to others as the address of anything.
EVIL = "evil.example"
# A receiver of webhooks with this path may be deaf: its predictions' last webhooks may be due for minutes.
DEAF = "/deaf"
# What the predictor of `harness.cluster_fuzz` draws for a prompt that begins so is many times as large.
LARGE = "LARGE"


@dataclass(frozen=True)
class Sent:
    """What goes through one connection: bytes, and pauses in seconds.

    `ending` is what the client does then: "read" the answers, "leave", "reset" the connection, "half" (close its side,
    then read) or "stall" (hold the connection for its patience, and read nothing).
    """

    content: Iterable[bytes | float]
    ending: str = "read"
    # Seconds for which the client waits after the last byte.
    patience: float = 30
    # How many answers are due; 0 where the request is not whole, and the server may well wait for the rest.
    due: int = 1


@dataclass(frozen=True)
class Answer:
    """One answer of HTTP; the names of its headers are in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:  # noqa: ANN401 (JSON)
        """The body's value; an empty object where it is no JSON."""
        try:
            return json.loads(self.body)
        except ValueError:
            return {}


Script = Generator[Sent | list[Sent], list[Answer], None]


@dataclass(frozen=True)
class Kind:
    """One kind: how it is made, and how many of the cheapest requests it costs as much time as."""

    name: str
    script: Callable[["Stranger"], Script]
    cost: float


@dataclass(frozen=True)
class Scene:
    """What a stranger knows of the place."""

    host: str  # as honest clients write it
    token: str
    receivers: str  # URL of a host that takes webhooks badly
    known: Sequence[Mapping[str, Any]]  # ended predictions of somebody else, as Replicate shows them
    large: bool  # whether hundreds of megabytes are worth the time


@dataclass(frozen=True)
class Stranger:
    """Whoever sends one case: its number, its dice, and the usual parts of requests."""

    scene: Scene
    number: int
    dice: random.Random = field(repr=False)

    def turn(self, options: Sequence[T]) -> T:
        """One after the other, from case to case."""
        return options[self.number % len(options)]

    def any(self, options: Sequence[T]) -> T:
        """One by chance."""
        return self.dice.choice(options)

    def size(self, low: int, high: int) -> int:
        """A number whose order of magnitude is by chance."""
        return round(low * (high / low) ** self.dice.random())

    def name(self) -> str:
        """An id that nobody has used."""
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
        """A look at something."""
        return self.request("GET", target, b"", *headers, **options)

    def door(self) -> tuple[str, str]:
        """One of the ways in which predictions are made."""
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
        """A prediction by any of the doors, waited for or not; the body as it is, or as JSON."""
        content = body if isinstance(body, str | bytes) else json.dumps(body)
        prefer = self.any([["Prefer: respond-async"], ["Prefer: wait=5"], []])
        typed = [] if kind is None else [b"Content-Type: " + octets(kind)]
        return self.request(*(door or self.door()), octets(content), *typed, *prefer, *headers, **options)

    def place(self, value: str, *headers: str, places: Sequence[str] = (), **options: Any) -> Sent:  # noqa: ANN401
        """A prediction with the JSON of a value somewhere in it."""
        return self.create(self.turn(places or PLACES).replace("%", value), *headers, **options)


# Where a value may stand; the first are where it gets furthest.
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
# The door whose answers show the input.
SHOWING = ("POST", "/v1/predictions")


def octets(text: str | bytes) -> bytes:
    """As UTF-8; what is bytes may be anything."""
    return text if isinstance(text, bytes) else text.encode()
