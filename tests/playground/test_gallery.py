"""The pictures that were drawn: what can be done with them, and that they are still there."""

import pytest

pytest.importorskip("playwright", reason="Playwright is not installed; .ci/run installs it")

from playwright.sync_api import Page, expect

from images import read_metadata
from tests.support.browser import Opener
from tests.support.page import (
    FOX,
    draw,
    drop,
    history,
    picture,
    press,
    request_of,
    saved,
    shared,
)

# A browser that is told to store nothing throws at the mere sight of its storages.
STORES_NOTHING = """
    for (const name of ["localStorage", "sessionStorage", "indexedDB"])
        Object.defineProperty(window, name, { get() { throw new DOMException("denied", "SecurityError"); } });
"""


def form_of(page: Page) -> dict[str, str]:
    return {
        name: page.get_by_role(role, name=name, exact=True).input_value()
        for name, role in (
            ("Prompt", "textbox"),
            ("Inference steps", "spinbutton"),
            ("Width", "spinbutton"),
            ("Seed", "spinbutton"),
        )
    }


def test_the_same_again_is_the_same_to_the_bit(page_url: str, open_page: Opener) -> None:
    page = open_page(shared(page_url, **FOX))
    draw(page)
    first = picture(page)
    page.get_by_role("textbox", name="Prompt").fill("a blue fish")
    draw(page)
    history(page).nth(1).click()
    press(page, "Same again")
    expect(history(page)).to_have_count(3)
    assert picture(page) == first
    expect(page.get_by_role("textbox", name="Prompt")).to_have_value("a red fox")


def test_a_picture_becomes_the_image_to_draw_from(page_url: str, open_page: Opener) -> None:
    page = open_page(shared(page_url, **FOX))
    draw(page)
    file = saved(page)
    press(page, "Use as image")
    expect(page.get_by_role("img", name=f"Image: {file.name}")).to_be_visible()
    draw(page)
    assert read_metadata(saved(page))["prompt_strength"] == 0.8
    assert request_of(page).keys() == {"prompt", "image", "num_inference_steps", "seed"}


def test_a_seed_that_is_kept_stays_until_it_is_let_go(page_url: str, open_page: Opener) -> None:
    page = open_page(shared(page_url, **{name: value for name, value in FOX.items() if name != "seed"}))
    page.get_by_role("checkbox", name="Disable safety checker").check()  # the seeds are any
    draw(page)
    seed = read_metadata(saved(page))["seed"]
    press(page, "Keep seed")
    page.get_by_role("textbox", name="Prompt").fill("a blue fish")
    draw(page)
    assert read_metadata(saved(page))["seed"] == seed
    press(page, "Lock the seed")
    draw(page)
    assert read_metadata(saved(page))["seed"] != seed


def test_two_pictures_are_compared_with_what_differs(page_url: str, open_page: Opener) -> None:
    page = open_page(shared(page_url, **FOX))
    draw(page)
    page.get_by_role("spinbutton", name="Guidance scale").fill("2")
    page.get_by_role("spinbutton", name="Seed").fill("2")
    draw(page)
    press(page, "Compare")
    for seed in (1, 2):
        expect(page.get_by_role("tabpanel").get_by_role("img", name=f"a red fox, seed {seed}")).to_be_visible()
    table = page.get_by_role("table", name="What differs between their inputs")
    expect(table.get_by_role("rowheader")).to_have_text(["Seed", "Guidance scale"])
    expect(table.get_by_role("cell")).to_have_text(["2", "1", "2", "3"])
    page.get_by_role("spinbutton", name="Seed").fill("4")
    draw(page)  # what comes meanwhile takes nobody's place
    expect(history(page)).to_have_count(3)
    expect(table.get_by_role("cell")).to_have_text(["2", "1", "2", "3"])
    page.get_by_role("radio", name="Wipe").check()
    slider = page.get_by_role("slider", name="How much of A is shown, in percent")
    slider.fill("25")
    page.get_by_role("radio", name="Side by side").check()
    page.get_by_role("radio", name="Wipe").check()
    expect(slider).to_have_value("25")
    page.keyboard.press("Escape")
    expect(page.get_by_role("link", name="Download")).to_be_visible()


