"""A LoRA file in any format → deltas by parameter, and a report of what was applied and what was not.

What a file says about a layer of FLUX or CLIP is applied exactly, or the file is refused in one sentence before
anything is changed. What belongs to nothing here (a T5, embeddings) is ignored and reported. This module knows files
and keeps parsed ones; `lora.names` knows what a layer may be called, `lora.reader` what its tensors say, `lora.adapter`
what is said of all of them.
"""

from collections import Counter, OrderedDict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import nn

from lora import deltas
from lora.adapter import BESIDE, Adapter, Factors, read_config, read_header
from lora.deltas import Delta
from lora.names import Content, Layer, assign, claim, layers_by_name, refuse_what_is_no_lora
from lora.reader import LayerReader, factors_of, name_full_ranks
from request import LoraFile
from service import slabs
from service.device_thread import check_cancelled
from service.machine import host_memory

# Of host memory, what parsed LoRAs may take: the rest is for base weights, the page cache and the server.
CACHE_SHARE = 0.25


@dataclass(frozen=True)
class Report:
    """What became of a file."""

    format: str  # the way of writing names, such as "kohya"
    kinds: tuple[str, ...]
    ranks: tuple[int, ...]
    applied: int
    total: int
    ignored: Mapping[str, int]  # tensors by reason
    config: str = ""  # what was done with the one beside the file

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
    """The deltas of a file; those of each model lie in slabs of their own, since they are brought to it at one time."""

    transformer: Mapping[str, tuple[Delta, ...]]  # by parameter name
    text_encoder: Mapping[str, tuple[Delta, ...]]  # CLIP's
    report: Report

    @cached_property
    def nbytes(self) -> int:
        """Host memory that it takes, as torch rounds it where it is pinned."""
        changes = [*self.transformer.values(), *self.text_encoder.values()]
        return slabs.taken(tensor for several in changes for delta in several for tensor in delta.tensors())


def read_lora(file: Path, transformer: nn.Module, text_encoder: nn.Module, config: str = "") -> Lora:
    """Read a LoRA.

    Args:
        file: safetensors, by anyone.
        transformer: a FluxTransformer2DModel of any dimensions; only its names and shapes are looked at.
        text_encoder: a CLIPTextModel, likewise.
        config: text of the adapter_config.json that lay beside the file. It counts where the file says nothing itself,
            and where it can be that file's.

    Raises:
        ValueError: one sentence, if anything in it cannot be applied exactly or nothing at all can.
    """
    by_model: dict[str, dict[str, tuple[Delta, ...]]] = {"transformer": {}, "text_encoder": {}}
    readers: list[LayerReader] = []
    claimed: dict[str, Layer] = {}
    try:
        with safe_open(file, framework="pt") as tensors:
            names = sorted(tensors.keys())
            found, ignored = assign(names, layers_by_name(transformer, text_encoder))
            refuse_what_is_no_lora(found, ignored, names)

            def shape(name: str) -> list[int]:
                return tensors.get_slice(name).get_shape()

            name_full_ranks(found, shape)
            factors = (it for layer, content in found.items() for it in factors_of(layer, content, shape))
            adapters, said = _adapters(tensors.metadata() or {}, {layer.model for layer in found}, config, factors)
            for layer, content in found.items():
                check_cancelled()
                claim(layer, claimed)
                readers.append(LayerReader(layer, content, tensors.get_tensor, adapters[layer.model]))
                by_parameter = by_model[layer.model]
                for parameter, delta in readers[-1].deltas():
                    by_parameter[parameter] = (*by_parameter.get(parameter, ()), delta)
    except (SafetensorError, OSError) as error:
        reason = f" ({error})" if isinstance(error, SafetensorError) else ""
        raise ValueError(f"The LoRA is not a safetensors file that can be read{reason}.") from error
    modules = {"transformer": transformer, "text_encoder": text_encoder}
    packed = {model: deltas.pack(_in_order(by_model[model], module)) for model, module in modules.items()}
    return Lora(**packed, report=_report(found, readers, ignored, said))


def _in_order(by_parameter: Mapping[str, tuple[Delta, ...]], module: nn.Module) -> dict[str, tuple[Delta, ...]]:
    """The same, in the order of the module's parameters: they are written in it, and the first ones come first."""
    return {name: by_parameter[name] for name, _ in module.named_parameters() if name in by_parameter}


def _adapters(
    metadata: Mapping[str, str], models: Collection[str], config: str, factors: Iterable[Factors]
) -> tuple[dict[str, Adapter], str]:
    """Strengths by model: the header's, else those of the config beside the file; and what was done with that."""
    header = read_header(metadata, models)
    if header is not None:
        return header, f"its {BESIDE} is left aside: the header has one" if config else ""
    adapter, said = read_config(config, factors) if config else (Adapter(), "")
    return dict.fromkeys(models, adapter), said


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
    """Parsed LoRAs in host memory, by content; the least recently used go first.

    Args:
        transformer: see `read_lora`.
        text_encoder: see `read_lora`.
        max_bytes: what they may hold together; a larger one is read each time anew.
    """

    def __init__(self, transformer: nn.Module, text_encoder: nn.Module, max_bytes: int | None = None) -> None:
        self._models = (transformer, text_encoder)
        self._max_bytes = int(CACHE_SHARE * host_memory()) if max_bytes is None else max_bytes
        self._loras: OrderedDict[str, Lora] = OrderedDict()

    def read(self, file: LoraFile) -> Lora:
        """Parse a LoRA, or take it from the cache.

        Raises:
            ValueError: see `read_lora`.
        """
        lora = self._loras.get(file.content)
        if lora is None:
            lora = read_lora(file.path, *self._models, file.config)
            if lora.nbytes <= self._max_bytes:
                self._make_room(lora.nbytes)
                self._loras[file.content] = lora
        else:
            self._loras.move_to_end(file.content)
        return lora

    def _make_room(self, size: int) -> None:
        held = sum(lora.nbytes for lora in self._loras.values())
        while self._loras and held + size > self._max_bytes:
            held -= self._loras.popitem(last=False)[1].nbytes
