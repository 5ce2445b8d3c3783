"""The strengths and the base model that a LoRA's header states, or a config beside its file.

PEFT calls this an adapter's config: diffusers writes it into the header, PEFT beside the file. Each of its settings is
followed, or refused by PEFT's name for it. This module knows configs; it knows no layer of any model.
"""

import math
import re
import time
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import NamedTuple

import regex

from service import strict_json
from service.device_thread import check_cancelled

# Where a config is: in this field of the header (diffusers), or in this file beside the weights (PEFT).
IN_HEADER, BESIDE = "lora_adapter_metadata", "adapter_config.json"
# FLUX.1 and its CLIP have some 600 layers, each of which may have an expression.
MAX_EXPRESSIONS = 2_000
# Characters of an expression with its repetitions written out, as the compiler does: ten characters may take gigabytes.
MAX_EXPRESSION = 1_024
# Seconds for all expressions of a pattern together, and for one of them and one name.
PATTERN_SECONDS, MATCH_SECONDS = 5.0, 1.0
# Letters and dots, escaped or not: such an expression cannot take long, so Python's own engine compares it.
PLAIN = re.compile(r"\^?(?:\w|\\?\.)+", re.ASCII)
# Expressions that the engine with a time limit may read otherwise: braces that count nothing, and sets of sets.
UNSURE = re.compile(r"\{(?!\d+(,\d*)?\}|,\d+\})|\[[^\]]*(\[|--|&&|~~|\|\|)")
# PEFT's names for the kinds of change that are applied here, and its defaults of rank and alpha.
KINDS = ("LORA", "LOHA", "LOKR")
DEFAULT = 8
# How factors are initialized. These leave the base alone; the others changed it, so their factors do not fit ours.
INITS = ("true", "false", "none", "gaussian", "eva", "mica", "orthogonal")
INITS_OF_BASE = re.compile(r"pissa(_niter_\d+)?|olora|corda|lora_ga|loftq")
CONVERT = "save it for the base as it was, with PEFT's save_pretrained(path_initial_model_for_weight_conversion=...)"
# Switches of PEFT that are followed here; the last means nothing for matrices.
SWITCHES = ("use_rslora", "use_dora", "use_effective_conv2d")
# Settings that change how factors are applied, in ways that are not done here.
REFUSED = {
    "alora_invocation_tokens": "it acts only behind certain tokens",
    "arrow_config": "it chooses among several LoRAs for each token",
    "kasa_config": "it was trained on a base that was changed",
    "layer_replication": "it repeats layers of the model",
    "monteclora_config": "its factors are drawn anew for each step",
    "target_parameters": "it changes parameters that are no layer's weight",
    "trainable_token_indices": "it changes single tokens of a text encoder",
    "use_bdlora": "its factors are made of blocks",
    "use_qalora": "it takes averages of what goes into a layer",
}
# Fields of headers that tell the model that a file was trained for, and models that share FLUX.1's names and shapes.
BASES = ("modelspec.architecture", "modelspec.implementation", "ss_base_model_version")
OTHER_BASES = {r"flux[ ._-]?2(?!\d)": "FLUX.2", r"(?<![a-z])chroma(?![a-z])": "Chroma"}
# Fields that name it to users: of Stability's model spec (sd-scripts, OneTrainer, SimpleTuner), of ai-toolkit and
# sd-scripts, of sd-scripts, of others.
NAMED_BASES = ("modelspec.architecture", "ss_base_model_version", "ss_sd_model_name", "base_model")
# For Python's own engine, or for the one with a time limit.
Expression = re.Pattern[str] | regex.Pattern[str]


class Factors(NamedTuple):
    """A pair of factors in a file, to be compared with a config."""

    names: tuple[str, ...]  # the layer's
    kind: str  # PEFT's name of it
    rank: int | None  # None for LoKr's whole matrices
    has_alpha: bool


