"""Hostile input against the real Cog server: python -m bench.fuzz [--cases 10000]. The last line is JSON."""

import argparse
import json
import tempfile
import time
from pathlib import Path

from harness.fuzz import fuzzing, run


def main() -> None:
    """Run, and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, fuzzing(Path(folder)) as fuzz:
        began = time.monotonic()
        run(fuzz, options.cases, options.seed)
        figures = {
            "cases": fuzz.cases,
            "seconds": round(time.monotonic() - began),
            "answers": {str(status): count for status, count in sorted(fuzz.statuses.items(), key=str)},
            "slowest_s": round(fuzz.slowest_s, 1),
        }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
