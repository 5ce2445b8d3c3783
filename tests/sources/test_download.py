"""A file comes whole and right, whatever its host makes of ranges and connections."""

import pytest

from harness.hosts import File, Host, in_turn, redirect, short, status
from settings import MIB, Settings
from tests.support.caches import SECRET
from tests.support.fetching import LARGE, LORA, OTHER, QUICK, fetch, refusal


@pytest.mark.parametrize("ranges", ["good", "none", "refused", "from the start", "elsewhere"])
def test_a_large_file_is_right_whatever_the_host_makes_of_ranges(
    environment: Settings, host: Host, ranges: str
) -> None:
    file = host.routes["/a"] = File(LARGE, ranges=ranges)
    assert fetch(environment, host.url("/a")) == LARGE
    assert ranges != "none" or file.sent < len(LARGE) + 8 * MIB  # one stream
    parts = [request for request in host.seen if "Range" in request.headers]
    assert len(parts) == 1 if ranges != "good" else len(parts) >= 3


@pytest.mark.parametrize("content", [LORA, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("ranges", ["good", "none", "from the start"])
@pytest.mark.parametrize("etag", ['"1"', None])
def test_a_broken_connection_is_taken_up_again(
    environment: Settings, host: Host, content: bytes, ranges: str, etag: str | None
) -> None:
    file = host.routes["/a"] = File(content, etag=etag, ranges=ranges, breaks=2, breaks_after=len(content) // 3)
    settings = environment
    if ranges == "from the start":
        # The bytes before the break are compared with the bytes after it.
        assert "changed while it was being downloaded" in refusal(settings, host.url("/a"))
        return
    assert fetch(settings, host.url("/a")) == content
    if ranges == "good" and content == LORA:
        assert file.sent < len(content) + 4096


def test_a_file_that_changes_meanwhile_is_not_glued_together(environment: Settings, host: Host) -> None:
    broken = File(LORA, etag='"1"', breaks=1, breaks_after=9_000)
    host.routes["/a"] = in_turn(broken, File(OTHER, etag='"2"'))
    assert "changed while it was being downloaded" in refusal(environment, host.url("/a"))
    assert fetch(environment, host.url("/a")) == OTHER


def test_a_link_that_expires_meanwhile_is_asked_for_again(environment: Settings, host: Host, storage: Host) -> None:
    storage.routes["/old"] = in_turn(File(LORA, breaks=1, breaks_after=9_000), status(403))
    storage.routes["/new"] = File(LORA)
    host.routes["/a"] = in_turn(redirect(storage.url("/old")), redirect(storage.url("/new")))
    assert fetch(environment, host.url("/a")) == LORA


def test_a_host_that_always_breaks_off_is_given_up(environment: Settings, host: Host) -> None:
    host.routes["/a"] = File(LORA, ranges="none", breaks=99, breaks_after=5_000)
    assert "failed or broke off" in refusal(environment, host.url("/a"))
    assert len(host.seen) == 1 + len(QUICK.pauses)
    host.routes["/a"] = short(LORA[:5_000], len(LORA))
    assert "failed or broke off" in refusal(environment, host.url("/a"))
    host.routes["/a"] = File(LORA)
    assert fetch(environment, host.url("/a")) == LORA


def test_progress_is_shown_and_does_not_look_like_denoising(
    environment: Settings, host: Host, capfd: pytest.CaptureFixture
) -> None:
    host.routes["/a"] = File(LARGE, ranges="none", delay=0.004)
    fetch(environment, host.url(f"/a?token={SECRET}"))
    shown = capfd.readouterr().err.replace("\r", "\n").splitlines()
    bars = [line for line in shown if "%|" in line]
    assert bars
    assert all(bar.startswith(host.url("/a:")) for bar in bars)
    assert SECRET not in "".join(shown)
