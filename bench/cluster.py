"""Measures the cluster on this machine, with workers that sleep where a GPU would draw; the last line is JSON.

    python -m bench.cluster [overhead] [cost] [controller] [scaling] [peace] [kills] [postgres] [death] [database] …

Everything is real but the predictor: Cog's servers, Ray, HTTP, the database. It loads a LoRA that it does not
hold for LOAD_SECONDS, then sleeps for as long as its prompt says, in 28 steps that it tells where "and talks" follows.
"""

import contextlib
import http.client
import json
import os
import random
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from harness.cluster import ENDS, Cluster, Hooks, Server
from harness.postgres import Postgres, find_programs
from local_cog.server import CogServer

PREDICTOR = """
import time
from pathlib import Path as File

from cog import BasePredictor, Input, Path

LOAD_SECONDS, HELD = 0.6, 4


class Predictor(BasePredictor):
    def setup(self) -> None:
        self.held = []

    def predict(
        self,
        prompt: str = Input(description="seconds to sleep"),
        replicate_weights: str | None = Input(default=None),
    ) -> list[Path]:
        loads = int(bool(replicate_weights) and replicate_weights not in self.held)
        if loads:
            time.sleep(LOAD_SECONDS)
        self.held = [*(held for held in self.held if held != replicate_weights), replicate_weights][-HELD:]
        self.record_metric("loads", loads)
        seconds, _, talks = prompt.partition(" ")
        for step in range(28 if talks else 1):
            time.sleep(float(seconds) / (28 if talks else 1))
            if talks:
                print(f"{step + 1}/28", flush=True)
        output = File(f"/tmp/flux-sprites-bench-{id(self)}.webp")
        output.write_bytes(b"picture" * 1000)
        return [Path(output)]
"""
LORAS, CLIENTS, REQUESTS, RUN_SECONDS = 20, 16, 500, 0.2
# Zipf's law: the second LoRA is asked for half as often as the first, the third a third.
WEIGHTS = [1 / rank for rank in range(1, LORAS + 1)]
# One every three seconds: workers, their Cog servers, fronts, and in the middle a node.
KILLS = ("CogWorker", "cog.server.http", "Front", "CogWorker", "raylet/raylet")
KILLS += ("cog.server.http", "CogWorker", "Front", "CogWorker", "cog.server.http")


@contextlib.contextmanager
def cluster(*options: str, database: str | None = None) -> Iterator[Cluster]:
    """A cluster with a predictor that sleeps."""
    with tempfile.TemporaryDirectory(prefix="flux-sprites-bench-") as folder:
        directory = Path(folder)
        (directory / "predict.py").write_text(PREDICTOR)
        environment = {
            "DATABASE_URL": database or f"sqlite:///{directory / 'predictions.db'}",
            "FILES_URL": str(directory / "files"),
        }
        with Cluster("--project", folder, *options, environment=environment, log=directory / "log") as running:
            yield running


def percentile(values: list[float], share: float) -> float:
    """In milliseconds, rounded."""
    return round(1000 * sorted(values)[min(len(values) - 1, int(share * len(values)))], 1)


def measure_overhead() -> dict[str, Any]:
    """What a synchronous request takes beyond its prediction, alone and through the cluster."""

    def beyond(server: Server) -> list[float]:
        seconds = []
        for _ in range(60):
            started = time.perf_counter()
            answer = json.loads(server.request("POST", "/predictions", {"input": {"prompt": "0.1"}})[2])
            seconds.append(time.perf_counter() - started - answer["metrics"]["predict_time"])
            time.sleep(0.02)  # a bare coglet refuses what comes before its slot is free
        return seconds[10:]

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "predict.py").write_text(PREDICTOR)
        with CogServer(Path(folder), log=Path(folder) / "log") as running:
            running.wait_until_ready()
            alone = beyond(Server(running.port))
    with cluster("--workers", "1", "--fronts", "1") as running:
        through = beyond(running)
    return {
        "coglet_p50_ms": percentile(alone, 0.5),
        "cluster_p50_ms": percentile(through, 0.5),
        "cluster_p95_ms": percentile(through, 0.95),
        "front_p50_ms": round(percentile(through, 0.5) - percentile(alone, 0.5), 1),
    }


