import json
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from harness.waiting import wait_until
from local_cog.server import CogServer
from tests.support.browser import Opener, chromium, needed_browser, opening
from tests.support.playground import playground

if TYPE_CHECKING:
    from playwright.sync_api import Browser


@pytest.fixture(scope="module")
def browser() -> Iterator["Browser"]:
    with chromium() as started:
        yield started


@pytest.fixture
def open_page(browser: "Browser") -> Iterator[Opener]:
    with opening(browser) as opened:
        yield opened


@pytest.fixture(scope="module")
def running_cog(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[CogServer]:
    """A Cog server over the module's own small project."""
    with CogServer(project, log=tmp_path_factory.mktemp("cog") / "log") as running:
        running.wait_until_ready()
        yield running


@pytest.fixture
def cog(running_cog: CogServer) -> CogServer:
    """The same, when it has nothing to do."""
    wait_until(lambda: running_cog.health()["status"] == "READY")
    return running_cog


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, str]:
    """Of predictors here. One thread each: others draw and browse beside them, and threads wait for each other."""
    return {**os.environ, "WEIGHTS_CACHE": str(tmp_path_factory.mktemp("weights")), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="session")
def page_url(environment: Mapping[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The page beside the miniature, for those who have a browser."""
    needed_browser()
    with playground(log=tmp_path_factory.mktemp("playground") / "log", environment=environment) as address:
        yield address


@pytest.fixture(scope="session")
def axe() -> str | None:
    """The script of axe-core, which finds what keeps people from using a page; None where npm cannot install it."""
    here = Path(__file__).parent
    script = here / "node_modules" / "axe-core" / "axe.min.js"
    locked = json.loads((here / "package-lock.json").read_text(encoding="utf-8"))["packages"]["node_modules/axe-core"]
    # npm deletes what is there before it asks for more.
    if not (script.is_file() and f"axe v{locked['version']}\n" in script.read_text(encoding="utf-8")[:100]):
        if not shutil.which("npm"):
            return None
        # Without a network it gives up in seconds, not in minutes.
        install = ["npm", "ci", "--no-audit", "--no-fund", "--fetch-retries=0", "--fetch-timeout=20000"]
        if subprocess.run(install, cwd=here, capture_output=True, check=False).returncode:
            return None
    return script.read_text(encoding="utf-8")
