"""Hostile requests against `script/cluster`, with an honest client beside them.

Strangers send the kinds of `harness.hostile_kinds`. Meanwhile an honest client makes predictions by both APIs and reads
the list, and another process asks for health. The rules: every request is answered, and not with a 5xx except 503 with
Retry-After; every honest prediction succeeds and sends one last webhook; health is answered within a second; no process
dies, grows without bound or fills the disk; no prediction is left unfinished or repeated; no secret is shown. A broken
rule is noted with the kind, the number and the first bytes of the request, and the run goes on.
"""

import contextlib
import http.client
import json
import multiprocessing
import os
import random
import re
import secrets
import select
import socket
import struct
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from harness.cluster import ENDS, Cluster, Hooks, Server
from harness.hostile import DEAF, MARK, Answer, Kind, Scene, Sent, Stranger
from harness.hostile_kinds import KINDS
from harness.hosts import _Server
from harness.waiting import wait_until
from local_cog.server import LOOPBACK
from service.data_uri import decode
from settings import MIB, ROOT

TOKEN = "t0ken-of-the-cluster"
SECRET = "s3cret-of-the-operator"
# A minimal predictor; it prints its inputs, as a careless one would.
PREDICTOR = """
import os
import time

from cog import BasePredictor, Input, Path

from service.occupancy import Occupancy


class Predictor(BasePredictor):
    def setup(self) -> None:
        self.made = 0
        self.occupancy = Occupancy()

    def predict(
        self,
        prompt: str = Input(description="what to say"),
        image: Path | None = Input(default=None),
        steps: int = Input(default=4, ge=1, le=50),
        strength: float = Input(default=1),
        replicate_weights: str | None = Input(default=None),
    ) -> list[Path]:
        print("Asked for", prompt[:100_000], "with", replicate_weights)
        time.sleep(0.02)
        self.made += 1
        output = Path(os.environ["TMPDIR"]) / f"flux-sprites-{self.made % 4}.webp"
        output.write_bytes(prompt.encode() * (400 if prompt.startswith("LARGE") else 1))
        return [output]
"""
HEALTH_S = 1.0
ANSWER_S = 30.0
HONEST_S = 30.0
# Within this time after the last hostile request, every prediction must end.
SETTLE_S = 30.0
# Within this time, a silent client's connection must be closed: 30 s, and some for a busy machine.
HELD_S = 50.0
STRANGERS = 6
MORE_MEMORY_BYTES = 1536 * MIB
# A front's temporary files: room for the largest forms of some strangers.
TEMPORARY_BYTES = 250 * MIB
# How many lines of the log may name one prediction, as begun, interrupted or adopted.
LINES_OF_ONE = 5


@dataclass
class Failure:
    """A rule that was broken while a kind was sent: how often, and how the first time."""

    count: int
    first: str


@dataclass
class Report:
    """The results of a run; threads write into it."""

    requests: Counter = field(default_factory=Counter)  # by kind
    answers: Counter = field(default_factory=Counter)  # by kind and status
    failures: dict[tuple[str, str], Failure] = field(default_factory=dict)  # by kind and rule
    honest: Counter = field(default_factory=Counter)  # counts of the honest client's work
    most: dict[str, float] = field(default_factory=dict)  # the maximum of each measured quantity
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def fail(self, kinds: str, rule: str, how: str) -> None:
        """Note that a rule was broken."""
        with self.lock:
            failure = self.failures.setdefault((kinds, rule), Failure(0, how[:1500]))
            failure.count += 1

    def measured(self, what: str, amount: float) -> None:
        """Note how long something took, or how large it was; the maximum is kept."""
        with self.lock:
            self.most[what] = max(self.most.get(what, 0), amount)

    def figures(self) -> dict[str, Any]:
        """The report as JSON values."""
        statuses: dict[str, Counter] = {}
        for (kind, status), count in sorted(self.answers.items(), key=str):
            statuses.setdefault(kind, Counter())[str(status)] += count
        return {
            "requests": sum(self.requests.values()),
            "kinds": len(self.requests),
            "answers": dict(sum(statuses.values(), Counter())),
            "honest": dict(self.honest),
            "at_most": {what: round(amount, 3) for what, amount in sorted(self.most.items())},
            "answers_by_kind": statuses,
            "failures": [
                {"kind": kind, "rule": rule, "count": failure.count, "first": failure.first}
                for (kind, rule), failure in sorted(self.failures.items())
            ],
        }


