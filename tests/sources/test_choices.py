"""Inputs that name LoRAs: one, a sum, or JSON, each with its strength. No host is contacted."""

import json
import re
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from request import LoraChoice
from settings import ROOT
from sources.choices import identities, read_choices, read_own_choices, references, rewrite
from sources.references import parse
from sources.shown import redact
from tests.support import secrets
from tests.support.secrets import told

JSON = '[{"path": "zorp", "scale": 0.8, "clip": 0.4, "blocks": {"double_blocks.0-6": 0.5, "single_blocks": 0}}]'
EIGHT = " + ".join(["zorp"] * 8)
SUMS = [
    ("zorp", [("zorp", 1)]),
    ("zorp*0.8", [("zorp", 0.8)]),
    ("zorp*.5", [("zorp", 0.5)]),
    ("zorp*-1", [("zorp", -1)]),
    ("zorp * 2.", [("zorp", 2)]),
    (
        "fofr/pixar-cars*0.8 + huggingface.co/a/b*0.5 + zorp",
        [("fofr/pixar-cars", 0.8), ("huggingface.co/a/b", 0.5), ("zorp", 1)],
    ),
    ("  zorp  +\xa0bold*0\t+\r\ndusk \n", [("zorp", 1), ("bold", 0), ("dusk", 1)]),
    ("local:styles/ink*0.4 + civitai.com/models/1", [("local:styles/ink", 0.4), ("civitai.com/models/1", 1)]),
    (EIGHT, [("zorp", 1)] * 8),
    # Quotes are around a term, or around all of it.
    ('"a/b"*0.8 + <https://h/a>', [('"a/b"', 0.8), ("https://h/a", 1)]),
    ("'a/b*0.8 + c/d'", [("a/b", 0.8), ("c/d", 1)]),
    # Signs of a sum within an address: what is no sum of references is one of them.
    ("https://h/a*b.safetensors", [("https://h/a*b.safetensors", 1)]),
    ("https://h/a?b=c*d", [("https://h/a?b=c*d", 1)]),
    ("https://h/a%2A0.8", [("https://h/a%2A0.8", 1)]),
    ("https://h/a%20+%20b", [("https://h/a%20+%20b", 1)]),
    ("https://h/a+b", [("https://h/a+b", 1)]),
    ("https://h/my + lora.safetensors*0.5", [("https://h/my + lora.safetensors", 0.5)]),
    ("https://h/a + b", [("https://h/a", 1), ("b", 1)]),
    # A data: URI by itself may have any signs, and base64 is one term of many.
    ("data:,a + b*0.5", [("data:,a + b*0.5", 1)]),
    ("data:;base64,AA==*0.5 + zorp", [("data:;base64,AA==", 0.5), ("zorp", 1)]),
]  # fmt: skip


@pytest.mark.parametrize(("text", "terms"), SUMS, ids=[text[:50] for text, _ in SUMS])
def test_a_sum_is_split_where_every_part_is_a_reference(text: str, terms: list[tuple[str, float]]) -> None:
    assert [(choice.reference, choice.scale) for choice in read_choices(text)] == terms


