"""Connections: where they may lead, how often they are tried, what they tell others, how fast they stop."""

import base64
import ctypes
import ipaddress
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import cog
import pytest
import urllib3

from harness.hosts import File, Host, hugging_face, in_turn, redirect, silent, status, trickle
from harness.waiting import wait_until
from settings import Settings
from sources.client import retry_after
from sources.connections import Connections, StoppedError, is_public, trusted_authorities
from tests.support.caches import SECRET, check_cache
from tests.support.certificates import self_signed
from tests.support.fetching import LARGE, LORA, OTHER, QUICK, fetch, refusal
from tests.support.processes import finished
from weights import WeightsCache

IMPATIENT = replace(QUICK, pauses=())


def test_a_token_stays_with_its_host(places: Settings, host: Host, storage: Host) -> None:
    """Neither where a place redirects to, nor any other place, nor a stranger's URL gets to see it."""
    tokens = replace(places, hf_token=SECRET, civitai_token=SECRET, replicate_token=SECRET)
    storage.routes["/a"] = File(LORA)
    host.routes["/owner/name/_weights"] = redirect(storage.url("/a"))
    assert fetch(tokens, "owner/name") == LORA
    assert host.seen[0].headers["Authorization"] == f"Bearer {SECRET}"
    assert fetch(tokens, storage.url("/a?x=1")) == LORA
    assert all("Authorization" not in request.headers for request in storage.seen)


def basic(login: str) -> str:
    return f"Basic {base64.b64encode(login.encode()).decode()}"


def test_a_signed_url_keeps_its_signature_and_nobody_else_sees_it(
    environment: Settings, host: Host, capfd: pytest.CaptureFixture
) -> None:
    host.routes["/a"] = File(LORA)
    with WeightsCache(environment, QUICK).open(host.url(f"/a?X-Amz-Signature={SECRET}&b=%2F")) as weights:
        assert weights.name == host.url("/a")
    assert host.seen[0].query == {"X-Amz-Signature": SECRET, "b": "/"}
    login = host.address.replace("//", f"//user%40x:%E2%82%AC{SECRET}@")
    assert fetch(environment, f"{login}/a") == LORA
    assert host.seen[-1].headers["Authorization"] == basic(f"user@x:€{SECRET}")


def test_slow_and_silent_hosts_are_given_up(environment: Settings, host: Host) -> None:
    host.routes |= {"/drip": File(LORA, delay=0.01, slice=1, ranges="none"), "/silent": silent}
    assert "bytes a second" in refusal(environment, host.url("/drip"), IMPATIENT)
    assert "does not answer" in refusal(environment, host.url("/silent"), IMPATIENT)


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize("beginning", [b"HTTP/1.1 2", b"HTTP/1.1 200 OK\r\nX-A: ", CHUNKED, CHUNKED + b"1;a="])
def test_a_header_or_the_length_of_a_chunk_that_trickles_is_given_up(
    environment: Settings, host: Host, beginning: bytes
) -> None:
    host.routes["/a"] = trickle(beginning)
    assert "does not answer" in refusal(environment, host.url("/a"), IMPATIENT)


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_redirects_lead_to_other_hosts(environment: Settings, host: Host, storage: Host, code: int) -> None:
    host.routes["/a"] = redirect("/b?x=%20", code)
    # In unescaped UTF-8, as many hosts send it.
    host.routes["/b"] = redirect(storage.url("/bücher €").encode().decode("latin-1"), code)
    storage.routes["/bücher €"] = File(LORA)
    assert fetch(environment, host.url("/a")) == LORA


def test_redirects_that_lead_nowhere(environment: Settings, host: Host) -> None:
    host.routes |= {"/a": redirect("/b"), "/b": redirect("/a"), "/file": redirect("file:///etc/passwd")}
    assert "in a circle" in refusal(environment, host.url("/a"))
    assert len(host.seen) < 12
    assert "instead of http(s)" in refusal(environment, host.url("/file"))
    for nowhere in ("http://[::1", "http://a:b/", "http://a:99999/"):
        host.routes["/nowhere"] = redirect(nowhere)
        assert "leads to something that is no address" in refusal(environment, host.url("/nowhere"))


