"""A LoRA file in any format → deltas by parameter, and a report of the tensors that were applied or ignored.

A file's changes to layers of FLUX and CLIP are applied exactly, or the file is refused in one sentence before anything
is changed. Tensors of other models (a T5, embeddings) are ignored and reported. This module knows files and keeps
parsed ones; `lora.names` knows the spellings of layers, `lora.reader` the tensors of one, `lora.adapter` the configs.
"""

from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import nn

from lora import deltas
from lora.adapter import read_adapters
from lora.deltas import Delta
from lora.names import Content, Layer, assign, claim, layers_by_name, refuse_what_is_no_lora
from lora.reader import LayerReader, factors_of, name_full_ranks
from request import LoraFile
from service import slabs
from service.device_thread import check_cancelled
from service.machine import host_memory

# The share of host memory for parsed LoRAs: the rest is for base weights, the page cache and the server.
CACHE_SHARE = 0.25


@dataclass(frozen=True)
class Report:
    """How a file was applied."""

    format: str  # of names, such as "kohya"
    kinds: tuple[str, ...]
    ranks: tuple[int, ...]
    applied: int
    total: int
    ignored: Mapping[str, int]  # tensors by reason
    config: str = ""  # whether the one beside the file counts, and why

    def __str__(self) -> str:
        """One line."""
        ranks = f" of rank {self.ranks[0]}" if self.ranks else ""
        ranks += f" to {self.ranks[-1]}" if len(self.ranks) > 1 else ""
        ignored = "".join(f"; {reason} ({count})" for reason, count in self.ignored.items())
        kinds = " + ".join(self.kinds)
        config = f"; {self.config}" if self.config else ""
        return f"{self.format} {kinds}{ranks}, applied {self.applied} of {self.total} tensors{ignored}{config}."

    def metric(self) -> dict[str, object]:
        """The same for a machine."""
        return {
            "format": self.format,
            "kinds": list(self.kinds),
            "ranks": list(self.ranks),
            "applied": self.applied,
            "tensors": self.total,
            "ignored": dict(self.ignored),
            "config": self.config,
        }


@dataclass(frozen=True)
class Lora:
    """The deltas of a file; those of each model lie in slabs of their own, since they are copied to it together."""

    transformer: Mapping[str, tuple[Delta, ...]]  # by parameter name
    text_encoder: Mapping[str, tuple[Delta, ...]]  # CLIP's
    report: Report

    @cached_property
    def nbytes(self) -> int:
        """Bytes of host memory, as torch rounds them where it is pinned."""
        changes = chain(*self.transformer.values(), *self.text_encoder.values())
        return slabs.taken(tensor for delta in changes for tensor in delta.tensors())


def read_lora(file: Path, transformer: nn.Module, text_encoder: nn.Module, config: str = "") -> Lora:
    """The deltas of a LoRA.

    Args:
        file: safetensors, by anyone.
        transformer: a FluxTransformer2DModel of any dimensions; only its names and shapes are looked at.
        text_encoder: a CLIPTextModel, likewise.
        config: text of the adapter_config.json that lay beside the file. It counts where the file has neither a config
            nor alphas, and where it fits the file.

    Raises:
        ValueError: one sentence, if anything in it cannot be applied exactly or nothing at all can.
    """
    changes: dict[str, dict[str, list[Delta]]] = {"transformer": {}, "text_encoder": {}}
    readers: list[LayerReader] = []
    claimed: dict[str, Layer] = {}
    try:
        with safe_open(file, framework="pt") as tensors:
            names = sorted(tensors.keys())
            found, ignored = assign(names, layers_by_name(transformer, text_encoder))
            refuse_what_is_no_lora(found, ignored, names)

            def shape(name: str) -> list[int]:
                return tensors.get_slice(name).get_shape()

            factors = [it for layer, content in found.items() for it in factors_of(layer, content, shape)]
            name_full_ranks(found, {it.rank for it in factors}, shape)
            adapters, said = read_adapters(tensors.metadata() or {}, {layer.model for layer in found}, config, factors)
            for layer, content in found.items():
                check_cancelled()
                claim(layer, claimed)
                readers.append(LayerReader(layer, content, tensors.get_tensor, adapters[layer.model]))
                for parameter, delta in readers[-1].deltas():
                    changes[layer.model].setdefault(parameter, []).append(delta)
    except (SafetensorError, OSError) as error:
        reason = f" ({error})" if isinstance(error, SafetensorError) else ""
        raise ValueError(f"The LoRA is not a safetensors file that can be read{reason}.") from error
    packed = {}
    for model, module in (("transformer", transformer), ("text_encoder", text_encoder)):
        # In the order in which parameters are written: the first ones are then the first to be copied to the device.
        own = changes[model]
        packed[model] = deltas.pack({name: own[name] for name, _ in module.named_parameters() if name in own})
    return Lora(**packed, report=_report(found, readers, ignored, said))


def _report(
    found: Mapping[Layer, Content], readers: Iterable[LayerReader], ignored: Counter[str], config: str
) -> Report:
    kinds = Counter(kind for reader in readers for kind in sorted(reader.kinds))
    applied = sum(len(content.tensors) for content in found.values())
    return Report(
        format=Counter(content.format for content in found.values()).most_common(1)[0][0],
        kinds=tuple(kind for kind, _ in kinds.most_common()),
        ranks=tuple(sorted({rank for reader in readers for rank in reader.ranks})),
        applied=applied,
        total=applied + ignored.total(),
        ignored=dict(ignored),
        config=config,
    )


class LoraCache:
    """Parsed LoRAs in host memory by content, of at most `max_bytes`; the least recently used are dropped first."""

    def __init__(self, transformer: nn.Module, text_encoder: nn.Module, max_bytes: int | None = None) -> None:
        self._models = (transformer, text_encoder)
        self._max_bytes = int(CACHE_SHARE * host_memory()) if max_bytes is None else max_bytes
        self._loras: OrderedDict[str, Lora] = OrderedDict()

    def read(self, file: LoraFile) -> Lora:
        """A LoRA, from the cache or by `read_lora`."""
        lora = self._loras.pop(file.content, None) or read_lora(file.path, *self._models, file.config)
        if lora.nbytes <= self._max_bytes:  # a larger one is read each time anew
            while sum(it.nbytes for it in [*self._loras.values(), lora]) > self._max_bytes:
                self._loras.popitem(last=False)
            self._loras[file.content] = lora  # the last one
        return lora
