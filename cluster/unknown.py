"""The log's line about inputs that the predictor does not have, which Cog drops silently. Knows names alone."""

import difflib
import re
from collections.abc import Collection, Sequence

from cluster.privacy import SHOWN_CHARACTERS, show_input
from sources.shown import brief

# Other predictors' names for our inputs, which likeness would not find, or take for another input.
ELSEWHERE = {
    theirs: ours
    for ours, names in {
        "replicate_weights": "lora loras hf_lora hf_loras lora_url lora_urls lora_weights weights",
        "lora_scale": "lora_strength lora_weight",
        "extra_lora": "extra_hf_lora extra_lora_url extra_lora_weights lora_2",
        "extra_lora_scale": "extra_lora_strength extra_lora_weight lora_scale_2",
        "num_inference_steps": "steps n_steps num_steps inference_steps sampling_steps",
        "guidance_scale": "cfg cfg_scale guidance",
        "num_outputs": "n num_images num_samples batch_size",
        "image": "image_url init_image input_image",
        "mask": "mask_image mask_url",
        "prompt_strength": "strength denoise denoising_strength",
        "output_quality": "quality",
        "output_format": "format",
    }.items()
    for theirs in names.split()
}
# How alike two words must be to be a typing error, from 0 to 1.
LIKENESS = 0.75
# The names that are listed; the others, perhaps thousands, are counted.
NAMED = 8


def notice(unknown: Sequence[str], known: Collection[str]) -> str | None:
    """The line, with its end; None where no input is unknown. Names are cut to 200 characters."""
    if not unknown:
        return None
    named = [_named(name, known) for name in unknown[:NAMED]]
    if len(unknown) > NAMED:
        named.append(f"{len(unknown) - NAMED} more")
    if len(named) == 1:
        return f"The input {named[0]} is unknown and has no effect.\n"
    return f"The inputs {', '.join(named[:-1])} and {named[-1]} are unknown and have no effect.\n"


def _named(name: str, known: Collection[str]) -> str:
    """A name without secrets, quoted unless it is one word, and with the input that may be meant."""
    # Cut first: of a longer text, `show_input` would leave out the last word, which may be all of the name.
    shown = brief(show_input(name[:SHOWN_CHARACTERS]))
    close = ELSEWHERE.get(name.lower())
    if close not in known:
        close = next((ours for ours in known if _is_slip(shown.lower(), ours)), None)
    hint = f" (did you mean {close}?)" if close else ""
    return f"{shown if shown.isidentifier() else repr(shown)}{hint}"


def _is_slip(name: str, ours: str) -> bool:
    """Whether the name may be ours with typing errors.

    Words are compared, since as whole names enable_safety_checker and disable_safety_checker are alike. A word with
    another first letter or with a number is another word: rescale, image2.
    """
    words, meant = re.split(r"[\W_]+", name), ours.split("_")
    return "".join(words) == "".join(meant) or (len(words) == len(meant) and all(map(_alike, words, meant)))


def _alike(word: str, ours: str) -> bool:
    return word.isalpha() and word[0] == ours[0] and difflib.SequenceMatcher(None, word, ours).ratio() >= LIKENESS
