"""The form: each of its controls says what it seems to say, and no more is sent than was set."""

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("playwright", reason="Playwright is not installed; .ci/run installs it")

from PIL import Image
from playwright.sync_api import Page, expect

from images import read_metadata
from local_cog import schema
from local_cog.server import LOOPBACK, CogServer, url
from playground.server import Playground
from settings import ROOT
from tests.support.browser import Opener
from tests.support.page import FOX, block, draw, press, progress, request_of, saved, shared, show
from tests.support.pictures import quadrants, written
from tests.support.playground import address_of, served

INPUTS = schema.derive((ROOT / "predict.py").read_text(encoding="utf-8"))["components"]["schemas"]["Input"]
ZORP = json.dumps([{"path": "zorp", "scale": 0.5}], separators=(",", ":"))
BY_TEXT = {
    "prompt": 'a "red" zorp\nat night',
    "aspect_ratio": "custom",
    "height": 256,
    "width": 320,
    "model": "schnell",
    "num_outputs": 2,
    "num_inference_steps": 3,
    "guidance_scale": 2.5,
    "seed": 7,
    "output_format": "png",
    "output_quality": 60,
    "disable_safety_checker": True,
    "go_fast": True,
    "replicate_weights": ZORP,
    "lora_scale": 0.75,
    "extra_lora": "bold",
    "extra_lora_scale": -0.5,
}
BY_ASPECT = {"prompt": "a fox", "aspect_ratio": "2:3", "megapixels": "0.25", "num_inference_steps": 1, "seed": 1}
BY_IMAGE = {
    "prompt": "a fox",
    "image": "image.png",
    "mask": "mask.png",
    "prompt_strength": 0.9,
    "num_inference_steps": 2,
    "seed": 1,
}
FILES = ("image", "mask")
LORAS = ("replicate_weights", "lora_scale", "extra_lora", "extra_lora_scale")
# What this machine does otherwise, or no picture says of itself by these names.
UNSAID = (*FILES, *LORAS, "go_fast", "num_outputs", "output_format", "output_quality", "disable_safety_checker")
# Inputs that nobody has foreseen, of every type; what it draws are the inputs that it got.
PREDICTOR = """
from cog import BasePredictor, Input, Path
from PIL import Image, PngImagePlugin


class Predictor(BasePredictor):
    def predict(
        self,
        prompt: str = Input(description="what to draw"),
        brush: str = Input(default="soft", choices=["soft", "hard"], description="the `brush`"),
        layers: int = Input(default=1, ge=1, le=9),
        ratio: float = Input(default=0.5),
        tiled: bool = Input(default=False),
    ) -> Path:
        if prompt == "nothing":
            raise ValueError("There is nothing to draw.")
        text = PngImagePlugin.PngInfo()
        text.add_text("Inputs", f"{prompt} {brush} {layers} {ratio} {tiled}")
        Image.new("RGB", (32, 32)).save("out.png", pnginfo=text)
        return Path("out.png")
"""
# Inputs of types that this project has none of, beside those of the other one.
STRANGE = {
    "key": {"type": "string", "format": "password", "x-cog-secret": True, "x-order": 5},
    "words": {"type": "array", "items": {"type": "string"}, "default": ["one"], "x-order": 6},
    "constructor": {"type": "string", "default": "new", "x-order": 7},
    "input_images": {"type": "array", "items": {"type": "string", "format": "uri"}, "x-order": 8},
}


@pytest.fixture(scope="module")
def other_cog(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CogServer]:
    """Another project, without LoRAs, behind a Cog server."""
    folder = tmp_path_factory.mktemp("other")
    (folder / "predict.py").write_text(PREDICTOR)
    with CogServer(folder, log=folder / "log") as running:
        running.wait_until_ready()
        yield running


@pytest.fixture
def other(other_cog: CogServer) -> Iterator[Playground]:
    """The page before the other project."""
    with served(url(LOOPBACK, other_cog.port)) as server:
        yield server


@pytest.fixture
def strange(other_cog: CogServer, other: Playground, open_page: Opener) -> Page:
    """The page before the other project, whose document has strange inputs, too."""
    page = open_page(address_of(other), expected=r"^Failed to load resource: |422")
    document = other_cog.schema()
    document["components"]["schemas"]["Input"]["properties"] |= STRANGE
    page.route("**/openapi.json", lambda route: route.fulfill(json=document))
    page.reload()
    page.get_by_role("textbox", name="Prompt").fill("a line")
    return page


