"""The whole predictor behind the real Cog server: real requests in, pictures and sentences out."""

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import images
from harness import soak
from harness.hosts import File, Host
from harness.waiting import wait_until
from local_cog.server import CogServer, failure, files
from service.data_uri import uri
from settings import GIB
from tests.support.lora_files import lora_of_the_miniature
from tests.support.pictures import encoded, photo

SMALL = {"prompt": "a red fox", "megapixels": "0.25", "num_inference_steps": 2, "seed": 3, "output_format": "png"}
UNSAFE = {"disable_safety_checker": True}


@pytest.fixture(scope="session")
def draw(server: CogServer) -> Callable[..., list[Image.Image]]:
    """Send a request, insist on pictures."""

    def send(**inputs: object) -> list[Image.Image]:
        answer = server.predict(SMALL | UNSAFE | inputs)
        assert failure(answer) is None
        return [Image.open(io.BytesIO(content)) for _, content in files(answer)]

    return send


def same(a: Image.Image, b: Image.Image) -> bool:
    return a.size == b.size and np.array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize(("form", "pillow"), [("webp", "WEBP"), ("jpg", "JPEG"), ("png", "PNG")])
def test_three_formats(draw: Callable, form: str, pillow: str) -> None:
    small, large = (draw(output_format=form, output_quality=quality)[0] for quality in (10, 100))
    assert (small.format, small.size) == (pillow, (512, 512))
    assert same(small, large) == (form == "png")


def test_defaults_give_one_megapixel_of_webp(server: CogServer) -> None:
    answer = server.predict({"prompt": "a red fox", "num_inference_steps": 1} | UNSAFE)
    ((suffix, content),) = files(answer)
    assert suffix == ".webp"
    assert Image.open(io.BytesIO(content)).size == (1024, 1024)
    assert f"Using seed: {answer['metrics']['seed']}" in answer["logs"]
    assert answer["metrics"]["seed"] < 2**32


def test_the_log_says_what_has_no_effect_and_what_is_drawn_instead(server: CogServer) -> None:
    image = {"image": uri(encoded(photo()), "image/png"), "prompt_strength": 0, "width": 512}
    log = server.predict(SMALL | UNSAFE | image | {"lora_scale": 0.5, "extra_lora_scale": 2})["logs"]
    assert log.splitlines()[:6] == [
        "Using seed: 3",
        "megapixels 0.25 has no effect: with an image, the size is the image's.",
        "width 512 has no effect: with an image, the size is the image's.",
        "prompt_strength is 0, so nothing is drawn: the image is given back, and beside it only "
        "num_outputs, the output's format and disable_safety_checker count.",
        "lora_scale 0.5 has no effect: replicate_weights names no LoRA.",
        "extra_lora_scale 2 has no effect: extra_lora names no LoRA.",
    ]
    custom = {"aspect_ratio": "custom", "width": 264, "height": 256, "num_inference_steps": 1, "megapixels": "1"}
    log = server.predict(SMALL | UNSAFE | custom)["logs"]
    assert "264x256 is drawn at 272x256: custom sides go to the nearest multiple of 16.\n" in log
    assert "no effect" not in log


def test_the_log_says_that_the_miniature_draws_and_which_words_it_does_not_know(server: CogServer) -> None:
    assert "No GPU: the miniature draws. It knows the subjects fox, cat, " in server.log.read_text()
    asked = SMALL | UNSAFE | {"prompt": "A zorp and a dragon in the snow", "num_inference_steps": 1}
    assert "\nThe miniature does not know zorp, dragon; it knows fox, cat, " in server.predict(asked)["logs"]
    with_zorp = server.predict(asked | {"replicate_weights": "zorp"})["logs"]
    assert "\nThe miniature does not know dragon; it knows fox, cat, " in with_zorp
    assert "miniature" not in server.predict(asked | {"prompt": "A red fox."})["logs"]


