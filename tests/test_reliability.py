"""Faults, load and hostile input against the real Cog server: each row of docs/reliability.md."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import save

from bench.soak import worker_of
from cog_server import ROOT, CogServer, failure, files, serve
from tests.faulty import HUNGRY, write_project
from tests.lora_files import EXACT, changes, is_block
from tests.test_predict import encoded, photo, uri

CPU = torch.device("cpu")
TINY = {
    "prompt": "a red fox",
    "model": "schnell",
    "num_inference_steps": 1,
    "seed": 3,
    "output_format": "png",
    "aspect_ratio": "custom",
    "width": 256,
    "height": 256,
    "disable_safety_checker": True,
}
# Pictures that take long enough to be interrupted.
LONG = TINY | {"num_inference_steps": 50, "num_outputs": 4}
PHASES = ("input", "loras", "swap", "prompt", "denoise", "decode", "safety", "encode")


def make_lora(seed: int, rank: int = 4) -> bytes:
    """A LoRA for the miniature; each seed's is another."""
    config = FluxTransformer2DModel.load_config(ROOT / "mini/dev/transformer")
    with torch.device("meta"):
        transformer = FluxTransformer2DModel.from_config(config)
    return save(EXACT["diffusers"](changes(transformer, only=is_block, seed=seed, rank=rank)))


def picture(server: CogServer, **inputs: object) -> bytes:
    answer = server.predict(TINY | inputs)
    assert failure(answer) is None
    return files(answer)[0][1]


def wait_for(condition: object, seconds: float) -> None:
    give_up = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.05)


def when_idle(server: CogServer, seconds: float = 10) -> tuple[str, str | None]:
    """What the first health check says that finds no prediction running."""
    give_up = time.monotonic() + seconds
    while (health := server.health())["status"] == "BUSY":
        assert time.monotonic() < give_up
        time.sleep(0.02)
    return health["status"], health.get("user_healthcheck_error")


# ---------------------------------------------------------------------------------------------------------------------
# Faults


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CogServer]:
    folder = tmp_path_factory.mktemp("faulty")
    environment = HUNGRY | {"PYTHONPATH": str(ROOT), "WEIGHTS_CACHE": str(folder / "weights")}
    with CogServer(write_project(folder), environment=environment, log=folder / "log") as running:
        running.wait_until_ready()
        yield running


@pytest.mark.parametrize("phase", PHASES)
def test_a_phase_without_memory_fails_alone(faulty: CogServer, phase: str) -> None:
    inputs = TINY | {"image": uri(encoded(photo(256, 256)), "image/png")}
    before = picture(faulty, **inputs)
    # A LoRA that no cache has, and a prompt that none has: else there would be nothing to do in some phases.
    new = {"replicate_weights": uri(make_lora(PHASES.index(phase), rank=64)), "disable_safety_checker": False}
    answer = faulty.predict(inputs | new | {"prompt": f"starve {phase}"})
    assert failure(answer) == (
        f"Out of memory in the phase {phase}; nothing is lost: try a smaller picture, a smaller LoRA or fewer outputs."
    )
    assert list(answer["metrics"]["timing"])  # of the phases before it
    assert str(ROOT) not in str(answer)
    assert picture(faulty, **inputs) == before


def test_a_bug_is_told_without_what_it_knows(faulty: CogServer) -> None:
    before = picture(faulty)
    answer = faulty.predict(TINY | {"prompt": "break"})
    assert failure(answer) == "The server failed with KeyError; its log says where."
    log = faulty.log.read_text()
    assert "KeyError: 'secret.bin is not there'" in log
    assert "predict.py:" in log
    assert "/srv" not in str(answer)
    assert picture(faulty) == before


def test_a_corrupted_weight_is_unhealthy_and_the_next_request_repairs_it(faulty: CogServer) -> None:
    before = picture(faulty)
    assert faulty.health()["status"] == "READY"
    faulty.request("POST", "/predictions", {"input": TINY | {"prompt": "corrupt"}})
    assert when_idle(faulty) == (
        "UNHEALTHY",
        "Healthcheck failed: RuntimeError: time_text_embed.timestep_embedder.linear_1.weight is not what was written "
        "into it; the next request writes it anew.",
    )
    assert picture(faulty) == before
    assert faulty.health()["status"] == "READY"


