import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from local_cog.server import free_port
from settings import ROOT
from tests.support.browser import Opener, chromium, needed_browser, opening
from tests.support.waiting import wait_until

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
def axe() -> str:
    """The script of axe-core, which finds what keeps people from using a page."""
    if not shutil.which("npm"):
        pytest.skip("npm is not installed")
    here = Path(__file__).parent
    # Without a network it gives up in seconds, not in minutes.
    install = ["npm", "ci", "--no-audit", "--no-fund", "--fetch-retries=0", "--fetch-timeout=20000"]
    done = subprocess.run(install, cwd=here, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"npm could not install axe-core: {done.stderr[-200:]}")
    return (here / "node_modules" / "axe-core" / "axe.min.js").read_text(encoding="utf-8")


@contextlib.contextmanager
def playground(*options: str, log: Path, environment: Mapping[str, str]) -> Iterator[str]:
    """`script/playground`, from when its page answers; gives the page's address."""
    command = [sys.executable, "-m", "playground.server", "--port", str(free_port()), *options]
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=file
        )
    try:
        wait_until(lambda: "Ready: http" in log.read_text(errors="replace") or process.poll() is not None, 60)
        assert process.poll() is None, log.read_text(errors="replace")
        yield re.search(r"Ready: (\S+)", log.read_text(errors="replace"))[1]
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)
