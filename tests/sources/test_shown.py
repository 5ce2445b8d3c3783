"""Addresses are shown without user, password, query and fragment, in any way of writing them."""

import re
import time
from collections.abc import Callable
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.lines import printable
from sources.references import Url, parse, parse_picture
from sources.shown import hidden, hide_tokens, host_of, is_reference, redact, redact_text
from tests.support.secrets import WITHIN, escaped, logins, queries, references, told

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
    "zorp + data:,s3cret or data:;x=y,s3cret": "zorp + data:*** or data:***",
}
INNOCENT = (
    "a cat? yes",
    "Email me at a@b.com, or at me.too@example.co.uk",
    "ratio 16:9 @ f/2.8, 16:9@24fps",
    "a cat/dog? maybe; or 3.5/4? c/o x@y",
    "TOK, person:1.2, (red:1.3), [fox:hen:0.5], <lora:pixar:0.8>",
    r"a window of C:\Users\me\x.png and \\server\share",
    "# Title\n\n**bold** [x](y) [me](mailto:a@b.com) #tag @artist",
    "50% off; R&D = 5, Q: what? A: that",
    "see https://example.com/a.png and //host/b",
    "node_modules/@scope/pkg@1.2.3",
    "at 10:30, @me said :@",
    "meet me at 10:30@cafe/bar, ratio 16:9@2x/4k",
    "artist:@greg, npm:@scope/pkg",
    "docker.io/library/x:tag@sha256:abc",
    "data: a cat, a dog",
    "data: a table of values, 3 rows",
    "secret=recipe of grandma, signature=style of Picasso, a token=of appreciation",
    "hf_style_illustrations_retro, sk_some_trigger_word_for_lora, civitai-style-illustration-of-a-fox",
    "api-design-patterns-illustrated-poster, a bearer of-many-things",
    "why?",
    "",
)
HARMLESS = (
    "fofr/flux-pixar-cars",
    "owner/name:0123456789abcdef",
    "owner/name/0123456789abcdef",
    "huggingface.co/a/b",
    "https://huggingface.co/a/b/resolve/main/x@2.safetensors",
    "huggingface.co/a/b/tree/refs%2Fpr%2F1/a%20folder",
    "https://civitai.com/models/1/a-name",
    "urn:air:flux1:lora:civitai:123@456",
    "air:flux1:lora:civitai:123@456.safetensors",
    "civitai:1@2",
    "http://127.0.0.1:8000/x@2.safetensors",
    "https://host:8080/a.safetensors",
    "https://medium.com/@somebody/picture",
    "zorp",
    "local:styles/ink",
    "local:styles/v1.5/ink-2",
)


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


PIECES = """a | [ mailto: urn:air: 1: 1:2@3 a:1@2 pk- token= %25%25 a:// u: : @ %40 %25 ?
# ; / // a: http: http:// https: ?a ?a= :// ::@ a. a.b/ a:b@ //a.b/c@ //a:b@c/ data: data:,a,"""