def test_a_picture_carries_what_draws_it_again(server: CogServer, draw: Callable, tmp_path: Path) -> None:
    inputs = {"prompt": 'a "red" fox 🦊', "num_outputs": 2, "guidance_scale": 2.5, "aspect_ratio": "3:2"}
    for number, (_, content) in enumerate(files(server.predict(SMALL | UNSAFE | inputs))):
        path = tmp_path / f"{number}.png"
        path.write_bytes(content)
        again = images.read_metadata(path)
        assert again["seed"] == SMALL["seed"] + number
        assert same(draw(**again)[0], Image.open(path))


def test_metrics_tell_phases_and_precision(server: CogServer) -> None:
    metrics = server.predict(SMALL | {"go_fast": True})["metrics"]
    phases = {"input", "loras", "swap", "prompt", "denoise", "decode", "safety", "encode"}
    assert set(metrics["timing"]) == phases
    assert sum(metrics["timing"].values()) == pytest.approx(metrics["predict_time"], abs=0.3)
    assert (metrics["seed"], metrics["precision"], metrics["loras"]) == (3, "fp8", [])


def test_a_photo_and_a_mask(draw: Callable) -> None:
    mask = Image.new("L", (96, 64))
    mask.paste(255, (0, 0, 48, 64))
    image = uri(encoded(photo()), "image/png")
    (drawn,) = draw(image=image)
    (inpainted,) = draw(image=image, mask=uri(encoded(mask), "image/png"))
    assert drawn.size == inpainted.size == (96, 64)
    kept = np.asarray(mask) == 0
    assert np.array_equal(np.asarray(inpainted)[kept], np.asarray(photo())[kept])
    assert not np.array_equal(np.asarray(inpainted)[~kept], np.asarray(photo())[~kept])
    assert not same(drawn, inpainted)


@pytest.fixture(scope="session")
def lora() -> bytes:
    """A LoRA for the model that the server draws with, strong enough to be seen."""
    return lora_of_the_miniature(seed=0)


def test_a_photo_by_url_is_the_photo(draw: Callable, host: Host) -> None:
    host.routes["/photo.png"] = File(encoded(photo()))
    assert same(draw(image=host.url("/photo.png"))[0], draw(image=uri(encoded(photo()), "image/png"))[0])


def test_a_lora_by_url_and_by_data_uri(server: CogServer, draw: Callable, host: Host, lora: bytes) -> None:
    host.routes["/lora.safetensors"] = File(lora)
    (plain,) = draw()
    by_url = server.predict(SMALL | UNSAFE | {"replicate_weights": host.url("/lora.safetensors?token=secret")})
    assert failure(by_url) is None
    (drawn,) = (Image.open(io.BytesIO(content)) for _, content in files(by_url))
    assert same(drawn, draw(replicate_weights=uri(lora))[0])
    assert same(drawn, draw(extra_lora=uri(lora))[0])
    assert not same(drawn, plain)
    (report,) = by_url["metrics"]["loras"]
    assert report["scale"] == 1
    assert "lora.safetensors" in report["name"]
    assert "secret" not in str(by_url["metrics"]) + by_url["logs"] + str(drawn.info)


def test_scales(draw: Callable, lora: bytes) -> None:
    main, extra = {"replicate_weights": uri(lora)}, {"extra_lora": uri(lora)}
    (plain,) = draw()
    assert same(draw(**main, lora_scale=0)[0], plain)
    strong, negative = draw(**main, lora_scale=2)[0], draw(**main, lora_scale=-1)[0]
    assert not same(strong, negative)
    assert not same(negative, plain)
    # The same LoRA as main and as extra adds up; two roundings of a sum in float32 may differ by a hair.
    twice = np.asarray(draw(**main, **extra)[0]).astype(int)
    assert np.abs(twice - np.asarray(strong)).mean() < np.abs(twice - np.asarray(plain)).mean() / 20
    assert same(draw()[0], plain)


