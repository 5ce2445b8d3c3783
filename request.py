"""One validated prediction, and the LoRAs that it names. What is not allowed is refused in one sentence; no torch."""

import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from hashlib import sha256
from pathlib import Path

# torch takes larger seeds, but clients and databases keep them as signed 64-bit integers.
LARGEST_SEED = 2**63 - 1
# Twenty times what the text encoders read of a prompt; tokenizing it takes up to a second.
LONGEST_PROMPT = 50_000
# Seeds that the request does not give are drawn below this: short enough to be copied by hand.
DRAWN_SEEDS = 2**32
# LoRAs of one request, in both inputs together.
MOST_LORAS = 8
# Black Forest Labs' names for both kinds of blocks, alone or with numbers from 0 on, the last one included.
BLOCKS = re.compile(r"(double_blocks|single_blocks)(?:\.([0-9]{1,3})(?:-([0-9]{1,3}))?)?")


def exact(number: float | Fraction) -> Fraction:
    """The decimal that a number is written as: exactly a tenth for 0.1, which no float is."""
    return Fraction(str(number))


def named_blocks(key: str) -> tuple[str, range]:
    """The kind of blocks that a key such as "double_blocks.0-6" names, and their numbers; without any, all of them."""
    if found := BLOCKS.fullmatch(key):
        kind, first, last = found.groups()
        numbers = range(10**3) if first is None else range(int(first), int(last or first) + 1)
        if numbers:
            return kind, numbers
    raise ValueError(  # the end of a sentence that names the key
        "it must be double_blocks or single_blocks, alone or with numbers from the lower to the higher, such as "
        "double_blocks.3 or double_blocks.0-6."
    )


@dataclass(frozen=True)
class LoraChoice:
    """A LoRA by reference, with its strength."""

    reference: str
    scale: float = 1.0
    trusted: bool = False  # the operator's own (COG_WEIGHTS), which may be a path
    clip: float | None = None  # the text encoder's strength, where it differs
    # Factors of the strength in some of the transformer's blocks, see `named_blocks`. Where several keys name a block,
    # the one that names the fewest blocks counts; of equal ones, the last.
    blocks: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Make a float of an integer scale, as JSON may have it."""
        object.__setattr__(self, "scale", float(self.scale))

    def entry(self, path: str) -> dict[str, object]:
        """The object for it in JSON; `path` is a name that may be shown.

        The operator's own LoRA is marked: in a request, the last part of its path may name another one.
        """
        path = f"COG_WEIGHTS:{path}" if self.trusted else path
        more = {"clip": self.clip, "blocks": dict(self.blocks)}
        return {"path": path, "scale": self.scale} | {name: it for name, it in more.items() if it not in (None, {})}


@dataclass(frozen=True)
class LoraFile:
    """A LoRA on the disk, fetched and checked; the caller keeps it there while it is read."""

    path: Path  # a complete .safetensors file
    sha256: str  # of its content, in hex
    name: str  # as it may be shown
    trigger_words: tuple[str, ...] = ()  # for prompts, where its source states them
    config: str = ""  # text of the adapter_config.json that PEFT saved beside it

    @property
    def content(self) -> str:
        """The LoRA's identity, in hex: the same weights under another config are another LoRA."""
        return sha256(f"{self.sha256} {self.config}".encode()).hexdigest() if self.config else self.sha256


@dataclass(frozen=True, kw_only=True)
class Request:
    """A validated prediction: the model page's inputs, with its defaults. Errors are sentences with the value.

    Numbers get the types declared here: JSON has one kind of number, so Cog passes 4.0 for 4 and 3 for 3.0.
    """

    prompt: str
    image: Path | None = None
    mask: Path | None = None
    aspect_ratio: str = "1:1"
    height: int | None = None
    width: int | None = None
    prompt_strength: float = 0.8
    model: str = "dev"
    num_outputs: int = 1
    num_inference_steps: int = 28
    guidance_scale: float = 3.0
    seed: int | None = None  # never None or negative once made: such a seed is drawn
    output_format: str = "webp"
    output_quality: int = 80
    disable_safety_checker: bool = False
    go_fast: bool = False
    megapixels: str = "1"
    loras: tuple[LoraChoice, ...] = field(default=())

    def __post_init__(self) -> None:
        """Convert numbers to their types, draw a missing seed, refuse contradictions."""
        if len(self.prompt) > LONGEST_PROMPT:
            raise ValueError(f"The prompt has {len(self.prompt)} characters; it must have at most {LONGEST_PROMPT}.")
        for name in ("height", "width", "num_outputs", "num_inference_steps", "seed", "output_quality"):
            self._set(name, _integer(name, getattr(self, name)))
        for name in ("prompt_strength", "guidance_scale"):
            self._set(name, float(getattr(self, name)))
        if len(self.loras) > MOST_LORAS:
            raise ValueError(f"The request names {len(self.loras)} LoRAs; it may name at most {MOST_LORAS} together.")
        if self.mask is not None and self.image is None:
            raise ValueError("A mask was given without an image; send the image that it belongs to as `image`.")
        if self.custom_size and None in (self.width, self.height):
            raise ValueError(
                f"aspect_ratio is custom with width {self.width} and height {self.height}; "
                "it needs both, each from 256 to 1440."
            )
        if self.seed is None or self.seed < 0:
            self._set("seed", secrets.randbelow(DRAWN_SEEDS))
        if self.seeds[-1] > LARGEST_SEED:
            raise ValueError(
                f"seed {self.seed} is too large for {self.num_outputs} output(s), which use the seeds from it on: "
                f"none may exceed {LARGEST_SEED}."
            )

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    @property
    def seeds(self) -> range:
        """The seed of each picture."""
        return range(self.seed, self.seed + self.num_outputs)

    @property
    def custom_size(self) -> bool:
        """Whether width and height give the size; with an image, its own size counts."""
        return self.image is None and self.aspect_ratio == "custom"

    @property
    def fp8(self) -> bool:
        """Whether fp8 was asked for; pictures of a custom size are drawn in bf16, as the page says."""
        return self.go_fast and not self.custom_size

    @property
    def without_effect(self) -> list[str]:
        """A sentence for each input that is not at its default and changes nothing."""
        if self.image is not None:
            names = ("aspect_ratio", "megapixels", "width", "height")
            reasons = dict.fromkeys(names, "with an image, the size is the image's")
        elif self.custom_size:
            reasons = {"megapixels": "with aspect_ratio custom, width and height are the size"}
        else:
            reasons = dict.fromkeys(("width", "height"), "it needs aspect_ratio custom")
        if self.image is None:
            reasons["prompt_strength"] = "it needs an image"
        if self.model == "schnell":
            reasons["guidance_scale"] = "schnell has no guidance"
        if self.output_format == "png":
            reasons["output_quality"] = "png loses nothing"
        sentences = [
            no_effect(name, getattr(self, name), reason)
            for name, reason in reasons.items()
            if getattr(self, name) != getattr(Request, name)
        ]
        if self.image is not None and self.prompt_strength == 0:
            sentences.append(
                "prompt_strength is 0, so nothing is drawn: the image is given back, and beside it only "
                "num_outputs, the output's format and disable_safety_checker count."
            )
        return sentences


def no_effect(name: str, value: object, reason: str) -> str:
    """The sentence about an input that changes nothing; 4.0 is written as 4."""
    return f"{name} {str(value).removesuffix('.0')} has no effect: {reason}."


def _integer(name: str, value: float | None) -> int | None:
    if value is None or isinstance(value, int):
        return value
    if not value.is_integer():
        raise ValueError(f"{name} is {value}; it must be a whole number.")
    return int(value)
