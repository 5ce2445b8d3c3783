"""Checks of a cache of LoRAs after a test: complete files, no temporary ones, no secrets."""

import hashlib
from pathlib import Path

from settings import MIB

SECRET = "s3cr3t"
DISK = 24 * MIB


def check_cache(cache: Path, *, after_kill: bool = False) -> None:
    for file in cache.glob("loras/*"):
        assert hashlib.sha256(file.read_bytes()).hexdigest() == file.stem
    if not after_kill:
        assert list(cache.glob("incoming/*")) == []
    for record in cache.glob("references/*"):
        assert SECRET.encode() not in record.read_bytes()
