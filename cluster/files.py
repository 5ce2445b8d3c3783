"""The contents of files, uploaded or drawn, in a directory or a bucket; and how they get into JSON and out of it.

Workers receive and return files as data URIs. Here they are kept under ids: a stored output names a file by a path of
the front, an input by a URL. This module knows files and data URIs; it knows nothing of HTTP.
"""

import asyncio
import base64
import hashlib
import logging
import os
import re
import secrets
from collections.abc import AsyncIterator, Collection, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, BinaryIO

import fsspec

from cluster.failures import Again, Failure, places
from cluster.predictions import File, Predictions, now
from service.data_uri import decode, head, media_type_of, suffix, uri
from service.faults import DISK_FULL
from service.strict_json import compact
from settings import MIB
from sources.choices import references, rewrite
from sources.references import MAX_CHARACTERS, unwrapped

logger = logging.getLogger("ray.serve")

# The URL of a file, uploaded or drawn, at any address.
_STORED = re.compile(
    r"(?P<base>https?://.{1,1000})/(?:v1/files/(?P<upload>[\w-]{1,128})|files/(?P<output>[\w-]{1,128})/[\w.-]{1,128})"
    r"(?:[?#].*)?",
    re.ASCII | re.IGNORECASE,
)
# The path of an output as a whole string in compact JSON: no backslash before it, and no colon after it, which would
# make it a name.
_OUTPUT = re.compile(r'(?<!\\)"/files/([\w-]{1,128})/([^/"\\]{1,128})"(?!:)', re.ASCII)
# As long as at Replicate.
FILE_LIFETIME = timedelta(hours=1)
# How much is read of a file at once, and held for a slow client. Base64 turns three bytes into four characters.
PIECE_BYTES = 3 * 32 * 1024


class Files:
    """The contents of files by id, at a URL that fsspec opens; all fronts must see the same."""

    def __init__(self, url: str) -> None:
        self.system, self.root = fsspec.url_to_fs(url)
        self.system.makedirs(self.root, exist_ok=True)

    async def write(self, content: bytes, name: str, content_type: str, about: dict[str, Any] | None = None) -> File:
        """Store a file under an id that cannot be guessed, without telling the database; Failure where that fails."""
        digest = (await asyncio.to_thread(hashlib.sha256, content)).hexdigest()
        file_id = secrets.token_urlsafe(24)
        file = File(file_id, name, content_type, len(content), digest, now(), now(FILE_LIFETIME), about)
        try:
            await asyncio.to_thread(self.system.pipe_file, self._path(file.id), content)
        except Exception as error:
            await self.delete([file.id])  # a part of it may be there
            state = "is full" if getattr(error, "errno", None) in DISK_FULL else "cannot be written to"
            raise Failure(f"The cluster's store of files {state}; try again later.") from error
        return file

    async def read(self, file_id: str) -> bytes:
        """The content; FileNotFoundError where it has expired."""
        return await asyncio.to_thread(self.system.cat_file, self._path(file_id))

    async def open(self, file_id: str) -> tuple[int, BinaryIO]:
        """The size of a file, and itself; FileNotFoundError where it has expired, a Failure where it cannot be read."""
        return await asyncio.to_thread(self._open, file_id)

    def _open(self, file_id: str) -> tuple[int, BinaryIO]:
        try:
            file = self.system.open(self._path(file_id), "rb")
            size = file.seek(0, os.SEEK_END)
            file.seek(0)
        except FileNotFoundError:
            raise
        except Exception as error:  # fsspec's own errors, and its backends'
            raise Failure("The cluster's store of files cannot be read; try again later.") from error
        return size, file

    async def delete(self, file_ids: Collection[str]) -> None:
        """Delete files; one that is not there, or cannot be deleted, is skipped."""
        for file_id in file_ids:
            try:
                await asyncio.to_thread(self.system.rm_file, self._path(file_id))
            except FileNotFoundError:
                pass
            except OSError as error:
                logger.warning("A file that nobody needs any more stays: %s", places(error))

    async def store_output(self, output: Any, stored: dict[str, File]) -> Any:  # noqa: ANN401 (JSON)
        """An output, one value or a list, with paths of the front, such as /files/<id>/output.webp, for its data URIs.

        `stored` holds the prediction's files by the hash of their data URI; new ones are added.
        """

        async def store(text: Any) -> Any:  # noqa: ANN401 (JSON)
            if not (isinstance(text, str) and re.match("data:[^,]*;base64,", text)):
                return text
            key = await asyncio.to_thread(lambda: hashlib.sha256(text.encode()).hexdigest())
            if key not in stored:
                try:
                    kind, content = await asyncio.to_thread(decode, text)
                except ValueError:
                    return text  # it only begins like a file
                stored[key] = await self.write(content, f"output{suffix(kind)}", kind)
            return f"/files/{stored[key].id}/{stored[key].name}"

        return [await store(item) for item in output] if isinstance(output, list) else await store(output)

    async def inline_output(self, output: Any, base: str | None = None) -> "Inlined":  # noqa: ANN401 (JSON)
        """A stored output with its files inside, as data URIs.

        With the front's address as `base`, a file that has expired or cannot be read is shown by its URL; without, an
        expired one by null, and one that cannot be read raises a Failure.
        """

        def plan() -> tuple[list[bytes | str], int]:
            before, *rest = _OUTPUT.split(compact(output))
            parts, length = [before.encode()], 0
            for file_id, name, after in zip(rest[::3], rest[1::3], rest[2::3], strict=True):
                url = f"{base}/files/{file_id}/{name}" if base else None
                without_file = f"{compact(url)}{after}".encode()
                try:
                    size, file = self._open(file_id)  # now: while it is sent, a failure would cut the answer off
                    file.close()
                    length += _characters(size)
                    parts += [f'"{head(media_type_of(name))}'.encode(), file_id, f'"{after}'.encode()]
                except FileNotFoundError:
                    parts.append(without_file)
                except Failure as error:
                    if base is None:
                        raise
                    logger.warning("A file cannot be read, and is shown by its URL: %s", places(error))
                    parts.append(without_file)
            return parts, length + sum(len(part) for part in parts if isinstance(part, bytes))

        return Inlined(self, *await asyncio.to_thread(plan))

    async def inline_files(
        self, inputs: dict[str, Any], predictions: Predictions, base_url: str, limit: int
    ) -> dict[str, Any]:
        """Inputs with data URIs for the URLs of the cluster's files: workers may not fetch from private addresses.

        `base_url` is the front's address as the client wrote it: a file that is missing there has expired. A Failure
        says that a file has expired or cannot be read, or that all strings have more than `limit` characters together.
        """
        texts = _texts(inputs)
        known: dict[str, tuple[str, File]] = {}  # by their URLs, with the first input that names them
        for name, text in texts:
            if text not in known and (named := _stored(text)):
                if file := await predictions.file(named["upload"] or named["output"]):
                    known[text] = name, file
                elif named["base"] == base_url:
                    raise _expired(name)
        size = sum(_characters(known[text][1].size) if text in known else len(text) for _, text in texts)
        if size > limit:
            most = f"at most {limit / MIB:.0f}"
            raise Failure(f"The files in the input are too large together: {size / MIB:.0f} MiB of JSON; {most}.")
        uris = {url: await self._uri(file, name) for url, (name, file) in known.items()}

        def inside(value: str) -> str:
            named = {text: uris.get(text, text) for text in references(value)}
            return rewrite(value, named) if named else uris.get(value, value)

        return {name: inside(value) if isinstance(value, str) else value for name, value in inputs.items()}

    async def _uri(self, file: File, name: str) -> str:
        try:
            return await asyncio.to_thread(uri, await self.read(file.id), file.content_type)
        except FileNotFoundError:
            raise _expired(name) from None
        except OSError as error:
            raise Failure(f"The file in {name[:80]} cannot be read; try again later.", Again.UNDRAWN) from error

    def _path(self, file_id: str) -> str:
        if not re.fullmatch(r"[\w-]+", file_id):
            raise FileNotFoundError(file_id)
        return f"{self.root}/{file_id}"


