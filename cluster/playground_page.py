"""The playground behind a front: the page itself, and the little that it asks beside Cog's API.

Its files are read by their paths: the program that serves the same page beside a Cog server has nothing to do here.
"""

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.routing import BaseRoute, Route

from settings import ROOT
from sources import library

_PAGE = ROOT / "playground" / "page"
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
# By their names in addresses: type and content.
FILES = {
    str(path.relative_to(_PAGE)): (_TYPES.get(path.suffix, "text/plain"), path.read_bytes())
    for path in _PAGE.rglob("*")
    if path.is_file() and not any(part.startswith(".") for part in path.relative_to(_PAGE).parts)
}
HEADERS = json.loads((_PAGE.parent / "headers.json").read_bytes())
# What a browser asks for without a token: it says no more about this cluster than whether it has tokens.
OPEN = ["/playground", "/playground/", "/playground/about.json", *(f"/playground/{name}" for name in FILES)]


@dataclass(frozen=True)
class PlaygroundPage:
    """The page of one front."""

    # Whether requests must have a token.
    tokens: bool
    # What `GET /health-check` says.
    health: Callable[[], Awaitable[dict[str, Any]]]

    def routes(self) -> list[BaseRoute]:
        """Which endpoint answers where."""
        return [
            Route("/playground", self._lead),
            Route("/playground/about.json", self._tell_about),
            Route("/playground/loras.json", self._tell_loras),
            Route("/playground/{name:path}", self._show),
        ]

    async def _lead(self, _: Request) -> Response:
        return RedirectResponse("playground/", 308, headers=HEADERS)

    async def _show(self, request: Request) -> Response:
        name = request.path_params["name"] or "index.html"
        if name not in FILES:
            raise HTTPException(404)
        kind, content = FILES[name]
        return Response(content, headers=HEADERS, media_type=kind)

    async def _tell_about(self, _: Request) -> Response:
        # No address: the page is where the cluster is reached, whatever stands before it.
        about = {"server": "front", "progress": "poll", "address": None, "tokens": self.tokens, "log": False}
        return JSONResponse(about, headers=HEADERS)

    async def _tell_loras(self, _: Request) -> Response:
        """The library's names, as this front sees the folder."""
        try:
            names = await asyncio.to_thread(library.names_beside, await self.health())
        except ValueError as error:  # a variable is wrong
            return JSONResponse({"detail": str(error)}, 500, headers=HEADERS)
        return JSONResponse(names, headers=HEADERS)
