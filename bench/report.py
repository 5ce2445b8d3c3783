"""Tables and a plot of runs of bench.gpu: python -m bench.report [JSONL …] [--plot SVG].

A run may be cut into parts, so several files of one device are read as one, and the latest line of each row counts.
Tables list measured rows only; skipped and failed rows are listed below them with their reasons.
"""

import argparse
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from html import escape
from pathlib import Path

from settings import ROOT

Line = Mapping[str, object]
Lines = Mapping[tuple[str, str], Line]  # by stage and name

OURS = "flux-sprites"
EAGER = ("eager steps", "diffusers, dev")
PEFT = ("PEFT", "dev, two LoRAs, eager")
# Steps of dev at 1024x1024: the label, the stage and name of the line, and the precision of the products.
STEPS = (
    ("diffusers, eager", *EAGER, "bf16"),
    ("diffusers, compiled", "diffusers compiled", "dev", "bf16"),
    (f"{OURS}, bf16", "compiled bf16", "dev", "bf16"),
    (f"{OURS}, fp8", "compiled fp8", "dev", "fp8"),
    ("diffusers + PEFT, two LoRAs, eager", *PEFT, "bf16"),
    ("diffusers + PEFT, two LoRAs, compiled", "PEFT", "dev, two LoRAs, compiled", "bf16"),
    (f"{OURS}, bf16, two LoRAs", "compiled bf16", "dev, two LoRAs", "bf16"),
    (f"{OURS}, fp8, two LoRAs", "compiled fp8", "dev, two LoRAs", "fp8"),
)
# Errors of a step against another system: both labels, and the stage, name and key of the value.
ERRORS = (
    (f"{OURS}, bf16", "diffusers, eager", "compiled bf16", "error of one step", "relative_error"),
    (f"{OURS}, fp8", "diffusers, eager", "compiled fp8", "error of one step", "relative_error"),
    (f"{OURS}, bf16, two LoRAs", "diffusers + PEFT, eager", *PEFT, "error_of_ours"),
    (
        f"{OURS}, fp8, two LoRAs",
        f"{OURS}, bf16, two LoRAs",
        "compiled fp8",
        "one step with two LoRAs",
        "relative_error",
    ),
)
# All other times: the label, and the stage and name of the line.
TIMES = (
    ("a picture of dev, bf16, from prompt to pixels", "compiled bf16", "pictures"),
    ("a picture of dev, fp8, from prompt to pixels", "compiled fp8", "pictures"),
    ("a picture of schnell, fp8, from request to webp with the safety check", "parts", "schnell fp8, request to webp"),
    ("a picture of schnell, bf16, the same", "parts", "schnell bf16, request to webp"),
    ("LoRA swap, bf16, rank 16", "swap", "bf16, rank 16"),
    ("LoRA swap, bf16, two of rank 64", "swap", "bf16, two of rank 64"),
    ("LoRA swap, fp8, rank 16", "swap", "fp8, rank 16"),
    ("LoRA swap, fp8, two of rank 64", "swap", "fp8, two of rank 64"),
    ("another scale, bf16", "swap", "bf16, another scale"),
    ("another scale, fp8", "swap", "fp8, another scale"),
    ("another model, bf16", "swap", "bf16, another model"),
    ("another model, fp8", "swap", "fp8, another model"),
    ("VAE, decoding 1024x1024", "parts", "VAE, decode 1024x1024"),
    ("VAE, decoding 1440x1440", "parts", "VAE, decode 1440x1440"),
    ("T5 and CLIP, a new prompt", "parts", "T5 and CLIP, a new prompt"),
    ("compiling bf16 and the VAE", "compiled bf16", "compile"),
    ("compiling fp8 besides", "compiled fp8", "compile"),
)
ROW, LEFT, WIDTH = 26, 260, 420  # pixels


def read(paths: Iterable[Path]) -> Lines:
    """The latest line of each row; a measured line counts more than an unmeasured one."""
    lines = sorted((line for path in paths for line in whole_lines(path)), key=lambda line: line["time"])
    if not lines:
        raise SystemExit("These files hold no results.")
    kinds = {f"{line['device']}{', tiny models' if line['small'] else ''}" for line in lines}
    if len(kinds) > 1:
        raise SystemExit(f"These results are of {' and '.join(sorted(kinds))}: name files of one kind.")
    latest: dict[tuple[str, str], Line] = {}
    for line in lines:
        row = (line["stage"], line["name"])
        if row not in latest or is_measured(line) or not is_measured(latest[row]):
            latest[row] = line
    return latest


def whole_lines(path: Path) -> Iterator[Line]:
    """The complete lines of a file: a run that was killed may have left half of one."""
    for line in path.read_text().splitlines():
        with suppress(json.JSONDecodeError):
            yield json.loads(line)


def is_measured(line: Line) -> bool:
    """Whether a line has values."""
    return "skipped" not in line and "error" not in line


def measured(lines: Lines, stage: str, name: str, key: str = "median_s") -> float | None:
    """A value of a line; None if it was not measured."""
    return lines.get((stage, name), {}).get(key)


def rates(lines: Lines) -> dict[str, float]:
    """Sustained TFLOP/s of the device, by precision."""
    held = {it: measured(lines, "ceilings", f"{it} products, sustained", "tflops") for it in ("bf16", "fp8")}
    return {precision: rate for precision, rate in held.items() if rate}


def floor(line: Line, precision: str, held: Mapping[str, float]) -> float | None:
    """Seconds of a step's products alone at the sustained rates; attention is always in bf16."""
    if precision not in held or "bf16" not in held:
        return None
    return line["linear_tflop"] / held[precision] + line["attention_tflop"] / held["bf16"]


