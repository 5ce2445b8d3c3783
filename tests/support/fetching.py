"""LoRAs in all packings, and functions that fetch them and return the content or the refusal."""

import gzip
import hashlib
import io
import multiprocessing
import tarfile
import zipfile
from collections.abc import Callable

import numpy as np
import pytest
from safetensors.numpy import save

from settings import MIB, Settings
from sources.client import Patience
from tests.support.caches import SECRET
from weights import WeightsCache

# Short: hosts on loopback answer at once or never.
QUICK = Patience(connect=2, stall=0.6, pauses=(0.02, 0.04), longest_pause=1.5)
VERSION = "0123456789abcdef" * 4


def make_lora(size: int = 20_000, seed: int = 0, **metadata: str) -> bytes:
    """A .safetensors file of about that many bytes."""
    values = np.random.default_rng(seed).integers(0, 256, max(size, 64), dtype=np.uint8)
    return save({"lora.down": values[: size // 2], "lora.up": values[size // 2 :]}, metadata or None)


LORA, OTHER = make_lora(seed=1), make_lora(seed=2)
LARGE = make_lora(20 * MIB, seed=3)
# Configs that PEFT saves beside the weights, with the keys that fetching reads.
PEFT, OTHER_PEFT = b'{"peft_type": "LORA", "r": 4, "lora_alpha": 8}', b'{"peft_type": "LORA", "r": 4, "lora_alpha": 2}'


def fetch(settings: Settings, reference: str, patience: Patience = QUICK) -> bytes:
    with WeightsCache(settings, patience).open(reference) as weights:
        content = weights.path.read_bytes()
        assert hashlib.sha256(content).hexdigest() == weights.sha256
        assert SECRET not in f"{weights.name} {weights.path}"
        return content


def fetch_config(settings: Settings, reference: str, trusted: bool = False) -> bytes:
    """The config that is fetched with LORA."""
    cache = WeightsCache(settings, QUICK)
    with cache.open_local(reference) if trusted else cache.open(reference) as weights:
        assert weights.path.read_bytes() == LORA
        return weights.config.encode()


def refusal(settings: Settings, reference: str, patience: Patience = QUICK) -> str:
    """The sentence with which a reference is refused."""
    with pytest.raises(ValueError, match=r"\.$") as caught, WeightsCache(settings, patience).open(reference):
        pass
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert SECRET not in sentence
    assert str(settings.cache_dir) not in sentence
    return sentence


def make_tar(members: dict[str, bytes], mode: str = "w", format: int = tarfile.DEFAULT_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode, format=format) as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def make_zip(members: dict[str, bytes], packing: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", packing) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def nested(content: bytes) -> bytes:
    return make_tar({"lora.safetensors": content})


TRAINED = {
    "output/flux_train_replicate/config.yaml": b"config:\n  process:\n  - type: sd_trainer\n    trigger_word: 'TOK'\n",
    "output/flux_train_replicate/captions/a.txt": b"a photo of TOK",
    "output/flux_train_replicate/lora.safetensors": LORA,
    "output/flux_train_replicate/optimizer.safetensors": OTHER,
}


PACKED = {
    "tar": make_tar(TRAINED),
    "the other layout": make_tar({"flux-lora/flux-lora.safetensors": LORA}),
    "tar.gz": make_tar(TRAINED, "w:gz"),
    "zip": make_zip(TRAINED),
    "gz": gzip.compress(LORA),
    "raw": LORA,
}


def start(*arguments: object, target: Callable = fetch) -> multiprocessing.Process:
    process = multiprocessing.get_context("fork").Process(target=target, args=arguments)
    process.start()
    return process
