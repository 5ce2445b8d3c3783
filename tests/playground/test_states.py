"""Every state of a server, really brought about, as a person sees it on the page.

Each is looked at in both widths and both colour schemes; pictures of it go to the folder PLAYGROUND_SCREENSHOTS.
"""

import contextlib
import email.utils
import http.client
import json
import os
import queue
import re
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

pytest.importorskip("playwright", reason="Playwright is not installed; .ci/run installs it")

from playwright.sync_api import Locator, Page, expect

from harness.soak import worker_of
from harness.waiting import wait_until
from local_cog.server import LOOPBACK, CogServer, free_port, url
from playground.server import Playground
from playground.target import Target
from settings import ROOT
from tests.support.browser import Opener
from tests.support.faulty import PLANTED
from tests.support.page import FOX, draw, history, press, progress, serious_faults, shared
from tests.support.playground import address_of, own_address, playground, served

# A predictor that does what its prompt says: fails, stands still, or waits in the middle until a file is there.
PREDICTOR = """
import os
import signal
import time

from cog import BasePredictor, Input, Path
from PIL import Image
from tqdm import tqdm


def wait_for(file):
    while not os.path.exists(file):
        print("Waiting for", os.path.basename(file))  # Cog tells of steps when something more is printed
        time.sleep(0.1)


class Predictor(BasePredictor):
    def setup(self) -> None:
        print("Mixing the paint")
        wait_for(os.environ.get("PAINT", "."))  # a folder that is there
        print("Stretching the canvas")

    def predict(
        self,
        prompt: str = Input(description="What to do."),
        steps: int = Input(default=20, ge=1, le=50, description="How often the brush is set down."),
    ) -> Path:
        if prompt == "fail":
            raise ValueError("The paint is dry; thin it with water.")
        for step in tqdm(range(steps), mininterval=0):
            time.sleep(0.01)  # here it is stopped and cancelled, where it holds no lock
            if step == 7 and prompt.startswith("wait for "):
                wait_for(prompt.removeprefix("wait for "))
            if step == 7 and prompt == "stand still":
                for _ in range(10):
                    print("Standing still soon")
                    time.sleep(0.1)
                os.kill(os.getpid(), signal.SIGSTOP)
                time.sleep(1)
        Image.linear_gradient("L").save("out.webp")
        return Path("out.webp")
"""
# The browser's console tells of each answer that is none; the page itself says nothing there.
REFUSED = r"^Failed to load resource: "
WIDE, NARROW, NARROWEST = ({"width": w, "height": h} for w, h in ((1440, 900), (390, 844), (360, 740)))
TOKEN = "t0ken-of-the-tests"
LOADING = re.compile(r"^Its models have been loading for \d+ s; the page goes on by itself\.$")
GOES_ON = "The page goes on as soon as it can again."
SECONDS = 60  # for what a server is to come to, on a busy machine

Look = Callable[[Page, str], None]


# ---------------------------------------------------------------------------------------------------------------------
# Servers


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("painter")
    (folder / "predict.py").write_text(PREDICTOR)
    return folder


@pytest.fixture
def page_server(cog: CogServer) -> Iterator[Playground]:
    with before(cog) as server:
        yield server


@pytest.fixture
def own_cog(project: Path, tmp_path: Path) -> Iterator[CogServer]:
    """A Cog server that a test may end."""
    with CogServer(project, log=tmp_path / "log") as running:
        running.wait_until_ready()
        yield running


