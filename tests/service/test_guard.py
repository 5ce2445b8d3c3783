"""Which requests may be a foreign page's: every refusal in words, and none of this machine's clients refused."""

import ipaddress
from collections.abc import Sequence

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from service.guard import find_fault

HOSTS = (
    "127.0.0.1", "127.0.0.1:8000", "127.0.0.1:80", "127.255.0.9:65535", "localhost", "LocalHost:8000", "localhost.",
    "localhost.:8000", "[::1]", "[::1]:8000",
)  # fmt: skip
NO_HOSTS = (
    "", ":8000", "localhost:", "localhost:0", "localhost:08000", "localhost:-1", "localhost:8000:8000",
    "localhost:\uff18\uff10", "localhost:http", "localhost..", ".localhost", "a.localhost", "localhost.evil.example",
    "localhost:80.evil.example", "localhost\n", " localhost", "localhost,localhost", "localhost/", "http://localhost",
    "user@localhost", "localhost@evil.example", "localhost:80@evil.example", "localhost%00", "localho\u017ft",
    "1ocalhost", "localhost6", "127.0.0.1.nip.io", "127.0.0.1.", "127.0.0.1:", "127.0.0.256", "127.0.0.01",
    "127.0.0.\u0661", "127.1", "0x7f.0.0.1", "0x7f000001", "0177.0.0.1", "2130706433", "128.0.0.1", "0.0.0.0",
    "10.0.0.1", "1127.0.0.1", "127.0.0.1.1", "::1", "[::1", "::1]", "[::]", "[::2]", "[::1%lo]", "[::ffff:127.0.0.1]",
    "[::ffff:7f00:1]", "[0:0:0:0:0:0:0:1]", "[localhost]", "rebound.example", "rebound.example:8000",
    "rebound.example127.0.0.1",
)  # fmt: skip


def fault_of(*headers: tuple[str, str], host: str = "127.0.0.1:8000", form: bool = False) -> str | None:
    """The status and the sentence of a refusal; None if the request passes."""
    fault = find_fault([("host", host), *headers], form=form)
    return fault and "{} {}".format(*fault)


@pytest.mark.parametrize("host", HOSTS)
def test_loopback_is_answered_by_any_of_its_names(host: str) -> None:
    assert fault_of(host=host) is None


@pytest.mark.parametrize("host", NO_HOSTS)
def test_another_host_is_refused(host: str) -> None:
    right = "it must be localhost, [::1] or 127.0.0.1, with or without a port."
    assert fault_of(host=host) == f"403 Host is {host!r}; {right}"


@given(
    st.sampled_from(HOSTS),
    st.text(st.one_of(st.sampled_from("[]:.,@%0127xfloca"), st.characters()), max_size=6),
    st.integers(0, 20),
    st.integers(0, 20),
)
@example("127.0.0.1", "", 0, 0)
@example("localhost", "", 0, 9)
def test_no_host_passes_that_is_not_loopback(host: str, put: str, begin: int, end: int) -> None:
    """Hosts that differ from a passing one in any part."""
    host = host[:begin] + put + host[end:]
    passes = fault_of(host=host) is None
    name, _, port = host.rpartition(":") if not host.endswith("]") and ":" in host else (host, "", "80")
    try:
        inside = name[1:-1] if name.startswith("[") and name.endswith("]") else name
        loopback = ipaddress.ip_address(inside).is_loopback and (":" in inside) == (inside != name)
    except ValueError:
        loopback = name.lower() in ("localhost", "localhost.") and name.isascii()
    assert not passes or (loopback and port.isdecimal() and port.isascii())


@given(st.ip_addresses(v=4, network="127.0.0.0/8"), st.integers(1, 65_535))
def test_every_address_of_loopback_passes(address: ipaddress.IPv4Address, port: int) -> None:
    assert fault_of(host=f"{address}:{port}") is None


def test_a_missing_host_and_several_are_refused() -> None:
    assert find_fault([]) == find_fault([("host", "")])
    twice = find_fault([("Host", "localhost"), ("host", "localhost")])
    assert twice is not None
    assert "'localhost,localhost'" in twice[1]
    assert find_fault([("HOST", "localhost")]) is None


