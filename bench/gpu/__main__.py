"""Measure how fast FLUX.1 draws on this device, with random weights of full size: python -m bench.gpu.

One process, most valuable stage first. A stage is skipped if less than its estimate is left of --seconds; if a row
fails, the others are still measured; each result is on the disk before the next is measured, so a run that is cut keeps
all that it measured. `python -m bench.report` makes tables of the file.

--small tries the script with tiny models, on a CPU if there is no GPU: its times mean nothing.
"""

# ruff: noqa: E402 (the clock starts, and an environment variable is set, before the libraries are imported)

import argparse
import faulthandler
import gzip
import json
import os
import shlex
import shutil
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

BEGUN = time.perf_counter()  # imports count too
os.environ.setdefault("TQDM_DISABLE", "1")  # tqdm reads it at import; progress bars would hide the output

import torch

from bench.gpu.blocks import blocks
from bench.gpu.ceilings import ceilings
from bench.gpu.context import Bench, Row, SkippedError, Values
from bench.gpu.graphs import graphs
from bench.gpu.parts import parts, profile, switches
from bench.gpu.peers import compiled_diffusers, peft
from bench.gpu.results import Results, describe
from bench.gpu.smoke import smoke
from bench.gpu.steps import compiled, eager
from bench.gpu.swap import swap
from engine.acceleration import keep_compiled_code
from service import faults
from settings import ROOT


@dataclass(frozen=True)
class Stage:
    """Rows that are measured together.

    Args:
        name: in the results.
        rows: yields the rows, in order.
        estimate: seconds on an H100, compiling included.
        small: seconds of --small on two cores.
        again: seconds on an H100 after a stage that compiled the VAE, if that is less.
    """

    name: str
    rows: Callable[[Bench], Iterator[Row]]
    estimate: float
    small: float
    again: float | None = None


STAGES = (
    Stage("smoke", smoke, 60, 95),
    Stage("ceilings", ceilings, 20, 5),
    Stage("swap", swap, 45, 3),
    Stage("eager steps", eager, 20, 5),
    Stage("compiled bf16", partial(compiled, precision="bf16"), 150, 45, again=35),
    Stage("compiled fp8", partial(compiled, precision="fp8"), 150, 60, again=35),
    Stage("blocks", blocks, 100, 25),
    Stage("graphs fp8", partial(graphs, precision="fp8"), 110, 40),
    Stage("graphs bf16", partial(graphs, precision="bf16"), 90, 35),
    Stage("parts", parts, 25, 8),
    Stage("profile", profile, 10, 2),
    Stage("switches", switches, 45, 2),
    Stage("diffusers compiled", compiled_diffusers, 30, 25),
    Stage("PEFT", peft, 50, 35),
)


def main() -> None:
    """Measure the stages that fit into the given time."""
    options = read_options()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not options.small:
        sys.exit("There is no CUDA device here; --small tries the script on a CPU.")
    common = {"small": options.small, "caches": options.caches is not None}
    results = Results(options.out, device, common | describe(device, options.commit, command(options)))
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        bench, failed = Bench(device, options.small, Path(folder)), []
        watchdog = start_watchdog(options.seconds, results, bench)
        keep_compiled_code(bench.folder / "compile")
        if options.caches:
            results.add("compiled code", "read", attempt(partial(load_compiled, options.caches)))
        for number, stage in enumerate(options.stages):
            if not measure(stage, bench, results, BEGUN + options.seconds):
                failed.append(stage.name)
                if "error" in attempt(bench.synchronize):
                    go_on_anew(options, options.stages[number + 1 :])
        watchdog.cancel()
        faulthandler.cancel_dump_traceback_later()
    print(f"Wrote {options.out.name}; python -m bench.report makes tables of it.", flush=True)
    if failed:
        print(f"Some rows failed, in {', '.join(failed)}.", file=sys.stderr, flush=True)
    # Exit without cleaning up: torch's profiler keeps a native thread, and a process that waits for it sometimes aborts
    # ("terminate called without an active exception").
    os._exit(1 if failed else 0)


def start_watchdog(seconds: float, results: Results, bench: Bench) -> threading.Timer:
    """End the process when the time is up, even if something hangs: note the row that was cut, delete the files."""

    def end() -> None:
        faulthandler.dump_traceback()
        results.add(*bench.row, {"error": "the time was up before it had ended"})
        shutil.rmtree(bench.folder, ignore_errors=True)
        os._exit(1)

    left = max(1.0, seconds - (time.perf_counter() - BEGUN))
    faulthandler.dump_traceback_later(left + 10, exit=True)  # if even the timer's thread cannot run
    timer = threading.Timer(left, end)
    timer.daemon = True
    timer.start()
    return timer


