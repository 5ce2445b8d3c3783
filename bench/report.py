"""The table and the plot of a run of bench.gpu: python -m bench.report [JSON …] [--plot SVG].

Several files of one GPU are read as one, the latest figure of each system winning: a run may have been cut into parts.
"""

import argparse
import json
from html import escape
from pathlib import Path

from settings import ROOT

EAGER = "diffusers, eager"
OURS = "flux-sprites"
ROW, LEFT, WIDTH = 26, 260, 420  # pixels


def read(paths: list[Path]) -> dict:
    """The runs as one, in order of time."""
    runs = sorted((json.loads(path.read_text()) for path in paths), key=lambda run: run["time"])
    devices = {run["machine"]["device"] for run in runs}
    if len(devices) != 1:
        raise SystemExit(f"These results are of {len(devices)} devices; name files of one.")
    merged = runs[-1] | {"systems": {}, "relative_errors": {}, "commands": [run["command"] for run in runs]}
    for run in runs:
        merged["systems"] |= {name: it for name, it in run["systems"].items() if "error" not in it}
        merged["relative_errors"] |= run["relative_errors"]
    return merged


def table(run: dict) -> str:
    """Seconds of each system for each workload, and what they are to plain diffusers and to the floor."""
    systems = run["systems"]
    workloads = list(dict.fromkeys(name for it in systems.values() for name in it["workloads"]))
    first = workloads[0]
    head = ["system", *workloads, f"{first}: against eager", "to the floor", "relative error", "peak GB", "set-up s"]
    rows = [head, ["---"] * len(head)]
    for name, it in systems.items():
        seconds = {workload: cell["median_s"] for workload, cell in it["workloads"].items()}
        eager = systems.get(EAGER, {"workloads": {}})["workloads"].get(first)
        floor = it["floors"][first].get("fp8_s" if "fp8" in name else "bf16_s")
        error = run["relative_errors"].get(name)
        rows.append(
            [
                name,
                *(f"{seconds[workload]:.3f}" if workload in seconds else "" for workload in workloads),
                f"{eager['median_s'] / seconds[first]:.2f}x" if eager else "",
                f"{seconds[first] / floor:.2f}x" if floor else "",
                "" if error is None else f"{error:.1e}",
                f"{it['peak_bytes'] / 1e9:.1f}" if it["peak_bytes"] else "",
                f"{it['set_up_s']:.1f}",
            ]
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def plot(run: dict) -> str:
    """Bars, as an SVG: seconds for a picture of the first workload."""
    bars = [(name, next(iter(it["workloads"].values()))["median_s"]) for name, it in run["systems"].items()]
    longest = max(seconds for _, seconds in bars)
    lines = []
    for number, (name, seconds) in enumerate(bars):
        y, length = 30 + number * ROW, WIDTH * seconds / longest
        colour = "#d9480f" if name.startswith(OURS) else "#868e96"
        lines += [
            f'<text x="{LEFT - 8}" y="{y + 14}" text-anchor="end">{escape(name)}</text>',
            f'<rect x="{LEFT}" y="{y}" width="{length:.0f}" height="18" fill="{colour}"/>',
            f'<text x="{LEFT + length + 6:.0f}" y="{y + 14}">{seconds:.2f} s</text>',
        ]
    title = f"{next(iter(next(iter(run['systems'].values()))['workloads']))} on {run['machine']['device']}, seconds"
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{LEFT + WIDTH + 70}" height="{40 + len(bars) * ROW}" '
            'font-family="sans-serif" font-size="13">',
            '<rect width="100%" height="100%" fill="white"/>',
            f'<text x="{LEFT}" y="18" font-weight="bold">{escape(title)}</text>',
            *lines,
            "</svg>\n",
        ]
    )


def main() -> None:
    """Print the table, write the plot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", nargs="*", type=Path, help="default: every gpu-*.json in bench/results")
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    paths = options.results or sorted((ROOT / "bench" / "results").glob("gpu-*.json"))
    if not paths:
        raise SystemExit("There are no results of a GPU yet; python -m bench.gpu makes them.")
    run = read(paths)
    print(f"{run['machine']['device']}, torch {run['machine']['torch']}, {run['time']}\n\n{table(run)}")
    if options.plot:
        options.plot.write_text(plot(run))


if __name__ == "__main__":
    main()
