"""Hosts on loopback that answer like the hosts of LoRAs, well or badly.

A host maps paths to answers in `routes`, and keeps all requests in `seen`.
"""

import contextlib
import email.message
import hashlib
import http.server
import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self
from urllib.parse import parse_qsl, unquote, urlsplit

# The most seconds that an answer takes.
LONGEST = 20.0


@dataclass
class Seen:
    """One request."""

    path: str
    query: dict[str, str]
    headers: email.message.Message
    form: str = ""


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: "_Server"
    form: str  # the body of a POST, for answers to read

    def do_GET(self) -> None:
        self._answer_form("")

    def do_HEAD(self) -> None:
        self._answer_form("")

    def do_CONNECT(self) -> None:
        """Answer as a proxy for HTTPS; the path is the host and its port."""
        self._answer(self.path, {})

    def do_POST(self) -> None:
        self._answer_form(self.rfile.read(int(self.headers.get("Content-Length", 0))).decode(errors="replace"))

    def _answer_form(self, form: str) -> None:
        parts = urlsplit(self.path)
        self._answer(unquote(parts.path), dict(parse_qsl(parts.query)), form)

    def _answer(self, path: str, query: dict[str, str], form: str = "") -> None:
        host, self.form = self.server.host, form
        with host.lock:
            host.seen.append(Seen(path, query, self.headers, form))
        answer = host.routes.get(path, status(404))
        try:
            answer(self)
        except OSError:  # the client went away
            self.close_connection = True

    def reply(self, code: int, body: bytes = b"", headers: Mapping[str, str] | None = None) -> None:
        self.send_response(code)
        for name, value in ({"Content-Length": str(len(body))} | dict(headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None: ...


class _Server(http.server.ThreadingHTTPServer):
    host: "Host"
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], handler: type[_Handler]) -> None:
        super().__init__(address, handler)
        self.connections: set[socket.socket] = set()

    def process_request(self, request: socket.socket, client_address: object) -> None:
        self.connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: socket.socket) -> None:
        self.connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: object, client_address: object) -> None: ...


Answer = Callable[[_Handler], None]


