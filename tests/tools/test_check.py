"""script/check: all rows are right, and each thing that is really broken makes its own rows wrong and no other."""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from diffusers.pipelines.stable_diffusion.safety_checker import cosine_distance
from safetensors.torch import load_file, save_file
from torch import Tensor

import flux as drawing
import images
import safety
from engine.placement import Place, Placement, Precisions
from flux import Flux
from request import LoraFile
from service.measure import PeakMemory
from settings import ROOT, Models, Settings
from tests.support.models import write_models
from tests.support.processes import finished
from tools.check import Comparison, Reference, Row, draw_references, main, make_lora, requests

CPU = torch.device("cpu")
DRAWN_BY_DEV = {"dev", "image", "mask", "LoRA", "LoRA in fp8"}
LOOKED_AT = {"safety checker", "safety classifier", "a harmless picture"}

TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"
# Random models hardly leave the noise; with this they draw something, and a fault shows as it does in a trained one.
LOUDER = 20

Edit = Callable[[dict[str, Tensor]], object]


@dataclass(frozen=True)
class Known:
    """Pictures of plain diffusers and PEFT, drawn once for all tests."""

    models: Models
    lora: LoraFile
    references: Mapping[str, Reference]

    def rows(self, flux: Flux, models: Models | None = None) -> list[Row]:
        return Comparison(flux, models or self.models, self.references, self.lora, PeakMemory(CPU)).rows()

    def load(self, **changes: str) -> Flux:
        return Flux.load(Settings(models=replace(self.models, **changes)), CPU)


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Known:
    folder = tmp_path_factory.mktemp("check")
    models = write_models(folder, vae_factor=32)  # few tokens
    for model in (models.dev, models.schnell):
        edit(Path(model, TRANSFORMER), lambda tensors: tensors["proj_out.weight"].mul_(LOUDER))
    lora = make_lora(folder / "made_up.safetensors", folder / "dev" / "transformer")
    return Known(models, lora, draw_references(models, CPU, requests(folder), lora))


def wrong(rows: list[Row]) -> set[str]:
    return {row.name for row in rows if row.right is False}


def edit(file: Path, change: Edit) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(tensors)
    save_file(tensors, file)


def copied(folder: str, to: Path, file: str, change: Edit) -> str:
    """A model's folder with the tensors of one file edited."""
    shutil.copytree(folder, to)
    edit(to / file, change)
    return str(to)


def test_without_a_fault_every_row_is_right(known: Known) -> None:
    rows = known.rows(known.load())
    assert [row.name for row in rows if row.right is not True] == []
    assert {row.name for row in rows} > DRAWN_BY_DEV | LOOKED_AT


def live_weight(flux: Flux, _: LoraFile) -> None:
    """Overwritten while it is recorded to hold dev's: the next request leaves it."""
    flux._live["dev"].hold("dev", [])
    with torch.no_grad():
        flux._live["dev"].module.proj_out.weight.mul_(1.2)


def base(flux: Flux, _: LoraFile) -> None:
    flux._live["dev"]._bases["dev"]["proj_out.weight"].mul_(1.2)


def vae_encoder(flux: Flux, _: LoraFile) -> None:
    with torch.no_grad():
        flux.components["vae"].encoder.conv_out.weight.fill_(1)


def vae_decoder(flux: Flux, _: LoraFile) -> None:
    with torch.no_grad():
        flux.components["vae"].decoder.conv_in.weight.mul_(0.5)


def no_vae_decoder(flux: Flux, _: LoraFile) -> None:
    del flux.components["vae"].decoder


def lora_strength(factor: float) -> Callable[[Flux, LoraFile], None]:
    def change(flux: Flux, file: LoraFile) -> None:
        lora = flux.lora_cache.read(file)
        changed = {
            name: tuple(replace(delta, strength=delta.strength * factor) for delta in deltas)
            for name, deltas in lora.transformer.items()
        }
        flux.lora_cache._loras[file.sha256] = replace(lora, transformer=changed)

    return change


def weight_that_keeps_the_lora(flux: Flux, _: LoraFile) -> None:
    tensor = flux._live["dev"]._tensors["transformer_blocks.0.attn.to_q.weight"]
    hold = tensor.hold
    tensor.hold = lambda mix, *how: (tensor.held is not None and len(tensor.held) > len(mix)) or hold(mix, *how)


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (live_weight, {"dev", "without it again"}),
        (base, DRAWN_BY_DEV),
        (vae_encoder, {"image", "mask"}),
        (vae_decoder, {"dev, decoded"}),
        (no_vae_decoder, {"dev, decoded", "what a mask keeps"} | LOOKED_AT),
        (lora_strength(1.5), {"LoRA", "LoRA in fp8"}),
        (lora_strength(1 / 1.5), {"LoRA", "LoRA in fp8"}),
        (weight_that_keeps_the_lora, {"without it again"}),
    ],
)
def test_what_is_broken_after_loading_is_found(
    known: Known, spoil: Callable[[Flux, LoraFile], None], expected: set[str]
) -> None:
    flux = known.load()
    spoil(flux, known.lora)
    assert wrong(known.rows(flux)) == expected


