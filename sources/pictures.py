"""The pictures that come with a request, as files of the request's own: fetched by the rule for LoRAs, and not kept.

This module knows where pictures come from, and how much of one is taken; it does not know what a picture is.
"""

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
# What hosts pack files with for the way. Whatever else some of them write there, the file comes as it is.
PACKINGS = {"br", "compress", "deflate", "gzip", "x-compress", "x-gzip", "zstd"}


def fetch_pictures(
    sent: Mapping[str, Picture], folder: Path, settings: Settings, patience: Patience = PATIENCE
) -> None:
    """Write each picture into its file.

    Args:
        sent: by the name of the input, which becomes the name of the file.
        folder: the request's own; made where there is something to write.
        settings: which hosts may be asked, through which proxy, and how long a prediction waits.
        patience: how long a host may keep a request waiting.

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
    """Refuse what was packed for the way, which was not asked for: it would be taken for a damaged picture."""
    packed = [name.strip() for name in stream.headers.get("Content-Encoding", "").lower().split(",")]
    if packing := next((name for name in packed if name in PACKINGS), None):
        host = host_of(stream.url)
        raise ValueError(
            f"{stream.source.name} cannot be used: {host} packed it as {packing}; it must be sent as it is."
        )


def _reserve(name: str, file: int, size: int) -> None:
    """Have room on the disk for so many bytes of a file, if it may have as many."""
    if size > MAX_BYTES:
        raise ValueError(f"{name} is too large; it must have at most {MAX_BYTES // MIB} MiB.")
    os.posix_fallocate(file, 0, max(size, 1))
