"""`script/cluster`, a cluster on this machine: Ray's nodes are processes bound to loopback, which all end with it.

The tests and the benchmark run it too. This module knows how Ray starts; `cluster.application` is what runs on Ray.
"""

import argparse
import asyncio
import contextlib
import ctypes
import ipaddress
import os
import secrets
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import psutil

from cluster.settings import Arguments, ClusterSettings
from local_cog import schema
from local_cog.server import LOOPBACK, check_address, free_port, past_proxies, read_port, url
from settings import MIB, ROOT, Settings
from sources.connections import trusted_authorities

# Serve's gRPC between fronts and workers would save 5 ms more, but in 2.60 some streams then wait for ever.
RAY = {
    # Ray would give fronts, workers and their predictors nice 15.
    "RAY_worker_niceness": "0",
    # A node starts slowly on a machine that has other work.
    "RAY_raylet_start_wait_time_s": "120",
    # No threads of their own for our code and for Serve's search for a worker: they cost each request milliseconds, and
    # none of that code blocks.
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    # A short pause before busy workers are asked again: GPUs would be idle during a longer one.
    "RAY_SERVE_ROUTER_RETRY_MAX_BACKOFF_S": "0.05",
}
# Options of the system call prctl.
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
# A process that waits for a device or a network disk ends later, or never.
SECONDS_TO_KILL = 10
# Inputs and results only pass through this store.
OBJECT_STORE_BYTES = 100 * MIB


def environment() -> dict[str, str]:
    """The variables of a process that starts Ray here, or joins it."""
    return {
        **RAY,
        **past_proxies(os.environ),
        # Ray's ports require a token.
        "RAY_AUTH_MODE": os.environ.get("RAY_AUTH_MODE", "token"),
        # With this, Ray takes loopback for this machine's address, whatever other addresses it has.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        # The workers import the application, whatever their working directory.
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    }


