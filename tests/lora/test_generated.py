"""LoRA files of any trainer, drawn at random: what they say is applied, and what is strange in them harms nothing.

Each file is drawn together with the weights that it must lead to: a formula in float64, over names and numbers as the
trainer has them.
"""

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, event, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lora_loader import Lora
from tests.support import lora_files
from tests.support.lora_files import KOHYA, PEFT, SPELLINGS, Spelling, Tensors
from tests.support.lora_reader import Reader, assert_is_one_sentence

# The same files in each run.
QUICK = {
    "deadline": None,
    "derandomize": True,
    "database": None,
    "suppress_health_check": list(HealthCheck),
    "phases": (Phase.generate, Phase.shrink),
}
# Roundings of float32 in one element: of up to 18 products and their sum (three parts of rank 6), of a second such
# factor, of a strength, of the base and the result, and of a norm over 128 squares, which sums them pairwise or better.
ROUNDINGS = 64
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn)
ADAPTERS = ("default", "my-style", "my style", "style_2", "7", "default_0")
WRAPPERS = ("module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod")
MLX_FACTORS = (".lora_a", ".lora_b")
# Keys of rank_pattern and alpha_pattern. PEFT takes them for expressions, and the first that fits counts.
EXPRESSIONS = (
    "to_q", "attn.to_k", r"transformer_blocks\.\d+\.attn\.to_q", "^proj_out", r".*\.to_(q|k)", "norm1.linear",
    "blocks.0.attn.to_v", r"[a-z_]+\.1\.ff\.net\.2", r"(?:single_)?transformer_blocks.1.*to_out.0",
    r"single_transformer_blocks\.(0|2)\..+", "to_q$", "attn", "fits.nothing", r".*_embedder.*|proj_mlp",
    r"transformer_blocks\.[01]{1,2}\.(?!attn).*", ".*",
)  # fmt: skip


@dataclass(frozen=True)
class Trainer:
    """How a trainer writes its files."""

    spellings: tuple[str, ...]
    prefixes: tuple[str, ...]
    kinds: tuple[str, ...] = ("lora",)
    factors: tuple[str, str] = KOHYA
    alpha: str | None = ".alpha"
    magnitudes: tuple[str, ...] = (".dora_scale",)
    joint: str = "."  # between the parts of a layer's name
    config: str | None = None  # where PEFT's config lies
    clip: str = ""  # what stands before the names of CLIP's layers


LYCORIS_KINDS = ("lora", "dora", "loha", "lokr", "diff")
TRAINERS = {
    "kohya": Trainer(("BFL",), ("lora_unet",), ("lora", "split", "dora"), joint="_", clip="lora_te1"),
    "kohya, diffusers' names": Trainer(("diffusers", "diffusers, fused"), ("lora_unet",), joint="_"),
    "ai-toolkit": Trainer(
        ("diffusers",), ("transformer", "unet"), ("lora", "dora", "fullrank"), PEFT, None, (".magnitude",)
    ),
    "diffusers": Trainer(
        ("diffusers", "diffusers, fused"),
        ("transformer",),
        ("lora", "dora"),
        PEFT,
        None,
        (".lora_magnitude_vector", ".lora_magnitude_vector.weight"),
        config="header",
        clip="text_encoder",
    ),
    "PEFT": Trainer(
        ("diffusers", "diffusers, fused"),
        ("base_model.model",),
        ("lora", "dora"),
        PEFT,
        None,
        (".lora_magnitude_vector",),
        config="beside",
    ),
    "SimpleTuner": Trainer(("diffusers",), ("transformer.base_model.model", "transformer"), ("lora",), PEFT, None),
    "SimpleTuner, LyCORIS": Trainer(("diffusers",), ("lycoris",), ("lokr",), joint="_"),
    "OneTrainer, legacy": Trainer(("diffusers",), ("lora_transformer",), LYCORIS_KINDS, joint="_", clip="lora_te1"),
    "OneTrainer, OMI": Trainer(("OMI",), ("transformer",), LYCORIS_KINDS, clip="clip_l"),
    "XLabs": Trainer(("XLabs",), ("",), factors=(".down.weight", ".up.weight"), alpha=None),
    "ComfyUI": Trainer(("BFL",), ("diffusion_model",), LYCORIS_KINDS, clip="text_encoders.clip_l.transformer"),
    "DiffSynth": Trainer(("DiffSynth",), ("", "pipe.dit"), factors=PEFT, alpha=None),
    "LyCORIS": Trainer(("diffusers", "BFL"), ("lycoris", "lora_unet"), LYCORIS_KINDS, joint="_"),
    "fal": Trainer(("BFL",), ("base_model.model",), factors=PEFT, alpha=None),
    "MLX": Trainer(("BFL", "MLX"), ("",), factors=MLX_FACTORS, alpha=None),
}


