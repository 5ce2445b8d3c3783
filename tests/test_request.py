import dataclasses
from pathlib import Path

import pytest

from local_cog import schema
from request import LARGEST_SEED, LoraChoice, Request
from settings import ROOT


def test_numbers_get_their_types() -> None:
    # The values that Cog passes for 4.0, 3 and 7.0 in JSON.
    request = Request(prompt="a", num_inference_steps=4.0, guidance_scale=3, seed=7.0, loras=(LoraChoice("a/b", 1),))
    assert (request.num_inference_steps, request.seed) == (4, 7)
    assert isinstance(request.num_inference_steps, int)
    assert isinstance(request.guidance_scale, float)
    assert isinstance(request.loras[0].scale, float)


@pytest.mark.parametrize("seed", [0, 1, LARGEST_SEED])
def test_a_given_seed_is_kept(seed: int) -> None:
    assert Request(prompt="", seed=seed).seed == seed


@pytest.mark.parametrize("seed", [None, -1, -(2**63)])
def test_a_missing_or_negative_seed_is_drawn(seed: int | None) -> None:
    seeds = {Request(prompt="", seed=seed).seed for _ in range(8)}
    assert len(seeds) > 1
    assert all(0 <= seed < 2**32 for seed in seeds)


def test_each_picture_has_the_next_seed() -> None:
    assert list(Request(prompt="", seed=5, num_outputs=3).seeds) == [5, 6, 7]


@pytest.mark.parametrize(("seed", "outputs"), [(2**63, 1), (2.0**70, 1), (LARGEST_SEED, 2)])
def test_a_seed_beyond_63_bits_is_refused_with_the_bound(seed: float, outputs: int) -> None:
    with pytest.raises(ValueError, match=f"none may exceed {LARGEST_SEED}"):
        Request(prompt="", seed=seed, num_outputs=outputs)


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"mask": Path("m.png")}, "A mask was given without an image"),
        ({"aspect_ratio": "custom"}, "width None and height None"),
        ({"aspect_ratio": "custom", "width": 512}, "width 512 and height None"),
        ({"prompt": "a" * 50_001}, "The prompt has 50001 characters; it must have at most 50000"),
        ({"num_inference_steps": 4.5}, "num_inference_steps is 4.5; it must be a whole number"),
    ],
)
def test_what_contradicts_itself_is_refused(wrong: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Request(**{"prompt": "a", **wrong})


def test_custom_needs_no_size_with_an_image() -> None:
    assert Request(prompt="a", aspect_ratio="custom", image=Path("i.png")).width is None


@pytest.mark.parametrize(
    ("inputs", "fp8"),
    [
        ({}, False),
        ({"go_fast": True}, True),
        ({"go_fast": True, "aspect_ratio": "custom", "width": 256, "height": 256}, False),
        ({"go_fast": True, "aspect_ratio": "custom", "image": Path("i.png")}, True),
    ],
)
def test_custom_sizes_are_not_drawn_in_fp8(inputs: dict, fp8: bool) -> None:
    assert Request(prompt="a", **inputs).fp8 == fp8


IMAGE, CUSTOM = {"image": Path("i.png")}, {"aspect_ratio": "custom", "width": 512, "height": 512}
OF_THE_IMAGE = "has no effect: with an image, the size is the image's."


@pytest.mark.parametrize(
    ("inputs", "sentences"),
    [
        ({}, []),
        ({"prompt_strength": 0.8, "guidance_scale": 3, "megapixels": "1", "model": "schnell", "seed": 4.0}, []),
        ({"width": 800.0}, ["width 800 has no effect: it needs aspect_ratio custom."]),
        (CUSTOM, []),
        (
            {**CUSTOM, "megapixels": "0.25"},
            ["megapixels 0.25 has no effect: with aspect_ratio custom, width and height are the size."],
        ),
        ({"prompt_strength": 0.5}, ["prompt_strength 0.5 has no effect: it needs an image."]),
        ({**IMAGE, "prompt_strength": 0.5}, []),
        (
            {**IMAGE, "aspect_ratio": "16:9", "megapixels": "0.25", "width": 512},
            [f"aspect_ratio 16:9 {OF_THE_IMAGE}", f"megapixels 0.25 {OF_THE_IMAGE}", f"width 512 {OF_THE_IMAGE}"],
        ),
        ({**IMAGE, "aspect_ratio": "custom"}, [f"aspect_ratio custom {OF_THE_IMAGE}"]),
        (
            {**IMAGE, "prompt_strength": 0.0},
            [
                "prompt_strength is 0, so nothing is drawn: the image is given back, and beside it only "
                "num_outputs, the output's format and disable_safety_checker count."
            ],
        ),
        (
            {"model": "schnell", "guidance_scale": 5.0},
            ["guidance_scale 5 has no effect: schnell has no guidance."],
        ),
        (
            {"output_format": "png", "output_quality": 100},
            ["output_quality 100 has no effect: png loses nothing."],
        ),
    ],
)
def test_what_changes_nothing_is_said(inputs: dict, sentences: list[str]) -> None:
    assert Request(prompt="a", **inputs).without_effect == sentences


def test_the_defaults_are_the_documents() -> None:
    inputs = schema.derive((ROOT / "predict.py").read_text())["components"]["schemas"]["Input"]["properties"]
    fields = {field.name: field.default for field in dataclasses.fields(Request) if field.name in inputs}
    assert fields == {name: inputs[name].get("default", dataclasses.MISSING) for name in fields}
    assert len(fields) == len(inputs) - 4  # the LoRAs and their scales are one field


def test_a_request_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Request(prompt="a").seed = 1
