"""A real browser without a window, which reaches this machine alone."""

import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

OPTIONS = (
    "--headless=new",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-breakpad",
    "--no-first-run",
    "--no-proxy-server",
    "--no-sandbox",  # root may not have it; no page comes from elsewhere than this machine
    "--host-resolver-rules=MAP *.example 127.0.0.1, MAP * ~NOTFOUND, EXCLUDE 127.0.0.1, EXCLUDE localhost",
)


def find_browser() -> str | None:
    """Chromium or Chrome, where one is installed."""
    return shutil.which("chromium") or shutil.which("google-chrome")


def look(browser: str, url: str, folder: Path) -> tuple[str, list[str]]:
    """A page as the browser has it once it is loaded, and what its console says of it."""
    options = [*OPTIONS, f"--user-data-dir={folder / 'profile'}", "--enable-logging=stderr", "--dump-dom"]
    environment = {**os.environ, "HOME": str(folder)}
    done = subprocess.run(
        [browser, *options, url], env=environment, capture_output=True, text=True, timeout=120, check=True
    )
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@contextlib.contextmanager
def browsing(browser: str, url: str, folder: Path) -> Iterator[None]:
    """Show a page; names below .example are this machine's. The profile and the log go to a folder, an empty one."""
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
