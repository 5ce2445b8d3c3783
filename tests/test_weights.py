"""LoRAs from anywhere: real hosts on loopback, real archives, real disks; what comes, what is said, what is left."""

import base64
import ctypes
import gzip
import hashlib
import io
import json
import multiprocessing
import os
import random
import socket
import struct
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import cog
import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save

from harness.hosts import (
    File,
    Host,
    civitai,
    hugging_face,
    in_json,
    in_turn,
    page,
    redirect,
    replicate,
    short,
    silent,
    status,
)
from local_cog.server import CogServer, failure
from settings import MINIATURE, ROOT, Settings
from sources.client import Patience
from weights import WeightsCache, snapshot

# Hosts on loopback answer at once, or never.
QUICK = Patience(connect=2, stall=0.6, pauses=(0.02, 0.04), longest_pause=1.5)
SECRET = "s3cr3t"
VERSION = "0123456789abcdef" * 4
MIB = 1024**2
DISK = 24 * MIB


def make_lora(size: int = 20_000, seed: int = 0, **metadata: str) -> bytes:
    """A .safetensors file of about that many bytes."""
    values = np.random.default_rng(seed).integers(0, 256, max(size, 64), dtype=np.uint8)
    return save({"lora.down": values[: size // 2], "lora.up": values[size // 2 :]}, metadata or None)


LORA, OTHER = make_lora(seed=1), make_lora(seed=2)
LARGE = make_lora(20 * MIB, seed=3)


@pytest.fixture
def host() -> Iterator[Host]:
    with Host() as running:
        yield running


@pytest.fixture
def storage() -> Iterator[Host]:
    with Host() as running:
        yield running


@pytest.fixture
def environment(tmp_path: Path) -> Settings:
    return Settings(MINIATURE, cache_dir=tmp_path / "cache", allow_private_hosts=True)


@pytest.fixture
def places(environment: Settings, host: Host) -> Settings:
    """Hugging Face, CivitAI and Replicate are the one host."""
    address = host.address
    return replace(environment, hf_endpoint=address, civitai_endpoint=address, replicate_endpoint=address)


@pytest.fixture(autouse=True)
def nothing_is_left_behind(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    """After every test: only whole files under the names of their contents, no thread, no secret."""
    yield
    printed = "".join(capfd.readouterr())
    assert SECRET not in printed
    check_cache(tmp_path / "cache")
    for thread in threading.enumerate():
        if thread.name.startswith(("weights", "download")):
            thread.join(3)
            assert not thread.is_alive(), thread


def check_cache(cache: Path, *, after_kill: bool = False) -> None:
    for file in cache.glob("loras/*"):
        assert hashlib.sha256(file.read_bytes()).hexdigest() == file.stem
    if not after_kill:
        assert list(cache.glob("incoming/*")) == []
    for record in cache.glob("references/*"):
        assert SECRET.encode() not in record.read_bytes()


def fetch(settings: Settings, reference: str, patience: Patience = QUICK) -> bytes:
    with WeightsCache(settings, patience).open(reference) as weights:
        content = weights.path.read_bytes()
        assert hashlib.sha256(content).hexdigest() == weights.sha256
        assert SECRET not in f"{weights.name} {weights.path}"
        return content


def refusal(settings: Settings, reference: str, patience: Patience = QUICK) -> str:
    """The sentence that a reference gets."""
    with pytest.raises(ValueError, match=r"\.$") as caught, WeightsCache(settings, patience).open(reference):
        pass
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert SECRET not in sentence
    assert str(settings.cache_dir) not in sentence
    return sentence


# ---------------------------------------------------------------------------------------------------------------------
# Archives


def make_tar(members: dict[str, bytes], mode: str = "w") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def make_zip(members: dict[str, bytes], packing: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", packing) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


TRAINED = {
    "output/flux_train_replicate/config.yaml": b"config:\n  process:\n  - type: sd_trainer\n    trigger_word: 'TOK'\n",
    "output/flux_train_replicate/captions/a.txt": b"a photo of TOK",
    "output/flux_train_replicate/lora.safetensors": LORA,
    "output/flux_train_replicate/optimizer.safetensors": OTHER,
}
PACKED = {
    "tar": make_tar(TRAINED),
    "the other layout": make_tar({"flux-lora/flux-lora.safetensors": LORA}),
    "tar.gz": make_tar(TRAINED, "w:gz"),
    "zip": make_zip(TRAINED),
    "gz": gzip.compress(LORA),
    "raw": LORA,
}


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


def endless_header_tar() -> bytes:
    """An extended header that claims, and has, more bytes than anybody should read at once."""
    member = tarfile.TarInfo("x")
    member.type, member.size = tarfile.XHDTYPE, 40 * MIB
    return gzip.compress(member.tobuf() + bytes(40 * MIB) + make_tar({"lora.safetensors": LORA}), 1)


def nested(content: bytes) -> bytes:
    return make_tar({"lora.safetensors": content})


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
    "many members": (make_tar({f"{number}.txt": b"" for number in range(10_001)}), "more than 10000 members"),
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


# ---------------------------------------------------------------------------------------------------------------------
# Contents


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


# ---------------------------------------------------------------------------------------------------------------------
# Places


def test_replicate_gives_its_newest_weights_until_there_are_newer(places: Settings, host: Host, storage: Host) -> None:
    replicate(host, storage, "owner/name", PACKED["tar"])
    assert fetch(places, "owner/name") == LORA
    assert fetch(places, "https://replicate.com/owner/name") == LORA
    replicate(host, storage, "owner/name", make_tar({"a/lora.safetensors": OTHER}), etag='"2"')
    assert fetch(places, "owner/name") == OTHER


def test_a_version_of_replicate_is_looked_up_once(places: Settings, host: Host, storage: Host) -> None:
    file = replicate(host, storage, "owner/name", PACKED["tar"], version=VERSION)
    for reference in (f"owner/name/{VERSION}", f"owner/name:{VERSION}", f"https://replicate.com/owner/name/{VERSION}"):
        assert fetch(places, reference) == LORA
    assert len(host.seen) == 1
    assert file.sent == len(PACKED["tar"])


def test_what_replicate_moves_elsewhere_is_fetched_anew_though_its_etag_is_the_same(
    places: Settings, host: Host, storage: Host
) -> None:
    storage.routes |= {"/1": File(PACKED["tar"]), "/2": File(nested(OTHER))}
    host.routes["/owner/name/_weights"] = in_turn(redirect(storage.url("/1")), redirect(storage.url("/2")))
    assert fetch(places, "owner/name") == LORA
    assert fetch(places, "owner/name") == OTHER


def test_private_models_of_replicate(places: Settings, host: Host, storage: Host) -> None:
    replicate(host, storage, "owner/name", PACKED["tar"], token=SECRET)
    assert "REPLICATE_API_TOKEN" in (said := refusal(places, "owner/name"))
    assert "huggingface.co/owner/name" in said
    assert fetch(replace(places, replicate_token=SECRET), "owner/name") == LORA
    assert all("Authorization" not in request.headers for request in storage.seen)


def test_a_repo_with_one_file_and_every_way_to_name_it(places: Settings, host: Host, storage: Host) -> None:
    hugging_face(host, storage, "o/r", {"README.md": b"hi", "my lora.safetensors": LORA})
    for reference in (
        "huggingface.co/o/r",
        "https://hf.co/o/r/tree/main",
        "https://huggingface.co/o/r/blob/main/my%20lora.safetensors",
        "https://huggingface.co/o/r/resolve/main/my%20lora.safetensors?download=true",
        f"https://huggingface.co/o/r/tree/{'c' * 40}",
    ):
        assert fetch(places, reference) == LORA
    assert len(storage.seen) == 1
    assert host.asked("/api/models/o/r/revision/main")[0].query == {"blobs": "true"}


CHOICES = [
    ({"a.safetensors": OTHER, "pytorch_lora_weights.safetensors": LORA}, ""),
    ({"a.safetensors": OTHER, "lora.safetensors": LORA}, ""),
    ({"a.safetensors": OTHER, "adapter_model.safetensors": LORA}, ""),
    ({"lora.safetensors": LORA, "checkpoint-500/pytorch_lora_weights.safetensors": OTHER}, ""),
    ({"me.safetensors": LORA, "me_000000500.safetensors": OTHER, "me_000001000.safetensors": OTHER}, ""),
    ({"me.safetensors": LORA, "me-step00000500.safetensors": OTHER}, ""),
    ({"me_000001000.safetensors": OTHER, "me_000002000.safetensors": LORA}, ""),
    ({"v1.safetensors": OTHER, "v2.safetensors": LORA}, ""),
    ({"a.safetensors": OTHER, "sub/b.safetensors": LORA}, "/tree/main/sub"),
    ({"model.tar": PACKED["tar"]}, "/blob/main/model.tar"),
]


@pytest.mark.parametrize(("files", "tail"), CHOICES, ids=[" ".join(files) for files, _ in CHOICES])
def test_the_right_one_of_several_files(
    places: Settings, host: Host, storage: Host, files: dict[str, bytes], tail: str, capfd: pytest.CaptureFixture
) -> None:
    dates = {path: "2026-02-02T00:00:00.000Z" for path, content in files.items() if content == LORA}
    hugging_face(host, storage, "o/r", files, dates=dates)
    assert fetch(places, f"https://huggingface.co/o/r{tail}") == LORA
    (chosen,) = (path for path, content in files.items() if content != OTHER)
    assert chosen in capfd.readouterr().out


def test_several_files_of_one_day_are_listed(places: Settings, host: Host, storage: Host) -> None:
    hugging_face(host, storage, "o/r", {"v1.safetensors": LORA, "v2.safetensors": OTHER, "x/lora.safetensors": LORA})
    said = refusal(places, "huggingface.co/o/r")
    assert "v1.safetensors, v2.safetensors" in said
    assert "huggingface.co/o/r/resolve/main/" in said
    assert "no .safetensors file" in refusal(places, "huggingface.co/o/r/tree/main/empty")
    assert "v1.safetensors, v2.safetensors" in refusal(places, "huggingface.co/o/r/blob/main/v3.safetensors")


def test_private_repos(places: Settings, host: Host, storage: Host) -> None:
    hugging_face(host, storage, "o/r", {"a.safetensors": LORA}, token=SECRET)
    assert "is private and needs HF_TOKEN" in refusal(places, "huggingface.co/o/r")
    wrong = replace(places, hf_token=f"not-{SECRET}")
    assert "the account of HF_TOKEN may not read it" in refusal(wrong, "huggingface.co/o/r")
    assert fetch(replace(places, hf_token=SECRET), "huggingface.co/o/r") == LORA
    assert all("Authorization" not in request.headers for request in storage.seen)


def test_gated_repos(places: Settings, host: Host, storage: Host) -> None:
    hugging_face(host, storage, "o/r", {"a.safetensors": LORA}, token=SECRET, gated=True)
    said = refusal(places, "huggingface.co/o/r")
    assert "accept its conditions at https://huggingface.co/o/r" in said
    assert "HF_TOKEN" in said
    assert fetch(replace(places, hf_token=SECRET), "huggingface.co/o/r") == LORA


def test_a_revision_that_is_not_there(places: Settings, host: Host, storage: Host) -> None:
    hugging_face(host, storage, "o/r", {"a.safetensors": LORA})
    assert "no revision 'missing'" in refusal(places, "https://huggingface.co/o/r/tree/missing")


def test_a_commit_is_looked_up_once_and_a_branch_each_time(places: Settings, host: Host, storage: Host) -> None:
    hugging_face(host, storage, "o/r", {"a.safetensors": LORA}, commit="a" * 40)
    for _ in range(2):
        assert fetch(places, "huggingface.co/o/r") == LORA
        assert fetch(places, f"https://huggingface.co/o/r/tree/{'a' * 40}") == LORA
    assert len(host.asked(f"/api/models/o/r/revision/{'a' * 40}")) == 1
    hugging_face(host, storage, "o/r", {"a.safetensors": OTHER}, commit="b" * 40)
    assert fetch(places, "huggingface.co/o/r") == OTHER
    assert fetch(places, f"https://huggingface.co/o/r/tree/{'a' * 40}") == LORA
    assert len(host.asked("/api/models/o/r/revision/main")) == 3


def test_a_file_that_is_not_what_its_host_states(places: Settings, host: Host, storage: Host) -> None:
    hugging_face(host, storage, "o/r", {"a.safetensors": LORA})
    storage.routes = dict.fromkeys(storage.routes, File(OTHER))
    assert "arrived damaged" in refusal(places, "huggingface.co/o/r")
    civitai(host, storage, 1, [{"id": 2, "baseModel": "Flux.1 D"}], {2: LORA}, "", page())
    storage.routes = dict.fromkeys(storage.routes, File(OTHER))
    assert "arrived damaged" in refusal(replace(places, civitai_token=""), "civitai.com/models/1")
    hugging_face(host, storage, "o/r", {"a.safetensors": LORA})
    assert fetch(places, "huggingface.co/o/r") == LORA


def test_trigger_words_come_along(places: Settings, host: Host, storage: Host) -> None:
    hugging_face(host, storage, "o/r", {"a.safetensors": LORA}, card={"instance_prompt": "a photo of TOK"})
    civitai(
        host,
        storage,
        1,
        [{"id": 2, "baseModel": "Flux.1 D", "trainedWords": ["ohwx", " sks "]}],
        {2: OTHER},
        "",
        page(),
    )
    labelled = make_lora(seed=5, **{"modelspec.trigger_phrase": "pixar style"})
    replicate(host, storage, "owner/name", PACKED["tar"])
    storage.routes["/a"] = File(labelled)
    expected = {
        "huggingface.co/o/r": ("a photo of TOK",),
        "civitai.com/models/1": ("ohwx", "sks"),
        storage.url("/a"): ("pixar style",),
        "owner/name": ("TOK",),
    }
    for reference, words in expected.items():
        for _ in range(2):
            with WeightsCache(replace(places, civitai_token=""), QUICK).open(reference) as weights:
                assert weights.trigger_words == words


VERSIONS = [
    {"id": 40, "baseModel": "SDXL 1.0", "publishedAt": "2026-05-01T00:00:00Z"},
    {"id": 30, "baseModel": "Flux.1 D", "publishedAt": "2026-03-01T00:00:00Z"},
    {"id": 35, "baseModel": "Flux.1 S", "publishedAt": "2026-04-01T00:00:00Z"},
    {"id": 50, "baseModel": "Flux.1 D", "publishedAt": "2026-06-01T00:00:00Z", "files": []},
]
CONTENTS = {number: make_lora(seed=number) for number in (30, 35, 40, 50)}


@pytest.mark.parametrize(
    ("reference", "version"),
    [
        ("civitai.com/models/7", 35),
        ("https://civitai.red/models/7/some-name", 35),
        ("https://civitai.com/models/7?modelVersionId=30", 30),
        ("https://civitai.com/api/download/models/30", 30),
        ("https://civitai.com/api/download/models/40?type=Model&format=SafeTensor", 40),
        ("urn:air:flux1:lora:civitai:7", 35),
        ("urn:air:flux1:lora:civitai:7@30", 30),
    ],
)
def test_civitai_in_all_its_forms(
    places: Settings, host: Host, storage: Host, reference: str, version: int, capfd: pytest.CaptureFixture
) -> None:
    civitai(host, storage, 7, VERSIONS, CONTENTS, SECRET, status(401))
    for _ in range(2):
        assert fetch(replace(places, civitai_token=SECRET), reference) == CONTENTS[version]
    assert len(storage.seen) == 1
    assert (
        f"version {version}, for {next(v['baseModel'] for v in VERSIONS if v['id'] == version)}"
        in capfd.readouterr().out
    )


@pytest.mark.parametrize("denied", [status(401), status(403), redirect("/login"), page()])
def test_civitai_without_a_token(places: Settings, host: Host, storage: Host, denied: Callable) -> None:
    host.routes["/login"] = page()
    civitai(host, storage, 7, VERSIONS, CONTENTS, SECRET, denied)
    assert "it needs CIVITAI_API_TOKEN" in refusal(places, "civitai.com/models/7")
    wrong = replace(places, civitai_token=f"not-{SECRET}")
    assert "the token is not accepted" in refusal(wrong, "civitai.com/models/7")
    assert fetch(places, f"https://civitai.com/api/download/models/30?token={SECRET}") == CONTENTS[30]


def test_what_civitai_does_not_have(places: Settings, host: Host, storage: Host) -> None:
    civitai(host, storage, 7, VERSIONS[:1], CONTENTS, "", page())
    assert "it is for SDXL 1.0" in refusal(places, "civitai.com/models/7")
    assert "no such model" in refusal(places, "civitai.com/models/8")
    assert "no such version" in refusal(places, "civitai.com/models/8?modelVersionId=9")
    host.routes["/api/v1/models/9"] = page()
    assert "something else than an answer" in refusal(places, "civitai.com/models/9")
    for answer in ([], {}, {"modelVersions": None}, {"modelVersions": [{}]}, {"modelVersions": [{"files": 3}]}):
        host.routes["/api/v1/models/9"] = in_json(answer)
        assert "civitai.com/models/9" in refusal(places, "civitai.com/models/9")


def test_what_others_named_cannot_pretend_to_be_something_else_in_the_log(
    places: Settings, host: Host, storage: Host, capfd: pytest.CaptureFixture
) -> None:
    """Clients take the last line that looks like a progress bar for one."""
    bar = "x\n100%|####| 28/28 \x1b[2J\u202e"
    versions = [{"id": 2, "baseModel": f"Flux.1 {bar}", "trainedWords": [bar, "\ud800"]}]
    civitai(host, storage, 1, versions, {2: LORA}, "", page())
    hugging_face(host, storage, "o/r", {f"{bar}.safetensors": OTHER}, card={"instance_prompt": bar})
    storage.routes["/tar"] = File(make_tar({f"{bar}/a.safetensors": make_lora(seed=5), f"{bar}/config.yaml": b""}))
    storage.routes["/two"] = File(make_tar({f"{bar}/a.safetensors": LORA, f"{bar}/b.safetensors": OTHER}))
    for reference in ("civitai.com/models/1", "huggingface.co/o/r", storage.url("/tar")):
        with WeightsCache(replace(places, civitai_token=""), QUICK).open(reference) as weights:
            print(*weights.trigger_words, weights.name)
    print(refusal(places, storage.url("/two")))
    printed = "".join(capfd.readouterr())
    assert "28/28" in printed
    assert all(line.isprintable() and not line.startswith("100%") for line in printed.split("\n"))


def test_a_token_stays_with_its_host(places: Settings, host: Host, storage: Host) -> None:
    """Neither where a place redirects to, nor any other place, nor a stranger's URL gets to see it."""
    tokens = replace(places, hf_token=SECRET, civitai_token=SECRET, replicate_token=SECRET)
    storage.routes["/a"] = File(LORA)
    host.routes["/owner/name/_weights"] = redirect(storage.url("/a"))
    assert fetch(tokens, "owner/name") == LORA
    assert host.seen[0].headers["Authorization"] == f"Bearer {SECRET}"
    assert fetch(tokens, storage.url("/a?x=1")) == LORA
    assert all("Authorization" not in request.headers for request in storage.seen)


def test_a_signed_url_keeps_its_signature_and_nobody_else_sees_it(
    environment: Settings, host: Host, capfd: pytest.CaptureFixture
) -> None:
    host.routes["/a"] = File(LORA)
    with WeightsCache(environment, QUICK).open(host.url(f"/a?X-Amz-Signature={SECRET}&b=%2F")) as weights:
        assert weights.name == host.url("/a")
    assert host.seen[0].query == {"X-Amz-Signature": SECRET, "b": "/"}
    login = host.address.replace("//", f"//user%40x:{SECRET}@")
    assert fetch(environment, f"{login}/a") == LORA
    assert host.seen[-1].headers["Authorization"] == "Basic " + base64.b64encode(f"user@x:{SECRET}".encode()).decode()


# ---------------------------------------------------------------------------------------------------------------------
# Downloads


@pytest.mark.parametrize("ranges", ["good", "none", "refused", "from the start", "elsewhere"])
def test_a_large_file_is_right_whatever_the_host_makes_of_ranges(
    environment: Settings, host: Host, ranges: str
) -> None:
    host.routes["/a"] = File(LARGE, ranges=ranges)
    assert fetch(environment, host.url("/a")) == LARGE
    parts = [request for request in host.seen if "Range" in request.headers]
    assert len(parts) == 1 if ranges != "good" else len(parts) >= 3


def test_without_ranges_there_is_one_stream(environment: Settings, host: Host) -> None:
    file = host.routes["/a"] = File(LARGE, ranges="none")
    fetch(environment, host.url("/a"))
    assert file.sent < len(LARGE) + 8 * MIB


@pytest.mark.parametrize("content", [LORA, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("ranges", ["good", "none", "from the start"])
@pytest.mark.parametrize("etag", ['"1"', None])
def test_a_broken_connection_is_taken_up_again(
    environment: Settings, host: Host, content: bytes, ranges: str, etag: str | None
) -> None:
    file = host.routes["/a"] = File(content, etag=etag, ranges=ranges, breaks=2, breaks_after=len(content) // 3)
    settings = environment
    if ranges == "from the start":
        # What came before the break is compared with what comes after it.
        assert "changed while it was being downloaded" in refusal(settings, host.url("/a"))
        return
    assert fetch(settings, host.url("/a")) == content
    if ranges == "good" and content == LORA:
        assert file.sent < len(content) + 4096


def test_a_file_that_changes_meanwhile_is_not_glued_together(environment: Settings, host: Host) -> None:
    broken = File(LORA, etag='"1"', breaks=1, breaks_after=9_000)
    host.routes["/a"] = in_turn(broken, File(OTHER, etag='"2"'))
    assert "changed while it was being downloaded" in refusal(environment, host.url("/a"))
    assert fetch(environment, host.url("/a")) == OTHER


def test_a_link_that_expires_meanwhile_is_asked_for_again(environment: Settings, host: Host, storage: Host) -> None:
    storage.routes["/old"] = in_turn(File(LORA, breaks=1, breaks_after=9_000), status(403))
    storage.routes["/new"] = File(LORA)
    host.routes["/a"] = in_turn(redirect(storage.url("/old")), redirect(storage.url("/new")))
    assert fetch(environment, host.url("/a")) == LORA


def test_a_host_that_always_breaks_off_is_given_up(environment: Settings, host: Host) -> None:
    host.routes["/a"] = File(LORA, ranges="none", breaks=99, breaks_after=5_000)
    assert "failed or broke off" in refusal(environment, host.url("/a"))
    assert len(host.seen) == 1 + len(QUICK.pauses)
    host.routes["/a"] = short(LORA[:5_000], len(LORA))
    assert "failed or broke off" in refusal(environment, host.url("/a"))
    host.routes["/a"] = File(LORA)
    assert fetch(environment, host.url("/a")) == LORA


def test_slow_and_silent_hosts_are_given_up(environment: Settings, host: Host) -> None:
    host.routes |= {"/drip": File(LORA, delay=0.01, slice=1, ranges="none"), "/silent": silent}
    impatient = replace(QUICK, pauses=())
    assert "bytes a second" in refusal(environment, host.url("/drip"), impatient)
    assert "does not answer" in refusal(environment, host.url("/silent"), impatient)


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_redirects_lead_to_other_hosts(environment: Settings, host: Host, storage: Host, code: int) -> None:
    host.routes["/a"] = redirect("/b?x=%20", code)
    host.routes["/b"] = redirect(storage.url("/c"), code)
    storage.routes["/c"] = File(LORA)
    assert fetch(environment, host.url("/a")) == LORA


def test_redirects_that_lead_nowhere(environment: Settings, host: Host) -> None:
    host.routes |= {"/a": redirect("/b"), "/b": redirect("/a"), "/file": redirect("file:///etc/passwd")}
    assert "in a circle" in refusal(environment, host.url("/a"))
    assert len(host.seen) < 12
    assert "instead of http(s)" in refusal(environment, host.url("/file"))
    for nowhere in ("http://[::1", "http://", "http://a:b/", "//"):
        host.routes["/nowhere"] = redirect(nowhere)
        assert refusal(environment, host.url("/nowhere"))


@pytest.mark.parametrize("code", [429, 500, 502, 503])
def test_what_passes_is_tried_again_and_what_does_not_is_not(environment: Settings, host: Host, code: int) -> None:
    host.routes["/a"] = in_turn(status(code), status(code), File(LORA))
    assert fetch(environment, host.url("/a")) == LORA
    host.routes["/b"] = status(code)
    assert f"answered {code}" in (said := refusal(environment, host.url("/b")))
    assert "try again later" in said
    assert len(host.asked("/b")) == 1 + len(QUICK.pauses)


@pytest.mark.parametrize("code", [400, 401, 403, 404, 410, 451])
def test_a_refusal_is_final(environment: Settings, host: Host, code: int) -> None:
    host.routes["/a"] = status(code)
    assert f"answered {code}" in refusal(environment, host.url(f"/a?token={SECRET}"))
    assert len(host.seen) == 1


def test_a_host_says_when_to_come_back(environment: Settings, host: Host) -> None:
    host.routes["/a"] = in_turn(status(429, {"Retry-After": "1"}), File(LORA))
    began = time.monotonic()
    assert fetch(environment, host.url("/a")) == LORA
    assert time.monotonic() - began >= 1
    host.routes["/b"] = status(503, {"Retry-After": "3600"})
    assert "try again later" in refusal(environment, host.url("/b"))
    assert len(host.asked("/b")) == 1


def test_hugging_face_and_civitai_are_asked_again_too(places: Settings, host: Host, storage: Host) -> None:
    hugging_face(host, storage, "o/r", {"a.safetensors": LORA})
    civitai(host, storage, 1, [{"id": 2, "baseModel": "Flux.1 D"}], {2: OTHER}, "", page())
    for path in ("/api/models/o/r/revision/main", "/api/v1/models/1"):
        host.routes[path] = in_turn(status(503), status(429, {"Retry-After": "0"}), host.routes[path])
    assert fetch(places, "huggingface.co/o/r") == LORA
    assert fetch(replace(places, civitai_token=""), "civitai.com/models/1") == OTHER
    host.routes["/api/models/o/x/revision/main"] = status(500)
    assert "answered 500; try again later" in refusal(places, "huggingface.co/o/x")


def test_hosts_that_are_not_there(environment: Settings) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        assert "failed or broke off" in refusal(environment, f"http://127.0.0.1:{closed.getsockname()[1]}/a")
    assert "no host" in refusal(environment, "https://nobody.invalid/a")


def test_progress_is_shown_and_does_not_look_like_denoising(
    environment: Settings, host: Host, capfd: pytest.CaptureFixture
) -> None:
    host.routes["/a"] = File(LARGE, ranges="none", delay=0.004)
    fetch(environment, host.url(f"/a?token={SECRET}"))
    shown = capfd.readouterr().err.replace("\r", "\n").splitlines()
    bars = [line for line in shown if "%|" in line]
    assert bars
    assert all(bar.startswith(host.url("/a:")) for bar in bars)
    assert SECRET not in "".join(shown)


# ---------------------------------------------------------------------------------------------------------------------
# Cancelling


def cancel_when(condition: Callable[[], bool], work: Callable[[], object]) -> float:
    """Have Cog's exception raised in the thread that works, as Cog does it; the seconds until the thread was free."""
    caught: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            caught.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    wait_until(condition)
    kind = ctypes.py_object(cog.CancelationException)
    assert ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), kind) == 1
    began = time.monotonic()
    thread.join(10)
    seconds = time.monotonic() - began
    assert [type(error) for error in caught] == [cog.CancelationException]
    return seconds


def wait_until(condition: Callable[[], bool], seconds: float = 5) -> None:
    give_up = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.005)


STALLING = {
    "in the middle": lambda: File(LARGE, delay=0.01, slice=4096),
    "one stream": lambda: File(LARGE, delay=0.01, slice=4096, ranges="none"),
    "before an answer": lambda: silent,
    "waiting to try again": lambda: status(503, {"Retry-After": "20"}),
    "in the header": lambda: File(LORA, delay=5, slice=16),
}


@pytest.mark.parametrize("where", STALLING)
def test_a_cancelled_prediction_stops_its_download_at_once(environment: Settings, host: Host, where: str) -> None:
    host.routes["/a"] = STALLING[where]()
    patient = replace(QUICK, stall=20, longest_pause=20)
    seconds = cancel_when(
        lambda: len(host.seen) >= (3 if where == "in the middle" else 1),
        lambda: fetch(environment, host.url("/a"), patient),
    )
    assert seconds < 0.7
    wait_until(lambda: not [t for t in threading.enumerate() if t.name.startswith(("weights", "download"))], 1)
    check_cache(environment.cache_dir)
    assert list(environment.cache_dir.glob("loras/*")) == []
    host.routes["/a"] = File(LORA, etag='"2"')
    assert fetch(environment, host.url("/a")) == LORA


def test_looking_a_repo_up_can_be_cancelled_too(places: Settings, host: Host, storage: Host) -> None:
    host.routes["/api/models/o/r/revision/main"] = File(b"{}", delay=1.5)
    assert cancel_when(lambda: len(host.seen) > 0, lambda: fetch(places, "huggingface.co/o/r")) < 0.9
    hugging_face(host, storage, "o/r", {"a.safetensors": LORA})
    assert fetch(places, "huggingface.co/o/r") == LORA


def test_waiting_for_another_request_can_be_cancelled_too(environment: Settings, host: Host) -> None:
    file = host.routes["/a"] = File(LARGE, delay=0.02, ranges="none")
    first = threading.Thread(target=fetch, args=(environment, host.url("/a")))
    first.start()
    wait_until(lambda: file.sent > 0)

    def both_run() -> bool:
        return sum(thread.name == "weights" and thread.is_alive() for thread in threading.enumerate()) == 2

    assert cancel_when(both_run, lambda: fetch(environment, host.url("/a"))) < 0.7
    file.delay = 0
    first.join()
    assert len(host.seen) == 2  # the download, and its question about ranges


# ---------------------------------------------------------------------------------------------------------------------
# The cache


def test_what_has_not_changed_is_not_sent_again(environment: Settings, host: Host) -> None:
    file = host.routes["/a"] = File(LORA)
    for _ in range(3):
        assert fetch(environment, host.url("/a")) == LORA
    assert file.sent == len(LORA)
    assert [request.headers.get("If-None-Match") for request in host.seen] == [None, '"1"', '"1"']


def test_what_has_changed_is_fetched(environment: Settings, host: Host) -> None:
    for number, content in enumerate((LORA, OTHER, LORA)):
        host.routes["/a"] = File(content, etag=f'"{number}"')
        assert fetch(environment, host.url("/a")) == content


def test_a_host_that_ignores_conditions_is_left_as_soon_as_its_etag_is_known(environment: Settings, host: Host) -> None:
    file = host.routes["/a"] = File(LARGE, conditional=False, ranges="none", delay=0.002)
    fetch(environment, host.url("/a"))
    sent = file.sent
    assert fetch(environment, host.url("/a")) == LARGE
    assert file.sent < sent + 8 * MIB


def test_without_an_etag_nothing_old_is_served(environment: Settings, host: Host) -> None:
    host.routes["/a"] = in_turn(File(LORA, etag=None), File(OTHER, etag=None))
    assert fetch(environment, host.url("/a")) == LORA
    assert fetch(environment, host.url("/a")) == OTHER


@pytest.mark.parametrize("trouble", ["down", "500", "429", "silent", "breaks off"])
def test_when_the_host_is_down_the_cached_file_serves_and_the_log_says_so(
    environment: Settings, host: Host, capfd: pytest.CaptureFixture, trouble: str
) -> None:
    host.routes["/a"] = File(LORA)
    url = host.url(f"/a?token={SECRET}")
    fetch(environment, url)
    if trouble == "down":
        host.stop()
    troubles = {
        "500": status(500),
        "429": status(429),
        "silent": silent,
        "breaks off": File(OTHER, etag='"2"', ranges="none", breaks=99, breaks_after=5_000),
    }
    host.routes["/a"] = troubles.get(trouble, silent)
    assert fetch(environment, url) == LORA
    assert "The cached file is used." in capfd.readouterr().out


def test_when_hugging_face_is_down_the_cached_file_serves(places: Settings, host: Host, storage: Host) -> None:
    hugging_face(host, storage, "o/r", {"a.safetensors": LORA})
    fetch(places, "huggingface.co/o/r")
    host.routes.clear()
    host.routes["/api/models/o/r/revision/main"] = status(503)
    assert fetch(places, "huggingface.co/o/r") == LORA
    assert len(host.asked("/api/models/o/r/revision/main")) == 2


def test_what_was_withdrawn_is_not_served(environment: Settings, host: Host) -> None:
    host.routes["/a"] = File(LORA)
    fetch(environment, host.url("/a"))
    host.routes["/a"] = status(404)
    assert "answered 404" in refusal(environment, host.url("/a"))


def test_the_least_recently_used_goes_first_and_never_one_in_use(environment: Settings, host: Host) -> None:
    small = replace(environment, cache_bytes=3 * 20_500)
    contents = {name: make_lora(seed=ord(name)) for name in "abcd"}
    host.routes = {f"/{name}": File(content) for name, content in contents.items()}
    for name in "abca":
        fetch(small, host.url(f"/{name}"))
        time.sleep(0.01)
    with WeightsCache(small, QUICK).open(host.url("/b")) as used:
        os.utime(used.path, (0, 0))
        fetch(small, host.url("/d"))
        assert used.path.read_bytes() == contents["b"]
    kept = {file.read_bytes() for file in small.cache_dir.glob("loras/*")}
    assert kept == {contents[name] for name in "abd"}
    host.seen.clear()
    assert fetch(small, host.url("/c")) == contents["c"]
    assert [request.headers.get("If-None-Match") for request in host.seen] == [None]


def test_a_cache_that_is_too_small_says_so(environment: Settings, host: Host) -> None:
    host.routes = {"/a": File(LORA), "/b": File(OTHER)}
    small = replace(environment, cache_bytes=30_000)
    assert "WEIGHTS_CACHE_GB" in refusal(replace(environment, cache_bytes=10_000), host.url("/a"))
    with WeightsCache(small, QUICK).open(host.url("/a")):
        assert "WEIGHTS_CACHE_GB" in refusal(small, host.url("/b"))
    assert fetch(small, host.url("/b")) == OTHER


def test_compiled_code_in_the_cache_is_neither_counted_nor_evicted(environment: Settings, host: Host) -> None:
    compiled = environment.cache_dir / "compile" / "kernel"
    compiled.parent.mkdir(parents=True)
    compiled.write_bytes(bytes(100_000))
    host.routes = {"/a": File(LORA), "/b": File(OTHER)}
    small = replace(environment, cache_bytes=30_000)
    assert fetch(small, host.url("/a")) == LORA
    assert fetch(small, host.url("/b")) == OTHER
    assert compiled.stat().st_size == 100_000


@pytest.mark.parametrize("damage", [b"", b"{", b"null", b"[]", b'{"sha256": 3}', b'{"unknown": 1}', b"\xff"])
def test_a_record_that_cannot_be_read_is_forgotten(environment: Settings, host: Host, damage: bytes) -> None:
    host.routes["/a"] = File(LORA)
    fetch(environment, host.url("/a"))
    for record in environment.cache_dir.glob("references/*"):
        record.write_bytes(damage)
    assert fetch(environment, host.url("/a")) == LORA


def test_a_file_that_was_deleted_is_fetched_again(environment: Settings, host: Host) -> None:
    host.routes["/a"] = File(LORA)
    fetch(environment, host.url("/a"))
    for file in environment.cache_dir.glob("loras/*"):
        file.unlink()
    assert fetch(environment, host.url("/a")) == LORA


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of a few megabytes."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(disk)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no disk can be mounted: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("stated", [True, False], ids=["stated", "unstated"])
def test_a_full_disk(environment: Settings, host: Host, small_disk: Path, stated: bool) -> None:
    settings = replace(environment, cache_dir=small_disk / "cache")
    used, large = make_lora(6 * MIB, seed=9), make_lora(20 * MIB, seed=8)
    host.routes = {"/used": File(used), "/old": File(make_lora(5 * MIB, seed=7)), "/large": File(large, stated=stated)}
    fetch(settings, host.url("/old"))
    with WeightsCache(settings, QUICK).open(host.url("/used")) as weights:
        assert "the disk of the cache has" in refusal(settings, host.url("/large"))
        assert weights.path.read_bytes() == used
    check_cache(settings.cache_dir)
    assert fetch(settings, host.url("/large")) == large  # nothing is in use any more: the rest made room
    assert fetch(settings, host.url("/used")) == used


def test_a_disk_that_something_else_fills(environment: Settings, host: Host, small_disk: Path) -> None:
    settings = replace(environment, cache_dir=small_disk / "cache")
    filler = small_disk / "filler"
    filler.write_bytes(bytes(DISK - 3 * MIB))
    host.routes["/a"] = File(make_lora(4 * MIB))
    assert "the disk of the cache has" in refusal(settings, host.url("/a"))
    filler.unlink()
    assert fetch(settings, host.url("/a")) == host.routes["/a"].content


# ---------------------------------------------------------------------------------------------------------------------
# Processes


def start(*arguments: object, target: Callable = fetch) -> multiprocessing.Process:
    process = multiprocessing.get_context("fork").Process(target=target, args=arguments)
    process.start()
    return process


def test_many_processes_download_once(environment: Settings, host: Host) -> None:
    file = host.routes["/a"] = File(LARGE, ranges="none", etag=None, delay=0.001)
    processes = [start(environment, host.url("/a")) for _ in range(8)]
    for process in processes:
        process.join(30)
        assert process.exitcode == 0
    assert len([request for request in host.seen if "Range" not in request.headers]) == 1
    assert file.sent < len(LARGE) + 8 * MIB


@pytest.mark.parametrize("ranges", ["good", "none"])
def test_a_download_that_is_killed_leaves_nothing_that_is_trusted(
    environment: Settings, host: Host, ranges: str
) -> None:
    file = host.routes["/a"] = File(LARGE, delay=0.01, ranges=ranges)
    process = start(environment, host.url("/a"))
    wait_until(lambda: file.sent > MIB)
    process.kill()
    process.join()
    check_cache(environment.cache_dir, after_kill=True)
    assert list(environment.cache_dir.glob("loras/*")) == []
    file.delay = 0
    assert fetch(environment, host.url("/a")) == LARGE


def fetch_all(settings: Settings, urls: list[str]) -> None:
    for url in urls:
        fetch(settings, url)


def test_killed_at_any_moment_the_cache_holds_whole_files_only(environment: Settings, host: Host) -> None:
    """Small files, so that most of the time goes into renames, records and evictions."""
    contents = {f"/{number}": make_lora(5_000, seed=number) for number in range(6)}
    host.routes = {path: File(content) for path, content in contents.items()}
    urls = [host.url(path) for path in contents]
    small = replace(environment, cache_bytes=4 * 5_300)
    moments = random.Random(1)
    for _ in range(8):
        processes = [start(small, moments.sample(urls * 5, 30), target=fetch_all) for _ in range(2)]
        time.sleep(moments.uniform(0.02, 0.15))
        for process in processes:
            process.kill()
            process.join()
        check_cache(small.cache_dir, after_kill=True)
    for path, content in contents.items():
        assert fetch(small, host.url(path)) == content


def test_one_that_dies_while_others_wait_is_replaced(environment: Settings, host: Host) -> None:
    file = host.routes["/a"] = File(LARGE, delay=0.01, ranges="none")
    first = start(environment, host.url("/a"))
    wait_until(lambda: file.sent > MIB)
    others = [start(environment, host.url("/a")) for _ in range(3)]
    time.sleep(0.1)
    first.kill()
    first.join()
    file.delay = 0
    for process in others:
        process.join(10)
        assert process.exitcode == 0


# ---------------------------------------------------------------------------------------------------------------------
# Security

PRIVATE = [
    *("127.0.0.1", "localhost", "127.1", "2130706433", "0x7f000001", "0.0.0.0", "[::1]", "[::]", "[::ffff:127.0.0.1]"),
    *("10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.100.100.200", "168.63.129.16"),
    *("[fd00:ec2::254]", "[fe80::1]", "[64:ff9b::a00:1]", "[2002:7f00:1::]", "224.0.0.1", "255.255.255.255"),
    *("user@127.0.0.1", "127.0.0.1."),
]  # fmt: skip


@pytest.mark.parametrize("address", PRIVATE)
def test_private_addresses_are_refused_without_being_connected_to(
    environment: Settings, host: Host, address: str
) -> None:
    host.routes["/a"] = File(LORA)
    port = host.address.rpartition(":")[2]
    began = time.monotonic()
    said = refusal(replace(environment, allow_private_hosts=False), f"http://{address}:{port}/a?token={SECRET}")
    assert "address of the server's own network" in said or "no host" in said
    assert time.monotonic() - began < 1
    assert host.seen == []


# In a network of its own: public addresses that are nobody else's, and a name server that changes its mind.
PUBLIC_NETWORK = """
import socket, struct, subprocess, sys, threading
from pathlib import Path
from dataclasses import replace
from harness.hosts import File, Host, redirect, _Handler, _Server
from sources.client import Patience
from settings import MINIATURE, Settings
from weights import WeightsCache

LORA = (Path(sys.argv[1]) / "lora").read_bytes()

def fetch(settings, reference):
    with WeightsCache(settings, Patience(connect=2, stall=1, pauses=())).open(reference) as weights:
        return weights.path.read_bytes()

for address in ("93.184.216.34", "93.184.216.35"):
    subprocess.run(["ip", "address", "add", address + "/32", "dev", "lo"], check=True)
subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
folder = Path(sys.argv[1])
(folder / "resolv.conf").write_text("nameserver 127.0.0.1\\n")
subprocess.run(["mount", "--bind", str(folder / "resolv.conf"), "/etc/resolv.conf"], check=True)

answers = {"rebinding": ["93.184.216.34", "127.0.0.1"], "fixed": ["93.184.216.34"], "both": ["93.184.216.34 127.0.0.1"]}
asked = []

def serve_names():
    server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    server.bind(("127.0.0.1", 53))
    while True:
        query, client = server.recvfrom(512)
        length = query[12]
        name = query[13 : 13 + length].decode()
        end = query.index(b"\\0", 12) + 1
        kind = struct.unpack(">H", query[end : end + 2])[0]
        addresses = []
        if kind == 1:
            asked.append(name)
            turns = answers[name]
            addresses = (turns.pop(0) if len(turns) > 1 else turns[0]).split()
        records = b"".join(b"\\xc0\\x0c" + struct.pack(">HHIH", 1, 1, 0, 4) + socket.inet_aton(a) for a in addresses)
        header = query[:2] + struct.pack(">HHHHH", 0x8180, 1, len(addresses), 0, 0)
        server.sendto(header + query[12 : end + 4] + records, client)

threading.Thread(target=serve_names, daemon=True).start()

class Public(Host):
    def __enter__(self):
        self._server = _Server(("0.0.0.0", 8000), _Handler)
        self._server.host = self
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()
        return self

settings = Settings(MINIATURE, cache_dir=folder / "cache")
with Public({"/a": File(LORA), "/inside": redirect("http://127.0.0.1:8000/a"), "/name": redirect("http://both.test:8000/a"),
             "/metadata": redirect("http://169.254.169.254/latest/meta-data")}) as host:
    assert fetch(settings, "http://fixed.test:8000/a") == LORA
    # Looked up once: what was checked is what is connected to, whatever the name says a moment later.
    asked.clear()
    assert fetch(settings, "http://rebinding.test:8000/a") == LORA
    assert asked == ["rebinding"], asked
    for path in ("rebinding.test:8000/a?again", "both.test:8000/a", "fixed.test:8000/inside", "fixed.test:8000/name",
                 "fixed.test:8000/metadata"):
        host.seen.clear()
        try:
            fetch(settings, "http://" + path)
        except ValueError as error:
            print(error)
            assert "address of the server's own network" in str(error), error
        else:
            raise AssertionError(path)
        assert [request.path for request in host.seen] == (["/" + path.split("/")[1]] if "fixed" in path else []), path
    replaced = replace(settings, allow_private_hosts=True)
    assert fetch(replaced, "http://fixed.test:8000/inside") == LORA
"""


def test_names_and_redirects_that_lead_inside_are_refused_by_the_address_connected_to(tmp_path: Path) -> None:
    alone = ["unshare", "--net", "--mount"]
    if subprocess.run([*alone, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no network of its own can be had")
    (tmp_path / "lora").write_bytes(LORA)
    done = subprocess.run(
        [*alone, sys.executable, "-c", PUBLIC_NETWORK, str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr


CERTIFIED = """
import ssl, sys
from pathlib import Path
from harness.hosts import File, Host
from sources.client import Patience
from settings import MINIATURE, Settings
from weights import WeightsCache

folder = Path(sys.argv[1])
settings = Settings(MINIATURE, cache_dir=folder / sys.argv[2], allow_private_hosts=True)
weights = WeightsCache(settings, Patience(pauses=()))

def refusal(reference):
    try:
        with weights.open(reference):
            raise AssertionError(reference)
    except ValueError as error:
        return error

with Host({"/a": File((folder / "lora").read_bytes())}) as host:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "certificate", folder / "key")
    host._server.socket = context.wrap_socket(host._server.socket, server_side=True)
    port = host.address.rpartition(":")[2]
    if sys.argv[2] == "trusted":
        with weights.open(f"https://localhost:{port}/a") as opened:
            assert opened.path.read_bytes() == (folder / "lora").read_bytes()
    print(refusal(f"https://{'127.0.0.1' if sys.argv[2] == 'trusted' else 'localhost'}:{port}/a"))
"""


def test_the_certificate_must_be_the_hosts_own(environment: Settings, tmp_path: Path) -> None:
    """Connected to by address, and still checked by name."""
    key, certificate = tmp_path / "key", tmp_path / "certificate"
    made = subprocess.run(
        f"openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -keyout {key} "
        f"-out {certificate} -subj /CN=localhost -addext subjectAltName=DNS:localhost".split(),
        capture_output=True,
        check=False,
    )  # fmt: skip
    if made.returncode:
        pytest.skip("no openssl to make a certificate with")
    (tmp_path / "lora").write_bytes(LORA)
    for trust, authorities in (("trusted", {"SSL_CERT_FILE": str(certificate)}), ("unknown", {})):
        done = subprocess.run(
            [sys.executable, "-c", CERTIFIED, str(tmp_path), trust],
            cwd=ROOT,
            env={**os.environ, **authorities},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert "the certificate of" in done.stdout


# ---------------------------------------------------------------------------------------------------------------------
# The predictor behind the real Cog server

SMALL = {"prompt": "a red fox", "megapixels": "0.25", "num_inference_steps": 1, "disable_safety_checker": True}


def lora_for_the_miniature(seed: int) -> bytes:
    (file, *_) = Path(MINIATURE.dev).glob("transformer/*.safetensors")
    layer = "transformer_blocks.0.attn.to_q"
    with safe_open(file, "np") as weights:
        rows, columns = weights.get_slice(f"{layer}.weight").get_shape()
    values = np.random.default_rng(seed).normal(size=(4, rows + columns)).astype(np.float32)
    down, up = values[:, :columns], values[:, columns:].T
    name = f"transformer.{layer}"
    return save(
        {f"{name}.lora_A.weight": np.ascontiguousarray(down), f"{name}.lora_B.weight": np.ascontiguousarray(up)}
    )


def test_a_prediction_cancelled_while_its_lora_comes_frees_the_server_at_once(server: CogServer, host: Host) -> None:
    lora = lora_for_the_miniature(seed=1)
    file = host.routes["/a"] = File(lora, delay=0.3, slice=2048)
    inputs = SMALL | {"replicate_weights": host.url(f"/a?token={SECRET}")}
    server.start(inputs, "cancelled-download")
    wait_until(lambda: file.sent > 0)
    assert server.cancel("cancelled-download") == 200
    began = time.monotonic()
    wait_until(lambda: server.health()["status"] == "READY")
    assert time.monotonic() - began < 1
    sent = file.sent
    time.sleep(0.7)
    assert file.sent <= sent + 2 * file.slice
    file.delay = 0
    answer = server.predict(inputs)
    assert failure(answer) is None
    assert f"LoRA {host.url('/a')} at 1" in answer["logs"]
    assert SECRET not in str(answer)


def test_what_a_download_says_is_in_the_log_of_its_prediction(server: CogServer, host: Host) -> None:
    host.routes["/a"] = File(make_tar({"x/lora.safetensors": lora_for_the_miniature(seed=2)}))
    answer = server.predict(SMALL | {"extra_lora": host.url("/a")})
    assert "x/lora.safetensors of the archive" in answer["logs"]
    host.stop()
    assert "The cached file is used." in server.predict(SMALL | {"extra_lora": host.url("/a")})["logs"]


def test_cog_itself_fetches_images_and_masks_without_our_rules(server: CogServer, host: Host) -> None:
    """Before the predictor is called, from any address, without a bound, the URL in its error: there is no setting.

    It does honour HTTP_PROXY and HTTPS_PROXY, so a proxy is the place for rules about images.
    """
    host.routes |= {"/photo.png": redirect("/inside?signature=shown"), "/inside": status(404)}
    said = failure(server.predict(SMALL | {"image": host.url("/photo.png")}))
    assert [request.path for request in host.seen] == ["/photo.png", "/inside"]
    assert all(request.headers["User-Agent"].startswith("python-requests") for request in host.seen)
    assert "signature=shown" in said


# ---------------------------------------------------------------------------------------------------------------------
# The operator's own: paths and base models


@pytest.mark.parametrize("form", PACKED)
def test_the_operators_file_may_lie_on_the_disk(environment: Settings, tmp_path: Path, form: str) -> None:
    file = tmp_path / "mine"
    file.write_bytes(PACKED[form])
    for reference in (str(file), f"file://{file}"):
        for _ in range(2):
            with WeightsCache(environment).open_local(reference) as weights:
                assert weights.path.read_bytes() == LORA
                assert weights.name == "mine"
                assert (weights.path == file) == (form == "raw")
    file.write_bytes(OTHER)
    with WeightsCache(environment).open_local(str(file)) as weights:
        assert weights.path.read_bytes() == OTHER


def test_the_operators_folder(environment: Settings, tmp_path: Path) -> None:
    folder = tmp_path / "trained" / "output"
    folder.mkdir(parents=True)
    with pytest.raises(ValueError, match="no regular"):
        WeightsCache(environment).open_local(str(tmp_path / "trained")).__enter__()
    (folder / "lora.safetensors").write_bytes(LORA)
    (folder / "optimizer.safetensors").write_bytes(OTHER)
    with WeightsCache(environment).open_local(str(tmp_path / "trained")) as weights:
        assert weights.path == folder / "lora.safetensors"


def test_the_operators_reference(environment: Settings, host: Host) -> None:
    host.routes["/a"] = File(LORA)
    with WeightsCache(environment).open_local(host.url("/a")) as weights:
        assert weights.path.read_bytes() == LORA
    with pytest.raises(ValueError, match="There is no file or folder '/nowhere/at/all'"):
        WeightsCache(environment).open_local("/nowhere/at/all").__enter__()


PIPELINE = {
    "model_index.json": b"{}",
    "README.md": b"hello",
    "flux1-dev.safetensors": b"the whole of it again",
    "ae.safetensors": b"again",
    "scheduler/scheduler_config.json": b"{}",
    "transformer/config.json": b"{}",
    "transformer/diffusion_pytorch_model-00001-of-00002.safetensors": LARGE,
    "transformer/diffusion_pytorch_model-00002-of-00002.safetensors": LORA,
    "transformer/diffusion_pytorch_model.safetensors.index.json": b"{}",
    "transformer/diffusion_pytorch_model.fp16.safetensors": b"half",
    "text_encoder/model.safetensors": OTHER,
    "text_encoder/pytorch_model.bin": b"pickled",
    "tokenizer/merges.txt": b"a b",
    "tokenizer_2/spiece.model": b"pieces",
    "images/example.png": b"png",
    "../outside.json": b"{}",
}
NEEDED = set(PIPELINE) - {
    "README.md",
    "flux1-dev.safetensors",
    "ae.safetensors",
    "transformer/diffusion_pytorch_model.fp16.safetensors",
    "text_encoder/pytorch_model.bin",
    "images/example.png",
    "../outside.json",
}


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_folder_is_a_snapshot_as_it_is(environment: Settings, tmp_path: Path) -> None:
    assert snapshot(str(tmp_path), environment) == tmp_path
    for model in (str(tmp_path / "missing"), "./missing/model", "name", "https://huggingface.co/o/r"):
        with pytest.raises(ValueError, match="is no folder"):
            snapshot(model, environment)


def test_of_a_base_model_comes_what_is_needed_once(places: Settings, host: Host, storage: Host) -> None:
    hugging_face(host, storage, "o/r", PIPELINE, revisions=("main", "v2"))
    folder = snapshot("o/r", places, QUICK)
    assert files_in(folder) == {path: PIPELINE[path] for path in NEEDED}
    sent = len(storage.seen)
    assert snapshot("o/r@v2", places, QUICK) == folder
    hugging_face(host, storage, "o/r", PIPELINE | {"tokenizer/merges.txt": b"c d"}, commit="d" * 40)
    newer = snapshot("o/r", places, QUICK)
    assert files_in(newer)["tokenizer/merges.txt"] == b"c d"
    assert len(storage.seen) == sent + 1
    host.stop()
    assert snapshot("o/r", places, QUICK) == newer


def test_a_base_model_in_transformers_layout(places: Settings, host: Host, storage: Host) -> None:
    files = {
        "config.json": b"{}",
        "preprocessor_config.json": b"{}",
        "pytorch_model.bin": b"pickled",
        "flax_model.msgpack": b"flax",
        "onnx/model.onnx": b"onnx",
        "quantized.pt": b"pt",
    }
    hugging_face(host, storage, "o/r", files)
    assert set(files_in(snapshot("o/r", places, QUICK))) == {
        "config.json",
        "preprocessor_config.json",
        "pytorch_model.bin",
    }
    hugging_face(host, storage, "o/r", files | {"model.safetensors": LORA}, commit="d" * 40)
    assert set(files_in(snapshot("o/r", places, QUICK))) == {
        "config.json",
        "preprocessor_config.json",
        "model.safetensors",
    }


def test_a_killed_download_of_a_base_model_goes_on_where_it_was(places: Settings, host: Host, storage: Host) -> None:
    content = make_lora(40 * MIB, seed=11)
    hugging_face(host, storage, "o/r", {"config.json": b"{}", "model.safetensors": content})
    file = storage.routes[f"/{hashlib.sha256(content).hexdigest()}"] = File(content, delay=0.01, etag='"x"')
    process = start("o/r", places, QUICK, target=snapshot)
    wait_until(lambda: any(path.stat().st_size for path in places.cache_dir.glob("models/*/blobs/*.pieces")), 20)
    process.kill()
    process.join()
    (journal,) = places.cache_dir.glob("models/*/blobs/*.pieces")
    kept = {f"bytes={start}" for start in journal.read_text().split()}
    file.delay = 0
    storage.seen.clear()
    assert files_in(snapshot("o/r", places, QUICK))["model.safetensors"] == content
    asked = {request.headers.get("Range", "").partition("-")[0] for request in storage.seen}
    assert kept
    assert not asked & kept


def test_a_damaged_base_model_is_not_kept(places: Settings, host: Host, storage: Host) -> None:
    hugging_face(host, storage, "o/r", {"config.json": b"{}", "model.safetensors": LORA})
    path = f"/{hashlib.sha256(LORA).hexdigest()}"
    storage.routes[path] = File(OTHER)
    with pytest.raises(ValueError, match="arrived damaged"):
        snapshot("o/r", places, QUICK)
    storage.routes[path] = File(LORA)
    assert files_in(snapshot("o/r", places, QUICK))["model.safetensors"] == LORA


def test_a_gated_base_model_says_what_to_accept_and_what_to_set(places: Settings, host: Host, storage: Host) -> None:
    hugging_face(host, storage, "black-forest-labs/FLUX.1-dev", PIPELINE, token=SECRET, gated=True)
    with pytest.raises(
        ValueError, match=r"accept its conditions at https://huggingface.co/black-forest-labs/FLUX.1-dev"
    ):
        snapshot("black-forest-labs/FLUX.1-dev", places, QUICK)
    with pytest.raises(ValueError, match="the account of HF_TOKEN"):
        snapshot("black-forest-labs/FLUX.1-dev", replace(places, hf_token=f"not-{SECRET}"), QUICK)
    folder = snapshot("black-forest-labs/FLUX.1-dev", replace(places, hf_token=SECRET), QUICK)
    assert set(files_in(folder)) == NEEDED
    with pytest.raises(ValueError, match="does not exist, or is private and"):
        snapshot("o/nothing", places, QUICK)


def test_a_base_model_that_does_not_fit_on_the_disk(
    places: Settings, host: Host, storage: Host, small_disk: Path
) -> None:
    hugging_face(host, storage, "o/r", {"config.json": b"{}", "model.safetensors": make_lora(25 * MIB)})
    with pytest.raises(ValueError, match="but the disk has"):
        snapshot("o/r", replace(places, cache_dir=small_disk / "cache"), QUICK)
