"""The playground's page at a front, in a real browser: its token, its progress, what it may keep."""

from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("ray", reason="the cluster needs cluster/requirements.txt")
pytest.importorskip("playwright", reason="Playwright is not installed; .ci/run installs it")

from playwright.sync_api import Browser, Page, Route, expect

from harness.cluster import Cluster
from tests.cluster.small_cluster import TOKEN
from tests.support.browser import chromium, opening
from tests.support.page import block, picture, press, progress, show
from tests.support.pictures import quadrants, written


@pytest.fixture(scope="module")
def browser(cluster: Cluster) -> Iterator[Browser]:
    """After the cluster, which needs an event loop of its own when it starts."""
    with chromium() as started:
        yield started


@pytest.fixture
def page(browser: Browser, cluster: Cluster) -> Iterator[Page]:
    """The page, which has not been given a token."""
    with opening(browser) as opened:
        yield opened(f"{cluster.url}/playground/", expected="status of 401|net::ERR_FAILED")


def use_token(page: Page, token: str) -> None:
    page.get_by_label("Token", exact=True).fill(token)
    press(page, "Use token")


def test_a_token_is_asked_for_and_kept_in_this_tab_alone(page: Page, browser: Browser, cluster: Cluster) -> None:
    expect(page.get_by_text("The server wants a token.")).to_be_visible()
    expect(page.get_by_role("textbox", name="Prompt")).to_have_count(0)
    use_token(page, "another's")
    expect(page.get_by_text("The server does not take this token.")).to_be_visible()
    use_token(page, TOKEN)
    expect(page.get_by_role("textbox", name="Prompt")).to_be_visible()
    page.reload()
    expect(page.get_by_role("textbox", name="Prompt")).to_be_visible()
    kept = page.context.storage_state(indexed_db=True)
    assert TOKEN not in str(kept)
    assert TOKEN not in page.content()
    second = page.context.new_page()
    second.goto(page.url)
    expect(second.get_by_text("The server wants a token.")).to_be_visible()
    press(page, "Forget token")
    expect(page.get_by_text("The server wants a token.")).to_be_visible()
    page.reload()
    expect(page.get_by_text("The server wants a token.")).to_be_visible()


def test_a_picture_is_drawn_step_by_step_and_one_that_is_cancelled_is_not(page: Page, tmp_path: Path) -> None:
    image = written(quadrants(), tmp_path / "image.webp", lossless=True)
    use_token(page, TOKEN)
    page.get_by_role("textbox", name="Prompt").fill("slow")
    page.get_by_label("Image: Choose a file").set_input_files(image)
    page.get_by_role("spinbutton", name="Steps").fill("6")
    press(page, "Draw")
    expect(progress(page)).to_contain_text("of 6")
    expect(progress(page)).to_contain_text("1 picture drawn in")
    assert picture(page) == image.read_bytes()
    page.get_by_role("spinbutton", name="Steps").fill("50")
    press(page, "Draw")
    expect(progress(page)).to_contain_text("of 50")
    press(page, "Cancel")
    expect(progress(page)).to_contain_text("Cancelled.")
    page.get_by_role("textbox", name="Prompt").fill("fail")
    press(page, "Draw")
    expect(progress(page).get_by_role("paragraph")).to_have_text("A mask needs an image.")


def test_an_answer_that_is_lost_is_asked_for_again(page: Page, tmp_path: Path) -> None:
    """The front has taken it, and draws it once."""
    image = written(quadrants(), tmp_path / "image.webp", lossless=True)
    asked: list[str] = []

    def lose_the_first(route: Route) -> None:
        asked.append(route.request.url)
        if len(asked) > 1:
            route.continue_()
        else:
            route.fetch()
            route.abort()

    page.route("**/predictions/*", lose_the_first)
    use_token(page, TOKEN)
    page.get_by_role("textbox", name="Prompt").fill("a")
    page.get_by_label("Image: Choose a file").set_input_files(image)
    press(page, "Draw")
    expect(progress(page)).to_contain_text("1 picture drawn in")
    assert picture(page) == image.read_bytes()
    assert len(asked) > 2
    assert len(set(asked)) == 1


def test_programs_say_where_the_front_is_and_no_token(page: Page, cluster: Cluster) -> None:
    use_token(page, TOKEN)
    page.get_by_role("textbox", name="Prompt").fill("a")
    show(page, "Code")
    expect(page.get_by_text("It reads your token from the variable FLUX_TOKEN.")).to_be_visible()
    program = block(page, "cURL")
    assert f"{cluster.url}/predictions" in program
    assert TOKEN not in program
