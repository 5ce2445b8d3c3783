"""How fast FLUX.1 is drawn, ours against diffusers, with random weights of full size: python -m bench.gpu.

Each system runs in a process of its own, one after another on the same GPU, draws one fixed picture whose latents are
compared with those of plain diffusers on the same weights, and is then timed, median of several, from the prompt to
pictures in host memory. Every process measures a matrix product as well, so that each time stands beside the floor of
its own moment. One JSON per run goes to bench/results; `python -m bench.report` makes the table and the plot.

--small draws with a tiny model on any machine: it tries the script, its times mean nothing.
"""

import argparse
import gc
import itertools
import json
import multiprocessing
import platform
import random
import shlex
import shutil
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import diffusers
import numpy as np
import torch
import transformers
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxImg2ImgPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
)
from PIL import Image
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import AutoTokenizer, CLIPTextModel, T5EncoderModel

import flux as drawing
import images
from bench import random_flux
from engine import fp8
from engine.acceleration import choose_attention
from flux import Flux
from harness.loras import files
from request import LoraChoice, Request
from safety import SafetyChecker
from service.measure import Stopwatch
from settings import ROOT, Models, Settings

PROMPT = "a red fox in the snow, a photograph"
SEED = 7
# Frees enough for two models of 24 GB, T5 and the VAE.
DISK = 40 * 10**9


@dataclass(frozen=True)
class Workload:
    """What is drawn."""

    name: str
    model: str
    steps: int
    side: int
    outputs: int = 1
    strength: float | None = None  # of image to image

    @property
    def drawn_steps(self) -> int:
        """Steps of all pictures together."""
        steps = self.steps if self.strength is None else int(self.steps * self.strength)
        return steps * self.outputs


FULL = (
    Workload("dev", "dev", 28, 1024),
    Workload("schnell", "schnell", 4, 1024),
    Workload("dev 512x512", "dev", 28, 512),
    Workload("dev image to image", "dev", 28, 1024, strength=0.75),
    Workload("schnell, four outputs", "schnell", 4, 1024, outputs=4),
)
SMALL = (
    Workload("dev", "dev", 2, 512),
    Workload("schnell", "schnell", 1, 512),
    Workload("dev image to image", "dev", 4, 512, strength=0.5),
    Workload("schnell, two outputs", "schnell", 1, 512, outputs=2),
)
CHECK = Workload("check", "dev", 4, 512)


@dataclass(frozen=True)
class Run:
    """What the processes of one run have in common."""

    folder: Path
    models: Models
    small: bool
    repeats: int
    profile: bool
    device: torch.device

    @property
    def workloads(self) -> tuple[Workload, ...]:
        """What is timed."""
        return SMALL if self.small else FULL

    @property
    def loras(self) -> list[Path]:
        """Two files of rank 16."""
        return [self.folder / f"lora-{number}.safetensors" for number in range(2)]

    @property
    def photo(self) -> Path:
        """What image to image starts from."""
        return self.folder / "photo.png"


