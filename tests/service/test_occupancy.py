"""Whether the predictor has a prediction, as another process sees it."""

import resource
import tempfile
import time
from pathlib import Path

import pytest

from service.occupancy import Look, Occupancy


@pytest.fixture
def occupancy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Occupancy:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
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


def test_without_descriptors_there_is_no_sign_but_the_prediction_goes_on(occupancy: Occupancy, look: Look) -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
    try:
        with occupancy.shown():
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
            assert look.idle()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