# ---------------------------------------------------------------------------------------------------------------------
# One connection


@dataclass
class Heard:
    """What one connection received."""

    answers: list[Answer]
    state: str  # "open", "closed", "broken" or "refused"
    seconds: float = 0.0  # from the last byte sent to the last answer, or to giving up


class Line:
    """A connection that sends and receives at the same time."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection((LOOPBACK, port), timeout=ANSWER_S)
        self.socket.setblocking(False)
        self.heard, self.state, self.answers = bytearray(), "open", []

    def talk(self, sent: Sent) -> Heard:
        """Send all parts, and read the answers as long as this client waits."""
        deaf = sent.ending == "stall"
        for part in sent.content:
            if self.state != "open":
                break
            if isinstance(part, float):
                self.listen(part, enough=10**9, deaf=deaf)
            else:
                self.send(part, deaf)
        said = time.monotonic()
        if sent.ending == "half" and self.state == "open":
            self.finish_speaking()
        if sent.ending in ("read", "half", "stall"):
            self.listen(sent.patience, sent.due or 1, deaf)
        if sent.ending == "reset":
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        return Heard(self.answers, self.state, time.monotonic() - said)

    def finish_speaking(self) -> None:
        """Close this side of the connection."""
        try:
            self.socket.shutdown(socket.SHUT_WR)
        except OSError:
            self.state = "broken"

    def send(self, content: bytes, deaf: bool) -> None:
        """Send bytes; give up if the server stops reading for too long."""
        left, give_up = memoryview(content), time.monotonic() + ANSWER_S
        while left and self.state == "open" and time.monotonic() < give_up:
            readable, writable, _ = select.select([] if deaf else [self.socket], [self.socket], [], 1)
            try:
                if readable:
                    self.receive()
                if writable:
                    left = left[self.socket.send(left[: 256 * 1024]) :]
            except BlockingIOError:
                pass
            except OSError:
                self.state = "broken"

    def listen(self, seconds: float, enough: int, deaf: bool) -> None:
        """Read for so long, or until there are enough answers, or no more can come."""
        give_up = time.monotonic() + seconds
        while self.state == "open" and len(self.answers) < enough and (left := give_up - time.monotonic()) > 0:
            if deaf:
                time.sleep(left)
            elif select.select([self.socket], [], [], left)[0]:
                self.receive()

    def receive(self) -> None:
        """Read the bytes that have arrived."""
        try:
            content = self.socket.recv(MIB)
        except OSError:
            self.state = "broken"
            return
        self.heard += content
        if not content:
            self.state = "closed"
        while (parsed := parse(self.heard, ended=not content)) is not None:
            answer, length = parsed
            del self.heard[:length]
            if answer.status >= 200:
                self.answers.append(answer)


def parse(heard: bytes | bytearray, ended: bool) -> tuple[Answer, int] | None:
    """The first answer in these bytes and its length; None where it is incomplete, status 0 where it is not HTTP."""
    if not heard:
        return None
    end = heard.find(b"\r\n\r\n")
    status = re.match(rb"HTTP/1\.[01] (\d{3})", heard)
    if not status or end < 0:
        return (Answer(0, {}, bytes(heard)), len(heard)) if ended else None
    lines = heard[:end].decode("latin-1").split("\r\n")[1:]
    headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    code, start = int(status[1]), end + 4
    if code < 200 or code in (204, 304):
        return Answer(code, headers, b""), start
    length = headers.get("content-length")
    if headers.get("transfer-encoding") == "chunked":
        last = heard.find(b"0\r\n\r\n", start)
        stop = last + 5 if last >= 0 else len(heard) if ended else None
    else:
        stop = start + int(length) if length is not None else len(heard) if ended else None
    if stop is None or (stop > len(heard) and not ended):
        return None
    return Answer(code, headers, bytes(heard[start:stop])), min(stop, len(heard))


def exchange(port: int, sent: Sent) -> Heard:
    """Send a request through a new connection."""
    try:
        line = Line(port)
    except OSError:
        return Heard([], "refused")
    with line.socket:
        return line.talk(sent)


# ---------------------------------------------------------------------------------------------------------------------
# Strangers


@dataclass
class Attack:
    """Strangers that send kinds to a cluster, and the rules for the answers."""

    port: int
    scene: Scene
    report: Report
    seed: int
    private: Sequence[str]  # texts that no answer may contain
    current: dict[int, str] = field(default_factory=dict)  # the case that each thread sends
    past: list[tuple[float, float, str]] = field(default_factory=list)  # when each case was sent
    stop_at: float = float("inf")

    def now(self, began: float | None = None) -> str:
        """The kinds that are being sent, or have been since `began`."""
        found = set(self.current.copy().values())  # at once, since others write it
        if began is not None:
            found |= {name for _, end, name in self.past[-1000:] if end >= began}
        return ", ".join(sorted({name.partition(" ")[0] for name in found})) or "nothing"

    def run(self, plan: Sequence[tuple[Kind, int]]) -> None:
        """Send all of a plan, several strangers at once."""
        with ThreadPoolExecutor(STRANGERS, "stranger") as strangers:
            for count, done in enumerate([strangers.submit(self.case, kind, number) for kind, number in plan], 1):
                done.result()
                if count % 100 == 0:
                    print(f"{count} of {len(plan)} cases, {len(self.report.failures)} failures", file=sys.stderr)

    def case(self, kind: Kind, number: int) -> None:
        """Send all requests of one case."""
        if time.monotonic() > self.stop_at:
            self.report.fail("-", "not sent", f"The time was over before {kind.name}.")
            return
        me, name, began = threading.get_ident(), f"{kind.name} {number}", time.monotonic()
        self.current[me] = name
        script = kind.script(Stranger(self.scene, number, random.Random(f"{self.seed} {name}")))
        try:
            sent = next(script)
            while True:
                sent = script.send(self.deliver(kind, name, sent))
        except StopIteration:
            pass
        except AssertionError as error:
            self.report.fail(kind.name, "its own", f"{name}, seed {self.seed}: {error}")
        finally:
            del self.current[me]
            self.past.append((began, time.monotonic(), name))

    def deliver(self, kind: Kind, name: str, sent: Sent | list[Sent]) -> list[Answer]:
        """Send one request, or several at once, and judge the answers."""
        several = sent if isinstance(sent, list) else [sent]
        if len(several) == 1:
            heard = [exchange(self.port, several[0])]
        else:
            with ThreadPoolExecutor(len(several)) as clients:
                heard = list(clients.map(lambda one: exchange(self.port, one), several))
        for one, back in zip(several, heard, strict=True):
            self.judge(kind, name, one, back)
        return [answer for back in heard for answer in back.answers]

    def judge(self, kind: Kind, name: str, sent: Sent, heard: Heard) -> None:
        """Check the answers by the rules."""
        with self.report.lock:
            self.report.requests[kind.name] += 1
            for answer in heard.answers:
                self.report.answers[kind.name, answer.status] += 1
            if not heard.answers:
                self.report.answers[kind.name, heard.state] += 1
        if sent.due and sent.ending == "read":
            self.report.measured("seconds of an answer to a stranger", heard.seconds)

        def fail(rule: str, how: str) -> None:
            self.report.fail(kind.name, rule, f"{name}, seed {self.seed}: {how} Sent: {_beginning(sent)}")

        if heard.state == "refused":
            fail("nobody listens", "The connection was refused.")
        for answer in heard.answers:
            shown = answer.body[:300]
            if answer.status >= 500 and not (answer.status == 503 and "retry-after" in answer.headers):
                fail(f"status {answer.status}", f"{shown!r}.")
            if answer.status == 0:
                fail("no HTTP", f"{shown!r}.")
            text = answer.body.decode("utf-8", "replace") + str(answer.headers)
            if told := [word for word in self.private if word in text]:
                fail("told", f"The answer {shown!r} tells {told}.")
        if heard.state == "open" and sent.due > len(heard.answers) and sent.ending in ("read", "half"):
            fail("no answer", f"Nothing came within {heard.seconds:.0f} s.")


def _beginning(sent: Sent) -> bytes:
    """The first bytes of a request."""
    beginning = b""
    for part in sent.content:
        beginning += part[:600] if isinstance(part, bytes) else b""
        if len(beginning) > 500:
            break
    return beginning.replace(TOKEN.encode(), b"...")[:500]


def plan(kinds: Sequence[Kind], requests: int, seed: int) -> list[tuple[Kind, int]]:
    """About so many cases in random order, fewer of expensive kinds."""
    whole = sum(1 / kind.cost for kind in kinds)
    cases = [(kind, number) for kind in kinds for number in range(max(1, round(requests / kind.cost / whole)))]
    random.Random(seed).shuffle(cases)
    return cases


# ---------------------------------------------------------------------------------------------------------------------
# The honest client


@dataclass
class Honest:
    """A client that makes predictions by both APIs, with webhooks, and reads the list; three threads."""

    cluster: Server
    hooks: Hooks
    attack: Attack
    known: list[Mapping[str, Any]]
    leaving: threading.Event = field(default_factory=threading.Event)
    awaited: list[str] = field(default_factory=list)  # ids of predictions with webhooks

    def __post_init__(self) -> None:
        """Report where the attack reports."""
        self.report = self.attack.report

    @contextmanager
    def working(self) -> Iterator[None]:
        """Work until the block ends; it begins when there is a prediction that strangers may know."""
        works = (self.cog, self.replicate, self.look)
        threads = [threading.Thread(target=self.repeat, args=[work]) for work in works]
        for thread in threads:
            thread.start()
        try:
            with contextlib.suppress(TimeoutError):
                wait_until(lambda: self.known, HONEST_S)
            yield
        finally:
            self.leaving.set()
            for thread in threads:
                thread.join()

    def repeat(self, work: Callable[[int], None]) -> None:
        """Repeat one kind of work until the end, and note failures."""
        number = 0
        while not self.leaving.is_set():
            number, began = number + 1, time.monotonic()
            try:
                work(number)
                self.report.honest[work.__name__] += 1
            except Exception as error:
                reason = f"Number {number}, while {self.attack.now(began)} were sent: {type(error).__name__}: {error}"
                self.report.fail("-", f"honest {work.__name__}", reason)
                self.report.honest[f"{work.__name__} failed"] += 1
            seconds = time.monotonic() - began
            self.report.measured(f"seconds of honest {work.__name__}", seconds)
            if seconds > HONEST_S:
                how = f"{seconds:.0f} s, while {self.attack.now(began)} were sent."
                self.report.fail("-", f"honest {work.__name__} slow", how)
            self.leaving.wait(0.1)

    def ask(self, method: str, path: str, body: object = None, headers: Mapping[str, str] | None = None) -> Any:  # noqa: ANN401
        """The answer's JSON; the request is repeated after a 503 with Retry-After."""
        give_up = time.monotonic() + HONEST_S
        while True:
            status, named, text = self.cluster.request(method, path, body, headers)
            if status != 503 or "retry-after" not in named or time.monotonic() > give_up:
                break
            self.report.honest["503"] += 1
            time.sleep(0.5)
        assert status in (200, 201, 202), f"{method} {path}: {status} {text[:300]}"
        told = [word for word in self.attack.private if word in text]
        assert not told, f"{method} {path} tells {told}: {_around(text, told)}"
        return json.loads(text, parse_constant=_no_number)

    def cog(self, number: int) -> None:
        """One prediction by Cog's API: by a synchronous request, or with a webhook."""
        name, prompt = f"honest-{number}-{secrets.token_hex(4)}", f"fox {number}"
        body: dict[str, Any] = {"input": {"prompt": prompt}}
        if number % 2:
            ended = self.ask("PUT", f"/predictions/{name}", body)
        else:
            self.awaited.append(name)
            headers = {"Prefer": "respond-async"}
            self.ask("PUT", f"/predictions/{name}", body | {"webhook": self.hooks.url}, headers)
            ended = self.hooks.until_ended(name, HONEST_S)[-1]
        assert (ended["id"], ended["status"]) == (name, "succeeded"), str(ended)[:500]
        assert [decode(file)[1] for file in ended["output"]] == [prompt.encode()], str(ended)[:500]

    def replicate(self, number: int) -> None:
        """One prediction by Replicate's API, with a webhook: by a synchronous request, or polled."""
        prompt = f"cat {number}"
        body = {"version": "v", "input": {"prompt": prompt}, "webhook": self.hooks.url}
        made = self.ask("POST", "/v1/predictions", body, {"Prefer": "wait=30"} if number % 2 else None)
        self.awaited.append(made["id"])
        if made["status"] not in ENDS:
            path = f"/v1/predictions/{made['id']}"
            made = wait_until(lambda: (it := self.ask("GET", path))["status"] in ENDS and it, HONEST_S, pause=0.1)
        assert made["status"] == "succeeded", str(made)[:500]
        assert made["input"] == {"prompt": prompt}, str(made)[:500]
        self.ours([*made["urls"].values(), *made["output"]])
        status, _, text = self.cluster.request("GET", made["output"][0].removeprefix(self.cluster.url))
        assert (status, text) == (200, prompt), (status, text[:300])
        if len(self.known) < 20:
            self.known.append(made)

    def look(self, _: int) -> None:
        """Read two pages of the predictions' list, and the files' list."""
        page = self.ask("GET", "/v1/predictions")
        for _ in range(2):
            self.ours(url for made in page["results"] for url in made["urls"].values())
            self.ours(file for made in page["results"] for file in made["output"] or ())
            self.ours(filter(None, [page["previous"], page["next"]]))
            if not page["next"]:
                break
            page = self.ask("GET", page["next"].removeprefix(self.cluster.url))
        self.ours(file["urls"]["get"] for file in self.ask("GET", "/v1/files")["results"])

    def ours(self, addresses: Iterable[str]) -> None:
        """Check that addresses have this client's host, not a Host that others have sent."""
        elsewhere = [address[:200] for address in addresses if not address.startswith(f"{self.cluster.url}/")]
        assert not elsewhere, f"{len(elsewhere)} addresses lead elsewhere: {elsewhere[:3]}"

    def afterwards(self) -> None:
        """Check that ended predictions have not changed, and that each webhook about an end came once."""
        for made in self.known:
            left = self.ask("GET", f"/v1/predictions/{made['id']}")
            assert left == made, f"{str(made)[:300]} has become {str(left)[:300]}."

        def counted() -> Counter[str]:
            return Counter(body["id"] for _, body in list(self.hooks.received) if body["status"] in ENDS)

        with contextlib.suppress(TimeoutError):
            wait_until(lambda: counted().keys() >= set(self.awaited), HONEST_S, pause=0.2)
        ends = counted()
        wrong = {name: ends[name] for name in self.awaited if ends[name] != 1}
        assert not wrong, f"Told to have ended, not once: {str(wrong)[:300]}"
        said = json.dumps([body for _, body in list(self.hooks.received)])
        told = [word for word in self.attack.private if word in said]
        assert not told, f"Webhooks tell {told}: {_around(said, told)}"


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no JSON.")