@pytest.mark.parametrize("code", [429, 500, 502, 503])
def test_what_passes_is_tried_again_and_what_does_not_is_not(environment: Settings, host: Host, code: int) -> None:
    host.routes["/a"] = in_turn(status(code), status(code), File(LORA))
    assert fetch(environment, host.url("/a")) == LORA
    host.routes["/b"] = status(code)
    assert f"answered {code}" in (said := refusal(environment, host.url("/b")))
    assert "try again later" in said
    assert len(host.asked("/b")) == 1 + len(QUICK.pauses)


@pytest.mark.parametrize("code", [400, 401, 403, 404, 410, 451])
def test_a_refusal_is_final(environment: Settings, host: Host, code: int) -> None:
    host.routes["/a"] = status(code)
    assert f"answered {code}" in refusal(environment, host.url(f"/a?token={SECRET}"))
    assert len(host.seen) == 1


def test_a_host_says_when_to_come_back(environment: Settings, host: Host) -> None:
    host.routes["/a"] = in_turn(status(429, {"Retry-After": "1"}), File(LORA))
    began = time.monotonic()
    assert fetch(environment, host.url("/a")) == LORA
    assert time.monotonic() - began >= 1
    host.routes["/b"] = status(503, {"Retry-After": "3600"})
    assert "try again later" in refusal(environment, host.url("/b"))
    assert len(host.asked("/b")) == 1
    host.routes["/c"] = status(503, {"Retry-After": "9" * 5000})  # more digits than Python makes a number of
    assert "try again later" in refusal(environment, host.url("/c"))
    past = {"Retry-After": "Fri, 31 Dec 1999 23:59:59 GMT"}
    assert [retry_after(headers) for headers in ({}, {"Retry-After": "soon"}, past)] == [None, None, 0]


def test_hosts_that_are_not_there(environment: Settings) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        assert "failed or broke off" in refusal(environment, f"http://127.0.0.1:{closed.getsockname()[1]}/a")
    assert "no host" in refusal(environment, "https://nobody.invalid/a")


def cancel_when(condition: Callable[[], bool], work: Callable[[], object]) -> float:
    """Have Cog's exception raised in the thread that works, as Cog does it; the seconds until the thread was free."""
    caught: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            caught.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    wait_until(condition)
    kind = ctypes.py_object(cog.CancelationException)
    assert ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), kind) == 1
    began = time.monotonic()
    thread.join(30)
    seconds = time.monotonic() - began
    assert [type(error) for error in caught] == [cog.CancelationException]
    return seconds


# Without a cancellation, waiting takes at least twice as long.
SOON = 5
PATIENT = replace(QUICK, stall=20, longest_pause=20)
STALLING = {
    "in the middle": lambda: File(LARGE, delay=0.01, slice=4096),
    "one stream": lambda: File(LARGE, delay=0.01, slice=4096, ranges="none"),
    "before an answer": lambda: silent,
    "waiting to try again": lambda: status(503, {"Retry-After": "20"}),
    "in the header": lambda: File(LORA, delay=5, slice=16),
}


@pytest.mark.parametrize("where", STALLING)
def test_a_cancelled_prediction_stops_its_download_at_once(environment: Settings, host: Host, where: str) -> None:
    host.routes["/a"] = STALLING[where]()
    seconds = cancel_when(
        lambda: len(host.seen) >= (3 if where == "in the middle" else 1),
        lambda: fetch(environment, host.url("/a"), PATIENT),
    )
    assert seconds < SOON
    wait_until(lambda: not [t for t in threading.enumerate() if t.name.startswith(("weights", "download"))])
    check_cache(environment.cache_dir)
    assert list(environment.cache_dir.glob("loras/*")) == []
    host.routes["/a"] = File(LORA, etag='"2"')
    assert fetch(environment, host.url("/a")) == LORA


