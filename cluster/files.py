"""The contents of files, uploaded or drawn, in a directory or a bucket; and their ways into JSON and out of it.

A worker takes and gives files as data URIs. Here they are kept under ids; a stored output names a file by a path of the
front, and an input names an upload by its URL. This module knows files and data URIs; it knows nothing of HTTP.
"""

import asyncio
import contextlib
import hashlib
import mimetypes
import re
import secrets
from collections.abc import Awaitable, Callable, Collection
from datetime import timedelta
from typing import Any

import fsspec

from cluster.predictions import File, Predictions, now
from local_cog.data_uri import OCTETS, decode, suffix, uri

# As long as at Replicate.
FILE_LIFETIME = timedelta(hours=1)


class Files:
    """The contents of files by id, in a directory or what else fsspec opens: all fronts must see the same."""

    def __init__(self, url: str) -> None:
        self.system, self.root = fsspec.url_to_fs(url)
        self.system.makedirs(self.root, exist_ok=True)

    async def write(self, content: bytes, name: str, content_type: str, about: dict[str, Any] | None = None) -> File:
        """Store a file under an id that nobody can guess; the database does not know it yet."""
        file_id, digest = secrets.token_urlsafe(24), hashlib.sha256(content).hexdigest()
        file = File(file_id, name, content_type, len(content), digest, now(), now(FILE_LIFETIME), about)
        await asyncio.to_thread(self.system.pipe_file, self._path(file.id), content)
        return file

    async def read(self, file_id: str) -> bytes:
        """The content; FileNotFoundError where it has expired."""
        return await asyncio.to_thread(self.system.cat_file, self._path(file_id))

    async def delete(self, file_ids: Collection[str]) -> None:
        """Delete those of these that are there."""
        for file_id in file_ids:
            with contextlib.suppress(FileNotFoundError):
                await asyncio.to_thread(self.system.rm_file, self._path(file_id))

    async def store_output(self, output: Any, stored: dict[str, File]) -> Any:  # noqa: ANN401 (JSON)
        """An output whose data URIs have become paths of the front, such as /files/<id>/output.webp.

        `stored` holds the prediction's files by the hash of their data URI; those that are stored now are added.
        """

        async def path(text: str) -> str:
            if not text.startswith("data:"):
                return text
            key = hashlib.sha256(text.encode()).hexdigest()
            if key not in stored:
                kind, content = decode(text)
                stored[key] = await self.write(content, f"output{suffix(kind)}", kind)
            return f"/files/{stored[key].id}/{stored[key].name}"

        return await _replace_strings(output, path)

    async def inline_output(self, output: Any) -> Any:  # noqa: ANN401 (JSON)
        """A stored output with its files inside, as data URIs; None in the place of a file that has expired."""

        async def content(text: str) -> str | None:
            if not text.startswith("/files/"):
                return text
            _, _, file_id, name = text.split("/")
            try:
                return uri(await self.read(file_id), content_type(name))
            except FileNotFoundError:
                return None

        return await _replace_strings(output, content)

    async def inline_uploads(self, value: Any, predictions: Predictions) -> Any:  # noqa: ANN401 (JSON)
        """An input whose uploads, named by URLs of a front, are inside as data URIs: a worker need not fetch them."""

        async def content(text: str) -> str:
            named = re.fullmatch(r"https?://[^/]+/v1/files/([\w-]+)", text)
            file = await predictions.file(named[1]) if named else None
            return text if file is None else uri(await self.read(file.id), file.content_type)

        return await _replace_strings(value, content)

    def _path(self, file_id: str) -> str:
        if not re.fullmatch(r"[\w-]+", file_id):
            raise FileNotFoundError(file_id)
        return f"{self.root}/{file_id}"


def content_type(name: str) -> str:
    """What a file holds, by its name."""
    return mimetypes.guess_type(name)[0] or OCTETS


async def _replace_strings(value: Any, replacement: Callable[[str], Awaitable[Any]]) -> Any:  # noqa: ANN401 (JSON)
    if isinstance(value, dict):
        return {key: await _replace_strings(item, replacement) for key, item in value.items()}
    if isinstance(value, list):
        return [await _replace_strings(item, replacement) for item in value]
    return await replacement(value) if isinstance(value, str) else value
