"""Random predictions against the real Cog server, and checks of everything that they leave behind.

All modes, sizes, models, precisions and formats, good and bad LoRAs; clients that wait, cancel, hang up or ask twice;
slow and dead receivers of webhooks. Every answer is checked; every 20th picture is drawn again by a process that has
drawn nothing before; memory, tensors, descriptors, threads, temporary files and the disk cache are counted.
"""

import contextlib
import http.client
import io
import json
import multiprocessing
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import FluxTransformer2DModel
from PIL import Image
from safetensors.torch import save

from harness.hosts import Host, _Handler, status
from harness.loras import random_lora
from harness.waiting import wait_until
from local_cog.server import LOOPBACK, CogServer, failure, files, free_port
from service.data_uri import uri
from service.leftovers import SECONDS_KEPT
from settings import GIB, ROOT

# Added to a copy of predict.py: after a prediction with this prompt, tensors and Python's threads are counted.
COUNT = "count the tensors"
COUNTING = f"""

import gc
import threading

_counted_draw = Predictor._draw


def _draw_and_count(self, request, stopwatch):
    paths = _counted_draw(self, request, stopwatch)
    if request.prompt == {COUNT!r}:
        gc.collect()
        tensors = sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())
        self.record_metric("count.tensors", tensors)
        threads = [thread for thread in threading.enumerate() if not thread.name.startswith("Dummy")]
        self.record_metric("count.threads", len(threads))
    return paths


Predictor._draw = _draw_and_count
"""
PROMPTS = tuple(
    f"a {colour} {thing}" for colour in ("red", "green", "blue") for thing in ("fox", "cube", "sky", "boat")
)
QUIET = {"model": "schnell", "num_inference_steps": 1, "aspect_ratio": "custom", "width": 256, "height": 256, "seed": 1}
QUIET |= {"disable_safety_checker": True}
CLOSE = {"Connection": "close"}
CACHE_BYTES = 8 * 2**20  # two thirds of the requested LoRAs
WAYS = {"wait": 58, "cancel": 14, "hang up": 8, "twice": 10, "slow webhook": 4, "dead webhook": 6}
# Failures that a good request may have.
EXPECTED = ("NSFW content detected", "no numbers at all")
SECONDS_TO_END = 30
RISE_BYTES = 10_000_000


@dataclass(frozen=True)
class Case:
    """One request: its inputs, how the client sends it, and whether it can be drawn."""

    name: str  # the prediction's id
    inputs: dict[str, Any]
    way: str
    good: bool
    patience: float  # seconds until the client cancels or hangs up


