"""Fetch the models that a machine with a GPU draws with, ahead of time, into Hugging Face's cache: script/models.

For images, which are built without a GPU, and for machines that will have no network. Folders are left as they are.
"""

import argparse
from dataclasses import asdict
from pathlib import Path

from settings import Settings
from sources.shown import gigabytes, redact
from tools import command
from weights import fetch_one


def main() -> None:
    """Fetch one model after the other, and print how large each is; exit with 1 and a sentence if one cannot be had."""
    argparse.ArgumentParser(
        prog="script/models",
        description="Fetch ahead of time what a machine with a GPU draws with, into Hugging Face's cache (HF_HOME); "
        "FLUX_DEV, FLUX_SCHNELL, SAFETY_CHECKER and NSFW_CLASSIFIER choose other repos.",
    ).parse_args()
    with command():
        settings = Settings.from_environment(cuda=True)
        for part, model in asdict(settings.models).items():
            print(f"{part}: {redact(model)}", flush=True)
            folder = fetch_one(part, settings)
            if folder == Path(model).expanduser():
                print("It is a folder, which is left as it is.")
            else:
                size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
                print(f"It has {gigabytes(size)} in Hugging Face's cache.")


if __name__ == "__main__":
    main()