@pytest.fixture(scope="module")
def failing(environment: Mapping[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The page beside the project's own predictor, which is starting and has no weights."""
    folder = tmp_path_factory.mktemp("failing")
    variables = {**environment, "FLUX_DEV": str(folder / "no-model")}
    with playground(log=folder / "log", environment=variables) as address:
        yield address


@pytest.fixture(scope="module")
def faulty(environment: Mapping[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[CogServer]:
    """The project's own predictor with planted faults, which is starting."""
    folder = tmp_path_factory.mktemp("faulty")
    (folder / "predict.py").write_text((ROOT / "predict.py").read_text() + PLANTED)
    with CogServer(folder, environment={**environment, "PYTHONPATH": str(ROOT)}, log=folder / "log") as running:
        yield running


@contextlib.contextmanager
def before(cog: CogServer) -> Iterator[Playground]:
    """The page's server before a Cog server."""
    with served(url(cog.host, cog.port)) as server:
        yield server


class Gateway(ThreadingHTTPServer):
    """What an operator may put before a Cog server: it asks for a token, limits who asks often, and has a queue.

    Args:
        cog: to which it passes on what it lets through.
        token: of requests; None asks for none.
        allowance: how many predictions may be asked for, until it is more; None sets no limit.
        room: how many predictions it takes at once.
    """

    daemon_threads = True

    def __init__(
        self, cog: CogServer, *, token: str | None = None, allowance: int | None = None, room: int = 9
    ) -> None:
        super().__init__((LOOPBACK, 0), _Passing)
        self.cog, self.token, self.allowance = cog, token, allowance
        self.room = threading.Semaphore(room)
        self.keep, self.kept = False, threading.Event()  # whether the next prediction is kept, and one is
        self.answers: queue.SimpleQueue[tuple[int, object]] = queue.SimpleQueue()  # of those that are kept

    @contextlib.contextmanager
    def serving(self) -> Iterator[str]:
        """Meanwhile it answers at this address."""
        with self:
            thread = threading.Thread(target=self.serve_forever, args=[0.02])
            thread.start()
            try:
                yield url(LOOPBACK, self.server_port)
            finally:
                self.shutdown()
                thread.join()


class _Passing(BaseHTTPRequestHandler):
    server: Gateway

    def do_GET(self) -> None:
        gateway, content = self.server, self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if gateway.token and self.headers["Authorization"] != f"Bearer {gateway.token}":
            self.refuse(401, "You did not pass a valid authentication token")
        elif self.command != "PUT":
            self.pass_on(content)
        elif gateway.keep:
            gateway.keep = False
            gateway.kept.set()
            status, said = gateway.answers.get(timeout=SECONDS)
            self.answer(status, json.dumps(said).encode(), {"Content-Type": "application/json"})
        elif gateway.allowance == 0:
            # A date has whole seconds: this is in two to three.
            self.refuse(429, "Too many requests", email.utils.formatdate(time.time() + 3, usegmt=True))
        elif not gateway.room.acquire(blocking=False):
            self.refuse(503, "The queue is full. Try again later.", "3")
        else:
            try:
                gateway.allowance = gateway.allowance and gateway.allowance - 1
                self.pass_on(content)
            finally:
                gateway.room.release()

    do_PUT = do_POST = do_GET  # noqa: N815 (as the standard library calls them)

    def pass_on(self, content: bytes) -> None:
        connection = http.client.HTTPConnection(LOOPBACK, self.server.cog.port)
        with contextlib.closing(connection):
            connection.request(self.command, self.path, content, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            self.answer(answer.status, answer.read(), {"Content-Type": answer.headers["Content-Type"]})

    def refuse(self, status: int, sentence: str, again: str | None = None) -> None:
        self.answer(status, sentence.encode(), {"Content-Type": "text/plain", "Retry-After": again})

    def answer(self, status: int, content: bytes, headers: Mapping[str, str | None]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            if value:
                self.send_header(name, value)
        self.end_headers()
        with contextlib.suppress(OSError):  # the client has gone
            self.wfile.write(content)

    def log_message(self, *_: object) -> None: ...


# ---------------------------------------------------------------------------------------------------------------------
# The visible page


@pytest.fixture
def look(axe: str | None) -> Look:
    """Look at a page as it is: nothing keeps people from using it, and nothing is wider than the narrowest screen.

    The former as far as axe-core is there.
    """

    def looked(page: Page, name: str) -> None:
        for width, size in (("wide", WIDE), ("narrow", NARROW)):
            page.set_viewport_size(size)
            for scheme in ("light", "dark"):
                page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
                take(page, f"{name}-{width}-{scheme}", whole=size is NARROW)
                if axe and size is WIDE:
                    assert serious_faults(page, axe) == [], (name, scheme)
        page.set_viewport_size(NARROWEST)
        assert page.evaluate("document.documentElement.scrollWidth") <= NARROWEST["width"], name
        page.set_viewport_size(WIDE)

    return looked


def take(page: Page, name: str, *, whole: bool) -> None:
    if folder := os.environ.get("PLAYGROUND_SCREENSHOTS"):
        page.screenshot(path=Path(folder) / f"{name}.png", full_page=whole)


def pill(page: Page) -> Locator:
    """The server's state in a word."""
    return page.locator("header").get_by_role("status")


def panel(page: Page, title: str) -> Locator:
    """The page's text without a server to draw with."""
    return page.get_by_role("region", name=title, exact=True)


def sees(page: Page, word: str, title: str, *sentences: str | re.Pattern[str]) -> None:
    """The word, and what is said below a title: all of its sentences, in this order."""
    told = panel(page, title).get_by_role("paragraph")
    expect(told).to_have_text(list(sentences), timeout=1000 * SECONDS)
    expect(pill(page)).to_have_text(word, timeout=1000 * SECONDS)


def sees_ready(page: Page) -> None:
    expect(pill(page)).to_have_text("Ready", timeout=1000 * SECONDS)
    expect(page.locator("section.panel > h2")).to_have_count(0)


def says(page: Page, sentence: str | re.Pattern[str]) -> None:
    """What is said of the drawings, whole."""
    expect(progress(page).get_by_role("paragraph")).to_have_text(sentence, timeout=1000 * SECONDS)


@contextlib.contextmanager
def theirs(cog: CogServer, folder: Path) -> Iterator[None]:
    """Meanwhile somebody else's prediction has the slot."""
    done = folder / "theirs"
    cog.start({"prompt": f"wait for {done}"}, "theirs")
    wait_until(lambda: cog.health()["status"] == "BUSY")
    try:
        yield
    finally:
        done.touch()
        wait_until(lambda: cog.health()["status"] == "READY" or bool(cog.process.poll()))
        done.unlink()


# ---------------------------------------------------------------------------------------------------------------------
# A server that starts


def test_who_is_not_answered_connects_and_goes_on_by_itself(
    project: Path, tmp_path: Path, open_page: Opener, look: Look
) -> None:
    port = free_port()
    with served(url(LOOPBACK, port)) as server:
        with socket.create_server((LOOPBACK, port)):  # the kernel accepts, and nobody answers
            page = open_page(address_of(server), expected=REFUSED)
            expect(pill(page)).to_have_text("Connecting")
            expect(panel(page, "Connecting to the server").get_by_role("progressbar")).to_be_visible()
            look(page, "connecting")
        with CogServer(project, log=tmp_path / "log", port=port, environment={"PAINT": str(tmp_path / "paint")}):
            sees(page, "Starting", "The server is starting", LOADING)
            (tmp_path / "paint").touch()
            sees_ready(page)
            expect(page.get_by_role("textbox", name="Prompt")).to_be_visible()


def test_the_log_of_a_setup_is_shown_while_it_runs_and_its_end_is_told(
    project: Path, tmp_path: Path, open_page: Opener, look: Look
) -> None:
    paint, house = tmp_path / "paint", tmp_path / "house"
    house.mkdir()
    for name in ("local_cog", "playground", "service", "sources", "settings.py"):
        (house / name).symlink_to(ROOT / name)
    shutil.copy(project / "predict.py", house)
    environment = {**os.environ, "PYTHONSAFEPATH": "1", "PYTHONPATH": str(house), "PAINT": str(paint)}
    with playground(log=tmp_path / "log", environment=environment) as address:
        page = open_page(address, expected=REFUSED)
        log = page.get_by_role("region", name="Log of the setup")
        expect(log).to_contain_text("Mixing the paint", timeout=1000 * SECONDS)
        expect(log).not_to_contain_text("Stretching the canvas")
        expect(log).not_to_contain_text("coglet")
        sees(page, "Starting", "The server is starting", LOADING)
        look(page, "starting")
        paint.touch()
        sees_ready(page)
        look(page, "ready")
        (server,) = [it for it in Path("/proc").glob("[0-9]*/cwd") if _is_server_in(house, it)]
        os.kill(int(server.parent.name), signal.SIGKILL)
        sentence = "The predictor's server ended with code -9; start script/playground anew."
        sees(page, "No answer", "The server does not answer", sentence)
        look(page, "own-server-ended")


def _is_server_in(folder: Path, process: Path) -> bool:
    with contextlib.suppress(OSError):  # it has just ended
        words = (process.parent / "cmdline").read_bytes()
        return process.readlink() == folder and b"cog.server.http" in words
    return False


# ---------------------------------------------------------------------------------------------------------------------
# A server that draws, and does not


def test_who_comes_second_waits_and_is_drawn(
    cog: CogServer, page_server: Playground, tmp_path: Path, open_page: Opener, look: Look
) -> None:
    page = open_page(shared(address_of(page_server), prompt="a red fox"), expected=REFUSED)
    sees_ready(page)
    with theirs(cog, tmp_path):
        expect(pill(page)).to_have_text("Busy")
        look(page, "busy")
        press(page, "Draw")
        says(page, re.compile(r"^\s*Busy with another prediction; yours is next\.\s*$"))
        press(page, "Draw")
        says(page, re.compile(r"^\s*Busy with another prediction; 2 of yours wait\.\s*$"))
        look(page, "busy-with-a-queue")
    says(page, re.compile(r"^1 picture drawn in [\d.]+ seconds\.$"))
    expect(history(page)).to_have_count(2)
    sees_ready(page)
    look(page, "drawn")


def test_a_drawing_says_how_far_it_is_and_how_it_ended(
    page_server: Playground, tmp_path: Path, open_page: Opener, look: Look
) -> None:
    page = open_page(shared(address_of(page_server), prompt=f"wait for {tmp_path / 'end'}"))
    press(page, "Draw")
    expect(progress(page)).to_contain_text(re.compile(r"Step 7 of 20\s+\d+ s"))
    expect(progress(page).get_by_role("progressbar")).to_have_attribute("value", "7")
    expect(pill(page)).to_have_text("Drawing")
    look(page, "drawing")
    press(page, "Cancel")
    says(page, "Cancelled.")
    look(page, "cancelled")
    page.get_by_role("textbox", name="Prompt").fill("fail")
    press(page, "Draw")
    says(page, "The paint is dry; thin it with water.")
    look(page, "failed")


def test_what_the_server_refuses_stands_beside_its_field(
    page_server: Playground, project: Path, tmp_path: Path, open_page: Opener, look: Look
) -> None:
    """Another server has come in the place of the one that the page learnt its bounds from."""
    page = open_page(shared(address_of(page_server), prompt="a red fox", steps=40), expected=REFUSED)
    sees_ready(page)
    stricter = tmp_path / "stricter"
    stricter.mkdir()
    (stricter / "predict.py").write_text((project / "predict.py").read_text().replace("le=50", "le=30"))
    with CogServer(stricter, log=tmp_path / "log") as running:
        running.wait_until_ready()
        page_server.target = Target(url(LOOPBACK, running.port))
        press(page, "Draw")
        steps = page.get_by_role("spinbutton", name="Steps")
        expect(steps).to_be_focused()
        expect(steps).to_have_accessible_description(re.compile(r"30"))
        says(page, re.compile(r"^Steps: .*\b30\b.*\.$"))
        look(page, "invalid")
        steps.fill("30")
        expect(steps).to_have_accessible_description("")
        draw(page)


def draw_and_keep(page: Page, gateway: Gateway) -> None:
    """Press Draw; the gateway keeps the prediction until it has an answer for it."""
    gateway.keep = True
    press(page, "Draw")
    assert gateway.kept.wait(SECONDS)


def test_what_was_refused_late_leaves_what_was_changed_since(cog: CogServer, open_page: Opener) -> None:
    gateway = Gateway(cog)
    with behind(gateway) as address:
        page = open_page(shared(address, prompt="a red fox", steps=40), expected=REFUSED)
        prompt, steps = page.get_by_role("textbox", name="Prompt"), page.get_by_role("spinbutton", name="Steps")
        draw_and_keep(page, gateway)
        steps.fill("20")
        prompt.focus()
        problems = [{"loc": ["body", "input", name], "msg": "No"} for name in ("prompt", "steps")]
        gateway.answers.put((422, {"detail": problems}))
        says(page, "Prompt: No. Steps: No.")
        expect(prompt).to_have_attribute("aria-invalid", "true")
        expect(prompt).to_be_focused()
        expect(steps).to_have_attribute("aria-invalid", "false")


def test_an_address_in_place_of_a_picture_is_told(cog: CogServer, open_page: Opener) -> None:
    gateway = Gateway(cog)
    gateway.answers.put((200, {"status": "succeeded", "output": ["https://pictures.example/1.webp"], "metrics": {}}))
    with behind(gateway) as address:
        page = open_page(shared(address, prompt="a red fox"))
        draw_and_keep(page, gateway)
        says(page, "The server answered with an address instead of a picture, which this page does not fetch.")


# ---------------------------------------------------------------------------------------------------------------------
# A server that cannot go on, or is not there


def test_a_predictor_that_hangs_is_told_its_prediction_is_cancelled_and_it_may_go_on(
    own_cog: CogServer, failing: str, faulty: CogServer, open_page: Opener, look: Look
) -> None:
    """Cog asks it for ten seconds; meanwhile the servers of the next two tests start."""
    with before(own_cog) as server:
        page = open_page(shared(address_of(server), prompt="stand still"), expected=REFUSED)
        press(page, "Draw")
        expect(progress(page)).to_contain_text("Step 7 of 20")
        sees(page, "Unhealthy", "The server cannot draw now", "The predictor does not answer the server.", GOES_ON)
        look(page, "hanging")
        press(page, "Cancel")
        says(page, "Cancelled.")
        os.kill(worker_of(own_cog), signal.SIGCONT)
        sees_ready(page)
        page.get_by_role("textbox", name="Prompt").fill("a red fox")
        draw(page)


def test_a_setup_that_failed_says_why(failing: str, open_page: Opener, look: Look) -> None:
    page = open_page(failing, expected=REFUSED)
    sentence = "'…/no-model' is no folder; it must be one, or a Hugging Face repo as owner/repo."
    sees(page, "Setup failed", "The server could not be set up", sentence)
    log = page.get_by_role("region", name="Log of the setup").locator("pre")
    # Cog loses what was printed just before, now and then.
    expect(log).to_have_text(re.compile(rf"^(Settings: FLUX_DEV=…/no-model, .*\n)?{re.escape(sentence)}$"))
    look(page, "setup-failed")


def test_a_wrong_weight_is_told_and_the_next_drawing_writes_it_anew(
    faulty: CogServer, open_page: Opener, look: Look
) -> None:
    faulty.wait_until_ready()
    with before(faulty) as server:
        page = open_page(shared(address_of(server), **FOX | {"prompt": "corrupt"}), expected=REFUSED)
        draw(page)
        told = re.compile(r"^\S+ is not what was written into it; the next request writes it anew\.$")
        sees(page, "Unhealthy", "The server cannot draw now", told, GOES_ON)
        look(page, "wrong-weight")
        page.get_by_role("textbox", name="Prompt").fill("a red fox")
        press(page, "Draw")
        sees_ready(page)
        expect(history(page)).to_have_count(2)


def test_a_predictor_that_has_ended_is_told_and_what_is_drawn_next_waits(
    own_cog: CogServer, tmp_path: Path, open_page: Opener, look: Look
) -> None:
    with before(own_cog) as server:
        page = open_page(shared(address_of(server), prompt=f"wait for {tmp_path / 'end'}"), expected=REFUSED)
        press(page, "Draw")
        expect(progress(page)).to_contain_text("Step 7 of 20")
        os.kill(worker_of(own_cog), signal.SIGKILL)
        sentence = "The predictor's process has ended; its server has to be started again."
        says(page, sentence)
        sees(page, "Unhealthy", "The server cannot draw now", sentence, GOES_ON)
        press(page, "Draw")
        says(page, re.compile(r"^\s*Waiting until the server can draw\.\s*$"))
        look(page, "worker-ended")


def test_a_server_that_has_gone_is_told_and_the_page_recovers_by_itself(
    own_cog: CogServer, project: Path, tmp_path: Path, open_page: Opener, look: Look
) -> None:
    with before(own_cog) as server:
        page = open_page(shared(address_of(server), prompt="stand still"), expected=REFUSED)
        press(page, "Draw")
        expect(progress(page)).to_contain_text("Step 7 of 20")
        os.killpg(own_cog.process.pid, signal.SIGKILL)
        address = url(LOOPBACK, own_cog.port)
        refused = f"{address} does not answer: Connection refused."
        sees(page, "No answer", "The server does not answer", refused)
        expect(panel(page, "The server does not answer")).to_contain_text(re.compile(r"Next try in \d s|Trying"))
        says(page, f"{address} does not answer: it broke off the connection.")
        look(page, "gone")
        for size in (NARROW, WIDE):
            page.set_viewport_size(size)
            page.evaluate("scrollTo(0, document.documentElement.scrollHeight)")
            expect(panel(page, "The server does not answer").get_by_text(refused)).to_be_in_viewport(ratio=1)
        prompt = page.get_by_role("textbox", name="Prompt")
        prompt.fill("a red fox")
        with CogServer(project, log=tmp_path / "anew", port=own_cog.port):
            sees_ready(page)
            expect(prompt).to_have_value("a red fox")
            draw(page)


def test_who_is_offline_is_told_and_goes_on_afterwards(page_server: Playground, open_page: Opener, look: Look) -> None:
    page = open_page(address_of(page_server), expected=REFUSED)
    sees_ready(page)
    page.context.set_offline(True)
    sees(page, "Offline", "This computer is offline", "The server cannot be reached.")
    look(page, "offline")
    page.context.set_offline(False)
    sees_ready(page)


def test_the_page_itself_may_lose_its_server(cog: CogServer, open_page: Opener, look: Look) -> None:
    with before(cog) as server:
        page = open_page(address_of(server), expected=REFUSED)
        sees_ready(page)
    sees(page, "No answer", "The server does not answer", "The server cannot be reached.")
    look(page, "page-server-gone")


# ---------------------------------------------------------------------------------------------------------------------
# A server that refuses


@contextlib.contextmanager
def behind(gateway: Gateway) -> Iterator[str]:
    """The page before a gateway; gives the page's address."""
    with gateway.serving() as target, served(target) as server:
        yield address_of(server)


def test_a_token_is_asked_for_and_a_wrong_one_is_told(cog: CogServer, open_page: Opener, look: Look) -> None:
    with behind(Gateway(cog, token=TOKEN)) as address:
        page = open_page(shared(address, prompt="a red fox"), expected=REFUSED)
        hint = "The server wants a token. It is kept until this tab of the browser is closed."
        sees(page, "Token wanted", "A token is wanted", hint)
        look(page, "token-wanted")
        field = page.get_by_label("Token", exact=True)
        field.fill("another")
        press(page, "Use token")
        sees(page, "Token wanted", "A token is wanted", "The server does not take this token.")
        look(page, "token-wrong")
        field.fill(TOKEN)
        field.press("Enter")
        sees_ready(page)
        draw(page)
        press(page, "Forget token")
        sees(page, "Token wanted", "A token is wanted", hint)


def test_a_token_that_is_refused_late_is_not_taken_for_the_one_that_is_used_now(
    cog: CogServer, open_page: Opener
) -> None:
    gateway = Gateway(cog, token="the-old-one")
    with behind(gateway) as address:
        page = open_page(shared(address, prompt="a red fox"), expected=REFUSED)
        page.get_by_label("Token", exact=True).fill(gateway.token)
        press(page, "Use token")
        sees_ready(page)
        draw_and_keep(page, gateway)
        gateway.token = TOKEN
        expect(pill(page)).to_have_text("Token wanted")
        page.get_by_label("Token", exact=True).fill(TOKEN)
        press(page, "Use token")
        expect(pill(page)).to_have_text("Drawing")
        gateway.answers.put((401, None))
        says(page, "The server does not take this token.")
        sees_ready(page)
        draw(page)


def test_a_full_queue_is_told_with_when_it_is_asked_again(
    cog: CogServer, tmp_path: Path, open_page: Opener, look: Look
) -> None:
    gateway = Gateway(cog, room=1)
    with behind(gateway) as address:
        page = open_page(shared(address, prompt="a red fox"), expected=REFUSED)
        with gateway.room:  # as long as somebody else's prediction is in it
            press(page, "Draw")
            says(page, re.compile(r"^\s*The queue is full\.\s+Asked again in [1-3] s\.\s*$"))
            look(page, "queue-full")
        says(page, re.compile(r"^1 picture drawn in [\d.]+ seconds\.$"))


def test_a_limit_is_told_with_when_it_is_asked_again(cog: CogServer, open_page: Opener, look: Look) -> None:
    gateway = Gateway(cog, allowance=1)
    with behind(gateway) as address:
        page = open_page(shared(address, prompt="a red fox"), expected=REFUSED)
        draw(page)
        press(page, "Draw")
        says(page, re.compile(r"^\s*The server limits how often it is asked\.\s+Asked again in [1-3] s\.\s*$"))
        look(page, "limited")
        gateway.allowance = 1
        expect(history(page)).to_have_count(2)


def test_a_server_elsewhere_does_not_tell_its_steps(
    project: Path, tmp_path: Path, open_page: Opener, look: Look
) -> None:
    with CogServer(project, log=tmp_path / "log", host=own_address()) as running, before(running) as server:
        page = open_page(shared(address_of(server), prompt=f"wait for {tmp_path / 'end'}"), expected=REFUSED)
        press(page, "Draw")
        says(page, re.compile(r"^\s*Drawing\s+\d+ s\s+This server does not tell its steps\.\s*$"))
        look(page, "elsewhere")
        (tmp_path / "end").touch()
        says(page, re.compile(r"^1 picture drawn in"))
