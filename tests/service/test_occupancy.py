"""Whether the predictor has a prediction, as another process sees it."""

import os
import resource
import tempfile
import threading
import time
from pathlib import Path

import cog.types
import pytest

from service.occupancy import Look, Occupancy


@pytest.fixture
def occupancy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Occupancy:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(cog.types.Path, "validate", cog.types.Path.validate)  # put back what is counted from now on
    monkeypatch.setattr(cog.types.URLPath, "convert", cog.types.URLPath.convert)
    return Occupancy()


@pytest.fixture
def look(occupancy: Occupancy, tmp_path: Path) -> Look:
    """Somebody who has looked twice, and knows that nothing is going on."""
    look = Look(tmp_path)
    assert [look.idle(), look.idle()] == [False, True]
    time.sleep(0.02)  # by the clock of files
    return look


def test_a_prediction_shows_while_it_runs_and_at_the_next_look(occupancy: Occupancy, look: Look) -> None:
    with occupancy.shown():
        with occupancy.shown():
            assert not look.idle()
        assert [look.idle(), look.idle()] == [False, False]
    assert [look.idle(), look.idle()] == [True, True]
    time.sleep(0.02)
    with occupancy.shown():
        pass
    assert [look.idle(), look.idle()] == [False, True]


def test_what_cog_refuses_by_itself_shows_at_the_next_look(look: Look) -> None:
    with pytest.raises(ValueError, match="Invalid IPv6 URL"):
        cog.types.Path.validate("http://[")
    assert [look.idle(), look.idle()] == [False, True]


def test_what_cog_fetches_by_itself_shows_while_it_comes(look: Look) -> None:
    read, write = os.pipe()
    with os.fdopen(read, "rb") as trickling:
        sent = cog.types.URLPath(source="", filename="photo", fileobj=trickling)
        fetching = threading.Thread(target=sent.convert)
        fetching.start()
        time.sleep(0.1)
        seen = [look.idle(), look.idle()]
        os.close(write)
        fetching.join()
    assert [*seen, look.idle()] == [False, False, True]


def test_what_cog_cannot_fetch_is_told_without_its_address(occupancy: Occupancy) -> None:
    sent = cog.types.Path.validate("http://user:s3cret@127.0.0.1:9/a.png?token=s3cret")
    with pytest.raises(ValueError, match=r"^A file that the request names cannot be fetched \(ConnectionError\)\.$"):
        sent.convert()


def test_without_descriptors_there_is_no_sign_but_the_prediction_goes_on(occupancy: Occupancy, look: Look) -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
    try:
        with occupancy.shown():
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
            assert look.idle()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
