"""The cluster on this machine: Ray's nodes as processes here, bound to loopback, stopped with all that they started.

`script/cluster`, the tests and the benchmark run it. This module knows how Ray starts; what runs on it is in
`cluster.application`.
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
from settings import ROOT, Settings
from sources.connections import trusted_authorities

# Of Serve: no thread of their own for a front's or a worker's code and for finding a worker, since none of it blocks
# (milliseconds for each request); and a short pause before a busy worker is asked again (idle GPUs otherwise). Serve's
# gRPC between fronts and workers would save 5 ms more, and in 2.60 leaves some streams waiting for ever. Of Ray:
# fronts, workers and their predictors are as urgent as anything else here; it would have them at nice 15;
# and a node may take its time to start on a machine that has other work.
RAY = {
    "RAY_worker_niceness": "0",
    "RAY_raylet_start_wait_time_s": "120",
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    "RAY_SERVE_ROUTER_RETRY_MAX_BACKOFF_S": "0.05",
}
# coglet reads all certificates of authorities at each prediction: 0.8 ms from one file, 5 ms from Debian's folder.
CERTIFICATES = {"SSL_CERT_FILE": "/etc/ssl/certs/ca-certificates.crt", "SSL_CERT_DIR": os.devnull}
# Of the system call prctl.
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
# A process that waits for a device or a network disk ends later, or never.
SECONDS_TO_KILL = 10
# Requests and answers pass through it, nothing stays.
OBJECT_STORE_BYTES = 100 * 1024**2


def environment() -> dict[str, str]:
    """The variables of a process that starts Ray here, or joins it."""
    usual = Path(CERTIFICATES["SSL_CERT_FILE"]).exists() and not CERTIFICATES.keys() & os.environ.keys()
    return {
        **RAY,
        **(CERTIFICATES if usual else {}),
        **past_proxies(os.environ),
        # Ray's ports require a token.
        "RAY_AUTH_MODE": os.environ.get("RAY_AUTH_MODE", "token"),
        # Ray's name for taking this machine's address to be loopback, whatever other addresses it has.
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
    """A number of something, as an option says it."""
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
    # Ray's processes look for modules first where this one is: a caller's own settings.py must not win. Relative paths
    # of the environment begin here too.
    os.chdir(ROOT)
    if not (options.project / "predict.py").is_file():
        sys.exit("--project must be a folder with a predict.py in it.")
    try:
        # What would end fronts and workers again and again is told now, before anything starts.
        settings = ClusterSettings.from_environment()
        trusted_authorities()
        if options.project == ROOT:
            Settings.from_environment(cuda=False)
        options.port = options.port or free_port()
        # Fronts share their port with whoever does so too, such as another cluster.
        check_address(options.host, options.port)
    except ValueError as error:
        sys.exit(str(error))
    try:
        schema.derive((options.project / "predict.py").read_text(encoding="utf-8"))
    except (ValueError, SyntaxError, OSError) as error:
        sys.exit(f"--project has a predict.py that cannot be read: {error}")
    if not ipaddress.ip_address(options.host).is_loopback and not settings.api_tokens:
        sys.exit(f"--host is {options.host}; API_TOKENS must be set before others than this machine may ask.")
    # What workers leave goes with the cluster: pictures, and files that were sent. Ray's logs and sockets stay where
    # they are without this.
    os.environ.setdefault("RAY_TMPDIR", tempfile.gettempdir())
    os.environ["TMPDIR"] = scratch = tempfile.mkdtemp(prefix="flux-sprites-cluster-")
    # Fork twice: if one of the three processes is killed, another one survives to end everything.
    _go_on_in_a_child(scratch)
    _go_on_in_a_child(scratch)
    _start(options, settings)
    signal.pause()


def _go_on_in_a_child(scratch: str) -> None:
    """Fork, and return in the child; this process ends all that was started when the child ends or a signal comes.

    Then it deletes the folder `scratch`.

    Ray's processes learn late, or never, that the one that started them has been killed. So this process has the kernel
    give it every process below it that loses its parent, and goes when none is left.
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
        if os.getppid() != parent:  # it was killed before that
            os._exit(1)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all processes of a terminal; one is to act
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
    """Take note of processes that have ended; returns the exit code of the child if it is one of them."""
    code = None
    with contextlib.suppress(ChildProcessError):  # none is left
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            if ended[0] == child:
                code = os.waitstatus_to_exitcode(ended[1])
    return code if code is None or code >= 0 else 128 - code


def _start(options: argparse.Namespace, settings: ClusterSettings) -> None:
    """Start the nodes and the application on them."""
    _open_stores(settings)
    import torch  # heavy, and nothing else here needs it

    gpus = torch.cuda.device_count()
    if 0 < gpus < options.workers:
        sys.exit(f"--workers is {options.workers}; each needs a GPU, and this machine has {gpus}.")
    os.environ.update(environment())
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))

    import ray  # only now, since it reads the environment when it is imported
    from ray import serve
    from ray.cluster_utils import Cluster

    from cluster.application import APPLICATION, application

    # Each node has room for all: what a dead node held must fit on another.
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


def _open_stores(settings: ClusterSettings) -> None:
    """Open the database, with its migrations, and the store of files once; SystemExit where that cannot be.

    Serve would only try it again.
    """
    # Only now: whoever imports this module need not have cluster/requirements.txt.
    from cluster.database import Unusable
    from cluster.files import Files
    from cluster.predictions import Predictions

    async def opened() -> None:
        async with Predictions(settings.database_url):
            pass

    try:
        asyncio.run(opened())
    except Unusable as error:
        sys.exit(str(error))
    try:
        Files(settings.files_url)
    except Exception as error:  # fsspec's, and those of what it opens the store with
        sys.exit(
            f"FILES_URL cannot be opened ({type(error).__name__}); it must be a directory that can be written, or what "
            "fsspec opens here, such as s3://… with s3fs."
        )


if __name__ == "__main__":
    main()
