"""Actions on the playground's page, and texts and pictures that it shows; needs Playwright."""

import base64
import json
import mimetypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from playwright.sync_api import Locator, Page, expect

from tests.support.browser import PATIENCE

# The miniature draws such a picture within half a second.
SMALL = {"aspect_ratio": "custom", "height": 256, "width": 256, "num_inference_steps": 2}
# With a seed whose picture passes the safety check.
FOX = {"prompt": "a red fox", **SMALL, "seed": 1}
# Takes long enough to be observed.
SLOW = {"prompt": "a blue fish", "num_inference_steps": 50, "seed": 1}
# Shares of an image's sides, from its upper left corner.
Point = tuple[float, float]
# While a dialog is open, only the dialog is checked.
RUN_AXE = "axe.run(document.querySelector('dialog[open]') ?? document, { resultTypes: ['violations'] })"
# A stroke across the upper left quarter.
STROKE = ((0.2, 0.2), (0.3, 0.4), (0.4, 0.2))

expect.set_options(timeout=1000 * PATIENCE)


def shared(address: str, **inputs: object) -> str:
    """The page's address with inputs in it, as the button Share makes it."""
    return f"{address}#{urlencode(inputs)}"


def press(page: Page | Locator, name: str) -> None:
    page.get_by_role("button", name=name, exact=True).click()


def show(page: Page, tab: str) -> None:
    page.get_by_role("tab", name=tab, exact=True).click()


def progress(page: Page) -> Locator:
    return page.get_by_role("region", name="Progress")


def draw(page: Page) -> None:
    """Press Draw, and wait until the picture is drawn."""
    press(page, "Draw")
    expect(progress(page)).to_contain_text("drawn in")


def history(page: Page) -> Locator:
    """The pictures in the strip."""
    return page.get_by_role("group", name="Pictures").get_by_role("button")


def saved(page: Page, role: str = "link", name: str = "Download") -> Path:
    """The file that a link or a button downloads."""
    with page.expect_download() as download:
        page.get_by_role(role, name=name, exact=True).click()
    file = download.value.path()
    return Path(file).rename(Path(file).with_name(download.value.suggested_filename))


def picture(page: Page) -> bytes:
    """The file of the picture that is shown large."""
    return saved(page).read_bytes()


def block(page: Page, title: str) -> str:
    """The text of a block that can be copied."""
    return page.get_by_role("region", name=title, exact=True).locator("pre").text_content()


def request_of(page: Page) -> dict[str, Any]:
    """The inputs of the request that the page shows."""
    show(page, "JSON")
    expect(page.get_by_role("region", name="Request").locator("pre")).not_to_be_empty()
    return json.loads(block(page, "Request"))["input"]


def answer_of(page: Page) -> dict[str, Any]:
    """The last answer that the page shows."""
    show(page, "JSON")
    return json.loads(block(page, "Last answer"))


def serious_faults(page: Page, axe: str) -> list[str]:
    """The page's serious faults of accessibility and their places, found by the script of axe-core."""
    page.evaluate(axe)
    return [
        f"{fault['id']} of {node['target']}: {node['failureSummary']}"
        for fault in page.evaluate(RUN_AXE)["violations"]
        if fault["impact"] in ("serious", "critical")
        for node in fault["nodes"]
    ]


def canvas(page: Page, points: Sequence[Point]) -> list[Point]:
    """The points on the screen of points of an image while a mask is painted on it."""
    box = page.get_by_role("application", name="Mask").bounding_box()
    return [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in points]


def paint(page: Page, points: Sequence[Point]) -> None:
    """Paint one stroke with the mouse, from point to point of the image."""
    first, *others = canvas(page, points)
    page.mouse.move(*first)
    page.mouse.down()
    for point in others:
        page.mouse.move(*point, steps=5)
    page.mouse.up()


def drop(page: Page, onto: Locator, file: Path | str) -> None:
    """Drop a file on an element, as from another program."""
    content = base64.b64encode(Path(file).read_bytes()).decode()
    carried = page.evaluate_handle(
        """([name, type, content]) => {
            const bytes = Uint8Array.from(atob(content), (character) => character.charCodeAt(0));
            const carried = new DataTransfer();
            carried.items.add(new File([bytes], name, { type }));
            return carried;
        }""",
        [Path(file).name, mimetypes.guess_type(file)[0] or "", content],
    )
    for event in ("dragover", "drop"):
        onto.dispatch_event(event, {"dataTransfer": carried})
