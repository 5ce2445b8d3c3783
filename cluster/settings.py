"""Every environment variable that the cluster reads itself, its default and its reason."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field

from settings import ROOT, prediction_seconds

# A replica that is to go finishes what is being drawn, for so long.
DRAIN_SECONDS = 900


@dataclass(frozen=True)
class ClusterSettings:
    """The environment, read once. The comment above each field gives its variable and its reason."""

    # DATABASE_URL: predictions; SQLite for the fronts of one machine, postgresql://… for those of several.
    database_url: str = field(repr=False)
    # FILES_URL: uploads and outputs; a directory, or what fsspec opens, such as s3://…, that all fronts see alike.
    files_url: str
    # API_TOKENS: who may ask, with commas between; without any, the cluster answers on loopback alone.
    api_tokens: frozenset[str] = field(repr=False)

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] = os.environ) -> "ClusterSettings":
        """Read the variables; an empty one counts as unset.

        Raises:
            ValueError: a sentence: PREDICTION_SECONDS, which the workers' predictors read, lets work on a device take
                so long that its worker would be ended before, when it is to go.
        """
        longest = prediction_seconds(cuda=False, environ=environ)
        if longest is not None and longest >= DRAIN_SECONDS:
            raise ValueError(
                f"PREDICTION_SECONDS is {longest:g}; in a cluster it must be below {DRAIN_SECONDS}, the seconds after "
                "which a worker that is to go is ended."
            )
        data = ROOT / "cluster-data"
        return cls(
            database_url=environ.get("DATABASE_URL", "").strip() or f"sqlite:///{data / 'predictions.db'}",
            files_url=environ.get("FILES_URL", "").strip() or str(data / "files"),
            api_tokens=frozenset(filter(None, map(str.strip, environ.get("API_TOKENS", "").split(",")))),
        )