def test_looking_a_repo_up_can_be_cancelled_too(places: Settings, host: Host, storage: Host) -> None:
    host.routes["/api/models/o/r/revision/main"] = silent
    assert cancel_when(lambda: len(host.seen) > 0, lambda: fetch(places, "huggingface.co/o/r", PATIENT)) < SOON
    hugging_face(host, storage, "o/r", {"a.safetensors": LORA})
    assert fetch(places, "huggingface.co/o/r") == LORA


def test_a_connection_that_is_made_while_all_ends_is_closed(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    connections, connect = Connections(allow_private=True, proxies={}, connect=5, stall=5), socket.create_connection
    made = []

    def connect_late(*_: object) -> socket.socket:
        made.append(connect(("127.0.0.1", urlsplit(host.url("")).port)))
        connections.stop()
        return made[0]

    monkeypatch.setattr(urllib3.util.connection, "create_connection", connect_late)
    with pytest.raises(StoppedError):
        connections.ask(host.url("/a"), {})
    assert made[0].fileno() == -1


def test_waiting_for_another_request_can_be_cancelled_too(environment: Settings, host: Host) -> None:
    file = host.routes["/a"] = File(LARGE, delay=0.05, ranges="none")
    first = threading.Thread(target=fetch, args=(environment, host.url("/a")))
    first.start()
    wait_until(lambda: file.sent > 0)

    def both_run() -> bool:
        return sum(thread.name == "weights" and thread.is_alive() for thread in threading.enumerate()) == 2

    assert cancel_when(both_run, lambda: fetch(environment, host.url("/a"))) < SOON
    file.delay = 0
    first.join()
    assert len(host.seen) == 2  # the download, and its question about ranges


def test_waiting_for_a_proxy_can_be_cancelled_too(environment: Settings, host: Host) -> None:
    host.routes["nobody.invalid:443"] = silent
    settings, patient = behind(host, environment), replace(PATIENT, connect=20)
    assert cancel_when(lambda: len(host.seen) > 0, lambda: fetch(settings, "https://nobody.invalid/a", patient)) < SOON
    wait_until(lambda: not [thread for thread in threading.enumerate() if thread.name == "weights"], SOON)


def test_waiting_for_tls_can_be_cancelled_too(environment: Settings) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent_host:
        url = f"https://127.0.0.1:{silent_host.getsockname()[1]}/a"
        greeted: list[bytes] = []

        def listen() -> None:
            connection, _ = silent_host.accept()
            with connection:
                greeted.append(connection.recv(1))
                while connection.recv(4096):
                    pass

        host = threading.Thread(target=listen)
        host.start()
        patient = replace(PATIENT, connect=20)
        assert cancel_when(lambda: len(greeted) > 0, lambda: fetch(environment, url, patient)) < SOON
        host.join(SOON)
        assert not host.is_alive()
    wait_until(lambda: not [thread for thread in threading.enumerate() if thread.name == "weights"], SOON)


PRIVATE = [
    *("127.0.0.1", "localhost", "127.1", "2130706433", "0x7f000001", "0.0.0.0", "[::1]", "[::]", "[::ffff:127.0.0.1]"),
    *("10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.100.100.200", "168.63.129.16"),
    *("[fd00:ec2::254]", "[fe80::1]", "[64:ff9b::a00:1]", "[2002:7f00:1::]", "224.0.0.1", "255.255.255.255"),
    *("user@127.0.0.1", "127.0.0.1."),
]  # fmt: skip


@pytest.mark.parametrize("address", PRIVATE)
def test_private_addresses_are_refused_without_being_connected_to(
    environment: Settings, host: Host, address: str
) -> None:
    host.routes["/a"] = File(LORA)
    port = host.address.rpartition(":")[2]
    began = time.monotonic()
    said = refusal(replace(environment, allow_private_hosts=False), f"http://{address}:{port}/a?token={SECRET}")
    assert "address of the server's own network" in said or "no host" in said
    assert time.monotonic() - began < SOON
    assert host.seen == []


def behind(proxy: Host, settings: Settings, **more: str) -> Settings:
    """Settings of a server that reaches nothing but through a proxy, which wants a password."""
    address = proxy.address.replace("//", f"//user%40x:%E2%82%AC{SECRET}@")
    return replace(settings, allow_private_hosts=False, proxies={"http": address, "https": address, **more})


def test_a_proxy_is_asked_instead_of_the_host_and_nobody_else_sees_its_password(
    environment: Settings, host: Host, storage: Host
) -> None:
    proxy = host
    proxy.routes |= {"/a": redirect("http://other.invalid/b?x=1"), "/b": File(LORA), "/c": redirect(storage.url("/a"))}
    storage.routes["/a"] = File(LORA)
    settings = behind(proxy, environment, no="127.0.0.1")
    assert fetch(settings, "http://nobody.invalid/a") == LORA
    assert [request.headers["Host"] for request in proxy.seen] == ["nobody.invalid", "other.invalid"]
    assert {request.headers["Proxy-Authorization"] for request in proxy.seen} == {basic(f"user@x:€{SECRET}")}
    # Requests that bypass the proxy are judged by their address.
    assert "WEIGHTS_ALLOW_PRIVATE_HOSTS" in refusal(settings, "http://nobody.invalid/c")
    assert storage.seen == []
    assert fetch(replace(settings, allow_private_hosts=True), "http://nobody.invalid/c") == LORA
    assert [request.headers["Proxy-Authorization"] for request in storage.seen] == [None]


NO_PROXY = {
    "http://127.0.0.1/": ["127.0.0.1", "127.0.0.1:80, 127.0.0.0/8", "foo, *", "[::1] 127.0.0.1", "127.0.0.1/8"],
    "http://127.0.0.1:80/": ["127.0.0.1", "127.0.0.1:80"],
    "http://localhost./": ["localhost", "*"],
    "http://[::1]/": ["::1", "[::1]", "::/64", "0:0:0:0:0:0:0:1"],
    "https://me:a@A.example.com:1/": ["*.example.com", ".example.com", "x  Example.com", "a.example.com:1"],
}
PROXY = {
    "http://127.0.0.1/": ["", " , ", ".", "127.0.0.1:80", "10.0.0.0/8", "::/0", "127.0.0.1/99"],
    "http://[::1]/": ["0.0.0.0/0", "::2"],
    "https://a.example.com./": ["ample.com", "b.example.com", "b.a.example.com", "example", "example.com:443"],
}


def test_what_goes_past_the_proxy_is_written_in_many_ways() -> None:
    for urls, through in ((NO_PROXY, None), (PROXY, "http://p")):
        for url, written in urls.items():
            for no in written:
                proxies = {"all": "http://p", "no": no}
                assert Connections(allow_private=False, proxies=proxies, connect=1, stall=1).proxy(url) == through, no


def test_hugging_face_is_asked_through_the_proxy_too(environment: Settings, host: Host) -> None:
    hugging_face(host, host, "o/r", {"v1.safetensors": LORA, "v2.safetensors": OTHER}, dates={"v1.safetensors": "3000"})
    settings = replace(behind(host, environment), hf_endpoint="http://hf.invalid")
    assert fetch(settings, "huggingface.co/o/r") == LORA
    assert {request.headers["Host"] for request in host.seen} == {"hf.invalid", host.address.removeprefix("http://")}
    host.routes["hf.invalid:443"] = status(407)
    said = refusal(replace(settings, hf_endpoint="https://hf.invalid"), "huggingface.co/o/r")
    assert "cannot be fetched: the server's proxy answered 407 Proxy Authentication Required for hf.invalid; " in said


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        (status(403), "the server's proxy answered 403 Forbidden for nobody.invalid; whoever runs the server decides"),
        (status(407), "the server's proxy answered 407 Proxy Authentication Required for nobody.invalid; whoever runs"),
        (status(502), "the server's proxy answered 502 Bad Gateway for nobody.invalid; try again later."),
        (silent, "nobody.invalid does not answer through the server's proxy."),
        (trickle(b"HTTP/1.1 200 OK\r\nX-A: "), "nobody.invalid does not answer through the server's proxy."),
        (None, "the server's proxy cannot be reached."),
    ],
)
def test_a_proxy_that_lets_nothing_through_is_named(
    environment: Settings, host: Host, answer: Callable | None, sentence: str
) -> None:
    settings, address = behind(host, environment), host.address
    host.routes["nobody.invalid:443"] = answer
    if answer is None:
        host.stop()
    said = refusal(settings, "https://nobody.invalid/a", replace(IMPATIENT, connect=0.6))
    assert said.startswith(f"https://nobody.invalid/a cannot be fetched: {sentence}")
    assert address.removeprefix("http://") not in said


