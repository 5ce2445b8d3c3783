import pytest


@pytest.fixture(autouse=True)
def check_what_is_left(nothing_is_left_behind: None) -> None:
    """Look after every test here."""
