"""The parts of inputs that are shown and logged."""

import json
import re
import string
import time
from collections.abc import Callable
from urllib.parse import quote, unquote

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.privacy import LOG_CHARACTERS, SHOWN_CHARACTERS, redact_log, secrets_of, show_input
from service.lines import printable
from settings import ROOT
from sources.choices import read_choices
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
    for written in (reference, quote(reference, safe=string.punctuation), quote(reference), unquote(reference)):
        assert not told(redact_log(f"Asked for {written} in vain", known))
        assert not told(redact_log(f"ValueError: {written!r} names no LoRA", known))


def escaped(text: str) -> str:
    """A text as JSON may write it."""
    return "".join(sign if sign.isalnum() else f"\\u{ord(sign):04x}" for sign in text)


# How an input may name LoRAs, also where it is no sum and no JSON that can be read.
FORMS = (
    lambda it: f"{it}*0.5",
    lambda it: f"zorp*2 + {it} + bold",
    lambda it: f"zorp*11 + {it}",
    lambda it: f"{it} + bad!",
    lambda it: f"zorp +\n{it}",
    lambda it: json.dumps([{"path": "zorp"}, {"path": it}]),
    lambda it: json.dumps([{"path": it, "scale": 11}]),
    lambda it: json.dumps([{"path": "zorp", it: 1}]),
    lambda it: json.dumps([{"path": "zorp", "scale": [it], "blocks": {it: 1}}]),
    lambda it: json.dumps([{"path": "zorp", "blocks": {it: 1}}]),
    lambda it: json.dumps([it]),
    lambda it: json.dumps({"path": it}),
    lambda it: f'[{{"path":"{escaped(it)}"}}]',
    lambda it: f'[{{"path":"{escaped(it)}"}},1]',
    lambda it: f'[{{"path":"{escaped(it)}"}}',
    lambda it: f'[{{"path":"{escaped(it)}"}}{" " * SHOWN_CHARACTERS}]',
    lambda it: f'[{{"path":"{escaped(it)}"}}{" " * 100_000}]',
)


def answered(text: str) -> ValueError | None:
    """The error of an input that names LoRAs."""
    try:
        read_choices(text)
    except ValueError as error:
        return error
    return None


@settings(max_examples=500, deadline=None)
@given(references(), st.sampled_from(FORMS))
def test_no_form_of_an_input_tells_a_secret(reference: str, form: Callable[[str], str]) -> None:
    text = form(reference)
    inputs = {"replicate_weights": text}
    assert not told(json.dumps(show_input(inputs)))
    assert not told(redact_log(str(answered(text)), secrets_of(inputs)))


@pytest.mark.parametrize("form", [form for form in FORMS if len(form("")) < SHOWN_CHARACTERS])
@pytest.mark.parametrize("address", ["https://user:S3cretly@h.com/a", "<hf.co/a/b?token=S3cretly>"])
def test_what_an_address_keeps_secret_is_known_whatever_form_names_it(address: str, form: Callable[[str], str]) -> None:
    known = secrets_of({"replicate_weights": form(address)})
    assert redact_log("Asked with S3cretly", known) == "Asked with "


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


@pytest.mark.parametrize(
    "name",
    [
        "hf_api_token",
        "civitai_api_token",
        "password",
        "API_KEY",
        "api-key",
        "apikey",
        "Authorization",
        "pwd",
        "passphrase",
        "secrets",
        "api_tokens",
    ],
)
def test_an_input_that_is_a_secret_is_not_shown(name: str) -> None:
    for value in ("s3cret", ["s3cret"], {"v": "s3cret"}):
        assert show_input({name: value, "prompt": "a fox"}) == {name: "***", "prompt": "a fox"}
        assert show_input({"auth": {name: value}}) == {"auth": {name: "***"}}
    for value in ("", None, True, [], {}):
        assert show_input({name: value}) == {name: value}
    assert show_input({"password": [1], "token": 1}) == {"password": "***", "token": "***"}


def test_numbers_of_tokens_are_shown() -> None:
    inputs = {"max_tokens": 100, "token_count": 3, "tokens": 2.5, "token_count_text": "a", "monkey": "a", "design": "a"}
    assert show_input(inputs) == inputs


def test_every_input_of_the_predictor_is_shown() -> None:
    (method,) = re.findall(r"def predict\(.*?\) ->", (ROOT / "predict.py").read_text(), re.DOTALL)
    inputs = dict.fromkeys(re.findall(r"^        (\w+):", method, re.MULTILINE), "a")
    assert {"prompt", "seed", "replicate_weights"} <= inputs.keys()
    assert show_input(inputs) == inputs


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ("artist:@greg", "The artist failed with @greg"),
        ("data:science, art", "A party of art"),
        ("data:,art", "A party of art"),
        ("https://greg:123456@host", "Asked greg for it"),
        ("https://host/?a=12345", "Has 12345 lines"),
    ],
)
def test_no_word_is_taken_for_a_secret(inputs: str, said: str) -> None:
    assert redact_log(said, secrets_of({"prompt": inputs})) == said


def test_a_log_has_no_part_of_what_an_address_keeps_secret() -> None:
    known = secrets_of(["https://u:S3cretly@host/a?token=abc/def", "https://T0kenOfMine:@host"])
    assert redact_log("Asked u:S3cretly@host, S3cretly, T0kenOfMine", known) == "Asked host, , "
    assert redact_log("GET /a?token=abc/def", known) == "GET /a"


@pytest.mark.parametrize("secret", ['pw"12\\34', "pässwörd", "pw\t1234", "pw\x851234", "pw\u30001234", "pw\n1234"])
def test_a_secret_is_known_however_it_is_written(secret: str) -> None:
    known = secrets_of({"image": f"https://u:{secret}@h.com/x.png"})
    packed = [json.dumps(secret, ensure_ascii=ascii)[1:-1] for ascii in (True, False)]
    dropped = re.sub(r"[\t\r\n]", "", secret)  # as urllib does
    for written in (secret, *packed, repr(secret)[1:-1], quote(secret, safe=""), printable(secret), dropped):
        for text in (f"GET https://u:{written}@h.com/x.png", f"wrong: {written} there"):
            assert written not in redact_log(text, known)