# Whose processor time is counted, by the words in its command line.
TITLES = {
    "front": "Front",
    "worker": "CogWorker",
    "cog": "cog.server.http",
    "controller": "Controller",
}


def measure_cost() -> dict[str, Any]:
    """Processor time: of a prediction of 4 seconds that tells its steps, of a look at it, of a second while 60 wait."""
    with cluster("--workers", "4") as running, Hooks() as hooks:

        def draw(*names: str) -> None:
            for name in names:
                running.predict({"prompt": "4 and talks"}, name, webhook=hooks.url)
            for name in names:
                hooks.until_ended(name, 120)

        draw("first", "second", "third", "fourth")
        hooks.received.clear()
        idle = _used(running, lambda: time.sleep(10))
        drawn = _used(running, lambda: [draw(*(f"request-{4 * i + j}" for j in range(4))) for i in range(4)])
        webhooks = len(hooks.received) / 16
        body = {"version": "any", "input": {"prompt": "0"}}
        known = json.loads(running.request("POST", "/v1/predictions", body, {"Prefer": "wait"})[2])["id"]
        looks, started = 300, time.perf_counter()
        looking = _used(running, lambda: [running.request("GET", f"/v1/predictions/{known}") for _ in range(looks)])
        seconds = time.perf_counter() - started
        waiting = [f"waiting-{i}" for i in range(60)]
        for name in waiting:
            running.predict({"prompt": "20"}, name)
        crowded = _used(running, lambda: time.sleep(10))
        for name in waiting:
            running.request("POST", f"/predictions/{name}/cancel")
    return {
        "idle_ms_per_s": idle,
        "drawing_four_ms_per_s": drawn,
        # Four at a time, of four seconds each: one in a second.
        "prediction_ms": {who: round(drawn[who] - idle[who], 1) for who in idle},
        "webhooks": webhooks,
        "look_ms": {who: round((looking[who] - idle[who]) * seconds / looks, 1) for who in idle},
        "waiting_ms_per_s": crowded,
    }


def measure_controller() -> dict[str, Any]:
    """Processor time that Serve's controller takes for having workers that have nothing to do."""
    used = {}
    for workers in (1, 8):
        with cluster("--workers", str(workers), "--fronts", "1") as running:
            time.sleep(10)  # until what starts has started
            used[workers] = _used(running, lambda: time.sleep(30))["controller"]
    return {"one_ms_per_s": used[1], "eight_ms_per_s": used[8], "worker_ms_per_s": round((used[8] - used[1]) / 7, 2)}


def _used(running: Cluster, work: Callable[[], object]) -> dict[str, float]:
    """Milliseconds of processor time for each second of some work, by who used them."""
    before, started = _processor_seconds(running), time.perf_counter()
    work()
    wall = time.perf_counter() - started
    return {who: round(1000 * (used - before[who]) / wall, 1) for who, used in _processor_seconds(running).items()}


def _processor_seconds(running: Cluster) -> dict[str, float]:
    """What each kind of process has used since it started."""

    def used(process: int) -> float:
        threads = Path(f"/proc/{process}/task").glob("*/schedstat")
        return sum(int(thread.read_text().split()[0]) for thread in threads) / 1e9

    return {who: sum(map(used, running.processes(title))) for who, title in TITLES.items()}


def measure_sharing() -> dict[str, Any]:
    """What a second worker of a node pays for a LoRA that the first one has: to parse it, and to hold it.

    The LoRA is of rank 16, for all linear layers of FLUX.1's blocks, and lies in the page cache.
    """
    import torch
    from diffusers import FluxTransformer2DModel
    from safetensors.torch import save_file
    from transformers import CLIPTextConfig, CLIPTextModel

    from harness.loras import random_lora
    from lora_loader import read_lora

    def own_memory() -> int:
        status = Path("/proc/self/status").read_text()
        return int(status.partition("RssAnon:")[2].split()[0]) * 1024

    with torch.device("meta"):
        models = FluxTransformer2DModel(guidance_embeds=True), CLIPTextModel(CLIPTextConfig())
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "lora.safetensors"
        save_file(random_lora(models[0], lambda name: "transformer_blocks" in name, 16, seed=0), file)
        size = len(file.read_bytes())
        seconds, held = [], []
        for _ in range(5):
            before, started = own_memory(), time.process_time()
            held.append(read_lora(file, *models))
            seconds.append(time.process_time() - started)
            grown = own_memory() - before
    return {
        "file_mb": round(size / 1e6),
        "parse_cpu_s": round(sorted(seconds)[2], 2),
        "own_memory_mb": round(grown / 1e6),
        "parsed_mb": round(held[0].nbytes / 1e6),
    }