WRONG = [
    ("zorp + nonsense!*2", "'nonsense!' names no LoRA that can be fetched"),
    ("https://h/a.safetensors*0.8 + bad!", "'bad!' names no LoRA"),
    ("https://h/a.safetensors + bad!", "'bad!' names no LoRA"),
    ("civitai.com/models/12/name + bad!", "'bad!' names no LoRA"),
    ("zorp + bold*11", "'bold' has strength 11, which is its own 11 times the input's scale 1; it must be from -10 to"),
    ("zorp + data:,abc", "must be base64"),
    ("0.8*zorp", "'0.8*zorp' names no LoRA"),
    ("zorp*1e3", "'zorp*1e3' names no LoRA"),
    ("zorp*1e3", "; a factor must be a decimal such as *0.8, with at most 20 digits before and after its point, and"),
    ("zorp, bold", "; a factor must be a decimal such as *0.8"),
    ("zorp;bold", "must have a space on either side."),
    ("zorp 0.8", "; a factor must be a decimal such as *0.8"),
    ("zorp × 0.8", "; a factor must be a decimal such as *0.8"),
    ("<lora:zorp:0.8>", "; a factor must be a decimal such as *0.8"),
    ("zorp.safetensors*0.5", "must be named without it, as 'zorp'."),
    ("owner/name:latest", "or a data: URI."),
    ("https://h/a + http://", "'http://' names no LoRA"),
    ("https://h/a + https://h b/c", "'https://h b/c' names no LoRA"),
    ("https://h/a + data:;base64,!", "The data: URI is damaged"),
    ("zorp*0.8+bold", "must have a space on either side."),
    ("zorp + *0.5", "'*0.5' names no LoRA"),
    ("zorp*10.0000001", "'zorp' has strength 10.0000001, which is its own 10.0000001 times"),
    ("zorp +", "'zorp +' names no LoRA"),
    (f"{EIGHT} + zorp", "A sum of 9 LoRAs is too long; it must have at most 8."),
    ("[", "read as JSON, and it is no JSON"),
    ('[{"path": "zorp", "path": "bold"}]', "it has the name 'path' twice"),
    ('[{"path": "zorp", "scale": NaN}]', "it has NaN"),
    ('{"path": "zorp"}', "A text that begins with { is read as JSON, and it is an object; it must be a list such as"),
    ('[{"path": "https://h/\ud800"}]', "it is not UTF-8 (byte 21)"),
    ("[1]", 'LoRA 1 of the list names no path; it must be a list such as [{"path": "owner/name", "scale": 0.8}].'),
    ('[{"path": "zorp"}, {"path": ""}]', "LoRA 2 of the list names no path"),
    ('[{"path": "zorp*0.5"}]', "'zorp*0.5' names no LoRA"),
    ('[{"path": "zorp*0.5"}]', "; in a list each LoRA has an object and a scale of its own."),
    ('[{"path": "zorp + bold"}]', "; in a list each LoRA has an object and a scale of its own."),
    ('[{"path": "owner/name:latest"}]', "or a data: URI."),
    ('[{"path": "zorp", "strength": 1}]', "'zorp' has 'strength'; it may have path, scale, clip and blocks."),
    ('[{"path": "zorp", "scale": "1"}]', "'zorp' has scale \"1\"; it must be a number."),
    ('[{"path": "zorp", "scale": true}]', "'zorp' has scale true; it must be a number."),
    ('[{"path": "zorp", "clip": 11}]', "'zorp' has strength 11 in the text encoder"),
    ('[{"path": "zorp", "scale": 1e300, "blocks": {"single_blocks": 1e300}}]', "'zorp' has strength inf in single_"),
    ('[{"path": "zorp", "scale": 5, "blocks": {"single_blocks": 3}}]', "'zorp' has strength 15"),
    ('[{"path": "zorp", "blocks": [1]}]', "'zorp' has blocks that are no object"),
    ('[{"path": "zorp", "blocks": []}]', "'zorp' has blocks that are no object"),
    ('[{"path": "zorp", "blocks": false}]', "'zorp' has blocks that are no object"),
    ('[{"path": "zorp", "blocks": ""}]', "'zorp' has blocks that are no object"),
    ('[{"path": "zorp", "blocks": {"double_blocks.0-6": 1, "double_blocks.6-12": 1}}]', "of which neither counts more"),
    ('[{"path": "zorp", "blocks": {"single_blocks.1": 1, "single_blocks.01": 2}}]', "of which neither counts more"),
    ('[{"path": "zorp", "blocks": {"double_blocks.6-0": 1}}]', "'zorp' has blocks 'double_blocks.6-0'; it must be"),
    ('[{"path": "zorp", "blocks": {"transformer": 1}}]', "'zorp' has blocks 'transformer'; it must be double_blocks"),
    (json.dumps([{"path": "zorp"}] * 9), "A list of 9 LoRAs is too long"),
]


@pytest.mark.parametrize(("text", "sentence"), WRONG, ids=[text[:50] for text, _ in WRONG])
def test_a_bad_term_is_named(text: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=r"\.$") as caught:
        read_choices(text)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_json_says_more_than_a_sum() -> None:
    (choice,) = read_choices(JSON)
    blocks = {"double_blocks.0-6": 0.5, "single_blocks": 0}
    assert choice == LoraChoice("zorp", 0.8, clip=0.4, blocks=blocks)
    assert json.loads(JSON) == [choice.entry("zorp")]
    (doubled,) = read_choices(JSON, 2)
    assert doubled == LoraChoice("zorp", 1.6, clip=0.8, blocks=blocks)
    assert read_choices(" []") == []


@given(st.integers(-300, 300), st.integers(-100, 300))
def test_a_strength_is_the_product_as_decimals(factor: int, scale: int) -> None:
    (choice,) = read_choices(f"zorp*{factor / 100}", scale / 100)
    assert choice.scale == float(Fraction(factor, 100) * Fraction(scale, 100))


