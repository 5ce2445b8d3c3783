"""Pictures by URL: fetched by the rule for LoRAs, into files of the request's own."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from harness.hosts import File, Host, in_turn, redirect, silent, status
from settings import MIB, Settings
from sources import pictures
from sources.references import parse_picture
from tests.support.caches import SECRET
from tests.support.fetching import QUICK
from weights import fetch_pictures

PICTURE = bytes(range(256)) * 80_000  # in several pieces, from a host that honours ranges


def fetched(settings: Settings, folder: Path, **sent: str) -> list[bytes]:
    pictures = {name: parse_picture(name, text) for name, text in sent.items()}
    fetch_pictures(pictures, folder / "request", settings, QUICK)
    return [(folder / "request" / name).read_bytes() for name in pictures]


def test_pictures_become_files(environment: Settings, host: Host, tmp_path: Path) -> None:
    host.routes["/my photo.png"] = in_turn(status(503), redirect("/b?x=1"))
    host.routes["/b"] = File(PICTURE)
    image = f" HTTP{host.url('/my photo.png')[4:]}?X-Amz-Signature={SECRET}#there"
    assert fetched(environment, tmp_path, image=image, mask="data:,mask") == [PICTURE, b"mask"]
    assert host.seen[0].query == {"X-Amz-Signature": SECRET}


@pytest.mark.parametrize("packing", ["", "none", "utf-8", "aws-chunked", "identity, identity"])
def test_what_is_no_packing_does_not_matter(environment: Settings, host: Host, tmp_path: Path, packing: str) -> None:
    host.routes["/a"] = status(200, {"Content-Encoding": packing}, b"image")
    assert fetched(environment, tmp_path, image=host.url("/a")) == [b"image"]


REFUSED = {
    "missing": (status(404), "cannot be fetched: 127.0.0.1 answered 404 Not Found; there is no such file."),
    "login": (status(403), "cannot be fetched: 127.0.0.1 answered 403 Forbidden; it needs a login, or the link has "),
    "packed": (status(200, {"Content-Encoding": "gzip"}, b"a"), "cannot be used: 127.0.0.1 packed it as gzip; it "),
    "packed twice": (
        status(200, {"Content-Encoding": "identity, BR"}, b"a"),
        "cannot be used: 127.0.0.1 packed it as br",
    ),
    "no content": (status(204), "cannot be used: 127.0.0.1 sent nothing."),
    "not modified": (status(304), "cannot be used: 127.0.0.1 sent nothing."),
    "empty": (status(200), "cannot be used: 127.0.0.1 sent nothing."),
    "a part": (
        status(206, {"Content-Range": "bytes 1-2/3"}, b"ab"),
        "cannot be fetched: 127.0.0.1 answered 206 Partial Content, though all of it was asked for.",
    ),
    "stated": (status(200, {"Content-Length": str(2 * MIB)}), "is too large; it must have at most 1 MiB."),
    "unstated": (File(PICTURE, stated=False), "is too large; it must have at most 1 MiB."),
    "silent": (silent, "could not be fetched within 1 seconds; try again later, or name another place"),
    "slow": (File(PICTURE, delay=0.05, slice=1000), "could not be fetched within 1 seconds; try again later, or"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_no_picture_gets_a_sentence(
    environment: Settings, host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    host.routes["/a"], sentence = REFUSED[what]
    monkeypatch.setattr(pictures, "PICTURE_SECONDS", 1)
    if what.endswith("stated"):
        monkeypatch.setattr(pictures, "MAX_BYTES", MIB)
    with pytest.raises(ValueError, match=f"^mask {host.url('/a')} {re.escape(sentence)}") as caught:
        fetched(environment, tmp_path, image="data:,image", mask=host.url(f"/a?token={SECRET}"))
    assert SECRET not in str(caught.value)


def test_a_prediction_waits_no_longer_for_a_picture_than_it_may_take(
    environment: Settings, host: Host, tmp_path: Path
) -> None:
    host.routes["/a"] = silent
    with pytest.raises(ValueError, match="within 1 seconds"):
        fetched(replace(environment, prediction_seconds=0.5), tmp_path, image=host.url("/a"))


def test_a_private_address_is_not_asked(environment: Settings, host: Host, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^image http://127\.0\.0\.1.* WEIGHTS_ALLOW_PRIVATE_HOSTS=1\.$"):
        fetched(replace(environment, allow_private_hosts=False), tmp_path, image=host.url("/a"))
    assert host.seen == []


@pytest.mark.parametrize("picture", [lambda host: host.url("/a"), lambda host: f"data:,{'a' * 30 * MIB}"])
def test_a_full_disk_is_not_taken_for_the_cache_s(
    environment: Settings, host: Host, small_disk: Path, picture: Callable
) -> None:
    host.routes["/a"] = File(PICTURE * 2, ranges="none")
    with pytest.raises(OSError, match="No space left on device"):
        fetched(environment, small_disk, image=picture(host))
