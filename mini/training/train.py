"""Train the miniature. Each stage continues where it was stopped.

python -m mini.training.train [--work DIR] [stage ...]
"""

import argparse
from pathlib import Path

import torch

from mini.training import dev, guided, loras, recogniser, safety, schnell, text, vae
from mini.training.architecture import FOLDER, write_flux
from mini.training.loop import DEVICE


def write_models(work: Path) -> None:
    """Write the trained models into the predictor's folder."""
    readers = text.main(work)
    transformers = {"dev": guided.main(work), "schnell": schnell.main(work)}
    write_flux(FOLDER, vae.refined(work), readers.clip, readers.t5, transformers)


STAGES = {
    "vae": vae.main,
    "text": text.main,
    "dev": dev.main,
    "decoder": vae.refined,
    "guided": guided.main,
    "schnell": schnell.main,
    "models": write_models,
    "loras": loras.main,
    "safety": safety.main,
    "recogniser": recogniser.main,
}


def main() -> None:
    """Run the stages that the command line names, in order, or all."""
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
