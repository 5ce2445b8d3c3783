"""Compare the cost of LoRAs with diffusers + PEFT: script/bench lora [--pairs N] [--rounds N] prints a line of JSON.

With random weights: on a CPU a slice of FLUX at full width, on a CUDA device the whole transformer. Compared times are
measured in turn, in one run: a swap, a plain copy of the weights that it touches, and the bare products of its factors;
steps with LoRAs and without.
"""

import argparse
import json
import math
import os
import platform
import statistics
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import diffusers
import peft
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import CLIPTextConfig, CLIPTextModel

from engine import fp8, live
from engine.architecture import BLOCKS, is_block_linear
from engine.live import Live, Term
from harness.loras import random_lora
from lora.deltas import LowRank, pack
from lora_loader import LoraCache
from request import LoraFile

RANK = 16
SLICE = {"num_layers": 3, "num_single_layers": 6}
# The size of a trained LoRA's change relative to the weight, at rank 16; it grows with the root of the rank.
RELATIVE_SIZE = 0.05
# Quantiles of Student's t for a 95 % interval, by pairs.
T95 = {4: 3.18, 10: 2.26, 20: 2.09, 30: 2.05}


class Stage:
    """The pristine weights, live copies of them, diffusers' pipeline with adapters, and two LoRAs."""

    def __init__(self, device: torch.device, folder: Path) -> None:
        self.device = device
        blocks = {"num_layers": 19, "num_single_layers": 38} if device.type == "cuda" else SLICE
        with torch.device("meta"):
            live, reference = (
                FluxTransformer2DModel(**blocks, guidance_embeds=True).bfloat16().requires_grad_(False).eval()
                for _ in range(2)
            )
            text_encoder = CLIPTextModel(CLIPTextConfig(num_hidden_layers=1))
        self.base = {name: _random(p.shape, device) for name, p in live.named_parameters()}
        # PEFT does not change weights, so its transformer can use the pristine ones.
        reference.load_state_dict(self.base, assign=True)
        self.live = Live(live.to_empty(device=device), {"dev": self.base})
        self.live_fp8 = self.live.quantized(is_block_linear)
        self.theirs = _pipeline(reference)
        self.touched = [
            f"{name}.weight"
            for name, layer in live.named_modules()
            if isinstance(layer, nn.Linear) and name.startswith(BLOCKS)
        ]
        # In memory for both: neither reads a disk.
        self.states = [random_lora(live, lambda name: name.startswith(BLOCKS), RANK, seed) for seed in (1, 2)]
        self.loras = []
        cache = LoraCache(live, text_encoder)
        for number, state in enumerate(self.states):
            save_file(state, path := folder / f"{number}.safetensors")
            self.loras.append((path.name, cache.read(LoraFile(path, path.name, path.name))))

    def swap_in(self, live: Live, scales: Iterable[float]) -> int:
        """Ours: both LoRAs at these scales."""
        return live.hold(
            "dev", [Term(name, s, it.transformer) for (name, it), s in zip(self.loras, scales, strict=True)]
        )

    def swap_out(self, live: Live) -> int:
        """Ours: no LoRA."""
        return live.hold("dev", [])

    def load(self) -> None:
        """Theirs: both LoRAs."""
        names = []
        for number, state in enumerate(self.states):
            names.append(f"lora{number}")
            self.theirs.load_lora_weights(dict(state), adapter_name=names[-1])
        self.theirs.set_adapters(names, [1.0, 0.7])

    def unload(self) -> None:
        """Theirs: no LoRA."""
        self.theirs.unload_lora_weights()

    def copy(self) -> None:
        """A plain copy of the weights that a swap touches; the next swap has other scales, so it writes them all."""
        live = dict(self.live.module.named_parameters())
        for name in self.touched:
            live[name].copy_(self.base[name])

    def multiply(self) -> None:
        """The products of all factors in float32 alone."""
        out = torch.empty(max(self.base[name].numel() for name in self.touched), device=self.device)
        for name in self.touched:
            product = out[: self.base[name].numel()].view(self.base[name].shape)
            for up, down in self._factors(name):
                torch.mm(up, down, out=product)

    def _factors(self, name: str) -> list[tuple[Tensor, Tensor]]:
        deltas: list[LowRank] = [delta for _, lora in self.loras for delta in lora.transformer[name]]
        return [tuple(x.to(self.device, non_blocking=True).float() for x in (d.up, d.down)) for d in deltas]


def _random(shape: torch.Size, device: torch.device) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device=device).uniform_(-0.03, 0.03)