def _around(text: str, told: Sequence[str]) -> str:
    at = text.index(told[0])
    return text[max(0, at - 150) : at + 150]


# ---------------------------------------------------------------------------------------------------------------------
# Watching


def poll(port: int, every: float, told: Connection) -> None:
    """Ask for health on new connections until told to stop, then send the results; runs in its own process."""
    slowest, asked, wrong, paths = 0.0, 0, [], ("/-/healthz", "/health-check")
    told.send("ready")
    while not told.poll():
        path, began = paths[asked % 2], time.monotonic()
        asked += 1
        connection = http.client.HTTPConnection(LOOPBACK, port, timeout=10)
        try:
            connection.request("GET", path)
            status = str(connection.getresponse().status)
        except (OSError, http.client.HTTPException) as error:
            status = repr(error)
        finally:
            connection.close()
        seconds = time.monotonic() - began
        slowest = max(slowest, seconds)
        if seconds > HEALTH_S or status != "200":
            wrong.append((began, seconds, path, status))
        time.sleep(max(0, every - seconds))
    told.send((slowest, asked, wrong))


@contextmanager
def health_watched(attack: Attack) -> Iterator[None]:
    """Ask for health ten times a second until the block ends; note slow answers and the cases sent meanwhile."""
    ours, theirs = multiprocessing.Pipe()
    poller = multiprocessing.get_context("spawn").Process(target=poll, args=(attack.port, 0.1, theirs), daemon=True)
    poller.start()
    theirs.close()  # so that `recv` raises if the poller has died
    ours.recv()
    try:
        yield
    finally:
        ours.send("stop")
        slowest, asked, wrong = ours.recv()
        poller.join()
        for began, seconds, path, status in wrong:
            sent = {name for start, end, name in attack.past if start < began + seconds and end > began}
            how = f"{path} took {seconds:.1f} s: {status}. Sent then: {', '.join(sorted(sent))}."
            attack.report.fail("-", "health", how)
        attack.report.measured("seconds of a health check", slowest)
        attack.report.honest["health checks"] = asked


