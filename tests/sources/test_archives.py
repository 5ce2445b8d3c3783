"""LoRAs in archives are found under any file name, within bounds, and nothing else of an archive is written."""

import base64
import gzip
import io
import random
import tarfile
import zipfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save

from harness.hosts import File, Host
from settings import MIB, MINIATURE, Settings
from tests.support.fetching import (
    LORA,
    OTHER,
    OTHER_PEFT,
    PACKED,
    PEFT,
    TRAINED,
    fetch,
    fetch_config,
    make_tar,
    make_zip,
    nested,
    refusal,
)
from weights import WeightsCache


@pytest.mark.parametrize("form", PACKED)
@pytest.mark.parametrize("path", ["/lora.safetensors", "/file.tar", "/download"])
def test_content_decides_not_the_name(environment: Settings, host: Host, form: str, path: str) -> None:
    host.routes[path] = File(PACKED[form], type="text/html")
    assert fetch(environment, host.url(path)) == LORA
    host.stop()
    assert fetch(environment, f"data:text/plain;base64,{base64.b64encode(PACKED[form]).decode()}") == LORA


def linked(kind: bytes, target: str) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        member = tarfile.TarInfo("lora.safetensors")
        member.type, member.linkname = kind, target
        archive.addfile(member)
    return buffer.getvalue()


def zipped_link() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        member = zipfile.ZipInfo("lora.safetensors")
        member.external_attr = 0o120777 << 16
        archive.writestr(member, "/etc/passwd")
    return buffer.getvalue()


def sparse_tar() -> bytes:
    """A member that claims a gigabyte and has no byte."""
    member = tarfile.TarInfo("lora.safetensors")
    header = bytearray(member.tobuf(tarfile.GNU_FORMAT))
    header[156:157] = tarfile.GNUTYPE_SPARSE
    header[483:495] = b"%011o\0" % (1 << 30)
    header[148:156] = b"%06o\0 " % (sum(header[:148]) + 8 * 32 + sum(header[156:]))
    return bytes(header) + bytes(1024)


def extended_tar(records: bytes) -> bytes:
    """An extended header of these records, and a member."""
    member = tarfile.TarInfo("x")
    member.type, member.size = tarfile.XHDTYPE, len(records)
    return member.tobuf() + records + bytes(-len(records) % 512) + make_tar({"lora.safetensors": LORA})


def endless_header_tar() -> bytes:
    """An extended header that claims, and has, more bytes than anybody should read at once."""
    member = tarfile.TarInfo("x")
    member.type, member.size = tarfile.XHDTYPE, 40 * MIB
    return gzip.compress(member.tobuf() + bytes(40 * MIB) + make_tar({"lora.safetensors": LORA}), 1)


LAYOUTS = {
    "long name": "a" * 90 + "/" + "b" * 60 + "/lora.safetensors",
    "longer name": "a" * 300 + "/lora.safetensors",
    "other alphabet": "ключ/ключ.safetensors",
    "folders": "a/b/c/d/lora.safetensors",
}


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_tar_is_read_as_tarfile_reads_it(environment: Settings, layout: str, format: int) -> None:
    if format == tarfile.USTAR_FORMAT and layout == "longer name":
        pytest.skip("ustar has no room for it")
    content = make_tar({"readme.txt": b"a" * 700, LAYOUTS[layout]: LORA, "z.txt": b""}, format=format)
    assert fetch(environment, f"data:;base64,{base64.b64encode(content).decode()}") == LORA