# In a network of its own: public addresses that are nobody else's, and a name server that changes its mind.
PUBLIC_NETWORK = """
import socket, struct, subprocess, sys, threading
from pathlib import Path
from dataclasses import replace
from harness.hosts import File, Host, redirect, _Handler, _Server
from sources.client import Patience
from settings import MINIATURE, Settings
from sources.references import Url
from weights import WeightsCache, fetch_pictures

LORA = (Path(sys.argv[1]) / "lora").read_bytes()

def fetch(settings, reference):
    with WeightsCache(settings, Patience(connect=2, stall=1, pauses=())).open(reference) as weights:
        return weights.path.read_bytes()

for address in ("93.184.216.34", "93.184.216.35"):
    subprocess.run(["ip", "address", "add", address + "/32", "dev", "lo"], check=True)
subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
folder = Path(sys.argv[1])
(folder / "resolv.conf").write_text("nameserver 127.0.0.1\\n")
subprocess.run(["mount", "--bind", str(folder / "resolv.conf"), "/etc/resolv.conf"], check=True)

answers = {"rebinding": ["93.184.216.34", "127.0.0.1"], "fixed": ["93.184.216.34"], "both": ["93.184.216.34 127.0.0.1"]}
asked = []

def serve_names():
    server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    server.bind(("127.0.0.1", 53))
    while True:
        query, client = server.recvfrom(512)
        length = query[12]
        name = query[13 : 13 + length].decode()
        end = query.index(b"\\0", 12) + 1
        kind = struct.unpack(">H", query[end : end + 2])[0]
        addresses = []
        if kind == 1:
            asked.append(name)
            turns = answers[name]
            addresses = (turns.pop(0) if len(turns) > 1 else turns[0]).split()
        records = b"".join(b"\\xc0\\x0c" + struct.pack(">HHIH", 1, 1, 0, 4) + socket.inet_aton(a) for a in addresses)
        header = query[:2] + struct.pack(">HHHHH", 0x8180, 1, len(addresses), 0, 0)
        server.sendto(header + query[12 : end + 4] + records, client)

threading.Thread(target=serve_names, daemon=True).start()

class Public(Host):
    def __enter__(self):
        self._server = _Server(("0.0.0.0", 8000), _Handler)
        self._server.host = self
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()
        return self

settings = Settings(MINIATURE, cache_dir=folder / "cache")
with Public({"/a": File(LORA), "/inside": redirect("http://127.0.0.1:8000/a"), "/name": redirect("http://both.test:8000/a"),
             "/metadata": redirect("http://169.254.169.254/latest/meta-data")}) as host:
    assert fetch(settings, "http://fixed.test:8000/a") == LORA
    # Looked up once: what was checked is what is connected to, whatever the name says a moment later.
    asked.clear()
    assert fetch(settings, "http://rebinding.test:8000/a") == LORA
    assert asked == ["rebinding"], asked
    for path in ("rebinding.test:8000/a?again", "both.test:8000/a", "fixed.test:8000/inside", "fixed.test:8000/name",
                 "fixed.test:8000/metadata"):
        for work in (fetch, lambda settings, url: fetch_pictures({"image": Url(url)}, folder / "request", settings)):
            host.seen.clear()
            answers["rebinding"] = ["127.0.0.1"]
            try:
                work(settings, "http://" + path)
            except ValueError as error:
                print(error)
                assert "address of the server's own network" in str(error), error
                assert str(error).endswith("sets WEIGHTS_ALLOW_PRIVATE_HOSTS=1."), error
            else:
                raise AssertionError(path)
            asked_for = ["/" + path.split("/")[1]] if "fixed" in path else []
            assert [request.path for request in host.seen] == asked_for, path
    replaced = replace(settings, allow_private_hosts=True)
    assert fetch(replaced, "http://fixed.test:8000/inside") == LORA
"""