# --------------------------------------------------------------------------------------------------------- measuring


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """How long work takes, what it left running on the GPU included."""
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    """Wait for the GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def summary(times: list[float], **more: object) -> dict[str, object]:
    """Median and spread."""
    return {"median_s": statistics.median(times), "least_s": min(times), "most_s": max(times), "n": len(times), **more}


def products(run: Run) -> dict[str, float]:
    """TFLOP/s of a large matrix product in bf16 and in rowwise fp8, on random numbers."""
    side = 512 if run.small else 8192
    a, b = (torch.randn(side, side, device=run.device, dtype=torch.bfloat16) for _ in range(2))
    rates = {"bf16": lambda: a @ b}
    if fp8.supported(run.device):
        (qa, sa), (qb, sb) = fp8.quantize_rows(a), fp8.quantize_rows(b)
        fast = {"out_dtype": torch.bfloat16, "use_fast_accum": run.device.type == "cuda"}
        rates["fp8"] = lambda: torch._scaled_mm(qa, qb.t(), sa, sb.t(), **fast)
    result = {}
    for name, multiply in rates.items():
        for _ in range(3):
            multiply()
        times = [seconds(lambda: [multiply() for _ in range(10)], run.device) / 10 for _ in range(5)]  # noqa: B023
        result[name] = 2 * side**3 / statistics.median(times) / 1e12
    return result


def step_flops(config: dict, image_tokens: int, text_tokens: int) -> float:
    """Floating-point operations of one denoising step of one picture: linear layers of the blocks, and attention."""
    width = config["num_attention_heads"] * config["attention_head_dim"]
    tokens = image_tokens + text_tokens
    blocks = config["num_layers"] + config["num_single_layers"]
    return blocks * (24 * width**2 * tokens + 4 * tokens**2 * width)


def floor(run: Run, workload: Workload, rates: dict[str, float]) -> dict[str, float]:
    """The seconds that the products alone take at the measured rates; with fp8, attention stays in bf16."""
    config = FluxTransformer2DModel.load_config(Path(run.models.dev) / "transformer")
    image_tokens, text_tokens = (workload.side // 16) ** 2, 512 if workload.model == "dev" else 256
    total = step_flops(config, image_tokens, text_tokens) * workload.drawn_steps / 1e12
    width = config["num_attention_heads"] * config["attention_head_dim"]
    blocks = config["num_layers"] + config["num_single_layers"]
    attention = blocks * 4 * (image_tokens + text_tokens) ** 2 * width * workload.drawn_steps / 1e12
    floors = {"tflop": total, "bf16_s": total / rates["bf16"]}
    if "fp8" in rates:
        floors["fp8_s"] = (total - attention) / rates["fp8"] + attention / rates["bf16"]
    return floors


def relative_error(a: Tensor, b: Tensor) -> float:
    """|a - b| / |b|."""
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


# --------------------------------------------------------------------------------------------------------- diffusers


class Diffusers:
    """diffusers' pipelines as its documentation has them."""

    def __init__(self, run: Run, *, compiled: bool, loras: bool) -> None:
        self.run = run
        dev = Path(run.models.dev)
        self.shared = {
            "vae": AutoencoderKL.from_pretrained(dev / "vae", torch_dtype=torch.bfloat16).to(run.device),
            "text_encoder": CLIPTextModel.from_pretrained(dev / "text_encoder", dtype=torch.bfloat16).to(run.device),
            "text_encoder_2": T5EncoderModel.from_pretrained(dev / "text_encoder_2", dtype=torch.bfloat16).to(
                run.device
            ),
            "tokenizer": AutoTokenizer.from_pretrained(dev / "tokenizer"),
            "tokenizer_2": AutoTokenizer.from_pretrained(dev / "tokenizer_2"),
        }
        dev_transformer = FluxTransformer2DModel.from_pretrained(dev / "transformer", torch_dtype=torch.bfloat16)
        self.transformers = {"dev": dev_transformer.to(run.device).requires_grad_(False)}
        with torch.device("meta"):
            config = FluxTransformer2DModel.load_config(Path(run.models.schnell) / "transformer")
            schnell = FluxTransformer2DModel.from_config(config)
        # The same weights but for the guidance embedder: no second 24 GB.
        own = {key: value for key, value in dev_transformer.state_dict().items() if "guidance_embedder" not in key}
        schnell.load_state_dict(own, assign=True)
        self.transformers["schnell"] = schnell.eval().requires_grad_(False)
        if loras:
            for number, path in enumerate(run.loras):
                self.pipeline("dev").load_lora_weights(path, adapter_name=f"lora{number}")
            self.transformers["dev"].set_adapters(["lora0", "lora1"], [1.0, 1.0])
            del self.transformers["schnell"]
        if compiled:
            self._compile()

    def _compile(self) -> None:
        choose_attention(list(self.transformers.values()), self.run.device)
        for transformer in self.transformers.values():
            transformer.compile_repeated_blocks(fullgraph=True)
        if self.run.device.type == "cuda":
            self.shared["vae"].to(memory_format=torch.channels_last)
            self.shared["vae"].decode = torch.compile(self.shared["vae"].decode)

    def pipeline(self, model: str, kind: type[FluxPipeline] | type[FluxImg2ImgPipeline] = FluxPipeline) -> FluxPipeline:
        """A pipeline around the loaded modules."""
        scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(Path(getattr(self.run.models, model)) / "scheduler")
        pipeline = kind(scheduler=scheduler, transformer=self.transformers[model], **self.shared)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def draw(self, workload: Workload, seed: int, output_type: str = "pil") -> object:
        """All pictures of a workload, as one batch."""
        start = {}
        if workload.strength is not None:
            start = {"image": Image.open(self.run.photo), "strength": workload.strength}
        return self.pipeline(workload.model, FluxPipeline if workload.strength is None else FluxImg2ImgPipeline)(
            f"{PROMPT} {seed}",
            width=workload.side,
            height=workload.side,
            num_inference_steps=workload.steps,
            guidance_scale=3.0,
            num_images_per_prompt=workload.outputs,
            max_sequence_length=512 if workload.model == "dev" else 256,
            generator=torch.Generator("cpu").manual_seed(seed),
            output_type=output_type,
            **start,
        ).images