LONGEST = b'{"r": 4}'.ljust(MIB // 4)
BESIDE = {
    "beside it": ({"adapter_config.json": PEFT, "adapter_model.safetensors": LORA}, PEFT),
    "in its folder": ({"./out/lora.safetensors": LORA, "./out/adapter_config.json": OTHER_PEFT}, OTHER_PEFT),
    "LyCORIS' means nothing": ({"lycoris_config.json": PEFT, "a.safetensors": LORA}, b""),
    "in other folders": (
        {"adapter_config.json": PEFT, "a/lora.safetensors": LORA, "a/b/adapter_config.json": PEFT, "aa": b""},
        b"",
    ),
    "of another file": (
        {"lora.safetensors": LORA, "adapter_model.safetensors": OTHER, "adapter_config.json": PEFT},
        b"",
    ),
    "with a mark of its encoding": ({"a.safetensors": LORA, "adapter_config.json": b"\xef\xbb\xbf" + PEFT}, PEFT),
    "longest": ({"a.safetensors": LORA, "adapter_config.json": LONGEST}, LONGEST),
    "empty": ({"a.safetensors": LORA, "adapter_config.json": b""}, b""),
    "no text": ({"a.safetensors": LORA, "adapter_config.json": b"\xff{"}, "\ufffd{".encode()),
}


PACKERS = {"tar": make_tar, "tar.gz": partial(make_tar, mode="w:gz"), "zip": make_zip}


@pytest.mark.parametrize(
    ("layout", "form"),
    [
        *((layout, "tar") for layout in BESIDE),
        ("in its folder", "tar.gz"),
        ("in its folder", "zip"),
        ("longest", "zip"),
    ],
)
def test_the_config_beside_the_chosen_member_comes_along(
    environment: Settings, host: Host, tmp_path: Path, layout: str, form: str
) -> None:
    members, config = BESIDE[layout]
    file, packed = tmp_path / "packed", PACKERS[form](members)
    file.write_bytes(packed)
    (tmp_path / "adapter_config.json").write_bytes(b"that of another file")
    host.routes["/a"] = File(packed)
    for _ in range(2):
        assert fetch_config(environment, host.url("/a")) == config
        assert fetch_config(environment, str(file), trusted=True) == config
    assert fetch_config(environment, f"data:;base64,{base64.b64encode(packed).decode()}") == config


def test_a_config_that_is_no_regular_member_is_none(environment: Settings) -> None:
    buffer = io.BytesIO(make_tar({"a.safetensors": LORA, "b.json": PEFT}))
    with tarfile.open(fileobj=buffer, mode="a") as archive:
        member = tarfile.TarInfo("adapter_config.json")
        member.type, member.linkname = tarfile.SYMTYPE, "b.json"
        archive.addfile(member)
    assert fetch_config(environment, f"data:;base64,{base64.b64encode(buffer.getvalue()).decode()}") == b""


REFUSED_ARCHIVES = {
    "no weights": (make_tar({"readme.txt": b"hello"}), "no regular .safetensors file"),
    "two": (make_tar({"a.safetensors": LORA, "b.safetensors": OTHER}), "a.safetensors, b.safetensors"),
    "symbolic link": (linked(tarfile.SYMTYPE, "/etc/passwd"), "no regular .safetensors file"),
    "hard link": (linked(tarfile.LNKTYPE, "../../etc/passwd"), "no regular .safetensors file"),
    "device": (linked(tarfile.CHRTYPE, ""), "no regular .safetensors file"),
    "link in a zip": (zipped_link(), "no regular .safetensors file"),
    "leads out of it": (make_tar({"../../lora.safetensors": LORA}), "no regular .safetensors file"),
    "absolute": (make_tar({"/tmp/lora.safetensors": LORA}), "no regular .safetensors file"),
    "leads out of a zip": (make_zip({"../lora.safetensors": LORA}), "no regular .safetensors file"),
    "unusual packing": (make_zip({"lora.safetensors": LORA}, zipfile.ZIP_LZMA), "no regular .safetensors file"),
    "sparse": (sparse_tar(), "no regular .safetensors file"),
    "endless header": (endless_header_tar(), "an entry of it is too long"),
    "cut": (make_tar(TRAINED)[:30_000], "damaged"),
    "cut gz": (gzip.compress(LORA)[:-2000], "damaged gzip archive"),
    "cut zip": (make_zip(TRAINED)[:-30], "damaged zip archive"),
    "archive in an archive": (nested(nested(LORA)), "must be a .safetensors file"),
    "gz in a gz": (gzip.compress(gzip.compress(LORA)), "must be a .safetensors file"),
    "pickle in a zip": (make_zip({"archive/data.pkl": b"x"}), "no regular .safetensors file"),
    "no LoRA in it": (nested(b"hello" * 200), "begins with b'hellohellohelloh'"),
    "long name": (make_tar({f"{'a' * 5000}.safetensors": LORA}), "a name of more than 4096 characters"),
    "senseless header": (extended_tar(b"-5 path=a\n"), "an extended header that makes no sense"),
    "many members": (make_tar({f"{number}.txt": b"" for number in range(10_001)}), "more than 10000 members"),
    "long list in a zip": (
        make_zip({"a" * 60_000 + str(number): b"" for number in range(60)}),
        "entry of it is too long",
    ),
    "long config": (
        make_tar({"x/a.safetensors": LORA, "x/adapter_config.json": LONGEST + b" "}),
        "(x/adapter_config.json) has more than 0.25 MB, which no config of a LoRA needs",
    ),
    "long config in a zip": (
        make_zip({"a.safetensors": LORA, "adapter_config.json": bytes(50 * MIB)}),
        "(adapter_config.json) has more than 0.25 MB",
    ),
    "many in a zip": (make_zip({f"{number}.txt": b"" for number in range(10_001)}), "more than 10000 members"),
}


@pytest.mark.parametrize("name", REFUSED_ARCHIVES)
def test_an_archive_is_refused_and_nothing_of_it_written(
    environment: Settings, host: Host, tmp_path: Path, name: str
) -> None:
    content, sentence = REFUSED_ARCHIVES[name]
    host.routes["/a"] = File(content)
    assert sentence in refusal(environment, host.url("/a"))
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} <= {"lock", *records(environment)}
    host.routes["/a"] = File(PACKED["tar"], etag='"2"')
    assert fetch(environment, host.url("/a")) == LORA


