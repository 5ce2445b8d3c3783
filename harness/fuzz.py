"""Hostile input against the real Cog server.

Requests are made from the server's OpenAPI document: valid ones, and ones that are wrong in a few places. Images, masks
and LoRA files are valid ones with bytes changed, cut, doubled and moved, and bombs; references are texts that look like
references. No answer may be a 5xx, take more than 30 seconds, show a path or a token of the server, or be a failure
that the predictor did not foresee; the worker must be the same at the end. A request that breaks a rule is made as
small as possible and shown.
"""

import http.client
import io
import json
import sys
import tarfile
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from PIL import Image

from harness.soak import World, make_lora, worker_of
from harness.waiting import wait_until
from local_cog import schema
from local_cog.server import LOOPBACK, CogServer, failure
from service.data_uri import uri
from settings import ROOT

SECRET = "t0ken-of-the-server"
LONGEST_S = 30
# The statuses that Cog documents, without 409 (busy).
STATUSES = {200, 202, 400, 404, 405, 413, 415, 422}
# Surfaces of the server, and their shares of the cases.
SHARES = {"requests": 0.45, "images": 0.2, "masks": 0.1, "loras": 0.15, "references": 0.1}
# Valid inputs that are quick to draw; others take minutes.
QUICK = {
    "num_inference_steps": st.integers(1, 2),
    "num_outputs": st.integers(1, 2),
    "megapixels": st.just("0.25"),
    "aspect_ratio": st.sampled_from(["custom", "custom", "9:21"]),
    "width": st.integers(256, 280),
    "height": st.integers(256, 280),
}
SMALL = {"prompt": "a", "num_inference_steps": 1, "prompt_strength": 0, "output_format": "png"}


@dataclass
class Fuzz:
    """A server under attack, and counts of its answers."""

    server: CogServer
    private: tuple[str, ...]  # texts that no answer may contain
    statuses: Counter = field(default_factory=Counter)
    slowest_s: float = 0.0
    cases: int = 0

    def __post_init__(self) -> None:
        """Note the worker's process, to check later that it is the same."""
        self._worker = worker_of(self.server)

    def predict(self, inputs: dict[str, Any]) -> None:
        """Request one prediction; it may be refused or fail by the rules."""
        self.send("POST", "/predictions", json.dumps({"input": inputs}))

    def send(self, method: str, path: str, body: str | bytes | None, kind: str = "application/json") -> None:
        """Send one HTTP request, and check its answer."""
        self.cases += 1
        began = time.monotonic()
        status, text = self._exchange(method, path, body, kind)
        while status == 409 and time.monotonic() < began + LONGEST_S:  # Cog answers just before it is free
            time.sleep(0.005)
            status, text = self._exchange(method, path, body, kind)
        self.slowest_s = max(self.slowest_s, time.monotonic() - began)
        self.statuses[status] += 1
        assert status in STATUSES, f"{status}: {text[:500]}"
        # The health check shows the operator's own settings, as they were printed at the start.
        told = [word for word in self.private if word in text and (word == SECRET or path != "/health-check")]
        assert not told, f"The answer tells {told}: {text[:500]}"
        if status == 200 and '"failed"' in text and path.startswith("/predictions"):
            reason = failure(json.loads(text)) or ""
            self.statuses["200, failed"] += 1
            assert "The server" not in reason, reason
            assert "Out of memory" not in reason, reason
        if self.cases % 20 == 0:
            self.check()

    def _exchange(self, method: str, path: str, body: str | bytes | None, kind: str) -> tuple[int, str]:
        connection = http.client.HTTPConnection(LOOPBACK, self.server.port, timeout=LONGEST_S)
        try:
            connection.request(method, path, body, {"Content-Type": kind})
            answer = connection.getresponse()
            return answer.status, answer.read().decode(errors="replace")
        finally:
            connection.close()

    def check(self) -> None:
        """Check that the server is healthy, with the same worker."""
        health = wait_until(lambda: (it := self.server.health())["status"] != "BUSY" and it, LONGEST_S)
        assert health["status"] == "READY", health
        assert worker_of(self.server) == self._worker, "The worker has died."

    # -- Surfaces: each takes a value of a strategy below

    def requests(self, request: tuple[str, str, str | bytes | None, str]) -> None:
        """Send any path, any method, any body."""
        self.send(*request)

    def images(self, content: bytes) -> None:
        """Send an image, which is read, resized and written; nothing is drawn."""
        self.predict(SMALL | {"image": uri(content, "image/png")})

    def masks(self, content: bytes) -> None:
        """Send a mask of a valid picture."""
        self.predict(SMALL | {"image": uri(PICTURES[0], "image/png"), "mask": uri(content, "image/png")})

    def loras(self, content: bytes) -> None:
        """Send a LoRA's file, which is parsed and, if it is valid, applied."""
        self.predict(SMALL | {"image": uri(PICTURES[0], "image/png"), "extra_lora": uri(content)})

    def references(self, text: str) -> None:
        """Send a reference to a LoRA."""
        self.predict(SMALL | {"image": uri(PICTURES[0], "image/png"), "replicate_weights": text})


