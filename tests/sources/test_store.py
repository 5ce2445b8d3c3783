"""The store on a disk: who has to make room, and what is left by processes that were killed."""

import os
import random
import time
from dataclasses import replace
from pathlib import Path

import pytest

from harness.hosts import File, Host
from harness.waiting import wait_until
from settings import MIB, Settings
from tests.support.caches import DISK, check_cache
from tests.support.fetching import LARGE, LORA, OTHER, QUICK, fetch, make_lora, refusal, start
from weights import WeightsCache


def test_the_least_recently_used_goes_first_and_never_one_in_use(environment: Settings, host: Host) -> None:
    small = replace(environment, cache_bytes=3 * 20_500)
    contents = {name: make_lora(seed=ord(name)) for name in "abcd"}
    host.routes = {f"/{name}": File(content) for name, content in contents.items()}
    for name in "abca":
        fetch(small, host.url(f"/{name}"))
        time.sleep(0.01)
    with WeightsCache(small, QUICK).open(host.url("/b")) as used:
        os.utime(used.path, (0, 0))
        fetch(small, host.url("/d"))
        assert used.path.read_bytes() == contents["b"]
    kept = {file.read_bytes() for file in small.cache_dir.glob("loras/*")}
    assert kept == {contents[name] for name in "abd"}
    host.seen.clear()
    assert fetch(small, host.url("/c")) == contents["c"]
    assert [request.headers.get("If-None-Match") for request in host.seen] == [None]


def test_a_cache_that_is_too_small_says_so(environment: Settings, host: Host) -> None:
    host.routes = {"/a": File(LORA), "/b": File(OTHER)}
    small = replace(environment, cache_bytes=30_000)
    assert "WEIGHTS_CACHE_GB" in refusal(replace(environment, cache_bytes=10_000), host.url("/a"))
    with WeightsCache(small, QUICK).open(host.url("/a")):
        assert "WEIGHTS_CACHE_GB" in refusal(small, host.url("/b"))
    assert fetch(small, host.url("/b")) == OTHER


def test_notes_that_take_too_much_go_the_least_recently_used_first(environment: Settings, host: Host) -> None:
    host.routes = {"/a": File(LORA), "/b": File(OTHER)}
    fetch(environment, host.url("/a"))
    notes = environment.cache_dir / "references"
    for age, name in enumerate(("new", "old", "oldest")):
        with (notes / name).open("wb") as note:
            note.truncate(100 * MIB)
        os.utime(note.name, (time.time() - age - 1,) * 2)
    fetch(environment, host.url("/b"))
    assert {note.name for note in notes.iterdir()} >= {"new", "old"}
    assert len(list(notes.iterdir())) == 4
    assert fetch(environment, host.url("/a")) == LORA


def test_compiled_code_in_the_cache_is_neither_counted_nor_evicted(environment: Settings, host: Host) -> None:
    compiled = environment.cache_dir / "compile" / "kernel"
    compiled.parent.mkdir(parents=True)
    compiled.write_bytes(bytes(100_000))
    host.routes = {"/a": File(LORA), "/b": File(OTHER)}
    small = replace(environment, cache_bytes=30_000)
    assert fetch(small, host.url("/a")) == LORA
    assert fetch(small, host.url("/b")) == OTHER
    assert compiled.stat().st_size == 100_000


@pytest.mark.parametrize("stated", [True, False], ids=["stated", "unstated"])
def test_a_full_disk(environment: Settings, host: Host, small_disk: Path, stated: bool) -> None:
    settings = replace(environment, cache_dir=small_disk / "cache")
    used, large = make_lora(6 * MIB, seed=9), make_lora(20 * MIB, seed=8)
    host.routes = {"/used": File(used), "/old": File(make_lora(5 * MIB, seed=7)), "/large": File(large, stated=stated)}
    fetch(settings, host.url("/old"))
    with WeightsCache(settings, QUICK).open(host.url("/used")) as weights:
        assert "the disk of the cache has" in refusal(settings, host.url("/large"))
        assert weights.path.read_bytes() == used
    check_cache(settings.cache_dir)
    assert fetch(settings, host.url("/large")) == large  # nothing is in use any more: the rest made room
    assert fetch(settings, host.url("/used")) == used


def test_a_disk_that_something_else_fills(environment: Settings, host: Host, small_disk: Path) -> None:
    settings = replace(environment, cache_dir=small_disk / "cache")
    filler = small_disk / "filler"
    filler.write_bytes(bytes(DISK - 3 * MIB))
    host.routes["/a"] = File(make_lora(4 * MIB))
    assert "the disk of the cache has" in refusal(settings, host.url("/a"))
    filler.unlink()
    assert fetch(settings, host.url("/a")) == host.routes["/a"].content


@pytest.mark.parametrize("ranges", ["good", "none"])
def test_a_download_that_is_killed_leaves_nothing_that_is_trusted(
    environment: Settings, host: Host, ranges: str
) -> None:
    file = host.routes["/a"] = File(LARGE, delay=0.01, ranges=ranges)
    process = start(environment, host.url("/a"))
    wait_until(lambda: file.sent > MIB)
    process.kill()
    process.join()
    check_cache(environment.cache_dir, after_kill=True)
    assert list(environment.cache_dir.glob("loras/*")) == []
    file.delay = 0
    assert fetch(environment, host.url("/a")) == LARGE


def fetch_all(settings: Settings, urls: list[str]) -> None:
    for url in urls:
        fetch(settings, url)


def test_killed_at_any_moment_the_cache_holds_whole_files_only(environment: Settings, host: Host) -> None:
    """Small files, so that most of the time goes into renames, records and evictions."""
    contents = {f"/{number}": make_lora(5_000, seed=number) for number in range(6)}
    host.routes = {path: File(content) for path, content in contents.items()}
    urls = [host.url(path) for path in contents]
    small = replace(environment, cache_bytes=4 * 5_300)
    moments = random.Random(1)
    for _ in range(8):
        processes = [start(small, moments.sample(urls * 5, 30), target=fetch_all) for _ in range(2)]
        time.sleep(moments.uniform(0.02, 0.15))
        for process in processes:
            process.kill()
            process.join()
        check_cache(small.cache_dir, after_kill=True)
    for path, content in contents.items():
        assert fetch(small, host.url(path)) == content