def test_no_strength_is_too_large_to_be_refused() -> None:
    with pytest.raises(ValueError, match="strength inf, which is its own 1e\\+308 times the input's scale 3"):
        read_choices('[{"path": "zorp", "scale": 1e308}]', 3)


def test_of_blocks_that_overlap_one_must_name_fewer() -> None:
    blocks = {"double_blocks": 0.1, "double_blocks.0-6": 0.2, "double_blocks.6": 0.3, "double_blocks.7-13": 0.4}
    (choice,) = read_choices(json.dumps([{"path": "zorp", "blocks": blocks}]))
    assert choice.blocks == blocks


WITH_SECRETS = ("https://u:s3cret99@h/a", "https://s3cret99@huggingface.co/a/b", "https://h/a?token=s3cret99")


@pytest.mark.parametrize("address", WITH_SECRETS)
def test_what_stands_where_it_does_not_belong_is_named_without_secrets(address: str) -> None:
    for odd in ({address: 1}, {"scale": address}, {"scale": [address]}, {"blocks": {address: 1}}):
        with pytest.raises(ValueError, match="'zorp' has ") as caught:
            read_choices(json.dumps([{"path": "zorp", **odd}]))
        assert "s3cret99" not in str(caught.value)
    with pytest.raises(ValueError, match="twice") as caught:
        read_choices(f'[{{"{address}": 1, "{address}": 2}}]')
    assert "s3cret99" not in str(caught.value)


def test_the_operator_s_own_may_be_a_path(tmp_path: Path) -> None:
    path = tmp_path / "a + b*2.safetensors"
    path.touch()
    assert read_own_choices(str(path), 0.5) == [LoraChoice(str(path), 0.5, trusted=True)]
    assert read_own_choices("zorp*0.5 + owner/name", 2) == [LoraChoice("zorp", 1), LoraChoice("owner/name", 2)]
    for missing in (str(tmp_path / "missing"), f"{tmp_path}/missing*2", "~nobody-of-that-name/a.safetensors"):
        assert read_own_choices(missing) == [LoraChoice(missing, trusted=True)]
    with pytest.raises(ValueError, match="'zorp' has strength 15, which is its own 5 times the input's scale 3"):
        read_own_choices("zorp*5", 3)


def test_what_names_the_same_loras_has_one_identity_whatever_their_order_and_strength() -> None:
    first = identities("fofr/cars*0.8 + huggingface.co/a/b")
    assert first == identities("https://huggingface.co/a/b*2 + https://replicate.com/fofr/cars")
    assert first == identities('[{"path": "fofr/cars"}, {"path": "hf.co/a/b", "scale": 0.1}]')
    assert first != identities("fofr/cars")
    signed = f"https://h/a?signature={'a' * 5000}"
    assert identities(f"{signed} + {signed}b*2") == identities(f"{signed}b + {signed}*0.5")
    assert identities("no reference!") == {"no reference!"}


def redacted(text: str) -> str:
    return rewrite(text, {reference: redact(reference) for reference in references(text)})


@settings(max_examples=200, deadline=None)
@given(secrets.references(), secrets.references(), st.booleans())
def test_no_form_shows_a_secret(first: str, second: str, in_json: bool) -> None:
    text = json.dumps([{"path": first}, {"path": second}]) if in_json else f"{first}*0.5 + {second}"
    said: list[object] = []
    try:
        said += [parse(choice.reference).name for choice in read_choices(text)]
        said.append(redacted(text))
    except ValueError as error:
        said.append(error)
    assert not any(map(told, said))


def test_what_is_shown_is_what_was_typed_but_for_secrets() -> None:
    assert rewrite('"zorp*2" + 2*2', {"zorp": "bold", "2": "dusk"}) == '"bold*2" + dusk*2'
    assert redacted("https://u:p@h/a?t=x*0.50 + https://u:p@h/a + zorp") == "https://h/a*0.50 + https://h/a + zorp"
    assert json.loads(redacted(JSON)) == json.loads(JSON)
    assert redacted('[ {"path": "zorp"}]') == '[ {"path": "zorp"}]'
    assert redacted(r'[{"path":"https://u:p@h/a\u003ftoken=s3cret"}]') == '[{"path": "https://h/a", "scale": 1.0}]'


def test_every_form_in_the_readme_is_read() -> None:
    table = (ROOT / "README.md").read_text().partition("| paste | and get |")[2].partition("\n\n")[0]
    forms = [form for line in table.splitlines()[2:] for form in re.findall("`([^`]*)`", line.split(" | ")[0])]
    for form in forms:
        text = re.sub("<[a-z]+>", "12345678", form).replace("…", "AAAA")
        assert read_choices(text), form
    assert len(forms) > 15
