"""Measure the cluster on this machine, with workers that sleep where a GPU would draw; the last line is JSON.

    python -m bench.cluster [overhead] [cost] [controller] [scaling] [peace] [kills] [postgres] [death] [database] …

Everything is real but the predictor: Cog's servers, Ray, HTTP, the database. The predictor sleeps LOAD_SECONDS for a
LoRA that it does not hold, then as long as the prompt says; with "and talks" in the prompt, it prints 28 steps.
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
from functools import partial
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
# Zipf's law: the second LoRA is requested half as often as the first, the third a third as often.
WEIGHTS = [1 / rank for rank in range(1, LORAS + 1)]
# Titles of processes that are killed, one every three seconds: workers, their Cog servers, fronts, and a node.
KILLS = ("CogWorker", "cog.server.http", "Front", "CogWorker", "raylet/raylet")
KILLS += ("cog.server.http", "CogWorker", "Front", "CogWorker", "cog.server.http")


@contextlib.contextmanager
def cluster(*options: str, database: str | None = None) -> Iterator[Cluster]:
    """A running cluster with the sleeping predictor."""
    with (
        tempfile.TemporaryDirectory(prefix="flux-sprites-bench-") as folder,
        cluster_in(Path(folder), "log", *options, database=database) as running,
    ):
        yield running


def cluster_in(folder: Path, log: str, *options: str, database: str | None = None, port: int | None = None) -> Cluster:
    """The cluster, not yet started, with its predictor, database and files in a folder."""
    (folder / "predict.py").write_text(PREDICTOR)
    environment = {
        "DATABASE_URL": database or f"sqlite:///{folder / 'predictions.db'}",
        "FILES_URL": str(folder / "files"),
    }
    return Cluster("--project", str(folder), *options, environment=environment, log=folder / log, port=port)


def percentile(values: list[float], share: float) -> float:
    """A percentile of seconds, in milliseconds, rounded."""
    return round(1000 * sorted(values)[min(len(values) - 1, int(share * len(values)))], 1)


def measure_overhead() -> dict[str, Any]:
    """Time that a synchronous request adds to its prediction: with Cog's server alone, and through the cluster."""

    def beyond(server: Server) -> list[float]:
        seconds = []
        for _ in range(60):
            started = time.perf_counter()
            answer = json.loads(server.request("POST", "/predictions", {"input": {"prompt": "0.1"}})[2])
            seconds.append(time.perf_counter() - started - answer["metrics"]["predict_time"])
            time.sleep(0.02)  # Cog's server refuses a request that comes before its slot is free
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


# Processes whose CPU time is counted: a word in each kind's command line.
TITLES = {
    "front": "Front",
    "worker": "CogWorker",
    "cog": "cog.server.http",
    "controller": "Controller",
}


def measure_cost() -> dict[str, Any]:
    """CPU time of a prediction of 4 seconds that prints its steps, of a GET of it, and of a second while 60 wait."""
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
        # Four at a time, of four seconds each: one prediction a second.
        "prediction_ms": {kind: round(drawn[kind] - idle[kind], 1) for kind in idle},
        "webhooks": webhooks,
        "look_ms": {kind: round((looking[kind] - idle[kind]) * seconds / looks, 1) for kind in idle},
        "waiting_ms_per_s": crowded,
    }


def measure_controller() -> dict[str, Any]:
    """CPU time that Serve's controller takes for idle workers."""
    used = {}
    for workers in (1, 8):
        with cluster("--workers", str(workers), "--fronts", "1") as running:
            time.sleep(10)  # until everything has started
            used[workers] = _used(running, lambda: time.sleep(30))["controller"]
    return {"one_ms_per_s": used[1], "eight_ms_per_s": used[8], "worker_ms_per_s": round((used[8] - used[1]) / 7, 2)}


def _used(running: Cluster, work: Callable[[], object]) -> dict[str, float]:
    """Milliseconds of CPU time for each second of some work, by kind of process."""
    before, started = _processor_seconds(running), time.perf_counter()
    work()
    wall = time.perf_counter() - started
    return {kind: round(1000 * (used - before[kind]) / wall, 1) for kind, used in _processor_seconds(running).items()}


def _processor_seconds(running: Cluster) -> dict[str, float]:
    """CPU seconds of each kind of process since it started."""

    def used(process: int) -> float:
        threads = Path(f"/proc/{process}/task").glob("*/schedstat")
        return sum(int(thread.read_text().split()[0]) for thread in threads) / 1e9

    return {kind: sum(map(used, running.processes(title))) for kind, title in TITLES.items()}


