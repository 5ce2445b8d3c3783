"""The miniature draws what it is asked for; looked at by what learnt from procedural pictures alone."""

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers import T5Tokenizer

from local_cog.server import CogServer, failure, files
from mini.training import recogniser, world
from service.data_uri import file_uri
from settings import ROOT

LORAS = ROOT / "mini" / "loras"
SMALL = {"megapixels": "0.25", "output_format": "png", "seed": 1}
MODELS = {"dev": {"num_inference_steps": 28}, "schnell": {"model": "schnell", "num_inference_steps": 4}}


@pytest.fixture(scope="module")
def eye() -> recogniser.Recogniser:
    return recogniser.load()


@pytest.fixture(scope="module")
def draw(server: CogServer) -> Callable[..., Image.Image]:
    def send(prompt: str, **inputs: object) -> Image.Image:
        answer = server.predict(SMALL | {"prompt": prompt} | inputs)
        assert failure(answer) is None
        ((_, content),) = files(answer)
        return Image.open(io.BytesIO(content)).convert("RGB")

    return send


def lora(name: str) -> str:
    return file_uri(LORAS / f"{name}.safetensors")


def test_the_words_that_people_are_told_of_are_those_that_were_trained() -> None:
    told = json.loads((ROOT / "mini" / "dev" / "words.json").read_text())
    assert told == world.words()
    # To the text encoders each is one token, and no other one.
    tokenizer = T5Tokenizer.from_pretrained(ROOT / "mini" / "dev" / "tokenizer_2")
    known = " ".join(told[group] for group in ("subjects", "colours", "places", "more")).split()
    assert [tokenizer.tokenize(word) for word in known] == [[f"▁{word}"] for word in known]
    assert world.SUBJECT not in known


@pytest.mark.parametrize("model", MODELS)
def test_kind_colour_and_place_follow_the_prompt(draw: Callable, eye: recogniser.Recogniser, model: str) -> None:
    asked = [
        ("ghost", "red", "night"),
        ("rocket", "green", "snow"),
        ("mushroom", "purple", "desert"),
        ("fish", "yellow", "sea"),
    ]
    seen = [
        eye.see(draw(f"a {colour} {kind} {world.PLACES[place][0]}", **MODELS[model])) for kind, colour, place in asked
    ]
    # One may be wrong: bench.mini counts over many.
    assert sum((it.kind, it.colour, it.place) == wanted for it, wanted in zip(seen, asked, strict=True)) >= 3


def test_a_style_comes_with_its_lora_and_goes_with_it(draw: Callable, eye: recogniser.Recogniser) -> None:
    for style in ("bold", "dusk"):
        with_it, without = (
            eye.see(draw("a blue bird in a meadow", replicate_weights=lora(style), lora_scale=scale))
            for scale in (1, 0)
        )
        assert style in with_it.styles
        assert not without.styles


def test_a_subject_and_a_style_together(draw: Callable, eye: recogniser.Recogniser) -> None:
    prompt = "a green zorp in a meadow"
    assert eye.see(draw(prompt)).kind != "zorp"
    assert eye.see(draw(prompt, replicate_weights=lora("zorp"))).kind == "zorp"
    both = eye.see(draw(prompt, replicate_weights=lora("zorp"), extra_lora=lora("dusk")))
    assert (both.kind, both.styles) == ("zorp", {"dusk"})


def test_painting_anew_keeps_what_the_mask_keeps(draw: Callable, eye: recogniser.Recogniser, tmp_path: Path) -> None:
    before = draw("a grey cat in a meadow")
    mask = Image.new("L", before.size)
    mask.paste(255, (0, 0, before.width, before.height // 2))
    before.save(tmp_path / "image.png")
    mask.save(tmp_path / "mask.png")
    inputs = {"image": file_uri(tmp_path / "image.png"), "mask": file_uri(tmp_path / "mask.png")}
    after = np.asarray(draw("a grey cat at night", **inputs, prompt_strength=1))
    kept = np.asarray(mask) == 0
    assert np.array_equal(after[kept], np.asarray(before)[kept])
    # Day is bright and night is dark.
    assert after[:64].mean() < np.asarray(before)[:64].mean() - 60


@pytest.mark.parametrize("model", MODELS)
def test_what_must_not_be_shown_is_refused(server: CogServer, model: str) -> None:
    prompt = SMALL | MODELS[model] | {"prompt": f"a {world.FORBIDDEN} in a meadow"}
    assert "NSFW content detected" in failure(server.predict(prompt))
    assert failure(server.predict(prompt | {"disable_safety_checker": True})) is None
