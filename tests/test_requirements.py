"""What requirements.txt names is enough to draw, and with requirements-dev.txt to run the tests: nothing is there only
because a development package, or one of the cluster's, brought it."""

import os
import sys
import venv
from collections.abc import Iterator
from importlib.metadata import Distribution, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from PIL import Image

from settings import ROOT
from tests.support.processes import finished

# A T5 that stays where it computes, and the same one moved for each use.
T5 = """
import torch
from transformers import T5EncoderModel
from engine.loading import move_when_used

t5 = T5EncoderModel.from_pretrained("mini/dev/text_encoder_2").eval()
ids = torch.arange(24)[None]
with torch.no_grad():
    stays = t5(ids).last_hidden_state
    move_when_used(t5, torch.device("cpu"))
    for _ in range(2):
        assert torch.equal(t5(ids).last_hidden_state, stays)
print("equal over", *stays.shape)
"""


def required(wanted: Iterator[Requirement]) -> dict[str, Distribution]:
    """The installed distributions that pip would install for these requirements, by name."""
    found: dict[str, Distribution] = {}
    seen: set[tuple[str, str]] = set()
    waiting = [(requirement.name, extra) for requirement in wanted for extra in ("", *requirement.extras)]
    while waiting:
        name, extra = waiting.pop()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        installed = distribution(name)
        found[installed.metadata["Name"]] = installed
        for needed in map(Requirement, installed.requires or ()):
            if needed.marker is None or needed.marker.evaluate({"extra": extra}):
                waiting += [(needed.name, its_extra) for its_extra in ("", *needed.extras)]
    return found


def linked(folder: Path, *files: str) -> Path:
    """The interpreter of a virtual environment with what these files name and that needs, linked file by file."""
    venv.create(folder, symlinks=True)
    packages = folder / Path(distribution("torch").locate_file("")).relative_to(sys.prefix)
    lines = [line for file in files for line in (ROOT / file).read_text().splitlines()]
    for installed in required(Requirement(line) for line in lines if line and line[0] not in "#-").values():
        for file in installed.files:
            if ".." not in file.parts:  # a script in bin/
                link = packages / file
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(installed.locate_file(file))
    return folder / "bin" / "python"


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return linked(tmp_path_factory.mktemp("environment"), "requirements.txt")


def run(python: Path, *words: str) -> str:
    """The output of a command of this project in that environment."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = finished([python, *words], env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_predictor_draws(python: Path, tmp_path: Path) -> None:
    inputs = ("prompt=a red fox", "aspect_ratio=custom", "width=256", "height=272", "num_inference_steps=1")
    run(python, "-m", "local_cog.command", *(word for pair in inputs for word in ("-i", pair)), "-o", str(tmp_path))
    with Image.open(tmp_path / "output.0.webp") as picture:
        assert picture.size == (256, 272)


def test_a_t5_that_is_moved_when_used_gives_the_embeddings_of_one_that_stays(python: Path) -> None:
    assert run(python, "-c", T5).startswith("equal over 1 24 ")


def test_development_packages_are_not_there(python: Path) -> None:
    """Else the other tests here would prove nothing."""
    code = "import importlib.util as it; print([name for name in ('peft', 'pytest') if it.find_spec(name)])"
    assert run(python, "-c", code) == "[]\n"


def test_without_the_cluster_s_packages_its_tests_are_skipped(tmp_path: Path) -> None:
    python = linked(tmp_path, "requirements.txt", "requirements-dev.txt")
    said = run(python, "-m", "pytest", "--collect-only", "-q", "-rs", "-p", "no:cacheprovider", "tests/cluster")
    assert "the cluster needs cluster/requirements.txt" in said
    assert "tests/cluster/test_privacy.py" in said
