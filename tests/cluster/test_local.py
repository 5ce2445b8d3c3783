"""The cluster on this machine: what it opens, and when it does not start."""

import contextlib
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("ray", reason="the cluster needs cluster/requirements.txt")

from cluster.local import descendants
from cluster.settings import ClusterSettings
from harness.cluster import Cluster
from local_cog.server import LOOPBACK
from settings import ROOT


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


def start_of_cluster(*options: str, **variables: str) -> str:
    """What `script/cluster` says when it does not start."""
    command = [sys.executable, "-m", "cluster.local", *options]
    environment = {name: value for name, value in os.environ.items() if name != "API_TOKENS"} | variables
    ended = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1
    return ended.stderr


def test_others_than_this_machine_need_tokens() -> None:
    assert start_of_cluster("--host", "0.0.0.0") == (
        "--host is 0.0.0.0; API_TOKENS must be set before others than this machine may ask.\n"
    )


def test_a_port_that_is_taken_is_not_shared() -> None:
    with socket.create_server((LOOPBACK, 0)) as taken:
        port = taken.getsockname()[1]
        assert f"--port is {port}; it must be one that is free" in start_of_cluster("--port", str(port))


def test_a_prediction_may_not_take_longer_than_its_worker_gets_to_finish_it() -> None:
    assert start_of_cluster(PREDICTION_SECONDS="900") == (
        "PREDICTION_SECONDS is 900; in a cluster it must be below 900, the seconds after which a worker that is to go "
        "is ended.\n"
    )
    for allowed in ("899", "0", ""):
        ClusterSettings.from_environment({"PREDICTION_SECONDS": allowed})