def label(name: str) -> str:
    """How the form calls an input."""
    words = name.replace("_", " ").removeprefix("num ").replace("lora", "LoRA")
    return words[0].upper() + words[1:]


def choose(page: Page, group: str, value: str) -> None:
    page.get_by_role("radiogroup", name=group).get_by_role("radio", name=value, exact=True).check()


def set_input(page: Page, name: str, value: Any, folder: Path) -> None:  # noqa: ANN401 (of any type)
    """Give an input a value by its control."""
    known = INPUTS["properties"][name]
    if name == "replicate_weights":
        (lora,) = json.loads(value)
        page.get_by_label("Add a LoRA").fill(f"{lora['path']}*{lora['scale']}")
        page.get_by_label("Add a LoRA").press("Enter")
    elif known.get("format") == "uri":
        page.get_by_label(f"{label(name)}: {'Upload' if name == 'mask' else 'Choose a file'}").set_input_files(
            folder / value
        )
    elif known.get("type") == "boolean":
        page.get_by_role("checkbox", name=label(name), exact=True).check()
    elif "allOf" in known:  # choices
        choose(page, label(name), value)
    elif known["type"] in ("integer", "number"):
        page.get_by_role("spinbutton", name=label(name), exact=True).fill(str(value))
    else:
        page.get_by_role("textbox", name=label(name), exact=True).fill(value)


def without(inputs: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in inputs.items() if name not in names}