class Host:
    """A host on 127.0.0.1, from entering the context to leaving it."""

    def __init__(self, routes: Mapping[str, Answer] | None = None) -> None:
        self.routes = dict(routes or {})
        self.seen: list[Seen] = []
        self.lock = threading.Lock()

    def __enter__(self) -> Self:
        """Listen."""
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.host = self
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Listen no more."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def stop(self) -> None:
        """Refuse connections from now on, and close those that clients keep."""
        self.__exit__()
        for connection in list(self._server.connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    @property
    def address(self) -> str:
        """Where it listens, as http://host:port."""
        return f"http://127.0.0.1:{self._server.server_port}"

    def url(self, path: str) -> str:
        """The URL of a path on it."""
        return f"{self.address}{path}"

    def asked(self, path: str) -> list[Seen]:
        """The requests for a path."""
        with self.lock:
            return [request for request in self.seen if request.path == path]


# ---------------------------------------------------------------------------------------------------------------------
# Answers


@dataclass
class File:
    """A file, served as by a good host; each field is a way to serve it worse.

    `ranges` is "good", "none" (ignored), "refused" (an error), "from the start" (206 with the right headers and the
    file's beginning) or "elsewhere" (206 with another Content-Range than was asked for).
    """

    content: bytes
    etag: str | None = '"1"'
    ranges: str = "good"
    conditional: bool = True
    stated: bool = True  # Content-Length
    type: str = "application/octet-stream"
    breaks: int = 0  # how many answers end with a reset, after `breaks_after` bytes
    breaks_after: int = 0
    delay: float = 0.0  # seconds for each `slice` bytes
    slice: int = 65536
    lock: threading.Lock = field(default_factory=threading.Lock)
    sent: int = 0  # bytes, over all answers

    def __call__(self, handler: _Handler) -> None:
        """Answer one request for it."""
        headers = {"Content-Type": self.type} | ({"ETag": self.etag} if self.etag else {})
        if self.conditional and self.etag and handler.headers.get("If-None-Match") == self.etag:
            handler.send_response(304)
            handler.send_header("ETag", self.etag)
            handler.end_headers()
            return None
        code, start, end = 200, 0, len(self.content)
        wanted = handler.headers.get("Range")
        if wanted and self.ranges == "refused":
            return handler.reply(501)
        if handler.headers.get("If-Range") not in (None, self.etag):
            wanted = None
        if wanted and self.ranges != "none":
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            code, start, end = 206, int(first), min(int(last or end - 1) + 1, end)
            shift = 7 if self.ranges == "elsewhere" else 0
            headers["Content-Range"] = f"bytes {start - shift}-{end - 1 - shift}/{len(self.content)}"
        body = self.content[start:end] if self.ranges != "from the start" else self.content[: end - start]
        handler.send_response(code)
        for name, value in headers.items():
            handler.send_header(name, value)
        if self.stated:
            handler.send_header("Content-Length", str(len(body)))
        else:
            handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        self._send(handler, body)
        return None

    def _send(self, handler: _Handler, body: bytes) -> None:
        with self.lock:
            breaks, self.breaks = self.breaks > 0, self.breaks - 1
        began = time.monotonic()
        body = body[: self.breaks_after] if breaks else body
        for start in range(0, len(body), self.slice):
            part = body[start : start + self.slice]
            handler.wfile.write(part if self.stated else b"%x\r\n%s\r\n" % (len(part), part))
            with self.lock:
                self.sent += len(part)
            if time.monotonic() - began > LONGEST:
                raise ConnectionError
            time.sleep(self.delay)
        if breaks:
            # Without lingering, closing resets the connection.
            handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            handler.connection.shutdown(socket.SHUT_RD)
            handler.connection.close()
            raise ConnectionError
        if not self.stated:
            handler.wfile.write(b"0\r\n\r\n")


def status(code: int, headers: Mapping[str, str] | None = None, body: bytes = b"") -> Answer:
    """An answer without a file."""
    return lambda handler: handler.reply(code, body, headers)


def redirect(url: str, code: int = 302, headers: Mapping[str, str] | None = None) -> Answer:
    """A redirect."""
    return status(code, {"Location": url, **(headers or {})})


def page(code: int = 200) -> Answer:
    """A login page."""
    body = b"<!DOCTYPE html><html><body>Please log in</body></html>"
    return status(code, {"Content-Type": "text/html; charset=utf-8"}, body)


def in_json(value: object, code: int = 200, headers: Mapping[str, str] | None = None) -> Answer:
    """Answer with a value, as JSON."""
    return status(code, {"Content-Type": "application/json", **(headers or {})}, json.dumps(value).encode())


def in_turn(*answers: Answer) -> Answer:
    """One answer after the other; the last one is repeated."""
    rest, lock = list(answers), threading.Lock()

    def answer(handler: _Handler) -> None:
        with lock:
            now = rest.pop(0) if len(rest) > 1 else rest[0]
        now(handler)

    return answer


def short(content: bytes, stated: int) -> Answer:
    """A body that is shorter than its stated length."""

    def answer(handler: _Handler) -> None:
        handler.reply(200, content, {"Content-Length": str(stated)})
        handler.close_connection = True

    return answer


def silent(handler: _Handler) -> None:
    """No answer, until the client goes away."""
    handler.connection.settimeout(LONGEST)
    handler.connection.recv(1)
    handler.close_connection = True


def trickle(beginning: bytes) -> Answer:
    """An answer that continues a byte at a time after its beginning."""

    def answer(handler: _Handler) -> None:
        began = time.monotonic()
        handler.wfile.write(beginning)
        while time.monotonic() < began + LONGEST:
            time.sleep(0.05)
            handler.wfile.write(b"a")
        handler.close_connection = True

    return answer


def tunnel(handler: _Handler) -> None:
    """A proxy's answer to CONNECT: pass bytes between the client and a port of loopback."""
    handler.send_response(200)
    handler.end_headers()
    relay(handler.connection, int(handler.path.rpartition(":")[2]))
    handler.close_connection = True


def relay(client: socket.socket, port: int) -> None:
    """Pass bytes to and fro between a client and a port of loopback, until one of them ends."""
    with socket.create_connection(("127.0.0.1", port)) as host:
        there = threading.Thread(target=_pass_on, args=(client, host), daemon=True)
        there.start()
        _pass_on(host, client)
        there.join()


def _pass_on(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
    for end in (source, target):
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)


def with_token(token: str, answer: Answer, otherwise: Answer) -> Answer:
    """One answer for requests with the token, another for those without."""

    def check(handler: _Handler) -> None:
        (answer if handler.headers.get("Authorization") == f"Bearer {token}" else otherwise)(handler)

    return check


def without_token(answer: Answer) -> Answer:
    """An answer as of presigned storage: 400 for requests with a token."""

    def check(handler: _Handler) -> None:
        (status(400) if "Authorization" in handler.headers else answer)(handler)

    return check


# ---------------------------------------------------------------------------------------------------------------------
# Hosts of LoRAs


def hugging_face(
    host: Host,
    storage: Host,
    repo: str,
    files: Mapping[str, bytes],
    *,
    commit: str = "c" * 40,
    token: str | None = None,
    gated: bool = False,
    card: Mapping[str, object] | None = None,
    dates: Mapping[str, str] | None = None,
    revisions: tuple[str, ...] = ("main",),
    stated: Mapping[str, int] | None = None,
) -> None:
    """Make a host answer as Hugging Face does for one repo; the files' bytes come from a storage host.

    Without the token, a private repo (not gated) is hidden, and a gated one is listed but its files are refused.
    `stated` are files with sizes that are listed but do not exist.
    """
    denied = in_json({"error": "Repository not found"}, 401, {"X-Error-Code": "RepoNotFound"})
    refused = in_json({"error": "Access is restricted"}, 401, {"X-Error-Code": "GatedRepo"})

    def guarded(answer: Answer, otherwise: Answer) -> Answer:
        return answer if token is None else with_token(token, answer, otherwise)

    siblings = [_sibling(path, content) for path, content in files.items()]
    siblings += [{"rfilename": path, "size": size, "blobId": "0" * 40} for path, size in (stated or {}).items()]
    info = in_json({"id": repo, "sha": commit, "siblings": siblings, "cardData": dict(card or {}), "gated": gated})
    missing = in_json({"error": "Invalid rev id"}, 404, {"X-Error-Code": "RevisionNotFound"})
    tree = in_json([_listed(sibling) for sibling in siblings])
    for revision in {*revisions, commit}:
        host.routes[f"/api/models/{repo}/revision/{revision}"] = info if gated else guarded(info, denied)
    host.routes[f"/api/models/{repo}/tree/{commit}"] = tree if gated else guarded(tree, denied)
    host.routes[f"/api/models/{repo}/revision/missing"] = missing
    host.routes[f"/api/models/{repo}/paths-info/{commit}"] = in_json(
        [
            {
                "type": "file",
                "path": path,
                "size": 1,
                "oid": "0",
                "lastCommit": {"id": "0", "title": "", "date": (dates or {}).get(path, "2026-01-01T00:00:00.000Z")},
            }
            for path in files
        ]
    )
    for path, content in files.items():
        digest = hashlib.sha256(content).hexdigest()
        storage.routes[f"/{digest}"] = without_token(File(content, etag=f'"{digest}"'))
        described = {"X-Repo-Commit": commit, "X-Linked-Size": str(len(content)), "X-Linked-ETag": f'"{digest}"'}
        link = redirect(f"{storage.url('/' + digest)}?X-Amz-Signature=s3cr3t", headers=described)
        host.routes[f"/{repo}/resolve/{commit}/{path}"] = guarded(link, refused if gated else denied)


def _sibling(path: str, content: bytes) -> dict[str, object]:
    """A file in the description of a repo; a large one is in git as a pointer, and its description has its hash."""
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    file = {"rfilename": path, "size": len(content), "blobId": blob}
    if path.endswith((".safetensors", ".bin", ".tar")):
        file["lfs"] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
    return file


def _listed(sibling: Mapping[str, Any]) -> dict[str, object]:
    """A file in the listing of a repo's tree, from its entry in the description of the repo."""
    file = {"type": "file", "path": sibling["rfilename"], "size": sibling["size"], "oid": sibling["blobId"]}
    if lfs := sibling.get("lfs"):
        file["lfs"] = {"oid": lfs["sha256"], "size": lfs["size"], "pointerSize": lfs["pointerSize"]}
    return file


def civitai(
    host: Host,
    storage: Host,
    model: int,
    versions: list[Mapping[str, object]],
    contents: Mapping[int, bytes],
    token: str,
    denied: Answer,
) -> None:
    """Make a host answer as CivitAI does for one model; `denied` is its answer without a token."""
    described = []
    for version in versions:
        number = version["id"]
        content = contents[number]
        digest = hashlib.sha256(content).hexdigest()
        file = {
            "id": number * 10,
            "name": f"version{number}.safetensors",
            "type": "Model",
            "primary": True,
            "metadata": {"format": "SafeTensor"},
            "hashes": {"SHA256": digest.upper()},
            "downloadUrl": f"https://civitai.com/api/download/models/{number}?type=Model&format=SafeTensor",
        }
        described.append({"modelId": model, "files": [file], **version})
        host.routes[f"/api/v1/model-versions/{number}"] = in_json(described[-1])
        storage.routes[f"/{digest}"] = without_token(File(content))
        link = redirect(f"{storage.url('/' + digest)}?X-Amz-Signature=s3cr3t")
        host.routes[f"/api/download/models/{number}"] = with_token(token, link, denied)
    host.routes[f"/api/v1/models/{model}"] = in_json({"id": model, "modelVersions": described})


def replicate(
    host: Host,
    storage: Host,
    model: str,
    archive: bytes,
    *,
    version: str | None = None,
    etag: str = '"1"',
    token: str | None = None,
) -> File:
    """Make a host answer as Replicate does for the weights of a model's newest version, or of another one."""
    file = File(archive, etag=etag)
    place = f"/xezq/{version or 'newest'}/trained_model.tar"
    storage.routes[place] = without_token(file)
    link = redirect(storage.url(place))
    path = f"/{model}/versions/{version}/_weights" if version else f"/{model}/_weights"
    host.routes[path] = link if token is None else with_token(token, link, status(404))
    return file
