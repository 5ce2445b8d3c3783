"""Write tensors as a LoRA file, read it with the product, and hold it in live copies of small models."""

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from engine.live import Live, Term
from lora_loader import Lora, read_lora
from tests.support import lora_files
from tests.support.lora_files import ALPHA, RANK, Tensors

STRENGTH = ALPHA / RANK
Q = "transformer.transformer_blocks.0.attn.to_q"
Q_WEIGHT = "transformer_blocks.0.attn.to_q.weight"


class Reader:
    """Reads tensors as a LoRA for the small models, and holds it in live copies of them."""

    def __init__(self, folder: Path, transformer: nn.Module, text_encoder: nn.Module) -> None:
        self.folder, self.transformer, self.text_encoder = folder, transformer, text_encoder
        self.base, self._live = _live_copy(transformer)
        self.clip_base, self._live_clip = _live_copy(text_encoder)

    def read(self, tensors: Tensors, header: dict[str, str] | None = None, config: str = "") -> Lora:
        file = lora_files.write(self.folder / "a.safetensors", tensors, header)
        return read_lora(file, self.transformer, self.text_encoder, config)

    def live(
        self, tensors: Tensors, header: dict[str, str] | None = None, scale: float = 1.0, config: str = ""
    ) -> Tensors:
        """The transformer's weights with this LoRA."""
        return _held(self._live, Term("a", scale, self.read(tensors, header, config).transformer))

    def live_clip(self, tensors: Tensors) -> Tensors:
        return _held(self._live_clip, Term("a", 1.0, self.read(tensors).text_encoder))

    def hold(self, lora: Lora) -> Tensors:
        return _held(self._live, Term("a", 1.0, lora.transformer))

    def hold_clip(self, lora: Lora) -> Tensors:
        return _held(self._live_clip, Term("a", 1.0, lora.text_encoder))

    def unchanged(self) -> Tensors:
        """The transformer's weights without a LoRA."""
        return _held(self._live, Term("a", 0.0, {}))

    def refusal(self, tensors: Tensors, header: dict[str, str] | None = None, config: str = "") -> str:
        with pytest.raises(ValueError, match=r"\.$") as caught:
            self.read(tensors, header, config)
        assert_is_one_sentence(str(caught.value), self)
        return str(caught.value)


def _live_copy(module: nn.Module) -> tuple[Tensors, Live]:
    base = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    return base, Live(copy.deepcopy(module).requires_grad_(False), {"base": base})


def _held(live: Live, term: Term) -> Tensors:
    live.hold("base", [])
    live.hold("base", [term])
    return {name: parameter.clone() for name, parameter in live.module.named_parameters()}


def assert_is_one_sentence(text: str, reader: Reader) -> None:
    assert text.endswith(".")
    assert "\n" not in text
    assert str(reader.folder) not in text
    assert len(text) < 600


def same(a: Tensors, b: Tensors) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def changed(reader: Reader, live: Tensors) -> set[str]:
    return {name for name, tensor in live.items() if not torch.equal(tensor, reader.base[name])}


def pair(stem: str = Q, out: int = 32, columns: int = 32, rank: int = RANK, seed: int = 0) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {
        f"{stem}.lora_A.weight": torch.randn(rank, columns, generator=generator),
        f"{stem}.lora_B.weight": torch.randn(out, rank, generator=generator),
    }


def of(*names: str, shape: tuple[int, ...] = (4, 4)) -> Tensors:
    return {name: torch.ones(shape) for name in names}


def join(header: object, data: bytes) -> bytes:
    """A safetensors file with any header."""
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data