def about(lines: Lines) -> str:
    """Devices, versions, commits and commands of the runs."""
    versions = [
        "{device}, torch {torch}, commit {commit}".format(**it, torch=it["versions"]["torch"]) for it in lines.values()
    ]
    commands = [f"    {it['command']}" for it in lines.values()]
    return "\n".join([*dict.fromkeys(versions), "", *dict.fromkeys(commands)])


def steps_table(lines: Lines) -> str:
    """Milliseconds of each system, compared with plain diffusers and with the floor."""
    rows = [["a step of dev", "ms", "diffusers eager / this", "this / the floor", "TFLOP/s"]]
    eager, held = measured(lines, *EAGER), rates(lines)
    for label, stage, name, precision in STEPS:
        seconds = measured(lines, stage, name)
        if seconds is None:
            continue
        line = lines[stage, name]
        least = floor(line, precision, held)
        ratios = [f"{eager / seconds:.2f}x" if eager else "", f"{seconds / least:.2f}x" if least else ""]
        tflop = line["linear_tflop"] + line["attention_tflop"]
        rows.append([label, f"{1e3 * seconds:.1f}", *ratios, f"{tflop / seconds:.4g}"])
    return markdown(rows)


def errors_table(lines: Lines) -> str:
    """Relative errors between the systems' results after one step."""
    rows = [["one step of", "against", "relative error"]]
    for label, other, *place in ERRORS:
        error = measured(lines, *place)
        if error is not None:
            rows.append([label, other, f"{error:.1e}"])
    return markdown(rows)


def times_table(lines: Lines) -> str:
    """Milliseconds of everything but steps."""
    rows = [["", "ms", "least to most"]]
    for label, stage, name in TIMES:
        line = lines.get((stage, name), {})
        if "median_s" in line:
            spread = f"{1e3 * line['least_s']:.1f} to {1e3 * line['most_s']:.1f}"
            rows.append([label, f"{1e3 * line['median_s']:.1f}", spread])
        elif "seconds" in line:
            rows.append([label, f"{1e3 * line['seconds']:.0f}", ""])
    return markdown(rows)


def ceilings_table(lines: Lines) -> str:
    """Rates of the device's products and copies."""
    rows = [["ceiling", "", "burst"]]
    for precision, rate in rates(lines).items():
        burst = measured(lines, "ceilings", f"{precision} products, burst", "tflops")
        rows.append([f"{precision} products, sustained", f"{rate:.4g} TFLOP/s", f"{burst:.4g}" if burst else ""])
    for name in ("copy", "upload from pinned memory"):
        rate = measured(lines, "ceilings", name, "gb_per_s")
        if rate:
            rows.append([name, f"{rate:.4g} GB/s", ""])
    return markdown(rows)


def missing(lines: Lines) -> str:
    """The skipped and failed rows with their reasons."""
    # A stage that one run skipped may have been measured by another run.
    found = {stage for (stage, name), line in lines.items() if name not in ("", "whole stage") and is_measured(line)}
    reasons = [
        f"- {stage}{f', {name}' if name else ''}: {line.get('skipped') or line['error']}"
        for (stage, name), line in lines.items()
        if not is_measured(line) and (name or stage not in found)
    ]
    return "\n".join(["Not measured:", "", *reasons]) if reasons else ""


def markdown(rows: list[list[str]]) -> str:
    """A table; nothing if it has no rows but the head."""
    head, *body = rows
    if not body:
        return ""
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *body])


def plot(lines: Lines) -> str:
    """Bars, as an SVG: milliseconds of a step."""
    found = [(label, measured(lines, stage, name)) for label, stage, name, _ in STEPS]
    bars = [(label, 1e3 * seconds) for label, seconds in found if seconds is not None]
    if not bars:
        raise SystemExit("No step was measured: there is nothing to plot.")
    longest = max(ms for _, ms in bars)
    drawn = []
    for number, (label, ms) in enumerate(bars):
        y, length = 30 + number * ROW, WIDTH * ms / longest
        colour = "#d9480f" if label.startswith(OURS) else "#868e96"
        drawn += [
            f'<text x="{LEFT - 8}" y="{y + 14}" text-anchor="end">{escape(label)}</text>',
            f'<rect x="{LEFT}" y="{y}" width="{length:.0f}" height="18" fill="{colour}"/>',
            f'<text x="{LEFT + length + 6:.0f}" y="{y + 14}">{ms:.0f} ms</text>',
        ]
    title = f"A step of dev on {next(iter(lines.values()))['device']}"
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{LEFT + WIDTH + 70}" height="{40 + len(bars) * ROW}" '
            'font-family="sans-serif" font-size="13">',
            '<rect width="100%" height="100%" fill="white"/>',
            f'<text x="{LEFT}" y="18" font-weight="bold">{escape(title)}</text>',
            *drawn,
            "</svg>\n",
        ]
    )


def main() -> None:
    """Print the tables, write the plot."""
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.add_argument("results", nargs="*", type=Path, help="default: every gpu-*.jsonl in bench/results")
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    paths = options.results or sorted((ROOT / "bench" / "results").glob("gpu-*.jsonl"))
    if not paths:
        raise SystemExit("There are no results of a GPU yet; python -m bench.gpu makes them.")
    try:
        lines = read(paths)
    except OSError as error:
        raise SystemExit(f"{Path(error.filename).name} cannot be read: {error.strerror}.") from None
    tables = (steps_table(lines), errors_table(lines), times_table(lines), ceilings_table(lines), missing(lines))
    print("\n\n".join([about(lines), *filter(None, tables)]))
    if options.plot:
        options.plot.write_text(plot(lines))


if __name__ == "__main__":
    main()