@dataclass(frozen=True)
class Change:
    """A file's tensors for one layer, by suffix, and the layer's weight with them applied."""

    tensors: Tensors
    weight: Callable[[Tensor], Tensor]  # float64, as the trainer has it
    largest: float = 1.0  # no sum has larger terms
    bias: Tensor | None = None  # is added to the layer's


@dataclass
class File:
    """A file, and the parameters that it must lead to."""

    trainer: str
    tensors: Tensors = field(default_factory=dict)
    header: dict[str, str] | None = None
    config: str = ""
    layers: list[Spelling] = field(default_factory=list)
    stems: list[str] = field(default_factory=list)
    expected: Tensors = field(default_factory=dict)
    tolerance: dict[str, float] = field(default_factory=dict)


@dataclass
class Config:
    """PEFT's config: what each layer's rank and strength is by it."""

    rank: int
    alpha: float
    ranks: dict[str, int]
    alphas: dict[str, float]
    rank_stabilized: bool

    def rank_of(self, name: str) -> int:
        return _first_that_fits(self.ranks, name, self.rank)

    def strength(self, name: str, rank: int) -> float:
        return _first_that_fits(self.alphas, name, self.alpha) / (math.sqrt(rank) if self.rank_stabilized else rank)

    def values(self, decomposed: bool) -> dict[str, object]:
        return {
            "peft_type": "LORA",
            "r": self.rank,
            "lora_alpha": self.alpha,
            "rank_pattern": self.ranks,
            "alpha_pattern": self.alphas,
            "use_rslora": self.rank_stabilized,
            "use_dora": decomposed,
            "init_lora_weights": True,
            "bias": "none",
            "target_modules": ["to_q"],
            "base_model_name_or_path": "black-forest-labs/FLUX.1-dev",
        }


def base(reader: Reader) -> Tensors:
    """The parameters of both models; none has a name of the other's."""
    return reader.base | reader.clip_base


def hold(reader: Reader, lora: Lora) -> Tensors:
    return reader.hold(lora) | reader.hold_clip(lora)