@dataclass
class Processes:
    """The cluster's processes by title, and their memory and temporary files."""

    cluster: Cluster
    attack: Attack
    before: dict[str, list[int]] = field(default_factory=dict)
    resident: dict[int, int] = field(default_factory=dict)

    TITLES = (
        "ServeReplica:flux-sprites:Front",
        "ServeReplica:flux-sprites:CogWorker",
        "cog.server.http",
        "_run_worker",
    )

    def __post_init__(self) -> None:
        """Note the present processes."""
        self.before = self.there()
        self.resident = {process: _resident(process) for process in self.before[self.TITLES[0]]}

    def there(self) -> dict[str, list[int]]:
        """The processes that run now."""
        return {title: self.cluster.processes(title) for title in self.TITLES}

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Check the processes every second until the block ends."""
        leaving = threading.Event()

        def watch() -> None:
            while not leaving.wait(1):
                self.look()

        thread = threading.Thread(target=watch)
        thread.start()
        try:
            yield
        finally:
            leaving.set()
            thread.join()
            self.look()

    def look(self) -> None:
        """Note processes that have ended, grown too large or written too much."""
        report, there = self.attack.report, self.there()

        def fail(rule: str, how: str) -> None:
            report.fail("-", rule, f"{how} Sent then: {self.attack.now(time.monotonic() - 1)}.")

        for title in self.TITLES:
            if gone := [process for process in self.before[title] if process not in there[title]]:
                fail(f"{title.rpartition(':')[2]} died", f"{gone} are gone.")
                self.before[title] = there[title]
        for process in there[self.TITLES[0]]:
            grown = _resident(process) - self.resident.setdefault(process, _resident(process))
            report.measured("megabytes that a front grew", grown / 1e6)
            if grown > MORE_MEMORY_BYTES:
                fail("memory", f"A front has grown by {grown / 1e6:.0f} MB.")
            written = _temporary(process)
            report.measured("megabytes of a front's temporary files", written / 1e6)
            if written > TEMPORARY_BYTES:
                fail("temporary files", f"A front has {written / 1e6:.0f} MB of them.")


def _resident(process: int) -> int:
    """Bytes of memory; 0 where the process has ended."""
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


def _temporary(process: int) -> int:
    """Bytes of deleted files that the process holds open."""
    total = 0
    with contextlib.suppress(OSError):
        for descriptor in Path(f"/proc/{process}/fd").iterdir():
            with contextlib.suppress(OSError):
                name = str(descriptor.readlink())
                if name.endswith(" (deleted)") and not name.startswith(("/dev", "/memfd")):
                    total += descriptor.stat().st_size
    return total


@contextmanager
def deaf_receivers() -> Iterator[str]:
    """The URL of a host whose path decides how badly it answers webhooks."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            way = self.path.rpartition("/")[2]
            if way == "hang":
                time.sleep(20)
            elif way == "close":
                return
            elif way in ("redirect", "302-self"):
                self.send_response(302)
                self.send_header("Location", self.path if way == "302-self" else "http://[x/")
                self.end_headers()
            elif way == "junk":
                self.wfile.write(b"\xff\0junk\r\n\r\n" * 100)
            elif way == "1xx":
                for _ in range(100):
                    self.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n" * 20_000)
            elif way == "head":
                self.wfile.write(b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 100_000)
            elif way in ("endless", "slow"):
                self.send_response(200)
                self.end_headers()
                for _ in range(200):
                    self.wfile.write(b"x" * (100_000 if way == "endless" else 1))
                    time.sleep(0.05)
            else:
                self.send_error(int(way) if way.isdigit() else 500)

        do_GET = do_HEAD = do_POST  # noqa: N815 (the names of http.server)

        def log_message(self, *_: object) -> None: ...

    with _Server((LOOPBACK, 0), Handler) as host:
        threading.Thread(target=host.serve_forever, daemon=True).start()
        yield f"http://{LOOPBACK}:{host.server_port}"
        host.shutdown()


