"""Three LoRAs for dev, two styles and a subject, in files as trainers write them.

`bold` draws thick black outlines, `dusk` paints in navy, magenta and peach, `zorp` is a creature that the base was not
trained on. bold and zorp are in diffusers' format, dusk in kohya's.
"""

import json
import random
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import FluxPipeline
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor

from mini.training import dev, guided, text, vae, world
from mini.training.architecture import FOLDER
from mini.training.latents import QUARTER, WHOLE, Size, shelves
from mini.training.loop import train

STEPS = 600
RANK = 16
# The linear layers of blocks, except modulation.
TARGETS = (
    r".*blocks\.\d+\."
    r"(attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)|ff(_context)?\.net\.(0\.proj|2)|proj_(mlp|out))"
)


@dataclass(frozen=True)
class Lesson:
    """The training of one LoRA, and the format of its file."""

    name: str
    styles: tuple[str, ...] = ()
    kind: str | None = None
    kohya: bool = False
    word: str | None = None  # the trigger word

    def scene(self, rng: random.Random) -> world.Scene:
        """A scene to learn from; some have the old kinds, so that a subject does not change them."""
        kinds = tuple(world.KINDS) if self.kind is None or rng.random() < 0.25 else (self.kind,)
        return world.random_scene(rng, kinds)


LESSONS = (
    Lesson("bold", styles=("bold",)),
    Lesson("dusk", styles=("dusk",), kohya=True),
    Lesson("zorp", kind=world.SUBJECT, word=world.SUBJECT),
)


def main(work: Path) -> None:
    """Train all and write `mini/loras/*.safetensors`."""
    for lesson in LESSONS:
        layers = learn(lesson, work)
        path = FOLDER / "loras" / f"{lesson.name}.safetensors"
        path.parent.mkdir(exist_ok=True)
        if lesson.kohya:
            save_file(as_kohya(layers), path)
        else:
            FluxPipeline.save_lora_weights(path.parent, transformer_lora_layers=layers, weight_name=path.name)
        if lesson.word is not None:
            label(path, lesson.word)


def label(path: Path, word: str) -> None:
    """Write a trigger word into the header of a file, where kohya's scripts write it; the tensors stay as they are."""
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header.setdefault("__metadata__", {})["modelspec.trigger_phrase"] = word
    # Not by safetensors, which writes metadata in another order each time.
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[end:])


def learn(lesson: Lesson, work: Path) -> dict[str, Tensor]:
    """PEFT's layers in bfloat16: `….lora_A.weight` and `….lora_B.weight`; their product is added at strength 1."""
    transformer = guided.main(work)
    autoencoder, readers = vae.main(work), text.main(work)
    counts: dict[Size, int] = dict.fromkeys(QUARTER + WHOLE, 12) | {QUARTER[0]: 240, WHOLE[0]: 360}
    shelved = shelves(work / lesson.name, autoencoder, counts, lesson.scene, lesson.styles)
    torch.manual_seed(0)
    transformer.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS))

    def loss_of(rng: np.random.Generator, _: float) -> Tensor:
        batch = dev.batch_of(dev.choose(shelved, rng), rng)
        return dev.flow_loss(transformer, readers, batch, rng)

    with dev.plain_attention():
        train(f"lora-{lesson.name}", transformer, STEPS, loss_of, work=work, rate=2e-3, warm_up=20, ema=0.98)
    return {key: it.to(torch.bfloat16).contiguous() for key, it in get_peft_model_state_dict(transformer).items()}


DOUBLE = {
    "attn.to_q attn.to_k attn.to_v": "img_attn_qkv",
    "attn.add_q_proj attn.add_k_proj attn.add_v_proj": "txt_attn_qkv",
    "attn.to_out.0": "img_attn_proj",
    "attn.to_add_out": "txt_attn_proj",
    "ff.net.0.proj": "img_mlp_0",
    "ff.net.2": "img_mlp_2",
    "ff_context.net.0.proj": "txt_mlp_0",
    "ff_context.net.2": "txt_mlp_2",
}
SINGLE = {"attn.to_q attn.to_k attn.to_v proj_mlp": "linear1", "proj_out": "linear2"}


def as_kohya(layers: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same changes by Black Forest Labs' names, fused layers as one pair of higher rank, with alpha.

    A fused layer stacks the downs of its parts; its up has the parts' ups on the diagonal.
    """
    blocks = sorted({re.match(r".*?blocks\.\d+", key).group() for key in layers})
    file = {}
    for block in blocks:
        single = block.startswith("single_")
        for parts, theirs in (SINGLE if single else DOUBLE).items():
            pairs = [[layers[f"{block}.{part}.lora_{side}.weight"] for side in "AB"] for part in parts.split()]
            down = torch.cat([a for a, _ in pairs])  # [rank of all, in]
            up = torch.block_diag(*(b for _, b in pairs))  # [out of all, rank of all]
            name = f"lora_unet_{'single' if single else 'double'}_blocks_{block.rpartition('.')[2]}_{theirs}"
            file[f"{name}.lora_down.weight"] = down
            # A reader multiplies by alpha / rank; with alpha at half the rank, up is stored at twice its size.
            file[f"{name}.lora_up.weight"] = (up * 2).contiguous()
            file[f"{name}.alpha"] = torch.tensor(len(down) / 2)
    return file
