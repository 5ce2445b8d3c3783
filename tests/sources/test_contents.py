"""Files that are no LoRAs are refused as soon as their bytes show it, under any name."""

import json
import struct

import pytest

from harness.hosts import File, Host
from settings import MIB, Settings
from sources.contents import Contents
from tests.support.caches import SECRET
from tests.support.fetching import LORA, fetch, make_lora, refusal


def headed(header: object, body: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def tensor(dtype: object = "U8", shape: object = (4,), offsets: object = (0, 4)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


NO_WEIGHTS = {
    "web page": (b"\n <!DOCTYPE html><html></html>", "gave a web page instead of a file"),
    "empty": (b"", "is empty"),
    "json": (b'{"error": "not found"}', "must be a .safetensors file"),
    "pickle": (b"\x80\x02}q\x00.", "must be a .safetensors file"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "must be a .safetensors file"),
    "cut in the header": (LORA[:60], "damaged .safetensors"),
    "cut in the body": (LORA[:-1], "damaged .safetensors"),
    "more than it says": (LORA + b"\0", "damaged .safetensors"),
    "huge header": (struct.pack("<Q", 2**35) + b"{" + bytes(600), "its header claims"),
    "no JSON": (headed(b"{nothing}"), "its header is wrong"),
    "deep JSON": (headed(b'{"a":' + b"[" * 100_000), "its header is wrong"),
    "not a tensor": (headed({"a": 1}), "its header is wrong"),
    "unknown type": (headed({"a": tensor("FLOAT")}, bytes(4)), "unknown type"),
    "type is a list": (headed({"a": tensor(["U8"])}, bytes(4)), "its header is wrong"),
    "overlap": (headed({"a": tensor(), "b": tensor(offsets=(2, 6))}, bytes(6)), "does not fit"),
    "hole": (headed({"a": tensor(offsets=(4, 8))}, bytes(8)), "does not fit"),
    "backwards": (headed({"a": tensor(offsets=(4, 0))}, bytes(4)), "does not fit"),
    "too small": (headed({"a": tensor("F32")}, bytes(4)), "does not fit"),
    "negative": (headed({"a": tensor(shape=(-2, -2))}, bytes(4)), "no whole number"),
    "fraction": (headed({"a": tensor(shape=(4.0,))}, bytes(4)), "no whole number"),
    "60 dimensions": (
        headed({"a": tensor(shape=(1,) * 60)}, bytes(4)),
        "60 dimensions; a tensor of a LoRA has at most 8",
    ),
    "long numbers": (headed(b'{"a":[%s]}' % (b"9" * 4000)), "a number of 4000 characters"),
    "many values": (headed(b'{"a":[%s0]}' % (b"[]," * 500_000)), "more than 1000000 values"),
    "a half of a character": (headed(b'{"\\ud83d":0}'), "half of a surrogate pair"),
    "twice": (headed(b'{"a":%b,"a":%b}' % ((json.dumps(tensor()).encode(),) * 2), bytes(4)), "twice"),
    "metadata": (headed({"__metadata__": {"a": 1}, "a": tensor()}, bytes(4)), "metadata"),
    "metadata is a list": (headed({"__metadata__": [], "a": tensor()}, bytes(4)), "its header is wrong"),
}


@pytest.mark.parametrize("stated", [True, False], ids=["stated", "unstated"])
@pytest.mark.parametrize("name", NO_WEIGHTS)
def test_what_is_no_lora_is_said_to_be_none(environment: Settings, host: Host, name: str, stated: bool) -> None:
    content, sentence = NO_WEIGHTS[name]
    host.routes["/lora.safetensors"] = File(content, stated=stated)
    said = refusal(environment, host.url(f"/lora.safetensors?token={SECRET}"))
    assert sentence in said
    assert host.url("/lora.safetensors") in said
    host.routes["/lora.safetensors"] = File(LORA, etag='"2"')
    assert fetch(environment, host.url(f"/lora.safetensors?token={SECRET}")) == LORA


def test_a_wrong_header_ends_a_download_before_the_rest_has_come(environment: Settings, host: Host) -> None:
    file = host.routes["/a"] = File(headed({"a": tensor("FLOAT")}, bytes(16 * MIB)), delay=0.005)
    assert "unknown type" in refusal(environment, host.url("/a"))
    assert file.sent < 8 * MIB


SOFTWARE = json.dumps({"name": "ai-toolkit", "version": "0.7.8"})


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"modelspec.trigger_phrase": " a zorp "}, ("a zorp",)),
        ({"modelspec.trigger_phrase": " "}, ()),
        ({"software": SOFTWARE, "ss_tag_frequency": json.dumps({'1_TOK "ц"': {'TOK "ц"': 1}})}, ('TOK "ц"',)),
        ({"software": SOFTWARE, "ss_tag_frequency": json.dumps({"1_a": {"b": 1}})}, ()),
        ({"software": SOFTWARE, "ss_tag_frequency": json.dumps({"1_a": {"a": 1, "b": 1}})}, ()),
        ({"ss_tag_frequency": json.dumps({"1_a": {"a": 1}})}, ()),
        ({"ss_output_name": "a", "software": SOFTWARE}, ()),
    ],
)
def test_trigger_words_are_what_a_trainer_notes_as_such(metadata: dict[str, str], words: tuple[str, ...]) -> None:
    contents = Contents("a")
    contents.feed(make_lora(**metadata))
    contents.finish()
    assert contents.trigger_words == words
