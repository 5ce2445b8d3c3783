"""script/models: what a machine with a GPU draws with is in Hugging Face's cache afterwards."""

import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from harness.hosts import File, Host, hugging_face
from settings import MINIATURE, ROOT
from tests.support.caches import SECRET
from tests.support.fetching import LARGE, LORA
from tests.support.processes import finished

FILES = {"model_index.json": b"{}", "transformer/config.json": b"{}", "vae/diffusion_pytorch_model.safetensors": LORA}


def run(host: Host, home: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """The command as script/models starts it, without script/setup."""
    environment = os.environ | {"HF_ENDPOINT": host.address, "HF_HOME": str(home), "FLUX_SCHNELL": MINIATURE.schnell}
    models = {"FLUX_DEV": "o/dev", "SAFETY_CHECKER": "o/checker", "NSFW_CLASSIFIER": MINIATURE.nsfw_classifier}
    return finished(
        [sys.executable, "-P", "-m", "tools.models"],
        env=environment | models | variables | {"PYTHONPATH": str(ROOT)},
        cwd=home.parent,
    )


def test_models_are_fetched_ahead_of_time(host: Host, storage: Host, tmp_path: Path) -> None:
    hugging_face(host, storage, "o/dev", FILES | {"transformer/diffusion_pytorch_model.safetensors": LARGE})
    hugging_face(host, storage, "o/checker", {"config.json": b"{}", "model.safetensors": LORA})
    storage.routes[f"/{hashlib.sha256(LARGE).hexdigest()}"] = File(LARGE, delay=0.008)  # longer than a bar waits
    home = tmp_path / "home"
    fetched = run(host, home, HF_HUB_DISABLE_PROGRESS_BARS="1", HF_TOKEN=SECRET)
    dev, needs, has, schnell, *_ = fetched.stdout.splitlines()
    assert (fetched.returncode, dev, has) == (0, "dev: o/dev", "It has 0.02 GB in Hugging Face's cache.")
    assert needs.startswith("huggingface.co/o/dev: 0.02 GB to download; the disk of Hugging Face's cache has ")
    assert schnell == f"schnell: {MINIATURE.schnell}"
    assert fetched.stdout.count("It is a folder, which is left as it is.") == 2
    bars = [bar for bar in fetched.stderr.splitlines() if bar.strip()]  # each drawn over the one before
    assert 1 <= len(bars) <= 200
    assert [bar for bar in bars if not re.match(r"huggingface.co/o/dev: +\d+%\|", bar)] == []
    assert SECRET not in fetched.stdout + fetched.stderr
    sent = len(storage.seen)
    again = run(host, home, HF_HUB_OFFLINE="1")
    assert (again.returncode, again.stderr) == (0, "")
    assert "to download" not in again.stdout
    assert len(storage.seen) == sent


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        ({}, "huggingface.co/o/dev is gated: accept its conditions at https://huggingface.co/o/dev with an account"),
        ({"FLUX_DEV": "o/none"}, "huggingface.co/o/none cannot be fetched: 127.0.0.1 answered 404; it does not exist"),
        ({"FLUX_DEV": "no/model/here"}, "'no/model/here' is no folder"),
    ],
)
def test_a_model_that_cannot_be_had_is_one_sentence(
    host: Host, storage: Host, tmp_path: Path, variables: dict[str, str], sentence: str
) -> None:
    hugging_face(host, storage, "o/dev", FILES, token=SECRET, gated=True)
    refused = run(host, tmp_path / "home", **variables)
    assert refused.returncode == 1
    assert refused.stderr.startswith(sentence)
    assert len(refused.stderr.splitlines()) == 1
