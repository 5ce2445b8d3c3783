"""Hostile input against the real Cog server, or against the cluster: python -m bench.fuzz [--cluster] [--cases 10000].

The last line is JSON; with --cluster, the exit code is 1 if a rule was broken.
"""

import argparse
import json
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from harness.hostile_kinds import KINDS
from harness.postgres import Postgres, find_programs
from local_cog.server import exit_on_signals


def main() -> None:
    """Run, and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cluster", action="store_true", help="many kinds of hostile requests to script/cluster")
    parser.add_argument("--kinds", default="", help=f"with --cluster, some of {', '.join(KINDS)}")
    parser.add_argument("--postgres", action="store_true", help="with --cluster, over PostgreSQL instead of SQLite")
    parser.add_argument("--seconds", type=int, default=3600, help="with --cluster, until no more is sent")
    options = parser.parse_args()
    exit_on_signals()  # so that the servers are stopped
    with tempfile.TemporaryDirectory() as folder:
        figures = (of_the_cluster if options.cluster else of_cog)(Path(folder), options)
    print(json.dumps(figures))
    raise SystemExit(bool(figures.get("failures")))


def of_cog(folder: Path, options: argparse.Namespace) -> dict[str, object]:
    """Figures of one Cog server; the first broken rule ends the run."""
    from harness import fuzz  # slow to import, and not needed for a cluster

    with fuzz.fuzzing(folder) as fuzzed:
        began = time.monotonic()
        fuzz.run(fuzzed, options.cases, options.seed)
        return {
            "cases": fuzzed.cases,
            "seconds": round(time.monotonic() - began),
            "answers": {str(status): count for status, count in sorted(fuzzed.statuses.items(), key=str)},
            "slowest_s": round(fuzzed.slowest_s, 1),
        }


def of_the_cluster(folder: Path, options: argparse.Namespace) -> dict[str, object]:
    """Figures of a cluster with an honest client; every broken rule is reported."""
    from harness import cluster_fuzz  # it needs cluster/requirements.txt

    kinds = list(filter(None, options.kinds.split(",")))
    with ExitStack() as stack:
        database = stack.enter_context(Postgres(find_programs())).url if options.postgres else ""
        target = stack.enter_context(cluster_fuzz.target(folder, database=database))
        began = time.monotonic()
        report = target.run(options.cases, options.seed, kinds, large=options.cases >= 5000, seconds=options.seconds)
        figures = {"seconds": round(time.monotonic() - began), **report.figures()}
    for failure in figures["failures"]:
        print("{kind}: {rule}, {count} times; first: {first}".format(**failure), file=sys.stderr)
    return figures


if __name__ == "__main__":
    main()
