"""Random predictions, and the memory, files and threads that they leave: python -m bench.soak [--requests 2000].

The last line is JSON; the exit code is 1 if anything is wrong.
"""

import argparse
import json
import tempfile
from pathlib import Path

from harness.soak import soaking
from service.leftovers import SECONDS_KEPT
from settings import ROOT


def main() -> None:
    """Run, print the figures, and fail if anything is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=2000, help="a multiple of 100 (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    warm = min(500, options.requests // 2)
    with tempfile.TemporaryDirectory() as folder:
        source = (ROOT / "predict.py").read_text()
        with soaking(Path(folder), source, SECONDS_KEPT + 2) as soak:
            report = soak.run(options.requests, warm=warm, block=min(100, warm), seed=options.seed)
    print(json.dumps(report.figures(min(100, warm), warm)))
    raise SystemExit(bool(report.problems))


if __name__ == "__main__":
    main()