class Pattern:
    """PEFT's rank_pattern or alpha_pattern: a number for the layers whose names an expression fits, else the default.

    Numbers must be `above` another. Errors name the `source`.
    """

    def __init__(self, source: str, numbers: object, above: float = -math.inf, default: float | None = None) -> None:
        self._source, self._default = source, default
        if not isinstance(numbers, dict):
            raise ValueError(f"The LoRA's {source} has {_shown(numbers)} where numbers by expression must be.")
        if len(numbers) > MAX_EXPRESSIONS:
            raise ValueError(
                f"The LoRA's {source} has {len(numbers)} expressions in a pattern; it may have {MAX_EXPRESSIONS}."
            )
        self._seconds = PATTERN_SECONDS  # that are left
        self._numbers = [
            (self._compile(expression), _number(source, number, above)) for expression, number in numbers.items()
        ]

    def find(self, names: Iterable[str]) -> float | None:
        """The number for a layer of these names, by PEFT's rule: the first expression that fits a name, or its end."""
        with self._timed(_shown(next(iter(names), ""))):
            for expression, number in self._numbers:
                if any(self._fits(expression, name) for name in names):
                    return number
        return self._default

    def _fits(self, expression: Expression, name: str) -> bool:
        if isinstance(expression, re.Pattern):
            return expression.match(name) is not None
        check_cancelled()
        left = self._until - time.monotonic()
        if left <= 0:
            raise TimeoutError
        return expression.match(name, timeout=min(MATCH_SECONDS, left)) is not None

    def _compile(self, expression: str) -> Expression:
        """The expression that PEFT makes of it, for an engine with a time limit unless it is plain."""
        counts = [max(1, int(count)) for count in re.findall(r"\{(\d+)", expression[:MAX_EXPRESSION])]
        if len(expression) * math.prod(counts) > MAX_EXPRESSION:
            raise ValueError(
                f"The LoRA's {self._source} has {_shown(expression)} in a pattern, which has more than "
                f"{MAX_EXPRESSION} characters, with what it repeats written out."
            )
        try:
            if UNSURE.search(expression):
                raise re.error("unsure")
            with self._timed(_shown(expression)):
                compiled = re.compile(text := rf"(.*\.)?({expression})$")
                return compiled if PLAIN.fullmatch(expression) else regex.compile(text)
        except (re.error, regex.error, OverflowError, RecursionError):
            raise ValueError(
                f"The LoRA's {self._source} has {_shown(expression)} in a pattern, which is no regular expression that "
                "can be used for names here."
            ) from None

    @contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        """Count the time inside, and give up when all seconds of the pattern are used."""
        check_cancelled()
        began = time.monotonic()
        self._until = began + self._seconds
        try:
            if self._seconds <= 0:
                raise TimeoutError
            yield
        except TimeoutError:
            raise ValueError(
                f"The LoRA's {self._source} has expressions that take too long to compare with names, such as {what}."
            ) from None
        finally:
            self._seconds -= time.monotonic() - began


def _number(source: str, value: object, above: float = -math.inf) -> float:
    try:
        number = float(value)
    except (ValueError, TypeError, OverflowError):
        number = math.nan
    if isinstance(value, bool) or not math.isfinite(number) or number <= above:
        beyond = "" if math.isinf(above) else f" above {above:g}"
        raise ValueError(f"The LoRA's {source} says {_shown(value)} where a number{beyond} must be.")
    return number


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


NO_PATTERN = Pattern(IN_HEADER, {})


@dataclass(frozen=True)
class Adapter:
    """A config's strengths of a LoRA's layers; the defaults are those without a config."""

    source: str = IN_HEADER  # the config's name in errors
    alphas: Pattern = NO_PATTERN
    ranks: Pattern = NO_PATTERN
    rank_stabilized: bool = False
    decomposed: bool = False  # DoRA: each layer has a magnitude

    def strength(self, names: Iterable[str], rank: int | None, alpha: float | None) -> float:
        """The strength by which the product of a layer's factors is multiplied.

        Args:
            names: the layer's in the file.
            rank: of its factors; None where they have none.
            alpha: the layer's own; wins over the config's, and is divided by the rank, rank-stabilized or not.
        """
        if alpha is not None:
            return alpha / rank if rank else 1.0
        alpha, rank = self.alphas.find(names), rank or self.ranks.find(names)
        if alpha is None or rank is None:
            return 1.0
        return alpha / (math.sqrt(rank) if self.rank_stabilized else rank)


def read_adapters(
    metadata: Mapping[str, str], models: Collection[str], config: str, factors: Sequence[Factors]
) -> tuple[dict[str, Adapter], str]:
    """The config of each model that a file changes, from its header or beside it; and what became of the one beside it.

    Raises:
        ValueError: see `read_header`.
    """
    header = read_header(metadata, models)
    if header is not None:
        return header, f"its {BESIDE} is left aside: the header has one" if config else ""
    adapter, said = _read_config(config, factors) if config else (Adapter(), "")
    return dict.fromkeys(models, adapter), said


def read_header(metadata: Mapping[str, str], models: Collection[str]) -> dict[str, Adapter] | None:
    """The header's config for each of the models that the file changes; None where it has none at all.

    Raises:
        ValueError: a sentence about a config that makes no sense, about a setting of these models that cannot be
            followed here, or about another model that the file is made for.
    """
    for key in BASES:
        _refuse_other_base("header", key, metadata.get(key))
    stated = _parse(metadata.get(IN_HEADER, "{}"), IN_HEADER)
    if not stated:
        return None
    configs: defaultdict[str, dict[str, object]] = defaultdict(dict)
    for key, value in stated.items():
        component, _, name = key.rpartition(".")
        model = "transformer" if component in ("", "unet") else component
        configs[model][name] = value
    adapters = {}
    for model in models:
        _refuse(configs[model], IN_HEADER)
        adapters[model] = _adapter(configs[model], IN_HEADER) if configs[model] else Adapter()
    return adapters


