"""LoRAs of the operator's folder, by name: which file a name means, and that nothing outside of it can be named."""

import os
import unicodedata
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import weights
from settings import Settings
from sources.library import find, names
from tests.support.fetching import LORA, OTHER, PACKED, PEFT, QUICK, fetch, fetch_config, make_lora, refusal
from weights import WeightsCache


@pytest.fixture
def library(environment: Settings, tmp_path: Path) -> Settings:
    folder = tmp_path / "loras"
    (folder / "styles" / "in deep").mkdir(parents=True)
    for name in (
        "zorp.safetensors",
        "bold.safetensors",
        "styles/ink.safetensors",
        "styles/in deep/wet ink.safetensors",
    ):
        (folder / name).write_bytes(LORA)
    return replace(environment, loras_dir=folder)


@pytest.mark.parametrize(
    ("reference", "name"),
    [
        ("zorp", "zorp"),
        ("local:zorp", "zorp"),
        ("local:styles/ink", "local:styles/ink"),
        (" “local: styles/in deep/wet ink”", "local:styles/in deep/wet ink"),
    ],
)
def test_a_name_means_the_file_that_lies_there(library: Settings, reference: str, name: str) -> None:
    with WeightsCache(library, QUICK).open(reference) as weights:
        assert weights.name == name
        assert weights.path == library.loras_dir / f"{name.removeprefix('local:')}.safetensors"
    assert fetch(library, reference) == LORA


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz", ".tgz", ".zip", ".TAR.gz", ".SafeTensors"])
def test_archives_are_unpacked(library: Settings, suffix: str) -> None:
    packed = {".zip": "zip", ".tar": "tar", ".SafeTensors": "raw"}.get(suffix, "tar.gz")
    file = library.loras_dir / f"packed{suffix}"
    file.write_bytes(PACKED[packed])
    for _ in range(2):
        assert fetch(library, "packed") == LORA
    assert "packed" in names(library.loras_dir)


def test_a_file_that_has_changed_is_another_one_and_its_config_and_words_come_along(library: Settings) -> None:
    folder = library.loras_dir
    assert fetch(library, "zorp") == LORA
    (folder / "zorp.safetensors").write_bytes(other := make_lora(seed=9, **{"modelspec.trigger_phrase": "a zorp"}))
    assert fetch(library, "zorp") == other
    with WeightsCache(library, QUICK).open("zorp") as weights:
        assert weights.trigger_words == ("a zorp",)
    (folder / "styles" / "adapter_config.json").write_bytes(PEFT)
    assert fetch_config(library, "local:styles/ink") == PEFT


def test_a_file_of_the_same_size_and_date_may_be_another_one(library: Settings) -> None:
    file = library.loras_dir / "zorp.safetensors"
    os.utime(file, ns=(0, 0))
    before = file.stat()
    assert fetch(library, "zorp") == LORA
    file.write_bytes(OTHER)
    while file.stat().st_ctime_ns == before.st_ctime_ns:  # some clocks are coarse
        os.utime(file, ns=(0, 0))
    os.utime(file, ns=(0, 0))
    now = file.stat()
    assert (now.st_ino, now.st_size, now.st_mtime_ns) == (before.st_ino, before.st_size, before.st_mtime_ns)
    assert fetch(library, "zorp") == OTHER


def test_a_name_is_the_same_however_its_accents_are_written(library: Settings) -> None:
    composed, decomposed = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    (library.loras_dir / decomposed).mkdir()
    (library.loras_dir / decomposed / f"{composed}.safetensors").write_bytes(LORA)
    (library.loras_dir / f"{decomposed}.safetensors").write_bytes(OTHER)
    for name in (composed, decomposed):
        assert fetch(library, name) == OTHER
        assert fetch(library, f"local:{composed}/{name}") == fetch(library, f"local:{decomposed}/{name}") == LORA


def test_the_names_of_a_folder_name_its_files(library: Settings) -> None:
    folder = library.loras_dir
    for name in ("notes.txt", ".hidden.safetensors", "a#b.safetensors", "a.safetensors.safetensors", ".tar"):
        (folder / name).write_bytes(LORA)
    (folder / "-dash.zip").write_bytes(PACKED["zip"])
    found = ["-dash", "bold", "styles/in deep/wet ink", "styles/ink", "zorp"]
    assert names(folder) == ["local:-dash", "bold", "local:styles/in deep/wet ink", "local:styles/ink", "zorp"]
    assert [find(name, folder).is_relative_to(folder) for name in found] == [True] * 5
    assert names(folder / "missing") == []