def test_a_key_deletes_the_picture_that_has_the_focus_whatever_comes_meanwhile(
    page_url: str, open_page: Opener
) -> None:
    page = open_page(shared(page_url, **FOX))
    pictures = page.get_by_role("group", name="Pictures").get_by_role("img")
    for seed in (1, 2):
        page.get_by_role("spinbutton", name="Seed").fill(str(seed))
        draw(page)
    page.get_by_role("spinbutton", name="Seed").fill("4")
    oldest = history(page).nth(1)
    oldest.focus()
    page.keyboard.press("Control+Enter")
    expect(history(page)).to_have_count(3)
    expect(history(page).nth(2)).to_be_focused()
    page.keyboard.press("Delete")
    expect(history(page)).to_have_count(2)
    expect(history(page).nth(1)).to_be_focused()
    assert [picture.get_attribute("alt") for picture in pictures.all()] == ["a red fox, seed 4", "a red fox, seed 2"]
    page.reload()
    expect(pictures).to_have_count(2)
    assert [picture.get_attribute("alt") for picture in pictures.all()] == ["a red fox, seed 4", "a red fox, seed 2"]
    # What a page still loads when it is closed Chromium takes for a connection, and forbids it to a blob.
    for image in page.locator("img").all():
        expect(image).to_have_js_property("complete", True)


@pytest.mark.parametrize("kind", ["webp", "jpg", "png"])
def test_a_picture_that_is_dropped_brings_its_inputs_back(kind: str, page_url: str, open_page: Opener) -> None:
    page = open_page(shared(page_url, **FOX, replicate_weights="zorp*0.5", output_format=kind))
    draw(page)
    file = saved(page)
    other = open_page(page_url)
    drop(other, other.get_by_role("heading", name="Say what you would like to see"), file)
    expect(other.get_by_text(f"The form has the inputs of {file.name}.").first).to_be_visible()
    assert request_of(other) == {**FOX, "replicate_weights": '[{"path":"zorp","scale":0.5}]'}


def test_the_history_is_there_after_a_reload_until_it_is_cleared(page_url: str, open_page: Opener) -> None:
    page = open_page(shared(page_url, **FOX))
    draw(page)
    page.get_by_role("textbox", name="Prompt").fill("a blue fish")
    draw(page)
    newest = picture(page)
    page.goto(page_url)
    page.reload()
    expect(history(page)).to_have_count(2)
    assert picture(page) == newest
    press(page, "Use its inputs")
    expect(page.get_by_role("textbox", name="Prompt")).to_have_value("a blue fish")
    press(page, "Delete")
    expect(history(page)).to_have_count(1)
    press(page, "Clear history")
    press(page, "Keep them")
    press(page, "Clear history")
    press(page, "Delete all")
    expect(history(page)).to_have_count(0)
    page.reload()
    expect(page.get_by_role("heading", name="Say what you would like to see")).to_be_visible()
    expect(history(page)).to_have_count(0)


def test_a_browser_that_stores_nothing_draws_and_says_so(page_url: str, open_page: Opener) -> None:
    page = open_page("about:blank")
    page.add_init_script(STORES_NOTHING)
    page.goto(shared(page_url, **FOX, replicate_weights="zorp*0.5"))
    draw(page)
    expect(page.get_by_text("This browser keeps no pictures here now").first).to_be_visible()
    press(page, "Remove zorp")
    press(page, "Add zorp")
    draw(page)
    expect(history(page)).to_have_count(2)
    press(page, "Delete")
    expect(history(page)).to_have_count(1)


def test_a_shared_address_has_the_inputs_and_no_file(page_url: str, open_page: Opener) -> None:
    page = open_page(shared(page_url, **FOX, replicate_weights="zorp*0.5"))
    draw(page)
    press(page, "Use as image")
    expect(page.get_by_role("group", name="Mask", exact=True)).to_be_visible()
    press(page, "Share")
    expect(page.get_by_text("not in it: image.").first).to_be_visible()
    assert "image" not in page.url
    assert "data:" not in page.url
    other = open_page(page.url)
    assert request_of(other) == {**FOX, "replicate_weights": '[{"path":"zorp","scale":0.5}]'}
