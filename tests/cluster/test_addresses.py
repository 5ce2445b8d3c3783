"""The beginning of the addresses of predictions and files, and the headers and settings that decide it."""

import re

import pytest

pytest.importorskip("ray", reason="the cluster needs cluster/requirements.txt")

from starlette.requests import Request

from cluster.addresses import Addresses
from cluster.settings import ClusterSettings

FORWARDED = {"Host": "front:8000", "X-Forwarded-Host": "example.com", "X-Forwarded-Proto": "https"}


def settings(**variables: str) -> ClusterSettings:
    return ClusterSettings.from_environment(variables)


def base(headers: dict[str, str], client: str = "10.0.0.1", **variables: str) -> str:
    chosen = settings(**variables)
    scope = {
        "type": "http",
        "scheme": "http",
        "headers": [(name.lower().encode(), value.encode("latin-1")) for name, value in headers.items()],
        "client": (client, 5),
        "server": ("127.0.0.1", 8000),
    }
    return Addresses(chosen.public_url, chosen.trusted_proxies).base(Request(scope))


@pytest.mark.parametrize(
    ("proxies", "client", "believed"),
    [
        ("", "127.0.0.1", False),
        ("10.0.0.1", "10.0.0.1", True),
        ("10.0.0.2", "10.0.0.1", False),
        ("192.168.0.0/16, 10.0.0.0/8", "10.1.2.3", True),
        ("192.168.0.0/16", "10.1.2.3", False),
        ("10.0.0.0/8", "::ffff:10.1.2.3", True),
        ("::ffff:10.0.0.0/104", "10.1.2.3", True),
        ("fd00::/8", "fd00::1", True),
        ("fd00::/8", "10.0.0.1", False),
        ("fe80::/10", "fe80::1%eth0", True),
        ("0.0.0.0/0", "::1", False),
    ],
)
def test_only_trusted_proxies_say_how_they_were_reached(proxies: str, client: str, believed: bool) -> None:
    expected = "https://example.com" if believed else "http://front:8000"
    assert base(FORWARDED, client, TRUSTED_PROXIES=proxies) == expected


@pytest.mark.parametrize("url", ["https://example.org", "http://[::1]:8000", "https://example.org/flux/1"])
def test_the_public_url_wins(url: str) -> None:
    for headers in (FORWARDED, {"Host": "[x"}, {}):
        assert base(headers, PUBLIC_URL=url, TRUSTED_PROXIES="10.0.0.1") == url
        assert base(headers, PUBLIC_URL=url + "/") == url


def test_of_several_proxies_the_last_is_believed() -> None:
    headers = {"X-Forwarded-Host": "evil.com, example.com", "X-Forwarded-Proto": "http,https", "Host": "front"}
    assert base(headers, TRUSTED_PROXIES="10.0.0.1") == "https://example.com"


def test_without_a_host_the_address_counts_that_was_connected_to() -> None:
    assert base({}) == base({"Host": ""}) == "http://127.0.0.1:8000"


@pytest.mark.parametrize(
    "host",
    [
        "[x",
        "a b",
        "a@b",
        "a/b",
        "a?b",
        "a,b",
        "a" * 300,
        "\xff",
        "a:0",
        "a:99999",
        "a:1:2",
        "a:b",
        ".",
        "\x00",
        "[::1]x",
    ],
)
def test_what_is_no_host_is_refused(host: str) -> None:
    with pytest.raises(
        ValueError, match=r"^Host is .*; it must be a host's name or address, such as example\.com:8000\.$"
    ):
        base({"Host": host})
    with pytest.raises(ValueError, match=r"^X-Forwarded-Proto is 'gopher'; it must be http or https\.$"):
        base({"Host": "a", "X-Forwarded-Proto": "gopher"}, TRUSTED_PROXIES="10.0.0.0/8")


@pytest.mark.parametrize(
    ("variable", "value", "sentence"),
    [
        ("PUBLIC_URL", "example.com", "PUBLIC_URL is 'example.com'; it must be an http or https URL"),
        ("PUBLIC_URL", "ftp://example.com", "PUBLIC_URL is 'ftp://example.com'; it must be an http or https URL"),
        ("PUBLIC_URL", "https://u:s3cret@example.com?a", "PUBLIC_URL is 'https://example.com'; it must be"),
        ("PUBLIC_URL", "https://example.com/?a=b", "PUBLIC_URL is 'https://example.com/'; it must be"),
        ("PUBLIC_URL", "https://", "PUBLIC_URL is 'https://'; it must be"),
        ("PUBLIC_URL", "https://a b", "PUBLIC_URL is 'https://a b'; it must be"),
        ("PUBLIC_URL", "https://[a", "PUBLIC_URL is "),
        ("TRUSTED_PROXIES", "10.0.0.1, proxy", "TRUSTED_PROXIES has 'proxy'; it must have addresses and networks"),
        ("TRUSTED_PROXIES", "10.0.0.1/8", "TRUSTED_PROXIES has '10.0.0.1/8'; it must have addresses and networks"),
        (
            "BODY_MAX_MB",
            "many",
            "BODY_MAX_MB is 'many'; it must be a number of MiB above 0 and up to 512, such as 100.",
        ),
        ("BODY_MAX_MB", "0", "BODY_MAX_MB is '0'; it must be a number"),
        ("BODY_MAX_MB", "-1", "BODY_MAX_MB is '-1'; it must be a number"),
        ("BODY_MAX_MB", "nan", "BODY_MAX_MB is 'nan'; it must be a number"),
        ("BODY_MAX_MB", "513", "BODY_MAX_MB is '513'; it must be a number"),
        ("OUTPUTS", "urls", "OUTPUTS is 'urls'; it must be url or data."),
        ("WEBHOOKS_ALLOW_PRIVATE_HOSTS", "yes", "WEBHOOKS_ALLOW_PRIVATE_HOSTS is 'yes'; it must be 0 or 1."),
    ],
)
def test_a_wrong_setting_is_refused_in_a_sentence(variable: str, value: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}") as refused:
        settings(**{variable: value})
    assert "s3cret" not in str(refused.value)


def test_an_empty_setting_counts_as_unset() -> None:
    chosen = settings(BODY_MAX_MB="", PUBLIC_URL=" ", TRUSTED_PROXIES=" , ", WEBHOOKS_ALLOW_PRIVATE_HOSTS=" ")
    assert (chosen.body_max_bytes, chosen.public_url, chosen.trusted_proxies) == (100 * 1024**2, None, ())
    assert settings(OUTPUTS=" ").outputs is None
    assert (chosen.private_webhooks, settings(WEBHOOKS_ALLOW_PRIVATE_HOSTS="1").private_webhooks) == (False, True)
    assert settings(BODY_MAX_MB="0.5").body_max_bytes == 512 * 1024
