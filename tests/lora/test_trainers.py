"""Files saved by PEFT, diffusers and LyCORIS change weights as these packages do."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from lycoris.wrapper import LycorisNetwork
from peft import LoHaConfig, LoKrConfig, LoraConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file
from torch import nn

from lora.adapter import Pattern
from lora_loader import read_lora
from tests.support import models
from tests.support.lora_files import Tensors
from tests.support.lora_reader import Reader

# Roundings of float32 in one element of a weight, theirs and ours: see test_generated.py.
TOLERANCE = 64 * 2**-24
LAYERS = [name for name, module in models.transformer().named_modules() if isinstance(module, nn.Linear)]
# One or more of each kind of change.
SOME = ["attn.to_q", "attn.add_v_proj", "ff.net.2", "norm1.linear", "proj_mlp", "x_embedder", "norm_out.linear"]


def assert_same_weights(live: Tensors, theirs: Tensors, reader: Reader) -> None:
    """Ours against a trainer's, which must have changed something; what a trainer does not name is as it was."""
    assert theirs.keys() <= live.keys()
    theirs = reader.base | {name: weight.detach() for name, weight in theirs.items()}
    assert any(not torch.equal(theirs[name], base) for name, base in reader.base.items())
    for name, weight in theirs.items():
        tolerance = TOLERANCE * max(1.0, weight.abs().max().item())
        torch.testing.assert_close(
            live[name], weight, rtol=0, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )


# ---------------------------------------------------------------------------------------------------------------------
# PEFT


def trained(config: PeftConfig, transformer: nn.Module | None = None) -> PeftModel:
    """A model whose adapter is as if it were trained: no number of it is zero."""
    torch.manual_seed(0)
    model = get_peft_model(transformer or models.transformer(), config)
    _train(model)
    return model