def descendants(ancestor: int) -> list[int]:
    """The processes that one has started, and those that these have started; none if it has ended."""
    try:
        return [process.pid for process in psutil.Process(ancestor).children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _count(text: str) -> int:
    """The value of an option that is a count."""
    if not text.isdecimal() or not 1 <= int(text[:6]) <= 10_000:
        raise argparse.ArgumentTypeError(f"it is {text[:80]!r}; it must be a whole number from 1 to 10000.")
    return int(text)


def main() -> None:
    """Serve until stopped."""
    parser = argparse.ArgumentParser(prog="script/cluster", description="Many workers behind one address.")
    parser.add_argument("--workers", type=_count, default=2, help="predictors (default: %(default)s)")
    parser.add_argument("--fronts", type=_count, default=2, help="processes that speak HTTP (default: %(default)s)")
    parser.add_argument("--nodes", type=_count, default=1, help="Ray nodes that share them (default: %(default)s)")
    parser.add_argument("--affinity", choices=["none", "router"], default="none", help="(default: %(default)s)")
    parser.add_argument("--queue", type=_count, default=1000, help="what one front lets wait (default: %(default)s)")
    parser.add_argument("--project", type=Path, default=ROOT, help="where predict.py is (default: this project)")
    parser.add_argument("--host", default=LOOPBACK, help="address to bind (default: %(default)s, this machine alone)")
    parser.add_argument("--port", type=read_port, default=8000, help="port to bind (default: %(default)s)")
    options = parser.parse_args()
    options.project = options.project.resolve()
    # Ray's processes import from this process's working directory first, where a caller may have another settings.py.
    # Relative paths in the environment's variables begin here too.
    os.chdir(ROOT)
    if not (options.project / "predict.py").is_file():
        sys.exit("--project must be a folder with a predict.py in it.")
    try:
        # Report now what would end fronts and workers again and again.
        settings = ClusterSettings.from_environment()
        trusted_authorities()
        if options.project == ROOT:
            Settings.from_environment(cuda=False)
        options.port = options.port or free_port()
        # The fronts' own check would allow a port of another cluster, since fronts share their port.
        check_address(options.host, options.port)
    except ValueError as error:
        sys.exit(str(error))
    try:
        schema.derive((options.project / "predict.py").read_text(encoding="utf-8"))
    except (ValueError, SyntaxError, OSError) as error:
        sys.exit(f"--project has a predict.py that cannot be read: {error}")
    if not ipaddress.ip_address(options.host).is_loopback and not settings.api_tokens:
        sys.exit(f"--host is {options.host}; API_TOKENS must be set before others than this machine may ask.")
    # The workers' temporary files, pictures and files of requests, are deleted with the cluster; Ray's logs are not.
    os.environ.setdefault("RAY_TMPDIR", tempfile.gettempdir())
    os.environ["TMPDIR"] = scratch = tempfile.mkdtemp(prefix="flux-sprites-cluster-")
    # Two forks make three processes: if one is killed, another one is left to end the cluster.
    _go_on_in_a_child(scratch)
    _go_on_in_a_child(scratch)
    _start(options, settings)
    signal.pause()


def _go_on_in_a_child(scratch: str) -> None:
    """Fork, and return in the child; this process waits until the child ends or a signal comes.

    Then it kills all processes that were started below it, deletes the folder `scratch`, and exits. Ray's processes
    would learn late, or never, that their parent was killed: so this process becomes the parent of such orphans.
    """
    kernel, parent = ctypes.CDLL(None), os.getpid()
    kernel.prctl(PR_SET_CHILD_SUBREAPER, 1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    stops = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
    awaited = {signal.SIGCHLD, *(it for it in stops if signal.getsignal(it) is not signal.SIG_IGN)}  # as under nohup
    before = signal.pthread_sigmask(signal.SIG_BLOCK, awaited)
    child = os.fork()
    if child == 0:
        kernel.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it was killed before the call of prctl
            os._exit(1)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes of a terminal; the parent acts
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return
    code = None
    while code is None:
        number = signal.sigwait(awaited)
        code = _reap(child) if number == signal.SIGCHLD else 0 if number == signal.SIGINT else 128 + number
    give_up = time.monotonic() + SECONDS_TO_KILL
    while left := descendants(parent):
        for process in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        if time.monotonic() > give_up:
            sys.exit(f"{len(left)} process(es) of the cluster cannot be ended; most often they wait for a device.")
        time.sleep(0.01)
        _reap(child)
    shutil.rmtree(scratch, ignore_errors=True)
    sys.exit(code)


def _reap(child: int) -> int | None:
    """The exit code of the child if it has ended; the zombies of all children that have ended are removed."""
    code = None
    with contextlib.suppress(ChildProcessError):  # no child is left
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            if ended[0] == child:
                code = os.waitstatus_to_exitcode(ended[1])
    return code if code is None or code >= 0 else 128 - code


def _start(options: argparse.Namespace, settings: ClusterSettings) -> None:
    """Start the nodes and the application on them."""
    asyncio.run(_open_stores(settings))
    import torch  # here, since it takes seconds

    gpus = torch.cuda.device_count()
    if 0 < gpus < options.workers:
        sys.exit(f"--workers is {options.workers}; each needs a GPU, and this machine has {gpus}.")
    os.environ.update(environment())
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))

    import ray  # only now, since it reads the environment when it is imported
    from ray import serve
    from ray.cluster_utils import Cluster

    from cluster.application import APPLICATION, application

    # Each node has room for all workers and fronts: those of a dead node must fit on another.
    node = {
        "node_ip_address": LOOPBACK,
        "num_cpus": options.workers + options.fronts,
        "num_gpus": gpus,
        "object_store_memory": OBJECT_STORE_BYTES,
        "include_dashboard": False,
    }
    nodes = Cluster(initialize_head=True, head_node_args=node)
    for _ in range(options.nodes - 1):
        nodes.add_node(**node | {"num_gpus": 0})
    ray.init(nodes.address, logging_level="WARNING")
    named = {"project": str(options.project), "gpus_per_worker": 1 if gpus else 0}
    arguments = Arguments(**vars(options) | named)
    serve.start(proxy_location="Disabled")
    serve.run(application(arguments), name=APPLICATION, route_prefix=None)
    print(f"Metrics: http://{LOOPBACK}:{nodes.head_node.metrics_export_port}/metrics")
    print(f"Ready: {url(options.host, options.port)} (/docs says what is there, Ctrl-C stops it)", flush=True)


async def _open_stores(settings: ClusterSettings) -> None:
    """Open the database, with its migrations, and the store of files; SystemExit where that fails.

    In the fronts, Serve would repeat it for ever.
    """
    from cluster.database import Unusable
    from cluster.files import Files
    from cluster.predictions import Predictions

    try:
        async with Predictions(settings.database_url):
            pass
    except Unusable as error:
        sys.exit(str(error))
    try:
        Files(settings.files_url)
    except Exception as error:  # of fsspec, or of the library with which it opens the store
        sys.exit(
            f"FILES_URL cannot be opened ({type(error).__name__}); it must be a directory that can be written, or what "
            "fsspec opens here, such as s3://… with s3fs."
        )


if __name__ == "__main__":
    main()