def test_a_long_value_is_cut() -> None:
    for header in ("host", "origin", "content-type"):
        headers = {"host": "localhost", "content-length": "1", header: "a" * 60_000}
        fault = find_fault(headers.items())
        assert fault is not None
        assert len(fault[1]) < 200


@pytest.mark.parametrize(
    ("host", "origin"),
    [
        ("127.0.0.1:8000", "http://127.0.0.1:8000"),
        ("127.0.0.1:8000", "https://127.0.0.1:8000"),
        ("localhost:8000", "http://localhost:8000"),
        ("localhost.:8000", "http://localhost.:8000"),
        ("[::1]:8000", "http://[::1]:8000"),
        ("localhost", "http://localhost"),
        ("localhost:80", "http://localhost"),
        ("localhost", "http://localhost:80"),
        ("localhost:443", "https://localhost"),
    ],
)
def test_a_page_of_this_host_is_answered(host: str, origin: str) -> None:
    assert fault_of(("origin", origin), host=host) is None


@pytest.mark.parametrize(
    ("host", "origins"),
    [
        ("127.0.0.1:8000", [""]),
        ("127.0.0.1:8000", ["null"]),
        ("127.0.0.1:8000", ["http://evil.example"]),
        ("127.0.0.1:8000", ["http://127.0.0.1:3000"]),
        ("127.0.0.1:8000", ["http://127.0.0.1"]),
        ("127.0.0.1:8000", ["http://localhost:8000"]),
        ("127.0.0.1:8000", ["http://127.0.0.1:8000.evil.example"]),
        ("127.0.0.1:8000", ["http://evil.example@127.0.0.1:8000"]),
        ("127.0.0.1:8000", ["http://127.0.0.1:8000/"]),
        ("127.0.0.1:8000", ["ftp://127.0.0.1:8000"]),
        ("127.0.0.1:8000", ["127.0.0.1:8000"]),
        ("127.0.0.1:8000", ["chrome-extension://127.0.0.1:8000"]),
        ("127.0.0.1:8000", ["http://127.0.0.1:8000", "http://127.0.0.1:8000"]),
        ("127.0.0.1:8000", ["http://127.0.0.1:8000", "http://evil.example"]),
        ("localhost", ["https://localhost:80"]),
        ("localhost:80", ["https://localhost"]),
        ("localhost:8080", ["http://localhost:80"]),
    ],
)
def test_a_page_of_another_origin_is_refused(host: str, origins: Sequence[str]) -> None:
    said = f"403 Origin is {','.join(origins)!r}; it must be that of Host, http://{host}, or absent."
    assert fault_of(*(("origin", origin) for origin in origins), host=host) == said


@pytest.mark.parametrize("length", [("content-length", "2"), ("transfer-encoding", "chunked")])
@pytest.mark.parametrize(
    ("kinds", "taken"),
    [
        (["application/json"], True),
        (["application/json; charset=utf-8"], True),
        (["Application/JSON;charset=utf-8"], True),
        ([], False),
        ([""], False),
        (["text/plain"], False),
        (["text/plain;charset=UTF-8"], False),
        (["text/plain;application/json"], False),
        (["text/plain", "application/json"], False),
        (["application/json", "text/plain"], False),
        (["application/x-www-form-urlencoded"], False),
        (["multipart/form-data; boundary=application/json"], False),
        (["application/jsonp"], False),
        (["application/json+x"], False),
        (["text/json"], False),
    ],
)
def test_a_body_is_json_and_says_so_or_is_a_form_where_one_is_due(
    length: tuple[str, str], kinds: Sequence[str], taken: bool
) -> None:
    headers = [length, *(("content-type", kind) for kind in kinds)]
    said = f"415 Content-Type is {','.join(kinds)!r}; it must be application/json."
    assert fault_of(*headers) == (None if taken else said)
    assert fault_of(*headers, form=True) is None


@pytest.mark.parametrize("headers", [[], [("content-length", "0")], [("content-type", "text/plain")]])
def test_without_a_body_any_type_will_do(headers: Sequence[tuple[str, str]]) -> None:
    assert fault_of(*headers) is None


def test_a_form_has_the_same_host_and_origin() -> None:
    assert fault_of(host="rebound.example", form=True) is not None
    assert fault_of(("origin", "http://evil.example"), form=True) is not None