def _first_that_fits(pattern: dict[str, float], name: str, default: float) -> float:
    return next((value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", name)), default)


class Drawer:
    """Draws one file.

    Args:
        draw: hypothesis'.
        reader: has the models.
        trainer: whose file.
    """

    def __init__(self, draw: st.DrawFn, reader: Reader, trainer: str) -> None:
        self.draw, self.reader = draw, reader
        self.generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
        self.name, self.trainer = trainer, TRAINERS[trainer]
        self.dtype = draw(st.sampled_from(DTYPES))
        self.alphas = draw(st.sampled_from(("all", "some", "none"))) if self.trainer.alpha else "none"
        self.adapter = draw(st.sampled_from(ADAPTERS)) if self.trainer.factors == PEFT and draw(st.booleans()) else ""
        self.wrappers = draw(st.lists(st.tuples(st.sampled_from(WRAPPERS), st.integers(0, 11)), max_size=2))
        self.config: Config | None = None  # of the model whose layers are drawn
        self.base = base(reader)

    def file(self) -> File:
        draw, file = self.draw, File(self.name)
        # PEFT makes a DoRA of all layers or of none.
        kinds = (draw(st.sampled_from(self.trainer.kinds)),) if self.trainer.config else self.trainer.kinds
        layers = SPELLINGS[draw(st.sampled_from(self.trainer.spellings))](self.reader.transformer)
        metadata = self.add(file, layers, draw(st.sampled_from(self.trainer.prefixes)), kinds, "transformer")
        if self.trainer.clip and draw(st.booleans()):
            # Newer versions of CLIP, and so PEFT's names of its layers, have no text_model.
            before = draw(st.sampled_from(("text_model.", ""))) if self.trainer.config else "text_model."
            layers = lora_files.clip_spellings(self.reader.text_encoder, before)
            metadata |= self.add(file, layers, self.trainer.clip, kinds, "text_encoder")
        if metadata and self.trainer.config == "header":
            file.header = {"format": "pt", "lora_adapter_metadata": json.dumps(metadata)}
        event(f"{self.name}, {self.dtype}")
        return file

    def add(
        self, file: File, layers: list[Spelling], prefix: str, kinds: tuple[str, ...], model: str
    ) -> dict[str, object]:
        """Draw changes of some layers of one model; gives what the file's header says of them."""
        draw, said = self.draw, {}
        some = st.sampled_from(layers)
        if fused := [layer for layer in layers if len(layer.parts) > 1]:
            some |= st.sampled_from(fused)  # they are the fewer ones, and more can go wrong with them
        chosen = draw(st.lists(some, min_size=2, max_size=5, unique_by=lambda layer: layer.name))
        self.config = None
        if self.trainer.config and draw(st.sampled_from((True, True, True, False))):
            self.config = self.draw_config([layer.name for layer in chosen])
            values = self.config.values(kinds == ("dora",))
            said = {f"{model}.{key}": value for key, value in values.items()}
            if self.trainer.config == "beside":
                file.config = json.dumps(values)
        for layer in chosen:
            weight = layer.stack(self.base)
            change = getattr(self, draw(st.sampled_from(kinds)))(layer, weight)
            for suffix, tensor in change.tensors.items():
                file.tensors[self.spell(prefix, layer.name, suffix)] = tensor
            file.layers.append(layer)
            file.stems.append(self.spell(prefix, layer.name, ""))
            new = layer.split(change.weight(weight), self.base)
            if change.bias is not None:
                new |= layer.split(layer.stack(self.base, "bias") + change.bias, self.base, "bias")
            file.expected |= new
            largest = max(change.largest, weight.abs().max().item())
            file.tolerance |= dict.fromkeys(new, ROUNDINGS * 2**-24 * largest)
        return said

    def spell(self, prefix: str, name: str, suffix: str) -> str:
        """A tensor's name, wrappers' words within."""
        before = [prefix] if self.trainer.joint == "_" else prefix.split(".") if prefix else []
        stem = [*before, *name.split(".")]
        end = suffix.split(".")[1:]
        if self.adapter and suffix in (*PEFT, ".lora_magnitude_vector", ".lora_magnitude_vector.weight"):
            end.insert(1, self.adapter)
        for word, place in self.wrappers:
            # Modules have such names, not the tensors in them.
            place %= len(stem) + max(1, len(end))
            if place <= len(stem):
                stem.insert(place, word)
            else:
                end.insert(place - len(stem), word)
        return ".".join([self.trainer.joint.join(stem), *end])

    def draw_config(self, names: list[str]) -> Config:
        keys = st.sampled_from([*EXPRESSIONS, *names, *(re.escape(name) for name in names)])
        return Config(
            rank=self.draw(st.integers(1, 6)),
            alpha=self.draw(ALPHAS),
            ranks=self.draw(st.dictionaries(keys, st.integers(1, 6), max_size=4)),
            alphas=self.draw(st.dictionaries(keys, ALPHAS, max_size=4)),
            rank_stabilized=self.draw(st.booleans()),
        )

    def numbers(self, *shape: int) -> Tensor:
        return self.stored(torch.randn(shape, generator=self.generator) * 0.3)

    def stored(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.dtype)

    def draw_strength(self, layer: Spelling, rank: int) -> tuple[float, Tensors]:
        """What a product counts, and the tensor that says so."""
        if self.config:
            return self.config.strength(layer.name, rank), {}
        if self.alphas == "none" or (self.alphas == "some" and self.draw(st.booleans())):
            return 1.0, {}
        alpha = self.draw(ALPHAS)
        tensor = self.stored(torch.full(self.draw(st.sampled_from([(), (1,)])), alpha))
        return alpha / rank, {self.trainer.alpha: tensor}

    # The tensors that a file may have for a layer.

    def lora(self, layer: Spelling, base: Tensor) -> Change:
        out, columns = base.shape
        rank = self.config.rank_of(layer.name) if self.config else self.draw(st.integers(1, 6))
        strength, alpha = self.draw_strength(layer, rank)
        down, up = self.numbers(rank, columns), self.numbers(out, rank)
        transposed = self.trainer.factors == MLX_FACTORS
        stored = (down.T.contiguous(), up.T.contiguous()) if transposed else (down, up)
        tensors = dict(zip(self.trainer.factors, stored, strict=True)) | alpha
        return _product(tensors, strength, up.double(), down.double())

    def split(self, layer: Spelling, base: Tensor) -> Change:
        """Parts of a fused layer that were trained apart: factors that are zero but for blocks."""
        rank, heights = self.draw(st.integers(1, 6)), [len(self.base[f"{part}.weight"]) for part in layer.parts]
        strength, alpha = self.draw_strength(layer, rank * len(heights))
        down = self.numbers(rank * len(heights), base.shape[1])
        up = self.stored(torch.block_diag(*(self.numbers(height, rank).float() for height in heights)))
        tensors = dict(zip(self.trainer.factors, (down, up), strict=True)) | alpha
        return _product(tensors, strength, up.double(), down.double())

    def dora(self, layer: Spelling, base: Tensor) -> Change:
        kinds = ("lora", "loha", "lokr") if self.trainer.kinds == LYCORIS_KINDS else ("lora",)
        inner = getattr(self, self.draw(st.sampled_from(kinds)))(layer, base)
        suffix = self.draw(st.sampled_from(self.trainer.magnitudes))
        # LyCORIS and kohya tell by the shape what they norm.
        columns = suffix == ".dora_scale" and self.draw(st.booleans())
        shape = (1, base.shape[1]) if columns else (len(base), 1)
        magnitude = self.stored(torch.rand(shape, generator=self.generator) + 0.5)
        flat = suffix != ".dora_scale"
        axis = 0 if columns else 1

        def weight(base: Tensor) -> Tensor:
            merged = inner.weight(base)
            return magnitude.double() * merged / merged.norm(dim=axis, keepdim=True)

        gain = (magnitude.double() / inner.weight(base).norm(dim=axis, keepdim=True)).max().item()
        largest = max(1.0, gain) * (inner.largest + base.abs().max().item())
        return Change(inner.tensors | {suffix: magnitude.flatten() if flat else magnitude}, weight, largest)

    def fullrank(self, layer: Spelling, base: Tensor) -> Change:
        """ai-toolkit's: the whole difference, under the name of a factor."""
        difference = self.numbers(*base.shape)
        return Change({".lora_A.weight": difference}, lambda base: base + difference.double(), 4.0)

    def diff(self, layer: Spelling, base: Tensor) -> Change:
        difference, tensors, bias = self.numbers(*base.shape), {}, None
        if f"{layer.parts[0]}.bias" in self.base and self.draw(st.booleans()):
            tensors[".diff_b"] = self.numbers(len(base))
            bias = tensors[".diff_b"].double()
        _, alpha = self.draw_strength(layer, 1)  # means nothing here
        tensors |= {".diff": difference} | alpha
        return Change(tensors, lambda base: base + difference.double(), 4.0, bias)

    def loha(self, layer: Spelling, base: Tensor) -> Change:
        rank = self.draw(st.integers(1, 6))
        strength, alpha = self.draw_strength(layer, rank)
        sides = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
        a, b, c, d = (self.numbers(*shape) for shape in [(len(base), rank), (rank, base.shape[1])] * 2)
        tensors = {f".{side}": tensor for side, tensor in zip(sides, (a, b, c, d), strict=True)}
        a, b, c, d = (tensor.double() for tensor in (a, b, c, d))
        largest = abs(strength) * ((a.abs() @ b.abs()) * (c.abs() @ d.abs())).max().item()
        return Change(tensors | alpha, lambda base: base + strength * (a @ b) * (c @ d), max(1.0, largest))

    def lokr(self, layer: Spelling, base: Tensor) -> Change:
        out, columns = base.shape
        rank, first, one = self.draw(st.integers(1, 6)), *(self.draw(_divisors(size)) for size in (out, columns))
        tensors, whole = {}, True
        matrices, sizes = [], []
        for side, (rows, width) in (("lokr_w1", (first, one)), ("lokr_w2", (out // first, columns // one))):
            if self.draw(st.booleans()):
                tensors[f".{side}"] = matrix = self.numbers(rows, width)
                matrices.append(matrix.double())
                sizes.append(matrix.double().abs())
            else:
                whole = False
                a, b = self.numbers(rows, rank), self.numbers(rank, width)
                tensors |= {f".{side}_a": a, f".{side}_b": b}
                matrices.append(a.double() @ b.double())
                sizes.append(a.double().abs() @ b.double().abs())
        strength, alpha = self.draw_strength(layer, rank)
        strength = 1.0 if whole else strength
        product, largest = strength * torch.kron(*matrices), abs(strength) * torch.kron(*sizes).max().item()
        return Change(tensors | alpha, lambda base: base + product, max(1.0, largest))


ALPHAS = st.sampled_from([0.5, 1.0, 2.0, 3.0, 6.0, 16.0])


def _product(tensors: Tensors, strength: float, up: Tensor, down: Tensor) -> Change:
    largest = abs(strength) * (up.abs() @ down.abs()).max().item()
    return Change(tensors, lambda base: base + strength * up @ down, max(1.0, largest))


def _divisors(size: int) -> st.SearchStrategy[int]:
    return st.sampled_from([divisor for divisor in range(1, size + 1) if size % divisor == 0])


@pytest.mark.parametrize("trainer", TRAINERS)
@settings(max_examples=10, **QUICK)
@given(data=st.data())
def test_what_a_file_says_is_applied(reader: Reader, trainer: str, data: st.DataObject) -> None:
    file = Drawer(data.draw, reader, trainer).file()
    lora = reader.read(file.tensors, file.header, file.config)
    live, unchanged = hold(reader, lora), base(reader)
    assert all(torch.equal(live[name], unchanged[name]) for name in live.keys() - file.expected.keys())
    assert lora.transformer.keys() | lora.text_encoder.keys() == file.expected.keys()
    for name, expected in file.expected.items():
        error = (live[name].double() - expected).abs().max().item()
        assert error <= file.tolerance[name], f"{name} is wrong by {error}"
    assert lora.report.applied == lora.report.total == len(file.tensors)


# ---------------------------------------------------------------------------------------------------------------------
# Files with a tensor of something else

SUFFIXES = (
    *PEFT, *KOHYA, ".alpha", ".dora_scale", ".magnitude", ".lora_magnitude_vector.default.weight",
    ".lora_A.my-style.weight", ".lora_a", ".lora_down", ".diff", ".diff_b", ".lokr_w1", ".lokr_w2_b", ".hada_w1_a",
    ".up.weight", ".weight", ".bias", ".lora_B.bias",
)  # fmt: skip
UNKNOWN_SUFFIXES = (
    "", "_", ".lora_C.weight", ".lora_E", ".lora_X.default.weight", ".lora_embedding_A", ".lora_A.one.two.weight",
    ".oft_blocks", ".oft_diag", ".oft_R.weight", ".boft_R", ".ia3_l", ".on_input", ".a1.weight", ".bm.weight",
    ".vera_lambda_b", ".hra_u", ".fourierft_spectrum", ".q_layer.weight", ".lambda_layer", ".weight_scale",
    ".weight.absmax", ".input_scale", ".scalar", ".scale_weight", ".comfy_quant", ".qweight", ".lora_up.weight.bak",
    ".dora", ".mask", ".step", ".lora_C.t5_x.weight", ".text_projection.lora_A.weight", ".two\nlines",
)  # fmt: skip
UNKNOWN_LAYERS = (
    "double_blocks.2.img_attn.qkv", "single_blocks.3.linear1", "transformer_blocks.57.attn.to_q",
    "single_transformer_blocks.99999.proj_out", "blocks.2.attn.a_to_qkv", "double_blocks.0.img_attn.query",
    "transformer_blocks.0.attn.to_z", "transformer_blocks.0.attn.to_q.to_q", "transformer_blocks.0",
    "transformer_blocks", "attn.to_q", "controlnet_blocks.0", "controlnet_x_embedder", "redux_up", "time_in",
    "text_model.encoder.layers.7.mlp.fc1", "foo.bar", "iteration",
)  # fmt: skip
OTHER_MODELS = (
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
    "input_blocks.4.1.transformer_blocks.1.attn1.to_q", "joint_blocks.0.context_block.attn.qkv",
    "joint_transformer_blocks.0.attn.to_q", "blocks.0.self_attn.q", "transformer_blocks.0.img_mlp.net.0.proj",
    "double_blocks.0.img_mlp_fc1", "double_stream_blocks.0.block.attn1.to_q", "layers.0.attention.to_q",
    "model.layers.0.self_attn.q_proj", "distilled_guidance_layer.layers.0.in_layer",
    "double_stream_modulation_img.linear", "single_transformer_blocks.0.attn.to_qkv_mlp_proj", "decoder.conv_in",
    "encoder.down.0.block.0.conv1",
)  # fmt: skip
T5 = (
    "lora_te3_encoder_block_0_layer_0_SelfAttention_q",
    "lora_te2_encoder_block_0_layer_0_SelfAttention_q",
    "text_encoder_2.encoder.block.0.layer.0.SelfAttention.q",
    "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q",
    "t5.encoder.block.0.layer.1.DenseReluDense.wi_0",
)
PREFIXES = ("", "transformer.", "base_model.model.", "diffusion_model.", "unet.", "lora_unet_", "lora_transformer_")
PREFIXES += ("lycoris_", "pipe.dit.", "lora_te1_", "text_encoder.")
LETTERS = "aqlor_BA.019 -+/\\\"'{}[]$%é字🎨"


@dataclass(frozen=True)
class Strange:
    """A tensor that does not belong into a file."""

    name: str
    of_t5: bool = False
    layer: Spelling | None = None  # whose name it has all the same


def draw_strange(draw: st.DrawFn, reader: Reader, file: File) -> Strange:
    kind = draw(st.sampled_from(("known", "suffix", "layer", "both", "model", "T5", "text")))
    prefix = draw(st.sampled_from(PREFIXES))

    def spell(name: str, suffix: str) -> str:
        return prefix + (name.replace(".", "_") if prefix.endswith("_") else name) + suffix

    if kind in ("known", "suffix"):
        suffix = draw(st.sampled_from(SUFFIXES if kind == "known" else UNKNOWN_SUFFIXES))
        if draw(st.booleans()):
            number = draw(st.integers(0, len(file.layers) - 1))
            return Strange(file.stems[number] + suffix, layer=file.layers[number])
        layer = draw(
            st.sampled_from(SPELLINGS[draw(st.sampled_from(sorted(SPELLINGS.keys() - {"XLabs"})))](reader.transformer))
        )
        return Strange(spell(layer.name, suffix), layer=layer)
    if kind == "T5":
        return Strange(draw(st.sampled_from(T5)) + draw(st.sampled_from(SUFFIXES)), of_t5=True)
    if kind == "text":
        return Strange(draw(st.text(LETTERS, min_size=1, max_size=300)))
    layers = OTHER_MODELS if kind == "model" else UNKNOWN_LAYERS
    return Strange(
        spell(draw(st.sampled_from(layers)), draw(st.sampled_from(UNKNOWN_SUFFIXES if kind == "both" else SUFFIXES)))
    )


def shapes(layer: Spelling | None, reader: Reader) -> st.SearchStrategy[tuple[int, ...]]:
    """Any, and those that a layer's tensors may have."""
    out, columns = layer.stack(base(reader)).shape if layer else (32, 32)
    usual = [(1,), (), (out, columns), (out,), (out, 1), (3, columns), (out, 3)]
    return st.one_of(st.sampled_from(usual), st.lists(st.integers(0, 40), max_size=3).map(tuple))


def lora_or_refusal(reader: Reader, tensors: Tensors, file: File) -> Lora | str:
    try:
        return reader.read(tensors, file.header, file.config)
    except ValueError as error:
        return str(error)


@settings(max_examples=60, **QUICK)
@given(data=st.data())
def test_a_strange_tensor_is_applied_or_listed_or_refused(reader: Reader, data: st.DataObject) -> None:
    # XLabs' _lora belongs to the suffix as much as to the layer: another suffix behind it is no layer's.
    file = Drawer(data.draw, reader, data.draw(st.sampled_from(sorted(TRAINERS.keys() - {"XLabs"})))).file()
    strange = draw_strange(data.draw, reader, file)
    assume(strange.name not in file.tensors)
    shape = data.draw(shapes(strange.layer, reader))
    without = hold(reader, reader.read(file.tensors, file.header, file.config))
    tensors = file.tensors | {strange.name: torch.randn(shape, generator=torch.Generator().manual_seed(0))}
    lora = lora_or_refusal(reader, tensors, file)
    if isinstance(lora, str):
        event("refused")
        assert_is_one_sentence(lora, reader)
        assert not (strange.layer and "this FLUX lacks" in lora)
        assert not (strange.layer and "no layer of such a name" in lora)
        return
    report, live = lora.report, hold(reader, lora)
    assert report.total == len(tensors) == report.applied + sum(report.ignored.values())
    different = {name for name in live if not torch.equal(live[name], without[name])}
    if report.ignored:
        event("ignored")
        assert not different
        assert strange.layer is None
        assert all(("T5" in reason) == strange.of_t5 for reason in report.ignored)
    else:
        event("applied")
        assert strange.layer
        own = {f"{part}.{kind}" for part in strange.layer.parts for kind in ("weight", "bias")}
        assert different <= own
        assert own & (lora.transformer.keys() | lora.text_encoder.keys())