def test_a_start_with_unreadable_weights_fails_and_says_why(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "mini/dev", tmp_path / "cut")
    with next((tmp_path / "cut/transformer").glob("*.safetensors")).open("rb+") as file:
        file.truncate(10_000)
    with CogServer(environment={"FLUX_DEV": str(tmp_path / "cut")}, log=tmp_path / "log") as server:
        with pytest.raises(RuntimeError, match=r"setup failed: The weights in cut/transformer cannot be read"):
            server.wait_until_ready(60)
        assert server.health()["status"] == "SETUP_FAILED"
        status, answer = server.request("POST", "/predictions", {"input": TINY})
        assert status == 503
        assert "failed" in str(answer)


# What a host of a few megabytes does to a start and to three predictions; run where the small disk is mounted.
ON_A_SMALL_DISK = """
import sys
from pathlib import Path
from cog_server import CogServer, failure, files
from tests.test_reliability import TINY, make_lora, uri

disk, reserve = Path(sys.argv[1]), Path(sys.argv[1]) / "reserve"
with CogServer(environment={"WEIGHTS_CACHE": str(disk / "weights")}, log=disk.parent / "log") as server:
    server.wait_until_ready()
    before = files(server.predict(TINY))[0][1]
    with reserve.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError as error:
            print(error.strerror)
    print(failure(server.predict(TINY)))
    print(failure(server.predict(TINY | {"extra_lora": uri(make_lora(0))})))
    reserve.unlink()
    print(failure(server.predict(TINY | {"extra_lora": uri(make_lora(0))})))
    print(files(server.predict(TINY))[0][1] == before)
"""


def test_a_full_disk_fails_what_needs_it_and_nothing_after(tmp_path: Path) -> None:
    mount = f"mount -t tmpfs -o size=16m tmpfs {tmp_path}/disk"
    (tmp_path / "disk").mkdir()
    unshare = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-ec"]
    if subprocess.run([*unshare, mount], capture_output=True, check=False).returncode:
        pytest.skip("this machine lets nobody mount a small disk")
    (tmp_path / "small.py").write_text(ON_A_SMALL_DISK)
    told = subprocess.run(
        [*unshare, f"{mount}; exec {sys.executable} {tmp_path}/small.py {tmp_path}/disk"],
        env=os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path / "disk")},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    assert told.stdout.splitlines() == [
        "No space left on device",
        "The server's disk is full in the phase encode; try again later.",
        "The data: URI needs 0.12 MB, but the disk of the cache has 0.00 MB left, of which 0.80 MB stay free.",
        "None",
        "True",
    ]


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[CogServer]:
    """A server that a test may end."""
    with CogServer(environment={"WEIGHTS_CACHE": str(tmp_path / "weights")}, log=tmp_path / "log") as running:
        running.wait_until_ready()
        yield running


def test_sigterm_lets_the_prediction_end_and_takes_no_other(own_server: CogServer) -> None:
    answers = []
    waiting = threading.Thread(
        target=lambda: answers.append(own_server.request("POST", "/predictions", {"input": LONG}))
    )
    waiting.start()
    wait_for(lambda: own_server.health()["status"] == "BUSY", 5)
    own_server.process.send_signal(signal.SIGTERM)
    with pytest.raises(OSError, match=r"refused|reset|broke off"):
        wait_for(lambda: own_server.health()["status"] == "READY", 5)
    waiting.join(60)
    ((status, answer),) = answers
    assert (status, answer["status"], len(answer["output"])) == (200, "succeeded", 4)
    wait_for(lambda: own_server.process.poll() is not None, 10)


def test_a_killed_worker_fails_its_prediction_and_makes_the_server_unhealthy(own_server: CogServer) -> None:
    own_server.start(LONG, "doomed")
    wait_for(lambda: own_server.health()["status"] == "BUSY", 5)
    os.kill(worker_of(own_server), signal.SIGKILL)
    wait_for(lambda: own_server.health()["status"] == "UNHEALTHY", 5)
    status, answer = own_server.request("POST", "/predictions", {"input": TINY})
    assert (status, answer["error"]) == (409, "At capacity - all prediction slots busy")
    with pytest.raises(SystemExit, match="The predictor cannot go on"):
        serve(own_server)