@dataclass
class Report:
    """The results of a run."""

    ends: Counter = field(default_factory=Counter)  # by way and status
    problems: list[str] = field(default_factory=list)
    counts: dict[int, dict[str, int]] = field(default_factory=dict)  # by the number of requests before
    resident: list[int] = field(default_factory=list)  # bytes of the worker's memory, after each request
    compared: int = 0
    seconds: float = 0.0
    slowest_s: float = 0.0
    cache_bytes: int = 0  # the maximum

    def figures(self, block: int, warm: int) -> dict[str, Any]:
        """The report as JSON values."""
        lowest = self.lowest(block)
        return {
            "requests": len(self.resident),
            "seconds": round(self.seconds),
            "ends": {f"{way}: {status}": count for (way, status), count in sorted(self.ends.items())},
            "compared_bit_for_bit": self.compared,
            "counts": self.counts,
            "lowest_resident_mb_of_each_block": [round(size / 1e6, 1) for size in lowest],
            "rise_mb": round((lowest[-1] - lowest[warm // block]) / 1e6, 1),
            "disk_cache_mb_at_most": round(self.cache_bytes / 1e6, 2),
            "slowest_s": round(self.slowest_s, 1),
            "problems": self.problems,
        }

    def lowest(self, block: int) -> list[int]:
        """The lowest resident memory of each block of requests."""
        return [min(self.resident[start : start + block]) for start in range(0, len(self.resident), block)]


# ---------------------------------------------------------------------------------------------------------------------
# The world around the server


class World(Host):
    """A host of LoRAs and a photo that also takes webhooks, at once or slowly; no connection is kept."""

    def __init__(self) -> None:
        self.files = {f"/good-{seed}.safetensors": make_lora(seed) for seed in range(8)}
        self.files |= {f"/bad-{number}.safetensors": content for number, content in enumerate(_bad_loras())}
        self.photo = _photo(random.Random(0))
        self.files |= {"/photo.webp": _encoded(self.photo, "webp")}
        self.ended: dict[str, list[str]] = {}  # statuses that webhooks told, by prediction
        self.dead = f"http://{LOOPBACK}:{free_port()}"
        routes = {path: status(200, CLOSE, content) for path, content in self.files.items()}
        routes |= {"/missing.safetensors": status(404, CLOSE), "/fast": self._take, "/slow": self._take}
        super().__init__(routes)

    def _take(self, handler: _Handler) -> None:
        told = json.loads(handler.form)
        self.seen.clear()  # webhooks carry whole pictures
        if handler.path == "/slow":
            time.sleep(2)
        self.ended.setdefault(told["id"], []).append(told["status"])
        handler.reply(200, headers=CLOSE)


def make_lora(seed: int, rank: int = 48) -> bytes:
    """A LoRA of all attention projections of the miniature, in diffusers' names."""
    config = FluxTransformer2DModel.load_config(ROOT / "mini/dev/transformer")
    with torch.device("meta"):
        transformer = FluxTransformer2DModel.from_config(config)
    return save(random_lora(transformer, lambda name: ".attn." in name, rank, seed, dtype=torch.float32))


def _bad_loras() -> list[bytes]:
    whole = make_lora(99)
    return [
        whole[: len(whole) // 2],
        b"<html>Please log in</html>",
        b"",
        whole[:200] + bytes(1000) + whole[1200:],
        save({"transformer.transformer_blocks.0.attn.to_q.lora_A.weight": torch.ones(4, 7)}),
        save({"transformer.transformer_blocks.0.attn.to_q.diff": torch.full((4, 4), float("nan"))}),
    ]


def _photo(rng: random.Random) -> Image.Image:
    size = rng.randrange(48, 257), rng.randrange(48, 257)
    pixels = np.random.default_rng(rng.randrange(2**32)).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size)


def _encoded(image: Image.Image, form: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form)
    return buffer.getvalue()


# ---------------------------------------------------------------------------------------------------------------------
# Requests


def make_case(rng: random.Random, name: str, hosts: World, prompts: Sequence[str], *, compared: bool) -> Case:
    """A random request; one to be compared is always good, and its client waits."""
    inputs: dict[str, Any] = {
        "prompt": rng.choice(prompts),
        "seed": rng.randrange(2**63 - 4),
        "model": rng.choice(("dev", "schnell")),
        "num_inference_steps": rng.choice((1, 1, 2, 3)),
        "num_outputs": rng.choice((1, 1, 1, 1, 2)),
        # With few digits, as people write numbers: Cog may change the seventeenth one.
        "guidance_scale": round(rng.uniform(0, 10), 2),
        "output_format": rng.choice(("webp", "jpg", "png")),
        "output_quality": rng.randint(0, 100),
        "disable_safety_checker": rng.random() < 0.8,
        "go_fast": rng.random() < 0.4,
    }
    inputs |= _canvas(rng, hosts) | _loras(rng, hosts)
    good = compared or rng.random() > 0.12
    if not good:
        inputs |= rng.choice(
            (
                {"extra_lora": f"{hosts.address}/bad-{rng.randrange(6)}.safetensors?token=secret"},
                {"extra_lora": f"{hosts.address}/missing.safetensors"},
                {"replicate_weights": rng.choice(("/etc/hostname", "not a reference at all", uri(b"nothing")))},
                {"image": uri(b"no picture", "image/png"), "mask": ""},
                {"image": "/etc/hostname"},
                {"aspect_ratio": "custom", "width": 256, "height": None, "image": ""},
            )
        )
        inputs = {name: value for name, value in inputs.items() if value is not None}
    way = "wait" if compared else rng.choices(list(WAYS), list(WAYS.values()))[0]
    return Case(name, inputs, way, good, rng.uniform(0, 1))


def _canvas(rng: random.Random, hosts: World) -> dict[str, Any]:
    """Inputs for the canvas, mostly small; one picture in a hundred has a megapixel."""
    kind = rng.choices(("custom", "image", "mask", "quarter", "megapixel"), (58, 18, 15, 8, 1))[0]
    if kind == "custom":
        return {"aspect_ratio": "custom", "width": rng.randrange(256, 321), "height": rng.randrange(256, 321)}
    if kind in ("image", "mask"):
        photo, by_url = _photo(rng), rng.random() < 1 / 3
        image = f"{hosts.address}/photo.webp" if by_url else uri(_encoded(photo, "png"), "image/png")
        mask = _photo(rng).resize((hosts.photo if by_url else photo).size)
        inputs = {"image": image, "prompt_strength": rng.choice((0, 0.3, 0.8, 1))}
        return inputs | ({"mask": uri(_encoded(mask, "png"), "image/png")} if kind == "mask" else {})
    ratio = rng.choice(("1:1", "21:9", "4:5"))
    return {"aspect_ratio": ratio, "megapixels": "0.25" if kind == "quarter" else "1", "num_outputs": 1}


def _loras(rng: random.Random, hosts: World) -> dict[str, Any]:
    inputs: dict[str, Any] = {}
    for name, scale in (("replicate_weights", "lora_scale"), ("extra_lora", "extra_lora_scale")):
        if rng.random() < 0.35:
            terms = [_lora(rng, hosts) for _ in range(rng.choice((1, 1, 1, 2, 3)))]
            inputs |= {name: " + ".join(terms), scale: rng.choice((0, 1, round(rng.uniform(-1, 3), 2)))}
    return inputs


def _lora(rng: random.Random, hosts: World) -> str:
    path = f"/good-{rng.randrange(8)}.safetensors"
    reference = f"{hosts.address}{path}" if rng.random() < 0.7 else uri(hosts.files[path])
    return reference if rng.random() < 0.7 else f"{reference}*{rng.uniform(-1, 1):.2f}"


# ---------------------------------------------------------------------------------------------------------------------
# The run


@dataclass
class Soak:
    """A server under load, and the report about it."""

    server: CogServer
    hosts: World
    cache: Path
    # The most seconds that `_count` repeats: a slow receiver holds its connection for two seconds.
    settle_s: float
    report: Report = field(default_factory=Report)

    def run(self, requests: int, *, warm: int, block: int, seed: int, prompts: Sequence[str] = PROMPTS) -> Report:
        """The report after so many requests; counts after `warm` requests are compared with counts at the end.

        Args:
            requests: their number, a multiple of `block`.
            warm: the number of requests after which caches are full, a multiple of `block`.
            block: the number of requests of which the lowest memory is taken.
            seed: of the requests.
            prompts: of the pictures.
        """
        rng, start, pictures = random.Random(seed), time.monotonic(), {}
        self._fill_caches(prompts)
        for number in range(requests):
            case = make_case(rng, f"soak-{seed}-{number}", self.hosts, prompts, compared=number % 20 == 0)
            began = time.monotonic()
            status, answer = self._ask(case)
            self._account(case, status, answer)
            if number % 20 == 0 and status == "succeeded":
                pictures[case.name] = case.inputs, [sha256(content).hexdigest() for _, content in files(answer)]
            self._wait_until_ready(case.name)
            self.report.slowest_s = max(self.report.slowest_s, time.monotonic() - began)
            self._measure()
            if number + 1 in range(warm, requests + 1, max(block, (requests - warm) // 3)) or number + 1 == requests:
                self.report.counts[number + 1] = self._count()
                print(f"{number + 1} requests: {self.report.counts[number + 1]}", file=sys.stderr)
        self.report.seconds = time.monotonic() - start
        self._judge(warm, block)
        self._compare(pictures)
        return self.report

    def _fill_caches(self, prompts: Sequence[str]) -> None:
        """Request every LoRA, and every prompt with both models, so that caches do not grow during the run."""
        for path in self.hosts.files:
            if path.startswith("/good"):
                self.server.predict(QUIET | {"prompt": prompts[0], "extra_lora": f"{self.hosts.address}{path}"})
        for prompt in prompts:
            for model in ("schnell", "dev"):
                self.server.predict(QUIET | {"prompt": prompt, "model": model})

    def _ask(self, case: Case) -> tuple[str, dict[str, Any]]:
        """The status at the end, and the answer if the client received one."""
        path, body = f"/predictions/{case.name}", {"input": case.inputs, "webhook_events_filter": ["completed"]}
        told = body | {"webhook": f"{self.hosts.address}/fast"}
        webhooks = {"slow webhook": f"{self.hosts.address}/slow", "dead webhook": f"{self.hosts.dead}/"}
        match case.way:
            case "wait" | "slow webhook" | "dead webhook":
                hook = {"webhook": webhooks[case.way]} if case.way in webhooks else {}
                answer = self.server.request("PUT", path, body | hook)[1]
            case "hang up":
                connection = http.client.HTTPConnection(LOOPBACK, self.server.port)
                connection.request("PUT", path, json.dumps(told), {"Content-Type": "application/json"})
                time.sleep(case.patience)
                connection.close()
                return self._told(case), {}
            case "cancel" | "twice":
                status, answer = self.server.request("PUT", path, told, {"Prefer": "respond-async"})
                if status != 202:
                    return f"refused with {status}", answer
                if case.way == "twice":
                    again = self.server.request("PUT", path, told, {"Prefer": "respond-async"})
                    # Once a prediction has ended, Cog takes its id as new, and may still be busy.
                    ended = again[0] == 409 and self._told(case)
                    if again[1].get("id") != case.name and not ended:
                        self._complain(f"{case.name}: asked again, was told {again}.")
                else:
                    time.sleep(case.patience)
                    self.server.cancel(case.name)
                return self._told(case), {}
        return answer.get("status", f"no status but {answer}"), answer

    def _told(self, case: Case) -> str:
        """The status that the last webhook told."""
        with contextlib.suppress(TimeoutError):
            return wait_until(lambda: self.hosts.ended.get(case.name), SECONDS_TO_END)[-1]
        return "never"

    def _account(self, case: Case, status: str, answer: dict[str, Any]) -> None:
        self.report.ends[case.way, status] += 1
        reason = (failure(answer) if answer else None) or ""
        interrupted = case.way in ("cancel", "hang up") and status == "canceled"
        if case.good:
            foreseen = any(text in reason for text in EXPECTED)
        else:
            foreseen = reason.endswith(".") and "The server" not in reason
        failed = status == "failed" and (not answer or foreseen)
        if not (failed or interrupted or (case.good and status == "succeeded")):
            kind = "good" if case.good else "bad"
            self._complain(f"{case.name} ({kind}, {case.way}): {status} {reason} {_brief(case.inputs)}.")
        if "secret" in str(answer) or str(ROOT) in str(answer):
            self._complain(f"{case.name}: its answer tells a token or a path.")

    def _wait_until_ready(self, name: str) -> None:
        """Wait until the server takes the next request; this tests health checks, too."""
        health = wait_until(lambda: (it := self.server.health())["status"] != "BUSY" and it, SECONDS_TO_END)
        if health["status"] != "READY":
            raise RuntimeError(f"After {name} the server is {health['status']}: {health}.")

    def _measure(self) -> None:
        worker = worker_of(self.server)
        self.report.resident.append(int(Path(f"/proc/{worker}/statm").read_text().split()[1]) * 4096)
        size = sum(file.stat().st_size for file in (self.cache / "loras").glob("*"))
        self.report.cache_bytes = max(self.report.cache_bytes, size)

    def _count(self) -> dict[str, int]:
        """Counts when nothing runs: the lowest ones within `settle_s`, or until they equal the first counts."""
        answer = self.server.predict(QUIET | {"prompt": COUNT})
        first = next(iter(self.report.counts.values()), None)
        least: dict[str, int] = answer["metrics"]["count"]
        until = time.monotonic() + self.settle_s
        while True:
            least |= {name: min(count, least.get(name, count)) for name, count in self._count_once().items()}
            if least == first or time.monotonic() > until:
                return least
            time.sleep(0.5)

    def _count_once(self) -> dict[str, int]:
        processes = {"server": self.server.process.pid, "worker": worker_of(self.server)}
        counts = {}
        for name, process in processes.items():
            counts[f"{name} descriptors"] = len(list(Path(f"/proc/{process}/fd").iterdir()))
            counts[f"{name} threads"] = sum(not _of_cogs_pool(task) for task in Path(f"/proc/{process}/task").iterdir())
        # Pictures are kept for a while, each in its own folder; `os.walk` ignores folders that vanish.
        there = [Path(folder, name) for folder, _, names in os.walk(self.server.scratch.name) for name in names]
        left = [file for file in there if file.parent.parent.parent == Path(self.server.scratch.name)]
        late = [file for file in left if _age(file) > SECONDS_KEPT + 1]
        return counts | {"temporary files": len(there) - len(left) + len(late)}

    def _judge(self, warm: int, block: int) -> None:
        report = self.report
        if len({tuple(count.items()) for count in report.counts.values()}) != 1:
            self._complain(f"Something grows: {report.counts}.")
        lowest = report.lowest(block)
        if (rise := lowest[-1] - lowest[warm // block]) >= RISE_BYTES:
            self._complain(f"Resident memory rises by {rise / 1e6:.1f} MB.")
        if report.cache_bytes > CACHE_BYTES:
            self._complain(f"The disk cache has {report.cache_bytes} bytes, of {CACHE_BYTES}.")

    def _complain(self, problem: str) -> None:
        self.report.problems.append(problem)
        print(problem, file=sys.stderr)

    def _compare(self, pictures: dict[str, tuple[dict[str, Any], list[str]]]) -> None:
        """Draw pictures again, each in a process that has drawn nothing, and compare."""
        os.environ |= {"WEIGHTS_CACHE": str(self.cache.parent / "fresh"), "WEIGHTS_ALLOW_PRIVATE_HOSTS": "1"}
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["harness.fresh"])
        with context.Pool(1, maxtasksperchild=1) as pool:
            drawn = pool.imap(_draw_afresh, [inputs for inputs, _ in pictures.values()])
            for (name, (inputs, before)), after in zip(pictures.items(), drawn, strict=True):
                self.report.compared += 1
                if before != after:
                    self._complain(f"{name} differs in a fresh process: {_brief(inputs)}.")


def _draw_afresh(inputs: dict[str, Any]) -> list[str]:
    from harness.fresh import draw  # loads the models: only in the processes that draw

    return draw(inputs)


def _age(file: Path) -> float:
    try:
        return time.time() - file.stat().st_mtime
    except FileNotFoundError:
        return 0


def _brief(inputs: dict[str, Any]) -> str:
    return json.dumps({name: value[:80] if isinstance(value, str) else value for name, value in inputs.items()})


def _of_cogs_pool(task: Path) -> bool:
    """Whether a thread in `/proc` belongs to the pool of Cog's runtime, which keeps threads for ten seconds."""
    with suppress(FileNotFoundError):
        return task.joinpath("comm").read_text().startswith("tokio")
    return True


def worker_of(server: CogServer) -> int:
    """The id of the process that predicts."""
    tasks = Path(f"/proc/{server.process.pid}/task").glob("*/children")
    (worker,) = [int(child) for children in tasks for child in children.read_text().split()]
    return worker


@contextmanager
def soaking(folder: Path, source: str, settle_s: float, **environment: str) -> Iterator[Soak]:
    """A server of its own project, ready for requests.

    Args:
        folder: for the project, its log and its cache.
        source: of its predict.py.
        settle_s: see `Soak`.
        environment: variables of the server.
    """
    (folder / "project").mkdir()
    (folder / "project" / "predict.py").write_text(source + COUNTING)
    environment |= {
        "PYTHONPATH": str(ROOT),
        "WEIGHTS_CACHE": str(folder / "weights"),
        "WEIGHTS_CACHE_GB": str(CACHE_BYTES / GIB),
        "WEIGHTS_ALLOW_PRIVATE_HOSTS": "1",
        "HF_TOKEN": "secret",
    }
    with (
        World() as hosts,
        CogServer(folder / "project", environment=environment, log=folder / "log") as server,
    ):
        server.wait_until_ready()
        yield Soak(server, hosts, folder / "weights", settle_s)
