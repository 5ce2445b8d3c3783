"""Settings in the header or in a config beside the file are applied by PEFT's rules, or refused by name."""

import json
import time
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel
from transformers import CLIPTextConfig, CLIPTextModel

from lora.adapter import MAX_EXPRESSIONS, Pattern, named_base
from lora_loader import read_lora
from tests.support import lora_files
from tests.support.lora_files import RANK, Tensors
from tests.support.lora_reader import Q_WEIGHT, Q, Reader, assert_is_one_sentence, pair


def beside(**config: object) -> str:
    """A config as PEFT saves it beside the weights."""
    return json.dumps({"peft_type": "LORA", "r": RANK, "lora_alpha": 4 * RANK, "init_lora_weights": True} | config)


def test_expressions_of_a_header_are_peft_s_at_full_size(tmp_path: Path) -> None:
    """The example by which a literal comparison doubled all single blocks' proj_out."""
    with torch.device("meta"):
        transformer = FluxTransformer2DModel(num_layers=1, num_single_layers=1, guidance_embeds=True)
        text_encoder = CLIPTextModel(CLIPTextConfig(eos_token_id=2, bos_token_id=0, num_hidden_layers=1))
    outer, inner = "transformer.proj_out", "transformer.single_transformer_blocks.0.proj_out"
    tensors = {f"{outer}.lora_A.weight": torch.ones(4, 3072), f"{outer}.lora_B.weight": torch.ones(64, 4)}
    tensors |= {f"{inner}.lora_A.weight": torch.ones(2, 15360), f"{inner}.lora_B.weight": torch.ones(3072, 2)}
    header = lora_files.metadata(2, 2, alpha_pattern={"^proj_out": 4}, rank_pattern={"^proj_out": 4})
    lora = read_lora(lora_files.write(tmp_path / "a.safetensors", tensors, header), transformer, text_encoder)
    assert {name: delta.strength for name, [delta] in lora.transformer.items()} == {
        "proj_out.weight": 1.0,
        "single_transformer_blocks.0.proj_out.weight": 1.0,
    }


# ---------------------------------------------------------------------------------------------------------------------
# Beside the file


def strength(
    reader: Reader, config: str, tensors: Tensors | None = None, header: dict[str, str] | None = None
) -> float:
    [delta] = reader.read(tensors or pair(), header, config).transformer[Q_WEIGHT]
    return delta.strength


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, 4.0),
        ({"use_rslora": True}, 4 * RANK / RANK**0.5),
        ({"alpha_pattern": {r".*\.to_[qk]": 2}}, 2 / RANK),
        ({"r": 8, "rank_pattern": {r"transformer_blocks\.\d+\.attn\.to_q": RANK}}, 4.0),
        ({"r": RANK, "lora_alpha": 8, "alpha_pattern": None, "rank_pattern": None}, 8 / RANK),
        ({"peft_type": "PeftType.LORA"}, 4.0),
        ({"r": RANK + 1}, 1.0),
        ({"rank_pattern": {"to_q": 8}}, 1.0),
        ({"peft_type": "LOKR"}, 1.0),
    ],
)
def test_a_config_beside_the_file_counts_where_it_can_be_the_file_s(
    reader: Reader, config: dict, expected: float
) -> None:
    assert strength(reader, beside(**config)) == expected
    said = str(reader.read(pair(), config=beside(**config)).report)
    assert ("its adapter_config.json counts." in said) == (expected != 1)
    assert ("its adapter_config.json is left aside: it " in said) == (expected == 1)


def test_a_header_and_alphas_win_over_the_config_beside_the_file(reader: Reader) -> None:
    assert strength(reader, beside(), header=lora_files.metadata(6)) == 6 / RANK
    assert strength(reader, beside(use_rslora=True), pair() | {f"{Q}.alpha": torch.tensor(6.0)}) == 6 / RANK
    assert strength(reader, "nonsense", header=lora_files.metadata(6)) == 6 / RANK
    said = [
        str(reader.read(pair(), lora_files.metadata(6), beside()).report),
        str(reader.read(pair() | {f"{Q}.alpha": torch.tensor(6.0)}, config=beside()).report),
        str(reader.read({f"{Q}.diff": torch.ones(32, 32)}, config=beside()).report),
        str(reader.read(pair(), config='{"fine_tune_type": "lora", "lora_parameters": {"scale": 20}}').report),
    ]
    reasons = (
        "the header has one",
        "the file has alphas of its own",
        "the file has no factors",
        "it says nothing that PEFT",
    )
    for report, reason in zip(said, reasons, strict=True):
        assert f"; its adapter_config.json is left aside: {reason}" in report


