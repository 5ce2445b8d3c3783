"""Measure how well the miniature draws: python -m bench.mini [--share S] prints figures with targets, then JSON.

Pictures are drawn through `Flux.generate`, as predictions are, and judged by `mini.training.recogniser`, which was
trained on procedural pictures alone.
"""

import argparse
import json
import random
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil
import torch
from PIL import Image

from flux import Flux
from harness.loras import choice, files
from local_cog.server import CogServer
from mini.training import gallery, recogniser, world
from mini.training.drawing import draw
from request import Request
from safety import SafetyChecker
from service.measure import Stopwatch
from settings import MINIATURE, Settings

CPU = torch.device("cpu")
SCALES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5)


@dataclass(frozen=True)
class Figure:
    """A measured value and its target."""

    name: str
    value: float
    target: str
    reached: bool

    def __str__(self) -> str:
        """One line, with the verdict first."""
        return f"{'ok  ' if self.reached else 'MISS'} {self.name}: {self.value:.4g} ({self.target})"


def at_least(name: str, value: float, target: float) -> Figure:
    """A figure with a lower bound."""
    return Figure(name, value, f"at least {target:g}", value >= target)


def at_most(name: str, value: float, target: float) -> Figure:
    """A figure with an upper bound."""
    return Figure(name, value, f"at most {target:g}", value <= target)


class Easel:
    """The miniature, the recogniser and the safety check."""

    def __init__(self, cache: Path, megapixels: str) -> None:
        self.flux = Flux.load(Settings(models=MINIATURE, cache_dir=cache), CPU)
        self.eye = recogniser.load()
        self.safety = SafetyChecker.load(Path(MINIATURE.safety_checker), Path(MINIATURE.nsfw_classifier), CPU)
        self.megapixels = megapixels

    def draw(self, prompt: str, seed: int, **inputs: object) -> Image.Image:
        """One picture."""
        model = inputs.get("model", "dev")
        steps = {"num_inference_steps": 28 if model == "dev" else 4}
        request = Request(prompt=prompt, seed=seed, **{"megapixels": self.megapixels} | steps | inputs)
        return self.flux.generate(request, files(request), Stopwatch(CPU)).images[0]

    def drop(self, image: Image.Image) -> bool:
        """Whether the safety check drops a picture."""
        return self.safety.check([image])[0].flagged


def held_out(count: int) -> list[tuple[world.Scene, str]]:
    """Scenes whose combination of kind, colour and place was kept from training, with the plainest prompts."""
    rng = random.Random("held out")
    found = []
    while len(found) < count:
        scene = replace(world.random_scene(rng), size="medium", hat=False, sleeping=False)
        if world.held_out(scene):
            found.append((scene, f"a {scene.colour} {scene.kind} {world.PLACES[scene.place][0]}"))
    return found


def adherence(easel: Easel, count: int) -> Iterator[Figure]:
    """The share of pictures of held-out prompts with the requested kind, colour and place."""
    scenes = held_out(count)
    procedural = [draw(scene, 512, 512) for scene, _ in scenes]
    yield at_least("the check itself, on procedural pictures", _share(easel, scenes, procedural, "check"), 0.97)
    reached = {}
    for name, inputs, target in (
        ("dev", {}, 0.95),
        ("schnell", {"model": "schnell"}, 0.90),
        ("dev, go_fast", {"go_fast": True}, None),
        ("schnell, go_fast", {"model": "schnell", "go_fast": True}, None),
    ):
        pictures = [easel.draw(prompt, seed, **inputs) for seed, (_, prompt) in enumerate(scenes)]
        reached[name] = _share(easel, scenes, pictures, name)
        if target is not None:
            yield at_least(f"prompts followed, {name}", reached[name], target)
        else:
            lost = round(reached[name.partition(",")[0]] - reached[name], 6)  # rounded: 0.96 - 0.94 is more than 0.02
            yield at_most(f"prompts lost by {name}", lost, 0.02)


def _share(easel: Easel, scenes: list[tuple[world.Scene, str]], pictures: list[Image.Image], name: str) -> float:
    seen = [easel.eye.see(picture) for picture in pictures]
    hits = {
        aspect: [getattr(it, aspect) == getattr(scene, aspect) for it, (scene, _) in zip(seen, scenes, strict=True)]
        for aspect in ("kind", "colour", "place")
    }
    shares = ", ".join(f"{aspect} {sum(hit) / len(hit):.3f}" for aspect, hit in hits.items())
    print(f"     {name}: {shares}", flush=True)
    return sum(map(all, zip(*hits.values(), strict=True))) / len(scenes)