@pytest.mark.parametrize("piece", [*PIECES.split(), " a:b", "//a:b@c?d ", "data:,a ", "-", "token token=", "1:1@1a "])
def test_showing_takes_time_in_proportion_to_the_text(piece: str) -> None:
    text = piece * (50_000 // len(piece))
    for end in ("", " x", "u:p@a", "@a.b/c?d"):
        for show in (redact, redact_text, is_reference):
            started = time.process_time()
            show(f"{text}{end}")
            assert time.process_time() - started < 1


# Some of each kind, and all that is neither a letter nor a digit.
CHARACTERS = [character for character in map(chr, range(32, 127)) if not character.isalnum() or character in "afxF02"]


@pytest.mark.parametrize("first", CHARACTERS)
def test_no_two_characters_again_and_again_take_longer(first: str) -> None:
    for second in CHARACTERS:
        text = (first + second) * 5000
        for show in (redact, redact_text, hide_tokens):
            started = time.process_time()
            show(f"{text}@a.b/c?d")
            assert time.process_time() - started < 0.15, second


def answered(read: Callable[[str], object], reference: str) -> object:
    """A reference's meaning, or the error of an invalid one."""
    try:
        return read(reference)
    except ValueError as error:
        return error


@settings(max_examples=400, deadline=None)
@given(references())
def test_no_reference_is_shown_with_its_secret(reference: str) -> None:
    assert not told(redact(reference))
    for read in (parse, partial(parse_picture, "image")):
        answer = answered(read, reference)
        assert not told((answer, repr(answer), getattr(answer, "name", "")))
        if isinstance(answer, Url):
            assert not told(host_of(answer.url))


@settings(max_examples=400, deadline=None)
@given(st.one_of(logins(), queries(), escaped()))
def test_within_a_text_no_address_is_shown_with_its_secret(reference: str) -> None:
    assert not told(redact_text(f"a fox as in {reference} please"))
    assert not told(redact_text(f"a fox\n({reference})"))


TOKENS = (
    "hf_AbcdefghijklmnopqrstuvwxyzABCDEFGH",
    "r8_abcdefghijklmnopqrstuvwxyz0123456789A",
    "github_pat_11ABCDEFG0123456789_abcdefghij",
    *(f"gh{kind}_abcdefghijklmnop0123456789ABCDEFGHIJ" for kind in "pousr"),
    "glpat-abcdefgh-ABCDEFGH1234",
    *(f"xox{kind}-123456789012-abcdefABCDEF" for kind in "abp"),
    "npm_abcdefghijklmnopqrstuvwxyz0123456789",
    "AKIAIOSFODNN7EXAMPLE",
    "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.abc-DEF_123",
    "Bearer abcDEF123",
    "sig=abcDEF123",
    "token=abcDEF123",
    "api-key=abcDEF123",
    "Signature%3DabcDEF123",
    "a%3Bsig%3DabcDEF123",
    "passphrase=abc123",
)


@pytest.mark.parametrize("token", TOKENS)
def test_a_token_is_not_shown(token: str) -> None:
    shown = redact_text(f"with {token} in it")
    assert shown.startswith("with ")
    assert shown.endswith("*** in it")
    assert not any(part in shown for part in re.findall(r"[A-Za-z]+\d\w*|[A-Z]{3,}", token[4:]))


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("camera:Sony@85mm here", "85mm here"),
        ("style:anime/@artist", "artist"),
        ("(example.com/a?b", "(example.com/a"),
        ("-a.b/x?y", "-a.b/x"),
        ("..a.b/x?q", "..a.b/x"),
        ("(localhost/x?y", "(localhost/x"),
    ],
)
def test_of_a_word_without_a_scheme_the_rest_is_shown(text: str, shown: str) -> None:
    assert redact_text(text) == shown


@pytest.mark.parametrize("blank", WITHIN)
def test_what_is_hidden_is_told_as_it_stands_in_the_reference(blank: str) -> None:
    assert hidden(f"https://u:pw{blank}Secret9@h.com/x?a{blank}b") == [f"u:pw{blank}Secret9@", f"?a{blank}b"]


@pytest.mark.parametrize("text", ["data: a table of values, 3 rows", "data:science, art", "data: a/b testing, c"])
def test_a_prompt_about_data_is_no_file(text: str) -> None:
    assert not is_reference(text)
    assert redact(text) == text
    assert is_reference("data:image/png;base64, aGk=")


@pytest.mark.parametrize("text", INNOCENT)
def test_what_is_no_secret_stays(text: str) -> None:
    assert redact_text(text) == redact_text(f"{text} ").removesuffix(" ") == text


@pytest.mark.parametrize("reference", HARMLESS)
def test_a_reference_without_a_secret_stays(reference: str) -> None:
    assert redact(reference) == redact_text(f"as in {reference} there")[6:-6] == reference
    assert is_reference(reference) or "/" not in reference


@pytest.mark.parametrize("around", ['"{}"', "'{}'", "“{}”", "‘{}’", "`{}`", "<{}>", '"<{}>"', " \ufeff'{}'\n"])
def test_what_is_quoted_is_a_reference_too(around: str) -> None:
    for reference in ("https://u:p s3cret@host/my lora?token=s3cret", "data:;base64, s3cret", "host.com/a b#s3cret"):
        text = around.format(reference)
        assert is_reference(text)
        assert "s3cret" not in redact(text)
        assert "s3cret" in "".join(hidden(text))
    for name in ("local:my styles/deep ink", "zorp"):
        assert redact(around.format(name)) == printable(around.format(name).replace("\n", " "))