def test_the_rank_of_transposed_factors_of_a_square_layer(reader: Reader) -> None:
    given = {f"{Q}.lora_a": torch.ones(32, RANK), f"{Q}.lora_b": torch.ones(RANK, 32)}
    assert strength(reader, beside(), given) == 4.0


def test_an_alpha_of_a_whole_lokr_leaves_it_at_1(reader: Reader) -> None:
    whole = {f"{Q}.lokr_w1": torch.ones(4, 4), f"{Q}.lokr_w2": torch.ones(8, 8), f"{Q}.alpha": torch.tensor(1e10)}
    assert strength(reader, "", whole, lora_files.metadata(16)) == 1.0


def test_peft_s_defaults_count_where_a_config_leaves_them_out(reader: Reader) -> None:
    assert strength(reader, json.dumps({"peft_type": "LORA", "r": RANK})) == 8 / RANK
    assert strength(reader, json.dumps({"lora_alpha": 2}), pair(rank=8)) == 2 / 8
    header = {"lora_adapter_metadata": json.dumps({"transformer.r": RANK})}
    assert strength(reader, "", header=header) == 8 / RANK
    assert strength(reader, beside(), header={"lora_adapter_metadata": "{}"}) == 4.0


def test_a_config_is_none_of_a_lone_full_rank_factor_beside_pairs(reader: Reader) -> None:
    given = pair() | {"transformer.transformer_blocks.0.attn.to_k.lora_A.weight": torch.ones(32, 32)}
    assert strength(reader, beside(), given) == 4.0


def test_names_with_and_without_wrappers_are_both_compared(reader: Reader) -> None:
    for key in ("^transformer_blocks.0.attn.to_q", "^_orig_mod.transformer_blocks.0.attn.to_q", "to_q"):
        header = lora_files.metadata(6, alpha_pattern={key: 8})
        assert strength(reader, "", pair(f"transformer._orig_mod.{Q.removeprefix('transformer.')}"), header) == 8 / RANK
    # PEFT takes no more off a name than its own prefix.
    inner = pair(f"base_model.model.diffusion_model.{Q.removeprefix('transformer.')}")
    assert strength(reader, beside(alpha_pattern={"^diffusion_model.transformer_blocks.*": 8}), inner) == 8 / RANK
    assert strength(reader, beside(alpha_pattern={"^transformer_blocks.*": 8}), inner) == 4.0


def test_peft_s_lokr_has_a_strength_without_a_rank(reader: Reader) -> None:
    """LyCORIS' has none: there, an alpha beside two whole matrices means nothing."""
    whole = {f"{Q}.lokr_w1": torch.randn(4, 8), f"{Q}.lokr_w2": torch.randn(8, 4)}
    assert strength(reader, "", whole) == 1.0
    assert strength(reader, json.dumps({"peft_type": "LOKR", "r": 8, "alpha": 2}), whole) == 2 / 8


@pytest.mark.parametrize("config", ["", "{", "[]", "1", '{"r": NaN}', '{"r": 4, "r": 4}', "<!DOCTYPE html>"])
def test_a_config_that_makes_no_sense_is_refused_where_it_would_count(reader: Reader, config: str) -> None:
    if config == "":
        assert strength(reader, config) == 1.0
    else:
        assert "adapter_config.json makes no sense: it " in reader.refusal(pair(), config=config)


# ---------------------------------------------------------------------------------------------------------------------
# Settings that are refused