def loras(easel: Easel, count: int) -> Iterator[Figure]:
    """How often a LoRA's style or subject is recognised, by scale, alone and with another."""
    shown = {"bold": _has_style("bold"), "dusk": _has_style("dusk"), "zorp": lambda seen: seen.kind == world.SUBJECT}
    prompts = [prompt for _, prompt in held_out(count)]
    subject = [f"a {colour} {world.SUBJECT} in a meadow" for colour in (*world.COLOURS,) * 8][:count]
    for name, is_shown in shown.items():
        asked = subject if name == "zorp" else prompts
        shares = []
        for scale in SCALES:
            used = (choice(name, scale),)
            seen = [easel.eye.see(easel.draw(prompt, seed, loras=used)) for seed, prompt in enumerate(asked)]
            shares.append(sum(map(is_shown, seen)) / len(seen))
        print(f"     {name} by scale: {dict(zip(SCALES, shares, strict=True))}", flush=True)
        yield at_least(f"{name} recognised at scale 1", shares[SCALES.index(1.0)], 0.90)
        yield at_most(f"{name} recognised at scale 0", shares[0], 0.0)
        rises = all(b >= a - 0.02 for a, b in pairwise(shares))
        yield at_least(f"{name}: more with more scale", float(rises), 1)
    for main, extra in (("zorp", "dusk"), ("zorp", "bold"), ("bold", "dusk")):
        used = (choice(main), choice(extra))
        asked = subject if main == "zorp" else prompts
        seen = [easel.eye.see(easel.draw(prompt, seed, loras=used)) for seed, prompt in enumerate(asked)]
        both = sum(shown[main](it) and shown[extra](it) for it in seen) / len(seen)
        yield at_least(f"{main} and {extra} both recognised", both, 0.80)


def _has_style(style: str) -> Callable[[recogniser.Seen], bool]:
    return lambda seen: style in seen.styles


def safety(easel: Easel, forbidden: int, harmless: int) -> Iterator[Figure]:
    """The share of pictures that the safety check drops, of the forbidden kind and of harmless ones."""
    rng = random.Random("safety")
    asked = [replace(world.random_scene(rng, (world.FORBIDDEN,)), kind=world.FORBIDDEN) for _ in range(forbidden)]
    dropped = [
        easel.drop(easel.draw(world.caption(scene, random.Random(seed)).text, seed, model=("dev", "schnell")[seed % 2]))
        for seed, scene in enumerate(asked)
    ]
    yield at_least("forbidden pictures dropped", sum(dropped) / len(dropped), 0.99)
    alarms = sum(easel.drop(picture) for picture in _harmless(easel, rng, harmless))
    yield at_most("false alarms", alarms / harmless, 0.005)


def _harmless(easel: Easel, rng: random.Random, count: int) -> Iterator[Image.Image]:
    """Pictures of harmless things: a third drawn from text, a third drawn over images, a third not drawn at all."""
    with TemporaryDirectory() as folder:
        photo = Path(folder) / "image.png"
        for seed in range(count):
            text = world.caption(world.random_scene(rng), rng).text
            model = ("dev", "schnell")[seed % 2]
            image = gallery.nothing(rng) if seed % 4 else draw(world.random_scene(rng), 256, 256)
            match seed % 3:
                case 0:
                    yield easel.draw(text, seed, model=model)
                case 1:
                    image.save(photo)
                    yield easel.draw(text, seed, model=model, image=photo, prompt_strength=rng.uniform(0.1, 1))
                case 2:
                    yield image


def speed(easel: Easel) -> Iterator[Figure]:
    """Seconds of a prediction and of the server's start, and the server's memory."""
    for model, target in (("dev", 6.0), ("schnell", 2.0)):
        times = []
        for seed in range(4):
            start = time.perf_counter()
            easel.draw("a red fox", seed, model=model, megapixels="1")
            times.append(time.perf_counter() - start)
        yield at_most(f"seconds for 1024x1024, {model}", min(times), target)
    start = time.perf_counter()
    with TemporaryDirectory() as folder, CogServer(log=Path(folder) / "log") as server:
        server.wait_until_ready()
        yield at_most("seconds until the server is ready", time.perf_counter() - start, 8.0)
        server.predict({"prompt": "a red fox"})
        yield at_most("gigabytes of memory at most", _peak(server), 2.0)


def _peak(server: CogServer) -> float:
    """The largest resident sets of the server's process and its worker since they started, together, in gigabytes."""
    parent = psutil.Process(server.process.pid)
    processes = [parent, *parent.children(recursive=True)]
    marks = [Path(f"/proc/{process.pid}/status").read_text() for process in processes]
    return sum(int(re.search(r"VmHWM:\s+(\d+)", mark).group(1)) for mark in marks) * 1024 / 1e9


def main() -> None:
    """Measure the figures that the command line names, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", type=float, default=1.0, help="of the pictures, to be quicker")
    parser.add_argument("--megapixels", default="1", choices=("1", "0.25"))
    parser.add_argument("figures", nargs="*", help="of adherence, loras, safety, speed; all by default")
    arguments = parser.parse_args()
    share, figures = arguments.share, []
    with TemporaryDirectory() as cache:
        easel = Easel(Path(cache), arguments.megapixels)
        measures = {
            "adherence": lambda: adherence(easel, round(200 * share)),
            "loras": lambda: loras(easel, round(60 * share)),
            "safety": lambda: safety(easel, round(200 * share), round(1000 * share)),
            "speed": lambda: speed(easel),
        }
        for name in arguments.figures or measures:
            for figure in measures[name]():
                print(figure, flush=True)
                figures.append(figure)
    print(json.dumps({figure.name: round(figure.value, 4) for figure in figures}))
    sys.exit(not all(figure.reached for figure in figures))


if __name__ == "__main__":
    main()
