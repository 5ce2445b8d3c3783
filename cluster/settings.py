"""Every environment variable that the cluster's fronts read, its default and its reason."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field

from settings import ROOT


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
        """Read the variables; an empty one counts as unset."""
        data = ROOT / "cluster-data"
        return cls(
            database_url=environ.get("DATABASE_URL", "").strip() or f"sqlite:///{data / 'predictions.db'}",
            files_url=environ.get("FILES_URL", "").strip() or str(data / "files"),
            api_tokens=frozenset(filter(None, map(str.strip, environ.get("API_TOKENS", "").split(",")))),
        )
