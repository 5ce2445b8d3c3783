"""The contents of files, uploaded or drawn, in a directory or a bucket; and their ways into JSON and out of it.

A worker takes and gives files as data URIs. Here they are kept under ids; a stored output names a file by a path of the
front, and an input names a file by its URL. This module knows files and data URIs; it knows nothing of HTTP.
"""

import asyncio
import base64
import contextlib
import hashlib
import logging
import os
import re
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
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

# The URL of a file, uploaded or drawn, at whatever address of a front; the path of an output.
_STORED = re.compile(
    r"(https?://.{1,1000})/(?:v1/files/([\w-]{1,128})|files/([\w-]{1,128})/[\w.-]{1,128})(?:[?#].*)?",
    re.ASCII | re.IGNORECASE,
)
# In JSON without spaces: from the quote that begins a string, before which there is no backslash, to the one that ends
# it, after which a colon would make it the name of a member.
_OUTPUT = re.compile(r'(?<!\\)"/files/([\w-]{1,128})/([^/"\\]{1,128})"(?!:)', re.ASCII)
# As long as at Replicate.
FILE_LIFETIME = timedelta(hours=1)
# How much is read of a file at once; a client that receives slowly makes a front hold as much. Base64 turns three bytes
# into four characters.
PIECE_BYTES = 3 * 32 * 1024


class Files:
    """The contents of files by id, in a directory or what else fsspec opens: all fronts must see the same."""

    def __init__(self, url: str) -> None:
        self.system, self.root = fsspec.url_to_fs(url)
        self.system.makedirs(self.root, exist_ok=True)

    async def write(self, content: bytes, name: str, content_type: str, about: dict[str, Any] | None = None) -> File:
        """Store a file under an id that nobody can guess; the database does not know it yet.

        Raises:
            Failure: the directory or bucket is full, or cannot be written to.
        """
        digest = (await asyncio.to_thread(hashlib.sha256, content)).hexdigest()
        file_id = secrets.token_urlsafe(24)
        file = File(file_id, name, content_type, len(content), digest, now(), now(FILE_LIFETIME), about)
        try:
            await asyncio.to_thread(self.system.pipe_file, self._path(file.id), content)
        except Exception as error:
            with contextlib.suppress(OSError):
                await self.delete([file.id])  # what there was room for
            full = isinstance(error, OSError) and error.errno in DISK_FULL
            state = "is full" if full else "cannot be written to"
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
        except Exception as error:  # fsspec's, and those of what it opens the store with
            raise Failure("The cluster's store of files cannot be read; try again later.") from error
        return size, file

    async def delete(self, file_ids: Collection[str]) -> None:
        """Delete those of these that are there, and can be deleted."""
        for file_id in file_ids:
            try:
                await asyncio.to_thread(self.system.rm_file, self._path(file_id))
            except FileNotFoundError:
                pass
            except OSError as error:
                logger.warning("A file that nobody needs any more stays: %s", places(error))

    async def store_output(self, output: Any, stored: dict[str, File]) -> Any:  # noqa: ANN401 (JSON)
        """An output whose data URIs have become paths of the front, such as /files/<id>/output.webp.

        `stored` holds the prediction's files by the hash of their data URI; those that are stored now are added.
        """

        async def path(text: str) -> str:
            if not re.match("data:[^,]*;base64,", text):
                return text
            key = await asyncio.to_thread(lambda: hashlib.sha256(text.encode()).hexdigest())
            if key not in stored:
                try:
                    kind, content = await asyncio.to_thread(decode, text)
                except ValueError:
                    return text  # a text of the predictor's that only begins like a file
                stored[key] = await self.write(content, f"output{suffix(kind)}", kind)
            return f"/files/{stored[key].id}/{stored[key].name}"

        return await _replace_strings(output, path)

    async def inline_output(self, output: Any, base: str | None = None) -> "Inlined":  # noqa: ANN401 (JSON)
        """A stored output with its files inside, as data URIs.

        Args:
            base: the front's address, where the URL of a file that has expired, or cannot be read, is to stand for it.
                Without it null stands for one that has expired, and one that cannot be read is a Failure.
        """

        def plan() -> tuple[list[bytes | str], int]:
            before, *rest = _OUTPUT.split(compact(output))
            parts, length = [before.encode()], 0
            for file_id, name, after in zip(rest[::3], rest[1::3], rest[2::3], strict=True):
                try:
                    size, file = self._open(file_id)  # what cannot be opened later would cut the answer off
                    file.close()
                except (FileNotFoundError, Failure) as error:
                    if isinstance(error, Failure):
                        if base is None:
                            raise
                        logger.warning("A file cannot be read, and is shown by its URL: %s", places(error))
                    url = f"{base}/files/{file_id}/{name}" if base else None
                    parts.append(f"{compact(url)}{after}".encode())
                else:
                    length += _characters(size)
                    parts += [f'"{head(media_type_of(name))}'.encode(), file_id, f'"{after}'.encode()]
            return parts, length + sum(len(part) for part in parts if isinstance(part, bytes))

        return Inlined(self, *await asyncio.to_thread(plan))

    async def inline_files(
        self, inputs: dict[str, Any], predictions: Predictions, base_url: str, limit: int
    ) -> dict[str, Any]:
        """Inputs whose files, uploaded or drawn and named by URLs of a front, are inside as data URIs.

        A worker need not fetch them, and might not be allowed to: a front's address is often a private one.

        Args:
            base_url: the front's address, if the client has told it: what it names there, and is not there, has gone.
            limit: how many characters all strings may have together.

        Raises:
            Failure: a file has gone, or cannot be read; or there would be more characters.
        """
        known: dict[str, File] = {}
        size = 0

        async def find(text: str) -> str:
            nonlocal size
            named = _stored(text)
            if named and text not in known:
                if file := await predictions.file(named[2] or named[3]):
                    known[text] = file
                elif named[1] == base_url:
                    raise FileNotFoundError
            size += _characters(known[text].size) if text in known else len(text)
            return text

        contents: dict[str, str] = {}

        async def content(text: str) -> str:
            if text in known and text not in contents:
                file = known[text]
                contents[text] = await asyncio.to_thread(uri, await self.read(file.id), file.content_type)
            return contents.get(text, text)

        await _replace_in_each(inputs, find)
        if size > limit:
            most = f"at most {limit / MIB:.0f}"
            raise Failure(f"The files in the input are too large together: {size / MIB:.0f} MiB of JSON; {most}.")
        return await _replace_in_each(inputs, content)

    def _path(self, file_id: str) -> str:
        if not re.fullmatch(r"[\w-]+", file_id):
            raise FileNotFoundError(file_id)
        return f"{self.root}/{file_id}"


