"""What a command line becomes before a server starts; script/predict itself: tests/test_scripts.py."""

import re
from pathlib import Path

import pytest

from local_cog import schema
from local_cog.command import read_inputs
from settings import ROOT

DOCUMENT = schema.derive((ROOT / "predict.py").read_text(encoding="utf-8"))


@pytest.fixture(autouse=True)
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files here, some of which are called as LoRAs are."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner").mkdir()
    (tmp_path / "styles").mkdir()
    for name in ("my.safetensors", "photo.jpg", "zorp", "owner/name", "./my lora.zip"):
        (tmp_path / name).write_bytes(b"a")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("replicate_weights", "my.safetensors"),
        ("extra_lora", "./my lora.zip"),
        ("extra_lora", "./zorp"),
        ("image", "photo.jpg"),
        ("mask", "zorp"),
    ],
)
def test_the_name_of_a_file_without_its_sign_is_refused(key: str, value: str) -> None:
    sentence = f"{key} is {value!r}, which is a file here; -i {key}=@{value} sends it."
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        read_inputs(["prompt=a", f"{key}={value}"], DOCUMENT)
    sent = read_inputs(["prompt=a", f"{key}=@{value}"], DOCUMENT)
    assert sent[key].startswith("data:")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("prompt", "photo.jpg"),
        ("replicate_weights", "zorp"),
        ("extra_lora", "owner/name"),
        ("extra_lora", "styles"),
        ("replicate_weights", "missing.safetensors"),
        ("extra_lora", f"data:,{'a' * 5000}"),
        ("image", "https://example.com/photo.jpg"),
        ("image", "photo\0.jpg"),
        ("extra_lora", "~nobody-of-that-name/a.zip"),
    ],
)
def test_what_may_mean_something_else_is_sent_as_it_is(key: str, value: str) -> None:
    assert read_inputs(["prompt=a", f"{key}={value}"], DOCUMENT)[key] == value


@pytest.mark.parametrize("value", ["~nobody-of-that-name/a.png", "a" * 5000, "a\0", "", "."])
def test_what_is_no_file_behind_the_sign_is_said(value: str) -> None:
    with pytest.raises(ValueError, match=f"^image: there is no file {re.escape(repr(value))}\\.$"):
        read_inputs(["prompt=a", f"image=@{value}"], DOCUMENT)
