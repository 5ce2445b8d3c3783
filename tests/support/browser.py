"""A real browser without a window, which can reach only this machine."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support.processes import finished

if TYPE_CHECKING:
    from playwright.sync_api import Browser, ConsoleMessage, Page

Opener = Callable[..., "Page"]
PATIENCE = 60  # seconds to wait for a page to change

OPTIONS = (
    "--headless=new",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-breakpad",
    "--no-first-run",
    "--no-proxy-server",
    "--no-sandbox",  # root cannot use the sandbox; all pages are from this machine
    "--host-resolver-rules=MAP *.example 127.0.0.1, MAP * ~NOTFOUND, EXCLUDE 127.0.0.1, EXCLUDE localhost",
)


def find_browser() -> str | None:
    """Chromium or Chrome, if one is installed."""
    return shutil.which("chromium") or shutil.which("google-chrome")


def needed_browser() -> str:
    """The same; skips the test if none is installed."""
    return find_browser() or pytest.skip("neither Chromium nor Chrome is installed")


def look(browser: str, url: str, folder: Path) -> tuple[str, list[str]]:
    """The page's DOM once it is loaded, and the lines of the browser's console."""
    options = [*OPTIONS, f"--user-data-dir={folder / 'profile'}", "--enable-logging=stderr", "--dump-dom"]
    environment = {**os.environ, "HOME": str(folder)}
    done = finished([browser, *options, url], env=environment, check=True, cwd=None)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@contextlib.contextmanager
def browsing(browser: str, url: str, folder: Path) -> Iterator[None]:
    """Show a page; names below .example lead to this machine. `folder` is empty, for the profile and the log."""
    environment = {**os.environ, "HOME": str(folder)}
    command = [browser, *OPTIONS, f"--user-data-dir={folder / 'profile'}", url]
    with (folder / "browser.log").open("wb") as log:
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    try:
        yield
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextlib.contextmanager
def chromium() -> Iterator["Browser"]:
    """A browser controlled by Playwright.

    While it runs, this thread has an event loop, and tests cannot start another one; so it lasts for one module.
    """
    program = needed_browser()
    playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed; .ci/run installs it")
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=program, args=list(OPTIONS))
        yield started
        started.close()


@contextlib.contextmanager
def opening(browser: "Browser") -> Iterator["Opener"]:
    """A function that opens pages, each in its own context; at the end it checks for unexpected console messages."""
    said: list[str] = []

    def hear(message: "ConsoleMessage", expected: str) -> None:
        # Cancelling a prediction that has just ended fails, and the browser logs the failed request.
        late = message.location["url"].endswith("/cancel")
        if not late and not re.search(expected, message.text):
            said.append(f"{message.type}: {message.text}")

    with contextlib.ExitStack() as stack:

        def opened(address: str, *, expected: str = r"(?!)", **context: object) -> "Page":
            options = {"viewport": {"width": 1440, "height": 900}, **context}
            made = stack.enter_context(browser.new_context(**options))
            made.set_default_timeout(1000 * PATIENCE)
            page = made.new_page()
            page.on("console", lambda it: hear(it, expected))
            page.on("pageerror", lambda error: said.append(str(error)))
            page.goto(address)
            return page

        yield opened
        heard = list(said)  # before closing: a page that is closed while loading pictures may log errors
    assert heard == [], heard