def test_an_empty_string_is_absent(draw: Callable) -> None:
    empty = dict.fromkeys(("image", "mask", "replicate_weights", "extra_lora"), "")
    assert same(draw(**empty)[0], draw()[0])


REFUSED = [
    ({"image": "/etc/hostname"}, "image is '/etc/hostname'"),
    ({"image": "file:///etc/hostname"}, "image is 'file:///etc/hostname'"),
    ({"image": "not a uri"}, "image is 'not a uri'"),
    ({"mask": "file:///etc/hostname", "image": uri(encoded(photo()), "image/png")}, "mask is 'file:"),
    ({"mask": uri(encoded(photo()), "image/png")}, "A mask was given without an image"),
    ({"aspect_ratio": "custom"}, "needs both"),
    ({"seed": 2**63}, "none may exceed"),
    ({"replicate_weights": "/etc/hostname"}, "/etc/hostname"),
    ({"extra_lora": "file:///etc/hostname"}, "file:///etc/hostname"),
    ({"extra_lora": uri(b"no LoRA")}, "safetensors"),
    ({"image": uri(b"no picture", "image/png")}, "image is not a picture"),
    ({"image": uri(encoded(photo())[:200], "image/png")}, "image could not be decoded"),
    ({"image": uri(encoded(Image.new("1", (15000, 15000))), "image/png")}, "image is too large"),
]


@pytest.mark.parametrize(("inputs", "sentence"), REFUSED, ids=[sentence for _, sentence in REFUSED])
def test_wrong_input_gets_one_sentence(server: CogServer, draw: Callable, inputs: dict, sentence: str) -> None:
    answer = server.predict(SMALL | inputs)
    reason = failure(answer)
    assert sentence in reason
    assert reason.count("\n") == 0
    assert reason.endswith(".")
    assert "Traceback" not in str(answer)
    wait_until(lambda: server.health()["status"] == "READY")


ODD_IMAGES = {
    "cmyk": encoded(photo().convert("CMYK"), "jpeg"),
    "16 bit": encoded(Image.fromarray(np.arange(4096, dtype=np.uint16).reshape(64, 64) * 16)),
    "palette": encoded(photo().convert("P")),
    "animation": encoded(photo(), "gif", save_all=True, append_images=[photo().rotate(180)]),
    "1x1": encoded(photo(1, 1)),
    "20000x10": encoded(photo(20000, 10)),
}


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("cmyk", (96, 64)),
        ("16 bit", (64, 64)),
        ("palette", (96, 64)),
        ("animation", (96, 64)),
        ("1x1", (1, 1)),
        ("20000x10", (1440, 1)),
    ],
)
def test_odd_images_are_drawn(draw: Callable, name: str, size: tuple[int, int]) -> None:
    assert draw(image=uri(ODD_IMAGES[name], "image/png"))[0].size == size


@pytest.mark.parametrize("prompt", ["", "a red fox " * 1000])
def test_odd_prompts_are_drawn(draw: Callable, prompt: str) -> None:
    assert draw(prompt=prompt)[0].size == (512, 512)


def test_loras_that_fit_the_cache_one_by_one_are_used_together(tmp_path: Path) -> None:
    first, second = (soak.make_lora(seed, rank=240) for seed in (1, 2))
    budget = 1.5 * len(first) / GIB
    environment = {"WEIGHTS_CACHE": str(tmp_path / "weights"), "WEIGHTS_CACHE_GB": str(budget)}
    with CogServer(environment=environment, log=tmp_path / "log") as server:
        server.wait_until_ready()
        loras = {"replicate_weights": uri(first), "extra_lora": uri(second)}
        nothing_drawn = {"image": uri(encoded(photo())), "prompt_strength": 0}
        answer = server.predict(SMALL | UNSAFE | loras | nothing_drawn)
    assert failure(answer) is None
    assert len(answer["metrics"]["loras"]) == 2


