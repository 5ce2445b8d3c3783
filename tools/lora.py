"""Fetch and check LoRAs ahead of time, and print what is in them, how large they are and how much they overlap.

LoRAs are fetched into the predictor's cache and read as the predictor reads them, so a request gets what is reported
here. Neither a GPU nor the base's weights are needed; where these are on this machine, changes are compared with them.
This module knows reports; `lora.measures` knows the arithmetic.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from engine.architecture import official, outlined
from engine.loading import map_weights
from lora.adapter import named_base
from lora.measures import Size, cosine, measure
from lora_loader import Lora, read_lora
from request import LoraChoice, LoraFile
from service.machine import drawing_device
from service.strict_json import storable
from settings import OFFICIAL, Settings
from sources.shown import brief, gigabytes, noted, redact
from tools import command
from weights import WeightsCache, on_disk, outlines, read_choices

MODELS = ("transformer", "text_encoder")


@dataclass(frozen=True)
class Checked:
    """A LoRA that the predictor would take."""

    reference: str  # as it may be shown
    file: LoraFile
    nbytes: int
    named_base: tuple[str, str] | None  # the base model that the file states, and the field that states it
    lora: Lora
    sizes: dict[str, Size] = field(default_factory=dict)  # of its changes, by model

    def lines(self) -> list[str]:
        """The report for people; the first line is its title."""
        file, base = self.file, self.named_base
        return [
            file.name,
            str(self.lora.report).removesuffix("."),
            f"{self.nbytes:,} bytes ({gigabytes(self.nbytes)}), SHA-256 {file.sha256}",
            f"base model by its header: {f'{noted(base[0])} ({base[1]})' if base else 'none named'}",
            f"trigger words: {', '.join(file.trigger_words) or 'none named'}",
            *(_size_line(model.replace("_", " "), size) for model, size in self.sizes.items()),
        ]

    def document(self) -> dict[str, object]:
        """The same for a machine."""
        base = self.named_base
        return {
            "reference": self.reference,
            "name": self.file.name,
            "bytes": self.nbytes,
            "sha256": self.file.sha256,
            "base_model": {"name": noted(base[0]), "stated_in": base[1]} if base else None,
            "trigger_words": list(self.file.trigger_words),
            **self.lora.report.metric(),
            "change": {
                model: {
                    "norm": size.delta,
                    "base_norm": size.base,
                    "ratio": size.ratio,
                    "most": {"parameter": size.most[0], "ratio": size.most[1]} if size.most else None,
                    "left_out": size.left_out,
                }
                for model, size in self.sizes.items()
            },
        }


@dataclass(frozen=True)
class Refused:
    """A reference whose LoRA cannot be fetched or read."""

    reference: str  # as it may be shown
    error: str

    def lines(self) -> list[str]:
        """See `Checked.lines`."""
        return [self.reference, self.error]

    def document(self) -> dict[str, object]:
        """See `Checked.document`."""
        return {"reference": self.reference, "error": self.error}


@dataclass(frozen=True)
class Checks:
    """The results for all references."""

    loras: Sequence[Checked | Refused]  # in the order of the references
    overlaps: Mapping[tuple[int, int], float | None]  # cosines of the changes, by places in the order
    no_base: str  # why nothing was compared with the base; empty where it was

    @property
    def failed(self) -> bool:
        """Whether any reference was refused."""
        return any(isinstance(it, Refused) for it in self.loras)

    def report(self) -> str:
        """Everything, for people."""
        parts = [it.lines() for it in self.loras]
        if self.no_base:
            parts.append(["beside the base", self.no_base])
        if self.overlaps:
            parts.append(["overlap", *self._overlap_lines()])
        return "\n".join("\n  ".join(lines) for lines in parts)

    def _overlap_lines(self) -> list[str]:
        pairs = [f"{self._name(a)}, {self._name(b)}" for a, b in self.overlaps]
        none = "one of them changes nothing, or is too large for numbers"
        # + 0.0 makes 0 of -0.
        cosines = [none if value is None else f"{round(value, 3) + 0.0:6.3f}" for value in self.overlaps.values()]
        width = max(map(len, pairs))
        return [
            *(f"{pair:<{width}}  {cosine}" for pair, cosine in zip(pairs, cosines, strict=True)),
            "(the cosine of their changes: 1 is the same direction, 0 nothing in common, -1 the opposite direction)",
        ]

    def _name(self, place: int) -> str:
        """A LoRA's name, with a part of its hash where others have the same: some trainers use one name for all."""
        file = self.loras[place].file
        others = (it.file for it in self.loras if isinstance(it, Checked) and it.file.name == file.name)
        return file.name if all(it.sha256 == file.sha256 for it in others) else f"{file.name} ({file.sha256[:8]})"

    def document(self) -> dict[str, object]:
        """The same for a machine; null stands for numbers beyond float32, which JSON cannot say."""
        overlaps = [{"loras": pair, "cosine": value} for pair, value in self.overlaps.items()]
        loras = [it.document() for it in self.loras]
        return storable({"loras": loras, "overlaps": overlaps, "no_base": self.no_base or None})