HARMLESS = [True, False, None, "gaussian", "Gaussian", "eva", "mica", "orthogonal"]
CHANGED_BASE = ["pissa", "pissa_niter_4", "PiSSA", "olora", "loftq", "corda", "lora_ga"]


@pytest.mark.parametrize("begin", HARMLESS)
def test_beginnings_that_leave_the_base_alone_apply(reader: Reader, begin: object) -> None:
    assert strength(reader, beside(init_lora_weights=begin)) == 4.0
    assert strength(reader, "", header=lora_files.metadata(6, init_lora_weights=begin)) == 6 / RANK


@pytest.mark.parametrize("begin", [*CHANGED_BASE, "pissa_niter_", "lora_fa", 3])
def test_other_beginnings_are_refused_by_name(reader: Reader, begin: object) -> None:
    for said in (
        reader.refusal(pair(), config=beside(init_lora_weights=begin)),
        reader.refusal(pair(), lora_files.metadata(init_lora_weights=begin)),
    ):
        assert f"init_lora_weights {str(begin).lower()}" in said.replace("'", "")
        assert ("changed the base" in said) == (begin in CHANGED_BASE)


REFUSED: dict[str, object] = {
    "alora_invocation_tokens": [1, 2],
    "arrow_config": {"top_k": 3},
    "kasa_config": {"beta": 1e-4},
    "layer_replication": [[0, 2], [1, 3]],
    "monteclora_config": {"num_samples": 8},
    "target_parameters": ["attn.to_q.weight"],
    "trainable_token_indices": [1],
    "use_bdlora": {"nblocks": 2},
    "use_qalora": True,
    "use_what_comes_next": True,
    "peft_type": "ADALORA",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_done_is_refused_by_its_name(reader: Reader, name: str) -> None:
    said = reader.refusal(pair(), lora_files.metadata(**{name: REFUSED[name]}))
    what = (
        "says peft_type 'ADALORA'; it must be one of" if name == "peft_type" else f"sets '{name}', which cannot be done"
    )
    assert f"The LoRA's lora_adapter_metadata {what}" in said
    given = {name: REFUSED[name]}
    assert f"The LoRA's adapter_config.json {what}" in reader.refusal(pair(), config=beside(**given))
    # The config of another file refuses nothing.
    assert strength(reader, beside(**given, r=5)) == 1.0
    assert strength(reader, beside(**{name: None})) == 4.0


def test_a_header_s_config_for_a_model_that_the_file_has_nothing_for_refuses_nothing(reader: Reader) -> None:
    config = {"transformer.r": RANK, "transformer.lora_alpha": 6, "text_encoder.init_lora_weights": "pissa"}
    assert strength(reader, "", header={"lora_adapter_metadata": json.dumps(config)}) == 6 / RANK


def test_dora_without_magnitudes_is_refused(reader: Reader) -> None:
    assert "says use_dora, but transformer_blocks.0.attn.to_q has no magnitude" in reader.refusal(
        pair(), config=beside(use_dora=True)
    )
    given = pair() | {f"{Q}.lora_magnitude_vector": torch.ones(32)}
    assert reader.read(given, config=beside(use_dora=True)).report.kinds == ("DoRA",)


@pytest.mark.parametrize(
    ("header", "model"),
    [
        ({"modelspec.architecture": "flux-2-dev/lora"}, "FLUX.2"),
        ({"ss_base_model_version": "flux2_klein_4b"}, "FLUX.2"),
        ({"modelspec.implementation": "https://github.com/black-forest-labs/flux2"}, "FLUX.2"),
        (lora_files.metadata(base_model_name_or_path="black-forest-labs/FLUX.2-klein-4B"), "FLUX.2"),
        ({"ss_base_model_version": "chroma"}, "Chroma"),
        ({"modelspec.architecture": "flux-1-dev/lora", "ss_base_model_version": "flux1"}, None),
        ({"modelspec.architecture": "Flux.1-schnell", "ss_base_model_version": "flux.1"}, None),
        (lora_files.metadata(base_model_name_or_path="black-forest-labs/FLUX.1-Kontext-dev"), None),
    ],
)
def test_a_header_may_tell_that_names_like_ours_are_another_model_s(
    reader: Reader, header: dict[str, str], model: str | None
) -> None:
    if model is None:
        assert reader.read(pair(), header).report.applied == 2
    else:
        assert f"The file is made for {model}: its " in reader.refusal(pair(), header)


# ---------------------------------------------------------------------------------------------------------------------
# Strangers' expressions


UNUSABLE = ["(", "(?R)", "[[:alpha:]]", "(a){e<=3}", "[a-z&&[x]]"]
TOO_LONG = ["a{99999999999}", "[a-z]{1000000000}", "((a{99}){99}){99}", "x" * 4097, "(a{000000000008000000})"]


@pytest.mark.parametrize("expression", UNUSABLE + TOO_LONG)
def test_what_is_no_expression_or_would_take_gigabytes_is_refused(reader: Reader, expression: str) -> None:
    said = reader.refusal(pair(), lora_files.metadata(alpha_pattern={expression: 1}))
    assert "in a pattern, which is no regular expression that can be used for names here" in said or (
        expression in TOO_LONG and "in a pattern, which has more than 1024 characters" in said
    )


def test_an_expression_that_takes_for_ever_is_given_up(reader: Reader) -> None:
    pattern = Pattern("header", {"(a|a_|aa)+$b": 1})
    with pytest.raises(ValueError, match="take too long to compare with names, such as ") as caught:
        pattern.find(["a" * 200])
    assert_is_one_sentence(str(caught.value), reader)


def test_many_expressions_that_take_long_together_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each ends within MATCH_SECONDS; compiling counts too."""
    monkeypatch.setattr("lora.adapter.PATTERN_SECONDS", 0.3)
    began = time.thread_time()
    with pytest.raises(ValueError, match="take too long to compare with names"):
        Pattern("header", {f"{number:04}" + "(?:a|b)?" * 30: 1 for number in range(MAX_EXPRESSIONS)})
    pattern = Pattern("header", {"." + ".*" * 6 + f"[{number}](?#i)": 1 for number in range(9)})
    with pytest.raises(ValueError, match="take too long to compare with names"):
        [pattern.find(["transformer_blocks.0.attn.to_q"]) for _ in range(10_000)]
    slow = Pattern("header", {f"(a|a_|aa)+$b(?#{number})": 1 for number in range(200)})
    with pytest.raises(ValueError, match="take too long to compare with names"):
        slow.find(["a" * 22])
    assert time.thread_time() - began < 10


def test_more_expressions_than_layers_are_refused(reader: Reader) -> None:
    many = {f"layer.{number}": 1 for number in range(MAX_EXPRESSIONS + 1)}
    assert f"{MAX_EXPRESSIONS + 1} expressions" in reader.refusal(pair(), lora_files.metadata(rank_pattern=many))


@pytest.mark.parametrize(
    ("metadata", "config", "expected"),
    [
        ({}, "", None),
        ({"format": "pt", "ss_base_model_version": "None", "ss_sd_model_name": ""}, "", None),
        (
            {"ss_sd_model_name": "flux1-dev.safetensors", "modelspec.architecture": "flux-1-dev/lora"},
            "",
            ("flux-1-dev/lora", "modelspec.architecture"),
        ),
        ({"ss_base_model_version": "flux1"}, '{"base_model_name_or_path": "x"}', ("flux1", "ss_base_model_version")),
        (
            {"lora_adapter_metadata": '{"transformer.r": 4, "transformer.base_model_name_or_path": "o/FLUX.1-dev"}'},
            "",
            ("o/FLUX.1-dev", "lora_adapter_metadata"),
        ),
        (
            {"lora_adapter_metadata": '{"transformer.base_model_name_or_path": null}'},
            '{"base_model_name_or_path": "o/FLUX.1-dev"}',
            ("o/FLUX.1-dev", "adapter_config.json"),
        ),
        ({}, "no JSON", None),
    ],
)
def test_the_base_model_that_a_file_names_is_found(
    metadata: dict[str, str], config: str, expected: tuple[str, str] | None
) -> None:
    assert named_base(metadata, config) == expected
