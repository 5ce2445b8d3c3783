"""Base models: what is needed of a repo, once, in the cache that Hugging Face's own tools use."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import constants

from harness.hosts import File, Host, hugging_face, in_json, status
from harness.waiting import wait_until
from settings import MIB, MINIATURE, Settings
from sources.base_models import on_disk, outline, snapshot
from tests.support.caches import SECRET
from tests.support.fetching import LARGE, LORA, OTHER, QUICK, make_lora, start
from tests.support.processes import finished
from weights import fetch

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
    "text_encoder/pytorch_model.bin.index.json": b"{}",
    "tokenizer/merges.txt": b"a b",
    "tokenizer_2/spiece.model": b"pieces",
    "images/example.png": b"png",
    "../outside.json": b"{}",
}


CONFIG = b'{"size": 1}'
NEEDED = set(PIPELINE) - {
    "README.md",
    "flux1-dev.safetensors",
    "ae.safetensors",
    "transformer/diffusion_pytorch_model.fp16.safetensors",
    "text_encoder/pytorch_model.bin",
    "text_encoder/pytorch_model.bin.index.json",
    "images/example.png",
    "../outside.json",
}


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_folder_is_a_snapshot_as_it_is(environment: Settings, tmp_path: Path) -> None:
    assert snapshot(str(tmp_path), environment) == tmp_path
    for model in (str(tmp_path / "missing"), "./missing/model", "name", f"https://u:{SECRET}@huggingface.co/o/r"):
        with pytest.raises(ValueError, match="is no folder") as refused:
            snapshot(model, environment)
        assert SECRET not in str(refused.value)


def test_of_a_base_model_comes_what_is_needed_once(places: Settings, host: Host, storage: Host) -> None:
    hugging_face(host, storage, "o/r", PIPELINE, revisions=("main", "v2"))
    folder = snapshot("o/r", places, QUICK)
    assert files_in(folder) == {path: PIPELINE[path] for path in NEEDED}
    sent = len(storage.seen)
    host.seen.clear()
    assert snapshot("o/r", places, QUICK) == snapshot("o/r@v2", places, QUICK) == folder
    assert [request.path.rpartition("/")[2] for request in host.seen] == ["main", "v2"]
    hugging_face(host, storage, "o/r", PIPELINE | {"tokenizer/merges.txt": b"c d"}, commit="d" * 40)
    newer = snapshot("o/r", places, QUICK)
    assert files_in(newer)["tokenizer/merges.txt"] == b"c d"
    assert len(storage.seen) == sent + 1
    host.stop()
    assert snapshot("o/r", places, QUICK) == newer
    assert snapshot(f"o/r@{'c' * 40}", places, QUICK) == folder


def test_a_commit_of_which_single_files_were_fetched_is_completed(
    places: Settings, host: Host, storage: Host, hub_cache: Path
) -> None:
    hugging_face(host, storage, "o/r", PIPELINE)
    pinned, folder = f"o/r@{'c' * 40}", hub_cache / "models--o--r" / "snapshots" / ("c" * 40)
    for path in ("model_index.json", "transformer/config.json"):  # as the library writes them, but for its links
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(PIPELINE[path])
    assert snapshot(pinned, places, QUICK) == folder
    assert files_in(folder) == {path: PIPELINE[path] for path in NEEDED}
    host.stop()
    assert snapshot(pinned, places, QUICK) == folder


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


def test_what_a_killed_download_leaves_is_deleted_and_what_another_process_writes_is_not(
    places: Settings, host: Host, storage: Host, hub_cache: Path
) -> None:
    hugging_face(host, storage, "o/r", {"config.json": b"{}", "model.safetensors": LARGE})
    digest = hashlib.sha256(LARGE).hexdigest()
    storage.routes[f"/{digest}"] = File(LARGE, delay=0.01)

    def parts() -> set[Path]:
        return set(hub_cache.glob(f"models--o--r/blobs/{digest}.*.incomplete"))

    killed = start("o/r", places, QUICK, target=snapshot)
    wait_until(lambda: parts() and storage.asked(f"/{digest}"))
    killed.kill()
    killed.join()
    left = parts()
    other = start("o/r", places, QUICK, target=snapshot)
    wait_until(lambda: parts() - left and not parts() & left)
    folder = snapshot("o/r", places, QUICK)  # waits for the other's download
    other.join()
    assert other.exitcode == 0
    assert len(storage.asked(f"/{digest}")) == 2
    assert files_in(folder)["model.safetensors"] == LARGE
    assert parts() == set()


@pytest.mark.parametrize(
    "odd", [{"size": "many"}, {"rfilename": 5}, {"rfilename": None}, 7], ids=lambda odd: json.dumps(odd)
)
def test_what_a_host_says_that_is_no_answer_is_told(places: Settings, host: Host, odd: object) -> None:
    listed = {"rfilename": "config.json", "size": 2, "blobId": "0" * 40}
    siblings = [listed | odd] if isinstance(odd, dict) else odd
    host.routes["/api/models/o/r/revision/main"] = in_json({"id": "o/r", "sha": "c" * 40, "siblings": siblings})
    with pytest.raises(ValueError, match=r"^huggingface\.co/o/r cannot be fetched: 127\.0\.0\.1 sent something else"):
        snapshot("o/r", places, QUICK)


def test_a_note_of_a_commit_that_is_no_text_is_written_anew(
    places: Settings, host: Host, storage: Host, hub_cache: Path
) -> None:
    hugging_face(host, storage, "o/r", {"config.json": b"{}"})
    (ref := hub_cache / "models--o--r" / "refs" / "main").parent.mkdir(parents=True)
    ref.write_bytes(b"\xff")
    snapshot("o/r", places, QUICK)
    assert ref.read_text() == "c" * 40


def test_a_file_of_another_size_is_not_kept(places: Settings, host: Host, storage: Host) -> None:
    hugging_face(host, storage, "o/r", {"config.json": b"{}", "model.safetensors": LORA})
    path = f"/{hashlib.sha256(LORA).hexdigest()}"
    storage.routes[path] = File(LORA[:-1])
    with pytest.raises(ValueError, match=r"^huggingface.co/o/r arrived damaged"):
        snapshot("o/r", places, QUICK)
    storage.routes[path] = File(LORA)
    assert files_in(snapshot("o/r", places, QUICK))["model.safetensors"] == LORA


def test_a_host_that_goes_down_in_the_middle_leaves_what_was_there(
    places: Settings, host: Host, storage: Host, capfd: pytest.CaptureFixture[str]
) -> None:
    hugging_face(host, storage, "o/r", PIPELINE)
    folder = snapshot("o/r", places, QUICK)
    capfd.readouterr()
    files = PIPELINE | {"tokenizer/merges.txt": b"c d", "transformer/config.json": CONFIG}
    hugging_face(host, storage, "o/r", files, commit="d" * 40)
    storage.routes[f"/{hashlib.sha256(b'c d').hexdigest()}"] = status(500)
    for _ in range(2):
        assert snapshot("o/r", places, QUICK) == folder
        (line,) = "".join(capfd.readouterr()).splitlines()
        assert line.endswith("answered 500; try again later. The files on the disk are used.")


def test_a_download_that_breaks_off_begins_again_and_what_has_come_stays(
    places: Settings, host: Host, storage: Host
) -> None:
    hugging_face(host, storage, "o/r", {"config.json": b"{}", "model.safetensors": LARGE})
    broken = File(LARGE, breaks=1, breaks_after=MIB)
    storage.routes[f"/{hashlib.sha256(LARGE).hexdigest()}"] = broken
    assert files_in(snapshot("o/r", places, QUICK))["model.safetensors"] == LARGE
    assert broken.sent == MIB + len(LARGE)
    assert len(storage.asked(f"/{hashlib.sha256(b'{}').hexdigest()}")) == 1


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
    with pytest.raises(ValueError, match="has no revision 'missing'; it must be a branch, a tag or a commit"):
        snapshot("black-forest-labs/FLUX.1-dev@missing", places, QUICK)


def test_a_base_model_that_does_not_fit_on_the_disk(
    places: Settings, host: Host, storage: Host, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(small_disk / "hub"))
    hugging_face(host, storage, "o/r", {"config.json": b"{}", "model.safetensors": make_lora(25 * MIB)})
    with pytest.raises(ValueError, match=r"needs 0.02 GB, but the disk of Hugging Face's cache has 0.02 GB left"):
        snapshot("o/r", places, QUICK)
    assert storage.seen == []


SHARED = {
    "scheduler/scheduler_config.json": b"{}",
    "transformer/config.json": b"{}",
    "transformer/diffusion_pytorch_model-00001-of-00002.safetensors": LARGE,
    "transformer/diffusion_pytorch_model-00002-of-00002.safetensors": LORA,
    "transformer/diffusion_pytorch_model.safetensors.index.json": b"{}",
}


def weights_asked(storage: Host, files: dict[str, bytes]) -> int:
    """How often the host was asked for any of their weights."""
    weights = [content for path, content in files.items() if path.endswith((".safetensors", ".bin"))]
    return sum(len(storage.asked(f"/{hashlib.sha256(content).hexdigest()}")) for content in weights)


def test_an_outline_needs_no_weights_and_is_that_of_the_folder(places: Settings, host: Host, storage: Host) -> None:
    files = PIPELINE | {"transformer/config.json": CONFIG}
    hugging_face(host, storage, "o/r", files)
    known = outline("o/r", places, QUICK)
    assert known.configs == {"transformer": {"size": 1}}
    assert known.weights == {"transformer": len(LARGE) + len(LORA), "text_encoder": len(OTHER)}
    assert weights_asked(storage, files) == 0
    fetched = len(storage.seen)
    folder = snapshot("o/r", places, QUICK)
    assert weights_asked(storage, files) > 0
    assert len(storage.seen) == fetched + weights_asked(storage, files)  # what is small came once
    assert outline(str(folder), places) == known
    assert outline("o/r", places, QUICK) == known
    host.stop()
    assert outline("o/r", places, QUICK) == known


def test_of_a_model_that_shares_parts_only_its_own_come(places: Settings, host: Host, storage: Host) -> None:
    hugging_face(host, storage, "o/r", PIPELINE)
    parts = ("transformer", "scheduler")
    assert set(outline("o/r", places, QUICK, parts).weights) == {"transformer"}
    shared = snapshot("o/r", places, QUICK, parts)
    assert files_in(shared) == SHARED
    whole = snapshot("o/r", places, QUICK)
    assert set(files_in(whole)) == NEEDED
    assert weights_asked(storage, SHARED) == weights_asked(storage, PIPELINE) - 1  # OTHER: nothing came twice
    assert snapshot("o/r", places, QUICK, parts) == whole
    host.stop()
    assert snapshot("o/r", places, QUICK, parts) == whole


def test_what_is_on_the_disk_of_some_parts_serves_while_the_host_is_down(
    places: Settings, host: Host, storage: Host
) -> None:
    hugging_face(host, storage, "o/r", PIPELINE)
    parts = ("transformer", "scheduler")
    shared = snapshot("o/r", places, QUICK, parts)
    host.stop()
    assert snapshot("o/r", places, QUICK, parts) == shared
    with pytest.raises(ValueError, match=r"does not answer|broke off"):
        snapshot("o/r", places, QUICK)


def test_a_config_that_is_no_json_is_named(environment: Settings, tmp_path: Path) -> None:
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text("<html>")
    with pytest.raises(ValueError, match=r"vae/config\.json is no JSON"):
        outline(str(tmp_path), environment)


@pytest.mark.parametrize(
    ("name", "variable", "config"),
    [("dev", "FLUX_DEV", "transformer/config.json"), ("safety_checker", "SAFETY_CHECKER", "config.json")],
)
def test_a_folder_without_a_model_is_refused_by_its_variable(
    environment: Settings, tmp_path: Path, name: str, variable: str, config: str
) -> None:
    settings = replace(environment, models=replace(MINIATURE, **{name: str(tmp_path)}))
    with pytest.raises(ValueError, match=config) as refused:
        fetch(settings, QUICK)
    shown = f"'…/{tmp_path.name}'"
    assert str(refused.value) == f"{variable} is {shown}, which has no {config}; it must be a model."


USED = """
from settings import Settings
from weights import fetch, outlines

