"""The page for every screen, every pair of eyes, and hands that have a keyboard alone."""

from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("playwright", reason="Playwright is not installed; .ci/run installs it")

from playwright.sync_api import Locator, Page, expect

from tests.support.browser import Opener
from tests.support.page import FOX, draw, history, press, serious_faults, shared, show
from tests.support.pictures import quadrants, written

WIDTHS = (360, 390, 768, 1440)
TABS = ("Grid", "Log", "JSON", "Code", "Picture")


def states(page: Page, image: Path) -> Iterator[str]:
    """Go through what a page can show, and give each a name."""
    expect(page.get_by_role("button", name="Draw", exact=True)).to_be_visible()
    yield "empty"
    page.get_by_role("textbox", name="Prompt").fill("a red fox in a " + "very" * 60 + " long word")
    page.get_by_text("A second LoRA input").click()
    press(page, "Add zorp")
    for name in ("Aspect ratio", "Width", "Seed", "Image"):
        press(page, f"About {name}")
    page.get_by_role("spinbutton", name="Width").fill("9")
    press(page, "Draw")
    expect(page.get_by_text("Width must be a whole number from 256 to 1440.")).to_be_visible()
    yield "problem"
    page.get_by_role("spinbutton", name="Width").fill("256")
    draw(page)
    page.get_by_role("spinbutton", name="Seed").fill("2")
    draw(page)
    for tab in TABS:
        show(page, tab)
        yield tab
    show(page, "Grid")
    page.get_by_label("Values of the rows").fill("1")
    press(page, "Draw grid")
    expect(page.get_by_text("3 of 3 drawn", exact=True)).to_be_visible()
    yield "filled grid"
    show(page, "Picture")
    press(page, "Compare")
    yield "comparison"
    page.get_by_role("radio", name="Wipe").check()
    yield "wipe"
    press(page, "Close comparison")
    press(page, "Clear history")
    yield "clearing"
    page.get_by_label("Image: Choose a file").set_input_files(image)
    press(page, "Paint")
    expect(page.get_by_role("dialog")).to_be_visible()
    yield "mask"


def test_nothing_is_wider_than_the_screen_and_axe_finds_nothing_that_keeps_people_out(
    page_url: str, open_page: Opener, tmp_path: Path, axe: str | None
) -> None:
    """The latter as far as axe-core is there."""
    page = open_page(shared(page_url, **FOX), reduced_motion="reduce")
    found = []
    for state in states(page, written(quadrants(256, 256), tmp_path / "image.png")):
        for width in WIDTHS:
            page.set_viewport_size({"width": width, "height": 800})
            seen, whole = page.evaluate("[document.documentElement.clientWidth, document.documentElement.scrollWidth]")
            found += [f"{state} at {width} is {whole} wide"] if whole > seen else []
        page.set_viewport_size({"width": WIDTHS[-1], "height": 900})
        for scheme in ("light", "dark") if axe else ():
            page.emulate_media(color_scheme=scheme)
            found += [f"{state}, {scheme}: {fault}" for fault in serious_faults(page, axe)]
    assert found == [], "\n".join(found)


def focus(page: Page, wanted: Locator, key: str = "Tab") -> None:
    """Go to a control by a key; it must be seen to have the focus."""
    for _ in range(150):
        if wanted.evaluate("it => it === document.activeElement"):
            break
        page.keyboard.press(key)
    expect(wanted).to_be_focused()
    width, style = wanted.evaluate("it => [getComputedStyle(it).outlineWidth, getComputedStyle(it).outlineStyle]")
    assert (width != "0px", style != "none") == (True, True), f"{wanted}: {style} {width}"


def test_a_keyboard_is_enough(page_url: str, open_page: Opener) -> None:
    page = open_page(shared(page_url, **{**FOX, "prompt": ""}))
    focus(page, page.get_by_role("textbox", name="Prompt"))
    page.keyboard.type("a red fox")
    page.keyboard.press("Control+Enter")
    expect(history(page)).to_have_count(1)
    focus(page, page.get_by_role("button", name="Draw", exact=True))
    page.keyboard.press("Enter")
    expect(history(page)).to_have_count(2)
    focus(page, page.get_by_role("tab", name="Picture"))
    page.keyboard.press("ArrowRight")
    expect(page.get_by_role("tab", name="Grid")).to_be_focused()
    page.keyboard.press("End")
    expect(page.get_by_role("tab", name="Code")).to_be_focused()
    page.keyboard.press("ArrowRight")
    expect(page.get_by_role("tab", name="Picture")).to_be_focused()
    focus(page, page.get_by_role("button", name="Use as image"))
    page.keyboard.press("Enter")
    focus(page, history(page).first)
    page.keyboard.press("ArrowRight")
    expect(history(page).last).to_be_focused()
    expect(history(page).last).to_have_attribute("aria-current", "true")
    paint = page.get_by_role("button", name="Paint")
    focus(page, paint, "Shift+Tab")
    page.keyboard.press("Enter")
    expect(page.get_by_role("application", name="Mask")).to_be_focused()
    page.keyboard.press("Space")
    focus(page, page.get_by_role("button", name="Use mask"))
    page.keyboard.press("Enter")
    expect(page.get_by_role("img", name="Mask: mask.png")).to_be_visible()
    expect(paint).to_be_focused()
    page.keyboard.press("Control+Enter")
    expect(history(page)).to_have_count(3)
