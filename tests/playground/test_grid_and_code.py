"""A grid of pictures, and programs that draw what the form says."""

import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("playwright", reason="Playwright is not installed; .ci/run installs it")

from PIL import Image
from playwright.sync_api import Locator, Page, expect

from images import read_metadata
from settings import ROOT
from tests.support.browser import Opener
from tests.support.page import FOX, STROKE, block, draw, drop, history, paint, picture, press, saved, shared, show
from tests.support.pictures import quadrants, written

NASTY = "a 'red' \"fox\" $HOME `id` $(id) \\n ! % {x} #1 ’ü🦊 <b>\n  JSON\nat night; \\"
NEEDED = {"cURL": "curl", "JavaScript": "node"}
PROGRAMS = {
    "Python": [sys.executable, "draw.py"],
    "script/predict": ["bash", "-euo", "pipefail", "draw.sh"],
    "cURL": ["bash", "-euo", "pipefail", "draw.sh"],
    "JavaScript": ["node", "draw.mjs"],
}


def grid(page: Page, columns: str, rows: str) -> None:
    show(page, "Grid")
    page.get_by_label("Values of the columns").fill(columns)
    page.get_by_label("Values of the rows").fill(rows)


def cells(page: Page) -> Locator:
    return page.get_by_role("region", name="Cells").get_by_role("button")


def test_a_grid_fills_and_becomes_one_picture(page_url: str, open_page: Opener) -> None:
    page = open_page(shared(page_url, **FOX, output_format="png"))
    grid(page, "2, 4", "1-2")
    press(page, "Draw grid")
    expect(page.get_by_text("4 of 4 drawn", exact=True)).to_be_visible()
    expect(cells(page)).to_have_count(4)
    exported = np.asarray(Image.open(saved(page, "button", "Export PNG")).convert("RGB")).astype(int)
    drawn = []
    for guidance in (2, 4):
        for seed in (1, 2):
            show(page, "Grid")
            page.get_by_role("img", name=f"Guidance scale {guidance}, Seed {seed}").click()
            file = saved(page)
            made = read_metadata(file)
            assert (made["guidance_scale"], made["seed"]) == (guidance, seed)
            drawn.append(np.asarray(Image.open(file).convert("RGB")).astype(int))
    assert len({cell.tobytes() for cell in drawn}) == 4
    height, width, _ = exported.shape
    assert 2 * 256 < width < 3 * 256
    assert 2 * 256 < height < 3 * 256
    for cell in drawn:
        assert has(exported, cell)


def has(whole: np.ndarray, part: np.ndarray) -> bool:
    """Whether a picture lies somewhere in another one."""
    corners = np.argwhere((whole[: whole.shape[0] - 255, : whole.shape[1] - 255] == part[0, 0]).all(axis=-1))
    return any((whole[y : y + 256, x : x + 256] == part).all() for y, x in corners)


def test_a_large_grid_is_meant_before_it_is_drawn(page_url: str, open_page: Opener) -> None:
    page = open_page(shared(page_url, **FOX), expected=r"status of 409")
    grid(page, "1, 2", "1-19")
    press(page, "Draw grid")
    expect(page.get_by_text("These are 38 pictures.")).to_be_visible()
    press(page, "Do not draw")
    expect(page.get_by_role("region", name="Cells")).to_have_count(0)
    press(page, "Draw grid")
    press(page, "Draw 38 pictures")
    expect(cells(page).nth(1)).to_be_visible()
    press(page, "Cancel grid")
    expect(page.get_by_text("Cancelled").last).to_be_visible()
    expect(page.get_by_role("status").first).to_have_text("Ready")
    expect(page.get_by_text(re.compile(r"^\d+ of 38 drawn$"))).not_to_have_text("38 of 38 drawn")


def test_values_that_cannot_be_are_said(page_url: str, open_page: Opener) -> None:
    page = open_page(shared(page_url, **FOX))
    grid(page, "2, 11", "1")
    values = page.get_by_label("Values of the columns")
    press(page, "Draw grid")
    expect(values).to_be_focused()
    sentence = "“11” cannot be: Guidance scale must be a number from 0 to 10."
    expect(values).to_have_accessible_description(sentence)


def test_each_program_draws_what_the_form_says(
    page_url: str, open_page: Opener, environment: Mapping[str, str], tmp_path: Path
) -> None:
    """With an image, a mask that was painted and a LoRA's file, which the page gives to lie beside it."""
    reader = tmp_path / "reader"
    reader.mkdir()
    (reader / "script").symlink_to(ROOT / "script")
    page = open_page(shared(page_url, **FOX, seed=7, num_outputs=2, lora="zorp*0.5"))
    page.get_by_role("textbox", name="Prompt").fill(NASTY)
    image = written(quadrants(256, 256), tmp_path / "it's $HOME.png")
    page.get_by_label("Image: Choose a file").set_input_files(image)
    press(page, "Paint")
    paint(page, STROKE)
    press(page, "Use mask")
    drop(page, page.get_by_label("Add a LoRA"), shutil.copy(ROOT / "mini" / "loras" / "dusk.safetensors", tmp_path))
    draw(page)
    history(page).nth(0).click()
    drawn = picture(page)
    show(page, "Code")
    for name in (image.name, "mask.png", "dusk.safetensors"):
        shutil.copy(saved(page, "button", f"Download {name}"), reader)
    for language, command in PROGRAMS.items():
        if not shutil.which(NEEDED.get(language, command[0])):
            pytest.skip(f"{NEEDED[language]} is not installed; what stands before {language} was run")
        show(page, language)
        (reader / command[-1]).write_text(block(page, language))
        done = subprocess.run(command, cwd=reader, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"{language}: {done.stdout}{done.stderr}"
        files = sorted(reader.glob("output.*.webp"))
        assert [read_metadata(file)["seed"] for file in files] == [7, 8]
        assert read_metadata(files[0])["prompt"] == NASTY
        assert files[0].read_bytes() == drawn
        for file in files:
            file.unlink()