def _pipeline(transformer: FluxTransformer2DModel) -> FluxPipeline:
    nothing = dict.fromkeys(("scheduler", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    return FluxPipeline(**nothing, transformer=transformer)


def _pair(shape: tuple[int, int], rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Factors [out, rank] and [rank, in]; at rank 16 their product is RELATIVE_SIZE of a base of 0.03 / sqrt(3)."""
    size = (RELATIVE_SIZE * 0.03 / 3**0.5 / RANK**0.5) ** 0.5
    rows, columns = shape
    return tuple(torch.randn(s, generator=generator) * size for s in ((rows, rank), (rank, columns)))


# ---------------------------------------------------------------------------------------------------------------------
# Measuring


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of a call, until the device has finished it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def in_turn(calls: dict[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, float]:
    """Medians of several rounds of all calls, after an uncounted round that warms up."""
    measured = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            taken = seconds(call, device)
            if number:
                measured[name].append(taken)
        say(f"round {number} of {rounds}: {', '.join(f'{n} {v[-1]:.2f} s' for n, v in measured.items() if v)}")
    return {name: statistics.median(values) for name, values in measured.items()}


def swaps(stage: Stage, rounds: int) -> dict[str, float]:
    """Seconds of swaps, and of the copies, products and loads that they are compared with."""
    # New scales every time: each swap writes every tensor that the LoRAs touch.
    scales = iter([(1.0 - 0.01 * n, 0.7 + 0.01 * n) for n in range(10 * rounds + 10)])
    calls = {
        "copy": stage.copy,
        "products": stage.multiply,
        "swap": lambda: stage.swap_in(stage.live, next(scales)),
        "swap_out": lambda: stage.swap_out(stage.live),
        "peft_load": stage.load,
        "peft_unload": stage.unload,
    }
    calls_fp8 = {"copy": stage.copy, "swap_fp8": lambda: stage.swap_in(stage.live_fp8, next(scales))}
    # Once on a CPU, which rounds to fp8 very slowly; no target depends on it.
    fp8_rounds = rounds if stage.device.type == "cuda" else 1
    return in_turn(calls_fp8, fp8_rounds, stage.device) | in_turn(calls, rounds, stage.device)


def inputs(stage: Stage, image_tokens: int, text_tokens: int) -> dict[str, Tensor]:
    """The transformer's arguments for one step of a picture of so many tokens."""
    config = stage.live.module.config
    side = math.isqrt(image_tokens)
    ids = torch.stack(torch.meshgrid(torch.arange(1), torch.arange(side), torch.arange(side), indexing="ij"), -1)
    made = {
        "hidden_states": torch.randn(1, image_tokens, config.in_channels),
        "encoder_hidden_states": torch.randn(1, text_tokens, config.joint_attention_dim),
        "pooled_projections": torch.randn(1, config.pooled_projection_dim),
        "timestep": torch.tensor([0.7]),
        "guidance": torch.tensor([3.5]),
        "img_ids": ids.reshape(-1, 3).float(),
        "txt_ids": torch.zeros(text_tokens, 3),
    }
    return {name: tensor.to(stage.device, torch.bfloat16) for name, tensor in made.items()}


def steps(stage: Stage, rounds: int, step: dict[str, Tensor]) -> dict[str, float]:
    """Seconds of a step with both LoRAs, ours and theirs."""
    stage.swap_in(stage.live, (1.0, 0.7))
    stage.load()
    calls = {
        "step": lambda: stage.live.module(**step),
        "peft_step": lambda: stage.theirs.transformer(**step),
    }
    figures = in_turn(calls, rounds, stage.device)
    stage.unload()
    return figures


def step_ratio(stage: Stage, pairs: int, step: dict[str, Tensor]) -> tuple[float, float]:
    """The 95 % interval of the time of a step with LoRAs over one without, measured in turn on the same tensors."""
    ratios = []
    # An untimed step between a swap and the timed step, because swaps change the state of caches and clocks.
    short = inputs(stage, 16, 16)
    for number in range(pairs + 1):
        turn = {}
        for name in ("with", "without") if number % 2 else ("without", "with"):
            stage.swap_in(stage.live, (1.0, 0.7)) if name == "with" else stage.swap_out(stage.live)
            stage.live.module(**short)
            turn[name] = seconds(lambda: stage.live.module(**step), stage.device)
        if number:  # the first pair warms up
            ratios.append(turn["with"] / turn["without"])
        say(f"pair {number} of {pairs}: {turn['with']:.2f} s with LoRAs, {turn['without']:.2f} s without")
    return _interval(ratios)


def _interval(ratios: list[float]) -> tuple[float, float]:
    """The 95 % interval of the geometric mean."""
    logs = [math.log(ratio) for ratio in ratios]
    t = T95[max(n for n in T95 if n <= len(logs))]
    half = t * statistics.stdev(logs) / len(logs) ** 0.5
    return tuple(round(math.exp(statistics.mean(logs) + sign * half), 4) for sign in (-1, 1))


def operations(stage: Stage) -> dict[str, Counter[str]]:
    """Counts of one step's operations by name: with no LoRAs, with ours, with PEFT's."""
    step = inputs(stage, 16, 16)  # the operations of a step do not depend on its size

    def trace(module: nn.Module) -> Counter[str]:
        with torch.profiler.profile() as profile:
            module(**step)
        return Counter({event.key: event.count for event in profile.key_averages() if event.key.startswith("aten::")})

    stage.swap_out(stage.live)
    traces = {"none": trace(stage.live.module)}
    stage.swap_in(stage.live, (1.0, 0.7))
    traces["ours"] = trace(stage.live.module)
    stage.load()
    traces["peft"] = trace(stage.theirs.transformer)
    stage.unload()
    return traces


def fp8_shares(stage: Stage) -> list[dict[str, float]]:
    """How much of a LoRA fp8 keeps in one layer, and the error of merging over fp8's own rounding (1: no more)."""
    name = "single_transformer_blocks.0.proj_mlp.weight"
    base = stage.base[name]
    layer = stage.live_fp8.module.get_submodule(name.removesuffix(".weight"))
    stage.swap_out(stage.live_fp8)
    plain = layer.weight.float() * layer.scale
    rows = []
    for rank in (4, 16, 64):
        generator = torch.Generator().manual_seed(rank)
        delta = LowRank(0, len(base), *_pair(tuple(base.shape), rank, generator), 1.0)
        for scale in (0.25, 1.0):
            stage.live_fp8.hold("dev", [Term(f"rank {rank}", scale, {name: (delta,)})])
            exact = scale * (delta.up @ delta.down).to(base.device)
            merged, held = base.float() + exact, layer.weight.float() * layer.scale
            values, row_scale = fp8.quantize_rows(merged)
            change = held - plain
            rows.append(
                {
                    "rank": rank,
                    "scale": scale,
                    "relative_size": _round(exact.norm() / base.float().norm()),
                    "cosine": _round(nn.functional.cosine_similarity(change.flatten(), exact.flatten(), dim=0)),
                    "share": _round((change * exact).sum() / exact.square().sum()),
                    "error_over_rounding": _round(
                        (held - merged).norm() / (values.float() * row_scale - merged).norm()
                    ),
                }
            )
    stage.swap_out(stage.live_fp8)
    return rows


def _round(value: Tensor) -> float:
    return round(value.item(), 4)


# ---------------------------------------------------------------------------------------------------------------------
# Counting


class Counted(TorchDispatchMode):
    """Counts launches on "meta" and the bytes that they read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.launches = self.moved = self.uploaded = 0

    def __torch_dispatch__(  # noqa: D105
        self, func: object, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        result = func(*args, **kwargs or {})
        given = [it for it in tree_leaves((args, kwargs)) if isinstance(it, Tensor)]
        made = [it for it in tree_leaves(result) if isinstance(it, Tensor) and not any(it is other for other in given)]
        if func.is_view or not given or func._schema.name.startswith(("aten::empty", "aten::set_", "aten::is_pinned")):
            return result  # nothing is computed
        if any(it.device.type == "cpu" for it in given):
            self.uploaded += sum(it.nbytes for it in given if it.device.type == "cpu")
            return result
        self.launches += 1
        if func is torch.ops.flux_sprites.merge.default:
            self.moved += merged_bytes(*args)
        else:
            self.moved += sum(it.nbytes for it in (*given, *made))
            self.moved += sum(it.nbytes for it in given if func._schema.name.endswith("_"))
        return result


def merged_bytes(
    lives: list[Tensor],
    scales: list[Tensor],
    bases: list[Tensor],
    blocks: list[Tensor],
    factors: list[int],
    strengths: list[float],
    dtype: torch.dtype,
) -> int:
    """Bytes that the fused kernel moves; of a block of memory with factors, only the factors count."""
    weights = sum(it.nbytes for it in (*lives, *scales, *bases))
    ranks = sum(factors[4 : 5 * len(strengths) // len(lives) : 5])
    return weights + sum(sum(base.shape) for base in bases) * ranks * dtype.itemsize


def count() -> dict[str, dict[str, object]]:
    """Launches and bytes of a swap of one LoRA of rank 16, counted on tensors of full size without memory.

    Each operation is assumed to read all its inputs and write all its outputs; an operation in place does both. Caches
    make the true number smaller.
    """
    live.BUFFER_ELEMENTS["meta"] = live.BUFFER_ELEMENTS["cuda"]
    with torch.device("meta"):
        module = FluxTransformer2DModel(guidance_embeds=True).bfloat16().requires_grad_(False)
    base = {name: torch.empty_like(parameter) for name, parameter in module.named_parameters()}
    linears = [name for name, layer in module.named_modules() if isinstance(layer, nn.Linear) and is_block_linear(name)]
    names = [f"{name}.weight" for name in linears]
    zeros = partial(torch.zeros, dtype=torch.bfloat16)
    sizes = {name: base[name].shape for name in names}  # [out, in]
    deltas = pack({name: (LowRank(0, o, zeros(o, RANK), zeros(RANK, i), 1.0),) for name, (o, i) in sizes.items()})
    plain = Live(module, {"dev": base})
    found = {}
    for precision, it in {"bf16": plain, "fp8": plain.quantized(is_block_linear)}.items():
        for way, dtypes in {"": it._merged, " by torch's operations": frozenset()}.items():
            it._merged = dtypes
            it.hold("dev", [])
            it._uploads.leave(0)  # forget the LoRA, so that it is uploaded
            with Counted() as counted:
                tensors = it.hold("dev", [Term(f"a{way}", 1.0, deltas)])
            found[precision + way] = {"tensors": tensors, "launches": counted.launches, "bytes": counted.moved}
            found[precision + way] |= {"uploaded": counted.uploaded}
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Results


def targets(figures: dict, traces: dict[str, Counter[str]], device: torch.device) -> dict[str, object]:
    """The targets, and whether each was reached."""
    floor = max(figures["copy"], figures["products"])
    ours, theirs = figures["swap"] + 4 * figures["step"], figures["peft_load"] + 4 * figures["peft_step"]
    low, high = figures["step_ratio"]
    reached = {
        "no operation more per step": traces["ours"] == traces["none"],
        "the interval of steps with over steps without contains 1": low <= 1 <= high,
        f"swap + 4 steps ({ours:.2f} s) before PEFT's ({theirs:.2f} s)": ours < theirs,
        "fp8's error is that of its rounding": all(s["error_over_rounding"] <= 1.0001 for s in figures["fp8_shares"]),
    }
    if device.type == "cuda":
        for name in ("swap", "swap_fp8"):
            reached[f"{name} ({1000 * figures[name]:.0f} ms) in 60 ms"] = figures[name] <= 0.06
            times = figures[name] / figures["copy"]
            reached[f"{name} within 2x of a plain copy ({times:.2f}x)"] = times <= 2
    else:
        times = figures["swap"] / floor
        reached[f"swap within 1.5x of the larger floor ({times:.2f}x)"] = times <= 1.5
    return reached


def machine(device: torch.device) -> dict[str, object]:
    """The machine, and the versions of the libraries."""
    info = Path("/proc/cpuinfo")
    names = [line.split(": ")[1] for line in info.read_text().splitlines() if line.startswith("model name")] or [""]
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else names[0],
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "peft": peft.__version__,
        "command": f"script/bench lora {' '.join(sys.argv[1:])}".strip(),
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", ""),
    }


def say(text: str) -> None:
    """Print progress to standard error; standard output has the result alone."""
    print(text, file=sys.stderr)


@torch.no_grad()
def main() -> None:  # noqa: D103
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=30, help="of steps with and without LoRAs")
    parser.add_argument("--rounds", type=int, default=5, help="of swaps, and of steps")
    parser.add_argument("--tokens", type=int, default=1024, help="of the picture; a square number")
    options = parser.parse_args()
    diffusers.utils.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # two adapters are meant
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    before = machine(device)
    with tempfile.TemporaryDirectory() as folder:
        stage = Stage(device, Path(folder))
        say(f"{len(stage.touched)} weights in blocks, {sum(stage.base[n].nbytes for n in stage.touched) / 1e9:.2f} GB")
        figures = swaps(stage, options.rounds)
        figures |= steps(stage, options.rounds, inputs(stage, options.tokens, 128))
        # A shorter step, in which an additional operation would weigh more.
        figures["step_ratio"] = step_ratio(stage, options.pairs, inputs(stage, options.tokens // 4, 128))
        figures["fp8_shares"] = fp8_shares(stage)
        traces = operations(stage)
    print(
        json.dumps(
            {
                "bench": "lora",
                **before,
                "pairs": options.pairs,
                "rounds": options.rounds,
                "seconds": {k: round(v, 4) for k, v in figures.items() if isinstance(v, float)},
                "tokens": options.tokens,
                "step_ratio_95": figures["step_ratio"],
                "counted_on_full_size": count(),
                "operations_per_step": {name: trace.total() for name, trace in traces.items()},
                "fp8_shares": figures["fp8_shares"],
                "reached": targets(figures, traces, device),
            }
        )
    )


if __name__ == "__main__":
    main()
