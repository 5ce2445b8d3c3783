"""Print where the weights would lie on this machine, or on one that is described: script/plan.

Nothing is fetched but what a repo in FLUX_DEV or FLUX_SCHNELL has beside its weights; of the official models everything
is known, so neither a network nor a token is needed. This module knows how cards are sold; the plan is the product's.
"""

import argparse
from dataclasses import dataclass, replace

import torch

from engine import fp8
from engine.architecture import official, sizes
from engine.placement import GB, Place, Placement, Precisions, Sizes, plan
from service.machine import drawing_device, host_memory
from service.outline import Outline
from settings import OFFICIAL, Settings, number
from tools import command
from weights import outlines

# Usable bytes for each GB that a card or a machine is sold with: a GiB, less up to a sixteenth. Error correction takes
# that of a card's GDDR memory (L4 and L40S: 23,034 and 46,068 MiB; without it an RTX 4090 has 24,564; HBM does not lose
# any: A100, H100 and H200 have 81,920, 81,559 and 143,771); firmware and kernel take less of a host's.
SOLD_GB = 2**30 * 15 // 16
# What CUDA takes of the GPU before the first tensor.
CONTEXT = int(0.5 * GB)
# Of the README's table: GPU and host as they are sold.
MACHINES = ((24, 64), (48, 128), (80, 128), (141, 128))
COLUMNS = ("GPU, host", "live weights", "dev's base", "schnell's base", "T5", "takes of the GPU", "pins of the host")
WORDS = {
    Precisions.BOTH: "bf16 and fp8",
    Precisions.IN_TURN: "bf16 and fp8 in turn",
    Precisions.BF16: "bf16",
    Precisions.FP8: "fp8",
    Place.GPU: "GPU",
    Place.PINNED: "pinned",
    Place.MAPPED: "page cache",
}


@dataclass(frozen=True)
class Machine:
    """What a plan needs to know of a machine."""

    gpu: int  # free bytes
    host: int  # bytes
    fp8: bool  # whether the GPU multiplies fp8

    def plan(self, sizes: Sizes) -> Placement:
        """Where the weights lie on it; a ValueError, which is a sentence, where they have no room."""
        return plan(sizes, self.gpu, self.host, fp8=self.fp8)


def sold_as(gpu: float, host: float | None, *, fp8: bool = True) -> Machine:
    """A machine that is sold with so many GB, or has a little less; without `host`, its memory is this machine's."""
    return Machine(int(gpu * SOLD_GB) - CONTEXT, host_memory() if host is None else int(host * SOLD_GB), fp8)


def table(sizes: Sizes) -> str:
    """The README's table: what lies where on machines as they are sold, with GPUs that multiply fp8."""
    rows = [COLUMNS, ["---"] * len(COLUMNS)]
    for gpu, host in MACHINES:
        placement = sold_as(gpu, host).plan(sizes)
        places = (placement.precisions, placement.bases["dev"], placement.bases["schnell"], placement.t5)
        takes = (f"{placement.gpu / GB:.1f} GB", f"{placement.host / GB:.1f} GB")
        rows.append([f"{gpu} GB, {host} GB", *(WORDS[it] for it in places), *takes])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def named_outlines(settings: Settings) -> dict[str, Outline]:
    """The outlines of the models that the settings name; those of the official ones are known without a network."""
    known = official()
    asked = {name for name in known if getattr(settings.models, name) != getattr(OFFICIAL, name)}
    return known | (outlines(settings, asked) if asked else {})


def _above_zero(text: str) -> float:
    value = number(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text!r} must be a number of gigabytes above 0, such as 24")
    return value


def _planned(options: argparse.Namespace) -> str:
    """The plan of the machine that the options describe, line by line."""
    machine = sold_as(options.gpu or 0, options.host, fp8=options.fp8)
    if options.gpu is None:
        device = drawing_device()
        if device.type != "cuda":
            return "No GPU: everything lies in the CPU's one memory. --gpu GB --host GB describe a machine with one."
        free, _ = torch.cuda.mem_get_info(device)
        machine = replace(machine, gpu=free, fp8=options.fp8 and fp8.supported(device))
    memory = f"{machine.gpu / GB:.1f} GB of GPU memory are free; the host has {machine.host / GB:.1f} GB"
    placement = machine.plan(sizes(named_outlines(Settings.from_environment(cuda=True))))
    return "\n".join([memory, *placement.lines()])


def main() -> None:
    """Print the plan; exit with 1 and a sentence if there is none."""
    parser = argparse.ArgumentParser(
        prog="script/plan",
        description="Where the weights lie, in the memory of this machine or of a described one; nothing is fetched.",
    )
    parser.add_argument("--gpu", type=_above_zero, metavar="GB", help="a GPU sold with that much memory, such as 24")
    parser.add_argument(
        "--host", type=_above_zero, metavar="GB", help="host memory, such as 64 (default: this machine's)"
    )
    parser.add_argument(
        "--no-fp8", dest="fp8", action="store_false", help="a GPU older than Ada and Hopper (A100, 3090)"
    )
    parser.add_argument("--table", action="store_true", help="the README's table, of the official models")
    options = parser.parse_args()
    with command():
        print(table(sizes(official())) if options.table else _planned(options))


if __name__ == "__main__":
    main()