def _size_line(model: str, size: Size) -> str:
    if size.ratio is None:
        line = f"norm of its change: {size.delta:.4g} ({model})"
    else:
        line = f"beside the base: {_percent(size.ratio)} ({model})"
    if size.most:
        line += f", most in {size.most[0]}: {_percent(size.most[1])}"
    if size.left_out:
        line += f"; without {size.left_out} parameter(s) whose change depends on the base's weights"
    return line


def _percent(ratio: float) -> str:
    return f"{100 * ratio:.1f} %" if 0.1 <= ratio < 1000 else f"{100 * ratio:.2g} %"


def check(references: Sequence[str], here: Path, settings: Settings) -> Checks:
    """Fetch, read and measure LoRAs, by whatever an input may have, or by their paths, relative to `here`."""
    known = settings.models.dev == OFFICIAL.dev
    shapes = outlined(official()["dev"] if known else outlines(settings, ["dev"])["dev"])
    loras = [it for reference in references for it in read_all(reference, here, settings, shapes)]
    checked = {place: it for place, it in enumerate(loras) if isinstance(it, Checked)}
    bases, no_base = (None, None), ""
    if checked:
        try:
            bases = find_bases(settings, shapes)
        except ValueError as error:
            no_base = str(error)
    products = torch.zeros(len(checked), len(checked), dtype=torch.float64)
    for model, module, base in zip(MODELS, shapes, bases, strict=True):
        changes = [getattr(it.lora, model) for it in checked.values()]
        sizes, own = measure(changes, dict(module.named_parameters()), base)
        products += own
        for it, size in zip(checked.values(), sizes, strict=True):
            if size is not None:
                it.sizes[model] = size
    pairs = combinations(enumerate(checked), 2)
    overlaps = {(one, other): cosine(products, i, j) for (i, one), (j, other) in pairs}
    return Checks(loras, overlaps, no_base)


def read_all(text: str, here: Path, settings: Settings, shapes: tuple[nn.Module, nn.Module]) -> list[Checked | Refused]:
    """The LoRAs that a text names, see `check`; each may be refused."""
    shown = brief(redact(text))
    with suppress(OSError):  # too long for a path: a data URI
        if text.strip() and (path := here / text).exists():
            return [read(text, LoraChoice(str(path), trusted=True), settings, shapes)]
    try:
        choices = read_choices(text) if text.strip() else []
    except ValueError as error:
        return [Refused(shown, f"There is no file or folder of that name; as a reference, {error}")]
    if not choices:
        return [Refused(shown, "It names no LoRA.")]
    return [read(choice.reference, choice, settings, shapes) for choice in choices]


def read(name: str, choice: LoraChoice, settings: Settings, shapes: tuple[nn.Module, nn.Module]) -> Checked | Refused:
    """A LoRA for a transformer and CLIP of these shapes, fetched where it is not here; or the sentence about it."""
    shown = brief(redact(name))
    try:
        with WeightsCache(settings).open_choice(choice) as file:
            lora = read_lora(file.path, *shapes, file.config)
            with safe_open(file.path, framework="pt") as tensors:
                base = named_base(tensors.metadata() or {}, file.config)
            return Checked(shown, file, file.path.stat().st_size, base, lora)
    except ValueError as error:
        return Refused(shown, str(error))


def find_bases(settings: Settings, shapes: tuple[nn.Module, nn.Module]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The pristine parameters of dev's transformer and CLIP, mapped from disk; a ValueError where they are not here."""
    folder = on_disk(settings.models.dev, settings, MODELS)
    if folder is None:
        model = redact(settings.models.dev)
        raise ValueError(f"The weights of {model} are not on this machine; only a change's own norm is known.")
    return map_weights(folder, *shapes)


def main() -> None:
    """Print the report; exit with 1 if a reference was refused."""
    parser = argparse.ArgumentParser(
        prog="script/lora",
        description="Fetch and check LoRAs: what is in them, how large their changes are, how much they overlap.",
    )
    parser.add_argument(
        "references",
        nargs="+",
        metavar="REFERENCE",
        help="a path, or any reference that a request may have: owner/name, huggingface.co/…, civitai.com/…, https://…",
    )
    parser.add_argument("--json", action="store_true", help="one JSON document instead of a report")
    options = parser.parse_intermixed_args()
    here = Path.cwd()
    with command(), redirect_stdout(sys.stderr):  # what fetching says is no part of the report
        checks = check(options.references, here, Settings.from_environment(cuda=drawing_device().type == "cuda"))
    print(json.dumps(checks.document(), ensure_ascii=False, indent=2) if options.json else checks.report())
    sys.exit(checks.failed)


if __name__ == "__main__":
    main()
