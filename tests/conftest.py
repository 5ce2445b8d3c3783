# ruff: noqa: E402 (what is read when huggingface_hub is imported has to be set before)
import asyncio
import inspect
import os
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

# Also for processes that tests start: they must not use the user's cache and login.
for variable in [name for name in os.environ if name.startswith("HF_")]:
    del os.environ[variable]
HUGGING_FACE = tempfile.TemporaryDirectory(prefix="huggingface-")
os.environ["HF_HOME"] = HUGGING_FACE.name

import pytest
from huggingface_hub import constants

from harness.hosts import Host
from local_cog.server import CogServer
from settings import MINIATURE, ROOT, Settings
from tests.support.caches import DISK, SECRET, check_cache
from tests.support.processes import finished

if TYPE_CHECKING:
    from tests.support.lora_reader import Reader


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run a test that is a coroutine function to its end, on an event loop of its own."""
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    asyncio.run(pyfuncitem.obj(**{name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}))
    return True


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CogServer]:
    """The project behind the real Cog server; what it prints is in `server.log`."""
    directory = tmp_path_factory.mktemp("server")
    environment = {"WEIGHTS_CACHE": str(directory / "weights"), "WEIGHTS_ALLOW_PRIVATE_HOSTS": "1"}
    with CogServer(environment=environment, log=directory / "log") as running:
        running.wait_until_ready()
        yield running


@pytest.fixture(scope="session")
def node_modules() -> Path:
    """Replicate's client for JavaScript, as its registry has it."""
    if not shutil.which("npm"):
        pytest.skip("npm is not installed")
    client = ROOT / "tests" / "cluster" / "replicate_client"
    # Without a network it gives up in seconds, not in minutes.
    install = ["npm", "ci", "--no-audit", "--no-fund", "--fetch-retries=0", "--fetch-timeout=20000"]
    done = finished(install, cwd=client)
    if done.returncode:
        pytest.skip(f"npm could not install replicate: {done.stderr[-200:]}")
    return client / "node_modules"


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> "Reader":
    """Reads LoRAs for small models, and holds them in live copies of these."""
    from tests.support import lora_reader, models  # here: most tests need neither

    return lora_reader.Reader(tmp_path_factory.mktemp("loras"), models.transformer(), models.text_encoder())


@pytest.fixture
def host() -> Iterator[Host]:
    with Host() as running:
        yield running


@pytest.fixture
def storage() -> Iterator[Host]:
    with Host() as running:
        yield running


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Hugging Face's cache of one test."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "huggingface"))
    return tmp_path / "huggingface"


@pytest.fixture
def environment(tmp_path: Path, hub_cache: Path) -> Settings:
    return Settings(MINIATURE, cache_dir=tmp_path / "cache", allow_private_hosts=True)


@pytest.fixture
def places(environment: Settings, host: Host) -> Settings:
    """Hugging Face, CivitAI and Replicate are the one host."""
    address = host.address
    return replace(environment, hf_endpoint=address, civitai_endpoint=address, replicate_endpoint=address)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of a few megabytes."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = finished(["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(disk)], cwd=None)
    if mounted.returncode:
        pytest.skip(f"no disk can be mounted: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.fixture
def nothing_is_left_behind(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    """After a test: only whole files under the names of their contents, no thread, no secret."""
    yield
    printed = "".join(capfd.readouterr())
    assert SECRET not in printed
    check_cache(tmp_path / "cache")
    for thread in threading.enumerate():
        if thread.name.startswith(("weights", "download")):
            thread.join(3)
            assert not thread.is_alive(), thread