def _read_config(text: str, factors: Sequence[Factors]) -> tuple[Adapter, str]:
    """The config beside a file with these factors, or the defaults if it is not the file's; and which it is."""
    if all(it.has_alpha for it in factors):
        reason = "the file has alphas of its own" if factors else "the file has no factors"
    else:
        config = _parse(text, BESIDE)
        reason = _kind_misfit(config, factors)
    if reason is None:
        adapter = _adapter(config, BESIDE)
        reason = _rank_misfit(adapter, factors)
    if reason is not None:
        return Adapter(), f"its {BESIDE} is left aside: {reason}"
    _refuse(config, BESIDE)
    return adapter, f"its {BESIDE} counts"


def named_base(metadata: Mapping[str, str], config: str = "") -> tuple[str, str] | None:
    """The base model that a file says it is made for, and where: in its header, a config there, or one beside it."""
    stated = [(key, metadata.get(key)) for key in NAMED_BASES]
    for source, text in ((IN_HEADER, metadata.get(IN_HEADER, "{}")), (BESIDE, config or "{}")):
        with suppress(ValueError):
            values = _parse(text, source).items()
            stated += [(source, value) for key, value in values if key.endswith("base_model_name_or_path")]
    named = ((value.strip(), source) for source, value in stated if isinstance(value, str))
    return next((it for it in named if it[0].lower() not in ("", "none", "null")), None)


def _kind_misfit(config: Mapping[str, object], factors: Iterable[Factors]) -> str | None:
    """Why a config is not PEFT's, or is for another kind of factors; None where it may be theirs."""
    if not config.keys() & {"peft_type", "r", "lora_alpha", "alpha"}:
        return "it says nothing that PEFT says"
    for names, kind, _, _ in factors:
        # Kinds whose names end so have LoRA's factors, and some have more.
        if kind != _kind(config) and not (kind == "LORA" and _kind(config).endswith("LORA")):
            return f"it is for {_shown(_kind(config))}, and {_shown(names[0])} has factors of {kind}"
    return None


def _rank_misfit(adapter: Adapter, factors: Iterable[Factors]) -> str | None:
    """Why a config is for factors of other ranks; None where it may be theirs."""
    for names, _, rank, _ in factors:
        stated = adapter.ranks.find(names)
        if None not in (rank, stated) and rank != stated:
            return f"it says rank {stated:g} for {_shown(names[0])}, whose factors have {rank}"
    return None


def _kind(config: Mapping[str, object]) -> str:
    return str(config.get("peft_type") or "LORA").upper().removeprefix("PEFTTYPE.")


def _parse(text: str, source: str) -> dict[str, object]:
    try:
        config = strict_json.read(text.encode())
    except ValueError as error:
        raise ValueError(f"The LoRA's {source} makes no sense: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"The LoRA's {source} makes no sense: it is no JSON object.")
    return config


def _adapter(config: Mapping[str, object], source: str) -> Adapter:
    def switch(name: str) -> bool:
        value = config.get(name)
        if value not in (None, True, False):
            raise ValueError(f"The LoRA's {source} says {name} {_shown(value)}; it must be true or false.")
        return bool(value)

    alpha = _number(source, config.get("lora_alpha", config.get("alpha", DEFAULT)))
    rank = _number(source, config.get("r", DEFAULT), above=0)
    return Adapter(
        source,
        Pattern(source, config.get("alpha_pattern") or {}, default=alpha),
        Pattern(source, config.get("rank_pattern") or {}, above=0, default=rank),
        switch("use_rslora"),
        switch("use_dora"),
    )


def _refuse(config: Mapping[str, object], source: str) -> None:
    init = str(config.get("init_lora_weights", True)).lower()
    if INITS_OF_BASE.fullmatch(init):
        remedy = "train it with another, such as true" if init == "loftq" else CONVERT
        raise ValueError(
            f"The LoRA's {source} says init_lora_weights {init}, which changed the base that it was trained on, so it "
            f"means something only beside that; {remedy}."
        )
    if init not in INITS:
        raise ValueError(
            f"The LoRA's {source} says init_lora_weights {_shown(init)}, which is not known to leave the base alone; "
            f"it must be one of {', '.join(INITS)}."
        )
    kind = _kind(config)
    if kind not in KINDS:
        raise ValueError(f"The LoRA's {source} says peft_type {_shown(kind)}; it must be one of {', '.join(KINDS)}.")
    for name, value in config.items():
        reason = REFUSED.get(name)
        if reason is None and name.startswith("use_") and name not in SWITCHES:
            reason = "what it does is not known here"
        if value and reason:
            raise ValueError(f"The LoRA's {source} sets {_shown(name)}, which cannot be done here: {reason}.")
    base = config.get("base_model_name_or_path")
    # Of a path, its end: the rest tells of the trainer's machine.
    _refuse_other_base(source, "base_model_name_or_path", base.rpartition("/")[2] if isinstance(base, str) else None)


def _refuse_other_base(source: str, key: str, value: object) -> None:
    for pattern, model in OTHER_BASES.items():
        if isinstance(value, str) and re.search(pattern, value, re.IGNORECASE):
            raise ValueError(
                f"The file is made for {model}: its {source} says {key} {_shown(value)}; it must be a LoRA for FLUX.1."
            )
