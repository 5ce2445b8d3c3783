"""A Cog server that is busy for ever while its predictor has nothing to do is given up, and no other one is."""

import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import local_cog.server
from harness.hosts import File, Host
from harness.waiting import wait_until
from local_cog.server import CogServer, Verdict, serve
from settings import ROOT
from tests.support.processes import finished

# A server is given up after two seconds here.
LOOKS, SECONDS = 10, 0.2
ENOUGH = 4.0
# After this request Cog has lost its slot: no folder can have such a name.
LONG_ID = "a" * 256
SENTENCE = "The server cannot go on: it has been busy for 2 seconds while its predictor had nothing to do"
# A minimal predictor.
SHOWING = """
import time

from cog import BasePredictor, Input

from service.occupancy import Occupancy


class Predictor(BasePredictor):
    def setup(self) -> None:
        self.occupancy = Occupancy()

    def predict(self, seconds: float = Input(default=0)) -> str:
        with self.occupancy.shown():
            time.sleep(seconds)
            return "done"
"""
SILENT = """
from cog import BasePredictor


class Predictor(BasePredictor):
    def predict(self) -> str:
        return "done"
"""


@pytest.fixture(autouse=True)
def short_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_cog.server, "LOOKS_AT_A_LOST_SLOT", LOOKS)
    monkeypatch.setattr(local_cog.server, "SECONDS_BETWEEN_CHECKS", SECONDS)


def small_server(folder: Path, source: str) -> CogServer:
    (folder / "predict.py").write_text(source)
    return CogServer(folder, environment={"PYTHONPATH": str(ROOT)}, log=folder / "log")


@pytest.fixture(scope="module")
def showing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CogServer]:
    """A server whose predictor shows whether it has a prediction; the last test that uses it takes its slot away."""
    with small_server(tmp_path_factory.mktemp("showing"), SHOWING) as running:
        running.wait_until_ready()
        yield running


def lose_slot(server: CogServer) -> None:
    """Make Cog lose its only slot, as a stranger would."""
    answer = server.request("PUT", f"/predictions/{LONG_ID}", {"input": {"prompt": "a"}})[1]
    assert answer["error"].startswith("Failed to create output dir: File name too long")


def judged(server: CogServer, seconds: float = ENOUGH) -> tuple[str | None, set[str]]:
    """What is said of a server within some seconds, looked at every `SECONDS`, and which states it was seen in."""
    verdict, seen, until = Verdict(server), set(), time.monotonic() + seconds
    while time.monotonic() < until:
        health = server.health()
        seen.add(health["status"])
        if reason := verdict.reason(health):
            return reason, seen
        time.sleep(SECONDS)
    return None, seen


def test_a_long_prediction_is_not_given_up(showing: CogServer) -> None:
    showing.start({"seconds": ENOUGH + 1}, "long")
    assert judged(showing) == (None, {"BUSY"})


def test_the_proxy_of_the_documentation_lets_no_id_pass_that_takes_the_slot_away(showing: CogServer) -> None:
    (pattern,) = re.findall(r'location ~ "(.*)"', (ROOT / "docs" / "reliability.md").read_text())
    passes = re.compile(pattern.replace(r"\z", r"\Z")).match
    good = ("a", "0", "a" * 128, "pred_1-2.3~4", "Z..", "a/cancel")
    assert all(passes(f"/predictions/{name}") for name in good)
    bad = ("", ".", "..", "../../x", "/etc/hostname", "a" * 129, "a\0", "a\n", "-a", "é", "a b", "a/b", "a/cancel/")
    assert not any(passes(f"/predictions/{name}") for name in bad)
    for name in good[:-1]:
        wait_until_ready(showing)
        assert showing.request("PUT", f"/predictions/{name}", {"input": {}})[1]["status"] == "succeeded"
    wait_until_ready(showing)
    # What POST becomes, should it bring an id of its own.
    assert showing.request("PUT", "/predictions/proxys", {"input": {}, "id": LONG_ID})[0] == 422
    wait_until_ready(showing)


def test_a_lost_slot_ends_the_server_with_a_sentence(showing: CogServer) -> None:
    wait_until_ready(showing)
    lose_slot(showing)
    with pytest.raises(SystemExit, match=SENTENCE):
        serve(showing)


def test_the_real_predictor_shows_it_too(tmp_path: Path, host: Host) -> None:
    environment = {"WEIGHTS_CACHE": str(tmp_path / "weights"), "WEIGHTS_ALLOW_PRIVATE_HOSTS": "1"}
    with CogServer(environment=environment, log=tmp_path / "log") as server:
        server.wait_until_ready()
        host.routes["/photo.png"] = File(bytes(10), delay=(ENOUGH + 0.5) / 10, slice=1)
        server.start({"prompt": "a", "image": host.url("/photo.png")}, "trickling")
        assert judged(server) == (None, {"BUSY"})
        wait_until_ready(server)
        inputs = {"prompt": "a", "aspect_ratio": "custom", "width": 256, "height": 256, "num_inference_steps": 50}
        server.start(inputs | {"num_outputs": 4}, "long")
        assert judged(server)[0] is None
        server.cancel("long")
        wait_until_ready(server)
        lose_slot(server)
        with pytest.raises(SystemExit, match=SENTENCE):
            serve(server)


def test_a_predictor_that_does_not_show_it_is_not_judged_by_it(tmp_path: Path) -> None:
    with small_server(tmp_path, SILENT) as server:
        server.wait_until_ready()
        lose_slot(server)
        assert judged(server) == (None, {"BUSY"})


# A worker as Ray Serve has it, without Ray Serve: asked for its health until it ends itself.
WORKER = """
import asyncio, sys
from pathlib import Path
import aiohttp
import local_cog.server
from cluster.worker import CogWorker, Verdict
from tests.test_lost_slot import LOOKS, SECONDS, SHOWING, lose_slot, small_server

async def main():
    local_cog.server.LOOKS_AT_A_LOST_SLOT = LOOKS
    worker = object.__new__(CogWorker.func_or_class)
    worker.server = small_server(Path(sys.argv[1]), SHOWING).__enter__()
    worker.verdict = Verdict(worker.server)
    print(worker.server.process.pid, worker.server.scratch.name, flush=True)
    worker.server.wait_until_ready()
    async with aiohttp.ClientSession(f"http://127.0.0.1:{worker.server.port}") as worker.client:
        await worker.check_health()
        lose_slot(worker.server)
        while True:
            await worker.check_health()
            await asyncio.sleep(SECONDS)

asyncio.run(main())
"""


def test_a_worker_whose_slot_is_lost_ends_and_its_server_with_it(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="the cluster needs cluster/requirements.txt")
    command = [sys.executable, "-c", WORKER, str(tmp_path)]
    done = finished(command)
    assert done.returncode == 1
    assert "The Cog server cannot go on; its worker ends." in done.stderr
    server, scratch = done.stdout.split()
    wait_until(lambda: not (Path(f"/proc/{server}/fd/0").exists() or Path(scratch).exists()), 10)


def wait_until_ready(server: CogServer) -> None:
    wait_until(lambda: server.health()["status"] == "READY", 20)
