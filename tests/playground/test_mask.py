"""A mask that is painted by hand, with whatever hand."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("playwright", reason="Playwright is not installed; .ci/run installs it")

from PIL import Image
from playwright.sync_api import Page, expect

from images import read_mask
from tests.support.browser import Opener
from tests.support.page import FOX, STROKE, Point, canvas, draw, paint, press, request_of, saved, shared, show
from tests.support.pictures import oriented, quadrants, written

SIDE = 256
Hand = Callable[[Page, Sequence[Point]], None]


def by_touch(page: Page, points: Sequence[Point]) -> None:
    driver = page.context.new_cdp_session(page)
    kinds = ["touchStart", *["touchMove"] * (len(points) - 1)]
    for kind, (x, y) in zip(kinds, canvas(page, points), strict=True):
        driver.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": [{"x": x, "y": y}]})
    driver.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})


def by_keyboard(page: Page, _: Sequence[Point]) -> None:
    expect(page.get_by_role("application", name="Mask")).to_be_focused()
    page.keyboard.press("ArrowUp")
    page.keyboard.press("ArrowLeft")
    page.keyboard.down("Space")
    for _ in range(3):
        page.keyboard.press("ArrowUp")
    page.keyboard.up("Space")


@pytest.mark.parametrize(
    ("hand", "device"),
    [(paint, {}), (by_touch, {"has_touch": True, "viewport": {"width": 390, "height": 844}}), (by_keyboard, {})],
)
def test_what_is_painted_is_drawn_anew_and_all_else_is_kept_to_the_bit(
    hand: Hand, device: dict[str, object], page_url: str, open_page: Opener, tmp_path: Path
) -> None:
    image = written(quadrants(SIDE, SIDE), tmp_path / "image.png")
    page = open_page(shared(page_url, **FOX, output_format="png"), **device)
    page.get_by_label("Image: Choose a file").set_input_files(image)
    press(page, "Paint")
    hand(page, STROKE)
    press(page, "Use mask")
    expect(page.get_by_role("img", name="Mask: mask.png")).to_be_visible()
    draw(page)
    drawn = np.asarray(Image.open(saved(page)))
    assert request_of(page).keys() == {*FOX, "image", "mask", "output_format"} - {"aspect_ratio", "height", "width"}
    show(page, "Code")
    mask = saved(page, "button", "Download mask.png")
    original = quadrants(SIDE, SIDE)
    painted = np.asarray(read_mask(mask, original, original.size)) > 0
    assert 0.005 < painted.mean() < 0.3
    assert (drawn[~painted] == np.asarray(original)[~painted]).all()
    assert (drawn[painted] != np.asarray(original)[painted]).any()


def test_a_stroke_lies_where_the_hand_was(page_url: str, open_page: Opener, tmp_path: Path) -> None:
    """Upright, however the file has its pixels: as the predictor sees it."""
    image = oriented(quadrants(320, SIDE), 6, tmp_path / "image.jpg")
    page = open_page(shared(page_url, **FOX))
    page.get_by_label("Image: Choose a file").set_input_files(image)
    press(page, "Paint")
    page.get_by_role("slider", name="Hardness").fill("100")
    paint(page, [(0.25, 0.25), (0.75, 0.25)])
    press(page, "Use mask")
    show(page, "Code")
    mask = np.asarray(Image.open(saved(page, "button", "Download mask.png")).convert("L"))
    assert mask.shape == (SIDE, 320)
    rows, columns = np.nonzero(mask > 127)
    brush = 32
    assert abs(rows.min() - (64 - brush / 2)) <= 2
    assert abs(rows.max() - (64 + brush / 2)) <= 2
    assert abs(columns.min() - (80 - brush / 2)) <= 2
    assert abs(columns.max() - (240 + brush / 2)) <= 2


def test_undo_erase_invert_and_cancel(page_url: str, open_page: Opener, tmp_path: Path) -> None:
    page = open_page(shared(page_url, **FOX))
    page.get_by_label("Image: Choose a file").set_input_files(written(quadrants(SIDE, SIDE), tmp_path / "image.png"))
    press(page, "Paint")
    across = [(0.1, 0.5), (0.9, 0.5)]
    paint(page, across)
    page.keyboard.press("Control+z")
    press(page, "Use mask")
    expect(page.get_by_text("Nothing is painted yet: paint over what is to be drawn anew.")).to_be_visible()
    press(page, "Invert")
    page.keyboard.press("x")
    expect(page.get_by_role("radio", name="Erase")).to_be_checked()
    paint(page, across)
    press(page, "Use mask")
    show(page, "Code")
    mask = np.asarray(Image.open(saved(page, "button", "Download mask.png")).convert("L"))
    assert (mask[0] == 255).all()
    assert (mask[SIDE // 2, 26:230] == 0).all()
    press(page, "Paint")
    press(page, "Clear")
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_have_count(0)
    expect(page.get_by_role("img", name="Mask: mask.png")).to_be_visible()
