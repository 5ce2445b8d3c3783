"""The cluster on this machine: what it opens, and when it does not start."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("ray", reason="the cluster needs cluster/requirements.txt")

from cluster.local import descendants
from cluster.settings import ClusterSettings
from harness.cluster import Cluster
from harness.waiting import wait_until
from local_cog.server import LOOPBACK, free_port
from tests.support.processes import finished


def test_nothing_listens_beyond_this_machine(cluster: Cluster) -> None:
    own = set()
    for process in [cluster.process.pid, *descendants(cluster.process.pid)]:
        for file in Path(f"/proc/{process}/fd").glob("*"):
            with contextlib.suppress(OSError):
                own.add(file.readlink().name)
    listening = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            _, address, _, state, *_, inode = line.split()[:10]
            if state == "0A" and f"socket:[{inode}]" in own:
                listening.append(address.partition(":")[0])
    assert len(listening) > 5
    assert {address[-8:] for address in listening} == {"0100007F"}  # 127.0.0.1, as the kernel writes it


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_cluster_that_is_killed_leaves_no_process(project: Path, tmp_path: Path, number: signal.Signals) -> None:
    """In the middle of its start: the first node runs, with its agents, which outlive it if nobody ends them."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    environment = {"FILES_URL": str(tmp_path), "TMPDIR": str(scratch), "RAY_TMPDIR": "/tmp"}
    starting = Cluster("--project", str(project), "--nodes", "2", environment=environment, log=tmp_path)
    process = subprocess.Popen(
        starting.command,
        env=starting.environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )

    def running() -> list[int]:
        assert process.poll() is None
        started = descendants(process.pid)
        return started if "ray::DashboardAgent" in map(command_line, started) else []

    started = wait_until(running, 120)
    assert [folder.name[:21] for folder in scratch.iterdir()] == ["flux-sprites-cluster-"]
    process.send_signal(number)
    said = process.communicate(timeout=20)[1].decode()  # nobody has its end of the pipe any more
    assert process.returncode == {signal.SIGKILL: -9, signal.SIGTERM: 143}[number]
    assert "SIGTERM" not in said
    assert "Traceback" not in said
    assert [line for line in map(command_line, started) if line] == []
    assert list(scratch.iterdir()) == []


def command_line(process: int) -> str:
    """How a process was called, or calls itself; empty if it has ended."""
    try:
        return Path(f"/proc/{process}/cmdline").read_text().replace("\0", " ").strip()
    except OSError:
        return ""


def start_of_cluster(*options: str, **variables: str) -> str:
    """The output of `script/cluster` when it does not start."""
    command = [sys.executable, "-m", "cluster.local", *options]
    environment = {name: value for name, value in os.environ.items() if name != "API_TOKENS"} | variables
    ended = finished(command, env=environment)
    assert ended.returncode == 1
    return ended.stderr


def test_others_than_this_machine_need_tokens() -> None:
    assert start_of_cluster("--host", "0.0.0.0") == (
        "--host is 0.0.0.0; API_TOKENS must be set before others than this machine may ask.\n"
    )


@pytest.mark.parametrize(
    ("host", "sentence"),
    [
        ("localhost", "--host is 'localhost'; it must be an IP address of this machine.\n"),
        ("example.com", "--host is 'example.com'; it must be an IP address of this machine.\n"),
        ("192.0.2.1", "--host is 192.0.2.1; this machine has no such address.\n"),
    ],
)
def test_a_host_that_is_no_address_of_this_machine_is_one_sentence(host: str, sentence: str) -> None:
    assert start_of_cluster("--host", host) == sentence


def test_a_file_of_certificates_that_is_none_is_one_sentence_before_anything_starts() -> None:
    assert start_of_cluster(SSL_CERT_FILE="/nowhere") == (
        "SSL_CERT_FILE names no file of certificates in PEM that can be read; it must, or be unset.\n"
    )


def test_what_would_end_every_worker_is_one_sentence_before_anything_starts(tmp_path: Path) -> None:
    assert start_of_cluster(LORA_MAX_GB="x").startswith("LORA_MAX_GB is 'x'; it must be a number of gigabytes")
    (tmp_path / "predict.py").write_text("class Predictor:\n    def predict(self, xs: list[str]) -> str: ...\n")
    cannot = "--project has a predict.py that cannot be read: "
    assert start_of_cluster("--project", str(tmp_path)).startswith(f"{cannot}The type of xs must be one of ")
    (tmp_path / "predict.py").write_bytes(b"class \xff")
    assert start_of_cluster("--project", str(tmp_path)).startswith(f"{cannot}'utf-8' codec can't decode byte 0xff")


def test_a_port_that_is_taken_is_not_shared() -> None:
    with socket.create_server((LOOPBACK, 0)) as taken:
        port = taken.getsockname()[1]
        assert f"--port is {port}; it must be one that is free" in start_of_cluster("--port", str(port))


def test_a_database_that_cannot_be_used_is_one_sentence_before_anything_starts(tmp_path: Path) -> None:
    (tmp_path / "notes.db").write_text("no database at all " * 100)
    assert start_of_cluster("--port", str(free_port()), DATABASE_URL=f"sqlite:///{tmp_path / 'notes.db'}") == (
        "DATABASE_URL: the database's file is no SQLite database: file is not a database.\n"
    )


def test_a_prediction_may_not_take_longer_than_its_worker_gets_to_finish_it() -> None:
    assert start_of_cluster(PREDICTION_SECONDS="900") == (
        "PREDICTION_SECONDS is 900; in a cluster it must be below 900, the seconds after which a worker that is to go "
        "is ended.\n"
    )
    for allowed in ("899", "0", ""):
        ClusterSettings.from_environment({"PREDICTION_SECONDS": allowed})
