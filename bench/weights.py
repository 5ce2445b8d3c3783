"""Measure how fast LoRAs are fetched, from servers on loopback: python -m bench.weights prints one JSON line.

The servers run in a process of their own on the same cores, so the figures are upper bounds of the cost.
"""

import http.server
import json
import multiprocessing
import os
import shutil
import statistics
import struct
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path

import urllib3

from settings import MINIATURE, Settings
from weights import WeightsCache

MB = 1_000_000
LARGE, MIDDLE, SMALL = 400 * MB, 200 * MB, 1 * MB
RATE = 50 * MB  # a second for each connection, as hosts limit them
PROCESSES = 16
SLICE = 256 * 1024


def write_lora(path: Path, size: int) -> None:
    """A .safetensors file of random bytes."""
    body = size - 8 - 1024
    header = json.dumps({"weight": {"dtype": "U8", "shape": [body], "data_offsets": [0, body]}}).ljust(1024).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        for start in range(0, body, MB):
            file.write(os.urandom(min(MB, body - start)))


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves the folder: /slow/x at RATE, /plain/x without ranges at RATE, /fast/x without ranges or limit."""

    protocol_version = "HTTP/1.1"
    folder: Path
    sent = 0  # bytes, to all clients
    lock = threading.Lock()

    def do_GET(self) -> None:
        """Send a file or a range of it, or 304 if it has not changed."""
        _, way, name = self.path.split("/")
        etag = f'"{name}"'
        if self.headers.get("If-None-Match") == etag:
            self.send_response(304)
            self.end_headers()
            return
        with (self.folder / name).open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            start, end = 0, size
            wanted = self.headers.get("Range") if way == "slow" else None
            if wanted:
                first, _, last = wanted.removeprefix("bytes=").partition("-")
                start, end = int(first), int(last or size - 1) + 1
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {start}-{end - 1}/{size}")
            else:
                self.send_response(200)
            self.send_header("Content-Length", str(end - start))
            self.send_header("ETag", etag)
            self.end_headers()
            self._send(file.fileno(), start, end, float("inf") if way == "fast" else RATE)

    def _send(self, file: int, start: int, end: int, rate: float) -> None:
        began, position = time.perf_counter(), start
        try:
            while position < end:
                sent = os.sendfile(self.connection.fileno(), file, position, min(SLICE, end - position))
                position += sent
                with self.lock:
                    Handler.sent += sent
                ahead = (position - start) / rate - (time.perf_counter() - began)
                if ahead > 0:
                    time.sleep(ahead)
        except OSError:  # the client has closed the connection
            self.close_connection = True

    def log_message(self, *_: object) -> None:
        """Quiet."""


def serve(folder: Path, pipe: Connection) -> None:
    """Serve until told to stop; answer "count" with the number of bytes sent."""
    Handler.folder = folder
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        pipe.send(server.server_port)
        while pipe.recv() == "count":
            pipe.send(Handler.sent)
        server.shutdown()


@contextmanager
def serving(folder: Path) -> Iterator[tuple[str, Connection]]:
    """The servers, in a process of their own."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.Process(target=serve, args=(folder, theirs))
    process.start()
    try:
        yield f"http://127.0.0.1:{ours.recv()}", ours
    finally:
        ours.send("stop")
        process.join()


def fetch(url: str, cache: Path) -> float:
    """Seconds to open a reference."""
    settings = Settings(MINIATURE, cache_dir=cache, allow_private_hosts=True)
    start = time.perf_counter()
    with WeightsCache(settings).open(url) as weights:
        seconds = time.perf_counter() - start
        assert weights.path.stat().st_size > 0
    return seconds


def fetch_anew(url: str, folder: Path) -> float:
    """The same with an empty cache, which is deleted: its dirty pages would slow the next run down."""
    try:
        return fetch(url, folder / "cache")
    finally:
        shutil.rmtree(folder / "cache")


def curl(url: str, folder: Path) -> float:
    """Seconds that curl takes for a URL."""
    start = time.perf_counter()
    subprocess.run(["curl", "-s", "--fail", "-o", str(folder / "curl"), url], check=True)
    return time.perf_counter() - start


def cached(url: str, cache: Path, repeats: int = 200) -> tuple[float, float]:
    """Median milliseconds of opening a cached reference, and of its conditional request alone."""
    settings = Settings(MINIATURE, cache_dir=cache, allow_private_hosts=True)
    weights = WeightsCache(settings)
    times, bare = [], []
    headers = {"If-None-Match": f'"{url.rpartition("/")[2]}"'}
    for _ in range(repeats):
        start = time.perf_counter()
        with weights.open(url):
            times.append(time.perf_counter() - start)
        start = time.perf_counter()
        # A new connection, as after a pause.
        with urllib3.PoolManager() as pool:
            assert pool.request("GET", url, headers=headers).status == 304
        bare.append(time.perf_counter() - start)
    return statistics.median(times) * 1000, statistics.median(bare) * 1000


def together(url: str, folder: Path, pipe: Connection) -> tuple[float, float]:
    """Seconds until many processes have the same file, and how often it was sent."""
    pipe.send("count")
    before = pipe.recv()
    start = time.perf_counter()
    with multiprocessing.Pool(PROCESSES) as pool:
        pool.starmap(fetch, [(url, folder / "cache")] * PROCESSES, chunksize=1)
    seconds = time.perf_counter() - start
    pipe.send("count")
    return seconds, (pipe.recv() - before) / MIDDLE


def main() -> None:
    """Measure, and print a line of JSON."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file, size in (("large", LARGE), ("middle", MIDDLE), ("small", SMALL)):
            write_lora(folder / file, size)
        with serving(folder) as (host, pipe):
            # The best of several runs was disturbed least by other work on the machine.
            one_stream = curl(f"{host}/slow/large", folder)
            parallel = min(fetch_anew(f"{host}/slow/large", folder) for _ in range(5))
            plain = fetch_anew(f"{host}/plain/large", folder)
            plain_curl = curl(f"{host}/plain/large", folder)
            fast = min(fetch_anew(f"{host}/fast/large", folder) for _ in range(5))
            fast_curl = min(curl(f"{host}/fast/large", folder) for _ in range(5))
            fetch(f"{host}/fast/small", folder / "cache")
            resolved, request = cached(f"{host}/fast/small", folder / "cache")
            seconds, sent = together(f"{host}/fast/middle", folder, pipe)
    print(
        json.dumps(
            {
                "benchmark": "weights",
                "cores": os.cpu_count(),
                "one_stream_s": round(one_stream, 2),
                "parallel_s": round(parallel, 2),
                "parallel_speedup": round(one_stream / parallel, 2),
                "without_ranges_s": round(plain, 2),
                "without_ranges_curl_s": round(plain_curl, 2),
                "unlimited_s": round(fast, 2),
                "unlimited_curl_s": round(fast_curl, 2),
                "cached_ms": round(resolved, 2),
                "cached_bare_request_ms": round(request, 2),
                "processes": PROCESSES,
                "processes_s": round(seconds, 2),
                "processes_downloads": round(sent, 2),
            }
        )
    )


if __name__ == "__main__":
    main()
