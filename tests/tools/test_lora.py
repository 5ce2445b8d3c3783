"""script/lora: what it prints of LoRAs as people have them, and what of those that cannot be had."""

import hashlib
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.architecture import OFFICIAL as CONFIGS
from harness.hosts import File, Host
from settings import MINIATURE, ROOT, Settings
from tests.support import lora_files, models
from tests.support.caches import SECRET
from tests.support.processes import finished
from tools.lora import Checked, check

LORAS = ROOT / "mini" / "loras"
ZORP, BOLD, DUSK = (LORAS / f"{name}.safetensors" for name in ("zorp", "bold", "dusk"))
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """The tool in a process of its own, as script/lora runs it once everything is set up."""

    def start(*arguments: object, here: Path = tmp_path, **environment: str) -> subprocess.CompletedProcess[str]:
        own = {"WEIGHTS_CACHE": str(tmp_path / "cache"), "WEIGHTS_ALLOW_PRIVATE_HOSTS": "1", "OMP_NUM_THREADS": "1"}
        done = finished(
            [ROOT / "script" / "run", "tools.lora", *map(str, arguments)],
            env={"PATH": os.environ["PATH"], **own, **environment},
            cwd=here,
        )
        assert SECRET not in done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        return done

    return start


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(MINIATURE, cache_dir=tmp_path / "cache")


def test_bundled_loras_are_reported_one_by_one_and_in_pairs(run: Run) -> None:
    done = run("zorp.safetensors", BOLD, here=LORAS)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[:5] == [
        "zorp.safetensors",
        "  diffusers LoRA of rank 16, applied 88 of 88 tensors",
        f"  871,592 bytes (0.83 MB), SHA-256 {hashlib.sha256(ZORP.read_bytes()).hexdigest()}",
        "  base model by its header: none named",
        "  trigger words: zorp",
    ]
    assert lines[5].startswith("  beside the base: 11.7 % (transformer), most in transformer_blocks.0.")
    assert lines[6] == "bold.safetensors"
    assert lines[-3:-1] == ["overlap", "  zorp.safetensors, bold.safetensors   0.077"]


