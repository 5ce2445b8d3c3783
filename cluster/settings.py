"""Every environment variable that the cluster reads itself, its default and its reason."""

import ipaddress
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from cluster.addresses import Network, is_host
from settings import MIB, PICTURE_SECONDS, ROOT, number, prediction_seconds, switch
from sources.shown import redact

# A replica that is to go finishes what is being drawn, for so long.
DRAIN_SECONDS = 900
# What a prediction gets beyond its predictor's own limits, which end it with a better sentence.
SECONDS_BEYOND = 30
# Where predictions and files are unless the environment says otherwise.
DATA = ROOT / "cluster-data"
# Half of what a front holds of all bodies together.
LARGEST_BODY_MAX = 512 * MIB


@dataclass(frozen=True)
class ClusterSettings:
    """The environment, read once. The comment above each field gives its variable and its reason."""

    # DATABASE_URL: predictions; SQLite for the fronts of one machine, postgresql://… for those of several.
    database_url: str = field(repr=False)
    # FILES_URL: uploads and outputs; a directory, or what fsspec opens, such as s3://…, that all fronts see alike.
    files_url: str
    # API_TOKENS: who may ask, with commas between; without any, the cluster answers on loopback alone.
    api_tokens: frozenset[str] = field(repr=False)
    # BODY_MAX_MB: the largest body of a request in MiB, as large as Cog's own since files may come as data URIs.
    body_max_bytes: int
    # PUBLIC_URL: where clients reach the cluster, such as https://example.com/flux; files' addresses begin with it.
    public_url: str | None
    # OUTPUTS: url or data, how Replicate's API shows the outputs of one prediction to every client. Otherwise data URIs
    # are for Replicate's own clients alone, where addresses begin with http: and these clients would make text of them.
    outputs: Literal["url", "data"] | None
    # TRUSTED_PROXIES: addresses and networks, with commas between, whose X-Forwarded-Host and -Proto count; anybody can
    # send these headers, and the addresses that come of them are stored and shown to others.
    trusted_proxies: tuple[Network, ...]
    # WEBHOOKS_ALLOW_PRIVATE_HOSTS=1: let webhooks go to private and loopback addresses (tests, intranets). Otherwise
    # strangers could have the fronts, which stand inside the operator's network, send requests to what is in there.
    private_webhooks: bool
    # PREDICTION_SECONDS: the bound of every predictor here, 600 unless it is given; 0 is the longest that there may be.
    prediction_seconds: float

    @property
    def longest_seconds(self) -> float:
        """How long a prediction may take here; one that takes longer hangs where its predictor cannot end it.

        The predictor bounds the fetching of pictures, that of LoRAs, and its work on the device, each by itself.
        """
        return min(PICTURE_SECONDS, self.prediction_seconds) + 2 * self.prediction_seconds + SECONDS_BEYOND

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] = os.environ) -> "ClusterSettings":
        """Read the variables; an empty one counts as unset.

        Raises:
            ValueError: a sentence that names the variable, its value and what would be right. It may be
                PREDICTION_SECONDS, which the workers' predictors read: a worker that is to go is ended after a while.
        """
        longest = prediction_seconds(cuda=True, environ=environ)
        if longest is not None and longest >= DRAIN_SECONDS:
            raise ValueError(
                f"PREDICTION_SECONDS is {longest:g}; in a cluster it must be below {DRAIN_SECONDS}, the seconds after "
                "which a worker that is to go is ended."
            )
        proxies = filter(None, map(str.strip, environ.get("TRUSTED_PROXIES", "").split(",")))
        return cls(
            database_url=environ.get("DATABASE_URL", "").strip() or f"sqlite:///{DATA / 'predictions.db'}",
            files_url=environ.get("FILES_URL", "").strip() or str(DATA / "files"),
            api_tokens=frozenset(filter(None, map(str.strip, environ.get("API_TOKENS", "").split(",")))),
            body_max_bytes=_body_max_bytes(environ.get("BODY_MAX_MB", "").strip() or "100"),
            public_url=_public_url(environ.get("PUBLIC_URL", "").strip()),
            outputs=_outputs(environ.get("OUTPUTS", "").strip()),
            trusted_proxies=tuple(map(_network, proxies)),
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


def _outputs(text: str) -> Literal["url", "data"] | None:
    match text:
        case "":
            return None
        case "url" | "data":
            return text
    raise ValueError(f"OUTPUTS is {text[:80]!r}; it must be url or data.")


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