@dataclass(frozen=True)
class Inlined:
    """JSON with files inside, which are read while it is sent: it may have tens of megabytes."""

    files: Files
    parts: Sequence[bytes | str]  # bytes, and ids of files whose contents come there in base64
    length: int  # in bytes

    @classmethod
    def of(cls, files: Files, *parts: bytes) -> "Inlined":
        """JSON without files."""
        return cls(files, parts, sum(map(len, parts)))

    def between(self, head: bytes, tail: bytes) -> "Inlined":
        """The same with JSON before it and after it."""
        return Inlined(self.files, [head, *self.parts, tail], len(head) + self.length + len(tail))

    async def pieces(self) -> AsyncIterator[bytes]:
        """All of it in order; FileNotFoundError where a file has expired since."""
        for part in self.parts:
            if isinstance(part, bytes):
                yield part
                continue
            # Not by `read_pieces`: of nested generators that a client abandons, Python may close the inner one first,
            # and warn.
            size, file = await self.files.open(part)
            with file:
                for _ in range(0, size, PIECE_BYTES):
                    yield base64.b64encode(await asyncio.to_thread(file.read, PIECE_BYTES))


async def read_pieces(file: BinaryIO, size: int) -> AsyncIterator[bytes]:
    """An open file's content; it is closed then."""
    with file:
        for _ in range(0, size, PIECE_BYTES):
            yield await asyncio.to_thread(file.read, PIECE_BYTES)


def names_files(inputs: dict[str, Any]) -> bool:
    """Whether an input names what may be a file of the cluster."""
    return any(_stored(text) for _, text in _texts(inputs))


def _texts(inputs: dict[str, Any]) -> list[tuple[str, str]]:
    """The texts that may be URLs of files, each after its input's name: the terms of a sum, or else the whole text."""
    texts = {name: value for name, value in inputs.items() if isinstance(value, str)}
    return [(name, text) for name, value in texts.items() for text in references(value) or [value]]


def _stored(text: str) -> re.Match[str] | None:
    """The parts of a text that may be the URL of a cluster's file, with quotes or spaces around it."""
    return _STORED.fullmatch(unwrapped(text)) if len(text) <= MAX_CHARACTERS else None


def _characters(size: int) -> int:
    """How long so many bytes are in base64."""
    return (size + 2) // 3 * 4


def _expired(name: str) -> Failure:
    return Failure(f"The file in {name[:80]} has expired; send it again.")
