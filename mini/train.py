"""How the miniature was made: `python -m mini.train`. Each stage goes on where it was stopped.

python -m mini.train [--work DIR] [stage ...]
"""

import argparse
from pathlib import Path

import torch

from mini import (
    recogniser,
    stage_dev,
    stage_guided,
    stage_loras,
    stage_safety,
    stage_schnell,
    stage_text,
    stage_vae,
)
from mini.architecture import FOLDER, write_flux
from mini.loop import DEVICE


def write_models(work: Path) -> None:
    """Put what was trained where the predictor looks for it."""
    readers = stage_text.main(work)
    transformers = {"dev": stage_guided.main(work), "schnell": stage_schnell.main(work)}
    write_flux(FOLDER, stage_vae.refined(work), readers.clip, readers.t5, transformers)


STAGES = {
    "vae": stage_vae.main,
    "text": stage_text.main,
    "dev": stage_dev.main,
    "decoder": stage_vae.refined,
    "guided": stage_guided.main,
    "schnell": stage_schnell.main,
    "models": write_models,
    "loras": stage_loras.main,
    "safety": stage_safety.main,
    "recogniser": recogniser.main,
}


def main() -> None:
    """Run the stages that are asked for, in order; all of them by default."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", help=f"of {', '.join(STAGES)}; all by default")
    parser.add_argument("--work", type=Path, default=FOLDER / "work", help="where checkpoints lie")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    torch.set_default_device(DEVICE)
    for stage in arguments.stages or STAGES:
        STAGES[stage](arguments.work)


if __name__ == "__main__":
    main()