def test_a_name_that_is_missing_gets_the_nearest_ones(library: Settings) -> None:
    folder = library.loras_dir
    expected = {
        "zrop": "the nearest there: zorp.",
        "ZORP": "the nearest there: zorp.",
        "ink": "the nearest there: local:styles/ink.",
        "inc": "the nearest there: local:styles/ink.",
        "local:style/inks": "the nearest there: local:styles/ink.",
        "x": "it has bold, local:styles/in deep/wet ink, local:styles/ink, zorp.",
    }
    for reference, end in expected.items():
        assert refusal(library, reference) == f"There is no LoRA {reference!r} in LORAS_DIR; {end}"
    for number in range(3):
        (folder / f"a{number}.tar").write_bytes(PACKED["tar"])
    assert refusal(library, "x").endswith("; it has a0, a1, a2, bold, local:styles/in deep/wet ink and 2 more.")


def test_no_folder_outside_is_listed(library: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, listed, own = library.loras_dir, [], Path.iterdir
    (tmp_path / "outside").mkdir()
    (folder / "away").symlink_to(tmp_path / "outside")
    monkeypatch.setattr(Path, "iterdir", lambda place: listed.append(place) or own(place))
    with pytest.raises(ValueError, match="There is no LoRA 'local:away/x'"):
        find("away/x", folder)
    assert listed == [folder]


def test_a_file_that_goes_between_look_up_and_reading_is_named(
    library: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def find_and_lose(name: str, folder: Path) -> Path:
        (file := find(name, folder)).unlink()
        return file

    monkeypatch.setattr(weights, "find", find_and_lose)
    assert refusal(library, "zorp") == "zorp cannot be read: No such file or directory."


def test_a_sentence_has_the_beginning_of_a_long_name(library: Settings) -> None:
    assert len(refusal(library, "x" * 8000)) < 300


def test_two_files_of_one_name_are_told_apart_by_nobody(library: Settings) -> None:
    (library.loras_dir / "zorp.tar").write_bytes(PACKED["tar"])
    said = refusal(library, "zorp")
    assert said == "'zorp' names 2 files of LORAS_DIR, zorp.safetensors and zorp.tar; it must be the name of one."


def test_without_a_folder_the_other_forms_are_listed(environment: Settings, tmp_path: Path) -> None:
    said = refusal(environment, "zorp")
    assert said.startswith(
        "'zorp' would be a LoRA of LORAS_DIR, which this server does not have; it must be owner/name"
    )
    said = refusal(replace(environment, loras_dir=tmp_path / "missing"), "zorp")
    assert said == "LORAS_DIR, where 'zorp' would be, cannot be read: No such file or directory."
    (tmp_path / "empty").mkdir()
    said = refusal(replace(environment, loras_dir=tmp_path / "empty"), "zorp")
    assert said == "There is no LoRA 'zorp' in LORAS_DIR; it has none."


OUTSIDE: dict[str, Callable[[Path, Path], object]] = {
    "a link to a file": lambda place, outside: (place / "x.safetensors").symlink_to(outside / "x.safetensors"),
    "a link to nothing": lambda place, _: (place / "x.safetensors").symlink_to("nothing"),
    "a link to itself": lambda place, _: (place / "x.safetensors").symlink_to("x.safetensors"),
    "a pipe": lambda place, _: os.mkfifo(place / "x.safetensors"),
    "a device": lambda place, _: (place / "x.safetensors").symlink_to("/dev/zero"),
    "a folder": lambda place, _: (place / "x.safetensors").mkdir(),
}


@pytest.mark.parametrize("what", OUTSIDE)
def test_what_is_no_file_of_the_folder_cannot_be_named(library: Settings, tmp_path: Path, what: str) -> None:
    (tmp_path / "x.safetensors").write_bytes(LORA)
    OUTSIDE[what](library.loras_dir, tmp_path)
    assert refusal(library, "x").startswith("There is no LoRA 'x' in LORAS_DIR; ")
    assert "x" not in names(library.loras_dir)


def test_a_link_counts_where_it_leads(library: Settings, tmp_path: Path) -> None:
    folder = library.loras_dir
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "x.safetensors").write_bytes(LORA)
    (folder / "away").symlink_to(tmp_path / "outside")
    (folder / "here").symlink_to("styles")
    (folder / "alias.safetensors").symlink_to("styles/ink.safetensors")
    assert refusal(library, "local:away/x").startswith("There is no LoRA 'local:away/x' in LORAS_DIR; ")
    assert fetch(library, "local:here/ink") == fetch(library, "alias") == LORA
    linked = tmp_path / "linked"
    linked.symlink_to(folder)
    assert fetch(replace(library, loras_dir=linked), "alias") == LORA


def test_the_miniature_s_own_loras_say_their_words(environment: Settings) -> None:
    mini = Settings.from_environment(cuda=False, environ={}).loras_dir
    assert names(mini) == ["bold", "dusk", "zorp"]
    told = {}
    for name in names(mini):
        with WeightsCache(replace(environment, loras_dir=mini)).open(name) as weights:
            told[name] = weights.trigger_words
    assert told == {"bold": (), "dusk": (), "zorp": ("zorp",)}
