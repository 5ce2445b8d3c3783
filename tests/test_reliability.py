"""Faults, load and hostile input against the real Cog server: each row of docs/reliability.md."""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import local_cog.server
from harness.fuzz import fuzzing, run
from harness.hosts import File, Host
from harness.soak import Report, Soak, soaking, worker_of
from harness.waiting import wait_until
from local_cog.server import CogServer, failure, files, serve
from service.data_uri import uri
from service.leftovers import Leftovers, sweep
from service.measure import PeakMemory
from settings import ROOT
from tests.support.faulty import HUNGRY, PLANTED
from tests.support.lora_files import lora_of_the_miniature
from tests.support.pictures import encoded, photo

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
# The longest that a cancelled prediction may keep the server busy.
SECONDS_TO_FREE = 3.0
PHASES = ("input", "loras", "swap", "prompt", "denoise", "decode", "safety", "encode")


def picture(server: CogServer, **inputs: object) -> bytes:
    answer = server.predict(TINY | inputs)
    assert failure(answer) is None
    return files(answer)[0][1]


def when_idle(server: CogServer, seconds: float = 10) -> tuple[str, str | None]:
    """The status and error of the first health check while no prediction runs."""
    health = wait_until(lambda: (it := server.health())["status"] != "BUSY" and it, seconds)
    return health["status"], health.get("user_healthcheck_error")


def health_seconds(server: CogServer) -> float:
    began = time.monotonic()
    assert server.health()["status"] == "READY"
    return time.monotonic() - began


# ---------------------------------------------------------------------------------------------------------------------
# Faults


@pytest.fixture(scope="module")
def soak(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Soak]:
    """A server with planted faults that wait to be called."""
    source = (ROOT / "predict.py").read_text() + PLANTED
    with soaking(tmp_path_factory.mktemp("soak"), source, settle_s=3, **HUNGRY) as running:
        yield running


@pytest.fixture(scope="module")
def faulty(soak: Soak) -> CogServer:
    return soak.server


@pytest.mark.parametrize("phase", PHASES)
def test_a_phase_without_memory_fails_alone(faulty: CogServer, phase: str) -> None:
    inputs = TINY | {"image": uri(encoded(photo(128, 128)), "image/png")}
    large = {"image": uri(encoded(photo(768, 768)), "image/png")} if phase == "input" else {}
    before = picture(faulty, **inputs)
    # A LoRA that no cache has, and a prompt that none has: else there would be nothing to do in some phases.
    new = {"replicate_weights": uri(lora_of_the_miniature(PHASES.index(phase))), "disable_safety_checker": False}
    answer = faulty.predict(inputs | new | large | {"prompt": f"starve {phase}"})
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
    assert "KeyError: 'secret.bin is not there, asked of " in log
    assert "passw0rd" not in log
    assert "predict.py:" in log
    assert "/srv" not in str(answer)
    assert picture(faulty) == before


def test_a_corrupted_weight_is_unhealthy_and_the_next_request_repairs_it(faulty: CogServer) -> None:
    before = picture(faulty)
    assert when_idle(faulty) == ("READY", None)
    faulty.request("POST", "/predictions", {"input": TINY | {"prompt": "corrupt"}})
    # Each check looks at as many tensors as it has time for.
    told = []
    wait_until(lambda: told.append(faulty.health().get("user_healthcheck_error")) or told[-1] is not None)
    assert told[-1] == (
        "Healthcheck failed: RuntimeError: time_text_embed.timestep_embedder.linear_1.weight is not what was written "
        "into it; the next request writes it anew."
    )
    assert picture(faulty) == before
    assert when_idle(faulty) == ("READY", None)


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