@pytest.mark.parametrize(
    ("module", "name", "value", "expected"),
    [
        (drawing, "FP8_LORA_FACTOR", 1.0, {"LoRA in fp8"}),
        (images, "paste_back", lambda drawn, *_: drawn, {"what a mask keeps"}),
        (safety, "cosine_distance", lambda a, b: cosine_distance(a, b) + 0.05, {"safety checker"}),
        (PeakMemory, "bytes", lambda _: {"gpu": 10**15}, {"plan of the machine"}),
    ],
)
def test_what_the_product_does_otherwise_is_found(
    known: Known, monkeypatch: pytest.MonkeyPatch, module: object, name: str, value: object, expected: set[str]
) -> None:
    monkeypatch.setattr(module, name, value)
    assert wrong(known.rows(known.load())) == expected


def test_another_schedule_of_schnell_is_found(known: Known, tmp_path: Path) -> None:
    shutil.copytree(known.models.schnell, tmp_path / "schnell")
    config = tmp_path / "schnell" / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"shift": 3.0}))
    assert wrong(known.rows(known.load(schnell=str(tmp_path / "schnell")))) == {"schnell"}


def not_a_number(tensors: dict[str, Tensor]) -> None:
    for tensor in tensors.values():
        if tensor.is_floating_point():
            tensor.fill_(float("nan"))


def flag_all(tensors: dict[str, Tensor]) -> None:
    if "classifier.bias" in tensors:
        tensors["classifier.bias"].copy_(torch.tensor([-100.0, 100.0]))  # normal, nsfw
    else:
        tensors["concept_embeds_weights"].fill_(-2)  # thresholds, of cosines


@pytest.mark.parametrize(
    ("broken", "change", "expected"),
    [
        (["safety_checker"], not_a_number, {"safety checker"}),
        (["nsfw_classifier"], not_a_number, {"safety classifier"}),
        (["safety_checker", "nsfw_classifier"], flag_all, {"a harmless picture"}),
    ],
)
def test_a_broken_safety_model_is_found(
    known: Known, tmp_path: Path, broken: list[str], change: Edit, expected: set[str]
) -> None:
    folders = {
        name: copied(getattr(known.models, name), tmp_path / name, "model.safetensors", change) for name in broken
    }
    assert wrong(known.rows(known.load(), replace(known.models, **folders))) == expected


@pytest.mark.parametrize(("precisions", "skipped"), [(Precisions.FP8, "LoRA"), (Precisions.BF16, "LoRA in fp8")])
def test_a_precision_that_the_machine_lacks_is_skipped(known: Known, precisions: Precisions, skipped: str) -> None:
    places = dict.fromkeys(("dev", "schnell"), Place.GPU)
    placement = Placement(places, Place.GPU, precisions, gpu=0, host=0)
    rows = known.rows(Flux.load(Settings(models=known.models), CPU, placement))
    assert [row.name for row in rows if row.right is None] == [skipped]
    assert wrong(rows) == set()


def test_a_lora_that_peft_cannot_read_is_said_to_have_no_reference(known: Known, tmp_path: Path) -> None:
    save_file({"transformer.no_layer.lora_A.weight": torch.ones(1, 1)}, tmp_path / "odd.safetensors")
    odd = LoraFile(tmp_path / "odd.safetensors", "odd", "odd")
    asked = {"LoRA": known.references["LoRA"].request}
    broken = replace(known, lora=odd, references={**known.references, **draw_references(known.models, CPU, asked, odd)})
    rows = broken.rows(known.load())
    assert wrong(rows) == {"LoRA", "LoRA in fp8"}
    unknown = [str(row) for row in rows if row.right is False]
    assert all("unknown  There is no reference: diffusers failed with" in row for row in unknown)


def test_the_script_passes_with_the_miniature() -> None:
    done = finished([ROOT / "script" / "check"], timeout=240, cwd=None)
    assert done.returncode == 0, done.stdout + done.stderr
    *rows, last = done.stdout.rpartition("\n\n")[2].splitlines()
    assert last == f"0 of {len(rows)} rows are wrong or unknown."
    assert all(" right " in row for row in rows)
    assert str(ROOT) not in done.stdout + done.stderr


@pytest.fixture
def command(known: Known, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., object]:
    """Run script/check's own main with a variable of the environment; what it exits with."""

    def run(**environment: str) -> object:
        monkeypatch.chdir(tmp_path)  # put back in the end, since main goes to the project
        monkeypatch.setattr("sys.argv", ["check"])
        for name, value in {"FLUX_DEV": known.models.dev, "FLUX_SCHNELL": known.models.schnell, **environment}.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code

    return run


def test_a_wrong_row_is_counted_and_exits_with_1(
    known: Known, command: Callable[..., object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copied(known.models.safety_checker, tmp_path / "checker", "model.safetensors", not_a_number)
    assert command(SAFETY_CHECKER=folder) == 1
    printed = capsys.readouterr().out
    assert "\nsafety checker          WRONG    score nan; with thresholds moved by that" in printed
    assert printed.endswith("\n1 of 13 rows are wrong or unknown.\n")


def test_models_that_cannot_be_loaded_are_a_sentence(
    known: Known, command: Callable[..., object], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = copied(known.models.dev, tmp_path / "dev", TRANSFORMER, lambda tensors: tensors.pop("proj_out.weight"))
    sentence = "The transformer of dev does not fit its own config: 1 tensor(s) are missing or have another shape, "
    assert command(FLUX_DEV=folder) == f"{sentence}the first of them proj_out.weight."
    printed = "".join(capfd.readouterr())
    assert "Traceback" not in printed
    assert str(tmp_path) not in printed
