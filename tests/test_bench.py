"""The benchmark for GPUs, run with tiny models on a CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.processes import finished

# Without a GPU, so that the run is the same on every machine.
CPU = os.environ | {"CUDA_VISIBLE_DEVICES": ""}


def report(*paths: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bench.report", *map(str, paths)]
    return finished(command)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run, with no time for its last stage."""
    out = tmp_path_factory.mktemp("results") / "short.jsonl"
    stages = ("ceilings", "swap", "eager steps", "parts", "profile", "switches", "smoke")
    command = [sys.executable, "-m", "bench.gpu", "--small", "--seconds", "90", "--out", out, "--stages", *stages]
    done = finished(command, env=CPU)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return out


def test_every_row_is_measured_or_says_why_not(results: Path) -> None:
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    found = {(line["stage"], line["name"]): line for line in lines}
    assert not [line for line in lines if "error" in line]
    skipped = {name for (stage, name), line in found.items() if "skipped" in line and stage != "smoke"}
    assert skipped == {
        "upload from pinned memory",
        "bf16, a slice, base in pinned memory",
        "fp8, a slice, base in pinned memory",
    }
    assert found["swap", "fp8, health of all tensors"]["intact"]
    # Eager bf16 is diffusers' own arithmetic on the same weights; fp8 rounds.
    assert found["eager steps", "bf16, error of one step"]["relative_error"] == 0
    assert 1e-3 < found["eager steps", "fp8, error of one step"]["relative_error"] < 0.1
    assert found["swap", "two files of rank 16, never read before"]["loras_s"] > 0
    swaps = [line for (stage, name), line in found.items() if stage == "swap" and "tensors" in line and "rank" in name]
    assert all(line["tensors"] > 0 and line["median_s"] > 0 for line in swaps)
    assert found["parts", "schnell fp8, request to webp"]["phases_s"].keys() >= {"denoise", "decode", "safety", "write"}
    assert len(found["profile", "one step, bf16"]["kernels"]) == 25


def test_each_line_says_what_it_was_measured_on(results: Path) -> None:
    for line in results.read_text().splitlines():
        values = json.loads(line)
        assert values["device"] == "CPU"
        assert values["versions"]["torch"]
        assert values["small"]
        assert {"commit", "command", "clocks", "time"} <= values.keys()
        assert str(Path.home()) not in line


def test_a_stage_without_time_is_skipped(results: Path) -> None:
    (smoke,) = [line for line in map(json.loads, results.read_text().splitlines()) if line["stage"] == "smoke"]
    assert "were left" in smoke["skipped"]


def test_a_row_fails_alone_and_a_run_that_hangs_ends_with_what_it_measured(tmp_path: Path) -> None:
    out = tmp_path / "trial.jsonl"
    trial = f"""
import sys, time
import bench.gpu.__main__ as gpu

def fail():
    raise ValueError("no such file: {tmp_path}/model")

def skip():
    raise gpu.SkippedError("needs a sledgehammer")

def rows(bench):
    yield "one", lambda: {{"value": 1}}
    yield "two", fail
    yield "three", skip
    yield "four", lambda: {{"value": 4}}
    yield "five", lambda: time.sleep(100)

gpu.STAGES = (gpu.Stage("trial", rows, 1, 1),)
gpu.BEGUN = time.perf_counter()
sys.argv = ["bench", "--small", "--seconds", "3", "--out", {str(out)!r}]
gpu.main()
"""
    command = [sys.executable, "-c", trial]
    done = finished(command, env=CPU)
    assert done.returncode == 1
    assert "in rows" in done.stderr or "<lambda>" in done.stderr  # where it was
    one, two, three, four, five = map(json.loads, out.read_text().splitlines())
    assert (one["value"], four["value"]) == (1, 4)
    assert two["error"] == "ValueError: no such file: model"
    assert "in fail" in two["traceback"]
    assert str(tmp_path) not in two["traceback"]
    assert three["skipped"] == "needs a sledgehammer"
    assert five["name"] == "five"
    assert "the time was up" in five["error"]
    assert done.stdout.count("trial: about 1 s") == 1


def test_the_report_has_what_was_measured_and_names_what_was_not(results: Path) -> None:
    printed = report(results).stdout
    assert "| diffusers, eager |" in printed
    assert "| flux-sprites, fp8 |" not in printed  # not compiled here
    assert "| LoRA swap, fp8, rank 16 |" in printed
    assert "- ceilings, upload from pinned memory: needs CUDA" in printed


def test_the_report_sets_a_step_against_the_sustained_rates(tmp_path: Path) -> None:
    common = {"device": "a card", "small": False, "time": "2030-01-01", "versions": {"torch": "9"}, "commit": "c"}
    common["command"] = "bench"
    step = {"linear_tflop": 60, "attention_tflop": 15}
    lines = [
        {"stage": "ceilings", "name": "bf16 products, sustained", "tflops": 600},
        {"stage": "ceilings", "name": "bf16 products, burst", "tflops": 900},
        {"stage": "ceilings", "name": "fp8 products, sustained", "tflops": 1200},
        {"stage": "eager steps", "name": "diffusers, dev", "median_s": 0.25} | step,
        {"stage": "compiled fp8", "name": "dev", "median_s": 0.3} | step,
        {"stage": "compiled fp8", "name": "dev", "median_s": 0.1, "time": "2030-01-02"} | step,
        {"stage": "compiled fp8", "name": "dev", "error": "out of memory", "time": "2030-01-03"},
    ]
    path = tmp_path / "gpu.jsonl"
    path.write_text("\n".join(json.dumps(common | line) for line in lines) + '\n{"stage": "pea')
    # 60 / 1200 + 15 / 600 s is the floor. The later of two that were measured wins; half a line at the end is left out.
    assert "| flux-sprites, fp8 | 100.0 | 2.50x | 1.33x | 750 |" in report(path).stdout
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps(common | lines[0] | {"device": "another card"}))
    assert "a card and another card: name files of one kind" in report(path, other).stderr
