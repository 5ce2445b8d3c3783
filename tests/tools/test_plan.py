"""script/plan: what it prints is the plan, and no weights are asked for."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.architecture import OFFICIAL, official, sizes
from engine.placement import Place, Precisions, Sizes, plan
from harness.hosts import Host, hugging_face
from settings import MINIATURE, ROOT, Models, Settings
from tests.support.fetching import QUICK
from tests.support.processes import finished
from tools.plan import main, sold_as, table
from weights import outlines

GIB = 2**30
# Files as the official repos list them.
WEIGHTS = {
    "flux1-dev.safetensors": 23_802_932_552,
    "transformer/diffusion_pytorch_model-00001-of-00003.safetensors": 9_983_040_304,
    "transformer/diffusion_pytorch_model-00002-of-00003.safetensors": 9_949_328_904,
    "transformer/diffusion_pytorch_model-00003-of-00003.safetensors": 3_870_584_832,
    "text_encoder/model.safetensors": 246_144_352,
    "text_encoder_2/model-00001-of-00002.safetensors": 4_994_582_224,
    "text_encoder_2/model-00002-of-00002.safetensors": 4_530_066_360,
    "vae/diffusion_pytorch_model.safetensors": 167_666_902,
}


@pytest.fixture(scope="module")
def flux() -> Sizes:
    return sizes(official())


@pytest.fixture
def hub(host: Host, storage: Host) -> Host:
    """A hub that lists models of the official sizes, and has none of their weights."""
    configs = {f"{part}/config.json": json.dumps(config).encode() for part, config in OFFICIAL.items()}
    files = {"model_index.json": b"{}", "scheduler/scheduler_config.json": b"{}", "tokenizer/merges.txt": b"a b"}
    for repo, guided in (("o/dev", True), ("o/schnell", False)):
        transformer = json.dumps(OFFICIAL["transformer"] | {"guidance_embeds": guided}).encode()
        own = files | configs | {"transformer/config.json": transformer}
        hugging_face(host, storage, repo, own, stated=WEIGHTS)
    return host


def weights_asked(hub: Host) -> list[str]:
    return [request.path for request in hub.seen if request.path.endswith(".safetensors")]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run script/plan's own main with variables of the environment; what it prints or, as an error, says."""

    def run(*arguments: str, **environment: str) -> str:
        monkeypatch.chdir(tmp_path)  # put back in the end, since main goes to the project
        monkeypatch.setattr("sys.argv", ["plan", *arguments])
        for name, value in {"WEIGHTS_CACHE": str(tmp_path / "cache"), **environment}.items():
            monkeypatch.setenv(name, value)
        main()
        return capsys.readouterr().out

    return run


def test_models_are_planned_from_their_repos_without_their_weights(flux: Sizes, hub: Host, places: Settings) -> None:
    settings = Settings(
        Models("o/dev", "o/schnell", MINIATURE.safety_checker, MINIATURE.nsfw_classifier),
        cache_dir=places.cache_dir,
        allow_private_hosts=True,
        hf_endpoint=places.hf_endpoint,
    )
    listed = sizes(outlines(settings, patience=QUICK))
    assert listed == flux
    placement = plan(listed, gpu=24 * GIB, host=64 * GIB, fp8=True)
    assert (placement.precisions, placement.bases["schnell"]) == (Precisions.FP8, Place.MAPPED)
    with pytest.raises(ValueError, match="The machine is too small"):
        plan(listed, gpu=16 * GIB, host=64 * GIB, fp8=True)
    assert weights_asked(hub) == []
    own = f"/o/schnell/resolve/{'c' * 40}/"
    asked = {request.path.removeprefix(own) for request in hub.seen if request.path.startswith(own)}
    assert asked == {"transformer/config.json", "scheduler/scheduler_config.json"}


def test_the_models_of_the_environment_are_planned_for(hub: Host, command: Callable[..., str]) -> None:
    environment = {"HF_ENDPOINT": hub.address, "WEIGHTS_ALLOW_PRIVATE_HOSTS": "1", "FLUX_DEV": "o/dev"}
    described = "--gpu", "80", "--host", "128"
    from_repo = command(*described, **environment)  # schnell is the official one
    assert "on the GPU: the base of dev, T5\n" in from_repo
    with pytest.raises(SystemExit, match=r"The machine is too small: it has 15\.6 GB of free GPU memory"):
        command("--gpu", "16", "--host", "128", **environment)
    assert weights_asked(hub) == []
    small = command(*described, FLUX_DEV=MINIATURE.dev, FLUX_SCHNELL=MINIATURE.schnell)
    assert "on the GPU: the base of dev, the base of schnell, T5\n" in small
    assert small.endswith("\n7.0 GB of the GPU, 0.0 GB of pinned host memory\n")


def test_the_official_models_are_planned_without_a_network(flux: Sizes, tmp_path: Path) -> None:
    done = finished(
        [ROOT / "script" / "plan", "--gpu", "24", "--host", "64"],
        env={"PATH": "/usr/bin:/bin", "HF_ENDPOINT": "http://127.0.0.1:9", "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
    )
    assert (done.returncode, done.stderr) == (0, "")
    memory, *placement = done.stdout.splitlines()
    assert memory == "23.7 GB of GPU memory are free; the host has 64.4 GB"
    assert placement == sold_as(24, 64).plan(flux).lines()


def test_an_older_gpu_is_planned_without_fp8(command: Callable[..., str]) -> None:
    assert "\n" + Precisions.BF16 + "\n" in command("--gpu", "80", "--host", "128", "--no-fp8")
    with pytest.raises(SystemExit, match="too small"):
        command("--gpu", "24", "--host", "64", "--no-fp8")


@pytest.mark.parametrize("value", ["0", "-24", "nan", "inf", "many"])
def test_a_number_that_is_none_is_refused(
    command: Callable[..., str], capsys: pytest.CaptureFixture[str], value: str
) -> None:
    with pytest.raises(SystemExit):
        command("--gpu", value)
    assert f"{value!r} must be a number of gigabytes above 0, such as 24" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("sold", "mib"),
    [(24, 23_034), (24, 24_564), (48, 46_068), (48, 49_140), (80, 81_559), (80, 81_920), (141, 143_771)],
)
def test_a_plan_for_a_card_as_it_is_sold_holds_for_the_card(flux: Sizes, sold: int, mib: int) -> None:
    placement = sold_as(sold, 128).plan(flux)
    assert placement.gpu <= mib * 2**20 - 0.5e9


def test_the_readmes_table_is_what_the_code_prints(flux: Sizes) -> None:
    assert table(flux) in (ROOT / "README.md").read_text()