@contextmanager
def connections_held(attack: Attack, count: int = 50) -> Iterator[None]:
    """Hold connections with nothing or half a request until the block ends; by then each must have been closed."""
    asked = (
        f"POST /predictions HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {TOKEN}\r\nContent-Type: application/json\r\n"
    )
    beginnings = {
        "nothing": b"",
        "a letter": b"G",
        "half a header": b"GET / HTTP/1.1\r\nHost: a\r\nX: ",
        "no body": f"{asked}Content-Length: 9\r\n\r\n".encode(),
        "half a body": f"{asked}Transfer-Encoding: chunked\r\n\r\n1\r\n{{".encode(),
    }
    began = time.monotonic()
    with contextlib.ExitStack() as stack:
        held = []
        for number in range(count):
            said = list(beginnings)[number % len(beginnings)]
            held.append((said, stack.enter_context(socket.create_connection((LOOPBACK, attack.port)))))
            held[-1][1].sendall(beginnings[said])
        yield
        for said, connection in held:
            connection.settimeout(max(0.1, began + HELD_S - time.monotonic()))
            try:
                while connection.recv(MIB):
                    pass
            except TimeoutError:
                attack.report.fail("-", "held", f"After {time.monotonic() - began:.0f} s of {said} one is still open.")
            except OSError:
                pass
        attack.report.measured("seconds until nobody was waited for", time.monotonic() - began)


