"""A grid of pictures, and programs that draw what the form says."""

import base64
import json
import os
import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("playwright", reason="Playwright is not installed; .ci/run installs it")

from PIL import Image
from playwright.sync_api import Locator, Page, expect

from harness.hosts import Host, in_json
from images import read_metadata
from settings import ROOT
from tests.support.browser import Opener
from tests.support.page import (
    FOX,
    STROKE,
    block,
    draw,
    drop,
    history,
    paint,
    picture,
    press,
    request_of,
    saved,
    shared,
    show,
)
from tests.support.pictures import quadrants, written
from tests.support.processes import finished

NASTY = "a 'red' \"fox\" $HOME `id` $(id) \\n ! % {x} #1 ’ü🦊 <b>\n  JSON\nat night; \\"
NEEDED = {"cURL": "curl", "JavaScript": "node"}
PROGRAMS = {
    "Python": [sys.executable, "draw.py"],
    "script/predict": ["bash", "-euo", "pipefail", "draw.sh"],
    "cURL": ["bash", "-euo", "pipefail", "draw.sh"],
    "JavaScript": ["node", "draw.mjs"],
}

# Inputs of another project.
STRANGE = {
    "prompt": {"type": "string", "x-order": 0},
    "words": {"type": "array", "items": {"type": "string"}, "x-order": 1},
    "options": {"type": "object", "x-order": 2},
    "strict": {"type": "boolean", "default": False, "x-order": 3},
    "api_key": {"type": "string", "format": "password", "x-cog-secret": True, "x-order": 4},
}
DOT = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg=="


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


def test_a_grid_says_of_each_cell_what_it_was_drawn_from(page_url: str, open_page: Opener) -> None:
    page = open_page(shared(page_url, **FOX, replicate_weights="bold"))
    show(page, "Grid")
    columns, rows = (page.get_by_label(f"Input of the {side}") for side in ("columns", "rows"))
    columns.select_option("LoRA")
    page.get_by_label("Values of the columns").fill("zorp*0.5\nzorp*2")
    expect(rows.get_by_role("option", name="Scale of bold")).to_have_count(0)
    page.get_by_label("Values of the rows").fill("1")
    press(page, "Draw grid")
    expect(page.get_by_text("2 of 2 drawn", exact=True)).to_be_visible()
    page.get_by_role("img", name="LoRA zorp*0.5, Seed 1").click()
    assert json.loads(read_metadata(saved(page))["replicate_weights"]) == [{"path": "zorp", "scale": 0.5}]
    show(page, "Grid")
    columns.select_option("Scale of bold")
    expect(rows.get_by_role("option", name="LoRA", exact=True)).to_have_count(0)


def test_a_grid_has_a_largest_size(page_url: str, open_page: Opener) -> None:
    page = open_page(shared(page_url, **FOX))
    grid(page, "0:9:0.1", "1-5")
    expect(page.get_by_text("A grid has at most 400 pictures; these would be 455.")).to_be_visible()
    expect(page.get_by_role("button", name="Draw grid")).to_be_disabled()


def test_values_that_cannot_be_are_said(page_url: str, open_page: Opener) -> None:
    page = open_page(shared(page_url, **FOX))
    grid(page, "2, 11", "1")
    values = page.get_by_label("Values of the columns")
    press(page, "Draw grid")
    expect(values).to_be_focused()
    sentence = "“11” cannot be: Guidance scale must be a number from 0 to 10."
    expect(values).to_have_accessible_description(sentence)


def test_where_a_value_is_wrong_that_is_said_in_place_of_a_request(page_url: str, open_page: Opener) -> None:
    page = open_page(shared(page_url, **FOX))
    guidance = page.get_by_role("spinbutton", name="Guidance scale")
    guidance.press_sequentially("1e")
    shown = page.get_by_role("tabpanel", name=re.compile("^(JSON|Code)$"))
    for tab, title in (("JSON", "Request"), ("Code", "cURL")):
        show(page, tab)
        expect(shown.get_by_text("Guidance scale must be a number from 0 to 10.", exact=True)).to_be_visible()
        expect(page.get_by_role("region", name=title, exact=True)).to_have_count(0)
    show(page, "JSON")  # a page that is rendered without end cannot be left
    guidance.fill("1")
    assert request_of(page) == {**FOX, "guidance_scale": 1}
    show(page, "Code")
    assert '"guidance_scale": 1' in block(page, "cURL")


def test_each_program_draws_what_the_form_says(
    page_url: str, open_page: Opener, environment: Mapping[str, str], tmp_path: Path
) -> None:
    """With an image, a mask that was painted and a LoRA's file, which the page gives to lie beside it."""
    reader = tmp_path / "reader"
    reader.mkdir()
    (reader / "script").symlink_to(ROOT / "script")
    page = open_page(shared(page_url, **FOX | {"seed": 7}, num_outputs=2, replicate_weights="zorp*0.5"))
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
        done = finished(command, cwd=reader, env=environment, timeout=300)
        assert done.returncode == 0, f"{language}: {done.stdout}{done.stderr}"
        files = sorted(reader.glob("output.*.webp"))
        assert [read_metadata(file)["seed"] for file in files] == [7, 8]
        assert read_metadata(files[0])["prompt"] == NASTY
        assert files[0].read_bytes() == drawn
        for file in files:
            file.unlink()


def test_programs_for_another_project_run_as_they_stand(page_url: str, open_page: Opener, tmp_path: Path) -> None:
    """With types that this one has none of, a secret that stays out of them, and one picture that is in no list."""
    page = open_page(page_url)
    drawn = in_json({"status": "succeeded", "output": f"data:image/png;base64,{DOT}"})
    with Host({"/predictions": drawn}) as host:
        about = {"server": "cog", "progress": None, "address": host.address, "tokens": False, "log": False}
        document = {"components": {"schemas": {"Input": {"properties": STRANGE}}}}
        page.route("**/about.json", lambda route: route.fulfill(json=about))
        page.route("**/openapi.json", lambda route: route.fulfill(json=document))
        page.reload()
        page.get_by_role("textbox", name="Prompt").fill("a fox")
        page.get_by_role("textbox", name="Words").fill('["it\'s $HOME", "ü"]')
        page.get_by_role("textbox", name="Options").fill('{"deep": [true, null, 0.5]}')
        page.get_by_role("checkbox", name="Strict").check()
        page.get_by_label("Api key", exact=True).fill("0penly")
        show(page, "Code")
        for language in ("Python", "cURL", "JavaScript"):
            command = PROGRAMS[language]
            if not shutil.which(NEEDED.get(language, command[0])):
                pytest.skip(f"{NEEDED[language]} is not installed; what stands before {language} was run")
            show(page, language)
            expect(page.get_by_text("It reads api_key from the variable API_KEY.")).to_be_visible()
            (tmp_path / command[-1]).write_text(block(page, language))
            variables = {**os.environ, "API_KEY": "s3cret"}
            done = finished(command, cwd=tmp_path, env=variables)
            assert done.returncode == 0, f"{language}: {done.stdout}{done.stderr}"
            file = tmp_path / "output.0.png"
            assert file.read_bytes() == base64.b64decode(DOT)
            file.unlink()
        show(page, "script/predict")
        expect(page.get_by_text("script/predict draws with the project that it is part of alone.")).to_be_visible()
    inputs = {
        "prompt": "a fox",
        "words": ["it's $HOME", "ü"],
        "options": {"deep": [True, None, 0.5]},
        "strict": True,
        "api_key": "s3cret",
    }
    assert [json.loads(asked.form) for asked in host.seen] == [{"input": inputs}] * 3