def read_options() -> argparse.Namespace:
    """Options of the command line, with a default file of results."""
    stages = {stage.name: stage for stage in STAGES}
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--small", action="store_true", help="tiny models, on a CPU where there is no GPU")
    parser.add_argument("--seconds", type=seconds, default=530, help="what the whole may take (default 530)")
    parser.add_argument("--stages", nargs="+", metavar="STAGE", choices=stages, default=list(stages), help="some alone")
    parser.add_argument("--out", type=Path, help="the file of results; compiled code is written beside it")
    parser.add_argument("--caches", type=Path, help="compiled code that an earlier run wrote")
    parser.add_argument("--commit", help="what is measured, where there is no git")
    options = parser.parse_args()
    options.stages = [stages[name] for name in options.stages]
    if options.out is None:
        kind = "small" if options.small else "gpu"
        options.out = ROOT / "bench" / "results" / f"{kind}-{datetime.now(UTC):%Y%m%d-%H%M%S}.jsonl"
    try:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.open("a").close()
    except OSError as error:
        parser.error(f"{options.out.name} cannot be written: {error.strerror}")
    return options


def seconds(text: str) -> float:
    """A positive number of seconds."""
    value = float(text)
    if not 0 < value < 10**6:
        raise ValueError
    return value


def command(options: argparse.Namespace) -> str:
    """The command, without folders."""
    words = ["python", "-m", "bench.gpu", "--seconds", f"{options.seconds:g}"]
    words += ["--small"] if options.small else []
    words += ["--caches", options.caches.name] if options.caches else []
    if len(options.stages) < len(STAGES):
        words += ["--stages", *(stage.name for stage in options.stages)]
    return shlex.join(words)


def measure(stage: Stage, bench: Bench, results: Results, end: float) -> bool:
    """Measure a stage's rows if there is time for them; returns whether none failed."""
    warm = bench.compiled and stage.again is not None
    estimate = stage.small if bench.small else stage.again if warm else stage.estimate
    left = end - time.perf_counter()
    print(f"{stage.name}: about {estimate:.0f} s, {left:.0f} s are left.", flush=True)
    if estimate > left:
        results.add(stage.name, "", {"skipped": f"it takes about {estimate:.0f} s, and {left:.0f} s were left"})
        return True
    failed, begun = 0, time.perf_counter()
    for name, values in outcomes(stage, bench):
        results.add(stage.name, name, values)
        print(f"  {name}: {json.dumps(values)[:200]}", flush=True)
        failed += "error" in values
        if values.get("graphs") or "compile_s" in values:
            saved = attempt(partial(save_compiled, results.path.with_name(f"{results.path.name}.caches")))
            results.add("compiled code", "written", saved)
    results.add(stage.name, "whole stage", {"seconds": time.perf_counter() - begun, "estimate_s": estimate})
    attempt(bench.free)
    return not failed


def outcomes(stage: Stage, bench: Bench) -> Iterator[tuple[str, Values]]:
    """Each row's name and values, or the reason why it has none."""
    try:
        for name, work in stage.rows(bench):
            bench.row = (stage.name, name)
            yield name, attempt(work)
    except Exception as error:  # listing the rows failed
        yield "", reason(error)


def attempt(work: Callable[[], Values | None]) -> Values:
    """The values that work returns, or the reason why there are none."""
    try:
        return work() or {}
    except Exception as error:
        return reason(error)


def reason(error: Exception) -> Values:
    """An error's message and the end of its traceback, without the machine's paths."""
    if isinstance(error, SkippedError):
        return {"skipped": str(error)}
    print(faults.places(error), file=sys.stderr)
    told = faults.without_paths("".join(traceback.format_exception(error)))
    return {"error": faults.message(error)[:500], "traceback": told[-3000:]}


def go_on_anew(options: argparse.Namespace, stages: list[Stage]) -> None:
    """Measure the rest in a new process: after an illegal memory access CUDA refuses everything to this one."""
    if stages:
        left = options.seconds - (time.perf_counter() - BEGUN)
        words = ["--seconds", str(left), "--out", str(options.out), "--stages", *(stage.name for stage in stages)]
        words += ["--small"] if options.small else []
        words += ["--commit", options.commit] if options.commit else []
        os.execv(sys.executable, [sys.executable, "-m", "bench.gpu", *words])


def save_compiled(path: Path) -> Values:
    """Write all code compiled so far to a file for --caches."""
    artifacts = torch.compiler.save_cache_artifacts()
    if artifacts is None:  # the compiler made no code
        return {"bytes": 0}
    content = gzip.compress(artifacts[0], compresslevel=1)
    path.write_bytes(content)
    return {"bytes": len(content)}


def load_compiled(path: Path) -> Values:
    """Read code that an earlier run compiled."""
    found = torch.compiler.load_cache_artifacts(gzip.decompress(path.read_bytes()))
    if found is None:
        raise ValueError(f"{path.name} holds no compiled code of this version of torch.")
    return {kind: len(keys) for kind, keys in found.artifacts.items()}


if __name__ == "__main__":
    main()