def _train(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            numbers = torch.rand_like(parameter) + 0.5 if "magnitude" in name else torch.randn_like(parameter) * 0.3
            parameter.data.copy_(numbers)


def saved(model: PeftModel, folder: Path) -> tuple[Tensors, str]:
    model.save_pretrained(folder)
    return load_file(folder / "adapter_model.safetensors"), (folder / "adapter_config.json").read_text()


RANKS = {
    "^proj_out": 1,
    r".*\.to_(q|k)": 2,
    r"transformer_blocks\.\d+\.attn\.to_q": 3,
    "norm1.linear": 5,
    "blocks.0.attn.to_v": 6,
    r"[a-z_]+\.1\.ff\.net\.2": 7,
    r"(?:single_)?transformer_blocks.1.*to_out.0": 8,
    "add_q_proj$": 9,
    "attn": 10,
    "no.layer": 11,
}
LORAS: dict[str, LoraConfig] = {
    "plain": LoraConfig(r=4, lora_alpha=6),
    "rslora": LoraConfig(r=4, lora_alpha=6, use_rslora=True),
    "ranks": LoraConfig(r=4, lora_alpha=6, rank_pattern=RANKS),
    "ranks, rslora": LoraConfig(r=4, lora_alpha=6, rank_pattern=RANKS, use_rslora=True),
    "alphas": LoraConfig(r=4, lora_alpha=6, alpha_pattern=RANKS),
    "alphas in another order": LoraConfig(r=4, lora_alpha=6, alpha_pattern=dict(reversed(RANKS.items()))),
    "ranks and alphas": LoraConfig(
        r=4,
        lora_alpha=6,
        rank_pattern={"to_q": 1, r"single_transformer_blocks\.\d+": 5, "x_embedder": 2},
        alpha_pattern={r"transformer_blocks\.(0|2)\.attn\.to_q": 9, r".*linear(_\d)?": 7, ".*": 5},
    ),
    "an expression for each": LoraConfig(
        r=2,
        lora_alpha=2,
        rank_pattern={f"^{name}": 1 + index % 6 for index, name in enumerate(LAYERS)},
        alpha_pattern={"^" + re.escape(name): 1 + index % 5 for index, name in enumerate(LAYERS)},
    ),
    "DoRA": LoraConfig(r=4, lora_alpha=6, use_dora=True),
    "DoRA, rslora and patterns": LoraConfig(
        r=4, lora_alpha=6, use_dora=True, use_rslora=True, rank_pattern=RANKS, alpha_pattern={"to_k|to_v": 3}
    ),
    "the layers' biases": LoraConfig(r=4, lora_alpha=6, bias="lora_only"),
    "all biases": LoraConfig(r=4, lora_alpha=6, bias="all", target_modules=SOME),
    "a bias in each B, rslora": LoraConfig(r=4, lora_alpha=6, lora_bias=True, use_rslora=True, rank_pattern=RANKS),
    "whole modules": LoraConfig(r=4, lora_alpha=6, target_modules=SOME, modules_to_save=["context_embedder"]),
}
OTHERS: dict[str, PeftConfig] = {
    "LoHa": LoHaConfig(r=4, alpha=6),
    "LoHa, patterns": LoHaConfig(r=4, alpha=6, rank_pattern=RANKS, alpha_pattern={"to_k|to_v": 3, "attn": 2}),
    "LoKr": LoKrConfig(r=2, alpha=6),
    "LoKr, patterns": LoKrConfig(r=2, alpha=6, rank_pattern=RANKS, alpha_pattern={"to_k|to_v": 3, "attn": 2}),
    "LoKr, both sides are factors": LoKrConfig(r=1, alpha=3, decompose_both=True),
    "LoKr, two whole matrices": LoKrConfig(r=32, alpha=6),
    "LoKr, small factor": LoKrConfig(r=3, alpha=6, decompose_factor=2),
    "LoKr, two whole matrices and patterns": LoKrConfig(
        r=32, alpha=6, rank_pattern=dict.fromkeys(RANKS, 64), alpha_pattern=RANKS
    ),
}
PEFTS = LORAS | OTHERS
for _config in PEFTS.values():
    has_patterns = _config.rank_pattern or _config.alpha_pattern
    _config.target_modules = _config.target_modules or (LAYERS if has_patterns else SOME)


@pytest.mark.parametrize("kind", PEFTS)
@pytest.mark.filterwarnings("ignore")
def test_what_peft_saves_is_what_it_merges(reader: Reader, tmp_path: Path, kind: str) -> None:
    model = trained(PEFTS[kind])
    tensors, beside = saved(model, tmp_path)
    lora = reader.read(tensors, config=beside)
    assert lora.report.applied == lora.report.total == len(tensors)
    assert "counts" in lora.report.config
    # PEFT sorts the keys of patterns when it saves them: what counts is what it reads back.
    again = PeftModel.from_pretrained(models.transformer(), tmp_path)
    assert_same_weights(reader.hold(lora), dict(again.merge_and_unload().named_parameters()), reader)


PATTERNS = [
    *RANKS,
    *(".*", "", "a|b", "to_q|to_k", "x_embedder|proj_out", r"\w+", r"[^.]+\.[^.]+", r"(?!single).*", r"(.*)\.\1"),
    *("transformer_blocks.0.attn.to_q", r"transformer_blocks\.0\.attn\.to_q", "TO_Q", "(?:to_(q|k|v)|to_out.0)"),
    *(
        r"transformer_blocks\.\d{1,2}\..*",
        r".*\bq\b.*",
        "blocks.*",
        "linear_[12]",
        "^single.*",
        "^.*net",
        r"\Aproj_out",
    ),
    *(r"norm\d?(_context)?\.linear", "(?P<which>to_[qk])", r"[\w.]+?(?<!_)out\.0", "to_out.[0-9]", ".+(?=)"),
]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns_fit_the_layers_that_they_fit_for_peft(reader: Reader, pattern: str) -> None:
    ours = Pattern("adapter_config.json", {pattern: 1.0})
    names = [name for name, _ in reader.transformer.named_modules()] + list(reader.base)
    for name in names:
        theirs = {pattern: 1.0}.get(get_pattern_key([pattern], name))
        assert ours.find([name]) == theirs, name


def test_of_several_patterns_the_first_that_fits_counts_as_for_peft(reader: Reader) -> None:
    for keys in (PATTERNS, PATTERNS[::-1], PATTERNS[::2], PATTERNS[1::3]):
        numbers = {key: float(index) for index, key in enumerate(keys)}
        ours = Pattern("adapter_config.json", numbers)
        for name, _ in reader.transformer.named_modules():
            assert ours.find([name]) == numbers.get(get_pattern_key(keys, name)), name


class Wrapped(nn.Module):
    """A trainer's own module around the transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer = models.transformer()


@pytest.mark.filterwarnings("ignore")
def test_patterns_are_of_the_names_in_the_model_that_peft_was_given(reader: Reader, tmp_path: Path) -> None:
    layers = [f"transformer.{name}" for name in LAYERS]
    patterns = {"transformer.transformer_blocks.0.attn.to_q": 2, "^transformer.proj_out": 3, "^proj_out": 5}
    config = LoraConfig(r=4, lora_alpha=6, target_modules=layers, alpha_pattern=patterns)
    model = trained(config, Wrapped())
    tensors, beside = saved(model, tmp_path)
    live = reader.live(tensors, config=beside)
    assert_same_weights(live, dict(model.merge_and_unload().transformer.named_parameters()), reader)


@pytest.mark.parametrize("begin", ["pissa", "olora"])
@pytest.mark.filterwarnings("ignore")
def test_factors_cut_out_of_the_base_are_refused(reader: Reader, tmp_path: Path, begin: str) -> None:
    model = get_peft_model(models.transformer(), LoraConfig(target_modules=SOME, init_lora_weights=begin))
    tensors, beside = saved(model, tmp_path)
    assert begin in reader.refusal(tensors, config=beside)


# ---------------------------------------------------------------------------------------------------------------------
# diffusers


def with_adapter(config: LoraConfig) -> FluxTransformer2DModel:
    torch.manual_seed(0)
    transformer = models.transformer()
    transformer.add_adapter(config)
    _train(transformer)
    return transformer


def fused(transformer: FluxTransformer2DModel) -> FluxTransformer2DModel:
    transformer.fuse_lora()
    transformer.unload_lora()
    return transformer


@pytest.mark.parametrize("kind", ["plain", "rslora", "ranks, rslora", "alphas", "an expression for each", "DoRA"])
@pytest.mark.filterwarnings("ignore")
def test_what_diffusers_saves_is_what_it_fuses(reader: Reader, tmp_path: Path, kind: str) -> None:
    transformer = with_adapter(LORAS[kind])
    transformer.save_lora_adapter(tmp_path / "of_the_model")
    FluxPipeline.save_lora_weights(
        tmp_path / "of_the_pipeline",
        transformer_lora_layers=get_peft_model_state_dict(transformer),
        transformer_lora_adapter_metadata=transformer.peft_config["default"].to_dict(),
    )
    merged = dict(fused(transformer).named_parameters())
    for folder in ("of_the_model", "of_the_pipeline"):
        lora = read_lora(
            tmp_path / folder / "pytorch_lora_weights.safetensors", reader.transformer, reader.text_encoder
        )
        assert lora.report.applied == lora.report.total
        assert_same_weights(reader.hold(lora), merged, reader)


# ---------------------------------------------------------------------------------------------------------------------
# LyCORIS


@pytest.fixture(autouse=True)
def preset() -> Iterator[None]:
    """LyCORIS keeps on its class which layers are trained."""
    kept = {
        name: getattr(LycorisNetwork, name) for name in ("TARGET_REPLACE_MODULE", "ENABLE_CONV", "TARGET_EXCLUDE_NAME")
    }
    others = rf"(?!.*\b({'|'.join(map(re.escape, SOME))})$|.*(fc1|norm\d)$)"
    LycorisNetwork.apply_preset(
        {"enable_conv": False, "target_module": ["Linear", "LayerNorm"], "exclude_name": [others]}
    )
    yield
    for name, value in kept.items():
        setattr(LycorisNetwork, name, value)


LYCORIS: dict[str, dict[str, object]] = {
    "LoCon": {"network_module": "locon"},
    "LoCon, rslora": {"network_module": "locon", "rs_lora": True},
    "LoCon, a scalar": {"network_module": "locon", "use_scalar": True},
    "LoCon, DoRA over rows": {"network_module": "locon", "weight_decompose": True, "wd_on_out": True},
    "LoCon, DoRA over columns": {"network_module": "locon", "weight_decompose": True, "wd_on_out": False},
    "LoHa": {"network_module": "loha"},
    "LoHa, rslora": {"network_module": "loha", "rs_lora": True},
    "LoHa, DoRA over rows": {"network_module": "loha", "weight_decompose": True, "wd_on_out": True},
    "LoHa, DoRA over columns": {"network_module": "loha", "weight_decompose": True, "wd_on_out": False},
    "LoKr": {"network_module": "lokr", "lora_dim": 2},
    "LoKr, small factor": {"network_module": "lokr", "lora_dim": 3, "factor": 2},
    "LoKr, both sides are factors": {"network_module": "lokr", "lora_dim": 1, "decompose_both": True},
    "LoKr, whole matrices": {"network_module": "lokr", "full_matrix": True},
    "LoKr, a large rank": {"network_module": "lokr", "lora_dim": 10_000, "alpha": 1},
    "LoKr, unbalanced": {"network_module": "lokr", "lora_dim": 2, "factor": 4, "unbalanced_factorization": True},
    "LoKr, rslora": {"network_module": "lokr", "lora_dim": 2, "rs_lora": True},
    "LoKr, DoRA over rows": {"network_module": "lokr", "lora_dim": 2, "weight_decompose": True, "wd_on_out": True},
    "LoKr, DoRA over columns": {"network_module": "lokr", "lora_dim": 2, "weight_decompose": True, "wd_on_out": False},
    "full": {"network_module": "full"},
}
NO_SUM: dict[str, tuple[dict[str, object], str]] = {
    "OFT": ({"network_module": "diag-oft"}, "OFT"),
    "OFT, rescaled": ({"network_module": "diag-oft", "rescaled": True}, "OFT"),
    "BOFT": ({"network_module": "boft"}, "OFT"),
    "GLoRA": ({"network_module": "glora"}, "GLoRA"),
    "IA3": ({"network_module": "ia3"}, "IA3"),
    "T-LoRA": ({"network_module": "tlora"}, "layer"),
}


def lycoris(model: nn.Module, options: dict[str, object]) -> LycorisNetwork:
    """A network in a model, its numbers as if it were trained."""
    torch.manual_seed(0)
    network = LycorisNetwork(model, **{"lora_dim": 4, "alpha": 6} | options)
    network.apply_to()
    for name, parameter in network.named_parameters():
        if "dora_scale" in name:
            parameter.data.copy_(torch.rand_like(parameter) + 0.5)
        else:
            parameter.data.add_(torch.randn_like(parameter) * 0.3)
    return network.eval()


def state(network: LycorisNetwork) -> Tensors:
    return {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}


# LyCORIS's `merge_to` multiplies LoHa and LoKr by alpha / rank twice, other than what it trains.
def answered(model: nn.Module) -> Tensors:
    """Weights and biases of linear layers, by what they make of unit vectors."""
    weights = {}
    for name in LAYERS:
        layer = model.get_submodule(name)
        bias = layer(torch.zeros(1, layer.in_features))
        weights[f"{name}.weight"] = (layer(torch.eye(layer.in_features)) - bias).T
        weights[f"{name}.bias"] = bias[0]
    return weights


@pytest.mark.parametrize("kind", LYCORIS)
@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_what_lycoris_saves_is_what_it_computes(reader: Reader, kind: str) -> None:
    transformer = models.transformer()
    tensors = state(lycoris(transformer, LYCORIS[kind]))
    lora = reader.read(tensors)
    assert lora.report.applied == lora.report.total == len(tensors)
    assert_same_weights(reader.hold(lora), answered(transformer), reader)


@pytest.mark.filterwarnings("ignore")
def test_norms_of_lycoris(reader: Reader) -> None:
    text_encoder = models.text_encoder()
    network = lycoris(text_encoder, {"network_module": "locon", "train_norm": True})
    tensors = state(network)
    live = reader.live_clip(tensors)
    network.restore()
    network.merge_to(1.0)
    merged = dict(text_encoder.named_parameters())
    changed = [name for name, base in reader.clip_base.items() if not torch.equal(merged[name], base)]
    assert any("norm" in name for name in changed)
    for name, weight in merged.items():
        torch.testing.assert_close(live[name], weight.detach(), rtol=0, atol=TOLERANCE * 4)


@pytest.mark.parametrize("kind", NO_SUM)
@pytest.mark.filterwarnings("ignore")
def test_what_is_no_sum_is_refused_by_name(reader: Reader, kind: str) -> None:
    LycorisNetwork.apply_preset({"exclude_name": [r"(?!.*attn\.to_q$)"]})  # of a size that all of them can take
    options, word = NO_SUM[kind]
    assert word in reader.refusal(state(lycoris(models.transformer(), options)))
