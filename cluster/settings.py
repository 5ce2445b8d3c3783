"""The cluster's arguments, and every environment variable that it reads itself, its default and its reason."""

import ipaddress
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from pydantic import BaseModel

from cluster.addresses import Network, is_host
from local_cog.server import LOOPBACK
from settings import MIB, PICTURE_SECONDS, ROOT, number, prediction_seconds, switch
from sources.shown import redact

# How long a replica that is to stop may take to finish its predictions.
DRAIN_SECONDS = 900
# Beyond its predictor's own limits, which end a prediction with a better sentence.
SECONDS_BEYOND = 30
# Where predictions and files are unless the environment says otherwise.
DATA = ROOT / "cluster-data"
# Half of all bodies that a front holds at once.
LARGEST_BODY_MAX = 512 * MIB


class Arguments(BaseModel):
    """The application's arguments, `args` in a Serve configuration; secrets come from the environment."""

    # Where predict.py is.
    project: str = str(ROOT)
    workers: int = 1
    gpus_per_worker: float = 1
    fronts: int = 2
    # Where fronts listen; the fronts of one machine share the port.
    host: str = LOOPBACK
    port: int = 8000
    # For how many seconds a front that is to stop fails load balancers' probes but still answers requests.
    linger: float = 0
    # Unfinished predictions that one front takes; further ones are answered 503.
    queue: int = 1000
    # "router" leads a request to a worker that has its LoRAs, and has it wait a little for that worker.
    affinity: Literal["none", "router"] = "none"


@dataclass(frozen=True)
class ClusterSettings:
    """The environment, read once. The comment above each field gives its variable and its reason."""

    # DATABASE_URL: predictions; SQLite for the fronts of one machine, postgresql://… for those of several.
    database_url: str = field(repr=False)
    # FILES_URL: uploads and outputs; a directory, or what fsspec opens, such as s3://…, that all fronts see alike.
    files_url: str
    # API_TOKENS: the clients' tokens, with commas between; without any, the cluster answers on loopback alone.
    api_tokens: frozenset[str] = field(repr=False)
    # BODY_MAX_MB: the largest body of a request in MiB; Cog's own limit is the default, since files may be data URIs.
    body_max_bytes: int
    # PUBLIC_URL: where clients reach the cluster, such as https://example.com/flux; files' addresses begin with it.
    public_url: str | None
    # OUTPUTS: url or data, how Replicate's API shows the outputs of one prediction to every client. By default only
    # Replicate's own clients get data URIs, and only where addresses begin with http:, which they return as text.
    outputs: Literal["url", "data"] | None
    # TRUSTED_PROXIES: addresses and networks, with commas between, whose X-Forwarded-Host and -Proto count. Anybody can
    # send these headers, and the addresses built from them are stored and shown to others.
    trusted_proxies: tuple[Network, ...]
    # WEBHOOKS_ALLOW_PRIVATE_HOSTS=1: let webhooks go to private and loopback addresses (tests, intranets). By default
    # they do not: strangers could have the fronts send requests to other machines of the operator's network.
    private_webhooks: bool
    # PREDICTION_SECONDS: every predictor's bound, 600 by default, below DRAIN_SECONDS; 0 means DRAIN_SECONDS.
    prediction_seconds: float

    @property
    def longest_seconds(self) -> float:
        """How long a prediction may take before it counts as hanging.

        The predictor bounds three things, each by itself: fetching pictures, fetching LoRAs, and work on the device.
        """
        return min(PICTURE_SECONDS, self.prediction_seconds) + 2 * self.prediction_seconds + SECONDS_BEYOND

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] = os.environ) -> "ClusterSettings":
        """Read the variables; an empty one counts as unset. A ValueError's sentence names a wrong one and its value."""

        def given(name: str) -> str:
            return environ.get(name, "").strip()

        def listed(name: str) -> list[str]:
            return [part.strip() for part in given(name).split(",") if part.strip()]

        longest = prediction_seconds(cuda=True, environ=environ)
        if longest is not None and longest >= DRAIN_SECONDS:
            raise ValueError(
                f"PREDICTION_SECONDS is {longest:g}; in a cluster it must be below {DRAIN_SECONDS}, the seconds after "
                "which a worker that is to go is ended."
            )
        if (outputs := given("OUTPUTS")) not in ("", "url", "data"):
            raise ValueError(f"OUTPUTS is {outputs[:80]!r}; it must be url or data.")
        return cls(
            database_url=given("DATABASE_URL") or f"sqlite:///{DATA / 'predictions.db'}",
            files_url=given("FILES_URL") or str(DATA / "files"),
            api_tokens=frozenset(listed("API_TOKENS")),
            body_max_bytes=_body_max_bytes(given("BODY_MAX_MB") or "100"),
            public_url=_public_url(given("PUBLIC_URL")),
            outputs=outputs or None,
            trusted_proxies=tuple(map(_network, listed("TRUSTED_PROXIES"))),
            private_webhooks=bool(switch("WEBHOOKS_ALLOW_PRIVATE_HOSTS", environ)),
            prediction_seconds=longest or DRAIN_SECONDS,
        )


def _body_max_bytes(text: str) -> int:
    size = number(text) * MIB
    if not 1 <= size <= LARGEST_BODY_MAX:
        raise ValueError(
            f"BODY_MAX_MB is {text!r}; it must be a number of MiB above 0 and up to {LARGEST_BODY_MAX // MIB}, such as "
            "100."
        )
    return int(size)


def _public_url(text: str) -> str | None:
    """Without the slash at its end."""
    found = re.fullmatch(r"https?://([^/]+)(/[\w.~%/-]*)?", text, re.ASCII)
    if text and not (found and is_host(found[1])):
        raise ValueError(
            f"PUBLIC_URL is {redact(text)!r}; it must be an http or https URL without user and query, such as "
            "https://example.com/flux."
        )
    return text.rstrip("/") or None


def _network(text: str) -> Network:
    try:
        network = ipaddress.ip_network(text)
    except ValueError as error:
        raise ValueError(
            f"TRUSTED_PROXIES has {text!r}; it must have addresses and networks with commas between, such as "
            f"10.0.0.0/8,192.168.1.7: {error}."
        ) from None
    mapped = getattr(network.network_address, "ipv4_mapped", None)
    return network if mapped is None else ipaddress.ip_network(f"{mapped}/{max(0, network.prefixlen - 96)}")
