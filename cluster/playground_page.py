"""The playground behind a front: the page's files, and the two requests that it makes beside Cog's API.

The files are read by their paths: nothing is imported from the program that serves the same page beside a Cog server.
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
# Type and content of each file, by its path in the page's folder.
FILES = {
    str(path.relative_to(_PAGE)): (_TYPES.get(path.suffix, "text/plain"), path.read_bytes())
    for path in _PAGE.rglob("*")
    if path.is_file() and not any(part.startswith(".") for part in path.relative_to(_PAGE).parts)
}
HEADERS = json.loads((_PAGE.parent / "headers.json").read_bytes())
# A browser requests these without a token; they tell nothing about this cluster but whether it has tokens.
OPEN = ["/playground", "/playground/", "/playground/about.json", *(f"/playground/{name}" for name in FILES)]


@dataclass(frozen=True)
class PlaygroundPage:
    """The page of one front."""

    # Whether requests must have a token.
    tokens: bool
    # The answer to `GET /health-check`.
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
        # No address: the page's own is right, whatever proxies stand before the front.
        about = {"server": "front", "progress": "poll", "address": None, "tokens": self.tokens, "log": False}
        return JSONResponse(about, headers=HEADERS)

    async def _tell_loras(self, _: Request) -> Response:
        """The library's names, as this front sees the folder."""
        try:
            names = await asyncio.to_thread(library.names_beside, await self.health())
        except ValueError as error:  # a variable is wrong
            return JSONResponse({"detail": str(error)}, 500, headers=HEADERS)
        return JSONResponse(names, headers=HEADERS)
