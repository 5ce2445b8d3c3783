import json
import re

import pytest

from service import strict_json

GOOD = [
    b"null", b" [1, -2.5e3, true, {}] ", b'{"a": {"b": [""]}}', '"ü\\u00fc\\ud83d\\ude00"'.encode(),
    b"9223372036854775807", b"-9223372036854775808", b'{"a":1,"b":{"a":1}}', b"[" * 33 + b"]" * 33,
]  # fmt: skip
BAD = {
    b"": "it is no JSON: Expecting value: line 1 column 1 (char 0).",
    b"{no": "it is no JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1).",
    b"1 2": "it is no JSON: Extra data: line 1 column 3 (char 2).",
    b'"\x01"': "it is no JSON: Invalid control character at: line 1 column 2 (char 1).",
    b'"\xff"': "it is not UTF-8 (byte 1).",
    "[]".encode("utf-16"): "it is not UTF-8 (byte 0).",
    b"\xef\xbb\xbf[]": "it is no JSON: Unexpected UTF-8 BOM (decode using utf-8-sig): line 1 column 1 (char 0).",
    b"[NaN]": "it has NaN, which is no number in JSON.",
    b'{"a":-Infinity}': "it has -Infinity, which is no number in JSON.",
    b"1e999": "it has the number 1e999; numbers must be below 1.8e308.",
    b"-" + b"9" * 400: "it has a number of 401 characters; it must have at most 100.",
    b"0." + b"1" * 5000: "it has a number of 5002 characters; it must have at most 100.",
    b'{"a":1,"b":2,"a":3}': "it has the name 'a' twice in one object.",
    b'[{"\\u0041":1,"A":1}]': "it has the name 'A' twice in one object.",
    b'"\\u0000"': "it has the character U+0000 in a string, which databases cannot keep.",
    b'{"\\u0000":1}': "it has the character U+0000 in a string, which databases cannot keep.",
    b'"\\ud83d"': "it has half of a surrogate pair, U+D83D, in a string, which is no character.",
    b'{"\\ude00":1}': "it has half of a surrogate pair, U+DE00, in a string, which is no character.",
    b"[" * 34 + b"]" * 34: "it is nested more than 32 deep.",
    b'{"a":' * 5000 + b"1" + b"}" * 5000: "it is nested more than 32 deep.",
    b"[" * 90_000: "it is nested more than 32 deep.",
    b"[" + b"[]," * 50_000 + b"1]": "it has more than 100000 values, commas and brackets in strings counted.",
    b'"' + b"a\\n" * 4_000_001 + b'"': "it has more than 4000000 backslashes; characters need no escapes in UTF-8.",
}


@pytest.mark.parametrize("content", GOOD)
def test_json_is_read_as_json(content: bytes) -> None:
    assert strict_json.read(content) == json.loads(content)


@pytest.mark.parametrize(("content", "sentence"), BAD.items(), ids=range(len(BAD)))
def test_what_is_wrong_is_said_in_a_sentence(content: bytes, sentence: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        strict_json.read(content)


def test_whole_numbers_beyond_64_bits_are_floats() -> None:
    numbers = strict_json.read(b"[9223372036854775808, -9223372036854775809]")
    assert numbers == [2.0**63, -(2.0**63)]
    assert all(type(number) is float for number in numbers)


def test_depth_is_counted_in_every_kind_of_bracket() -> None:
    deepest = b'[{"a":' * 16 + b"1" + b"}]" * 16
    assert strict_json.read(deepest)
    with pytest.raises(ValueError, match="nested"):
        strict_json.read(b"[" + deepest + b"]")