settings = Settings.from_environment(cuda=False)
try:
    print(sorted(outlines(settings, ["dev"])["dev"].weights.items()), fetch(settings).dev)
except ValueError as error:
    print(error)
"""


def test_what_the_librarys_own_command_has_fetched_is_used_without_a_request(
    places: Settings, host: Host, storage: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hugging_face(host, storage, "o/r", {path: PIPELINE[path] for path in NEEDED} | {"README.md": b"hello"})
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_ENDPOINT", host.address)
    monkeypatch.setenv("HF_HUB_DISABLE_UPDATE_CHECK", "1")  # of the command itself, on the internet
    command = [Path(sys.prefix) / "bin" / "hf", "download", "o/r"]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    asked, sent = len(host.seen), len(storage.seen)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
    folder = snapshot("o/r", places, QUICK)
    assert set(files_in(folder)) > NEEDED
    assert outline("o/r", places, QUICK).weights["text_encoder"] == len(OTHER)
    assert {request.path for request in host.seen[asked:]} == {"/api/models/o/r/revision/main"}
    asked = len(host.seen)

    def offline(model: str) -> str:
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "FLUX_DEV": model}
        ran = finished([sys.executable, "-c", USED], env=environment)
        assert (ran.returncode, ran.stderr) == (0, "")
        return ran.stdout

    weights = [("text_encoder", len(OTHER)), ("transformer", len(LARGE) + len(LORA))]
    assert offline("o/r") == f"{weights} {folder}\n"
    assert offline("o/other").startswith(
        "huggingface.co/o/other is not in Hugging Face's cache, or not all of it, and HF_HUB_OFFLINE"
    )
    assert (len(host.seen), len(storage.seen)) == (asked, sent)


def test_a_model_in_the_cache_of_an_earlier_version_is_named(
    places: Settings, host: Host, storage: Host, capfd: pytest.CaptureFixture[str]
) -> None:
    hugging_face(host, storage, "o/r", {"config.json": b"{}", "model.safetensors": LORA})
    (places.cache_dir / "models" / "o--r").mkdir(parents=True)
    snapshot("o/r", places, QUICK)
    printed = capfd.readouterr().out
    assert printed.startswith("WEIGHTS_CACHE/models/o--r is not used any more and may be deleted: ")
    assert str(places.cache_dir) not in printed
    assert (places.cache_dir / "models" / "o--r").is_dir()


def drop_link(folder: Path) -> None:
    (folder / "text_encoder" / "model.safetensors").resolve().unlink()


def drop_shard(folder: Path) -> None:
    (folder / "transformer" / "diffusion_pytorch_model-00001-of-00002.safetensors").unlink()


def drop_weights(folder: Path) -> None:
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()


def drop_part(folder: Path) -> None:
    (folder / "tokenizer_2" / "spiece.model").unlink()
    (folder / "tokenizer_2").rmdir()


@pytest.mark.parametrize("drop", [drop_link, drop_shard, drop_weights, drop_part])
def test_what_an_older_library_has_fetched_in_part_is_completed_and_never_taken_for_the_whole(
    places: Settings,
    host: Host,
    storage: Host,
    hub_cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    drop: Callable[[Path], None],
) -> None:
    parts = {"tokenizer_2": ["transformers", "T5Tokenizer"], "image_encoder": [None, None]}
    vae = {"vae/config.json": b"{}", "vae/diffusion_pytorch_model.safetensors": OTHER}
    files = {path: PIPELINE[path] for path in NEEDED} | {"model_index.json": json.dumps(parts).encode()} | vae
    hugging_face(host, storage, "o/r", files)
    pinned = f"o/r@{'c' * 40}"
    folder = snapshot("o/r", places, QUICK)
    shutil.rmtree(hub_cache / "models--o--r" / "trees")  # which older versions do not write
    with monkeypatch.context() as offline:
        offline.setattr(constants, "HF_HUB_OFFLINE", True)
        assert snapshot("o/r", places, QUICK) == snapshot(pinned, places, QUICK) == folder
        drop(folder)
        for model in ("o/r", pinned):
            assert on_disk(model, places) is None
            with pytest.raises(ValueError, match="or not all of it, and HF_HUB_OFFLINE forbids fetching it"):
                snapshot(model, places, QUICK)
    assert snapshot(pinned, places, QUICK) == folder
    assert files_in(folder) == files