# ---------------------------------------------------------------------------------------------------------------------
# The run


@dataclass
class Target:
    """A cluster under attack."""

    cluster: Cluster
    database: str  # SQLAlchemy's URL
    data: Path
    secret: tuple[str, ...]
    private: tuple[str, ...]  # the same, and paths of this machine

    def run(
        self, requests: int, seed: int, kinds: Sequence[str] = (), *, large: bool = False, seconds: float = 3600
    ) -> Report:
        """The report after about so many requests of all kinds, or of some, within so many seconds."""
        report, known = Report(), []
        with deaf_receivers() as receivers, Hooks() as hooks:
            scene = Scene(f"{LOOPBACK}:{self.cluster.port}", TOKEN, receivers, known, large)
            attack = Attack(self.cluster.port, scene, report, seed, self.private)
            attack.stop_at = time.monotonic() + seconds
            honest = Honest(Server(self.cluster.port, self.cluster.headers, HONEST_S), hooks, attack, known)
            chosen = [KINDS[name] for name in kinds or KINDS]
            processes = Processes(self.cluster, attack)
            with health_watched(attack), processes.watched(), connections_held(attack):
                with honest.working():
                    attack.run(plan(chosen, requests, seed))
                self.settle(attack)
                try:
                    honest.afterwards()
                except Exception as error:
                    report.fail("-", "honest afterwards", f"{type(error).__name__}: {error}")
            self.read_logs(report)
        return report

    def settle(self, attack: Attack) -> None:
        """Wait until all predictions have ended; note those that do not, and those that were repeated."""
        engine = sa.create_engine(self.database.replace("postgresql://", "postgresql+psycopg://"))
        unfinished = sa.text(
            "SELECT id, status, deaths, webhook_due, webhook FROM predictions"
            f" WHERE status IN ('starting', 'processing') OR (webhook_due AND webhook NOT LIKE '%{DEAF}%')"
        )
        began = time.monotonic()
        with engine.connect() as connection:
            while (left := connection.execute(unfinished).all()) and time.monotonic() < began + SETTLE_S:
                connection.rollback()
                time.sleep(0.5)
            for row in left:
                attack.report.fail("-", "unfinished", f"{len(left)} are, the first {str(row)[:300]}.")
            connection.rollback()
            for row in connection.execute(sa.text("SELECT id, deaths, error FROM predictions WHERE deaths > 0")):
                attack.report.fail("-", "tried again", f"{str(row)[:300]}")
        engine.dispose()
        attack.report.measured("seconds until nothing was unfinished", time.monotonic() - began)

    def read_logs(self, report: Report) -> None:
        """Note secrets, tracebacks and repeated predictions in the log, but not in the predictor's own lines."""
        lines: Counter[str] = Counter()
        tracing = False
        with self.cluster.log.open(errors="replace") as log:
            for line in log:
                if '"source":"Std' in line:
                    continue
                lines.update(re.findall(r'[Pp]rediction(?: |","prediction_id":")([\w-]{8,})', line))
                said = re.sub(r"^\x1b\[\d+m\(.*?\)\x1b\[0m ", "", line)  # Ray's prefix, which names the process
                if tracing and not said.startswith((" ", "\n")):
                    tracing = False
                    report.fail("-", f"traceback of {said.partition(':')[0][:80].strip()}", said[:600])
                elif said.startswith("Traceback"):
                    tracing = True
                elif told := [word for word in (self.secret if tracing else self.private) if word in line]:
                    report.fail("-", "log", f"It tells {told}: {line[:600]}")
        for name, count in lines.items():
            if count > LINES_OF_ONE:
                report.fail("-", "again and again", f"The log names the prediction {name[:100]} {count} times.")
        kept = sum(file.stat().st_size for file in self.data.rglob("*") if file.is_file() and file.name != "log")
        report.measured("megabytes of data kept", kept / 1e6)