def measure_scaling() -> dict[str, Any]:
    """Predictions a second with one worker and with four."""
    rates = {}
    for workers in (1, 4):
        with cluster("--workers", str(workers)) as running, ThreadPoolExecutor(3 * workers) as pool:
            count = 20 * workers

            def ask(_: int, to: Cluster = running) -> int:
                return to.request("POST", "/predictions", {"input": {"prompt": "1"}})[0]

            list(pool.map(ask, range(workers)))
            started = time.perf_counter()
            answers = list(pool.map(ask, range(count)))
            rates[workers] = count / (time.perf_counter() - started)
            assert answers == [200] * count
    return {"one_per_s": round(rates[1], 3), "four_per_s": round(rates[4], 3), "ratio": round(rates[4] / rates[1], 2)}


def measure_load(
    *options: str, harm: Callable[[Cluster], None] | None = None, database: str | None = None
) -> dict[str, Any]:
    """500 requests over 20 LoRAs from 16 clients; what is accepted must end once."""
    draw = random.Random(7)
    wanted = draw.choices(range(LORAS), WEIGHTS, k=REQUESTS)
    seconds: dict[str, float] = {}
    refused = 0
    options = ("--workers", "4", "--nodes", "2", *options)
    with Hooks() as hooks, cluster(*options, database=database) as running, ThreadPoolExecutor(CLIENTS) as pool:

        def ask(index: int) -> None:
            nonlocal refused
            name, started = f"request-{index}", time.perf_counter()
            inputs = {"prompt": str(RUN_SECONDS), "replicate_weights": f"owner/lora-{wanted[index]}"}
            while True:
                try:
                    running.predict(inputs, name, webhook=hooks.url, webhook_events_filter=["completed"])
                    break
                except (OSError, http.client.HTTPException, AssertionError):
                    refused += 1  # not accepted, as far as this client knows: it asks again
                    time.sleep(0.2)
            hooks.until_ended(name, 300)
            seconds[name] = time.perf_counter() - started

        harming = threading.Thread(target=harm, args=[running]) if harm else None
        started = time.perf_counter()
        if harming:
            harming.start()
        list(pool.map(ask, range(REQUESTS)))
        wall = time.perf_counter() - started
        if harming:
            harming.join()
        time.sleep(2)
        return {**_accounts(running, hooks), "wall_s": round(wall, 1), "asked_again": refused, **_latencies(seconds)}


def _latencies(seconds: dict[str, float]) -> dict[str, float]:
    values = list(seconds.values())
    return {"p50_ms": percentile(values, 0.5), "p95_ms": percentile(values, 0.95)}


def _accounts(running: Cluster, hooks: Hooks) -> dict[str, Any]:
    """Who ended, how, how often, and whether the same is said later."""
    ends: dict[str, set[str]] = {}
    loads = 0
    for headers, body in hooks.received:
        if body["status"] in ENDS:
            ends.setdefault(body["id"], set()).add(json.dumps(body, sort_keys=True))
            assert headers["webhook-id"] == f"{body['id']}-completed"
            loads += body["metrics"].get("loads", 0)
    again = [json.loads(running.request("PUT", f"/predictions/{name}", {})[2])["status"] for name in ends]
    states = [json.loads(end)["status"] for said in ends.values() for end in said]
    return {
        "lost": REQUESTS - len(ends),
        "ended_twice": sum(len(said) > 1 for said in ends.values()),
        "succeeded": states.count("succeeded"),
        "changed_later": sum(state != "succeeded" for state in again) - sum(state != "succeeded" for state in states),
        "loads": loads,
        "deliveries": sum(body["status"] in ENDS for _, body in hooks.received),
    }


