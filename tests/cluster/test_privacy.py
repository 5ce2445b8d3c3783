"""What is shown and logged of an input."""

import json
import re
import string
import time
from urllib.parse import quote, unquote

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.privacy import LOG_CHARACTERS, SHOWN_CHARACTERS, redact_log, secrets_of, show_input
from tests.support.secrets import logins, queries, references, told


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("a fox", "a fox"),
        (3, 3),
        (None, None),
        ("owner/name", "owner/name"),
        ("https://host/a.safetensors?token=s3cret#x", "https://host/a.safetensors"),
        ("https://user:pass@host/a", "https://host/a"),
        ("civitai.com/models/1?token=s3cret", "civitai.com/models/1"),
        ("a fox as in https://user:pass@host/a?token=s3cret please", "a fox as in https://host/a please"),
        ("use hf_abcdefghijklmnopqrstuvwxyz now", "use *** now"),
        ({"a": ["https://host/?b=c"]}, {"a": ["https://host/"]}),
        ("//[a://b", "//***//b"),
        ("http://[x", "http://[x"),
    ],
)
def test_an_input_is_shown_without_what_gives_access(value: object, shown: object) -> None:
    assert show_input(value) == shown


def test_a_file_is_shown_by_its_hash() -> None:
    first, second = show_input("data:image/png;base64,aGVsbG8="), show_input("DATA:image/png;base64,aGVsbG9=")
    assert first.startswith("data:image/png;base64,sha256-")
    assert second.startswith("DATA:image/png;base64,sha256-")
    assert first.lower() != second.lower()
    assert "aGVsbG8" not in first


def test_of_a_long_text_the_beginning_is_shown() -> None:
    shown = show_input("a fox " * 10**6)
    assert shown.startswith("a fox a fox ")
    assert shown.endswith(" fox a … (6000000 characters)")
    assert len(shown) <= SHOWN_CHARACTERS + 30


@pytest.mark.parametrize("secret", ["hf_" + "s3cret" * 10, "http://s3cret:s3cret@host", "http://host?a=s3cret"])
def test_a_text_is_not_cut_within_a_secret(secret: str) -> None:
    for start in range(SHOWN_CHARACTERS - len(secret) - 2, SHOWN_CHARACTERS + 2):
        assert "s3cret" not in show_input("a" * (start - 1) + " " + secret + " a" * SHOWN_CHARACTERS)


def test_a_log_does_not_repeat_what_an_input_keeps_secret() -> None:
    known = secrets_of({"image": "https://user:pass@host/a.png?token=s3 cret#x", "prompt": "a fox? a hen", "steps": 3})
    for text in ("url: /a.png?token=s3 cret (host)", "url: /a.png?token=s3%20cret (host)", "user:pass@host said"):
        assert not {"s3", "pass"} & set(redact_log(text, known).replace("=", " ").replace("%", " ").split())
    assert redact_log("Asked for a fox? a hen", known) == "Asked for a fox? a hen"
    assert redact_log("with hf_abcdefghijklmnopqrstuvwxyz, http://a/?b", known) == "with ***, http://a/"


def test_of_a_long_log_the_end_is_kept() -> None:
    kept = redact_log("a line\n" * 10**6 + "the end", ())
    assert kept.endswith("a line\nthe end")
    assert kept.startswith("(68")
    assert len(kept) < LOG_CHARACTERS + 100


def test_hostile_inputs_take_time_in_proportion() -> None:
    many = ",".join(f"http://{number}:{number}@a" for number in range(10_000))
    for text in ("http://a:b@c?d " * 10**6, "a" * 10**7, "@:/" * 10**6, "http:" * 10**6, "/" * 10**6 + " a", many * 10):
        started = time.process_time()
        show_input(text)
        parts = [text[start : start + 19_000] for start in range(0, len(text[:2_000_000]), 20_000)]
        redact_log(text, secrets_of({"prompt": text, "images": parts}))
        assert time.process_time() - started < 3


@settings(max_examples=300, deadline=None)
@given(references())
def test_a_secret_of_a_reference_is_in_no_list_no_log_and_no_error(reference: str) -> None:
    inputs = {"prompt": "a fox", "replicate_weights": reference, "more": [{"image": [reference]}], reference: 1}
    assert not told(json.dumps(show_input(inputs)))
    known = secrets_of(inputs)
    for written in (reference, quote(reference, safe=string.punctuation), unquote(reference)):
        assert not told(redact_log(f"Asked for {written} in vain", known))
        assert not told(redact_log(f"ValueError: {written!r} names no LoRA", known))


@settings(max_examples=200, deadline=None)
@given(logins() | queries(), st.integers(-120, 60))
def test_no_secret_is_told_where_a_long_text_is_cut(reference: str, start: int) -> None:
    prompt = "a" * (SHOWN_CHARACTERS + start - 1) + f" {reference}" + " fox" * 100
    assert not told(show_input(prompt))
    assert not told(show_input(f"{reference} " + "fox " * SHOWN_CHARACTERS))


@pytest.mark.parametrize(
    "uri",
    ["{}", " {}", "\n{}", "\xa0{}", "\ufeff{}", "{} "],
)
@pytest.mark.parametrize(
    "header", ["data:image/png;base64", "DATA: image/png;base64", "data:image/png ;base64", "data:"]
)
def test_whatever_is_read_as_a_data_uri_is_shown_by_its_hash(uri: str, header: str) -> None:
    shown = show_input(uri.format(f"{header},aGVsbG8="))
    assert re.fullmatch(r"(data|DATA):(image/png)?(;base64)?,sha256-[0-9a-f]{16}", shown)
    assert shown != show_input(uri.format(f"{header},aGVsbG9="))


@pytest.mark.parametrize("name", ["hf_api_token", "civitai_api_token", "password", "API_KEY"])
def test_an_input_that_is_a_secret_is_not_shown(name: str) -> None:
    assert show_input({name: "s3cret", "prompt": "a fox"}) == {name: "***", "prompt": "a fox"}
    assert show_input({name: ""}) == {name: ""}