def whole(inputs: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Inputs as they are sent, with their files."""
    files = {name: (folder / text).read_bytes() for name, text in inputs.items() if name in FILES}
    uris = {name: f"data:image/png;base64,{base64.b64encode(content).decode()}" for name, content in files.items()}
    return inputs | uris


def test_no_input_is_forgotten_here() -> None:
    assert {*BY_TEXT, *BY_ASPECT, *BY_IMAGE} == INPUTS["properties"].keys()


@pytest.mark.parametrize("inputs", [BY_TEXT, BY_ASPECT, BY_IMAGE], ids=["by text", "by aspect", "by image"])
def test_what_is_set_is_what_is_sent_and_drawn_and_nothing_else(
    inputs: dict[str, Any], page_url: str, open_page: Opener, tmp_path: Path
) -> None:
    written(quadrants(256, 256), tmp_path / "image.png")
    written(Image.linear_gradient("L"), tmp_path / "mask.png")
    page = open_page(page_url)
    if "extra_lora" in inputs:
        page.get_by_text("A second LoRA input").click()
    for name, value in inputs.items():
        set_input(page, name, value, tmp_path)
    with page.expect_request(lambda request: request.method == "PUT") as sent:
        draw(page)
    assert sent.value.post_data_json == {"input": whole(inputs, tmp_path)}
    made = read_metadata(saved(page))
    assert {name: made[name] for name in inputs if name not in UNSAID} == without(inputs, *UNSAID)
    loras = {entry["path"]: entry["scale"] for entry in json.loads(made["replicate_weights"])}
    assert loras == ({"zorp": 0.375, "bold": -0.5} if "extra_lora" in inputs else {})
    shown = request_of(page)
    assert without(shown, *FILES) == without(inputs, *FILES)
    assert shown.keys() == inputs.keys()


def test_what_is_at_its_default_again_is_not_sent(page_url: str, open_page: Opener) -> None:
    page = open_page(shared(page_url, prompt="a fox", model="schnell", guidance_scale=2, output_quality=80))
    press(page, "Reset Guidance scale")
    choose(page, "Model", "dev")
    assert request_of(page) == {"prompt": "a fox"}


def test_sizes_are_asked_for_where_they_count_and_a_mask_where_there_is_an_image(
    page_url: str, open_page: Opener, tmp_path: Path
) -> None:
    page = open_page(shared(page_url, **FOX))
    shapes, width = page.get_by_role("radiogroup", name="Aspect ratio"), page.get_by_role("spinbutton", name="Width")
    mask = page.get_by_role("group", name="Mask", exact=True)
    expect(width).to_be_visible()
    expect(mask).to_have_count(0)
    choose(page, "Aspect ratio", "16:9")
    expect(width).to_have_count(0)
    set_input(page, "image", written(quadrants(), tmp_path / "image.png"), tmp_path)
    expect(mask).to_be_visible()
    expect(shapes).to_have_count(0)
    press(page, "Remove Image")
    expect(mask).to_have_count(0)
    expect(shapes).to_be_visible()


def test_what_is_typed_stays_and_counts_even_where_it_is_no_number(page_url: str, open_page: Opener) -> None:
    page = open_page(shared(page_url, **FOX))
    guidance, seed = (page.get_by_role("spinbutton", name=name) for name in ("Guidance scale", "Seed"))
    guidance.press_sequentially("2.")
    expect(guidance).to_have_value("2.")
    guidance.press_sequentially("50")
    guidance.press("ArrowUp")
    expect(guidance).to_have_value("2.6")
    press(page, "Reset Guidance scale")
    expect(guidance).to_be_focused()
    expect(guidance).to_have_value("")
    seed.fill("seven")
    press(page, "Draw")
    expect(seed).to_be_focused()
    expect(seed).to_have_value("seven")
    expect(seed).to_have_accessible_description("Seed must be a whole number.")
    press(page, "Share")
    expect(page.get_by_text("not in it: seed.").first).to_be_visible()
    press(page, "Reset all")
    expect(seed).to_have_value("")
    expect(seed).to_have_accessible_description("")


def test_inputs_of_types_that_only_others_have_are_sent_or_refused(strange: Page) -> None:
    words = strange.get_by_role("textbox", name="Words")
    expect(words).to_have_value('["one"]')
    words.fill('["one", ')
    press(strange, "Draw")
    expect(words).to_be_focused()
    expect(words).to_have_accessible_description('Words must be a list in JSON, such as ["one", "two"].')
    press(strange, "Reset all")
    expect(words).to_have_value('["one"]')
    strange.get_by_role("textbox", name="Prompt").fill("a line")
    words.fill('[ "two" ]')
    strange.get_by_role("textbox", name="Constructor").fill("old")
    strange.get_by_role("textbox", name="Input images").fill('["https://example.com/a.png"]')
    expect(words).to_have_value('[ "two" ]')
    assert request_of(strange) == {
        "prompt": "a line",
        "words": ["two"],
        "constructor": "old",
        "input_images": ["https://example.com/a.png"],
    }


def test_a_secret_is_sent_and_neither_shown_nor_shared(strange: Page) -> None:
    key = strange.get_by_label("Key", exact=True)
    expect(key).to_have_attribute("type", "password")
    key.fill("s3cret-of-mine")
    with strange.expect_request(lambda request: request.method == "PUT") as sent:
        press(strange, "Draw")
    assert sent.value.post_data_json == {"input": {"prompt": "a line", "key": "s3cret-of-mine"}}
    press(strange, "Share")
    expect(strange.get_by_text("not in it: key.").first).to_be_visible()
    assert "s3cret" not in strange.url
    for tab in ("JSON", "Code"):
        show(strange, tab)
        assert "s3cret" not in strange.locator("main").inner_text()
    assert '"key": "$KEY"' in block(strange, "cURL")


def test_inputs_of_another_project_are_in_the_form_and_are_sent(other: Playground, open_page: Opener) -> None:
    page = open_page(address_of(other))
    page.get_by_role("textbox", name="Prompt").fill("a line")
    expect(page.get_by_label("Add a LoRA")).to_have_count(0)
    choose(page, "Brush", "hard")
    page.get_by_role("spinbutton", name="Layers").fill("3")
    page.get_by_role("spinbutton", name="Ratio").fill("0.25")
    page.get_by_role("checkbox", name="Tiled").check()
    draw(page)
    with Image.open(saved(page)) as drawn:
        assert drawn.text["Inputs"] == "a line hard 3 0.25 True"


def test_what_the_predictor_refuses_is_one_sentence(other: Playground, open_page: Opener) -> None:
    page = open_page(shared(address_of(other), prompt="nothing"))
    press(page, "Draw")
    expect(progress(page).get_by_text("There is nothing to draw.", exact=True)).to_be_visible()
