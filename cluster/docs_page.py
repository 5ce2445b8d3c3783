"""The page at `/docs`: both APIs for people, made from the OpenAPI document that validates the inputs.

It has no scripts and loads nothing: its policy allows only its inline style, so the descriptions of a project's inputs
stay text. This module knows the form of Cog's document, and HTML.
"""

import base64
import hashlib
import json
import re
import shlex
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import BaseRoute, Route

from cluster.addresses import Addresses
from local_cog import schema
from settings import VERSION

STYLE = Path(__file__).with_suffix(".css").read_text(encoding="utf-8")
_HASH = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
# The page's icon is an empty data URI, which keeps browsers from asking for one.
_POLICY = f"default-src 'none'; style-src 'sha256-{_HASH}'; img-src data:; base-uri 'none'; frame-ancestors 'none'"
# No cache: one that ignores Host would show one reader another's address, to which tokens are then sent.
HEADERS = {
    "cache-control": "no-store",
    "content-security-policy": _POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}
# Names in descriptions, after these have become HTML.
_BACKTICKED, _AS_CODE = re.compile("`([^`]+)`"), r"<code>\1</code>"

COGS = {
    "GET /": "what is where, as JSON",
    "GET /health-check": "<code>STARTING</code> until a worker draws, when predictions wait for it, or "
    "<code>SETUP_FAILED</code>; then <code>READY</code>, and <code>BUSY</code> while the next one would be refused",
    "GET /openapi.json": "the inputs and the output, for programs",
    "POST /predictions": "a prediction, waited for; with <code>Prefer: respond-async</code> its end is told to the "
    "<code>webhook</code> of the body",
    "PUT /predictions/{prediction_id}": "the same under an id of yours; asked again, it gives what there is",
    "POST /predictions/{prediction_id}/cancel": "cancels it",
}
REPLICATES = {
    "POST /v1/predictions": "a prediction; with <code>Prefer: wait</code> waited for, a minute at most",
    "POST /v1/models/{owner}/{name}/predictions": "the same, whatever the names",
    "POST /v1/deployments/{owner}/{name}/predictions": "the same, whatever the names",
    "GET /v1/predictions": "those of the last day, a hundred to a page",
    "GET /v1/predictions/{prediction_id}": "one of them",
    "POST /v1/predictions/{prediction_id}/cancel": "cancels it",
    "GET /v1/models/{owner}/{name}": "the model, with its latest version",
    "GET /v1/models/{owner}/{name}/versions": "its only version",
    "GET /v1/models/{owner}/{name}/versions/{version}": "the same, with the inputs as JSON",
    "GET /v1/deployments/{owner}/{name}": "the deployment",
    "GET /v1/account": "whose tokens these are",
    "GET /v1/webhooks/default/secret": "what webhooks are signed with",
    "POST /v1/files": "an upload, as a form with <code>content</code>; its address may be an input for an hour",
    "GET /v1/files": "the uploads",
    "GET /v1/files/{file_id}": "one of them; <code>DELETE</code> deletes it",
    "GET /v1/files/{prediction_id}/stream/{key}": "a prediction's events, at the address that it names itself",
    "GET /files/{file_id}/{name}": "an output, at the address that its prediction names, for an hour",
}
ANSWERS = {
    "400": "The body cannot be read; the answer says where.",
    "401": "The token is missing or wrong; it goes into the header <code>Authorization: Bearer …</code>.",
    "403": "Where no token is needed: the request may come from a web page that is none of this cluster’s.",
    "404": "There is no such prediction, file or endpoint; a file is kept for an hour, a prediction for a day.",
    "409": "Never from here. A single Cog server answers it while it is busy; here a prediction waits for its turn.",
    "413": "The body is too large.",
    "415": "The body must be JSON, and its <code>Content-Type</code> say so.",
    "422": "An input is not as it must be. The answer names each one, and says what would be right.",
    "503": "Not now: too many predictions wait, or the database or the store of files is away. Ask again after the "
    "seconds that <code>Retry-After</code> says; under an id of yours, what was accepted is not drawn twice.",
}


@dataclass(frozen=True)
class DocsPage:
    """The page of one front."""

    document: dict[str, Any]  # OpenAPI, as Cog's tool writes it
    tokens: bool  # whether requests must have one
    addresses: Addresses

    def routes(self) -> list[BaseRoute]:
        """Which endpoint answers where."""
        return [Route("/docs", self._show)]

    async def _show(self, request: Request) -> Response:
        page = render(self.document, self.addresses.base(request), tokens=self.tokens)
        return HTMLResponse(page, headers=HEADERS)