def measure_diffusers(run: Run, *, compiled: bool, loras: bool) -> dict[str, object]:
    """One system of diffusers: every workload that it can draw."""
    start = time.perf_counter()
    system = Diffusers(run, compiled=compiled, loras=loras)
    result: dict[str, object] = {"set_up_s": time.perf_counter() - start}
    torch.save(system.draw(CHECK, SEED, "latent").cpu(), run.folder / f"latents-{name_of(compiled, loras)}.pt")
    result["workloads"] = {}
    for workload in run.workloads:
        if workload.model not in system.transformers:
            continue
        first = seconds(lambda: system.draw(workload, 0), run.device)  # noqa: B023
        times = [seconds(lambda: system.draw(workload, n), run.device) for n in range(1, run.repeats + 1)]  # noqa: B023
        result["workloads"][workload.name] = summary(times, first_s=first)
        print(f"  {workload.name}: {statistics.median(times):.3f} s (first {first:.1f} s)", flush=True)
    return {name_of(compiled, loras): result}


def name_of(compiled: bool, loras: bool) -> str:
    """Of a system of diffusers."""
    return f"diffusers{' + PEFT, two LoRAs' if loras else ''}, {'compiled' if compiled else 'eager'}"


# --------------------------------------------------------------------------------------------------------------- ours


@dataclass(frozen=True)
class Variant:
    """One way to use ours."""

    go_fast: bool
    loras: bool

    @property
    def name(self) -> str:
        """As the table has it."""
        return f"flux-sprites, {'fp8' if self.go_fast else 'bf16'}{', two LoRAs' if self.loras else ''}"


VARIANTS = [Variant(go_fast, loras) for loras, go_fast in itertools.product((False, True), (False, True))]


def request(run: Run, workload: Workload, variant: Variant, seed: int, **changes: object) -> Request:
    """A workload as a request; no prompt comes twice, so that none is remembered."""
    size = {"megapixels": "1" if workload.side == 1024 else "0.25"}  # fp8 is not offered for custom sizes
    if workload.strength is not None:
        size = {"image": run.photo, "prompt_strength": workload.strength}
    # 1.5: what fp8 multiplies scales by, so that both precisions hold the same mix.
    scale = 1.0 / drawing.FP8_LORA_FACTOR if variant.go_fast else 1.0
    loras = tuple(LoraChoice(str(path), scale) for path in run.loras) if variant.loras else ()
    return Request(
        **{
            "prompt": f"{PROMPT} {seed} {variant.name}",
            "model": workload.model,
            "num_inference_steps": workload.steps,
            "num_outputs": workload.outputs,
            "guidance_scale": 3.0,
            "seed": seed,
            "go_fast": variant.go_fast,
            "loras": loras,
            **size,
            **changes,
        }
    )


def measure_ours(run: Run) -> dict[str, object]:
    """All variants of ours, in turn."""
    settings = Settings(models=run.models, cache_dir=run.folder / "cache", compile=True)
    start = time.perf_counter()
    flux = Flux(settings, run.device)
    set_up = {"set_up_s": time.perf_counter() - start, "graphs": counters["stats"]["unique_graphs"]}
    results: dict[str, dict] = {variant.name: {**set_up, "workloads": {}} for variant in VARIANTS}
    for variant in VARIANTS:
        torch.save(check_latents(run, flux, variant), run.folder / f"latents-{variant.name}.pt")
    for workload in run.workloads:
        times: dict[str, list[float]] = {variant.name: [] for variant in VARIANTS}
        watches = {variant.name: Stopwatch(run.device) for variant in VARIANTS}
        for number in range(run.repeats + 1):
            for variant in VARIANTS:
                wanted = request(run, workload, variant, number + 1)
                loras = files(wanted)
                # The swap is timed apart.
                flux.prepare(request(run, workload, variant, 0), loras, Stopwatch(run.device))
                watch = watches[variant.name] if number else Stopwatch(run.device)
                times[variant.name].append(seconds(lambda: flux.generate(wanted, loras, watch), run.device))  # noqa: B023
        for variant in VARIANTS:
            first, *rest = times[variant.name]
            phases = {phase: value / run.repeats for phase, value in watches[variant.name].seconds.items()}
            results[variant.name]["workloads"][workload.name] = summary(rest, first_s=first, phases_s=phases)
            print(f"  {variant.name}: {workload.name} {statistics.median(rest):.3f} s {phases}", flush=True)
    for variant in VARIANTS:
        results[variant.name]["to_file"] = measure_to_file(run, flux, variant)
        if variant.loras:
            results[variant.name]["lora"] = measure_loras(run, flux, variant)
        if run.profile:
            results[variant.name]["kernels"] = measure_kernels(run, flux, variant)
    results[VARIANTS[0].name]["random_requests"] = count_graphs(run, flux)
    return results


