"""The pictures of a request, fetched as LoRAs are, into files of the request's own; they are not decoded here."""

import math
import os
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from settings import MIB, PICTURE_SECONDS, Settings
from sources.client import PATIENCE, Client, Patience, Source, Stream
from sources.download import Download
from sources.references import Data, Picture, left_out
from sources.shown import host_of
from sources.work import run_stoppable

# A photo of 100 megapixels, the largest that is read, takes some 200 MB as a PNG.
MAX_BYTES = 256 * MIB
# The content encodings that change a file; some hosts name others, and send the file as it is.
PACKINGS = {"br", "compress", "deflate", "gzip", "x-compress", "x-gzip", "zstd"}


def fetch_pictures(
    sent: Mapping[str, Picture], folder: Path, settings: Settings, patience: Patience = PATIENCE
) -> None:
    """Write the picture of each input into a file of that name in `folder`, which is made if there are any.

    Raises:
        ValueError: a sentence that names the input, its address, what the host answered and what to do.
        OSError: the disk is full, or fails.
    """
    until = time.monotonic() + min(PICTURE_SECONDS, settings.prediction_seconds or math.inf)
    for name, picture in sent.items():
        folder.mkdir(exist_ok=True)
        if isinstance(picture, Data):
            (folder / name).write_bytes(picture.content)
        else:
            source = Source(f"{name} {picture.name}", picture.url)
            if picture.cut:
                print(left_out(source.name))
            run_stoppable(partial(_fetch, source, folder / name), settings, patience, source.name, until)


def _fetch(source: Source, path: Path, client: Client) -> None:
    with client.persist(lambda: client.open(source)) as stream, path.open("w+b") as file:
        _check_packing(stream)
        size = Download(stream, file.fileno(), partial(_reserve, source.name, file.fileno())).run(lambda data: None)
        file.truncate(size)
        if not size:
            raise ValueError(f"{source.name} cannot be used: {host_of(stream.url)} sent nothing.")


def _check_packing(stream: Stream) -> None:
    """Refuse a content encoding, which was not asked for: the picture would seem damaged."""
    packed = [name.strip() for name in stream.headers.get("Content-Encoding", "").lower().split(",")]
    if packing := next((name for name in packed if name in PACKINGS), None):
        host = host_of(stream.url)
        raise ValueError(
            f"{stream.source.name} cannot be used: {host} packed it as {packing}; it must be sent as it is."
        )


def _reserve(name: str, file: int, size: int) -> None:
    if size > MAX_BYTES:
        raise ValueError(f"{name} is too large; it must have at most {MAX_BYTES // MIB} MiB.")
    os.posix_fallocate(file, 0, max(size, 1))
