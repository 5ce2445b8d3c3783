"""Inputs cost time in proportion to their length, and a cancelled prediction stops reading."""

import ctypes
import gzip
import json
import struct
import tarfile
import tempfile
import threading
import time
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import cog
import pytest

import images
from lora import adapter
from lora.names import Layer, Part, assign
from service.device_thread import DeviceThread
from sources import archives
from sources.choices import read_choices
from sources.connections import StoppedError
from sources.contents import Contents
from sources.references import parse

LAYER = Layer("transformer", (4, 4), (Part("a", 0, 0, 4),), biased=True)
EMPTY = gzip.compress(b"")


def read_header(header: bytes) -> None:
    Contents("a").feed(struct.pack("<Q", len(header)) + header)


def header_of(shape: str) -> bytes:
    return f'{{"a":{{"dtype":"U8","shape":[{shape}],"data_offsets":[0,0]}}}}'.encode()


def unpack(archive: bytes, check: Callable[[], None] = lambda: None) -> None:
    contents = Contents("a")
    contents.feed(archive)
    contents.finish()
    with tempfile.TemporaryFile(buffering=0) as file, tempfile.TemporaryFile(buffering=0) as target:
        file.write(archive)
        archives.unpack(file, contents, target, lambda size: None, check)


def tar(*members: tuple[bytes, bytes]) -> bytes:
    """Members by type and content."""
    blocks = []
    for kind, content in members:
        member = tarfile.TarInfo("a")
        member.type, member.size = kind, len(content)
        blocks.append(member.tobuf(tarfile.USTAR_FORMAT) + content + bytes(-len(content) % 512))
    return b"".join(blocks) + bytes(1024)


def record(key: str) -> bytes:
    return f"{len(key) + 6:02} {key}=b\n".encode()


def headed_tar(count: int) -> bytes:
    """An archive with a fourth as many members as records in its header."""
    records = b"".join(record(f"{number:06}") for number in range(4 * count))
    return tar((b"g", records), *[(b"x", record("a")), (b"0", b"")] * count)


def read_names(names: list[str]) -> None:
    assign(names, {"a_b": LAYER})


def read_patterns(count: int) -> None:
    """Patterns of which only the last fits; layers are as many as the model has, whatever a file says."""
    pattern = {f"layer.{number}": 1.0 for number in range(count)} | {"to_q": 2.0}
    adapters = adapter.read_header(
        {"lora_adapter_metadata": json.dumps({"transformer.alpha_pattern": pattern})}, {"transformer"}
    )
    for number in range(100):
        assert adapters["transformer"].strength([f"block.{number}.to_q"], 1, None) == 2


def json_of(blocks: dict[str, float]) -> str:
    return json.dumps([{"path": "zorp", "blocks": blocks}])


READERS: dict[str, tuple[Callable, Callable[[int], object], int]] = {
    "dimensions": (read_header, lambda n: header_of(",".join(["9223372036854775807"] * n)), 5_000),
    "digits of a dimension": (read_header, lambda n: header_of("9" * n), 1_000),
    "tensors": (
        read_header,
        lambda n: b"{%b}" % b",".join(b'"%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}' % i for i in range(n)),
        500,
    ),
    "offsets": (read_header, lambda n: b'{"a":{"dtype":"U8","shape":[],"data_offsets":[%b0]}}' % (b"0," * n), 5_000),
    "a name of many parts": (read_names, lambda n: ["te." * n + "weight"], 200),
    "a name of many prefixes": (read_names, lambda n: ["te_" * n + "weight"], 1_000),
    "many names": (read_names, lambda n: [f"te.te.te.{number}.weight" for number in range(n)], 300),
    "patterns of strengths": (read_patterns, lambda n: n, 500),
    "empty lines of a config": (archives._trigger_words, lambda n: b"\n" * n, 12_000),
    "digits in a tar's header": (unpack, lambda n: tar((b"x", b"1" * n), (b"0", b"")), 6_000),
    "a tar's headers for all": (unpack, headed_tar, 200),
    "members of a tar": (unpack, lambda n: tar(*[(b"0", b"")] * n), 500),
    "members of a gzip": (unpack, lambda n: EMPTY * n, 300),
    "escapes": (parse, lambda n: "data:;base64," + "%41" * n, 20_000),
    "base64 with spaces": (parse, lambda n: "data:;base64," + "AAAA " * n, 50_000),
    "parts of a path": (parse, lambda n: "huggingface.co/a" + "/a" * n, 2_000),
    "characters of a name": (parse, lambda n: "a/" + "b." * n, 2_000),
    "terms of a sum": (read_choices, lambda n: "zorp + " * n, 100_000),
    "blanks of a sum": (read_choices, lambda n: f"zorp{' ' * n}* 2", 100_000),
    "stars of a sum": (read_choices, lambda n: f"data:;base64,{'*2' * n}", 100_000),
    "quotes of a sum": (read_choices, lambda n: "'" * n + "zorp" + "'" * n, 50_000),
    "lists in JSON": (read_choices, lambda n: "[" * n, 20_000),
    "names of blocks": (read_choices, lambda n: json_of({f"single_blocks.{first}": 1 for first in range(n)}), 200),
    "names of no blocks": (read_choices, lambda n: f'[{{"path": "zorp", "{"9" * n}": 1}}]', 50_000),
    "blanks in JSON": (read_choices, lambda n: f'[{" " * n}{{"path": "zorp"}}]', 100_000),
}


def seconds(read: Callable[[object], object], given: object) -> float:
    """The least time of this thread that reading takes, in three attempts; refusing is reading too."""
    spent = []
    for _ in range(3):
        began = time.thread_time()
        with suppress(ValueError):
            read(given)
        spent.append(time.thread_time() - began)
    return min(spent)


@pytest.mark.parametrize("what", READERS)
def test_four_times_the_length_takes_four_times_as_long(what: str) -> None:
    read, make, length = READERS[what]
    assert seconds(read, make(4 * length)) <= 8 * seconds(read, make(length)) + 0.02


def png(chunks: int) -> bytes:
    def chunk(kind: bytes, content: bytes = b"") -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 4, 8, 2, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(bytes(13 * 4)))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"teSt") * chunks + pixels + chunk(b"IEND")


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seconds of reading."""
    file = tmp_path_factory.mktemp("pictures") / "a.png"
    file.write_bytes(png(1_000_000))
    return file


LONG: dict[str, Callable[[Path], object]] = {
    "a picture": images.read_image,
    "names of tensors": lambda _: read_names([f"{'te.' * 30}{number}.weight" for number in range(50_000)]),
    "a data: URI": lambda _: parse("data:," + "%41" * 10_000_000),
}


@pytest.mark.parametrize("what", LONG)
def test_a_cancelled_prediction_reads_no_further(picture: Path, what: str) -> None:
    device, begun, read_all, ended = DeviceThread(), threading.Event(), [], []

    def read() -> None:
        begun.set()
        LONG[what](picture)
        read_all.append(what)

    def predict() -> None:
        try:
            device.run(read)
        except cog.CancelationException:
            ended.append(what)

    thread = threading.Thread(target=predict)
    thread.start()
    begun.wait()
    time.sleep(0.2)
    kind = ctypes.py_object(cog.CancelationException)  # as Cog raises it
    assert ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), kind) == 1
    thread.join()
    assert ended
    assert not read_all


def test_an_archive_is_read_no_further_than_its_caller_waits() -> None:
    calls = iter(range(20))

    def check() -> None:
        if next(calls, None) is None:
            raise archives.StoppedError

    with pytest.raises(StoppedError):
        unpack(EMPTY * 10_000, check)
