"""The words that a base model knows, if its folder lists them as the miniature's does; others are named in the log."""

import json
import string
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from sources.shown import brief, redact_text

# Ignored after a word. Before a word, the miniature's tokenizer makes it a part of the word.
PUNCTUATION = string.punctuation + "…—–’”»。，、！？；：」،؟"
# Ignored before a silent word, where it does no harm.
BEFORE = string.punctuation + "“‘«「"
# Ignored at the end of a known word: the tokenizer makes it a token of its own.
ENDINGS = ("", "s", "es", "'s", "’s")
NAMED = 3  # how many unknown words are named; the others are counted


@dataclass(frozen=True)
class Vocabulary:
    """A model's words by their role in a picture; no groups for a model that may know any word."""

    groups: Mapping[str, list[str]]

    @classmethod
    def read(cls, folder: Path, *, cuda: bool) -> "Vocabulary":
        """The vocabulary in the folder of the model whose text encoders read prompts; if any, the log describes it."""
        file = folder / "words.json"
        if not file.is_file():
            return cls({})
        groups = {name: words.split() for name, words in json.loads(file.read_text()).items()}
        named = "; ".join(f"the {name} {', '.join(groups[name])}" for name in ("subjects", "colours", "places"))
        drawn = "The miniature draws" if cuda else "No GPU: the miniature draws"
        words = f"{named}; and {len(groups['more'])} more words, all in lower case"
        print(f"{drawn}. It knows {words}. LoRAs that were made for FLUX.1 itself do not fit it.")
        return cls(groups)

    def unknown(self, prompt: str, trigger_words: Iterable[str]) -> str | None:
        """A sentence about the words of a prompt that the model does not know; None where it knows all of them.

        Words stand between spaces and their case counts, as in the tokenizer; with LoRAs it knows their trigger words.
        """
        if not self.groups:
            return None
        silent = set(self.groups["silent"])
        telling = [words for name, words in self.groups.items() if name != "silent"]
        known = {word for words in (*telling, *map(str.split, trigger_words)) for word in words}
        words = [word for text in redact_text(prompt).split() if (word := text.rstrip(PUNCTUATION))]
        unknown = [
            word
            for word in dict.fromkeys(words)
            if word.lower().lstrip(BEFORE) not in silent
            and known.isdisjoint(word.removesuffix(ending) for ending in ENDINGS)
        ]
        if not unknown:
            return None
        more = f" and {len(unknown) - NAMED} more" if len(unknown) > NAMED else ""
        return (
            f"The miniature does not know {brief(', '.join(unknown[:NAMED]))}{more}; it knows "
            f"{', '.join(self.groups['subjects'])} and other words, all in lower case."
        )