def test_names_and_redirects_that_lead_inside_are_refused_by_the_address_connected_to(tmp_path: Path) -> None:
    alone = ["unshare", "--net", "--mount"]
    if subprocess.run([*alone, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no network of its own can be had")
    (tmp_path / "lora").write_bytes(LORA)
    done = finished([*alone, sys.executable, "-c", PUBLIC_NETWORK, str(tmp_path)])
    assert done.returncode == 0, done.stderr


CERTIFIED = """
import ssl, sys
from dataclasses import replace
from pathlib import Path
from harness.hosts import File, Host, tunnel
from sources.base_models import snapshot
from sources.client import Patience
from settings import MINIATURE, Settings
from weights import WeightsCache

folder = Path(sys.argv[1])
settings = Settings(MINIATURE, cache_dir=folder / sys.argv[2], allow_private_hosts=True)
weights = WeightsCache(settings, Patience(pauses=()))

def fetched(reference):
    with weights.open(reference):
        pass

def refusal(fetch):
    try:
        fetch()
    except ValueError as error:
        return error

with Host({"/a": File((folder / "lora").read_bytes())}) as host:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "certificate", folder / "key")
    host._server.socket = context.wrap_socket(host._server.socket, server_side=True)
    port = host.address.rpartition(":")[2]
    if sys.argv[2] == "trusted":
        with weights.open(f"https://localhost:{port}/a") as opened:
            assert opened.path.read_bytes() == (folder / "lora").read_bytes()
        # A proxy sees which host is meant, and nothing else; it decides whether that may be reached.
        with Host({f"localhost:{port}": tunnel}) as proxy:
            proxied = replace(settings, allow_private_hosts=False, proxies={"https": proxy.address})
            with WeightsCache(proxied, Patience(pauses=())).open(f"https://localhost:{port}/a?proxied") as opened:
                assert opened.path.read_bytes() == (folder / "lora").read_bytes()
            assert [request.path for request in proxy.seen] == [f"localhost:{port}"]
        print(refusal(lambda: fetched(f"https://127.0.0.1:{port}/a")))
    else:
        print(refusal(lambda: fetched(f"https://localhost:{port}/a")))
        mirrored = replace(settings, hf_endpoint=f"https://localhost:{port}")
        print(refusal(lambda: snapshot("owner/model", mirrored, Patience(pauses=()))))
"""


def test_the_certificate_must_be_the_hosts_own(environment: Settings, tmp_path: Path) -> None:
    """Connected to by address, and still checked by name."""
    certificate, _ = self_signed(tmp_path)
    (tmp_path / "lora").write_bytes(LORA)
    invalid = "cannot be fetched: the certificate of {} is not valid: {}"
    unknown = (
        "self-signed certificate; whoever runs the server can name a file with the right authority in SSL_CERT_FILE."
    )
    for trust, authorities, sentences in (
        (
            "trusted",
            {"SSL_CERT_FILE": str(certificate)},
            [invalid.format("127.0.0.1", "IP address mismatch, certificate is not valid for '127.0.0.1'.")],
        ),
        ("unknown", {}, [invalid.format("localhost", unknown)] * 2),
    ):
        done = finished([sys.executable, "-c", CERTIFIED, str(tmp_path), trust], env={**os.environ, **authorities})
        assert done.returncode == 0, done.stderr
        assert [line[line.index("cannot") :] for line in done.stdout.splitlines()] == sentences


@pytest.mark.parametrize("named", ["nowhere", ".", "no-certificates"])
def test_a_file_of_certificates_that_is_none_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: str
) -> None:
    (tmp_path / "no-certificates").write_text("none")
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / named))
    sentence = r"^SSL_CERT_FILE names no file of certificates in PEM that can be read; it must, or be unset\.$"
    with pytest.raises(ValueError, match=sentence):
        trusted_authorities.__wrapped__()  # past what this process knows already