def records(settings: Settings) -> set[str]:
    return {path.name for path in settings.cache_dir.glob("references/*")}


BOMBS = {
    "gz": lambda content: gzip.compress(content, 1),
    "tar.gz": lambda content: gzip.compress(nested(content), 1),
    "zip": lambda content: make_zip({"lora.safetensors": content}),
}


@pytest.mark.parametrize("form", BOMBS)
def test_bombs_are_defused(environment: Settings, host: Host, form: str) -> None:
    bomb = BOMBS[form](save({"zeros": np.zeros(150 * MIB, np.uint8)}))
    host.routes["/a"] = File(bomb)
    assert len(bomb) < 2 * MIB
    assert "times its size" in refusal(environment, host.url("/a"))


@pytest.mark.parametrize("form", PACKED)
def test_the_largest_size_bounds_every_form(environment: Settings, host: Host, form: str) -> None:
    smallest = replace(environment, lora_max_bytes=len(PACKED[form]) - 1)
    host.routes["/stated"] = File(PACKED[form])
    host.routes["/unstated"] = File(PACKED[form], stated=False)
    for path in ("/stated", "/unstated"):
        assert "LORA_MAX_GB" in refusal(smallest, host.url(path))
    assert "LORA_MAX_GB" in refusal(smallest, f"data:;base64,{base64.b64encode(PACKED[form]).decode()}")


@pytest.mark.parametrize("form", BOMBS)
def test_the_largest_size_bounds_what_is_unpacked(environment: Settings, host: Host, form: str) -> None:
    soft = save({"zeros": np.zeros(2 * MIB, np.uint8)})
    host.routes["/a"] = File(BOMBS[form](soft))
    assert "LORA_MAX_GB" in refusal(replace(environment, lora_max_bytes=MIB), host.url("/a"))
    assert fetch(environment, host.url("/a")) == soft


@hypothesis_settings(max_examples=150, deadline=None)
@given(st.sampled_from([*PACKED.values()]), st.randoms(use_true_random=False), st.binary(min_size=1, max_size=8))
def test_a_damaged_file_gets_a_sentence_or_can_be_opened(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, chance: random.Random, noise: bytes
) -> None:
    """The headers of files and archives stand at their ends, where most of the damage is done."""
    where = chance.choice(
        [chance.randrange(400), chance.randrange(len(content)), len(content) - chance.randrange(1, 400)]
    )
    damaged = content[:where] + noise + content[where + len(noise) * chance.randrange(2) :]
    settings = Settings(MINIATURE, cache_dir=tmp_path_factory.mktemp("cache"))
    try:
        uri = f"data:;base64,{base64.b64encode(damaged).decode()}"
        with WeightsCache(settings).open(uri) as weights, safe_open(weights.path, "np") as opened:
            assert opened.keys()
    except ValueError as error:
        assert str(error).startswith("The data: URI")  # noqa: PT017 (either is right)
        assert str(error).endswith(".")  # noqa: PT017