def measure_sharing() -> dict[str, Any]:
    """CPU time to parse and memory to hold a LoRA that another worker of the node already has.

    The LoRA is of rank 16, for all linear layers of FLUX.1's blocks, and its file is in the page cache.
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
    """500 requests over 20 LoRAs from 16 clients; each accepted prediction must end once."""
    draw = random.Random(7)
    wanted = draw.choices(range(LORAS), WEIGHTS, k=REQUESTS)
    seconds: list[float] = []
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
                    refused += 1  # as far as this client knows: it asks again
                    time.sleep(0.2)
            hooks.until_ended(name, 300)
            seconds.append(time.perf_counter() - started)

        harming = threading.Thread(target=harm, args=[running]) if harm else None
        started = time.perf_counter()
        if harming:
            harming.start()
        list(pool.map(ask, range(REQUESTS)))
        wall = time.perf_counter() - started
        if harming:
            harming.join()
        time.sleep(2)
        return {
            **_accounts(running, hooks),
            "wall_s": round(wall, 1),
            "asked_again": refused,
            "p50_ms": percentile(seconds, 0.5),
            "p95_ms": percentile(seconds, 0.95),
        }


def _accounts(running: Cluster, hooks: Hooks) -> dict[str, Any]:
    """How many predictions ended, in which status, how often, and how many had another status later."""
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


def kill_ten(running: Cluster, midway: Callable[[], object] = lambda: None) -> None:
    """Kill the processes of KILLS, and call `midway` after half of them."""
    for number, title in enumerate(KILLS, 1):
        time.sleep(3)
        running.kill_one(title)
        if number == len(KILLS) // 2:
            midway()


def measure_postgres() -> dict[str, Any]:
    """The load with ten kills, over a PostgreSQL server that crashes in the middle and is started again."""
    programs = find_programs()
    if programs is None:
        return {"skipped": "PostgreSQL is not installed"}
    with Postgres(programs) as database:

        def restart() -> None:
            database.stop()
            time.sleep(2)
            database.start()

        return measure_load(harm=partial(kill_ten, midway=restart), database=database.url)


def measure_death() -> dict[str, Any]:
    """The whole cluster is killed with 60 predictions in it and starts again over the same database."""
    with tempfile.TemporaryDirectory(prefix="flux-sprites-bench-") as folder, Hooks() as hooks:
        names = [f"request-{i}" for i in range(60)]
        with cluster_in(Path(folder), "log", "--workers", "4") as first:
            for name in names:
                first.predict({"prompt": "0.5"}, name, webhook=hooks.url, webhook_events_filter=["completed"])
            time.sleep(2)
            first.kill()
        before = len({body["id"] for _, body in hooks.received})
        with cluster_in(Path(folder), "log-2", "--workers", "4", port=first.port):
            for name in names:
                hooks.until_ended(name, 120)
            time.sleep(1)
        ends = [body["id"] for _, body in hooks.received]
    return {"accepted": 60, "ended_before": before, "ended": len(set(ends)), "deliveries": len(ends)}


def measure_database() -> dict[str, Any]:
    """Predictions a second that one front writes to the database from start to end, 32 at a time."""
    import asyncio

    from cluster.predictions import Prediction, Predictions, now

    async def rate(url: str) -> float:
        running = asyncio.Semaphore(32)
        async with Predictions(url) as known:

            async def one(i: int) -> None:
                async with running:
                    made = Prediction(f"rate-{i}", "front", now(), secret_input={}, shown_input={}, api="cog")
                    await known.create(made)
                    await known.record(made, status="processing", logs="1%")
                    await known.finish(made, [], status="succeeded", completed_at=now())

            started = time.perf_counter()
            await asyncio.gather(*(one(i) for i in range(1000)))
            return round(1000 / (time.perf_counter() - started), 1)

    with tempfile.TemporaryDirectory() as folder:
        rates = {"sqlite_per_s": asyncio.run(rate(f"sqlite:///{folder}/p.db"))}
    if programs := find_programs():
        with Postgres(programs) as database:
            rates["postgresql_per_s"] = asyncio.run(rate(database.url))
    return rates


def main() -> None:
    """Run the measures that the command line names, or all."""
    measures = {
        "overhead": measure_overhead,
        "cost": measure_cost,
        "controller": measure_controller,
        "scaling": measure_scaling,
        "peace": partial(measure_load, "--affinity", "none"),
        "peace_affinity": partial(measure_load, "--affinity", "router"),
        "kills": partial(measure_load, "--affinity", "none", harm=kill_ten),
        "kills_affinity": partial(measure_load, "--affinity", "router", harm=kill_ten),
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
