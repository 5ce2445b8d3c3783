"""Drawing, watching and cancelling, and LoRAs, as a person does it."""

import json
import re
import shutil
import urllib.request
from pathlib import Path

import pytest

pytest.importorskip("playwright", reason="Playwright is not installed; .ci/run installs it")

from playwright.sync_api import expect

from local_cog.server import files
from settings import ROOT
from tests.support.browser import Opener
from tests.support.page import (
    FOX,
    SLOW,
    answer_of,
    draw,
    drop,
    history,
    picture,
    press,
    progress,
    request_of,
    shared,
    show,
)

# A browser's console tells of each answer that is none, and this one is asked again.
SLOT_TAKEN = r"status of 409"


def drawn_by(address: str, inputs: dict[str, object]) -> bytes:
    """The picture that a Cog server draws for a program."""
    body = json.dumps({"input": inputs}).encode()
    request = urllib.request.Request(f"{address}/predictions", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        ((_, content),) = files(json.load(answer))
    return content


def test_ctrl_enter_draws_what_a_program_gets_and_shows_how_far_it_is(page_url: str, open_page: Opener) -> None:
    page = open_page(page_url)
    prompt = page.get_by_role("textbox", name="Prompt")
    prompt.fill("a blue fish")
    page.get_by_role("spinbutton", name="Inference steps").fill(str(SLOW["num_inference_steps"]))
    page.get_by_role("spinbutton", name="Seed").fill(str(SLOW["seed"]))
    prompt.press("Control+Enter")
    expect(progress(page)).to_contain_text(re.compile(r"Step [1-9]\d* of 50"))
    expect(progress(page).get_by_role("progressbar")).to_have_attribute("max", "50")
    expect(progress(page)).to_contain_text("1 picture drawn in")
    expect(page.get_by_role("img", name="a blue fish", exact=True)).to_be_visible()
    assert answer_of(page)["metrics"]["seed"] == SLOW["seed"]
    show(page, "Log")
    expect(page.get_by_role("region", name="Log")).to_contain_text(f"Using seed: {SLOW['seed']}")
    show(page, "Picture")
    with urllib.request.urlopen(f"{page_url}about.json") as about:
        address = json.load(about)["address"]
    assert picture(page) == drawn_by(address, SLOW)


def test_escape_cancels_and_the_next_one_is_drawn(page_url: str, open_page: Opener) -> None:
    page = open_page(shared(page_url, **SLOW), expected=SLOT_TAKEN)
    press(page, "Draw")
    expect(progress(page)).to_contain_text(re.compile(r"Step [1-9]\d* of 50"))
    page.keyboard.press("Escape")
    expect(progress(page)).to_contain_text("Cancelled.")
    page.get_by_role("spinbutton", name="Inference steps").fill("1")
    draw(page)
    expect(history(page)).to_have_count(1)


def test_those_that_wait_are_counted_and_all_can_be_cancelled(page_url: str, open_page: Opener) -> None:
    page = open_page(shared(page_url, **SLOW), expected=SLOT_TAKEN)
    for _ in range(3):
        press(page, "Draw")
    expect(progress(page)).to_contain_text("2 wait here")
    press(page, "Cancel all")
    expect(progress(page)).to_contain_text("Cancelled.")
    expect(page.get_by_role("status").first).to_have_text("Ready")
    expect(history(page)).to_have_count(0)


@pytest.mark.parametrize(("held", "end"), [("true", "1 picture drawn in"), ("false", "Cancelled.")])
def test_who_leaves_cancels_unless_the_page_is_held_for_the_way_back(
    held: str, end: str, page_url: str, open_page: Opener
) -> None:
    page = open_page(shared(page_url, **SLOW))
    press(page, "Draw")
    expect(progress(page)).to_contain_text(re.compile(r"Step [1-9]"))
    page.evaluate(f"dispatchEvent(new PageTransitionEvent('pagehide', {{ persisted: {held} }}))")
    expect(progress(page)).to_contain_text(end)


def test_another_page_waits_for_its_turn(page_url: str, open_page: Opener) -> None:
    first, second = (open_page(shared(page_url, **inputs), expected=SLOT_TAKEN) for inputs in (SLOW, FOX))
    press(first, "Draw")
    expect(progress(first)).to_contain_text(re.compile(r"Step [1-9]"))
    press(second, "Draw")
    expect(progress(second)).to_contain_text("yours is next")
    press(first, "Cancel")
    expect(progress(second)).to_contain_text("1 picture drawn in")


def test_a_reason_is_told_in_the_predictors_words_alone(page_url: str, open_page: Opener) -> None:
    page = open_page(shared(page_url, **FOX, replicate_weights="no such style"))
    press(page, "Draw")
    expect(progress(page)).to_have_text(re.compile(r"^\s*[^:]*no such style.*\.\s*$"))


def test_what_the_safety_check_kept_back_is_told(page_url: str, open_page: Opener) -> None:
    """The miniature's check takes a banana for what must not be shown, and not each banana cat for a banana."""
    cats = {"prompt": "a banana cat", "megapixels": "0.25", "num_inference_steps": 3, "num_outputs": 2, "seed": 3}
    page = open_page(shared(page_url, **cats))
    draw(page)
    expect(progress(page)).to_contain_text("The safety check kept 1 of 2 back.")
    expect(page.get_by_text("1 picture of 2 was kept back by the safety check.")).to_be_visible()
    expect(history(page)).to_have_count(1)
    page.get_by_role("textbox", name="Prompt").fill("a banana")
    press(page, "Draw")
    expect(progress(page)).to_have_text(re.compile("^\\s*NSFW content detected in every picture; try another prompt"))


def test_loras_are_chosen_by_a_click_by_text_and_by_a_file(page_url: str, open_page: Opener, tmp_path: Path) -> None:
    page = open_page(shared(page_url, **FOX))
    press(page, "Add zorp")
    page.get_by_label("Add a LoRA").fill("bold*0.5")
    press(page, "Add")
    drop(page, page.get_by_label("Add a LoRA"), shutil.copy(ROOT / "mini" / "loras" / "dusk.safetensors", tmp_path))
    page.get_by_role("slider", name="Strength of dusk.safetensors").fill("-0.25")
    strength = page.get_by_role("spinbutton", name="Strength of dusk.safetensors")
    expect(strength).to_have_value("-0.25")
    page.get_by_role("spinbutton", name="Strength of bold").fill("1.5")
    draw(page)
    asked = json.loads(request_of(page)["replicate_weights"])
    assert [(it["path"][:37], it["scale"]) for it in asked] == [
        ("zorp", 1),
        ("bold", 1.5),
        ("data:application/octet-stream;base64,", -0.25),
    ]
    told = answer_of(page)["metrics"]["loras"]
    assert [it["scale"] for it in told] == [1, 1.5, -0.25]
    assert told[0]["trigger_words"] == ["zorp"]


def test_a_trigger_word_that_was_learnt_goes_into_the_prompt(page_url: str, open_page: Opener) -> None:
    page = open_page(shared(page_url, **FOX))
    word = page.get_by_role("button", name="zorp in the prompt")
    press(page, "Add zorp")
    expect(word).to_have_count(0)
    draw(page)
    word.click()
    expect(page.get_by_role("textbox", name="Prompt")).to_have_value("a red fox, zorp")
    expect(word).to_have_attribute("aria-pressed", "true")
    word.click()
    expect(page.get_by_role("textbox", name="Prompt")).to_have_value("a red fox")
