"""Messages of unforeseen errors."""

import pytest

from service import faults


@pytest.mark.parametrize("end", ["\n", "\r", "\v", "\x1c", "\x85", "\u2028", "\u2029", "\x1b[2K"])
def test_an_error_s_own_words_begin_no_line_of_the_log(end: str) -> None:
    try:
        raise OSError(f"/home/me/a{end}100%|####| 28/28")
    except OSError as error:
        *frames, said = faults.places(error).split("\n")
    assert len(frames) == 1
    assert said.isprintable()
    assert said.startswith("OSError: a?")
