"""The text encoders, trained to predict the scene that a caption describes, and fixed from then on."""

import random
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5Tokenizer

from mini.training import world
from mini.training.architecture import CLIP_TOKENS, POOLED, T5_TOKENS, TEXT, clip, clip_tokenizer, t5, t5_tokenizer
from mini.training.loop import DEVICE, train

STEPS = 400
BATCH = 128
READABLE = (*world.KINDS, world.FORBIDDEN)
# The possible answers for each aspect; None if a caption does not name it.
ASPECTS: dict[str, tuple[object, ...]] = {
    "kind": (None, *READABLE),
    "colour": (None, *world.COLOURS),
    "place": (None, *world.PLACES),
    "size": tuple(world.SIZES),
    "hat": (False, True),
    "sleeping": (False, True),
}


class Readers(nn.Module):
    """Both text encoders, each with a linear head for the answers."""

    def __init__(self) -> None:
        super().__init__()
        self.tokenizer: CLIPTokenizer = clip_tokenizer()
        self.tokenizer_2: T5Tokenizer = t5_tokenizer()
        self.clip: CLIPTextModel = clip(self.tokenizer)
        self.t5: T5EncoderModel = t5(self.tokenizer_2)
        answers = sum(len(values) for values in ASPECTS.values())
        self.clip_head = nn.Linear(POOLED, answers)
        self.t5_head = nn.Linear(TEXT, answers)

    def forward(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Texts → CLIP's pooled output [B, POOLED] and T5's tokens [B, T5_TOKENS, TEXT], as FluxPipeline makes them."""
        ids = _ids(self.tokenizer, texts, CLIP_TOKENS)
        ids_2 = _ids(self.tokenizer_2, texts, T5_TOKENS)
        return self.clip(ids).pooler_output, self.t5(ids_2)[0]


def _ids(tokenizer: CLIPTokenizer | T5Tokenizer, texts: list[str], length: int) -> Tensor:
    ids = tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids
    return ids.to(DEVICE)


def _answers(scene: world.Scene, caption: world.Caption) -> list[int]:
    said = {"kind": caption.kind, "colour": caption.colour, "place": caption.place}
    return [values.index(said.get(aspect, getattr(scene, aspect))) for aspect, values in ASPECTS.items()]


def loss(readers: Readers, rng: np.random.Generator) -> Tensor:
    """The cross-entropy of both encoders' answers about random captions."""
    dice = random.Random(int(rng.integers(2**32)))
    scenes = [world.random_scene(dice, READABLE) for _ in range(BATCH)]
    captions = [world.caption(scene, dice) for scene in scenes]
    answers = torch.tensor([_answers(scene, it) for scene, it in zip(scenes, captions, strict=True)])  # [B, aspects]
    pooled, tokens = readers([it.text for it in captions])
    total = torch.zeros(())
    for told in (readers.clip_head(pooled), readers.t5_head(tokens.mean(dim=1))):
        for column, part in enumerate(told.split([len(values) for values in ASPECTS.values()], dim=1)):
            total = total + F.cross_entropy(part, answers[:, column])
    return total


def main(work: Path) -> Readers:
    """The trained encoders, in bfloat16."""
    torch.manual_seed(0)
    readers = Readers()
    train("text", readers, STEPS, lambda rng, _: loss(readers, rng), work=work, rate=1e-3, ema=0.99)
    return readers.to(torch.bfloat16).eval().requires_grad_(False)