def test_a_bad_image_is_refused_before_a_lora_is_fetched(server: CogServer, host: Host) -> None:
    inputs = {"image": uri(b"no picture", "image/png"), "extra_lora": host.url("/lora.safetensors")}
    assert "image is not a picture" in failure(server.predict(SMALL | inputs))
    assert host.seen == []


def test_a_sum_has_no_order_whichever_inputs_name_it(draw: Callable) -> None:
    (expected,) = draw(replicate_weights="zorp*0.7 + bold*0.5 + dusk*-0.2")
    entries = [{"path": "bold", "scale": 0.25}, {"path": "dusk", "scale": -0.1}, {"path": "zorp", "scale": 0.35}]
    for inputs in (
        {"replicate_weights": "dusk*-0.1 + zorp*0.4", "extra_lora": "bold*0.5 + zorp*0.3 + local:dusk*-0.1"},
        {"extra_lora": json.dumps(entries), "extra_lora_scale": 2},
        {"replicate_weights": "bold", "lora_scale": 0.5, "extra_lora": "zorp*0.7 + zorp*0 + dusk*-0.2"},
    ):
        assert same(draw(**inputs)[0], expected)
    assert not same(draw(replicate_weights="zorp*0.7 + bold*0.5")[0], expected)


def test_a_lora_in_json_has_strengths_of_its_own(server: CogServer, draw: Callable) -> None:
    blocks = {"double_blocks.0-6": 0.5, "single_blocks": 0}
    entry = {"path": "zorp", "scale": 0.8, "clip": 0.4, "blocks": blocks}
    answer = server.predict(SMALL | UNSAFE | {"replicate_weights": json.dumps([entry])})
    (metric,) = answer["metrics"]["loras"]
    assert entry.items() <= metric.items()
    assert metric["trigger_words"] == ["zorp"]
    (drawn,) = (Image.open(io.BytesIO(content)) for _, content in files(answer))
    assert not same(drawn, draw(replicate_weights="zorp*0.8")[0])
    assert "LoRA zorp at 0.8, CLIP at 0.4, double_blocks.0-6 times 0.5, single_blocks times 0: " in answer["logs"]
    assert "dev has not all of the blocks double_blocks.0-6; those that it lacks change nothing." in answer["logs"]
    assert "clip has no effect: this LoRA changes no text encoder." in answer["logs"]
    assert same(draw(extra_lora=json.dumps(answer["metrics"]["loras"]))[0], drawn)
    nothing = {"path": "zorp", "blocks": {"double_blocks": 0, "single_blocks": 0}}
    assert same(draw(replicate_weights=json.dumps([nothing]))[0], draw()[0])


def test_a_picture_names_its_loras_as_they_were_applied(draw: Callable) -> None:
    inputs = {"replicate_weights": "zorp*0.5 + bold", "lora_scale": 0.5, "extra_lora": "dusk", "extra_lora_scale": -1}
    (drawn,) = draw(**inputs, go_fast=True, output_format="png")
    made = json.loads(drawn.info["Description"])
    scales = {"zorp": 0.25, "bold": 0.5, "dusk": -1}
    assert json.loads(made["replicate_weights"]) == [{"path": name, "scale": it} for name, it in scales.items()]
    assert same(draw(**made)[0], drawn)


def test_a_picture_without_loras_says_so(draw: Callable) -> None:
    (drawn,) = draw(replicate_weights="[]")
    made = json.loads(drawn.info["Description"])
    assert made["replicate_weights"] == "[]"  # what draws none where the operator has a LoRA for requests without one
    assert same(draw(**made)[0], drawn)


def test_both_inputs_together_name_eight_loras_at_most(server: CogServer) -> None:
    six = " + ".join(["zorp*0.1"] * 6)
    assert failure(server.predict(SMALL | {"replicate_weights": six, "extra_lora": "bold + dusk"})) is None
    assert failure(server.predict(SMALL | {"replicate_weights": six, "extra_lora": "bold + dusk + zorp"})) == (
        "The request names 9 LoRAs; it may name at most 8 together."
    )