# ---------------------------------------------------------------------------------------------------------------------
# Requests, from the OpenAPI document

ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=40),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def requests(document: dict[str, Any]) -> SearchStrategy[tuple[str, str, str | bytes | None, str]]:
    """Requests for the document's paths: method, path, body, content type."""
    name = st.text(st.characters(codec="ascii", categories=("L", "N", "P")), max_size=60)
    named = name.map(partial(quote, safe=""))
    paths = st.sampled_from(sorted(document["paths"])).flatmap(
        lambda path: named.map(lambda text: path.replace("{prediction_id}", text))
    )
    methods = st.sampled_from(["GET", "POST", "PUT", "DELETE", "PATCH", "HEAD"])
    bodies = predictions(document).map(json.dumps)
    broken = st.one_of(st.none(), st.binary(max_size=60), ANY_JSON.map(json.dumps), bodies.map(lambda text: text[:-7]))
    kinds = st.sampled_from(["application/json", "application/json", "text/plain", "multipart/form-data", ""])
    predict = st.tuples(st.just("POST"), st.just("/predictions"), bodies, st.just("application/json"))
    again = st.tuples(st.just("PUT"), named.map("/predictions/{}".format), bodies, st.just("application/json"))
    return st.one_of(
        predict, predict, predict, again, st.tuples(methods, paths | named.map("/{}".format), broken, kinds)
    )


def predictions(document: dict[str, Any]) -> SearchStrategy[dict[str, Any]]:
    """Bodies of predictions with the document's inputs, up to three of them wrong."""
    right = {name: _right(described) for name, described in schema.inputs(document).items()}
    optional = {name: value for name, value in right.items() if name not in ("prompt", *QUICK)}
    inputs = st.fixed_dictionaries({"prompt": right["prompt"], **QUICK}, optional=optional)
    wrong = st.dictionaries(st.sampled_from(sorted(right)), ANY_JSON, min_size=1, max_size=3)
    extra = st.dictionaries(st.text(max_size=12), ANY_JSON, max_size=2)
    broken = st.builds(lambda good, bad, more: more | good | bad, inputs, wrong, extra)
    mixed = st.one_of(inputs, broken, broken, broken)
    beside = st.dictionaries(st.sampled_from(["id", "context", "webhook_events_filter", "extra"]), ANY_JSON, max_size=1)
    return st.builds(lambda given, more: more | {"input": given}, mixed, st.one_of(st.just({}), st.just({}), beside))


def _right(described: dict[str, Any]) -> SearchStrategy[Any]:
    if "enum" in described:
        return st.sampled_from(described["enum"])
    low, high = described.get("minimum"), described.get("maximum")
    match described["type"], described.get("format"):
        case "integer", _:
            return st.integers(low, high)
        case "number", _:
            return st.floats(low, high)
        case "boolean", _:
            return st.booleans()
        case "string", "uri":
            return st.sampled_from(
                [uri(PICTURES[0], "image/png"), "", "no uri", "file:///etc/hostname", "/etc/hostname"]
            )
    return st.text(max_size=300) if "prompt" in described["title"].lower() else REFERENCES


# ---------------------------------------------------------------------------------------------------------------------
# Files


def _pictures() -> list[bytes]:
    """Small pictures in all formats that are read, and in rare modes."""
    pixels = np.random.default_rng(0).integers(0, 256, (24, 40, 4), dtype=np.uint8)
    rgba = Image.fromarray(pixels)
    made = []
    for form, mode in (
        ("png", "RGB"), ("png", "P"), ("png", "LA"), ("png", "1"), ("png", "I;16"), ("jpeg", "RGB"), ("jpeg", "CMYK"),
        ("webp", "RGBA"), ("gif", "P"), ("bmp", "RGB"), ("tiff", "F"), ("tiff", "RGB"), ("avif", "RGB"),
    ):  # fmt: skip
        picture = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257) if mode == "I;16" else rgba.convert(mode)
        buffer = io.BytesIO()
        picture.save(buffer, form, **({"save_all": True, "append_images": [picture] * 2} if form == "gif" else {}))
        made.append(buffer.getvalue())
    return made


def _bombs() -> list[bytes]:
    """Small files of large pictures, and of a text that unpacks to megabytes."""
    from PIL.PngImagePlugin import PngInfo

    made = []
    for form, mode, size in (("png", "1", (12000, 12000)), ("gif", "P", (9000, 9000)), ("tiff", "1", (40000, 9000))):
        buffer = io.BytesIO()
        Image.new(mode, size).save(buffer, form, **({"compression": "tiff_deflate"} if form == "tiff" else {}))
        made.append(buffer.getvalue())
    text = PngInfo()
    text.add_text("Comment", "x" * 30_000_000, zip=True)
    buffer = io.BytesIO()
    Image.new("L", (8, 8)).save(buffer, "png", pnginfo=text)
    return [*made, buffer.getvalue()]