def render(document: dict[str, Any], address: str, *, tokens: bool) -> str:
    """The page as HTML; `document` is Cog's OpenAPI document, `address` the cluster's for this reader."""
    fields = schema.inputs(document)
    required = document["components"]["schemas"]["Input"].get("required", [])
    body = json.dumps({"input": {name: _example(fields[name]) for name in required}})
    who = (
        "<p>Requests need a token, here that of the variable <code>TOKEN</code>; this page needs none.</p>"
        if tokens
        else "<p>Clients of this machine need no token, and others are not answered.</p>"
    )
    inputs = sorted(fields.items(), key=lambda item: item[1].get("x-order", 0))
    rows = "".join(_input(name, field, name in required) for name, field in inputs)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>flux-sprites: inputs and HTTP</title>
<link rel="icon" href="data:,">
<style>{STYLE}</style>
</head>
<body>
<header>
<h1>flux-sprites <small>{VERSION}</small></h1>
<p>One predictor, asked over HTTP in two ways: Cog’s, and Replicate’s, whose client libraries work here too. A request
carries inputs as JSON; the answer says how the prediction ended, and has its output.</p>
<nav>
<a href="#ask">Ask</a> <a href="#inputs">Inputs</a> <a href="#endpoints">Endpoints</a> <a href="#answers">Answers</a>
<a href="playground/">Playground</a> {"" if tokens else '<a href="openapi.json">openapi.json</a>'}
</nav>
</header>
<main>
<h2 id="ask">Ask</h2>
{who}
<h3>Cog</h3>
<pre>{_curl(f"{address}/predictions", body, tokens=tokens)}</pre>
<h3>Replicate</h3>
<pre>{_curl(f"{address}/v1/models/flux-sprites/flux-sprites/predictions", body, "Prefer: wait", tokens=tokens)}</pre>
<p>Replicate’s client for Python needs two variables, and that for JavaScript its base URL:</p>
<pre>export REPLICATE_BASE_URL={escape(address)} REPLICATE_API_TOKEN={'"$TOKEN"' if tokens else "any"}</pre>
<pre>new Replicate({{ auth: {"process.env.TOKEN" if tokens else '"any"'}, baseUrl: "{escape(address)}/v1" }})</pre>
<h2 id="inputs">Inputs</h2>
<dl>{rows}</dl>
<h2 id="endpoints">Endpoints</h2>
<h3>Cog</h3>
{_list(COGS)}
<h3>Replicate</h3>
{_list(REPLICATES)}
<h2 id="answers">Answers that say no</h2>
{_list(ANSWERS)}
</main>
</body>
</html>
"""


def _input(name: str, field: dict[str, Any], required: bool) -> str:
    kind = "file: a URL, or a data URI" if field.get("format") == "uri" else field["type"]
    default = json.dumps(field["default"], ensure_ascii=False) if field.get("default") is not None else None
    bounds = " to ".join(json.dumps(field[bound]) for bound in ("minimum", "maximum") if bound in field)
    if bounds and "maximum" not in field:
        bounds = f"at least {bounds}"
    elif bounds and "minimum" not in field:
        bounds = f"at most {bounds}"
    about = filter(None, [kind, bounds, default and f"default {default}", None if required or default else "optional"])
    lines = [f"<span>{escape(text)}</span>" for text in about]
    if required:
        lines.append('<span class="required">required</span>')
    said = f"<dd>{_BACKTICKED.sub(_AS_CODE, escape(field['description']))}</dd>" if field.get("description") else ""
    if "enum" in field:
        choices = ", ".join(json.dumps(choice, ensure_ascii=False) for choice in field["enum"])
        said += f'<dd class="choices">One of {escape(choices)}</dd>'
    return f"<div><dt><code>{escape(name)}</code>{''.join(lines)}</dt>{said}</div>\n"


def _example(field: dict[str, Any]) -> object:
    if "enum" in field:
        return field["enum"][0]
    if field.get("format") == "uri":
        return "https://example.com/picture.png"
    number = field.get("minimum", field.get("maximum", 1))
    return {"string": "a red fox", "boolean": True}.get(field["type"], number)


def _curl(url: str, body: str, *headers: str, tokens: bool) -> str:
    lines = [f"curl {url}", *(f"-H '{header}'" for header in ("Content-Type: application/json", *headers))]
    lines += ['-H "Authorization: Bearer $TOKEN"'] if tokens else []
    return escape(" \\\n  ".join([*lines, f"-d {shlex.quote(body)}"]), quote=False)


def _list(explained: dict[str, str]) -> str:
    """A list of terms and their explanations, which are HTML already."""
    row = "<div><dt><code>{}</code></dt><dd>{}</dd></div>\n"
    return f"<dl>{''.join(row.format(escape(term), meaning) for term, meaning in explained.items())}</dl>"
