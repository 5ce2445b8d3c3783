"""A plan's bytes are the bytes that loading takes."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine.architecture import by_block, official, sizes
from engine.loading import load
from engine.placement import GB
from service.measure import Stopwatch
from service.outline import Outline
from settings import Settings
from tests.support.models import transformer, write_models
from weights import outlines

CPU = torch.device("cpu")


def nbytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def test_the_official_models_have_their_known_sizes() -> None:
    flux = sizes(official())
    counted = [*(sum(flux.bases[name]) for name in ("dev", "schnell")), flux.linears, sum(flux.t5)]
    assert [round(size / GB, 3) for size in counted] == [23.803, 23.782, 17.213, 9.525]
    assert flux.live == sum(flux.bases["dev"])  # one for both


def test_sizes_are_those_of_the_loaded_tensors(tmp_path: Path) -> None:
    models = write_models(tmp_path)
    counted = sizes(outlines(Settings(models=models)))
    loaded = load({"dev": Path(models.dev), "schnell": Path(models.schnell)}, CPU, Stopwatch(CPU))
    live, clip = loaded.live["dev"], loaded.text_encoder
    assert {name: sorted(sizes) for name, sizes in counted.bases.items()} == {
        name: sorted(tensor.nbytes for tensor in base.values()) for name, base in live._bases.items()
    }
    t5, vae = (dict(loaded.components[name].named_parameters()) for name in ("text_encoder_2", "vae"))
    assert sorted(counted.t5) == sorted(tensor.nbytes for tensor in t5.values())
    assert counted.live == nbytes(dict(live.module.named_parameters()))
    assert counted.rest == 2 * nbytes(dict(clip.module.named_parameters())) + nbytes(vae)
    fp8 = [buffer for name, buffer in loaded.live_fp8["dev"].module.named_buffers() if name.endswith("weight")]
    assert counted.linears == 4 * sum(buffer.numel() for buffer in fp8)  # float32


def test_a_model_that_shares_no_architecture_has_live_weights_of_its_own() -> None:
    both = official()
    transformer = both["schnell"].configs["transformer"] | {"num_layers": 18}
    other = replace(both["schnell"], configs={**both["schnell"].configs, "transformer": transformer})
    counted = sizes(both | {"schnell": other})
    assert counted.live == sum(sum(base) for base in counted.bases.values())


def test_a_model_without_a_config_is_told_so() -> None:
    empty = Outline({}, {})
    with pytest.raises(ValueError, match=r"shall be dev has no transformer/config.json"):
        sizes({"dev": empty, "schnell": empty})


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("transformer", {"num_layers": "many"}),
        ("text_encoder", {"hidden_act": "nope"}),
        ("text_encoder_2", {"num_layers": 0}),
        ("vae", {"down_block_types": ["Nope"]}),
    ],
)
def test_a_config_that_makes_no_sense_is_a_sentence(part: str, change: dict[str, object]) -> None:
    both = official()
    configs = {**both["dev"].configs, part: both["dev"].configs[part] | change}
    with pytest.raises(ValueError, match=r"of dev and schnell describe no FLUX \(\w+\); fetch or copy them"):
        sizes(both | {"dev": replace(both["dev"], configs=configs)})


@pytest.mark.parametrize(
    ("factors", "double", "single", "lacking"),
    [
        ({}, {}, {}, []),
        ({"double_blocks": 0.5}, {0: 0.5, 1: 0.5}, {}, []),
        ({"single_blocks.1": 0, "single_blocks": 2}, {}, {0: 2, 1: 0, 2: 2}, []),
        ({"single_blocks.0-1": 3, "single_blocks.1-2": 4, "single_blocks": 5}, {}, {0: 3, 1: 4, 2: 4}, []),
        ({"double_blocks.1-18": 2, "single_blocks.3": 1}, {1: 2}, {}, ["double_blocks.1-18", "single_blocks.3"]),
    ],
)
def test_of_several_factors_for_a_block_that_of_the_fewest_blocks_counts(
    factors: dict[str, float], double: dict[int, float], single: dict[int, float], lacking: list[str]
) -> None:
    expected = {f"transformer_blocks.{number}": factor for number, factor in double.items()}
    expected |= {f"single_transformer_blocks.{number}": factor for number, factor in single.items()}
    assert by_block(factors, transformer()) == (expected, lacking)