def test_what_cannot_be_had_or_read_has_its_sentence_and_leaves_the_rest_alone(
    run: Run, host: Host, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(ZORP.read_bytes()[:5000])
    host.routes["/bold.safetensors"] = File(BOLD.read_bytes())
    url = f"{host.address}/bold.safetensors?token={SECRET}"
    missing = f"{host.address}/missing.safetensors?token={SECRET}"
    done = run("--json", broken.name, ZORP, missing, url)
    assert done.returncode == 1
    document = json.loads(done.stdout)
    refused, zorp, absent, bold = document["loras"]
    assert refused["reference"] == "broken.safetensors"
    assert absent["reference"] == f"{host.address}/missing.safetensors"
    assert all(it["error"].endswith(".") for it in (refused, absent))
    assert bold["reference"] == f"{host.address}/bold.safetensors"
    assert (bold["name"], bold["bytes"]) == (f"{host.address}/bold.safetensors", BOLD.stat().st_size)
    assert (zorp["kinds"], zorp["ranks"], zorp["applied"], zorp["tensors"]) == (["LoRA"], [16], 88, 88)
    change = zorp["change"]["transformer"]
    assert change["ratio"] == pytest.approx(change["norm"] / change["base_norm"])
    assert change["ratio"] < change["most"]["ratio"] < 1
    assert [overlap["loras"] for overlap in document["overlaps"]] == [[1, 3]]
    assert document["no_base"] is None


def test_without_the_bases_weights_only_the_change_is_measured(settings: Settings, tmp_path: Path) -> None:
    folder = tmp_path / "dev"
    shutil.copytree(MINIATURE.dev, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    settings = replace(settings, models=replace(MINIATURE, dev=str(folder)))
    report = check([str(ZORP), "no.safetensors", str(DUSK)], tmp_path, settings).report()
    assert report.count("  norm of its change: 1") == 2
    assert "\nno.safetensors\n  There is no file or folder " in report
    assert "\nbeside the base\n  The weights in dev/transformer cannot be read: " in report
    assert "zorp.safetensors, dusk.safetensors   0.060\n" in report


def test_the_official_model_needs_to_be_nowhere(run: Run, tmp_path: Path) -> None:
    width = CONFIGS["text_encoder"]["hidden_size"]
    names = ("transformer.x_embedder", 64, 3072), ("text_encoder.text_model.encoder.layers.0.mlp.fc1", width, 4 * width)
    tensors = {}
    for name, columns, rows in names:
        tensors |= {f"{name}.lora_A.weight": torch.ones(1, columns), f"{name}.lora_B.weight": torch.ones(rows, 1)}
    save_file(tensors, tmp_path / "a.safetensors")
    done = run("a.safetensors", FLUX_DEV="black-forest-labs/FLUX.1-dev", HF_HOME=str(tmp_path), HF_ENDPOINT="http://x.")
    assert done.returncode == 0, done.stdout
    assert "\n  norm of its change: 443.4 (transformer)\n  norm of its change: 1536 (text encoder)\n" in done.stdout
    assert done.stdout.endswith(
        "The weights of black-forest-labs/FLUX.1-dev are not on this machine; only a change's own norm is known.\n"
    )


def test_what_a_file_says_of_itself_is_shown_without_secrets(settings: Settings, tmp_path: Path) -> None:
    tensors = load_file(ZORP)
    save_file(
        tensors, tmp_path / "a.safetensors", {"ss_sd_model_name": f"flux\nhttps://h.example/flux?token={SECRET}\n"}
    )
    lines = check(["a.safetensors"], tmp_path, settings).report().splitlines()
    assert "  base model by its header: flux?https://h.example/flux (ss_sd_model_name)" in lines


def test_loras_that_are_called_the_same_are_told_apart(settings: Settings, tmp_path: Path) -> None:
    for folder, file in (("a", ZORP), ("b", BOLD)):
        (tmp_path / folder).mkdir()
        shutil.copy(file, tmp_path / folder / "lora.safetensors")
    report = check(["a/lora.safetensors", "b/lora.safetensors"], tmp_path, settings).report()
    assert re.search(r"\n  lora\.safetensors \(\w{8}\), lora\.safetensors \(\w{8}\)   0\.077\n", report)


def test_of_a_sum_each_term_is_reported(settings: Settings, tmp_path: Path) -> None:
    settings = replace(settings, loras_dir=LORAS)
    names = [it.file.name for it in check(["zorp*0.5 + bold", '[{"path": "dusk"}]'], tmp_path, settings).loras]
    assert names == ["zorp", "bold", "dusk"]
    (refused,) = check(["zorp + nonsense!"], tmp_path, settings).loras
    assert "as a reference, 'nonsense!' names no LoRA" in refused.error


@pytest.mark.parametrize("text", ["", " ", "[]"])
def test_what_names_nothing_is_refused(settings: Settings, tmp_path: Path, text: str) -> None:
    checks = check([text], tmp_path, settings)
    assert checks.failed
    assert checks.report().endswith("It names no LoRA.")


def test_the_text_encoders_change_is_measured_beside_it(tmp_path: Path) -> None:
    settings = Settings(models.write_models(tmp_path), cache_dir=tmp_path / "cache")
    clip = models.text_encoder()
    tensors = lora_files.CLIP["diffusers"](lora_files.clip_changes(clip))
    lora_files.write(tmp_path / "clip.safetensors", tensors)
    (checked,) = check(["clip.safetensors"], tmp_path, settings).loras
    assert isinstance(checked, Checked)
    assert list(checked.sizes) == ["text_encoder"]
    size = checked.sizes["text_encoder"]
    strength = lora_files.ALPHA / lora_files.RANK
    changes = {
        name: strength * (up.double() @ down.double()).norm().item()
        for name, (up, down) in lora_files.clip_changes(clip).items()
    }
    assert size.delta == pytest.approx(sum(norm**2 for norm in changes.values()) ** 0.5)
    assert size.ratio > 0
    assert size.most[0].removesuffix(".weight").endswith(tuple(name.partition("encoder.")[2] for name in changes))


def test_a_name_means_what_it_would_mean_in_a_request_whatever_folder_is_called_so(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # which stands for the repository, where main goes
    (tmp_path / "zorp").mkdir()
    settings = replace(settings, loras_dir=LORAS)
    for text in ("bold + zorp", '[{"path": "zorp"}]'):
        assert check([text], tmp_path, settings).loras[-1].file.sha256 == hashlib.sha256(ZORP.read_bytes()).hexdigest()


def test_a_change_too_large_for_numbers_is_told_without_one(settings: Settings, tmp_path: Path) -> None:
    layer, zorp = "transformer.single_transformer_blocks.0.attn.to_k", load_file(ZORP)
    down, up = (zorp[f"{layer}.{name}.weight"].float() for name in ("lora_A", "lora_B"))
    # With so many ranks, the factors are multiplied, in float32.
    huge = {"lora_A": down.repeat(8, 1) * 1e30, "lora_B": up.repeat(1, 8) * 1e30}
    save_file({f"{layer}.{name}.weight": values for name, values in huge.items()}, tmp_path / "huge.safetensors")
    checks = check(["huge.safetensors", str(ZORP)], tmp_path, settings)
    document = json.loads(json.dumps(checks.document(), allow_nan=False))
    assert document["loras"][0]["change"]["transformer"]["norm"] is None
    assert document["loras"][1]["change"]["transformer"]["norm"] > 0
    assert document["overlaps"] == [{"loras": [0, 1], "cosine": None}]
    assert "one of them changes nothing, or is too large for numbers" in checks.report()