def _lora_files() -> list[bytes]:
    """A LoRA, plain and in archives, one of them a bomb."""
    whole = make_lora(0, rank=1)
    packed, zipped, bomb = io.BytesIO(), io.BytesIO(), io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        entry = tarfile.TarInfo("output/lora.safetensors")
        entry.size = len(whole)
        tar.addfile(entry, io.BytesIO(whole))
    with zipfile.ZipFile(zipped, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("lora.safetensors", whole)
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("lora.safetensors", bytes(60_000_000))
    return [whole, whole, packed.getvalue(), zipped.getvalue(), bomb.getvalue()]


PICTURES, BOMBS, LORAS = _pictures(), _bombs(), _lora_files()


@st.composite
def mutated(draw: Callable[..., Any], files: list[bytes], head: int) -> bytes:
    """A file with a few changes, half of them among its first `head` bytes, by which formats are recognised."""
    content = bytearray(draw(st.sampled_from(files)))
    for _ in range(draw(st.integers(1, 6))):
        reach = head if draw(st.booleans()) else len(content)
        at = draw(st.integers(0, max(0, min(reach, len(content)) - 1)))
        length = draw(st.sampled_from([1, 2, 4, 16, 256]))
        match draw(st.sampled_from(["set", "set", "set", "insert", "delete", "double", "cut"])):
            case "set":
                content[at : at + length] = draw(st.binary(min_size=length, max_size=length))
            case "insert":
                content[at:at] = draw(st.binary(max_size=length))
            case "delete":
                del content[at : at + length]
            case "double":
                content[at:at] = content[at : at + length]
            case "cut":
                del content[max(1, at) :]
    return bytes(content)


HOST = r"(127\.0\.0\.1|\[::1\]|169\.254\.169\.254|0x7f000001)"
NAMES = ["", "..", "owner/name", "owner/name/version", "huggingface.co/o/r", "civitai.com/models/1", "data:,"]
JSON = '[{"path": "zorp", "scale": 0.5, "clip": 1, "blocks": {"single_blocks.0-1": 0}}]'
REFERENCES = st.one_of(
    st.sampled_from(NAMES),
    st.from_regex(r"\A(https?://)?" + HOST + r"(:[0-9]{1,6})?(/[!-~]{0,20})?\Z"),
    st.from_regex(r"\A(\.\./|/|~/|file://|data:)[!-~]{0,40}\Z"),
    # Without a dot, a text is no host name: no host outside is contacted.
    st.text(st.characters(exclude_characters=".", exclude_categories=("Cs",)), max_size=80),
)
TERMS = st.builds("{}*{}".format, st.sampled_from(["zorp", "bold", *NAMES]), st.integers(-12, 12))
SUMS = st.one_of(
    st.lists(TERMS, max_size=10).map(" + ".join),
    mutated([JSON.encode()], len(JSON)).map(lambda content: content.decode(errors="replace")),
)


# ---------------------------------------------------------------------------------------------------------------------
# The run


def run(fuzz: Fuzz, cases: int, seed: int) -> None:
    """Send so many cases to all surfaces.

    Raises:
        AssertionError: a rule was broken; shows the smallest case found.
    """
    for bomb in BOMBS:
        fuzz.images(bomb)
        fuzz.masks(bomb)
    strategies = {
        "requests": requests(fuzz.server.schema()),
        "images": mutated(PICTURES, 64),
        "masks": mutated(PICTURES, 64),
        "loras": mutated(LORAS, 3000),
        "references": st.one_of(REFERENCES, SUMS),
    }
    for surface, share in SHARES.items():
        options = settings(
            max_examples=max(1, round(cases * share)),
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
            phases=(Phase.generate, Phase.shrink),
        )
        before, began = fuzz.cases, time.monotonic()
        seeded(seed)(options(given(strategies[surface])(_case_of(getattr(fuzz, surface)))))()
        print(f"{surface}: {fuzz.cases - before} cases, {time.monotonic() - began:.0f} s", file=sys.stderr)


def _case_of(surface: Callable[[Any], None]) -> Callable[[Any], None]:
    def case(made: Any) -> None:  # noqa: ANN401 (a strategy's value)
        surface(made)

    return case


@contextmanager
def fuzzing(folder: Path) -> Iterator[Fuzz]:
    """A server with secret tokens; all its hosts are on this machine."""
    with World() as hosts:
        environment = {
            "WEIGHTS_CACHE": str(folder / "weights"),
            "WEIGHTS_CACHE_GB": "0.1",
            "HF_TOKEN": SECRET,
            "REPLICATE_API_TOKEN": SECRET,
            "CIVITAI_API_TOKEN": SECRET,
            "HF_ENDPOINT": hosts.address,
            "REPLICATE_ENDPOINT": hosts.address,
            "CIVITAI_ENDPOINT": hosts.address,
        }
        with CogServer(environment=environment, log=folder / "log") as server:
            server.wait_until_ready()
            private = (SECRET, f"{ROOT}/", server.scratch.name, "site-packages", "Traceback", 'File "', "/tmp/")
            yield Fuzz(server, private)