PUBLIC = [
    *("1.1.1.1", "8.8.8.8", "9.255.255.255", "11.0.0.1", "100.63.255.255", "100.128.0.1", "126.1.1.1", "128.0.0.1"),
    *("169.253.255.255", "172.15.0.1", "172.32.0.1", "192.0.0.9", "192.0.0.10", "192.0.1.1", "192.31.196.1"),
    *("192.52.193.1", "192.167.1.1", "192.175.48.1", "198.17.255.255", "198.20.0.1", "203.0.112.1", "223.255.255.255"),
    *("168.63.129.15", "2001:1::1", "2001:1::2", "2001:1::3", "2001:3::1", "2001:4:112::1", "2001:20::1", "2001:30::1"),
    *("2001:200::1", "2001:4860::8888", "2001:db9::1", "2003::1", "2606:4700::1111", "2620:4f:8000::1", "2a00::1"),
    *("3ffe::1", "3fff:1000::1", "::ffff:8.8.8.8", "64:ff9b::8.8.8.8", "2002:808:808::1", "2606:4700::5efe:8.8.8.8"),
]
PRIVATE = [
    *("0.0.0.0", "0.1.2.3", "10.0.0.1", "10.255.255.255", "100.64.0.1", "100.100.100.200", "100.127.255.255"),
    *("127.0.0.1", "127.255.0.1", "169.254.169.254", "172.16.0.1", "172.31.255.255", "192.0.0.1", "192.0.0.8"),
    *("192.0.0.11", "192.0.0.170", "192.0.0.192", "192.0.0.255", "192.0.2.1", "192.88.99.1", "192.88.99.2"),
    *("192.168.0.1", "198.18.0.1", "198.19.255.255", "198.51.100.1", "203.0.113.1", "224.0.0.1", "239.1.1.1"),
    *("240.0.0.1", "255.255.255.255", "168.63.129.16", "::", "::1", "::2", "::127.0.0.1", "::8.8.8.8"),
    *("::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:192.0.0.192", "::ffff:0:127.0.0.1", "64:ff9b::127.0.0.1"),
    *("64:ff9b::a9fe:a9fe", "64:ff9b:1::8.8.8.8", "64:ff9b:2::1", "100::1", "100:0:0:1::1", "200::1", "400::1"),
    *("1fff::1", "2001::1", "2001:0:4136:e378::1", "2001:1::4", "2001:2::1", "2001:5::1", "2001:10::1", "2001:40::1"),
    *("2001:1ff::1", "2001:db8::1", "2002:7f00:1::1", "2002:a9fe:a9fe::1", "2002:c000:c0::1", "3fff::1"),
    *("3fff:fff::1", "4000::1", "5f00::1", "8000::1", "fc00::1", "fd00:ec2::254", "fe80::1", "fe80::1%eth0"),
    *("fec0::1", "fec0::1%2", "feff::1", "ff02::1", "ff0e::1", "2606:4700::1111%eth0"),
    *("2606:4700::5efe:127.0.0.1", "2606:4700::200:5efe:10.0.0.1", "fe80::5efe:8.8.8.8"),
]


@pytest.mark.parametrize("address", PUBLIC)
def test_what_is_reachable_from_everywhere_may_be_asked(address: str) -> None:
    assert is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize("address", PRIVATE)
def test_no_other_address_may_be_asked(address: str) -> None:
    assert not is_public(ipaddress.ip_address(address))