@torch.no_grad()
def check_latents(run: Run, flux: Flux, variant: Variant) -> Tensor:
    """The latents of the picture that every system draws."""
    # The prompt is diffusers': it has no variant's name in it.
    wanted = request(run, CHECK, variant, SEED, prompt=f"{PROMPT} {SEED}")
    job = flux.prepare(wanted, files(wanted), Stopwatch(run.device))
    return drawing._denoise(job, SEED, lambda: None).cpu()


def measure_to_file(run: Run, flux: Flux, variant: Variant) -> dict[str, object]:
    """schnell from the request to files, safety check included."""
    workload = run.workloads[1]
    safety = SafetyChecker(Path(run.models.safety_checker), Path(run.models.nsfw_classifier), run.device)
    first = request(run, workload, variant, 0)
    loras = files(first)
    flux.prepare(first, loras, Stopwatch(run.device))

    def work(seed: int) -> None:
        drawn = flux.generate(request(run, workload, variant, seed), loras, Stopwatch(run.device)).images
        safety.check(drawn)
        with ThreadPoolExecutor() as threads:
            list(threads.map(lambda picture: images.save(picture, run.folder / "out.webp", "webp", 80, {}), drawn))

    work(100)
    return summary([seconds(lambda: work(101 + n), run.device) for n in range(run.repeats)])  # noqa: B023


def measure_loras(run: Run, flux: Flux, variant: Variant) -> dict[str, object]:
    """What a change of LoRAs costs before the first step: the files cold, the swap warm, another scale."""
    workload = run.workloads[0]
    wanted = request(run, workload, variant, 0)

    def swap(loras: Iterable[LoraChoice]) -> float:
        watch, changed = Stopwatch(run.device), request(run, workload, variant, 0, loras=tuple(loras))
        flux.prepare(changed, files(changed), watch)
        return watch.seconds["loras"] + watch.seconds["swap"]

    first, second = wanted.loras
    other = LoraChoice(first.reference, first.scale / 2)
    swap(())
    warm, scale = [], []
    for _ in range(run.repeats):
        swap([first])
        warm.append(swap([second]))
        swap([first])
        scale.append(swap([other]))
    flux.lora_cache._loras.clear()
    cold = swap([first])
    return {"cold_s": cold, "warm": summary(warm), "scale": summary(scale)}


def measure_kernels(run: Run, flux: Flux, variant: Variant) -> list[dict[str, object]]:
    """Where two steps of dev spend their time, by kernel."""
    workload = Workload("profile", "dev", 2, run.workloads[0].side)
    wanted = request(run, workload, variant, 1)
    loras = files(wanted)
    flux.prepare(wanted, loras, Stopwatch(run.device))
    with torch.profiler.profile() as profile:
        flux.generate(wanted, loras, Stopwatch(run.device))
    cuda = run.device.type == "cuda"

    def own(event: object) -> float:
        return event.self_device_time_total if cuda else event.self_cpu_time_total

    events = sorted(profile.key_averages(), key=own, reverse=True)
    total = sum(own(event) for event in events)
    return [{"kernel": e.key[:120], "ms": own(e) / 1e3, "share": own(e) / total, "calls": e.count} for e in events[:15]]


def count_graphs(run: Run, flux: Flux, requests: int = 200) -> dict[str, int]:
    """Draw requests of any size, model and precision, and count what was compiled for them."""
    rng = random.Random(0)
    before, breaks = counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
    sides = (16, 256) if run.small else (256, 1440)
    for number in range(requests):
        photo = run.folder / "random.png"
        Image.new("RGB", (rng.randint(*sides), rng.randint(*sides)), "grey").save(photo)
        wanted = Request(
            prompt=f"{PROMPT} {number}",
            image=photo,
            model=rng.choice(["dev", "schnell"]),
            go_fast=rng.random() < 0.5,
            prompt_strength=rng.random(),
            num_inference_steps=1,
            seed=number,
        )
        flux.generate(wanted, (), Stopwatch(run.device))
    return {
        "requests": requests,
        "compiled": counters["stats"]["unique_graphs"] - before,
        "graph_breaks": sum(counters["graph_break"].values()) - breaks,
    }


# ---------------------------------------------------------------------------------------------------------------- run

