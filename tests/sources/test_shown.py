"""What people see of addresses: never a user, a password, a query or a fragment, however the address is written."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sources.shown import redact, redact_text

ADDRESSES = {
    "https://host/a.safetensors": "https://host/a.safetensors",
    "https://host:8080/a.safetensors?token=s3cret#s3cret": "https://host:8080/a.safetensors",
    "https://s3cret:s3cret@host/a": "https://host/a",
    "https://s3cret@host/a": "https://host/a",
    "HTTPS://s3cret:s3cret@host": "HTTPS://host",
    "http://host#s3cret": "http://host",
    "http://host?s3cret": "http://host",
    "//s3cret:s3cret@host/a?s3cret": "//host/a",
    "http:s3cret:s3cret@host/a": "http:host/a",
    "http:/s3cret:s3cret@host/a": "http:/host/a",
    "http:\\\\s3cret:s3cret@host\\a?s3cret": "http:\\\\host\\a",
    "http:////s3cret:s3cret@host/a": "http:////host/a",
    "s3://s3cret:s3cret@bucket/a": "s3://bucket/a",
    "http://s3cret:s3c@ret@host/a": "http://host/a",
    "http://[::1]:80/a?s3cret": "http://[::1]:80/a",
    "http://s3cret:s3cret@[::1]/a": "http://[::1]/a",
    # The host cannot be told from a password.
    "http://[x:y": "http://***",
    "//[a://b": "//***//b",
    "http://s3cret:s3cret": "http://***",
    "http://s3cret:p?s3cret@host/": "http://***",
    "http://a/http://s3cret:s3cret@host/b": "http://a/http://host/b",
    "s3cret:s3cret@host/a": "host/a",
    "civitai.com/models/1?token=s3cret": "civitai.com/models/1",
    "urn:air:flux1:lora:civitai:1@2": "urn:air:flux1:lora:civitai:1@2",
    "owner/name:version": "owner/name:version",
    "": "",
}
TEXTS = {
    "a red fox": "a red fox",
    "what is this? a fox, 50% @ 10:30, me@example.com": "what is this? a fox, 50% @ 10:30, me@example.com",
    "from http://s3cret@a/b?s3cret and https://s3cret:s3cret@c/d#s3cret, both": "from http://a/b and https://c/d both",
    "see (http://a/b?s3cret) or //s3cret:s3cret@c": "see (http://a/b or //c",
    "Max retries with url: /a.png?token=s3cret (host)": "Max retries with url: /a.png (host)",
    "s3cret:s3cret@host.com and http:s3cret:s3cret@host": "host.com and http:host",
}


@pytest.mark.parametrize(("address", "shown"), ADDRESSES.items())
def test_an_address_is_shown_without_secrets(address: str, shown: str) -> None:
    assert redact(address) == shown
    assert redact(f"{address} s3cret") in (f"{shown} s3cret", shown)  # a space is part of an address


@pytest.mark.parametrize(
    "address", ["http://s3cret s3cret:s3cret@host/a", "http://host/a?a=b s3cret", "http://s3cret\n@h"]
)
def test_a_space_does_not_end_an_address(address: str) -> None:
    assert "s3cret" not in redact(address)


@pytest.mark.parametrize(("text", "shown"), TEXTS.items())
def test_a_text_is_shown_without_secrets(text: str, shown: str) -> None:
    assert redact_text(text) == shown


@given(st.text(st.sampled_from("ab1:/@?#[]\\ .%=-\n\ud800\0é") | st.characters()))
def test_whatever_is_shown_it_raises_nothing(text: str) -> None:
    redact(text)
    redact_text(text)
    assert "s3cret" not in redact_text(f"{text} http://s3cret:s3cret@host/?s3cret")


@pytest.mark.parametrize(
    "piece",
    ["a", ":", "@", "/", "//", "a:", "http:", "http://", "https:", "?a", "?a=", "://", "::@", " a:b", "//a:b@c?d "],
)
def test_showing_takes_time_in_proportion_to_the_text(piece: str) -> None:
    text = piece * (400_000 // len(piece))
    for show in (redact, redact_text):
        started = time.process_time()
        show(text)
        assert time.process_time() - started < 3