def kill_ten(running: Cluster) -> None:
    """Workers, their Cog servers, fronts and a node, one every three seconds."""
    for title in KILLS:
        time.sleep(3)
        running.kill_one(title)


def measure_kills(affinity: str) -> dict[str, Any]:
    """The load with ten kills."""
    return measure_load("--affinity", affinity, harm=kill_ten)


def measure_peace(affinity: str) -> dict[str, Any]:
    """The load without harm."""
    return measure_load("--affinity", affinity)


def measure_postgres() -> dict[str, Any]:
    """Ten kills over PostgreSQL, which is restarted in the middle, crashing."""
    programs = find_programs()
    if programs is None:
        return {"skipped": "PostgreSQL is not installed"}
    with Postgres(programs) as database:

        def harm(running: Cluster) -> None:
            for i, title in enumerate(KILLS):
                time.sleep(3)
                running.kill_one(title)
                if i == 4:
                    database.stop()
                    time.sleep(2)
                    database.start()

        return measure_load(harm=harm, database=database.url)


def measure_death() -> dict[str, Any]:
    """The whole cluster dies with 60 predictions in it and starts again over the same database."""
    with tempfile.TemporaryDirectory(prefix="flux-sprites-bench-") as folder, Hooks() as hooks:
        directory = Path(folder)
        (directory / "predict.py").write_text(PREDICTOR)
        environment = {"DATABASE_URL": f"sqlite:///{directory / 'p.db'}", "FILES_URL": str(directory / "files")}
        options = ("--project", folder, "--workers", "4")
        names = [f"request-{i}" for i in range(60)]
        with Cluster(*options, environment=environment, log=directory / "log") as first:
            for name in names:
                first.predict({"prompt": "0.5"}, name, webhook=hooks.url, webhook_events_filter=["completed"])
            time.sleep(2)
            first.kill()
        before = len({body["id"] for _, body in hooks.received})
        with Cluster(*options, environment=environment, log=directory / "log-2", port=first.port):
            for name in names:
                hooks.until_ended(name, 120)
            time.sleep(1)
        ends = [body["id"] for _, body in hooks.received]
    return {"accepted": 60, "ended_before": before, "ended": len(set(ends)), "deliveries": len(ends)}


def measure_database() -> dict[str, Any]:
    """Accepted predictions a second that the database takes from one front, 32 at a time."""
    import asyncio

    from cluster.predictions import Prediction, Predictions, now

    async def rate(url: str) -> float:
        async with Predictions(url) as known:

            async def one(i: int) -> None:
                made = Prediction(f"rate-{i}", "front", now(), secret_input={}, shown_input={}, api="cog")
                await known.create(made)
                await known.record(made, status="processing", logs="1%")
                await known.finish(made, [], status="succeeded", completed_at=now())

            started = time.perf_counter()
            running = asyncio.Semaphore(32)

            async def bounded(i: int) -> None:
                async with running:
                    await one(i)

            await asyncio.gather(*(bounded(i) for i in range(1000)))
            return round(1000 / (time.perf_counter() - started), 1)

    with tempfile.TemporaryDirectory() as folder:
        rates = {"sqlite_per_s": asyncio.run(rate(f"sqlite:///{folder}/p.db"))}
    if programs := find_programs():
        with Postgres(programs) as database:
            rates["postgresql_per_s"] = asyncio.run(rate(database.url))
    return rates


def main() -> None:
    """Measure what the command line names, or everything."""
    measures = {
        "overhead": measure_overhead,
        "cost": measure_cost,
        "controller": measure_controller,
        "scaling": measure_scaling,
        "peace": lambda: measure_peace("none"),
        "peace_affinity": lambda: measure_peace("router"),
        "kills": lambda: measure_kills("none"),
        "kills_affinity": lambda: measure_kills("router"),
        "postgres": measure_postgres,
        "death": measure_death,
        "database": measure_database,
        "sharing": measure_sharing,
    }
    results = {}
    for name in sys.argv[1:] or measures:
        print(f"{name} …", file=sys.stderr, flush=True)
        results[name] = measures[name]()
        print(f"{name}: {json.dumps(results[name])}", file=sys.stderr, flush=True)
    print(json.dumps({"bench": "cluster", "cores": os.cpu_count(), **results}))


if __name__ == "__main__":
    main()
