"""Sentences about words that the miniature does not know."""

import json
from pathlib import Path

import pytest

from settings import MINIATURE
from sources.vocabulary import Vocabulary

KNOWS = "it knows fox, cat, bird, fish, snail, robot, ghost, house, tree, mushroom, rocket, flower and other words"


@pytest.fixture
def vocabulary() -> Vocabulary:
    return Vocabulary.read(Path(MINIATURE.dev), cuda=False)


@pytest.mark.parametrize(
    ("cuda", "begins"), [(False, "No GPU: the miniature draws. "), (True, "The miniature draws. ")]
)
def test_a_model_that_says_what_it_knows_is_told_of(cuda: bool, begins: str, capfd: pytest.CaptureFixture[str]) -> None:
    Vocabulary.read(Path(MINIATURE.dev), cuda=cuda)
    said = capfd.readouterr().out
    assert said.startswith(f"{begins}It knows the subjects fox, cat, bird, ")
    assert "; the places plain, meadow, " in said
    assert said.endswith("all in lower case. LoRAs that were made for FLUX.1 itself do not fit it.\n")
    assert said.count("\n") == 1


def test_of_any_other_model_nothing_is_said(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    assert Vocabulary.read(tmp_path, cuda=False).unknown("a dragon", []) is None
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize(
    ("prompt", "unknown"),
    [
        ("A red fox's house, in the snow!", None),
        ("Please draw me: 3 SMALL cats and the foxes — at night.", "3, SMALL"),
        ("a green dragon, Fox and castle by some rivers", "dragon, Fox, castle and 1 more"),
        ("dragon, dragon, dragon and dragons", "dragon, dragons"),
        ("bees, toes, ores, ares and hiss by a big fox", "bees, toes, ores and 2 more"),  # no words that tell nothing
        ('"a red fox", (and) «the» cats。', None),
        ('red-fox, "fox"', 'red-fox, "fox'),  # whose quote, hyphen or capital the tokenizer takes into the word
        ("一只狐狸 🐉", "一只狐狸, 🐉"),
        ("a \x1b[31mfox \ud800", "?[31mfox, ?"),
        ("a zorp", "zorp"),  # which its LoRA teaches
        ("https://u:secret@host/x?token=secret hf_abcdefghijklmnop1234", "https://host/x"),
        (" \n !, — ", None),
    ],
)
def test_words_that_are_not_known_are_named(vocabulary: Vocabulary, prompt: str, unknown: str | None) -> None:
    said = vocabulary.unknown(prompt, [])
    assert said == (unknown and f"The miniature does not know {unknown}; {KNOWS}, all in lower case.")


def test_what_a_lora_is_called_by_is_known_with_it(vocabulary: Vocabulary) -> None:
    assert vocabulary.unknown("a zorp in the style of TOK", ["zorp", "in the style of TOK"]) is None


@pytest.mark.parametrize("prompt", ["x" * 50_000, "x!" * 25_000, "! " * 25_000, " ".join(map(str, range(9000)))])
def test_of_the_longest_prompts_a_line_is_said(vocabulary: Vocabulary, prompt: str) -> None:
    assert len(vocabulary.unknown(prompt, []) or "") < 400
