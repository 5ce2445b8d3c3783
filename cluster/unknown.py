"""What a log says of inputs that the predictor does not have, which Cog drops in silence.

This module knows names; it knows nothing of what the inputs are for.
"""

import difflib
from collections.abc import Collection, Sequence

from cluster.privacy import show_input
from sources.shown import brief

# What other predictors call an input whose name here is too unlike theirs to be found by likeness.
ELSEWHERE = {
    **dict.fromkeys(("hf_lora", "lora", "lora_url", "lora_weights"), "replicate_weights"),
    "steps": "num_inference_steps",
}
# A request may have thousands: so many are named, the others counted.
NAMED = 8


def notice(unknown: Sequence[str], known: Collection[str]) -> str | None:
    """The line, with its end; None where no input is unknown. Each name has at most 200 characters there."""
    if not unknown:
        return None
    named = [_named(name, known) for name in unknown[:NAMED]]
    if len(unknown) > NAMED:
        named.append(f"{len(unknown) - NAMED} more")
    *before, last = named
    names = f"{', '.join(before)} and {last}" if before else last
    said = "inputs {} are unknown and have" if before else "input {} is unknown and has"
    return f"The {said.format(names)} no effect.\n"


def _named(name: str, known: Collection[str]) -> str:
    """A name as it may be shown, in quotes where it could be taken for several words, and what it may stand for."""
    shown = brief(show_input(name))
    close = ELSEWHERE.get(name)
    if close not in known:
        close = next(iter(difflib.get_close_matches(shown, known, 1)), None)
    hint = f" (did you mean {close}?)" if close else ""
    return f"{shown if shown.isidentifier() else repr(shown)}{hint}"
