"""The cluster on this machine: Ray's nodes as processes here, bound to loopback, stopped with all that they started.

`script/cluster`, the tests and the benchmark run it. This module knows how Ray starts; what runs on it is in
`cluster.application`.
"""

import argparse
import contextlib
import ipaddress
import os
import secrets
import signal
import sys
from pathlib import Path
from typing import Any

from cluster.settings import ClusterSettings
from local_cog.server import LOOPBACK, exit_on_signals, free_port, listen
from settings import ROOT

# Of Serve: no thread of their own for a front's or a worker's code and for finding a worker, since none of it blocks
# (milliseconds for each request); and a short pause before a busy worker is asked again (idle GPUs otherwise). Serve's
# gRPC between fronts and workers would save 5 ms more, and in 2.60 leaves some streams waiting for ever. Of Ray:
# fronts, workers and their predictors are as urgent as anything else here; it would have them at nice 15.
RAY = {
    "RAY_worker_niceness": "0",
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    "RAY_SERVE_ROUTER_RETRY_MAX_BACKOFF_S": "0.05",
}
# Requests and answers pass through it, nothing stays.
OBJECT_STORE_BYTES = 100 * 1024**2


def environment() -> dict[str, str]:
    """The variables of a process that starts Ray here, or joins it."""
    return {
        **RAY,
        # Ray's ports require a token.
        "RAY_AUTH_MODE": os.environ.get("RAY_AUTH_MODE", "token"),
        # Ray's name for taking this machine's address to be loopback, whatever other addresses it has.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        # The workers import the application, whatever their working directory.
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    }


def descendants(ancestor: int) -> list[int]:
    """The processes that one has started, and those that these have started."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            # pid (name) state parent …; the name may hold anything but ends at the last parenthesis
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(stat.parent.name))
    found = list(children.get(ancestor, []))
    for process in found:
        found.extend(children.get(process, []))
    return found


def main() -> None:
    """Serve until stopped."""
    parser = argparse.ArgumentParser(prog="script/cluster", description="Many workers behind one address.")
    parser.add_argument("--workers", type=int, default=2, help="predictors (default: %(default)s)")
    parser.add_argument("--fronts", type=int, default=2, help="processes that speak HTTP (default: %(default)s)")
    parser.add_argument("--nodes", type=int, default=1, help="Ray nodes that share them (default: %(default)s)")
    parser.add_argument("--affinity", choices=["none", "router"], default="none", help="(default: %(default)s)")
    parser.add_argument("--queue", type=int, default=1000, help="what one front lets wait (default: %(default)s)")
    parser.add_argument("--project", type=Path, default=ROOT, help="where predict.py is (default: this project)")
    parser.add_argument(
        "--host",
        type=ipaddress.ip_address,
        default=LOOPBACK,
        help="address to bind (default: %(default)s, this machine alone)",
    )
    parser.add_argument("--port", type=int, default=8000, help="port to bind (default: %(default)s)")
    options = parser.parse_args()
    try:
        settings = ClusterSettings.from_environment()
    except ValueError as error:
        sys.exit(str(error))
    if not options.host.is_loopback and not settings.api_tokens:
        sys.exit(f"--host is {options.host}; API_TOKENS must be set before others than this machine may ask.")
    try:
        # Fronts share their port with whoever does so too, such as another cluster.
        listen(str(options.host), options.port).close()
    except (OSError, OverflowError) as error:
        sys.exit(f"--port is {options.port}; it must be one that is free at {options.host}: {error}")
    exit_on_signals()
    with contextlib.suppress(KeyboardInterrupt), contextlib.ExitStack() as stack:
        _start(options, stack)
        signal.pause()


def _start(options: argparse.Namespace, stack: contextlib.ExitStack) -> None:
    """Start the nodes and the application on them."""
    import torch  # heavy, and nothing else here needs it

    gpus, project = torch.cuda.device_count(), str(options.project.resolve())
    # Ray's processes look for modules first where this one is: a caller's own settings.py must not win.
    os.chdir(ROOT)
    os.environ.update(environment())
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))

    import ray  # only now, since it reads the environment when it is imported
    from ray import serve
    from ray.cluster_utils import Cluster

    from cluster.application import APPLICATION, Arguments, application

    # Each node has room for all: what a dead node held must fit on another.
    node = {
        "node_ip_address": LOOPBACK,
        "num_cpus": options.workers + options.fronts,
        "num_gpus": gpus,
        "object_store_memory": OBJECT_STORE_BYTES,
        "include_dashboard": False,
    }
    metrics_port = free_port()
    nodes = Cluster(initialize_head=True, head_node_args={**node, "metrics_export_port": metrics_port})
    stack.callback(_stop, nodes)
    for _ in range(options.nodes - 1):
        nodes.add_node(**node | {"num_gpus": 0})
    ray.init(nodes.address, logging_level="WARNING")
    stack.callback(ray.shutdown)
    named = {"project": project, "host": str(options.host), "gpus_per_worker": 1 if gpus else 0}
    arguments = Arguments(**vars(options) | named)
    serve.start(proxy_location="Disabled")
    serve.run(application(arguments), name=APPLICATION, route_prefix=None)
    print(f"Metrics: http://{LOOPBACK}:{metrics_port}/metrics")
    host = f"[{options.host}]" if options.host.version == 6 else options.host
    print(f"Ready: http://{host}:{options.port}", flush=True)


def _stop(nodes: Any) -> None:  # noqa: ANN401 (Ray's, which is not imported yet)
    """End all that runs here; unfinished predictions are taken up at the next start."""
    processes = descendants(os.getpid())
    nodes.shutdown()
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


if __name__ == "__main__":
    main()