@dataclass(frozen=True)
class Inlined:
    """JSON with files inside, which are read when its pieces are: it may have tens of megabytes."""

    files: Files
    # Bytes, and ids of files whose contents stand there, in base64.
    parts: Sequence[bytes | str]
    # Of all, in bytes.
    length: int

    @classmethod
    def of(cls, files: Files, *parts: bytes) -> "Inlined":
        """JSON without files."""
        return cls(files, parts, sum(map(len, parts)))

    def between(self, head: bytes, tail: bytes) -> "Inlined":
        """The same with JSON before it and after it."""
        return Inlined(self.files, [head, *self.parts, tail], len(head) + self.length + len(tail))

    async def pieces(self) -> AsyncIterator[bytes]:
        """All of it, in order; FileNotFoundError where a file has gone since."""
        for part in self.parts:
            if isinstance(part, bytes):
                yield part
                continue
            # Here, not by `read_pieces`: of two generators, one in the other, that are left alone when a client goes,
            # Python may end the inner one first, and complain.
            size, file = await self.files.open(part)
            with file:
                for _ in range(0, size, PIECE_BYTES):
                    yield base64.b64encode(await asyncio.to_thread(file.read, PIECE_BYTES))


async def read_pieces(file: BinaryIO, size: int) -> AsyncIterator[bytes]:
    """An open file's content; it is closed then."""
    with file:
        for _ in range(0, size, PIECE_BYTES):
            yield await asyncio.to_thread(file.read, PIECE_BYTES)


def names_files(inputs: Any) -> bool:  # noqa: ANN401 (JSON)
    """Whether an input names what may be a file of the cluster."""
    values = inputs.values() if isinstance(inputs, dict) else ()
    texts = (text for value in values if isinstance(value, str) for text in (value, *references(value)))
    return any(map(_stored, texts))


def _stored(text: str) -> re.Match[str] | None:
    """What a text says of a file of a cluster, if it may be the URL of one, with whatever was pasted around it."""
    return _STORED.fullmatch(unwrapped(text)) if len(text) <= MAX_CHARACTERS else None


def _characters(size: int) -> int:
    """How long so many bytes are in base64."""
    return (size + 2) // 3 * 4


async def _replace_in_each(inputs: dict[str, Any], replacement: Callable[[str], Awaitable[str]]) -> dict[str, Any]:
    replaced = {}
    for name, value in inputs.items():
        try:
            replaced[name] = await _replace_strings(value, replacement)
        except FileNotFoundError as error:
            raise Failure(f"The file in {name[:80]} has expired; send it again.") from error
        except OSError as error:
            sentence = f"The file in {name[:80]} cannot be read; try again later."
            raise Failure(sentence, Again.UNDRAWN) from error
    return replaced


async def _replace_strings(value: Any, replacement: Callable[[str], Awaitable[Any]]) -> Any:  # noqa: ANN401 (JSON)
    if isinstance(value, dict):
        return {key: await _replace_strings(item, replacement) for key, item in value.items()}
    if isinstance(value, list):
        return [await _replace_strings(item, replacement) for item in value]
    if not isinstance(value, str):
        return value
    if named := references(value):  # a file may be a term of a sum
        return rewrite(value, {reference: await replacement(reference) for reference in named})
    return await replacement(value)