# A start and three predictions with a disk of a few megabytes; runs where that disk is mounted.
ON_A_SMALL_DISK = """
import sys
from pathlib import Path
from local_cog.server import CogServer, failure, files
from tests.support.lora_files import lora_of_the_miniature
from tests.test_reliability import TINY, encoded, photo, uri

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
    print(failure(server.predict(TINY | {"extra_lora": uri(lora_of_the_miniature(0))})))
    print(failure(server.predict(TINY | {"image": uri(encoded(photo()), "image/png")})))
    reserve.unlink()
    print(failure(server.predict(TINY | {"extra_lora": uri(lora_of_the_miniature(0))})))
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
        "The server's disk is full in the phase fetch; try again later.",
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
    wait_until(lambda: own_server.health()["status"] == "BUSY")
    own_server.process.send_signal(signal.SIGTERM)
    with pytest.raises(OSError, match=r"refused|reset|broke off"):
        wait_until(lambda: own_server.health()["status"] == "READY")
    waiting.join(60)
    ((status, answer),) = answers
    assert (status, answer["status"], len(answer["output"])) == (200, "succeeded", 4)
    wait_until(lambda: own_server.process.poll() is not None, 10)


def test_a_server_that_stands_still_is_given_up_and_so_is_one_whose_worker_is_killed(
    own_server: CogServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_cog.server, "SECONDS_FOR_HEALTH", 1)
    own_server.process.send_signal(signal.SIGSTOP)
    with pytest.raises(SystemExit, match="it has not answered a health check for 1 seconds"):
        serve(own_server)
    own_server.process.send_signal(signal.SIGCONT)
    monkeypatch.undo()
    picture(own_server)
    folder = Path(own_server.scratch.name)
    assert list(folder.rglob("output.*"))
    own_server.start(LONG, "doomed")
    wait_until(lambda: own_server.health()["status"] == "BUSY")
    os.kill(worker_of(own_server), signal.SIGKILL)
    wait_until(lambda: own_server.health()["status"] == "UNHEALTHY")
    status, answer = own_server.request("POST", "/predictions", {"input": TINY})
    assert (status, answer["error"]) == (409, "At capacity - all prediction slots busy")
    with pytest.raises(SystemExit, match="The predictor cannot go on"):
        serve(own_server)
    own_server.__exit__(None, None, None)
    assert not folder.exists()


@pytest.fixture
def hasty_server(tmp_path: Path) -> Iterator[CogServer]:
    """A server whose device may work for a few seconds, with planted faults."""
    project = tmp_path / "project"
    project.mkdir()
    (project / "predict.py").write_text((ROOT / "predict.py").read_text() + PLANTED)
    environment = {"WEIGHTS_CACHE": str(tmp_path / "weights"), "WEIGHTS_ALLOW_PRIVATE_HOSTS": "1"}
    environment |= {"PYTHONPATH": str(ROOT), "PREDICTION_SECONDS": "4"}
    with CogServer(project, environment=environment, log=tmp_path / "log") as running:
        running.wait_until_ready()
        yield running


def test_a_download_that_takes_too_long_fails_alone_and_a_hanging_device_ends_the_process(
    hasty_server: CogServer, host: Host
) -> None:
    host.routes["/slow.safetensors"] = File(lora_of_the_miniature(1), delay=9, slice=1000)
    address = host.url("/slow.safetensors")
    assert failure(hasty_server.predict(TINY | {"extra_lora": address})) == (
        f"{address} could not be fetched within 4 seconds; try again later, or name another place where it lies."
    )
    picture(hasty_server)
    assert failure(hasty_server.predict(TINY | {"prompt": "hang"}))
    with pytest.raises(SystemExit, match="The predictor cannot go on: its process has ended; see its log"):
        serve(hasty_server)
    sentence = "Work on the device took longer than 4 seconds (PREDICTION_SECONDS); this process ends."
    assert sentence in hasty_server.log.read_text()


def test_twenty_cancellations_in_a_row_leave_no_trace(server: CogServer) -> None:
    before, rng = picture(server), random.Random(0)
    for number in range(20):
        # In every phase, each with a LoRA that is new: some are cancelled while it is read, some while it is drawn.
        inputs = LONG | {"replicate_weights": uri(lora_of_the_miniature(100 + number)), "go_fast": number % 2 == 0}
        server.start(inputs, f"cancelled-{number}")
        time.sleep(rng.uniform(0.05, 0.5))
        assert server.cancel(f"cancelled-{number}") == 200
        when_idle(server, SECONDS_TO_FREE)
    assert when_idle(server) == ("READY", None)
    assert picture(server) == before


# ---------------------------------------------------------------------------------------------------------------------
# Load and hostile input: short versions of `script/bench soak` and `script/bench fuzz`


def test_a_short_soak_finds_nothing_and_then_every_planted_leak(soak: Soak) -> None:
    report = soak.run(14, warm=7, block=7, seed=1, prompts=("a red fox",))
    assert report.problems == []
    assert report.compared == 1
    # What leaks is still there later: no need to watch long. By this seed most requests end well, and leak.
    leaking = replace(soak, report=Report(), settle_s=1).run(12, warm=4, block=4, seed=54, prompts=("leak",))
    before, *_, after = leaking.counts.values()
    assert {name for name in before if after[name] > before[name]} >= {
        "tensors",
        "worker descriptors",
        "threads",
        "temporary files",
    }
    assert [problem.partition(" by ")[0].partition(":")[0] for problem in leaking.problems] == [
        "Something grows",
        "Resident memory rises",
    ]


def test_a_short_fuzz_breaks_nothing(tmp_path: Path) -> None:
    with fuzzing(tmp_path) as fuzz:
        run(fuzz, 60, seed=1)
        assert fuzz.cases >= 60
        assert fuzz.statuses[200] > 15
        assert fuzz.statuses[422] > 5


# ---------------------------------------------------------------------------------------------------------------------
# Health, metrics, logs, privacy


def test_a_health_check_takes_far_less_than_a_second(server: CogServer) -> None:
    for inputs in (TINY, TINY | {"aspect_ratio": "1:1", "megapixels": "0.25", "go_fast": True}):
        picture(server, **inputs)
        assert when_idle(server) == ("READY", None)
        assert min(health_seconds(server) for _ in range(3)) < 0.5


def test_metrics_tell_seeds_scores_and_memory(server: CogServer) -> None:
    answer = server.predict(TINY | {"num_outputs": 2, "disable_safety_checker": False})
    metrics = answer["metrics"]
    assert metrics["seeds"] == [3, 4]
    assert len(metrics["safety"]["scores"]) == 2
    for index, score in enumerate(metrics["safety"]["scores"]):
        assert (index in metrics["safety"]["dropped"]) == (score["checker"] > 0 and score["classifier"] > 0.5)
    process = Path(f"/proc/{worker_of(server)}/statm").read_text().split()
    assert int(process[1]) * os.sysconf("SC_PAGE_SIZE") * 0.8 < metrics["peak_bytes"]["host"] < 2**34


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="this kernel counts a process's whole life")
def test_the_peak_of_one_prediction_is_not_that_of_another(server: CogServer) -> None:
    assert server.predict(TINY)["metrics"]["peak_bytes"]["host"] > 0
    memory = PeakMemory(torch.device("cpu"))
    torch.ones(300_000_000, dtype=torch.uint8)
    large = memory.bytes()["host"]
    assert large - PeakMemory(torch.device("cpu")).bytes()["host"] > 250_000_000


def test_the_log_has_a_line_for_each_phase_and_nothing_of_libraries(server: CogServer) -> None:
    answer = server.predict(TINY)
    lines = [line for line in answer["logs"].replace("\r", "\n").splitlines() if line.strip() and "%|" not in line]
    assert lines[0] == "Using seed: 3"
    assert [line.partition(":")[0] for line in lines[1:]] == list(PHASES)
    noise = re.findall(r'"level":"(?:WARN|ERROR)".*', server.log.read_text())
    assert all("is deprecated" in line for line in noise)


def test_files_of_a_prediction_go_however_it_ended(tmp_path: Path) -> None:
    leftovers = Leftovers(kept=0.1)
    with leftovers.folder() as kept:
        (kept / "output.0.png").write_bytes(b"picture")
    with suppress(KeyboardInterrupt), leftovers.folder() as interrupted:
        (interrupted / "output.0.png").write_bytes(b"half a pic")
        raise KeyboardInterrupt
    wait_until(lambda: not kept.exists() and not interrupted.exists(), 5)


def test_the_folders_that_cog_leaves_are_swept_once_nobody_uses_them(tmp_path: Path) -> None:
    for name in ("old", "in use", "new"):
        for folder in ("inputs", "outputs"):
            (tmp_path / name / folder).mkdir(parents=True)
    (tmp_path / "in use" / "inputs" / "image.png").write_bytes(b"image")
    for name in ("old", "in use"):
        os.utime(tmp_path / name, (0, 0))
    sweep(tmp_path, age=3600)
    assert not (tmp_path / "old").exists()
    assert (tmp_path / "in use" / "inputs" / "image.png").exists()
    assert (tmp_path / "new" / "outputs").exists()