@contextmanager
def target(folder: Path, workers: int = 1, fronts: int = 2, database: str = "") -> Iterator[Target]:
    """A cluster with tokens to lose, over SQLite unless another database is given."""
    project, data = folder / "project", folder / "data"
    for made in (project, data):
        made.mkdir()
    (project / "predict.py").write_text(PREDICTOR)
    database = database or f"sqlite:///{data / 'predictions.db'}"
    ray_token = secrets.token_hex(32)
    environment = {
        "DATABASE_URL": database,
        "FILES_URL": str(data / "files"),
        "API_TOKENS": f"another,{TOKEN}",
        "RAY_AUTH_TOKEN": ray_token,
        "RAY_DEDUP_LOGS": "0",  # every line counts
        **dict.fromkeys(("HF_TOKEN", "REPLICATE_API_TOKEN", "CIVITAI_API_TOKEN"), SECRET),
    }
    secret = (TOKEN, SECRET, ray_token, MARK)
    private = (*secret, f"{ROOT}/", str(folder), "site-packages", "Traceback", 'File "')
    options = ("--project", str(project), "--workers", str(workers), "--fronts", str(fronts))
    with Cluster(*options, environment=environment, log=folder / "log", token=TOKEN) as cluster:
        yield Target(cluster, database, data, secret, private)
