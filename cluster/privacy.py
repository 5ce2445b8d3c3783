"""What may be shown, logged and kept of an input: everything but tokens and URLs' secrets, known by their looks."""

import hashlib
import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit, urlunsplit

# Tokens of Hugging Face, Replicate, GitHub, OpenAI, CivitAI and others.
_TOKEN = re.compile(r"\b(hf|r8|ghp|gho|sk|pk|api|civitai)[_-][A-Za-z0-9_-]{16,}")


def redact_input(value: Any) -> Any:  # noqa: ANN401 (JSON)
    """An input without what gives access: tokens, the queries and users of URLs; a data URI is named by its SHA-256."""
    if isinstance(value, dict):
        return {key: redact_input(item) for key, item in value.items()}
    if isinstance(value, list):
        return [redact_input(item) for item in value]
    if not isinstance(value, str):
        return value
    if value.startswith("data:"):
        head = value.partition(",")[0]
        return f"{head[:80]},sha256-{hashlib.sha256(value.encode()).hexdigest()[:16]}"
    if re.match(r"[a-z][a-z0-9+.-]*://", value, re.IGNORECASE):
        parts = urlsplit(value)
        value = urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
    return _TOKEN.sub("***", value)


def redact_text(text: str, inputs: Any) -> str:  # noqa: ANN401 (JSON)
    """A log or an error without tokens, and without the queries and users of the URLs among the inputs."""
    for value in _strings(inputs):
        if "://" in value and not value.startswith("data:"):
            parts = urlsplit(value)
            for secret in filter(None, (f"?{parts.query}" if parts.query else "", parts.netloc.rpartition("@")[0])):
                text = text.replace(secret, "")
    return _TOKEN.sub("***", text)


def _strings(value: Any) -> Iterator[str]:  # noqa: ANN401 (JSON)
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings(item)