SYSTEMS: dict[str, Callable[[Run], dict[str, object]]] = {
    "eager": lambda run: measure_diffusers(run, compiled=False, loras=False),
    "compiled": lambda run: measure_diffusers(run, compiled=True, loras=False),
    "peft": lambda run: measure_diffusers(run, compiled=False, loras=True),
    "peft-compiled": lambda run: measure_diffusers(run, compiled=True, loras=True),
    "ours": measure_ours,
}


def measure(run: Run, system: str, answer: multiprocessing.Queue) -> None:
    """The life of one process."""
    try:
        rates = products(run)
        results = SYSTEMS[system](run)
        peak = torch.cuda.max_memory_allocated() if run.device.type == "cuda" else None
        floors = {workload.name: floor(run, workload, rates) for workload in run.workloads}
        answer.put(
            {name: {**it, "tflops": rates, "floors": floors, "peak_bytes": peak} for name, it in results.items()}
        )
    except Exception as error:
        answer.put({system: {"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}})


def compare(run: Run) -> dict[str, float]:
    """Relative errors of each system's latents against plain diffusers on the same weights."""

    def latents(name: str) -> Tensor | None:
        path = run.folder / f"latents-{name}.pt"
        return torch.load(path) if path.exists() else None

    plain, merged = latents(name_of(False, False)), latents(name_of(False, True))
    errors = {}
    for name, reference in (
        (name_of(True, False), plain),
        (VARIANTS[0].name, plain),
        (VARIANTS[1].name, plain),
        (name_of(True, True), merged),
        (VARIANTS[2].name, merged),
        (VARIANTS[3].name, merged),
    ):
        found = latents(name)
        if found is not None and reference is not None:
            errors[name] = relative_error(found, reference)
    return errors


def machine(device: torch.device) -> dict[str, object]:
    """What was measured on."""
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else "CPU",
        "memory_bytes": torch.cuda.get_device_properties(device).total_memory if cuda else None,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
    }


def main() -> None:
    """Build, measure each system, write the JSON after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a tiny model, on the CPU where there is no GPU")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--profile", action="store_true", help="say which kernels take the time")
    parser.add_argument("--folder", type=Path, help="where the weights are written, and found again by the next run")
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not options.small:
        sys.exit("There is no CUDA device here; --small tries the script on a CPU.")
    with tempfile.TemporaryDirectory(dir=memory_disk(options.small)) as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        start = time.perf_counter()
        models = random_flux.write(folder, random_flux.SMALL if options.small else random_flux.FULL, device)
        run = Run(folder, models, options.small, options.repeats, options.profile, device)
        prepare_inputs(run)
        print(f"Wrote the weights in {time.perf_counter() - start:.1f} s.", flush=True)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        now = datetime.now(UTC)
        report = {
            "command": command(options),
            "time": now.isoformat(timespec="seconds"),
            "machine": machine(device),
            "small": options.small,
            "systems": {},
        }
        options.results.mkdir(parents=True, exist_ok=True)
        path = options.results / f"{'small' if options.small else 'gpu'}-{now:%Y%m%d-%H%M%S}.json"
        context = multiprocessing.get_context("spawn")
        for system in options.systems:
            print(f"{system}:", flush=True)
            answer = context.Queue()
            process = context.Process(target=measure, args=(run, system, answer))
            process.start()
            report["systems"] |= answer.get()
            process.join()
            report["relative_errors"] = compare(run)
            path.write_text(json.dumps(report, indent=1) + "\n")
        print(json.dumps(report["relative_errors"], indent=1))
        print(f"Wrote {path}.")
        for name, result in report["systems"].items():
            if "error" in result:
                sys.exit(f"{name} failed: {result['trace']}")


def command(options: argparse.Namespace) -> str:
    """What was measured, without the places where it lay."""
    flags = [f"--{name}" for name in ("small", "profile") if getattr(options, name)]
    return shlex.join(
        ["python", "-m", "bench.gpu", *flags, "--repeats", str(options.repeats), "--systems", *options.systems]
    )


def memory_disk(small: bool) -> str | None:
    """Memory rather than a disk for the weights, where there is room: what is measured is a warm page cache."""
    memory = Path("/dev/shm")
    return str(memory) if not small and memory.is_dir() and shutil.disk_usage(memory).free > DISK else None


def prepare_inputs(run: Run) -> None:
    """The LoRAs and the photo."""
    config = FluxTransformer2DModel.load_config(Path(run.models.dev) / "transformer")
    with torch.device("meta"):
        transformer = FluxTransformer2DModel.from_config(config)
    for seed, path in enumerate(run.loras):
        random_flux.write_lora(path, transformer, seed)
    side = run.workloads[0].side
    noise = np.random.default_rng(0).integers(0, 256, (side // 8, side // 8, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((side, side)).save(run.photo)


if __name__ == "__main__":
    main()
